"""Image folders: one folder per class, its name the class; or no classes."""

from collections.abc import Iterable
import hashlib
import os
import pathlib

from absl import logging
import numpy as np

from umae_jax import UserError, storage
from umae_jax.data import class_lists
from umae_jax.data.decode import SUFFIXES
from umae_jax.data.table import TableSource

_FLAT_SPLITS = ("train", "val", "test", "all")  # "test" is "val", too.
UNLABELLED = "unlabelled"  # The class of images without a class folder.


def open_folder(
  directory: str, split: str, *, eval_fraction: float, classes: str
) -> TableSource:
  """Lists the images of a split; opens none of them.

  Args:
    directory: holds the folders of the splits, each with class folders; or, if
      it has neither train/ nor val/, the class folders themselves. Where there
      are images and no class folders, all are of the class UNLABELLED.
    split: name of a split's folder; without those "train", "val" or "test"
      (the same as "val"), or "all" of both.
    eval_fraction: fraction of each class that is "val" where the split is
      ours to make, in [0, 1); which images is decided by a hash of their
      names, so it stays as it is when others are added.
    classes: see `class_lists.select`.

  Returns:
    A source; its labels number the sorted names of the class folders.

  Raises:
    UserError: no such folder or split, no class folders and no images, a class
      without an image, or classes that differ between train/ and val/.
  """
  root = storage.path(directory, "config.data.directory=")
  storage.check(root, "config.data.directory=", storage.READ)
  if not directory or not root.is_dir():
    raise UserError(
      f"config.data.directory={directory!r} is not a folder. Set --config.data."
      "directory to one of images, for config.data.name='folder': flat, with "
      "class folders, or with train/ and val/."
    )
  if (root / "train").is_dir() or (root / "val").is_dir():
    base, part = _split_folder(root, split), None
  else:
    base, part = root, _part(split)
  folders = _class_folders(base)
  names, _ = class_lists.select(list(folders), classes)
  for other in (root / "train", root / "val"):
    if base != root and other.is_dir():
      _check_same_classes(base, names, other, classes)

  paths, labels, seen = [], [], 0
  for label, name in enumerate(names):
    images = chosen = _images(folders[name])
    if part is not None:
      # Rounded up to here, so that small classes give their share, too.
      due = round(eval_fraction * (seen + len(images)))
      chosen = _choose(images, part, due - round(eval_fraction * seen))
    seen += len(images)
    paths.extend(str(folders[name] / image) for image in chosen)
    labels.extend([label] * len(chosen))
  if not paths:
    raise UserError(
      f"config.data.eval_fraction={eval_fraction} leaves no image for "
      f"split={split!r} of the {seen} images of {directory}; "
      f"{'lower' if part == 'train' else 'raise'} it."
    )
  return TableSource(
    class_names=names,
    labels=np.array(labels, np.int32),
    load=lambda: [os.fsencode(path) for path in paths],
    name_of=paths.__getitem__,
    is_path=True,
  )


def _split_folder(root: pathlib.Path, split: str) -> pathlib.Path:
  """Returns root/split; raises UserError if it does not exist."""
  splits, _ = _list(root)
  if split not in splits:
    raise UserError(
      f"config.data.*_split={split!r} is not a folder of config.data.directory="
      f"{str(root)!r}; it has {', '.join(map(repr, splits))}."
    )
  return root / split


def _part(split: str) -> str | None:
  """Returns "train" or "val", the part of each class `split` means; or None."""
  if split not in _FLAT_SPLITS:
    raise UserError(
      f"config.data.*_split={split!r} is not one of "
      f"{', '.join(map(repr, _FLAT_SPLITS))}, the splits of a folder without "
      "train/ and val/."
    )
  return {"train": "train", "all": None}.get(split, "val")


def _choose(images: Iterable[str], part: str, num_held_out: int) -> list[str]:
  """Returns the "train" or "val" part of a class, sorted by name."""

  def rank(image):
    return hashlib.blake2b(os.fsencode(image), digest_size=8).digest()

  ranked = sorted(images, key=rank)
  held_out, rest = ranked[:num_held_out], ranked[num_held_out:]
  return sorted(rest if part == "train" else held_out)


def _list(folder: pathlib.Path) -> tuple[list[str], list[str]]:
  """Sorted names of the folders, and the images, that are not hidden."""
  _, folders, files = next(storage.walk(folder), (None, [], []))
  folders = sorted(name for name in folders if name[0] != ".")
  return folders, sorted(filter(_is_image, files))


def _class_folders(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Class folders by their names, sorted; {UNLABELLED: folder} without any."""
  names, stray = _list(folder)
  if not names and not stray:
    raise UserError(
      f"config.data.directory: {folder} holds neither class folders nor images "
      f"({', '.join(SUFFIXES)}). Put the images there, or a folder of them for "
      "each class."
    )
  if names and stray:
    logging.warning(
      "%d images lie in %s beside its class folders, and are not used.",
      *(len(stray), folder),
    )
  return {name: folder / name for name in names} or {UNLABELLED: folder}


def _check_same_classes(
  base: pathlib.Path, names: tuple[str, ...], other: pathlib.Path, classes: str
) -> None:
  """Raises UserError unless `other` has the classes `names` of `base`."""
  others, _ = class_lists.select(list(_class_folders(other)), classes)
  differ = sorted(set(names) ^ set(others))
  if differ:
    raise UserError(
      f"config.data.directory: the class folders of {base} and {other} differ "
      f"in {len(differ)}: {', '.join(differ[:5])}. Labels would not agree; "
      "make them the same, or name the common ones in config.data.classes."
    )


def _is_image(name: str) -> bool:
  return name[0] != "." and name.lower().endswith(SUFFIXES)


def _images(folder: pathlib.Path) -> list[str]:
  """Sorted paths, relative to `folder`, of the images in it and below."""
  found = []
  for parent, folders, files in storage.walk(folder):
    folders[:] = [name for name in folders if name[0] != "."]
    where = storage.path(parent).relative_to(folder)
    found.extend(str(where / name) for name in files if _is_image(name))
  if not found:
    raise UserError(
      f"config.data.directory: the class folder {folder} holds no image "
      f"({', '.join(SUFFIXES)}). Put its images there, or remove it."
    )
  return sorted(found)
