"""A whole data set in memory: of the host to evaluate, of devices to train.

No TensorFlow, unless the data are TFDS's. Training batches are made within the
jitted step, a pure function of (seed, step), from uint8 images of which every
device holds all.
"""

from collections.abc import Iterator
import dataclasses
import functools
import itertools
import os
import sys
from typing import Any, NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import tqdm

from umae_jax import UserError, device_crop, sharding
from umae_jax.data import image_files, pipeline
from umae_jax.data.decode import GREY
from umae_jax.data.share import Share, Source
from umae_jax.data.table import TableSource, evaluation_rows

MOST = 0.5  # Fraction of a memory that a data set may take.
WITH_PROGRESS = 5_000  # Images from which on loading shows a bar.
# Images that TFDS's files are read by: prime, so that a single reader reads
# them, in their order.
READ_BATCH = 257
# Folded into the key: no steps. (2^32 - 1 are the masks of evaluation.)
ORDER, AUGMENTATION = 2**32 - 2, 2**32 - 3


class Pixels(NamedTuple):
  """All images of a data set, on the host.

  Attributes:
    images: (N, h, w, C) uint8.
    labels: (N,) int32.
    readable: (N,) bool; where False the image is grey.
  """

  images: np.ndarray
  labels: np.ndarray
  readable: np.ndarray


@dataclasses.dataclass(frozen=True)
class MemorySource:
  """A source whose images are loaded once, when first needed.

  Attributes:
    source: whose images.
    image_size: (H, W) of the batches.
    channels: C.
    keep_size: whether images that all have one size keep it, to be cropped
      from; all else is cut to `image_size` as for evaluation, TFDS's always.
  """

  source: Source
  image_size: tuple[int, int]
  channels: int
  keep_size: bool

  @property
  def num_examples(self) -> int:
    """N."""
    return self.source.num_examples

  @property
  def class_names(self) -> tuple[str, ...]:
    """Of all classes, in the order of the labels."""
    return self.source.class_names

  def check(self, batch_size: int, process_count: int) -> None:
    """Refuses batches that do not divide, and what does not fit into memory.

    Raises:
      UserError: says which.
    """
    Share(batch_size, process_count=process_count)
    (height, width), channels = self.stored_size, self.channels
    needed = self.num_examples * height * width * channels
    limit, where = memory_limit()
    if needed > limit:
      raise UserError(
        f"config.data.feed='memory': {self.num_examples} images of {height} x "
        f"{width} x {channels} bytes are {needed / 1e9:.3g} GB, more than the "
        f"{limit / 1e9:.3g} GB that they may take of {where}. Use "
        "--config.data.feed=host, or a smaller config.data.image_size."
      )

  @functools.cached_property
  def stored_size(self) -> tuple[int, int]:
    """(h, w) of the images in memory."""
    if not self.keep_size or not isinstance(self.source, TableSource):
      return self.image_size
    images = self.source.load()
    if self.source.is_path:
      return image_files.one_size(images) or self.image_size
    return images.shape[1:3]

  @functools.cached_property
  def pixels(self) -> Pixels:
    """All images; those not readable are named by warnings."""
    count = self.num_examples
    shape = (count, *self.stored_size, self.channels)
    images = np.full(shape, GREY, np.uint8)
    labels, readable = np.empty(count, np.int32), np.zeros(count, bool)
    is_table = isinstance(self.source, TableSource)
    examples = self._of_table() if is_table else self._of_stream()
    progress = tqdm.tqdm(
      *(itertools.islice(examples, count), "loading images", count),
      mininterval=0.5 if sys.stderr.isatty() else 10,
      disable=count < WITH_PROGRESS or jax.process_index() != 0,
    )
    for index, (image, label) in enumerate(progress):
      labels[index], readable[index] = label, image is not None
      if image is not None:
        images[index] = image
    return Pixels(images, labels, readable)

  def _of_table(self) -> Iterator[tuple[np.ndarray | None, int]]:
    """(image or None, label) of each example, in order."""
    stored, size = self.source.load(), self.stored_size
    if self.source.is_path:
      images = image_files.read(stored, self.channels, size)
    else:
      stored = image_files.convert_channels(stored, self.channels)
      images = (image_files.central_crop(image, size) for image in stored)
    for index, (image, label) in enumerate(zip(images, self.source.labels)):
      if image is None:
        name = self.source.name_of(index)
        logging.warning("Not readable, replaced by grey: %s", name)
      yield image, label

  def _of_stream(self) -> Iterator[tuple[np.ndarray | None, int]]:
    """Likewise, of record files; padding follows."""
    with pipeline.eval_batches(
      self.source,
      batch_size=READ_BATCH,
      image_size=self.image_size,
      channels=self.channels,
    ) as batches:
      for batch in batches:
        rows = (batch[key] for key in ("image", "label", "mask"))
        for image, label, readable in zip(*rows):
          yield image if readable else None, label


def memory_limit() -> tuple[int, str]:
  """(bytes that a data set may take, of which memory): the scarcer one.

  Every device holds a copy; a CPU's lies in the memory of the host.
  """
  devices = jax.local_devices()
  host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  stats = devices[0].memory_stats() or {}
  if "bytes_limit" in stats:
    limits = [(stats["bytes_limit"], f"the memory of {devices[0].device_kind}")]
    limits += [(host, "the memory of this machine")]
  else:
    each = f"the memory of this machine for each of {len(devices)} devices"
    limits = [(host // len(devices), each)]
  size, where = min(limits)
  return int(MOST * size), f"{where} ({size / 1e9:.3g} GB)"


def eval_batches(
  source: MemorySource,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  limit: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """Each example once over all processes; see `pipeline.eval_batches`.

  The same batches, but of TFDS, too, in the order of a fixed permutation.
  """
  share = Share(batch_size, process_index, process_count)
  limit = min(source.num_examples, limit or source.num_examples)
  pixels = source.pixels
  for batch in evaluation_rows(source.num_examples, share, limit):
    index = batch[share.first_row : share.first_row + share.rows]
    row = np.maximum(index, 0)
    images = pixels.images[row]
    if images.shape[1:3] != source.image_size:
      size = source.image_size
      images = np.stack([image_files.central_crop(x, size) for x in images])
    yield {
      "image": images,
      "label": np.where(index < 0, 0, pixels.labels[row]),
      "mask": pixels.readable[row] & (index >= 0),
    }


class TrainingSet:
  """The images to train on, on every device of a mesh.

  Args:
    source: is loaded, if it is not yet.
    mesh: each of its devices holds all the images.
    batch_size: B, at most N.
    seed: of the order, the crops and the flips.
    crop_scale: range of the area of the random crop, as a fraction of the
      image; () for none.
    flip: whether to mirror half of the images.
    max_unreadable: fraction of the N images that may not be readable.

  Attributes:
    unreadable: names of the images that are not readable.

  Raises:
    UserError: too many are not readable.
  """

  def __init__(
    self,
    source: MemorySource,
    mesh: Mesh,
    *,
    batch_size: int,
    seed: int,
    crop_scale: tuple[float, float] | tuple[()],
    flip: bool,
    max_unreadable: float,
  ):
    pixels = source.pixels
    bad = np.flatnonzero(~pixels.readable).tolist()
    self.unreadable = [source.source.name_of(index) for index in bad]
    pipeline.refuse_unreadable(
      self.unreadable, source.num_examples, max_unreadable
    )
    self._size, self._shape = source.num_examples, pixels.images.shape[1:]
    self._image_size, self._batch_size = source.image_size, batch_size
    self._crop_scale, self._flip, self._mesh = crop_scale, flip, mesh
    self._key = jax.random.key(seed)
    everywhere = sharding.replicated(mesh)
    # Flat, for a TPU pads the last dimension of an array to 128.
    self._images = jax.make_array_from_process_local_data(
      everywhere,
      {
        "image": pixels.images.reshape(self._size, -1),
        "label": pixels.labels,
      },
    )
    self._orders = jax.jit(self._two_epochs, out_shardings=everywhere)
    self._epoch, self._data = None, None

  def at(self, step: int) -> tuple[Any, int]:
    """What to draw batches from, after `step` steps.

    Returns:
      data: a tree of arrays, for `draw`.
      steps: how many steps, at least one, can be drawn from it.
    """
    epoch, offset = divmod(step * self._batch_size, self._size)
    if epoch != self._epoch:
      self._epoch = epoch
      self._data = self._images | self._orders(np.int32(epoch))
    return self._data, (2 * self._size - offset) // self._batch_size

  def draw(self, data: Any, step: jax.Array) -> dict[str, jax.Array]:
    """The batch of a step, for use inside jit.

    Every epoch is a permutation of all N examples; batches cross its end. Each
    device makes its rows alone, the same ones on any number of devices.

    Args:
      data: of `at`.
      step: () int32, steps done before.

    Returns:
      "image" (B, H, W, C) uint8 and "label" (B,) int32.
    """
    # Both products may overflow; their difference is right for all that.
    first = step * self._batch_size - data["epoch"] * self._size
    rows = jax.lax.with_sharding_constraint(
      first + jnp.arange(self._batch_size), sharding.batch_sharding(self._mesh)
    )

    def take(array, index):
      return array.at[index].get(mode="promise_in_bounds")

    index = take(data["order"], rows)
    images = take(data["image"], index).reshape(-1, *self._shape)
    return {
      "image": self._augment(images, step),
      "label": take(data["label"], index),
    }

  def _augment(self, images: jax.Array, step: jax.Array) -> jax.Array:
    """(B, h, w, C) uint8 to (B, H, W, C): crops and flips."""
    key = jax.random.fold_in(jax.random.fold_in(self._key, AUGMENTATION), step)
    crop, flip = jax.random.split(key)
    mirrored = None
    if self._flip:
      mirrored = jax.random.bernoulli(flip, shape=(self._batch_size,))
    if self._crop_scale:
      windows = device_crop.random_windows(
        crop, self._batch_size, self._shape[:2], self._crop_scale
      )
      return device_crop.crop_resize(
        images, windows, self._image_size, mirrored
      )
    if mirrored is None:
      return images
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)

  def _two_epochs(self, epoch: jax.Array) -> dict[str, jax.Array]:
    """ "order" (2N,): that of an epoch, then that of the next."""
    key = jax.random.fold_in(self._key, ORDER)
    orders = [
      jax.random.permutation(jax.random.fold_in(key, epoch + i), self._size)
      for i in range(2)
    ]
    return {"order": jnp.concatenate(orders), "epoch": epoch}
