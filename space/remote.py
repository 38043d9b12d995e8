"""Calls to running nodes: one after another until one answers, and again where repeating does no harm.

What a caller may rely on when a node dies, or a connection breaks, in the middle of a call:

* reads are asked again elsewhere.  A stream that has shown something goes on only if it is the log, whose past does
  not change; bytes go on where they stopped, if the capsule has not changed since;
* one-command mutations (``create resize mkdir rm mv snapshot clone undelete policy set``) carry a client id and a
  number, and are carried out once however often they are asked for;
* ``put`` of a file is done again under a new id, and what the attempt before left is taken away; if that had come
  to its end after all, it is the answer.  With ``--id`` the same capsule is written again;
* what reads a pipe, or walks a tree of this machine (``put -``, ``import``, ``export``), ends with the error.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat as statmod
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Protocol, TypeVar, cast

from space._errors import SpaceError, StorageError, UnavailableError, UsageError, error_of
from space._node.caller import CHUNK_BYTES, Caller
from space._node.messages import ANSWER_BYTES_MAX, REQUEST_BYTES_MAX, Message, ProtocolError, pack, unpack
from space.control import SILENCE_SECONDS, BrokenError, NoAnswerError, SocketEndpoint, result_of, understood

if TYPE_CHECKING:
    import http.client
    import ssl

    from space._node.service import Service

TRY_SECONDS: Final = 30.0
"""How long a call is tried again after it broke: longer than an election, and than the restart of a node."""

PAUSE_SECONDS: Final = 0.1
NODES_MAX: Final = 64
CONNECT_SECONDS: Final = 5.0
MESSAGES: Final = "application/x-space-messages"

ONCE: Final = frozenset(
    {"create", "resize", "mkdir", "rm", "mv", "snapshot", "drop_snapshot", "clone", "undelete", "set_policy"}
) | frozenset(
    {"csi_create", "csi_delete", "csi_expand", "csi_modify", "csi_publish", "csi_unpublish"}
    | {"csi_snapshot", "csi_delete_snapshot", "csi_snapshot_group", "csi_delete_group"}
)
UNREPEATABLE: Final = frozenset(
    {"import_tree", "export_tree", "mount", "serve_nvme", "keys_rotate", "keys_renew", "keys_destroy"}
)

_T = TypeVar("_T")


class Endpoint(Protocol):
    """One node, as it can be asked."""

    def ask(self, request: Message, descriptor: int | None) -> Iterator[Message]:
        """Sends a request; its answers as they come.

        Raises:
            NoAnswerError: nobody heard it.
            BrokenError: the answers ended before their end.
        """


def endpoints(addresses: str, certificate: Path | None) -> list[Endpoint]:
    """The nodes a list of URLs names.

    Raises:
        UsageError: it is not one.
    """
    texts = addresses.split(",")
    if len(texts) > NODES_MAX:
        raise UsageError(f"{len(texts)} addresses of nodes; at most {NODES_MAX}")
    return [_endpoint(text.strip(), certificate) for text in texts]


def _endpoint(text: str, certificate: Path | None) -> Endpoint:
    scheme, separator, rest = text.partition("://")
    if separator and rest and scheme == "unix":
        return SocketEndpoint(rest)
    if separator and rest and scheme in ("http", "https"):
        return HttpEndpoint(text, certificate)
    raise UsageError(
        f"not the address of a node: {text!r}", hint="write unix:///PATH/control.sock or https://HOST:PORT"
    )


class Nodes:
    """The methods of :class:`space._node.service.Service` and of a node, answered by one of several nodes."""

    def __init__(
        self,
        asked: Sequence[Endpoint],
        *,
        caller: Caller | None = None,
        stale: bool = False,
        retry: bool = True,
    ) -> None:
        """Remembers where to ask.

        ``stale``: reads show what is applied where they are asked; ``retry``: as the module's text says, or never.
        """
        self._asked = list(asked)
        self._caller = caller or Caller()
        self._stale = stale
        self._retry = retry
        self._client = os.urandom(16).hex()
        self._sequence = 0

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):
            raise AttributeError(method)
        return lambda **arguments: self._call(method, arguments)

    def _call(self, method: str, arguments: Message) -> Any:
        descriptor = arguments.pop("descriptor", None)
        if method == "put":
            return self._put(arguments, descriptor)
        if method == "get":
            return self._get(arguments, descriptor)
        if method == "log":
            return self._log(arguments)
        request = self._request(method, arguments)
        return self._try(lambda each: self._ask(each, request), repeatable=method not in UNREPEATABLE)

    def _request(self, method: str, arguments: Message) -> Message:
        request: Message = {"method": method, "arguments": arguments}
        if self._stale:
            request["stale"] = True
        if method in ONCE and self._retry:
            self._sequence += 1
            request |= {"client": self._client, "sequence": self._sequence}
        return request

    def _ask(self, endpoint: Endpoint, request: Message, descriptor: int | None = None) -> Any:
        return result_of(understood(endpoint.ask(request, descriptor), self._caller))

    def _try(self, ask: Callable[[Endpoint], _T], *, repeatable: bool) -> _T:
        """Asks one node after another until one answers, for as long as that may help.

        Raises:
            SpaceError: what the last one said, or that none answers.
        """
        deadline: float | None = None
        last: UnavailableError = NoAnswerError("no node to ask")
        while True:
            for endpoint in list(self._asked):
                begun = time.monotonic()
                try:
                    answer = ask(endpoint)
                except NoAnswerError as error:
                    last = error
                except UnavailableError as error:
                    if not repeatable or not self._retry:
                        raise
                    last = error
                    since = time.monotonic() if isinstance(error, BrokenError) else begun
                    deadline = deadline or since + TRY_SECONDS
                else:
                    self._asked.remove(endpoint)
                    self._asked.insert(0, endpoint)
                    return answer
                if deadline is not None and time.monotonic() > deadline:
                    raise last
            if deadline is None:  # nobody is there at all
                raise last
            time.sleep(PAUSE_SECONDS)

    # --- bytes -----------------------------------------------------------------------------------------

    def _put(self, arguments: Message, descriptor: int) -> Any:
        if not self._retry or not statmod.S_ISREG(os.fstat(descriptor).st_mode):
            request = self._request("put", arguments)
            return self._try(lambda each: self._ask(each, request, descriptor), repeatable=False)
        from space.events.ids import CapsuleId

        begin = os.lseek(descriptor, 0, os.SEEK_CUR)
        given = arguments.get("id")
        before: list[str] = []

        def attempt(endpoint: Endpoint) -> Any:
            capsule = given or str(CapsuleId.new(time.time_ns(), os.urandom))
            wanted = {**arguments, "id": capsule, "earlier": " ".join(before)}
            with _reopened(descriptor, begin) as source:
                try:
                    return self._ask(endpoint, self._request("put", wanted), source)
                except NoAnswerError:
                    raise
                except UnavailableError:
                    if capsule not in before:
                        before.append(capsule)
                    raise

        return self._try(attempt, repeatable=True)

    def _get(self, arguments: Message, descriptor: int) -> Any:
        if arguments.get("replace") and statmod.S_ISREG(os.fstat(descriptor).st_mode):

            def again(endpoint: Endpoint) -> Any:
                os.lseek(descriptor, 0, os.SEEK_SET)
                return self._ask(endpoint, self._request("get", arguments), descriptor)

            return self._try(again, repeatable=True)
        if not self._retry or len(self._asked) == 1:
            request = self._request("get", arguments)
            return self._try(lambda each: self._ask(each, request, descriptor), repeatable=False)
        return self._get_on(arguments, descriptor)

    def _get_on(self, arguments: Message, descriptor: int) -> Any:
        """Bytes to a pipe or terminal: those that were written are not asked for again."""
        about = {"capsule": arguments["capsule"], "at": arguments.get("at")}
        change: list[Any] = []
        written = 0

        def attempt(endpoint: Endpoint) -> Any:
            nonlocal written
            found = self._ask(endpoint, self._request("stat", about))["change"]
            if change and found != change[0]:
                raise StorageError(f"{arguments['capsule']} changed while it was read", hint="read it again")
            change[:] = [found]
            wanted = dict(arguments)
            wanted["offset"] = arguments.get("offset", 0) + written
            if arguments.get("length") is not None:
                wanted["length"] = arguments["length"] - written
            pump = _Pump(descriptor)
            try:
                answer = self._ask(endpoint, self._request("get", wanted), pump.inlet)
            finally:
                pump.finish()
                written += pump.count
            return {**answer, "size": written}

        return self._try(attempt, repeatable=True)

    # --- the log ---------------------------------------------------------------------------------------

    def _log(self, arguments: Message) -> Iterator[Message]:
        """Events; after a break from where they stopped, as what was is not going to change."""
        last = (0, -1)
        wanted = arguments
        while True:
            before = last
            request = self._request("log", wanted)
            items = self._try(lambda each: self._ask(each, request), repeatable=True)  # noqa: B023 - asked at once
            try:
                for event in items:
                    place = (event["position"], event["event"])
                    if place > last:
                        last = place
                        yield event
            except BrokenError:
                if not self._retry or last == before:
                    raise
                wanted = {**arguments, "start": str(last[0])}
            else:
                return


@contextlib.contextmanager
def _reopened(descriptor: int, begin: int) -> Iterator[int]:
    """The same file with an offset of its own: an attempt that is still being read elsewhere does not move it."""
    try:
        mine = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # unlinked, or not ours to open again
        os.lseek(descriptor, begin, os.SEEK_SET)
        yield descriptor
        return
    try:
        os.lseek(mine, begin, os.SEEK_SET)
        yield mine
    finally:
        os.close(mine)


class _Pump:
    """Carries what is written to :attr:`inlet` on to a descriptor, and counts it."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._outlet, self.inlet = os.pipe()
        os.set_blocking(self._outlet, False)
        self._over = os.eventfd(0)
        self.count = 0
        self._failed: OSError | None = None
        self._thread = threading.Thread(target=self._carry, name="space-pump", daemon=True)
        self._thread.start()

    def _carry(self) -> None:
        poll = select.poll()
        poll.register(self._outlet, select.POLLIN)
        poll.register(self._over, select.POLLIN)
        try:
            while True:
                over = self._over in dict(poll.poll())
                try:
                    piece = os.read(self._outlet, CHUNK_BYTES)
                except BlockingIOError:
                    piece = b""
                    if not over:
                        continue
                if not piece:
                    return
                _write_all(self._target, piece)
                self.count += len(piece)
        except OSError as error:
            self._failed = error
        finally:
            os.close(self._outlet)

    def finish(self) -> None:
        """Returns when everything written to the inlet has gone on; who writes to it later cannot.

        Not when the inlet is closed everywhere: a process that is stopped, or stuck, keeps what it was sent open.

        Raises:
            OSError: it could not be written.
        """
        os.eventfd_write(self._over, 1)
        self._thread.join()
        os.close(self._over)
        os.close(self.inlet)
        if self._failed is not None:
            raise self._failed


# --- HTTP ------------------------------------------------------------------------------------------


class HttpEndpoint:
    """A node behind ``https://HOST:PORT``, or ``http://`` on this machine."""

    def __init__(self, url: str, certificate: Path | None) -> None:
        """Args:
        certificate: directory with ``ca.pem``, ``node.pem`` and ``node.key`` of a client of the cluster.

        Raises:
            UsageError: the URL is not one of a node, or there is no certificate for it.
        """
        import ipaddress
        from urllib.parse import urlsplit

        self._url = url
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 0
        if not self._host or not self._port or parts.path not in ("", "/") or parts.query:
            raise UsageError(f"not the address of a node: {url!r}", hint="write https://HOST:PORT")
        self._tls: ssl.SSLContext | None = None
        if parts.scheme == "https":
            self._tls = _client_tls(url, certificate)
        elif self._host != "localhost" and not _is_loopback(self._host, ipaddress.ip_address):
            raise UsageError(f"{url} is not on this machine: use https")

    def __str__(self) -> str:
        return self._url

    def ask(self, request: Message, descriptor: int | None) -> Iterator[Message]:
        """Sends a request, and the bytes of a put; its answers as they come."""
        if request["method"] in ("import_tree", "export_tree"):
            raise UsageError(
                "a tree is not carried over HTTP", hint="use --node unix://… on the machine of the node"
            )
        connection = self._connect()
        try:
            answers = self._send(connection, request, descriptor)
            while True:
                message = self._receive(answers)
                if "data" in message:
                    _write_all(descriptor, message["data"])
                else:
                    yield message
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        import http.client

        connection: http.client.HTTPConnection
        if self._tls is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_SECONDS)
        else:
            connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=CONNECT_SECONDS, context=self._tls
            )
        try:
            connection.connect()
            connection.sock.settimeout(SILENCE_SECONDS)
        except OSError as error:
            raise NoAnswerError(f"nothing answers at {self._url}: {error.strerror or error}") from None
        if self._tls is not None:
            self._check_node(connection)
        return connection

    def _check_node(self, connection: http.client.HTTPConnection) -> None:
        """Whether it is a node that answers: a client's certificate is of the same authority."""
        names: dict[str, Any] = cast("ssl.SSLSocket", connection.sock).getpeercert() or {}
        uris = [str(value) for kind, value in names.get("subjectAltName", ()) if kind == "URI"]
        if not any(uri.startswith("space://") and "/node/" in uri for uri in uris):
            connection.close()
            raise NoAnswerError(f"what answers at {self._url} is no node of the cluster")

    def _send(
        self, connection: http.client.HTTPConnection, request: Message, descriptor: int | None
    ) -> http.client.HTTPResponse:
        import http.client

        upload = descriptor if request["method"] == "put" else None
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have answered already
                connection.request(
                    "POST",
                    f"/v1/call/{request['method']}",
                    body=_body(pack(request, REQUEST_BYTES_MAX), upload),
                    headers={"Content-Type": MESSAGES, "Accept": MESSAGES},
                    encode_chunked=True,
                )
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from None
        kind = response.headers.get_content_type()
        if kind == "application/json":
            raise self._refusal(response)
        if kind != MESSAGES:
            raise NoAnswerError(f"what answers at {self._url} is no node: HTTP status {response.status}")
        return response

    def _refusal(self, response: http.client.HTTPResponse) -> SpaceError:
        """What a node says instead of carrying a call out."""
        import http.client
        import json

        try:
            return error_of(dict(json.loads(response.read(REQUEST_BYTES_MAX))))
        except (OSError, http.client.HTTPException, ValueError, TypeError) as error:
            return self._broken(error)

    def _receive(self, answers: http.client.HTTPResponse) -> Message:
        import http.client

        try:
            return unpack(cast("BinaryIO", answers), b"", ANSWER_BYTES_MAX)
        except (OSError, http.client.HTTPException, ProtocolError) as error:
            raise self._broken(error) from None

    def _broken(self, error: Exception) -> BrokenError:
        reason = str(error) or type(error).__name__
        return BrokenError(
            f"the node at {self._url} has ended the call: {reason}", hint="what was acknowledged is kept"
        )


def _is_loopback(host: str, parse: Callable[[str], Any]) -> bool:
    try:
        return bool(parse(host).is_loopback)
    except ValueError:
        return False


def _client_tls(url: str, certificate: Path | None) -> ssl.SSLContext:
    import ssl

    if certificate is None:
        raise UsageError(
            f"{url} asks for a certificate",
            hint="--certificate DIR; space cluster invite --client NAME makes one",
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # a node is known by its identity in the certificate, not by its address
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(certificate / "ca.pem")
        context.load_cert_chain(certificate / "node.pem", certificate / "node.key")
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"no usable certificate in {certificate}: {error}") from None
    return context


def _body(request: bytes, upload: int | None) -> Iterator[bytes]:
    yield request
    while upload is not None and (piece := os.read(upload, CHUNK_BYTES)):
        yield piece


def _write_all(descriptor: int | None, data: bytes) -> None:
    view = memoryview(data)
    while view and descriptor is not None:
        view = view[os.write(descriptor, view) :]


def connect(
    addresses: str, *, caller: Caller, certificate: Path | None = None, stale: bool = False
) -> Service:
    """The operations of the nodes that a list of URLs names.

    Raises:
        UsageError: it is not one.
    """
    return cast("Service", Nodes(endpoints(addresses, certificate), caller=caller, stale=stale))
