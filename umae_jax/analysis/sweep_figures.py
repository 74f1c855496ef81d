"""Runs that differ in mask ratio, lambda and seed: file, table and picture.

A row is what is known of one run: {"mask_ratio": r, "uniformity_weight": w,
"seed": s}, and all figures of its summary.json.
"""

from collections.abc import Mapping, Sequence
import csv
import io
import math
import os
import pathlib
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from umae_jax import metrics, storage
from umae_jax.analysis import pictures

# Key of summary.json, name, format, unit.
FIGURES = (
  ("linear_accuracy", "linear accuracy", ".3f", "fraction of test images"),
  ("knn_accuracy", "kNN accuracy", ".3f", "fraction of test images"),
  ("effective_rank", "effective rank", ".1f", "dimensions"),
  ("participation_ratio", "participation ratio", ".1f", "dimensions"),
  ("alignment_loss", "alignment loss", ".3f", "squared distance, 0 to 4"),
)
EXACT = (  # Fields of the rows of `mask_ratio.on_digits`, likewise.
  ("labelling_error", "exact labelling error", "", "fraction of views"),
  ("residual", "exact residual spectrum", "", "sum of squared eigenvalues"),
  ("probe_error", "exact probe error", "", "fraction of test images"),
)
RATIO, WEIGHT = "mask_ratio", "uniformity_weight"
_AXES = {RATIO: "mask ratio", WEIGHT: "lambda"}


def line(row: Mapping[str, Any]) -> str:
  """A run in a line: which it is, and the figures looked at first."""
  start = f"ratio {row[RATIO]:g} weight {row[WEIGHT]:g} seed {row['seed']}: "
  known = [x for x in FIGURES[:3] if x[0] in row]
  shown = ", ".join(f"{name} {row[key]:{form}}" for key, name, form, _ in known)
  return start + shown.replace(" accuracy", "")


def write(
  rows: Sequence[Mapping[str, Any]],
  directory: str | os.PathLike,
  exact: Sequence[Any] = (),
) -> None:
  """Writes sweep.csv and sweep.png.

  Args:
    rows: at least one.
    directory: where.
    exact: rows of `mask_ratio.on_digits`, to be drawn beside.
  """
  rows = sorted(rows, key=lambda row: (row[RATIO], row[WEIGHT], row["seed"]))
  directory, file = pathlib.Path(directory), io.StringIO()
  names = dict.fromkeys(key for row in rows for key in row)
  lines = [names, *([row.get(name) for name in names] for row in rows)]
  csv.writer(file, lineterminator="\n").writerows(lines)
  text = file.getvalue().encode()
  storage.write_file(directory / "sweep.csv", lambda file: file.write(text))
  picture(rows, exact, directory / "sweep.png")


def grouped(
  rows: Sequence[Mapping[str, Any]], key: str
) -> dict[tuple[float, float], list[float]]:
  """{(mask ratio, lambda): a figure of all its seeds}, in ascending order."""
  groups = {}
  for row in sorted(rows, key=lambda row: (row[RATIO], row[WEIGHT])):
    if key in row:
      groups.setdefault((row[RATIO], row[WEIGHT]), []).append(row[key])
  return groups


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Mean +- standard deviation (ddof = 1) over the seeds, as text."""
  found = [x for x in FIGURES if any(x[0] in row for row in rows)]
  groups = [grouped(rows, key) for key, *_ in found]
  lines = []
  for ratio, weight in (seeds := grouped(rows, "seed")):
    values = [group.get((ratio, weight), []) for group in groups]
    cells = [spread(x, form) for x, (_, _, form, _) in zip(values, found)]
    number = len(seeds[ratio, weight])
    lines.append((f"{ratio:g}", f"{weight:g}", f"{number}", *cells))
  header = ("mask ratio", "lambda", "seeds", *(name for _, name, *_ in found))
  return metrics.format_table(lines, header)


def spread(values: Sequence[float], form: str) -> str:
  """`0.947 +- 0.003`; without the deviation if there is but one value."""
  if not values:
    return ""
  text = f"{np.mean(values):{form}}"
  return f"{text} +- {np.std(values, ddof=1):{form}}" if values[1:] else text


def picture(
  rows: Sequence[Mapping[str, Any]],
  exact: Sequence[Any] = (),
  path: str | os.PathLike | None = None,
) -> np.ndarray:
  """Figures over the mask ratio, or over lambda if only that varies.

  Points are runs, lines go through the means over seeds. There is a colour for
  each lambda (mask ratio, if over lambda); what is exact is black.

  Args:
    rows: at least one.
    exact: rows of `mask_ratio.on_digits`; for pictures over the mask ratio.
    path: of the PNG, if it is to be written.

  Returns:
    (h, w, 3) uint8.
  """
  values = {key: sorted({row[key] for row in rows}) for key in _AXES}
  over, other = RATIO, WEIGHT
  if len(values[RATIO]) == 1 < len(values[WEIGHT]):
    over, other = WEIGHT, RATIO
  shades = np.linspace(0, 0.85, len(values[other]))
  series = [
    (f"{_AXES[other]} {value:g}", color, [x for x in rows if x[other] == value])
    for value, color in zip(
      values[other], matplotlib.colormaps["viridis"](shades)
    )
  ]
  panels = [(*x, series) for x in FIGURES if any(x[0] in row for row in rows)]
  if exact:
    alone = [("exact", "black", [row._asdict() for row in exact])]
    panels += [(*x, alone) for x in EXACT]
  columns = min(4 if len(panels) > 6 else 3, len(panels))
  lines = math.ceil(len(panels) / columns)
  figure = Figure((3.4 * columns, 2.9 * lines + 0.5), 150, layout="constrained")
  figure.get_layout_engine().set(w_pad=0.08, h_pad=0.1)
  grid = figure.subplots(lines, columns, squeeze=False).ravel()
  for axes in grid[len(panels) :]:
    axes.set_axis_off()
  for axes, (key, name, _, unit, series) in zip(grid, panels):
    for label, color, chosen in series:
      points = sorted((x[over], x[key]) for x in chosen if key in x)
      x, y = np.array(points, float).reshape(-1, 2).T
      means = [y[x == at].mean() for at in np.unique(x)]
      axes.plot(x, y, "o", color=color, alpha=0.45, markersize=4, mew=0)
      axes.plot(np.unique(x), means, marker="_", color=color, label=label)
    axes.set_title(name)
    axes.set_ylabel(unit)
    _style(axes, over, values[over])
  handles, labels = grid[0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc="outside lower center", ncols=6, frameon=False
  )
  return pictures.finished(pictures.rendered(figure), path)


def _style(axes: Axes, over: str, ticks: Sequence[float]) -> None:
  if over == WEIGHT:
    smallest = min(x for x in ticks if x > 0)
    scale = {"linthresh": smallest} if ticks[0] == 0 else {}
    axes.set_xscale("symlog" if scale else "log", **scale)
  turned = 60 if len(ticks) > 5 else 0
  axes.set_xticks(ticks, [f"{x:g}" for x in ticks], rotation=turned)
  axes.minorticks_off()
  axes.set_xlabel(_AXES[over])
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(alpha=0.25, linewidth=0.6)
