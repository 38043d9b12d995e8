"""Moments of another zone: ``ZONE@POSITION``, as far as it was shipped here.

A position of the home's log is looked up among the shipments in this log: the moment is the last one here that shows
nothing of the zone from after that position.  Each stream (priority) comes by itself, so what is in one that lagged
then shows as of what had come by then.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Final, Protocol

from space._errors import CorruptionError, NotFoundError
from space.events.codec import decode_batch
from space.events.ids import ZONE_NAME, AtPosition
from space.events.types import ShipmentReceived
from space.statemachine import zones as rows
from space.statemachine.tables import Reader
from space.wal.segment_format import RecordInfo

TREE_SHARD: Final = 0
"""Positions are those of one log: of a zone of several, the one its tree is in."""

_MOMENT: Final = re.compile(rf"({ZONE_NAME.pattern})@(\d{{1,19}})", re.ASCII)


class Records(Protocol):
    """What is needed of the log."""

    def records(self, start: int) -> Iterator[RecordInfo]:
        """Records from a position on."""


def zone_moment(state: Reader, log: Records, last: int, text: str) -> AtPosition | None:
    """The moment of this log that ``ZONE@POSITION`` means; None if ``text`` has another form.

    Args:
        state: the tables as they are at ``last``.
        log: this log.
        last: its last position.
        text: what was asked for.

    Raises:
        NotFoundError: no such zone, or it has shipped less.
    """
    match = _MOMENT.fullmatch(text)
    if match is None:
        return None
    name, wanted = match[1], int(match[2])
    found = {row.name: (number, row) for number, row in rows.zones(state).items()}
    if name not in found:
        raise NotFoundError(f"no zone {name}", hint="space zone ls shows those that are known")
    zone, row = found[name]
    if row.role == rows.OWN:
        return AtPosition(wanted)
    streams = [(lane, cursor) for shard, lane, cursor in rows.cursors(state, zone) if shard == TREE_SHARD]
    reached = max((cursor.position for _, cursor in streams), default=0)
    if wanted > reached:
        raise NotFoundError(
            f"zone {name} has shipped its log up to position {reached}, not {wanted}",
            hint=f"the latest moment is {name}@{reached}",
        )
    moments = [
        _before(_first_beyond(state, log, zone, lane, wanted))
        for lane, cursor in streams
        if cursor.position > wanted
    ]
    return min(moments, key=_order, default=AtPosition(last))


def _before(place: tuple[int, int]) -> AtPosition:
    """The moment right before an event."""
    position, event = place
    return AtPosition(position, event - 1) if event else AtPosition(position - 1)


def _order(moment: AtPosition) -> tuple[float, float]:
    return moment.position, math.inf if moment.event is None else moment.event


def _first_beyond(state: Reader, log: Records, zone: bytes, lane: int, wanted: int) -> tuple[int, int]:
    """Position and event here of the first shipment of a stream that goes beyond ``wanted``; there is one."""
    start = rows.marked_before(state, zone, TREE_SHARD, lane, wanted)
    for record in log.records(max(1, start)):
        events = (event for entry in decode_batch(record.metadata) for _, event in entry.events)
        for number, event in enumerate(events):
            if (
                isinstance(event, ShipmentReceived)
                and (event.zone, event.shard, event.lane) == (zone, TREE_SHARD, lane)
                and event.through_position > wanted
            ):
                return record.index, number
    raise CorruptionError(
        "a stream of another zone has come further than the log says", hint="run: space replay"
    )
