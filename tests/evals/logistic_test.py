import inspect
import itertools

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from umae_jax import UserError
from umae_jax.evals import classification, logistic

NAN = float("nan")


def digits(count=500):
  x, y = load_digits(return_X_y=True)
  x = x.astype(np.float32)
  return x[:count], y[:count], x[count:], y[count:]


def train(x, y, learning_rates=(1.0,), weight_decays=(0.0,), **options):
  options = {"epochs": 3, "batch_size": 100, "seed": 0} | options
  return logistic.train_probes(
    *(x, y),
    learning_rates=learning_rates,
    weight_decays=weight_decays,
    num_classes=10,
    **options,
  )


def descent(x, y, learning_rate, weight_decay, steps, warmup):
  """Whole-batch SGD with momentum, written out in float64."""
  x, targets = x.astype(np.float64), np.eye(10)[y]
  rate = learning_rate * len(x) / 256
  kernel, bias = np.zeros((x.shape[1], 10)), np.zeros(10)
  kernel_trace, bias_trace = 0.0, 0.0
  for step in range(steps):
    scores = np.exp(x @ kernel + bias)
    error = (scores / scores.sum(1, keepdims=True) - targets) / len(x)
    kernel_trace = 0.9 * kernel_trace + x.T @ error + weight_decay * kernel
    bias_trace = 0.9 * bias_trace + error.sum(0)
    part = step / warmup
    if step >= warmup:
      part = (1 + np.cos(np.pi * (step - warmup) / (steps - warmup))) / 2
    kernel = kernel - rate * part * kernel_trace
    bias = bias - rate * part * bias_trace
  return kernel, bias


def test_every_probe_of_the_grid_is_a_descent_of_its_own():
  x, y, x_test, _ = digits()
  x, x_test = logistic.normalize(x, x_test, "standardize")
  grid = [(0.1, 0.0), (0.1, 0.3), (1.0, 0.1)]
  options = {"epochs": 30, "batch_size": 10**6, "warmup": 0.2}
  probes = train(x, y, *zip(*grid), **options)
  for i, pair in enumerate(grid):
    kernel, bias = descent(x, y, *pair, 30, 6)
    np.testing.assert_allclose(probes.kernel[i], kernel, atol=1e-5)
    np.testing.assert_allclose(probes.bias[i], bias, atol=1e-5)
    want = x_test @ kernel + bias
    scores = list(probes.scores(x_test))[i]
    np.testing.assert_allclose(scores, want, atol=1e-4)
  assert abs(bias).max() > 0.01


def test_converges_to_scikit_learns_solution():
  x, y, x_test, _ = digits()
  x, x_test = logistic.normalize(x, x_test, "standardize")
  decay = 0.1  # Per mean loss; scikit-learn's C is per sum.
  probes = train(x, y, [0.3], [decay], epochs=300, batch_size=500)
  model = LogisticRegression(C=1 / (500 * decay), tol=1e-8).fit(x, y)
  want = model.predict_log_proba(x_test)
  scores = next(probes.scores(x_test)).astype(np.float64)
  got = scores - np.log(np.exp(scores).sum(1, keepdims=True))
  np.testing.assert_allclose(got, want, atol=5e-3)


def test_an_epoch_visits_each_row_once_but_for_the_last_part():
  x, y = np.eye(11), np.zeros(11, int)
  kernel = train(x, y, batch_size=5, epochs=1, warmup=0).kernel
  # A row's own feature moves if the row is in a batch.
  assert (np.asarray(kernel)[0].any(1)).sum() == 10
  kernel = train(x, y, batch_size=5, epochs=9, warmup=0).kernel
  assert np.asarray(kernel)[0].any(1).all()  # Each epoch leaves out another.


def test_a_probe_depends_on_the_seed_alone_not_on_its_neighbours():
  x, y, *_ = digits()
  x, _ = logistic.normalize(x, x, "standardize")
  together = train(x, y, [0.1, 1.0, 1e6], [0.0, 1e-3, 0.0])
  again = train(x, y, [0.1, 1.0, 1e6], [0.0, 1e-3, 0.0])
  np.testing.assert_array_equal(together.kernel, again.kernel)
  alone = train(x, y, [1.0], [1e-3])
  np.testing.assert_allclose(together.kernel[1], alone.kernel[0], atol=1e-5)
  other = train(x, y, [1.0], [1e-3], seed=1)
  assert abs(alone.kernel - other.kernel).max() > 1e-3


def fast(data, **options):
  options = {
    "learning_rates": [1e-4, 0.1, NAN, 0.1],
    "weight_decays": [0.0, 10.0, 0.0, 1e-3],
    "epochs": 20,
    "batch_size": 128,
    "seed": 0,
  } | options
  return logistic.fast_probe(*data[:3], num_classes=10, **options)


@pytest.mark.parametrize(
  "size, options, message",
  [
    (9, {}, "9 training images are too few"),
    (500, {"learning_rates": [1e38] * 4}, r"diverged.*probe.learning_rates"),
  ],
)
def test_what_gives_no_probe_is_told(size, options, message):
  x, y, x_test, _ = digits()
  with pytest.raises(UserError, match=message):
    fast((x[:size], y[:size], x_test), **options)


def test_the_best_pair_on_held_out_rows_is_refitted_on_all(monkeypatch):
  fits, train_probes = [], logistic.train_probes

  def spy(x, y, **options):
    fits.append((x, y, train_probes(x, y, **options)))
    return fits[-1][-1]

  monkeypatch.setattr(logistic, "train_probes", spy)
  x, y, x_test, y_test = data = digits()
  result = fast(data)
  assert (result.learning_rate, result.weight_decay) == (0.1, 1e-3)
  (fitted, labels, probes), (whole, all_labels, last) = fits
  assert fitted.shape == (450, 64) and last.bias.shape == (1, 10)
  np.testing.assert_array_equal(all_labels, y)
  want, scaled = logistic.normalize(x, x_test, "standardize")
  np.testing.assert_array_equal(whole, want)
  np.testing.assert_array_equal(result.scores, next(last.scores(scaled)))
  assert classification.top_k_accuracy(result.scores, y_test, 1) > 0.85
  # The held-out rows are those not fitted, scaled as the fitted ones are.
  np.testing.assert_allclose(fitted.mean(0), 0, atol=1e-5)
  out = np.ones(500, bool)
  out[np.random.default_rng(0).permutation(500)[50:]] = False
  np.testing.assert_array_equal(np.sort(labels), np.sort(y[~out]))
  _, judged = logistic.normalize(x[~out], x[out], "standardize")
  accuracy = [
    classification.top_k_accuracy(s, y[out], 1) for s in probes.scores(judged)
  ]
  np.testing.assert_array_equal(result.held_out_accuracy, accuracy)
  assert accuracy[2] == 0  # NaN; class 0 would be right now and then.
  assert accuracy[3] > max(accuracy[:3])


def test_no_test_label_can_be_given_and_test_rows_do_not_choose():
  names = inspect.signature(logistic.fast_probe).parameters
  assert "test_labels" not in names
  x, y, x_test, _ = digits()
  a, b = fast((x, y, x_test)), fast((x, y, 100 * x_test[::-1]))
  assert a[1:3] == b[1:3]
  np.testing.assert_array_equal(a.held_out_accuracy, b.held_out_accuracy)


def test_scale_and_shift_matter_only_without_normalization():
  x, y, x_test, _ = digits()
  moved = (4 * x + 100, y, 4 * x_test + 100)
  a, b = fast((x, y, x_test)), fast(moved)
  np.testing.assert_allclose(a.scores, b.scores, atol=1e-2)
  a, b = (fast(d, normalization="none") for d in ((x, y, x_test), moved))
  assert abs(a.scores - b.scores).max() > 1


def test_normalizations():
  x = np.array([[3.0, 4.0, 7.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
  for a, b in zip(logistic.normalize(x, x[:1], "none"), (x, x[:1])):
    np.testing.assert_array_equal(a, b)
  a, b = logistic.normalize(x[:, :2], x[:1, :2], "l2")
  np.testing.assert_allclose(a, [[0.6, 0.8], [0, 0], [0, 1]], rtol=1e-6)
  np.testing.assert_allclose(b, [[0.6, 0.8]], rtol=1e-6)
  constant = np.float32([[0.1, 1], [0.1, 2], [0.1, 3]])
  a, b = logistic.normalize(constant, constant + 1, "standardize")
  root = np.sqrt(1.5)
  np.testing.assert_allclose(a, [[0, -root], [0, 0], [0, root]], atol=1e-6)
  np.testing.assert_allclose(b[:, 0], 1, rtol=1e-6)  # Only centred.
  with pytest.raises(ValueError, match=r"normalization='zca'.*'standardize'"):
    logistic.normalize(x, x, "zca")


def test_sweep_covers_the_product():
  x, y, x_test, y_test = digits(200)
  features = {"cls": (x, x_test), "mean": (x**2, x_test**2)}
  rows = logistic.sweep(
    *(features, y, y_test),
    normalizations=["none", "standardize"],
    epochs=[1, 3],
    batch_sizes=[64, 200, 4096],  # The last is clipped, and there already.
    learning_rates=[0.01, 0.1],
    num_classes=10,
    seed=0,
  )
  want = itertools.product(
    *(features, ["none", "standardize"], [1, 3], [64, 200], [0.01, 0.1])
  )
  assert [row[:5] for row in rows] == list(want)
  assert len({row.accuracy for row in rows}) > 16
  row = rows[-2]  # mean, standardize, 3, 200, 0.01
  train_x, test_x = logistic.normalize(*features["mean"], "standardize")
  (scores,) = train(train_x, y, [0.01], batch_size=200).scores(test_x)
  assert abs(row.accuracy - (scores.argmax(1) == y_test).mean()) < 0.002
