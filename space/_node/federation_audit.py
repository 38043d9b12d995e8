"""``space verify --sovereignty``: reads a whole log beside the state it folds to, and judges what it says was shipped.

Nothing but the log is believed: the state is folded anew from the first batch, in tables of its own.  Where the log
begins later, from the oldest checkpoint it confirms, and the report says from where on it proves anything.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from space._errors import NotFoundError
from space._node import history
from space._node.caller import Document
from space.events import types as ev
from space.events.codec import decode_batch
from space.events.ids import CapsuleId
from space.federation.sovereignty import Audit, Finding
from space.projections.contract import View
from space.projections.feed import fold
from space.statemachine.store import Store as Tables
from space.wal.segment_format import RecordInfo

if TYPE_CHECKING:
    from space._node.store import Store

FOLDED_AT_ONCE: Final = 4096
"""Batches that are read before they are folded, unless one is to be judged sooner."""

_JUDGED: Final = (
    ev.PolicyChanged,
    ev.CapsulesPurged,
    ev.ShipmentSent,
    ev.ZonePromoted,
    ev.HomeLost,
    ev.HeirFollowed,
)
"""What an audit looks at; the state before anything else is nobody's question."""


def audit(store: Store, *, on_progress: Callable[[int], None] | None = None) -> Document:
    """Whether the policy of each capsule allowed every shipment of it, at the position it was sent as of.

    Returns:
        ``findings`` (position, capsule, zone, sent_as_of, reason), ``missed`` beyond those, how many ``shipments`` and
        ``capsules`` in them were looked at, and ``from_position`` and ``position``, from and to where in the log.

    Raises:
        CorruptionError: the log is damaged.
        NotFoundError: it begins after its first batch, and no checkpoint leads there.
    """
    log, last = store.wal, store.last
    begin = 1
    views: tuple[View, ...] = ()
    if log.first_index > 1:
        begin, views = _oldest(store), tuple(store.views)
    path = history.past_directory(store.path)
    found = Audit()
    tables = history.build(store.path, log, views, path, history.Target(begin), use_checkpoints=begin > 1)
    try:
        applied = tables.applied
        waiting: list[RecordInfo] = []
        for record in _records(store, begin + 1, last):
            events = [event for entry in decode_batch(record.metadata) for _, event in entry.events]
            judged = any(isinstance(event, _JUDGED) for event in events)
            if waiting and (judged or len(waiting) >= FOLDED_AT_ONCE):
                applied = fold(tables, views, waiting, start=applied)
                waiting = []
                if on_progress is not None:
                    on_progress(applied.position)
            if judged:
                _judge(found, tables, record.index, events)
            waiting.append(record)
    finally:
        tables.close(seal=False)
        shutil.rmtree(path, ignore_errors=True)
    return {
        "shipments": found.shipments,
        "capsules": found.capsules,
        "from_position": begin,
        "position": last,
        "findings": [_document(each) for each in found.findings],
        "missed": found.missed,
    }


def _records(store: Store, start: int, last: int) -> Iterator[RecordInfo]:
    return store.wal.records(start, last + 1) if start <= last else iter(())


def _judge(found: Audit, tables: Tables, position: int, events: list[ev.Event]) -> None:
    with tables.read() as before:
        found.batch(before, position, events)


def _oldest(store: Store) -> int:
    """Position of the oldest checkpoint the log goes on from."""
    for checkpoint in reversed(history.checkpoints(store.path)):
        position = int(checkpoint.name)
        if store.wal.first_index - 1 <= position <= store.last:
            return max(position, store.wal.first_index)
    raise NotFoundError(
        f"the log begins at position {store.wal.first_index}, and nothing says what was before",
        hint="run it on a store that has the whole log",
    )


def _document(finding: Finding) -> Document:
    return {
        "position": finding.position,
        "capsule": str(CapsuleId(finding.capsule)),
        "zone": finding.zone,
        "sent_as_of": finding.sent_as_of,
        "reason": finding.reason,
    }
