"""A folder of checkpoints: which are complete, and how they are deleted.

On a file system Orbax gives a checkpoint its name when it is complete. In a
bucket, where folders cannot be renamed at once, it has its name from the
beginning, and a last file says that it is complete.
"""

import contextlib
import pathlib
import re
import shutil

from umae_jax import storage

_UNFINISHED = ".orbax-checkpoint-tmp"  # On disk; Orbax strips this when done.
_COMPLETE = "commit_success.txt"  # In a bucket; Orbax writes this when done.


def steps(directory: pathlib.Path) -> tuple[int, ...]:
  """The steps that have a checkpoint, good or not, ascending."""
  if storage.is_bucket(directory):
    names = (path.parent.name for path in directory.glob(f"*/{_COMPLETE}"))
  else:
    names = (path.name for path in directory.iterdir() if path.is_dir())
  return tuple(sorted(int(name) for name in names if _is_step(name)))


def remove(path: pathlib.Path) -> None:
  """Deletes a checkpoint; killed in between, it leaves an unfinished one."""
  if not storage.is_bucket(path):
    shutil.rmtree(path)
    return
  (path / _COMPLETE).unlink(missing_ok=True)
  with contextlib.suppress(FileNotFoundError):  # There was nothing else.
    path.rmtree()


def remove_unfinished(directory: pathlib.Path) -> None:
  """Deletes what killed saves have left."""
  if storage.is_bucket(directory):
    _, folders, _ = next(storage.walk(directory), (None, [], []))
    complete = {str(step) for step in steps(directory)}
    left = [x for x in folders if _is_step(x) and x not in complete]
  else:
    left = [path.name for path in directory.glob("*" + _UNFINISHED)]
  for name in left:
    remove(directory / name)


def _is_step(name: str) -> bool:
  return re.fullmatch("0|[1-9][0-9]*", name) is not None
