#!/usr/bin/env python3
"""Stands in for gcloud: slices and workers are files under $FAKE_CLOUD.

  calls     a line per call: its words, as JSON
  faults    {name: times}: of quota, refused, ssh, follow (ssh of the log),
            outcome (that of the exit code), describe, delete, and install
            (the slice vanishes)
  slice     the state of the one slice there is, while it exists
  vanish    "N TEXT": once, N times TEXT in worker 0's log end the slice
  worker0/  the home of a worker, where commands given to ssh really run

A slice becomes active over three looks. A slice that is gone or suspended has
no workers, and what ran on them is killed.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

CLOUD = pathlib.Path(os.environ["FAKE_CLOUD"])
SLICE, FAULTS = CLOUD / "slice", CLOUD / "faults"
NEXT = {
  "WAITING_FOR_RESOURCES": "PROVISIONING",
  "PROVISIONING": "ACTIVE",
}
WORKERS = int(os.environ.get("FAKE_WORKERS", "2"))
HOMES = [CLOUD / f"worker{index}" for index in range(WORKERS)]


def main(words):
  with (CLOUD / "calls").open("a") as file:
    file.write(json.dumps(words) + "\n")
  assert words[:2] == ["compute", "tpus"], words
  assert {"--project=p", "--zone=z", "--quiet"} <= set(words), words
  flags = dict(x[2:].split("=", 1) for x in words if x[:2] == "--" and "=" in x)
  return VERBS[tuple(words[2:4])](words[4:], flags)


def create(words, flags):
  if fault("quota"):
    return refuse("RESOURCE_EXHAUSTED: Quota limit 'TPUV6E' has been exceeded.")
  if fault("refused"):
    return refuse("PERMISSION_DENIED: Permission 'tpu.create' denied.")
  if SLICE.exists():
    return refuse("ALREADY_EXISTS: Resource already exists.")
  assert flags.keys() >= {"node-id", "accelerator-type", "runtime-version"}
  SLICE.write_text("WAITING_FOR_RESOURCES")
  for home in HOMES:
    home.mkdir()
  return 0


def describe(words, flags):
  runs = (CLOUD / "runs").exists()
  if fault("describe") or (runs and fault("describe_running")):
    return refuse("UNAVAILABLE: no answer.")
  if not SLICE.exists():
    return refuse("NOT_FOUND: Resource 'queuedResources/umae' was not found.")
  state = SLICE.read_text()
  print(state)
  SLICE.write_text(NEXT.get(state, state))
  return 0


def delete(words, flags):
  assert "--force" in words
  if fault("delete"):
    return refuse("INTERNAL: an internal error has occurred.")
  if not SLICE.exists():
    return refuse("NOT_FOUND: Resource 'queuedResources/umae' was not found.")
  vanish()
  SLICE.unlink()
  return 0


def scp(words, flags):
  if fault("install"):
    vanish()
  if unreachable():
    return 255
  assert words[1] == "umae:" and "--worker=all" in words, words
  for home in HOMES:
    shutil.copy(words[0], home)
  return 0


def ssh(words, flags):
  asks = "echo running" in flags["command"]
  if unreachable() or (asks and fault("outcome")):
    return 255
  told_to_stop = []
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *unused: told_to_stop.append(True))
  everywhere = flags["worker"] == "all"
  chosen = range(WORKERS) if everywhere else [int(flags["worker"])]
  lost = " log" in flags["command"] and not everywhere and fault("follow")
  running = [
    subprocess.Popen(
      ["bash", "-c", flags["command"]],
      cwd=HOMES[index],
      env=worker_environment(index),
      stdin=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      start_new_session=True,
    )
    for index in chosen
  ]
  # Like ssh, which ends when nobody has the other end of its pipes any more.
  pipes = [threading.Thread(target=show, args=(x.stderr,)) for x in running]
  for pipe in pipes:
    pipe.start()
  while any(pipe.is_alive() for pipe in pipes):
    time.sleep(0.02)
    if not everywhere:
      end_slice_if_due()
    if lost or told_to_stop or not active():
      break
  else:
    return max(process.wait() for process in running)
  for process in running:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
  print("Connection to worker closed by remote host.", file=sys.stderr)
  return 255


VERBS = {
  ("queued-resources", "create"): create,
  ("queued-resources", "describe"): describe,
  ("queued-resources", "delete"): delete,
  ("tpu-vm", "scp"): scp,
  ("tpu-vm", "ssh"): ssh,
}


def show(pipe):
  for line in pipe:
    sys.stderr.buffer.write(line)
    sys.stderr.buffer.flush()


def worker_environment(index):
  """Of a worker: a home, its programs, and the peers, as metadata has them."""
  return os.environ | {
    "HOME": str(HOMES[index]),
    "PATH": f"{CLOUD / 'worker_bin'}:{os.environ['PATH']}",
    "JAX_COORDINATOR_ADDRESS": os.environ.get("FAKE_COORDINATOR", ""),
    "JAX_NUM_PROCESSES": str(WORKERS),
    "JAX_PROCESS_ID": str(index),
  }


def fault(name):
  """Whether this fault is due; it then is one time less."""
  faults = json.loads(FAULTS.read_text()) if FAULTS.exists() else {}
  if not faults.get(name):
    return False
  new = CLOUD / f"faults.{os.getpid()}"  # Calls may be under way at once.
  new.write_text(json.dumps(faults | {name: faults[name] - 1}))
  new.replace(FAULTS)
  return True


def active():
  return SLICE.exists() and SLICE.read_text() == "ACTIVE"


def unreachable():
  if active() and not fault("ssh"):
    return False
  print("ssh: connect to host: Connection timed out", file=sys.stderr)
  return True


def end_slice_if_due():
  """Preempts the slice, at a line of worker 0's log."""
  order, log = CLOUD / "vanish", HOMES[0] / "umae" / "log"
  if not (order.exists() and log.exists()):
    return
  times, text = order.read_text().split(" ", 1)
  if log.read_text().count(text) >= int(times):
    order.unlink()
    vanish()
    SLICE.write_text("SUSPENDED")


def vanish():
  """Kills what the workers run, and wipes their disks."""
  for home in HOMES:
    file = home / "umae" / "pid"
    if file.exists() and file.read_text().strip():
      with contextlib.suppress(ProcessLookupError):
        os.kill(int(file.read_text()), signal.SIGKILL)
    for _ in range(100):  # Its shell may still write the exit code.
      shutil.rmtree(home, ignore_errors=True)
      if not home.exists():
        break
      time.sleep(0.02)
  if SLICE.exists():
    SLICE.write_text("SUSPENDED")


def refuse(message):
  print(f"ERROR: (gcloud.compute.tpus) {message}", file=sys.stderr)
  return 1


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
