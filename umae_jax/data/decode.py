"""Encoded images to pixels, and what to do with those that do not decode.

JPEG, PNG, GIF, BMP and WebP are told apart by their content, not their name.
Pixels of a JPEG equal Pillow's. A JPEG that ends early is read if at least
half of its lines are there; the missing ones are black.
"""

from collections.abc import Sequence
import os
from typing import Any

from umae_jax.data.host_tensorflow import tensorflow
from umae_jax.data.share import Example, Stage

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")  # Lower case.
GREY = 128  # Every pixel of an image that replaces an unreadable one.

# INTEGER_ACCURATE is what Pillow, hence the reference, decodes with, and was
# no slower than the default on photographs.
_JPEG = {
  "channels": 3,
  "dct_method": "INTEGER_ACCURATE",
  "acceptable_fraction": 0.5,
}


def decode(data: Any, channels: int) -> Any:
  """Decodes a () string to (h, w, channels) uint8."""
  tf = tensorflow()
  image = tf.cond(
    tf.io.is_jpeg(data),
    lambda: tf.io.decode_jpeg(data, **_JPEG),
    lambda: tf.io.decode_image(data, channels=3, expand_animations=False),
  )
  return convert_channels(tf.ensure_shape(image, (None, None, 3)), channels)


def decode_whole(channels: int) -> Stage:
  """Stage: "image" () string, or (h, w, c) uint8, to (h, w, channels)."""
  tf = tensorflow()

  def stage(example: Example) -> Example:
    image = example["image"]
    if image.dtype == tf.string:
      return example | {"image": decode(image, channels)}
    return example | {"image": convert_channels(image, channels)}

  return stage


def decode_jpeg_window(data: Any, window: Any, channels: int) -> Any:
  """Decodes the part `window`, (top, left, height, width), of a JPEG.

  Only the blocks of the window are decompressed.
  """
  image = tensorflow().io.decode_and_crop_jpeg(data, window, **_JPEG)
  return convert_channels(image, channels)


def convert_channels(image: Any, channels: int) -> Any:
  """(h, w, c) uint8 to (h, w, channels): grey to RGB, or RGB to its luma."""
  tf = tensorflow()
  if image.shape[-1] == channels:
    return image
  if channels == 1:
    return tf.image.rgb_to_grayscale(image)
  return tf.image.grayscale_to_rgb(image)


def grey(sides: tuple[int, int], channels: int) -> Any:
  """The image that replaces an unreadable one, (*sides, channels) uint8."""
  tf = tensorflow()
  return tf.fill((*sides, channels), tf.constant(GREY, tf.uint8))


def guard(attempts: Sequence[Stage], blank: Stage) -> Any:
  """A dataset transformation: the first of `attempts` that raises no error.

  Args:
    attempts: maps Example -> Example, tried in turn. Later ones cost nothing
      while the first succeeds.
    blank: gives the example that stands for one on which all have failed.

  Returns:
    Dataset -> Dataset, both of stacks of examples, of equal sizes and order.
    Stacks are worked on in parallel. The first attempt is made on a stack as a
    whole, as what makes errors harmless costs as much as decoding a small
    image; if it fails, example by example.
  """
  tf = tensorflow()
  # Traced once, although the first one is used twice.
  attempts = [tf.function(attempt, autograph=False) for attempt in attempts]

  def first_success(example: Example):
    record = tf.data.Dataset.from_tensors(example)
    tries = record.map(attempts[0]).ignore_errors()
    for attempt in attempts[1:]:
      tries = tries.concatenate(record.map(attempt).ignore_errors())
    return tries.concatenate(record.map(blank)).take(1)

  def stack_of(examples: Example):
    size = tf.shape(examples["label"], tf.int64)[0]
    records = tf.data.Dataset.from_tensor_slices(examples)
    whole = records.map(attempts[0]).ignore_errors()
    single = records.flat_map(first_success)
    tries = whole.batch(size, drop_remainder=True)
    return tries.concatenate(single.batch(size, drop_remainder=True)).take(1)

  def transform(stacks):
    return stacks.interleave(
      stack_of,
      cycle_length=os.cpu_count() or 1,
      num_parallel_calls=tf.data.AUTOTUNE,
      deterministic=True,
    )

  return transform
