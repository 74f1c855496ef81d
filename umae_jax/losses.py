"""The objective, L_MAE + lambda * L_unif: pure functions of arrays.

Inside `jax.jit` an array is the whole array however it is sharded, so the
means below run over the global batch and no collective is written here.
"""

import chex
import jax
import jax.numpy as jnp

from umae_jax.models import patches as patches_lib


def patch_statistics(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean and deviation of each patch, (..., P) -> two of (..., 1).

  The variance is the unbiased one (divisor P - 1), with 1e-6 added inside the
  square root, as in the released code; P must be at least 2.
  """
  mean = patches.mean(axis=-1, keepdims=True)
  variance = patches.var(axis=-1, keepdims=True, ddof=1)
  return mean, jnp.sqrt(variance + 1e-6)


def normalize_patches(patches: jax.Array) -> jax.Array:
  """Gives every patch mean 0 and variance 1, (..., P) -> (..., P)."""
  mean, deviation = patch_statistics(patches)
  return (patches - mean) / deviation


def reconstruction_loss(
  images: jax.Array,
  prediction: jax.Array,
  mask: jax.Array,
  *,
  patch_size: int,
  normalize_pixels: bool,
) -> jax.Array:
  """Mean squared error over the values of the removed patches.

  Args:
    images: (B, H, W, C) float, already normalised.
    prediction: (B, L, P).
    mask: (B, L), 1 = removed; the mean runs over these patches of all images.
    patch_size: p.
    normalize_pixels: predict each patch's values normalised by the patch's
      own mean and deviation (`normalize_patches`) instead of the raw ones.

  Returns:
    () float32, at least 0; in squared units of the images, or about 1 for a
    constant prediction of 0 when the targets are normalised.

  Source: He et al. 2021 (arXiv:2111.06377), section 3.
  """
  target = patches_lib.patchify(images.astype(jnp.float32), patch_size)
  chex.assert_equal_shape([prediction, target])
  chex.assert_shape(mask, target.shape[:2])
  if normalize_pixels:
    target = normalize_patches(target)
  error = jnp.square(prediction.astype(jnp.float32) - target).mean(-1)
  return (error * mask).sum() / mask.sum()


def removed_patches_loss(
  prediction: jax.Array, target: jax.Array, *, normalize_pixels: bool
) -> jax.Array:
  """`reconstruction_loss` of the removed patches alone.

  Args:
    prediction: (B, L - K, P).
    target: (B, L - K, P), raw values of the same patches.
    normalize_pixels: as of `reconstruction_loss`.

  Returns:
    () float32.
  """
  chex.assert_equal_shape([prediction, target])
  target = target.astype(jnp.float32)
  if normalize_pixels:
    target = normalize_patches(target)
  return jnp.square(prediction.astype(jnp.float32) - target).mean()


def alignment_loss(first: jax.Array, second: jax.Array) -> jax.Array:
  """Mean squared distance of positive pairs, each row scaled to length 1.

  Args:
    first: (B, D), any scale; a zero row counts as z = 0.
    second: (B, D), the other half of each pair, such as the same images under
      other masks.

  Returns:
    () float32 in [0, 4]: 0 = all pairs are alike, 2 = independent, on average.

  Source: Wang & Isola 2020 (arXiv:2005.10242), alpha = 2.
  """
  chex.assert_equal_shape([first, second])
  return jnp.square(_unit_rows(first) - _unit_rows(second)).sum(-1).mean()


def second_moment(features: jax.Array) -> jax.Array:
  """C = Z^T Z / B of the rows z_i = f_i / |f_i|, (B, D) -> (D, D) float32.

  The trace is 1 for non-zero rows. A zero row counts as z = 0.
  """
  chex.assert_rank(features, 2)
  z = _unit_rows(features)
  # The default precision would round z to bfloat16 on a TPU.
  return jnp.matmul(z.T, z, precision="highest") / len(z)


def _unit_rows(features):
  """z_i = f_i / |f_i|, float32; zero rows stay zero."""
  f = features.astype(jnp.float32)
  square_norm = jnp.square(f).sum(axis=-1, keepdims=True)  # (B, 1)
  # Not f / norm(f): the gradient of a norm is NaN at zero.
  return f * jax.lax.rsqrt(jnp.maximum(square_norm, 1e-24))


def uniformity_loss(
  features: jax.Array, batch_moment: jax.Array | None = None
) -> jax.Array:
  """Mean squared cosine similarity over all ordered pairs of the batch.

  With z_i = f_i / |f_i|, the value is sum_ij (z_i . z_j)^2 / B^2. It is
  computed as |C|_F^2 with C = Z^T Z / B: linear in B, one D x D sum over the
  devices, and no B x B matrix.

  Args:
    features: (B, D), any scale; a zero row counts as similarity zero.
    batch_moment: (D, D), or None. Gradient accumulation: `features` are then
      one of several equal parts of a batch, whose `second_moment` (the mean
      over the parts) this is. The value returned is the whole batch's, and
      the mean over the parts of its gradients is exactly the gradient of the
      whole batch's loss: d|C|^2 = 2 <C, dC>, and C is linear in the parts.

  Returns:
    () float32, dimensionless, in [1 / min(B, D), 1] for non-zero rows:
    1 = fully collapsed (all rows parallel). Its inverse is the participation
    ratio, an effective dimension. The B diagonal pairs add a constant 1/B,
    which the reference keeps and so do we.

  Source: Zhang, Wang & Wang 2022 (arXiv:2210.08344); the spectral term of
  HaoChen et al. 2021 (arXiv:2106.04156).
  """
  moment = second_moment(features)
  if batch_moment is None:
    return jnp.square(moment).sum()
  batch_moment = jax.lax.stop_gradient(batch_moment)
  linear = 2 * (batch_moment * moment).sum()
  value = jnp.square(batch_moment).sum()
  return linear + jax.lax.stop_gradient(value - linear)
