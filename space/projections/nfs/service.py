"""What one NFS server is: its exports, clients, state, way back and limits; no I/O.

A server that starts again is another *epoch*: session ids, stateids and the write verifier of an earlier one are told
from its own.  Clients that held state then may claim it again during the *grace* period; who they are is what
:class:`Recovery` keeps.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final, Protocol

import attrs

from space.projections.nfs.compound import Operation
from space.projections.nfs.nfs4 import SESSION_ID_BYTES
from space.projections.nfs.sessions import Client, Connection, Event, Session

if TYPE_CHECKING:
    from space.projections.nfs.callback import Callbacks
    from space.projections.nfs.exports import Exports
    from space.projections.nfs.state import State

CLIENTS_MAX: Final = 4096
"""Each is a few hundred bytes without its sessions; more than there are machines in most networks."""
COURTESY_SECONDS: Final = 24 * 3600.0
"""How long what a vanished client held is kept while nobody wants it."""


class Syncable(Protocol):
    """What can be told to make everything acknowledged durable: a file system, a recovery journal."""

    async def sync(self) -> None: ...


class Recovery:
    """Who may claim state again after a restart; this one forgets everything with the process.

    ``record`` and ``forget`` take effect at once and are durable after ``sync``; an answer that depends on one waits
    for it.  ``previous`` is what an earlier epoch left: the owner's verifier by owner.
    """

    def __init__(self, epoch: int, previous: Mapping[bytes, bytes] | None = None) -> None:
        self.epoch = epoch
        self.previous = dict(previous or {})

    @property
    def dirty(self) -> bool:
        """Whether something waits for ``sync``."""
        return False

    def record(self, owner: bytes, verifier: bytes) -> None:
        """A client may hold state from now on."""

    def forget(self, owner: bytes) -> None:
        """What a client held is gone: it must not claim it again."""

    async def sync(self) -> None:
        """Makes all of it durable."""


@attrs.frozen
class Config:
    """Lengths of time in seconds, and limits."""

    lease_seconds: int = 45
    grace_seconds: int = 45
    courtesy_seconds: float = COURTESY_SECONDS
    delegations: bool = True
    clients_max: int = CLIENTS_MAX


@attrs.define(eq=False)
class Shell:
    """What the service needs of the loop around it: chance, waiting, and durability shared among those who wait."""

    random: Callable[[int], bytes]
    event: Callable[[], Event]
    barrier: Callable[[Iterable[Syncable]], Awaitable[None]]


class Service:
    """One server: everything its COMPOUNDs share."""

    def __init__(
        self,
        exports: Exports,
        shell: Shell,
        recovery: Recovery,
        *,
        name: bytes,
        now: float,
        config: Config | None = None,
    ) -> None:
        """A server for some exports.

        ``name`` stays the same over restarts and on every node that serves the same exports (server owner and scope,
        RFC 8881 §2.10.4): a client then knows that it may claim its state again.
        """
        self.exports = exports
        self.shell = shell
        self.recovery = recovery
        self.name = name
        self.config = config or Config()
        self.epoch = recovery.epoch
        self.write_verifier = struct.pack(">Q", recovery.epoch)
        self.clients: dict[int, Client] = {}
        self.sessions: dict[bytes, Session] = {}
        self.grace_end = now + self.config.grace_seconds if recovery.previous else now
        self.operations: dict[int, Operation] = {}
        self.state: State
        self.callbacks: Callbacks

    def in_grace(self, now: float) -> bool:
        """Whether state of before the restart may be claimed, and nothing new be given that could conflict with it."""
        return now < self.grace_end

    async def barrier(self, what: Iterable[Syncable]) -> None:
        """Waits until everything acknowledged by these is durable."""
        await self.shell.barrier(what)
