"""One Raft group on one node, without I/O: what to send, what to make durable, what to apply, and when.

The consensus itself is the engine's (crate ``raft``, package ``space_raft_engine``; Ongaro and Ousterhout,
"In search of an understandable consensus algorithm", 2014; Ongaro's thesis, 2014, for PreVote, ReadIndex and
membership).  What is here is the order of effects around it, which the engine leaves to its caller:

1. ``messages`` leave at once, so that a leader replicates while it syncs;
2. one :class:`Persist` after the other is carried out by a writer, many in one fdatasync;
3. :meth:`Driver.persisted` releases the messages that had to wait for it;
4. :meth:`Driver.committed` hands out what may be applied, :meth:`Driver.applied` notes that it was.

Nine rules, each found by simulation, each tested with a control that must fail without it
(``tests/chaos/test_rules.py``); a comment ``rule N`` marks where a rule is kept:

1. Appends are batched by proposing several entries at once, never by the engine's ``batch_append``.
2. Before a membership change at index k takes effect, commit ≥ k and the resulting configuration are durable.
3. A leader that leaves the configuration hands over first; if that race is lost, its engine is made anew.
4. What a changed term or vote says leaves only when that term and vote are durable.
5. A snapshot carries the applied index and the configuration of exactly that index.
6. A change that is impossible is refused before it is proposed, and changes nothing if it was committed.
7. A leader that finds itself in a joint configuration nobody is about to leave, leaves it.
8. A ReadIndex may be lost in silence: every attempt has its own context, a time limit and a successor.
9. What is applied is never ahead of the commit that a restart will find.

Also: only a leader proposes, proposals never come from the network, and nothing is applied before it is
durable here.
"""

from __future__ import annotations

import enum
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Final

import attrs

from space._errors import ConflictError, NotLeaderError, Status, UnavailableError, UsageError
from space.wal.raft_state import Configuration, RaftState

if TYPE_CHECKING:
    from space_raft_engine import Entry, Message, Node

KIND_NORMAL: Final = 0
KIND_CHANGE: Final = 2

RETAINED_ENTRIES: Final = 65_536
"""Entries the engine can send by itself (a few bytes each); a replica further behind is sent the log."""

_CONTEXT: Final = struct.Struct(">QQQ")  # node, incarnation, number


class Role(enum.Enum):
    """What a replica is to its group."""

    FOLLOWER = "follower"
    PRECANDIDATE = "precandidate"
    CANDIDATE = "candidate"
    LEADER = "leader"


@attrs.frozen
class Settings:
    """How a group behaves; times are in ticks, the shell says how long one is.

    Attributes:
        election: ticks without a leader after which a replica stands for election, at least; at most twice that.
        heartbeat: ticks between heartbeats.
        message_bytes: payload a single append message carries, at most (one batch always fits).
        inflight: append messages under way to one follower.
        read_retry: ticks after which an unanswered ReadIndex is asked anew.
        snapshot_retry: ticks after which a snapshot whose outcome nobody told is offered anew.
        retained: entries the engine keeps; see :data:`RETAINED_ENTRIES`.
    """

    election: int = 16
    heartbeat: int = 3
    message_bytes: int = 4 << 20
    inflight: int = 64
    read_retry: int = 8
    snapshot_retry: int = 64
    retained: int = RETAINED_ENTRIES


@attrs.define
class Persist:
    """One step for the writer: make ``state`` and ``entries`` durable, in order.

    ``state`` with ``state_first`` is durable before the entries are written; otherwise it may follow unsynced.
    Entries replace whatever the log has from the first one's index on.
    """

    number: int
    state: RaftState | None
    state_first: bool
    entries: list[Entry]
    then: list[Message] = attrs.field(factory=list)
    configures: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing for the writer to do."""
        return self.state is None and not self.entries


@attrs.define
class _Read:
    context: bytes
    asked: int  # tick


@attrs.frozen
class Boot:
    """What a restart finds: the durable state, and the terms of the retained end of the log.

    Attributes:
        state: as last saved.
        before: index and term of the entry before the retained ones.
        entries: (term, kind, size, change) of each entry after that.
        applied: up to where the state of the machine stands.
    """

    state: RaftState
    before: tuple[int, int]
    entries: Sequence[tuple[int, int, int, bytes]]
    applied: int

    @property
    def last(self) -> int:
        """Index of the last entry."""
        return self.before[0] + len(self.entries)


EngineFactory = Callable[..., "Node"]


def load_engine() -> EngineFactory:
    """The consensus engine.

    Raises:
        UnavailableError: its package is not installed.
    """
    try:
        from space_raft_engine import Node
    except ImportError:
        raise UnavailableError(
            "the consensus engine is not installed",
            hint="pip install ./raft-engine (needs Rust and protoc); a single node works without it",
        ) from None
    return Node


class Driver:
    """See the module's text.  Not thread-safe; every method returns at once."""

    def __init__(
        self,
        boot: Boot,
        settings: Settings,
        random: Random,
        *,
        incarnation: int,
        engine: EngineFactory | None = None,
    ) -> None:
        """Starts from what is durable.

        Args:
            incarnation: differs for every start of this node, so that no ReadIndex context comes twice.

        Raises:
            UnavailableError: the engine is not installed.
        """
        self._settings = settings
        self._random = random
        self._incarnation = incarnation
        self._state = boot.state
        self.node = boot.state.node
        # What was applied was committed, whatever an unsynced save of the commit index has lost (rule 9);
        # and what was committed but is not in the log (also unsynced) is learnt again from the leader.
        commit = min(max(boot.state.commit, boot.applied), boot.last)
        self._engine = (engine or load_engine())(
            id=self.node,
            conf_state=conf_state(boot.state.configuration),
            term=boot.state.term,
            vote=boot.state.vote,
            commit=commit,
            applied=boot.applied,
            before=boot.before,
            entries=boot.entries,
            election_tick=settings.election,
            heartbeat_tick=settings.heartbeat,
            max_message_bytes=settings.message_bytes,
            max_inflight=settings.inflight,
        )
        self._ticks = 0
        self._number = 0
        self._persists: deque[Persist] = deque()  # handed out and not yet durable, in order
        self._out: list[Persist] = []  # not yet handed out
        self._sends: list[Message] = []
        self._fence = 0  # number of the last Persist that makes a term or vote durable
        self._committed: deque[Entry] = deque()
        self._changing = False  # a configuration is being made durable
        self._effective = boot.state.configuration_index  # index of the last change in effect
        self._reads: dict[object, _Read] = {}
        self._read_number = 0
        self._answered: list[tuple[object, int]] = []
        self._offered: dict[int, int] = {}  # followers in need of a snapshot, and the tick of the last offer
        self._role, self._leader = Role.FOLLOWER, 0
        self._term_start = 0
        self.must_reopen = False
        self._draw_timeout()

    # --- what it is --------------------------------------------------------------------------------

    @property
    def role(self) -> Role:
        """What this replica is, as of the last :meth:`collect`."""
        return self._role

    @property
    def leader(self) -> int:
        """Who leads, 0 if nobody is known."""
        return self._leader

    @property
    def term(self) -> int:
        """Current term."""
        return self._engine.term

    @property
    def commit(self) -> int:
        """Index up to which entries are known to be committed."""
        return self._engine.commit

    @property
    def last_index(self) -> int:
        """Index of the last entry, durable or not."""
        return self._engine.last_index

    @property
    def term_start(self) -> int:
        """Index of the first entry of a leader's own term: what was committed before it is known once it is applied."""
        return self._term_start

    @property
    def configuration(self) -> Configuration:
        """The membership in effect."""
        return configuration(self._engine.conf_state)

    @property
    def state(self) -> RaftState:
        """What was last given out to be made durable."""
        return self._state

    def progress(self) -> Mapping[int, tuple[int, int, str, bool, int]]:
        """Of a leader, each follower's (match, next, state, recently active, pending snapshot)."""
        return self._engine.status().progress

    # --- inputs ------------------------------------------------------------------------------------

    def tick(self) -> None:
        """A tick of the clock has passed."""
        self._ticks += 1
        self._engine.tick()
        for token, read in list(self._reads.items()):
            if self._ticks - read.asked >= self._settings.read_retry:
                self._ask(token)  # rule 8
        self._leave_joint()
        self._offer_again()

    def receive(self, message: bytes) -> None:
        """A message of a peer; snapshots are not for here (see :meth:`space.replication.replica.Replica.receive`)."""
        self._engine.step(message)

    def propose(self, sizes: Sequence[int]) -> int:
        """Appends entries of these many bytes as the leader; returns the index of the first.

        Raises:
            NotLeaderError: this is not the leader.
        """
        from space_raft_engine import Dropped

        try:
            return self._engine.propose(sizes)  # rule 1
        except Dropped:
            raise self.not_leader() from None

    def change(self, change: bytes) -> int:
        """Proposes a membership change; returns its index.

        Raises:
            NotLeaderError: this is not the leader, or it is about to leave and hands over first.
            UsageError: it is impossible.
            ConflictError: another one is under way.
        """
        from space_raft_engine import Dropped, RaftError

        if self._role is not Role.LEADER:
            raise self.not_leader()
        try:
            after = configuration(self._engine.preview_change(change))  # rule 6
        except RaftError as error:
            raise UsageError(f"not a possible change of members: {error}") from None
        if self.node not in after.voters:  # rule 3
            target = self._successor(after)
            if target == 0:
                raise ConflictError(
                    "no other voter is up to date", hint="add one first", status=Status.UNAVAILABLE
                )
            self._engine.transfer_leader(target)
            raise self.not_leader()
        try:
            return self._engine.propose_change(change)
        except Dropped:
            raise ConflictError(
                "another change of members is under way",
                hint="try again when it is done",
                status=Status.UNAVAILABLE,
            ) from None

    def _successor(self, after: Configuration) -> int:
        """The voter that stays and is furthest."""
        known = self.progress()
        found = [
            (known[each][0], each)
            for each in after.voters
            if each != self.node and each in known and known[each][3]
        ]
        return max(found)[1] if found else 0

    def transfer(self, node: int) -> None:
        """Asks ``node`` to take over; whether it does shows in :attr:`leader`.

        Raises:
            NotLeaderError: this is not the leader.
        """
        if self._role is not Role.LEADER:
            raise self.not_leader()
        self._engine.transfer_leader(node)

    def read(self, token: object) -> None:
        """Asks for the commit index as of now, confirmed by a quorum; see :meth:`reads`."""
        self._ask(token)

    def _ask(self, token: object) -> None:
        self._read_number += 1
        context = _CONTEXT.pack(self.node, self._incarnation, self._read_number)
        self._reads[token] = _Read(context, self._ticks)
        self._engine.read_index(context)

    def forget(self, index: int) -> None:
        """Entries up to ``index`` cannot be sent one by one: who needs them is sent the log."""
        if self._engine.first_index <= index <= self._engine.applied:
            self._engine.compact(index)

    def unreachable(self, node: int) -> None:
        """Messages to ``node`` were lost."""
        self._engine.report_unreachable(node)

    def _offer_again(self) -> None:
        """The engine sends nothing to a follower before it hears what became of a snapshot, and either may be lost."""
        if self._role is not Role.LEADER:
            self._offered.clear()
            return
        pending = {node for node, known in self.progress().items() if known[2] == "snapshot"}
        self._offered = {node: self._offered.get(node, self._ticks) for node in sorted(pending)}
        for node, since in self._offered.items():
            if self._ticks - since >= self._settings.snapshot_retry:
                self._engine.report_snapshot(node, False)
                self._offered[node] = self._ticks

    def caught_up(self, node: int, *, ok: bool) -> None:
        """Whether ``node`` has carried out the snapshot it was sent."""
        self._engine.report_snapshot(node, ok)

    def not_leader(self) -> NotLeaderError:
        """The error for what only the leader can do."""
        return NotLeaderError(f"node {self.node} does not lead its group", leader=self._leader)

    # --- effects -----------------------------------------------------------------------------------

    def collect(self) -> bool:
        """Takes everything the engine has to say; True if there was something.

        After it: :meth:`sends`, :meth:`persists`, :meth:`committed`, :meth:`reads`.
        """
        found = False
        while self._engine.has_ready():
            found = True
            self._take()
        self._configure()
        return found

    def _take(self) -> None:
        ready = self._engine.ready()
        self._number = ready.number
        if ready.soft_state is not None:
            self._leader, role = ready.soft_state[0], Role(ready.soft_state[1])
            if role is not self._role:
                self._role = role
                self._term_start = self._engine.last_index if role is Role.LEADER else 0
                self._draw_timeout()
        persist = Persist(ready.number, None, False, ready.entries)
        if ready.hard_state is not None:
            term, vote, commit = ready.hard_state
            persist.state_first = (term, vote) != (self._state.term, self._state.vote)
            self._state = persist.state = attrs.evolve(self._state, term=term, vote=vote, commit=commit)
        if persist.state_first:
            self._fence = persist.number
        # Rule 4: while a term or vote is on its way to the disk, everything said waits behind it.
        (persist.then if self._fence else self._sends).extend(ready.messages)
        persist.then.extend(ready.persisted_messages)
        self._queue(persist)
        self._committed.extend(ready.committed)
        for index, context in ready.reads:
            for token, read in list(self._reads.items()):
                if read.context == context:
                    del self._reads[token]
                    self._answered.append((token, index))

    def _queue(self, persist: Persist) -> None:
        if persist.is_empty and not self._persists:
            self._done(persist)
        else:
            self._persists.append(persist)
            self._out.append(persist)

    def _done(self, persist: Persist) -> None:
        self._engine.on_persist_ready(persist.number)
        self._sends.extend(persist.then)
        if self._fence and self._fence <= persist.number:
            self._fence = 0

    def sends(self) -> list[Message]:
        """Messages that may leave now."""
        out, self._sends = self._sends, []
        return out

    def persists(self) -> list[Persist]:
        """What the writer has to do next, in order."""
        out, self._out = self._out, []
        return out

    def persisted(self, persist: Persist) -> None:
        """The oldest :class:`Persist` handed out is durable.  :meth:`collect` again afterwards."""
        oldest = self._persists.popleft()
        assert persist is oldest, "persisted out of order"
        if persist.configures:
            self._changing = False
            self._change(self._committed[0])
        else:
            self._done(persist)
        self.collect()

    # --- committed entries ---------------------------------------------------------------------------

    def committed(self, limit: int) -> list[Entry]:
        """What may be applied now, in order, not handed out before; a membership change only once it is in effect."""
        out: list[Entry] = []
        while len(out) < limit and self._committed and not self._changing and not self.must_reopen:
            if self._committed[0][2] == KIND_CHANGE and self._committed[0][0] > self._effective:
                break
            out.append(self._committed.popleft())
        return out

    def _configure(self) -> None:
        """Makes the configuration durable that the next committed entry brings (rule 2)."""
        if self._changing or self.must_reopen or not self._committed:
            return
        index, _, kind, _, change = self._committed[0]
        if kind != KIND_CHANGE or index <= self._effective:
            return
        after = self._preview(change)
        if after is None:
            self._effective = index  # rule 6: impossible, so nothing changes, here as everywhere
            return
        self._changing = True
        commit = max(self._state.commit, index)
        self._state = attrs.evolve(self._state, commit=commit, configuration=after, configuration_index=index)
        persist = Persist(self._number, self._state, True, [], configures=True)
        self._persists.append(persist)
        self._out.append(persist)

    def _preview(self, change: bytes) -> Configuration | None:
        from space_raft_engine import RaftError

        try:
            return configuration(self._engine.preview_change(change))
        except RaftError:
            return None

    def _change(self, entry: Entry) -> None:
        index, _, _, _, change = entry
        self._effective = index
        after = self._state.configuration
        leaves = self.node not in after.voters and self.node not in after.voters_outgoing
        if self._role is Role.LEADER and leaves:
            self.must_reopen = True  # rule 3: the engine cannot lead a group it is not in
            return
        made = configuration(self._engine.apply_change(index, change))  # rule 5
        assert made == after, "a preview that was not kept"

    def applied(self, index: int) -> None:
        """Everything handed out by :meth:`committed` up to ``index`` is in the machine's state."""
        self._engine.advance_apply_to(index)
        keep = index - self._settings.retained
        if keep - self._engine.first_index > self._settings.retained // 4:
            self._engine.compact(keep)
        self._leave_joint()

    def _leave_joint(self) -> None:
        """Rule 7: the engine can forget to leave a joint configuration when the leader changes."""
        from space_raft_engine import Dropped, encode_change

        if self._role is Role.LEADER and self._engine.conf_state[2] and not self._engine.has_pending_change:
            try:
                self._engine.propose_change(encode_change([]))
            except Dropped:
                return  # not yet: the next tick tries again

    def reads(self) -> list[tuple[object, int]]:
        """Answers to :meth:`read`: the index that must be applied before that token may look."""
        out, self._answered = self._answered, []
        return out

    # --- time-outs -----------------------------------------------------------------------------------

    def _draw_timeout(self) -> None:
        """A new election time-out from our own source of chance, so that a seed replays."""
        self._engine.set_election_timeout(
            self._random.randint(self._settings.election, 2 * self._settings.election - 1)
        )


def configuration(conf_state: tuple[list[int], list[int], list[int], list[int], bool]) -> Configuration:
    """The engine's ConfState in our words."""
    voters, learners, outgoing, learners_next, auto_leave = conf_state
    return Configuration(
        tuple(sorted(voters)),
        tuple(sorted(learners)),
        tuple(sorted(outgoing)),
        tuple(sorted(learners_next)),
        auto_leave,
    )


def conf_state(made: Configuration) -> tuple[list[int], list[int], list[int], list[int], bool]:
    """A configuration in the engine's words."""
    return (
        list(made.voters),
        list(made.learners),
        list(made.voters_outgoing),
        list(made.learners_next),
        made.auto_leave,
    )
