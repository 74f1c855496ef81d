"""A whole data set in memory, without TensorFlow unless it is TFDS's.

Loaded here, and evaluated from here; `on_device` trains on it.
"""

from collections.abc import Iterator
import dataclasses
import functools
import io
import itertools
import math
import os
import sys
from typing import NamedTuple

from absl import logging
import jax
import numpy as np
import tqdm

from umae_jax import UserError, storage
from umae_jax.data import image_files, pipeline
from umae_jax.data.decode import GREY
from umae_jax.data.share import Share, Source
from umae_jax.data.table import TableSource, evaluation_rows

MOST = 0.5  # Fraction of a memory that a data set may take.
WITH_PROGRESS = 5_000  # Images from which on loading shows a bar.
# Images that TFDS's files are read by: prime, so that a single reader reads
# them, in their order.
READ_BATCH = 257


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
    crops: whether random crops are taken of the images, which keep their size
      then; else they are cut to `image_size`, as for evaluation.
  """

  source: Source
  image_size: tuple[int, int]
  channels: int
  crops: bool

  @property
  def num_examples(self) -> int:
    """N."""
    return self.source.num_examples

  @property
  def class_names(self) -> tuple[str, ...]:
    """Of all classes, in the order of the labels."""
    return self.source.class_names

  def name_of(self, row: int) -> str:
    """What to call the image in a row of `pixels`."""
    is_table = isinstance(self.source, TableSource)
    # A stream counts what it drops, too.
    return self.source.name_of(row if is_table else self.source.kept[row])

  def check(self, batch_size: int, process_count: int) -> None:
    """Refuses batches that do not divide, and crops of images of any size.

    Raises:
      UserError: says which.
    """
    Share(batch_size, process_count=process_count)
    if len(self._sizes) > 1:
      raise UserError(
        "config.data.feed='memory' takes random crops of images of one size; "
        f"here are {' and '.join(f'{h} x {w}' for h, w in self._sizes)} "
        "pixels, for instance. Use --config.data.feed=device_crop or host, "
        "--config.data.crop_scale='()', or images of one size."
      )

  @functools.cached_property
  def _sizes(self) -> set[tuple[int, int]]:
    """Sizes, (h, w), found among the images; not more than two."""
    if not self.crops:
      return {self.image_size}
    if not isinstance(self.source, TableSource):
      records = self.source.eval_records(Share(READ_BATCH), self.num_examples)
      records = records.map(lambda x: x["image"]).batch(READ_BATCH)
      stacks = records.as_numpy_iterator()
      return image_files.sizes(io.BytesIO(x) for stack in stacks for x in stack)
    images = self.source.load()
    if self.source.is_path:
      files = (storage.path(os.fsdecode(x)).open("rb") for x in images)
      return image_files.sizes(files)
    return {images.shape[1:3]}

  @property
  def stored_size(self) -> tuple[int, int]:
    """(h, w) of the images in memory."""
    return next(iter(self._sizes), self.image_size)

  @property
  def num_bytes(self) -> int:
    """Of all images in memory."""
    return self.num_examples * math.prod(self.stored_size) * self.channels

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
      images = image_files.central_crops(stored, size)
    for index, (image, label) in enumerate(zip(images, self.source.labels)):
      if image is None:
        name = self.name_of(index)
        logging.warning("Not readable, replaced by grey: %s", name)
      yield image, label

  def _of_stream(self) -> Iterator[tuple[np.ndarray | None, int]]:
    """Likewise, of record files; padding follows."""
    with pipeline.eval_batches(
      self.source,
      batch_size=READ_BATCH,
      image_size=self.stored_size,
      channels=self.channels,
    ) as batches:
      for batch in batches:
        rows = (batch[key] for key in ("image", "label", "mask"))
        for image, label, readable in zip(*rows):
          yield image if readable else None, label


def check_memory(
  train: MemorySource, *others: MemorySource, processes: int
) -> None:
  """Refuses sets that take too much memory together, unread.

  The host keeps all images, and every device a copy of those to train on; a
  CPU's copy lies in the memory of the host.

  Args:
    train: to be trained on.
    *others: besides.
    processes: that keep them on this machine.

  Raises:
    UserError: says where, how much is needed, and what there is.
  """
  devices = jax.local_devices()
  copied, kept = train.num_bytes, sum(x.num_bytes for x in (train, *others))
  host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes
  limit = (devices[0].memory_stats() or {}).get("bytes_limit")
  if limit:
    memories = [(devices[0].device_kind, limit, copied)]
  else:
    memories, kept = [], kept + len(devices) * copied
  memories += [("this machine for each of its processes", host, kept)]
  for where, size, needed in memories:
    if needed > MOST * size:
      raise UserError(
        f"config.data.feed='memory': {train.num_examples} images to train on "
        f"and {sum(x.num_examples for x in others)} more need "
        f"{needed / 1e9:.3g} GB; {MOST:.0%} of the {size / 1e9:.3g} GB of "
        f"{where} is less. Use --config.data.feed=host, or a smaller "
        "config.data.image_size."
      )


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
      crops = image_files.central_crops(images, source.image_size)
      images = np.stack(list(crops))
    yield {
      "image": images,
      "label": np.where(index < 0, 0, pixels.labels[row]),
      "index": index.astype(np.int32),
      "mask": pixels.readable[row] & (index >= 0),
    }
