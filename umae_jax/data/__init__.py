"""Data: sources of labelled images, and batches as a function of the step.

`sources` opens a data set by name; `pipeline` turns it into batches of NumPy
arrays, `in_memory` into batches made on the devices. Of all modules here that
one alone needs JAX. Importing loads no TensorFlow: it is loaded where first
used, with the accelerators hidden from it.
"""
