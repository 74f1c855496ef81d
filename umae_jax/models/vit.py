"""The vision transformer: block and encoder, with the arithmetic of MAE."""

from flax import linen as nn
import jax
import jax.numpy as jnp

Dtype = jnp.dtype | None


def dense(features: int, dtype: Dtype, name: str) -> nn.Dense:
  """A linear layer as MAE starts it: Xavier-uniform kernel, zero bias."""
  initializer = nn.initializers.xavier_uniform()
  return nn.Dense(features, dtype=dtype, kernel_init=initializer, name=name)


def layer_norm(dtype: Dtype, name: str) -> nn.LayerNorm:
  """LayerNorm of epsilon 1e-6; statistics in float32 whatever the dtype."""
  return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name)


class Attention(nn.Module):
  """Multi-head self-attention with a fused, biased qkv, (B, T, D) likewise.

  The softmax is float32 whatever the dtype.
  """

  num_heads: int
  dtype: Dtype = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Every token attends to every token of its image."""
    batch, tokens, width = x.shape
    qkv = dense(3 * width, self.dtype, "qkv")(x)
    heads = (batch, tokens, 3, self.num_heads, width // self.num_heads)
    query, key, value = jnp.moveaxis(qkv.reshape(heads), 2, 0)
    x = jax.nn.dot_product_attention(query, key, value, implementation="xla")
    return dense(width, self.dtype, "proj")(x.reshape(batch, tokens, width))


class Block(nn.Module):
  """Pre-norm transformer block, (B, T, D) -> (B, T, D).

  Same arithmetic as the timm block that MAE trains: LayerNorm epsilon 1e-6,
  biased qkv, and the exact (erf) GELU, which is not linen's default.
  """

  num_heads: int
  mlp_ratio: float = 4.0
  dtype: Dtype = None  # Compute dtype; parameters stay float32.

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Attention, then a two-layer perceptron, each on a residual branch."""
    width = x.shape[-1]
    y = layer_norm(self.dtype, "norm1")(x)
    x = x + Attention(self.num_heads, self.dtype, name="attn")(y)
    y = layer_norm(self.dtype, "norm2")(x)
    y = dense(int(self.mlp_ratio * width), self.dtype, "fc1")(y)  # (B, T, 4D)
    y = nn.gelu(y, approximate=False)
    return x + dense(width, self.dtype, "fc2")(y)


def transformer(
  x: jax.Array, depth: int, num_heads: int, mlp_ratio: float, dtype: Dtype
) -> jax.Array:
  """`depth` blocks and a final LayerNorm, (B, T, D) -> (B, T, D).

  For use inside a module, whose parameters block0, block1, ..., norm it adds.
  """
  for i in range(depth):
    x = Block(num_heads, mlp_ratio, dtype, name=f"block{i}")(x)
  return layer_norm(dtype, "norm")(x)


class Encoder(nn.Module):
  """ViT encoder of any subset of an image's patches."""

  width: int
  depth: int
  num_heads: int
  mlp_ratio: float = 4.0
  dtype: Dtype = None

  @nn.compact
  def __call__(self, patches: jax.Array, positions: jax.Array) -> jax.Array:
    """Encodes patch vectors; they attend to one another and a class token.

    Args:
      patches: (B, T, P), the raw values of the patches to see.
      positions: (1 or B, T, D), where each of them sits.

    Returns:
      (B, 1 + T, D) after the final LayerNorm: class token, then the patches.
    """
    x = dense(self.width, self.dtype, "patch_embed")(patches)
    x = x + positions.astype(x.dtype)
    shape = (1, 1, self.width)
    token = self.param("cls_token", nn.initializers.normal(0.02), shape)
    token = jnp.broadcast_to(token.astype(x.dtype), (len(x), 1, self.width))
    x = jnp.concatenate([token, x], axis=1)
    return transformer(
      x, self.depth, self.num_heads, self.mlp_ratio, self.dtype
    )
