"""``space project``: views of capsules and trees, mounted, listed and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple, cast

import typer

from space._errors import UnavailableError, UsageError
from space._node.caller import Caller, Document
from space.cli_csi import csi
from space.cli_session import At, Session, ask_owner, clean, emit, note, open_or_ask, to_json

if TYPE_CHECKING:
    from space._node.beside import PastBeside
    from space._node.store import Store

project_app = typer.Typer(no_args_is_help=False, help="Views of capsules and trees: mount, list, stop.")

NODE_POLL_SECONDS: Final = 0.5
VIEWS: Final = ("fuse", "nvme", "nfs", "csi")

PathOption = Annotated[str | None, typer.Option("--path", metavar="PATH", help="A tree or file.")]
Target = Annotated[str | None, typer.Option("--target", metavar="DIR", help="Where to mount it.")]
ReadOnly = Annotated[bool, typer.Option("--read-only", help="Refuse changes.")]
Listen = Annotated[
    str | None,
    typer.Option("--listen", metavar="HOST:PORT", help="nvme, nfs: where hosts and clients connect."),
]
Hosts = Annotated[
    list[str] | None, typer.Option("--host", metavar="NQN", help="nvme: only these hosts may connect.")
]
HostKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--host-key",
        metavar="NQN=FILE",
        help="nvme: a host that must prove its name with the secret in FILE, or env:NAME.",
    ),
]
ControllerKey = Annotated[
    str | None,
    typer.Option(
        "--controller-key", metavar="FILE", help="nvme: the secret that proves this side to hosts that ask."
    ),
]
Squashed = Annotated[
    str | None,
    typer.Option(
        "--squash", metavar="WHO", help="nfs: whose requests are nobody's: root (default), all, none."
    ),
]
Clients = Annotated[
    list[str] | None,
    typer.Option("--client", metavar="NETWORK[:ro]", help="nfs: only clients of these addresses."),
]
Lease = Annotated[
    int | None,
    typer.Option("--lease", metavar="SECONDS", help="nfs: how long a silent client keeps its locks."),
]
Grace = Annotated[
    int | None,
    typer.Option("--grace", metavar="SECONDS", help="nfs: how long clients may reclaim after a restart."),
]
Refer = Annotated[
    list[str] | None,
    typer.Option(
        "--refer",
        metavar="ZONE=HOST[:PORT][:/PATH]",
        help="nfs: send clients of /zones/ZONE to that zone's server.",
    ),
]
Background = Annotated[bool, typer.Option("--background", help="Return as soon as it is ready.")]


@project_app.callback(invoke_without_command=True)
def project(
    context: typer.Context,
    view: Annotated[
        str | None, typer.Option("--view", metavar="NAME", help="What to serve: fuse, nvme, nfs, csi.")
    ] = None,
    id: Annotated[list[str] | None, typer.Option("--id", metavar="C", help="A capsule.")] = None,  # noqa: A002
    path: Annotated[list[str] | None, typer.Option("--path", metavar="PATH", help="A tree or file.")] = None,
    target: Target = None,
    listen: Listen = None,
    host: Hosts = None,
    host_key: HostKeys = None,
    controller_key: ControllerKey = None,
    squash: Squashed = None,
    client: Clients = None,
    lease: Lease = None,
    grace: Grace = None,
    refer: Refer = None,
    read_only: ReadOnly = False,
    background: Background = False,
    at: At = None,
) -> None:
    """Serve a view in the foreground until interrupted."""
    if context.invoked_subcommand is not None:
        return
    if view is None:
        raise UsageError(
            "say which view: --view fuse, nvme, nfs or csi, or one of: mount, ls, stop",
            hint="space project --help",
        )
    if view not in VIEWS:
        raise UsageError(f"no view {view!r}", hint=f"there is: {', '.join(VIEWS)}")
    nvme_only = {"--host": host, "--host-key": host_key, "--controller-key": controller_key}
    nfs_only = {"--squash": squash, "--client": client, "--lease": lease, "--grace": grace, "--refer": refer}
    sources = [*(id or ()), *(path or ())]
    if view == "nvme":
        _refuse(view, {"--target": target, "--background": background, **nfs_only})
        hosts = _Hosts(host or (), host_key or (), controller_key)
        _serve_nvme(context, sources, listen, at, read_only, hosts)
        return
    if view == "nfs":
        _refuse(view, {"--target": target, "--background": background, **nvme_only})
        offer = _Offer(squash or "root", client or (), lease, grace, refer or ())
        _serve_nfs(context, sources, listen, at, read_only, offer)
        return
    _refuse(view, {"--listen": listen, **nvme_only, **nfs_only})
    if view == "csi":
        chosen = {"--id": id, "--path": path, "--target": target, "--at": at}
        _refuse(view, {**chosen, "--read-only": read_only, "--background": background})
        csi(context)  # with options: space csi
        return
    if max(len(id or ()), len(path or ())) > 1:
        raise UsageError(
            "a fuse view shows one capsule or tree", hint="give one --id, or --path of a directory"
        )
    mount(context, id[0] if id else None, path[0] if path else None, target, read_only, background, at)


def _refuse(view: str, options: dict[str, object]) -> None:
    """Refuses options that another view has.

    Raises:
        UsageError: one of them was given.
    """
    for option, value in options.items():
        if value is not None and value is not False and value != []:
            raise UsageError(f"{option} is not for the view {view}", hint="space project --help")


@project_app.command()
def mount(
    context: typer.Context,
    id: Annotated[str | None, typer.Option("--id", metavar="C", help="A capsule.")] = None,  # noqa: A002
    path: PathOption = None,
    target: Target = None,
    read_only: ReadOnly = False,
    background: Background = False,
    at: At = None,
) -> None:
    """Mount a tree, or one capsule as DIR/content, through the kernel (FUSE)."""
    session: Session = context.obj
    if (id is None) == (path is None):
        raise UsageError("say what to mount: --id C or --path PATH")
    if target is None:
        raise UsageError("say where to mount it: --target DIR")
    session.data = _home(session)
    begun = time.monotonic()
    source, place = id or path or "/", str(Path(target).absolute())

    asked = ask_owner(session.data, Caller())
    if asked is not None and at is None and asked.owner().get("node") is not None:
        _mount_in_node(session, asked, source, place, read_only=read_only, background=background)
        return

    def serve(announce: Callable[[Document], None]) -> int:
        _serve_mount(session.data, source, place, at=at, read_only=read_only, begun=begun, announce=announce)
        return 0

    if not background:
        serve(_announced)
        return
    from space.projections.fuse.mount import daemonize

    _announced(daemonize(serve, log_file=session.data.absolute() / "mount.log"))


def _mount_in_node(
    session: Session, node: Any, source: str, target: str, *, read_only: bool, background: bool
) -> None:
    """Has the running node that owns the directory mount it; in the foreground, until this command is ended."""
    ready = node.mount(source=source, target=target, read_only=read_only)
    _announced(ready)
    if background:
        return
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    from space._node import views

    while not over.wait(NODE_POLL_SECONDS):
        if not any(view["target"] == ready["target"] for view in views.listed(session.data)):
            return
    node.unmount(target=ready["target"])


def _announced(ready: Document) -> None:
    for notice in ready.pop("notices"):
        note(notice)
    emit(to_json(ready))
    sys.stdout.flush()
    note(f"{ready['source']} is at {ready['target']}; end it with: space project stop {ready['target']}")


def _serve_mount(
    data: Path,
    source: str,
    target: str,
    *,
    at: str | None,
    read_only: bool,
    begun: float,
    announce: Callable[[Document], None],
) -> None:
    """Opens the store, or a past moment of it, mounts, and serves until it is told to end."""
    from space._node import views
    from space._node.local_vfs import LocalFileSystem
    from space.projections.fuse import mount as fuse

    fuse.check_available()
    with contextlib.ExitStack() as stack:
        reading = _reading(stack, data, at=at, create=source == "/")
        files = LocalFileSystem(reading, reading.resolve(source), read_only=read_only)

        def ready(found: fuse.Ready) -> None:
            view = {
                "view": "fuse",
                "name": f"fuse-{os.getpid()}",
                "source": source,
                "at": at,
                "read_only": files.read_only,
                "target": found.target,
                "address": found.target,
                "pid": os.getpid(),
                "started_ns": time.time_ns(),
            }
            stack.enter_context(views.registered(data, view))
            ready_ms = round((time.monotonic() - begun) * 1000, 1)
            announce({**view, "ready_ms": ready_ms, "notices": list(found.notices)})

        fuse.serve(files, target, fsname=f"space:{source}", on_ready=ready)


class _Hosts(NamedTuple):
    """The options that say who may connect."""

    names: Sequence[str]
    keys: Sequence[str]
    controller_key: str | None


def _serve_nvme(
    context: typer.Context,
    sources: list[str],
    listen: str | None,
    at: str | None,
    read_only: bool,
    hosts: _Hosts,
) -> None:
    """Offers capsules as namespaces to NVMe/TCP hosts until it is told to end."""
    session: Session = context.obj
    if not sources:
        raise UsageError("say what to serve: --id C, more of them, or --path PATH of a device or a tree")
    if (owner := _owning_node(session, at)) is not None:
        _serve_nvme_in_node(owner, sources, listen, read_only, hosts)
        return
    begun = time.monotonic()
    from space._node import nvme_access, nvme_view

    access = nvme_access.parse_access(*hosts)
    address = nvme_view.parse_listen(listen or nvme_view.LISTEN_DEFAULT)
    with contextlib.ExitStack() as stack:
        reading = _reading(stack, session.data, at=at, create=False)

        def ready(found: Document) -> None:
            _list_and_tell(stack, session.data, "nvme", sources, at, found, begun)
            note(found["discover"])
            note(found["connect"])

        nvme_view.serve(reading, sources, listen=address, read_only=read_only, ready=ready, access=access)


def _list_and_tell(
    stack: contextlib.ExitStack,
    data: Path,
    protocol: str,
    sources: Sequence[str],
    at: str | None,
    found: Document,
    begun: float,
) -> None:
    """Lists a view that can be reached over the network until ``stack`` ends, and prints what it is."""
    from space._node import views

    view = {
        "view": protocol,
        "name": f"{protocol}-{os.getpid()}",
        "source": ", ".join(sources),
        "at": at,
        "target": found["address"],
        **found,
        "pid": os.getpid(),
        "started_ns": time.time_ns(),
    }
    stack.enter_context(views.registered(data, view))
    emit(to_json({**view, "ready_ms": round((time.monotonic() - begun) * 1000, 1)}))
    sys.stdout.flush()


def _owning_node(session: Session, at: str | None) -> Any:
    """The running node that is to serve a view: the one named, or the one that keeps the directory.

    Raises:
        UsageError: a node is named, which serves no past moment.
    """
    if session.node:
        if at is not None:
            raise UsageError("a node serves the present", hint="leave --node out, and say --data DIR")
        with session.running() as named:
            return named
    asked = ask_owner(session.data, Caller()) if at is None else None
    return None if asked is None or asked.owner().get("node") is None else asked


def _serve_nvme_in_node(
    node: Any, sources: list[str], listen: str | None, read_only: bool, hosts: _Hosts
) -> None:
    """Has a running node serve; until this command is ended, or the view."""
    from space._node import nvme_view

    ready = node.serve_nvme(
        sources=sources,
        listen=listen or nvme_view.LISTEN_DEFAULT,
        read_only=read_only,
        hosts=list(hosts.names),
        host_keys=[_absolute_key(each) for each in hosts.keys],
        controller_key=hosts.controller_key and _absolute_source(hosts.controller_key),
    )
    emit(to_json(ready))
    sys.stdout.flush()
    note(ready["discover"])
    note(ready["connect"])
    _until_ended(node, "nvme", ready["target"])


def _until_ended(node: Any, kind: str, target: str) -> None:
    """Ends a view of a node with this command; the node may end it before."""
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    while not over.wait(NODE_POLL_SECONDS):
        if node.owner().get(kind) != target:
            return
    node.unmount(target=target)


def _absolute_key(text: str) -> str:
    """``NQN=FILE`` as the node finds the file; what is no such thing the node refuses."""
    nqn, separator, source = text.partition("=")
    return f"{nqn}{separator}{_absolute_source(source)}" if separator else text


def _absolute_source(source: str) -> str:
    return source if source.startswith(("env:", "DHHC-1:")) else str(Path(source).absolute())


class _Offer(NamedTuple):
    """The options that say how exports are offered."""

    squash: str
    clients: Sequence[str]
    lease: int | None
    grace: int | None
    refer: Sequence[str]


def _serve_nfs(
    context: typer.Context,
    sources: list[str],
    listen: str | None,
    at: str | None,
    read_only: bool,
    offer: _Offer,
) -> None:
    """Exports trees and capsules to NFS clients until it is told to end."""
    session: Session = context.obj
    if not sources:
        raise UsageError("say what to serve: --path PATH of a tree, or --id C, more of them")
    if (owner := _owning_node(session, at)) is not None:
        _serve_nfs_in_node(owner, sources, listen, read_only, offer)
        return
    begun = time.monotonic()
    from space._node import nfs_view, nvme_view

    options = nfs_view.parse_options(
        read_only=read_only,
        squash=offer.squash,
        clients=offer.clients,
        lease=offer.lease,
        grace=offer.grace,
        refer=offer.refer,
    )
    address = nvme_view.parse_listen(listen or nfs_view.LISTEN_DEFAULT)
    with contextlib.ExitStack() as stack:
        reading = _reading(stack, session.data, at=at, create=sources == ["/"])

        def ready(found: Document) -> None:
            _list_and_tell(stack, session.data, "nfs", sources, at, found, begun)
            note(found["mount"])

        nfs_view.serve(reading, sources, listen=address, options=options, ready=ready)


def _serve_nfs_in_node(
    node: Any, sources: list[str], listen: str | None, read_only: bool, offer: _Offer
) -> None:
    """Has a running node serve; until this command is ended, or another node serves."""
    from space._node import nfs_view

    ready = node.serve_nfs(
        sources=sources,
        listen=listen or nfs_view.LISTEN_DEFAULT,
        read_only=read_only,
        squash=offer.squash,
        clients=list(offer.clients),
        lease=offer.lease,
        grace=offer.grace,
        refer=list(offer.refer),
    )
    emit(to_json(ready))
    sys.stdout.flush()
    note(ready["mount"])
    _until_ended(node, "nfs", ready["target"])


def _reading(stack: contextlib.ExitStack, data: Path, *, at: str | None, create: bool) -> Store | PastBeside:
    """The present, owned by this process and answering on the control socket; or a past moment beside any owner.

    Raises:
        UnavailableError: the present is wanted, and another process keeps it.
        NotFoundError, UsageError: there is no such store or moment.
    """
    if at is not None:
        from space._node.beside import open_beside

        return stack.enter_context(open_beside(data, at))
    from space.control import ControlServer

    store = stack.enter_context(_owned(data, create=create))
    stack.enter_context(ControlServer(store))
    return store


def _owned(data: Path, *, create: bool) -> Store:
    """The store, opened by this process and no other.

    Raises:
        UnavailableError: another process keeps it; the message says which, and what it serves.
    """
    store, asked = open_or_ask(data, Caller(), create=create)
    if store is not None:
        return store
    assert asked is not None
    from space._node import views

    pid = asked.owner()["pid"]
    serving = [view for view in views.listed(data) if view["pid"] == pid]
    what = f", which serves {serving[0]['view']} at {serving[0]['target']}" if serving else ""
    how = f"space project stop {serving[0]['target']}" if serving else f"wait for it, or: kill {pid}"
    raise UnavailableError(
        f"store {data} is in use by process {pid}{what}",
        hint=f"its present has one view at a time, past moments (--at) any number; {how}",
    )


@project_app.command("ls")
def project_ls(context: typer.Context) -> None:
    """List views that are being served, and dead ones that were not ended."""
    from space._node import views

    session: Session = context.obj
    session.show_list(views.listed(_home(session)), _view_line)


def _view_line(each: Document) -> str:
    mode = "read-only" if each.get("read_only") else "read-write"
    when = f" {each['at']}" if each.get("at") else ""
    return clean(f"{each['name']} {each['state']} {mode} {each.get('source')}{when} {each['target']}")


@project_app.command("stop")
def project_stop(
    context: typer.Context,
    wanted: Annotated[str, typer.Argument(metavar="NAME|TARGET", help="What project ls shows.")],
) -> None:
    """End a view and wait until it is gone."""
    from space._node import views

    session: Session = context.obj
    home = _home(session)
    found = views.find(home, wanted)
    if found.get("node") and found["state"] == "running" and (owner := ask_owner(home, Caller())):
        ended = cast("Any", owner).unmount(target=found["target"])
    else:
        ended = views.stop(home, wanted)
    session.show(ended, f"ended {clean(ended['name'])} at {clean(ended['target'])}")


def _home(session: Session) -> Path:
    """The data directory, also of a node named by its socket."""
    if not session.node:
        return session.data
    with session.running() as node:
        return Path(node.owner()["data"])
