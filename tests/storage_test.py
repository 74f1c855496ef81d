"""Buckets, through the real protocol: of a storage server on this machine.

gcsfs and Orbax's TensorStore speak to it as they do to Google's. TensorFlow's
own client of gs:// cannot be pointed elsewhere.
"""

import contextlib
import functools
import gc
import http.server
import json
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
import warnings

import fsspec
from gcp_storage_emulator import server as emulator
from gcp_storage_emulator import storage as emulated
import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
from PIL import Image
import pytest

from umae_jax import (
  UserError,
  checkpoint,
  checkpoint_files,
  convert,
  metrics,
  storage,
  workdir,
)
from umae_jax.data import folder, in_memory

REPOSITORY = pathlib.Path(__file__).parents[1]
REFERENCE = REPOSITORY / "tests" / "reference" / "mae_p8_normpix.safetensors"
HEADS = {"num_heads": 2, "decoder_num_heads": 2}
RUN = [
  "--config=configs/digits.py:smoke",
  "--config.model.depth=1",
  "--config.model.decoder_depth=1",
  "--config.log.every_steps=1",
  "--config.num_epochs=2",
  "--config.evaluation.every_epochs=1",
  "--config.checkpoint.every_steps=7",
]


class Handler(emulator.RequestHandler):
  """The emulator's, that can also refuse, and not hear."""

  def do_POST(self):
    path = urllib.parse.unquote(self.path)
    if self.server.deaf and re.search(self.server.deaf, path):
      self.server.reached.set()
      self.close_connection = True
    elif "/moveTo/" in path:  # Newer than the emulator; there is a way without.
      self.send_error(400)
    else:
      super().do_POST()

  def do_GET(self):
    if "/b/private/" in self.path:
      self.send_error(self.server.refusal)
    elif "/b/readable/iam/" in self.path:
      body = b'{"permissions": ["storage.objects.get", "storage.objects.list"]}'
      self.send_response(200)
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      self.wfile.write(body)
    else:
      super().do_GET()


class Server(http.server.HTTPServer):
  """Loses requests to upload what matches `deaf`, and says so."""

  deaf, refusal = None, 403

  def __init__(self):
    self.storage = emulated.Storage(use_memory_fs=True)
    super().__init__(("localhost", 0), functools.partial(Handler, self.storage))
    self.reached = threading.Event()

  def handle_error(self, request, client_address):
    """Clients that are killed, or have read enough."""

  def names(self, bucket):
    return sorted(self.storage.objects.get(bucket, ()))


def read_data(handler, query, original=emulator._read_data):
  """The emulator's takes uploads for e-mails, and may lose their last byte."""
  kind = handler.headers.get("Content-Type", "")
  if not kind.startswith("multipart/related"):
    return original(handler, query)
  raw = emulator._read_raw_data(handler)
  boundary = re.search(r'boundary="?([^";]+)', kind)[1].encode()
  _, meta, content, _ = raw.split(b"--" + boundary)
  end = b"\r\n" if meta.startswith(b"\r") else b"\n"  # Of a line.
  parts = [x.removesuffix(end).split(2 * end, 1) for x in (meta, content)]
  found = re.search(rb"content-type: *([^\r\n]+)", parts[1][0], re.IGNORECASE)
  return {
    "meta": json.loads(parts[0][1]),
    "content": parts[1][1],
    "content-type": found[1].decode() if found else "application/octet-stream",
  }


@pytest.fixture(scope="module")
def server():
  for name in ("gcp_storage_emulator", "gcsfs"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  with Server() as server, pytest.MonkeyPatch.context() as patch:
    address = f"http://localhost:{server.server_port}"
    patch.setattr(emulator, "_read_data", read_data)
    patch.setenv("STORAGE_EMULATOR_HOST", address)
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
    patch.setenv("NO_GCE_CHECK", "true")
    # What a machine may have configured is not for a test to use.
    patch.setenv("CLOUDSDK_CONFIG", "/nonexistent")
    patch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


@pytest.fixture
def bucket(server, request):
  """gs://... of a new, empty bucket."""
  server.deaf = None
  server.reached.clear()
  name = re.sub("[^a-z]+", "-", request.node.name)[:60].strip("-")
  emulator.buckets.create_bucket(name, server.storage)
  return storage.path(f"gs://{name}")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  cache = tmp_path_factory.mktemp("compiled")

  def start(*flags):
    environment = os.environ | {
      "JAX_NUM_CPU_DEVICES": "1",
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
      [sys.executable, "-m", "umae_jax.main", *map(str, flags)],
      env=environment,
      cwd=REPOSITORY,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return start


def finish(process):
  output, errors = process.communicate(timeout=300)
  return process.returncode, output, errors


def log_of(directory):
  """The log without what is measured by a clock."""
  return [
    {key: x for key, x in record.items() if not key.startswith("time/")}
    for record in metrics.read_log(directory / "metrics.jsonl")
  ]


def last_state(directory):
  step = checkpoint_files.steps(directory / "checkpoints")[-1]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Orbax prefers a template.
    state = ocp.load(directory / "checkpoints" / str(step))
  return step, jax.tree.map(np.asarray, state)


@pytest.mark.slow
def test_killed_and_resumed_in_a_bucket_is_bit_for_bit_uninterrupted(
  server, bucket, start, tmp_path
):
  """SIGKILL when a checkpoint is all there but for the word that it is."""
  code, _, errors = finish(start(*RUN, f"--workdir={tmp_path / 'local'}"))
  assert code == 0, errors
  run, flags = bucket / "run", [*RUN, f"--workdir={bucket / 'run'}"]
  for step in (7, 35):  # Neither 7 nor 28 is one that evaluates.
    server.deaf = f"checkpoints/{step}/commit_success"
    server.reached.clear()
    process = start(*flags)
    assert server.reached.wait(120), finish(process)
    process.kill()
    code, output, errors = finish(process)
    server.deaf = None
    assert code == -signal.SIGKILL, errors
    assert "starting afresh" in output, output
    unfinished = f"run/checkpoints/{step}/_CHECKPOINT_METADATA"
    assert unfinished in server.names(bucket.name)
    assert step not in checkpoint_files.steps(run / "checkpoints")
  code, output, errors = finish(start(*flags))
  assert code == 0, errors
  assert "resuming after step 28" in output
  assert log_of(run) == log_of(tmp_path / "local")
  # Read from a copy, for the emulator leaves out what TensorStore asks for.
  copy = tmp_path / "copy"
  fsspec.filesystem("gs").get(str(run), str(copy), recursive=True)
  step, state = last_state(copy)
  other_step, other_state = last_state(tmp_path / "local")
  assert step == other_step == 42
  jax.tree.map(np.testing.assert_array_equal, state, other_state)
  # The log of the start that had no checkpoint is kept.
  kept = metrics.read_log(run / "metrics.1.jsonl")
  assert [x["step"] for x in kept][:7] == list(range(1, 8))
  here = {x.name for x in run.iterdir()}
  there = {x.name for x in (tmp_path / "local").iterdir()}
  assert here - {"metrics.1.jsonl"} == there - {".lock"}
  assert checkpoint_files.steps(run / "checkpoints") == (35, 42)
  names = server.names(bucket.name)
  assert not [x for x in names if re.search("/checkpoints/(7|14|21|28)/", x)]
  for name in ("reconstructions", "spectrum", "curves"):
    data = (run / f"{name}.png").read_bytes()
    assert data == (tmp_path / "local" / f"{name}.png").read_bytes()
  assert json.loads((run / "summary.json").read_text())["step"] == 42
  assert all(x.stat().length > 0 for x in (run / "tensorboard").iterdir())

  before = {x: server.storage.get_file(bucket.name, x) for x in names}
  code, output, errors = finish(start(*flags))
  assert code == 0 and "is finished" in output, errors
  for name, data in before.items():
    assert server.storage.get_file(bucket.name, name) == data, name

  # The weights of a run in a bucket, and a result that goes there.
  features = [*RUN, "--config.task=features", f"--config.pretrained={run}"]
  code, output, errors = finish(
    start(*features, f"--workdir={bucket / 'features'}")
  )
  assert code == 0, errors
  found = np.load((bucket / "features" / "features.npz").open("rb"))
  assert found["features"].shape == (397, 64)
  _, ours = convert.load_pretrained(tmp_path / "local")
  _, theirs = convert.load_pretrained(str(run))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_log_in_a_bucket_is_uploaded_when_asked(server, bucket):
  run = bucket / "run"
  log = metrics.MetricsLog(run)
  log.write(1, "train", {"loss": 1.0})
  assert server.names(bucket.name) == []
  log.commit()
  log.write(2, "train", {"loss": 0.5})
  assert [x["step"] for x in metrics.read_log(run / "metrics.jsonl")] == [1]
  events = [x for x in server.names(bucket.name) if "/tensorboard/" in x]
  assert len(events) == 1
  log.close()
  assert [x["step"] for x in metrics.read_log(run / "metrics.jsonl")] == [1, 2]


def test_a_log_in_a_bucket_goes_on_where_the_checkpoint_is(bucket):
  with contextlib.closing(metrics.MetricsLog(bucket)) as log:
    for step in (1, 2, 3):
      log.write(step, "train", {"loss": float("nan")})
  with contextlib.closing(metrics.MetricsLog(bucket, resume_step=2)) as log:
    log.write(3, "train", {"loss": 3.0})
  found = metrics.read_log(bucket / "metrics.jsonl")
  assert [str(x["loss"]) for x in found] == ["nan", "nan", "3.0"]
  with contextlib.closing(metrics.MetricsLog(bucket)):
    pass
  assert len(metrics.read_log(bucket / "metrics.1.jsonl")) == 3
  assert metrics.read_log(bucket / "metrics.jsonl") == []


def test_a_log_in_a_bucket_is_uploaded_now_and_then(bucket, monkeypatch):
  with contextlib.closing(metrics.MetricsLog(bucket)) as log:
    log.write(1, "train", {"loss": 1.0})
    monkeypatch.setattr(metrics, "_UPLOAD_SECONDS", 0.0)
    assert not (bucket / "metrics.jsonl").exists()
    log.write(2, "train", {"loss": 1.0})
    assert len(metrics.read_log(bucket / "metrics.jsonl")) == 2


def test_a_log_that_can_not_be_uploaded_now_stops_no_run(
  bucket, monkeypatch, capsys
):
  def refuse(path, data):
    raise OSError(f"{path} cannot be written (503).")

  with contextlib.closing(metrics.MetricsLog(bucket)) as log:
    with monkeypatch.context() as patch:
      patch.setattr(metrics, "_UPLOAD_SECONDS", 0.0)
      patch.setattr(storage, "_upload", refuse)
      log.write(1, "train", {"loss": 1.0})
      assert "(503). It is tried again later." in capsys.readouterr().out
      with pytest.raises(OSError, match="503"):  # A checkpoint waits for it.
        log.commit()
    log.write(2, "train", {"loss": 1.0})
    assert capsys.readouterr().out == ""
  assert len(metrics.read_log(bucket / "metrics.jsonl")) == 2


def test_a_file_in_a_bucket_is_old_or_new(bucket):
  path = bucket / "file"
  storage.write_file(path, lambda file: file.write(b"old"))

  def fail(file):
    file.write(b"ne")
    raise OSError("disk full")

  with pytest.raises(OSError, match="disk full"):
    storage.write_file(path, fail)
  assert path.read_bytes() == b"old"
  assert [x.name for x in bucket.iterdir()] == ["file"]


def test_what_others_put_into_a_bucket_is_seen(server, bucket):
  (bucket / "folder" / "ours").write_text("")
  assert [x.name for x in (bucket / "folder").iterdir()] == ["ours"]
  upload = f"upload/storage/v1/b/{bucket.name}/o?uploadType=media"
  address = f"{os.environ['STORAGE_EMULATOR_HOST']}/{upload}"
  urllib.request.urlopen(f"{address}&name=folder/theirs", b"x").close()
  found = sorted(x.name for x in (bucket / "folder").iterdir())
  assert found == ["ours", "theirs"]


STATE = {"a": jnp.arange(6.0), "b": {"c": jnp.ones((3, 2))}}


def state_of(step):
  return jax.tree.map(lambda x: x + step, STATE)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_in_a_bucket_is_moved_aside(server, bucket):
  place = bucket / "checkpoints"
  with checkpoint.open_checkpoints(place, keep_last=3) as checkpoints:
    for step in (1, 2, 10):
      checkpoints.save(step, state_of(step))
  for file in (x for x in server.names(bucket.name) if "/10/state/" in x):
    if "/d/" in file:
      (bucket / file).write_bytes(b"\0" * 100)
  with checkpoint.open_checkpoints(place, keep_last=3) as checkpoints:
    assert checkpoints.steps == (1, 2, 10)
    step, state = checkpoints.restore_newest(STATE)
    assert step == 2
    np.testing.assert_array_equal(state["a"], STATE["a"] + 2)
    assert checkpoints.steps == (1, 2)
    checkpoints.save(10, STATE)
  assert (place / "10.corrupt" / "commit_success.txt").exists()
  with checkpoint.open_checkpoints(place) as checkpoints:
    assert checkpoints.restore_newest(STATE)[0] == 10
  gc.collect()  # What Orbax has left of damaged files is told here.


def test_a_deletion_cut_short_leaves_no_checkpoint(bucket, monkeypatch):
  """Files go one by one; the one that says it is complete goes first."""
  place = bucket / "checkpoints"
  with checkpoint.open_checkpoints(place) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, STATE)

  def killed(path):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(type(place), "rmtree", killed)
    checkpoint_files.remove(place / "2")
  assert (place / "2" / "_CHECKPOINT_METADATA").exists()
  assert checkpoint_files.steps(place) == (1,)
  with checkpoint.open_checkpoints(place) as checkpoints:
    assert checkpoints.restore_newest(STATE)[0] == 1
    assert not (place / "2").exists()
    checkpoints.save(2, STATE)


def test_weights_in_a_bucket_are_downloaded_once(
  server, bucket, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv("UMAE_JAX_CACHE", str(tmp_path))
  file = bucket / "weights.safetensors"
  file.write_bytes(REFERENCE.read_bytes())
  _, expected = convert.load_pretrained(REFERENCE, **HEADS)
  for _ in range(2):
    _, found = convert.load_pretrained(str(file), **HEADS)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
  (kept,) = (x for x in tmp_path.rglob("*") if x.is_file())
  assert kept.name == "weights.safetensors"
  assert "sha256" in capsys.readouterr().err
  file.write_bytes(b"another")
  with pytest.raises(UserError, match="not a readable safetensors"):
    convert.load_pretrained(str(file))
  with pytest.raises(UserError, match="no such file or folder"):
    convert.load_pretrained(str(bucket / "none.safetensors"))


def test_an_exported_model_in_a_bucket(bucket, tmp_path):
  model, params = convert.load_pretrained(REFERENCE, **HEADS)
  convert.save(tmp_path / "model", model, params)
  fs = fsspec.filesystem("gs")
  fs.put(str(tmp_path / "model"), str(bucket / "model"), recursive=True)
  found_model, found = convert.load_pretrained(str(bucket / "model"))
  assert found_model == model
  jax.tree.map(np.testing.assert_array_equal, found, params)
  with pytest.raises(UserError, match="is not a local path"):
    convert.save(str(bucket / "new"), model, params)


def open_both(local, remote, split):
  arguments = dict(eval_fraction=0.5, classes="")
  return [
    folder.open_folder(str(x), split, **arguments) for x in (local, remote)
  ]


def test_an_image_folder_in_a_bucket(bucket, tmp_path):
  """The same images in the same order as on disk."""
  rng = np.random.default_rng(0)
  for name in ("cat/1", "cat/sub/2", "cat/3", "dog/1", "dog/2", ".x/1"):
    path = tmp_path / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (9, 8, 3), np.uint8)).save(path)
  (tmp_path / "dog" / "notes.txt").write_text("")
  (tmp_path / "dog" / ".hidden.png").write_text("")
  root = bucket / "images"
  for path in (x for x in tmp_path.rglob("*") if x.is_file()):
    (root / path.relative_to(tmp_path)).write_bytes(path.read_bytes())
  names = []
  for split in ("train", "val"):
    ours, theirs = open_both(tmp_path, root, split)
    assert theirs.class_names == ours.class_names == ("cat", "dog")
    np.testing.assert_array_equal(theirs.labels, ours.labels)
    for row in range(ours.num_examples):
      name = os.path.relpath(ours.name_of(row), tmp_path)
      assert theirs.name_of(row) == f"{root}/{name}"
      names.append(name)
    for crops in (True, False):
      ours, theirs = (
        in_memory.MemorySource(x, (4, 4), 3, crops)
        for x in open_both(tmp_path, root, split)
      )
      np.testing.assert_array_equal(theirs.pixels.images, ours.pixels.images)
      assert theirs.pixels.readable.all()
  assert len(names) == 5
  with pytest.raises(UserError, match=r"gs://.*/none' is not a folder"):
    open_both(tmp_path, bucket / "none", "train")


def refuse(path):
  workdir.check(storage.path(path), {"task": "pretrain"})


def test_a_bucket_that_is_absent_is_named(server):
  with pytest.raises(UserError, match=r"gs://none/run: there is no bucket"):
    refuse("gs://none/run")
  assert "none" not in server.storage.buckets  # gcsfs would make it.


@pytest.mark.parametrize("refusal", [401, 403])
def test_a_bucket_of_others_is_refused(server, refusal):
  server.refusal = refusal
  with pytest.raises(UserError, match="application-default login"):
    refuse("gs://private/run")


def test_a_bucket_that_may_only_be_read_is_no_place_for_a_run(server):
  with pytest.raises(UserError) as caught:
    refuse("gs://readable/run")
  assert "storage.objects.create, storage.objects.delete" in str(caught.value)
  assert "roles/storage.objectUser" in str(caught.value)
  storage.check(storage.path("gs://readable/x"), "", storage.READ)


def test_a_bucket_needs_gcsfs(monkeypatch):
  monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'umae_jax\[gcs\]'"):
    storage.path("gs://bucket/run")


@pytest.mark.parametrize("name", ["s3://bucket/run", "gs://", "gs:///run"])
def test_what_is_no_path_is_refused(name):
  with pytest.raises(UserError, match=f"^--workdir={name} "):
    storage.path(name, "--workdir=")


def test_a_run_in_a_bucket_is_refused_like_one_on_disk(bucket):
  config = {"task": "pretrain", "seed": 0}
  workdir.claim(bucket / "run", config)
  workdir.check(bucket / "run", config)
  with pytest.raises(UserError, match="seed: 0 there, 1 now"):
    workdir.check(bucket / "run", config | {"seed": 1})
  workdir.claim(bucket / "run", config | {"seed": 1})
  assert json.loads((bucket / "run/config.1.json").read_text()) == config
  (bucket / "other/checkpoints/1/x").write_text("")
  with pytest.raises(UserError, match="holds checkpoints but no config"):
    workdir.check(bucket / "other", config)


def test_tensorflow_is_not_loaded_for_a_bucket(bucket):
  (bucket / "file").write_text("there")
  program = (
    "import sys\n"
    "from umae_jax import storage\n"
    f"print(storage.path('{bucket}/file').read_text())\n"
    "assert 'tensorflow' not in sys.modules\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", program],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout == "there\n"


@pytest.mark.parametrize("end", [b"", b"\r", b"\n", b"\r\n", b"\r\r", b"--"])
def test_every_byte_arrives(bucket, end):
  """Through the server above, too: the emulator alone loses some."""
  data = np.random.default_rng(0).bytes(4096) + bytes(range(256)) * 2 + end
  fsspec.filesystem("gs").pipe(str(bucket / "file"), data)
  assert (bucket / "file").read_bytes() == data


def test_a_bucket_out_of_reach_is_no_damage(server, bucket, monkeypatch):
  with checkpoint.open_checkpoints(bucket / "checkpoints") as checkpoints:
    checkpoints.save(1, STATE, wait=True)
    checkpoints.save(2, STATE, wait=True)

    def refuse(*unused):
      raise ValueError("PERMISSION_DENIED: Error reading gs://...")

    with monkeypatch.context() as patch:
      patch.setattr(ocp, "load", refuse)
      with pytest.raises(
        OSError, match="cannot be read now: PERMISSION_DENIED"
      ):
        checkpoints.restore_newest(STATE)
    assert checkpoints.steps == (1, 2)
    assert checkpoints.restore_newest(STATE)[0] == 2
