import itertools

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
from scipy import sparse

from umae_jax import UserError
from umae_jax.analysis import mask_graph

many = hypothesis.settings(max_examples=300, deadline=None)


def random_joint(rng, views=7, targets=5, share=0.5):
  """(V, U) sparse, the sum 1, no empty row or column."""
  m = rng.random((views, targets)) * (rng.random((views, targets)) < share)
  m[np.arange(views), rng.integers(0, targets, views)] += 0.1
  m[rng.integers(0, views, targets), np.arange(targets)] += 0.1
  return sparse.csr_array(m / m.sum())


def pairs_by_hand(m):
  """(V, V): P(x1, x1+), summed target by target."""
  pairs = np.zeros((len(m), len(m)))
  for column in m.T:
    pairs += column.sum() * np.outer(column, column) / column.sum() ** 2
  return pairs


@many
@hypothesis.given(st.integers(0, 2**32), st.integers(2, 9), st.integers(2, 9))
def test_losses_are_the_expectations_over_pairs(seed, views, targets):
  rng = np.random.default_rng(seed)
  joint = random_joint(rng, views, targets)
  m = joint.toarray()
  d1, pairs = m.sum(1), pairs_by_hand(m)
  f, g = rng.normal(size=(views, 3)), rng.normal(size=(targets, 3))
  similar = f @ f.T
  agreement = (pairs * similar).sum()
  uniformity = (np.outer(d1, d1) * similar**2).sum()
  np.testing.assert_allclose(mask_graph.agreement(joint, f), agreement)
  np.testing.assert_allclose(mask_graph.uniformity(joint, f), uniformity)
  loss = mask_graph.spectral_loss(joint, f)
  np.testing.assert_allclose(loss, uniformity - 2 * agreement, atol=1e-12)
  distances = np.square(f[:, None] - g).sum(-1)
  np.testing.assert_allclose(
    mask_graph.reconstruction_loss(joint, f, g), (m * distances).sum()
  )


@many
@hypothesis.given(st.integers(0, 2**32), st.integers(2, 9), st.integers(2, 9))
def test_spectral_loss_is_a_factorisation(seed, views, targets):
  """|A A^T - F F^T|_F^2 - |A A^T|_F^2, and |F^T F|_F^2 the uniformity."""
  rng = np.random.default_rng(seed)
  joint = random_joint(rng, views, targets)
  f = rng.normal(size=(views, 3))
  d1 = joint.sum(1)
  big = np.sqrt(d1)[:, None] * f
  a = joint.toarray() / np.sqrt(np.outer(d1, joint.sum(0)))
  aat = a @ a.T
  want = np.square(aat - big @ big.T).sum() - np.square(aat).sum()
  loss = mask_graph.spectral_loss(joint, f)
  np.testing.assert_allclose(loss, want, atol=1e-10)
  np.testing.assert_allclose(
    mask_graph.uniformity(joint, f), np.square(big.T @ big).sum()
  )


@many
@hypothesis.given(
  st.integers(0, 2**32),
  st.integers(2, 9),
  st.integers(2, 9),
  st.integers(1, 4),
)
def test_top_eigenvectors_minimise_the_spectral_loss(seed, views, targets, k):
  rng = np.random.default_rng(seed)
  joint = random_joint(rng, views, targets)
  found = mask_graph.spectrum(joint)
  values = found.eigenvalues
  assert values[0] == pytest.approx(1)
  assert ((values >= 0) & (values <= 1)).all()
  assert (np.diff(values) <= 1e-12).all()
  assert len(values) == min(views, targets)
  a = joint.toarray() / np.sqrt(np.outer(joint.sum(1), joint.sum(0)))
  np.testing.assert_allclose(
    values, np.linalg.svd(a, compute_uv=False) ** 2, atol=1e-10
  )
  u = found.vectors
  np.testing.assert_allclose(u.T @ u, np.eye(u.shape[1]), atol=1e-6)
  np.testing.assert_allclose(
    a @ (a.T @ u), u * values[: u.shape[1]], atol=1e-10
  )
  minimum = -np.square(values[:k]).sum()
  best = mask_graph.features(joint, found, k)
  loss = mask_graph.spectral_loss
  np.testing.assert_allclose(loss(joint, best), minimum, atol=1e-8)
  for other in (
    rng.normal(size=(views, k)),
    best + 0.1 * rng.normal(size=best.shape),
  ):
    assert loss(joint, other) >= minimum - 1e-9


def test_an_empty_view_and_target_change_nothing():
  joint = random_joint(np.random.default_rng(0))
  m = np.zeros((9, 6))
  m[1:8, :5] = joint.toarray()
  padded = mask_graph.spectrum(sparse.csr_array(m))
  plain = mask_graph.spectrum(joint)
  np.testing.assert_allclose(padded.eigenvalues[:5], plain.eigenvalues)
  features = mask_graph.features(sparse.csr_array(m), padded, 3)
  assert (features[[0, 8]] == 0).all()


def by_hand(patches, removed, targets, prior):
  """{(view, target): probability}, and those of (image, view)."""
  joint, views = {}, {}
  for x, mask in itertools.product(range(len(patches)), removed):
    view = tuple((i, *v) for i, v in enumerate(patches[x]) if not mask[i])
    hidden = [(i, *v) for i, v in enumerate(patches[x]) if mask[i]]
    hidden = hidden if targets == "patch" else [tuple(hidden)]
    for target in hidden:
      p = prior[x] / len(removed) / len(hidden)
      joint[view, target] = joint.get((view, target), 0) + p
      views[x, view] = views.get((x, view), 0) + p
  return joint, views


@pytest.mark.parametrize("targets", mask_graph.TARGETS)
@pytest.mark.parametrize("seed", range(4))
def test_a_world_of_images_is_counted_right(targets, seed):
  rng = np.random.default_rng(seed)
  patches = rng.integers(0, 2, (8, 4, 2))
  removed = mask_graph.draw_masks(rng, 5, 4, rng.integers(1, 4))
  removed = np.concatenate([removed, removed[:1]])  # One counts twice.
  prior = rng.dirichlet(np.ones(8))
  graph = mask_graph.from_images(
    patches, removed, targets=targets, probabilities=prior
  )
  joint, views = by_hand(patches, removed, targets, prior)
  rows = {view for view, _ in joint}
  assert graph.joint.shape == (len(rows), len({t for _, t in joint}))
  for found, want in ((graph.joint, joint), (graph.views, views)):
    np.testing.assert_allclose(
      np.sort(found.data), np.sort(list(want.values())), rtol=1e-12
    )
  np.testing.assert_allclose(graph.views.sum(0), graph.joint.sum(1))
  np.testing.assert_allclose(graph.targets.sum(0), graph.joint.sum(0))
  np.testing.assert_allclose(graph.views.sum(1), prior)
  np.testing.assert_allclose(graph.targets.sum(1), prior)
  # The same graph, not only the same numbers: spectra agree.
  order = sorted(rows)
  columns = sorted({t for _, t in joint}, key=str)
  m = np.zeros(graph.joint.shape)
  for (view, target), p in joint.items():
    m[order.index(view), columns.index(target)] = p
  np.testing.assert_allclose(
    mask_graph.spectrum(graph.joint).eigenvalues,
    mask_graph.spectrum(sparse.csr_array(m)).eigenvalues,
    atol=1e-12,
  )


def test_whole_complements_never_connect_two_masks():
  """As many eigenvalues of 1 as masks; patches connect them all."""
  rng = np.random.default_rng(0)
  patches = rng.integers(0, 2, (20, 4, 1))
  removed = np.eye(4, dtype=bool)  # Four masks; whole complements are patches.
  removed = ~removed  # Each leaves one patch.
  ones = {}
  for targets in mask_graph.TARGETS:
    graph = mask_graph.from_images(patches, removed, targets=targets)
    values = mask_graph.spectrum(graph.joint).eigenvalues
    ones[targets] = (values > 1 - 1e-9).sum()
  assert ones["patch"] == 1
  assert ones["complement"] >= 4


def test_masks_remove_as_many_patches_and_differ():
  masks = mask_graph.draw_masks(np.random.default_rng(0), 500, 6, 2)
  assert masks.shape == (500, 6)
  assert (masks.sum(1) == 2).all()
  counts = np.unique(masks, axis=0, return_counts=True)[1]
  assert len(counts) == 15  # 6 over 2.
  assert counts.min() > 10


@pytest.mark.parametrize(
  "removed, match",
  [
    ([[True, True]], "leave one visible"),
    ([[False, False]], "remove a patch"),
    ([[True]], r"\(1, 1\)"),
  ],
)
def test_masks_that_make_no_graph_are_refused(removed, match):
  with pytest.raises(ValueError, match=match):
    mask_graph.from_images(np.zeros((3, 2, 1), int), np.array(removed))


def test_a_graph_too_large_for_an_exact_spectrum_says_so():
  joint = sparse.eye_array(20_001, format="csr") / 20_001
  with pytest.raises(UserError, match="20001 views"):
    mask_graph.spectrum(joint)
