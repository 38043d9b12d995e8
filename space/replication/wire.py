"""What nodes say to each other, as bytes: frames in, messages out, and back.  No sockets, no clock.

A frame is a header, a head whose layout its kind decides, and *attachments*: raw bytes that are neither packed
nor copied on the way (``docs/formats/replication.md``).  Rules:

* Nothing is believed before it is checked: a header has a CRC of its own, so no damaged or hostile length is
  acted upon; the body has one too, of head and attachments alike.  TLS would make the second redundant, but a
  cluster may run without, a batch damaged on the way would be stored as if it were right, and at 20 GB/s
  (measured, one core) it costs a twentieth of what reading the bytes costs.
* Lengths are bounded (constants below).  A stranger may send :data:`STRANGER_BYTES_MAX` and only introduce
  itself; from a node that was admitted, memory follows the bytes that came, not the length that was announced.
* :class:`WireError` is the only error bytes from outside raise.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, final

import attrs
import msgpack
from crc32c import crc32c

from space._errors import ErrorKind, SpaceError, Status, UsageError, error_document, error_of
from space.events.fast import fast_frozen
from space.wal.disk import Buffer

MAGIC: Final = b"\xb5Net"
FRAME_VERSION: Final = 1
"""Of the frame layout; that of the conversation is agreed upon in :class:`Hello`."""
VERSIONS: Final = (1, 1)
"""Oldest and newest version of the conversation this program speaks."""

FRAME_BYTES_MAX: Final = 128 << 20
"""A batch has at most 64 MiB of metadata and 32 MiB of payload plus that of one request; and its head."""
HEAD_BYTES_MAX: Final = 4 << 20
"""65,536 blobs at 20 bytes, and as many entries in the Raft message beside them, take 3 MiB."""
BLOBS_MAX: Final = 65_536
"""Entries a replica is sent by message at all; further back it is sent the log."""
ATTACHMENTS_MAX: Final = 4096
"""Of a request or response: pieces of a segment or a state, each far larger than its 4 bytes of table."""
STRANGER_BYTES_MAX: Final = 4096
"""Body of the first frame of a connection: an introduction takes some 300 bytes."""
TEXT_BYTES_MAX: Final = 512
"""Of a goodbye: one line in a log."""
ADDRESS_BYTES_MAX: Final = 255
"""A host name (RFC 1035 §2.3.4)."""
METHOD_BYTES_MAX: Final = 64
JOIN_BYTES: Final = 32 << 10
"""Below this one copy is cheaper than one more buffer for everybody on the way."""
SMALL_BYTES: Final = 2 << 10
MANY_BYTES: Final = 1 << 20
"""So it is for many buffers, if they are small on average and the copy is not large."""
BUFFER_BYTES: Final = 64 << 10
"""A few hundred small frames a read; large pieces are read to where they stay."""
GROWTH_BYTES: Final = 4 << 20
"""Memory an announced piece gets at once; beyond it, as much again as has come."""

HEADER: Final = struct.Struct(
    "<4sBBHIIIII"
)  # magic, version, kind, flags, head, attachments, their bytes, CRCs
HEADER_BYTES: Final = 28
HEADER_CRC_OFFSET: Final = 24
_CRC: Final = struct.Struct("<I")
_UNSEALED: Final = struct.Struct("<4sBBHIIII")
_HELLO: Final = struct.Struct(
    "<HH16sQBHB"
)  # oldest, newest version, cluster, node, lane, port, bytes of the host
_GOODBYE: Final = struct.Struct("<H")
_RAFT: Final = struct.Struct("<II")  # group, blobs
_BLOB: Final = struct.Struct("<QqI")  # index, time, bytes of metadata
_REQUEST: Final = struct.Struct("<QB")  # id, bytes of the method
_NUMBER: Final = struct.Struct("<Q")  # an id, or the token of a ping

assert HEADER.size == HEADER_BYTES
assert _UNSEALED.size == HEADER_CRC_OFFSET
assert HEADER_CRC_OFFSET + _CRC.size == HEADER_BYTES
assert BLOBS_MAX * 2 * _BLOB.size < HEAD_BYTES_MAX

CLIENT: Final = 0
"""The node id of somebody who is no node: an operator's program.  It may ask, and takes no part in Raft."""


class Kind(enum.IntEnum):
    """What a frame is; the numbers are never reused."""

    HELLO = 1
    GOODBYE = 2
    RAFT = 3
    REQUEST = 4
    RESPONSE = 5
    FAILURE = 6
    PING = 7
    PONG = 8


class Lane(enum.IntEnum):
    """What a connection is for: a lane never waits for another one."""

    URGENT = 0  # heartbeats, votes, acknowledgements, ReadIndex
    LOG = 1  # append messages and the batches they carry
    BULK = 2  # requests: forwarded commands, shipping


class Reason(enum.IntEnum):
    """Why a connection was ended; the numbers are never reused."""

    OTHER = 0  # also every number this program does not know
    PROTOCOL = 1  # bytes that are not this protocol
    VERSION = 2
    CLUSTER = 3
    NODE = 4  # not the node that was called, or its own number
    CERTIFICATE = 5  # the certificate is not that of the node it says it is
    BUSY = 6
    SILENT = 7
    REPLACED = 8  # the same node has opened this lane anew
    CLOSING = 9


class WireError(SpaceError):
    """Bytes of a peer that are not this protocol, or not for us; the connection ends.

    Attributes:
        reason: what the peer is told.
    """

    kind = ErrorKind.CORRUPT
    default_status = Status.CORRUPT

    def __init__(self, message: str, *, reason: Reason = Reason.PROTOCOL, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


# --- messages --------------------------------------------------------------------------------------


@final
@attrs.frozen
class Hello:
    """The first frame in either direction: who is there, and what for.

    Attributes:
        cluster: its id, 16 bytes.
        node: the sender's number, or :data:`CLIENT`.
        lane: what the connection is for; the side that was called repeats it.
        host, port: where the sender can be reached; empty and 0 if nowhere.
        versions: oldest and newest version of the conversation it speaks.
    """

    cluster: bytes
    node: int
    lane: Lane
    host: str = ""
    port: int = 0
    versions: tuple[int, int] = VERSIONS


@final
@attrs.frozen
class Goodbye:
    """The last frame of a connection, when there was time for one."""

    reason: Reason
    text: str


@final
@fast_frozen
class Blob:
    """The bytes of one log entry, carried beside the Raft message that appends it.

    Attributes:
        index: of the entry, which is the position of the batch.
        time_ns: of the batch, nanoseconds since 1970.
        metadata: of the batch.
        payload: of the batch, to be taken as one; at most one buffer after it was received.
    """

    index: int
    time_ns: int
    metadata: bytes
    payload: Sequence[Buffer] = ()


@final
@fast_frozen
class Raft:
    """A message of the consensus engine of one group.  Arriving twice or late does no harm."""

    group: int
    message: bytes
    blobs: list[Blob]


@final
@attrs.frozen
class Request:
    """A question; ids increase along a connection, so that a replayed frame shows."""

    id: int
    method: str
    body: Any
    attachments: list[Buffer]


@final
@attrs.frozen
class Response:
    """The answer to the request with that id."""

    id: int
    body: Any
    attachments: list[Buffer]


@final
@attrs.frozen
class Failure:
    """The answer to the request with that id is an error."""

    id: int
    error: SpaceError


@final
@attrs.frozen
class Ping:
    """Are you there?  The token comes back."""

    token: int


@final
@attrs.frozen
class Pong:
    """The answer to the ping with that token."""

    token: int


Frame = Hello | Goodbye | Raft | Request | Response | Failure | Ping | Pong


def agree(theirs: tuple[int, int], ours: tuple[int, int] = VERSIONS) -> int:
    """The newest version of the conversation both sides speak.

    Raises:
        WireError: there is none.
    """
    newest = min(theirs[1], ours[1])
    if newest < max(theirs[0], ours[0]):
        raise WireError(
            f"protocol versions {theirs[0]} to {theirs[1]} are spoken there, {ours[0]} to {ours[1]} here",
            reason=Reason.VERSION,
            hint="upgrade the older node one release at a time",
        )
    return newest


# --- messages to bytes -----------------------------------------------------------------------------


def encode_hello(hello: Hello) -> list[Buffer]:
    """The frame of an introduction.

    Raises:
        UsageError: the host cannot be sent.
    """
    host = hello.host.encode("ascii", "replace")
    if len(host) > ADDRESS_BYTES_MAX:
        raise UsageError(f"a host name of {len(host)} bytes; the limit is {ADDRESS_BYTES_MAX}")
    head = _HELLO.pack(*hello.versions, hello.cluster, hello.node, hello.lane, hello.port, len(host)) + host
    return _frame(Kind.HELLO, head)


def encode_goodbye(goodbye: Goodbye) -> list[Buffer]:
    """The frame of a goodbye; the text is cut to one line of a log."""
    text = goodbye.text.encode("utf-8", "replace")[:TEXT_BYTES_MAX]
    return _frame(Kind.GOODBYE, _GOODBYE.pack(goodbye.reason) + text)


def encode_raft(group: int, message: bytes, blobs: Sequence[Blob] = ()) -> list[Buffer]:
    """The frame of a Raft message; the payload of its blobs is referred to, not copied, unless it is small.

    Raises:
        UsageError: it is larger than a frame may be.
    """
    if not blobs:
        return _frame(Kind.RAFT, _RAFT.pack(group, 0) + message)
    if len(blobs) > BLOBS_MAX:
        raise UsageError(f"a message with {len(blobs)} batches; the limit is {BLOBS_MAX}")
    heads = [_BLOB.pack(blob.index, blob.time_ns, len(blob.metadata)) for blob in blobs]
    head = b"".join((_RAFT.pack(group, len(blobs)), *heads, message))
    return _frame(Kind.RAFT, head, [(blob.metadata, *blob.payload) for blob in blobs])


def encode_request(number: int, method: str, body: Any, attachments: Sequence[Buffer] = ()) -> list[Buffer]:
    """The frame of a request.

    Raises:
        UsageError: the body cannot be packed, the name of the method or the whole is too long.
    """
    name = method.encode("ascii", "replace")
    if not 0 < len(name) <= METHOD_BYTES_MAX:
        raise UsageError(f"the name of a method has 1 to {METHOD_BYTES_MAX} characters: {method!r:.80}")
    return _frame(
        Kind.REQUEST,
        _REQUEST.pack(number, len(name)) + name + _pack(body),
        _attached(attachments),
    )


def encode_response(number: int, body: Any, attachments: Sequence[Buffer] = ()) -> list[Buffer]:
    """The frame of an answer.

    Raises:
        UsageError: the body cannot be packed, or the whole is too long.
    """
    return _frame(Kind.RESPONSE, _NUMBER.pack(number) + _pack(body), _attached(attachments))


def encode_failure(number: int, error: SpaceError) -> list[Buffer]:
    """The frame of an answer that is an error, whatever is in its message."""
    try:
        packed = _pack(error_document(error))
    except UsageError:  # a lone surrogate in a name
        packed = _pack(error_document(SpaceError(ascii(str(error)), status=error.status)))
    return _frame(Kind.FAILURE, _NUMBER.pack(number) + packed)


def encode_ping(token: int) -> list[Buffer]:
    """The frame of a ping."""
    return _frame(Kind.PING, _NUMBER.pack(token))


def encode_pong(token: int) -> list[Buffer]:
    """The frame of its answer."""
    return _frame(Kind.PONG, _NUMBER.pack(token))


def _pack(body: Any) -> bytes:
    try:
        packed: bytes = msgpack.packb(body, unicode_errors="surrogateescape")
    except (OverflowError, ValueError, TypeError) as error:
        raise UsageError(f"cannot be sent to another node: {error}") from None
    return packed


def _attached(buffers: Sequence[Buffer]) -> list[tuple[Buffer]]:
    if len(buffers) > ATTACHMENTS_MAX:
        raise UsageError(f"{len(buffers)} attachments; the limit is {ATTACHMENTS_MAX}")
    return [(buffer,) for buffer in buffers]


def _frame(kind: Kind, head: bytes, attachments: Sequence[Sequence[Buffer]] = ()) -> list[Buffer]:
    """A frame as buffers of bytes; the buffers of one attachment arrive as one."""
    if len(head) > HEAD_BYTES_MAX:
        raise UsageError(f"a message with a head of {len(head)} bytes; the limit is {HEAD_BYTES_MAX}")
    if not attachments:
        return [_header(kind, len(head), 0, 0, crc32c(head)) + head]
    flat = [[_as_bytes(buffer) for buffer in buffers] for buffers in attachments]
    lengths = [sum(map(len, buffers)) for buffers in flat]
    total = sum(lengths)
    if len(head) + 4 * len(lengths) + total > FRAME_BYTES_MAX:
        raise UsageError(
            f"a message with {total} bytes of attachments; a frame has {FRAME_BYTES_MAX} at most"
        )
    front = head + struct.pack(f"<{len(lengths)}I", *lengths)
    rest = [buffer for buffers in flat for buffer in buffers if buffer]
    if total <= max(JOIN_BYTES, min(MANY_BYTES, len(rest) * SMALL_BYTES)):
        front, rest = b"".join((front, *rest)), []
    crc = crc32c(front)
    for buffer in rest:
        crc = crc32c(buffer, crc)
    return [_header(kind, len(head), len(lengths), total, crc) + front, *rest]


def _as_bytes(buffer: Buffer) -> Buffer:
    """The same memory, such that ``len`` counts bytes."""
    if isinstance(buffer, memoryview) and (buffer.ndim != 1 or buffer.itemsize != 1):
        return buffer.cast("B")
    return buffer


def _header(kind: int, head: int, attachments: int, attached: int, crc: int) -> bytes:
    unsealed = _UNSEALED.pack(MAGIC, FRAME_VERSION, kind, 0, head, attachments, attached, crc)
    return unsealed + _CRC.pack(crc32c(unsealed))


# --- bytes to messages -----------------------------------------------------------------------------


class _Header(NamedTuple):
    kind: int
    head: int
    attachments: int
    attached: int
    crc: int


_DAMAGED: Final = "the body of a frame is damaged"


def _attachments_max(kind: int) -> int:
    if kind == Kind.RAFT:
        return BLOBS_MAX
    return ATTACHMENTS_MAX if kind in {Kind.REQUEST, Kind.RESPONSE} else 0


def _parse_header(raw: memoryview, *, admitted: bool) -> _Header:
    magic, version, kind, flags, head, attachments, attached, crc, header_crc = HEADER.unpack(raw)
    if magic != MAGIC:
        raise WireError(
            "bytes that are not a frame of this protocol", hint="does something else use that port?"
        )
    if crc32c(raw[:HEADER_CRC_OFFSET]) != header_crc:
        raise WireError("the header of a frame is damaged")
    if version != FRAME_VERSION:
        raise WireError(
            f"a frame of version {version}; this program reads {FRAME_VERSION}",
            reason=Reason.VERSION,
            hint="upgrade the older node one release at a time",
        )
    if kind not in _DECODERS or flags:
        raise WireError(f"a frame of kind {kind} with flags {flags}; this program knows no such")
    if head > HEAD_BYTES_MAX or head + 4 * attachments + attached > FRAME_BYTES_MAX:
        raise WireError(f"a frame announces {head} + {attached} bytes: too much")
    if attachments and attachments > _attachments_max(kind):
        raise WireError(f"a frame of kind {kind} announces {attachments} attachments: too many")
    if attached and not attachments:
        raise WireError("a frame announces bytes of attachments and has none")
    if not admitted and (kind not in _INTRODUCTIONS or head > STRANGER_BYTES_MAX):
        raise WireError(f"a frame of kind {kind} and {head} bytes before an introduction")
    return _Header(kind, head, attachments, attached, crc)


class FrameReader:
    """Any split of the incoming bytes to messages.

    Bytes are put where :meth:`get_buffer` says (as :class:`asyncio.BufferedProtocol` does); a piece larger than
    half the buffer is read to memory of its own, which the message then refers to.  After every
    :meth:`buffer_updated`, :meth:`next_frame` has to be called until it gives nothing, or reading has to stop.
    """

    def __init__(self) -> None:
        self._admitted = False
        self._view = memoryview(bytearray(HEADER_BYTES + STRANGER_BYTES_MAX))
        self._start = 0
        self._end = 0
        self._header: _Header | None = None
        self._lengths: list[int] = []  # of the pieces of the frame: front, attachments
        self._pieces: list[Buffer] = []
        self._crc = 0
        self._large: bytearray | None = None  # the piece that is being read to its own memory
        self._filled = 0

    def admit(self) -> None:
        """From now on the peer is known: every kind of frame, of every size."""
        waiting = self._view[self._start : self._end]
        self._view = memoryview(bytearray(BUFFER_BYTES))
        self._view[: len(waiting)] = waiting
        self._start, self._end = 0, len(waiting)
        self._admitted = True

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._large is not None:
            if self._filled == len(self._large):
                missing = self._lengths[len(self._pieces)] - self._filled
                self._large.extend(bytes(min(missing, self._filled)))
            return memoryview(self._large)[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
        elif 2 * self._end > len(self._view):
            rest = self._end - self._start
            self._view[:rest] = self._view[self._start : self._end]
            self._start, self._end = 0, rest
        assert self._end < len(self._view), "frames are taken out before more is read"
        return self._view[self._end :]

    def buffer_updated(self, count: int) -> None:
        """So many bytes were put there."""
        if self._large is not None:
            self._filled += count
        else:
            self._end += count

    def next_frame(self) -> Frame | None:
        """The next message, or nothing until more bytes have come.

        Raises:
            WireError: what came is not this protocol; nothing more can be read from that connection.
        """
        header = self._header
        if header is None:
            start, there = self._start, self._end - self._start - HEADER_BYTES
            if there < 0:
                return None
            view = self._view[start : self._end]
            header = _parse_header(view[:HEADER_BYTES], admitted=self._admitted)
            self._start += HEADER_BYTES
            kind, head, attachments, _, crc = header
            if head <= there and not attachments:  # nearly every frame; the general way takes twice as long
                self._start += head
                body = bytes(view[HEADER_BYTES : HEADER_BYTES + head])
                if crc32c(body) != crc:
                    raise WireError(_DAMAGED)
                return _DECODERS[kind](body, [])
            self._header = header
            self._crc, self._pieces, self._lengths = 0, [], [head + 4 * attachments]
        if not self._gather(header):
            return None
        if self._crc != header.crc:
            raise WireError(_DAMAGED)
        self._header = None
        front, *attached = self._pieces
        self._pieces = []  # what the message does not keep is not kept here
        return _DECODERS[header.kind](bytes(front[: header.head]), attached)

    def _gather(self, header: _Header) -> bool:
        """Takes the pieces that have come; says whether they are all there."""
        while len(self._pieces) < len(self._lengths):
            piece = self._take(self._lengths[len(self._pieces)])
            if piece is None:
                return False
            self._crc = crc32c(piece, self._crc)
            self._pieces.append(piece)
            if len(self._pieces) == 1 and header.attachments:
                table = struct.unpack_from(f"<{header.attachments}I", piece, header.head)
                if sum(table) != header.attached:
                    raise WireError("the lengths of the attachments of a frame are not what it announces")
                self._lengths.extend(table)
        return True

    def _take(self, length: int) -> Buffer | None:
        """The next piece, if all of it has come."""
        if self._large is not None:
            return self._take_large(length)
        there = self._end - self._start
        if length <= there:
            piece = bytes(self._view[self._start : self._start + length])
            self._start += length
            return piece
        if 2 * length > len(self._view):
            self._large = bytearray(min(length, GROWTH_BYTES))
            self._large[:there] = self._view[self._start : self._end]
            self._filled = there
            self._start = self._end = 0
        return None

    def _take_large(self, length: int) -> Buffer | None:
        if self._large is None or self._filled < length:
            return None
        piece = memoryview(self._large).toreadonly()
        self._large = None
        return piece


def _unpack(raw: bytes) -> Any:
    try:
        return msgpack.unpackb(raw, unicode_errors="surrogateescape")
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"the body of a message is not msgpack: {error!s:.80}") from None


def _printable(raw: bytes) -> str:
    """Text of a stranger, fit for a line in a log."""
    text = raw.decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "?" for character in text)


def _decode_hello(head: bytes, _: list[Buffer]) -> Hello:
    if len(head) < _HELLO.size:
        raise WireError("an introduction is too short")
    # Later versions may add to it: only what is known is read, so that they can be told why they are refused.
    oldest, newest, cluster, node, lane, port, length = _HELLO.unpack_from(head)
    host = head[_HELLO.size : _HELLO.size + length]
    if oldest > newest or len(host) < length or lane not in Lane.__members__.values():
        raise WireError("an introduction makes no sense")
    return Hello(cluster, node, Lane(lane), _printable(host), port, (oldest, newest))


def _decode_goodbye(head: bytes, _: list[Buffer]) -> Goodbye:
    if not _GOODBYE.size <= len(head) <= _GOODBYE.size + TEXT_BYTES_MAX:
        raise WireError("a goodbye is too short or too long")
    (number,) = _GOODBYE.unpack_from(head)
    known = number in Reason.__members__.values()
    return Goodbye(Reason(number) if known else Reason.OTHER, _printable(head[_GOODBYE.size :]))


def _decode_raft(head: bytes, attachments: list[Buffer]) -> Raft:
    if len(head) < _RAFT.size:
        raise WireError("a Raft message is too short")
    group, count = _RAFT.unpack_from(head)
    if not count and not attachments:
        return Raft(group, head[_RAFT.size :], [])
    end = _RAFT.size + count * _BLOB.size
    if count != len(attachments) or len(head) < end:
        raise WireError(f"a Raft message announces {count} batches and carries {len(attachments)}")
    heads = _BLOB.iter_unpack(memoryview(head)[_RAFT.size : end])
    blobs = [_blob(fields, data) for fields, data in zip(heads, attachments, strict=True)]
    return Raft(group, head[end:], blobs)


def _blob(fields: tuple[int, int, int], data: Buffer) -> Blob:
    index, time_ns, metadata = fields
    if metadata > len(data):
        raise WireError("the metadata of a batch is longer than the batch")
    payload = memoryview(data)[metadata:]
    return Blob(index, time_ns, bytes(data[:metadata]), (payload,) if payload else ())


def _decode_request(head: bytes, attachments: list[Buffer]) -> Request:
    if len(head) < _REQUEST.size:
        raise WireError("a request is too short")
    number, length = _REQUEST.unpack_from(head)
    end = _REQUEST.size + length
    method = head[_REQUEST.size : end]
    if not 0 < length <= METHOD_BYTES_MAX or len(method) < length or not method.isascii():
        raise WireError("a request names no method")
    return Request(number, _printable(method), _unpack(head[end:]), attachments)


def _number(head: bytes) -> int:
    if len(head) < _NUMBER.size:
        raise WireError("a message lacks its number")
    number: int = _NUMBER.unpack_from(head)[0]
    return number


def _decode_response(head: bytes, attachments: list[Buffer]) -> Response:
    return Response(_number(head), _unpack(head[_NUMBER.size :]), attachments)


def _decode_failure(head: bytes, _: list[Buffer]) -> Failure:
    number, document = _number(head), _unpack(head[_NUMBER.size :])
    if not isinstance(document, dict):
        raise WireError("an error is not a document")
    return Failure(number, error_of(document))


def _decode_ping(head: bytes, _: list[Buffer]) -> Ping:
    return Ping(_number(head))


def _decode_pong(head: bytes, _: list[Buffer]) -> Pong:
    return Pong(_number(head))


_DECODERS: Final[dict[int, Callable[[bytes, list[Buffer]], Frame]]] = {
    Kind.HELLO: _decode_hello,
    Kind.GOODBYE: _decode_goodbye,
    Kind.RAFT: _decode_raft,
    Kind.REQUEST: _decode_request,
    Kind.RESPONSE: _decode_response,
    Kind.FAILURE: _decode_failure,
    Kind.PING: _decode_ping,
    Kind.PONG: _decode_pong,
}
_INTRODUCTIONS: Final = frozenset({int(Kind.HELLO), int(Kind.GOODBYE)})
assert set(_DECODERS) == set(Kind)
