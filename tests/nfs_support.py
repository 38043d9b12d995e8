"""A served store for the tests of the NFS view."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any, Final

import attrs

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
