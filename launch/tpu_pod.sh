#!/usr/bin/env bash
# Trains on a Cloud TPU slice and sees it through: asks for it, waits, installs
# on all workers, runs, follows the log of worker 0; after a preemption asks
# again and resumes; deletes the slice at the end, however it ends.
#
#   PROJECT=my-project WORKDIR=gs://my-bucket/run DATA_DIR=gs://my-bucket/tfds \
#     bash launch/tpu_pod.sh [--dry_run] --config=configs/imagenet1k.py ...
#
# Ctrl-C, SIGTERM, a closed terminal: the run saves, the slice is deleted. The same command goes
# on with a slice that it finds under NAME, so NAME is this run's alone.
# Exit codes: 0 finished, 1 the cloud refused or was out of reach, 2 wrong
# usage, 129 to 143 stopped by a signal, else that of the run.
# shellcheck disable=SC2016,SC2329 # Expanded on the workers; called by a trap.
set -euo pipefail
cd "$(dirname "$0")/.."

PROJECT=${PROJECT:-}                # of Google Cloud
ZONE=${ZONE:-us-east5-b}            # one that has the accelerator
ACCELERATOR=${ACCELERATOR:-v6e-16}  # v4-N, v5litepod-N (v5e), v5p-N, v6e-N
RUNTIME=${RUNTIME:-}                # software of the VMs; empty: see below
SPOT=${SPOT:-1}                     # 1: may be preempted; 0: on demand
NAME=${NAME:-umae}                  # of the slice
WORKDIR=${WORKDIR:-}                # gs://..., outlives the slice
DATA_DIR=${DATA_DIR:-}              # gs://..., config.data.directory
CREATE_FLAGS=${CREATE_FLAGS:-}      # more for gcloud, such as --network=...
LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS:-} # flags of the compiler, for the run
KEEP=${KEEP:-0}                     # 1: delete nothing at the end
POLL=${POLL:-30}                    # seconds between two looks
TRIES=${TRIES:-5}                   # of what may fail for a moment
PREEMPTIONS=${PREEMPTIONS:-100}     # after which to give up

say() { echo "tpu_pod: $*" >&2 || true; }
die() { say "${@:2}"; exit "$1"; }
pause() { sleep "$POLL" & wait $!; } # A signal need not wait for its end.

quote() { # Prints words as a shell reads them back.
  local word line='' escaped="'\\''"
  for word in "$@"; do
    case $word in
      *[!A-Za-z0-9_./:=,@%+-]* | "") line+=" '${word//\'/$escaped}'" ;;
      *) line+=" $word" ;;
    esac
  done
  echo "${line# }"
}

gc() { # group, verb, arguments: gcloud, or how it would be called.
  set -- gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet
  if [ "$dry_run" = 1 ]; then quote "$@"; else "$@"; fi
}

create() {
  local flags=(--node-id="$NAME" --accelerator-type="$ACCELERATOR")
  flags+=(--runtime-version="$RUNTIME")
  [ "$SPOT" = 0 ] || flags+=(--spot)
  # shellcheck disable=SC2086 # Several flags.
  gc queued-resources create "$NAME" "${flags[@]}" $CREATE_FLAGS
}
delete() { gc queued-resources delete "$NAME" --force; }
describe() { gc queued-resources describe "$NAME" --format='value(state.state)'; }
ssh_to() { gc tpu-vm ssh "$NAME" --worker="$1" --command="$2"; }

install() { # What is committed; the VMs' own Python is too old.
  git archive --format=tar.gz --output="$scratch/umae.tar.gz" HEAD &&
  gc tpu-vm scp "$scratch/umae.tar.gz" "$NAME:" --worker=all &&
  ssh_to all 'mkdir -p umae && tar -xzf umae.tar.gz -C umae && cd umae &&
python3 -m pip install --quiet --user uv &&
python3 -m uv venv --quiet --allow-existing --python 3.12 .venv &&
python3 -m uv pip install --quiet --python .venv -e ".[tpu,gcs]"'
}

start() { # The run outlives its ssh, holds none of its pipes, and leaves a code.
  ssh_to all "cd umae && kill -0 \$(cat pid 2> /dev/null) 2> /dev/null && exit
. .venv/bin/activate && rm -f exit_code || exit
(trap \"\" HUP
$command &
echo \$! > pid; wait \$!; echo \$? > exit_code) > log 2>&1 < /dev/null &"
}

follow() { ssh_to 0 "cd umae && tail -n $1 -F --pid=\$(cat pid) log"; }

outcome() { # Of worker 0: an exit code, "running", or "none".
  ssh_to 0 'cd umae 2> /dev/null && [ -s pid ] || { echo none; exit; }
kill -0 $(cat pid) 2> /dev/null && { echo running; exit; }
sleep 1; cat exit_code 2> /dev/null || echo 75' # None: the VM was restarted.
}

stop() { # Asks the run to save, and waits for it.
  ssh_to all 'cd umae && kill -TERM $(cat pid) &&
timeout 120 tail -f --pid=$(cat pid) /dev/null'
}

state() { # In gcloud's words; GONE without a slice, UNKNOWN out of reach.
  local answer
  if answer=$(describe 2>&1); then echo "${answer##*$'\n'}"; return; fi
  case $answer in
    *NOT_FOUND* | *"not found"*) echo GONE ;;
    *) say "$answer"; echo UNKNOWN ;;
  esac
}

attempt() { # Several times, as long as there is a slice.
  local try
  for ((try = 1; try <= TRIES; try++)); do
    if "$@" >&2; then return; fi
    [ "$(state)" = ACTIVE ] || return 1
    say "$1: failed (try $try of $TRIES)."
    [ "$try" = "$TRIES" ] || pause
  done
  die 1 "$1: the workers cannot be reached by ssh; see README.md of launch/."
}

acquire() { # Waits for an active slice; asks for one if there is none.
  local found last='' answer failed=0
  while :; do
    found=$(state)
    [ "$found" = "$last" ] || say "slice $NAME: $found."
    last=$found
    case $found in
      ACTIVE) ours=1; return ;;
      GONE)
        ours=1
        if answer=$(create 2>&1); then say "asked for $ACCELERATOR."; continue; fi
        say "$answer"
        case $answer in
          *[Qq]uota* | *RESOURCE_EXHAUSTED*)
            say "no quota for $ACCELERATOR in $ZONE (spot: $SPOT); ask for it" \
              "at console.cloud.google.com/iam-admin/quotas, or set another" \
              "ZONE, ACCELERATOR or SPOT." ;;
          *UNAVAILABLE* | *INTERNAL* | *ALREADY_EXISTS*) ;;
          *) die 1 "gcloud refuses to create $NAME: see above." ;;
        esac
        failed=$((failed + 1)) ;;
      FAILED | SUSPENDED) delete >&2 || true; failed=$((failed + 1)) ;;
      UNKNOWN) failed=$((failed + 1)) ;;
      *) failed=0 ;; # In the queue.
    esac
    [ "$failed" -lt "$TRIES" ] || die 1 "no slice after $failed tries."
    pause
  done
}

watch() { # Shows the log until the end; sets `code`, GONE without a slice.
  local lost=0 lines=+1
  while :; do
    set -m # A process group of its own, to be ended as a whole.
    follow "$lines" < /dev/null & child=$!
    set +m
    wait "$child" || true
    child=''
    lines=20
    code=$(outcome) || code=
    case $code in
      [0-9]*) return ;;
      running) lost=0 ;;
      *) lost=$((lost + 1)) ;;
    esac
    case $(state) in
      ACTIVE) ;;
      UNKNOWN) lost=$((lost + 1)) ;; # It may well run: nothing is deleted.
      *) code=GONE; return ;;
    esac
    [ "$lost" -lt "$TRIES" ] || die 1 "worker 0 does not answer."
    say "the log was interrupted; looking again."
    pause
  done
}

remove() { # Deletes the slice, and makes sure.
  local try
  for ((try = 1; try <= TRIES; try++)); do
    [ "$(state)" != GONE ] || { say "no slice $NAME is left."; return; }
    delete >&2 || pause
  done
  [ "$(state)" != GONE ] || { say "no slice $NAME is left."; return; }
  say "slice $NAME may still be there, and cost: delete it by"
  (dry_run=1 && delete >&2)
}

finish() { # However it ends.
  local code=$?
  trap '' INT TERM HUP PIPE # Who reads the messages may be gone.
  trap - EXIT
  set +e
  [ -z "$child" ] || kill -- "-$child" 2> /dev/null || true
  if [ "$ours" = 1 ] && [ "$KEEP" != 1 ]; then
    case $code in 129 | 130 | 141 | 143) say "saving..."; stop >&2 || true ;; esac
    remove
  fi
  rm -rf "$scratch"
  exit "$code"
}

dry_run=0
[ "${1:-}" != --dry_run ] || { dry_run=1; shift; }
case $ACCELERATOR in # cloud.google.com/tpu/docs/runtimes
  v4-*) default=tpu-ubuntu2204-base ;;
  v5litepod-*) default=v2-alpha-tpuv5-lite ;;
  v5p-*) default=v2-alpha-tpuv5 ;;
  v6e-*) default=v2-alpha-tpuv6e ;;
  *) die 2 "ACCELERATOR=$ACCELERATOR is none of v4-N, v5litepod-N (v5e)," \
    "v5p-N, v6e-N; TPU7x: gke_jobset.yaml." ;;
esac
RUNTIME=${RUNTIME:-$default}
[ -n "$PROJECT" ] || die 2 "PROJECT is not set: your project of Google Cloud."
[[ $WORKDIR == gs://?* ]] ||
  die 2 "WORKDIR='$WORKDIR' must be gs://BUCKET/FOLDER: disks of VMs are lost."
config=$(printf '%s\n' "$@" | sed -n 's/^--config=\([^:]*\).*/\1/p')
[ -f "$config" ] || die 2 "--config=$config names no file of this repository."

flags=(--multihost --workdir="$WORKDIR")
[ -z "$DATA_DIR" ] || flags+=(--config.data.directory="$DATA_DIR")
command=$(quote python -m umae_jax.main "${flags[@]}" "$@")
[ -z "$LIBTPU_INIT_ARGS" ] ||
  command="LIBTPU_INIT_ARGS=$(quote "$LIBTPU_INIT_ARGS") $command"

if [ "$dry_run" = 1 ]; then
  scratch=/tmp
  git() { quote git "$@"; }
  create; describe; install; start; follow +1; outcome; delete
  exit
fi
command -v gcloud > /dev/null || die 2 "gcloud is missing: cloud.google.com/sdk."
[ -z "$(git status --porcelain)" ] || say "changes not committed stay here."

ours=0 child='' scratch=$(mktemp -d)
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
trap 'exit 141' PIPE
for ((round = 0; round <= PREEMPTIONS; round++)); do
  acquire
  if [ "$(outcome || true)" != running ]; then
    if ! attempt install || ! attempt start; then
      say "preempted before it ran; asking for another slice."
      continue
    fi
  fi
  watch
  case $code in
    0) say "finished."; exit 0 ;;
    2) exit 2 ;;
    75 | GONE) ;;
    *)
      pause # Workers that lost one another fail before the slice is SUSPENDED.
      if [[ $(state) == @(ACTIVE|UNKNOWN) ]]; then
        ssh_to all 'tail -n 20 umae/log' >&2 || true
        die "$code" "the run failed with exit code $code; see above."
      fi ;;
  esac
  say "preempted ($code); asking for another slice, to resume."
  delete >&2 || true
done
die 1 "preempted more than $PREEMPTIONS times; the same command resumes."
