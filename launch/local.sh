#!/usr/bin/env bash
# Trains in several processes on this machine: CPUs, or one GPU each.
#
#   PROCESSES=2 bash launch/local.sh [--dry_run] \
#     --config=configs/digits.py --workdir=runs/digits_two
#   PLATFORM=gpu PROCESSES=8 bash launch/local.sh --config=... --workdir=...
#
# Process 0 is shown, the others write to LOGS. Ctrl-C and SIGTERM go on to all
# of them: they save. If one fails, the others are ended. Exit codes: 0 all
# finished, 75 all saved and the same command resumes, else the first failure's.
# shellcheck disable=SC2329 # Called by a trap.
set -euo pipefail
cd "$(dirname "$0")/.."

PROCESSES=${PROCESSES:-2}
PLATFORM=${PLATFORM:-cpu}                    # cpu, or gpu: GPUs 0, 1, 2, ...
PORT=${PORT:-}                               # empty: a free one
LOGS=${LOGS:-}                               # folder of process_1.log, ...
GRACE=${GRACE:-10}                           # seconds to end after a failure

say() { echo "local: $*" >&2; }

dry_run=0
[ "${1:-}" != --dry_run ] || { dry_run=1; shift; }
case $PLATFORM in
  cpu) platform=cpu ;;
  gpu) platform=cuda,cpu ;;
  *) say "PLATFORM=$PLATFORM is neither cpu nor gpu."; exit 2 ;;
esac
case $PROCESSES in
  *[!0-9]* | 0* | '') say "PROCESSES=$PROCESSES is no number above 0."; exit 2 ;;
esac
[ -n "$PORT" ] || PORT=$(python -c 'import socket
s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')

run() { # index, flags: one process, or how it would be started.
  local index=$1
  shift
  set -- JAX_PLATFORMS="$platform" JAX_COORDINATOR_ADDRESS="localhost:$PORT" \
    JAX_NUM_PROCESSES="$PROCESSES" JAX_PROCESS_ID="$index" \
    python -m umae_jax.main --multihost "$@"
  [ "$PLATFORM" = cpu ] || set -- CUDA_VISIBLE_DEVICES="$index" "$@"
  if [ "$dry_run" = 1 ]; then printf '%q ' env "$@" && echo; else exec env "$@"; fi
}

if [ "$dry_run" = 1 ]; then
  for ((i = 0; i < PROCESSES; i++)); do run "$i" "$@"; done
  exit
fi

signal_all() { # Those that still run.
  local i
  for ((i = 0; i < ${#pids[@]}; i++)); do
    [ -n "${codes[i]:-}" ] || kill "-$1" "${pids[i]}" 2> /dev/null || true
  done
}
stop() { say "stopping: the run saves."; signal_all TERM; }

named=$LOGS # Is kept; one of our own only after a failure.
LOGS=${LOGS:-$(mktemp -d)}
mkdir -p "$LOGS"
pids=() codes=()
trap stop INT TERM
trap 'signal_all KILL' EXIT
for ((i = 0; i < PROCESSES; i++)); do # Background jobs ignore Ctrl-C itself.
  if [ "$i" = 0 ]; then
    run 0 "$@" &
  else
    run "$i" "$@" > "$LOGS/process_$i.log" 2>&1 &
  fi
  pids+=($!)
done

code=0 left=$PROCESSES deadline=''
while [ "$left" -gt 0 ]; do
  for ((i = 0; i < PROCESSES; i++)); do
    [ -z "${codes[i]:-}" ] || continue
    ! kill -0 "${pids[i]}" 2> /dev/null || continue
    codes[i]=0
    wait "${pids[i]}" || codes[i]=$?
    left=$((left - 1))
    case ${codes[i]} in
      0) ;;
      75) [ "$code" != 0 ] || code=75 ;;
      *)
        say "process $i ended with ${codes[i]}."
        [ "$i" = 0 ] || tail -n 20 "$LOGS/process_$i.log" >&2
        case $code in 0 | 75) code=${codes[i]} ;; esac
        deadline=${deadline:-$((SECONDS + GRACE))} ;;
    esac
  done
  # Without one of them the others cannot even save.
  [ -z "$deadline" ] || [ "$SECONDS" -lt "$deadline" ] || signal_all KILL
  sleep 0.1 & wait $! || true
done
trap - EXIT
case $code$named in
  0 | 75) rm -rf "$LOGS" ;;
  *) say "logs are in $LOGS." ;;
esac
exit "$code"
