r"""Trains one run of umae_jax; the same command again resumes it.

  python -m umae_jax.main --config=configs/digits.py --workdir=runs/digits
  python -m umae_jax.main --config=configs/imagenet1k.py:vit_l16 \
      --workdir=runs/large --config.loss.uniformity_weight=0
  python -m umae_jax.main --config=configs/digits.py --doctor

Exit codes: 0 finished, 1 stopped with an error, 2 wrong usage, configuration
or data, 75 asked to stop (SIGTERM) and saved: run the same command again.
"""

import os
import pathlib
import sys
import zlib

from absl import app, flags, logging
import jax

from umae_jax import UserError, command_line, host_memory
from umae_jax.command_line import EXIT_ERROR, EXIT_PREEMPTED, EXIT_USAGE, fail

MOST_COMPILED = 4 * 2**30  # Bytes of compiled programs that are kept on disk.

_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Directory for checkpoints, logs and pictures, local or of a bucket "
  "(gs://BUCKET/FOLDER); a run found here resumes.",
)
_MULTIHOST = flags.DEFINE_bool(
  "multihost",
  False,
  "Join the other processes of this job first: found through the cluster "
  "(TPU, SLURM, Kubernetes, MPI), or JAX_COORDINATOR_ADDRESS (host:port), "
  "JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
  "allow_config_change",
  False,
  "Resume the run in --workdir although its configuration was another.",
)
_DOCTOR = flags.DEFINE_bool(
  "doctor",
  False,
  "Train nothing: print shapes, parameters, FLOP, memory, learning rate, "
  "steps and time of the run, and what looks wrong. Exit code 2 if it would "
  "not start.",
)


def main(argv: list[str]) -> int:
  """Prepares the process, and calls the loop."""
  del argv
  logging.set_verbosity(logging.WARNING)  # Orbax tells much of its doings.
  try:
    connect()
    # Imported late: a wrong flag should not wait for it.
    from umae_jax import doctor, loop, run

    if _DOCTOR.value:
      would_start = doctor.examine(
        command_line.CONFIG.value,
        _WORKDIR.value,
        allow_config_change=_ALLOW_CONFIG_CHANGE.value,
      )
      return 0 if would_start else EXIT_USAGE
    prepared = run.prepare(
      command_line.CONFIG.value,
      _WORKDIR.value,
      allow_config_change=_ALLOW_CONFIG_CHANGE.value,
    )
    return 0 if loop.train(prepared) else EXIT_PREEMPTED
  except UserError as error:
    return fail(error)
  except (FloatingPointError, OSError) as error:
    return fail(error, EXIT_ERROR)


def connect() -> None:
  """Joins the other processes, if asked to, and finds the devices."""
  host_memory.keep_freed_memory()
  keep_programs()
  try:
    if _MULTIHOST.value:
      number = os.environ.get("JAX_NUM_PROCESSES")
      index = os.environ.get("JAX_PROCESS_ID")
      jax.distributed.initialize(
        num_processes=number and int(number), process_id=index and int(index)
      )
    jax.devices()
  except (RuntimeError, ValueError) as error:
    wanted = os.environ.get("JAX_PLATFORMS", "")
    raise UserError(
      f"JAX found no devices to run on (JAX_PLATFORMS={wanted!r}): "
      f"{str(error).splitlines()[0]} Install 'umae_jax[gpu]' or "
      "'umae_jax[tpu]', or set JAX_PLATFORMS=cpu; for --multihost see --help."
    ) from error


def keep_programs() -> None:
  """Keeps compiled programs on disk, unless the environment says where."""
  if jax.config.jax_compilation_cache_dir:
    return
  cpu = pathlib.Path("/proc/cpuinfo")  # A home may be shared by several types.
  lines = cpu.read_text().splitlines() if cpu.exists() else []
  features = {x for x in lines if x.startswith(("flags", "Features"))}
  kind = f"{zlib.crc32(''.join(sorted(features)).encode()):08x}"
  cache = pathlib.Path("~/.cache/umae_jax/compiled").expanduser() / kind
  jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_compilation_cache_max_size", MOST_COMPILED)


def parse(argv: list[str]) -> list[str]:
  """Parses the flags; --workdir may be missing for --doctor."""
  rest = command_line.parse(argv)
  if not (_DOCTOR.value or _WORKDIR.value or command_line.asks_for_help()):
    sys.exit(fail("--workdir is missing; see --help"))
  return rest


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
