"""Which ranges of a block capsule hold something, and which differ between two: from the content map, a page at a time.

Frames are compared by the hash of what they hold (or, where there is none, by where it is stored): what was written
again as it was, at the same place and in the same frames, has not changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final

import attrs

from space._node.caller import Document
from space._node.reading import Reading
from space.content.frames import NO_HASH, unpack_frames
from space.events.ids import CapsuleId
from space.projections import content_map

RANGES_MAX: Final = 4096
"""Ranges of one page: what a message of gRPC takes easily."""

FRAMES_MAX: Final = 1 << 16
"""Frames looked at for one page, so that none takes long: whoever wants all goes on from where it ended."""

WINDOW_BYTES: Final = 64 << 20


def allocated(reading: Reading, capsule: CapsuleId, offset: int) -> Document:
    """The first ``ranges`` [offset, length] from ``offset`` on that are no holes; where the ``next`` page begins."""
    ranges: list[list[int]] = []
    for start, end in reading.data_ranges(capsule, offset):
        if len(ranges) == RANGES_MAX:
            return {"ranges": ranges, "next": start}
        ranges.append([start, end - start])
    return {"ranges": ranges, "next": None}


def changed(reading: Reading, before: CapsuleId, after: CapsuleId, offset: int) -> Document:
    """As :func:`allocated`, of ranges of ``after`` that may differ from ``before``."""
    size = reading.stat(after).size
    ranges: list[list[int]] = []
    at, looked = offset, 0
    while at < size and looked <= FRAMES_MAX and len(ranges) < RANGES_MAX:
        end = min(at + WINDOW_BYTES, size)
        old, new = _pieces(reading, before, at, end), _pieces(reading, after, at, end)
        for start, stop in _differences(old, new, at, end):
            if ranges and sum(ranges[-1]) == start:
                ranges[-1][1] += stop - start
            else:
                ranges.append([start, stop - start])
        at, looked = end, looked + len(old) + len(new) + 1
    return {"ranges": ranges, "next": at if at < size else None}


@attrs.frozen
class _Piece:
    """A range of one frame; ``content`` is the same for the same bytes at the same place."""

    start: int
    end: int
    content: object


def _pieces(reading: Reading, capsule: CapsuleId, start: int, end: int) -> list[_Piece]:
    found = []
    with reading._read() as txn:
        for extent in content_map.extents(txn, capsule, start, end - start):
            at = extent.offset - extent.skip
            for frame in unpack_frames(extent.frames):
                low, high = max(at, extent.offset), min(at + frame.plain_length, extent.end)
                if high > low and not frame.is_zero:
                    place = (frame.source_position or extent.position, frame.payload_offset)
                    content = frame.hash if frame.hash != NO_HASH else place
                    found.append(_Piece(low, high, (content, frame.plain_length, at)))
                at += frame.plain_length
    return found


def _differences(
    old: Sequence[_Piece], new: Sequence[_Piece], start: int, end: int
) -> Iterator[tuple[int, int]]:
    """Ranges of [start, end) where two lists of pieces have other content."""
    edges = sorted({start, end, *(edge for each in (*old, *new) for edge in (each.start, each.end))})
    one, two = _At(old), _At(new)
    for low, high in itertools.pairwise(edges):
        if one.content(low) != two.content(low):
            yield low, high


class _At:
    """What a sorted list of pieces has at places asked for in order."""

    def __init__(self, pieces: Sequence[_Piece]) -> None:
        self._pieces = pieces
        self._index = 0

    def content(self, place: int) -> object:
        """The content of the piece there, or None in a gap."""
        while self._index < len(self._pieces) and self._pieces[self._index].end <= place:
            self._index += 1
        found = self._pieces[self._index] if self._index < len(self._pieces) else None
        return found.content if found is not None and found.start <= place else None
