"""How well scores (or predictions) agree with labels: pure NumPy functions."""

from collections.abc import Sequence
import csv
import io

import numpy as np


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
  """Share of examples whose class is among the k of highest score.

  Of equal scores the class of smaller index ranks higher, so that constant
  scores are no better than chance, and k = 1 is the arg max. An example with a
  NaN among its scores is wrong.

  Args:
    scores: (N, classes), N at least 1.
    labels: (N,) int, in [0, classes).
    k: at least 1; more than `classes` is as good as `classes`.

  Returns:
    Accuracy in [0, 1].
  """
  scores, labels = np.asarray(scores), np.asarray(labels)[:, None]
  own = np.take_along_axis(scores, labels, axis=1)
  before = (scores == own) & (np.arange(scores.shape[1])[None] < labels)
  rank = ((scores > own) | before).sum(1)
  return float(((rank < k) & ~np.isnan(scores).any(1)).mean())


def confusion_matrix(
  predictions: np.ndarray, labels: np.ndarray, num_classes: int
) -> np.ndarray:
  """How often each class was taken for each.

  Args:
    predictions: (N,) int, or scores (N, classes), whose arg max is predicted.
    labels: (N,) int.
    num_classes: labels and predictions lie in [0, num_classes).

  Returns:
    (num_classes, num_classes) int64; row = true class, column = prediction.
    Its sum is N.

  Raises:
    ValueError: a label or prediction is out of range, or a score is NaN.
  """
  predictions, labels = np.asarray(predictions), np.asarray(labels)
  if np.isnan(predictions).any():
    raise ValueError("Scores hold NaN, which is no class; drop such rows.")
  if predictions.ndim == 2:
    predictions = predictions.argmax(1)
  for name, x in (("labels", labels), ("predictions", predictions)):
    if len(x) and not 0 <= x.min() <= x.max() < num_classes:
      raise ValueError(
        f"{name} are in [{x.min()}, {x.max()}], not all in [0, {num_classes}); "
        f"give a num_classes that covers them."
      )
  pairs = labels.astype(np.int64) * num_classes + predictions
  return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, -1)


def per_class_accuracy(confusion: np.ndarray) -> np.ndarray:
  """(classes,) float64 in [0, 1] of a confusion matrix; NaN = no examples."""
  images = confusion.sum(1)
  return np.where(images, np.diag(confusion) / np.maximum(images, 1), np.nan)


def per_class_table(confusion: np.ndarray, class_names: Sequence[str]) -> str:
  """The classes as CSV text, one a line, for a spreadsheet.

  Args:
    confusion: (classes, classes) int, rows = true.
    class_names: (classes,).

  Returns:
    The columns are class, images, accuracy (empty without images), the class
    it is most often taken for, and how many of its images are (empty and 0 if
    none is taken for another).
  """
  wrong = confusion - np.diag(np.diag(confusion))
  other, count = wrong.argmax(1), wrong.max(1)
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(
    ["class", "images", "accuracy", "most often taken for", "how often"]
  )
  for i, accuracy in enumerate(per_class_accuracy(confusion)):
    shown = "" if np.isnan(accuracy) else f"{accuracy:.4f}"
    taken_for = class_names[other[i]] if count[i] else ""
    images = confusion[i].sum()
    writer.writerow([class_names[i], images, shown, taken_for, count[i]])
  return text.getvalue()
