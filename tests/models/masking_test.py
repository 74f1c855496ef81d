import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umae_jax.models import masking


def noise(batch=64, patches=16, seed=0):
  return jax.random.uniform(jax.random.key(seed), (batch, patches))


def test_the_smallest_noise_stays_visible():
  values = jnp.array([[0.9, 0.1, 0.5, 0.3]])
  split = masking.from_noise(values, 2)
  np.testing.assert_array_equal(split.shuffle, [[1, 3, 2, 0]])
  np.testing.assert_array_equal(split.mask, [[1, 0, 1, 0]])


def test_restore_inverts_shuffle():
  split = masking.from_noise(noise(), 4)
  back = jnp.take_along_axis(split.shuffle, split.restore, axis=1)
  np.testing.assert_array_equal(back, np.tile(np.arange(16), (64, 1)))


def test_every_image_has_its_own_mask_with_k_visible():
  mask = np.asarray(masking.from_noise(noise(), 4).mask)
  np.testing.assert_array_equal(mask.sum(1), 12)
  assert len(np.unique(mask, axis=0)) > 60
  # Every patch is removed three quarters of the time: 5 deviations of 64 draws.
  assert np.abs(mask.mean(0) - 0.75).max() < 5 * np.sqrt(0.75 * 0.25 / 64)


def test_permute_and_its_gradient_equal_take():
  x = jax.random.normal(jax.random.key(1), (64, 16, 3))
  weight = jax.random.normal(jax.random.key(2), (64, 16, 3))
  split = masking.from_noise(noise(), 4)

  def by_permute(x):
    return (weight * masking.permute(x, split.shuffle, split.restore)).sum()

  def by_take(x):
    return (weight * masking.take(x, split.shuffle)).sum()

  np.testing.assert_allclose(by_permute(x), by_take(x), rtol=1e-6)
  np.testing.assert_array_equal(jax.grad(by_permute)(x), jax.grad(by_take)(x))
  compiled = jax.jit(jax.grad(by_permute)).lower(x).compile().as_text()
  assert "scatter" not in compiled
  assert "scatter" in jax.jit(jax.grad(by_take)).lower(x).compile().as_text()


@pytest.mark.parametrize(
  "patches, ratio, visible", [(196, 0.75, 49), (16, 0.6, 6)]
)
def test_number_of_visible_patches(patches, ratio, visible):
  assert masking.num_visible(patches, ratio) == visible


@pytest.mark.parametrize("ratio", [0.0, 0.95, 1.0, 1.5, -0.5])
def test_ratios_that_leave_nothing_are_refused(ratio):
  with pytest.raises(ValueError, match=f"mask_ratio={ratio}"):
    masking.num_visible(16, ratio)
