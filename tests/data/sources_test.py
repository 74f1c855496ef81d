import pathlib
import subprocess
import sys

import numpy as np
import pytest

import umae_jax
from umae_jax import UserError
from umae_jax.data import class_lists, sources


def open_source(name, split="train", **options):
  options = {"image_size": (8, 8), "channels": 3} | options
  return sources.open_source(name, split, **options)


def test_importing_and_listing_load_no_tensorflow(image_folder):
  code = (
    "import sys; from umae_jax.data import pipeline, sources, stream, tfds; "
    "options = dict(image_size=(8, 8), channels=3); "
    "sources.open_source('digits', 'train', **options); "
    "sources.open_source('folder', 'val', "
    f"directory={str(image_folder)!r}, **options); "
    "assert not {'tensorflow', 'jax', 'tensorflow_datasets'} & set(sys.modules)"
  )
  root = pathlib.Path(umae_jax.__file__).parents[1]
  subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_digits_are_split_and_scaled():
  train, test = open_source("digits"), open_source("digits", "test")
  assert (train.num_examples, test.num_examples) == (1400, 397)
  images = np.concatenate([train.load(), test.load()])
  assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8
  assert images.min() == 0 and images.max() == 255
  names = {source.name_of(i) for source in (train, test) for i in range(397)}
  assert len(names) == 794  # No image is in both.
  assert np.bincount(test.labels).min() > 20


def test_made_images_tell_their_class():
  made = [open_source("made", split, channels=2) for split in ("train", "test")]
  assert [source.num_examples for source in made] == [256, 64]
  train, test = (source.load().astype(float) for source in made)
  assert train.shape == (256, 8, 8, 2)
  # Nearest neighbour finds the class: there is something to learn.
  train, test = train.reshape(256, -1), test.reshape(64, -1)
  nearest = ((test[:, None] - train) ** 2).sum(-1).argmin(1)
  assert (made[0].labels[nearest] == made[1].labels).mean() > 0.7


def test_folder_with_splits(image_folder):
  train = open_source("folder", directory=str(image_folder))
  assert train.class_names == ("a", "b", "c")
  assert np.bincount(train.labels).tolist() == [15, 12, 10]
  assert (
    open_source("folder", "val", directory=str(image_folder))
    .name_of(0)
    .endswith("val/a/050.png")
  )


def test_folder_without_splits_is_split_by_a_hash(tmp_path, write):
  write.folder(tmp_path, {"x": 20, "y": 10})

  def names(split, eval_fraction=0.2):
    source = open_source(
      "folder", split, directory=str(tmp_path), eval_fraction=eval_fraction
    )
    return {source.name_of(i) for i in range(source.num_examples)}

  train, held_out = names("train"), names("val")
  assert len(train) == 24 and len(held_out) == 6 and not train & held_out
  assert sum("/x/" in name for name in held_out) == 4
  assert held_out == names("test") == names("val")
  by_name = sorted(train | held_out)
  assert held_out != {*by_name[:4], *by_name[20:22]}  # Nor the first by name.
  assert held_out < names("val", 0.4)
  assert len(names("train", 0.0)) == 30


def test_images_without_class_folders_are_of_one_class(tmp_path, write):
  for part, first, count in (("train", 0, 6), ("val", 6, 4)):
    write.folder(tmp_path / "split", {part: count}, first=first)
  (tmp_path / "split" / "train").rename(tmp_path / "flat")
  flat = open_source("folder", "all", directory=str(tmp_path / "flat"))
  assert flat.class_names == ("unlabelled",) and not flat.labels.any()
  every = {flat.name_of(i) for i in range(flat.num_examples)}
  assert every == {str(path) for path in (tmp_path / "flat").iterdir()}
  held_out = open_source(
    "folder", "val", directory=str(tmp_path / "flat"), eval_fraction=0.3
  )
  assert held_out.num_examples == 2
  # And with train/ and val/.
  (tmp_path / "flat").rename(tmp_path / "split" / "train")
  for part, count in (("train", 6), ("val", 4)):
    source = open_source("folder", part, directory=str(tmp_path / "split"))
    assert (source.num_examples, len(source.class_names)) == (count, 1)


def test_images_beside_class_folders_are_counted(tmp_path, write, caplog):
  write.folder(tmp_path, {"a": 2, "b": 2})
  (tmp_path / "a" / "000.png").rename(tmp_path / "stray.png")
  source = open_source("folder", "all", directory=str(tmp_path))
  assert source.num_examples == 3
  assert "1 images lie in" in caplog.text and "not used" in caplog.text


def test_images_may_lie_deeper_and_hidden_ones_do_not_count(tmp_path, write):
  write.folder(tmp_path / "train" / "a", {"images": 2})
  (tmp_path / "train" / "a" / "images" / "._0.png").write_bytes(b"?")
  (tmp_path / "train" / ".cache").mkdir()
  assert open_source("folder", directory=str(tmp_path)).num_examples == 2


def test_classes_of_a_folder_are_kept_and_renumbered(image_folder, tmp_path):
  listing = tmp_path / "list.txt"
  listing.write_text("c\n\nb\nc\n")
  source = open_source(
    "folder", directory=str(image_folder), classes=str(listing)
  )
  assert source.class_names == ("b", "c")
  assert np.bincount(source.labels).tolist() == [12, 10]


def test_labels_number_the_kept_names_in_sorted_order(tmp_path):
  available = [f"k{i:02}" for i in reversed(range(20))]
  listing = tmp_path / "list.txt"
  listing.write_text("\n".join(available[::2]))
  names, new_labels = class_lists.select(available, str(listing))
  assert names == tuple(f"k{i:02}" for i in range(1, 20, 2))
  assert new_labels[:4].tolist() == [9, -1, 8, -1]


def test_the_shipped_list_has_100_classes():
  names = [f"n{i:08}" for i in range(3)]
  with pytest.raises(UserError, match=r"'imagenet100' names 100 classes"):
    class_lists.select(names, "imagenet100")


@pytest.fixture
def bad_folders(tmp_path, write):
  """Folders with one thing wrong in each."""
  write.folder(tmp_path / "differ/train", {"a": 1, "b": 1})
  write.folder(tmp_path / "differ/val", {"a": 1, "c": 1})
  write.folder(tmp_path / "hole", {"a": 3})
  (tmp_path / "hole/b").mkdir()
  (tmp_path / "hole/b/readme.txt").write_text("no image")
  (tmp_path / "bare").mkdir()
  (tmp_path / "bare/1.txt").write_bytes(b"")
  write.folder(tmp_path / "good", {"a": 3, "b": 3})
  (tmp_path / "list.txt").write_text("a\nzebra\n")
  (tmp_path / "empty.txt").write_text("\n")
  return tmp_path


@pytest.mark.parametrize(
  "folder, split, options, message",
  [
    ("", "train", {}, r"config.data.directory='' is not a folder"),
    ("none", "train", {}, r"config.data.directory='.*none' is not a folder"),
    ("bare", "train", {}, r"bare holds neither class folders nor"),
    ("hole", "train", {}, r"class folder .*hole/b holds no image.*\.jpeg"),
    ("differ", "train", {}, r"differ/val differ in 2: b, c.*classes"),
    ("differ", "val", {}, r"differ in 2: b, c"),
    ("differ", "test", {}, r"split='test' .*it has 'train', 'val'"),
    (
      "good",
      "dev",
      {},
      r"split='dev' is not one of 'train', 'val', 'test', 'a",
    ),
    ("good", "val", {"eval_fraction": 0.05}, r"eval_fraction=0.05 leaves no"),
    ("good", "train", {"classes": "list.txt"}, r"names 1 classes.*zebra"),
    ("good", "train", {"classes": "empty.txt"}, r"names no class"),
    ("good", "train", {"classes": "nolist"}, r"classes='.*nolist'.*read"),
  ],
)
def test_bad_folder_is_refused_in_words(
  bad_folders, folder, split, options, message
):
  directory = str(bad_folders / folder) if folder else ""
  if "classes" in options:
    options = {"classes": str(bad_folders / options["classes"])}
  with pytest.raises(UserError, match=message):
    open_source("folder", split, directory=directory, **options)


@pytest.mark.parametrize(
  "name, split, options, message",
  [
    ("digits", "val", {}, r"split='val'.*'digits'; it has 'train', 'test'"),
    ("made", "val", {}, r"split='val'.*'made'; it has 'train', 'test'"),
    ("made", "train", {"classes": "x"}, r"config.data.classes='x' has no"),
    ("cifar11", "train", {}, r"config.data.name='cifar11'.*near.*'cifar10'"),
    ("digit", "train", {}, r"config.data.name='digit'.*near it: 'digits'"),
    ("cifar10:9.*.*", "train", {}, r"name='cifar10:9.*opened.*only: 3.0.2"),
  ],
)
def test_bad_name_or_split_is_refused_in_words(name, split, options, message):
  with pytest.raises(UserError, match=message):
    open_source(name, split, **options)
