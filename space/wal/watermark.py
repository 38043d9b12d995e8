"""The watermark: a small file that says how far the log is known to be durable.

It decides, at open, between a torn tail (above it) and corruption (at or below it).  Two slots of one
sector each are written in turn after every fdatasync, with a plain write: it survives the death of the
process exactly, and after a power loss may be older, which only protects less.
"""

from __future__ import annotations

import enum
from typing import Final, final

import attrs
from crc32c import crc32c

from space.wal.disk import File
from space.wal.segment_format import BLOCK_BYTES, CRC, FORMAT_VERSION, WATERMARK_MAGIC, WATERMARK_SLOT

WATERMARK_NAME: Final = "watermark"
_FILE_BYTES: Final = 2 * BLOCK_BYTES  # a slot per block: a torn block takes one slot at most


@final
class WatermarkFlag(enum.IntFlag):
    """What the last writer was doing."""

    NONE = 0
    CLEAN = 1  # closed in order: nothing lies above the watermark
    CUTTING = 2  # a suffix is being dropped: what lies above is void, finish dropping it


_FLAGS: Final = (WatermarkFlag.NONE, WatermarkFlag.CLEAN, WatermarkFlag.CUTTING)


@attrs.frozen
class Watermark:
    """How far the log is durable.

    Attributes:
        sequence: grows with every write; the greater of two valid slots counts.
        index: last durable batch.
        segment: first index of the segment that holds the end.
        end: file offset in that segment up to which records are durable.
        chain: link of the last durable record.
    """

    sequence: int
    index: int
    segment: int
    end: int
    chain: bytes
    flags: WatermarkFlag = WatermarkFlag.NONE


def encode_watermark(mark: Watermark, seed: int) -> bytes:
    """A slot's bytes; ``seed`` is the CRC32C of the store's id, so that another store's is refused."""
    fields = WATERMARK_SLOT.pack(
        WATERMARK_MAGIC,
        FORMAT_VERSION,
        mark.flags,
        mark.sequence,
        mark.index,
        mark.segment,
        mark.end,
        mark.chain,
    )
    return fields + CRC.pack(crc32c(fields, seed))


def decode_watermark(slot: bytes, seed: int) -> Watermark | None:
    """The watermark in a slot, or None if there is no valid one."""
    size = WATERMARK_SLOT.size
    if len(slot) < size + CRC.size or CRC.unpack_from(slot, size)[0] != crc32c(slot[:size], seed):
        return None
    magic, version, flags, sequence, index, segment, end, chain = WATERMARK_SLOT.unpack_from(slot)
    if (magic, version) != (WATERMARK_MAGIC, FORMAT_VERSION) or flags not in _FLAGS:
        return None
    return Watermark(sequence, index, segment, end, chain, WatermarkFlag(flags))


@final
class WatermarkFile:
    """Reads and writes the two slots.  One caller at a time.

    Attributes:
        found: what the file said when it was opened, or None if no slot was valid.
    """

    def __init__(self, file: File, store_id: bytes) -> None:
        self._file = file
        self._seed = crc32c(store_id)
        slots = [decode_watermark(file.pread(BLOCK_BYTES, at), self._seed) for at in (0, BLOCK_BYTES)]
        self.found = max((slot for slot in slots if slot), key=lambda slot: slot.sequence, default=None)
        self._sequence = self.found.sequence if self.found else 0
        # Never over the slot that counts: if this write is torn, that one must still be there.
        self._next = BLOCK_BYTES if self.found is not None and self.found is slots[0] else 0

    def reserve(self) -> None:
        """Make the file as large as it gets, so that a full disk cannot stop it."""
        if self._file.size() < _FILE_BYTES:
            self._file.allocate(0, _FILE_BYTES)

    def write(
        self, index: int, segment: int, end: int, chain: bytes, flags: WatermarkFlag = WatermarkFlag.NONE
    ) -> None:
        """Write the next slot: visible, not yet durable.

        Raises:
            OSError: it could not be written; the other slot is untouched.
        """
        self._sequence += 1
        mark = Watermark(self._sequence, index, segment, end, chain, flags)
        self._file.pwritev([encode_watermark(mark, self._seed)], self._next)
        self._next = BLOCK_BYTES - self._next

    def sync(self) -> None:
        """Make what was written durable."""
        self._file.fdatasync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
