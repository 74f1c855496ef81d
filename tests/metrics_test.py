import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from umae_jax import metrics

REPOSITORY = pathlib.Path(__file__).parents[1]


def write_log(workdir, steps, resume_step=None):
  log = metrics.MetricsLog(workdir, resume_step)
  for step in steps:
    log.write(step, "train", {"loss": 1 / step, "time/s": np.random.rand()})
    if step % 2 == 0:
      log.write(step, "eval", {"knn": step / 100})
  log.close()
  return workdir / "metrics.jsonl"


def without_times(records):
  return [
    {k: v for k, v in record.items() if not k.startswith("time/")}
    for record in records
  ]


def test_a_line_is_one_json_object(tmp_path):
  log = metrics.MetricsLog(tmp_path / "new" / "run")
  log.write(3, "train", {"loss": np.float32(0.5), "n": np.array([7])})
  path = tmp_path / "new" / "run" / "metrics.jsonl"
  line = '{"step": 3, "split": "train", "loss": 0.5, "n": 7}\n'
  assert path.read_text() == line  # Before closing: each line is flushed.
  log.close()


def strict_json(text):
  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  return json.loads(text, parse_constant=refuse)


def test_not_finite_numbers_remain_valid_json(tmp_path):
  log = metrics.MetricsLog(tmp_path)
  log.write(1, "train", {"a": math.nan, "b": -math.inf, "c": np.float32("inf")})
  log.close()
  path = tmp_path / "metrics.jsonl"
  strict_json(path.read_text())
  (record,) = metrics.read_log(path)
  assert math.isnan(record["a"])
  assert (record["b"], record["c"]) == (-math.inf, math.inf)


def test_resumed_log_equals_the_uninterrupted_one(tmp_path):
  want = metrics.read_log(write_log(tmp_path / "whole", range(1, 9)))
  path = write_log(tmp_path / "killed", range(1, 7))
  with path.open("a") as file:
    file.write('{"step": 7, "split": "tr')  # Killed while it wrote.
  write_log(tmp_path / "killed", range(5, 9), resume_step=4)
  assert without_times(metrics.read_log(path)) == without_times(want)
  assert len(want) == 8 + 4
  assert [p.name for p in path.parent.glob("metrics*")] == ["metrics.jsonl"]


def test_half_a_last_line_is_dropped_even_of_an_early_step(tmp_path):
  path = write_log(tmp_path, [1])
  with path.open("a") as file:
    file.write('{"step": 2, "split": "eval"}')  # Complete but for its end.
  assert len(metrics.read_log(path)) == 1
  write_log(tmp_path, [3], resume_step=2)
  assert [r["step"] for r in metrics.read_log(path)] == [1, 3]


def test_a_new_run_starts_a_new_log(tmp_path):
  write_log(tmp_path, [1, 2])
  assert len(metrics.read_log(write_log(tmp_path, [1]))) == 1


def test_rewriting_is_atomic(tmp_path, monkeypatch):
  path = write_log(tmp_path, range(1, 9))
  before = path.read_text()

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(pathlib.Path, "replace", killed)
  with pytest.raises(KeyboardInterrupt):
    metrics.MetricsLog(tmp_path, resume_step=4)
  assert path.read_text() == before


def test_sigkill_leaves_every_line_written(tmp_path):
  code = f"""
import os, signal
from umae_jax import metrics
log = metrics.MetricsLog({str(tmp_path)!r})
for step in range(100):
  log.write(step, "train", {{"loss": 1.0}})
os.kill(os.getpid(), signal.SIGKILL)
"""
  environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
  done = subprocess.run([sys.executable, "-c", code], env=environment)
  assert done.returncode == -signal.SIGKILL
  assert len(metrics.read_log(tmp_path / "metrics.jsonl")) == 100


def test_other_processes_write_nothing(tmp_path):
  log = metrics.MetricsLog(tmp_path / "run", active=False)
  log.write(1, "train", {"loss": 1.0})
  log.image(1, "x", np.zeros((4, 4, 3), np.uint8))
  log.close()
  assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_scalars_and_images(tmp_path):
  log = metrics.MetricsLog(tmp_path)
  log.write(5, "train", {"loss": 0.25})
  log.image(6, "pictures", np.full((4, 6, 3), 200, np.uint8))
  log.close()
  found = {}
  for event in read_events(tmp_path / "tensorboard"):
    for value in event.summary.value:
      found[value.tag] = (event.step, value)
  step, value = found["train/loss"]
  assert (step, value.simple_value) == (5, 0.25)
  step, value = found["pictures"]
  assert (step, value.image.height, value.image.width) == (6, 4, 6)


def test_tensorboard_forgets_what_the_resumed_run_repeats(tmp_path):
  write_log(tmp_path, range(1, 7))
  write_log(tmp_path, range(5, 9), resume_step=4)
  starts = [
    event.step
    for event in read_events(tmp_path / "tensorboard")
    if event.session_log.status == 1  # START: drop this step and later ones.
  ]
  assert starts[-1] == 5  # Before it, the new log purges from step 1.


def read_events(folder):
  """Events of all files; a record is length, CRC, bytes, CRC."""
  from tensorboardX.proto import event_pb2

  for path in sorted(folder.iterdir()):
    data, at = path.read_bytes(), 0
    while at < len(data):
      size = int.from_bytes(data[at : at + 8], "little")
      yield event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
      at += 12 + size + 4


# Progress.


@pytest.fixture
def clock(monkeypatch):
  """A clock that stands still; `clock[0] += seconds` moves it."""
  now = [100.0]
  monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
  return now


def test_rate_is_of_the_last_interval_without_pauses(clock):
  progress = metrics.Progress(100, 20, 32, active=False)
  clock[0] += 5
  progress.update(30, {})
  clock[0] += 2
  with progress.paused():
    clock[0] += 1000
  clock[0] += 2
  times = progress.update(40, {})
  assert times["time/images_per_second"] == pytest.approx(10 * 32 / 4)
  assert times["time/elapsed_s"] == pytest.approx(1009)
  assert times["time/remaining_s"] == pytest.approx(60 * 4 / 10)
  clock[0] += 5  # The pause belongs to the interval that it was in.
  times = progress.update(50, {})
  assert times["time/images_per_second"] == pytest.approx(10 * 32 / 5)


def test_the_line_says_where_the_run_stands(clock, capsys):
  progress = metrics.Progress(200, 0, 64)
  clock[0] += 10
  scalars = {
    "loss": 0.51234,
    "reconstruction_loss": np.float32(0.5),
    "uniformity_loss": 0.0123,
    "effective_dimension": 81.3,
    "learning_rate": 1.5e-4,
    "grad_norm": 3.0,
  }
  progress.update(50, scalars)
  assert capsys.readouterr().err == (
    "step  50/200 |  25 % | 0:00:10 < 0:00:30 | 320 img/s | loss 0.5123"
    " | rec 0.5000 | unif 1.23e-02 | dim 81.3 | lr 1.50e-04\n"
  )


def test_lines_are_few_but_first_and_last(clock, capsys):
  progress = metrics.Progress(100, 0, 1, seconds_between_lines=5)
  for step in range(1, 101):
    clock[0] += 0.1
    progress.update(step, {"loss": 1.0})
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 3
  assert lines[0].startswith("step   1/100")
  assert lines[-1].startswith("step 100/100")


def test_no_time_and_no_steps_divide_by_nothing(clock, capsys):
  progress = metrics.Progress(10, 5, 1)
  times = progress.update(5, {})
  assert times["time/images_per_second"] == 0
  assert times["time/remaining_s"] == math.inf
  assert "< ?" in capsys.readouterr().err


def test_a_terminal_has_a_bar(clock, capsys, monkeypatch):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
  progress = metrics.Progress(10, 5, 2)
  clock[0] += 1
  progress.update(8, {"loss": 0.5})
  assert progress._bar.initial == 5  # Its rate is of this process's steps.
  progress.close()
  bar = capsys.readouterr().err
  assert "8/10" in bar and "6 img/s | loss 0.5000" in bar
  assert "step" not in bar


def test_an_inactive_progress_is_silent(clock, capsys):
  progress = metrics.Progress(10, 0, 1, active=False)
  progress.update(10, {})
  progress.close()
  assert capsys.readouterr() == ("", "")


def test_table_is_aligned():
  rows = [("encoder", "1,024", "4.5 %"), ("head", "7", "100 %")]
  assert metrics.format_table(rows, ("part", "values", "share")) == (
    "part     values  share\n"
    "-------  ------  -----\n"
    "encoder   1,024  4.5 %\n"
    "head          7  100 %"
  )


def test_table_without_rows_is_its_header():
  assert metrics.format_table([], ("a", "bb")) == "a  bb\n-  --"
