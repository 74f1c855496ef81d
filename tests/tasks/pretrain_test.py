import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umae_jax import config as config_lib
from umae_jax import losses, sharding, train_step
from umae_jax.analysis import spectrum
from umae_jax.data import pipeline, sources
from umae_jax.models import Output, patches
from umae_jax.tasks import inputs, pretrain

DIGITS = pathlib.Path(__file__).parents[2] / "configs" / "digits.py"


def digits_config():
  spec = importlib.util.spec_from_file_location("digits", DIGITS)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config("smoke")
  config.model.update(depth=1, decoder_depth=1)
  config.evaluation.train_images = 150
  config.evaluation.test_images = 100  # Not a multiple of the batch, 64.
  return config


def make(config, num_devices=8):
  mesh = sharding.make_mesh(devices=jax.devices()[:num_devices])
  train, test = (
    sources.open_source("digits", split, image_size=(8, 8), channels=1)
    for split in ("train", "test")
  )
  plan = config_lib.plan(config, train.num_examples)
  return pretrain.make(config, plan, mesh, train, test), mesh


def test_uniformity_weight_weighs_the_uniformity():
  config = digits_config()
  config.loss.uniformity_weight = 0.5
  task, mesh = make(config)
  state = train_step.init_state(
    task.init, task.optimizer, jax.random.key(0), mesh
  )
  images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
  batch = task.objective.randomize(jax.random.key(1), {"image": images})
  assert batch["noise"].shape == (8, 16)
  loss, parts = jax.jit(task.objective.loss)(state.params, batch, None)
  np.testing.assert_allclose(
    loss, parts["reconstruction_loss"] + 0.5 * parts["uniformity_loss"]
  )
  np.testing.assert_allclose(
    parts["effective_dimension"], 1 / parts["uniformity_loss"], rtol=1e-6
  )
  moment = task.objective.statistics(state.params, batch)
  np.testing.assert_allclose(
    jnp.square(moment).sum(), parts["uniformity_loss"], rtol=1e-5
  )


@pytest.fixture(scope="module")
def evaluated():
  task, mesh = make(digits_config())
  state = train_step.init_state(
    task.init, task.optimizer, jax.random.key(0), mesh
  )
  return task, state, task.evaluate(state.params)


def test_evaluation_is_repeatable_and_leaves_parameters_alone(evaluated):
  task, state, first = evaluated
  before = jax.device_get(state.params)
  again = task.evaluate(state.params)
  assert again.scalars == first.scalars
  jax.tree.map(np.testing.assert_array_equal, before, state.params)


def test_evaluation_does_not_depend_on_the_devices(evaluated):
  _, state, expected = evaluated
  task, _ = make(digits_config(), num_devices=2)
  scalars = task.evaluate(jax.device_get(state.params)).scalars
  assert scalars.keys() == expected.scalars.keys()
  for key, value in expected.scalars.items():
    # A rank from the float32 moment sees singular values down to 3e-4.
    rtol = 1e-3 if key == "masked_effective_rank" else 1e-4
    np.testing.assert_allclose(scalars[key], value, rtol=rtol, err_msg=key)


def test_held_out_losses_are_those_of_all_images_at_once(evaluated):
  """Padding of the last batch counts for nothing."""
  _, state, evaluation = evaluated
  config = digits_config()
  _, mesh = make(config)
  model = pretrain.make_model(config, mesh)
  source = sources.open_source("digits", "test", image_size=(8, 8), channels=1)
  apply = jax.jit(functools.partial(model.apply, mask_ratio=0.5))
  outs, others, images, masks = [], [], [], []
  batches = pipeline.eval_batches(
    source, batch_size=64, image_size=(8, 8), channels=1, limit=100
  )
  for number, batch in enumerate(batches):
    x = inputs.normalize(
      jnp.asarray(batch["image"]), config.data.mean, config.data.std
    )
    noise = pretrain.evaluation_noise(model, x, config.seed, number)
    outs.append(apply({"params": state.params}, x, noise))
    noise = pretrain.evaluation_noise(model, x, config.seed + 1, number)
    others.append(apply({"params": state.params}, x, noise).tokens)
    images.append(x)
    masks.append(batch["mask"])
  seen = np.concatenate(masks)
  assert seen.sum() == 100
  x = jnp.concatenate(images)[seen]
  prediction = jnp.concatenate([out.prediction for out in outs])[seen]
  mask = jnp.concatenate([out.mask for out in outs])[seen]
  tokens = jnp.concatenate([out.tokens for out in outs])[seen]
  reconstruction = losses.reconstruction_loss(
    x, prediction, mask, patch_size=2, normalize_pixels=False
  )
  uniformity = losses.uniformity_loss(tokens[:, 0])
  scalars = evaluation.scalars
  np.testing.assert_allclose(
    scalars["reconstruction_loss"], reconstruction, rtol=1e-4
  )
  np.testing.assert_allclose(scalars["uniformity_loss"], uniformity, rtol=1e-4)
  other = jnp.concatenate(others)[seen]
  alignment = losses.alignment_loss(tokens[:, 0], other[:, 0])
  np.testing.assert_allclose(scalars["alignment_loss"], alignment, rtol=1e-4)
  rank = spectrum.effective_rank(spectrum.singular_values(tokens[:, 0]))
  np.testing.assert_allclose(scalars["masked_effective_rank"], rank, rtol=1e-2)


def test_one_class_has_no_accuracies():
  features = (np.eye(8, dtype=np.float32), np.zeros(8, np.int32))
  evaluation = digits_config().evaluation
  values = spectrum.singular_values(features[0])
  found = pretrain.probes(features, features, values, 1, evaluation)
  assert set(found) == {"effective_rank", "participation_ratio"}


def test_probes_see_whole_images(evaluated):
  """The participation ratio is that of unmasked class tokens."""
  _, state, evaluation = evaluated
  config = digits_config()
  model = pretrain.make_model(config, make(config)[1])
  source = sources.open_source("digits", "test", image_size=(8, 8), channels=1)
  (batch,) = pipeline.eval_batches(
    source, batch_size=100, image_size=(8, 8), channels=1, limit=100
  )
  x = inputs.normalize(
    jnp.asarray(batch["image"]), config.data.mean, config.data.std
  )
  tokens = model.apply({"params": state.params}, x, method=model.encode)
  np.testing.assert_allclose(
    evaluation.scalars["participation_ratio"],
    1 / losses.uniformity_loss(tokens[:, 0]),
    rtol=1e-4,
  )


@pytest.mark.parametrize("normalize_pixels", [False, True])
def test_pictures_paste_nothing_and_undo_the_normalisation(normalize_pixels):
  """A model that predicts its own targets reconstructs the image."""
  config = digits_config()
  config.loss.normalize_pixels = normalize_pixels
  images = jnp.asarray(
    np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
  )

  class Oracle:
    patch_size = 2

    def apply(self, variables, x, noise, ratio):
      del variables
      target = patches.patchify(x, 2)
      if normalize_pixels:
        target = losses.normalize_patches(target)
      mask = (jnp.argsort(jnp.argsort(noise)) >= 8).astype(jnp.float32)
      assert ratio == 0.5
      return Output(target, mask, None)

  original, masked, predicted = pretrain.reconstructions(
    Oracle(), config, {}, images
  )
  np.testing.assert_allclose(original, images / 255, atol=1e-6)
  np.testing.assert_allclose(predicted, original, atol=1e-3)
  grey = np.asarray(masked == 0.5).mean()
  np.testing.assert_allclose(grey, 0.5, atol=0.02)


def test_pictures_are_of_real_images_where_rows_are_padded(shared):
  """Record files spread a few images over the rows of a batch."""
  train, test = (
    sources.open_source(
      "cifar10",
      split,
      directory=str(shared / "data" / "tensorflow_datasets"),
      image_size=(32, 32),
      channels=3,
    )
    for split in ("train[:200]", "test[:100]")
  )
  config = digits_config()
  config.data.update(image_size=(32, 32), channels=3)
  config.data.update(mean=(0.5,) * 3, std=(0.5,) * 3)
  config.model.patch_size = 8
  config.log.images = 5
  mesh = sharding.make_mesh()
  plan = config_lib.plan(config, train.num_examples)
  task = pretrain.make(config, plan, mesh, train, test)
  params = jax.jit(task.init)(jax.random.key(0))
  drawing = task.evaluate(params).pictures["reconstructions"]
  originals = drawing.args[0]
  assert originals.shape == (5, 32, 32, 3)
  assert (originals.std(axis=(1, 2, 3)) > 0.01).all()
