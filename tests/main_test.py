"""The command line as people use it: real processes, killed and resumed."""

import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
SMALL = [
  "--config=configs/digits.py:smoke",
  "--config.model.depth=1",
  "--config.model.decoder_depth=1",
  "--config.log.every_steps=1",
]


def test_compiled_programs_are_kept_up_to_a_size(tmp_path):
  """In the home directory; the least recently used go first."""
  program = (
    "import jax\n"
    "from umae_jax import main\n"
    "main.keep_programs()\n"
    "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
    "jax.jit(lambda x: x + 1)(1.0)\n"
    "print(jax.config.jax_compilation_cache_dir)\n"
    "print(jax.config.jax_compilation_cache_max_size)\n"
  )
  environment = os.environ | {"HOME": str(tmp_path)}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", program],
    env=environment,
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    check=True,
  )
  folder, size = done.stdout.split()
  home = tmp_path / ".cache" / "umae_jax" / "compiled"
  assert pathlib.Path(folder).parent == home and 0 < int(size) < 2**33
  assert list(pathlib.Path(folder).glob("*-cache"))


SUMMARY = (
  "effective_rank",
  "participation_ratio",
  "knn_accuracy",
  "linear_accuracy",
  "reconstruction_loss",
  "uniformity_loss",
)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
  """Starts the command with given flags, in a process of its own."""
  cache = tmp_path_factory.mktemp("compiled")

  def start(*flags, devices=1, **variables):
    environment = os.environ | {
      "JAX_NUM_CPU_DEVICES": str(devices),
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
      [sys.executable, "-m", "umae_jax.main", *map(str, flags)],
      env=environment | variables,
      cwd=REPOSITORY,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return start


@pytest.fixture(scope="session")
def finish(start):
  """Runs the command to its end: (exit code, standard output, errors)."""

  def finish(*flags, **options):
    process = start(*flags, **options)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors

  return finish


@pytest.fixture(scope="session")
def reference(finish, tmp_path_factory):
  """A finished run on one device: (its directory, what it printed)."""
  workdir = tmp_path_factory.mktemp("reference") / "run"
  code, output, errors = finish(*SMALL, f"--workdir={workdir}")
  assert code == 0, errors
  return workdir, output


def read_log(workdir, split=None):
  """The log without what is measured by a clock."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
    {key: x for key, x in record.items() if not key.startswith("time/")}
    for record in map(json.loads, lines)
    if split in (None, record["split"])
  ]


def newest_step(workdir):
  names = [path.name for path in (workdir / "checkpoints").iterdir()]
  return max(int(name) for name in names if name.isdecimal())


def read_state(workdir):
  """The newest checkpoint: (its step, its arrays)."""
  newest = newest_step(workdir)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Orbax prefers a template.
    state = ocp.load(workdir / "checkpoints" / str(newest))
  return newest, jax.tree.map(np.asarray, state)


def assert_same_run(workdir, other):
  """Log and last state, bit for bit."""
  assert read_log(workdir) == read_log(other)
  step, state = read_state(workdir)
  other_step, other_state = read_state(other)
  assert step == other_step
  jax.tree.map(np.testing.assert_array_equal, state, other_state)


def test_a_run_leaves_table_summary_and_pictures(reference):
  workdir, output = reference
  summary = json.loads((workdir / "summary.json").read_text())
  for key in SUMMARY:
    assert np.isfinite(summary[key])
    assert key in output
  for name in ("reconstructions", "spectrum", "curves"):
    assert (workdir / f"{name}.png").read_bytes().startswith(b"\x89PNG")
  assert list((workdir / "tensorboard").iterdir())
  assert "loss.uniformity_weight" in output  # The effective configuration.
  assert "encoder/block0" in output  # The parameter table.
  config = json.loads((workdir / "config.json").read_text())
  assert config["model.depth"] == 1
  assert [record["step"] for record in read_log(workdir, "train")] == list(
    range(1, 22)
  )


def test_golden_first_step(reference):
  """Seed 0: parameters, data order, masks and losses stay what they were."""
  first = read_log(reference[0], "train")[0]
  assert first["step"] == 1
  assert first["learning_rate"] == 0
  np.testing.assert_allclose(first["reconstruction_loss"], 3.980186, rtol=1e-4)
  np.testing.assert_allclose(first["uniformity_loss"], 0.901480, rtol=1e-4)
  np.testing.assert_allclose(first["gradient_norm"], 31.6570, rtol=1e-3)


def test_a_finished_run_says_so_and_changes_nothing(reference, finish):
  workdir, _ = reference
  before = (workdir / "metrics.jsonl").read_bytes(), newest_step(workdir)
  code, output, errors = finish(*SMALL, f"--workdir={workdir}")
  assert code == 0, errors
  assert "is finished" in output
  assert "linear_accuracy" in output
  after = (workdir / "metrics.jsonl").read_bytes(), newest_step(workdir)
  assert before == after


def assert_losses_agree(log, expected, tolerance):
  assert [x["step"] for x in log] == [x["step"] for x in expected]
  for key in ("loss", "reconstruction_loss", "uniformity_loss"):
    np.testing.assert_allclose(
      [x[key] for x in log], [x[key] for x in expected], rtol=tolerance
    )


def test_eight_devices_have_the_losses_of_one(reference, finish, tmp_path):
  """Same masks and losses over 20 steps, within 1e-5."""
  code, output, errors = finish(*SMALL, f"--workdir={tmp_path}", devices=8)
  assert code == 0, errors
  assert "8 x cpu" in output
  log, expected = (read_log(x, "train") for x in (tmp_path, reference[0]))
  assert_losses_agree(log, expected, 1e-5)


def start_two(start, *flags):
  """Two processes of four devices each, that work together."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  return [
    start(
      *flags,
      "--multihost",
      devices=4,
      JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
      JAX_NUM_PROCESSES="2",
      JAX_PROCESS_ID=str(index),
    )
    for index in range(2)
  ]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(reference, start, tmp_path):
  processes = start_two(start, *SMALL, f"--workdir={tmp_path}")
  outputs = [process.communicate(timeout=300) for process in processes]
  assert [p.returncode for p in processes] == [0, 0], outputs
  assert "8 x cpu" in outputs[0][0]
  log, expected = (read_log(x, "train") for x in (tmp_path, reference[0]))
  assert_losses_agree(log, expected, 1e-5)
  ours, theirs = (read_log(x, "eval")[-1] for x in (tmp_path, reference[0]))
  for key, value in theirs.items():
    if key != "split":
      np.testing.assert_allclose(ours[key], value, rtol=1e-3, err_msg=key)


LONGER = [
  *SMALL,
  "--config.num_epochs=6",
  "--config.evaluation.every_epochs=2",
  "--config.checkpoint.every_steps=7",
]


def wait_for_step(process, workdir, step):
  """Until the log has that step, or the process has ended."""
  while process.poll() is None:
    log = workdir / "metrics.jsonl"
    text = log.read_text() if log.exists() else ""
    complete = [x for x in text.splitlines(True) if x.endswith("\n")]
    if complete and json.loads(complete[-1])["step"] >= step:
      return
    time.sleep(0.002)


@pytest.fixture(scope="session")
def longer_reference(finish, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("longer") / "run"
  code, _, errors = finish(*LONGER, f"--workdir={workdir}")
  assert code == 0, errors
  return workdir


@pytest.mark.slow
def test_killed_and_resumed_is_bit_for_bit_uninterrupted(
  longer_reference, start, finish, tmp_path
):
  """SIGKILL at three random moments, some while a checkpoint is written."""
  rng = random.Random(time.time())
  kills = sorted(rng.sample(range(3, 120), 3))
  for step in kills:
    process = start(*LONGER, f"--workdir={tmp_path}")
    wait_for_step(process, tmp_path, step)
    time.sleep(rng.uniform(0, 0.05))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, (kills, step)
  code, output, errors = finish(*LONGER, f"--workdir={tmp_path}")
  assert code == 0, (kills, errors)
  assert "resuming after step" in output, kills
  assert_same_run(tmp_path, longer_reference)


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_75(
  longer_reference, start, finish, tmp_path
):
  process = start(*LONGER, f"--workdir={tmp_path}")
  wait_for_step(process, tmp_path, 10)
  process.terminate()
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 75, errors
  saved = newest_step(tmp_path)
  last = read_log(tmp_path)[-1]["step"]
  assert saved >= 10
  assert saved >= last
  code, output, errors = finish(*LONGER, f"--workdir={tmp_path}")
  assert code == 0, errors
  assert f"resuming after step {saved}." in output
  assert_same_run(tmp_path, longer_reference)


@pytest.mark.slow
def test_sigterm_stops_two_processes_at_one_step(start, finish, tmp_path):
  """Either may get the signal; both save, and one process can resume."""
  flags = [*LONGER, f"--workdir={tmp_path}", "--config.num_epochs=1000"]
  # Several steps at once, which JAX's preemption service must not lose.
  flags += ["--config.log.every_steps=8", "--config.checkpoint.every_steps=50"]
  processes = start_two(start, *flags)
  wait_for_step(processes[0], tmp_path, 10)
  processes[1].terminate()
  outputs = [process.communicate(timeout=120) for process in processes]
  assert [p.returncode for p in processes] == [75, 75], outputs
  saved = newest_step(tmp_path)
  assert saved >= 10
  process = start(*flags)
  wait_for_step(process, tmp_path, saved + 1)
  process.terminate()
  output, errors = process.communicate(timeout=120)
  assert process.returncode == 75, errors
  assert f"resuming after step {saved}." in output


EVALUATE = [
  "--config.model.depth=1",
  "--config.batch_size=64",
  "--config.log.every_steps=1",
]
EPOCH = ["--config.num_epochs=1", "--config.optimizer.warmup_epochs=0.5"]


@pytest.mark.slow
def test_fine_tuning_is_the_same_in_two_processes(
  reference, start, finish, tmp_path
):
  """Losses, and every test image counted once, whoever reads it."""
  flags = [
    "--config=configs/digits.py:finetune",
    *EVALUATE,
    *EPOCH,
    f"--config.pretrained={reference[0]}",
    "--config.data.rand_augment=9",
    "--config.classifier.random_erasing=0.25",
    "--config.classifier.ema_decay=0.9",
  ]
  code, _, errors = finish(*flags, f"--workdir={tmp_path / 'one'}")
  assert code == 0, errors
  processes = start_two(start, *flags, f"--workdir={tmp_path / 'two'}")
  outputs = [process.communicate(timeout=300) for process in processes]
  assert [p.returncode for p in processes] == [0, 0], outputs
  log, expected = (read_log(tmp_path / x, "train") for x in ("two", "one"))
  assert len(log) == 21
  np.testing.assert_allclose(
    [x["loss"] for x in log], [x["loss"] for x in expected], rtol=1e-4
  )
  two, one = (
    json.loads((tmp_path / x / "summary.json").read_text())
    for x in ("two", "one")
  )
  assert one["test_images"] == two["test_images"] == 397
  # Of one epoch, so that a score or two may be a tie but for round-off.
  assert abs(one["top1_accuracy"] - two["top1_accuracy"]) < 3 / 397
  np.testing.assert_allclose(
    two["cross_entropy_loss"], one["cross_entropy_loss"], rtol=1e-4
  )
  images = [
    [
      int(line.split(",")[1])
      for line in (tmp_path / x / "per_class.csv").read_text().splitlines()[1:]
    ]
    for x in ("two", "one")
  ]
  assert images[0] == images[1]
  assert sum(images[0]) == 397
  for name in ("confusion", "curves"):
    png = (tmp_path / "two" / f"{name}.png").read_bytes()
    assert png.startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_linear_probe_keeps_the_bits_of_the_encoder(
  reference, finish, tmp_path
):
  flags = [
    "--config=configs/digits.py:linear_probe",
    *EVALUATE,
    *EPOCH,
    f"--config.pretrained={reference[0]}",
    f"--workdir={tmp_path}",
  ]
  code, output, errors = finish(*flags, devices=8)
  assert code == 0, errors
  _, probed = read_state(tmp_path)
  _, pretrained = read_state(reference[0])
  before, after = (x["params"]["encoder"] for x in (pretrained, probed))
  jax.tree.map(
    lambda x, y: x.tobytes() == y.tobytes() or pytest.fail("changed"),
    *(before, after),
  )
  assert np.abs(probed["params"]["head"]["bias"]).max() > 0
  assert "top5_accuracy" in output


def test_features_are_written_once(reference, finish, tmp_path):
  flags = [
    "--config=configs/digits.py",
    *EVALUATE,
    "--config.task=features",
    f"--config.pretrained={reference[0]}",
    f"--workdir={tmp_path}",
  ]
  code, output, errors = finish(*flags, devices=8)
  assert code == 0, errors
  assert "No training, evaluation only; 8 x cpu." in output
  found = np.load(tmp_path / "features.npz")
  assert found["features"].shape == (397, 64)
  assert found["labels"].shape == (397,)
  before = (tmp_path / "features.npz").stat().st_mtime_ns
  code, output, errors = finish(*flags, devices=8)
  assert code == 0, errors
  assert "is finished" in output
  assert (tmp_path / "features.npz").stat().st_mtime_ns == before


@pytest.mark.parametrize(
  "flags, message",
  [
    ([], "--config is missing"),
    (["--config=configs/digits.py"], "--workdir is missing"),
    (["--config=configs/none.py"], "--config names no readable file"),
    (
      ["--config=configs/none.py", "--config.batch_size=8"],
      "--config names no readable file",
    ),
    (["--config=configs/digits.py:x"], "variant='x' is not one of"),
    ([*SMALL, "--config.loss.unif=1"], "config.loss.unif is not a key; did"),
    ([*SMALL, "--config.batch_size=x"], "--config.batch_size=x: invalid"),
    ([*SMALL, "--config.batch_size=9"], "batch_size=9 .* multiple of 2"),
    ([*SMALL, "--steps=3"], "Unknown command line flag 'steps'"),
    ([*SMALL, "more"], r"unexpected arguments \['more'\]"),
    ([*SMALL, "--config.data.name=cifar"], "config.data.name='cifar'"),
    ([*SMALL, "--config.task=features"], "set --config.pretrained to"),
    (
      [*SMALL, "--config.task=features", "--config.pretrained=/no/such.pth"],
      r"/no/such\.pth",
    ),
  ],
)
def test_wrong_usage_is_told_in_one_line(finish, tmp_path, flags, message):
  if flags[-1:] != ["--config=configs/digits.py"]:
    flags = [*flags, f"--workdir={tmp_path / 'run'}"]
  code, output, errors = finish(*flags, devices=2)
  assert code == 2, errors
  lines = [x for x in errors.splitlines() if x.startswith("umae_jax: ")]
  assert len(lines) == 1, errors
  assert re.search(message, lines[0]), lines[0]
  assert "Traceback" not in errors
  assert output == ""
  assert not (tmp_path / "run").exists()


def test_a_platform_that_is_absent_is_named(finish, tmp_path):
  code, _, errors = finish(
    *SMALL, f"--workdir={tmp_path / 'run'}", JAX_PLATFORMS="tpu"
  )
  assert code == 2
  assert "JAX_PLATFORMS='tpu'" in errors
  assert "umae_jax[tpu]" in errors
  assert not (tmp_path / "run").exists()


def test_help_is_useful(finish):
  code, output, _ = finish("--help")
  assert code in (0, 1)
  for word in ("--config", "--workdir", "resumes", "75"):
    assert word in output


def test_the_doctor_trains_nothing_and_needs_no_workdir(finish, tmp_path):
  code, output, errors = finish(*SMALL, "--doctor", devices=2)
  assert code == 0, errors
  assert "It would start." in output and "memory: gradients" in output
  workdir = tmp_path / "run"
  code, output, errors = finish(
    *(*SMALL, "--doctor", "--config.data.eval_split=none"),
    f"--workdir={workdir}",
  )
  assert code == 2, errors
  assert "It would not start: " in output and "split='none'" in output
  assert not workdir.exists()
