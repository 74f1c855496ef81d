"""Agreement with the released code, and what a model must do besides."""

import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umae_jax import convert, losses, models
from umae_jax.models import patches, vit

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
CASES = ["mae_p8_normpix", "mae_p4_rawpix"]


def load_case(name):
  """(model, params, reference figures) of one recorded model."""
  figures = np.load(REFERENCE / f"{name}.npz")
  _, patch, width, depth, heads, *decoder, _ = figures["config"].tolist()
  model = models.MaskedAutoencoder(patch, width, depth, heads, *decoder)
  params = convert.load_torch(REFERENCE / f"{name}.safetensors")
  return model, params, figures


def total_loss(params, model, figures):
  """The recorded objective, and all that it is made of."""
  images = jnp.asarray(figures["images_nchw"].transpose(0, 2, 3, 1))
  noise, ratio = jnp.asarray(figures["noise"]), float(figures["mask_ratio"])
  out = model.apply({"params": params}, images, noise, mask_ratio=ratio)
  reconstruction = losses.reconstruction_loss(
    images,
    out.prediction,
    out.mask,
    patch_size=model.patch_size,
    normalize_pixels=bool(figures["norm_pix"]),
  )
  uniformity = losses.uniformity_loss(out.tokens[:, 0])
  weight = float(figures["uniformity_weight"])
  return reconstruction + weight * uniformity, (
    out,
    reconstruction,
    uniformity,
  )


def assert_close(got, expected, tolerance=1e-4):
  """Relative to the array's own scale: its largest magnitude."""
  got, expected = np.asarray(got), np.asarray(expected)
  assert got.shape == expected.shape
  scale = np.abs(expected).max()
  np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", CASES)
def test_forward_agrees_with_the_released_code(name):
  model, params, figures = load_case(name)
  total, (out, reconstruction, uniformity) = jax.jit(
    lambda params: total_loss(params, model, figures)
  )(params)
  np.testing.assert_array_equal(out.mask, figures["mask"])
  assert_close(out.tokens, figures["latent"])
  assert_close(out.prediction, figures["pred"])
  for got, key in [
    (reconstruction, "reconstruction_loss"),
    (uniformity, "uniformity_cls"),
    (total, "total_loss"),
  ]:
    np.testing.assert_allclose(got, figures[key], rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_agrees_with_the_released_code(name, tmp_path):
  from safetensors import numpy as safetensors_numpy

  model, params, figures = load_case(name)
  grads, _ = jax.jit(
    jax.grad(lambda params: total_loss(params, model, figures), has_aux=True)
  )(params)
  recorded = {
    key.removeprefix("grad/"): figures[key]
    for key in figures
    if key.startswith("grad/")
  }
  # The loader that maps weights maps their gradients, too.
  safetensors_numpy.save_file(recorded, tmp_path / "grads.safetensors")
  expected = convert.load_torch(tmp_path / "grads.safetensors")
  chex.assert_trees_all_equal_structs(grads, expected)
  assert len(jax.tree.leaves(grads)) == len(recorded)
  scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))

  def check(path, got, want):
    # The key third of a qkv bias has gradient 0 in real arithmetic.
    size = max(np.abs(want).max(), 1e-4 * scale)
    error = np.abs(got - want).max() / size
    assert error <= 1e-4, (jax.tree_util.keystr(path), error)

  jax.tree_util.tree_map_with_path(check, grads, expected)


@pytest.mark.parametrize("name", CASES)
def test_encoding_whole_images_agrees_with_the_released_code(name):
  model, params, figures = load_case(name)
  images = jnp.asarray(figures["images_nchw"].transpose(0, 2, 3, 1))
  encode = functools.partial(model.apply, method=model.encode)
  tokens = jax.jit(encode)({"params": params}, images)
  assert_close(tokens, figures["full_latent"])
  cut = patches.patchify(images, model.patch_size)
  np.testing.assert_array_equal(cut, figures["patchified"])


def test_initial_parameters_have_the_structure_of_a_checkpoint():
  model, params, _ = load_case("mae_p8_normpix")
  images = jnp.zeros((1, 32, 32, 3))
  made = jax.eval_shape(
    model.init, jax.random.key(0), images, jnp.zeros((1, 16))
  )["params"]
  chex.assert_trees_all_equal_shapes_and_dtypes(made, params)


def small(**changes):
  fields = dict(
    patch_size=4,
    width=16,
    depth=1,
    num_heads=2,
    decoder_width=8,
    decoder_depth=1,
    decoder_num_heads=2,
  )
  return models.MaskedAutoencoder(**(fields | changes))


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(model, images, noise, mask_ratio=0.75):
  variables = model.init(jax.random.key(0), images, noise, mask_ratio)
  return model.apply(variables, images, noise, mask_ratio)


@pytest.mark.parametrize("channels", [1, 3, 13])
@pytest.mark.parametrize("size", [(8, 8), (8, 20), (12, 4)])
def test_any_image_shape_and_channel_count(size, channels):
  images = jax.random.normal(jax.random.key(1), (2, *size, channels))
  length = size[0] * size[1] // 16
  noise = jax.random.uniform(jax.random.key(2), (2, length))
  out = apply(small(), images, noise, 0.5)
  visible = int(length * 0.5)
  assert out.prediction.shape == (2, length, 16 * channels)
  assert out.tokens.shape == (2, 1 + visible, 16)
  np.testing.assert_array_equal(out.mask.sum(1), length - visible)


def test_removed_patches_cannot_be_seen():
  """Changing a removed patch changes neither tokens nor prediction."""
  noise = jnp.arange(16.0)[None, ::-1]  # Visible: the last four patches.
  images = jax.random.normal(jax.random.key(1), (1, 16, 16, 3))
  changed = images.at[:, :4].add(1.0)  # The first four patches.
  seen = images.at[:, 12:].add(1.0)
  model = small()
  out, other, third = (apply(model, x, noise) for x in (images, changed, seen))
  np.testing.assert_array_equal(out.tokens, other.tokens)
  np.testing.assert_array_equal(out.prediction, other.prediction)
  assert np.abs(out.tokens - third.tokens).max() > 1e-3


def test_what_training_needs_is_part_of_the_whole():
  """Prediction and target of the removed patches; the loss is the same."""
  noise = jax.random.uniform(jax.random.key(2), (3, 16))
  images = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))
  model = small(decoder_depth=2)
  variables = model.init(jax.random.key(0), images, noise)
  whole = model.apply(variables, images, noise)
  part = model.apply(variables, images, noise, method=model.predict_removed)
  order = np.argsort(noise, axis=1)[:, 4:, None]
  cut = patches.patchify(images, 4)
  np.testing.assert_allclose(
    part.prediction,
    np.take_along_axis(np.asarray(whole.prediction), order, 1),
    atol=1e-5,
  )
  np.testing.assert_array_equal(
    part.target, np.take_along_axis(np.asarray(cut), order, 1)
  )
  np.testing.assert_array_equal(part.tokens, whole.tokens)
  for normalize in (True, False):
    np.testing.assert_allclose(
      losses.removed_patches_loss(
        part.prediction, part.target, normalize_pixels=normalize
      ),
      losses.reconstruction_loss(
        images,
        whole.prediction,
        whole.mask,
        patch_size=4,
        normalize_pixels=normalize,
      ),
      rtol=1e-5,
    )


@pytest.fixture(scope="module")
def traced_gradient():
  """(decoder's depth, execution) -> (gradient's trace, its argument)."""
  noise = jax.random.uniform(jax.random.key(2), (2, 16))
  images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))

  def traced(decoder_depth, **options):
    execution = vit.Execution(**options)
    model = small(decoder_depth=decoder_depth)
    variables = jax.jit(model.init)(jax.random.key(0), images, noise)
    model = model.clone(execution=execution, decoder_execution=execution)

    def loss(variables):
      out = model.apply(variables, images, noise, method=model.predict_removed)
      return jnp.square(out.prediction - out.target).sum()

    return jax.jit(jax.grad(loss)).trace(variables), variables

  return traced


@pytest.fixture(scope="module", params=[1, 2])
def plain_gradient(request, traced_gradient):
  """(The decoder's depth, the gradient of a model executed as written)."""
  traced, variables = traced_gradient(request.param)
  return request.param, traced.lower().compile()(variables)


@pytest.mark.parametrize(
  "scan, remat",
  [
    *((False, "dots"), (False, "full")),
    *((True, "none"), (True, "dots"), (True, "full")),
  ],
)
def test_execution_changes_no_gradient_of_training(
  traced_gradient, plain_gradient, scan, remat
):
  """The decoder's last block sees fewer tokens: it is not scanned."""
  depth, expected = plain_gradient
  traced, variables = traced_gradient(depth, remat=remat, scan_layers=scan)
  # Of the encoder, forward and backward, and of all but the last block.
  assert str(traced.jaxpr).count(" scan[") == (2 * depth if scan else 0)
  got = traced.lower().compile()(variables)
  chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-4)


def test_no_gradient_scatters():
  """Neither of the whole model's outputs nor of what training needs."""
  noise = jnp.tile(jnp.arange(16.0), (2, 1))
  images = jnp.ones((2, 16, 16, 3))
  model = small()
  variables = model.init(jax.random.key(0), images, noise)
  for method in (None, model.predict_removed):

    def loss(variables, method=method):
      out = model.apply(variables, images, noise, method=method)
      return out.prediction.sum() + out.tokens.sum()

    compiled = jax.jit(jax.grad(loss)).lower(variables).compile().as_text()
    assert " scatter(" not in compiled


def test_encode_visible_is_the_encoder_of_the_whole_model():
  model = small()
  images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
  noise = jax.random.uniform(jax.random.key(2), (2, 16))
  variables = jax.jit(model.init)(jax.random.key(0), images, noise)
  encode = functools.partial(model.apply, method=model.encode_visible)
  tokens = jax.jit(encode)(variables, images, noise)
  out = jax.jit(model.apply)(variables, images, noise)
  np.testing.assert_allclose(tokens, out.tokens, rtol=1e-6)


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters():
  images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
  noise = jax.random.uniform(jax.random.key(2), (2, 16))
  exact = apply(small(), images, noise)
  model = small(dtype=jnp.bfloat16)
  variables = jax.jit(model.init)(jax.random.key(0), images, noise)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))
  out = jax.jit(model.apply)(variables, images, noise)
  assert out.prediction.dtype == out.tokens.dtype == jnp.float32
  assert not np.array_equal(out.prediction, exact.prediction)
  np.testing.assert_allclose(out.prediction, exact.prediction, atol=0.1)


@pytest.mark.parametrize(
  "size, noise_shape, ratio, message",
  [
    ((18, 16), (1, 16), 0.75, "18 x 16 pixels.*patch_size=4"),
    ((16, 16), (1, 9), 0.75, r"noise has shape \(1, 9\).*\(1, 16\)"),
    ((16, 16), (1, 16), 0.95, "mask_ratio=0.95 leaves 0 of 16"),
    ((16, 16), (1, 16), 0.0, "mask_ratio=0.0 leaves 16 of 16"),
  ],
)
def test_impossible_arguments_are_refused(size, noise_shape, ratio, message):
  images = jnp.zeros((1, *size, 3))
  with pytest.raises(ValueError, match=message):
    small().init(jax.random.key(0), images, jnp.zeros(noise_shape), ratio)
