import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from umae_jax.evals import features


def mesh_of(num_devices):
  return jax.make_mesh(
    (num_devices,),
    ("data",),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:num_devices],
  )


def batches_of(num_examples, batch_size):
  """Images whose features are known; the last batch is padded."""
  rng = np.random.default_rng(0)
  images = rng.normal(size=(num_examples, 2, 3)).astype(np.float32)
  labels = rng.integers(0, 9, num_examples)
  batches = []
  for start in range(0, num_examples, batch_size):
    index = np.arange(start, start + batch_size)
    mask = index < num_examples
    row = np.minimum(index, num_examples - 1)
    batch = {"image": images[row], "label": labels[row], "index": index}
    batches.append(batch | {"mask": mask, "id": "x"})
  return images, labels, batches


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("num_examples", [5, 16, 37])
def test_all_examples_in_order_without_padding(num_devices, num_examples):
  mesh = mesh_of(num_devices)
  images, labels, batches = batches_of(num_examples, 16)

  @functools.partial(
    jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec())
  )
  def encode(x):
    return (2 * x.reshape(len(x), -1)).astype(jnp.bfloat16)

  def to_global(batch):
    split = NamedSharding(mesh, PartitionSpec("data"))
    return jax.make_array_from_process_local_data(split, batch)

  x, y, index = features.extract(encode, batches, to_global)
  want = (2 * images.reshape(num_examples, -1)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(x, want.astype(np.float32))
  np.testing.assert_array_equal(y, labels)
  np.testing.assert_array_equal(index, np.arange(num_examples))
  assert x.dtype == np.float32 and y.dtype == np.int32


def test_the_next_batch_is_sent_before_the_last_is_fetched(monkeypatch):
  _, _, batches = batches_of(48, 16)
  events = []

  def encode(x):
    events.append("send")
    return jnp.zeros((len(x), 2))

  fetch = jax.device_get
  monkeypatch.setattr(
    features.jax, "device_get", lambda x: (events.append("fetch"), fetch(x))[1]
  )
  features.extract(
    encode, batches, lambda b: jax.tree.map(jnp.asarray, {k: b[k] for k in b})
  )
  assert events == ["send", "send", "fetch", "send", "fetch", "fetch"]


def test_split_features_are_refused():
  mesh = mesh_of(8)
  split = NamedSharding(mesh, PartitionSpec("data"))
  _, _, batches = batches_of(16, 16)
  encode = jax.jit(lambda x: x.reshape(len(x), -1), out_shardings=split)
  with pytest.raises(ValueError, match="replicated out_shardings"):
    features.extract(encode, batches, lambda b: jax.device_put(b, split))


def test_no_batches_are_refused():
  with pytest.raises(ValueError, match="no batches"):
    features.extract(None, [], None)
