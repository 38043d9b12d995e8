"""Who may do what: POSIX permissions of the caller after squash, and the rules of an export.

The file model does not look at permissions, so every operation asks here first.  What NFS adds to POSIX is that a
client checks at open time and then reads and writes with nothing but a stateid, perhaps after the mode was changed:
``owner=True`` lets a file's owner read and write whatever its mode says, as POSIX lets the holder of a descriptor.
"""

from __future__ import annotations

import functools
import re
import stat as modes
from typing import TYPE_CHECKING, Final

import attrs

from space.events.fast import fast_frozen
from space.events.types import Kind
from space.projections.nfs.compound import Compound, NfsError
from space.projections.nfs.exports import Export, Squash
from space.projections.nfs.nfs4 import NfsStatus
from space.projections.vfs import NOW, AttributeChange, Attributes, Caller

if TYPE_CHECKING:
    from space.projections.nfs.exports import Node
    from space.projections.nfs.rpc import Credentials

READ: Final = 4
WRITE: Final = 2
EXECUTE: Final = 1
"""Of a directory: to look names up in it."""

NOBODY: Final = 65_534
MACHINE_CHARACTERS_MAX: Final = 64
_UNUSUAL: Final = re.compile(r"[^A-Za-z0-9._-]")


@fast_frozen
class Identity:
    """The caller as permissions see it."""

    uid: int
    groups: frozenset[int]
    caller: Caller


def identity(ctx: Compound, export: Export) -> Identity:
    """Who calls, as the export counts it."""
    return _identity(ctx.credentials, export.squash, ctx.connection.host)


@functools.lru_cache(maxsize=1024)
def _identity(credentials: Credentials, squash: Squash, address: str) -> Identity:
    uid, gid, groups = credentials.uid, credentials.gid, frozenset(credentials.gids)
    if squash is Squash.ALL:
        uid, gid, groups = NOBODY, NOBODY, frozenset()
    elif squash is Squash.ROOT:
        if uid == 0:
            uid, gid, groups = NOBODY, NOBODY, frozenset()
        gid = gid or NOBODY
        groups = frozenset(each or NOBODY for each in groups)
    name = _UNUSUAL.sub("", credentials.machine)[:MACHINE_CHARACTERS_MAX] or address
    return Identity(uid, groups | {gid}, Caller(uid, gid, f"nfs:{name}"))


def caller(ctx: Compound) -> Caller:
    """The caller as the file model and the log want to know it; the current filehandle says of which export."""
    return identity(ctx, ctx.node().export).caller


def admit(ctx: Compound, node: Node) -> Node:
    """The node, if the client may use its export.

    Raises:
        NfsError: ACCESS: it may not.
    """
    if node.export.rule(ctx.connection.host) is None:
        raise NfsError(NfsStatus.ACCESS)
    return node


def read_only(ctx: Compound, export: Export) -> bool:
    """Whether this client cannot change anything there."""
    rule = export.rule(ctx.connection.host)
    return export.read_only or export.files.read_only or rule is None or rule.read_only


def writable(ctx: Compound, node: Node) -> Node:
    """The node, if the client may change things in its export.

    Raises:
        NfsError: ROFS: it may not.
    """
    if read_only(ctx, node.export):
        raise NfsError(NfsStatus.ROFS)
    return node


def granted(who: Identity, found: Attributes) -> int:
    """What the mode lets the caller do: READ, WRITE, EXECUTE.

    The superuser may do anything but execute what nobody may.
    """
    mode = found.mode
    if who.uid == 0:
        return 7 if found.kind == Kind.DIRECTORY or mode & 0o111 else READ | WRITE
    if who.uid == found.uid:
        return mode >> 6 & 7
    if found.gid in who.groups:
        return mode >> 3 & 7
    return mode & 7


def require(ctx: Compound, found: Attributes, bits: int, *, owner: bool = False) -> None:
    """The caller has these permissions; with ``owner``, the owner has them anyway.

    Raises:
        NfsError: ACCESS: it has not.
    """
    who = identity(ctx, ctx.node().export)
    if granted(who, found) & bits != bits and not (owner and who.uid == found.uid):
        raise NfsError(NfsStatus.ACCESS)


def require_readable(ctx: Compound, node: Node, found: Attributes) -> None:
    """The caller may read a file's bytes: also who may only execute them, for the client reads to execute.

    Raises:
        NfsError: ACCESS: it may not.
    """
    who = identity(ctx, node.export)
    if not granted(who, found) & (READ | EXECUTE) and who.uid != found.uid:
        raise NfsError(NfsStatus.ACCESS)


def require_removable(ctx: Compound, directory: Attributes, victim: Attributes) -> None:
    """The caller may take the victim's name out of the directory: one with the sticky bit lets only owners.

    Raises:
        NfsError: ACCESS: the directory cannot be written; PERM: it is sticky.
    """
    require(ctx, directory, WRITE | EXECUTE)
    who = identity(ctx, ctx.node().export)
    if directory.mode & modes.S_ISVTX and who.uid not in (0, directory.uid, victim.uid):
        raise NfsError(NfsStatus.PERM)


def permitted_change(ctx: Compound, found: Attributes, change: AttributeChange) -> AttributeChange:
    """The change as far as POSIX has it: set-group-id is lost where the caller is not of the group.

    Whether the size may be set depends on how the file was opened, and is not asked here.

    Raises:
        NfsError: PERM: only the owner, or only the superuser, may do that; ACCESS: the mode forbids it.
    """
    who = identity(ctx, ctx.node().export)
    if who.uid == 0:
        return change
    is_owner = who.uid == found.uid
    _check_owner(who, found, change, is_owner=is_owner)
    _check_times(who, found, change, is_owner=is_owner)
    group = found.gid if change.gid is None else change.gid
    if change.mode is not None and found.kind != Kind.DIRECTORY and group not in who.groups:
        return attrs.evolve(change, mode=change.mode & ~modes.S_ISGID)
    return change


def _check_owner(who: Identity, found: Attributes, change: AttributeChange, *, is_owner: bool) -> None:
    if change.mode is not None and not is_owner:
        raise NfsError(NfsStatus.PERM)
    if change.uid is not None and not (is_owner and change.uid == found.uid):
        raise NfsError(NfsStatus.PERM)
    if change.gid is not None and not (is_owner and (change.gid == found.gid or change.gid in who.groups)):
        raise NfsError(NfsStatus.PERM)


def _check_times(who: Identity, found: Attributes, change: AttributeChange, *, is_owner: bool) -> None:
    times = {change.atime, change.mtime} - {None}
    if not times or is_owner:
        return
    if times != {NOW}:
        raise NfsError(NfsStatus.PERM)
    if not granted(who, found) & WRITE:
        raise NfsError(NfsStatus.ACCESS)
