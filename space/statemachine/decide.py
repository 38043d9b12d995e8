"""decide: ``(state, command) → events | Rejected``: every rule a mutation must obey, in one place.

Pure and deterministic.  Permission bits are not checked here: views check them where the protocol
does (the kernel for FUSE, the server for NFS), because only they know the caller's credentials.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

import attrs

from space._errors import SpaceError, Status
from space.events import commands as cmd
from space.events import types as ev
from space.events.ids import ID_BYTES, NIL, ROOT
from space.events.registry import (
    DOCUMENT_BYTES_MAX,
    MANIFEST_BYTES_MAX,
    NAME_BYTES_MAX,
    PATH_BYTES_MAX,
    U32_MAX,
    U63_MAX,
    XATTR_BYTES_MAX,
)
from space.statemachine import handover, homes, keys, reservations, shipments
from space.statemachine.apply import (
    RECLAIMED_RANGE,
    Context,
    apply,
    manifest_nodes,
    namespace_counter,
    namespace_key,
    nfs_client_key,
    nfs_epoch_counter,
    policy_hash,
    tree_nodes,
)
from space.statemachine.decision import Decision, PayloadPlacer, Rejected, Rule, capsule_text, inside
from space.statemachine.tables import (
    COUNTER,
    ENTRY,
    KEY,
    NAMESPACE,
    NFS_CLIENT,
    POLICY_BY_HASH,
    RECLAIMED,
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

LINKS_MAX: Final = 65_000
SIZE_MAX: Final = U63_MAX
TOGETHER_MAX: Final = 1024
"""Commands in one: a snapshot of a group of volumes is two for each of them, and the whole has to fit into a batch."""

NSID_MAX: Final = U32_MAX - 1
"""0xffffffff stands for all namespaces (NVM Express Base 2.0 §3.2.1.2)."""
_DIRECTORY: Final = ev.Kind.DIRECTORY
_FRAME_PLACE: Final = struct.Struct("<IQ")  # payload_offset, source_position inside a frame record
_FRAME_PLACE_AT: Final = 20
_FRAME_LENGTHS: Final = struct.Struct("<II")  # plain_length, stored_length at its start
_FRAME_BYTES: Final = 48


def decide(state: Overlay, command: cmd.Command, payload: PayloadPlacer) -> Decision:
    """The events that carry out ``command``, or why not.

    Stored frames of a write are placed into ``payload``; on rejection the caller rewinds it.
    """
    return homes.elsewhere(state, command) or _RULES[type(command)](state, command, payload)


def check_name(name: bytes) -> Rejected | None:
    """Why ``name`` cannot be a directory entry, or None.  Names are UTF-8 (RFC 8881 §14), 1 to 255 bytes."""
    if len(name) > NAME_BYTES_MAX:
        return Rejected(Status.NAME_TOO_LONG, f"name of {len(name)} bytes; the limit is {NAME_BYTES_MAX}")
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        return Rejected(Status.BAD_NAME, f"not a usable name: {_shown(name)}")
    try:
        name.decode()
    except UnicodeDecodeError:
        return Rejected(Status.BAD_NAME, f"name is not UTF-8: {_shown(name)}")
    return None


def _missing(capsule: bytes) -> Rejected:
    return Rejected(Status.NOT_FOUND, f"no capsule {capsule_text(capsule)}")


def _shown(name: bytes) -> str:
    return repr(name.decode(errors="backslashreplace"))


def _live(state: Overlay, capsule: bytes) -> CapsuleRow | Rejected:
    """The row of a capsule that can be changed; an unlinked file still held open can."""
    row = state.capsule(capsule)
    return _missing(capsule) if row is None else row


def _directory(state: Overlay, capsule: bytes) -> CapsuleRow | Rejected:
    row = state.capsule(capsule)
    if row is None or row.deleted:
        return _missing(capsule)
    if row.kind != _DIRECTORY:
        return Rejected(Status.NOT_DIRECTORY, f"not a directory: {capsule_text(capsule)}")
    return row


def _content(state: Overlay, capsule: bytes) -> CapsuleRow | Rejected:
    row = state.capsule(capsule)
    if row is None:
        return _missing(capsule)
    if row.kind == _DIRECTORY:
        return Rejected(Status.IS_DIRECTORY, f"a directory holds no bytes: {capsule_text(capsule)}")
    if row.kind != ev.Kind.FILE:
        return Rejected(Status.INVALID, f"not a file: {capsule_text(capsule)}")
    return row


def _entry(state: Overlay, parent: bytes, name: bytes) -> EntryRow | None:
    data = state.get(ENTRY, parent + name)
    return None if data is None else EntryRow.decode(data)


def _free_name(state: Overlay, parent: bytes, name: bytes) -> Rejected | None:
    if refused := check_name(name):
        return refused
    directory = _directory(state, parent)
    if isinstance(directory, Rejected):
        return directory
    if state.get(ENTRY, parent + name) is not None:
        return Rejected(Status.EXISTS, f"exists already: {_shown(name)}")
    return None


def _initialise(state: Overlay, command: cmd.InitialiseStore, payload: PayloadPlacer) -> Decision:
    if state.capsule(ROOT) is not None:
        return Rejected(Status.EXISTS, "the store is initialised already")
    return [ev.StoreInitialised(bytes(ROOT), command.store, command.mode, command.uid, command.gid)]


def _policy_number(state: Overlay, document: bytes) -> tuple[int, bool]:
    """Row number of a policy document, and whether it still has to be defined."""
    if not document:
        return 0, False
    known = state.get(POLICY_BY_HASH, policy_hash(document))
    if known is not None:
        return U32.unpack(known)[0], False
    counter = state.get(COUNTER, b"policy")
    return (0 if counter is None else U64.unpack(counter)[0]) + 1, True


def _create(state: Overlay, command: cmd.CreateCapsule, payload: PayloadPlacer) -> Decision:
    capsule = command.capsule
    if len(capsule) != ID_BYTES or capsule == NIL:
        return Rejected(Status.INVALID, "not a usable capsule id")
    if state.capsule(capsule) is not None:
        return Rejected(Status.EXISTS, f"capsule {capsule_text(capsule)} exists already")
    if bool(command.parent) != bool(command.name):
        return Rejected(Status.INVALID, "a parent needs a name, and a name a parent")
    if command.kind == _DIRECTORY and not command.parent:
        return Rejected(Status.INVALID, "a directory needs a name")
    if command.parent and (refused := _free_name(state, command.parent, command.name)):
        return refused
    if not 0 <= command.size <= SIZE_MAX or command.block_size not in (0, 512, 4096):
        return Rejected(
            Status.TOO_LARGE, f"not a usable size: {command.size}, block size {command.block_size}"
        )
    if command.block_size and command.size % command.block_size:
        return Rejected(
            Status.INVALID, f"a size of {command.size} is not whole blocks of {command.block_size}"
        )
    if (command.kind == ev.Kind.SYMLINK) != bool(command.target) or len(command.target) > PATH_BYTES_MAX:
        return Rejected(
            Status.NAME_TOO_LONG if command.target else Status.INVALID, "not a usable link target"
        )
    if command.policy is not None and len(command.policy) > DOCUMENT_BYTES_MAX:
        return Rejected(Status.TOO_LARGE, "policy document too large")
    if refused := _key_taken(state, command.key):
        return refused
    policy, undefined = _created_policy(state, command)
    created = ev.CapsuleCreated(
        bytes(capsule),
        int(command.kind),
        command.mode & 0o7777,
        command.uid,
        command.gid,
        command.rdev,
        command.size,
        command.block_size,
        policy,
        command.key.key if command.key else 0,
        command.target,
    )
    events: list[ev.Event] = [created]
    if undefined and command.policy is not None:
        events.append(ev.PolicyDefined(capsule, policy, command.policy))
    if command.key:
        events.append(_key_event(capsule, command.key))
    if command.parent:
        events.append(ev.NameLinked(capsule, command.parent, command.name))
    return events


def _created_policy(state: Overlay, command: cmd.CreateCapsule) -> tuple[int, bool]:
    if command.policy is not None:
        return _policy_number(state, command.policy)
    parent = state.capsule(command.parent) if command.parent else None
    return (parent.policy if parent else 0), False


def _key_taken(state: Overlay, key: cmd.NewKey | None) -> Rejected | None:
    if key is not None and not (0 < key.key <= U32_MAX and 0 < key.version <= U32_MAX):
        return Rejected(Status.INVALID, f"not a key: {key.key}, version {key.version}")
    if key is not None and state.get(KEY, U32.pack(key.key) + U32.pack(key.version)) is not None:
        return Rejected(Status.STALE, f"key {key.key} exists already: draw another")
    if key is not None and keys.outdated(state, key.wrapped):
        return Rejected(Status.STALE, "the master key was changed meanwhile: try again")
    return None


def _key_event(capsule: bytes, key: cmd.NewKey) -> ev.KeyCreated:
    return ev.KeyCreated(capsule, key.key, key.version, key.wrapped)


def _link(state: Overlay, command: cmd.Link, payload: PayloadPlacer) -> Decision:
    row = _live(state, command.capsule)
    if isinstance(row, Rejected):
        return row
    if row.kind == _DIRECTORY:
        return Rejected(Status.NOT_PERMITTED, "a directory has one name only")
    if row.deleted:
        return Rejected(Status.NOT_FOUND, f"capsule {capsule_text(command.capsule)} is deleted: undelete it")
    if row.nlink >= LINKS_MAX:
        return Rejected(Status.TOO_MANY_LINKS, f"a capsule has at most {LINKS_MAX} names")
    refused = _free_name(state, command.parent, command.name)
    return refused or [ev.NameLinked(command.capsule, command.parent, command.name)]


def _removable(
    state: Overlay, parent: bytes, name: bytes, directory: bool | None, recursive: bool
) -> EntryRow | Rejected:
    row = _directory(state, parent)
    if isinstance(row, Rejected):
        return row
    if len(name) > NAME_BYTES_MAX:
        return Rejected(Status.NAME_TOO_LONG, f"name of {len(name)} bytes; the limit is {NAME_BYTES_MAX}")
    entry = _entry(state, parent, name)
    if entry is None:
        return Rejected(Status.NOT_FOUND, f"no entry {_shown(name)}")
    is_directory = entry.kind == _DIRECTORY
    if directory is True and not is_directory:
        return Rejected(Status.NOT_DIRECTORY, f"not a directory: {_shown(name)}")
    if directory is False and is_directory:
        return Rejected(Status.IS_DIRECTORY, f"is a directory: {_shown(name)}")
    if is_directory and not recursive and _entries(state, entry.capsule):
        return Rejected(Status.NOT_EMPTY, f"directory not empty: {_shown(name)}")
    return entry


def _entries(state: Overlay, capsule: bytes) -> int:
    row = state.capsule(capsule)
    return row.entries if row else 0


def _unlink(state: Overlay, command: cmd.Unlink, payload: PayloadPlacer) -> Decision:
    entry = _removable(state, command.parent, command.name, command.directory, command.recursive)
    if isinstance(entry, Rejected):
        return entry
    return [ev.NameUnlinked(entry.capsule, command.parent, command.name)]


def _delete(state: Overlay, command: cmd.DeleteCapsule, payload: PayloadPlacer) -> Decision:
    row = _live(state, command.capsule)
    if isinstance(row, Rejected):
        return row
    if row.deleted:
        return Rejected(Status.NOT_FOUND, f"capsule {capsule_text(command.capsule)} is deleted already")
    if row.nlink:
        return Rejected(Status.STALE, f"capsule {capsule_text(command.capsule)} has a name: remove that")
    return [ev.CapsuleDeleted(command.capsule)]


def _rename(state: Overlay, command: cmd.Rename, payload: PayloadPlacer) -> Decision:
    for parent in (command.parent, command.new_parent):
        row = _directory(state, parent)
        if isinstance(row, Rejected):
            return row
    if refused := check_name(command.new_name):
        return refused
    entry = _entry(state, command.parent, command.name)
    if entry is None:
        return Rejected(Status.NOT_FOUND, f"no entry {_shown(command.name)}")
    there = _entry(state, command.new_parent, command.new_name)
    moved = command.parent != command.new_parent
    if moved and entry.kind == _DIRECTORY and inside(state, command.new_parent, entry.capsule):
        return Rejected(Status.INVALID, "a directory cannot move into itself")
    if command.exchange:
        return _exchange(state, command, entry, there, moved)
    if there is None:
        return [_renamed(command, entry, b"")]
    if not command.replace:
        return Rejected(Status.EXISTS, f"exists already: {_shown(command.new_name)}")
    if there.capsule == entry.capsule:
        return []  # two names of one capsule: POSIX rename does nothing
    is_directory = entry.kind == _DIRECTORY
    target = _removable(state, command.new_parent, command.new_name, is_directory, recursive=False)
    return target if isinstance(target, Rejected) else [_renamed(command, entry, target.capsule)]


def _renamed(command: cmd.Rename, entry: EntryRow, replaced: bytes) -> ev.CapsuleRenamed:
    return ev.CapsuleRenamed(
        entry.capsule, command.parent, command.name, command.new_parent, command.new_name, replaced
    )


def _exchange(
    state: Overlay, command: cmd.Rename, entry: EntryRow, there: EntryRow | None, moved: bool
) -> Decision:
    if there is None:
        return Rejected(Status.NOT_FOUND, f"no entry {_shown(command.new_name)}")
    if moved and there.kind == _DIRECTORY and inside(state, command.parent, there.capsule):
        return Rejected(Status.INVALID, "a directory cannot move into itself")
    if there.capsule == entry.capsule:
        return []
    return [
        ev.NamesExchanged(
            entry.capsule, command.parent, command.name, there.capsule, command.new_parent, command.new_name
        )
    ]


def _write(state: Overlay, command: cmd.WriteExtent, payload: PayloadPlacer) -> Decision:
    row = _content(state, command.capsule)
    if isinstance(row, Rejected):
        return row
    if not 0 < command.length <= ev.EXTENT_BYTES_MAX:
        return Rejected(
            Status.INVALID, f"an extent has 1 to {ev.EXTENT_BYTES_MAX} bytes, not {command.length}"
        )
    if refused := _out_of_bounds(row, command.offset, command.length):
        return refused
    if command.change is not None and command.change != row.change:
        return Rejected(
            Status.STALE, f"capsule {capsule_text(command.capsule)} changed meanwhile: read it again"
        )
    if command.reserved is not None and (refused := _reserved_meanwhile(state, command)):
        return refused
    if not _covers(command):
        return Rejected(Status.INVALID, "the frames do not hold the bytes of the extent")
    records = []
    placed: dict[
        int, int
    ] = {}  # equal frames of one extent share their stored bytes, and those are placed once
    for frame in command.frames:
        if frame.stored is not None:
            piece = id(frame.stored)
            if piece not in placed:
                placed[piece] = payload.place(frame.stored)
            place = _FRAME_PLACE.pack(placed[piece], 0)
            records.append(frame.record[:_FRAME_PLACE_AT] + place + frame.record[_FRAME_PLACE_AT + 12 :])
        elif _gone(state, frame.record):
            return Rejected(Status.STALE, "deduplicated against a payload reclaimed meanwhile: encode again")
        else:
            records.append(frame.record)
    return [ev.ExtentWritten(command.capsule, command.offset, command.length, b"".join(records))]


def _out_of_bounds(row: CapsuleRow, offset: int, length: int) -> Rejected | None:
    """Why nothing can be written to a range, or None."""
    if offset < 0 or offset > SIZE_MAX - length:
        return Rejected(Status.TOO_LARGE, f"offset {offset} is beyond the largest size")
    if row.block_size and offset + length > row.size:
        return Rejected(Status.NO_SPACE, f"beyond the end of a block capsule of {row.size} bytes")
    return None


def _copy_range(state: Overlay, command: cmd.CopyRange, payload: PayloadPlacer) -> Decision:
    row, source = _content(state, command.capsule), _content(state, command.source)
    if isinstance(row, Rejected):
        return row
    if isinstance(source, Rejected):
        return source
    if not 0 < command.length <= ev.COPY_BYTES_MAX:
        return Rejected(Status.INVALID, f"one copy has 1 to {ev.COPY_BYTES_MAX} bytes, not {command.length}")
    if refused := _out_of_bounds(row, command.offset, command.length):
        return refused
    if not 0 <= command.source_offset <= source.size - command.length:
        return Rejected(
            Status.INVALID,
            f"not a range of the {source.size} bytes of {capsule_text(command.source)}: "
            f"{command.source_offset}+{command.length}",
        )
    if row.key != source.key:
        # Shared frames would be readable without the target's key, or lost with the source's.
        return Rejected(Status.NOT_PERMITTED, "capsules with different keys share no bytes: copy them")
    if command.reserved is not None and (refused := _reserved_meanwhile(state, command)):
        return refused
    if (command.capsule, command.offset) == (command.source, command.source_offset):
        return []
    return [
        ev.RangeCopied(
            bytes(command.capsule),
            command.offset,
            command.length,
            bytes(command.source),
            command.source_offset,
            source.link,
        )
    ]


def _covers(command: cmd.WriteExtent) -> bool:
    """Whether frames hold as many bytes as the extent is long, and as many stored bytes as they say."""
    plain = 0
    for frame in command.frames:
        if len(frame.record) != _FRAME_BYTES:
            return False
        length, stored = _FRAME_LENGTHS.unpack_from(frame.record)
        if frame.stored is not None and len(frame.stored) != stored:
            return False
        plain += length
    return plain == command.length or not command.frames


def _gone(state: Overlay, record: bytes, batch: int = 0) -> bool:
    """Whether the stored bytes of a frame record (of that batch, unless it names another) were reclaimed."""
    offset, position = _FRAME_PLACE.unpack_from(record, _FRAME_PLACE_AT)
    position = position or batch
    return bool(position) and any(
        key[8:] <= U32.pack(offset) and offset < U32.unpack(key[8:])[0] + U32.unpack(value)[0]
        for key, value in state.scan(RECLAIMED, U64.pack(position))
    )


def _manifest_gone(state: Overlay, manifest: bytes) -> bool:
    if next(state.scan(RECLAIMED, b""), None) is None:
        return False
    return any(
        _gone(state, frames[at : at + _FRAME_BYTES], batch)
        for _, parts in manifest_nodes(manifest)
        for _, _, _, batch, frames in parts
        for at in range(0, len(frames), _FRAME_BYTES)
    )


def _deallocate(state: Overlay, command: cmd.Deallocate, payload: PayloadPlacer) -> Decision:
    row = _content(state, command.capsule)
    if isinstance(row, Rejected):
        return row
    if command.length <= 0 or command.offset < 0 or command.offset > SIZE_MAX - command.length:
        return Rejected(Status.INVALID, f"not a range: {command.offset}+{command.length}")
    if command.reserved is not None and (refused := _reserved_meanwhile(state, command)):
        return refused
    events: list[ev.Event] = []
    end = command.offset + command.length
    if command.offset < row.size:
        events.append(ev.RangeDeallocated(command.capsule, command.offset, command.length))
    if command.extend and end > row.size:
        if row.block_size:
            return Rejected(Status.NO_SPACE, f"beyond the end of a block capsule of {row.size} bytes")
        events.append(ev.CapsuleResized(command.capsule, end))
    return events


def _resize(state: Overlay, command: cmd.Resize, payload: PayloadPlacer) -> Decision:
    row = _content(state, command.capsule)
    if isinstance(row, Rejected):
        return row
    if not 0 <= command.size <= SIZE_MAX:
        return Rejected(Status.TOO_LARGE, f"not a usable size: {command.size}")
    if row.block_size and command.size % row.block_size:
        return Rejected(Status.INVALID, f"a size of {command.size} is not whole blocks of {row.block_size}")
    return [ev.CapsuleResized(command.capsule, command.size)]


def _set_attributes(state: Overlay, command: cmd.SetAttributes, payload: PayloadPlacer) -> Decision:
    row = _live(state, command.capsule)
    if isinstance(row, Rejected):
        return row
    for value in (command.mode, command.uid, command.gid):
        if value is not None and not 0 <= value <= U32_MAX:
            return Rejected(Status.INVALID, f"not a mode or owner: {value}")
    for time in (command.atime, command.mtime):
        if time is not None and not -(1 << 63) <= time < 1 << 63:
            return Rejected(Status.INVALID, f"not a time: {time}")
    events: list[ev.Event] = []
    if command.size is not None:
        resized = _resize(state, cmd.Resize(command.capsule, command.size), payload)
        if isinstance(resized, Rejected):
            return resized
        events += resized
    mode = None if command.mode is None else command.mode & 0o7777
    changes = (mode, command.uid, command.gid, command.atime, command.mtime)
    if any(value is not None for value in changes):
        events.append(ev.AttributesChanged(command.capsule, *changes))
    return events


def _set_xattr(state: Overlay, command: cmd.SetXattr, payload: PayloadPlacer) -> Decision:
    row = _live(state, command.capsule)
    if isinstance(row, Rejected):
        return row
    if refused := _xattr_name(command.name):
        return refused
    if len(command.value) > XATTR_BYTES_MAX:
        return Rejected(
            Status.TOO_LARGE, f"an attribute of {len(command.value)} bytes; the limit is {XATTR_BYTES_MAX}"
        )
    exists = state.get(XATTR, command.capsule + command.name) is not None
    if command.create and exists:
        return Rejected(Status.EXISTS, f"attribute exists already: {_shown(command.name)}")
    if command.replace and not exists:
        return Rejected(Status.NO_ATTRIBUTE, f"no attribute {_shown(command.name)}")
    return [ev.XattrSet(command.capsule, command.name, command.value)]


def _xattr_name(name: bytes) -> Rejected | None:
    if not 0 < len(name) <= NAME_BYTES_MAX or b"\0" in name:
        return Rejected(Status.NAME_TOO_LONG if name else Status.INVALID, "not a usable attribute name")
    return None


def _remove_xattr(state: Overlay, command: cmd.RemoveXattr, payload: PayloadPlacer) -> Decision:
    row = _live(state, command.capsule)
    if isinstance(row, Rejected):
        return row
    if not _xattr_name(command.name) and state.get(XATTR, command.capsule + command.name) is not None:
        return [ev.XattrRemoved(command.capsule, command.name)]
    return Rejected(Status.NO_ATTRIBUTE, f"no attribute {_shown(command.name)}")


def _set_policy(state: Overlay, command: cmd.SetPolicy, payload: PayloadPlacer) -> Decision:
    row = _live(state, command.capsule)
    if isinstance(row, Rejected):
        return row
    if len(command.policy) > DOCUMENT_BYTES_MAX:
        return Rejected(Status.TOO_LARGE, "policy document too large")
    if refused := _key_taken(state, command.key):
        return refused
    policy, undefined = _policy_number(state, command.policy)
    events: list[ev.Event] = []
    if undefined:
        events.append(ev.PolicyDefined(command.capsule, policy, command.policy))
    if command.key:
        events.append(_key_event(command.capsule, command.key))
    return [*events, ev.PolicyChanged(command.capsule, policy)]


def _snapshot_key(name: str) -> bytes:
    """A snapshot's name in bytes; lone surrogates come out as no UTF-8, which no name may be."""
    return name.encode(errors="surrogatepass")


def _take_snapshot(state: Overlay, command: cmd.TakeSnapshot, payload: PayloadPlacer) -> Decision:
    row = _live(state, command.capsule)
    if isinstance(row, Rejected):
        return row
    if row.deleted:
        return _missing(command.capsule)
    name = _snapshot_key(command.snapshot)
    if refused := check_name(name):
        return refused
    if state.get(SNAPSHOT, name) is not None:
        return Rejected(Status.EXISTS, f"snapshot exists already: {command.snapshot}")
    return [ev.SnapshotTaken(command.capsule, command.snapshot)]


def _drop_snapshot(state: Overlay, command: cmd.DropSnapshot, payload: PayloadPlacer) -> Decision:
    name = _snapshot_key(command.snapshot)
    data = None if check_name(name) else state.get(SNAPSHOT, name)
    if data is None:
        return Rejected(Status.NOT_FOUND, f"no snapshot {_shown(name[:NAME_BYTES_MAX])}")
    capsule = SnapshotRow.decode(data).capsule
    if state.capsule(capsule) is None:
        capsule = bytes(ROOT)  # its capsule was purged meanwhile
    return [ev.SnapshotDropped(capsule, command.snapshot)]


def _clone(state: Overlay, command: cmd.Clone, payload: PayloadPlacer) -> Decision:
    if state.capsule(command.capsule) is not None:
        return Rejected(Status.EXISTS, f"capsule {capsule_text(command.capsule)} exists already")
    if refused := _free_name(state, command.parent, command.name):
        return refused
    if len(command.manifest) > MANIFEST_BYTES_MAX:
        return Rejected(
            Status.TOO_LARGE,
            f"a past moment of {len(command.manifest)} bytes of metadata; clone a smaller part",
        )
    members = b""
    if command.manifest and _manifest_gone(state, command.manifest):
        return Rejected(
            Status.NOT_PERMITTED, "bytes of that moment were reclaimed: their policy keeps no history"
        )
    if not command.manifest:
        row = _live(state, command.source)
        if isinstance(row, Rejected):
            return row
        if row.deleted:
            return _missing(command.source)
        if row.kind == _DIRECTORY and inside(state, command.parent, command.source):
            return Rejected(Status.INVALID, "a tree cannot be cloned into itself")
        nodes = tree_nodes(state, command.source)
        members = b"".join(node.capsule for node in nodes)
        if len(members) > MANIFEST_BYTES_MAX:
            return Rejected(Status.TOO_LARGE, "a tree of too many capsules for one clone; clone its parts")
    return [
        ev.CapsuleCloned(
            command.capsule,
            command.source,
            command.parent,
            command.name,
            command.at,
            members,
            command.manifest,
        )
    ]


def _undelete(state: Overlay, command: cmd.Undelete, payload: PayloadPlacer) -> Decision:
    row = _live(state, command.capsule)
    if isinstance(row, Rejected):
        return row
    if not row.deleted:
        return Rejected(Status.EXISTS, f"capsule {capsule_text(command.capsule)} is not deleted")
    if refused := _free_name(state, command.parent, command.name):
        return refused
    if row.kind == _DIRECTORY and inside(state, command.parent, command.capsule):
        return Rejected(Status.INVALID, "a directory cannot come back inside itself")
    return [ev.CapsuleUndeleted(command.capsule, command.parent, command.name)]


def _reclaim(state: Overlay, command: cmd.ReclaimPayload, payload: PayloadPlacer) -> Decision:
    packed = b"".join(RECLAIMED_RANGE.pack(*each) for each in command.ranges)
    return [ev.PayloadReclaimed(bytes(ROOT), packed)] if packed else []


def _purge(state: Overlay, command: cmd.PurgeCapsules, payload: PayloadPlacer) -> Decision:
    for capsule in command.capsules:
        row = state.capsule(capsule)
        if row is None:
            return _missing(capsule)
    return [ev.CapsulesPurged(bytes(ROOT), b"".join(command.capsules))] if command.capsules else []


def _forget_replies(state: Overlay, command: cmd.ForgetReplies, payload: PayloadPlacer) -> Decision:
    for client in command.clients:
        if len(client) != ID_BYTES:
            return Rejected(Status.INVALID, f"not a client id of {ID_BYTES} bytes: {client!r}")
    return [ev.RepliesForgotten(bytes(ROOT), b"".join(command.clients))] if command.clients else []


def _assign_namespace(state: Overlay, command: cmd.AssignNamespace, payload: PayloadPlacer) -> Decision:
    name = command.subsystem
    if not 0 < len(name) <= ev.SUBSYSTEM_CHARACTERS_MAX or not name.isascii() or not name.isprintable():
        return Rejected(Status.INVALID, f"not the name of a subsystem: {name[:NAME_BYTES_MAX]!r}")
    if len(command.namespace) != ID_BYTES:
        return Rejected(Status.INVALID, f"not a namespace id of {ID_BYTES} bytes")
    if state.get(NAMESPACE, namespace_key(name, command.namespace)) is not None:
        return []
    nsid = state.counter(namespace_counter(name)) + 1
    if nsid > NSID_MAX:
        return Rejected(Status.NO_SPACE, f"all numbers of subsystem {name} were given")
    return [ev.NamespaceAssigned(bytes(ROOT), name, bytes(command.namespace), nsid)]


def _reserve(state: Overlay, command: reservations.Command, payload: PayloadPlacer) -> Decision:
    row = _content(state, command.capsule)
    if isinstance(row, Rejected):
        return row
    keys = [value for name, value in attrs.asdict(command).items() if name in ("key", "new_key", "preempted")]
    if len(command.host) != ID_BYTES or not all(0 <= each <= reservations.KEY_MAX for each in keys):
        return Rejected(Status.INVALID, f"not a host of {ID_BYTES} bytes with keys of 64 bits")
    before = reservations.State.decode(state.get(RESERVATION, command.capsule))
    try:
        after, told = reservations.decided(before, command)
    except SpaceError as error:
        return Rejected(error.status, str(error))
    return reservations.events_of(bytes(command.capsule), before, after, told)


def _reserved_meanwhile(
    state: Overlay, command: cmd.WriteExtent | cmd.CopyRange | cmd.Deallocate
) -> Rejected | None:
    """Refuses what was allowed under reservations that have changed since: it may not be any more."""
    if reservations.position_of(state.get(RESERVATION, command.capsule)) == command.reserved:
        return None
    return Rejected(
        Status.EXISTS, f"the reservations of {capsule_text(command.capsule)} changed meanwhile: look again"
    )


_JOINABLE: Final = frozenset(
    {
        cmd.CreateCapsule,
        cmd.WriteExtent,
        cmd.Link,
        cmd.Unlink,
        cmd.DeleteCapsule,
        cmd.Rename,
        cmd.Resize,
        cmd.SetAttributes,
        cmd.SetXattr,
        cmd.RemoveXattr,
        cmd.SetPolicy,
        cmd.TakeSnapshot,
        cmd.DropSnapshot,
        cmd.Clone,
        cmd.Undelete,
        cmd.RecordAction,
        cmd.GiveHomes,
    }
)
_TRIED: Final = Context(shipments.TRIED, 0, 0)
"""Where events are applied to see what the next command of the same group meets."""


def _together(state: Overlay, command: cmd.Together, payload: PayloadPlacer) -> Decision:
    if not 0 < len(command.commands) <= TOGETHER_MAX:
        return Rejected(Status.INVALID, f"not 1 to {TOGETHER_MAX} commands: {len(command.commands)}")
    tried = Overlay(state)
    events: list[ev.Event] = []
    for each in command.commands:
        if type(each) not in _JOINABLE:
            return Rejected(Status.INVALID, f"{type(each).__name__} cannot be one of several")
        decided = decide(tried, each, payload)
        if isinstance(decided, Rejected):
            return decided
        for event in decided:
            apply(tried, _TRIED, bytes(ID_BYTES), event)
        events += decided
    return events


def _not_an_nfs_server(server: str) -> Rejected | None:
    if 0 < len(server) <= ev.NFS_SERVER_CHARACTERS_MAX:
        return None
    return Rejected(Status.INVALID, f"not the name of an NFS server: {server[:NAME_BYTES_MAX]!r}")


def _record_nfs_client(state: Overlay, command: cmd.RecordNfsClient, payload: PayloadPlacer) -> Decision:
    if refused := _not_an_nfs_server(command.server):
        return refused
    owner, verifier = bytes(command.owner), bytes(command.verifier)
    if len(owner) > ev.NFS_OWNER_BYTES_MAX or len(verifier) != ev.NFS_VERIFIER_BYTES:
        return Rejected(Status.INVALID, f"not an NFS client: names of {len(owner)} and {len(verifier)} bytes")
    if state.get(NFS_CLIENT, nfs_client_key(command.server, owner)) == verifier + owner:
        return []
    return [ev.NfsClientRecorded(bytes(ROOT), command.server, owner, verifier)]


def _forget_nfs_client(state: Overlay, command: cmd.ForgetNfsClient, payload: PayloadPlacer) -> Decision:
    if refused := _not_an_nfs_server(command.server):
        return refused
    if state.get(NFS_CLIENT, nfs_client_key(command.server, command.owner)) is None:
        return []
    return [ev.NfsClientForgotten(bytes(ROOT), command.server, bytes(command.owner))]


def _start_nfs_server(state: Overlay, command: cmd.StartNfsServer, payload: PayloadPlacer) -> Decision:
    if refused := _not_an_nfs_server(command.server):
        return refused
    epoch = state.counter(nfs_epoch_counter(command.server)) + 1
    if epoch > U32_MAX:
        return Rejected(Status.NO_SPACE, f"NFS server {command.server} has started too often")
    return [ev.NfsServerStarted(bytes(ROOT), command.server, epoch)]


def _receive_shipment(state: Overlay, command: cmd.ReceiveShipment, payload: PayloadPlacer) -> Decision:
    return shipments.receive(state, command, payload, _RULES)


def _lose_home(state: Overlay, command: cmd.LoseHome, payload: PayloadPlacer) -> Decision:
    return homes.lose(state, command, payload, _RULES)


def _follow_heir(state: Overlay, command: cmd.FollowHeir, payload: PayloadPlacer) -> Decision:
    return homes.follow_heir(state, command, payload, _RULES)


def _set_arrival_policy(state: Overlay, command: cmd.SetArrivalPolicy, payload: PayloadPlacer) -> Decision:
    return homes.set_arrival_policy(state, command, payload, _RULES)


def _only_in_a_shipment(state: Overlay, command: object, payload: PayloadPlacer) -> Decision:
    return Rejected(Status.INVALID, f"{type(command).__name__} comes in a shipment only")


_RULES: Final[Mapping[type[Any], Rule]] = {
    cmd.Together: _together,
    cmd.InitialiseStore: _initialise,
    cmd.CreateCapsule: _create,
    cmd.Link: _link,
    cmd.Unlink: _unlink,
    cmd.DeleteCapsule: _delete,
    cmd.Rename: _rename,
    cmd.WriteExtent: _write,
    cmd.CopyRange: _copy_range,
    cmd.Deallocate: _deallocate,
    cmd.Resize: _resize,
    cmd.SetAttributes: _set_attributes,
    cmd.SetXattr: _set_xattr,
    cmd.RemoveXattr: _remove_xattr,
    cmd.SetPolicy: _set_policy,
    cmd.TakeSnapshot: _take_snapshot,
    cmd.DropSnapshot: _drop_snapshot,
    cmd.Clone: _clone,
    cmd.Undelete: _undelete,
    cmd.ReclaimPayload: _reclaim,
    cmd.PurgeCapsules: _purge,
    cmd.ForgetReplies: _forget_replies,
    cmd.AssignNamespace: _assign_namespace,
    cmd.RegisterReservation: _reserve,
    cmd.AcquireReservation: _reserve,
    cmd.ReleaseReservation: _reserve,
    cmd.RecordNfsClient: _record_nfs_client,
    cmd.ForgetNfsClient: _forget_nfs_client,
    cmd.StartNfsServer: _start_nfs_server,
    cmd.RewrapKeys: keys.rewrap,
    cmd.DestroyKeys: keys.destroy,
    cmd.DefineZone: homes.define,
    cmd.AddZone: homes.add,
    cmd.ChangeZone: homes.change,
    cmd.RemoveZone: homes.remove,
    cmd.Copied: _only_in_a_shipment,
    cmd.PlaceCapsule: _only_in_a_shipment,
    cmd.WithdrawCapsule: _only_in_a_shipment,
    cmd.SweepReplicas: _only_in_a_shipment,
    cmd.ReceiveShipment: _receive_shipment,
    cmd.RecordShipment: homes.record_shipment,
    cmd.RecordRefusal: homes.record_refusal,
    cmd.RecordAction: homes.record_action,
    cmd.RecordRpo: homes.record_rpo,
    cmd.SetArrivalPolicy: _set_arrival_policy,
    cmd.PromoteZone: homes.promote,
    cmd.LoseHome: _lose_home,
    cmd.FollowHeir: _follow_heir,
    cmd.GiveHomes: handover.give,
    cmd.TakeHome: _only_in_a_shipment,
    cmd.DeclineHomes: handover.decline,
    cmd.KeepHomes: handover.keep,
}
