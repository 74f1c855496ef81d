import io

import numpy as np
import pytest

from umae_jax import UserError
from umae_jax.data import decode, pipeline, sources

TRAIN = {
  "batch_size": 4,
  "seed": 0,
  "image_size": (24, 24),
  "channels": 3,
  "crop_scale": (0.2, 1.0),
  "flip": True,
  "shuffle_buffer": 4,
}


def kinds(write):
  """Bytes of odd images by name: (those to read, those beyond use)."""
  from PIL import Image

  image = write.picture(0, size=(60, 80))
  as_mode = {
    mode: np.asarray(Image.fromarray(image).convert(mode))
    for mode in ("L", "RGBA", "LA")
  }
  jpeg = write.encode(image)
  scan = jpeg.index(b"\xff\xda")  # Lines follow this marker.
  readable = {
    "plain.jpeg": jpeg,
    "progressive.jpg": write.encode(image, progressive=True),
    "grey.JPEG": write.encode(as_mode["L"]),
    "png.JPEG": write.encode(image, "PNG"),
    "alpha.png": write.encode(as_mode["RGBA"], "PNG"),
    "grey_alpha.png": write.encode(as_mode["LA"], "PNG"),
    "image.gif": write.encode(image, "GIF"),
    "image.bmp": write.encode(image, "BMP"),
    "image.webp": write.encode(image, "WEBP"),
    "without_end.jpeg": jpeg[:-2],
    "truncated.jpeg": jpeg[: scan + (len(jpeg) - scan) * 85 // 100],
    "one_pixel.jpeg": write.encode(image[:1, :1]),
    "cmyk.JPEG": cmyk(image),
  }
  bad = {
    "empty.jpeg": b"",
    "garbage.jpeg": np.random.default_rng(0).bytes(3000),
    "cut.jpeg": jpeg[: scan + (len(jpeg) - scan) * 30 // 100],
    "header.jpeg": jpeg[: scan // 2],
    "cut.png": write.encode(image, "PNG")[:300],
  }
  return readable, bad


def cmyk(image):
  from PIL import Image

  buffer = io.BytesIO()
  Image.fromarray(image).convert("CMYK").save(buffer, "JPEG")
  return buffer.getvalue()


def open_folder(tmp_path, files):
  folder = tmp_path / "train" / "only"
  folder.mkdir(parents=True)
  for name, data in files.items():
    (folder / name).write_bytes(data)
  return sources.open_source(
    "folder", "train", directory=str(tmp_path), image_size=(24, 24), channels=3
  )


@pytest.mark.parametrize("channels", [3, 1])
def test_odd_images_are_read(write, channels):
  readable, _ = kinds(write)
  assert decode.decode(readable.pop("one_pixel.jpeg"), channels).shape[0] == 1
  for name, data in readable.items():
    got = decode.decode(data, channels).numpy().astype(int)
    expected = write.picture(0, size=(60, 80)).astype(int)
    if channels == 1 or "grey" in name:
      expected = expected @ [[0.299], [0.587], [0.114]]
    lines = 40 if "truncated" in name else 48  # Those that are surely there.
    error = np.abs(got - expected)[:lines].mean()
    assert got.shape == (60, 80, channels) and error < 8, (name, error)


def test_jpegs_equal_those_of_pillow(write):
  from PIL import Image

  data = write.encode(write.picture(0, size=(60, 80)))
  expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
  np.testing.assert_array_equal(decode.decode(data, 3), expected)


def test_odd_images_are_read_in_training(tmp_path, write):
  readable, _ = kinds(write)
  source = open_folder(tmp_path, readable)
  batches = pipeline.train_batches(source, **TRAIN)
  for _ in range(30):
    next(batches)
  assert batches.unreadable == []


def test_a_window_beyond_the_end_of_a_truncated_jpeg_is_read(tmp_path, write):
  data = write.encode(write.picture(0, size=(160, 80)))
  source = open_folder(tmp_path, {"cut.jpeg": data[: len(data) * 3 // 4]})
  options = TRAIN | {"crop_scale": (0.05, 0.1)}
  batches = pipeline.train_batches(source, **options)
  images = np.concatenate([next(batches)["image"] for _ in range(10)])
  assert batches.unreadable == []
  assert (images == 0).all((1, 2, 3)).any()  # Some lay all in the missing part.


def test_bad_images_are_grey_counted_and_named(tmp_path, write, caplog):
  readable, bad = kinds(write)
  source = open_folder(tmp_path, readable | bad)
  batches = pipeline.eval_batches(
    source, batch_size=4, image_size=(24, 24), channels=3
  )
  found = list(batches)
  names = {name.rsplit("/", 1)[-1] for name in batches.unreadable}
  assert names == set(bad) and len(batches.unreadable) == len(bad)
  image = np.concatenate([batch["image"] for batch in found])
  mask = np.concatenate([batch["mask"] for batch in found])
  assert mask.sum() == len(readable)
  assert (image[~mask] == 128).sum() >= len(bad) * 24 * 24 * 3
  assert image[mask].std() > 20

  batches = pipeline.train_batches(source, max_unreadable=0.5, **TRAIN)
  grey = [np.ptp(x) == 0 for _ in range(9) for x in next(batches)["image"]]
  assert len(batches.unreadable) >= len(bad) - 1
  assert len(batches.unreadable) == len(set(batches.unreadable))
  # Two epochs: each of them met about twice, along with the single pixel.
  assert len(bad) <= sum(grey) <= 2 * len(bad) + 2
  text = caplog.text  # Once by the evaluation, once by the training.
  assert all(text.count(name) == 2 for name in batches.unreadable)


def test_order_survives_bad_images(tmp_path, write):
  """A replaced image takes its own row; the others stay where they are."""
  good = {f"{i}.png": write.encode(write.picture(i), "PNG") for i in range(12)}
  source = open_folder(tmp_path / "good", good)
  spoilt = open_folder(tmp_path / "bad", good | {"5.png": b"no image"})
  options = TRAIN | {"crop_scale": None}
  a = pipeline.train_batches(source, **options)
  b = pipeline.train_batches(spoilt, max_unreadable=1.0, **options)
  differ = 0
  for _ in range(6):
    for x, y in zip(next(a)["image"], next(b)["image"]):
      differ += not np.array_equal(x, y)
      assert np.array_equal(x, y) or (y == 128).all()
  assert differ == 2  # Two epochs.


@pytest.mark.parametrize("allowed, stops", [(0.12, False), (0.05, True)])
def test_too_many_bad_images_stop_with_their_names(
  tmp_path, write, allowed, stops
):
  good = {f"{i}.png": write.encode(write.picture(i), "PNG") for i in range(18)}
  source = open_folder(tmp_path, good | {"x.png": b"", "y.png": b"?"})
  batches = pipeline.train_batches(source, max_unreadable=allowed, **TRAIN)
  if not stops:  # 2 of 20 are 0.1.
    for _ in range(12):
      next(batches)
    assert len(batches.unreadable) == 2
    return
  with pytest.raises(UserError, match=r"max_unreadable=0.05.*[xy]\.png"):
    for _ in range(12):
      next(batches)
  assert len(batches.unreadable) == 2  # One is exactly 0.05: still allowed.


def test_bad_images_of_tfds_are_named(tmp_path, write):
  good = [(write.encode(write.picture(i)), 0) for i in range(5)]
  write.tfds(tmp_path, [good[:3], [*good[3:], (b"broken", 1)]], ["a", "b"])
  source = sources.open_source(
    "tiny_set",
    "train",
    directory=str(tmp_path),
    image_size=(24, 24),
    channels=3,
  )
  batches = pipeline.eval_batches(
    source, batch_size=4, image_size=(24, 24), channels=3
  )
  assert sum(int(batch["mask"].sum()) for batch in batches) == 5
  assert len(batches.unreadable) == 1
  assert batches.unreadable[0].endswith("tfrecord-00001-of-00002__2")
