"""Shipments as bytes: what one zone sends to another at a time, checked as a whole before anything of it counts.

::

    header (104 bytes) | document (msgpack) | attachments (u32 each) | lengths (u32 each) | frames | BLAKE3 (32 bytes)

A shipment belongs to one stream (home, zone, shard, lane) and has *entries*: each is one entry of the receiver's log,
moves the cursor of the stream, and stands for one batch of the home's log or for one part of copies beside it.  The
stored bytes of frames lie behind the document, each once however often it is named.  Format: docs/formats/shipment.md.

Bytes come from a zone that proved who it is, over a network: the hash is checked first, every count and length against
its limit before anything is allocated for it, and what the document says by :mod:`space.events.command_codec`.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Final

import attrs
import msgpack
from blake3 import blake3

from space._errors import CorruptionError, UsageError
from space.events import commands as cmd
from space.events.codec import METADATA_BYTES_MAX
from space.events.command_codec import decode_commands, encode_commands
from space.events.commands import Buffer
from space.events.registry import U32_MAX, U63_MAX
from space.events.types import RESUME_BYTES_MAX

MAGIC: Final = b"SPACEFED"
FORMAT: Final = 1

ENTRIES_MAX: Final = 1000
"""Entries in one shipment: more save no round trip, and each is to be decided before the first is durable."""

FRAMES_MAX: Final = 1 << 20
"""Frames in one shipment, and mentions of them."""

SHIPMENT_BYTES_MAX: Final = 128 << 20
"""A batch's events take 64 MiB at most, and a batch with more payload than half of that is shipped in parts."""

HASH_BYTES: Final = 32
_HEADER: Final = struct.Struct("<8sHHIII16s16sQIQIIIIIQ")
HEADER_BYTES: Final = _HEADER.size
_U32: Final = struct.Struct("<I")

if HEADER_BYTES != 104:
    raise AssertionError("the header has exactly 104 bytes: docs/formats/shipment.md")


@attrs.frozen
class Entry:
    """What becomes one entry of the receiver's log: see :class:`space.events.commands.ReceiveShipment`."""

    through_position: int
    through_step: int
    time_ns: int
    commands: Sequence[cmd.Command]
    resume: bytes = b""


@attrs.frozen
class Shipment:
    """Entries of one stream, the first of which begins where the cursor of the stream has to be.

    ``home`` and ``zone`` are ids: where it comes from, and where it goes.
    """

    home: bytes
    zone: bytes
    shard: int
    lane: int
    epoch: int
    from_position: int
    from_step: int
    entries: Sequence[Entry]

    @property
    def through(self) -> tuple[int, int]:
        """Position and step of the cursor after it."""
        last = self.entries[-1]
        return last.through_position, last.through_step

    def received(self) -> list[cmd.ReceiveShipment]:
        """The commands the receiver decides, in order."""
        at = (self.from_position, self.from_step)
        found = []
        for entry in self.entries:
            through = (entry.through_position, entry.through_step)
            found.append(
                cmd.ReceiveShipment(
                    self.home,
                    self.shard,
                    self.lane,
                    at[0],
                    through[0],
                    entry.time_ns,
                    entry.commands,
                    at[1],
                    through[1],
                    entry.resume,
                    self.epoch,
                )
            )
            at = through
        return found


def encode_shipment(shipment: Shipment) -> bytes:
    """The bytes of a shipment.

    Raises:
        UsageError: it is larger than a receiver takes.
    """
    attachments: list[Buffer] = []
    rows = []
    for entry in shipment.entries:
        commands, buffers = encode_commands(entry.commands)
        attachments += buffers
        moved = [entry.through_position, entry.through_step, entry.time_ns, entry.resume]
        rows.append([*moved, len(buffers), commands])
    document = msgpack.packb(rows, use_bin_type=True)
    distinct = {id(each): each for each in attachments}
    index = {key: number for number, key in enumerate(distinct)}
    frames = [memoryview(each).cast("B") for each in distinct.values()]
    tables = [
        struct.pack(f"<{len(attachments)}I", *(index[id(each)] for each in attachments)),
        struct.pack(f"<{len(frames)}I", *map(len, frames)),
    ]
    header = _HEADER.pack(
        MAGIC,
        FORMAT,
        0,
        shipment.shard,
        shipment.lane,
        shipment.epoch,
        shipment.home,
        shipment.zone,
        shipment.from_position,
        shipment.from_step,
        *shipment.through,
        len(rows),
        len(attachments),
        len(frames),
        len(document),
        sum(map(len, frames)),
    )
    size = HEADER_BYTES + len(document) + sum(map(len, tables)) + sum(map(len, frames)) + HASH_BYTES
    if size > SHIPMENT_BYTES_MAX or len(rows) > ENTRIES_MAX or len(attachments) > FRAMES_MAX:
        raise UsageError(f"a shipment of {size} bytes, {len(rows)} entries and {len(attachments)} frames")
    parts = [header, document, *tables, *frames]
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return b"".join([*parts, hasher.digest()])


@attrs.frozen
class _Sizes:
    """How long the parts of a shipment are."""

    entries: int
    attachments: int
    frames: int
    document: int
    frame_bytes: int

    @property
    def total(self) -> int:
        tables = (self.attachments + self.frames) * _U32.size
        return HEADER_BYTES + self.document + tables + self.frame_bytes + HASH_BYTES


def decode_shipment(data: Buffer) -> Shipment:
    """The shipment in ``data``, whose buffers its commands go on using.

    Raises:
        CorruptionError: the bytes are not those that were sent.
        UsageError: they are, and make no shipment this program knows.
    """
    view = memoryview(data).cast("B")
    head, through, sizes = _read_header(view)
    end = len(view) - HASH_BYTES
    if blake3(view[:end]).digest() != view[end:]:
        raise CorruptionError("a shipment whose hash is another: it was changed on the way")
    attachments = _attachments(view, sizes)
    rows = _unpacked(view[HEADER_BYTES : HEADER_BYTES + sizes.document])
    if type(rows) is not list or len(rows) != sizes.entries:
        raise UsageError("a shipment with another number of entries than it says")
    rest = iter(attachments)
    entries = [_entry(row, rest) for row in rows]
    if next(rest, None) is not None:
        raise UsageError("a shipment with frames no entry has")
    shipment = attrs.evolve(head, entries=entries)
    steps = [(head.from_position, head.from_step)]
    steps += [(each.through_position, each.through_step) for each in entries]
    if not all(_follows(*pair) for pair in itertools.pairwise(steps)) or steps[-1] != through:
        raise UsageError("a shipment whose entries do not follow each other")
    return shipment


def _read_header(view: memoryview) -> tuple[Shipment, tuple[int, int], _Sizes]:
    """What the header says: a shipment without its entries, where it leads to, how long its parts are.

    Raises:
        CorruptionError, UsageError: see :func:`decode_shipment`.
    """
    if len(view) < HEADER_BYTES + HASH_BYTES or len(view) > SHIPMENT_BYTES_MAX:
        raise CorruptionError(f"not a shipment: {len(view)} bytes")
    magic, version, reserved, shard, lane, epoch, home, zone, at, at_step, to, to_step, *sizes = (
        _HEADER.unpack_from(view)
    )
    if magic != MAGIC:
        raise CorruptionError("not a shipment: it begins with something else")
    if version != FORMAT or reserved:
        raise UsageError(
            f"a shipment of format {version}.{reserved}, this program knows {FORMAT}.0",
            hint="upgrade space here, or there",
        )
    found = _Sizes(*sizes)
    if not (
        0 < found.entries <= ENTRIES_MAX
        and found.frames <= found.attachments <= FRAMES_MAX
        and found.document <= METADATA_BYTES_MAX
        and found.total == len(view)
    ):
        raise CorruptionError("a shipment of another length than it says: it was cut or changed on the way")
    if not (at <= U63_MAX and to <= U63_MAX):
        raise UsageError("a shipment with positions no log has")
    return Shipment(home, zone, shard, lane, epoch, at, at_step, ()), (to, to_step), found


def _attachments(view: memoryview, sizes: _Sizes) -> list[Buffer]:
    """The stored bytes of frames in the order the document names them.

    Raises:
        UsageError: the tables do not fit what they are about.
    """
    at = HEADER_BYTES + sizes.document
    named = struct.unpack_from(f"<{sizes.attachments}I", view, at)
    at += sizes.attachments * _U32.size
    lengths = struct.unpack_from(f"<{sizes.frames}I", view, at)
    at += sizes.frames * _U32.size
    if sum(lengths) != sizes.frame_bytes or any(each >= sizes.frames for each in named):
        raise UsageError("a shipment with frames of other lengths or numbers than it says")
    ends = list(itertools.accumulate(lengths, initial=at))
    frames = [view[start:stop] for start, stop in itertools.pairwise(ends)]
    return [frames[each] for each in named]


def _unpacked(document: memoryview) -> Any:
    size = len(document)
    try:
        return msgpack.unpackb(
            document,
            raw=False,
            strict_map_key=True,
            use_list=True,
            max_ext_len=0,
            max_map_len=0,
            max_array_len=min(FRAMES_MAX, size),
            max_bin_len=size,
            max_str_len=size,
        )
    except Exception as error:  # noqa: BLE001 - msgpack raises a dozen classes, RecursionError included
        raise UsageError(f"a shipment without a document: {type(error).__name__}") from None


def _entry(row: Any, attachments: Iterator[Buffer]) -> Entry:
    """An entry; it takes as many of the attachments as it says."""
    if not (
        type(row) is list
        and len(row) == 6
        and type(row[0]) is int
        and 0 <= row[0] <= U63_MAX
        and type(row[1]) is int
        and 0 <= row[1] <= U32_MAX
        and type(row[2]) is int
        and -(1 << 63) <= row[2] < 1 << 63
        and type(row[3]) is bytes
        and len(row[3]) <= RESUME_BYTES_MAX
        and type(row[4]) is int
        and 0 <= row[4] <= FRAMES_MAX
    ):
        raise UsageError("a shipment with a malformed entry")
    position, step, time_ns, resume, count, commands = row
    own = list(itertools.islice(attachments, count))
    return Entry(position, step, time_ns, decode_commands(commands, own), resume)


def _follows(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Whether a cursor moves from one to the other: to the next step, or to a later position."""
    return after == (before[0], before[1] + 1) or (after[0] > before[0] and after[1] == 0)
