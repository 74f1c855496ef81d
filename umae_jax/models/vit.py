"""The vision transformer: block and encoder, with the arithmetic of MAE."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from umae_jax.models import patches as patches_lib

Dtype = jnp.dtype | None
NORM_EPSILON = 1e-6  # Of MAE's LayerNorms; Hugging Face's models have others.


def dense(features: int, dtype: Dtype, name: str) -> nn.Dense:
  """A linear layer as MAE starts it: Xavier-uniform kernel, zero bias."""
  initializer = nn.initializers.xavier_uniform()
  return nn.Dense(features, dtype=dtype, kernel_init=initializer, name=name)


def layer_norm(
  dtype: Dtype, name: str, epsilon: float = NORM_EPSILON
) -> nn.LayerNorm:
  """LayerNorm, whose statistics are in float32 whatever the dtype."""
  return nn.LayerNorm(epsilon=epsilon, dtype=dtype, name=name)


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


def drop_path(y: jax.Array, noise: jax.Array | None, rate: float) -> jax.Array:
  """Drops a residual branch of some images: stochastic depth.

  Args:
    y: (B, T, D), the branch.
    noise: (B,) uniform in [0, 1), or None: nothing is dropped.
    rate: in [0, 1); an image keeps its branch, scaled by 1 / (1 - rate), where
      the noise is at least this.

  Source: Huang et al. 2016 (arXiv:1603.09382), per image as in timm.
  """
  if noise is None or rate == 0:
    return y
  keep = (noise >= rate)[:, None, None]
  return jnp.where(keep, y / (1 - rate), jnp.zeros_like(y))


class Block(nn.Module):
  """Pre-norm transformer block, (B, T, D) -> (B, T, D).

  Same arithmetic as the timm block that MAE trains: LayerNorm epsilon 1e-6,
  biased qkv, and the exact (erf) GELU, which is not linen's default.
  """

  num_heads: int
  mlp_ratio: float = 4.0
  dtype: Dtype = None  # Compute dtype; parameters stay float32.
  drop_path: float = 0.0
  norm_epsilon: float = NORM_EPSILON

  @nn.compact
  def __call__(
    self, x: jax.Array, drop_noise: jax.Array | None = None
  ) -> jax.Array:
    """Attention, then a two-layer perceptron, each on a residual branch.

    `drop_noise` is (B, 2): of each image's first and second branch.
    """
    width = x.shape[-1]
    first, second = (None, None) if drop_noise is None else drop_noise.T
    y = layer_norm(self.dtype, "norm1", self.norm_epsilon)(x)
    y = Attention(self.num_heads, self.dtype, name="attn")(y)
    x = x + drop_path(y, first, self.drop_path)
    y = layer_norm(self.dtype, "norm2", self.norm_epsilon)(x)
    y = dense(int(self.mlp_ratio * width), self.dtype, "fc1")(y)  # (B, T, 4D)
    y = nn.gelu(y, approximate=False)
    y = dense(width, self.dtype, "fc2")(y)
    return x + drop_path(y, second, self.drop_path)


def transformer(
  x: jax.Array,
  depth: int,
  num_heads: int,
  mlp_ratio: float,
  dtype: Dtype,
  drop_path: float = 0.0,
  drop_noise: jax.Array | None = None,
  norm_epsilon: float = NORM_EPSILON,
) -> jax.Array:
  """`depth` blocks, (B, T, D) -> (B, T, D), without a final LayerNorm.

  For use inside a module, whose parameters block0, block1, ... it adds.

  Args:
    x: the tokens.
    depth: number of blocks.
    num_heads: of each block.
    mlp_ratio: of each block.
    dtype: of the matrix products.
    drop_path: rate of the last block; it rises linearly from 0 at the first.
    drop_noise: (B, depth, 2) uniform in [0, 1), or None: nothing is dropped.
    norm_epsilon: of each LayerNorm.

  Raises:
    ValueError: the noise has another shape.
  """
  if drop_noise is not None and drop_noise.shape != (len(x), depth, 2):
    raise ValueError(
      f"drop_noise has shape {drop_noise.shape}; it needs one value for each "
      f"of the (images, blocks, branches) = {(len(x), depth, 2)}."
    )
  for i in range(depth):
    rate = drop_path * i / max(depth - 1, 1)
    noise = None if drop_noise is None else drop_noise[:, i]
    block = Block(
      num_heads, mlp_ratio, dtype, rate, norm_epsilon, name=f"block{i}"
    )
    x = block(x, noise)
  return x


def positions(
  module: nn.Module, grid: tuple[int, int], width: int
) -> jax.Array:
  """Where patches sit, (1, L, `width`): the module's own table, or fixed.

  Args:
    module: bound; its parameter `pos_embed`, (1, 1 + L, `width`) with the
      class token's row first, is used if there is one.
    grid: patches per column and per row of the image.
    width: of a token.

  Raises:
    ValueError: the table is of another number of patches.
  """
  if not module.has_variable("params", "pos_embed"):
    return jnp.asarray(patches_lib.sincos_positions(grid, width))
  table = module.get_variable("params", "pos_embed")
  if table.shape[1] - 1 != grid[0] * grid[1]:
    raise ValueError(
      f"An image of {grid[0]} x {grid[1]} patches does not fit pos_embed, a "
      f"table of {table.shape[1] - 1} patches; interpolate it with "
      "models.patches.resize_positions, or convert.load_pretrained(..., "
      "image_size=...)."
    )
  return table[:, 1:]


def add_class_row(module: nn.Module, token: jax.Array) -> jax.Array:
  """Adds the class token's row of `pos_embed`; the fixed one is zero."""
  if not module.has_variable("params", "pos_embed"):
    return token
  row = module.get_variable("params", "pos_embed")[:, :1]
  return token + row.astype(token.dtype)


class Encoder(nn.Module):
  """ViT encoder of any subset of an image's patches.

  A parameter `pos_embed`, (1, 1 + L, D) with the class token's row first,
  takes the place of the fixed positions if the variables hold one. `init`
  makes one only if `train_positions`.
  """

  width: int
  depth: int
  num_heads: int
  mlp_ratio: float = 4.0
  dtype: Dtype = None
  drop_path: float = 0.0  # Rate of the last block; see `transformer`.
  final_norm: bool = True
  train_positions: bool = False
  norm_epsilon: float = NORM_EPSILON

  def positions(self, grid: tuple[int, int]) -> jax.Array:
    """(1, L, D) for an image of `grid` patches; see `positions`."""
    if self.train_positions and self.is_initializing():
      table = patches_lib.sincos_positions(grid, self.width)
      table = jnp.pad(table, ((0, 0), (1, 0), (0, 0)))
      self.put_variable("params", "pos_embed", table)
    return positions(self, grid, self.width)

  @nn.compact
  def __call__(
    self,
    patches: jax.Array,
    positions: jax.Array,
    drop_noise: jax.Array | None = None,
  ) -> jax.Array:
    """Encodes patch vectors; they attend to one another and a class token.

    Args:
      patches: (B, T, P), the raw values of the patches to see.
      positions: (1 or B, T, D), where each of them sits.
      drop_noise: (B, depth, 2) uniform in [0, 1): one value for each image,
        block and residual branch, which is dropped below the block's rate;
        None: nothing is dropped.

    Returns:
      (B, 1 + T, D) after the final LayerNorm, if there is one: class token,
      then the patches.
    """
    x = dense(self.width, self.dtype, "patch_embed")(patches)
    x = x + positions.astype(x.dtype)
    shape = (1, 1, self.width)
    token = self.param("cls_token", nn.initializers.normal(0.02), shape)
    token = add_class_row(self, token).astype(x.dtype)
    token = jnp.broadcast_to(token, (len(x), 1, self.width))
    x = jnp.concatenate([token, x], axis=1)
    size = (self.depth, self.num_heads, self.mlp_ratio, self.dtype)
    x = transformer(x, *size, self.drop_path, drop_noise, self.norm_epsilon)
    if not self.final_norm:
      return x
    return layer_norm(self.dtype, "norm", self.norm_epsilon)(x)
