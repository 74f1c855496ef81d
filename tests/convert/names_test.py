import pathlib

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from umae_jax.convert import names

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
WEIGHTS = REFERENCE / "mae_p8_normpix.safetensors"


def random_parameters():
  """A flat tree with every kind of parameter that any form has."""
  rng = np.random.default_rng(0)
  shapes = {
    "encoder/cls_token": (1, 1, 4),
    "encoder/pos_embed": (1, 5, 4),
    "encoder/patch_embed/kernel": (12, 4),
    "encoder/block11/attn/qkv/kernel": (4, 12),
    "encoder/block11/attn/qkv/bias": (12,),
    "encoder/block0/norm1/scale": (4,),
    "decoder/mask_token": (1, 1, 8),
    "decoder/block2/fc1/kernel": (8, 3),
    "decoder/pred/bias": (12,),
    "head/kernel": (4, 3),
  }
  return {k: rng.normal(size=x).astype(np.float32) for k, x in shapes.items()}


@pytest.mark.parametrize("form", names.TABLES)
def test_decoding_inverts_encoding(form):
  flat = random_parameters()
  tensors = names.encode(flat, form, 2)
  back = names.decode(tensors, flat, form)
  assert back.keys() == flat.keys()
  for name, value in flat.items():
    np.testing.assert_array_equal(back[name], value)


def test_kernels_are_transposed_and_the_convolution_flattened():
  tensors = safetensors_numpy.load_file(WEIGHTS)
  wanted = ["encoder/block1/attn/qkv/kernel", "encoder/patch_embed/kernel"]
  params = names.decode(tensors, wanted, "mae")
  np.testing.assert_array_equal(
    params[wanted[0]], tensors["blocks.1.attn.qkv.weight"].T
  )
  kernel = params[wanted[1]].reshape(8, 8, 3, 32)
  np.testing.assert_array_equal(
    kernel[2, 5, 1], tensors["patch_embed.proj.weight"][:, 1, 2, 5]
  )


def test_query_key_and_value_are_thirds_of_the_output():
  flat = random_parameters()
  tensors = names.encode(flat, "huggingface", 2)
  block = "vit.encoder.layer.11.attention.attention."
  kernel = flat["encoder/block11/attn/qkv/kernel"]
  for i, name in enumerate(("query", "key", "value")):
    np.testing.assert_array_equal(
      tensors[f"{block}{name}.weight"], kernel[:, 4 * i : 4 * i + 4].T
    )


def test_what_our_models_have_not_is_left_out_and_told():
  tensors = {"fc.weight": 1, "fc_norm.bias": 2, "cls_token": 3}
  assert names.canonical(tensors, "mae") == (
    {"cls_token": 3},
    ["fc.weight", "fc_norm.bias"],
  )
  assert names.canonical(tensors, "timm") == (tensors, [])
  kept, left_out = names.canonical({"pooler.dense.bias": 1}, "huggingface")
  assert not kept and left_out == ["vit.pooler.dense.bias"]


def test_two_spellings_of_one_name_are_refused():
  tensors = {"layernorm.bias": 1, "vit.layernorm.bias": 2}
  with pytest.raises(KeyError, match=r"vit\.layernorm\.bias"):
    names.canonical(tensors, "huggingface")


def test_a_name_that_a_form_has_not_is_an_error():
  with pytest.raises(KeyError):
    names.theirs("fc_norm/scale", "huggingface")


def test_nested_and_flat_are_inverse():
  tree = {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
  flat = names.flatten(tree)
  assert flat == {"a/b/c": 1, "a/d": 2, "e": 3}
  assert names.unflatten(flat) == tree
