"""The input of a run alone, to be measured in a process of its own."""

from typing import Any

import ml_collections

from umae_jax import feeding, run
from umae_jax.benchmark import feeding as measurement


class InputSide:
  """This host's batches of a configuration, without a step that takes them.

  Args:
    config: of a run that is fed from the host.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    self._config = config
    self._source = run.open_source(config, training=True)

  def measure(self, batches: int) -> dict[str, Any]:
    """Images per second, and per second of a CPU; see `feeding.measure`."""

    def make_batches():
      return feeding.train_batches(self._config, self._source, 0)

    return measurement.measure(make_batches, batches=batches)

  def close(self) -> None:
    """Nothing is open."""
