"""Work directories of pretrainings, read to be compared."""

from collections.abc import Sequence
import os
import pathlib
from typing import Any, NamedTuple

import jax
import ml_collections

from umae_jax import UserError, convert, metrics, models, storage, workdir
from umae_jax import config as config_lib
from umae_jax.convert import files

MOST = 6  # Runs: as many as there are colours.
# What must agree, that figures of several runs are of the same images and
# masks.
DATA_KEYS = (
  "model.patch_size",
  *("data.name", "data.classes", "data.eval_split", "data.eval_fraction"),
  *("data.image_size", "data.channels", "found.eval_images", "found.classes"),
)
# What may differ and says nothing about the result.
_SILENT = (*config_lib.FREE_KEYS, "log.", "evaluation.", "found.", "data.feed")


class Run(NamedTuple):
  """A pretraining, finished or not.

  Attributes:
    directory: its work directory.
    label: short and unlike those of the other runs.
    flat: its config.json.
    config: the same as a configuration; keys newer than the run have defaults.
    records: its log, of `metrics.read_log`.
    step: of its newest checkpoint.
    finished: whether it has a summary.
    model: of float32.
    params: of its newest good checkpoint.
  """

  directory: pathlib.Path
  label: str
  flat: dict[str, Any]
  config: ml_collections.ConfigDict
  records: list[dict[str, Any]]
  step: int
  finished: bool
  model: models.MaskedAutoencoder
  params: Any


def read(paths: Sequence[str | os.PathLike]) -> list[Run]:
  """Reads runs of one data set; writes nothing.

  Raises:
    UserError: too many; not a pretraining's work directory, or without a good
      checkpoint; or of other images than the first.
  """
  directories = [storage.local_path(os.fspath(x), "RUN=") for x in paths]
  if len({path.resolve() for path in directories}) < len(directories):
    raise UserError(f"RUN: of {list(map(str, paths))} two are the same.")
  if len(directories) > MOST:
    raise UserError(
      f"RUN: {len(directories)} are given; a picture has room for {MOST}."
    )
  flats = [_read_config(path) for path in directories]
  for path, flat in zip(directories, flats):
    wrong = [
      f"{key}={flat.get(key)!r}, there {flats[0].get(key)!r}"
      for key in DATA_KEYS
      if flat.get(key) != flats[0].get(key)
    ]
    if wrong:
      raise UserError(
        f"RUN={path} is of other images or patches than {directories[0]}: "
        f"{'; '.join(wrong)}. Make a report of each."
      )
  found = zip(directories, _labels(directories, flats), flats)
  return [_read(*x) for x in found]


def differences(runs: Sequence[Run]) -> list[str]:
  """The keys of the configuration in which runs differ."""
  keys = sorted({key for run in runs for key in run.flat})
  values = {key: [run.flat.get(key) for run in runs] for key in keys}
  return [
    key
    for key, x in values.items()
    if any(y != x[0] for y in x) and not key.startswith(_SILENT)
  ]


def _read_config(path):
  if not (path / workdir.CONFIG).is_file():
    raise UserError(
      f"RUN={path} is no work directory of a run: it has no {workdir.CONFIG}. "
      "Give the --workdir of a pretraining."
    )
  flat = files.read_json(path / workdir.CONFIG)
  if flat.get("task") != "pretrain":
    raise UserError(
      f"RUN={path} is of task={flat.get('task')!r}; a report is of "
      "pretrainings: give the run that its encoder came from."
    )
  return flat


def _labels(directories, flats):
  """The end of each path, as far as they differ, and which loss it was."""
  paths = [path.resolve() for path in directories]
  top = os.path.commonpath([path.parent for path in paths])
  return [
    f"{path.relative_to(top)} "
    f"({'U-MAE' if flat['loss.uniformity_weight'] else 'MAE'})"
    for path, flat in zip(paths, flats)
  ]


def _read(directory, label, flat):
  config = config_lib.defaults()
  known = config_lib.flatten(config)
  with config.ignore_type():
    config.update_from_flattened_dict(
      {key: x for key, x in flat.items() if key in known}
    )
  folder = directory / workdir.CHECKPOINTS
  steps = [int(x.name) for x in folder.glob("*") if x.name.isdecimal()]
  model, params = convert.load_pretrained(directory)
  log = directory / workdir.METRICS
  return Run(
    directory,
    label,
    flat,
    config,
    metrics.read_log(log) if log.exists() else [],
    max(steps),
    (directory / workdir.SUMMARY).exists(),
    model,
    jax.device_put(params),
  )
