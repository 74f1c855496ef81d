"""Files of weights: read without trust, written whole or not at all."""

import argparse
from collections.abc import Iterator, Mapping
import contextlib
import hashlib
import json
import pathlib
import shutil
import tempfile

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors_numpy

from umae_jax import UserError

PYTORCH = (".pth", ".pt")
KINDS = (*PYTORCH, ".safetensors")
_FLOATS = ("float32", "float16", "bfloat16")


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Tensors of a `.pth`, `.pt` or `.safetensors` file, as float32.

  Nothing that the file may hold is run, and no name in it becomes a path.

  Raises:
    UserError: no such file, another kind, damaged, with pickled code, of mixed
      or other types than floats, or with values that are not finite.
  """
  if not path.is_file():
    raise UserError(
      f"{path}: no such file or directory; give a run's work directory, or a "
      ".pth or .safetensors file."
    )
  if path.suffix in PYTORCH:
    tensors = _read_pytorch(path)
  elif path.suffix == ".safetensors":
    tensors = _read_safetensors(path)
  else:
    raise UserError(
      f"{path}: unknown kind of file {path.suffix!r}; give one of {KINDS}."
    )
  kinds = sorted({kind for kind, _ in tensors.values()})
  if len(kinds) != 1 or kinds[0] not in _FLOATS:
    some = {x: [k for k, v in tensors.items() if v[0] == x][:2] for x in kinds}
    raise UserError(
      f"{path} has tensors of the types {some}; weights must be all of one "
      f"type of {_FLOATS}: save the model's state dict alone, in one type."
    )
  found = {k: np.asarray(x, np.float32) for k, (_, x) in tensors.items()}
  broken = [k for k, x in found.items() if not np.isfinite(x).all()]
  if broken:
    raise UserError(
      f"{path}: {len(broken)} tensors hold values that are not finite: "
      f"{broken[:5]}; its training diverged, or the file is damaged."
    )
  return found


def _read_safetensors(path):
  """{name: (type, values)}."""
  size = path.stat().st_size
  with path.open("rb") as file:
    header = int.from_bytes(file.read(8), "little")
  try:
    if size < 8 or header > size - 8:
      raise TypeError(f"it claims a header of {header} of its {size} bytes")
    with safe_open(path, "numpy") as file:
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  except (SafetensorError, AttributeError, KeyError, TypeError) as error:
    raise UserError(
      f"{path} is not a readable safetensors file ({error}); it may be "
      "truncated: copy or download it again."
    ) from error
  return {name: (str(x.dtype), x) for name, x in arrays.items()}


def _read_pytorch(path):
  """{name: (type, values)}; runs nothing that is pickled in the file."""
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
    isinstance(name, str) and isinstance(value, torch.Tensor)
    for name, value in content.items()
  ):
    raise UserError(
      f"{path} holds no state dict; expected {{'model': {{name: tensor}}}}."
    )
  try:
    return {
      name: (str(x.dtype).removeprefix("torch."), x.to(torch.float32).numpy())
      for name, x in content.items()
    }
  except (RuntimeError, TypeError) as error:  # Sparse, or without storage.
    raise UserError(f"{path}: its tensors are not plain ({error}).") from error


def read_json(path: pathlib.Path) -> dict:
  """A JSON object.

  Raises:
    UserError: there is none.
  """
  try:
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
      raise ValueError("not an object")
  except (OSError, ValueError) as error:
    raise UserError(
      f"{path} is not a readable JSON object ({error})."
    ) from error
  return value


def sha256(path: pathlib.Path) -> str:
  """Of a file's bytes, in hexadecimal."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(path: pathlib.Path, tensors: Mapping) -> None:
  """A `.safetensors` file, as PyTorch's world expects it."""
  tensors = {k: np.ascontiguousarray(x) for k, x in tensors.items()}
  safetensors_numpy.save_file(tensors, path, metadata={"format": "pt"})


@contextlib.contextmanager
def new(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A temporary path that becomes `path` when the context ends well.

  Raises:
    UserError: there is something already, or it cannot be written.
  """
  if path.exists() or path.is_symlink():
    raise UserError(f"{path} exists, and is not overwritten; name another.")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=".umae_jax-", dir=path.parent)
  except OSError as error:
    raise UserError(f"{path} cannot be written ({error.strerror}).") from error
  try:
    yield pathlib.Path(folder, path.name)
    pathlib.Path(folder, path.name).rename(path)
  finally:
    shutil.rmtree(folder)
