#!/bin/sh
# The main job on real input, from nothing: a file and a source tree put in, mounted by the kernel, read back
# bit-equal, the mounting process killed, and the views rebuilt from the log to the same digest.
# Everything it makes lies in one temporary directory, which it removes. Needs /dev/fuse.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
[ ! -x "$here/.venv/bin/space" ] || PATH=$here/.venv/bin:$PATH

work=$(mktemp -d)
export SPACE_DATA="$work/data"
mount=$work/mnt
server=
clean() {
    fusermount3 -u -z -q "$mount" 2>/dev/null || true
    [ -z "$server" ] || { kill "$server" && wait "$server"; } 2>/dev/null || true
    rm -rf "$work"
}
trap clean EXIT
trap 'exit 1' INT TERM

say() { printf '\n== %s\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }

# Serve the whole tree at $mount; its first line on stdout says that the kernel has it.
serve() {
    [ -p "$work/ready" ] || mkfifo "$work/ready"
    space --json project mount --path / --target "$mount" >"$work/ready" &
    server=$!
    exec 3<"$work/ready"
    read -r line <&3
    printf '$ space project mount --path / --target %s\n%s\n' "$mount" "$line"
}

say "Real input: Python's standard library, as an archive and as a tree"
mkdir "$mount" "$work/stdlib"
stdlib=$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
file=$work/stdlib.tar
tar -C "$stdlib" --exclude=./site-packages --exclude=./dist-packages -cf "$file" .
tar -C "$work/stdlib" -xf "$file"
echo "$file: $(stat -c %s "$file") bytes"
echo "$stdlib: $(find "$work/stdlib" -type f | wc -l) files"

say "Put them in"
run space put "$file" --name /stdlib.tar
run space import "$work/stdlib" /stdlib

say "Mount, and compare every byte through the kernel"
serve
run cmp "$file" "$mount/stdlib.tar"
run diff -r --no-dereference "$work/stdlib" "$mount/stdlib"

say "Write through the mount, make it durable, then kill -9 the process that serves it"
echo 'written through the kernel' >"$mount/note.txt"
run sync "$mount/note.txt"
before=$(space digest)
echo "$before"
run kill -9 "$server"
wait "$server" 2>/dev/null || true
server=

say "Drop all views, rebuild them from the log, compare"
run space replay --verify
after=$(space digest)
echo "$after"
[ "$before" = "$after" ] || { echo "the digest changed" >&2; exit 1; }
run space verify

say "Mount again over the dead mount: everything is there"
serve
run cat "$mount/note.txt"
run cmp "$file" "$mount/stdlib.tar"
run diff -r --no-dereference "$work/stdlib" "$mount/stdlib"

say "Remove the file, and read it at the moment before"
moment=$(date -u +%Y-%m-%dT%H:%M:%S.%3NZ)
run space rm /stdlib.tar
sleep 1 # the kernel may believe a name for a second that was taken away beside the mount
run test ! -e "$mount/stdlib.tar"
space get /stdlib.tar --at "$moment" | cmp - "$file"
echo "\$ space get /stdlib.tar --at $moment | cmp - $file"

say "Done: bit-equal before and after kill -9, digest $after"
