import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umae_jax import UserError, models, sharding
from umae_jax.tasks import inputs


def test_normalize_maps_uint8_to_zero_mean_and_unit_deviation():
  images = jnp.array([0, 255], jnp.uint8).reshape(1, 1, 1, 2)
  got = inputs.normalize(images, (0.5, 0.25), (0.5, 0.25))
  np.testing.assert_allclose(got.ravel(), [-1, 3])


def test_auto_dtype_is_float32_on_a_cpu(config):
  mesh = sharding.make_mesh()
  assert inputs.compute_dtype(config, mesh) == jnp.float32
  config.model.dtype = "bfloat16"
  assert inputs.compute_dtype(config, mesh) == jnp.bfloat16


def test_facts_tell_weights_apart():
  model = models.MaskedAutoencoder(*(8, 32, 2, 4, 16, 1, 2), norm_epsilon=0.5)
  tree = {"a": np.arange(3.0), "b": [np.ones(2)]}
  other = {"a": np.arange(3.0), "b": [np.ones(2) + 1e-7]}
  facts = inputs.facts(model, tree)
  assert facts == inputs.facts(model, dict(tree))
  assert facts != inputs.facts(model, other)
  assert facts["norm_epsilon"] == 0.5


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"model.patch_size": 4}, r"patch_size=4, there 8\. Set these keys"),
    ({"data.channels": 1}, "data.channels=1, there 3"),
    ({"pretrained": "/no/such/file.pth"}, "/no/such/file.pth"),
  ],
)
def test_weights_of_another_encoder_are_refused(config, changes, message):
  config.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=message):
    inputs.load_pretrained(config, sharding.make_mesh())


def test_cudnn_is_refused_where_there_is_none(config):
  mesh = sharding.make_mesh()
  config.execution.attention = "xla,cudnn"
  assert inputs.execution(config, mesh, 5).attention == "xla"
  with pytest.raises(
    UserError, match=r"attention='xla,cudnn'.*float32.*'auto'"
  ):
    inputs.execution(config, mesh, 5, "decoder_")


def test_a_loaded_encoder_is_computed_as_asked(config):
  config.execution.update(remat="full", scan_layers=True)
  model, params = inputs.load_pretrained(config, sharding.make_mesh())
  assert inputs.facts(model, params)["attention"] == "xla"
  images = jnp.ones((1, 32, 32, 3))
  encode = functools.partial(model.apply, method=model.encode)
  jaxpr = str(jax.make_jaxpr(encode)({"params": params}, images))
  assert " scan[" in jaxpr
