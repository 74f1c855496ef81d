"""The one training loop, for every task: resume, step, log, evaluate, save."""

import collections
import contextlib
import functools
import itertools

import jax

from umae_jax import (
  UserError,
  checkpoint,
  feeding,
  metrics,
  sharding,
  storage,
  train_step,
  workdir,
)
from umae_jax import config as config_lib
from umae_jax.analysis import pictures
from umae_jax.run import Run, conclude, describe

MAX_SKIPS = 5  # Steps in a row that may be skipped before the run stops.
AHEAD = 2  # Single steps that may wait for the device; of several, one call.
CALL_SECONDS = 1.0  # That the steps taken at once may last, for SIGTERM's sake.


def train(run: Run) -> bool:
  """Trains until the plan's last step, from the newest checkpoint if any.

  Returns:
    True if the run is finished, False if it was asked to stop (SIGTERM) and
    has saved its state.

  Raises:
    FloatingPointError: the gradient was not finite five times in a row.
    UserError: checkpoints or images that cannot be read.
  """
  first = jax.process_index() == 0
  steps = run.plan.total_steps
  with contextlib.ExitStack() as stack:
    if first:
      stack.enter_context(workdir.lock(run.directory))
    if steps == 0 and is_evaluated(run):
      sharding.synchronize("found evaluated")
      if first:
        conclude(run)
      return True
    checkpoints = stack.enter_context(
      checkpoint.open_checkpoints(
        run.directory / workdir.CHECKPOINTS,
        keep_last=run.config.checkpoint.keep_last,
        keep_every=run.config.checkpoint.keep_every_steps or None,
      )
    )
    state, start = restore_or_init(run, checkpoints)
    if first:
      workdir.claim(run.directory, run.identity)
      describe(run, state, start)
    log = stack.enter_context(
      contextlib.closing(
        metrics.MetricsLog(
          run.directory, resume_step=start or None, active=first
        )
      )
    )
    if steps == 0:
      evaluate_and_draw(run, state.params, 0, log)
    finished = start == steps or run_steps(run, state, start, checkpoints, log)
  if finished and first:
    conclude(run)
  return finished


def is_evaluated(run) -> bool:
  """Whether a run without steps has its result, of this configuration."""
  return (run.directory / workdir.SUMMARY).exists() and not workdir.changed(
    run.directory, run.identity, config_lib.FREE_KEYS
  )


def restore_or_init(run, checkpoints):
  """(state, its step): the newest good checkpoint's, or a new one."""
  key = jax.random.key(run.config.seed)
  task = run.task
  arguments = (task.init, task.optimizer, key, run.mesh)
  arguments = (*arguments, task.objective.frozen, task.given)
  restored = checkpoints.restore_newest(train_step.abstract_state(*arguments))
  if restored is None:
    if (run.directory / workdir.SUMMARY).exists() and run.plan.total_steps:
      raise UserError(
        f"--workdir={run.directory} holds a finished run whose checkpoints are "
        "gone; restore them, or use another --workdir."
      )
    return train_step.init_state(*arguments), 0
  step, state = restored
  if step > run.plan.total_steps:
    raise UserError(
      f"--workdir={run.directory} has a checkpoint of step {step}, the last "
      f"is {run.plan.total_steps} here; use another, or more epochs."
    )
  return state, step


def run_steps(run, state, start, checkpoints, log) -> bool:
  """Steps `start` + 1 to the last; False if asked to stop before.

  The host reads from the device only at steps that log, evaluate or save.
  Between them it stays a little ahead of it. How many steps are taken at once
  follows from the rate at the last line logged, and does not change the result.
  """
  config, plan = run.config, run.plan
  first = jax.process_index() == 0
  feed = feeding.open_feed(config, run.train_source, run.mesh, start)
  progress = metrics.Progress(
    plan.total_steps, start, config.batch_size, active=first
  )
  with (
    sharding.stop_on_sigterm() as stop,
    contextlib.closing(progress),
    contextlib.closing(feed),
  ):
    step_function = make_step_function(run, state, feed)
    step, running = start, collections.deque()
    calls, most = itertools.count(1), 1
    while step < plan.total_steps:
      arguments, taken = feed.take(step, next_pause(run, step, most))
      state, scalars = step_function(state, *arguments)
      step += taken
      last = step == plan.total_steps
      stopping = sharding.preempted(next(calls), stop.is_set())
      log_now = last or step % config.log.every_steps == 0
      evaluate = last or step % plan.evaluate_every == 0
      save = last or stopping or step % config.checkpoint.every_steps == 0
      if not (log_now or evaluate or save):
        running.append(scalars)
        if len(running) > (AHEAD if taken == 1 else 1):
          jax.block_until_ready(running.popleft())
        continue
      running.clear()
      scalars = to_floats(run, step, scalars, feed.unreadable())
      if log_now:
        times = progress.update(step, scalars)
        log.write(step, "train", scalars | times)
        rate = times["time/images_per_second"] / config.batch_size
        most = sharding.from_first_process(max(int(CALL_SECONDS * rate), 1))
      require_finite(step, scalars, checkpoints)
      with progress.paused():
        if evaluate:
          evaluate_and_draw(run, state.params, step, log)
        if save:
          log.commit()  # First: a checkpoint's log must be complete.
          checkpoints.save(step, state, wait=stopping)
      if stopping and not last:
        return False
  return True


def make_step_function(run, state, feed):
  """The jitted step: (state, and what the feed gives) -> (state, metrics)."""
  return train_step.make_train_step(
    feeding.finish_on_device(run.task.objective, run.config),
    run.task.optimizer,
    run.mesh,
    jax.tree.map(lambda x: x.sharding, state),
    seed=run.config.seed,
    micro_batches=run.config.micro_batches,
    max_skips=MAX_SKIPS,
    draw=feed.draw,
  )


def next_pause(run, step, most) -> int:
  """The first step that logs, evaluates or saves; at most `most` from here."""
  config, plan = run.config, run.plan
  every = (config.log.every_steps, config.checkpoint.every_steps)
  every = (*every, plan.evaluate_every)
  pauses = (step + n - step % n for n in every)
  return min(plan.total_steps, step + most, *pauses)


def to_floats(run, step, scalars, unreadable):
  """Waits for the step, and adds what the host knows of it.

  Unreadable images are counted since this process started.
  """
  scalars = {k: float(v) for k, v in jax.device_get(scalars).items()}
  # The rate of the update just made, the `applied`-th.
  applied = max(step - int(scalars["skipped"]) - 1, 0)
  scalars["learning_rate"] = float(run.task.schedule(applied))
  unreadable = sharding.sum_over_processes(unreadable)
  return scalars | {"unreadable_images": unreadable}


def require_finite(step, scalars, checkpoints):
  """Stops a run that cannot go on, with what is known."""
  if scalars["skipped_in_a_row"] < MAX_SKIPS:
    return
  checkpoints.wait()
  known = ", ".join(f"{k} {v:.4g}" for k, v in scalars.items())
  steps = checkpoints.steps
  saved = f"step {steps[-1]}" if steps else "none yet"
  raise FloatingPointError(
    f"The gradient was not finite {MAX_SKIPS} times in a row, up to step "
    f"{step} ({known}). None of these updates was applied; newest checkpoint: "
    f"{saved}. Resume with a lower config.optimizer.base_lr and "
    "--allow_config_change, or look for bad values in the data."
  )


def evaluate_and_draw(run, params, step, log):
  """Evaluates, logs, and brings the pictures and files up to date."""
  evaluation = run.task.evaluate(params)
  log.write(step, "eval", evaluation.scalars)
  log.commit()
  if jax.process_index() != 0:
    return
  drawings = dict(evaluation.pictures)
  if run.plan.total_steps:
    records = metrics.read_log(run.directory / workdir.METRICS)
    drawings["curves"] = functools.partial(pictures.curves, records)
  for name, draw in drawings.items():
    log.image(step, name, draw(run.directory / f"{name}.png"))
  for name, write in evaluation.files.items():
    storage.write_file(run.directory / name, write)
  shown = [f"{key} {x:.4g}" for key, x in evaluation.scalars.items()]
  print(f"evaluation at step {step}: {', '.join(shown)}", flush=True)
  if evaluation.table:
    print(f"\n{evaluation.table}\n", flush=True)
