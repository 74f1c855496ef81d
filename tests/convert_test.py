import argparse
import pathlib
import subprocess
import sys

import chex
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from umae_jax import UserError, convert

REFERENCE = pathlib.Path(__file__).parent / "reference"
WEIGHTS = REFERENCE / "mae_p8_normpix.safetensors"


def test_kernels_are_transposed_and_the_convolution_flattened():
  tensors = safetensors_numpy.load_file(WEIGHTS)
  params = convert.load_torch(WEIGHTS)
  np.testing.assert_array_equal(
    params["encoder"]["block1"]["attn"]["qkv"]["kernel"],
    tensors["blocks.1.attn.qkv.weight"].T,
  )
  kernel = params["encoder"]["patch_embed"]["kernel"].reshape(8, 8, 3, 32)
  np.testing.assert_array_equal(
    kernel[2, 5, 1], tensors["patch_embed.proj.weight"][:, 1, 2, 5]
  )


@pytest.mark.parametrize("name", ["mae_p8_normpix", "mae_p4_rawpix"])
def test_pth_and_safetensors_hold_the_same_parameters(name):
  pytest.importorskip("torch", reason="needs the extra: umae_jax[torch]")
  chex.assert_trees_all_equal(
    convert.load_torch(REFERENCE / f"{name}.pth"),
    convert.load_torch(REFERENCE / f"{name}.safetensors"),
  )


class Payload:
  """Pickles to a call that would leave a trace."""

  def __init__(self, trace):
    self.trace = str(trace)

  def __reduce__(self):
    return (pathlib.Path.touch, (pathlib.Path(self.trace),))


def test_code_pickled_in_a_pth_is_not_run(tmp_path):
  torch = pytest.importorskip("torch", reason="needs: umae_jax[torch]")
  trace = tmp_path / "trace"
  file = tmp_path / "bad.pth"
  args = argparse.Namespace(payload=Payload(trace))
  torch.save({"model": {"cls_token": torch.zeros(1)}, "args": args}, file)
  with pytest.raises(UserError, match=r"bad\.pth is not a readable PyTorch"):
    convert.load_torch(file)
  assert not trace.exists()
  torch.load(file, weights_only=False)  # The payload does work.
  assert trace.exists()


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("absent.pth", None, "absent.pth: no such file"),
    ("model.bin", b"x", "unknown kind of file '.bin'"),
    ("a.safetensors", b"", "not a readable safetensors file.*truncated"),
    (
      "b.safetensors",
      WEIGHTS.read_bytes()[:5000],
      "not a readable safetensors",
    ),
    ("c.safetensors", b"\xff" * 100, "not a readable safetensors"),
  ],
)
def test_a_file_that_is_none_is_refused(tmp_path, name, content, message):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message):
    convert.load_torch(tmp_path / name)


def test_names_of_another_model_are_listed(tmp_path):
  tensors = safetensors_numpy.load_file(WEIGHTS)
  tensors["stages.0.conv.weight"] = np.zeros(3, np.float32)
  safetensors_numpy.save_file(tensors, tmp_path / "x.safetensors")
  with pytest.raises(UserError, match=r"1 unknown names \['stages.0.conv"):
    convert.load_torch(tmp_path / "x.safetensors")


@pytest.mark.parametrize("gone", ["blocks.0.", "blocks.1.norm1.bias", "mask_t"])
def test_missing_parameters_are_listed(tmp_path, gone):
  tensors = safetensors_numpy.load_file(WEIGHTS)
  kept = {k: x for k, x in tensors.items() if not k.startswith(gone)}
  assert len(kept) < len(tensors)
  safetensors_numpy.save_file(kept, tmp_path / "x.safetensors")
  with pytest.raises(UserError, match=r"not a whole .* missing parameters"):
    convert.load_torch(tmp_path / "x.safetensors")


def test_without_pytorch_a_pth_is_refused_with_the_remedy(tmp_path):
  (tmp_path / "torch.py").write_text("raise ImportError('hidden')")
  program = (
    "from umae_jax import convert\n"
    f"convert.load_torch({str(REFERENCE / 'mae_p8_normpix.pth')!r})"
  )
  done = subprocess.run(
    [sys.executable, "-c", program],
    env={"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"},
    cwd=pathlib.Path(__file__).parents[1],
    capture_output=True,
    text=True,
  )
  assert done.returncode != 0
  assert "pip install 'umae_jax[torch]'" in done.stderr
