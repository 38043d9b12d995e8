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

from typing import Final, NamedTuple, Protocol

import attrs

from space.events.commands import Buffer
from space.events.fast import fast_frozen
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


@fast_frozen
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


NOW: Final = -(1 << 63)
"""Stands for the time at which a change is carried out."""


@attrs.frozen
class AttributeChange:
    """What to set; None leaves one as it is; a time may be :data:`NOW`."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime: int | None = None
    mtime: int | None = None


NOTHING: Final = AttributeChange()


class Listed(NamedTuple):
    """One entry of a directory; ``cookie`` (from 3 to 2**63 - 1) says where in the listing it is."""

    cookie: int
    name: bytes
    attributes: Attributes


class Entries(NamedTuple):
    """Part of a listing, and whether it ends there."""

    listed: list[Listed]
    complete: bool


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

    def stamp(self) -> int:
        """Number of the last change of anything: where it is the same twice, nothing was changed in between.

        A mutation adds one; where bytes were held back, that too.
        """

    def permissions(self, node: CapsuleId) -> Attributes:
        """Attributes of which kind, mode and owner are to be relied on; what is held back need not show in the rest."""

    def lookup(self, directory: CapsuleId, name: bytes) -> Attributes:
        """Attributes of what a name leads to."""

    def entries(self, directory: CapsuleId, *, after: bytes, limit: int) -> list[tuple[bytes, Attributes]]:
        """Names after ``after`` in byte order, at most ``limit``, with attributes as of the same moment.

        Going on after the last name received never repeats or misses an entry that was there all along.
        """

    async def listing(self, directory: CapsuleId, *, after: int, limit: int) -> Entries:
        """Entries with cookies above ``after`` (0: from the beginning), in their order, about ``limit`` of them.

        There is at least one unless the listing is complete.  A cookie means the same after a restart, on every node,
        and whatever happened to the directory: going on after the last one received never repeats or misses an entry
        that was there all along.  Entries may share one (some names of one file); those always come together, and
        must be passed on together.
        """

    def hold(self, node: CapsuleId) -> None:
        """A client has the node open: its bytes stay, even when it loses its last name."""

    def drop(self, node: CapsuleId) -> None:
        """Ends one :meth:`hold`."""

    def readlink(self, node: CapsuleId) -> bytes:
        """Target of a symbolic link."""

    def read(self, node: CapsuleId, offset: int, length: int) -> bytes:
        """Bytes of a file; fewer than asked only at its end."""

    def seek(self, node: CapsuleId, offset: int, *, data: bool) -> int | None:
        """Where, from ``offset`` on, the next data or the next hole begins; None if there is none before the end.

        A file's end is the beginning of a hole.  Offsets beyond it raise status INVALID.
        """

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
        change: AttributeChange = NOTHING,
        verifier: bytes = b"",
    ) -> Attributes:
        """A new node with a name; in a set-group-id directory it gets the directory's group.

        ``change`` is set on it in the same batch.  With a ``verifier``, a file that is there already and was made
        with the same one is the answer instead of an error: the caller has asked before.
        """

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

    async def allocate(self, node: CapsuleId, offset: int, length: int, caller: Caller) -> None:
        """The range can be written to, as far as the disk has room now; the size grows to cover it."""

    async def deallocate(self, node: CapsuleId, offset: int, length: int, caller: Caller) -> None:
        """Makes a hole; the size stays."""

    async def copy(
        self, source: CapsuleId, source_offset: int, node: CapsuleId, offset: int, length: int, caller: Caller
    ) -> None:
        """Gives a range the bytes of another one, of the same or of another node, as one change; nothing is moved.

        Raises:
            SpaceError: status NOT_PERMITTED: these two nodes share no bytes (their keys differ): copy by hand.
        """

    async def commit(self, node: CapsuleId) -> None:
        """Hands bytes held back for a node to the log, and reports what went wrong with earlier ones."""

    async def sync(self) -> None:
        """Makes everything acknowledged so far durable; costs little when there is nothing to do."""
