import csv
import io

import numpy as np
import pytest
from sklearn import metrics

from umae_jax.evals import classification

NAN = float("nan")


def problem(seed=0, n=200, classes=7):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, classes, n)
  scores = rng.normal(size=(n, classes)) + np.eye(classes)[labels]
  return scores.astype(np.float32), labels


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_top_k_equals_scikit_learn(k):
  scores, labels = problem()
  want = metrics.top_k_accuracy_score(labels, scores, k=k) if k < 7 else 1.0
  assert classification.top_k_accuracy(scores, labels, k) == want
  assert 0.3 < want < 0.97 or k > 2


@pytest.mark.parametrize(
  "row, label, k, right",
  [
    ([1, 1, 1], 0, 1, True),  # Of equals the first wins.
    ([1, 1, 1], 1, 1, False),
    ([1, 1, 1], 1, 2, True),
    ([0, 2, 2], 2, 1, False),
    ([0, 2, 1], 2, 2, True),
    ([0, 2, 1], 0, 9, True),  # k is clipped.
    ([NAN, 2, 1], 1, 1, False),
    ([2, NAN, 1], 1, 9, False),
    ([-np.inf, -np.inf, 0], 0, 2, True),
  ],
)
def test_ties_clipping_and_nan(row, label, k, right):
  scores, labels = np.array([row], np.float32), np.array([label])
  assert classification.top_k_accuracy(scores, labels, k) == right


def test_top_one_is_the_arg_max():
  scores, labels = problem()
  scores = scores.round()  # Many ties.
  want = (scores.argmax(1) == labels).mean()
  assert classification.top_k_accuracy(scores, labels, 1) == want


def test_confusion_equals_scikit_learn():
  scores, labels = problem()
  want = metrics.confusion_matrix(labels, scores.argmax(1))
  assert not (want == want.T).all()
  for given in (scores, scores.argmax(1)):
    got = classification.confusion_matrix(given, labels, 7)
    np.testing.assert_array_equal(got, want)
  got = classification.confusion_matrix(scores, labels.astype(np.int32), 9)
  assert got.shape == (9, 9) and got.sum() == 200


def test_impossible_pairs_are_refused():
  zeros = np.zeros(2, int)
  for predictions, labels, message in (
    ([0, 3], zeros, r"predictions are in \[0, 3\].*\[0, 3\)"),
    (zeros, [-1, 0], r"labels are in \[-1, 0\]"),
    ([[NAN, 0, 0], [0, 0, 0]], zeros, "NaN"),
  ):
    with pytest.raises(ValueError, match=message):
      classification.confusion_matrix(predictions, labels, 3)


def test_accuracy_of_each_class():
  matrix = np.array([[3, 1, 0], [0, 0, 0], [2, 0, 0]])
  got = classification.per_class_accuracy(matrix)
  np.testing.assert_array_equal(got, [0.75, NAN, 0])


def test_table_reads_back():
  matrix = np.array([[3, 1, 0], [0, 0, 0], [2, 3, 5]])
  names = ['a "great", white shark', "b", "c"]
  text = classification.per_class_table(matrix, names)
  rows = list(csv.DictReader(io.StringIO(text)))
  assert [list(row.values()) for row in rows] == [
    [names[0], "4", "0.7500", "b", "1"],
    ["b", "0", "", "", "0"],
    ["c", "10", "0.5000", "b", "3"],
  ]
  assert list(rows[0]) == [
    *("class", "images", "accuracy", "most often taken for", "how often")
  ]
