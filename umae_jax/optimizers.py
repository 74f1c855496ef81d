"""Optimisers and schedules, as MAE uses them, for Optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def warmup_cosine(
  learning_rate: float,
  *,
  warmup_steps: int,
  total_steps: int,
  min_learning_rate: float = 0.0,
) -> optax.Schedule:
  """Linear warm-up from 0, then half a cosine down, a value for each step.

  Args:
    learning_rate: the peak, reached at step `warmup_steps`.
    warmup_steps: may be 0.
    total_steps: the schedule's end, where the value is `min_learning_rate`.
    min_learning_rate: of the cosine; the warm-up starts at 0 all the same.

  Source: `adjust_learning_rate` of MAE, at integer steps.
  """
  decay_steps = max(total_steps - warmup_steps, 1)

  def schedule(step):
    rising = learning_rate * step / max(warmup_steps, 1)
    left = jnp.clip((total_steps - step) / decay_steps, 0, 1)
    # (1 + cos(pi * (1 - left))) / 2, without its cancellation near the end.
    falling = jnp.square(jnp.sin(jnp.pi / 2 * left))
    falling = min_learning_rate + (learning_rate - min_learning_rate) * falling
    return jnp.where(step < warmup_steps, rising, falling)

  return schedule


def decay_mask(params: Any) -> Any:
  """True for what weight decay shrinks: all but 1-D parameters.

  So kernels are decayed and biases and norms are not; class and mask token,
  of shape (1, 1, D), are decayed, as in the released code.
  """
  return jax.tree.map(lambda x: x.ndim > 1, params)


def adamw(
  schedule: optax.Schedule,
  *,
  b1: float = 0.9,
  b2: float = 0.95,
  weight_decay: float = 0.05,
) -> optax.GradientTransformation:
  """AdamW (decoupled decay, scaled by the learning rate) with `decay_mask`."""
  return optax.adamw(
    schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decay_mask
  )
