import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from umae_jax.models import patches

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"


@pytest.mark.parametrize(
  "name, side", [("dim32_grid4", 4), ("dim192_grid14", 14)]
)
def test_positions_equal_the_released_tables(name, side):
  table = np.load(REFERENCE / "pos_embed.npz")[name]
  got = patches.sincos_positions((side, side), table.shape[1])
  assert got.dtype == np.float32
  np.testing.assert_allclose(got[0], table[1:], atol=1e-6)  # Without class row.


def test_positions_of_a_wide_grid_are_rows_and_columns_of_square_ones():
  """Row r, column c is encoded alike whatever the grid's extent."""
  square = patches.sincos_positions((5, 5), 16).reshape(5, 5, 16)
  wide = patches.sincos_positions((2, 5), 16).reshape(2, 5, 16)
  np.testing.assert_array_equal(wide, square[:2])
  assert len(np.unique(wide.reshape(10, 16).round(6), axis=0)) == 10


def test_a_width_that_cannot_hold_positions_is_refused():
  with pytest.raises(ValueError, match=r"width=30.*multiple of 4"):
    patches.sincos_positions((2, 2), 30)


@pytest.mark.parametrize("shape, p", [((2, 8, 12, 3), 4), ((1, 6, 2, 5), 2)])
def test_unpatchify_inverts_patchify(shape, p):
  images = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
  cut = patches.patchify(images, p)
  assert cut.shape == (shape[0], shape[1] * shape[2] // p**2, p * p * shape[3])
  np.testing.assert_array_equal(patches.unpatchify(cut, p, shape[1:3]), images)


def test_patches_are_in_raster_order_of_row_column_channel():
  images = jnp.arange(2 * 4 * 3).reshape(1, 2, 4, 3)
  second = patches.patchify(images, 2)[0, 1]
  expected = images[0, :, 2:].reshape(-1)  # Rows 0, 1; columns 2, 3; channels.
  np.testing.assert_array_equal(second, expected)
