"""Test session set-up: eight fake CPU devices, strict numerics."""

import importlib.util
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"  # For the subprocesses of tests, too.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
# Most of a test's time is compiling: code made in less of it, and slower, will
# do. XLA's own passes, and so what is computed, stay as they are.
os.environ["XLA_FLAGS"] = " ".join(
  ["--xla_backend_optimization_level=0", os.environ.get("XLA_FLAGS", "")]
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared():
  """The folder `shared/` beside the checkout, with data sets too big for it."""
  folder = REPOSITORY.parent / "shared"
  if not folder.exists():
    pytest.skip("needs ../shared (data sets that are not in the repository)")
  return folder


@pytest.fixture(scope="session")
def load_config():
  """Returns (name, variant) -> the configuration of configs/<name>.py."""

  def load(name, variant="default"):
    file = REPOSITORY / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)

  return load
