"""Features of a whole data set, from a jitted encoder, as NumPy."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np


def extract(
  encode: Callable[[jax.Array], jax.Array],
  batches: Iterable[Mapping[str, np.ndarray]],
  to_global: Callable[[Any], Any],
) -> tuple[np.ndarray, np.ndarray]:
  """Encodes all images; the same answer on every process.

  The host stays one batch ahead: it sends the next batch to the device before
  it fetches the features of the last, so that the device does not wait.

  Args:
    encode: jitted, global images (B, ...) -> features (B, D), replicated.
    batches: this process's rows of each global batch: "image", "label" (int)
      and "mask" (bool; False rows are padding and left out). Every process has
      as many batches.
    to_global: makes arrays of the global batch from a dict of these rows.

  Returns:
    features (N, D) float32 and labels (N,) int32, in the order of the batches.

  Raises:
    ValueError: there is no batch, or `encode` leaves its result split.
  """
  running, fetched = None, []
  for batch in batches:
    rows = {key: batch[key] for key in ("image", "label", "mask")}
    following = _encode(encode, to_global(rows))
    if running is not None:
      fetched.append(jax.device_get(running))
    running = following
  if running is None:
    raise ValueError("There are no batches to extract features of.")
  fetched.append(jax.device_get(running))
  features = np.concatenate([f[mask] for f, _, mask in fetched])
  labels = np.concatenate([label[mask] for _, label, mask in fetched])
  return features.astype(np.float32), labels.astype(np.int32)


def _encode(encode, batch):
  """Starts the work on one batch; returns (features, labels, mask)."""
  features = encode(batch["image"])
  if not features.is_fully_replicated:
    raise ValueError(
      f"encode returned features laid out as {features.sharding}; jit it with "
      "replicated out_shardings, so that every process can read all rows."
    )
  replicate = jax.jit(_identity, out_shardings=features.sharding)
  return features, *replicate((batch["label"], batch["mask"]))


def _identity(x):
  return x
