import numpy as np
import pytest

from umae_jax import losses
from umae_jax.analysis import spectrum


def random_features(n, d, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, d)) * rng.uniform(0.1, 10, (n, 1)) + 0.5


@pytest.mark.parametrize("n, d", [(50, 8), (8, 50), (1, 4)])
def test_squares_are_the_eigenvalues_of_the_gram_matrix(n, d):
  x = random_features(n, d)
  s = spectrum.singular_values(x)
  assert s.shape == (min(n, d),)
  assert (np.diff(s) <= 0).all()
  z = np.stack([row / np.linalg.norm(row) for row in x])
  want = np.linalg.eigvalsh(z @ z.T)[::-1][: min(n, d)]
  np.testing.assert_allclose(s**2, want, atol=1e-10)
  np.testing.assert_allclose((s**2).sum(), n)


def test_centring_removes_the_mean_of_the_scaled_rows():
  x = random_features(40, 6)
  z = x / np.linalg.norm(x, axis=1, keepdims=True)
  want = np.linalg.eigvalsh(np.cov(z.T, ddof=0) * 40)[::-1]
  s = spectrum.singular_values(x, center=True)
  np.testing.assert_allclose(s**2, want, atol=1e-10)


def test_zero_rows_stay_zero():
  x = np.array([[0.0, 0.0], [3.0, 4.0]])
  np.testing.assert_allclose(spectrum.singular_values(x), [1.0, 0.0])


@pytest.mark.parametrize(
  "s, rank, ratio, stable",
  [
    ([3.0, 3.0, 3.0, 3.0], 4.0, 4.0, 4.0),
    ([5.0, 0.0, 0.0], 1.0, 1.0, 1.0),
    # p = 2/3, 1/3: exp(H) = 3 / 2^(2/3); squares 4, 1: 25 / 17, 5 / 4.
    ([2.0, 1.0], 3 / 2 ** (2 / 3), 25 / 17, 1.25),
    ([0.0, 0.0], 0.0, 0.0, 0.0),
  ],
)
def test_known_ranks(s, rank, ratio, stable):
  assert spectrum.effective_rank(s) == pytest.approx(rank)
  assert spectrum.participation_ratio(s) == pytest.approx(ratio)
  assert spectrum.stable_rank(s) == pytest.approx(stable)


def with_spectrum(s, n=40, d=10, seed=0):
  """(n, d) features of given singular values, and random singular vectors."""
  rng = np.random.default_rng(seed)
  left, right = (np.linalg.qr(rng.normal(size=(k, k)))[0] for k in (n, d))
  return left[:, : len(s)] * s @ right[: len(s)]


def test_ranks_of_features_of_a_geometric_spectrum():
  """s_i = 2^-i, i < 10: p_i = s_i / S, S = 2 - 2^-9; entropy in closed form."""
  i = np.arange(10)
  total = 2 - 2.0**-9
  entropy = np.log(total) + np.log(2) * (i * 2.0**-i).sum() / total
  x = with_spectrum(2.0**-i)
  assert spectrum.rankme(x) == pytest.approx(np.exp(entropy), rel=1e-4)
  assert spectrum.rankme(100 * x) == pytest.approx(spectrum.rankme(x))
  # Sums of 4^-i and 16^-i.
  square, fourth = (4 - 4.0**-9) / 3, (16 - 16.0**-9) / 15
  s = spectrum.of_moment(x.T @ x / len(x))
  assert spectrum.effective_rank(s) == pytest.approx(np.exp(entropy))
  assert spectrum.stable_rank(s) == pytest.approx(square)
  assert spectrum.participation_ratio(s) == pytest.approx(square**2 / fourth)


def test_rankme_keeps_the_lengths_of_the_rows():
  """Two orthogonal rows of lengths 2 and 1 have a spectrum of 2 and 1."""
  x = np.diag([2.0, 1.0])
  assert spectrum.rankme(x) == pytest.approx(3 / 2 ** (2 / 3), rel=1e-5)
  equal = spectrum.effective_rank(spectrum.singular_values(x))
  assert equal == pytest.approx(2)
  assert spectrum.rankme(np.zeros((3, 2))) == pytest.approx(1, abs=1e-4)


def test_a_moment_has_the_spectrum_of_its_rows():
  x = random_features(64, 16).astype(np.float32)
  want = spectrum.singular_values(x) / np.sqrt(64)
  got = spectrum.of_moment(np.asarray(losses.second_moment(x)))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_ranks_lie_between_one_and_the_number_of_values(seed):
  s = spectrum.singular_values(random_features(20, 9, seed))
  rank, ratio = spectrum.effective_rank(s), spectrum.participation_ratio(s)
  assert 1 < ratio < rank < 9


def test_participation_ratio_is_the_inverse_of_the_uniformity_loss():
  x = random_features(64, 16).astype(np.float32)
  ratio = spectrum.participation_ratio(spectrum.singular_values(x))
  loss = float(losses.uniformity_loss(x))
  np.testing.assert_allclose(ratio, 1 / loss, rtol=1e-5)
