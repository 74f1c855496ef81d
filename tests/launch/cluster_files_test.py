"""Files for Kubernetes, SkyPilot and Docker."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml

REPOSITORY = pathlib.Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"


def jobsets():
  text = (LAUNCH / "gke_jobset.yaml").read_text()
  return {x["metadata"]["name"]: x for x in yaml.safe_load_all(text)}


@pytest.fixture(params=["umae-tpu", "umae-gpu"])
def jobset(request):
  return jobsets()[request.param]


def container(jobset):
  [workers] = jobset["spec"]["replicatedJobs"]
  [found] = workers["template"]["spec"]["template"]["spec"]["containers"]
  return found


def test_documents_are_chosen_by_label():
  found = {x["metadata"]["labels"]["accelerator"] for x in jobsets().values()}
  assert found == {"tpu", "gpu"}


def test_jobs_fulfil_the_schema_of_kubernetes(jobset):
  assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert jobset["spec"].keys() == {"failurePolicy", "replicatedJobs"}
  [workers] = jobset["spec"]["replicatedJobs"]
  assert workers.keys() == {"name", "replicas", "template"}
  job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
  kubernetes_validate.validate(job | workers["template"], "1.32", strict=True)
  job = workers["template"]["spec"]
  assert job["completionMode"] == "Indexed"
  assert job["parallelism"] == job["completions"]
  assert job["template"]["spec"]["restartPolicy"] == "Never"  # Of the policy.


def test_exit_75_and_evictions_restart_and_errors_are_counted(jobset):
  """A rule of the pods fails the job for a reason that JobSet's rule has."""
  policy = jobset["spec"]["failurePolicy"]
  assert policy["maxRestarts"] == 3
  assert policy["rules"] == [
    {
      "action": "RestartJobSetAndIgnoreMaxRestarts",
      "onJobFailureReasons": ["PodFailurePolicy"],
    }
  ]
  [workers] = jobset["spec"]["replicatedJobs"]
  job = workers["template"]["spec"]
  assert job["backoffLimit"] == 0
  codes, evicted = job["podFailurePolicy"]["rules"]
  assert codes["action"] == evicted["action"] == "FailJob"
  assert codes["onExitCodes"] == {
    "containerName": container(jobset)["name"],
    "operator": "In",
    "values": [75],
  }
  [condition] = evicted["onPodConditions"]
  assert condition == {"type": "DisruptionTarget", "status": "True"}


def test_a_machine_of_the_tpu_has_four_chips():
  jobset = jobsets()["umae-tpu"]
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  selector = job["template"]["spec"]["nodeSelector"]
  topology = selector["cloud.google.com/gke-tpu-topology"]
  chips = eval(topology.replace("x", "*"))
  assert container(jobset)["resources"]["limits"] == {"google.com/tpu": 4}
  assert job["parallelism"] * 4 == chips


def test_processes_on_gpus_find_the_first_pod():
  jobset = jobsets()["umae-gpu"]
  [workers] = jobset["spec"]["replicatedJobs"]
  name = jobset["metadata"]["name"]
  environment = {x["name"]: x for x in container(jobset)["env"]}
  # <jobset>-<replicated job>-<job>-<pod>.<jobset>, by JobSet's own service.
  address = f"{name}-{workers['name']}-0-0.{name}:8476"
  assert environment["JAX_COORDINATOR_ADDRESS"]["value"] == address
  number = workers["template"]["spec"]["parallelism"]
  assert environment["JAX_NUM_PROCESSES"]["value"] == str(number)
  field = environment["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
  assert "batch.kubernetes.io/job-completion-index" in field


def skypilot():
  return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_skypilot_recovers_spot_machines_and_exit_75():
  """Validated by SkyPilot 0.14.1 itself, once; these are the keys it knows."""
  task = skypilot()
  assert task.keys() == {
    *("name", "envs", "num_nodes", "resources", "workdir", "setup", "run"),
  }
  resources = task["resources"]
  assert resources["use_spot"] is True
  assert resources["job_recovery"] == {
    "strategy": "EAGER_NEXT_REGION",
    "max_restarts_on_errors": 0,
    "recover_on_exit_codes": [75],
  }
  used = set(re.findall(r"\$([A-Z_]+)", task["run"]))
  ours = {x for x in used if not x.startswith(("SKYPILOT_", "JAX_"))}
  assert ours == task["envs"].keys()


@pytest.mark.parametrize("code", [0, 75])
def test_skypilots_command_joins_its_nodes(tmp_path, code):
  python = tmp_path / "umae" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.write_text(f'#!/bin/sh\nenv | grep ^JAX_; echo "$@"; exit {code}\n')
  python.chmod(0o755)
  (python.parent / "activate").write_text("PATH=$HOME/umae/bin:$PATH\n")
  variables = skypilot()["envs"] | {
    "HOME": str(tmp_path),
    "PATH": os.environ["PATH"],
    "FLAGS": "--config.seed=1 --config.micro_batches=2",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
  }
  done = subprocess.run(
    ["bash", "-c", skypilot()["run"]],
    env=variables,
    capture_output=True,
    text=True,
  )
  assert done.returncode == code, done.stderr
  assert sorted(done.stdout.splitlines()) == [
    "-m umae_jax.main --multihost --config=configs/imagenet1k.py "
    "--workdir=gs://my-bucket/run --config.data.directory=gs://my-bucket/tfds "
    "--config.seed=1 --config.micro_batches=2",
    "JAX_COORDINATOR_ADDRESS=10.0.0.1:8476",
    "JAX_NUM_PROCESSES=2",
    "JAX_PROCESS_ID=1",
  ]


def test_the_image_holds_what_a_run_needs(tmp_path):
  """The Dockerfile's steps, by hand; dependencies are those of this Python."""
  text = (LAUNCH / "Dockerfile").read_text()
  lines = [x for x in text.splitlines() if x and not x.startswith("#")]
  ignored = (REPOSITORY / ".dockerignore").read_text().split()
  image, site = tmp_path / "image", tmp_path / "site"
  image.mkdir()
  for line in lines:
    words = line.split()
    if words[0] == "COPY":
      for name in words[1:-1]:
        assert f"!{name}" in ignored
        target = image / words[-1]
        if (REPOSITORY / name).is_dir():
          shutil.copytree(REPOSITORY / name, target)
        else:
          shutil.copy(REPOSITORY / name, target)
    if words[0] == "RUN":
      command = line.removeprefix("RUN ").replace(
        "pip install --no-cache-dir",
        f"{sys.executable} -m pip install --quiet --no-deps "
        f"--no-build-isolation --target={site}",
      )
      subprocess.run(command, shell=True, check=True, cwd=image)
      shutil.rmtree(image / "umae_jax")  # The installed one has to do.
      shutil.rmtree(image / "build", ignore_errors=True)
  entry = lines[-1].removeprefix("ENTRYPOINT ")
  done = subprocess.run(
    [sys.executable, *yaml.safe_load(entry)[1:], "--config=configs/digits.py"],
    cwd=image,
    env=os.environ | {"PYTHONPATH": str(site)},
    capture_output=True,
    text=True,
  )
  assert "--workdir is missing" in done.stderr
  assert (site / "umae_jax" / "data" / "imagenet100.txt").exists()
