import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from umae_jax import UserError
from umae_jax.evals import few_shot, linear


def digits():
  x, y = load_digits(return_X_y=True)
  x = x.astype(np.float32)
  return x[:900], y[:900], x[900:], y[900:]


def run(data, **options):
  options = {"shots": 3, "draws": 4, "num_classes": 10, "seed": 0} | options
  return few_shot.few_shot_accuracy(*data, **options)


@pytest.fixture
def drawn(monkeypatch):
  """The (features, labels) of every fit."""
  fits, scores = [], linear.ridge_scores
  monkeypatch.setattr(
    linear, "ridge_scores", lambda *a: (fits.append(a[:2]), scores(*a))[1]
  )
  return fits


def test_every_draw_holds_the_shots_of_every_class(drawn):
  _, y, *test = digits()
  numbers = np.arange(900.0)[:, None]  # A feature that names its row.
  test[0] = test[0][:, :1]
  for shots in (1, 3):
    run((numbers, y, *test), shots=shots)
  assert len(drawn) == 8
  for i, (rows, labels) in enumerate(drawn):
    shots = 1 if i < 4 else 3
    np.testing.assert_array_equal(np.bincount(labels), [shots] * 10)
    assert len(np.unique(rows)) == 10 * shots
    np.testing.assert_array_equal(y[rows[:, 0].astype(int)], labels)


def test_draws_are_functions_of_seed_draw_and_shots(drawn):
  data = digits()
  first = run(data)
  assert run(data) == first and run(data, seed=1) != first
  run(data, draws=2)
  fits = [x.tobytes() for x, _ in drawn]
  assert fits[:4] == fits[4:8] and fits[12:] == fits[:2]
  assert len(set(fits[:4] + fits[8:12])) == 8  # No draw is another's.
  run(data, shots=4, draws=1)  # Not the same three, and one more.
  assert not set(drawn[-1][0][:, 20]) >= set(drawn[0][0][:, 20])


def test_images_are_drawn_uniformly(drawn):
  y = np.repeat([0, 1], [10, 30])
  x = np.arange(40.0)[:, None]
  run((x, y, x, y), draws=400, shots=5, num_classes=2)
  counts = np.bincount(np.concatenate([f[0][:, 0] for f in drawn]).astype(int))
  assert (abs(counts[:10] - 200) < 50).all()  # Deviation 10.
  assert (abs(counts[10:] - 67) < 40).all()


def test_accuracies_are_scikit_learns(drawn):
  *_, x_test, y_test = data = digits()
  got = run(data)
  accuracies = []
  for x, y in drawn:
    scaler = StandardScaler().fit(x)
    model = Ridge(alpha=0.3 * 64).fit(scaler.transform(x), np.eye(10)[y])
    predicted = model.predict(scaler.transform(x_test)).argmax(1)
    accuracies.append((predicted == y_test).mean())
  want = np.mean(accuracies), np.std(accuracies, ddof=1)
  np.testing.assert_allclose(got, want, rtol=1e-9)
  assert 0.6 < got[0] < 0.9 and 0 < got[1] < 0.1


def test_more_shots_are_better_and_one_draw_has_no_deviation():
  data = digits()
  one, five, fifty = (run(data, shots=n)[0] for n in (1, 5, 50))
  assert 0.4 < one < five - 0.1 and five < fifty - 0.05
  assert np.isnan(run(data, draws=1)[1])


def test_a_rare_class_is_named():
  x, y, *test = digits()
  keep = (y != 7) | (np.cumsum(y == 7) <= 2)
  with pytest.raises(UserError, match=r"shots=3.* 2 of class 7; take"):
    run((x[keep], y[keep], *test))
  assert run((x[keep], y[keep], *test), shots=2)[0] > 0.4  # As many as shots.
  with pytest.raises(UserError, match="the 0 of class 10"):
    run((x, y, *test), num_classes=11)
