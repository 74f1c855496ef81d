"""TensorFlow, loaded when first needed and kept off the accelerators."""

import functools
from typing import Any


@functools.cache
def tensorflow() -> Any:
  """Returns the module `tensorflow`, which from here on sees CPUs only.

  Otherwise it would claim the memory of the devices that JAX computes on. Its
  import takes seconds, hence a function instead of an import at the top.
  """
  import tensorflow as tf

  for kind in ("GPU", "TPU"):
    try:
      tf.config.set_visible_devices([], kind)
    except RuntimeError:  # The caller has used TensorFlow already: its choice.
      continue
  return tf
