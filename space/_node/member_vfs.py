"""The file model over a replica, for a loop that serves many clients at once.

What differs from :class:`space._node.local_vfs.LocalFileSystem`:

* a command is waited for without holding up the loop, through elections and for as long as it takes: whoever is told
  that it failed could not know whether it was carried out after all;
* nothing is held back: commands of many clients that come at the same time are one batch anyway;
* each command carries a guard, so that none of a server that was replaced is carried out;
* looks show what is applied here.  The loop's thread must be within :meth:`space._node.member.Member.stale`, and who
  serves sees to it that what is here is new enough.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, TypeVar

import attrs

from space._errors import SpaceError, Status, UnavailableError, UsageError
from space._node.local_vfs import LocalFileSystem
from space._node.store import STALE_RETRIES
from space.events.commands import Buffer, Command, Guard, Receipt, Request
from space.events.ids import CapsuleId
from space.projections.vfs import Caller
from space.statemachine.decide import SIZE_MAX

if TYPE_CHECKING:
    from space._node.member import Member

ALIVE_SECONDS: Final = 1.0
"""How often it is looked whether the node that is to answer still runs."""

T = TypeVar("T")


async def answered(member: Member, future: Future[T]) -> T:
    """What a future of the node's loop brings, in another loop.

    Raises:
        UnavailableError: the node has ended.
        SpaceError: the future's.
    """
    waiting = asyncio.wrap_future(future)
    while not (await asyncio.wait([waiting], timeout=ALIVE_SECONDS))[0]:
        if member.node.is_stopping:
            raise UnavailableError("this node is stopping", hint="it may still be carried out")
    return waiting.result()


async def carried_out(member: Member, requests: Sequence[Request]) -> list[Receipt | SpaceError]:
    """The outcomes of commands, once each has one that is certain, or the node has ended."""
    return await answered(member, member.group.start(requests, seconds=math.inf))


class MemberFileSystem(LocalFileSystem):
    """See the module's text."""

    def __init__(self, member: Member, root: CapsuleId, guard: Guard, *, read_only: bool) -> None:
        """As :class:`LocalFileSystem`; what is changed is changed under ``guard``."""
        super().__init__(member, root, read_only=read_only)
        self._member = member
        self._guard = guard
        self._remembers = True  # looks are of what is here, and that has a version

    def stamp(self) -> int:
        # A batch has commands of many in it: what changed in one step was not changed by one command alone.
        return 2 * super().stamp()

    async def write(self, node: CapsuleId, offset: int, data: Buffer, caller: Caller) -> None:
        store = self._writable(node)
        if offset < 0 or offset + len(data) > SIZE_MAX:
            raise UsageError(f"offset {offset} is beyond the largest size", status=Status.TOO_LARGE)
        await self._check_file(store.stat(node), offset + len(data), caller)
        with store._read() as txn:
            row = store._row(txn, node)
            policy = store._policy(txn, row.policy)
        for attempt in range(STALE_RETRIES):
            commands = store.encode_extents(node, offset, data, policy, row.key)
            try:
                await self._execute_all(commands, caller)
            except SpaceError as error:  # what it shares with others may be gone by now
                if error.status is not Status.STALE or attempt == STALE_RETRIES - 1:
                    raise
                policy = attrs.evolve(policy, dedupe=False)
            else:
                return

    async def sync(self) -> None:
        """Nothing to do: what is acknowledged is durable on a quorum."""

    async def _execute(self, command: Command, caller: Caller) -> None:
        await self._execute_all([command], caller)

    async def _execute_all(self, commands: list[Command], caller: Caller) -> None:
        requests = [Request(each, caller.actor, guard=self._guard) for each in commands]
        for outcome in await carried_out(self._member, requests):
            if isinstance(outcome, SpaceError):
                raise outcome
