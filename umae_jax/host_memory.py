"""Memory of a CPU run: kept by the process between steps, not given back."""

import ctypes
import importlib.util
import os
import sys

# Of glibc's mallopt: no block of its own for a large array; nothing given
# back; grow by 256 MB; one arena for all threads.
_OPTIONS = {-4: 0, -1: 2**31 - 1, -2: 2**28, -8: 1}
_ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")


def keep_freed_memory() -> bool:
  """Lets malloc reuse what a step has freed; to be called before JAX starts.

  XLA allocates a step's intermediate arrays anew on every call. On a CPU they
  come from malloc, which by default returns them to the system each time, so
  that every page is faulted in and zeroed again (docs/benchmarks.md).

  Returns:
    Whether it was done: on Linux with glibc, where JAX computes on the CPU.
  """
  platforms = os.environ.get("JAX_PLATFORMS", "")
  accelerated = any(map(importlib.util.find_spec, _ACCELERATORS))
  if not sys.platform.startswith("linux"):
    return False
  if platforms != "cpu" and (platforms or accelerated):
    return False
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  return mallopt is not None and all(
    mallopt(option, value) for option, value in _OPTIONS.items()
  )
