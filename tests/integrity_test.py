import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from umae_jax import integrity


def checksum_reference(x):
  """The definition, element by element in Python integers."""
  x = np.asarray(x)
  if x.dtype == np.bool_:
    x = x.astype(np.uint8)
  total = 0
  words = x.reshape(-1).view(f"u{min(4, x.dtype.itemsize)}")
  for position, word in enumerate(words.tolist(), 1):
    h = word ^ (position * 0x9E3779B9 % 2**32)
    h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
    total += h ^ (h >> 16)
  return total % 2**32


def place(x, num_devices, sharded):
  """Lays an array out over devices, split along the first axis or whole."""
  mesh = jax.make_mesh(
    (num_devices,),
    ("data",),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:num_devices],
  )
  spec = PartitionSpec("data") if sharded else PartitionSpec()
  return jax.device_put(x, NamedSharding(mesh, spec))


ARRAYS = [
  np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32),
  np.random.default_rng(0).normal(size=(64, 4)).astype(jnp.bfloat16),
  np.random.default_rng(0).normal(size=(8,)).astype(np.float16),
  np.array([[True], [False]]),
  np.int32(-7),
  np.arange(-3, 9, dtype=np.int8),
  np.zeros((0, 3), np.float32),
]


@pytest.mark.parametrize("x", ARRAYS, ids=lambda x: f"{x.dtype}{x.shape}")
def test_checksum_matches_the_reference(x):
  assert int(integrity.checksum(x)) == checksum_reference(x)


def test_checksum_of_64_bits():
  x = np.random.default_rng(0).normal(size=(4, 3))
  with jax.enable_x64(True):
    for array in (x, x.view(np.int64)):
      got = integrity.checksum(jnp.asarray(array))
      assert int(got) == checksum_reference(x)


def test_checksum_does_not_depend_on_the_devices():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
  sums = {
    int(integrity.checksum(place(x, n, sharded)))
    for n in (1, 2, 8)
    for sharded in (True, False)
  }
  assert sums == {checksum_reference(x)}


def test_checksum_notices_one_bit_swaps_and_lost_zeros():
  x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
  x[1] = -x[0]  # Rows that differ in the sign bit alone.
  others = [x[[1, 0, 2, 3, 4, 5, 6, 7]], x[::-1], x.T.reshape(8, 4)]
  for bit in range(32):
    flipped = x.copy()
    flipped.view(np.uint32)[3, 2] ^= np.uint32(1 << bit)
    others.append(flipped)
  sums = {int(integrity.checksum(y)) for y in [x, *others]}
  assert len(sums) == 1 + len(others)
  assert int(integrity.checksum(np.float32(0))) != 0


def test_a_manifest_is_verified():
  manifest = integrity.manifest({"a": {"b": np.arange(3, dtype=np.int32)}})
  leaves = integrity.verified(manifest)
  assert leaves == {
    "a/b": [[3], "int32", checksum_reference(np.arange(3, dtype=np.int32))]
  }
  leaves["a/b"][2] += 1
  for bad in (manifest, None, {}):
    with pytest.raises(ValueError, match="no checksums, or damaged ones"):
      integrity.verified(bad)
