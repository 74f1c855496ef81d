"""Opening a TFDS data set: found, prepared and checked, or a UserError."""

from collections.abc import Sequence
import difflib
from typing import Any

from absl import logging
import numpy as np

from umae_jax import UserError, storage
from umae_jax.data import class_lists
from umae_jax.data.host_tensorflow import tensorflow
from umae_jax.data.stream import Pieces, StreamSource


def open_tfds(
  name: str,
  split: str,
  directory: str,
  *,
  classes: str,
  own_names: Sequence[str],
) -> StreamSource:
  """Opens a split of a TFDS data set; downloads and prepares it if it must.

  Args:
    name: such as "cifar10" or "imagenet2012:5.*.*".
    split: in TFDS's syntax, such as "train" or "train[:10%]".
    directory: TFDS's data_dir; "" is its default.
    classes: see `class_lists.select`. If not "", the labels of the whole split
      are read once, without decoding, to count those kept: as long as reading
      its files takes (ImageNet: 140 GB). Each epoch reads all of them, too.
    own_names: other names that the user may have meant.

  Raises:
    UserError: unknown data set or split, not on disk and not to be had, or
      without an image and a class label.
  """
  builder = _builder(name, directory, own_names)
  _prepare(builder, name)
  pieces = _pieces(builder, name, split)
  image, label = _keys(builder, name)
  stored = builder.info.features[label].names
  class_names, new_labels = class_lists.select(stored, classes)
  kept = np.arange(pieces.take.sum())
  if classes:
    logging.warning(
      "Counting the images of config.data.classes=%r: reads all of %s %s.",
      classes,
      name,
      split,
    )
    kept = np.flatnonzero(new_labels[_labels(builder, pieces, label)] >= 0)
  if not kept.size:
    raise UserError(
      f"config.data.*_split={split!r} of config.data.name={name!r} holds no "
      f"image of config.data.classes={classes!r}."
    )
  parse = _parser(builder, [image, label])
  return StreamSource(class_names, pieces, parse, new_labels, kept)


def _builder(name: str, directory: str, own_names: Sequence[str]) -> Any:
  """Returns TFDS's builder of the data set."""
  tensorflow()  # First, so that TFDS does not see the accelerators either.
  if storage.is_bucket(directory):
    where = "config.data.directory="
    storage.check(storage.path(directory, where), where, storage.READ)
  import tensorflow_datasets as tfds

  try:
    return tfds.builder(name, data_dir=directory or None)
  except tfds.core.DatasetNotFoundError as error:
    known = [*own_names, *tfds.list_builders(with_community_datasets=False)]
    near = difflib.get_close_matches(name.split(":")[0], known, n=5)
    near = f"; near it: {', '.join(map(repr, near))}" if near else ""
    raise UserError(
      f"config.data.name={name!r} is not a data set{near}. Use "
      f"{', '.join(map(repr, own_names))} or a name of "
      "https://www.tensorflow.org/datasets (or of one that TFDS wrote to "
      f"config.data.directory={directory!r})."
    ) from error
  except Exception as error:  # Versions, configs: TFDS says what is wrong.
    raise UserError(
      f"config.data.name={name!r} can not be opened: {error}"
    ) from error


def _prepare(builder: Any, name: str) -> None:
  """Downloads and prepares the data set unless it is on disk."""
  if builder.info.splits:
    return
  folder = str(builder.data_path)
  try:
    builder.download_and_prepare()
  except Exception as error:  # Network, manual download, missing packages, ...
    raise UserError(
      f"config.data.name={name!r} is not at {folder}, and TFDS can not put it "
      f"there: {error}\nSet config.data.directory to the folder where TFDS has "
      "prepared it, or prepare it on a machine with network access (`tfds "
      f"build {name}`; some, such as imagenet2012, want archives downloaded "
      "by hand first) and copy it."
    ) from error


def _pieces(builder: Any, name: str, split: str) -> Pieces:
  """Returns where the records of the split lie."""
  splits = ", ".join(map(repr, builder.info.splits))
  wrong = f"config.data.*_split={split!r} of config.data.name={name!r}"
  try:
    info = builder.info.splits[split]
    found = info.file_instructions
  except Exception as error:
    raise UserError(
      f"{wrong} is not a split: {error}. It has {splits}, and parts such as "
      "'train[:10%]'."
    ) from error
  take = np.array([piece.take for piece in found], np.int64)
  if not take.sum() > 0:
    raise UserError(f"{wrong} is empty. It has {splits}.")
  if builder.info.file_format.value != "tfrecord":
    raise UserError(
      f"config.data.name={name!r} is stored as "
      f"{builder.info.file_format.value}; only tfrecord files can be streamed. "
      "Prepare it again with `tfds build --file_format=tfrecord`."
    )
  return Pieces(
    files=np.array([str(piece.filename) for piece in found]),
    skip=np.array([piece.skip for piece in found], np.int64),
    take=take,
    first=np.cumsum(take) - take,
  )


def _keys(builder: Any, name: str) -> tuple[str, str]:
  """Returns the names of the image and of the label among the features."""
  import tensorflow_datasets as tfds

  features = builder.info.features
  keys = builder.info.supervised_keys or ("image", "label")
  wanted = (tfds.features.Image, tfds.features.ClassLabel)
  if len(keys) != 2 or not all(
    key in features and isinstance(features[key], kind)
    for key, kind in zip(keys, wanted)
  ):
    raise UserError(
      f"config.data.name={name!r} is not a data set of images with a class "
      f"label; its features are {', '.join(features)}."
    )
  return keys


def _parser(builder: Any, keys: Sequence[str]) -> Any:
  """Returns a function: serialised record -> tuple of `keys`, not decoded."""
  import tensorflow_datasets as tfds

  some = tfds.decode.PartialDecoding(dict.fromkeys(keys, True))
  features = some.extract_features(builder.info.features)
  skip = {
    key: tfds.decode.SkipDecoding()
    for key in keys
    if isinstance(features[key], tfds.features.Image)
  }

  def parse(record):
    example = features.deserialize_example(record, decoders=skip)
    return tuple(example[key] for key in keys)

  return parse


def _labels(builder: Any, pieces: Pieces, key: str) -> np.ndarray:
  """Returns the stored labels of all records, in order; decodes no image."""
  tf = tensorflow()
  parse = _parser(builder, [key])
  most = int(pieces.take.max())

  def labels(number):
    records = pieces.dataset([number])
    return records.map(lambda _, record: parse(record)[0]).batch(most)

  numbers = tf.data.Dataset.range(len(pieces.take))
  found = numbers.interleave(
    labels, cycle_length=16, num_parallel_calls=tf.data.AUTOTUNE
  )
  return np.concatenate(list(found.as_numpy_iterator()))
