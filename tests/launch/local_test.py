"""local.sh: processes that fail, are stopped, killed and resumed."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]

# In place of python: ends as END<index> says, or by SIGTERM with 75.
PYTHON = """#!/usr/bin/env bash
[ "$1" != -c ] || exec "$PYTHON" "$@"
trap 'exit ${ON_TERM:-75}' TERM
echo "process $JAX_PROCESS_ID of $JAX_NUM_PROCESSES at" \\
  "$JAX_COORDINATOR_ADDRESS on $JAX_PLATFORMS, GPU $CUDA_VISIBLE_DEVICES: $*"
end=END$JAX_PROCESS_ID
while [ "${!end:-0}" = stay ]; do sleep 0.05; done
exit "${!end:-0}"
"""


@pytest.fixture
def start(tmp_path):
  """Starts the launcher, with the real python or the one above."""
  started = []

  def start(*flags, real=False, **variables):
    (tmp_path / "bin").mkdir(exist_ok=True)
    python = tmp_path / "bin" / "python"
    python.unlink(missing_ok=True)
    if real:
      python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    else:
      python.write_text(PYTHON)
    python.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    settings = {"PATH": path, "PYTHON": sys.executable, "GRACE": "1"}
    settings |= {"LOGS": str(tmp_path / "logs")}
    started.append(
      subprocess.Popen(
        ["bash", "launch/local.sh", *map(str, flags)],
        cwd=REPOSITORY,
        env=os.environ | settings | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
    return started[-1]

  yield start
  for process in started:
    if process.poll() is None:
      process.terminate()
      process.communicate(timeout=300)


def children(process):
  """Ids of the processes that a launcher has started."""
  found = []
  for file in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      parent = int(file.read_text().rpartition(")")[2].split()[1])
      words = (file.parent / "cmdline").read_bytes().split(b"\0")
    except OSError:
      continue  # It has just ended.
    if parent == process.pid and b"umae_jax.main" in words:
      found.append(int(file.parent.name))
  return sorted(found)


def wait_for(process, condition):
  """Until it holds; fails with what was said."""
  end = time.monotonic() + 240
  while not condition():
    if process.poll() is not None or time.monotonic() > end:
      process.terminate()
      raise AssertionError(process.communicate(timeout=300))
    time.sleep(0.01)


def test_every_process_knows_its_peers(start, tmp_path):
  process = start("--config=c", PROCESSES="3", CUDA_VISIBLE_DEVICES="")
  output, errors = process.communicate(timeout=240)
  assert process.returncode == 0, errors
  [line] = output.splitlines()  # Of process 0 alone.
  port = line.split("localhost:")[1].split()[0]
  assert 1024 < int(port) < 65536
  assert line == (
    f"process 0 of 3 at localhost:{port} on cpu, GPU : "
    "-m umae_jax.main --multihost --config=c"
  )
  # Which the user has named, and may hold more.
  logs = [tmp_path / "logs" / f"process_{i}.log" for i in (1, 2)]
  assert all(path.exists() for path in logs)


def test_every_process_has_a_gpu_of_its_own(start, tmp_path):
  process = start("--config=c", PLATFORM="gpu", END1="3")
  output, errors = process.communicate(timeout=240)
  assert process.returncode == 3
  log = (tmp_path / "logs" / "process_1.log").read_text()
  assert "on cuda,cpu, GPU 0: -m" in output
  assert "on cuda,cpu, GPU 1: -m" in log
  assert log in errors  # What failed is shown.


@pytest.mark.parametrize(
  "ends, code",
  [
    (("0", "0", "0"), 0),
    (("75", "75", "75"), 75),
    (("75", "75", "1"), 1),
    (("75", "0", "75"), 75),
    (("1", "75", "75"), 1),
    (("stay", "2", "stay"), 2),
  ],
)
def test_the_exit_code_tells_what_happened(start, ends, code):
  variables = {f"END{index}": end for index, end in enumerate(ends)}
  process = start(PROCESSES="3", ON_TERM="0", **variables)
  _, errors = process.communicate(timeout=240)
  assert process.returncode == code, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_on_to_all(start, number):
  process = start(END0="stay", END1="stay")
  wait_for(process, lambda: len(children(process)) == 2)
  assert "process 0" in process.stdout.readline()
  time.sleep(0.3)  # Process 1 catches signals by now, too.
  process.send_signal(number)
  process.communicate(timeout=240)
  assert process.returncode == 75


def test_the_others_of_a_killed_process_are_ended(start):
  process = start(END0="stay", END1="stay", PROCESSES="3", END2="stay")
  wait_for(process, lambda: len(children(process)) == 3)
  pids = children(process)
  os.kill(pids[1], signal.SIGKILL)
  _, errors = process.communicate(timeout=240)
  assert process.returncode == 128 + signal.SIGKILL
  assert "process 1 ended with 137" in errors
  for pid in pids:
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)


@pytest.mark.parametrize(
  "setting", [{"PLATFORM": "tpu"}, {"PROCESSES": "0"}, {"PROCESSES": "two"}]
)
def test_wrong_settings_are_named(start, setting):
  process = start("--config=c", **setting)
  _, errors = process.communicate(timeout=240)
  assert process.returncode == 2
  [(name, value)] = setting.items()
  assert f"{name}={value} is n" in errors


LONGER = [
  "--config=configs/digits.py:smoke",
  "--config.model.depth=1",
  "--config.model.decoder_depth=1",
  "--config.num_epochs=6",
  "--config.evaluation.every_epochs=2",
  "--config.checkpoint.every_steps=7",
  "--config.log.every_steps=1",
]


def read_log(workdir):
  """The complete lines of the log, without what a clock measures."""
  file = workdir / "metrics.jsonl"
  lines = file.read_text().splitlines(True) if file.exists() else []
  return [
    {key: x for key, x in json.loads(line).items() if key[:5] != "time/"}
    for line in lines
    if line.endswith("\n")
  ]


def has_step(workdir, step):
  log = read_log(workdir)
  return bool(log) and log[-1]["step"] >= step


@pytest.mark.slow
def test_killed_and_stopped_runs_end_as_uninterrupted_ones(start, tmp_path):
  """Two real processes: one is killed, then the launcher is asked to stop."""
  cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
  cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

  def begin(name):
    return start(*LONGER, f"--workdir={tmp_path / name}", real=True, **cache)

  whole = begin("whole")
  _, errors = whole.communicate(timeout=500)
  assert whole.returncode == 0, errors
  workdir = tmp_path / "parts"

  killed = begin("parts")
  wait_for(killed, lambda: has_step(workdir, 17))
  os.kill(children(killed)[1], signal.SIGKILL)
  _, errors = killed.communicate(timeout=500)
  assert killed.returncode == 137, errors
  assert "process 1 ended with 137" in errors
  reached = read_log(workdir)[-1]["step"]

  stopped = begin("parts")
  wait_for(stopped, lambda: has_step(workdir, reached + 10))
  stopped.terminate()
  output, errors = stopped.communicate(timeout=500)
  assert stopped.returncode == 75, errors
  assert "resuming after step" in output

  last = begin("parts")
  output, errors = last.communicate(timeout=500)
  assert last.returncode == 0, errors
  assert "resuming after step" in output
  assert read_log(workdir) == read_log(tmp_path / "whole")
  assert len([x for x in read_log(workdir) if x["split"] == "train"]) == 126
  one, two = (
    json.loads((tmp_path / name / "summary.json").read_text())
    for name in ("whole", "parts")
  )
  times = {key for key in one if key.startswith("time/")}
  assert {k: x for k, x in one.items() if k not in times} == {
    k: x for k, x in two.items() if k not in times
  }
