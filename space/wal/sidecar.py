"""Sidecar of a sealed segment: the offset of every batch in it, so that one is found without a scan.

Disposable: it is written without sync, and a missing, damaged or foreign one is rebuilt from the segment.
"""

from __future__ import annotations

import sys
from array import array

from crc32c import crc32c

from space.wal.segment_format import FORMAT_VERSION, INDEX_HEADER, INDEX_MAGIC


def encode_index(first_index: int, offsets: array[int], chain: bytes) -> bytes:
    """The sidecar of the segment that starts with ``first_index`` and ends with link ``chain``."""
    body = _little_endian(offsets).tobytes()
    sealed = INDEX_HEADER.pack(INDEX_MAGIC, FORMAT_VERSION, 0, first_index, len(offsets), chain)
    crc = crc32c(body, crc32c(sealed))
    return INDEX_HEADER.pack(INDEX_MAGIC, FORMAT_VERSION, crc, first_index, len(offsets), chain) + body


def decode_index(raw: bytes, first_index: int, batches: int, chain: bytes) -> array[int] | None:
    """The offsets, or None if these bytes are not the sidecar of exactly that segment."""
    body = raw[INDEX_HEADER.size :]
    if len(raw) < INDEX_HEADER.size or len(body) != 8 * batches:
        return None
    expected = INDEX_HEADER.pack(INDEX_MAGIC, FORMAT_VERSION, 0, first_index, batches, chain)
    crc = crc32c(body, crc32c(expected))
    if raw[: INDEX_HEADER.size] != INDEX_HEADER.pack(
        INDEX_MAGIC, FORMAT_VERSION, crc, first_index, batches, chain
    ):
        return None
    offsets: array[int] = array("Q")
    offsets.frombytes(body)
    return _little_endian(offsets)


def _little_endian(offsets: array[int]) -> array[int]:
    if sys.byteorder == "big":
        offsets = offsets[:]
        offsets.byteswap()
    return offsets
