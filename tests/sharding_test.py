import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from umae_jax import sharding


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_batch_rows_are_split_over_all_devices_in_order(fsdp):
  mesh = sharding.make_mesh(fsdp)
  rows = np.arange(16)[:, None]
  array = sharding.to_global(rows, mesh)
  assert {shard.data.shape for shard in array.addressable_shards} == {(2, 1)}
  np.testing.assert_array_equal(array, rows)


@pytest.mark.parametrize(
  "shape, expected",
  [
    ((512, 256), PartitionSpec("fsdp")),
    ((256, 512), PartitionSpec(None, "fsdp")),
    ((255, 514), PartitionSpec()),  # Neither divides by 4.
    ((254, 512), PartitionSpec(None, "fsdp")),
    ((64, 64), PartitionSpec()),  # Small.
  ],
)
def test_large_arrays_are_split_along_their_largest_dimension(shape, expected):
  tree = {"x": jax.ShapeDtypeStruct(shape, jnp.float32)}
  layout = sharding.state_sharding(tree, sharding.make_mesh(4))
  assert layout["x"].spec == expected


def test_nothing_is_split_without_fsdp():
  tree = {"x": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
  layout = sharding.state_sharding(tree, sharding.make_mesh(1))
  assert layout["x"].spec == PartitionSpec()
