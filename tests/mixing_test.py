import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from umae_jax import mixing

KEY = jax.random.key(0)
NUMBER = 1000  # Of the images to mix, few shapes: compiling takes longest.
random_erasing = jax.jit(mixing.random_erasing)
mix = jax.jit(mixing.mix, static_argnames=("mixup", "cutmix"))


def numbered(b=NUMBER, h=16, w=20, c=3):
  """Every image one value, its number."""
  return (
    jnp.broadcast_to(jnp.arange(b)[:, None, None, None], (b, h, w, c)) * 1.0
  )


def erase(probability, b=2000, h=32, w=24, c=2, key=KEY):
  """The erased images, none of whose pixels was noise, and where they are."""
  images = jnp.full((b, h, w, c), 100.0)
  out = np.asarray(random_erasing(key, images, probability))
  return out, (out != 100)


def extents(inside):
  """(B,) top, left, height, width of the rectangles; all must be full."""
  rows, columns = inside.any((2, 3)), inside.any((1, 3))
  boxes = []
  for mask, r, c in zip(inside, rows, columns):
    y, x = np.flatnonzero(r), np.flatnonzero(c)
    assert mask[y[0] : y[-1] + 1, x[0] : x[-1] + 1].all()
    assert mask.sum() == mask.shape[-1] * len(y) * len(x)
    boxes.append((y[0], x[0], len(y), len(x)))
  return np.array(boxes).T


def test_erased_rectangles_have_the_distribution_of_timm():
  out, inside = erase(1.0)
  assert inside.any((1, 2, 3)).all()
  top, left, height, width = extents(inside)
  area, aspect = height * width / (32 * 24), height / width
  assert 0.015 < area.min() < 0.03 and 0.32 < area.max() < 0.36
  assert 0.25 < aspect.min() < 0.35 and 2.8 < aspect.max() < 4
  # Uniform, log-uniform, where nothing is drawn again for want of room.
  small = area < 0.17
  counts, _ = np.histogram(area[small], 3, (0.02, 0.17))
  assert counts.min() > 0.8 * counts.mean()
  assert abs(np.log(aspect[small]).mean()) < 0.06
  assert abs(np.log(aspect[small]).std() - 2 * np.log(1 / 0.3) / 12**0.5) < 0.06
  for corner, room in ((top, 32 - height), (left, 24 - width)):
    assert (corner == 0).any() and (corner == room).any()
    assert abs((corner / room).mean() - 0.5) < 0.03
  noise = out[inside]
  assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
  pairs = out[inside.all(-1)]  # Each channel has its own.
  assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.02


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_so_many_images_are_erased(probability):
  _, inside = erase(probability)
  rate = inside.any((1, 2, 3)).mean()
  assert abs(rate - probability) < 0.03
  assert rate == probability or 0 < probability < 1


def test_an_image_without_room_is_left_as_it_is():
  out, _ = erase(1.0, b=8, h=1, w=100)
  assert (out == 100).all()


def mixed(mixup=0.8, cutmix=1.0, key=KEY, **options):
  """Mixes numbered images; returns (images, targets, weights of their own)."""
  images, targets = mix(
    key, numbered(), jnp.eye(NUMBER), mixup=mixup, cutmix=cutmix, **options
  )
  images, targets = np.asarray(images), np.asarray(targets)
  return images, targets, np.diag(targets)


def test_the_partner_is_the_image_from_the_other_end():
  for options in ({"mixup": 0.0}, {"cutmix": 0.0}, {}):
    _, targets, own = mixed(**options)
    partner = np.diag(targets[:, ::-1])
    np.testing.assert_allclose(own + partner, 1, rtol=1e-6)
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
    assert len(np.unique(own)) > 50  # Drawn for every image.


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_weights_of_the_labels_are_the_shares_of_the_pixels(mixup, cutmix):
  images, _, own = mixed(mixup=mixup, cutmix=cutmix)
  number = np.arange(NUMBER)
  share = own * number + (1 - own) * number[::-1]
  np.testing.assert_allclose(images.mean((1, 2, 3)), share, rtol=1e-4)


def is_pasted(images):
  """Whether each holds pixels of one image or the other, and none between."""
  number = np.arange(len(images))[:, None, None, None]
  other = len(images) - 1 - number
  return ((images == number) | (images == other)).all((1, 2, 3))


def test_pasted_boxes_are_boxes_anywhere():
  images, _, own = mixed(mixup=0.0)
  assert is_pasted(images).all()
  inside = images == np.arange(NUMBER)[::-1, None, None, None]
  some = inside.any((1, 2, 3))
  assert 0.9 < some.mean() < 1  # The smallest have no pixel.
  top, left, height, width = extents(inside[some])
  assert top.min() == left.min() == 0
  assert (top + height).max() == 16 and (left + width).max() == 20
  free = (top > 0) & (left > 0) & (top + height < 16) & (left + width < 20)
  # Not clipped: even sides of the image's proportions.
  assert (height[free] % 2 == 0).all() and (width[free] % 2 == 0).all()
  assert (abs(height[free] / 16 - width[free] / 20) <= 2 / 16).all()
  covered = 1 - own
  assert covered.max() > 0.7
  # With lambda uniform, and a centre uniform over the image, by quadrature:
  side, centre = np.linspace(0, 1, 401), np.linspace(0, 1, 401)
  clipped = np.minimum(centre[:, None] + side / 2, 1)
  clipped -= np.maximum(centre[:, None] - side / 2, 0)
  mean = (clipped.mean(0) ** 2 * 2 * side).mean()  # 2 s ds, of 1 - s^2.
  assert abs(covered.mean() - mean) < 0.08


def test_lambda_has_its_law():
  for a, deviation in ((0.8, (1 / (4 * 2.6)) ** 0.5), (8.0, (1 / 68) ** 0.5)):
    *_, own = mixed(mixup=a, cutmix=0.0)
    assert abs(own.mean() - 0.5) < 0.03
    assert abs(own.std() - deviation) < 0.02


@pytest.mark.parametrize("switch", [0.0, 0.2, 0.5, 1.0])
def test_the_switch_chooses_for_each_image(switch):
  images, *_ = mixed(switch=switch)
  rate = is_pasted(images).mean()
  assert abs(rate - switch) < 0.05


def test_nothing_to_mix_is_nothing_done():
  images, targets = numbered(4), jnp.eye(4)
  out = mixing.mix(KEY, images, targets, mixup=0.0, cutmix=0.0)
  assert out[0] is images and out[1] is targets


def test_labels_are_smoothed_as_in_timm():
  got = mixing.smooth_labels(jnp.array([2, 0]), 4, 0.1)
  want = [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]
  np.testing.assert_allclose(got, want, rtol=1e-6)
  got = mixing.smooth_labels(jnp.array([1]), 3, 0.0)
  np.testing.assert_array_equal(got, [[0, 1, 0]])


def augment(key, images, labels):
  erased, mixed = jax.random.split(key)
  images = mixing.random_erasing(erased, images, 0.5)
  targets = mixing.smooth_labels(labels, 5, 0.1)
  return mixing.mix(mixed, images, targets, mixup=0.8, cutmix=1.0)


def test_devices_make_no_difference():
  images = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype("f4")
  labels = np.arange(16) % 5
  want = jax.jit(augment)(KEY, images, labels)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, PartitionSpec("data"))
  args = jax.device_put((images, labels), split)
  got = jax.jit(augment, out_shardings=split)(KEY, *args)
  for a, b in zip(got, want):
    assert len(a.sharding.device_set) == 8
    np.testing.assert_allclose(a, b, atol=1e-6)
  other = jax.jit(augment)(jax.random.key(1), images, labels)
  assert abs(other[1] - want[1]).max() > 0.1


def test_types_are_kept():
  images = numbered(4).astype(jnp.bfloat16)
  out = random_erasing(KEY, images, 0.5)
  assert out.dtype == jnp.bfloat16
  out, targets = mix(KEY, images, jnp.eye(4), mixup=0.8, cutmix=1.0)
  assert out.dtype == jnp.bfloat16 and targets.dtype == jnp.float32
