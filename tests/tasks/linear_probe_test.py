import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from umae_jax import config as config_lib
from umae_jax import models, optimizers, sharding, train_step
from umae_jax.tasks import inputs, linear_probe


def init(task, mesh):
  return train_step.init_state(
    *(task.init, task.optimizer, jax.random.key(0), mesh),
    *(task.objective.frozen, task.given),
  )


def train(task, mesh, images, labels, micro_batches=1, steps=3):
  state = init(task, mesh)
  layout = jax.tree.map(lambda x: x.sharding, state)
  step = train_step.make_train_step(
    task.objective,
    *(task.optimizer, mesh, layout),
    seed=0,
    micro_batches=micro_batches,
  )
  for i in range(steps):
    rows = slice(64 * i, 64 * (i + 1))
    batch = {"image": images[rows], "label": labels[rows]}
    state, scalars = step(state, sharding.to_global(batch, mesh))
  return jax.device_get(state), jax.device_get(scalars)


@pytest.fixture
def trained(config, make_task, train_images):
  task, mesh = make_task(linear_probe.make, config)
  return task, *train(task, mesh, *train_images)


def test_the_encoder_keeps_every_bit(trained):
  task, state, _ = trained
  given = jax.tree.leaves_with_path(task.given)
  after = dict(jax.tree.leaves_with_path(state.params["encoder"]))
  assert len(given) == len(after)
  for path, x in given:
    assert np.asarray(x).tobytes() == after[path].tobytes(), path
  assert np.abs(state.params["head"]["bias"]).max() > 0  # And it did train.
  # Momentum is kept for the head alone.
  widths = {x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim}
  assert widths == {(32, 10), (10,)}


def test_three_steps_are_those_of_the_definition(trained, config, train_images):
  """Encoder, BatchNorm, softmax and LARS in plain NumPy and JAX."""
  task, state, scalars = trained
  images, labels = train_images
  model = models.MaskedAutoencoder(
    *(8, 32, 2, 4), decoder_width=24, decoder_depth=2, decoder_num_heads=3
  )
  x = inputs.normalize(jnp.asarray(images), config.data.mean, config.data.std)
  tokens = jax.jit(
    lambda x: model.apply(
      {"params": {"encoder": task.given}}, x, method=model.encode
    )
  )(x)
  features = np.asarray(tokens[:, 0], np.float64)
  head = linear_probe.init_head(jax.random.key(0), 32, 10)
  optimizer = optimizers.lars(task.schedule)
  opt_state = optimizer.init(head)
  mean, var = np.zeros(32), np.ones(32)

  def loss(head, x, y):
    logits = jnp.float32(x) @ head["kernel"] + head["bias"][None]
    one_hot = jax.nn.one_hot(y, 10)
    return -(jax.nn.log_softmax(logits) * one_hot).sum(-1).mean()

  for i in range(3):
    rows = slice(64 * i, 64 * (i + 1))
    batch = features[rows]
    standard = (batch - batch.mean(0)) / np.sqrt(batch.var(0) + 1e-6)
    value, gradient = jax.value_and_grad(loss)(head, standard, labels[rows])
    updates, opt_state = optimizer.update(gradient, opt_state, head)
    head = optax.apply_updates(head, updates)
    mean = 0.9 * mean + 0.1 * batch.mean(0)
    var = 0.9 * var + 0.1 * batch.var(0, ddof=1)
  np.testing.assert_allclose(scalars["loss"], value, rtol=1e-4)
  for key in head:
    np.testing.assert_allclose(
      state.params["head"][key], head[key], rtol=1e-3, atol=1e-5
    )
  norm = state.params["batch_norm"]
  np.testing.assert_allclose(norm["mean"], mean, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(norm["var"], var, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("num_devices, micro_batches", [(1, 1), (2, 4)])
def test_neither_devices_nor_micro_batches_matter(
  trained, config, make_task, train_images, num_devices, micro_batches
):
  """BatchNorm's statistics are those of the whole batch."""
  _, state, scalars = trained
  task, mesh = make_task(linear_probe.make, config, num_devices)
  other, others = train(task, mesh, *train_images, micro_batches)
  np.testing.assert_allclose(others["loss"], scalars["loss"], rtol=1e-4)
  for key in ("head", "batch_norm"):
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5),
      *(state.params[key], other.params[key]),
    )


def test_evaluation_uses_the_running_averages(trained, config, train_images):
  task, state, _ = trained
  params = state.params
  evaluation = task.evaluate(params)
  assert evaluation.scalars["test_images"] == 64
  assert set(evaluation.files) == {"per_class.csv"}
  shifted = params["batch_norm"] | {"mean": params["batch_norm"]["mean"] + 3}
  other = task.evaluate(params | {"batch_norm": shifted})
  key = "cross_entropy_loss"
  assert abs(other.scalars[key] - evaluation.scalars[key]) > 1e-3


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_an_image_is_encoded_once(
  config, make_task, train_images, micro_batches
):
  """For the statistics of BatchNorm and for the loss, in any parts."""
  task, mesh = make_task(linear_probe.make, config, 1)
  params = init(task, mesh).params
  batch = {"image": train_images[0][:64], "label": train_images[1][:64]}

  def count(function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments)).count("dot_general")

  encoder = count(task.objective.prepare, params, batch)
  step = count(
    lambda params, batch: train_step.gradients(
      task.objective, params, batch, micro_batches
    ),
    *(params, batch),
  )
  assert encoder > 10
  assert step == encoder + 2  # The head's, forwards and backwards.


@pytest.mark.slow
def test_an_interrupted_probe_resumes(config, assert_resumes):
  """Running averages and momentum included."""
  assert_resumes(config)


def test_patches_mean_is_another_feature(config, make_task):
  config.probe.feature = "mean"
  tokens = jnp.arange(24.0).reshape(2, 3, 4)
  np.testing.assert_allclose(inputs.pool(tokens, "cls"), tokens[:, 0])
  np.testing.assert_allclose(
    inputs.pool(tokens, "mean"), (tokens[:, 1] + tokens[:, 2]) / 2
  )
  task, mesh = make_task(linear_probe.make, config)
  mean = task.evaluate(init(task, mesh).params).scalars
  config.probe.feature = "cls"
  task, mesh = make_task(linear_probe.make, config)
  cls = task.evaluate(init(task, mesh).params).scalars
  assert mean["cross_entropy_loss"] != cls["cross_entropy_loss"]


def test_the_recipe_is_maes():
  c = config_lib.defaults()
  config_lib.linear_probe(c)
  plan = config_lib.plan(c, 1_281_167)
  assert plan.learning_rate == pytest.approx(6.4)
  assert (plan.total_steps, plan.warmup_steps) == (90 * 78, 10 * 78)
  assert c.optimizer.weight_decay == 0
  assert tuple(c.data.crop_scale) == (0.08, 1.0) and c.data.flip


def test_constants_of_head_and_batch_norm():
  """Kernel of deviation 0.01; epsilon 1e-6 inside of the root."""
  head = linear_probe.init_head(jax.random.key(0), 768, 1000)
  np.testing.assert_allclose(head["kernel"].std(), 0.01, rtol=0.01)
  assert not head["bias"].any()
  head = {"kernel": jnp.eye(2), "bias": jnp.array([0.0, 5.0])}
  got = linear_probe.classify(
    head, jnp.array([[3.0, 3.0]]), jnp.array([2.0, 1.0]), jnp.array([3e-6, 4.0])
  )
  np.testing.assert_allclose(got, [[500, 6]], rtol=1e-5)
