from matplotlib import image as mpl_image
import numpy as np
import pytest

from umae_jax.analysis import confusion, pictures


@pytest.fixture
def drawn(monkeypatch):
  """The figures drawn."""
  figures, rendered = [], pictures.rendered
  monkeypatch.setattr(
    pictures, "rendered", lambda f: (figures.append(f), rendered(f))[1]
  )
  return figures


def shares(figure):
  return np.asarray(figure.axes[0].images[0].get_array().filled(-1))


def texts(figure):
  """Of each cell with a number: {(row, column): text}."""
  return {
    (round(t.get_position()[1]), round(t.get_position()[0])): t.get_text()
    for t in figure.axes[0].texts
  }


def test_rows_are_shares_and_the_title_is_the_mean_over_classes(drawn):
  matrix = np.array([[3, 1, 0], [0, 0, 0], [199, 1, 0]])
  confusion.confusion(matrix, ["a", "b", "c"])
  (figure,) = drawn
  np.testing.assert_allclose(
    shares(figure), [[0.75, 0.25, 0], [-1, -1, -1], [0.995, 0.005, 0]]
  )
  want = {(0, 0): "75", (0, 1): "25", (2, 0): "100", (2, 1): "<1"}
  assert texts(figure) == want
  axes = figure.axes[0]
  assert axes.get_title() == "Mean accuracy of a class: 37.5 %"
  assert axes.get_ylabel() == "true class"
  assert len(figure.axes) == 2  # The second is the bar of the colours.


@pytest.mark.parametrize(
  "count, named, numbered, cells",
  [
    (2, True, True, 2),
    (15, True, True, 15),
    (16, True, False, 16),
    (30, True, False, 30),
    (31, False, False, 31),
    (205, False, False, 69),
  ],
)
def test_what_is_written_depends_on_the_number(
  drawn, count, named, numbered, cells
):
  names = [f"class {i}" for i in range(count)]
  image = confusion.confusion(np.eye(count, dtype=int), names)
  (figure,) = drawn
  ticks = [t.get_text() for t in figure.axes[0].get_yticklabels()]
  assert (ticks == names) == named
  assert bool(texts(figure)) == numbered
  assert shares(figure).shape == (cells, cells)
  assert image.dtype == np.uint8 and image.shape[2] == 3
  assert 0.7 < image.shape[0] / image.shape[1] < 1


def test_many_classes_share_cells(drawn):
  matrix = np.zeros((1000, 1000), int)
  matrix[np.arange(1000), np.arange(1000)] = 1
  matrix[13, 987] = 10
  confusion.confusion(matrix, [""] * 1000)
  got = shares(drawn[0])
  want = np.eye(100)
  want[1, 1], want[1, 98] = 0.5, 0.5
  np.testing.assert_allclose(got, want)
  title = drawn[0].axes[0].get_title()
  assert title == "Mean accuracy of a class: 99.9 % (a cell: 10 classes)"


def test_long_names_are_cut_and_fit(drawn):
  names = ["great white shark, man-eater, man-eating shark", "b"]
  image = confusion.confusion(np.eye(2, dtype=int), names)
  label = drawn[0].axes[0].get_yticklabels()[0].get_text()
  assert label == "great white shark, ma…"
  edges = [image[0], image[-1], image[:, 0], image[:, -1]]
  assert all((edge == 255).all() for edge in edges)  # Nothing runs out.


def test_no_images_at_all_and_the_file(tmp_path):
  path = tmp_path / "confusion.png"
  image = confusion.confusion(np.zeros((2, 2), int), ["a", "b"], path)
  read = np.round(255 * mpl_image.imread(path)[..., :3]).astype(np.uint8)
  np.testing.assert_array_equal(read, image)
