"""Bytes of a segment: constants, struct layouts and the sizes they must have.

Specification with drawings: ``docs/formats/wal.md``; reasons: ``docs/adr/0002-wal-record.md``.

A segment file is a 4 KiB header block followed by records and, once it is sealed, by a seal record
that ends exactly at the end of the file.  Records start at multiples of 8::

    header (104) | metadata | padding | payload | padding

Every integer is little-endian.  A record's header CRC is seeded with the store's id and the segment's
first index, so that bytes of another store, another segment or a user's file never pass as a record
of this one.  The chain covers only what is true of the record wherever it is stored (kind, index,
term, time, lengths, payload CRC, metadata); its place in the file is covered by the header CRC alone.
"""

from __future__ import annotations

import enum
import functools
import struct
from typing import TYPE_CHECKING, Final, final

import attrs
from crc32c import crc32c

if TYPE_CHECKING:
    from attrs import frozen as fast_frozen
else:
    # Frozen to the type checker only: a frozen __init__ costs 1 us more, a third of reading a record.
    fast_frozen = functools.partial(attrs.define, unsafe_hash=True)


FORMAT_VERSION: Final = 1
CHAIN_BYTES: Final = 32
GENESIS: Final = bytes(CHAIN_BYTES)  # what the first record of a log links to
STORE_ID_BYTES: Final = 16

METADATA_BYTES_MAX: Final = 64 * 2**20  # a record is built and checked in memory
PAYLOAD_BYTES_MAX: Final = 256 * 2**20  # one pwritev, one recovery check
SEGMENT_BYTES_MIN: Final = 8 * 2**10  # the header block, a record, the seal
SEGMENT_BYTES_MAX: Final = 4 * 2**30

RECORD_ALIGNMENT: Final = 8
BLOCK_BYTES: Final = 4096  # what hole punching, direct I/O and the page cache count in

SEGMENT_MAGIC: Final = b"SPACEWAL"
SEGMENT_HEADER: Final = struct.Struct("<8sII16sQq32s")
SEGMENT_HEADER_BYTES: Final = BLOCK_BYTES  # the block; the rest of it is zero

RECORD_PREFIX: Final = struct.pack("<4sHH", b"\xb5Rec", FORMAT_VERSION, 104)  # magic, version, header length
RECORD_HEADER: Final = struct.Struct("<8sQQHHIIIQQq32sII")
RECORD_HEADER_BYTES: Final = 104
CHAINED: Final = slice(24, 96)  # the part of a record header that the chain covers, previous link included
CHAINED_HEADER: Final = struct.Struct("<HHIIIQQq32s")  # the same part by itself
HEADER_CRC_OFFSET: Final = 100

SEAL_METADATA: Final = struct.Struct("<QQ")  # batches in the segment, its first index
SEAL_BYTES: Final = 120

INDEX_MAGIC: Final = b"SPACEIDX"
INDEX_HEADER: Final = struct.Struct("<8sIIQQ32s")  # magic, version, CRC, first index, batches, last link

WATERMARK_MAGIC: Final = b"SPACEWMK"
WATERMARK_SLOT: Final = struct.Struct("<8sIIQQQQ32s")  # ..., flags, sequence, index, segment, end, link

CRC: Final = struct.Struct("<I")

assert SEGMENT_HEADER.size == 80
assert RECORD_HEADER.size == RECORD_HEADER_BYTES
assert len(RECORD_PREFIX) == 8
assert CHAINED.stop - CHAINED.start == CHAINED_HEADER.size
assert HEADER_CRC_OFFSET + CRC.size == RECORD_HEADER_BYTES
assert RECORD_HEADER_BYTES + SEAL_METADATA.size == SEAL_BYTES
assert SEAL_BYTES % RECORD_ALIGNMENT == 0
assert WATERMARK_SLOT.size + CRC.size <= 512  # one sector: a slot is never half written


@final
class RecordKind(enum.IntEnum):
    """What a record is; the numbers are stored and never reused.  Only a batch takes an index."""

    BATCH = 1
    HARD_STATE = 2  # written by no one: Raft's state is in its own file, so that logs of replicas are equal
    SEAL = 5  # written by the log itself, at the end of a full segment


@fast_frozen
class RecordInfo:
    """A record without its payload.

    Attributes:
        index: position of a batch, from 1; for other kinds the index of the last batch before it.
        term: Raft term, 0 outside a cluster.
        kind: see :class:`RecordKind`.
        time_ns: nanoseconds since 1970, as given to ``append``; never decreases along the log.
        metadata: the caller's bytes.
        payload_length: bytes in the payload area.
        chain: BLAKE3 link after this record.
        previous_chain: the link before it.
    """

    index: int
    term: int
    kind: RecordKind
    time_ns: int
    metadata: bytes
    payload_length: int
    chain: bytes
    previous_chain: bytes


@attrs.frozen
class SegmentHeader:
    """First block of a segment: whose it is and what came before it.

    Attributes:
        store_id: 16 bytes; a segment of another store is refused.
        first_index: index of the first batch in it, also the file's name.
        previous_time_ns: time of the last record before it, so that times are searched by headers.
        previous_chain: link of the last record before it.
    """

    store_id: bytes
    first_index: int
    previous_time_ns: int
    previous_chain: bytes


@functools.lru_cache(maxsize=256)
def record_seed(store_id: bytes, first_index: int) -> int:
    """Start value of the header CRC of every record in one segment."""
    return crc32c(first_index.to_bytes(8, "little"), crc32c(store_id))


def align(offset: int, alignment: int) -> int:
    """The next multiple of a power of two."""
    return (offset + alignment - 1) & -alignment


def payload_offset(record: int, metadata_length: int, payload_length: int) -> int:
    """Where the payload area starts, from the start of the record at file offset ``record``."""
    end = record + RECORD_HEADER_BYTES + metadata_length
    return align(end, BLOCK_BYTES if payload_length >= BLOCK_BYTES else RECORD_ALIGNMENT) - record


def segment_name(first_index: int) -> str:
    """File name of the segment that starts with batch ``first_index``."""
    return f"{first_index:020d}.seg"


def index_name(first_index: int) -> str:
    """File name of its sidecar of record offsets."""
    return f"{first_index:020d}.idx"
