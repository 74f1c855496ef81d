"""The pretraining step of a run, to be measured in a process of its own."""

import collections
import contextlib
import functools
import resource
import tempfile
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from umae_jax import (
  UserError,
  feeding,
  host_memory,
  run,
  sharding,
  train_step,
  validation,
)
from umae_jax import config as config_lib
from umae_jax.loop import AHEAD, MAX_SKIPS
from umae_jax.tasks import inputs, pretrain

EPOCH = 1_000  # Batches, of the learning rate alone: warm-up is short of it.


class JaxSide:
  """Steps of one state: synthetic, without uniformity loss, and end-to-end.

  All of them step the same state, so that it is in memory once.

  Args:
    config: of a pretraining.

  Raises:
    UserError: it is not valid here.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    host_memory.keep_freed_memory()  # As a run does.
    # Of this process alone and empty, so that the first compilation is cold.
    self._cache = tempfile.TemporaryDirectory(prefix="umae_jax_compiled_")
    jax.config.update("jax_compilation_cache_dir", self._cache.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    validation.validate(config, num_devices=jax.device_count())
    self._config = config
    self._mesh = sharding.make_mesh(config.mesh.fsdp)
    plan = config_lib.plan(config, EPOCH * config.batch_size)
    self._task = pretrain.make(config, plan, self._mesh, None, None)
    self._state = train_step.init_state(
      self._task.init,
      self._task.optimizer,
      jax.random.key(config.seed),
      self._mesh,
    )
    self._step, self._feed = 0, None
    shape = (config.batch_size, *config.data.image_size, config.data.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    self._data = jax.device_put(
      {"image": images}, sharding.replicated(self._mesh)
    )
    self._calls = {}

  def facts(self) -> dict[str, Any]:
    """The hardware, the type of the matrix products, and the attention."""
    devices = self._mesh.devices.flat
    return {
      "device_kind": devices[0].device_kind,
      "devices": self._mesh.devices.size,
      "platform": devices[0].platform,
      "dtype": str(inputs.compute_dtype(self._config, self._mesh)),
      "attention": self._task.found["attention"],
    }

  def compile(self) -> dict[str, float]:
    """Compiles the synthetic step: seconds without and with a filled cache."""
    seconds = {}
    for name in ("cold", "warm"):
      jax.clear_caches()
      start = time.perf_counter()
      compiled = self._compile(self._task.objective)
      seconds[name] = time.perf_counter() - start
      self._calls.setdefault("synthetic", compiled)
    return seconds

  def compile_without_uniformity(self) -> None:
    """Makes steps("without_uniformity", n) possible."""
    objective = without_uniformity(self._task.objective)
    self._calls["without_uniformity"] = self._compile(objective)

  def _compile(self, objective):
    step = self._make_step(objective, self._draw)
    return step.lower(self._state, self._data, np.int32(1)).compile()

  def _make_step(self, objective, draw):
    return train_step.make_train_step(
      objective,
      self._task.optimizer,
      self._mesh,
      jax.tree.map(lambda x: x.sharding, self._state),
      seed=self._config.seed,
      micro_batches=self._config.micro_batches,
      max_skips=MAX_SKIPS,
      draw=draw,
    )

  def _draw(self, data, step):
    """The same batch at every step, which the compiler must not know."""
    data, _ = jax.lax.optimization_barrier((data, step))
    rows = sharding.batch_sharding(self._mesh)
    return jax.lax.with_sharding_constraint(data, rows)

  def open_feed(self) -> dict[str, str]:
    """Makes steps("end_to_end", n) possible; {"missing": why} if it is not."""
    config = self._config
    try:
      source = run.open_source(config, training=True)
      run.check_sources(config, source)
      config_lib.plan(config, source.num_examples)
      feed = feeding.open_feed(config, source, self._mesh, self._step)
    except UserError as error:
      return {"missing": str(error)}
    self._feed = feed
    objective = feeding.finish_on_device(self._task.objective, config)
    step = self._make_step(objective, feed.draw)
    self._calls["end_to_end"] = functools.partial(self._loop, step)
    return {}

  def _loop(self, step_function, number):
    """As `loop` does; (metrics, seconds that the input was waited for)."""
    waited, running = 0.0, collections.deque()
    until = self._step + number
    while self._step < until:
      start = time.perf_counter()
      arguments, taken = self._feed.take(self._step, until)
      waited += time.perf_counter() - start
      self._state, metrics = step_function(self._state, *arguments)
      self._step += taken
      running.append(metrics)
      if len(running) > AHEAD:
        jax.block_until_ready(running.popleft())
    return metrics, waited

  def steps(self, kind: str, number: int) -> dict[str, float]:
    """Takes `number` steps and waits for them.

    Args:
      kind: "synthetic", "without_uniformity" or "end_to_end".
      number: of steps.

    Returns:
      "seconds" and "cpu_seconds" (of the whole process) for a step, and
      "waited", seconds for its input.

    Raises:
      FloatingPointError: a step was not applied, which takes another time.
    """
    jax.block_until_ready(self._state)
    start, cpu = time.perf_counter(), time.process_time()
    if kind == "end_to_end":
      metrics, waited = self._calls[kind](number)
    else:
      waited = 0.0
      self._state, metrics = self._calls[kind](
        self._state, self._data, np.int32(number)
      )
      self._step += number
    jax.block_until_ready((self._state, metrics))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    if int(self._state.skipped):
      raise FloatingPointError(
        f"the gradient was not finite in the steps to {self._step} ({kind})."
      )
    parts = {"seconds": seconds, "cpu_seconds": cpu, "waited": waited}
    return {key: x / number for key, x in parts.items()}

  def memory(self) -> dict[str, int | str]:
    """Peak bytes: of the device where it counts them, and of the process."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    stats = self._mesh.devices.flat[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
      peak, kind = stats["peak_bytes_in_use"], "device"
    else:  # One copy of the state: the step is given it to write into.
      found = self._calls["synthetic"].memory_analysis()
      peak = found.temp_size_in_bytes + found.argument_size_in_bytes
      kind = "compiled program"
    return {"peak_bytes": peak, "of": kind, "process_peak_bytes": resident}

  def close(self) -> None:
    """Stops reading, and removes the compilation cache."""
    with contextlib.closing(self._feed or contextlib.ExitStack()):
      self._cache.cleanup()


def without_uniformity(
  objective: train_step.Objective,
) -> train_step.Objective:
  """The objective with L_MAE alone: the compiler drops all of L_unif."""

  def loss(params, batch, statistics):
    del statistics
    _, parts = objective.loss(params, batch, None)
    reconstruction = parts["reconstruction_loss"]
    return reconstruction, {"reconstruction_loss": reconstruction}

  return objective._replace(loss=loss, statistics=None)
