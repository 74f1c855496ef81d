"""Batches of NumPy arrays from a source: for training, and for evaluation.

A training batch is a pure function of (seed, step), whatever the number of
processes, so a run resumes by starting at its step. Images stay uint8.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging
import numpy as np

from umae_jax import UserError
from umae_jax.data import augment, decode
from umae_jax.data import rand_augment as rand_augment_stage
from umae_jax.data.host_tensorflow import tensorflow
from umae_jax.data.share import Example, Share, Source, Stage

NAMES_SHOWN = 20  # Of unreadable images, in an error.


class Batches(Iterator):
  """Iterator over a process's batches, dicts of (read-only) NumPy arrays.

  Attributes:
    unreadable: names of the images met so far that do not decode, in the order
      met, each once. They are logged, and delivered as mid-grey.
  """

  def __init__(self, dataset: Any, source: Source, max_unreadable: float):
    self.unreadable: list[str] = []
    self._indices = set()
    self._source = source
    self._max_unreadable = max_unreadable
    self._iterator = dataset.as_numpy_iterator()

  def __next__(self) -> dict[str, np.ndarray]:
    batch = next(self._iterator)
    index, readable = batch.pop("index"), batch.pop("readable")
    if not readable.all():
      self._report(index[~readable])
    return batch

  def _report(self, indices: np.ndarray) -> None:
    """Logs the examples not seen before; raises if they are too many."""
    for index in indices[indices >= 0].tolist():
      if index not in self._indices:
        self._indices.add(index)
        self.unreadable.append(self._source.name_of(index))
        logging.warning(
          "Not readable, replaced by grey: %s", self.unreadable[-1]
        )
    refuse_unreadable(
      self.unreadable, self._source.num_examples, self._max_unreadable
    )

  def close(self) -> None:
    """Stops reading; the iterator is empty afterwards."""
    self._iterator = iter(())

  def __enter__(self) -> "Batches":
    return self

  def __exit__(self, *unused: Any) -> None:
    self.close()


def refuse_unreadable(
  names: Sequence[str], num_examples: int, most: float
) -> None:
  """Raises UserError if these images are more than a fraction of all N."""
  if len(names) > most * num_examples:
    raise UserError(
      f"{len(names)} of {num_examples} images do not decode, more than "
      f"config.data.max_unreadable={most} allows. Repair or remove them, or "
      "raise config.data.max_unreadable: "
      + ", ".join(names[:NAMES_SHOWN])
      + (", ..." if len(names) > NAMES_SHOWN else ".")
    )


def train_batches(
  source: Source,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  image_size: tuple[int, int],
  channels: int,
  crop_scale: tuple[float, float] | None,
  flip: bool,
  rand_augment: float = 0.0,
  shuffle_buffer: int,
  process_index: int = 0,
  process_count: int = 1,
  max_unreadable: float = 0.001,
) -> Batches:
  """Endless shuffled, augmented batches of this process's rows.

  Args:
    source: from `sources.open_source`.
    batch_size: B, of all processes together.
    seed: of the order and of every augmentation.
    start_step: steps already done; the stream continues exactly there, having
      decoded nothing before it.
    image_size: (H, W) in pixels.
    channels: C; 3 makes grey images RGB, 1 makes RGB images grey.
    crop_scale: range of the area of the random crop, as a fraction of the
      image; None or () for the central crop of evaluation.
    flip: whether to mirror half of the images.
    rand_augment: magnitude of RandAugment, in [0, 10], after crop and flip; 0
      is without it.
    shuffle_buffer: undecoded images, over all processes, to shuffle a stream
      from. Without effect on random-access sources, which shuffle exactly.
    process_index: which rows: [process_index * b, (process_index + 1) * b).
    process_count: number of processes, b = B / process_count.
    max_unreadable: fraction of the N images that may fail to decode.

  Returns:
    Batches of "image" (b, H, W, C) uint8 and "label" (b,) int32.

  Raises:
    UserError: the batch does not divide over the processes, the channels do
      not exist, or, while iterating, too many images do not decode.
  """
  tf = tensorflow()
  share = Share(batch_size, process_index, process_count)
  records = source.train_records(
    share, seed=seed, start_step=start_step, shuffle_buffer=shuffle_buffer
  )

  def add_seed(i, example):
    step, row = start_step + i // share.rows, i % share.rows
    position = step * batch_size + share.first_row + row
    return example | {"seed": tf.stack([seed, position])}

  whole = decode.decode_whole(channels)
  rest = [augment.random_flip] if flip else []
  if rand_augment:
    rest.append(rand_augment_stage.rand_augment(rand_augment))
  if crop_scale:
    crop = augment.random_resized_crop(image_size, tuple(crop_scale), channels)
    # A window below the end of a truncated JPEG decodes only with the rest.
    attempts = [[crop, *rest], [whole, crop, *rest]]
  else:
    attempts = [[whole, augment.central_crop(image_size, channels), *rest]]
  records = records.enumerate().map(add_seed)
  images = _images(records, source, attempts, image_size, channels)
  return Batches(_batch(images, share.rows), source, max_unreadable)


def eval_batches(
  source: Source,
  *,
  batch_size: int,
  image_size: tuple[int, int],
  channels: int,
  process_index: int = 0,
  process_count: int = 1,
  limit: int | None = None,
) -> Batches:
  """Each example once over all processes, in a fixed order, not augmented.

  Args:
    source: from `sources.open_source`.
    batch_size: B, of all processes together.
    image_size: (H, W) in pixels; see `augment.central_crop`.
    channels: C; 3 makes grey images RGB, 1 makes RGB images grey.
    process_index: which rows: [process_index * b, (process_index + 1) * b).
    process_count: number of processes, b = B / process_count.
    limit: only so many examples (None or 0: all), the first of a fixed
      permutation, or, of a TFDS data set, the first stored (TFDS mixes the
      classes when it writes).

  Returns:
    ceil(min(N, limit) / B) batches, as many on every process, of "image"
    (b, H, W, C) uint8, "label" (b,) int32 and "mask" (b,) bool, False where a
    row is padding or its image does not decode.
  """
  share = Share(batch_size, process_index, process_count)
  limit = min(source.num_examples, limit or source.num_examples)
  records = source.eval_records(share, limit)
  stages = [
    decode.decode_whole(channels),
    augment.central_crop(image_size, channels),
  ]
  images = _images(records, source, [stages], image_size, channels)

  def add_mask(example: Example) -> Example:
    return example | {"mask": example["readable"] & (example["index"] >= 0)}

  batches = _batch(images.map(add_mask), share.rows)
  return Batches(batches, source, max_unreadable=np.inf)


def _images(
  records: Any,
  source: Source,
  attempts: Sequence[Sequence[Stage]],
  image_size: tuple[int, int],
  channels: int,
) -> Any:
  """Runs the stages on every record, in parallel; adds "readable".

  If `attempts[0]` fails the next is tried, and in the end there is a grey
  image. Arrays can not fail and are spared the guard.
  """
  tf = tensorflow()
  stored = records.element_spec["image"]
  has_pixels = stored.dtype != tf.string
  _check_channels(channels, stored.shape[-1] if has_pixels else 3)

  def read(example: Example) -> Example:
    return example | {"image": tf.io.read_file(example["image"])}

  def grey(example: Example) -> Example:
    image = tf.fill((*image_size, channels), tf.constant(decode.GREY, tf.uint8))
    return example | {"image": image, "readable": False}

  def chain(stages: Sequence[Stage]) -> Stage:
    def run(example: Example) -> Example:
      for stage in stages:
        example = stage(example)
      return example | {"readable": True}

    return run

  if has_pixels:
    return records.map(chain(attempts[0]), num_parallel_calls=tf.data.AUTOTUNE)
  first = [read] if source.is_path else []
  guarded = decode.guard(
    [chain([*first, *stages]) for stages in attempts], grey
  )
  return records.apply(guarded)


def _check_channels(channels: int, stored: int) -> None:
  """Raises UserError unless `stored` channels can be made `channels`."""
  if channels != stored and not {channels, stored} <= {1, 3}:
    raise UserError(
      f"config.data.channels={channels} can not be made of {stored}-channel "
      "images; use 3 (RGB) or 1 (grey)."
    )


def _batch(images: Any, rows: int) -> Any:
  """Batches what the iterator needs of each example, and reads ahead."""
  options = tensorflow().data.Options()
  options.deterministic = True
  names = {"image", "label", "mask", "index", "readable"}
  images = images.map(lambda e: {k: v for k, v in e.items() if k in names})
  batches = images.batch(rows, drop_remainder=True).prefetch(2)
  return batches.with_options(options)
