"""The file model over all volumes, with the capacity of each enforced, and with a moment when nobody writes.

**Capacity.**  A tree may hold as many bytes as its volume has capacity: bytes of files that are not holes, each file
counted once whatever names it has, clones in full.  Names, attributes and empty files count nothing.  What each tree
takes is counted once when it is first written to after a start, and kept up to date with every change since, all of
which come through here: nothing else writes to a volume.  A write beyond it is ENOSPC, and changes nothing.

**The cut.**  A clone of volumes has to have every write acknowledged before it and none after, over all of them.  So it
is carried out in the thread of the loop, between two requests of the kernel: first what is held back is settled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, TypeVar

import attrs
import msgpack

from space._errors import NotFoundError, SpaceError, Status, StorageError, UnavailableError, UsageError
from space._node.csi_volumes import ABOUT, DATA, tree_usage
from space._node.local_vfs import RUN_BYTES_MAX, RUNS_MAX, LocalFileSystem
from space._node.store import Store
from space.events.commands import Buffer, Receipt
from space.events.ids import CapsuleId
from space.events.types import Kind
from space.projections.vfs import AttributeChange, Attributes, Caller

CUT_SECONDS: Final = 20.0
OWNERS_MAX: Final = 1 << 16
"""Nodes whose volume is remembered: about 10 MiB.  Beyond that all are forgotten, and found again when needed."""

DEPTH_MAX: Final = 1 << 16
"""Directories above a file: a longer way up is a circle, which the state never has."""

_HELD_BYTES_MAX: Final = (RUNS_MAX + 1) * RUN_BYTES_MAX

_T = TypeVar("_T")


@attrs.define
class _Tree:
    """What one volume takes, without what is held back."""

    owner: CapsuleId
    capacity: int
    used: int


class VolumeFiles(LocalFileSystem):
    """All volumes, each in a directory with its id as name."""

    def __init__(self, store: Store, home: CapsuleId) -> None:
        """Serves the volumes in the directory ``home``."""
        super().__init__(store, home)
        self._live = store
        self._trees: dict[CapsuleId, _Tree] = {}
        self._owners: dict[CapsuleId, CapsuleId | None] = {}
        self._lost: dict[CapsuleId, int] = {}
        """Files without a name that are still open, and what they take."""
        self._loop: asyncio.AbstractEventLoop | None = None

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

        return self._in_loop(settled)

    def _in_loop(self, work: Callable[[], _T]) -> _T:
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
        directory = self._live.lookup(self.root, volume.encode())
        self._in_loop(self._settle_all)
        return tree_usage(self._live, self._live.lookup(directory, DATA))

    def _owner(self, node: CapsuleId) -> CapsuleId | None:
        """The directory of the volume a node is in; None above the volumes."""
        way: list[CapsuleId] = []
        at = node
        while at not in self._owners:
            if at == self.root or len(way) > DEPTH_MAX:
                return None
            way.append(at)
            above = self._live.stat(at).parent
            if above == self.root:
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

    def _check_room(self, node: CapsuleId, offset: int, length: int) -> None:
        """Refuses a write that would make a tree larger than its volume.

        Raises:
            StorageError: it would; status NO_SPACE.
        """
        tree = self._tree(node)
        if tree is None or tree.used + _HELD_BYTES_MAX + length <= tree.capacity:
            return
        # Near the end it is looked at closely: the volume may have grown, and bytes be written over others.
        self._settle_all()
        tree.capacity = self._capacity(tree.owner)
        if tree.used + length <= tree.capacity:
            return
        over = 0
        for start, end in self._live.data_ranges(node, offset):
            if start >= offset + length:
                break
            over += min(end, offset + length) - max(start, offset)
        if tree.used + length - over > tree.capacity:
            raise StorageError(
                f"the volume has {tree.capacity} bytes, and {tree.used} are used", status=Status.NO_SPACE
            )

    def _grown(self, node: CapsuleId, tree: _Tree | None, before: int) -> None:
        """Accounts for what became of a file that took ``before``."""
        if tree is None:
            return
        change = self._taken(node) - before
        tree.used += change
        if node in self._lost:
            self._lost[node] += change

    def _taken(self, node: CapsuleId) -> int:
        try:
            return self._live.stat(node).allocated
        except NotFoundError:
            return 0

    # --- what changes them -----------------------------------------------------------------------

    async def write(self, node: CapsuleId, offset: int, data: Buffer, caller: Caller) -> None:
        self._check_room(node, offset, len(data))
        await super().write(node, offset, data, caller)

    def _settle(self, node: CapsuleId) -> None:
        if node in self._runs:
            tree, before = self._tree(node), self._taken(node)
            super()._settle(node)
            self._grown(node, tree, before)

    async def set_attributes(self, node: CapsuleId, change: AttributeChange, caller: Caller) -> Attributes:
        if change.size is None:
            return await super().set_attributes(node, change, caller)
        self._settle(node)
        tree, before = self._tree(node), self._taken(node)
        try:
            return await super().set_attributes(node, change, caller)
        finally:
            self._grown(node, tree, before)

    async def remove(self, directory: CapsuleId, name: bytes, caller: Caller, *, is_directory: bool) -> None:
        found = None if is_directory else self._reading.lookup(directory, name)
        await super().remove(directory, name, caller, is_directory=is_directory)
        if found is not None:
            self._unnamed(found)

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
        replaced = None
        if not exchange:
            try:
                replaced = self._reading.lookup(new_directory, new_name)
            except NotFoundError:
                replaced = None
        await super().rename(
            directory, name, new_directory, new_name, caller, replace=replace, exchange=exchange
        )
        if replaced is not None:
            self._unnamed(replaced)

    async def link(self, node: CapsuleId, directory: CapsuleId, name: bytes, caller: Caller) -> Attributes:
        if self._owner(node) != self._owner(directory):
            raise UsageError("a file has names in one volume", status=Status.NOT_PERMITTED)
        return await super().link(node, directory, name, caller)

    def _unnamed(self, node: CapsuleId) -> None:
        """Accounts for a file that may have lost its last name: one still open takes its room until it is closed."""
        stat = self._live.stat(node)
        tree = self._tree(node)
        if tree is None or not stat.deleted or stat.kind != Kind.FILE:
            return
        if self._live.pinned[node]:
            self._lost[node] = stat.allocated
        else:
            tree.used -= stat.allocated

    def drop(self, node: CapsuleId) -> None:
        super().drop(node)
        if node in self._lost and node not in self._live.pinned:
            tree = self._tree(node)
            if tree is not None:
                tree.used -= self._lost[node]
            del self._lost[node]
