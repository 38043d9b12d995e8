"""Frames between nodes, as bytes."""

from __future__ import annotations

import struct
import tracemalloc
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import pytest
from crc32c import crc32c

from space._errors import ConflictError, SpaceError, Status, UsageError
from space.replication import wire
from space.replication.wire import (
    Blob,
    Failure,
    Frame,
    FrameReader,
    Goodbye,
    Hello,
    Lane,
    Ping,
    Pong,
    Raft,
    Reason,
    Request,
    Response,
    WireError,
)
from space.wal.disk import Buffer

GOLDEN: Final = Path(__file__).parents[1] / "golden" / "replication_v1.txt"
CLUSTER: Final = bytes(range(16))
SMALL: Final = b"small"
LARGE: Final = bytes(range(256)) * 1024  # larger than the reader's buffer
HUGE: Final = bytes(9 << 20)  # larger than what an announced piece gets at once

HELLO: Final = Hello(CLUSTER, 3, Lane.LOG, "node3.example", 7070)
FRAMES: Final[dict[str, tuple[list[Buffer], Frame]]] = {
    "hello": (wire.encode_hello(HELLO), HELLO),
    "goodbye": (wire.encode_goodbye(Goodbye(Reason.CLUSTER, "no")), Goodbye(Reason.CLUSTER, "no")),
    "raft": (wire.encode_raft(7, b"vote"), Raft(7, b"vote", [])),
    "append": (
        wire.encode_raft(7, b"append", [Blob(4, -5, b"meta", [b"pay", b"load"]), Blob(5, 6, b"", [])]),
        Raft(7, b"append", [Blob(4, -5, b"meta", [b"payload"]), Blob(5, 6, b"", [])]),
    ),
    "request": (
        wire.encode_request(1, "propose", {"a": [1, b"\xff", None, "\udcff"]}, [b"", b"one"]),
        Request(1, "propose", {"a": [1, b"\xff", None, "\udcff"]}, [b"", b"one"]),
    ),
    "response": (wire.encode_response(1, "done", [b"two"]), Response(1, "done", [b"two"])),
    "failure": (
        wire.encode_failure(1, ConflictError("it is there", hint="look")),
        Failure(1, ConflictError("it is there", hint="look")),
    ),
    "ping": (wire.encode_ping(9), Ping(9)),
    "pong": (wire.encode_pong(9), Pong(9)),
}


def joined(frame: Iterable[Buffer]) -> bytes:
    """The bytes of a frame."""
    return b"".join(frame)


def plain(frame: Frame | None) -> object:
    """A message such that equal ones compare equal, wherever their bytes are."""
    if isinstance(frame, Raft):
        blobs = [(blob.index, blob.time_ns, blob.metadata, b"".join(blob.payload)) for blob in frame.blobs]
        return frame.group, frame.message, blobs
    if isinstance(frame, Failure):
        return frame.id, type(frame.error), str(frame.error), frame.error.status
    if isinstance(frame, Request | Response):
        return type(frame), frame.id, frame.body, [bytes(each) for each in frame.attachments]
    return frame


def admitted() -> FrameReader:
    """A reader that takes every kind of frame."""
    reader = FrameReader()
    reader.admit()
    return reader


def feed(reader: FrameReader, data: bytes, piece: int = 1 << 30) -> list[Frame]:
    """The messages in bytes that come ``piece`` at a time."""
    found: list[Frame] = []
    at = 0
    while at < len(data):
        buffer = reader.get_buffer(-1)
        count = min(len(buffer), len(data) - at, piece)
        buffer[:count] = data[at : at + count]
        del buffer
        at += count
        reader.buffer_updated(count)
        while (frame := reader.next_frame()) is not None:
            found.append(frame)
    return found


def header(**changes: Any) -> bytes:
    """A header with a right CRC and these fields."""
    fields = {"magic": wire.MAGIC, "version": 1, "kind": 3, "flags": 0}
    fields |= {"head": 0, "attachments": 0, "attached": 0, "crc": crc32c(b"")}
    raw = struct.pack("<4sBBHIIII", *(fields | changes).values())
    return raw + struct.pack("<I", crc32c(raw))


def sealed(kind: wire.Kind, head: bytes, attachments: int = 0, attached: bytes = b"") -> bytes:
    """A frame with right CRCs around anything."""
    size = len(attached) - 4 * attachments
    crc = crc32c(head + attached)
    return (
        header(kind=kind, head=len(head), attachments=attachments, attached=size, crc=crc) + head + attached
    )


@pytest.mark.parametrize("name", FRAMES)
def test_each_message_survives(name: str) -> None:
    """Every kind of message comes out as it went in."""
    encoded, expected = FRAMES[name]
    (got,) = feed(admitted(), joined(encoded))
    assert plain(got) == plain(expected)


def test_golden_bytes() -> None:
    """The bytes of version 1 are what they were: nodes of two releases talk during an upgrade."""
    lines = [f"{name} {joined(encoded).hex()}" for name, (encoded, _) in FRAMES.items()]
    assert lines == GOLDEN.read_text().splitlines()


@pytest.mark.parametrize("piece", [1 << 30, 100_000, 4097])
def test_large_pieces_arrive_whole(piece: int) -> None:
    """Blobs and attachments of every size survive, small ones and frames after them too."""
    blobs = [
        Blob(at, at, b"m" * at, [data, SMALL]) for at, data in enumerate([LARGE, b"", HUGE, SMALL, LARGE])
    ]
    frames = [wire.encode_raft(1, b"x", blobs), wire.encode_request(1, "ship", 0, [LARGE, b"", HUGE])]
    got = feed(admitted(), joined(frames[0] + frames[1] + wire.encode_ping(1)), piece)
    expected: list[Frame] = [Raft(1, b"x", blobs), Request(1, "ship", 0, [LARGE, b"", HUGE]), Ping(1)]
    assert [plain(each) for each in got] == [plain(each) for each in expected]


def test_large_payload_is_not_copied_by_the_sender() -> None:
    """The frame of a large batch refers to the caller's payload."""
    assert any(buffer is LARGE for buffer in wire.encode_raft(1, b"x", [Blob(1, 1, b"", [LARGE])]))


def test_wide_memory_counts_bytes() -> None:
    """A view of wider items is sent as its bytes."""
    wide = memoryview(array("Q", range(10)))
    (got,) = feed(admitted(), joined(wire.encode_response(1, None, [wide])))
    assert isinstance(got, Response)
    assert bytes(got.attachments[0]) == wide.tobytes()


def test_largest_batch_fits() -> None:
    """A batch with as much metadata and payload as the sequencer makes fits into one frame."""
    payload = memoryview(bytes(32 << 20))
    frame = wire.encode_raft(1, b"x" * 100, [Blob(1, 1, bytes(64 << 20), [payload, bytes(4 << 20)])])
    assert sum(map(len, frame)) <= wire.FRAME_BYTES_MAX + wire.HEADER_BYTES


@pytest.mark.parametrize(
    "make",
    [
        lambda: wire.encode_raft(1, b"", [Blob(1, 1, b"", [bytes(1 << 20)] * 129)]),
        lambda: wire.encode_raft(1, b"", [Blob(1, 1, b"")] * (wire.BLOBS_MAX + 1)),
        lambda: wire.encode_raft(1, bytes(wire.HEAD_BYTES_MAX)),
        lambda: wire.encode_request(1, "", None),
        lambda: wire.encode_request(1, "x" * 65, None),
        lambda: wire.encode_request(1, "x", object()),
        lambda: wire.encode_request(1, "x", 1 << 64),
        lambda: wire.encode_response(1, None, [b""] * (wire.ATTACHMENTS_MAX + 1)),
        lambda: wire.encode_hello(Hello(CLUSTER, 1, Lane.LOG, "x" * 256, 1)),
    ],
)
def test_what_cannot_be_sent_is_refused_here(make: Any) -> None:
    """A message the other side would refuse is the caller's mistake, and says so."""
    with pytest.raises(UsageError):
        make()


REFUSED: Final = {
    "http": b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n",
    "damaged header": header()[:-1] + b"\0",
    "unknown kind": header(kind=99),
    "kind 0": header(kind=0),
    "flags": header(flags=1),
    "long head": header(head=wire.HEAD_BYTES_MAX + 1),
    "long frame": header(attachments=1, attached=wire.FRAME_BYTES_MAX),
    "many blobs": header(attachments=wire.BLOBS_MAX + 1),
    "many attachments": header(kind=4, attachments=wire.ATTACHMENTS_MAX + 1),
    "attachments of a ping": header(kind=7, attachments=1),
    "attached to nothing": header(attached=1),
    "damaged body": joined(wire.encode_ping(1))[:-1] + b"\1",
    "damaged attachment": joined(wire.encode_raft(1, b"", [Blob(1, 1, b"", [LARGE])]))[:-1] + b"\1",
    "lengths that do not add up": sealed(wire.Kind.RESPONSE, bytes(9), 1, struct.pack("<I", 7) + b"four"),
    "short hello": sealed(wire.Kind.HELLO, b"short"),
    "hello without its host": sealed(wire.Kind.HELLO, bytes(31) + b"\5"),
    "hello on no lane": sealed(wire.Kind.HELLO, bytes(28) + b"\7" + bytes(3)),
    "short goodbye": sealed(wire.Kind.GOODBYE, b"\0"),
    "long goodbye": sealed(wire.Kind.GOODBYE, bytes(2 + wire.TEXT_BYTES_MAX + 1)),
    "short raft": sealed(wire.Kind.RAFT, b"short"),
    "batches that are not there": sealed(wire.Kind.RAFT, struct.pack("<II", 1, 1) + bytes(20)),
    "batches not announced": sealed(wire.Kind.RAFT, bytes(8), 1, bytes(4)),
    "metadata longer than its batch": sealed(
        wire.Kind.RAFT, struct.pack("<IIQqI", 1, 1, 1, 1, 2), 1, struct.pack("<I", 1) + b"m"
    ),
    "short request": sealed(wire.Kind.REQUEST, b"short"),
    "request of no method": sealed(wire.Kind.REQUEST, bytes(9)),
    "request of half a method": sealed(wire.Kind.REQUEST, bytes(8) + b"\5ship"),
    "request of a method not ASCII": sealed(wire.Kind.REQUEST, bytes(8) + b"\1\xff\xc0"),
    "request without a body": sealed(wire.Kind.REQUEST, bytes(8) + b"\1x"),
    "body and more": sealed(wire.Kind.RESPONSE, bytes(8) + b"\xc0\xc0"),
    "deep body": sealed(wire.Kind.RESPONSE, bytes(8) + b"\x91" * 100_000 + b"\xc0"),
    "body with a length it lacks": sealed(wire.Kind.RESPONSE, bytes(8) + b"\xdd\xff\xff\xff\xff"),
    "short response": sealed(wire.Kind.RESPONSE, b"short"),
    "failure that is none": sealed(wire.Kind.FAILURE, bytes(8) + b"\xc0"),
    "short ping": sealed(wire.Kind.PING, b"short"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_malformed_frames_are_refused(name: str) -> None:
    """Bytes that are not this protocol raise the one error, in one piece or byte by byte."""
    for piece in (1 << 30, 1):
        with pytest.raises(WireError):
            feed(admitted(), REFUSED[name], piece if len(REFUSED[name]) < 1000 else 1 << 30)


@pytest.mark.parametrize("name", ["raft", "append", "request", "response", "failure", "ping", "pong"])
def test_a_stranger_may_only_introduce_itself(name: str) -> None:
    """Before it is admitted, nothing but an introduction or a goodbye is read of a peer."""
    with pytest.raises(WireError, match="before an introduction"):
        feed(FrameReader(), joined(FRAMES[name][0]))
    assert feed(FrameReader(), joined(FRAMES["hello"][0])) == [HELLO]


def test_a_stranger_gets_little_memory() -> None:
    """What an introduction announces is refused beyond 4 KiB, and no buffer is larger."""
    reader = FrameReader()
    assert len(reader.get_buffer(1 << 20)) <= wire.STRANGER_BYTES_MAX + wire.HEADER_BYTES
    with pytest.raises(WireError):
        feed(reader, header(kind=1, head=wire.STRANGER_BYTES_MAX + 1))


def test_memory_follows_what_came() -> None:
    """A frame that announces 128 MiB and sends little gets little more than it sent."""
    size = wire.FRAME_BYTES_MAX - 12
    start = header(head=8 + 20, attachments=1, attached=size - 28) + bytes(28) + struct.pack("<I", size - 28)
    reader = admitted()
    tracemalloc.start()
    try:
        feed(reader, start + bytes(10 << 20), 1 << 16)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 42 << 20  # the input twice, the piece at twice what came, and growing it by as much


def test_later_introductions_are_read() -> None:
    """A longer introduction of later versions is understood as far as it is known, so it can be answered."""
    raw = joined(wire.encode_hello(Hello(CLUSTER, 3, Lane.LOG, versions=(2, 9))))[wire.HEADER_BYTES :]
    (hello,) = feed(FrameReader(), sealed(wire.Kind.HELLO, raw + b"and more"))
    assert isinstance(hello, Hello)
    with pytest.raises(WireError) as caught:
        wire.agree(hello.versions)
    assert caught.value.reason is Reason.VERSION


def test_frames_of_the_future_are_told_why() -> None:
    """A frame of an unknown layout is refused with the reason it is given on the wire."""
    with pytest.raises(WireError) as caught:
        feed(admitted(), header(version=2))
    assert caught.value.reason is Reason.VERSION


@pytest.mark.parametrize(
    "theirs, ours, agreed",
    [((1, 1), (1, 1), 1), ((1, 3), (2, 5), 3), ((4, 9), (1, 4), 4), ((2, 2), (1, 3), 2)],
)
def test_the_newest_common_version_is_spoken(
    theirs: tuple[int, int], ours: tuple[int, int], agreed: int
) -> None:
    """Both sides agree on the newest version both know."""
    assert wire.agree(theirs, ours) == wire.agree(ours, theirs) == agreed


def test_goodbyes_fit_a_log() -> None:
    """An unknown reason is one without a name, and text that would break a log line does not."""
    (got,) = feed(admitted(), sealed(wire.Kind.GOODBYE, b"\xff\xff" + b"a\nb\x1b[31m\xff"))
    assert got == Goodbye(Reason.OTHER, "a?b?[31m\N{REPLACEMENT CHARACTER}")
    (cut,) = feed(admitted(), joined(wire.encode_goodbye(Goodbye(Reason.BUSY, "long" * 1000))))
    assert isinstance(cut, Goodbye)
    assert len(cut.text) == wire.TEXT_BYTES_MAX


def test_errors_with_any_message_can_be_sent() -> None:
    """An error about a name that is no text arrives, with its status."""
    error = ConflictError("no \ud800 here", status=Status.STALE)
    (got,) = feed(admitted(), joined(wire.encode_failure(1, error)))
    assert isinstance(got, Failure)
    assert isinstance(got.error, SpaceError)
    assert got.error.status is Status.STALE
