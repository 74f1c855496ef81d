import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umae_jax.models import vit

HEADS, WIDTH, TOKENS = 2, 8, 5


def block_reference(params, x):
  """One image, in float64 loops over heads and tokens."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

  def norm(x, p):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]

  def linear(x, p):
    return x @ p["kernel"] + p["bias"]

  qkv = linear(norm(x, p["norm1"]), p["attn"]["qkv"])
  query, key, value = np.split(qkv, 3, axis=-1)
  size = WIDTH // HEADS
  mixed = np.zeros_like(x)
  for head in range(HEADS):
    part = slice(head * size, (head + 1) * size)
    for t in range(TOKENS):
      logits = key[:, part] @ query[t, part] / math.sqrt(size)
      weights = np.exp(logits - logits.max())
      mixed[t, part] = weights / weights.sum() @ value[:, part]
  x = x + linear(mixed, p["attn"]["proj"])
  y = linear(norm(x, p["norm2"]), p["fc1"])
  y = 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
  return x + linear(y, p["fc2"])


@pytest.fixture(scope="module")
def block():
  """(module, params away from their initial zeros and ones, input)."""
  module = vit.Block(HEADS)
  x = jax.random.normal(jax.random.key(1), (3, TOKENS, WIDTH))
  params = module.init(jax.random.key(0), x)["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda a: jnp.float32(a + 0.3 * rng.normal(size=a.shape)), params
  )
  return module, params, x


def test_block_equals_float64_loops(block):
  module, params, x = block
  got = module.apply({"params": params}, x)
  expected = [block_reference(params, np.float64(image)) for image in x]
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_images_do_not_see_one_another(block):
  module, params, x = block
  alone = module.apply({"params": params}, x[:1])
  together = module.apply({"params": params}, x)[:1]
  np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-6)


def test_initial_kernels_are_xavier_uniform_and_biases_zero():
  """Of the fused qkv, too: its fan is (D, 3 D), as in MAE."""
  x = jnp.zeros((1, 4, 64))
  params = vit.Block(4).init(jax.random.key(0), x)["params"]
  for name, fans in (("qkv", (64, 192)), ("proj", (64, 64))):
    kernel = params["attn"][name]["kernel"]
    bound = math.sqrt(6 / sum(fans))
    assert kernel.shape == fans
    assert 0.98 * bound < np.abs(kernel).max() <= bound
    np.testing.assert_allclose(kernel.std(), bound / math.sqrt(3), rtol=0.05)
    np.testing.assert_array_equal(params["attn"][name]["bias"], 0)
