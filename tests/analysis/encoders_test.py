import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umae_jax import models
from umae_jax.analysis import encoders
from umae_jax.models import layers, vit

DEPTH, HEADS, WIDTH, RATIO = 3, 2, 16, 0.5
MODEL = models.MaskedAutoencoder(
  patch_size=2,
  width=WIDTH,
  depth=DEPTH,
  num_heads=HEADS,
  decoder_width=8,
  decoder_depth=1,
  decoder_num_heads=2,
)
KEYS = jax.random.split(jax.random.key(0), 4)
IMAGES = jax.random.normal(KEYS[0], (5, 8, 6, 3))
NOISE = jax.random.uniform(KEYS[1], (5, 12))
VIEWS = {"whole": (), "masked": (NOISE, RATIO)}


@pytest.fixture(scope="module", params=["fixed positions", "a table"])
def params(request):
  """Trained ones have no zero biases, and need not have a decoder."""
  params = MODEL.init(KEYS[2], IMAGES, NOISE)["params"]
  leaves, structure = jax.tree.flatten({"encoder": params["encoder"]})
  keys = jax.random.split(KEYS[3], len(leaves))
  leaves = [
    x + 0.3 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves)
  ]
  params = jax.tree.unflatten(structure, leaves)
  if request.param == "a table":
    table = jax.random.normal(KEYS[0], (1, 13, WIDTH))
    params["encoder"]["pos_embed"] = table
  return params


@pytest.fixture(params=VIEWS)
def found(request, params):
  """(layers, what the model itself returns)."""
  given = VIEWS[request.param]
  method = MODEL.encode_visible if given else MODEL.encode
  out = MODEL.apply({"params": params}, IMAGES, *given, method=method)
  return encoders.layers(MODEL, params, IMAGES, *given), out


def test_the_last_tokens_are_the_encoders(found):
  layers_found, out = found
  assert len(layers_found.tokens) == DEPTH + 1
  np.testing.assert_array_equal(layers_found.tokens[-1], out)


def test_each_layer_follows_from_the_one_before(found, params):
  tokens, encoder = found[0].tokens, params["encoder"]
  for i in range(1, DEPTH):
    block = {"params": encoder[f"block{i}"]}
    want = vit.Block(HEADS).apply(block, tokens[i - 1])
    np.testing.assert_allclose(tokens[i], want, rtol=1e-4, atol=1e-4)
  want = layers.LayerNorm().apply({"params": encoder["norm"]}, tokens[-2])
  np.testing.assert_allclose(tokens[-1], want, rtol=1e-4, atol=1e-4)


def test_weights_sum_to_one_and_give_the_attention_output(found, params):
  tokens, attention = found[0]
  assert len(attention) == DEPTH
  for i in range(1, DEPTH):
    weights, block = attention[i], params["encoder"][f"block{i}"]
    assert weights.shape == (5, HEADS, tokens[0].shape[1])
    assert (np.asarray(weights) >= 0).all()
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    x = layers.LayerNorm().apply({"params": block["norm1"]}, tokens[i - 1])
    want = vit.Attention(HEADS).apply({"params": block["attn"]}, x)[:, 0]
    qkv, proj = block["attn"]["qkv"], block["attn"]["proj"]
    value = (x @ qkv["kernel"] + qkv["bias"][None, None])[..., 2 * WIDTH :]
    value = value.reshape(*x.shape[:2], HEADS, WIDTH // HEADS)
    mixed = jnp.einsum("bht,bthd->bhd", weights, value).reshape(5, WIDTH)
    got = mixed @ proj["kernel"] + proj["bias"][None]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  "execution",
  [vit.Execution(scan_layers=True), vit.Execution(remat="full")],
  ids=["loop", "remat"],
)
def test_it_does_not_depend_on_the_execution_and_can_be_jitted(
  params, execution
):
  model = MODEL.clone(execution=execution)
  got = jax.jit(lambda p: encoders.layers(model, p, IMAGES, NOISE, RATIO))(
    params
  )
  want = encoders.layers(MODEL, params, IMAGES, NOISE, RATIO)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
    *(got, want),
  )
