import contextlib
import os

import pytest

from umae_jax import UserError
from umae_jax.benchmark import worker


def test_calls_reach_an_object_of_another_process(tmp_path):
  made = worker.Worker("builtins:open", tmp_path / "file", "w")
  with contextlib.closing(made):
    assert made.call("write", "text") == 4 and made.call("fileno") > 2
    (pid,) = made._pool._processes
    assert pid != os.getpid()
    assert (tmp_path / "file").read_text() == ""
  assert (tmp_path / "file").read_text() == "text"  # By its own `close`.
  with pytest.raises(ProcessLookupError):
    os.kill(pid, 0)


def test_errors_come_back_also_that_the_process_has_ended():
  with pytest.raises(UserError, match="there is no form 'x'"):
    worker.Worker("umae_jax.convert.export:write", None, None, {}, "x", None, 0)
  with pytest.raises(RuntimeError, match=r"of os:_exit ended.*smaller config"):
    worker.Worker("os:_exit", 3)


def test_peak_memory_is_of_the_process():
  assert 1e7 < worker.peak_memory()["process_peak_bytes"] < 1e12
