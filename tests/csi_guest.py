"""A node without a store in a throw-away guest (tests/guest/csi_node.py), and what it can ask its test."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from tests import guest_support
from tests.cli_support import ROOT

PACKAGES: Final = (
    "annotated_doc",
    "attr",
    "attrs",
    "blake3",
    "google",
    "grpc",
    "shellingham",
    "typer",
    "typing_extensions",
)
"""What a node's driver needs."""

HOST: Final = "10.0.2.2"
"""This machine, for a guest."""

SANITY: Final = os.environ.get("CSI_SANITY") or shutil.which("csi-sanity") or ""
PASSED_MIN: Final = 94
"""Of 96: one is pending in the suite, and one is of a limit of volumes, which such a node has none of."""


class Answers:
    """Whoever answers what nodes ask: by methods whose names begin with ``on_``."""

    def answers(self) -> dict[str, Callable[..., str]]:
        """What a node can ask."""
        return {
            name.removeprefix("on_"): _as_json(getattr(self, name))
            for name in dir(self)
            if name.startswith("on_")
        }


def _as_json(work: Callable[..., Any]) -> Callable[..., str]:
    return lambda *words: json.dumps(work(*words))


def run(owner: Answers, home: Path, job: str, *arguments: str, name: str = "worker") -> str:
    """What a job prints that a node does, which must end well."""
    home.mkdir(exist_ok=True)
    packages = home / "share" / "packages"
    packages.mkdir(parents=True)
    for each in PACKAGES:
        _copy(each, packages)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "space", packages / "space", ignore=ignored)
    (packages / "tests" / "guest").mkdir(parents=True)
    for each in ("csi_client.py", "csi_killed_worker.py", "guest/csi_node.py"):
        shutil.copy(ROOT / "tests" / each, packages / "tests" / each)
    said = guest_support.run([name, job, *arguments], "csi_prelude.sh", "", home, **owner.answers())
    assert guest_support.facts(said)["ended"] == "well", said
    return said


def _copy(package: str, to: Path) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    if spec.submodule_search_locations:
        for found in spec.submodule_search_locations:
            shutil.copytree(
                found, to / package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
            )
    else:
        assert spec.origin is not None
        shutil.copy(spec.origin, to)


@contextlib.contextmanager
def forwarding(to: Path) -> Iterator[int]:
    """A port of this machine that leads to a socket of it: guests reach ports only."""

    class Both(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.socket(socket.AF_UNIX) as other:
                other.connect(str(to))
                back = threading.Thread(target=copy, args=(other, self.request))
                back.start()
                copy(self.request, other)
                back.join()

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Both) as server:
        server.daemon_threads = True
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield int(server.server_address[1])
        server.shutdown()
        serving.join()
