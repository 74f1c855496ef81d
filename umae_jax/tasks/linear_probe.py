"""The linear probe of MAE: a linear classifier of a frozen encoder."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import optax

from umae_jax import config as config_lib
from umae_jax import models, optimizers
from umae_jax.data import sources
from umae_jax.tasks import Task, classification, frozen, inputs
from umae_jax.train_step import Objective

EPSILON = 1e-6  # Of BatchNorm, added to the variance.
MOMENTUM = 0.1  # Weight of the newest batch in its running averages.


def make(
  config: ml_collections.ConfigDict,
  plan: config_lib.Plan,
  mesh: Mesh,
  train_source: sources.Source,
  eval_source: sources.Source,
) -> Task:
  """The task of a validated configuration; "fast" and "sweep" take no step."""
  if config.probe.mode != "train":
    return frozen.make_probes(config, plan, mesh, train_source, eval_source)
  model, params = inputs.load_pretrained(config, mesh)
  num_classes = len(train_source.class_names)

  def init(key, given):
    return {
      "encoder": given,
      "head": init_head(key, model.width, num_classes),
      "batch_norm": {
        "mean": jnp.zeros(model.width),
        "var": jnp.ones(model.width),
      },
    }

  def logits(params, images):
    x = features(model, config.probe.feature, params, images)
    norm = params["batch_norm"]
    return classify(params["head"], x, norm["mean"], norm["var"])

  schedule = inputs.make_schedule(config, plan)
  objective = make_objective(
    model,
    mean=config.data.mean,
    std=config.data.std,
    feature=config.probe.feature,
    batch_size=config.batch_size,
  )
  return Task(
    init,
    objective,
    optimizers.lars(schedule, weight_decay=config.optimizer.weight_decay),
    schedule,
    classification.make_evaluation(logits, config, mesh, eval_source),
    given=params["encoder"],
    found=inputs.facts(model, params["encoder"]),
  )


def init_head(key: jax.Array, width: int, num_classes: int):
  """Kernel (D, classes) of deviation 0.01, and bias (classes,) of zeros."""
  kernel = 0.01 * jax.random.normal(key, (width, num_classes))
  return {"kernel": kernel, "bias": jnp.zeros(num_classes)}


def features(model, feature: str, params, images: jax.Array) -> jax.Array:
  """(B, H, W, C), normalised, to the frozen encoder's features (B, D)."""
  variables = {"params": {"encoder": params["encoder"]}}
  tokens = model.apply(variables, images, method=model.encode)
  return inputs.pool(tokens, feature)


def classify(head, x: jax.Array, mean: jax.Array, var: jax.Array) -> jax.Array:
  """BatchNorm without affine, then linear: (B, D) -> (B, classes)."""
  x = (x - mean[None]) * jax.lax.rsqrt(var + EPSILON)[None]
  return x @ head["kernel"] + head["bias"][None]


def make_objective(
  model: models.MaskedAutoencoder,
  *,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  feature: str,
  batch_size: int,
) -> Objective:
  """Cross-entropy of a linear classifier; the encoder is a constant.

  Batches hold "image" (B, H, W, C) uint8 and "label" (B,). BatchNorm's
  statistics are those of the global batch, whatever the devices and
  micro-batches; its running averages, for evaluation, have PyTorch's rule:
  momentum 0.1, unbiased variance.

  Source: He et al. 2021 (arXiv:2111.06377), appendix A.1.
  """

  def encode(params, batch):
    images = inputs.normalize(batch["image"], mean, std)
    x = features(model, feature, params, images)
    return {"feature": x, "label": batch["label"]}

  def statistics(params, batch):
    # About the running mean, for a variance by subtraction loses digits.
    x = batch["feature"] - params["batch_norm"]["mean"][None]
    return {"mean": x.mean(0), "square": jnp.square(x).mean(0)}

  def moments(params, statistics):
    var = statistics["square"] - jnp.square(statistics["mean"])
    return params["batch_norm"]["mean"] + statistics["mean"], jnp.maximum(
      var, 0
    )

  def loss(params, batch, statistics):
    x = batch["feature"]
    scores = classify(params["head"], x, *moments(params, statistics))
    labels = batch["label"]
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    correct = (scores.argmax(-1) == labels).mean()
    return losses.mean(), {"accuracy": correct}

  def follow(params, statistics):
    mean, var = moments(params, statistics)
    unbiased = var * batch_size / max(batch_size - 1, 1)
    batch = {"mean": mean, "var": unbiased}
    return {
      "batch_norm": jax.tree.map(
        lambda old, new: (1 - MOMENTUM) * old + MOMENTUM * new,
        *(params["batch_norm"], batch),
      )
    }

  return Objective(
    lambda key, batch: {key: batch[key] for key in ("image", "label")},
    statistics,
    loss,
    prepare=encode,
    frozen=("encoder", "batch_norm"),
    follow=follow,
  )
