import io

import numpy as np
from PIL import Image
import pytest

from umae_jax.data import augment, decode, image_files


def write_file(path, picture, mode="RGB", **options):
  Image.fromarray(picture).convert(mode).save(path, **options)
  return str(path)


def by_tensorflow(path, channels, image_size):
  with open(path, "rb") as file:  # noqa: PTH123
    image = decode.decode(file.read(), channels)
  stage = augment.central_crop(image_size, channels)
  return stage({"image": image})["image"].numpy()


def assert_close(got, expected):
  """Within two grey levels, and mostly equal."""
  assert got.dtype == np.uint8 and got.shape == expected.shape
  difference = np.abs(got.astype(int) - expected)
  assert difference.max() <= 2
  assert difference.mean() < 0.5


def test_what_overshoots_is_clipped_once(tmp_path):
  """Black and white in squares, enlarged: the kernel leaves the range."""
  squares = np.indices((8, 8)).sum(0) % 2 * np.uint8(255)
  path = write_file(tmp_path / "a.png", squares.astype(np.uint8), "RGB")
  (got,) = image_files.read([path], 3, (20, 12))
  assert_close(got, by_tensorflow(path, 3, (20, 12)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
  "size, image_size",
  [
    ((40, 60), (24, 24)),  # A margin falls off.
    ((61, 37), (32, 24)),
    ((20, 50), (24, 24)),  # Enlarged to cover.
    ((24, 24), (24, 24)),  # As it is.
    ((300, 500), (256, 240)),  # Larger than 224: no margin.
  ],
)
def test_central_crops_are_those_of_tensorflow(
  write, tmp_path, size, image_size, channels
):
  path = write_file(tmp_path / "a.jpg", write.picture(3, size), quality=95)
  (got,) = image_files.read([path], channels, image_size)
  assert_close(got, by_tensorflow(path, channels, image_size))


@pytest.mark.parametrize(
  "name, mode",
  [
    *(("a.png", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
    *(("a.jpg", mode) for mode in ("L", "CMYK")),
    *(("a.bmp", "RGB"), ("a.gif", "P"), ("a.webp", "RGB")),
  ],
)
def test_every_kind_of_file_is_read_as_by_tensorflow(
  write, tmp_path, name, mode
):
  picture = write.picture(2)
  path = tmp_path / name
  if mode == "I;16":
    grey = picture[..., 0].astype(np.uint16) * 256 + 77
    Image.fromarray(grey).save(path)
  else:
    write_file(path, picture, mode)
  (got,) = image_files.read([str(path)], 3)
  assert_close(got, decode.decode(path.read_bytes(), 3).numpy())


def test_files_stay_in_order_and_bad_ones_are_none(write, tmp_path):
  paths = []
  for i in range(6):
    path = tmp_path / f"{i}.png"
    path.write_bytes(write.encode(write.picture(i), "PNG"))
    paths.append(str(path))
  (tmp_path / "3.png").write_bytes(b"no image")
  whole = (tmp_path / "4.png").read_bytes()
  (tmp_path / "4.png").write_bytes(whole[: len(whole) // 2])
  got = list(image_files.read(paths, 3))
  assert [x is None for x in got] == [False] * 3 + [True, True, False]
  for i in (0, 1, 2, 5):
    np.testing.assert_array_equal(got[i], write.picture(i))


def test_a_file_that_cannot_be_read_is_no_bad_image(write, tmp_path):
  """The disk may be back later: nothing is concluded of the image."""
  good = tmp_path / "a.png"
  good.write_bytes(write.encode(write.picture(0), "PNG"))
  with pytest.raises(FileNotFoundError, match=r"absent\.png"):
    list(image_files.read([str(good), str(tmp_path / "absent.png")], 3))


def test_a_text_named_like_an_image_is_not_read(tmp_path):
  """Only the formats that TensorFlow knows, whatever Pillow can do."""
  buffer = io.BytesIO()
  Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "TIFF")
  path = tmp_path / "a.png"
  path.write_bytes(buffer.getvalue())
  assert list(image_files.read([str(path)], 3)) == [None]


def test_sizes_are_those_of_the_images(write):
  def files(*shapes):
    return [
      io.BytesIO(write.encode(write.picture(0, x)) if x else b"no image")
      for x in shapes
    ]

  assert image_files.sizes(files((12, 20), (), (12, 20))) == {(12, 20)}
  assert image_files.sizes(files(())) == set()
  read = iter(files((12, 20), (20, 12), (9, 9)))
  assert image_files.sizes(read) == {(12, 20), (20, 12)}
  assert len(list(read)) == 1  # Two are enough.


def test_more_channels_than_three_are_resized_alike(write):
  picture = write.picture(1, (40, 40))
  both = np.concatenate([picture, picture], -1)
  got = image_files.central_crop(both, (20, 24))
  expected = image_files.central_crop(picture, (20, 24))
  np.testing.assert_array_equal(got, np.concatenate([expected] * 2, -1))
