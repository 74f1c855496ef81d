"""Reports of real runs: what is read, what is found, and the page."""

import base64
import html.parser
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from umae_jax import UserError, losses
from umae_jax.analysis import findings, report, runs, similarity
from umae_jax.data import sources
from umae_jax.models import masking
from umae_jax.tasks import inputs, pretrain

pytestmark = pytest.mark.slow  # Real runs, one after the other.

REPOSITORY = pathlib.Path(__file__).parents[2]
SMOKE = [
  "--config=configs/digits.py:smoke",
  "--config.model.depth=2",
  "--config.model.decoder_depth=1",
]
PICTURES = {
  *("curves", "spectrum", "layers", "reconstructions", "neighbours", "tsne"),
  *("attention", "pairs", "cka"),
}


def run_module(name, *flags):
  """Runs a module of the package in a process of its own."""
  return subprocess.run(
    [sys.executable, "-m", f"umae_jax.{name}", *map(str, flags)],
    cwd=REPOSITORY,
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    capture_output=True,
    text=True,
    timeout=600,
  )


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
  """A folder of two finished runs, "mae" and "umae"."""
  folder = tmp_path_factory.mktemp("runs")
  for name, weight in (("mae", 0), ("umae", 0.01)):
    flags = (f"--config.loss.uniformity_weight={weight}", "--config.seed=3")
    done = run_module("main", *SMOKE, *flags, f"--workdir={folder / name}")
    assert done.returncode == 0, done.stderr
  return folder


@pytest.fixture
def changed(trained, tmp_path):
  """Returns (changes to its config.json) -> a copy of "umae"."""

  def change(**keys):
    path = tmp_path / "other"
    shutil.copytree(trained / "umae", path)
    config = json.loads((path / "config.json").read_text())
    config |= {key.replace("__", "."): x for key, x in keys.items()}
    (path / "config.json").write_text(json.dumps(config))
    return path

  return change


class Page(html.parser.HTMLParser):
  """What a page holds: (tag, attributes), its texts, and open elements."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.texts, self.open = [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in ("meta", "link", "img"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)

  def all(self, attribute):
    return [x[attribute] for _, x in self.tags if attribute in x]


@pytest.fixture(scope="session")
def written(trained, tmp_path_factory):
  """The report of both runs: (its directory, what was printed)."""
  output = tmp_path_factory.mktemp("out") / "report"
  done = run_module(
    "analysis.report", trained / "mae", trained / "umae", f"--output={output}"
  )
  assert done.returncode == 0, done.stderr
  return output, done.stdout


def test_the_page_is_whole_and_no_request_leaves_it(written):
  output, _ = written
  text = (output / "index.html").read_text()
  page = Page(text)
  assert page.open == []
  ids = page.all("id")
  assert len(set(ids)) == len(ids) == 10
  links = page.all("src") + page.all("href")
  assert all(x.startswith("data:") or x[1:] in ids for x in links)
  assert {x[1:] for x in page.all("href") if x[0] == "#"} == set(ids)
  assert not re.search(r"<script|url\(|@import|https?:|srcset", text)
  assert "$" not in "".join(page.texts)
  assert "default-src 'none'" in "".join(page.all("content"))


def test_every_picture_is_inside_beside_and_described(written):
  output, _ = written
  assert {x.name for x in output.iterdir()} == {
    "index.html",
    *(f"{name}.png" for name in PICTURES),
  }
  page = Page((output / "index.html").read_text())
  images = [x for tag, x in page.tags if tag == "img"]
  assert all(len(x["alt"]) > 20 for x in images)
  inside = {base64.b64decode(x["src"].split(",", 1)[1]) for x in images}
  beside = {x.read_bytes() for x in output.glob("*.png")}
  assert inside == beside and len(inside) == len(PICTURES)


def test_the_tables_hold_the_last_evaluations(written, trained):
  output, printed = written
  texts = Page((output / "index.html").read_text()).texts
  for label in ("mae (MAE)", "umae (U-MAE)"):
    assert texts.count(label) == 3  # A row of each table.
    assert label in printed
  assert "loss.uniformity_weight" in texts
  assert not any("every_epochs" in x or x == "seed" for x in texts)
  for name in ("mae", "umae"):
    summary = json.loads((trained / name / "summary.json").read_text())
    assert f"{100 * summary['knn_accuracy']:#.4g}" in texts
    assert f"{summary['uniformity_loss']:#.4g}" in texts
  whole = " ".join(texts)
  assert "checkpoint of step 21" in whole and "finished" in whole
  assert "397 whole evaluation images" in " ".join(whole.split())
  assert str(trained) not in whole


def test_one_run_without_log_in_the_place_of_an_older_report(
  trained, written, tmp_path, capsys
):
  path = tmp_path / "a <run>"
  shutil.copytree(trained / "umae", path)
  for name in ("metrics.jsonl", "summary.json"):
    (path / name).unlink()
  shutil.copytree(written[0], path / "report")
  assert report.main([str(path), "--images=70"]) == 0
  text = (path / "report" / "index.html").read_text()
  assert "a <run> (U-MAE): not finished" in "".join(Page(text).texts)
  assert "a <run>" not in text
  assert "wrote" in capsys.readouterr().out


def test_what_is_found_is_what_the_model_says(trained):
  """Of a number of images that is no multiple of the batch."""
  (run,) = runs.read([trained / "umae"])
  images, labels, names = report.read_images(run, 70, None)
  assert names == tuple("0123456789") and len(images) == len(labels) == 70
  found = findings.find(run, images, labels)
  x = inputs.normalize(images, (0.3,), (0.375,))
  noise = [np.asarray(findings.noise_of(run.model, images, i)) for i in (0, 1)]
  assert (noise[0] != noise[1]).all()

  def tokens(*given, method):
    out = run.model.apply({"params": run.params}, x, *given, method=method)
    return np.asarray(out)[:, 0]

  same = {"rtol": 1e-3, "atol": 1e-4}
  whole = tokens(method=run.model.encode)
  masked, other = (
    tokens(y, 0.5, method=run.model.encode_visible) for y in noise
  )
  np.testing.assert_allclose(found.whole[-1], whole, **same)
  np.testing.assert_allclose(found.masked[-1], masked, **same)
  assert found.whole.shape == found.masked.shape == (3, 70, 64)
  np.testing.assert_allclose(
    found.uniformity, losses.uniformity_loss(masked), rtol=1e-3
  )
  removed = np.asarray(masking.from_noise(noise[1], 8).mask)
  patches = images.reshape(70, 4, 2, 4, 2).swapaxes(2, 3).reshape(70, 16, 4)
  partners = {
    "same image, two masks": np.arange(70),
    "sharing a target": similarity.sharing_pairs(
      patches, noise[0], removed, normalize=False
    ),
    "random": np.roll(np.arange(70), 1),
  }
  assert tuple(partners) == findings.PAIRS
  for kind, partner in partners.items():
    cosines = [
      a @ b / np.linalg.norm(a) / np.linalg.norm(b)
      for a, b in zip(masked, other[partner])
    ]
    np.testing.assert_allclose(found.cosines[kind], cosines, **same)
    np.testing.assert_allclose(
      found.alignment[kind], 2 - 2 * np.mean(cosines), **same
    )
    share = (labels == labels[partner]).mean()
    assert found.same_label[kind] == pytest.approx(share)
  assert found.same_label["same image, two masks"] == 1


def test_images_are_those_the_evaluation_sees(trained):
  (run,) = runs.read([trained / "mae"])
  images, labels, _ = report.read_images(run, 10_000, None)
  source = sources.open_source("digits", "test", image_size=(8, 8), channels=1)
  assert len(images) == 397
  np.testing.assert_array_equal(
    np.sort(images.reshape(397, -1).sum(1)),
    np.sort(source.load().reshape(397, -1).sum(1)),
  )
  assert np.bincount(labels).tolist() == np.bincount(source.labels).tolist()


def test_reconstructions_agree_with_training_and_masks_are_nested(trained):
  (run,) = runs.read([trained / "umae"])
  images, _, _ = report.read_images(run, 12, None)
  masked, filled = findings.reconstruct(run, images, 0.5)
  config = run.config.copy_and_resolve_references()
  config.seed = 0
  original, want, predicted = map(
    np.asarray,
    pretrain.reconstructions(run.model, config, run.params, images),
  )
  np.testing.assert_array_equal(masked, want)
  removed = want != original
  assert removed.mean() == 0.5
  np.testing.assert_array_equal(filled[removed], predicted[removed])
  np.testing.assert_array_equal(filled[~removed], original[~removed])
  more, _ = findings.reconstruct(run, images, 0.75)
  assert ((more != original) >= removed).all()


def test_attention_lies_over_its_patches(trained):
  (run,) = runs.read([trained / "umae"])
  images = np.zeros((1, 8, 8, 1), np.uint8)
  weights = findings.attention(run, images)
  assert weights.shape == (4, 1, 4, 4)
  assert (weights.sum((-1, -2)) < 1).all() and (weights > 0).all()
  images[0, 2:4, 6:] = 255  # Only the patch of row 1, column 3.
  change = abs(np.log(findings.attention(run, images) / weights)).mean((0, 1))
  assert change.argmax() == 1 * 4 + 3


def test_keys_newer_than_the_run_have_defaults(changed):
  path = changed()
  config = json.loads((path / "config.json").read_text())
  del config["data.feed"], config["execution.attention"]
  (path / "config.json").write_text(json.dumps(config))
  (run,) = runs.read([path])
  assert run.config.data.feed == "host"
  assert run.config.loss.uniformity_weight == 0.01
  assert run.step == 21 and run.finished and run.records


def test_runs_are_named_by_what_differs(trained, changed, tmp_path):
  for name in ("a", "b"):
    shutil.copytree(trained / "mae", tmp_path / name / "run")
  found = runs.read([tmp_path / "a" / "run", tmp_path / "b" / "run"])
  assert [x.label for x in found] == ["a/run (MAE)", "b/run (MAE)"]
  assert runs.differences(found) == []
  path = changed(data__feed="host", log__images=3, mesh__fsdp=2)  # No matter.
  both = runs.read([trained / "mae", path])
  assert runs.differences(both) == ["loss.uniformity_weight"]


def refused(capsys, *arguments):
  """The one line that a wrong usage is told in."""
  try:
    code = report.main(list(map(str, arguments)))
  except SystemExit as exit:
    code = exit.code
  output, errors = capsys.readouterr()
  assert code == 2 and "wrote" not in output
  lines = errors.strip().splitlines()
  assert len(lines) == 1 or lines[0].startswith("usage: ")
  return lines[-1]


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "required: RUN"),
    (["no/such"], "RUN=no/such is no work directory of a run: it has no conf"),
    (["tests"], "RUN=tests is no work directory of a run"),
    (["a", "--images=3"], "--images: '3': at least 12"),
    (["a", "./a"], "two are the same"),
    ([*"abcdefg"], "7 are given; a picture has room for 6"),
  ],
)
def test_wrong_usage_is_told_in_one_line(capsys, arguments, message):
  assert message in refused(capsys, *arguments)


@pytest.mark.parametrize(
  "keys, message",
  [
    ({"task": "linear_probe"}, "task='linear_probe'; a report is of pretrain"),
    ({"data__name": "cifar10"}, "data.name='cifar10', there 'digits'"),
    ({"data__image_size": [16, 16]}, r"data.image_size=\[16, 16\], there \[8"),
    ({"model__patch_size": 4}, "model.patch_size=4, there 2"),
    ({"model__depth": 3}, "block2"),
  ],
)
def test_runs_that_cannot_be_compared(capsys, trained, changed, keys, message):
  path = changed(**keys)
  line = refused(capsys, trained / "mae", path)
  assert re.search(message, line) and "other" in line
  assert not (trained / "mae" / "report").exists()


def test_damaged_work_directories(capsys, changed, tmp_path):
  path = changed()
  shutil.rmtree(path / "checkpoints")
  (path / "checkpoints").mkdir()
  assert "no readable checkpoint" in refused(capsys, path)
  (path / "config.json").write_text("{")
  assert "config.json is not a readable JSON" in refused(capsys, path)


def test_data_that_have_moved(capsys, changed, tmp_path):
  path = changed(data__name="folder", data__directory="/no/such")
  line = refused(capsys, path)
  assert "/no/such" in line and "--data_dir" in line
  assert str(tmp_path / "x") in refused(
    capsys, path, f"--data_dir={tmp_path / 'x'}"
  )


def test_nothing_foreign_is_overwritten(capsys, trained, tmp_path):
  (tmp_path / "index.html").write_text("my page")
  line = refused(capsys, trained / "mae", f"--output={tmp_path}")
  assert "exists and is no report" in line
  file = tmp_path / "index.html"
  assert "is no report" in refused(capsys, trained / "mae", f"--output={file}")
  assert [x.name for x in tmp_path.iterdir()] == ["index.html"]
  assert file.read_text() == "my page"


def test_errors_are_user_errors():
  with pytest.raises(UserError):
    runs.read(["no/such"])
  assert jax.device_count() == 8  # The figures do not depend on it.
