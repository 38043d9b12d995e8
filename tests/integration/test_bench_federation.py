"""The benchmark of federation measures what it says: lines delay and lose, both zones hold what was shipped."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import bench_federation
from bench.bench_federation import Pair, Wires
from bench.federation.line import Route, line, missing
from bench.federation.peers import NATS, RSYNC, Jetstream, Rsync
from bench.measure import ROOT, Scale
from bench.peers.programs import find

pytestmark = pytest.mark.requires("py:aiohttp")

needs_a_line = pytest.mark.skipif(bool(missing()), reason=f"a line {missing()}")


def files(home: Path, count: int, size: int) -> Path:
    """Files to be carried."""
    home.mkdir()
    for number in range(count):
        (home / f"{number}").write_bytes(os.urandom(size))
    return home


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    with contextlib.suppress(OSError):
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


@pytest.mark.skipif(find(NATS) is None, reason=f"needs {NATS}")
@pytest.mark.requires(RSYNC)
def test_everybody_carries_the_same_files(tmp_path: Path) -> None:
    """Ours, the bare path and the peers each bring a directory over, more than once."""
    route, directory = Route("here"), files(tmp_path / "files", 3, 3000)
    with contextlib.ExitStack() as stack:
        pair = stack.enter_context(Pair(tmp_path, route))
        wires = Wires(tmp_path, route, stack)
        rsync = stack.enter_context(contextlib.closing(Rsync(tmp_path, route)))
        nats = stack.enter_context(contextlib.closing(Jetstream(tmp_path, route)))
        pair.begin()
        pair.home.ask("shipped", pair.home.ask("position"))
        for _ in range(2):
            assert pair.ship(directory) > 0
            assert wires.send(directory, file=True) > 0
            assert wires.send(directory, tls=True) > 0
            assert rsync.send(directory) > 0
            assert nats.send(directory) > 0
        for run in (1, 2):
            there = tmp_path / "rsync-files" / f"run{run}"
            assert {path.name: path.read_bytes() for path in there.iterdir()} == {
                path.name: path.read_bytes() for path in directory.iterdir()
            }


def test_each_write_has_its_lag(tmp_path: Path) -> None:
    """There is a lag for each write and each bare message, and none is negative."""
    route = Route("here")
    with contextlib.ExitStack() as stack:
        pair = stack.enter_context(Pair(tmp_path, route))
        wires = Wires(tmp_path, route, stack)
        pair.begin()
        pair.home.ask("shipped", pair.home.ask("position"))
        for found in (pair.lags(50.0, 0.4), wires.lags(50.0, 0.4)):
            assert len(found) == 20
            assert min(found) >= 0


@needs_a_line
def test_a_line_delays(tmp_path: Path) -> None:
    """No byte comes back over a line before its round trip, everything comes in spite of loss, and nothing stays."""
    with line(tmp_path, "far", rtt_seconds=0.05, loss=0.05) as route, contextlib.ExitStack() as stack:
        wires = Wires(tmp_path, route, stack)
        assert min(wires.round_trips(5)) >= 0.05
        assert wires.send(files(tmp_path / "files", 1, 50_000), file=True) > 0
        holder = int(route.home.prefix[1].split("/")[2])
        assert alive(holder)
        device = f"spb{os.getpid()}a"
        inside = subprocess.run(
            [*route.home.prefix, "ip", "link"], capture_output=True, text=True, check=True
        )
        assert device in inside.stdout
    assert not alive(holder)
    left = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True)
    assert device not in left.stdout


@needs_a_line
def test_a_line_loses(tmp_path: Path) -> None:
    """A line that loses everything carries nothing."""
    with line(tmp_path, "cut", rtt_seconds=0.0, loss=1.0) as route, contextlib.ExitStack() as stack:
        wires = Wires(tmp_path, route, stack)
        program = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 0.5)"
        where = [route.target.address, str(wires.target.ask("echo"))]
        command = [*route.home.prefix, sys.executable, "-c", program, *where]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "TimeoutError" in done.stderr


@needs_a_line
@pytest.mark.requires(RSYNC)
def test_a_killed_benchmark_leaves_no_process(tmp_path: Path) -> None:
    """What holds namespaces, runs zones and serves peers ends when the benchmark is killed."""
    program = (
        "import pathlib, sys, time\n"
        "from bench.bench_federation import Pair\n"
        "from bench.federation.line import line\n"
        "from bench.federation.peers import Rsync\n"
        "home = pathlib.Path(sys.argv[1])\n"
        "with line(home, 'far', rtt_seconds=0.0, loss=0.0) as route, Pair(home, route) as pair:\n"
        "    pids = [int(side.prefix[1].split('/')[2]) for side in (route.home, route.target)]\n"
        "    pids += [child.program.process.pid for child in (pair.home, pair.target)]\n"
        "    print(*pids, Rsync(home, route)._daemon.process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], cwd=ROOT, stdout=subprocess.PIPE
    ) as bench:
        assert bench.stdout is not None
        pids = [int(word) for word in bench.stdout.readline().split()]
        assert len(pids) == 5
        assert all(map(alive, pids))
        bench.kill()
    deadline = time.monotonic() + 60
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_failback_is_counted(tmp_path: Path) -> None:
    """Bytes of a failback are at least what differs, and less than everything."""
    rows = bench_federation._failback(Scale(True, 1, tmp_path), tmp_path / "failback")
    assert [row.ours for row in rows] == [rows[0].ours] * 4
    content, everything = rows[0].value, rows[-1].value
    assert content is not None
    assert everything is not None
    assert content <= rows[0].ours < everything


def test_puts_are_timed_with_and_without_federation(tmp_path: Path) -> None:
    """Puts and writes have rows with the other zone away and there, beside no federation."""
    rows = bench_federation._puts(Scale(True, 1, tmp_path), tmp_path / "puts")
    assert [row.peer for row in rows] == ["no federation"] * 4 + ["aim"]
    assert all(row.ours > 0 for row in rows[:4])
