"""What is checked before a run starts."""

import pytest

from umae_jax import UserError, run


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"data.name": "no_such_set"}, "config.data.name='no_such_set'"),
    ({"data.name": "folder"}, "config.data.directory"),
    (
      {"data.name": "folder", "data.directory": "/no/such/folder"},
      "config.data.directory='/no/such/folder'",
    ),
    ({"data.eval_split": "val"}, "'val' is not a split"),
    ({"batch_size": 2048}, "batch_size=2048 is more than the 1400"),
    ({"model.patch_size": 3}, "multiple of config.model.patch_size=3"),
    ({"loss.mask_ratio": 1.0}, "mask_ratio=1.0 leaves 0 of 16"),
  ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
  load_config, tmp_path, changes, message
):
  c = load_config("digits", "smoke")
  c.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=message):
    run.prepare(c, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_folder_without_images_is_refused(load_config, tmp_path):
  for name in ("cat", "dog"):
    (tmp_path / "data" / name).mkdir(parents=True)
  c = load_config("digits", "smoke")
  c.data.update(name="folder", directory=str(tmp_path / "data"))
  with pytest.raises(UserError, match=r"config\.data\.directory"):
    run.prepare(c, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
