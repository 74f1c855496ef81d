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


def of_moment(moment: np.ndarray) -> np.ndarray:
  """Singular values from C = Z^T Z / N, without the N rows.

  Args:
    moment: (D, D) symmetric, such as `losses.second_moment`.

  Returns:
    (D,) float64, descending, >= 0: those of Z, divided by sqrt(N), which the
    measures below do not see. Below 1e-4 of the largest they are round-off of
    a float32 moment, whose eigenvalues are squares.
  """
  eigenvalues = np.linalg.eigvalsh(np.asarray(moment, np.float64))
  return np.sqrt(np.maximum(eigenvalues[::-1], 0))


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


def stable_rank(singular_values: np.ndarray) -> float:
  """sum s^2 / max s^2, in [1, number of values]; 0 if all are zero.

  Source: Rudelson & Vershynin 2007 (arXiv:math/0503442), "numerical rank".
  """
  square = np.square(np.asarray(singular_values, np.float64))
  return float(square.sum() / square.max()) if square.any() else 0.0


def rankme(features: np.ndarray) -> float:
  """exp(entropy of s / sum s + 1e-7), s of the features as they are.

  Unlike `effective_rank` of `singular_values`, rows keep their lengths.

  Args:
    features: (N, D), any scale; the value does not depend on it.

  Returns:
    In [1, min(N, D)], but for the 1e-7; of zero features about 1.

  Source: Garrido et al. 2023 (arXiv:2210.02885), equation 1.
  """
  s = np.linalg.svd(np.asarray(features, np.float64), compute_uv=False)
  p = s / max(s.sum(), np.finfo(np.float64).tiny) + 1e-7
  return float(np.exp(-(p * np.log(p)).sum()))
