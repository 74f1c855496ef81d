"""Inside a trained encoder: tokens after every block, and its attention."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from umae_jax import models
from umae_jax.models import vit


class Layers(NamedTuple):
  """What an encoder of `depth` blocks computes on its way.

  Attributes:
    tokens: depth + 1 arrays (B, T, D) float32: after each block, and at last
      after the final LayerNorm, as `encode` returns them. T is 1 + L, or 1 + K
      of masked images, the class token first.
    attention: depth arrays (B, heads, T) float32 in [0, 1], which sum to 1
      over T: how much the class token takes of each token's value.
  """

  tokens: tuple[jax.Array, ...]
  attention: tuple[jax.Array, ...]


def layers(
  model: models.MaskedAutoencoder,
  params: Any,
  images: jax.Array,
  noise: jax.Array | None = None,
  mask_ratio: float = 0.75,
) -> Layers:
  """Encodes images, and keeps what lies between.

  Args:
    model: however it is executed; this is computed block by block.
    params: its parameters; those of a decoder may be absent.
    images: (B, H, W, C) float, already normalised.
    noise: (B, L), as of the model's call: the encoder sees the K patches of
      the smallest noise, in that order. None: whole images, raster order.
    mask_ratio: of the masks, if there is noise.
  """
  model = model.clone(execution=vit.Execution())
  given = (
    ("encode",) if noise is None else ("encode_visible", noise, mask_ratio)
  )
  method, *more = given
  out, captured = model.apply(
    {"params": params},
    *(images, *more),
    method=method,
    capture_intermediates=_wanted,
    mutable=["intermediates"],
  )
  encoder = captured["intermediates"]["encoder"]
  blocks = [encoder[f"block{i}"] for i in range(model.depth)]
  tokens = [block["__call__"][0].astype(jnp.float32) for block in blocks]
  attention = tuple(
    _of_class_token(
      block["attn"]["qkv"]["__call__"][0].reshape(
        *out.shape[:2], 3, model.num_heads, -1
      )
    )
    for block in blocks
  )
  return Layers((*tokens, out), attention)


def _wanted(module, method: str) -> bool:
  """Blocks, and what queries and keys are made by."""
  kept = isinstance(module, vit.Block) or module.name == "qkv"
  return method == "__call__" and kept


def _of_class_token(qkv):
  """(B, T, 3, heads, d) to the weights of the first token, (B, heads, T)."""
  query, key = qkv[:, 0, 0], qkv[:, :, 1]
  logits = jnp.einsum(
    "bhd,bthd->bht", query, key, preferred_element_type=jnp.float32
  )
  return jax.nn.softmax(logits * query.shape[-1] ** -0.5, axis=-1)
