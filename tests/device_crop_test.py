import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umae_jax import device_crop
from umae_jax.data import augment

SCALE = (0.2, 1.0)
crop_resize = jax.jit(device_crop.crop_resize, static_argnums=2)
random_windows = jax.jit(device_crop.random_windows, static_argnums=(1, 2, 3))


def pictures(shape, number, channels):
  """(number, h, w, C) uint8: smooth, with a strong edge and some noise."""
  rng = np.random.default_rng(0)
  y, x = np.mgrid[: shape[0], : shape[1]]
  phase = np.arange(channels) + np.arange(number)[:, None, None, None]
  wave = np.sin(x[..., None] / 7 + phase) * np.cos(y[..., None] / 5 - phase)
  image = 127 + 90 * wave + 60 * (x > y)[..., None]
  image += rng.normal(scale=20, size=image.shape)
  return np.clip(np.round(image), 0, 255).astype(np.uint8)


def host(image, window, image_size):
  y, x, h, w = window
  return augment.resize(image[y : y + h, x : x + w], image_size).numpy()


def assert_close(got, expected):
  assert got.dtype == np.uint8
  error = np.abs(got.astype(int) - expected)
  assert error.max() <= 1  # Halves round either way ...
  assert (error > 0).mean() < 1e-3  # ... but they are few.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [(32, 32), (17, 40)])
def test_a_crop_equals_that_of_the_host(channels, image_size):
  windows = np.array(
    [
      [0, 0, 61, 83],  # All of it.
      [3, 5, 32, 32],
      [20, 40, 41, 43],  # To the lower right corner.
      [0, 0, 9, 11],  # Enlarged.
      [60, 82, 1, 1],
      [11, 0, 7, 83],  # Enlarged and shrunk.
      [1, 2, 53, 31],
    ],
    np.int32,
  )
  images = pictures((61, 83), len(windows), channels)
  flip = np.arange(len(windows)) % 2 == 1
  got = np.asarray(crop_resize(images, windows, image_size))
  expected = [host(i, w, image_size) for i, w in zip(images, windows)]
  assert_close(got, np.stack(expected))
  flipped = np.asarray(crop_resize(images, windows, image_size, flip))
  np.testing.assert_array_equal(flipped[~flip], got[~flip])
  np.testing.assert_array_equal(flipped[flip], got[flip][:, :, ::-1])


def test_a_window_of_the_final_size_is_copied():
  images = pictures((20, 30), 1, 3)
  got = crop_resize(images, jnp.array([[2, 5, 16, 24]]), (16, 24))
  np.testing.assert_array_equal(got[0], images[0, 2:18, 5:29])


def test_pixels_outside_of_the_window_have_no_weight():
  matrix = jax.jit(device_crop.resample_matrix, static_argnums=(2, 3))
  start, extent = np.array([3, 0, 7, 1]), np.array([9, 20, 2, 1])
  weights = np.asarray(matrix(start, extent, 6, 20))
  assert weights.shape == (4, 6, 20)
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
  assert not weights[0, :, :3].any() and not weights[0, :, 12:].any()
  assert not weights[2, :, :7].any() and not weights[2, :, 9:].any()
  np.testing.assert_array_equal(weights[3, :, 1], 1)


def test_finish_reads_the_corner_and_mirrors():
  images = pictures((24, 28), 3, 3)
  extent = np.array([[24, 28], [13, 20], [8, 8]], np.int32)
  batch = {
    "image": images,
    "extent": extent,
    "flip": np.array([False, True, False]),
    "label": np.arange(3),
  }
  finish = jax.jit(device_crop.finish, static_argnums=1)
  got = finish(batch, (16, 16))
  assert set(got) == {"image", "label"}
  expected = [host(i, (0, 0, *e), (16, 16)) for i, e in zip(images, extent)]
  expected[1] = expected[1][:, ::-1]
  assert_close(np.asarray(got["image"]), np.stack(expected))


def test_windows_have_the_distribution_of_the_host():
  windows = random_windows(jax.random.key(3), 4000, (300, 400), SCALE)
  assert windows.dtype == jnp.int32
  y, x, h, w = np.asarray(windows).T
  assert y.min() == 0 and x.min() == 0
  assert (y + h).max() == 300 and (x + w).max() == 400
  area, aspect = h * w / 120_000, w / h
  assert 0.195 < area.min() < 0.21 and 0.97 < area.max() <= 1.0
  assert 0.74 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.35
  small = area < 0.5  # Where every window fits.
  counts, _ = np.histogram(area[small], bins=6, range=(0.2, 0.5))
  assert counts.min() > 0.8 * counts.mean()
  assert counts.max() < 1.2 * counts.mean()
  assert abs(np.log(aspect[small]).mean()) < 0.02
  for corner, side, whole in ((y, h, 300), (x, w, 400)):
    room = (corner / np.maximum(whole - side, 1))[side < whole - 50]
    assert abs(room.mean() - 0.5) < 0.03
  assert abs(np.corrcoef(y[small], x[small])[0, 1]) < 0.06


@pytest.mark.parametrize(
  "shape, expected",
  [
    ((10, 1000), (0, 493, 10, 13)),
    ((1000, 10), (493, 0, 13, 10)),
    ((1, 1), (0, 0, 1, 1)),
  ],
)
def test_a_window_that_never_fits_is_central(shape, expected):
  windows = random_windows(jax.random.key(0), 2, shape, (0.9, 1.0))
  np.testing.assert_array_equal(windows, [expected] * 2)


def test_a_window_depends_on_its_row_alone():
  few, many = (
    random_windows(jax.random.key(1), n, (64, 64), SCALE) for n in (3, 8)
  )
  np.testing.assert_array_equal(few, many[:3])
  assert len(np.unique(many, axis=0)) == 8
