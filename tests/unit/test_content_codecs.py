from __future__ import annotations

import tracemalloc

import brotli
import lz4.block
import pytest
import zstandard

from space._errors import CorruptionError
from space.content import codecs
from space.content.frames import FLAG_PADDED, CompressionCode
from space.policy.model import LEVELS, Compression
from tests.content_support import prose, texture

CODES = [CompressionCode.LZ4, CompressionCode.ZSTD, CompressionCode.BROTLI]
FAMILIES = [Compression.LZ4, Compression.ZSTD, Compression.BROTLI]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_level_comes_back(family: Compression) -> None:
    """Each level a policy may name compresses and decompresses to the same bytes."""
    data = memoryview(prose(20_000))
    for level in LEVELS[family]:
        code, body = codecs.compress(data, family, level, hot=False)
        assert code is not CompressionCode.NONE
        assert codecs.decompress(code, body, len(data)) == data


@pytest.mark.parametrize("family", [*FAMILIES, Compression.AUTO])
@pytest.mark.parametrize("length", [64, 100, 4096, 16_384, 65_536])
def test_frames_that_do_not_shrink_stay_raw(family: Compression, length: int) -> None:
    """What no codec makes smaller is kept as it is, without a copy."""
    data = memoryview(texture(length))
    code, body = codecs.compress(data, family, None, hot=False)
    assert code is CompressionCode.NONE
    assert body is data


def test_saving_less_than_a_sixteenth_does_not_pay() -> None:
    """A frame that shrinks by less than a sixteenth is not worth decoding at every read."""
    length = 65_536
    little, enough = length // 20, length // 10
    for zeros, code in ((little, CompressionCode.NONE), (enough, CompressionCode.ZSTD)):
        data = memoryview(texture(length - zeros) + bytes(zeros))
        assert codecs.compress(data, Compression.ZSTD, None, hot=False)[0] is code


@pytest.mark.parametrize("hot, code", [(True, CompressionCode.LZ4), (False, CompressionCode.ZSTD)])
def test_auto_follows_latency(hot: bool, code: CompressionCode) -> None:
    """``auto`` takes lz4 where latency matters and zstd elsewhere; never brotli."""
    assert codecs.compress(memoryview(prose(65_536)), Compression.AUTO, None, hot=hot)[0] is code


def test_slow_codecs_are_not_tried_on_what_zstd_cannot_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brotli at 5 MB/s is never run on a frame that a quick trial finds incompressible."""
    monkeypatch.setitem(codecs._COMPRESSORS, Compression.BROTLI, lambda _data, _level: pytest.fail("tried"))
    assert codecs.compress(memoryview(texture(65_536)), Compression.BROTLI, 11, hot=False)[0] == 0


@pytest.mark.parametrize("length", [0, 1, 63])
def test_tiny_frames_are_not_compressed(length: int) -> None:
    """A frame shorter than any gain stays raw."""
    assert codecs.compress(memoryview(bytes(length)), Compression.ZSTD, 22, hot=False)[0] == 0


def bomb(code: CompressionCode, length: int) -> bytes:
    """``length`` zero bytes as ``code`` stores them."""
    if code is CompressionCode.LZ4:
        return bytes(lz4.block.compress(bytes(length), store_size=False))
    if code is CompressionCode.ZSTD:
        return zstandard.ZstdCompressor(level=1).compress(bytes(length))
    return bytes(brotli.compress(bytes(length), quality=1))


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("claimed", [1, 4096, 65_535, 65_536])
def test_bomb_is_refused_within_bounds(code: CompressionCode, claimed: int) -> None:
    """A body that decodes to more than its record says is damage, found without making the bytes."""
    body = bomb(code, 64 * 1024 * 1024)
    codecs.decompress(code, bomb(code, 100), 100)  # load the codec before measuring
    tracemalloc.start()
    try:
        with pytest.raises(CorruptionError):
            codecs.decompress(code, body, claimed)
        assert tracemalloc.get_traced_memory()[1] < 2 * 1024 * 1024
    finally:
        tracemalloc.stop()


def test_zstd_bomb_without_length_is_refused() -> None:
    """A zstd body that does not say its length is bounded by the record."""
    body = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20))
    with pytest.raises(CorruptionError):
        codecs.decompress(CompressionCode.ZSTD, body, 65_536)


def test_zstd_header_that_lies_is_refused() -> None:
    """A zstd header claiming an exabyte is refused before anything is allocated."""
    header = bytes.fromhex("28b52ffd") + bytes([0xE0]) + (1 << 60).to_bytes(8, "little")
    with pytest.raises(CorruptionError, match="claims another length"):
        codecs.decompress(CompressionCode.ZSTD, header + bytes(10), 4096)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("change", [-1, 1, 1000])
def test_wrong_plain_length_is_damage(code: CompressionCode, change: int) -> None:
    """A body that decodes to fewer or more bytes than its record says is damage."""
    with pytest.raises(CorruptionError):
        codecs.decompress(code, bomb(code, 5000), 5000 + change)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("body", [b"", b"\0", b"\xff" * 40, b"garbage that is no compressed stream" * 3])
def test_garbage_is_damage(code: CompressionCode, body: bytes) -> None:
    """Bytes no compressor made raise one documented error."""
    with pytest.raises(CorruptionError):
        codecs.decompress(code, body, 4096)


@pytest.mark.parametrize("code", CODES)
def test_any_part_of_a_body_is_damage(code: CompressionCode) -> None:
    """A body cut anywhere is damage, even where all its content came out before the cut."""
    body = bomb(code, 5000)
    for kept in range(len(body)):
        with pytest.raises(CorruptionError):
            codecs.decompress(code, body[:kept], 5000)


def test_unfinished_brotli_is_damage() -> None:
    """A brotli stream flushed but never finished holds all its content, and is still not what was written."""
    stream = brotli.Compressor()
    flushed = stream.process(prose(5000)) + stream.flush()
    assert codecs.decompress(CompressionCode.BROTLI, flushed + stream.finish(), 5000) == prose(5000)
    with pytest.raises(CorruptionError, match="does not end"):
        codecs.decompress(CompressionCode.BROTLI, flushed, 5000)


@pytest.mark.parametrize("code", [CompressionCode.ZSTD, CompressionCode.BROTLI])
def test_bytes_after_the_stream_are_damage(code: CompressionCode) -> None:
    """A body with something behind its stream is not what was written."""
    with pytest.raises(CorruptionError):
        codecs.decompress(code, bomb(code, 5000) + b"tail", 5000)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 4095])
def test_xts_takes_any_length(length: int) -> None:
    """A body shorter than a block is padded and flagged; a longer one keeps its length."""
    key, tweak, body = bytes(range(64)), b"t" * 16, texture(length)
    stored, flags = codecs.encrypt_xts(key, body, tweak)
    assert len(stored) == 16 + max(16, length)
    assert flags == (FLAG_PADDED if length < 16 else 0)
    assert codecs.decrypt_xts(key, stored, flags) == body


def test_xts_is_ieee_1619() -> None:
    """The stored ciphertext is that of IEEE 1619-2007, vector 10 (XTS-AES-256)."""
    key = bytes.fromhex(
        "2718281828459045235360287471352662497757247093699959574966967627"
        "3141592653589793238462643383279502884197169399375105820974944592"
    )
    tweak = (0xFF).to_bytes(16, "little")
    stored, _ = codecs.encrypt_xts(key, bytes(range(256)) * 2, tweak)
    assert stored[:16] == tweak
    assert stored[16:48].hex() == "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b"


def test_xts_padding_no_writer_makes_is_damage() -> None:
    """With the wrong key the padding is almost surely impossible, and that is said."""
    stored, flags = codecs.encrypt_xts(bytes(range(64)), b"short", b"t" * 16)
    with pytest.raises(CorruptionError, match="padding"):
        codecs.decrypt_xts(bytes(range(1, 65)), stored, flags)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 31])
def test_xts_too_short_is_damage(length: int) -> None:
    """Fewer bytes than a tweak and a block are damage."""
    with pytest.raises(CorruptionError, match="too short"):
        codecs.decrypt_xts(bytes(range(64)), bytes(length), 0)
