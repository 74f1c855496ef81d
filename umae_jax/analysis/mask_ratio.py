r"""How the mask ratio decides, exactly: the mask graph of binarised digits.

  python -m umae_jax.analysis.mask_ratio runs/mask_ratio

Writes mask_ratio.csv, a line per ratio and seed, and mask_ratio.png into that
directory, and prints means and deviations over five seeds, in a minute or two.

High ratios leave views that tell little of the label (labelling error); low
ones leave a graph that falls into pieces, which few eigenvectors do not
describe (residual spectrum). The error of the spectral features is smallest
between.
"""

import argparse
from collections.abc import Sequence
import csv
import io
import pathlib
import sys
import time
from typing import NamedTuple

from matplotlib.figure import Figure
import numpy as np

from umae_jax import UserError, metrics, storage
from umae_jax.analysis import guarantees, mask_graph, pictures
from umae_jax.data import arrays

PATCH, THRESHOLD, MASKS = 2, 128, 60  # Pixels; of 255, 8 of the digits' 16.
RESIDUAL_AFTER, FEATURES = 32, 64
RATIOS = (0.94, 0.88, 0.81, 0.75, 0.62, 0.5, 0.38, 0.25, 0.12)


class Row(NamedTuple):
  """One mask ratio under one draw of the masks; all but the seed in [0, inf).

  Attributes:
    mask_ratio: removed patches / all.
    seed: of the masks.
    labelling_error: alpha of views; see `guarantees`, here and below.
    target_labelling_error: beta.
    disagreement: phi.
    residual: sum of squared eigenvalues beyond the first 32.
    next_eigenvalue: the 65th.
    view_error: of the least-squares classifier of views, 64 features.
    view_bound: what the guarantee allows it; 1 or more says nothing.
    probe_error: on test images, of their views' mean features.
  """

  mask_ratio: float
  seed: int
  labelling_error: float
  target_labelling_error: float
  disagreement: float
  residual: float
  next_eigenvalue: float
  view_error: float
  view_bound: float
  probe_error: float


def on_digits(
  ratios: Sequence[float] = RATIOS, seeds: Sequence[int] = range(5)
) -> list[Row]:
  """Rows of scikit-learn's digits, black or white, as 4 x 4 patches of 2 x 2.

  The graph is of all 1,797 images, and uses no label; the probe learns from
  1,400 and is tested on the other 397.

  Args:
    ratios: in (0, 1), rounded to sixteenths.
    seeds: of 60 masks each.

  Returns:
    Seed by seed, and within it the ratios.
  """
  splits = [arrays.open_digits(split) for split in ("train", "test")]
  images = np.concatenate([split.load() for split in splits])
  labels = np.concatenate([split.labels for split in splits])
  n, h, w, _ = images.shape
  grid = (n, h // PATCH, PATCH, w // PATCH, PATCH)
  patches = (images >= THRESHOLD).reshape(grid).swapaxes(2, 3)
  patches = patches.reshape(n, -1, PATCH * PATCH).astype(np.int64)
  train = splits[0].num_examples
  return [
    measure(patches, labels, train, ratio, seed)
    for seed in seeds
    for ratio in ratios
  ]


def measure(
  patches: np.ndarray, labels: np.ndarray, train: int, ratio: float, seed: int
) -> Row:
  """One row.

  Args:
    patches: (M, L, ...) integers, as of `mask_graph.from_images`.
    labels: (M,) int.
    train: the first so many images are learnt from, the others tested on.
    ratio: share of the L patches to remove, at least one, at most L - 1.
    seed: of the masks.
  """
  total = patches.shape[1]
  removed = min(max(round(ratio * total), 1), total - 1)
  rng = np.random.default_rng(seed)
  masks = mask_graph.draw_masks(rng, MASKS, total, removed)
  graph = mask_graph.from_images(patches, masks)
  found = mask_graph.spectrum(graph.joint, FEATURES)
  seen = guarantees.guarantee(graph, found, labels, FEATURES)
  features = mask_graph.features(graph.joint, found, FEATURES)
  images = len(labels) * (graph.views @ features)  # Means over its views.
  return Row(
    removed / total,
    seed,
    seen.labelling_error,
    seen.target_labelling_error,
    seen.disagreement,
    guarantees.residual(found.eigenvalues, RESIDUAL_AFTER),
    seen.next_eigenvalue,
    seen.view_error,
    seen.view_bound,
    least_squares_error(images, labels, train),
  )


def least_squares_error(
  features: np.ndarray, labels: np.ndarray, train: int
) -> float:
  """Test error in [0, 1] of one-hot least squares on (M, k) features.

  The first `train` rows are learnt from. The first spectral feature is
  constant: no intercept is needed.
  """
  one_hot = np.eye(labels.max() + 1)[labels]
  weights = np.linalg.lstsq(features[:train], one_hot[:train])[0]
  answers = (features[train:] @ weights).argmax(1)
  return float((answers != labels[train:]).mean())


def summarize(rows: Sequence[Row]) -> dict[float, tuple[Row, Row]]:
  """{ratio: (means, deviations) over the seeds}, the highest ratio first."""
  ratios = sorted({row.mask_ratio for row in rows}, reverse=True)
  found = {}
  for ratio in ratios:
    values = np.array([row for row in rows if row.mask_ratio == ratio])
    ddof = 1 if len(values) > 1 else 0
    found[ratio] = (Row(*values.mean(0)), Row(*values.std(0, ddof=ddof)))
  return found


def draw(
  rows: Sequence[Row], path: str | pathlib.Path | None = None
) -> np.ndarray:
  """Three panels over the mask ratio: labels, connections, and the outcome.

  Returns:
    (h, w, 3) uint8, also written as PNG to the path, if there is one.
  """
  found = summarize(rows)
  ratios = np.array(list(found))
  figure = Figure(figsize=(6.4, 7.6), dpi=150, layout="constrained")
  panels = figure.subplots(3, sharex=True)
  series = (
    (("labelling_error", "views"), ("target_labelling_error", "targets")),
    (("residual", f"beyond the first {RESIDUAL_AFTER}"),),
    (("probe_error", f"{FEATURES} spectral features"),),
  )
  labels = (
    "labelling error\n(share of views or targets)",
    "residual spectrum\n(sum of squared eigenvalues)",
    "error of a linear probe\n(share of the 397 test images)",
  )
  for axes, names, label in zip(panels, series, labels):
    for (name, what), color in zip(names, ("#0072b2", "#d55e00")):
      mean, deviation = (
        np.array([getattr(pair[i], name) for pair in found.values()])
        for i in (0, 1)
      )
      axes.errorbar(
        *(ratios, mean, deviation),
        color=color,
        marker="o",
        markersize=4,
        capsize=2,
        label=what,
      )
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
  panels[0].set_ylim(bottom=0)
  panels[1].set_yscale("symlog", linthresh=0.1)
  panels[1].set_ylim(bottom=0)
  panels[2].set_xlabel("mask ratio (share of the 16 patches removed)")
  seeds = len({row.seed for row in rows})
  panels[0].set_title(
    f"Exact mask graph of binarised digits, {seeds} draws of {MASKS} masks",
    fontsize=11,
  )
  return pictures.finished(pictures.rendered(figure), path)


def main(arguments: Sequence[str] | None = None) -> int:
  """Measures, writes and prints."""
  parser = argparse.ArgumentParser(
    prog="python -m umae_jax.analysis.mask_ratio",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("output", metavar="DIR", type=pathlib.Path)
  parser.add_argument("--seeds", type=_positive, default=5, metavar="N")
  given = parser.parse_args(arguments)
  try:
    if (given.output / "mask_ratio.csv").exists():
      raise UserError(
        f"{given.output}/mask_ratio.csv exists; name another DIR."
      )
    given.output.mkdir(parents=True, exist_ok=True)
  except (UserError, OSError) as error:
    print(f"umae_jax: {error}", file=sys.stderr, flush=True)
    return 2
  rows, start = [], time.monotonic()
  for seed in range(given.seeds):
    rows += on_digits(seeds=[seed])
    spent = time.monotonic() - start
    left = spent / (seed + 1) * (given.seeds - seed - 1)
    print(
      f"seed {seed} done in all {spent:.0f} s; {left:.0f} s left", flush=True
    )
  text = io.StringIO()
  csv.writer(text, lineterminator="\n").writerows([Row._fields, *rows])
  storage.write_file(
    given.output / "mask_ratio.csv",
    lambda file: file.write(text.getvalue().encode()),
  )
  draw(rows, given.output / "mask_ratio.png")
  print(format_rows(rows))
  return 0


def format_rows(rows: Sequence[Row]) -> str:
  """Means and deviations as a table; a bound of 1 or more is vacuous."""
  header = ("ratio", "alpha", "beta", "phi", f"residual > {RESIDUAL_AFTER}")
  header += (f"lambda_{FEATURES + 1}", "view error", "its bound", "probe error")
  lines = []
  for mean, deviation in summarize(rows).values():
    cells = [f"{mean.mask_ratio:.3f}"]
    for name in Row._fields[2:]:
      cells.append(
        f"{getattr(mean, name):.3f} +- {getattr(deviation, name):.3f}"
      )
    cells[7] = cells[7] if mean.view_bound < 1 else "vacuous"
    lines.append(cells)
  return metrics.format_table(lines, header)


def _positive(text):
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
  return int(text)


if __name__ == "__main__":
  sys.exit(main())
