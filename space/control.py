"""The control socket: the operations of a store, asked of the process that has it open.

The owner of a data directory listens on ``control.sock`` in it (mode 0600; only its own user and root are
heard).  One connection carries one call:

    request   {"method": name, "arguments": {…}} and terms, with at most one file descriptor beside it
    answers   any number of {"progress": {…}}, {"item": {…}} and {"ended": true},
              then {"result": {…}} or {"error": {…}}

A process at work says so every few seconds, with empty progress; from one that says nothing for a minute (it is
stopped, or stuck) nothing more is expected.

Terms are ``stale`` (true: reads show what is applied where they are asked), and ``client`` (32 hexadecimal
digits) with ``sequence``, the same in every attempt at one call: so it is carried out once.  Each may be left out.

After ``ended`` (the source of a put has) the client sends one byte: a program killed together with the one
whose output it was storing must not leave half of it under a name.

Each message is a length (4 bytes, big-endian) and that much msgpack.  What can be called is what
:class:`space._node.service.Service` has as public methods, with arguments of the annotated types, and nothing
else.  A client that closes its end is no longer waited for; one that sends anything else is hung up on.

A socket address holds 108 bytes at most (unix(7)), a data directory's path may be longer: so both sides
reach the socket through ``/proc/self/fd`` of the directory.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat as statmod
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Self, cast

from space._errors import (
    SpaceError,
    StorageError,
    UnavailableError,
    error_document,
    error_of,
)
from space._node.caller import CHUNK_BYTES, Caller
from space._node.messages import (
    ANSWER_BYTES_MAX,
    LENGTH,
    REQUEST_BYTES_MAX,
    CallerGoneError,
    Message,
    ProtocolError,
    pack,
    unpack,
)

if TYPE_CHECKING:
    from space._node.calls import Target
    from space._node.service import Service
    from space._node.store import Store

SOCKET: Final = "control.sock"

REQUEST_SECONDS: Final = 10.0  # a request is sent in one go
ANSWER_SECONDS: Final = 600.0  # somebody may look at a page of a pager for a while
ALIVE_SECONDS: Final = 5.0
SILENCE_SECONDS: Final = 60.0
"""A node says something every few seconds, if only that it is at work."""

PROGRESS_SECONDS: Final = 0.1
ITEMS_BYTES: Final = 1 << 16
CONNECTIONS_MAX: Final = 64
DESCRIPTORS_MAX: Final = 1
RETIRE_POLL_SECONDS: Final = 0.02
PIPE_BYTES: Final = 4096  # PIPE_BUF: what a pipe that polls writable takes without blocking (pipe(7))

_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid (unix(7), SO_PEERCRED)


@contextlib.contextmanager
def _address(path: Path) -> Iterator[str]:
    """A short address for the socket at ``path``."""
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    except OSError as error:
        raise UnavailableError(f"no control socket at {path}: {error.strerror}") from None
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _peer_is_ours(stream: socket.socket) -> bool:
    credentials = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(credentials)[1] in (0, os.geteuid())


# --- server ----------------------------------------------------------------------------------------


class _RemoteCaller(Caller):
    """The client of one connection."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._told = 0.0
        self._unsent = bytearray()
        self._sending = threading.Lock()
        self._over = False

    def alive(self) -> None:
        """Says that the call is being worked on, unless something is being said; never waits."""
        if not self._sending.acquire(blocking=False):
            return
        try:
            if self._over:
                return
            poll = select.poll()
            poll.register(self._stream, select.POLLOUT)
            # a stream of this kind that polls writable takes so few bytes at once (unix(7))
            if any(events & select.POLLOUT for _, events in poll.poll(0)):
                self._stream.send(pack({"progress": {}}, ANSWER_BYTES_MAX))
        except (OSError, ValueError):  # closed meanwhile
            return
        finally:
            self._sending.release()

    def over(self) -> None:
        """Lets :meth:`alive` say no more: the connection is about to be closed, and its number another file's."""
        with self._sending:
            self._over = True

    def item(self, item: Any) -> None:
        """One of a stream: sent with others, at the latest when the stream pauses."""
        self._unsent += pack({"item": item}, ANSWER_BYTES_MAX)
        if len(self._unsent) >= ITEMS_BYTES:
            self._flush()

    def send(self, message: Message) -> None:
        self._unsent += pack(message, ANSWER_BYTES_MAX)
        self._flush()

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, bytearray()
        try:
            with self._sending:
                self._stream.sendall(unsent)
        except OSError:
            raise CallerGoneError("the caller has gone") from None

    def progress(self, done: Message) -> None:
        now = time.monotonic()
        if now - self._told >= PROGRESS_SECONDS:
            self._told = now
            self.send({"progress": done})

    def wait(self, descriptor: int, *, writing: bool) -> int:
        if statmod.S_ISREG(os.fstat(descriptor).st_mode):
            # who has gone may be asking another node, which writes the same file, or may want the file as it is
            self._poll(None, 0, 0)
            return CHUNK_BYTES
        ready = self._poll(descriptor, select.POLLOUT if writing else select.POLLIN, None)
        while not ready:
            ready = self._poll(descriptor, select.POLLOUT if writing else select.POLLIN, None)
        return PIPE_BYTES if writing else CHUNK_BYTES

    def ended(self) -> None:
        self.send({"ended": True})
        try:
            confirmed = self._stream.recv(1)
        except OSError:
            confirmed = b""
        if not confirmed:
            raise CallerGoneError("the caller has gone")

    def idle(self, seconds: float) -> None:
        self._flush()
        self._poll(None, 0, seconds)

    def _poll(self, descriptor: int | None, events: int, seconds: float | None) -> bool:
        """Whether ``descriptor`` is ready; raises as soon as the client hangs up."""
        poll = select.poll()
        # a client says nothing after its request: whatever comes is its end
        poll.register(self._stream, select.POLLIN | select.POLLRDHUP)
        if descriptor is not None:
            poll.register(descriptor, events)
        ready = dict(poll.poll(None if seconds is None else seconds * 1000))
        if self._stream.fileno() in ready:
            raise CallerGoneError("the caller has gone")
        return descriptor in ready


class ControlServer:
    """Answers on the control socket of a store this process has open, one thread a connection."""

    def __init__(self, target: Target | Store) -> None:
        """Begins to listen.

        Raises:
            StorageError: the socket cannot be made.
        """
        from space._node.calls import StoreTarget
        from space._node.store import Store

        self._target = StoreTarget(target) if isinstance(target, Store) else target
        self._path = target.path / SOCKET
        self._open: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._callers: set[_RemoteCaller] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._listener = self._listen()
        self._accepting = threading.Thread(target=self._accept, name="space-control", daemon=True)
        self._accepting.start()
        self._beating = threading.Thread(target=self._beat, name="space-control-alive", daemon=True)
        self._beating.start()

    def _beat(self) -> None:
        while not self._closing.wait(ALIVE_SECONDS):
            with self._lock:
                callers = list(self._callers)
            for caller in callers:
                caller.alive()

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with _address(self._path) as address:
                # the directory is locked by this process, so a socket that is there has no owner any more
                self._path.unlink(missing_ok=True)
                listener.bind(address)
                self._path.chmod(0o600)
            listener.listen(CONNECTIONS_MAX)
        except OSError as error:
            listener.close()
            raise StorageError(f"cannot listen on {self._path}: {error.strerror or error}") from None
        return listener

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                stream, _ = self._listener.accept()
            except OSError:
                self._closing.wait(PROGRESS_SECONDS)  # out of descriptors: some will come back
                continue
            thread = threading.Thread(target=self._serve, args=(stream,), name="space-call", daemon=True)
            with self._lock:
                busy = len(self._open) >= CONNECTIONS_MAX
                if not busy:
                    self._open.add(stream)
                    self._threads.add(thread)
            try:
                if not busy:
                    thread.start()
            except RuntimeError:  # no room for one more thread
                self._ended(stream, thread)
                busy = True
            if busy:
                _refuse(stream)

    def _serve(self, stream: socket.socket) -> None:
        descriptors: list[int] = []
        try:
            with stream, contextlib.suppress(OSError, ProtocolError, CallerGoneError):
                stream.settimeout(REQUEST_SECONDS)
                if _peer_is_ours(stream):
                    head, descriptors, _, _ = socket.recv_fds(
                        stream, LENGTH.size, DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC
                    )
                    with stream.makefile("rb") as rest:
                        request = unpack(rest, head, REQUEST_BYTES_MAX) if head else None
                    if request is not None:
                        stream.settimeout(ANSWER_SECONDS)
                        self._answer(stream, request, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
            self._ended(stream, threading.current_thread())

    def _ended(self, stream: socket.socket, thread: threading.Thread) -> None:
        with self._lock:
            self._open.discard(stream)
            self._threads.discard(thread)

    def _answer(self, stream: socket.socket, request: Message, descriptors: list[int]) -> None:
        caller = _RemoteCaller(stream)
        with self._lock:
            self._callers.add(caller)
        try:
            self._carry_out(caller, request, descriptors)
        finally:
            with self._lock:
                self._callers.discard(caller)
            caller.over()

    def _carry_out(self, caller: _RemoteCaller, request: Message, descriptors: list[int]) -> None:
        try:
            result = self._call(caller, request, descriptors)
            if isinstance(result, Iterator):
                for item in result:
                    caller.item(item)
                result = None
            caller.send({"result": result})
        except SpaceError as error:
            caller.send({"error": error_document(error)})
        except BrokenPipeError:
            caller.send({"error": {"kind": "BrokenPipeError"}})
        except OSError as error:
            caller.send({"error": error_document(StorageError(str(error)))})
        except Exception as error:  # noqa: BLE001 - one call may fail, its process has a store to keep open
            caller.send({"error": error_document(SpaceError(f"{type(error).__name__}: {error}"))})

    def _call(self, caller: _RemoteCaller, request: Message, descriptors: list[int]) -> Any:
        from space._node.calls import carry_out

        return carry_out(self._target, request, caller, descriptors[0] if descriptors else None)

    def retire(self, seconds: float) -> None:
        """Takes no more calls, and gives those being answered so long to end; then it hangs up on them."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._path.unlink()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()  # by then nobody accepts on what may have its number next
        self._beating.join()
        deadline = time.monotonic() + seconds
        while self._running() and time.monotonic() < deadline:
            time.sleep(RETIRE_POLL_SECONDS)
        with self._lock:
            streams = list(self._open)
        for stream in streams:
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)

    def _running(self) -> list[threading.Thread]:
        with self._lock:
            return list(self._threads)

    def close(self) -> None:
        """Hangs up on everybody and removes the socket; what was running ends before this returns."""
        if not self._closing.is_set():
            self.retire(0)
        for thread in self._running():
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse(stream: socket.socket) -> None:
    with stream, contextlib.suppress(OSError):
        stream.settimeout(PROGRESS_SECONDS)
        busy = UnavailableError("as many calls as can be are being answered already", hint="try again")
        stream.sendall(pack({"error": error_document(busy)}, ANSWER_BYTES_MAX))


# --- client ----------------------------------------------------------------------------------------


class NoAnswerError(UnavailableError):
    """Nobody answers there: the call was not heard by anyone."""


class BrokenError(UnavailableError):
    """The connection ended before the answer did: the call may have been carried out."""


class SocketEndpoint:
    """The process behind a control socket, asked one call a connection."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def __str__(self) -> str:
        return str(self._path)

    def check(self) -> None:
        """Whether anybody listens.

        Raises:
            NoAnswerError: nobody does.
        """
        self._connect().close()

    def _connect(self) -> socket.socket:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with _address(self._path) as address:
                stream.connect(address)
            stream.settimeout(SILENCE_SECONDS)
            ours = os.geteuid() == 0 or _peer_is_ours(stream)
        except (OSError, UnavailableError) as error:
            stream.close()
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise NoAnswerError(f"nothing answers at {self._path}: {reason}") from None
        if not ours:
            stream.close()
            raise NoAnswerError(f"the process behind {self._path} is another user's")
        return stream

    def ask(self, request: Message, descriptor: int | None) -> Iterator[Message]:
        """Sends a request; its answers as they come.

        Raises:
            NoAnswerError: nobody heard it.
            BrokenError: the answers ended before their end.
        """
        packed = pack(request, REQUEST_BYTES_MAX)
        with self._connect() as stream, stream.makefile("rb") as answers:
            self._send(stream, packed, descriptor)
            while True:
                message = self._receive(answers)
                if "ended" in message:
                    self._confirm(stream)
                else:
                    yield message

    def _send(self, stream: socket.socket, request: bytes, descriptor: int | None) -> None:
        # a server that has no room answers and hangs up before it reads
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            descriptors = [] if descriptor is None else [descriptor]
            sent = socket.send_fds(stream, [request], descriptors)
            stream.sendall(request[sent:])

    def _receive(self, stream: BinaryIO) -> Message:
        try:
            return unpack(stream, b"", ANSWER_BYTES_MAX)
        except TimeoutError:
            raise BrokenError(
                f"the process at {self._path} has said nothing for {SILENCE_SECONDS:.0f} s",
                hint="it is stopped or stuck; what was acknowledged is kept",
            ) from None
        except (OSError, ProtocolError):
            raise self._broken() from None

    def _confirm(self, stream: socket.socket) -> None:
        try:
            stream.sendall(b"\1")
        except OSError:
            raise self._broken() from None

    def _broken(self) -> BrokenError:
        return BrokenError(
            f"the process that answered at {self._path} has ended", hint="what was acknowledged is kept"
        )


def understood(answers: Iterator[Message], caller: Caller) -> Iterator[Message]:
    """Items and the result among the answers to a call, as they come; the caller is told of progress.

    Raises:
        SpaceError: the call failed.
    """
    for message in answers:
        if "progress" in message:
            if message["progress"]:  # else it only says that it is at work
                caller.progress(message["progress"])
        elif "error" in message:
            error = message["error"] if isinstance(message["error"], dict) else {}
            if error.get("kind") == "BrokenPipeError":
                raise BrokenPipeError
            raise error_of(error)
        else:
            yield message
            if "item" not in message:
                return


class RemoteService(SocketEndpoint):
    """The methods of :class:`space._node.service.Service`, answered by the process behind a socket."""

    def __init__(self, path: str | Path, *, caller: Caller | None = None) -> None:
        """Remembers where to ask; ``caller`` is told of progress.

        Raises:
            NoAnswerError: nothing answers there.
        """
        super().__init__(path)
        self._caller = caller or Caller()
        self.check()

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):
            raise AttributeError(method)
        return lambda **arguments: self._call(method, arguments)

    def _call(self, method: str, arguments: Message) -> Any:
        descriptor = arguments.pop("descriptor", None)
        answers = understood(self.ask({"method": method, "arguments": arguments}, descriptor), self._caller)
        return result_of(answers)


def result_of(answers: Iterator[Message]) -> Any:
    """The result of a call; a stream's items as an iterator."""
    first = next(answers)
    if "item" in first:
        return _items(first, answers)
    result = first.get("result")
    return iter(()) if result is None else result


def _items(first: Message, answers: Iterator[Message]) -> Iterator[Any]:
    yield first["item"]
    yield from (message["item"] for message in answers if "item" in message)


def connect(path: str | Path, *, caller: Caller | None = None) -> Service:
    """The operations of the store whose owner listens at ``path``.

    Raises:
        UnavailableError: nothing answers there.
    """
    return cast("Service", RemoteService(path, caller=caller))
