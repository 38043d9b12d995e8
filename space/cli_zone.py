"""``space zone`` and ``space federation``: who other zones are, and what is shipped to them."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from space._errors import CorruptionError, UsageError
from space._node.caller import Caller, Document
from space.cli_session import (
    Session,
    answering,
    clean,
    emit,
    formatted,
    note,
    open_or_ask,
    parse_size_option,
    system_error,
    to_json,
)

if TYPE_CHECKING:
    from space._node.service import Service

zone_app = typer.Typer(no_args_is_help=True, help="Zones: this one, and those that content is shipped to.")
federation_app = typer.Typer(no_args_is_help=True, help="Shipping to other zones: serve, status.")

LISTEN_DEFAULT: Final = "127.0.0.1:7440"
AUTHORITY_BYTES_MAX: Final = 1 << 20
POLL_SECONDS: Final = 0.5
SOON_DAYS: Final = 60

Name = Annotated[str, typer.Argument(metavar="NAME", help="As policies call it.")]
Kind = Annotated[str | None, typer.Option("--kind", metavar="KIND", help="metro, geo or edge.")]


@zone_app.command("init")
def init(
    context: typer.Context,
    name: Name,
    kind: Kind = None,
    url: Annotated[
        str | None,
        typer.Option(
            "--url", metavar="URL[,URL]…", help="Where other zones reach this one; of a cluster, its nodes."
        ),
    ] = None,
) -> None:
    """Make this store a zone, with keys of its own; where it is one, set its address."""
    session: Session = context.obj
    with session.service(create=True) as service:
        result = service.zone_init(name=name, kind=kind or "metro", url=url or "")
    session.show(result, f"this store is the {result['kind']} zone {name}; others need: space zone ca")


@zone_app.command("ca")
def authority(context: typer.Context) -> None:
    """Print what other zones need to add this one (PEM)."""
    session: Session = context.obj
    with session.service() as service:
        result = service.zone_authority()
    session.show(result, result["authority"].rstrip())


@zone_app.command("add")
def add(
    context: typer.Context,
    name: Name,
    url: Annotated[
        str,
        typer.Option(
            "--url", metavar="URL[,URL]…", help="Where it answers: https://HOST:PORT, or those of its nodes."
        ),
    ],
    ca: Annotated[str, typer.Option("--ca", metavar="FILE|-", help="What `space zone ca` printed there.")],
    kind: Kind = None,
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask it who it is.")] = False,
) -> None:
    """Add another zone, or change its address or authority; it is asked who it is."""
    session: Session = context.obj
    text = _read(ca)
    with session.service() as service:
        result = service.zone_add(name=name, url=url, authority=text, kind=kind, offline=offline)
    if notice := result.pop("notice"):
        note(notice)
    session.show(result, f"zone {name} ({result['kind']}) at {url}")


def _read(file: str) -> str:
    if file == "-":
        return sys.stdin.read(AUTHORITY_BYTES_MAX)
    try:
        with Path(file).open(encoding="ascii", errors="replace") as source:
            return source.read(AUTHORITY_BYTES_MAX)
    except OSError as error:
        raise system_error(error, file) from None


@zone_app.command("ls")
def ls(context: typer.Context) -> None:
    """List zones, this one first."""
    session: Session = context.obj
    with session.service() as service:
        session.show_list(service.zones(), _zone_line)


def _zone_line(each: Document) -> str:
    mark = "*" if each["own"] else " "
    soon = (
        f"  its authority ends in {each['authority_days']} days" if each["authority_days"] < SOON_DAYS else ""
    )
    return clean(f"{mark} {each['zone']:<20} {each['kind']:<6} {each['url'] or '-':<32} {each['id']}{soon}")


@zone_app.command("rm")
def rm(
    context: typer.Context,
    name: Name,
    yes: Annotated[
        bool, typer.Option("--yes", help="Though replicas of it stay that get nothing new.")
    ] = False,
) -> None:
    """End shipping to and from a zone; replicas stay as they are."""
    session: Session = context.obj
    with session.service() as service:
        result = service.zone_remove(name=name, sure=yes)
    session.show(result, f"zone {name} is removed; {result['replicas']} replicas stay as they are")


@zone_app.command("promote")
def promote(
    context: typer.Context,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask, whatever is lost.")] = False,
    again: Annotated[
        bool,
        typer.Option("--again", help="Though it was done before: when that zone took this one's place too."),
    ] = False,
) -> None:
    """Take the place of a zone: what came from it has its home here from now on.

    Says first what would be lost: what that zone has and did not ship, as far as it said so.
    """
    session: Session = context.obj
    with session.service() as service:
        expected = service.zone_predict(name=name)
        if not yes:
            note("\n".join(_loss_lines(expected)))
            if not sys.stdin.isatty():
                raise UsageError("nobody is there to be asked", hint="--yes promotes without asking")
            typer.confirm(f"take the place of zone {clean(name)}?", abort=True, err=True)
        result = service.zone_promote(name=name, again=again)
    lines = [f"what came from zone {clean(name)} has its home here, since position {result['position']}"]
    lines += _loss_lines(result) if yes else []
    session.show(result, "\n".join(lines))


def _loss_lines(loss: Document) -> list[str]:
    """What a promotion loses, for people."""
    if loss["heard"] is None:
        lines = [
            f"zone {loss['zone']} has not said how far its log goes: what it had and did not ship is lost"
        ]
    else:
        heard = (
            f"zone {loss['zone']} last said {loss['heard_seconds']:.0f} s ago that its log ends at position"
        )
        lines = [f"{heard} {loss['heard_position']}; what it did since is not known here"]
        more = "at least " if loss["more"] or loss["unknown"] else ""
        lines.append(
            f"not shipped: {more}{loss['positions']} positions with {loss['changes']} changes of "
            f"{len(loss['capsules'])} capsules, {formatted(loss['bytes'])}"
        )
    if loss["incomplete"]:
        lines.append(f"{len(loss['incomplete'])} capsules were being copied: what came of them is dropped")
    for stream in loss["streams"]:
        lines.append(f"  priority {stream['lane']}: came up to position {stream['position']}")
    return [clean(line) for line in lines]


@zone_app.command("move")
def move(
    context: typer.Context,
    capsule: Annotated[str, typer.Argument(metavar="CAPSULE", help="An id, or a path.")],
    name: Name,
) -> None:
    """Give the home of a capsule, or of a directory with all in it, to a zone that has it.

    Nothing changes it here any more; it stays where it is, and follows that zone.
    """
    session: Session = context.obj
    with session.service() as service:
        result = service.zone_move(capsule=capsule, name=name)
    session.show(result, f"{result['capsules']} capsules have their home in zone {clean(name)} now")


@zone_app.command("take-back")
def take_back(context: typer.Context, name: Name) -> None:
    """Take back homes that were given to a zone and that it has not taken; it will not take them any more."""
    session: Session = context.obj
    with session.service() as service:
        result = service.zone_take_back(name=name)
    more = f"; zone {clean(name)} has taken {result['taken']}" if result["taken"] else ""
    session.show(result, f"{result['capsules']} capsules have their home here again{more}")


@zone_app.command("branches")
def branches(context: typer.Context) -> None:
    """List what this zone had not shipped when others took its place: directories below /zones/.branches."""
    session: Session = context.obj
    with session.service() as service:
        session.show_list(service.zone_branches(), _branch_line)


def _branch_line(each: Document) -> str:
    return clean(
        f"{each['path']:<40} {each['time']}  {each['capsules']} capsules, {formatted(each['bytes'])}"
    )


@zone_app.command("rollover")
def rollover(
    context: typer.Context,
    authority: Annotated[
        bool, typer.Option("--authority", help="Another authority too: the other zones are told first.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Go on without zones that cannot be told now.")
    ] = False,
) -> None:
    """Replace the certificate of this zone, while it is in use."""
    session: Session = context.obj
    if force and not authority:
        raise UsageError("--force is about telling other zones of a new authority", hint="--authority")
    with session.service() as service:
        if not authority:
            result = service.zone_renew()
            _note_nodes(result)
            session.show(
                result, f"zone {result['zone']} has a new certificate until {result['expires'][:10]}"
            )
            return
        result = service.zone_roll_over(force=force)
    if result["without"]:
        note(f"these zones refuse this one until they get `space zone ca`: {', '.join(result['without'])}")
    _note_nodes(result)
    session.show(result, f"zone {result['zone']} has a new authority, and a certificate of it")


@zone_app.command("arrival")
def arrival(
    context: typer.Context,
    policy_file: Annotated[
        str | None,
        typer.Option("--policy-file", metavar="FILE", help="compression, encryption, dedupe and transform."),
    ] = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="Let everything stay as it comes from now on.")
    ] = False,
) -> None:
    """Show or set how content that other zones ship is encoded here."""
    session: Session = context.obj
    if clear and policy_file is not None:
        raise UsageError("--policy-file and --clear: which of the two?")
    from space.policy.model import load_arrival_policy

    policy = None if policy_file is None else load_arrival_policy(policy_file).to_document()
    with session.service() as service:
        if policy is None and not clear:
            result = service.zone_arrival()
        else:
            result = service.zone_arrival_set(policy=policy or {})
    session.show(result, _arrival_line(result))


def _arrival_line(result: Document) -> str:
    if result["policy"] is None:
        return "what other zones ship stays as it comes"
    words = [f"{key}: {_policy_value(value)}" for key, value in result["policy"].items()]
    words += [] if result["key"] is None else [f"key {result['key']}"]
    return clean(f"what other zones ship is encoded here by {', '.join(words)}")


def _policy_value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _note_nodes(result: Document) -> None:
    if nodes := result["nodes_without"]:
        note(f"these nodes did not answer, and keep what they had: {', '.join(map(str, nodes))}")


def verify_sovereignty(session: Session) -> None:
    """Judges every shipment the log tells of (``space verify --sovereignty``).

    Raises:
        CorruptionError: one was not allowed.
    """
    with session.service() as service:
        report = service.verify_sovereignty()
    lines = [_violation(each) for each in report["findings"]]
    since = "" if report["from_position"] == 1 else f" since position {report['from_position']}"
    found = len(report["findings"]) + report["missed"]
    lines.append(
        f"{report['shipments']} shipments with {report['capsules']} capsules{since}: {found} not allowed"
    )
    session.show(report, "\n".join(lines))
    if found:
        raise CorruptionError(
            f"{found} capsules went where they may not, the first: {lines[0]}",
            hint="space log shows who changed what around that position",
        )


def _violation(each: Document) -> str:
    return clean(
        f"position {each['position']}: capsule {each['capsule']} was sent to zone {each['zone']} "
        f"as of position {each['sent_as_of']}: {each['reason']}"
    )


# --- shipping ----------------------------------------------------------------------------------------


@federation_app.command("serve")
def serve(
    context: typer.Context,
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Where other zones reach this one.")
    ] = LISTEN_DEFAULT,
    bandwidth: Annotated[
        str, typer.Option("--bandwidth", metavar="SIZE", help="Bytes a second to each zone, at most.")
    ] = "0",
    http: Annotated[
        str | None, typer.Option("--http", metavar="HOST:PORT", help="Answer /metrics and calls there.")
    ] = None,
) -> None:
    """Ship to the zones that were added, and take what they ship, until interrupted."""
    import logging

    session: Session = context.obj
    if session.node:
        raise UsageError("a zone is served where its store is", hint="leave --node out, and say --data DIR")
    rate = parse_size_option(bandwidth, "--bandwidth") or 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    with _owner(session) as (service, ours), _metrics(service if ours else None, http):
        ready = service.federation_begin(listen=listen, bandwidth=rate)
        try:
            emit(to_json(ready) if session.json else _ready_text(ready))
            sys.stdout.flush()
            while not over.wait(POLL_SECONDS):
                if not ours and not service.federation_status()["running"]:
                    return
        finally:
            service.federation_end()


@contextlib.contextmanager
def _owner(session: Session) -> Iterator[tuple[Service, bool]]:
    """The process that has the store open, and whether it is this one, which then answers others."""
    store, asked = open_or_ask(session.data, Caller(), create=False)
    if store is None:
        assert asked is not None
        yield asked, False
        return
    from space._node.service import Service

    with store:
        service = Service(store, Caller())
        with answering(service):
            yield service, True


@contextlib.contextmanager
def _metrics(service: Service | None, address: str | None) -> Iterator[None]:
    """Answers over HTTP, where that is asked for."""
    if address is None:
        yield
        return
    if service is None:
        raise UsageError(
            "the store is another process's, which answers over HTTP itself", hint="space serve --http"
        )
    from space._node.calls import StoreTarget
    from space._node.http import HttpServer

    server = HttpServer(StoreTarget(service.store), address, node=None)
    note(f"metrics at {server.url}/metrics")
    try:
        yield
    finally:
        server.retire(0)
        server.close()


def _ready_text(ready: Document) -> str:
    others = ", ".join(ready["zones"]) or "no other zone yet: space zone add"
    return f"zone {ready['zone']} answers at {ready['listen']}, pid {ready['pid']}; it knows {others}"


@federation_app.command("status")
def status(
    context: typer.Context,
    capsules: Annotated[
        bool, typer.Option("--capsules", help="What each zone does not have all of yet.")
    ] = False,
) -> None:
    """Show how far each zone has come."""
    session: Session = context.obj
    with session.service() as service:
        found = service.federation_status(capsules=capsules)
    session.show(found, "\n".join(_status_lines(found)))


def _status_lines(found: Document) -> list[str]:
    state = f"at {found['listen']}" if found["running"] else "not running: space federation serve"
    if found["node"] is not None:
        ships = "no node ships" if found["sender"] is None else f"node {found['sender']} ships"
        state = f"node {found['node']} {state}; {ships}"
    lines = [f"zone {found['zone'] or '-'}: position {found['position']}, {state}"]
    if found["zones"]:
        lines.append(
            f"  {'zone':<16} {'position':>12} {'events':>10} {'bytes':>10} {'seconds':>9} {'rpo':<7} {'received':>10}"
        )
    for zone in found["zones"]:
        lines.append(f"  {_status_line(zone)}")
        lines += [f"    {zone['remark']}"] if zone["remark"] else []
        if sealed := zone["received"]["sealed_keys"]:
            lines.append(f"    what came under {sealed} keys is sealed for its home and stays as it came")
        lines += [_stream_line(each) for each in zone["streams"] if each["waiting_bytes"] or each["copying"]]
        for each in zone.get("capsules", ()):
            lines.append(f"    {each['capsule']} priority {each['lane']}: lacks position {each['position']}")
    if found["arrival"]["policy"] is not None:
        lines.append(f"  {_arrival_line(found['arrival'])}")
    return [clean(line) for line in lines]


def _stream_line(stream: Document) -> str:
    copying = ", a copy is under way" if stream["copying"] else ""
    waiting = formatted(stream["waiting_bytes"])
    return f"    priority {stream['lane']}: position {stream['position']}, {waiting} to send{copying}"


def _status_line(zone: Document) -> str:
    rpo = "-" if zone["rpo_seconds"] is None else "kept" if zone["rpo_ok"] else "BROKEN"
    error = "" if zone["connected"] else f"  {zone['error'] or 'connecting'}"
    position = "-" if zone["position"] is None else zone["position"]
    return (
        f"{zone['zone']:<16} {position:>12} {zone['lag_events']:>10} {formatted(zone['lag_bytes']):>10} "
        f"{zone['lag_seconds']:>9.1f} {rpo:<7} {zone['received']['position']:>10}{error}"
    )
