"""Access control lists that say what a mode says (RFC 8881 §6.3, §6.4).

The tree holds modes.  A list can be read of every node, and set where some mode means exactly the same: for the owner,
for the group and for everybody else, whether the owner is of the group or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs

from space.projections.nfs.xdr import Reader, Writer

ALLOW: Final = 0
DENY: Final = 1
SUPPORT: Final = 3
"""aclsupport: entries that allow, and that deny."""

_GROUP_FLAG: Final = 0x40  # ACE4_IDENTIFIER_GROUP
_READ_DATA, _WRITE_DATA, _APPEND_DATA, _READ_NAMED, _WRITE_NAMED, _EXECUTE, _DELETE_CHILD = (
    *(0x1, 0x2, 0x4, 0x8),
    *(0x10, 0x20, 0x40),
)
_READ_ATTRIBUTES, _WRITE_ATTRIBUTES, _READ_ACL, _WRITE_ACL, _SYNCHRONIZE = (
    0x80,
    0x100,
    0x20000,
    0x40000,
    0x100000,
)
_ANYBODY: Final = _READ_ATTRIBUTES | _READ_ACL | _SYNCHRONIZE
_OWNER: Final = _WRITE_ATTRIBUTES | _WRITE_ACL
_NAMED: Final = _READ_NAMED | _WRITE_NAMED
_WRITE: Final = _WRITE_DATA | _APPEND_DATA
_DATA: Final = _READ_DATA | _WRITE | _EXECUTE

ENTRIES_MAX: Final = 256
WHO_BYTES_MAX: Final = 1024


@attrs.frozen
class Ace:
    """nfsace4."""

    type: int
    flag: int
    mask: int
    who: bytes


def _mask(bits: int, *, directory: bool) -> int:
    """What ``rwx`` lets one do."""
    write = _WRITE | _DELETE_CHILD if directory else _WRITE
    return (_READ_DATA if bits & 4 else 0) | (write if bits & 2 else 0) | (_EXECUTE if bits & 1 else 0)


def of_mode(mode: int, *, directory: bool) -> list[Ace]:
    """The list that means the same as a mode; what a later entry would allow too much is denied before."""
    owner, group, other = mode >> 6 & 7, mode >> 3 & 7, mode & 7
    steps = (
        (ALLOW, b"OWNER@", _mask(owner, directory=directory) | _OWNER | _ANYBODY),
        (DENY, b"OWNER@", _mask((group | other) & ~owner, directory=directory)),
        (ALLOW, b"GROUP@", _mask(group, directory=directory) | _ANYBODY),
        (DENY, b"GROUP@", _mask(other & ~group, directory=directory)),
        (ALLOW, b"EVERYONE@", _mask(other, directory=directory) | _ANYBODY),
    )
    return [Ace(kind, _GROUP_FLAG if who == b"GROUP@" else 0, mask, who) for kind, who, mask in steps if mask]


def encode(entries: Sequence[Ace]) -> bytes:
    """The list as fattr4_acl."""
    out = Writer()
    out.u32(len(entries))
    for each in entries:
        out.u32(each.type)
        out.u32(each.flag)
        out.u32(each.mask)
        out.opaque(each.who)
    return out.bytes()


def decode(args: Reader) -> list[Ace]:
    """A list off a request."""
    return [
        Ace(args.u32(), args.u32(), args.u32(), args.opaque(WHO_BYTES_MAX))
        for _ in range(args.count(ENTRIES_MAX))
    ]


def to_mode(entries: Sequence[Ace]) -> int | None:
    """The nine permission bits that mean the same as a list, or None: no mode does."""
    if not all(map(_usual, entries)):
        return None
    owner = _class(entries, {b"OWNER@", b"EVERYONE@"})
    if owner != _class(entries, {b"OWNER@", b"GROUP@", b"EVERYONE@"}):
        return None  # an owner who is of the group would have other permissions than one who is not
    group, other = _class(entries, {b"GROUP@", b"EVERYONE@"}), _class(entries, {b"EVERYONE@"})
    if owner is None or group is None or other is None:
        return None
    return owner << 6 | group << 3 | other


def _usual(entry: Ace) -> bool:
    """Whether an entry is about what a mode is about, and nothing else."""
    if entry.type not in (ALLOW, DENY) or entry.flag & ~_GROUP_FLAG:
        return False
    if entry.who not in (b"OWNER@", b"GROUP@", b"EVERYONE@"):
        return False
    more = entry.mask & ~(_DATA | _DELETE_CHILD | _NAMED)
    if entry.type == DENY:
        return not more & (_ANYBODY | (_OWNER if entry.who == b"OWNER@" else 0))
    return not more & ~(_ANYBODY | (_OWNER if entry.who == b"OWNER@" else 0))


def _class(entries: Sequence[Ace], who: set[bytes]) -> int | None:
    """Read, write and execute as somebody to whom these entries apply has them; None if write is had in part."""
    allowed = decided = 0
    for entry in entries:
        if entry.who in who:
            if entry.type == ALLOW:
                allowed |= entry.mask & ~decided
            decided |= entry.mask
    write = allowed & _WRITE
    if write not in (0, _WRITE):
        return None
    return (4 if allowed & _READ_DATA else 0) | (2 if write else 0) | (1 if allowed & _EXECUTE else 0)
