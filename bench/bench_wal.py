"""``wal``: durable appends by 64 concurrent writers, and by one that brings 64 records at a time.

The limit is a bare loop of the same batches with pwrite and fdatasync into a file whose space is reserved, as
our segments' is.  SQLite (WAL, ``synchronous=FULL``) and LMDB (with sync) are measured in both forms too: 64
threads with a transaction each, and one writer with 64 records a transaction.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import lmdb

from bench.group_commit import TaskGroupCommit, ThreadGroupCommit, append
from bench.measure import Row, Scale, in_turn
from space.wal.disk import RealDisk
from space.wal.log import Log

WRITERS: Final = 64
SIZES: Final = {"256 B": 256, "4 KiB": 4096, "1 MiB": 1 << 20}
_PEERS: Final = {
    "tasks": ("limit", "SQLite writers", "LMDB writers"),
    "bulk": ("limit", "SQLite bulk", "LMDB bulk"),
    "threads": ("limit",),
}
_CASES: Final = {
    "tasks": f"{WRITERS} writers (tasks)",
    "bulk": f"one writer, {WRITERS} a batch",
    "threads": f"{WRITERS} writers (threads)",
}
_METHOD_BYTES_MAX: Final = 512 << 20  # what one method writes in one round


def run(scale: Scale) -> list[Row]:
    """Appends a second, by size and method."""
    rows: list[Row] = []
    for label, size in SIZES.items():
        batches = min(scale.pick(2000, 8), max(4, _METHOD_BYTES_MAX // (WRITERS * size)))
        with scale.workspace("wal") as home:
            contest = _Contest(home, size, batches)
            rates = in_turn(contest.cases())
        rows += _rows(label, rates)
        scale.note(f"wal: {label} done")
    return rows


def _rows(label: str, rates: dict[str, float]) -> list[Row]:
    return [
        Row(f"{label}, {_CASES[ours]}", "appends/s", rates[ours], peer, rates[peer])
        for ours, peers in _PEERS.items()
        for peer in peers
    ]


class _Contest:
    """One size: every method appends ``batches`` × 64 records, each durable before its writer's next.

    Nothing is removed before the end: the disk would be busy discarding it while the next method runs.
    """

    def __init__(self, home: Path, size: int, batches: int) -> None:
        self._home = home
        self._size = size
        self._batches = batches
        self._records = [os.urandom(size) for _ in range(WRITERS)]
        self._round = 0

    def cases(self) -> dict[str, Callable[[], float]]:
        few = max(2, self._batches // 50)  # these sync for every record
        return {
            "limit": lambda: self._fresh(self._limit, self._batches),
            "tasks": lambda: self._fresh(self._tasks, self._batches),
            "threads": lambda: self._fresh(self._threads, self._batches),
            "bulk": lambda: self._fresh(self._bulk, self._batches),
            "SQLite writers": lambda: self._fresh(self._sqlite_writers, few),
            "SQLite bulk": lambda: self._fresh(self._sqlite_bulk, self._batches // 2),
            "LMDB writers": lambda: self._fresh(self._lmdb_writers, few),
            "LMDB bulk": lambda: self._fresh(self._lmdb_bulk, self._batches // 2),
        }

    def _fresh(self, method: Callable[[Path, int], float], batches: int) -> float:
        """Appends a second, in a directory of its own."""
        batches = max(2, batches)
        self._round += 1
        path = self._home / f"{self._round}"
        path.mkdir()
        os.sync()  # what an earlier method left unwritten is not this one's burden
        return batches * WRITERS / method(path, batches)

    def _limit(self, path: Path, batches: int) -> float:
        batch = b"".join(self._records)
        descriptor = os.open(path / "file", os.O_RDWR | os.O_CREAT)
        try:
            os.posix_fallocate(descriptor, 0, len(batch) * batches)
            os.fsync(descriptor)
            started = time.perf_counter()
            for number in range(batches):
                os.pwrite(descriptor, batch, number * len(batch))
                os.fdatasync(descriptor)
            return time.perf_counter() - started
        finally:
            os.close(descriptor)

    def _log(self, path: Path) -> Log:
        return Log.open(RealDisk(), str(path / "wal"), store_id=bytes(16))

    def _tasks(self, path: Path, batches: int) -> float:
        import uvloop

        return uvloop.run(self._run_tasks(path, batches))

    async def _run_tasks(self, path: Path, batches: int) -> float:
        log = self._log(path)
        front = TaskGroupCommit(log)

        async def write(data: bytes) -> None:
            for _ in range(batches):
                await front.append(data)

        started = time.perf_counter()
        await asyncio.gather(*[write(data) for data in self._records])
        seconds = time.perf_counter() - started
        front.close()
        log.close()
        return seconds

    def _threads(self, path: Path, batches: int) -> float:
        log = self._log(path)
        front = ThreadGroupCommit(log)

        def write(data: bytes) -> None:
            for _ in range(batches):
                front.append(data)

        seconds = _in_threads(write, self._records)
        log.close()
        return seconds

    def _bulk(self, path: Path, batches: int) -> float:
        log = self._log(path)
        started = time.perf_counter()
        for _ in range(batches):
            log.sync(append(log, self._records))
        seconds = time.perf_counter() - started
        log.close()
        return seconds

    def _sqlite(self, path: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(path / "db", timeout=600, isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE IF NOT EXISTS log (position INTEGER PRIMARY KEY, data BLOB)")
        return connection

    def _sqlite_writers(self, path: Path, batches: int) -> float:
        first = self._sqlite(path)

        def write(data: bytes) -> None:
            connection = self._sqlite(path)
            for _ in range(batches):
                connection.execute("INSERT INTO log (data) VALUES (?)", (data,))
            connection.close()

        seconds = _in_threads(write, self._records)
        first.close()
        return seconds

    def _sqlite_bulk(self, path: Path, batches: int) -> float:
        connection = self._sqlite(path)
        rows = [(data,) for data in self._records]
        started = time.perf_counter()
        for _ in range(batches):
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT INTO log (data) VALUES (?)", rows)
            connection.execute("COMMIT")
        seconds = time.perf_counter() - started
        connection.close()
        return seconds

    def _lmdb(self, path: Path) -> lmdb.Environment:
        return lmdb.open(str(path / "lmdb"), map_size=1 << 36, max_readers=2 * WRITERS)

    def _lmdb_writers(self, path: Path, batches: int) -> float:
        environment = self._lmdb(path)

        def write(data: bytes) -> None:
            for _ in range(batches):
                with environment.begin(write=True) as txn:
                    _append_lmdb(txn, data)

        seconds = _in_threads(write, self._records)
        environment.close()
        return seconds

    def _lmdb_bulk(self, path: Path, batches: int) -> float:
        environment = self._lmdb(path)
        started = time.perf_counter()
        position = 0
        for _ in range(batches):
            with environment.begin(write=True) as txn:
                for data in self._records:
                    position += 1
                    txn.put(position.to_bytes(8, "big"), data, append=True)
        seconds = time.perf_counter() - started
        environment.close()
        return seconds


def _append_lmdb(txn: lmdb.Transaction, data: bytes) -> None:
    cursor = txn.cursor()
    last = int.from_bytes(cursor.key(), "big") if cursor.last() else 0
    txn.put((last + 1).to_bytes(8, "big"), data, append=True)


def _in_threads(work: Callable[[bytes], None], records: list[bytes]) -> float:
    """Seconds until one thread a record has done its work; what one raises is raised here."""
    failures: list[BaseException] = []

    def guarded(data: bytes) -> None:
        try:
            work(data)
        except BaseException as error:  # noqa: BLE001 - passed on below
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(data,)) for data in records]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise RuntimeError(f"a writer failed: {failures[0]}") from failures[0]
    return time.perf_counter() - started
