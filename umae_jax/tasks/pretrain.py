"""Pretraining: U-MAE's objective, and evaluation of the encoder on the side."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np

from umae_jax import config as config_lib
from umae_jax import losses, models, optimizers, sharding
from umae_jax.analysis import pictures, spectrum
from umae_jax.data import sources
from umae_jax.evals import knn, linear
from umae_jax.models import masking
from umae_jax.models import patches as patches_lib
from umae_jax.tasks import Evaluation, Task, inputs
from umae_jax.train_step import Objective


def make(
  config: ml_collections.ConfigDict,
  plan: config_lib.Plan,
  mesh: Mesh,
  train_source: sources.Source,
  eval_source: sources.Source,
) -> Task:
  """The task of a validated configuration."""
  model = make_model(config, mesh)
  image_size, channels = tuple(config.data.image_size), config.data.channels

  def init(key):
    images = jnp.zeros((1, *image_size, channels))
    noise = jnp.zeros((1, inputs.num_patches(config)))
    return model.init(key, images, noise, config.loss.mask_ratio)["params"]

  schedule = inputs.make_schedule(config, plan)
  optimizer = optimizers.adamw(
    schedule,
    b1=config.optimizer.b1,
    b2=config.optimizer.b2,
    weight_decay=config.optimizer.weight_decay,
  )
  evaluate = make_evaluation(model, config, mesh, train_source, eval_source)
  objective = make_objective(
    model,
    mean=config.data.mean,
    std=config.data.std,
    mask_ratio=config.loss.mask_ratio,
    normalize_pixels=config.loss.normalize_pixels,
    uniformity_weight=config.loss.uniformity_weight,
  )
  both = (model.execution.attention, model.decoder_execution.attention)
  found = {"attention": ",".join(dict.fromkeys(both))}  # "xla", "cudnn,xla".
  return Task(init, objective, optimizer, schedule, evaluate, found=found)


def make_model(
  config: ml_collections.ConfigDict, mesh: Mesh
) -> models.MaskedAutoencoder:
  """The model, of `config.model`'s fields."""
  patches = inputs.num_patches(config)
  visible = masking.num_visible(patches, config.loss.mask_ratio)
  execution = functools.partial(inputs.execution, config, mesh)
  changed = {
    "dtype": inputs.compute_dtype(config, mesh),
    "execution": execution(1 + visible),
    "decoder_execution": execution(1 + patches, "decoder_"),
  }
  return models.MaskedAutoencoder(**dict(config.model) | changed)


def make_objective(
  model: models.MaskedAutoencoder,
  *,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  mask_ratio: float,
  normalize_pixels: bool,
  uniformity_weight: float,
) -> Objective:
  """L_MAE + lambda * L_unif of the class token, which the reference uses.

  Batches hold "image" (B, H, W, C) uint8; `randomize` adds "noise" (B, L).
  """

  def randomize(key, batch):
    image = batch["image"]
    patches = np.prod(
      patches_lib.grid_shape(image.shape[1:3], model.patch_size)
    )
    noise = jax.random.uniform(key, (len(image), patches))
    return {"image": image, "noise": noise}

  def statistics(params, batch):
    tokens = model.apply(
      {"params": params},
      inputs.normalize(batch["image"], mean, std),
      batch["noise"],
      mask_ratio,
      method=model.encode_visible,
    )
    return losses.second_moment(tokens[:, 0])

  def loss(params, batch, batch_moment):
    images = inputs.normalize(batch["image"], mean, std)
    out = model.apply(
      {"params": params},
      *(images, batch["noise"], mask_ratio),
      method=model.predict_removed,
    )
    reconstruction = losses.removed_patches_loss(
      out.prediction, out.target, normalize_pixels=normalize_pixels
    )
    uniformity = losses.uniformity_loss(out.tokens[:, 0], batch_moment)
    return reconstruction + uniformity_weight * uniformity, {
      "reconstruction_loss": reconstruction,
      "uniformity_loss": uniformity,
      "effective_dimension": 1 / uniformity,
    }

  return Objective(randomize, statistics, loss)


def make_evaluation(model, config, mesh, train_source, eval_source):
  """Returns params -> Evaluation, on the splits of the two sources."""
  evaluation = config.evaluation
  batches = inputs.make_batches(config)
  to_global = functools.partial(sharding.to_global, mesh=mesh)
  jit = functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  extract = inputs.make_extract(
    lambda params, images: model.apply(
      {"params": params}, images, method=model.encode
    )[:, 0],
    *(config, mesh),
  )
  held_out_losses = make_held_out_losses(model, config, jit)

  @jit
  def reconstruct(params, batch):  # Of rows that are no padding.
    shown = jnp.argsort(~batch["mask"], stable=True)[: config.log.images]
    images = batch["image"][shown]
    return reconstructions(model, config, params, images), batch["mask"].sum()

  def evaluate(params):
    train = extract(params, train_source, evaluation.train_images)
    test = extract(params, eval_source, evaluation.test_images)
    singular_values = spectrum.singular_values(test.features)
    images = map(to_global, batches(eval_source, limit=evaluation.test_images))
    scalars = held_out_losses(params, images) | probes(
      *(train[:2], test[:2]),
      *(singular_values, len(eval_source.class_names), evaluation),
    )
    first = to_global(next(iter(batches(eval_source, limit=config.log.images))))
    triple, count = jax.device_get(reconstruct(params, first))
    shown = [x[:count] for x in triple]
    drawings = {
      "reconstructions": functools.partial(pictures.reconstructions, *shown),
      "spectrum": functools.partial(
        pictures.spectrum, {"class token": singular_values}
      ),
    }
    return Evaluation({k: float(x) for k, x in scalars.items()}, drawings)

  return evaluate


def probes(train, test, singular_values, num_classes, evaluation):
  """What the features of whole images are good for, and how many they are.

  Args:
    train: (features (N, D), labels (N,)) to learn from.
    test: likewise, to be tested on.
    singular_values: of the test features.
    num_classes: number of labels; of one class nothing can be told apart, and
      there are no accuracies.
    evaluation: `config.evaluation`.
  """
  ranks = {
    "effective_rank": spectrum.effective_rank(singular_values),
    "participation_ratio": spectrum.participation_ratio(singular_values),
  }
  if num_classes < 2:
    return ranks
  return ranks | {
    "linear_accuracy": linear.ridge_probe(
      *train, *test, num_classes=num_classes
    ),
    "knn_accuracy": knn.weighted_knn(
      *train,
      *test,
      k=evaluation.knn_k,
      temperature=evaluation.knn_temperature,
      num_classes=num_classes,
    ),
  }


def make_held_out_losses(model, config, jit):
  """Returns (params, batches) -> the losses over a whole split.

  The masks are always the same ones. The uniformity loss is over all pairs of
  the split, so that its diagonal term is 1 / N, not 1 / B; the effective rank
  is of the same class tokens, of masked images. The alignment loss is between
  two masks of each image, which no training minimises by itself: it says how
  far reconstruction does.
  """
  objective = dict(
    patch_size=model.patch_size, normalize_pixels=config.loss.normalize_pixels
  )

  @jit
  def sums(params, batch, number):
    images = inputs.normalize(batch["image"], config.data.mean, config.data.std)
    noise = evaluation_noise(model, images, config.seed, number)
    out = model.apply({"params": params}, images, noise, config.loss.mask_ratio)
    seen = batch["mask"].astype(jnp.float32)  # (B,), 0 for padding
    count = seen.sum()
    mean = losses.reconstruction_loss(
      images, out.prediction, out.mask * seen[:, None], **objective
    )
    token = out.tokens[:, 0] * seen[:, None]
    moment = losses.second_moment(token) * len(images)
    noise = evaluation_noise(model, images, config.seed + 1, number)
    other = model.apply(
      {"params": params},
      *(images, noise, config.loss.mask_ratio),
      method=model.encode_visible,
    )[:, 0]
    other *= seen[:, None]
    apart = losses.alignment_loss(token, other) * len(images)
    return count, jnp.where(count > 0, mean * count, 0.0), apart, moment

  def held_out_losses(params, batches):
    parts = [  # Fetched one by one, or all batches would wait in memory.
      jax.device_get(sums(params, batch, i)) for i, batch in enumerate(batches)
    ]
    count, total, apart, moment = (sum(x) for x in zip(*parts, strict=True))
    values = spectrum.of_moment(moment / count)
    return {
      "reconstruction_loss": total / count,
      "uniformity_loss": np.square(moment / count).sum(),
      "alignment_loss": apart / count,
      "masked_effective_rank": spectrum.effective_rank(values),
    }

  return held_out_losses


def evaluation_noise(model, images, seed, number):
  """(B, L) noise of evaluation batch `number`, the same at every evaluation."""
  grid = patches_lib.grid_shape(images.shape[1:3], model.patch_size)
  key = jax.random.fold_in(jax.random.key(seed), 2**32 - 1)  # No step.
  key = jax.random.fold_in(key, number)
  return jax.random.uniform(key, (len(images), np.prod(grid)))


def reconstructions(model, config, params, images):
  """(original, masked, predicted), each (B, H, W, C) float32 in [0, 1].

  Predictions of normalised targets are given back each patch's own mean and
  deviation, which the loss never asks the model for.
  """
  mean, std = config.data.mean, config.data.std
  size, patch = images.shape[1:3], model.patch_size
  x = inputs.normalize(images, mean, std)
  noise = evaluation_noise(model, x, config.seed, 0)
  out = model.apply({"params": params}, x, noise, config.loss.mask_ratio)
  prediction = out.prediction
  if config.loss.normalize_pixels:
    mean_of_patch, deviation = losses.patch_statistics(
      patches_lib.patchify(x, patch)
    )
    prediction = prediction * deviation + mean_of_patch
  predicted = patches_lib.unpatchify(prediction, patch, size)
  removed = jnp.broadcast_to(out.mask[:, :, None], prediction.shape)
  removed = patches_lib.unpatchify(removed, patch, size)
  shape = (1, 1, 1, images.shape[-1])
  mean, std = (jnp.asarray(v, jnp.float32).reshape(shape) for v in (mean, std))
  original = images.astype(jnp.float32) / 255
  predicted = jnp.clip(predicted * std + mean, 0, 1)
  masked = jnp.where(removed > 0, 0.5, original)
  return original, masked, predicted
