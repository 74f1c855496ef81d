"""Malformed files: each a clear error, and nothing else happens."""

import argparse
import json
import pathlib
import pickle
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from umae_jax import UserError, convert
from umae_jax.convert import files

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
WEIGHTS = REFERENCE / "mae_p8_normpix.safetensors"
PTH = REFERENCE / "mae_p8_normpix.pth"


class Payload:
  """Pickles to a call that would leave a trace."""

  def __init__(self, trace):
    self.trace = str(trace)

  def __reduce__(self):
    return (pathlib.Path.touch, (pathlib.Path(self.trace),))


def safetensors_bytes(changes=(), drop=lambda name: False):
  tensors = safetensors_numpy.load_file(WEIGHTS) | dict(changes)
  return safetensors_numpy.save(
    {k: x for k, x in tensors.items() if not drop(k)}
  )


def with_header(header, length=None):
  """A safetensors file of that JSON, and a length that may lie."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(text) if length is None else length
  return struct.pack("<Q", length) + text + bytes(64)


def torch_bytes(content):
  torch = pytest.importorskip("torch", reason="needs: umae_jax[torch]")
  import io

  file = io.BytesIO()
  torch.save(content(torch), file)
  return file.getvalue()


def entry(shape, end, dtype="F32"):
  return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


def nan_weights():
  bias = np.zeros(32, np.float32)
  bias[3] = np.nan
  return safetensors_bytes({"norm.bias": bias})


def zeros(*shape, dtype=np.float32):
  return np.zeros(shape, dtype)


# Name: (suffix, bytes from the trace's path, message).
MALFORMED = {
  "empty": (".safetensors", lambda _: b"", r"claims a header.*truncated"),
  "truncated": (
    ".safetensors",
    lambda _: WEIGHTS.read_bytes()[:9000],
    r"not a readable safetensors.*truncated",
  ),
  "wrong magic": (
    ".safetensors",
    lambda _: b"\x93NUMPY" + bytes(200),
    "not a readable safetensors",
  ),
  "4 GB header": (
    ".safetensors",
    lambda _: with_header({}, 4 << 30),
    "claims a header of 4294967296 of its 74 bytes",
  ),
  "header not JSON": (
    ".safetensors",
    lambda _: with_header(b"{" * 30),
    "not a readable safetensors",
  ),
  "offsets outside": (
    ".safetensors",
    lambda _: with_header({"cls_token": entry([1, 1, 32], 1 << 40)}),
    "not a readable safetensors",
  ),
  "huge shape": (
    ".safetensors",
    lambda _: with_header({"cls_token": entry([1 << 31, 1 << 31], 64)}),
    "not a readable safetensors",
  ),
  "path in a name": (
    ".safetensors",
    lambda _: safetensors_bytes({"../../trace": zeros(2)}),
    r"1 unknown names \['\.\./\.\./trace'\]",
  ),
  "absolute path in a name": (
    ".safetensors",
    lambda trace: safetensors_bytes({str(trace): zeros(2)}),
    r"1 unknown names \['/",
  ),
  "NaN": (
    ".safetensors",
    lambda _: nan_weights(),
    r"1 tensors hold values that are not finite: \['norm.bias'\]",
  ),
  "mixed types": (
    ".safetensors",
    lambda _: safetensors_bytes({"norm.bias": zeros(32, dtype=np.float16)}),
    r"types \{'float16': \['norm.bias'\], 'float32'",
  ),
  "integers": (
    ".safetensors",
    lambda _: safetensors_numpy.save({"cls_token": zeros(1, dtype=np.int8)}),
    r"types \{'int8'.*save the model's state dict",
  ),
  "no tensors": (
    ".safetensors",
    lambda _: safetensors_numpy.save({}),
    "must be all of one type",
  ),
  "half the keys": (
    ".safetensors",
    lambda _: safetensors_bytes(drop=lambda name: len(name) % 2 == 0),
    r"not a whole checkpoint.*missing",
  ),
  "one missing": (
    ".safetensors",
    lambda _: safetensors_bytes(drop="blocks.1.mlp.fc2.bias".__eq__),
    r"1 missing names \['blocks.1.mlp.fc2.bias'\]",
  ),
  "a shape too large": (
    ".safetensors",
    lambda _: safetensors_bytes({"blocks.0.norm1.bias": zeros(33)}),
    r"1 wrong shapes \['blocks.0.norm1.bias: \(32,\) expected, \(33,\) found",
  ),
  "a block too high": (
    ".safetensors",
    lambda _: safetensors_bytes({"blocks.999999999999.x": zeros(1)}),
    r"unknown names \['blocks.999999999999.x'\].*missing names",
  ),
  "another model": (
    ".safetensors",
    lambda _: safetensors_numpy.save({"stages.0.conv.weight": zeros(3)}),
    r"no model known here.*stages.0.conv",
  ),
  "pickled payload": (
    ".pth",
    lambda trace: torch_bytes(
      lambda torch: {
        "model": {"cls_token": torch.zeros(1)},
        "args": argparse.Namespace(payload=Payload(trace)),
      }
    ),
    "pickled code, which is not run",
  ),
  "plain pickle": (
    ".pth",
    lambda trace: pickle.dumps(Payload(trace)),
    "not a readable PyTorch checkpoint",
  ),
  "truncated pth": (
    ".pth",
    lambda _: PTH.read_bytes()[:5000],
    "not a readable PyTorch checkpoint",
  ),
  "no state dict": (
    ".pth",
    lambda _: torch_bytes(lambda torch: {"model": [torch.zeros(3)]}),
    "holds no state dict",
  ),
  "names that are none": (
    ".pt",
    lambda _: torch_bytes(lambda torch: {"model": {3: torch.zeros(3)}}),
    "holds no state dict",
  ),
  "sparse": (
    ".pth",
    lambda _: torch_bytes(lambda torch: {"a": torch.eye(3).to_sparse()}),
    "its tensors are not plain",
  ),
  "another kind": (".bin", lambda _: b"x", "unknown kind of file '.bin'"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_without_side_effects(case, tmp_path):
  suffix, content, message = MALFORMED[case]
  trace = tmp_path / "trace"
  if suffix in (".pth", ".pt"):
    pytest.importorskip("torch", reason="needs: umae_jax[torch]")
  folder = tmp_path / "a" / "b"
  folder.mkdir(parents=True)
  file = folder / ("weights" + suffix)
  file.write_bytes(content(trace))
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(UserError, match=message) as caught:
    convert.load_pretrained(file, num_heads=4, decoder_num_heads=3)
  assert str(folder) in str(caught.value) and len(str(caught.value)) < 1500
  assert sorted(tmp_path.rglob("*")) == before
  if case == "pickled payload":
    import torch

    torch.load(file, weights_only=False)  # The payload does work.
    assert trace.exists()


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_is_widened_exactly(dtype, tmp_path):
  values = np.random.default_rng(0).normal(size=7).astype(dtype)
  safetensors_numpy.save_file({"a": values}, tmp_path / "a.safetensors")
  found = files.read(tmp_path / "a.safetensors")["a"]
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found.astype(dtype), values)
  torch = pytest.importorskip("torch", reason="needs: umae_jax[torch]")
  half = getattr(torch, np.dtype(dtype).name)
  tensor = torch.from_numpy(values.astype(np.float32)).to(half)
  torch.save({"model": {"a": tensor}}, tmp_path / "a.pth")
  np.testing.assert_array_equal(files.read(tmp_path / "a.pth")["a"], found)


def test_without_pytorch_a_pth_is_refused_with_the_remedy(tmp_path):
  (tmp_path / "torch.py").write_text("raise ImportError('hidden')")
  program = f"from umae_jax import convert\nconvert.load_torch({str(PTH)!r})"
  done = subprocess.run(
    [sys.executable, "-c", program],
    env={"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"},
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
  )
  assert done.returncode != 0
  assert "pip install 'umae_jax[torch]'" in done.stderr


def test_a_new_path_appears_whole_or_not_at_all(tmp_path):
  with files.new(tmp_path / "sub" / "x") as temporary:
    temporary.write_text("done")
    assert not (tmp_path / "sub" / "x").exists()
  assert (tmp_path / "sub" / "x").read_text() == "done"
  assert [x.name for x in (tmp_path / "sub").iterdir()] == ["x"]
  (tmp_path / "link").symlink_to(tmp_path / "nowhere")
  with (
    pytest.raises(UserError, match="exists, and is not overwritten"),
    files.new(tmp_path / "link"),
  ):
    pass
