"""The notebook: committed clean, of small cells, and it runs to its end."""

import ast
import base64
import builtins
import io
import json
import os
import pathlib
import re
import subprocess
import sys

from IPython.core.inputtransformer2 import TransformerManager
import nbclient
import nbformat
import numpy as np
from PIL import Image
import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]
NOTEBOOK = REPOSITORY / "launch" / "colab.ipynb"
MAX_LINES = 15
SHELL = {"get_ipython", "_exit_code"}  # What "!" lines define.
# Names that later cells may take from earlier ones, beside imports.
SETTINGS = {"EPOCHS", "OWN_EPOCHS", "OWN_IMAGES", "RUNS", "UMAE", "MAE", "OWN"}
RESULTS = {"pretrained", "test_images", "digits", "features", "folder"}


def read():
  return nbformat.read(NOTEBOOK, as_version=4)


def code_cells():
  return [cell for cell in read().cells if cell.cell_type == "code"]


def draws(cell):
  """Whether the cell's value is a picture."""
  return cell.source.splitlines()[-1].startswith("Image.")


def test_the_notebook_is_committed_without_outputs():
  notebook = read()
  nbformat.validate(notebook)
  for cell in code_cells():
    assert cell.outputs == []
    assert cell.execution_count is None
    assert cell.metadata == {}
  assert "widgets" not in notebook.metadata


def test_cells_are_short_and_their_code_is_clean():
  for cell in code_cells():
    assert len(cell.source.splitlines()) <= MAX_LINES, cell.source
  for command in (["check"], ["format", "--check"]):
    done = subprocess.run(
      [sys.executable, "-m", "ruff", *command, NOTEBOOK],
      cwd=REPOSITORY,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_command_may_fail_unnoticed():
  """IPython goes on after a failed "!", unless its exit code is looked at."""
  commands = [cell.source for cell in code_cells() if "!" in cell.source]
  commands = [x for x in commands if re.search(r"^ *!", x, re.MULTILINE)]
  assert len(commands) >= 5
  for source in commands:
    after = re.split(r"^ *!", source, flags=re.MULTILINE)[-1]
    assert "assert _exit_code == 0" in after, source


def names(cell):
  """(names a cell defines, those of them by imports, names it uses)."""
  tree = ast.parse(TransformerManager().transform_cell(cell.source))
  defined, used, modules = set(), set(), set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import | ast.ImportFrom):
      modules |= {alias.asname or alias.name for alias in node.names}
    elif isinstance(node, ast.Name):
      (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      used |= set(re.findall(r"{(\w+)}", node.value))  # Of "!" lines.
  return defined | modules, modules, used


def test_no_cell_hangs_on_leftovers_of_another():
  seen, imported = set(SHELL), set()
  for cell in code_cells():
    defined, modules, used = names(cell)
    foreign = used - defined - set(vars(builtins)) - SHELL
    assert foreign <= seen, f"{foreign - seen} come later:\n{cell.source}"
    allowed = imported | SETTINGS | RESULTS
    assert foreign <= allowed, f"{foreign - allowed} in:\n{cell.source}"
    assert not defined & SETTINGS & seen, "a setting is set once"
    seen |= defined
    imported |= modules


def execute(notebook, folder):
  """Runs it in a kernel with the environment of a user, not of a test."""
  fakes = ("JAX_", "XLA_", "TF_", "PYTHON", "PYTEST")
  environment = {k: x for k, x in os.environ.items() if not k.startswith(fakes)}
  binaries = pathlib.Path(sys.executable).parent  # Of "!python".
  environment |= {
    "PATH": f"{binaries}{os.pathsep}{environment['PATH']}",
    "PYTHONPATH": str(REPOSITORY),
  }
  client = nbclient.NotebookClient(
    notebook, timeout=1200, resources={"metadata": {"path": str(folder)}}
  )
  client.execute(env=environment)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
  """(the notebook with its outputs, the folder where it ran)."""
  folder = tmp_path_factory.mktemp("colab")
  (folder / "configs").symlink_to(REPOSITORY / "configs")
  notebook = read()
  try:
    execute(notebook, folder)
  finally:
    nbformat.write(notebook, folder / "executed.ipynb")
  return notebook, folder


@pytest.mark.slow
def test_every_picture_is_there(executed):
  """Beside executed.ipynb as PNGs, to be looked at."""
  notebook, folder = executed
  expected = [i for i, x in enumerate(notebook.cells) if draws(x)]
  assert len(expected) == 8
  for i in expected:
    data = [x.data for x in notebook.cells[i].outputs if "data" in x]
    assert "image/png" in data[-1], notebook.cells[i].source
    png = base64.b64decode(data[-1]["image/png"])
    (folder / f"cell{i}.png").write_bytes(png)
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    assert min(picture.shape[:2]) >= 400
    assert picture.std() > 20, "nearly blank"


@pytest.mark.slow
def test_nothing_is_complained_of(executed):
  for cell in executed[0].cells:
    for output in cell.get("outputs", ()):
      assert output.output_type != "error"
      complaint = output.get("name") == "stderr" and output.text
      assert not complaint, f"{complaint} by:\n{cell.source}"


@pytest.mark.slow
def test_what_it_says_of_the_runs_is_so(executed):
  notebook, folder = executed
  runs = folder / "runs" / "first"
  umae, mae = (
    json.loads((runs / name / "summary.json").read_text())
    for name in ("umae", "mae")
  )
  assert umae["effective_rank"] > 1.1 * mae["effective_rank"]
  assert umae["uniformity_loss"] < 0.5 * mae["uniformity_loss"]
  ratio = umae["reconstruction_loss"] / mae["reconstruction_loss"]
  assert 0.95 < ratio < 1.05
  outputs = [x for cell in notebook.cells for x in cell.get("outputs", ())]
  tables = [x.text for x in outputs if "text" in x]
  figures = f"{umae['linear_accuracy']:.3f}", f"{umae['knn_accuracy']:.3f}"
  assert any(all(x in table for x in figures) for table in tables)
  own = np.load(runs / "own_features" / "features.npz")
  assert own["features"].shape == (168, 128)
  assert len(set(own["names"].tolist())) == 168


@pytest.mark.slow
def test_a_command_that_fails_stops_it(tmp_path):
  """Without configs/ the first training is refused, in words."""
  notebook = read()
  with pytest.raises(nbclient.exceptions.CellExecutionError) as stopped:
    execute(notebook, tmp_path)
  assert "not trained; see the message above" in str(stopped.value)
  ran = [cell for cell in code_cells() if cell.source in str(stopped.value)]
  assert len(ran) == 1
  assert '--workdir="{UMAE}"' in ran[0].source
  outputs = [x for cell in notebook.cells for x in cell.get("outputs", ())]
  text = "".join(x.get("text", "") for x in outputs)
  assert "configs/digits.py" in text
