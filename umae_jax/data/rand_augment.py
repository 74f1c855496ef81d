"""RandAugment as a stage: random photometric and geometric operations.

Keras's RandAugment keeps a stateful seed generator, so that a resumed run
would see other images; hence this one, a function of "seed" alone.
"""

from collections.abc import Callable, Sequence
import functools
import math

from umae_jax.data import decode
from umae_jax.data.host_tensorflow import tensorflow
from umae_jax.data.share import Example, Stage

MEAN_COLOR = (124, 116, 104)  # ImageNet's; comes in from outside the image.
PROBABILITY = 0.5  # That a chosen operation is applied.


def rand_augment(
  magnitude: float,
  *,
  num_ops: int = 2,
  magnitude_std: float = 0.5,
  mean_color: Sequence[float] = MEAN_COLOR,
) -> Stage:
  """Stage: `num_ops` operations, each drawn from all 15 and applied or not.

  Each has probability 1/2 to be applied, a strength drawn from a normal law
  and clipped to [0, 10], and a random sign where it has a direction.

  Args:
    magnitude: mean strength, in [0, 10].
    num_ops: drawn with replacement.
    magnitude_std: deviation of the strength.
    mean_color: what comes in from outside, RGB in [0, 255]; of grey images,
      its mean.

  Returns:
    A stage. In and out: "image" (H, W, C) uint8, C = 1 or 3; "seed".

  Source: timm's rand-m9-mstd0.5-inc1, MAE's fine-tuning, is magnitude 9. That
  resamples bicubically, this bilinearly, which is all that TensorFlow has.
  """
  tf = tensorflow()
  chosen = list(operations(mean_color).values())

  def stage(example: Example) -> Example:
    image, shape = example["image"], example["image"].shape
    seed = tf.random.fold_in(example["seed"], 2)  # The flip has 1.
    draws = tf.random.stateless_uniform((num_ops, 3), seed, alg="philox")
    noise = tf.random.stateless_normal(
      (num_ops,), tf.random.fold_in(seed, 1), alg="philox"
    )
    levels = tf.clip_by_value(magnitude + magnitude_std * noise, 0, 10) / 10
    for draw, level in zip(tf.unstack(draws), tf.unstack(levels)):
      which, applied, sign = tf.unstack(draw)
      level = tf.where(sign < 0.5, level, -level)
      branches = [functools.partial(f, image, level) for f in chosen]
      branches.append(functools.partial(tf.identity, image))
      index = tf.cast(which * len(chosen), tf.int32)
      index = tf.where(applied < PROBABILITY, index, len(chosen))
      image = tf.ensure_shape(tf.switch_case(index, branches), shape)
    return example | {"image": image}

  return stage


def operations(mean_color: Sequence[float]) -> dict[str, Callable]:
  """{name: (image (H, W, C) uint8, level) -> image}.

  Args:
    mean_color: what comes in from outside, RGB in [0, 255].

  Returns:
    The 15 of timm's "increasing" RandAugment. `level` is () float32 in [-1,
    1], its size the strength; only geometry, color, contrast, brightness and
    sharpness heed its sign, and they do nothing at 0.

  Source: Pillow's ImageOps, ImageEnhance and Image.transform, to some grey
  levels (`tests/data/rand_augment_test.py`); ranges as in timm.
  """
  tf = tensorflow()

  def warp(matrix):
    def function(x, a):
      h, w = tf.unstack(tf.cast(tf.shape(x)[:2], tf.float32))
      return _warped(x, matrix(h, w, a), mean_color)

    return function

  def rotation(h, w, a):  # By 30 degrees at most, about the centre.
    cosine, sine = tf.cos(a * math.pi / 6), tf.sin(a * math.pi / 6)
    right = (w - w * cosine + h * sine) / 2
    return cosine, -sine, right, sine, cosine, (h - w * sine - h * cosine) / 2

  def enhance(plain):  # From a tenth to 1.9 of the difference to `plain`.
    def function(x, a):
      x = tf.cast(x, tf.float32)
      start = plain(x)
      return _uint8(start + (1 + 0.9 * a) * (x - start))

    return function

  def posterize(x, a):
    unit = 2 ** (4 + tf.cast(4 * tf.abs(a), tf.int32))
    return tf.cast(tf.cast(x, tf.int32) // unit * unit, tf.uint8)

  def solarize(x, a):
    threshold = 256 - tf.cast(256 * tf.abs(a), tf.int32)
    return tf.where(tf.cast(x, tf.int32) < threshold, x, 255 - x)

  def solarize_add(x, a):
    more = tf.cast(x, tf.int32) + tf.cast(110 * tf.abs(a), tf.int32)
    return tf.where(x < 128, tf.cast(tf.minimum(more, 255), tf.uint8), x)

  return {
    "auto_contrast": lambda x, a: _auto_contrast(x),
    "equalize": lambda x, a: _equalize(x),
    "invert": lambda x, a: 255 - x,
    "rotate": warp(rotation),
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "color": enhance(_luma),
    "contrast": enhance(lambda x: tf.round(tf.reduce_mean(_luma(x)))),
    "brightness": enhance(tf.zeros_like),
    "sharpness": enhance(_smooth),
    "shear_x": warp(lambda h, w, a: (1, 0.3 * a, 0, 0, 1, 0)),
    "shear_y": warp(lambda h, w, a: (1, 0, 0, 0.3 * a, 1, 0)),
    "translate_x": warp(lambda h, w, a: (1, 0, 0.45 * w * a, 0, 1, 0)),
    "translate_y": warp(lambda h, w, a: (1, 0, 0, 0, 1, 0.45 * h * a)),
  }


def _uint8(values):
  """Cuts off what is behind the point, as Pillow does."""
  tf = tensorflow()
  return tf.cast(tf.clip_by_value(values, 0, 255), tf.uint8)


def _luma(image):
  """(H, W, 1) float32 of whole grey levels."""
  tf = tensorflow()
  image = tf.cast(image, tf.uint8)
  return tf.cast(decode.convert_channels(image, 1), tf.float32)


def _smooth(image):
  """Mean of 3 x 3 pixels, the inner one five times; the border as it is."""
  tf = tensorflow()
  inner = image[1:-1, 1:-1]
  mean = tf.nn.avg_pool2d(image[None], 3, 1, "VALID")[0]
  change = tf.round((9 * mean + 4 * inner) / 13) - inner
  return image + tf.pad(change, ((1, 1), (1, 1), (0, 0)))


def _auto_contrast(image):
  """Stretches each channel to 0..255; one of one value stays."""
  tf = tensorflow()
  x = tf.cast(image, tf.float32)
  low, high = tf.reduce_min(x, (0, 1)), tf.reduce_max(x, (0, 1))
  stretched = _uint8((x - low) * 255 / tf.maximum(high - low, 1))
  return tf.where(high > low, stretched, image)


def _equalize(image):
  """Makes each channel's histogram flat, in Pillow's integer arithmetic."""
  tf = tensorflow()
  channels = tf.reshape(tf.cast(image, tf.int32), (-1, image.shape[-1]))
  channels = tf.transpose(channels)  # (C, H * W)
  counts = tf.math.bincount(channels, minlength=256, maxlength=256, axis=-1)
  brightest = tf.reduce_max(channels, axis=1)
  last = tf.gather(counts, brightest, batch_dims=1)
  step = (tf.reduce_sum(counts, axis=1) - last)[:, None] // 255
  below = tf.cumsum(counts, axis=1, exclusive=True)
  table = tf.minimum((below + step // 2) // tf.maximum(step, 1), 255)
  table = tf.where(step > 0, table, tf.range(256))
  flat = tf.gather(table, channels, batch_dims=1)
  return tf.cast(tf.reshape(tf.transpose(flat), tf.shape(image)), tf.uint8)


def _warped(image, matrix, mean_color):
  """Samples at x' = a x + b y + c, y' = d x + e y + f, of (a, b, c, d, e, f).

  In pixels from the corner of the image, where a pixel's centre is at 1/2.
  """
  tf = tensorflow()
  a, b, c, d, e, f = matrix
  # TensorFlow counts from the centre of the first pixel.
  c, f = c + (a + b - 1) / 2, f + (d + e - 1) / 2
  color = tf.constant(mean_color, tf.float32)
  if image.shape[-1] == 1:
    color = tf.reduce_mean(color, keepdims=True)
  warped = tf.raw_ops.ImageProjectiveTransformV3(
    images=(tf.cast(image, tf.float32) - color)[None],
    transforms=[tf.stack([a, b, c, d, e, f, 0.0, 0.0])],
    output_shape=tf.shape(image)[:2],
    fill_value=0.0,
    interpolation="BILINEAR",
    fill_mode="CONSTANT",
  )
  return _uint8(tf.round(warped[0] + color))
