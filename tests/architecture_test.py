"""The shape of the package is a test: who may import whom, and how big."""

import ast
import pathlib
import subprocess
import sys
import tokenize

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
PACKAGE = REPOSITORY / "umae_jax"
MAX_LINES, MAX_FUNCTION_LINES = 300, 60
# Of code: what trains and evaluates, and each tool around it.
MAX_TOTAL = {"analysis": 1775, "benchmark": 700, "convert": 975}
MAX_TOTAL |= {"doctor": 300, "storage": 150, "": 5600}

# Level of each module or folder: a module imports only from lower levels, and
# from its own folder where it has one.
LEVELS = {
  "analysis.report": 5.5,
  "main": 5.5,
  "doctor": 5,
  "benchmark": 5,
  "benchmark.flops": 0,
  "loop": 4,
  "run": 3.5,
  "analysis.findings": 3.5,
  "feeding": 3.5,
  "tasks": 3,
  "train_step": 2,
  "evals": 2,
  "analysis": 2,
  "analysis.sweep": 5,
  "models": 1,
  "convert": 1.5,
  # What needs no Flax: images to patches; losses are made of it.
  "models.masking": 0,
  "models.patches": 0,
  "device_crop": 0,
  "losses": 0.5,
  "mixing": 0,
  "optimizers": 0,
  "sharding": 0,
  "config": 0,
  "command_line": 0.5,
  "validation": 0.5,
  "metrics": 0,
  "checkpoint": 0.5,
  "checkpoint_files": 0,
  "host_memory": 0,
  "storage": -1,  # Paths, that all others take.
  "integrity": 0,
  "workdir": 0,
  "data": 0,
  "data.on_device": 0.5,
  "data.prepare": 0.5,
}
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = [
  ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in MODULES
]
ONLY = {  # Which folders or modules may import a library.
  "flax": {"models"},
  "orbax": {"checkpoint"},
  "tensorflow": {"data"},
  "tensorflow_datasets": {"data"},
  "torch": {"convert", "benchmark"},
}


def imported(tree):
  """Full names of the modules that `tree` imports, at any depth."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "imports are absolute"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def level(name):
  """The level of `models.vit`: its own, or its folder's."""
  return LEVELS.get(name, LEVELS.get(name.split(".")[0]))


@pytest.mark.parametrize("path, name", list(zip(MODULES, NAMES)), ids=NAMES)
def test_module_keeps_its_layer_and_size(path, name):
  source = path.read_text()
  tree = ast.parse(source)
  assert ast.get_docstring(tree), "a module says what it is for"
  name = name.removesuffix(".__init__")
  for other in imported(tree):
    library = other.split(".")[0]
    assert name.split(".")[0] in ONLY.get(library, {name.split(".")[0]})
    if not other.startswith("umae_jax.") or name == "__init__":
      continue
    parts = other.removeprefix("umae_jax.").split(".")
    if parts[0] in ("UserError", name.split(".")[0]):
      continue
    theirs = level(".".join(parts[:2]))
    assert theirs is not None, f"{other} has no level"
    assert theirs < level(name), f"{name} must not import {other}"
  assert len(source.splitlines()) <= MAX_LINES
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef):
      body = node.body[bool(ast.get_docstring(node)) :]
      size = node.end_lineno - body[0].lineno + 1 if body else 0
      assert size <= MAX_FUNCTION_LINES, f"{node.name}: {size} lines"


def code_lines(path):
  """The lines that hold code: no blank ones, comments or docstrings."""
  kinds = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT}
  kinds |= {tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}
  lines, last = set(), tokenize.NEWLINE
  with tokenize.open(path) as file:
    for token in tokenize.generate_tokens(file.readline):
      starts = last in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
      docstring = token.type == tokenize.STRING and starts
      if token.type not in kinds and not docstring:
        lines |= set(range(token.start[0], token.end[0] + 1))
      if token.type not in (tokenize.NL, tokenize.COMMENT):
        last = token.type
  return len(lines)


def test_the_package_stays_small():
  total = dict.fromkeys(MAX_TOTAL, 0)
  for path, name in zip(MODULES, NAMES):
    part = name.split(".")[0]
    total[part if part in total else ""] += code_lines(path)
  assert all(total[part] <= most for part, most in MAX_TOTAL.items()), total


def test_nothing_is_called_after_nothing():
  words = {"utils", "util", "common", "helpers", "helper", "misc"}
  assert not words & {part for name in NAMES for part in name.split(".")}


# Parts, tested through their package's doors.
TESTED_BY = {
  "analysis.findings": "analysis.report",
  "analysis.runs": "analysis.report",
  "checkpoint_files": "checkpoint",
  "command_line": "main",
  "benchmark.__main__": "benchmark.command_line",
  "convert.__main__": "convert.command_line",
  "convert.shapes": "convert.sources",
  "doctor.doubts": "doctor.examine",
  "data.arrays": "data.sources",
  "data.class_lists": "data.sources",
  "data.folder": "data.sources",
  "data.host_tensorflow": "data.sources",
  "data.on_device": "data.in_memory",
  "data.share": "data.pipeline",
  "data.stream": "data.pipeline",
  "data.table": "data.pipeline",
}


def test_every_module_has_a_test_file():
  for name in NAMES:
    parts = TESTED_BY.get(name, name).split(".")
    file = (REPOSITORY / "tests").joinpath(*parts[:-1], f"{parts[-1]}_test.py")
    assert name.endswith("__init__") or file.exists(), name


def test_importing_the_package_loads_neither_jax_nor_tensorflow():
  program = (
    "import sys, umae_jax\n"
    "assert not {'jax', 'tensorflow'} & set(sys.modules)\n"
    "import umae_jax.loop\n"
    "assert 'tensorflow' not in sys.modules\n"
  )
  subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)
