r"""Copies a data set once, as smaller JPEGs that decode faster.

  python -m umae_jax.data.prepare --name=folder --directory=/data/imagenet \
      --split=train --output=/data/imagenet256/train
  python -m umae_jax.data.prepare --name=imagenet2012 --split=validation \
      --output=/data/imagenet256/val

writes class folders, to be read with --config.data.name=folder and
--config.data.directory=/data/imagenet256. The shorter side of an image becomes
--size pixels; smaller images are copied as they are. The names of the files
are those of the source, or CLASS/INDEX.jpg; whatever they end in, what has
been made smaller is a JPEG. The same command again continues.

Exit codes: 0 finished, 1 stopped with an error, 2 wrong usage or data.
"""

import argparse
from collections.abc import Iterator
import concurrent.futures
import functools
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import sys
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # It only reads here.

from PIL import Image
import tqdm

from umae_jax import UserError, storage, workdir
from umae_jax.data import image_files, sources
from umae_jax.data.share import Share, Source
from umae_jax.data.table import TableSource

CLAIM = "prepare.json"  # In --output: what is there, so that it is not mixed.
QUALITY = 95
AT_ONCE = 32  # Images that are given to each process.
NAMES_SHOWN = 20  # Of unreadable images.


class Task(NamedTuple):
  """One image to copy."""

  name: str  # Path of the image; with `data`, what to call it.
  data: bytes | None
  target: pathlib.Path


def main(arguments: list[str] | None = None) -> int:
  """Copies, and says what came of it."""
  given = _parser().parse_args(arguments)
  try:
    output = storage.local_path(given.output, "--output=")
    storage.local_path(given.directory, "--directory=")
    source = open_images(given.name, given.directory, given.split)
    facts = {k: vars(given)[k] for k in ("name", "split", "size")}
    # "" is the default of TFDS.
    facts["directory"] = given.directory and os.path.realpath(given.directory)
    if given.name == "folder":
      _refuse_inside(output, given.directory)
    claim(output, facts)
    tasks = tasks_of(source, given.directory, output)
    unreadable = copy(tasks, source.num_examples, given.size, given.processes)
    workdir.write_json(output / CLAIM, facts | {"unreadable": unreadable})
  except UserError as error:
    message = str(error).replace("config.data.*_split", "--split")
    message = message.replace("config.data.", "--")
    print(f"umae_jax: {message}", file=sys.stderr, flush=True)
    return 2
  except (OSError, concurrent.futures.BrokenExecutor) as error:
    print(f"umae_jax: {error}\nThe same command continues.", file=sys.stderr)
    return 1
  print(f"{source.num_examples - len(unreadable):,} images in {output}.")
  if unreadable:
    more = ["..."] if len(unreadable) > NAMES_SHOWN else []
    print(f"{len(unreadable):,} are not readable and were left out:")
    print(*unreadable[:NAMES_SHOWN], *more, sep="\n")
    print(f"{output / CLAIM} names them all.")
  return 0


def open_images(name: str, directory: str, split: str) -> Source:
  """Opens a source of encoded images; see `sources.open_source`."""
  source = sources.open_source(
    name,
    split,
    directory=directory,
    eval_fraction=0.0,  # A folder without splits is copied whole.
    image_size=(1, 1),
    channels=3,
  )
  if isinstance(source, TableSource) and not source.is_path:
    raise UserError(f"--name={name!r} is not made of image files.")
  for folder in source.class_names:
    if "/" in folder or folder.startswith("."):
      raise UserError(f"The class {folder!r} can not be a folder's name.")
  return source


def claim(output: pathlib.Path, facts: dict[str, str | int]) -> None:
  """Makes `output`, or raises UserError if it holds anything else.

  Args:
    output: absent, empty, or with a part of just this copy.
    facts: what tells this copy from others.
  """
  file = output / CLAIM
  if output.exists() and not output.is_dir():
    raise UserError(f"--output={output} is a file; name a new directory.")
  if not output.exists() or not any(output.iterdir()):
    output.mkdir(parents=True, exist_ok=True)
    workdir.write_json(file, facts)
  try:
    found = json.loads(file.read_text())
  except (OSError, ValueError):
    found = None
  if not isinstance(found, dict) or not facts.items() <= found.items():
    raise UserError(
      f"--output={output} holds something else, as its {CLAIM} does not say "
      f"{facts}. Name a new or empty directory, or the same source and size."
    )


def tasks_of(
  source: Source, directory: str, output: pathlib.Path
) -> Iterator[Task]:
  """What to copy, and where to, in the order of the source."""
  names = source.class_names
  if isinstance(source, TableSource):
    for index, label in enumerate(source.labels):
      path = source.name_of(index)
      # [SPLIT/]CLASS/IMAGE
      parts = pathlib.Path(path).relative_to(directory).parts
      parts = parts[parts.index(names[label]) :]
      yield Task(path, None, output.joinpath(*parts))
    return
  records = source.eval_records(Share(1), source.num_examples)
  for example in records.as_numpy_iterator():
    index = int(example["index"])
    folder = output / names[example["label"]]
    target = folder / f"{index:08}.jpg"
    yield Task(source.name_of(index), example["image"], target)


def copy(
  tasks: Iterator[Task], count: int, size: int, processes: int
) -> list[str]:
  """Copies `count` images in several processes.

  Args:
    tasks: `count` of them.
    count: for the progress bar.
    size: pixels of the shorter side.
    processes: how many.

  Returns:
    Names of those that are not readable.
  """
  unreadable = []
  interval = 0.5 if sys.stderr.isatty() else 10
  with (
    tqdm.tqdm(total=count, unit=" images", mininterval=interval) as bar,
    concurrent.futures.ProcessPoolExecutor(
      processes,
      # Not forked: TensorFlow's threads would be missing.
      mp_context=multiprocessing.get_context("spawn"),
      initializer=signal.signal,  # Ctrl-C is for the parent to handle.
      initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool,
  ):
    work = functools.partial(copy_one, size=size)
    while some := list(itertools.islice(tasks, AT_ONCE * processes)):
      readable = pool.map(work, some)
      unreadable += [x.name for x, good in zip(some, readable) if not good]
      bar.update(len(some))
  return unreadable


def copy_one(task: Task, size: int) -> bool:
  """Copies an image unless it is there; False if it is not readable."""
  if _is_image(task.target):
    return True
  data = task.data
  if data is None:
    data = pathlib.Path(task.name).read_bytes()
  try:
    data = shrink(data, size)
  # Pillow says what is wrong with a file in half a dozen ways.
  except Exception:
    return False
  task.target.parent.mkdir(parents=True, exist_ok=True)
  storage.write_file(task.target, lambda file: file.write(data))
  return True


def shrink(data: bytes, size: int) -> bytes:
  """An encoded image as a JPEG whose shorter side is `size` pixels.

  One that is not larger, or has more than 8 bits a channel, stays as it is.

  Raises:
    Exception: of some kind, if it does not decode.
  """
  with Image.open(io.BytesIO(data), formats=image_files.FORMATS) as image:
    image.load()
    shorter = min(image.size)
    if shorter <= size or image.mode[0] in "IF":
      return data
    sides = [round(side * size / shorter) for side in image.size]
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    image = image.resize(sides, Image.Resampling.BICUBIC, reducing_gap=3.0)
  buffer = io.BytesIO()
  image.save(buffer, "JPEG", quality=QUALITY)
  return buffer.getvalue()


def _is_image(path: pathlib.Path) -> bool:
  """Whether an image begins there. Files are complete or absent."""
  try:
    with Image.open(path, formats=image_files.FORMATS):
      return True
  except Exception:
    return False


def _refuse_inside(output: pathlib.Path, directory: str) -> None:
  """Raises UserError if source and copy would lie one in the other."""
  here, there = output.resolve(), pathlib.Path(directory).resolve()
  if here.is_relative_to(there) or there.is_relative_to(here):
    raise UserError(
      f"--output={output} and --directory={directory} lie one in the other, "
      "and would be taken for each other. Name an --output beside it."
    )


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m umae_jax.data.prepare",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--name", required=True, help="'folder', or a data set of TFDS")
  add("--directory", default="", help="as config.data.directory")
  add("--split", required=True, help="as config.data.train_split")
  add("--output", required=True, help="a new directory")
  add("--size", type=_positive, default=256, help="pixels (default 256)")
  add("--processes", type=_positive, default=os.cpu_count())
  return parser


def _positive(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
  return int(text)


if __name__ == "__main__":
  sys.exit(main())
