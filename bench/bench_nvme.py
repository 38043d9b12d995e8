"""``nvme``: what a user-space host gets out of a served capsule, and how long until it can.

The peer is :mod:`bench.nvme.echo`: the same PDUs on the same event loop, and nothing behind them, so the ratio says
what the store, the checks and the whole protocol cost.  Host and server have a core each at best; where others have
them too, the CPU time of the server for each command is the steadier figure.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs

from bench.measure import ROOT, ROUNDS, Row, Scale, in_child, timed
from bench.nvme.cases import BLOCK, CASES, Case
from bench.nvme.client import first_block
from bench.peers.programs import HOST
from space._node import nvme_view
from space._node.caller import Document
from space._node.store import Store
from space.events.types import Kind

AIM: Final = 0.6
AIM_SECONDS: Final = 0.05
END_SECONDS: Final = 60
_CLI: Final = (sys.executable, "-c", "from space.cli import main; main()")
_TICKS: Final = os.sysconf("SC_CLK_TCK")


@attrs.frozen
class Server:
    """A target that runs."""

    pid: int
    port: int
    nqn: str

    def cpu_seconds(self) -> float:
        """What it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS


def run(scale: Scale) -> list[Row]:
    """Commands a second, latencies, CPU and seconds until ready."""
    span = scale.pick(128 << 20, 8 << 20)
    with scale.workspace("nvme") as home:
        in_child("bench.nvme.cases:make", str(home / "data"), span, BLOCK)
        rows = _rates(scale, home, span)
        scale.note("nvme: rates done")
        for label, size in (("1 KiB", 1024), ("100 GiB", 100 << 30)):
            data = home / label.replace(" ", "-")
            in_child("bench.nvme.cases:make", str(data), size, 512)
            rows += _ready_rows(label, data)
        for label, size in (("1 MiB", 1 << 20), ("100 GiB", 100 << 30)):
            seconds = in_child("bench.bench_nvme:clone", str(home / f"clone-{size}"), size).result
            rows.append(Row(f"{label}: a writable clone", "s", seconds, "aim", AIM_SECONDS))
    return rows


# --- rates


def _rates(scale: Scale, home: Path, span: int) -> list[Row]:
    seconds = scale.pick(4, 1) if not scale.quick else 0.3
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with ours(home / "data") as one, echo() as other:
        for server in (one, other):
            measured(server, Case("filled", "write", 128 << 10, 16), span, seconds)
        for _ in range(1 if scale.quick else ROUNDS):
            for case in CASES:
                for name, server in (("ours", one), ("echo", other)):
                    found.setdefault((case.name, name), []).append(measured(server, case, span, seconds))
    rows = []
    for case in CASES:
        rows += _case_rows(case, *(_median(found[case.name, name]) for name in ("ours", "echo")))
    return rows


def _case_rows(case: Case, view: dict[str, float], limit: dict[str, float]) -> list[Row]:
    factor, unit = (1.0, "commands/s") if case.size == BLOCK else (case.size / 1e6, "MB/s")
    peer = "echo server"
    return [
        Row(case.name, unit, view["per_second"] * factor, peer, limit["per_second"] * factor),
        Row(f"{case.name}: p50", "us", view["p50_us"], peer, limit["p50_us"]),
        Row(f"{case.name}: p99", "us", view["p99_us"], peer, limit["p99_us"]),
        Row(f"{case.name}: server CPU a command", "us", view["cpu_us"], peer, limit["cpu_us"]),
    ]


def _median(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}


def measured(server: Server, case: Case, span: int, seconds: float) -> dict[str, float]:
    """What the client, in a process of its own, gets out of a server, and what that cost the server.

    Raises:
        RuntimeError: the client failed.
    """
    command = (
        sys.executable, "-m", "bench.nvme.client", str(server.port), server.nqn, "1", case.operation,
        str(case.size), str(case.depth), str(span), str(seconds),
    )  # fmt: skip
    before = server.cpu_seconds()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.name}: {done.stderr.strip()[-500:]}")
    found: dict[str, float] = json.loads(done.stdout)
    cpu = server.cpu_seconds() - before
    return {**found, "cpu_us": cpu * 1e6 / (found["per_second"] * found["seconds"])}


@contextlib.contextmanager
def ours(data: Path) -> Iterator[Server]:
    """The view as a user starts it."""
    command = (*_CLI, "--data", str(data), "project", "--view", "nvme", "--path", "/device", "--listen")
    with _running((*command, f"{HOST}:0")) as process:
        ready = json.loads(_line(process))
        yield Server(process.pid, int(ready["address"].rpartition(":")[2]), ready["nqn"])


@contextlib.contextmanager
def echo() -> Iterator[Server]:
    """What does nothing behind the same PDUs."""
    with _running((sys.executable, "-m", "bench.nvme.echo")) as process:
        yield Server(process.pid, int(_line(process)), "nqn.2024-01.org.example:echo")


@contextlib.contextmanager
def _running(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(END_SECONDS)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a server ended: {process.stderr.read().strip()[-500:]}")
    return line


# --- until ready


def _ready_rows(label: str, data: Path) -> list[Row]:
    def command() -> float:
        started = time.perf_counter()
        with ours(data) as server:
            first_block((HOST, server.port), server.nqn)
            return time.perf_counter() - started

    program = "import space.cli, space._node.nvme_view, uvloop"
    imports = lambda: timed(lambda: subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True))  # noqa: E731
    library = lambda: float(in_child("bench.bench_nvme:ready", str(data)).result)  # noqa: E731
    found = {
        name: _middle(each) for name, each in (("library", library), ("command", command), ("", imports))
    }
    case = f"{label}: command to first block"
    return [
        Row(f"{label}: open store to first block", "s", found["library"], "aim", AIM_SECONDS),
        Row(case, "s", found["command"], "its imports alone", found[""]),
    ]


def _middle(measure: Callable[[], float]) -> float:
    return statistics.median(measure() for _ in range(ROUNDS))


def ready(data: str) -> float:
    """Serves ``/device`` of an open store, and reads its first block as a host; seconds until then."""
    found: list[float] = []

    def look(document: Document) -> None:
        try:
            first_block((HOST, int(document["address"].rpartition(":")[2])), document["nqn"])
            found.append(time.perf_counter() - started)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_ready(document: Document) -> None:
        threading.Thread(target=look, args=(document,)).start()

    with Store(Path(data), create=False) as store:
        started = time.perf_counter()
        nvme_view.serve(store, ["/device"], listen=(HOST, 0), read_only=False, ready=on_ready)
    if not found:
        raise RuntimeError("the first block could not be read")
    return found[0]


def clone(home: str, size: int) -> float:
    """Seconds a writable clone of a device takes that is dense in its first MiB."""
    with Store(Path(home)) as store:
        device = store.create(Kind.FILE, parent=store.root, name=b"device", size=size, block_size=BLOCK)
        store.write(device, 0, os.urandom(1 << 20))
        return timed(lambda: store.clone("/device", "/clone"))
