"""Features of a whole data set, from a jitted encoder, as NumPy."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Features(NamedTuple):
  """Of N images.

  Attributes:
    features: (N, D) float32.
    labels: (N,) int32.
    index: (N,) int32, which examples of their source.
  """

  features: np.ndarray
  labels: np.ndarray
  index: np.ndarray


def extract(
  encode: Callable[[jax.Array], jax.Array],
  batches: Iterable[Mapping[str, np.ndarray]],
  to_global: Callable[[Any], Any],
) -> Features:
  """Encodes all images; the same answer on every process.

  The host stays one batch ahead: it sends the next batch to the device before
  it fetches the features of the last, so that the device does not wait.

  Args:
    encode: jitted, global images (B, ...) -> features (B, D), replicated.
    batches: this process's rows of each global batch: "image", "label" and
      "index" (int) and "mask" (bool; False rows are padding and left out).
      Every process has as many batches.
    to_global: makes arrays of the global batch from a dict of these rows.

  Returns:
    Of the rows that are no padding, in the order of the batches.

  Raises:
    ValueError: there is no batch, or `encode` leaves its result split.
  """
  running, fetched = None, []
  for batch in batches:
    rows = {key: batch[key] for key in ("image", "label", "index", "mask")}
    following = _encode(encode, to_global(rows))
    if running is not None:
      fetched.append(jax.device_get(running))
    running = following
  if running is None:
    raise ValueError("There are no batches to extract features of.")
  fetched.append(jax.device_get(running))
  masked = [[x[mask] for x in rest] for *rest, mask in fetched]
  features, labels, index = map(np.concatenate, zip(*masked, strict=True))
  return Features(
    features.astype(np.float32), labels.astype(np.int32), index.astype(np.int32)
  )


def _encode(encode, batch):
  """Starts the work on one batch: (features, labels, index, mask)."""
  features = encode(batch["image"])
  if not features.is_fully_replicated:
    raise ValueError(
      f"encode returned features laid out as {features.sharding}; jit it with "
      "replicated out_shardings, so that every process can read all rows."
    )
  replicate = jax.jit(_identity, out_shardings=features.sharding)
  rest = (batch[key] for key in ("label", "index", "mask"))
  return features, *replicate(tuple(rest))


def _identity(x):
  return x
