"""What one NFS server is: its exports, clients, state, way back and limits; no I/O.

A server that starts again is another *epoch*: session ids, stateids and the write verifier of an earlier one are told
from its own.  Clients that held state then may claim it again during the *grace* period; who they are is what
:class:`Recovery` keeps.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, Final, Protocol

import attrs

from space.projections.nfs import data, files, session_ops, state_ops
from space.projections.nfs.callback import Callbacks
from space.projections.nfs.compound import NfsError, Operation
from space.projections.nfs.exports import Exports
from space.projections.nfs.nfs4 import NfsStatus
from space.projections.nfs.sessions import Channel, Client, Event, Principal, Session
from space.projections.nfs.state import State

CLIENTS_MAX: Final = 4096
"""Each is a few hundred bytes without its sessions; more than there are machines in most networks."""
SESSIONS_MAX: Final = 16_384
SLOT_BYTES: Final = 512
"""What a slot takes beside the answer it keeps."""
REPLIES_BYTES_MAX: Final = 256 << 20
"""Memory for answers kept for retries; a session gets at most a quarter of what is left of it."""
CLAIM_SECONDS: Final = 2.0
"""A client that still claims does it again within this time: it sends one claim after the other."""
COURTESY_SECONDS: Final = 24 * 3600.0
"""How long what a vanished client held is kept while nobody wants it."""


class Syncable(Protocol):
    """What can be told to make everything acknowledged durable: a file system, a recovery journal."""

    async def sync(self) -> None:
        """Returns once it is durable."""


class Recovery:
    """Who may claim state again after a restart; this one forgets everything with the process.

    ``record`` and ``forget`` take effect at once and are durable after ``sync``; an answer that depends on one waits
    for it.  ``previous`` is what an earlier epoch left: the owner's verifier by owner.

    With ``shared`` another server may begin the next epoch while this one runs, and what this one knows is worth
    nothing then: it has to ``look`` before it answers anything, and to ``sync`` after it has given something to a
    client and before it says so.
    """

    shared: bool = False

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

    async def look(self) -> None:
        """Returns if this is the server, and what it reads is what there is.

        Raises:
            SpaceError: that cannot be said now, or another one is.
        """

    async def sync(self) -> None:
        """Makes all of it durable; with ``shared``, this was the server at a time after the call."""


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
    """What the service needs of the loop around it: chance, waiting, durability shared among those who wait, and
    something to go on while a request is answered already (``spawn``).
    """

    random: Callable[[int], bytes]
    event: Callable[[], Event]
    barrier: Callable[[Iterable[Syncable]], Awaitable[None]]
    spawn: Callable[[Coroutine[Any, Any, None]], object]


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
        self.config: Config = config or Config()
        self.epoch = recovery.epoch
        self.write_verifier = struct.pack(">I", self.epoch) + shell.random(4)
        self.clients: dict[int, Client] = {}
        self.confirmed: dict[bytes, Client] = {}
        self.unconfirmed: dict[bytes, Client] = {}
        self.sessions: dict[bytes, Session] = {}
        self.grace_end = now + self.config.grace_seconds if recovery.previous else now
        self._grace_limit = self.grace_end + self.config.grace_seconds
        self._reclaiming = set(recovery.previous)
        self._client_number = self._session_number = 0
        self._reply_bytes = 0  # granted for answers that are kept
        self.operations: dict[int, Operation] = {}
        for module in (session_ops, files, data, state_ops):
            self.operations.update(module.OPERATIONS)
        self.callbacks = Callbacks(self)
        self.state = State(self)
        self.copies = data.Copies(self)

    def in_grace(self, now: float) -> bool:
        """Whether state of before the restart may be claimed, and nothing new be given that could conflict with it."""
        return now < self.grace_end

    def claimed(self, now: float) -> None:
        """Somebody has claimed something: the grace period goes on for whoever has more, at most as long again."""
        if self.in_grace(now):
            longer = min(now + CLAIM_SECONDS, self._grace_limit)
            self.grace_end = max(self.grace_end, longer)

    async def barrier(self, what: Iterable[Syncable]) -> None:
        """Waits until everything acknowledged by these is durable."""
        await self.shell.barrier(what)

    # --- clients ---------------------------------------------------------------------------------

    def introduce(self, owner: bytes, verifier: bytes, principal: Principal, now: float) -> Client:
        """A client that has yet to confirm itself; an earlier attempt of the same owner is forgotten.

        Raises:
            NfsError: DELAY: there are too many clients.
        """
        before = self.unconfirmed.get(owner)
        if before is not None:
            self.remove(before)
        self._make_room()
        self._client_number += 1
        client = Client(
            self.epoch << 32 | self._client_number,
            owner,
            verifier,
            principal,
            now + self.config.lease_seconds,
            may_reclaim=owner in self._reclaiming and self.recovery.previous.get(owner) == verifier,
        )
        self.clients[client.id] = self.unconfirmed[owner] = client
        return client

    def _make_room(self) -> None:
        """Forgets a client that holds nothing if there are too many."""
        if len(self.clients) < self.config.clients_max:
            return
        idle = next(iter(self.unconfirmed.values()), None) or next(
            (each for each in self.clients.values() if each.courtesy or not each.sessions), None
        )
        if idle is None or self.state.has_state(idle):
            raise NfsError(NfsStatus.DELAY)
        self.remove(idle)

    def confirm(self, client: Client, now: float) -> None:
        """A client has made its first session: an earlier start of it is gone, with everything it held."""
        self.renew(client, now)
        if client.confirmed:
            return
        before = self.confirmed.get(client.owner)
        if before is not None:
            self.remove(before)
        elif not client.may_reclaim and client.owner in self._reclaiming:
            self._gone(client.owner)
        del self.unconfirmed[client.owner]
        client.confirmed = True
        self.confirmed[client.owner] = client

    def renew(self, client: Client, now: float) -> None:
        """A client was heard of."""
        client.expiry = now + self.config.lease_seconds
        client.courtesy = False
        if client.forgotten:
            client.forgotten = False
            self.recovery.record(client.owner, client.verifier)

    def is_in_use(self, client: Client, now: float) -> bool:
        """Whether a client may still come back for what it holds (RFC 8881 §18.35.4, case 3)."""
        return client.expiry > now and (bool(client.sessions) or self.state.has_state(client))

    def reclaimed(self, client: Client) -> None:
        """A client has claimed what it wanted, and may hold new state from now on."""
        client.reclaim_complete = True
        self.recovery.record(client.owner, client.verifier)
        self._settled(client.owner)

    def expire_client(self, client: Client) -> None:
        """Ends a client whose lease is over: it must not claim its state again after a restart either."""
        self.remove(client)

    def forget_claims(self, client: Client) -> None:
        """Something was taken from a client whose lease is over: it must not claim that after a restart.

        When it is heard of again it hears of that, too, and may claim what it still holds.
        """
        if not client.forgotten:
            client.forgotten = True
            self.recovery.forget(client.owner)

    def remove(self, client: Client) -> None:
        """Forgets a client, its sessions, and all that it holds."""
        self.clients.pop(client.id, None)
        self.state.release_client(client)
        for session in list(client.sessions.values()):
            self.destroy_session(session)
        self.callbacks.client_ended(client)
        if self.unconfirmed.get(client.owner) is client:
            del self.unconfirmed[client.owner]
        if self.confirmed.get(client.owner) is client:
            del self.confirmed[client.owner]
            self._gone(client.owner)

    def _gone(self, owner: bytes) -> None:
        self.recovery.forget(owner)
        self._settled(owner)

    def _settled(self, owner: bytes) -> None:
        """One client less to wait for; after the last one the grace period is over."""
        if self._reclaiming:
            self._reclaiming.discard(owner)
            if not self._reclaiming:
                self.grace_end = -math.inf

    # --- sessions --------------------------------------------------------------------------------

    def make_session(
        self, client: Client, minor: int, fore: Channel, back: Channel, program: int, credentials: bytes
    ) -> Session:
        """A session with as many slots as there is memory for their answers.

        Raises:
            NfsError: DELAY: there are too many sessions.
        """
        if len(self.sessions) >= SESSIONS_MAX:
            raise NfsError(NfsStatus.DELAY)
        slot_bytes = fore.cached_bytes + SLOT_BYTES
        fore.slots = min(fore.slots, max(1, (REPLIES_BYTES_MAX - self._reply_bytes) // 4 // slot_bytes))
        self._reply_bytes += fore.slots * slot_bytes
        self._session_number += 1
        session_id = struct.pack(">II", self.epoch, self._session_number) + self.shell.random(8)
        session = Session(session_id, client, fore, back, minor, program, credentials)
        self.sessions[session_id] = client.sessions[session_id] = session
        return session

    def destroy_session(self, session: Session) -> None:
        """Forgets a session."""
        del self.sessions[session.id]
        del session.client.sessions[session.id]
        self._reply_bytes -= session.fore.slots * (session.fore.cached_bytes + SLOT_BYTES)
        self.callbacks.session_ended(session)

    def sequence_flags(self, session: Session) -> int:
        """What SEQUENCE tells a client beside its result."""
        return self.state.sequence_flags(session.client) | self.callbacks.flags(session)

    # --- time ------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Time has passed: leases end, and the grace period."""
        if self._reclaiming and not self.in_grace(now):
            for owner in list(self._reclaiming):
                self._gone(owner)
        for client in list(self.clients.values()):
            if client.expiry <= now:
                self._expired(client, now)
        self.state.tick(now)
        self.callbacks.tick(now)

    def _expired(self, client: Client, now: float) -> None:
        if any(slot.busy for session in client.sessions.values() for slot in session.slots.values()):
            self.renew(client, now)  # it waits for us
            return
        courtesy = client.confirmed and self.state.has_state(client)
        if courtesy and now - client.expiry < self.config.courtesy_seconds:
            client.courtesy = True
        else:
            self.remove(client)
