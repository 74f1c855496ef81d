"""Sources with random access: a table of arrays in memory, or of paths."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import numpy as np

from umae_jax.data import share as shares
from umae_jax.data.host_tensorflow import tensorflow

FOREVER = 2**40  # Epochs; more than any run has, and no overflow of int64.


def evaluation_rows(
  num_examples: int, share: shares.Share, limit: int
) -> np.ndarray:
  """(batches, B) int64: the first `limit` of a fixed permutation; -1 = padding.

  Args:
    num_examples: N.
    share: of batches of B rows.
    limit: at most N.
  """
  order = np.random.default_rng(0).permutation(num_examples)[:limit]
  size = share.num_batches(limit) * share.batch_size
  padded = np.pad(order, (0, size - limit), constant_values=-1)
  return padded.reshape(-1, share.batch_size)


@dataclasses.dataclass(frozen=True)
class TableSource:
  """N examples that can be fetched in any order, so shuffling is exact.

  Every epoch is a uniform permutation of all N, computed from (seed, epoch).
  """

  class_names: tuple[str, ...]
  labels: np.ndarray  # (N,) int32.
  # Called when batches are made: (N, h, w, c) uint8, or N paths.
  load: Callable[[], np.ndarray | Sequence[str]]
  name_of: Callable[[int], str]
  is_path: bool = False

  @property
  def num_examples(self) -> int:
    """N."""
    return len(self.labels)

  def train_records(
    self,
    share: shares.Share,
    *,
    seed: int,
    start_step: int,
    shuffle_buffer: int,
  ) -> Any:
    """Endless dataset of Examples; see `share.Source`.

    Starting late costs nothing: the position is computed, not read. There is
    no buffer, so `shuffle_buffer` has no effect.
    """
    del shuffle_buffer
    tf = tensorflow()
    first_epoch, offset = divmod(
      start_step * share.batch_size, self.num_examples
    )

    def epoch(number):
      key = tf.random.fold_in(tf.constant([seed, -1], tf.int64), number)
      noise = tf.random.stateless_uniform(
        (self.num_examples,), key, None, None, tf.int64, alg="philox"
      )
      order = tf.argsort(noise, stable=True)
      start = tf.where(number == first_epoch, offset, 0)
      return tf.data.Dataset.from_tensor_slices(order[start:])

    indices = tf.data.Dataset.range(first_epoch, FOREVER).flat_map(epoch)
    return self._fetch(indices, share)

  def check(self, batch_size: int, process_count: int) -> None:
    """See `share.Source`."""
    shares.Share(batch_size, process_count=process_count)

  def eval_records(self, share: shares.Share, limit: int) -> Any:
    """The first `limit` of a fixed permutation, padded; see `share.Source`."""
    rows = evaluation_rows(self.num_examples, share, limit)
    indices = tensorflow().data.Dataset.from_tensor_slices(rows.reshape(-1))
    return self._fetch(indices, share)

  def _fetch(self, indices: Any, share: shares.Share) -> Any:
    """Looks up this share's rows of the batches that `indices` fill."""
    tf = tensorflow()
    images, labels = tf.constant(self.load()), tf.constant(self.labels)

    def look_up(batch):  # Whole batches at once: one call instead of b.
      index = batch[share.first_row : share.first_row + share.rows]
      row = tf.maximum(index, 0)  # Padding is the first image again.
      return {
        "image": tf.gather(images, row),
        "label": tf.where(index < 0, 0, tf.gather(labels, row)),
        "index": tf.cast(index, tf.int64),
      }

    batches = indices.batch(share.batch_size, drop_remainder=True)
    return batches.map(look_up).unbatch()
