"""``space csi``: the Container Storage Interface driver."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from space._errors import RefusedError, UnavailableError, UsageError
from space._node.caller import Caller, Document
from space.cli_session import Session, emit, note, open_or_ask, to_json

if TYPE_CHECKING:
    import subprocess

    from space._node.csi_client import Ask
    from space._node.csi_owner import VolumeTarget
    from space._node.store import Store

ENDPOINT_DEFAULT: Final = "csi.sock"
STATE: Final = "csi"
MOUNT: Final = "volumes"
NODE_CHARACTERS_MAX: Final = 192  # the specification's

Mode = Annotated[
    str,
    typer.Option(
        "--mode", metavar="MODE", help="all, controller, node, or store (the volumes' owner alone)."
    ),
]
Endpoint = Annotated[
    str | None,
    typer.Option(
        "--endpoint", metavar="unix://PATH", envvar="CSI_ENDPOINT", help="The socket; else DIR/csi.sock."
    ),
]
NodeId = Annotated[
    str | None,
    typer.Option("--node-id", metavar="NAME", envvar="NODE_ID", help="This machine; else its host name."),
]
Zone = Annotated[
    str, typer.Option("--zone", metavar="ZONE", envvar="CSI_ZONE", help="Where volumes are reached.")
]
Limit = Annotated[
    int, typer.Option("--max-volumes", metavar="N", min=0, help="Volumes one node may have; 0 is any number.")
]
State = Annotated[
    Path | None,
    typer.Option("--state", metavar="DIR", help="Notes and the mount of all volumes; else DIR/csi."),
]
Metrics = Annotated[str, typer.Option("--metrics", metavar="HOST:PORT", help="Answer /metrics there.")]
GcHours = Annotated[
    float, typer.Option("--gc-hours", metavar="N", min=0, help="Give space back every N hours; 0 is never.")
]
NoSpawn = Annotated[bool, typer.Option("--no-spawn", help="Wait for an owner of the store; never start one.")]


def csi(
    context: typer.Context,
    mode: Mode = "all",
    endpoint: Endpoint = None,
    node_id: NodeId = None,
    zone: Zone = "default",
    max_volumes: Limit = 0,
    state: State = None,
    metrics: Metrics = "",
    no_spawn: NoSpawn = False,
    gc_hours: GcHours = 0,
) -> None:
    """Serve volumes to a container orchestrator (CSI 1.12) until interrupted.

    The store's volumes are shown and its calls answered by a process of their own (--mode store), which "all" and
    "node" start where it is not running, and which goes on when they end: space project stop DIR/csi/volumes ends it.
    """
    session: Session = context.obj
    if session.node:
        raise UsageError("a driver is where the store is", hint="leave --node out, and say --data DIR")
    check_available()
    from space._node.csi_driver import MODES

    if mode not in MODES:
        raise UsageError(f"no mode {mode!r}", hint=f"there is: {', '.join(MODES)}")
    if mode != "controller" and os.geteuid() != 0:
        raise RefusedError("volumes are mounted, which needs root", hint="only --mode controller does not")
    data = session.data.absolute()
    home = (state or data / STATE).absolute()
    if mode == "store":
        _serve_store(data, home, gc_hours)
        return
    _serve_driver(
        data,
        home,
        mode=mode,
        endpoint=endpoint or str(data / ENDPOINT_DEFAULT),
        node=_node_name(node_id),
        zone=zone,
        limit=max_volumes,
        metrics=metrics,
        spawn=mode != "controller" and not no_spawn,
        gc_hours=gc_hours,
    )


def check_available() -> None:
    """Whether the driver's packages are installed.

    Raises:
        UnavailableError: one is not.
    """
    from importlib.util import find_spec

    for package in ("grpc", "google.protobuf"):
        with contextlib.suppress(ModuleNotFoundError):
            if find_spec(package) is not None:
                continue
        raise UnavailableError(
            f"the Python package {package} is not installed", hint="pip install 'space-store[csi]'"
        )


def _node_name(given: str | None) -> str:
    import re
    import socket

    name = given or socket.gethostname()
    if len(name) > NODE_CHARACTERS_MAX or not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name):
        raise UsageError(f"not the name of a node: {name!r:.200}", hint="--node-id NAME")
    return name


def _serve_store(data: Path, home: Path, gc_hours: float) -> None:
    """Owns the store and shows its volumes, until it is told to end."""
    import logging

    from space._node import csi_owner
    from space.control import ControlServer

    def ready(view: Document) -> None:
        for line in view.pop("notices"):
            note(line)
        emit(to_json(view))
        sys.stdout.flush()

    def control(target: VolumeTarget) -> ControlServer:
        return ControlServer(target)

    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    csi_owner.serve(
        data,
        str(home / MOUNT),
        lambda stack: stack.enter_context(_owned(data)),
        control,
        ready,
        collect_seconds=gc_hours * 3600,
    )


def _owned(data: Path) -> Store:
    """The store, opened by this process and no other.

    Raises:
        UnavailableError: another process keeps it.
    """
    store, asked = open_or_ask(data, Caller(), create=True)
    if store is None:
        assert asked is not None
        raise UnavailableError(
            f"store {data} is in use by process {asked.owner()['pid']}",
            hint="space project ls shows what it serves",
        )
    return store


def _serve_driver(
    data: Path,
    home: Path,
    *,
    mode: str,
    endpoint: str,
    node: str,
    zone: str,
    limit: int,
    metrics: str,
    spawn: bool,
    gc_hours: float,
) -> None:
    import asyncio
    import logging

    from space._node.csi_driver import Config, Driver
    from space.projections.csi.model import Node

    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    config = Config(mode, endpoint, Node(node, zone, limit), home, data, _version(), metrics)

    def ready(found: Document) -> None:
        emit(to_json(found))
        sys.stdout.flush()
        note(f"CSI on {found['endpoint']}")

    async def run() -> None:
        await Driver(config, _asker(data), (lambda: _spawn(data, home, gc_hours)) if spawn else None).run(
            ready
        )

    asyncio.run(run())


def _asker(data: Path) -> Ask:
    """How the owner is asked: on the control socket of the data directory."""
    from space.control import SOCKET, SocketEndpoint, result_of, understood

    endpoint = SocketEndpoint(data / SOCKET)

    def ask(method: str, arguments: Document) -> Any:
        answers = endpoint.ask({"method": method, "arguments": arguments}, None)
        return result_of(understood(answers, Caller()))

    return ask


def _spawn(data: Path, home: Path, gc_hours: float) -> subprocess.Popen[bytes]:
    """An owner in a session of its own: no signal meant for the driver reaches it."""
    import subprocess

    program = "import sys; from space.cli import main; sys.exit(main())"
    command = [
        sys.executable,
        "-c",
        program,
        "--data",
        str(data),
        "csi",
        "--mode",
        "store",
        "--state",
        str(home),
        "--gc-hours",
        str(gc_hours),
    ]
    with open(home / "store.log", "ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, close_fds=True
        )


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("space-store")
    except PackageNotFoundError:
        return "unknown"
