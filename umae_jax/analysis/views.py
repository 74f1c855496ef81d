"""Pictures of several runs beside one another.

As in `pictures`, a function returns (h, w, 3) uint8.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import matplotlib
from matplotlib import ticker
from matplotlib.figure import Figure
import numpy as np

from umae_jax.analysis import pictures, spectrum

RIGHT, WRONG = "#0072b2", "#d55e00"  # Frames; also told by a sign.
MOST_CLASSES = 20  # With a colour of their own: of more, the most frequent.
LOGGED = {  # What evaluations log, and its unit.
  "linear_accuracy": "linear probe, % right",
  "knn_accuracy": "nearest neighbours, % right",
  "effective_rank": "effective rank, whole images",
  "masked_effective_rank": "effective rank, masked images",
  "participation_ratio": "participation ratio, whole images",
  "reconstruction_loss": "reconstruction loss, mean square",
  "uniformity_loss": "uniformity loss, mean cosine²",
  "alignment_loss": "alignment loss, mean distance²",
}


def curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> np.ndarray:
  """Losses, accuracies and ranks of all runs over the steps, a panel each.

  Args:
    logs: `metrics.read_log`'s records by label. Training is a thin line,
      evaluation is thick, with dots; what no run has logged has no panel.
  """
  titles = {
    key: title
    for key, title in {"loss": "loss", **LOGGED}.items()
    if any(key in x for log in logs.values() for x in log)
  }
  figure, panels = _panels(
    titles.values() or ["nothing logged yet"], (3.8, 2.7)
  )
  for axes, key in zip(panels, titles):
    factor = 100 if key.endswith("accuracy") else 1
    for (label, log), color in zip(logs.items(), pictures.colors()):
      for split, style in (
        ("train", {"linewidth": 0.8, "alpha": 0.5}),
        ("eval", {"marker": "o", "markersize": 3.5, "label": label}),
      ):
        chosen = [x for x in log if x["split"] == split and key in x]
        y = factor * np.array([x[key] for x in chosen], float)
        y[~np.isfinite(y)] = np.nan
        axes.plot([x["step"] for x in chosen], y, color=color, **style)
    if key.endswith("loss"):
      axes.set_yscale("log")
      axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
      axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%.3g"))
      axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  return _finished(figure, panels)


def ranks_by_layer(
  singular_values: Mapping[str, Mapping[str, Sequence[np.ndarray]]],
) -> np.ndarray:
  """Effective rank and participation ratio over the layers.

  Args:
    singular_values: {label: {"whole" or "masked": depth + 1 arrays (k,)}}, the
      last of them after the final LayerNorm.
  """
  measures = spectrum.effective_rank, spectrum.participation_ratio
  titles = ["effective rank", "participation ratio"]
  figure, panels = _panels(titles, (4.6, 3.2))
  for axes, measure in zip(panels, measures):
    for (label, kinds), color in zip(
      singular_values.items(), pictures.colors()
    ):
      for kind, layers in kinds.items():
        y, line = [measure(x) for x in layers], "-" if kind == "whole" else "--"
        x = np.arange(1, len(y) + 1)
        axes.plot(x, y, color=color, linestyle=line, label=f"{label}, {kind}")
        axes.plot(x[:-1], y[:-1], "o", color=color, markersize=3.5)
        axes.plot(x[-1], y[-1], "D", color=color, markersize=5)
    axes.set_xlabel("after block (◆: after the final LayerNorm)")
    axes.set_ylabel("dimensions")
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(1, len(x), math.ceil(len(x) / 13)))
  return _finished(figure, panels, columns=2)


def pair_cosines(
  cosines: Mapping[str, Mapping[str, np.ndarray]],
) -> np.ndarray:
  """Densities of {label: {kind of pair: (n,) in [-1, 1]}}, a panel a label."""
  figure, panels = _panels(cosines, (4.2, 2.8), sharex=True, sharey=True)
  lowest = min(x.min() for kinds in cosines.values() for x in kinds.values())
  bins = np.linspace(min(lowest, 0.5), 1, 41)
  for axes, kinds in zip(panels, cosines.values()):
    for (kind, x), color in zip(kinds.items(), pictures.colors()):
      style = {"bins": bins, "density": True, "color": color}
      axes.hist(x, histtype="stepfilled", alpha=0.15, **style)
      axes.hist(x, histtype="step", linewidth=1.4, label=kind, **style)
    axes.set_xlabel("cosine of the two class tokens")
    axes.set_ylabel("density")
  return _finished(figure, panels)


def scatters(
  points: Mapping[str, np.ndarray],
  labels: np.ndarray,
  class_names: Sequence[str],
) -> np.ndarray:
  """Points {label: (N, 2)}, a panel each, coloured by their class.

  Of more than 20 classes, the 10 most frequent have a colour, others are grey.
  """
  classes, counts = np.unique(labels, return_counts=True)
  if len(classes) > MOST_CLASSES:
    classes = classes[np.argsort(-counts, kind="stable")[:10]]
  palette = matplotlib.colormaps["tab10" if len(classes) <= 10 else "tab20"]
  figure, panels = _panels(points, (4.6, 4.4))
  for axes, xy in zip(panels, points.values()):
    rest = xy[~np.isin(labels, classes)]
    if len(rest):
      axes.scatter(*rest.T, s=8, color="0.8", linewidth=0, label="others")
    for color, which in enumerate(classes):
      name, xy_of_class = class_names[which][:16], xy[labels == which]
      style = {"color": palette(color), "linewidth": 0, "s": 12}
      axes.scatter(*xy_of_class.T, label=name, **style)
    axes.set(xticks=[], yticks=[])
  return _finished(figure, panels, columns=5, markerscale=2)


def similarity_map(matrix: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
  """Similarities of all layers of all runs with one another.

  Args:
    matrix: (n, n), shown from 0 to 1.
    sizes: layers by label, n in all; the last of each is the final LayerNorm.
  """
  side = float(np.clip(0.3 * len(matrix), 3.6, 8))
  size = (side + 2.4, side + 1)
  figure = Figure(size, dpi=pictures.DPI, layout="constrained")
  axes = figure.subplots()
  image = axes.imshow(matrix, "viridis", vmin=0, vmax=1)
  figure.colorbar(image, fraction=0.045, label="linear CKA (1 = alike)")
  for edge in np.cumsum(list(sizes.values()))[:-1] - 0.5:
    axes.axhline(edge, color="white", linewidth=2)
    axes.axvline(edge, color="white", linewidth=2)
  ticks = [str(i) for n in sizes.values() for i in (*range(1, n), "norm")]
  points = min(8, 60 * side / len(matrix))
  axes.set_xticks(range(len(ticks)), ticks, fontsize=points, rotation=90)
  axes.set_yticks(range(len(ticks)), ticks, fontsize=points)
  names = list(sizes)
  axes.set_xlabel(f"after block: {'  |  '.join(names)}", fontsize=8)
  axes.set_ylabel(f"after block: {'  |  '.join(names[::-1])}", fontsize=8)
  return pictures.rendered(figure)


def mosaic(
  columns: Sequence[Sequence[np.ndarray]],
  heads: Sequence[str],
  groups: Mapping[str, int],
  notes: Sequence[Sequence[str]] = (),
  right: Sequence[Sequence[bool | None]] = (),
) -> np.ndarray:
  """Images in columns, with headings.

  Args:
    columns: of images (H, W, C) in [0, 1], all of one size.
    heads: heading of each column.
    groups: heading over several columns, and how many; in order, of them all.
    notes: texts beneath the images of each column, if any.
    right: whether an image's frame is that of a right or a wrong one, likewise;
      None: it has none.
  """
  height, width = columns[0][0].shape[:2]
  w, gap, apart, top = 0.95, 0.07, 0.3, 0.62  # Inches.
  h, pitch = w * height / width, w * height / width + (0.27 if notes else gap)
  left = np.arange(len(columns)) * (w + gap) + apart / 2
  left += np.repeat(apart * np.arange(len(groups)), list(groups.values()))
  size = (left[-1] + w + apart / 2, top + len(columns[0]) * pitch + 0.05)
  figure = Figure(size, dpi=pictures.DPI)

  def write(x, y, text, largest, room, **style):
    fitting = 72 * room / (0.65 * len(text) + 1)  # Points.
    style |= {"ha": "center", "fontsize": min(largest, fitting)}
    figure.text(x / size[0], 1 - y / size[1], text, **style)

  for c, images in enumerate(columns):
    middle = left[c] + w / 2
    write(middle, top - 0.08, heads[c], 8, w)
    for row, image in enumerate(images):
      bottom = top + row * pitch + h
      place = (left[c], size[1] - bottom, w, h)
      axes = figure.add_axes(np.divide(place, (*size, *size)))
      smooth = "antialiased" if width > 48 else "nearest"
      axes.imshow(pictures.colored(image[None])[0], interpolation=smooth)
      axes.set(xticks=[], yticks=[])
      frame = right[c][row] if right else None
      axes.spines[:].set_visible(frame is not None)
      axes.spines[:].set(color=RIGHT if frame else WRONG, linewidth=3)
      if notes:
        write(middle, bottom + 0.17, notes[c][row], 7, w)
  first = 0
  for text, count in groups.items():
    begin, end = left[first], left[first + count - 1] + w
    room = end - begin + 0.7 * apart
    write((begin + end) / 2, 0.25, text, 10, room, weight="bold")
    first += count
  return pictures.rendered(figure)


def heat(weights: np.ndarray, image: np.ndarray) -> np.ndarray:
  """Weights (rows, columns) of patches over an image (H, W, C) in [0, 1].

  Coloured from 0 (black) to the largest weight (yellow), mixed with the image
  in grey.

  Returns:
    (H, W, 3) in [0, 1].
  """
  side = image.shape[0] // weights.shape[0]
  share = weights / max(weights.max(), np.finfo(np.float32).tiny)
  colors = matplotlib.colormaps["inferno"](share)[..., :3]
  colors = colors.repeat(side, axis=0).repeat(side, axis=1)
  return 0.75 * colors + 0.25 * image.mean(-1, keepdims=True)


def _panels(titles, size, **options):
  """A figure, and a panel for each title: at most three beside one another."""
  columns = min(3, len(titles))
  rows = math.ceil(len(titles) / columns)
  size = (size[0] * columns, size[1] * rows + 0.4)
  figure = Figure(size, dpi=pictures.DPI, layout="constrained")
  figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
  grid = figure.subplots(rows, columns, squeeze=False, **options).ravel()
  for axes, title in zip(grid, titles):
    axes.set_title(title, fontsize=10)
    pictures.plain(axes)
  for axes in grid[len(titles) :]:
    axes.set_axis_off()
  return figure, grid[: len(titles)]


def _finished(figure, panels, columns=3, **style) -> np.ndarray:
  """Draws it with one legend, above all."""
  place = {"loc": "outside upper center", "ncols": columns, "frameon": False}
  names = panels[0].get_legend_handles_labels()
  figure.legend(*names, **place, **style)
  return pictures.rendered(figure)
