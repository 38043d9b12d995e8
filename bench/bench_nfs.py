"""``nfs``: the NFS view against nfs-ganesha over the same disk, with the same clients in the same minutes.

Three clients: nfs-rs (PyPI, Rust; one request at a time), the pipelining client of the tests (many requests on their
way), and, where SPACE_GUEST=1 asks for a virtual machine, Linux's own with fio.  What they want is the same of both
servers, what they get is not: ours has a change of the tree on the disk before it answers, as RFC 8881 §13.10 asks;
ganesha over a local file system leaves that to the kernel.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from bench.measure import ROOT, ROUNDS, Row, Scale, in_turn
from bench.peers.nfs import GANESHA, Ganesha, Ours, Server
from bench.peers.programs import HOST, find
from tests import nfs_client as nfs

MIB: Final = 1 << 20
BLOCK: Final = 4096
DEEP: Final = 32
"""Requests on their way where there are many; 1 MiB each would be more than a socket's buffers, so there 8."""
_WIDE: Final = 8
_GUEST_SECONDS: Final = 300


def run(scale: Scale) -> list[Row]:
    """Rates of both servers, by client and by what is asked."""
    rows: list[Row] = []
    with scale.workspace("nfs") as home, contextlib.ExitStack() as stack:
        servers: dict[str, Server] = {"ours": stack.enter_context(contextlib.closing(Ours(home / "ours")))}
        if find(GANESHA) is not None:
            servers["ganesha"] = stack.enter_context(contextlib.closing(Ganesha(home / "ganesha")))
        sizes = Sizes(scale)
        for client, case, unit, measure in _cases(sizes):
            contest = {name: functools.partial(measure, server) for name, server in servers.items()}
            found = in_turn(contest, 1 if scale.quick else ROUNDS)
            rows.append(_row(f"{client}: {case}", unit, found))
            scale.note(f"nfs: {client}, {case} done")
        if os.environ.get("SPACE_GUEST") == "1":
            rows += _kernel(servers, sizes)
    return rows


class Sizes:
    """How much is asked for: ``mib`` to stream, ``blocks`` at random, ``files`` to make, look at and remove."""

    def __init__(self, scale: Scale) -> None:
        self.mib = scale.pick(256, 8)
        self.blocks = scale.pick(4000, 100)
        self.files = scale.pick(1000, 50)


def _row(case: str, unit: str, found: Mapping[str, float]) -> Row:
    if "ganesha" not in found:
        return Row(case, unit, found["ours"], "ganesha (not installed)")
    return Row(case, unit, found["ours"], "ganesha", found["ganesha"])


Case = tuple[str, str, str, Callable[[Server], float]]


def _cases(sizes: Sizes) -> list[Case]:
    cases: list[Case] = []
    if importlib.util.find_spec("nfs_rs") is not None:
        cases += [("nfs-rs", case, unit, measure) for case, unit, measure in _one_at_a_time(sizes)]
    cases += [
        (f"{deep} in flight", case, unit, measure)
        for deep in (1, DEEP)
        for case, unit, measure in _pipelined(sizes, deep)
    ]
    return cases


# --- nfs-rs


def _one_at_a_time(sizes: Sizes) -> list[tuple[str, str, Callable[[Server], float]]]:
    def with_client(work: Callable[[Any], float]) -> Callable[[Server], float]:
        def measure(server: Server) -> float:
            nfs_rs = importlib.import_module("nfs_rs")
            url = f"nfs://{HOST}/{server.path}?nfsport={server.port}"
            with nfs_rs.Client.connect(url, versions=["4.1"], noresvport=True) as client:
                return work(client)

        return measure

    piece = random.Random(1).randbytes(MIB)

    def write(client: Any) -> float:
        with client.open("stream", "wb") as file:
            return _rate(
                sizes.mib,
                lambda: [*(file.write_at(piece, at * MIB) for at in range(sizes.mib)), file.flush()],
            )

    def read(client: Any) -> float:
        with client.open("stream", "rb") as file:
            return _rate(
                sizes.mib, lambda: [_checked(file.read_at(at * MIB, MIB), piece) for at in range(sizes.mib)]
            )

    def read_blocks(client: Any) -> float:
        with client.open("stream", "rb") as file:
            return _rate(sizes.blocks, lambda: [file.read_at(at, BLOCK) for at in _offsets(sizes)])

    def write_blocks(client: Any) -> float:
        with client.open("stream", "r+b") as file:
            return _rate(sizes.blocks, lambda: [file.write_at(piece[:BLOCK], at) for at in _offsets(sizes)])

    names = [f"file{number}" for number in range(sizes.files)]
    return [
        ("1 MiB sequential write", "MiB/s", with_client(write)),
        ("1 MiB sequential read", "MiB/s", with_client(read)),
        ("4 KiB random read", "IO/s", with_client(read_blocks)),
        ("4 KiB random write", "IO/s", with_client(write_blocks)),
        ("create", "files/s", _with(
            names, False, with_client(lambda client: _each(names, lambda name: client.open(name, "wb").close())))),
        ("stat", "files/s", _with(names, True, with_client(lambda client: _each(names, client.stat)))),
        ("unlink", "files/s", _with(names, True, with_client(lambda client: _each(names, client.remove)))),
    ]  # fmt: skip


def _each(names: Sequence[str], work: Callable[[str], object]) -> float:
    return _rate(len(names), lambda: [work(name) for name in names])


def _with(names: Sequence[str], there: bool, measure: Callable[[Server], float]) -> Callable[[Server], float]:
    """A measurement before which files are made, or are not there any more."""

    def prepared(server: Server) -> float:
        with nfs.Client((HOST, server.port)) as client:
            home = nfs.putfh(client.handle(server.path))
            for name in names:
                if there:
                    client.create(f"{server.path}/{name}", how=nfs.UNCHECKED).close()
                else:
                    client.attempt(home, nfs.remove(name.encode()))
        return measure(server)

    return prepared


def _rate(count: int, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)


def _checked(found: bytes, wanted: bytes) -> bytes:
    if found != wanted:
        raise RuntimeError("what is read is not what was written")
    return found


def _offsets(sizes: Sizes) -> Iterable[int]:
    chance = random.Random(2)
    return [chance.randrange(sizes.mib * MIB // BLOCK) * BLOCK for _ in range(sizes.blocks)]


# --- the client of the tests


def _pipelined(sizes: Sizes, deep: int) -> list[tuple[str, str, Callable[[Server], float]]]:
    wide = min(deep, _WIDE)
    piece = random.Random(3).randbytes(MIB)
    block = piece[:BLOCK]
    files = [f"deep{number}" for number in range(sizes.files)]
    names = [each.encode() for each in files]

    def opened(client: nfs.Client, server: Server) -> nfs.File:
        return client.create(f"{server.path}/deep", how=nfs.UNCHECKED)

    def on_file(
        count: int, deep: int, request: Callable[[nfs.File, int], bytes], *, stable: bool = False
    ) -> Callable[[Server], float]:
        def measure(server: Server) -> float:
            with nfs.Client((HOST, server.port)) as client:
                file = opened(client, server)

                def work() -> None:
                    keep(
                        client, deep, ((nfs.putfh(file.handle), request(file, each)) for each in range(count))
                    )
                    if stable:
                        file.commit()

                rate = _rate(count, work)
                file.close()
                return rate

        return measure

    def in_directory(requests: Callable[[nfs.Client, bytes], Sequence[bytes]]) -> Callable[[Server], float]:
        def measure(server: Server) -> float:
            with nfs.Client((HOST, server.port)) as client:
                home = nfs.putfh(client.handle(server.path))
                return _rate(
                    len(names),
                    lambda: keep(client, deep, ((home, *requests(client, each)) for each in names)),
                )

        return measure

    def create(client: nfs.Client, name: bytes) -> Sequence[bytes]:
        how = nfs.created(nfs.GUARDED, mode=0o644)
        share = nfs.BOTH | nfs.WANT_NO_DELEGATION
        opening = nfs.open_(client.identity.client, b"bench", nfs.claim_null(name), share=share, how=how)
        return opening, nfs.close(nfs.CURRENT)

    def stat(client: nfs.Client, name: bytes) -> Sequence[bytes]:
        return nfs.lookup(name), nfs.getattr_(
            "type", "size", "mode", "nlink", "owner", "group", "mtime", "ctime", "change"
        )

    places = list(_offsets(sizes))
    return [
        ("1 MiB sequential write and COMMIT", "MiB/s",
         on_file(sizes.mib, wide, lambda file, n: nfs.write(file.stateid, n * MIB, piece), stable=True)),
        ("1 MiB sequential read", "MiB/s",
         on_file(sizes.mib, wide, lambda file, n: nfs.read(file.stateid, n * MIB, MIB))),
        ("4 KiB random read", "IO/s",
         on_file(sizes.blocks, deep, lambda file, n: nfs.read(file.stateid, places[n], BLOCK))),
        ("4 KiB random write and COMMIT", "IO/s",
         on_file(sizes.blocks, deep, lambda file, n: nfs.write(file.stateid, places[n], block), stable=True)),
        ("4 KiB random write, FILE_SYNC", "IO/s",
         on_file(sizes.files, deep, lambda file, n: nfs.write(file.stateid, places[n], block, nfs.FILE_SYNC))),
        ("create", "files/s", _with(files, False, in_directory(create))),
        ("stat", "files/s", _with(files, True, in_directory(stat))),
        ("unlink", "files/s", _with(files, True, in_directory(lambda _, name: [nfs.remove(name)]))),
    ]  # fmt: skip


def keep(client: nfs.Client, deep: int, requests: Iterable[Sequence[bytes]]) -> None:
    """Carries out requests, so many on their way at a time, each on a slot of its own.

    Raises:
        NfsError: one failed.
    """
    free = list(range(deep))

    def wait() -> None:
        slot, answer = client.collect()
        answer.values()
        free.append(slot)

    for each in requests:
        if not free:
            wait()
        client.submit(*each, slot=free.pop())
    while len(free) < deep:
        wait()


# --- Linux's client

_JOB: Final = r"""
set -eu; mkdir -p /n; mount -t nfs4 -o vers=4.1,port=$1,noresvport 10.0.2.2:/$2 /n; cd /n
run() { fio --name=f --filename=/n/kernel --size=$3m --ioengine=libaio --direct=1 \
    --output-format=terse --terse-version=3 --rw=$1 --bs=$2 --iodepth=$4 $5 | cut -d ';' -f "$6"; }
run write 1m $3 8 --end_fsync=1 48 | sed 's/^/write=/'; run read 1m $3 8 "" 7 | sed 's/^/read=/'
run randread 4k $3 32 "--io_size=$(($4 * 4))k" 8 | sed 's/^/randread=/'
run randwrite 4k $3 32 "--io_size=$(($4 * 4))k --end_fsync=1" 49 | sed 's/^/randwrite=/'
rm /n/kernel; mkdir -p /n/k; cd /n/k
python3 - $5 <<'EOF'
import os, sys, time
count = int(sys.argv[1])
def each(what, work):
    t = time.time()
    for n in range(count): work(f"f{n}")
    print(f"{what}={count / (time.time() - t)}")
each("create", lambda name: os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)))
os.system("echo 2 > /proc/sys/vm/drop_caches")
each("stat", os.stat)
each("unlink", os.unlink)
EOF
cd /; umount /n
"""

_KERNEL: Final = {
    "write": ("1 MiB sequential write, fsync", "MiB/s", 1024.0),
    "read": ("1 MiB sequential read", "MiB/s", 1024.0),
    "randread": ("4 KiB random read", "IO/s", 1.0),
    "randwrite": ("4 KiB random write, fsync", "IO/s", 1.0),
    "create": ("create", "files/s", 1.0),
    "stat": ("stat", "files/s", 1.0),
    "unlink": ("unlink", "files/s", 1.0),
}
"""What the job prints: what it is, in which unit, and how many of its own make one."""


def _kernel(servers: Mapping[str, Server], sizes: Sizes) -> list[Row]:
    """Linux's client in a virtual machine: the way to a server is most of the time, and it is the same for both."""
    found = {name: _in_guest(server, sizes) for name, server in servers.items()}
    return [
        _row(f"Linux: {case}", unit, {name: float(values[key]) / scale for name, values in found.items()})
        for key, (case, unit, scale) in _KERNEL.items()
    ]


def _in_guest(server: Server, sizes: Sizes) -> dict[str, str]:
    guest = [str(ROOT / "tests" / "guest" / "guest.sh"), "-t", str(_GUEST_SECONDS), "-"]
    amounts = [str(each) for each in (server.port, server.path, sizes.mib, sizes.blocks, sizes.files)]
    done = subprocess.run([*guest, *amounts], input=_JOB, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"Linux's client: {(done.stdout + done.stderr).strip()[-500:]}")
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
