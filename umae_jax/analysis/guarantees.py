"""What the mask graph promises: bounds, labelling error, and how tight.

Dimensions as in `mask_graph`; c classes. Constants and proofs: docs/theory.md.
"""

from typing import NamedTuple

import numpy as np
from scipy import sparse

from umae_jax.analysis import mask_graph


class Bound(NamedTuple):
  """A lower bound of a loss, and the loss.

  Attributes:
    loss: what is bounded.
    bound: at most that, but for round-off.
  """

  loss: float
  bound: float

  @property
  def slack(self) -> float:
    """`loss` - `bound`, at least 0."""
    return self.loss - self.bound


def asymmetric_bound(joint, outputs, targets, reencoded) -> Bound:
  """E|h(x1) - x2|^2 >= 1 - E h(x1) . h_g(x2) - epsilon.

  Args:
    joint: (V, U) sparse M.
    outputs: (V, k), h of each view, rows of length 1.
    targets: (U, k), rows of length 1.
    reencoded: (U, k), h_g of each target, rows of length 1: what the decoder
      can give; epsilon is E|h_g(x2) - x2|^2.
  """
  d2 = joint.sum(0)
  epsilon = float(d2 @ np.square(reencoded - targets).sum(1))
  agreement = mask_graph.cross_agreement(joint, outputs, reencoded)
  loss = mask_graph.reconstruction_loss(joint, outputs, targets)
  return Bound(loss, 1 - agreement - epsilon)


def alignment_bound(joint, outputs, targets, *, sharp: bool = False) -> Bound:
  """E|h(x1) - x2|^2 >= 1/2 - 1/2 E h(x1) . h(x1+).

  `sharp`: 1 - E h(x1) . h(x1+) is a lower bound as well, and twice as large.
  Arguments as in `asymmetric_bound`.
  """
  factor = 1.0 if sharp else 0.5
  agreement = mask_graph.agreement(joint, outputs)
  loss = mask_graph.reconstruction_loss(joint, outputs, targets)
  return Bound(loss, factor * (1 - agreement))


def spectral_bound(
  joint, outputs, targets, weight: float, *, sharp: bool = False
) -> Bound:
  """Reconstruction + weight * uniformity of h, bounded by the spectral loss.

  With c = 1/2, or 1 if `sharp`, and s = sqrt(2 weight / c):

      loss >= c + c^2 / (4 weight) * spectral_loss(s h)
           >= c - c^2 / (4 weight) * (sum of the k largest eigenvalues^2)

  The first is given: it is c - c E h(x1) . h(x1+) + weight * uniformity.
  Arguments as in `asymmetric_bound`; weight > 0 is lambda.
  """
  plain = alignment_bound(joint, outputs, targets, sharp=sharp)
  c = 1.0 if sharp else 0.5
  scaled = np.sqrt(2 * weight / c) * outputs
  loss = plain.loss + weight * mask_graph.uniformity(joint, outputs)
  spectral = mask_graph.spectral_loss(joint, scaled)
  return Bound(loss, c + c**2 / (4 * weight) * spectral)


class Trained(NamedTuple):
  """What the bounds need, of a trained model: their first four arguments."""

  joint: sparse.csr_array
  outputs: np.ndarray
  targets: np.ndarray
  reencoded: np.ndarray


def of_predictions(
  predictions: np.ndarray, removed: np.ndarray, targets: np.ndarray
) -> Trained:
  """The world of some images and masks, as a trained model answers in it.

  A target is a patch of an image, as the loss has them, and its views are the
  masks that remove it; prediction and target are scaled to length 1, as the
  bounds want them. h_g of a target is the nearest of its predictions: a code
  that the decoder was seen to turn into that.

  Args:
    predictions: (N, m, L, P) of N images under m masks each.
    removed: (N, m, L) bool.
    targets: (N, L, P); patches of zeros, which have no direction, are left out.
  """
  norms = np.linalg.norm(targets, axis=-1)
  image, mask, patch = np.nonzero(removed & (norms > 1e-6)[:, None])
  pairs, target = np.unique(
    image * targets.shape[1] + patch, return_inverse=True
  )
  units = targets.reshape(-1, targets.shape[-1])[pairs].astype(np.float64)
  units /= np.linalg.norm(units, axis=1, keepdims=True)
  outputs = predictions[image, mask, patch].astype(np.float64)
  outputs /= np.linalg.norm(outputs, axis=1, keepdims=True)
  # Sorted by target, then by how near; the last of each is the nearest.
  order = np.lexsort(((outputs * units[target]).sum(1), target))
  last = np.append(np.diff(target[order]) > 0, True)
  count = len(target)
  joint = sparse.csr_array(
    (np.full(count, 1 / count), (np.arange(count), target)),
    shape=(count, len(units)),
  )
  return Trained(joint, outputs, units, outputs[order][last])


def label_distribution(
  shown: sparse.csr_array, labels: np.ndarray, num_classes: int
) -> np.ndarray:
  """P(v, y), (V, c), of a graph's `views` (or `targets`) and (M,) labels."""
  one_hot = np.eye(num_classes)[labels]
  return np.asarray(shown.T @ one_hot)


def labelling_error(distribution: np.ndarray) -> float:
  """1 - sum_v max_y P(v, y), in [0, 1): of the best guess from a view alone."""
  return max(float(1 - distribution.max(1).sum()), 0.0)


def disagreement(joint: sparse.csr_array, guesses: np.ndarray) -> float:
  """phi = P(y(x1) != y(x1+)) over positive pairs; (V,) labels of views.

  At most 2 (alpha + beta), with the labelling errors of views and targets,
  where y(x1) is the view's likeliest label.
  """
  one_hot = np.eye(guesses.max() + 1)[guesses]
  return max(1 - mask_graph.agreement(joint, one_hot), 0.0)


class Guarantee(NamedTuple):
  """The linear classifier on the k spectral features of views, and its bound.

  Attributes:
    labelling_error: alpha, of views.
    target_labelling_error: beta, of targets.
    disagreement: phi, of positive pairs.
    next_eigenvalue: lambda_{k+1}, 0 if there is none.
    view_error: P(classifier's answer != y(x1)), the view's likeliest label.
    image_error: P(classifier's answer != y(x)), the image's label.
  """

  labelling_error: float
  target_labelling_error: float
  disagreement: float
  next_eigenvalue: float
  view_error: float
  image_error: float

  @property
  def view_bound(self) -> float:
    """2 phi / (1 - lambda_{k+1}), at least `view_error`; vacuous from 1 on.

    Infinite where the k eigenvectors leave out a part of the graph that
    nothing connects to the others.
    """
    gap = 1 - self.next_eigenvalue
    return 2 * self.disagreement / gap if gap > 1e-9 else np.inf

  @property
  def image_bound(self) -> float:
    """`view_bound` + alpha, at least `image_error`."""
    return self.view_bound + self.labelling_error


def guarantee(
  graph: mask_graph.MaskGraph,
  found: mask_graph.Spectrum,
  labels: np.ndarray,
  k: int,
) -> Guarantee:
  """Measures both sides of the guarantee, exactly.

  The classifier is the least-squares fit, over all views by their
  probabilities, of the views' likeliest labels (one-hot) on the first k
  eigenvectors; the largest of its c values is its answer.

  Args:
    graph: of the world.
    found: its spectrum, of at least k vectors (or all there are).
    labels: (M,) int of the images.
    k: number of eigenvectors.
  """
  classes = int(labels.max()) + 1
  of_views = label_distribution(graph.views, labels, classes)
  of_targets = label_distribution(graph.targets, labels, classes)
  guesses = of_views.argmax(1)
  root = np.sqrt(graph.joint.sum(1))[:, None]
  u = found.vectors[:, :k]
  # Weighted least squares on orthonormal columns is a projection.
  answers = (u @ (u.T @ (root * np.eye(classes)[guesses]))).argmax(1)
  rows = np.arange(len(answers))
  following = found.eigenvalues[k : k + 1]
  return Guarantee(
    labelling_error(of_views),
    labelling_error(of_targets),
    disagreement(graph.joint, guesses),
    float(following[0]) if len(following) else 0.0,
    float(of_views[answers != guesses].sum()),
    max(float(1 - of_views[rows, answers].sum()), 0.0),  # Of rounding.
  )


def residual(eigenvalues: np.ndarray, k: int) -> float:
  """sum_{i > k} lambda_i^2: what k dimensions leave of the graph."""
  return float(np.square(eigenvalues[k:]).sum())
