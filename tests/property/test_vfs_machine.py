from __future__ import annotations

import asyncio
import shutil
import stat as modes
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import attrs
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from space._errors import SpaceError, Status
from space._node.local_vfs import PIECES_MAX, RUN_BYTES_MAX, LocalFileSystem
from space._node.store import Store
from space.events.ids import CapsuleId
from space.events.types import Kind
from space.projections.vfs import AttributeChange, Caller

CALLER = Caller(1000, 1000, "test")
NAMES = st.sampled_from([b"a", b"b", b"c", b"d", "ü".encode(), b"n" * 255])
PICK = st.integers(0, 1 << 16)
OFFSETS = st.one_of(st.integers(0, 64), st.sampled_from([4095, 65_535, 65_536, 200_000]))
DATA = st.builds(lambda byte, count: bytes([byte]) * count, st.integers(0, 255), st.integers(0, 70_000))


@attrs.define(eq=False)
class Node:
    """What a node of the model is: a file has data, a directory entries, a symbolic link a target."""

    kind: Kind
    mode: int
    data: bytearray = attrs.field(factory=bytearray)
    entries: dict[bytes, Node] = attrs.field(factory=dict)
    target: bytes = b""
    xattrs: dict[bytes, bytes] = attrs.field(factory=dict)
    id: CapsuleId | None = None


class FileSystemMachine(RuleBasedStateMachine):
    """A file system and a tree of dicts get the same calls and have to agree on every answer."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="space-vfs-"))
        self.loop = asyncio.new_event_loop()
        self.root = Node(Kind.DIRECTORY, 0o755)
        self.held: list[Node] = []
        self.open()
        self.root.id = self.files.root

    def open(self) -> None:
        self.store = Store(self.home / "data", segment_bytes=1 << 20)
        self.files = LocalFileSystem(self.store)

    def teardown(self) -> None:
        try:
            self.compare()
        finally:
            self.store.close()
            self.loop.close()
            shutil.rmtree(self.home)

    # --- the two sides ---------------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        """Every node, parents first; one of several names is enough."""
        found = {id(self.root): self.root}
        todo = [self.root]
        while todo:
            for _, child in sorted(todo.pop().entries.items()):
                if id(child) not in found:
                    found[id(child)] = child
                    todo.append(child)
        return list(found.values()) + [each for each in self.held if id(each) not in found]

    def links(self, node: Node) -> int:
        if node is self.root:
            return 2 + sum(each.kind == Kind.DIRECTORY for each in node.entries.values())
        names = sum(each is node for parent in self.nodes() for each in parent.entries.values())
        if node.kind == Kind.DIRECTORY and names:
            return 2 + sum(each.kind == Kind.DIRECTORY for each in node.entries.values())
        return names

    def inside(self, node: Node, above: Node) -> bool:
        return node is above or any(self.inside(node, each) for each in above.entries.values())

    def directory(self, pick: int) -> Node:
        found = [each for each in self.nodes() if each.kind == Kind.DIRECTORY and each not in self.held]
        return found[pick % len(found)]

    def node(self, pick: int) -> Node:
        found = self.nodes()
        return found[pick % len(found)]

    def call(self, operation: Coroutine[Any, Any, Any], expected: Status | None) -> Any:
        """Runs an operation that has to end as expected; None when it was refused."""
        status, result = None, None
        try:
            result = self.loop.run_until_complete(operation)
        except SpaceError as error:
            status = error.status
        assert status is expected
        return None if status else result or True

    # --- names -----------------------------------------------------------------------------------

    @rule(
        parent=PICK,
        name=NAMES,
        kind=st.sampled_from([Kind.FILE, Kind.FILE, Kind.DIRECTORY, Kind.DIRECTORY, Kind.SYMLINK, Kind.FIFO]),
        mode=st.sampled_from([0o644, 0o755, 0o600, 0o4755, 0o2755]),
    )
    def create(self, parent: int, name: bytes, kind: Kind, mode: int) -> None:
        above = self.directory(parent)
        target = b"../x" if kind == Kind.SYMLINK else b""
        expected = Status.EXISTS if name in above.entries else None
        assert above.id
        made = self.call(self.files.create(above.id, name, kind, CALLER, mode=mode, target=target), expected)
        if made:
            if kind == Kind.DIRECTORY and above.mode & modes.S_ISGID:
                mode |= modes.S_ISGID
            above.entries[name] = Node(kind, mode, target=target, id=made.id)

    @rule(pick=PICK, parent=PICK, name=NAMES)
    def link(self, pick: int, parent: int, name: bytes) -> None:
        node, above = self.node(pick), self.directory(parent)
        expected = None
        if node.kind == Kind.DIRECTORY:
            expected = Status.NOT_PERMITTED
        elif not self.links(node):
            expected = Status.NOT_FOUND
        elif name in above.entries:
            expected = Status.EXISTS
        assert node.id
        assert above.id
        if self.call(self.files.link(node.id, above.id, name, CALLER), expected):
            above.entries[name] = node

    def removable(self, node: Node | None, is_directory: bool) -> Status | None:
        if node is None:
            return Status.NOT_FOUND
        if is_directory and node.kind != Kind.DIRECTORY:
            return Status.NOT_DIRECTORY
        if not is_directory and node.kind == Kind.DIRECTORY:
            return Status.IS_DIRECTORY
        return Status.NOT_EMPTY if node.entries else None

    @rule(parent=PICK, name=NAMES, is_directory=st.booleans(), hold=st.booleans())
    def remove(self, parent: int, name: bytes, is_directory: bool, hold: bool) -> None:
        above = self.directory(parent)
        node = above.entries.get(name)
        expected = self.removable(node, is_directory)
        assert above.id
        if self.call(self.files.remove(above.id, name, CALLER, is_directory=is_directory), expected):
            assert node
            del above.entries[name]
            if hold and node.kind == Kind.FILE and node not in self.held:
                self.held.append(node)

    @rule(parent=PICK, name=NAMES, to=PICK, new=NAMES, replace=st.booleans(), exchange=st.booleans())
    def rename(
        self,
        parent: int,
        name: bytes,
        to: int,
        new: bytes,
        replace: bool,
        exchange: bool,
    ) -> None:
        above, below = self.directory(parent), self.directory(to)
        node, there = above.entries.get(name), below.entries.get(new)
        expected = self.movable(above, node, below, there, replace=replace, exchange=exchange)
        assert above.id
        assert below.id
        moved = self.files.rename(above.id, name, below.id, new, CALLER, replace=replace, exchange=exchange)
        if not self.call(moved, expected) or node is there:
            return
        assert node
        if exchange and there:
            above.entries[name], below.entries[new] = there, node
        else:
            del above.entries[name]
            below.entries[new] = node

    def movable(
        self,
        above: Node,
        node: Node | None,
        below: Node,
        there: Node | None,
        *,
        replace: bool,
        exchange: bool,
    ) -> Status | None:
        if node is None:
            return Status.NOT_FOUND
        if above is not below and node.kind == Kind.DIRECTORY and self.inside(below, node):
            return Status.INVALID
        if exchange:
            if there is None:
                return Status.NOT_FOUND
            if above is not below and there.kind == Kind.DIRECTORY and self.inside(above, there):
                return Status.INVALID
            return None
        if there is None:
            return None
        if not replace:
            return Status.EXISTS
        return None if there is node else self.removable(there, node.kind == Kind.DIRECTORY)

    # --- bytes and attributes --------------------------------------------------------------------

    @rule(pick=PICK, offset=OFFSETS, data=DATA, times=st.integers(1, 4))
    def write(self, pick: int, offset: int, data: bytes, times: int) -> None:
        """Several writes in a row are what is joined before it reaches the log."""
        node = self.node(pick)
        expected = None
        if node.kind != Kind.FILE:
            expected = Status.IS_DIRECTORY if node.kind == Kind.DIRECTORY else Status.INVALID
        for _ in range(times):
            assert node.id
            if not self.call(self.files.write(node.id, offset, data, CALLER), expected):
                return
            if data:
                if len(node.data) < offset:
                    node.data.extend(bytes(offset - len(node.data)))
                node.data[offset : offset + len(data)] = data
            node.mode = _cleared(node.mode)
            offset += len(data)

    @rule(pick=PICK)
    def write_more_than_a_run(self, pick: int) -> None:
        node = self.node(pick)
        if node.kind == Kind.FILE:
            self.write(pick, 7, b"0123456789abcdef" * 20_000, 5)
            assert len(node.data) > RUN_BYTES_MAX

    def file(self, pick: int) -> Node | None:
        found = [each for each in self.nodes() if each.kind == Kind.FILE]
        return found[pick % len(found)] if found else None

    @rule(pick=PICK, other=PICK, start=PICK, offset=OFFSETS, length=st.integers(1, 300_000))
    def copy(self, pick: int, other: int, start: int, offset: int, length: int) -> None:
        """A range of one file becomes one of another, or of the same, whose bytes are those of before."""
        source, target = self.file(pick), self.file(other)
        if source is None or target is None or source.id is None or target.id is None or not source.data:
            return
        start %= len(source.data)
        piece = bytes(source.data[start : start + length])
        self.call(self.files.copy(source.id, start, target.id, offset, len(piece), CALLER), None)
        target.data.extend(bytes(max(0, offset - len(target.data))))
        target.data[offset : offset + len(piece)] = piece
        target.mode = _cleared(target.mode)

    @rule(pick=PICK, offset=OFFSETS, length=st.integers(1, 300_000), hole=st.booleans())
    def allocate(self, pick: int, offset: int, length: int, hole: bool) -> None:
        """Room for a range lets the file grow; a hole leaves its size."""
        node = self.file(pick)
        if node is None or node.id is None:
            return
        if hole:
            self.call(self.files.deallocate(node.id, offset, length, CALLER), None)
            end = min(offset + length, len(node.data))
            node.data[offset:end] = bytes(max(0, end - offset))
        else:
            self.call(self.files.allocate(node.id, offset, length, CALLER), None)
            node.data.extend(bytes(max(0, offset + length - len(node.data))))
        node.mode = _cleared(node.mode)

    @rule(pick=PICK, offset=OFFSETS)
    def seek(self, pick: int, offset: int) -> None:
        """What is said to be a hole reads as zeros, and data and holes take turns up to the end."""
        node = self.file(pick)
        if node is None or node.id is None or offset > len(node.data):
            return
        while offset < len(node.data):
            start = self.files.seek(node.id, offset, data=True)
            hole = node.data[offset : len(node.data) if start is None else start]
            assert not any(hole)
            if start is None:
                break
            assert self.files.seek(node.id, offset, data=False) == (offset if hole else self.end(node, start))
            offset = self.end(node, start)
        assert self.files.seek(node.id, len(node.data), data=True) is None

    def end(self, node: Node, start: int) -> int:
        """Where data ends."""
        assert node.id
        found = self.files.seek(node.id, start, data=False)
        assert found is not None
        assert found > start
        return found

    @rule(pick=PICK, size=st.one_of(OFFSETS, st.just(0)))
    def truncate(self, pick: int, size: int) -> None:
        node = self.node(pick)
        expected = None
        if node.kind != Kind.FILE:
            expected = Status.IS_DIRECTORY if node.kind == Kind.DIRECTORY else Status.INVALID
        assert node.id
        if self.call(self.files.set_attributes(node.id, AttributeChange(size=size), CALLER), expected):
            del node.data[size:]
            node.data.extend(bytes(size - len(node.data)))
            node.mode = _cleared(node.mode)

    @rule(
        pick=PICK, mode=st.sampled_from([0o600, 0o644, 0o4711, 0o2770, 0o1777]), time=st.integers(0, 1 << 62)
    )
    def change_attributes(self, pick: int, mode: int, time: int) -> None:
        node = self.node(pick)
        assert node.id
        change = AttributeChange(mode=mode, atime=time, mtime=time // 2)
        found = self.call(self.files.set_attributes(node.id, change, CALLER), None)
        assert (found.atime, found.mtime) == (time, time // 2)
        node.mode = mode

    @rule(pick=PICK, offset=OFFSETS, length=st.integers(0, 70_000))
    def read(self, pick: int, offset: int, length: int) -> None:
        node = self.node(pick)
        if node.kind == Kind.FILE and node.id:
            assert self.files.read(node.id, offset, length) == node.data[offset : offset + length]

    @rule(pick=PICK, name=st.sampled_from([b"user.a", b"user.b"]), value=st.binary(max_size=100))
    def set_xattr(self, pick: int, name: bytes, value: bytes) -> None:
        node = self.node(pick)
        assert node.id
        self.call(self.files.set_xattr(node.id, name, value, CALLER), None)
        node.xattrs[name] = value

    @rule(pick=PICK, name=st.sampled_from([b"user.a", b"user.b"]))
    def remove_xattr(self, pick: int, name: bytes) -> None:
        node = self.node(pick)
        expected = None if name in node.xattrs else Status.NO_ATTRIBUTE
        assert node.id
        if self.call(self.files.remove_xattr(node.id, name, CALLER), expected):
            del node.xattrs[name]

    # --- what must not matter --------------------------------------------------------------------

    @rule()
    def sync(self) -> None:
        self.loop.run_until_complete(self.files.sync())

    @rule()
    def compare(self) -> None:
        for node in self.nodes():
            assert node.id
            found = self.files.attributes(node.id)
            assert (found.kind, found.mode, found.nlink) == (node.kind, node.mode, self.links(node))
            assert set(self.files.xattr_names(node.id)) == set(node.xattrs)
            for name, value in node.xattrs.items():
                assert self.files.xattr(node.id, name) == value
            if node.kind == Kind.FILE:
                assert found.size == len(node.data)
                assert self.files.read(node.id, 0, found.size + 1) == node.data
            elif node.kind == Kind.SYMLINK:
                assert (self.files.readlink(node.id), found.size) == (node.target, len(node.target))
            elif node.kind == Kind.DIRECTORY:
                self.compare_entries(node)

    def compare_entries(self, node: Node) -> None:
        """Pages of two give the same names, in byte order, as the model has."""
        assert node.id
        listed: list[tuple[bytes, CapsuleId]] = []
        while page := self.files.entries(node.id, after=listed[-1][0] if listed else b"", limit=2):
            listed += [(name, found.id) for name, found in page]
        assert listed == [(name, child.id) for name, child in sorted(node.entries.items())]
        for name, child in listed:
            assert self.files.lookup(node.id, name).id == child
        whole = self.loop.run_until_complete(self.files.listing(node.id, after=0, limit=1 << 20))
        assert whole.complete
        assert sorted((each.name, each.attributes.id) for each in whole.listed) == listed

    @precondition(lambda self: not self.held)
    @rule(rebuild=st.booleans())
    def reopen(self, rebuild: bool) -> None:
        """What the log says is the tree, whether the tables are kept or made again from it."""
        self.loop.run_until_complete(self.files.sync())
        digest = self.store.digest()
        self.store.close()
        if rebuild:
            shutil.rmtree(self.home / "data" / "state")
        self.open()
        assert self.store.digest() == digest
        self.compare()

    @rule()
    def close_held(self) -> None:
        self.held.clear()

    @invariant()
    def bounded(self) -> None:
        """Never more than one run a file is held back, and none as long as an extent or of too many pieces."""
        for run in self.files._runs.values():
            assert run.size == sum(len(data) for _, data in run.pieces) < RUN_BYTES_MAX
            assert len(run.pieces) < PIECES_MAX


def _cleared(mode: int) -> int:
    return mode & ~(modes.S_ISUID | (modes.S_ISGID if mode & modes.S_IXGRP else 0))


TestFileSystemMachine = FileSystemMachine.TestCase
TestFileSystemMachine.__doc__ = "A file system behaves as a tree of dicts, through reopening and rebuilding."
