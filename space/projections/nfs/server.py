"""The server on sockets: asyncio around :mod:`space.projections.nfs.service`.

COMPOUNDs of a connection run side by side.  Most end in the turn of the loop they arrive in and never become a task.
What must be durable before an answer is waited for together: while one barrier is under way, all who come meanwhile
share the next one.

A connection is not read while it has too much under way or does not take its answers, so what a client sends
meanwhile waits in its own socket.  Who begins a record and does not end it, or never reads, is disconnected; its
state is not: it may come back on another connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from typing import Any, Final, cast

import attrs

from space.projections.nfs import rpc
from space.projections.nfs.compound import Compound, run
from space.projections.nfs.nfs4 import PORT
from space.projections.nfs.service import Service, Shell, Syncable
from space.projections.nfs.sessions import Connection
from space.projections.nfs.xdr import Bytes, XdrError

CONNECTIONS_MAX: Final = 1024
"""More than there are clients, and below the usual limit of open files."""
COMPOUNDS_MAX: Final = 256
"""Of one connection at a time: the slots of a few sessions."""
REQUEST_BYTES_MAX: Final = 32 << 20
"""Requests under way of one connection."""
WRITE_BYTES: Final = 1 << 20
"""The transport holds so much for a client that does not read, and the answers under way."""
PARTIAL_BYTES_MAX: Final = 256 << 20
"""Records begun, of all connections; beyond it the oldest are given up."""
STALL_SECONDS: Final = 60.0
"""A record or an answer takes no longer, even of 1 MiB over a telephone line."""
IDLE_SECONDS: Final = 900.0
"""Clients renew their leases more often; one that vanished without a word is noticed by then."""
PIECE_BYTES: Final = 4 << 10
"""Where copying pieces together starts to cost more than handing them over one by one."""
BACKLOG: Final = 512
TICK_SECONDS: Final = 1.0
PAUSE_SECONDS: Final = 3 * TICK_SECONDS
"""The clock is looked at with every tick: if it was not, the process was at a standstill."""
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))

log: Final = logging.getLogger("space.nfs")


@attrs.frozen
class Listener:
    """An address to listen at; port 0: whichever is free."""

    host: str = "127.0.0.1"
    port: int = PORT


class Barriers:
    """Durability for many who wait: one call of ``sync`` at a time and thing, and one more for who came meanwhile."""

    def __init__(self) -> None:
        """Nobody waits yet."""
        self._running: dict[Syncable, asyncio.Task[None]] = {}
        self._next: dict[Syncable, asyncio.Future[None]] = {}

    async def wait(self, what: Iterable[Syncable]) -> None:
        """Returns when all that these have acknowledged is durable.

        Raises:
            SpaceError: it cannot be made so.
        """
        for future in [self._shared(each) for each in what]:
            await asyncio.shield(future)

    def _shared(self, thing: Syncable) -> asyncio.Future[None]:
        future = self._next.get(thing)
        if future is None:
            future = self._next[thing] = asyncio.get_running_loop().create_future()
            future.add_done_callback(lambda done: done.exception())  # whoever waited may be gone
            if thing not in self._running:
                self._start(thing)
        return future

    def _start(self, thing: Syncable) -> None:
        self._running[thing] = asyncio.get_running_loop().create_task(self._sync(thing))

    async def _sync(self, thing: Syncable) -> None:
        future = self._next.pop(thing)
        try:
            await thing.sync()
        except BaseException as error:  # noqa: BLE001 - it belongs to those who wait
            future.set_exception(error)
        else:
            future.set_result(None)
        del self._running[thing]
        if thing in self._next:
            self._start(thing)


class Clock:
    """Seconds in which clients could be heard.

    A server that was stopped, or got no processor, did not hear its clients renew their leases: for that time nothing
    ends.  So a long pause between two looks at the clock does not count.
    """

    def __init__(self, time: Callable[[], float]) -> None:
        """``time`` is of the loop."""
        self._time = time
        self._last = time()
        self._lost = 0.0

    def __call__(self) -> float:
        """What time it is."""
        now = self._time()
        self._lost += max(now - self._last - PAUSE_SECONDS, 0.0)
        self._last = now
        return now - self._lost


class Tasks:
    """What goes on beside the connections; it is kept track of, so that it can be waited for."""

    def __init__(self) -> None:
        """There are none yet."""
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs what has to wait; what goes wrong with it is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def finish(self) -> None:
        """Waits until there are none."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("not carried out: %s", error, exc_info=error)


def make_shell(tasks: Tasks) -> Shell:
    """What a service needs of the running loop."""
    return Shell(secrets.token_bytes, asyncio.Event, Barriers().wait, tasks.spawn)


class Session(asyncio.Protocol):
    """One connection."""

    def __init__(self, server: Server) -> None:
        """A connection that is about to be made."""
        self._server = server
        self._service = server.service
        self._loop = server.loop
        self._transport: asyncio.Transport | None = None
        self._records = rpc.Records()
        self._connection = Connection(self, "")
        self._busy = self._busy_bytes = 0
        self._full = self._paused = self._scheduled = self._ended = False
        self._heard = self._full_since = server.now()

    # --- what the service needs

    def send(self, pieces: list[Bytes]) -> None:
        """Sends a record, or drops it where the connection has ended: whoever wanted it is told of that."""
        if self._transport is None or self._transport.is_closing():
            return
        size = sum(map(len, pieces))
        if size < len(pieces) * PIECE_BYTES:
            self._transport.write(b"".join(pieces))
        else:
            self._transport.writelines(pieces)

    def close(self, reason: str) -> None:
        """Ends the connection."""
        if not self._ended:
            self._ended = True
            log.info("%s: closed: %s", self._connection.host, reason)
            if self._transport is not None:
                self._transport.abort()

    # --- what the loop does

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        self._transport = cast("asyncio.Transport", transport)
        self._connection.host = str((transport.get_extra_info("peername") or ("",))[0])
        if not self._server.admit(self):
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=WRITE_BYTES)
        sock = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # of a socket the client has closed already
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def data_received(self, data: bytes) -> None:
        """Bytes have arrived."""
        self._heard = self._server.now()
        self._records.feed(data)
        self._pump()

    def eof_received(self) -> bool:
        """The client sends no more; it is not owed answers either."""
        return False

    def pause_writing(self) -> None:
        """The client does not read."""
        self._full, self._full_since = True, self._server.now()

    def resume_writing(self) -> None:
        """It reads again."""
        self._full = False
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended; what it asked for is carried out, so that a retry finds its answer."""
        self._ended = True
        self._service.callbacks.lost(self._connection)
        self._server.forget(self)

    def tick(self, now: float) -> None:
        """Time has passed."""
        if self._full and now - self._full_since > STALL_SECONDS:
            self.close("the client does not take its answers")
        elif self._records.partial and not self._paused and now - self._heard > STALL_SECONDS:
            self.close("a record was begun and not ended")
        elif self.idle and now - self._heard > IDLE_SECONDS:
            self.close("idle")

    @property
    def partial_bytes(self) -> int:
        """What is held of a record that has not ended."""
        return self._records.held

    @property
    def idle(self) -> bool:
        """Whether nothing is under way on it, in no direction."""
        return not self._busy and not self._full and not self._connection.back

    @property
    def heard(self) -> float:
        """When bytes came last."""
        return self._heard

    def _wake(self) -> None:
        """Goes on in the next turn of the loop."""
        if self._paused and not self._scheduled and not self._ended:
            self._scheduled = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._scheduled = False
        self._pump()

    def _blocked(self) -> bool:
        return self._full or self._busy >= COMPOUNDS_MAX or self._busy_bytes >= REQUEST_BYTES_MAX

    def _pump(self) -> None:
        """Takes records until there are none, or until it must wait."""
        try:
            while not self._ended and not self._blocked():
                record = self._records.next()
                if record is None:
                    break
                self._take(record)
        except rpc.RecordError as error:
            self.close(str(error))
            return
        self._hold(self._blocked())

    def _hold(self, hold: bool) -> None:
        if hold != self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = hold
            if hold:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _take(self, record: Bytes) -> None:
        message = rpc.message(record)
        if isinstance(message, rpc.Call):
            if message.procedure:
                self._carry_out(message, len(record))
            else:
                self.send(rpc.framed([rpc.success(message.xid)]))
        elif isinstance(message, rpc.Reply):
            self._service.callbacks.reply(self._connection, message, self._server.now())
        else:
            self.send(rpc.framed([message.reply]))

    # --- COMPOUNDs

    def _carry_out(self, call: rpc.Call, size: int) -> None:
        ctx = Compound(
            self._service, self._connection, call.credentials, 0, self._server.now(), request_bytes=size
        )
        work = run(ctx, call.arguments)
        try:
            awaited = work.send(None)
        except StopIteration as done:
            self.send(rpc.framed([rpc.success(call.xid), *done.value]))
        except XdrError:
            self.send(rpc.framed([rpc.garbage(call.xid)]))
        else:
            self._busy += 1
            self._busy_bytes += size
            self._server.tasks.spawn(self._rest(call.xid, size, _resumed(work, awaited)))

    async def _rest(self, xid: int, size: int, work: Awaitable[list[Bytes]]) -> None:
        try:
            pieces = await work
        finally:
            self._busy -= 1
            self._busy_bytes -= size
        self.send(rpc.framed([rpc.success(xid), *pieces]))
        self._wake()


@types.coroutine
def _resumed(work: Coroutine[Any, Any, list[Bytes]], awaited: Any) -> Generator[Any, Any, list[Bytes]]:
    """The rest of a coroutine that has begun outside a task and waits for something now."""
    while True:
        value, failed = None, None
        try:
            value = yield awaited
        except BaseException as error:  # noqa: BLE001 - it is the coroutine's to handle
            failed = error
        try:
            awaited = work.send(value) if failed is None else work.throw(failed)
        except StopIteration as done:
            return cast("list[Bytes]", done.value)


class Server:
    """A service that listens."""

    def __init__(self, service: Service, tasks: Tasks, now: Clock) -> None:
        """A server on the running loop; ``tasks`` are those of the service's shell, ``now`` is its clock."""
        self.service = service
        self.now = now
        self.tasks = tasks
        self.loop = asyncio.get_running_loop()
        self._sessions: set[Session] = set()
        self._alone = asyncio.Event()
        self._servers: list[asyncio.Server] = []
        self._timer: asyncio.TimerHandle | None = None

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._sessions)

    async def start(self, listener: Listener) -> tuple[str, int]:
        """Listens, and says at which host and port.

        Raises:
            OSError: the address is in use or not this machine's.
        """
        server = await self.loop.create_server(
            lambda: Session(self), listener.host, listener.port, backlog=BACKLOG
        )
        self._servers.append(server)
        self._tick()
        return listener.host, int(server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Listens no longer, ends every connection, and waits for what is under way."""
        if self._timer is not None:
            self._timer.cancel()
        for server in self._servers:
            server.close()
        for session in list(self._sessions):
            session.close("the server ends")
        if self._sessions:
            await self._alone.wait()
        await self.tasks.finish()

    def admit(self, session: Session) -> bool:
        """Takes a connection in; if there are too many, for the one that was silent longest and is not needed."""
        if len(self._sessions) >= CONNECTIONS_MAX:
            idle = [each for each in self._sessions if each.idle]
            if not idle:
                log.warning("refused a connection: there are %d", len(self._sessions))
                return False
            min(idle, key=lambda each: each.heard).close("another client wants to connect")
        self._sessions.add(session)
        self._alone.clear()
        return True

    def forget(self, session: Session) -> None:
        """A connection has ended."""
        self._sessions.discard(session)
        if not self._sessions:
            self._alone.set()

    def _tick(self) -> None:
        now = self.now()
        service = self.service
        service.tick(now)
        if service.recovery.dirty:
            self.tasks.spawn(service.barrier([service.recovery]))
        for session in list(self._sessions):
            session.tick(now)
        self._shed()
        self._timer = self.loop.call_later(TICK_SECONDS, self._tick)

    def _shed(self) -> None:
        """Gives up the records that wait longest for their ends, if all together take too much memory."""
        partial = [each for each in self._sessions if each.partial_bytes]
        excess = sum(each.partial_bytes for each in partial) - PARTIAL_BYTES_MAX
        for session in sorted(partial, key=lambda each: each.heard):
            if excess <= 0:
                return
            excess -= session.partial_bytes
            session.close("too many records were begun and not ended")
