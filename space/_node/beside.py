"""A past moment beside the process that owns the store: read without its lock, by any number of processes.

The past does not change, so nobody has to be asked: the log is opened for reading as it is, and the tables of
the moment are made from a checkpoint and the log in ``scratch/``.  Two things the owner may do meanwhile
matter.  It may thin checkpoints, which only means that another one is taken.  And its gc may give payload back to
the disk that the moment still points to: it declares that in the log first, so bytes that are not what was
written are looked up there, and are an error in any case.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from pathlib import Path
from typing import Final

from space._errors import CorruptionError, NotFoundError, UsageError
from space._node import history
from space._node.federation_moments import zone_moment
from space._node.keys_file import MasterFile
from space._node.reading import Reading
from space._node.store import (
    CACHE_BYTES,
    FORMAT_FILE,
    FORMAT_NEW,
    WAL,
    clear_errors,
    located,
    lost,
    read_format,
    read_store_id,
    refuse_reclaimed,
    store_key,
    usable_key,
)
from space.content.cache import FrameCache
from space.content.keys import DESTROYED, Keyring
from space.content.pipeline import ContentReader
from space.events.codec import decode_batch
from space.events.ids import AtPosition, Moment, parse_moment
from space.events.types import REWRAPPED, KeyDestroyed, KeysRewrapped, PayloadReclaimed
from space.projections.contract import registered_views
from space.statemachine.apply import RECLAIMED_RANGE
from space.statemachine.store import Store as LmdbStore
from space.statemachine.tables import KEY, RECLAIMED, SNAPSHOT, U32, U64, SnapshotRow
from space.wal.disk import RealDisk
from space.wal.log import Log
from space.wal.raft_state import read_raft_state

_BARE: Final = ("@", "-")
"""How moments begin that are never taken for the name of a snapshot: those are looked up in the present state."""


def open_beside(path: str | Path, moment: str | Moment) -> PastBeside:
    """A store as it was at ``moment``, whoever has it open, or nobody.

    ``moment`` is as for :meth:`space._node.store.Store.at`.

    Raises:
        NotFoundError: there is no store, or its log does not reach the moment.
        UsageError: neither a moment nor the name of a snapshot.
        CorruptionError: the log is damaged.
        StorageError: the disk refuses.
    """
    home = Path(path)
    with clear_errors(home):
        store = read_format(home / FORMAT_FILE)
        if not any((home / WAL).glob("*.seg")):
            if store is not None:
                raise lost(WAL, f"the log in {home / WAL} is gone")
            raise NotFoundError(f"no store at {home}", hint="space put or space import makes one")
        store = store or read_format(home / FORMAT_NEW) or read_store_id(RealDisk(), home / WAL)
        if store is None:
            raise lost(FORMAT_FILE, f"{home / FORMAT_FILE} and the log's first blocks are damaged")
        history.clear_scratch(home, owner=False)
        return PastBeside(home, store, moment)


class PastBeside(Reading):
    """The store right after a moment; read-only.  Made by :func:`open_beside`."""

    def __init__(self, home: Path, store: bytes, moment: str | Moment) -> None:
        self.path = home
        self._store_id = store
        self._views = registered_views()
        self._learning = threading.Lock()
        with contextlib.ExitStack() as undo:
            self.wal = self._open_log()
            undo.callback(self.wal.close)
            self.last = self._last()
            self.target = history.locate(self.wal, self._understood(moment), self.last)
            self._scratch = history.past_directory(home)
            undo.callback(shutil.rmtree, self._scratch, ignore_errors=True)
            tables = self._tables_at(self._scratch, self.target)
            undo.callback(tables.close, seal=False)
            self._seen = self.target.position - 1
            super().__init__(tables, self._new_reader())
            self._undo = undo.pop_all()

    def _last(self) -> int:
        """The end of what counts: on a member of a cluster, what was known to be committed when this was opened."""
        state = read_raft_state(RealDisk(), str(self.path / WAL), store_id=self._store_id)
        if state is None or state.configuration.voters == (state.node,):
            return self.wal.last_index
        return min(state.commit, self.wal.last_index)

    def _open_log(self) -> Log:
        return Log.open(RealDisk(), str(self.path / WAL), store_id=self._store_id, read_only=True)

    def _tables_at(self, scratch: Path, target: history.Target) -> LmdbStore:
        return history.build(self.path, self.wal, self._views, scratch, target)

    def _understood(self, moment: str | Moment) -> Moment:
        if not isinstance(moment, str):
            return moment
        if not moment.startswith(_BARE):
            return self._named(moment) or parse_moment(moment, now_ns=time.time_ns())
        try:
            return parse_moment(moment, now_ns=time.time_ns())
        except UsageError:
            if found := self._named(moment):
                return found
            raise

    def _named(self, name: str) -> Moment | None:
        """The moment a snapshot names, or a position of another zone, as of the end of the log."""
        scratch = history.past_directory(self.path)
        try:
            tables = self._tables_at(scratch, history.Target(self.last))
            try:
                with tables.read() as txn:
                    data = txn.get(SNAPSHOT, name.encode(errors="surrogatepass"))
                    shipped = None if data is not None else zone_moment(txn, self.wal, self.last, name)
            finally:
                tables.close(seal=False)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if data is None:
            return shipped
        row = SnapshotRow.decode(data)
        return AtPosition(row.position, row.event)

    def _new_reader(self) -> ContentReader:
        self._keyring = Keyring(
            self._wrapped_key,
            store_key=store_key(self._store_id),
            master_keys=MasterFile.of(self.path).load(),
        )
        cache = FrameCache(CACHE_BYTES)
        return ContentReader(
            fetch=self.wal.read_payload, keyring=self._keyring, cache=cache, hash_key=self._keyring.hash_key()
        )

    def _wrapped_key(self, key: int, version: int) -> bytes | None:
        """A row as it is by now: of the moment's, the master key may be gone, and the key may be destroyed."""
        row = self._key_row(key, version)
        if row and not self._keyring.wrapped_by(key, version, row):
            self._keyring.use(MasterFile.of(self.path).load())
            self._learn_later()
            row = self._key_row(key, version)
        return usable_key(row, key)

    def _key_row(self, key: int, version: int) -> bytes | None:
        with self._read() as txn:
            return txn.get(KEY, U32.pack(key) + U32.pack(version))

    def _located(self, error: CorruptionError) -> CorruptionError:
        """Raises RefusedError for bytes that are gone because gc gave them back, at any time."""
        if not error.segment and error.position >= 1:
            self._learn_later()
            with self._read() as txn:
                refuse_reclaimed(txn, error)
        return located(self.wal, error)

    def _learn_later(self) -> None:
        """Notes in the tables what the log by now says was reclaimed after the moment, and of keys."""
        with self._learning, contextlib.closing(self._open_log()) as log:
            for record in log.records(self._seen + 1):
                for entry in decode_batch(record.metadata):
                    for _, event in entry.events:
                        if isinstance(event, PayloadReclaimed | KeysRewrapped | KeyDestroyed):
                            self._note(event)
                self._seen = record.index

    def _note(self, event: PayloadReclaimed | KeysRewrapped | KeyDestroyed) -> None:
        with self._tables.write() as txn:
            if isinstance(event, PayloadReclaimed):
                for position, offset, length in RECLAIMED_RANGE.iter_unpack(event.ranges):
                    txn.put(RECLAIMED, U64.pack(position) + U32.pack(offset), U32.pack(length))
            elif isinstance(event, KeysRewrapped):
                for key, version, wrapped in REWRAPPED.iter_unpack(event.rows):
                    txn.put(KEY, U32.pack(key) + U32.pack(version), wrapped)
            else:
                for number, _ in list(txn.scan(KEY, U32.pack(event.key))):
                    txn.put(KEY, number, DESTROYED)

    def close(self) -> None:
        """Removes the tables and closes the log; closing twice does nothing."""
        self._undo.close()
