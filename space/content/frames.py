"""The frame record: where one piece of content is stored, and how to get from there to its bytes.

A frame is up to :data:`FRAME_BYTES_MAX` bytes of one capsule, stored as one unit: hashed, compressed,
encrypted and read whole.  Events and the content map hold frames as packed 48-byte records, in the order of
the bytes they stand for; nothing here knows where a run of frames begins in its capsule.  Layout and meaning
of every field: ``docs/formats/frames.md``.

Records come from disk and from peers, so whoever builds a :class:`FrameRef` from bytes gets every field
checked first (:class:`~space._errors.EventDecodeError`).  The checks bound what a record can make a reader
allocate: at most :data:`FRAME_BYTES_MAX` plain and :data:`SEAL_BYTES_MAX` more stored.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Iterator
from typing import Final, TypeAlias, final

import attrs

from space._errors import CorruptionError, EventDecodeError

Buffer: TypeAlias = bytes | bytearray | memoryview

FRAME_BYTES_MAX: Final = 4 * 1024 * 1024  # bounds what one read of one byte can cost
SEAL_BYTES_MAX: Final = 32  # what encryption may add: a 16-byte tweak and 16 bytes of padding
HASH_BYTES: Final = 16
NO_HASH: Final = bytes(HASH_BYTES)

_FRAME: Final = struct.Struct("<IIIBBHIIQ16s")
FRAME_RECORD_BYTES: Final = 48
_PLAIN_LENGTH: Final = struct.Struct("<I44x")
_STORED: Final = struct.Struct("<4xI12xIQ16x")
if {_FRAME.size, _PLAIN_LENGTH.size, _STORED.size} != {FRAME_RECORD_BYTES}:
    raise AssertionError("the frame record has exactly 48 bytes: docs/formats/frames.md")
_U32_MAX: Final = 0xFFFF_FFFF


@final
class CompressionCode(enum.IntEnum):
    """Low four bits of the codec byte."""

    NONE = 0
    LZ4 = 1
    ZSTD = 2
    BROTLI = 3


@final
class EncryptionCode(enum.IntEnum):
    """High four bits of the codec byte."""

    NONE = 0
    AES_256_GCM = 1
    AES_256_XTS = 2


FLAG_ZERO: Final = 1  # all plain bytes are zero: nothing is stored
FLAG_SHARED: Final = (
    2  # written to be found again by dedup; if encrypted, under the key derived from its hash
)
FLAG_PADDED: Final = 4  # XTS body shorter than one block: the last byte counts the padding
_FLAGS: Final = FLAG_ZERO | FLAG_SHARED | FLAG_PADDED


@final
@attrs.frozen
class FrameRef:
    """One frame: its lengths, how it is encoded, and where its stored bytes are.

    Attributes:
        plain_length: bytes of content it stands for, at least 1.
        stored_length: bytes it takes in the payload area.
        crc: CRC32C of the stored bytes.
        codec: :class:`CompressionCode` in the low four bits, :class:`EncryptionCode` in the high four.
        flags: ``FLAG_ZERO | FLAG_SHARED | FLAG_PADDED``.
        key_version: version of the data key; 0 with ``key_id`` 0 when not encrypted.
        key_id: number of the data key.
        payload_offset: byte offset of the stored bytes in the payload area of their batch.
        source_position: position of the batch that holds them; 0: the batch of the event with this record.
        hash: first 128 bits of the keyed BLAKE3 of the plain bytes.
    """

    plain_length: int
    stored_length: int
    crc: int
    codec: int
    flags: int
    key_version: int
    key_id: int
    payload_offset: int
    source_position: int
    hash: bytes

    @property
    def compression(self) -> int:
        """The :class:`CompressionCode`, as a number."""
        return self.codec & 0x0F

    @property
    def encryption(self) -> int:
        """The :class:`EncryptionCode`, as a number."""
        return self.codec >> 4

    @property
    def is_zero(self) -> bool:
        """Whether this is a hole: all zero, nothing stored."""
        return bool(self.flags & FLAG_ZERO)


def zero_frame(plain_length: int) -> FrameRef:
    """The frame that stands for ``plain_length`` zero bytes and stores nothing."""
    return FrameRef(plain_length, 0, 0, 0, FLAG_ZERO, 0, 0, 0, 0, NO_HASH)


def pack_frames(frames: Iterable[FrameRef]) -> bytes:
    """The records of ``frames``, 48 bytes each."""
    return b"".join(
        [
            _FRAME.pack(
                frame.plain_length,
                frame.stored_length,
                frame.crc,
                frame.codec,
                frame.flags,
                frame.key_version,
                frame.key_id,
                frame.payload_offset,
                frame.source_position,
                frame.hash,
            )
            for frame in frames
        ]
    )


def unpack_frames(packed: Buffer) -> list[FrameRef]:
    """The frames whose records ``packed`` holds.

    Raises:
        EventDecodeError: not whole records, or a record no writer makes.
    """
    _check_size(packed)
    return [_checked(FrameRef(*fields)) for fields in _FRAME.iter_unpack(packed)]


def frame_at(packed: Buffer, index: int) -> FrameRef:
    """The frame in record ``index``, counted from 0.

    Raises:
        EventDecodeError: a record no writer makes, or none at that index.
    """
    try:
        return _checked(FrameRef(*_FRAME.unpack_from(packed, index * FRAME_RECORD_BYTES)))
    except struct.error:
        raise EventDecodeError(f"no frame record {index} in {len(packed)} bytes") from None


def plain_length(packed: Buffer) -> int:
    """Bytes of content the packed frames stand for.

    Raises:
        EventDecodeError: not whole records.
    """
    _check_size(packed)
    return sum(length for (length,) in _PLAIN_LENGTH.iter_unpack(packed))


def frames_overlapping(packed: Buffer, offset: int, length: int) -> Iterator[tuple[int, FrameRef]]:
    """The frames that hold any of ``length`` bytes from ``offset`` on, each after the offset it starts at.

    Offsets count from the first byte of the first frame.  Frames outside the range are stepped over, not
    built.

    Raises:
        EventDecodeError: not whole records, or a touched record no writer makes.
    """
    _check_size(packed)
    end, start = offset + length, 0
    for index, (frame_length,) in enumerate(_PLAIN_LENGTH.iter_unpack(packed)):
        if start >= end or length <= 0:
            return
        if start + frame_length > offset:
            yield start, frame_at(packed, index)
        start += frame_length


def stored_ranges(packed: Buffer) -> Iterator[tuple[int, int, int]]:
    """``(source_position, payload_offset, stored_length)`` of every frame that stores bytes.

    What reclaiming needs to know about frames, without building them.

    Raises:
        EventDecodeError: not whole records.
    """
    _check_size(packed)
    for stored_length, payload_offset, source_position in _STORED.iter_unpack(packed):
        if stored_length:
            yield source_position, payload_offset, stored_length


def damaged(frame: FrameRef, position: int, what: str) -> CorruptionError:
    """The error that says which frame is damaged, and how."""
    return CorruptionError(
        f"content frame at position {position}, payload offset {frame.payload_offset}: {what}",
        offset=frame.payload_offset,
        position=position,
    )


def _check_size(packed: Buffer) -> None:
    if len(packed) % FRAME_RECORD_BYTES:
        raise EventDecodeError(f"{len(packed)} bytes are not whole frame records of {FRAME_RECORD_BYTES}")


def _checked(frame: FrameRef) -> FrameRef:
    fault = _zero_fault(frame) if frame.flags & FLAG_ZERO else _stored_fault(frame)
    if not 0 < frame.plain_length <= FRAME_BYTES_MAX:
        fault = f"stands for {frame.plain_length} bytes"
    if fault:
        raise EventDecodeError(f"not a frame record: {fault}")
    return frame


def _zero_fault(frame: FrameRef) -> str:
    return "" if frame == zero_frame(frame.plain_length) else "a zero frame with more than a length"


def _stored_fault(frame: FrameRef) -> str:
    encryption, plain = frame.codec >> 4, frame.plain_length
    if frame.codec & 0x0F > CompressionCode.BROTLI or encryption > EncryptionCode.AES_256_XTS:
        return f"unknown codec 0x{frame.codec:02x}"
    if frame.flags & ~_FLAGS:
        return f"unknown flags 0x{frame.flags:02x}"
    if bool(encryption) != bool(frame.key_id) or (frame.key_version and not frame.key_id):
        return f"encryption {encryption} with key {frame.key_id} version {frame.key_version}"
    if encryption != EncryptionCode.AES_256_XTS and frame.flags & FLAG_PADDED:
        return "padding without XTS"
    if encryption == EncryptionCode.AES_256_XTS and frame.flags & FLAG_SHARED:
        return "an XTS frame cannot be shared"
    if not 0 < frame.stored_length <= plain + (SEAL_BYTES_MAX if encryption else 0):
        return f"{frame.stored_length} bytes stored for {plain}"
    if frame.codec == 0 and frame.stored_length != plain:
        return f"{frame.stored_length} bytes stored raw for {plain}"
    if frame.payload_offset + frame.stored_length > _U32_MAX:
        return "stored bytes end past 4 GiB"
    return ""
