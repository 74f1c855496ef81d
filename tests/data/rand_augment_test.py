import functools
import io

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
import pytest
import tensorflow as tf

from umae_jax.data import rand_augment

COLOR = (124, 116, 104)
OPERATIONS = rand_augment.operations(COLOR)
LEVELS = (-1.0, -0.62, 0.0, 0.33, 0.9)


def photograph(write, channels=3, size=(60, 80)):
  """Waves, an edge, noise, a bright area, not all of the range."""
  x = write.picture(3, size=size).astype(float) * 0.7 + 20
  x[:, 50:] *= 0.6
  x += np.random.default_rng(0).normal(size=x.shape) * 6
  data = write.encode(np.clip(x, 0, 255).astype(np.uint8), quality=90)
  image = Image.open(io.BytesIO(data))
  image = np.array(image if channels == 3 else image.convert("L"))
  image[:20, :40] = 250  # More than a few pixels of the brightest value.
  return image


def affine(image, level, matrix):
  w, h = image.size
  fill = COLOR if image.mode == "RGB" else round(sum(COLOR) / 3)
  return image.transform(
    *(image.size, Image.Transform.AFFINE, matrix(w, h, level)),
    resample=Image.Resampling.BILINEAR,
    fillcolor=fill,
  )


def rotate(image, level):
  fill = COLOR if image.mode == "RGB" else round(sum(COLOR) / 3)
  return image.rotate(
    30 * level, resample=Image.Resampling.BILINEAR, fillcolor=fill
  )


def enhance(kind, image, level):
  return kind(image).enhance(1 + 0.9 * level)


def solarize_add(image, level):
  add = int(110 * abs(level))
  return image.point(
    [min(255, i + add) if i < 128 else i for i in range(256)]
    * len(image.getbands())
  )


def shifts(matrix):
  return functools.partial(affine, matrix=matrix)


def posterize(image, level):
  bits = 4 - int(4 * abs(level))
  if bits:
    return ImageOps.posterize(image, bits)
  return image.point(lambda _: 0)  # Refused by Pillow now, black before.


PILLOW = {
  "auto_contrast": lambda x, a: ImageOps.autocontrast(x),
  "equalize": lambda x, a: ImageOps.equalize(x),
  "invert": lambda x, a: ImageOps.invert(x),
  "rotate": rotate,
  "posterize": posterize,
  "solarize": lambda x, a: ImageOps.solarize(x, 256 - int(256 * abs(a))),
  "solarize_add": solarize_add,
  "color": functools.partial(enhance, ImageEnhance.Color),
  "contrast": functools.partial(enhance, ImageEnhance.Contrast),
  "brightness": functools.partial(enhance, ImageEnhance.Brightness),
  "sharpness": functools.partial(enhance, ImageEnhance.Sharpness),
  "shear_x": shifts(lambda w, h, a: (1, 0.3 * a, 0, 0, 1, 0)),
  "shear_y": shifts(lambda w, h, a: (1, 0, 0, 0.3 * a, 1, 0)),
  "translate_x": shifts(lambda w, h, a: (1, 0, 0.45 * w * a, 0, 1, 0)),
  "translate_y": shifts(lambda w, h, a: (1, 0, 0, 0, 1, 0.45 * h * a)),
}
EXACT = {"equalize", "invert", "posterize", "solarize", "solarize_add"}
GEOMETRIC = {name for name in PILLOW if name.startswith(("ro", "sh", "tr"))}
GEOMETRIC -= {"sharpness"}


def test_the_operations_are_timms():
  assert OPERATIONS.keys() == PILLOW.keys() and len(PILLOW) == 15


@pytest.mark.parametrize("name", PILLOW)
@pytest.mark.parametrize("channels", [1, 3])
def test_operations_equal_pillows(write, name, channels):
  """Within one grey level; at a warped image's border Pillow does not blend."""
  image = photograph(write, channels)
  if channels == 1:
    image = image[..., None]
  for level in LEVELS:
    got = OPERATIONS[name](tf.constant(image), tf.constant(level)).numpy()
    pillow = PILLOW[name](Image.fromarray(image.squeeze()), level)
    error = np.abs(got - np.asarray(pillow).reshape(image.shape).astype(int))
    limit = 0 if name in EXACT else 1
    wrong = (error > limit).any(-1)
    if name in GEOMETRIC:
      assert wrong.mean() < 0.05
      continue
    assert not wrong.any(), (level, error.max())


@pytest.mark.parametrize("name", sorted(GEOMETRIC))
def test_warps_differ_from_pillow_only_beside_what_comes_in(write, name):
  image = photograph(write)
  marked = np.full_like(image, 255)
  for level in (-0.9, 0.5):
    args = tf.constant(image), tf.constant(level)
    got = OPERATIONS[name](*args).numpy().astype(int)
    want = np.asarray(PILLOW[name](Image.fromarray(image), level))
    inside = PILLOW[name](Image.fromarray(marked), level)
    inside = (np.asarray(inside) == 255).all(-1)
    assert 0.1 < (~inside).mean() < 0.6 or "tr" not in name
    stack = np.stack(
      [
        np.roll(inside, (y, x), (0, 1))[2:-2, 2:-2]
        for y in (-1, 0, 1)
        for x in (-1, 0, 1)
      ]
    )
    clear = stack.all(0) | ~stack.any(0)  # No border nearby.
    error = np.abs(got - want)[2:-2, 2:-2].max(-1)
    assert clear.mean() > 0.8 and error[clear].max() <= 1


def test_nothing_happens_at_level_zero(write):
  image = photograph(write)
  names = {"color", "contrast", "brightness", "sharpness"} | GEOMETRIC
  for name in names:
    got = OPERATIONS[name](tf.constant(image), tf.constant(0.0))
    np.testing.assert_array_equal(got, image, name)


def test_flat_images_survive_every_operation():
  image = tf.fill((8, 9, 3), tf.constant(77, tf.uint8))
  for name in ("auto_contrast", "equalize", "contrast", "sharpness", "color"):
    got = OPERATIONS[name](image, tf.constant(0.9))
    np.testing.assert_array_equal(got, image, name)


def run(image, count, seed=7, **options):
  """The stage's images for many seeds."""
  stage = rand_augment.rand_augment(**{"magnitude": 9.0} | options)
  examples = tf.data.Dataset.range(count).map(
    lambda i: {"image": tf.constant(image), "seed": tf.stack([seed, i])}
  )
  images = examples.map(stage).map(lambda example: example["image"])
  assert images.element_spec.shape == image.shape
  return next(images.batch(count).as_numpy_iterator())


@pytest.fixture
def named(monkeypatch):
  """Makes operation i add 1 to channel i, and its level to channel 15."""

  def operation(i):
    def function(x, a):
      mark = tf.concat([tf.one_hot(i, 15), [0.0]], 0)
      level = tf.one_hot(15, 16) * tf.round(100 + 10 * a * 10)
      return x + tf.cast(mark + level, tf.uint8)

    return function

  fakes = {str(i): operation(i) for i in range(15)}
  monkeypatch.setattr(rand_augment, "operations", lambda color: fakes)


def test_choice_and_strength_have_the_laws_of_timm(named):
  image = np.zeros((1, 1, 16), np.uint8)
  out = run(image, 4000, num_ops=1)[:, 0, 0]
  applied = out[:, :15].sum(1)
  assert set(applied) == {0, 1} and abs(applied.mean() - 0.5) < 0.03
  rates = out[:, :15].mean(0)
  assert abs(rates - 1 / 30).max() < 0.012  # Deviation 0.003.
  levels = (out[applied == 1, 15].astype(float) - 100) / 10
  assert abs((levels > 0).mean() - 0.5) < 0.04
  strength = abs(levels)
  assert abs(strength.mean() - 9) < 0.05 and abs(strength.std() - 0.5) < 0.05
  strong = run(image, 500, num_ops=1, magnitude=10.0)[:, 0, 0]
  strength = abs(strong[strong[:, 15] > 0, 15] - 100.0) / 10
  assert strength.max() == 10 and 0.3 < (strength == 10).mean() < 0.7


def test_operations_are_drawn_independently_with_replacement(named):
  out = run(np.zeros((1, 1, 16), np.uint8), 4000, num_ops=2)[:, 0, 0, :15]
  number = out.sum(1)
  np.testing.assert_allclose(
    np.bincount(number) / 4000, [0.25, 0.5, 0.25], atol=0.03
  )
  twice = (out == 2).any(1)[number == 2]
  assert abs(twice.mean() - 1 / 15) < 0.025


def test_images_are_functions_of_the_seed(write):
  image = photograph(write)
  a, b, c = run(image, 20), run(image, 20), run(image, 20, seed=8)
  np.testing.assert_array_equal(a, b)
  assert len({x.tobytes() for x in (*a, *c)}) > 25  # A quarter is unchanged.
  assert 1 < sum((x == image).all() for x in (*a, *c)) < 20


def test_grey_images_pass(write):
  image = photograph(write, 1)[..., None]
  out = run(image, 40)
  assert out.dtype == np.uint8 and len({x.tobytes() for x in out}) > 15
