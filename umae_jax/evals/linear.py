"""Accuracy of a linear classifier on features, in closed form."""

from collections.abc import Sequence

import numpy as np

FOLDS = 5
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
  """Accuracy in [0, 1] of `ridge_probe_scores` on test_labels, (M,) int."""
  scores = ridge_probe_scores(
    train_features,
    train_labels,
    test_features,
    num_classes=num_classes,
    penalties=penalties,
  )
  return float((scores.argmax(1) == test_labels).mean())


def ridge_probe_scores(
  train_features: np.ndarray,
  train_labels: np.ndarray,
  test_features: np.ndarray,
  *,
  num_classes: int,
  penalties: Sequence[float] = PENALTIES,
) -> np.ndarray:
  """Test scores of one-vs-rest ridge regression on frozen features.

  Features are standardised by the training set's mean and deviation (constant
  ones are only centred); targets are one-hot, centred. The penalty is the
  best, and of equals the first, in five-fold cross-validation on the training
  set (fold i is every fifth example from the i-th on); then all are fitted
  with it. No test label has a say.

  Args:
    train_features: (N, D), N at least 5 unless there is one penalty.
    train_labels: (N,) int, in [0, num_classes).
    test_features: (M, D).
    num_classes: number of classes.
    penalties: > 0, added to the diagonal of the (D, D) Gram matrix of the
      standardised features, whose diagonal is N: scikit-learn's alpha.

  Returns:
    (M, num_classes) float64; the largest of a row is the prediction. Top-5:
    `classification.top_k_accuracy`.
  """
  x = np.asarray(train_features, np.float64)
  y = np.asarray(train_labels)
  best = penalties[0]
  if len(penalties) > 1:
    correct = np.zeros(len(penalties), int)
    for fold in range(FOLDS):
      out = np.arange(len(x)) % FOLDS == fold
      scores = ridge_scores(x[~out], y[~out], x[out], num_classes, penalties)
      correct += [(s.argmax(1) == y[out]).sum() for s in scores]
    best = penalties[int(np.argmax(correct))]
  test = np.asarray(test_features, np.float64)
  return ridge_scores(x, y, test, num_classes, [best])[0]


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
  prior = np.bincount(y, minlength=num_classes) / len(y)
  # Either X^T X = V diag(e) V^T, or, where that is smaller, X X^T (the kernel
  # form of the same solution); each penalty then costs one small product.
  wide = x.shape[1] > len(x)
  eigenvalues, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
  eigenvalues = np.maximum(eigenvalues, 0)  # Round-off may leave -1e-13.
  # (N or D, num_classes), and (M, N or D):
  if wide:
    right = np.eye(num_classes)[y] - prior
  else:  # x is centred, so the targets need not be; sums by class, no N x C.
    sums = [x[y == label].sum(0) for label in range(num_classes)]
    right = np.stack(sums, axis=1)
  left = x_test @ x.T if wide else x_test
  right, left = vectors.T @ right, left @ vectors
  return [
    left @ (right / (eigenvalues + penalty)[:, None]) + prior
    for penalty in penalties
  ]
