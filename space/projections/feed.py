"""The feed: batches of the log, in order, folded into state and views, many to a transaction.

One loop serves everything that folds: recovery after a crash, ``space replay``, a past moment, a follower.
It reads records through an iterator, so it knows nothing of where the log is.
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

import attrs

from space._errors import CorruptionError
from space.events.codec import READERS, batch_rows
from space.events.registry import BY_NUMBER
from space.events.types import Event
from space.projections.contract import Folder, Handler, View
from space.statemachine import replies
from space.statemachine.apply import HANDLERS, Context
from space.statemachine.store import Applied, Store, WriteTransaction
from space.statemachine.tables import Overlay

EVENTS_PER_TRANSACTION: Final = 200_000
"""Bounds the memory of a fold (a few hundred bytes an event) and what a crash in it repeats."""


_NONSENSE: Final = (struct.error, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What folding a decodable event that makes no sense may end in: a log with one is damaged."""


class Record(Protocol):
    """What the feed needs of a log record."""

    @property
    def index(self) -> int: ...

    @property
    def time_ns(self) -> int: ...

    @property
    def metadata(self) -> bytes: ...

    @property
    def chain(self) -> bytes: ...


@attrs.define
class Progress:
    """How far a fold is."""

    position: int = 0
    events: int = 0


def fold(
    store: Store,
    views: Sequence[View],
    records: Iterable[Record],
    *,
    start: Applied,
    with_state: bool = True,
    handles: Mapping[int, Any] | None = None,
    stop_event: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    wanted: Callable[[], bool] | None = None,
    seen: list[Event] | None = None,
) -> Applied:
    """Folds ``records`` into the state (unless ``with_state`` is false) and ``views``; returns where it ended.

    Args:
        start: where the tables stand; ``records`` begin right after it.
        handles: tables to write, when they are not the ones readers see (a shadow generation).
        stop_event: fold the last record only up to and including this event (a moment inside a batch).
        on_progress: called after every transaction.
        wanted: whether somebody waits for the tables: a transaction then ends after the record at hand.
        seen: gets every event.

    Raises:
        CorruptionError: an event does not decode or contradicts the state.
    """
    source = iter(records)
    progress = Progress(start.position)
    applied = start
    # Decoded events are short-lived and hold no cycles: without this, the collector walks all of them again and again.
    collecting = gc.isenabled()
    gc.disable()
    try:
        done = False
        while not done:
            with store.write(handles) as txn:
                try:
                    applied, done = _transaction(
                        txn, views, source, applied, with_state, stop_event, wanted, seen
                    )
                except _NONSENSE as error:
                    raise CorruptionError(
                        f"events after position {applied.position} contradict what they change: {error!r}",
                        position=applied.position + 1,
                    ) from error
                if handles is None:
                    txn.set_applied(applied)
            progress.position, progress.events = applied.position, applied.events - start.events
            if on_progress is not None:
                on_progress(progress)
    finally:
        if collecting:
            gc.enable()
    return applied


def _transaction(
    txn: WriteTransaction,
    views: Sequence[View],
    source: Iterator[Record],
    applied: Applied,
    with_state: bool,
    stop_event: int | None,
    wanted: Callable[[], bool] | None,
    seen: list[Event] | None,
) -> tuple[Applied, bool]:
    overlay = Overlay(txn)
    folders = [view.folder(txn) for view in views]
    plan = _Plan(folders, with_state=with_state)
    limit = -1 if stop_event is None else stop_event + 1
    count = 0
    record: Record | None = None
    done = True
    for record in source:
        context = Context(record.index, 0, record.time_ns)
        for client, sequence, time_ns, _actor, rows in batch_rows(record.metadata):
            context.time_ns = time_ns
            for row in rows:
                read, on_state, on_views = plan[row[0]]
                link, event = read(row)
                if seen is not None:
                    seen.append(event)
                if on_state is not None:
                    on_state(overlay, context, link, event)
                for on_view in on_views:
                    on_view(context, event)
                context.event += 1
                if context.event == limit:
                    break
            if client and with_state:
                replies.keep(overlay, client, sequence, record.index)
            if context.event == limit:
                break
        count += context.event
        if count >= EVENTS_PER_TRANSACTION or (wanted is not None and wanted()):
            done = False
            break
    if record is None:
        return applied, True
    change = overlay.flush(txn) if with_state else 0
    for folder in folders:
        folder.flush()
    digest = (applied.digest + change) % (1 << 256)
    return Applied(record.index, record.chain, digest, record.time_ns, applied.events + count), done


class _Plan(dict[int, tuple[Any, Any, list[Handler]]]):
    """Event number → its reader, what it does to the state (or None), and to each view it means something to."""

    def __init__(self, folders: Sequence[Folder], *, with_state: bool) -> None:
        super().__init__()
        self._folders = folders
        self._with_state = with_state

    def __missing__(self, number: int) -> tuple[Any, Any, list[Handler]]:
        schema = BY_NUMBER.get(number)
        if schema is None:
            return READERS[number], None, []  # that reader refuses it
        on_views = [folder.handlers[schema.cls] for folder in self._folders if schema.cls in folder.handlers]
        on_state = HANDLERS[schema.cls] if self._with_state else None
        found = self[number] = (READERS[number], on_state, on_views)
        return found
