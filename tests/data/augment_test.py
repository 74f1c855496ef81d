import io

import numpy as np
from PIL import Image
import pytest
import tensorflow as tf

from umae_jax.data import augment

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def draw(function, count):
  """function(seed) for many seeds, as one array."""
  seeds = tf.data.Dataset.range(count).map(lambda i: tf.stack([7, i]))
  return next(seeds.map(function).batch(count).as_numpy_iterator())


def test_windows_have_the_distribution_of_torchvision():
  shape = tf.constant([300, 400])
  windows = draw(lambda s: augment.random_window(shape, s, SCALE), 4000)
  y, x, h, w = windows.T
  assert y.min() == 0 and x.min() == 0
  assert (y + h).max() == 300 and (x + w).max() == 400
  area, aspect = h * w / 120_000, w / h
  assert 0.195 < area.min() < 0.21 and 0.97 < area.max() <= 1.0
  assert 0.74 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.35
  # Areas are uniform and log-ratios symmetric where every window fits.
  small = area < 0.5
  counts, _ = np.histogram(area[small], bins=6, range=(0.2, 0.5))
  assert counts.min() > 0.8 * counts.mean()
  assert counts.max() < 1.2 * counts.mean()
  assert abs(np.log(aspect[small]).mean()) < 0.02
  # A corner is uniform over the room that the window leaves.
  room = (y / np.maximum(300 - h, 1))[h < 250]
  assert abs(room.mean() - 0.5) < 0.03


@pytest.mark.parametrize(
  "shape, expected",
  [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10))],
)
def test_a_window_that_never_fits_is_central(shape, expected):
  window = augment.random_window(tf.constant(shape), [0, 0], (0.9, 1.0))
  assert tuple(window.numpy()) == expected


def test_one_pixel_has_a_window():
  window = augment.random_window(tf.constant([1, 1]), [0, 0], SCALE)
  assert window.numpy().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "pixels"])
def test_random_crop_agrees_with_pillow(write, kind):
  image = write.picture(1, size=(90, 120))
  data = image
  if kind != "pixels":
    data = write.encode(image, kind)
    image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
  stage = augment.random_resized_crop((40, 32), SCALE, channels=3)
  for number in range(5):
    seed = tf.constant([0, number], tf.int64)
    got = stage({"image": tf.constant(data), "seed": seed})["image"].numpy()
    y, x, h, w = augment.random_window([90, 120], seed, SCALE).numpy().tolist()
    window = Image.fromarray(image).crop((x, y, x + w, y + h))
    expected = np.asarray(window.resize((32, 40), Image.Resampling.BICUBIC))
    error = np.abs(got.astype(int) - expected)
    # At the window's edge the chroma of a fused decoding is interpolated
    # without the neighbours outside.
    assert error.mean() < 1 and error.max() <= (12 if kind == "JPEG" else 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_equals_that_of_tensorflow_to_the_bit(channels):
  rng = np.random.default_rng(0)
  for shape in [(61, 35), (20, 90), (1, 7), (32, 24)]:
    image = rng.integers(0, 256, (*shape, channels)).astype(np.uint8)
    got = augment.resize(tf.constant(image), (32, 24))
    expected = tf.image.resize(image, (32, 24), "bicubic", antialias=True)
    expected = np.clip(np.round(expected), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
  "shape, margin", [((90, 120), 256 / 224), ((30, 50), 1.0)]
)
def test_central_crop_agrees_with_pillow(write, shape, margin):
  image = write.picture(2, size=shape)
  stage = augment.central_crop((56, 56), channels=3)
  got = stage({"image": tf.constant(image)})["image"].numpy()
  short = int(56 * margin)
  long = int(short * max(shape) / min(shape))
  resized = Image.fromarray(image).resize(
    (long, short), Image.Resampling.BICUBIC
  )
  top, left = round((short - 56) / 2), round((long - 56) / 2)
  expected = np.asarray(resized)[top : top + 56, left : left + 56]
  assert np.abs(got.astype(int) - expected).max() <= 2


def test_central_crop_above_224_has_no_margin(write):
  stage = augment.central_crop((225, 225), channels=3)
  image = write.picture(3, size=(225, 300))
  got = stage({"image": tf.constant(image)})["image"].numpy()
  np.testing.assert_array_equal(got, image[:, 38:263])


def test_an_image_that_fits_is_untouched(write):
  image = write.picture(4, size=(24, 32))
  stage = augment.central_crop((24, 32), channels=3)
  got = stage({"image": tf.constant(image)})["image"]
  np.testing.assert_array_equal(got, image)


def test_half_of_the_images_are_mirrored(write):
  image = write.picture(5)
  flips = draw(
    lambda s: augment.random_flip({"image": tf.constant(image), "seed": s})[
      "image"
    ],
    1000,
  )
  mirrored = np.array([np.array_equal(f, image[:, ::-1]) for f in flips])
  same = np.array([np.array_equal(f, image) for f in flips])
  assert (mirrored ^ same).all()
  assert 0.45 < mirrored.mean() < 0.55


def test_flips_do_not_depend_on_the_crop():
  """The two draw from different streams of the same seed."""
  image = tf.constant(np.arange(2, dtype=np.uint8).reshape(1, 2, 1))

  def both(seed):
    flipped = augment.random_flip({"image": image, "seed": seed})["image"]
    first = tf.random.stateless_uniform((), seed, alg="philox")
    return tf.stack([tf.cast(flipped[0, 0, 0], tf.float32), first])

  flip, first = draw(both, 2000).T
  assert abs(np.corrcoef(flip, first)[0, 1]) < 0.06
