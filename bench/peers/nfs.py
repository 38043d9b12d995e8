"""NFS servers under a benchmark: ours over a store, and ganesha over a directory of the same disk.

Both answer to root from the loopback without squashing, and neither has a grace period to sit out.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Final, Protocol

from bench.peers.programs import HOST, Program, find, free_ports, wait_for
from tests.cli_support import command

GANESHA: Final = "ganesha.nfsd"

_CONFIGURATION: Final = """
NFS_CORE_PARAM {{ NFS_Port = {port}; NFS_Protocols = 4; Enable_NLM = false; Enable_RQUOTA = false;
                  Enable_UDP = false; Bind_addr = {host}; }}
NFSv4 {{ Graceless = true; Only_Numeric_Owners = true; Minor_Versions = 1, 2;
         RecoveryBackend = fs; RecoveryRoot = {home}/recovery; }}
EXPORT {{ Export_Id = 1; Path = {home}/export; Pseudo = /export; Access_Type = RW; Squash = No_Root_Squash;
          SecType = sys; Protocols = 4; Transports = TCP; FSAL {{ Name = VFS; }} }}
LOG {{ Default_Log_Level = EVENT; }}
"""


class Server(Protocol):
    """A running server.

    Attributes:
        port: where it listens on the loopback.
        path: of the export, from the server's root.
        pid: of its process.
    """

    port: int
    path: str
    pid: int

    def close(self) -> None:
        """Ends the server."""


class Ganesha:
    """nfs-ganesha with its VFS backend, from Debian's packages nfs-ganesha and nfs-ganesha-vfs."""

    path = "export"

    def __init__(self, home: Path) -> None:
        for name in ("export", "recovery"):
            (home / name).mkdir(parents=True)
        (self.port,) = free_ports(1)
        configuration = home / "configuration"
        configuration.write_text(_CONFIGURATION.format(port=self.port, host=HOST, home=home))
        program = find(GANESHA)
        assert program is not None
        self._program = Program(
            [program, "-F", "-f", str(configuration), "-L", str(home / "log"), "-p", str(home / "pid")],
            home / "program",
        )
        self.pid = self._program.process.pid
        wait_for("ganesha", lambda: answers(self.port))

    def close(self) -> None:
        self._program.end()


class Ours:
    """``space project --view nfs`` over a new store."""

    path = ""

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True)
        words = command("--data", home / "data", "project", "--view", "nfs", "--path", "/")
        words += ["--squash", "none", "--grace", "0", "--listen", f"{HOST}:0"]
        self._program = Program(words, home / "program", talk=True)
        self.pid = self._program.process.pid
        line = self._program.output.readline()
        if not line:
            raise RuntimeError(f"space project --view nfs: {self._program.last_words()}")
        self.port = int(json.loads(line)["address"].rpartition(":")[2])

    def close(self) -> None:
        self._program.end()


def answers(port: int) -> bool:
    """Whether somebody accepts connections there."""
    with socket.create_connection((HOST, port), 1.0):
        return True
