"""Chunks of one log, sent to and taken by another."""

from __future__ import annotations

import random
from collections.abc import Callable

import attrs
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from space._errors import CorruptionError, DiskFullError, NotFoundError, RefusedError, UsageError
from space.wal import shipping
from space.wal.faulty_disk import FaultyDisk
from space.wal.log import Log
from space.wal.segment_format import RecordKind
from space.wal.segment_reader import Damage
from space.wal.shipping import (
    Chunk,
    DivergenceError,
    GapError,
    ShippingError,
    decode_chunk,
    encode_chunk,
    first_divergence,
    link_at,
    read_chunk,
    receive_chunk,
)

STORE = b"0123456789abcdef"
SIZES = (0, 0, 1, 700, 4095, 4096, 9000, 40_000)


def open_log(disk: FaultyDisk | None = None, segment_bytes: int = 2**16) -> Log:
    """A log in memory."""
    return Log.open(disk or FaultyDisk(), "/log", store_id=STORE, segment_bytes=segment_bytes)


def fill(log: Log, count: int, rng: random.Random, term: int = 1) -> None:
    """Appends batches of many sizes."""
    for _ in range(count):
        time_ns = log.last_time_ns + rng.randint(0, 3)
        payload = rng.randbytes(rng.choice(SIZES))
        log.append(rng.randbytes(rng.randint(0, 300)), [payload], time_ns=time_ns, term=term)


def filled(count: int = 30, seed: int = 1) -> Log:
    """A log of that many batches."""
    log = open_log()
    fill(log, count, random.Random(seed))
    return log


def wire(chunk: Chunk) -> bytes:
    """A chunk as it arrives."""
    return b"".join(encode_chunk(chunk))


def ship(source: Log, target: Log, bytes_max: int, **how: Callable[..., bool]) -> int:
    """Brings the target up to the source over the wire; returns the number of chunks."""
    count = 0
    while target.last_index < source.last_index:
        chunk = read_chunk(
            source, target.last_index + 1, stop=source.last_index + 1, bytes_max=bytes_max, **how
        )
        assert receive_chunk(target, decode_chunk(wire(chunk))) == chunk.last_index
        count += 1
    return count


@pytest.mark.parametrize("bytes_max", [1, 1000, 50_000, 2**24])
def test_a_shipped_log_is_the_same_log(bytes_max: int) -> None:
    """Whatever the sizes of chunks and segments: equal chain, equal terms, equal payload."""
    source, target = filled(), open_log(segment_bytes=2**20)
    chunks = ship(source, target, bytes_max)
    assert chunks == {1: 30, 2**24: 1}.get(bytes_max, chunks)
    assert target.last_chain == source.last_chain
    assert list(target.batches(1)) == list(source.batches(1))
    assert list(target.verify()) == []


def test_chunks_keep_to_their_limits() -> None:
    """A chunk ends before it gets too large or too many; a batch that is larger comes alone."""
    log = open_log()
    for size in (100, 100, 5000, 100, 100, 100):
        log.append(b"", [bytes(size)], time_ns=1)
    ends = []
    start = 1
    while start <= 6:
        start = read_chunk(log, start, stop=7, bytes_max=200).last_index + 1
        ends.append(start)
    assert ends == [3, 4, 6, 7]
    assert read_chunk(log, 1, stop=3).last_index == 2


def test_a_chunk_has_no_more_than_so_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they are small."""
    monkeypatch.setattr(shipping, "CHUNK_BATCHES_MAX", 4)
    assert read_chunk(filled(), 3, stop=31).last_index == 6


def test_only_what_there_is_can_be_read() -> None:
    """Positions the log has not, empty ranges and sizes out of range are refused."""
    log = filled(3)
    for start in (0, 4):
        with pytest.raises(NotFoundError):
            read_chunk(log, start, stop=9)
    for stop, bytes_max in ((2, 100), (4, 0), (4, 2**24 + 1)):
        with pytest.raises(UsageError):
            read_chunk(log, 2, stop=stop, bytes_max=bytes_max)


def test_damage_is_not_shipped() -> None:
    """Any flipped byte of a batch stops the source; chunks without it are still made."""
    disk = FaultyDisk()
    log = open_log(disk)
    for index in (1, 2, 3):
        log.append(b"meta", [b"payload%d" % index], time_ns=index)
    path = f"/log/{log.segments()[0].name}"
    offset = log._locate(2)[1]
    for at in (*range(offset, offset + 108), *range(offset + 112, offset + 120)):
        disk.flip(path, at, 3)
        with pytest.raises(CorruptionError):
            read_chunk(log, 1, stop=4, reclaimed=lambda _info, _payload: True)
        disk.flip(path, at, 3)
    assert read_chunk(log, 1, stop=4).last_index == 3


def test_records_that_are_no_batches_are_not_shipped() -> None:
    """They would be links of the chain that the target does not have."""
    log = filled(2)
    log.append(b"state", time_ns=log.last_time_ns, kind=RecordKind.HARD_STATE)
    fill(log, 1, random.Random(0))
    with pytest.raises(RefusedError):
        read_chunk(log, 1, stop=4)


# -- receiving -----------------------------------------------------------------------------------------


def test_what_comes_twice_or_overlaps_is_dropped() -> None:
    """Any chunk that starts at or before the end brings what is new in it, and nothing else."""
    source = filled(20)
    for have in (0, 1, 7, 19, 20):
        for start in range(1, min(have + 1, 20) + 1):
            for stop in (start + 1, 12, 21):
                if start >= stop:
                    continue
                target = open_log()
                if have:
                    receive_chunk(target, read_chunk(source, 1, stop=have + 1, bytes_max=2**24))
                chunk = read_chunk(source, start, stop=stop, bytes_max=2**24)
                assert receive_chunk(target, chunk) == max(have, stop - 1)
                assert target.last_chain == link_at(source, target.last_index)
                assert list(target.batches(1)) == list(source.batches(1, target.last_index + 1))


def test_a_gap_is_named_and_changes_nothing() -> None:
    """The error says where to go on."""
    source, target = filled(20), open_log()
    receive_chunk(target, read_chunk(source, 1, stop=6, bytes_max=2**24))
    with pytest.raises(GapError) as caught:
        receive_chunk(target, read_chunk(source, 7, stop=21))
    assert caught.value.index == 6
    assert target.last_index == 5


@pytest.mark.parametrize("differs_at", [1, 2, 9, 14, 15])
def test_another_history_is_named_and_changes_nothing(differs_at: int) -> None:
    """The error names the first batch that differs, wherever the chunk starts."""
    source, target = filled(20), open_log()
    if differs_at > 1:
        receive_chunk(target, read_chunk(source, 1, stop=differs_at, bytes_max=2**24))
    fill(target, 16 - differs_at, random.Random(99), term=2)
    before = target.last_chain
    for start in range(1, 17):
        with pytest.raises(DivergenceError) as caught:
            receive_chunk(target, read_chunk(source, start, stop=21, bytes_max=2**24))
        assert caught.value.index == max(differs_at, start - 1)
        assert (target.last_index, target.last_chain) == (15, before)


def test_a_log_that_goes_on_after_the_chunk_is_checked_too() -> None:
    """A chunk that ends before the log does is compared, not believed."""
    source, target = filled(20), open_log()
    receive_chunk(target, read_chunk(source, 1, stop=6, bytes_max=2**24))
    fill(target, 10, random.Random(99))
    assert receive_chunk(target, read_chunk(source, 2, stop=6, bytes_max=2**24)) == 15
    with pytest.raises(DivergenceError):
        receive_chunk(target, read_chunk(source, 2, stop=7, bytes_max=2**24))


def test_a_full_disk_in_the_middle_leaves_a_cursor() -> None:
    """What came before the disk was full stands, and shipping goes on from there once there is space."""
    disk = FaultyDisk()
    source, target = filled(30), open_log(disk, segment_bytes=2**15)
    chunk = read_chunk(source, 1, stop=31, bytes_max=2**24)
    disk.capacity = disk.used_bytes + 2**17
    with pytest.raises(DiskFullError):
        receive_chunk(target, chunk)
    assert 0 < target.last_index < 30
    assert target.last_chain == link_at(source, target.last_index)
    disk.capacity = 2**40
    assert receive_chunk(target, chunk) == 30
    assert target.last_chain == source.last_chain
    assert list(target.verify()) == []


def test_a_chunk_whose_payload_was_changed_on_the_way_is_never_the_logs() -> None:
    """The last check compares what the log has become with what the source has."""
    chunk = read_chunk(filled(5), 1, stop=6, bytes_max=2**24)
    at = next(n for n, batch in enumerate(chunk.batches) if batch.pieces)
    piece = chunk.batches[at].pieces[0]
    wrong = attrs.evolve(chunk.batches[at], pieces=(piece._replace(data=bytes(len(piece.data))),))
    batches = (*chunk.batches[:at], wrong, *chunk.batches[at + 1 :])
    with pytest.raises(CorruptionError):
        receive_chunk(open_log(), attrs.evolve(chunk, batches=batches))


# -- reclaimed payload ---------------------------------------------------------------------------------


def reclaimed_log() -> Log:
    """A log with payloads whole, reclaimed wholly, in the middle, at both ends and in many places."""
    log = open_log()
    rng = random.Random(5)
    for ranges in ([], [(0, 40_000)], [(4096, 8192)], [(0, 5000), (30_000, 10_000)], [(8192, 4096)] * 2, []):
        log.append(b"meta", [rng.randbytes(40_000)], time_ns=1)
        for offset, length in ranges:
            log.punch(log.last_index, offset, length)
    for at in range(0, 40_000, 8192):
        log.punch(6, at, 4096)
    return log


def test_reclaimed_payload_travels_as_holes() -> None:
    """What is left of it arrives, holes take no bytes on the way and no space, and the chain is the same."""
    source, target = reclaimed_log(), open_log(segment_bytes=2**19)
    asked: list[int] = []

    def judge(info: object, payload: bytes) -> bool:
        asked.append(len(payload))
        return True

    chunk = read_chunk(source, 1, stop=7, reclaimed=judge)
    assert asked == [40_000] * 5
    stored = list(source.stored(1))
    left = sum(len(batch.payload) - batch.payload.count(bytes(4096)) * 4096 for batch in stored)
    assert left < len(wire(chunk)) < left + 4096 * 5 + 2000
    assert receive_chunk(target, decode_chunk(wire(chunk))) == 6
    assert list(target.stored(1)) == stored
    assert target.last_chain == source.last_chain
    assert {finding.what for finding in target.verify()} == {Damage.PAYLOAD}
    target.sync()


def test_holes_are_given_back_on_the_target_too() -> None:
    """Shipping a reclaimed log does not bring back the space it took."""
    disk = FaultyDisk()
    target = open_log(disk, segment_bytes=2**19)
    before = disk.used_bytes
    receive_chunk(target, read_chunk(reclaimed_log(), 1, stop=7, reclaimed=lambda _info, _payload: True))
    assert disk.used_bytes < before


def test_payload_that_nobody_vouches_for_is_damage() -> None:
    """Without a judge, or against its word, a payload with holes is not shipped."""
    log = reclaimed_log()
    for judge in (None, lambda _info, _payload: False):
        assert read_chunk(log, 1, stop=2, reclaimed=judge).last_index == 1
        with pytest.raises(CorruptionError) as caught:
            read_chunk(log, 1, stop=7, reclaimed=judge)
        assert caught.value.position == 2


def test_a_judge_cannot_vouch_for_damage_that_is_no_hole() -> None:
    """Reclaiming leaves whole blocks of zeros: anything else is damage whatever the judge says."""
    disk = FaultyDisk()
    log = open_log(disk)
    log.append(b"", [random.Random(1).randbytes(20_000)], time_ns=1)
    disk.flip(f"/log/{log.segments()[0].name}", log._place(1)[1].offset + 9000, 1)
    with pytest.raises(CorruptionError):
        read_chunk(log, 1, stop=2, reclaimed=lambda _info, _payload: True)


# -- divergence ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("common", [0, 1, 5, 63, 64])
@pytest.mark.parametrize("ours_more, theirs_more", [(0, 0), (3, 0), (0, 9), (17, 30)])
def test_the_first_difference_of_two_logs_is_found(common: int, ours_more: int, theirs_more: int) -> None:
    """It is the one after the last common batch, and is found with logarithmically many questions."""
    ours, theirs = open_log(), open_log()
    for log in (ours, theirs):
        for index in range(common):
            log.append(b"%d" % index, time_ns=1)
    for log, more, name in ((ours, ours_more, b"a"), (theirs, theirs_more, b"b")):
        for _ in range(more):
            log.append(name, time_ns=1)
    asked = []

    def ask(index: int) -> bytes:
        asked.append(index)
        return link_at(theirs, index)

    assert first_divergence(ours, ask, theirs.last_index) == common + 1
    assert len(asked) <= 7
    assert first_divergence(ours, lambda index: ask(index) if index <= common else None, 10**9) == common + 1
    ours.truncate_after(common)
    assert receive_all(ours, theirs) == theirs.last_chain


def receive_all(target: Log, source: Log) -> bytes:
    """The target's link after taking all there is."""
    if target.last_index < source.last_index:
        receive_chunk(target, read_chunk(source, target.last_index + 1, stop=10**9))
    return target.last_chain


# -- bytes from outside --------------------------------------------------------------------------------


def chunk_of_all_kinds() -> bytes:
    """A small chunk with empty, small, large and reclaimed payload."""
    log = open_log()
    rng = random.Random(8)
    log.append(b"", time_ns=1)
    log.append(b"meta", [b"small"], time_ns=1, term=3)
    log.append(b"large", [rng.randbytes(4097)], time_ns=2, term=3)
    log.append(b"holes", [rng.randbytes(13_000)], time_ns=2, term=4)
    log.punch(4, 4096, 4096)
    return wire(read_chunk(log, 1, stop=5, reclaimed=lambda _info, _payload: True))


def test_a_chunk_comes_back_from_its_bytes() -> None:
    """Decoding is the inverse of encoding, whatever kind of buffer the bytes came in."""
    raw = chunk_of_all_kinds()
    for data in (raw, bytearray(raw), memoryview(raw)):
        assert wire(decode_chunk(data)) == raw
    assert [batch.reclaimed for batch in decode_chunk(raw).batches] == [False, False, False, True]


def test_any_flipped_bit_of_a_chunk_is_refused() -> None:
    """No byte of a chunk may change unnoticed."""
    raw = chunk_of_all_kinds()
    for at in range(len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(ShippingError):
            decode_chunk(damaged)


def test_any_cut_or_longer_chunk_is_refused() -> None:
    """A chunk has exactly its bytes."""
    raw = chunk_of_all_kinds()
    for end in range(0, len(raw), 7):
        with pytest.raises(ShippingError):
            decode_chunk(raw[:end])
    with pytest.raises(ShippingError):
        decode_chunk(raw + b"\0")


@given(data=st.binary(max_size=400))
def test_any_bytes_are_a_chunk_or_refused(data: bytes) -> None:
    """Garbage raises the one error there is for it, also behind a header that is right."""
    with pytest.raises(ShippingError):
        decode_chunk(data)
    head = shipping._CHUNK.pack(b"SPACECHK", 1, 3, shipping._CHUNK_BYTES + len(data), bytes(32), bytes(32))
    with pytest.raises(ShippingError):
        decode_chunk(head + crc32c(head).to_bytes(4, "little") + data)


@given(seed=st.integers(0, 2**32), changes=st.integers(1, 3))
def test_crafted_chunks_are_whole_or_refused(seed: int, changes: int) -> None:
    """Fields changed on purpose, with every checksum of the header made right again, end in the one error."""
    rng = random.Random(seed)
    raw = bytearray(chunk_of_all_kinds())
    for _ in range(changes):
        at = rng.choice((8, 12, 16, *range(92, 136, 4), *range(92, 136, 4)))
        raw[at : at + 4] = rng.choice((bytes(4), b"\xff" * 4, rng.randbytes(4), b"\x01\0\0\0"))
    raw[88:92] = crc32c(raw[:88]).to_bytes(4, "little")
    try:
        chunk = decode_chunk(raw)
    except ShippingError:
        return
    assert wire(chunk) == bytes(raw)


def sealed(count: int, body: bytes, *, total: int | None = None, version: int = 1) -> bytes:
    """A chunk header that is right for these bytes, and them."""
    length = shipping._CHUNK_BYTES + len(body) if total is None else total
    head = shipping._CHUNK.pack(b"SPACECHK", version, count, length, bytes(32), bytes(32))
    return head + crc32c(head).to_bytes(4, "little") + body


def test_limits_hold_for_what_arrives() -> None:
    """Batches, bytes and holes beyond the limits are refused before anything is made of them."""
    empty = shipping._BATCH.pack(1, 0, 0, 0, 0, 0, 0, 0)
    large = shipping._BATCH.pack(1, 0, 0, 0, 2**28, 0, 1, 0)
    huge = shipping._BATCH.pack(1, 0, 0, 0, 2**28 + 1, 0, 1, 0)
    for data, reason in (
        (sealed(0, b""), "0 batches"),
        (sealed(65_537, empty * 65_537), "batches"),
        (sealed(1, empty, version=2), "version 2"),
        (sealed(1, huge), "out of range"),
        (sealed(1, shipping._BATCH.pack(0, 0, 0, 0, 0, 0, 0, 0)), "out of range"),
        (sealed(1, shipping._BATCH.pack(1, 0, -1, 0, 0, 0, 0, 0)), "out of range"),
        (sealed(1, shipping._BATCH.pack(1, 0, 0, 0, 0, 0, 2, 0)), "out of range"),
        (sealed(2, large + large), "up to"),
        (sealed(2, empty + empty), "order"),
        (sealed(1, shipping._BATCH.pack(1, 0, 0, 0, 0, 0, 0, 2**32 - 1)), "ends"),
        (sealed(1, shipping._BATCH.pack(1, 0, 0, 2**26, 0, 0, 0, 0)), "ends"),
        (sealed(1, shipping._BATCH.pack(1, 0, 0, 0, 5000, 0, 0, 0)), "not in order"),
        (sealed(1, shipping._BATCH.pack(1, 0, 0, 0, 100, 0, 1, 0)), "not in order"),
    ):
        with pytest.raises(ShippingError, match=reason):
            decode_chunk(data)


def test_pieces_must_be_runs_of_blocks_with_holes_between() -> None:
    """There is one way to write down a reclaimed payload."""

    def fits(*pieces: tuple[int, int], length: int = 13_000) -> bool:
        made = [shipping.Piece(offset, bytes(size)) for offset, size in pieces]
        return shipping._fit(made, length, reclaimed=True)

    assert fits()
    assert fits((0, 4096))
    assert fits((0, 4096), (8192, 4808))
    assert not fits((0, 4096), (4096, 4096))
    assert not fits((8192, 4096), (0, 4096))
    assert not fits((0, 100))
    assert not fits((100, 4096))
    assert not fits((8192, 8192))
    assert not fits((4096, 0))
    assert not fits((0, 13_000))
    assert not fits(length=4095)


def test_time_that_goes_back_is_the_senders_fault() -> None:
    """A chunk whose links are right and whose times are not is refused like any other garbage."""
    target = open_log()
    target.append(b"", time_ns=50)
    source = open_log()
    source.append(b"", time_ns=50)
    source.append(b"", time_ns=60)
    chunk = read_chunk(source, 2, stop=3)
    batch = attrs.evolve(chunk.batches[0], time_ns=40)
    with pytest.raises(ShippingError, match="time"):
        receive_chunk(target, attrs.evolve(chunk, batches=(batch,)))
    assert target.last_index == 1
