import matplotlib
from matplotlib import image as mpl_image
import numpy as np
import pytest

from umae_jax.analysis import pictures

RED, GREEN, BLUE = np.eye(3)


def triple(n, h, w, c=3):
  """Originals red, left half removed, predictions blue."""
  color = np.zeros((n, h, w, c), np.float32)
  original, masked, predicted = color.copy(), color.copy(), color.copy()
  original[..., 0] = 1
  masked[:] = original
  masked[:, :, : w // 2] = 0.5
  predicted[..., -1] = 1
  return original, masked, predicted


def count(image, color):
  return (image == np.round(255 * np.asarray(color))).all(-1).sum()


def test_four_views_have_the_right_pixels():
  image = pictures.reconstructions(*triple(2, 8, 8))
  tile = 160 * 160  # 8 pixels, 20 times.
  assert count(image, RED) == 2 * tile * (1 + 1 / 2 + 1 / 2 + 0)
  assert count(image, BLUE) == 2 * tile * (0 + 0 + 1 / 2 + 1)
  assert count(image, [128 / 255] * 3) >= 2 * tile / 2  # Labels are grey, too.


def test_large_images_keep_their_pixels():
  rng = np.random.default_rng(0)
  original = rng.random((1, 170, 200, 3))
  image = pictures.reconstructions(original, original, original)
  tile = np.round(255 * original[0]).astype(np.uint8)
  windows = np.argwhere((image == tile[0, 0]).all(-1))
  found = [
    (image[y : y + 170, x : x + 200] == tile).all()
    for y, x in windows
    if y + 170 <= image.shape[0] and x + 200 <= image.shape[1]
  ]
  assert sum(found) == 4


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [1, 5, 16])
def test_any_channels_and_numbers(channels, n):
  image = pictures.reconstructions(*triple(n, 12, 10, channels))
  assert image.dtype == np.uint8 and image.shape[2] == 3
  if channels != 3:
    assert (image[..., 0] == image[..., 1]).all()  # Grey, all of it.
  assert 0.3 < image.shape[0] / image.shape[1] < 2


def test_values_outside_are_clipped():
  original = np.full((1, 8, 8, 3), 0.5)
  prediction = np.stack([np.full((1, 8, 8), x) for x in (7, -3, np.nan)], -1)
  image = pictures.reconstructions(original, original, prediction)
  assert count(image, RED) == 160 * 160


def test_png_is_the_picture_returned(tmp_path):
  path = tmp_path / "x.png"
  image = pictures.reconstructions(*triple(1, 8, 8), path)
  read = mpl_image.imread(path)[..., :3]
  np.testing.assert_array_equal(np.round(255 * read), image)
  assert list(tmp_path.iterdir()) == [path]


def test_writing_is_atomic(tmp_path, monkeypatch):
  path = tmp_path / "x.png"
  path.write_bytes(b"old")

  def fail(file, *_, **__):
    file.write(b"half")
    raise OSError

  monkeypatch.setattr(pictures.mpl_image, "imsave", fail)
  with pytest.raises(OSError):
    pictures.write(np.zeros((2, 2, 3), np.uint8), path)
  assert path.read_bytes() == b"old"


def drawn(monkeypatch, draw):
  """The figure that `draw` renders."""
  figures = []
  rendered = pictures.rendered
  monkeypatch.setattr(
    pictures, "rendered", lambda f: (figures.append(f), rendered(f))[1]
  )
  image = draw()
  assert image.ndim == 3 and image.dtype == np.uint8
  return figures[0]


def test_spectrum_shows_each_series_relative_to_its_largest(
  tmp_path, monkeypatch
):
  series = {"a": [4.0, 4.0, 4.0], "b": np.array([2.0, 1.0, 0.0]), "c": [0.0]}
  figure = drawn(
    monkeypatch, lambda: pictures.spectrum(series, tmp_path / "s.png")
  )
  (axes,) = figure.axes
  assert axes.get_yscale() == "log"
  a, b, c = axes.lines
  np.testing.assert_array_equal(a.get_ydata(), [1, 1, 1])
  np.testing.assert_array_equal(b.get_ydata(), [1, 0.5, np.nan])
  assert a.get_label() == "a: effective rank 3.0 of 3"
  assert b.get_label() == "b: effective rank 1.9 of 3"  # 3 / 2^(2/3).
  assert np.isnan(c.get_ydata()).all()
  assert (tmp_path / "s.png").exists()


RECORDS = [
  {"step": 1, "split": "train", "loss": 1.0, "uniformity_loss": 0.5},
  {"step": 2, "split": "train", "loss": np.inf, "uniformity_loss": 0.01},
  {"step": 2, "split": "eval", "knn_accuracy": 0.25, "note": "text"},
  {"step": 3, "split": "train", "loss": 0.5, "time/elapsed_s": 7.0},
]


def test_curves_show_what_is_logged_and_only_that(tmp_path, monkeypatch):
  figure = drawn(
    monkeypatch, lambda: pictures.curves(RECORDS, tmp_path / "c.png")
  )
  shown = {axes.get_title(): axes for axes in figure.axes if axes.axison}
  assert list(shown) == ["Loss", "Losses of the class tokens", "Accuracy"]
  (loss,) = shown["Loss"].lines
  np.testing.assert_array_equal(loss.get_xdata(), [1, 2, 3])
  np.testing.assert_array_equal(loss.get_ydata(), [1, np.nan, 0.5])
  assert loss.get_label() == "loss (train)"
  (accuracy,) = shown["Accuracy"].lines
  assert accuracy.get_label() == "knn accuracy (eval)"
  assert shown["Losses of the class tokens"].get_yscale() == "log"
  assert shown["Loss"].get_yscale() == "linear"
  assert (tmp_path / "c.png").exists()


def test_an_empty_log_still_makes_a_picture():
  assert pictures.curves([]).size > 0


def test_global_state_of_matplotlib_is_left_alone():
  before = matplotlib.get_backend(auto_select=False)
  pictures.curves(RECORDS)
  assert matplotlib.get_backend(auto_select=False) == before
