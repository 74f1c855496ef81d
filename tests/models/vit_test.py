import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umae_jax import models
from umae_jax.models import patches, vit

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


def test_the_last_tokens_alone_are_those_of_all(block):
  module, params, x = block
  factors = jnp.asarray([[0.5, 2.0], [0.0, 1.0], [1.0, 0.0]])
  for given in (None, factors):
    whole = module.apply({"params": params}, x, given)
    some = module.clone(last=2).apply({"params": params}, x, given)
    np.testing.assert_allclose(some, whole[:, -2:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("scan", [False, True])
def test_execution_changes_neither_parameters_nor_results(
  remat, scan, dropping
):
  """Value and gradient; and it does what it is for, in the program."""
  patches = jax.random.normal(jax.random.key(1), (2, 4, 12))
  positions = jax.random.normal(jax.random.key(2), (1, 4, 16))
  noise = jax.random.uniform(jax.random.key(3), (2, 3, 2))
  noise = noise if dropping else None

  def make(execution):
    encoder = vit.Encoder(16, 3, 2, drop_path=0.5, execution=execution)
    params = encoder.init(jax.random.key(0), patches, positions)

    def loss(params):
      return jnp.square(
        encoder.apply(params, patches, positions, noise)[:, ::2]
      ).sum()

    return params, jax.jit(jax.value_and_grad(loss))

  params, plain = make(vit.Execution())
  same, other = make(vit.Execution(remat=remat, scan_layers=scan))
  chex.assert_trees_all_equal(params, same)
  chex.assert_trees_all_close(
    plain(params), other(params), rtol=1e-4, atol=1e-5
  )
  jaxpr = str(jax.make_jaxpr(other)(params))
  assert ("scan[" in jaxpr) == scan
  assert ("remat" in jaxpr or "checkpoint" in jaxpr) == (remat != "none")
  assert "scan[" not in str(jax.make_jaxpr(plain)(params))
  if remat != "none":  # More runs again for the gradient than with less.
    less = {"dots": "none", "full": "dots"}[remat]
    _, less = make(vit.Execution(remat=less, scan_layers=scan))
    fewer = str(jax.make_jaxpr(less)(params)).count("dot_general")
    assert fewer < jaxpr.count("dot_general")


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


# Dropping.


def drop(noise, rate=0.5):
  """A block of that rate on (3, 5, D) tokens, with noise (3, 2) or None."""
  x = jax.random.normal(jax.random.key(1), (3, 5, 16))
  module = vit.Block(4)
  variables = jax.jit(module.init)(jax.random.key(0), x)
  factors = None
  if noise is not None:  # Of the last of two blocks.
    factors = vit.drop_factors(jnp.stack([noise, noise], 1), rate)[:, 1]
  return x, jax.jit(module.apply)(variables, x, factors)


def test_a_dropped_image_passes_unchanged_and_the_others_do_not():
  noise = jnp.array([[0.0, 0.49], [0.5, 0.5], [0.9, 0.1]])
  x, y = drop(noise)
  np.testing.assert_array_equal(x[0], y[0])
  _, alone = drop(noise.at[::2].set(0.7))  # Other images do not matter.
  np.testing.assert_allclose(y[1], alone[1], rtol=1e-6)
  _, whole = drop(None)
  assert np.abs(y[1] - whole[1]).max() > 1e-2  # Scaled.
  assert np.abs(y[2] - x[2]).max() > 1e-2


def test_a_kept_branch_is_scaled_so_that_the_mean_stays():
  noise = jax.random.uniform(jax.random.key(2), (1000, 2, 2))
  got = np.asarray(vit.drop_factors(noise, 0.2))
  kept = np.asarray(noise)[:, 1] >= 0.2
  np.testing.assert_array_equal(got[:, 0], 1)  # The first block's rate is 0.
  np.testing.assert_allclose(got[:, 1][kept], 1 / 0.8, rtol=1e-6)
  assert not got[:, 1][~kept].any() and 300 < (~kept).sum() < 500


@pytest.mark.parametrize("depth, rates", [(3, (0, 0.2, 0.4)), (1, (0,))])
def test_the_rate_rises_linearly_to_the_last_block(depth, rates):
  """Noise just below and just at a block's rate drops it, and does not."""
  images = jax.random.normal(jax.random.key(1), (1, 4, 12))
  positions = jnp.zeros((1, 4, 16))
  module = vit.Encoder(16, depth, 2, drop_path=0.4, final_norm=False)
  variables = jax.jit(module.init)(jax.random.key(0), images, positions)
  apply = jax.jit(module.apply)
  whole = apply(variables, images, positions)
  plain = vit.Encoder(16, depth, 2, final_norm=False)
  same = plain.apply(variables, images, positions)
  np.testing.assert_allclose(whole, same, rtol=1e-6, atol=1e-6)

  def run(block, value):
    noise = jnp.full((1, depth, 2), 0.99).at[0, block].set(value)
    return np.asarray(apply(variables, images, positions, noise))

  for block, rate in enumerate(rates):
    above, just = run(block, 0.99), run(block, rate + 1e-6)
    np.testing.assert_array_equal(just, above)
    if rate:
      assert np.abs(run(block, rate - 1e-6) - above).max() > 1e-3


def test_a_table_in_the_parameters_takes_the_place_of_fixed_positions():
  mae = models.MaskedAutoencoder(4, 16, 1, 2, 8, 1, 2)
  images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
  noise = jnp.tile(jnp.arange(4.0), (2, 1))
  params = mae.init(jax.random.key(0), images, noise, 0.5)["params"]
  assert not any("pos_embed" in params[x] for x in ("encoder", "decoder"))
  apply = jax.jit(
    lambda params: mae.apply({"params": params}, images, noise, 0.5)
  )
  fixed = apply(params)

  def give(name, width, change=0.0, row=0.0):
    table = patches.sincos_positions((2, 2), width) + change
    table = np.pad(table, ((0, 0), (1, 0), (0, 0)))
    table[0, 0] += row
    return params | {name: params[name] | {"pos_embed": table}}

  for name, width in (("encoder", 16), ("decoder", 8)):
    same = apply(give(name, width))
    chex.assert_trees_all_close(same, fixed, rtol=1e-5, atol=1e-6)
    change = np.linspace(0, 1, width, dtype=np.float32)
    for other in (
      apply(give(name, width, change)),
      apply(give(name, width, 0.0, change)),
    ):
      assert np.abs(other.prediction - fixed.prediction).max() > 1e-3
      changed = np.abs(other.tokens - fixed.tokens).max() > 1e-3
      assert changed == (name == "encoder")
  with pytest.raises(
    ValueError, match=r"3 x 2 patches does not fit.*of 4 patc"
  ):
    big = jnp.zeros((2, 12, 8, 3))
    mae.apply({"params": give("encoder", 16)}, big, method=mae.encode)
