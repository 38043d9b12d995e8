"""One COMPOUND (RFC 8881 §2.3, §16.2): its context, and the loop over its operations; no I/O.

An operation is a function of the context, the rest of the request and the reply: it takes its arguments off the one,
writes what follows its status into the other, and returns the status.  Decoding as it goes costs nothing for what is
never reached, and gives the error of damaged arguments to the operation that has them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Final

import attrs

from space._errors import SpaceError
from space.projections.nfs.nfs4 import OP_MAX, NfsStatus, Op
from space.projections.nfs.status import status_of
from space.projections.nfs.xdr import Mark, Reader, Writer, XdrError

if TYPE_CHECKING:
    from space.projections.nfs.exports import Node
    from space.projections.nfs.rpc import Credentials
    from space.projections.nfs.service import Service
    from space.projections.nfs.sessions import Client, Connection, Session, Slot

OPERATIONS_MAX: Final = 64
"""Most operations of one COMPOUND; what CREATE_SESSION offers as ca_maxoperations (RFC 8881 §18.36)."""

TAG_BYTES_MAX: Final = 1024


class NfsError(Exception):
    """An operation failed with this status."""

    def __init__(self, status: NfsStatus) -> None:
        super().__init__(status.name)
        self.status = status


@attrs.frozen
class Stateid:
    """stateid4 (RFC 8881 §3.3.12): ``seqid`` and the 12 opaque bytes that name a state."""

    seqid: int
    other: bytes


ANONYMOUS: Final = Stateid(0, bytes(12))
READ_BYPASS: Final = Stateid(0xFFFFFFFF, b"\xff" * 12)
CURRENT: Final = Stateid(1, bytes(12))
INVALID: Final = Stateid(0xFFFFFFFF, bytes(12))


@attrs.define(eq=False)
class Compound:
    """What the operations of one COMPOUND share.

    ``now`` is in seconds of a clock that only goes forward.  ``current`` and ``saved`` are nodes of an export, with
    ``stateid`` and ``saved_stateid`` (RFC 8881 §16.2.3.1.2).  An operation that changed something which must be stable
    before the answer adds the file system to ``unsynced``: the shell waits once, after the last operation.
    """

    service: Service
    connection: Connection
    credentials: Credentials
    minor: int
    now: float
    client: Client | None = None
    session: Session | None = None
    slot: Slot | None = None
    current: Node | None = None
    saved: Node | None = None
    stateid: Stateid | None = None
    saved_stateid: Stateid | None = None
    unsynced: set[object] = attrs.field(factory=set)
    operations: int = 0
    index: int = 0

    def node(self) -> Node:
        """The current filehandle's node.

        Raises:
            NfsError: there is none.
        """
        if self.current is None:
            raise NfsError(NfsStatus.NOFILEHANDLE)
        return self.current


Operation = Callable[[Compound, Reader, Writer], int | Awaitable[int]]
"""Returns the status; what it wrote before returning an error is kept, so it must write only what the error carries.
A raised NfsError, SpaceError or XdrError takes back everything it wrote."""
