"""``space csi``: the Container Storage Interface driver."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import attrs
import typer

from space._errors import RefusedError, UnavailableError, UsageError
from space._node.caller import Caller, Document
from space.cli_session import Session, emit, note, open_or_ask, to_json

if TYPE_CHECKING:
    import subprocess

    from space._node.csi_client import Ask
    from space._node.csi_owner import VolumeTarget
    from space._node.csi_servers import Listening
    from space._node.store import Store

ENDPOINT_DEFAULT: Final = "csi.sock"
ZONE_DEFAULT: Final = "default"
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
    str | None,
    typer.Option(
        "--zone",
        metavar="ZONE",
        envvar="CSI_ZONE",
        help="Where volumes are reached: default; of --remote, its own.",
    ),
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
Nfs = Annotated[
    str | None,
    typer.Option("--nfs", metavar="HOST:PORT", help="The owner serves volumes over NFS there; else not."),
]
Nvme = Annotated[
    str | None,
    typer.Option(
        "--nvme", metavar="HOST:PORT", help="The owner serves volumes over NVMe/TCP there; else not."
    ),
]
Advertise = Annotated[
    str,
    typer.Option(
        "--advertise", metavar="HOST", help="Where nodes reach these; else the HOST they listen at."
    ),
]
NfsClient = Annotated[
    list[str] | None,
    typer.Option("--nfs-client", metavar="NETWORK[:ro]", help="Only these clients; else any. Repeatable."),
]
Remote = Annotated[
    bool, typer.Option("--remote", help="This node has no store: volumes over NFS and NVMe/TCP only.")
]
NodeAddress = Annotated[
    str,
    typer.Option(
        "--node-address",
        metavar="IP",
        envvar="NODE_ADDRESS",
        help="With --remote: this node, as servers see it.",
    ),
]
NoSpawn = Annotated[bool, typer.Option("--no-spawn", help="Wait for an owner of the store; never start one.")]


def csi(
    context: typer.Context,
    mode: Mode = "all",
    endpoint: Endpoint = None,
    node_id: NodeId = None,
    zone: Zone = None,
    max_volumes: Limit = 0,
    state: State = None,
    metrics: Metrics = "",
    no_spawn: NoSpawn = False,
    gc_hours: GcHours = 0,
    nfs: Nfs = None,
    nvme: Nvme = None,
    advertise: Advertise = "",
    nfs_client: NfsClient = None,
    remote: Remote = False,
    node_address: NodeAddress = "",
) -> None:
    """Serve volumes to a container orchestrator (CSI 1.12) until interrupted.

    The store's volumes are shown and its calls answered by a process of their own (--mode store), which "all" and
    "node" start where it is not running, and which goes on when they end: space project stop DIR/csi/volumes ends it.
    With --nfs and --nvme it serves them to other machines, whose driver is --mode node --remote.
    """
    session: Session = context.obj
    if session.node and mode != "controller":
        raise UsageError(
            "with --node, volumes are a cluster's: only --mode controller asks it",
            hint="on the other machines: space csi --mode node --remote, without --node",
        )
    check_available()
    from space._node.csi_driver import MODES

    if mode not in MODES:
        raise UsageError(f"no mode {mode!r}", hint=f"there is: {', '.join(MODES)}")
    if session.node and not endpoint:
        raise UsageError("a controller of a cluster has no directory", hint="--endpoint unix://PATH")
    if mode != "controller" and os.geteuid() != 0:
        raise RefusedError("volumes are mounted, which needs root", hint="only --mode controller does not")
    data = session.data.absolute()
    home = (state or data / STATE).absolute()
    owner = OwnerOptions(gc_hours, nfs, nvme, advertise, tuple(nfs_client or ()))
    where = owner.listening()
    if mode == "store":
        _serve_store(data, home, gc_hours, where)
        return
    name = _node_name(node_id)
    if remote and mode != "node":
        raise UsageError("--remote is of --mode node", hint="the other modes are where the store is")
    if node_address and not remote:
        raise UsageError("--node-address is of --remote", hint="a node with the store needs none")
    node = _remote_id(name, node_address) if remote else name
    _serve_driver(
        data,
        home,
        mode=mode,
        endpoint=endpoint or str(data / ENDPOINT_DEFAULT),
        node=node,
        zone=zone or (name if remote else ZONE_DEFAULT),
        limit=max_volumes,
        metrics=metrics,
        spawn=None if remote or mode == "controller" or no_spawn else owner,
        remote=remote,
        cluster=session.node or "",
        certificate=session.certificate,
    )


@attrs.frozen
class OwnerOptions:
    """What the owner of the store is told on its command line."""

    gc_hours: float
    nfs: str | None
    nvme: str | None
    advertise: str
    nfs_clients: tuple[str, ...]

    def listening(self) -> Listening | None:
        """What it is to serve, and where; None for nothing.

        Raises:
            UsageError: an option is not what it should be.
        """
        if not (self.nfs or self.nvme):
            if self.advertise or self.nfs_clients:
                raise UsageError("nothing is served to others", hint="--nfs HOST:PORT, --nvme HOST:PORT")
            return None
        from space._node.csi_servers import Listening
        from space._node.nvme_view import parse_listen
        from space.projections.nfs.exports import parse_rule

        return Listening(
            parse_listen(self.nfs) if self.nfs else None,
            parse_listen(self.nvme) if self.nvme else None,
            self.advertise,
            tuple(map(parse_rule, self.nfs_clients)),
        )

    def arguments(self) -> list[str]:
        """The same for another process."""
        found = ["--gc-hours", str(self.gc_hours)]
        for option, value in (("--nfs", self.nfs), ("--nvme", self.nvme), ("--advertise", self.advertise)):
            found += [option, value] if value else []
        for each in self.nfs_clients:
            found += ["--nfs-client", each]
        return found


def _remote_id(name: str, address: str) -> str:
    """The id of a node without a store: the controller has to know that, and from where it comes.

    Raises:
        UsageError: no address.
    """
    from ipaddress import ip_address

    from space.projections.csi.model import NODE_ADDRESS

    try:
        shown = str(ip_address(address)) if address else ""
    except ValueError:
        raise UsageError(f"not an address: {address!r:.100}", hint="--node-address IP") from None
    found = f"{name}{NODE_ADDRESS}{shown}"
    if len(found) > NODE_CHARACTERS_MAX:
        raise UsageError(f"the name of a node and its address are too long together: {found}")
    return found


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


def _serve_store(data: Path, home: Path, gc_hours: float, where: Listening | None) -> None:
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
        where=where,
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
    spawn: OwnerOptions | None,
    remote: bool,
    cluster: str,
    certificate: Path | None,
) -> None:
    import asyncio
    import logging

    from space._node.csi_driver import Config, Driver
    from space.projections.csi.model import Node

    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    ask = None if remote else _cluster_asker(cluster, certificate) if cluster else _asker(data)
    if not (remote or cluster):
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not cluster:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    config = Config(mode, endpoint, Node(node, zone, limit), home, data, _version(), metrics, remote)

    def ready(found: Document) -> None:
        emit(to_json(found))
        sys.stdout.flush()
        note(f"CSI on {found['endpoint']}")

    async def run() -> None:
        start = None if spawn is None else lambda: _spawn(data, home, spawn)
        await Driver(config, ask, start).run(ready)

    asyncio.run(run())


def _asker(data: Path) -> Ask:
    """How the owner is asked: on the control socket of the data directory."""
    from space.control import SOCKET, SocketEndpoint, result_of, understood

    endpoint = SocketEndpoint(data / SOCKET)

    def ask(method: str, arguments: Document) -> Any:
        answers = endpoint.ask({"method": method, "arguments": arguments}, None)
        return result_of(understood(answers, Caller()))

    return ask


def _cluster_asker(cluster: str, certificate: Path | None) -> Ask:
    """How the nodes of a cluster are asked: whichever answers, and again after it died, with one number for a call.

    Each thread has a way of its own, as a caller has one call at a time.

    Raises:
        UsageError: they are no addresses.
    """
    import threading

    from space.remote import Nodes, endpoints

    endpoints(cluster, certificate)
    local = threading.local()

    def ask(method: str, arguments: Document) -> Any:
        if not hasattr(local, "nodes"):
            local.nodes = Nodes(endpoints(cluster, certificate))
        return getattr(local.nodes, method)(**arguments)

    return ask


def _spawn(data: Path, home: Path, options: OwnerOptions) -> subprocess.Popen[bytes]:
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
        *options.arguments(),
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
