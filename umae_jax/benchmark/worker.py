"""A side of the benchmark in a process of its own, and calls to it.

In one process, the waiting threads and the allocators of two libraries would
disturb one another.
"""

from concurrent.futures import ProcessPoolExecutor, process
import contextlib
import importlib
import multiprocessing
import resource
from typing import Any

_served = {}  # In the other process: the object.


class Worker:
  """An object that lives in another process.

  Args:
    factory: "module:name" of what makes it, imported there alone.
    arguments: of the factory.

  Raises:
    Exception: what the factory raises; RuntimeError if the process ended.
  """

  def __init__(self, factory: str, *arguments: Any):
    context = multiprocessing.get_context("spawn")
    self._pool = ProcessPoolExecutor(1, mp_context=context)
    self._name = factory
    try:
      self._run(_make, factory, arguments)
    except BaseException:
      self._pool.shutdown()
      raise

  def call(self, method: str, *arguments: Any) -> Any:
    """What a method of the object returns, or raises.

    Raises:
      RuntimeError: the process ended.
    """
    return self._run(_call, method, arguments)

  def _run(self, function, *arguments):
    try:
      return self._pool.submit(function, *arguments).result()
    except process.BrokenProcessPool as error:
      raise RuntimeError(
        f"the process of {self._name} ended; what it printed says why. Out of "
        "memory? Use a smaller config.batch_size."
      ) from error

  def close(self) -> None:
    """Ends the process, after the object's own `close`."""
    with contextlib.suppress(RuntimeError):
      self.call("close")
    self._pool.shutdown()


def _make(factory: str, arguments: tuple[Any, ...]) -> None:
  module, _, name = factory.partition(":")
  _served["it"] = getattr(importlib.import_module(module), name)(*arguments)


def _call(method: str, arguments: tuple[Any, ...]) -> Any:
  return getattr(_served["it"], method)(*arguments)


def peak_memory() -> dict[str, int]:
  """Peak bytes of this process."""
  kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return {"process_peak_bytes": kilobytes * 1024}
