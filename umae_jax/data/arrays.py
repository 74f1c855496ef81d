"""Small data sets that are always at hand: digits, and made images."""

import functools

import numpy as np

from umae_jax import UserError
from umae_jax.data.table import TableSource

NUM_DIGITS_TRAIN = 1_400  # Of 1,797; the other 397 are "test".
MADE_SIZES = {"train": 256, "test": 64}
MADE_CLASSES = 10


def open_digits(split: str) -> TableSource:
  """The 8 x 8 grey digits of scikit-learn; its 0..16 become 0..255.

  "train" and "test" are a fixed random split.
  """
  _check_split("digits", split, ("train", "test"))
  images, labels = _digits()
  order = np.random.default_rng(0).permutation(len(labels))
  parts = {"train": order[:NUM_DIGITS_TRAIN], "test": order[NUM_DIGITS_TRAIN:]}
  part = parts[split]
  return TableSource(
    class_names=tuple(str(digit) for digit in range(10)),
    labels=labels[part],
    load=lambda: images[part],
    name_of=lambda index: f"digit {part[index]}",
  )


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
  """All (1797, 8, 8, 1) uint8 images and their int32 labels."""
  from sklearn import datasets  # Takes a second to import.

  values, labels = datasets.load_digits(return_X_y=True)
  images = np.round(values * (255 / 16)).astype(np.uint8)
  return images.reshape(-1, 8, 8, 1), labels.astype(np.int32)


def open_made(
  split: str, image_size: tuple[int, int], channels: int
) -> TableSource:
  """Made images for smoke tests: ten classes of striped pictures.

  Args:
    split: "train" (256 images) or "test" (64).
    image_size: (H, W) in pixels.
    channels: C, any number.

  Returns:
    A source; its images are made when first loaded, always the same.
  """
  _check_split("made", split, tuple(MADE_SIZES))
  return TableSource(
    class_names=tuple(f"stripes{k}" for k in range(MADE_CLASSES)),
    labels=np.arange(MADE_SIZES[split], dtype=np.int32) % MADE_CLASSES,
    load=functools.partial(_made, split, *image_size, channels),
    name_of=lambda index: f"made {split} image {index}",
  )


@functools.lru_cache(maxsize=2)
def _made(split: str, height: int, width: int, channels: int) -> np.ndarray:
  """Stripes whose direction and colour tell the class, plus noise.

  The first channel of class k is brightened by k; the stripes, three to the
  image, are turned by k tenths of half a turn. Their phase is random.
  """
  rng = np.random.default_rng([list(MADE_SIZES).index(split), 0])
  size = MADE_SIZES[split]
  labels = np.arange(size) % MADE_CLASSES
  y, x = np.mgrid[:height, :width].astype(np.float32)
  images = np.empty((size, height, width, channels), np.uint8)
  for image, label in zip(images, labels):
    angle = np.pi * label / MADE_CLASSES
    along = np.cos(angle) * x / width + np.sin(angle) * y / height
    phase = rng.uniform(0, 2 * np.pi)
    wave = np.sin(6 * np.pi * along + phase)  # (H, W), in [-1, 1].
    colour = 0.5 + 0.5 * np.cos(angle + np.arange(channels))
    noise = rng.integers(-16, 17, image.shape, dtype=np.int16)
    image[:] = 128 + 100 * wave[..., None] * colour + noise
  return images


def _check_split(name: str, split: str, splits: tuple[str, ...]) -> None:
  """Raises UserError unless `split` is one of `splits`."""
  if split not in splits:
    raise UserError(
      f"config.data.*_split={split!r} is not a split of config.data.name="
      f"{name!r}; it has {', '.join(map(repr, splits))}."
    )
