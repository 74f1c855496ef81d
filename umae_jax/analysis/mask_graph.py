"""The graph that masking makes between views and targets, exactly.

Images x of a finite world have probabilities P(x) and labels y(x). A mask
leaves a visible view x1 of an image and a target x2 in what it removes. Their
joint distribution

    M(x1, x2) = E_x P(x1, x2 | x)

is a bipartite graph, and two views are a positive pair if they share a target:
given x2, they are drawn independently from M(. | x2). With the marginals d1
and d2 and A = D1^-1/2 M D2^-1/2, the graph of pairs of views is A A^T once
normalised; its eigenvalues are the squared singular values of A, all in
[0, 1], the largest 1.

Besides the package's dimensions: V views, U targets, and M images here.
Source: Zhang, Wang & Wang 2022 (arXiv:2210.08344), section 3; HaoChen et al.
2021 (arXiv:2106.04156). Proofs: docs/theory.md.
"""

from typing import NamedTuple

import numpy as np
from scipy import sparse

from umae_jax import UserError

TARGETS = ("patch", "complement")


class MaskGraph(NamedTuple):
  """A finite world under random masks.

  Attributes:
    joint: (V, U) sparse float64, M(x1, x2) > 0 where stored; the sum is 1.
    views: (M, V) sparse, P(x, x1): how often an image shows which view.
    targets: (M, U) sparse, P(x, x2).
  """

  joint: sparse.csr_array
  views: sparse.csr_array
  targets: sparse.csr_array


def from_images(
  patches: np.ndarray,
  removed: np.ndarray,
  *,
  targets: str = "patch",
  probabilities: np.ndarray | None = None,
) -> MaskGraph:
  """The graph of given images under equally likely masks.

  Two views are the same if mask and visible values are; images that look alike
  where it is visible share a view, which is what connects them.

  Args:
    patches: (M, L, ...) integers, the values of each patch; few different ones,
      or no two images share anything.
    removed: (m, L) bool masks, True = removed; each leaves a patch visible and
      removes one. A mask that comes twice is twice as likely.
    targets: "patch": one of the removed patches, equally likely, its place and
      values: the loss is a mean over these, and they connect masks.
      "complement": all removed patches together, as the paper writes it;
      views under different masks then never share one.
    probabilities: (M,) P(x), or None for equal ones.

  Raises:
    ValueError: shapes that do not fit, or a mask that removes all or nothing.
  """
  patches, removed = np.asarray(patches), np.asarray(removed, bool)
  if patches.ndim < 2 or removed.shape[1:] != patches.shape[1:2]:
    raise ValueError(
      f"patches {patches.shape} and removed {removed.shape} are to be "
      "(images, patches, ...) and (masks, patches)."
    )
  if removed.all(1).any() or not removed.any(1).all():
    raise ValueError("Every mask must remove a patch, and leave one visible.")
  if targets not in TARGETS:
    raise ValueError(f"targets={targets!r} is not one of {TARGETS}.")
  codes = _patch_codes(patches)
  masks, counts = np.unique(removed, axis=0, return_counts=True)
  views, v = _number(codes, ~masks)  # (m, M), each image's view.
  # (m, M, t): the targets of an image under a mask.
  if targets == "complement":
    numbers = _number(codes, masks)[0][:, :, None]
  else:
    width = codes.max() + 1
    places = np.arange(codes.shape[1]) * width
    _, inverse = np.unique(places + codes, return_inverse=True)
    inverse = inverse.reshape(codes.shape)  # (M, L)
    numbers = [inverse[:, mask] for mask in masks]
  images = len(patches)
  prior = (
    np.full(images, 1 / images) if probabilities is None else probabilities
  )
  rows, columns, values, owners = [], [], [], []
  for number, view, count in zip(numbers, views, counts):
    share = np.asarray(prior) * count / counts.sum() / number.shape[1]
    rows.append(np.repeat(view, number.shape[1]))
    columns.append(number.ravel())
    values.append(np.repeat(share, number.shape[1]))
    owners.append(np.repeat(np.arange(images), number.shape[1]))
  rows, columns, values, owners = map(
    np.concatenate, (rows, columns, values, owners)
  )
  # Patches that no mask removes are no targets.
  targets, columns = np.unique(columns, return_inverse=True)
  return MaskGraph(
    _summed(values, rows, columns, (v, len(targets))),
    _summed(values, owners, rows, (images, v)),
    _summed(values, owners, columns, (images, len(targets))),
  )


def draw_masks(
  rng: np.random.Generator, count: int, patches: int, num_removed: int
) -> np.ndarray:
  """(count, L) bool, each removing as many patches, uniformly drawn."""
  noise = rng.random((count, patches))
  return noise.argsort(1).argsort(1) >= patches - num_removed


def normalized(joint: sparse.csr_array) -> sparse.csr_array:
  """A = D1^-1/2 M D2^-1/2, (V, U); rows and columns of zeros stay so."""
  scale1, scale2 = map(_inverse_root, (joint.sum(1), joint.sum(0)))
  return sparse.csr_array(
    sparse.diags_array(scale1) @ joint @ sparse.diags_array(scale2)
  )


class Spectrum(NamedTuple):
  """Eigen-decomposition of the graph of positive pairs, A A^T.

  Attributes:
    eigenvalues: (min(V, U),) in [0, 1], descending; the rest are 0.
    vectors: (V, k) orthonormal, of the first k of them that are not 0.
  """

  eigenvalues: np.ndarray
  vectors: np.ndarray


def spectrum(joint: sparse.csr_array, k: int | None = None) -> Spectrum:
  """Eigenvalues of A A^T, and its first k eigenvectors (None: all that count).

  The smaller of A A^T and A^T A is decomposed, densely: time min(V, U)^3.

  Raises:
    UserError: the smaller side has more than 20,000 nodes.
  """
  a = normalized(joint)
  wide = a.shape[0] < a.shape[1]
  small = a @ a.T if wide else a.T @ a
  if small.shape[0] > 20_000:
    raise UserError(
      f"{joint.shape[0]} views and {joint.shape[1]} targets are too many for "
      "an exact spectrum (20,000 of the fewer); use fewer grey levels, larger "
      "patches or fewer images."
    )
  values, vectors = np.linalg.eigh(small.toarray())
  values, vectors = values[::-1].clip(0, 1), vectors[:, ::-1]
  rank = int((values > 1e-10).sum())
  k = rank if k is None else min(k, rank)
  vectors = vectors[:, :k]
  if not wide:
    vectors = a @ vectors / np.sqrt(values[:k])
  return Spectrum(values, vectors)


def features(joint: sparse.csr_array, found: Spectrum, k: int) -> np.ndarray:
  """(V, k): what minimises `spectral_loss`, f = D1^-1/2 U sqrt(lambda).

  Fewer columns where the graph has fewer eigenvalues that are not 0.
  """
  u = found.vectors[:, :k]
  scale = _inverse_root(joint.sum(1))[:, None]
  return scale * u * np.sqrt(found.eigenvalues[: u.shape[1]])


def agreement(joint: sparse.csr_array, maps: np.ndarray) -> float:
  """E f(x1) . f(x1+) over positive pairs; `maps` is (V, k), f of each view."""
  # Given a target both are drawn alike: E |E[f | x2]|^2.
  d2, sums = joint.sum(0), joint.T @ maps
  return float((np.square(sums).sum(1) / np.where(d2 > 0, d2, 1)).sum())


def uniformity(joint: sparse.csr_array, maps: np.ndarray) -> float:
  """E (f(x1) . f(x1'))^2 over independent views: |F^T F|_F^2, F = D1^1/2 f."""
  moment = maps.T @ (joint.sum(1)[:, None] * maps)
  return float(np.square(moment).sum())


def spectral_loss(joint: sparse.csr_array, maps: np.ndarray) -> float:
  """-2 E f(x1) . f(x1+) + E (f(x1) . f(x1'))^2, of f as (V, k).

  Equal to |A A^T - F F^T|_F^2 - |A A^T|_F^2 with F = D1^1/2 f, so that the
  minimum over f is minus the sum of the k largest squared eigenvalues.

  Source: HaoChen et al. 2021 (arXiv:2106.04156), section 3.2.
  """
  return uniformity(joint, maps) - 2 * agreement(joint, maps)


def reconstruction_loss(
  joint: sparse.csr_array, maps: np.ndarray, targets: np.ndarray
) -> float:
  """E |h(x1) - x2|^2 of outputs (V, k) against targets (U, k)."""
  d1, d2 = joint.sum(1), joint.sum(0)
  squares = d1 @ np.square(maps).sum(1) + d2 @ np.square(targets).sum(1)
  return float(squares - 2 * cross_agreement(joint, maps, targets))


def cross_agreement(
  joint: sparse.csr_array, maps: np.ndarray, targets: np.ndarray
) -> float:
  """E h(x1) . t(x2) over views and their targets, of (V, k) and (U, k)."""
  return float(((joint @ targets) * maps).sum())


def _inverse_root(d):
  """d^-1/2, and 0 where d is."""
  return np.divide(1, np.sqrt(d), out=np.zeros_like(d), where=d > 0)


def _patch_codes(patches):
  """(M, L) int: equal numbers for equal values, whatever the place."""
  flat = patches.reshape(*patches.shape[:2], -1)
  _, inverse = np.unique(
    flat.reshape(-1, flat.shape[-1]), axis=0, return_inverse=True
  )
  return inverse.reshape(flat.shape[:2])


def _number(codes, masks):
  """(m, M) int: what each image shows where a mask is True; and how many."""
  numbers, total = np.empty((len(masks), len(codes)), np.int64), 0
  for i, mask in enumerate(masks):
    _, inverse = np.unique(codes[:, mask], axis=0, return_inverse=True)
    inverse = inverse.ravel()
    numbers[i] = total + inverse
    total += inverse.max() + 1
  return numbers, total


def _summed(values, rows, columns, shape):
  """Sparse matrix of the sums of values with the same row and column."""
  matrix = sparse.coo_array((values, (rows, columns)), shape=shape)
  return sparse.csr_array(matrix)
