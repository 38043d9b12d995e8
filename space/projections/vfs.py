"""What "file" and "directory" mean here: the one model that FUSE, NFS and every later file protocol serve.

A :class:`FileSystem` is a tree of *nodes*, each known by its capsule id; names lead from directories to
nodes.  Reads are plain calls, because they are answered from memory-mapped tables and the page cache.
Mutations are awaited: a server may have to ask a leader, and many of them share one batch.

Ordering and durability:

* A mutation is acknowledged when it is visible to every later call of this object.  It is *not* durable:
  :meth:`FileSystem.sync` makes everything acknowledged before it durable.
* :meth:`FileSystem.write` may hold bytes back to join them with the next ones.  Every call that could show
  the difference (reads, attributes, any other mutation) sees them; ``commit`` hands them to the log.
* A write held back that cannot be carried out later (disk full) is reported once, by the next ``write`` or
  ``commit`` of that node, as POSIX reports it at ``fsync`` and ``close``.

Errors are :class:`space.SpaceError` with a neutral ``status``; each protocol has one complete table for it.
Permission bits are not checked here: only the protocol knows the caller's credentials.
"""

from __future__ import annotations

from typing import Final, Protocol

import attrs

from space.events.commands import Buffer
from space.events.ids import NIL, CapsuleId
from space.events.types import Kind

SYNTHETIC_ROOT: Final = CapsuleId(NIL)
"""Node of the directory around a single capsule; no capsule has this id."""

CONTENT_NAME: Final = b"content"
"""The only name in that directory."""


@attrs.frozen
class Caller:
    """Who asks: owner of what is made, and what the log keeps as the actor."""

    uid: int = 0
    gid: int = 0
    view: str = ""

    @property
    def actor(self) -> str:
        """The words for the log, such as ``fuse:uid=1000``."""
        return f"{self.view}:uid={self.uid}"


@attrs.frozen
class Attributes:
    """Attributes of a node; sizes in bytes, times in nanoseconds since 1970.

    ``allocated`` is what is not a hole; ``ino`` is unique in the store and never used again; ``change`` grows
    with every change of the node (RFC 8881 §5.8.1.4).
    """

    id: CapsuleId
    kind: Kind
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    allocated: int
    ino: int
    parent: CapsuleId
    atime: int
    mtime: int
    ctime: int
    btime: int
    change: int


@attrs.frozen
class AttributeChange:
    """What to set; None leaves one as it is."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime: int | None = None
    mtime: int | None = None


@attrs.frozen
class Space:
    """Room on the disk the log lives on: bytes, and how many more files fit."""

    block_bytes: int
    blocks: int
    blocks_free: int
    blocks_available: int
    files: int
    files_free: int


class FileSystem(Protocol):
    """A tree of nodes.

    Every method raises SpaceError; mutations of a read-only one with status READ_ONLY.
    """

    @property
    def root(self) -> CapsuleId:
        """The node everything is found from."""

    @property
    def read_only(self) -> bool:
        """Whether every mutation is refused."""

    @property
    def immutable(self) -> bool:
        """Whether nothing in it ever changes, so that a client may cache for as long as it likes."""

    def attributes(self, node: CapsuleId) -> Attributes:
        """Attributes of a node, also of one that has lost its last name while open."""

    def lookup(self, directory: CapsuleId, name: bytes) -> Attributes:
        """Attributes of what a name leads to."""

    def entries(self, directory: CapsuleId, *, after: bytes, limit: int) -> list[tuple[bytes, Attributes]]:
        """Names after ``after`` in byte order, at most ``limit``, with attributes as of the same moment.

        Going on after the last name received never repeats or misses an entry that was there all along.
        """

    def hold(self, node: CapsuleId) -> None:
        """A client has the node open: its bytes stay, even when it loses its last name."""

    def drop(self, node: CapsuleId) -> None:
        """Ends one :meth:`hold`."""

    def readlink(self, node: CapsuleId) -> bytes:
        """Target of a symbolic link."""

    def read(self, node: CapsuleId, offset: int, length: int) -> bytes:
        """Bytes of a file; fewer than asked only at its end."""

    def xattr(self, node: CapsuleId, name: bytes) -> bytes:
        """An extended attribute; status NO_ATTRIBUTE when it is not set."""

    def xattr_names(self, node: CapsuleId) -> list[bytes]:
        """Names of all extended attributes."""

    def space(self) -> Space:
        """Room left."""

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
        """A new node with a name; in a set-group-id directory it gets the directory's group."""

    async def link(self, node: CapsuleId, directory: CapsuleId, name: bytes, caller: Caller) -> Attributes:
        """One more name for a node."""

    async def remove(self, directory: CapsuleId, name: bytes, caller: Caller, *, is_directory: bool) -> None:
        """Takes a name away: of an empty directory, or of anything else; open nodes go on working."""

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
        """Moves a name, replacing what had the new one unless told not to; or exchanges the two."""

    async def write(self, node: CapsuleId, offset: int, data: Buffer, caller: Caller) -> None:
        """Bytes at an offset; clears set-id bits as POSIX asks."""

    async def set_attributes(self, node: CapsuleId, change: AttributeChange, caller: Caller) -> Attributes:
        """Sets attributes, all or none; a new owner or size clears set-id bits as POSIX asks."""

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
        """Sets an extended attribute; ``create``: it must be new, ``replace``: it must exist."""

    async def remove_xattr(self, node: CapsuleId, name: bytes, caller: Caller) -> None:
        """Removes an extended attribute."""

    async def commit(self, node: CapsuleId) -> None:
        """Hands bytes held back for a node to the log, and reports what went wrong with earlier ones."""

    async def sync(self) -> None:
        """Makes everything acknowledged so far durable; costs little when there is nothing to do."""
