import pathlib
import re

import pytest
from safetensors import numpy as safetensors_numpy

from umae_jax import convert
from umae_jax.convert import __main__, files

WEIGHTS = pathlib.Path(__file__).parents[1] / "reference/mae_p8_normpix"
SOURCE = str(WEIGHTS.with_suffix(".safetensors"))
HEADS = ["--num_heads=4", "--decoder_num_heads=3"]


def test_a_checkpoint_through_every_form_and_back(tmp_path, capsys):
  ours, theirs, last = (tmp_path / x for x in ("a", "b", "c.safetensors"))
  assert __main__.main([SOURCE, str(ours), *HEADS]) == 0
  out = capsys.readouterr().out
  for line in (
    f"source      {SOURCE}, mae",
    f"            sha256 {files.sha256(pathlib.Path(SOURCE))}",
    "model       ViT 32 x 2, /8, 4 heads, decoder 24 x 2, images of 32 x 32",
    "left out    fc.bias, fc.weight, fc_norm.bias, fc_norm.weight",
    f"written     {ours}, umae_jax",
  ):
    assert line + "\n" in out
  assert __main__.main([str(ours), str(theirs), "--to=huggingface"]) == 0
  assert __main__.main([str(theirs), str(last), "--to=mae"]) == 0
  assert f"sha256 {files.sha256(last)}" in capsys.readouterr().out
  want = safetensors_numpy.load_file(SOURCE)
  got = safetensors_numpy.load_file(last)
  assert got.keys() == {k for k in want if not k.startswith("fc")}
  assert all(x.tobytes() == want[k].tobytes() for k, x in got.items())


def test_the_spelling_of_transformers_5_comes_back(tmp_path):
  """Its files name the decoder's blocks unlike those of transformers 4."""
  options = dict(num_heads=4, decoder_num_heads=3)
  model, params = convert.load_pretrained(SOURCE, **options)
  first, ours, last = (tmp_path / x for x in "abc")
  convert.save(first, model, params, to="huggingface", image_size=(32, 32))
  file = first / "model.safetensors"
  tensors = {
    k.replace("decoder.decoder_layers.", "decoder.decoder_encoder.layer."): x
    for k, x in safetensors_numpy.load_file(file).items()
  }
  files.write_tensors(file, tensors)
  assert __main__.main([str(first), str(ours)]) == 0
  assert __main__.main([str(ours), str(last), "--to=huggingface"]) == 0
  back = safetensors_numpy.load_file(last / "model.safetensors")
  assert back.keys() == tensors.keys()
  assert all(x.tobytes() == tensors[k].tobytes() for k, x in back.items())


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([SOURCE, "new"], "umae_jax: .*give num_heads"),
    (["absent.pth", "new"], "umae_jax: absent.pth: no such file"),
    ([SOURCE, SOURCE, *HEADS], "exists, and is not overwritten"),
    ([".", "new"], "umae_jax: .*no readable checkpoint"),
    ([SOURCE, "new", *HEADS, "--image_size=30"], "30 x 30 pixels does not"),
  ],
)
def test_errors_are_told_without_a_traceback(
  arguments, message, capsys, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  assert __main__.main(arguments) == 2
  error = capsys.readouterr().err
  assert "Traceback" not in error
  assert re.search(message, error), error
  assert not list(tmp_path.iterdir())
