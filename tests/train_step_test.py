import collections
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from umae_jax import losses, models, sharding, train_step
from umae_jax.benchmark import jax_side
from umae_jax.tasks import pretrain

# SGD, not Adam: attention's key bias has a gradient of exactly zero in real
# arithmetic, and Adam would scale its round-off up to a full-size update.
SGD = optax.sgd(0.1, momentum=0.9)
MODEL = models.MaskedAutoencoder(
  patch_size=4,
  width=32,
  depth=1,
  num_heads=2,
  decoder_width=16,
  decoder_depth=1,
  decoder_num_heads=2,
)
OBJECTIVE = pretrain.make_objective(
  MODEL,
  mean=(0.5,) * 3,
  std=(0.5,) * 3,
  mask_ratio=0.75,
  normalize_pixels=True,
  uniformity_weight=1.0,  # Large, so that its gradient is not round-off.
)
BATCHES = np.random.default_rng(0).integers(
  0, 256, size=(3, 16, 16, 16, 3), dtype=np.uint8
)
# Every row has a brightness of its own: data that differ between devices.
BATCHES = BATCHES // np.arange(1, 17, dtype=np.uint8)[:, None, None, None]


@jax.jit
def init(key):
  images = jnp.zeros((1, 16, 16, 3))
  return MODEL.init(key, images, jnp.zeros((1, 16)))["params"]


@pytest.fixture
def split_small_arrays(monkeypatch):
  """The model is too small for FSDP, which leaves small arrays whole."""
  original = sharding.state_sharding
  monkeypatch.setattr(
    *(sharding, "state_sharding"), functools.partial(original, min_size=256)
  )


def assert_split(state, fsdp):
  """Of some arrays, a device has 1 / fsdp alone."""
  parts = {
    x.size // np.prod(x.sharding.shard_shape(x.shape))
    for x in jax.tree.leaves(state.params)
  }
  assert parts == {1, fsdp}


@functools.cache
def run(num_devices, fsdp=1, micro_batches=1, num_steps=3):
  """Trains on some of the fake devices; (state, metrics of the steps)."""
  mesh = sharding.make_mesh(fsdp, jax.devices()[:num_devices])
  state = train_step.init_state(init, SGD, jax.random.key(0), mesh)
  assert_split(state, fsdp)
  return advance(state, mesh, micro_batches, BATCHES[:num_steps])


def advance(state, mesh, micro_batches=1, batches=BATCHES, objective=OBJECTIVE):
  layout = jax.tree.map(lambda x: x.sharding, state)
  step = train_step.make_train_step(
    objective, SGD, mesh, layout, seed=0, micro_batches=micro_batches
  )
  metrics = []
  for images in batches:
    state, scalars = step(state, sharding.to_global({"image": images}, mesh))
    metrics.append(scalars)
  return jax.device_get(state), jax.device_get(metrics)


@pytest.mark.usefixtures("split_small_arrays")
@pytest.mark.parametrize("num_devices, fsdp", [(2, 1), (8, 2), (8, 8)])
def test_number_of_devices_does_not_change_the_run(num_devices, fsdp):
  one, metrics_one = run(1)
  many, metrics_many = run(num_devices, fsdp)
  chex.assert_trees_all_close(metrics_one, metrics_many, rtol=1e-4)
  for a, b in zip(metrics_one, metrics_many):
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
  chex.assert_trees_all_close(one.params, many.params, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_devices, micro_batches", [(1, 16), (4, 4)])
def test_micro_batches_do_not_change_the_run(num_devices, micro_batches):
  """Exact for the whole objective: same masks, uniformity of all pairs."""
  whole, metrics_whole = run(1)
  parts, metrics_parts = run(num_devices, 1, micro_batches)
  chex.assert_trees_all_close(metrics_whole, metrics_parts, rtol=1e-4)
  chex.assert_trees_all_close(whole.params, parts.params, rtol=1e-4, atol=1e-5)


def test_uniformity_of_each_micro_batch_would_be_another_gradient():
  """The test above can fail: without statistics, parts give another one."""
  params = init(jax.random.key(0))
  batch = OBJECTIVE.randomize(jax.random.key(1), {"image": BATCHES[0]})
  grad = jax.jit(train_step.gradients, static_argnums=(0, 3))
  (whole, _), exact, _ = grad(OBJECTIVE, params, batch, 1)
  (same, _), parts, _ = grad(OBJECTIVE, params, batch, 4)
  per_part = OBJECTIVE._replace(statistics=None)
  (other, _), wrong, _ = grad(per_part, params, batch, 4)
  size = optax.tree.norm(exact)

  def distance(tree):
    return optax.tree.norm(optax.tree.sub(tree, exact)) / size

  assert distance(parts) < 1e-5 < 1e-2 < distance(wrong)
  np.testing.assert_allclose(same, whole, rtol=1e-5)
  assert abs(other - whole) > 1e-3 * whole


def test_matches_a_plain_optax_loop():
  """The same three updates, written out without mesh, step or TrainState."""
  params = init(jax.random.key(0))
  opt_state = SGD.init(params)

  def loss(params, images, key):
    images = (images.astype(jnp.float32) / 255 - 0.5) / 0.5
    noise = jax.random.uniform(key, (16, 16))
    out = MODEL.apply({"params": params}, images, noise)
    return losses.reconstruction_loss(
      images, out.prediction, out.mask, patch_size=4, normalize_pixels=True
    ) + losses.uniformity_loss(out.tokens[:, 0])

  grad = jax.jit(jax.grad(loss))
  for step, images in enumerate(BATCHES):
    key = jax.random.fold_in(jax.random.key(0), step)
    grads = grad(params, images, key)
    updates, opt_state = jax.jit(SGD.update)(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
  state, _ = run(1)
  assert state.step == len(BATCHES)
  assert state.skipped == 0
  chex.assert_trees_all_close(state.params, params, rtol=1e-4, atol=1e-5)
  chex.assert_trees_all_close(state.opt_state, opt_state, rtol=1e-4, atol=1e-4)


def test_state_is_really_sharded_and_stays_so():
  """Guards the invariance tests from passing on replicated copies."""
  mesh = sharding.make_mesh(8)
  wide = optax.sgd(0.1, momentum=0.9)

  def init(key):
    return {"w": jax.random.normal(key, (256, 512))}

  state = train_step.init_state(init, wide, jax.random.key(0), mesh)
  layout = jax.tree.map(lambda x: x.sharding, state)
  objective = train_step.Objective(
    lambda key, batch: batch,
    None,
    lambda params, batch, _: (jnp.square(batch @ params["w"]).mean(), {}),
  )
  step = train_step.make_train_step(objective, wide, mesh, layout, seed=0)
  batch = sharding.to_global(np.ones((8, 256), np.float32), mesh)
  state, _ = step(state, batch)
  for x in (state.params["w"], state.opt_state[0].trace["w"]):
    assert {s.data.shape for s in x.addressable_shards} == {(256, 64)}


@pytest.mark.parametrize("fsdp", [2, 8])
def test_bytes_of_state_on_a_device_fall_by_the_fsdp_factor(fsdp):
  """Of a ViT with Adam's moments: all but small arrays are split."""
  model = models.MaskedAutoencoder(4, 512, 2, 4, 256, 1, 4)

  def init(key):
    images = jnp.zeros((1, 16, 16, 3))
    return model.init(key, images, jnp.zeros((1, 16)))["params"]

  def bytes_per_device(fsdp):
    mesh = sharding.make_mesh(fsdp)
    state = train_step.abstract_state(
      init, optax.adam(0.1), jax.random.key(0), mesh
    )
    return sum(
      np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(state)
    )

  ratio = bytes_per_device(1) / bytes_per_device(fsdp)
  assert 0.8 * fsdp < ratio <= fsdp


def test_every_step_draws_new_masks_and_they_follow_from_the_seed():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  frozen = optax.set_to_zero()

  # The real draw of noise, and a loss that is a mean of it.
  objective = OBJECTIVE._replace(
    loss=lambda params, batch, _: (
      (batch["noise"] * params["w"]).mean(),
      {"noise": batch["noise"].mean()},
    )
  )

  def losses_of(seed):
    state = train_step.init_state(
      lambda key: {"w": jnp.ones(())}, frozen, jax.random.key(0), mesh
    )
    layout = jax.tree.map(lambda x: x.sharding, state)
    step = train_step.make_train_step(
      objective, frozen, mesh, layout, seed=seed
    )
    batch = sharding.to_global({"image": BATCHES[0]}, mesh)
    values = []
    for _ in range(3):
      state, scalars = step(state, batch)
      values.append(float(scalars["noise"]))
    return values

  first = losses_of(0)
  assert len(set(first)) == 3
  assert losses_of(0) == first
  assert not set(losses_of(1)) & set(first)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(bad):
  """Linear loss x * w: a batch with a bad value has a bad gradient."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  objective = train_step.Objective(
    lambda key, batch: batch,
    None,
    lambda params, batch, _: ((batch * params["w"]).mean(), {}),
  )

  def make(key):
    del key
    return {"w": jnp.ones(())}

  def play(values):
    state = train_step.init_state(make, SGD, jax.random.key(0), mesh)
    batches = np.float32(values)[:, None]
    layout = jax.tree.map(lambda x: x.sharding, state)
    step = train_step.make_train_step(objective, SGD, mesh, layout, seed=0)
    history = []
    for batch in batches:
      state, scalars = step(state, sharding.to_global(batch, mesh))
      history.append(
        (int(scalars["skipped"]), int(scalars["skipped_in_a_row"]))
      )
    return state, history

  good, _ = play([1, 2])
  state, history = play([1, bad, bad, 2])
  assert history == [(0, 0), (1, 1), (2, 2), (2, 0)]
  assert state.step == 4
  chex.assert_trees_all_equal(state.params, good.params)
  chex.assert_trees_all_equal(state.opt_state, good.opt_state)
  # After five in a row nothing is applied until the host has looked.
  state, history = play([1] + [bad] * 5 + [2])
  assert history[-2:] == [(5, 5), (6, 6)]
  chex.assert_trees_all_equal(state.params, play([1])[0].params)


def test_the_step_donates_the_state():
  mesh = sharding.make_mesh()
  state = train_step.init_state(
    lambda key: {"w": jnp.ones(())}, SGD, jax.random.key(0), mesh
  )
  layout = jax.tree.map(lambda x: x.sharding, state)
  objective = train_step.Objective(
    lambda key, batch: batch,
    None,
    lambda params, batch, _: ((batch * params["w"]).mean(), {}),
  )
  step = train_step.make_train_step(objective, SGD, mesh, layout, seed=0)
  step(state, sharding.to_global(np.ones((8, 1), np.float32), mesh))
  assert all(x.is_deleted() for x in jax.tree.leaves(state))


def follow_run(num_devices, micro_batches):
  """Two steps of a weight beside a frozen tree and a running average."""
  objective = train_step.Objective(
    lambda key, batch: batch,
    lambda params, batch: (batch * params["constant"]).mean(),
    lambda params, batch, mean: (
      jnp.square(batch * params["w"] - params["constant"] - mean).mean(),
      {},
    ),
    frozen=("constant", "average"),
    follow=lambda params, mean: {
      "average": 0.5 * params["average"] + 0.5 * mean * params["w"]
    },
  )

  def init(key, given):
    del key
    return given | {"w": jnp.ones(()), "average": jnp.zeros(())}

  mesh = sharding.make_mesh(devices=jax.devices()[:num_devices])
  given = {"constant": np.float32(3)}
  arguments = (jax.random.key(0), mesh, objective.frozen, given)
  state = train_step.init_state(init, SGD, *arguments)
  shapes = train_step.abstract_state(init, SGD, *arguments)
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, shapes)
  layout = jax.tree.map(lambda x: x.sharding, state)
  step = train_step.make_train_step(
    objective, SGD, mesh, layout, seed=0, micro_batches=micro_batches
  )
  for batch in np.arange(16, dtype=np.float32).reshape(2, 8, 1) / 8:
    state, _ = step(state, sharding.to_global(batch, mesh))
  return jax.device_get(state)


@pytest.mark.parametrize("num_devices, micro_batches", [(1, 1), (2, 4)])
def test_frozen_parameters_follow_or_stay(num_devices, micro_batches):
  """The average uses the updated weight and the whole batch's statistics."""
  state = follow_run(num_devices, micro_batches)
  w, trace, average = 1.0, 0.0, 0.0
  for batch in np.arange(16).reshape(2, 8) / 8:
    mean = 3 * batch.mean()
    gradient = (2 * (batch * w - 3 - mean) * batch).mean()
    trace = 0.9 * trace + gradient
    w -= 0.1 * trace
    average = 0.5 * average + 0.5 * mean * w
  np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
  np.testing.assert_allclose(state.params["average"], average, rtol=1e-5)
  assert state.params["constant"] == 3
  # Nothing is kept for what is not trained.
  assert set(state.opt_state[0].trace) == {"w"}


def test_a_skipped_step_leaves_averages_alone():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  objective = train_step.Objective(
    lambda key, batch: batch,
    None,
    lambda params, batch, _: ((batch * params["w"]).mean(), {}),
    frozen=("average",),
    follow=lambda params, _: {"average": params["average"] + 1},
  )
  state = train_step.init_state(
    lambda key: {"w": jnp.ones(()), "average": jnp.zeros(())},
    *(SGD, jax.random.key(0), mesh, objective.frozen),
  )
  layout = jax.tree.map(lambda x: x.sharding, state)
  step = train_step.make_train_step(objective, SGD, mesh, layout, seed=0)
  for value in (1.0, np.nan, 1.0):
    state, _ = step(state, sharding.to_global(np.full((1, 1), value), mesh))
  assert state.params["average"] == 2


def test_frozen_bits_do_not_change():
  """Adding a zero update would turn -0 into 0, and NaN into another NaN."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  given = {"frozen": np.array([-0.0, 1e-45, np.nan], np.float32)}
  objective = train_step.Objective(
    lambda key, batch: batch,
    None,
    lambda params, batch, _: ((batch * params["w"]).mean(), {}),
    frozen=("frozen",),
  )
  state = train_step.init_state(
    lambda key, given: given | {"w": jnp.ones(())},
    *(SGD, jax.random.key(0), mesh, objective.frozen, given),
  )
  layout = jax.tree.map(lambda x: x.sharding, state)
  step = train_step.make_train_step(objective, SGD, mesh, layout, seed=0)
  state, _ = step(state, sharding.to_global(np.ones((1, 1), np.float32), mesh))
  assert np.asarray(state.params["frozen"]).tobytes() == (
    given["frozen"].tobytes()
  )


def advance_at_once(numbers, num_devices=1, fsdp=1):
  """Steps on drawn batches, `numbers` of them at a time."""
  mesh = sharding.make_mesh(fsdp, jax.devices()[:num_devices])
  state = train_step.init_state(init, SGD, jax.random.key(0), mesh)
  assert_split(state, fsdp)
  layout = jax.tree.map(lambda x: x.sharding, state)

  def draw(data, step):
    return {"image": data[step % len(BATCHES)]}

  step = train_step.make_train_step(
    OBJECTIVE, SGD, mesh, layout, seed=0, draw=draw
  )
  data = jax.device_put(BATCHES, sharding.replicated(mesh))
  for number in numbers:
    state, scalars = step(state, data, np.int32(number))
  assert step._cache_size() == 1  # Compiled once, whatever the number.
  assert jax.tree.map(lambda x: x.sharding, state) == layout
  return jax.device_get((state, scalars))


def test_steps_at_once_are_bit_for_bit_single_steps():
  singly = advance_at_once([1] * 5)
  chex.assert_trees_all_equal(singly, advance_at_once([2, 3]))
  assert singly[0].step == 5


@pytest.mark.usefixtures("split_small_arrays")
@pytest.mark.parametrize("num_devices, fsdp", [(1, 1), (8, 2)])
def test_steps_at_once_are_those_of_batches_from_the_host(num_devices, fsdp):
  state, scalars = advance_at_once([3], num_devices, fsdp)
  expected, metrics = run(1)
  chex.assert_trees_all_close(scalars, metrics[-1], rtol=1e-4)
  chex.assert_trees_all_close(
    state.params, expected.params, rtol=1e-4, atol=1e-5
  )


def program(objective, batch_size):
  """The compiled step on eight devices."""
  mesh = sharding.make_mesh()
  state = train_step.init_state(init, SGD, jax.random.key(0), mesh)
  layout = jax.tree.map(lambda x: x.sharding, state)
  step = train_step.make_train_step(objective, SGD, mesh, layout, seed=0)
  images = np.zeros((batch_size, 16, 16, 3), np.uint8)
  batch = sharding.to_global({"image": images}, mesh)
  return step.lower(state, batch).compile().as_text()


def collectives(text):
  """Counts of (kind, type) of all that a program exchanges between devices."""
  kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
  found = re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", text)
  # Several may be sent together, as a tuple.
  return collections.Counter(
    (kind, part)
    for types, kind in found
    for part in re.findall(r"\w+\[[\d,]*\]", types)
  )


def test_the_uniformity_loss_adds_one_d_by_d_sum_to_the_step():
  """And nothing that grows with the batch; nor does the step scatter."""
  assert collectives("x = (f32[2,3]{1,0}, f32[]) all-reduce-start(y)") == {
    ("all-reduce", "f32[2,3]"): 1,
    ("all-reduce", "f32[]"): 1,
  }
  plain = jax_side.without_uniformity(OBJECTIVE)
  for batch_size in (16, 64):
    text = program(OBJECTIVE, batch_size)
    ours, theirs = collectives(text), collectives(program(plain, batch_size))
    assert theirs and theirs <= ours
    assert ours - theirs == {("all-reduce", "f32[32,32]"): 1}
    assert " scatter(" not in text


def test_bad_gradients_are_counted_within_steps_at_once():
  """And after five in a row nothing is applied any more."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  objective = train_step.Objective(
    lambda key, batch: batch,
    None,
    lambda params, batch, _: ((batch * params["w"]).mean(), {}),
  )
  state = train_step.init_state(
    lambda key: {"w": jnp.ones(())}, optax.sgd(0.1), jax.random.key(0), mesh
  )
  layout = jax.tree.map(lambda x: x.sharding, state)
  step = train_step.make_train_step(
    *(objective, optax.sgd(0.1), mesh, layout),
    seed=0,
    draw=lambda data, number: data[number][None],
  )
  data = np.float32([1, np.nan, 2] + [np.inf] * 5 + [4])
  state, scalars = step(state, data, np.int32(3))
  assert (int(scalars["skipped"]), int(scalars["skipped_in_a_row"])) == (1, 0)
  np.testing.assert_allclose(state.params["w"], 0.7, rtol=1e-6)
  state, scalars = step(state, data, np.int32(6))
  assert (int(scalars["skipped"]), int(scalars["skipped_in_a_row"])) == (7, 6)
  np.testing.assert_allclose(state.params["w"], 0.7, rtol=1e-6)
