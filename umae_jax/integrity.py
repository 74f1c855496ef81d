"""Checksums of trees of arrays: so that damage is noticed when read."""

import functools
import json
from typing import Any
import zlib

import jax
import jax.numpy as jnp


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
  """Checksum of the bits of an array, wherever its shards live.

  The bits of each element, mixed with its position by a one-to-one function
  of uint32, are summed modulo 2^32. So any change of one element changes the
  sum; swaps and other changes escape with probability 2^-32.

  Args:
    x: any shape; bool, integer or real, of 8, 16, 32 or 64 bits.

  Returns:
    () uint32, the same for every sharding and number of devices.

  Source: the mixing is the finalizer of MurmurHash3 (Appleby 2011).
  """
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  unsigned = jnp.dtype(f"uint{min(32, 8 * x.dtype.itemsize)}")
  # Of a 64-bit number this makes two, on a new last axis.
  bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  position = jnp.uint32(0)
  for axis, size in enumerate(bits.shape):  # Row-major, modulo 2^32.
    index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    position = position * jnp.uint32(size) + index
  # From 1, for zeros at position 0 must not count as nothing.
  h = bits ^ ((position + jnp.uint32(1)) * jnp.uint32(0x9E3779B9))
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


def describe(tree: Any) -> dict[str, list]:
  """Returns {key of leaf: [shape, dtype]} as JSON has it, in tree order."""
  key = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {key(path): [list(x.shape), str(x.dtype)] for path, x in leaves}


def fingerprint(state: Any) -> dict[str, list]:
  """Returns {key of leaf: [shape, dtype, checksum]}, in tree order."""
  checksums = jax.device_get([checksum(x) for x in jax.tree.leaves(state)])
  return {
    key: [*leaf, int(value)]
    for (key, leaf), value in zip(describe(state).items(), checksums)
  }


def manifest(tree: Any) -> dict[str, Any]:
  """What `verified` gives the fingerprint back of; values of JSON's."""
  leaves = fingerprint(tree)
  return {"leaves": leaves, "crc32": crc32(leaves)}


def verified(manifest: dict[str, Any] | None) -> dict[str, list]:
  """The fingerprint in a manifest.

  Raises:
    ValueError: the manifest is missing or damaged.
  """
  if not manifest or manifest["crc32"] != crc32(manifest["leaves"]):
    raise ValueError("no checksums, or damaged ones, in its metadata")
  return manifest["leaves"]


def crc32(value: Any) -> int:
  """CRC-32 of a value of JSON's, as JSON."""
  return zlib.crc32(json.dumps(value).encode())


def show(leaf: list | None) -> str:
  """`float32[2, 3]`, or `absent`."""
  return "absent" if leaf is None else f"{leaf[1]}{leaf[0]}"
