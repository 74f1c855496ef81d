r"""Trains every combination of mask ratio, lambda and seed; compares them.

  python -m umae_jax.analysis.sweep --config=configs/digits.py \
      --workdir=runs/sweep --mask_ratio=0.25,0.5,0.75 --weight=0,0.01 \
      --seeds=0,1,2 --jobs=2 --config.num_epochs=100

Each run is `python -m umae_jax.main` in runs/sweep/ratioR-weightW-seedS, whose
log.txt is what it printed. sweep.csv, the table and sweep.png are of the runs
finished so far; the same command again goes on with the others, and one with
more values adds to them. All other settings must stay the same.

Exit codes: 0 all runs are finished, 1 some failed, 2 wrong usage, configuration
or data, 75 asked to stop (SIGTERM, Ctrl-C): run the same command again.
"""

from collections.abc import Mapping, Sequence
import concurrent.futures
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

from absl import app, flags
import ml_collections

from umae_jax import UserError, command_line, storage, workdir
from umae_jax import config as config_lib
from umae_jax.analysis import sweep_figures
from umae_jax.command_line import EXIT_ERROR, EXIT_PREEMPTED, fail

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the whole sweep; a sweep found here goes on."
)
_RATIOS = flags.DEFINE_list(
  "mask_ratio", None, "Mask ratios, e.g. 0.25,0.5; default: the config's."
)
_WEIGHTS = flags.DEFINE_list(
  "weight", None, "Lambdas, weights of the uniformity loss; likewise."
)
_SEEDS = flags.DEFINE_list("seeds", None, "Seeds, e.g. 0,1,2; likewise.")
_JOBS = flags.DEFINE_integer(
  "jobs", 1, "Runs at a time, on the same devices.", lower_bound=1
)
LOG = "log.txt"
LINES = 5  # Of its log that are shown of a failed run.


class Combination(NamedTuple):
  """What the runs of a sweep differ in."""

  mask_ratio: float
  uniformity_weight: float
  seed: int

  @property
  def name(self) -> str:
    """Of the run's directory."""
    ratio, weight, seed = (f"{x:.15g}" for x in self)
    return f"ratio{ratio}-weight{weight}-seed{seed}"


KEYS = ("loss.mask_ratio", "loss.uniformity_weight", "seed")  # Its fields.


def main(argv: list[str]) -> int:
  """Checks all runs, trains those that are not finished, and tells."""
  del argv
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # As Ctrl-C.
  config, jobs = command_line.CONFIG.value, _JOBS.value
  if jobs > 1:  # They share the memory of a GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  context = multiprocessing.get_context("spawn")
  ignore = (signal.signal, (signal.SIGINT, signal.SIG_IGN))
  try:
    directory = storage.local_path(_WORKDIR.value, "--workdir=").expanduser()
    runs = combine(config)
    # In a process of its own, which leaves the device to the runs.
    with concurrent.futures.ProcessPoolExecutor(1, context, *ignore) as pool:
      checked = pool.submit(prepare, config, directory, runs).result()
    with workdir.lock(directory):
      return sweep(
        config, directory, dict(zip(runs, checked)), passed_on(sys.argv)
      )
  except UserError as error:
    return fail(error)
  except OSError as error:
    return fail(error, EXIT_ERROR)
  except KeyboardInterrupt:
    return fail("stopped; run the same command again.", EXIT_PREEMPTED)


def combine(config: ml_collections.ConfigDict) -> list[Combination]:
  """All runs: first those of the first seed, so that early ones compare."""
  seeds = numbers(_SEEDS, int, config.seed)
  ratios = numbers(_RATIOS, float, config.loss.mask_ratio)
  weights = numbers(_WEIGHTS, float, config.loss.uniformity_weight)
  found = itertools.product(seeds, ratios, weights)
  return [Combination(ratio, weight, seed) for seed, ratio, weight in found]


def numbers(flag, kind: type, default: float) -> list[float]:
  """The numbers of a flag, each once; without the flag, the default."""
  if flag.value is None:
    return [default]
  with contextlib.suppress(ValueError):
    if found := list(dict.fromkeys(map(kind, flag.value))):
      return found
  raise UserError(
    f"--{flag.name}={','.join(flag.value)} must be numbers with commas between "
    f"them, e.g. --{flag.name}={'0,1,2' if kind is int else '0.25,0.5'}."
  )


def prepare(
  config: ml_collections.ConfigDict,
  directory: pathlib.Path,
  runs: Sequence[Combination],
) -> list[int]:
  """Checks all runs, and what is in the directory already; writes nothing.

  Returns:
    The number of steps of each.

  Raises:
    UserError: of `run.prepare`; this is no sweep, or one of other settings.
  """
  from umae_jax import run as run_lib

  if config.task != "pretrain":
    raise UserError(
      f"config.task={config.task!r}: mask ratio and lambda are of 'pretrain'; "
      "use a configuration of that."
    )
  if (directory / workdir.CONFIG).exists():
    raise UserError(
      f"--workdir={directory} is that of a single run; use another --workdir."
    )
  steps, identities = [], {}
  for run in runs:
    config.update_from_flattened_dict(dict(zip(KEYS, run)))
    path = directory / run.name
    prepared = run_lib.prepare(config, str(path), allow_config_change=True)
    identities[path] = prepared.identity
    steps.append(prepared.plan.total_steps)
  for file in sorted(directory.glob(f"*/{workdir.CONFIG}")):
    path, free = file.parent, config_lib.FREE_KEYS
    if path not in identities:  # Of other values of the flags.
      free = (*free, *KEYS)
    identity = identities.get(path, prepared.identity)
    if changes := workdir.changed(path, identity, free):
      shown = "; ".join(map(str.strip, changes[:3]))
      raise UserError(
        f"--workdir={directory} holds {path.name} of another configuration "
        f"({shown}{'; ...' if changes[3:] else ''}); use another --workdir, or "
        "set this back."
      )
  return steps


def passed_on(argv: Sequence[str]) -> list[str]:
  """The arguments that are not of this program, but of each run."""
  own = flags.FlagValues()
  own.set_gnu_getopt(True)  # Or `--config FILE` would end the flags.
  for flag in (_WORKDIR, _RATIOS, _WEIGHTS, _SEEDS, _JOBS):
    own[flag.name] = flags.FLAGS[flag.name]
  return own(argv, known_only=True)[1:]


def sweep(
  config: ml_collections.ConfigDict,
  directory: pathlib.Path,
  steps: Mapping[Combination, int],
  arguments: Sequence[str],
) -> int:
  """Trains what is not finished yet.

  Args:
    config: of all runs, but for what they differ in.
    directory: of the sweep.
    steps: the runs, and how many steps each has when it is finished.
    arguments: of each run's command line.

  Returns:
    The exit code.
  """
  of = {run: figures(directory / run.name, n) for run, n in steps.items()}
  rows = [run._asdict() | of[run] for run in of if of[run]]
  for number, row in enumerate(rows, 1):
    print(f"[{number}/{len(of)}] {sweep_figures.line(row)} (before)")
  waiting = [run for run in of if not of[run]]
  ended = enumerate(train(directory, waiting, arguments), len(rows) + 1)
  try:
    for number, (run, seconds, left) in ended:
      print(f"[{number}/{len(of)}]", end=" ")
      path = directory / run.name
      if found := figures(path, steps[run]):
        rows.append(run._asdict() | found)
        left = f"; about {math.ceil(left / 60)} min left" if left else ""
        line = sweep_figures.line(rows[-1])
        print(f"{line} ({seconds:.0f} s){left}", flush=True)
        sweep_figures.write(rows, directory)
      else:
        lines = (path / LOG).read_text(errors="replace").splitlines()[-LINES:]
        lines = [f"{run.name} failed; the end of {path / LOG}:", *lines]
        print("\n    ".join(lines), flush=True)
  finally:
    if rows:
      print(f"\n{sweep_figures.table(rows)}\n", flush=True)
  if rows:
    sweep_figures.write(rows, directory, exact(config, rows))
    print(f"sweep.csv and sweep.png are in {directory}.", flush=True)
  failed = len(steps) - len(rows)
  again = f"{failed} of {len(steps)} runs failed; the same command tries again."
  return fail(again, EXIT_ERROR) if failed else 0


def train(directory, waiting, arguments):
  """Runs all that wait, some at a time; whatever happens, none stays behind.

  Yields:
    (run, its seconds, seconds left of all) of each that has ended.
  """
  waiting, running, times = list(waiting), {}, []
  try:
    while waiting or running:
      while waiting and len(running) < _JOBS.value:
        process = start(directory, waiting[0], arguments)
        running[process] = waiting.pop(0), time.monotonic()
      time.sleep(0.1)
      for process in [x for x in running if x.poll() is not None]:
        run, began = running.pop(process)
        times.append(time.monotonic() - began)
        left = (len(waiting) + len(running) / 2) / _JOBS.value
        yield run, times[-1], statistics.mean(times) * left
  finally:
    for process in running:
      process.terminate()  # It saves.
    for process in running:
      process.wait()


def start(directory, run, arguments) -> subprocess.Popen:
  """Starts a run, which Ctrl-C in the terminal does not reach."""
  path = directory / run.name
  path.mkdir(exist_ok=True)
  command = [sys.executable, "-m", "umae_jax.main", *arguments]
  command += [f"--config.{key}={x!r}" for key, x in zip(KEYS, run)]
  with (path / LOG).open("a") as log:
    return subprocess.Popen(
      [*command, f"--workdir={path}"],
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      process_group=0,
    )


def figures(path: pathlib.Path, steps: int) -> dict[str, Any]:
  """The summary of a run that is finished; else nothing."""
  with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
    summary = json.loads((path / workdir.SUMMARY).read_text())
    if summary["step"] == steps:
      return summary
  return {}


def exact(config, rows) -> Sequence[Any]:
  """Rows of `mask_ratio.on_digits`, if the ratio varies and these are digits.

  Its world has patches of 2 x 2 pixels.
  """
  ratios, seeds = (sorted({x[k] for x in rows}) for k in ("mask_ratio", "seed"))
  digits = config.data.name == "digits" and config.model.patch_size == 2
  if not digits or len(ratios) == 1:
    return ()
  from umae_jax.analysis import mask_ratio

  return mask_ratio.on_digits(ratios, seeds)


parse = functools.partial(command_line.parse, required=("config", "workdir"))

if __name__ == "__main__":
  app.run(main, flags_parser=parse)
