"""What a run costs, by arithmetic and tracing: FLOP, memory, speed."""

import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np

from umae_jax import config as config_lib
from umae_jax import train_step
from umae_jax.tasks import Task


def state(
  config: ml_collections.ConfigDict, mesh: Mesh, task: Task
) -> train_step.TrainState:
  """Shapes, dtypes and shardings of the run's state."""
  frozen = task.objective.frozen
  key = jax.random.key(config.seed)
  arguments = (task.init, task.optimizer, key, mesh, frozen, task.given)
  return train_step.abstract_state(*arguments)


def memory(
  config: ml_collections.ConfigDict, mesh: Mesh, task: Task
) -> tuple[dict[str, int], int]:
  """({what: bytes}, bytes that there are), of each device.

  On a CPU, whose devices are one memory, an equal part of it.
  """
  held_state = state(config, mesh, task)
  held = {"memory: parameters and optimizer": _bytes_per_device(held_state)}
  if config_lib.trains(config):
    frozen, params = task.objective.frozen, held_state.params
    trained = {k: x for k, x in params.items() if k not in frozen}
    # The parts of a batch are taken in turn, and their gradients summed.
    copies = 1 if config.micro_batches == 1 else 2
    held["memory: gradients"] = copies * _bytes_per_device(trained)
    rows = config.batch_size // config.micro_batches // mesh.devices.size
    each = saved_bytes(config, task, params)
    held["memory: kept for the gradient"] = rows * each
  device = mesh.devices.flat[0]
  limit = (device.memory_stats() or {}).get("bytes_limit")
  host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  here = sum(x.process_index == device.process_index for x in mesh.devices.flat)
  return held, limit or host // here


def saved_bytes(
  config: ml_collections.ConfigDict, task: Task, params: Any
) -> int:
  """Bytes that the gradient of the loss keeps of each image, by tracing it.

  What autodiff saves; the compiler may keep less, or need more at once.

  Args:
    config: of the run.
    task: of it.
    params: with shapes and dtypes.
  """
  data, objective = config.data, task.objective
  size = (*data.image_size, data.channels)

  def kept(rows):
    batch = {
      "image": jax.ShapeDtypeStruct((rows, *size), jnp.uint8),
      "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }

    def backward(params, batch, key):
      batch = objective.randomize(key, batch)
      if objective.prepare:
        batch = objective.prepare(params, batch)
      means = objective.statistics and objective.statistics(params, batch)
      return jax.vjp(lambda x: objective.loss(x, batch, means)[0], params)[1]

    found = jax.eval_shape(backward, params, batch, jax.random.key(0))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(found))

  return kept(4) // 2 - kept(2) // 2  # What does not grow is no image's.


def _bytes_per_device(tree) -> int:
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def product_speed(dtype: jnp.dtype, seconds: float = 0.5) -> float:
  """FLOP/s of a large matrix product on the first device, measured.

  Args:
    dtype: of the factors.
    seconds: to measure for.
  """
  on_cpu = jax.local_devices()[0].platform == "cpu"
  side = 1024 if on_cpu else 8192
  x = jnp.ones((side, side), dtype)
  multiply = jax.jit(lambda x: x @ x)
  jax.block_until_ready(multiply(x))
  begin, times = time.monotonic(), []
  while len(times) < 3 or time.monotonic() < begin + seconds:
    start = time.monotonic()
    jax.block_until_ready(multiply(x))
    times.append(time.monotonic() - start)
  return 2 * side**3 / float(np.median(times))
