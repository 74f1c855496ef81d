"""What takes no training step: features of a frozen encoder, probes on them."""

from collections.abc import Sequence
import csv
import dataclasses
import functools
import io
import itertools

import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np
import optax

from umae_jax import UserError, metrics
from umae_jax import config as config_lib
from umae_jax.analysis import spectrum
from umae_jax.data import sources
from umae_jax.evals import few_shot, logistic
from umae_jax.tasks import Evaluation, Task, classification, inputs, pretrain
from umae_jax.train_step import Objective

FEATURES = ("cls", "mean")
NORMALIZATIONS = ("none", "standardize", "l2")


def make_features(
  config: ml_collections.ConfigDict,
  plan: config_lib.Plan,
  mesh: Mesh,
  train_source: sources.Source,
  eval_source: sources.Source,
) -> Task:
  """Task "features": those of `config.data.eval_split`, in features.npz.

  It holds "features" (N, D) float32, "labels" (N,) int32, "names" (N,), the
  images' files (of TFDS, file and position in it), and "class_names".
  """
  del plan, train_source
  model, params, encode = load_encoder(config, mesh, [config.probe.feature])

  def evaluate(params):
    limit = config.evaluation.test_images
    (x,), labels, index = encode(params, eval_source, limit)
    values = spectrum.singular_values(x)
    scalars = {
      "images": len(x),
      "width": x.shape[1],
      "effective_rank": spectrum.effective_rank(values),
    }
    write = functools.partial(
      np.savez,
      features=x,
      labels=labels,
      names=np.array([eval_source.name_of(i) for i in index.tolist()]),
      class_names=np.array(eval_source.class_names),
    )
    return Evaluation(scalars, files={"features.npz": write})

  return make_task(model, params, evaluate)


def make_probes(
  config: ml_collections.ConfigDict,
  plan: config_lib.Plan,
  mesh: Mesh,
  train_source: sources.Source,
  eval_source: sources.Source,
) -> Task:
  """Task "linear_probe", its modes "fast" and "sweep"."""
  del plan
  sweep = config.probe.mode == "sweep"
  wanted = FEATURES if sweep else [config.probe.feature]
  model, params, encode = load_encoder(config, mesh, wanted)
  judge = judge_recipes if sweep else judge_all

  def evaluate(params):
    limits = config.evaluation
    train = encode(params, train_source, limits.train_images)[:2]
    test = encode(params, eval_source, limits.test_images)[:2]
    return judge(train, test, eval_source.class_names, config)

  return make_task(model, params, evaluate)


def load_encoder(config, mesh, wanted: Sequence[str]):
  """The encoder of `config.pretrained`.

  Returns:
    model: of it.
    params: of the encoder.
    encode: (params, source, limit) -> the wanted features, each (N, D), labels
      (N,), and which images of the source, (N,).
  """
  model, params = inputs.load_pretrained(config, mesh)

  def pooled(params, images):
    tokens = model.apply({"params": params}, images, method=model.encode)
    return jnp.concatenate([inputs.pool(tokens, x) for x in wanted], axis=1)

  extract = inputs.make_extract(pooled, config, mesh)

  def encode(params, source, limit):
    x, *rest = extract(params, source, limit)
    return np.split(x, len(wanted), axis=1), *rest

  return model, {"encoder": params["encoder"]}, encode


def make_task(model, params, evaluate) -> Task:
  """A task whose parameters are given, and that only evaluates."""
  objective = Objective(None, None, None, frozen=tuple(params))
  return Task(
    lambda key, given: given,
    objective,
    optax.identity(),
    optax.constant_schedule(0.0),
    evaluate,
    given=params,
    found=inputs.facts(model, params),
  )


def judge_all(train, test, class_names: Sequence[str], config) -> Evaluation:
  """Every probe on one kind of features; pictures and files of the fast one.

  Args:
    train: (one or more features (N, D), labels (N,)) to learn from.
    test: likewise, to be tested on; no choice depends on its labels.
    class_names: of all classes.
    config: of the run.
  """
  probe = config.probe
  classes = len(class_names)
  ((x,), y), ((x_test,), y_test) = train, test
  pairs = itertools.product(probe.learning_rates, probe.weight_decays)
  rates, decays = zip(*pairs, strict=True)
  fast = logistic.fast_probe(
    *(x, y, x_test),
    learning_rates=rates,
    weight_decays=decays,
    num_classes=classes,
    epochs=int(probe.epochs[0]),
    batch_size=int(probe.batch_sizes[0]),
    seed=config.seed,
  )
  judged = classification.judge(fast.scores, y_test, class_names)
  scalars = {
    "fast_linear_learning_rate": fast.learning_rate,
    "fast_linear_weight_decay": fast.weight_decay,
  }
  values = spectrum.singular_values(x_test)
  scalars |= pretrain.probes(
    *((x, y), (x_test, y_test), values, classes, config.evaluation)
  )
  notes = []
  for shots in map(int, probe.shots):
    try:
      mean, deviation = few_shot.few_shot_accuracy(
        *(x, y, x_test, y_test),
        shots=shots,
        draws=probe.draws,
        num_classes=classes,
        seed=config.seed,
      )
    except UserError as error:  # Too few images: the other figures stand.
      notes.append(f"config.probe.shots: {error}")
      continue
    scalars[f"few_shot_{shots}_accuracy"] = mean
    scalars[f"few_shot_{shots}_deviation"] = deviation
  return dataclasses.replace(
    judged, scalars=judged.scalars | scalars, table="\n".join(notes)
  )


def judge_recipes(train, test, class_names: Sequence[str], config):
  """How far the recipe alone moves the accuracy; arguments as `judge_all`."""
  probe = config.probe
  rows = logistic.sweep(
    dict(zip(FEATURES, zip(train[0], test[0]))),
    *(train[1], test[1]),
    normalizations=NORMALIZATIONS,
    epochs=[int(x) for x in probe.epochs],
    batch_sizes=[int(x) for x in probe.batch_sizes],
    learning_rates=probe.learning_rates,
    num_classes=len(class_names),
    seed=config.seed,
  )
  header = [name.replace("_", " ") for name in logistic.Row._fields]
  table = [
    [f"{x:.4g}" if isinstance(x, float) else str(x) for x in row]
    for row in rows
  ]
  text = io.StringIO()
  csv.writer(text, lineterminator="\n").writerows([header, *table])
  accuracies = [row.accuracy for row in rows]
  scalars = {
    "highest_accuracy": max(accuracies),
    "lowest_accuracy": min(accuracies),
    "median_accuracy": float(np.median(accuracies)),
    "recipes": len(rows),
    "test_images": len(test[1]),
  }
  return Evaluation(
    scalars,
    files={"sweep.csv": lambda file: file.write(text.getvalue().encode())},
    table=metrics.format_table(table, header),
  )
