"""What can be asked of a process that has a store open, and by whom it is carried out.

The control socket and HTTP both end here: a :class:`Target` is the store, or the node with its shards, behind
them.  A request is plain data; nothing of it is believed before :func:`carry_out` has looked at it.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol

from space._errors import UsageError
from space._node.caller import Caller, Document, Terms
from space._node.service import Service, methods
from space._node.store import Store
from space.events.ids import ID_BYTES

SEQUENCE_MAX: Final = (1 << 63) - 1


class Target(Protocol):
    """Who carries out calls."""

    @property
    def path(self) -> Path:
        """The data directory."""

    def find(self, method: str) -> Callable[..., Any] | None:
        """The method of that name; its annotations say which arguments it takes."""

    def call(self, method: str, arguments: Document, caller: Caller, terms: Terms) -> Any:
        """Carries out a call whose arguments were checked; a stream comes as an iterator, for this thread."""


class StoreTarget:
    """A store of this process alone."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def path(self) -> Path:
        return self._store.path

    def find(self, method: str) -> Callable[..., Any] | None:
        return methods().get(method)

    def call(self, method: str, arguments: Document, caller: Caller, terms: Terms) -> Any:
        return methods()[method](Service(self._store, caller, terms), **arguments)


def carry_out(target: Target, request: Document, caller: Caller, descriptor: int | None) -> Any:
    """Checks a request and carries it out.

    Raises:
        SpaceError: it is not one that can be carried out, or failed.
    """
    name, arguments = str(request.get("method")), request.get("arguments")
    method = target.find(name)
    if method is None or not isinstance(arguments, dict):
        raise UsageError(f"no such operation: {request.get('method')!r:.80}", hint="is that node older?")
    if "descriptor" in arguments:
        raise UsageError("a descriptor travels beside the request")
    if descriptor is not None:
        arguments["descriptor"] = descriptor
    check_arguments(method, arguments)
    return target.call(name, arguments, caller, terms_of(request))


def terms_of(request: Document) -> Terms:
    """The terms in a request.

    Raises:
        UsageError: they are malformed.
    """
    stale, client, sequence = (
        request.get("stale", False),
        request.get("client", ""),
        request.get("sequence", 0),
    )
    try:
        raw = bytes.fromhex(client)
    except (TypeError, ValueError):
        raw = b"?"
    if type(stale) is not bool or len(raw) not in (0, ID_BYTES):
        raise UsageError(
            "not the terms of a call", hint="stale: true or false; client: 32 hexadecimal digits"
        )
    if type(sequence) is not int or not 0 <= sequence <= SEQUENCE_MAX:
        raise UsageError(f"not a number of a call: {sequence!r:.40}")
    return Terms(stale, raw, sequence)


def check_arguments(method: Callable[..., Any], arguments: Document) -> None:
    """Refuses arguments a method does not have, lacks, or of other types than it is annotated with.

    Raises:
        UsageError: naming the argument.
    """
    hints = hints_of(method)
    needed = set(hints) - set(method.__kwdefaults__ or ())
    for name in needed - set(arguments):
        raise UsageError(f"{method.__name__} needs the argument {name}")
    for name, value in arguments.items():
        if name not in hints:
            raise UsageError(f"{method.__name__} has no argument {name!r}", hint="is that node older?")
        if not isinstance(value, hints[name]) or (isinstance(value, bool) and bool not in hints[name]):
            raise UsageError(f"argument {name} of {method.__name__} cannot be {value!r:.80}")


def hints_of(method: Callable[..., Any]) -> dict[str, tuple[type, ...]]:
    """Types each argument of a method may have."""
    found = typing.get_type_hints(method)
    found.pop("return", None)
    return {name: tuple(_plain(hint)) for name, hint in found.items()}


def _plain(hint: Any) -> Iterator[type]:
    if isinstance(hint, types.UnionType):
        for part in typing.get_args(hint):
            yield from _plain(part)
    else:
        yield typing.get_origin(hint) or hint
