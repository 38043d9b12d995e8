"""FUSE requests, answered from a :class:`space.projections.vfs.FileSystem`.

What is decided here is what only FUSE has: inode numbers the kernel holds references to, open handles,
directory cookies, cache times, and the one table from neutral statuses to errno.

* The kernel knows a node by its inode number; which capsule that is, is kept for as long as the kernel
  holds references (``lookups``), so that a node renamed or unlinked meanwhile goes on working.  The root of
  the view is inode 1 whatever it is in the store.
* A directory cookie is the index of an entry in what this handle has listed so far; going on means "after
  that name", so that changes meanwhile never repeat or skip an entry that was there all along.
* Permissions are the kernel's work (``default_permissions``), as are the umask, ``.`` in paths and O_APPEND.
* Times of access are set on request only, never by reading (as with ``noatime``).

Not offered, because pyfuse3 has no handler for it: ``fallocate``, ``SEEK_HOLE`` (the kernel takes the whole
file for data), ``copy_file_range``, ``ioctl``.  Locks are the kernel's own and hold between the users of one
mount.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import os
import stat as modes
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import attrs
import pyfuse3

from space._errors import SpaceError, Status
from space.events.ids import CapsuleId
from space.events.types import Kind
from space.projections.vfs import AttributeChange, Attributes, Caller, FileSystem

ERRNO: Final[dict[Status, int]] = {
    Status.NOT_FOUND: errno.ENOENT,
    Status.EXISTS: errno.EEXIST,
    Status.NOT_DIRECTORY: errno.ENOTDIR,
    Status.IS_DIRECTORY: errno.EISDIR,
    Status.NOT_EMPTY: errno.ENOTEMPTY,
    Status.INVALID: errno.EINVAL,
    Status.BAD_NAME: errno.EILSEQ,
    Status.NAME_TOO_LONG: errno.ENAMETOOLONG,
    Status.TOO_LARGE: errno.EFBIG,
    Status.TOO_MANY_LINKS: errno.EMLINK,
    Status.NO_ATTRIBUTE: errno.ENODATA,
    Status.NOT_PERMITTED: errno.EPERM,
    Status.READ_ONLY: errno.EROFS,
    Status.NO_SPACE: errno.ENOSPC,
    Status.STALE: errno.ESTALE,
    Status.UNAVAILABLE: errno.ETIMEDOUT,
    Status.CORRUPT: errno.EIO,
    Status.IO: errno.EIO,
}
"""The kernel says a name that is not UTF-8 is "Invalid or incomplete multibyte or wide character"."""

FORMAT_BITS: Final[dict[Kind, int]] = {
    Kind.FILE: modes.S_IFREG,
    Kind.DIRECTORY: modes.S_IFDIR,
    Kind.SYMLINK: modes.S_IFLNK,
    Kind.FIFO: modes.S_IFIFO,
    Kind.SOCKET: modes.S_IFSOCK,
    Kind.CHARACTER_DEVICE: modes.S_IFCHR,
    Kind.BLOCK_DEVICE: modes.S_IFBLK,
}
_KINDS: Final = {bits: kind for kind, bits in FORMAT_BITS.items()}

LIVE_SECONDS: Final = 1.0
"""How long the kernel may believe attributes and names: what others change in the store shows after that."""

IMMUTABLE_SECONDS: Final = 86_400.0
BLOCK_BYTES: Final = 65_536
"""The size programs are told to read and write in: a frame."""

PAGE_ENTRIES: Final = 32
"""Entries looked up at once; the kernel's buffer holds about that many."""

XATTR_NAMESPACES: Final = (b"user.", b"security.", b"trusted.")

log: Final = logging.getLogger("space.fuse")
_P = ParamSpec("_P")
_T = TypeVar("_T")


def errno_of(error: BaseException) -> int:
    """The number the kernel gets for an error; what nobody foresaw is EIO, and logged."""
    if isinstance(error, SpaceError):
        if error.status in (Status.CORRUPT, Status.IO, Status.UNAVAILABLE):
            log.error("%s", error)
        return ERRNO[error.status]
    if isinstance(error, OSError) and error.errno:
        return error.errno
    log.error("unexpected error in a request", exc_info=error)
    return errno.EIO


def _handler(
    method: Callable[Concatenate[Operations, _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate[Operations, _P], Coroutine[Any, Any, _T]]:
    """Turns every error into the one kind pyfuse3 knows: any other would end the mount."""

    async def answer(self: Operations, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return await method(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:  # noqa: BLE001 - see the docstring
            raise pyfuse3.FUSEError(errno_of(error)) from None

    functools.update_wrapper(answer, method)
    return answer


@attrs.define
class _Inode:
    """A node the kernel holds ``lookups`` references to; ``seen`` is its change number at the last open."""

    node: CapsuleId
    lookups: int = 0
    seen: int = -1


class InodeTable:
    """Which capsule an inode number means, for as long as the kernel may use the number."""

    def __init__(self, root: CapsuleId) -> None:
        self._root = root
        self._inodes = {pyfuse3.ROOT_INODE: _Inode(root, 1)}

    def number(self, attributes: Attributes) -> int:
        """The inode number of a node, here."""
        return pyfuse3.ROOT_INODE if attributes.id == self._root else attributes.ino

    def remember(self, attributes: Attributes) -> None:
        """The kernel gets one more reference."""
        self._inodes.setdefault(self.number(attributes), _Inode(attributes.id)).lookups += 1

    def forget(self, number: int, lookups: int) -> None:
        """The kernel gives references back."""
        inode = self._inodes.get(number)
        if inode is None or number == pyfuse3.ROOT_INODE:
            return
        inode.lookups -= lookups
        if inode.lookups <= 0:
            del self._inodes[number]

    def node(self, number: int) -> CapsuleId:
        """The capsule; ESTALE when the number means nothing (a handle from an earlier mount)."""
        inode = self._inodes.get(number)
        if inode is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return inode.node

    def unchanged(self, attributes: Attributes) -> bool:
        """Whether the node is as it was at the last open; remembers how it is now."""
        inode = self._inodes.get(self.number(attributes))
        if inode is None:
            return False
        same = inode.seen == attributes.change
        inode.seen = attributes.change
        return same

    def __len__(self) -> int:
        return len(self._inodes)


@attrs.define
class _Handle:
    """An open file or directory; ``names`` are the entries a directory handle has listed so far."""

    node: CapsuleId
    caller: Caller
    names: list[bytes] = attrs.field(factory=list)


class Operations(pyfuse3.Operations):
    """The handlers pyfuse3 calls, all on one event loop."""

    enable_writeback_cache = False

    def __init__(self, files: FileSystem, on_start: Callable[[], None]) -> None:
        """Serves ``files``; ``on_start`` is called when the kernel has begun to talk."""
        super().__init__()
        self._files = files
        self._on_start = on_start
        self._inodes = InodeTable(files.root)
        self._handles: dict[int, _Handle] = {}
        self._next_handle = itertools.count(1)
        self._seconds = IMMUTABLE_SECONDS if files.immutable else LIVE_SECONDS

    def init(self) -> None:
        self._on_start()

    # --- what the kernel is told -----------------------------------------------------------------

    def _entry(self, found: Attributes) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = self._inodes.number(found)
        entry.entry_timeout = entry.attr_timeout = self._seconds
        entry.st_mode = FORMAT_BITS[found.kind] | found.mode
        entry.st_nlink = found.nlink
        entry.st_uid = found.uid
        entry.st_gid = found.gid
        entry.st_rdev = found.rdev
        entry.st_size = found.size
        entry.st_blksize = BLOCK_BYTES
        entry.st_blocks = -(-found.allocated // 512)
        entry.st_atime_ns = found.atime
        entry.st_mtime_ns = found.mtime
        entry.st_ctime_ns = found.ctime
        return entry

    def _referenced(self, found: Attributes) -> pyfuse3.EntryAttributes:
        self._inodes.remember(found)
        return self._entry(found)

    def _open_handle(self, node: CapsuleId, caller: Caller) -> int:
        number = next(self._next_handle)
        self._handles[number] = _Handle(node, caller)
        self._files.hold(node)
        return number

    def _close_handle(self, number: int) -> None:
        if handle := self._handles.pop(number, None):
            self._files.drop(handle.node)

    def _handle(self, number: int) -> _Handle:
        handle = self._handles.get(number)
        if handle is None:
            raise pyfuse3.FUSEError(errno.EBADF)
        return handle

    # --- names -----------------------------------------------------------------------------------

    @_handler
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        node = self._inodes.node(parent_inode)
        if name == b".":
            return self._referenced(self._files.attributes(node))
        if name == b"..":
            return self._referenced(self._above(self._files.attributes(node)))
        return self._referenced(self._files.lookup(node, name))

    def _above(self, directory: Attributes) -> Attributes:
        if directory.id == self._files.root:
            return directory
        return self._files.attributes(directory.parent)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, lookups in inode_list:
            self._inodes.forget(inode, lookups)

    @_handler
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._referenced(await self._make(parent_inode, name, mode, ctx, rdev=rdev))

    @_handler
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._referenced(await self._make(parent_inode, name, mode, ctx))

    @_handler
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        mode = modes.S_IFLNK | 0o777
        return self._referenced(await self._make(parent_inode, name, mode, ctx, target=target))

    async def _make(
        self,
        parent_inode: int,
        name: bytes,
        mode: int,
        ctx: pyfuse3.RequestContext,
        *,
        rdev: int = 0,
        target: bytes = b"",
    ) -> Attributes:
        kind = _KINDS.get(modes.S_IFMT(mode), Kind.FILE)
        device = kind in (Kind.CHARACTER_DEVICE, Kind.BLOCK_DEVICE)
        return await self._files.create(
            self._inodes.node(parent_inode),
            name,
            kind,
            caller_of(ctx),
            mode=mode & 0o7777,
            rdev=rdev if device else 0,
            target=target,
        )

    @_handler
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._files.remove(self._inodes.node(parent_inode), name, caller_of(ctx), is_directory=False)

    @_handler
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._files.remove(self._inodes.node(parent_inode), name, caller_of(ctx), is_directory=True)

    @_handler
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        if flags & ~(pyfuse3.RENAME_NOREPLACE | pyfuse3.RENAME_EXCHANGE):
            raise pyfuse3.FUSEError(errno.EINVAL)
        await self._files.rename(
            self._inodes.node(parent_inode_old),
            name_old,
            self._inodes.node(parent_inode_new),
            name_new,
            caller_of(ctx),
            replace=not flags & pyfuse3.RENAME_NOREPLACE,
            exchange=bool(flags & pyfuse3.RENAME_EXCHANGE),
        )

    @_handler
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        directory = self._inodes.node(new_parent_inode)
        return self._referenced(
            await self._files.link(self._inodes.node(inode), directory, new_name, caller_of(ctx))
        )

    @_handler
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self._files.readlink(self._inodes.node(inode))

    # --- attributes ------------------------------------------------------------------------------

    @_handler
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(self._files.attributes(self._inodes.node(inode)))

    @_handler
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        change = AttributeChange(
            mode=attr.st_mode & 0o7777 if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime=attr.st_atime_ns if fields.update_atime else None,
            mtime=attr.st_mtime_ns if fields.update_mtime else None,
        )
        return self._entry(await self._files.set_attributes(self._inodes.node(inode), change, caller_of(ctx)))

    @_handler
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        _check_namespace(name)
        return self._files.xattr(self._inodes.node(inode), name)

    @_handler
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        return self._files.xattr_names(self._inodes.node(inode))

    @_handler
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        _check_namespace(name)
        await self._files.set_xattr(self._inodes.node(inode), name, value, caller_of(ctx))

    @_handler
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        _check_namespace(name)
        await self._files.remove_xattr(self._inodes.node(inode), name, caller_of(ctx))

    @_handler
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        space = self._files.space()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = space.block_bytes
        data.f_blocks = space.blocks
        data.f_bfree = space.blocks_free
        data.f_bavail = space.blocks_available
        data.f_files = space.files
        data.f_ffree = data.f_favail = space.files_free
        data.f_namemax = 255
        return data

    # --- files -----------------------------------------------------------------------------------

    @_handler
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        node = self._inodes.node(inode)
        if flags & os.O_TRUNC:
            found = await self._files.set_attributes(node, AttributeChange(size=0), caller_of(ctx))
        elif flags & os.O_ACCMODE != os.O_RDONLY and self._files.read_only:
            raise pyfuse3.FUSEError(errno.EROFS)
        else:
            found = self._files.attributes(node)
        number = self._open_handle(node, caller_of(ctx))
        return pyfuse3.FileInfo(fh=number, keep_cache=self._inodes.unchanged(found))

    @_handler
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        found = await self._make(parent_inode, name, modes.S_IFREG | modes.S_IMODE(mode), ctx)
        entry = self._referenced(found)
        self._inodes.unchanged(found)
        return pyfuse3.FileInfo(fh=self._open_handle(found.id, caller_of(ctx)), keep_cache=False), entry

    @_handler
    async def read(self, fh: int, off: int, size: int) -> bytes:
        return self._files.read(self._handle(fh).node, off, size)

    @_handler
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        handle = self._handle(fh)
        await self._files.write(handle.node, off, buf, handle.caller)
        return len(buf)

    @_handler
    async def flush(self, fh: int) -> None:
        await self._files.commit(self._handle(fh).node)

    @_handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._files.commit(self._handle(fh).node)
        await self._files.sync()

    @_handler
    async def release(self, fh: int) -> None:
        try:
            await self._files.commit(self._handle(fh).node)
        finally:
            self._close_handle(fh)

    # --- directories -----------------------------------------------------------------------------

    @_handler
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return self._open_handle(self._inodes.node(inode), caller_of(ctx))

    @_handler
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        handle = self._handle(fh)
        if start_id < 2 and not self._reply_dots(handle, start_id, token):
            return
        index = max(start_id - 2, 0)
        if index > len(handle.names):
            return
        after = handle.names[index - 1] if index else b""
        while page := self._files.entries(handle.node, after=after, limit=PAGE_ENTRIES):
            for name, found in page:
                if not pyfuse3.readdir_reply(token, name, self._entry(found), index + 3):
                    return
                self._inodes.remember(found)
                if handle.names[index : index + 1] != [name]:
                    handle.names[index:] = [name]
                index += 1
            after = page[-1][0]

    def _reply_dots(self, handle: _Handle, start: int, token: pyfuse3.ReaddirToken) -> bool:
        """``.`` and ``..``, to which the kernel takes no references; False when the buffer is full."""
        here = self._files.attributes(handle.node)
        dots = ((b".", here), (b"..", self._above(here)))
        return all(
            pyfuse3.readdir_reply(token, name, self._entry(found), cookie)
            for cookie, (name, found) in enumerate(dots, 1)
            if cookie > start
        )

    @_handler
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        self._handle(fh)
        await self._files.sync()

    async def releasedir(self, fh: int) -> None:
        self._close_handle(fh)


def caller_of(ctx: pyfuse3.RequestContext) -> Caller:
    """Who made a request."""
    return Caller(ctx.uid, ctx.gid, "fuse")


def _check_namespace(name: bytes) -> None:
    """ACLs and other ``system.`` attributes would have to mean something: they are not supported, clearly."""
    if not name.startswith(XATTR_NAMESPACES):
        raise pyfuse3.FUSEError(errno.ENOTSUP)
