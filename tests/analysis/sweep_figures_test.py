import itertools
from typing import NamedTuple

import numpy as np
import pytest

from umae_jax.analysis import pictures, sweep_figures


class Exact(NamedTuple):
  mask_ratio: float
  seed: int
  labelling_error: float
  residual: float
  probe_error: float


RATIOS, WEIGHTS, SEEDS = (0.75, 0.25, 0.5), (0.01, 0.0), (0, 1, 2)
EXACT = [Exact(x, s, x, 1 / x, 0.1 * s) for x in RATIOS for s in SEEDS]


def rows(ratios=RATIOS, weights=WEIGHTS, seeds=SEEDS):
  return [
    {
      "mask_ratio": ratio,
      "uniformity_weight": weight,
      "seed": seed,
      "step": 10,
      "linear_accuracy": ratio + seed**2 / 100,
      "knn_accuracy": 0.5,
      "effective_rank": 30 + weight,
      "participation_ratio": 4.0,
    }
    for ratio, weight, seed in itertools.product(ratios, weights, seeds)
  ]


def drawn(monkeypatch, *arguments):
  """(shown panels of the picture, the figure, the image)."""
  figures = []
  rendered = pictures.rendered
  monkeypatch.setattr(
    pictures, "rendered", lambda f: (figures.append(f), rendered(f))[1]
  )
  image = sweep_figures.picture(*arguments)
  shown = {x.get_title(): x for x in figures[0].axes if x.axison}
  return shown, figures[0], image


def test_the_table_holds_means_and_deviations():
  lines = sweep_figures.table([*rows(), *rows((0.9,), (0.5,), (4,))])
  lines = [line.split() for line in lines.splitlines()]
  assert len(lines) == 2 + 6 + 1
  # 0.25 + (0, 0.01, 0.04): mean 0.01667; 0.0433^2 / 2 = 0.02082^2.
  assert lines[2][:6] == ["0.25", "0", "3", "0.267", "+-", "0.021"]
  assert [line[:2] for line in lines[2:5]] == [
    ["0.25", "0"],
    ["0.25", "0.01"],
    ["0.5", "0"],
  ]
  assert lines[-1] == ["0.9", "0.5", "1", "1.060", "0.500", "30.5", "4.0"]


def test_a_figure_that_some_runs_lack_is_shown_of_the_others():
  found = rows((0.5,), (0.0, 0.1), (0, 1))
  found[0]["alignment_loss"] = 0.25
  lines = sweep_figures.table(found).splitlines()
  assert lines[0].endswith("alignment loss")
  assert lines[2].split()[-4:] == ["4.0", "+-", "0.0", "0.250"]
  assert lines[3].split()[-3:] == ["4.0", "+-", "0.0"]


def test_a_line_for_a_run():
  line = sweep_figures.line(rows((0.5,), (0.01,), (2,))[0])
  assert line == (
    "ratio 0.5 weight 0.01 seed 2: linear 0.540, kNN 0.500, effective rank 30.0"
  )


def test_over_the_mask_ratio_a_colour_for_each_lambda(monkeypatch):
  shown, figure, _ = drawn(monkeypatch, rows())
  assert list(shown) == [
    *("linear accuracy", "kNN accuracy", "effective rank"),
    "participation ratio",
  ]
  points, means, *others = shown["linear accuracy"].lines
  assert len(others) == 2
  np.testing.assert_allclose(means.get_xdata(), [0.25, 0.5, 0.75])
  expected = np.array([0.25, 0.5, 0.75]) + 0.05 / 3
  np.testing.assert_allclose(means.get_ydata(), expected)
  assert len(points.get_xdata()) == 9
  legend = [text.get_text() for text in figure.legends[0].texts]
  assert legend == ["lambda 0", "lambda 0.01"]
  rank = shown["effective rank"].lines
  np.testing.assert_allclose(rank[1].get_ydata(), 30)
  np.testing.assert_allclose(rank[3].get_ydata(), 30.01)
  assert tuple(rank[1].get_color()) != tuple(rank[3].get_color())
  for axes in shown.values():
    assert axes.get_xlabel() == "mask ratio"
    assert axes.get_ylabel()


def test_exact_curves_stand_beside(monkeypatch):
  shown, _, image = drawn(monkeypatch, rows(), EXACT)
  assert image.shape[1] == 2040 and image.dtype == np.uint8
  assert list(shown)[4:] == [
    *("exact labelling error", "exact residual spectrum", "exact probe error"),
  ]
  _, means = shown["exact residual spectrum"].lines
  np.testing.assert_allclose(means.get_ydata(), [4, 2, 4 / 3])
  _, means = shown["exact probe error"].lines
  np.testing.assert_allclose(means.get_ydata(), [0.1, 0.1, 0.1])


@pytest.mark.parametrize(
  "weights, scale", [((0.0, 0.01, 0.1), "symlog"), ((0.01, 0.1), "log")]
)
def test_over_lambda_if_only_that_varies(monkeypatch, weights, scale):
  shown, figure, _ = drawn(monkeypatch, rows((0.5,), weights))
  for axes in shown.values():
    assert axes.get_xscale() == scale
    assert axes.get_xlabel() == "lambda"
    assert list(axes.get_xticks()) == list(weights)
  (text,) = figure.legends[0].texts
  assert text.get_text() == "mask ratio 0.5"


def test_one_combination_and_many_are_drawn(monkeypatch):
  one, _, _ = drawn(monkeypatch, rows((0.5,), (0.01,)))
  assert len(one["kNN accuracy"].lines) == 2
  weights = tuple(np.arange(12) / 100)
  many, _, _ = drawn(monkeypatch, rows(RATIOS, weights))
  colors = [tuple(x.get_color()) for x in many["kNN accuracy"].lines[1::2]]
  assert len(set(colors)) == 12


def test_the_file_has_all_figures_in_order(tmp_path):
  found = rows((0.5, 0.25), (0.01,), (1, 0))
  found[0]["more"] = 7
  sweep_figures.write(found, tmp_path)
  header, *lines = (tmp_path / "sweep.csv").read_text().splitlines()
  names = header.split(",")
  assert sorted(names) == sorted(found[0])
  values = [dict(zip(names, line.split(","))) for line in lines]
  assert [(x["mask_ratio"], x["seed"]) for x in values] == [
    *(("0.25", "0"), ("0.25", "1"), ("0.5", "0"), ("0.5", "1")),
  ]
  assert [x["more"] for x in values] == ["", "", "", "7"]
  assert float(values[1]["linear_accuracy"]) == 0.26
  assert sorted(x.name for x in tmp_path.iterdir()) == [
    "sweep.csv",
    "sweep.png",
  ]
