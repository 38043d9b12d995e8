from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space._errors import CorruptionError, EventDecodeError, SpaceError
from space.content import codecs
from space.content.frames import (
    FLAG_PADDED,
    FRAME_RECORD_BYTES,
    CompressionCode,
    FrameRef,
    frames_overlapping,
    pack_frames,
    plain_length,
    stored_ranges,
    unpack_frames,
)
from tests.content_support import DOMAINS, Log, policy, prose, texture

COMPRESSIONS = st.sampled_from(["none", "auto", "lz4", "zstd", "brotli:5"])
SIZES = st.sampled_from([0, 1, 15, 16, 4095, 4096, 65_535, 65_536, 65_537, 1 << 20]) | st.integers(0, 200_000)
MAKERS: list[Callable[[int], bytes]] = [texture, prose, bytes]
PIECES = st.sampled_from(MAKERS)


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """Content with random, compressible and zero stretches, or bytes hypothesis shrinks."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=3000))
    size = draw(SIZES)
    parts = b"".join(draw(PIECES)(draw(st.integers(0, size))) for _ in range(draw(st.integers(1, 3))))
    return (parts + bytes(size))[:size]


@given(contents(), COMPRESSIONS, st.sampled_from(DOMAINS), st.sampled_from([512, 4096, 65_536]), st.data())
def test_any_range_comes_back(
    data: bytes, compression: str, domain: tuple[str, bool], frame_bytes: int, more: st.DataObject
) -> None:
    """Any range of any content, under any policy and frame size, is read as it was written."""
    log = Log(frame_bytes=frame_bytes, cache_bytes=100_000)
    position, placed = log.write(data, policy(compression, *domain))
    assert plain_length(placed.packed) == len(data)
    assert log.read(position, placed, 0, len(data)) == data
    for _ in range(3):
        offset = more.draw(st.integers(0, len(data)))
        length = more.draw(st.integers(0, len(data) - offset))
        assert log.read(position, placed, offset, length) == data[offset : offset + length]
    for start, ref in frames_overlapping(placed.packed, 0, len(data)):
        content = log.reader.read_frame(ref, position, verify=True)
        assert content == data[start : start + ref.plain_length]


@given(
    st.lists(st.sampled_from([0, 1, 2]), max_size=12),
    st.sampled_from([("none", True), ("aes-256-gcm", True)]),
)
def test_dedup_stores_each_frame_once(choices: list[int], domain: tuple[str, bool]) -> None:
    """However often frames repeat, in one write or across writes, each is stored once and all come back."""
    log = Log(frame_bytes=512)
    frames = [texture(512, choice) for choice in choices]
    half = len(frames) // 2
    written = [
        (part, *log.write(part, policy("none", *domain)))
        for part in map(b"".join, (frames[:half], frames[half:]))
    ]
    overhead = 28 if domain[0] != "none" else 0
    assert sum(map(len, log.batches.values())) == len(set(choices)) * (512 + overhead)
    for part, position, placed in written:
        assert log.read(position, placed, 0, len(part)) == part


@given(contents(), COMPRESSIONS, st.sampled_from(DOMAINS), st.data())
def test_damage_is_never_other_bytes(
    data: bytes, compression: str, domain: tuple[str, bool], more: st.DataObject
) -> None:
    """A byte changed anywhere in the stored bytes is a corruption error for a read that touches its frame."""
    log = Log()
    position, placed = log.write(data, policy(compression, *domain))
    stored = bytearray(log.batches[position])
    if not stored:
        return
    stored[more.draw(st.integers(0, len(stored) - 1))] ^= more.draw(st.integers(1, 255))
    log.batches[position] = bytes(stored)
    with pytest.raises(CorruptionError) as caught:
        log.read(position, placed, 0, len(data))
    assert caught.value.position == position


REFS = st.builds(
    FrameRef,
    plain_length=st.integers(0, 2**32 - 1) | st.just(100),
    stored_length=st.integers(0, 2**32 - 1) | st.just(100),
    crc=st.integers(0, 2**32 - 1),
    codec=st.integers(0, 255) | st.sampled_from([0, 1, 2, 3, 0x10, 0x20]),
    flags=st.integers(0, 255) | st.sampled_from([0, 1, 2, 4]),
    key_version=st.integers(0, 2**16 - 1) | st.just(0),
    key_id=st.integers(0, 2**32 - 1) | st.just(0),
    payload_offset=st.integers(0, 2**32 - 1),
    source_position=st.integers(0, 2**64 - 1),
    hash=st.binary(min_size=16, max_size=16),
)


@given(st.lists(REFS, max_size=5).map(pack_frames) | st.binary(max_size=4 * FRAME_RECORD_BYTES))
def test_any_bytes_are_frames_or_one_error(packed: bytes) -> None:
    """Any bytes unpack to frames that pack to the same bytes, or raise the one documented error."""
    try:
        frames = unpack_frames(packed)
    except EventDecodeError:
        return
    assert pack_frames(frames) == packed
    assert plain_length(packed) == sum(ref.plain_length for ref in frames)
    assert len(list(stored_ranges(packed))) == sum(not ref.is_zero for ref in frames)


@given(
    st.lists(REFS, max_size=5).map(pack_frames) | st.binary(max_size=4 * FRAME_RECORD_BYTES),
    st.integers(0, 2**33),
    st.integers(0, 2**33),
)
def test_any_bytes_overlap_as_their_frames_do(packed: bytes, offset: int, length: int) -> None:
    """Stepping over records finds what building all of them would find."""
    try:
        frames = unpack_frames(packed)
    except EventDecodeError:
        return
    expected, start = [], 0
    for ref in frames:
        if start < offset + length and start + ref.plain_length > offset and length:
            expected.append((start, ref))
        start += ref.plain_length
    assert list(frames_overlapping(packed, offset, length)) == expected


@given(st.lists(REFS, min_size=1, max_size=2).map(pack_frames), st.integers(0, 200), st.integers(0, 200))
def test_any_record_reads_or_errs(packed: bytes, offset: int, length: int) -> None:
    """Reading through records nobody wrote gives an error of this package, whatever they say."""
    log = Log()
    log.batches = {0: texture(300)}

    def fetch(_position: int, at: int, count: int) -> bytes:
        return log.batches[0][at : at + count]

    log.reader._fetch = fetch
    try:
        content = log.reader.read(packed, 5, offset, length)
    except SpaceError:
        return
    assert len(content) == length


@given(st.sampled_from(CompressionCode), st.binary(max_size=500), st.integers(1, 5000))
def test_any_body_decodes_to_its_length_or_errs(code: CompressionCode, body: bytes, length: int) -> None:
    """Any bytes given to any codec give exactly the bytes asked for, or a corruption error."""
    try:
        assert len(codecs.decompress(code, body, length)) == length
    except CorruptionError:
        return


@given(st.binary(max_size=100), st.sampled_from([0, FLAG_PADDED]))
def test_any_stored_bytes_open_or_err(stored: bytes, flags: int) -> None:
    """Bytes nobody sealed never pass GCM; XTS gives at most as many bytes back, or a corruption error."""
    key = Log().keyring.frame_key(3, 1)
    with pytest.raises(CorruptionError, match="authentication failed"):
        codecs.decrypt_gcm(key.gcm, stored, b"")
    try:
        body = codecs.decrypt_xts(key.xts_key, stored, flags)
    except CorruptionError:
        return
    assert 0 < len(body) <= len(stored) - 16
