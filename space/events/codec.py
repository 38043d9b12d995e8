"""Events and batches as bytes: canonical msgpack, one encoding per value.

A batch's metadata is ``[format, [entry, …]]``; an entry is everything one command caused:
``[client, sequence, time_ns, actor, [[number, version, link, field…], …]]``.  ``link`` is the
capsule's own chain (see :func:`chain_link`), so that a zone holding some capsules of a log can still
verify what it holds.  Format: docs/formats/events.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgpack
from blake3 import blake3

from space._errors import EventDecodeError, UsageError
from space.events.fast import fast_frozen
from space.events.registry import BY_CLASS, BY_NUMBER, LINK_BYTES, upcast
from space.events.types import Event

BATCH_FORMAT: Final = 1
METADATA_BYTES_MAX: Final = 64 << 20
ENTRIES_MAX: Final = 1 << 16
EVENTS_MAX: Final = 1 << 17
ACTOR_CHARACTERS_MAX: Final = 255
NO_LINK: Final = bytes(LINK_BYTES)
_SMALL_ARRAYS: Final = [bytes((0x90 | count,)) for count in range(16)]
_BATCH_HEAD: Final = _SMALL_ARRAYS[2] + bytes((BATCH_FORMAT,))
_ENTRY_HEAD: Final = _SMALL_ARRAYS[5]
_LINK_HEAD: Final = bytes((0xC4, LINK_BYTES))
_LINKED_HEADS: Final = {0x90 | count - 1: _SMALL_ARRAYS[count] for count in range(3, 16)}
"""First byte of an event → that of the event with its link, which is one item more."""

assert all(
    schema.number < 128 and schema.version < 128 and len(schema.fields) <= 12 for schema in BY_NUMBER.values()
), "number, version and count of fields are a byte each"

_LIMITS: Final = {
    "raw": False,
    "strict_map_key": True,
    "use_list": True,
    "max_ext_len": 0,
    "max_map_len": 0,
    "max_str_len": 4 << 20,
    "max_bin_len": METADATA_BYTES_MAX,
}


@fast_frozen
class Entry:
    """All events of one command.

    Attributes:
        client: 16-byte client id, or empty when the caller did not ask for retry protection.
        sequence: the client's own command number; with ``client`` it identifies the command.
        time_ns: when the proposer decided it; nanoseconds since 1970, never decreasing along a log.
        actor: who asked, as text (``uid:0``, ``cli``, a host NQN…).
        events: ``(link, event)`` in order.
    """

    client: bytes
    sequence: int
    time_ns: int
    actor: str
    events: tuple[tuple[bytes, Event], ...]


def encode_event(event: Event) -> bytes:
    """Canonical bytes of one event, without its link.

    Raises:
        UsageError: a field is out of its range.
    """
    return _pack(_fields(event))


def decode_event(data: bytes) -> Event:
    """The event in ``data``, upcast to today's schema.

    Raises:
        EventDecodeError: the bytes are anything else.
    """
    return _event(_unpack(data))


def encode_linked(encoded: bytes, link: bytes) -> bytes:
    """An event as it is in a batch: :func:`encode_event` with its link put in, without encoding it again."""
    return b"".join((_LINKED_HEADS[encoded[0]], encoded[1:3], _LINK_HEAD, link, encoded[3:]))


def encode_entry(entry: Entry, linked: Sequence[bytes]) -> bytes:
    """One entry of a batch, its events given as :func:`encode_linked` made them.

    Raises:
        UsageError: a field is out of its range.
    """
    head = _pack([entry.client, entry.sequence, entry.time_ns, entry.actor])
    return b"".join((_ENTRY_HEAD, head[1:], _array_head(len(linked)), *linked))


def join_entries(entries: Sequence[bytes]) -> bytes:
    """Metadata of a batch from its encoded entries: what :func:`encode_batch` makes of the same entries.

    Raises:
        UsageError: the batch is larger than METADATA_BYTES_MAX.
    """
    return _bounded(b"".join((_BATCH_HEAD, _array_head(len(entries)), *entries)))


def chain_link(previous: bytes, encoded: bytes) -> bytes:
    """Link of an event in its capsule's chain: truncated BLAKE3 of the link before and the event's bytes."""
    return blake3(previous + encoded).digest(LINK_BYTES)


def encode_batch(entries: Iterable[Entry]) -> bytes:
    """Metadata of a batch.

    Raises:
        UsageError: a field is out of its range, or the batch is larger than METADATA_BYTES_MAX.
    """
    rows = [
        [
            entry.client,
            entry.sequence,
            entry.time_ns,
            entry.actor,
            [_linked(link, event) for link, event in entry.events],
        ]
        for entry in entries
    ]
    return _bounded(_pack([BATCH_FORMAT, rows]))


def _bounded(data: bytes) -> bytes:
    if len(data) > METADATA_BYTES_MAX:
        raise UsageError(f"one batch of {len(data)} bytes of events; the limit is {METADATA_BYTES_MAX}")
    return data


def decode_batch(data: bytes) -> list[Entry]:
    """All entries of a batch's metadata.

    Raises:
        EventDecodeError: the bytes are anything else.
    """
    entries = []
    for client, sequence, time_ns, actor, rows in batch_rows(data):
        entries.append(Entry(client, sequence, time_ns, actor, linked_events(rows)))
    return entries


def batch_rows(data: bytes) -> list[list[Any]]:
    """Checked entry rows ``[client, sequence, time_ns, actor, event rows]`` whose events are still undecoded.

    Raises:
        EventDecodeError: not a batch.
    """
    document = _unpack(data)
    if type(document) is not list or len(document) != 2 or document[0] != BATCH_FORMAT:
        raise EventDecodeError("not a batch of events", hint="a newer space may have written it")
    rows = document[1]
    if type(rows) is not list or len(rows) > ENTRIES_MAX:
        raise EventDecodeError("not a batch of events")
    for row in rows:
        if not (
            type(row) is list
            and len(row) == 5
            and type(row[0]) is bytes
            and len(row[0]) in (0, 16)
            and type(row[1]) is int
            and row[1] >= 0
            and type(row[2]) is int
            and type(row[3]) is str
            and type(row[4]) is list
        ):
            raise EventDecodeError("a batch entry is malformed")
        for each in row[4]:
            if type(each) is not list or not each or type(each[0]) is not int:
                raise EventDecodeError(f"not an event: {repr(each)[:80]}")
    return rows


def linked_events(rows: list[Any]) -> tuple[tuple[bytes, Event], ...]:
    """``(link, event)`` for each undecoded event row of an entry.

    Raises:
        EventDecodeError: a row is not an event.
    """
    readers = READERS
    return tuple([readers[row[0]](row) for row in rows])


def _linked(link: bytes, event: Event) -> list[Any]:
    number, version, *fields = _fields(event)
    return [number, version, link, *fields]


def _fields(event: Event) -> list[Any]:
    return BY_CLASS[type(event)].write(event)


def _event(row: Any) -> Event:
    if type(row) is not list or len(row) < 2 or type(row[0]) is not int or row[0] not in BY_NUMBER:
        raise EventDecodeError(f"not an event: {repr(row)[:80]}")
    schema = BY_NUMBER[row[0]]
    made: Event = schema.make(upcast(schema, row[1], row[2:]))
    return made


class _Packing:
    """One packer for everything: to make one takes three times as long as to pack a small event.

    It keeps room for the largest it ever packed, and so is made anew after something large.
    """

    def __init__(self) -> None:
        self._pack = msgpack.Packer(use_bin_type=True).pack

    def __call__(self, value: Any) -> bytes:
        try:
            packed: bytes = self._pack(value)
        except (OverflowError, ValueError, TypeError) as error:
            raise UsageError(f"cannot be stored as an event: {error}") from None
        if len(packed) > _PACKER_BYTES_MAX:
            self._pack = msgpack.Packer(use_bin_type=True).pack
        return packed


_PACKER_BYTES_MAX: Final = 1 << 20
_pack: Final = _Packing()


def _array_head(count: int) -> bytes:
    """How msgpack begins an array of so many items."""
    if count < 16:
        return _SMALL_ARRAYS[count]
    return b"\xdc" + count.to_bytes(2, "big") if count < 1 << 16 else b"\xdd" + count.to_bytes(4, "big")


def _unpack(data: bytes) -> Any:
    if len(data) > METADATA_BYTES_MAX:
        raise EventDecodeError(f"{len(data)} bytes of events; the limit is {METADATA_BYTES_MAX}")
    try:
        # An array cannot have more items than there are bytes: without this, nested lies about lengths cost memory.
        return msgpack.unpackb(data, max_array_len=min(EVENTS_MAX, len(data)), **_LIMITS)
    except Exception as error:  # noqa: BLE001 - msgpack raises a dozen classes, RecursionError included
        raise EventDecodeError(f"not msgpack: {type(error).__name__}") from None


def _unknown(row: Any) -> tuple[bytes, Event]:
    raise EventDecodeError(f"not an event: {repr(row)[:80]}", hint="a newer space may have written it")


class _Readers(dict[Any, Any]):
    """Event number → its reader; total, so that the hottest loop there is needs no handler of its own."""

    def __missing__(self, number: Any) -> Any:
        schema = BY_NUMBER.get(number)
        if schema is None:
            return _unknown
        reader = self[number] = schema.read
        return reader


READERS: Final = _Readers()
