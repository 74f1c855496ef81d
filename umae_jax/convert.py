"""Checkpoints of the PyTorch world, to parameters of this package."""

import argparse
from collections.abc import Mapping
import pathlib
import re
from typing import Any

import numpy as np
from safetensors import numpy as safetensors_numpy

from umae_jax import UserError

# (pattern of a PyTorch name, path in our tree); \1 is a block's number. A
# weight named "kernel" is transposed from PyTorch's (out, in) to (in, out).
_BLOCK = [
  (r"norm([12])\.weight", r"norm\2/scale"),
  (r"norm([12])\.bias", r"norm\2/bias"),
  (r"attn\.(qkv|proj)\.weight", r"attn/\2/kernel"),
  (r"attn\.(qkv|proj)\.bias", r"attn/\2/bias"),
  (r"mlp\.(fc[12])\.weight", r"\2/kernel"),
  (r"mlp\.(fc[12])\.bias", r"\2/bias"),
]
_NAMES = [
  (r"cls_token", "encoder/cls_token"),
  (r"patch_embed\.proj\.weight", "encoder/patch_embed/kernel"),
  (r"patch_embed\.proj\.bias", "encoder/patch_embed/bias"),
  *((rf"blocks\.(\d+)\.{a}", rf"encoder/block\1/{b}") for a, b in _BLOCK),
  (r"norm\.weight", "encoder/norm/scale"),
  (r"norm\.bias", "encoder/norm/bias"),
  (r"mask_token", "decoder/mask_token"),
  (r"decoder_embed\.weight", "decoder/embed/kernel"),
  (r"decoder_embed\.bias", "decoder/embed/bias"),
  *(
    (rf"decoder_blocks\.(\d+)\.{a}", rf"decoder/block\1/{b}") for a, b in _BLOCK
  ),
  (r"decoder_norm\.weight", "decoder/norm/scale"),
  (r"decoder_norm\.bias", "decoder/norm/bias"),
  (r"decoder_pred\.weight", "decoder/pred/kernel"),
  (r"decoder_pred\.bias", "decoder/pred/bias"),
]
# Fixed positions, which we compute, and the released code's online classifier.
_IGNORED = re.compile(r"(decoder_)?pos_embed|fc(_norm)?\.(weight|bias)")


def load_torch(path: str | pathlib.Path) -> dict[str, Any]:
  """Parameters of a pretraining checkpoint of Meta's MAE or of U-MAE.

  Args:
    path: a `.safetensors` file, or a `.pth` file as published
      ({"model": ...}); the latter needs PyTorch (`pip install
      'umae_jax[torch]'`) and is read with `weights_only=True`, so that no
      code in it can run.

  Returns:
    `variables["params"]` of `models.MaskedAutoencoder`, NumPy float32. Fixed
    position embeddings and the released code's online classifier are left
    out: the model computes the former and has no use for the latter.

  Raises:
    UserError: no such file, not a checkpoint, or names that belong to
      another model.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f"{path}: no such file; give a .pth or .safetensors file.")
  tensors = _read_pth(path) if path.suffix in (".pth", ".pt") else _read(path)
  return _rename(tensors, path)


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Tensors of a `.safetensors` file."""
  if path.suffix != ".safetensors":
    raise UserError(
      f"{path}: unknown kind of file {path.suffix!r}; give a .pth, .pt or "
      ".safetensors file."
    )
  try:
    return safetensors_numpy.load_file(path)
  except Exception as error:
    raise UserError(
      f"{path} is not a readable safetensors file ({error}); it may be "
      "truncated: copy or download it again."
    ) from error


def _read_pth(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Tensors of a `.pth` file; runs nothing that is pickled in it."""
  try:
    import torch  # An extra: only this function needs it.
  except ImportError as error:
    raise UserError(
      f"{path}: reading a .pth file needs PyTorch; pip install "
      "'umae_jax[torch]', or convert the file to .safetensors."
    ) from error
  # Published checkpoints carry their command line's argparse.Namespace.
  with torch.serialization.safe_globals([argparse.Namespace]):
    try:
      content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
      reason = str(error).splitlines()[0] if str(error) else repr(error)
      raise UserError(
        f"{path} is not a readable PyTorch checkpoint of weights ({reason}); "
        "it may be truncated, or hold pickled code, which is not run."
      ) from error
  if isinstance(content, Mapping) and "model" in content:
    content = content["model"]
  if not isinstance(content, Mapping) or not all(
    isinstance(value, torch.Tensor) for value in content.values()
  ):
    raise UserError(
      f"{path} holds no state dict; expected {{'model': {{name: tensor}}}}."
    )
  return {name: value.float().numpy() for name, value in content.items()}


def _rename(tensors: Mapping[str, np.ndarray], path: pathlib.Path) -> dict:
  """PyTorch's flat names and layouts to our nested tree."""
  params, unknown = {}, []
  for name, value in tensors.items():
    if _IGNORED.fullmatch(name):
      continue
    matches = ((re.fullmatch(a, name), b) for a, b in _NAMES)
    target = next((m.expand(b) for m, b in matches if m), None)
    if target is None:
      unknown.append(name)
      continue
    *parents, leaf = target.split("/")
    node = params
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = _layout(np.asarray(value, np.float32), leaf)
  if unknown or set(params) != {"encoder", "decoder"}:
    raise UserError(
      f"{path} is not a pretraining checkpoint of MAE or U-MAE: "
      f"{len(unknown)} unknown names {sorted(unknown)[:5]}, parts found "
      f"{sorted(params)}; expected an encoder and a decoder."
    )
  return params


def _layout(value: np.ndarray, leaf: str) -> np.ndarray:
  """(out, in) to (in, out); a convolution's (D, C, p, p) to (P, D)."""
  if leaf == "kernel" and value.ndim == 4:
    return value.transpose(2, 3, 1, 0).reshape(-1, len(value))
  return value.T if leaf == "kernel" else value
