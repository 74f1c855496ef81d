"""Linear softmax probes on cached features, many hyper-parameters at once."""

from collections.abc import Iterator, Mapping, Sequence
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from umae_jax import UserError, optimizers
from umae_jax.evals import classification


class Probes(NamedTuple):
  """G linear classifiers: kernel (G, D, classes) and bias (G, classes)."""

  kernel: jax.Array
  bias: jax.Array

  def scores(self, features: np.ndarray) -> Iterator[np.ndarray]:
    """(M, D) to G times (M, classes) float32, one probe at a time."""
    x = np.asarray(features, np.float32)
    for kernel, bias in zip(np.asarray(self.kernel), np.asarray(self.bias)):
      yield x @ kernel + bias


class FastProbe(NamedTuple):
  """What `fast_probe` finds.

  Attributes:
    scores: (M, classes) float32, of the test examples.
    learning_rate: the chosen one, per 256 images.
    weight_decay: the chosen one.
    held_out_accuracy: (G,), of every pair, in [0, 1].
  """

  scores: np.ndarray
  learning_rate: float
  weight_decay: float
  held_out_accuracy: np.ndarray


class Row(NamedTuple):
  """A recipe, and the test accuracy that it gives, in [0, 1]."""

  feature: str
  normalization: str
  epochs: int
  batch_size: int
  learning_rate: float
  accuracy: float


@functools.partial(
  jax.jit, static_argnames=("num_classes", "epochs", "batch_size", "warmup")
)
def train_probes(
  features: np.ndarray,
  labels: np.ndarray,
  *,
  learning_rates: Sequence[float],
  weight_decays: Sequence[float],
  num_classes: int,
  epochs: int,
  batch_size: int,
  seed: int,
  warmup: float = 0.1,
) -> Probes:
  """Trains G softmax classifiers, from zero, on the same batches.

  The optimiser is SGD with momentum 0.9, linear warm-up, and a cosine to 0.
  Each epoch is another random order of all rows, without the last partial
  batch. The features are on the device once, not G times; a step needs
  G * batch_size * num_classes logits.

  Args:
    features: (N, D), taken as they are.
    labels: (N,) int, in [0, num_classes).
    learning_rates: (G,), peaks per 256 images: times batch_size / 256.
    weight_decays: (G,), times the kernel added to its gradient; the bias is
      not decayed.
    num_classes: number of classes.
    epochs: passes over the features.
    batch_size: B; N where N is smaller.
    seed: of the order.
    warmup: fraction of the steps.

  Returns:
    Probes, the i-th of (learning_rates[i], weight_decays[i]). One that
    diverged holds NaN or infinity.
  """
  batch_size = min(batch_size, len(features))
  per_epoch = len(features) // batch_size
  total = epochs * per_epoch
  schedule = optimizers.warmup_cosine(
    batch_size / 256, warmup_steps=round(warmup * total), total_steps=total
  )
  rates, decays = jnp.asarray(learning_rates), jnp.asarray(weight_decays)
  features, labels = jnp.asarray(features, jnp.float32), jnp.asarray(labels)
  shape = len(rates), features.shape[1], num_classes
  probes = Probes(jnp.zeros(shape), jnp.zeros(shape[::2]))

  @jax.grad
  def gradient(probe, weight_decay, x, y):
    logits = jnp.matmul(x, probe.kernel, precision="highest")
    logits += probe.bias[None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses.mean() + weight_decay / 2 * jnp.sum(probe.kernel**2)

  def one_step(carry, step_and_rows):
    step, rows = step_and_rows
    probes, trace = carry
    found = jax.vmap(gradient, (0, 0, None, None))(
      probes, decays, features[rows], labels[rows]
    )
    trace = jax.tree.map(lambda t, g: 0.9 * t + g, trace, found)
    rate = schedule(step) * rates
    probes = jax.vmap(optax.tree.add_scale)(probes, -rate, trace)
    return (probes, trace), None

  def epoch(carry, number):
    order = jax.random.fold_in(jax.random.key(seed), number)
    order = jax.random.permutation(order, len(features))
    rows = order[: per_epoch * batch_size].reshape(per_epoch, batch_size)
    steps = number * per_epoch + jnp.arange(per_epoch)
    return jax.lax.scan(one_step, carry, (steps, rows))[0], None

  start = probes, jax.tree.map(jnp.zeros_like, probes)
  return jax.lax.scan(epoch, start, jnp.arange(epochs))[0][0]


def fast_probe(
  train_features: np.ndarray,
  train_labels: np.ndarray,
  test_features: np.ndarray,
  *,
  learning_rates: Sequence[float],
  weight_decays: Sequence[float],
  num_classes: int,
  epochs: int,
  batch_size: int,
  seed: int,
  held_out: float = 0.1,
  normalization: str = "standardize",
) -> FastProbe:
  """The best pair of hyper-parameters on held-out rows, refitted on all.

  Args:
    train_features: (N, D).
    train_labels: (N,) int, in [0, num_classes).
    test_features: (M, D). Test labels are not needed, so they have no say.
    learning_rates: (G,), see `train_probes`.
    weight_decays: (G,); pair i is (learning_rates[i], weight_decays[i]), and
      of equally good pairs the first is chosen.
    num_classes: number of classes.
    epochs: of each fit.
    batch_size: B; the number of rows where that is smaller.
    seed: of the held-out rows and of the order.
    held_out: fraction of the training rows, in (0, 1).
    normalization: see `normalize`.

  Raises:
    UserError: fewer than ten training examples, or every probe diverged.
  """
  x, y = np.asarray(train_features), np.asarray(train_labels)
  if len(x) < 10:
    raise UserError(
      f"{len(x)} training images are too few to hold some out; give ten or "
      "more (config.evaluation.train_images, config.data.train_split)."
    )
  out = np.zeros(len(x), bool)
  order = np.random.default_rng(seed).permutation(len(x))
  out[order[: max(1, round(held_out * len(x)))]] = True
  train = functools.partial(
    train_probes,
    num_classes=num_classes,
    epochs=epochs,
    batch_size=batch_size,
    seed=seed,
  )
  fitted, judged = normalize(x[~out], x[out], normalization)
  probes = train(
    fitted, y[~out], learning_rates=learning_rates, weight_decays=weight_decays
  )
  accuracy = np.array(
    [classification.top_k_accuracy(s, y[out], 1) for s in probes.scores(judged)]
  )
  best = int(accuracy.argmax())
  pair = learning_rates[best], weight_decays[best]
  x, x_test = normalize(x, test_features, normalization)
  probe = train(x, y, learning_rates=pair[:1], weight_decays=pair[1:])
  (scores,) = probe.scores(x_test)
  if not np.isfinite(scores).all():
    raise UserError(
      f"the linear probe diverged, also with the best pair on held-out images "
      f"(learning rate, weight decay)={pair}; give smaller "
      "config.probe.learning_rates or weight_decays."
    )
  return FastProbe(scores, *map(float, pair), accuracy)


def normalize(
  train: np.ndarray, test: np.ndarray, kind: str
) -> tuple[np.ndarray, np.ndarray]:
  """Brings (N, D) and (M, D) features to a common scale, float32.

  Args:
    train: (N, D).
    test: (M, D).
    kind: "standardize": by the mean and deviation of `train` (constant
      features are only centred); "l2": rows of length 1; "none".

  Raises:
    ValueError: another kind.
  """
  train, test = (np.asarray(x, np.float32) for x in (train, test))
  if kind == "standardize":
    mean, deviation = (f(train, 0, np.float64) for f in (np.mean, np.std))
    deviation[deviation <= 1e-6 * (1e-6 + np.abs(mean))] = 1
    return tuple(np.float32((x - mean) / deviation) for x in (train, test))
  if kind == "l2":
    return tuple(
      x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
      for x in (train, test)
    )
  if kind == "none":
    return train, test
  raise ValueError(
    f"normalization={kind!r} is not one of 'standardize', 'l2', 'none'."
  )


def sweep(
  features: Mapping[str, tuple[np.ndarray, np.ndarray]],
  train_labels: np.ndarray,
  test_labels: np.ndarray,
  *,
  normalizations: Sequence[str],
  epochs: Sequence[int],
  batch_sizes: Sequence[int],
  learning_rates: Sequence[float],
  num_classes: int,
  seed: int,
  weight_decay: float = 0.0,
) -> list[Row]:
  """Test accuracy of every recipe, to see how much a recipe decides.

  The best row is chosen by test labels, hence no result to report: for that,
  use `fast_probe`.

  Args:
    features: {name, such as "cls" or "mean": (train (N, D), test (M, D))}.
    train_labels: (N,) int, in [0, num_classes).
    test_labels: (M,) int.
    normalizations: of `normalize`.
    epochs: each a number of passes.
    batch_sizes: each clipped to N, and then tried once.
    learning_rates: per 256 images; trained side by side.
    num_classes: number of classes.
    seed: of the order.
    weight_decay: of all.

  Returns:
    The whole product, the last argument running fastest.
  """
  batch_sizes = dict.fromkeys(min(b, len(train_labels)) for b in batch_sizes)
  rows = []
  for name, kind in itertools.product(features, normalizations):
    train, test = normalize(*features[name], kind)
    for length, batch_size in itertools.product(epochs, batch_sizes):
      probes = train_probes(
        train,
        train_labels,
        learning_rates=learning_rates,
        weight_decays=[weight_decay] * len(learning_rates),
        num_classes=num_classes,
        epochs=length,
        batch_size=batch_size,
        seed=seed,
      )
      for rate, scores in zip(learning_rates, probes.scores(test)):
        accuracy = classification.top_k_accuracy(scores, test_labels, 1)
        rows.append(Row(name, kind, length, batch_size, rate, accuracy))
  return rows
