r"""Trains one run of umae_jax; the same command again resumes it.

  python -m umae_jax.main --config=configs/digits.py --workdir=runs/digits
  python -m umae_jax.main --config=configs/imagenet1k.py:vit_l16 \
      --workdir=runs/large --config.loss.uniformity_weight=0

Exit codes: 0 finished, 1 stopped with an error, 2 wrong usage, configuration
or data, 75 asked to stop (SIGTERM) and saved: run the same command again.
"""

import difflib
import os
import pathlib
import re
import sys

# Before TensorFlow loads, which only reads images here.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import app, flags, logging
import jax
import ml_collections
from ml_collections import config_flags

from umae_jax import UserError
from umae_jax import config as config_lib

EXIT_ERROR, EXIT_USAGE, EXIT_PREEMPTED = 1, 2, 75

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "A file of configs/, with an optional variant, e.g. configs/digits.py:smoke. "
  "Any of its keys can be set: --config.loss.uniformity_weight=0.1.",
  lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Directory for checkpoints, logs and pictures; a run found here resumes.",
)
_MULTIHOST = flags.DEFINE_bool(
  "multihost",
  False,
  "Join the other processes of this job first: found through the cluster "
  "(TPU, SLURM, Kubernetes, MPI), or JAX_COORDINATOR_ADDRESS (host:port), "
  "JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
  "allow_config_change",
  False,
  "Resume the run in --workdir although its configuration was another.",
)


def main(argv: list[str]) -> int:
  """Prepares the process, and calls the loop."""
  del argv
  logging.set_verbosity(logging.WARNING)  # Orbax tells much of its doings.
  try:
    connect()
    # Imported late: a wrong flag should not wait for it.
    from umae_jax import loop, run

    prepared = run.prepare(
      _CONFIG.value,
      _WORKDIR.value,
      allow_config_change=_ALLOW_CONFIG_CHANGE.value,
    )
    return 0 if loop.train(prepared) else EXIT_PREEMPTED
  except UserError as error:
    return fail(error)
  except (FloatingPointError, OSError) as error:
    return fail(error, EXIT_ERROR)


def connect() -> None:
  """Joins the other processes, if asked to, and finds the devices."""
  try:
    if _MULTIHOST.value:
      number = os.environ.get("JAX_NUM_PROCESSES")
      index = os.environ.get("JAX_PROCESS_ID")
      jax.distributed.initialize(
        num_processes=number and int(number), process_id=index and int(index)
      )
    jax.devices()
  except (RuntimeError, ValueError) as error:
    wanted = os.environ.get("JAX_PLATFORMS", "")
    raise UserError(
      f"JAX found no devices to run on (JAX_PLATFORMS={wanted!r}): "
      f"{str(error).splitlines()[0]} Install 'umae_jax[gpu]' or "
      "'umae_jax[tpu]', or set JAX_PLATFORMS=cpu; for --multihost see --help."
    ) from error


def parse(argv: list[str]) -> list[str]:
  """Parses the flags; whatever is wrong with them is told in one line."""
  try:
    check_overrides(argv)
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise UserError(f"unexpected arguments {rest[1:]}; see --help")
    if not asks_for_help():
      check_required()
  except Exception as error:
    lines = str(error).strip().splitlines()
    sys.exit(fail(f"{lines[0]} {lines[-1]}" if lines[1:] else lines[0]))
  return rest


def check_overrides(argv: list[str]) -> None:
  """Refuses --config.KEY for keys that no config has."""
  keys = config_lib.flatten(config_lib.defaults())
  for argument in argv[1:]:
    match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
    if match and match[1] not in keys:
      near = difflib.get_close_matches(match[1], keys, cutoff=0.5)
      raise UserError(
        f"config.{match[1]} is not a key; did you mean one of {near}? "
        "umae_jax/config.py lists them all."
      )


def check_required() -> None:
  """Refuses missing flags, and a --config that is not there."""
  for name in ("config", "workdir"):
    if flags.FLAGS[name].value is None:
      raise UserError(f"--{name} is missing; see --help")
  if not isinstance(_CONFIG.value, ml_collections.ConfigDict):
    names = [str(path) for path in sorted(pathlib.Path("configs").glob("*.py"))]
    raise UserError(
      "--config names no readable file; in this directory there are "
      f"{names}, each with optional :variant."
    )


def asks_for_help() -> bool:
  """Whether one of absl's help flags is given."""
  names = ("help", "helpfull", "helpshort", "helpxml", "only_check_args")
  return any(flags.FLAGS[name].value for name in names)


def fail(error: Exception | str, code: int = EXIT_USAGE) -> int:
  """Prints an error for people, and returns the exit code."""
  print(f"umae_jax: {error}", file=sys.stderr, flush=True)
  return code


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
