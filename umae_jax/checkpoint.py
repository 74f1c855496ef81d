"""Saving and restoring the training state. The only module with Orbax.

`<directory>/<step>/` is one checkpoint as Orbax writes it. Its metadata carry
a manifest: dtype, shape and checksum of every leaf of the state. Orbax notices
most damage; the checksums notice the rest (a flipped bit, a lost chunk, which
it reads as zeros).
"""

from collections.abc import Callable, Iterator
import contextlib
import os
import pathlib
from typing import Any

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np
from orbax.checkpoint import v1 as ocp

from umae_jax import UserError, checkpoint_files, integrity, storage

_MANIFEST = "umae_jax"  # Key in the custom metadata of a checkpoint.


@contextlib.contextmanager
def open_checkpoints(
  directory: str | os.PathLike,
  keep_last: int = 2,
  keep_every: int | None = None,
) -> Iterator["Checkpoints"]:
  """Opens a folder of checkpoints; leaving the context waits for the saves.

  All processes of a run call this and every method together, on a file system
  that they share.

  Args:
    directory: made if absent. What a killed save left in it is removed.
    keep_last: so many of the newest checkpoints are kept, 1 or more. Older
      ones are deleted once a newer one is complete.
    keep_every: multiples of this step are kept besides, for good; None: none.

  Yields:
    The `Checkpoints`.
  """
  directory = storage.absolute(storage.path(directory))
  directory.mkdir(parents=True, exist_ok=True)
  if jax.process_index() == 0:
    checkpoint_files.remove_unfinished(directory)
  checkpoints = Checkpoints(directory, keep_last, keep_every)
  try:
    yield checkpoints
  finally:
    checkpoints.wait()


class Checkpoints:
  """The checkpoints of one run; made by `open_checkpoints`."""

  def __init__(self, directory, keep_last, keep_every):
    self._directory: pathlib.Path = directory
    self._keep_last: int = keep_last
    self._keep_every: int | None = keep_every
    self._pending: ocp.AsyncResponse | None = None

  @property
  def steps(self) -> tuple[int, ...]:
    """The steps that have a checkpoint on disk, good or not, ascending."""
    return checkpoint_files.steps(self._directory)

  def wait(self) -> None:
    """Waits for the save in the background, then deletes what is too old.

    Raises:
      Exception: whatever ended that save; for instance OSError, disk full.
    """
    pending, self._pending = self._pending, None
    if pending is None:
      return
    pending.result()
    if jax.process_index() == 0:
      for step in self.steps[: -self._keep_last]:
        if self._keep_every is None or step % self._keep_every:
          checkpoint_files.remove(self._path(step))

  def save(self, step: int, state: Any, wait: bool = False) -> None:
    """Saves `state`, atomically; the writing goes on in the background.

    Args:
      step: its name, not negative.
      state: PyTree of `jax.Array`s. On return, they may be donated.
      wait: return only when the checkpoint is complete on disk. Otherwise what
        `wait` raises is raised by the next save, or on leaving the context.

    Raises:
      FileExistsError: the step is saved already.
    """
    self.wait()
    if self._path(step).exists():
      raise FileExistsError(f"There is already a {self._path(step)}.")
    seal = {_MANIFEST: integrity.manifest(state)}
    self._pending = ocp.save_async(
      self._path(step), state, custom_metadata=seal
    )
    if wait:
      self.wait()

  def restore_newest(self, template: Any) -> tuple[int, Any] | None:
    """Restores the newest good checkpoint.

    Damaged ones above it are reported and renamed `<step>.corrupt`, so that
    the run can save those steps anew and nothing is lost.

    Args:
      template: PyTree of `jax.Array`s or `jax.ShapeDtypeStruct`s with
        `sharding`: the state's structure, and where its leaves shall live. Any
        mesh will do, not only the one that was saved from.

    Returns:
      (step, state), or None if there is no checkpoint.

    Raises:
      UserError: the newest readable checkpoint is of another state than
        `template`, or none is good; nothing is renamed then.
    """
    self.wait()
    # So that all processes see the same steps.
    multihost_utils.sync_global_devices("waited")
    self._refuse_separate_folders()
    damaged = {}
    for step in reversed(self.steps):
      state, wrong = self._read(step, template)
      if not wrong:
        self._move_aside(damaged)
        return step, state
      damaged[step] = wrong
    if not damaged:
      return None
    raise UserError(
      f"None of the checkpoints in {self._directory} is readable (by step: "
      f"{damaged}). Restore the folder from a copy, or start afresh with "
      "another --workdir. Nothing has been changed."
    )

  def _path(self, step: int) -> pathlib.Path:
    return self._directory / str(step)

  def _read(self, step: int, template: Any) -> tuple[Any, str]:
    """Returns (state, ""), or (None, what is wrong); every process the same."""
    leaves, wrong = _attempt(lambda: _read_manifest(self._path(step)))
    if wrong:
      return None, wrong
    self._refuse_foreign(step, integrity.describe(template), leaves)
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      template,
    )
    state, wrong = _attempt(lambda: ocp.load(self._path(step), abstract))
    if wrong:
      return None, wrong
    found = integrity.fingerprint(state)
    bad = [key for key in leaves if leaves[key] != found[key]]
    if bad:
      return None, f"wrong checksums: {', '.join(bad[:5])}"
    return state, ""

  def _refuse_separate_folders(self) -> None:
    """Raises UserError unless all processes see the same checkpoints."""
    if jax.process_count() == 1:
      return
    seen = np.array([len(self.steps), max(self.steps, default=-1)])
    if np.ptp(multihost_utils.process_allgather(seen), axis=0).any():
      raise UserError(
        f"The processes see different checkpoints in {self._directory}; "
        "--workdir must be on a file system that all of them share."
      )

  def _refuse_foreign(self, step: int, ours: dict, leaves: dict) -> None:
    """Raises UserError if the checkpoint is of another state than ours."""
    theirs, show = {k: x[:2] for k, x in leaves.items()}, integrity.show
    differing = [
      f"{key}: {show(ours.get(key))} here, {show(theirs.get(key))} there"
      for key in ours | theirs
      if ours.get(key) != theirs.get(key)
    ]
    if differing:
      raise UserError(
        f"The checkpoint {self._path(step)} is of another model or optimizer "
        f"than this config's; {len(differing)} leaves differ: "
        f"{'; '.join(differing[:5])}. Use another --workdir, or the config it "
        "was made with."
      )

  def _move_aside(self, damaged: dict[int, str]) -> None:
    """Renames `<step>` to `<step>.corrupt`, which `steps` does not list."""
    for step, wrong in damaged.items() if jax.process_index() == 0 else ():
      target = self._directory / f"{step}.corrupt"
      while target.exists():
        target = target.with_name(target.name + "_")
      self._path(step).rename(target)
      logging.warning(
        "Damaged checkpoint %s (%s); it is now %s, and an older one is used.",
        *(self._path(step), wrong, target.name),
      )
    multihost_utils.sync_global_devices("moved")


def save_params(path: pathlib.Path, params: Any, model: dict) -> None:
  """Writes parameters alone, atomically, with their checksums.

  Args:
    path: becomes a directory; its parent is made if absent.
    params: nested dict of arrays.
    model: given back by `load_params`; values of JSON's.

  Raises:
    ValueError: there is something at `path`.
  """
  state = {"params": params}
  metadata = {_MANIFEST: integrity.manifest(state), "model": model}
  metadata["model_crc32"] = integrity.crc32(model)
  ocp.save(path.absolute(), state, custom_metadata=metadata)


def load_params(path: pathlib.Path) -> tuple[dict, dict | None]:
  """Reads only the parameters of a run's newest good checkpoint, or exported.

  Changes nothing on disk.

  Args:
    path: a work directory (with "checkpoints"), or what `save_params` wrote.

  Returns:
    (params, model): NumPy arrays, and `save_params`'s; None of a run.

  Raises:
    UserError: none there, or damaged.
  """
  folder = (path := storage.absolute(path)) / "checkpoints"
  exported = not folder.is_dir()
  steps = () if exported else Checkpoints(folder, 1, None).steps
  damaged = {}
  for place in [path] if exported else [folder / str(x) for x in steps[::-1]]:
    found, wrong = _attempt(lambda place=place: _load_params(place, exported))
    if not wrong:
      return found
    logging.warning("Damaged checkpoint %s (%s).", place, wrong)
    damaged[place.name] = wrong
  raise UserError(
    f"{path} has no readable checkpoint ({damaged or 'none at all'}); restore "
    "it from a copy, or name another. Nothing has been changed."
  )


def _load_params(path, exported):
  """(params, model) of one checkpoint; any exception if it is damaged."""
  leaves = _read_manifest(path)
  metadata = ocp.metadata(path)
  custom, template = metadata.custom_metadata, metadata.metadata
  model = custom.get("model")
  if exported and custom["model_crc32"] != integrity.crc32(model):
    raise ValueError("its metadata are damaged")
  abstract = jax.tree.map(lambda _: ocp.PLACEHOLDER, template)
  as_numpy = lambda x: np.empty(x.shape, x.dtype)  # noqa: E731
  abstract["params"] = jax.tree.map(as_numpy, template["params"])
  params = ocp.load(path, abstract)["params"]
  kept = {k: x for k, x in leaves.items() if k.startswith("params/")}
  if integrity.fingerprint({"params": params}) != kept:
    raise ValueError("wrong checksums")
  return params, model


def _read_manifest(path: pathlib.Path) -> dict[str, list]:
  """Returns {key of leaf: [shape, dtype, checksum]} in order of the state."""
  metadata = ocp.metadata(path)
  if metadata.metadata is None:  # Orbax has logged the reason.
    raise ValueError("its tree of arrays is unreadable")
  return integrity.verified(metadata.custom_metadata.get(_MANIFEST))


def _attempt(read: Callable[[], Any]) -> tuple[Any, str]:
  """Returns (result, ""), or (None, why not) if it fails on any process."""
  try:
    result, wrong = read(), ""
  except (MemoryError, jax.errors.JaxRuntimeError):
    raise  # The machine's trouble, not the file's.
  except Exception as error:  # Damage shows in many ways: ValueError, KeyError.
    if storage.unreachable(error):  # Nothing is damaged.
      raise OSError(f"A checkpoint cannot be read now: {error}") from error
    message = str(error).strip().partition("\n")[0]
    result, wrong = None, f"{type(error).__name__}: {message[:300]}"
  if jax.process_count() > 1:
    failed = multihost_utils.process_allgather(np.array(bool(wrong)))
    if failed.any() and not wrong:
      result, wrong = None, "unreadable to another process"
  return result, wrong
