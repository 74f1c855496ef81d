"""The loop itself, with a task of one weight."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp
import pytest

from umae_jax import (
  UserError,
  checkpoint,
  config,
  feeding,
  loop,
  metrics,
  sharding,
  tasks,
  train_step,
  workdir,
)
from umae_jax import run as run_lib
from umae_jax.data import arrays, in_memory


class Batches:
  """Endless batches of ones, or what `values` says; tells what was asked."""

  def __init__(self, values=None, on_batch=lambda number: None):
    self.unreadable = []
    self.number = 0
    self._values, self._on_batch = values, on_batch

  def __next__(self):
    self.number += 1
    self._on_batch(self.number)
    value = 1.0 if self._values is None else self._values[self.number - 1]
    return np.full((8, 1), value, np.float32)

  def close(self):
    pass


def tiny_run(tmp_path, monkeypatch, batches, *, loss=None, steps=40):
  """A Run of the task "mean of batch * w"."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  loss = loss or (lambda params, batch, _: ((batch * params["w"]).mean(), {}))
  objective = train_step.Objective(lambda key, batch: batch, None, loss)
  task = tasks.Task(
    lambda key: {"w": jnp.ones(())},
    objective,
    optax.sgd(0.1),
    lambda step: 0.1,
    lambda params: tasks.Evaluation({"w": float(params["w"])}, {}),
  )
  c = config.defaults()
  c.batch_size = 8
  c.log.every_steps = 10
  plan = config.Plan(steps, steps, 0, steps + 1, 0.1)
  monkeypatch.setattr(feeding, "train_batches", lambda *unused: batches)
  return loop.Run(c, config.flatten(c), plan, mesh, tmp_path, None, None, task)


def run_steps(run):
  state = train_step.init_state(
    run.task.init, run.task.optimizer, jax.random.key(0), run.mesh
  )
  with (
    checkpoint.open_checkpoints(run.directory / "checkpoints") as checkpoints,
    contextlib.closing(metrics.MetricsLog(run.directory)) as log,
  ):
    return loop.run_steps(run, state, 0, checkpoints, log)


class Watched:
  """A device scalar that tells when the host reads it, or waits for it."""

  def __init__(self, value, reads, wait, step):
    self._value, self._reads, self._step = value, reads, step
    self._wait = wait

  def block_until_ready(self):
    self._wait(self._step)
    return self

  def __array__(self, dtype=None, copy=None):
    self._reads.append(self._step)
    return np.asarray(self._value, dtype)

  def __float__(self):
    return float(np.asarray(self))

  __int__ = __index__ = __float__


def test_the_host_reads_from_the_device_at_logged_steps_only(
  tmp_path, monkeypatch
):
  run = tiny_run(tmp_path, monkeypatch, Batches(), steps=35)
  make_real, reads, steps = train_step.make_train_step, [], []
  waits = set()  # (step that the host waited for, steps asked for by then).

  def wait(step):
    waits.add((step, len(steps)))

  def make_watched(*arguments, **options):
    real = make_real(*arguments, **options)

    def step(state, batch):
      steps.append(len(steps) + 1)
      with jax.transfer_guard("disallow"):
        state, scalars = real(state, batch)
      return state, {
        key: Watched(x, reads, wait, steps[-1]) for key, x in scalars.items()
      }

    return step

  monkeypatch.setattr(train_step, "make_train_step", make_watched)
  assert run_steps(run)
  assert steps == list(range(1, 36))
  assert set(reads) == {10, 20, 30, 35}
  # And it runs ahead of the device by two steps, not more.
  assert waits == {(n, n + 2) for n in range(1, 33) if n % 10 not in (0, 8, 9)}


def test_steps_transfer_nothing_but_the_batch(tmp_path, monkeypatch):
  """A transfer guard is on from the first batch to the last."""
  run = tiny_run(tmp_path, monkeypatch, Batches(), steps=9)
  guard = contextlib.ExitStack()

  def on_batch(number):
    if number == 2:  # The first step is compiled, and has constants.
      guard.enter_context(jax.transfer_guard("disallow"))
    if number == 9:  # Logging, evaluation and saving come after it.
      guard.close()

  batches = Batches(on_batch=on_batch)
  monkeypatch.setattr(feeding, "train_batches", lambda *unused: batches)
  with guard:
    assert run_steps(run)
  assert batches.number == 9


def test_five_bad_gradients_in_a_row_stop_the_run(tmp_path, monkeypatch):
  values = [1.0] * 12 + [np.nan] * 28
  run = tiny_run(tmp_path, monkeypatch, Batches(values))
  run.config.checkpoint.every_steps = 7
  with pytest.raises(FloatingPointError) as caught:
    run_steps(run)
  message = str(caught.value)
  assert "not finite 5 times in a row, up to step 20" in message
  assert "newest checkpoint: step 14" in message
  assert "lower config.optimizer.base_lr" in message
  last = metrics.read_log(tmp_path / "metrics.jsonl")[-1]
  assert last["step"] == 20
  assert last["skipped"] == 8  # What the run knew is in the log.
  with checkpoint.open_checkpoints(tmp_path / "checkpoints") as checkpoints:
    assert checkpoints.steps == (7, 14)


def test_four_bad_gradients_in_a_row_do_not(tmp_path, monkeypatch):
  values = ([1.0] * 4 + [np.inf] * 4) * 5
  run = tiny_run(tmp_path, monkeypatch, Batches(values))
  assert run_steps(run)
  last = metrics.read_log(tmp_path / "metrics.jsonl")[-2]
  assert (last["step"], last["split"]) == (40, "train")
  assert last["skipped"] == 20


def test_unreadable_images_are_in_the_log(tmp_path, monkeypatch):
  batches = Batches()
  batches.unreadable = ["a.JPEG", "b.JPEG"]
  assert run_steps(tiny_run(tmp_path, monkeypatch, batches))
  log = metrics.read_log(tmp_path / "metrics.jsonl")
  assert log[0]["unreadable_images"] == 2


def digits_run(directory, monkeypatch):
  """A run of one weight on the digits in memory, of 87 steps an epoch."""

  def loss(params, batch, _):
    return (batch["image"] / 255.0 * params["w"]).mean(), {}

  run = tiny_run(directory, monkeypatch, None, loss=loss, steps=87)
  run.config.update(batch_size=16)
  run.config.data.update(feed="memory", crop_scale=(), flip=True)
  run.config.log.every_steps = 32
  run.config.checkpoint.every_steps = 45
  digits = in_memory.MemorySource(
    arrays.open_digits("train"), (8, 8), 1, crops=False
  )
  return run._replace(train_source=digits)


def result(directory):
  """Log, without times, and the last state of a run."""
  log = [
    {key: x for key, x in line.items() if not key.startswith("time/")}
    for line in metrics.read_log(directory / "metrics.jsonl")
  ]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Orbax prefers a template.
    state = ocp.load(directory / "checkpoints" / "87")
  return log, jax.tree.map(np.asarray, state)


def test_steps_taken_at_once_are_those_taken_singly(tmp_path, monkeypatch):
  """Log and state bit for bit, also when stopped and resumed in between."""
  numbers, memory_feed = [], feeding.memory_feed

  def watched(images):
    feed = memory_feed(images)

    def take(step, until):
      arguments, steps = feed.take(step, until)
      numbers.append(steps)
      return arguments, steps

    return feed._replace(take=take)

  monkeypatch.setattr(feeding, "memory_feed", watched)
  monkeypatch.setattr(loop, "CALL_SECONDS", 1e6)
  assert loop.train(digits_run(tmp_path / "at_once", monkeypatch))
  # Singly to the first line, 32; then to 45, 64 and the last, 87.
  assert numbers == [1] * 32 + [13, 19, 23]
  monkeypatch.setattr(loop, "CALL_SECONDS", 0)
  asked = iter([False] * 69 + [True])
  monkeypatch.setattr(sharding, "preempted", lambda *unused: next(asked))
  singly = digits_run(tmp_path / "singly", monkeypatch)
  assert not loop.train(singly)
  monkeypatch.undo()
  assert loop.train(singly)
  log, state = result(tmp_path / "at_once")
  other_log, other_state = result(tmp_path / "singly")
  assert log == other_log
  assert len(log) == 4
  jax.tree.map(np.testing.assert_array_equal, state, other_state)


def test_slow_steps_are_few_at_once_and_their_calls_not_ahead(
  tmp_path, monkeypatch
):
  """A run that is asked to stop waits for two calls of a second at most."""
  run = digits_run(tmp_path, monkeypatch)
  update = metrics.Progress.update

  def slow(self, step, scalars):  # A third of a second for each step.
    times = update(self, step, scalars)
    return times | {"time/images_per_second": 3.0 * run.config.batch_size}

  monkeypatch.setattr(metrics.Progress, "update", slow)
  numbers, waits, make_real = [], [], train_step.make_train_step

  def make_watched(*arguments, **options):
    real = make_real(*arguments, **options)

    def step(state, data, number):
      numbers.append(int(number))
      call = len(numbers)
      state, scalars = real(state, data, number)

      def wait(_):
        waits.append((call, len(numbers)))

      return state, {k: Watched(x, [], wait, 0) for k, x in scalars.items()}

    return step

  monkeypatch.setattr(train_step, "make_train_step", make_watched)
  assert run_steps(run)
  assert numbers[:32] == [1] * 32 and set(numbers[32:]) == {1, 2, 3}
  ahead = {now - call for call, now in waits if numbers[now - 1] == 3}
  assert ahead == {1}
  assert {now - call for call, now in waits if now < 32} == {2}


@pytest.mark.parametrize(
  "name",
  [
    "cifar10",
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ("folder", "imagenet100", "imagenet1k")
    ),
  ],
)
def test_every_smoke_variant_runs(name, load_config, tmp_path, capsys):
  run = run_lib.prepare(load_config(name, "smoke"), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
  assert loop.train(run)
  assert "is finished" in capsys.readouterr().out
  for file in ("summary.json", "reconstructions.png", "curves.png"):
    assert (tmp_path / "run" / file).exists()


def test_a_checkpoint_of_another_model_is_refused(load_config, tmp_path):
  c = load_config("digits", "smoke")
  run = run_lib.prepare(c, str(tmp_path))
  state = train_step.init_state(
    lambda key: {"w": jnp.ones(3)},
    optax.sgd(0.1),
    jax.random.key(0),
    run.mesh,
  )
  with checkpoint.open_checkpoints(tmp_path / "checkpoints") as checkpoints:
    checkpoints.save(5, state)
  workdir.claim(tmp_path, config.flatten(c))
  with pytest.raises(UserError, match="another model or optimizer"):
    loop.train(run)
  assert (tmp_path / "checkpoints" / "5").exists()
