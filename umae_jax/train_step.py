"""One update, jitted and sharded: loss, gradient, guard, update."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from umae_jax import sharding

PyTree = Any
Scalars = dict[str, jax.Array]


class TrainState(NamedTuple):
  """All that a run must save to continue as if it had never stopped.

  Attributes:
    step: () int32, batches seen; `step - skipped` updates were applied.
    params: float32 tree.
    opt_state: Optax's.
    skipped: () int32, steps whose gradient was not finite.
    skipped_in_a_row: () int32, those since the last applied update.
  """

  step: jax.Array
  params: PyTree
  opt_state: PyTree
  skipped: jax.Array
  skipped_in_a_row: jax.Array


class Objective(NamedTuple):
  """What a task minimises, in pure functions.

  Attributes:
    randomize: (key, batch) -> batch. Draws everything random of a step, one
      row per image of the global batch, so that the draw depends neither on
      the devices nor on the micro-batches.
    statistics: (params, batch) -> tree, or None. Means over the batch in
      which the loss is not linear; accumulation averages them first.
    loss: (params, batch, statistics) -> (scalar, {name: scalar}). Statistics
      are None, or those of the whole batch of which `batch` is one part; the
      mean of the parts' gradients is then the gradient of the whole.
    prepare: (params, batch) -> batch, or None. What no gradient reaches, made
      once of each part for both of the functions above: frozen features.
    frozen: top-level keys of the parameters that are not trained: no gradient
      is taken, no optimiser state kept, no bit of them changed.
    follow: (params, statistics) -> {key: tree}, or None. New values of frozen
      keys after an update: running averages, which follow the training.
  """

  randomize: Callable[[jax.Array, PyTree], PyTree]
  statistics: Callable[[PyTree, PyTree], PyTree] | None
  loss: Callable[[PyTree, PyTree, PyTree], tuple[jax.Array, Scalars]]
  prepare: Callable[[PyTree, PyTree], PyTree] | None = None
  frozen: tuple[str, ...] = ()
  follow: Callable[[PyTree, PyTree], PyTree] | None = None


def init_state(
  init: Callable[..., PyTree],
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  mesh: Mesh,
  frozen: Sequence[str] = (),
  given: PyTree | None = None,
) -> TrainState:
  """Initial state, each array made where it will live.

  Args:
    init: key -> params, or (key, given) -> params.
    optimizer: whose state to add, for what is not frozen.
    key: the initial parameters depend on it alone, not on the mesh.
    mesh: the state is laid out by `sharding.state_sharding`.
    frozen: as in `Objective`.
    given: pretrained parameters, the same on every process: the second
      argument of `init`, unless None.
  """
  make = functools.partial(_make_state, init, optimizer, frozen)
  layout = sharding.state_sharding(jax.eval_shape(make, key, given), mesh)
  return jax.jit(make, out_shardings=layout)(key, given)


def abstract_state(
  init: Callable[..., PyTree],
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  mesh: Mesh,
  frozen: Sequence[str] = (),
  given: PyTree | None = None,
) -> TrainState:
  """Shapes, dtypes and shardings of `init_state`, without making the arrays."""
  make = functools.partial(_make_state, init, optimizer, frozen)
  shapes = jax.eval_shape(make, key, given)
  return jax.tree.map(
    lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
    shapes,
    sharding.state_sharding(shapes, mesh),
  )


def _make_state(init, optimizer, frozen, key, given):
  params = init(key) if given is None else init(key, given)
  trained, _ = _split(params, frozen)
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, params, optimizer.init(trained), zero, zero)


def _split(params, frozen):
  """(what is trained, what is not), both {key: tree}."""
  trained = {key: x for key, x in params.items() if key not in frozen}
  return trained, {key: x for key, x in params.items() if key in frozen}


def make_train_step(
  objective: Objective,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  layout: PyTree,
  *,
  seed: int,
  micro_batches: int = 1,
  max_skips: int = 5,
  draw: Callable[[PyTree, jax.Array], PyTree] | None = None,
) -> Callable[..., tuple[TrainState, Scalars]]:
  """Returns a jitted (state, batch) -> (state, metrics); donates `state`.

  A step is a pure function of (state, batch, seed): its randomness is
  fold_in(key(seed), state.step), the same on any number of devices.

  With `draw` it is (state, data, number) -> (state, metrics), which takes
  `number` steps, 1 or more, each on the batch draw(data, state.step).

  Args:
    objective: what to minimise.
    optimizer: its updates are applied to the parameters.
    mesh: the batch is split over all of it.
    layout: shardings of the state, kept by the step.
    seed: of everything random.
    micro_batches: gradient accumulation; the batch is taken in this many
      parts, with the same gradient as in one.
    max_skips: a step whose loss or gradient is not finite is not applied, but
      counted. After this many in a row nothing is applied any more, so that
      the state stays as it was until the host looks.
    draw: (data, step) -> batch; the data lie on every device.

  Returns:
    The step. Its metrics are those of the objective, computed over the global
    batch, and loss, gradient_norm, update_norm (0 if not applied), skipped,
    skipped_in_a_row; of several steps, the last one's.
  """
  batch_layout, everywhere = (
    sharding.batch_sharding(mesh),
    sharding.replicated(mesh),
  )
  jit = functools.partial(
    jax.jit, out_shardings=(layout, everywhere), donate_argnums=0
  )

  def train_step(state: TrainState, batch: PyTree):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    batch = objective.randomize(key, batch)
    (loss, parts), grads, statistics = gradients(
      objective, state.params, batch, micro_batches, batch_layout
    )
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    apply = finite & (state.skipped_in_a_row < max_skips)

    def update():
      trained, frozen = _split(state.params, objective.frozen)
      updates, opt_state = optimizer.update(grads, state.opt_state, trained)
      params = optax.apply_updates(trained, updates) | frozen
      if objective.follow is not None:
        params |= objective.follow(params, statistics)
      return params, opt_state, optax.tree.norm(updates)

    def keep():
      return state.params, state.opt_state, jnp.zeros(())

    # Not `where`, which reads and writes all of the state once more.
    params, opt_state, update_norm = jax.lax.cond(apply, update, keep)
    skip = 1 - apply.astype(jnp.int32)
    state = TrainState(
      state.step + 1,
      params,
      opt_state,
      state.skipped + skip,
      (state.skipped_in_a_row + 1) * skip,
    )
    metrics = parts | {
      "loss": loss,
      "gradient_norm": grad_norm,
      "update_norm": update_norm,
      "skipped": state.skipped,
      "skipped_in_a_row": state.skipped_in_a_row,
    }
    return state, metrics

  def train_steps(state: TrainState, data: PyTree, number: jax.Array):
    one = jax.jit(lambda state: train_step(state, draw(data, state.step)))
    blank = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, state)[1]
    )
    return jax.lax.fori_loop(
      0, number, lambda _, carry: one(carry[0]), (state, blank)
    )

  if draw is None:
    return jit(train_step, in_shardings=(layout, batch_layout))
  return jit(train_steps, in_shardings=(layout, everywhere, everywhere))


def gradients(
  objective: Objective,
  params: PyTree,
  batch: PyTree,
  micro_batches: int = 1,
  batch_layout: jax.sharding.Sharding | None = None,
) -> tuple[tuple[jax.Array, Scalars], PyTree, PyTree]:
  """((loss, parts), gradient, statistics) of the whole batch.

  The batch is taken in equal parts. With several there are two passes: the
  first, forward only, averages the objective's statistics; the second takes
  gradients, given these. The result is that of one part for any number
  (Objective says why).

  Args:
    objective: what to differentiate.
    params: where; the gradient is that of what is not frozen.
    batch: tree of arrays with B rows, randomised.
    micro_batches: parts; must divide B.
    batch_layout: sharding of a part's rows, where there is a mesh.

  Returns:
    Statistics are None where neither the parts nor `follow` need them.
  """
  trained, frozen = _split(params, objective.frozen)

  def loss(trained, part, statistics):
    return objective.loss(trained | frozen, part, statistics)

  grad = jax.value_and_grad(loss, has_aux=True)
  statistics = None
  needed = micro_batches > 1 or objective.follow is not None
  needed = needed and objective.statistics is not None
  if micro_batches == 1:
    if objective.prepare is not None:
      batch = objective.prepare(params, batch)
    if needed:
      statistics = objective.statistics(params, batch)
    return *grad(trained, batch, statistics), statistics

  def split(x):
    # Every n-th row goes to one part, so that parts use all the devices.
    x = jnp.moveaxis(x.reshape(-1, micro_batches, *x.shape[1:]), 1, 0)
    if batch_layout is None:
      return x
    spec = jax.sharding.PartitionSpec(None, *batch_layout.spec)
    layout = jax.sharding.NamedSharding(batch_layout.mesh, spec)
    return jax.lax.with_sharding_constraint(x, layout)

  parts = jax.tree.map(split, batch)
  if objective.prepare is not None:
    prepare = functools.partial(objective.prepare, params)
    parts = jax.lax.map(prepare, parts)
  if needed:
    statistics = _mean_over(
      lambda part: objective.statistics(params, part), parts
    )
  result = _mean_over(lambda part: grad(trained, part, statistics), parts)
  return *result, statistics


def _mean_over(function: Callable[[PyTree], PyTree], parts: PyTree) -> PyTree:
  """Mean of `function` over the first axis of `parts`, one at a time."""
  number = len(jax.tree.leaves(parts)[0])
  first = jax.tree.map(lambda x: x[0], parts)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first)
  )

  def add(total, part):
    return jax.tree.map(jnp.add, total, function(part)), None

  total, _ = jax.lax.scan(add, zeros, parts)
  return jax.tree.map(lambda x: x / number, total)
