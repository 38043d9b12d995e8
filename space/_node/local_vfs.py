"""The file model over a store in this process, or over one of its past moments.

Small writes of a file are joined before they become one batch, and consecutive ones one command: a batch for each
4 KiB that ``dd`` or ``tar`` writes would cost a record, a map row and a compression start each.  What is held back
is one run of pieces a file, and it is exact: whatever looks at that file settles its run first, any other mutation
settles all runs (so the log has mutations in the order they were acknowledged), and nobody but this object is
between.  Programs that use the same store directly see the bytes when the run is settled: at the latest after
``close``, ``fsync``, or the next :meth:`sync`.

One thread only: the loop's.  ``sync`` alone waits on another one.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import stat as modes
from typing import Final

import attrs
from blake3 import blake3

from space._errors import ConflictError, NotFoundError, RefusedError, SpaceError, Status, UsageError
from space._node.listing import COOKIE_MIN, Window, Windows, window
from space._node.reading import Reading, Stat
from space._node.store import Store
from space._node.view_policy import ViewPolicy, enforce_view_policy
from space.events import commands as cmd
from space.events.commands import Buffer, Command, Durability, Request
from space.events.ids import ID_BYTES, CapsuleId
from space.events.types import COPY_BYTES_MAX, Kind
from space.projections import content_map
from space.projections.vfs import (
    CONTENT_NAME,
    NOTHING,
    NOW,
    SYNTHETIC_ROOT,
    AttributeChange,
    Attributes,
    Caller,
    Entries,
    Listed,
    Space,
)
from space.statemachine.decide import SIZE_MAX
from space.statemachine.store import ReadTransaction
from space.statemachine.tables import CAPSULE, ENTRY, CapsuleRow

RUN_BYTES_MAX: Final = 1 << 20
"""One extent: a longer run would be cut again."""

PIECES_MAX: Final = 64
"""Pieces of a run: more in a batch would hardly make one cheaper."""

RUNS_MAX: Final = 16
"""Files written at once whose runs are held back; with the length above it bounds memory to 16 MiB."""

DIRECT_BYTES: Final = 256 << 10
"""A write of this length is worth a command of its own, and copying it to be held back is not."""

LISTED_HERE_MAX: Final = 4096
"""Entries of a directory that are sorted in the loop's thread, in a few milliseconds."""

SEEN_MAX: Final = 4096
"""Nodes whose attributes are remembered until something changes; about 3 MiB."""

_UUID_TIME_BYTES: Final = 6
"""Of a capsule's id: the rest is drawn."""


@attrs.define
class _Run:
    """Bytes acknowledged and not yet in the log: pieces in the order they were written, of which the last may grow.

    Nothing may be written beyond ``limit``.
    """

    actor: str
    limit: int
    pieces: list[tuple[int, bytearray]] = attrs.field(factory=list)
    size: int = 0

    def add(self, offset: int, data: Buffer) -> None:
        """More bytes."""
        if self.pieces and offset == self.pieces[-1][0] + len(self.pieces[-1][1]):
            self.pieces[-1][1].extend(data)
        else:
            self.pieces.append((offset, bytearray(data)))
        self.size += len(data)

    def is_full(self) -> bool:
        """Whether it is worth a batch of its own."""
        return self.size >= RUN_BYTES_MAX or len(self.pieces) >= PIECES_MAX


class LocalFileSystem:
    """A :class:`space.projections.vfs.FileSystem` over a :class:`Reading`."""

    def __init__(
        self,
        reading: Reading,
        root: CapsuleId | None = None,
        *,
        read_only: bool = False,
        beside: LocalFileSystem | None = None,
    ) -> None:
        """Serves the tree below ``root``; a file shows as a directory with the one entry ``content``.

        Only a live store can be written to.  ``beside`` is another tree of it that is served as well: trees may have
        files in common, and what one holds back the other has to see.

        Raises:
            NotFoundError: there is no such capsule.
            UsageError: it is neither a directory nor a file.
        """
        self._reading = reading
        self._store = reading if isinstance(reading, Store) and not read_only else None
        self._runs: dict[CapsuleId, _Run] = {} if beside is None else beside._runs
        self._late: dict[CapsuleId, SpaceError] = {} if beside is None else beside._late
        self._windows = Windows()
        self._remembers = type(reading) is Store or not isinstance(reading, Store)
        self._seen: dict[CapsuleId, Attributes] = {}
        self._seen_at: tuple[object, int] = None, 0
        self._root = reading.root if root is None else root
        self._single: CapsuleId | None = None
        self._policy: ViewPolicy | None = None
        kind = reading.stat(self._root).kind
        if kind == Kind.FILE:
            self._single, self._root = self._root, SYNTHETIC_ROOT
        elif kind != Kind.DIRECTORY:
            raise UsageError(f"neither a file nor a directory: {root}")

    def limit(self, view: str, host: str) -> None:
        """Shows only what policies let be seen from where a view that listens at ``host`` can be reached.

        Raises:
            RefusedError: there is something in the tree that must not be; later, each use of such a file is.
        """
        self._policy = enforce_view_policy(self._reading, [self._single or self._root], view, host)

    @property
    def root(self) -> CapsuleId:
        return self._root

    @property
    def read_only(self) -> bool:
        return self._store is None

    @property
    def immutable(self) -> bool:
        return not isinstance(self._reading, Store)

    # --- reading ---------------------------------------------------------------------------------

    def attributes(self, node: CapsuleId) -> Attributes:
        if node == SYNTHETIC_ROOT and self._single:
            return self._around(self._single)
        if node in self._runs:
            self._settle(node)
        return self.permissions(node)

    def stamp(self) -> int:
        return self._reading._tables.version

    def permissions(self, node: CapsuleId) -> Attributes:
        if node == SYNTHETIC_ROOT and self._single:
            return self._around(self._single)
        seen = self._seen_now()
        found = seen.get(node)
        if found is None:
            with self._reading._read() as txn:
                found = _look(txn, node)
            if len(seen) >= SEEN_MAX:
                seen.clear()
            seen[node] = found
        return found

    def _seen_now(self) -> dict[CapsuleId, Attributes]:
        """Attributes that were looked up since anything changed; a cluster's member has to ask each time."""
        reading = self._reading
        if not self._remembers or (self._store is not None and self._store._behind):
            return {}
        tables = reading._tables
        at = tables, tables.version
        if at != self._seen_at:
            self._seen, self._seen_at = {}, at
        return self._seen

    def _around(self, single: CapsuleId) -> Attributes:
        """The directory that holds only ``content``: of its owner, and nothing can be made in it."""
        return attrs.evolve(
            self.attributes(single),
            id=SYNTHETIC_ROOT,
            kind=Kind.DIRECTORY,
            mode=0o555,
            nlink=2,
            size=0,
            allocated=0,
            ino=1,
            parent=SYNTHETIC_ROOT,
        )

    def lookup(self, directory: CapsuleId, name: bytes) -> Attributes:
        if directory == SYNTHETIC_ROOT and self._single:
            if name != CONTENT_NAME:
                raise NotFoundError(f"no entry {name!r}: there is only {CONTENT_NAME!r}")
            return self.attributes(self._single)
        with self._reading._read() as txn:
            entry = self._reading._entry(txn, directory, name, name)
            node = CapsuleId(entry.capsule)
            if node not in self._runs:
                return _look(txn, node)
        return self.attributes(node)

    def entries(self, directory: CapsuleId, *, after: bytes, limit: int) -> list[tuple[bytes, Attributes]]:
        if directory == SYNTHETIC_ROOT and self._single:
            return [(CONTENT_NAME, self.attributes(self._single))] if after < CONTENT_NAME else []
        self._settle_all()
        with self._reading._read() as txn:
            if self._reading._row(txn, directory).kind != Kind.DIRECTORY:
                raise ConflictError(f"not a directory: {directory}", status=Status.NOT_DIRECTORY)
            start = directory + after + b"\0" if after else b""
            rows = itertools.islice(txn.scan(ENTRY, directory, start), limit)
            return [(key[ID_BYTES:], _look(txn, CapsuleId(value[:ID_BYTES]))) for key, value in rows]

    async def listing(self, directory: CapsuleId, *, after: int, limit: int) -> Entries:
        if directory == SYNTHETIC_ROOT and self._single:
            content = Listed(COOKIE_MIN, CONTENT_NAME, self.attributes(self._single))
            return Entries([content] if after < COOKIE_MIN else [], complete=True)
        found = self._reading.stat(directory)
        if found.kind != Kind.DIRECTORY:
            raise ConflictError(f"not a directory: {directory}", status=Status.NOT_DIRECTORY)
        while True:
            places, complete = (await self._sorted(found, after)).page(after, limit)
            listed = self._listed(directory, places)
            if listed or complete:
                return Entries(listed, complete)
            after = places[-1][0]  # all of these have gone

    async def _sorted(self, directory: Stat, after: int) -> Window:
        """A window in which what follows a cookie is."""
        found = self._windows.find(directory.id, directory.change, after)
        if found is None:
            if directory.entries <= LISTED_HERE_MAX:
                found = self._window(directory, after)
            else:
                found = await asyncio.to_thread(self._window, directory, after)
            self._windows.keep(directory.id, found)
        return found

    def _window(self, directory: Stat, after: int) -> Window:
        with self._reading._read() as txn:
            return window(txn, directory.id, directory.change, after)

    def _listed(self, directory: CapsuleId, places: list[tuple[int, bytes]]) -> list[Listed]:
        """Entries as they are now, without those that have gone."""
        self._settle_all()
        listed = []
        with self._reading._read() as txn:
            for cookie, name in places:
                entry = txn.get(ENTRY, directory + name)
                if entry is not None:
                    listed.append(Listed(cookie, name, _look(txn, CapsuleId(entry[:ID_BYTES]))))
        return listed

    def hold(self, node: CapsuleId) -> None:
        if self._store:
            self._store.pinned[node] += 1

    def drop(self, node: CapsuleId) -> None:
        if self._store:
            self._store.pinned[node] -= 1
            if not self._store.pinned[node]:
                del self._store.pinned[node]

    def readlink(self, node: CapsuleId) -> bytes:
        return self._reading.readlink(node)

    def read(self, node: CapsuleId, offset: int, length: int) -> bytes:
        if self._policy is not None:
            self._policy.check(node)
        self._settle(node)
        return self._reading.read(node, offset, length)

    def seek(self, node: CapsuleId, offset: int, *, data: bool) -> int | None:
        size = self.attributes(node).size
        if not 0 <= offset <= size:
            raise UsageError(f"offset {offset} is beyond the end at {size}")
        start, end = next(self._reading.data_ranges(node, offset), (None, offset))
        if data:
            return start
        return end if start == offset else offset

    def xattr(self, node: CapsuleId, name: bytes) -> bytes:
        if node == SYNTHETIC_ROOT:
            raise NotFoundError(f"no attribute {name!r}", status=Status.NO_ATTRIBUTE)
        return self._reading.xattr(node, name)

    def xattr_names(self, node: CapsuleId) -> list[bytes]:
        return [] if node == SYNTHETIC_ROOT else list(self._reading.xattrs(node))

    def space(self) -> Space:
        found = os.statvfs(self._reading.path)
        return Space(
            found.f_frsize, found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree
        )

    # --- names -----------------------------------------------------------------------------------

    async def create(
        self,
        directory: CapsuleId,
        name: bytes,
        kind: Kind,
        caller: Caller,
        *,
        mode: int,
        rdev: int = 0,
        target: bytes = b"",
        change: AttributeChange = NOTHING,
        verifier: bytes = b"",
    ) -> Attributes:
        store = self._writable(directory)
        above = store.stat(directory)
        gid = caller.gid
        if above.mode & modes.S_ISGID:
            gid = above.gid
            if kind == Kind.DIRECTORY:
                mode |= modes.S_ISGID
        drawn = _drawn(store, directory, name, verifier) if verifier else store.new_id()
        create = store.create_command(
            kind,
            parent=directory,
            name=name,
            id=drawn,
            mode=mode,
            uid=caller.uid,
            gid=gid,
            rdev=rdev,
            target=target,
        )
        command = create if change == NOTHING else cmd.Together((create, self._change(drawn, change)))
        try:
            await self._execute(command, caller)
        except ConflictError as error:
            if not verifier or error.status is not Status.EXISTS:
                raise
            found = self.lookup(directory, name)
            if found.id[_UUID_TIME_BYTES:] != drawn[_UUID_TIME_BYTES:]:
                raise
            return found
        return self.attributes(drawn)

    async def link(self, node: CapsuleId, directory: CapsuleId, name: bytes, caller: Caller) -> Attributes:
        self._writable(directory)
        await self._execute(cmd.Link(node, directory, name), caller)
        return self.attributes(node)

    async def remove(self, directory: CapsuleId, name: bytes, caller: Caller, *, is_directory: bool) -> None:
        self._writable(directory)
        await self._execute(cmd.Unlink(directory, name, is_directory), caller)

    async def rename(
        self,
        directory: CapsuleId,
        name: bytes,
        new_directory: CapsuleId,
        new_name: bytes,
        caller: Caller,
        *,
        replace: bool = True,
        exchange: bool = False,
    ) -> None:
        self._writable(directory)
        self._writable(new_directory)
        await self._execute(cmd.Rename(directory, name, new_directory, new_name, replace, exchange), caller)

    # --- bytes and attributes --------------------------------------------------------------------

    async def write(self, node: CapsuleId, offset: int, data: Buffer, caller: Caller) -> None:
        store = self._writable(node)
        self._raise_late(node)
        if offset < 0 or offset + len(data) > SIZE_MAX:
            raise UsageError(f"offset {offset} is beyond the largest size", status=Status.TOO_LARGE)
        if len(data) >= DIRECT_BYTES:
            await self._check_file(store.stat(node), offset + len(data), caller)
            self._settle(node)  # after the wait: others may have written meanwhile
            self._raise_late(node)
            store.write(node, offset, data, durability=Durability.BUFFERED, actor=caller.actor)
            return
        run = self._runs.get(node)
        if run is None or run.actor != caller.actor or offset + len(data) > run.limit:
            found = store.stat(node)
            await self._check_file(found, offset + len(data), caller)
            self._settle(node)  # after the wait, as above: a run that has begun is not to be lost
            run = self._runs[node] = _Run(caller.actor, found.size if found.block_size else SIZE_MAX)
        run.add(offset, data)
        if run.is_full():
            self._settle(node)
        elif len(self._runs) > RUNS_MAX:
            self._settle(next(iter(self._runs)))
        self._raise_late(node)

    async def _check_file(self, found: Stat, end: int, caller: Caller) -> None:
        """Says now what settling would find out too late, and drops set-id bits."""
        if found.kind != Kind.FILE:
            status = Status.IS_DIRECTORY if found.kind == Kind.DIRECTORY else Status.INVALID
            raise ConflictError(f"not a file: {found.id}", status=status)
        if found.block_size and end > found.size:
            raise UsageError(
                f"beyond the end of a block capsule of {found.size} bytes", status=Status.NO_SPACE
            )
        if self._policy is not None:
            self._policy.check(found.id)
        if self._store is not None:
            self._store.check_home(found.id)
        if caller.uid and (mode := _without_set_id(found)) != found.mode:
            await self._execute(cmd.SetAttributes(found.id, mode=mode), caller)

    async def set_attributes(self, node: CapsuleId, change: AttributeChange, caller: Caller) -> Attributes:
        store = self._writable(node)
        mode = change.mode
        if change.uid is not None or change.gid is not None or (change.size is not None and caller.uid):
            found = store.stat(node)
            if found.kind != Kind.DIRECTORY and mode is None:
                cleared = _without_set_id(found)
                mode = cleared if cleared != found.mode else None
        await self._execute(self._change(node, attrs.evolve(change, mode=mode)), caller)
        return self.attributes(node)

    def _change(self, node: CapsuleId, change: AttributeChange) -> cmd.SetAttributes:
        assert self._store
        now = self._store._clock() if NOW in (change.atime, change.mtime) else 0
        atime, mtime = (now if time == NOW else time for time in (change.atime, change.mtime))
        return cmd.SetAttributes(node, change.mode, change.uid, change.gid, atime, mtime, change.size)

    async def set_xattr(
        self,
        node: CapsuleId,
        name: bytes,
        value: bytes,
        caller: Caller,
        *,
        create: bool = False,
        replace: bool = False,
    ) -> None:
        self._writable(node)
        await self._execute(cmd.SetXattr(node, name, value, create, replace), caller)

    async def remove_xattr(self, node: CapsuleId, name: bytes, caller: Caller) -> None:
        self._writable(node)
        await self._execute(cmd.RemoveXattr(node, name), caller)

    async def allocate(self, node: CapsuleId, offset: int, length: int, caller: Caller) -> None:
        store, end = self._writable(node), offset + length
        self._settle(node)
        found = store.stat(node)
        await self._check_file(found, end, caller)
        room = self.space()
        if end - found.allocated > room.block_bytes * room.blocks_available:
            raise UsageError(f"no room for {length} bytes", status=Status.NO_SPACE)
        if end > found.size:
            await self._execute(cmd.Resize(node, end), caller)

    async def deallocate(self, node: CapsuleId, offset: int, length: int, caller: Caller) -> None:
        await self._check_file(self._writable(node).stat(node), 0, caller)
        await self._execute(cmd.Deallocate(node, offset, length), caller)

    async def copy(
        self, source: CapsuleId, source_offset: int, node: CapsuleId, offset: int, length: int, caller: Caller
    ) -> None:
        await self._check_file(self._writable(node).stat(node), offset + length, caller)
        await self._execute_all(
            [
                cmd.CopyRange(node, offset + at, source, source_offset + at, min(COPY_BYTES_MAX, length - at))
                for at in range(0, length, COPY_BYTES_MAX)
            ],
            caller,
        )

    async def commit(self, node: CapsuleId) -> None:
        self._settle(node)
        self._raise_late(node)

    async def sync(self) -> None:
        self._settle_all()
        if self._store and self._store.wal.durable_index < self._store.last:
            await asyncio.to_thread(self._store.sync)

    # --- how a mutation happens ------------------------------------------------------------------

    def _writable(self, node: CapsuleId) -> Store:
        if self._store is None:
            raise RefusedError("this view is read-only", status=Status.READ_ONLY)
        if node == SYNTHETIC_ROOT:
            raise RefusedError("a view of one capsule holds only that", status=Status.NOT_PERMITTED)
        return self._store

    async def _execute(self, command: Command, caller: Caller) -> None:
        self._settle_all()
        assert self._store
        self._store.execute(command, durability=Durability.BUFFERED, actor=caller.actor)

    async def _execute_all(self, commands: list[Command], caller: Caller) -> None:
        """Carries out commands in one batch."""
        self._settle_all()
        assert self._store
        requests = [Request(command, caller.actor) for command in commands]
        for outcome in self._store.execute_all(requests, durability=Durability.BUFFERED):
            if isinstance(outcome, SpaceError):
                raise outcome

    def _settle_all(self) -> None:
        for node in list(self._runs):
            self._settle(node)

    def _settle(self, node: CapsuleId) -> None:
        """Writes what is held back for a node; a failure waits for the next write or commit of it."""
        run = self._runs.pop(node, None)
        if run is None or self._store is None:
            return
        try:
            self._store.write_all(node, run.pieces, durability=Durability.BUFFERED, actor=run.actor)
        except SpaceError as error:
            self._late[node] = error

    def _raise_late(self, node: CapsuleId) -> None:
        if error := self._late.pop(node, None):
            raise error


def _drawn(store: Store, directory: CapsuleId, name: bytes, verifier: bytes) -> CapsuleId:
    """An id that says what its file was created with: a later attempt finds the same bits in it."""
    drawn = blake3(directory + name + verifier, derive_key_context="space create verifier v1")
    return CapsuleId.new(store._clock(), drawn.digest)


def _without_set_id(found: Stat) -> int:
    """The mode after a change by someone without privileges: set-user-id goes, set-group-id with it."""
    drop = modes.S_ISUID
    if found.mode & modes.S_IXGRP:
        drop |= modes.S_ISGID
    return found.mode & ~drop


def _look(txn: ReadTransaction, node: CapsuleId) -> Attributes:
    """Attributes of a capsule, straight from its rows."""
    data = txn.get(CAPSULE, node)
    if data is None:
        raise NotFoundError(f"no capsule {node}")
    row = CapsuleRow.decode(data)
    size, allocated = row.size, 0
    if row.kind == Kind.FILE:
        mapped = txn.get(content_map.MAP, node)
        allocated = min(content_map.allocated(mapped), size) if mapped is not None else 0
    elif row.kind == Kind.SYMLINK:
        size = len(row.target)
    return Attributes(
        node,
        _KINDS[row.kind],
        row.mode,
        row.nlink,
        row.uid,
        row.gid,
        row.rdev,
        size,
        allocated,
        row.ino,
        CapsuleId(row.parent),
        row.atime,
        row.mtime,
        row.ctime,
        row.btime,
        row.change,
    )


_KINDS: Final = {int(kind): kind for kind in Kind}
