"""Data keys and the master key: how rows of keys are wrapped anew, and how keys are destroyed.

The state knows its master key by fingerprint only, in the counter ``master``; 0 until the master key is changed for the
first time.  From then on each row names the master key that wraps it, and what another one wraps is refused
wherever a row would come in.  So whoever wrapped with the old master key, however long ago, is told so before the row
is in the log, and the old master key can be thrown away as soon as the change is: no row needs it.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from space._errors import Status
from space.events import commands as cmd
from space.events import types as ev
from space.events.ids import ROOT
from space.events.registry import FRAMES_BYTES_MAX, U63_MAX
from space.statemachine.decision import Decision, PayloadPlacer, Rejected, capsule_text
from space.statemachine.tables import COUNTER, KEY, U32, U64, Overlay

if TYPE_CHECKING:
    from space.statemachine.apply import Context

MASTER: Final = b"master"
"""The counter that holds the fingerprint of the master key."""

REWRAPPED_MAX: Final = 8192
"""Rows of one command: two thirds of what its event may hold."""
assert REWRAPPED_MAX * ev.REWRAPPED.size <= FRAMES_BYTES_MAX

DESTROYED_MAX: Final = 4096
"""Keys of one capsule: it rarely gets a second one."""

_TAG: Final = struct.Struct("<Q")


def outdated(state: Overlay, wrapped: bytes) -> bool:
    """Whether a row is wrapped by a master key that is not the store's any more."""
    master = state.counter(MASTER)
    return bool(master) and _is_wrapped(wrapped) and _master_of(wrapped) != master


def _is_wrapped(row: bytes) -> bool:
    """Whether a row is wrapped by a master key: not if it is destroyed, or sealed for another zone."""
    return len(row) in (ev.WRAPPED_BYTES, ev.TAGGED_BYTES)


def _master_of(row: bytes) -> int:
    return int(_TAG.unpack_from(row, ev.WRAPPED_BYTES)[0]) if len(row) == ev.TAGGED_BYTES else 0


def rewrap(state: Overlay, command: cmd.RewrapKeys, payload: PayloadPlacer) -> Decision:
    """A row is replaced by one of the same key: what was destroyed meanwhile does not come back."""
    master, before = command.master, state.counter(MASTER)
    if not 0 < master <= U63_MAX or master == command.before or len(command.rows) > REWRAPPED_MAX:
        return Rejected(Status.INVALID, f"not rows of a master key: {len(command.rows)} of {master}")
    if before != command.before:
        return Rejected(Status.STALE, "the master key was changed meanwhile")
    rows: dict[bytes, bytes] = {}
    for key, version, wrapped in command.rows:
        number = U32.pack(key) + U32.pack(version)
        if not _is_wrapped(state.get(KEY, number) or b""):
            return Rejected(Status.STALE, f"key {key} changed meanwhile: look again")
        if len(wrapped) != ev.TAGGED_BYTES or _master_of(wrapped) != master:
            return Rejected(Status.INVALID, f"key {key} is not wrapped by master key {master:016x}")
        rows[number] = wrapped
    if command.last:
        for number, wrapped in state.scan(KEY, b""):
            if number not in rows and _is_wrapped(wrapped) and _master_of(wrapped) != master:
                key = U32.unpack(number[: U32.size])[0]
                return Rejected(Status.STALE, f"key {key} is wrapped by another master key still: look again")
    events: list[ev.Event] = []
    if rows:
        packed = b"".join(ev.REWRAPPED.pack(*_number(key), row) for key, row in rows.items())
        events.append(ev.KeysRewrapped(bytes(ROOT), master, packed))
    if command.last:
        events.append(ev.MasterKeyChanged(bytes(ROOT), master, before))
    return events


def _number(key: bytes) -> tuple[int, int]:
    return U32.unpack_from(key)[0], U32.unpack_from(key, U32.size)[0]


def destroy(state: Overlay, command: cmd.DestroyKeys, payload: PayloadPlacer) -> Decision:
    """Whose capsule it is does not matter: a key that is here is this store's to destroy."""
    if state.capsule(command.capsule) is None:
        return Rejected(Status.NOT_FOUND, f"no capsule {capsule_text(command.capsule)}")
    if len(command.keys) > DESTROYED_MAX:
        return Rejected(Status.TOO_LARGE, f"{len(command.keys)} keys of one capsule; at most {DESTROYED_MAX}")
    events = []
    for key in dict.fromkeys(command.keys):
        found = list(state.scan(KEY, U32.pack(key))) if 0 < key <= 0xFFFF_FFFF else []
        if not found:
            return Rejected(Status.NOT_FOUND, f"key {key} does not exist")
        if any(row for _, row in found):
            events.append(ev.KeyDestroyed(bytes(command.capsule), key))
    return events


# --- the fold --------------------------------------------------------------------------------------


def rewrapped(state: Overlay, context: Context, link: bytes, event: ev.KeysRewrapped) -> None:
    """The rows are replaced."""
    state.edit(event.capsule).link = link
    for key, version, wrapped in ev.REWRAPPED.iter_unpack(event.rows):
        state.put(KEY, U32.pack(key) + U32.pack(version), wrapped)


def master_changed(state: Overlay, context: Context, link: bytes, event: ev.MasterKeyChanged) -> None:
    """Rows of another master key are refused from now on."""
    state.edit(event.capsule).link = link
    state.put(COUNTER, MASTER, U64.pack(event.master))


def destroyed(state: Overlay, context: Context, link: bytes, event: ev.KeyDestroyed) -> None:
    """Every version of the key is gone; the number stays taken."""
    row = state.edit(event.capsule)
    row.link, row.change, row.ctime = link, context.position, context.time_ns
    for number, _ in list(state.scan(KEY, U32.pack(event.key))):
        state.put(KEY, number, b"")
