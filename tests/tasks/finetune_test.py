import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umae_jax import UserError, models, optimizers, sharding, train_step
from umae_jax import config as config_lib
from umae_jax.tasks import finetune, inputs


@pytest.fixture
def config(config):
  config.task = "finetune"
  config.classifier.ema_decay = 0.5
  return config


def init(task, mesh):
  return train_step.init_state(
    *(task.init, task.optimizer, jax.random.key(0), mesh),
    *(task.objective.frozen, task.given),
  )


def train(task, mesh, images, labels, steps=2):
  """States after 0, 1, ... steps."""
  state = init(task, mesh)
  layout = jax.tree.map(lambda x: x.sharding, state)
  step = train_step.make_train_step(
    task.objective, task.optimizer, mesh, layout, seed=0
  )
  states = [jax.device_get(state)]
  for i in range(steps):
    rows = slice(64 * i, 64 * (i + 1))
    batch = {"image": images[rows], "label": labels[rows]}
    state, _ = step(state, sharding.to_global(batch, mesh))
    states.append(jax.device_get(state))
  return states


def test_the_run_starts_from_the_weights(config, make_task):
  """Without the encoder's norm, which the mean's own replaces."""
  task, mesh = make_task(finetune.make, config)
  params = jax.device_get(init(task, mesh).params)
  _, loaded = inputs.load_pretrained(config, mesh)
  expected = {k: x for k, x in loaded["encoder"].items() if k != "norm"}
  table = params["encoder"].pop("pos_embed")
  jax.tree.map(np.testing.assert_array_equal, params["encoder"], expected)
  assert table.shape == (1, 17, 32)
  np.testing.assert_array_equal(table[:, 0], 0)
  assert np.abs(params["head"]["kernel"]).max() < 2e-4
  params["ema"]["encoder"].pop("pos_embed")
  jax.tree.map(
    np.testing.assert_array_equal,
    *(params["ema"], {k: x for k, x in params.items() if k != "ema"}),
  )


def test_without_weights_the_run_starts_from_scratch(config, make_task):
  config.pretrained = ""
  task, mesh = make_task(finetune.make, config)
  assert task.given is None
  kernel = init(task, mesh).params["encoder"]["block0"]["fc1"]["kernel"]
  assert kernel.std() > 0


def test_averages_follow_the_training(config, make_task, train_images):
  config.optimizer.base_lr = 1e-2
  task, mesh = make_task(finetune.make, config, num_devices=2)
  states = train(task, mesh, *train_images)
  average = states[0].params["head"]["kernel"]
  for state in states[1:]:
    average = 0.5 * average + 0.5 * state.params["head"]["kernel"]
  last = states[-1].params
  np.testing.assert_allclose(last["ema"]["head"]["kernel"], average, rtol=1e-5)
  assert np.abs(last["head"]["kernel"] - average).max() > 1e-6


@pytest.mark.slow
def test_an_interrupted_fine_tuning_resumes(config, assert_resumes):
  """Averaged parameters and augmentations included."""
  config.data.rand_augment = 9.0
  assert_resumes(config)


def test_averages_are_what_is_evaluated(config, make_task):
  task, mesh = make_task(finetune.make, config)
  params = jax.device_get(init(task, mesh).params)
  key = "cross_entropy_loss"
  value = task.evaluate(params).scalars[key]
  head = {"kernel": 0 * params["head"]["kernel"], "bias": np.arange(10.0)}
  assert task.evaluate(params | {"head": head}).scalars[key] == value
  ema = params["ema"] | {"head": jax.tree.map(np.float32, head)}
  assert task.evaluate(params | {"ema": ema}).scalars[key] > value + 0.1


def test_augmentations_are_drawn_anew_for_every_step(config, make_task):
  task, _ = make_task(finetune.make, config)
  image = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
  batch = {"image": image, "label": np.arange(8, dtype=np.int32)}
  randomize = jax.jit(task.objective.randomize)
  first, again, other = (
    randomize(jax.random.key(seed), batch) for seed in (0, 0, 1)
  )
  for key in ("image", "target", "drop"):
    np.testing.assert_array_equal(first[key], again[key])
    assert np.abs(first[key] - other[key]).max() > 0
  assert first["drop"].shape == (8, 2, 2)
  np.testing.assert_allclose(first["target"].sum(1), 1, rtol=1e-5)


def test_without_options_the_loss_is_plain_cross_entropy(config, make_task):
  config.classifier.update(mixup=0.0, cutmix=0.0, random_erasing=0.0)
  config.classifier.update(label_smoothing=0.0, drop_path=0.0, ema_decay=0.0)
  task, mesh = make_task(finetune.make, config)
  params = init(task, mesh).params
  image = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
  labels = np.arange(8, dtype=np.int32)
  batch = task.objective.randomize(
    jax.random.key(0), {"image": image, "label": labels}
  )
  x = inputs.normalize(jnp.asarray(image), config.data.mean, config.data.std)
  np.testing.assert_allclose(batch["image"], x, rtol=1e-4, atol=1e-5)
  loss, _ = task.objective.loss(params, batch, None)
  model = finetune.make_model(config, mesh, 10)
  logits = model.apply({"params": params}, x)
  expected = -jax.nn.log_softmax(logits)[np.arange(8), labels].mean()
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert task.objective.frozen == ()


def test_positions_and_class_token_do_not_decay(config, make_task):
  config.optimizer.weight_decay = 0.5
  config.classifier.ema_decay = 0.0
  config.pretrained = ""
  task, mesh = make_task(finetune.make, config)
  params = init(task, mesh).params
  zero = jax.tree.map(jnp.zeros_like, params)
  state = task.optimizer.init(params)
  updates, _ = task.optimizer.update(zero, state, params)
  encoder = updates["encoder"]
  assert jnp.abs(encoder["pos_embed"]).max() == 0
  assert jnp.abs(encoder["cls_token"]).max() == 0
  scales = optimizers.layer_scales(params, 0.65)["encoder"]
  kernel = params["encoder"]["block0"]["fc1"]["kernel"]
  scale = scales["block0"]["fc1"]["kernel"]
  rate = task.schedule(0)
  np.testing.assert_allclose(
    encoder["block0"]["fc1"]["kernel"], -rate * 0.5 * scale * kernel, rtol=1e-5
  )


def test_weights_that_do_not_fit_the_pool_are_refused(
  config, make_task, monkeypatch
):
  """The un-normed encoder of a mean-pooling classifier, for pool "cls"."""
  model = models.MaskedAutoencoder(
    *(8, 32, 2, 4), decoder_width=24, decoder_depth=2, decoder_num_heads=3
  )
  _, mesh = make_task(finetune.make, config)
  _, params = inputs.load_pretrained(config, mesh)
  encoder = {k: x for k, x in params["encoder"].items() if k != "norm"}
  monkeypatch.setattr(
    inputs, "load_pretrained", lambda *_: (model, {"encoder": encoder})
  )
  config.classifier.pool = "cls"
  with pytest.raises(UserError, match=r"pool='cls'.*encoder/norm/bias"):
    make_task(finetune.make, config)


@pytest.fixture
def finetuned(config, monkeypatch):
  """Weights with a head of ten classes and an epsilon of their own."""
  model = models.Classifier(
    *(8, 32, 2, 4), num_classes=10, pool="mean", norm_epsilon=1e-3
  )
  params = jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 32, 32, 3)))
  params = jax.device_get(params["params"])
  monkeypatch.setattr(inputs, "load_pretrained", lambda *_: (model, params))
  config.classifier.ema_decay = 0.0
  return params


def test_training_starts_with_a_new_head(finetuned, config, make_task):
  task, _ = make_task(finetune.make, config)
  assert set(task.given) == {"encoder"}
  assert task.found["norm_epsilon"] == 1e-3


def test_without_training_the_weights_are_evaluated(
  finetuned, config, make_task
):
  config.num_epochs = 0.0
  task, mesh = make_task(finetune.make, config)
  params = jax.device_get(init(task, mesh).params)
  jax.tree.map(np.testing.assert_array_equal, params, finetuned)
  del finetuned["head"]
  with pytest.raises(UserError, match=r"head/bias: \(10,\) here, None there"):
    make_task(finetune.make, config)


@pytest.mark.parametrize(
  "model, epochs, rate, decay, drop",
  [
    ("vit_b", 100, 2e-3, 0.65, 0.1),
    ("vit_l", 50, 4e-3, 0.75, 0.2),
    ("vit_h", 50, 4e-3, 0.75, 0.3),
  ],
)
def test_the_recipe_is_maes(model, epochs, rate, decay, drop):
  c = config_lib.defaults()
  c.model.update(config_lib.MODELS[model])
  config_lib.finetune(c)
  plan = config_lib.plan(c, 1_281_167)
  assert c.num_epochs == epochs
  assert plan.learning_rate == pytest.approx(rate)
  assert plan.warmup_steps == 5 * 1251
  assert c.classifier.layer_decay == decay
  assert c.classifier.drop_path == drop
  assert (c.optimizer.b2, c.optimizer.min_lr) == (0.999, 1e-6)
  assert c.data.rand_augment == 9 and c.data.flip
  assert tuple(c.data.crop_scale) == (0.08, 1.0)
  options = c.classifier
  assert (options.mixup, options.cutmix) == (0.8, 1.0)
  assert (options.label_smoothing, options.random_erasing) == (0.1, 0.25)
