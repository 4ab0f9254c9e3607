#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
# What a new user does with a fresh clone, with nothing from here but the committed files: boot, ask the TPM, stop, boot
# again without a network, find the same TPM. Run by root it does the same as an ordinary user with the system's Python.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d /tmp/svsm-first-boot.XXXXXX)
chmod 755 "$work"
started=()
end() {
  for process in ${started[@]+"${started[@]}"}; do kill "$process" 2>/dev/null || true; done
  rm -rf "$work"
}
trap end EXIT
fail() {
  printf 'FAILED: %s\n' "$1" >&2
  for log in "$work"/*.log; do printf -- '--- %s\n' "$log" >&2; tail -n 40 "$log" >&2; done
  exit 1
}

# field NAME FILE: one member of the `ready` event.
field() {
  python3 -c 'import json, sys
for line in open(sys.argv[2]):
    event = json.loads(line)
    if event.get("event") == "ready":
        print(event[sys.argv[1]])' "$1" "$2"
}

# boot_once LOG COMMAND...: boots, waits for ready, asks the TPM, stops, and leaves the events in LOG.
boot_once() {
  local log=$1 process
  shift
  "$@" ./run boot --json --state "$state" </dev/null >"$log" 2>"$log.err.log" &
  process=$!
  started+=("$process")
  for _ in $(seq 900); do
    grep -q '"event": "ready"' "$log" && break
    kill -0 "$process" 2>/dev/null || fail "svsm boot ended by itself"
    sleep 0.1
  done
  grep -q '"event": "ready"' "$log" || fail "svsm boot was not ready in 90 s"
  tpm2_getrandom -T "$(field tcti "$log")" --hex 8 >"$work/random.log" 2>&1 || fail "tpm2_getrandom"
  [ "$(tr -d '\n' <"$work/random.log" | wc -c)" -eq 16 ] || fail "tpm2_getrandom printed no 8 bytes"
  "${as[@]}" ./run svsm status --state "$state" >"$work/status.log" 2>&1 || fail "svsm status"
  grep -q 'ready' "$work/status.log" || fail "svsm status does not say ready"
  "${as[@]}" ./run svsm stop --state "$state" >"$work/stop.log" 2>&1 || fail "svsm stop"
  wait "$process" || fail "svsm boot ended with $? after stop"
}

# first_boot NAME: both boots of one user, in a clone of their own.
first_boot() {
  local name=$1 first second
  printf '%s, %s\n' "$name" "$("${as[@]}" "$SVSM_PYTHON" --version)"
  cd "$work"
  git clone -q --no-hardlinks "$here" "$work/$name"
  if [ "$name" = ordinary-user ]; then chown -R nobody "$work/$name"; fi
  cd "$work/$name"
  export HOME=$work/$name
  state=$work/$name/state
  boot_once "$work/$name-first.log" "${as[@]}"
  # No cargo, no QEMU, no network but this machine's own loopback: what is set up stays enough.
  boot_once "$work/$name-second.log" "${alone[@]}" "${as[@]}"
  first=$(field ek_name "$work/$name-first.log")
  second=$(field ek_name "$work/$name-second.log")
  [ -n "$first" ] && [ "$first" = "$second" ] || fail "another TPM after the second boot: $first, then $second"
  printf '  ready twice, the same TPM, without a network the second time: %s\n' "$first"
}

unset SVSM_VENV XDG_STATE_HOME XDG_CACHE_HOME
as=(env)
alone=(env)
if [ "$(id -u)" -eq 0 ]; then
  alone=(unshare --net -- bash -c 'ip link set lo up && exec "$@"' bash)
fi
SVSM_PYTHON=${SVSM_PYTHON:-$(command -v python3)}
export SVSM_PYTHON
first_boot whoever-runs-this
if [ "$(id -u)" -eq 0 ]; then
  export PATH=/usr/bin:/bin:/usr/sbin:/sbin SVSM_PYTHON=/usr/bin/python3
  as=(setpriv --reuid=nobody --regid=nogroup --clear-groups)
  first_boot ordinary-user
fi
printf 'first boot: as it should be\n'
