import tracemalloc

import numpy as np
import pytest

from umae_jax.analysis import similarity

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(40, 6)) ** 3 + 1, RNG.normal(size=(40, 9))
Y[:, :6] += 0.2 * X


@pytest.mark.parametrize("debiased", [False, True])
def test_rotation_scale_and_shift_change_nothing(debiased):
  def cka(x, y):
    return similarity.linear_cka(x, y, debiased=debiased)

  rotation = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
  want = cka(X, Y)
  assert 0.1 < want < 0.9
  assert cka(Y, X) == pytest.approx(want)
  assert cka(-3 * X @ rotation + 5, Y) == pytest.approx(want)
  assert cka(X, X @ rotation) == pytest.approx(1)
  stretched = X * [5, 1, 1, 1, 1, 1]  # What no rotation undoes.
  assert abs(cka(stretched, Y) - want) > 0.01


def test_a_value_by_hand():
  """Centred x: -1, 0, 1 and y: 1, -2, 1 and both: 0, 1, 1 / (1, sqrt 2)."""
  x, y = np.array([[1.0], [2], [3]]), np.array([[4.0], [1], [4]])
  assert similarity.linear_cka(x, y) == pytest.approx(0)
  both = np.concatenate([x, y], axis=1)  # 2^2 / (2 sqrt(2^2 + 6^2)).
  assert similarity.linear_cka(x, both) == pytest.approx(4 / (2 * 40**0.5))


def test_debiased_is_the_unbiased_estimate_of_n_by_n_matrices():
  """Song et al. 2012, theorem 3, as it is written there."""

  def hsic(x, y):
    n = len(x)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    value = np.trace(k @ l) + k.sum() * l.sum() / (n - 1) / (n - 2)
    return value - 2 / (n - 2) * (k @ l).sum()

  want = hsic(X, Y) / np.sqrt(hsic(X, X) * hsic(Y, Y))
  got = similarity.linear_cka(X, Y, debiased=True)
  assert got == pytest.approx(want)


def test_unrelated_representations_are_alike_by_chance_unless_debiased():
  x, y = (RNG.normal(size=(200, 100)) for _ in range(2))
  assert similarity.linear_cka(x, y) == pytest.approx(100 / 300, abs=0.03)
  assert abs(similarity.linear_cka(x, y, debiased=True)) < 0.03


def test_a_constant_representation_is_like_none():
  assert similarity.linear_cka(X, np.ones((40, 3))) == 0


def test_the_matrix_holds_every_pair():
  matrix = similarity.cka_matrix([X, Y, X + Y[:, :6]])
  assert matrix.shape == (3, 3)
  np.testing.assert_array_equal(matrix, matrix.T)
  np.testing.assert_allclose(np.diag(matrix), 1)
  assert matrix[0, 1] == pytest.approx(similarity.linear_cka(X, Y))


def test_memory_is_linear_in_the_number_of_examples():
  x = RNG.normal(size=(20_000, 8))
  tracemalloc.start()
  similarity.linear_cka(x, x[:, ::-1], debiased=True)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 8 * x.nbytes  # N x N would be 2,500 times.


def test_unit_rows():
  got = similarity.unit(np.array([[3.0, 4.0], [0.0, 0.0]]))
  np.testing.assert_allclose(got, [[0.6, 0.8], [0, 0]])


@pytest.mark.parametrize("normalize", [False, True])
def test_partners_are_the_nearest_that_remove_the_place(normalize):
  n, places, values = 60, 4, 12
  patches = RNG.integers(0, 256, (n, places, values), dtype=np.uint8)
  noise, removed = RNG.random((n, places)), RNG.random((n, places)) < 0.5
  got = similarity.sharing_pairs(patches, noise, removed, normalize=normalize)
  x = patches.astype(np.float64) / 255
  if normalize:
    x = x - x.mean(-1, keepdims=True)
    x /= np.sqrt(x.var(-1, ddof=1, keepdims=True) + 1e-6)
  for i in range(n):
    place = noise[i].argmax()
    distance = [
      np.square(x[i, place] - x[j, place]).sum()
      if removed[j, place] and j != i
      else np.inf
      for j in range(n)
    ]
    assert got[i] == np.argmin(distance)


def test_of_equal_patches_any_is_taken_and_never_the_image_itself():
  patches, noise = np.zeros((50, 1, 4), np.uint8), RNG.random((50, 1))
  got = similarity.sharing_pairs(
    patches, noise, np.ones((50, 1)), normalize=False
  )
  assert (got != np.arange(50)).all()
  assert set(got) <= set(range(50))
  alone = np.eye(50, 1)  # Only the first removes it.
  got = similarity.sharing_pairs(patches, noise, alone, normalize=False)
  np.testing.assert_array_equal(got, -1)


def test_ties_do_not_all_go_to_one_image():
  rng = np.random.default_rng(1)
  patches, noise = np.zeros((200, 8, 4), np.uint8), rng.random((200, 8))
  got = similarity.sharing_pairs(
    patches, noise, rng.random((200, 8)) < 0.5, normalize=False
  )
  assert len(set(got)) > 100


def test_nearest_are_those_of_the_largest_cosine_and_never_itself():
  """Angles of 0, 10, 25, 180 and 12 degrees, of any length."""
  angles, lengths = np.radians([0, 10, 25, 180, 12]), [3, 0.1, 1, 5, 2]
  x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
  x *= np.array(lengths)[:, None]
  found = similarity.nearest(x, [1, 3], 3)
  np.testing.assert_array_equal(found, [[4, 0, 2], [2, 4, 1]])


def test_of_equal_features_an_example_is_still_not_its_own_neighbour():
  found = similarity.nearest(np.ones((4, 2)), range(4), 3)
  assert [sorted(row) for row in found.tolist()] == [
    [j for j in range(4) if j != i] for i in range(4)
  ]
