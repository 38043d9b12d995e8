"""Nodes reach each other here: three connections to each peer, messages out, messages and requests in.

A node dials every peer it knows, once for each *lane*, and sends on the connections it dialled; answers come back
on the connection of the request.  So heartbeats never wait behind a batch, nor a batch behind a segment that is
shipped, and a reader that is slow on one lane holds up that lane alone.

What holds:

* Sending a Raft message never waits: with no connection, or a lane that is full, it is dropped and said so
  (Raft repeats itself).  A request waits for room and for its answer; without one nobody knows whether it was
  carried out.
* A connection counts only after both sides have introduced themselves: same cluster, a common version, the node
  that was called, and, with TLS, a certificate that says the same.  Before that a stranger gets 4 KiB and a few
  seconds, and when strangers are many the one who has waited longest goes: a flood then has to be faster than an
  honest introduction to keep that out.
* A peer whose urgent lane does not answer pings is taken for dead on all lanes.  The other lanes may be slow for
  long: their peer lives.  A ping counts turns of this loop, so that a pause of this process accuses nobody.
* Whoever breaks the protocol is told once, logged at most once a minute, and cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from random import Random
from typing import Any, Final, Protocol

import attrs

from space._errors import SpaceError, StorageError, UnavailableError, UsageError
from space.replication.certificates import WARNING_DAYS, Tls, days_left, peer_identity
from space.replication.connection import Connection, Stats
from space.replication.wire import (
    CLIENT,
    Blob,
    Failure,
    Frame,
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
    agree,
    encode_failure,
    encode_hello,
    encode_ping,
    encode_pong,
    encode_raft,
    encode_request,
    encode_response,
)
from space.wal.disk import Buffer

_log = logging.getLogger("space.replication")

ACCEPTS: Final = 16  # in one turn of the loop, so that a flood leaves turns for others
BACKLOG: Final = 128
BUSY_SECONDS: Final = 0.1  # out of descriptors: some will come back
COMPLAINTS_MAX: Final = 1024
COMPLAINT_SECONDS: Final = 60.0


@attrs.frozen
class Limits:
    """Bounds of a transport; seconds and bytes.

    Attributes:
        hello_seconds: for the handshake and introduction of who dials us.
        connect_seconds: for ours, where we dial.
        ping_seconds: between pings, and between looks at who is silent.
        dead_pings: so many looks without an answer on the urgent lane, and a peer is dead (≤ 2 s).
        stalled_pings: so many without a byte moving on another lane, and that connection is dropped (30 s).
        backoff_first, backoff_max: before dialling again; doubled in between, times ½ to 1.  A cluster waits for
            a node that returns, so the first is short and the last no longer than an election or two.
        strangers_max: connections not yet introduced.
        connections_max: connections that are; three for each peer and some clients.
        urgent_bytes, log_bytes, bulk_bytes: queued on a lane before it is full; one frame more always fits.
        requests_max: outstanding on a connection, on either side; beyond it the asker waits.
        request_bytes: attachments of requests being answered on a connection, before it is read no further.
    """

    hello_seconds: float = 5.0
    connect_seconds: float = 2.0
    ping_seconds: float = 0.25
    dead_pings: int = 7
    stalled_pings: int = 120
    backoff_first: float = 0.02
    backoff_max: float = 1.0
    strangers_max: int = 64
    connections_max: int = 256
    urgent_bytes: int = 4 << 20
    log_bytes: int = 64 << 20
    bulk_bytes: int = 16 << 20
    requests_max: int = 256
    request_bytes: int = 64 << 20

    def lane_bytes(self, lane: Lane) -> int:
        """What may be queued on a lane."""
        return (self.urgent_bytes, self.log_bytes, self.bulk_bytes)[lane]


class Handler(Protocol):
    """Whom messages are for.  Called on the loop."""

    def on_raft(self, sender: int, group: int, message: bytes, blobs: list[Blob]) -> None:
        """A Raft message has come, perhaps twice, perhaps late.  Has to be quick, and may not send requests.

        An error raised here ends the connection it came on.
        """

    async def on_request(
        self, sender: int, method: str, body: Any, attachments: list[Buffer]
    ) -> tuple[Any, list[Buffer]]:
        """The answer to a request; a :class:`SpaceError` is passed on to who asked.

        ``sender`` is :data:`CLIENT` for an operator's program.  Cancelled when the connection ends, since
        nobody can be answered any more.
        """

    def on_unreachable(self, node: int) -> None:
        """A connection to a node was lost, or messages to it were dropped."""


@attrs.frozen
class PeerInfo:
    """What is known of a peer.

    Attributes:
        address: where it is dialled.
        connected: whether every lane is.
        rtt_seconds: of the last ping on the urgent lane, if there was one.
        queued_bytes: by lane.
        error: why it is not connected; empty if it is.
        certificate_days: until its certificate ends; nothing without TLS or before the first connection.
    """

    address: tuple[str, int]
    connected: bool
    rtt_seconds: float | None
    queued_bytes: dict[Lane, int]
    error: str
    certificate_days: int | None


# --- connections we dial ---------------------------------------------------------------------------


class _Link:
    """One lane to one peer, dialled again whenever it is lost."""

    def __init__(self, hub: Transport, peer: _Peer, lane: Lane) -> None:
        self._hub = hub
        self._peer = peer
        self._lane = lane
        self._wake = asyncio.Event()
        self._up = asyncio.Event()
        self._stopped = False
        self._answered = False  # since it was connected
        self._ping: int | None = None
        self._progress = -1
        self._silent = 0
        self._next_id = 1
        self._pending: dict[int, asyncio.Future[tuple[Any, list[Buffer]]]] = {}
        self._slots = asyncio.Semaphore(hub.limits.requests_max)
        self.connection: Connection | None = None
        self.rtt_seconds: float | None = None
        self.error = "not dialled yet"
        self._task = hub.spawn(self._run())

    def wake(self) -> None:
        """Dial now: the peer is there."""
        self._wake.set()

    def stop(self) -> None:
        """Dials no more; requests that wait end with an error."""
        self._stopped = True
        self._up.set()
        self._task.cancel()

    @property
    def queued_bytes(self) -> int:
        """Sent on it and not yet with the kernel."""
        return self.connection.queued_bytes if self.connection else 0

    async def _run(self) -> None:
        attempts = 0
        while True:
            self._wake.clear()
            self._answered = False
            reason = Reason.OTHER
            try:
                await self._connect_and_wait()
            except WireError as error:
                self.error, reason = str(error), error.reason
            except (OSError, SpaceError, UnicodeError) as error:
                self.error = _described(error)
            attempts = 0 if self._answered else attempts + 1
            self._hub.complain(f"node {self._peer.node}", reason.name, f"is not connected: {self.error}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._delay(attempts)):
                    await self._wake.wait()

    def _delay(self, attempts: int) -> float:
        limits = self._hub.limits
        longest: float = min(limits.backoff_max, limits.backoff_first * 2 ** min(attempts, 16))
        return longest * (0.5 + self._hub.random.random() / 2)

    async def _connect_and_wait(self) -> None:
        connection = self._hub.connection()
        try:
            await self._connect(connection)
            await connection.closed.wait()
            self.error = connection.error
        finally:
            self._lose(connection)

    async def _connect(self, connection: Connection) -> None:
        hub, peer = self._hub, self._peer
        tls = hub.tls.client if hub.tls else None
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(hub.limits.connect_seconds):
            sock = await _dialled(*peer.address)
            name = peer.address[0] if tls else None
            making = loop.create_connection(lambda: connection, sock=sock, ssl=tls, server_hostname=name)
            await hub.make(making, sock, connection)
            connection.send(encode_hello(hub.hello(self._lane)))
            hello = await connection.introduction()
        try:
            peer.certificate_expires = hub.check(hello, connection, called=(peer.node, self._lane))
        except WireError as error:
            connection.end(error.reason, str(error))
            raise
        hub.stats.dialled += 1
        self._ping, self._progress, self._silent, self._next_id = None, -1, 0, 1
        self.connection, self.error = connection, ""
        connection.admit(self._on_frame)
        self._up.set()
        self.tick()

    def _lose(self, connection: Connection) -> None:
        connection.end(Reason.CLOSING, "this node has no more to say")
        if self.connection is None:
            return
        self.connection = None
        self._up.clear()
        pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(
                    _unknown(f"the connection to node {self._peer.node} was lost: {connection.error}")
                )
        self._hub.unreachable(self._peer.node)

    def _on_frame(self, frame: Frame) -> None:
        match frame:
            case Response() | Failure():
                self._on_answer(frame)
            case Pong():
                self._on_pong(frame)
            case Goodbye():
                assert self.connection is not None
                self.connection.abort(f"ended there: {frame.text}")
            case _:
                raise WireError(f"{type(frame).__name__} on a connection that takes answers only")

    def _on_answer(self, frame: Response | Failure) -> None:
        if frame.id >= self._next_id:
            raise WireError(f"an answer to request {frame.id}, which was not made")
        future = self._pending.get(frame.id)
        if future is None or future.done():
            return  # nobody waits for it any more
        if isinstance(frame, Failure):
            future.set_exception(frame.error)
        else:
            future.set_result((frame.body, frame.attachments))

    def _on_pong(self, frame: Pong) -> None:
        if frame.token != self._ping:
            raise WireError("an answer to a ping that was not sent")
        self.rtt_seconds = (time.monotonic_ns() - frame.token) / 1e9
        self._ping = None
        self._answered = True

    def tick(self) -> None:
        """Looks whether the peer is there, and asks again."""
        connection = self.connection
        if connection is None:
            return
        # what the kernel takes says nothing of a peer that may be dead, but does of one that lives and is slow
        urgent = self._lane is Lane.URGENT
        progress = connection.received + (0 if urgent else connection.written)
        self._silent = self._silent + 1 if progress == self._progress else 0
        self._progress = progress
        limits = self._hub.limits
        if self._silent >= (limits.dead_pings if urgent else limits.stalled_pings):
            (self._peer if urgent else connection).abort("no answer to a ping")
        elif self._ping is None:
            self._ping = time.monotonic_ns()
            connection.send(encode_ping(self._ping))

    async def request(
        self, method: str, body: Any, attachments: Sequence[Buffer]
    ) -> tuple[Any, list[Buffer]]:
        """Asks, as soon as there is a connection with room, and waits for the answer."""
        async with self._slots:
            connection = await self._ready()
            await connection.room(self._hub.limits.bulk_bytes)
            if connection is not self.connection or not connection.is_open:
                raise _unknown(f"the connection to node {self._peer.node} was lost: {connection.error}")
            number = self._next_id
            frame = encode_request(number, method, body, attachments)
            self._next_id += 1
            future: asyncio.Future[tuple[Any, list[Buffer]]] = asyncio.get_running_loop().create_future()
            self._pending[number] = future
            connection.send(frame)
            try:
                return await future
            finally:
                self._pending.pop(number, None)

    async def _ready(self) -> Connection:
        while not self._stopped:
            await self._up.wait()
            if self.connection is not None and self.connection.is_open:
                return self.connection
            self._up.clear()  # it has ended, which is about to be noted
        raise UnavailableError(f"node {self._peer.node} is not dialled any more")


class _Peer:
    """A node we dial."""

    def __init__(self, hub: Transport, node: int, address: tuple[str, int]) -> None:
        self.node = node
        self.address = address
        self.certificate_expires: datetime | None = None
        lanes = [Lane.BULK] if hub.node == CLIENT else list(Lane)
        self.links = {lane: _Link(hub, self, lane) for lane in lanes}

    def abort(self, text: str) -> None:
        """Drops every connection to it."""
        for link in self.links.values():
            if link.connection is not None:
                link.connection.abort(text)

    def stop(self) -> None:
        """Dials it no more."""
        for link in self.links.values():
            link.stop()

    def info(self, now: datetime) -> PeerInfo:
        errors = [link.error for link in self.links.values() if link.connection is None]
        first = next(iter(self.links.values()))
        return PeerInfo(
            address=self.address,
            connected=not errors,
            rtt_seconds=first.rtt_seconds,
            queued_bytes={lane: link.queued_bytes for lane, link in self.links.items()},
            error=errors[0] if errors else "",
            certificate_days=days_left(self.certificate_expires, now=now)
            if self.certificate_expires
            else None,
        )


# --- connections that come in ----------------------------------------------------------------------


class _Inbound:
    """A lane somebody dialled to us, after it was admitted."""

    def __init__(self, hub: Transport, connection: Connection, hello: Hello) -> None:
        self._hub = hub
        self._last_id = 0
        self._answering: set[asyncio.Task[None]] = set()
        self._bytes = 0  # of attachments of what is being answered
        self._pong_end = 0  # where in what was sent the last answer to a ping ends
        self._written = -1
        self._stalled = 0
        self.connection = connection
        self.hello = hello

    def on_frame(self, frame: Frame) -> None:
        """Passes a message on."""
        match frame:
            case Raft():
                self._on_raft(frame)
            case Request():
                self._on_request(frame)
            case Ping():
                self._on_ping(frame)
            case Goodbye():
                self.connection.abort(f"ended there: {frame.text}")
            case _:
                raise WireError(f"{type(frame).__name__} on a connection that asks")

    def _on_ping(self, frame: Ping) -> None:
        if self.connection.written < self._pong_end:
            raise WireError("a ping before the last one was answered")
        self.connection.send(encode_pong(frame.token))
        self._pong_end = self.connection.sent

    def _on_raft(self, frame: Raft) -> None:
        if self.hello.lane is Lane.BULK:
            raise WireError("a Raft message on the lane of requests")
        try:
            self._hub.handler.on_raft(self.hello.node, frame.group, frame.message, frame.blobs)
        except Exception as error:  # whatever it provokes, the loop and other connections stay
            raise WireError(f"a Raft message could not be taken: {_described(error)}") from error

    def _on_request(self, request: Request) -> None:
        if self.hello.lane is not Lane.BULK:
            raise WireError("a request on a lane of Raft messages")
        if request.id <= self._last_id:
            raise WireError(f"request {request.id} after request {self._last_id}: replayed")
        self._last_id = request.id
        size = sum(map(len, request.attachments))
        self._bytes += size
        task = asyncio.get_running_loop().create_task(self._answer(request))
        self._answering.add(task)
        task.add_done_callback(lambda done: self._answered(done, size))
        limits = self._hub.limits
        if len(self._answering) >= limits.requests_max or self._bytes >= limits.request_bytes:
            self.connection.hold()

    def _answered(self, task: asyncio.Task[None], size: int) -> None:
        self._answering.discard(task)
        self._bytes -= size
        limits = self._hub.limits
        if 2 * len(self._answering) <= limits.requests_max and 2 * self._bytes <= limits.request_bytes:
            self.connection.release()

    async def _answer(self, request: Request) -> None:
        try:
            body, attachments = await self._hub.handler.on_request(
                self.hello.node, request.method, request.body, request.attachments
            )
            frame = encode_response(request.id, body, attachments)
        except SpaceError as error:
            frame = encode_failure(request.id, error)
        except Exception as error:  # noqa: BLE001 - one request may fail, the node has others
            _log.exception("request %s of node %d failed", request.method, self.hello.node)
            frame = encode_failure(request.id, SpaceError(_described(error)))
        await self.connection.room(self._hub.limits.bulk_bytes)
        self.connection.send(frame)

    def tick(self) -> None:
        """Looks whether answers are taken, and whether there is still somebody to take them."""
        if self.connection.is_left:
            self.connection.abort("the other side closed the connection")
        stuck = self.connection.queued_bytes > 0 and self.connection.written == self._written
        self._stalled = self._stalled + 1 if stuck else 0
        self._written = self.connection.written
        if self._stalled >= self._hub.limits.stalled_pings:
            self.connection.abort("answers are not taken")

    async def ended(self) -> None:
        """Waits for the end of the connection and of what was being answered on it."""
        await self.connection.closed.wait()
        tasks = list(self._answering)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# --- all of them -----------------------------------------------------------------------------------


class Transport:
    """The connections of one node; see the page above."""

    def __init__(
        self,
        *,
        node: int,
        cluster: bytes,
        listen: tuple[str, int] | None,
        handler: Handler,
        tls: Tls | None,
        limits: Limits = Limits(),
        advertise: tuple[str, int] | None = None,
        random: Random | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """A transport that is not started yet.

        Arguments:
            node: our number, or :data:`CLIENT` to ask only.
            cluster: its id, 16 bytes.
            listen: host and port, where port 0 is any; nothing for a client.
            handler: whom messages are for.
            tls: our credentials; without, anybody who can reach the port can do anything.
            advertise: where others reach us, if not where we listen.
            random: spreads attempts to dial.
            now: tells the days certificates have left.

        Raises:
            UsageError: the credentials are those of another node or cluster.
        """
        if tls is not None and (tls.identity.cluster, tls.identity.node) != (cluster, node):
            raise UsageError(f"the certificate of {tls.identity} is not that of node {node} of this cluster")
        self.node = node
        self.limits = limits
        self.handler = handler
        self.tls = tls
        self.stats = Stats()
        self.random = random or Random()
        self._cluster = cluster
        self._listen = listen
        self._advertise = advertise
        self._now = now
        self._listener: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._running = False
        self._addresses: dict[int, tuple[str, int]] = {}
        self._peers: dict[int, _Peer] = {}
        self._strangers: OrderedDict[socket.socket, Connection] = OrderedDict()
        self._inbound: set[_Inbound] = set()
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._unreachable: set[int] = set()
        self._complaints: OrderedDict[tuple[str, str], float] = OrderedDict()

    # --- what the node does

    async def start(self) -> None:
        """Listens, and dials the peers that are known.

        Raises:
            StorageError: the address cannot be listened on.
            UsageError: there is no such port.
        """
        if self._listen is not None:
            self._listener = _listener(self._listen)
            asyncio.get_running_loop().add_reader(self._listener, self._accept)
        self._running = True
        for node, address in self._addresses.items():
            self._peers[node] = _Peer(self, node, address)
        self._tick()
        if self.tls is not None and (days := days_left(self.tls.expires, now=self._now())) < WARNING_DAYS:
            _log.warning("the certificate of this node ends in %d days", days)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that are listened on; an empty host and 0 if none."""
        if self._listener is None:
            return "", 0
        host, port, *_ = self._listener.getsockname()
        return str(host), int(port)

    def set_peer(self, node: int, host: str, port: int) -> None:
        """Dials a node there from now on.

        Raises:
            UsageError: it is this node, or there is no such port.
        """
        self._not_ourselves(node)
        if node == CLIENT or not 0 < port < 1 << 16:
            raise UsageError(f"node {node} at {host}:{port} cannot be dialled")
        if self._addresses.get(node) == (host, port):
            return
        self.forget_peer(node)
        self._addresses[node] = host, port
        if self._running:
            self._peers[node] = _Peer(self, node, (host, port))

    def forget_peer(self, node: int) -> None:
        """Dials a node no more; what it sends is still taken."""
        self._addresses.pop(node, None)
        peer = self._peers.pop(node, None)
        if peer is not None:
            peer.stop()

    def send_raft(
        self, node: int, group: int, message: bytes, blobs: Sequence[Blob] = (), *, urgent: bool
    ) -> bool:
        """Sends a Raft message if it can leave or be queued; says whether it could.

        If not, :meth:`Handler.on_unreachable` is called soon.

        Raises:
            UsageError: it is to this node, or larger than a frame may be.
        """
        self._not_ourselves(node)
        lane = Lane.URGENT if urgent else Lane.LOG
        peer = self._peers.get(node)
        connection = peer.links[lane].connection if peer and lane in peer.links else None
        if (
            connection is None
            or not connection.is_open
            or connection.queued_bytes > self.limits.lane_bytes(lane)
        ):
            self.stats.dropped += 1
            self.unreachable(node)
            return False
        connection.send(encode_raft(group, message, blobs))
        return True

    async def request(
        self,
        node: int,
        method: str,
        body: Any,
        attachments: Sequence[Buffer] = (),
        *,
        timeout: float,  # noqa: ASYNC109 - an error that says what is not known, not a bare TimeoutError
    ) -> tuple[Any, list[Buffer]]:
        """Asks a node, and gives its answer; waits for a connection and for room, ``timeout`` seconds in all.

        Raises:
            UnavailableError: no answer came in time, or the connection was lost: whether it was carried out is
                not known; or there is no such peer.
            UsageError: it is to this node, or cannot be sent.
            SpaceError: what the other side raised.
        """
        self._not_ourselves(node)
        peer = self._peers.get(node)
        if peer is None:
            raise UnavailableError(f"no address of node {node} is known")
        link = peer.links[Lane.BULK]
        try:
            async with asyncio.timeout(timeout):
                return await link.request(method, body, attachments)
        except TimeoutError:
            reason = f" ({link.error})" if link.error else ""
            raise _unknown(f"node {node} did not answer {method} within {timeout:g} s{reason}") from None

    def peers(self) -> dict[int, PeerInfo]:
        """What is known of the peers that are dialled."""
        now = self._now()
        return {node: peer.info(now) for node, peer in self._peers.items()}

    def callers(self) -> dict[int, tuple[str, int]]:
        """Nodes that are connected to us, and where they say they can be reached."""
        hellos = (inbound.hello for inbound in self._inbound)
        return {
            hello.node: (hello.host, hello.port) for hello in hellos if hello.node != CLIENT and hello.port
        }

    async def close(self) -> None:
        """Ends every connection and task; requests that wait end with an error."""
        self._running = False
        if self._timer is not None:
            self._timer.cancel()
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for peer in self._peers.values():
            peer.stop()
        for inbound in self._inbound:
            inbound.connection.end(Reason.CLOSING, "this node stops")
        for sock in list(self._strangers):
            _hang_up(sock)
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(connection.closed.wait() for connection in self._connections))

    # --- what its parts use

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs something that :meth:`close` waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def make(
        self, making: Coroutine[Any, Any, object], sock: socket.socket, connection: Connection
    ) -> None:
        """Waits for a handshake.

        It is never cancelled: uvloop would then close a connection that was just made without saying so to its
        protocol.  When it is given up, its socket is hung up, and it ends by itself.
        """
        inode = os.fstat(sock.fileno()).st_ino

        async def made() -> None:
            try:
                await making
            finally:
                if not connection.is_made:
                    _let_go(sock, inode)

        task = self.spawn(made())
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if _is_open(sock, inode):
                _hang_up(sock)
            await asyncio.wait({task})
            _ = task.cancelled() or task.exception()  # it is known why
            raise

    def connection(self) -> Connection:
        """A connection that is to be made."""
        return Connection(self.stats, self._connections.add, self._connections.discard)

    def hello(self, lane: Lane) -> Hello:
        """Our introduction."""
        host, port = self._advertise or self.address
        return Hello(self._cluster, self.node, lane, host, port)

    def check(
        self, hello: Hello, connection: Connection, *, called: tuple[int, Lane] | None = None
    ) -> datetime | None:
        """Whether somebody, or the node that was called, may be admitted; gives the end of its certificate.

        Raises:
            WireError: and why not.
        """
        agree(hello.versions)
        if called is not None and (hello.node, hello.lane) != called:
            raise WireError(f"node {hello.node} answers for node {called[0]}", reason=Reason.NODE)
        if hello.cluster != self._cluster:
            raise WireError("this is another cluster", reason=Reason.CLUSTER)
        if hello.node == self.node:
            raise WireError(f"this is node {self.node} itself", reason=Reason.NODE)
        if hello.node == CLIENT and hello.lane is not Lane.BULK:
            raise WireError("a client may ask, and nothing else", reason=Reason.NODE)
        if self.tls is None:
            return None
        identity, expires = peer_identity(connection.peer_certificate)
        if (identity.cluster, identity.node) != (hello.cluster, hello.node):
            raise WireError(f"the certificate is of {identity}", reason=Reason.CERTIFICATE)
        if (days := days_left(expires, now=self._now())) < WARNING_DAYS:
            self.complain(str(identity), "certificate", f"has a certificate that ends in {days} days")
        return expires

    def unreachable(self, node: int) -> None:
        """Tells the handler, once in this turn of the loop and never while it is sending."""
        if node not in self._unreachable:
            self._unreachable.add(node)
            asyncio.get_running_loop().call_soon(self._tell_unreachable, node)

    def _tell_unreachable(self, node: int) -> None:
        self._unreachable.discard(node)
        if self._running:
            self.handler.on_unreachable(node)

    def complain(self, who: str, reason: str, text: str) -> None:
        """Logs what somebody did, at most once a minute for each reason."""
        now = time.monotonic()
        if (
            self._complaints.get((who, reason), -COMPLAINT_SECONDS) + COMPLAINT_SECONDS > now
            or not self._running
        ):
            return
        self._complaints[who, reason] = now
        self._complaints.move_to_end((who, reason))
        if len(self._complaints) > COMPLAINTS_MAX:
            self._complaints.popitem(last=False)
        _log.warning("%s %s", who, text)

    def _not_ourselves(self, node: int) -> None:
        if node == self.node:
            raise UsageError(f"node {node} does not talk to itself")

    def _tick(self) -> None:
        for peer in self._peers.values():
            for link in peer.links.values():
                link.tick()
        for inbound in self._inbound:
            inbound.tick()
        self._timer = asyncio.get_running_loop().call_later(self.limits.ping_seconds, self._tick)

    # --- who comes in

    def _accept(self) -> None:
        assert self._listener is not None
        for _ in range(ACCEPTS):
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self.complain("this node", "accept", f"cannot take connections: {_described(error)}")
                self._rest(self._listener)
                return
            if len(self._strangers) >= self.limits.strangers_max:
                oldest, _ = self._strangers.popitem(last=False)
                _hang_up(oldest)
            sock.setblocking(False)
            connection = self._strangers[sock] = self.connection()
            _ = self.spawn(self._serve(sock, connection))

    def _rest(self, listener: socket.socket) -> None:
        """Stops accepting for a moment: the listener would stay readable, and this loop busy."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)
        loop.call_later(BUSY_SECONDS, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        if self._running:
            asyncio.get_running_loop().add_reader(listener, self._accept)

    async def _serve(self, sock: socket.socket, connection: Connection) -> None:
        """Everything about one connection that came in, from its first to its last byte."""
        try:
            host = sock.getpeername()[0]
        except OSError:
            host = "?"
        try:
            inbound = await self._admit(sock, connection)
        except WireError as error:
            self._refuse(host, connection, error.reason, str(error))
        except TimeoutError:
            self._refuse(host, connection, Reason.SILENT, "no introduction in time")
        except (OSError, SpaceError) as error:
            self._refuse(host, connection, Reason.OTHER, _described(error))
        else:
            await self._attend(inbound)
        finally:
            self._strangers.pop(sock, None)

    def _refuse(self, host: str, connection: Connection, reason: Reason, text: str) -> None:
        self.stats.refused += 1
        connection.end(reason, text)
        self.complain(host, reason.name, f"was refused: {text}")

    async def _admit(self, sock: socket.socket, connection: Connection) -> _Inbound:
        tls = self.tls.server if self.tls else None
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self.limits.hello_seconds):
            await self.make(loop.connect_accepted_socket(lambda: connection, sock, ssl=tls), sock, connection)
            hello = await connection.introduction()
        self.check(hello, connection)
        inbound = _Inbound(self, connection, hello)
        self._replace(hello)
        if len(self._inbound) >= self.limits.connections_max:
            raise WireError("as many connections as can be are open already", reason=Reason.BUSY)
        self._strangers.pop(sock, None)
        self._inbound.add(inbound)
        return inbound

    def _replace(self, hello: Hello) -> None:
        """A node that opens a lane anew has lost the one it had, whether or not that shows here."""
        for inbound in list(self._inbound):
            if hello.node != CLIENT and (inbound.hello.node, inbound.hello.lane) == (hello.node, hello.lane):
                inbound.connection.end(Reason.REPLACED, "the same node has connected again")
                self._inbound.discard(inbound)

    async def _attend(self, inbound: _Inbound) -> None:
        hello, connection = inbound.hello, inbound.connection
        self.stats.accepted += 1
        connection.send(encode_hello(self.hello(hello.lane)))
        connection.admit(inbound.on_frame)
        peer = self._peers.get(hello.node)
        if peer is not None:
            for link in peer.links.values():
                link.wake()
        try:
            await inbound.ended()
        finally:
            self._inbound.discard(inbound)
        who = f"node {hello.node}" if hello.node != CLIENT else "a client"
        if connection.broken:
            self.complain(who, "protocol", f"was cut off: {connection.error}")


def _listener(address: tuple[str, int]) -> socket.socket:
    if not 0 <= address[1] < 1 << 16:
        raise UsageError(f"there is no port {address[1]}")
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    try:
        listener = socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        raise StorageError(f"cannot listen on {address[0]}:{address[1]}: {_described(error)}") from None
    listener.setblocking(False)
    return listener


async def _dialled(host: str, port: int) -> socket.socket:
    """A socket that is connected there, by the first address that answers."""
    loop = asyncio.get_running_loop()
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:  # a name: that may take a while, in another thread
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    reason = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, address)
        except OSError as error:
            reason = error
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise reason


def _is_open(sock: socket.socket, inode: int) -> bool:
    """Whether the descriptor in a socket is that socket still, and not somebody else's by now."""
    try:
        return os.fstat(sock.fileno()).st_ino == inode
    except OSError:
        return False


def _let_go(sock: socket.socket, inode: int) -> None:
    """Closes a socket that the loop was given, unless the loop has.

    Where the first write of a handshake fails, uvloop 0.23 closes the descriptor and leaves its number in the socket,
    which would close it once more when nobody refers to it: whatever file of this process has that number by then.
    """
    if _is_open(sock, inode):
        sock.close()
    else:
        sock.detach()


def _hang_up(sock: socket.socket) -> None:
    """Ends a connection, whoever owns its socket by now: the owner reads its end and cleans up.

    Only reading is shut down: where the first write of a handshake fails, uvloop 0.23 loses the descriptor.
    """
    with contextlib.suppress(OSError):  # the other side was faster
        sock.shutdown(socket.SHUT_RD)


def _described(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno).lower()  # asyncio's own text is about its call
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return text or type(error).__name__


def _unknown(text: str) -> UnavailableError:
    return UnavailableError(text, hint="whether it was carried out is not known")
