#!/usr/bin/env bash
# What runs on a host that trains. The launcher copies this file there and calls it over ssh; on a
# machine of one's own it is called by hand. Doing anything twice does nothing twice.
#
#   worker.sh setup COMMIT|image SHARE|ready|none WORKDIR
#   worker.sh train NAME WORKDIR gs://FOLDER|none COMMAND...   starts it, or goes on showing it
#   worker.sh loop NAME WORKDIR gs://FOLDER|none COMMAND...    ... and again while it asks for it
#   worker.sh log NAME                                         shows what it says
#   worker.sh stop NAME                                        SIGTERM: it saves and ends
#   worker.sh push WORKDIR gs://FOLDER                         copies the run folder and the logs
set -euo pipefail

readonly RUNS="$HOME/moe_jax_runs"
readonly SOURCE="$HOME/moe_jax_source"
readonly ENVIRONMENT="$HOME/moe_jax_environment"
# sysexits.h, EX_TEMPFAIL: everything is saved, the same command goes on.
readonly AGAIN=75
readonly PUSH_SECONDS=${MOE_JAX_PUSH_SECONDS:-300}
export PATH="$ENVIRONMENT/bin:$HOME/.local/bin:$PATH"

main() {
  local verb=${1:?one of setup, train, loop, log, stop, push}
  shift
  case $verb in
    setup | train | loop | log | stop | push | supervise) "$verb" "$@" ;;
    *)
      echo "worker.sh: $verb is none of setup, train, loop, log, stop, push" >&2
      return 2
      ;;
  esac
}

setup() {
  local commit=$1 share=$2 workdir=$3
  case $share in
    ready | none) ;;
    *) attach_share "$share" "$(dirname "$workdir")" ;;
  esac
  [[ $commit == image ]] || install_commit "$commit"
}

attach_share() {
  local share=$1 folder=$2
  if mountpoint -q "$folder"; then return; fi
  command -v mount.nfs >/dev/null || { sudo apt-get update -q && sudo apt-get install -qy nfs-common; }
  sudo mkdir -p "$folder"
  # NFS 3 keeps the lock of a host that was taken away for ever: the host that replaces it would
  # be told that another process trains there. NFS 4 frees it, and passes over local_lock.
  sudo mount -t nfs -o hard,local_lock=flock "$share" "$folder"
}

# The images of TPU hosts come with an older Python; uv brings its own.
install_commit() {
  local commit=$1
  if [[ $(cat "$ENVIRONMENT/commit" 2>/dev/null) == "$commit" ]]; then return; fi
  mkdir -p "$SOURCE"
  tar -xzf "$HOME/moe_jax_source.tar.gz" -C "$SOURCE"
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  uv venv --quiet --clear --python 3.12 "$ENVIRONMENT"
  uv pip install --quiet --python "$ENVIRONMENT/bin/python" \
    -r "$SOURCE/requirements.lock" -e "${SOURCE}[tpu]"
  # Written last: an install that was interrupted starts over.
  echo "$commit" >"$ENVIRONMENT/commit"
}

train() {
  local name=$1 folder="$RUNS/$1"
  mkdir -p "$folder"
  exec 9>"$folder/lock"
  flock 9
  touch "$folder/log"
  local said
  said=$(wc -l <"$folder/log")
  if ! is_running "$name"; then
    rm -f "$folder/status"
    # A session of its own, so that losing the connection does not end it.
    setsid bash "$0" supervise "$@" </dev/null >>"$folder/log" 2>&1 9>&- &
    echo $! >"$folder/pid"
    # Until its name is that by which others know it, unless it ends before.
    until is_running "$name" || ! kill -0 $! 2>/dev/null; do sleep 0.05; done
  fi
  flock -u 9
  tail -n "+$((said + 1))" --pid="$(cat "$folder/pid")" -F "$folder/log" 2>/dev/null
  # Without a status it did not end by itself.
  return "$(cat "$folder/status" 2>/dev/null || echo 255)"
}

# Runs the command and keeps its status; also when the machine tells all processes to end.
supervise() {
  local name=$1 workdir=$2 bucket=$3 status=0 pusher=
  shift 3
  trap : TERM
  [[ ! -d $SOURCE ]] || cd "$SOURCE"
  if [[ $bucket != none ]]; then
    if ! pull "$workdir" "$bucket"; then
      echo 1 >"$RUNS/$name/status"
      return 1
    fi
    push_regularly "$workdir" "$bucket" &
    pusher=$!
  fi
  "$@" || status=$?
  if [[ -n $pusher ]]; then
    # Signals to all processes of the run have ended it already.
    kill "$pusher" 2>/dev/null || true
    # Two copies at a time would undo each other.
    wait "$pusher" || true
    push "$workdir" "$bucket" || echo "worker.sh: the copy to $bucket failed" >&2
  fi
  echo "$status" >"$RUNS/$name/status"
}

push_regularly() {
  local nap=
  # Comes after a copy that is under way.
  trap 'kill "$nap" 2>/dev/null; exit' TERM
  while true; do
    sleep "$PUSH_SECONDS" &
    nap=$!
    wait "$nap" && { push "$@" || true; }
  done
}

loop() {
  local status=0
  while true; do
    train "$@" && return 0 || status=$?
    ((status == AGAIN)) || return "$status"
  done
}

is_running() {
  local pid
  pid=$(cat "$RUNS/$1/pid" 2>/dev/null) || return 1
  [[ ! -e $RUNS/$1/status ]] && tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -q "supervise $1 "
}

log() {
  tail -n 50 -F "$RUNS/$1/log"
}

stop() {
  if ! is_running "$1"; then return 0; fi
  kill -TERM -- "-$(cat "$RUNS/$1/pid")"
}

# A run folder on the disk of one host is lost with the host; its copy is where the run goes on.
# Half a copy, or none where there is one, would begin the run anew, and then replace the copy.
pull() {
  local workdir=$1 bucket=$2 draft="$1.copying" said
  [[ ! -e $workdir/config.json ]] || return 0
  if ! said=$(gcloud storage ls "$bucket/run/config.json" 2>&1); then
    [[ $said != *"matched no objects"* ]] || return 0
    echo "worker.sh: whether $bucket has the run cannot be told: $said" >&2
    return 1
  fi
  rm -rf "$draft" && mkdir -p "$draft" || return 1
  gcloud storage rsync "$bucket/run" "$draft" --recursive || return 1
  # Of a start that was killed before it had a config.
  rm -f "$workdir/.lock" "$workdir/config.json.tmp"
  [[ ! -d $workdir ]] || rmdir "$workdir" || return 1
  mv -T "$draft" "$workdir"
}

push() {
  local workdir=$1 bucket=$2
  gcloud storage rsync "$RUNS" "$bucket/logs/$(hostname)" --recursive
  [[ -d $workdir ]] || return 0
  gcloud storage rsync "$workdir" "$bucket/run" --exclude='.*orbax-checkpoint-tmp.*,.*\.lock$' \
    --delete-unmatched-destination-objects --recursive
}

main "$@"
