"""Pictures to look at: reconstructions, singular spectra, curves of a run.

Each function returns an (h, w, 3) uint8 image, and also writes it as PNG if it
is given a path. Nothing here touches matplotlib's global state.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import os
from typing import Any

from matplotlib import image as mpl_image
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np

from umae_jax import storage
from umae_jax.analysis import spectrum as spectra

DPI = 150
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_COLUMNS = ("original", "visible", "reconstruction", "prediction")
_TILE = 160  # Smaller images are magnified to at least this width, in pixels.

_TOKEN_LOSSES = ("uniformity_loss", "alignment_loss")
# Panels of `curves`: title, and which names of the log they show.
_PANELS: tuple[tuple[str, Callable[[str], bool]], ...] = (
  ("Loss", lambda x: x.endswith("loss") and x not in _TOKEN_LOSSES),
  ("Losses of the class tokens", lambda x: x in _TOKEN_LOSSES),
  ("Accuracy", lambda x: x.endswith("accuracy")),
  (
    "Dimensions used by the features",
    lambda x: x.endswith(("effective_rank", "_dimension", "_ratio")),
  ),
  ("Learning rate", lambda x: x == "learning_rate"),
)


def write(image: np.ndarray, path: str | os.PathLike) -> None:
  """Writes an (h, w, 3) uint8 image as PNG, atomically."""
  storage.write_file(
    storage.path(path),
    lambda file: mpl_image.imsave(file, image, format="png"),
  )


def reconstructions(
  originals: np.ndarray,
  masked: np.ndarray,
  reconstructed: np.ndarray,
  path: str | os.PathLike | None = None,
) -> np.ndarray:
  """Four views of each image: original, visible, reconstruction, prediction.

  "Reconstruction" keeps the visible pixels and fills in the predicted ones;
  "prediction" is the model's answer everywhere. Small images are magnified
  without smoothing; many are set in several blocks side by side.

  Args:
    originals: (n, H, W, C), in [0, 1]; what is outside is clipped. Of C other
      than 1 and 3 the first channel is shown.
    masked: like `originals`, the removed pixels replaced by a grey: where it
      differs from the original, a pixel is taken as removed.
    reconstructed: like `originals`, the prediction.
    path: of the PNG, if it is to be written.

  Returns:
    (h, w, 3) uint8.
  """
  originals, masked, reconstructed = map(
    np.asarray, (originals, masked, reconstructed)
  )
  removed = (masked != originals).any(-1, keepdims=True)
  filled = np.where(removed, reconstructed, originals)
  views = [colored(x) for x in (originals, masked, filled, reconstructed)]
  rows = np.stack(views, axis=1)  # (n, 4, H, W, 3)
  factor = math.ceil(_TILE / rows.shape[3])
  rows = rows.repeat(factor, axis=2).repeat(factor, axis=3)
  # About three wide by two high: 4 b tiles by n / b, b blocks.
  blocks = max(1, round(math.sqrt(0.375 * len(rows))))
  canvas, left_edges = _tiled(rows, blocks)
  image = _labelled(canvas, left_edges, _COLUMNS * blocks, rows.shape[3])
  return finished(image, path)


def spectrum(
  singular_values: Mapping[str, np.ndarray],
  path: str | os.PathLike | None = None,
) -> np.ndarray:
  """Singular values over their number, each series divided by its largest.

  Args:
    singular_values: series by name, each (k,), descending.
    path: of the PNG, if it is to be written.

  Returns:
    (h, w, 3) uint8.
  """
  figure = Figure(figsize=(6.4, 4.2), dpi=DPI, layout="constrained")
  axes = figure.subplots()
  for (name, values), color in zip(singular_values.items(), colors()):
    values = np.asarray(values, np.float64)
    rank = spectra.effective_rank(values)
    share = values / values.max() if values.any() else values
    visible = np.where(share > 1e-7, share, np.nan)  # Below is round-off.
    label = f"{name}: effective rank {rank:.1f} of {len(values)}"
    number = np.arange(1, len(values) + 1)
    axes.plot(number, visible, color=color, label=label)
  axes.set_yscale("log")
  axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  axes.set_xlabel("number of the singular value")
  axes.set_ylabel("singular value / largest")
  axes.set_title("Spectrum of the features")
  axes.legend(frameon=False)
  plain(axes)
  return finished(rendered(figure), path)


def curves(
  records: Sequence[Mapping[str, Any]],
  path: str | os.PathLike | None = None,
) -> np.ndarray:
  """The log over the steps, in panels; a panel without data is left out.

  Args:
    records: as `metrics.read_log` returns them.
    path: of the PNG, if it is to be written.

  Returns:
    (h, w, 3) uint8.
  """
  series = _series(records)
  panels = []
  for title, wanted in _PANELS:
    chosen = {key: xy for key, xy in series.items() if wanted(key[1])}
    if chosen:
      panels.append((title, chosen))
  columns = 2 if len(panels) == 4 else min(3, max(1, len(panels)))
  rows = max(1, math.ceil(len(panels) / columns))
  figure = Figure(
    figsize=(4.4 * columns, 3.1 * rows), dpi=DPI, layout="constrained"
  )
  grid = figure.subplots(rows, columns, squeeze=False).ravel()
  figure.get_layout_engine().set(w_pad=0.08, h_pad=0.1)
  for axes, (title, chosen) in zip(grid, panels):
    _panel(axes, title, chosen)
  for axes in grid[len(panels) :]:
    axes.set_axis_off()
  if not panels:
    figure.text(0.5, 0.5, "nothing logged yet", ha="center")
  return finished(rendered(figure), path)


def _series(records) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
  """{(split, name): (steps, values)} of all numbers; infinity becomes NaN."""
  points = {}
  for record in records:
    for name, value in record.items():
      if isinstance(value, int | float) and name != "step":
        value = value if math.isfinite(value) else math.nan
        key = (record["split"], name)
        points.setdefault(key, []).append((record["step"], value))
  return {key: tuple(np.array(xy, float).T) for key, xy in points.items()}


def _panel(axes: Axes, title: str, chosen: Mapping) -> None:
  """One panel: training as thin lines, evaluations with dots on top."""
  for ((split, name), (x, y)), color in zip(chosen.items(), colors()):
    thin = split == "train" and len(x) > 1
    axes.plot(
      *(x, y),
      color=color,
      alpha=0.75 if thin else 1,
      linewidth=1 if thin else 1.6,
      marker=None if thin else "o",
      markersize=3.5,
      zorder=2 if thin else 3,
      label=f"{name.replace('_', ' ')} ({split})",
    )
  values = np.concatenate([y for _, y in chosen.values()])
  values = values[np.isfinite(values)]
  wide = len(values) and 0 < 10 * values.min() < values.max()
  if wide and title != "Learning rate":
    axes.set_yscale("log")
  else:
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
  axes.set_title(title)
  axes.set_xlabel("step")
  axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  axes.legend(frameon=False, fontsize=8)
  plain(axes)


def colors():
  """The colours of series, for ever; blue and orange come first."""
  while True:
    yield from _COLORS


def plain(axes: Axes) -> None:
  """Half a frame and a faint grid."""
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(alpha=0.25, linewidth=0.6)
  axes.set_axisbelow(True)


def colored(images: np.ndarray) -> np.ndarray:
  """(n, H, W, C) of [0, 1] to (n, H, W, 3) uint8."""
  if images.shape[-1] != 3:
    images = images[..., :1].repeat(3, axis=-1)
  images = np.nan_to_num(images.astype(np.float64))
  return np.round(255 * images.clip(0, 1)).astype(np.uint8)


def _tiled(rows: np.ndarray, blocks: int) -> tuple[np.ndarray, list[int]]:
  """Sets (n, 4, h, w, 3) tiles on white, rows running down block by block.

  Returns:
    The canvas, with room for labels on top, and each column's left edge.
  """
  n, columns, h, w, _ = rows.shape
  per_block = math.ceil(n / blocks)
  gap, margin = 6, 24
  top = 2 * margin
  width = columns * w + (columns - 1) * gap
  canvas = np.full(
    (
      top + per_block * (h + gap) - gap + margin,
      2 * margin + blocks * (width + margin) - margin,
      3,
    ),
    *(255, np.uint8),
  )
  left_edges = [
    margin + block * (width + margin) + column * (w + gap)
    for block in range(blocks)
    for column in range(columns)
  ]
  for i, tiles in enumerate(rows):
    block, row = divmod(i, per_block)
    y = top + row * (h + gap)
    for x, tile in zip(left_edges[block * columns :], tiles):
      canvas[y : y + h, x : x + w] = tile
  return canvas, left_edges


def _labelled(canvas, left_edges, labels, width) -> np.ndarray:
  """Writes a label over each column of tiles, each `width` pixels wide."""
  h, w, _ = canvas.shape
  figure = Figure(figsize=(w / DPI, h / DPI), dpi=DPI)
  figure.figimage(canvas, origin="upper")
  size = 7 if width < 220 else 9
  for x, label in zip(left_edges, labels):
    figure.text(
      (x + width / 2) / w, 1 - 26 / h, label, ha="center", fontsize=size
    )
  return rendered(figure)


def rendered(figure: Figure) -> np.ndarray:
  """Draws a figure; returns it as (h, w, 3) uint8."""
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def finished(image: np.ndarray, path: str | os.PathLike | None) -> np.ndarray:
  """The image, after writing it if there is a path."""
  if path is not None:
    write(image, path)
  return image
