import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import sparse

from umae_jax import config as config_lib
from umae_jax import sharding
from umae_jax.analysis import guarantees, mask_graph
from umae_jax.data import arrays
from umae_jax.models import patches as patches_lib
from umae_jax.tasks import inputs, pretrain

many = hypothesis.settings(max_examples=300, deadline=None)


def units(rng, n, k=3):
  x = rng.normal(size=(n, k))
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def random_world(seed, views=8, targets=6):
  """A joint distribution, unit outputs, targets, re-encoded targets.

  Of all degrees of training: from random outputs to the best there are.
  """
  rng = np.random.default_rng(seed)
  m = rng.random((views, targets)) ** rng.integers(1, 12)
  joint = sparse.csr_array(m / m.sum())
  x2 = units(rng, targets)
  best = joint @ x2 / joint.sum(1)[:, None]
  noise = 10 ** rng.uniform(-4, 2)
  outputs = best + noise * units(rng, views)
  outputs /= np.linalg.norm(outputs, axis=1, keepdims=True)
  reencoded = x2 + 10 ** rng.uniform(-4, 1) * units(rng, targets)
  reencoded /= np.linalg.norm(reencoded, axis=1, keepdims=True)
  return joint, outputs, x2, reencoded


@many
@hypothesis.given(st.integers(0, 2**32), st.floats(0.01, 10))
def test_bounds_hold_in_random_worlds(seed, weight):
  joint, outputs, targets, reencoded = random_world(seed)
  found = [guarantees.asymmetric_bound(joint, outputs, targets, reencoded)]
  eigenvalues = mask_graph.spectrum(joint).eigenvalues
  for sharp in (False, True):
    c = 1.0 if sharp else 0.5
    world = (joint, outputs, targets)
    alignment = guarantees.alignment_bound(*world, sharp=sharp)
    spectral = guarantees.spectral_bound(*world, weight, sharp=sharp)
    found += [alignment, spectral]
    # As docs/theory.md has them, term by term.
    agreement = mask_graph.agreement(joint, outputs)
    assert alignment.bound == pytest.approx(c - c * agreement)
    uniformity = mask_graph.uniformity(joint, outputs)
    want = c - c * agreement + weight * uniformity
    assert spectral.bound == pytest.approx(want)
    assert spectral.loss == pytest.approx(alignment.loss + weight * uniformity)
    least = c - c**2 / (4 * weight) * np.square(eigenvalues[:3]).sum()
    assert spectral.bound >= least - 1e-9
  for bound in found:
    assert bound.slack >= -1e-9


def test_no_constant_of_the_asymmetric_bound_can_be_larger():
  """A target half-way between the output and h_g: equality to 4th order."""
  t = 1e-2
  joint = sparse.csr_array(np.ones((1, 1)))
  output, target, reencoded = (
    np.array([[np.cos(angle), np.sin(angle)]]) for angle in (t, 0, -t)
  )
  bound = guarantees.asymmetric_bound(joint, output, target, reencoded)
  assert bound.loss == pytest.approx(2 - 2 * np.cos(t))
  assert 0 <= bound.slack < 1e-3 * bound.loss


def test_alignment_bound_of_two_views_about_a_target():
  """Outputs at +t and -t: E h.h+ = (1 + cos 2t) / 2."""
  t = 1e-2
  joint = sparse.csr_array([[0.5], [0.5]])
  outputs = np.array([[np.cos(t), np.sin(t)], [np.cos(t), -np.sin(t)]])
  targets = np.array([[1.0, 0.0]])
  agreement = (1 + np.cos(2 * t)) / 2
  plain = guarantees.alignment_bound(joint, outputs, targets)
  assert plain.bound == pytest.approx(0.5 - 0.5 * agreement)
  sharp = guarantees.alignment_bound(joint, outputs, targets, sharp=True)
  assert sharp.bound == pytest.approx(1 - agreement)
  assert 0 <= sharp.slack < 1e-3 * sharp.loss  # No constant can be larger.


def test_spectral_bound_is_attained_at_the_best_features():
  """Views that each share a target with one other: eigenvalues 1, four times.

  h = axis i for pair i gives E h.h+ = 1, uniformity 1/4; the best scale of
  h has weight = c: s^2 = 2, and loss 0 + weight / 4 meets the last bound.
  """
  joint = sparse.csr_array(np.repeat(np.eye(4), 2, axis=0) / 8)
  outputs = np.repeat(np.eye(4), 2, axis=0)
  weight = 2.0  # s^2 h.h' is the optimum, D^-1 = 4 on each pair.
  bound = guarantees.spectral_bound(
    joint, outputs, np.eye(4), weight, sharp=True
  )
  eigenvalues = mask_graph.spectrum(joint).eigenvalues
  np.testing.assert_allclose(eigenvalues, 1)
  assert bound.loss == pytest.approx(weight / 4)
  assert bound.slack == pytest.approx(0, abs=1e-12)
  assert bound.bound == pytest.approx(1 - 1 / (4 * weight) * 4)


def random_images(seed):
  """A world of few images in clusters, with labels that mostly follow them."""
  rng = np.random.default_rng(seed)
  classes, per = rng.integers(2, 4), 5
  labels = np.repeat(np.arange(classes), per)
  patches = rng.integers(0, 2, (classes, 6))[labels]
  flips = rng.random(patches.shape) < rng.choice([0, 0.05, 0.2])
  patches = (patches ^ flips)[..., None]
  noisy = rng.random(len(labels)) < rng.choice([0, 0.1])
  labels = np.where(noisy, rng.integers(0, classes, len(labels)), labels)
  masks = mask_graph.draw_masks(rng, 4, 6, rng.integers(1, 6))
  targets = mask_graph.TARGETS[rng.integers(2)]
  return mask_graph.from_images(patches, masks, targets=targets), labels


@many
@hypothesis.given(st.integers(0, 2**32), st.integers(1, 12))
@hypothesis.example(93508, 11)  # Its error of images is 0 but for rounding.
def test_classifier_keeps_the_guarantee(seed, k):
  graph, labels = random_images(seed)
  found = mask_graph.spectrum(graph.joint)
  got = guarantees.guarantee(graph, found, labels, k)
  assert got.view_error <= got.view_bound + 1e-9
  assert got.image_error <= got.view_error + got.labelling_error + 1e-9
  alpha, beta = got.labelling_error, got.target_labelling_error
  assert got.disagreement <= 2 * (alpha + beta) + 1e-9
  assert 0 <= alpha < 1
  assert 0 <= got.image_error <= 1


def test_the_guarantee_is_not_always_vacuous():
  """Of a hundred worlds some bounds are below 1, and errors above 0."""
  found = []
  for seed in range(100):
    graph, labels = random_images(seed)
    spectrum = mask_graph.spectrum(graph.joint)
    found.append(guarantees.guarantee(graph, spectrum, labels, 8))
  useful = [x for x in found if 0 < x.view_bound < 1]
  assert len(useful) > 5
  assert any(x.view_error > 0 for x in found)


def four_views():
  """Two targets; view 2 says little of its label, and sees both targets.

  M * 10 = [[3, 0], [1, 0], [1, 1], [0, 4]], labels 0, 0, 0 or 1, 1.
  """
  joint = sparse.csr_array(np.array([[3, 0], [1, 0], [1, 1], [0, 4]]) / 10)
  views = sparse.csr_array(
    np.array([[3, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 4]]) / 10
  )
  targets = sparse.csr_array(np.array([[3, 0], [1, 0], [1, 0], [0, 5]]) / 10)
  return mask_graph.MaskGraph(joint, views, targets), np.array([0, 0, 0, 1])


def test_labelling_errors_by_hand():
  """alpha: view 2 is of both classes, .1 each; beta: each target is of one.

  phi, guesses 0 0 0 1: only target 1 is shared by unlike ones, with
  probabilities .1 and .4 of .5: 2 * .1 * .4 / .5 = .16 <= 2 (alpha + beta).
  """
  graph, labels = four_views()
  found = mask_graph.spectrum(graph.joint)
  got = guarantees.guarantee(graph, found, labels, 2)
  assert got.labelling_error == pytest.approx(0.1)
  assert got.target_labelling_error == pytest.approx(0)
  assert got.disagreement == pytest.approx(0.16)
  assert got.next_eigenvalue == 0
  assert got.view_bound == pytest.approx(0.32)
  one = guarantees.guarantee(graph, found, labels, 1)
  # One constant feature: the answer is 0 everywhere, of probability .6.
  assert one.view_error == pytest.approx(0.4)
  assert one.image_error == pytest.approx(0.5)
  assert one.next_eigenvalue == pytest.approx(found.eigenvalues[1])
  want = 0.32 / (1 - found.eigenvalues[1])
  assert one.view_bound == pytest.approx(want)
  assert one.image_bound == pytest.approx(want + 0.1)


def test_disagreement_reaches_twice_the_labelling_errors_to_first_order():
  """A target of which a share e is of views of the other class: 2 e (1 - e)."""
  e = 1e-3
  joint = sparse.csr_array([[1 - e], [e]])
  graph = mask_graph.MaskGraph(
    joint, sparse.csr_array(np.diag([1 - e, e])), joint
  )
  got = guarantees.guarantee(
    graph, mask_graph.spectrum(joint), np.array([0, 1]), 1
  )
  assert got.disagreement == pytest.approx(2 * e * (1 - e))
  total = got.labelling_error + got.target_labelling_error
  assert got.disagreement == pytest.approx(2 * total, rel=2 * e)


def test_residual_by_hand():
  assert guarantees.residual(np.array([1, 0.5, 0.2]), 1) == pytest.approx(0.29)


def test_predictions_of_a_model_make_a_world():
  """Two images, two masks, three patches; one patch is zero, so left out."""
  rng = np.random.default_rng(0)
  targets = rng.normal(size=(2, 3, 4))
  targets[1, 2] = 0
  predictions = rng.normal(size=(2, 2, 3, 4))
  removed = np.array([[[1, 1, 0], [1, 0, 1]], [[0, 1, 1], [0, 1, 1]]], bool)
  world = guarantees.of_predictions(predictions, removed, targets)
  assert world.joint.shape == (
    6,
    4,
  )  # Patches 0, 1, 2 and 1, once 0 and 1 twice.
  loss, count, pairs = 0.0, 0, {}
  for i, m, j in zip(*np.nonzero(removed)):
    if (i, j) == (1, 2):
      continue
    h = predictions[i, m, j] / np.linalg.norm(predictions[i, m, j])
    x = targets[i, j] / np.linalg.norm(targets[i, j])
    loss, count = loss + np.square(h - x).sum(), count + 1
    pairs.setdefault((i, j), []).append((h @ x, h))
  bound = guarantees.alignment_bound(
    world.joint, world.outputs, world.targets, sharp=True
  )
  assert bound.loss == pytest.approx(loss / count)
  agreement = sum(
    h @ other / len(hs)
    for hs in pairs.values()
    for _, h in hs
    for _, other in hs
  )
  assert bound.bound == pytest.approx(1 - agreement / count)
  nearest = [max(hs, key=lambda x: x[0])[1] for _, hs in sorted(pairs.items())]
  np.testing.assert_allclose(world.reencoded, nearest)


@pytest.fixture(scope="module")
def trained(load_config):
  """(model, images, parameters at the start, and after 60 steps) of digits."""
  config = load_config("digits")
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  source = arrays.open_digits("train")
  plan = config_lib.plan(config, source.num_examples)
  task = pretrain.make(config, plan, mesh, source, source)
  images = source.load()[:100]
  optimizer = optax.adam(3e-3)

  @jax.jit
  def step(params, state, key):
    batch = task.objective.randomize(key, {"image": jnp.asarray(images)})
    gradient, _ = jax.grad(task.objective.loss, has_aux=True)(
      params, batch, None
    )
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state

  first = params = jax.jit(task.init)(jax.random.key(0))
  state = optimizer.init(params)
  for number in range(60):
    params, state = step(params, state, jax.random.key(number))
  x = inputs.normalize(jnp.asarray(images), config.data.mean, config.data.std)
  return pretrain.make_model(config, mesh), x, first, params


def test_bounds_hold_for_a_trained_model(trained):
  model, images, first, params = trained
  count, masks = 50, 6
  x = images[:count]
  targets = np.asarray(patches_lib.patchify(x, model.patch_size))
  noise = jax.random.uniform(jax.random.key(7), (masks, count, 16))
  losses = []
  for parameters in (first, params):
    outs = [
      model.apply({"params": parameters}, x, mask, mask_ratio=0.5)
      for mask in noise
    ]
    predictions = np.stack([out.prediction for out in outs], axis=1)
    removed = np.stack([out.mask for out in outs], axis=1) > 0
    world = guarantees.of_predictions(predictions, removed, targets)
    assert world.joint.shape[0] == removed.sum()
    bounds = [guarantees.asymmetric_bound(*world)]
    for sharp in (False, True):
      bounds.append(guarantees.alignment_bound(*world[:3], sharp=sharp))
      for weight in (0.01, 1.0):
        spectral = guarantees.spectral_bound(*world[:3], weight, sharp=sharp)
        bounds.append(spectral)
    assert all(bound.slack >= -1e-9 for bound in bounds)
    losses.append(bounds[0].loss)
  assert losses[1] < 0.5 * losses[0]  # It did learn.
