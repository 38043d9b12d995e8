"""fattr4: attributes asked for, set, and compared (RFC 8881 §5, RFC 7862 §12, RFC 8275, RFC 8276 §8.2).

What a bitmap asks for is looked up once: afterwards a GETATTR is one pass over a few short functions.
Owners and groups are numbers in decimal, as clients with AUTH_SYS send and want them (RFC 8881 §5.9).

Times of access change on request only.  ``change`` is the position in the log of the last event that touched the node,
so it never falls and means the same on every node of a cluster.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import attrs

from space.events.fast import fast_frozen
from space.events.types import Kind
from space.projections.nfs import acl, handles, referrals
from space.projections.nfs.compound import Compound, NfsError
from space.projections.nfs.nfs4 import Attr, Claim, CreateMode, FileType, NfsStatus, Share, Want
from space.projections.nfs.xdr import Reader, Writer, XdrError
from space.projections.vfs import NOTHING, NOW, AttributeChange, Attributes, Space

if TYPE_CHECKING:
    from space.projections.nfs.exports import Node

IO_BYTES_MAX: Final = 1 << 20
"""Longest READ and WRITE: one extent."""

NAME_BYTES_MAX: Final = 255
LINKS_MAX: Final = 65_000
SIZE_MAX: Final = (1 << 63) - 1
CLONE_BLOCK_BYTES: Final = 1
"""Any range can share its bytes with any other."""

OWNER_BYTES_MAX: Final = 1024
VALUES_BYTES_MAX: Final = 65_536
"""Longest attrlist4 that is looked at: an ACL with every entry there may be is far shorter."""

_NANOSECONDS: Final = 10**9
_CHANGE_IS_MONOTONIC: Final = 0  # NFS4_CHANGE_TYPE_IS_MONOTONIC_INCR
_UTF8_ONLY: Final = 2  # FSCHARSET_CAP4_ALLOWS_ONLY_UTF8
_SET_TO_CLIENT_TIME: Final = 1

TYPES: Final[dict[Kind, FileType]] = {
    Kind.FILE: FileType.REG,
    Kind.DIRECTORY: FileType.DIR,
    Kind.SYMLINK: FileType.LNK,
    Kind.FIFO: FileType.FIFO,
    Kind.SOCKET: FileType.SOCK,
    Kind.CHARACTER_DEVICE: FileType.CHR,
    Kind.BLOCK_DEVICE: FileType.BLK,
}

_u32: Final = struct.Struct(">I").pack
_u64: Final = struct.Struct(">Q").pack
_two: Final = struct.Struct(">II").pack
_fsid: Final = struct.Struct(">QQ").pack
_time: Final = struct.Struct(">qI").pack
_TRUE: Final = _u32(1)
_FALSE: Final = _u32(0)
_TYPE: Final = {kind: _u32(number) for kind, number in TYPES.items()}


def mask(*attributes: Attr) -> int:
    """A bitmap with these attributes."""
    return functools.reduce(lambda bits, each: bits | 1 << each, attributes, 0)


SET_ONLY: Final = mask(Attr.TIME_ACCESS_SET, Attr.TIME_MODIFY_SET, Attr.MODE_SET_MASKED, Attr.MODE_UMASK)
SETTABLE: Final = SET_ONLY | mask(Attr.SIZE, Attr.ACL, Attr.MODE, Attr.OWNER, Attr.OWNER_GROUP)

# --- what is told -----------------------------------------------------------------------------------


@fast_frozen
class _Asked:
    """Whose attributes are asked for, and by whom."""

    found: Attributes
    node: Node
    ctx: Compound


Field = Callable[[_Asked], bytes]


def _xdr_string(text: bytes) -> bytes:
    return _u32(len(text)) + text + bytes(-len(text) & 3)


@functools.lru_cache(maxsize=4096)
def _owner(number: int) -> bytes:
    return _xdr_string(b"%d" % number)


def _moment(nanoseconds: int) -> bytes:
    return _time(*divmod(nanoseconds, _NANOSECONDS))


def _bitmap(value: int) -> bytes:
    out = Writer()
    out.bitmap(value)
    return out.bytes()


def _access_list(asked: _Asked) -> bytes:
    found = asked.found
    return acl.encode(acl.of_mode(found.mode, directory=found.kind == Kind.DIRECTORY))


def _mounted_on(asked: _Asked) -> bytes:
    return _u64(asked.ctx.service.exports.mounted_on(asked.node, asked.found))


def _always(value: bytes) -> Field:
    return lambda _: value


def _space(what: Callable[[Space], int]) -> Field:
    return lambda asked: _u64(what(asked.node.export.files.space()))


def _locations(asked: _Asked) -> bytes:
    return referrals.encode_locations(asked.node.export.referral, _root_of(asked))


def _locations_info(asked: _Asked) -> bytes:
    valid_seconds = asked.ctx.service.config.lease_seconds
    return referrals.encode_locations_info(asked.node.export.referral, _root_of(asked), valid_seconds)


def _root_of(asked: _Asked) -> tuple[bytes, ...]:
    export = asked.node.export
    return export.path if export.referral is None else export.referral.place


OPEN_ARGUMENTS: Final = (
    1 << Share.READ | 1 << Share.WRITE | 1 << Share.BOTH,
    1 << Share.NONE | 1 << Share.READ | 1 << Share.WRITE | 1 << Share.BOTH,
    sum(1 << (want >> 8) for want in (Want.ANY, Want.NONE, Want.CANCEL)),
    sum(1 << claim for claim in Claim if claim not in {Claim.DELEGATE_PREV, Claim.DELEG_PREV_FH}),
    sum(1 << mode for mode in CreateMode),
)
"""What OPEN understands (RFC 9754 §2): access, denials, wishes, claims, and ways to create."""

_FIELDS: Final[dict[Attr, Field]] = {
    Attr.SUPPORTED_ATTRS: lambda asked: _bitmap(SUPPORTED[asked.ctx.minor]),
    Attr.TYPE: lambda asked: _TYPE[asked.found.kind],
    Attr.FH_EXPIRE_TYPE: _always(_FALSE),  # FH4_PERSISTENT
    Attr.CHANGE: lambda asked: _u64(asked.found.change),
    Attr.SIZE: lambda asked: _u64(asked.found.size),
    Attr.LINK_SUPPORT: _always(_TRUE),
    Attr.SYMLINK_SUPPORT: _always(_TRUE),
    Attr.NAMED_ATTR: _always(_FALSE),
    Attr.FSID: lambda asked: _fsid(asked.node.export.number, 0),
    Attr.UNIQUE_HANDLES: _always(_TRUE),
    Attr.LEASE_TIME: lambda asked: _u32(asked.ctx.service.config.lease_seconds),
    Attr.RDATTR_ERROR: _always(_u32(NfsStatus.OK)),
    Attr.ACL: _access_list,
    Attr.ACLSUPPORT: _always(_u32(acl.SUPPORT)),
    Attr.CANSETTIME: _always(_TRUE),
    Attr.CASE_INSENSITIVE: _always(_FALSE),
    Attr.CASE_PRESERVING: _always(_TRUE),
    Attr.CHOWN_RESTRICTED: _always(_TRUE),
    Attr.FILEHANDLE: lambda asked: _xdr_string(handles.encode(asked.node)),
    Attr.FILEID: lambda asked: _u64(asked.found.ino),
    Attr.FILES_AVAIL: _space(lambda space: space.files_free),
    Attr.FILES_FREE: _space(lambda space: space.files_free),
    Attr.FILES_TOTAL: _space(lambda space: space.files),
    Attr.FS_LOCATIONS: _locations,
    Attr.HOMOGENEOUS: _always(_TRUE),
    Attr.MAXFILESIZE: _always(_u64(SIZE_MAX)),
    Attr.MAXLINK: _always(_u32(LINKS_MAX)),
    Attr.MAXNAME: _always(_u32(NAME_BYTES_MAX)),
    Attr.MAXREAD: _always(_u64(IO_BYTES_MAX)),
    Attr.MAXWRITE: _always(_u64(IO_BYTES_MAX)),
    Attr.MODE: lambda asked: _u32(asked.found.mode),
    Attr.NO_TRUNC: _always(_TRUE),
    Attr.NUMLINKS: lambda asked: _u32(asked.found.nlink),
    Attr.OWNER: lambda asked: _owner(asked.found.uid),
    Attr.OWNER_GROUP: lambda asked: _owner(asked.found.gid),
    Attr.RAWDEV: lambda asked: _two(*device_numbers(asked.found.rdev)),
    Attr.SPACE_AVAIL: _space(lambda space: space.block_bytes * space.blocks_available),
    Attr.SPACE_FREE: _space(lambda space: space.block_bytes * space.blocks_free),
    Attr.SPACE_TOTAL: _space(lambda space: space.block_bytes * space.blocks),
    Attr.SPACE_USED: lambda asked: _u64(asked.found.allocated),
    Attr.TIME_ACCESS: lambda asked: _moment(asked.found.atime),
    Attr.TIME_CREATE: lambda asked: _moment(asked.found.btime),
    Attr.TIME_DELTA: _always(_time(0, 1)),
    Attr.TIME_METADATA: lambda asked: _moment(asked.found.ctime),
    Attr.TIME_MODIFY: lambda asked: _moment(asked.found.mtime),
    Attr.MOUNTED_ON_FILEID: _mounted_on,
    Attr.FS_LOCATIONS_INFO: _locations_info,
    Attr.SUPPATTR_EXCLCREAT: lambda asked: _bitmap(settable(asked.ctx.minor)),
    Attr.FS_CHARSET_CAP: _always(_u32(_UTF8_ONLY)),
    Attr.CLONE_BLKSIZE: _always(_u32(CLONE_BLOCK_BYTES)),
    Attr.CHANGE_ATTR_TYPE: _always(_u32(_CHANGE_IS_MONOTONIC)),
    Attr.XATTR_SUPPORT: _always(_TRUE),
    Attr.OPEN_ARGUMENTS: _always(b"".join(map(_bitmap, OPEN_ARGUMENTS))),
}
READABLE: Final = mask(*_FIELDS)
HOLDER_KNOWS: Final = mask(Attr.CHANGE, Attr.SIZE, Attr.SPACE_USED, Attr.TIME_METADATA, Attr.TIME_MODIFY)
"""What a client with a write delegation changes by itself."""

_OF_MINOR_1: Final = (1 << Attr.FS_CHARSET_CAP + 1) - 1
"""RFC 8881 ends with fs_charset_cap; what follows came with minor version 2."""

SUPPORTED: Final[dict[int, int]] = {1: (READABLE | SETTABLE) & _OF_MINOR_1, 2: READABLE | SETTABLE}


def settable(minor: int) -> int:
    """Attributes that can be set, also while a file is created exclusively: a verifier needs none of them."""
    return SETTABLE & SUPPORTED[minor]


def device_numbers(rdev: int) -> tuple[int, int]:
    """Major and minor number of a device as Linux packs them in 32 bits."""
    return rdev >> 8 & 0xFFF, rdev & 0xFF | rdev >> 12 & 0xFFF00


def device(major: int, minor: int) -> int:
    """The 32 bits of a device.

    Raises:
        NfsError: INVAL: the numbers do not fit.
    """
    if major > 0xFFF or minor > 0xFFFFF:
        raise NfsError(NfsStatus.INVAL)
    return minor & 0xFF | major << 8 | (minor & 0xFFF00) << 12


@attrs.frozen
class _Plan:
    """What a bitmap asks for: the bitmap that answers it, and what makes the values."""

    head: bytes
    fields: tuple[Field, ...]


@functools.lru_cache(maxsize=512)  # clients use a dozen; a client that tries all of them gains nothing
def _plan(bitmap: int, minor: int) -> _Plan:
    wanted = bitmap & READABLE & SUPPORTED[minor]
    return _Plan(
        _bitmap(wanted), tuple(field for number, field in sorted(_FIELDS.items()) if wanted >> number & 1)
    )


def encode(ctx: Compound, node: Node, found: Attributes, bitmap: int, out: Writer) -> None:
    """Writes the attributes of a node that are asked for and that there are, as a fattr4."""
    plan = _plan(bitmap, ctx.minor)
    asked = _Asked(found, node, ctx)
    values = b"".join([field(asked) for field in plan.fields])
    out.raw(plan.head)
    out.opaque(values)


_SAY_WHERE: Final = mask(Attr.FS_LOCATIONS, Attr.FS_LOCATIONS_INFO)
_OF_ABSENT: Final = _SAY_WHERE | mask(Attr.FSID, Attr.MOUNTED_ON_FILEID)


def encode_absent(ctx: Compound, node: Node, found: Attributes, bitmap: int, out: Writer) -> None:
    """Writes the fattr4 of a file system that is elsewhere, ``found`` being its directory here (RFC 8881 §11.4).

    Who asks where it is gets that and little else; an entry of a listing says RDATTR_ERROR to who did not.

    Raises:
        NfsError: MOVED: neither was asked for.
    """
    wanted = bitmap & _OF_ABSENT
    asked = _Asked(found, node, ctx)
    values = {number: _FIELDS[number](asked) for number in sorted(_FIELDS) if wanted >> number & 1}
    if bitmap >> Attr.RDATTR_ERROR & 1:
        values[Attr.RDATTR_ERROR] = _u32(NfsStatus.OK if bitmap & _SAY_WHERE else NfsStatus.MOVED)
    elif not bitmap & _SAY_WHERE:
        raise NfsError(NfsStatus.MOVED)
    out.bitmap(mask(*values))
    out.opaque(b"".join(value for _, value in sorted(values.items())))


def encode_error(ctx: Compound, status: int, out: Writer) -> None:
    """Writes the fattr4 of a directory entry whose attributes cannot be had (RFC 8881 §5.8.1.12)."""
    out.bitmap(mask(Attr.RDATTR_ERROR))
    out.opaque(_u32(status))


def check_readable(bitmap: int) -> None:
    """Refuses to tell what can only be set.

    Raises:
        NfsError: INVAL (RFC 8881 §18.7.3).
    """
    if bitmap & SET_ONLY:
        raise NfsError(NfsStatus.INVAL)


def same(ctx: Compound, node: Node, found: Attributes, args: Reader) -> bool:
    """Whether a node has exactly the attributes of the fattr4 that comes next (RFC 8881 §18.30.3).

    Raises:
        NfsError: ATTRNOTSUPP, INVAL: one of them there is not, or cannot be compared.
    """
    bitmap, values = args.bitmap(), args.opaque_view(VALUES_BYTES_MAX)
    if bitmap & (SET_ONLY | mask(Attr.RDATTR_ERROR)):
        raise NfsError(NfsStatus.INVAL)
    if bitmap & ~SUPPORTED[ctx.minor]:
        raise NfsError(NfsStatus.ATTRNOTSUPP)
    asked = _Asked(found, node, ctx)
    ours = b"".join([field(asked) for field in _plan(bitmap, ctx.minor).fields])
    return ours == values


# --- what is set ------------------------------------------------------------------------------------


@attrs.frozen
class Settable:
    """Attributes a client wants to have set.

    Attributes:
        bitmap: which; once they are set it says so in the reply.
        masked: value and mask for bits of the mode (RFC 8881 §6.2.5), on top of ``change.mode``.
        listed: the mode that means what the ACL that was sent says; it gives way to ``change.mode`` (§6.4.1.3).
    """

    bitmap: int = 0
    change: AttributeChange = NOTHING
    masked: tuple[int, int] | None = None
    listed: int | None = None

    def onto(self, mode: int) -> AttributeChange:
        """The change for a node that has this mode."""
        result = self.change.mode
        if result is None and self.listed is not None:
            result = mode & ~0o777 | self.listed
        if self.masked is not None:
            value, bits = self.masked
            result = (mode if result is None else result) & ~bits | value & bits
        return self.change if result == self.change.mode else attrs.evolve(self.change, mode=result)


def _mode(args: Reader) -> int:
    value = args.u32()
    if value > 0o7777:
        raise NfsError(NfsStatus.INVAL)
    return value


def _time_to_set(args: Reader) -> int:
    how = args.u32()
    if how > _SET_TO_CLIENT_TIME:
        raise XdrError(f"no way to set a time: {how}")
    if how != _SET_TO_CLIENT_TIME:
        return NOW
    seconds, nanoseconds = args.i64(), args.u32()
    if nanoseconds >= _NANOSECONDS or not -(1 << 33) < seconds < 1 << 33:
        raise NfsError(NfsStatus.INVAL)  # 64 bits of nanoseconds reach from 1697 to 2242
    return seconds * _NANOSECONDS + nanoseconds


def _number(args: Reader) -> int:
    """An owner: a number in decimal."""
    text = args.opaque(OWNER_BYTES_MAX)
    try:
        text.decode()
    except UnicodeDecodeError:
        raise NfsError(NfsStatus.INVAL) from None
    if not text.isdigit() or len(text) > 10 or int(text) >= 0xFFFFFFFF:
        raise NfsError(NfsStatus.BADOWNER)
    return int(text)


def decode_settable(ctx: Compound, args: Reader, *, creating: bool) -> Settable:
    """Attributes to set, off a request; ``creating``: the node is made with them, so that a umask can come along.

    Raises:
        NfsError: ATTRNOTSUPP, INVAL, BADOWNER: one there is not, cannot be set, or has no such value.
    """
    bitmap = args.bitmap()
    values = Reader(args.opaque_view(VALUES_BYTES_MAX))
    if bitmap & ~SUPPORTED[ctx.minor]:
        raise NfsError(NfsStatus.ATTRNOTSUPP)
    if bitmap & ~SETTABLE or (bitmap >> Attr.MODE_UMASK & 1 and not creating):
        raise NfsError(NfsStatus.INVAL)
    found = _values(bitmap, values)
    if values.left:
        raise XdrError("values behind the last attribute")
    return found


def _values(bitmap: int, values: Reader) -> Settable:
    """Takes the values, which come in the order of their numbers."""

    def given(attribute: Attr) -> bool:
        return bool(bitmap >> attribute & 1)

    size = values.u64() if given(Attr.SIZE) else None
    listed = _listed(values) if given(Attr.ACL) else None
    mode = _mode(values) if given(Attr.MODE) else None
    uid = _number(values) if given(Attr.OWNER) else None
    gid = _number(values) if given(Attr.OWNER_GROUP) else None
    atime = _time_to_set(values) if given(Attr.TIME_ACCESS_SET) else None
    mtime = _time_to_set(values) if given(Attr.TIME_MODIFY_SET) else None
    masked = (_mode(values), _mode(values)) if given(Attr.MODE_SET_MASKED) else None
    if given(Attr.MODE_UMASK):
        mode = _mode(values) & ~_mode(values)
    if size is not None and size > SIZE_MAX:
        raise NfsError(NfsStatus.FBIG)
    if masked is not None and (mode is not None or listed is not None):
        raise NfsError(NfsStatus.INVAL)  # RFC 8881 §6.4.1.3
    return Settable(bitmap, AttributeChange(mode, uid, gid, size, atime, mtime), masked, listed)


def _listed(values: Reader) -> int:
    mode = acl.to_mode(acl.decode(values))
    if mode is None:
        raise NfsError(NfsStatus.ATTRNOTSUPP)
    return mode
