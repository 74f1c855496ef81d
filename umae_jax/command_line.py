"""What the programs of the package have in common: --config, and errors."""

from collections.abc import Sequence
import difflib
import os
import pathlib
import re
import sys

# Before TensorFlow loads, which only reads images here.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import flags
import ml_collections
from ml_collections import config_flags

from umae_jax import UserError
from umae_jax import config as config_lib

EXIT_ERROR, EXIT_USAGE, EXIT_PREEMPTED = 1, 2, 75

CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "A file of configs/, with an optional variant, e.g. configs/digits.py:smoke. "
  "Any of its keys can be set: --config.loss.uniformity_weight=0.1.",
  lock_config=True,
)


def parse(argv: list[str], required: Sequence[str] = ("config",)) -> list[str]:
  """Parses the flags; whatever is wrong with them is told in one line.

  Args:
    argv: the program and its arguments.
    required: flags that may not be missing.

  Returns:
    What is no flag: the program alone.
  """
  try:
    check_file(argv)
    check_overrides(argv)
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise UserError(f"unexpected arguments {rest[1:]}; see --help")
    if not asks_for_help():
      check_required(required)
  except Exception as error:
    lines = str(error).strip().splitlines()
    sys.exit(fail(f"{lines[0]} {lines[-1]}" if lines[1:] else lines[0]))
  return rest


def check_file(argv: list[str]) -> None:
  """Refuses --config=FILE that is not there, which overrides would hide."""
  for argument in argv[1:]:
    match = re.fullmatch(r"--?config=([^:]*)(:.*)?", argument)
    if match and not pathlib.Path(match[1]).is_file():
      raise _no_file(f" ({match[1]})")


def _no_file(name: str = "") -> UserError:
  files = [str(path) for path in sorted(pathlib.Path("configs").glob("*.py"))]
  return UserError(
    f"--config names no readable file{name}; in this directory there are "
    f"{files}, each with optional :variant."
  )


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


def check_required(names: Sequence[str]) -> None:
  """Refuses missing flags, and a --config that is not there."""
  for name in names:
    if flags.FLAGS[name].value is None:
      raise UserError(f"--{name} is missing; see --help")
  if not isinstance(CONFIG.value, ml_collections.ConfigDict):
    raise _no_file()


def asks_for_help() -> bool:
  """Whether one of absl's help flags is given."""
  names = ("help", "helpfull", "helpshort", "helpxml", "only_check_args")
  return any(flags.FLAGS[name].value for name in names)


def fail(error: Exception | str, code: int = EXIT_USAGE) -> int:
  """Prints an error for people, and returns the exit code."""
  print(f"umae_jax: {error}", file=sys.stderr, flush=True)
  return code
