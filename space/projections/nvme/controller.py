"""A controller: what one host sees of one subsystem, from its Connect to the end of its admin queue.

::

            Connect             CC.EN 0→1            CC.SHN
    (none) ────────▶ disabled ───────────▶ enabled ─────────▶ shut down
                        ▲                     │
                        └──── CC.EN 1→0 ──────┘   its I/O queues are closed, features are as at first

It keeps properties, features, events waiting to be told, and the time by which the host must be heard of.
Commands come through its queues (:mod:`space.projections.nvme.queue`).  Time is an argument, in seconds of any
steady clock.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import attrs

from space.projections.nvme.connection import Limits
from space.projections.nvme.pdu import Command
from space.projections.nvme.reservations import Notice
from space.projections.nvme.status import CommandError, NvmeStatus
from space.projections.nvme.target import DISCOVERY_NQN, Subsystem, Target

if TYPE_CHECKING:
    from space.projections.nvme.queue import Queue

VERSION: Final = 0x0002_0000
"""NVM Express Base Specification 2.0."""
QUEUE_ENTRIES_MAX: Final = 1024
"""Of one queue, and outstanding at a time (MQES, MAXCMD): a command that waits costs a few hundred bytes."""
EVENT_REQUESTS_MAX: Final = 4
ERROR_ENTRIES_MAX: Final = 64
NOTICES_MAX: Final = 64
"""Reservation notices kept for a host that does not read them; then the oldest goes, and the count shows it."""
READY_HALF_SECONDS: Final = 15
"""CAP.TO: enabling takes no time, disabling waits for writes under way."""
DISCOVERY_KEEP_ALIVE_MS: Final = 120_000
"""A discovery controller whose host named no time lives this long in silence: hosts forget to disconnect them."""

CC_EN: Final = 1
CSTS_RDY: Final = 1
CSTS_CFS: Final = 2
CSTS_SHUTTING: Final = 1 << 2
CSTS_SHUT: Final = 2 << 2


class Property(enum.IntEnum):
    """Offsets of properties (Base Specification 2.0, figure 35)."""

    CAP = 0x00
    VS = 0x08
    CC = 0x14
    CSTS = 0x1C
    CRTO = 0x68


CAP: Final = (QUEUE_ENTRIES_MAX - 1) | 1 << 16 | READY_HALF_SECONDS << 24 | 1 << 37 | 1 << 43 | 1 << 59
"""MQES, contiguous queues, TO, NVM command set, command set profiles, ready with media."""
_CC_WRITABLE: Final = 0x00FF_FFF1
_CC_CHECKED: Final = 0x00FF_3FF0
"""What must have a certain value when the controller is enabled."""
_CC_GOOD: Final = frozenset({6 << 16 | 4 << 20, 6 << 16 | 4 << 20 | 6 << 4})
"""Entry sizes 64 and 16, pages of 4 KiB, round robin, and the NVM command set or all supported ones."""


class Event(enum.IntEnum):
    """Asynchronous events: dword 0 of the completion (log page, information, type; figure 146)."""

    NAMESPACE_CHANGED = 0x04 << 16 | 0x00 << 8 | 2
    ANA_CHANGED = 0x0C << 16 | 0x03 << 8 | 2
    DISCOVERY_CHANGED = 0x70 << 16 | 0xF0 << 8 | 2
    RESERVATION = 0x80 << 16 | 0x00 << 8 | 6


EVENT_BITS: Final = {
    Event.NAMESPACE_CHANGED: 1 << 8,
    Event.ANA_CHANGED: 1 << 11,
    Event.DISCOVERY_CHANGED: 1 << 31,
}
"""In the Asynchronous Event Configuration; reservation notices have a feature of their own."""


@attrs.frozen
class ErrorEntry:
    """A row of the error log."""

    count: int
    sqid: int
    cid: int
    status: int
    location: int
    lba: int
    nsid: int


@attrs.define
class Features:
    """Values a host may set; back to these when the controller is reset."""

    arbitration: int = 7  # no limit on a burst
    over_temperature: int = 0xFFFF
    under_temperature: int = 0
    error_recovery: int = 0
    write_cache: bool = True
    queues: int | None = None  # I/O queues agreed on
    write_atomicity: int = 0
    events: int = 0
    timestamp_ms: int = 0
    timestamp_origin: int = 0
    timestamp_at: float = 0.0
    host_behavior: bytes = bytes(512)
    reservation_masks: dict[int, int] = attrs.field(factory=dict)


class Controller:
    """One controller.

    Attributes:
        queues: by number; 0 is the admin queue.
        features: what the host has set.
        mutations: commands under way that change a namespace; a controller is not disabled before they are done.
        active: a command came since the last :meth:`tick`.
        changed_namespaces: whose numbers the changed namespace list has.
    """

    def __init__(
        self,
        target: Target,
        subsystem: Subsystem,
        number: int,
        *,
        host_nqn: str,
        host_id: bytes,
        keep_alive_ms: int,
        limits: Limits,
        now: float,
    ) -> None:
        """A controller whose admin queue is being connected."""
        self.target = target
        self.subsystem = subsystem
        self.number = number
        self.host_nqn = host_nqn
        self.host_id = host_id
        self.limits = limits
        self.actor = f"nvme:{host_nqn}"
        self.is_discovery = subsystem.nqn == DISCOVERY_NQN
        self.queues: dict[int, Queue] = {}
        self.features = Features(timestamp_at=now)
        self.mutations = 0
        self._when_idle: list[Callable[[], None]] = []
        self.active = False
        self.started = now
        self.changed_namespaces: set[int] = set()
        self.notices: deque[tuple[int, int, Notice]] = deque(maxlen=NOTICES_MAX)
        self.errors: deque[ErrorEntry] = deque(maxlen=ERROR_ENTRIES_MAX)
        self.error_count = 0
        self._notice_count = 0
        self._cc = 0
        self._enabled = self._failed = False
        self._shutdown = 0
        self._requests: deque[Command] = deque()
        self._pending: list[Event] = []
        self._told: set[Event] = set()
        self.keep_alive_ms = 0
        self._deadline: float | None = None
        self.set_keep_alive(keep_alive_ms, now)

    # --- life

    @property
    def ready(self) -> bool:
        """Whether it takes commands."""
        return self._enabled and not self._failed

    def end(self, reason: str) -> None:
        """Closes every connection, the admin queue's among them; the controller is gone."""
        self.subsystem.controllers.pop(self.number, None)
        self._enabled = False
        for queue in list(self.queues.values()):
            queue.close(reason)

    def set_keep_alive(self, milliseconds: int, now: float) -> None:
        """After so long without a command the controller is ended; 0: never."""
        self.keep_alive_ms = milliseconds
        self._refresh(now)

    def _refresh(self, now: float) -> None:
        milliseconds = self.keep_alive_ms or (DISCOVERY_KEEP_ALIVE_MS if self.is_discovery else 0)
        self._deadline = now + milliseconds / 1000 if milliseconds else None

    def mutation_done(self) -> None:
        """One of :attr:`mutations` is carried out."""
        self.mutations -= 1
        if not self.mutations:
            waiting, self._when_idle = self._when_idle, []
            for call in waiting:
                call()

    def when_idle(self, call: Callable[[], None]) -> None:
        """Calls back when nothing that changes a namespace is under way."""
        self._when_idle.append(call)

    def tick(self, now: float) -> None:
        """Time has passed; any command counts as a sign of life (traffic based keep alive, section 3.9)."""
        if self.active:
            self.active = False
            self._refresh(now)
        elif self._deadline is not None and now >= self._deadline:
            self._failed = True
            self.end(f"nothing was heard of {self.host_nqn} in time")

    # --- properties

    def get_property(self, offset: int, size: int) -> int:
        """A property; ``size`` is 4 or 8 bytes.

        Raises:
            CommandError: no such property, or it has another size.
        """
        if size != (8 if offset == Property.CAP else 4):
            raise CommandError(NvmeStatus.INVALID_FIELD, location=40)
        if offset == Property.CAP:
            return CAP
        if offset == Property.VS:
            return VERSION
        if offset == Property.CC:
            return self._cc
        if offset == Property.CSTS:
            return self._csts()
        if offset == Property.CRTO:
            return READY_HALF_SECONDS
        raise CommandError(NvmeStatus.INVALID_FIELD, location=44)

    def _csts(self) -> int:
        """It is ready until the last write is done: what a host sees as disabled changes nothing any more."""
        ready = CSTS_RDY if self._enabled or self.mutations else 0
        return ready | (CSTS_CFS if self._failed else 0) | self._shutdown

    def set_property(self, offset: int, size: int, value: int) -> bool:
        """Sets a property; only the configuration (CC) can be.

        Returns:
            whether the host asks for a shutdown: caches are to be flushed, then :meth:`shut_down` called.

        Raises:
            CommandError: another one, or another size.
        """
        if offset != Property.CC or size != 4:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=44 if size == 4 else 40)
        before, self._cc = self._cc, value & _CC_WRITABLE
        if self._cc & CC_EN and not before & CC_EN:
            self._enable()
        elif before & CC_EN and not self._cc & CC_EN:
            self._reset()
        asks = self._cc >> 14 & 3
        if asks and not before >> 14 & 3:
            self._shutdown = CSTS_SHUTTING
            return True
        return False

    def _enable(self) -> None:
        self._enabled = True
        self._shutdown = 0
        self._failed = (self._cc & _CC_CHECKED) not in _CC_GOOD

    def _reset(self) -> None:
        self._enabled = self._failed = False
        self._shutdown = 0
        self.features = Features(timestamp_at=self.features.timestamp_at)
        self._pending.clear()
        self._told.clear()
        self.changed_namespaces.clear()
        admin = self.queues.get(0)
        while self._requests:
            request = self._requests.popleft()
            if admin is not None:
                admin.forget(request)
        for number, queue in list(self.queues.items()):
            if number:
                queue.close("the controller was reset")

    def shut_down(self) -> None:
        """Caches are flushed."""
        self._shutdown = CSTS_SHUT

    # --- events

    def request_event(self, request: Command) -> None:
        """An Asynchronous Event Request: answered when there is something to tell.

        Raises:
            CommandError: too many wait already.
        """
        if len(self._requests) >= EVENT_REQUESTS_MAX:
            raise CommandError(NvmeStatus.EVENT_REQUESTS_EXCEEDED)
        self._requests.append(request)
        self._deliver()

    def cancel_request(self, cid: int) -> Command | None:
        """Takes an event request back, for Abort."""
        for request in self._requests:
            if request.cid == cid:
                self._requests.remove(request)
                return request
        return None

    def _emit(self, event: Event) -> None:
        """Tells the host once; again only after it has read the log page that goes with it."""
        bit = EVENT_BITS.get(event)
        if bit is not None and not self.features.events & bit:
            return
        if event not in self._told and event not in self._pending:
            self._pending.append(event)
            self._deliver()

    def _deliver(self) -> None:
        admin = self.queues.get(0)
        while self._requests and self._pending and admin is not None:
            event = self._pending.pop(0)
            self._told.add(event)
            admin.answer_event(self._requests.popleft(), event)

    def log_was_read(self, event: Event) -> None:
        """The host has read the log page of an event, and wants to hear of the next one."""
        self._told.discard(event)
        if event in self._pending:
            self._pending.remove(event)
        if event == Event.RESERVATION and self.notices:
            self._emit(event)

    def namespace_changed(self, nsid: int) -> None:
        """A namespace came, went or looks different."""
        self.changed_namespaces.add(nsid)
        self._emit(Event.NAMESPACE_CHANGED)

    def ana_changed(self) -> None:
        """The state of an ANA group is another."""
        self._emit(Event.ANA_CHANGED)

    def discovery_changed(self) -> None:
        """The discovery log is another."""
        self._emit(Event.DISCOVERY_CHANGED)

    def reservation_notice(self, nsid: int, notice: Notice) -> None:
        """Something happened to a reservation the host is registered for."""
        if self.features.reservation_masks.get(nsid, 0) >> notice & 1:
            return
        self._notice_count += 1
        self.notices.append((self._notice_count, nsid, notice))
        self._emit(Event.RESERVATION)

    # --- errors

    def log_error(self, sqid: int, command: Command, status: int, location: int) -> None:
        """A command failed: the error log has it."""
        self.error_count += 1
        lba = command.cdw10 | command.cdw11 << 32 if sqid else 0
        self.errors.appendleft(
            ErrorEntry(self.error_count, sqid, command.cid, status << 1, location, lba, command.nsid)
        )
