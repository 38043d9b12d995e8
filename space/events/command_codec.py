"""Requests as plain data, so that a node that does not lead can hand them to the one that does.

A request is ``[actor, client, sequence, name, fields]`` with the fields of the command in order of its class, and
``[counter, value]`` behind them where it has a guard; stored bytes of frames travel beside the document as attachments
and are named by number.  The last field of those that change bytes, ``reserved``, is left out where it is None: nodes
that do not know it yet expect that, as they do not know guards and refuse a request with one.  The bytes
come from an authenticated member of the same cluster; they are checked all the same, so that a newer or broken one
gets an error and not a state nobody can explain.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Final

import attrs

from space._errors import UsageError
from space.events import commands as cmd
from space.events.commands import Buffer, Request, StoredFrame
from space.events.types import Kind

REQUESTS_MAX: Final = 1 << 14
"""Requests in one document: what one node has queued at once."""

_RESERVED: Final = frozenset({cmd.WriteExtent, cmd.CopyRange, cmd.Deallocate})
_CLASSES: Final[dict[str, type[Any]]] = {each.__name__: each for each in typing.get_args(cmd.Command)}


def encode_requests(requests: Sequence[Request]) -> tuple[list[Any], list[Buffer]]:
    """A document of msgpack's types, and the buffers that go beside it."""
    attachments: list[Buffer] = []
    return [_encode(request, attachments) for request in requests], attachments


def _encode(request: Request, attachments: list[Buffer]) -> list[Any]:
    command = request.command
    if isinstance(command, cmd.WriteExtent):
        fields: list[Any] = [bytes(command.capsule), command.offset, command.length, [], command.change]
        fields.append(command.reserved)
        for frame in command.frames:
            at = None
            if frame.stored is not None:
                at = len(attachments)
                attachments.append(frame.stored)
            fields[3].append([frame.record, at])
    else:
        fields = [_plain(getattr(command, name)) for name in _NAMES[type(command)]]
    if type(command) in _RESERVED and fields[-1] is None:
        fields.pop()
    row = [request.actor, request.client, request.sequence, type(command).__name__, fields]
    if request.guard is not None:
        row.append([request.guard.name, request.guard.value])
    return row


def _plain(value: Any) -> Any:
    if isinstance(value, cmd.NewKey):
        return [value.key, value.version, value.wrapped]
    if type(value) in _NAMES:
        return [type(value).__name__, [_plain(getattr(value, name)) for name in _NAMES[type(value)]]]
    if isinstance(value, bytes):
        return bytes(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value


def decode_requests(document: Any, attachments: Sequence[Buffer]) -> list[Request]:
    """The requests of a document.

    Raises:
        UsageError: it is not one.
    """
    if not isinstance(document, list) or len(document) > REQUESTS_MAX:
        raise UsageError("not a list of requests")
    try:
        return [_decode(row, attachments) for row in document]
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise UsageError(f"not a request: {error!r:.200}", hint="is that node older or newer?") from None


def _decode(row: Any, attachments: Sequence[Buffer]) -> Request:
    actor, client, sequence, name, fields, *rest = row
    guard = _guard(*rest) if rest else None
    if type(actor) is not str or type(client) is not bytes or type(sequence) is not int:
        raise TypeError("actor, client or sequence")
    made = _CLASSES[name]
    readers = _READERS[made]
    if type(fields) is list and made in _RESERVED and len(fields) == len(readers) - 1:
        fields = [*fields, None]
    if type(fields) is not list or len(fields) != len(readers):
        raise ValueError(f"fields of {name}")
    if made is cmd.WriteExtent:
        return Request(_write(fields, attachments), actor, client, sequence, guard)
    values = [read(value) for read, value in zip(readers, fields, strict=True)]
    return Request(made(*values), actor, client, sequence, guard)


def _guard(row: Any) -> cmd.Guard:
    name, value = row
    if type(name) is not bytes or type(value) is not int:
        raise TypeError("guard")
    return cmd.Guard(name, value)


def _write(fields: list[Any], attachments: Sequence[Buffer]) -> cmd.WriteExtent:
    """What nearly all requests are, in a third of the time of the general way."""
    capsule, offset, length, frames, change, reserved = fields
    if not (
        type(capsule) is bytes
        and type(offset) is int
        and type(length) is int
        and type(frames) is list
        and (change is None or type(change) is int)
        and (reserved is None or type(reserved) is int)
    ):
        raise TypeError("fields of WriteExtent")
    stored = [_frame(each, attachments) for each in frames]
    return cmd.WriteExtent(capsule, offset, length, stored, change, reserved)


def _frame(row: Any, attachments: Sequence[Buffer]) -> StoredFrame:
    record, at = row
    if type(record) is not bytes or not (at is None or (type(at) is int and at >= 0)):
        raise TypeError("frame")
    return StoredFrame(record, None if at is None else attachments[at])


_Read = Callable[[Any], Any]


def _exactly(*allowed: type[Any]) -> _Read:
    def read(value: Any) -> Any:
        if type(value) not in allowed:
            raise TypeError(f"{type(value).__name__} instead of {allowed[0].__name__}")
        return value

    return read


def _key(value: Any) -> cmd.NewKey | None:
    if value is None:
        return None
    key, version, wrapped = value
    if type(key) is not int or type(version) is not int or type(wrapped) is not bytes:
        raise TypeError("key")
    return cmd.NewKey(key, version, wrapped)


def _ranges(value: Any) -> list[tuple[int, int, int]]:
    integer = _exactly(int)
    return [(integer(position), integer(offset), integer(length)) for position, offset, length in value]


def _ids(value: Any) -> list[bytes]:
    return [_exactly(bytes)(each) for each in value]


def _commands(value: Any) -> list[cmd.Command]:
    """The commands of a :class:`space.events.commands.Together`: without payload, and none of that kind again."""
    found: list[cmd.Command] = []
    for name, fields in value:
        made = _CLASSES[name]
        if made in {cmd.Together, cmd.WriteExtent}:
            raise TypeError(f"{name} among several")
        values = [read(each) for read, each in zip(_READERS[made], fields, strict=True)]
        found.append(made(*values))
    return found


_SPECIAL: Final[dict[tuple[type[Any], str], _Read]] = {
    (cmd.CreateCapsule, "kind"): Kind,
    (cmd.CreateCapsule, "key"): _key,
    (cmd.SetPolicy, "key"): _key,
    (cmd.ReclaimPayload, "ranges"): _ranges,
    (cmd.PurgeCapsules, "capsules"): _ids,
    (cmd.ForgetReplies, "clients"): _ids,
    (cmd.WriteExtent, "frames"): list,
    (cmd.Together, "commands"): _commands,
}


def _reader(made: type[Any], name: str, hint: Any) -> _Read:
    special = _SPECIAL.get((made, name))
    if special is not None:
        return special
    return _exactly(*(typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)))


_NAMES: Final = {made: [field.name for field in attrs.fields(made)] for made in _CLASSES.values()}
_READERS: Final = {
    made: [_reader(made, name, typing.get_type_hints(made)[name]) for name in names]
    for made, names in _NAMES.items()
}
