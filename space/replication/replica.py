"""One shard on one node: the consensus driver, the log and the state, without socket, clock or thread.

The way of a command on the leader: :meth:`Replica.submit` queues it; :meth:`Replica.work` decides everything
queued against the state plus all batches that are on their way (a chain of overlays), proposes the batch, and
hands out a :class:`Job` for the log and messages for the followers; when the batch is committed and durable here
it is applied and its callers are answered.  A follower gets the same batches as log records and folds them.

The bytes of a batch never pass through the engine: a Raft entry is only their size.  They travel beside the
append message (:class:`Blob`), lie in a bounded cache until they are applied, and are read from the log after that.

**Answers.**  Every answer is given when all that was decided before it is committed: also a refusal, which was
decided against batches that may never be; one that is based on nothing under way is confirmed by a ReadIndex.
What is under way when leadership is lost gets :class:`NotLeaderError`: its outcome is unknown, and a retry with
the same client id and sequence finds out.

**Time.**  The leader's clock, never before the entry before; entries the engine makes itself (a new leader's
empty one, a change of members) take their time from the entry before or from the change, so that every
replica writes the same record and the hash chains of all replicas are equal.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from random import Random
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs
import msgpack

from space._errors import CorruptionError, NotLeaderError, SpaceError, StorageError, UnavailableError
from space.events.codec import NO_LINK, Entry, batch_rows, chain_link, encode_batch, encode_event
from space.events.commands import Buffer, Receipt, Request
from space.events.ids import CLUSTER
from space.events.registry import BY_CLASS
from space.events.types import MembershipChanged
from space.replication.driver import (
    KIND_CHANGE,
    Boot,
    Driver,
    EngineFactory,
    Persist,
    Role,
    Settings,
)
from space.replication.wire import Blob
from space.statemachine.apply import REMOVED
from space.statemachine.sequencer import Prepared, prepare
from space.statemachine.store import Applied
from space.statemachine.tables import Reader
from space.wal.log import Log
from space.wal.raft_state import Configuration, RaftState, RaftStateFile
from space.wal.segment_writer import gather

if TYPE_CHECKING:
    from space_raft_engine import Entry as RaftEntry
    from space_raft_engine import Message

TAIL_BYTES: Final = 64 << 20
"""Bytes of applied batches kept for followers that are a little behind; older ones are read from the log."""

UNDER_WAY_BYTES: Final = 64 << 20
"""Payload proposed and not yet applied: bounds memory and what one append message can carry."""

APPLY_BATCHES: Final = 256
"""Batches applied before messages and ticks have their turn again: a replica that has much to apply still votes."""

LAG_BATCHES: Final = 64
LAG_TICKS: Final = 8
"""Committed batches a follower leaves unapplied, and for how long, if nobody there waits: rows and pages that many of
them change are then written and hashed once.  What a new leader has to catch up with takes it some ten milliseconds."""

UNDER_WAY_BATCHES: Final = 32
QUEUED_REQUESTS: Final = 16_384
"""More than this many requests waiting to be decided are refused: the caller tries again."""

DIGEST_EVERY: Final = 256
"""Positions between digests that replicas compare: cheap enough to keep, close enough to find a difference soon."""

DIGESTS_KEPT: Final = 64
BOOT_ENTRIES: Final = 4096
"""Retained entries a restart reads: a follower further behind than that is sent the log."""

EMPTY_BATCH: Final = encode_batch([])
EMPTY_ITEM_BYTES: Final = 32
_ITEM_BYTES: Final = 256  # what a cached batch takes beside its bytes
_ACTOR: Final = "cluster"


class Machine(Protocol):
    """The state and the views of a shard, as the replica needs them."""

    @property
    def applied(self) -> Applied:
        """Up to where it stands."""

    def reading(self) -> AbstractContextManager[Reader]:
        """The state as it stands, to decide against."""

    def apply(self, batches: Sequence[Item]) -> None:
        """Folds consecutive batches in one transaction; those with ``prepared`` set need not be decoded.

        Raises:
            CorruptionError: they contradict the state.
            StorageError: no room; nothing changed.
        """

    def catch_up(self, log: Log, position: int) -> None:
        """Folds the log up to ``position``."""


@attrs.define
class Item:
    """One batch on its way: a record to be (:class:`space.projections.feed.Record`), then an applied one."""

    index: int
    term: int
    time_ns: int
    metadata: bytes
    payload: Sequence[Buffer]
    size: int
    chain: bytes = b""
    prepared: Prepared | None = None

    @property
    def cost(self) -> int:
        """Bytes of memory."""
        return self.size + _ITEM_BYTES


@attrs.define
class Job:
    """Work for the writer: append batches and save the Raft state, so that both are durable.

    Jobs are carried out in order; several may share one :meth:`sync`.
    """

    persist: Persist
    items: list[Item]
    log: Log
    state_file: RaftStateFile
    failure: SpaceError | None = None

    def write(self) -> None:
        """Everything but the sync of the log.

        Raises:
            StorageError: the disk refused; then this replica must stop and start again from what is there.
        """
        state = self.persist.state
        if state is not None and self.persist.state_first:
            self.state_file.save(state, sync=True)
        if self.items and self.items[0].index <= self.log.last_index:
            self.log.truncate_after(self.items[0].index - 1)
        for item in self.items:
            index = self.log.append(item.metadata, item.payload, time_ns=item.time_ns, term=item.term)
            if index != item.index:
                raise StorageError(f"the log took entry {item.index} at position {index}")
            item.chain = self.log.last_chain
        if state is not None and not self.persist.state_first:
            self.state_file.save(state, sync=False)

    def sync(self) -> None:
        """Makes it durable.

        Raises:
            StorageError: as for :meth:`write`.
        """
        if self.items:
            self.log.sync()


@attrs.define(eq=False)
class Ticket:
    """Commands of one caller, decided in order; ``done`` is called once with an outcome for each."""

    requests: list[Request]
    done: Callable[[list[Receipt | SpaceError]], None]
    outcomes: list[Receipt | SpaceError] = attrs.field(factory=list)
    exempt: bool = False
    origin: int = 0
    """The member that handed them in for its callers, and applies them before it tells; 0: nobody but this node."""


@attrs.define(eq=False)
class _Answer:
    """A ticket that is decided, and the position that must be applied before it may be told."""

    ticket: Ticket
    position: int


@attrs.frozen
class Send:
    """A message that may leave now."""

    to: int
    kind: str
    message: bytes
    blobs: list[Blob]

    @property
    def urgent(self) -> bool:
        """Whether it must not wait behind payload."""
        return not self.blobs


@attrs.frozen
class Offer:
    """A peer says that this replica is too far behind for single entries: it has the log up to ``index``.

    It has to be told in any case: if that much is committed here, then only the peer has not heard of it.
    """

    sender: int
    term: int
    index: int
    index_term: int
    configuration: Configuration


@attrs.define
class Work:
    """What :meth:`Replica.work` wants done."""

    sends: list[Send] = attrs.field(factory=list)
    jobs: list[Job] = attrs.field(factory=list)
    answers: list[Callable[[], None]] = attrs.field(factory=list)
    offer: Offer | None = None
    reopen: bool = False
    more: bool = False
    """Whether there is more to apply: :meth:`Replica.work` again, when others had their turn."""


class _Root:
    """The reader under the chain of overlays: the state as it stands whenever something is decided."""

    get: Any
    getter: Any
    scan: Any
    last_at_or_before: Any

    def __init__(self) -> None:
        self._reader: Reader | None = None

    @property
    def reader(self) -> Reader | None:
        """Whose rows these are."""
        return self._reader

    @reader.setter
    def reader(self, reader: Reader | None) -> None:
        self._reader = reader
        for name in _READS:  # bound here: decided commands come through by the thousand
            setattr(self, name, getattr(reader, name, None))


_READS: Final = ("get", "getter", "scan", "last_at_or_before")


@attrs.frozen
class Digest:
    """State and log of a replica at one position."""

    position: int
    digest: int
    chain: bytes


class Replica:
    """See the module's text.  One thread only, the owner of the group; jobs run on another."""

    def __init__(
        self,
        *,
        log: Log,
        state_file: RaftStateFile,
        machine: Machine,
        settings: Settings,
        random: Random,
        incarnation: int,
        engine: EngineFactory | None = None,
    ) -> None:
        """Starts from what is durable; the machine must stand at or before what was committed.

        Raises:
            CorruptionError: log, Raft state and machine do not fit together.
            UnavailableError: the engine is not installed.
        """
        self.log = log
        self.machine = machine
        self.state_file = state_file
        self._settings = settings
        self._random = random
        self._engine = engine
        self._tail: dict[int, Item] = {}  # in index order
        self._tail_bytes = 0
        self._stash: dict[tuple[int, int], Blob] = {}
        self._chain: deque[Item] = deque()  # decided here, not yet applied
        self._under_way = 0
        self._queue: deque[Ticket] = deque()
        self._queued = 0
        self._answers: deque[_Answer] = deque()
        self._confirming: set[Ticket] = set()
        self._waiting: list[tuple[int, Callable[[SpaceError | None], None]]] = []
        self._reading: dict[object, list[Callable[[SpaceError | None], None]]] = {}
        self._next_reading: list[Callable[[SpaceError | None], None]] = []
        self._root = _Root()
        self._last_time = 0
        self._led = 0  # the term that was led when it was looked at last
        self._done: list[Callable[[], None]] = []
        self._to_apply = APPLY_BATCHES
        self._offer: Offer | None = None
        self._writing = 0  # jobs handed out and not yet carried out
        self._unsaved: RaftState | None = None
        self._notes: dict[int, Send] = {}
        self._ticked = False
        self._lagged = 0  # ticks since something was applied
        self._awaited: dict[
            int, deque[int]
        ] = {}  # member → positions its callers wait for; as many as _answers
        self.frozen = False
        """While set, only exempt tickets are decided: for work that must not race with writers (gc)."""
        self.held = False
        """While set, nothing is applied: for work that must not race with the tables (a rebuild)."""
        self.digests: deque[Digest] = deque(maxlen=DIGESTS_KEPT)
        self._start(incarnation)

    def _start(self, incarnation: int) -> None:
        state = self.state_file.state
        if state is None:
            raise CorruptionError("this log belongs to no cluster", segment="raft")
        commit = min(max(state.commit, self.machine.applied.position), self.log.last_index)
        effective = in_effect(self.log, max(self.machine.applied.position, state.configuration_index), commit)
        if self.machine.applied.position < effective:
            self.machine.catch_up(self.log, effective)
        applied = self.machine.applied.position
        if applied < state.configuration_index:
            raise CorruptionError(
                f"the log ends at position {self.log.last_index}, and members changed at {state.configuration_index}",
                segment="raft",
                position=self.log.last_index + 1,
                hint="heal it from the other members: space serve does that when it can reach them",
            )
        self.driver = Driver(
            Boot(state, *retained(self.log, applied), applied),
            self._settings,
            self._random,
            incarnation=incarnation,
            engine=self._engine,
        )
        self._last_time = self.log.last_time_ns

    def reopen(self, incarnation: int) -> None:
        """Starts the consensus anew from what is durable; every job handed out must have been carried out.

        For when it left its group as leader, and after :meth:`space.replication.node` brought the log forward.
        """
        self._lose("this node starts anew in its group")
        self._tail.clear()
        self._tail_bytes = 0
        self._stash.clear()
        self._offer = None
        self._writing = 0
        self._unsaved = None  # it is from before: what was saved since knows more
        for waiting in self._reading.values():  # the new engine knows nothing of these
            self._next_reading.extend(waiting)
        self._reading.clear()
        self._start(incarnation)

    # --- what it is --------------------------------------------------------------------------------

    @property
    def role(self) -> Role:
        """Leader, follower or in between."""
        return self.driver.role

    def leads(self) -> bool:
        """Whether it is the leader, as far as it knows."""
        return self.driver.role is Role.LEADER

    @property
    def decides(self) -> bool:
        """Whether commands can be decided here and now."""
        driver = self.driver
        return (
            driver.role is Role.LEADER
            and 0 < driver.term_start <= self.machine.applied.position
            and not driver.must_reopen
        )

    @property
    def under_way(self) -> int:
        """Batches decided here and not yet applied."""
        return len(self._chain)

    # --- inputs ------------------------------------------------------------------------------------

    def tick(self) -> None:
        """A tick has passed."""
        self.driver.tick()
        self._ticked = True
        self._lagged += 1

    def receive(self, sender: int, message: bytes, blobs: Sequence[Blob]) -> None:
        """A message from a member of the group.

        Raises:
            UnavailableError: it is malformed; the peer is at fault.
            StorageError: it says what cannot be unless something durable was lost here: this replica must stop.
        """
        from space_raft_engine import Panic, RaftError, describe

        try:
            found = describe(message)
            if found.kind == "MsgSnapshot":
                self._offered(sender, found)
                return
            by_index = {blob.index: blob for blob in blobs}
            for index, (term, size) in enumerate(found.entries, found.first):
                if size:
                    blob = by_index.get(index)
                    if blob is None or _size(blob) != size:
                        raise UnavailableError(f"entry {index} came without its {size} bytes")
                    self._stash[index, term] = blob
            self.driver.receive(message)
        except Panic as error:
            raise StorageError(
                f"the log here is not what node {sender} was told of: {error}",
                hint="this disk has lost what it acknowledged: remove this node and add it anew, empty",
            ) from error
        except RaftError as error:
            raise UnavailableError(f"a message of node {sender} was refused: {error}") from None

    def _offered(self, sender: int, found: Any) -> None:
        index, term, made = found.snapshot
        if found.term < self.driver.term:
            return
        from space.replication.driver import configuration

        self._offer = Offer(sender, found.term, index, term, configuration(made))

    def submit(self, ticket: Ticket) -> None:
        """Queues commands to be decided here; answered through the ticket, on a later :meth:`work`.

        Raises:
            NotLeaderError: this node does not lead.
            UnavailableError: too many wait already.
        """
        if self.driver.role is not Role.LEADER:
            raise self.driver.not_leader()
        if self._queued + len(ticket.requests) > QUEUED_REQUESTS and self._queued:
            raise UnavailableError("too many commands wait to be decided", hint="try again a little later")
        self._queue.append(ticket)
        self._queued += len(ticket.requests)

    def read(self, done: Callable[[SpaceError | None], None]) -> None:
        """Calls ``done`` once the state here is at least as new as anything acknowledged before now (ReadIndex)."""
        self._next_reading.append(done)

    def when_applied(self, position: int, done: Callable[[SpaceError | None], None]) -> None:
        """Calls ``done`` once ``position`` is applied here."""
        if position <= self.machine.applied.position:
            self._done.append(lambda: done(None))
        else:
            self._waiting.append((position, done))

    def change(self, change: bytes) -> int:
        """See :meth:`space.replication.driver.Driver.change`."""
        index = self.driver.change(change)
        self._last_time = max(self._last_time, change_time(change))  # what is decided next comes after it
        return index

    def written(self, job: Job) -> None:
        """The oldest job handed out has been carried out, and is durable."""
        self._writing -= 1
        self.driver.persisted(job.persist)

    # --- work --------------------------------------------------------------------------------------

    def work(self, now_ns: int) -> Work:
        """Carries on with everything that can be carried on; returns what the shell has to do."""
        work = Work()
        self._to_apply = APPLY_BATCHES
        moved = True
        while moved and not self.driver.must_reopen:
            moved = self._collect(work)
            moved |= self._apply()
            moved |= self._decide(now_ns)
            moved |= self._ask()
        for message in self.driver.sends():
            send = self._send(message)
            if send is not None and not self._can_wait(send, message):
                work.sends.append(send)
        if self._ticked:
            self._ticked = False
            work.sends.extend(self._notes.values())
            self._notes.clear()
        waiting = len(self._waiting)
        self._read_done()
        work.more = self._to_apply == 0 or len(self._waiting) > waiting
        self._settle()
        work.answers, self._done = self._done, []
        work.offer, self._offer = self._offer, None
        work.reopen = self.driver.must_reopen
        return work

    def _collect(self, work: Work) -> bool:
        found = self.driver.collect()
        # The driver may have collected before, when something was durable: what counts is what was led until now.
        leading = self.driver.term if self.leads() else 0
        if self._led not in (0, leading):
            self._lose("leadership of the group was lost")
        self._led = leading
        # What the engine appends replaces the tail from there on; what was proposed here comes again with it.
        replaced: dict[int, Item] = {}
        for persist in self.driver.persists():
            if self._is_news(persist):
                self._unsaved = persist.state
                self.driver.persisted(persist)
                found = True
                continue
            items = []
            for entry in persist.entries:
                while self._tail and (latest := next(reversed(self._tail))) >= entry[0]:
                    replaced[latest] = self._forget(latest)
                items.append(self._item(entry, replaced))
                self._remember(items[-1])  # the one after it may take its time from it
            if items:
                self._last_time = items[-1].time_ns  # the end of the log, whoever made what is before it
            persist.state = persist.state or self._unsaved
            self._unsaved = None
            self._writing += 1
            work.jobs.append(Job(persist, items, self.log, self.state_file))
        self._stash.clear()
        return found

    def _is_news(self, persist: Persist) -> bool:
        """Whether a step has nothing that must be durable: a higher commit index, while no other step is under way.

        It is saved with the next step.  Lost before that, it is found again (rule 9); a step of its own would
        wake the writer a second time for every batch.
        """
        return not (persist.entries or persist.state_first or persist.configures or self._writing)

    def _item(self, entry: RaftEntry, replaced: dict[int, Item]) -> Item:
        """The batch of an entry that goes to the log."""
        index, term, kind, size, change = entry
        known = replaced.get(index)
        if known is not None and known.term == term:
            return known  # proposed here
        if kind == KIND_CHANGE:
            return self._special(index, term, change)
        if size == 0:
            return self._special(index, term, None)
        blob = self._stash[index, term]
        return Item(index, term, blob.time_ns, blob.metadata, blob.payload, size)

    def _special(self, index: int, term: int, change: bytes | None) -> Item:
        """The batch of an entry that the engine made: the same bytes on every replica."""
        time_ns = self._time_before(index)
        metadata = EMPTY_BATCH
        if change is not None:
            time_ns = max(time_ns, change_time(change))
            metadata = encode_change_batch(change, time_ns)
        return Item(index, term, time_ns, metadata, (), 0)

    def _time_before(self, index: int) -> int:
        before = self._tail.get(index - 1)
        if before is not None:
            return before.time_ns
        return self.log.time_ns(index - 1) if index > 1 else 0

    def _remember(self, item: Item) -> None:
        assert item.index not in self._tail, "an entry that was not forgotten"
        self._tail[item.index] = item
        self._tail_bytes += item.cost

    def _forget(self, index: int) -> Item:
        item = self._tail.pop(index)
        self._tail_bytes -= item.cost
        return item

    def _trim(self, applied: int) -> None:
        """Lets go of applied batches beyond what is worth keeping."""
        while self._tail_bytes > TAIL_BYTES:
            oldest = next(iter(self._tail))
            if oldest > applied:
                return
            self._forget(oldest)

    # --- deciding ------------------------------------------------------------------------------------

    def _decide(self, now_ns: int) -> bool:
        """Decides what is queued, one batch after the other, as far as there is room under way."""
        if not self._queue or not self.decides:
            return False
        moved = False
        while self._queue and len(self._chain) < UNDER_WAY_BATCHES and self._under_way < UNDER_WAY_BYTES:
            tickets = self._next()
            if not tickets:
                break
            try:
                self._batch(tickets, now_ns)
            except NotLeaderError as error:
                for ticket in tickets:
                    self._answer(ticket, [error] * len(ticket.requests))
            moved = True
        return moved

    def _next(self) -> list[Ticket]:
        if not self.frozen:
            tickets = list(self._queue)
            self._queue.clear()
        else:
            tickets = [ticket for ticket in self._queue if ticket.exempt]
            self._queue = deque(ticket for ticket in self._queue if not ticket.exempt)
        return tickets

    def _batch(self, tickets: list[Ticket], now_ns: int) -> None:
        """Decides the first requests of ``tickets`` as one batch; what does not fit goes back to the queue."""
        requests = [request for ticket in tickets for request in ticket.requests[len(ticket.outcomes) :]]
        position = self.driver.last_index + 1
        time_ns = max(now_ns, self._last_time)
        parent: Any = (
            self._chain[-1].prepared.overlay if self._chain and self._chain[-1].prepared else self._root
        )
        with self.machine.reading() as reader:
            self._root.reader = reader
            try:
                batch = prepare(parent, requests, position=position, time_ns=time_ns)
            finally:
                self._root.reader = None
        if batch.entries:
            metadata = batch.metadata()
            payload = gather(batch.payload)  # once, for the log and every follower
            size = len(metadata) + sum(map(len, payload))
            index = self.driver.propose([size])
            assert index == position
            item = Item(index, self.driver.term, time_ns, metadata, payload, size, prepared=batch)
            self._remember(item)
            self._chain.append(item)
            self._under_way += item.cost
            self._last_time = time_ns
        self._share(tickets, batch)

    def _share(self, tickets: list[Ticket], batch: Prepared) -> None:
        """Gives each ticket its outcomes; those that are complete wait for what they were decided on."""
        at = 0
        rest: list[Ticket] = []
        position = self._chain[-1].index if self._chain else 0
        for ticket in tickets:
            outcomes = batch.outcomes[at : at + len(ticket.requests) - len(ticket.outcomes)]
            at += len(outcomes)
            ticket.outcomes.extend(outcomes)
            self._queued -= len(outcomes)
            if len(ticket.outcomes) < len(ticket.requests):
                rest.append(ticket)
            elif position:
                self._answers.append(_Answer(ticket, position))
                if ticket.origin:
                    self._awaited.setdefault(ticket.origin, deque()).append(position)
            else:
                self._confirm(ticket)
        self._queue.extendleft(reversed(rest))

    def _confirm(self, ticket: Ticket) -> None:
        """An answer that rests on no batch under way: is this still the leader?"""
        self._confirming.add(ticket)

        def confirmed(error: SpaceError | None) -> None:
            if ticket in self._confirming:  # else leadership was lost since, and it has been told
                self._confirming.discard(ticket)
                self._tell(ticket, [error] * len(ticket.requests) if error else ticket.outcomes)

        self._next_reading.append(confirmed)

    def _answer(self, ticket: Ticket, outcomes: list[Receipt | SpaceError]) -> None:
        self._queued -= len(ticket.requests) - len(ticket.outcomes)
        self._tell(ticket, outcomes)

    def _tell(self, ticket: Ticket, outcomes: Sequence[Receipt | SpaceError | None]) -> None:
        told = [outcome for outcome in outcomes if outcome is not None]
        self._done.append(lambda: ticket.done(told))

    def _lose(self, why: str) -> None:
        """Tells everybody who waits for a decision made here that its outcome is unknown."""
        error = NotLeaderError(why, leader=self.driver.leader)
        for ticket in self._queue:
            self._tell(ticket, [error] * len(ticket.requests))
        for ticket in (*(answer.ticket for answer in self._answers), *self._confirming):
            self._tell(ticket, [error] * len(ticket.requests))
        self._confirming.clear()
        self._queue.clear()
        self._queued = 0
        self._answers.clear()
        self._awaited.clear()
        self._notes.clear()
        for item in self._chain:
            item.prepared = None  # if it is committed all the same, it is folded like anybody's
        self._chain.clear()
        self._under_way = 0

    # --- applying ------------------------------------------------------------------------------------

    def _apply(self) -> bool:
        if self.held or self._can_lag():
            return False
        entries = self.driver.committed(self._to_apply)
        self._to_apply -= len(entries)
        if not entries:
            return False
        self._lagged = 0
        run: list[Item] = []
        for entry in entries:
            run.append(self._applicable(entry[0], entry[1]))
            if entry[0] % DIGEST_EVERY == 0:
                self._apply_run(run)
                run = []
        if run:
            self._apply_run(run)
        applied = entries[-1][0]
        self.driver.applied(applied)
        self._trim(applied)
        return True

    def _can_lag(self) -> bool:
        """Whether what is committed may be applied a little later, together with what comes until then."""
        return not (
            self._lagged >= LAG_TICKS
            or self.driver.role is Role.LEADER
            or self.driver.commit - self.machine.applied.position >= LAG_BATCHES
            or self._tail_bytes > TAIL_BYTES
            or any(position <= self.driver.commit for position, _ in self._waiting)
        )

    def _applicable(self, index: int, term: int) -> Item:
        item = self._tail.get(index)
        if item is not None and item.term == term and item.chain:
            return item
        info = self.log.read(index)
        return Item(index, info.term, info.time_ns, info.metadata, (), 0, info.chain)

    def _apply_run(self, run: list[Item]) -> None:
        self.machine.apply(run)
        applied = self.machine.applied
        if applied.position % DIGEST_EVERY == 0:
            self.digests.append(Digest(applied.position, applied.digest, applied.chain))
        for item in run:
            if self._chain and self._chain[0] is item:
                self._chain.popleft()
                self._under_way -= item.cost
                following = self._chain[0].prepared if self._chain else None
                if following is not None:
                    following.overlay.rebase(self._root)
            item.prepared = None

    def _settle(self) -> None:
        """Answers everybody whose position is applied by now."""
        applied = self.machine.applied.position
        while self._answers and self._answers[0].position <= applied:
            answer = self._answers.popleft()
            self._tell(answer.ticket, answer.ticket.outcomes)
        if self._waiting:
            ready = [done for position, done in self._waiting if position <= applied]
            self._waiting = [each for each in self._waiting if each[0] > applied]
            self._done.extend([_call(done) for done in ready])

    # --- reading -------------------------------------------------------------------------------------

    def _ask(self) -> bool:
        """One ReadIndex for everybody who came since the last one."""
        if not self._next_reading:
            return False
        token = object()
        self._reading[token] = self._next_reading
        self._next_reading = []
        self.driver.read(token)
        return True

    def _read_done(self) -> None:
        for token, index in self.driver.reads():
            for done in self._reading.pop(token, ()):
                self.when_applied(index, done)

    # --- sending -------------------------------------------------------------------------------------

    def _can_wait(self, send: Send, message: Message) -> bool:
        """Keeps an append without entries, which says no more than that something is committed, until the next tick.

        The next append says it too.  Only a member whose callers wait until it has applied is told at once.
        """
        if message.kind != "MsgAppend":
            return False
        self._notes.pop(send.to, None)
        awaited, told = self._awaited.get(send.to), bool(message.entries)
        while awaited and awaited[0] <= self.driver.commit:
            awaited.popleft()
            told = True
        if not told:
            self._notes[send.to] = send
        return not told

    def _send(self, message: Message) -> Send | None:
        """A message with the bytes of its entries; None if they are no longer what it says."""
        blobs = []
        for index, (term, size) in enumerate(message.entries, message.first):
            if not size:
                continue
            item = self._tail.get(index)
            if item is not None and item.term == term:
                blobs.append(Blob(index, item.time_ns, item.metadata, item.payload))
                continue
            try:
                info, payload = self.log.read_batch(index)
            except SpaceError:
                # Cut off meanwhile; or its payload was reclaimed, which an append cannot say and a shipment can.
                self.driver.forget(index)
                return None
            if info.term != term:
                if info.term == 0:
                    self.driver.forget(
                        index
                    )  # from before the log was replicated: it is sent as it is, or not at all
                return None
            blobs.append(Blob(index, info.time_ns, info.metadata, (payload,) if payload else ()))
        return Send(message.to, message.kind, message.data, blobs)


def _size(blob: Blob) -> int:
    """Bytes of an entry, as the engine counts them."""
    return len(blob.metadata) + sum(map(len, blob.payload))


def _call(done: Callable[[SpaceError | None], None]) -> Callable[[], None]:
    return lambda: done(None)


# --- entries and records ------------------------------------------------------------------------------


def encode_change_context(time_ns: int, addresses: dict[int, str]) -> bytes:
    """What a change of members carries beside node ids: when, and where new members are."""
    packed: bytes = msgpack.packb([time_ns, sorted(addresses.items())])
    return packed


def change_time(change: bytes) -> int:
    """When a change was proposed; 0 for one the engine made."""
    return _context(change)[0]


def change_addresses(change: bytes) -> dict[int, str]:
    """Addresses that came with a change."""
    return _context(change)[1]


def _context(change: bytes) -> tuple[int, dict[int, str]]:
    from space_raft_engine import RaftError, decode_change

    with contextlib.suppress(RaftError, ValueError, TypeError, msgpack.UnpackException):
        time_ns, addresses = msgpack.unpackb(decode_change(change)[2], strict_map_key=False)
        if type(time_ns) is int and 0 <= time_ns < 1 << 63:
            return time_ns, {int(node): str(address) for node, address in addresses}
    return 0, {}


_ROLES: Final = {"add": "voter", "learner": "learner", "remove": REMOVED}


def encode_change_batch(change: bytes, time_ns: int) -> bytes:
    """The batch that a membership change is in the log: a function of its arguments alone."""
    from space_raft_engine import decode_change

    addresses = change_addresses(change)
    members = [[node, _ROLES[what], addresses.get(node, "")] for what, node in decode_change(change)[0]]
    event = MembershipChanged(CLUSTER, change, msgpack.packb(members))
    link = chain_link(NO_LINK, encode_event(event))
    return encode_batch([Entry(b"", 0, time_ns, _ACTOR, ((link, event),))])


_CHANGE_HEAD: Final = 32  # the actor of a change is in these bytes: other batches need not be decoded
_MEMBERSHIP: Final = BY_CLASS[MembershipChanged].number


def change_of(metadata: bytes) -> bytes | None:
    """The membership change a batch is, or None if it is another batch."""
    if _ACTOR.encode() not in metadata[:_CHANGE_HEAD] or len(metadata) > 1 << 16:
        return None
    rows = batch_rows(metadata)
    if len(rows) != 1 or len(rows[0][4]) != 1 or rows[0][4][0][0] != _MEMBERSHIP:
        return None
    change = rows[0][4][0][4]
    return change if isinstance(change, bytes) else None


def in_effect(log: Log, start: int, commit: int) -> int:
    """How much of what is committed may be folded, from ``start`` on.

    A change of members is not before its configuration is durable (rule 2), so the driver has to bring it into effect
    first: what was folded is not given to it again, and the change would never be.
    """
    for info in log.records(start + 1, commit + 1) if start < commit else ():
        if change_of(info.metadata) is not None:
            return info.index - 1
    return commit


def retained(
    log: Log, applied: int, count: int = BOOT_ENTRIES
) -> tuple[tuple[int, int], list[tuple[int, int, int, bytes]]]:
    """The end of a log in the engine's terms: the entry before, and (term, kind, size, change) of each after it.

    At least everything that is not applied; nothing applied from before the log was replicated (term 0): a replica
    without it is sent the log, because as an entry it would become a record of another term.
    """
    start = max(0, min(applied, log.last_index - count))
    while start < applied and log.term(start + 1) == 0:
        start += 1
    before = (start, _engine_term(log.term(start))) if start else (0, 0)
    entries = []
    for info in log.records(start + 1):
        term, change = _engine_term(info.term), change_of(info.metadata)
        if change is not None:
            entries.append((term, KIND_CHANGE, 0, change))
        elif info.metadata == EMPTY_BATCH and not info.payload_length:
            entries.append((term, 0, 0, b""))
        else:
            entries.append((term, 0, len(info.metadata) + info.payload_length, b""))
    return before, entries


def _engine_term(term: int) -> int:
    """To the engine, term 0 is that of an entry it does not have; a group's own entries begin in term 1."""
    return max(term, 1)
