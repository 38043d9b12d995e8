"""``view``: from ``space project mount`` to the first byte read, and what the mount writes to the disk.

A capsule of 1 KiB and two of 10 GiB, one sparse and one dense: neither size may matter.  The time begins
before the program starts, so it holds the start of Python too; what a bare start costs is the peer.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench.measure import ROOT, Row, Scale, in_child, in_turn, timed
from space._node.store import Store

LARGE_BYTES: Final = 10 << 30
AIM_SECONDS: Final = 0.05
AIM_WRITTEN_KIB: Final = 1024
_SECONDS_TO_STOP: Final = 30
_FRAME_BYTES: Final = 64 << 10
_CLI: Final = (sys.executable, "-c", "from space.cli import main; main()")


def run(scale: Scale) -> list[Row]:
    """Seconds to the first byte, and KiB written meanwhile, by capsule."""
    large = scale.pick(LARGE_BYTES, 64 << 20)
    rows = []
    with scale.workspace("view") as home:
        for name, size, dense in (("1 KiB", 1024, True), ("sparse", large, False), ("dense", large, True)):
            data = home / name
            in_child("bench.bench_view:make", str(data), size, dense)
            label = name if size == 1024 else f"{size / 2**30:.3g} GiB {name}"
            rows += _rows(label, _Mounts(data, home / "mountpoint"))
            scale.note(f"view: {label} done")
    return rows


def _rows(label: str, mounts: _Mounts) -> list[Row]:
    def interpreter() -> float:
        return timed(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True))

    found = in_turn({"mount": mounts.first_byte, "python": interpreter})
    seconds, python = found["mount"], found["python"]
    case = f"{label}: command to first byte"
    return [
        Row(case, "s", seconds, "aim", AIM_SECONDS),
        Row(case, "s", seconds, "python -c pass", python),
        Row(f"{label}: mount ready", "s", mounts.ready_seconds, "aim", AIM_SECONDS),
        Row(f"{label}: written to disk", "KiB", mounts.written_bytes / 1024, "aim", AIM_WRITTEN_KIB),
    ]


class _Mounts:
    """Mounts a store's one capsule again and again; keeps the largest of what is not returned."""

    def __init__(self, data: Path, target: Path) -> None:
        self._data = data
        self._target = target
        self.ready_seconds = 0.0
        self.written_bytes = 0

    def first_byte(self) -> float:
        """Seconds from the start of the command until a byte came through the kernel."""
        self._target.mkdir(exist_ok=True)
        command = (
            *_CLI,
            "--data",
            self._data,
            "project",
            "mount",
            "--path",
            "/large",
            "--target",
            self._target,
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        started = time.perf_counter()
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            try:
                line = process.stdout.readline()
                if not line:
                    raise RuntimeError(f"space project mount: {process.stderr.read().strip()[-500:]}")
                with (self._target / "content").open("rb", buffering=0) as file:
                    if len(file.read(1)) != 1:
                        raise RuntimeError("the mounted capsule is empty")
                seconds = time.perf_counter() - started
                self.ready_seconds = max(self.ready_seconds, json.loads(line)["ready_ms"] / 1000)
                self.written_bytes = max(self.written_bytes, _written(process.pid))
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(_SECONDS_TO_STOP)
        return seconds


def _written(pid: int) -> int:
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("write_bytes:"):
            return int(line.split()[1])
    raise RuntimeError("the kernel does not say write_bytes")


def make(home: str, size: int, dense: bool) -> int:
    """A store with one capsule, ``/large``: dense, or with its first KiB alone."""
    with Store(home) as store:
        made = store.put(_Stream(size if dense else 1024), name="/large")  # type: ignore[arg-type]
        store.resize(made.id, size)
        return made.size


class _Stream:
    """Bytes that neither compress nor repeat, cheaply: one random frame with a number in front."""

    read: Callable[[int], bytes]

    def __init__(self, size: int) -> None:
        self._left = size
        self._frame = random.Random(1).randbytes(_FRAME_BYTES - 8)
        self._number = 0
        self.read = self._read

    def _read(self, length: int) -> bytes:
        parts = []
        for _ in range(max(1, min(length, self._left) // _FRAME_BYTES)):
            self._number += 1
            parts.append(self._number.to_bytes(8, "big") + self._frame)
        piece = b"".join(parts)[: min(length, self._left)]
        self._left -= len(piece)
        return piece
