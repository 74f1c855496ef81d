"""Every claim of `checkpoint`, on real Orbax folders."""

import functools
import gc
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from umae_jax import UserError, checkpoint, integrity

# TensorStore answers into the event loop that Orbax closed on the first error.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def collect():
  """What Orbax has left of damaged files is told here, not in a later test."""
  yield
  gc.collect()


REPOSITORY = pathlib.Path(__file__).parents[1]


class State(NamedTuple):
  step: Any
  params: Any
  opt_state: Any


def make_state(step=0, width=16):
  """A state of every kind of leaf, different at every step."""
  rng = np.random.default_rng(step)
  kernel = rng.normal(size=(8, width)).astype(np.float32)
  params = {
    "block": {"kernel": kernel, "bias": np.zeros(width, np.float32)},
    "half": jnp.asarray(rng.normal(size=(16, 2)), jnp.bfloat16),
    "flags": rng.random(8) < 0.5,
    "bytes": rng.integers(0, 256, (8, 3), np.uint8),
  }
  opt_state = optax.chain(optax.clip(1.0), optax.adam(0.1)).init(
    params["block"]
  )
  state = State(np.int32(step), params, opt_state)
  return jax.tree.map(jnp.asarray, state)


def place(state, num_devices, sharded=True):
  """Lays a state out over devices, split along the first axis if it divides."""
  mesh = jax.make_mesh(
    (num_devices,),
    ("data",),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:num_devices],
  )

  def put(x):
    divides = sharded and x.ndim and x.shape[0] % num_devices == 0 and x.size
    spec = PartitionSpec("data") if divides else PartitionSpec()
    return jax.device_put(x, NamedSharding(mesh, spec))

  return jax.tree.map(put, state)


def save_steps(folder, steps, **options):
  with checkpoint.open_checkpoints(folder, **options) as checkpoints:
    for step in steps:
      checkpoints.save(step, make_state(step))


def restore(folder, template=None):
  template = make_state() if template is None else template
  with checkpoint.open_checkpoints(folder) as checkpoints:
    return checkpoints.restore_newest(template)


def assert_same_bits(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    assert x.dtype == y.dtype and x.shape == y.shape
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def names(folder):
  return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
  """A folder with checkpoints of steps 1 and 2; copy it, do not change it."""
  folder = tmp_path_factory.mktemp("two")
  save_steps(folder, (1, 2))
  return folder


@pytest.fixture
def folder(two_steps, tmp_path):
  return shutil.copytree(two_steps, tmp_path / "checkpoints")


# Saving and restoring.


def test_newest_is_restored_bit_for_bit(folder):
  step, state = restore(folder)
  assert step == 2
  assert_same_bits(state, make_state(2))


def test_nan_payloads_and_signed_zeros_survive(tmp_path):
  bits = np.array([0x7FC00001, 0x80000000, 0x00000001, 0xFF800000], np.uint32)
  state = {"x": jnp.asarray(bits.view(np.float32))}
  with checkpoint.open_checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, wait=True)
    assert_same_bits(checkpoints.restore_newest(state)[1], state)


def test_an_empty_folder_has_none(tmp_path):
  assert restore(tmp_path / "new") is None


def test_a_relative_folder_and_waiting(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with checkpoint.open_checkpoints("run") as checkpoints:
    checkpoints.save(7, make_state(7), wait=True)
    assert (tmp_path / "run" / "7").is_dir()  # Before leaving the context.
    assert checkpoints.steps == (7,)


def test_a_step_may_not_be_saved_twice(folder):
  with (
    checkpoint.open_checkpoints(folder) as checkpoints,
    pytest.raises(FileExistsError, match=r"already a .*checkpoints/2"),
  ):
    checkpoints.save(2, make_state(2))


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_any_devices_restore_what_eight_saved(tmp_path, num_devices, sharded):
  with checkpoint.open_checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, place(make_state(3), 8))
  template = place(make_state(), num_devices, sharded)
  _, state = restore(tmp_path, template)
  assert_same_bits(state, make_state(3))
  for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(template)):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_shapes_alone_are_template_enough(folder):
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    make_state(),
  )
  assert_same_bits(restore(folder, shapes)[1], make_state(2))


@pytest.mark.parametrize(
  "num_devices, sharded", [(1, False), (8, True), (8, False)]
)
def test_state_may_be_donated_once_save_returns(tmp_path, num_devices, sharded):
  @functools.partial(jax.jit, donate_argnums=0)
  def overwrite(x):
    return x + 1

  ones = {"big": jnp.ones((2**20,)), "small": jnp.ones((8,))}
  ones = jax.block_until_ready(place(ones, num_devices, sharded))
  state = ones
  with checkpoint.open_checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    for _ in range(10):
      previous, state = state, jax.tree.map(overwrite, state)
    jax.block_until_ready(state)
    assert previous["big"].is_deleted()  # Donated, truly.
  step, restored = restore(tmp_path, state)
  assert step == 1
  assert all((x == 1).all() for x in restored.values())


# Retention.


@pytest.mark.parametrize(
  "options, kept",
  [
    ({"keep_last": 2}, (5, 6)),
    ({"keep_last": 1, "keep_every": 2}, (2, 4, 6)),
    ({"keep_last": 2, "keep_every": 4}, (4, 5, 6)),
    ({"keep_last": 3}, (4, 5, 6)),
  ],
)
def test_retention(tmp_path, options, kept):
  save_steps(tmp_path, range(1, 7), **options)
  assert names(tmp_path) == [str(step) for step in kept]
  with checkpoint.open_checkpoints(tmp_path, **options) as checkpoints:
    assert checkpoints.steps == kept


def test_a_failed_save_is_told_and_harms_nothing(folder, monkeypatch):
  class Failing:
    def result(self):
      raise OSError("disk full")

  state = make_state(3)
  with (
    pytest.raises(OSError, match="disk full"),
    checkpoint.open_checkpoints(folder, keep_last=1) as checkpoints,
  ):
    monkeypatch.setattr(
      checkpoint.ocp, "save_async", lambda *_, **__: Failing()
    )
    checkpoints.save(3, state)
  assert names(folder) == ["1", "2"]


# Damage.


def files_of(folder):
  return sorted(
    str(path.relative_to(folder))
    for path in folder.rglob("*")
    if path.is_file()
  )


def damage(path, kind):
  data = path.read_bytes()
  if kind == "delete":
    path.unlink()
  elif kind == "truncate":
    path.write_bytes(data[: len(data) // 2])
  elif kind == "empty":
    path.write_bytes(b"")
  elif kind == "zeros":
    path.write_bytes(bytes(len(data)))


def assert_never_wrong(folder, before):
  """The newest good state comes back, and every file is still somewhere.

  Returns whether the damage of step 2 was noticed.
  """
  step, state = restore(folder)
  assert_same_bits(state, make_state(step))
  assert step in (1, 2)
  aside = {1: "2.corrupt", 2: "2"}[step]
  assert names(folder) == ["1", aside]
  assert files_of(folder / aside) == before
  return step == 1


@pytest.mark.parametrize("kind", ["delete", "truncate", "empty", "zeros"])
def test_every_file_damaged_in_turn(two_steps, tmp_path, kind):
  noticed = []
  for name in files_of(two_steps / "2"):
    folder = shutil.copytree(two_steps, tmp_path / "checkpoints")
    damage(folder / "2" / name, kind)
    if assert_never_wrong(folder, files_of(folder / "2")):
      noticed.append(re.sub("[0-9a-f]{32}", "DATA", name))
    shutil.rmtree(folder)
  assert {"_CHECKPOINT_METADATA", "state/_METADATA"} <= set(noticed)
  assert {"state/manifest.ocdbt", "state/d/DATA"} <= set(noticed)


def test_a_flipped_bit_anywhere_in_the_data(two_steps, tmp_path):
  """Positions at random, in every file but the markers of completion."""
  rng = np.random.default_rng(0)
  noticed = 0
  folder = shutil.copytree(two_steps, tmp_path / "checkpoints")
  for name in files_of(folder / "2"):
    data = (folder / "2" / name).read_bytes()
    if not data or "commit" in name:
      continue
    for index in rng.integers(0, len(data), 6):
      flipped = bytearray(data)
      flipped[index] ^= 1 << rng.integers(8)
      (folder / "2" / name).write_bytes(flipped)
      noticed += assert_never_wrong(folder, files_of(two_steps / "2"))
      if (folder / "2.corrupt").exists():
        (folder / "2.corrupt").rename(folder / "2")
    (folder / "2" / name).write_bytes(data)
  assert noticed > 10


def test_wrong_values_that_orbax_does_not_notice(folder, monkeypatch):
  """The data files of another state of the same shapes, put in place."""
  shutil.rmtree(folder / "2" / "state")
  shutil.copytree(folder / "1" / "state", folder / "2" / "state")
  step, state = restore(folder)
  assert step == 1
  assert_same_bits(state, make_state(1))
  shutil.rmtree(folder / "1" / "state")  # And without the checksum:
  shutil.move(folder / "2.corrupt", folder / "2")
  monkeypatch.setattr(integrity, "checksum", lambda x: jnp.uint32(0))
  monkeypatch.setattr(
    checkpoint,
    "_read_manifest",
    lambda *_: {k: [*v, 0] for k, v in integrity.describe(state).items()},
  )
  assert restore(folder)[0] == 2  # Orbax alone would have believed it.


def test_damage_is_reported_and_moved_aside(folder, caplog):
  damage(folder / "2" / "state" / "manifest.ocdbt", "truncate")
  (folder / "2.corrupt").mkdir()  # Of an earlier misfortune.
  with caplog.at_level("WARNING"):
    assert restore(folder)[0] == 1
  assert f"Damaged checkpoint {folder / '2'} (" in caplog.text
  assert "it is now 2.corrupt_," in caplog.text
  assert names(folder) == ["1", "2.corrupt", "2.corrupt_"]
  caplog.clear()
  with checkpoint.open_checkpoints(folder) as checkpoints:
    assert checkpoints.steps == (1,)
    checkpoints.save(2, make_state(2))
  assert_same_bits(restore(folder)[1], make_state(2))
  assert names(folder) == ["1", "2", "2.corrupt", "2.corrupt_"]


def test_none_good_is_an_error_and_changes_nothing(folder):
  for step in ("1", "2"):
    damage(folder / step / "state" / "_METADATA", "truncate")
  with pytest.raises(UserError, match=r"None of.*{2: .*, 1: .*--workdir"):
    restore(folder)
  assert names(folder) == ["1", "2"]


def test_strangers_in_the_folder_do_not_matter(folder):
  (folder / "notes").mkdir()
  (folder / "notes.txt").write_text("mine")
  (folder / "9").write_text("a file")
  (folder / "008").mkdir()
  (folder / "7").mkdir()  # Looks like a checkpoint, and is none.
  shutil.copytree(folder / "2", folder / "best")
  shutil.copytree(folder / "2", folder / "8.corrupt")
  assert restore(folder)[0] == 2
  assert names(folder) == sorted(
    [
      "008",
      "1",
      "2",
      "7.corrupt",
      "8.corrupt",
      "9",
      "best",
      "notes",
      "notes.txt",
    ]
  )


def test_trouble_of_the_machine_is_not_damage(folder, monkeypatch):
  def fail(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

  monkeypatch.setattr(checkpoint.ocp, "load", fail)
  with pytest.raises(jax.errors.JaxRuntimeError):
    restore(folder)
  assert names(folder) == ["1", "2"]


# Checkpoints of something else.


def other_tree(state):
  return state._replace(params=state.params | {"head": jnp.zeros(3)})


def other_dtype(state):
  half = state.params["half"].astype(jnp.float32)
  return state._replace(params=state.params | {"half": half})


def without_momentum(state):
  return state._replace(opt_state=())


@pytest.mark.parametrize(
  "change, message",
  [
    (other_tree, r"params/head: float32\[3\] here, absent there"),
    (other_dtype, r"params/half: float32\[16, 2\] here, bfloat16\[16, 2\] th"),
    (
      lambda _: make_state(width=8),
      r"params/block/bias: float32\[8\] here, float32\[16\] there",
    ),
    (without_momentum, r"opt_state/1/0/count: absent here, int32\[\] there"),
  ],
)
def test_another_state_is_named_and_left_alone(folder, change, message):
  with pytest.raises(
    UserError, match="leaves differ: .*" + message + ".*another --workdir"
  ):
    restore(folder, change(make_state()))
  assert names(folder) == ["1", "2"]


# Parameters alone.


@pytest.fixture
def run(folder, tmp_path):
  """A work directory with checkpoints of steps 1 and 2."""
  (tmp_path / "run").mkdir()
  return folder.rename(tmp_path / "run" / "checkpoints").parent


def assert_reads(path, step, model=None):
  """`load_params` gives that step's, as NumPy, and changes no file."""
  before = {x: (path / x).read_bytes() for x in files_of(path)}
  params, metadata = checkpoint.load_params(path)
  assert metadata == model
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))
  assert_same_bits(params, jax.tree.map(np.asarray, make_state(step).params))
  assert {x: (path / x).read_bytes() for x in files_of(path)} == before


def test_parameters_are_read_without_a_template(run):
  (run / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
  (run / "checkpoints" / "8").mkdir()  # Looks like one, and is none.
  assert_reads(run, 2)


def test_optimizer_state_is_not_read(run, monkeypatch):
  asked = []
  load = checkpoint.ocp.load
  monkeypatch.setattr(
    checkpoint.ocp, "load", lambda *args: asked.append(args[1]) or load(*args)
  )
  assert_reads(run, 2)
  leaves = jax.tree.leaves(asked[0]["opt_state"])
  assert leaves and all(x is checkpoint.ocp.PLACEHOLDER for x in leaves)


def test_damaged_parameters_are_passed_over_and_left_in_place(run, caplog):
  folder = run / "checkpoints"
  shutil.rmtree(folder / "2" / "state")  # Another state, put in place.
  shutil.copytree(folder / "1" / "state", folder / "2" / "state")
  with caplog.at_level("WARNING"):
    assert_reads(run, 1)
  assert "wrong checksums" in caplog.text
  damage(folder / "1" / "state" / "_METADATA", "truncate")
  with pytest.raises(UserError, match=r"no readable.*'2': .*'1': .*from a cop"):
    checkpoint.load_params(run)
  assert names(folder) == ["1", "2"]


def test_exported_parameters_come_back_with_their_model(tmp_path):
  path = tmp_path / "new" / "exported"
  params = jax.tree.map(np.asarray, make_state(7).params)
  checkpoint.save_params(path, params, {"width": 16})
  assert names(path.parent) == ["exported"]
  assert_reads(path, 7, {"width": 16})
  with pytest.raises(ValueError, match="exist"):
    checkpoint.save_params(path, params, {})
  file = path / "_CHECKPOINT_METADATA"
  file.write_text(file.read_text().replace('"width": 16', '"width": 61'))
  with pytest.raises(UserError, match="metadata are damaged"):
    checkpoint.load_params(path)


def test_a_folder_without_any_is_refused(tmp_path):
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(UserError, match=r"no readable checkpoint .none at all"):
    checkpoint.load_params(tmp_path)


# Kill, and several processes.

SAVER = """
import itertools, sys
import jax.numpy as jnp
from umae_jax import checkpoint
with checkpoint.open_checkpoints(sys.argv[1]) as checkpoints:
  template = {"x": jnp.zeros((300, 1000)), "y": jnp.zeros(7)}
  done, state = checkpoints.restore_newest(template) or (None, {})
  if done is not None:
    assert all((x == done).all() for x in state.values())
  print("ready", flush=True)
  for step in itertools.count((done or 0) + 1):
    state = {name: jnp.full(x.shape, step) for name, x in template.items()}
    state = {name: x.astype(jnp.float32) for name, x in state.items()}
    checkpoints.save(step, state)
    print("saving", flush=True)
"""


def start(code, *arguments):
  return subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
    env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def test_sigkill_at_any_time_leaves_a_good_folder(tmp_path):
  rng = np.random.default_rng()
  template = {"x": jnp.zeros((300, 1000)), "y": jnp.zeros(7)}
  newest = 0
  for _ in range(3):
    process = start(SAVER, tmp_path)
    assert any(line == "ready\n" for line in process.stdout)
    for _ in range(rng.integers(2, 8)):
      process.stdout.readline()
    time.sleep(rng.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0]
    assert "Traceback" not in output, output
    step, state = restore(tmp_path, template) or (None, None)
    if step is not None:
      assert all((x == step).all() for x in state.values())
      assert step >= newest
      newest = step
    assert not [name for name in names(tmp_path) if not name.isdigit()]
  assert newest > 0


PROCESS = """
import sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from umae_jax import checkpoint
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
def make(step):
  values = np.arange(32, dtype=np.float32).reshape(8, 4) + step
  return {
    name: jax.make_array_from_callback(
      values.shape, NamedSharding(mesh, spec), values.__getitem__)
    for name, spec in [("split", P("data")), ("whole", P())]
  }
with checkpoint.open_checkpoints(sys.argv[1], keep_last=2) as checkpoints:
  step, state = checkpoints.restore_newest(make(0)) or (None, None)
  print("restored", step, flush=True)
  if step is not None:
    for name, x in make(step).items():
      for a, b in zip(x.addressable_shards, state[name].addressable_shards):
        assert (a.data == b.data).all()
  for new in range((step or 0) + 1, (step or 0) + 4):
    checkpoints.save(new, make(new))
"""


def run_two_processes(folder):
  with socket.socket() as s:
    s.bind(("localhost", 0))
    address = f"localhost:{s.getsockname()[1]}"
  processes = [start(PROCESS, folder, address, i) for i in range(2)]
  outputs = [process.communicate(timeout=100)[0] for process in processes]
  for process, output in zip(processes, outputs):
    assert process.returncode == 0 and "restored" in output, output
  return [re.search("restored (.*)", output)[1] for output in outputs]


def test_two_processes_save_fall_back_and_are_read_by_one(tmp_path):
  assert run_two_processes(tmp_path) == ["None", "None"]
  for path in (tmp_path / "3").rglob("manifest.ocdbt"):
    damage(path, "truncate")
  assert run_two_processes(tmp_path) == ["2", "2"]  # And saves 3 to 5.
  assert names(tmp_path) == ["3.corrupt", "4", "5"]
  x = jnp.zeros((8, 4))
  step, state = restore(tmp_path, {"split": x, "whole": x})
  want = np.arange(32, dtype=np.float32).reshape(8, 4) + 5
  assert step == 5
  assert (state["split"] == want).all() and (state["whole"] == want).all()
