"""A served store for the tests of the NFS view."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import attrs

from space._node.local_vfs import LocalFileSystem
from space._node.store import Store
from space.events.ids import ROOT
from space.projections.nfs.exports import Export, Exports, Squash
from space.projections.nfs.server import Clock, Listener, Server, Tasks, make_shell
from space.projections.nfs.service import Config, Recovery, Service
from tests.cli_support import finish, start

LEASE_SECONDS: Final = 5
GRACE_SECONDS: Final = 5


@attrs.define
class View:
    """A store served by ``space project --view nfs``; ``restart`` serves it again at the same address."""

    data: Path
    arguments: list[str]
    process: subprocess.Popen[str] = attrs.field(init=False)
    ready: dict[str, Any] = attrs.field(init=False)

    def start(self, listen: str = "127.0.0.1:0") -> None:
        words = ["--lease", f"{LEASE_SECONDS}", "--grace", f"{GRACE_SECONDS}", *self.arguments]
        self.process = start(self.data, "project", "--view", "nfs", *words, "--listen", listen, stderr=None)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the view did not start"
        self.ready = json.loads(line)

    @property
    def port(self) -> int:
        return int(self.ready["address"].rpartition(":")[2])

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    def kill(self) -> None:
        """As kill -9 does it."""
        self.process.kill()
        finish(self.process)

    def restart(self) -> None:
        self.start(f"127.0.0.1:{self.port}")

    def again(self) -> str:
        """Kills it and serves the store anew."""
        self.kill()
        self.restart()
        return "served"

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def memory(self) -> int:
        """Bytes of memory it holds."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
        raise AssertionError("the kernel does not say VmRSS")

    def stop(self) -> None:
        """As an operator does it: the end is clean."""
        self.process.send_signal(signal.SIGTERM)
        assert finish(self.process).status == 0


Serve = Callable[..., View]
"""Starts a view with these arguments."""


class Logged(logging.Handler):
    """Keeps what is logged as an error: a served client must never be able to cause one."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.errors.append(self.format(record))


class Threaded:
    """A new store's tree, served by a thread of this process.

    Attributes:
        address: where.
        errors: what the server logged as errors.
    """

    def __init__(self, data: Path) -> None:
        self.address = ("127.0.0.1", 0)
        self._data = data
        self._log = Logged()
        self._up = threading.Event()
        self._over: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        logging.getLogger("space").addHandler(self._log)
        self._thread.start()
        self._up.wait()

    @property
    def errors(self) -> list[str]:
        return self._log.errors

    async def _serve(self) -> None:
        try:
            over = asyncio.Event()
            loop = asyncio.get_running_loop()
            self._over = lambda: loop.call_soon_threadsafe(over.set)
            with Store(self._data) as store:
                tasks = Tasks()
                files = LocalFileSystem(store, ROOT)
                exports = Exports([Export(1, (), files, squash=Squash.NONE)], key=bytes(32))
                shell, recovery = make_shell(tasks), Recovery(1)
                service = Service(exports, shell, recovery, name=b"fuzzed", now=loop.time(), config=Config())
                server = Server(service, tasks, Clock(asyncio.get_running_loop().time))
                self.address = await server.start(Listener(port=0))
                self._up.set()
                await over.wait()
                await server.close()
        finally:
            self._up.set()

    def close(self) -> None:
        """Ends it."""
        self._over()
        self._thread.join()
        logging.getLogger("space").removeHandler(self._log)
