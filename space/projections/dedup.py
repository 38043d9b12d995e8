"""Dedup index: content hash → the frame in the log that already holds those bytes.

Only frames whose writer asked for it (flag SHARED in the frame record) are indexed.  A frame that was
reclaimed leaves the index with the event that says so.

Rows: FRAME_BY_HASH: 16-byte keyed hash → frame record with its source position filled in;
HASH_BY_PLACE: position u64, offset u32 (big-endian) → hash.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

from space.events import types as ev
from space.projections.contract import Handler
from space.statemachine.apply import RECLAIMED_RANGE, Context
from space.statemachine.tables import Reader, Writer

FRAME_BY_HASH: Final = 40
HASH_BY_PLACE: Final = 41

FRAME_BYTES: Final = 48
FLAG_SHARED: Final = 2
_FLAGS_AT: Final = 13
_PLACE_AT: Final = 20
_HASH_AT: Final = 32
_PLACE: Final = struct.Struct("<IQ")
_KEY: Final = struct.Struct(">QI")


class DedupView:
    """The view that finds bytes stored before."""

    name = "dedup"
    version = 1
    tables: Final = {FRAME_BY_HASH: "frame_by_hash", HASH_BY_PLACE: "hash_by_place"}

    def folder(self, txn: Writer) -> DedupFolder:
        return DedupFolder(txn)


def find(txn: Reader, content_hash: bytes) -> bytes | None:
    """The frame record that holds the content, or None."""
    return txn.get(FRAME_BY_HASH, content_hash)


class DedupFolder:
    """Folds shared frames into the index."""

    def __init__(self, txn: Writer) -> None:
        self._txn = txn
        self.handlers: Mapping[type[Any], Handler] = {
            ev.ExtentWritten: self._written,
            ev.PayloadReclaimed: self._reclaimed,
        }

    def flush(self) -> None:
        """Nothing is held back."""

    def _written(self, context: Context, event: ev.ExtentWritten) -> None:
        frames = event.frames
        for at in range(_FLAGS_AT, len(frames), FRAME_BYTES):
            if frames[at] & FLAG_SHARED:
                self._index(context.position, frames[at - _FLAGS_AT : at - _FLAGS_AT + FRAME_BYTES])

    def _index(self, batch: int, record: bytes) -> None:
        offset, position = _PLACE.unpack_from(record, _PLACE_AT)
        content_hash = record[_HASH_AT:]
        if position or self._txn.get(FRAME_BY_HASH, content_hash) is not None:
            return
        placed = record[:_PLACE_AT] + _PLACE.pack(offset, batch) + content_hash
        self._txn.put(FRAME_BY_HASH, content_hash, placed)
        self._txn.put(HASH_BY_PLACE, _KEY.pack(batch, offset), content_hash)

    def _reclaimed(self, context: Context, event: ev.PayloadReclaimed) -> None:
        for position, offset, length in RECLAIMED_RANGE.iter_unpack(event.ranges):
            start, stop = _KEY.pack(position, offset), _KEY.pack(position, min(offset + length, 0xFFFFFFFF))
            for key, content_hash in list(self._txn.scan(HASH_BY_PLACE, start[:8], start)):
                if key >= stop:
                    break
                self._txn.delete(FRAME_BY_HASH, content_hash)
                self._txn.delete(HASH_BY_PLACE, key)
