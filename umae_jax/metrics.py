"""What a run tells: a log of JSON lines, TensorBoard, and a progress bar."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import datetime
import itertools
import json
import math
import os
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm

from umae_jax import UserError, storage

_UPLOAD_SECONDS = 30.0  # Between uploads to a bucket, besides `commit`.
# What the progress bar shows, if logged: key of the log, short name, format.
_SHOWN = (
  ("loss", "loss", "{:.4f}"),
  ("reconstruction_loss", "rec", "{:.4f}"),
  ("uniformity_loss", "unif", "{:.2e}"),
  ("effective_dimension", "dim", "{:.1f}"),
  ("learning_rate", "lr", "{:.2e}"),
)


class MetricsLog:
  """`metrics.jsonl` and TensorBoard's files in a work directory.

  A line of `metrics.jsonl` is one JSON object: "step" (int), "split" ("train"
  or "eval"), then the scalars. Keys that start with "time/" are measured times;
  all else is a function of the config, so that a run killed and resumed writes
  the log of an uninterrupted one. NaN and infinities, which JSON lacks, are the
  strings "nan", "inf", "-inf"; `read_log` makes floats of them.

  Args:
    workdir: made if absent.
    resume_step: the step of the checkpoint that the run continues from; later
      lines, and a line cut in two, are dropped. None: a new log; one that is
      there already is kept as metrics.1.jsonl, metrics.2.jsonl, ...
    active: False writes nothing; for all processes but the first.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    resume_step: int | None = None,
    active: bool = True,
  ):
    self._active = active
    if not active:
      return
    workdir = storage.path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "metrics.jsonl"
    _keep_until(path, resume_step)
    self._folder = storage.Growing(workdir)
    local = self._folder.local / path.name
    if local != path and path.exists():
      local.write_bytes(path.read_bytes())
    self._file = local.open("a", encoding="utf-8")
    self._tensorboard = tensorboardX.SummaryWriter(
      str(local.with_name("tensorboard")),
      purge_step=(resume_step or 0) + 1,
    )

  def write(
    self, step: int, split: str, scalars: Mapping[str, float | int]
  ) -> None:
    """Appends one line, and flushes it.

    Args:
      step: number of updates done.
      split: "train" or "eval".
      scalars: numbers, or arrays of one element, by name.
    """
    if not self._active:
      return
    values = {name: np.asarray(x).item() for name, x in scalars.items()}
    line = {"step": int(step), "split": split} | {
      name: x if math.isfinite(x) else str(x) for name, x in values.items()
    }
    self._file.write(json.dumps(line, allow_nan=False) + "\n")
    self._file.flush()
    self._folder.upload_every(_UPLOAD_SECONDS)
    for name, x in values.items():
      self._tensorboard.add_scalar(f"{split}/{name}", x, step)

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Shows an (H, W, 3) uint8 image in TensorBoard."""
    if self._active:
      self._tensorboard.add_image(name, image, step, dataformats="HWC")

  def commit(self) -> None:
    """Brings all to the bucket, if it is one; else the log is complete."""
    if self._active:
      self._folder.upload()

  def close(self) -> None:
    """Writes out what TensorBoard buffers; the log is complete already."""
    if self._active:
      self._file.close()
      self._tensorboard.close()
      self._folder.close()


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Returns the complete lines of a `metrics.jsonl`, in order.

  A last line that was cut in two by a kill is left out.
  """
  records = [record for _, record in _complete_lines(storage.path(path))]
  return [
    {
      name: float(x) if isinstance(x, str) and name != "split" else x
      for name, x in record.items()
    }
    for record in records
  ]


def _complete_lines(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
  """The lines that end, and what they hold; UserError if one is no record."""
  lines = path.read_text(encoding="utf-8").splitlines(True)
  records = []
  for number, line in enumerate(lines, 1):
    if not line.endswith("\n"):
      break
    try:
      record = json.loads(line)
      records.append((line, record | {"step": int(record["step"])}))
    except (ValueError, TypeError, KeyError) as error:
      raise UserError(
        f"{path}: line {number} is not one of a log; mend or remove it."
      ) from error
  return records


def _keep_until(path: pathlib.Path, step: int | None) -> None:
  """Drops the lines of later steps, atomically; None: sets the log aside."""
  if not path.exists():
    return
  if step is None:
    numbers = itertools.count(1)
    names = (path.with_name(f"metrics.{n}.jsonl") for n in numbers)
    path.replace(next(name for name in names if not name.exists()))
    return
  kept = [x for x, record in _complete_lines(path) if record["step"] <= step]
  text = "".join(kept)
  storage.write_file(path, lambda file: file.write(text.encode()))


class Progress:
  """Where a run stands: a bar on a terminal, else a line every few seconds.

  Args:
    total_steps: of the whole run.
    start_step: steps already done, by an earlier process.
    batch_size: images per step, of all processes together.
    active: False shows nothing, and still measures.
    seconds_between_lines: at least so many, where there is no terminal.
  """

  def __init__(
    self,
    total_steps: int,
    start_step: int,
    batch_size: int,
    *,
    active: bool = True,
    seconds_between_lines: float = 5.0,
  ):
    self._total, self._step, self._batch = total_steps, start_step, batch_size
    self._active, self._gap = active, seconds_between_lines
    self._begin = self._last = time.monotonic()
    self._paused = 0.0  # Seconds, since the last update.
    self._last_line = -math.inf
    self._bar = None
    if active and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        initial=start_step, total=total_steps, dynamic_ncols=True, leave=True
      )

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Its block (evaluation, saving) does not count into images per second."""
    begin = time.monotonic()
    try:
      yield
    finally:
      self._paused += time.monotonic() - begin

  def update(self, step: int, scalars: Mapping[str, float]) -> dict[str, float]:
    """Shows that `step` steps are done.

    Args:
      step: number of updates done, by earlier processes as well.
      scalars: as logged; the few that matter most are shown.

    Returns:
      For the log: "time/images_per_second" since the last update, pauses
      excluded; "time/elapsed_s" of this process; "time/remaining_s", at the
      rate since the last update.
    """
    now = time.monotonic()
    busy = max(now - self._last - self._paused, 1e-9)
    rate = (step - self._step) / busy  # Steps per second.
    remaining = (self._total - step) / rate if rate > 0 else math.inf
    self._step, self._last, self._paused = step, now, 0.0
    times = {
      "time/images_per_second": rate * self._batch,
      "time/elapsed_s": now - self._begin,
      "time/remaining_s": remaining,
    }
    due = now - self._last_line >= self._gap or step >= self._total
    if self._active and (self._bar or due):
      self._last_line = now
      self._show(scalars, times)
    return times

  def _show(
    self, scalars: Mapping[str, float], times: Mapping[str, float]
  ) -> None:
    shown = [
      f"{short} {form.format(float(scalars[name]))}"
      for name, short, form in _SHOWN
      if name in scalars
    ]
    rate = f"{times['time/images_per_second']:,.0f} img/s"
    if self._bar:
      self._bar.n = self._step
      self._bar.set_postfix_str(" | ".join([rate, *shown]))
      return
    width = len(str(self._total))
    elapsed = _clock(times["time/elapsed_s"])
    fields = [
      f"step {self._step:{width}d}/{self._total}",
      f"{100 * self._step / self._total:3.0f} %",
      f"{elapsed} < {_clock(times['time/remaining_s'])}",
      rate,
    ]
    print(" | ".join(fields + shown), file=sys.stderr, flush=True)

  def close(self) -> None:
    """Leaves the bar as it stands."""
    if self._bar:
      self._bar.close()


def _clock(seconds: float) -> str:
  """`1:02:03`, or `?` for for ever."""
  if not math.isfinite(seconds):
    return "?"
  return str(datetime.timedelta(seconds=round(seconds)))


def format_table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
  """Returns a plain text table, a line per row, under the header and a rule.

  Columns are aligned: to the right where every cell looks like a number.
  """
  table = [list(header), *(list(row) for row in rows)]
  columns = list(zip(*table, strict=True))
  widths = [max(map(len, column)) for column in columns]
  right = [len(c) > 1 and all(map(_is_number, c[1:])) for c in columns]

  def line(cells):
    return "  ".join(
      cell.rjust(width) if to_right else cell.ljust(width)
      for cell, width, to_right in zip(cells, widths, right)
    ).rstrip()

  rule = "  ".join("-" * width for width in widths)
  return "\n".join([line(table[0]), rule, *map(line, table[1:])])


def parameter_table(params: Mapping[str, Any]) -> str:
  """Numbers of parameters by module, two levels deep, and their sum."""
  counts = {}
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    name = "/".join(key.key for key in path[:2])
    counts[name] = counts.get(name, 0) + x.size
  rows = [(name, f"{count:,}") for name, count in counts.items()]
  rows.append(("total", f"{sum(counts.values()):,}"))
  return format_table(rows, ("parameters", "number"))


def _is_number(cell: str) -> bool:
  """True for `1,024`, `93.1 %`, `-1e-4` and nothing at all."""
  try:
    float(cell.replace(",", "").rstrip(" %") or "0")
  except ValueError:
    return False
  return True
