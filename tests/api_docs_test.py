"""The site of documents and API builds, and a broken reference breaks it."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
# file, what it says, what it says then, and what the build must say of it.
BROKEN = [
  (
    "umae_jax/losses.py",
    "(`normalize_patches`)",
    "(`losses.normalise_patches`)",
    "there is no `losses.normalise_patches`",
  ),
  (
    "umae_jax/data/pipeline.py",
    "`device_crop.finish`",
    "`device_crop.finished(batch)`",
    "there is no `device_crop.finished(batch)`",
  ),
  (
    "umae_jax/config.py",
    "encoder in `config.model`",
    "encoder in `config.modell`",
    "there is no `config.modell`",
  ),
  (
    "umae_jax/masks.py",
    "",
    '"""New; as `models.masking.none`."""\n',
    "umae_jax.masks: there is no `models.masking.none`",
  ),
  (
    "umae_jax/sharding.py",
    '  """Rows split over all devices."""',
    '  """Rows split.\n\n  One line,\n  two,\n    three.\n  """',
    "docstring of umae_jax.sharding.batch_sharding:5: ERROR",
  ),
  (
    "docs/theory.md",
    "# The theory, computed\n",
    "# The theory, computed\n\n[a](../umae_jax/no.py), [b](#no-heading)\n",
    "umae_jax/no.py",
  ),
  ("docs/lonely.md", "", "# Of no table of contents\n", "lonely.md"),
]


def build(folder):
  """Of the copy of the repository in `folder`, its modules, and no other."""
  command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
  return subprocess.run(
    [*command, "-c", "docs", ".", "build/docs"],
    cwd=folder,
    env=os.environ | {"PYTHONPATH": str(folder)},
    capture_output=True,
    text=True,
  )


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
  """(folder, what the build of an unchanged copy of the repository says)."""
  folder = tmp_path_factory.mktemp("site") / "umae_jax"
  ignored = shutil.ignore_patterns("runs", ".*", "build", "api", "reference")
  shutil.copytree(REPOSITORY, folder, ignore=ignored)
  return folder, build(folder)


def page(folder, name):
  path = folder / f"build/docs/docs/api/umae_jax.{name}.html"
  return " ".join(path.read_text().split())


@pytest.mark.slow
def test_the_site_builds_without_a_warning(copy):
  folder, done = copy
  assert done.returncode == 0 and not done.stderr, done.stderr
  assert (folder / "build/docs/docs/index.html").exists()
  modules = {
    ".".join(path.relative_to(folder).with_suffix("").parts)
    for path in (folder / "umae_jax").rglob("*.py")
  }
  modules = {x.removesuffix(".__init__") for x in modules}
  pages = {x.stem for x in (folder / "build/docs/docs/api").glob("*.html")}
  assert pages == {x for x in modules if not x.endswith("__main__")}


@pytest.mark.slow
def test_names_between_backticks_are_links(copy):
  """And fields stand once, arguments whole, private functions nowhere."""
  losses, mae = page(copy[0], "losses"), page(copy[0], "models.mae")
  assert '<a class="reference internal" href="#umae_jax.losses.second' in losses
  assert "_unit_rows" not in losses
  assert '"umae_jax.models.mae.MaskedAutoencoder.__call__"' in mae
  assert "Alias for field" not in mae and "Sentinel" not in mae
  assert "models.mae.html#umae_jax.models.mae.MaskedAutoencoder" in page(
    copy[0], "convert"
  )
  assert "left out: the model" in page(copy[0], "convert")
  assert "<strong>new_labels</strong>" in page(copy[0], "data.class_lists")


@pytest.mark.slow
def test_the_build_loads_no_tensorflow(copy):
  program = (
    "import runpy, sys; runpy.run_path('docs/conf.py')\n"
    "assert 'umae_jax.data.tfds' in sys.modules\n"
    "assert 'tensorflow' not in sys.modules\n"
  )
  env = os.environ | {"PYTHONPATH": str(copy[0])}
  command = [sys.executable, "-c", program]
  subprocess.run(command, check=True, cwd=copy[0], env=env)


@pytest.mark.slow
def test_every_kind_of_broken_reference_breaks_it(copy):
  """Last, as it breaks the copy; pages that did not change are kept."""
  folder, _ = copy
  for file, old, new, _ in BROKEN:
    path = folder / file
    text = path.read_text() if path.exists() else ""
    assert old in text, file
    path.write_text(text.replace(old, new, 1) if old else new)
  done = build(folder)
  assert done.returncode == 1
  for *_, message in [*BROKEN, ("no-heading",)]:
    assert message in done.stderr, f"{message}\n{done.stderr}"
