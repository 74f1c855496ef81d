import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umae_jax import models
from umae_jax.models import patches


def make(pool="mean", **fields):
  fields = dict(patch_size=4, width=16, depth=2, num_heads=2) | fields
  return models.Classifier(num_classes=5, pool=pool, **fields)


def images(size=(8, 12), batch=2):
  return jax.random.normal(jax.random.key(1), (batch, *size, 3))


@functools.cache
def initial(pool):
  return jax.jit(make(pool).init)(jax.random.key(0), images())["params"]


def init(pool):
  params = jax.tree.map(jnp.asarray, initial(pool))
  # A head so small as the initial one would hide differences.
  head = params["head"] | {"kernel": 1e5 * params["head"]["kernel"]}
  return {"params": params | {"head": head}}


def test_parameters_are_an_autoencoders_with_positions_and_a_head():
  mae = models.MaskedAutoencoder(4, 16, 2, 2, 8, 1, 2)
  noise = jnp.zeros((2, 6))
  expected = jax.eval_shape(mae.init, jax.random.key(0), images(), noise)
  expected = dict(expected["params"]["encoder"])
  params = initial("cls")
  table = params["encoder"]["pos_embed"]
  expected["pos_embed"] = table
  chex.assert_trees_all_equal_shapes_and_dtypes(params["encoder"], expected)
  assert params.keys() == {"encoder", "head"}
  np.testing.assert_array_equal(
    table[:, 1:], patches.sincos_positions((2, 3), 16)
  )
  assert (table[:, 0] == 0).all() and table.dtype == jnp.float32
  kernel = params["head"]["kernel"]
  assert kernel.shape == (16, 5) and 1e-5 < kernel.std() < 3e-5
  params = initial("mean")
  assert params.keys() == {"encoder", "head", "fc_norm"}
  assert "norm" not in params["encoder"]


def test_the_class_token_is_read_after_the_final_norm():
  model = make("cls")
  variables = init("cls")
  tokens = model.apply(variables, images(), method=model.encode)
  head = variables["params"]["head"]
  logits = jax.jit(model.apply)(variables, images())
  assert logits.dtype == jnp.float32
  expected = tokens[:, 0] @ head["kernel"] + head["bias"][None]
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
  # The same tokens as an autoencoder's of the same parameters.
  mae = models.MaskedAutoencoder(4, 16, 2, 2, 8, 1, 2)
  same = mae.apply(variables, images(), method=mae.encode)
  np.testing.assert_allclose(tokens, same, rtol=1e-5, atol=1e-6)


def test_the_mean_is_of_patches_before_its_own_norm():
  model = make("mean")
  variables = init("mean")
  norm = {"scale": jnp.linspace(1, 2, 16), "bias": jnp.linspace(0, 1, 16)}
  variables["params"]["fc_norm"] = norm
  tokens = model.apply(variables, images(), method=model.encode)
  assert np.abs(tokens.std(-1) - 1).max() > 0.05  # Not normalised.
  x = np.asarray(tokens, np.float64)[:, 1:].mean(1)
  x = (x - x.mean(1)[:, None]) / np.sqrt(x.var(1)[:, None] + 1e-6)
  x = x * norm["scale"][None] + norm["bias"][None]
  expected = x @ np.asarray(variables["params"]["head"]["kernel"])
  logits = jax.jit(model.apply)(variables, images())
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_positions_train_and_the_class_row_with_them():
  model = make("cls")
  variables = init("cls")

  def loss(variables):
    return jnp.square(model.apply(variables, images())).sum()

  grads = jax.jit(jax.grad(loss))(variables)["params"]["encoder"]["pos_embed"]
  assert (jnp.abs(grads).max(-1) > 0).all()


def test_dropping_is_a_function_of_the_noise():
  model = make("mean", drop_path=0.5)
  variables = init("mean")
  apply = jax.jit(model.apply)
  noise = jax.random.uniform(jax.random.key(2), (2, 2, 2))
  whole = apply(variables, images())
  np.testing.assert_array_equal(
    apply(variables, images(), noise), apply(variables, images(), noise)
  )
  assert np.abs(apply(variables, images(), noise) - whole).max() > 1e-3
  never = make("mean").apply(variables, images(), noise)  # Its rate is 0.
  np.testing.assert_allclose(never, whole, rtol=1e-5, atol=1e-6)


def test_bfloat16_gives_float32_logits_near_float32_ones():
  variables = init("cls")
  exact = make("cls").apply(variables, images())
  model = make("cls", dtype=jnp.bfloat16)
  logits = jax.jit(model.apply)(variables, images())
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, exact, atol=0.1 * np.abs(exact).max())


def test_what_does_not_fit_is_refused_with_the_remedy():
  model = make("mean")
  variables = init("mean")
  message = "2 x 2 patches does not fit pos_embed, a table of 6 .*image_size"
  with pytest.raises(ValueError, match=message):
    model.apply(variables, images((8, 8)))
  with pytest.raises(ValueError, match=r"drop_noise has shape \(2, 3\).*2, 2"):
    model.apply(variables, images(), jnp.zeros((2, 3)))
  with pytest.raises(ValueError, match="pool='max' is not one of"):
    make("max").init(jax.random.key(0), images())
