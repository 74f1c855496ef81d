"""U-MAE in JAX/Flax: masked autoencoders with a uniformity loss.

Dimension key, used in every docstring, comment and test of this package:

  B  images in the global batch       D  width of an encoder token
  H  height of an image, pixels       E  width of a decoder token
  W  width of an image, pixels        K  visible patches, int(L * (1 - ratio))
  C  channels of an image             L  patches of an image, H * W / p^2
  N  examples of a data set           P  values of a patch, p * p * C
  p  side of a patch, pixels          T  tokens of a sequence

Import the modules by name (`from umae_jax import losses, models`); importing
the package itself loads neither JAX nor TensorFlow.
"""

__version__ = "0.1.0"


class UserError(ValueError):
  """What a user can cause and mend: names the key or file, value and remedy.

  The command line prints the message alone, without a traceback.
  """
