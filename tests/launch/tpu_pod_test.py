"""tpu_pod.sh against a fake gcloud that refuses, preempts and loses ssh."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

HERE = pathlib.Path(__file__).parent
REPOSITORY = HERE.parents[1]
LAUNCHER = ["bash", "launch/tpu_pod.sh"]
FLAGS = ["--config=configs/digits.py:smoke", "--config.seed=1"]

# A worker's python3, as far as the installation needs it.
PYTHON3 = """#!/usr/bin/env bash
[ "$1 $2" = "-m pip" ] || [ "$1 $2 $3" = "-m uv pip" ] && exit
[ "$1 $2 $3" = "-m uv venv" ] || exit 1
mkdir -p .venv/bin
echo 'PATH=$HOME/umae/.venv/bin:$PATH' > .venv/bin/activate
cp "$FAKE_CLOUD/run" .venv/bin/python
"""

# A run: notes how it was called, and ends as the next line of `ends` says.
RUN = """#!/usr/bin/env bash
echo "$HOME: $*" >> "$FAKE_CLOUD/runs"
trap 'echo saved >> "$FAKE_CLOUD/saved"; exit 75' TERM
echo "log of $*"
file=$FAKE_CLOUD/ends$JAX_PROCESS_ID
end=$(head -n 1 "$file"); sed -i 1d "$file"
while [ "$end" = stay ]; do sleep 0.1; done
[ "$end" != slow ] || { sleep 1; end=0; }
exit "$end"
"""


class Cloud:
  """A folder for the fake gcloud, and the launcher in front of it."""

  def __init__(self, folder, **faults):
    self.folder = folder
    self.started = []
    self.environment = os.environ | {
      "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
      "FAKE_CLOUD": str(folder),
      "PROJECT": "p",
      "ZONE": "z",
      "WORKDIR": "gs://bucket/run",
      "POLL": "0.05",
      "TRIES": "3",
    }
    for name, text in {"worker_bin/python3": PYTHON3, "run": RUN}.items():
      file = folder / name
      file.parent.mkdir(exist_ok=True)
      file.write_text(text)
      file.chmod(0o755)
    (folder / "bin").mkdir()
    gcloud = folder / "bin" / "gcloud"
    fake = HERE / "fake_gcloud.py"
    gcloud.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{fake}" "$@"\n')
    gcloud.chmod(0o755)
    (folder / "faults").write_text(json.dumps(faults))

  def ends(self, *codes):
    """How the runs end, one after the other, the same on both workers."""
    for index in range(2):
      text = "".join(f"{code}\n" for code in codes)
      (self.folder / f"ends{index}").write_text(text)

  def start(self, *flags, **variables):
    self.started.append(
      subprocess.Popen(
        # Under nohup, or in a shell's background, both would be ignored.
        ["env", "--default-signal=HUP,INT", *LAUNCHER, *(flags or FLAGS)],
        cwd=REPOSITORY,
        env=self.environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
    return self.started[-1]

  def finish(self, *flags, **variables):
    """(exit code, log of the run, what the launcher said)."""
    process = self.start(*flags, **variables)
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors

  def verbs(self):
    """What was asked of gcloud, but for looks at the state."""
    calls = (self.folder / "calls").read_text().splitlines()
    verbs = [json.loads(call)[3] for call in calls]
    return [verb for verb in verbs if verb != "describe"]

  def runs(self):
    return (self.folder / "runs").read_text().splitlines()

  def assert_nothing_left(self):
    assert not (self.folder / "slice").exists()
    assert not list(self.folder.glob("worker[0-9]"))


@pytest.fixture
def make_cloud(tmp_path):
  """Makes a Cloud with faults; nothing that ran on it outlives the test."""
  made = []

  def make(**faults):
    made.append(Cloud(tmp_path, **faults))
    return made[0]

  yield make
  for process in made[0].started:
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()
  for file in tmp_path.glob("worker?/umae/pid"):
    with contextlib.suppress(ProcessLookupError):
      os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.fixture
def cloud(make_cloud):
  return make_cloud()


def test_a_run_is_created_installed_followed_and_deleted(cloud):
  cloud.ends(0)
  code, output, errors = cloud.finish()
  assert code == 0, errors
  flags = f"--multihost --workdir=gs://bucket/run {' '.join(FLAGS)}"
  assert sorted(cloud.runs()) == [
    f"{cloud.folder / worker}: -m umae_jax.main {flags}"
    for worker in ("worker0", "worker1")
  ]
  assert f"log of -m umae_jax.main {flags}" in output
  assert cloud.verbs() == [
    *("create", "ssh", "scp", "ssh", "ssh", "ssh", "ssh", "delete")
  ]
  states = ("GONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
  for state in states:
    assert f"slice umae: {state}." in errors
  assert "no slice umae is left" in errors
  cloud.assert_nothing_left()


def test_a_preempted_run_is_resumed_on_another_slice(cloud):
  (cloud.folder / "vanish").write_text("1 log of")
  cloud.ends("stay", 0)
  code, _, errors = cloud.finish()
  assert code == 0, errors
  assert cloud.verbs().count("create") == 2
  assert len(cloud.runs()) == 4
  assert len(set(cloud.runs())) == 2  # The same command, word for word.
  assert "preempted (GONE); asking for another slice" in errors
  assert "finished." in errors
  cloud.assert_nothing_left()


def test_a_slice_preempted_before_the_run_is_replaced(make_cloud):
  cloud = make_cloud(install=1)
  cloud.ends(0)
  code, _, errors = cloud.finish()
  assert code == 0, errors
  assert "preempted before it ran" in errors
  assert cloud.verbs().count("create") == 2
  assert len(cloud.runs()) == 2
  cloud.assert_nothing_left()


def test_exit_75_is_resumed_and_preemptions_are_counted(cloud):
  cloud.ends(75, 75)
  code, _, errors = cloud.finish(PREEMPTIONS="1")
  assert code == 1
  assert cloud.verbs().count("create") == 2
  assert "preempted (75)" in errors
  assert "preempted more than 1 times" in errors
  cloud.assert_nothing_left()


@pytest.mark.parametrize("refusals, code", [(2, 0), (3, 1)])
def test_quota_refusals_are_told_and_tried_again(make_cloud, refusals, code):
  cloud = make_cloud(quota=refusals)
  cloud.ends(0)
  found, _, errors = cloud.finish()
  assert found == code, errors
  assert errors.count("no quota for v6e-16 in z (spot: 1); ask") == refusals
  assert ("no slice after 3 tries" in errors) == (code == 1)
  assert cloud.verbs().count("create") == 3
  cloud.assert_nothing_left()


def test_another_refusal_ends_at_once(make_cloud):
  cloud = make_cloud(refused=1)
  code, _, errors = cloud.finish()
  assert code == 1
  assert "PERMISSION_DENIED" in errors
  assert "gcloud refuses to create umae" in errors
  assert cloud.verbs() == ["create"]
  cloud.assert_nothing_left()


def test_a_failed_slice_is_deleted_and_asked_for_again(cloud):
  (cloud.folder / "slice").write_text("FAILED")
  cloud.ends(0)
  code, _, errors = cloud.finish()
  assert code == 0, errors
  assert cloud.verbs()[:2] == ["delete", "create"]
  cloud.assert_nothing_left()


@pytest.mark.parametrize("failures, code", [(2, 0), (100, 1)])
def test_ssh_is_tried_again_with_a_limit(make_cloud, failures, code):
  cloud = make_cloud(ssh=failures)
  cloud.ends(0)
  found, _, errors = cloud.finish()
  assert found == code, errors
  assert "install: failed (try 1 of 3)" in errors
  assert ("cannot be reached by ssh" in errors) == (code == 1)
  assert cloud.verbs().count("create") == 1
  cloud.assert_nothing_left()


def wait_for(process, condition):
  """Until it holds; fails with what the launcher said."""
  end = time.monotonic() + 240
  while not condition():
    if process.poll() is not None or time.monotonic() > end:
      process.terminate()
      raise AssertionError(process.communicate(timeout=120)[1])
    time.sleep(0.02)


def wait_for_runs(process, cloud):
  """Until both workers run and the log is followed."""
  calls, runs = (cloud.folder / name for name in ("calls", "runs"))
  wait_for(
    process, lambda: calls.exists() and "tail -n +1" in calls.read_text()
  )
  wait_for(process, lambda: runs.exists() and len(cloud.runs()) == 2)


def test_a_lost_connection_does_not_disturb_the_run(make_cloud):
  cloud = make_cloud(follow=2)
  cloud.ends("slow")
  code, output, errors = cloud.finish()
  assert code == 0, errors
  assert errors.count("the log was interrupted; looking again") == 2
  assert len(cloud.runs()) == 2
  assert "log of" in output
  cloud.assert_nothing_left()


def test_a_connection_lost_for_good_ends_with_words(make_cloud):
  cloud = make_cloud(outcome=100, follow=100)
  cloud.ends("stay")
  code, _, errors = cloud.finish()
  assert code == 1
  assert "worker 0 does not answer" in errors
  cloud.assert_nothing_left()


def test_a_network_lost_for_a_moment_deletes_no_running_slice(make_cloud):
  # The first outcome is asked for before the run.
  cloud = make_cloud(follow=1, outcome=2, describe_running=1)
  cloud.ends("slow")
  code, _, errors = cloud.finish()
  assert code == 0, errors
  assert "preempted" not in errors
  assert len(cloud.runs()) == 2 and cloud.verbs().count("create") == 1
  cloud.assert_nothing_left()


def test_a_closed_terminal_saves_and_deletes(cloud):
  cloud.ends("stay")
  process = cloud.start()
  wait_for_runs(process, cloud)
  process.stderr.close()  # As of a pipe whose reader has gone.
  process.send_signal(signal.SIGHUP)
  process.stdout.read()
  process.wait(timeout=60)
  assert len((cloud.folder / "saved").read_text().splitlines()) == 2
  cloud.assert_nothing_left()


@pytest.mark.parametrize("failures, code", [(2, 0), (3, 1)])
def test_an_api_out_of_reach_is_no_missing_slice(make_cloud, failures, code):
  cloud = make_cloud(describe=failures)
  cloud.ends(0)
  found, _, errors = cloud.finish()
  assert found == code, errors
  assert "slice umae: UNKNOWN." in errors
  assert cloud.verbs().count("create") == (code == 0)
  cloud.assert_nothing_left()


@pytest.mark.parametrize("code", [1, 2, 134])
def test_a_run_that_fails_is_told_and_not_repeated(cloud, code):
  cloud.ends(code)
  found, output, errors = cloud.finish()
  assert found == code
  assert "log of" in output
  assert cloud.verbs().count("create") == 1
  if code != 2:
    assert f"the run failed with exit code {code}" in errors
    assert errors.count("log of") == 2  # The ends of both workers' logs.
  cloud.assert_nothing_left()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (15, 143)])
def test_a_signal_saves_and_deletes(cloud, number, code):
  cloud.ends("stay")
  process = cloud.start()
  wait_for_runs(process, cloud)
  process.send_signal(number)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == code, errors
  assert (cloud.folder / "saved").read_text() == "saved\nsaved\n"
  assert "saving..." in errors
  cloud.assert_nothing_left()


@pytest.mark.parametrize("failures", [0, 1])
def test_kept_slices_are_found_again(cloud, failures):
  """KEEP=1 leaves the run; the same command goes on with it, once."""
  cloud.ends("stay")
  process = cloud.start(KEEP="1")
  wait_for_runs(process, cloud)
  process.terminate()
  process.communicate(timeout=120)
  assert (cloud.folder / "slice").read_text() == "ACTIVE"
  assert not (cloud.folder / "saved").exists()
  (cloud.folder / "faults").write_text(json.dumps({"outcome": failures}))
  again = cloud.start()
  calls = cloud.folder / "calls"
  wait_for(again, lambda: calls.read_text().count("tail -n +1") == 2)
  again.terminate()
  again.communicate(timeout=120)
  assert cloud.verbs().count("create") == 1
  assert cloud.verbs().count("scp") == 1 + failures
  assert len(cloud.runs()) == 2
  cloud.assert_nothing_left()


def test_a_slice_that_cannot_be_deleted_is_told(make_cloud):
  cloud = make_cloud(delete=100)
  cloud.ends(0)
  code, _, errors = cloud.finish()
  assert code == 0
  assert "slice umae may still be there, and cost: delete it by" in errors
  command = "gcloud compute tpus queued-resources delete umae --force"
  assert command in errors


@pytest.mark.parametrize(
  "flags, variables, message",
  [
    (FLAGS, {"PROJECT": ""}, "PROJECT is not set"),
    (FLAGS, {"WORKDIR": "runs/x"}, r"WORKDIR='runs/x' must be gs://"),
    (FLAGS, {"ACCELERATOR": "tpu7x-8"}, "ACCELERATOR=tpu7x-8 is none of v4-N"),
    (["--config=configs/no.py"], {}, "--config=configs/no.py names no file"),
    (["--config.seed=1"], {}, "--config= names no file"),
  ],
)
def test_wrong_settings_are_told_before_anything(
  cloud, flags, variables, message
):
  code, _, errors = cloud.finish(*flags, **variables)
  assert code == 2
  assert message in errors
  assert not (cloud.folder / "calls").exists()


REAL = [
  "--config=configs/digits.py:smoke",
  "--config.model.depth=1",
  "--config.model.decoder_depth=1",
  "--config.num_epochs=3",
  "--config.evaluation.every_epochs=1",
  "--config.checkpoint.every_steps=7",
  "--config.log.every_steps=1",
]


def read_log(workdir):
  """The log without what a clock measures."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
    {key: x for key, x in json.loads(line).items() if key[:5] != "time/"}
    for line in lines
  ]


@pytest.mark.slow
def test_training_goes_through_a_preemption_to_the_same_end(cloud, tmp_path):
  """Real runs on both workers; the slice ends after the first evaluation."""
  program = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
  (cloud.folder / "run").write_text(program)
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    coordinator = f"localhost:{probe.getsockname()[1]}"
  settings = {
    "FAKE_COORDINATOR": coordinator,
    "POLL": "0.5",
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  outputs = {}
  for name in ("whole", "preempted"):
    if name == "preempted":
      (cloud.folder / "vanish").write_text("1 evaluation at step")
    process = cloud.start(*REAL, f"--workdir={tmp_path / name}", **settings)
    outputs[name], errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    cloud.assert_nothing_left()
  assert "starting afresh" in outputs["whole"]
  assert "preempted (GONE); asking for another slice" in errors
  assert "resuming after step" in outputs["preempted"]
  assert cloud.verbs().count("create") == 3
  whole, preempted = (read_log(tmp_path / x) for x in ("whole", "preempted"))
  assert whole == preempted
  assert whole[-1]["step"] == 63
