"""The sending side: for each zone a task that keeps it up to date for as long as it runs, in an asyncio loop.

A task connects, asks how far every stream has come there, and sends what a :class:`Source` gives it, frame after
frame over one request, several ahead of the answers.  Whatever goes wrong, it asks again after a while, with more
and more time between attempts and never at the same moments as others: a zone may be away for days.  What to send,
in which order, and where to go on, is the source's to know; nothing about that is kept here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol, TypeAlias, TypeVar

import aiohttp
import attrs

from space._errors import SpaceError, UnavailableError
from space.federation.exchange import (
    AUTHORITY,
    CURSORS,
    DOCUMENT_BYTES_MAX,
    IDENTITY,
    LINE_BYTES_MAX,
    PULSE,
    PULSE_SECONDS,
    SHIP,
    SHIPMENT,
    SILENCE_SECONDS,
    VERSION,
    Backoff,
    Document,
    Throttle,
    addresses,
    error_in,
    frame,
    parse_document,
)

CONNECT_SECONDS: Final = 10.0
MEET_SECONDS: Final = 10.0
"""How long an address may take to say who is there: a node that knows no leader waits for one."""

RETRY_FIRST_SECONDS: Final = 0.1
RETRY_LIMIT_SECONDS: Final = 15.0
"""A zone that was away for days is found again within so many seconds."""

FLIGHT_BYTES_MAX: Final = 16 << 20
"""Shipped and not yet answered: fills 600 Mbit/s at 200 ms; what is lost with a connection is sent again."""

FLIGHT_SHIPMENTS_MAX: Final = 64
"""Likewise for small ones: each is an entry of the receiver's log and a row of our own memory."""

PIECE_BYTES: Final = 64 << 10
"""What is sent at once: the unit in which bandwidth is limited."""

QUICK_PIECE_BYTES: Final = 256 << 10
QUICK_SECONDS: Final = 0.1
"""What is sent at once, bandwidth not limited, after a piece that took no longer: each costs a turn of the loop."""

RATE_SECONDS: Final = 10.0
"""Throughput is told over so much time."""

_T = TypeVar("_T")
_Meeting: TypeAlias = "asyncio.Task[tuple[aiohttp.ClientSession, Document]]"
"""Asks at an address; a session that leads there, and who answered."""

log: Final = logging.getLogger("space.federation")


@attrs.frozen
class Outgoing:
    """A shipment on its way.

    Attributes:
        body: its bytes.
        token: what the source knows it by.
    """

    body: bytes
    token: Any = None


class Source(Protocol):
    """What one zone is to be sent.

    Methods may take their time; all but :meth:`settle` are called on one thread, one by one.
    """

    def connected(self, identity: Document, cursors: Document) -> None:
        """Takes note of who answers and how far its streams have come; shipping begins there.

        Raises:
            SpaceError: nothing can be shipped to that zone as it is.
        """

    def offer(self, identity: Document) -> tuple[bytes, bytes] | None:
        """Authorities the zone is to trust and does not yet, with the signature of one that it knows."""

    def next(self) -> Outgoing | None:
        """The next shipment, recorded as sent; None while there is nothing to send."""

    def settle(self, sent: Outgoing) -> None:
        """Returns when the record of a shipment is durable; called on another thread, beside the other methods."""

    def acknowledged(self, sent: Outgoing, cursor: Document) -> None:
        """Takes note that a shipment, the oldest under way, is durable there, and its record here.

        Raises:
            SpaceError: the zone says it has come to where it was not sent.
        """

    def refused(self, error: SpaceError) -> None:
        """Takes note why the zone refused the oldest shipment under way; the connection ends then."""

    def pulse(self) -> Document:
        """Where the log ends."""


@attrs.define
class LinkStatus:
    """How the connection to one zone is.

    Attributes:
        connected: whether shipments are taken there now.
        at: the address they are taken at, or were last.
        error: why the last attempt ended; empty since the last success.
        error_ns: when, nanoseconds since 1970.
        rtt_seconds: round trip of the last pulse or question; None before the first.
        flight_bytes: sent and not yet answered.
        sent_bytes, shipments: acknowledged since the process began.
    """

    connected: bool = False
    at: str = ""
    error: str = ""
    error_ns: int = 0
    rtt_seconds: float | None = None
    flight_bytes: int = 0
    sent_bytes: int = 0
    shipments: int = 0
    _recent: deque[tuple[float, int]] = attrs.field(factory=deque, repr=False)

    def sent(self, size: int, now: float) -> None:
        """Notes an acknowledged shipment."""
        self.sent_bytes += size
        self.shipments += 1
        self._recent.append((now, size))
        while self._recent and (self._recent[0][0] < now - RATE_SECONDS or len(self._recent) > 10_000):
            self._recent.popleft()

    def throughput(self, now: float) -> float:
        """Acknowledged bytes a second, of late."""
        return sum(size for when, size in list(self._recent) if when >= now - RATE_SECONDS) / RATE_SECONDS


@attrs.define
class Target:
    """A zone to ship to: where it is (see :func:`addresses`), how it is known, and how fast it may go."""

    name: str
    url: str
    tls: ssl.SSLContext
    source: Source
    throttle: Throttle


class Shipper:
    """Keeps one zone up to date.  Made and run in one loop."""

    def __init__(
        self, target: Target, *, chance: Callable[[], float], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.status = LinkStatus()
        self.retry_limit = RETRY_LIMIT_SECONDS
        self._target = target
        self._source = target.source
        self._chance = chance
        self._monotonic = monotonic
        self._wake = asyncio.Event()
        self.listens = False
        """Whether :meth:`wake` is of any use: before it connects it has nothing to do, and then it looks by itself."""
        # One thread: what was asked for in a connection that broke has ended before the next one begins.
        self._thread = ThreadPoolExecutor(1, f"space-ship-{target.name}")
        # One more, so that the next shipment is made while the record of an earlier one becomes durable.
        self._settling = ThreadPoolExecutor(1, f"space-settle-{target.name}")
        self._moved = 0.0
        """When bytes last went or came."""

    async def _call(self, work: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def wake(self) -> None:
        """There may be something to ship."""
        self._wake.set()

    async def run(self) -> None:
        """Ships until it is cancelled."""
        backoff = Backoff(RETRY_FIRST_SECONDS, self.retry_limit)
        try:
            await self._run(backoff)
        finally:
            self._thread.shutdown(wait=False)
            self._settling.shutdown(wait=False)

    async def _run(self, backoff: Backoff) -> None:
        while True:
            try:
                await self._session(backoff)
                self._failed("the other side ended the connection")
            except SpaceError as error:
                self._failed(str(error))
            except (aiohttp.ClientError, ssl.SSLError, OSError, TimeoutError) as error:
                self._failed(_reason(error))
            await asyncio.sleep(backoff.delay(self._chance()))

    def _failed(self, reason: str) -> None:
        if reason != self.status.error:
            log.warning("zone %s: %s", self._target.name, reason)
        self.status.connected = False
        self.status.flight_bytes = 0
        self.status.error, self.status.error_ns = reason, time.time_ns()

    # --- one connection ----------------------------------------------------------------------------

    async def _session(self, backoff: Backoff) -> None:
        http, identity = await self._find()
        async with http:
            if VERSION not in identity.get("versions", ()):
                raise UnavailableError(
                    f"zone {self._target.name} speaks versions {identity.get('versions')!r:.60} of the protocol, "
                    f"and this one {VERSION}",
                    hint="upgrade the older one",
                )
            offer = await self._call(self._source.offer, identity)
            if offer is not None:
                document = {"authority": offer[0].decode("ascii"), "signature": offer[1].hex()}
                await self._ask(http, "POST", AUTHORITY, document)
            began = self._monotonic()
            cursors = await self._ask(http, "GET", CURSORS)
            self.status.rtt_seconds = self._monotonic() - began
            await self._call(self._source.connected, identity, cursors)
            backoff.reset()
            await self._stream(http)

    async def _find(self) -> tuple[aiohttp.ClientSession, Document]:
        """Asks at every address, and goes on where shipments are not handed on; else where it was answered first.

        Raises:
            SpaceError, aiohttp.ClientError, OSError: why there is no answer, from the address that said so last.
        """
        asking = {asyncio.create_task(self._try(url)) for url in addresses(self._target.url)}
        try:
            found = await self._first(asking)
            await _hang_up(asking - {found})
        except BaseException:
            await _hang_up(asking)
            raise
        return found.result()

    async def _first(self, asking: set[_Meeting]) -> _Meeting:
        """The task that found who is shipped to; see :meth:`_find`."""
        waiting, found = asking, None
        error: BaseException = UnavailableError("it has no address", hint="space zone add --url")
        while waiting and (found is None or not _leads(found.result()[1])):
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if (failed := task.exception()) is not None:
                    error = failed
                elif found is None or (_leads(task.result()[1]) and not _leads(found.result()[1])):
                    found = task
        if found is None:
            raise error
        return found

    async def _try(self, url: str) -> tuple[aiohttp.ClientSession, Document]:
        timeout = aiohttp.ClientTimeout(total=SILENCE_SECONDS, sock_connect=CONNECT_SECONDS)
        connector = aiohttp.TCPConnector(ssl=self._target.tls, limit=2)
        http = aiohttp.ClientSession(url, connector=connector, timeout=timeout, trust_env=False)
        try:
            async with asyncio.timeout(MEET_SECONDS):
                return http, await self._meet(http)
        except BaseException:
            await http.close()
            raise

    async def _meet(self, http: aiohttp.ClientSession) -> Document:
        """Asks who answers.

        In TLS 1.3 a server refuses a certificate after the client has done its part, so all that shows may be that the
        connection has ended.
        """
        try:
            return await self._ask(http, "GET", IDENTITY)
        except (aiohttp.ServerDisconnectedError, ConnectionResetError):
            raise UnavailableError(
                "it ended the connection before it answered",
                hint="if it does not know this zone: space zone add, on that side",
            ) from None

    async def _ask(
        self, http: aiohttp.ClientSession, method: str, path: str, document: Document | None = None
    ) -> Document:
        async with http.request(method, path, json=document, allow_redirects=False) as response:
            return await _document(response)

    async def _stream(self, http: aiohttp.ClientSession) -> None:
        """Ships over one request until it ends or fails."""
        flight = _Flight()
        outbox: asyncio.Queue[tuple[bytes, bytes]] = asyncio.Queue(2)
        for_as_long = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        self._moved = self._monotonic()
        await self._pulse(flight, outbox)  # the request is sent with the first bytes of its body
        headers = {"Content-Type": "application/x-space-shipments"}
        async with http.post(
            SHIP, data=self._pieces(outbox), headers=headers, allow_redirects=False, timeout=for_as_long
        ) as response:
            if response.status != 200:
                await _document(response)
            self.status.connected, self.status.error, self.status.at = True, "", str(response.url.origin())
            tasks = {
                asyncio.create_task(self._send(flight, outbox)),
                asyncio.create_task(self._answers(flight, response.content)),
                asyncio.create_task(self._watch(flight)),
            }
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                self.listens = False
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, flight: _Flight) -> None:
        """Ends when an answer is due and nothing has moved for too long."""
        while True:
            await asyncio.sleep(SILENCE_SECONDS / 10)
            if flight.sent and self._monotonic() - self._moved > SILENCE_SECONDS:
                raise UnavailableError(f"nothing came or went for {SILENCE_SECONDS:.0f} s")

    async def _pieces(self, outbox: asyncio.Queue[tuple[bytes, bytes]]) -> AsyncIterator[bytes | memoryview]:
        """The body of the request: frames as they come, no faster than they may go."""
        throttle, most = self._target.throttle, PIECE_BYTES
        while True:
            head, body = await outbox.get()
            rest = memoryview(body)
            while head or rest:
                room = most - len(head)
                piece, head, rest = head + rest[:room] if head else rest[:room], b"", rest[room:]
                if wait := throttle.delay(len(piece), now=self._monotonic()):
                    await asyncio.sleep(wait)
                self._moved = began = self._monotonic()
                yield piece
                quick = not throttle.rate and self._monotonic() - began < QUICK_SECONDS
                most = QUICK_PIECE_BYTES if quick else PIECE_BYTES

    async def _send(self, flight: _Flight, outbox: asyncio.Queue[tuple[bytes, bytes]]) -> None:
        """Hands on shipments as long as there is room for them, and a pulse when there has been none for a while."""
        pulsed = self._monotonic()
        self.listens = True
        while True:
            self._wake.clear()
            room = flight.bytes < FLIGHT_BYTES_MAX and len(flight.sent) < FLIGHT_SHIPMENTS_MAX
            outgoing = await self._call(self._source.next) if room else None
            if outgoing is not None:
                flight.add(outgoing, self._monotonic())
                self.status.flight_bytes = flight.bytes
                await outbox.put(frame(SHIPMENT, outgoing.body))
            if (now := self._monotonic()) - pulsed >= PULSE_SECONDS:
                pulsed = now
                await self._pulse(flight, outbox)
            if outgoing is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PULSE_SECONDS):
                        await self._wake.wait()

    async def _pulse(self, flight: _Flight, outbox: asyncio.Queue[tuple[bytes, bytes]]) -> None:
        pulse = await self._call(self._source.pulse)
        flight.add(None, self._monotonic())
        await outbox.put(frame(PULSE, json.dumps(pulse).encode()))

    async def _answers(self, flight: _Flight, content: aiohttp.StreamReader) -> None:
        """Takes note of what the other side says about each frame, in order."""
        while line := await _line(content):
            document = parse_document(line)
            if (error := error_in(document)) is not None:
                await self._call(self._source.refused, error)
                raise error
            if not flight.sent:
                raise UnavailableError(f"zone {self._target.name} answers what it was not sent")
            outgoing, when = flight.take()
            self._moved = now = self._monotonic()
            if outgoing is None:
                self.status.rtt_seconds = now - when if when is not None else self.status.rtt_seconds
                continue
            cursor = document.get("cursor")
            await asyncio.get_running_loop().run_in_executor(self._settling, self._source.settle, outgoing)
            await self._call(self._source.acknowledged, outgoing, cursor if isinstance(cursor, dict) else {})
            self.status.flight_bytes = flight.bytes
            self.status.sent(len(outgoing.body), now)
            self._wake.set()


async def _hang_up(meetings: set[_Meeting]) -> None:
    """Ends connections, also those that are being made."""
    for task in meetings:
        task.cancel()
    for each in await asyncio.gather(*meetings, return_exceptions=True):
        if not isinstance(each, BaseException):
            await each[0].close()


def _leads(identity: Document) -> bool:
    """Whether who answers takes shipments itself, as every zone does that is no cluster."""
    return identity.get("leads") is not False


@attrs.define
class _Flight:
    """Frames that were not answered yet, oldest first, and when those went that no other was ahead of.

    None stands for a pulse.
    """

    sent: deque[tuple[Outgoing | None, float | None]] = attrs.field(factory=deque)
    bytes: int = 0

    def add(self, outgoing: Outgoing | None, now: float) -> None:
        self.sent.append((outgoing, None if self.sent else now))
        self.bytes += 0 if outgoing is None else len(outgoing.body)

    def take(self) -> tuple[Outgoing | None, float | None]:
        found = self.sent.popleft()
        self.bytes -= 0 if found[0] is None else len(found[0].body)
        return found


async def _line(content: aiohttp.StreamReader) -> bytes:
    try:
        return await content.readline()
    except ValueError:
        raise UnavailableError(f"an answer of more than {LINE_BYTES_MAX} bytes") from None


async def _document(response: aiohttp.ClientResponse) -> Document:
    """The answer to a question.

    Raises:
        SpaceError: it is an error, or none of this protocol.
    """
    body = await response.content.read(DOCUMENT_BYTES_MAX)
    while len(body) < DOCUMENT_BYTES_MAX and (more := await response.content.read(DOCUMENT_BYTES_MAX)):
        body += more
    if response.status != 200 and not body.startswith(b"{"):
        raise UnavailableError(f"{response.url.host} answered {response.status} {response.reason}")
    document = parse_document(body)
    if (error := error_in(document)) is not None:
        raise error
    return document


def _reason(error: Exception) -> str:
    """Why a connection failed, in words that say what to do where the reason is known."""
    text = str(error)
    if "UNKNOWN_CA" in text or "CERTIFICATE_REQUIRED" in text:
        return "it does not know this zone: add this one there (space zone add)"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return f"who answers there is not that zone: {text:.200}"
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError | ConnectionResetError):
        return "the other side ended the connection"
    return f"{type(error).__name__}: {text:.200}" if text else type(error).__name__
