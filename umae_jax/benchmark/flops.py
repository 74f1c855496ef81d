"""Arithmetic of a training step, by formula, and what devices can do."""

import ml_collections


def per_image(config: ml_collections.ConfigDict) -> float:
  """FLOP of a run for each image, as below; of training, if it trains."""
  model = config.model
  encoder = dict(
    image_size=tuple(config.data.image_size),
    channels=config.data.channels,
    patch_size=model.patch_size,
    width=model.width,
    depth=model.depth,
    mlp_ratio=model.mlp_ratio,
  )
  if config.task == "pretrain":
    return train_flops(
      **encoder,
      decoder_width=model.decoder_width,
      decoder_depth=model.decoder_depth,
      mask_ratio=config.loss.mask_ratio,
    )
  passes = 3 if config.task == "finetune" and config.num_epochs else 1
  return passes * encode_flops(**encoder)


def train_flops(
  *,
  image_size: tuple[int, int],
  channels: int,
  patch_size: int,
  width: int,
  depth: int,
  decoder_width: int,
  decoder_depth: int,
  mask_ratio: float,
  mlp_ratio: float = 4.0,
) -> float:
  """Model FLOP of a pretraining step, per image.

  Multiply and add count as two. Matrix products alone are counted: forward
  once, backward twice; of the projection of raw patches, which have no
  gradient, once. All L patches are counted there and in the decoder, though
  less may be computed: this is what the model needs as published, and the
  measure by which runs are compared.

  Args:
    image_size: (H, W) in pixels.
    channels: C.
    patch_size: p.
    width: D.
    depth: blocks of the encoder.
    decoder_width: E.
    decoder_depth: blocks of the decoder.
    mask_ratio: fraction of the patches removed.
    mlp_ratio: hidden units of a block per unit of its width.

  Returns:
    FLOP per image; ViT-B/16 at 224 pixels and ratio 0.75: 58.46e9.
  """
  patches = image_size[0] * image_size[1] // patch_size**2  # L
  values = patch_size**2 * channels  # P
  visible = int(patches * (1 - mask_ratio))  # K
  projection = patches * values * width
  rest = (
    depth * _block(visible + 1, width, mlp_ratio)
    + (visible + 1) * width * decoder_width
    + decoder_depth * _block(patches + 1, decoder_width, mlp_ratio)
    + (patches + 1) * decoder_width * values
  )
  return 2.0 * (3 * rest + 2 * projection)


def encode_flops(
  *,
  image_size: tuple[int, int],
  channels: int,
  patch_size: int,
  width: int,
  depth: int,
  mlp_ratio: float = 4.0,
) -> float:
  """FLOP of encoding a whole image, forward; arguments as `train_flops`."""
  patches = image_size[0] * image_size[1] // patch_size**2  # L
  projection = patches * patch_size**2 * channels * width
  return 2.0 * (projection + depth * _block(patches + 1, width, mlp_ratio))


def _block(tokens, width, mlp_ratio):
  """Products of a block: 12 n d^2 + 2 n^2 d, for mlp_ratio 4."""
  return (4 + 2 * mlp_ratio) * tokens * width**2 + 2 * tokens**2 * width


# FLOP/s of dense bfloat16 products, by a part of JAX's device_kind: those of
# the data sheets.
_BFLOAT16_PEAKS = {
  "H200": 989e12,
  "H100 80GB": 989e12,  # SXM.
  "A100": 312e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5p": 459e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
}


def known_peak(device_kind: str, dtype: str) -> float | None:
  """FLOP/s of a device, None if not known here.

  Args:
    device_kind: as JAX calls it, such as "NVIDIA H200".
    dtype: of the matrix products; only "bfloat16" is known.
  """
  if dtype != "bfloat16":
    return None
  for name, peak in _BFLOAT16_PEAKS.items():
    if name in device_kind:
      return peak
  return None
