"""What other formats call our parameters, and how they lay them out.

One table a format, used in both directions. N is the number of a block.
"""

from collections.abc import Collection, Mapping
import re

import jax
import numpy as np

_BLOCK = {
  "norm1": "norm1",
  "norm2": "norm2",
  "attn/qkv": "attn.qkv",
  "attn/proj": "attn.proj",
  "fc1": "mlp.fc1",
  "fc2": "mlp.fc2",
}
_SELF = "attention.attention."
_HF_BLOCK = {
  "norm1": "layernorm_before",
  "norm2": "layernorm_after",
  "attn/qkv": (_SELF + "query", _SELF + "key", _SELF + "value"),
  "attn/proj": "attention.output.dense",
  "fc1": "intermediate.dense",
  "fc2": "output.dense",
}


def _blocks(ours: str, theirs: str, block: Mapping) -> dict[str, tuple]:
  """Names of a block's layers, each a tuple: theirs may be several."""
  names = {k: (v,) if isinstance(v, str) else v for k, v in block.items()}
  return {
    f"{ours}/blockN/{k}": tuple(f"{theirs}.N.{x}" for x in v)
    for k, v in names.items()
  }


# Ours to theirs. Of a layer, kernel and scale are "weight" there.
_MAE = {
  "encoder/cls_token": ("cls_token",),
  "encoder/pos_embed": ("pos_embed",),
  "encoder/patch_embed": ("patch_embed.proj",),
  "encoder/norm": ("norm",),
  **_blocks("encoder", "blocks", _BLOCK),
  "decoder/mask_token": ("mask_token",),
  "decoder/pos_embed": ("decoder_pos_embed",),
  "decoder/embed": ("decoder_embed",),
  "decoder/norm": ("decoder_norm",),
  "decoder/pred": ("decoder_pred",),
  **_blocks("decoder", "decoder_blocks", _BLOCK),
  "fc_norm": ("fc_norm",),
  "head": ("head",),
}
_HUGGINGFACE = {
  "encoder/cls_token": ("vit.embeddings.cls_token",),
  "encoder/pos_embed": ("vit.embeddings.position_embeddings",),
  "encoder/patch_embed": ("vit.embeddings.patch_embeddings.projection",),
  "encoder/norm": ("vit.layernorm",),
  **_blocks("encoder", "vit.encoder.layer", _HF_BLOCK),
  "decoder/mask_token": ("decoder.mask_token",),
  "decoder/pos_embed": ("decoder.decoder_pos_embed",),
  "decoder/embed": ("decoder.decoder_embed",),
  "decoder/norm": ("decoder.decoder_norm",),
  "decoder/pred": ("decoder.decoder_pred",),
  **_blocks("decoder", "decoder.decoder_layers", _HF_BLOCK),
  "head": ("classifier",),
}
TABLES = {"mae": _MAE, "timm": _MAE, "huggingface": _HUGGINGFACE}

# Files of transformers 5 have these where those of transformers 4 have the
# above: in memory, and (the last) on disk.
_SPELLINGS = (
  (r"^vit\.layers\.", "vit.encoder.layer."),
  (r"\.attention\.q_proj\.", f".{_SELF}query."),
  (r"\.attention\.k_proj\.", f".{_SELF}key."),
  (r"\.attention\.v_proj\.", f".{_SELF}value."),
  (r"\.attention\.o_proj\.", ".attention.output.dense."),
  (r"\.mlp\.fc1\.", ".intermediate.dense."),
  (r"\.mlp\.fc2\.", ".output.dense."),
  (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
)
SPELLING_5 = ("decoder.decoder_layers.", "decoder.decoder_encoder.layer.")

# No part of our models: the released U-MAE's online classifier, and ViTModel's
# pooler, a layer that no pretraining of it has trained.
_LEFT_OUT = {
  "mae": re.compile(r"fc(_norm)?\.(weight|bias)"),
  "timm": None,
  "huggingface": re.compile(r"vit\.pooler\.dense\.(weight|bias)"),
}


def recognise(names: Collection[str]) -> str | None:
  """The format whose file has these names, or None."""
  if "patch_embed.proj.weight" in names:
    decoder = any(x.startswith(("decoder", "mask_token")) for x in names)
    return "mae" if decoder else "timm"
  patch = "embeddings.patch_embeddings.projection.weight"
  return "huggingface" if patch in names or "vit." + patch in names else None


def canonical(
  tensors: Mapping[str, np.ndarray], form: str
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Spells names as the table does; takes out what our models have not.

  Returns:
    (tensors, names left out).

  Raises:
    KeyError: two names become one.
  """
  found = {}
  for name, value in tensors.items():
    if form == "huggingface":
      bare = not name.startswith(("vit.", "decoder.", "classifier."))
      name = "vit." + name if bare else name
      for pattern, spelling in _SPELLINGS:
        name = re.sub(pattern, spelling, name)
    if name in found:
      raise KeyError(name)
    found[name] = value
  pattern = _LEFT_OUT[form]
  left_out = [x for x in found if pattern and pattern.fullmatch(x)]
  return {k: x for k, x in found.items() if k not in left_out}, left_out


def theirs(name: str, form: str) -> tuple[str, ...]:
  """The other format's names of our parameter `encoder/block0/fc1/bias`.

  Raises:
    KeyError: the format has no such parameter.
  """
  table = TABLES[form]
  number = re.search(r"/block(\d+)/", name)
  pattern = re.sub(r"/block\d+/", "/blockN/", name)
  layer, _, leaf = pattern.rpartition("/")
  suffix = "" if pattern in table else ".bias" if leaf == "bias" else ".weight"
  found = table[pattern if pattern in table else layer]
  return tuple(
    (x.replace(".N.", f".{number[1]}.") if number else x) + suffix
    for x in found
  )


def encode(
  flat: Mapping[str, np.ndarray], form: str, patch_size: int
) -> dict[str, np.ndarray]:
  """Our flat parameters, as the other format names and lays them out.

  A kernel is transposed to (out, in); that of the patches, (P, D), becomes a
  convolution's (D, C, p, p).
  """
  tensors = {}
  for name, value in flat.items():
    if name == "encoder/patch_embed/kernel":
      shape = (patch_size, patch_size, -1, value.shape[1])
      value = value.reshape(shape).transpose(3, 2, 0, 1)
    elif name.endswith("/kernel"):
      value = value.T
    names = theirs(name, form)
    tensors |= zip(names, np.split(value, len(names)))
  return tensors


def decode(
  tensors: Mapping[str, np.ndarray], wanted: Collection[str], form: str
) -> dict[str, np.ndarray]:
  """The inverse of `encode`, of the parameters named in `wanted`."""
  flat = {}
  for name in wanted:
    value = [tensors[x] for x in theirs(name, form)]
    value = np.concatenate(value) if len(value) > 1 else value[0]
    if value.ndim == 4:  # The convolution of the patches.
      value = value.transpose(2, 3, 1, 0).reshape(-1, len(value))
    elif name.endswith("/kernel"):
      value = value.T
    flat[name] = value
  return flat


def flatten(tree: Mapping) -> dict[str, np.ndarray]:
  """{"a/b": leaf} of a nested dict."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
    for path, x in leaves
  }


def unflatten(flat: Mapping[str, np.ndarray]) -> dict:
  """The inverse of `flatten`."""
  tree = {}
  for name, value in flat.items():
    *parents, leaf = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree
