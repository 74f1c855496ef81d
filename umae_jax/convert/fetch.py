"""Weights from elsewhere: Hugging Face's hub, or any web address."""

import contextlib
import hashlib
import http.client
import os
import pathlib
import shutil
import sys
import tempfile
import urllib.parse
import urllib.request

from umae_jax import UserError, storage
from umae_jax.convert import files

_TIMEOUT = 60  # Seconds without a byte.


def local(source: str | os.PathLike) -> pathlib.Path:
  """The file or directory that `source` names, downloaded if it is not here.

  Args:
    source: a local path, `hf://owner/name[/file]`, `https://...` or `gs://...`.
      What is downloaded is kept: by huggingface_hub, or in $UMAE_JAX_CACHE
      (~/.cache/umae_jax); its SHA-256 is printed. A run's work directory, or
      an exported model, stays in its bucket.

  Raises:
    UserError: it cannot be had.
  """
  scheme, separator, rest = str(source).partition("://")
  if not separator:
    return pathlib.Path(source).expanduser()
  if scheme == "hf":
    path = _from_hub(str(source), rest)
  elif scheme in ("https", "http"):
    path = _from_web(str(source))
  elif scheme == "gs":
    path = _from_bucket(str(source))
    if storage.is_bucket(path):
      return path
  else:
    raise UserError(
      f"{source}: give a local path, hf://..., https://... or gs://..."
    )
  for file in [path] if path.is_file() else [path / "model.safetensors"]:
    print(f"{source}: sha256 {files.sha256(file)}", file=sys.stderr)
  return path


def _from_hub(source, rest):
  """A file of the hub's, or the folder of a repository's two."""
  owner, _, rest = rest.partition("/")
  name, _, file = rest.partition("/")
  if not owner or not name:
    raise UserError(f"{source}: expected hf://owner/name[/file].")
  try:
    import huggingface_hub
  except ImportError as error:
    raise UserError(f"{source} needs: pip install huggingface_hub") from error
  try:
    paths = [
      huggingface_hub.hf_hub_download(f"{owner}/{name}", x)
      for x in ([file] if file else ["config.json", "model.safetensors"])
    ]
  except Exception as error:  # Of many kinds, from several libraries.
    raise _unavailable(source, error) from error
  return pathlib.Path(paths[0] if file else pathlib.Path(paths[0]).parent)


def _from_web(url):
  """The file of that address, from the cache if it is there."""
  suffix = pathlib.PurePosixPath(urllib.parse.urlsplit(url).path).suffix
  if suffix not in files.KINDS:
    raise UserError(f"{url}: expected the address of one of {files.KINDS}.")
  path = _in_cache(url, suffix)
  if path.exists():
    return path
  try:
    with (
      _new(path) as file,
      urllib.request.urlopen(url, timeout=_TIMEOUT) as response,
    ):
      shutil.copyfileobj(response, file, 2**20)
      promised = response.headers.get("Content-Length")
      if promised and file.tell() != int(promised):
        raise OSError(f"{file.tell()} of {promised} bytes arrived")
  except (OSError, ValueError, http.client.HTTPException) as error:
    raise _unavailable(url, error) from error
  return path


def _from_bucket(url):
  """A file, or the folder of Hugging Face's two, from the cache; else `url`."""
  path = storage.path(url)
  storage.check(path, "", storage.READ)
  if not path.exists():
    raise UserError(f"{url}: its bucket has no such file or folder.")
  wanted = [path]
  if path.is_dir():
    wanted = [path / x for x in ("config.json", "model.safetensors")]
    if not wanted[1].exists():
      return path
  wanted = [file for file in wanted if file.exists()]
  facts = [file.stat() for file in wanted]  # It may be written anew.
  folder = _in_cache(f"{url} {[(x.length, x.mtime) for x in facts]}")
  for file in wanted:
    local = folder / file.name
    if not local.exists():
      with _new(local) as copy, file.open("rb") as original:
        shutil.copyfileobj(original, copy, 2**20)
  return folder if path.is_dir() else local


def _in_cache(key, suffix=""):
  cache = os.environ.get("UMAE_JAX_CACHE") or "~/.cache/umae_jax"
  name = hashlib.sha256(key.encode()).hexdigest()[:32] + suffix
  return pathlib.Path(cache).expanduser() / name


@contextlib.contextmanager
def _new(path):
  """A binary file, which is at `path` when it is complete."""
  path.parent.mkdir(parents=True, exist_ok=True)
  descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
  try:
    with os.fdopen(descriptor, "wb") as file:
      yield file
    pathlib.Path(temporary).rename(path)
  finally:
    with contextlib.suppress(FileNotFoundError):
      pathlib.Path(temporary).unlink()


def _unavailable(source, error):
  reason = str(error).strip().partition("\n")[0] or type(error).__name__
  return UserError(
    f"{source} cannot be downloaded ({reason}); check the address and the "
    "network, or download it elsewhere and give its path."
  )
