import time

import numpy as np
import pytest

from umae_jax.benchmark import input_side


class Busy:
  """Batches of 3, of which each takes 20 ms of CPU and sleeps for 30 ms."""

  def __init__(self):
    self.taken, self.closed = 0, False

  def __iter__(self):
    return self

  def __next__(self):
    self.taken += 1
    if self.taken > 2:  # Slow only after the warm-up.
      end = time.process_time() + 0.02
      while time.process_time() < end:
        pass
      time.sleep(0.03)
    return {"label": np.zeros(3, np.int32)}

  def close(self):
    self.closed = True


def test_rates_are_those_of_the_batches_after_the_warm_up():
  batches = Busy()
  found = input_side.measure(lambda: batches, batches=10, warm_up=2)
  assert batches.taken == 12 and batches.closed
  assert found["cpu_seconds"] == pytest.approx(0.2, abs=0.1)
  images = found["images_per_cpu_second"] * found["cpu_seconds"]
  assert images == pytest.approx(30)
  assert 10 < found["images_per_second"] < 60
