"""A tree of files in memory, the same after the same requests: what conversations of NFS clients are replayed over."""

from __future__ import annotations

import errno
import os
from typing import Final

import attrs
from blake3 import blake3

from space._errors import ConflictError, DiskFullError, NotFoundError, RefusedError, Status, UsageError
from space.events.commands import Buffer
from space.events.ids import ROOT, CapsuleId
from space.events.types import Kind
from space.projections.vfs import NOTHING, NOW, AttributeChange, Attributes, Caller, Entries, Listed, Space

BYTES_MAX: Final = 1 << 18
"""Content of a file; beyond it the disk is full.  Sizes may be anything, as those of sparse files."""

NODES_MAX: Final = 1000


@attrs.define(eq=False)
class Inode:
    """A node; ``names`` is how many it has, ``entries`` are a directory's."""

    id: CapsuleId
    ino: int
    kind: Kind
    mode: int
    uid: int
    gid: int
    change: int
    parent: CapsuleId
    rdev: int = 0
    names: int = 1
    size: int = 0
    atime: int = 0
    mtime: int = 0
    ctime: int = 0
    target: bytes = b""
    verifier: bytes = b""
    data: bytearray = attrs.field(factory=bytearray)
    xattrs: dict[bytes, bytes] = attrs.field(factory=dict)
    entries: dict[bytes, CapsuleId] = attrs.field(factory=dict)

    @property
    def attributes(self) -> Attributes:
        links = 2 + len(self.entries) if self.kind == Kind.DIRECTORY else self.names
        return Attributes(
            *(self.id, self.kind, self.mode, links, self.uid, self.gid, self.rdev, self.size, len(self.data)),
            *(self.ino, self.parent, self.atime, self.mtime, self.ctime, 0, self.change),
        )


class MemoryFiles:
    """A :class:`space.projections.vfs.FileSystem`; what is open and has no name stays until the end."""

    root = ROOT
    read_only = False
    immutable = False

    def __init__(self) -> None:
        self.held: dict[CapsuleId, int] = {}
        self._now = 0
        self._made = 1
        root = Inode(ROOT, 1, Kind.DIRECTORY, 0o1777, 0, 0, 0, ROOT)
        self.nodes: dict[CapsuleId, Inode] = {ROOT: root}

    # --- looks

    def _node(self, node: CapsuleId) -> Inode:
        found = self.nodes.get(node)
        if found is None:
            raise NotFoundError("no such node", status=Status.STALE)
        return found

    def _directory(self, node: CapsuleId) -> Inode:
        found = self._node(node)
        if found.kind != Kind.DIRECTORY:
            raise UsageError("no directory", status=Status.NOT_DIRECTORY)
        return found

    def _file(self, node: CapsuleId) -> Inode:
        found = self._node(node)
        if found.kind != Kind.FILE:
            raise UsageError("no file", status=Status.INVALID)
        return found

    def attributes(self, node: CapsuleId) -> Attributes:
        return self._node(node).attributes

    permissions = attributes

    def stamp(self) -> int:
        return self._now

    def lookup(self, directory: CapsuleId, name: bytes) -> Attributes:
        found = self._directory(directory).entries.get(name)
        if found is None:
            raise NotFoundError(f"no entry {name!r}")
        return self.attributes(found)

    def entries(self, directory: CapsuleId, *, after: bytes, limit: int) -> list[tuple[bytes, Attributes]]:
        names = sorted(each for each in self._directory(directory).entries if each > after)
        return [(each, self.lookup(directory, each)) for each in names[:limit]]

    async def listing(self, directory: CapsuleId, *, after: int, limit: int) -> Entries:
        names = sorted((_cookie(each), each) for each in self._directory(directory).entries)
        left = [each for each in names if each[0] > after]
        listed = [Listed(cookie, name, self.lookup(directory, name)) for cookie, name in left[:limit]]
        return Entries(listed, len(left) <= limit)

    def hold(self, node: CapsuleId) -> None:
        self.held[node] = self.held.get(node, 0) + 1

    def drop(self, node: CapsuleId) -> None:
        self.held[node] -= 1
        assert self.held[node] >= 0, "dropped more often than held"

    def readlink(self, node: CapsuleId) -> bytes:
        return self._node(node).target

    def read(self, node: CapsuleId, offset: int, length: int) -> bytes:
        found = self._file(node)
        count = max(0, min(length, found.size - offset))
        return bytes(found.data[offset : offset + count]).ljust(count, b"\0")

    def seek(self, node: CapsuleId, offset: int, *, data: bool) -> int | None:
        found = self._file(node)
        if offset >= found.size:
            raise UsageError("beyond the end", status=Status.INVALID)
        if data:
            return offset if offset < len(found.data) else None
        return max(offset, len(found.data))

    def xattr(self, node: CapsuleId, name: bytes) -> bytes:
        found = self._node(node).xattrs.get(name)
        if found is None:
            raise NotFoundError(f"no attribute {name!r}", status=Status.NO_ATTRIBUTE)
        return found

    def xattr_names(self, node: CapsuleId) -> list[bytes]:
        return sorted(self._node(node).xattrs)

    def space(self) -> Space:
        return Space(4096, 1 << 20, 1 << 19, 1 << 19, NODES_MAX, NODES_MAX - len(self.nodes))

    # --- changes

    def _touch(self, *nodes: Inode, content: bool = False) -> None:
        self._now += 1
        for each in nodes:
            each.change = each.ctime = self._now
            if content:
                each.mtime = self._now

    def _free(self, directory: CapsuleId, name: bytes) -> Inode:
        found = self._directory(directory)
        if name in found.entries:
            raise ConflictError(f"there is {name!r}", status=Status.EXISTS)
        return found

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
        there = self._directory(directory).entries.get(name)
        if there is not None and verifier and self.nodes[there].verifier == verifier:
            return self.attributes(there)
        above = self._free(directory, name)
        if len(self.nodes) >= NODES_MAX:
            raise DiskFullError("too many nodes")
        self._made += 1
        made = CapsuleId(self._made.to_bytes(16, "big"))
        node = Inode(made, self._made, kind, mode, caller.uid, caller.gid, 0, directory, rdev)
        node.target, node.verifier, node.size = target, verifier, len(target)
        self.nodes[made] = node
        self._set(node, change)
        above.entries[name] = made
        self._touch(node, above, content=True)
        return node.attributes

    async def link(self, node: CapsuleId, directory: CapsuleId, name: bytes, caller: Caller) -> Attributes:
        found, above = self._node(node), self._free(directory, name)
        above.entries[name] = node
        found.names += 1
        self._touch(found, above)
        return found.attributes

    async def remove(self, directory: CapsuleId, name: bytes, caller: Caller, *, is_directory: bool) -> None:
        above = self._directory(directory)
        gone = self._node(self.lookup(directory, name).id)
        if gone.entries:
            raise ConflictError("not empty", status=Status.NOT_EMPTY)
        del above.entries[name]
        gone.names -= 1
        if gone.kind == Kind.DIRECTORY:
            del self.nodes[gone.id]
        self._touch(gone, above)

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
        above, below = self._directory(directory), self._directory(new_directory)
        moved = self._node(self.lookup(directory, name).id)
        step = below
        while moved.kind == Kind.DIRECTORY and step.id != ROOT:
            if step is moved:
                raise UsageError("into itself", status=Status.INVALID)
            step = self._node(step.parent)
        there = below.entries.get(new_name)
        if there == moved.id:
            return
        if there is not None:
            await self.remove(new_directory, new_name, caller, is_directory=False)
        del above.entries[name]
        below.entries[new_name] = moved.id
        moved.parent = below.id if moved.kind == Kind.DIRECTORY else moved.parent
        self._touch(moved, above, below)

    async def write(self, node: CapsuleId, offset: int, data: Buffer, caller: Caller) -> None:
        found, end = self._file(node), offset + len(data)
        self._fits(end)
        if offset > len(found.data):
            found.data.extend(bytes(offset - len(found.data)))
        found.data[offset:end] = data
        found.size = max(found.size, end)
        self._touch(found, content=True)

    @staticmethod
    def _fits(end: int) -> None:
        if end > BYTES_MAX:
            raise DiskFullError(os.strerror(errno.ENOSPC))

    def _set(self, node: Inode, change: AttributeChange) -> None:
        for name in ("mode", "uid", "gid", "atime", "mtime"):
            value = getattr(change, name)
            if value is not None:
                setattr(node, name, self._now if value == NOW else value)
        if change.size is not None:
            node.size = change.size
            del node.data[change.size :]

    async def set_attributes(self, node: CapsuleId, change: AttributeChange, caller: Caller) -> Attributes:
        found = self._node(node)
        self._set(found, change)
        self._touch(found)
        return found.attributes

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
        found = self._node(node)
        if create and name in found.xattrs:
            raise ConflictError("there is one", status=Status.EXISTS)
        if replace:
            self.xattr(node, name)
        if len(found.xattrs) >= 16:
            raise DiskFullError("too many attributes")
        found.xattrs[name] = bytes(value)
        self._touch(found)

    async def remove_xattr(self, node: CapsuleId, name: bytes, caller: Caller) -> None:
        self.xattr(node, name)
        del self._node(node).xattrs[name]
        self._touch(self._node(node))

    async def allocate(self, node: CapsuleId, offset: int, length: int, caller: Caller) -> None:
        self._fits(offset + length)
        found = self._file(node)
        found.size = max(found.size, offset + length)
        self._touch(found, content=True)

    async def deallocate(self, node: CapsuleId, offset: int, length: int, caller: Caller) -> None:
        found = self._file(node)
        end = min(offset + length, len(found.data))
        if end > offset:
            found.data[offset:end] = bytes(end - offset)
        self._touch(found, content=True)

    async def copy(
        self, source: CapsuleId, source_offset: int, node: CapsuleId, offset: int, length: int, caller: Caller
    ) -> None:
        if self._node(source).mode & 0o111:  # so that both ways are gone
            raise RefusedError("they share no bytes", status=Status.NOT_PERMITTED)
        self._fits(offset + length)
        await self.write(node, offset, self.read(source, source_offset, length), caller)

    async def commit(self, node: CapsuleId) -> None:
        self._node(node)

    async def sync(self) -> None:
        """All of it is as durable as memory."""


def _cookie(name: bytes) -> int:
    """A place in a listing that follows from the name."""
    return int.from_bytes(blake3(name).digest(7), "big") + 3
