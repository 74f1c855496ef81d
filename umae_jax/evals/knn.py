"""Accuracy of a weighted k-nearest-neighbour classifier on features."""

import numpy as np


def weighted_knn(
  train_features: np.ndarray,
  train_labels: np.ndarray,
  test_features: np.ndarray,
  test_labels: np.ndarray,
  *,
  k: int = 20,
  temperature: float = 0.07,
  num_classes: int,
  block_size: int = 1024,
) -> float:
  """Share of test examples whose neighbours vote for their class.

  Each of the k training examples of largest cosine similarity s votes for its
  class with weight exp(s / temperature). Of classes with equal votes, the
  smallest wins.

  Args:
    train_features: (N, D), any scale; a zero row has similarity zero.
    train_labels: (N,) int, in [0, num_classes).
    test_features: (M, D).
    test_labels: (M,) int.
    k: neighbours; all N where N is smaller.
    temperature: > 0; the smaller, the more the nearest count.
    num_classes: number of classes.
    block_size: test examples at a time; the memory is 12 bytes x block_size x
      N, or so.

  Returns:
    Accuracy in [0, 1].

  Source: Wu et al. 2018 (arXiv:1805.01978), section 3.4.
  """
  train = _normalized(train_features)
  k = min(k, len(train))
  correct = 0
  for start in range(0, len(test_features), block_size):
    rows = slice(start, start + block_size)
    similarity = _normalized(test_features[rows]) @ train.T  # (rows, N)
    # Unordered: all of the k nearest vote.
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    nearest_similarity = np.take_along_axis(similarity, nearest, axis=1)
    # Minus 1: exp(1 / temperature) may overflow; a common factor is no matter.
    weights = np.exp((nearest_similarity.astype(np.float64) - 1) / temperature)
    votes = np.zeros((len(nearest), num_classes))
    examples = np.arange(len(nearest))[:, None]
    np.add.at(votes, (examples, train_labels[nearest]), weights)
    correct += int((votes.argmax(1) == test_labels[rows]).sum())
  return correct / len(test_features)


def _normalized(features: np.ndarray) -> np.ndarray:
  """Rows of length 1, float32; zero rows stay zero."""
  features = np.asarray(features, np.float32)
  norms = np.linalg.norm(features, axis=1, keepdims=True)
  return features / np.where(norms > 0, norms, 1)
