"""Data: sources of labelled images, and batches as a function of the step.

`sources` opens a data set by name; `pipeline` turns it into batches of NumPy
arrays. Or `in_memory` loads all of it, and `on_device` makes batches of that;
of all modules here these two alone need JAX. Importing loads no TensorFlow: it
is loaded where first used, with the accelerators hidden from it.
"""
