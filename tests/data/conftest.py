"""Small data sets on disk, written by the tests themselves."""

import io
import itertools
import types

import numpy as np
from PIL import Image
import pytest

SIDE = 24  # Of the images, pixels.


def picture(number, size=(SIDE, SIDE)):
  """A smooth (h, w, 3) uint8 image, another one for each number."""
  y, x = np.mgrid[: size[0], : size[1]]
  phase = np.arange(3) + number
  wave = np.sin(x[..., None] / 7 + phase) + np.cos(y[..., None] / 5 - phase)
  return np.round(127.5 + 60 * wave).astype(np.uint8)


def encode(image, kind="JPEG", **options):
  """An image, (h, w, 3) uint8, as the bytes of a file."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, kind, **options)
  return buffer.getvalue()


def write_folder(root, counts, first=0, kind="PNG"):
  """Writes counts[name] images into each class folder root/name."""
  number = first
  for name, count in counts.items():
    (root / name).mkdir(parents=True)
    for _ in range(count):
      path = root / name / f"{number:03}.{kind.lower()}"
      path.write_bytes(encode(picture(number), kind))
      number += 1
  return root


def write_tfds(root, files, names, split="train", name="tiny_set"):
  """Writes a data set as TFDS does; `files` = lists of (bytes, label)."""
  import tensorflow as tf
  import tensorflow_datasets as tfds

  folder = root / name / "1.0.0"
  folder.mkdir(parents=True, exist_ok=True)
  features = tfds.features.FeaturesDict(
    {
      "id": tfds.features.Text(),
      "image": tfds.features.Image(),
      "label": tfds.features.ClassLabel(names=names),
    }
  )
  template = tfds.core.ShardedFileTemplate(
    data_dir=folder,
    dataset_name=name,
    split=split,
    filetype_suffix="tfrecord",
  )
  for i, examples in enumerate(files):
    path = template.sharded_filepath(shard_index=i, num_shards=len(files))
    with tf.io.TFRecordWriter(str(path)) as writer:
      for data, label in examples:
        example = {"id": "x", "image": io.BytesIO(data), "label": label}
        encoded = features.encode_example(example)
        writer.write(features.serialize_example(encoded))
  info = tfds.core.SplitInfo(
    name=split,
    shard_lengths=[len(examples) for examples in files],
    num_bytes=0,
    filename_template=template,
  )
  tfds.folder_dataset.write_metadata(
    data_dir=str(folder), features=features, split_infos=[info]
  )
  return root


@pytest.fixture(scope="session")
def write():
  """The functions above, for the tests."""
  return types.SimpleNamespace(
    picture=picture, encode=encode, folder=write_folder, tfds=write_tfds
  )


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
  """train/ with 37 PNGs in classes a, b, c; val/ with 10 others."""
  root = tmp_path_factory.mktemp("folder")
  write_folder(root / "train", {"b": 12, "a": 15, "c": 10})
  write_folder(root / "val", {"a": 3, "b": 3, "c": 4}, first=50)
  return root


@pytest.fixture(scope="session")
def tfds_folder(tmp_path_factory):
  """A TFDS data set of 37 PNGs in files of 9, 17 and 11 records."""
  numbers = iter(range(37))
  files = [
    [
      (encode(picture(i), "PNG"), i % 3)
      for i in itertools.islice(numbers, count)
    ]
    for count in (9, 17, 11)
  ]
  root = tmp_path_factory.mktemp("tfds")
  return write_tfds(root, files, names=["c", "a", "b"])
