from __future__ import annotations

import itertools
import threading

import attrs
import pytest
from crc32c import crc32c

from space._errors import CorruptionError, NotFoundError, RefusedError, SpaceError, UsageError
from space.content.frames import (
    FLAG_SHARED,
    FLAG_ZERO,
    CompressionCode,
    EncryptionCode,
    FrameRef,
    pack_frames,
    unpack_frames,
)
from space.content.keys import DESTROYED, FrameKey
from space.content.pipeline import ContentReader, ContentWriter
from space.policy.model import Compression, Policy
from tests.content_support import (
    COMPRESSIONS,
    DOMAINS,
    KEY,
    Log,
    found_at,
    place_frames,
    policy,
    prose,
    texture,
)

ENCRYPTED = [domain for domain in DOMAINS if domain[0] != "none"]


@pytest.mark.parametrize("length", [0, 1, 15, 16, 4095, 4096, 65_535, 65_536, 65_537, 1 << 20])
@pytest.mark.parametrize("encryption, dedupe", DOMAINS)
def test_content_comes_back(length: int, encryption: str, dedupe: bool) -> None:
    """Whatever the codec, cipher, size and content: what is read is what was written."""
    for compression in COMPRESSIONS:
        log = Log()
        for data in (prose(length), texture(length), bytes(length)):
            position, placed = log.write(data, policy(compression, encryption, dedupe))
            assert log.read(position, placed, 0, length) == data


def test_frames_are_cut_at_the_frame_size() -> None:
    """All frames but the last hold the frame size, and their lengths add up."""
    log = Log(frame_bytes=1000)
    _, placed = log.write(texture(2500), policy())
    assert [ref.plain_length for ref in unpack_frames(placed.packed)] == [1000, 1000, 500]


def test_raw_frames_are_not_copied() -> None:
    """Uncompressed, unencrypted frames are views of the caller's buffer."""
    data = bytearray(texture(200_000))
    frames = Log().writer.encode(data, policy())
    data[0] ^= 1
    data[70_000] ^= 1
    assert b"".join(frame.stored for frame in frames if frame.stored) == data


def test_zero_frames_store_nothing() -> None:
    """A frame of zeros is a hole: a length, a flag and no bytes, in the middle of other content too."""
    log = Log()
    data = prose(65_536) + bytes(65_536) + b"end"
    position, placed = log.write(data, policy())
    refs = unpack_frames(placed.packed)
    assert [ref.flags for ref in refs] == [0, FLAG_ZERO, 0]
    assert placed.stored_bytes == 65_536 + 3
    assert log.read(position, placed, 65_500, 65_575) == data[65_500:]


@pytest.mark.parametrize("at", [0, 1, 32_767, 32_768, 65_534, 65_535])
def test_one_byte_in_zeros_is_kept(at: int) -> None:
    """A frame is a hole only when every byte of it is zero."""
    log, data = Log(), bytearray(65_536)
    data[at] = 1
    position, placed = log.write(data, policy("zstd"))
    assert log.read(position, placed, 0, 65_536) == data


def test_equal_frames_are_stored_once() -> None:
    """With dedupe, content written before is found again, and the frame points to where it is."""
    log = Log()
    data = texture(150_000)
    first, _ = log.write(data, policy(dedupe=True))
    second, placed = log.write(data, policy(dedupe=True))
    assert placed.stored_bytes == 0
    assert {ref.source_position for ref in unpack_frames(placed.packed)} == {first}
    assert log.read(second, placed, 0, 150_000) == data


def test_equal_frames_of_one_write_are_stored_once() -> None:
    """Equal frames side by side, which no index knows yet, are one object to store."""
    log = Log()
    data = texture(65_536) * 5
    frames = log.writer.encode(data, policy(dedupe=True))
    assert all(frame.stored is frames[0].stored for frame in frames)
    position, placed = log.write(data, policy(dedupe=True))
    assert placed.stored_bytes == 65_536
    assert log.read(position, placed, 0, len(data)) == data


def test_without_dedupe_nothing_is_looked_up() -> None:
    """``dedupe: false`` stores every frame and never asks the index."""
    log = Log()
    for _ in range(2):
        _, placed = log.write(texture(65_536) * 2, policy())
        assert placed.stored_bytes == 131_072
    assert log.looked_up == []


def test_content_written_without_dedupe_is_never_found() -> None:
    """A frame not marked as shared is not shared, even if the index offers it."""
    log = Log()
    position, ref = log.write_one(texture(100), policy())
    log.index[ref.hash] = found_at(ref, position)
    _, placed = log.write(texture(100), policy(dedupe=True))
    assert placed.stored_bytes == 100


def test_a_find_without_place_is_not_used() -> None:
    """A frame the index holds without its batch's position cannot be pointed to."""
    log = Log()
    _, ref = log.write_one(texture(100), policy(dedupe=True))
    log.index[ref.hash] = ref
    _, placed = log.write(texture(100), policy(dedupe=True))
    assert placed.stored_bytes == 100


@pytest.mark.parametrize(
    "change",
    [{"plain_length": 99}, {"codec": 0x10}, {"key_id": 4}, {"key_version": 9}, {"hash": b"x" * 16}],
)
def test_a_find_that_does_not_match_is_not_used(change: dict[str, int | bytes]) -> None:
    """An index entry of another length, cipher, key or hash is passed by."""
    log = Log()
    position, ref = log.write_one(texture(100), policy(dedupe=True))
    log.index[ref.hash] = attrs.evolve(found_at(ref, position), **change)  # type: ignore[arg-type]
    _, placed = log.write(texture(100), policy(dedupe=True))
    assert placed.stored_bytes == 100


def test_domains_share_nothing() -> None:
    """Plain content, two keys and two versions of a key never find each other's frames."""
    log = Log()
    data = texture(1000)
    log.add_key(3, 2)
    log.add_key(4, 1)
    hashes = {log.write_one(data, policy(dedupe=True))[1].hash}
    for key in ((3, 1), (3, 2), (4, 1)):
        _, placed = log.write(data, policy("none", "aes-256-gcm", dedupe=True), key)
        assert placed.stored_bytes == 1028
        hashes.add(unpack_frames(placed.packed)[0].hash)
    assert len(hashes) == 4


def test_destroying_an_old_key_version_keeps_newer_content() -> None:
    """Content written under version 2 stays readable when version 1, with the same content, is destroyed."""
    log = Log()
    sealed = policy("zstd", "aes-256-gcm", dedupe=True)
    log.write(prose(1000), sealed, (3, 1))
    log.add_key(3, 2)
    position, placed = log.write(prose(1000), sealed, (3, 2))
    log.rows[3, 1] = DESTROYED
    log.keyring.forget(3, 1)
    assert log.read(position, placed, 0, 1000) == prose(1000)


def test_destroyed_key_takes_content_with_it() -> None:
    """Reading content of a destroyed key is refused and names the key; it is not called corruption."""
    log = Log()
    position, placed = log.write(prose(1000), policy("zstd", "aes-256-gcm"))
    log.rows[KEY] = DESTROYED
    log.keyring.forget(*KEY)
    with pytest.raises(RefusedError, match="key 3 version 1 was destroyed"):
        log.read(position, placed, 0, 1000)


@pytest.mark.parametrize("encryption", ["aes-256-gcm", "aes-256-xts"])
def test_equal_private_frames_look_unequal(encryption: str) -> None:
    """Without dedupe, equal encrypted content has unequal stored bytes and unequal hashes."""
    log = Log()
    (one, first), (two, second) = (log.write_one(prose(5000), policy("none", encryption)) for _ in range(2))
    assert first.hash != second.hash
    assert log.batches[one] != log.batches[two]


@pytest.mark.parametrize("encryption, dedupe", ENCRYPTED)
def test_ciphertext_shows_nothing_of_the_content(encryption: str, dedupe: bool) -> None:
    """No piece of the plain content is in the stored bytes."""
    log = Log()
    position, _ = log.write(prose(5000), policy("none", encryption, dedupe))
    assert b"quick brown fox" not in log.batches[position]


@pytest.mark.parametrize("encryption, dedupe", ENCRYPTED)
@pytest.mark.parametrize("length", [5, 15, 16, 5000])
def test_another_key_gives_an_error_never_other_bytes(
    encryption: str,
    dedupe: bool,
    length: int,
) -> None:
    """Opened with another data key under the same number, every frame is damage."""
    log = Log()
    position, placed = log.write(texture(length), policy("none", encryption, dedupe))
    log.add_key(*KEY)
    log.keyring.forget(*KEY)
    with pytest.raises(CorruptionError, match=f"position {position}, payload offset 0"):
        log.read(position, placed, 0, length)


def test_missing_key_is_not_found() -> None:
    """Writing under a key that does not exist, or reading it, names the key."""
    log = Log()
    with pytest.raises(NotFoundError, match="key 9 version 9"):
        log.write(b"x", policy("none", "aes-256-gcm"), (9, 9))


def test_encryption_without_a_key_is_refused() -> None:
    """A policy that encrypts is never followed half: no key, no write."""
    with pytest.raises(RefusedError, match="no data key"):
        Log().writer.encode(b"x", policy("none", "aes-256-gcm"))


def test_transform_is_refused() -> None:
    """A policy that asks for a transform is refused, not stored untransformed."""
    asked = Policy.from_document({"transform": ["strip-exif"]})
    with pytest.raises(RefusedError, match="strip-exif"):
        Log().writer.encode(b"x", asked)


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd", "brotli"])
@pytest.mark.parametrize("encryption, dedupe", DOMAINS)
@pytest.mark.parametrize("length", [5, 200])
def test_any_flipped_byte_is_corruption(
    compression: str,
    encryption: str,
    dedupe: bool,
    length: int,
) -> None:
    """Each byte of a stored frame, flipped in any way, gives a corruption error that names the position."""
    log = Log()
    data = (b"to be or not to be, that is the question; " * 5)[:length]
    position, placed = log.write(data, policy(compression, encryption, dedupe))
    good = log.batches[position]
    for at, mask in itertools.product(range(len(good)), (1, 0x80, 0xFF)):
        log.batches[position] = good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :]
        with pytest.raises(CorruptionError, match=f"position {position}, payload offset 0") as caught:
            log.read(position, placed, 0, length)
        assert caught.value.position == position


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd", "brotli"])
@pytest.mark.parametrize("encryption, dedupe", DOMAINS)
def test_forged_checksum_does_not_help(compression: str, encryption: str, dedupe: bool) -> None:
    """With the checksum made right again, ciphers refuse every flip, verification all that matter.

    Some flips in a compressed body are other spellings of the same content; those are no damage.
    """
    log = Log()
    data = (b"to be or not to be, that is the question; " * 5)[:200]
    position, ref = log.write_one(data, policy(compression, encryption, dedupe))
    good = log.batches[position]
    for at, mask in itertools.product(range(len(good)), (1, 0x80)):
        bad = good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :]
        log.batches[position] = bad
        forged = attrs.evolve(ref, crc=crc32c(bad))
        try:
            content = log.reader.read_frame(forged, position, verify=encryption == "none")
        except CorruptionError:
            continue
        assert encryption == "none"
        assert content == data


@pytest.mark.parametrize("encryption, dedupe", DOMAINS)
@pytest.mark.parametrize("kept", [0, 1, 11, 12, 15, 31, 199])
def test_cut_batch_is_corruption(encryption: str, dedupe: bool, kept: int) -> None:
    """Fewer stored bytes than the record says is damage, and the error counts them."""
    log = Log()
    position, placed = log.write(texture(200), policy("none", encryption, dedupe))
    log.batches[position] = log.batches[position][:kept]
    with pytest.raises(CorruptionError, match=f"{kept} of {placed.stored_bytes} stored bytes"):
        log.read(position, placed, 0, 200)


def test_gcm_ties_bytes_to_their_record() -> None:
    """A sealed frame does not open under a record with another hash, length, flag or key version."""
    log = Log()
    log.rows[3, 2] = log.keyring.wrap(3, 2, log.keyring.unwrap(3, 1, log.rows[KEY]))
    position, ref = log.write_one(prose(1000), policy("zstd", "aes-256-gcm"))
    changes: list[dict[str, int | bytes]] = [
        {"hash": bytes(16)},
        {"plain_length": 999},
        {"flags": FLAG_SHARED},
        {"key_version": 2},
        {"codec": CompressionCode.LZ4 | EncryptionCode.AES_256_GCM << 4},
    ]
    for change in changes:
        with pytest.raises(CorruptionError, match="authentication failed"):
            log.reader.read_frame(attrs.evolve(ref, **change), position)  # type: ignore[arg-type]


def test_verification_passes_by_the_cache() -> None:
    """Verifying reads what is stored now, whatever memory remembers."""
    log = Log(cache_bytes=1 << 20)
    position, ref = log.write_one(prose(1000), policy("zstd"))
    log.reader.read_frame(ref, position)
    log.batches[position] = bytes(len(log.batches[position]))
    assert log.reader.read_frame(ref, position) == prose(1000)
    with pytest.raises(CorruptionError):
        log.reader.read_frame(ref, position, verify=True)


def test_verification_finds_what_the_checksum_cannot() -> None:
    """Stored bytes that fit their checksum but not their content hash are found by verifying."""
    log = Log()
    position, ref = log.write_one(texture(1000), policy())
    with pytest.raises(CorruptionError, match="content hash"):
        log.reader.read_frame(attrs.evolve(ref, hash=b"x" * 16), position, verify=True)


def test_partial_reads_come_from_the_cache() -> None:
    """The second small read of a frame fetches nothing."""
    log = Log(cache_bytes=1 << 20)
    position, placed = log.write(texture(65_536), policy())
    first = log.read(position, placed, 100, 50)
    assert first == log.read(position, placed, 100, 50) == texture(65_536)[100:150]
    assert len(log.fetched) == 1


def test_a_small_read_touches_one_frame() -> None:
    """A read inside one frame fetches that frame alone."""
    log = Log()
    position, placed = log.write(texture(1 << 20), policy())
    log.read(position, placed, 200_000, 10)
    assert log.fetched == [(position, 196_608, 65_536)]


def test_raw_neighbours_are_one_fetch_without_a_copy() -> None:
    """A whole read of raw frames is one fetch, and its bytes are returned as they came."""
    log = Log()
    position, placed = log.write(texture(1 << 20), policy())
    content = log.read(position, placed, 0, 1 << 20)
    assert content is log.batches[position]
    assert log.fetched == [(position, 0, 1 << 20)]


def test_damage_in_a_run_names_its_frame() -> None:
    """In a read of many frames at once, the error names the frame that is damaged."""
    log = Log()
    position, placed = log.write(texture(1 << 20), policy())
    bad = bytearray(log.batches[position])
    bad[5 * 65_536 + 7] ^= 1
    log.batches[position] = bytes(bad)
    with pytest.raises(CorruptionError, match=f"payload offset {5 * 65_536}: checksum"):
        log.read(position, placed, 0, 1 << 20)
    assert log.read(position, placed, 0, 5 * 65_536) == texture(5 * 65_536)


def test_read_past_the_frames_is_corruption() -> None:
    """Frames that hold less than the content map says are never a silent short read."""
    log = Log()
    position, placed = log.write(texture(1000), policy())
    for offset, length in ((0, 1001), (999, 2), (2000, 1)):
        with pytest.raises(CorruptionError, match="the frames end at"):
            log.read(position, placed, offset, length)


@pytest.mark.parametrize("offset, length", [(-1, 1), (0, -1)])
def test_negative_range_is_refused(offset: int, length: int) -> None:
    """Negative offsets and lengths are a usage error."""
    log = Log()
    position, placed = log.write(texture(1000), policy())
    with pytest.raises(UsageError):
        log.read(position, placed, offset, length)


def test_what_fetch_raises_passes_through() -> None:
    """The reader does not turn the store's own errors into others."""
    log = Log()
    position, placed = log.write(texture(1000), policy())

    def reclaimed(_position: int, _offset: int, _length: int) -> bytes:
        raise NotFoundError("reclaimed by gc")

    reader = ContentReader(
        fetch=reclaimed, keyring=log.keyring, cache=log.cache, hash_key=log.keyring.hash_key()
    )
    with pytest.raises(NotFoundError, match="reclaimed by gc"):
        reader.read(placed.packed, position, 0, 1000)


def test_threads_change_nothing_but_time() -> None:
    """Encoding on several threads gives the same frames as on one."""
    data = b"".join(prose(60_000 + n) + texture(9000, n) for n in range(20))
    for encryption, dedupe in DOMAINS:
        asked = policy("zstd", encryption, dedupe)
        one, many = Log(threads=1), Log(threads=3)
        with many.writer:
            assert many.write(data, asked) == one.write(data, asked)
            assert many.batches == one.batches


def test_writer_works_after_close() -> None:
    """Closing ends helper threads only; a later call starts them again, and closing twice is fine."""
    log = Log(threads=2)
    for _ in range(2):
        log.writer.encode(prose(1 << 20), policy("zstd"))
        assert any(thread.name.startswith("space-content") for thread in threading.enumerate())
        log.writer.close()
        log.writer.close()
        assert not any(thread.name.startswith("space-content") for thread in threading.enumerate())


def test_error_on_a_helper_thread_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure on any thread fails the call; frames are never left out."""
    log = Log(threads=2)
    calls = iter(range(100))

    def failing(self: FrameKey) -> bytes:
        if next(calls) == 3:
            raise RefusedError("no more")
        return bytes(range(64))

    monkeypatch.setattr(FrameKey, "xts_key", property(failing))
    with log.writer, pytest.raises(RefusedError, match="no more"):
        log.writer.encode(prose(1 << 20), policy("zstd", "aes-256-xts"), KEY)


def test_concurrent_writers_and_readers() -> None:
    """Many threads encode and decode through one writer and one reader, each its own content."""
    log = Log(threads=2, cache_bytes=100_000)
    contents = [prose(70_000 + 500 * n) + texture(30_000, n) for n in range(8)]
    written = [log.write(data, policy("zstd", "aes-256-gcm")) for data in contents]
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(5):
            position, placed = written[n]
            if log.read(position, placed, 0, len(contents[n])) != contents[n]:
                wrong.append(n)
            frames = log.writer.encode(contents[n], policy("zstd"))
            refs = [frame.ref for frame in frames]
            if sum(ref.plain_length for ref in refs) != len(contents[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.writer.close()
    assert wrong == []


def test_hot_policy_uses_lz4() -> None:
    """A latency target of a millisecond or less makes ``auto`` choose lz4."""
    for target, code in (("1ms", CompressionCode.LZ4), ("2ms", CompressionCode.ZSTD)):
        asked = Policy.from_document({"latency_target": target})
        _, ref = Log().write_one(prose(5000), asked)
        assert ref.compression == code


@pytest.mark.parametrize("frame_bytes", [0, 511, 4 * 1024 * 1024 + 1])
def test_frame_size_out_of_range_is_refused(frame_bytes: int) -> None:
    """A frame size the record or the cache could not hold is a usage error."""
    with pytest.raises(UsageError, match="a frame holds"):
        Log(frame_bytes=frame_bytes)


def test_no_threads_is_refused() -> None:
    """Compression runs on one thread at least."""
    with pytest.raises(UsageError):
        Log(threads=0)


def test_any_flip_in_a_record_is_an_error_or_harmless() -> None:
    """A record with any byte changed gives the right content or an error, never other bytes."""
    wrong = 0
    for encryption, dedupe in DOMAINS:
        for compression in ("none", "zstd"):
            log = Log()
            data = prose(500)
            position, placed = log.write(data, policy(compression, encryption, dedupe))
            for at, mask in itertools.product(range(len(placed.packed)), (1, 2, 4, 8, 16, 32, 64, 128)):
                bad = bytearray(placed.packed)
                bad[at] ^= mask
                wrong += _reads_other_bytes(log, bytes(bad), position, data)
    assert wrong == 0


def _reads_other_bytes(log: Log, packed: bytes, position: int, data: bytes) -> bool:
    try:
        return bytes(log.reader.read_frame(unpack_frames(packed)[0], position)) != data
    except (SpaceError, KeyError):  # KeyError: the log of the tests has no batch there
        return False


def test_encode_accepts_any_buffer() -> None:
    """Bytes, bytearrays and views, of bytes or of larger items, give the same frames."""
    data = texture(8192)
    views = (data, bytearray(data), memoryview(data), memoryview(data).cast("Q"))
    packed = {place_frames(Log().writer.encode(view, policy("zstd"))).packed for view in views}
    assert len(packed) == 1


def test_writer_needs_no_key_for_plain_content() -> None:
    """A store without a master key stores and reads plain content."""
    log = Log()
    ring = log.opened_with(None)
    writer = ContentWriter(keyring=ring, hash_key=ring.hash_key(), find=lambda _hash: None)
    placed = place_frames(writer.encode(prose(100), Policy(compression=Compression.ZSTD)))
    log.batches[1] = b"".join(placed.pieces)
    assert log.read(1, placed, 0, 100) == prose(100)


def test_packed_frames_may_be_a_view() -> None:
    """Records are read from any buffer, such as a page of the database."""
    log = Log()
    position, placed = log.write(prose(100_000), policy("zstd"))
    assert log.reader.read(memoryview(placed.packed), position, 10, 99_000) == prose(100_000)[10:99_010]


def test_read_of_nothing_is_nothing() -> None:
    """No bytes are read from nowhere, without a fetch."""
    log = Log()
    position, placed = log.write(prose(1000), policy())
    assert log.read(position, placed, 5, 0) == b""
    assert log.reader.read(pack_frames([]), position, 0, 0) == b""
    assert log.fetched == []


def test_frames_of_another_batch_are_fetched_there() -> None:
    """A frame with a source position is read from that batch, wherever its record is."""
    log = Log()
    position, ref = log.write_one(texture(1000), policy())
    moved: FrameRef = found_at(ref, position)
    assert log.reader.read(pack_frames([moved]), 999, 0, 1000) == texture(1000)
