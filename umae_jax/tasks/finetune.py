"""Fine-tuning: encoder and classifier trained together, as MAE does it."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np
import optax

from umae_jax import UserError, mixing, models, optimizers
from umae_jax import config as config_lib
from umae_jax.data import sources
from umae_jax.tasks import Task, classification, inputs
from umae_jax.train_step import Objective


def make(
  config: ml_collections.ConfigDict,
  plan: config_lib.Plan,
  mesh: Mesh,
  train_source: sources.Source,
  eval_source: sources.Source,
) -> Task:
  """The task of a validated configuration; without weights, from scratch."""
  source, weights = None, None
  if config.pretrained:
    source, weights = inputs.load_pretrained(config, mesh)
  model = make_model(config, mesh, len(train_source.class_names), source)
  shape = (1, *config.data.image_size, config.data.channels)
  decay = config.classifier.ema_decay

  def init(key, given=None):
    params = model.init(key, jnp.zeros(shape))["params"]
    for name, tree in (given or {}).items():
      params[name] = params[name] | tree
    return params | {"ema": params} if decay else params

  def logits(params, images):
    params = params["ema"] if decay else params
    return model.apply({"params": params}, images)

  given, found = None, {}
  if source:
    expected = jax.eval_shape(init, jax.random.key(0))
    given = pretrained_part(config, weights, expected)
    found = inputs.facts(source, given)
  found["attention"] = model.execution.attention
  schedule = inputs.make_schedule(config, plan)
  adamw = optimizers.adamw(
    schedule,
    b1=config.optimizer.b1,
    b2=config.optimizer.b2,
    weight_decay=config.optimizer.weight_decay,
    spared=("cls_token", "pos_embed"),
  )
  return Task(
    init,
    make_objective(model, config),
    optimizers.with_layer_decay(adamw, config.classifier.layer_decay),
    schedule,
    classification.make_evaluation(logits, config, mesh, eval_source),
    given=given,
    found=found,
  )


def make_model(
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  num_classes: int,
  source: models.MaskedAutoencoder | models.Classifier | None = None,
) -> models.Classifier:
  """The classifier, of `config.model`'s encoder; `source` = pretrained one."""
  encoder = ("patch_size", "width", "depth", "num_heads", "mlp_ratio")
  return models.Classifier(
    **{key: config.model[key] for key in encoder},
    num_classes=num_classes,
    pool=config.classifier.pool,
    drop_path=config.classifier.drop_path,
    dtype=inputs.compute_dtype(config, mesh),
    execution=inputs.execution(config, mesh, 1 + inputs.num_patches(config)),
    **({"norm_epsilon": source.norm_epsilon} if source else {}),
  )


def pretrained_part(config, params, expected):
  """What of pretrained parameters goes into a classifier, {key: tree}.

  The encoder; its head starts anew, as MAE's, unless there is no training.
  Positions that the weights leave to be computed stay those of `expected`.

  Args:
    config: of the run.
    params: pretrained.
    expected: shapes of the classifier's parameters.

  Raises:
    UserError: they do not fit.
  """
  encoder = dict(params["encoder"])
  if "norm" not in expected["encoder"]:
    encoder.pop("norm", None)  # As MAE: `fc_norm` starts anew.
  here, there = (
    {
      jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(x)
      for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in (expected, params | {"encoder": encoder})
  )
  parts = ("encoder",) if config.num_epochs else ("encoder", "fc_norm", "head")
  wrong = [
    f"{key}: {here.get(key)} here, {there.get(key)} there"
    for key in sorted(here | there)
    if key.split("/")[0] in parts
    and here.get(key) != there.get(key)
    and (key != "encoder/pos_embed" or key in there)
  ]
  if wrong:
    raise UserError(
      f"config.pretrained={config.pretrained!r} does not fit a classifier of "
      f"config.classifier.pool={config.classifier.pool!r}: {wrong[:5]}. Set "
      "it, or the data set, to that of the weights."
    )
  given = params | {"encoder": encoder}
  return {part: given[part] for part in parts if part in expected}


def make_objective(
  model: models.Classifier, config: ml_collections.ConfigDict
) -> Objective:
  """Cross-entropy against mixed and smoothed labels.

  Batches hold "image" (B, H, W, C) uint8 and "label" (B,); `randomize` makes
  of them "image" float32, erased and mixed, "target" (B, classes), and "drop"
  (B, depth, 2), the noise of the drop path.
  """
  classifier = config.classifier
  decay = classifier.ema_decay
  mean, std = config.data.mean, config.data.std

  def randomize(key, batch):
    erase, mix, drop = jax.random.split(key, 3)
    images = inputs.normalize(batch["image"], mean, std)
    images = mixing.random_erasing(erase, images, classifier.random_erasing)
    targets = mixing.smooth_labels(
      batch["label"], model.num_classes, classifier.label_smoothing
    )
    images, targets = mixing.mix(
      mix, images, targets, mixup=classifier.mixup, cutmix=classifier.cutmix
    )
    noise = jax.random.uniform(drop, (len(images), model.depth, 2))
    return {"image": images, "target": targets, "drop": noise}

  def loss(params, batch, statistics):
    del statistics
    logits = model.apply({"params": params}, batch["image"], batch["drop"])
    losses = optax.softmax_cross_entropy(logits, batch["target"])
    return losses.mean(), {}

  def follow(params, statistics):
    del statistics
    trained = {key: x for key, x in params.items() if key != "ema"}
    average = optax.incremental_update(trained, params["ema"], 1 - decay)
    return {"ema": average}

  if not decay:
    return Objective(randomize, None, loss)
  return Objective(randomize, None, loss, frozen=("ema",), follow=follow)
