"""The shelf of a store: shards of other zones' capsules, each a capsule of this store, found by its hash.

    /.shards/HOME/CAPSULE/layout        the layout, and the keys sealed for this zone
    /.shards/HOME/CAPSULE/HASH          a shard

Being capsules, they are in the log, are verified and repaired like everything, and go when gc comes after the names are
gone.  The directory is the owner's alone: shards of content that is not encrypted are content.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from blake3 import blake3

from space._errors import ConflictError, CorruptionError, NotFoundError, RefusedError, SpaceError
from space.events import commands as cmd
from space.events.commands import Durability
from space.events.ids import CapsuleId
from space.events.types import Kind
from space.federation.parity import Layout, decode_layout
from space.federation.shelf import Held, Room, decode_held, encode_held
from space.policy.model import Compression, Policy, Sovereignty

if TYPE_CHECKING:
    from space._node.store import Store

DIRECTORY: Final = b".shards"
LAYOUT: Final = b"layout"
NEXT_LAYOUT: Final = b"layout.next"

POLICY: Final = Policy(compression=Compression.NONE, dedupe=False, sovereignty=Sovereignty.ZONE, history_ns=0)
"""What is sent is compressed and, if its policy says so, encrypted already; shards that were dropped are not kept."""


class StoreShelf:
    """See :class:`space.federation.shelf.Shelf`; ``zone`` is the id of the zone the store is in."""

    def __init__(self, store: Store, zone: bytes) -> None:
        self._store = store
        self._zone = zone
        self._lock = threading.Lock()

    def room(self) -> Room:
        found = os.statvfs(self._store.path)
        return Room(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)

    def put_shard(self, home: bytes, capsule: bytes, shard: bytes, body: bytes) -> None:
        if blake3(body).digest() != shard:
            raise CorruptionError(f"a shard of {len(body)} bytes is not the one it is called")
        with self._lock:
            path = self._directory(home, capsule) + b"/" + shard.hex().encode()
            if self._sound(path, shard):
                return
            self._replace(path, body)

    def get_shard(self, asker: bytes, home: bytes, capsule: bytes, shard: bytes) -> bytes:
        self._admit(asker, home, capsule)
        return self._store.get(_path(home, capsule, shard.hex().encode()))

    def missing(self, home: bytes, capsule: bytes, shards: Sequence[bytes]) -> list[bytes]:
        return [
            shard
            for shard in dict.fromkeys(shards)
            if not self._sound(_path(home, capsule, shard.hex().encode()), shard)
        ]

    def put_layout(self, home: bytes, capsule: bytes, held: Held) -> list[bytes]:
        layout = decode_layout(held.layout)
        if (layout.home, layout.capsule) != (home, capsule):
            raise RefusedError("a layout of another zone's capsule, or of another capsule")
        wanted = self._wanted(layout)
        with self._lock:
            directory = self._directory(home, capsule)
            with contextlib.suppress(NotFoundError):
                before = decode_layout(self._held(home, capsule).layout)
                if before.position > layout.position:
                    raise ConflictError(
                        f"shards as of {before.position} are here, and those are of {layout.position}"
                    )
            lost = self.missing(home, capsule, sorted(wanted))
            if not lost:
                self._replace(directory + b"/" + LAYOUT, encode_held(held))
                self._drop(directory, {shard.hex().encode() for shard in wanted})
        return lost

    def get_layout(self, asker: bytes, home: bytes, capsule: bytes) -> Held:
        self._admit(asker, home, capsule)
        held = self._held(home, capsule)
        return held if asker == self._zone else Held(held.layout)

    def delete(self, home: bytes, capsule: bytes) -> None:
        with self._lock, contextlib.suppress(NotFoundError):
            self._store.rm(_path(home, capsule), recursive=True)

    def layouts(self) -> list[Layout]:
        """Every layout that is here."""
        found = []
        for home in self._names(b"/" + DIRECTORY):
            for capsule in self._names(b"/" + DIRECTORY + b"/" + home):
                with contextlib.suppress(SpaceError):
                    path = b"/".join((b"", DIRECTORY, home, capsule, LAYOUT))
                    found.append(decode_layout(decode_held(self._store.get(path)).layout))
        return found

    # --- the tree ----------------------------------------------------------------------------------

    def _held(self, home: bytes, capsule: bytes) -> Held:
        return decode_held(self._store.get(_path(home, capsule, LAYOUT)))

    def _admit(self, asker: bytes, home: bytes, capsule: bytes) -> None:
        """Lets the home, this zone, and zones that are in the layout look.

        Raises:
            NotFoundError: there is nothing of it, or nothing for who asks.
        """
        if asker in (home, self._zone):
            return
        if asker not in decode_layout(self._held(home, capsule).layout).zones:
            raise NotFoundError("no shards of that capsule for that zone")

    def _wanted(self, layout: Layout) -> set[bytes]:
        return layout.wanted(layout.zones.index(self._zone)) if self._zone in layout.zones else set()

    def _sound(self, path: bytes, shard: bytes) -> bool:
        try:
            return blake3(self._store.get(path)).digest() == shard
        except (NotFoundError, CorruptionError):
            return False

    def _directory(self, home: bytes, capsule: bytes) -> bytes:
        """The directory of a capsule's shards, made if it is missing."""
        try:
            self._store.resolve(b"/" + DIRECTORY)
        except NotFoundError:
            with contextlib.suppress(ConflictError):
                self._store.create(
                    Kind.DIRECTORY, parent=self._store.root, name=DIRECTORY, mode=0o700, policy=POLICY
                )
        path = _path(home, capsule)
        self._store.mkdir(path, parents=True)
        return path

    def _replace(self, path: bytes, body: bytes) -> None:
        """Puts bytes at a path, at once and durably, whatever is there."""
        aside = path.rpartition(b"/")[0] + b"/" + NEXT_LAYOUT
        with contextlib.suppress(NotFoundError):  # of a process that was killed
            self._store.rm(aside)
        put = self._store.put(body, name=aside, policy=POLICY)
        directory = self._store.resolve(path.rpartition(b"/")[0])
        command = cmd.Rename(directory, NEXT_LAYOUT, directory, path.rpartition(b"/")[2])
        self._store.execute(command, durability=Durability.DURABLE)
        assert put.size == len(body)

    def _drop(self, directory: bytes, wanted: set[bytes]) -> None:
        for name in self._names(directory):
            if name != LAYOUT and name not in wanted:
                self._store.rm(directory + b"/" + name)

    def _names(self, path: bytes) -> list[bytes]:
        try:
            return [entry.name for entry in self._store.ls(path)]
        except NotFoundError:
            return []


class OwnZone:
    """The shelf of the own zone as a :class:`space.federation.shelf.ZoneClient`."""

    def __init__(self, shelf: StoreShelf, zone: bytes) -> None:
        self._shelf = shelf
        self._zone = zone

    def room(self) -> Room:
        return self._shelf.room()

    def put_shard(self, capsule: bytes, shard: bytes, body: bytes) -> None:
        self._shelf.put_shard(self._zone, capsule, shard, body)

    def get_shard(self, home: bytes, capsule: bytes, shard: bytes) -> bytes:
        return self._shelf.get_shard(self._zone, home, capsule, shard)

    def missing(self, capsule: bytes, shards: Sequence[bytes]) -> list[bytes]:
        return self._shelf.missing(self._zone, capsule, shards)

    def put_layout(self, capsule: bytes, held: Held) -> list[bytes]:
        return self._shelf.put_layout(self._zone, capsule, held)

    def get_layout(self, home: bytes, capsule: bytes) -> Held:
        return self._shelf.get_layout(self._zone, home, capsule)

    def delete(self, capsule: bytes) -> None:
        self._shelf.delete(self._zone, capsule)


def _path(home: bytes, capsule: bytes, *names: bytes) -> bytes:
    parts = (str(uuid.UUID(bytes=home)).encode(), str(CapsuleId(capsule)).encode())
    return b"/".join((b"", DIRECTORY, *parts, *names))
