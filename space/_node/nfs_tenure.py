"""One node's time as the NFS server of a cluster: its epoch, and whether that is still the last one.

Opens and locks are in the memory of one server, so there is one at a time: whose start is the last in the log
(``NfsServerStarted``).  Nothing else makes a node the server, and nothing else ends it; no clock is trusted.

* A start carries the epoch it follows as its guard: of several that want to be next one is.
* Every command of a server carries its own epoch: what is decided after the next start is refused, however long it
  was on its way.
* An answer is preceded by a question to the quorum (ReadIndex), shared by all that ask within
  :data:`LOOK_SECONDS`: so a server that was stopped and goes on finds out before it reads.
* What was put into memory (an open, a lock) is only told after one more question: when it was put there, there was
  no next server yet, whose grace period protects it since.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from space._errors import SpaceError, UnavailableError
from space._node.member_vfs import answered, carried_out
from space._node.nfs_recovery import ACTOR, epoch_of, recorded_clients
from space.events import commands as cmd
from space.events.commands import Guard, Request
from space.projections.nfs.service import Recovery
from space.statemachine.apply import nfs_epoch_counter

if TYPE_CHECKING:
    from space._node.member import Member

LOOK_SECONDS: Final = 0.05
"""How old a look through a server may be, as through a mount; what was changed through it is seen at once."""

CONFIRM_SECONDS: Final = 10.0
"""How long a quorum is waited for: elections take less than one.  Then clients are told to come again."""


class Tenure:
    """The time in which a node is the server ``server`` in epoch ``epoch``."""

    def __init__(
        self, member: Member, server: str, epoch: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """It has not begun yet.

        ``clock`` goes on while the process stands still, and is read anew at each call.
        """
        self.member = member
        self.server = server
        self.epoch = epoch
        self.guard = Guard(nfs_epoch_counter(server), epoch)
        self.confirmed = clock()
        """When the last question was asked that a quorum has answered."""
        self._clock = clock
        self._asking: asyncio.Task[None] | None = None

    async def begin(self) -> bool:
        """Makes this node the server, unless another one became it meanwhile."""
        start = Request(cmd.StartNfsServer(self.server), ACTOR, guard=Guard(self.guard.name, self.epoch - 1))
        begun = self._clock()
        (outcome,) = await carried_out(self.member, [start])
        self.confirmed = begun
        return not isinstance(outcome, SpaceError) and not self.is_over

    @property
    def is_over(self) -> bool:
        """Whether another start is known here."""
        return epoch_of(self.member, self.server) != self.epoch

    async def look(self) -> None:
        """Returns if this is the server, and what is here is no older than :data:`LOOK_SECONDS`.

        Raises:
            UnavailableError: there is no quorum, or another node is the server.
        """
        await self._since(self._clock() - LOOK_SECONDS)

    async def confirm(self) -> None:
        """As :meth:`look`, of a time after the call."""
        await self._since(self._clock())

    async def _since(self, wanted: float) -> None:
        while self.confirmed < wanted:
            if self._asking is None:
                self._asking = asyncio.get_running_loop().create_task(self._ask())
            await asyncio.shield(self._asking)
        if self.is_over:
            raise UnavailableError("another node serves NFS now")

    async def _ask(self) -> None:
        begun = self._clock()
        try:
            await answered(self.member, self.member.group.start_barrier(seconds=CONFIRM_SECONDS))
            self.confirmed = begun
        finally:
            self._asking = None


class TenureRecovery(Recovery):
    """The recovery journal of a server that another node may follow."""

    shared = True

    def __init__(self, tenure: Tenure) -> None:
        """Of a tenure that has begun."""
        super().__init__(tenure.epoch, recorded_clients(tenure.member, tenure.server))
        self._tenure = tenure
        self._queued: list[cmd.Command] = []

    @property
    def dirty(self) -> bool:
        return bool(self._queued)

    def record(self, owner: bytes, verifier: bytes) -> None:
        self._queued.append(cmd.RecordNfsClient(self._tenure.server, owner, verifier))

    def forget(self, owner: bytes) -> None:
        self._queued.append(cmd.ForgetNfsClient(self._tenure.server, owner))

    async def look(self) -> None:
        await self._tenure.look()

    async def sync(self) -> None:
        tenure = self._tenure
        requests = [Request(each, ACTOR, guard=tenure.guard) for each in self._queued]
        if not requests:
            await tenure.confirm()
            return
        for outcome in await carried_out(tenure.member, requests):
            if isinstance(outcome, SpaceError):
                raise outcome
        del self._queued[: len(requests)]
