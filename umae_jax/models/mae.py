"""The masked autoencoder: encode what is visible, predict what is not."""

from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from umae_jax.models import masking, vit
from umae_jax.models import patches as patches_lib


class Output(NamedTuple):
  """What a masked autoencoder returns.

  Attributes:
    prediction: (B, L, P) float32, every patch in raster order; only those of
      the removed patches are trained.
    mask: (B, L) float32, 1 = removed.
    tokens: (B, 1 + K, D) float32: class token, then the visible patches in
      the order of their noise, after the encoder's final LayerNorm.
  """

  prediction: jax.Array
  mask: jax.Array
  tokens: jax.Array


class Decoder(nn.Module):
  """MAE's decoder: a narrow ViT over visible tokens and mask tokens."""

  width: int
  depth: int
  num_heads: int
  mlp_ratio: float = 4.0
  dtype: vit.Dtype = None
  norm_epsilon: float = vit.NORM_EPSILON

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    split: masking.Masking,
    positions: jax.Array,
    patch_values: int,
  ) -> jax.Array:
    """Predicts all patches from the visible ones.

    Args:
      tokens: (B, 1 + K, D), the encoder's.
      split: which L patches were visible.
      positions: (1, L, E).
      patch_values: P.

    Returns:
      (B, L, P) in raster order.
    """
    x = vit.dense(self.width, self.dtype, "embed")(tokens)
    batch, num_patches = split.mask.shape
    shape = (1, 1, self.width)
    token = self.param("mask_token", nn.initializers.normal(0.02), shape)
    removed = (batch, num_patches + 1 - tokens.shape[1], self.width)
    token = jnp.broadcast_to(token.astype(x.dtype), removed)
    y = jnp.concatenate([x[:, 1:], token], axis=1)  # (B, L, E), noise order
    y = masking.permute(y, split.restore, split.shuffle)  # raster order
    y = y + positions.astype(y.dtype)
    x = jnp.concatenate([vit.add_class_row(self, x[:, :1]), y], axis=1)
    epsilon = self.norm_epsilon
    size = (self.depth, self.num_heads, self.mlp_ratio, self.dtype)
    x = vit.transformer(x, *size, norm_epsilon=epsilon)
    x = vit.layer_norm(self.dtype, "norm", epsilon)(x)
    return vit.dense(patch_values, self.dtype, "pred")(x)[:, 1:]


class MaskedAutoencoder(nn.Module):
  """MAE (He et al. 2021, arXiv:2111.06377) on images of any size.

  Parameters are float32; `dtype` is that of the matrix products (LayerNorm
  statistics, softmax and everything returned are float32). Positions are fixed;
  where the parameters hold a `pos_embed` (of a converted checkpoint) in
  "encoder" or "decoder", that is used instead.
  """

  patch_size: int
  width: int
  depth: int
  num_heads: int
  decoder_width: int
  decoder_depth: int
  decoder_num_heads: int
  mlp_ratio: float = 4.0
  dtype: vit.Dtype = None
  norm_epsilon: float = vit.NORM_EPSILON

  def setup(self):
    """Two transformers; each sees positions of its own width."""
    self.encoder = vit.Encoder(
      self.width,
      self.depth,
      self.num_heads,
      self.mlp_ratio,
      self.dtype,
      norm_epsilon=self.norm_epsilon,
    )
    self.decoder = Decoder(
      self.decoder_width,
      self.decoder_depth,
      self.decoder_num_heads,
      self.mlp_ratio,
      self.dtype,
      self.norm_epsilon,
    )

  def __call__(
    self, images: jax.Array, noise: jax.Array, mask_ratio: float = 0.75
  ) -> Output:
    """Removes patches, encodes the rest, predicts all.

    Args:
      images: (B, H, W, C) float, already normalised.
      noise: (B, L) float; the K patches of the smallest noise stay visible.
      mask_ratio: fraction of the patches to remove; K = int(L * (1 - it)).

    Raises:
      ValueError: patches do not divide the image, the noise has another
        shape, or the ratio leaves no visible or no removed patch.
    """
    tokens, split = self._encode_visible(images, noise, mask_ratio)
    grid = patches_lib.grid_shape(images.shape[1:3], self.patch_size)
    prediction = self.decoder(
      tokens,
      split,
      vit.positions(self.decoder, grid, self.decoder_width),
      self.patch_size**2 * images.shape[-1],
    )
    tokens, prediction = (x.astype(jnp.float32) for x in (tokens, prediction))
    return Output(prediction, split.mask, tokens)

  def encode_visible(
    self, images: jax.Array, noise: jax.Array, mask_ratio: float = 0.75
  ) -> jax.Array:
    """`tokens` of `__call__`, (B, 1 + K, D) float32, without the decoder."""
    tokens, _ = self._encode_visible(images, noise, mask_ratio)
    return tokens.astype(jnp.float32)

  def encode(self, images: jax.Array) -> jax.Array:
    """Encodes whole images, without masking.

    Args:
      images: (B, H, W, C) float, already normalised.

    Returns:
      (B, 1 + L, D) float32: class token, then all patches in raster order.
    """
    patches, positions = self._patches_and_positions(images)
    return self.encoder(patches, positions).astype(jnp.float32)

  def _encode_visible(self, images, noise, mask_ratio):
    patches, positions = self._patches_and_positions(images)
    if noise.shape != patches.shape[:2]:
      raise ValueError(
        f"noise has shape {noise.shape}; it needs one value for each of the "
        f"(images, patches) = {patches.shape[:2]}."
      )
    visible = masking.num_visible(noise.shape[1], mask_ratio)
    split = masking.from_noise(noise, visible)
    kept = split.shuffle[:, :visible]
    # Raw patches are gathered, so that only visible ones are projected.
    tokens = self.encoder(masking.take(patches, kept), positions[0][kept])
    return tokens, split

  def _patches_and_positions(self, images):
    grid = patches_lib.grid_shape(images.shape[1:3], self.patch_size)
    patches = patches_lib.patchify(images, self.patch_size)
    return patches, self.encoder.positions(grid)
