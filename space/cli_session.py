"""What every command shares: the global options, the way to the store they mean, and how results are shown."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

import typer

from space._errors import (
    DiskFullError,
    NotFoundError,
    SpaceError,
    StorageError,
    UnavailableError,
    UsageError,
)
from space._node.caller import Caller, Document

if TYPE_CHECKING:
    from space._node.service import Service
    from space._node.store import Store

IN_USE_SECONDS: Final = 3.0
"""How long a command waits for another to let go of the directory; anew for each that had it."""

IN_USE_POLL_SECONDS: Final = 0.02
PROGRESS_AFTER_SECONDS: Final = 1.0
PROGRESS_SECONDS: Final = 0.1

At = Annotated[
    str | None, typer.Option("--at", metavar="MOMENT", help="@POSITION, ISO-8601, -5m, or a snapshot.")
]
Capsule = Annotated[str, typer.Argument(metavar="CAPSULE", help="A UUID or a path in the tree.")]
PolicyFile = Annotated[str | None, typer.Option("--policy-file", metavar="FILE", help="Policy (YAML).")]


class Progress(Caller):
    """A line on a terminal's stderr, for what takes longer than a second."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._shown = 0.0
        self._terminal = is_terminal()

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


def is_terminal() -> bool:
    """Whether somebody watches."""
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

    def __init__(
        self,
        data: Path,
        node: str | None,
        *,
        as_json: bool,
        stale: bool = False,
        certificate: Path | None = None,
    ) -> None:
        self.data = data
        self.node = node
        self.json = as_json
        self.stale = stale
        self.certificate = certificate

    @contextlib.contextmanager
    def service(self, *, create: bool = False) -> Iterator[Service]:
        """The store's operations: of the node named, else of the process that has it open, else our own.

        Raises:
            UnavailableError: another process has it open and does not answer.
        """
        caller = Progress()
        try:
            store, asked = (
                (None, self._nodes(self.node, caller))
                if self.node
                else open_or_ask(self.data, caller, create=create, stale=self.stale)
            )
            if asked is not None:
                yield asked
            elif store is not None:
                from space._node.service import Service

                with store:
                    yield Service(store, caller)
        finally:
            caller.clear()

    def _nodes(self, addresses: str, caller: Caller) -> Service:
        from space.remote import connect

        return connect(addresses, caller=caller, certificate=self.certificate, stale=self.stale)

    @contextlib.contextmanager
    def running(self) -> Iterator[Any]:
        """The operations of a running node: the one named, or the one that has the data directory open.

        Raises:
            UnavailableError: none is running there.
        """
        caller = Progress()
        try:
            asked = self._nodes(self.node, caller) if self.node else ask_owner(self.data, caller)
            if asked is None:
                raise UnavailableError(
                    f"no node is running on {self.data}",
                    hint=f"space serve --data {self.data}, or say --node",
                )
            yield asked
        finally:
            caller.clear()

    def show(self, document: Any, text: str) -> None:
        """One JSON document, or words."""
        emit(to_json(document) if self.json else text)

    def show_list(self, items: Iterable[Document], line: Callable[[Document], str]) -> None:
        """A JSON list, or a line each; never held whole."""
        if not self.json:
            for item in items:
                emit(line(item))
            return
        separator = "["
        for item in items:
            emit(separator + to_json(item), end="")
            separator = ",\n"
        emit("]" if separator != "[" else "[]")


def open_or_ask(
    data: Path, caller: Caller, *, create: bool, stale: bool = False
) -> tuple[Store | None, Service | None]:
    """The store, opened here; or the process that has it open, if it answers.

    Raises:
        UnavailableError: another process has it open, and neither answers nor ends soon.
    """
    owner, deadline = "", 0.0
    while True:
        if (asked := ask_owner(data, caller, stale=stale)) is not None:
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


def ask_owner(data: Path, caller: Caller, *, stale: bool = False) -> Service | None:
    """The process that has the store open, if it answers."""
    socket = data / "control.sock"
    if not socket.exists():
        return None
    from space.control import SocketEndpoint
    from space.remote import Nodes

    endpoint = SocketEndpoint(socket)
    try:
        endpoint.check()
    except UnavailableError:
        return None  # left behind by a process that was killed
    return cast("Service", Nodes([endpoint], caller=caller, stale=stale, retry=False))


def to_json(document: Any) -> str:
    """A document as one line."""
    return json.dumps(document, ensure_ascii=False)


def emit(text: str, end: str = "\n") -> None:
    """Prints a result."""
    sys.stdout.write(text + end)


def clean(text: str) -> str:
    """Text that cannot move a terminal's cursor or break a line."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def parse_size_option(text: str | None, what: str) -> int | None:
    """The size an option gives.

    Raises:
        UsageError: it is not one; the message names the option.
    """
    from space.policy.units import parse_size

    try:
        return None if text is None else parse_size(text)
    except UsageError as error:
        raise UsageError(f"{what}: {Exception.__str__(error)}", hint=error.hint) from None


def formatted(size: int) -> str:
    """A size in words."""
    from space.policy.units import format_size

    return format_size(size)


def policy_document(file: str | None) -> Document | None:
    """The policy in a file, if one is named.

    Raises:
        PolicyFileError: it is wrong.
    """
    if file is None:
        return None
    from space.policy.model import load_policy

    return load_policy(file).to_document()


def system_error(error: OSError, what: str) -> SpaceError:
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


def note(text: str) -> None:
    """A line for people, on stderr."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"space: {clean(text)}\n")
        sys.stderr.flush()


@contextlib.contextmanager
def answering(service: Any) -> Iterator[None]:
    """While this process keeps the store for long, others can use it through the control socket."""
    from space.remote import Nodes

    if isinstance(service, Nodes):
        yield
        return
    from space.control import ControlServer

    with ControlServer(service.store):
        yield
