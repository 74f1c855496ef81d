"""The vision transformer: block and encoder, with the arithmetic of MAE."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from umae_jax.models import attention, layers
from umae_jax.models import patches as patches_lib

Dtype = layers.Dtype
POLICIES = {  # What blocks keep for the gradient, of Execution.remat.
  "none": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


class Execution(NamedTuple):
  """How a transformer is computed; its result and parameters do not depend.

  Attributes:
    attention: "xla" or "cudnn"; see `attention.attend`.
    remat: what is computed again for the gradient, to save memory: "none",
      "dots" (all but the linear layers) or "full" (whole blocks).
    scan_layers: compile one block and loop over it, not each block: a program
      that compiles faster and runs a little slower. The parameters stay those
      of each block, so that a checkpoint fits both.
  """

  attention: str = "xla"
  remat: str = "none"
  scan_layers: bool = False


class Attention(nn.Module):
  """Multi-head self-attention with a fused, biased qkv.

  The softmax is float32 whatever the dtype.
  """

  num_heads: int
  dtype: Dtype = None
  implementation: str = "xla"

  @nn.compact
  def __call__(self, x: jax.Array, last: int | None = None) -> jax.Array:
    """(B, T, D) -> (B, S, D): the `last` S tokens attend to all T."""
    batch, tokens, width = x.shape
    # One matrix product of B T rows.
    qkv = layers.dense(3 * width, self.dtype, "qkv")(x.reshape(-1, width))
    heads = (batch, tokens, 3, self.num_heads, width // self.num_heads)
    query, key, value = jnp.moveaxis(qkv.reshape(heads), 2, 0)
    if last is not None:
      query = query[:, -last:]
    x = attention.attend(query, key, value, self.implementation)
    x = layers.dense(width, self.dtype, "proj")(x.reshape(-1, width))
    return x.reshape(batch, -1, width)


def drop_factors(noise: jax.Array, rate: float) -> jax.Array:
  """By what each residual branch of each block is multiplied.

  Args:
    noise: (B, depth, 2) uniform in [0, 1), a value per image, block, branch.
    rate: of the last block, in [0, 1); it rises linearly from 0 at the first.
      A branch is dropped, 0, where its noise is below the block's rate, and
      else scaled by 1 / (1 - rate), so that its mean stays.

  Returns:
    (B, depth, 2) float32.

  Source: Huang et al. 2016 (arXiv:1603.09382), per image as in timm.
  """
  rates = rate * jnp.arange(noise.shape[1]) / max(noise.shape[1] - 1, 1)
  rates = rates[None, :, None]
  return jnp.where(noise >= rates, 1 / (1 - rates), 0.0)


class Block(nn.Module):
  """Pre-norm transformer block, (B, T, D) -> (B, T, D).

  Same arithmetic as the timm block that MAE trains: LayerNorm epsilon 1e-6,
  biased qkv, and the exact (erf) GELU, which is not linen's default.
  """

  num_heads: int
  mlp_ratio: float = 4.0
  dtype: Dtype = None  # Compute dtype; parameters stay float32.
  norm_epsilon: float = layers.NORM_EPSILON
  attention: str = "xla"
  last: int | None = None  # Only so many tokens are wanted: (B, `last`, D).

  @nn.compact
  def __call__(
    self, x: jax.Array, factors: jax.Array | None = None
  ) -> jax.Array:
    """Attention, then a two-layer perceptron, each on a residual branch.

    `factors` is (B, 2): of each image's first and second branch.
    """
    width = x.shape[-1]

    def branch(y, index):
      if factors is None:
        return y
      return y * factors[:, index, None, None].astype(y.dtype)

    y = layers.LayerNorm(self.dtype, self.norm_epsilon, name="norm1")(x)
    attend = Attention(self.num_heads, self.dtype, self.attention, name="attn")
    y = branch(attend(y, self.last), 0)
    x = y + (x if self.last is None else x[:, -self.last :])
    y = layers.LayerNorm(self.dtype, self.norm_epsilon, name="norm2")(x)
    hidden = int(self.mlp_ratio * width)
    y = layers.dense(hidden, self.dtype, "fc1")(y.reshape(-1, width))
    y = layers.gelu(y)  # (B T, 4 D)
    y = layers.dense(width, self.dtype, "fc2")(y)
    return x + branch(y.reshape(x.shape), 1)


def transformer(
  module: nn.Module,
  x: jax.Array,
  depth: int,
  fields: Mapping[str, Any],
  execution: Execution,
  factors: jax.Array | None = None,
  last: int | None = None,
) -> jax.Array:
  """`depth` blocks, (B, T, D) -> (B, T, D), without a final LayerNorm.

  Args:
    module: whose parameters block0, block1, ... are used, or made; this is a
      part of its compact call.
    x: the tokens.
    depth: number of blocks.
    fields: of each `Block`.
    execution: how to compute them.
    factors: (B, depth, 2) of `drop_factors`, or None: nothing is dropped.
    last: only so many tokens are wanted, (B, `last`, D): the last block
      computes no others.
  """
  fields = {**fields, "attention": execution.attention}
  remat, policy = execution.remat != "none", POLICIES[execution.remat]
  scanned = 0
  if execution.scan_layers and not module.is_initializing():
    scanned = depth if last is None else depth - 1
  if scanned:
    stacked = jax.tree.map(
      lambda *leaves: jnp.stack(leaves),
      *(module.get_variable("params", f"block{i}") for i in range(scanned)),
    )
    block = Block(**fields, parent=None)

    def step(x, layer):
      params, factors = layer
      return block.apply({"params": params}, x, factors), None

    if remat:
      step = jax.checkpoint(step, policy=policy)
    parts = None if factors is None else jnp.moveaxis(factors, 1, 0)[:scanned]
    x, _ = jax.lax.scan(step, x, (stacked, parts))
  kind = nn.remat(Block, policy=policy) if remat else Block
  for i in range(scanned, depth):
    wanted = last if i == depth - 1 else None
    block = kind(**fields, last=wanted, name=f"block{i}")
    x = block(x, None if factors is None else factors[:, i])
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
  drop_path: float = 0.0  # Rate of the last block; see `drop_factors`.
  final_norm: bool = True
  train_positions: bool = False
  norm_epsilon: float = layers.NORM_EPSILON
  execution: Execution = Execution()

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
    x = layers.dense(self.width, self.dtype, "patch_embed")(patches)
    x = x + positions.astype(x.dtype)
    shape = (1, 1, self.width)
    token = self.param("cls_token", nn.initializers.normal(0.02), shape)
    token = add_class_row(self, token).astype(x.dtype)
    token = jnp.broadcast_to(token, (len(x), 1, self.width))
    x = jnp.concatenate([token, x], axis=1)
    fields = dict(
      num_heads=self.num_heads,
      mlp_ratio=self.mlp_ratio,
      dtype=self.dtype,
      norm_epsilon=self.norm_epsilon,
    )
    factors, shape = None, (len(x), self.depth, 2)
    if drop_noise is not None:
      if drop_noise.shape != shape:
        raise ValueError(
          f"drop_noise has shape {drop_noise.shape}; it needs one value for "
          f"each of the (images, blocks, branches) = {shape}."
        )
      factors = drop_factors(drop_noise, self.drop_path)
    x = transformer(self, x, self.depth, fields, self.execution, factors)
    if not self.final_norm:
      return x
    return layers.LayerNorm(self.dtype, self.norm_epsilon, name="norm")(x)
