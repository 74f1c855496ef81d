"""A run: what is checked before it starts, and what is said of it."""

import pathlib
from typing import NamedTuple
import zlib

import jax
from jax.sharding import Mesh
import ml_collections

from umae_jax import (
  UserError,
  metrics,
  sharding,
  storage,
  validation,
  workdir,
)
from umae_jax import config as config_lib
from umae_jax.data import in_memory, sources
from umae_jax.tasks import (
  Task,
  finetune,
  frozen,
  inputs,
  linear_probe,
  pretrain,
)

Source = sources.Source | in_memory.MemorySource

TASKS = {
  "pretrain": pretrain.make,
  "linear_probe": linear_probe.make,
  "finetune": finetune.make,
  "features": frozen.make_features,
}


class Run(NamedTuple):
  """A run that has been validated and may start."""

  config: ml_collections.ConfigDict
  identity: dict[str, object]  # Flat configuration, and the data found.
  plan: config_lib.Plan
  mesh: Mesh
  directory: pathlib.Path
  train_source: Source
  eval_source: Source
  task: Task


def prepare(
  config: ml_collections.ConfigDict,
  directory: str,
  *,
  allow_config_change: bool = False,
) -> Run:
  """Checks everything that can be checked before the first compilation.

  Writes nothing.

  Raises:
    UserError: a bad key, missing data, or a work directory of another run.
  """
  validation.validate(
    config,
    num_devices=jax.device_count(),
    num_processes=jax.process_count(),
  )
  train_source = open_source(config, training=True)
  eval_source = open_source(config, training=False)
  check_sources(config, train_source, eval_source)
  plan = config_lib.plan(config, train_source.num_examples)
  mesh = sharding.make_mesh(config.mesh.fsdp)
  path = storage.path(directory, "--workdir=").expanduser()
  kept = with_recorded_attention(config, mesh, path)
  task = TASKS[config.task](kept, plan, mesh, train_source, eval_source)
  identity = config_lib.flatten(config) | {
    "found.train_images": train_source.num_examples,
    "found.eval_images": eval_source.num_examples,
    "found.classes": zlib.crc32("\n".join(train_source.class_names).encode()),
  }
  identity |= file_names(config, train_source, eval_source)
  identity |= {f"found.{key}": x for key, x in task.found.items()}
  workdir.check(
    path,
    identity,
    free_keys=config_lib.FREE_KEYS,
    allow_change=allow_config_change,
  )
  sharding.synchronize("prepared")  # Before the first one writes.
  sources = (train_source, eval_source)
  return Run(config, identity, plan, mesh, path, *sources, task)


def file_names(config, *opened: Source) -> dict[str, int]:
  """{"found.files": CRC-32 of the images' names} of folders; else nothing.

  Below `config.data.directory`, so that the folder as a whole may move.
  """
  crc, root = 0, config.data.directory.rstrip("/")
  for source in opened:
    if not getattr(source, "source", source).is_path:
      return {}
    for row in range(source.num_examples):
      name = source.name_of(row).removeprefix(root).lstrip("/")
      crc = zlib.crc32(f"{name}\n".encode(errors="surrogateescape"), crc)
  return {"found.files": crc}


def with_recorded_attention(config, mesh, path) -> ml_collections.ConfigDict:
  """The configuration, "auto" replaced by what the run in `path` has chosen.

  Measured again, it might be another one, of another rounding. It is, where
  the recorded one can not be had.
  """
  names = workdir.recorded(path, "found.attention") or ""
  fits = set(names.split(",")) <= set(inputs.attentions(config, mesh))
  if config.execution.attention == "auto" and fits:
    config = config.copy_and_resolve_references()
    config.execution.attention = names
  return config


def open_source(config, *, training: bool) -> Source:
  """The data to train on, or those to evaluate on."""
  data = config.data
  split = data.train_split if training else data.eval_split
  image_size = tuple(data.image_size)
  source = sources.open_source(
    data.name,
    split,
    directory=data.directory,
    eval_fraction=data.eval_fraction,
    classes=data.classes,
    image_size=image_size,
    channels=data.channels,
  )
  if data.feed != "memory":
    return source
  crops = training and len(data.crop_scale) > 0
  return in_memory.MemorySource(source, image_size, data.channels, crops)


def check_sources(config, train: Source, *others: Source) -> None:
  """Refuses what gives no such batches, no classes, or is too large."""
  classes = len(train.class_names)
  if classes < 2 and config.task in ("linear_probe", "finetune"):
    raise UserError(
      f"config.task={config.task!r} needs two classes or more; config.data has "
      f"{classes}. Sort the images into a folder for each class, or use "
      "config.task='features'."
    )
  for source in (train, *others):
    source.check(config.batch_size, jax.process_count())
  if config.data.feed == "memory":
    in_memory.check_memory(train, *others, processes=sharding.processes_here())


def describe(run, state, start):
  """Prints the configuration, the parameters and what is about to happen."""
  rows = [(key, str(x)) for key, x in config_lib.flatten(run.config).items()]
  print(metrics.format_table(rows, ("config", "value")), end="\n\n")
  print(metrics.parameter_table(state.params), end="\n\n")
  plan, devices = run.plan, run.mesh.devices
  hardware = f"{devices.size} x {devices.flat[0].device_kind}"
  if plan.total_steps == 0:
    print(f"No training, evaluation only; {hardware}.", flush=True)
    return
  print(
    f"{run.train_source.num_examples} images, {plan.steps_per_epoch} steps an "
    f"epoch, {plan.total_steps} in all; peak rate {plan.learning_rate:.4g}; "
    f"{hardware}; "
    + (f"resuming after step {start}." if start else "starting afresh."),
    flush=True,
  )


def conclude(run):
  """Writes summary.json and prints the closing table, from the log."""
  records = metrics.read_log(run.directory / workdir.METRICS)
  evaluations = [record for record in records if record["split"] == "eval"]
  if not evaluations:
    raise UserError(
      f"The run in {run.directory} is finished, but {workdir.METRICS} holds no "
      "evaluation any more; restore that file to get the closing table."
    )
  last = evaluations[-1]
  summary = {key: x for key, x in last.items() if key != "split"}
  workdir.write_json(run.directory / workdir.SUMMARY, summary)
  rows = [
    (key, f"{x:.4f}" if isinstance(x, float) else str(x))
    for key, x in summary.items()
  ]
  print(metrics.format_table(rows, ("finished", "value")))
  print(f"The run in {run.directory} is finished.", flush=True)
