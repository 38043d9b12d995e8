#!/bin/sh
# Two zones on one machine: files put in oslo are read through a mount in paris; the link is cut, oslo goes on, the link
# heals and the lag falls to nothing; then oslo dies with something paris does not have, paris takes its place, and oslo,
# back again, keeps what it had not shipped as a branch and follows.
# Everything it makes lies in one temporary directory, which it removes. Needs /dev/fuse.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
[ ! -x "$here/.venv/bin/space" ] || PATH=$here/.venv/bin:$PATH

work=$(mktemp -d)
oslo=$work/oslo paris=$work/paris mount=$work/mnt
oslo_pid= paris_pid= link_pid=
stop() { [ -z "$1" ] || { kill "$1" && wait "$1"; } 2>/dev/null || true; }
clean() {
    stop "$oslo_pid"
    stop "$paris_pid"
    stop "$link_pid"
    space --data "$paris" project stop "$mount" >/dev/null 2>&1 || true
    fusermount3 -u -z -q "$mount" 2>/dev/null || true
    rm -rf "$work"
}
trap clean EXIT
trap 'exit 1' INT TERM

say() { printf '\n== %s\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }
until_so() { # until_so WHAT COMMAND: waits until it succeeds, two minutes at most
    what=$1 tries=0
    shift
    until "$@" >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ "$tries" -lt 600 ] || { echo "never: $what" >&2; exit 1; }
        sleep 0.2
    done
}
free_port() { python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
lag() { # lag: events oslo has that paris has not
    space --data "$oslo" --json federation status |
        python3 -c 'import json, sys; print(json.load(sys.stdin)["zones"][0]["lag_events"])'
}
in_step() { [ "$(lag)" = 0 ]; }
same() { [ "$(space --data "$oslo" get "$1")" = "$(space --data "$paris" get "/zones/oslo$1")" ]; }

oslo_port=$(free_port) paris_port=$(free_port) link_port=$(free_port)

# The link from oslo to paris: a relay that can be cut.
link() {
    python3 - "$link_port" "$paris_port" <<'RELAY' &
import asyncio, sys

async def copy(reader, writer):
    try:
        while piece := await reader.read(1 << 16):
            writer.write(piece)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()

async def relay(reader, writer):
    try:
        there_reader, there = await asyncio.open_connection("127.0.0.1", int(sys.argv[2]))
    except OSError:
        return writer.close()
    await asyncio.gather(copy(reader, there), copy(there_reader, writer))

async def main():
    async with await asyncio.start_server(relay, "127.0.0.1", int(sys.argv[1])) as server:
        await server.serve_forever()

asyncio.run(main())
RELAY
    link_pid=$!
}
serve_oslo() {
    space --data "$oslo" federation serve --listen "127.0.0.1:$oslo_port" >>"$work/log" 2>&1 &
    oslo_pid=$!
    until_so "oslo serves" sh -c "space --data '$oslo' federation status | grep -q 'at https'"
}

say "Two zones, each with keys of its own"
mkdir "$mount"
run space --data "$oslo" zone init oslo --url "https://127.0.0.1:$oslo_port"
run space --data "$paris" zone init paris --kind geo --url "https://127.0.0.1:$link_port"
space --data "$oslo" zone ca >"$work/oslo.pem"
space --data "$paris" zone ca >"$work/paris.pem"

say "Paris mounts its tree and listens; oslo serves; each learns of the other"
run space --data "$paris" project mount --path / --target "$mount" --background
space --data "$paris" federation serve --listen "127.0.0.1:$paris_port" >>"$work/log" 2>&1 &
paris_pid=$!
link
serve_oslo
until_so "paris serves" sh -c "space --data '$paris' federation status | grep -q 'at https'"
run space --data "$oslo" zone add paris --url "https://127.0.0.1:$link_port" --ca "$work/paris.pem"
run space --data "$paris" zone add oslo --url "https://127.0.0.1:$oslo_port" --ca "$work/oslo.pem"

say "What a policy names paris for goes there, and nothing else does"
cat >"$work/shared.yaml" <<'POLICY'
sovereignty: global
federation:
  targets: [paris]
POLICY
echo 'made in oslo' >"$work/report"
echo 'stays in oslo' >"$work/secret"
run space --data "$oslo" mkdir /shared
run space --data "$oslo" policy set /shared "$work/shared.yaml"
run space --data "$oslo" put "$work/report" --name /shared/report
run space --data "$oslo" put "$work/secret" --name /secret
until_so "the report is in paris" test -e "$mount/zones/oslo/shared/report"
run cat "$mount/zones/oslo/shared/report"
run test ! -e "$mount/zones/oslo/secret"

say "There it can be read, at every moment, and not written"
if echo 'made in paris' 2>/dev/null >"$mount/zones/oslo/shared/report"; then exit 1; fi
echo "$mount/zones/oslo/shared/report: not written, its home is oslo"

say "The link is cut; oslo goes on; the link heals; the lag falls"
stop "$link_pid"
link_pid=
for number in 1 2 3 4 5; do
    echo "number $number" >"$work/$number"
    space --data "$oslo" put "$work/$number" --name "/shared/$number" >/dev/null
done
echo "paris lacks $(lag) events"
run space --data "$oslo" federation status
link
until_so "paris is in step" in_step
echo "paris lacks $(lag) events"
run cat "$mount/zones/oslo/shared/5"

say "Oslo dies, with something paris does not have"
stop "$link_pid"
link_pid=
echo 'changed in oslo, and not shipped' >"$work/report"
run space --data "$oslo" put "$work/report" --name /shared/unshipped
kill -9 "$oslo_pid"
wait "$oslo_pid" 2>/dev/null || true
oslo_pid=

say "Paris takes its place: what came from oslo is written here now"
run space --data "$paris" zone promote oslo --yes
echo 'made in paris' >"$mount/zones/oslo/shared/report"
echo 'new in paris' >"$mount/zones/oslo/shared/new"
sync "$mount/zones/oslo/shared/new"

say "Oslo comes back: it learns of that, keeps what it had not shipped, and follows"
link
serve_oslo
until_so "oslo follows" sh -c "space --data '$oslo' zone branches | grep -q paris-1"
until_so "oslo has what paris made" same /shared/new
until_so "oslo has what paris changed" same /shared/report
run space --data "$oslo" zone branches
run space --data "$oslo" ls -r /zones/.branches/paris-1
run space --data "$oslo" get /zones/.branches/paris-1/shared/unshipped
run space --data "$oslo" get /shared/report

say "And both logs prove that nothing left that may not"
run space --data "$oslo" verify --sovereignty
run space --data "$paris" verify --sovereignty
say "Done"
