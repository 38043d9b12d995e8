"""A cheap NVMe/TCP host for benchmarks: blocking sockets, prepared commands, a fixed number of them outstanding.

It costs a few microseconds a command, so that the server is what is measured.  It checks the status and the length of
every answer and no more: ``tests/nvme_initiator.py`` is the strict host.  Standard library only: it also runs in
the guest.  Layouts: NVM Express TCP Transport 1.0 section 3.6, Base Specification 2.0 figure 87.
"""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import sys
import time
from typing import Any, Final

BLOCK: Final = 4096
CAPSULE_DATA_MAX: Final = 8192
"""Longer writes travel apart (R2T, H2CData), as the Linux kernel has it for a target that offers no more."""
BUFFER: Final = 8 << 20
"""All answers to what is outstanding fit."""
TIMEOUT_SECONDS: Final = 60.0

_IC: Final = struct.Struct("<BBBBI HBBI112x")
_HEADER: Final = struct.Struct("<BBBBI")
_COMMAND: Final = struct.Struct("<BBBBI BBHI8x8x QI3xB 6I")
_DATA: Final = struct.Struct("<BBBBI HHII4x")
_CONNECT: Final = struct.Struct("<16sH238x256s256s256x")
_LBA_AT: Final = 8 + 40
_DATA_AT: Final = 72
_HOST: Final = b"nqn.2014-08.org.nvmexpress:uuid:0f4b6c52-6a0b-4d1f-9b1e-0a4f5d1c9e12"
_READ: Final = 0x02
_WRITE: Final = 0x01
_FABRICS: Final = 0x7F
_ENABLED: Final = 1 | 6 << 16 | 4 << 20


class Queue:
    """A connected queue."""

    def __init__(self, address: tuple[str, int], nqn: str, number: int, controller: int = 0xFFFF) -> None:
        self.socket = socket.create_connection(address, TIMEOUT_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(_IC.pack(0, 0, 128, 0, 128, 0, 0, 0, 0))
        answer = self.exactly(128)
        if answer[0] != 1:
            raise RuntimeError(f"not an ICResp: {answer[:8].hex()}")
        data = _CONNECT.pack(bytes(range(1, 17)), controller, nqn.encode(), _HOST)
        self.controller = self.command(_FABRICS, 1, (number << 16, 127, 0), data) & 0xFFFF

    def exactly(self, count: int) -> bytes:
        """So many bytes."""
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise RuntimeError("the server closed the connection")
            data += more
        return data

    def command(self, opcode: int, nsid: int, words: tuple[int, ...], data: bytes = b"") -> int:
        """A single command; its result."""
        self.socket.sendall(_command(opcode, 0, nsid, words, len(data), inside=True) + data)
        answer = self.exactly(24)
        result, _, _, _, status = struct.unpack_from("<QHHHH", answer, 8)
        if answer[0] != 5 or status >> 1:
            raise RuntimeError(f"command {opcode:#x} ended with {answer.hex()}")
        return int(result)

    def close(self) -> None:
        """Without a word."""
        self.socket.close()


def _command(
    opcode: int, cid: int, nsid: int, words: tuple[int, ...], length: int, *, inside: bool
) -> bytearray:
    """A CapsuleCmd without its data."""
    size = _DATA_AT + (length if inside else 0)
    kind = 0x01 if inside else 0x5A
    words = (*words, *[0] * (6 - len(words)))
    pdo = _DATA_AT if inside and length else 0
    return bytearray(
        _COMMAND.pack(4, 0, _DATA_AT, pdo, size, opcode, 0x40, cid, nsid, 0, length, kind, *words)
    )


class Host:
    """A controller with one I/O queue."""

    def __init__(self, address: tuple[str, int], nqn: str) -> None:
        self.admin = Queue(address, nqn, 0)
        self.admin.command(_FABRICS, 0, (0, 0x14, _ENABLED))
        while not self.admin.command(_FABRICS, 4, (0, 0x1C)) & 1:
            time.sleep(0.001)
        self.queue = Queue(address, nqn, 1, self.admin.controller)

    def close(self) -> None:
        """The end of both queues."""
        self.queue.close()
        self.admin.close()


class _Work:
    """Commands of one kind, ``depth`` of them outstanding."""

    def __init__(
        self, queue: Queue, nsid: int, operation: str, size: int, depth: int, span: int, seed: int
    ) -> None:
        self._socket = queue.socket
        self._size = size
        self._writes = operation.endswith("write")
        self._random = random.Random(seed).randrange if operation.startswith("rand") else None
        self._places = span // size
        self._place = -1
        self._step = size // BLOCK
        self._count = 0
        inside = self._writes and size <= CAPSULE_DATA_MAX
        opcode = _WRITE if self._writes else _READ
        words = (0, 0, self._step - 1)
        self._commands = [
            _command(opcode, cid, nsid, words, size, inside=inside)
            + (random.Random(seed + cid).randbytes(size) if inside else b"")
            for cid in range(depth)
        ]
        self._data = bytearray() if inside else bytearray(random.Random(seed).randbytes(size))
        self._inside = inside
        self._arrived = [0] * depth

    def _next(self, cid: int) -> bytearray:
        """The next command under an id; no two writes have the same content."""
        command = self._commands[cid]
        if self._random is not None:
            place = self._random(self._places)
        else:
            place = self._place = (self._place + 1) % self._places
        struct.pack_into("<Q", command, _LBA_AT, place * self._step)
        if self._inside:
            self._count += 1
            struct.pack_into("<Q", command, _DATA_AT, self._count)
        self._arrived[cid] = 0
        return command

    def _send_data(self, answer: memoryview) -> None:
        cid, tag, offset, length = _DATA.unpack(answer[:24])[5:]
        if offset or length != self._size:
            raise RuntimeError(f"an R2T for {offset}+{length}")
        self._count += 1
        struct.pack_into("<Q", self._data, 0, self._count)
        head = _DATA.pack(6, 4, 24, 24, 24 + length, cid, tag, 0, length)
        _send(self._socket, [head, self._data])

    def run(self, seconds: float) -> tuple[int, float, list[int]]:
        """Operations, seconds, and nanoseconds each took."""
        buffer = memoryview(bytearray(BUFFER))
        clock = time.perf_counter_ns
        took: list[int] = []
        begun = clock()
        stop = begun + int(seconds * 1e9)
        sent = [begun] * len(self._commands)
        self._socket.sendall(b"".join(self._next(cid) for cid in range(len(sent))))
        outstanding, end = len(sent), 0
        while outstanding:
            count = self._socket.recv_into(buffer[end:])
            if not count:
                raise RuntimeError("the server closed the connection")
            end += count
            at = 0
            ready: list[int] = []
            while end - at >= 8:
                kind, _, _, _, size = _HEADER.unpack_from(buffer, at)
                if end - at < size:
                    break
                if kind == 7:
                    self._arrived[struct.unpack_from("<H", buffer, at + 8)[0]] += size - 24
                elif kind == 5:
                    cid, status = struct.unpack_from("<HH", buffer, at + 20)
                    if status >> 1 or self._arrived[cid] != (0 if self._writes else self._size):
                        raise RuntimeError(f"status {status >> 1:#x}, {self._arrived[cid]} bytes")
                    ready.append(cid)
                elif kind == 9:
                    self._send_data(buffer[at : at + size])
                else:
                    raise RuntimeError(f"a PDU of type {kind}")
                at += size
            buffer[: end - at] = buffer[at:end]
            end -= at
            now = clock()
            took += [now - sent[cid] for cid in ready]
            if now >= stop:
                outstanding -= len(ready)
            elif ready:
                for cid in ready:
                    sent[cid] = now
                _send(self._socket, [self._next(cid) for cid in ready])
        return len(took), (clock() - begun) / 1e9, took


def _send(where: socket.socket, pieces: list[Any]) -> None:
    if len(pieces) == 1:
        where.sendall(pieces[0])
    else:
        where.sendall(b"".join(pieces))


def measure(
    address: tuple[str, int],
    nqn: str,
    nsid: int,
    operation: str,
    size: int,
    depth: int,
    span: int,
    seconds: float,
) -> dict[str, float]:
    """What one queue of one host reaches: ``per_second``, ``seconds``, ``p50_us``, ``p99_us``."""
    host = Host(address, nqn)
    try:
        work = _Work(host.queue, nsid, operation, size, depth, span, os.getpid())
        count, took_seconds, took = work.run(seconds)
    finally:
        host.close()
    took.sort()
    return {
        "per_second": count / took_seconds,
        "seconds": took_seconds,
        "p50_us": took[len(took) // 2] / 1e3,
        "p99_us": took[len(took) * 99 // 100] / 1e3,
    }


def first_block(address: tuple[str, int], nqn: str, nsid: int = 1, block: int = 512) -> int:
    """Connects and reads one block; its length."""
    host = Host(address, nqn)
    try:
        host.queue.socket.sendall(_command(_READ, 0, nsid, (0, 0, 0), block, inside=False))
        answer = host.queue.exactly(24 + block + 24)
        status = struct.unpack_from("<H", answer, 24 + block + 22)[0] >> 1
        if answer[0] != 7 or status:
            raise RuntimeError(f"the first block could not be read: {answer[:24].hex()}")
        return block
    finally:
        host.close()


if __name__ == "__main__":
    port, nqn, nsid, operation, size, depth, span, seconds = sys.argv[1:]
    found = measure(
        ("127.0.0.1", int(port)), nqn, int(nsid), operation, int(size), int(depth), int(span), float(seconds)
    )
    print(json.dumps(found))
