"""``view``: from ``space project mount`` to the first byte read, and what the mount writes to the disk.

A capsule of 1 KiB and two of 10 GiB, one sparse and one dense: neither size may matter.  The time of the
command begins before the program starts, so most of it is the start of Python and its imports; the time of the
library is that of a program that has imported everything: open the store, mount, read.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench.measure import ROOT, Row, Scale, in_child, in_turn, timed
from space._node.local_vfs import LocalFileSystem
from space._node.store import Store
from space.projections.fuse import mount

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
    def imports() -> float:
        program = "import space.cli, space._node.local_vfs, pyfuse3"
        return timed(lambda: subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True))

    found = in_turn({"command": mounts.first_byte, "library": mounts.in_library, "imports": imports})
    case = f"{label}: command to first byte"
    return [
        Row(case, "s", found["command"], "aim", AIM_SECONDS),
        Row(case, "s", found["command"], "its imports alone", found["imports"]),
        Row(f"{label}: library to first byte", "s", found["library"], "aim", AIM_SECONDS),
        Row(f"{label}: written to disk", "KiB", mounts.written_bytes / 1024, "aim", AIM_WRITTEN_KIB),
    ]


class _Mounts:
    """Mounts a store's one capsule again and again.

    Attributes:
        written_bytes: the most that a mount wrote.
    """

    def __init__(self, data: Path, target: Path) -> None:
        self._data = data
        self._target = target
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
                self.written_bytes = max(self.written_bytes, _written(process.pid))
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(_SECONDS_TO_STOP)
        return seconds

    def in_library(self) -> float:
        """Seconds from opening the store to the first byte, in a process that has imported everything."""
        self._target.mkdir(exist_ok=True)
        seconds: float = in_child("bench.bench_view:serve", str(self._data), str(self._target)).result
        return seconds


def serve(home: str, target: str) -> float:
    """Opens, mounts, reads a byte through the kernel, unmounts; seconds up to the byte."""
    found: list[float] = []

    def first_byte() -> None:
        try:
            with (Path(target) / "content").open("rb", buffering=0) as file:
                if file.read(1):
                    found.append(time.perf_counter() - started)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    importlib.import_module("space.projections.fuse.ops")  # mount would import it
    started = time.perf_counter()
    with Store(home, create=False) as store:
        files = LocalFileSystem(store, store.resolve("/large"))
        mount.serve(files, target, on_ready=lambda _: threading.Thread(target=first_byte).start())
    if not found:
        raise RuntimeError("the mounted capsule could not be read")
    return found[0]


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
