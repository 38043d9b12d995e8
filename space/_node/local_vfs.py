"""The file model over a store in this process, or over one of its past moments.

Consecutive small writes of a file are joined before they become one command: a batch for each 4 KiB that
``dd`` or ``tar`` writes would cost a record, a map row and a compression start each.  What is held back is
one run of bytes a file, and it is exact: whatever looks at that file settles its run first, any other
mutation settles all runs (so the log has mutations in the order they were acknowledged), and nobody but
this object is between.  Programs that use the same store directly see the bytes when the run is settled:
at the latest after ``close``, ``fsync``, or the next :meth:`sync`.

One thread only: the loop's.  ``sync`` alone waits on another one.
"""

from __future__ import annotations

import asyncio
import os
import stat as modes
from typing import Final

import attrs

from space._errors import ConflictError, NotFoundError, RefusedError, SpaceError, Status, UsageError
from space._node.reading import Reading, Stat
from space._node.store import Store
from space.events import commands as cmd
from space.events.commands import Buffer, Durability
from space.events.ids import CapsuleId
from space.events.types import Kind
from space.projections.vfs import (
    CONTENT_NAME,
    SYNTHETIC_ROOT,
    AttributeChange,
    Attributes,
    Caller,
    Space,
)
from space.statemachine.decide import SIZE_MAX

RUN_BYTES_MAX: Final = 1 << 20
"""One extent: a longer run would be cut again."""

RUNS_MAX: Final = 16
"""Files written at once whose runs are held back; with the length above it bounds memory to 16 MiB."""


@attrs.define
class _Run:
    """Bytes acknowledged and not yet in the log."""

    offset: int
    data: bytearray
    actor: str

    @property
    def end(self) -> int:
        return self.offset + len(self.data)


class LocalFileSystem:
    """A :class:`space.projections.vfs.FileSystem` over a :class:`Reading`."""

    def __init__(self, reading: Reading, root: CapsuleId | None = None, *, read_only: bool = False) -> None:
        """Serves the tree below ``root``; a file shows as a directory with the one entry ``content``.

        Only a live store can be written to.

        Raises:
            NotFoundError: there is no such capsule.
            UsageError: it is neither a directory nor a file.
        """
        self._reading = reading
        self._store = reading if isinstance(reading, Store) and not read_only else None
        self._runs: dict[CapsuleId, _Run] = {}
        self._late: dict[CapsuleId, SpaceError] = {}
        self._root = reading.root if root is None else root
        self._single: CapsuleId | None = None
        kind = reading.stat(self._root).kind
        if kind == Kind.FILE:
            self._single, self._root = self._root, SYNTHETIC_ROOT
        elif kind != Kind.DIRECTORY:
            raise UsageError(f"neither a file nor a directory: {root}")

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
        self._settle(node)
        return _attributes(self._reading.stat(node))

    def _around(self, single: CapsuleId) -> Attributes:
        """The directory that holds only ``content``: of its owner, and nothing can be made in it."""
        inside = self._reading.stat(single)
        return attrs.evolve(
            _attributes(inside),
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
        found = self._reading.lookup_stat(directory, name)
        return self.attributes(found.id) if found.id in self._runs else _attributes(found)

    def entries(self, directory: CapsuleId, *, after: bytes, limit: int) -> list[tuple[bytes, Attributes]]:
        if directory == SYNTHETIC_ROOT and self._single:
            return [(CONTENT_NAME, self.attributes(self._single))] if after < CONTENT_NAME else []
        self._settle_all()
        found = self._reading.entries_stat(directory, after=after, limit=limit)
        return [(name, _attributes(each)) for name, each in found]

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
        self._settle(node)
        return self._reading.read(node, offset, length)

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
    ) -> Attributes:
        store = self._writable(directory)
        above = store.stat(directory)
        gid = caller.gid
        if above.mode & modes.S_ISGID:
            gid = above.gid
            if kind == Kind.DIRECTORY:
                mode |= modes.S_ISGID
        command = store.create_command(
            kind, parent=directory, name=name, mode=mode, uid=caller.uid, gid=gid, rdev=rdev, target=target
        )
        self._execute(command, caller)
        return _attributes(store.stat(CapsuleId(command.capsule)))

    async def link(self, node: CapsuleId, directory: CapsuleId, name: bytes, caller: Caller) -> Attributes:
        self._writable(directory)
        self._execute(cmd.Link(node, directory, name), caller)
        return self.attributes(node)

    async def remove(self, directory: CapsuleId, name: bytes, caller: Caller, *, is_directory: bool) -> None:
        self._writable(directory)
        self._execute(cmd.Unlink(directory, name, is_directory), caller)

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
        self._execute(cmd.Rename(directory, name, new_directory, new_name, replace, exchange), caller)

    # --- bytes and attributes --------------------------------------------------------------------

    async def write(self, node: CapsuleId, offset: int, data: Buffer, caller: Caller) -> None:
        store = self._writable(node)
        self._raise_late(node)
        if offset < 0 or offset + len(data) > SIZE_MAX:
            raise UsageError(f"offset {offset} is beyond the largest size", status=Status.TOO_LARGE)
        run = self._runs.get(node)
        if run is None or offset != run.end or run.actor != caller.actor:
            self._settle(node)
            self._check_file(store.stat(node), offset + len(data), caller)
            run = self._runs[node] = _Run(offset, bytearray(), caller.actor)
        run.data += data
        if len(run.data) >= RUN_BYTES_MAX:
            self._settle(node)
        elif len(self._runs) > RUNS_MAX:
            self._settle(next(iter(self._runs)))
        self._raise_late(node)

    def _check_file(self, found: Stat, end: int, caller: Caller) -> None:
        """Says now what settling would find out too late, and drops set-id bits."""
        if found.kind != Kind.FILE:
            status = Status.IS_DIRECTORY if found.kind == Kind.DIRECTORY else Status.INVALID
            raise ConflictError(f"not a file: {found.id}", status=status)
        if found.block_size and end > found.size:
            raise UsageError(
                f"beyond the end of a block capsule of {found.size} bytes", status=Status.NO_SPACE
            )
        if caller.uid and (mode := _without_set_id(found)) != found.mode:
            self._execute(cmd.SetAttributes(found.id, mode=mode), caller)

    async def set_attributes(self, node: CapsuleId, change: AttributeChange, caller: Caller) -> Attributes:
        store = self._writable(node)
        mode = change.mode
        if change.uid is not None or change.gid is not None or (change.size is not None and caller.uid):
            found = store.stat(node)
            if found.kind == Kind.FILE and mode is None:
                cleared = _without_set_id(found)
                mode = cleared if cleared != found.mode else None
        self._execute(
            cmd.SetAttributes(node, mode, change.uid, change.gid, change.atime, change.mtime, change.size),
            caller,
        )
        return self.attributes(node)

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
        self._execute(cmd.SetXattr(node, name, value, create, replace), caller)

    async def remove_xattr(self, node: CapsuleId, name: bytes, caller: Caller) -> None:
        self._writable(node)
        self._execute(cmd.RemoveXattr(node, name), caller)

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

    def _execute(self, command: cmd.Command, caller: Caller) -> None:
        self._settle_all()
        assert self._store
        self._store.execute(command, durability=Durability.BUFFERED, actor=caller.actor)

    def _settle_all(self) -> None:
        for node in list(self._runs):
            self._settle(node)

    def _settle(self, node: CapsuleId) -> None:
        """Writes what is held back for a node; a failure waits for the next write or commit of it."""
        run = self._runs.pop(node, None)
        if run is None or self._store is None:
            return
        try:
            self._store.write(node, run.offset, run.data, durability=Durability.BUFFERED, actor=run.actor)
        except SpaceError as error:
            self._late[node] = error

    def _raise_late(self, node: CapsuleId) -> None:
        if error := self._late.pop(node, None):
            raise error


def _without_set_id(found: Stat) -> int:
    """The mode after a change by someone without privileges: set-user-id goes, set-group-id with it."""
    drop = modes.S_ISUID
    if found.mode & modes.S_IXGRP:
        drop |= modes.S_ISGID
    return found.mode & ~drop


def _attributes(found: Stat) -> Attributes:
    return Attributes(
        found.id,
        found.kind,
        found.mode,
        found.nlink,
        found.uid,
        found.gid,
        found.rdev,
        len(found.target) if found.kind == Kind.SYMLINK else found.size,
        found.allocated,
        found.ino,
        found.parent,
        found.atime,
        found.mtime,
        found.ctime,
        found.btime,
        found.change,
    )
