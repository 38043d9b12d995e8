"""What a simulated node is made of where it is not the real thing: a state in memory, and a log without files.

Whole nodes run :class:`space.wal.log.Log` on :class:`space.wal.faulty_disk.FaultyDisk`; for volume
:class:`LightLog` and :class:`LightStateFile` keep the same promises (what was not synced may be lost, and only
that) in a list, and all the rest is the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from random import Random
from typing import Final

import attrs

from space.events.codec import decode_batch
from space.events.commands import Buffer
from space.replication.replica import Item
from space.statemachine.apply import Context, apply
from space.statemachine.sequencer import record_reply
from space.statemachine.store import Applied
from space.statemachine.tables import Overlay, Reader
from space.wal.log import Log
from space.wal.raft_state import RaftState
from tests.chaos.sim_checks import Oracle
from tests.state_support import MemoryWriter, Rows

GENESIS: Final = bytes(32)


class PowerLossError(Exception):
    """The machine of a node stops here."""


# --- the state ----------------------------------------------------------------------------------------


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
            record_reply(overlay, entry.client, entry.sequence, position)
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


# --- a log without files --------------------------------------------------------------------------------


@attrs.frozen
class LightRecord:
    """One batch; as much of :class:`space.wal.segment_format.RecordInfo` as replication looks at."""

    index: int
    term: int
    time_ns: int
    metadata: bytes
    payload: bytes
    chain: bytes

    @property
    def payload_length(self) -> int:
        """Bytes of payload."""
        return len(self.payload)


class LightLog:
    """The part of :class:`space.wal.log.Log` that replication uses, on a list."""

    def __init__(self) -> None:
        self._records: list[LightRecord] = []
        self.durable_index = 0

    @property
    def last_index(self) -> int:
        return len(self._records)

    @property
    def last_term(self) -> int:
        return self._records[-1].term if self._records else 0

    @property
    def last_chain(self) -> bytes:
        return self._records[-1].chain if self._records else GENESIS

    @property
    def last_time_ns(self) -> int:
        return self._records[-1].time_ns if self._records else 0

    def append(self, metadata: bytes, payload: Sequence[Buffer] = (), *, time_ns: int, term: int = 0) -> int:
        if time_ns < self.last_time_ns:
            raise ValueError(f"time {time_ns} is before the last record's, {self.last_time_ns}")
        index, area = self.last_index + 1, b"".join(payload)
        chain = blake2b(
            b"%d %d %d " % (index, term, time_ns) + metadata + area, digest_size=32, key=self.last_chain
        )
        self._records.append(LightRecord(index, term, time_ns, metadata, area, chain.digest()))
        return index

    def sync(self) -> None:
        self.durable_index = self.last_index

    def truncate_after(self, index: int) -> None:
        del self._records[index:]
        self.durable_index = index

    def crash(self, rng: Random) -> None:
        """Power loss: any number of records that were not synced are gone."""
        del self._records[rng.randint(self.durable_index, self.last_index) :]
        self.durable_index = self.last_index

    def read(self, index: int) -> LightRecord:
        return self._records[index - 1]

    def read_batch(self, index: int) -> tuple[LightRecord, bytes]:
        record = self.read(index)
        return record, record.payload

    def term(self, index: int) -> int:
        return self.read(index).term

    def time_ns(self, index: int) -> int:
        return self.read(index).time_ns

    def records(self, start: int) -> Iterator[LightRecord]:
        return iter(self._records[start - 1 :])


class LightStateFile:
    """:class:`space.wal.raft_state.RaftStateFile` in a variable."""

    def __init__(self, state: RaftState) -> None:
        self.state = state
        self._durable = state

    def save(self, state: RaftState, *, sync: bool) -> None:
        before = self.state
        assert sync or (state.term, state.vote) == (before.term, before.vote)
        assert state.term >= before.term
        self.state = state
        if sync:
            self._durable = state

    def crash(self, rng: Random) -> None:
        """Power loss: what was saved unsynced may be gone."""
        self.state = rng.choice((self._durable, self.state))
        self._durable = self.state
