import jax
import jax.numpy as jnp
import pytest

from umae_jax import doctor, sharding, train_step
from umae_jax.doctor import cost


def compiled_bytes(config, task, mesh):
  """What XLA allocates for the step: its arguments, and all between."""
  state = cost.state(config, mesh, task)
  layout = sharding.state_sharding(state, mesh)
  step = train_step.make_train_step(
    task.objective, task.optimizer, mesh, layout, seed=0
  )
  rows = sharding.batch_sharding(mesh)
  size = (*config.data.image_size, config.data.channels)
  shapes = {"image": (size, jnp.uint8), "label": ((), jnp.int32)}
  batch = {
    key: jax.ShapeDtypeStruct((config.batch_size, *x), dtype, sharding=rows)
    for key, (x, dtype) in shapes.items()
  }
  found = step.lower(state, batch).compile().memory_analysis()
  return found.temp_size_in_bytes + found.argument_size_in_bytes


@pytest.mark.parametrize(
  "name, variant, changes",
  [
    ("digits", "default", {}),
    ("folder", "tiny", {"batch_size": 32}),
    ("folder", "tiny", {"batch_size": 128, "execution.scan_layers": True}),
  ],
)
def test_memory_is_what_the_compiler_allocates(
  load_config, name, variant, changes
):
  config = load_config(name, variant)
  config.update_from_flattened_dict(changes)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  task = doctor.task_without_data(config, mesh)
  memory, limit = cost.memory(config, mesh, task)
  expected = compiled_bytes(config, task, mesh)
  assert sum(memory.values()) == pytest.approx(expected, rel=0.2)
  assert 2**30 < limit < 2**45


def test_memory_follows_the_devices_and_the_parts(load_config):
  config = load_config("folder", "vit_s16")
  config.model.update(depth=4, decoder_depth=3)
  keys = [f"memory: {x}" for x in ("parameters and optimizer", "gradients")]
  keys.append("memory: kept for the gradient")

  def memory(devices, **changes):
    with config.unlocked():
      changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(changes)
    fsdp = changed.mesh.fsdp
    mesh = sharding.make_mesh(fsdp, devices=jax.devices()[:devices])
    task = doctor.task_without_data(changed, mesh)
    return [cost.memory(changed, mesh, task)[0][key] for key in keys]

  one = memory(1)
  assert one[0] == pytest.approx(3 * one[1], rel=1e-3)
  assert memory(8) == [*one[:2], one[2] // 8]
  assert memory(1, micro_batches=4) == [one[0], 2 * one[1], one[2] // 4]
  split = memory(8, **{"mesh.fsdp": 8})
  assert split[0] == pytest.approx(one[0] / 8, rel=0.05)
  assert memory(1, **{"execution.remat": "full"})[2] < one[2] / 5


def test_the_speed_of_products_is_one_of_this_world():
  assert 1e8 < cost.product_speed(jnp.float32, seconds=0.1) < 1e16
