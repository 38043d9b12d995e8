"""The operations that make clients and sessions, and SEQUENCE (RFC 8881 §18.33 to §18.37, §18.46 to §18.51)."""

from __future__ import annotations

import struct
from collections.abc import Awaitable
from typing import Final

from space.projections.nfs.compound import OPERATIONS_MAX, REPLY_BYTES_MAX, Compound, NfsError, Operation
from space.projections.nfs.nfs4 import (
    OPAQUE_BYTES_MAX,
    SESSION_ID_BYTES,
    VERIFIER_BYTES,
    NfsStatus,
    Op,
)
from space.projections.nfs.rpc import (
    AUTH_NONE,
    AUTH_SYS,
    GROUPS_MAX,
    MACHINE_BYTES_MAX,
    RECORD_BYTES_MAX,
    fingerprint,
)
from space.projections.nfs.sessions import (
    BACK_BYTES_MAX,
    BACK_SLOTS_MAX,
    CACHED_BYTES_MAX,
    MESSAGE_BYTES_MIN,
    SESSIONS_PER_CLIENT_MAX,
    SLOTS_MAX,
    Channel,
    Client,
    Request,
    Slot,
    principal_of,
)
from space.projections.nfs.xdr import Reader, Writer, XdrError

# EXCHGID4_FLAG_* (RFC 8881 §18.35, RFC 7862 §14.1)
UPDATE: Final = 0x40000000
CONFIRMED: Final = 0x80000000
USE_NON_PNFS: Final = 0x00010000
FENCE: Final = 0x00000004  # of minor version 2
_FLAGS_KNOWN: Final = 0x00000001 | 0x00000002 | 0x00000100 | 0x00070000 | UPDATE

SP4_NONE, SP4_MACH_CRED, SP4_SSV = range(3)
_ALGORITHMS_MAX: Final = 16
_OID_BYTES_MAX: Final = 256
_HANDLE_BYTES_MAX: Final = 1024

CONN_BACK_CHAN: Final = 2
_SESSION_FLAGS_KNOWN: Final = 1 | CONN_BACK_CHAN | 4  # of which persistence and RDMA are not granted

RPCSEC_GSS: Final = 6
SECURITY_MAX: Final = 16
FORE, BACK, FORE_OR_BOTH, BACK_OR_BOTH = 1, 2, 3, 7
BOTH: Final = 3

PRODUCT: Final = b"space"


# --- clients --------------------------------------------------------------------------------------


def exchange_id(ctx: Compound, args: Reader, out: Writer) -> int:
    """EXCHANGE_ID (§18.35); the numbers are those of its cases."""
    verifier = args.fixed(VERIFIER_BYTES)
    owner = args.opaque(OPAQUE_BYTES_MAX)
    flags = args.u32()
    protection = _protection(args)
    for _ in range(args.count(1)):  # what the client is, and of when
        args.opaque_view(OPAQUE_BYTES_MAX)
        args.opaque_view(OPAQUE_BYTES_MAX)
        args.i64()
        args.u32()
    known = _FLAGS_KNOWN | FENCE if ctx.minor > 1 else _FLAGS_KNOWN
    if flags & ~known:
        raise NfsError(NfsStatus.INVAL)
    if protection != SP4_NONE:
        # Only RPCSEC_GSS can tell a machine from its users, and there is none here (§2.10.8).
        raise NfsError(NfsStatus.ENCR_ALG_UNSUPP if protection == SP4_SSV else NfsStatus.INVAL)
    client = _introduced(ctx, owner, verifier, update=bool(flags & UPDATE))
    out.u64(client.id)
    out.u32(client.sequence)
    out.u32(USE_NON_PNFS | (CONFIRMED if client.confirmed else 0))
    out.u32(SP4_NONE)
    out.u64(0)
    out.opaque(ctx.service.name)
    out.opaque(ctx.service.name)
    out.u32(1)
    out.opaque(PRODUCT)
    out.opaque(PRODUCT)
    out.i64(0)
    out.u32(0)
    return NfsStatus.OK


def _introduced(ctx: Compound, owner: bytes, verifier: bytes, *, update: bool) -> Client:
    service, principal = ctx.service, principal_of(ctx.credentials)
    confirmed = service.confirmed.get(owner)
    if update:
        if confirmed is None:
            raise NfsError(NfsStatus.NOENT)  # 7
        if confirmed.verifier != verifier:
            raise NfsError(NfsStatus.NOT_SAME)  # 8
        if confirmed.principal != principal:
            raise NfsError(NfsStatus.PERM)  # 9
        return confirmed  # 6
    if confirmed is not None:
        if confirmed.principal != principal:
            if service.is_in_use(confirmed, ctx.now):
                raise NfsError(NfsStatus.CLID_INUSE)
            service.remove(confirmed)  # 3
        elif confirmed.verifier == verifier:
            service.renew(confirmed, ctx.now)
            return confirmed  # 2
    return service.introduce(owner, verifier, principal, ctx.now)  # 1, 4, 5


def _protection(args: Reader) -> int:
    """Reads state_protect4_a: how, the rest is for what we do not have."""
    how = args.u32()
    if how == SP4_NONE:
        return how
    if how > SP4_SSV:
        raise XdrError(f"a protection of {how}")
    args.bitmap()
    args.bitmap()
    if how == SP4_SSV:
        for _ in range(2):
            for _ in range(args.count(_ALGORITHMS_MAX)):
                args.opaque_view(_OID_BYTES_MAX)
        args.u32()
        args.u32()
    return how


def destroy_clientid(ctx: Compound, args: Reader, out: Writer) -> int:
    """DESTROY_CLIENTID (§18.50)."""
    client = ctx.service.clients.get(args.u64())
    if client is None:
        return NfsStatus.STALE_CLIENTID
    if client.sessions or ctx.service.state.has_state(client):
        return NfsStatus.CLIENTID_BUSY
    ctx.service.remove(client)
    return NfsStatus.OK


def reclaim_complete(ctx: Compound, args: Reader, out: Writer) -> int:
    """RECLAIM_COMPLETE (§18.51): from now on the client may hold state, and a restart must know that."""
    client = ctx.client
    assert client is not None
    if args.boolean():  # of one file system, which had to have moved here
        ctx.node()
        return NfsStatus.OK
    if client.reclaim_complete:
        return NfsStatus.COMPLETE_ALREADY
    ctx.service.reclaimed(client)
    return NfsStatus.OK


# --- sessions -------------------------------------------------------------------------------------


def create_session(ctx: Compound, args: Reader, out: Writer) -> int:
    """CREATE_SESSION (§18.36); the first one confirms the client."""
    service = ctx.service
    client_id, sequence, flags = args.u64(), args.u32(), args.u32()
    wanted_fore, wanted_back = _channel(args), _channel(args)
    program = args.u32()
    credentials = _security(args) or b""
    client = service.clients.get(client_id)
    if client is None:
        raise NfsError(NfsStatus.STALE_CLIENTID)
    if sequence == (client.sequence - 1) & 0xFFFFFFFF and client.created:
        out.raw(client.created)
        return NfsStatus.OK
    if sequence != client.sequence:
        raise NfsError(NfsStatus.SEQ_MISORDERED)
    if not client.confirmed and client.principal != principal_of(ctx.credentials):
        raise NfsError(NfsStatus.CLID_INUSE)
    if flags & ~_SESSION_FLAGS_KNOWN:
        raise NfsError(NfsStatus.INVAL)
    fore, back = _fore(wanted_fore), _back(wanted_back)
    if len(client.sessions) >= SESSIONS_PER_CLIENT_MAX:
        raise NfsError(NfsStatus.NOSPC)
    service.confirm(client, ctx.now)
    session = service.make_session(client, ctx.minor, fore, back, program, credentials)
    granted = flags & CONN_BACK_CHAN
    if granted:
        service.callbacks.bind(session, ctx.connection, ctx.now)
    begin = Writer()
    begin.fixed(session.id)
    begin.u32(sequence)
    begin.u32(granted)
    fore.write(begin)
    back.write(begin)
    client.sequence = sequence + 1 & 0xFFFFFFFF
    client.created = begin.bytes()
    out.raw(client.created)
    return NfsStatus.OK


def _channel(args: Reader) -> Channel:
    args.u32()
    channel = Channel(args.u32(), args.u32(), args.u32(), args.u32(), args.u32())
    for _ in range(args.count(1)):
        args.u32()
    return channel


def _fore(wanted: Channel) -> Channel:
    """What is granted of what a client wants for its calls."""
    if min(wanted.request_bytes, wanted.reply_bytes) < MESSAGE_BYTES_MIN or wanted.operations < 2:
        raise NfsError(NfsStatus.TOOSMALL)
    return Channel(
        min(wanted.request_bytes, RECORD_BYTES_MAX),
        min(wanted.reply_bytes, REPLY_BYTES_MAX),
        min(wanted.cached_bytes, CACHED_BYTES_MAX),
        min(wanted.operations, OPERATIONS_MAX),
        min(max(wanted.slots, 1), SLOTS_MAX),
    )


def _back(wanted: Channel) -> Channel:
    """What is taken of what a client offers for ours; CB_SEQUENCE comes with one more operation."""
    if min(wanted.request_bytes, wanted.reply_bytes) < MESSAGE_BYTES_MIN or wanted.operations < 2:
        raise NfsError(NfsStatus.TOOSMALL)
    return Channel(
        min(wanted.request_bytes, BACK_BYTES_MAX),
        min(wanted.reply_bytes, BACK_BYTES_MAX),
        0,
        min(wanted.operations, 2),
        min(max(wanted.slots, 1), BACK_SLOTS_MAX),
    )


def _security(args: Reader) -> bytes | None:
    """The first callback_sec_parms4 that we can use: a body of AUTH_SYS, empty for AUTH_NONE; None: none of them."""
    usable: list[bytes] = []
    for _ in range(args.count(SECURITY_MAX)):
        flavor = args.u32()
        before = args.rest()
        if flavor == AUTH_NONE:
            usable.append(b"")
        elif flavor == AUTH_SYS:
            left = args.left
            args.u32()
            args.opaque_view(MACHINE_BYTES_MAX)
            args.u32()
            args.u32()
            for _ in range(args.count(GROUPS_MAX)):
                args.u32()
            usable.append(bytes(before[: left - args.left]))
        elif flavor == RPCSEC_GSS:
            args.u32()
            args.opaque_view(_HANDLE_BYTES_MAX)
            args.opaque_view(_HANDLE_BYTES_MAX)
        else:
            raise XdrError(f"security of flavor {flavor}")
    return usable[0] if usable else None


def destroy_session(ctx: Compound, args: Reader, out: Writer) -> int:
    """DESTROY_SESSION (§18.37)."""
    session = ctx.service.sessions.get(args.fixed(SESSION_ID_BYTES))
    if session is None:
        return NfsStatus.BADSESSION
    if session is ctx.session and ctx.index + 1 != ctx.operations:
        return NfsStatus.NOT_ONLY_OP
    if any(slot.busy and slot is not ctx.slot for slot in session.slots.values()):
        return NfsStatus.DELAY
    ctx.service.destroy_session(session)
    return NfsStatus.OK


def bind_conn_to_session(ctx: Compound, args: Reader, out: Writer) -> int:
    """BIND_CONN_TO_SESSION (§18.34): any connection serves any session's calls; ours need one that was offered."""
    session_id, direction = args.fixed(SESSION_ID_BYTES), args.u32()
    args.boolean()
    session = ctx.service.sessions.get(session_id)
    if session is None:
        return NfsStatus.BADSESSION
    if direction not in {FORE, BACK, FORE_OR_BOTH, BACK_OR_BOTH}:
        return NfsStatus.INVAL
    if direction != FORE:
        ctx.service.callbacks.bind(session, ctx.connection, ctx.now)
        direction = BACK if direction == BACK else BOTH
    out.fixed(session_id)
    out.u32(direction)
    out.boolean(value=False)
    return NfsStatus.OK


def backchannel_ctl(ctx: Compound, args: Reader, out: Writer) -> int:
    """BACKCHANNEL_CTL (§18.33)."""
    assert ctx.session is not None
    program, credentials = args.u32(), _security(args)
    if credentials is None:
        return NfsStatus.NOENT
    ctx.session.program, ctx.session.credentials = program, credentials
    return NfsStatus.OK


def set_ssv(ctx: Compound, args: Reader, out: Writer) -> int:
    """SET_SSV (§18.47): no client of ours is protected by one."""
    return NfsStatus.INVAL


# --- every request --------------------------------------------------------------------------------


def sequence(ctx: Compound, args: Reader, out: Writer) -> int | Awaitable[int]:
    """SEQUENCE (§18.46): renews the lease, and says whether this request is new."""
    session_id, number, slot_id, highest = args.unpack(_SEQUENCE_ARGUMENTS)
    ctx.cached = args.boolean()
    session = ctx.service.sessions.get(session_id)
    if session is None:
        raise NfsError(NfsStatus.BADSESSION)
    if slot_id >= session.fore.slots:
        raise NfsError(NfsStatus.BADSLOT)
    if not slot_id <= highest < session.fore.slots:
        raise NfsError(NfsStatus.BAD_HIGH_SLOT)
    slot = session.slots.get(slot_id)
    if slot is None:
        slot = session.slots[slot_id] = Slot()
    ctx.service.renew(session.client, ctx.now)
    request = fingerprint(args.rest()), principal_of(ctx.credentials)
    if number == slot.sequence and slot.request is not None:
        return _retry_later(ctx, slot, request, out) if slot.busy else _retry(ctx, slot, request, out)
    if number != slot.sequence + 1 & 0xFFFFFFFF or slot.busy:
        raise NfsError(NfsStatus.SEQ_MISORDERED)
    if ctx.request_bytes > session.fore.request_bytes:
        raise NfsError(NfsStatus.REQ_TOO_BIG)
    if ctx.operations > session.fore.operations:
        raise NfsError(NfsStatus.TOO_MANY_OPS)
    slot.sequence, slot.busy, slot.request, slot.answer = number, True, request, None
    ctx.client, ctx.session, ctx.slot = session.client, session, slot
    ctx.reply_bytes_max = session.fore.reply_bytes
    if ctx.cached:
        ctx.reply_bytes_max = min(ctx.reply_bytes_max, session.fore.cached_bytes)
    slot.solo = session.id + _SEQUENCE.pack(
        number,
        slot_id,
        session.fore.slots - 1,
        session.fore.slots - 1,
        ctx.service.sequence_flags(session),
    )
    out.raw(slot.solo)
    return NfsStatus.OK


_SEQUENCE_ARGUMENTS: Final = struct.Struct(f">{SESSION_ID_BYTES}s3I")
_SEQUENCE: Final = struct.Struct(">5I")


def _retry(ctx: Compound, slot: Slot, request: Request, out: Writer) -> int:
    """The answer of before; where it was not to be kept, all that is known is that SEQUENCE was right (§2.10.6.1.3)."""
    if slot.request != request:
        raise NfsError(NfsStatus.SEQ_FALSE_RETRY)
    if slot.answer is not None:
        ctx.replay = slot.answer
        return NfsStatus.OK
    out.raw(slot.solo)
    ctx.uncached_retry = True
    return NfsStatus.OK


async def _retry_later(ctx: Compound, slot: Slot, request: Request, out: Writer) -> int:
    """The client has sent it again; the original will have its answer.

    Another request with that number waits too: a client asks so whether the slot is free again.
    """
    if slot.finished is None:
        slot.finished = ctx.service.shell.event()
    await slot.finished.wait()
    return _retry(ctx, slot, request, out)


OPERATIONS: Final[dict[Op, Operation]] = {
    Op.BACKCHANNEL_CTL: backchannel_ctl,
    Op.BIND_CONN_TO_SESSION: bind_conn_to_session,
    Op.CREATE_SESSION: create_session,
    Op.DESTROY_CLIENTID: destroy_clientid,
    Op.DESTROY_SESSION: destroy_session,
    Op.EXCHANGE_ID: exchange_id,
    Op.RECLAIM_COMPLETE: reclaim_complete,
    Op.SEQUENCE: sequence,
    Op.SET_SSV: set_ssv,
}
