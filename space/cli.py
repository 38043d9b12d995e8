"""The command line: arguments in, a :class:`space._node.service.Service` call, words or JSON out.

Names, flags, JSON shapes and exit statuses are an interface (``docs/cli.md``).  Nothing is decided here about
storage.  Imports wait until a command needs them, as a command is often over in less time than they take.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat as statmod
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

from space._errors import (
    CorruptionError,
    DiskFullError,
    NotFoundError,
    SpaceError,
    StorageError,
    UnavailableError,
    UsageError,
)
from space._node.caller import Caller, Document

if TYPE_CHECKING:
    from space._node.reading import Reading
    from space._node.service import Service
    from space._node.store import Store

DATA_ENVIRONMENT: Final = "SPACE_DATA"
NODE_ENVIRONMENT: Final = "SPACE_NODE"

IN_USE_SECONDS: Final = 3.0
"""How long a command waits for another to let go of the directory; anew for each that had it."""

IN_USE_POLL_SECONDS: Final = 0.02
PROGRESS_AFTER_SECONDS: Final = 1.0
PROGRESS_SECONDS: Final = 0.1
INTERRUPTED: Final = 130
TERMINATED: Final = 143

_GLOBAL_FLAGS: Final = ("--json", "--debug")
_GLOBAL_VALUES: Final = ("--data", "--node")

_SETTINGS: Final[dict[str, Any]] = {
    "name": "space",
    "help": "Event-sourced storage: every change is an event in a log, and every view is rebuilt from it.",
    "epilog": "--data, --node, --json and --debug are accepted before and after the command.",
    "no_args_is_help": True,
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(**_SETTINGS)
policy_app = typer.Typer(no_args_is_help=True, help="Check, show and set policies.")
project_app = typer.Typer(no_args_is_help=False, help="Views of capsules and trees: mount, list, stop.")
app.add_typer(policy_app, name="policy")
app.add_typer(project_app, name="project")

At = Annotated[
    str | None, typer.Option("--at", metavar="MOMENT", help="@POSITION, ISO-8601, -5m, or a snapshot.")
]
Capsule = Annotated[str, typer.Argument(metavar="CAPSULE", help="A UUID or a path in the tree.")]
PolicyFile = Annotated[str | None, typer.Option("--policy-file", metavar="FILE", help="Policy (YAML).")]


# --- session ---------------------------------------------------------------------------------------


class _Progress(Caller):
    """A line on a terminal's stderr, for what takes longer than a second."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._shown = 0.0
        self._terminal = _is_terminal()

    def progress(self, done: Document) -> None:
        now = time.monotonic()
        if (
            self._terminal
            and now - self._begun > PROGRESS_AFTER_SECONDS
            and now - self._shown > PROGRESS_SECONDS
        ):
            self._shown = now
            sys.stderr.write(f"\r\x1b[K{progress_text(done, now - self._begun)}")
            sys.stderr.flush()

    def clear(self) -> None:
        """Leaves no half line behind."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _is_terminal() -> bool:
    return sys.stderr.isatty()


def progress_text(done: Document, seconds: float) -> str:
    """How far something is, and how fast, in words."""
    from space.policy.units import format_size

    parts = []
    if done.get("last"):
        parts.append(f"{100 * done['position'] // done['last']} %")
    if "files" in done:
        parts.append(f"{done['files']} files")
    if "events" in done:
        parts.append(f"{done['events']} events ({done['events'] / seconds:,.0f}/s)")
    if "bytes" in done:
        parts.append(f"{format_size(done['bytes'])} ({format_size(int(done['bytes'] / seconds))}/s)")
    return ", ".join(parts)


class Session:
    """What the global options say, and the way to the store they mean."""

    def __init__(self, data: Path, node: str | None, *, as_json: bool) -> None:
        self.data = data
        self.node = node
        self.json = as_json

    @contextlib.contextmanager
    def service(self, *, create: bool = False) -> Iterator[Service]:
        """The store's operations: of the node named, else of the process that has it open, else our own.

        Raises:
            UnavailableError: another process has it open and does not answer.
        """
        caller = _Progress()
        try:
            store, asked = (
                (None, _node(self.node, caller)) if self.node else _open(self.data, caller, create=create)
            )
            if asked is not None:
                yield asked
            elif store is not None:
                from space._node.service import Service

                with store:
                    yield Service(store, caller)
        finally:
            caller.clear()

    def show(self, document: Any, text: str) -> None:
        """One JSON document, or words."""
        _print(_json(document) if self.json else text)

    def show_list(self, items: Iterable[Document], line: Callable[[Document], str]) -> None:
        """A JSON list, or a line each; never held whole."""
        if not self.json:
            for item in items:
                _print(line(item))
            return
        separator = "["
        for item in items:
            _print(separator + _json(item), end="")
            separator = ",\n"
        _print("]" if separator != "[" else "[]")


def _open(data: Path, caller: Caller, *, create: bool) -> tuple[Store | None, Service | None]:
    """The store, opened here; or the process that has it open, if it answers.

    Raises:
        UnavailableError: another process has it open, and neither answers nor ends soon.
    """
    owner, deadline = "", 0.0
    while True:
        if (asked := _ask(data, caller)) is not None:
            return None, asked
        # before the store is opened: others wait for it
        from space._node import service  # noqa: F401
        from space._node.store import Store

        try:
            return Store(data, create=create), None
        except UnavailableError as error:
            if str(error) != owner:
                owner, deadline = str(error), time.monotonic() + IN_USE_SECONDS
            if time.monotonic() > deadline:
                raise
        time.sleep(IN_USE_POLL_SECONDS)


def _ask(data: Path, caller: Caller) -> Service | None:
    """The process that has the store open, if it answers."""
    socket = data / "control.sock"
    if not socket.exists():
        return None
    from space.control import connect

    try:
        return connect(socket, caller=caller)
    except UnavailableError:
        return None  # left behind by a process that was killed


def _node(address: str, caller: Caller) -> Service:
    scheme, separator, path = address.partition("://")
    if not separator or scheme not in {"unix", "http", "https"} or "," in address:
        raise UsageError(f"not the address of a node: {address!r}", hint="write unix:///PATH/control.sock")
    if scheme != "unix":
        raise UnavailableError(
            f"cannot reach {address}: nodes are reached over unix sockets only",
            hint="use unix:///PATH/control.sock",
        )
    from space.control import connect

    return connect(Path(path), caller=caller)


def _json(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False)


def _print(text: str, end: str = "\n") -> None:
    sys.stdout.write(text + end)


def _clean(text: str) -> str:
    """Text that cannot move a terminal's cursor or break a line."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def _size(text: str | None, what: str) -> int | None:
    from space.policy.units import parse_size

    try:
        return None if text is None else parse_size(text)
    except UsageError as error:
        raise UsageError(f"{what}: {Exception.__str__(error)}", hint=error.hint) from None


def _formatted(size: int) -> str:
    from space.policy.units import format_size

    return format_size(size)


def _policy_document(file: str | None) -> Document | None:
    if file is None:
        return None
    from space.policy.model import load_policy

    return load_policy(file).to_document()


def _system_error(error: OSError, what: str) -> SpaceError:
    """What the operating system said about a file of the user's, in our words."""
    import errno

    reason = error.strerror or str(error)
    if error.errno == errno.ENOENT:
        return NotFoundError(f"{what}: no such file or directory")
    if error.errno in {errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP}:
        return UsageError(f"{what}: {reason}")
    if error.errno == errno.ENOSPC:
        return DiskFullError(f"{what}: {reason}")
    return StorageError(f"{what}: {reason}")


# --- global options --------------------------------------------------------------------------------


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        found = "(not installed)"
        with contextlib.suppress(PackageNotFoundError):
            found = version("space-store")
        _print(f"space {found}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    data: Annotated[
        str | None, typer.Option("--data", metavar="DIR", help=f"Data directory (or {DATA_ENVIRONMENT}).")
    ] = None,
    node: Annotated[
        str | None, typer.Option("--node", metavar="URL", help=f"Running node (or {NODE_ENVIRONMENT}).")
    ] = None,
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
    context.obj = Session(Path(found).expanduser(), address, as_json=as_json)


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
    policy = _policy_document(policy_file)
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
        raise _system_error(error, file) from None
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
        "offset": _size(offset, "--offset"),
        "length": _size(length, "--length"),
        "at": at,
    }
    with session.service() as service:
        if output is None:
            sys.stdout.flush()
            service.get(descriptor=sys.stdout.fileno(), **wanted)
            return
        result = _get_file(service, output, wanted)
    session.show({**result, "file": output}, f"{output}: {_formatted(result['size'])}")


def _get_file(service: Service, output: str, wanted: Document) -> Document:
    """Writes a file that appears, or changes, only when there is something to write to it."""
    existed = os.path.lexists(output)
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _system_error(error, output) from None
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
    policy = _policy_document(policy_file)
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
    return f"{verb} {counts}, {_formatted(result['bytes'])} at position {result['position']}"


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
    policy = _policy_document(policy_file)
    wanted = _size(size, "--size") or 0
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
    wanted = _size(size, "SIZE") or 0
    with session.service() as service:
        result = service.resize(capsule=capsule, size=wanted)
    session.show({**result, "size": wanted}, f"{capsule}: {_formatted(wanted)}")


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
    return f"{each['permissions']} {_formatted(each['size']):>10} {when} {_clean(name + suffix)}"


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
            yield f"{indent}{_clean(key)}: {_clean(text)}"


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
        _print(_json(results))


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
        _print(_json(result))


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
        _print(_json(result))


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
    session.show(result, f"{_clean(result['name'])} @{result['position']}")


@app.command()
def snapshots(context: typer.Context) -> None:
    """List snapshots."""
    session: Session = context.obj
    with session.service() as service:
        session.show_list(
            service.snapshots(),
            lambda each: f"{each['moment']:<12} {each['time'][:19]} {each['id']} {_clean(each['name'])}",
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
                    f"@{each['position']:<10} {each['time'][:19]} {_formatted(each['size']):>10} "
                    f"{each['id']} {_clean(each['path'])}"
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
    with session.service() as service, _answering(service) if follow else contextlib.nullcontext():
        for event in service.log(capsule=capsule, start=start, stop=stop, follow=follow):
            _print(_json(event) if session.json else _log_line(event))
            if follow:
                sys.stdout.flush()


def _log_line(event: Document) -> str:
    place = f"@{event['position']}.{event['event']}"
    detail = " ".join(f"{key}={value}" for key, value in event["detail"].items())
    line = f"{place:<10} {event['time'][:23]} {event['actor']} {event['kind']} {event['capsule']} {detail}"
    return _clean(line.rstrip())


@contextlib.contextmanager
def _answering(service: Service) -> Iterator[None]:
    """While this process keeps the store for long, others can use it through the control socket."""
    from space.control import RemoteService

    if isinstance(service, RemoteService):
        yield
        return
    from space.control import ControlServer

    with ControlServer(service.store):
        yield


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
) -> None:
    """Check every checksum, chain link and reference."""
    session: Session = context.obj
    with session.service() as service:
        report = service.verify(repair=repair)
    lines = [_finding(each) for each in report["findings"]]
    lines.append(
        f"{report['segments']} segments, {report['batches']} batches, {report['events']} events, "
        f"{_formatted(report['payload_bytes'])} of payload, {report['repaired']} repaired: "
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
    return _clean(f"{each['segment']} offset {each['offset']} position {each['position']}: {each['what']}")


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
        f"{verb} {_formatted(report['bytes_given_back'])} ({report['bytes_given_back']} bytes) in "
        f"{report['frames']} frames; {report['capsules_purged']} capsules purged",
    )


# --- policy ------------------------------------------------------------------------------------------


@policy_app.command("check")
def policy_check(
    context: typer.Context, file: Annotated[str, typer.Argument(metavar="FILE", help="A policy file.")]
) -> None:
    """Check a policy file; print it with every key."""
    session: Session = context.obj
    document = _policy_document(file) or {}
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
    document = _policy_document(file) or {}
    with session.service() as service:
        result = service.set_policy(capsule=capsule, policy=document)
    if session.json:
        _print(_json(result))


# --- views -------------------------------------------------------------------------------------------

VIEWS: Final = ("fuse",)
VIEWS_LATER: Final = ("nvme", "nfs", "csi")

PathOption = Annotated[str | None, typer.Option("--path", metavar="PATH", help="A tree or file.")]
Target = Annotated[str | None, typer.Option("--target", metavar="DIR", help="Where to mount it.")]
ReadOnly = Annotated[bool, typer.Option("--read-only", help="Refuse changes.")]
Background = Annotated[bool, typer.Option("--background", help="Return as soon as it is ready.")]


@project_app.callback(invoke_without_command=True)
def project(
    context: typer.Context,
    view: Annotated[str | None, typer.Option("--view", metavar="NAME", help="What to serve: fuse.")] = None,
    id: Annotated[list[str] | None, typer.Option("--id", metavar="C", help="A capsule.")] = None,  # noqa: A002
    path: PathOption = None,
    target: Target = None,
    read_only: ReadOnly = False,
    background: Background = False,
    at: At = None,
) -> None:
    """Serve a view in the foreground until interrupted."""
    if context.invoked_subcommand is not None:
        return
    if view is None:
        raise UsageError(
            "say which view: --view fuse, or one of: mount, ls, stop", hint="space project --help"
        )
    if view in VIEWS_LATER:
        raise UsageError(f"view {view} is not built yet", hint=f"there is: {', '.join(VIEWS)}")
    if view not in VIEWS:
        raise UsageError(f"no view {view!r}", hint=f"there is: {', '.join(VIEWS)}")
    if id is not None and len(id) > 1:
        raise UsageError(
            "a fuse view shows one capsule or tree", hint="give one --id, or --path of a directory"
        )
    mount(context, id[0] if id else None, path, target, read_only, background, at)


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
    if session.node:
        raise UsageError("a mount is made where the store is", hint="leave --node out, and say --data DIR")
    begun = time.monotonic()
    source, place = id or path or "/", str(Path(target).absolute())

    def serve(announce: Callable[[Document], None]) -> int:
        _serve_mount(session.data, source, place, at=at, read_only=read_only, begun=begun, announce=announce)
        return 0

    if not background:
        serve(_announced)
        return
    from space.projections.fuse.mount import daemonize

    _announced(daemonize(serve, log_file=session.data.absolute() / "mount.log"))


def _announced(ready: Document) -> None:
    for notice in ready.pop("notices"):
        _note(notice)
    _print(_json(ready))
    sys.stdout.flush()
    _note(f"{ready['source']} is at {ready['target']}; end it with: space project stop {ready['target']}")


def _note(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"space: {_clean(text)}\n")
        sys.stderr.flush()


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


def _reading(stack: contextlib.ExitStack, data: Path, *, at: str | None, create: bool) -> Reading:
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
    store, asked = _open(data, Caller(), create=create)
    if store is not None:
        return store
    assert asked is not None
    from space._node import views

    pid = asked.owner()["pid"]
    serving = [view for view in views.listed(data) if view["pid"] == pid]
    what = f", which serves {serving[0]['view']} at {serving[0]['target']}" if serving else ""
    how = f"space project stop {serving[0]['target']}" if serving else f"wait for it, or: kill {pid}"
    raise UnavailableError(
        f"store {data} is in use by process {pid}{what}", hint=f"its present has one mount at a time; {how}"
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
    return _clean(f"{each['name']} {each['state']} {mode} {each.get('source')}{when} {each['target']}")


@project_app.command("stop")
def project_stop(
    context: typer.Context,
    wanted: Annotated[str, typer.Argument(metavar="NAME|TARGET", help="What project ls shows.")],
) -> None:
    """End a view and wait until it is gone."""
    from space._node import views

    session: Session = context.obj
    ended = views.stop(_home(session), wanted)
    session.show(ended, f"ended {_clean(ended['name'])} at {_clean(ended['target'])}")


def _home(session: Session) -> Path:
    """The data directory, also of a node named by its socket."""
    return Path(_node(session.node, Caller()).owner()["data"]) if session.node else session.data


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
    return _clean(f"{mark:<8} {check['name']:<14} {check['value']}{hint}")


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
        _note(str(error))
        return error.kind.exit_status
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        if debug:
            raise
        _note(str(error))
        return 1
    except typer.Abort:
        return INTERRUPTED
    except Exception as error:
        if (message := getattr(error, "format_message", None)) is not None:
            return _misused(message(), getattr(error, "ctx", None))
        if debug:
            raise
        _note(f"{type(error).__name__}: {error} (a defect: please report it, with --debug)")
        return 1
    return status if isinstance(status, int) else 0


def _misused(message: str, context: typer.Context | None) -> int:
    """What typer says about wrong arguments, on one line; all of the help where there were none."""
    path = context.command_path if context is not None else "space"
    if context is not None and message == context.get_help():
        sys.stderr.write(f"{message}\n")
    else:
        _note(f"{message} (see: {path} --help)")
    return UsageError.kind.exit_status


def main() -> NoReturn:
    """The console entry point."""
    signal.signal(signal.SIGTERM, _stopped)
    _fill_standard_streams()
    try:
        status = run(sys.argv[1:])
    finally:
        _detach_stdout()
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
