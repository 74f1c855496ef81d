"""Batches of NumPy arrays from a source: for training, and for evaluation.

A training batch is a pure function of (seed, step), whatever the number of
processes, so a run resumes by starting at its step. Images stay uint8.
"""

from collections.abc import Iterator, Sequence
import os
from typing import Any

from absl import logging
import numpy as np

from umae_jax import UserError
from umae_jax.data import augment, decode
from umae_jax.data import rand_augment as rand_augment_stage
from umae_jax.data.host_tensorflow import tensorflow
from umae_jax.data.share import Example, Share, Source, Stage

NAMES_SHOWN = 20  # Of unreadable images, in an error.
STACK = 16  # Images that a thread works on at once, see `decode.guard`.


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
    readable = batch.pop("readable")
    if not readable.all():
      self._report(batch["index"][~readable])
    if "mask" not in batch:  # To be trained on: the order is the step's.
      del batch["index"]
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
  device_crop: bool = False,
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
    device_crop: leave resizing and mirroring to `device_crop.finish`, which
      the same windows then reach uncompressed. Needs a `crop_scale`, and no
      `rand_augment`.

  Returns:
    Batches of "image" (b, H, W, C) uint8 and "label" (b,) int32; or, with
    `device_crop`, of "image" (b, *augment.canvas(image_size), C) uint8, its
    "extent" (b, 2) int32, "flip" (b,) bool and "label".

  Raises:
    UserError: the batch does not divide over the processes, the channels do
      not exist, or, while iterating, too many images do not decode.
  """
  tf = tensorflow()
  share = Share(batch_size, process_index, process_count)
  records = source.train_records(
    share, seed=seed, start_step=start_step, shuffle_buffer=shuffle_buffer
  )

  whole = decode.decode_whole(channels)
  if crop_scale:
    crop = augment.random_crop if device_crop else augment.random_resized_crop
    crop = crop(image_size, tuple(crop_scale), channels)
    # A window below the end of a truncated JPEG decodes only with the rest.
    attempts = [[crop], [whole, crop]]
  else:
    attempts = [[whole, augment.central_crop(image_size, channels)]]
  grey = {"image": decode.grey(image_size, channels)}
  rest = [augment.random_flip] if flip else []
  if device_crop:
    if rand_augment or not crop_scale:
      raise ValueError("device_crop needs crop_scale, and no rand_augment.")
    sides = augment.canvas(image_size)
    grey = {"image": decode.grey(sides, channels)}
    grey |= {"extent": tf.constant(sides), "flip": False}
    rest = [augment.draw_flip(flip)]
  if rand_augment:
    rest.append(rand_augment_stage.rand_augment(rand_augment))

  def add_seeds(number, examples):
    i = number * stack + tf.range(stack, dtype=tf.int64)
    step, row = start_step + i // share.rows, i % share.rows
    position = step * batch_size + share.first_row + row
    seeds = tf.stack([tf.fill([stack], tf.cast(seed, tf.int64)), position], 1)
    return examples | {"seed": seeds}

  stack = min(STACK, share.rows)
  stacks = records.batch(stack, drop_remainder=True).enumerate().map(add_seeds)
  attempts = [[*stages, *rest] for stages in attempts]
  batches = _batches(stacks, source, attempts, grey, share.rows)
  return Batches(batches, source, max_unreadable)


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
    (b, H, W, C) uint8, "label" (b,) int32, "index" (b,) int32, which example
    of the source, and "mask" (b,) bool, False where a row is padding or its
    image does not decode.
  """
  share = Share(batch_size, process_index, process_count)
  tf = tensorflow()
  limit = min(source.num_examples, limit or source.num_examples)
  stacks = source.eval_records(share, limit).batch(min(STACK, share.rows))
  stages = [
    decode.decode_whole(channels),
    augment.central_crop(image_size, channels),
  ]
  grey = {"image": decode.grey(image_size, channels)}
  batches = _batches(stacks, source, [stages], grey, share.rows)

  def add_mask(batch: Example) -> Example:
    index = tf.cast(batch["index"], tf.int32)
    return batch | {"index": index, "mask": batch["readable"] & (index >= 0)}

  return Batches(batches.map(add_mask), source, max_unreadable=np.inf)


def _batches(
  stacks: Any,
  source: Source,
  attempts: Sequence[Sequence[Stage]],
  grey: Example,
  rows: int,
) -> Any:
  """Runs the stages on every record, in parallel; batches, and reads ahead.

  Args:
    stacks: dataset of stacked Examples.
    source: where they are from.
    attempts: lists of stages; if the first fails the next is tried.
    grey: what is delivered of an image on which all fail. Its keys, "label",
      "index" and "readable" are those of a batch.
    rows: of a batch.
  """
  tf = tensorflow()
  stored = stacks.element_spec["image"]
  has_pixels = stored.dtype != tf.string
  _check_channels(
    grey["image"].shape[-1], stored.shape[-1] if has_pixels else 3
  )

  def read(example: Example) -> Example:
    return example | {"image": tf.io.read_file(example["image"])}

  def result(example: Example, readable: bool) -> Example:
    kept = {key: example[key] for key in (*grey, "label", "index")}
    return kept | {"readable": readable}

  def chain(stages: Sequence[Stage]) -> Stage:
    def run(example: Example) -> Example:
      for stage in stages:
        example = stage(example)
      return result(example, True)

    return run

  first = [read] if source.is_path else []
  guarded = decode.guard(
    [chain([*first, *stages]) for stages in attempts],
    lambda example: result(example | grey, False),
  )
  options = tf.data.Options()
  options.deterministic = True
  # The images are the parallel work; one alone is too small to be divided.
  options.threading.max_intra_op_parallelism = 1
  # Of its own: others that use TensorFlow's pool would wait for the images.
  options.threading.private_threadpool_size = os.cpu_count() or 1
  batches = stacks.apply(guarded).rebatch(rows, drop_remainder=True)
  return batches.prefetch(2).with_options(options)


def _check_channels(channels: int, stored: int) -> None:
  """Raises UserError unless `stored` channels can be made `channels`."""
  if channels != stored and not {channels, stored} <= {1, 3}:
    raise UserError(
      f"config.data.channels={channels} can not be made of {stored}-channel "
      "images; use 3 (RGB) or 1 (grey)."
    )
