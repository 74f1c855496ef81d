"""Checkpoints of the PyTorch world, to parameters of this package."""

import argparse
from collections.abc import Mapping
import pathlib
import re
from typing import Any

import numpy as np
from safetensors import numpy as safetensors_numpy

from umae_jax import UserError

# PyTorch's names of layers, and ours; N stands for the number of a block. A
# "kernel" is transposed from PyTorch's (out, in) to (in, out).
_BLOCK = {
  "norm1": "norm1",
  "norm2": "norm2",
  "attn.qkv": "attn/qkv",
  "attn.proj": "attn/proj",
  "mlp.fc1": "fc1",
  "mlp.fc2": "fc2",
}
_LAYERS = {
  "patch_embed.proj": "encoder/patch_embed",
  "norm": "encoder/norm",
  "decoder_embed": "decoder/embed",
  "decoder_norm": "decoder/norm",
  "decoder_pred": "decoder/pred",
  **{f"blocks.N.{a}": f"encoder/blockN/{b}" for a, b in _BLOCK.items()},
  **{f"decoder_blocks.N.{a}": f"decoder/blockN/{b}" for a, b in _BLOCK.items()},
}
_NAMES = {
  "cls_token": "encoder/cls_token",
  "mask_token": "decoder/mask_token",
  **{f"{a}.bias": f"{b}/bias" for a, b in _LAYERS.items()},
  **{
    f"{a}.weight": f"{b}/{'scale' if 'norm' in b else 'kernel'}"
    for a, b in _LAYERS.items()
  },
}
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
  flat, unknown = {}, []
  for name, value in tensors.items():
    number = re.search(r"blocks\.(\d+)\.", name)
    target = _NAMES.get(re.sub(r"blocks\.\d+\.", "blocks.N.", name))
    if target:
      target = target.replace("N", number[1]) if number else target
      flat[target] = _layout(np.asarray(value, np.float32), target)
    elif not _IGNORED.fullmatch(name):
      unknown.append(name)
  missing = _missing(flat)
  if unknown or missing:
    raise UserError(
      f"{path} is not a whole pretraining checkpoint of MAE or U-MAE: "
      f"{len(unknown)} unknown names {sorted(unknown)[:5]}, {len(missing)} "
      f"missing parameters {missing[:5]}."
    )
  params = {}
  for name, value in flat.items():
    *parents, leaf = name.split("/")
    node = params
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return params


def _missing(flat: Mapping[str, np.ndarray]) -> list[str]:
  """Names that an autoencoder with the blocks found has, and `flat` has not."""
  expected = set()
  for target in _NAMES.values():
    pattern = target.split("N")[0] + r"(\d+)/"
    numbers = [int(m[1]) for m in map(re.compile(pattern).match, flat) if m]
    blocks = 1 + max(numbers, default=0) if "N" in target else 1
    expected |= {target.replace("N", str(i)) for i in range(blocks)}
  return sorted(expected - flat.keys())


def _layout(value: np.ndarray, name: str) -> np.ndarray:
  """(out, in) to (in, out); a convolution's (D, C, p, p) to (P, D)."""
  if not name.endswith("kernel"):
    return value
  if value.ndim == 4:
    return value.transpose(2, 3, 1, 0).reshape(-1, len(value))
  return value.T
