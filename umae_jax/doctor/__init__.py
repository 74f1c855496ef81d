"""What a run would be, without training: sizes, cost, and what looks wrong."""

from collections.abc import Iterator
import datetime
import math
import tempfile

import jax
from jax.sharding import Mesh
import ml_collections

from umae_jax import UserError, metrics, sharding, validation
from umae_jax import config as config_lib
from umae_jax import run as run_lib
from umae_jax.benchmark import flops
from umae_jax.doctor import cost, doubts
from umae_jax.models import masking
from umae_jax.models import patches as patches_lib
from umae_jax.tasks import Task, inputs

# Of the speed of a large matrix product; docs/benchmarks.md has what was found.
EFFICIENCY = 0.4
RELEASED_GPUS = 8  # That the released runs took.


def examine(
  config: ml_collections.ConfigDict,
  workdir: str | None,
  *,
  allow_config_change: bool = False,
) -> bool:
  """Prints what a run of this configuration would be.

  Args:
    config: of the run, validated or not.
    workdir: where it would be, if that is known; nothing is written there.
    allow_config_change: as that of `run.prepare`.

  Returns:
    Whether it would start.

  Raises:
    UserError: the configuration is wrong, so that there is nothing to say.
  """
  validation.validate(
    config, num_devices=jax.device_count(), num_processes=jax.process_count()
  )
  mesh = sharding.make_mesh(config.mesh.fsdp)
  rows = [("task", config.task), *_shapes(config)]
  rows.append(("FLOP per image", f"{flops.per_image(config) / 1e9:.4g} G"))
  notes, run, trouble = list(doubts.of_config(config)), None, ""
  try:
    with tempfile.TemporaryDirectory() as unused:
      run = run_lib.prepare(
        config, workdir or unused, allow_config_change=allow_config_change
      )
  except UserError as error:
    trouble = str(error)
  task = run.task if run else task_without_data(config, mesh)
  if task:
    rows += _parameters(config, mesh, task)
    memory, limit = cost.memory(config, mesh, task)
    rows += [(key, _gigabytes(x)) for key, x in memory.items()]
    rows.append(("memory of a device", _gigabytes(limit)))
    notes += doubts.of_memory(config, mesh, sum(memory.values()), limit)
  if config_lib.trains(config):
    rows += _optimization(config)
  if run:
    rows += _steps(config, run, mesh)
    notes += doubts.of_data(config, run)
  print(metrics.format_table(rows, ("what", "value")))
  print("".join(f"\nNote: {note}" for note in notes))
  print(f"\nIt would not start: {trouble}" if trouble else "\nIt would start.")
  return not trouble


def _shapes(config) -> Iterator[tuple[str, str]]:
  data, model = config.data, config.model
  size, p = tuple(data.image_size), model.patch_size
  grid = patches_lib.grid_shape(size, p)
  patches = math.prod(grid)
  yield "image", f"{size[0]} x {size[1]} pixels, {data.channels} channels"
  yield (
    "patches",
    f"{patches} = {grid[0]} x {grid[1]}, of {p} x {p} pixels, "
    f"{p * p * data.channels} values",
  )
  tokens = 1 + patches
  if config.task == "pretrain":
    tokens = 1 + masking.num_visible(patches, config.loss.mask_ratio)
  yield (
    "encoder",
    f"{tokens} tokens, width {model.width}, depth {model.depth}, "
    f"{model.num_heads} heads",
  )
  if config.task == "pretrain":
    yield (
      "decoder",
      f"{1 + patches} tokens, width {model.decoder_width}, depth "
      f"{model.decoder_depth}, {model.decoder_num_heads} heads",
    )


def task_without_data(
  config: ml_collections.ConfigDict, mesh: Mesh
) -> Task | None:
  """Of a pretraining, which knows its sizes without them."""
  if config.task != "pretrain":
    return None
  plan = config_lib.Plan(1, 1, 0, 1, 0.0)
  return run_lib.TASKS["pretrain"](config, plan, mesh, None, None)


def _parameters(config, mesh, task) -> list[tuple[str, str]]:
  params = cost.state(config, mesh, task).params
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
  rows = [(f"parameters, {k}", f"{count(x):,}") for k, x in params.items()]
  return [*rows, ("parameters", f"{count(params):,}")]


def _optimization(config) -> Iterator[tuple[str, str]]:
  optimizer, batch = config.optimizer, config.batch_size
  rate = config_lib.peak_rate(config)
  scaling = f"{optimizer.base_lr:g} x {batch} / 256"
  yield "learning rate, peak", f"{rate:.4g} = {scaling}"
  if config.task == "pretrain":
    weight = config.loss.uniformity_weight
    yield "lambda", f"{weight:g}, over all {batch} images of a batch"
    yield (
      "lambda, released code",
      f"{weight * RELEASED_GPUS:g} on its {RELEASED_GPUS} GPUs acts like it "
      f"(lambda / GPUs; its 0.01 is {0.01 / RELEASED_GPUS:g} here)",
    )


def _steps(config, run, mesh) -> Iterator[tuple[str, str]]:
  plan, images = run.plan, run.train_source.num_examples
  classes = len(run.train_source.class_names)
  yield "images to train on", f"{images:,} of {classes:,} classes"
  yield "steps", f"{plan.total_steps:,} ({plan.steps_per_epoch:,} an epoch)"
  yield "of which warm-up", f"{plan.warmup_steps:,}"
  if plan.total_steps:
    speed = cost.product_speed(inputs.compute_dtype(config, mesh))
    speed *= EFFICIENCY * mesh.devices.size / _devices_of_a_cpu(mesh)
    work = flops.per_image(config) * config.batch_size * plan.total_steps
    duration = datetime.timedelta(seconds=round(work / speed))
    yield (
      "time of the steps, about",
      f"{duration}, were they {EFFICIENCY:.0%} as fast as a large matrix "
      "product is here",
    )


def _devices_of_a_cpu(mesh) -> int:
  """How many of the devices share one machine's cores."""
  if mesh.devices.flat[0].platform != "cpu":
    return 1
  return jax.local_device_count()


def _gigabytes(number: float) -> str:
  return f"{number / 1e9:.3g} GB"
