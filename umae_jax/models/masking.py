"""Which patches the encoder sees, from given noise: one mask per image."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Masking(NamedTuple):
  """A split of every image's patches into visible and removed ones.

  Attributes:
    shuffle: (B, L) int32, patch numbers by rising noise; the first K are
      visible.
    restore: (B, L) int32, the inverse permutation of each row of `shuffle`.
    mask: (B, L) float32 in raster order, 1 = removed, 0 = visible.
  """

  shuffle: jax.Array
  restore: jax.Array
  mask: jax.Array


def num_visible(num_patches: int, mask_ratio: float) -> int:
  """K = int(L * (1 - mask_ratio)), the number of patches the encoder sees.

  Raises:
    ValueError: no patch would be visible, or none removed.
  """
  visible = int(num_patches * (1 - mask_ratio))
  if not 1 <= visible < num_patches:
    raise ValueError(
      f"mask_ratio={mask_ratio} leaves {visible} of {num_patches} patches "
      f"visible; at least one must be visible and one removed. Choose it in "
      f"(0, {1 - 1 / num_patches:.4g}]; MAE uses 0.75."
    )
  return visible


def from_noise(noise: jax.Array, visible: int) -> Masking:
  """Keeps the `visible` patches of the smallest noise, per image.

  Args:
    noise: (B, L) float, distinct within a row (ties go by patch number).
    visible: K.
  """
  shuffle = jnp.argsort(noise, axis=1, stable=True).astype(jnp.int32)
  restore = jnp.argsort(shuffle, axis=1).astype(jnp.int32)
  return Masking(shuffle, restore, (restore >= visible).astype(jnp.float32))


def take(x: jax.Array, ids: jax.Array) -> jax.Array:
  """Rows `ids` (B, n) of each image's rows `x` (B, T, D), as (B, n, D)."""
  return jnp.take_along_axis(x, ids[:, :, None], axis=1)


@jax.custom_vjp
def permute(x: jax.Array, ids: jax.Array, inverse: jax.Array) -> jax.Array:
  """`take` for permutations: its gradient is a gather, not a scatter-add.

  Args:
    x: (B, T, D).
    ids: (B, T) int32, each row a permutation of range(T).
    inverse: (B, T) int32, the inverse permutations.
  """
  del inverse
  return take(x, ids)


def _permute_forward(x, ids, inverse):
  return take(x, ids), inverse


def _permute_backward(inverse, gradient):
  return take(gradient, inverse), None, None


permute.defvjp(_permute_forward, _permute_backward)
