import contextlib
import os

import pytest

from umae_jax import UserError
from umae_jax.benchmark import worker


def test_calls_reach_an_object_of_another_process():
  made = worker.Worker("subprocess:Popen", ["true"])  # Has pid and wait.
  with contextlib.closing(made):
    assert made.call("wait") == 0
    process = made._process
    assert process.pid != os.getpid() and process.is_alive()
  assert not process.is_alive()


def test_errors_of_the_user_come_back_and_others_end_the_process():
  with pytest.raises(UserError, match="there is no form 'x'"):
    worker.Worker("umae_jax.convert.export:write", None, None, {}, "x", None, 0)
  made = worker.Worker("subprocess:Popen", ["true"])
  with contextlib.closing(made), pytest.raises(RuntimeError, match="exit code"):
    made.call("no_such_method")
