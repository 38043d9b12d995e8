"""apply: ``(state, event) → state``: pure, total over the registry, the same on every replica.

No clock, no randomness, no I/O: position and time come with the event.  Nothing here refuses: an
event is a fact, and :mod:`space.statemachine.decide` already said yes.  The one error is
CorruptionError, when the log contradicts the state it produced.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs
import msgpack
from blake3 import blake3

from space._errors import CorruptionError
from space.events import types as ev
from space.events.codec import chain_link
from space.events.ids import ID_BYTES, NIL, CapsuleId
from space.statemachine import keys, replies, reservations, zones
from space.statemachine.tables import (
    COUNTER,
    ENTRY,
    HOME,
    KEY,
    MEMBER,
    NAMESPACE,
    NFS_CLIENT,
    ORPHAN,
    POLICY,
    POLICY_BY_HASH,
    RECLAIMED,
    REPLY,
    RESERVATION,
    SNAPSHOT,
    U32,
    U64,
    XATTR,
    CapsuleRow,
    EntryRow,
    Overlay,
    SnapshotRow,
)

RECLAIMED_RANGE: Final = struct.Struct("<QII")
_DIRECTORY: Final = int(ev.Kind.DIRECTORY)
REMOVED: Final = "removed"
"""The role of a node that has left, in :class:`space.events.types.MembershipChanged`."""


@attrs.define
class Context:
    """Where in the log an event stands: batch, number of the event in it, its command's time."""

    position: int
    event: int
    time_ns: int


@attrs.frozen
class Node:
    """One capsule of a tree that is being cloned."""

    capsule: bytes
    row: CapsuleRow
    entries: list[tuple[bytes, bytes]]  # name, capsule
    xattrs: list[tuple[bytes, bytes]]


Noted = ev.PolicyRefused | ev.ActionTaken | ev.RpoBroken | ev.RpoKept
Handler = Callable[[Overlay, Context, bytes, Any], None]


def apply(state: Overlay, context: Context, link: bytes, event: ev.Event) -> None:
    """Folds one event into the state.

    Raises:
        CorruptionError: the event contradicts the state.
    """
    HANDLERS[type(event)](state, context, link, event)


def _touch(state: Overlay, context: Context, link: bytes, capsule: bytes) -> CapsuleRow:
    row = state.edit(capsule)
    row.link = link
    row.change = context.position
    row.ctime = context.time_ns
    return row


def _modify(state: Overlay, context: Context, capsule: bytes) -> CapsuleRow:
    row = state.edit(capsule)
    row.change = context.position
    row.mtime = row.ctime = context.time_ns
    return row


def _new_row(kind: int, mode: int, uid: int, gid: int, ino: int, context: Context, link: bytes) -> CapsuleRow:
    now = context.time_ns
    return CapsuleRow(
        kind, 0, mode, 0, uid, gid, 0, 0, 0, 0, 0, ino, 0, NIL, now, now, now, now, context.position, link
    )


def _store_initialised(state: Overlay, context: Context, link: bytes, event: ev.StoreInitialised) -> None:
    row = _new_row(_DIRECTORY, event.mode, event.uid, event.gid, state.next(b"ino"), context, link)
    row.nlink = 2
    row.parent = event.capsule
    state.put_capsule(event.capsule, row)


def _created(state: Overlay, context: Context, link: bytes, event: ev.CapsuleCreated) -> None:
    now = context.time_ns
    row = CapsuleRow(
        event.kind,
        0,
        event.mode,
        0,
        event.uid,
        event.gid,
        event.rdev,
        event.block_size,
        event.policy,
        event.key,
        event.size,
        state.next(b"ino"),
        0,
        NIL,
        now,
        now,
        now,
        now,
        context.position,
        link,
        0,
        event.target,
    )
    state.put_capsule(event.capsule, row)


def _add_entry(state: Overlay, context: Context, parent: bytes, name: bytes, capsule: bytes) -> CapsuleRow:
    row = state.edit(capsule)
    directory = _modify(state, context, parent)
    directory.entries += 1
    state.put(ENTRY, parent + name, EntryRow(capsule, row.ino, row.kind).encode())
    row.parent = parent
    row.deleted = 0
    row.change = context.position
    row.ctime = context.time_ns
    if row.kind == _DIRECTORY:
        directory.nlink += 1
        row.nlink = 2
    else:
        row.nlink += 1
    return row


def _drop_entry(state: Overlay, context: Context, parent: bytes, name: bytes, capsule: bytes) -> CapsuleRow:
    """Takes a name away; a capsule without names becomes an orphan that undelete finds by its last name."""
    directory = _modify(state, context, parent)
    directory.entries -= 1
    state.delete(ENTRY, parent + name)
    row = state.edit(capsule)
    row.change = context.position
    row.ctime = context.time_ns
    if row.kind == _DIRECTORY:
        directory.nlink -= (
            directory.nlink > 0
        )  # one that is deleted counts none, and replicas lose names in it
        row.nlink = 0
    else:
        row.nlink -= 1
    if row.nlink == 0:
        row.deleted = context.position
        state.put(ORPHAN, parent + name + U64.pack(context.position), capsule)
    return row


def _linked(state: Overlay, context: Context, link: bytes, event: ev.NameLinked) -> None:
    _add_entry(state, context, event.parent, event.name, event.capsule).link = link


def _unlinked(state: Overlay, context: Context, link: bytes, event: ev.NameUnlinked) -> None:
    _drop_entry(state, context, event.parent, event.name, event.capsule).link = link


def _deleted(state: Overlay, context: Context, link: bytes, event: ev.CapsuleDeleted) -> None:
    _touch(state, context, link, event.capsule).deleted = context.position
    state.put(ORPHAN, NIL + event.capsule + U64.pack(context.position), event.capsule)


def _renamed(state: Overlay, context: Context, link: bytes, event: ev.CapsuleRenamed) -> None:
    if event.replaced:
        _drop_entry(state, context, event.new_parent, event.new_name, event.replaced)
    state.delete(ENTRY, event.parent + event.name)
    row = _touch(state, context, link, event.capsule)
    state.put(ENTRY, event.new_parent + event.new_name, EntryRow(event.capsule, row.ino, row.kind).encode())
    row.parent = event.new_parent
    old, new = _modify(state, context, event.parent), _modify(state, context, event.new_parent)
    old.entries -= 1
    new.entries += 1
    if row.kind == _DIRECTORY:
        old.nlink -= old.nlink > 0
        new.nlink += 1


def _exchanged(state: Overlay, context: Context, link: bytes, event: ev.NamesExchanged) -> None:
    one, other = state.edit(event.capsule), state.edit(event.other)
    here, there = _modify(state, context, event.parent), _modify(state, context, event.other_parent)
    state.put(ENTRY, event.parent + event.name, EntryRow(event.other, other.ino, other.kind).encode())
    state.put(
        ENTRY, event.other_parent + event.other_name, EntryRow(event.capsule, one.ino, one.kind).encode()
    )
    one.parent, other.parent = event.other_parent, event.parent
    moved = (one.kind == _DIRECTORY) - (other.kind == _DIRECTORY)
    here.nlink -= moved
    there.nlink += moved
    one.link = link
    for row in (one, other):
        row.change, row.ctime = context.position, context.time_ns


def _written(state: Overlay, context: Context, link: bytes, event: ev.ExtentWritten | ev.RangeCopied) -> None:
    row = state.edit(event.capsule)
    end = event.offset + event.length
    if end > row.size:  # noqa: PLR1730 - max() costs more, and replay comes here for every write
        row.size = end
    row.mtime = row.ctime = context.time_ns
    row.change = context.position
    row.link = link


def _deallocated(state: Overlay, context: Context, link: bytes, event: ev.RangeDeallocated) -> None:
    _modify(state, context, event.capsule).link = link


def _resized(state: Overlay, context: Context, link: bytes, event: ev.CapsuleResized) -> None:
    row = _modify(state, context, event.capsule)
    row.size = event.size
    row.link = link


def _attributes(state: Overlay, context: Context, link: bytes, event: ev.AttributesChanged) -> None:
    row = _touch(state, context, link, event.capsule)
    if event.mode is not None:
        row.mode = event.mode
    if event.uid is not None:
        row.uid = event.uid
    if event.gid is not None:
        row.gid = event.gid
    if event.atime is not None:
        row.atime = event.atime
    if event.mtime is not None:
        row.mtime = event.mtime


def _xattr_set(state: Overlay, context: Context, link: bytes, event: ev.XattrSet) -> None:
    _touch(state, context, link, event.capsule)
    state.put(XATTR, event.capsule + event.name, event.value)


def _xattr_removed(state: Overlay, context: Context, link: bytes, event: ev.XattrRemoved) -> None:
    _touch(state, context, link, event.capsule)
    state.delete(XATTR, event.capsule + event.name)


def policy_hash(document: bytes) -> bytes:
    """Key of a policy document in POLICY_BY_HASH."""
    return blake3(document).digest(16)


def _policy_defined(state: Overlay, context: Context, link: bytes, event: ev.PolicyDefined) -> None:
    _touch(state, context, link, event.capsule)
    state.next(b"policy")
    state.put(POLICY, U32.pack(event.policy), event.document)
    state.put(POLICY_BY_HASH, policy_hash(event.document), U32.pack(event.policy))


def _policy_changed(state: Overlay, context: Context, link: bytes, event: ev.PolicyChanged) -> None:
    _touch(state, context, link, event.capsule).policy = event.policy


def _key_created(state: Overlay, context: Context, link: bytes, event: ev.KeyCreated) -> None:
    row = _touch(state, context, link, event.capsule)
    row.key = event.key
    zones.key_created(state, row, event)
    state.put(KEY, U32.pack(event.key) + U32.pack(event.version), event.wrapped)


def _snapshot_taken(state: Overlay, context: Context, link: bytes, event: ev.SnapshotTaken) -> None:
    state.edit(event.capsule).link = link
    row = SnapshotRow(event.capsule, context.position, context.event, context.time_ns)
    state.put(SNAPSHOT, event.snapshot.encode(), row.encode())


def _snapshot_dropped(state: Overlay, context: Context, link: bytes, event: ev.SnapshotDropped) -> None:
    state.edit(event.capsule).link = link
    state.delete(SNAPSHOT, event.snapshot.encode())


def tree_nodes(state: Overlay, root: bytes) -> Iterator[Node]:
    """A capsule and, below a directory, everything in it; each capsule once, parents first."""
    queue, seen = [root], {root}
    for capsule in queue:
        row = state.capsule(capsule)
        if row is None:
            raise CorruptionError(f"the tree leads to a capsule that is not there: {capsule.hex()}")
        entries = []
        if row.kind == _DIRECTORY:
            for key, value in state.scan(ENTRY, capsule):
                child = EntryRow.decode(value).capsule
                entries.append((key[ID_BYTES:], child))
                if child not in seen:
                    seen.add(child)
                    queue.append(child)
        xattrs = [(key[ID_BYTES:], value) for key, value in state.scan(XATTR, capsule)]
        yield Node(capsule, row, entries, xattrs)


def manifest_nodes(manifest: bytes) -> Iterator[tuple[Node, list[Any]]]:
    """Nodes of a clone manifest, each with its extents ``[offset, length, skip, position, frames]``.

    Raises:
        CorruptionError: it is malformed.
    """
    try:
        for capsule, row, entries, xattrs, extents in msgpack.unpackb(manifest, use_list=True):
            yield (
                Node(
                    capsule, CapsuleRow.decode(row), [(n, c) for n, c in entries], [(n, v) for n, v in xattrs]
                ),
                extents,
            )
    except (ValueError, TypeError, struct.error, msgpack.UnpackException):
        raise CorruptionError("a clone manifest is malformed") from None


def clone_id(root: bytes, source: bytes, capsule: bytes) -> bytes:
    """Id of the copy of ``capsule`` in the clone ``root`` of ``source``."""
    return root if capsule == source else CapsuleId(root).derive(capsule)


def _cloned(state: Overlay, context: Context, link: bytes, event: ev.CapsuleCloned) -> None:
    if event.manifest:
        nodes = [node for node, _ in manifest_nodes(event.manifest)]
    else:
        nodes = list(tree_nodes(state, event.source))
    rows = {node.capsule: _clone_row(state, context, link, event, node) for node in nodes}
    for node in nodes:
        copy = clone_id(event.capsule, event.source, node.capsule)
        for name, value in node.xattrs:
            state.put(XATTR, copy + name, value)
        for name, child in node.entries:
            row = rows[child]
            target = clone_id(event.capsule, event.source, child)
            state.put(ENTRY, copy + name, EntryRow(target, row.ino, row.kind).encode())
            row.parent = copy
            if row.kind != _DIRECTORY:
                row.nlink += 1
    for node in nodes:
        if node.row.kind == _DIRECTORY:
            rows[node.capsule].nlink = 2 + sum(rows[child].kind == _DIRECTORY for _, child in node.entries)
    root = rows[event.source]
    nlink = root.nlink
    _add_entry(state, context, event.parent, event.name, event.capsule).link = link
    if root.kind == _DIRECTORY:
        state.edit(event.capsule).nlink = nlink


def _clone_row(
    state: Overlay, context: Context, link: bytes, event: ev.CapsuleCloned, node: Node
) -> CapsuleRow:
    row = node.row.copy()
    row.ino = state.next(b"ino")
    row.nlink = row.deleted = row.flags = 0
    row.entries = len(node.entries)
    row.ctime = row.btime = context.time_ns
    row.change = context.position
    row.link = link if node.capsule == event.source else chain_link(link, node.capsule)
    state.put_capsule(clone_id(event.capsule, event.source, node.capsule), row)
    return row


def _undeleted(state: Overlay, context: Context, link: bytes, event: ev.CapsuleUndeleted) -> None:
    row = state.edit(event.capsule)
    subdirectories = 0
    if row.kind == _DIRECTORY:
        subdirectories = sum(
            EntryRow.decode(value).kind == _DIRECTORY for _, value in state.scan(ENTRY, event.capsule)
        )
    for key, value in list(state.scan(ORPHAN, b"")):
        if value == event.capsule:
            state.delete(ORPHAN, key)
    row = _add_entry(state, context, event.parent, event.name, event.capsule)
    row.link = link
    if row.kind == _DIRECTORY:
        row.nlink += subdirectories


def _reclaimed(state: Overlay, context: Context, link: bytes, event: ev.PayloadReclaimed) -> None:
    state.edit(event.capsule).link = link
    for position, offset, length in RECLAIMED_RANGE.iter_unpack(event.ranges):
        state.put(RECLAIMED, U64.pack(position) + U32.pack(offset), U32.pack(length))


def _purged(state: Overlay, context: Context, link: bytes, event: ev.CapsulesPurged) -> None:
    state.edit(event.capsule).link = link
    gone = {event.purged[at : at + ID_BYTES] for at in range(0, len(event.purged), ID_BYTES)}
    for capsule in sorted(gone):
        for key, value in list(state.scan(ENTRY, capsule)):
            state.delete(ENTRY, key)
            _lose_name(state, context, EntryRow.decode(value).capsule)
        for key, _ in list(state.scan(XATTR, capsule)):
            state.delete(XATTR, key)
        state.delete_capsule(capsule)
        state.delete(RESERVATION, capsule)
        state.delete(HOME, capsule)
    for key, value in list(state.scan(ORPHAN, b"")):
        if value in gone:
            state.delete(ORPHAN, key)


def _replies_forgotten(state: Overlay, context: Context, link: bytes, event: ev.RepliesForgotten) -> None:
    state.edit(event.capsule).link = link
    for at in range(0, len(event.clients), ID_BYTES):
        for key, _ in list(state.scan(REPLY, event.clients[at : at + ID_BYTES])):
            state.delete(REPLY, key)


def _refused(state: Overlay, context: Context, link: bytes, event: ev.CommandRefused) -> None:
    replies.keep(state, event.client, event.sequence, context.position, (event.status, event.message))


def _lose_name(state: Overlay, context: Context, capsule: bytes) -> None:
    """A directory that led to ``capsule`` is purged; without any name left it is an orphan itself."""
    row = state.capsule(capsule)
    if row is None or row.kind == _DIRECTORY:
        return
    row = state.edit(capsule)
    row.nlink -= 1
    if row.nlink == 0 and not row.deleted:
        row.deleted = context.position
        state.put(ORPHAN, NIL + capsule + U64.pack(context.position), capsule)


def _membership(state: Overlay, context: Context, link: bytes, event: ev.MembershipChanged) -> None:
    for node, role, address in msgpack.unpackb(event.members):
        if role == REMOVED:
            state.delete(MEMBER, U64.pack(node))
        else:
            known = state.get(MEMBER, U64.pack(node))
            where = address or (msgpack.unpackb(known)[1] if known else "")
            state.put(MEMBER, U64.pack(node), msgpack.packb([role, where]))


def namespace_key(subsystem: str, namespace: bytes) -> bytes:
    """Key of a namespace's number in NAMESPACE; its first 16 bytes are the subsystem's."""
    return blake3(subsystem.encode()).digest(16) + namespace


def namespace_counter(subsystem: str) -> bytes:
    """Name of the counter of a subsystem's numbers: none is given twice."""
    return b"nsid" + namespace_key(subsystem, b"")


def _namespace_assigned(state: Overlay, context: Context, link: bytes, event: ev.NamespaceAssigned) -> None:
    state.edit(event.capsule).link = link
    state.put(NAMESPACE, namespace_key(event.subsystem, event.namespace), U32.pack(event.nsid))
    state.put(COUNTER, namespace_counter(event.subsystem), U64.pack(event.nsid))


def _reservation(state: Overlay, context: Context, link: bytes, event: reservations.Changed) -> None:
    """Nothing of the capsule itself changed: only its chain grows."""
    state.edit(event.capsule).link = link
    before = reservations.State.decode(state.get(RESERVATION, event.capsule))
    state.put(RESERVATION, event.capsule, reservations.fold(before, event, context.position).encode())


def nfs_server_key(server: str) -> bytes:
    """What the keys of an NFS server's clients in NFS_CLIENT begin with."""
    return blake3(server.encode()).digest(16)


def nfs_client_key(server: str, owner: bytes) -> bytes:
    """Key of a client of an NFS server in NFS_CLIENT."""
    return nfs_server_key(server) + blake3(owner).digest(16)


def nfs_epoch_counter(server: str) -> bytes:
    """Name of the counter of an NFS server's starts."""
    return b"nfs" + nfs_server_key(server)


def _nfs_client_recorded(state: Overlay, context: Context, link: bytes, event: ev.NfsClientRecorded) -> None:
    state.edit(event.capsule).link = link
    state.put(NFS_CLIENT, nfs_client_key(event.server, event.owner), event.verifier + event.owner)


def _nfs_client_forgotten(
    state: Overlay, context: Context, link: bytes, event: ev.NfsClientForgotten
) -> None:
    state.edit(event.capsule).link = link
    state.delete(NFS_CLIENT, nfs_client_key(event.server, event.owner))


def _nfs_server_started(state: Overlay, context: Context, link: bytes, event: ev.NfsServerStarted) -> None:
    state.edit(event.capsule).link = link
    state.put(COUNTER, nfs_epoch_counter(event.server), U64.pack(event.epoch))


def _noted(state: Overlay, context: Context, link: bytes, event: Noted) -> None:
    """Nothing changed: the log says that it happened."""
    state.edit(event.capsule).link = link


HANDLERS: Final[dict[type[Any], Handler]] = {
    ev.StoreInitialised: _store_initialised,
    ev.CapsuleCreated: _created,
    ev.NameLinked: _linked,
    ev.NameUnlinked: _unlinked,
    ev.CapsuleRenamed: _renamed,
    ev.NamesExchanged: _exchanged,
    ev.ExtentWritten: _written,
    ev.RangeDeallocated: _deallocated,
    ev.CapsuleResized: _resized,
    ev.AttributesChanged: _attributes,
    ev.XattrSet: _xattr_set,
    ev.XattrRemoved: _xattr_removed,
    ev.PolicyDefined: _policy_defined,
    ev.PolicyChanged: _policy_changed,
    ev.KeyCreated: _key_created,
    ev.SnapshotTaken: _snapshot_taken,
    ev.SnapshotDropped: _snapshot_dropped,
    ev.CapsuleCloned: _cloned,
    ev.CapsuleUndeleted: _undeleted,
    ev.PayloadReclaimed: _reclaimed,
    ev.CapsulesPurged: _purged,
    ev.CapsuleDeleted: _deleted,
    ev.MembershipChanged: _membership,
    ev.RepliesForgotten: _replies_forgotten,
    ev.CommandRefused: _refused,
    ev.RangeCopied: _written,
    ev.NamespaceAssigned: _namespace_assigned,
    ev.RegistrantsChanged: _reservation,
    ev.ReservationChanged: _reservation,
    ev.NfsClientRecorded: _nfs_client_recorded,
    ev.NfsClientForgotten: _nfs_client_forgotten,
    ev.NfsServerStarted: _nfs_server_started,
    ev.KeysRewrapped: keys.rewrapped,
    ev.MasterKeyChanged: keys.master_changed,
    ev.KeyDestroyed: keys.destroyed,
    ev.ZoneDefined: zones.defined,
    ev.ZoneAdded: zones.defined,
    ev.ZoneChanged: zones.changed,
    ev.ZoneRemoved: zones.removed,
    ev.ShipmentReceived: zones.received,
    ev.CapsuleHomed: zones.homed,
    ev.CapsuleWithdrawn: zones.withdrawn,
    ev.ShipmentSent: zones.sent,
    ev.PolicyRefused: _noted,
    ev.RpoBroken: _noted,
    ev.RpoKept: _noted,
    ev.ZonePromoted: zones.promoted,
    ev.HomeLost: zones.lost,
    ev.ActionTaken: _noted,
    ev.HomeGiven: zones.given,
    ev.HomeTaken: zones.taken,
    ev.HomesDeclined: zones.declined,
    ev.HeirFollowed: zones.followed,
}
