import numpy as np
import pytest

from umae_jax import UserError
from umae_jax.data import pipeline, sources


def open_source(directory, split="train", name="tiny_set", **options):
  return sources.open_source(
    name,
    split,
    directory=str(directory),
    image_size=(8, 8),
    channels=3,
    **options,
  )


def test_splits_follow_the_syntax_of_tfds(tfds_folder):
  assert open_source(tfds_folder).num_examples == 37
  part = open_source(tfds_folder, "train[10:30]")
  assert part.num_examples == 20
  assert part.class_names == ("c", "a", "b")
  assert part.name_of(0).endswith("tiny_set-train.tfrecord-00001-of-00003__1")


def test_classes_are_kept_counted_and_renumbered(tfds_folder, tmp_path, write):
  listing = tmp_path / "list.txt"
  listing.write_text("c\nb\n")  # Stored labels 0 and 2; b, c is sorted.
  source = open_source(tfds_folder, classes=str(listing))
  assert source.class_names == ("b", "c")
  numbers = [i for i in range(37) if i % 3 != 1]
  assert source.num_examples == len(numbers) == 25
  number_of = {write.picture(i).tobytes(): i for i in numbers}
  options = {"batch_size": 5, "image_size": (24, 24), "channels": 3}

  evaluated = list(pipeline.eval_batches(source, **options))
  batches = pipeline.train_batches(
    source,
    seed=0,
    crop_scale=None,
    flip=False,
    shuffle_buffer=9,
    **options,
  )
  for found in (evaluated, [next(batches) for _ in range(5)]):
    image = np.concatenate([batch["image"] for batch in found])
    label = np.concatenate([batch["label"] for batch in found])
    seen = [number_of[x.tobytes()] for x in image]
    assert sorted(seen) == numbers  # Five readers of five: an exact epoch.
    assert label.tolist() == [1 if i % 3 == 0 else 0 for i in seen]


@pytest.mark.parametrize(
  "split, message",
  [
    ("foo", r"config.data.*_split='foo'.*is not a split.*It has 'train'"),
    ("train[:x]", r"config.data.*_split='train\[:x\]'.*is not a split"),
    ("train[20:10]", r"config.data.*_split='train\[20:10\]'.*is empty"),
  ],
)
def test_bad_split_is_refused_in_words(tfds_folder, split, message):
  with pytest.raises(UserError, match=message):
    open_source(tfds_folder, split)


def test_classes_that_do_not_exist_are_listed(tfds_folder, tmp_path):
  listing = tmp_path / "list.txt"
  listing.write_text("a\nzebra\n")
  with pytest.raises(UserError, match=r"names 1 classes.*zebra"):
    open_source(tfds_folder, classes=str(listing))


def test_what_can_not_be_downloaded_names_the_remedy(tmp_path):
  """ImageNet wants archives that the user has downloaded by hand."""
  with pytest.raises(UserError, match=r"(?s)is not at .*config.data.directory"):
    open_source(tmp_path, name="imagenet2012:5.*.*")
