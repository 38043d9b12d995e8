"""A mount in a process of its own, for tests that need the kernel; also the program that process runs."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import attrs
import pytest

from space._node.local_vfs import LocalFileSystem
from space._node.store import Store
from space.projections.fuse.mount import Ready, _Device, mounted_at, serve

REPOSITORY = Path(__file__).parent.parent
NEEDS_FUSE = pytest.mark.requires("/dev/fuse", "fusermount3", "py:pyfuse3")


class Mount:
    """A kernel mount of a data directory, served by a child process."""

    def __init__(self, data: Path, target: Path, *options: str) -> None:
        self.data = data
        self.target = target
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuse_support", str(data), str(target), *options],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._errors: list[str] = []
        assert self._process.stdout
        assert self._process.stderr
        self._reader = threading.Thread(target=self._read_errors, args=(self._process.stderr,))
        self._reader.start()
        line = self._process.stdout.readline()
        if not line:
            self.wait()
        assert line, f"not mounted: {self.errors}"
        self.ready: dict[str, Any] = json.loads(line)

    def _read_errors(self, stream: IO[str]) -> None:
        self._errors.extend(stream)

    @property
    def errors(self) -> str:
        """What the process said on standard error so far."""
        return "".join(self._errors)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self) -> int:
        status = self._process.wait(timeout=120)
        self._reader.join()
        for stream in (self._process.stdout, self._process.stderr):
            if stream:
                stream.close()
        return status

    def stop(self) -> None:
        """A clean end, by SIGTERM."""
        self._process.send_signal(signal.SIGTERM)
        status = self.wait()
        assert status == 0, self.errors
        assert "Traceback" not in self.errors, self.errors

    def kill(self) -> None:
        """The process is gone at once (kill -9)."""
        self._process.kill()
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            if kind is None:
                self.stop()
            else:
                self._process.kill()
                self.wait()
        if mounted_at(str(self.target.resolve() if kind is None else self.target)):
            subprocess.run(["fusermount3", "-u", "-z", str(self.target)], check=False)


@contextlib.contextmanager
def opened(data: Path) -> Iterator[Store]:
    """The store, while no mount has it."""
    with Store(data) as store:
        yield store


def _tell_too_early() -> None:
    """Before each request the device is said to have one when it has none, as if one had been taken back."""
    wait, calls = _Device.wait_readable, itertools.count()

    async def early(device: _Device, descriptor: int) -> None:
        if next(calls) % 2:
            await wait(device, descriptor)

    _Device.wait_readable = early  # type: ignore[method-assign,assignment]


def main() -> None:
    """Opens a data directory and serves it; the first line on standard output says that it is ready."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("target")
    parser.add_argument("--path", default="/")
    parser.add_argument("--at")
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--nothing-to-read", action="store_true")
    options = parser.parse_args()
    if options.nothing_to_read:
        _tell_too_early()

    def ready(found: Ready) -> None:
        sys.stdout.write(json.dumps(attrs.asdict(found)) + "\n")
        sys.stdout.flush()

    with Store(options.data) as store:
        reading = store.at(options.at) if options.at else store
        try:
            root = reading.resolve(options.path)
            files = LocalFileSystem(reading, root, read_only=options.read_only)
            serve(files, options.target, allow_other=os.geteuid() == 0, on_ready=ready)
        finally:
            if reading is not store:
                reading.close()


if __name__ == "__main__":
    main()
