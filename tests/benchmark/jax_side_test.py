import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umae_jax import UserError, models
from umae_jax.benchmark import jax_side
from umae_jax.benchmark.worker import Worker
from umae_jax.tasks import pretrain
from umae_jax.train_step import gradients

MODEL = models.MaskedAutoencoder(2, 16, 1, 2, 8, 1, 2)
RNG = np.random.default_rng(0)
BATCH = {
  "image": RNG.integers(0, 256, (6, 8, 8, 1), np.uint8),
  "noise": RNG.random((6, 16), np.float32),
}


def objective(weight):
  return pretrain.make_objective(
    MODEL,
    mean=(0.5,),
    std=(0.5,),
    mask_ratio=0.5,
    normalize_pixels=False,
    uniformity_weight=weight,
  )


def test_without_uniformity_is_plain_mae_and_computes_less():
  images = jnp.zeros((1, 8, 8, 1))
  init = jax.jit(MODEL.init)
  params = init(jax.random.key(0), images, BATCH["noise"][:1])["params"]

  def compile(objective):
    step = jax.jit(lambda params: gradients(objective, params, BATCH)[:2])
    return step.lower(params).compile()

  plain = compile(objective(0.0))
  without = compile(jax_side.without_uniformity(objective(3.0)))
  (loss, _), expected = plain(params)
  (got, _), grads = without(params)
  np.testing.assert_allclose(got, loss, rtol=1e-6)
  chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-7)
  # Z^T Z alone is 2 B D^2, and its gradient as much again at least.
  spared = plain.cost_analysis()["flops"] - without.cost_analysis()["flops"]
  assert spared >= 2 * 2 * 6 * 16**2


@pytest.mark.slow
def test_steps_of_every_kind_in_a_process(load_config, monkeypatch):
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
  config = load_config("digits", "smoke")
  config.model.update(depth=1, decoder_depth=1)
  side = Worker("umae_jax.benchmark.jax_side:JaxSide", config)
  with contextlib.closing(side):
    assert side.call("facts") == {
      "device_kind": "cpu",
      "devices": 2,
      "platform": "cpu",
      "dtype": "float32",
      "attention": "xla,xla",
    }
    seconds = side.call("compile")
    assert 0 < seconds["warm"] < seconds["cold"]
    side.call("compile_without_uniformity")
    assert side.call("open_feed") == {}
    for kind in ("synthetic", "without_uniformity", "end_to_end"):
      found = side.call("steps", kind, 3)
      assert 0 < found["seconds"] < 10 and found["cpu_seconds"] > 0
      assert (found["waited"] > 0) == (kind == "end_to_end")
    memory = side.call("memory")
    assert 1e5 < memory["peak_bytes"] < 1e9
    assert memory["process_peak_bytes"] > memory["peak_bytes"]


def test_a_bad_configuration_is_told(load_config):
  config = load_config("digits", "smoke")
  config.batch_size = 0
  with pytest.raises(UserError, match=r"config\.batch_size=0 must be"):
    Worker("umae_jax.benchmark.jax_side:JaxSide", config)
