import pathlib

import jax
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


def test_lars_equals_the_released_one():
  figures = np.load(REFERENCE / "lars_steps.npz")
  optimizer = optimizers.lars(
    optax.constant_schedule(float(figures["lr"])),
    momentum=float(figures["momentum"]),
    trust_coefficient=float(figures["trust_coefficient"]),
  )
  params = {"w": figures["w0"], "b": figures["b0"]}
  state = optimizer.init(params)
  for step in range(4):
    grads = {"w": figures[f"gw{step}"], "b": figures[f"gb{step}"]}
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    for key in params:
      np.testing.assert_allclose(
        params[key], figures[f"{key}{step + 1}"], rtol=1e-6, atol=1e-7
      )


def test_the_rate_of_lars_scales_the_momentum():
  """After a change of rate the old gradients count at the new one."""
  optimizer = optimizers.lars(lambda step: 1.0 * (step > 0))
  params = {"b": jnp.zeros(1)}
  state = optimizer.init(params)
  _, state = optimizer.update({"b": jnp.ones(1)}, state, params)
  updates, _ = optimizer.update({"b": jnp.zeros(1)}, state, params)
  np.testing.assert_allclose(updates["b"], [-0.9], rtol=1e-6)


def test_lars_decays_before_it_normalises_and_spares_zero_weights():
  optimizer = optimizers.lars(lambda step: 1.0, weight_decay=0.5)
  w = jnp.array([[3.0, 4.0]])
  params = {"w": w, "zero": jnp.zeros((1, 2)), "b": jnp.ones(2)}
  grads = jax.tree.map(jnp.ones_like, params)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  decayed = np.array([[2.5, 3.0]])
  expected = -decayed * 0.001 * 5 / np.linalg.norm(decayed)
  np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)
  np.testing.assert_allclose(updates["zero"], -np.ones((1, 2)), rtol=1e-6)
  np.testing.assert_allclose(updates["b"], -np.ones(2), rtol=1e-6)


def vit_tree(depth):
  leaf = jnp.ones((1, 2))
  encoder = {f"block{i}": {"fc1": {"kernel": leaf}} for i in range(depth)}
  first = {"cls_token": leaf, "pos_embed": leaf, "patch_embed": {"bias": leaf}}
  return {
    "encoder": encoder | first,
    "fc_norm": {"scale": leaf},
    "head": {"kernel": leaf},
  }


def test_layer_scales_of_vit_b_are_the_published_ones():
  """0.65 to the power of 13 at the bottom, 12 at block 0, 1 at block 11."""
  scales = optimizers.layer_scales(vit_tree(12), 0.65)
  for name in ("cls_token", "pos_embed"):
    np.testing.assert_allclose(scales["encoder"][name], 0.65**13, rtol=1e-6)
  np.testing.assert_allclose(
    scales["encoder"]["patch_embed"]["bias"], 0.65**13, rtol=1e-6
  )
  for i in range(12):
    got = scales["encoder"][f"block{i}"]["fc1"]["kernel"]
    np.testing.assert_allclose(got, 0.65 ** (12 - i), rtol=1e-6)
  assert scales["fc_norm"]["scale"] == scales["head"]["kernel"] == 1


def test_layer_decay_scales_the_whole_update():
  params = vit_tree(2)
  plain = optimizers.adamw(lambda step: 0.1, weight_decay=0.5)
  scaled = optimizers.with_layer_decay(plain, 0.5)
  grads = jax.tree.map(jnp.ones_like, params)
  expected, _ = plain.update(grads, plain.init(params), params)
  got, _ = scaled.update(grads, scaled.init(params), params)
  factors = optimizers.layer_scales(params, 0.5)
  jax.tree.map(
    lambda x, y, f: np.testing.assert_allclose(x, y * f, rtol=1e-6),
    *(got, expected, factors),
  )


def test_spared_parameters_do_not_decay():
  params = {"pos_embed": jnp.ones((1, 2, 4)), "kernel": jnp.ones((4, 4))}
  mask = optimizers.decay_mask(params, ("pos_embed",))
  assert mask == {"pos_embed": False, "kernel": True}
