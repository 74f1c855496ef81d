"""What a model is, from its weights; our own runs; positions of other sizes."""

import functools
import json
import pathlib
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from umae_jax import UserError, checkpoint, convert, models
from umae_jax.convert import names, shapes
from umae_jax.models import patches

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
CASES = {"mae_p8_normpix": (4, 3), "mae_p4_rawpix": (3, 2)}


def load(name, **options):
  heads = dict(zip(("num_heads", "decoder_num_heads"), CASES[name]))
  file = REFERENCE / f"{name}.safetensors"
  return convert.load_pretrained(file, **(heads | options))


def assert_close(got, expected):
  scale = np.abs(expected).max()
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("name", CASES)
def test_outputs_agree_with_the_released_code(name):
  figures = np.load(REFERENCE / f"{name}.npz")
  model, params = load(name)
  fields = [model.patch_size, model.width, model.depth, model.num_heads]
  fields += [model.decoder_width, model.decoder_depth, model.decoder_num_heads]
  assert fields == figures["config"][1:-1].tolist()
  images = jnp.asarray(figures["images_nchw"].transpose(0, 2, 3, 1))
  out = jax.jit(model.apply, static_argnames="mask_ratio")(
    {"params": params},
    images,
    figures["noise"],
    mask_ratio=float(figures["mask_ratio"]),
  )
  assert_close(out.tokens, figures["latent"])
  assert_close(out.prediction, figures["pred"])


@pytest.mark.parametrize("name", CASES)
def test_pth_and_safetensors_hold_the_same_parameters(name):
  pytest.importorskip("torch", reason="needs the extra: umae_jax[torch]")
  params = convert.load_torch(REFERENCE / f"{name}.pth")
  chex.assert_trees_all_equal(params, load(name)[1])
  file = REFERENCE / f"{name}.safetensors"
  chex.assert_trees_all_equal(params, convert.load_torch(file))


def test_the_number_of_heads_is_asked_for_where_nothing_tells():
  with pytest.raises(UserError, match=r"32 wide and 2 deep.*give num_heads"):
    load("mae_p8_normpix", num_heads=None)
  with pytest.raises(UserError, match="give decoder_num_heads"):
    load("mae_p8_normpix", decoder_num_heads=None)
  with pytest.raises(UserError, match="32 does not divide into num_heads=5"):
    load("mae_p8_normpix", num_heads=5)


@pytest.mark.parametrize(
  "width, depth, heads, patch", [(768, 12, 12, 16), (1280, 32, 16, 14)]
)
def test_published_models_are_recognised_from_their_shapes(
  width, depth, heads, patch
):
  """Shapes alone: no such array is made."""
  model = models.MaskedAutoencoder(patch, width, depth, heads, 512, 8, 16)
  tables = {"encoder/pos_embed": (1, 197, 0), "decoder/pos_embed": (1, 197, 0)}
  ours = shapes.expected_shapes(model, 3, True, tables)
  assert ours["encoder/pos_embed"] == (1, 197, width)
  for form in ("mae", "huggingface"):
    theirs = shapes.in_format(ours, form, patch)
    assert names.recognise(theirs) == form
    fields = shapes.find_fields(theirs, form, "here")
    fields |= shapes.find_heads(fields, None, None, "here")
    assert shapes.make_model(fields, "here") == model


def test_an_encoder_alone_encodes(tmp_path):
  tensors = safetensors_numpy.load_file(
    REFERENCE / "mae_p8_normpix.safetensors"
  )
  kept = {
    k: x for k, x in tensors.items() if not k.startswith(("dec", "mask", "fc"))
  }
  file = tmp_path / "encoder.safetensors"
  safetensors_numpy.save_file(kept, file)
  model, params = convert.load_pretrained(file, num_heads=4)
  assert params.keys() == {"encoder"}
  figures = np.load(REFERENCE / "mae_p8_normpix.npz")
  images = jnp.asarray(figures["images_nchw"].transpose(0, 2, 3, 1))
  encode = functools.partial(model.apply, method=model.encode)
  tokens = jax.jit(encode)({"params": params}, images)
  assert_close(tokens, figures["full_latent"])
  with pytest.raises(UserError, match="has no decoder; use load_pretrained"):
    convert.load_torch(file)


def test_perceptrons_of_other_widths(tmp_path):
  model = models.MaskedAutoencoder(2, 48, 1, 2, 8, 1, 2, mlp_ratio=100 / 48)
  ours = shapes.expected_shapes(model, 1, False, {})
  found = shapes.in_format(ours, "timm", 2)
  assert found["blocks.0.mlp.fc1.weight"] == (100, 48)
  ratio = shapes.find_fields(found, "timm", "here")["mlp_ratio"]
  assert int(ratio * 48) == 100
  theirs = shapes.in_format(
    shapes.expected_shapes(model, 1, True, {}), "mae", 2
  )
  theirs = theirs | {"decoder_blocks.0.mlp.fc1.bias": (32,)}
  with pytest.raises(UserError, match=r"2\.08\d* times.*and 4 times the dec"):
    shapes.find_fields(theirs, "mae", "here")


# Positions.


def test_positions_are_interpolated_to_another_size(tmp_path):
  figures = np.load(REFERENCE / "pos_embed_interpolation.npz")
  file = REFERENCE / "mae_p4_rawpix.safetensors"
  tensors = safetensors_numpy.load_file(file)
  tensors["pos_embed"] = figures["before"]
  file = tmp_path / "x.safetensors"
  safetensors_numpy.save_file(tensors, file)
  heads = dict(num_heads=3, decoder_num_heads=2)
  model, params = convert.load_pretrained(file, image_size=(28, 28), **heads)
  table = params["encoder"]["pos_embed"]
  scale = np.abs(figures["after"]).max()
  np.testing.assert_allclose(table, figures["after"], rtol=0, atol=1e-6 * scale)
  images = jnp.ones((1, 28, 28, 3))
  encode = functools.partial(model.apply, method=model.encode)
  tokens = jax.eval_shape(encode, {"params": params}, images)
  assert tokens.shape == (1, 50, 24)
  with pytest.raises(UserError, match="30 x 28 pixels does not divide"):
    convert.load_pretrained(file, image_size=(30, 28), **heads)


def test_fixed_positions_are_computed_and_others_kept(tmp_path):
  _, params = load("mae_p4_rawpix")
  assert "pos_embed" not in params["encoder"] | params["decoder"]
  _, params = load("mae_p4_rawpix", image_size=(16, 16))
  assert "pos_embed" not in params["encoder"] | params["decoder"]
  _, params = load("mae_p4_rawpix", image_size=(8, 16))
  for part, width in (("encoder", 24), ("decoder", 16)):
    whole = patches.sincos_positions((4, 4), width)
    whole = np.pad(whole, ((0, 0), (1, 0), (0, 0)))
    expected = patches.resize_positions(whole, (2, 4))
    np.testing.assert_array_equal(params[part]["pos_embed"], expected)
  tensors = safetensors_numpy.load_file(REFERENCE / "mae_p4_rawpix.safetensors")
  tensors["decoder_pos_embed"][0, 0, 3] = -0.0  # A bit is enough.
  file = tmp_path / "x.safetensors"
  safetensors_numpy.save_file(tensors, file)
  params = convert.load_torch(file)
  kept = params["decoder"]["pos_embed"]
  assert kept.tobytes() == tensors["decoder_pos_embed"].tobytes()
  assert "pos_embed" not in params["encoder"]


# Our own runs.


class State(NamedTuple):
  step: Any
  params: Any
  opt_state: Any


CONFIG = {
  "task": "pretrain",
  "data.image_size": [8, 12],
  "model.patch_size": 4,
  "model.width": 16,
  "model.depth": 1,
  "model.num_heads": 2,
  "model.mlp_ratio": 2.0,
  "model.decoder_width": 8,
  "model.decoder_depth": 1,
  "model.decoder_num_heads": 4,
  "model.dtype": "auto",
}
IMAGES = jax.random.normal(jax.random.key(1), (3, 8, 12, 3))
MAE = models.MaskedAutoencoder(4, 16, 1, 2, 8, 1, 4, 2.0)


def make_run(path, params, **settings):
  state = State(np.int32(1), params, {"m": np.zeros(3)})
  with checkpoint.open_checkpoints(path / "checkpoints") as checkpoints:
    checkpoints.save(1, jax.tree.map(jnp.asarray, state))
  (path / "config.json").write_text(json.dumps(CONFIG | settings))
  return path


def random_params(model, **tables):
  rng = np.random.default_rng(0)
  found = shapes.expected_shapes(model, 3, True, tables)
  return names.unflatten(
    {k: rng.normal(size=x).astype(np.float32) for k, x in found.items()}
  )


@pytest.fixture(scope="module")
def pretrained():
  return random_params(MAE)


def test_a_pretraining_run(tmp_path, pretrained):
  run = make_run(tmp_path, pretrained)
  model, params = convert.load_pretrained(run)
  assert model == MAE
  chex.assert_trees_all_equal(params, pretrained)
  (tmp_path / "config.json").write_text(json.dumps({"task": "pretrain"}))
  with pytest.raises(UserError, match=r"neither a run's.*'data.image_size'"):
    convert.load_pretrained(run)


def test_computed_positions_are_interpolated_too(tmp_path, pretrained):
  """Not computed anew: the encoder has seen rows 0 and 1, and no row 3."""
  run = make_run(tmp_path, pretrained)
  _, params = convert.load_pretrained(run, image_size=(16, 24))
  for part, width in (("encoder", 16), ("decoder", 8)):
    whole = patches.sincos_positions((2, 3), width)
    whole = np.pad(whole, ((0, 0), (1, 0), (0, 0)))
    expected = patches.resize_positions(whole, (4, 6), (2, 3))
    np.testing.assert_array_equal(params[part]["pos_embed"], expected)


def test_the_number_of_heads_in_a_file_wins(tmp_path, pretrained):
  folder = tmp_path / "hf"
  convert.save(folder, MAE, pretrained, to="huggingface", image_size=(8, 12))
  model, _ = convert.load_pretrained(folder, num_heads=4, decoder_num_heads=1)
  assert (model.num_heads, model.decoder_num_heads) == (2, 4)


@pytest.mark.parametrize("averaged", [False, True])
def test_a_finetuning_run(tmp_path, averaged):
  model = models.Classifier(4, 16, 1, 2, 5, "mean", 2.0, 0.25)
  params = random_params(model, **{"encoder/pos_embed": (1, 7, 16)})
  last = jax.tree.map(lambda x: x + 1, params) | {"ema": params}
  settings = {"classifier.pool": "mean", "classifier.drop_path": 0.25}
  settings |= {"task": "finetune"}
  run = make_run(tmp_path, last if averaged else params, **settings)
  again, back = convert.load_pretrained(run)
  assert again == model
  chex.assert_trees_all_equal(back, params)


def test_a_linear_probe_is_folded_into_a_head(tmp_path, pretrained):
  rng = np.random.default_rng(0)
  mean, bias = rng.normal(size=16), rng.normal(size=5)
  variance, kernel = rng.random(16) + 0.1, rng.normal(size=(16, 5))
  params = {
    "encoder": pretrained["encoder"],
    "head": {"kernel": np.float32(kernel), "bias": np.float32(bias)},
    "batch_norm": {"mean": np.float32(mean), "var": np.float32(variance)},
  }
  settings = {"task": "linear_probe", "probe.feature": "cls"}
  run = make_run(tmp_path, params, **settings)
  model, back = convert.load_pretrained(run)
  logits = jax.jit(model.apply)({"params": back}, IMAGES)
  encode = functools.partial(MAE.apply, method=MAE.encode)
  tokens = jax.jit(encode)({"params": pretrained}, IMAGES)
  x = (np.asarray(tokens[:, 0], np.float64) - mean) / np.sqrt(variance + 1e-6)
  assert_close(logits, x @ kernel + bias)
  settings = json.dumps(CONFIG | settings | {"probe.feature": "mean"})
  (run / "config.json").write_text(settings)
  with pytest.raises(UserError, match=r"of 'mean'.*encoder from the pretr"):
    convert.load_pretrained(run)


def test_parameters_of_another_model_than_the_config_are_refused(
  tmp_path, pretrained
):
  run = make_run(tmp_path, pretrained, **{"model.width": 32})
  with pytest.raises(
    UserError, match=r"wrong shapes.*\(32,\) exp.*\(16,\) fou"
  ):
    convert.load_pretrained(run)


def test_a_hugging_face_config_is_believed_only_if_it_fits(tmp_path):
  model, params = load("mae_p4_rawpix")
  folder = tmp_path / "hf"
  convert.save(folder, model, params, to="huggingface", image_size=(16, 16))
  settings = json.loads((folder / "config.json").read_text())
  for change, message in [
    ({"num_hidden_layers": 3}, r"missing names \['vit.encoder.layer.2"),
    ({"image_size": 20}, "has 16 rows"),
    ({"model_type": "bert"}, "model_type='bert'"),
    ({"hidden_act": "relu"}, "hidden_act='relu'"),
    ({"num_attention_heads": "4"}, "are no numbers.*num_heads"),
    ({"layer_norm_eps": None}, "are no numbers.*norm_epsilon"),
  ]:
    (folder / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match=message):
      convert.load_pretrained(folder)
  (folder / "config.json").write_text("[1]")
  with pytest.raises(UserError, match="not a readable JSON object"):
    convert.load_pretrained(folder)
