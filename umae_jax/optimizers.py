"""Optimisers and schedules, as MAE uses them, for Optax."""

from collections.abc import Sequence
import functools
import re
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


def decay_mask(params: Any, spared: Sequence[str] = ()) -> Any:
  """True for what weight decay shrinks: all but 1-D parameters.

  So kernels are decayed and biases and norms are not; class and mask token,
  of shape (1, 1, D), are decayed, as in the released code's pretraining.

  Args:
    params: tree of arrays.
    spared: names of leaves that are not decayed either.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x.ndim > 1 and path[-1].key not in spared, params
  )


def adamw(
  schedule: optax.Schedule,
  *,
  b1: float = 0.9,
  b2: float = 0.95,
  weight_decay: float = 0.05,
  spared: Sequence[str] = (),
) -> optax.GradientTransformation:
  """AdamW (decoupled decay, scaled by the learning rate) with `decay_mask`."""
  mask = functools.partial(decay_mask, spared=spared)
  return optax.adamw(
    schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask
  )


def lars(
  schedule: optax.Schedule,
  *,
  momentum: float = 0.9,
  trust_coefficient: float = 0.001,
  weight_decay: float = 0.0,
) -> optax.GradientTransformation:
  """LARS as MAE's linear probe uses it; 1-D parameters take plain SGD steps.

  The gradient g of a weight w becomes g * trust_coefficient * |w| / |g|
  (unchanged where a norm is 0), then enters the momentum, and the learning
  rate scales the sum. `optax.lars` puts the rate inside of the momentum,
  which is another method when the rate changes.

  Source: You et al. 2017 (arXiv:1708.03888), in the form of MoCo v3.
  """
  return optax.chain(
    optax.add_decayed_weights(weight_decay, decay_mask),
    optax.masked(
      optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient),
      decay_mask,
    ),
    optax.trace(momentum),
    optax.scale_by_learning_rate(schedule),
  )


def layer_scales(params: Any, decay: float) -> Any:
  """Factor of each parameter's learning rate: decay^(layers above it).

  Layer 0 is all that comes before the first block (patch embedding, class
  token, positions), layer 1 + i is block i, and what follows the last block
  (norms, head) has the factor 1. ViT-B: from decay^13 to 1.

  Args:
    params: tree whose blocks are named block0, block1, ...
    decay: in (0, 1]; MAE: 0.65 for B, 0.75 for L and H.

  Source: BEiT (Bao et al. 2021, arXiv:2106.08254), as MAE's fine-tuning.
  """
  first = ("cls_token", "pos_embed", "patch_embed")

  def layer(path):
    names = [str(part.key) for part in path]
    blocks = [int(n[5:]) for n in names if re.fullmatch(r"block\d+", n)]
    if blocks:
      return 1 + blocks[0]
    return 0 if set(first) & set(names) else None

  paths = jax.tree_util.tree_leaves_with_path(params)
  top = 1 + max(layer(path) or 0 for path, _ in paths)

  def scale(path, _):
    number = layer(path)
    return 1.0 if number is None else decay ** (top - number)

  return jax.tree_util.tree_map_with_path(scale, params)


def with_layer_decay(
  optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
  """`optimizer`, its learning rates (decay included) times `layer_scales`."""

  def scaled(updates, params=None):
    del params
    scales = layer_scales(updates, decay)
    return jax.tree.map(lambda x, factor: x * factor, updates, scales)

  return optax.chain(optimizer, optax.stateless(scaled))
