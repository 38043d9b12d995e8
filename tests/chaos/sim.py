"""A cluster in one process from one seed: real replicas on a network, disks and clocks that fail on purpose.

Discrete events on a heap: a tick of a node's clock, a message that arrives, the writer of a node writing or
syncing, a client asking, a fault.  What runs is the program's own code (engine, driver, replica, log, Raft
state, sequencer, fold); only the shell around it (sockets, threads, timers) is played here, in as
many ways as a real one could behave.  Time and every choice come from one ``random.Random(seed)``, so that a run is
a function of its seed and options, and a failing one is replayed by::

    python -m tests.chaos.sim --seed 17 --trace

Which faults come, how often, and the limits of the group are drawn from the seed too (swarm testing: Groce et al.,
"Swarm testing", 2012): a run with everything at once rarely gets deep into anything.

After every step :class:`tests.chaos.sim_checks.Oracle` looks at the node that moved.  At the end everything heals, and
the cluster must converge, take one more command from a client, and have equal logs and states; then what the
clients saw is checked for linearizability.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import heapq
import itertools
import multiprocessing
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, Final, cast

import attrs

from space._errors import CorruptionError, DiskFullError, SpaceError, StorageError
from space.events.commands import Receipt, Request
from space.replication.driver import Role, Settings
from space.replication.replica import (
    Job,
    Offer,
    Replica,
    Send,
    Ticket,
    Work,
    encode_change_batch,
    encode_change_context,
)
from space.statemachine.sequencer import prepare
from space.wal.faulty_disk import FaultyDisk
from space.wal.log import Log
from space.wal.raft_state import Configuration, RaftState, RaftStateFile
from space.wal.repair import heal
from space.wal.shipping import (
    Chunk,
    decode_chunk,
    encode_chunk,
    first_divergence,
    link_at,
    read_chunk,
    receive_chunk,
)
from tests.chaos.linearizability import Operation, Verdict
from tests.chaos.sim_checks import Oracle, Violation
from tests.chaos.sim_clients import (
    Client,
    Task,
    check_history,
    draw_task,
    draw_write,
    first_commands,
    result_of,
)
from tests.chaos.sim_machine import (
    EMPTY_CHECKPOINT,
    Checkpoint,
    MemoryMachine,
    PowerLossError,
)
from tests.state_support import MemoryWriter

STORE: Final = b"simulated store "
DIRECTORY: Final = "/log"
TICK_NS: Final = 20_000_000
EPOCH_NS: Final = 1_700_000_000 * 10**9
NODES_MAX: Final = 9
"""Ids given out: enough for every membership change of a run, few enough that the run stays small."""

CONVERGE_TICKS: Final = 600
"""How long a healed cluster may take: some thirty elections, and every replica anew."""

RESTORE_TICKS: Final = 150
"""After so long without a fault a damaged log comes back from a copy: too few others are left to heal it from."""

CHUNK_BYTES: Final = 2048
"""Of a log that is sent: little, so that much can happen in between."""

FAULTS: Final = (
    "crash",
    "kill",
    "power",
    "partition",
    "one_way",
    "pause",
    "clock",
    "disk_error",
    "disk_full",
    "slow_disk",
    "members",
    "transfer",
    "rot",
)


_SETTINGS: Final = Settings(election=5, heartbeat=1, read_retry=4)


@attrs.frozen
class Options:
    """What a run is like.

    Attributes:
        nodes: voters at first.
        ticks: how long faults go on.
        clients: callers at the same time.
        think: ticks between what a client does, on average.
        delay: ticks a message takes, on average.
        drop, duplicate, straggle: share of messages lost, sent twice, very late.
        lazy: share of inputs after which the shell does not look at the replica at once.
        disk: ticks a write or sync takes, on average.
        faults: weight of each kind of fault; none of a kind that is not there.
        fault_every: ticks between faults, on average.
        late: requests of clients that have gone on arrive all the same, some of them twice.
        checkpoint: batches between checkpoints of the state.
        segment_bytes: of the log.
    """

    nodes: int = 3
    ticks: int = 120
    clients: int = 3
    think: float = 2.0
    delay: float = 0.2
    drop: float = 0.0
    duplicate: float = 0.0
    straggle: float = 0.0
    lazy: float = 0.0
    disk: float = 0.1
    faults: tuple[tuple[str, int], ...] = ()
    fault_every: float = 8.0
    late: bool = True
    checkpoint: int = 16
    segment_bytes: int = 16 << 10
    settings: Settings = _SETTINGS

    @classmethod
    def draw(cls, rng: Random) -> Options:
        """Those of one run of a swarm."""
        election = rng.choice((4, 5, 8))
        kinds = [kind for kind in FAULTS if rng.random() < 0.4]
        weights = [(kind, rng.randint(1, 4) * (4 if kind == "members" else 1)) for kind in kinds]
        return cls(
            nodes=rng.choice((1, 2, 3, 3, 3, 3, 4, 5)),
            ticks=rng.choice((40, 80, 80, 160)),
            clients=rng.randint(1, 4),
            think=rng.choice((0.3, 1.0, 3.0)),
            delay=rng.choice((0.02, 0.1, 0.4, 1.0)),
            drop=rng.choice((0.0, 0.0, 0.02, 0.15)),
            duplicate=rng.choice((0.0, 0.0, 0.05, 0.2)),
            straggle=rng.choice((0.0, 0.0, 0.02, 0.1)),
            lazy=rng.choice((0.0, 0.0, 0.3)),
            disk=rng.choice((0.01, 0.1, 0.5)),
            faults=tuple(weights),
            fault_every=rng.choice((2.0, 4.0, 8.0)),
            checkpoint=rng.choice((3, 16, 1000)),
            segment_bytes=rng.choice((8 << 10, 16 << 10, 64 << 10)),
            settings=Settings(
                election=election,
                heartbeat=rng.choice((1, 2)),
                message_bytes=rng.choice((1, 600, 4 << 20)),
                inflight=rng.choice((1, 2, 64)),
                read_retry=rng.choice((2, 4, 8)),
                retained=rng.choice((4, 16, 65_536)),
            ),
        )


@attrs.define(eq=False)
class Member:
    """One simulated node: what of it survives a crash, and what runs."""

    id: int
    disk: FaultyDisk
    checkpoint: Checkpoint = EMPTY_CHECKPOINT
    replica: Replica | None = None  # while it runs
    life: int = 0
    incarnation: int = 0
    stopped: bool = False  # as in the shell: its log is brought forward, or its engine made anew
    retired: bool = False  # removed from the group, and switched off for good
    damaged: str = ""  # what of its disk was found rotten
    rotten: list[tuple[str, int, int]] = attrs.field(factory=list)  # path, offset, bit of each flip
    jobs: deque[Job] = attrs.field(factory=deque)
    written: list[Job] = attrs.field(factory=list)
    writing: bool = False
    paused_until: float = 0.0
    slow_until: float = 0.0
    rate: float = 1.0
    offset_ns: int = 0
    role: Role = Role.FOLLOWER
    reads: int = 0  # asked of this process and not yet answered

    @property
    def running(self) -> Replica:
        """The replica of a node that runs."""
        assert self.replica is not None
        return self.replica

    @property
    def machine(self) -> MemoryMachine:
        """Its state."""
        return cast("MemoryMachine", self.running.machine)


class Simulation:
    """One run.  See the module's text."""

    def __init__(self, seed: int, options: Options | None = None, *, trace: bool = False) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.options = options or Options.draw(self.rng)
        self.counts: Counter[str] = Counter()
        self.oracle = Oracle()
        self.history: list[Operation] = []
        self.now = 0.0
        self.fingerprint = seed
        self._trace = trace
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._moments = itertools.count(1)
        self._fresh = itertools.count(1)
        self._blocked: set[tuple[int, int]] = set()
        self._calm = False
        self._until = float(self.options.ticks)
        self.members: dict[int, Member] = {}
        self.clients = [Client(number) for number in range(self.options.clients)]
        self._fault_kinds = [kind for kind, _ in self.options.faults]
        self._fault_weights = [weight for _, weight in self.options.faults]
        self._found()

    # --- the loop ------------------------------------------------------------------------------------

    def run(self, script: Sequence[tuple[float, str]] = ()) -> Simulation:
        """The whole run.

        Args:
            script: faults on top of those of the options: ticks to wait, then the kind of fault.

        Raises:
            Violation: something does not hold.
        """
        for client in self.clients:
            self._after(self._exponential(self.options.think), self._ask, client)
        if self._fault_kinds:
            self._after(self._exponential(self.options.fault_every), self._fault)
        for wait, kind in script:
            self._advance(self.now + wait)
            self.fault(kind)
        self._advance(max(self._until, self.now))
        self._heal()
        self._converge()
        self._judge()
        return self

    def _advance(self, until: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= until:
            self._step()
        self.now = until

    def _step(self) -> None:
        self.now, _, action, arguments = heapq.heappop(self._heap)
        self.counts["steps"] += 1
        action(*arguments)

    def _after(self, delay: float, action: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._heap, (self.now + delay, next(self._numbers), action, arguments))

    def _exponential(self, mean: float) -> float:
        return self.rng.expovariate(1.0 / mean)

    def _note(self, what: str, member: Member | None = None, detail: str = "") -> None:
        self.counts[what] += 1
        self.trace(f"{what} {member.id if member else ''} {detail}")

    def trace(self, text: str) -> None:
        """One line of a replay."""
        if self._trace:
            sys.stdout.write(f"{self.now:9.3f}  {text}\n")

    # --- nodes ---------------------------------------------------------------------------------------

    def _found(self) -> None:
        """A store of one batch that has become a cluster; its members begin with equal logs."""
        from space_raft_engine import encode_change

        first = prepare(
            MemoryWriter(),
            [Request(command) for command in first_commands()],
            position=1,
            time_ns=EPOCH_NS,
        )
        voters = tuple(range(1, self.options.nodes + 1))
        # One after the other, as from nothing: a new member may have to repeat every change there ever was.
        founding = [
            encode_change([("add", node)], context=encode_change_context(EPOCH_NS, {node: f"node{node}"}))
            for node in voters
        ]
        index = 1 + len(founding)
        for node in voters:
            member = self._new_member(node, RaftState(node, 1, 0, index, Configuration(voters), index))
            log = self._open_log(member)
            log.append(first.metadata(), first.payload, time_ns=EPOCH_NS, term=0)
            for change in founding:
                log.append(encode_change_batch(change, EPOCH_NS), time_ns=EPOCH_NS, term=1)
            log.sync()
            log.close()
            self._start(member)
            self._tick_later(member)

    def _new_member(self, node: int, state: RaftState) -> Member:
        member = Member(node, FaultyDisk(self.rng))
        member.rate = self.rng.uniform(0.9, 1.1)
        self.members[node] = member
        self._open_log(member).close()
        file = self._open_state(member)
        file.save(state, sync=True)
        file.close()
        return member

    def _open_log(self, member: Member) -> Log:
        return Log.open(member.disk, DIRECTORY, store_id=STORE, segment_bytes=self.options.segment_bytes)

    def _open_state(self, member: Member) -> RaftStateFile:
        return RaftStateFile.open(member.disk, DIRECTORY, store_id=STORE)

    def _start(self, member: Member) -> None:
        """A start of the process; what it cannot start from stays down."""
        member.life += 1
        member.incarnation += 1
        member.reads = 0
        member.stopped = member.writing = False
        member.jobs.clear()
        member.written.clear()
        with self._using_disk(member):
            log = self._open_log(member)
            self._check_log(member, log)
            state_file = self._open_state(member)
            machine = MemoryMachine(
                member.id,
                self.oracle,
                lambda: member.replica.driver.term if member.replica else _term_of(state_file),
                member.checkpoint,
                self.options.checkpoint,
            )
            member.replica = Replica(
                log=log,
                state_file=state_file,
                machine=machine,
                settings=self.options.settings,
                random=self.rng,
                incarnation=member.incarnation,
            )
            self._pump(member)

    def _check_log(self, member: Member, log: Log) -> None:
        """What is found on a disk is a history that others have too; its chain vouches for all before."""
        if log.last_index:
            self.oracle.stored(member.id, log.last_index, log.last_term, log.last_chain)

    def _down(self, member: Member) -> None:
        """The process is gone, with everything in memory."""
        if member.replica is not None:
            member.checkpoint = member.machine.checkpoint
        member.replica = None
        member.life += 1
        member.role = Role.FOLLOWER
        member.jobs.clear()
        member.written.clear()

    def _lose_power(self, member: Member, *, restart: bool = True) -> None:
        self._note("crash", member)
        self._down(member)
        member.disk.hook = None
        member.disk.fail_at = None
        member.disk.crash(self.rng)
        if restart:
            self._after(self._exponential(6.0), self._restart, member, member.life)

    def _kill(self, member: Member) -> None:
        """The process ends, the machine goes on; started again like any service."""
        self._down(member)
        member.disk.kill()
        self._after(self._exponential(3.0), self._restart, member, member.life)

    @contextlib.contextmanager
    def _using_disk(self, member: Member) -> Iterator[None]:
        """What becomes of a node whose disk lets it down; the caller looks whether it still runs."""
        try:
            yield
        except PowerLossError:
            self._lose_power(member)
        except CorruptionError as error:
            self._broken(member, error)
        except StorageError as error:
            # Nobody knows what the disk has: the process ends, and finds out when it starts again.
            self._note("disk failed", member, str(error))
            self._kill(member)

    def _restart(self, member: Member, life: int) -> None:
        if member.life == life and member.replica is None and not member.retired and not member.damaged:
            self._note("restart", member)
            self._start(member)

    def _broken(self, member: Member, error: CorruptionError) -> None:
        """Damage was found: there must have been some."""
        if not member.rotten:
            raise Violation("no damage without a fault", f"node {member.id}: {error}") from error
        self._note("damage found", member, str(error))
        self._down(member)
        member.damaged = str(error)
        self._after(self._exponential(5.0), self._seek_healing, member)

    def _seek_healing(self, member: Member) -> None:
        """Asks for a leader that a quorum confirms without this node: its log has all this one acknowledged."""
        if not member.damaged:
            return
        self._after(10.0 + self._exponential(5.0), self._seek_healing, member)
        leader = self.leader()
        if leader is not None and not {(leader.id, member.id), (member.id, leader.id)} & self._blocked:
            life = leader.life
            leader.running.read(lambda error: self._heal_log(member, leader, life) if error is None else None)
            self._pump(leader)

    def _heal_log(self, member: Member, leader: Member, life: int) -> None:
        """What is damaged is replaced by what the leader has, as the shell does before it starts a node."""
        if not member.damaged or leader.life != life or leader.replica is None:
            return
        theirs = leader.replica.log

        def fetch(first: int, last: int) -> Iterator[Chunk]:
            while first <= last:
                chunk = _ship(theirs, first, last)
                state_file.raise_term(chunk.batches[-1].term)
                yield chunk
                first = chunk.last_index + 1

        try:
            state_file = self._open_state(member)
            heal(
                member.disk,
                DIRECTORY,
                STORE,
                fetch,
                last=leader.replica.driver.commit,
                segment_bytes=self.options.segment_bytes,
            )
        except PowerLossError:
            self._lose_power(member)
        except SpaceError as error:
            self._note("not healed", member, str(error))
        else:
            self._note("healed", member)
            self._sound(member)

    # --- a turn of a node ------------------------------------------------------------------------------

    def _here(self, member: Member, life: int, action: Callable[..., None], *arguments: Any) -> bool:
        """Whether an event may happen on its node now; what meets a paused one happens when it goes on."""
        if member.life != life or member.replica is None:
            return False
        if member.paused_until > self.now:
            self._after(member.paused_until - self.now, action, *arguments)
            return False
        return True

    def _pump(self, member: Member) -> None:
        """Lets a node carry on, and carries out what it wants."""
        if member.stopped or member.replica is None:
            return
        replica, life = member.replica, member.life
        work = Work()
        with self._using_disk(member):
            work = replica.work(self._clock_ns(member))
        if member.life != life:
            return
        self._look_at(member)
        for send in work.sends:
            self._send(member, send)
        if work.jobs:
            member.jobs.extend(work.jobs)
            self._write_later(member)
        for answer in work.answers:
            answer()
        if work.reopen:
            self._note("reopen", member)
            member.stopped = True
            self._after(0.01, self._reopen, member, member.life)
        elif work.offer is not None:
            self._note("offer", member, f"up to {work.offer.index} by {work.offer.sender}")
            if work.offer.index <= replica.driver.commit:
                self._tell_caught_up(member, work.offer, ok=True)
                return
            member.stopped = True
            self._after(0.01, self._install, member, member.life, work.offer, False)

    def _look_at(self, member: Member) -> None:
        """The checks after every step, of the node that took it."""
        replica = member.running
        driver, log = replica.driver, replica.log
        applied = replica.machine.applied.position
        self.oracle.stands(member.id, applied, driver.commit, driver.last_index, log.durable_index)
        if driver.role is not member.role:
            self.trace(f"role {member.id} {driver.role.value} term {driver.term}")
            member.role = driver.role
            if driver.role is Role.LEADER:
                self.counts["elections"] += 1
                self.oracle.leads(member.id, driver.term, driver.last_index)
        if driver.role is Role.LEADER:
            self.oracle.leaders.setdefault(driver.term, member.id)
            if self.oracle.leaders[driver.term] != member.id:
                raise Violation("one leader a term", f"{member.id} in term {driver.term}")
        # Numbers only: their hash is the same in every process.
        self.fingerprint = hash(
            (self.fingerprint, self.now, member.id, driver.term, driver.commit, driver.last_index, applied)
        )

    def _clock_ns(self, member: Member) -> int:
        return EPOCH_NS + max(0, int(self.now * TICK_NS) + member.offset_ns)

    def _tick_later(self, member: Member) -> None:
        self._after(member.rate * self.rng.uniform(0.8, 1.2), self._tick, member)

    def _tick(self, member: Member) -> None:
        if member.retired:
            return
        if member.paused_until > self.now:
            self._after(member.paused_until - self.now + self.rng.random(), self._tick, member)
            return
        if member.replica is not None and not member.stopped:
            member.replica.tick()
            self._pump(member)
        self._tick_later(member)

    # --- the network -----------------------------------------------------------------------------------

    def _send(self, member: Member, send: Send) -> None:
        self.counts["messages"] += 1
        lost = (member.id, send.to) in self._blocked or self._chance(self.options.drop)
        if lost:
            self.counts["messages lost"] += 1
            if self.rng.random() < 0.5:  # a connection that breaks is noticed; a lost message is not
                self._after(self._exponential(1.0), self._unreachable, member, member.life, send.to)
            return
        copies = 2 if self._chance(self.options.duplicate) else 1
        for _ in range(copies):
            delay = self._exponential(min(self.options.delay, 0.2) if self._calm else self.options.delay)
            if self._chance(self.options.straggle):
                delay += self._exponential(20.0)
            self._after(delay, self._deliver, member.id, send)

    def _chance(self, share: float) -> bool:
        return share > 0.0 and not self._calm and self.rng.random() < share

    def _unreachable(self, member: Member, life: int, node: int) -> None:
        if self._here(member, life, self._unreachable, member, life, node) and not member.stopped:
            member.running.driver.unreachable(node)

    def _deliver(self, sender: int, send: Send) -> None:
        member = self.members.get(send.to)
        if member is None or member.replica is None or (sender, send.to) in self._blocked:
            self.counts["messages lost"] += 1
            return
        if not self._here(member, member.life, self._deliver, sender, send) or member.stopped:
            return
        try:
            member.running.receive(sender, send.message, send.blobs)
        except SpaceError as error:
            raise Violation(
                "no honest message is refused", f"node {member.id}, {send.kind}: {error}"
            ) from error
        if not self._chance(self.options.lazy):
            self._pump(member)

    # --- the writer --------------------------------------------------------------------------------------

    def _disk_delay(self, member: Member) -> float:
        if (
            self._calm
        ):  # time-outs are longer than what a healthy disk takes: without that nobody is ever elected
            return self._exponential(min(self.options.disk, 0.1))
        return self._exponential(self.options.disk * (30 if member.slow_until > self.now else 1))

    def _write_later(self, member: Member) -> None:
        if not member.writing and member.jobs:
            member.writing = True
            self._after(self._disk_delay(member), self._write, member, member.life)

    def _write(self, member: Member, life: int) -> None:
        """The writer takes some of what waits, in order; their sync comes later."""
        if not self._here(member, life, self._write, member, life):
            return
        with self._using_disk(member):
            try:
                for _ in range(self.rng.randint(1, len(member.jobs))):
                    self._write_job(member, member.jobs[0])
            except DiskFullError:
                self._note("disk was full", member)
                self._after(self._exponential(3.0), self._write, member, life)
                return
            self._after(self._disk_delay(member), self._sync, member, life)

    def _write_job(self, member: Member, job: Job) -> None:
        if job.items and job.items[0].index <= job.log.last_index:
            self._note("truncation", member, f"back to {job.items[0].index - 1}")
        job.write()
        member.written.append(member.jobs.popleft())
        for item in job.items:
            self.oracle.stored(member.id, item.index, item.term, item.chain)

    def _sync(self, member: Member, life: int) -> None:
        if not self._here(member, life, self._sync, member, life):
            return
        with self._using_disk(member):
            for job in member.written:
                job.sync()
        if member.life != life:
            return
        jobs, member.written = member.written, []
        member.writing = False
        self._write_later(member)
        if not member.stopped:
            for job in jobs:
                member.running.written(job)
            self._pump(member)

    def _drained(self, member: Member) -> bool:
        return not member.jobs and not member.written

    def _reopen(self, member: Member, life: int) -> None:
        """Rule 3, as the shell does it: when all jobs are carried out, the engine is made anew."""
        if not self._here(member, life, self._reopen, member, life):
            return
        if not self._drained(member):
            self._after(0.1, self._reopen, member, life)
            return
        self._anew(member)

    def _anew(self, member: Member) -> None:
        member.incarnation += 1
        with self._using_disk(member):
            member.running.reopen(member.incarnation)
            member.stopped = False
            self._pump(member)

    # --- far behind ------------------------------------------------------------------------------------

    def _install(self, member: Member, life: int, offer: Offer, cut: bool) -> None:
        """Brings a log up to what a peer offers, as the shell does it: one step of it, then another."""
        if not self._here(member, life, self._install, member, life, offer, cut):
            return
        if not self._drained(member):
            self._after(0.1, self._install, member, life, offer, cut)
            return
        sender = self.members[offer.sender]
        fetched = self._fetch(member, sender, offer, cut=cut)
        if sender.replica is None or fetched is None:
            self._anew(member)
            self._tell_caught_up(member, offer, ok=False)
            return
        done = False
        with self._using_disk(member):
            done = self._take(member, fetched, offer) if cut else self._cut_back(member, fetched, offer)
        if member.life != life:
            return
        if done:
            self._note("installed", member, f"up to {offer.index}")
            self._anew(member)
            self._tell_caught_up(member, offer, ok=True)
        else:
            self._after(self._disk_delay(member), self._install, member, life, offer, True)

    def _fetch(self, member: Member, sender: Member, offer: Offer, *, cut: bool) -> Any:
        """What a peer has: first the links of its log, then batches of it; None if it is gone."""
        pairs = {(member.id, sender.id), (sender.id, member.id)}
        if sender.replica is None or pairs & self._blocked:
            return None
        own, theirs = member.running.log, sender.replica.log
        found: Any = None
        with self._using_disk(sender):
            if cut:
                start = own.last_index + 1
                found = [_ship(theirs, start, offer.index)] if start <= offer.index else []
            else:
                last = min(own.last_index, offer.index)
                found = {index: link_at(theirs, index) for index in range(1, last + 1)}
        return found

    def _cut_back(self, member: Member, links: dict[int, bytes], offer: Offer) -> bool:
        """Drops what the peer has otherwise; the term comes first, so that the log is never ahead of it."""
        file, own = member.running.state_file, member.running.log
        file.raise_term(offer.term)
        common = first_divergence(own, links.get, len(links)) - 1
        if common < member.machine.applied.position:
            raise Violation("state machine safety", f"node {member.id} would be cut back to {common}")
        if common < len(links):
            own.truncate_after(common)
        return False

    def _take(self, member: Member, chunks: list[Chunk], offer: Offer) -> bool:
        """Appends what was fetched; with the last of it, state and members follow."""
        replica = member.running
        file, own = replica.state_file, replica.log
        for chunk in chunks:
            receive_chunk(own, chunk)
            for batch in chunk.batches:
                self.oracle.stored(member.id, batch.index, batch.term, batch.chain)
        own.sync()
        if own.last_index < offer.index:
            return False
        if own.term(offer.index) != offer.index_term:
            raise Violation("an offer is kept", f"entry {offer.index} is not of term {offer.index_term}")
        assert file.state is not None
        state = attrs.evolve(
            file.state,
            commit=max(file.state.commit, offer.index),
            configuration=offer.configuration,
            configuration_index=offer.index,
        )
        file.save(state, sync=True)
        replica.machine.catch_up(own, offer.index)
        return True

    def _tell_caught_up(self, member: Member, offer: Offer, *, ok: bool) -> None:
        if not self._chance(self.options.drop):
            self._after(self._exponential(self.options.delay), self._caught_up, offer.sender, member.id, ok)

    def _caught_up(self, sender: int, node: int, ok: bool) -> None:
        member = self.members[sender]
        if (node, sender) in self._blocked:
            return
        if self._here(member, member.life, self._caught_up, sender, node, ok) and not member.stopped:
            member.running.driver.caught_up(node, ok=ok)
            self._pump(member)

    # --- clients ---------------------------------------------------------------------------------------

    def _ask(self, client: Client) -> None:
        if self._calm:
            return
        client.task = draw_task(self.rng, next(self._fresh))
        client.sequence += 1
        client.attempts = 0
        client.started = next(self._moments)
        self._attempt(client, 0)

    def _attempt(self, client: Client, hint: int) -> None:
        """One more try, at the node that is said to lead or at any."""
        client.attempt += 1
        client.attempts += 1
        if client.attempts > 12 and not self._calm:
            self._give_up(client)
            return
        nodes = [node for node, member in self.members.items() if not member.retired]
        node = hint if hint in self.members and self.rng.random() < 0.8 else self.rng.choice(nodes)
        task, sequence = client.task, client.sequence
        for _ in range(2 if self.options.late and self._chance(self.options.duplicate) else 1):
            delay = self._exponential(self.options.delay)
            if self.options.late and self._chance(self.options.straggle):
                delay += self._exponential(20.0)
            self._after(delay, self._arrive, client, client.attempt, node, task, sequence)
        self._after(10.0 + self._exponential(5.0), self._late, client, client.attempt)

    def _late(self, client: Client, attempt: int) -> None:
        if client.attempt == attempt and client.task is not None:
            self._attempt(client, 0)

    def _again(self, client: Client, attempt: int, hint: int) -> None:
        if client.attempt == attempt and client.task is not None:
            client.attempt += 1  # whatever comes of that attempt now is too late
            self._after(self._exponential(1.0), self._late_hint, client, client.attempt, hint)

    def _late_hint(self, client: Client, attempt: int, hint: int) -> None:
        if client.attempt == attempt and client.task is not None:
            self._attempt(client, hint)

    def _give_up(self, client: Client) -> None:
        self.counts["given up"] += 1
        self._record(client, None, None)

    def _record(self, client: Client, result: Any, end: int | None) -> None:
        task = client.task
        assert task is not None
        if task.command is not None or end is not None:
            self.history.append(Operation(task.key, task.call, result, client.started, end))
        client.task = None
        self._after(self._exponential(self.options.think), self._ask, client)

    def _arrive(self, client: Client, attempt: int, node: int, task: Task, sequence: int) -> None:
        member = self.members[node]
        if client.attempt != attempt and not self.options.late:
            return  # the connection it came on is closed
        if member.replica is None or member.stopped:
            self._again(client, attempt, 0)
            return
        if not self._here(member, member.life, self._arrive, client, attempt, node, task, sequence):
            return
        if task.command is None:
            member.reads += 1
            member.replica.read(lambda error: self._read(client, attempt, member, error))
        else:
            request = Request(task.command, client=client.id, sequence=sequence)
            try:
                member.replica.submit(
                    Ticket([request], lambda found: self._decided(client, attempt, sequence, found[0]))
                )
            except SpaceError as error:
                self._again(client, attempt, getattr(error, "leader", 0))
                return
        if not self._chance(self.options.lazy):
            self._pump(member)

    def _read(self, client: Client, attempt: int, member: Member, error: SpaceError | None) -> None:
        member.reads -= 1
        if client.attempt != attempt or client.task is None:
            return
        if error is not None:
            self._again(client, attempt, getattr(error, "leader", 0))
            return
        read = client.task.read
        assert read is not None
        self.counts["reads"] += 1
        self._reply(client, attempt, read(member.machine.rows))

    def _decided(self, client: Client, attempt: int, sequence: int, outcome: Receipt | SpaceError) -> None:
        if isinstance(outcome, Receipt):
            self._note("acknowledged")
            self.oracle.acknowledged(client.id, sequence, outcome.position)
            self.counts["repeated"] += outcome.repeated
        if client.attempt != attempt or client.task is None:
            return
        result = result_of(outcome)
        if result is None:
            self._again(client, attempt, getattr(outcome, "leader", 0))
        else:
            self._reply(client, attempt, result)

    def _reply(self, client: Client, attempt: int, result: Any) -> None:
        if not self._chance(self.options.drop):
            self._after(self._exponential(self.options.delay), self._answered, client, attempt, result)

    def _answered(self, client: Client, attempt: int, result: Any) -> None:
        if client.attempt == attempt and client.task is not None:
            client.attempt += 1
            self.counts["answered"] += 1
            self._record(client, result, next(self._moments))

    # --- faults ----------------------------------------------------------------------------------------

    def _fault(self) -> None:
        if self._calm:
            return
        kind = self.rng.choices(self._fault_kinds, self._fault_weights)[0]
        self.fault(kind)
        self._after(self._exponential(self.options.fault_every), self._fault)

    def fault(self, kind: str) -> None:
        """One fault of a kind of :data:`FAULTS`, somewhere."""
        member = self._some(running=kind != "rot")
        if member is not None:
            getattr(self, f"_fault_{kind}")(member)

    def _some(self, *, running: bool) -> Member | None:
        found = [
            each
            for each in self.members.values()
            if not each.retired and not each.damaged and (each.replica is not None or not running)
        ]
        return self.rng.choice(found) if found else None

    def _fault_crash(self, member: Member) -> None:
        self._lose_power(member)

    def _fault_kill(self, member: Member) -> None:
        self._note("kill", member)
        self._kill(member)

    def _fault_power(self, member: Member) -> None:
        """Power is lost in the middle of what the disk does next."""
        left = self.rng.randint(1, 25)

        def hook(operation: str, path: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise PowerLossError

        member.disk.hook = hook

    def _fault_partition(self, member: Member) -> None:
        self._note("partition", member)
        side = {node for node in self.members if self.rng.random() < 0.5} ^ {member.id}
        cut = {(a, b) for a in self.members for b in self.members if (a in side) != (b in side)}
        self._cut(cut)

    def _fault_one_way(self, member: Member) -> None:
        self._note("one-way partition", member)
        inward = self.rng.random() < 0.5
        others = [node for node in self.members if node != member.id]
        self._cut({(node, member.id) if inward else (member.id, node) for node in others})

    def _cut(self, pairs: set[tuple[int, int]]) -> None:
        self._blocked |= pairs
        self._after(self._exponential(15.0), self._mend, pairs)

    def _mend(self, pairs: set[tuple[int, int]]) -> None:
        self._blocked -= pairs

    def _fault_pause(self, member: Member) -> None:
        self._note("pause", member)
        member.paused_until = self.now + self._exponential(10.0)

    def _fault_clock(self, member: Member) -> None:
        self._note("clock jump", member)
        member.offset_ns += self.rng.randint(-(10**12), 10**12)
        member.rate = self.rng.choice((0.5, 0.8, 1.0, 1.25, 2.0))

    def _fault_disk_error(self, member: Member) -> None:
        self._note("disk error", member)
        member.disk.fail_with = errno.EIO
        member.disk.fail_at = member.disk.operations + self.rng.randint(1, 20)

    def _fault_disk_full(self, member: Member) -> None:
        self._note("disk full", member)
        member.disk.capacity = member.disk.used_bytes
        self._after(self._exponential(15.0), self._room, member)

    def _room(self, member: Member) -> None:
        member.disk.capacity = 1 << 40

    def _fault_slow_disk(self, member: Member) -> None:
        self._note("slow disk", member)
        member.slow_until = self.now + self._exponential(20.0)

    def _fault_rot(self, member: Member) -> None:
        """A bit of what is durable and closed for writing turns over, where the others can do without this node."""
        leader = self.leader()
        if leader is None or any(each.rotten for each in self.members.values()):
            return
        made = leader.running.driver.configuration
        if made.voters_outgoing or (member.id in made.voters and len(made.voters) < 3):
            return
        image = member.disk.image()
        segments = sorted(path for path in image if path.startswith(DIRECTORY) and path.endswith(".seg"))
        committed = len(self.oracle.committed)
        sealed = [one for one, after in itertools.pairwise(segments) if _first_of(after) <= committed + 1]
        if not sealed:
            return
        path = self.rng.choice(sealed)
        spot = (path, self.rng.randrange(len(image[path])), self.rng.randrange(8))
        self._note("rot", member, str(spot))
        member.disk.flip(*spot)
        member.rotten.append(spot)
        self._after(self._exponential(10.0), self._scrub, member)

    def _scrub(self, member: Member) -> None:
        """Looks at every byte of a log, as a node does from time to time."""
        if member.replica is None or member.damaged:
            return
        with self._using_disk(member):
            for finding in member.replica.log.verify():
                raise CorruptionError(f"scrub: {finding}", segment=finding.segment)

    # --- members ---------------------------------------------------------------------------------------

    def leader(self) -> Member | None:
        """The running leader of the newest term."""
        leaders = [
            each
            for each in self.members.values()
            if each.replica is not None and not each.stopped and each.replica.role is Role.LEADER
        ]
        return max(leaders, key=lambda each: each.running.driver.term, default=None)

    def _fault_transfer(self, member: Member) -> None:
        leader = self.leader()
        if leader is not None:
            self._note("transfer", member)
            leader.running.driver.transfer(member.id)
            self._pump(leader)

    def _fault_members(self, member: Member) -> None:
        """Somebody changes the group."""
        leader = self.leader()
        if leader is None:
            return
        made = leader.running.driver.configuration
        changes = self._draw_changes(made)
        for what, node in changes:
            if node not in self.members:
                self._join(node)
            self.trace(f"change {what} {node} by {leader.id}")
        transition = self.rng.choice(("auto", "implicit", "explicit"))
        self.change(leader, changes, transition)
        self._retire()

    def _draw_changes(self, made: Configuration) -> list[tuple[str, int]]:
        fresh = len(self.members) + 1
        room = fresh <= NODES_MAX
        kind = self.rng.choice(("learner", "promote", "promote", "remove", "swap", "demote", "none left"))
        voter = self.rng.choice(made.voters or (fresh,))
        if kind == "none left":
            return [("remove", node) for node in made.voters]
        if kind == "promote" and made.learners:
            return [("add", self.rng.choice(made.learners))]
        if kind == "remove" and len(made.voters) > 1:
            return [("remove", self.rng.choice((*made.voters, *made.learners)))]
        if kind == "demote" and len(made.voters) > 2:
            return [("learner", voter)]
        if kind == "swap" and (room or made.learners):
            return [("add", self.rng.choice(made.learners or (fresh,))), ("remove", voter)]
        return [("learner", fresh)] if room else [("add", voter)]

    def change(self, leader: Member, changes: list[tuple[str, int]], transition: str) -> None:
        """Proposes a change of members; refusals are answers."""
        from space_raft_engine import encode_change

        context = encode_change_context(self._clock_ns(leader), {node: f"node{node}" for _, node in changes})
        change = encode_change(cast("Any", changes), transition=cast("Any", transition), context=context)
        try:
            leader.running.change(change)
        except SpaceError as error:
            self._note(f"change refused: {type(error).__name__}", leader, str(error))
        else:
            self._note("change", leader, f"{changes} {transition}")
        self._pump(leader)

    def _join(self, node: int) -> None:
        """A new machine, which knows its id and the store's, and waits to be told the rest."""
        member = self._new_member(node, RaftState(node, 0, 0, 0, Configuration(), 0))
        self._start(member)
        self._tick_later(member)

    def _retire(self) -> None:
        """Those that a committed change has removed are switched off, some sooner and some later."""
        leader = self.leader()
        if leader is None:
            return
        made, index = leader.running.driver.configuration, leader.running.driver.state.configuration_index
        known = {*made.voters, *made.learners, *made.voters_outgoing}
        for member in self.members.values():
            gone = member.id not in known and 0 < self.oracle.removed.get(member.id, 0) <= index
            if gone and not member.retired and (self._calm or self.rng.random() < 0.3):
                self._note("retired", member)
                self._down(member)
                member.retired = True

    # --- the end ---------------------------------------------------------------------------------------

    def _heal(self) -> None:
        """Everything works again; nobody wants anything new."""
        self.trace("heal")
        self._calm = True
        self._blocked.clear()
        for member in self.members.values():
            member.paused_until = member.slow_until = 0.0
            member.rate = 1.0
            member.disk.capacity = 1 << 40
            member.disk.hook = member.disk.fail_at = None
            if member.rotten and not member.damaged:
                self._scrub(member)
            self._restart(member, member.life)

    def _restore(self, member: Member) -> None:
        """A damaged disk comes back from a copy: the bits that turned over are turned back."""
        if member.damaged and self.now > self._until + RESTORE_TICKS:
            self._note("restored", member)
            for path, offset, bit in member.rotten:
                if member.disk.exists(path):
                    member.disk.flip(path, offset, bit)
            self._sound(member)

    def _sound(self, member: Member) -> None:
        member.damaged = ""
        member.rotten.clear()
        self._restart(member, member.life)

    def _converge(self) -> None:
        """The healed cluster agrees, takes a command, and agrees again."""
        client = Client(len(self.clients))
        self.clients.append(client)
        end = self.now + CONVERGE_TICKS
        why = "it never began"
        asked = False
        while self.now < end:
            self._advance(self.now + 4.0)
            self._retire()
            for member in self.members.values():
                self._restore(member)
                self._restart(member, member.life)
            why = self._apart()
            if why:
                continue
            if asked:
                return
            asked = True
            client.task = draw_write(self.rng, next(self._fresh))
            client.sequence = 1
            client.started = next(self._moments)
            self._attempt(client, 0)
        raise Violation("converges", f"after {CONVERGE_TICKS} quiet ticks: {why}")

    def _apart(self) -> str:
        """What keeps the members from being equal and idle; nothing if they are."""
        leader = self.leader()
        if leader is None:
            return "nobody leads"
        waiting = [client.number for client in self.clients if client.task is not None]
        if waiting:
            return f"clients {waiting} have no answer"
        made = leader.running.driver.configuration
        if made.voters_outgoing:
            return f"a joint configuration: {made}"
        last = leader.running.driver.last_index
        for node in (*made.voters, *made.learners):
            member = self.members[node]
            if member.replica is None or member.stopped or not self._drained(member):
                return f"node {node} is not ready"
            if member.reads:
                return f"{member.reads} reads at node {node} have no answer"
            driver, log = member.replica.driver, member.replica.log
            if driver.leader != leader.id:
                return f"node {node} follows {driver.leader}, not {leader.id}"
            stands = (member.machine.applied.position, log.last_index, log.durable_index)
            if stands != (last, last, last):
                return f"node {node} stands at {stands}, the leader at {last}: {leader.running.driver.progress()}"
            if driver.configuration != made:
                return f"node {node} has {driver.configuration}, the leader {made}"
        return ""

    def _judge(self) -> None:
        """What is left to look at once all is quiet."""
        leader = self.leader()
        assert leader is not None
        made = leader.running.driver.configuration
        count = len(self.oracle.committed)
        for node in (*made.voters, *made.learners):
            log = self.members[node].running.log
            if log.last_index != count or log.last_chain != self.oracle.committed[-1].chain:
                raise Violation(
                    "nothing acknowledged is lost", f"node {node} has {log.last_index} of {count}"
                )
            if not self.members[node].rotten and list(log.verify()):
                raise Violation("no damage without a fault", f"node {node}: {list(log.verify())}")
        for outcome in check_history(self.history):
            if outcome.verdict is Verdict.VIOLATION:
                order = "\n".join(map(str, outcome.longest))
                raise Violation("linearizable", f"{outcome.key}; as far as it goes:\n{order}")
            self.counts["unknown histories"] += outcome.verdict is Verdict.UNKNOWN
        self.counts["operations"] = len(self.history)
        self.counts["committed"] = count
        self.fingerprint = hash((self.fingerprint, self.oracle.digests[count]))


def _first_of(path: str) -> int:
    """First index of a segment, from its name."""
    return int(path.removesuffix(".seg")[-20:])


def _ship(log: Log, start: int, last: int) -> Chunk:
    """A few batches of a log on their way to another node, up to ``last``."""
    return decode_chunk(b"".join(encode_chunk(read_chunk(log, start, stop=last + 1, bytes_max=CHUNK_BYTES))))


def _term_of(state_file: RaftStateFile) -> int:
    return state_file.state.term if state_file.state else 0


# --- runs ---------------------------------------------------------------------------------------------


def options_of(seed: int) -> Options:
    """The options of a run of the swarm."""
    return Options.draw(Random(f"options {seed}"))


def replay_command(seed: int) -> str:
    """How to see a run of the swarm again."""
    return f"python -m tests.chaos.sim --seed {seed} --trace"


def run_seed(seed: int, *, trace: bool = False) -> Simulation:
    """One run of the swarm.  Whatever it raises carries the command that replays it.

    Raises:
        Violation: something does not hold.
    """
    simulation = Simulation(seed, options_of(seed), trace=trace)
    try:
        return simulation.run()
    except Exception as error:
        error.add_note(f"replay: {replay_command(seed)}")
        raise


def _outcome(seed: int) -> tuple[int, Counter[str], str]:
    """A run for another process: its counts, or what went wrong."""
    try:
        return seed, run_seed(seed).counts, ""
    except Exception as error:  # noqa: BLE001 - whatever a run raises is its finding
        return seed, Counter(), f"{type(error).__name__}: {error}"


def swarm(first: int, runs: int, jobs: int) -> tuple[Counter[str], dict[int, str]]:
    """Many runs: what happened in all of them together, and what went wrong in which."""
    counts: Counter[str] = Counter()
    failures: dict[int, str] = {}
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for seed, found, failure in pool.imap_unordered(_outcome, range(first, first + runs), chunksize=16):
            counts += found
            if failure:
                failures[seed] = failure
    return counts, failures


def report(counts: Counter[str], failures: dict[int, str]) -> str:
    """What a swarm found, for people."""
    lines = [f"{count:12,}  {name}" for name, count in sorted(counts.items())]
    for seed, failure in sorted(failures.items()):
        lines += [failure, f"    replay: {replay_command(seed)}"]
    return "\n".join(lines)


def main() -> int:
    """One run with its trace, or many at once."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.sim", description="Simulated clusters.")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="processes for many runs")
    parser.add_argument("--trace", action="store_true", help="print every event of a single run")
    asked = parser.parse_args()
    if asked.runs > 1:
        counts, failures = swarm(asked.seed, asked.runs, asked.jobs)
        sys.stdout.write(f"{asked.runs} runs from seed {asked.seed}, {len(failures)} failed\n")
        sys.stdout.write(report(counts, failures) + "\n")
        return int(bool(failures))
    if asked.trace:
        sys.stdout.write(f"{options_of(asked.seed)}\n")
    simulation = run_seed(asked.seed, trace=asked.trace)
    sys.stdout.write(f"{report(simulation.counts, {})}\nfingerprint {simulation.fingerprint:x}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
