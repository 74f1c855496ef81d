"""Accuracy with a few labelled images per class, over random draws of them."""

import numpy as np

from umae_jax import UserError
from umae_jax.evals import linear


def few_shot_accuracy(
  train_features: np.ndarray,
  train_labels: np.ndarray,
  test_features: np.ndarray,
  test_labels: np.ndarray,
  *,
  shots: int,
  draws: int,
  num_classes: int,
  seed: int,
  penalty: float = 0.3,
) -> tuple[float, float]:
  """Fits a ridge classifier to `shots` images of each class, many times.

  Each fit is `linear.ridge_scores` with the penalty `penalty` * max(n, D), n =
  shots * num_classes: `penalty` times the mean non-zero eigenvalue of the Gram
  matrix. So few labels leave none to choose it by; 0.3 is near the best from
  1 to 50 shots on digits, on their pixels and on random features of them.

  Args:
    train_features: (N, D), of which the images are drawn.
    train_labels: (N,) int.
    test_features: (M, D).
    test_labels: (M,) int.
    shots: images of each class, at least 1.
    draws: fits, at least 1; draw i is a function of (seed, i, shots).
    num_classes: labels are in [0, num_classes).
    seed: not negative.
    penalty: > 0.

  Returns:
    Mean accuracy over the draws, in [0, 1], and its sample standard deviation
    (of one draw: NaN).

  Raises:
    UserError: a class has fewer than `shots` images.
  """
  y = np.asarray(train_labels)
  counts = np.bincount(y, minlength=num_classes)
  rarest = int(counts.argmin())
  if counts[rarest] < shots:
    raise UserError(
      f"shots={shots} images of each class are more than the "
      f"{counts[rarest]} of class {rarest}; take a smaller number, or a "
      "training set with more images of that class."
    )
  rows = (np.cumsum(counts) - counts)[:, None] + np.arange(shots)
  test = np.asarray(test_features, np.float64)
  accuracies = []
  for draw in range(draws):
    order = np.random.default_rng([seed, draw, shots]).permutation(len(y))
    by_class = order[np.argsort(y[order], kind="stable")]
    chosen = by_class[rows.ravel()]
    x = np.asarray(train_features[chosen], np.float64)
    size = penalty * max(x.shape)
    (scores,) = linear.ridge_scores(x, y[chosen], test, num_classes, [size])
    accuracies.append((scores.argmax(1) == test_labels).mean())
  deviation = np.std(accuracies, ddof=1) if draws > 1 else np.nan
  return float(np.mean(accuracies)), float(deviation)
