"""How many directions the features of a data set use: rank and collapse."""

import numpy as np


def singular_values(features: np.ndarray, center: bool = False) -> np.ndarray:
  """Singular values of the features, each row scaled to length 1.

  Args:
    features: (N, D), any scale; zero rows stay zero.
    center: subtract the mean row, after scaling.

  Returns:
    (min(N, D),) float64, descending, >= 0. Without centring, and without zero
    rows, their squares add up to N.
  """
  x = np.asarray(features, np.float64)
  norms = np.linalg.norm(x, axis=1, keepdims=True)
  x = x / np.where(norms > 0, norms, 1)
  if center:
    x = x - x.mean(0)
  return np.linalg.svd(x, compute_uv=False)


def effective_rank(singular_values: np.ndarray) -> float:
  """exp(entropy of s / sum s), in [1, number of values]; 0 if all are zero.

  The number of values if all are equal, 1 if one alone is not zero.

  Source: Roy & Vetterli 2007, "The effective rank: a measure of effective
  dimensionality", EUSIPCO.
  """
  s = np.asarray(singular_values, np.float64)
  if not s.any():
    return 0.0
  p = s[s > 0] / s.sum()
  return float(np.exp(-(p * np.log(p)).sum()))


def participation_ratio(singular_values: np.ndarray) -> float:
  """(sum s^2)^2 / sum s^4, in [1, number of values]; 0 if all are zero.

  Of uncentred features without zero rows it is 1 / `losses.uniformity_loss`:
  the effective dimension that a pretraining run logs.
  """
  square = np.square(np.asarray(singular_values, np.float64))
  if not square.any():
    return 0.0
  return float(square.sum() ** 2 / np.square(square).sum())
