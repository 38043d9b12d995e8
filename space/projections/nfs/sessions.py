"""Clients, sessions and slots (RFC 8881 §2.4, §2.10): who calls, and that everything is done exactly once.

A *client* is one start of one machine: EXCHANGE_ID introduces it, the first CREATE_SESSION confirms it, and only then
an earlier start of the same owner is forgotten together with its locks.  Its *lease* is renewed by every SEQUENCE.
When the lease ends nothing happens at first: the client is kept as a *courtesy* until somebody wants what it holds.

A *session* has slots; a slot takes one request at a time, numbered, and keeps the answer to the last one.  The same
number again gets the same answer; a retry that comes while the original is still at work waits for it, whatever
connection it comes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import attrs

from space.projections.nfs.rpc import Credentials
from space.projections.nfs.xdr import Bytes, Reader, Writer

SLOTS_MAX: Final = 64
"""Requests of one session at a time: what the Linux client asks for."""
SESSIONS_PER_CLIENT_MAX: Final = 32
"""A client has one, and for a moment two; each may keep SLOTS_MAX answers."""
CACHED_BYTES_MAX: Final = 4096
"""Longest answer kept for a retry: what must be kept are answers of operations that change something."""
BACK_SLOTS_MAX: Final = 16
BACK_BYTES_MAX: Final = 4096
MESSAGE_BYTES_MIN: Final = 200
"""Smallest request and reply a session may be limited to: SEQUENCE and one short operation (RFC 8881 §18.36.3)."""

Principal = tuple[int, int]
Request = tuple[int, Principal]
"""What tells a retry from another request: a fingerprint of what is in it, and whose it is."""


class Event(Protocol):
    """Something to wait for; asyncio's fits."""

    def set(self) -> None:
        """It has happened."""

    async def wait(self) -> object:
        """Returns once it has."""


class Sender(Protocol):
    """The way back to the client, which the shell has."""

    def send(self, pieces: list[Bytes]) -> None:
        """Sends a record."""

    def close(self, reason: str) -> None:
        """Ends the connection."""


@attrs.define(eq=False)
class Connection:
    """One TCP connection: where it comes from, and the sessions that call back through it."""

    sender: Sender
    host: str
    back: set[Session] = attrs.field(factory=set)
    xid: int = 0
    waiting: dict[int, Callable[[Reader | None, float], None]] = attrs.field(factory=dict)
    """Our own calls under way, by xid: what to do with the results (None: refused), and when they came."""


@attrs.define(eq=False)
class Slot:
    """One request at a time, and the answer to the last one."""

    sequence: int = 0
    busy: bool = False
    request: Request | None = None
    solo: bytes = b""  # the result of its SEQUENCE
    answer: list[Bytes] | None = None
    finished: Event | None = None  # made when somebody waits

    def finish(self, answer: list[Bytes] | None, *, cached: bool) -> None:
        """The request is done; None: it broke off, and what it did is not known."""
        self.busy = False
        self.answer = answer if cached else None
        if self.finished is not None:
            self.finished.set()
            self.finished = None


@attrs.define
class Channel:
    """channel_attrs4: limits of one direction, in bytes of whole RPC messages, operations and slots."""

    request_bytes: int
    reply_bytes: int
    cached_bytes: int
    operations: int
    slots: int

    def write(self, out: Writer) -> None:
        """As channel_attrs4, without padding and RDMA."""
        out.u32(0)
        out.u32(self.request_bytes)
        out.u32(self.reply_bytes)
        out.u32(self.cached_bytes)
        out.u32(self.operations)
        out.u32(self.slots)
        out.u32(0)


@attrs.define(eq=False)
class Session:
    """A session; slots come to be when they are used."""

    id: bytes
    client: Client
    fore: Channel
    back: Channel
    minor: int
    program: int
    credentials: bytes  # our calls': a body of AUTH_SYS the client chose, or empty for AUTH_NONE
    slots: dict[int, Slot] = attrs.field(factory=dict)
    connections: list[Connection] = attrs.field(factory=list)  # of the back channel
    back_sequences: list[int] = attrs.field(init=False)
    back_busy: set[int] = attrs.field(factory=set)
    back_fault: bool = False  # our calls fail
    back_offered: bool = False

    def __attrs_post_init__(self) -> None:
        self.back_sequences = [0] * self.back.slots

    def unbind(self, connection: Connection) -> None:
        """Calls back no more through a connection."""
        connection.back.discard(self)
        if connection in self.connections:
            self.connections.remove(connection)


@attrs.define(eq=False)
class Client:
    """One start of a client machine.

    ``expiry`` is when its lease ends; ``courtesy``: it has ended, and nobody wanted what it holds;
    ``forgotten``: a restart would not remember it; ``may_reclaim``: it held locks when the server ended, and may
    claim them again in the grace period.
    """

    id: int
    owner: bytes
    verifier: bytes
    principal: Principal
    expiry: float
    may_reclaim: bool = False
    confirmed: bool = False
    courtesy: bool = False
    forgotten: bool = False
    reclaim_complete: bool = False
    sequence: int = 1  # what CREATE_SESSION must have next
    created: bytes = b""  # its last result
    sessions: dict[bytes, Session] = attrs.field(factory=dict)


def principal_of(credentials: Credentials) -> Principal:
    """Who may change a client's sessions."""
    return credentials.flavor, credentials.uid
