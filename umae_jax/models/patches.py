"""Images to patch vectors and back, and where a patch sits."""

import jax
import numpy as np


def grid_shape(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
  """Patches per column and per row of an image, (H / p, W / p).

  Raises:
    ValueError: a side is not a multiple of the patch size.
  """
  height, width = image_size
  if height % patch_size or width % patch_size:
    raise ValueError(
      f"An image of {height} x {width} pixels does not divide into patches "
      f"of patch_size={patch_size}; resize it to multiples of {patch_size}."
    )
  return height // patch_size, width // patch_size


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
  """Cuts images into patch vectors, (B, H, W, C) -> (B, L, P).

  Patches are in raster order; the values of one are ordered (row, column,
  channel), as in MAE's `patchify`, so that predictions agree element by
  element.
  """
  batch, height, width, channels = images.shape
  rows, columns = grid_shape((height, width), patch_size)
  x = images.reshape(batch, rows, patch_size, columns, patch_size, channels)
  x = x.swapaxes(2, 3)  # (B, rows, columns, p, p, C)
  return x.reshape(batch, rows * columns, patch_size**2 * channels)


def unpatchify(
  patches: jax.Array, patch_size: int, image_size: tuple[int, int]
) -> jax.Array:
  """The inverse of `patchify`, (B, L, P) -> (B, H, W, C)."""
  batch, _, values = patches.shape
  height, width = image_size
  rows, columns = grid_shape(image_size, patch_size)
  channels = values // patch_size**2
  x = patches.reshape(batch, rows, columns, patch_size, patch_size, channels)
  x = x.swapaxes(2, 3)  # (B, rows, p, columns, p, C)
  return x.reshape(batch, height, width, channels)


def sincos_positions(grid: tuple[int, int], width: int) -> np.ndarray:
  """Fixed 2-D sine-cosine position embeddings, (1, L, `width`) float32.

  The first half of a row encodes the patch's column, the second its row; each
  half is [sin, cos] of position / 10000^(2i/width'), as in MAE.

  Args:
    grid: patches per column and per row, (H / p, W / p).
    width: of a token; a multiple of 4.

  Raises:
    ValueError: the width is not a multiple of 4.

  Source: He et al. 2021 (arXiv:2111.06377), which follows MoCo v3.
  """
  if width % 4:
    raise ValueError(
      f"width={width} cannot hold 2-D sine-cosine positions (sine and cosine "
      "of a row and of a column); use a multiple of 4."
    )
  frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
  rows, columns = np.indices(grid).reshape(2, -1, 1) * frequencies  # (L, D/4)
  halves = [np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)]
  return np.concatenate(halves, axis=-1).astype(np.float32)[None]
