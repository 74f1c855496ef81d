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


def resize_positions(
  table: np.ndarray,
  grid: tuple[int, int],
  old_grid: tuple[int, int] | None = None,
) -> np.ndarray:
  """Interpolates position embeddings to another grid of patches.

  Bicubic (a = -0.75), borders clamped, no antialiasing: what PyTorch's
  `interpolate(mode="bicubic", align_corners=False)` does, which MAE uses.

  Args:
    table: (1, 1 + L, D), the class token's row first.
    grid: the new patches per column and per row.
    old_grid: the table's; square if not given.

  Returns:
    (1, 1 + L', D) of the table's dtype; the class token's row is kept.

  Raises:
    ValueError: L is not a square, or not that of `old_grid`.

  Source: Keys 1981, cubic convolution; He et al. 2021 for its use.
  """
  length, width = table.shape[1] - 1, table.shape[2]
  if old_grid is None:
    old_grid = (round(length**0.5),) * 2
  if old_grid[0] * old_grid[1] != length:
    raise ValueError(
      f"A table of {length} patches is not one of a grid of {old_grid[0]} x "
      f"{old_grid[1]}; give its old_grid."
    )
  rows, columns = map(_cubic_matrix, old_grid, grid)
  old = table[0, 1:].astype(np.float64).reshape(*old_grid, width)
  new = np.einsum("ri,cj,ijd->rcd", rows, columns, old, optimize=True)
  new = new.reshape(1, -1, width).astype(table.dtype)
  return np.concatenate([table[:, :1], new], axis=1)


def _cubic_matrix(old: int, new: int) -> np.ndarray:
  """(new, old) weights of cubic convolution along one axis."""
  matrix = np.zeros((new, old))
  centers = (np.arange(new) + 0.5) * old / new - 0.5
  for i, center in enumerate(centers):
    for j in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
      x = abs(center - j)
      near = (1.25 * x - 2.25) * x * x + 1
      far = -0.75 * (((x - 5) * x + 8) * x - 4)
      matrix[i, min(max(j, 0), old - 1)] += near if x <= 1 else far
  return matrix
