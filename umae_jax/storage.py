"""Paths, local or in a bucket of Google Cloud Storage, through one interface.

A path of a bucket has pathlib's methods, too, those of `etils.epath`. But a
bucket holds whole objects: one is there, complete, or not at all. Nothing can
be appended to it or locked, and a folder is renamed or deleted file by file.
"""

from collections.abc import Callable, Iterator
import importlib.util
import io
import logging
import os
import pathlib
import tempfile
import time
from typing import Any, BinaryIO

from umae_jax import UserError

# Read by the libraries below when they are first used. Without the former,
# etils would load TensorFlow to speak to a bucket; without the latter, gcsfs
# would ask for the kind of the bucket, for which one needs further rights.
os.environ.setdefault("EPATH_USE_TF", "0")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

READ = ("get", "list")
WRITE = (*READ, "create", "delete")
_GCS = "gs://"


def is_bucket(path: str | os.PathLike) -> bool:
  """Whether it lies in a bucket."""
  return os.fspath(path).startswith(_GCS)


def path(name: str | os.PathLike, setting: str = "") -> pathlib.Path:
  """The local path or, of "gs://...", that in the bucket; asks no server.

  Args:
    name: of a file or a directory; a path is given back as it is.
    setting: what it was given as, for the error: "--workdir=".

  Raises:
    UserError: no path of these two kinds, or gcsfs is not installed.
  """
  if not is_bucket(name):
    return local_path(os.fspath(name), setting, "a local path or gs://...")
  if not _bucket(name):
    raise UserError(f"{setting}{name} names no bucket: gs://BUCKET/FOLDER.")
  if importlib.util.find_spec("gcsfs") is None:
    raise UserError(f"{setting}{name} needs: pip install 'umae_jax[gcs]'")
  from etils import epath
  import fsspec

  # It would print a traceback of each attempt; the errors say what is wrong.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  # Other processes, and Orbax, write there as well.
  settings = fsspec.config.conf.setdefault("gs", {})
  settings.setdefault("use_listings_cache", False)
  return epath.Path(name)


def local_path(
  name: str, setting: str = "", wanted: str = "a local path"
) -> pathlib.Path:
  """The same, of what is no address.

  Raises:
    UserError: it is one.
  """
  if "://" in name:
    raise UserError(
      f"{setting}{name} is not {wanted}; mount the bucket (for instance with "
      "gcsfuse) and give its folder, or copy it."
    )
  return pathlib.Path(name)


def check(path: pathlib.Path, setting: str, actions: tuple[str, ...]) -> None:
  """Asks the server whether the bucket of a path may be used; changes nothing.

  Args:
    path: if it is local, nothing is checked.
    setting: what it was given as, for the error: "--workdir=".
    actions: READ or WRITE.

  Raises:
    UserError: no such bucket, no permission, no credentials, no network.
  """
  if not is_bucket(path):
    return
  import fsspec

  bucket = _bucket(path)
  wanted = [f"storage.objects.{x}" for x in actions]
  try:
    found = fsspec.filesystem("gs").call(
      *("GET", "b/{}/iam/testPermissions", bucket),
      permissions=wanted,
      json_out=True,
    )
  except FileNotFoundError as error:
    raise UserError(
      f"{setting}{path}: there is no bucket {bucket!r}, or not for you; check "
      f"its name, or make it: gcloud storage buckets create gs://{bucket}"
    ) from error
  except Exception as error:  # Of many kinds, from several libraries.
    raise UserError(
      f"{setting}{path}: the bucket {bucket!r} cannot be reached ("
      f"{_reason(error)}); check the network, and log in: gcloud auth "
      "application-default login"
    ) from error
  if missing := sorted(set(wanted) - set(found.get("permissions", ()))):
    role = "objectUser" if "create" in actions else "objectViewer"
    raise UserError(
      f"{setting}{path}: no permission in the bucket {bucket!r} for "
      f"{', '.join(missing)}; ask for roles/storage.{role}, or log in as "
      "somebody else: gcloud auth application-default login"
    )


def absolute(path: pathlib.Path) -> pathlib.Path:
  """The same path from the root."""
  return path if is_bucket(path) else path.absolute()


def write_file(path: pathlib.Path, write: Callable[[BinaryIO], Any]) -> None:
  """Writes a file atomically.

  Args:
    path: of the file, which is the old one until the new one is complete.
    write: is called with an open binary file.

  Raises:
    OSError: the file system or the bucket refuses.
  """
  if is_bucket(path):
    buffer = io.BytesIO()
    write(buffer)
    _upload(path, buffer.getvalue())
    return
  temporary = path.with_name(path.name + ".tmp")
  with temporary.open("wb") as file:
    write(file)
  temporary.replace(path)


def walk(path: pathlib.Path) -> Iterator[tuple[str, list[str], list[str]]]:
  """As `os.walk`, with links followed; OSError of what can not be read."""

  def fail(error):
    if not isinstance(error, FileNotFoundError):  # In a bucket, one is empty.
      raise error

  if not is_bucket(path):
    yield from os.walk(path, onerror=fail, followlinks=True)
    return
  for parent, folders, files in path.walk(on_error=fail):
    # etils leaves gs:// out; an object "folder/" is not a file.
    name = _GCS + os.fspath(parent).removeprefix(_GCS)
    yield name, folders, [x for x in files if x]


class Growing:
  """A folder whose files are appended to, as those of a bucket cannot be.

  Attributes:
    local: where to write: the folder itself or, of a bucket's, a temporary one
      whose files `upload` copies to the bucket, whole.
  """

  def __init__(self, folder: pathlib.Path):
    self.local, self._folder, self._last = folder, folder, time.monotonic()
    if is_bucket(folder):
      self._temporary = tempfile.TemporaryDirectory()
      self.local = pathlib.Path(self._temporary.name)

  def upload(self) -> None:
    """Uploads; OSError if the bucket refuses."""
    if self.local is self._folder:
      return
    self._last = time.monotonic()
    for file in self.local.rglob("*"):
      if file.is_file():
        target = self._folder / file.relative_to(self.local)
        _upload(target, file.read_bytes())

  def upload_every(self, seconds: float) -> None:
    """Uploads if so long ago it was tried last; a refusal is only told."""
    if time.monotonic() - self._last >= seconds:
      try:
        self.upload()
      except OSError as error:
        print(f"umae_jax: {error} It is tried again later.", flush=True)

  def close(self) -> None:
    """Uploads, for the last time."""
    try:
      self.upload()
    finally:
      if self.local is not self._folder:
        self._temporary.cleanup()


def unreachable(error: BaseException) -> bool:
  """Whether a bucket could not be asked; it may hold what is wanted."""
  words = ("PERMISSION_DENIED", "UNAUTHENTICATED")
  words += ("UNAVAILABLE", "DEADLINE_EXCEEDED")
  if isinstance(error, FileNotFoundError):
    return False
  clients = type(error).__module__.startswith(
    ("aiohttp", "gcsfs", "google.auth")
  )
  if clients or any(word in str(error) for word in words):
    return True
  cause = error.__cause__ or error.__context__
  return cause is not None and unreachable(cause)


def _bucket(path):
  return os.fspath(path).removeprefix(_GCS).partition("/")[0]


def _upload(path, data):
  try:
    path.write_bytes(data)
  except OSError:
    raise
  except Exception as error:  # Of gcsfs, aiohttp, google.auth.
    raise OSError(f"{path} cannot be written ({_reason(error)}).") from error


def _reason(error):
  return str(error).strip().partition("\n")[0] or type(error).__name__
