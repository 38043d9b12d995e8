"""The state of a simulated node: the real fold on rows in memory instead of LMDB."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import attrs

from space.events.codec import decode_batch
from space.replication.replica import Item
from space.statemachine import replies
from space.statemachine.apply import Context, apply
from space.statemachine.store import Applied
from space.statemachine.tables import Overlay, Reader
from space.wal.log import Log
from tests.chaos.sim_checks import Oracle
from tests.state_support import MemoryWriter, Rows


class PowerLossError(Exception):
    """The machine of a node stops here."""


@attrs.frozen
class Checkpoint:
    """A copy of the state that a crash leaves alone."""

    rows: Rows
    applied: Applied


EMPTY_CHECKPOINT: Final = Checkpoint({}, Applied())


class MemoryMachine:
    """:class:`space.replication.replica.Machine` on a dict, with a checkpoint every so many batches."""

    def __init__(
        self, node: int, oracle: Oracle, term: Callable[[], int], checkpoint: Checkpoint, every: int
    ) -> None:
        self._node = node
        self._oracle = oracle
        self._term = term
        self._writer = MemoryWriter(dict(checkpoint.rows))
        self._every = every
        self.checkpoint = checkpoint
        self.applied = checkpoint.applied

    @property
    def rows(self) -> MemoryWriter:
        """The state as it stands, for readers."""
        return self._writer

    def reading(self) -> AbstractContextManager[Reader]:
        return nullcontext(self._writer)

    def apply(self, batches: Sequence[Item]) -> None:
        for item in batches:
            if item.prepared is not None:
                change = item.prepared.overlay.flush(self._writer)
            else:
                change = self._fold(item.index, item.metadata)
            self._went_to(item.index, item.term, item.time_ns, item.chain, item.metadata, change)

    def catch_up(self, log: Log, position: int) -> None:
        for info in log.records(self.applied.position + 1):
            if info.index > position:
                return
            change = self._fold(info.index, info.metadata)
            self._went_to(info.index, info.term, info.time_ns, info.chain, info.metadata, change)

    def _fold(self, position: int, metadata: bytes) -> int:
        overlay = Overlay(self._writer)
        number = 0
        for entry in decode_batch(metadata):
            for link, event in entry.events:
                apply(overlay, Context(position, number, entry.time_ns), link, event)
                number += 1
            replies.keep(overlay, entry.client, entry.sequence, position)
        return overlay.flush(self._writer)

    def _went_to(
        self, index: int, term: int, time_ns: int, chain: bytes, metadata: bytes, change: int
    ) -> None:
        assert index == self.applied.position + 1, "a batch was skipped"
        self._oracle.applied(self._node, index, term, chain, metadata, self._term())
        digest = (self.applied.digest + change) % (1 << 256)
        self._oracle.digest(self._node, index, digest)
        self.applied = Applied(index, chain, digest, time_ns, 0)
        if index >= self.checkpoint.applied.position + self._every:
            self.checkpoint = Checkpoint(dict(self._writer.rows), self.applied)
