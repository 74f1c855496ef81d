import itertools
import os

import jax
import numpy as np
import pytest

from umae_jax import UserError, device_crop
from umae_jax.data import decode, pipeline, sources

SIZE = (24, 24)
KINDS = ["digits", "made", "folder", "tiny_set"]
STEPS = {"digits": 70, "made": 14, "folder": 14, "tiny_set": 14}
BATCH = {"digits": 64, "made": 48, "folder": 8, "tiny_set": 8}


@pytest.fixture
def open_source(image_folder, tfds_folder):
  """Opens a source of each kind; folder and TFDS have 37 images."""

  def open_one(name, split="train", **options):
    directory = {"folder": image_folder, "tiny_set": tfds_folder}.get(name, "")
    options = {"image_size": SIZE, "channels": 3} | options
    return sources.open_source(name, split, directory=str(directory), **options)

  return open_one


def train(source, num_batches, **options):
  """The first batches, augmented unless the options say otherwise."""
  options = {
    "batch_size": 8,
    "seed": 3,
    "image_size": SIZE,
    "channels": 3,
    "crop_scale": (0.2, 1.0),
    "flip": True,
    "shuffle_buffer": 20,
  } | options
  with pipeline.train_batches(source, **options) as batches:
    return list(itertools.islice(batches, num_batches))


def evaluate(source, **options):
  options = {"batch_size": 8, "image_size": SIZE, "channels": 3} | options
  return list(pipeline.eval_batches(source, **options))


def assert_same(got, expected):
  assert len(got) == len(expected)
  for a, b in zip(got, expected):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def concatenate(parts):
  """Batches of several processes to the global ones."""
  return [
    {key: np.concatenate([part[key] for part in step]) for key in step[0]}
    for step in zip(*parts)
  ]


def rows(batches):
  """Each image as bytes, in order."""
  return [image.tobytes() for b in batches for image in b["image"]]


PLAIN = {"crop_scale": None, "flip": False}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_have_the_promised_form(open_source, kind):
  (batch,) = train(open_source(kind), 1)
  assert set(batch) == {"image", "label"}
  assert batch["image"].shape == (8, *SIZE, 3)
  assert batch["image"].dtype == np.uint8
  assert batch["image"].std() > 20
  assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_continues_exactly(open_source, kind):
  source, steps, size = open_source(kind), STEPS[kind], BATCH[kind]
  whole = train(source, steps, batch_size=size)
  assert steps * size > 2 * source.num_examples  # Into the third epoch.
  for start in (source.num_examples // size + 2, steps - 2):
    resumed = train(source, 2, batch_size=size, start_step=start)
    assert_same(resumed, whole[start : start + 2])


@pytest.mark.parametrize("kind", ["made", "tiny_set"])
def test_seeds_differ_in_order_and_in_augmentation(open_source, kind):
  source = open_source(kind)
  a, b = (rows(train(source, 4, seed=seed, **PLAIN)) for seed in (3, 4))
  assert a != b
  # One batch per epoch, so that sorting leaves only the crops and flips.
  options = {"batch_size": source.num_examples, "image_size": (5, 5)}
  a, b = (rows(train(source, 1, seed=seed, **options)) for seed in (3, 4))
  assert len(set(a) & set(b)) < 0.2 * len(a)


@pytest.mark.parametrize(
  "kind, count", [("tiny_set", 2), *((kind, 4) for kind in KINDS)]
)
def test_number_of_processes_does_not_change_the_batch(
  open_source, kind, count
):
  source = open_source(kind)
  parts = [
    train(source, 9, process_index=i, process_count=count) for i in range(count)
  ]
  assert parts[0][0]["image"].shape[0] == 8 // count
  assert_same(concatenate(parts), train(source, 9))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["made", "folder"])
def test_rand_augment_comes_last_and_keeps_the_promises(open_source, kind):
  source = open_source(kind)
  plain = train(source, 6)
  assert_same(train(source, 6, rand_augment=0.0), plain)
  whole = train(source, 6, rand_augment=9.0)
  parts = [
    train(source, 6, rand_augment=9.0, process_index=i, process_count=2)
    for i in range(2)
  ]
  assert_same(concatenate(parts), whole)
  assert_same(train(source, 2, rand_augment=9.0, start_step=4), whole[4:])
  # A quarter draws no operation; of them crop, flip and label are as without.
  same = sum(a == b for a, b in zip(rows(plain), rows(whole)))
  assert 2 < same < 30
  for a, b in zip(plain, whole):
    np.testing.assert_array_equal(a["label"], b["label"])


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory, write):
  """JPEGs and PNGs of many sizes; one ends early, one does not decode."""
  folder = tmp_path_factory.mktemp("odd") / "train" / "only"
  folder.mkdir(parents=True)
  # With a canvas of 42: windows that fit, that do not, of one pixel's width.
  for i, size in enumerate([(24, 24), (31, 57), (90, 40), (160, 170), (9, 1)]):
    for kind in ("JPEG", "PNG"):
      data = write.encode(write.picture(i, size), kind)
      (folder / f"{i}.{kind.lower()}").write_bytes(data)
  data = write.encode(write.picture(5, (90, 90)))
  (folder / "cut.jpeg").write_bytes(data[: len(data) * 3 // 4])
  (folder / "bad.jpeg").write_bytes(data[:300])
  return folder.parents[1]


@pytest.mark.parametrize("channels, flip, start", [(3, True, 0), (1, False, 3)])
def test_the_device_crops_as_the_host_does(odd_folder, channels, flip, start):
  source = sources.open_source(
    "folder", "train", directory=str(odd_folder), image_size=SIZE, channels=3
  )
  options = {"channels": channels, "flip": flip, "max_unreadable": 1.0}
  expected = train(source, 8, **options)[start:]
  options |= {"start_step": start, "process_index": 1, "process_count": 2}
  shipped = train(source, 8 - start, device_crop=True, **options)
  finish = jax.jit(device_crop.finish, static_argnums=1)
  extents = np.concatenate([batch["extent"] for batch in shipped])
  assert (extents <= 42).all() and len(np.unique(extents, axis=0)) > 5
  flips = np.concatenate([batch["flip"] for batch in shipped])
  assert flips.any() == flip and not flips.all()
  for batch, other in zip(shipped, expected):
    assert batch["image"].shape == (4, 42, 42, channels)
    assert batch["image"].dtype == np.uint8
    got = finish(batch, SIZE)
    assert got.keys() == other.keys()
    np.testing.assert_array_equal(got["label"], other["label"][4:])
    error = np.abs(np.asarray(got["image"]).astype(int) - other["image"][4:])
    assert error.max() <= 1


@pytest.mark.parametrize("wrong", [{"crop_scale": ()}, {"rand_augment": 9.0}])
def test_device_crop_is_not_silently_without_effect(open_source, wrong):
  with pytest.raises(ValueError, match="needs crop_scale, and no rand_augment"):
    train(open_source("made"), 1, device_crop=True, **wrong)


def test_stacks_need_not_divide_the_batch(open_source):
  """Batches of 37 are made of stacks of 16, and end where they should."""
  source = open_source("tiny_set")
  batches = train(source, 3, batch_size=37, **PLAIN)
  expected = sorted(rows(evaluate(source, batch_size=1)))
  assert all(sorted(rows([batch])) == expected for batch in batches)
  (whole,) = evaluate(source, batch_size=37)
  assert whole["mask"].all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_epoch_holds_every_example_once(open_source, kind):
  source = open_source(kind)
  # One reader of the stream, which then has exact epochs; see the next test.
  count = source.num_examples
  seen = rows(train(source, 3 * count, batch_size=1, **PLAIN))
  expected = sorted(rows(evaluate(source, batch_size=1)))
  epochs = [seen[i * count : (i + 1) * count] for i in range(3)]
  assert all(sorted(epoch) == expected for epoch in epochs)
  for a, b in itertools.combinations(epochs, 2):
    assert a != b


def test_each_reader_of_a_stream_has_its_own_epochs(open_source):
  source = open_source("tiny_set")
  batches = train(source, 30, batch_size=4, **PLAIN)
  parts = []
  for row in range(4):  # Four readers, of 9 or 10 examples each.
    seen = [batch["image"][row].tobytes() for batch in batches]
    size = len(set(seen))
    assert size in (9, 10)
    assert set(seen[:size]) == set(seen[size : 2 * size]) == set(seen)
    assert seen[:size] != seen[size : 2 * size]
    parts += set(seen)
  assert sorted(parts) == sorted(rows(evaluate(source, batch_size=1)))


@pytest.mark.parametrize("kind", KINDS)
def test_labels_stay_with_their_images(open_source, kind):
  source = open_source(kind)
  label_of = {}
  for batch in evaluate(source, batch_size=1):
    label_of[batch["image"].tobytes()] = int(batch["label"][0])
  assert set(label_of.values()) == set(range(len(source.class_names)))
  for batch in train(source, 8, **PLAIN):
    for image, label in zip(batch["image"], batch["label"]):
      assert label_of[image.tobytes()] == label


def test_labels_are_those_of_the_files(image_folder, write):
  """Against the disk: the class folder of each picture, by its number."""
  source = sources.open_source(
    "folder", "val", directory=str(image_folder), image_size=SIZE, channels=3
  )
  assert source.class_names == ("a", "b", "c")
  (batch,) = evaluate(source, batch_size=10)
  numbers = {write.picture(i).tobytes(): i for i in range(50, 60)}
  for image, label in zip(batch["image"], batch["label"]):
    number = numbers[image.tobytes()]
    assert label == (0 if number < 53 else 1 if number < 56 else 2)


@pytest.mark.parametrize("kind", ["made", "folder", "tiny_set"])
@pytest.mark.parametrize(
  "processes, limit", [(1, None), (2, 20), (3, None), (3, 4)]
)
def test_evaluation_sees_each_example_once(open_source, kind, processes, limit):
  source = open_source(kind, "train")
  size = 24 if kind == "made" else 6
  parts = [
    evaluate(
      source,
      batch_size=size,
      process_index=i,
      process_count=processes,
      limit=limit,
    )
    for i in range(processes)
  ]
  assert len({len(part) for part in parts}) == 1
  batches = concatenate(parts)
  mask = np.concatenate([batch["mask"] for batch in batches])
  count = min(limit or source.num_examples, source.num_examples)
  assert mask.dtype == bool and mask.sum() == count
  assert len(mask) == -(-count // size) * size
  kept = [row for row, good in zip(rows(batches), mask) if good]
  assert len(set(kept)) == count
  # Neither the set nor the order depends on the number of processes.
  if processes > 1:
    assert_same(batches, evaluate(source, batch_size=size, limit=limit))


def test_limited_evaluation_mixes_classes(open_source):
  (batch,) = evaluate(open_source("folder"), batch_size=12, limit=12)
  assert set(batch["label"]) == {0, 1, 2}


@pytest.mark.parametrize("kind", ["folder", "tiny_set"])
def test_skipped_examples_are_not_decoded(open_source, kind, monkeypatch):
  import tensorflow as tf

  calls, original = [], decode.decode

  def counting(data, channels):
    tf.py_function(lambda: calls.append(1), [], [])
    return original(data, channels)

  monkeypatch.setattr(decode, "decode", counting)
  source = open_source(kind)
  train(source, 30, **PLAIN)
  assert len(calls) >= 240  # The count counts.
  calls.clear()
  train(source, 1, start_step=24, **PLAIN)
  assert 8 <= len(calls) <= 120  # Read-ahead included; 192 were skipped.


@pytest.mark.parametrize(
  "channels, stored, shape", [(3, 1, (8, 24, 24, 3)), (1, 3, (8, 24, 24, 1))]
)
def test_channels_are_converted(open_source, channels, stored, shape):
  source = open_source("made", channels=stored)
  (batch,) = train(source, 1, channels=channels, **PLAIN)
  assert batch["image"].shape == shape
  assert np.ptp(batch["image"].astype(int), axis=-1).max() == 0


@pytest.mark.parametrize("kind", ["digits", "folder", "tiny_set"])
def test_impossible_channels_are_refused(open_source, kind):
  with pytest.raises(UserError, match=r"channels=4.*use 3 \(RGB\) or 1"):
    train(open_source(kind), 1, channels=4)


def test_made_images_may_have_any_channels(open_source):
  (batch,) = train(open_source("made", channels=4), 1, channels=4)
  assert batch["image"].shape == (8, *SIZE, 4)


def test_batch_must_divide_over_processes(open_source):
  with pytest.raises(UserError, match=r"batch_size=8 \(global\).*3 processes"):
    train(open_source("digits"), 1, process_count=3)


def test_streams_must_divide_over_processes(open_source):
  # 74 = 2 * 37 rows: the largest divisor up to 37 is 37 itself.
  with pytest.raises(UserError, match=r"batch_size=74.*37 streams"):
    train(open_source("tiny_set"), 1, batch_size=74, process_count=2)


def test_close_ends_the_stream(open_source):
  batches = pipeline.train_batches(
    open_source("digits"),
    batch_size=4,
    seed=0,
    image_size=(8, 8),
    channels=1,
    shuffle_buffer=0,
    **PLAIN,
  )
  assert next(batches)["image"].shape == (4, 8, 8, 1)
  batches.close()
  with pytest.raises(StopIteration):
    next(batches)


def test_cifar10_resumes_and_divides(shared):
  source = sources.open_source(
    "cifar10",
    "train[:1%]",
    directory=str(shared / "data/tensorflow_datasets"),
    image_size=(32, 32),
    channels=3,
  )
  assert source.num_examples == 500 and source.class_names[3] == "cat"
  options = {"batch_size": 64, "image_size": (32, 32)}
  whole = train(source, 12, **options)
  assert_same(train(source, 2, start_step=10, **options), whole[10:])
  parts = [
    train(source, 3, process_index=i, process_count=2, **options)
    for i in range(2)
  ]
  assert_same(concatenate(parts), whole[:3])


def test_images_are_read_in_a_thread_pool_of_their_own(monkeypatch):
  found = []
  monkeypatch.setattr(pipeline, "Batches", lambda x, *_, **__: found.append(x))
  source = sources.open_source("made", "test", image_size=(8, 8), channels=3)
  pipeline.eval_batches(source, batch_size=4, image_size=(8, 8), channels=3)
  threading = found[0].options().threading
  assert threading.private_threadpool_size == os.cpu_count()
  assert threading.max_intra_op_parallelism == 1


def test_padding_of_a_folder_can_be_read(open_source):
  """TensorFlow would log a warning for each row whose file is not there."""
  batches = concatenate([evaluate(open_source("folder"), batch_size=20)])
  padding = np.concatenate([batch["index"] < 0 for batch in batches])
  images = np.concatenate([batch["image"] for batch in batches])
  assert padding.sum() == 3
  assert images[padding].std() > 10  # What is not readable is grey.
