import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umae_jax.models import attention


def inputs(queries, tokens, scale=1.0):
  keys = jax.random.split(jax.random.key(0), 3)
  lengths = (queries, tokens, tokens)
  return tuple(
    scale * jax.random.normal(key, (2, length, 3, 8))
    for key, length in zip(keys, lengths)
  )


def plain(query, key, value):
  """By the definition, whose gradient JAX derives."""
  logits = jnp.einsum("bshd,bthd->bhst", query, key) / np.sqrt(8)
  weights = jax.nn.softmax(logits, axis=-1)
  return jnp.einsum("bhst,bthd->bshd", weights, value)


@pytest.mark.parametrize("queries", [5, 2])
@pytest.mark.parametrize("scale", [1.0, 30.0])  # Of logits up to thousands.
def test_value_and_gradient_are_those_of_the_definition(queries, scale):
  x = inputs(queries, 5, scale)
  weight = jax.random.normal(jax.random.key(1), (2, queries, 3, 8))

  def both(function):
    return jax.value_and_grad(
      lambda x: (weight * function(*x)).sum(), argnums=0
    )(x)

  got, expected = both(attention.attend), both(plain)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
    # A saturated softmax has gradients of 0, as differences of large terms.
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-6 * scale**2)
  out = attention.attend(*x)
  np.testing.assert_allclose(out, plain(*x), rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_a_float32_softmax():
  """Close to float32 on the same inputs, and given back as it came."""
  # Large logits; values that bfloat16 rounds by 2e-3 at most.
  scaled = zip((3, 3, 0.25), inputs(4, 60))
  x = tuple((scale * a).astype(jnp.bfloat16) for scale, a in scaled)
  out = attention.attend(*x)
  assert out.dtype == jnp.bfloat16
  exact = plain(*(a.astype(jnp.float32) for a in x))
  np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=4e-3)
  grads = jax.grad(
    lambda x: attention.attend(*x).astype(jnp.float32).sum(), argnums=0
  )(x)
  chex.assert_trees_all_equal_shapes_and_dtypes(grads, x)


def test_the_gradient_reads_saved_weights_and_makes_no_second_softmax():
  x = inputs(5, 5)
  jaxpr = str(
    jax.make_jaxpr(jax.grad(lambda q: attention.attend(q, *x[1:]).sum()))(x[0])
  )
  assert jaxpr.count("= exp ") == 1


def test_what_does_not_run_here_is_left_out_with_a_warning(caplog, monkeypatch):
  with caplog.at_level(logging.WARNING):
    name = attention.fastest((2, 4, 2, 8), jnp.float32)
  assert name == "xla" and "No cudnn attention of (2, 4, 2, 8)" in caplog.text
  monkeypatch.setattr(attention, "IMPLEMENTATIONS", ("cudnn",))
  with pytest.raises(Exception, match=r"(?i)cudnn"):
    attention.fastest((2, 4, 2, 16), jnp.float32)
