"""A process's share of the batches, and the contract between data modules."""

from collections.abc import Callable
import dataclasses
from typing import Any, Protocol

from umae_jax import UserError

# One image on its way, a dict of tensors. All sources supply
#   "image"     () string, an encoded image or (if `is_path`) the path of one,
#               or (h, w, c) uint8; whatever if the row is padding
#   "label"     () int32
#   "index"     () int64 in [0, N), which example of the source; -1 = padding
# and the pipeline adds
#   "seed"      (2,) int64, of the augmentation of this row of this step
#   "readable"  () bool, False if the image did not decode and is grey instead
Example = dict[str, Any]
Stage = Callable[[Example], Example]


@dataclasses.dataclass(frozen=True)
class Share:
  """The rows [process_index * b, (process_index + 1) * b) of every batch."""

  batch_size: int  # B, of all processes together.
  process_index: int = 0
  process_count: int = 1

  def __post_init__(self):
    if self.batch_size < 1 or self.batch_size % self.process_count:
      raise UserError(
        f"config.batch_size={self.batch_size} (global) does not divide over "
        f"{self.process_count} processes; use a multiple of "
        f"{self.process_count}."
      )
    if not 0 <= self.process_index < self.process_count:
      raise ValueError(
        f"process_index={self.process_index} is not in "
        f"[0, {self.process_count})."
      )

  @property
  def rows(self) -> int:
    """Rows of each batch that are this process's, b."""
    return self.batch_size // self.process_count

  @property
  def first_row(self) -> int:
    """The first of them."""
    return self.process_index * self.rows

  def num_batches(self, num_examples: int) -> int:
    """Batches that hold `num_examples` once; the last one may be padded."""
    return -(-num_examples // self.batch_size)


class Source(Protocol):
  """A data set of N labelled images."""

  class_names: tuple[str, ...]
  is_path: bool  # Whether a string "image" is a path, not the image itself.

  @property
  def num_examples(self) -> int:
    """N."""

  def name_of(self, index: int) -> str:
    """What to call an example in a message: its file, or where it lies."""

  def check(self, batch_size: int, process_count: int) -> None:
    """Raises UserError if such batches cannot be had of so many processes."""

  def train_records(
    self, share: Share, *, seed: int, start_step: int, shuffle_buffer: int
  ) -> Any:
    """Endless dataset of Examples: this share's rows, undecoded, in order."""

  def eval_records(self, share: Share, limit: int) -> Any:
    """The first `limit` examples once, padded to whole batches."""
