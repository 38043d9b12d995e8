"""The receiving side: an asyncio shell that hands what other zones send to a :class:`Receiver`.

See :mod:`space.federation.exchange` for what is said.  A shipment is held in memory as a whole, and those of one zone
that were read ahead take :data:`AHEAD_BYTES` besides; who sends faster than they become durable waits in TCP.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Protocol, TypeGuard

import aiohttp
import attrs
from aiohttp import web

from space._errors import ErrorKind, RefusedError, SpaceError, UnavailableError, UsageError, error_document
from space.federation.exchange import (
    AUTHORITY,
    CURSORS,
    DOCUMENT_BYTES_MAX,
    FRAME,
    HEIR,
    HOMES,
    IDENTITY,
    PULSE,
    PULSE_BYTES_MAX,
    REACHED,
    SHIP,
    SHIPMENT,
    SILENCE_SECONDS,
    Document,
    Peer,
    parse_document,
)
from space.federation.shelf import Shelf
from space.federation.shelf_routes import ShelfRoutes

AHEAD: Final = 64
AHEAD_BYTES: Final = 16 << 20
"""Frames of one zone that are read while others become durable; they share an fdatasync."""

READ_BYTES: Final = 1 << 20
"""Bytes of a connection that may wait to be looked at: with fewer, reading stops again and again."""

STATUSES: Final[dict[ErrorKind, int]] = {
    ErrorKind.FAILED: 500,
    ErrorKind.USAGE: 400,
    ErrorKind.NOT_FOUND: 404,
    ErrorKind.CONFLICT: 409,
    ErrorKind.REFUSED: 403,
    ErrorKind.CORRUPT: 422,  # what came, not what is here
    ErrorKind.UNAVAILABLE: 503,
}

log: Final = logging.getLogger("space.federation")


@attrs.frozen
class Received:
    """What came of some shipments, taken in order.

    Attributes:
        cursors: the cursor of its stream after each that was taken, in order; durable after :meth:`Receiver.settle`.
        error: why the next one was not.
    """

    cursors: Sequence[Document]
    error: SpaceError | None = None


class Receiver(Protocol):
    """The zone, as other zones see it.  Every method may take its time and is called on a thread."""

    def recognise(self, certificate: bytes) -> Peer:
        """The added zone a certificate (DER) proves.

        Raises:
            RefusedError: it proves none.
        """

    def identity(self, peer: Peer) -> Document:
        """Who answers, and what it knows of ``peer``."""

    def cursors(self, peer: Peer) -> Document:
        """How far each stream of ``peer`` has come."""

    def receive(self, peer: Peer, shipments: Sequence[bytes]) -> Received:
        """Takes shipments in order, up to the first that has to be refused."""

    def settle(self) -> None:
        """Returns when all shipments that were taken are durable; others may be taken meanwhile."""

    def heard(self, peer: Peer, pulse: Document) -> None:
        """Notes where the log of ``peer`` ends."""

    def reached(self, peer: Peer, capsules: Sequence[str]) -> Document:
        """How far capsules of ``peer`` (ids, hexadecimal) have come: position and whether they are there, of each.

        Raises:
            UsageError: those are no ids, or too many.
        """

    def homes(self, peer: Peer, capsules: Sequence[tuple[str, int]], declined: int) -> Document:
        """Which capsules of ``peer`` are here, and which have or had their home here by now.

        Each is an id, hexadecimal, and the position of that zone's log at which its home was given away, or 0.
        Before that, no home is taken any more that was given away up to position ``declined``.

        Raises:
            UsageError: those are no ids, or too many.
        """

    def inherits(self, peer: Peer, told: Document) -> Document:
        """Follows ``peer`` for what it took over from a third zone, once it has told all of it; and its cursors then.

        Raises:
            UsageError: it is no part of that.
            SpaceError: this zone cannot follow it.
        """

    def take_authority(self, peer: Peer, pem: bytes, signature: bytes) -> Document:
        """Trusts other certificates of ``peer`` from now on.

        Raises:
            RefusedError: the signature is not of the authority known so far.
        """


class FederationServer:
    """Answers other zones, in the loop it was made in."""

    def __init__(
        self, receiver: Receiver, tls: ssl.SSLContext, *, shipment_bytes_max: int, shelf: Shelf | None = None
    ) -> None:
        self._receiver = receiver
        self._limits = {SHIPMENT: shipment_bytes_max, PULSE: PULSE_BYTES_MAX}
        self._tls = tls
        self._shelf = shelf
        self._streams: dict[bytes, asyncio.Task[Any]] = {}
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int) -> int:
        """Begins to listen; returns the port.

        Raises:
            UnavailableError: the address cannot be listened on.
        """
        application = web.Application(middlewares=[_errors], client_max_size=DOCUMENT_BYTES_MAX)
        application.router.add_get(IDENTITY, self._identity)
        application.router.add_get(CURSORS, self._cursors)
        application.router.add_post(REACHED, self._reached)
        application.router.add_post(HOMES, self._homes)
        application.router.add_post(HEIR, self._heir)
        application.router.add_post(AUTHORITY, self._authority)
        application.router.add_post(SHIP, self._ship)
        if self._shelf is not None:
            ShelfRoutes(self._shelf, self._peer).add_to(application)
        runner = web.AppRunner(
            application,
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=1.0,
            read_bufsize=READ_BYTES,
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port, ssl_context=self._tls).start()
        except OSError as error:
            await runner.cleanup()
            raise UnavailableError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
        self._runner = runner
        return int(runner.addresses[0][1])

    async def close(self) -> None:
        """Hangs up on everybody."""
        for task in self._streams.values():
            task.cancel()
        if self._runner is not None and self._runner.server is not None:
            for connection in self._runner.server.connections:
                if connection.transport is not None:
                    # TLS would wait for the other side to say goodbye as well
                    with contextlib.suppress(AttributeError):  # of one closed twice, in Python 3.11.2
                        connection.transport.abort()
            await self._runner.cleanup()
        await asyncio.sleep(0)

    async def _peer(self, request: web.Request) -> Peer:
        transport = request.transport
        tls = None if transport is None else transport.get_extra_info("ssl_object")
        certificate = None if tls is None else tls.getpeercert(binary_form=True)
        if certificate is None:
            raise RefusedError("a connection without a certificate")
        return await asyncio.to_thread(self._receiver.recognise, certificate)

    async def _identity(self, request: web.Request) -> web.StreamResponse:
        peer = await self._peer(request)
        return web.json_response(await asyncio.to_thread(self._receiver.identity, peer))

    async def _cursors(self, request: web.Request) -> web.StreamResponse:
        peer = await self._peer(request)
        found = await asyncio.to_thread(self._receiver.cursors, peer)
        await asyncio.to_thread(self._receiver.settle)
        return web.json_response(found)

    async def _reached(self, request: web.Request) -> web.StreamResponse:
        peer = await self._peer(request)
        async with asyncio.timeout(SILENCE_SECONDS):
            asked = parse_document(await request.read()).get("capsules")
        if not isinstance(asked, list) or not all(isinstance(each, str) for each in asked):
            raise UsageError("not a question about capsules", hint="is the other zone newer?")
        return web.json_response(await asyncio.to_thread(self._receiver.reached, peer, asked))

    async def _homes(self, request: web.Request) -> web.StreamResponse:
        peer = await self._peer(request)
        async with asyncio.timeout(SILENCE_SECONDS):
            found = parse_document(await request.read())
        declined = found.get("declined")
        if not _is_position(declined):
            raise UsageError("not a position", hint="is the other zone newer?")
        given = _given(found.get("capsules"))
        return web.json_response(await asyncio.to_thread(self._receiver.homes, peer, given, declined))

    async def _heir(self, request: web.Request) -> web.StreamResponse:
        peer = await self._peer(request)
        async with asyncio.timeout(SILENCE_SECONDS):
            told = parse_document(await request.read())
        return web.json_response(await asyncio.to_thread(self._receiver.inherits, peer, told))

    async def _authority(self, request: web.Request) -> web.StreamResponse:
        peer = await self._peer(request)
        async with asyncio.timeout(SILENCE_SECONDS):
            found = parse_document(await request.read())
        try:
            pem, signature = str(found["authority"]).encode("ascii"), bytes.fromhex(found["signature"])
        except (KeyError, TypeError, ValueError):
            raise UsageError("not an offer of an authority", hint="is the other zone newer?") from None
        return web.json_response(await asyncio.to_thread(self._receiver.take_authority, peer, pem, signature))

    # --- a stream of shipments -------------------------------------------------------------------

    async def _ship(self, request: web.Request) -> web.StreamResponse:
        peer = await self._peer(request)
        await self._replace(peer)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        queue = _Ahead()
        reading = asyncio.create_task(_read_frames(request.content, queue, self._limits))
        try:
            await self._take(peer, queue, response)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            if self._streams.get(peer.id) is asyncio.current_task():
                del self._streams[peer.id]
        with contextlib.suppress(ConnectionError):
            await response.write_eof()
        response.force_close()
        return response

    async def _replace(self, peer: Peer) -> None:
        """Hangs up on the stream a zone has had so far: it has lost that one, or it would not begin another."""
        before = self._streams.get(peer.id)
        task = asyncio.current_task()
        assert task is not None
        self._streams[peer.id] = task
        if before is not None:
            before.cancel()
            await asyncio.wait([before])

    async def _take(self, peer: Peer, queue: _Ahead, response: web.StreamResponse) -> None:
        """Answers frames in order until they end or one is refused; looks at some while those before become durable."""
        over = False
        answering: asyncio.Task[bool] | None = None
        try:
            while not over:
                found = await queue.take()
                lines: list[Document] = []
                try:
                    for kind, group in itertools.groupby(found, key=lambda each: each.kind):
                        over = await self._take_group(peer, kind, list(group), lines)
                except SpaceError as error:
                    over = True
                    lines.append({"error": error_document(error)})
                if answering is not None and not await answering:
                    return
                answering = asyncio.create_task(self._answer(lines, response))
            if answering is not None:
                await answering
        finally:
            if answering is not None:
                answering.cancel()
                await asyncio.gather(answering, return_exceptions=True)

    async def _answer(self, lines: list[Document], response: web.StreamResponse) -> bool:
        """Answers once what was taken is durable; False if it does not become so."""
        settled = True
        if any("cursor" in line for line in lines):
            try:
                await asyncio.to_thread(self._receiver.settle)
            except SpaceError as error:
                lines, settled = [{"error": error_document(error)}], False
        await response.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        return settled

    async def _take_group(self, peer: Peer, kind: int, frames: list[_Frame], lines: list[Document]) -> bool:
        """Frames of one kind; whether they are the last.

        Raises:
            SpaceError: one is refused.
        """
        if kind == SHIPMENT:
            received = await asyncio.to_thread(self._receiver.receive, peer, [each.body for each in frames])
            lines += [{"cursor": cursor} for cursor in received.cursors]
            if received.error is not None:
                log.warning("a shipment of zone %s was refused: %s", peer.name, received.error)
                raise received.error
            return False
        if kind == PULSE:
            for each in frames:
                await asyncio.to_thread(self._receiver.heard, peer, parse_document(each.body))
                lines.append({"pulse": {}})
            return False
        if frames[0].error is not None:
            raise frames[0].error
        return True


def _is_position(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 63


def _given(asked: Any) -> list[tuple[str, int]]:
    """Capsules, each with where its home was given away.

    Raises:
        UsageError: it is something else.
    """
    found = []
    for each in asked if isinstance(asked, list) else [None]:
        if not (
            isinstance(each, list) and len(each) == 2 and isinstance(each[0], str) and _is_position(each[1])
        ):
            raise UsageError("not a question about capsules", hint="is the other zone newer?")
        found.append((each[0], each[1]))
    return found


@attrs.frozen
class _Frame:
    """A frame that came, or the end of them: without a kind, and with what is wrong if something is."""

    kind: int = 0
    body: bytes = b""
    error: SpaceError | None = None


class _Ahead:
    """Frames that were read and not looked at."""

    def __init__(self) -> None:
        self._frames: list[_Frame] = []
        self._moved = asyncio.Condition()

    async def put(self, found: _Frame) -> None:
        """Adds a frame; returns when one more may be read."""
        async with self._moved:
            self._frames.append(found)
            self._moved.notify_all()
            await self._moved.wait_for(self._has_room)

    def _has_room(self) -> bool:
        return len(self._frames) < AHEAD and sum(len(each.body) for each in self._frames) < AHEAD_BYTES

    async def take(self) -> list[_Frame]:
        """All that there are, when there are some."""
        async with self._moved:
            await self._moved.wait_for(lambda: self._frames)
            found, self._frames = self._frames, []
            self._moved.notify_all()
            return found


async def _read_frames(content: aiohttp.StreamReader, queue: _Ahead, limits: Mapping[int, int]) -> None:
    """Frames of a body, and their end."""
    try:
        while True:
            head = await _exactly(content, FRAME.size)
            if not head:
                await queue.put(_Frame())
                return
            kind, length = FRAME.unpack(head)
            if length > limits.get(kind, -1):
                raise UsageError(f"not a frame: kind {kind}, {length} bytes")
            await queue.put(_Frame(kind, await _exactly(content, length)))
    except SpaceError as error:
        await queue.put(_Frame(error=error))
    except TimeoutError:
        await queue.put(_Frame(error=UnavailableError(f"nothing came for {SILENCE_SECONDS:.0f} s")))
    except (OSError, aiohttp.ClientError, web.HTTPException) as error:
        await queue.put(_Frame(error=UnavailableError(f"the connection broke: {error}")))


async def _exactly(content: aiohttp.StreamReader, size: int) -> bytes:
    """So many bytes; none where the body ends before the first of them.

    Raises:
        UsageError: it ends in between.
        TimeoutError: nothing comes for a while; how long all of it takes is the other side's bandwidth.
    """
    found: list[bytes] = []
    missing = size
    while missing:
        async with asyncio.timeout(SILENCE_SECONDS):
            piece = await content.read(missing)
        if not piece and found:
            raise UsageError("the stream ended in the middle of a frame")
        if not piece:
            break
        found.append(piece)
        missing -= len(piece)
    return b"".join(found)


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Errors as documents."""
    try:
        return await handler(request)
    except SpaceError as error:
        return web.json_response({"error": error_document(error)}, status=STATUSES[error.kind])
    except TimeoutError:
        late = UsageError("the request ended before its end")
        return web.json_response({"error": error_document(late)}, status=400)
