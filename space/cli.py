"""The command line: arguments in, a :class:`space._node.service.Service` call, words or JSON out.

Names, flags, JSON shapes and exit statuses are an interface (``docs/cli.md``).  Nothing is decided here about
storage.  Imports wait until a command needs them, as a command is often over in less time than they take.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat as statmod
import sys
from collections.abc import Iterator, Sequence
from gc import freeze
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

from space._errors import (
    CorruptionError,
    NotFoundError,
    SpaceError,
    UsageError,
)
from space._node.caller import Document
from space.cli_cluster import cluster_app, serve
from space.cli_csi import csi
from space.cli_key import key_app
from space.cli_policy import apply, plan, resolve, shards_app
from space.cli_project import project_app
from space.cli_session import (
    At,
    Capsule,
    PolicyFile,
    Session,
    answering,
    clean,
    emit,
    formatted,
    note,
    parse_size_option,
    policy_document,
    system_error,
    to_json,
)
from space.cli_zone import federation_app, verify_sovereignty, zone_app

if TYPE_CHECKING:
    from space._node.service import Service

DATA_ENVIRONMENT: Final = "SPACE_DATA"
NODE_ENVIRONMENT: Final = "SPACE_NODE"
CERTIFICATE_ENVIRONMENT: Final = "SPACE_CERTIFICATE"

INTERRUPTED: Final = 130
TERMINATED: Final = 143

_GLOBAL_FLAGS: Final = ("--json", "--debug", "--stale")
_GLOBAL_VALUES: Final = ("--data", "--node", "--certificate")

_SETTINGS: Final[dict[str, Any]] = {
    "name": "space",
    "help": "Event-sourced storage: every change is an event in a log, and every view is rebuilt from it.",
    "epilog": "--data, --node, --certificate, --stale, --json and --debug are accepted before and after the command.",
    "no_args_is_help": True,
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(**_SETTINGS)
policy_app = typer.Typer(no_args_is_help=True, help="Check, show, set and carry out policies.")
app.add_typer(policy_app, name="policy")
app.add_typer(project_app, name="project")
app.add_typer(cluster_app, name="cluster")
app.add_typer(zone_app, name="zone")
app.add_typer(federation_app, name="federation")
app.add_typer(shards_app, name="shards")
app.add_typer(key_app, name="key")
app.command()(resolve)
policy_app.command("plan")(plan)
policy_app.command("apply")(apply)
app.command()(serve)
app.command()(csi)

# --- global options --------------------------------------------------------------------------------


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        found = "(not installed)"
        with contextlib.suppress(PackageNotFoundError):
            found = version("space-store")
        emit(f"space {found}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    data: Annotated[
        str | None, typer.Option("--data", metavar="DIR", help=f"Data directory (or {DATA_ENVIRONMENT}).")
    ] = None,
    node: Annotated[
        str | None,
        typer.Option("--node", metavar="URL[,URL…]", help=f"Running nodes (or {NODE_ENVIRONMENT})."),
    ] = None,
    certificate: Annotated[
        str | None,
        typer.Option("--certificate", metavar="DIR", help=f"For https nodes (or {CERTIFICATE_ENVIRONMENT})."),
    ] = None,
    stale: Annotated[
        bool, typer.Option("--stale", help="Read what the node has, without asking the others.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    # Names and bytes that a terminal's encoding lacks are shown as escapes instead of ending the command.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    found = data or os.environ.get(DATA_ENVIRONMENT) or _default_data()
    # an explicit directory on the command line outranks a node in the environment
    address = node or (None if data else os.environ.get(NODE_ENVIRONMENT))
    proof = certificate or os.environ.get(CERTIFICATE_ENVIRONMENT)
    context.obj = Session(
        Path(found).expanduser(),
        address,
        as_json=as_json,
        stale=stale,
        certificate=Path(proof).expanduser() if proof else None,
    )


def _default_data() -> str:
    home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return str(Path(home) / "space")


# --- bytes in and out --------------------------------------------------------------------------------


@app.command()
def put(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="A file, or - for standard input.")],
    id: Annotated[str | None, typer.Option("--id", metavar="UUID", help="Use this id.")] = None,  # noqa: A002
    name: Annotated[str | None, typer.Option("--name", metavar="PATH", help="Name it in the tree.")] = None,
    policy_file: PolicyFile = None,
) -> None:
    """Store a file as a capsule; print its id."""
    session: Session = context.obj
    policy = policy_document(policy_file)
    with _source(file) as descriptor, session.service(create=True) as service:
        result = service.put(descriptor=descriptor, name=name, id=id, policy=policy)
    session.show(result, result["id"])


@contextlib.contextmanager
def _source(file: str) -> Iterator[int]:
    if file == "-":
        yield 0
        return
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise system_error(error, file) from None
    try:
        if statmod.S_ISDIR(os.fstat(descriptor).st_mode):
            raise UsageError(f"{file} is a directory", hint="space import takes directories")
        yield descriptor
    finally:
        os.close(descriptor)


@app.command()
def get(
    context: typer.Context,
    capsule: Capsule,
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="FILE", help="Write here.")] = None,
    offset: Annotated[str, typer.Option("--offset", metavar="N", help="First byte.")] = "0",
    length: Annotated[str | None, typer.Option("--length", metavar="N", help="How many bytes.")] = None,
    at: At = None,
) -> None:
    """Write a capsule's bytes to standard output or a file."""
    session: Session = context.obj
    wanted: Document = {
        "capsule": capsule,
        "offset": parse_size_option(offset, "--offset"),
        "length": parse_size_option(length, "--length"),
        "at": at,
    }
    with session.service() as service:
        if output is None:
            sys.stdout.flush()
            service.get(descriptor=sys.stdout.fileno(), **wanted)
            return
        result = _get_file(service, output, wanted)
    session.show({**result, "file": output}, f"{output}: {formatted(result['size'])}")


def _get_file(service: Service, output: str, wanted: Document) -> Document:
    """Writes a file that appears, or changes, only when there is something to write to it."""
    existed = os.path.lexists(output)
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise system_error(error, output) from None
    try:
        return service.get(descriptor=descriptor, replace=True, **wanted)
    except BaseException:
        if not existed:
            Path(output).unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


@app.command("import")
def import_(
    context: typer.Context,
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A directory of this machine.")],
    path: Annotated[str, typer.Argument(metavar="PATH", help="Where to, in the tree.")] = "/",
    policy_file: PolicyFile = None,
) -> None:
    """Copy a directory tree into the store."""
    session: Session = context.obj
    policy = policy_document(policy_file)
    source = Path(directory).absolute()
    if not os.path.lexists(source):
        raise NotFoundError(f"{directory}: no such file or directory")
    if not source.is_dir():
        raise UsageError(f"{directory} is not a directory", hint="space put takes files")
    with session.service(create=True) as service:
        result = service.import_tree(source=str(source), path=path, policy=policy)
    session.show(result, _transferred("imported", result))


@app.command("export")
def export_(
    context: typer.Context,
    path: Annotated[str, typer.Argument(metavar="PATH", help="A path in the tree, or a UUID.")],
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A missing or empty directory.")],
    at: At = None,
) -> None:
    """Copy a tree out of the store."""
    session: Session = context.obj
    with session.service() as service:
        result = service.export_tree(path=path, target=str(Path(directory).absolute()), at=at)
    session.show(result, _transferred("exported", result))


def _transferred(verb: str, result: Document) -> str:
    counts = f"{result['files']} files, {result['directories']} directories, {result['others']} others"
    return f"{verb} {counts}, {formatted(result['bytes'])} at position {result['position']}"


# --- names -------------------------------------------------------------------------------------------


@app.command()
def create(
    context: typer.Context,
    size: Annotated[str, typer.Option("--size", metavar="SIZE", help="Like 10GiB.")] = "0",
    block_size: Annotated[int, typer.Option("--block-size", metavar="512|4096", help="For block use.")] = 0,
    name: Annotated[str | None, typer.Option("--name", metavar="PATH", help="Name it in the tree.")] = None,
    policy_file: PolicyFile = None,
) -> None:
    """Make an empty capsule whose bytes read as zeros; print its id."""
    session: Session = context.obj
    if block_size not in {0, 512, 4096}:
        raise UsageError(f"--block-size {block_size}: blocks have 512 or 4096 bytes")
    policy = policy_document(policy_file)
    wanted = parse_size_option(size, "--size") or 0
    with session.service(create=True) as service:
        result = service.create(size=wanted, block_size=block_size, name=name, policy=policy)
    session.show(result, result["id"])


@app.command()
def resize(
    context: typer.Context,
    capsule: Capsule,
    size: Annotated[str, typer.Argument(metavar="SIZE", help="Like 10GiB.")],
) -> None:
    """Set the size of a capsule; new bytes are zeros."""
    session: Session = context.obj
    wanted = parse_size_option(size, "SIZE") or 0
    with session.service() as service:
        result = service.resize(capsule=capsule, size=wanted)
    session.show({**result, "size": wanted}, f"{capsule}: {formatted(wanted)}")


@app.command()
def ls(
    context: typer.Context,
    path: Annotated[str, typer.Argument(metavar="PATH", help="A directory or file.")] = "/",
    recursive: Annotated[bool, typer.Option("-r", "--recursive", help="Everything below it.")] = False,
    unnamed: Annotated[bool, typer.Option("--unnamed", help="Capsules that have no path instead.")] = False,
    at: At = None,
) -> None:
    """List a directory."""
    session: Session = context.obj
    with session.service() as service:
        found = service.unnamed(at=at) if unnamed else service.ls(path=path, recursive=recursive, at=at)
        session.show_list(found, lambda each: _ls_line(each, full=recursive))


def _ls_line(each: Document, *, full: bool) -> str:
    name = (each["path"] if full else each["name"]) or each["id"]
    suffix = {"directory": "/", "symlink": f" -> {each.get('target')}"}.get(each["kind"], "")
    when = each["mtime"][:16].replace("T", " ")
    return f"{each['permissions']} {formatted(each['size']):>10} {when} {clean(name + suffix)}"


@app.command()
def stat(context: typer.Context, capsule: Capsule, at: At = None) -> None:
    """Show everything about a capsule but its bytes."""
    session: Session = context.obj
    with session.service() as service:
        document = service.stat(capsule=capsule, at=at)
    session.show(document, "\n".join(_fields(document)))


def _fields(document: Document, indent: str = "") -> Iterator[str]:
    for key, value in document.items():
        if isinstance(value, dict):
            if value:
                yield f"{indent}{key}:"
                yield from _fields(value, indent + "  ")
        elif value is not None and not key.endswith("_ns"):
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield f"{indent}{clean(key)}: {clean(text)}"


@app.command()
def rm(
    context: typer.Context,
    capsules: Annotated[list[str], typer.Argument(metavar="CAPSULE…", help="UUIDs or paths.")],
    recursive: Annotated[
        bool, typer.Option("-r", "--recursive", help="Directories and what is in them.")
    ] = False,
) -> None:
    """Remove capsules; undelete brings them back until gc."""
    session: Session = context.obj
    with session.service() as service:
        results = [{"capsule": each, **service.rm(capsule=each, recursive=recursive)} for each in capsules]
    if session.json:
        emit(to_json(results))


@app.command()
def mv(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SRC", help="A path.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="A path; a directory takes SRC in.")],
) -> None:
    """Rename a path."""
    session: Session = context.obj
    with session.service() as service:
        result = service.mv(source=source, target=target)
    if session.json:
        emit(to_json(result))


@app.command()
def mkdir(
    context: typer.Context,
    path: Annotated[str, typer.Argument(metavar="PATH")],
    parents: Annotated[bool, typer.Option("-p", "--parents", help="Missing parents too.")] = False,
) -> None:
    """Make a directory."""
    session: Session = context.obj
    with session.service(create=True) as service:
        result = service.mkdir(path=path, parents=parents)
    if session.json:
        emit(to_json(result))


# --- moments -----------------------------------------------------------------------------------------


@app.command()
def snapshot(
    context: typer.Context,
    capsule: Annotated[str | None, typer.Argument(metavar="[CAPSULE|PATH", help="What to snapshot.")] = None,
    name: Annotated[str | None, typer.Argument(metavar="NAME]", help="The snapshot's name.")] = None,
    drop: Annotated[str | None, typer.Option("--drop", metavar="NAME", help="Forget a snapshot.")] = None,
) -> None:
    """Name the present moment of a capsule or tree; without arguments, list snapshots."""
    session: Session = context.obj
    if drop is not None and capsule is not None:
        raise UsageError("--drop goes alone: space snapshot --drop NAME")
    if capsule is not None and name is None:
        raise UsageError("a snapshot needs a name: space snapshot CAPSULE NAME")
    if capsule is None and drop is None:
        snapshots(context)
        return
    with session.service() as service:
        if drop is not None:
            result = service.drop_snapshot(name=drop)
        else:
            result = service.snapshot(capsule=str(capsule), name=str(name))
    session.show(result, f"{clean(result['name'])} @{result['position']}")


@app.command()
def snapshots(context: typer.Context) -> None:
    """List snapshots."""
    session: Session = context.obj
    with session.service() as service:
        session.show_list(
            service.snapshots(),
            lambda each: f"{each['moment']:<12} {each['time'][:19]} {each['id']} {clean(each['name'])}",
        )


@app.command()
def clone(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SRC", help="A UUID or path.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="A new path.")],
    at: At = None,
) -> None:
    """Copy a file or tree, as it is or was, without copying bytes; print the new id."""
    session: Session = context.obj
    with session.service() as service:
        result = service.clone(source=source, target=target, at=at)
    session.show(result, result["id"])


@app.command()
def undelete(
    context: typer.Context,
    capsule: Annotated[
        str | None, typer.Argument(metavar="[CAPSULE|PATH]", help="What to bring back.")
    ] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="PATH", help="Bring it back there.")] = None,
) -> None:
    """Bring back what was removed; without arguments, list what can be."""
    session: Session = context.obj
    with session.service() as service:
        if capsule is None:
            session.show_list(
                service.deleted(),
                lambda each: (
                    f"@{each['position']:<10} {each['time'][:19]} {formatted(each['size']):>10} "
                    f"{each['id']} {clean(each['path'])}"
                ),
            )
            return
        result = service.undelete(capsule=capsule, to=to)
    session.show(result, result["id"])


@app.command()
def digest(context: typer.Context, at: At = None) -> None:
    """Print position and state digest."""
    session: Session = context.obj
    with session.service() as service:
        result = service.digest(at=at)
    session.show(result, f"{result['position']} {result['digest']}")


# --- the log and upkeep ------------------------------------------------------------------------------


@app.command()
def log(
    context: typer.Context,
    capsule: Annotated[str | None, typer.Option("--capsule", metavar="C", help="Of this one only.")] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="P", help="First position, or a moment.")
    ] = None,
    stop: Annotated[str | None, typer.Option("--to", metavar="P", help="Last position, or a moment.")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Wait for more.")] = False,
) -> None:
    """Print events, oldest first; with --json, one object a line."""
    session: Session = context.obj
    with session.service() as service, answering(service) if follow else contextlib.nullcontext():
        for event in service.log(capsule=capsule, start=start, stop=stop, follow=follow):
            emit(to_json(event) if session.json else _log_line(event))
            if follow:
                sys.stdout.flush()


def _log_line(event: Document) -> str:
    place = f"@{event['position']}.{event['event']}"
    detail = " ".join(f"{key}={value}" for key, value in event["detail"].items())
    line = f"{place:<10} {event['time'][:23]} {event['actor']} {event['kind']} {event['capsule']} {detail}"
    return clean(line.rstrip())


@app.command()
def replay(
    context: typer.Context,
    view: Annotated[str | None, typer.Option("--view", metavar="NAME", help="Only this view.")] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="MOMENT", help="Up to a past moment.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare digests before and after.")] = False,
) -> None:
    """Drop views and rebuild them from the log."""
    session: Session = context.obj
    with session.service() as service:
        result = service.replay(view=view, to=to, verify=verify)
    same = ", equal to what was there" if verify else ""
    session.show(
        result,
        f"{', '.join(result['views'])}: {result['events']} events in {result['seconds']:.2f} s "
        f"({result['events_per_second']:,.0f} events/s) to position {result['position']}{same}",
    )


@app.command()
def verify(
    context: typer.Context,
    repair: Annotated[bool, typer.Option("--repair", help="Rebuild what the log can rebuild.")] = False,
    sovereignty: Annotated[
        bool, typer.Option("--sovereignty", help="Check that policies allowed all that left for other zones.")
    ] = False,
) -> None:
    """Check every checksum, chain link and reference; or, from the log alone, every shipment."""
    session: Session = context.obj
    if sovereignty:
        if repair:
            raise UsageError("what was shipped cannot be repaired", hint="leave --repair out")
        verify_sovereignty(session)
        return
    with session.service() as service:
        report = service.verify(repair=repair)
    lines = [_finding(each) for each in report["findings"]]
    if report["destroyed"]:
        lines.append(f"{report['destroyed']} capsules have had their data key destroyed, and cannot be read")
    lines.append(
        f"{report['segments']} segments, {report['batches']} batches, {report['events']} events, "
        f"{formatted(report['payload_bytes'])} of payload, {report['repaired']} repaired: "
        f"{len(report['findings'])} findings"
    )
    session.show(report, "\n".join(lines))
    if report["findings"]:
        first = report["findings"][0]
        raise CorruptionError(
            f"{len(report['findings'])} findings, the first: {_finding(first)}",
            # The log is the one thing that cannot be rebuilt from something else.
            hint="restore that file from a backup or a replica"
            if repair or first["segment"].endswith(".seg")
            else "try: space verify --repair",
        )


def _finding(each: Document) -> str:
    return clean(f"{each['segment']} offset {each['offset']} position {each['position']}: {each['what']}")


@app.command()
def gc(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be given back.")] = False,
) -> None:
    """Give back the space of what no kept moment can reach."""
    session: Session = context.obj
    with session.service() as service:
        report = service.gc(dry_run=dry_run)
    verb = "would give back" if dry_run else "gave back"
    session.show(
        report,
        f"{verb} {formatted(report['bytes_given_back'])} ({report['bytes_given_back']} bytes) in "
        f"{report['frames']} frames; {report['capsules_purged']} capsules purged",
    )


# --- policy ------------------------------------------------------------------------------------------


@policy_app.command("check")
def policy_check(
    context: typer.Context, file: Annotated[str, typer.Argument(metavar="FILE", help="A policy file.")]
) -> None:
    """Check a policy file; print it with every key."""
    session: Session = context.obj
    document = policy_document(file) or {}
    session.show(document, "\n".join(_fields(document)))


@policy_app.command("show")
def policy_show(context: typer.Context, capsule: Capsule) -> None:
    """Show the policy a capsule follows."""
    session: Session = context.obj
    with session.service() as service:
        document = service.policy(capsule=capsule)
    session.show(document, "\n".join(_fields(document)))


@policy_app.command("set")
def policy_set(
    context: typer.Context,
    capsule: Capsule,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A policy file.")],
) -> None:
    """Let a capsule follow another policy from now on."""
    session: Session = context.obj
    document = policy_document(file) or {}
    with session.service() as service:
        result = service.set_policy(capsule=capsule, policy=document)
    if session.json:
        emit(to_json(result))


# --- this machine ------------------------------------------------------------------------------------


@app.command()
def doctor(context: typer.Context) -> None:
    """Say what this machine can do, and how to mend what it cannot."""
    from space._node.doctor import examine

    session: Session = context.obj
    checks = examine(session.data)
    session.show(checks, "\n".join(map(_check_line, checks)))
    lacking = [check["name"] for check in checks if check["needed"] and not check["ok"]]
    if lacking:
        raise SpaceError(f"a store needs what is missing here: {', '.join(lacking)}")


def _check_line(check: Document) -> str:
    mark = "ok" if check["ok"] else "MISSING" if check["needed"] else "without"
    hint = f" ({check['hint']})" if check["hint"] and not check["ok"] else ""
    return clean(f"{mark:<8} {check['name']:<14} {check['value']}{hint}")


@app.command()
def bench(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]…", help="Which; all if none.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, to see that they run.")] = False,
) -> None:
    """Run the benchmarks of a checkout, side by side with their baselines."""
    import importlib

    session: Session = context.obj
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "bench" / "run.py").is_file():
        raise UsageError("the benchmarks are not installed", hint="run space bench in a checkout")
    sys.path.insert(0, str(checkout))
    status = importlib.import_module("bench.run").main(names or (), json=session.json, quick=quick)
    raise typer.Exit(status)


# --- the program -------------------------------------------------------------------------------------


def _hoisted(arguments: Sequence[str]) -> list[str]:
    """The global options first, wherever they stood before ``--``."""
    front: list[str] = []
    rest = list(arguments)
    at = 0
    while at < len(rest) and rest[at] != "--":
        word = rest[at]
        if word in _GLOBAL_FLAGS or word.startswith(tuple(f"{flag}=" for flag in _GLOBAL_VALUES)):
            front.append(rest.pop(at))
        elif word in _GLOBAL_VALUES and at + 1 < len(rest):
            front += [rest.pop(at), rest.pop(at)]
        else:
            at += 1
    return front + rest


def _application(arguments: Sequence[str]) -> typer.Typer:
    """The commands to choose from: only the one that is asked for if that is clear, as each takes time to build."""
    words = iter(arguments)
    for word in words:
        if word in _GLOBAL_VALUES:
            next(words, None)
        elif word not in _GLOBAL_FLAGS and not word.startswith(tuple(f"{flag}=" for flag in _GLOBAL_VALUES)):
            break
    else:
        return app
    wanted = [each for each in app.registered_commands if each.callback and _command_name(each) == word]
    groups = [each for each in app.registered_groups if each.name == word]
    if not (wanted or groups):
        return app
    lean = typer.Typer(**_SETTINGS)
    lean.registered_callback = app.registered_callback
    lean.registered_commands, lean.registered_groups = wanted, groups
    return lean


def _command_name(command: Any) -> str:
    return str(command.name or command.callback.__name__)


def _stopped(signal_number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signal_number)


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit status; complaints are one line on stderr."""
    debug = "--debug" in arguments
    try:
        hoisted = _hoisted(arguments)
        status = _application(hoisted)(hoisted, prog_name="space", standalone_mode=False)
        sys.stdout.flush()
    except SpaceError as error:
        if debug:
            raise
        note(str(error))
        return error.kind.exit_status
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        if debug:
            raise
        note(str(error))
        return 1
    except typer.Abort:
        return INTERRUPTED
    except Exception as error:
        if (message := getattr(error, "format_message", None)) is not None:
            return _misused(message(), getattr(error, "ctx", None))
        if debug:
            raise
        note(f"{type(error).__name__}: {error} (a defect: please report it, with --debug)")
        return 1
    return status if isinstance(status, int) else 0


def _misused(message: str, context: typer.Context | None) -> int:
    """What typer says about wrong arguments, on one line; all of the help where there were none."""
    path = context.command_path if context is not None else "space"
    if context is not None and message == context.get_help():
        sys.stderr.write(f"{message}\n")
    else:
        note(f"{message} (see: {path} --help)")
    return UsageError.kind.exit_status


def main() -> NoReturn:
    """The console entry point."""
    signal.signal(signal.SIGTERM, _stopped)
    _fill_standard_streams()
    try:
        status = run(sys.argv[1:])
    finally:
        _detach_stdout()
        freeze()  # all there is ends with the process: the interpreter would go through it, twice, for garbage
    sys.exit(status)


def _fill_standard_streams() -> None:
    """Gives closed standard streams to nobody, so that no file of the store gets their numbers."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _detach_stdout() -> None:
    """Lets the interpreter end in peace when nobody reads what is left to be written."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main()
