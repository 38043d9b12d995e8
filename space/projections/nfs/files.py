"""Operations on filehandles, names and attributes (RFC 8881 §18; extended attributes: RFC 8276).

Each operation asks in this order: is there a node, is it of the right kind, may the client change anything, may the
caller do this, does somebody else's delegation stand in the way.  Only then does the file model hear of it.

Cookies of READDIR come from the file model and are valid for ever, so there is nothing to verify: the verifier is
zero.  Change attributes of a directory before and after are told as atomic where nothing else was changed between the
look before, the change, and the look after; nothing of this server ever is, but the store has other users.
"""

from __future__ import annotations

import stat as modes
from collections.abc import Awaitable
from typing import Final

import attrs
from blake3 import blake3

from space._errors import NotFoundError, SpaceError
from space.events.types import Kind
from space.projections.nfs import access, attributes, handles
from space.projections.nfs.access import EXECUTE, READ, WRITE
from space.projections.nfs.attributes import Settable
from space.projections.nfs.compound import Compound, NfsError, Operation, Stateid
from space.projections.nfs.delegations import Delegation
from space.projections.nfs.exports import Node
from space.projections.nfs.nfs4 import (
    FILE_HANDLE_BYTES_MAX,
    OTHER_BYTES,
    VERIFIER_BYTES,
    Attr,
    FileType,
    NfsStatus,
    Op,
)
from space.projections.nfs.status import status_of
from space.projections.nfs.xdr import Reader, Writer, XdrError
from space.projections.vfs import NOTHING, AttributeChange, Attributes, Listed

NAME_BYTES_MAX: Final = 255
COMPONENT_BYTES_MAX: Final = 4096
"""A longer name is no name at all, but bytes that are wrong."""

PATH_BYTES_MAX: Final = 4096
XATTR_NAMESPACE: Final = b"user."
XATTR_BYTES_MAX: Final = 65_536
LIST_ENTRIES: Final = 512
"""Most entries of a directory looked up at once."""

LIST_ENTRY_BYTES: Final = 160
"""A usual entry in a page, with its attributes: how many are worth looking up."""

_VERIFIER: Final = bytes(VERIFIER_BYTES)
_COOKIES_RESERVED: Final = (1, 2)  # RFC 8881 §18.23.3
_LIST_END_BYTES: Final = 8  # no more entries, and whether this is the end
_FLAVORS: Final = (1, 0)  # AUTH_SYS, AUTH_NONE
_MODES: Final = {Kind.DIRECTORY: 0o755, Kind.SYMLINK: 0o777}
_KINDS: Final[dict[int, Kind]] = {
    FileType.DIR: Kind.DIRECTORY,
    FileType.LNK: Kind.SYMLINK,
    FileType.FIFO: Kind.FIFO,
    FileType.SOCK: Kind.SOCKET,
    FileType.CHR: Kind.CHARACTER_DEVICE,
    FileType.BLK: Kind.BLOCK_DEVICE,
}
_OK: Final = NfsStatus.OK


# --- what operations share --------------------------------------------------------------------------


def check_name(name: bytes) -> bytes:
    """The name, if a directory may have an entry of it.

    Raises:
        NfsError: INVAL: it is empty or not UTF-8; NAMETOOLONG; BADCHAR; BADNAME: it is reserved (RFC 8881 §14.5).
    """
    if not name:
        raise NfsError(NfsStatus.INVAL)
    if len(name) > NAME_BYTES_MAX:
        raise NfsError(NfsStatus.NAMETOOLONG)
    try:
        name.decode()
    except UnicodeDecodeError:
        raise NfsError(NfsStatus.INVAL) from None
    if name in (b".", b".."):
        raise NfsError(NfsStatus.BADNAME)
    if b"/" in name or b"\0" in name:
        raise NfsError(NfsStatus.BADCHAR)
    return name


def read_stateid(args: Reader) -> Stateid:
    """A stateid4 off a request."""
    return Stateid(args.u32(), args.fixed(OTHER_BYTES))


def component(args: Reader) -> bytes:
    """A name off a request, checked."""
    return check_name(args.opaque(COMPONENT_BYTES_MAX))


def look(node: Node) -> Attributes:
    """Attributes of a node.

    Raises:
        NfsError: STALE: it is gone.
    """
    try:
        return node.export.files.attributes(node.id)
    except NotFoundError:
        raise NfsError(NfsStatus.STALE) from None


def look_permissions(node: Node) -> Attributes:
    """Kind, mode and owner of a node; the rest may be from before what was written last.

    Raises:
        NfsError: STALE: it is gone.
    """
    try:
        return node.export.files.permissions(node.id)
    except NotFoundError:
        raise NfsError(NfsStatus.STALE) from None


def look_directory(node: Node) -> Attributes:
    """Attributes of a directory.

    Raises:
        NfsError: NOTDIR: it is none; STALE: it is gone.
    """
    found = look(node)
    if found.kind != Kind.DIRECTORY:
        raise NfsError(NfsStatus.NOTDIR)
    return found


def directory_write_check(ctx: Compound, node: Node) -> Attributes:
    """Attributes of a directory in which the caller may make and remove names.

    Raises:
        NfsError: NOTDIR, STALE; ROFS; ACCESS.
    """
    found = look_directory(node)
    access.writable(ctx, node)
    access.require(ctx, found, WRITE | EXECUTE)
    return found


def change_info(out: Writer, *, atomic: bool, before: int, after: int) -> None:
    """Writes change_info4: the change attribute of a directory before and after."""
    out.boolean(atomic)
    out.u64(before)
    out.u64(after)


def _changed(ctx: Compound, node: Node, before: Attributes, stamp: int, out: Writer) -> None:
    """Writes what a change did to a directory, and has it made durable before the reply.

    ``stamp`` is of before the look at the directory.
    """
    ctx.unsynced.add(node.export.files)
    after = look(node).change
    change_info(out, atomic=node.export.files.stamp() - stamp <= 1, before=before.change, after=after)


def _move_to(ctx: Compound, node: Node) -> int:
    """Another node is current, and no stateid (RFC 8881 §16.2.3.1.2)."""
    ctx.current, ctx.stateid = node, None
    return _OK


async def create_file(
    ctx: Compound, directory: Node, name: bytes, settable: Settable, verifier: bytes | None = None
) -> Attributes:
    """A new file; with a ``verifier`` also the one that an earlier attempt made.

    It is durable before the reply.

    Raises:
        NfsError, SpaceError: the name is taken, the directory cannot be written to, an attribute not be set.
    """
    above = directory_write_check(ctx, directory)
    unique = b"" if verifier is None else _client_verifier(ctx, verifier)
    return await _make(ctx, directory, above, name, Kind.FILE, settable, verifier=unique)


def _client_verifier(ctx: Compound, verifier: bytes) -> bytes:
    """A verifier is one client's: another client's that is equal by chance is another one."""
    owner = ctx.client.owner if ctx.client is not None else b""
    return blake3(verifier + owner, derive_key_context="space nfs create verifier v1").digest(16)


async def _make(
    ctx: Compound,
    directory: Node,
    above: Attributes,
    name: bytes,
    kind: Kind,
    settable: Settable,
    *,
    rdev: int = 0,
    target: bytes = b"",
    verifier: bytes = b"",
) -> Attributes:
    usual = _MODES.get(kind, 0o644)
    change = settable.onto(usual)
    mode = usual if change.mode is None or kind == Kind.SYMLINK else change.mode  # nobody asks a link's mode
    who = access.identity(ctx, directory.export)
    if who.uid != 0:
        mode = _own_mode(who, above, kind, change, mode)
    if change.size == 0:
        change = attrs.evolve(change, size=None)
    elif change.size is not None and kind != Kind.FILE:
        raise NfsError(NfsStatus.INVAL)
    ctx.unsynced.add(directory.export.files)
    return await directory.export.files.create(
        directory.id,
        name,
        kind,
        who.caller,
        mode=mode,
        rdev=rdev,
        target=target,
        change=attrs.evolve(change, mode=None),
        verifier=verifier,
    )


def _own_mode(who: access.Identity, above: Attributes, kind: Kind, change: AttributeChange, mode: int) -> int:
    """The mode as far as somebody without privileges can have it for what is new.

    Raises:
        NfsError: PERM: it would be given away.
    """
    inherited = above.gid if above.mode & modes.S_ISGID else who.caller.gid
    gid = inherited if change.gid is None else change.gid
    if change.uid not in (None, who.uid) or (gid != inherited and gid not in who.groups):
        raise NfsError(NfsStatus.PERM)
    if kind != Kind.DIRECTORY and gid not in who.groups:
        mode &= ~modes.S_ISGID
    return mode


# --- filehandles ------------------------------------------------------------------------------------


def _putrootfh(ctx: Compound, args: Reader, out: Writer) -> int:
    return _move_to(ctx, access.admit(ctx, ctx.service.exports.root))


def _putfh(ctx: Compound, args: Reader, out: Writer) -> int:
    node = handles.decode(ctx.service.exports, args.opaque(FILE_HANDLE_BYTES_MAX))
    return _move_to(ctx, access.admit(ctx, node))


def _getfh(ctx: Compound, args: Reader, out: Writer) -> int:
    out.opaque(handles.encode(ctx.node()))
    return _OK


def _savefh(ctx: Compound, args: Reader, out: Writer) -> int:
    ctx.saved, ctx.saved_stateid = ctx.node(), ctx.stateid
    return _OK


def _restorefh(ctx: Compound, args: Reader, out: Writer) -> int:
    if ctx.saved is None:
        raise NfsError(NfsStatus.NOFILEHANDLE)
    ctx.current, ctx.stateid = ctx.saved, ctx.saved_stateid
    return _OK


def _lookup(ctx: Compound, args: Reader, out: Writer) -> int:
    node, name = ctx.node(), component(args)
    return _move_to(ctx, _below(ctx, node, name))


def _below(ctx: Compound, node: Node, name: bytes) -> Node:
    """What a name in a directory leads to; where an export hangs, its root.

    Raises:
        NfsError: NOTDIR, SYMLINK: it is no directory; ACCESS: the caller may not look there.
    """
    access.require(ctx, _look_through(node), EXECUTE)
    entry = Node(node.export, node.export.files.lookup(node.id, name).id)
    return access.admit(ctx, ctx.service.exports.entered(entry))


def _look_through(node: Node) -> Attributes:
    """Attributes of a directory on a path, where a symbolic link has an error of its own (RFC 8881 §15.1.2.9)."""
    found = look(node)
    if found.kind != Kind.DIRECTORY:
        raise NfsError(NfsStatus.SYMLINK if found.kind == Kind.SYMLINK else NfsStatus.NOTDIR)
    return found


def _lookupp(ctx: Compound, args: Reader, out: Writer) -> int:
    return _move_to(ctx, _above(ctx, ctx.node()))


def _above(ctx: Compound, node: Node) -> Node:
    """The directory above another one.

    Raises:
        NfsError: NOTDIR, SYMLINK; NOENT: there is none above the root of the server; ACCESS.
    """
    found = _look_through(node)
    access.require(ctx, found, EXECUTE)
    if node.id != node.export.files.root:
        return Node(node.export, found.parent)
    above = ctx.service.exports.above(node.export)
    if above is None:
        raise NfsError(NfsStatus.NOENT)
    return above


def _secinfo(ctx: Compound, args: Reader, out: Writer) -> int:
    _below(ctx, ctx.node(), component(args))
    return _flavors(ctx, out)


def _secinfo_no_name(ctx: Compound, args: Reader, out: Writer) -> int:
    node, style = ctx.node(), args.u32()
    if style > 1:
        raise XdrError(f"no style of SECINFO_NO_NAME: {style}")
    if style == 1:
        _above(ctx, node)
    return _flavors(ctx, out)


def _flavors(ctx: Compound, out: Writer) -> int:
    """Writes SECINFO4resok, which uses the filehandle up (RFC 8881 §2.6.3.1.1.8)."""
    out.u32(len(_FLAVORS))
    for flavor in _FLAVORS:
        out.u32(flavor)
    ctx.current = ctx.stateid = None
    return _OK


def _openattr(ctx: Compound, args: Reader, out: Writer) -> int:
    ctx.node()
    args.boolean()
    return NfsStatus.NOTSUPP


# --- attributes -------------------------------------------------------------------------------------


def _access(ctx: Compound, args: Reader, out: Writer) -> int:
    node, asked = ctx.node(), args.u32()
    found = look(node)
    meant = _ACCESS_DIRECTORY if found.kind == Kind.DIRECTORY else _ACCESS_OTHER
    granted = access.granted(access.identity(ctx, node.export), found)
    if access.read_only(ctx, node.export):
        granted &= ~WRITE
    supported = allowed = 0
    for bit, needed in meant:
        if asked & bit and (bit < _XATTR_READ or ctx.minor > 1):
            supported |= bit
            if granted & needed == needed:
                allowed |= bit
    out.u32(supported)
    out.u32(allowed)
    return _OK


_XATTR_READ: Final = 0x40
_ACCESS_XATTR: Final = ((_XATTR_READ, READ), (0x80, WRITE), (0x100, READ))  # RFC 8276 §8.6: read, write, list
_ACCESS_DIRECTORY: Final = (
    (0x01, READ),
    (0x02, EXECUTE),  # LOOKUP
    (0x04, WRITE | EXECUTE),  # MODIFY
    (0x08, WRITE | EXECUTE),  # EXTEND
    (0x10, WRITE | EXECUTE),  # DELETE
    *_ACCESS_XATTR,
)
_ACCESS_OTHER: Final = ((0x01, READ), (0x04, WRITE), (0x08, WRITE), (0x20, EXECUTE), *_ACCESS_XATTR)


def _getattr(ctx: Compound, args: Reader, out: Writer) -> int | Awaitable[int]:
    if ctx.current is not None and ctx.current.export.referral is not None:
        return _getattr_of_absent(ctx, ctx.current, args.bitmap(), out)
    node, bitmap = ctx.node(), args.bitmap()
    attributes.check_readable(bitmap)
    held = ctx.service.state.delegated_for_writing(node, ctx.client)
    if held is not None and bitmap & attributes.HOLDER_KNOWS:
        return _getattr_of_holder(ctx, held, bitmap, out)
    attributes.encode(ctx, node, look(node), bitmap, out)
    return _OK


def _getattr_of_absent(ctx: Compound, node: Node, bitmap: int, out: Writer) -> int:
    """GETATTR of a file system that another server has: there is no error but that of its result to tell."""
    attributes.encode_absent(ctx, node, look(node), bitmap & ~(1 << Attr.RDATTR_ERROR), out)
    return _OK


async def _getattr_of_holder(ctx: Compound, held: Delegation, bitmap: int, out: Writer) -> int:
    """GETATTR of a file that another client changes by itself: it is asked (RFC 8881 §10.4.3)."""
    node = ctx.node()
    report = await ctx.service.state.ask(held, ctx.now)
    found = look(node)
    if report is not None:
        found = attrs.evolve(found, size=report.size, change=found.change + 1)
    attributes.encode(ctx, node, found, bitmap, out)
    return _OK


def _verify(ctx: Compound, args: Reader, out: Writer) -> int:
    node = ctx.node()
    ctx.service.state.before_read(ctx, node)
    return _OK if attributes.same(ctx, node, look(node), args) else NfsStatus.NOT_SAME


def _nverify(ctx: Compound, args: Reader, out: Writer) -> int:
    node = ctx.node()
    ctx.service.state.before_read(ctx, node)
    return NfsStatus.SAME if attributes.same(ctx, node, look(node), args) else _OK


async def _setattr(ctx: Compound, args: Reader, out: Writer) -> int:
    stateid = read_stateid(args)
    settable = attributes.decode_settable(ctx, args, creating=False)
    node = ctx.node()
    found = look(node)
    access.writable(ctx, node)
    change = access.permitted_change(ctx, found, settable.onto(found.mode))
    if change.size is not None:
        if found.kind != Kind.FILE:
            raise NfsError(NfsStatus.ISDIR if found.kind == Kind.DIRECTORY else NfsStatus.INVAL)
        if not ctx.service.state.check_io(ctx, node, stateid, write=True):
            access.require(ctx, found, WRITE, owner=True)
    if change != NOTHING:
        ctx.service.state.before_change(ctx, node)
        await node.export.files.set_attributes(node.id, change, access.caller(ctx))
        ctx.unsynced.add(node.export.files)
    out.bitmap(settable.bitmap)
    return _OK


# --- names ------------------------------------------------------------------------------------------


async def _create(ctx: Compound, args: Reader, out: Writer) -> int:
    number, target, rdev = args.u32(), b"", 0
    if number == FileType.LNK:
        target = args.opaque(PATH_BYTES_MAX)
    elif number in (FileType.BLK, FileType.CHR):
        rdev = attributes.device(args.u32(), args.u32())
    name, settable = component(args), attributes.decode_settable(ctx, args, creating=True)
    node = ctx.node()
    stamp = node.export.files.stamp()
    above = directory_write_check(ctx, node)
    kind = _KINDS.get(number)
    if kind is None:
        raise NfsError(NfsStatus.BADTYPE)
    if kind == Kind.SYMLINK and not target:
        raise NfsError(NfsStatus.INVAL)
    made = await _make(ctx, node, above, name, kind, settable, rdev=rdev, target=target)
    _changed(ctx, node, above, stamp, out)
    out.bitmap(settable.bitmap)
    return _move_to(ctx, Node(node.export, made.id))


async def _remove(ctx: Compound, args: Reader, out: Writer) -> int:
    name, node = component(args), ctx.node()
    stamp = node.export.files.stamp()
    above = look_directory(node)
    access.writable(ctx, node)
    access.require(ctx, above, EXECUTE)
    victim = node.export.files.lookup(node.id, name)
    access.require_removable(ctx, above, victim)
    ctx.service.state.before_change(ctx, Node(node.export, victim.id))
    is_directory = victim.kind == Kind.DIRECTORY
    await node.export.files.remove(node.id, name, access.caller(ctx), is_directory=is_directory)
    _changed(ctx, node, above, stamp, out)
    return _OK


async def _rename(ctx: Compound, args: Reader, out: Writer) -> int:
    old, new = component(args), component(args)
    source, target = _two_nodes(ctx)
    files = target.export.files
    stamp = files.stamp()
    above, new_above = look_directory(source), look_directory(target)
    access.writable(ctx, target)
    access.require(ctx, above, EXECUTE)
    access.require(ctx, new_above, WRITE | EXECUTE)
    moved = files.lookup(source.id, old)
    access.require_removable(ctx, above, moved)
    if moved.kind == Kind.DIRECTORY and source.id != target.id:
        access.require(ctx, moved, WRITE)  # its ".." changes
    try:
        replaced = files.lookup(target.id, new)
    except NotFoundError:
        replaced = None
    if replaced is not None and replaced.id != moved.id:
        access.require_removable(ctx, new_above, replaced)
        if (moved.kind == Kind.DIRECTORY) != (replaced.kind == Kind.DIRECTORY):
            raise NfsError(NfsStatus.EXIST)  # RFC 8881 §18.26.3
        ctx.service.state.before_change(ctx, Node(target.export, replaced.id))
    ctx.service.state.before_change(ctx, Node(target.export, moved.id))
    await files.rename(source.id, old, target.id, new, access.caller(ctx))
    _changed(ctx, source, above, stamp, out)
    _changed(ctx, target, new_above, stamp, out)
    return _OK


def _two_nodes(ctx: Compound) -> tuple[Node, Node]:
    """The saved node and the current one, which must be of one export.

    Raises:
        NfsError: NOFILEHANDLE: there are not two; XDEV.
    """
    current, saved = ctx.node(), ctx.saved
    if saved is None:
        raise NfsError(NfsStatus.NOFILEHANDLE)
    if saved.export is not current.export:
        raise NfsError(NfsStatus.XDEV)
    return saved, current


async def _link(ctx: Compound, args: Reader, out: Writer) -> int:
    name = component(args)
    source, target = _two_nodes(ctx)
    if look(source).kind == Kind.DIRECTORY:
        raise NfsError(NfsStatus.ISDIR)
    stamp = target.export.files.stamp()
    above = directory_write_check(ctx, target)
    ctx.service.state.before_change(ctx, source)
    await target.export.files.link(source.id, target.id, name, access.caller(ctx))
    _changed(ctx, target, above, stamp, out)
    return _OK


def _readlink(ctx: Compound, args: Reader, out: Writer) -> int:
    node = ctx.node()
    if look(node).kind != Kind.SYMLINK:
        raise NfsError(NfsStatus.WRONG_TYPE)
    out.opaque(node.export.files.readlink(node.id))
    return _OK


async def _readdir(ctx: Compound, args: Reader, out: Writer) -> int:
    cookie, verifier = args.u64(), args.fixed(VERIFIER_BYTES)
    args.u32()  # dircount, a hint: how many bytes of names and cookies are wanted
    limit, bitmap = args.u32(), args.bitmap()
    attributes.check_readable(bitmap)
    node = ctx.node()
    access.require(ctx, look_directory(node), READ)
    if cookie in _COOKIES_RESERVED or cookie >> 63:
        raise NfsError(NfsStatus.BAD_COOKIE)
    if cookie and verifier != _VERIFIER:
        raise NfsError(NfsStatus.NOT_SAME)
    limit = min(limit, ctx.room(out))
    at_once = min(limit // LIST_ENTRY_BYTES + 1, LIST_ENTRIES)
    page = _Page(ctx, out, limit)
    complete = False
    while not complete:
        entries = await node.export.files.listing(node.id, after=cookie, limit=at_once)
        if not all(page.add(node, each, bitmap) for each in entries.listed):
            break
        complete = entries.complete
        if not complete:
            cookie = entries.listed[-1].cookie
    page.end(complete=complete)
    return _OK


class _Page:
    """A reply of READDIR that grows entry by entry; entries that share a cookie are in it together or not at all."""

    def __init__(self, ctx: Compound, out: Writer, limit: int) -> None:
        self._ctx = ctx
        self._out = out
        self._limit = limit - _LIST_END_BYTES
        self._begin = self._group = out.mark()  # of the reply, and of the entries with the last cookie
        self._cookie = 0
        self._groups = 0
        out.fixed(_VERIFIER)

    def add(self, node: Node, entry: Listed, bitmap: int) -> bool:
        """Adds an entry of a directory; False if there is no room for it."""
        out = self._out
        if entry.cookie != self._cookie:
            self._cookie, self._group = entry.cookie, out.mark()
            self._groups += 1
        out.u32(1)
        out.u64(entry.cookie)
        out.opaque(entry.name)
        self._attributes(node, entry, bitmap)
        if out.since(self._begin) <= self._limit:
            return True
        out.truncate(self._group)
        self._groups -= 1
        return False

    def _attributes(self, node: Node, entry: Listed, bitmap: int) -> None:
        ctx, found = self._ctx, entry.attributes
        inner = Node(node.export, found.id)
        entered = ctx.service.exports.entered(inner)
        if entered is not inner and entered.export.rule(ctx.connection.host):
            inner = entered
            try:
                found = look(inner)
            except (NfsError, SpaceError) as error:
                status = error.status if isinstance(error, NfsError) else status_of(error)
                attributes.encode_error(ctx, status, self._out)
                return
            if inner.export.referral is not None:
                attributes.encode_absent(ctx, inner, found, bitmap, self._out)
                return
        asks = bitmap & attributes.HOLDER_KNOWS and bitmap >> Attr.RDATTR_ERROR & 1
        if asks and ctx.service.state.delegated_for_writing(inner, ctx.client):
            attributes.encode_error(ctx, NfsStatus.DELAY, self._out)  # GETATTR asks who has it
            return
        attributes.encode(ctx, inner, found, bitmap, self._out)

    def end(self, *, complete: bool) -> None:
        """Writes the end of the page.

        Raises:
            NfsError: TOOSMALL: there was not even room for one entry.
        """
        if self._limit < len(_VERIFIER) or not (self._groups or complete):
            raise NfsError(NfsStatus.TOOSMALL)
        self._out.boolean(value=False)
        self._out.boolean(complete)


# --- extended attributes ----------------------------------------------------------------------------


def _xattr_name(args: Reader) -> bytes:
    """The name of an extended attribute as the tree has it: the protocol knows users' attributes only."""
    name = args.opaque(COMPONENT_BYTES_MAX)
    if not name or b"\0" in name:
        raise NfsError(NfsStatus.INVAL)
    if len(XATTR_NAMESPACE + name) > NAME_BYTES_MAX:
        raise NfsError(NfsStatus.NAMETOOLONG)
    return XATTR_NAMESPACE + name


def _getxattr(ctx: Compound, args: Reader, out: Writer) -> int:
    name, node = _xattr_name(args), ctx.node()
    access.require(ctx, look(node), READ)
    value = node.export.files.xattr(node.id, name)
    if ctx.room(out) < len(value) + 8:
        raise NfsError(NfsStatus.REP_TOO_BIG)
    out.opaque(value)
    return _OK


async def _setxattr(ctx: Compound, args: Reader, out: Writer) -> int:
    option, name = args.u32(), _xattr_name(args)
    value = args.opaque(args.left)
    if option > 2:
        raise NfsError(NfsStatus.INVAL)
    if len(value) > XATTR_BYTES_MAX:
        raise NfsError(NfsStatus.XATTR2BIG)
    stamp = ctx.node().export.files.stamp()
    node, found = _xattr_change(ctx)
    await node.export.files.set_xattr(
        node.id, name, value, access.caller(ctx), create=option == 1, replace=option == 2
    )
    _changed(ctx, node, found, stamp, out)
    return _OK


async def _removexattr(ctx: Compound, args: Reader, out: Writer) -> int:
    name = _xattr_name(args)
    stamp = ctx.node().export.files.stamp()
    node, found = _xattr_change(ctx)
    await node.export.files.remove_xattr(node.id, name, access.caller(ctx))
    _changed(ctx, node, found, stamp, out)
    return _OK


def _xattr_change(ctx: Compound) -> tuple[Node, Attributes]:
    """The node whose extended attributes the caller may change, and how it is before."""
    node = ctx.node()
    found = look(node)
    access.writable(ctx, node)
    if found.kind not in (Kind.FILE, Kind.DIRECTORY):
        raise NfsError(
            NfsStatus.PERM
        )  # as on Linux: the permissions of others say nothing of their owner's wish
    access.require(ctx, found, WRITE)
    ctx.service.state.before_change(ctx, node)
    return node, found


def _listxattrs(ctx: Compound, args: Reader, out: Writer) -> int:
    cookie, limit = args.u64(), args.u32()
    node = ctx.node()
    access.require(ctx, look(node), READ)
    limit = min(limit, ctx.room(out)) - 16  # the cookie, the number of names, and whether this is the end
    names: list[bytes] = []
    left = [each for each in _xattr_order(node) if each[0] > cookie]
    for number, name in left:
        limit -= 4 + len(name) + (-len(name) & 3)
        if limit < 0:
            break
        names.append(name)
        cookie = number
    if limit < 0 and not names:
        raise NfsError(NfsStatus.TOOSMALL)
    out.u64(cookie)
    out.u32(len(names))
    for name in names:
        out.opaque(name)
    out.boolean(len(names) == len(left))
    return _OK


def _xattr_order(node: Node) -> list[tuple[int, bytes]]:
    """Users' attributes by a number that follows from the name alone, so that a cookie is good for ever."""
    names = [
        each[len(XATTR_NAMESPACE) :]
        for each in node.export.files.xattr_names(node.id)
        if each.startswith(XATTR_NAMESPACE)
    ]
    return sorted((int.from_bytes(blake3(name).digest(8), "big") >> 1 | 1, name) for name in names)


OPERATIONS: Final[dict[Op, Operation]] = {
    Op.PUTROOTFH: _putrootfh,
    Op.PUTPUBFH: _putrootfh,
    Op.PUTFH: _putfh,
    Op.GETFH: _getfh,
    Op.SAVEFH: _savefh,
    Op.RESTOREFH: _restorefh,
    Op.LOOKUP: _lookup,
    Op.LOOKUPP: _lookupp,
    Op.SECINFO: _secinfo,
    Op.SECINFO_NO_NAME: _secinfo_no_name,
    Op.OPENATTR: _openattr,
    Op.ACCESS: _access,
    Op.GETATTR: _getattr,
    Op.VERIFY: _verify,
    Op.NVERIFY: _nverify,
    Op.SETATTR: _setattr,
    Op.CREATE: _create,
    Op.REMOVE: _remove,
    Op.RENAME: _rename,
    Op.LINK: _link,
    Op.READLINK: _readlink,
    Op.READDIR: _readdir,
    Op.GETXATTR: _getxattr,
    Op.SETXATTR: _setxattr,
    Op.REMOVEXATTR: _removexattr,
    Op.LISTXATTRS: _listxattrs,
}
