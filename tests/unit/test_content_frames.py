from __future__ import annotations

import attrs
import pytest

from space._errors import EventDecodeError
from space.content.frames import (
    FLAG_PADDED,
    FLAG_SHARED,
    FLAG_ZERO,
    FRAME_BYTES_MAX,
    FRAME_RECORD_BYTES,
    FrameRef,
    frame_at,
    frames_overlapping,
    pack_frames,
    plain_length,
    stored_ranges,
    unpack_frames,
    zero_frame,
)

RAW = FrameRef(4096, 4096, 0x01020304, 0x00, 0, 0, 0, 0, 0, bytes(range(16)))
GCM = FrameRef(65536, 65564, 0xFFFFFFFF, 0x10, FLAG_SHARED, 2, 7, 4096, 9, bytes(16))
XTS = FrameRef(3, 32, 5, 0x20, FLAG_PADDED, 1, 7, 100, 0, bytes(16))


def test_records_survive_packing() -> None:
    """What was packed is what is unpacked, 48 bytes a frame."""
    frames = [RAW, GCM, XTS, zero_frame(65536)]
    packed = pack_frames(frames)
    assert len(packed) == 4 * FRAME_RECORD_BYTES
    assert unpack_frames(packed) == frames
    assert [frame_at(memoryview(packed), index) for index in range(4)] == frames


def test_no_frames_is_no_bytes() -> None:
    """An empty list packs to nothing and back."""
    assert pack_frames([]) == b""
    assert unpack_frames(b"") == []
    assert plain_length(b"") == 0
    assert list(frames_overlapping(b"", 0, 10)) == []


def test_codec_byte_is_two_nibbles() -> None:
    """Compression is the low half of the codec byte, encryption the high half."""
    frame = attrs.evolve(GCM, codec=0x12)
    assert (frame.compression, frame.encryption) == (2, 1)


@pytest.mark.parametrize(
    "frame, reason",
    [
        (attrs.evolve(RAW, plain_length=0, stored_length=0), "stands for 0 bytes"),
        (attrs.evolve(RAW, plain_length=FRAME_BYTES_MAX + 1, stored_length=5, codec=1), "stands for"),
        (attrs.evolve(RAW, plain_length=0xFFFFFFFF, stored_length=0xFFFFFFFF), "stands for"),
        (attrs.evolve(RAW, stored_length=4095), "stored raw"),
        (attrs.evolve(RAW, stored_length=0), "0 bytes stored"),
        (attrs.evolve(RAW, codec=2, stored_length=4097), "4097 bytes stored"),
        (attrs.evolve(GCM, stored_length=65536 + 33), "bytes stored"),
        (attrs.evolve(RAW, codec=0x04), "codec 0x04"),
        (attrs.evolve(GCM, codec=0x30), "codec 0x30"),
        (attrs.evolve(RAW, flags=0x08), "flags 0x08"),
        (attrs.evolve(RAW, flags=FLAG_PADDED), "padding without XTS"),
        (attrs.evolve(XTS, flags=FLAG_SHARED), "cannot be shared"),
        (attrs.evolve(RAW, key_id=1), "with key 1"),
        (attrs.evolve(RAW, key_version=1), "version 1"),
        (attrs.evolve(GCM, key_id=0), "with key 0"),
        (attrs.evolve(RAW, payload_offset=0xFFFFFFFF), "past 4 GiB"),
        (attrs.evolve(zero_frame(10), source_position=1), "zero frame"),
        (attrs.evolve(RAW, flags=FLAG_ZERO), "zero frame"),
    ],
)
def test_record_no_writer_makes_is_refused(frame: FrameRef, reason: str) -> None:
    """A record that breaks a rule of the format is an error that names the rule, however it is reached."""
    packed = pack_frames([frame])
    for read in (unpack_frames, lambda p: frame_at(p, 0), lambda p: list(frames_overlapping(p, 0, 2**40))):
        if reason == "stands for 0 bytes" and read is not unpack_frames and not plain_length(packed):
            continue  # a record for no bytes overlaps nothing
        with pytest.raises(EventDecodeError, match=reason):
            read(packed)


@pytest.mark.parametrize("size", [1, 47, 49, 95])
def test_part_of_a_record_is_refused(size: int) -> None:
    """Bytes that are not whole records are an error in every function that walks them."""
    packed = pack_frames([RAW, RAW])[:size]
    for read in (unpack_frames, plain_length, lambda p: list(stored_ranges(p))):
        with pytest.raises(EventDecodeError, match="not whole frame records"):
            read(packed)
    with pytest.raises(EventDecodeError):
        list(frames_overlapping(packed, 0, 1))


def test_missing_record_is_refused() -> None:
    """A record past the end is an error, not another frame."""
    with pytest.raises(EventDecodeError, match="no frame record 1"):
        frame_at(pack_frames([RAW]), 1)


@pytest.mark.parametrize(
    "offset, length, starts",
    [
        (0, 1, [0]),
        (0, 4096, [0]),
        (4095, 1, [0]),
        (4095, 2, [0, 4096]),
        (4096, 1, [4096]),
        (0, 1 << 40, [0, 4096, 69632]),
        (69631, 2, [4096, 69632]),
        (69635, 1, []),
        (5, 0, []),
        (0, 0, []),
    ],
)
def test_overlap_is_exactly_the_frames_touched(offset: int, length: int, starts: list[int]) -> None:
    """A range gives the frames that hold a byte of it, with the offset each starts at."""
    packed = pack_frames([RAW, GCM, XTS])
    found = list(frames_overlapping(packed, offset, length))
    assert [start for start, _ in found] == starts
    assert all(frame == {0: RAW, 4096: GCM, 69632: XTS}[start] for start, frame in found)


def test_stored_ranges_leave_out_holes() -> None:
    """Reclaiming sees every stored range and no hole."""
    packed = pack_frames([RAW, zero_frame(10), GCM])
    assert list(stored_ranges(packed)) == [(0, 0, 4096), (9, 4096, 65564)]
