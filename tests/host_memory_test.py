import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from umae_jax import host_memory
done = host_memory.keep_freed_memory() if {keep} else False
import numpy as np
for i in range(8):
  if i == 2:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.ones(64_000_000 // 8)
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(keep, **environment):
  out = subprocess.run(
    [sys.executable, "-c", PROGRAM.format(keep=keep)],
    # Huge pages, which NumPy asks for, are few faults without any of this.
    env=os.environ | {"NUMPY_MADVISE_HUGEPAGE": "0"} | environment,
    capture_output=True,
    text=True,
    check=True,
  )
  done, faults = out.stdout.split()
  return done == "True", int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_memory_is_faulted_in_once():
  """Six arrays of 64 MB have 16,000 pages each."""
  done, faults = run(keep=True, JAX_PLATFORMS="cpu")
  if not done:
    pytest.skip("no mallopt in this C library")
  assert 10 * faults < run(keep=False)[1]


def test_an_accelerators_host_is_left_alone():
  assert not run(keep=True, JAX_PLATFORMS="cuda")[0]
