"""A node over HTTP: metrics, a status page, and the calls of the control socket for programs elsewhere.

    GET  /                   the cluster's status, for people
    GET  /v1/status          the same as JSON
    GET  /metrics            for Prometheus
    POST /v1/call/METHOD     a call: what :class:`space._node.service.Service` and a node have as methods

With certificates, every client shows one of the cluster's authority; without, the server listens on this
machine alone, and takes only requests that say so (``Host``) and that no web page can send (``Content-Type``).

A call comes in one of three forms, told apart by its ``Content-Type``:

* ``application/json``: ``{"arguments": {…}}`` and terms, as on the control socket.  The answer is the result as
  JSON, a line each for a stream (``application/x-ndjson``), or the bytes of ``get``;
* ``application/octet-stream``, for ``put``: the body is what is stored, arguments are in the query;
* ``application/x-space-messages``: a message with the request, then the bytes of a put.  The answer is a stream
  of messages as on the control socket, with ``{"data": …}`` for the bytes of ``get``.

Each call has a thread, as on the control socket; bytes pass through a socket pair, so neither side runs ahead
of the other.  A client that goes away ends its call.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

import attrs
from aiohttp import web

from space._errors import (
    ErrorKind,
    SpaceError,
    StorageError,
    UnavailableError,
    UsageError,
    error_document,
)
from space._node import pages
from space._node.caller import CHUNK_BYTES, Caller, Document, Terms
from space._node.calls import Target, carry_out
from space._node.federation_status import samples as federation_samples
from space._node.messages import (
    ANSWER_BYTES_MAX,
    LENGTH,
    REQUEST_BYTES_MAX,
    CallerGoneError,
    ProtocolError,
    decode,
    pack,
)
from space._node.views import start_time

if TYPE_CHECKING:
    from space._node.cluster import ClusterNode

MESSAGES: Final = "application/x-space-messages"
JSON: Final = "application/json"
LINES: Final = "application/x-ndjson"
BYTES: Final = "application/octet-stream"

CALLS_MAX: Final = 64
"""Calls at once, each with a thread; more are told to come back."""

ITEMS_QUEUED: Final = 8
ITEMS_BYTES: Final = 1 << 16
"""Items of a stream are sent when that much has come together, or the stream pauses."""

BODY_SECONDS: Final = 60.0
"""How long a client may be silent in the middle of its request."""

ALIVE_SECONDS: Final = 5.0
"""How often a client that waits is told that the call is still at work."""

KEEPALIVE_SECONDS: Final = 30.0
PIECE_BYTES: Final = 1 << 18
STREAMED: Final = frozenset({"get", "put"})
REFUSED_CALLS: Final = frozenset(
    {"import_tree", "export_tree", "mount", "unmount", "serve_nvme", "cluster_invite"}
)
"""They name paths of the node's machine, which is not the caller's."""

STATUSES: Final[dict[ErrorKind, int]] = {
    ErrorKind.FAILED: 500,
    ErrorKind.USAGE: 400,
    ErrorKind.NOT_FOUND: 404,
    ErrorKind.CONFLICT: 409,
    ErrorKind.REFUSED: 403,
    ErrorKind.CORRUPT: 500,
    ErrorKind.UNAVAILABLE: 503,
}

log: Final = logging.getLogger("space.http")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


# --- a call and its thread -------------------------------------------------------------------------


class _Bridge(Caller):
    """The client of one call, as its thread knows it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lines: list[Any] = []
        self._bytes = 0
        self.items: asyncio.Queue[list[Any] | None] = asyncio.Queue(ITEMS_QUEUED)
        self.gone = threading.Event()
        self.complete = False
        """All of the client's bytes have come, so their end is the end of the file."""

    def progress(self, done: Document) -> None:
        self._check()

    def wait(self, descriptor: int, *, writing: bool) -> int:
        self._check()
        return CHUNK_BYTES

    def ended(self) -> None:
        if not self.complete:
            raise CallerGoneError("the caller has gone")

    def idle(self, seconds: float) -> None:
        self.flush()
        self.gone.wait(seconds)
        self._check()

    def item(self, item: Any, size: int) -> None:
        """One of a stream."""
        self._lines.append(item)
        self._bytes += size
        if self._bytes >= ITEMS_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hands on the items so far; waits until there is room for them."""
        if self._lines:
            found, self._lines, self._bytes = self._lines, [], 0
            self.hand(found)

    def hand(self, found: list[Any] | None) -> None:
        """Items, or None for their end, for the loop."""
        self._check()
        waiting = asyncio.run_coroutine_threadsafe(self.items.put(found), self._loop)
        while not waiting.done():
            with contextlib.suppress(TimeoutError):
                waiting.result(1.0)
            if self.gone.is_set():
                waiting.cancel()
                self._check()

    def _check(self) -> None:
        if self.gone.is_set():
            raise CallerGoneError("the caller has gone")


@attrs.define(eq=False)
class _Call:
    """A call under way: what the handler and the thread share."""

    bridge: _Bridge
    result: Future[Any]
    ours: socket.socket | None
    thread: threading.Thread | None = None


class Calls:
    """Calls under way, each in a thread."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._running: set[_Call] = set()
        self._closed = False

    def start(self, request: Document, *, encode: Callable[[Any], bytes]) -> _Call:
        """Begins a call.

        Raises:
            UnavailableError: there are as many as can be.
        """
        method = str(request.get("method"))
        if method in REFUSED_CALLS:
            raise UsageError(f"{method} names paths of the node's machine", hint="use its control socket")
        ours, theirs = socket.socketpair() if method in STREAMED else (None, None)
        for each in (ours, theirs):
            if each is not None:
                each.setblocking(each is theirs)
        call = _Call(_Bridge(asyncio.get_running_loop()), Future(), ours)
        call.thread = threading.Thread(
            target=self._run, args=(call, request, theirs, encode), name="space-http-call", daemon=True
        )
        with self._lock:
            busy = self._closed or len(self._running) >= CALLS_MAX
            if not busy:
                self._running.add(call)
        if busy:
            for each in (ours, theirs):
                if each is not None:
                    each.close()
            raise UnavailableError("as many calls as can be are being answered already", hint="try again")
        call.thread.start()
        return call

    def _run(
        self, call: _Call, request: Document, theirs: socket.socket | None, encode: Callable[[Any], bytes]
    ) -> None:
        try:
            result = self._carry_out(call, request, theirs, encode)
        except SpaceError as error:
            self._end(call, theirs, error=error)
        except OSError as error:
            self._end(call, theirs, error=StorageError(str(error)))
        except Exception as error:
            log.exception("a call of %s broke", request.get("method"))
            self._end(call, theirs, error=SpaceError(f"{type(error).__name__}: {error}"))
        else:
            self._end(call, theirs, result=result)

    def _carry_out(
        self, call: _Call, request: Document, theirs: socket.socket | None, encode: Callable[[Any], bytes]
    ) -> Any:
        found = carry_out(self._target, request, call.bridge, None if theirs is None else theirs.fileno())
        if not isinstance(found, Iterator):
            return found
        for item in found:
            encoded = encode(item)
            call.bridge.item(encoded, len(encoded))
        call.bridge.flush()
        return None

    def _end(
        self,
        call: _Call,
        theirs: socket.socket | None,
        *,
        result: Any = None,
        error: SpaceError | None = None,
    ) -> None:
        if theirs is not None:
            theirs.close()
        if error is None:
            call.result.set_result(result)
        else:
            call.result.set_exception(error)
        with contextlib.suppress(CallerGoneError, RuntimeError):  # RuntimeError: the loop is closed
            call.bridge.hand(None)
        with self._lock:
            self._running.discard(call)

    def running(self) -> list[_Call]:
        """Those that have not ended."""
        with self._lock:
            return list(self._running)

    def close(self) -> None:
        """Takes no more, and lets those that are under way know that nobody waits."""
        with self._lock:
            self._closed = True
        for call in self.running():
            call.bridge.gone.set()

    def join(self) -> None:
        """Waits until all have ended."""
        for call in self.running():
            if call.thread is not None:
                call.thread.join()


# --- requests and answers --------------------------------------------------------------------------


async def _bounded(stream: Any, size: int) -> bytes:
    """So many bytes of a body.

    Raises:
        UsageError: it ends before, or stands still.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return bytes(await stream.readexactly(size))
    except (asyncio.IncompleteReadError, TimeoutError):
        raise UsageError("the request ended before its end") from None


async def _parse(request: web.Request) -> Document:
    """The call in a request.

    Raises:
        UsageError: it is malformed, or longer than a request is.
    """
    method, kind = request.match_info["method"], request.content_type
    if kind == MESSAGES:
        (length,) = LENGTH.unpack(await _bounded(request.content, LENGTH.size))
        if length > REQUEST_BYTES_MAX:
            raise UsageError(f"a request of {length} bytes; at most {REQUEST_BYTES_MAX}")
        try:
            document = decode(await _bounded(request.content, length))
        except ProtocolError:
            raise UsageError("not a message of this protocol") from None
    elif kind == JSON and method != "put":
        document = await _json(request)
    elif kind == BYTES and method == "put":
        document = {"arguments": _query(request)}
    else:
        raise UsageError(
            f"not a call: Content-Type {kind!r:.60}", hint=f"{JSON}, {MESSAGES}, or {BYTES} for put"
        )
    return {**document, "method": method}


async def _json(request: web.Request) -> Document:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.content.iter_any():
                body += piece
                if len(body) > REQUEST_BYTES_MAX:
                    raise UsageError(f"a request of more than {REQUEST_BYTES_MAX} bytes")
    except TimeoutError:
        raise UsageError("the request ended before its end") from None
    try:
        document = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON: {error!s:.120}") from None
    if not isinstance(document, dict):
        raise UsageError("not a JSON object")
    document.setdefault("arguments", {})
    return document


def _query(request: web.Request) -> Document:
    """Arguments of a put."""
    arguments: Document = dict(request.query)
    if "policy" in arguments:
        try:
            arguments["policy"] = json.loads(arguments["policy"])
        except (ValueError, RecursionError) as error:
            raise UsageError(f"policy: not JSON: {error!s:.120}") from None
    return arguments


async def _feed(request: web.Request, call: _Call) -> None:
    """Bytes of the body into the call; what comes after the end of the call is left unread."""
    assert call.ours is not None
    loop = asyncio.get_running_loop()
    try:
        while True:
            async with asyncio.timeout(BODY_SECONDS):
                piece = await request.content.readany()
            if not piece:
                break
            await loop.sock_sendall(call.ours, piece)
        call.bridge.complete = True
    except (OSError, TimeoutError, web.HTTPException):
        return
    finally:
        with contextlib.suppress(OSError):
            call.ours.shutdown(socket.SHUT_WR)


def _refusal(error: SpaceError) -> web.Response:
    return web.json_response(error_document(error), status=STATUSES[error.kind])


class _Answer:
    """The answer to one call, in the form its request has."""

    def __init__(self, request: web.Request, call: _Call) -> None:
        self._request = request
        self._call = call
        self._messages = request.content_type == MESSAGES
        self._response: web.StreamResponse | None = None

    async def send(self) -> web.StreamResponse:
        """Sends what the call yields, and its end."""
        if self._messages:
            await self._open(MESSAGES)
        if self._request.match_info["method"] == "get":
            await self._send_bytes()
        else:
            await self._send_items()
        try:
            result = await asyncio.wrap_future(self._call.result)
        except SpaceError as error:
            return await self._fail(error)
        return await self._finish(result)

    async def _open(self, kind: str) -> web.StreamResponse:
        if self._response is None:
            self._response = web.StreamResponse(headers={"Content-Type": kind, "Cache-Control": "no-store"})
            await self._response.prepare(self._request)
        return self._response

    async def _send_bytes(self) -> None:
        """The bytes of a get, until the call has ended."""
        assert self._call.ours is not None
        loop = asyncio.get_running_loop()
        while piece := await loop.sock_recv(self._call.ours, PIECE_BYTES):
            response = await self._open(BYTES)
            await response.write(pack({"data": piece}, ANSWER_BYTES_MAX) if self._messages else piece)

    async def _send_items(self) -> None:
        """The items of a stream, until the call has ended."""
        while True:
            try:
                async with asyncio.timeout(ALIVE_SECONDS):
                    found = await self._call.bridge.items.get()
            except TimeoutError:
                if self._messages and self._response is not None:
                    await self._response.write(pack({"progress": {}}, ANSWER_BYTES_MAX))
                continue
            if found is None:
                return
            response = await self._open(LINES)
            await response.write(b"".join(found))

    async def _fail(self, error: SpaceError) -> web.StreamResponse:
        if self._response is None:
            return _refusal(error)
        if self._messages:
            await self._response.write(pack({"error": error_document(error)}, ANSWER_BYTES_MAX))
            await self._response.write_eof()
        elif self._request.transport is not None:
            self._request.transport.abort()  # without an end, so that nobody takes a part for the whole
        return self._response

    async def _finish(self, result: Any) -> web.StreamResponse:
        if self._messages:
            response = await self._open(MESSAGES)
            await response.write(pack({"result": result}, ANSWER_BYTES_MAX))
        elif self._response is None:
            if self._request.match_info["method"] == "get":
                return web.Response(body=b"", content_type=BYTES)
            if result is None:
                return web.Response(body=b"", content_type=LINES)
            return web.json_response(result)
        assert self._response is not None
        await self._response.write_eof()
        return self._response


# --- the server ------------------------------------------------------------------------------------


class HttpServer:
    """The HTTP side of a process that has a store open, with a thread and a loop of its own."""

    def __init__(self, target: Target, address: str, *, node: ClusterNode | None) -> None:
        """Begins to answer at ``HOST:PORT``.

        Raises:
            UsageError: the address is not one, or is not of this machine and there are no certificates.
            UnavailableError: it cannot be listened on.
        """
        self._host, self._port = _parse_address(address)
        self._target = target
        self._node = node
        self._tls = None if node is None else node.server_tls
        if self._tls is None and not _is_local(self._host):
            raise UsageError(
                f"--http {address} is reachable from other machines, and callers would not be authenticated",
                hint="leave TLS on, or use 127.0.0.1",
            )
        self._calls = Calls(target)
        self.answered = 0
        self._begun: Future[int] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._site: web.TCPSite | None = None
        self._thread = threading.Thread(target=self._run, name="space-http", daemon=True)
        self._thread.start()
        self._port = self._begun.result()

    @property
    def url(self) -> str:
        """Where it answers."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'http' if self._tls is None else 'https'}://{host}:{self._port}"

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # whoever waits for the start is told; else it is in the log
            if self._begun.done():
                log.exception("the HTTP server has ended")
            elif isinstance(error, OSError):
                said = f"cannot listen on {self._host}:{self._port}: {error.strerror or error}"
                self._begun.set_exception(UnavailableError(said))
            else:
                self._begun.set_exception(error)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        application = web.Application(middlewares=[self._guard])
        application.router.add_get("/", self._page)
        application.router.add_get("/v1/status", self._status)
        application.router.add_get("/metrics", self._metrics)
        application.router.add_post("/v1/call/{method}", self._call)
        runner = web.AppRunner(
            application,
            access_log=None,
            handler_cancellation=True,
            keepalive_timeout=KEEPALIVE_SECONDS,
            shutdown_timeout=1.0,
        )
        await runner.setup()
        try:
            self._site = web.TCPSite(runner, self._host, self._port, ssl_context=self._tls)
            await self._site.start()
            self._begun.set_result(runner.addresses[0][1])
            await self._stop.wait()
        finally:
            await runner.cleanup()

    def retire(self, seconds: float) -> None:
        """Takes no more calls, and gives those being answered so long to end; then it hangs up on them."""
        if self._loop is not None and self._site is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                asyncio.run_coroutine_threadsafe(self._site.stop(), self._loop)
        deadline = time.monotonic() + seconds
        while self._calls.running() and time.monotonic() < deadline:
            time.sleep(0.02)
        self._calls.close()

    def close(self) -> None:
        """Hangs up on everybody; what was running ends before this returns."""
        if self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._calls.join()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Errors as documents; without certificates, only requests that a web page elsewhere cannot cause."""
        if self._tls is None and not _is_local(_host_of(request)):
            return _refusal(
                UsageError("a request for another host", hint="say http://127.0.0.1 or localhost")
            )
        self.answered += 1
        try:
            return await handler(request)
        except SpaceError as error:
            return _refusal(error)

    async def _call(self, request: web.Request) -> web.StreamResponse:
        document = await _parse(request)
        encode = _encode_message if request.content_type == MESSAGES else _encode_line
        call = self._calls.start(document, encode=encode)
        feeding = asyncio.create_task(_feed(request, call)) if document["method"] == "put" else None
        try:
            return await _Answer(request, call).send()
        finally:
            call.bridge.gone.set()
            try:
                if feeding is not None:
                    feeding.cancel()
                    await asyncio.gather(feeding, return_exceptions=True)
            finally:  # this task may be cancelled once more
                if call.ours is not None:
                    call.ours.close()

    async def _cluster_status(self) -> Document:
        if self._node is not None:
            return await asyncio.to_thread(self._node.status)
        owner = await asyncio.to_thread(self._target.call, "digest", {}, Caller(), Terms())
        alone = {"id": 1, "role": "alone", "lag": 0, **owner}
        return {"cluster": None, "shards": [{"shard": 0, "leader": None, "term": 0, "nodes": [alone]}]}

    async def _status(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(await self._cluster_status())

    async def _page(self, request: web.Request) -> web.StreamResponse:
        title = "space" if self._node is None else f"space, node {self._node.config.node}"
        text = pages.page(title, await self._cluster_status())
        policy = "default-src 'none'; style-src 'unsafe-inline'"
        return web.Response(text=text, content_type="text/html", headers={"Content-Security-Policy": policy})

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        text = pages.metrics(await asyncio.to_thread(lambda: list(self._samples())))
        return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    def _samples(self) -> Iterator[pages.Sample]:
        if self._node is not None:
            found = self._node.local_status()
            yield from pages.shard_samples(found["status"])
            yield from pages.peer_samples(found["peers"])
            for number, store in enumerate(self._node.stores):
                yield "space_log_bytes", {"shard": number}, store.wal.bytes_on_disk()
        with contextlib.suppress(SpaceError):
            found = self._target.call("federation_status", {}, Caller(), Terms(stale=True))
            if found["running"]:
                yield from federation_samples(found)
        yield "space_calls_total", {"way": "http"}, self.answered
        yield from _process_samples()


def _process_samples() -> Iterator[pages.Sample]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/self/statm", encoding="ascii") as file:
        pages_resident = int(file.read().split()[1])
    uptime_ticks = start_time(os.getpid())
    with open("/proc/stat", encoding="ascii") as file:
        booted = next(int(line.split()[1]) for line in file if line.startswith("btime"))
    yield "process_resident_memory_bytes", {}, pages_resident * os.sysconf("SC_PAGE_SIZE")
    yield "process_cpu_seconds_total", {}, used.ru_utime + used.ru_stime
    yield "process_open_fds", {}, len(os.listdir("/proc/self/fd"))
    yield "process_start_time_seconds", {}, booted + uptime_ticks / os.sysconf("SC_CLK_TCK")


def _encode_message(item: Any) -> bytes:
    return pack({"item": item}, ANSWER_BYTES_MAX)


def _encode_line(item: Any) -> bytes:
    return json.dumps(item).encode() + b"\n"


def _host_of(request: web.Request) -> str:
    host = request.host or ""
    return host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _parse_address(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    if not separator or not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise UsageError(f"not an address: {text!r}", hint="write HOST:PORT")
    return host.strip("[]"), int(port)


__all__ = ["HttpServer"]
