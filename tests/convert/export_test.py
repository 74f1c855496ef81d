"""Against timm and transformers themselves, and there and back."""

import pathlib

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from umae_jax import UserError, checkpoint, convert, models
from umae_jax.models import vit

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
CASES = {"mae_p8_normpix": (4, 3), "mae_p4_rawpix": (3, 2)}
EXTRA = "needs the extra: umae_jax[torch]"
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 3, 16, 16)).astype(np.float32)
NOISE = RNG.random((2, 16)).astype(np.float32)


def load_case(name):
  heads, decoder_heads = CASES[name]
  return convert.load_pretrained(
    REFERENCE / f"{name}.safetensors",
    num_heads=heads,
    decoder_num_heads=decoder_heads,
  )


def run(model, params, *arguments, **options):
  """The jitted model on IMAGES, channels last."""
  apply = lambda params, *x: model.apply({"params": params}, *x, **options)  # noqa: E731
  return jax.jit(apply)(params, IMAGES.transpose(0, 2, 3, 1), *arguments)


def assert_close(got, tensor):
  expected = tensor.detach().numpy()
  scale = np.abs(expected).max()
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * scale)


def same(first, second):
  """Two files or trees hold the same tensors, bit for bit."""
  if not isinstance(first, dict):
    first, second = map(safetensors_numpy.load_file, (first, second))
  pairs = [jax.tree_util.tree_leaves_with_path(x) for x in (first, second)]
  assert [k for k, _ in pairs[0]] == [k for k, _ in pairs[1]]
  for (key, x), (_, y) in zip(*pairs):
    assert x.dtype == y.dtype and x.shape == y.shape, key
    assert x.tobytes() == y.tobytes(), key


def shake(module):
  """Random values of a size that shows everywhere, in a torch module."""
  torch = pytest.importorskip("torch", reason=EXTRA)
  torch.manual_seed(0)
  with torch.no_grad():
    for name, x in module.named_parameters():
      if "pos" not in name:
        x.add_(0.1 * torch.randn_like(x))
  return module.eval()


# Round trips without PyTorch.


@pytest.mark.parametrize("name", CASES)
def test_every_form_gives_back_the_same_bits(name, tmp_path):
  model, params = load_case(name)
  size = (32, 32) if "p8" in name else (16, 16)
  places = {"umae_jax": "ours", "mae": "m.safetensors", "huggingface": "hf"}
  for form, place in places.items():
    path = tmp_path / place
    assert convert.save(path, model, params, to=form, image_size=size) == []
    heads = {}
    if form == "mae":
      heads = dict(zip(("num_heads", "decoder_num_heads"), CASES[name]))
    again, back = convert.load_pretrained(path, **heads)
    assert again == model
    same(back, params)
  original = safetensors_numpy.load_file(REFERENCE / f"{name}.safetensors")
  kept = {k: x for k, x in original.items() if not k.startswith("fc")}
  same(safetensors_numpy.load_file(tmp_path / "m.safetensors"), kept)
  assert sorted(x.name for x in tmp_path.iterdir()) == sorted(places.values())


@pytest.mark.parametrize("pool", models.classifier.POOLS)
def test_a_classifier_goes_out_and_comes_back(pool, tmp_path):
  model = models.Classifier(4, 16, 1, 2, 5, pool, drop_path=0.1)
  tables = {"encoder/pos_embed": (1, 7, 16)}
  found = convert.shapes.expected_shapes(model, 1, False, tables)
  params = {k: np.float32(RNG.normal(size=x)) for k, x in found.items()}
  params = convert.names.unflatten(params)
  convert.save(tmp_path / "ours", model, params, image_size=(8, 12))
  again, back = convert.load_pretrained(tmp_path / "ours")
  assert again == model
  same(back, params)
  file = tmp_path / "t.safetensors"
  convert.save(file, model, params, to="timm", image_size=(8, 12))
  # The file does not tell the shape of the grid, nor heads and drop path.
  again, back = convert.load_pretrained(file, num_heads=2)
  assert again == model.clone(drop_path=0.0)
  same(back, params)
  if pool == "mean":
    with pytest.raises(UserError, match=r"pool='mean' has no place.*--to=timm"):
      convert.save(
        tmp_path / "hf", model, params, to="huggingface", image_size=(8, 12)
      )
    assert not (tmp_path / "hf").exists()


def test_what_a_form_cannot_hold_is_told_or_refused(tmp_path):
  model, params = load_case("mae_p4_rawpix")
  file = tmp_path / "t.safetensors"
  size = (16, 16)
  other = model.clone(norm_epsilon=1e-5)
  lost = convert.save(file, other, params, to="timm", image_size=size)
  assert lost == [
    "the decoder, 19 parameters",
    "norm_epsilon=1e-05 (theirs is 1e-6)",
  ]
  _, back = convert.load_pretrained(file, num_heads=3)
  same(back, {"encoder": params["encoder"]})
  before = file.read_bytes()
  for path, to, message in [
    (file, "mae", "exists, and is not overwritten"),
    (tmp_path, "umae_jax", "exists, and is not overwritten"),
    (tmp_path / "x.pth", "mae", r"written as a \.safetensors file"),
    (tmp_path / "x", "onnx", r"no form 'onnx'"),
    (file / "x.safetensors", "mae", "cannot be written"),
  ]:
    with pytest.raises(UserError, match=message):
      convert.save(path, model, params, to=to, image_size=size)
  with pytest.raises(UserError, match=r"image_size=\(H, W\).*--image_size"):
    convert.save(tmp_path / "y.safetensors", model, params, to="mae")
  assert [x.name for x in tmp_path.iterdir()] == ["t.safetensors"]
  assert file.read_bytes() == before


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
  def fail(path, tensors):
    path.write_bytes(b"half")
    raise OSError("disk full")

  monkeypatch.setattr(convert.files, "write_tensors", fail)
  model, params = load_case("mae_p4_rawpix")
  for form, name in (("mae", "a.safetensors"), ("huggingface", "b")):
    with pytest.raises(OSError, match="disk full"):
      convert.save(tmp_path / name, model, params, to=form, image_size=(16, 16))
  assert not list(tmp_path.iterdir())


# transformers.


HF = dict(
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  intermediate_size=96,
  image_size=16,
  patch_size=4,
)
HF_DECODER = dict(
  decoder_hidden_size=16,
  decoder_num_hidden_layers=1,
  decoder_num_attention_heads=2,
  decoder_intermediate_size=48,
)


def hugging_face(kind, tmp_path, **changes):
  """(module of random weights, the directory it is saved in)."""
  transformers = pytest.importorskip("transformers", reason=EXTRA)
  config = (
    transformers.ViTMAEConfig if "MAE" in kind else transformers.ViTConfig
  )
  module = getattr(transformers, kind)(config(**(HF | changes)))
  shake(module).save_pretrained(tmp_path / "theirs")
  return module, tmp_path / "theirs"


def there_and_back(kind, path, model, params):
  """Exported, read by transformers and saved by it: the same file."""
  import transformers

  to = path.with_name("back")
  convert.save(to, model, params, to="huggingface", image_size=(16, 16))
  cls = getattr(transformers, kind)
  module, notes = cls.from_pretrained(to, output_loading_info=True)
  assert not any(notes.values()), notes
  module.save_pretrained(to.with_name("again"))
  same(path / "model.safetensors", to.with_name("again") / "model.safetensors")
  return module


@pytest.mark.parametrize("epsilon", [1e-12, 1e-3])
def test_vitmae_for_pretraining(tmp_path, epsilon):
  import_torch = pytest.importorskip("torch", reason=EXTRA)
  kind = "ViTMAEForPreTraining"
  module, path = hugging_face(
    kind, tmp_path, **HF_DECODER, layer_norm_eps=epsilon
  )
  model, params = convert.load_pretrained(path)
  assert (model.num_heads, model.decoder_num_heads) == (4, 2)
  assert model.norm_epsilon == epsilon and model.mlp_ratio == 3
  tensor = import_torch.from_numpy
  expected = module(tensor(IMAGES), noise=tensor(NOISE))
  out = run(model, params, NOISE)
  assert_close(out.prediction, expected.logits)
  np.testing.assert_array_equal(out.mask, expected.mask.numpy())
  module = there_and_back(kind, path, model, params)
  again = module.eval()(tensor(IMAGES), noise=tensor(NOISE))
  np.testing.assert_array_equal(again.logits.detach(), expected.logits.detach())


def test_names_in_memory_are_read_as_those_on_disk(tmp_path):
  module, path = hugging_face("ViTMAEForPreTraining", tmp_path, **HF_DECODER)
  tensors = {k: x.numpy() for k, x in module.state_dict().items()}
  assert "vit.layers.0.attention.q_proj.weight" in tensors
  (tmp_path / "memory").mkdir()
  safetensors_numpy.save_file(tensors, tmp_path / "memory/model.safetensors")
  config = (path / "config.json").read_text()
  (tmp_path / "memory" / "config.json").write_text(config)
  _, params = convert.load_pretrained(path)
  same(convert.load_pretrained(tmp_path / "memory")[1], params)


def test_vit_for_image_classification(tmp_path):
  torch = pytest.importorskip("torch", reason=EXTRA)
  kind = "ViTForImageClassification"
  module, path = hugging_face(kind, tmp_path, num_labels=5)
  model, params = convert.load_pretrained(path)
  assert model.pool == "cls" and model.num_classes == 5
  expected = module(torch.from_numpy(IMAGES)).logits
  assert_close(run(model, params), expected)
  there_and_back(kind, path, model, params)


@pytest.mark.parametrize("kind", ["ViTMAEModel", "ViTModel"])
def test_a_bare_encoder(kind, tmp_path):
  torch = pytest.importorskip("torch", reason=EXTRA)
  module, path = hugging_face(kind, tmp_path)
  model, params = convert.load_pretrained(path)
  assert "decoder" not in params
  if kind == "ViTMAEModel":
    module.config.mask_ratio = 0.0
  noise = dict(noise=torch.arange(16.0)[None].repeat(2, 1))
  noise = noise if kind == "ViTMAEModel" else {}
  expected = module(torch.from_numpy(IMAGES), **noise).last_hidden_state
  assert_close(run(model, params, method=model.encode), expected)
  if kind == "ViTMAEModel":
    there_and_back(kind, path, model, params)


# timm.


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_timm(pool, tmp_path):
  torch = pytest.importorskip("torch", reason=EXTRA)
  timm = pytest.importorskip("timm", reason=EXTRA)
  options = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4)
  options |= dict(num_classes=5, global_pool=pool)
  module = shake(timm.create_model("vit_tiny_patch16_224", **options))
  path = tmp_path / "timm.safetensors"
  safetensors_numpy.save_file(
    {k: x.numpy() for k, x in module.state_dict().items()}, path
  )
  model, params = convert.load_pretrained(path, num_heads=4)
  assert_close(run(model, params), module(torch.from_numpy(IMAGES)))
  back = tmp_path / "back.safetensors"
  assert convert.save(back, model, params, to="timm") == []
  same(path, back)
  torch.nn.Module.load_state_dict(
    module,
    {
      k: torch.from_numpy(x)
      for k, x in safetensors_numpy.load_file(back).items()
    },
  )


def test_how_a_model_was_computed_is_not_exported(tmp_path):
  """It says nothing of the weights, and may not be possible elsewhere."""
  model, params = load_case("mae_p8_normpix")
  execution = vit.Execution("cudnn", "full", scan_layers=True)
  changed = model.clone(
    dtype="bfloat16", execution=execution, decoder_execution=execution
  )
  convert.save(tmp_path / "ours", changed, params)
  _, fields = checkpoint.load_params(tmp_path / "ours")
  assert not {"dtype", "execution", "decoder_execution"} & set(fields)
  assert convert.load_pretrained(tmp_path / "ours")[0] == model
