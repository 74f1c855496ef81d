"""From the times of rounds to figures, and to a table of them."""

from collections.abc import Mapping, Sequence
import importlib.metadata
import os
import platform
import shlex
import statistics
import subprocess
import sys
from typing import Any

LIBRARIES = ("jax", "jaxlib", "flax", "torch", "transformers")
VARIABLES = ("XLA_FLAGS", "GLIBC_TUNABLES", "XLA_PYTHON_CLIENT_PREALLOCATE")


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
  """(lower quartile, median, upper quartile) of one value or more."""
  if len(values) == 1:
    return (values[0],) * 3
  return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def spread(values: Sequence[float]) -> dict[str, float]:
  """Median, quartiles and minimum."""
  lower, median, upper = quartiles(values)
  return {
    "median": median,
    "min": min(values),
    "lower_quartile": lower,
    "upper_quartile": upper,
  }


def ratio(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
  """How many times as long as the second the first takes.

  Args:
    first: seconds, of rounds in turn with those of
    second: seconds.

  Returns:
    "of_medians", and quartiles of the ratios of neighbouring rounds.
  """
  lower, _, upper = quartiles([a / b for a, b in zip(first, second)])
  return {
    "of_medians": statistics.median(first) / statistics.median(second),
    "lower_quartile": lower,
    "upper_quartile": upper,
  }


def throughput(
  seconds: Sequence[float],
  *,
  batch_size: int,
  flops: float,
  peak: float | None,
) -> dict[str, Any]:
  """What the seconds of a step amount to.

  Args:
    seconds: of a step, each the mean of a round.
    batch_size: B.
    flops: model FLOP per image.
    peak: FLOP/s of all devices, or None.
  """
  rate = batch_size / statistics.median(seconds)
  return {
    "images_per_second": rate,
    "step_ms": {k: 1e3 * x for k, x in spread(seconds).items()},
    "model_flops_per_second": rate * flops,
    "mfu": rate * flops / peak if peak else None,
  }


def provenance() -> dict[str, Any]:
  """What one must know to measure the same again."""
  versions = {"python": platform.python_version()}
  for name in LIBRARIES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = None
  return {
    "command": shlex.join(
      ["python", "-m", "umae_jax.benchmark", *sys.argv[1:]]
    ),
    "commit": commit(),
    "cpu_count": os.cpu_count(),
    "versions": versions,
    "environment": {name: os.environ.get(name, "") for name in VARIABLES},
  }


def commit() -> str | None:
  """The commit of the working directory, "+changes" if there are any."""

  def git(*arguments):
    return subprocess.run(
      ["git", *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()

  try:
    head = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
  except (OSError, subprocess.CalledProcessError):
    return None
  return head + ("+changes" if changed else "")


def rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
  """The lines of the table: a path of names, and the value as text."""

  def walk(prefix, value):
    if isinstance(value, Mapping):
      for key, x in value.items():
        yield from walk(f"{prefix}.{key}" if prefix else key, x)
    else:
      yield prefix, text(value)

  return list(walk("", result))


def text(value: Any) -> str:
  """A figure of four digits, with a power of ten only where it is far off."""
  if value is None:  # The MFU.
    return "no known peak: give --peak"
  if isinstance(value, float):
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
  return f"{value:,}" if isinstance(value, int) else str(value)
