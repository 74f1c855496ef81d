"""What an input delivers, and what it costs the processor."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import itertools
import os
import time
from typing import Any

import ml_collections
import numpy as np

from umae_jax import feeding, run

Batch = Mapping[str, np.ndarray]


class InputSide:
  """This host's batches of a configuration, without a step that takes them.

  Args:
    config: of a run that is fed from the host.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    self._config = config
    self._source = run.open_source(config, training=True)

  def measure(self, batches: int) -> dict[str, Any]:
    """Images per second, and per second of a CPU; see `measure`."""

    def make_batches():
      return feeding.train_batches(self._config, self._source, 0)

    return measure(make_batches, batches=batches)

  def close(self) -> None:
    """Nothing is open."""


def measure(
  make_batches: Callable[[], Iterator[Batch]],
  *,
  batches: int,
  warm_up: int = 4,
) -> dict[str, float]:
  """Reads batches as fast as they come.

  Args:
    make_batches: opens the input; it is closed afterwards. Its batches have
      "label" (b,).
    batches: to measure over, at least 1.
    warm_up: batches before those: what was read ahead while none was taken.

  Returns:
    "images_per_second"; "cpu_seconds", of all threads of this process, and of
    its children that have ended; "images_per_cpu_second", that is, per core.
  """
  with contextlib.closing(make_batches()) as taken:
    for _ in itertools.islice(taken, warm_up):
      pass
    begin, cpu = time.perf_counter(), _cpu_seconds()
    images = sum(len(x["label"]) for x in itertools.islice(taken, batches))
    seconds, cpu = time.perf_counter() - begin, _cpu_seconds() - cpu
  return {
    "images_per_second": images / seconds,
    "cpu_seconds": cpu,
    "images_per_cpu_second": images / cpu,
  }


def _cpu_seconds() -> float:
  used: Any = os.times()
  return sum(used[:4])  # User and system; the same of ended children.
