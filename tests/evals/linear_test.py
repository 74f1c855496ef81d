import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.preprocessing import StandardScaler

from umae_jax.evals import classification, linear


def digits(noise=0.0):
  x, y = load_digits(return_X_y=True)  # Some pixels are always 0.
  x = x + noise * np.random.default_rng(0).normal(size=x.shape)
  return x[:600].astype(np.float32), y[:600], x[600:], y[600:]


def sklearn_scores(x, y, x_test, alpha):
  scaler = StandardScaler().fit(x.astype(np.float64))
  model = Ridge(alpha=alpha).fit(
    scaler.transform(x.astype(np.float64)), np.eye(10)[y]
  )
  return model.predict(scaler.transform(x_test.astype(np.float64)))


@pytest.mark.parametrize("alpha", [1e-2, 1.0, 1e4])
def test_scores_equal_scikit_learn(alpha):
  x, y, x_test, _ = digits()
  (got,) = linear.ridge_scores(x.astype(np.float64), y, x_test, 10, [alpha])
  np.testing.assert_allclose(
    got, sklearn_scores(x, y, x_test, alpha), atol=1e-8
  )


@pytest.mark.parametrize("alpha", [1e-2, 1.0, 1e4])
@pytest.mark.parametrize("count", [40, 64, 65])
def test_fewer_examples_than_dimensions(alpha, count):
  """The kernel form is the same solution; there are 64 dimensions."""
  x, y, x_test, _ = digits(noise=1.0)
  x, y = x[:count], y[:count]
  (got,) = linear.ridge_scores(x.astype(np.float64), y, x_test, 10, [alpha])
  want = sklearn_scores(x, y, x_test, alpha)
  np.testing.assert_allclose(got, want, atol=1e-8)


def test_probe_scores_are_those_of_scikit_learns_classifier():
  """RidgeClassifier's targets are -1 and 1: its scores are 2 s - 1."""
  x, y, x_test, y_test = digits()
  got = linear.ridge_probe_scores(x, y, x_test, num_classes=10, penalties=[9.0])
  scaler = StandardScaler().fit(x.astype(np.float64))
  model = RidgeClassifier(alpha=9.0)
  model.fit(scaler.transform(x.astype(np.float64)), y)
  x_test = x_test.astype(np.float64)
  want = model.decision_function(scaler.transform(x_test))
  np.testing.assert_allclose(2 * got - 1, want, atol=1e-6)
  top_5 = classification.top_k_accuracy(got, y_test, 5)
  assert top_5 > classification.top_k_accuracy(got, y_test, 1) > 0.8


def test_probe_scores_are_of_the_chosen_penalty():
  x, y, x_test, y_test = digits(noise=10.0)
  x, y = x[:100], y[:100]
  options = {"num_classes": 10, "penalties": (1e-2, 1e2, 1e4)}
  scores = linear.ridge_probe_scores(x, y, x_test, **options)
  want = [sklearn_scores(x, y, x_test, a) for a in options["penalties"]]
  fits = [np.allclose(scores, w, atol=1e-8) for w in want]
  assert sum(fits) == 1 and not fits[0]
  accuracy = linear.ridge_probe(x, y, x_test, y_test, **options)
  assert accuracy == (scores.argmax(1) == y_test).mean()


@pytest.mark.parametrize("alpha", [1e-2, 1e4])
def test_accuracy_equals_scikit_learn(alpha):
  x, y, x_test, y_test = digits()
  want = (sklearn_scores(x, y, x_test, alpha).argmax(1) == y_test).mean()
  got = linear.ridge_probe(
    x, y, x_test, y_test, num_classes=10, penalties=(alpha,)
  )
  assert got == want
  assert 0.8 < got < 0.95


def test_penalty_is_the_best_in_five_fold_cross_validation():
  x, y, x_test, y_test = digits(noise=10.0)
  x, y = x[:100], y[:100]  # Few and noisy: the penalty matters.
  penalties = (1e-2, 1e2, 1e4)

  def right(penalty, fold):
    out = np.arange(100) % 5 == fold
    predicted = sklearn_scores(x[~out], y[~out], x[out], penalty).argmax(1)
    return (predicted == y[out]).sum()

  scores = [sum(right(a, fold) for fold in range(5)) for a in penalties]
  best = penalties[int(np.argmax(scores))]
  tests = [
    (sklearn_scores(x, y, x_test, a).argmax(1) == y_test).mean()
    for a in penalties
  ]
  assert len(set(scores)) == len(set(tests)) == 3
  got = linear.ridge_probe(
    x, y, x_test, y_test, num_classes=10, penalties=penalties
  )
  assert got == tests[penalties.index(best)]


def test_test_labels_do_not_choose_the_penalty(monkeypatch):
  x, y, x_test, y_test = digits()
  fitted = []
  scores = linear.ridge_scores
  monkeypatch.setattr(
    linear,
    "ridge_scores",
    lambda *a: (fitted.append((len(a[0]), a[2], a[4])), scores(*a))[1],
  )
  linear.ridge_probe(x, y, x_test, y_test, num_classes=10)
  linear.ridge_probe(x, y, x_test, y_test[::-1], num_classes=10)
  for fold, (size, held_out, penalties) in enumerate(fitted[:5]):
    assert size == 480 and penalties == linear.PENALTIES
    np.testing.assert_array_equal(held_out, x[fold::5])
  assert len(fitted) == 12
  assert fitted[5][0] == 600 and fitted[5][2] == fitted[11][2]


def test_scale_and_shift_of_a_feature_do_not_matter():
  x, y, x_test, y_test = digits()
  a = linear.ridge_probe(x, y, x_test, y_test, num_classes=10)
  scale = np.random.default_rng(0).uniform(0.01, 100, x.shape[1])
  b = linear.ridge_probe(
    x * scale + 3, y, x_test * scale + 3, y_test, num_classes=10
  )
  assert abs(a - b) < 0.002


def test_a_class_without_examples_and_constant_features():
  x = np.array([[1.0, 5.0], [1.1, 5.0], [-1.0, 5.0], [-1.1, 5.0], [1.0, 5.0]])
  y = np.array([0, 0, 2, 2, 0])
  assert linear.ridge_probe(x, y, x, y, num_classes=3) == 1.0
