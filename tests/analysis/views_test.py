from matplotlib.colors import to_rgb
import numpy as np
import pytest

from umae_jax.analysis import pictures, views

LABELS = [f"a run of long name {i} (U-MAE)" for i in range(6)]


@pytest.fixture
def drawn(monkeypatch):
  """The figures drawn."""
  figures, rendered = [], pictures.rendered
  monkeypatch.setattr(
    pictures, "rendered", lambda f: (figures.append(f), rendered(f))[1]
  )
  return figures


def assert_apart(figure):
  """No two texts of the figure touch, and none runs out of it."""
  boxes = [x.get_window_extent() for x in figure.texts if x.get_text()]
  width, height = figure.canvas.get_width_height()
  for i, box in enumerate(boxes):
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    assert not any(box.overlaps(other) for other in boxes[:i])


def assert_clean_edges(image):
  for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
    assert (edge == 255).all()


def test_curves_are_those_of_the_logs(drawn):
  logs = {
    "a": [
      {"step": 1, "split": "train", "loss": 3.0, "uniformity_loss": 0.5},
      {"step": 2, "split": "eval", "loss": np.inf, "knn_accuracy": 0.25},
      {"step": 4, "split": "eval", "knn_accuracy": 0.5},
    ],
    "b": [{"step": 3, "split": "eval", "alignment_loss": 0.1}],
    "nothing yet": [],
  }
  image = views.curves(logs)
  assert image.dtype == np.uint8 and image.shape[2] == 3
  panels = {x.get_title(): x for x in drawn[0].axes if x.axison}
  titles = [x.split(",")[0] for x in panels]
  want = ["loss", "nearest neighbours", "uniformity loss", "alignment loss"]
  assert titles == want
  lines = panels["nearest neighbours, % right"].lines
  np.testing.assert_array_equal(lines[1].get_xydata(), [[2, 25], [4, 50]])
  assert [x.get_color() for x in lines[::2]] == list(pictures._COLORS[:3])
  assert np.isnan(panels["loss"].lines[1].get_ydata()).all()
  (legend,) = drawn[0].legends
  assert [x.get_text() for x in legend.get_texts()] == list(logs)


def test_curves_of_no_log_at_all():
  assert views.curves({"a": []}).size > 0


def test_ranks_end_with_the_final_norm(drawn):
  ones = np.eye(4).cumsum(0)  # Of rank 1, 2, 3, 4, by either measure.
  views.ranks_by_layer({"a": {"whole": ones[:3], "masked": ones[1:]}})
  for axes in drawn[0].axes:
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [1, 2, 3])
    diamonds = [x for x in axes.lines if x.get_marker() == "D"]
    np.testing.assert_allclose(
      [x.get_xydata()[0] for x in diamonds], [[3, 3], [3, 4]]
    )
    assert list(axes.get_xticks()) == [1, 2]  # The third is no block.
  assert drawn[0].axes[1].get_title() == "participation ratio"


def test_densities_are_densities(drawn):
  rng = np.random.default_rng(0)
  cosines = {"a": {"x": rng.uniform(-0.5, 1, 500)}, "b": {"x": np.ones(9)}}
  views.pair_cosines(cosines)
  for axes in drawn[0].axes:
    outline = axes.patches[-1].get_xy()
    x, y = outline[:, 0], outline[:, 1]
    area = abs((x * np.roll(y, 1) - y * np.roll(x, 1)).sum() / 2)
    assert area == pytest.approx(1)


@pytest.mark.parametrize("classes, named", [(10, 10), (20, 20), (25, 10)])
def test_points_are_coloured_by_class(drawn, classes, named):
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(classes), np.arange(1, 1 + classes))
  xy = rng.normal(size=(len(labels), 2))
  names = [f"class {i}" for i in range(classes)]
  views.scatters({"a": xy, "b": xy}, labels, names)
  sets = {x.get_label(): x for x in drawn[0].axes[0].collections}
  assert len(sets) == named + (classes > named)
  assert ("others" in sets) == (classes > named)
  np.testing.assert_array_equal(
    sets[f"class {classes - 1}"].get_offsets(), xy[labels == classes - 1]
  )
  colors = [tuple(x.get_facecolor()[0]) for x in sets.values()]
  assert len(set(colors)) == len(sets)


def test_the_map_is_the_matrix_with_every_layer_named(drawn):
  matrix = np.random.default_rng(0).random((5, 5))
  image = views.similarity_map(matrix, {"a": 2, "b": 3})
  axes = drawn[0].axes[0]
  np.testing.assert_array_equal(axes.images[0].get_array(), matrix)
  names = [x.get_text() for x in axes.get_yticklabels()]
  assert names == ["1", "norm", "1", "2", "norm"]
  assert [x.get_xdata()[0] for x in axes.lines[1::2]] == [1.5]
  assert_clean_edges(image)
  six = {f"sixteen letters{i}": 25 for i in range(6)}
  assert_clean_edges(views.similarity_map(np.eye(150), six))


def test_tiles_frames_and_notes(drawn):
  gray = np.full((2, 4, 6, 1), 0.5)
  image = views.mosaic(
    [gray] * 3,
    ["query", "1", "2"],
    {"": 1, "a": 2},
    notes=[["x", "y"], ["✓ x", "✗ z"], ["✗ u", "✗ v"]],
    right=[[None, None], [True, False], [False, False]],
  )
  (figure,) = drawn
  assert len(figure.axes) == 6
  frames = [axes.spines["top"] for axes in figure.axes]
  assert [x.get_visible() for x in frames] == [False, False] + [True] * 4
  colors = [x.get_edgecolor()[:3] for x in frames[2:]]
  assert colors == [to_rgb(views.RIGHT), *[to_rgb(views.WRONG)] * 3]
  assert (image == 128).all(-1).sum() > 6 * 100 * 60
  texts = [x.get_text() for x in figure.texts]
  assert texts.count("x") == 1 and "✗ z" in texts and "a" in texts
  assert_apart(figure)
  assert_clean_edges(image)


def test_long_names_of_six_runs_do_not_touch(drawn):
  tile = np.zeros((3, 8, 8, 3))
  notes = [["a class, its name"] * 3] * 7
  names = {"": 1, **dict.fromkeys(LABELS, 1)}
  views.mosaic([tile] * 7, [""] + ["sixteen letters!"] * 6, names, notes)
  assert_apart(drawn[0])


def test_heat_is_brightest_at_the_largest_weight():
  image = np.zeros((8, 12, 3))
  got = views.heat(np.array([[0.1, 0, 0], [0, 0, 0.2]]), image)
  assert got.shape == (8, 12, 3)
  light = got.sum(-1)
  assert (light[4:, 8:] == light.max()).all()
  assert (light[:4, 4:] == light.min()).all() and light.min() < 0.05
  assert light.min() < light[0, 0] < light.max()
  white = views.heat(np.zeros((2, 3)), image + 1)
  np.testing.assert_allclose(white, 0.25, atol=0.02)
