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


def test_positions_are_bit_equal_to_the_released_tables_in_float32():
  """So that a converted table can be dropped, and computed again."""
  table = np.load(REFERENCE / "pos_embed.npz")["dim192_grid14"]
  got = patches.sincos_positions((14, 14), 192)
  assert got.tobytes() == table[None, 1:].astype(np.float32).tobytes()


# Interpolation.


def test_interpolation_equals_the_released_figures():
  figures = np.load(REFERENCE / "pos_embed_interpolation.npz")
  got = patches.resize_positions(figures["before"], (7, 7))
  assert got.dtype == np.float32 and got.shape == figures["after"].shape
  np.testing.assert_array_equal(got[:, 0], figures["before"][:, 0])
  scale = np.abs(figures["after"]).max()
  np.testing.assert_allclose(got, figures["after"], rtol=0, atol=1e-6 * scale)


def test_the_same_grid_is_left_bit_for_bit():
  table = np.random.default_rng(0).normal(size=(1, 7, 3)).astype(np.float32)
  got = patches.resize_positions(table, (2, 3), (2, 3))
  assert got.tobytes() == table.tobytes()


def test_a_constant_stays_and_a_grid_need_not_be_square():
  table = np.ones((1, 7, 2), np.float32)
  got = patches.resize_positions(table, (5, 1), old_grid=(2, 3))
  np.testing.assert_allclose(got, np.ones((1, 6, 2)), rtol=1e-6)
  ramp = np.zeros((1, 13, 1), np.float32)
  ramp[0, 1:, 0] = np.tile(np.arange(6), 2)  # 2 x 6: the column's number.
  got = patches.resize_positions(ramp, (2, 3), (2, 6))[0, 1:, 0].reshape(2, 3)
  np.testing.assert_array_equal(got[0], got[1])  # Rows stay rows.
  np.testing.assert_allclose(got[0, 1], 2.5, rtol=1e-6)  # By symmetry.


def test_a_table_that_is_not_of_that_grid_is_refused():
  with pytest.raises(ValueError, match=r"of 6 patches is not.*2 x 2.*old_grid"):
    patches.resize_positions(np.zeros((1, 7, 2)), (3, 3))
