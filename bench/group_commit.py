"""Group commit in front of a log: what callers queue while a sync is under way becomes one record.

Two fronts for the same thing, to be measured against each other: for tasks of an event loop and for threads.
In both, all that is queued becomes one record, and each caller goes on when the record that carries its bytes
is durable.
"""

from __future__ import annotations

import asyncio
import struct
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from space.wal.log import Log

_LENGTHS: Final = struct.Struct("<I")
BATCH_BYTES_MAX: Final = 16 << 20
"""A batch takes no more: the next one is appended while it is synced."""


def append(log: Log, pieces: Sequence[bytes]) -> int:
    """One record with all pieces; their lengths are its metadata."""
    metadata = b"".join([_LENGTHS.pack(len(piece)) for piece in pieces])
    return log.append(metadata, pieces, time_ns=max(time.time_ns(), log.last_time_ns))


class TaskGroupCommit:
    """For tasks of one event loop; while one batch is synced in a thread, the next is appended."""

    def __init__(self, log: Log, *, in_flight: int = 2) -> None:
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._queued: list[tuple[bytes, asyncio.Future[None]]] = []
        self._free = in_flight
        self._pool = ThreadPoolExecutor(in_flight, "sync")
        self._scheduled = False

    def append(self, data: bytes) -> asyncio.Future[None]:
        """Done when ``data`` is durable."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._queued.append((data, future))
        if self._free and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._start)
        return future

    def _start(self) -> None:
        self._scheduled = False
        while self._queued and self._free:
            self._free -= 1
            batch = self._take()
            index = append(self._log, [data for data, _ in batch])
            self._pool.submit(self._sync, index, [future for _, future in batch])

    def _take(self) -> list[tuple[bytes, asyncio.Future[None]]]:
        size = count = 0
        for count, (data, _) in enumerate(self._queued, 1):  # noqa: B007 - used after the loop
            size += len(data)
            if size >= BATCH_BYTES_MAX:
                break
        batch, self._queued = self._queued[:count], self._queued[count:]
        return batch

    def _sync(self, index: int, futures: list[asyncio.Future[None]]) -> None:
        self._log.sync(index)
        self._loop.call_soon_threadsafe(self._finish, futures)

    def _finish(self, futures: list[asyncio.Future[None]]) -> None:
        self._free += 1
        for future in futures:
            future.set_result(None)
        if self._queued and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._start)

    def close(self) -> None:
        """Ends the threads that sync."""
        self._pool.shutdown()


class ThreadGroupCommit:
    """For threads: who gets the lock appends what all have queued; then all share a sync."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._queued: list[_Ticket] = []

    def append(self, data: bytes) -> None:
        """Returns when ``data`` is durable."""
        ticket = _Ticket(data)
        self._queued.append(ticket)
        with self._lock:
            if not ticket.index:
                batch, self._queued = self._queued, []
                index = append(self._log, [each.data for each in batch])
                for each in batch:
                    each.index = index
        self._log.sync(ticket.index)


class _Ticket:
    __slots__ = ("data", "index")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.index = 0
