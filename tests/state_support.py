"""The fold on a sorted map in memory, and ways to fold a history whole or in pieces."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs

from space.events.codec import Entry, decode_batch
from space.projections.contract import View
from space.statemachine import replies
from space.statemachine.apply import Context, apply
from space.statemachine.sequencer import Prepared
from space.statemachine.tables import Overlay

Rows = dict[tuple[int, bytes], bytes]


class MemoryWriter:
    """:class:`space.statemachine.tables.Writer` on a dict."""

    def __init__(self, rows: Rows | None = None) -> None:
        self.rows: Rows = {} if rows is None else rows

    def get(self, table: int, key: bytes) -> bytes | None:
        """The row, or None."""
        return self.rows.get((table, key))

    def getter(self, table: int) -> Callable[[bytes], bytes | None]:
        """``get`` of one table."""
        return lambda key: self.rows.get((table, key))

    def scan(self, table: int, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Rows from a snapshot of the keys, in order."""
        for key in sorted(key for of, key in self.rows if of == table and key.startswith(prefix)):
            if key >= start and (table, key) in self.rows:
                yield key, self.rows[table, key]

    def last_at_or_before(self, table: int, key: bytes) -> tuple[bytes, bytes] | None:
        """The row with the greatest key not above."""
        keys = sorted(each for of, each in self.rows if of == table)
        at = bisect.bisect_right(keys, key)
        return (keys[at - 1], self.rows[table, keys[at - 1]]) if at else None

    def put(self, table: int, key: bytes, value: bytes) -> None:
        """Sets a row."""
        self.rows[table, key] = value

    def put_sorted(self, table: int, rows: list[tuple[bytes, bytes]]) -> None:
        """Sets rows that come in key order."""
        assert rows == sorted(rows)
        for key, value in rows:
            self.put(table, key, value)

    def delete(self, table: int, key: bytes) -> None:
        """Removes a row."""
        self.rows.pop((table, key), None)


@attrs.frozen
class Batch:
    """A logged batch: what every fold starts from."""

    position: int
    metadata: bytes

    @classmethod
    def of(cls, prepared: Prepared) -> Batch:
        """What the log would hold of it."""
        return cls(prepared.position, prepared.metadata())


def linked(batch: Batch) -> Iterator[tuple[Entry, Context, bytes, Any]]:
    """Every event of a batch with its place."""
    number = 0
    for entry in decode_batch(batch.metadata):
        for link, event in entry.events:
            yield entry, Context(batch.position, number, entry.time_ns), link, event
            number += 1


def fold_state(batches: Sequence[Batch], writer: MemoryWriter) -> int:
    """Folds batches into the state in one overlay; the change of the digest."""
    overlay = Overlay(writer)
    for batch in batches:
        for entry, context, link, event in linked(batch):
            apply(overlay, context, link, event)
            replies.keep(overlay, entry.client, entry.sequence, batch.position)
    return overlay.flush(writer)


def fold_view(view: View, batches: Sequence[Batch], writer: MemoryWriter) -> None:
    """Folds batches into a view in one run."""
    folder = view.folder(writer)
    for batch in batches:
        for _, context, _, event in linked(batch):
            handler = folder.handlers.get(type(event))
            if handler is not None:
                handler(context, event)
    folder.flush()
