"""Stages Example -> Example: crops and flips, functions of "seed" alone."""

from typing import Any

from umae_jax.data import decode
from umae_jax.data.host_tensorflow import tensorflow
from umae_jax.data.share import Example, Stage

ATTEMPTS = 10  # Windows drawn before falling back to the central one.


def random_window(
  shape: Any,
  seed: Any,
  scale: tuple[float, float],
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Any:
  """Draws a window of an image.

  Args:
    shape: (2,) int32, height and width of the image in pixels.
    seed: (2,) int64.
    scale: range of the window's area, as a fraction of the image's; uniform.
    ratio: range of the window's width / height; log-uniform.

  Returns:
    (4,) int32: top, left, height, width in pixels, inside the image. If none
    of ten draws fits, the largest central window whose ratio is in range.

  Source: torchvision RandomResizedCrop.get_params. TensorFlow's
  sample_distorted_bounding_box draws another distribution of areas.
  """
  tf = tensorflow()
  draws = tf.random.stateless_uniform((4, ATTEMPTS), seed, alg="philox")
  size = tf.cast(shape, tf.float32)
  area = size[0] * size[1] * (scale[0] + draws[0] * (scale[1] - scale[0]))
  low, high = tf.math.log(ratio[0]), tf.math.log(ratio[1])
  aspect = tf.exp(low + draws[1] * (high - low))
  extents = tf.stack([tf.sqrt(area / aspect), tf.sqrt(area * aspect)], axis=1)
  extents = tf.cast(tf.round(extents), tf.int32)  # (ATTEMPTS, 2)
  fits = tf.reduce_all((extents > 0) & (extents <= shape), axis=1)
  first = tf.argmax(fits)
  extent = extents[first]
  room = tf.cast(shape - extent + 1, tf.float32)
  corner = tf.cast(tf.floor(draws[2:, first] * room), tf.int32)
  drawn = tf.concat([tf.minimum(corner, shape - extent), extent], 0)
  most = tf.stack([size[1] / ratio[0], size[0] * ratio[1]])
  extent = tf.cast(tf.round(tf.minimum(size, most)), tf.int32)
  extent = tf.maximum(extent, 1)
  central = tf.concat([(shape - extent) // 2, extent], 0)
  return tf.where(tf.reduce_any(fits), drawn, central)


def resize(image: Any, image_size: tuple[int, int] | Any) -> Any:
  """Bicubic with antialiasing, (h, w, C) uint8 to (H, W, C) uint8.

  Same kernel as Pillow's, which rounds between its two passes: they differ by
  a grey level here and there. Equal to `tf.image.resize` of the whole image,
  to the bit: that resizes the rows fast, as long vectors, but then each row
  pixel by pixel. Turning the image over in between makes them long again.
  """
  tf = tensorflow()
  h, w, channels = *tf.unstack(tf.shape(image)[:2]), image.shape[-1]
  height, width = image_size[0], image_size[1]
  rows = _resize_rows(tf.reshape(image, [h, w * channels]), height)
  columns = tf.reshape(tf.transpose(rows), [w, channels * height])
  columns = tf.round(_resize_rows(columns, width))
  columns = tf.cast(tf.clip_by_value(columns, 0, 255), tf.uint8)
  image = tf.transpose(tf.reshape(columns, [width * channels, height]))
  return tf.reshape(image, [height, width, channels])


def _resize_rows(lines: Any, size: Any) -> Any:
  """(h, n) to (size, n) float32."""
  tf = tensorflow()
  image = lines[:, None]  # (h, 1, n): one column of very many channels.
  return tf.image.resize(image, [size, 1], "bicubic", antialias=True)[:, 0]


def random_resized_crop(
  image_size: tuple[int, int], scale: tuple[float, float], channels: int
) -> Stage:
  """Stage: a random window, resized to `image_size`.

  Args:
    image_size: (H, W) of the output, in pixels.
    scale: range of the window's area, as a fraction of the image area.
    channels: C of the output, 1 or 3 (or that of the input).

  Returns:
    A stage. In: "image" () string, an encoded image, or (h, w, c) uint8;
    "seed". Out: "image" (H, W, C) uint8. Of a JPEG only the window is decoded.

  Source: torchvision RandomResizedCrop(interpolation=bicubic), the one
  augmentation of MAE's pretraining besides the flip.
  """
  tf = tensorflow()

  def stage(example: Example) -> Example:
    image = resize(_cut_out(example, scale, channels), image_size)
    return example | {"image": tf.ensure_shape(image, (*image_size, channels))}

  return stage


def random_crop(
  image_size: tuple[int, int], scale: tuple[float, float], channels: int
) -> Stage:
  """Stage: the window of `random_resized_crop`, for the device to resize.

  Args:
    image_size: (H, W) that it will have, in pixels.
    scale: range of the window's area, as a fraction of the image area.
    channels: C of the output, 1 or 3 (or that of the input).

  Returns:
    A stage. In: as of `random_resized_crop`. Out: "image" (h, w, C) uint8,
    the `canvas`, with the window in its upper left corner and zeros elsewhere;
    "extent" (2,) int32, height and width of the window. A window too large for
    the canvas is resized to `image_size` here.
  """
  tf = tensorflow()
  sides = tf.constant(canvas(image_size))

  def stage(example: Example) -> Example:
    image = _cut_out(example, scale, channels)
    image = tf.cond(
      tf.reduce_all(tf.shape(image)[:2] <= sides),
      lambda: image,
      lambda: resize(image, image_size),
    )
    extent = tf.shape(image)[:2]
    # Padding is fast along long rows: (h, w * C).
    rest = (sides - extent) * [1, channels]
    rows = tf.reshape(image, extent * [1, channels])
    rows = tf.pad(rows, tf.stack([tf.zeros_like(rest), rest], 1))
    image = tf.reshape(rows, (*canvas(image_size), channels))
    return example | {"image": image, "extent": extent}

  return stage


def canvas(image_size: tuple[int, int]) -> tuple[int, int]:
  """Sides in which windows travel to the device: 12/7 of (H, W), 384 of 224.

  Five of six windows, of a fifth of the area or more, of ImageNet's images fit.
  """
  return tuple(-(-12 * side // 7) for side in image_size)


def _cut_out(
  example: Example, scale: tuple[float, float], channels: int
) -> Any:
  """Returns a random window of "image", drawn by "seed", (h, w, C) uint8."""
  tf = tensorflow()
  image, seed = example["image"], example["seed"]

  def of_pixels(image):
    y, x, h, w = tf.unstack(random_window(tf.shape(image)[:2], seed, scale))
    return decode.convert_channels(image[y : y + h, x : x + w], channels)

  def of_jpeg():
    shape = tf.io.extract_jpeg_shape(image)[:2]
    window = random_window(shape, seed, scale)
    return decode.decode_jpeg_window(image, window, channels)

  if image.dtype != tf.string:
    return of_pixels(image)
  return tf.cond(
    tf.io.is_jpeg(image),
    of_jpeg,
    lambda: of_pixels(decode.decode(image, channels)),
  )


def central_crop(image_size: tuple[int, int], channels: int) -> Stage:
  """Stage: the centre of the image at `image_size`, as in evaluation.

  An image of exactly `image_size` is left as it is. Otherwise it is resized,
  keeping its proportions, until it just covers `image_size`, and the centre is
  cut out. If it is at least `image_size` on both sides and that is at most 224
  pixels, it is resized to cover 256/224 of `image_size` instead, so that a
  margin falls off.

  Args:
    image_size: (H, W) of the output, in pixels.
    channels: C.

  Returns:
    A stage. In: "image" (h, w, C) uint8. Out: "image" (H, W, C) uint8.

  Source: MAE's evaluation, Resize(size * 256 / 224), CenterCrop(size), with
  no margin above 224 pixels. The exceptions for images that fit or are
  smaller than `image_size` are ours.
  """
  tf = tensorflow()
  target = tf.constant(image_size, tf.int32)
  margin = 256 / 224 if max(image_size) <= 224 else 1.0

  def resized(image, shape):
    zoom_in = tf.reduce_all(shape >= target)
    cover = tf.where(zoom_in, margin, 1.0) * tf.cast(target, tf.float32)
    size = tf.cast(shape, tf.float32)
    factor = tf.reduce_max(tf.floor(cover + 1e-3) / size)
    new_shape = tf.maximum(tf.cast(factor * size + 1e-3, tf.int32), target)
    image = resize(image, new_shape)
    y, x = tf.unstack(tf.cast(tf.round((new_shape - target) / 2), tf.int32))
    return image[y : y + image_size[0], x : x + image_size[1]]

  def stage(example: Example) -> Example:
    image = example["image"]
    shape = tf.shape(image)[:2]
    fits = tf.reduce_all(shape == target)
    image = tf.cond(fits, lambda: image, lambda: resized(image, shape))
    return example | {"image": tf.ensure_shape(image, (*image_size, channels))}

  return stage


def random_flip(example: Example) -> Example:
  """Stage: mirrors "image" left-right with probability 1/2."""
  tf = tensorflow()
  image = example["image"]
  # Not image[:, ::-1], which takes almost as long as decoding.
  image = tf.cond(
    _flips(example), lambda: tf.reverse(image, [1]), lambda: image
  )
  return example | {"image": image}


def draw_flip(flip: bool) -> Stage:
  """Stage: "flip" () bool says whether `random_flip` would mirror the image.

  Args:
    flip: False for never.
  """

  def stage(example: Example) -> Example:
    return example | {"flip": _flips(example) if flip else False}

  return stage


def _flips(example: Example) -> Any:
  tf = tensorflow()
  seed = tf.random.fold_in(example["seed"], 1)  # The crop used the bare seed.
  return tf.random.stateless_uniform((), seed, alg="philox") < 0.5
