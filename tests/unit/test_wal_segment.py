from __future__ import annotations

import random
from array import array

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from space.wal.segment_format import (
    GENESIS,
    RECORD_HEADER_BYTES,
    RecordKind,
    SegmentHeader,
    payload_offset,
    record_seed,
)
from space.wal.segment_reader import (
    BadRecord,
    Damage,
    ReadAt,
    find_headers,
    last_nonzero,
    parse_record_header,
    parse_seal,
    parse_segment_header,
    scan,
    sum_payload,
)
from space.wal.segment_writer import (
    encode_record,
    encode_seal,
    encode_segment_header,
    measure,
    record_length,
)
from space.wal.sidecar import decode_index, encode_index

SEED = record_seed(bytes(16), 1)


def reader(data: bytes) -> ReadAt:
    """Reads from bytes as from a file."""
    return lambda length, offset: data[offset : offset + length]


def records(sizes: list[tuple[int, int]], seed: int = SEED) -> tuple[bytes, list[int]]:
    """Records of these metadata and payload lengths one after the other, and where each starts."""
    rng = random.Random(0)
    data, chain, starts = b"", GENESIS, []
    for index, (metadata, payload) in enumerate(sizes, 1):
        pieces = [rng.randbytes(payload)]
        length, crc = measure(pieces)
        encoded = encode_record(
            offset=len(data),
            seed=seed,
            kind=RecordKind.BATCH,
            index=index,
            term=index,
            time_ns=index,
            previous_chain=chain,
            durable_end=0,
            metadata=rng.randbytes(metadata),
            payload=pieces,
            payload_length=length,
            payload_crc=crc,
        )
        starts.append(len(data))
        data += b"".join(encoded.buffers)
        chain = encoded.chain
    return data, starts


SIZES = st.lists(
    st.tuples(st.sampled_from([0, 1, 100, 5000, 70_000]), st.sampled_from([0, 1, 4095, 4096, 9000, 300_000])),
    min_size=1,
    max_size=12,
)


@given(sizes=SIZES)
def test_records_are_read_back_whatever_their_sizes(sizes: list[tuple[int, int]]) -> None:
    """Any mix of lengths round-trips through windows that grow, shrink and jump."""
    data, starts = records(sizes)
    found = list(scan(reader(data), 0, len(data), seed=SEED, index=0, chain=GENESIS))
    assert [record.offset for record in found] == starts
    assert [(len(record.info.metadata), record.info.payload_length) for record in found] == sizes
    assert [record.info.index for record in found] == list(range(1, len(sizes) + 1))
    for record in found:
        assert record.payload_crc == sum_payload(
            reader(data), record.payload_offset, record.info.payload_length
        )
        assert record.end - record.offset == record_length(
            record.offset, len(record.info.metadata), record.info.payload_length
        )
    assert [offset for offset, _ in find_headers(reader(data), 0, len(data), SEED)] == starts


@given(garbage=st.binary(max_size=400), at=st.integers(0, 3000))
def test_garbage_ends_a_scan_where_it_is(garbage: bytes, at: int) -> None:
    """Whatever the bytes, a scan yields only true records and then says where it stopped, and why."""
    data, starts = records([(100, 50)] * 10)
    damaged = data[:at] + garbage + data[at + len(garbage) :]
    found: list[int] = []
    stopped = (len(data), 11)
    try:
        found.extend(
            record.offset for record in scan(reader(damaged), 0, len(data), seed=SEED, index=0, chain=GENESIS)
        )
    except BadRecord as bad:
        stopped = (bad.offset, bad.index)
    assert found == starts[: stopped[1] - 1]
    assert stopped[0] == [*starts, len(data)][len(found)]
    assert stopped[1] == 11 or damaged != data


@given(data=st.binary(max_size=2000))
def test_parsers_take_any_bytes(data: bytes) -> None:
    """Garbage is None or BadRecord to every parser, nothing else."""
    assert parse_segment_header(data) is None
    assert parse_record_header(data[:RECORD_HEADER_BYTES], 0, SEED) is None
    assert parse_seal(data, 0, SEED, 1) is None
    assert decode_index(data, 1, len(data) // 8, GENESIS) is None
    assert list(find_headers(reader(data), 0, len(data), SEED)) == []
    if data:
        with pytest.raises(BadRecord):
            list(scan(reader(data), 0, len(data), seed=SEED, index=0, chain=None))


def test_a_damaged_record_is_told_by_its_part() -> None:
    """Header, metadata, link, order and absence are different findings."""
    data, starts = records([(100, 50)] * 3)
    second = starts[1]

    def stop(damaged: bytes, *, index: int = 0, chain: bytes = GENESIS) -> tuple[Damage, int]:
        with pytest.raises(BadRecord) as caught:
            list(scan(reader(damaged), 0, len(data), seed=SEED, index=index, chain=chain))
        return caught.value.what, caught.value.offset

    def flipped(offset: int) -> bytes:
        return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]

    assert stop(flipped(second + 40)) == (Damage.HEADER, second)
    assert stop(flipped(second + 104)) == (Damage.METADATA, second)
    assert stop(data[:second] + bytes(len(data) - second)) == (Damage.NO_RECORD, second)
    assert stop(data[:second]) == (Damage.NO_RECORD, second)
    assert stop(data[: second + 120]) == (Damage.METADATA, second)
    assert stop(data[: starts[2]] + data[: starts[1]]) == (Damage.CHAIN, starts[2])
    assert stop(data, chain=b"x" * 32) == (Damage.CHAIN, 0)
    assert stop(data, index=5) == (Damage.ORDER, 0)


def test_records_of_other_segments_do_not_pass() -> None:
    """The header CRC is seeded with store and segment: the same bytes elsewhere are no record."""
    data, _ = records([(10, 0)], seed=record_seed(bytes(16), 2))
    assert parse_record_header(data[:RECORD_HEADER_BYTES], 0, SEED) is None
    assert record_seed(bytes(16), 1) != record_seed(b"1" * 16, 1)


def test_the_chain_does_not_depend_on_the_place() -> None:
    """Two replicas with different segments have equal links: only what is true of the record is hashed."""
    links = {
        encode_record(
            offset=offset,
            seed=seed,
            kind=RecordKind.BATCH,
            index=7,
            term=1,
            time_ns=5,
            previous_chain=b"p" * 32,
            durable_end=offset,
            metadata=b"same",
        ).chain
        for offset, seed in ((4096, 1), (8000, 2))
    }
    assert len(links) == 1


def test_large_metadata_links_like_small() -> None:
    """Hashing in two calls gives what hashing one joined buffer gives."""
    metadata = bytes(200_000)
    encoded = encode_record(
        offset=0,
        seed=0,
        kind=RecordKind.BATCH,
        index=1,
        term=0,
        time_ns=0,
        previous_chain=GENESIS,
        durable_end=0,
        metadata=metadata,
    )
    header = b"".join(encoded.buffers)[24:96]
    assert encoded.chain == blake3(header + metadata).digest()


@given(
    offset=st.integers(0, 2**40).map(lambda n: n * 8),
    metadata=st.integers(0, 10**6),
    payload=st.integers(0, 10**6),
)
def test_layout(offset: int, metadata: int, payload: int) -> None:
    """A payload follows its metadata, aligned to 8, or to a block if it fills one."""
    start = payload_offset(offset, metadata, payload)
    alignment = 4096 if payload >= 4096 else 8
    assert (offset + start) % alignment == 0
    assert 0 <= start - RECORD_HEADER_BYTES - metadata < alignment
    assert record_length(offset, metadata, payload) % 8 == 0


def test_headers_and_seals_round_trip() -> None:
    """What the writer writes the reader understands, and only for the right segment."""
    header = SegmentHeader(b"s" * 16, 42, 7, b"c" * 32)
    assert parse_segment_header(encode_segment_header(header)) == header
    seed = record_seed(b"s" * 16, 42)
    seal = encode_seal(offset=8000, seed=seed, first_index=42, last_index=50, time_ns=9, chain=b"e" * 32)
    parsed = parse_seal(seal, 8000, seed, 42)
    assert parsed is not None
    assert (parsed.batch_index, parsed.previous_chain, parsed.time_ns) == (50, b"e" * 32, 9)
    assert parse_seal(seal, 8000, seed, 41) is None
    at_zero = encode_seal(offset=0, seed=seed, first_index=42, last_index=50, time_ns=9, chain=b"e" * 32)
    assert list(scan(reader(at_zero), 0, 120, seed=seed, index=50, chain=b"e" * 32)) == []


def test_sidecars_are_taken_for_exactly_their_segment() -> None:
    """Another first index, count or link, or one flipped byte, makes a sidecar worthless."""
    offsets = array("Q", [4096, 5000, 2**33])
    raw = encode_index(7, offsets, b"c" * 32)
    assert decode_index(raw, 7, 3, b"c" * 32) == offsets
    assert decode_index(raw, 8, 3, b"c" * 32) is None
    assert decode_index(raw, 7, 2, b"c" * 32) is None
    assert decode_index(raw, 7, 3, b"d" * 32) is None
    for at in range(len(raw)):
        assert decode_index(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :], 7, 3, b"c" * 32) is None


def test_the_last_byte_that_is_not_zero_is_found() -> None:
    """Over chunk borders, at both ends, and when there is none."""
    size = 3 * 2**20 + 5
    for at in (0, 2**20 - 1, 2**20, 3 * 2**20 + 4):
        data = bytearray(size)
        data[at] = 1
        assert last_nonzero(reader(bytes(data)), 0, size) == at + 1
    assert last_nonzero(reader(bytes(size)), 10, size) == 10
