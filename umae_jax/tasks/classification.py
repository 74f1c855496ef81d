"""What a trained classifier is worth: figures, a picture, a table."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from umae_jax.analysis import confusion
from umae_jax.data import sources
from umae_jax.evals import classification
from umae_jax.tasks import Evaluation, inputs


def make_evaluation(
  logits: Callable[[Any, jax.Array], jax.Array],
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  source: sources.Source,
) -> Callable[[Any], Evaluation]:
  """Returns params -> Evaluation on the source, each image counted once.

  Args:
    logits: (params, (B, H, W, C) normalised) -> (B, classes).
    config: of the run.
    mesh: the batches are split over all of it.
    source: with labels.
  """
  extract = inputs.make_extract(logits, config, mesh)

  def evaluate(params):
    found = extract(params, source, config.evaluation.test_images)
    return judge(found.features, found.labels, source.class_names)

  return evaluate


def judge(
  scores: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> Evaluation:
  """Evaluation of scores (N, classes) against labels (N,)."""
  matrix = classification.confusion_matrix(scores, labels, len(class_names))
  per_class = classification.per_class_accuracy(matrix)
  scores = scores.astype(np.float64)
  shifted = scores - scores.max(1, keepdims=True)
  log_sums = np.log(np.exp(shifted).sum(1))
  true = np.take_along_axis(shifted, labels[:, None].astype(int), 1)[:, 0]
  table = classification.per_class_table(matrix, class_names)
  return Evaluation(
    {
      "top1_accuracy": classification.top_k_accuracy(scores, labels, 1),
      "top5_accuracy": classification.top_k_accuracy(scores, labels, 5),
      "mean_class_accuracy": float(np.nanmean(per_class)),
      "cross_entropy_loss": float((log_sums - true).mean()),
      "test_images": len(labels),
    },
    pictures={
      "confusion": functools.partial(confusion.confusion, matrix, class_names)
    },
    files={"per_class.csv": lambda file: file.write(table.encode())},
  )
