"""The peer codec under any split, any garbage and any damage."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Sequence

import pytest
from crc32c import crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from space._errors import UsageError
from space.replication import wire
from space.replication.wire import Blob, Frame, FrameReader, Hello, Lane, WireError
from space.wal.disk import Buffer

U64 = st.integers(0, (1 << 64) - 1)
I64 = st.integers(-(1 << 63), (1 << 63) - 1)
DATA = st.one_of(
    st.binary(max_size=200),
    st.integers(0, 200_000).map(lambda size: b"\x5a" * size),  # around the buffer and the joining size
)
BODY = st.recursive(
    st.none() | st.booleans() | I64 | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
BLOB = st.builds(Blob, U64, I64, st.binary(max_size=100), st.lists(DATA, max_size=3))
LISTS = st.lists(DATA, max_size=4)

RAFT = st.builds(wire.encode_raft, st.integers(0, (1 << 32) - 1), DATA, st.lists(BLOB, max_size=4))
REQUEST = st.builds(wire.encode_request, U64, st.sampled_from(["a", "ship.next", "x" * 64]), BODY, LISTS)
RESPONSE = st.builds(wire.encode_response, U64, BODY, LISTS)
FAILURE = st.builds(
    lambda number, text: wire.encode_failure(number, UsageError(text)), U64, st.text(max_size=99)
)
HELLO = st.builds(
    lambda cluster, node, lane: wire.encode_hello(Hello(cluster, node, lane, "localhost", 1)),
    st.binary(min_size=16, max_size=16),
    U64,
    st.sampled_from(Lane),
)
FRAME = st.one_of(
    RAFT, REQUEST, RESPONSE, FAILURE, HELLO, U64.map(wire.encode_ping), U64.map(wire.encode_pong)
)
STREAM = st.lists(FRAME, min_size=1, max_size=4).map(
    lambda frames: b"".join(b"".join(each) for each in frames)
)
SPLIT = st.lists(st.integers(1, 100_000) | st.integers(1, 40), min_size=1, max_size=50)

several = settings(
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
)


def read(data: bytes, split: Sequence[int], *, admit: bool = True) -> list[Frame]:
    """The messages in bytes that come in pieces of these sizes, over and over."""
    reader = FrameReader()
    if admit:
        reader.admit()
    found: list[Frame] = []
    at = turn = 0
    while at < len(data):
        buffer = reader.get_buffer(-1)
        count = min(len(buffer), len(data) - at, split[turn % len(split)])
        buffer[:count] = data[at : at + count]
        del buffer
        at, turn = at + count, turn + 1
        reader.buffer_updated(count)
        while (frame := reader.next_frame()) is not None:
            found.append(frame)
    return found


def again(frame: Frame) -> list[Buffer]:
    """The frame a message came from."""
    match frame:
        case wire.Raft():
            return wire.encode_raft(frame.group, frame.message, frame.blobs)
        case wire.Request():
            return wire.encode_request(frame.id, frame.method, frame.body, frame.attachments)
        case wire.Response():
            return wire.encode_response(frame.id, frame.body, frame.attachments)
        case wire.Failure():
            return wire.encode_failure(frame.id, frame.error)
        case Hello():
            return wire.encode_hello(frame)
        case wire.Goodbye():
            return wire.encode_goodbye(frame)
        case wire.Ping():
            return wire.encode_ping(frame.token)
        case wire.Pong():
            return wire.encode_pong(frame.token)


@several
@given(STREAM, SPLIT)
def test_any_split_gives_the_same_messages(data: bytes, split: list[int]) -> None:
    """However the bytes of a stream come, its messages are the same, and encode to the same bytes."""
    assert b"".join(b"".join(again(frame)) for frame in read(data, split)) == data


@several
@given(st.binary(max_size=500), SPLIT, st.booleans())
def test_garbage_is_refused_or_waited_for(data: bytes, split: list[int], admit: bool) -> None:
    """Bytes of any kind are an error of the peer's, or the beginning of something."""
    with contextlib.suppress(WireError):
        assert read(data, split, admit=admit) == []


@several
@given(STREAM, SPLIT, st.data())
def test_damage_is_noticed(data: bytes, split: list[int], draw: st.DataObject) -> None:
    """Whatever bit of a stream is flipped, the reader says so."""
    at = draw.draw(st.integers(0, len(data) - 1))
    damaged = bytearray(data)
    damaged[at] ^= 1 << draw.draw(st.integers(0, 7))
    with pytest.raises(WireError):
        read(bytes(damaged), split)


@several
@given(STREAM, st.data(), SPLIT)
def test_a_cut_stream_gives_what_was_whole(data: bytes, draw: st.DataObject, split: list[int]) -> None:
    """The messages of a truncated stream are the first ones of the whole, and there is no error."""
    cut = draw.draw(st.integers(0, len(data)))
    got = b"".join(b"".join(again(frame)) for frame in read(data[:cut], split))
    assert data.startswith(got)
    assert len(got) <= cut


@several
@given(
    st.integers(0, 9),
    st.integers(0, 3),
    *[st.one_of(st.integers(0, 100), st.integers(0, (1 << 32) - 1)) for _ in range(3)],
    st.binary(max_size=300),
    SPLIT,
    st.booleans(),
)
def test_sealed_nonsense_is_refused(
    kind: int,
    flags: int,
    head: int,
    attachments: int,
    attached: int,
    body: bytes,
    split: list[int],
    admit: bool,
) -> None:
    """Headers with right CRCs and any fields raise the one error or wait, in bounded memory."""
    fields = wire.HEADER.pack(wire.MAGIC, 1, kind, flags, head, attachments, attached, crc32c(body), 0)
    raw = fields[: wire.HEADER_CRC_OFFSET]
    data = raw + crc32c(raw).to_bytes(4, "little") + body
    tracemalloc.start()
    try:
        with contextlib.suppress(WireError):
            read(data, split, admit=admit)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < (6 << 20)  # what an announced piece gets at once, and the buffer


@several
@given(
    st.sampled_from(wire.Kind), st.binary(max_size=300), st.lists(st.binary(max_size=40), max_size=3), SPLIT
)
def test_bodies_of_any_kind_are_messages_or_refused(
    kind: wire.Kind, head: bytes, attachments: list[bytes], split: list[int]
) -> None:
    """A frame whose checksums are right may hold anything: a message comes out, or the one error."""
    frame = wire._frame(kind, head, [(each,) for each in attachments])
    try:
        (got,) = read(b"".join(frame), split)
    except WireError:
        return
    b"".join(again(got))
