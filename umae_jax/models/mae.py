"""The masked autoencoder: encode what is visible, predict what is not."""

from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from umae_jax.models import layers, masking, vit
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


class Removed(NamedTuple):
  """What training needs of a masked autoencoder.

  Attributes:
    prediction: (B, L - K, P) float32, of the removed patches alone, in the
      order of their noise.
    target: (B, L - K, P) float32, the same patches of the images.
    tokens: as of `Output`.
  """

  prediction: jax.Array
  target: jax.Array
  tokens: jax.Array


class Decoder(nn.Module):
  """MAE's decoder: a narrow ViT over visible tokens and mask tokens.

  It takes them in the order of their noise, whatever their place: a block
  tells tokens apart by their positions alone, which are added here.
  """

  width: int
  depth: int
  num_heads: int
  mlp_ratio: float = 4.0
  dtype: layers.Dtype = None
  norm_epsilon: float = layers.NORM_EPSILON
  execution: vit.Execution = vit.Execution()

  @nn.compact
  def __call__(
    self, tokens: jax.Array, positions: jax.Array, last: int, values: int
  ) -> jax.Array:
    """Predicts the patches of the largest noise.

    Args:
      tokens: (B, 1 + K, D), the encoder's.
      positions: (B, L, E), of all patches in the order of their noise.
      last: patches to predict: L - K are the removed ones, L are all.
      values: P.

    Returns:
      (B, `last`, P) in the order of the noise.
    """
    x = layers.dense(self.width, self.dtype, "embed")(tokens)
    batch, patches, _ = positions.shape
    shape = (1, 1, self.width)
    token = self.param("mask_token", nn.initializers.normal(0.02), shape)
    removed = (batch, patches + 1 - tokens.shape[1], self.width)
    token = jnp.broadcast_to(token.astype(x.dtype), removed)
    y = jnp.concatenate([x[:, 1:], token], axis=1)  # (B, L, E)
    y = y + positions.astype(y.dtype)
    x = jnp.concatenate([vit.add_class_row(self, x[:, :1]), y], axis=1)
    fields = dict(
      num_heads=self.num_heads,
      mlp_ratio=self.mlp_ratio,
      dtype=self.dtype,
      norm_epsilon=self.norm_epsilon,
    )
    x = vit.transformer(self, x, self.depth, fields, self.execution, last=last)
    x = layers.LayerNorm(self.dtype, self.norm_epsilon, name="norm")(x)
    x = layers.dense(values, self.dtype, "pred")(x.reshape(-1, self.width))
    return x.reshape(batch, last, values)


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
  dtype: layers.Dtype = None
  norm_epsilon: float = layers.NORM_EPSILON
  execution: vit.Execution = vit.Execution()  # Of the encoder.
  decoder_execution: vit.Execution = vit.Execution()

  def setup(self):
    """Two transformers; each sees positions of its own width."""
    self.encoder = vit.Encoder(
      self.width,
      self.depth,
      self.num_heads,
      self.mlp_ratio,
      self.dtype,
      norm_epsilon=self.norm_epsilon,
      execution=self.execution,
    )
    self.decoder = Decoder(
      self.decoder_width,
      self.decoder_depth,
      self.decoder_num_heads,
      self.mlp_ratio,
      self.dtype,
      self.norm_epsilon,
      self.decoder_execution,
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
    tokens, _, split = self._encode_visible(images, noise, mask_ratio)
    prediction = self._decode(images, tokens, split, noise.shape[1])
    prediction = masking.permute(prediction, split.restore, split.shuffle)
    tokens, prediction = (x.astype(jnp.float32) for x in (tokens, prediction))
    return Output(prediction, split.mask, tokens)

  def predict_removed(
    self, images: jax.Array, noise: jax.Array, mask_ratio: float = 0.75
  ) -> Removed:
    """`__call__` without what the loss does not look at, for training."""
    tokens, removed, split = self._encode_visible(images, noise, mask_ratio)
    prediction = self._decode(images, tokens, split, removed.shape[1])
    return Removed(
      *(x.astype(jnp.float32) for x in (prediction, removed, tokens))
    )

  def encode_visible(
    self, images: jax.Array, noise: jax.Array, mask_ratio: float = 0.75
  ) -> jax.Array:
    """`tokens` of `__call__`, (B, 1 + K, D) float32, without the decoder."""
    tokens, _, _ = self._encode_visible(images, noise, mask_ratio)
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
    # Raw patches are gathered, so that only visible ones are projected.
    shuffled = masking.take(patches, split.shuffle)
    positions = positions[0][split.shuffle[:, :visible]]
    tokens = self.encoder(shuffled[:, :visible], positions)
    return tokens, shuffled[:, visible:], split

  def _decode(self, images, tokens, split, last):
    grid = patches_lib.grid_shape(images.shape[1:3], self.patch_size)
    positions = vit.positions(self.decoder, grid, self.decoder_width)[0]
    values = self.patch_size**2 * images.shape[-1]
    return self.decoder(tokens, positions[split.shuffle], last, values)

  def _patches_and_positions(self, images):
    grid = patches_lib.grid_shape(images.shape[1:3], self.patch_size)
    patches = patches_lib.patchify(images, self.patch_size)
    return patches, self.encoder.positions(grid)
