"""Replies kept for retries: what each of a client's last commands was told.

One row for :data:`SLOTS` consecutive sequences of a client: commands that share a batch then change a few rows, and
not two each (their own, and that of the command so long before it that nobody retries it any more).  A row is the
position of each sequence's batch, 0 for a sequence that has no reply, and behind those, where commands were
refused, ``[[slot, status, message], …]``.
"""

from __future__ import annotations

import struct
from typing import Final

import msgpack

from space.events.commands import REPLIES_KEPT_PER_CLIENT
from space.statemachine.tables import REPLY, U64, Overlay, Reader

SLOTS: Final = 32
_ROWS_KEPT: Final = REPLIES_KEPT_PER_CLIENT // SLOTS
assert REPLIES_KEPT_PER_CLIENT == SLOTS * _ROWS_KEPT
_POSITIONS: Final = struct.Struct(f">{SLOTS}Q")
_EMPTY: Final = bytes(_POSITIONS.size)
_WIDTH: Final = U64.size
_pack: Final = U64.pack

Refusal = tuple[str, str]
"""Name of a status, and message."""


def keep(state: Overlay, client: bytes, sequence: int, position: int, refusal: Refusal | None = None) -> None:
    """Keeps the reply to a command of the batch at ``position``, and lets go of the client's oldest.

    Nothing for a command without a client: nobody can try that again.
    """
    if not client:
        return
    number, slot = divmod(sequence, SLOTS)
    key = client + _pack(number)
    row = state.get(REPLY, key)
    if row is None:
        row = _EMPTY
        if number > _ROWS_KEPT:
            state.delete(REPLY, client + _pack(number - _ROWS_KEPT - 1))
    at = slot * _WIDTH
    row = row[:at] + _pack(position) + row[at + _WIDTH :]
    if refusal is not None:
        refusals = [*_refusals(row), (slot, *refusal)]
        row = row[: _POSITIONS.size] + msgpack.packb(refusals)
    state.put(REPLY, key, row)


def find(state: Reader | Overlay, client: bytes, sequence: int) -> tuple[int, Refusal | None] | None:
    """Position of the batch with a client's command, and why it was refused if it was; None without a reply."""
    number, slot = divmod(sequence, SLOTS)
    row = state.get(REPLY, client + _pack(number))
    if row is None:
        return None
    (position,) = U64.unpack_from(row, slot * _WIDTH)
    if not position:
        return None
    for refused, status, message in _refusals(row):
        if refused == slot:
            return position, (status, message)
    return position, None


def newest(row: bytes) -> int:
    """Position of the last command a row holds a reply to."""
    return max(map(int, _POSITIONS.unpack_from(row)))


def _refusals(row: bytes) -> list[tuple[int, str, str]]:
    if len(row) == _POSITIONS.size:
        return []
    return [(slot, status, message) for slot, status, message in msgpack.unpackb(row[_POSITIONS.size :])]
