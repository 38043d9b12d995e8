"""One TCP connection between two nodes: frames out of a bounded queue, frames in, an orderly end.

It knows neither peers nor what frames mean.  Its owner decides when a stranger is admitted, what a frame does,
and how much may be queued; it decides only when bytes move:

* What is sent waits here, by reference, and goes to the transport a piece at a time: the transport copies what
  the kernel does not take at once, and a batch of 32 MiB is not to be copied.
* Frames sent in one turn of the loop leave in one write.
* While its owner holds it, nothing is read: the peer's TCP window closes, and the peer waits.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import attrs

from space._errors import UnavailableError
from space.replication.wire import Frame, FrameReader, Goodbye, Hello, Reason, WireError, encode_goodbye
from space.wal.disk import Buffer

WRITE_BYTES: Final = 256 << 10
"""Given to the transport at a time; it then holds at most twice as much."""
FLUSH_BYTES: Final = 1 << 20
"""Written before other connections have their turn: about 1 ms with TLS."""
PIECE_BYTES: Final = 16 << 10
"""Where copying pieces together starts to cost more than writing them one by one (one TLS record)."""
LINGER_SECONDS: Final = 1.0
"""How long a goodbye may take to leave."""
_TCP_ESTABLISHED: Final = 1  # tcpi_state, the first byte of struct tcp_info (linux/tcp.h)
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))


@attrs.define
class Stats:
    """What has happened since the start; numbers only grow."""

    frames_in: int = 0
    frames_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    accepted: int = 0  # connections of peers that were admitted
    dialled: int = 0  # connections to peers that were admitted
    refused: int = 0  # connections that were not
    protocol_errors: int = 0
    dropped: int = 0  # Raft messages there was no connection or no room for


class Connection(asyncio.BufferedProtocol):
    """A connection; use :meth:`introduction`, then :meth:`admit` or :meth:`end`."""

    def __init__(
        self, stats: Stats, made: Callable[[Connection], None], lost: Callable[[Connection], None]
    ) -> None:
        """A connection that is to be made.

        Arguments:
            stats: where it counts.
            made: is told when there is a transport, which has to be closed.
            lost: is told, once, when it is closed.
        """
        self._stats = stats
        self._made = made
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader()
        self._first: asyncio.Future[Hello | None] = self._loop.create_future()
        self._on_frame: Callable[[Frame], None] = self._introduce
        self._held = False
        self._ended = False
        self._queue: deque[Buffer] = deque()
        self._queued = 0
        self._full = False  # the transport's buffer
        self._scheduled = False
        self._waiting: list[asyncio.Future[None]] = []
        self._linger: asyncio.TimerHandle | None = None
        self.closed = asyncio.Event()
        self.error = ""
        self.broken = False
        self.received = 0
        self.written = 0

    # --- what its owner does

    @property
    def is_made(self) -> bool:
        """Whether there ever was a transport, which then owns the socket."""
        return self._transport is not None

    @property
    def is_open(self) -> bool:
        """Whether frames can be sent."""
        return self._transport is not None and not self._ended

    @property
    def is_left(self) -> bool:
        """Whether the other side has closed, which nothing else tells of a connection that is held."""
        if not self._held or self._transport is None or self._ended:
            return False
        info: bytes = self.about("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        return info[0] != _TCP_ESTABLISHED

    @property
    def sent(self) -> int:
        """Bytes of all frames since the beginning, of which ``written`` have gone to the transport."""
        return self.written + self._queued

    @property
    def queued_bytes(self) -> int:
        """Sent and not yet with the kernel."""
        return self._queued + (self._transport.get_write_buffer_size() if self._transport else 0)

    @property
    def peer_host(self) -> str:
        """Address of the other side."""
        name = self.about("peername")
        return str(name[0]) if name else "?"

    @property
    def peer_certificate(self) -> dict[str, Any] | None:
        """The verified certificate of the other side, as :meth:`ssl.SSLSocket.getpeercert` gives it."""
        found = self.about("ssl_object")
        return cast("dict[str, Any] | None", found.getpeercert()) if found else None

    def about(self, name: str) -> Any:
        """What the transport knows about itself."""
        return self._transport.get_extra_info(name) if self._transport else None

    async def introduction(self) -> Hello:
        """The first frame.

        Raises:
            UnavailableError: the connection ended before there was one.
        """
        hello = await self._first
        if hello is None:
            raise UnavailableError(self.error or "the connection ended before an introduction")
        return hello

    def admit(self, on_frame: Callable[[Frame], None]) -> None:
        """From now on ``on_frame`` is called with each frame; it may raise :class:`WireError`."""
        self._reader.admit()
        self._on_frame = on_frame
        self.release()

    def hold(self) -> None:
        """Reads no more until :meth:`release`; no further frame is delivered either."""
        if self._transport is not None and not self._held:
            self._held = True
            self._transport.pause_reading()

    def release(self) -> None:
        """Reads again, beginning with what had come already."""
        if not self._held:
            return
        self._held = False
        self._deliver()
        if self._transport is not None and not self._held and not self._ended:
            self._transport.resume_reading()

    def send(self, frame: Sequence[Buffer]) -> None:
        """Queues a frame; it leaves in this turn of the loop if there is room.  Nothing if the end has come."""
        if self._ended:
            return
        self._queue.extend(frame)
        self._queued += sum(map(len, frame))
        self._stats.frames_out += 1
        self._schedule()

    async def room(self, bytes_max: int) -> None:
        """Waits until at most so much is queued, or the connection has ended."""
        while self.queued_bytes > bytes_max and not self._ended:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiting.append(waiter)
            await waiter

    def end(self, reason: Reason, text: str) -> None:
        """Says goodbye if that is possible between two frames, and closes."""
        if self._ended:
            return
        if not self._full:
            self._flush()
        if self._transport is None or self._queue:
            self.abort(text)
            return
        self._finish(text)
        for buffer in encode_goodbye(Goodbye(reason, text)):
            self._transport.write(buffer)
        self._transport.close()
        self._linger = self._loop.call_later(LINGER_SECONDS, self._transport.abort)

    def abort(self, text: str) -> None:
        """Closes at once."""
        self._finish(text)
        if self._transport is not None:
            self._transport.abort()

    def _finish(self, text: str) -> None:
        self.error = self.error or text
        self._ended = True
        self._queue.clear()
        self._queued = 0
        self._wake()
        if not self._first.done():
            self._first.set_result(None)

    # --- what the loop does

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._made(self)
        self._transport.set_write_buffer_limits(high=WRITE_BYTES)
        sock = self.about("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        if self._ended:  # while it was being made
            self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._ended:  # closing TLS reads on: what comes is not looked at
            return memoryview(bytearray(WRITE_BYTES))
        return self._reader.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        if self._ended:
            return
        self.received += nbytes
        self._stats.bytes_in += nbytes
        self._reader.buffer_updated(nbytes)
        self._deliver()

    def _deliver(self) -> None:
        try:
            while not self._held and not self._ended:
                frame = self._reader.next_frame()
                if frame is None:
                    return
                self._stats.frames_in += 1
                self._on_frame(frame)
        except WireError as error:
            self._stats.protocol_errors += 1
            self.broken = True
            self.end(error.reason, str(error))

    def _introduce(self, frame: Frame) -> None:
        if isinstance(frame, Hello):
            self.hold()  # until it is admitted, the next frame waits
            if not self._first.done():  # given up meanwhile
                self._first.set_result(frame)
        elif isinstance(frame, Goodbye):
            self.abort(f"refused there: {frame.text}")

    def eof_received(self) -> bool:
        return False  # there is nothing to say to who does not listen

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._schedule()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._linger is not None:
            self._linger.cancel()
        self._finish(str(exc) if exc else "the other side closed the connection")
        self._on_frame = self._introduce  # lets go of the owner
        self.closed.set()
        self._lost(self)

    # --- the queue

    def _schedule(self) -> None:
        if not self._scheduled and not self._full:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        flushed = 0
        while self._queue and not self._full and not self._ended:
            if flushed >= FLUSH_BYTES:
                self._schedule()
                break
            flushed += self._write()
        self._wake()

    def _write(self) -> int:
        """Gives the transport some of the queue; says how much."""
        assert self._transport is not None
        pieces: list[Buffer] = []
        size = 0
        while self._queue and size < WRITE_BYTES:
            piece = self._queue.popleft()
            if len(piece) > WRITE_BYTES:
                view = memoryview(piece)
                self._queue.appendleft(view[WRITE_BYTES:])
                piece = view[:WRITE_BYTES]
            pieces.append(piece)
            size += len(piece)
        self._queued -= size
        self.written += size
        self._stats.bytes_out += size
        if size < len(pieces) * PIECE_BYTES:
            self._transport.write(b"".join(pieces))
        else:
            self._transport.writelines(pieces)
        return size

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)
