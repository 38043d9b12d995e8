"""State and views on LMDB: disposable, checked before it is trusted, rebuilt from the log otherwise.

One environment holds the state's tables and every view's tables; a batch reaches all of them in one
transaction together with its position, so that they are never torn and never out of step, and readers
get consistent snapshots without blocking anybody.

LMDB runs without its own fsync and has no checksums.  Two rules make that safe:

* **An environment is used only if it is sealed.**  On a clean close a seal is written beside it: size and
  CRC32C of the file and the position, chain and digest it stands at.  The first write breaks the seal.
  An environment found unsealed, or that its seal does not fit (power loss, kill -9, a flipped bit), is
  thrown away and rebuilt from the newest sealed checkpoint plus the log.
* **A checkpoint is a sealed copy** of the environment at a position, taken while readers and writers go on.

Each view has two *generations* of tables, named ``view.table.1`` and ``view.table.2``: a rebuild fills one
while everyone reads the other, and becomes visible in one transaction.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import attrs
import crc32c
import lmdb
import msgpack

from space._errors import CorruptionError, DiskFullError, StorageError

STATE_VIEW: Final = "state"
SEAL: Final = "seal"
DATA: Final = "data.mdb"
SEAL_FORMAT: Final = 1
MAP_BYTES: Final = 1 << 40  # address space only; the file grows as needed
MAX_DATABASES: Final = 256
MAX_READERS: Final = 1024
_CHUNK: Final = 4 << 20
_SEAL_BYTES_MAX: Final = 1 << 16

STATE_VERSION: Final = 4
"""Raised when the state's rows change: an older environment is then rebuilt from the log."""


@attrs.frozen
class Layout:
    """What an environment holds.

    Attributes:
        tables: view name → table number → table name; table numbers are unique over all views.
        versions: view name → schema version of its rows.
    """

    tables: Mapping[str, Mapping[int, str]]
    versions: Mapping[str, int]


@attrs.frozen
class Applied:
    """Where an environment stands: last batch applied, the log's chain there, the state digest, its time."""

    position: int = 0
    chain: bytes = bytes(32)
    digest: int = 0
    time_ns: int = 0
    events: int = 0

    def encode(self) -> bytes:
        packed: bytes = msgpack.packb(
            [self.position, self.chain, self.digest.to_bytes(32, "little"), self.time_ns, self.events]
        )
        return packed

    @classmethod
    def decode(cls, data: bytes) -> Applied:
        try:
            position, chain, digest, time_ns, events = msgpack.unpackb(data)
            return cls(position, chain, int.from_bytes(digest, "little"), time_ns, events)
        except Exception:  # noqa: BLE001 - anything but a well-formed row means the same
            raise CorruptionError("the state's position is unreadable", hint="run: space replay") from None


class ReadTransaction:
    """A consistent snapshot of all tables; close it soon, it pins old pages."""

    def __init__(self, txn: lmdb.Transaction, handles: Mapping[int, Any]) -> None:
        self._txn = txn
        self._handles = handles
        self._cursors: dict[int, lmdb.Cursor] = {}

    def get(self, table: int, key: bytes) -> bytes | None:
        try:
            # The stubs allow memoryviews too, which only a transaction opened with buffers=True returns.
            return cast("bytes | None", self._txn.get(key, db=self._handles[table]))
        except lmdb.BadValsizeError:
            return None  # empty or longer than any key: bad input asks for such

    def getter(self, table: int) -> Callable[[bytes], bytes | None]:
        return cast("Callable[[bytes], bytes | None]", partial(self._txn.get, db=self._handles[table]))

    def scan(self, table: int, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        with self._txn.cursor(db=self._handles[table]) as cursor:
            found = cursor.set_range(max(prefix, start)) if prefix or start else cursor.first()
            if not found:
                return
            for key, value in cast("Iterator[tuple[bytes, bytes]]", cursor.iternext()):
                if not key.startswith(prefix):
                    return
                yield key, value

    def last_at_or_before(self, table: int, key: bytes) -> tuple[bytes, bytes] | None:
        """The row with the greatest key not above ``key``."""
        cursor = self._cursors.get(table)
        if cursor is None:  # kept: opening one costs more than the search
            cursor = self._cursors[table] = self._txn.cursor(db=self._handles[table])
        if not cursor.set_range(key):
            return cast("tuple[bytes, bytes]", cursor.item()) if cursor.last() else None
        if cursor.key() == key or cursor.prev():
            return cast("tuple[bytes, bytes]", cursor.item())
        return None

    @property
    def applied(self) -> Applied:
        data = self.get(0, b"applied")
        return Applied() if data is None else Applied.decode(data)

    @property
    def version(self) -> int:
        """Number of the transaction that made what this one sees."""
        return int(self._txn.id())


class WriteTransaction(ReadTransaction):
    """One atomic change of state, views and position."""

    def put(self, table: int, key: bytes, value: bytes) -> None:
        self._txn.put(key, value, db=self._handles[table])

    def put_sorted(self, table: int, rows: list[tuple[bytes, bytes]]) -> None:
        if rows:
            with self._txn.cursor(db=self._handles[table]) as cursor:
                cursor.putmulti(rows)

    def delete(self, table: int, key: bytes) -> None:
        self._txn.delete(key, db=self._handles[table])

    def set_applied(self, applied: Applied) -> None:
        self._txn.put(b"applied", applied.encode(), db=self._handles[0])

    def set_generation(self, view: str, generation: int) -> None:
        self._txn.put(b"generation:" + view.encode(), b"%d" % generation, db=self._handles[0])


class Snapshot(AbstractContextManager[ReadTransaction]):
    """What :meth:`Store.read` returns; no generator, because most reads are so short that one would show."""

    __slots__ = ("_store", "_txn")

    def __init__(self, store: Store) -> None:
        self._store = store

    def __enter__(self) -> ReadTransaction:
        try:
            self._txn, handles = self._store.snapshot()
        except lmdb.Error as error:
            raise _storage(error, self._store.path) from None
        return ReadTransaction(self._txn, handles)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        self._txn.abort()
        if isinstance(error, lmdb.Error):
            raise _storage(error, self._store.path) from None


class Store:
    """One LMDB environment with the state and all views.  Thread-safe for readers; one writer at a time."""

    def __init__(self, path: Path, layout: Layout, *, map_bytes: int = MAP_BYTES) -> None:
        """Opens or creates the environment at ``path`` without judging it: see :func:`is_sealed`.

        Raises:
            StorageError: LMDB cannot open it.
        """
        self.path = path
        self.layout = layout
        path.mkdir(parents=True, exist_ok=True)
        try:
            self._env = lmdb.open(
                str(path),
                map_size=map_bytes,
                max_dbs=MAX_DATABASES,
                max_readers=MAX_READERS,
                sync=False,
                metasync=False,
                lock=True,
                readahead=False,
            )
            self._system = self._env.open_db(b"system")
        except lmdb.Error as error:
            raise _storage(error, path) from None
        self._handles: dict[int, Any] = {}
        self._sealed = (path / SEAL).exists()
        with self._env.begin(write=True) as txn:
            for view in layout.tables:
                self._handles.update(self._named(txn, view, self.generation(view)))
        self._handles[0] = self._system

    def generation(self, view: str) -> int:
        """Which generation of a view's tables readers see."""
        with self._env.begin(db=self._system) as txn:
            return int(txn.get(b"generation:" + view.encode()) or b"1")

    def _named(self, txn: lmdb.Transaction, view: str, generation: int) -> dict[int, Any]:
        # Without a transaction of ours, open_db waits for the writer and keeps the interpreter lock meanwhile.
        return {
            table: self._env.open_db(f"{view}.{name}.{generation}".encode(), txn=txn)
            for table, name in self.layout.tables[view].items()
        }

    def read(self) -> Snapshot:
        """A snapshot of now, for a ``with``.

        Raises:
            StorageError: LMDB fails, or the environment is closed meanwhile.
        """
        return Snapshot(self)

    @property
    def version(self) -> int:
        """Number of the last transaction: what :attr:`ReadTransaction.version` was equal to it is how things are.

        Raises:
            StorageError: the environment is closed.
        """
        try:
            return int(self._env.info()["last_txnid"])
        except lmdb.Error as error:
            raise _storage(error, self.path) from None

    def snapshot(self) -> tuple[lmdb.Transaction, Mapping[int, Any]]:
        while True:
            handles = self._handles
            txn = self._env.begin(buffers=False)
            if handles is self._handles:
                return txn, handles
            txn.abort()  # a rebuilt generation was adopted between the two: they may not fit together

    @contextmanager
    def write(self, handles: Mapping[int, Any] | None = None) -> Iterator[WriteTransaction]:
        """A transaction: all of it on normal exit, nothing of it on an exception.

        Raises:
            CorruptionError: a key is empty or too long, which no event of ours asks for.
            DiskFullError: no space for it; nothing changed.
            StorageError: any other failure of LMDB.
        """
        self._break_seal()
        try:
            with self._env.begin(write=True) as txn:
                yield WriteTransaction(txn, handles or self._handles)
        except lmdb.BadValsizeError:
            raise CorruptionError("the log asks for a row that cannot be", hint="run: space verify") from None
        except lmdb.Error as error:
            raise _storage(error, self.path) from None

    @property
    def applied(self) -> Applied:
        with self.read() as txn:
            return txn.applied

    # --- generations -----------------------------------------------------------------------------

    def shadow(self, views: list[str]) -> dict[int, Any]:
        """Handles in which ``views`` are the other, still invisible generation, emptied.

        One rebuild at a time.
        """
        self._break_seal()
        handles = dict(self._handles)
        with self._env.begin(write=True) as txn:
            for view in views:
                named = self._named(txn, view, 3 - self.generation(view))
                handles.update(named)
                for handle in named.values():
                    txn.drop(handle, delete=False)
        return handles

    def promote(self, txn: WriteTransaction, views: list[str]) -> None:
        """Within ``txn``, makes the other generation the one that counts."""
        for view in views:
            txn.set_generation(view, 3 - self.generation(view))

    def adopt(self, handles: Mapping[int, Any]) -> None:
        """After ``promote`` committed: new readers see what ``shadow`` made; the old rows are freed."""
        old = [handle for table, handle in self._handles.items() if handles[table] is not handle]
        self._handles = dict(handles)
        with self._env.begin(write=True) as txn:
            for handle in old:
                txn.drop(handle, delete=False)

    # --- seals -----------------------------------------------------------------------------------

    def _break_seal(self) -> None:
        if self._sealed:
            (self.path / SEAL).unlink(missing_ok=True)
            self._sealed = False

    def copy_to(self, path: Path) -> Applied:
        """A sealed copy at ``path`` of what is committed now, and where it stands; all others go on meanwhile."""
        path.mkdir(parents=True)
        try:
            self._env.copy(str(path), compact=True)
        except (lmdb.Error, OSError) as error:
            raise _storage(error, path) from None
        copy = lmdb.open(str(path), map_size=MAP_BYTES, max_dbs=MAX_DATABASES, readonly=True, lock=False)
        try:
            system = copy.open_db(b"system", create=False)
            with copy.begin(db=system) as txn:
                applied = Applied.decode(txn.get(b"applied") or Applied().encode())
        finally:
            copy.close()
        write_seal(path, applied, self.layout, durable=True)
        return applied

    def close(self, *, seal: bool = True) -> None:
        """Closes it; with ``seal``, the next start can use it as it is."""
        applied = self.applied
        self._env.close()
        if seal and not self._sealed:
            write_seal(self.path, applied, self.layout, durable=False)


def write_seal(path: Path, applied: Applied, layout: Layout, *, durable: bool) -> None:
    """Seals the closed environment at ``path``; with ``durable``, both files are fsynced first."""
    data = path / DATA
    with data.open("rb") as file:
        if durable:
            os.fdatasync(file.fileno())
        size, crc = _checksum(file)
    body = msgpack.packb([SEAL_FORMAT, size, crc, applied.encode(), dict(layout.versions)])
    temporary = path / (SEAL + ".new")
    with temporary.open("wb") as file:
        file.write(body + crc32c.crc32c(body).to_bytes(4, "little"))
        if durable:
            file.flush()
            os.fdatasync(file.fileno())
    temporary.rename(path / SEAL)
    if durable:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_seal(path: Path, layout: Layout) -> Applied | None:
    """Where the environment at ``path`` stands if it may be used as it is; None if it may not.

    It may not when a byte of it changed, or when a view it was folded for is new or has other rows by now.
    """
    found = _parse_seal(path)
    if found is None or found.versions != dict(layout.versions):
        return None
    try:
        with (path / DATA).open("rb") as file:
            return found.applied if _checksum(file) == (found.size, found.crc) else None
    except OSError:
        return None


def peek_seal(path: Path) -> Applied | None:
    """Where the environment at ``path`` claims to stand; its data is not looked at."""
    found = _parse_seal(path)
    return None if found is None else found.applied


@attrs.frozen
class _Seal:
    size: int
    crc: int
    applied: Applied
    versions: dict[str, int]


def _parse_seal(path: Path) -> _Seal | None:
    try:
        raw = (path / SEAL).read_bytes()
        body, crc = raw[:-4], raw[-4:]
        if len(raw) > _SEAL_BYTES_MAX or crc32c.crc32c(body).to_bytes(4, "little") != crc:
            return None
        seal_format, size, expected, applied, versions = msgpack.unpackb(body)
        return (
            _Seal(size, expected, Applied.decode(applied), versions) if seal_format == SEAL_FORMAT else None
        )
    except (OSError, ValueError, TypeError, msgpack.UnpackException, CorruptionError):
        return None


def copy_sealed(source: Path, target: Path) -> None:
    """A working copy, still sealed, of a sealed environment."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    shutil.copyfile(source / DATA, target / DATA)
    shutil.copyfile(source / SEAL, target / SEAL)


def _checksum(file: Any) -> tuple[int, int]:
    size = crc = 0
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    while count := file.readinto(buffer):
        crc = crc32c.crc32c(view[:count], crc)
        size += count
    return size, crc


def _storage(error: Exception, path: Path) -> StorageError:
    text = str(error)
    if isinstance(error, lmdb.DiskError | lmdb.MapFullError) or "No space left" in text:
        return DiskFullError(
            f"no space for the state in {path}", hint="free some space; the log is untouched"
        )
    return StorageError(
        f"state in {path}: {text}", hint="close the store; the next start rebuilds it from the log"
    )
