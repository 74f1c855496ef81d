"""slurm.sbatch with stand-ins for srun and scontrol."""

import os
import pathlib
import subprocess

import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]
SCRIPT = REPOSITORY / "launch" / "slurm.sbatch"


@pytest.fixture
def submit(tmp_path):
  """Runs the script as a job: (exit code, calls, what it said)."""
  calls = tmp_path / "calls"
  for name, code in {"srun": "exit $CODE", "scontrol": ""}.items():
    program = tmp_path / "bin" / name
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\n{code}\n')
    program.chmod(0o755)
  (tmp_path / "activate").write_text(f"echo activated >> {calls}\n")

  def submit(code, **variables):
    settings = {
      "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
      "SLURM_JOB_ID": "7",
      "SLURM_SUBMIT_DIR": str(REPOSITORY),
      "ACTIVATE": str(tmp_path / "activate"),
      "CODE": str(code),
    }
    done = subprocess.run(
      ["bash", SCRIPT, "--config=c", "--workdir=a b"],
      cwd=tmp_path,
      env=os.environ | settings | variables,
      capture_output=True,
      text=True,
    )
    found = calls.read_text().splitlines() if calls.exists() else []
    return done.returncode, found, done.stdout + done.stderr

  return submit


@pytest.mark.parametrize("code", [0, 1, 2, 75, 137, 143])
def test_only_exit_75_is_queued_again(submit, code):
  found, calls, said = submit(code)
  assert found == code
  assert calls[:2] == [
    "activated",
    "srun --kill-on-bad-exit=0 --gpu-bind=none python -m umae_jax.main "
    "--multihost --config=c --workdir=a b",
  ]
  assert calls[2:] == (["scontrol requeue 7"] if code == 75 else [])
  assert ("queued again" in said) == (code == 75)


def test_a_missing_environment_is_named(submit):
  code, calls, said = submit(0, ACTIVATE="no/activate")
  assert (code, calls) == (2, [])
  assert "ACTIVATE=no/activate is no file" in said


def test_one_process_per_gpu_and_a_signal_before_the_limit():
  """JAX takes GPU number SLURM_LOCALID: each process must see all of them."""
  options = dict(
    line.removeprefix("#SBATCH --").partition("=")[::2]
    for line in SCRIPT.read_text().splitlines()
    if line.startswith("#SBATCH")
  )
  assert options["gres"] == f"gpu:{options['ntasks-per-node']}"
  assert not {"gpus-per-task", "gpu-bind"} & options.keys()
  assert options["signal"] == "TERM@120"  # Not B: the processes get it.
  assert "requeue" in options
  assert options["open-mode"] == "append"
