import json

import pytest

from umae_jax import UserError, workdir

CONFIG = {"task": "pretrain", "seed": 0, "data.image_size": [8, 8]}


def test_a_new_directory_is_checked_without_being_made(tmp_path):
  path = tmp_path / "a" / "b"
  workdir.check(path, CONFIG)
  assert not (tmp_path / "a").exists()
  workdir.claim(path, CONFIG)
  assert json.loads((path / "config.json").read_text()) == CONFIG


def test_the_same_configuration_resumes(tmp_path):
  workdir.claim(tmp_path, CONFIG)
  workdir.check(tmp_path, CONFIG)
  workdir.claim(tmp_path, CONFIG)
  assert [x.name for x in tmp_path.iterdir()] == ["config.json"]


def test_a_difference_is_shown_and_refused(tmp_path):
  workdir.claim(tmp_path, CONFIG)
  changed = CONFIG | {"seed": 1, "new": 2.5}
  with pytest.raises(UserError) as caught:
    workdir.check(tmp_path, changed)
  assert "config.seed: 0 there, 1 now" in str(caught.value)
  assert "config.new: None there, 2.5 now" in str(caught.value)
  assert "--allow_config_change" in str(caught.value)
  assert "image_size" not in str(caught.value)


def test_an_allowed_change_keeps_the_old_configuration(tmp_path):
  workdir.claim(tmp_path, CONFIG)
  for seed in (1, 2):
    workdir.check(tmp_path, CONFIG | {"seed": seed}, allow_change=True)
    workdir.claim(tmp_path, CONFIG | {"seed": seed})
  seeds = {
    file.name: json.loads(file.read_text())["seed"]
    for file in tmp_path.iterdir()
  }
  assert seeds == {"config.json": 2, "config.1.json": 0, "config.2.json": 1}


def test_free_keys_may_change(tmp_path):
  config = CONFIG | {"checkpoint.keep_last": 1}
  workdir.claim(tmp_path, config)
  config["checkpoint.keep_last"] = 5
  workdir.check(tmp_path, config, free_keys=["checkpoint."])
  with pytest.raises(UserError):
    workdir.check(tmp_path, config)


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_results_without_a_configuration_are_refused(tmp_path, name):
  (tmp_path / name / "1").mkdir(parents=True)
  with pytest.raises(UserError, match=f"holds {name} but no config.json"):
    workdir.check(tmp_path, CONFIG)


def test_other_files_do_not_matter(tmp_path):
  (tmp_path / "console.log").write_text("")
  workdir.check(tmp_path, CONFIG)


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1}', "\x00"])
def test_a_foreign_configuration_is_refused(tmp_path, content):
  (tmp_path / "config.json").write_text(content)
  with pytest.raises(UserError, match="not a configuration of umae_jax"):
    workdir.check(tmp_path, CONFIG)


def test_a_file_in_the_way_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  for path in (tmp_path / "file", tmp_path / "file" / "below"):
    with pytest.raises(UserError, match="is a file"):
      workdir.check(path, CONFIG)


def test_a_directory_without_permission_is_refused(tmp_path, monkeypatch):
  # Root may write anywhere, so the system's answer is replaced.
  monkeypatch.setattr(workdir.os, "access", lambda path, mode: False)
  with pytest.raises(UserError, match="no permission"):
    workdir.check(tmp_path / "x", CONFIG)


def test_a_directory_in_use_is_refused(tmp_path):
  with (
    workdir.lock(tmp_path),
    pytest.raises(UserError, match="in use by another process"),
    workdir.lock(tmp_path),
  ):
    pass
  with workdir.lock(tmp_path):
    pass


def test_an_empty_checkpoint_folder_is_nobodys(tmp_path):
  """A run killed before it wrote its configuration may start again."""
  (tmp_path / "checkpoints").mkdir()
  workdir.check(tmp_path, CONFIG)
