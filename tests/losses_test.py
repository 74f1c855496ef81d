import functools
import re

import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umae_jax import losses, sharding
from umae_jax.models import patches


def uniformity_reference(features):
  """Float64, the definition spelled out pair by pair."""
  total, n = 0.0, len(features)
  for a in features.astype(np.float64):
    for b in features.astype(np.float64):
      total += (a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) ** 2
  return total / n**2


def uniformity_gradient_reference(features, epsilon=1e-6):
  """Central differences of the float64 definition."""
  grad = np.zeros(features.shape)
  for index in np.ndindex(*features.shape):
    step = np.zeros(features.shape)
    step[index] = epsilon
    above = uniformity_reference(features + step)
    below = uniformity_reference(features - step)
    grad[index] = (above - below) / (2 * epsilon)
  return grad


@pytest.mark.parametrize("shape", [(1, 4), (7, 3), (32, 64)])
def test_uniformity_matches_float64_definition(shape):
  features = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  got = jax.jit(losses.uniformity_loss)(features)
  np.testing.assert_allclose(got, uniformity_reference(features), rtol=1e-6)


def test_uniformity_gradient_matches_float64_differences():
  features = np.random.default_rng(0).normal(size=(6, 4))
  got = jax.grad(losses.uniformity_loss)(jnp.asarray(features, jnp.float32))
  expected = uniformity_gradient_reference(features)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
  "features, expected",
  [
    ([[1.0, 0.0], [1.0, 1.0]], 0.75),  # (1 + 1 + 1/2 + 1/2) / 4, by hand.
    (np.eye(4), 1 / 4),  # Orthonormal rows: the lower bound, 1 / min(B, D).
    (np.tile(np.eye(2), (3, 1)), 1 / 2),  # B = 6 > D = 2: 1 / D.
    (np.full((5, 3), -2.0), 1.0),  # Collapsed: the upper bound.
    (np.zeros((5, 3)), 0.0),  # Zero rows count as similarity zero.
  ],
)
def test_uniformity_known_values(features, expected):
  got = losses.uniformity_loss(jnp.array(features, jnp.float32))
  np.testing.assert_allclose(got, expected, rtol=1e-6)


@hypothesis.settings(max_examples=30, deadline=None, database=None)
@hypothesis.given(
  batch=st.integers(1, 6),
  width=st.integers(1, 6),
  scale=st.floats(1e-6, 1e6),
  shift=st.floats(-3, 3),
  seed=st.integers(0, 2**31),
)
def test_uniformity_keeps_its_bounds(batch, width, scale, shift, seed):
  rng = np.random.default_rng(seed)
  features = (rng.normal(size=(batch, width)) + shift) * scale
  got = losses.uniformity_loss(jnp.asarray(features, jnp.float32))
  assert 1 / min(batch, width) - 1e-5 <= got <= 1 + 1e-5


def test_uniformity_ignores_the_scale_of_rows_and_is_float32():
  features = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
  scaled = features * np.arange(1, 9, dtype=np.float32)[:, None]
  loss = losses.uniformity_loss(features)
  np.testing.assert_allclose(losses.uniformity_loss(scaled), loss, rtol=1e-6)
  assert (
    losses.uniformity_loss(features.astype(jnp.bfloat16)).dtype == "float32"
  )


def test_uniformity_gradient_is_finite_at_a_zero_row():
  features = jnp.array([[0.0, 0.0], [1.0, 2.0]])
  chex.assert_tree_all_finite(jax.grad(losses.uniformity_loss)(features))


FEATURES = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
# Data that differ between devices: each device's rows have a mean of their own.
FEATURES += np.repeat(np.random.default_rng(1).normal(size=(8, 16)), 4, axis=0)


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_value_and_gradient_are_the_global_ones_on_any_devices(num_devices):
  mesh = sharding.make_mesh(devices=jax.devices()[:num_devices])
  features = sharding.to_global(FEATURES, mesh)
  assert len(features.sharding.device_set) == num_devices
  value, grad = jax.jit(jax.value_and_grad(losses.uniformity_loss))(features)
  expected = uniformity_reference(FEATURES)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  one = jax.grad(losses.uniformity_loss)(jnp.asarray(FEATURES))
  np.testing.assert_allclose(grad, one, rtol=1e-4, atol=1e-8)


def test_the_devices_sum_one_d_by_d_matrix_and_nothing_of_the_batch():
  """Of the compiled value and gradient, for two sizes of the batch."""
  mesh = sharding.make_mesh(devices=jax.devices())
  step = jax.jit(
    jax.value_and_grad(losses.uniformity_loss),
    out_shardings=(sharding.replicated(mesh), sharding.batch_sharding(mesh)),
  )
  kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
  for copies in (1, 4):
    features = sharding.to_global(np.tile(FEATURES, (copies, 1)), mesh)
    text = step.lower(features).compile().as_text()
    found = re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", text)
    assert [kind for _, kind in found] == ["all-reduce"]
    assert found[0][0].startswith("f32[16,16]")
    rows = len(features)  # Nor is there a matrix of all pairs.
    assert f"[{rows},{rows}]" not in text
    assert f"[{rows // 8},{rows}]" not in text


def test_an_average_over_devices_would_be_another_loss():
  """The test above can fail: local losses average to something else."""
  expected = uniformity_reference(FEATURES)
  for parts in (2, 4, 8):
    split = np.split(FEATURES, parts)
    local = np.mean([losses.uniformity_loss(x) for x in split])
    assert not np.isclose(local, expected, rtol=0.05)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_released_code_has_one_over_w_of_the_true_gradient(processes):
  """Its gather lets no gradient through to the other processes' rows.

  Each process differentiates the global loss with respect to its own rows
  only, and DistributedDataParallel averages the parameter gradients: 1 / W of
  the sum, which is the true one. Here, features are linear in a weight.
  """
  inputs = np.random.default_rng(2).normal(size=(32, 5)).astype(np.float32)
  weight = jnp.asarray(np.random.default_rng(3).normal(size=(5, 16)), "float32")

  def true_loss(weight):
    return losses.uniformity_loss(inputs @ weight)

  def loss_of_process(weight, rank):
    own = np.repeat(np.arange(processes), 32 // processes) == rank
    features = inputs @ weight
    gathered = jax.lax.stop_gradient(features)
    return losses.uniformity_loss(jnp.where(own[:, None], features, gathered))

  released = sum(
    jax.grad(loss_of_process)(weight, rank) for rank in range(processes)
  )
  released = released / processes  # What DistributedDataParallel does.
  true = jax.grad(true_loss)(weight)
  np.testing.assert_allclose(released, true / processes, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_with_the_batch_moment_have_the_gradient_of_the_batch(parts):
  split = jnp.stack(np.split(FEATURES, parts))
  moment = jax.vmap(losses.second_moment)(split).mean(0)
  value, grad = jax.vmap(
    jax.value_and_grad(losses.uniformity_loss), in_axes=(0, None)
  )(split, moment)
  whole, expected = jax.value_and_grad(losses.uniformity_loss)(
    jnp.asarray(FEATURES)
  )
  np.testing.assert_allclose(value, np.full(parts, whole), rtol=1e-6)
  np.testing.assert_allclose(
    grad.reshape(expected.shape) / parts, expected, rtol=1e-4, atol=1e-8
  )


def reconstruction_reference(images, prediction, mask, patch_size, normalize):
  """Float64 loops over images, patches and values."""
  total, removed = 0.0, 0
  p = patch_size
  for image, predicted, hidden in zip(images, prediction, mask):
    columns = image.shape[1] // p
    for patch in np.flatnonzero(hidden):
      y, x = p * (patch // columns), p * (patch % columns)
      target = image[y : y + p, x : x + p].astype(np.float64).ravel()
      if normalize:
        deviation = np.sqrt(np.var(target, ddof=1) + 1e-6)
        target = (target - target.mean()) / deviation
      total += np.mean((predicted[patch] - target) ** 2)
      removed += 1
  return total / removed


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("patch_size, channels", [(2, 1), (4, 3)])
def test_reconstruction_matches_float64_loops(normalize, patch_size, channels):
  rng = np.random.default_rng(0)
  images = rng.normal(size=(3, 8, 12, channels)).astype(np.float32)
  count = 96 // patch_size**2
  prediction = rng.normal(size=(3, count, patch_size**2 * channels))
  prediction = prediction.astype(np.float32)
  mask = (rng.uniform(size=(3, count)) < 0.7).astype(np.float32)
  loss = functools.partial(
    losses.reconstruction_loss,
    patch_size=patch_size,
    normalize_pixels=normalize,
  )
  got = jax.jit(loss)(images, prediction, mask)
  expected = reconstruction_reference(
    images, prediction, mask, patch_size, normalize
  )
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_reconstruction_looks_at_removed_patches_only():
  images = jnp.ones((1, 4, 4, 1))
  prediction = patches.patchify(images, 2).at[0, 0].set(7.0)
  loss = functools.partial(
    losses.reconstruction_loss, patch_size=2, normalize_pixels=False
  )
  assert loss(images, prediction, jnp.array([[0.0, 1.0, 1.0, 1.0]])) == 0
  assert loss(images, prediction, jnp.array([[1.0, 0.0, 0.0, 0.0]])) == 36


@pytest.mark.parametrize(
  "second, expected",
  [
    ([[2.0, 0.0], [0.0, 1.0]], 0.0),  # Parallel, whatever the length.
    ([[0.0, 5.0], [1.0, 0.0]], 2.0),  # Orthogonal.
    ([[-1.0, 0.0], [0.0, 3.0]], 2.0),  # Opposite, 4, and parallel, 0.
    ([[0.0, 0.0], [0.0, 1.0]], 0.5),  # A zero row: |z|^2 = 1, and 0.
  ],
)
def test_alignment_known_values(second, expected):
  first = jnp.array([[3.0, 0.0], [0.0, 0.5]])
  got = losses.alignment_loss(first, jnp.array(second))
  np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-12)
