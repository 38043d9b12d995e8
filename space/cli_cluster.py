"""``space serve`` and ``space cluster``: running nodes, and what is asked of a cluster of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from space._errors import UsageError
from space._node.caller import Document
from space.cli_session import Session, clean, emit, note, to_json

if TYPE_CHECKING:
    from space._node.enrolment import ServeOptions

cluster_app = typer.Typer(no_args_is_help=True, help="Clusters of nodes: status, members, certificates.")

LISTEN_METAVAR: Final = "HOST:PORT"
DEV_NODES_MAX: Final = 9


def serve(
    context: typer.Context,
    config: Annotated[str | None, typer.Option("--config", metavar="FILE", help="Options, as YAML.")] = None,
    listen: Annotated[str | None, typer.Option("--listen", metavar=LISTEN_METAVAR, help="For peers.")] = None,
    advertise: Annotated[
        str | None, typer.Option("--advertise", metavar=LISTEN_METAVAR, help="Where peers reach it.")
    ] = None,
    shards: Annotated[int | None, typer.Option("--shards", metavar="N", help="Of a new cluster.")] = None,
    http: Annotated[
        str | None, typer.Option("--http", metavar=LISTEN_METAVAR, help="Metrics, status page, calls.")
    ] = None,
    federation: Annotated[
        str | None,
        typer.Option("--federation", metavar=LISTEN_METAVAR, help="For other zones; ships to them."),
    ] = None,
    join: Annotated[
        str | None, typer.Option("--join", metavar="CLUSTER", help="Wait to be added to this cluster.")
    ] = None,
    node_id: Annotated[
        int | None, typer.Option("--node-id", metavar="N", help="Its number, without a certificate.")
    ] = None,
    tls: Annotated[str | None, typer.Option("--tls", metavar="DIR", help="Its certificate.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No certificates; this machine only.")] = False,
    mount: Annotated[
        list[str] | None, typer.Option("--mount", metavar="TARGET[=PATH]", help="Mount it when ready.")
    ] = None,
    with_parent: Annotated[
        bool, typer.Option("--with-parent", hidden=True, help="End when standard input ends.")
    ] = False,
) -> None:
    """Run a node in the foreground until SIGTERM or SIGINT."""
    import logging

    from space._node import serve as running
    from space.control import ControlServer

    session: Session = context.obj
    if session.node:
        raise UsageError("a node is run where its data is", hint="leave --node out, and say --data DIR")
    given: Document = {
        "listen": listen, "advertise": advertise, "shards": shards, "http": http, "join": join,
        "federation": federation,
        "node-id": node_id, "tls": tls, "insecure": insecure or None, "mount": mount,
    }  # fmt: skip
    options = _options(config, given)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    if with_parent:
        _end_with_parent()

    def announce(ready: Document, notice: str) -> None:
        if notice:
            note(notice)
        emit(to_json(ready) if session.json else _ready_text(ready))
        sys.stdout.flush()

    running.serve(session.data, options, listen=ControlServer, announce=announce)


def _options(config: str | None, given: Document) -> ServeOptions:
    """Options of the file, and of the command line in their place."""
    from space._node.enrolment import ServeOptions
    from space._node.serve_config import load

    found = load(config) if config is not None else {}
    found |= {key: value for key, value in given.items() if value is not None}
    views = found.get("views", ())
    return ServeOptions(
        listen=found.get("listen"),
        advertise=found.get("advertise"),
        shards=found.get("shards"),
        http=found.get("http"),
        federation=found.get("federation"),
        join=found.get("join"),
        node=found.get("node-id"),
        tls=Path(found["tls"]).expanduser() if found.get("tls") else None,
        insecure=bool(found.get("insecure")),
        mounts=tuple(_mount(text) for text in found.get("mount", ())),
        nvme=tuple(view.nvme() for view in views if view.kind == "nvme"),
        nfs=tuple(view.nfs() for view in views if view.kind == "nfs"),
        csi=tuple(view.csi() for view in views if view.kind == "csi"),
    )


def _mount(text: str) -> tuple[str, str]:
    target, _, path = text.partition("=")
    if not target or (path and not path.startswith("/")):
        raise UsageError(f"not a mount: {text!r}", hint="write TARGET or TARGET=/PATH")
    return str(Path(target).absolute()), path or "/"


def _end_with_parent() -> None:
    """Ends as by SIGTERM when standard input does: no child outlives who started it."""
    import os
    import signal
    import threading

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="space-parent", daemon=True).start()


def _ready_text(ready: Document) -> str:
    who = "the store" if ready["node"] is None else f"node {ready['node']} of cluster {ready['cluster']}"
    places = [f"{name} {ready[name]}" for name in ("peer", "url", "http") if ready[name]]
    return f"{who} in {ready['data']} answers: {', '.join(places)}, pid {ready['pid']}"


# --- asked of a running node -----------------------------------------------------------------------


@cluster_app.command("status")
def status(context: typer.Context) -> None:
    """Show shards, their leaders and nodes."""
    session: Session = context.obj
    with session.running() as node:
        found = node.cluster_status()
    session.show(found, "\n".join(status_lines(found)))


def status_lines(found: Document) -> list[str]:
    """The status of a cluster as a table."""
    lines = []
    for shard in found["shards"]:
        leader = "nobody leads" if shard["leader"] is None else f"node {shard['leader']} leads"
        lines.append(f"shard {shard['shard']}: {leader}, term {shard['term']}")
        lines.append(f"  {'node':>5} {'role':<12} {'position':>12} {'lag':>8}  {'digest':<16} address")
        lines += [f"  {_node_line(each)}" for each in shard["nodes"]]
    lines += [f"difference: {each}" for each in found.get("differences", ())]
    return [clean(line) for line in lines]


def _node_line(each: Document) -> str:
    position, lag = ("-" if each[key] is None else each[key] for key in ("position", "lag"))
    digest = (each["digest"] or "-").rpartition(":")[2][:16]
    failure = f"  {each['failure']}" if each.get("failure") else ""
    return (
        f"{each['id']:>5} {each['role']:<12} {position:>12} {lag:>8}  {digest:<16} {each['address']}{failure}"
    )


@cluster_app.command("add")
def add(
    context: typer.Context,
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where the new node listens.")],
    id: Annotated[int, typer.Option("--id", metavar="N", help="Its number.")],  # noqa: A002 - the flag's name
) -> None:
    """Add a running node; returns when it has caught up and votes."""
    session: Session = context.obj
    with session.running() as node:
        result = node.cluster_add(node=id, address=address)
    session.show(result, f"node {id} at {address} votes")


@cluster_app.command("remove")
def remove(
    context: typer.Context,
    id: Annotated[int, typer.Argument(metavar="N", help="Its number.")],  # noqa: A002
) -> None:
    """Remove a node; what it holds stays in its directory."""
    session: Session = context.obj
    with session.running() as node:
        result = node.cluster_remove(node=id)
    session.show(result, f"node {id} is out; stop it, and keep or delete its directory")


@cluster_app.command("transfer-leader")
def transfer_leader(
    context: typer.Context,
    id: Annotated[int, typer.Argument(metavar="N", help="Who is to lead.")],  # noqa: A002
    shard: Annotated[int | None, typer.Option("--shard", metavar="S", help="Only this shard.")] = None,
) -> None:
    """Let another node lead."""
    session: Session = context.obj
    with session.running() as node:
        result = node.cluster_lead(node=id, shard=shard)
    session.show(result, f"node {id} leads")


@cluster_app.command("invite")
def invite(
    context: typer.Context,
    id: Annotated[int | None, typer.Argument(metavar="[N]", help="Number of the new node.")] = None,  # noqa: A002
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where to write it.")] = "",
    host: Annotated[
        list[str] | None, typer.Option("--host", metavar="H", help="Name or address of the node.")
    ] = None,
    client: Annotated[
        str | None, typer.Option("--client", metavar="NAME", help="For a program that asks, not a node.")
    ] = None,
) -> None:
    """Write the certificate of a new node, or of a client; on the node that founded the cluster."""
    session: Session = context.obj
    if (id is None) == (client is None):
        raise UsageError("say whom to invite: a node's number, or --client NAME")
    if not out:
        raise UsageError("say where to write the certificate: --out DIR")
    target = str(Path(out).absolute())
    with session.running() as node:
        result = node.cluster_invite(target=target, node=id, client=client, hosts=" ".join(host or ()))
    who = f"client {client}" if client is not None else f"node {id}"
    session.show(result, f"the certificate of {who} is in {target}: carry it there by a safe way")


@cluster_app.command("dev")
def dev(
    context: typer.Context,
    nodes: Annotated[int, typer.Option("--nodes", metavar="N", help="How many.")] = 3,
    dir: Annotated[str | None, typer.Option("--dir", metavar="D", help="Where they live.")] = None,  # noqa: A002
    shards: Annotated[int | None, typer.Option("--shards", metavar="N", help="Of a new cluster.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No certificates.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Start a node again that has died.")] = False,
) -> None:
    """Run a cluster on this machine, to try things out, until interrupted."""
    from space.cli_dev import DevCluster, Events

    session: Session = context.obj
    if not 1 <= nodes <= DEV_NODES_MAX:
        raise UsageError(f"--nodes {nodes}: 1 to {DEV_NODES_MAX}")

    class Shown(Events):
        """Tells the terminal, or the program that reads."""

        def ready(self, found: list[Document]) -> None:
            if session.json:
                emit(json.dumps({"nodes": found}))
            else:
                for each in found:
                    emit(f"node {each['id']}: pid {each['pid']}, {each['url']}, {each['http']}")
                note(f"try: space --node {found[0]['url']} cluster status; end it with Ctrl-C")
            sys.stdout.flush()

        def happened(self, event: str, node: Document, text: str) -> None:
            if session.json and event != "note":
                emit(json.dumps({"event": event, **node}))
                sys.stdout.flush()
            note(text)

    DevCluster(
        Path(dir) if dir is not None else None, nodes=nodes, shards=shards, insecure=insecure, restart=restart
    ).run(Shown())


__all__ = ["add", "cluster_app", "dev", "invite", "remove", "serve", "status", "transfer_leader"]
