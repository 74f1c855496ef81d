"""Data: sources of labelled images, and batches as a function of the step.

`sources` opens a data set by name, `pipeline` turns it into batches of NumPy
arrays. Nothing here needs JAX, and importing loads no TensorFlow: it is loaded
where first used, with the accelerators hidden from it.
"""
