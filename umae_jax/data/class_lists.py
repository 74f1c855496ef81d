"""Which classes of a data set to keep, and their labels afterwards."""

from collections.abc import Sequence
import pathlib

import numpy as np

from umae_jax import UserError

SHIPPED = {"imagenet100": pathlib.Path(__file__).with_name("imagenet100.txt")}


def select(
  available: Sequence[str], classes: str
) -> tuple[tuple[str, ...], np.ndarray]:
  """Keeps the listed classes and numbers them from 0 in sorted order.

  Args:
    available: names of all classes of the data set, in the order of its labels.
    classes: "" keeps all as they are; "imagenet100" is the shipped list; else
      the path of a text file with one class name per line.

  Returns:
    class_names: the names kept, in the order of their new labels.
    new_labels: (len(available),) int32, the new label of each old one; -1 for
      a class that is dropped.

  Raises:
    UserError: no such list, an empty one, or a name that is not available.
  """
  if not classes:
    return tuple(available), np.arange(len(available), dtype=np.int32)
  wanted = _read(classes)
  unknown = [name for name in wanted if name not in set(available)]
  if unknown:
    raise UserError(
      f"config.data.classes={classes!r} names {len(unknown)} classes that the "
      f"data set does not have: {', '.join(unknown[:5])}. It has "
      f"{len(available)}: {', '.join(list(available)[:5])}, ... Use names of "
      "the data set, one a line."
    )
  new_label = {name: label for label, name in enumerate(wanted)}
  labels = [new_label.get(name, -1) for name in available]
  return wanted, np.array(labels, np.int32)


def _read(classes: str) -> tuple[str, ...]:
  """Returns the sorted, distinct names of a class list."""
  path = SHIPPED.get(classes, pathlib.Path(classes))
  try:
    lines = path.read_text().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(
      f"config.data.classes={classes!r} can not be read ({error}). Give '' for "
      f"all classes, {' or '.join(map(repr, SHIPPED))}, or the path of a text "
      "file with one class name per line."
    ) from error
  names = tuple(sorted({line.strip() for line in lines} - {""}))
  if not names:
    raise UserError(
      f"config.data.classes={classes!r} names no class; write one a line, or "
      "give '' for all classes."
    )
  return names
