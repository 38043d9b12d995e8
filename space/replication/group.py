"""One shard of a running node: a replica in the loop, and the way in for callers on any thread.

Every call is tried until it has an outcome or its time is over: handed to the replica where this node leads, sent
to the leader where another one does, kept while nobody is known to lead.  Each request carries a client id and a
sequence of this process, so that a command whose answer was lost is not applied again; and an answer is
given only when the state *here* has what it acknowledges, so that a caller reads what it wrote on whatever node it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

import attrs
import msgpack

from space._errors import (
    NotLeaderError,
    SpaceError,
    StorageError,
    UnavailableError,
    error_document,
    error_of,
)
from space.events.command_codec import decode_requests, encode_requests
from space.events.commands import REPLIES_KEPT_PER_CLIENT, Buffer, Receipt, ReceiveShipment, Request
from space.replication.replica import Job, Replica, Ticket, Work
from space.replication.wire import ATTACHMENTS_MAX

if TYPE_CHECKING:
    from space.replication.node import Node

CALL_SECONDS: Final = 30.0
"""How long a command or a read is tried through elections before its caller is told that nobody leads."""

RETRY_SECONDS: Final = 0.03
RETRY_SECONDS_MAX: Final = 0.5
FORWARD_SECONDS: Final = 5.0
"""How long an answer of a leader is waited for before the command is tried again."""

FORWARD_REQUESTS_MAX: Final = 2048
FORWARD_BYTES_MAX: Final = 16 << 20
LOOSE_MAX: Final = ATTACHMENTS_MAX // 2
"""Frames that go to the leader as attachments of their own; more of them, or a shipment, go as one piece."""

LANE_WINDOW: Final = REPLIES_KEPT_PER_CLIENT // 2
"""Sequences of one client id that may be under way: a retry must still find the reply of the first attempt."""

log: Final = logging.getLogger("space.replication")
Outcome = Receipt | SpaceError


@attrs.define(eq=False)
class _Lane:
    """A client id with the runs of its sequences that have no outcome yet, each by its first."""

    client: bytes
    next: int = 1
    open: dict[int, None] = attrs.field(factory=dict)

    def room(self) -> int:
        """How many more sequences it can give."""
        return LANE_WINDOW - (self.next - next(iter(self.open))) if self.open else LANE_WINDOW


class _Lanes:
    """Client ids of this process, as many as its requests under way need."""

    def __init__(self, random_bytes: Callable[[int], bytes]) -> None:
        self._random_bytes = random_bytes
        self._lanes: list[_Lane] = []

    def sign(self, requests: Sequence[Request]) -> tuple[list[Request], list[tuple[_Lane, int]]]:
        """The requests with a client id and sequence each; those that have one keep it.

        Also the runs of sequences they take, each by its first: they have their outcomes at the same time.
        """
        signed, taken = [], []
        lane, room = self._roomy(), 0
        for request in requests:
            if request.client:
                signed.append(request)
                continue
            if room < 1:
                lane = self._roomy()
                room = lane.room()
                lane.open[lane.next] = None
                taken.append((lane, lane.next))
            room -= 1
            signed.append(Request(request.command, request.actor, lane.client, lane.next, request.guard))
            lane.next += 1
        return signed, taken

    def _roomy(self) -> _Lane:
        for lane in self._lanes:
            if lane.room() > 0:
                return lane
        self._lanes.append(_Lane(self._random_bytes(16)))
        return self._lanes[-1]

    def abandon(self, taken: list[tuple[_Lane, int]]) -> None:
        """Nobody waits for these any more, but an attempt may still be applied: their ids are not used again."""
        gone = {id(lane) for lane, _ in taken}
        self._lanes = [lane for lane in self._lanes if id(lane) not in gone]

    @staticmethod
    def release(taken: list[tuple[_Lane, int]]) -> None:
        """These runs of sequences have their outcomes."""
        for lane, sequence in taken:
            lane.open.pop(sequence, None)


@attrs.define(eq=False)
class _Call:
    """Requests of one caller, until they have their outcomes."""

    requests: list[Request]
    future: Future[list[Outcome]]
    deadline: float
    exempt: bool
    taken: list[tuple[_Lane, int]]
    tries: int = 0
    last: SpaceError | None = None

    @property
    def bytes(self) -> int:
        """A little more than what its frames take."""
        return sum(
            len(frame.stored)
            for request in self.requests
            for frame in getattr(request.command, "frames", ())
            if frame.stored is not None
        )


class Group:
    """See the module's text.  Everything but :meth:`execute`, :meth:`start` and the barriers runs in the loop."""

    def __init__(
        self,
        node: Node,
        number: int,
        replica: Replica,
        *,
        random_bytes: Callable[[int], bytes],
        refuse: Callable[[list[Request]], SpaceError | None] = lambda _: None,
    ) -> None:
        """Args:
        refuse: asked before requests are decided here: why they cannot be (a full disk), or None.
        """
        self.number = number
        self.replica = replica
        self.failure: SpaceError | None = None
        self.stopped = False
        """While set, nothing of the group moves: its log is brought forward, or its engine is made anew."""
        self._node = node
        self._refuse = refuse
        self._lanes = _Lanes(random_bytes)
        self._forwards: deque[_Call] = deque()
        self._calls: dict[_Call, None] = {}
        """Everything without an outcome, as it came."""
        self._homeless: dict[_Call, None] = {}
        self._flushing = False
        self._asking: dict[asyncio.Future[tuple[Any, list[Buffer]]], int] = {}  # and whom
        self.writing = 0

    # --- from any thread -----------------------------------------------------------------------------

    def start(
        self, requests: Sequence[Request], *, seconds: float = CALL_SECONDS, exempt: bool = False
    ) -> Future[list[Outcome]]:
        """Hands in requests to be decided in order; the future gets an outcome for each."""
        future: Future[list[Outcome]] = Future()
        self._node.call_soon(self._begin, list(requests), future, seconds, exempt)
        return future

    def execute(
        self, requests: Sequence[Request], *, seconds: float = CALL_SECONDS, exempt: bool = False
    ) -> list[Outcome]:
        """As :meth:`start`, and waits; never in the loop's thread."""
        return self._node.wait(self.start(requests, seconds=seconds, exempt=exempt))

    def barrier(self, *, seconds: float = CALL_SECONDS) -> None:
        """Returns once the state here has everything acknowledged anywhere before this call (ReadIndex).

        Raises:
            UnavailableError: no quorum answers.
        """
        self._node.wait(self.start_barrier(seconds=seconds))

    def start_barrier(self, *, seconds: float = CALL_SECONDS) -> Future[None]:
        """As :meth:`barrier`, for callers that have more to do than to wait."""
        future: Future[None] = Future()
        self._node.call_soon(self.begin_barrier, future, seconds)
        return future

    # --- commands --------------------------------------------------------------------------------------

    def _begin(
        self, requests: list[Request], future: Future[list[Outcome]], seconds: float, exempt: bool
    ) -> None:
        signed, taken = self._lanes.sign(requests)
        call = _Call(signed, future, self._node.now() + seconds, exempt, taken)
        self._calls[call] = None
        self._try(call)

    def _try(self, call: _Call) -> None:
        if call not in self._calls:
            return  # it was given up meanwhile
        if self._node.now() >= call.deadline or self.failure is not None:
            self._give_up(call)
            return
        if self.replica.leads() and not self.stopped:
            refused = self._refused(call.requests)
            if isinstance(refused, NotLeaderError):
                self._retry(call, refused)
                return
            if refused is not None:
                self._finish(call, [refused] * len(call.requests))
                return
            try:
                ticket = Ticket(
                    call.requests, lambda outcomes: self._decided(call, outcomes), exempt=call.exempt
                )
                self.replica.submit(ticket)
            except SpaceError as error:
                self._retry(call, error)
            else:
                self.schedule()
        elif self.replica.driver.leader not in (0, self._node.id) and not self.stopped:
            self._forwards.append(call)
            if not self._flushing:
                self._flushing = True
                self._node.call_soon(self._flush)
        else:
            self._homeless[call] = None

    def _refused(self, requests: list[Request]) -> SpaceError | None:
        """Why this leader cannot decide these: :class:`NotLeaderError` while another one is asked to lead instead."""
        refused = self._refuse(requests)
        if refused is not None and self._node.yield_leadership(self):
            return NotLeaderError(f"node {self._node.id} lets another one lead: {Exception.__str__(refused)}")
        return refused

    def _decided(self, call: _Call, outcomes: list[Outcome]) -> None:
        """Outcomes from here or from the leader."""
        position = 0
        for each in outcomes:
            if isinstance(each, Receipt):
                position = max(position, each.position)
            elif isinstance(each, NotLeaderError):
                self._retry(call, each)
                return
        if position <= self.replica.machine.applied.position:
            self._finish(call, outcomes)
        else:
            self.replica.when_applied(position, lambda _: self._finish(call, outcomes))
            self.schedule()

    def _finish(self, call: _Call, outcomes: list[Outcome]) -> None:
        self._lanes.release(call.taken)
        self._calls.pop(call, None)
        if not call.future.done():
            call.future.set_result(outcomes)

    def _retry(self, call: _Call, why: SpaceError) -> None:
        call.last = why
        call.tries += 1
        pause = min(RETRY_SECONDS * 2 ** min(call.tries - 1, 5), RETRY_SECONDS_MAX)
        self._node.call_later(pause, self._try, call)

    def _give_up(self, call: _Call) -> None:
        why = self.failure or call.last
        reason = Exception.__str__(why) if why is not None else "nobody leads"
        error = UnavailableError(
            f"shard {self.number} gave no answer: {reason}",
            hint="it may still be carried out; a quorum of nodes must run: space cluster status",
        )
        self._lanes.abandon(call.taken)
        self._calls.pop(call, None)
        self._homeless.pop(call, None)
        if not call.future.done():
            call.future.set_result([error] * len(call.requests))

    def expire(self) -> None:
        """Gives up what has waited for its time, wherever it is: for a leader, or for a quorum."""
        now = self._node.now()
        for call in [each for each in self._calls if each.deadline <= now]:
            self._give_up(call)

    def wake(self) -> None:
        """Tries again what waits for a leader, or for the answer of one that was followed by another."""
        leader = self.replica.driver.leader
        for asking, whom in self._asking.items():
            if whom != leader != 0:
                asking.cancel()  # it may be dead, and the time-out would be waited for
        waiting, self._homeless = self._homeless, {}
        for call in waiting:
            self._try(call)

    # --- to the leader -----------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Sends what waits to the leader, in as few requests as it fits in."""
        self._flushing = False
        while self._forwards:
            calls = [self._forwards.popleft()]
            count, size = len(calls[0].requests), calls[0].bytes
            while self._forwards:
                count += len(self._forwards[0].requests)
                size += self._forwards[0].bytes
                if count > FORWARD_REQUESTS_MAX or size > FORWARD_BYTES_MAX:
                    break
                calls.append(self._forwards.popleft())
            self._node.spawn(self._forward(calls))

    async def _forward(self, calls: list[_Call]) -> None:
        leader = self.replica.driver.leader
        requests = [request for call in calls for request in call.requests]
        document: list[Any] | None
        document, attachments = encode_requests(requests)
        if len(attachments) > LOOSE_MAX or any(isinstance(r.command, ReceiveShipment) for r in requests):
            attachments, document = packed(document, attachments), None
        exempt = any(call.exempt for call in calls)
        try:
            if leader in (0, self._node.id):
                raise NotLeaderError("the leader changed")
            answer = await self._ask(leader, [self.number, document, exempt], attachments)
            outcomes = _outcomes(answer, len(requests))
        except SpaceError as error:
            for call in calls:
                self._retry(call, error)
            return
        at = 0
        for call in calls:
            self._decided(call, outcomes[at : at + len(call.requests)])
            at += len(call.requests)

    async def _ask(self, leader: int, body: list[Any], attachments: Sequence[Buffer]) -> Any:
        """The leader's answer to requests.

        Raises:
            NotLeaderError: another one leads before there is an answer.
            SpaceError: there is none, or it is an error.
        """
        asking = asyncio.ensure_future(
            self._node.transport.request(leader, "execute", body, attachments, timeout=FORWARD_SECONDS)
        )
        self._asking[asking] = leader
        try:
            return (await asking)[0]
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # the node stops
            raise NotLeaderError("the leader changed") from None
        finally:
            asking.cancel()
            del self._asking[asking]

    async def serve(
        self, sender: int, document: Any, attachments: list[Buffer], *, exempt: bool
    ) -> list[Any]:
        """Decides requests that another node sent here, if this one leads.

        Raises:
            SpaceError: it does not, or they are malformed.
        """
        requests = decode_requests(document, attachments)
        if self.stopped or self.failure is not None:
            raise NotLeaderError(f"node {self._node.id} is not ready")
        if not self.replica.leads():
            raise self.replica.driver.not_leader()
        refused = self._refused(requests)
        if isinstance(refused, NotLeaderError):
            raise refused
        if refused is not None:
            return [error_document(refused)] * len(requests)
        future: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()

        def done(outcomes: list[Outcome]) -> None:
            if not future.done():
                future.set_result(outcomes)

        self.replica.submit(Ticket(requests, done, exempt=exempt, origin=sender))
        self.schedule()
        outcomes = await future
        return [
            [each.position, each.repeated] if isinstance(each, Receipt) else error_document(each)
            for each in outcomes
        ]

    # --- reads -------------------------------------------------------------------------------------------

    def begin_barrier(self, future: Future[None], seconds: float) -> None:
        """See :meth:`barrier`."""

        def done(error: SpaceError | None) -> None:
            if not future.done():
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)

        def late() -> None:
            done(
                UnavailableError(
                    f"shard {self.number} has no leader that a quorum follows",
                    hint="space cluster status; a stale read is possible: --stale",
                )
            )

        if self.failure is not None:
            done(self.failure)
            return
        self.replica.read(done)
        self._node.call_later(seconds, lambda: None if future.done() else late())
        self.schedule()

    # --- the loop's work -----------------------------------------------------------------------------------

    def schedule(self) -> None:
        """Makes the node look at this group in the same turn of its loop."""
        self._node.schedule(self)

    def work(self) -> None:
        """Carries out what the replica wants, until it wants nothing more from the loop."""
        if self.stopped or self.failure is not None:
            return
        before = self.replica.driver.leader
        try:
            work = self.replica.work(self._node.time_ns())
        except SpaceError as error:
            self.fail(error)
            return
        except BaseException as error:
            log.exception("shard %d of node %d broke", self.number, self._node.id)
            self.fail(StorageError(f"shard {self.number} met {type(error).__name__}: {error}"))
            return
        self._carry_out(work)
        if self.replica.driver.leader != before:
            self._node.call_soon(self.wake)

    def _carry_out(self, work: Work) -> None:
        for send in work.sends:
            self._node.send(self, send)
        if work.jobs:
            self.writing += len(work.jobs)
            self._node.write(self, work.jobs)
        for answer in work.answers:
            answer()
        if work.more:
            self._node.call_soon(self.schedule)
        if work.reopen:
            self._node.spawn(self._node.reopen(self))
        elif work.offer is not None:
            self._node.spawn(self._node.install(self, work.offer))

    def written(self, jobs: list[Job]) -> None:
        """The writer has carried these out."""
        self.writing -= len(jobs)
        if self.stopped or self.failure is not None:
            return  # what they made durable is found when the engine starts anew
        for job in jobs:
            self.replica.written(job)
        self.schedule()

    def fail(self, error: SpaceError) -> None:
        """Ends this replica: it cannot go on."""
        if self.failure is None:
            if not self._node.is_stopping:
                log.error("shard %d of node %d stops: %s", self.number, self._node.id, error)
            self.failure = error
            for call in list(self._calls):
                self._give_up(call)
            self._node.failed(self, error)


def packed(document: list[Any], attachments: Sequence[Buffer]) -> list[Buffer]:
    """Requests as two attachments, however many commands and frames they have: a shipment has tens of thousands."""
    return [msgpack.packb([document, list(map(len, attachments))]), b"".join(attachments)]


def unpacked(pieces: Sequence[Buffer]) -> tuple[Any, list[Buffer]]:
    """What :func:`packed` made two attachments of.

    Raises:
        ValueError, TypeError: they are nothing of the kind.
    """
    head, content = pieces
    document, lengths = msgpack.unpackb(head)
    view, at = memoryview(content), 0
    attachments: list[Buffer] = []
    for length in lengths:
        if type(length) is not int or not 0 <= length <= len(view) - at:
            raise ValueError("attachments that are not there")
        attachments.append(view[at : at + length])
        at += length
    if at != len(view):
        raise ValueError("more bytes than frames")
    return document, attachments


def _outcomes(answer: Any, count: int) -> list[Outcome]:
    """Outcomes as :meth:`Group.serve` wrote them.

    Raises:
        UnavailableError: they are malformed.
    """
    if not isinstance(answer, list) or len(answer) != count:
        raise UnavailableError("the leader's answer is malformed", hint="is that node older or newer?")
    outcomes: list[Outcome] = []
    last, receipt = None, None
    for each in answer:
        if receipt is not None and each == last:  # of the same batch, as most are
            outcomes.append(receipt)
        elif isinstance(each, dict):
            outcomes.append(error_of(each))
        elif isinstance(each, list) and len(each) == 2 and type(each[0]) is int:
            last, receipt = each, Receipt(each[0], repeated=bool(each[1]))
            outcomes.append(receipt)
        else:
            raise UnavailableError("the leader's answer is malformed", hint="is that node older or newer?")
    return outcomes
