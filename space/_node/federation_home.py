"""The home as shipping sees it: its log batch by batch, with the state before and after each, and what is stored.

Translating a batch needs the state as it was then, and a zone may be days behind the present.  So a :class:`Walk` has
tables of its own in ``scratch/``, made like those of a past moment (:mod:`space._node.history`), and folds one batch
after the other into them.  A moment is a read transaction on them: it stays what it is while the walk goes on.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Self

import attrs
from crc32c import crc32c

from space._errors import CorruptionError, RefusedError
from space._node import history
from space.content.frames import Buffer, FrameRef, pack_frames
from space.content.keys import DESTROYED
from space.events.commands import StoredFrame
from space.federation.scope import Extent
from space.federation.sealing import is_for_home, seal_key
from space.federation.translate import Batch
from space.projections import content_map
from space.projections.feed import fold
from space.statemachine.store import ReadTransaction
from space.statemachine.store import Store as Tables
from space.statemachine.tables import U32, ZONE_KEY

if TYPE_CHECKING:
    from space._node.federation_keys import ZoneKeys
    from space._node.federation_zones import Zone
    from space._node.store import Store
    from space.events.types import Event
    from space.policy.model import Policy
    from space.statemachine.tables import Reader
    from space.wal.segment_format import RecordInfo

AHEAD: Final = 64
AHEAD_BYTES: Final = 4 << 20
"""Records that are read from the log at a time, and metadata of them: one by one, finding them takes longest."""


class HomeMoment:
    """The home as of one position: a :class:`space.federation.scope.Moment`."""

    def __init__(self, tables: Tables, position: int) -> None:
        self.position = position
        self._txn, handles = tables.snapshot()
        self._state = ReadTransaction(self._txn, handles)

    @property
    def state(self) -> Reader:
        return self._state

    def extents(self, capsule: bytes, offset: int, length: int) -> Iterator[Extent]:
        return content_map.extents(self._state, capsule, offset, length)

    def __del__(self) -> None:
        self._txn.abort()


class Walk:
    """Goes through the home's log.  One thread only."""

    def __init__(self, store: Store, position: int) -> None:
        """Stands after the batch at ``position``.

        Raises:
            NotFoundError: the log does not reach it.
            CorruptionError: the log is damaged.
            StorageError: there is no room for tables.
        """
        self._store = store
        self._path = history.past_directory(store.path)
        self._tables = history.build(store.path, store.wal, store.views, self._path, history.Target(position))
        self._applied = self._tables.applied
        self.now = HomeMoment(self._tables, position)
        self._ahead: deque[RecordInfo] = deque()

    @property
    def position(self) -> int:
        """The last batch that was gone through."""
        return self._applied.position

    def step(self) -> tuple[HomeMoment, HomeMoment, Batch]:
        """Goes on by one batch, which is there: the moments before and after it, and what it did."""
        before, record = self.now, self._record()
        events: list[Event] = []
        self._applied = fold(self._tables, self._store.views, [record], start=self._applied, seen=events)
        self.now = HomeMoment(self._tables, self.position)
        return before, self.now, Batch(record.index, record.time_ns, events)

    def _record(self) -> RecordInfo:
        """The next record.  Several are read at a time, from the last one on, so that all links are checked."""
        if not self._ahead:
            wal, position = self._store.wal, self.position
            total = 0
            for record in wal.records(
                max(position, min(position + 1, wal.first_index)), self._store.last + 1
            ):
                if record.index > position:
                    self._ahead.append(record)
                    total += len(record.metadata)
                if len(self._ahead) >= AHEAD or total >= AHEAD_BYTES:
                    break
        return self._ahead.popleft()

    def close(self) -> None:
        """Removes the tables; moments of them are not to be used any more."""
        del self.now
        self._tables.close(seal=False)
        shutil.rmtree(self._path, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HomeContent:
    """Stored bytes of the home: a :class:`space.federation.portable.Content`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def stored(self, frame: FrameRef, position: int) -> Buffer | None:
        found = self._store.wal.read_payload(position, frame.payload_offset, frame.stored_length)
        if crc32c(found) == frame.crc:
            return found
        self._told(CorruptionError("damaged", position=position, offset=frame.payload_offset))
        return None

    def recut(self, extent: Extent, policy: Policy, key: int) -> list[StoredFrame] | None:
        store = self._store
        try:
            content = store._content.read(extent.frames, extent.position, extent.skip, extent.length)
        except CorruptionError as error:
            self._told(error)
            return None
        plain = attrs.evolve(policy, dedupe=False)
        encoded = store._writer.encode(content, plain, (key, 1) if key else None)
        return [StoredFrame(pack_frames((each.ref,)), each.stored) for each in encoded]

    def _told(self, error: CorruptionError) -> None:
        """Returns where the log says that the bytes were given back.

        Raises:
            CorruptionError: it does not say so.
        """
        try:
            located = self._store._located(error)
        except RefusedError:
            return
        raise located from None


@attrs.frozen
class Sealer:
    """Seals data keys of the home for one zone: a :data:`space.federation.portable.Seal`."""

    store: Store
    keys: ZoneKeys
    zone: Zone

    def __call__(self, number: int, version: int, wrapped: bytes, for_home: bool) -> bytes:
        """The key as it may leave.

        Raises:
            RefusedError: it cannot be opened here.
        """
        if is_for_home(wrapped):
            with self.store._read() as txn:
                if txn.get(ZONE_KEY, U32.pack(number)) == self.zone.id:
                    return wrapped  # it goes back to the only zone that can open it
            raise RefusedError(f"key {number} is sealed for another zone, and cannot be given on")
        # What is shipped may be a state of long ago: the key may have been wrapped anew since, or destroyed.
        present = self.store._wrapped_key(number, version)
        if present == DESTROYED:
            return DESTROYED
        data_key = self.store._keyring.unwrap(number, version, wrapped if present is None else present)
        own = self.keys.identity
        return seal_key(
            data_key,
            (number, version),
            home=own.id,
            zone=self.zone.id,
            public=own.sealing_key if for_home else self.zone.sealing,
            for_home=for_home,
            random_bytes=self.store._random_bytes,
        )
