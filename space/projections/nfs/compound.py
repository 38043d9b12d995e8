"""One COMPOUND (RFC 8881 §2.3, §16.2): its context, and the loop over its operations; no I/O.

An operation is a function of the context, the rest of the request and the reply: it takes its arguments off the one,
writes what follows its status into the other, and returns the status.  Decoding as it goes costs nothing for what is
never reached, and gives the error of damaged arguments to the operation that has them.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import attrs

from space._errors import SpaceError
from space.projections.nfs.nfs4 import OP_MAX, NfsStatus, Op
from space.projections.nfs.status import status_of
from space.projections.nfs.xdr import Bytes, Mark, Reader, Writer, XdrError

if TYPE_CHECKING:
    from space.projections.nfs.exports import Node
    from space.projections.nfs.rpc import Credentials
    from space.projections.nfs.service import Service, Syncable
    from space.projections.nfs.sessions import Client, Connection, Session, Slot

OPERATIONS_MAX: Final = 64
"""Most operations of one COMPOUND; what CREATE_SESSION offers as ca_maxoperations (RFC 8881 §18.36)."""

TAG_BYTES_MAX: Final = 1024
REPLY_BYTES_MAX: Final = (1 << 20) + (64 << 10)
"""A READ of 1 MiB with everything around it; what CREATE_SESSION offers as ca_maxresponsesize."""
RPC_HEADER_BYTES: Final = 24
"""Of a reply; the sizes a session negotiates include it (RFC 8881 §18.36.3)."""
CHANGE_BYTES: Final = 256
"""No result of an operation that changes something is longer (the longest: OPEN with a delegation)."""

log: Final = logging.getLogger("space.nfs")


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
    unsynced: set[Syncable] = attrs.field(factory=set)
    operations: int = 0
    index: int = 0
    request_bytes: int = 0
    reply_bytes_max: int = REPLY_BYTES_MAX
    cached: bool = False
    replay: list[Bytes] | None = None
    uncached_retry: bool = False

    def room(self, out: Writer) -> int:
        """Bytes the reply may still grow by; READ, READDIR and the like give no more."""
        return self.reply_bytes_max - RPC_HEADER_BYTES - len(out)

    def node(self) -> Node:
        """The current filehandle's node.

        Raises:
            NfsError: NOFILEHANDLE: there is none; MOVED: another server has it.
        """
        if self.current is None:
            raise NfsError(NfsStatus.NOFILEHANDLE)
        if self.current.export.referral is not None:
            raise NfsError(NfsStatus.MOVED)
        return self.current


Operation = Callable[[Compound, Reader, Writer], int | Awaitable[int]]
"""Returns the status; what it wrote before returning an error is kept, so it must write only what the error carries.
A raised NfsError, SpaceError or XdrError takes back everything it wrote."""

CHANGING: Final = frozenset(
    {
        *(
            Op.CLOSE,
            Op.CREATE,
            Op.DELEGRETURN,
            Op.LINK,
            Op.LOCK,
            Op.LOCKU,
            Op.OPEN,
            Op.OPEN_DOWNGRADE,
            Op.REMOVE,
        ),
        *(
            Op.RENAME,
            Op.SETATTR,
            Op.WRITE,
            Op.CREATE_SESSION,
            Op.EXCHANGE_ID,
            Op.FREE_STATEID,
            Op.WANT_DELEGATION,
        ),
        *(Op.ALLOCATE, Op.COPY, Op.DEALLOCATE, Op.CLONE, Op.SETXATTR, Op.REMOVEXATTR),
    }
)
"""Not begun unless their result fits: what is done and cannot be said would be done again (RFC 8881 §2.10.6.4)."""

OUTSIDE: Final = frozenset(
    {Op.EXCHANGE_ID, Op.CREATE_SESSION, Op.DESTROY_SESSION, Op.BIND_CONN_TO_SESSION, Op.DESTROY_CLIENTID}
)
"""Operations that need no session, but then a COMPOUND of their own (RFC 8881 §2.10.5)."""

GRANTING: Final = frozenset({Op.OPEN, Op.LOCK, Op.WANT_DELEGATION})
"""What they give is in this server's memory alone: it must be the server when it says so."""

_PLACED: Final = frozenset({Op.SEQUENCE, Op.BIND_CONN_TO_SESSION})
"""Operations that must not come later in a COMPOUND."""

_UNREADABLE: Final = -1
"""Stands for the number of an operation where the request ends before it."""

ABOLISHED: Final = frozenset(
    {Op.OPEN_CONFIRM, Op.RENEW, Op.SETCLIENTID, Op.SETCLIENTID_CONFIRM, Op.RELEASE_LOCKOWNER}
)
"""Of minor version 0, and not to be implemented in later ones (RFC 8881 §17)."""


async def run(ctx: Compound, args: Reader) -> list[Bytes]:
    """Carries out a COMPOUND: its result (COMPOUND4res), in pieces.

    ``args`` stands before COMPOUND4args.  What must be stable is, when this returns.

    Raises:
        XdrError: the arguments end before the operations begin; nothing was done.
    """
    tag = args.opaque(TAG_BYTES_MAX)
    ctx.minor = args.u32()
    ctx.operations = args.u32()
    out = Writer()
    status_at = out.reserve()
    out.opaque(tag)
    count_at = out.reserve()
    if ctx.minor not in OP_MAX:
        out.fill(status_at, NfsStatus.MINOR_VERS_MISMATCH)
        return out.pieces()
    done: list[Bytes] | None = None
    try:
        status = await _operations(ctx, args, out)
        if ctx.replay is not None:
            return ctx.replay
        out.fill(status_at, status)
        out.fill(count_at, ctx.index)
        done = out.pieces()
    finally:
        if ctx.slot is not None:
            ctx.slot.finish(done, cached=ctx.cached)
            assert ctx.client is not None
            if (
                ctx.client.id not in ctx.service.clients
            ):  # it has ended meanwhile, and what it got since is nobody's
                ctx.service.state.release_client(ctx.client)
    return done


async def _operations(ctx: Compound, args: Reader, out: Writer) -> int:
    """Runs operations until one fails; ``ctx.index`` is how many have results then."""
    operations, last = ctx.service.operations, OP_MAX[ctx.minor]
    place = None  # of the last result: its status, what follows that, its operation, and how many there are
    promise = None  # the first result that promises something stable
    shared = unseen = ctx.service.recovery.shared
    status: int = NfsStatus.OK
    for index in range(ctx.operations):
        ctx.index = index
        try:
            number = args.u32()
        except XdrError:
            number = _UNREADABLE
        operation = operations.get(number) if number <= last else None
        known = operation is not None
        status_at, after = out.begin(number if known or number in ABOLISHED else Op.ILLEGAL)
        place = status_at, after, number, index + 1
        try:
            status = (
                _misplaced(ctx, index, number, known=known)
                if index < 2 or number in _PLACED or not known
                else 0
            )
            if not status and number in CHANGING and ctx.room(out) < CHANGE_BYTES:
                status = _too_big(ctx)
            if not status and unseen and number != Op.SEQUENCE:  # which renews the lease of who waits for us
                await ctx.service.recovery.look()
                unseen = False
            if not status:
                assert operation is not None
                result = operation(ctx, args, out)
                status = result if isinstance(result, int) else await result
        except NfsError as error:
            status = error.status
            out.truncate(after)
        except XdrError:
            status = NfsStatus.BADXDR
            out.truncate(after)
        except SpaceError as error:
            status = status_of(error)
            out.truncate(after)
        except Exception:
            log.exception("operation %d of a COMPOUND", number)
            status = NfsStatus.SERVERFAULT
            out.truncate(after)
        if ctx.replay is not None:
            return status
        if ctx.room(out) < 0:
            status = _too_big(ctx)
            out.truncate(after)
        if status:
            _say_what_was_set(out, after, number)
        out.fill(status_at, status)
        ctx.index = index + 1
        if shared and number in GRANTING and not status:
            ctx.unsynced.add(ctx.service.recovery)
        if promise is None and ctx.unsynced:
            promise = place
        if status:
            break
    if ctx.service.recovery.dirty:
        ctx.unsynced.add(ctx.service.recovery)
    if place is None or not ctx.unsynced:
        return status
    return await _stable(ctx, out, promise or place, status)


async def _stable(ctx: Compound, out: Writer, promise: tuple[Mark, Mark, int, int], status: int) -> int:
    """Waits until what was promised is stable; if it cannot be, the promise and all that follows it are taken back."""
    try:
        await ctx.service.barrier(ctx.unsynced)
    except SpaceError as error:
        log.warning("what was promised cannot be made stable: %s", error)
        status_at, after, number, ctx.index = promise
        status = status_of(error)
        out.truncate(after)
        _say_what_was_set(out, after, number)
        out.fill(status_at, status)
    return status


def _say_what_was_set(out: Writer, after: Mark, number: int) -> None:
    """SETATTR says which attributes were set also when it fails (RFC 8881 §18.30.2): none."""
    if number == Op.SETATTR and not out.since(after):
        out.bitmap(0)


def _misplaced(ctx: Compound, index: int, number: int, *, known: bool) -> int:
    """Why an operation must not be where it is, or OK (RFC 8881 §2.10.5, §18.46.3)."""
    if ctx.uncached_retry:
        return NfsStatus.RETRY_UNCACHED_REP
    if index == 0:
        if number in OUTSIDE:
            return NfsStatus.NOT_ONLY_OP if ctx.operations > 1 else NfsStatus.OK
        if known and number != Op.SEQUENCE:
            return NfsStatus.OP_NOT_IN_SESSION
    elif number == Op.SEQUENCE:
        return NfsStatus.SEQUENCE_POS
    elif number == Op.BIND_CONN_TO_SESSION:
        return NfsStatus.NOT_ONLY_OP
    if number == _UNREADABLE:
        return NfsStatus.BADXDR  # the last result says what the COMPOUND does: of OP_ILLEGAL (RFC 8881 §15.2)
    if not known:
        return NfsStatus.NOTSUPP if number in ABOLISHED else NfsStatus.OP_ILLEGAL
    return NfsStatus.OK


def _too_big(ctx: Compound) -> int:
    return NfsStatus.REP_TOO_BIG_TO_CACHE if ctx.cached else NfsStatus.REP_TOO_BIG
