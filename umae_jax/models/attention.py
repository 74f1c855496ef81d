"""Attention within an image: our arithmetic of it, and cuDNN's."""

import functools
import statistics
import time

from absl import logging
import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("xla", "cudnn")
REPEATS = 10  # Of which the median counts.


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  implementation: str = "xla",
) -> jax.Array:
  """softmax(query key^T / sqrt(d)) value, for every image and head.

  Args:
    query: (B, S, heads, d), of the S tokens that ask.
    key: (B, T, heads, d), of the T tokens that answer.
    value: (B, T, heads, d).
    implementation: "xla", ours, of plain matrix products with a gradient of
      its own, which reads the (S, T) weights once; or "cudnn", a fused kernel
      for bfloat16 on NVIDIA GPUs. The softmax is float32 in both.

  Returns:
    (B, S, heads, d) of the dtype of `query`.
  """
  if implementation == "cudnn":
    return jax.nn.dot_product_attention(
      query, key, value, implementation="cudnn"
    )
  heads_first = (x.swapaxes(1, 2) for x in (query, key, value))
  return _attend(*heads_first).swapaxes(1, 2)


def _product(x, y, over):
  """Batched over images and heads, summed over axes `over` of x and y."""
  dimensions = (((over[0],), (over[1],)), ((0, 1), (0, 1)))
  return jax.lax.dot_general(
    x, y, dimensions, preferred_element_type=jnp.float32
  )


@jax.custom_vjp
def _attend(query, key, value):
  """`attend` of (B, heads, S or T, d)."""
  return _forward(query, key, value)[0]


def _forward(query, key, value):
  scale = query.shape[-1] ** -0.5
  logits = _product(query, key, (3, 3))  # (B, heads, S, T)
  weights = jnp.exp(scale * (logits - logits.max(axis=-1, keepdims=True)))
  # The sums divide the d values of a token, not its T weights.
  sums = weights.sum(axis=-1, keepdims=True)
  weights = weights.astype(query.dtype)
  out = _product(weights, value, (3, 2)) / sums
  saved = (query, key, value, weights, sums, out.astype(query.dtype))
  return out.astype(query.dtype), saved


def _backward(saved, gradient):
  """Of the logits w (g.v - g.o) / sum: the sum over T is one over d."""
  query, key, value, weights, sums, out = saved
  dtype, scale = query.dtype, query.shape[-1] ** -0.5
  gradient = gradient / sums
  mean = (gradient * out).sum(axis=-1, keepdims=True)
  gradient = gradient.astype(dtype)
  of_logits = weights * (_product(gradient, value, (3, 3)) - mean) * scale
  of_logits = of_logits.astype(dtype)
  return (
    _product(of_logits, key, (3, 2)).astype(dtype),
    _product(of_logits, query, (2, 2)).astype(dtype),
    _product(weights, gradient, (2, 2)).astype(dtype),
  )


_attend.defvjp(_forward, _backward)


@functools.cache
def fastest(shape: tuple[int, int, int, int], dtype: jnp.dtype) -> str:
  """The implementation that is fastest here, forward and backward.

  The first must work; another one may not know the shape, the dtype or the
  device: it is then left out, with a warning.

  Args:
    shape: (B, T, heads, d) of query, key and value, on one device.
    dtype: theirs.
  """
  x = jnp.ones(shape, dtype)
  seconds = {}
  for name in IMPLEMENTATIONS:

    def total(query, key, value, name=name):
      return attend(query, key, value, name).astype(jnp.float32).sum()

    step = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    try:
      jax.block_until_ready(step(x, x, x))
    except Exception as error:  # Of many kinds, all of which mean: not here.
      if name == IMPLEMENTATIONS[0]:
        raise
      reason = str(error).splitlines()[0] if str(error) else repr(error)
      logging.warning("No %s attention of %s: %s", name, shape, reason)
      continue
    times = []
    for _ in range(REPEATS):
      start = time.perf_counter()
      jax.block_until_ready(step(x, x, x))
      times.append(time.perf_counter() - start)
    seconds[name] = statistics.median(times)
  return min(seconds, key=seconds.get)
