import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umae_jax import UserError, convert, sharding
from umae_jax import config as config_lib
from umae_jax.benchmark import torch_side
from umae_jax.tasks import pretrain

EXTRA = "needs the extra: umae_jax[torch]"


@pytest.fixture
def config(load_config):
  c = load_config("digits", "smoke")
  c.batch_size = 6
  c.model.update(depth=1, decoder_depth=1, mlp_ratio=3.0)
  c.loss.uniformity_weight = 0.5
  return c


@pytest.mark.parametrize("normalize_pixels", [False, True])
def test_the_same_loss_of_the_same_weights(config, tmp_path, normalize_pixels):
  torch = pytest.importorskip("torch", reason=EXTRA)
  transformers = pytest.importorskip("transformers", reason=EXTRA)
  config.loss.normalize_pixels = normalize_pixels
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  plan = config_lib.plan(config, 600)
  task = pretrain.make(config, plan, mesh, None, None)
  params = jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape),
    jax.jit(task.init)(jax.random.key(0)),
  )
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (6, 8, 8, 1), np.uint8)
  noise = rng.random((6, 16), np.float32)
  batch = {"image": jnp.asarray(images), "noise": jnp.asarray(noise)}
  expected, parts = jax.jit(task.objective.loss)(params, batch, None)
  assert parts["uniformity_loss"] > 0.1 * expected  # Or it would not show.

  model = pretrain.make_model(config, mesh)
  convert.save(
    *(tmp_path / "hf", model, jax.device_get(params)),
    to="huggingface",
    image_size=(8, 8),
  )
  side = torch_side.TorchSide(config)
  exported = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "hf")
  side.model.load_state_dict(exported.state_dict())
  got = side.loss(
    torch.from_numpy(images.transpose(0, 3, 1, 2)), torch.from_numpy(noise)
  )
  np.testing.assert_allclose(got.item(), expected, rtol=1e-4)


def test_steps_change_all_that_is_trained(config):
  torch = pytest.importorskip("torch", reason=EXTRA)
  pytest.importorskip("transformers", reason=EXTRA)
  side = torch_side.TorchSide(config)
  before = {k: x.clone() for k, x in side.model.named_parameters()}
  found = side.steps("synthetic", 2)
  assert 0 < found["seconds"] < 10 and found["cpu_seconds"] > 0
  for name, x in side.model.named_parameters():
    assert torch.equal(x, before[name]) != x.requires_grad, name
  decay = [group["weight_decay"] for group in side._optimizer.param_groups]
  assert decay == [0.05, 0.0]


def test_what_this_side_cannot_do_is_told(config, monkeypatch):
  for change, message in [
    ({"data": {"image_size": (8, 12)}}, r"square images; set .*leave out"),
    ({"micro_batches": 2}, r"config\.micro_batches=2: .*set it to 1"),
  ]:
    changed = config.copy_and_resolve_references()
    changed.update(change)
    with monkeypatch.context() as patch:
      patch.setattr(importlib.util, "find_spec", lambda name: True)
      with pytest.raises(UserError, match=message):
        torch_side.check(changed)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'umae_jax\[torch\]'"):
    torch_side.check(config)
