"""The payload of a stripe: a range of a capsule, its frames as they are stored.

Without I/O.  Frames stay compressed and encrypted; each is in the payload once, however many parts use it, and
its record points to its place there.  The same extents give the same bytes, so a stripe nobody wrote to keeps
its shards.

A payload is the length of its index (4 bytes, little-endian), the index (MessagePack: for each part ``[offset, length,
skip, records]``), and the frames.  Records are 48 bytes each (docs/formats/frames.md) with source position 0
and the offset among the frames here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Final

import attrs
import msgpack
from crc32c import crc32c

from space._errors import CorruptionError, EventDecodeError
from space.content.frames import Buffer, FrameRef, damaged, pack_frames, unpack_frames

STRIPE_BYTES: Final = 16 << 20
"""Bytes of a capsule in a stripe, where it is not cut finer: what changes in it makes its shards travel again."""

_LENGTH: Final = struct.Struct("<I")


@attrs.frozen
class Part:
    """``length`` bytes at ``offset`` of a capsule: what the frames stand for less the first ``skip`` bytes.

    ``position`` is the batch the frames came with.
    """

    offset: int
    length: int
    position: int
    skip: int
    frames: bytes

    @property
    def end(self) -> int:
        """Behind its last byte."""
        return self.offset + self.length


def stored_bytes(parts: Sequence[Part]) -> int:
    """Length of the payload of these parts, not less than it is."""
    frames = {
        _place(frame, part): frame.stored_length for part in parts for frame in unpack_frames(part.frames)
    }
    index = sum(len(part.frames) + 40 for part in parts)  # 40: three numbers and the marks of MessagePack
    return sum(frames.values()) + index + 16


def pack_payload(parts: Sequence[Part], fetch: Callable[[int, int, int], Buffer]) -> bytes:
    """The payload of these parts; ``fetch`` gives bytes by (position, payload offset, length).

    Raises:
        CorruptionError: a stored frame is not what was written.
    """
    places: dict[_Place, int] = {}
    bodies: list[Buffer] = []
    at = 0
    index = []
    for part in parts:
        records = []
        for frame in unpack_frames(part.frames):
            place = _place(frame, part)
            if not frame.is_zero and place not in places:
                bodies.append(_sound(frame, place[0], fetch))
                places[place] = at
                at += frame.stored_length
            offset = 0 if frame.is_zero else places[place]
            records.append(attrs.evolve(frame, source_position=0, payload_offset=offset))
        index.append([part.offset, part.length, part.skip, pack_frames(records)])
    packed = msgpack.packb(index)
    return b"".join([_LENGTH.pack(len(packed)), packed, *bodies])


_Place = tuple[int, int, int]


def _place(frame: FrameRef, part: Part) -> _Place:
    """Where a frame is stored: position, offset and length."""
    return frame.source_position or part.position, frame.payload_offset, frame.stored_length


def _sound(frame: FrameRef, position: int, fetch: Callable[[int, int, int], Buffer]) -> Buffer:
    body = fetch(position, frame.payload_offset, frame.stored_length)
    if len(body) != frame.stored_length or crc32c(body) != frame.crc:
        raise damaged(frame, position, "its checksum is wrong")
    return body


def unpack_payload(payload: bytes) -> tuple[list[Part], memoryview]:
    """Parts, and the frames their records point into.

    Raises:
        CorruptionError: it is no payload.
    """
    view = memoryview(payload)
    try:
        (length,) = _LENGTH.unpack_from(payload)
        frames = view[_LENGTH.size + length :]
        rows = msgpack.unpackb(view[_LENGTH.size : _LENGTH.size + length])
        parts = [_part(*row) for row in rows]
    except (
        ValueError,
        TypeError,
        struct.error,
        msgpack.exceptions.UnpackException,
        EventDecodeError,
    ) as error:
        raise CorruptionError(f"not the payload of a stripe: {error!r:.200}") from None
    return parts, frames


def _part(offset: int, length: int, skip: int, frames: bytes) -> Part:
    numbers = (offset, length, skip)
    if any(type(each) is not int or not 0 <= each < 1 << 63 for each in numbers) or type(frames) is not bytes:
        raise ValueError("part")
    if sum(each.plain_length for each in unpack_frames(frames)) < skip + length:
        raise ValueError("part longer than its frames")
    return Part(offset, length, 0, skip, frames)
