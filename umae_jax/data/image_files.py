"""Image files to arrays with Pillow, where TensorFlow is not wanted.

As `decode` and `augment.central_crop`, to within two grey levels; a JPEG that
ends early is not readable here.
"""

from collections.abc import Iterable, Iterator, Sequence
import concurrent.futures
import io
import os
from typing import BinaryIO

import numpy as np
from PIL import Image

from umae_jax import storage

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")  # Those of `decode.SUFFIXES`.
LUMA = (0.2989, 0.587, 0.114)  # TensorFlow's weights of red, green and blue.
CHUNK = 1_024  # Files that wait for a thread at once.


def read(
  paths: Sequence[str | bytes],
  channels: int,
  image_size: tuple[int, int] | None = None,
) -> Iterator[np.ndarray | None]:
  """Decodes files in several threads, in order.

  Args:
    paths: of images.
    channels: C, 1 or 3.
    image_size: (H, W) to which `central_crop` brings them; None leaves them.

  Yields:
    (h, w, C) uint8, or None for a file that does not decode.

  Raises:
    OSError: a file can not be read, which says nothing about the image.
  """

  def read_one(path):
    data = storage.path(os.fsdecode(path)).read_bytes()
    try:
      image = convert_channels(_decode(data), channels)
    # Pillow says what is wrong with a file in half a dozen ways.
    except Exception:
      return None
    return image if image_size is None else central_crop(image, image_size)

  yield from _in_threads(read_one, paths)


def central_crops(
  images: np.ndarray, image_size: tuple[int, int]
) -> Iterator[np.ndarray]:
  """`central_crop` of each of (n, h, w, C), in several threads, in order."""
  yield from _in_threads(lambda x: central_crop(x, image_size), images)


def _in_threads(function, items: Sequence) -> Iterator:
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    for begin in range(0, len(items), CHUNK):
      yield from threads.map(function, items[begin : begin + CHUNK])


def sizes(files: Iterable[BinaryIO]) -> set[tuple[int, int]]:
  """Sizes, (h, w), of encoded images; ends with the second. Decodes none.

  What is no image has no size.
  """
  found = set()
  for file in files:
    with file:
      try:
        image = Image.open(file, formats=FORMATS)
      except Exception:
        continue
      found.add((image.height, image.width))
    if len(found) > 1:
      break
  return found


def _decode(data: bytes) -> np.ndarray:
  """(h, w, 3) uint8; the first picture of an animation, without alpha."""
  with Image.open(io.BytesIO(data), formats=FORMATS) as image:
    if image.mode.startswith("I"):  # 16 bits of grey, of which eight are kept.
      grey = (np.asarray(image) >> 8).astype(np.uint8)
      return np.repeat(grey[..., None], 3, axis=-1)
    return np.asarray(image.convert("RGB"))


def convert_channels(images: np.ndarray, channels: int) -> np.ndarray:
  """(..., c) uint8 to (..., channels): grey to RGB, or RGB to its luma."""
  if images.shape[-1] == channels:
    return images
  if channels == 1:
    luma = images @ np.array(LUMA, np.float32)
    return np.round(luma).astype(np.uint8)[..., None]
  return np.repeat(images, channels, axis=-1)


def central_crop(image: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
  """The centre of (h, w, C) uint8 at (H, W), as `augment.central_crop`."""
  shape = image.shape[:2]
  if shape == tuple(image_size):
    return image
  larger = all(side >= target for side, target in zip(shape, image_size))
  margin = 256 / 224 if larger and max(image_size) <= 224 else 1.0
  factor = max(
    np.floor(margin * target + 1e-3) / side
    for side, target in zip(shape, image_size)
  )
  sides = [
    max(int(factor * side + 1e-3), target)
    for side, target in zip(shape, image_size)
  ]
  image = _resize(image, sides)
  y, x = (round((side - t) / 2) for side, t in zip(sides, image_size))
  return image[y : y + image_size[0], x : x + image_size[1]]


def _resize(image: np.ndarray, shape: Sequence[int]) -> np.ndarray:
  """(h, w, C) uint8 to `shape`, (H, W): bicubic with antialiasing."""
  height, width = shape
  # Of bytes, Pillow would clip what overshoots after the first of two passes.
  planes = [
    Image.fromarray(plane.astype(np.float32)).resize(
      (width, height), Image.Resampling.BICUBIC
    )
    for plane in np.moveaxis(image, -1, 0)
  ]
  image = np.stack([np.asarray(plane) for plane in planes], -1)
  return np.clip(np.round(image), 0, 255).astype(np.uint8)
