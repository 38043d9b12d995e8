"""The target on sockets: asyncio around :mod:`space.projections.nvme.queue`.

A session moves bytes and nothing else: into the connection's buffer, commands to the queue, output to the transport.
It stops reading while the queue is blocked or the host does not read, so that neither a slow device nor a slow host
makes memory grow; what the host sends meanwhile waits in its own socket.

Every port answers the discovery service as well as every subsystem.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Coroutine, Sequence
from typing import Any, Final, cast

import attrs

from space.projections.nvme.connection import Connection, Limits
from space.projections.nvme.pdu import FatalError
from space.projections.nvme.queue import Pools, Queue
from space.projections.nvme.reply import Reply
from space.projections.nvme.target import IO_PORT, Port, Target

CONNECTIONS_MAX: Final = 2048
"""Each costs up to 80 KiB of buffers while idle, and up to CONNECTION_BYTES at work."""
WRITE_BYTES: Final = 1 << 20
"""The transport holds so much for a host that does not read, and one batch of output more."""
FLUSH_BYTES: Final = 256 << 10
"""Output is handed to the transport when there is so much, though more commands wait."""
PIECE_BYTES: Final = 4 << 10
"""Where copying pieces together starts to cost more than handing them over one by one."""
BACKLOG: Final = 512
"""A host with many processors connects a queue for each at once."""
TICK_SECONDS: Final = 1.0
LINGER_SECONDS: Final = 2.0
"""How long a host may take to see the end of a connection coming; closing at once could cost it the reason."""
DISCARD_BYTES: Final = 16 << 10
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
"""A host that has vanished is noticed in a minute, though it has switched the keep alive of NVMe off."""

log: Final = logging.getLogger("space.nvme")


@attrs.frozen
class Listener:
    """An address to listen at; port 0: whichever is free."""

    host: str = "127.0.0.1"
    port: int = IO_PORT
    discovery_only: bool = False


class Session(asyncio.BufferedProtocol):
    """One connection."""

    def __init__(self, server: Server) -> None:
        """A connection that is about to be made."""
        self._server = server
        self._loop = server.loop
        self._transport: asyncio.Transport | None = None
        self._connection = Connection(server.limits)
        self.queue = Queue(server.target, self._connection, self, server.pools, self._loop.time())
        self._full = self._paused = self._scheduled = self._ending = False
        self._linger: asyncio.TimerHandle | None = None

    # --- what the queue needs

    @property
    def local_address(self) -> str:
        """The address the host has reached."""
        assert self._transport is not None
        return str(self._transport.get_extra_info("sockname")[0])

    def random(self, count: int) -> bytes:
        """Bytes nobody can foresee."""
        return secrets.token_bytes(count)

    def future(self) -> asyncio.Future[None]:
        """Something to wait for."""
        return self._loop.create_future()

    def spawn(self, coroutine: Coroutine[Any, Any, Reply]) -> asyncio.Task[Reply]:
        """Runs a command that has to wait."""
        return self._server.spawn(coroutine)

    def wake(self) -> None:
        """Goes on in the next turn of the loop."""
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._turn)

    def close(self, reason: str) -> None:
        """Ends the connection once this turn's answers are on their way."""
        self._loop.call_soon(self._end, reason)

    def tick(self, now: float) -> None:
        """Time has passed; a host whose bytes are left unread is not silent."""
        if self._paused:
            self.queue.heard(now)
        self.queue.tick(now)

    # --- what the loop does

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if not self._server.admit(self):
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=WRITE_BYTES)
        sock = self._transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # of a socket the host has closed already
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._ending or self._connection.ended:
            return memoryview(bytearray(DISCARD_BYTES))
        return self._connection.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self._ending or self._connection.ended:
            return
        self._connection.received(nbytes)
        self.queue.heard(self._loop.time())
        self._pump()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self.wake()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._linger is not None:
            self._linger.cancel()
        self._ending = True
        self.queue.lost()
        self._server.forget(self)

    def _turn(self) -> None:
        self._scheduled = False
        if not self._ending:
            self._pump()

    def _pump(self) -> None:
        """Hands over commands until there are none, or until it must wait."""
        connection, queue = self._connection, self.queue
        try:
            while not self._full and not queue.blocked:
                command = connection.next_command()
                if command is None:
                    break
                queue.accept(command)
                if connection.out_bytes >= FLUSH_BYTES:
                    self._flush()
        except FatalError as error:
            log.warning("%s: %s", self._peer(), error)
            self._end(str(error))
            return
        self._flush()
        if connection.ended:
            self._end("the host terminated the connection")
        else:
            self._hold(self._full or queue.blocked)

    def _hold(self, hold: bool) -> None:
        assert self._transport is not None
        if hold != self._paused and not self._transport.is_closing():
            self._paused = hold
            if hold:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _flush(self) -> None:
        assert self._transport is not None
        size = self._connection.out_bytes
        if not size:
            return
        pieces = self._connection.take_output()
        if self._transport.is_closing():
            return
        if len(pieces) == 1:
            self._transport.write(pieces[0])
        elif size < len(pieces) * PIECE_BYTES:
            self._transport.write(b"".join(pieces))
        else:
            self._transport.writelines(pieces)

    def _end(self, reason: str) -> None:
        """Says what is to be said, then that this is the end, and waits for the host to see it."""
        if self._ending or self._transport is None:
            return
        self._ending = True
        log.info("%s: closed: %s", self._peer(), reason)
        self._flush()
        if self._transport.is_closing():
            return
        if self._paused:
            self._transport.resume_reading()  # what still comes is thrown away
        with contextlib.suppress(OSError, NotImplementedError):
            self._transport.write_eof()
        self._linger = self._loop.call_later(LINGER_SECONDS, self._transport.abort)

    def abort(self) -> None:
        """Closes at once."""
        self._ending = True
        if self._transport is not None:
            self._transport.abort()

    def _peer(self) -> str:
        assert self._transport is not None
        return str(self._transport.get_extra_info("peername"))


class Server:
    """A target that listens."""

    def __init__(self, target: Target, *, limits: Limits | None = None, pools: Pools | None = None) -> None:
        """A server for a target, on the running loop."""
        self.target = target
        self.limits = limits or Limits()
        self.pools = pools or Pools()
        self.loop = asyncio.get_running_loop()
        self._sessions: set[Session] = set()
        self._tasks: set[asyncio.Task[Reply]] = set()
        self._servers: list[asyncio.Server] = []
        self._timer: asyncio.TimerHandle | None = None

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._sessions)

    async def start(self, listeners: Sequence[Listener], *, first_port: int = 1) -> list[Port]:
        """Listens, and says where; ports are numbered from ``first_port``, which other nodes must not do.

        Raises:
            OSError: an address is in use or not this machine's; nothing listens then.
        """
        ports = []
        try:
            for number, each in enumerate(listeners, first_port):
                server = await self.loop.create_server(
                    lambda: Session(self), each.host, each.port, backlog=BACKLOG
                )
                self._servers.append(server)
                service = server.sockets[0].getsockname()[1]
                ports.append(Port(number, each.host, service, each.discovery_only))
        except OSError:
            await self.close()
            raise
        self.target.set_ports(ports)
        self._tick()
        return ports

    async def close(self) -> None:
        """Listens no longer, ends every connection, and waits for what is under way."""
        if self._timer is not None:
            self._timer.cancel()
        for server in self._servers:
            server.close()
        for session in list(self._sessions):
            session.abort()
        while self._tasks or self._sessions:
            if self._tasks:
                await asyncio.wait(self._tasks)
            else:
                await asyncio.sleep(0)  # connections are lost in the next turns of the loop

    def admit(self, session: Session) -> bool:
        """Takes a connection in, unless there are too many."""
        if len(self._sessions) >= CONNECTIONS_MAX:
            log.warning("refused a connection: there are %d", len(self._sessions))
            return False
        self._sessions.add(session)
        return True

    def forget(self, session: Session) -> None:
        """A connection has ended."""
        self._sessions.discard(session)

    def spawn(self, coroutine: Coroutine[Any, Any, Reply]) -> asyncio.Task[Reply]:
        """Runs a command that has to wait."""
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _tick(self) -> None:
        now = self.loop.time()
        for session in list(self._sessions):
            session.tick(now)
        for controller in self.target.controllers():
            controller.tick(now)
        self._timer = self.loop.call_later(TICK_SECONDS, self._tick)
