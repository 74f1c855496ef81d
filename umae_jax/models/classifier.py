"""A ViT that classifies: what fine-tuning trains."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from umae_jax.models import layers, vit
from umae_jax.models import patches as patches_lib

POOLS = ("cls", "mean")


class Classifier(nn.Module):
  """MAE's encoder with a linear head, and position embeddings that train.

  Its parameters are "encoder", as `MaskedAutoencoder` has it plus `pos_embed`
  (1, 1 + L, D), which starts as the fixed table; "fc_norm" if pool is "mean";
  and "head".

  Attributes:
    patch_size: p.
    width: D.
    depth: number of blocks.
    num_heads: of a block.
    num_classes: of the head.
    pool: what the head sees: "cls", the class token after the final LayerNorm,
      or "mean", the mean of the patch tokens, without the encoder's LayerNorm
      and with its own (MAE's `global_pool`).
    mlp_ratio: hidden width of a block's perceptron, in D.
    drop_path: rate of stochastic depth at the last block, in [0, 1).
    dtype: of the encoder's matrix products; all else is float32.
    norm_epsilon: of every LayerNorm.
    execution: how it is computed.
  """

  patch_size: int
  width: int
  depth: int
  num_heads: int
  num_classes: int
  pool: str
  mlp_ratio: float = 4.0
  drop_path: float = 0.0
  dtype: layers.Dtype = None
  norm_epsilon: float = layers.NORM_EPSILON
  execution: vit.Execution = vit.Execution()

  def setup(self):
    """Encoder, LayerNorm of the mean, head."""
    if self.pool not in POOLS:
      raise ValueError(f"pool={self.pool!r} is not one of {POOLS}.")
    self.encoder = vit.Encoder(
      self.width,
      self.depth,
      self.num_heads,
      self.mlp_ratio,
      self.dtype,
      self.drop_path,
      final_norm=self.pool == "cls",
      train_positions=True,
      norm_epsilon=self.norm_epsilon,
      execution=self.execution,
    )
    self.fc_norm = layers.LayerNorm(epsilon=self.norm_epsilon)
    # MAE truncates at -2 and 2, a hundred thousand deviations: not at all.
    initializer = nn.initializers.normal(2e-5)
    self.head = nn.Dense(self.num_classes, kernel_init=initializer)

  def __call__(
    self, images: jax.Array, drop_noise: jax.Array | None = None
  ) -> jax.Array:
    """Classifies whole images.

    Args:
      images: (B, H, W, C) float, already normalised.
      drop_noise: (B, depth, 2) uniform in [0, 1), one value for each image,
        block and residual branch; None: nothing is dropped.

    Returns:
      (B, num_classes) float32 logits.

    Raises:
      ValueError: patches do not divide the image, it does not fit `pos_embed`,
        the noise has another shape, or there is no such pool.
    """
    tokens = self.encode(images, drop_noise)
    if self.pool == "cls":
      return self.head(tokens[:, 0])
    return self.head(self.fc_norm(tokens[:, 1:].mean(axis=1)))

  def encode(
    self, images: jax.Array, drop_noise: jax.Array | None = None
  ) -> jax.Array:
    """(B, 1 + L, D) float32: class token, then the patches in raster order.

    After the encoder's final LayerNorm, which pool "mean" does not have.
    """
    grid = patches_lib.grid_shape(images.shape[1:3], self.patch_size)
    patches = patches_lib.patchify(images, self.patch_size)
    positions = self.encoder.positions(grid)
    return self.encoder(patches, positions, drop_noise).astype(jnp.float32)
