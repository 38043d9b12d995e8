"""The asyncio shell of a node: its loop, its clock, its writer thread, its peers.

One thread runs the loop with every group of the node, the engine, deciding and applying; one more is the writer:
it carries out the jobs of all groups in order and syncs each log that was written once for all of them, while the
loop goes on.  Nothing here decides anything: see :mod:`space.replication.driver`, ``replica`` and ``group``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from random import Random
from typing import Any, Final, Protocol, TypeVar

import attrs

from space._errors import (
    ConflictError,
    CorruptionError,
    DiskFullError,
    NotFoundError,
    NotLeaderError,
    RefusedError,
    SpaceError,
    Status,
    StorageError,
    UnavailableError,
    UsageError,
)
from space.events.commands import Buffer
from space.replication.certificates import Tls
from space.replication.group import Group, unpacked
from space.replication.replica import (
    Digest,
    Job,
    Offer,
    Send,
    encode_change_context,
)
from space.replication.transport import Transport
from space.replication.wire import Blob
from space.statemachine.store import STATE_VERSION
from space.wal.log import Log
from space.wal.raft_state import RaftState
from space.wal.segment_format import RecordInfo
from space.wal.shipping import decode_chunk, encode_chunk, first_divergence, read_chunk, receive_chunk

TICK_SECONDS: Final = 0.025
HURRY: Final = 4
"""Ticks in the time of one while the leader's connections are gone: its successor is found sooner."""

FULL_SECONDS: Final = 0.5
"""How long the writer waits on a full disk before it tries again."""

SYNCS_AT_ONCE: Final = 8
YIELD_SECONDS: Final = 10.0
"""How often a leader with a full disk asks another node to lead: one that took over may have to give it back."""

YIELDING_SECONDS: Final = 1.0
"""How long commands wait for that before they are refused."""

STATUS_SECONDS: Final = 2.0
LEAD_SECONDS: Final = 2.0
DIGEST_SECONDS: Final = 1.0
SHIP_SECONDS: Final = 30.0
CHUNK_BYTES: Final = 4 << 20
CHECKPOINT_GAIN: Final = 100_000
"""Positions a checkpoint must be ahead to be worth its copy: folding that many takes about a second."""

CAUGHT_UP_POSITIONS: Final = 256
"""A learner this close to the leader becomes a voter: the rest is under way anyway."""

RETRY_SECONDS: Final = 0.05
CHANGE_SECONDS: Final = 600.0
"""How long a new member may take to catch up before adding it is given up; asking again goes on."""

log: Final = logging.getLogger("space.replication")
T = TypeVar("T")


class Host(Protocol):
    """What a group needs of the store it belongs to, beyond :class:`space.replication.replica.Machine`."""

    def members(self) -> dict[int, tuple[str, str]]:
        """Role and address of each member, as of the state."""

    def newest_checkpoint(self) -> tuple[int, list[tuple[str, int]]] | None:
        """Position of the newest sealed checkpoint, and its files with their sizes."""

    def read_checkpoint(self, position: int, name: str, offset: int, length: int) -> bytes:
        """Bytes of a checkpoint's file.

        Raises:
            NotFoundError: it was thinned out meanwhile.
        """

    def write_checkpoint(self, position: int, name: str, offset: int, data: bytes) -> None:
        """Stores bytes of a checkpoint that is being fetched."""

    def adopt_checkpoint(self, position: int) -> None:
        """Makes the fetched checkpoint one of the store's own, if it is whole and fits the log."""

    def heal_later(self) -> None:
        """Has the next start look at every byte of the log, and fetch from the peers what is damaged."""

    def is_reclaimed(self, info: RecordInfo, payload: bytes) -> bool:
        """Whether payload of a batch that is not as it was written was given back on purpose."""

    def rebuild(self) -> str:
        """Rebuilds the state from the log; names the first difference it found, or nothing."""


@attrs.define
class Parts:
    """A group and what is under it."""

    group: Group
    host: Host


class Node:
    """A running node.  Made in any thread; :meth:`run` is its loop's main coroutine."""

    def __init__(
        self,
        *,
        id: int,  # noqa: A002 - the public word
        cluster: bytes,
        listen: tuple[str, int],
        advertise: str = "",
        tls: Tls | None,
        random: Random,
        time_ns: Callable[[], int] = time.time_ns,
        on_fatal: Callable[[SpaceError], None] = lambda _: None,
        tick_seconds: float = TICK_SECONDS,
    ) -> None:
        self.id = id
        self.cluster = cluster
        self.time_ns = time_ns
        self.parts: dict[int, Parts] = {}
        self.transport = Transport(
            node=id,
            cluster=cluster,
            listen=listen,
            handler=self,
            tls=tls,
            advertise=parse_address(advertise) if advertise else None,
            random=random,
        )
        self._advertise = advertise
        self._random = random
        self._on_fatal = on_fatal
        self._tick_seconds = tick_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._ready: dict[int, Group] = {}
        self._working = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs: queue.SimpleQueue[tuple[Group, list[Job]] | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._syncing = ThreadPoolExecutor(SYNCS_AT_ONCE, "space-sync")
        self._stopping = threading.Event()
        self._lost: set[int] = set()
        self._dialled: set[int] = set()
        self._incarnation = time_ns()
        self._installing: dict[int, int] = {}
        self._led_since: dict[int, float] = {}
        self._yielded: dict[int, float] = {}
        self.differences: list[str] = []
        self.on_call: Callable[[int, str], Any] = _no_calls
        """Carries out an operation on a shard's store that only its leader can, asked by another node."""
        self.answers: dict[str, Callable[[], Any]] = {}
        """What members, and nobody else, are answered when they call by these names; on a thread."""

    # --- life ------------------------------------------------------------------------------------------

    def add(self, group: Group, host: Host) -> None:
        """Takes a group in, before :meth:`start`."""
        self.parts[group.number] = Parts(group, host)

    async def start(self) -> None:
        """Begins to listen, to tick and to write."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        await self.transport.start()
        self.learn_members()
        self._writer = threading.Thread(target=self._write, name="space-writer", daemon=True)
        self._writer.start()
        self.spawn(self._tick(), vital=True)
        self.spawn(self._compare())
        for parts in self.parts.values():
            self.schedule(parts.group)

    async def stop(self) -> None:
        """Hands over what this node leads, and ends; what was acknowledged is durable already."""
        for parts in self.parts.values():
            await self._hand_over(parts.group)
        self._stopping.set()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._jobs.put(None)
        if self._writer is not None:
            await asyncio.to_thread(self._writer.join)
        self._syncing.shutdown(wait=False)
        for parts in self.parts.values():
            if parts.group.failure is None:
                parts.group.fail(UnavailableError(f"node {self.id} has stopped"))
        await self.transport.close()
        self._thread = 0  # the number of a thread that has ended is given to another one

    @property
    def address(self) -> str:
        """Where other nodes reach this one."""
        host, port = self.transport.address
        return self._advertise or f"{host}:{port}"

    @property
    def is_stopping(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stopping.is_set()

    # --- the loop ----------------------------------------------------------------------------------------

    def now(self) -> float:
        """The loop's clock, seconds."""
        return time.monotonic()

    def call_soon(self, function: Callable[..., object], *arguments: Any) -> None:
        """Calls in the loop, from any thread; on a node that has ended, never."""
        assert self._loop is not None
        if threading.get_ident() == self._thread:
            self._loop.call_soon(function, *arguments)
            return
        with contextlib.suppress(RuntimeError):  # closed
            self._loop.call_soon_threadsafe(function, *arguments)

    def call_later(self, seconds: float, function: Callable[..., object], *arguments: Any) -> None:
        """Calls in the loop, later."""
        assert self._loop is not None
        self._loop.call_later(seconds, function, *arguments)

    def spawn(self, work: Coroutine[Any, Any, None], *, vital: bool = False) -> None:
        """Runs a task of the node's own; one that is vital ends the node if it breaks."""
        assert self._loop is not None
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._ended(task, vital))

    def _ended(self, task: asyncio.Task[None], vital: bool) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, SpaceError):
                log.warning("node %d: %s", self.id, error)
            else:
                log.error("node %d: a task broke", self.id, exc_info=error)
            if vital:
                self._on_fatal(StorageError(f"node {self.id} met {error!r:.200}"))

    def run(self, work: Coroutine[Any, Any, T], *, seconds: float) -> T:
        """Runs something in the loop for another thread, and waits for it.

        Raises:
            UnavailableError: the node has ended, or it takes longer.
        """
        if self._loop is None or self._stopping.is_set() or threading.get_ident() == self._thread:
            work.close()
            raise UnavailableError(f"node {self.id} does not run, or cannot wait for itself")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        except CancelledError:
            raise UnavailableError(f"node {self.id} has stopped") from None
        except TimeoutError:
            future.cancel()
            raise UnavailableError(
                f"not done in {seconds:.0f} seconds", hint="space cluster status"
            ) from None

    def wait(self, future: Future[T]) -> T:
        """Waits for something the loop does.

        Raises:
            UnavailableError: the node has ended.
        """
        if threading.get_ident() == self._thread:
            raise UnavailableError("the loop of a node cannot wait for itself")
        while True:
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                if future.done():
                    continue
                if self._stopping.is_set() or self._loop is None or self._loop.is_closed():
                    raise UnavailableError(f"node {self.id} has stopped") from None

    def schedule(self, group: Group) -> None:
        """Makes :meth:`Group.work` run once in this turn of the loop."""
        self._ready[group.number] = group
        if not self._working:
            self._working = True
            assert self._loop is not None
            self._loop.call_soon(self._work)

    def _work(self) -> None:
        self._working = False
        ready, self._ready = self._ready, {}
        for group in ready.values():
            group.work()

    async def _tick(self) -> None:
        due = self.now()
        while True:
            due += self._tick_seconds
            late = self.now() - due
            if late > 10 * self._tick_seconds:
                due += late  # the machine or the loop stood still: that was no silence of the leader
            await asyncio.sleep(max(0.0, due - self.now()))
            for parts in self.parts.values():
                group = parts.group
                group.expire()
                if group.stopped or group.failure is not None:
                    continue
                hurried = group.replica.driver.leader in self._lost and not group.replica.leads()
                for _ in range(HURRY if hurried else 1):
                    group.replica.tick()
                group.work()
                if group.replica.driver.leader:
                    group.wake()

    # --- the writer ----------------------------------------------------------------------------------------

    def write(self, group: Group, jobs: list[Job]) -> None:
        """Hands jobs to the writer."""
        self._jobs.put((group, jobs))

    def _write(self) -> None:
        """The writer's thread: everything that waits, then one sync of each log, then the news of it."""
        while True:
            found = [self._jobs.get()]
            while not self._jobs.empty():
                found.append(self._jobs.get())
            try:
                self._carry_out([each for each in found if each is not None])
            except BaseException as error:  # without its writer a node would stand still for ever
                log.exception("the writer of node %d broke", self.id)
                self.call_soon(self._on_fatal, StorageError(f"the writer met {error!r:.200}"))
                return
            if None in found:
                return

    def _carry_out(self, found: list[tuple[Group, list[Job]]]) -> None:
        done: list[tuple[Group, list[Job]]] = []
        last: dict[int, Job] = {}
        for group, jobs in found:
            try:
                if group.failure is None:
                    for job in jobs:
                        self._write_job(group, job)
                        if job.items:
                            last[id(job.log)] = job
            except SpaceError as error:
                self.call_soon(group.fail, error)
            else:
                done.append((group, jobs))
        try:
            # A log for each shard: their syncs go to the disk together, and it flushes its cache once or twice for all.
            for _ in (
                self._syncing.map(Job.sync, last.values()) if len(last) > 1 else map(Job.sync, last.values())
            ):
                pass
        except SpaceError as error:
            for group, _ in done:
                self.call_soon(group.fail, error)
            return
        for group, jobs in done:
            self.call_soon(group.written, jobs)

    def _write_job(self, group: Group, job: Job) -> None:
        """Writes, and on a full disk waits until there is room: nothing of it has been acknowledged."""
        while True:
            try:
                job.write()
            except DiskFullError as error:
                log.warning("shard %d of node %d waits: %s", group.number, self.id, error)
                self.call_soon(self.yield_leadership, group)
                if self._stopping.wait(FULL_SECONDS):
                    raise
            else:
                return

    def yield_leadership(self, group: Group) -> bool:
        """Whether another node is asked to lead instead of this one, whose disk is full.

        Not more often than it makes sense: when all disks are full, callers are to hear of it.
        """
        if not group.replica.leads() or group.stopped:
            return False
        since = self.now() - self._yielded.get(group.number, -YIELD_SECONDS)
        if since >= YIELD_SECONDS:
            self._yielded[group.number] = self.now()
            self.spawn(self._hand_over(group))
        return not YIELDING_SECONDS <= since < YIELD_SECONDS

    async def _hand_over(self, group: Group) -> None:
        """Lets the follower that is furthest lead, if there is one; waits a little for it."""
        replica = group.replica
        if group.failure is not None or group.stopped or not replica.leads():
            return
        voters = replica.driver.configuration.voters
        known = replica.driver.progress()
        heirs = [
            (known[each][0], each) for each in voters if each != self.id and each in known and known[each][3]
        ]
        if not heirs:
            return
        replica.driver.transfer(max(heirs)[1])
        group.schedule()
        for _ in range(40):
            await asyncio.sleep(self._tick_seconds)
            if not replica.leads():
                return

    # --- peers -----------------------------------------------------------------------------------------------

    def send(self, group: Group, send: Send) -> None:
        """Lets a message leave."""
        self.transport.send_raft(send.to, group.number, send.message, send.blobs, urgent=send.urgent)

    def on_raft(self, sender: int, number: int, message: bytes, blobs: list[Blob]) -> None:
        """A message of a peer."""
        self._lost.discard(sender)
        if sender not in self._dialled and (address := self.transport.callers().get(sender)):
            self._dial(sender, *address)  # who brings a new member its first entries is not in its state yet
        parts = self.parts.get(number)
        if parts is None or parts.group.stopped or parts.group.failure is not None:
            return
        try:
            parts.group.replica.receive(sender, message, blobs)
        except StorageError as error:
            parts.group.fail(error)
            return
        except SpaceError as error:
            log.warning("shard %d of node %d: %s", number, self.id, error)
            return
        self.schedule(parts.group)

    def on_unreachable(self, node: int) -> None:
        """Messages to a peer were lost."""
        self._lost.add(node)
        for parts in self.parts.values():
            if not parts.group.stopped and parts.group.failure is None:
                parts.group.replica.driver.unreachable(node)

    def learn_members(self) -> None:
        """Lets the transport know where the members are: where they call from, or what the state says."""
        known: dict[int, tuple[str, int]] = {}
        for parts in self.parts.values():
            for node, (_, address) in parts.host.members().items():
                if address:
                    known[node] = parse_address(address)
        for node, (host, port) in self.transport.callers().items():
            if node in known or any(node in _everybody(parts.group) for parts in self.parts.values()):
                known[node] = host, port
        known.pop(self.id, None)
        for node, (host, port) in known.items():
            self._dial(node, host, port)

    def _dial(self, node: int, host: str, port: int) -> None:
        with contextlib.suppress(UsageError):
            self.transport.set_peer(node, host, port)
            self._dialled.add(node)

    # --- requests of peers -------------------------------------------------------------------------------------

    async def on_request(
        self, sender: int, method: str, body: Any, attachments: list[Buffer]
    ) -> tuple[Any, list[Buffer]]:
        """Answers a peer.

        Raises:
            SpaceError: what the peer is told.
        """
        handler = self._handlers.get(method)
        if handler is None:
            raise UsageError(f"no such request: {method!r}", hint="is this node older?")
        try:
            return await handler(self, sender, body, attachments)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise UsageError(f"a malformed request {method!r}: {error!r:.200}") from None

    def _group(self, number: Any) -> Parts:
        parts = self.parts.get(number) if type(number) is int else None
        if parts is None:
            raise NotFoundError(f"node {self.id} has no shard {number!r:.20}")
        return parts

    async def _on_execute(
        self, sender: int, body: Any, attachments: list[Buffer]
    ) -> tuple[Any, list[Buffer]]:
        number, document, exempt = body
        if document is None:
            document, attachments = unpacked(attachments)
        return await self._group(number).group.serve(sender, document, attachments, exempt=bool(exempt)), []

    async def _on_status(self, sender: int, body: Any, attachments: list[Buffer]) -> tuple[Any, list[Buffer]]:
        return self.status(), []

    async def _on_members(
        self, sender: int, body: Any, attachments: list[Buffer]
    ) -> tuple[Any, list[Buffer]]:
        number, what, node, address = body
        if what not in _STEPS or type(node) is not int or type(address) is not str:
            raise UsageError("not a change of members")
        await self._lead_change(self._group(number), what, node, address)
        return None, []

    async def _on_chunk(self, sender: int, body: Any, attachments: list[Buffer]) -> tuple[Any, list[Buffer]]:
        number, start, stop = body
        parts = self._group(number)
        replica = parts.group.replica
        last = min(int(stop), replica.machine.applied.position)
        if int(start) > last:
            raise UnavailableError(f"node {self.id} has applied up to {last} only", hint="ask a little later")
        with self._own_damage(parts):
            chunk = await asyncio.to_thread(
                read_chunk,
                replica.log,
                int(start),
                stop=last + 1,
                bytes_max=CHUNK_BYTES,
                reclaimed=parts.host.is_reclaimed,
            )
        return None, list(encode_chunk(chunk))

    @contextlib.contextmanager
    def _own_damage(self, parts: Parts) -> Iterator[None]:
        """Damage here is none where it is met: there another peer is to be asked, and another one is to lead.

        Raises:
            UnavailableError: the log is damaged.
        """
        try:
            yield
        except CorruptionError as error:
            parts.host.heal_later()
            self.spawn(self._hand_over(parts.group))
            raise UnavailableError(f"node {self.id} is damaged: {Exception.__str__(error)}") from None

    async def _on_links(self, sender: int, body: Any, attachments: list[Buffer]) -> tuple[Any, list[Buffer]]:
        number, indexes = body
        parts = self._group(number)
        found = parts.group.replica.log
        with self._own_damage(parts):
            return [
                found.read(index).chain if found.first_index <= index <= found.last_index else None
                for index in indexes[:64]
            ], []

    async def _on_checkpoint(
        self, sender: int, body: Any, attachments: list[Buffer]
    ) -> tuple[Any, list[Buffer]]:
        number, position, name, offset = body
        host = self._group(number).host
        if not name:
            return await asyncio.to_thread(host.newest_checkpoint), []
        data = await asyncio.to_thread(
            host.read_checkpoint, int(position), str(name), int(offset), CHUNK_BYTES
        )
        return None, [data]

    async def _on_caught_up(
        self, sender: int, body: Any, attachments: list[Buffer]
    ) -> tuple[Any, list[Buffer]]:
        number, ok = body
        group = self._group(number).group
        if not group.stopped and group.failure is None:
            group.replica.driver.caught_up(sender, ok=bool(ok))
            self.schedule(group)
        return None, []

    async def _on_digests(
        self, sender: int, body: Any, attachments: list[Buffer]
    ) -> tuple[Any, list[Buffer]]:
        number, position, *version = body
        if version != [STATE_VERSION]:
            return [], []  # rows of another version of the program have other digests
        ours = [each for each in self._group(number).group.replica.digests if each.position >= int(position)]
        return [[each.position, each.digest.to_bytes(32, "big"), each.chain] for each in ours], []

    async def _on_confirmed(
        self, sender: int, body: Any, attachments: list[Buffer]
    ) -> tuple[Any, list[Buffer]]:
        """Of a leader: an index not below anything committed before now; of another node: nothing."""
        group = self._group(body[0]).group
        if not group.replica.leads() or group.stopped or group.failure is not None:
            return None, []
        future: Future[None] = Future()
        group.begin_barrier(future, STATUS_SECONDS)
        await asyncio.wrap_future(future)
        return group.replica.driver.commit if group.replica.leads() else None, []

    async def _on_call(self, sender: int, body: Any, attachments: list[Buffer]) -> tuple[Any, list[Buffer]]:
        number, method = body
        group = self._group(number).group
        answer = self.answers.get(method) if isinstance(method, str) else None
        if answer is None:
            return await asyncio.to_thread(self.on_call, group.number, str(method)), []
        if sender not in _everybody(group):
            raise RefusedError(f"who asks for {method} is no member of this cluster")
        return await asyncio.to_thread(answer), []

    _handlers: Final = {
        "call": _on_call,
        "confirmed": _on_confirmed,
        "execute": _on_execute,
        "status": _on_status,
        "members": _on_members,
        "chunk": _on_chunk,
        "links": _on_links,
        "checkpoint": _on_checkpoint,
        "caught up": _on_caught_up,
        "digests": _on_digests,
    }

    # --- bringing a replica forward ------------------------------------------------------------------------------

    async def reopen(self, group: Group) -> None:
        """Starts the group's consensus anew from what is durable (rule 3)."""
        if group.stopped:
            return
        group.stopped = True
        try:
            await self._drained(group)
            self._restart(group)
        except SpaceError as error:
            group.fail(error)
            return
        finally:
            group.stopped = False
        self.schedule(group)

    async def _drained(self, group: Group) -> None:
        """Waits until the writer has nothing more of this group."""
        while group.writing and group.failure is None:  # noqa: ASYNC110 - rare, and an event would cost every job
            await asyncio.sleep(self._tick_seconds / 5)

    def _restart(self, group: Group) -> None:
        self._incarnation += 1
        group.replica.reopen(self._incarnation)

    async def install(self, group: Group, offer: Offer) -> None:
        """Brings the log and the state here up to what a peer offers, then goes on.

        While it lasts this replica neither votes nor acknowledges: to its group it is a node that is down.
        """
        if group.stopped:
            return
        # What is here already must stay: only the leader does not know, and the offer's members may be old.
        ok = offer.index <= group.replica.driver.commit or await self._bring_forward(group, offer)
        with contextlib.suppress(SpaceError):
            await self.transport.request(
                offer.sender, "caught up", [group.number, ok], timeout=STATUS_SECONDS
            )
        self.learn_members()
        self.schedule(group)

    async def _bring_forward(self, group: Group, offer: Offer) -> bool:
        group.stopped = True
        log.info(
            "shard %d of node %d: fetching the log up to %d from node %d",
            group.number,
            self.id,
            offer.index,
            offer.sender,
        )
        fetched = True
        try:
            await self._drained(group)
            try:
                await self._fetch(group, offer)
            except (CorruptionError, StorageError):
                raise
            except SpaceError as error:
                log.warning("shard %d of node %d: %s", group.number, self.id, error)
                fetched = False
            self._restart(group)
        except SpaceError as error:
            group.fail(error)
            return False
        finally:
            group.stopped = False
        return fetched

    async def _fetch(self, group: Group, offer: Offer) -> None:
        replica = group.replica
        file, own = replica.state_file, replica.log
        state = file.state
        assert state is not None
        if offer.term > state.term:
            # What comes has entries of that term: the log must never be ahead of the term in the state.
            state = attrs.evolve(state, term=offer.term, vote=0)
            await asyncio.to_thread(file.save, state, sync=True)
        await self._find_common(group, offer)
        while own.last_index < offer.index:
            _, pieces = await self._asked(
                offer.sender, "chunk", [group.number, own.last_index + 1, offer.index], SHIP_SECONDS
            )
            await asyncio.to_thread(_receive, own, b"".join(pieces))
        if own.term(offer.index) != offer.index_term:
            raise UnavailableError(f"node {offer.sender} sent another entry {offer.index} than it offered")
        await asyncio.to_thread(own.sync)
        await self._fetch_checkpoint(group, offer)
        state = attrs.evolve(
            state,
            commit=max(state.commit, offer.index),
            configuration=offer.configuration,
            configuration_index=offer.index,
        )
        await asyncio.to_thread(file.save, state, sync=True)
        await asyncio.to_thread(replica.machine.catch_up, own, offer.index)

    async def _asked(
        self, peer: int, method: str, body: list[Any], seconds: float
    ) -> tuple[Any, list[Buffer]]:
        """A peer's answer; what is wrong there is not wrong here.

        Raises:
            UnavailableError: there is none.
        """
        try:
            return await self.transport.request(peer, method, body, timeout=seconds)
        except SpaceError as error:
            raise UnavailableError(
                f"node {peer} did not answer {method}: {Exception.__str__(error)}"
            ) from None

    async def _find_common(self, group: Group, offer: Offer) -> None:
        """Cuts the own log back to where it is the same as the sender's."""
        own = group.replica.log
        loop = asyncio.get_running_loop()

        def their_link(index: int) -> bytes | None:
            asked = asyncio.run_coroutine_threadsafe(
                self._asked(offer.sender, "links", [group.number, [index]], STATUS_SECONDS), loop
            )
            links: list[bytes | None] = asked.result()[0]
            return links[0]

        last = min(own.last_index, offer.index)
        if last == 0:
            return
        common = await asyncio.to_thread(first_divergence, own, their_link, last) - 1
        if common < group.replica.machine.applied.position:
            raise CorruptionError(
                f"what is applied here at {common + 1} is not what node {offer.sender} has there",
                position=common + 1,
                hint="stop this node and remove it from the cluster; then add it anew",
            )
        if common < last:
            await asyncio.to_thread(own.truncate_after, common)

    async def _fetch_checkpoint(self, group: Group, offer: Offer) -> None:
        """Fetches a checkpoint of the state where folding the log would take much longer."""
        host = self.parts[group.number].host
        found, _ = await self._asked(offer.sender, "checkpoint", [group.number, 0, "", 0], SHIP_SECONDS)
        if (
            not found
            or found[0] - group.replica.machine.applied.position < CHECKPOINT_GAIN
            or found[0] > offer.index
        ):
            return
        position, files = found
        for name, size in files:
            offset = 0
            while offset < size:
                _, pieces = await self._asked(
                    offer.sender, "checkpoint", [group.number, position, name, offset], SHIP_SECONDS
                )
                data = b"".join(pieces)
                if not data:
                    return
                await asyncio.to_thread(host.write_checkpoint, position, name, offset, data)
                offset += len(data)
        await asyncio.to_thread(host.adopt_checkpoint, position)

    # --- members ---------------------------------------------------------------------------------------------------

    async def change_members(self, what: str, node: int, address: str = "", shard: int | None = None) -> None:
        """Adds (learner first, then voter), removes, or lets lead, in one shard or all; may be asked again any time.

        Raises:
            SpaceError: it is impossible, or not finished in time.
        """
        if node < 1:
            raise UsageError(f"not the id of a node: {node}", hint="ids are numbers from 1")
        for parts in [self._group(shard)] if shard is not None else list(self.parts.values()):
            await self._change(parts, what, node, address)

    async def _change(self, parts: Parts, what: str, node: int, address: str) -> None:
        """Has the leader of one shard, wherever it is, carry out a change."""
        deadline = self.now() + CHANGE_SECONDS
        last: SpaceError = NotLeaderError("nobody leads")
        while self.now() < deadline:
            group = parts.group
            leader = group.replica.driver.leader
            try:
                if group.replica.leads():
                    await self._lead_change(parts, what, node, address)
                    return
                if leader not in (0, self.id):
                    await self.transport.request(
                        leader, "members", [group.number, what, node, address], timeout=CHANGE_SECONDS
                    )
                    return
            except UnavailableError as error:
                last = error
            await asyncio.sleep(RETRY_SECONDS)
        raise UnavailableError(f"not done in {CHANGE_SECONDS:.0f} seconds: {Exception.__str__(last)}")

    async def _lead_change(self, parts: Parts, what: str, node: int, address: str) -> None:
        """Carries out a change as the leader, step by step.

        Raises:
            NotLeaderError: this node does not lead (any more): the next leader goes on.
        """
        deadline = self.now() + CHANGE_SECONDS
        while self.now() < deadline:
            group = parts.group
            if group.failure is not None:
                raise group.failure
            if not group.replica.leads() or group.stopped:
                raise group.replica.driver.not_leader()
            try:
                if _STEPS[what](self, parts, node, address):
                    return
            except ConflictError as error:
                if error.status is not Status.UNAVAILABLE:
                    raise
            await asyncio.sleep(RETRY_SECONDS)
        raise UnavailableError(
            f"node {node} has not caught up in {CHANGE_SECONDS:.0f} seconds",
            hint="asking again goes on with it",
        )

    def _step_add(self, parts: Parts, node: int, address: str) -> bool:
        """One step towards ``node`` being a voter; True when it is."""
        from space_raft_engine import encode_change

        group, driver = parts.group, parts.group.replica.driver
        made = driver.configuration
        if node in made.voters and not made.voters_outgoing:
            return True
        if made.voters_outgoing:
            return False
        if node in made.learners:
            known = driver.progress().get(node)
            if known is None or driver.last_index - known[0] > CAUGHT_UP_POSITIONS or known[2] != "replicate":
                return False
            change = encode_change([("add", node)], transition="implicit", context=self._context({}))
        else:
            if not address:
                raise UsageError(f"no address for node {node}", hint="space cluster add HOST:PORT --id N")
            self.transport.set_peer(node, *parse_address(address))
            change = encode_change([("learner", node)], context=self._context({node: address}))
        group.replica.change(change)
        self.schedule(group)
        return False

    def _step_remove(self, parts: Parts, node: int, address: str) -> bool:
        from space_raft_engine import encode_change

        group, driver = parts.group, parts.group.replica.driver
        made = driver.configuration
        if made.voters_outgoing:
            return False
        if node not in made.voters and node not in made.learners:
            self.transport.forget_peer(node)
            return True
        group.replica.change(encode_change([("remove", node)], context=self._context({})))
        self.schedule(group)
        return False

    def _step_lead(self, parts: Parts, node: int, address: str) -> bool:
        group = parts.group
        if node == self.id:
            return True
        if node not in group.replica.driver.configuration.voters:
            raise NotFoundError(
                f"node {node} is no voter of shard {group.number}", hint="space cluster status"
            )
        if self._led_since.get(group.number, 0.0) + LEAD_SECONDS < self.now():
            self._led_since[group.number] = self.now()
            group.replica.driver.transfer(node)
            self.schedule(group)
        return False

    def _context(self, addresses: dict[int, str]) -> bytes:
        return encode_change_context(self.time_ns(), addresses)

    # --- looking after itself --------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What this node knows of itself, and of its followers where it leads."""
        return {
            "node": self.id,
            "address": self.address,
            "shards": [_shard_status(parts) for parts in self.parts.values()],
            "differences": list(self.differences),
        }

    async def cluster_status(self) -> list[dict[str, Any]]:
        """The status of every member that answers."""
        members = {self.id} | {node for parts in self.parts.values() for node in parts.host.members()}
        members |= {node for parts in self.parts.values() for node in _everybody(parts.group)}
        found = await asyncio.gather(*(self._ask_status(node) for node in sorted(members)))
        return [each for each in found if each is not None]

    async def _ask_status(self, node: int) -> dict[str, Any] | None:
        if node == self.id:
            return self.status()
        try:
            answer, _ = await self.transport.request(node, "status", None, timeout=STATUS_SECONDS)
        except SpaceError:
            return None
        return answer if isinstance(answer, dict) and answer.get("node") == node else None

    async def _compare(self) -> None:
        """Compares digests with the other members, spreads leaders, notes new addresses."""
        while True:
            await asyncio.sleep(DIGEST_SECONDS)
            self.learn_members()
            for parts in self.parts.values():
                if parts.group.stopped or parts.group.failure is not None:
                    continue
                with contextlib.suppress(UnavailableError, NotFoundError, NotLeaderError):
                    await self._compare_digests(parts)
                self._spread(parts.group)

    def _spread(self, group: Group) -> None:
        """With several shards, lets each be led by another node, as far as all are well."""
        replica = group.replica
        if len(self.parts) < 2 or not replica.leads() or group.stopped:
            return
        voters = replica.driver.configuration.voters
        wanted = voters[group.number % len(voters)] if voters else self.id
        known = replica.driver.progress().get(wanted)
        since = self._led_since.setdefault(group.number, self.now())
        if wanted == self.id or known is None or not known[3] or known[2] != "replicate":
            return
        behind = replica.driver.last_index - known[0]
        if self.now() - since > LEAD_SECONDS and behind <= CAUGHT_UP_POSITIONS:
            self._led_since[group.number] = self.now()
            replica.driver.transfer(wanted)
            self.schedule(group)

    async def _compare_digests(self, parts: Parts) -> None:
        """Whether a majority of the others has another state at a position than this node: then this one is wrong."""
        group = parts.group
        ours = {each.position: each for each in group.replica.digests}
        if not ours:
            return
        voters = [each for each in group.replica.driver.configuration.voters if each != self.id]
        if not voters:
            return
        since = min(ours)
        answers = await asyncio.gather(
            *(
                self.transport.request(
                    each, "digests", [group.number, since, STATE_VERSION], timeout=STATUS_SECONDS
                )
                for each in voters
            ),
            return_exceptions=True,
        )
        theirs = [_digests(each[0]) for each in answers if not isinstance(each, BaseException)]
        for position, mine in sorted(ours.items()):
            known = [each[position] for each in theirs if position in each]
            against = [each for each in known if (each.digest, each.chain) != (mine.digest, mine.chain)]
            if against and 2 * len(against) >= len(known) + 1 and len(against) > len(voters) // 2:
                await self._differs(parts, mine, against[0])
                return

    async def _differs(self, parts: Parts, mine: Digest, theirs: Digest) -> None:
        """Stops a replica that is not what the others are, says where, and rebuilds it from the log."""
        group = parts.group
        if mine.chain != theirs.chain:
            group.fail(
                CorruptionError(
                    f"the log of shard {group.number} differs from its peers' at or before position {mine.position}",
                    position=mine.position,
                    hint=f"no start heals that: space cluster remove {self.id}, and add a node with an empty directory",
                )
            )
            return
        group.stopped = True
        try:
            await self._drained(group)
            difference = await asyncio.to_thread(parts.host.rebuild)
            text = f"shard {group.number}: state at {mine.position} differed from the other members'; {difference}"
            log.error("node %d: %s", self.id, text)
            self.differences.append(text)
            del self.differences[:-16]
            group.replica.digests.clear()
            self._restart(group)
        except SpaceError as error:
            group.fail(error)
        finally:
            group.stopped = False
        self.schedule(group)

    def failed(self, group: Group, error: SpaceError) -> None:
        """A group of this node cannot go on."""
        if isinstance(error, CorruptionError):
            self.parts[group.number].host.heal_later()
        if not self._stopping.is_set():
            self._on_fatal(error)


_STEPS: Final = {"add": Node._step_add, "remove": Node._step_remove, "lead": Node._step_lead}  # noqa: SLF001


def _no_calls(number: int, method: str) -> Any:
    raise UnavailableError("this node answers no calls yet")


def _receive(own: Log, raw: bytes) -> None:
    receive_chunk(own, decode_chunk(raw))


def _everybody(group: Group) -> Sequence[int]:
    made = group.replica.driver.configuration
    return (*made.voters, *made.learners, *made.voters_outgoing)


def _digests(answer: Any) -> dict[int, Digest]:
    """Digests of a peer by position; nothing of an answer that is malformed."""
    found: dict[int, Digest] = {}
    with contextlib.suppress(ValueError, TypeError):
        for position, digest, chain in answer:
            found[int(position)] = Digest(int(position), int.from_bytes(digest, "big"), bytes(chain))
    return found


def _shard_status(parts: Parts) -> dict[str, Any]:
    group = parts.group
    driver, applied = group.replica.driver, group.replica.machine.applied
    made = driver.configuration
    role = "leader" if group.replica.leads() else "learner" if driver.node in made.learners else "follower"
    if driver.node not in (*made.voters, *made.learners, *made.voters_outgoing):
        role = "outsider"
    return {
        "shard": group.number,
        "role": "failed" if group.failure is not None else "catching up" if group.stopped else role,
        "term": driver.term,
        "leader": driver.leader,
        "position": applied.position,
        "digest": applied.digest.to_bytes(32, "big"),
        "commit": driver.commit,
        "last": driver.last_index,
        "voters": list(made.voters),
        "learners": list(made.learners),
        "failure": str(group.failure) if group.failure is not None else "",
    }


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``.

    Raises:
        UsageError: it is not one.
    """
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isascii() or not port.isdecimal() or not 0 <= int(port) < 65536:
        raise UsageError(f"not an address: {text!r}", hint="write HOST:PORT")
    return host.strip("[]"), int(port)


def empty_state(node: int) -> RaftState:
    """The Raft state of a node that waits to be added to a group."""
    from space.wal.raft_state import Configuration

    return RaftState(node, 0, 0, 0, Configuration(), 0)
