"""Devices and where arrays live; the one module that knows the topology."""

import contextlib
import signal
import socket
import threading
from typing import Any
import zlib

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

# Batch rows are split over both axes; parameters over "fsdp" alone.
DATA, FSDP = "data", "fsdp"


def make_mesh(fsdp: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
  """A ("data", "fsdp") mesh over `devices`, by default all of all processes.

  Args:
    fsdp: devices that share one copy of parameters and optimiser state; 1 =
      every device holds all of them. Must divide the number of devices.
    devices: an even share of each process's devices.

  The axes are Auto: the compiler places the collectives. `jax.make_mesh`
  defaults to Explicit, under which linen layers do not trace when sharded.
  """
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh(
    (len(devices) // fsdp, fsdp),
    (DATA, FSDP),
    axis_types=(AxisType.Auto, AxisType.Auto),
    devices=devices,
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows split over all devices."""
  return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def to_global(batch: Any, mesh: Mesh) -> Any:
  """This process's rows, NumPy arrays, to arrays of the global batch."""
  return jax.make_array_from_process_local_data(batch_sharding(mesh), batch)


def state_sharding(tree: Any, mesh: Mesh, *, min_size: int = 2**16) -> Any:
  """Splits each large array along its largest divisible dimension.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`s.
    mesh: of `make_mesh`.
    min_size: arrays of fewer elements are replicated: splitting a bias costs
      a collective and saves nothing.

  Returns:
    A tree of `NamedSharding`, of the structure of `tree`.
  """

  def split(x):
    if mesh.shape[FSDP] == 1 or np.prod(x.shape, dtype=np.int64) < min_size:
      return PartitionSpec()
    for axis in np.argsort(x.shape)[::-1]:  # Largest first.
      if x.shape[axis] % mesh.shape[FSDP] == 0:
        return PartitionSpec(*[None] * axis, FSDP)
    return PartitionSpec()

  return jax.tree.map(lambda x: NamedSharding(mesh, split(x)), tree)


def synchronize(name: str) -> None:
  """Waits until every process is here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def sum_over_processes(number: int) -> int:
  """The sum of a number that every process has; all call it together."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.process_allgather(np.array(number)).sum())


def from_first_process(number: int) -> int:
  """The first process's number, on all of them; all call it together."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.broadcast_one_to_all(np.array(number)))


def processes_here() -> int:
  """How many of the processes are on this machine; all call it together."""
  if jax.process_count() == 1:
    return 1
  name = zlib.crc32(socket.gethostname().encode())
  return int((multihost_utils.process_allgather(np.uint32(name)) == name).sum())


def preempted(call: int, stop_requested: bool) -> bool:
  """Whether the run should save and stop, the same on every process.

  Args:
    call: the how many-th call this is, 1, 2, ...; all processes call this at
      the same steps. (JAX waits for one number, so none may be left out.)
    stop_requested: this process was sent SIGTERM. Of several processes, JAX's
      own preemption service listens for it, and picks the call to stop at.
  """
  if jax.process_count() == 1:
    return stop_requested
  return multihost_utils.reached_preemption_sync_point(call)


@contextlib.contextmanager
def stop_on_sigterm():
  """An event that SIGTERM sets, instead of ending the process.

  With several processes JAX's preemption service has the signal instead; and
  only a main thread may have it.
  """
  event = threading.Event()
  if (
    jax.process_count() > 1
    or threading.current_thread() is not threading.main_thread()
  ):
    yield event
    return
  old = signal.signal(signal.SIGTERM, lambda *unused: event.set())
  try:
    yield event
  finally:
    signal.signal(signal.SIGTERM, old)
