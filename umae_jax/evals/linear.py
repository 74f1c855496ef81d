"""Accuracy of a linear classifier on features, in closed form."""

from collections.abc import Sequence

import numpy as np

PENALTIES = tuple(10.0**power for power in range(-2, 7))


def ridge_probe(
  train_features: np.ndarray,
  train_labels: np.ndarray,
  test_features: np.ndarray,
  test_labels: np.ndarray,
  *,
  num_classes: int,
  penalties: Sequence[float] = PENALTIES,
) -> float:
  """Test accuracy of one-vs-rest ridge regression on frozen features.

  Features are standardised by the training set's mean and deviation (constant
  ones are only centred); targets are one-hot, centred. The penalty is the
  best, and of equals the first, on every fifth training example after fitting
  the others; then all are fitted with it. No test label has a say.

  Args:
    train_features: (N, D), N at least 5 unless there is one penalty.
    train_labels: (N,) int, in [0, num_classes).
    test_features: (M, D).
    test_labels: (M,) int.
    num_classes: number of classes.
    penalties: > 0, added to the diagonal of the (D, D) Gram matrix of the
      standardised features, whose diagonal is N: scikit-learn's alpha.

  Returns:
    Accuracy in [0, 1].
  """
  x = np.asarray(train_features, np.float64)
  y = np.asarray(train_labels)
  best = penalties[0]
  if len(penalties) > 1:
    held_out = np.arange(len(x)) % 5 == 4
    accuracies = _accuracies(
      *(x[~held_out], y[~held_out], x[held_out], y[held_out]),
      num_classes,
      penalties,
    )
    best = penalties[int(np.argmax(accuracies))]
  test = np.asarray(test_features, np.float64)
  return _accuracies(x, y, test, test_labels, num_classes, [best])[0]


def _accuracies(x, y, x_test, y_test, num_classes, penalties) -> list[float]:
  """Fits (x, y), for each penalty; returns the accuracies on the test pair."""
  predictions = (
    scores.argmax(1)
    for scores in ridge_scores(x, y, x_test, num_classes, penalties)
  )
  return [float((p == y_test).mean()) for p in predictions]


def ridge_scores(x, y, x_test, num_classes, penalties) -> list[np.ndarray]:
  """The regression's values, one (M, num_classes) float64 per penalty.

  Args:
    x: (N, D) float64 features to fit, not yet standardised.
    y: (N,) int labels.
    x_test: (M, D) features to predict for.
    num_classes: number of classes.
    penalties: as in `ridge_probe`.
  """
  mean, deviation = x.mean(0), x.std(0)
  deviation = np.where(deviation > 1e-12 * (1 + np.abs(mean)), deviation, 1)
  x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
  targets = np.eye(num_classes)[y]
  prior = targets.mean(0)
  # X^T X = V diag(e) V^T once; each penalty then costs one small product.
  eigenvalues, vectors = np.linalg.eigh(x.T @ x)
  eigenvalues = np.maximum(eigenvalues, 0)  # Round-off may leave -1e-13.
  # The targets need no centring: x is centred, and x.T @ prior is zero.
  right = vectors.T @ (x.T @ targets)  # (D, num_classes)
  rotated = x_test @ vectors  # (M, D)
  return [
    rotated @ (right / (eigenvalues + penalty)[:, None]) + prior
    for penalty in penalties
  ]
