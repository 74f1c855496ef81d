import io
import json
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from umae_jax import UserError
from umae_jax.data import prepare, sources


def run(**options):
  """The command line, in a process of its own; fails by its exit code."""
  command = [sys.executable, "-m", "umae_jax.data.prepare", "--processes=2"]
  command += [f"--{name}={value}" for name, value in options.items()]
  return subprocess.run(command, capture_output=True, text=True)


def files(folder):
  """{path relative to the folder: bytes} of all that is not hidden."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


def test_a_folder_is_copied_once_and_for_all(tmp_path, write):
  source, output = tmp_path / "full", tmp_path / "small" / "train"
  stored = {
    "train/a/large.png": write.encode(write.picture(0, (90, 61)), "PNG"),
    "train/a/below/wide.JPEG": write.encode(write.picture(1, (40, 200))),
    "train/b/small.jpg": write.encode(write.picture(2, (32, 99))),
    "train/b/broken.jpg": b"no image",
    "val/a/other.png": write.encode(write.picture(3), "PNG"),
    "val/b/other.png": write.encode(write.picture(3), "PNG"),
  }
  for name, data in stored.items():
    path = source / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  options = {
    "name": "folder",
    "directory": source,
    "split": "train",
    "output": output,
    "size": 32,
  }
  done = run(**options)
  assert done.returncode == 0, done.stderr
  assert "3 images in" in done.stdout and "4/4" in done.stderr
  assert str(source / "train/b/broken.jpg") in done.stdout
  found = files(output)
  claim = json.loads(found.pop("prepare.json"))
  assert claim["size"] == 32
  assert claim["unreadable"] == [str(source / "train/b/broken.jpg")]
  assert set(found) == {"a/large.png", "a/below/wide.JPEG", "b/small.jpg"}
  assert found["b/small.jpg"] == stored["train/b/small.jpg"]
  sizes = {name: Image.open(io.BytesIO(x)).size for name, x in found.items()}
  assert sizes["a/large.png"] == (32, 47)  # Width, height; 32 * 90 / 61.
  assert sizes["a/below/wide.JPEG"] == (160, 32)
  assert not list(output.glob(".*"))
  copy = sources.open_source(
    "folder",
    "train",
    directory=str(output.parent),
    image_size=(32, 32),
    channels=3,
  )
  assert copy.class_names == ("a", "b") and copy.labels.tolist() == [0, 0, 1]

  # Again: what is there stays, what is missing or empty is written.
  (output / "a/large.png").write_bytes(write.encode(write.picture(9)))
  (output / "b/small.jpg").write_bytes(b"")
  (output / "a/below/wide.JPEG").unlink()
  kept = files(output)["a/large.png"]
  assert run(**options).returncode == 0
  again = files(output)
  assert again["a/large.png"] == kept != found["a/large.png"]
  assert again["b/small.jpg"] == found["b/small.jpg"]
  assert again["a/below/wide.JPEG"] == found["a/below/wide.JPEG"]

  refused = run(**options | {"size": 16})
  assert refused.returncode == 2 and "not say" in refused.stderr
  assert "'size': 16" in refused.stderr
  assert "Traceback" not in refused.stderr and files(output) == again


def test_a_tfds_set_is_copied_as_class_folders(tfds_folder, tmp_path, write):
  source = prepare.open_images("tiny_set", str(tfds_folder), "train")
  tasks = list(prepare.tasks_of(source, str(tfds_folder), tmp_path))
  assert len(tasks) == 37 and len({task.name for task in tasks}) == 37
  for task in tasks:
    assert prepare.copy_one(task, 12)
  for number in (0, 11, 36):  # Class number % 3 of "c", "a", "b".
    file = tmp_path / "cab"[number % 3] / f"{number:08}.jpg"
    with Image.open(file) as image:
      got = np.asarray(image).astype(int)
    picture = Image.fromarray(write.picture(number))
    expected = picture.resize((12, 12), Image.Resampling.BICUBIC)
    assert got.shape == (12, 12, 3)
    assert np.abs(got - np.asarray(expected)).mean() < 4


def test_what_cannot_be_read_is_not_left_out(tmp_path, write):
  """A file that is gone for now: the command stops, and continues later."""
  write.folder(tmp_path / "full" / "train", {"a": 2, "b": 1})
  gone = tmp_path / "full" / "train" / "b" / "002.png"
  options = {
    "name": "folder",
    "directory": tmp_path / "full",
    "split": "train",
    "output": tmp_path / "small",
  }
  data = gone.read_bytes()
  gone.unlink()
  gone.symlink_to(tmp_path / "elsewhere")
  stopped = run(**options)
  assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
  assert "002.png" in stopped.stderr
  assert "The same command continues" in stopped.stderr
  (tmp_path / "elsewhere").write_bytes(data)
  assert run(**options).returncode == 0
  assert {"a/000.png", "a/001.png", "b/002.png"} < set(
    files(tmp_path / "small")
  )


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK"])
def test_every_mode_becomes_a_jpeg_of_the_same_picture(write, mode):
  image = Image.fromarray(write.picture(0, (64, 48))).convert(mode)
  buffer = io.BytesIO()
  image.save(buffer, "JPEG" if mode == "CMYK" else "PNG")
  data = buffer.getvalue()
  with Image.open(io.BytesIO(prepare.shrink(data, 24))) as small:
    assert small.format == "JPEG" and small.size == (24, 32)
    assert small.mode == ("L" if mode == "L" else "RGB")
    expected = image.convert(small.mode).resize((24, 32))
    error = np.asarray(small).astype(int) - np.asarray(expected)
  assert np.abs(error).mean() < 6


def test_small_and_deep_images_stay_as_they_are(write):
  small = write.encode(write.picture(0, (24, 90)))
  assert prepare.shrink(small, 24) == small
  buffer = io.BytesIO()
  Image.fromarray(np.arange(2500, dtype=np.uint16).reshape(50, 50)).save(
    buffer, "PNG"
  )
  assert prepare.shrink(buffer.getvalue(), 24) == buffer.getvalue()


@pytest.mark.parametrize("size", [32, 500])
def test_a_truncated_image_is_not_readable(write, size):
  data = write.encode(write.picture(0, (200, 160)))
  with pytest.raises(OSError, match="image file is truncated"):
    prepare.shrink(data[: len(data) * 3 // 4], size)


def test_other_files_are_left_alone(tmp_path):
  (tmp_path / "thesis.tex").write_text("all of it")
  with pytest.raises(UserError, match=r"holds something else.*new or empty"):
    prepare.claim(tmp_path, {"size": 1})
  with pytest.raises(UserError, match="is a file; name a new directory"):
    prepare.claim(tmp_path / "thesis.tex", {"size": 1})
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
  for text in ("[]", "null", "{", '{"size": 2}'):
    (tmp_path / "prepare.json").write_text(text)
    with pytest.raises(UserError, match="holds something else"):
      prepare.claim(tmp_path, {"size": 1})
  (tmp_path / "prepare.json").write_text('{"size": 1, "unreadable": []}')
  prepare.claim(tmp_path, {"size": 1})


@pytest.mark.parametrize(
  "options, message",
  [
    ({"output": "{folder}/copy"}, "lie one in the other"),
    ({"directory": "{folder}/nothing"}, "is not a folder"),
    ({"directory": ""}, "umae_jax: --directory='' is not a folder"),
    ({"split": "foo"}, "umae_jax: --split='foo' is not"),
    ({"name": "digits", "split": "train"}, "not made of image files"),
    ({"size": "0"}, "'0' is not a number above 0"),
  ],
)
def test_wrong_usage_is_told(image_folder, tmp_path, capsys, options, message):
  given = {
    "name": "folder",
    "directory": "{folder}",
    "split": "train",
    "output": str(tmp_path / "new"),
  } | options
  arguments = [
    f"--{name}={value.format(folder=image_folder)}"
    for name, value in given.items()
  ]
  try:
    assert prepare.main(arguments) == 2
  except SystemExit as stop:
    assert stop.code == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "new").exists()
  assert not (image_folder / "copy").exists()
