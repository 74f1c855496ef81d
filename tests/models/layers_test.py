import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umae_jax.models import layers


def test_gelu_is_the_exact_one():
  x = np.linspace(-9, 9, 1001, dtype=np.float32)
  exact = [0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x.astype(float)]
  np.testing.assert_allclose(layers.gelu(x), exact, atol=5e-7)
  slope = jax.vmap(jax.grad(layers.gelu))(jnp.asarray(x))
  np.testing.assert_allclose(slope, np.gradient(exact, x), atol=1e-3)


@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12)])
def test_layer_norm_and_its_gradients_are_flaxs(shape):
  x = 3 + 2 * jax.random.normal(jax.random.key(0), shape)
  weight = jax.random.normal(jax.random.key(1), shape)
  params = {
    "scale": jax.random.normal(jax.random.key(2), (12,)),
    "bias": jax.random.normal(jax.random.key(3), (12,)),
  }

  def both(module):
    def loss(params, x):
      return (weight * module.apply({"params": params}, x)).sum()

    return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

  ours = both(layers.LayerNorm(epsilon=0.1))
  theirs = both(nn.LayerNorm(epsilon=0.1))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_layer_norm_starts_as_flaxs_and_keeps_float32_inside():
  x = 100 + jax.random.normal(jax.random.key(0), (4, 64), jnp.bfloat16)
  module = layers.LayerNorm(jnp.bfloat16)
  params = module.init(jax.random.key(0), x)
  expected = nn.LayerNorm().init(jax.random.key(0), x)
  assert jax.tree.structure(params) == jax.tree.structure(expected)
  out = module.apply(params, x)
  assert out.dtype == jnp.bfloat16
  y = np.asarray(x, np.float64)
  exact = (y - y.mean(-1, keepdims=True)) / y.std(-1, keepdims=True)
  np.testing.assert_allclose(out.astype(np.float32), exact, atol=0.02)
  grad = jax.grad(lambda x: module.apply(params, x).astype(np.float32).max())(x)
  assert (
    grad.dtype == jnp.bfloat16 and np.isfinite(grad.astype(np.float32)).all()
  )
