import pathlib

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from umae_jax import optimizers

REFERENCE = pathlib.Path(__file__).parent / "reference"


def test_schedule_equals_the_released_one():
  figures = np.load(REFERENCE / "lr_schedule.npz")
  per_epoch = 4  # The figures are at quarters of an epoch: steps of ours.
  np.testing.assert_array_equal(figures["epoch"], np.arange(160) / per_epoch)
  schedule = optimizers.warmup_cosine(
    float(figures["base"]),
    warmup_steps=int(figures["warmup_epochs"]) * per_epoch,
    total_steps=int(figures["epochs"]) * per_epoch,
    min_learning_rate=float(figures["min_lr"]),
  )
  got = [schedule(step) for step in range(160)]
  np.testing.assert_allclose(got, figures["lr"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("warmup", [0, 5])
def test_schedule_starts_at_its_peak_without_warmup(warmup):
  schedule = optimizers.warmup_cosine(1.0, warmup_steps=warmup, total_steps=9)
  assert schedule(0) == (0 if warmup else 1)
  assert schedule(warmup) == 1
  np.testing.assert_allclose(schedule(9), 0, atol=1e-7)


def test_all_but_one_dimensional_parameters_decay():
  params = {
    "kernel": jnp.zeros((4, 4)),
    "bias": jnp.zeros(4),
    "norm": {"scale": jnp.zeros(4)},
    "cls_token": jnp.zeros((1, 1, 4)),
  }
  assert optimizers.decay_mask(params) == {
    "kernel": True,
    "bias": False,
    "norm": {"scale": False},
    "cls_token": True,
  }


def test_adamw_is_the_decoupled_one_of_pytorch():
  """Three updates against the definition, in float64 NumPy."""
  rng = np.random.default_rng(0)
  weight, bias = rng.normal(size=(3, 2)), rng.normal(size=3)
  rate, b1, b2, decay = 0.1, 0.9, 0.95, 0.3
  optimizer = optimizers.adamw(
    optax.constant_schedule(rate), b1=b1, b2=b2, weight_decay=decay
  )
  params = {"w": jnp.float32(weight), "b": jnp.float32(bias)}
  state = optimizer.init(params)
  expected = {"w": weight, "b": bias}
  mean = {key: np.zeros_like(x) for key, x in expected.items()}
  square = {key: np.zeros_like(x) for key, x in expected.items()}
  for step in range(1, 4):
    grads = {key: rng.normal(size=x.shape) for key, x in expected.items()}
    updates, state = optimizer.update(
      {key: jnp.float32(x) for key, x in grads.items()}, state, params
    )
    params = optax.apply_updates(params, updates)
    for key, x in expected.items():
      mean[key] = b1 * mean[key] + (1 - b1) * grads[key]
      square[key] = b2 * square[key] + (1 - b2) * grads[key] ** 2
      direction = (mean[key] / (1 - b1**step)) / (
        np.sqrt(square[key] / (1 - b2**step)) + 1e-8
      )
      shrunk = x * (1 - rate * decay) if key == "w" else x
      expected[key] = shrunk - rate * direction
  for key, x in expected.items():
    np.testing.assert_allclose(params[key], x, rtol=1e-5)
