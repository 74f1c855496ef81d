import os
import pathlib
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from umae_jax import UserError, sharding
from umae_jax.data import (
  arrays,
  folder,
  image_files,
  in_memory,
  on_device,
  pipeline,
  share,
  sources,
  table,
)

REPOSITORY = pathlib.Path(__file__).parents[2]
SIZE = (24, 24)
PLAIN = {"crop_scale": (), "flip": False}


def memory(source, image_size=SIZE, channels=3, crops=False):
  return in_memory.MemorySource(source, image_size, channels, crops)


@pytest.fixture
def few(image_folder):
  """37 images of 24 x 24, in memory."""
  found = folder.open_folder(
    str(image_folder), "train", eval_fraction=0.1, classes=""
  )
  return memory(found, crops=True)


def draw(source, steps, devices=1, batch_size=8, **options):
  """The batches of some steps, by a new set in memory."""
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  options = {
    "seed": 3,
    "crop_scale": (0.2, 1.0),
    "flip": True,
    "max_unreadable": 0.0,
  } | options
  images = on_device.TrainingSet(source, mesh, batch_size=batch_size, **options)
  one = jax.jit(images.draw)
  batches = []
  for step in steps:
    data, most = images.at(step)
    assert most >= 1
    batches.append(jax.device_get(one(data, np.int32(step))))
  return batches


def rows(batches):
  """Each image as bytes, in order."""
  return [image.tobytes() for batch in batches for image in batch["image"]]


def assert_same(got, expected):
  assert len(got) == len(expected)
  for a, b in zip(got, expected):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])
      assert a[key].dtype == b[key].dtype


def test_every_epoch_holds_every_example_once(few):
  """Also where a batch crosses its end: 37 is no multiple of 8."""
  batches = draw(few, range(14), **PLAIN)
  assert batches[0]["image"].shape == (8, *SIZE, 3)
  assert batches[0]["image"].dtype == np.uint8
  seen = rows(batches)
  stored = [image.tobytes() for image in few.pixels.images]
  epochs = [seen[i * 37 : (i + 1) * 37] for i in range(3)]
  assert all(sorted(epoch) == sorted(stored) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 3
  labels = dict(zip(stored, few.pixels.labels))
  found = np.concatenate([batch["label"] for batch in batches])
  assert [labels[image] for image in seen] == found.tolist()


def test_a_batch_follows_from_seed_and_step_alone(few):
  whole = draw(few, range(14), **PLAIN)
  assert_same(draw(few, [11, 4], **PLAIN), [whole[11], whole[4]])
  a, b = (rows(draw(few, [0], seed=s, **PLAIN)) for s in (3, 4))
  assert a != b
  # One batch an epoch, so that its set tells only crops and flips.
  first, second = draw(few, [0, 1], batch_size=37)
  assert_same(draw(few, [1], batch_size=37), [second])
  (other,) = draw(few, [0], batch_size=37, seed=4)
  for batch in (second, other):
    assert len(set(rows([first])) & set(rows([batch]))) < 8


def test_the_number_of_devices_changes_nothing(few):
  assert_same(draw(few, range(6), devices=8), draw(few, range(6)))


def test_each_device_gathers_its_own_rows():
  """No collective, and no scatter, in the compiled draw."""
  mesh = sharding.make_mesh()
  images = on_device.TrainingSet(
    memory(arrays.open_made("train", SIZE, 3)),
    mesh,
    batch_size=16,
    seed=0,
    crop_scale=(0.2, 1.0),
    flip=True,
    max_unreadable=0.0,
  )
  data, _ = images.at(0)
  assert data["image"].sharding.is_fully_replicated
  compiled = jax.jit(images.draw).lower(data, np.int32(0)).compile()
  program = compiled.as_text()
  assert "u8[2,24,24,3]" in program  # Two of the 16 rows.
  for name in ("all-gather", "all-reduce", "all-to-all", "scatter("):
    assert name not in program


def test_steps_beyond_the_range_of_integers_are_right(few):
  """Position 8 * step is beyond 2^31: only the difference must not be."""
  step = 2**31 - 100
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  images = on_device.TrainingSet(
    few, mesh, batch_size=8, seed=0, max_unreadable=0.0, **PLAIN
  )
  data, most = images.at(step)
  epoch, offset = divmod(8 * step, 37)
  assert data["epoch"] == epoch and most == (74 - offset) // 8
  for ahead in range(most):
    got = jax.jit(images.draw)(data, np.int32(step + ahead))
    index = data["order"][offset + 8 * ahead : offset + 8 * ahead + 8]
    assert len(index) == 8
    np.testing.assert_array_equal(got["image"], few.pixels.images[index])


def test_half_of_the_images_are_mirrored(few):
  """Other ones at every step, and of every seed."""

  def mirrored(seed):
    pairs = zip(
      draw(few, [1, 2], batch_size=32, seed=seed, **PLAIN),
      draw(few, [1, 2], batch_size=32, seed=seed, crop_scale=(), flip=True),
    )
    for plain, batch in pairs:
      turned = []
      for a, b in zip(plain["image"], batch["image"]):
        turned.append(not np.array_equal(a, b))
        np.testing.assert_array_equal(a[:, ::-1] if turned[-1] else a, b)
      assert 8 <= sum(turned) <= 24
      yield tuple(turned)

  assert len({*mirrored(3), *mirrored(4)}) == 4


def test_crops_are_taken_from_images_of_their_own_size(write, tmp_path):
  write.folder(tmp_path / "train", {"a": 4, "b": 4})
  found = folder.open_folder(
    str(tmp_path), "train", eval_fraction=0.1, classes=""
  )
  own = memory(found, (12, 12), crops=True)
  assert own.pixels.images.shape == (8, 24, 24, 3)
  (whole,) = draw(own, [0], crop_scale=(1.0, 1.0), flip=False)
  assert whole["image"].shape == (8, 12, 12, 3)
  cut = memory(found, (12, 12))
  assert cut.pixels.images.shape == (8, 12, 12, 3)
  # Of images of several sizes, they would be crops of central crops.
  (tmp_path / "train" / "a" / "x.png").write_bytes(
    write.encode(write.picture(1, (30, 20)), "PNG")
  )
  found = folder.open_folder(
    str(tmp_path), "train", eval_fraction=0.1, classes=""
  )
  with pytest.raises(UserError, match=r"30 x 20 .*feed=device_crop or host"):
    memory(found, (12, 12), crops=True).check(8, 1)
  memory(found, (12, 12)).check(8, 1)


def test_record_files_of_one_size_keep_it_for_crops(
  tfds_folder, write, tmp_path
):
  def check(directory, crops):
    options = {"directory": str(directory), "image_size": SIZE, "channels": 3}
    source = sources.open_source("tiny_set", "train", **options)
    source = memory(source, (12, 12), crops=crops)
    source.check(8, 1)
    return source

  kept = check(tfds_folder, crops=True).pixels.images
  assert kept.shape == (37, 24, 24, 3)
  np.testing.assert_array_equal(kept[36], write.picture(36))
  assert check(tfds_folder, crops=False).pixels.images.shape[1:3] == (12, 12)
  shapes = [(24, 24), (24, 24), (20, 28)]
  images = [(write.encode(write.picture(0, x)), 0) for x in shapes]
  write.tfds(tmp_path, [images], ["a"])
  with pytest.raises(UserError, match=r"20 x 28.*--config.data.crop_scale"):
    check(tmp_path, crops=True)
  assert check(tmp_path, crops=False).pixels.images.shape == (3, 12, 12, 3)


def assert_close(got, expected, tolerance):
  assert len(got) == len(expected)
  for a, b in zip(got, expected):
    assert a.keys() == b.keys()
    for key in ("label", "mask", "index"):
      np.testing.assert_array_equal(a[key], b[key])
      assert a[key].dtype == b[key].dtype
    a, b = (x["image"][x["mask"]].astype(int) for x in (a, b))
    assert np.abs(a - b).max(initial=0) <= tolerance


@pytest.mark.parametrize(
  "kind, image_size, channels",
  [
    ("digits", (8, 8), 1),
    ("digits", (12, 8), 3),
    ("made", SIZE, 3),
    ("folder", SIZE, 3),
    ("folder", (16, 12), 1),
  ],
)
@pytest.mark.parametrize("process, limit", [((0, 1), None), ((1, 2), 9)])
def test_evaluation_has_the_batches_of_the_pipeline(
  image_folder, kind, image_size, channels, process, limit
):
  source = sources.open_source(
    kind,
    "train" if kind == "folder" else "test",
    directory=str(image_folder),
    image_size=image_size,
    channels=channels,
  )
  share = {"process_index": process[0], "process_count": process[1]}
  share |= {"batch_size": 8, "limit": limit}
  keep = kind == "folder"  # Cut when evaluated, then.
  got = in_memory.eval_batches(
    memory(source, image_size, channels, keep), **share
  )
  expected = pipeline.eval_batches(
    source, image_size=image_size, channels=channels, **share
  )
  exact = image_size == (SIZE if kind != "digits" else (8, 8))
  assert_close(list(got), list(expected), 0 if exact else 2)


def test_tfds_is_read_in_the_order_of_its_files(tfds_folder, write):
  source = sources.open_source(
    "tiny_set",
    "train",
    directory=str(tfds_folder),
    image_size=SIZE,
    channels=3,
  )
  pixels = memory(source).pixels
  expected = np.stack([write.picture(i) for i in range(37)])
  np.testing.assert_array_equal(pixels.images, expected)
  np.testing.assert_array_equal(pixels.labels, np.arange(37) % 3)
  assert pixels.readable.all()


def test_unreadable_images_are_grey_named_and_limited(write, tmp_path, caplog):
  write.folder(tmp_path / "train", {"a": 3, "b": 3})
  bad = tmp_path / "train" / "a" / "001.png"
  bad.write_bytes(b"no image")
  found = folder.open_folder(
    str(tmp_path), "train", eval_fraction=0.1, classes=""
  )
  source = memory(found, crops=True)
  assert source.stored_size == SIZE
  images, labels, readable = source.pixels
  assert readable.tolist() == [True, False] + [True] * 4
  assert (images[1] == 128).all() and images[0].std() > 20
  assert labels.tolist() == [0] * 3 + [1] * 3
  assert str(bad) in caplog.text and "002.png" not in caplog.text
  (batch,) = in_memory.eval_batches(source, batch_size=6)
  assert batch["mask"].sum() == 5
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  options = {"batch_size": 2, "seed": 0} | PLAIN
  training = on_device.TrainingSet(source, mesh, max_unreadable=0.2, **options)
  assert training.unreadable == [str(bad)]
  with pytest.raises(
    UserError, match=r"1 of 6 .*max_unreadable=0.1 .*001\.png"
  ):
    on_device.TrainingSet(source, mesh, max_unreadable=0.1, **options)


def test_an_unreadable_record_is_named_where_classes_are_dropped(
  write, tmp_path, caplog
):
  """By its place in the file, as TFDS counts."""
  examples = [(write.encode(write.picture(i)), i % 3) for i in range(9)]
  examples[7] = (b"no image", 1)
  write.tfds(tmp_path, [examples[:4], examples[4:]], ["a", "b", "c"])
  listing = tmp_path / "list.txt"
  listing.write_text("b\nc\n")
  source = sources.open_source(
    "tiny_set",
    "train",
    directory=str(tmp_path),
    classes=str(listing),
    image_size=SIZE,
    channels=3,
  )
  source = memory(source)
  assert source.pixels.readable.tolist() == [True] * 4 + [False, True]
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  options = {"batch_size": 2, "seed": 0, "max_unreadable": 0.2} | PLAIN
  (name,) = on_device.TrainingSet(source, mesh, **options).unreadable
  assert name.endswith("tiny_set-train.tfrecord-00001-of-00002__3")
  assert name in caplog.text


def test_evaluation_cuts_images_in_several_threads(
  write, tmp_path, monkeypatch
):
  write.folder(tmp_path / "train", {"a": 4, "b": 4})
  found = folder.open_folder(
    str(tmp_path), "train", eval_fraction=0.1, classes=""
  )
  source = memory(found, (12, 12), crops=True)
  assert source.pixels.images.shape == (8, 24, 24, 3)
  crop, threads = image_files.central_crop, set()

  def watched(*arguments):
    threads.add(threading.get_ident())
    return crop(*arguments)

  monkeypatch.setattr(image_files, "central_crop", watched)
  (batch,) = in_memory.eval_batches(source, batch_size=8)
  assert threads and threading.get_ident() not in threads
  order = table.evaluation_rows(8, share.Share(8), 8)[0]
  for image, row in zip(batch["image"], order):
    np.testing.assert_array_equal(
      image, crop(source.pixels.images[row], (12, 12))
    )


@pytest.mark.parametrize("devices, accelerator", [(1, 0), (8, 0), (2, 1)])
@pytest.mark.parametrize("processes", [1, 4])
def test_sets_that_do_not_fit_together_are_refused_unread(
  monkeypatch, devices, accelerator, processes
):
  """The host keeps both; a device that is a CPU has its copy there, too."""
  train, test = (
    memory(arrays.open_made(split, SIZE, 3)) for split in ("train", "test")
  )
  copy, other = 256 * 24 * 24 * 3, 64 * 24 * 24 * 3
  limits = {}

  class Device:
    device_kind = "chip"

    def memory_stats(self):
      return {"bytes_limit": limits["device"]} if accelerator else None

  monkeypatch.setattr(jax, "local_devices", lambda: [Device()] * devices)
  monkeypatch.setattr(
    os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 0}.get
  )

  def check(host, device):
    limits["device"] = int(device)
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": int(host * processes)}
    monkeypatch.setattr(os, "sysconf", pages.get)
    in_memory.check_memory(train, test, processes=processes)

  host = 2 * (copy + other + (0 if accelerator else devices * copy))
  check(host, 2 * copy)
  with pytest.raises(UserError, match=r"256 images .* 64 more .*=host"):
    check(host - 2, 2 * copy)
  if accelerator:
    with pytest.raises(UserError, match=r"50% of the .* of chip"):
      check(host, 2 * copy - 2)
  assert "pixels" not in vars(train) | vars(test)


def test_a_run_needs_no_tensorflow(tmp_path):
  """From the command to the summary, where its import fails."""
  program = (
    "import sys\n"
    "sys.modules['tensorflow'] = None\n"
    "from absl import app\n"
    "from umae_jax import main\n"
    "app.run(main.main, flags_parser=main.parse)\n"
  )
  subprocess.run(
    [
      *(sys.executable, "-c", program),
      "--config=configs/digits.py:smoke",
      "--config.data.feed=memory",
      "--config.model.depth=1",
      "--config.model.decoder_depth=1",
      f"--workdir={tmp_path}",
    ],
    check=True,
    cwd=REPOSITORY,
    capture_output=True,
  )
  assert (tmp_path / "summary.json").exists()
