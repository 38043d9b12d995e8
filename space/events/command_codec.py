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
from space.events.codec import EVENTS_MAX
from space.events.commands import Buffer, Request, StoredFrame
from space.events.types import Kind, ZoneKind

REQUESTS_MAX: Final = 1 << 14
"""Requests in one document: what one node has queued at once."""

_RESERVED: Final = frozenset({cmd.WriteExtent, cmd.CopyRange, cmd.Deallocate})
COMMANDS_MAX: Final = EVENTS_MAX
"""Commands in one: as many as the batch of a log they were made from has events."""

_PLAIN: Final = frozenset((bytes, int, bool, str, type(None)))
_CLASSES: Final[dict[str, type[Any]]] = {each.__name__: each for each in typing.get_args(cmd.Command)}


def encode_requests(requests: Sequence[Request]) -> tuple[list[Any], list[Buffer]]:
    """A document of msgpack's types, and the buffers that go beside it."""
    attachments: list[Buffer] = []
    return [_encode(request, attachments) for request in requests], attachments


def encode_commands(commands: Sequence[cmd.Command]) -> tuple[list[Any], list[Buffer]]:
    """Commands alone, ``[name, fields]`` each, and the buffers that go beside them."""
    attachments: list[Buffer] = []
    return [_named(command, attachments) for command in commands], attachments


def _encode(request: Request, attachments: list[Buffer]) -> list[Any]:
    row = [request.actor, request.client, request.sequence, *_named(request.command, attachments)]
    if request.guard is not None:
        row.append([request.guard.name, request.guard.value])
    return row


def _named(command: cmd.Command, attachments: list[Buffer]) -> list[Any]:
    """Name and fields of a command; stored bytes in it are added to ``attachments``."""
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
        fields = [_plain(getattr(command, name), attachments) for name in _NAMES[type(command)]]
    if type(command) in _RESERVED and fields[-1] is None:
        fields.pop()
    return [type(command).__name__, fields]


def _plain(value: Any, attachments: list[Buffer]) -> Any:
    if type(value) in _PLAIN:  # nearly all of them
        return value
    if isinstance(value, cmd.NewKey):
        return [value.key, value.version, value.wrapped]
    if type(value) in _NAMES:
        return _named(value, attachments)
    if isinstance(value, bytes):
        return bytes(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, tuple | list):
        return [_plain(each, attachments) for each in value]
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


def decode_commands(rows: Any, attachments: Sequence[Buffer]) -> list[cmd.Command]:
    """The commands that :func:`encode_commands` made ``rows`` of.

    Raises:
        UsageError: they are not commands.
    """
    if not isinstance(rows, list) or len(rows) > COMMANDS_MAX:
        raise UsageError("not a list of commands")
    try:
        return [_command(name, fields, attachments) for name, fields in rows]
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise UsageError(f"not a command: {error!r:.200}", hint="is that zone older or newer?") from None


def _decode(row: Any, attachments: Sequence[Buffer]) -> Request:
    actor, client, sequence, name, fields, *rest = row
    guard = _guard(*rest) if rest else None
    if type(actor) is not str or type(client) is not bytes or type(sequence) is not int:
        raise TypeError("actor, client or sequence")
    return Request(_command(name, fields, attachments), actor, client, sequence, guard)


def _command(
    name: Any, fields: Any, attachments: Sequence[Buffer], among: frozenset[type[Any]] | None = None
) -> cmd.Command:
    """A command from its name and fields; one of ``among`` where it is one of several."""
    made = _CLASSES[name]
    if among is not None and made not in among:
        raise TypeError(f"{name} among several")
    readers = _READERS[made]
    if type(fields) is list and made in _RESERVED and len(fields) == len(readers) - 1:
        fields = [*fields, None]
    if type(fields) is not list or len(fields) != len(readers):
        raise ValueError(f"fields of {name}")
    if made is cmd.WriteExtent:
        return _write(fields, attachments)
    within = _WITHIN.get(made)
    if within is not None:
        at = _NAMES[made].index("commands")
        among, limit = within
        if type(fields[at]) is not list or len(fields[at]) > limit:
            raise TypeError(f"commands of {name}")
        inner = [_command(each, row, attachments, among) for each, row in fields[at]]
        fields = [*fields[:at], inner, *fields[at + 1 :]]
    values = [read(value) for read, value in zip(readers, fields, strict=True)]
    command: cmd.Command = made(*values)
    return command


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


def _rows(value: Any) -> list[tuple[int, int, bytes]]:
    integer = _exactly(int)
    return [(integer(key), integer(version), _exactly(bytes)(row)) for key, version, row in value]


def _numbers(value: Any) -> list[int]:
    return [_exactly(int)(each) for each in value]


def _ids(value: Any) -> list[bytes]:
    return [_exactly(bytes)(each) for each in value]


def _shipped(value: Any) -> list[tuple[bytes, int]]:
    return [(_exactly(bytes)(capsule), _exactly(int)(position)) for capsule, position in value]


def _places(value: Any) -> list[tuple[bytes, bytes]]:
    return [(_exactly(bytes)(parent), _exactly(bytes)(name)) for parent, name in value]


def _times(value: Any) -> tuple[int, int, int, int]:
    atime, mtime, ctime, btime = map(_exactly(int), value)
    return atime, mtime, ctime, btime


def _capsule_times(value: Any) -> list[tuple[bytes, tuple[int, int, int, int]]]:
    return [(_exactly(bytes)(capsule), _times(times)) for capsule, times in value]


def _steps(value: Any) -> list[tuple[int, int, int, int]] | None:
    return None if value is None else [_times(each) for each in value]


def _decoded(value: Any) -> Any:
    """Commands of several are decoded with their attachments before the other fields are."""
    return value


_SPECIAL: Final[dict[tuple[type[Any], str], _Read]] = {
    (cmd.CreateCapsule, "kind"): Kind,
    (cmd.CreateCapsule, "key"): _key,
    (cmd.SetPolicy, "key"): _key,
    (cmd.SetArrivalPolicy, "key"): _key,
    (cmd.ReclaimPayload, "ranges"): _ranges,
    (cmd.PurgeCapsules, "capsules"): _ids,
    (cmd.ForgetReplies, "clients"): _ids,
    (cmd.WriteExtent, "frames"): list,
    (cmd.RewrapKeys, "rows"): _rows,
    (cmd.DestroyKeys, "keys"): _numbers,
    (cmd.Together, "commands"): _decoded,
    (cmd.Copied, "commands"): _decoded,
    (cmd.Copied, "times"): _times,
    (cmd.ReceiveShipment, "commands"): _decoded,
    (cmd.LoseHome, "commands"): _decoded,
    (cmd.LoseHome, "cursors"): _ranges,
    (cmd.LoseHome, "kept"): _ids,
    (cmd.LoseHome, "times"): _capsule_times,
    (cmd.LoseHome, "given"): _ids,
    (cmd.FollowHeir, "commands"): _decoded,
    (cmd.FollowHeir, "same"): _ids,
    (cmd.FollowHeir, "times"): _capsule_times,
    (cmd.FollowHeir, "gone"): _ids,
    (cmd.FollowHeir, "waiting"): _ids,
    (cmd.PromoteZone, "cursors"): _steps,
    (cmd.PromoteZone, "incomplete"): _ids,
    (cmd.GiveHomes, "capsules"): _ids,
    (cmd.KeepHomes, "capsules"): _ids,
    (cmd.RecordShipment, "capsules"): _shipped,
    (cmd.RecordShipment, "withdrawn"): _ids,
    (cmd.PlaceCapsule, "names"): _places,
    (cmd.PlaceCapsule, "gone"): _places,
    (cmd.DefineZone, "kind"): ZoneKind,
    (cmd.AddZone, "kind"): ZoneKind,
    (cmd.ChangeZone, "kind"): ZoneKind,
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

_ONES: Final = frozenset(_CLASSES.values()) - {
    cmd.Together,
    cmd.ReceiveShipment,
    cmd.LoseHome,
    cmd.FollowHeir,
}
_WITHIN: Final = {
    cmd.Together: (_ONES - {cmd.Copied}, REQUESTS_MAX),
    cmd.Copied: (_ONES - {cmd.Copied}, COMMANDS_MAX),
    cmd.ReceiveShipment: (_ONES, COMMANDS_MAX),
    cmd.LoseHome: (_ONES - {cmd.Copied}, COMMANDS_MAX),
    cmd.FollowHeir: (_ONES - {cmd.Copied}, COMMANDS_MAX),
}
"""What several commands as one may be made of, and how many: so there is an end to how deep they are."""
