"""Bytes to records.  Pure: it reads through a function and decides nothing.

:func:`scan` walks a span of records and checks each header, metadata and link.  Where the bytes are
no record it raises :class:`BadRecord`, which says where and what: whether that is a torn tail (never
acknowledged, to be cut) or corruption (acknowledged, to be reported) depends on what is known to be
durable, and :mod:`space.wal.recovery` knows that.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from typing import NamedTuple, final

from blake3 import blake3
from crc32c import crc32c

from space.wal.segment_format import (
    BLOCK_BYTES,
    CHAINED,
    CRC,
    FORMAT_VERSION,
    HEADER_CRC_OFFSET,
    METADATA_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
    RECORD_ALIGNMENT,
    RECORD_HEADER,
    RECORD_HEADER_BYTES,
    RECORD_PREFIX,
    SEAL_BYTES,
    SEAL_METADATA,
    SEGMENT_HEADER,
    SEGMENT_MAGIC,
    RecordInfo,
    RecordKind,
    SegmentHeader,
    align,
    payload_offset,
)

ReadAt = Callable[[int, int], bytes]
"""``(length, offset) -> bytes``: a short answer means the end of the file."""

_WINDOW_MIN = BLOCK_BYTES
_WINDOW_MAX = 256 * 2**10  # larger ones fall out of the processor's cache
_SEARCH_BYTES = 2**20
_ZEROS = bytes(_SEARCH_BYTES)


@final
class Damage(enum.StrEnum):
    """What is wrong at a place of a segment."""

    MISSING = "segment is missing"
    SEGMENT_HEADER = "segment header is damaged"
    NO_RECORD = "there is no record"
    HEADER = "record header is damaged"
    METADATA = "record metadata is damaged"
    ORDER = "record is out of order"
    CHAIN = "hash chain is broken"
    PAYLOAD = "payload is damaged"
    SEAL = "seal is missing or damaged"


class BadRecord(Exception):  # noqa: N818 - a finding on its way up, never seen by users
    """No record starts at ``offset``; ``index`` is the batch that was expected there."""

    def __init__(self, what: Damage, offset: int, index: int) -> None:
        super().__init__(what, offset, index)
        self.what = what
        self.offset = offset
        self.index = index


class RecordHeader(NamedTuple):
    """A record's header as stored; fields as in ``docs/formats/wal.md``."""

    prefix: bytes
    durable_end: int
    payload_offset: int
    kind: int
    flags: int
    metadata_length: int
    payload_length: int
    payload_crc: int
    batch_index: int
    term: int
    time_ns: int
    previous_chain: bytes
    metadata_crc: int
    crc: int

    @property
    def length(self) -> int:
        """Bytes from the start of the record to the start of the next."""
        return align(self.payload_offset + self.payload_length, RECORD_ALIGNMENT)


class Scanned(NamedTuple):
    """A record met by :func:`scan`, where it was, and what its header says was durable."""

    offset: int
    end: int
    durable_end: int
    payload_offset: int  # in the file
    payload_crc: int
    info: RecordInfo


def parse_segment_header(block: bytes) -> SegmentHeader | None:
    """The header at the start of a segment, or None if it is damaged or of an unknown version."""
    size = SEGMENT_HEADER.size
    if len(block) < size + CRC.size or CRC.unpack_from(block, size)[0] != crc32c(block[:size]):
        return None
    magic, version, record_header, store_id, first_index, time_ns, chain = SEGMENT_HEADER.unpack_from(block)
    if (magic, version, record_header) != (SEGMENT_MAGIC, FORMAT_VERSION, RECORD_HEADER_BYTES):
        return None
    return SegmentHeader(store_id, first_index, time_ns, chain)


def parse_record_header(raw: bytes, offset: int, seed: int) -> RecordHeader | None:
    """The record header in ``raw``, read at file offset ``offset``, or None if it is not one."""
    if len(raw) != RECORD_HEADER_BYTES:
        return None
    header = RecordHeader._make(RECORD_HEADER.unpack(raw))
    return header if _is_sound(header, raw, offset, seed) else None


def _is_sound(header: RecordHeader, raw: bytes, offset: int, seed: int) -> bool:
    """The CRC matches, and nothing in it would make a reader reach beyond its limits."""
    return (
        header.prefix == RECORD_PREFIX
        and header.crc == crc32c(raw[:HEADER_CRC_OFFSET], seed)
        and header.flags == 0
        and header.kind in _KINDS
        and header.metadata_length <= METADATA_BYTES_MAX
        and header.payload_length <= PAYLOAD_BYTES_MAX
        and header.payload_offset == payload_offset(offset, header.metadata_length, header.payload_length)
    )


def parse_seal(raw: bytes, offset: int, seed: int, first_index: int) -> RecordHeader | None:
    """The seal in the last bytes of a segment, or None if there is no valid one."""
    header = parse_record_header(raw[:RECORD_HEADER_BYTES], offset, seed)
    if header is None or header.kind != RecordKind.SEAL or len(raw) != SEAL_BYTES:
        return None
    metadata = raw[RECORD_HEADER_BYTES:]
    if crc32c(metadata) != header.metadata_crc:
        return None
    return (
        header
        if SEAL_METADATA.unpack(metadata) == (header.batch_index + 1 - first_index, first_index)
        else None
    )


_KINDS = {int(kind): kind for kind in RecordKind}


def scan(
    read_at: ReadAt, start: int, end: int, *, seed: int, index: int, chain: bytes | None
) -> Iterator[Scanned]:
    """Records from file offset ``start`` to ``end``, in order; a seal ends the walk without being yielded.

    Payload areas are not read, except small ones that lie between two records anyway.

    Args:
        index: index of the last batch before ``start``.
        chain: link of the last record before ``start``; None takes the first record's word for it.

    Raises:
        BadRecord: the bytes at some offset are not the record that must be there.
        OSError: reading failed.
    """
    unpack, prefix, crc, hashed = RECORD_HEADER.unpack, RECORD_PREFIX, crc32c, blake3
    kinds, batch, seal = _KINDS, RecordKind.BATCH, RecordKind.SEAL
    window, base, data = _WINDOW_MIN, start, b""
    offset = start
    while offset < end:
        at = offset - base
        if at + RECORD_HEADER_BYTES > len(data):
            # Windows grow while records are small and shrink to one block after a payload was jumped over.
            window = _WINDOW_MIN if at > len(data) + _WINDOW_MIN else min(window * 2, _WINDOW_MAX)
            data, base, at = read_at(min(window, end - offset), offset), offset, 0
        raw = data[at : at + RECORD_HEADER_BYTES]
        header = unpack(raw) if len(raw) == RECORD_HEADER_BYTES else None
        if header is None or header[0] != prefix or header[13] != crc(raw[:HEADER_CRC_OFFSET], seed):
            blank = not any(raw)
            raise BadRecord(Damage.NO_RECORD if blank else Damage.HEADER, offset, index + 1)
        (_, durable_end, payload_at, number, flags, metadata_length, payload_length, payload_crc,
         batch_index, term, time_ns, previous, metadata_crc, _) = header  # fmt: skip
        kind = kinds.get(number)
        metadata_end = offset + RECORD_HEADER_BYTES + metadata_length
        if (
            kind is None
            or flags
            or metadata_length > METADATA_BYTES_MAX
            or payload_length > PAYLOAD_BYTES_MAX
            # payload_offset(), spelled out: this loop decides how fast a log is replayed
            or offset + payload_at
            != (metadata_end + 4095 & -4096 if payload_length >= 4096 else metadata_end + 7 & -8)
        ):
            raise BadRecord(Damage.HEADER, offset, index + 1)
        metadata_at = at + RECORD_HEADER_BYTES
        if metadata_at + metadata_length > len(data):
            data, base, at = read_at(max(window, RECORD_HEADER_BYTES + metadata_length), offset), offset, 0
            metadata_at = RECORD_HEADER_BYTES
        metadata = data[metadata_at : metadata_at + metadata_length]
        if len(metadata) != metadata_length or crc(metadata) != metadata_crc:
            raise BadRecord(Damage.METADATA, offset, index + 1)
        if chain is not None and previous != chain:
            raise BadRecord(Damage.CHAIN, offset, index + 1)
        if kind is batch:
            index += 1
        elif kind is seal:
            return
        if batch_index != index:
            raise BadRecord(Damage.ORDER, offset, index)
        chain = hashed(raw[CHAINED] + metadata).digest()
        begin, payload_at = offset, offset + payload_at
        offset = (payload_at + payload_length + 7) & -RECORD_ALIGNMENT
        if offset > end:
            raise BadRecord(Damage.HEADER, begin, index)
        yield Scanned(
            begin, offset, durable_end, payload_at, payload_crc,
            RecordInfo(batch_index, term, kind, time_ns, metadata, payload_length, chain, previous),
        )  # fmt: skip


def find_headers(read_at: ReadAt, start: int, end: int, seed: int) -> Iterator[tuple[int, RecordHeader]]:
    """Every sound record header between two offsets, found by its magic: what is left after damage."""
    overlap = RECORD_HEADER_BYTES - RECORD_ALIGNMENT
    for base in range(align(start, RECORD_ALIGNMENT), end, _SEARCH_BYTES):
        data = read_at(min(_SEARCH_BYTES + overlap, end - base), base)
        at = data.find(RECORD_PREFIX)
        while 0 <= at < _SEARCH_BYTES:
            if at % RECORD_ALIGNMENT == 0:
                header = parse_record_header(data[at : at + RECORD_HEADER_BYTES], base + at, seed)
                if header is not None:
                    yield base + at, header
            at = data.find(RECORD_PREFIX, at + 1)


def last_nonzero(read_at: ReadAt, start: int, end: int) -> int:
    """End of the last chunk that holds a non-zero byte between two offsets, or ``start`` if all are zero."""
    last = start
    for base in range(start, end, _SEARCH_BYTES):
        data = read_at(min(_SEARCH_BYTES, end - base), base)
        if data != _ZEROS[: len(data)]:
            last = base + len(data.rstrip(b"\0"))
    return last


def sum_payload(read_at: ReadAt, offset: int, length: int) -> int | None:
    """CRC32C of a payload area, or None if the file ends inside it."""
    crc = 0
    for base in range(offset, offset + length, _SEARCH_BYTES):
        want = min(_SEARCH_BYTES, offset + length - base)
        data = read_at(want, base)
        if len(data) != want:
            return None
        crc = crc32c(data, crc)
    return crc
