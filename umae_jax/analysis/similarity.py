"""How alike representations are: CKA, positive pairs, nearest neighbours."""

from collections.abc import Sequence

import numpy as np

from umae_jax import losses


def linear_cka(
  x: np.ndarray, y: np.ndarray, *, debiased: bool = False
) -> float:
  """Linear centred kernel alignment of two representations of N examples.

  |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F) of centred columns: memory of N D and of
  D x D, no N x N.

  Args:
    x: (N, D), any scale.
    y: (N, D'), the same examples.
    debiased: take away what N examples of unrelated representations have in
      common by chance, about D / (N + D): each of the three norms is replaced
      by its unbiased estimate. N must be at least 4.

  Returns:
    In [0, 1]: 1 = alike but for rotation, shift and scale; 0 = unrelated, or
    one of them constant. Debiased it may be a little below 0.

  Source: Kornblith et al. 2019 (arXiv:1905.00414), section 3; the unbiased
  estimate, Song et al. 2012 (JMLR 13), theorem 3.
  """
  return float(cka_matrix([x, y], debiased=debiased)[0, 1])


def cka_matrix(
  representations: Sequence[np.ndarray], *, debiased: bool = False
) -> np.ndarray:
  """`linear_cka` of each pair of n representations, (n, n) float64."""
  centred = [np.asarray(x, np.float64) for x in representations]
  centred = [x - x.mean(0) for x in centred]
  squares = [np.square(x).sum(1) for x in centred]  # Diagonals of X X^T.
  count, n = len(centred), len(centred[0])

  def alignment(i, j):
    value = np.square(centred[i].T @ centred[j]).sum()
    if debiased:  # Without the diagonals; rows of X X^T add up to 0.
      common = squares[i] @ squares[j] * n / (n - 2)
      apart = squares[i].sum() * squares[j].sum() / ((n - 1) * (n - 2))
      value += apart - common
    return value

  matrix = np.zeros((count, count))
  for i in range(count):
    for j in range(i + 1):
      matrix[i, j] = matrix[j, i] = alignment(i, j)
  norm = np.sqrt(np.maximum(np.diag(matrix), 0))
  norm = norm[:, None] * norm[None, :]
  return np.divide(matrix, norm, out=np.zeros_like(matrix), where=norm > 0)


def sharing_pairs(
  patches: np.ndarray,
  noise: np.ndarray,
  removed: np.ndarray,
  *,
  normalize: bool,
  seed: int = 0,
) -> np.ndarray:
  """For each image another one whose view shares a target with its view.

  The target of an image is its patch of the largest noise, which any mask by
  this noise removes. Its partner, of the images whose other mask removes the
  patch at that place too, is the one whose patch there is most alike (of
  several equal ones, any): on real images, the nearest there is to a target
  that two images share.

  Args:
    patches: (N, L, P) uint8.
    noise: (N, L), of the first mask.
    removed: (N, L), not 0 where the second mask removes.
    normalize: compare patches normalised as the targets of the loss.
    seed: of the choice among equal ones.

  Returns:
    (N,) int, numbers of images; -1 where there is none.
  """
  rng, places = np.random.default_rng(seed), noise.argmax(1)
  partners = np.full(len(patches), -1)
  for place in np.unique(places):
    values = patches[:, place] / np.float32(255)
    if normalize:
      values = np.asarray(losses.normalize_patches(values))
    rows = np.flatnonzero(places == place)
    others = np.flatnonzero(removed[:, place])
    if len(others) < 2:  # Perhaps the image alone.
      continue
    distance = np.square(values[rows, None] - values[None, others]).sum(-1)
    distance[rows[:, None] == others] = np.inf
    nearest = distance == distance.min(1, keepdims=True)
    partners[rows] = others[(nearest * rng.random(nearest.shape)).argmax(1)]
  return partners


def unit(features: np.ndarray) -> np.ndarray:
  """Rows of (N, D) scaled to length 1; zero rows stay zero."""
  norms = np.linalg.norm(features, axis=1, keepdims=True)
  return features / np.where(norms > 0, norms, 1)


def nearest(
  features: np.ndarray, queries: Sequence[int], count: int
) -> np.ndarray:
  """The examples whose features point most nearly the same way.

  Args:
    features: (N, D), any scale.
    queries: numbers of examples, each in [0, N).
    count: of neighbours, at most N - 1.

  Returns:
    (queries, count) int, the most alike first; no example is its own.
  """
  z, own = unit(features), np.asarray(queries)
  cosines = z[own] @ z.T
  cosines[np.arange(len(own)), own] = -np.inf
  return np.argsort(-cosines, axis=1)[:, :count]
