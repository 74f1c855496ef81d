"""The work directory: whose it is, and whether this run may go on in it."""

from collections.abc import Iterator, Sequence
import contextlib
import fcntl
import json
import os
import pathlib
from typing import Any

from umae_jax import UserError, storage

CONFIG = "config.json"
SUMMARY = "summary.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"


def check(
  path: pathlib.Path,
  config: dict[str, Any],
  *,
  free_keys: Sequence[str] = (),
  allow_change: bool = False,
) -> None:
  """Refuses a work directory in which this run cannot start or resume.

  Writes nothing.

  Args:
    path: the directory; it need not exist yet.
    config: the run's configuration, {"a.b": value}, of JSON's values.
    free_keys: prefixes of keys that may differ from the run found there.
    allow_change: resume although other keys differ, too.

  Raises:
    UserError: not a directory, not writable, not a run's, or another run's.
  """
  if storage.is_bucket(path):
    storage.check(path, "--workdir=", storage.WRITE)
  else:
    _check_writable(path)
  if not (path / CONFIG).exists():
    found = [x for x in (METRICS, SUMMARY) if (path / x).exists()]
    if (path / CHECKPOINTS).is_file() or any((path / CHECKPOINTS).glob("*")):
      found.append(CHECKPOINTS)
    if found:
      raise UserError(
        f"--workdir={path} holds {', '.join(found)} but no {CONFIG}, so it is "
        "not known what made them; use another --workdir."
      )
    return
  changes = changed(path, config, free_keys)
  if any(change.startswith("  config.task:") for change in changes):
    raise UserError(
      f"--workdir={path} holds a run of another task; use another --workdir.\n"
      + "\n".join(changes)
    )
  if changes and not allow_change:
    raise UserError(
      f"--workdir={path} holds a run of another configuration:\n"
      + "\n".join(changes)
      + "\nUse another --workdir, or set these back; --allow_config_change "
      "resumes that run with the new values."
    )


def changed(
  path: pathlib.Path, config: dict[str, Any], free_keys: Sequence[str]
) -> list[str]:
  """The keys that differ from the run in a directory, in words.

  Arguments as those of `check`; there is a run.
  """
  old = _read_config(path / CONFIG)
  return [
    f"  config.{key}: {old.get(key)!r} there, {config.get(key)!r} now"
    for key in sorted(old.keys() | config.keys())
    if old.get(key) != config.get(key) and not key.startswith(tuple(free_keys))
  ]


def recorded(path: pathlib.Path, key: str) -> Any:
  """A key of the configuration in a directory; None if there is none.

  Raises:
    UserError: the bucket can not be used.
  """
  storage.check(path, "--workdir=", storage.WRITE)
  file = path / CONFIG
  return _read_config(file).get(key) if file.exists() else None


def claim(path: pathlib.Path, config: dict[str, Any]) -> None:
  """Makes the directory and writes the configuration into it.

  A different one found there is kept as config.1.json, config.2.json, ...

  Raises:
    UserError: the file system refuses.
  """
  file = path / CONFIG
  try:
    path.mkdir(parents=True, exist_ok=True)
    if file.exists():
      if _read_config(file) == config:
        return
      number = 1
      while (backup := path / f"config.{number}.json").exists():
        number += 1
      data = file.read_bytes()
      storage.write_file(backup, lambda copy: copy.write(data))
    write_json(file, config)
  except OSError as error:
    raise _refused(path, error) from error


@contextlib.contextmanager
def lock(path: pathlib.Path) -> Iterator[None]:
  """Holds the directory for this process; another one is refused meanwhile.

  A bucket has no locks: there, it is the user who starts a run only once.

  Raises:
    UserError: a process that still runs holds it, or it cannot be written.
  """
  if storage.is_bucket(path):
    yield
    return
  try:
    path.mkdir(parents=True, exist_ok=True)
    file = (path / LOCK).open("w")
  except OSError as error:
    raise _refused(path, error) from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(
        f"--workdir={path} is in use by another process; wait for it, or use "
        "another --workdir."
      ) from error
    except OSError:
      pass  # A file system without locks.
    yield


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON atomically: the file is the old one or the new one."""
  text = json.dumps(value, indent=2) + "\n"
  storage.write_file(path, lambda file: file.write(text.encode()))


def _check_writable(path):
  """The path, or the nearest parent that exists, is a writable directory."""
  nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
  if not nearest.is_dir():
    raise UserError(f"--workdir={path}: {nearest} is a file; name a directory.")
  if not os.access(nearest, os.W_OK | os.X_OK):
    raise UserError(
      f"--workdir={path}: no permission to write in {nearest}; choose a "
      "directory of your own."
    )


def _refused(path, error):
  return UserError(
    f"--workdir={path} cannot be written ({error.strerror or error}); choose "
    "another."
  )


def _read_config(file):
  try:
    config = json.loads(file.read_text())
    assert isinstance(config, dict)
    assert "task" in config
  except (ValueError, AssertionError, OSError) as error:
    raise UserError(
      f"{file} is not a configuration of umae_jax; use another --workdir."
    ) from error
  return config
