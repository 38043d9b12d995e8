"""What the path itself gives: bytes over a bare connection, into memory or a file, with TLS or without.

A sender's time goes from before it connects until the receiver has said that it has everything, on the disk where there
is a file.  The loops are the simplest there are; where they are limited by CPU, so is everybody here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from space._node.federation_keys import ZoneKeys, trust

PIECE_BYTES: Final = 1 << 20
ACCEPT_SECONDS: Final = 60.0
STALL_SECONDS: Final = 300.0
_LENGTH: Final = struct.Struct(">Q")
_FSYNC_BYTES: Final = 4096


def make_keys(home: Path) -> None:
    """Keys of two zones, for :class:`Wire` to speak TLS with as zones do."""
    for name in ("home", "target"):
        ZoneKeys.create(home / name, name, "metro", os.urandom(16), now=datetime.now(UTC))


class Wire:
    """One end of the path.  A receiver takes one connection, on a thread, while whoever sends is asked to."""

    def __init__(self, address: str, keys: str) -> None:
        self._address = address
        home, target = (ZoneKeys.load(Path(keys) / name) for name in ("home", "target"))
        self._server_tls = target.server_context()
        trust(self._server_tls, home.authority)
        self._client_tls = home.client_context(target.authority)
        self._taken: list[float] = []

    # --- receiving -------------------------------------------------------------------------------

    def sink(self, path: str, tls: bool) -> int:
        """Takes one stream of bytes, into a file if one is named; the port."""

        def take(stream: socket.socket) -> None:
            left = _LENGTH.unpack(_exactly(stream, _LENGTH.size))[0]
            buffer = memoryview(bytearray(PIECE_BYTES))
            with open(path or os.devnull, "wb", buffering=0) as file:
                while left and (count := stream.recv_into(buffer)):
                    left -= count
                    if path:
                        file.write(buffer[:count])
                if path:
                    os.fdatasync(file.fileno())
            stream.sendall(b"!" if not left else b"?")

        return self._listen(take, tls=tls)

    def echo(self) -> int:
        """Answers each byte with one; the port."""

        def answer(stream: socket.socket) -> None:
            while byte := stream.recv(1):
                stream.sendall(byte)

        return self._listen(answer)

    def log(self, path: str, size: int) -> int:
        """Takes messages of a size into a file, with an fdatasync for those that came together; the port."""

        def take(stream: socket.socket) -> None:
            whole = 0
            self._taken = []
            with Path(path).open("wb", buffering=0) as file:
                while data := stream.recv(PIECE_BYTES):
                    file.write(data)
                    os.fdatasync(file.fileno())
                    whole += len(data)
                    now = time.monotonic()
                    self._taken += [now] * (whole // size - len(self._taken))
            stream.sendall(b"!")

        return self._listen(take)

    def taken(self) -> list[float]:
        """When each message of the last :meth:`log` was on the disk."""
        return self._taken

    def _listen(self, take: Callable[[socket.socket], None], *, tls: bool = False) -> int:
        listener = socket.create_server((self._address, 0))
        listener.settimeout(ACCEPT_SECONDS)

        def serve() -> None:
            with listener, contextlib.suppress(OSError):  # the sender sees it, and says so
                stream, _ = listener.accept()
                stream.settimeout(STALL_SECONDS)
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._server_tls.wrap_socket(stream, server_side=True) if tls else stream as used:
                    take(used)

        threading.Thread(target=serve, daemon=True).start()
        return int(listener.getsockname()[1])

    # --- sending ---------------------------------------------------------------------------------

    def send(self, address: str, port: int, directory: str, tls: bool) -> float:
        """Seconds until the other end has all files of a directory, one after the other.

        Raises:
            RuntimeError: it has not.
        """
        began = time.monotonic()
        with self._connect(address, port, tls=tls) as stream:
            paths = sorted(Path(directory).iterdir())
            stream.sendall(_LENGTH.pack(sum(path.stat().st_size for path in paths)))
            for path in paths:
                with path.open("rb", buffering=0) as file:
                    while piece := file.read(PIECE_BYTES):
                        stream.sendall(piece)
            if stream.recv(1) != b"!":
                raise RuntimeError("not everything arrived")
            return time.monotonic() - began

    def round_trips(self, address: str, port: int, count: int) -> list[float]:
        """Seconds each byte's answer took."""
        took = []
        with self._connect(address, port) as stream:
            for _ in range(count):
                began = time.monotonic()
                stream.sendall(b"x")
                stream.recv(1)
                took.append(time.monotonic() - began)
        return took

    def steady(self, address: str, port: int, size: int, rate: float, seconds: float) -> list[float]:
        """Messages at a steady rate: when each was handed to the kernel."""
        data, sent = os.urandom(size), []
        with self._connect(address, port) as stream:
            began = time.monotonic()
            for number in range(round(rate * seconds)):
                time.sleep(max(0.0, began + number / rate - time.monotonic()))
                sent.append(time.monotonic())
                stream.sendall(data)
            stream.shutdown(socket.SHUT_WR)
            if stream.recv(1) != b"!":
                raise RuntimeError("not everything arrived")
        return sent

    def _connect(self, address: str, port: int, *, tls: bool = False) -> socket.socket | ssl.SSLSocket:
        stream = socket.create_connection((address, port), STALL_SECONDS)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._client_tls.wrap_socket(stream) if tls else stream

    # --- the disk --------------------------------------------------------------------------------

    def fsyncs(self, path: str, count: int) -> list[float]:
        """Seconds that appending a page and an fdatasync take."""
        took, page = [], bytes(_FSYNC_BYTES)
        with Path(path).open("wb", buffering=0) as file:
            for _ in range(count):
                began = time.monotonic()
                file.write(page)
                os.fdatasync(file.fileno())
                took.append(time.monotonic() - began)
        return took

    def close(self) -> None:
        """Nothing stays: threads are daemons, and sockets end with the process."""


def _exactly(stream: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        piece = stream.recv(size - len(found))
        if not piece:
            raise ConnectionError("the stream ended")
        found += piece
    return found
