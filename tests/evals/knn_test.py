import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from umae_jax.evals import knn


def knn_reference(x, y, x_test, y_test, k, temperature, num_classes):
  """Float64, the definition spelled out, one test example at a time."""
  correct = 0
  for a, label in zip(x_test.astype(np.float64), y_test):
    s = [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for b in x]
    votes = [0.0] * num_classes
    for i in sorted(range(len(x)), key=lambda i: -s[i])[:k]:
      votes[y[i]] += np.exp(s[i] / temperature)
    correct += votes.index(max(votes)) == label
  return correct / len(y_test)


def problem(seed, n=90, m=70, d=5, num_classes=4):
  """Overlapping classes of different lengths, not solved perfectly."""
  rng = np.random.default_rng(seed)
  centres = rng.normal(size=(num_classes, d))

  def draw(count):
    y = rng.integers(0, num_classes, count)
    x = centres[y] + 0.9 * rng.normal(size=(count, d))
    return (x * rng.uniform(0.1, 9, (count, 1))).astype(np.float32), y

  return *draw(n), *draw(m)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k, temperature", [(1, 0.07), (20, 0.07), (20, 5.0)])
@pytest.mark.parametrize("block_size", [7, 1024])
def test_matches_float64_reference(seed, k, temperature, block_size):
  data = problem(seed)
  want = knn_reference(*data, k, temperature, 4)
  assert 0.3 < want < 0.95  # Neither chance nor trivial.
  got = knn.weighted_knn(
    *data, k=k, temperature=temperature, num_classes=4, block_size=block_size
  )
  assert got == want


def test_weights_and_neighbours_matter():
  data = problem(0)
  accuracy = {
    knn.weighted_knn(*data, k=k, temperature=t, num_classes=4)
    for k, t in [(1, 0.07), (20, 0.07), (20, 5.0), (90, 0.07)]
  }
  assert len(accuracy) > 2


def test_one_neighbour_is_scikit_learns():
  x, y, x_test, y_test = problem(4)
  model = KNeighborsClassifier(1, metric="cosine").fit(x, y)
  got = knn.weighted_knn(x, y, x_test, y_test, k=1, num_classes=4)
  assert got == model.score(x_test, y_test)


def test_more_neighbours_than_examples():
  data = problem(5, n=12)
  got = knn.weighted_knn(*data, k=20, num_classes=4)
  assert got == knn_reference(*data, 12, 0.07, 4)


def test_a_zero_row_and_a_small_temperature_are_harmless():
  x = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
  y = np.array([0, 1, 2])
  got = knn.weighted_knn(x, y, x[1:], y[1:], temperature=1e-4, num_classes=3)
  assert got == 1.0
