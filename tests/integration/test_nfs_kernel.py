"""The Linux kernel's own NFS client, and the programs people use on it, against ``space project --view nfs``.

The client runs in a throw-away guest (tests/guest/guest.sh), because nothing but a kernel can be one.  The guest takes
root, Debian's package mirrors and 1.9 GB once, so these tests only run where SPACE_GUEST=1 asks for them.
SPACE_GUEST_KERNEL chooses the kernel: ``uml`` or ``debian``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import attrs
import pytest

import space
from space.projections.nfs.nfs4 import Claim, FileType, Op
from tests.cli_support import ROOT, execute
from tests.nfs_client import Client
from tests.nfs_cluster import Forwarder
from tests.nfs_support import LEASE_SECONDS, Serve, View

pytestmark = pytest.mark.skipif(
    os.environ.get("SPACE_GUEST") != "1", reason="boots a virtual machine: set SPACE_GUEST=1 (docs/nfs.md)"
)

GUEST: Final = ROOT / "tests" / "guest"
GUEST_SECONDS: Final = 500
"""Where a guest that hangs is given up; software emulation takes minutes for what User-Mode Linux does in seconds."""
SUITE_SECONDS: Final = 5400
POLL_SECONDS: Final = 0.05
PROGRAMS: Final = ("nfs_random.py", "nfs_sqlite.py")
VERSIONS: Final = pytest.mark.parametrize("version", ["4.1", "4.2"])

Answers = dict[str, Callable[..., object]]


@attrs.define
class Guest:
    """A guest that runs a job; ``answers`` are what the job can ask for."""

    home: Path
    answers: Answers
    process: subprocess.Popen[bytes] = attrs.field(init=False)

    def start(self, port: int, body: str, seconds: int = GUEST_SECONDS) -> None:
        share = self.home / "share"
        share.mkdir(parents=True, exist_ok=True)
        for name in PROGRAMS:
            shutil.copy(GUEST / name, share)
        job = self.home / "job.sh"
        job.write_text((GUEST / "nfs_prelude.sh").read_text() + body)
        kernel = os.environ.get("SPACE_GUEST_KERNEL")
        words: list[str | Path] = [GUEST / "guest.sh", "-c", "2", "-t", str(seconds), "-s", share]
        words += ["-k", kernel] if kernel else []
        with (self.home / "output").open("w") as output:
            self.process = subprocess.Popen(
                [*words, job, str(port), self.home.name],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return (self.home / "output").read_text(errors="replace")

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def poll(self) -> None:
        """Answers what is asked."""
        asked = self.home / "share" / "ask"
        if asked.exists():
            name, *arguments = asked.read_text().split()
            (self.home / "share" / "answer").write_text(f"{self.answers[name](*arguments)}\n")
            asked.unlink()

    def kill(self) -> None:
        """As pulling its plug does it: nothing is said to anybody."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()

    def end(self) -> None:
        if not self.ended:
            self.process.terminate()
            self.process.wait()


def run(
    view: View,
    body: str,
    tmp_path: Path,
    *,
    seconds: int = GUEST_SECONDS,
    port: int = 0,
    **answers: Callable[..., object],
) -> dict[str, str]:
    """The lines ``name=value`` that a job prints, which must end well; ``port`` leads to the view, if not its own."""
    always = {"again": view.again, "kill": view.kill, "restart": view.restart}
    guest = Guest(tmp_path / "guest", {**always, **answers})
    guest.start(port or view.port, body, seconds)
    try:
        while not guest.ended:
            guest.poll()
            time.sleep(POLL_SECONDS)
    finally:
        guest.end()
    assert guest.process.returncode == 0, guest.output
    return facts(guest.output)


def facts(text: str) -> dict[str, str]:
    """The lines ``name=value`` of an output."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line.partition(" ")[0])


@VERSIONS
def test_a_tree(serve: Serve, data: Path, tmp_path: Path, version: str) -> None:
    """A tree with links, devices, owners and times is the same once copied, also when nothing is cached."""
    view = serve()
    job = f"""
    mounted {version}; grep -q " /n nfs4 .*vers={version}" /proc/mounts; df /n; stat -f /n
    cp -a /etc /n/; diff -r --no-dereference /etc /n/etc; anew {version}; diff -r --no-dereference /etc /n/etc
    list() {{ (cd $1; find . ! -path . -printf '%p %y %m %U %G %n %l %TY-%Tm-%Td %TT\\n' | sort); }}
    diff <(list /etc) <(list /n/etc)
    cd /n; mkdir d; echo one >d/one; ln d/one d/two; ln -s one d/link; mkfifo d/fifo; mknod d/null c 1 3
    [ $(stat -c %h d/two) = 2 ]; [ "$(cat d/link)" = one ]; echo thrown >d/null; [ $(stat -c %t:%T d/null) = 1:3 ]
    mv d/one d/ünïcode; mv -T d e; [ "$(cat e/ünïcode)" = one ]; rm -r e
    mkdir -m 1777 sticky; touch sticky/roots; chown 1000:1000 sticky/roots; [ $(stat -c %u:%a sticky/roots) = 1000:644 ]
    fails "not permitted" setpriv --reuid 1001 --clear-groups rm -f sticky/roots
    fails "denied" setpriv --reuid 1001 --clear-groups sh -c 'echo x >sticky/roots'
    mkdir locked; chmod 700 locked; fails denied setpriv --reuid 1001 --regid 1001 --clear-groups ls locked
    exec 5<>gone; rm gone; echo still >&5; [ "$(cat /proc/self/fd/5)" = still ]; exec 5>&-
    cd /; anew {version}; ls -A /n | sort | tr '\\n' ' ' | sed 's/^/left=/'; umount /n
    """
    assert run(view, job, tmp_path)["left"] == "etc locked sticky "
    view.stop()
    with space.open(data) as store:
        assert store.read(store.resolve("/etc/hostname"))


@VERSIONS
def test_large_directories(serve: Serve, tmp_path: Path, version: str) -> None:
    """Fifteen hundred names are listed each once, in pages, while they are also removed; cookies outlive the server."""
    view = serve()
    job = f"""
    mounted {version}; mkdir /n/d; cd /n/d; seq -f "name-%g-with-some-length-to-fill-pages" 1500 | xargs touch; cd /
    anew {version}; [ $(ls /n/d | sort -u | wc -l) = 1500 ]; [ $(ls /n/d | wc -l) = 1500 ]
    python3 - <<'EOF'
import os, subprocess
open("/proc/sys/vm/drop_caches", "w").write("3")
found = []
with os.scandir("/n/d") as entries:
    for entry in entries:
        found.append(entry.name)
        if len(found) == 600:
            open("/mnt/host/asking", "w").write("again"); os.rename("/mnt/host/asking", "/mnt/host/ask")
            while os.path.exists("/mnt/host/ask"): pass
            for number in range(1, 300): open("/n/d/new-%d" % number, "w")
found = [each for each in found if each.startswith("name")]
assert len(found) == len(set(found)) == 1500, (len(found), len(set(found)))
EOF
    rm -r /n/d; [ -z "$(ls -A /n)" ]; umount /n
    """
    run(view, job, tmp_path)


GIT: Final = """
git config --global user.email a@b; git config --global user.name n; git config --global gc.auto 0
repository() { # in $1: a history, a clone of it, packs
  rm -rf $1; mkdir -p $1; cd $1; git init -q one; cp -a /usr/lib/python3.11/{json,email,asyncio} one/; cd one; git add .
  git commit -qm first; cp -a /usr/lib/python3.11/xml .; git add -A; git commit -qm second
  git rm -qr json; git commit -qm third
  cd ..; git clone -q one two; cd two; git gc -q; git fsck --full --strict; git log --oneline | wc -l | has -x 3
  cd ../one; git repack -adfq; git fsck --full; [ -z "$(git status --porcelain)" ]; cd /
}
"""


@VERSIONS
def test_git(serve: Serve, tmp_path: Path, version: str) -> None:
    """Git adds, commits, clones, packs and checks; a fresh mount of the same finds nothing wrong either."""
    view = serve()
    job = f"""{GIT}
    mounted {version}; repository /n/r; anew {version}
    for each in one two; do cd /n/r/$each; git fsck --full; [ -z "$(git status --porcelain)" ]; done; cd /; umount /n
    """
    run(view, job, tmp_path)


@pytest.mark.parametrize("mode, load", [("delete", "between"), ("wal", "under")])
@VERSIONS
def test_sqlite(serve: Serve, tmp_path: Path, version: str, mode: str, load: str) -> None:
    """A database in rollback and in WAL mode holds what was committed, while the server is killed twice."""
    view = serve()
    job = f"""
    mounted {version}; {load} python3 /mnt/host/nfs_sqlite.py /n/db {mode}; cat /tmp/load
    anew {version}; [ "$(sqlite3 /n/db 'PRAGMA integrity_check')" = ok ]
    echo found=$(sqlite3 /n/db 'SELECT count(*) FROM t'); umount /n
    """
    found = run(view, job, tmp_path)
    assert int(found["rows"]) > 0
    assert found["rows"] == found["found"]


@VERSIONS
def test_fio_verifies(serve: Serve, tmp_path: Path, version: str) -> None:
    """What random writes left, direct and buffered, is read back unchanged, at once and through a new mount."""
    view = serve()
    job = f"""
    mounted {version}
    fio="fio --name=v --directory=/n --rw=randrw --bsrange=512-64k --size=24m --numjobs=2"
    fio="$fio --verify=crc32c --verify_fatal=1"
    for how in "--direct=1 --ioengine=libaio --iodepth=16 --bsrange=4k-64k" "--end_fsync=1"; do
      $fio $how; anew {version}; $fio $how --verify_only; rm /n/v*
    done; umount /n
    """
    run(view, job, tmp_path)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("version, wanted", [("4.1", ""), ("4.2", "holes copy")])
def test_random_operations(serve: Serve, tmp_path: Path, version: str, wanted: str, seed: int) -> None:
    """After every one of many random operations a file reads as it should."""
    view = serve()
    job = f"mounted {version}; python3 /mnt/host/nfs_random.py /n/f {seed} 15 {wanted}; umount /n"
    assert int(run(view, job, tmp_path)["steps"]) > 100


@pytest.mark.parametrize("version, wanted", [("4.1", ""), ("4.2", "holes copy")])
def test_random_operations_under_kills(serve: Serve, tmp_path: Path, version: str, wanted: str) -> None:
    """The same while the server is killed and started again under them."""
    view = serve()
    job = f"""
    mounted {version}; under python3 /mnt/host/nfs_random.py /n/f 7 0 {wanted}; cat /tmp/load; umount /n
    """
    assert int(run(view, job, tmp_path)["steps"]) > 0


@VERSIONS
def test_git_under_kills(serve: Serve, tmp_path: Path, version: str) -> None:
    """Git notices nothing of a server that is killed twice under it."""
    view = serve()
    job = f"""{GIT}
    busy() {{ set -e; while [ -e /tmp/under ]; do repository /n/r; done; }}
    mounted {version}; between busy
    anew {version}; for each in one two; do cd /n/r/$each; git fsck --full; done; cd /; umount /n
    """
    run(view, job, tmp_path)


@VERSIONS
def test_fio_under_kills(serve: Serve, tmp_path: Path, version: str) -> None:
    """What was synced before a kill is whole; writes under way are sent once more, and verify."""
    view = serve()
    job = f"""
    mounted {version}; cp -a /etc /n/; sync; (cd /n; find etc -type f -print0 | xargs -0 sha256sum) >/tmp/sums
    fio="fio --name=v --directory=/n --rw=randwrite --bs=4k --size=16m --fsync=16 --verify=crc32c --verify_fatal=1"
    busy() {{ set -e; while [ -e /tmp/under ]; do $fio; done; }}
    under busy
    anew {version}; (cd /n; sha256sum -c --quiet /tmp/sums); umount /n
    """
    run(view, job, tmp_path)


def test_names_under_kills(serve: Serve, tmp_path: Path) -> None:
    """Every name made, moved or removed before a kill is so after it, and nothing happened twice.

    What was done and not yet answered when the server died is asked again, and its second answer may be that it is
    there, or gone, already: only persistent sessions, which this server does not offer, could tell (RFC 8881 2.10.6.5).
    """
    view = serve()
    job = """
    cat >/tmp/names.py <<'EOF'
import contextlib, os
n = 0
again = contextlib.suppress(FileExistsError, FileNotFoundError)
while os.path.exists("/tmp/under"):
    base = "/n/%05d" % n
    with again: os.mkdir(base)
    with again: open(base + "/a", "x").close()
    with again: os.link(base + "/a", base + "/b")
    with again: os.rename(base + "/a", base + "/c")
    with again: os.symlink("c", base + "/s")
    with again: os.unlink(base + "/b")
    if n % 3 == 0:
        with again: os.unlink(base + "/s")
        with again: os.unlink(base + "/c")
        with again: os.rmdir(base)
    n += 1
print("made=%d" % n)
EOF
    mounted 4.2 lookupcache=positive; under python3 /tmp/names.py; cat /tmp/load; . /tmp/load; anew 4.2
    for n in $(seq 0 $((made - 1))); do
      d=/n/$(printf %05d $n); if [ $((n % 3)) = 0 ]; then [ ! -e $d ]; else [ "$(ls -m $d)" = "c, s" ]; fi
    done; umount /n
    """
    assert int(run(view, job, tmp_path)["made"]) > 10


BEFORE_NAMES: Final = {
    "CREATE": (Op.CREATE, FileType.DIR),
    "LINK": (Op.LINK,),
    "OPEN": (Claim.NULL,),
    "REMOVE": (Op.REMOVE,),
    "RENAME": (Op.RENAME,),
}
"""What stands right before the names of an operation on the wire."""


class Losing(Forwarder):
    """The way to a server that dies between carrying out the request that is wanted and answering it."""

    def __init__(self, view: View) -> None:
        super().__init__()
        self.lost = 0
        self._view = view
        self._wanted = b""
        self._carried_out = False
        self.lead_to(view.port)

    def lose(self, operation: str, *names: str) -> str:
        """The next such operation with these names is wanted."""
        self._wanted = b"".join(struct.pack(">I", each) for each in BEFORE_NAMES[operation])
        for name in names:
            self._wanted += struct.pack(f">I{len(name)}s{-len(name) % 4}x", len(name), name.encode())
        return "wanted"

    def asked(self, data: bytes) -> bool:
        if self._wanted and self._wanted in data:
            self._wanted, self._carried_out = b"", True
        return True

    def answered(self, data: bytes) -> bool:
        if not self._carried_out:
            return True
        self._carried_out = False
        self.lost += 1
        self._view.again()
        return False


def test_an_answer_that_dies_with_its_server(serve: Serve, data: Path, tmp_path: Path) -> None:
    """What was carried out is carried out once; the client asks again, and is told how it is by then.

    Creating a file exclusively is known as the same request by its verifier, also by a later server.
    """
    view = serve()
    with contextlib.closing(Losing(view)) as way:
        job = """
        mounted 4.2 lookupcache=positive; cd /n
        ask lose CREATE made; fails "File exists" mkdir made; echo one >made/f
        ask lose RENAME f moved; fails "No such file" mv -T made/f moved; [ "$(cat moved)" = one ]; [ ! -e made/f ]
        ask lose LINK linked; fails "File exists" ln moved linked; [ $(stat -c %h moved) = 2 ]
        ask lose REMOVE linked; fails "No such file" unlink linked; [ ! -e linked ]
        ask lose OPEN new; (set -C; echo two >new); [ "$(cat new)" = two ]; cd /; umount /n
        """
        run(view, job, tmp_path, port=way.address[1], lose=way.lose)
        assert way.lost == job.count("ask lose")
    view.stop()
    with space.open(data) as store:
        assert sorted(each.name for each in store.ls("/")) == [b"made", b"moved", b"new"]


def test_extended_attributes(serve: Serve, data: Path, tmp_path: Path) -> None:
    """Extended attributes are set, listed, replaced and removed, also many and large ones; the store has them."""
    view = serve()
    job = """
    mounted 4.2; cd /n; echo x >f; mkdir d; setfattr -n user.one -v first f; setfattr -n user.two -v 0x00ff f
    setfattr -n user.dir -v dir d
    [ "$(getfattr --only-values -n user.one f)" = first ]; getfattr -d -e hex f | has -x user.two=0x00ff
    setfattr -n user.one -v second f; setfattr -x user.two f; fails "No such attribute" getfattr -n user.two f
    for i in $(seq 200); do setfattr -n user.many$i -v $i d; done
    cd /; anew 4.2; cd /n; [ "$(getfattr --only-values -n user.one f)" = second ]
    [ $(getfattr -d -m - d | grep -c ^user.many) = 200 ]
    python3 - <<'EOF'
import os, errno
large = os.urandom(60000)
os.setxattr("f", "user.large", large, os.XATTR_CREATE); assert os.getxattr("f", "user.large") == large
for flags, wanted in ((os.XATTR_CREATE, errno.EEXIST), (os.XATTR_REPLACE, errno.ENODATA)):
    try: os.setxattr("f", "user.large" if flags == os.XATTR_CREATE else "user.none", b"", flags)
    except OSError as error: assert error.errno == wanted, error
    else: raise AssertionError(flags)
EOF
    cd /; umount /n
    """
    run(view, job, tmp_path)
    view.stop()
    with space.open(data) as store:
        assert store.resolve("/f")


def test_holes_and_clones(serve: Serve, data: Path, tmp_path: Path) -> None:
    """Holes stay holes, room is given back, copies are made by the server, and a clone costs nothing."""
    view = serve()
    job = r"""
    mounted 4.2; cd /n; head -c 16M /dev/urandom >whole; sync whole; echo before=$(ask log)
    cp --reflink=always whole clone; echo after=$(ask log); cmp whole clone
    echo changed | dd of=clone bs=4096 seek=7 conv=notrunc,fsync; cmp -s whole clone && exit 1
    cmp -n 28672 whole clone
    truncate -s 1G sparse; dd if=whole of=sparse bs=1M count=1 seek=512 conv=notrunc,fsync
    [ $(stat -c %b sparse) -lt 4096 ]; cp --sparse=auto --reflink=never sparse second
    sync; [ $(stat -c %b second) -lt 4096 ]; [ $(stat -c %s second) = $((1 << 30)) ]
    python3 - <<'EOF'
import os
f = os.open("sparse", os.O_RDWR)
assert os.lseek(f, 0, os.SEEK_DATA) == 512 << 20, os.lseek(f, 0, os.SEEK_DATA)
assert 513 << 20 <= os.lseek(f, 512 << 20, os.SEEK_HOLE) <= (513 << 20) + 65536
w, c = os.open("whole", os.O_RDONLY), os.open("copied", os.O_RDWR | os.O_CREAT)
at = 0
while at < 16 << 20:
    at += os.copy_file_range(w, c, (16 << 20) - at)
EOF
    cmp whole copied; fallocate -l 8M room; [ $(stat -c %s room) = $((8 << 20)) ]; cmp -n 8388608 room /dev/zero
    echo full=$(stat -c %b copied); fallocate -p -o 0 -l 8M copied; echo punched=$(stat -c %b copied)
    cmp -n 8388608 copied /dev/zero; cmp -i 8388608 copied whole
    cd /; anew 4.2; cmp -n 8388608 /n/copied /dev/zero; cmp -i 8388608 /n/copied /n/whole; umount /n
    """
    log = lambda: sum(each.stat().st_blocks * 512 for each in (data / "wal").rglob("*") if each.is_file())  # noqa: E731
    found = run(view, job, tmp_path, log=log)
    assert int(found["after"]) - int(found["before"]) < 1 << 20
    assert int(found["full"]) - int(found["punched"]) > 16000


LOCKER: Final = r"""
cat >/tmp/lock.py <<'EOF'
import fcntl, sys
# lock.py FILE ex|sh|try START LENGTH: holds the range until its input ends
path, how, start, length = sys.argv[1:]
file = open(path, "r+b")
kind = {"ex": fcntl.LOCK_EX, "sh": fcntl.LOCK_SH, "try": fcntl.LOCK_EX | fcntl.LOCK_NB}[how]
try:
    fcntl.lockf(file, kind, int(length), int(start))
except BlockingIOError:
    print("busy", flush=True); sys.exit(3)
print("got", flush=True); sys.stdin.read()
EOF
lock() { python3 /tmp/lock.py "$@"; }
until_there() { for i in $(seq 400); do [ -e "$1" ] && return; sleep 0.1; ls /n >/dev/null; done; exit 1; }
"""


def two_guests(
    view: View,
    tmp_path: Path,
    first: str,
    second: str,
    *,
    kill_first: bool = False,
    **answers: Callable[..., object],
) -> tuple[str, str]:
    """What two jobs print that run side by side; with ``kill_first`` the second one asks for the first one's end."""
    guests = [Guest(tmp_path / name, {"again": view.again, **answers}) for name in ("first", "second")]
    if kill_first:
        guests[1].answers["kill"] = guests[0].kill
    for guest, job in zip(guests, (first, second), strict=True):
        guest.start(view.port, LOCKER + job)
    try:
        while not all(guest.ended for guest in guests):
            for guest in guests:
                guest.poll()
            time.sleep(POLL_SECONDS)
    finally:
        for guest in guests:
            guest.end()
    assert guests[1].process.returncode == 0, f"{guests[1].output}\n--- first:\n{guests[0].output}"
    if not kill_first:
        assert guests[0].process.returncode == 0, guests[0].output
    return guests[0].output, guests[1].output


@VERSIONS
def test_locks_between_two_clients(serve: Serve, tmp_path: Path, version: str) -> None:
    """A range one client holds the other cannot have, others it can; who waits gets it when it is let go."""
    view = serve()
    first = f"""
    mounted {version}; cd /n; echo content >f; sync f
    exec 5> >(lock f ex 0 100); sleep 0.5; touch held; until_there tried; sleep 2; touch letting-go; exec 5>&-
    until_there done; cd /; umount /n
    """
    second = f"""
    mounted {version}; cd /n; until_there held
    [ "$(lock f try 50 10 </dev/null || true)" = busy ]; [ "$(lock f sh 100 10 </dev/null)" = got ]
    [ "$(flock -n f echo got || echo busy)" = busy ]
    touch tried; [ "$(lock f ex 0 0 </dev/null)" = got ]; [ -e letting-go ]; touch done; cd /; umount /n
    """
    two_guests(view, tmp_path, first, second)


@VERSIONS
def test_locks_outlive_the_server(serve: Serve, tmp_path: Path, version: str) -> None:
    """A lock held before the server was killed is held after it, and nobody gets it in between."""
    view = serve()
    first = f"""
    mounted {version}; cd /n; echo content >f; sync f
    exec 5> >(lock f ex 0 100); sleep 0.5; touch held; until_there tried; exec 5>&-; until_there done; cd /; umount /n
    """
    second = f"""
    mounted {version}; cd /n; until_there held; [ "$(lock f try 0 1 </dev/null || true)" = busy ]
    for i in 1 2; do ask again; [ "$(lock f try 0 1 </dev/null || true)" = busy ]; done
    touch tried; [ "$(lock f ex 0 0 </dev/null)" = got ]; touch done; cd /; umount /n
    """
    two_guests(view, tmp_path, first, second)


@VERSIONS
def test_a_killed_client_loses_its_locks(serve: Serve, tmp_path: Path, version: str) -> None:
    """What a dead client held is free after its lease, not before; what it had synced is there."""
    view = serve()
    first = f"""
    mounted {version}; cd /n; echo synced >f; sync f; exec 5> >(lock f ex 0 100); sleep 0.5; touch held; sleep 1000
    """
    second = f"""
    mounted {version}; cd /n; until_there held; [ "$(lock f try 0 1 </dev/null || true)" = busy ]
    ask kill; [ "$(lock f try 0 1 </dev/null || true)" = busy ]
    for i in $(seq {8 * LEASE_SECONDS}); do [ "$(lock f try 0 1 </dev/null || true)" = got ] && break; sleep 0.5; done
    [ "$(lock f try 0 1 </dev/null)" = got ]; [ "$(cat f)" = synced ]; cd /; umount /n
    """
    two_guests(view, tmp_path, first, second, kill_first=True)


@VERSIONS
def test_two_clients_see_each_other(serve: Serve, tmp_path: Path, version: str) -> None:
    """What one client closed the other reads when it opens, many times to and fro, whoever holds a delegation."""
    view = serve()
    talk = """
    mounted %s; cd /n
    for i in $(seq 40); do
      until [ "$(cat turn 2>/dev/null)" = %s ]; do sleep 0.02; done
      [ %s = a ] || has -x "$i a" data
      if [ %s = a ] && [ $i -gt 1 ]; then grep -qx "$((i - 1)) b" data; fi
      echo $i %s >data; echo %s >turn
    done; [ %s = b ] || until [ "$(cat turn)" = a ]; do sleep 0.02; done; cd /; umount /n
    """
    first = talk % (version, "a", "a", "a", "a", "b", "a")
    second = talk % (version, "b", "b", "b", "b", "a", "b")
    two_guests(view, tmp_path, f"mounted {version}; echo a >/n/turn; umount /n;" + first, second)


def test_what_others_change_is_seen(serve: Serve, data: Path, tmp_path: Path) -> None:
    """What the command line changes while a client has it open or cached is what the client reads next."""
    view = serve()

    def put(text: str) -> str:
        (tmp_path / "new").write_text(text)
        execute(data, "rm", "/f")
        return execute(data, "put", tmp_path / "new", "--name", "/f").out.strip()

    job = """
    mounted 4.2 actimeo=0; ask put one; [ "$(cat /n/f)" = one ]; ask put another; [ "$(cat /n/f)" = another ]
    ls /n | has -x f; umount /n
    """
    run(view, job, tmp_path, put=put)


def test_a_past_moment_is_read_only(serve: Serve, data: Path, tmp_path: Path) -> None:
    """A moment is served beside the process that owns the store, to be read and not written."""
    with space.open(data) as store:
        made = store.put(b"before", name="/f")
        moment = f"@{store.applied().position}"
        store.write(made.id, 0, b"after.")
    serve()
    past = serve("--path", "/", "--at", moment)
    job = """
    mounted 4.2; [ "$(cat /n/f)" = before ]; fails "Read-only" touch /n/g; fails "Read-only" sh -c 'echo x >>/n/f'
    umount /n
    """
    run(past, job, tmp_path)


def test_root_is_nobody_unless_told(serve: Serve, data: Path, tmp_path: Path) -> None:
    """By default the client's root is squashed: what it makes is nobody's, and what is root's it cannot change."""
    view = serve()
    with Client(view.address) as client:
        client.mkdir("d", 0o1777)
    view.stop()
    view = serve("--path", "/")
    job = """
    mounted 4.2; fails "denied" touch /n/f; touch /n/d/f; echo owner=$(stat -c %u /n/d/f); umount /n
    """
    assert run(view, job, tmp_path)["owner"] == "65534"


@pytest.mark.skipif("PJDFSTEST_DIR" not in os.environ, reason="PJDFSTEST_DIR names no built pjdfstest")
@pytest.mark.timeout(2 * SUITE_SECONDS)
def test_pjdfstest(serve: Serve, tmp_path: Path) -> None:
    """At most four of pjdfstest's cases fail, as many as with nfs-ganesha."""
    view = serve()
    shutil.copytree(os.environ["PJDFSTEST_DIR"], tmp_path / "guest" / "share" / "suite")
    job = r"""
    mounted 4.2; cp -a /mnt/host/suite /tmp/; mkdir /n/t; cd /n/t
    prove -r /tmp/suite/tests >/tmp/report 2>&1 || true
    sed -n '/^Test Summary/,$p' /tmp/report; tail -2 /tmp/report
    echo ran=$(grep -oE 'Tests=[0-9]+' /tmp/report | tr -dc 0-9)
    echo failed=$(grep -oE 'Failed: [0-9]+' /tmp/report | awk '{s += $2} END {print s + 0}')
    """
    found = run(view, job, tmp_path, seconds=SUITE_SECONDS)
    assert int(found["ran"]) > 8000
    assert int(found["failed"]) <= 4
