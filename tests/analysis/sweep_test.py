"""`python -m umae_jax.analysis.sweep` as people use it: real runs."""

import csv
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time

import matplotlib.image
import pytest

from umae_jax import UserError, workdir
from umae_jax.analysis import sweep

pytestmark = pytest.mark.slow  # Real runs, one after the other.

REPOSITORY = pathlib.Path(__file__).parents[2]
SMALL = [
  "--config=configs/digits.py:smoke",
  "--config.model.depth=1",
  "--config.model.decoder_depth=1",
]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """Starts a sweep in a process of its own, on one device."""
  variables = {
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }

  def start(*flags):
    # A shell's background job ignores Ctrl-C, and would hand that down.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
      [sys.executable, "-m", "umae_jax.analysis.sweep", *map(str, flags)],
      env=os.environ | variables,
      cwd=REPOSITORY,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      process_group=0,
    )

  return start


@pytest.fixture(scope="module")
def finish(start):
  """Runs a sweep to its end: (exit code, lines of output, errors)."""

  def finish(*flags):
    process = start(*flags)
    output, errors = process.communicate(timeout=600)
    return process.returncode, output.splitlines(), errors

  return finish


@pytest.fixture(scope="module")
def failed(finish, tmp_path_factory):
  """Two runs, the first in a locked directory: (sweep's one, its result)."""
  directory = tmp_path_factory.mktemp("sweep")
  with workdir.lock(directory / "ratio0.5-weight0-seed0"):
    result = finish(
      *SMALL, f"--workdir={directory}", "--weight=0,0.01", "--jobs=2"
    )
  return directory, result


@pytest.fixture(scope="module")
def finished(finish, failed):
  """The run of before and another seed: (directory, flags, result)."""
  directory, _ = failed
  # A path of its own for --config, and flags in two words.
  flags = ["--workdir", directory, "--weight=0.01", "--seeds", "0,1"]
  flags = ["--config", SMALL[0].partition("=")[2], *SMALL[1:], *flags]
  return directory, flags, finish(*flags)


def read_csv(directory):
  with (directory / "sweep.csv").open() as file:
    return list(csv.DictReader(file))


def test_a_run_that_fails_does_not_stop_the_others(failed):
  directory, (code, lines, errors) = failed
  assert code == 1, errors
  assert "1 of 2 runs failed" in errors
  text = "\n".join(lines)
  assert "[1/2] ratio0.5-weight0-seed0 failed" in text
  assert "in use by another process" in text
  (done,) = [x for x in lines if x.startswith("[2/2]")]
  assert done.startswith("[2/2] ratio 0.5 weight 0.01 seed 0: linear 0.")
  assert len(read_csv(directory)) == 1
  assert (directory / "sweep.png").exists()


def test_table_and_file_are_what_the_summaries_say(finished):
  directory, _, (code, lines, errors) = finished
  assert code == 0, errors
  runs = [directory / f"ratio0.5-weight0.01-seed{seed}" for seed in (0, 1)]
  summaries = [json.loads((x / "summary.json").read_text()) for x in runs]
  assert summaries[0] != summaries[1]
  for row, summary, seed in zip(read_csv(directory), summaries, "01"):
    assert row.pop("seed") == seed
    assert float(row.pop("mask_ratio")) == 0.5
    assert float(row.pop("uniformity_weight")) == 0.01
    assert {key: float(x) for key, x in row.items()} == summary
  configs = [json.loads((x / "config.json").read_text()) for x in runs]
  assert [x["seed"] for x in configs] == [0, 1]
  assert {x["loss.uniformity_weight"] for x in configs} == {0.01}
  assert {x["model.depth"] for x in configs} == {1}  # Passed on.
  (line,) = [x for x in lines if x.startswith("       0.5    0.01      2  ")]
  for key, form in (("knn_accuracy", ".3f"), ("effective_rank", ".1f")):
    a, b = (summary[key] for summary in summaries)
    deviation = abs(a - b) / 2**0.5  # Of two values, ddof = 1.
    assert f"  {(a + b) / 2:{form}} +- {deviation:{form}}  " in line
    assert deviation == pytest.approx(statistics.stdev((a, b)))
  assert lines[0].startswith("[1/2]") and lines[0].endswith("(before)")


def test_a_finished_sweep_trains_nothing(finished, finish):
  directory, flags, (_, lines, _) = finished
  names = ["sweep.csv", "*/summary.json", "*/log.txt", "*/metrics.jsonl"]
  files = [path for name in names for path in directory.glob(name)]
  before = {x: x.read_bytes() for x in files}
  times = [x.stat().st_mtime_ns for x in files if x.name == "log.txt"]
  code, again, errors = finish(*flags)
  assert code == 0, errors
  assert {x: x.read_bytes() for x in files} == before
  assert times == [x.stat().st_mtime_ns for x in files if x.name == "log.txt"]
  assert all(x.endswith("(before)") for x in again[:2])
  assert again[2:] == lines[2:]  # The table.


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--seeds=a"], "--seeds=a must be numbers with commas"),
    (["--mask_ratio=0.5,1.5"], "config.loss.mask_ratio=1.5 leaves 0 of 16"),
    (["--jobs=0"], "jobs"),
  ],
)
def test_wrong_usage_is_told_in_a_line(finish, tmp_path, flags, message):
  path = tmp_path / "sweep"
  code, lines, errors = finish(*SMALL, f"--workdir={path}", *flags)
  assert (code, lines) == (2, []), errors
  assert message in errors and len(errors.splitlines()) == 1
  assert not path.exists()


def test_a_workdir_is_needed(finish):
  code, lines, errors = finish(*SMALL)
  assert (code, lines) == (2, [])
  assert "--workdir is missing" in errors and len(errors.splitlines()) == 1


RUN = sweep.Combination(0.5, 0.01, 0)


@pytest.mark.parametrize(
  "key, value, run, message",
  [
    (None, None, RUN._replace(uniformity_weight=-1.0), "uniformity_weight=-1"),
    (None, None, RUN._replace(seed=-1), "config.seed=-1 must be 0 or more"),
    ("task", "features", RUN, "are of 'pretrain'"),
    ("num_epochs", 2.0, RUN, "config.num_epochs: 1.0 there, 2.0 now"),
    ("num_epochs", 2.0, RUN._replace(seed=7), "num_epochs: 1.0 there, 2.0 now"),
  ],
)
def test_what_is_no_sweep_is_refused(
  finished, load_config, key, value, run, message
):
  directory = finished[0]
  config = load_config("digits", "smoke")
  config.model.update(depth=1, decoder_depth=1)
  assert (
    sweep.prepare(config, directory, [RUN, RUN._replace(seed=5)]) == [21] * 2
  )
  if key:
    config[key] = value
  before = sorted(directory.rglob("*"))
  with pytest.raises(UserError, match=message) as told:
    sweep.prepare(config, directory, [run])
  assert "\n" not in str(told.value)
  assert sorted(directory.rglob("*")) == before


def test_a_run_under_the_name_of_another_is_refused(
  finished, load_config, tmp_path
):
  config = load_config("digits", "smoke")
  config.model.update(depth=1, decoder_depth=1)
  other = RUN._replace(seed=5)
  shutil.copytree(finished[0] / RUN.name, tmp_path / other.name)
  with pytest.raises(UserError, match=r"config\.seed: 0 there, 5 now"):
    sweep.prepare(config, tmp_path, [other])


def test_the_directory_of_a_run_is_refused(finished, load_config):
  config = load_config("digits", "smoke")
  with pytest.raises(UserError, match="that of a single run"):
    sweep.prepare(config, finished[0] / RUN.name, [RUN])


def test_a_summary_of_fewer_steps_or_of_nothing_is_no_result(tmp_path):
  assert sweep.figures(tmp_path, 21) == {}
  file = tmp_path / "summary.json"
  for text, found in [
    ('{"step": 21}', {"step": 21}),
    ('{"step": 20}', {}),
    ('{"step"', {}),
    ("[]", {}),
  ]:
    file.write_text(text)
    assert sweep.figures(tmp_path, 21) == found


def test_names_tell_runs_apart():
  runs = [
    sweep.Combination(0.25, 0.0, 1),
    sweep.Combination(0.25, 1e-7, 1),
    sweep.Combination(0.2500000001, 0.0, 1),
  ]
  assert runs[0].name == "ratio0.25-weight0-seed1"
  assert len({run.name for run in runs}) == 3


def test_exact_curves_are_of_digits_and_several_ratios(load_config):
  config = load_config("digits", "smoke")
  rows = [{"mask_ratio": x, "seed": 3} for x in (0.75, 0.5, 0.5)]
  found = sweep.exact(config, rows)
  assert [(x.mask_ratio, x.seed) for x in found] == [(0.5, 3), (0.75, 3)]
  assert sweep.exact(config, rows[1:]) == ()
  config.model.patch_size = 4
  assert sweep.exact(config, rows) == ()


def ctrl_c(process):
  """As a terminal does: to the whole group."""
  os.killpg(process.pid, signal.SIGINT)


def trains(log, word):
  """Whether the run tells of steps since it said that word."""
  text = log.read_text() if log.exists() else ""
  return "img/s" in text.partition(word)[2]


@pytest.mark.slow
def test_stopped_and_going_on(start, finish, tmp_path):
  """Runs are asked to stop, save, and go on; exact curves are beside."""
  flags = [
    *SMALL,
    f"--workdir={tmp_path}",
    "--mask_ratio=0.25,0.75",
    "--jobs=2",
    "--config.num_epochs=100",
  ]
  logs = [tmp_path / f"ratio{x}-weight0.01-seed0/log.txt" for x in (0.25, 0.75)]
  for stop, word in (
    (ctrl_c, "afresh"),
    (subprocess.Popen.terminate, "resuming"),
  ):
    process = start(*flags)
    while not all(trains(x, word) for x in logs):
      assert process.poll() is None
      time.sleep(0.05)
    stop(process)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "run the same command again" in errors
    for log in logs:
      with workdir.lock(log.parent):  # It is not in use any more.
        assert not (log.parent / "summary.json").exists()
  code, lines, errors = finish(*flags)
  assert code == 0, errors
  assert [x[:5] for x in lines[:2]] == ["[1/2]", "[2/2]"]
  for log in logs:
    text = log.read_text()
    assert text.count("starting afresh") == 1 and text.count("resuming") == 2
    assert "Traceback" not in text
  shape = matplotlib.image.imread(tmp_path / "sweep.png").shape
  assert shape[1] == 4 * 510  # Of four columns, as there are exact panels.
