"""A picture of a confusion matrix, for 2 to 1000 classes and more."""

from collections.abc import Sequence
import math
import os

from matplotlib import ticker
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
import numpy as np

from umae_jax.analysis import pictures

# Classes; with more there is no room for names, numbers, or one cell each.
MAX_NAMED, MAX_NUMBERED, MAX_SINGLE = 30, 15, 200
LETTERS = 22  # Shown of a class name.


def confusion(
  matrix: np.ndarray,
  class_names: Sequence[str],
  path: str | os.PathLike | None = None,
) -> np.ndarray:
  """Which class is taken for which, as shares of the true class's images.

  Up to 30 classes are named, and up to 15 have their shares written in. The
  colour goes by the root of the share, so that rare mistakes show, too. The
  row of a class without images is grey. Of more than 200 classes, some
  neighbours in the list (of 1000: ten) share a cell, the sum of theirs.

  Args:
    matrix: (classes, classes) counts, rows = true; see
      `evals.classification.confusion_matrix`.
    class_names: (classes,); long ones are cut.
    path: of the PNG, if it is to be written.

  Returns:
    (h, w, 3) uint8. The title holds the mean of the classes' accuracies.
  """
  matrix = np.asarray(matrix, np.float64)
  count, present = len(matrix), matrix.any(1)
  accuracies = np.diag(matrix)[present] / matrix[present].sum(1)
  mean = f"{100 * accuracies.mean():.1f} %" if present.any() else "none"
  block = math.ceil(count / 100) if count > MAX_SINGLE else 1
  for axis in (0, 1):
    matrix = np.add.reduceat(matrix, np.arange(0, count, block), axis)
  images = matrix.sum(1, keepdims=True)
  share = np.where(images > 0, matrix / np.maximum(images, 1), np.nan)
  end = block * len(matrix) - 0.5
  side = float(np.clip(0.42 * count, 3.5, 9))  # Inches: 1350 pixels at most.
  figure = Figure((side + 2.4, side + 1.4), dpi=150, layout="constrained")
  figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
  axes = figure.subplots()
  axes.set_facecolor("0.8")
  colors = axes.imshow(
    share, "Blues", PowerNorm(0.5, 0, 1), interpolation="nearest"
  )
  colors.set_extent((-0.5, end, end, -0.5))
  bar = figure.colorbar(colors, fraction=0.045, pad=0.02)
  bar.set_label("share of the true class")
  bar.set_ticks([0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1])
  bar.ax.minorticks_off()
  bar.ax.yaxis.set_major_formatter(ticker.PercentFormatter(1, 0))
  if count <= MAX_NAMED:
    names = [
      x if len(x) <= LETTERS else f"{x[: LETTERS - 1]}…" for x in class_names
    ]
    axes.set_xticks(range(count), names, rotation=90)
    axes.set_yticks(range(count), names)
  if count <= MAX_NUMBERED:
    style = {"ha": "center", "va": "center", "fontsize": 8}
    for (row, column), x in np.ndenumerate(share):
      if x > 0:
        text = f"{100 * x:.0f}" if x >= 0.01 else "<1"
        color = "white" if x > 0.35 else "black"
        axes.text(column, row, text, color=color, **style)
  axes.set_xlabel("predicted class")
  axes.set_ylabel("true class")
  cells = f" (a cell: {block} classes)" if block > 1 else ""
  axes.set_title(f"Mean accuracy of a class: {mean}{cells}")
  return pictures.finished(pictures.rendered(figure), path)
