"""The layers between attention: linear, LayerNorm, GELU, as MAE has them.

LayerNorm has a gradient of its own: the one XLA derives keeps and reads more
arrays of the size of the tokens, most of a small model's time on a CPU.
"""

import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp

Dtype = jnp.dtype | None
NORM_EPSILON = 1e-6  # Of MAE's LayerNorms; Hugging Face's models have others.


def dense(features: int, dtype: Dtype, name: str) -> nn.Dense:
  """A linear layer as MAE starts it: Xavier-uniform kernel, zero bias."""
  initializer = nn.initializers.xavier_uniform()
  return nn.Dense(features, dtype=dtype, kernel_init=initializer, name=name)


def gelu(x: jax.Array) -> jax.Array:
  """The exact GELU, x (1 + erf(x / sqrt(2))) / 2, of any shape.

  `jax.nn.gelu` computes it of erfc, which takes an exponential more.
  """
  return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


class LayerNorm(nn.Module):
  """LayerNorm over the last axis, whose arithmetic is float32.

  Parameters are "scale" and "bias", as of `flax.linen.LayerNorm`.
  """

  dtype: Dtype = None  # Of the output; that of the input if None.
  epsilon: float = NORM_EPSILON

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., D) -> (..., D)."""
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    return layer_norm(x, scale, bias, self.epsilon, self.dtype or x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  epsilon: float,
  dtype: jnp.dtype,
) -> jax.Array:
  """(x - mean) / sqrt(variance + epsilon) * scale + bias, over the last axis.

  Args:
    x: (..., D).
    scale: (D,) float32.
    bias: (D,) float32.
    epsilon: added to the (biased) variance.
    dtype: of the result; all arithmetic is float32.
  """
  return _norm_forward(x, scale, bias, epsilon, dtype)[0]


def _standardize(x, mean, rate):
  return (x.astype(jnp.float32) - mean) * rate


def _row(x, like):
  """(D,) as (1, ..., 1, D), to go with the last axis."""
  return x.reshape((1,) * (like.ndim - 1) + (-1,))


def _norm_forward(x, scale, bias, epsilon, dtype):
  y = x.astype(jnp.float32)
  mean = y.mean(axis=-1, keepdims=True)
  variance = jnp.square(y).mean(axis=-1, keepdims=True) - jnp.square(mean)
  rate = jax.lax.rsqrt(jnp.maximum(variance, 0.0) + epsilon)
  out = _standardize(x, mean, rate) * _row(scale, x) + _row(bias, x)
  return out.astype(dtype), (x, mean, rate, scale)


def _norm_backward(epsilon, dtype, saved, gradient):
  del epsilon, dtype
  x, mean, rate, scale = saved
  g = gradient.astype(jnp.float32)
  z = _standardize(x, mean, rate)
  of_z = g * _row(scale, x)
  level = of_z.mean(axis=-1, keepdims=True)
  slope = (of_z * z).mean(axis=-1, keepdims=True)
  of_x = rate * (of_z - level - z * slope)
  rows = tuple(range(x.ndim - 1))
  return of_x.astype(x.dtype), (g * z).sum(axis=rows), g.sum(axis=rows)


layer_norm.defvjp(_norm_forward, _norm_backward)
