"""A small synchronous NFSv4.1 and 4.2 client for tests and benchmarks, written from RFC 8881, 7862 and 8276.

It shares nothing with the server it judges: numbers, codec and session rules are its own, and it was first held
against another server (ganesha).  It does one thing at a time per connection, but any number of requests can be on
their way (``submit`` and ``collect``), and calls of the back channel are answered while it waits.

Operations are made by functions that give bytes (``putfh(handle)``, ``read(stateid, 0, 4096)``); their results come
back decoded, one object per operation, up to the first that failed.
"""

# ruff: noqa: D103  what an operation means is in its RFC

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Self

import attrs

# --- XDR (RFC 4506)

_PAD: Final = (b"", b"\0\0\0", b"\0\0", b"\0")


def u32(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def u64(*values: int) -> bytes:
    return struct.pack(f">{len(values)}Q", *values)


def opaque(data: bytes) -> bytes:
    return b"".join((u32(len(data)), data, _PAD[len(data) & 3]))


def bitmap(numbers: Sequence[int]) -> bytes:
    words = [0] * (max(numbers, default=-1) // 32 + 1)
    for each in numbers:
        words[each // 32] |= 1 << each % 32
    return u32(len(words), *words)


class Unpacker:
    """Takes values off an answer; an answer that ends too early raises ``struct.error``."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = memoryview(data)
        self.at = 0

    def u32(self) -> int:
        (value,) = struct.unpack_from(">I", self.data, self.at)
        self.at += 4
        return int(value)

    def u64(self) -> int:
        (value,) = struct.unpack_from(">Q", self.data, self.at)
        self.at += 8
        return int(value)

    def fixed(self, length: int) -> bytes:
        if self.at + length > len(self.data):
            raise struct.error("the answer ends inside opaque data")
        found = bytes(self.data[self.at : self.at + length])
        self.at += length + (-length & 3)
        return found

    def boolean(self) -> bool:
        value = self.u32()
        assert value < 2, f"a boolean of {value}"
        return bool(value)

    def opaque(self) -> bytes:
        return self.fixed(self.u32())

    def bitmap(self) -> list[int]:
        words = [self.u32() for _ in range(self.u32())]
        return [32 * word + bit for word, value in enumerate(words) for bit in range(32) if value >> bit & 1]

    def array(self, element: Callable[[], Any]) -> list[Any]:
        return [element() for _ in range(self.u32())]

    @property
    def left(self) -> int:
        return len(self.data) - self.at


# --- names of numbers

OPS: Final = {
    "access": 3, "close": 4, "commit": 5, "create": 6, "delegpurge": 7, "delegreturn": 8, "getattr": 9, "getfh": 10,
    "link": 11, "lock": 12, "lockt": 13, "locku": 14, "lookup": 15, "lookupp": 16, "nverify": 17, "open": 18,
    "openattr": 19, "open_downgrade": 21, "putfh": 22, "putpubfh": 23, "putrootfh": 24, "read": 25, "readdir": 26,
    "readlink": 27, "remove": 28, "rename": 29, "restorefh": 31, "savefh": 32, "secinfo": 33, "setattr": 34,
    "verify": 37, "write": 38, "backchannel_ctl": 40, "bind_conn_to_session": 41, "exchange_id": 42,
    "create_session": 43, "destroy_session": 44, "free_stateid": 45, "secinfo_no_name": 52, "sequence": 53,
    "test_stateid": 55, "destroy_clientid": 57, "reclaim_complete": 58, "allocate": 59, "copy": 60, "deallocate": 62,
    "io_advise": 63, "offload_cancel": 66, "offload_status": 67, "read_plus": 68, "seek": 69, "clone": 71,
    "getxattr": 72, "setxattr": 73, "listxattrs": 74, "removexattr": 75, "illegal": 10044,
}  # fmt: skip
OP_NAMES: Final = {number: name for name, number in OPS.items()}

STATUS: Final = {
    0: "OK", 1: "PERM", 2: "NOENT", 5: "IO", 6: "NXIO", 13: "ACCESS", 17: "EXIST", 18: "XDEV", 20: "NOTDIR",
    21: "ISDIR", 22: "INVAL", 27: "FBIG", 28: "NOSPC", 30: "ROFS", 31: "MLINK", 63: "NAMETOOLONG", 66: "NOTEMPTY",
    69: "DQUOT", 70: "STALE", 10001: "BADHANDLE", 10003: "BAD_COOKIE", 10004: "NOTSUPP", 10005: "TOOSMALL",
    10006: "SERVERFAULT", 10007: "BADTYPE", 10008: "DELAY", 10009: "SAME", 10010: "DENIED", 10011: "EXPIRED",
    10012: "LOCKED", 10013: "GRACE", 10015: "SHARE_DENIED", 10016: "WRONGSEC", 10017: "CLID_INUSE",
    10020: "NOFILEHANDLE", 10021: "MINOR_VERS_MISMATCH", 10022: "STALE_CLIENTID", 10023: "STALE_STATEID",
    10024: "OLD_STATEID", 10025: "BAD_STATEID", 10026: "BAD_SEQID", 10027: "NOT_SAME", 10028: "LOCK_RANGE",
    10019: "MOVED", 10029: "SYMLINK", 10030: "RESTOREFH", 10032: "ATTRNOTSUPP", 10033: "NO_GRACE", 10034: "RECLAIM_BAD",
    10035: "RECLAIM_CONFLICT", 10036: "BADXDR", 10037: "LOCKS_HELD", 10038: "OPENMODE", 10039: "BADOWNER",
    10040: "BADCHAR", 10041: "BADNAME", 10042: "BAD_RANGE", 10044: "OP_ILLEGAL", 10045: "DEADLOCK",
    10046: "FILE_OPEN", 10047: "ADMIN_REVOKED", 10048: "CB_PATH_DOWN", 10052: "BADSESSION", 10053: "BADSLOT",
    10054: "COMPLETE_ALREADY", 10055: "CONN_NOT_BOUND_TO_SESSION", 10063: "SEQ_MISORDERED", 10064: "SEQUENCE_POS",
    10065: "REQ_TOO_BIG", 10066: "REP_TOO_BIG", 10067: "REP_TOO_BIG_TO_CACHE", 10068: "RETRY_UNCACHED_REP",
    10070: "TOO_MANY_OPS", 10071: "OP_NOT_IN_SESSION", 10074: "CLIENTID_BUSY", 10076: "SEQ_FALSE_RETRY",
    10077: "BAD_HIGH_SLOT", 10078: "DEADSESSION", 10081: "NOT_ONLY_OP", 10082: "WRONG_CRED", 10083: "WRONG_TYPE",
    10085: "REJECT_DELEG", 10087: "DELEG_REVOKED", 10091: "OFFLOAD_DENIED", 10094: "OFFLOAD_NO_REQS",
    10095: "NOXATTR", 10096: "XATTR2BIG",
}  # fmt: skip

READ, WRITE, BOTH = 1, 2, 3
WANT_NO_DELEGATION: Final = 0x400
READ_LOCK, WRITE_LOCK = 1, 2
REG, DIR, BLK, CHR, LNK, SOCK, FIFO = range(1, 8)
UNSTABLE, DATA_SYNC, FILE_SYNC = range(3)
TO_END: Final = 2**64 - 1
SEEK_DATA, SEEK_HOLE = range(2)
UNCHECKED, GUARDED, EXCLUSIVE, EXCLUSIVE_1 = range(4)

# --- attributes (RFC 8881 §5)


def _time(take: Unpacker) -> int:
    seconds = struct.unpack(">q", take.fixed(8))[0]
    return int(seconds) * 10**9 + take.u32()


def _two(take: Unpacker) -> tuple[int, int]:
    return take.u64(), take.u64()


def _device(take: Unpacker) -> tuple[int, int]:
    return take.u32(), take.u32()


def _acl(take: Unpacker) -> list[tuple[int, int, int, bytes]]:
    return take.array(lambda: (take.u32(), take.u32(), take.u32(), take.opaque()))


def _pathname(take: Unpacker) -> list[bytes]:
    return take.array(take.opaque)


def _locations(take: Unpacker) -> tuple[list[bytes], list[tuple[list[bytes], list[bytes]]]]:
    """fs_locations4: the root here, and elsewhere servers and the root there."""
    return _pathname(take), take.array(lambda: (take.array(take.opaque), _pathname(take)))


def _locations_info(take: Unpacker) -> tuple[list[bytes], list[tuple[list[bytes], list[bytes]]]]:
    """fs_locations_info4, as far as it is fs_locations4 too."""
    take.fixed(8)
    return _pathname(take), take.array(lambda: (take.array(lambda: _server_info(take)), _pathname(take)))


def _server_info(take: Unpacker) -> bytes:
    take.u32()
    take.opaque()
    return take.opaque()


def _open_arguments(take: Unpacker) -> list[list[int]]:
    return [take.bitmap() for _ in range(5)]  # RFC 9754, section 4


ATTRIBUTES: Final[Mapping[str, tuple[int, Callable[[Unpacker], Any]]]] = {
    "supported": (0, Unpacker.bitmap), "type": (1, Unpacker.u32), "expire": (2, Unpacker.u32),
    "change": (3, Unpacker.u64), "size": (4, Unpacker.u64), "link_support": (5, Unpacker.boolean),
    "symlink_support": (6, Unpacker.boolean), "named_attr": (7, Unpacker.boolean), "fsid": (8, _two),
    "unique_handles": (9, Unpacker.boolean), "lease": (10, Unpacker.u32), "rdattr_error": (11, Unpacker.u32),
    "acl": (12, _acl), "aclsupport": (13, Unpacker.u32), "btime": (50, _time), "charset": (76, Unpacker.u32),
    "open_arguments": (86, _open_arguments), "fs_locations": (24, _locations),
    "fs_locations_info": (67, _locations_info),
    "cansettime": (15, Unpacker.boolean), "case_insensitive": (16, Unpacker.boolean),
    "case_preserving": (17, Unpacker.boolean), "chown_restricted": (18, Unpacker.boolean),
    "handle": (19, Unpacker.opaque), "fileid": (20, Unpacker.u64), "files_avail": (21, Unpacker.u64),
    "files_free": (22, Unpacker.u64), "files_total": (23, Unpacker.u64), "homogeneous": (26, Unpacker.boolean),
    "maxfilesize": (27, Unpacker.u64), "maxlink": (28, Unpacker.u32), "maxname": (29, Unpacker.u32),
    "maxread": (30, Unpacker.u64), "maxwrite": (31, Unpacker.u64), "mode": (33, Unpacker.u32),
    "no_trunc": (34, Unpacker.boolean), "nlink": (35, Unpacker.u32), "owner": (36, Unpacker.opaque),
    "group": (37, Unpacker.opaque), "rawdev": (41, _device), "space_avail": (42, Unpacker.u64),
    "space_free": (43, Unpacker.u64), "space_total": (44, Unpacker.u64), "space_used": (45, Unpacker.u64),
    "atime": (47, _time), "time_delta": (51, _time), "ctime": (52, _time), "mtime": (53, _time),
    "mounted_on_fileid": (55, Unpacker.u64), "exclusive": (75, Unpacker.bitmap), "clone_blksize": (77, Unpacker.u32),
    "change_attr_type": (79, Unpacker.u32), "xattr_support": (82, Unpacker.boolean),
}  # fmt: skip
_BY_NUMBER: Final = {number: (name, take) for name, (number, take) in ATTRIBUTES.items()}


def ask(*names: str) -> bytes:
    """A bitmap of attributes by name."""
    return bitmap([ATTRIBUTES[each][0] for each in names])


def take_attributes(take: Unpacker) -> dict[str, Any]:
    """A fattr4, by name."""
    numbers = take.bitmap()
    values = Unpacker(take.opaque())
    found = {_BY_NUMBER[each][0]: _BY_NUMBER[each][1](values) for each in numbers}
    assert values.left == 0, "attributes longer than their bitmap says"
    return found


def settable(
    *,
    mode: int | None = None,
    size: int | None = None,
    owner: str | None = None,
    group: str | None = None,
    atime: int | None = None,
    mtime: int | None = None,
) -> bytes:
    """A fattr4 with what is to be set; times in nanoseconds, negative: the server's."""
    given: dict[int, bytes] = {}
    if size is not None:
        given[4] = u64(size)
    if mode is not None:
        given[33] = u32(mode)
    if owner is not None:
        given[36] = opaque(owner.encode())
    if group is not None:
        given[37] = opaque(group.encode())
    for number, value in ((48, atime), (54, mtime)):
        if value is not None:
            given[number] = u32(0) if value < 0 else u32(1) + u64(value // 10**9) + u32(value % 10**9)
    return bitmap(list(given)) + opaque(b"".join(given.values()))


# --- operations: their arguments


@attrs.frozen
class Stateid:
    """stateid4."""

    seqid: int
    other: bytes

    def xdr(self) -> bytes:
        return u32(self.seqid) + self.other


ANONYMOUS: Final = Stateid(0, bytes(12))
CURRENT: Final = Stateid(1, bytes(12))
BYPASS: Final = Stateid(2**32 - 1, b"\xff" * 12)


def op(name: str, *arguments: bytes) -> bytes:
    """An operation with arguments that are XDR already."""
    return b"".join((u32(OPS[name]), *arguments))


def putrootfh() -> bytes:
    return op("putrootfh")


def putfh(handle: bytes) -> bytes:
    return op("putfh", opaque(handle))


def getfh() -> bytes:
    return op("getfh")


def savefh() -> bytes:
    return op("savefh")


def restorefh() -> bytes:
    return op("restorefh")


def lookup(name: bytes) -> bytes:
    return op("lookup", opaque(name))


def lookupp() -> bytes:
    return op("lookupp")


def access(bits: int) -> bytes:
    return op("access", u32(bits))


def getattr_(*names: str) -> bytes:
    return op("getattr", ask(*names))


def setattr_(stateid: Stateid = ANONYMOUS, **values: Any) -> bytes:
    return op("setattr", stateid.xdr(), settable(**values))


def create(
    kind: int, name: bytes, *, target: bytes = b"", device: tuple[int, int] = (0, 0), **values: Any
) -> bytes:
    extra = opaque(target) if kind == LNK else u32(*device) if kind in (BLK, CHR) else b""
    return op("create", u32(kind), extra, opaque(name), settable(**values))


def remove(name: bytes) -> bytes:
    return op("remove", opaque(name))


def rename(old: bytes, new: bytes) -> bytes:
    return op("rename", opaque(old), opaque(new))


def link(name: bytes) -> bytes:
    return op("link", opaque(name))


def readlink() -> bytes:
    return op("readlink")


def readdir(cookie: int, verifier: bytes, *names: str, count: int = 65536) -> bytes:
    return op("readdir", u64(cookie), verifier, u32(count, count), ask(*names))


def read(stateid: Stateid, offset: int, count: int) -> bytes:
    return op("read", stateid.xdr(), u64(offset), u32(count))


def write(stateid: Stateid, offset: int, data: bytes, stable: int = UNSTABLE) -> bytes:
    return op("write", stateid.xdr(), u64(offset), u32(stable), opaque(data))


def commit(offset: int = 0, count: int = 0) -> bytes:
    return op("commit", u64(offset), u32(count))


def not_created() -> bytes:
    return u32(0)


def created(how: int = UNCHECKED, verifier: bytes = bytes(8), **values: Any) -> bytes:
    """openflag4 with createhow4."""
    body = b"" if how == EXCLUSIVE else settable(**values)
    return u32(1, how) + (verifier if how >= EXCLUSIVE else b"") + body


def claim_null(name: bytes) -> bytes:
    return u32(0) + opaque(name)


def claim_previous(delegation: int = 0) -> bytes:
    return u32(1, delegation)


def claim_fh() -> bytes:
    return u32(4)


def open_(
    client: int, owner: bytes, claim: bytes, *, share: int = BOTH, deny: int = 0, how: bytes = u32(0)
) -> bytes:
    return op("open", u32(0, share, deny), u64(client), opaque(owner), how, claim)


def close(stateid: Stateid) -> bytes:
    return op("close", u32(0), stateid.xdr())


def open_downgrade(stateid: Stateid, share: int, deny: int = 0) -> bytes:
    return op("open_downgrade", stateid.xdr(), u32(0, share, deny))


def lock_first(
    kind: int, offset: int, length: int, opened: Stateid, client: int, owner: bytes, *, reclaim: bool = False
) -> bytes:
    """LOCK by a lock-owner that has no lock in the file yet."""
    new = u32(1, 0) + opened.xdr() + u32(0) + u64(client) + opaque(owner)
    return op("lock", u32(kind, reclaim), u64(offset, length), new)


def lock_more(kind: int, offset: int, length: int, held: Stateid) -> bytes:
    return op("lock", u32(kind, 0), u64(offset, length), u32(0), held.xdr(), u32(0))


def lockt(kind: int, offset: int, length: int, client: int, owner: bytes) -> bytes:
    return op("lockt", u32(kind), u64(offset, length, client), opaque(owner))


def locku(kind: int, offset: int, length: int, held: Stateid) -> bytes:
    return op("locku", u32(kind, 0), held.xdr(), u64(offset, length))


def delegreturn(stateid: Stateid) -> bytes:
    return op("delegreturn", stateid.xdr())


def test_stateid(*stateids: Stateid) -> bytes:
    return op("test_stateid", u32(len(stateids)), *(each.xdr() for each in stateids))


test_stateid.__test__ = False  # type: ignore[attr-defined]  # an operation, and no test of pytest's


def free_stateid(stateid: Stateid) -> bytes:
    return op("free_stateid", stateid.xdr())


def secinfo_no_name(style: int = 0) -> bytes:
    return op("secinfo_no_name", u32(style))


def reclaim_complete(*, one_fs: bool = False) -> bytes:
    return op("reclaim_complete", u32(one_fs))


def allocate(stateid: Stateid, offset: int, length: int) -> bytes:
    return op("allocate", stateid.xdr(), u64(offset, length))


def deallocate(stateid: Stateid, offset: int, length: int) -> bytes:
    return op("deallocate", stateid.xdr(), u64(offset, length))


def seek(stateid: Stateid, offset: int, what: int) -> bytes:
    return op("seek", stateid.xdr(), u64(offset), u32(what))


def read_plus(stateid: Stateid, offset: int, count: int) -> bytes:
    return op("read_plus", stateid.xdr(), u64(offset), u32(count))


def copy(
    source: Stateid, target: Stateid, from_: int, to: int, count: int, *, synchronous: bool = True
) -> bytes:
    """COPY from the saved filehandle to the current one, on this server."""
    return op("copy", source.xdr(), target.xdr(), u64(from_, to, count), u32(1, synchronous, 0))


def clone(source: Stateid, target: Stateid, from_: int, to: int, count: int) -> bytes:
    return op("clone", source.xdr(), target.xdr(), u64(from_, to, count))


def offload_status(stateid: Stateid) -> bytes:
    return op("offload_status", stateid.xdr())


def getxattr(name: bytes) -> bytes:
    return op("getxattr", opaque(name))


def setxattr(name: bytes, value: bytes, option: int = 0) -> bytes:
    return op("setxattr", u32(option), opaque(name), opaque(value))


def listxattrs(cookie: int = 0, count: int = 65536) -> bytes:
    return op("listxattrs", u64(cookie), u32(count))


def removexattr(name: bytes) -> bytes:
    return op("removexattr", opaque(name))


# --- operations: their results


def _stateid(take: Unpacker) -> Stateid:
    return Stateid(take.u32(), take.fixed(12))


@attrs.frozen
class ChangeInfo:
    """change_info4."""

    atomic: bool
    before: int
    after: int


def _change(take: Unpacker) -> ChangeInfo:
    return ChangeInfo(take.boolean(), take.u64(), take.u64())


@attrs.frozen
class Delegation:
    """What OPEN gave beside the open: ``kind`` 0 nothing, 1 read, 2 write, 3 nothing, and ``why``.

    ``recalled``: it is to be given back at once.
    """

    kind: int
    stateid: Stateid | None = None
    why: int = 0
    recalled: bool = False


def _ace(take: Unpacker) -> None:
    take.fixed(12)
    take.opaque()


def _delegation(take: Unpacker) -> Delegation:
    kind = take.u32()
    if kind in (1, 2):
        stateid, recalled = _stateid(take), take.boolean()
        if kind == 2:
            take.u32()
            take.fixed(8)  # a size, or a number of blocks and their size
        _ace(take)
        return Delegation(kind, stateid, recalled=recalled)
    why = take.u32() if kind == 3 else 0
    if why in (1, 2):
        take.boolean()
    return Delegation(kind, None, why)


@attrs.frozen
class Opened:
    """OPEN4resok."""

    stateid: Stateid
    change: ChangeInfo
    flags: int
    attributes: list[int]
    delegation: Delegation


def _opened(take: Unpacker) -> Opened:
    return Opened(_stateid(take), _change(take), take.u32(), take.bitmap(), _delegation(take))


@attrs.frozen
class Read:
    """READ4resok."""

    eof: bool
    data: bytes


@attrs.frozen
class Written:
    """WRITE4resok; for COPY also where it goes on later."""

    count: int
    committed: int
    verifier: bytes
    offload: Stateid | None = None


@attrs.frozen
class Entry:
    """entry4."""

    cookie: int
    name: bytes
    attributes: dict[str, Any]


@attrs.frozen
class Listing:
    """READDIR4resok."""

    verifier: bytes
    entries: list[Entry]
    eof: bool


def _listing(take: Unpacker) -> Listing:
    verifier = take.fixed(8)
    entries = []
    while take.boolean():
        entries.append(Entry(take.u64(), take.opaque(), take_attributes(take)))
    return Listing(verifier, entries, take.boolean())


@attrs.frozen
class Held:
    """LOCK4denied: a lock that is in the way."""

    offset: int
    length: int
    kind: int
    client: int
    owner: bytes


def _held(take: Unpacker) -> Held:
    return Held(take.u64(), take.u64(), take.u32(), take.u64(), take.opaque())


def _security(take: Unpacker) -> int:
    flavor = take.u32()
    if flavor == 6:
        take.opaque()
        take.fixed(8)
    return flavor


@attrs.frozen
class Channel:
    """channel_attrs4; sizes in bytes."""

    padding: int = 0
    request_max: int = (1 << 20) + 8192
    response_max: int = (1 << 20) + 8192
    cached_max: int = 8192
    operations: int = 64
    requests: int = 64

    def xdr(self) -> bytes:
        return u32(*attrs.astuple(self), 0)


def _channel(take: Unpacker) -> Channel:
    found = Channel(*(take.u32() for _ in range(6)))
    take.array(take.u32)
    return found


@attrs.frozen
class Identity:
    """EXCHANGE_ID4resok."""

    client: int
    sequence: int
    flags: int
    owner: bytes
    scope: bytes


def _identity(take: Unpacker) -> Identity:
    client, sequence, flags = take.u64(), take.u32(), take.u32()
    assert take.u32() == 0, "a protection of state that was not asked for"
    take.u64()
    found = Identity(client, sequence, flags, take.opaque(), take.opaque())
    take.array(lambda: (take.opaque(), take.opaque(), take.fixed(12)))
    return found


@attrs.frozen
class SessionMade:
    """CREATE_SESSION4resok."""

    id: bytes
    sequence: int
    flags: int
    fore: Channel
    back: Channel


@attrs.frozen
class Sequenced:
    """SEQUENCE4resok."""

    session: bytes
    sequence: int
    slot: int
    highest: int
    target_highest: int
    flags: int


def _copied(take: Unpacker) -> Written:
    found = _write_response(take)
    take.fixed(8)  # what was asked for: consecutive, synchronous
    return found


def _write_response(take: Unpacker) -> Written:
    offload = take.array(lambda: _stateid(take))
    return Written(take.u64(), take.u32(), take.fixed(8), offload[0] if offload else None)


@attrs.frozen
class Segment:
    """read_plus_content: bytes, or a hole of a length."""

    offset: int
    data: bytes | None
    length: int


def _segment(take: Unpacker) -> Segment:
    kind, offset = take.u32(), take.u64()
    if kind == 0:
        data = take.opaque()
        return Segment(offset, data, len(data))
    assert kind == 1
    return Segment(offset, None, take.u64())


def _nothing(take: Unpacker) -> None:
    del take


RESULTS: Final[Mapping[str, Callable[[Unpacker], Any]]] = {
    "access": lambda t: (t.u32(), t.u32()),
    "close": _stateid,
    "commit": lambda t: t.fixed(8),
    "create": lambda t: (_change(t), t.bitmap()),
    "getattr": take_attributes,
    "getfh": Unpacker.opaque,
    "link": _change,
    "lock": _stateid,
    "locku": _stateid,
    "open": _opened,
    "open_downgrade": _stateid,
    "read": lambda t: Read(t.boolean(), t.opaque()),
    "readdir": _listing,
    "readlink": Unpacker.opaque,
    "remove": _change,
    "rename": lambda t: (_change(t), _change(t)),
    "secinfo": lambda t: t.array(lambda: _security(t)),
    "secinfo_no_name": lambda t: t.array(lambda: _security(t)),
    "setattr": lambda t: None,
    "write": lambda t: Written(t.u32(), t.u32(), t.fixed(8)),
    "bind_conn_to_session": lambda t: (t.fixed(16), t.u32(), t.boolean()),
    "exchange_id": _identity,
    "create_session": lambda t: SessionMade(t.fixed(16), t.u32(), t.u32(), _channel(t), _channel(t)),
    "sequence": lambda t: Sequenced(t.fixed(16), *(t.u32() for _ in range(5))),
    "test_stateid": lambda t: t.array(t.u32),
    "copy": _copied,
    "io_advise": Unpacker.bitmap,
    "offload_status": lambda t: (t.u64(), t.array(t.u32)),
    "read_plus": lambda t: (t.boolean(), t.array(lambda: _segment(t))),
    "seek": lambda t: (t.boolean(), t.u64()),
    "getxattr": Unpacker.opaque,
    "setxattr": _change,
    "listxattrs": lambda t: (t.u64(), t.array(t.opaque), t.boolean()),
    "removexattr": _change,
}


@attrs.frozen
class Result:
    """What one operation came to: its status by name, and what it gave (or the lock in the way)."""

    name: str
    status: str
    value: Any = None


class NfsError(Exception):
    """A COMPOUND stopped: ``status`` by name, of operation ``name``."""

    def __init__(self, results: Sequence[Result], status: str) -> None:
        self.results = list(results)
        self.status = status
        self.name = results[-1].name if results else "compound"
        super().__init__(f"{self.name}: {status}")


@attrs.frozen
class Answer:
    """COMPOUND4res."""

    status: str
    results: list[Result]

    def values(self) -> list[Any]:
        """What the operations gave, the SEQUENCE left out.

        Raises:
            NfsError: one failed.
        """
        if self.status != "OK":
            raise NfsError(self.results, self.status)
        return [each.value for each in self.results if each.name != "sequence"]


def status_name(number: int) -> str:
    return STATUS.get(number, str(number))


def _result(take: Unpacker) -> Result:
    name, status = OP_NAMES.get(take.u32(), "illegal"), take.u32()
    if name == "setattr":
        take.bitmap()  # what was set, whatever the status
    if status == 0:
        return Result(name, "OK", RESULTS.get(name, _nothing)(take))
    if status == 10010:
        return Result(name, "DENIED", _held(take))
    return Result(name, status_name(status))


def take_answer(data: bytes | memoryview) -> Answer:
    """A COMPOUND4res; it must end where its bytes do."""
    take = Unpacker(data)
    status = status_name(take.u32())
    take.opaque()
    results = take.array(lambda: _result(take))
    assert take.left == 0, f"{take.left} bytes after the answer"
    assert not results or status == results[-1].status, "not the status of the last operation"
    return Answer(status, results)


# --- RPC (RFC 5531)

PROGRAM: Final = 100003
CALLBACK_PROGRAM: Final = 0x40000000
RECORD_BYTES_MAX: Final = 8 << 20
TIMEOUT_SECONDS: Final = 60.0


class RpcError(Exception):
    """A call was not carried out: what the server said about it, or that it said nothing."""


def auth_sys(uid: int = 0, gid: int = 0, gids: Sequence[int] = (), machine: bytes = b"test") -> bytes:
    """authsys_parms."""
    return u32(0) + opaque(machine) + u32(uid, gid, len(gids), *gids)


def call(xid: int, procedure: int, body: bytes, credential: bytes | None, version: int = 4) -> bytes:
    """A call of the NFS program, without its record mark."""
    flavor = u32(0, 0) if credential is None else u32(1) + opaque(credential)
    return b"".join((u32(xid, 0, 2, PROGRAM, version, procedure), flavor, u32(0, 0), body))


def compound_body(operations: Sequence[bytes], minor: int, tag: bytes = b"") -> bytes:
    return b"".join((opaque(tag), u32(minor, len(operations)), *operations))


def record(message: bytes) -> bytes:
    """A message as one fragment."""
    return u32(1 << 31 | len(message)) + message


Callback = Callable[[str, Unpacker], bytes]
"""Answers an operation of the back channel: its name and arguments; gives what follows the name (status and rest)."""

CB_OPS: Final = {
    3: "getattr",
    4: "recall",
    8: "recall_any",
    10: "recall_slot",
    13: "notify_lock",
    15: "offload",
}


class Rpc:
    """One TCP connection, both channels.

    Attributes:
        callback: what answers operations of the back channel; answers wait for somebody to receive or :meth:`serve`.
    """

    def __init__(self, address: tuple[str, int], credential: bytes | None = None) -> None:
        self.socket = socket.create_connection(address, TIMEOUT_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.credential = auth_sys() if credential is None else credential
        self.callback: Callback = lambda name, arguments: u32(0)
        self._xid = int.from_bytes(os.urandom(3), "big") << 8
        self._early: dict[int, bytes] = {}  # answers that nobody has waited for yet

    def submit(self, procedure: int, body: bytes) -> int:
        """Sends a call and does not wait."""
        self._xid = (self._xid + 1) & 0xFFFFFFFF
        self.socket.sendall(record(call(self._xid, procedure, body, self.credential)))
        return self._xid

    def collect(self, xid: int | None = None) -> tuple[int, bytes]:
        """The results of a call (of whichever is answered first), once they are there.

        Raises:
            RpcError: it was refused, or the connection ended.
        """
        while True:
            if self._early and (xid is None or xid in self._early):
                number = next(iter(self._early)) if xid is None else xid
                return number, _accepted(self._early.pop(number))
            self._receive()

    def call(self, procedure: int, body: bytes) -> bytes:
        return self.collect(self.submit(procedure, body))[1]

    def serve(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Answers calls of the back channel for a while; whether ``until`` became true."""
        deadline = time.monotonic() + seconds
        while not until():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if select.select([self.socket], [], [], left)[0]:
                self._receive()
        return True

    def _receive(self) -> None:
        message = self.receive()
        xid, kind = struct.unpack_from(">II", message)
        if kind == 1:
            self._early[xid] = message
        else:
            self.socket.sendall(record(u32(xid, 1, 0, 0, 0) + self._called(Unpacker(message))))

    def receive(self) -> bytes:
        """One whole message."""
        message = bytearray()
        last = False
        while not last:
            (mark,) = struct.unpack(">I", self._exactly(4))
            last, length = bool(mark >> 31), mark & 0x7FFFFFFF
            assert len(message) + length <= RECORD_BYTES_MAX, "a message of absurd size"
            message += self._exactly(length)
        return bytes(message)

    def _exactly(self, length: int) -> bytearray:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            try:
                count = self.socket.recv_into(view)
            except OSError as error:
                raise RpcError(f"the connection ended: {error}") from error
            if not count:
                raise RpcError("the connection ended")
            view = view[count:]
        return data

    def _called(self, take: Unpacker) -> bytes:
        take.fixed(20)
        procedure = take.u32()
        for _ in range(2):
            take.u32()
            take.opaque()
        if procedure == 0:
            return u32(0)
        tag = take.opaque()
        take.fixed(8)
        parts = []
        for _ in range(take.u32()):
            number = take.u32()
            if number == 11:
                session, sequence, slot, highest = take.fixed(16), take.u32(), take.u32(), take.u32()
                take.boolean()
                take.array(lambda: (take.fixed(16), take.array(lambda: take.fixed(8))))
                parts.append(u32(11, 0) + session + u32(sequence, slot, highest, highest))
            else:
                parts.append(u32(number) + self.callback(CB_OPS.get(number, "illegal"), take))
        return b"".join((u32(0, 0), opaque(tag), u32(len(parts)), *parts))

    def close(self) -> None:
        self.socket.close()


def _accepted(message: bytes) -> bytes:
    take = Unpacker(message)
    take.fixed(8)
    if take.u32():
        raise RpcError(f"the call was denied: {take.u32()} {take.u32()}")
    take.u32()
    take.opaque()
    if status := take.u32():
        raise RpcError(f"the call was not accepted: {status}")
    return message[take.at :]


# --- a client with a session

DELAY_SECONDS: Final = 0.05
DELAYS_MAX: Final = 400


class Client:
    """A client of one server: identity, session, slots, and the usual calls.

    Attributes:
        recalled: stateids of delegations whose return was asked for.
        events: every operation of the back channel: name and what it carried (RECALL: stateid; NOTIFY_LOCK: owner).
        auto_return: whether a recalled delegation is given back with the next request.
    """

    def __init__(
        self,
        address: tuple[str, int],
        *,
        minor: int = 1,
        owner: bytes | None = None,
        verifier: bytes | None = None,
        credential: bytes | None = None,
        fore: Channel | None = None,
        reclaim_complete: bool = True,
    ) -> None:
        self.address = address
        self.minor = minor
        self.owner = owner or b"test client " + os.urandom(8).hex().encode()
        self.verifier = verifier or os.urandom(8)
        self.recalled: list[Stateid] = []
        self.events: list[tuple[str, Any]] = []
        self.auto_return = True
        self.rpc = Rpc(address, credential)
        self.rpc.callback = self._callback
        self.identity = self.exchange_id()
        self.session = self.create_session(fore or Channel())
        self.sequences = [0] * min(self.session.fore.requests, 64)
        self._flying: dict[int, int] = {}
        self.flags = 0
        if reclaim_complete:
            self.compound(globals()["reclaim_complete"]())

    # --- the way of a session

    def bare(self, *operations: bytes) -> Answer:
        """A COMPOUND without a SEQUENCE."""
        return take_answer(self.rpc.call(1, compound_body(operations, self.minor)))

    def exchange_id(self, flags: int = 0) -> Identity:
        arguments = self.verifier + opaque(self.owner) + u32(flags, 0, 0)
        found: Identity = self.bare(op("exchange_id", arguments)).values()[0]
        return found

    def create_session(self, fore: Channel, *, sequence: int | None = None, flags: int = 2) -> SessionMade:
        """A session with a back channel on this connection."""
        number = self.identity.sequence if sequence is None else sequence
        security = u32(1, 1) + auth_sys()
        arguments = (
            u64(self.identity.client) + u32(number, flags) + fore.xdr()
            + Channel(0, 65536, 65536, 0, 16, 16).xdr() + u32(CALLBACK_PROGRAM) + security
        )  # fmt: skip
        found: SessionMade = self.bare(op("create_session", arguments)).values()[0]
        return found

    def reconnect(self) -> None:
        """A new connection for the same session, with its back channel."""
        callback, credential = self.rpc.callback, self.rpc.credential
        self.rpc.close()
        self._flying.clear()
        self.rpc = Rpc(self.address, credential)
        self.rpc.callback = callback
        self.bare(op("bind_conn_to_session", self.session.id, u32(3, 0))).values()

    def sequence(self, slot: int = 0, *, cache: bool = False, advance: bool = True) -> bytes:
        """The next SEQUENCE of a slot."""
        self.sequences[slot] += advance
        return op(
            "sequence", self.session.id, u32(self.sequences[slot], slot, len(self.sequences) - 1, cache)
        )

    def submit(self, *operations: bytes, slot: int = 0, cache: bool = False) -> None:
        """Sends a COMPOUND on a slot that must be free."""
        body = compound_body((self.sequence(slot, cache=cache), *operations), self.minor)
        self._flying[self.rpc.submit(1, body)] = slot

    def collect(self) -> tuple[int, Answer]:
        """The slot and answer of whichever COMPOUND is answered first."""
        xid, body = self.rpc.collect()
        slot = self._flying.pop(xid)
        return slot, self._seen(take_answer(body), slot)

    def attempt(self, *operations: bytes, slot: int = 0, cache: bool = False) -> Answer:
        """A COMPOUND after a SEQUENCE, as it ends; DELAY is not waited out."""
        body = compound_body((self.sequence(slot, cache=cache), *operations), self.minor)
        return self._seen(take_answer(self.rpc.call(1, body)), slot)

    def compound(self, *operations: bytes, slot: int = 0, cache: bool = False) -> list[Any]:
        """What the operations gave; DELAY and GRACE are waited out.

        Raises:
            NfsError: one failed.
        """
        for _ in range(DELAYS_MAX):
            answer = self.attempt(*operations, slot=slot, cache=cache)
            if answer.status not in {"DELAY", "GRACE"}:
                return answer.values()
            self._return_recalled()
            time.sleep(DELAY_SECONDS)
        raise RpcError(f"the server asked for patience {DELAYS_MAX} times")

    def _seen(self, answer: Answer, slot: int) -> Answer:
        if answer.results and isinstance(answer.results[0].value, Sequenced):
            self.flags = answer.results[0].value.flags
        else:
            self.sequences[slot] -= 1  # a slot does not move by what SEQUENCE refused (RFC 8881 §2.10.6.1)
        return answer

    def close(self) -> None:
        """Gives session and client id back, as unmounting does."""
        with contextlib.suppress(NfsError, RpcError, OSError):
            self.bare(op("destroy_session", self.session.id))
            self.bare(op("destroy_clientid", u64(self.identity.client)))
        self.rpc.close()

    def vanish(self) -> None:
        """Ends the connection and says nothing."""
        self.rpc.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the back channel

    def _callback(self, name: str, take: Unpacker) -> bytes:
        if name == "recall":
            stateid = _stateid(take)
            take.boolean()
            self.events.append((name, (stateid, take.opaque())))
            self.recalled.append(stateid)
        elif name == "notify_lock":
            handle = take.opaque()
            take.u64()
            self.events.append((name, (handle, take.opaque())))
        elif name == "offload":
            handle, stateid = take.opaque(), _stateid(take)
            status = take.u32()
            done = _write_response(take) if status == 0 else take.u64()
            self.events.append((name, (handle, stateid, status_name(status), done)))
        elif name == "recall_any":
            self.events.append((name, (take.u32(), take.bitmap())))
        elif name == "recall_slot":
            self.events.append((name, take.u32()))
        else:
            return u32(10004)
        return u32(0)

    def wait_for(self, event: str, seconds: float = 20.0) -> Any:
        """What an operation of the back channel carried, once it came.

        Raises:
            TimeoutError: it did not come.
        """
        if not self.rpc.serve(seconds, lambda: any(name == event for name, _ in self.events)):
            raise TimeoutError(f"no {event} within {seconds} s")
        return next(carried for name, carried in self.events if name == event)

    def _return_recalled(self) -> None:
        while self.auto_return and self.recalled:
            stateid = self.recalled.pop()
            for name, carried in self.events:
                if name == "recall" and carried[0] == stateid:
                    self.attempt(putfh(carried[1]), delegreturn(stateid))
                    break

    # --- files

    def walk(self, path: str) -> list[bytes]:
        """Operations that lead to a path from the root."""
        return [putrootfh(), *(lookup(each.encode()) for each in path.split("/") if each)]

    def handle(self, path: str) -> bytes:
        found: bytes = self.compound(*self.walk(path), getfh())[-1]
        return found

    def stat(self, path: str, *names: str) -> dict[str, Any]:
        wanted = names or ("type", "change", "size", "fileid", "mode", "nlink", "owner", "group", "mtime")
        found: dict[str, Any] = self.compound(*self.walk(path), getattr_(*wanted))[-1]
        return found

    def open(
        self,
        path: str,
        *,
        share: int = BOTH,
        deny: int = 0,
        how: bytes = u32(0),
        owner: bytes = b"owner",
        delegation: bool = False,
    ) -> File:
        """Opens a file by its path; no delegation is wanted unless asked for."""
        directory, _, name = path.rpartition("/")
        opening = open_(
            self.identity.client, owner, claim_null(name.encode()),
            share=share | (0 if delegation else WANT_NO_DELEGATION), deny=deny, how=how,
        )  # fmt: skip
        *_, opened, handle = self.compound(*self.walk(directory), opening, getfh())
        return File(self, handle, opened)

    def create(self, path: str, *, mode: int = 0o644, how: int = GUARDED, **options: Any) -> File:
        return self.open(path, how=created(how, mode=mode), **options)

    def listing(self, path: str, *names: str, count: int = 65536) -> Iterator[Entry]:
        """All entries of a directory."""
        handle = self.handle(path)
        cookie, verifier, eof = 0, bytes(8), False
        while not eof:
            found: Listing = self.compound(putfh(handle), readdir(cookie, verifier, *names, count=count))[-1]
            assert found.entries or found.eof, "a listing that neither goes on nor ends"
            yield from found.entries
            cookie = found.entries[-1].cookie if found.entries else cookie
            verifier, eof = found.verifier, found.eof

    def mkdir(self, path: str, mode: int = 0o755) -> None:
        directory, _, name = path.rpartition("/")
        self.compound(*self.walk(directory), create(DIR, name.encode(), mode=mode))

    def remove(self, path: str) -> None:
        directory, _, name = path.rpartition("/")
        self.compound(*self.walk(directory), remove(name.encode()))


@attrs.define
class File:
    """An open file."""

    client: Client
    handle: bytes
    opened: Opened
    stateid: Stateid = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.stateid = self.opened.stateid

    def do(self, *operations: bytes) -> Any:
        """What the last of some operations on the file gives."""
        return self.client.compound(putfh(self.handle), *operations)[-1]

    def read(self, offset: int, count: int) -> bytes:
        found: Read = self.do(read(self.stateid, offset, count))
        return found.data

    def write(self, offset: int, data: bytes, stable: int = FILE_SYNC) -> Written:
        found: Written = self.do(write(self.stateid, offset, data, stable))
        return found

    def commit(self) -> bytes:
        found: bytes = self.do(commit())
        return found

    def size(self) -> int:
        return int(self.do(getattr_("size"))["size"])

    def lock(
        self, kind: int, offset: int, length: int, owner: bytes = b"lock owner", *, reclaim: bool = False
    ) -> Stateid:
        found: Stateid = self.do(
            lock_first(
                kind, offset, length, self.stateid, self.client.identity.client, owner, reclaim=reclaim
            )
        )
        return found

    def close(self) -> None:
        self.do(close(self.stateid))
