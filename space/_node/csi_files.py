"""The file model over all volumes, with the capacity of each enforced, and with a moment when nobody writes.

**Capacity.**  A tree may hold as many bytes as its volume has capacity: bytes of files that are not holes, each file
counted once whatever names it has and as long as it is open, clones in full.  Names, attributes and empty files count
nothing.  What each tree takes is counted once when it is first written to after a start, and then reckoned from the
files that changed since, all of which come through here: nothing else writes to a volume.  Until bytes written since
the last reckoning could fill it, none is needed.  A write beyond the capacity is ENOSPC, and changes nothing.

**Several ways in.**  The mount shows all volumes; an export of one (:meth:`VolumeFiles.export`) shows its tree alone,
with its capacity as the size of the file system.  They have the accounts, and what is held back, in common.

**The cut.**  A clone of volumes has to have every write acknowledged before it and none after, over all of them.  So it
is carried out in the thread of the loop, between two requests of the kernel: first what is held back is settled.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Final, TypeVar

import attrs
import msgpack

from space._errors import NotFoundError, SpaceError, Status, StorageError, UnavailableError, UsageError
from space._node.csi_volumes import ABOUT, DATA, tree_usage
from space._node.local_vfs import LocalFileSystem
from space._node.store import Store
from space.events.commands import Buffer, Receipt
from space.events.ids import CapsuleId
from space.events.types import Kind
from space.projections.vfs import AttributeChange, Attributes, Caller, Space

CUT_SECONDS: Final = 20.0
OWNERS_MAX: Final = 1 << 16
"""Nodes whose volume is remembered: about 10 MiB.  Beyond that all are forgotten, and found again when needed."""

CHANGED_MAX: Final = 4096
"""Files of one volume changed between two reckonings: each is looked at in one."""

DEPTH_MAX: Final = 1 << 16
"""Directories above a file: a longer way up is a circle, which the state never has."""

_T = TypeVar("_T")


@attrs.define
class _Tree:
    """What one volume takes.

    Attributes:
        used: bytes at the last reckoning.
        unsure: bytes written since: at most so many more are used.
        changed: files that changed since, each with what it took at the reckoning.
        under_way: by file, bytes that are being written and may be there already or not.
    """

    owner: CapsuleId
    capacity: int
    used: int
    unsure: int = 0
    changed: dict[CapsuleId, int] = attrs.field(factory=dict)
    under_way: dict[CapsuleId, int] = attrs.field(factory=dict)

    @contextlib.contextmanager
    def writing(self, node: CapsuleId, length: int) -> Iterator[None]:
        """While so much of a file is being written."""
        self.under_way[node] = self.under_way.get(node, 0) + length
        try:
            yield
        finally:
            self.under_way[node] -= length
            if not self.under_way[node]:
                del self.under_way[node]


class VolumeFiles(LocalFileSystem):
    """All volumes, each in a directory with its id as name; or the tree of one."""

    def __init__(
        self, store: Store, home: CapsuleId, tree: CapsuleId | None = None, beside: VolumeFiles | None = None
    ) -> None:
        """Serves the volumes in the directory ``home``; or the ``tree`` of one of them, ``beside`` them all."""
        super().__init__(store, home if tree is None else tree, beside=beside)
        self._account(store, home, beside)

    def _account(self, store: Store, home: CapsuleId, beside: VolumeFiles | None) -> None:
        self._live = store
        self._home = home
        self._trees: dict[CapsuleId, _Tree] = {} if beside is None else beside._trees
        self._owners: dict[CapsuleId, CapsuleId | None] = {} if beside is None else beside._owners
        self._loop: asyncio.AbstractEventLoop | None = None

    def export(self, tree: CapsuleId) -> VolumeFiles:
        """The tree of one volume, as a file system of its own."""
        return VolumeFiles(self._live, self._home, tree, self)

    # --- the cut ---------------------------------------------------------------------------------

    def begun(self) -> None:
        """The loop this is called in is the one that serves."""
        self._loop = asyncio.get_running_loop()

    def ended(self) -> None:
        """Nothing is served any more."""
        self._loop = None

    def cut(self, work: Callable[[], list[Receipt | SpaceError]]) -> list[Receipt | SpaceError]:
        """Does something when everything acknowledged is in the log and before anything more is taken.

        Raises:
            UnavailableError: the loop does not get to it.
        """

        def settled() -> list[Receipt | SpaceError]:
            self._settle_all()
            return work()

        return self.in_loop(settled)

    def in_loop(self, work: Callable[[], _T]) -> _T:
        """What ``work`` gives, carried out between two requests; from any other thread.

        Raises:
            UnavailableError: the loop does not get to it.
        """
        loop = self._loop
        if loop is None:
            return work()
        done: Future[_T] = Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(work())
            except BaseException as error:  # noqa: BLE001 - for the thread that waits
                done.set_exception(error)

        try:
            loop.call_soon_threadsafe(run)
            return done.result(CUT_SECONDS)
        except TimeoutError:
            if done.cancel():
                raise UnavailableError("the mount of the volumes is busy", hint="try again") from None
            return done.result()  # it has begun: whatever comes of it is the answer
        except RuntimeError:
            raise UnavailableError("the mount of the volumes is ending") from None

    # --- accounts --------------------------------------------------------------------------------

    def usage(self, volume: str) -> tuple[int, int]:
        """Bytes and files of a volume, with what is held back; from any thread."""
        directory = self._live.lookup(self._home, volume.encode())
        self.in_loop(self._settle_all)
        return tree_usage(self._live, self._live.lookup(directory, DATA))

    def _owner(self, node: CapsuleId) -> CapsuleId | None:
        """The directory of the volume a node is in; None above the volumes."""
        way: list[CapsuleId] = []
        at = node
        while at not in self._owners:
            if at == self._home or len(way) > DEPTH_MAX:
                return None
            way.append(at)
            above = self._live.stat(at).parent
            if above == self._home:
                self._owners[at] = at
                break
            at = above
        found = self._owners[at]
        if len(self._owners) + len(way) > OWNERS_MAX:
            self._owners.clear()
        for each in way:
            self._owners[each] = found
        return found

    def _tree(self, node: CapsuleId) -> _Tree | None:
        """The accounts of the tree a node is in; None for what is in none: a block device, or what is above."""
        owner = self._owner(node)
        if owner is None:
            return None
        tree = self._trees.get(owner)
        if tree is None:
            try:
                data = self._live.lookup(owner, DATA)
            except NotFoundError:
                return None
            if self._live.stat(data).kind != Kind.DIRECTORY:
                return None
            tree = self._trees[owner] = _Tree(owner, self._capacity(owner), tree_usage(self._live, data)[0])
        return tree

    def _capacity(self, owner: CapsuleId) -> int:
        return int(msgpack.unpackb(self._live.xattr(owner, ABOUT))["capacity"])

    def _room(self, node: CapsuleId, offset: int, length: int) -> AbstractContextManager[None]:
        """For as long as a file gets ``length`` bytes at an offset, which its volume has to have room for.

        Raises:
            StorageError: it has not; status NO_SPACE.
        """
        tree = self._tree(node)
        if tree is None:
            return contextlib.nullcontext()
        self._check_room(tree, node, offset, length)
        return tree.writing(node, length)

    def _check_room(self, tree: _Tree, node: CapsuleId, offset: int, length: int) -> None:
        self._will_change(node, tree)
        if tree.used + tree.unsure + length <= tree.capacity:
            tree.unsure += length
            return
        self._reckon(tree)
        tree.capacity = self._capacity(tree.owner)  # it may have been expanded
        if tree.used + tree.unsure + length - self._held(node, offset, length) > tree.capacity:
            raise StorageError(
                f"the volume has {tree.capacity} bytes, and {tree.used} are used", status=Status.NO_SPACE
            )
        self._will_change(node, tree)
        tree.unsure += length

    def _held(self, node: CapsuleId, offset: int, length: int) -> int:
        """Bytes of a range that are no hole: written over, they take no more room."""
        held = 0
        for start, end in self._live.data_ranges(node, offset):
            if start >= offset + length:
                break
            held += min(end, offset + length) - start
        return held

    def _will_change(self, node: CapsuleId, tree: _Tree) -> None:
        """Remembers what a file takes, before anything of it changes."""
        if node not in tree.changed:
            if len(tree.changed) >= CHANGED_MAX:
                self._reckon(tree)
            tree.changed[node] = self._taken(node)

    def _reckon(self, tree: _Tree) -> None:
        """What a tree takes now, exactly; what is open stays in view: it may have no name any more."""
        self._settle_all()
        before, tree.changed, tree.unsure = tree.changed, {}, sum(tree.under_way.values())
        for node, taken in before.items():
            now = self._taken(node)
            tree.used += now - taken
            if node in tree.under_way or (now and node in self._live.pinned):
                tree.changed[node] = now

    def _taken(self, node: CapsuleId) -> int:
        try:
            stat = self._live.stat(node)
        except NotFoundError:
            return 0
        return 0 if stat.deleted and node not in self._live.pinned else stat.allocated

    def _changes(self, node: CapsuleId) -> None:
        """As :meth:`_will_change`, for a node of any volume or none."""
        tree = self._tree(node)
        if tree is not None:
            self._will_change(node, tree)

    def space(self) -> Space:
        """The disk; of one volume its capacity, less if the disk has less."""
        disk = super().space()
        tree = None if self.root == self._home else self._tree(self.root)
        if tree is None:
            return disk
        self._reckon(tree)
        tree.capacity = self._capacity(tree.owner)
        free = max(0, tree.capacity - tree.used)
        room = min(free, disk.block_bytes * disk.blocks_available)
        return Space(1, tree.capacity, free, room, disk.files, disk.files_free)

    # --- what changes them -----------------------------------------------------------------------

    async def write(self, node: CapsuleId, offset: int, data: Buffer, caller: Caller) -> None:
        with self._room(node, offset, len(data)):
            await super().write(node, offset, data, caller)

    async def allocate(self, node: CapsuleId, offset: int, length: int, caller: Caller) -> None:
        with self._room(node, offset, length):
            await super().allocate(node, offset, length, caller)

    async def deallocate(self, node: CapsuleId, offset: int, length: int, caller: Caller) -> None:
        self._changes(node)
        await super().deallocate(node, offset, length, caller)

    async def copy(
        self, source: CapsuleId, source_offset: int, node: CapsuleId, offset: int, length: int, caller: Caller
    ) -> None:
        with self._room(node, offset, length):
            await super().copy(source, source_offset, node, offset, length, caller)

    async def set_attributes(self, node: CapsuleId, change: AttributeChange, caller: Caller) -> Attributes:
        if change.size is not None:
            self._changes(node)
        return await super().set_attributes(node, change, caller)

    async def remove(self, directory: CapsuleId, name: bytes, caller: Caller, *, is_directory: bool) -> None:
        if not is_directory:
            self._changes(self._live.lookup(directory, name))
        await super().remove(directory, name, caller, is_directory=is_directory)

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
        if self._owner(directory) != self._owner(new_directory):
            raise UsageError("a name cannot leave its volume", status=Status.NOT_PERMITTED)
        with contextlib.suppress(NotFoundError):
            self._changes(self._live.lookup(new_directory, new_name))
        await super().rename(
            directory, name, new_directory, new_name, caller, replace=replace, exchange=exchange
        )

    async def link(self, node: CapsuleId, directory: CapsuleId, name: bytes, caller: Caller) -> Attributes:
        if self._owner(node) != self._owner(directory):
            raise UsageError("a file has names in one volume", status=Status.NOT_PERMITTED)
        return await super().link(node, directory, name, caller)
