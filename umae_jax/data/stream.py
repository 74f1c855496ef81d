"""Record files of TFDS, read as streams by a fixed number of virtual readers.

A data set such as ImageNet is too large to fetch examples in random order. The
kept examples of a split are divided into R equal ranges. Reader r reads range
r, shuffled within a buffer, over and over, and supplies rows
[r * B / R, (r + 1) * B / R) of every batch. R depends on B and N alone; each
process runs R / process_count of the readers and reads only their ranges.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

from umae_jax import UserError
from umae_jax.data.host_tensorflow import tensorflow
from umae_jax.data.share import Example, Share
from umae_jax.data.table import FOREVER

MAX_READERS = 64


@dataclasses.dataclass(frozen=True)
class Pieces:
  """Runs of consecutive records of a split, in its order; all (n,)."""

  files: np.ndarray  # str, path of the record file.
  skip: np.ndarray  # int64, records of the file that come before.
  take: np.ndarray  # int64, records in the run.
  first: np.ndarray  # int64, index of its first record within the split.

  def within(self, begin: int, end: int) -> "Pieces":
    """The parts that hold the records [begin, end) of the split."""
    low = np.maximum(self.first, begin)
    high = np.minimum(self.first + self.take, end)
    keep = low < high
    skip = self.skip + low - self.first
    return Pieces(self.files[keep], skip[keep], (high - low)[keep], low[keep])

  def dataset(self, order: Any) -> Any:
    """Dataset of (index, record): the pieces `order`, (k,) int64, in turn."""
    tf = tensorflow()
    files, skip = tf.constant(self.files.tolist()), tf.constant(self.skip)
    take, first = tf.constant(self.take), tf.constant(self.first)

    def piece(i):
      records = tf.data.TFRecordDataset(files[i]).skip(skip[i]).take(take[i])
      return records.enumerate(first[i])

    return tf.data.Dataset.from_tensor_slices(order).flat_map(piece)


@dataclasses.dataclass(frozen=True)
class Readers:
  """The R virtual readers of a batch size; arrays are (R,)."""

  rows: int  # Of each batch, B / R.
  sizes: np.ndarray  # int64, examples of each reader.
  pieces: Pieces  # Of all readers, one after the other.
  begin: np.ndarray  # int64, where a reader's pieces begin ...
  end: np.ndarray  # ... and end.
  mine: range  # Those that run in this process.


@dataclasses.dataclass(frozen=True)
class StreamSource:
  """N examples in record files, read in order; see the module."""

  class_names: tuple[str, ...]
  pieces: Pieces
  parse: Any  # Serialised record -> (image () string, stored label () int64).
  new_labels: np.ndarray  # (classes stored,) int32; -1 = drop the example.
  kept: np.ndarray  # (N,) int64, indices in the split of the examples kept.
  is_path: bool = False

  @property
  def num_examples(self) -> int:
    """N."""
    return len(self.kept)

  def name_of(self, index: int) -> str:
    """File and position in it, as TFDS counts: FILE__NUMBER."""
    piece = self.pieces.within(index, index + 1)
    return f"{piece.files[0]}__{piece.skip[0]}"

  def train_records(
    self,
    share: Share,
    *,
    seed: int,
    start_step: int,
    shuffle_buffer: int,
  ) -> Any:
    """Endless dataset of Examples; see `share.Source`.

    Each epoch of a reader visits its files in another order, and shuffles
    within `shuffle_buffer` / R records. Starting late reads, but does not
    decode, at most one epoch.
    """
    tf = tensorflow()
    most = min(MAX_READERS, self.num_examples)  # None may be empty.
    readers = self._readers(share, self.num_examples, most)
    num_readers = share.batch_size // readers.rows
    buffer = max(1, -(-shuffle_buffer // num_readers))
    sizes = tf.constant(readers.sizes)
    begin, end = tf.constant(readers.begin), tf.constant(readers.end)
    done = start_step * readers.rows  # Examples that each reader has supplied.

    def reader(r):
      def epoch(number):
        key = tf.random.fold_in(tf.constant([seed, -1], tf.int64), number)
        key = tf.random.fold_in(key, r)
        shape = [end[r] - begin[r] + 1]
        noise = tf.random.stateless_uniform(
          shape, key, None, None, tf.int64, alg="philox"
        )
        order = tf.cast(tf.argsort(noise[1:]), tf.int64) + begin[r]
        return self._examples(readers.pieces, order).shuffle(
          buffer, seed=noise[0], reshuffle_each_iteration=False
        )

      epochs = tf.data.Dataset.range(done // sizes[r], FOREVER)
      return epochs.flat_map(epoch).skip(done % sizes[r])

    return _take_turns(reader, readers)

  def check(self, batch_size: int, process_count: int) -> None:
    """See `share.Source`."""
    most = min(MAX_READERS, self.num_examples)
    share = Share(batch_size, process_count=process_count)
    self._readers(share, self.num_examples, most)

  def eval_records(self, share: Share, limit: int) -> Any:
    """The first `limit` as stored, a range per reader; see `share.Source`."""
    tf = tensorflow()
    readers = self._readers(share, limit, MAX_READERS)
    missing = share.num_batches(limit) * readers.rows - readers.sizes
    missing = tf.constant(missing)
    begin, end = tf.constant(readers.begin), tf.constant(readers.end)
    padding = {"image": "", "label": 0, "index": tf.constant(-1, tf.int64)}
    padding = tf.data.Dataset.from_tensors(padding)

    def reader(r):
      examples = self._examples(readers.pieces, tf.range(begin[r], end[r]))
      return examples.concatenate(padding.repeat(missing[r]))

    return _take_turns(reader, readers)

  def _examples(self, pieces: Pieces, order: Any) -> Any:
    """Dataset of the Examples kept of `pieces`, in `order`."""
    tf = tensorflow()
    new_labels = tf.constant(self.new_labels)

    def example(index, record) -> Example:
      image, label = self.parse(record)
      return {"image": image, "label": new_labels[label], "index": index}

    examples = pieces.dataset(order).map(example)
    if np.all(self.new_labels >= 0):
      return examples
    return examples.filter(lambda example: example["label"] >= 0)

  def _readers(self, share: Share, num_examples: int, most: int) -> Readers:
    """Divides the first `num_examples` kept over at most `most` readers."""
    num_readers = next(
      d for d in range(most, 0, -1) if share.batch_size % d == 0
    )
    if num_readers % share.process_count:
      raise UserError(
        f"config.batch_size={share.batch_size} is read from record files in "
        f"{num_readers} streams (its largest divisor up to {most}), which do "
        f"not divide over {share.process_count} processes. Use a multiple of "
        f"the number of processes, at most {most}, whose largest such divisor "
        "is one, too."
      )
    bounds = np.arange(num_readers + 1) * num_examples // num_readers
    # Where the ranges begin among all records, dropped ones included.
    limits = [*self.kept[bounds[:-1]], self.kept[num_examples - 1] + 1]
    parts = [self.pieces.within(*pair) for pair in itertools.pairwise(limits)]
    counts = [len(part.take) for part in parts]
    columns = [dataclasses.astuple(part) for part in parts]
    per_process = num_readers // share.process_count
    first = share.process_index * per_process
    return Readers(
      rows=share.batch_size // num_readers,
      sizes=np.diff(bounds),
      pieces=Pieces(*(np.concatenate(column) for column in zip(*columns))),
      begin=np.cumsum([0, *counts[:-1]]),
      end=np.cumsum(counts),
      mine=range(first, first + per_process),
    )


def _take_turns(reader: Any, readers: Readers) -> Any:
  """Row blocks of this process's readers in turn, batch after batch."""
  tf = tensorflow()
  numbers = tf.data.Dataset.range(readers.mine.start, readers.mine.stop)
  return numbers.interleave(
    reader,
    cycle_length=len(readers.mine),
    block_length=readers.rows,
    num_parallel_calls=tf.data.AUTOTUNE,
    deterministic=True,
  )
