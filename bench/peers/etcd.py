"""etcd as a peer: three members, and a client that costs as little of the machine as it can.

The client is the HTTP/2 and protobuf of one unary call and nothing else: requests are prepared bytes, an answer
counts when its message has come (a refusal has none, only trailers).  An etcd member answers a put when a
quorum has it in a write-ahead log that was fsynced.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import attrs

from bench.peers.load import ClosedLoop, Load, Measured, first_acknowledged, run
from bench.peers.programs import HOST, Program, find, free_ports, wait_for

PROGRAM: Final = "etcd"
_NODES: Final = 3
_QUOTA_BYTES: Final = 8 << 30
_REQUEST_BYTES_MAX: Final = 2 << 20
_CALL_SECONDS: Final = 10.0

# --- protobuf (protobuf.dev/programming-guides/encoding) ----------------------------------------------


def varint(value: int) -> bytes:
    """A base-128 number."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, value: bytes | int) -> bytes:
    """A field with a number or with bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def fields(data: bytes) -> dict[int, bytes | int]:
    """Fields of a message, the last of each number."""
    found: dict[int, bytes | int] = {}
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = number()
        value = number()
        if tag & 7 == 2:
            found[tag >> 3] = data[at : at + value]
            at += value
        elif tag & 7 == 0:
            found[tag >> 3] = value
        else:
            raise ValueError(f"a field of wire type {tag & 7}")
    return found


# --- HTTP/2 (RFC 9113) with literal headers (RFC 7541 §6.2.2) -----------------------------------------

_FRAME: Final = struct.Struct(">HBBBI")  # length in 24 bits, type, flags, stream
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_FRAME_BYTES_MAX: Final = 16_384
_WINDOW: Final = 65_535
_INITIAL_WINDOW: Final = 4
_WINDOW_MAX: Final = (1 << 31) - 1


def _frame(kind: int, flags: int, stream: int, *pieces: bytes) -> bytes:
    length = sum(map(len, pieces))
    return b"".join((_FRAME.pack(length >> 8, length & 0xFF, kind, flags, stream), *pieces))


def _literal(name: int | bytes, value: bytes) -> bytes:
    """A header that is not indexed; the name by its number in the static table or as it is."""
    if isinstance(name, int):
        prefix = bytes([name]) if name < 15 else bytes([15, name - 15])
    else:
        prefix = b"\x00" + bytes([len(name)]) + name
    return prefix + bytes([len(value)]) + value


def _headers(path: bytes) -> bytes:
    return b"".join(
        (
            b"\x83\x86",  # :method POST, :scheme http
            _literal(4, path),
            _literal(1, b"etcd"),  # :authority
            _literal(31, b"application/grpc"),  # content-type
            _literal(b"te", b"trailers"),
        )
    )


_PUT: Final = _headers(b"/etcdserverpb.KV/Put")
_RANGE: Final = _headers(b"/etcdserverpb.KV/Range")
_STATUS: Final = _headers(b"/etcdserverpb.Maintenance/Status")
_HASH: Final = _headers(b"/etcdserverpb.Maintenance/HashKV")

Done = Callable[[bytes | None], None]


@attrs.define
class _Sending:
    stream: int
    rest: memoryview
    window: int


class Http2(asyncio.Protocol):
    """One connection; :meth:`call` begins a unary gRPC call.  Callbacks get the message, or None for a refusal."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._buffer = bytearray()
        self._calls: dict[int, Done] = {}
        self._messages: dict[int, bytes] = {}
        self._sending: deque[_Sending] = deque()
        self._windows: dict[int, int] = {}  # what came early for streams that are not yet sent out in full
        self._stream = -1
        self._window = _WINDOW
        self._stream_window = _WINDOW

    def connection_made(self, transport: Any) -> None:
        """Introduces itself, with room for any number of small answers."""
        self._transport = transport
        window = _frame(_WINDOW_UPDATE, 0, 0, (_WINDOW_MAX - _WINDOW).to_bytes(4, "big"))
        transport.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS, 0, 0) + window)

    def connection_lost(self, exc: Exception | None) -> None:
        """Whatever was asked gets no answer any more."""
        self._transport = None
        calls, self._calls = self._calls, {}
        for done in calls.values():
            done(None)

    def call(self, headers: bytes, message: bytes, done: Done) -> None:
        """Begins a call."""
        if self._transport is None:
            asyncio.get_running_loop().call_soon(done, None)
            return
        self._stream += 2
        self._calls[self._stream] = done
        body = b"\x00" + len(message).to_bytes(4, "big") + message
        self._write(_frame(_HEADERS, _END_HEADERS, self._stream, headers))
        if not self._sending and len(body) <= min(self._window, self._stream_window, _FRAME_BYTES_MAX):
            self._window -= len(body)
            self._write(_frame(_DATA, _END_STREAM, self._stream, body))
        else:
            self._sending.append(_Sending(self._stream, memoryview(body), self._stream_window))
            self._pump()

    def _write(self, data: bytes) -> None:
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out.append(data)

    def _flush(self) -> None:
        out, self._out = self._out, []
        if self._transport is not None:
            self._transport.write(b"".join(out))

    def _pump(self) -> None:
        """Sends as much of what is queued as the windows allow (RFC 9113 §5.2)."""
        for _ in range(len(self._sending)):
            each = self._sending.popleft()
            while each.rest and (room := min(self._window, each.window, _FRAME_BYTES_MAX)) > 0:
                piece, each.rest = each.rest[:room], each.rest[room:]
                self._window -= len(piece)
                each.window -= len(piece)
                self._write(_frame(_DATA, 0 if each.rest else _END_STREAM, each.stream, piece.tobytes()))
            if each.rest and each.stream in self._calls:
                self._sending.append(each)

    def data_received(self, data: bytes) -> None:
        """Takes whole frames off what came."""
        buffer = self._buffer
        buffer += data
        at = 0
        while len(buffer) - at >= _FRAME.size:
            high, low, kind, flags, stream = _FRAME.unpack_from(buffer, at)
            end = at + _FRAME.size + (high << 8 | low)
            if len(buffer) < end:
                break
            self._on_frame(kind, flags, stream, bytes(buffer[at + _FRAME.size : end]))
            at = end
        del buffer[:at]

    def _on_frame(self, kind: int, flags: int, stream: int, body: bytes) -> None:
        if kind == _DATA:
            self._messages[stream] = self._messages.get(stream, b"") + body
        elif kind == _WINDOW_UPDATE:
            self._widen(stream, int.from_bytes(body, "big"))
        elif kind == _PING and not flags & _ACK:
            self._write(_frame(_PING, _ACK, 0, body))
        elif kind == _SETTINGS and not flags & _ACK:
            self._settings(body)
        if (kind in {_DATA, _HEADERS} and flags & _END_STREAM) or kind == _RST_STREAM:
            message = self._messages.pop(stream, b"")[5:] if stream in self._messages else None
            done = self._calls.pop(stream, None)
            if done is not None:
                done(message)

    def _widen(self, stream: int, by: int) -> None:
        if stream == 0:
            self._window += by
        for each in self._sending:
            if each.stream == stream:
                each.window += by
        if self._sending:
            self._pump()

    def _settings(self, body: bytes) -> None:
        for identifier, value in struct.iter_unpack(">HI", body):
            if identifier == _INITIAL_WINDOW:
                for each in self._sending:
                    each.window += value - self._stream_window
                self._stream_window = value
        self._write(_frame(_SETTINGS, _ACK, 0))
        self._pump()

    def close(self) -> None:
        """Ends the connection."""
        if self._transport is not None:
            self._transport.close()


async def _connect(port: int) -> Http2:
    _, protocol = await asyncio.get_running_loop().create_connection(Http2, HOST, port)
    return protocol


async def _ask(port: int, headers: bytes, message: bytes) -> dict[int, bytes | int]:
    connection = await _connect(port)
    future: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
    connection.call(headers, message, lambda answer: None if future.done() else future.set_result(answer))
    try:
        answer = await asyncio.wait_for(future, _CALL_SECONDS)
    finally:
        connection.close()
    if answer is None:
        raise RuntimeError("etcd refused a call")
    return fields(answer)


# --- the cluster --------------------------------------------------------------------------------------


class Etcd:
    """Three members on this machine."""

    name: Final = "etcd"

    def __init__(self, home: Path) -> None:
        program = find(PROGRAM)
        assert program is not None
        ports = free_ports(2 * _NODES)
        self._clients, peers = ports[:_NODES], ports[_NODES:]
        self._commands: list[list[str]] = []
        self._homes = [home / f"etcd{number}" for number in range(_NODES)]
        cluster = ",".join(f"n{number}=http://{HOST}:{port}" for number, port in enumerate(peers))
        for number, (client, peer) in enumerate(zip(self._clients, peers, strict=True)):
            self._commands.append(
                [
                    program,
                    *("--name", f"n{number}", "--data-dir", str(self._homes[number])),
                    *("--listen-client-urls", f"http://{HOST}:{client}"),
                    *("--advertise-client-urls", f"http://{HOST}:{client}"),
                    *("--listen-peer-urls", f"http://{HOST}:{peer}"),
                    *("--initial-advertise-peer-urls", f"http://{HOST}:{peer}"),
                    *("--initial-cluster", cluster, "--initial-cluster-state", "new"),
                    *("--quota-backend-bytes", str(_QUOTA_BYTES)),
                    *("--max-request-bytes", str(_REQUEST_BYTES_MAX), "--log-level", "error"),
                ]
            )
        self._programs = [self._start(number) for number in range(_NODES)]
        self._puts = 0
        self._keys = self._new_keys()
        try:
            wait_for("an etcd cluster", self._leader_if_whole)
        except BaseException:
            self.close()
            raise

    def _start(self, number: int) -> Program:
        return Program(self._commands[number], self._homes[number])

    def _new_keys(self) -> Iterator[bytes]:
        """Distinct keys of 12 bytes."""
        number = 0
        while True:
            number += 1
            yield b"k%011d" % number

    def _leader(self) -> int:
        for number, port in enumerate(self._clients):
            try:
                answer = run(_ask(port, _STATUS, b""))
            except (OSError, RuntimeError, TimeoutError):
                continue
            header = answer[1]
            assert isinstance(header, bytes)
            if answer.get(4) == fields(header).get(2, 0):
                return number
        raise RuntimeError("no etcd member leads")

    def _leader_if_whole(self) -> bool:
        """Whether there is a leader and every member answers a read that needs one."""
        self._leader()
        return all(run(_ask(port, _RANGE, field(1, b"k"))) for port in self._clients)

    def load(self, load: Load) -> Measured:
        """Puts distinct keys at the leader; checks afterwards that every member has all of them."""
        found: Measured = run(self._load(self._clients[self._leader()], load))
        self._puts += found.operations
        self.check()
        return found

    async def _load(self, port: int, load: Load) -> Measured:
        connection = await _connect(port)
        value = field(2, bytes(range(256)) * (load.size // 256))
        keys = self._keys

        def issue(_: int, done: Callable[[bool], None]) -> None:
            message = field(1, next(keys)) + value
            connection.call(_PUT, message, lambda answer: done(answer is not None))

        try:
            return await ClosedLoop(issue, load).run()
        finally:
            connection.close()

    def check(self) -> None:
        """Every acknowledged key is on every member, and the members are the same.

        Raises:
            RuntimeError: they are not.
        """
        wait_for("equal etcd members with every acknowledged put", self._is_whole)

    def _is_whole(self) -> bool:
        query = field(1, b"k") + field(2, b"l") + field(7, 1) + field(9, 1)  # serializable, count_only
        counts = {run(_ask(port, _RANGE, query)).get(4, 0) for port in self._clients}
        hashes = {run(_ask(port, _HASH, b"")).get(2) for port in self._clients}
        if len(counts) > 1 or len(hashes) > 1:
            raise RuntimeError(f"counts {counts}, hashes {hashes}")
        (count,) = counts
        assert isinstance(count, int)
        return count >= self._puts

    def failover(self) -> float:
        """Seconds from kill -9 of the leader to the next acknowledged put; the member is back afterwards."""
        leader = self._leader()
        survivors = [port for number, port in enumerate(self._clients) if number != leader]
        killed = self._programs[leader].kill()
        acknowledged: float = run(self._next_acknowledged(survivors))
        self._programs[leader] = self._start(leader)
        wait_for("the return of an etcd member", self._leader_if_whole)
        return acknowledged - killed

    async def _next_acknowledged(self, ports: list[int]) -> float:
        connections = [await _connect(port) for port in ports]

        def issue(_: int, done: Callable[[bool], None]) -> None:
            for connection in connections:
                message = field(1, next(self._keys)) + field(2, bytes(256))
                connection.call(_PUT, message, lambda answer: done(answer is not None))

        try:
            return await first_acknowledged(issue)
        finally:
            for connection in connections:
                connection.close()

    def close(self) -> None:
        """Ends the members."""
        for program in self._programs:
            program.end()
