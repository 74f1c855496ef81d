"""The documents tell the truth: commands, Python, links and names in them."""

import functools
import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from umae_jax import config as config_lib

REPOSITORY = pathlib.Path(__file__).parents[1]
DOCUMENTS = [
  *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
  *("docs/benchmarks.md", "docs/fidelity.md", "docs/theory.md"),
  "launch/README.md",
]
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->", re.DOTALL)
# Added to what trains, so that it takes seconds: all else is as written.
SHORT = {
  "umae_jax.main": [
    *("--config.num_epochs=1", "--config.optimizer.warmup_epochs=0"),
    *("--config.probe.epochs=(1,)", "--config.probe.draws=2"),
  ],
  "umae_jax.analysis.mask_ratio": ["--seeds=1"],
  "umae_jax.analysis.sweep": [
    *("--mask_ratio=0.5", "--weight=0,0.01", "--seeds=0"),
    *("--config.num_epochs=1", "--config.optimizer.warmup_epochs=0"),
  ],
}


def blocks(document):
  """(text, reason not to run it) of the indented blocks of a document."""
  found, reason = [], ""
  text = (REPOSITORY / document).read_text()
  for part in re.split(r"\n\s*\n", re.sub("```.*?```", "", text, flags=re.S)):
    mark = NOT_RUN.search(part)
    code = [x for x in part.splitlines() if not NOT_RUN.fullmatch(x.strip())]
    if code and all(line.startswith("    ") for line in code):
      found.append(("\n".join(line[4:] for line in code), reason))
    # A mark stands above its block, and goes no further.
    reason = mark[1] if mark else ""
  return found


def commands(text):
  """Lines of a block, continued ones as one, without comments."""
  for line in text.replace("\\\n", " ").splitlines():
    line = re.sub(r"\s+#.*|^#.*", "", line).strip()
    if re.match(
      r"(python|pip|pytest|bash|ruff|pre-commit|sbatch|docker)", line
    ):
      yield line


def all_commands():
  """(document, command) of blocks, of sentences, and of configs' docstrings."""
  for document in DOCUMENTS:
    text = (REPOSITORY / document).read_text()
    for found in re.findall(r"`(python -m[^`]+)`", text):
      yield document, " ".join(found.split())
    for block, _ in blocks(document):
      for command in commands(block):
        yield document, command
  for file in sorted((REPOSITORY / "configs").glob("*.py")):
    docstring = file.read_text().split('"""')[1]
    for command in commands(re.sub("^  ", "", docstring, flags=re.M)):
      yield f"configs/{file.name}", command


@functools.cache
def load(path):
  spec = importlib.util.spec_from_file_location("config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_documents_hold_commands():
  found = [command for _, command in all_commands()]
  assert len(found) > 40
  assert any("--config.data.directory=photos" in x for x in found)


@pytest.mark.parametrize("document", [*DOCUMENTS, "configs"])
def test_flags_of_every_command_exist(document):
  keys = config_lib.flatten(config_lib.defaults())
  for where, command in all_commands():
    if not where.startswith(document):
      continue
    module = re.search(r"python -m (umae_jax[\w.]*)", command)
    if module:
      assert importlib.util.find_spec(module[1]), command
    if "NAME" in command:  # A template.
      continue
    for key in re.findall(r"--config\.([\w.]+)", command):
      assert key in keys, command
    for file, variant in re.findall(r"--config=(\S+\.py):?(\w*)", command):
      path = REPOSITORY / file
      assert path.exists(), command
      assert not variant or variant in load(path).VARIANTS, command


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_documents_name_exists(document):
  """Links to files, and files, modules and tests between backticks."""
  path = REPOSITORY / document
  text = path.read_text()
  for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
    assert (path.parent / target).exists(), target
  roots = [
    REPOSITORY / x for x in ("", "umae_jax", "tests", "configs", "launch")
  ]
  roots += [path.parent, *(REPOSITORY / "tests").iterdir()]
  for name in re.findall(r"`((?:[\w.]+/)*\w+\.(?:py|sh|md|yaml))`", text):
    assert any((root / name).exists() for root in roots), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_of_commands_is_run_or_says_why_not(document):
  """The slow test below runs them; what it can not has to be marked."""
  for text, reason in blocks(document):
    for command in commands(text):
      known = re.match(r"(python -m umae_jax|bash launch/local)", command)
      tools = document in ("README.md", "CONTRIBUTING.md") and re.match(
        "pip install -e|python3? -m venv|pytest|ruff|pre-commit", command
      )  # Of .ci/run, or of the same kind.
      assert reason or known or tools, f"{document}: {command}"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
  """A copy of the repository with a folder of photos, as users have it."""
  folder = tmp_path_factory.mktemp("docs") / "umae_jax"
  ignored = shutil.ignore_patterns("runs", ".*", "*.egg-info", "reference")
  shutil.copytree(REPOSITORY, folder, ignore=ignored)
  (folder / "photos").mkdir()
  rng = np.random.default_rng(0)
  for number in range(40):
    pixels = rng.integers(0, 256, (3, 4, 3), np.uint8)
    image = Image.fromarray(pixels).resize((90 + number, 70), Image.BICUBIC)
    image.save(folder / "photos" / f"{number:03}.jpg")
  return folder


def environment(folder):
  """That of a user with one CPU, in the virtual environment of this test."""
  programs = pathlib.Path(sys.executable).parent
  return os.environ | {
    "PYTHONPATH": str(folder),
    "JAX_NUM_CPU_DEVICES": "1",
    "PATH": f"{programs}:{os.environ['PATH']}",
  }


def run(command, folder):
  """Runs one command of a document, what trains shortened."""
  words = shlex.split(command)
  module = words[2] if words[:2] == ["python", "-m"] else ""
  if "--doctor" not in words:
    words += SHORT.get(module, [])
  done = subprocess.run(
    [sys.executable if words[0] == "python" else words[0], *words[1:]],
    cwd=folder,
    env=environment(folder),
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of_a_document_run(document, sandbox):
  """In their order; each leaves what the next ones read."""
  for text, reason in blocks(document):
    for command in [] if reason else commands(text):
      # Those two of the README are .ci/run's; here, without what installs.
      command = re.sub("^pip install -e [^&]*(&& )?", "", command)
      if re.match(r"python -m umae_jax|bash", command):
        run(command, sandbox)
  if document == "README.md":
    found = np.load(sandbox / "runs/own_features/features.npz")
    assert len(found["names"]) == 40
    assert (sandbox / "runs/own/reconstructions.png").exists()


@pytest.mark.slow
def test_python_of_the_readme_runs(sandbox):
  """After the commands, which leave the files that it reads."""
  text = (REPOSITORY / "README.md").read_text()
  programs = re.findall("```python\n(.*?)```", text, flags=re.S)
  assert len(programs) >= 2
  for program in programs:
    done = subprocess.run(
      [sys.executable, "-c", program],
      cwd=sandbox,
      env=environment(sandbox),
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr
