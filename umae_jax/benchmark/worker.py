"""A side of the benchmark in a process of its own, and calls to it.

In one process, the waiting threads and the allocators of two libraries would
disturb one another.
"""

from collections.abc import Callable
import contextlib
import importlib
import multiprocessing
from typing import Any

from umae_jax import UserError


class Worker:
  """An object that lives in another process.

  Args:
    factory: "module:name" of what makes it, imported there alone.
    arguments: of the factory.

  Raises:
    UserError: what the factory raises.
    RuntimeError: the process ended.
  """

  def __init__(self, factory: str, *arguments: Any):
    context = multiprocessing.get_context("spawn")
    self._connection, theirs = context.Pipe()
    self._name = factory
    self._process = context.Process(
      target=_serve, args=(theirs, factory, arguments), daemon=True
    )
    self._process.start()
    theirs.close()  # Or the end of the process would not be noticed here.
    try:
      self._answer()
    except BaseException:
      self.close()
      raise

  def call(self, method: str, *arguments: Any) -> Any:
    """What a method of the object returns.

    Raises:
      UserError, FloatingPointError: what the method raises.
      RuntimeError: it raised another error, or the process was ended.
    """
    self._connection.send((method, arguments))
    return self._answer()

  def _answer(self):
    try:
      answer = self._connection.recv()
    except (EOFError, ConnectionResetError) as error:
      self._process.join()
      raise RuntimeError(
        f"the process of {self._name} ended with exit code "
        f"{self._process.exitcode}; what it printed says why. Out of memory? "
        "Use a smaller config.batch_size."
      ) from error
    if isinstance(answer, Exception):
      raise answer
    return answer

  def close(self) -> None:
    """Ends the process, after the object's own `close`."""
    with contextlib.suppress(OSError):
      self._connection.close()
    self._process.join(10)
    if self._process.is_alive():
      self._process.kill()
      self._process.join()


def _serve(connection, factory: str, arguments: tuple[Any, ...]) -> None:
  """Answers calls until the other end is closed."""
  module, _, name = factory.partition(":")
  try:
    make: Callable[..., Any] = getattr(importlib.import_module(module), name)
    served = make(*arguments)
  except UserError as error:
    connection.send(error)
    return
  connection.send(None)
  with contextlib.closing(served):
    while True:
      try:
        method, arguments = connection.recv()
      except (EOFError, ConnectionResetError):
        return
      try:
        connection.send(getattr(served, method)(*arguments))
      except (UserError, FloatingPointError) as error:
        connection.send(error)
