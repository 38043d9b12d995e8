"""Operations on opens, locks, delegations and stateids (RFC 8881 §18)."""

from __future__ import annotations

from typing import Final

import attrs

from space._errors import ConflictError, NotFoundError, Status
from space.events.types import Kind
from space.projections.nfs import access, attributes, files
from space.projections.nfs.attributes import Settable
from space.projections.nfs.compound import INVALID, Compound, NfsError, Operation, Stateid
from space.projections.nfs.delegations import Delegation, write_answer
from space.projections.nfs.exports import Node
from space.projections.nfs.locks import END, Range
from space.projections.nfs.nfs4 import (
    OPAQUE_BYTES_MAX,
    OTHER_BYTES,
    VERIFIER_BYTES,
    WANT_PUSH,
    WANT_SIGNAL,
    WANT_TIMESTAMPS,
    Attr,
    Claim,
    CreateMode,
    DelegationType,
    LockType,
    NfsStatus,
    Op,
    OpenResult,
    Share,
    Want,
    WhyNone,
)
from space.projections.nfs.opens import Mode
from space.projections.nfs.state import Lock, LockOwner, Open, client_of
from space.projections.nfs.stateids import H
from space.projections.nfs.xdr import Reader, Writer, XdrError
from space.projections.vfs import AttributeChange, Attributes

CREATE_TRIES: Final = 3
"""Looks at a name that comes and goes while it is opened or created; more than that is somebody's game."""

_LENGTH_TO_END: Final = END - 1
_SIZE_BIT: Final = 1 << Attr.SIZE


# --- arguments -----------------------------------------------------------------------------------


def read_stateid(args: Reader) -> Stateid:
    """A stateid4."""
    return Stateid(args.u32(), args.fixed(OTHER_BYTES))


def write_stateid(out: Writer, stateid: Stateid) -> None:
    """A stateid4."""
    out.u32(stateid.seqid)
    out.fixed(stateid.other)


def _owner(args: Reader) -> bytes:
    """state_owner4: in sessions the client id in it means nothing (RFC 8881 §3.3.10)."""
    args.u64()
    return args.opaque(OPAQUE_BYTES_MAX)


def _shares(args: Reader) -> tuple[Mode, Want]:
    word, deny = args.u32(), args.u32()
    share = word & Share.BOTH
    if not share or deny > Share.BOTH:
        raise NfsError(NfsStatus.INVAL)
    return Mode(share, deny), _want(word - share)


def _want(word: int) -> Want:
    """Which delegation is wanted; wishes that need not be granted are let pass: to be told later, to set times."""
    try:
        return Want(word & ~(WANT_SIGNAL | WANT_PUSH | WANT_TIMESTAMPS))
    except ValueError:
        raise NfsError(NfsStatus.INVAL) from None


@attrs.frozen
class _Create:
    mode: CreateMode
    settable: Settable
    verifier: bytes | None

    @property
    def exclusive(self) -> bool:
        return self.verifier is not None


@attrs.frozen
class _OpenRequest:
    """OPEN4args."""

    mode: Mode
    want: Want
    owner: bytes
    create: _Create | None
    claim: Claim
    name: bytes = b""
    stateid: Stateid | None = None
    delegation: DelegationType = DelegationType.NONE


def _create_how(ctx: Compound, args: Reader) -> _Create | None:
    if not args.boolean():
        return None
    number = args.u32()
    if number > CreateMode.EXCLUSIVE_1:
        raise XdrError(f"no way to create: {number}")
    mode = CreateMode(number)
    verifier = args.fixed(VERIFIER_BYTES) if mode >= CreateMode.EXCLUSIVE else None
    if mode == CreateMode.EXCLUSIVE:
        return _Create(mode, Settable(), verifier)
    return _Create(mode, attributes.decode_settable(ctx, args, creating=True), verifier)


def _open_request(ctx: Compound, args: Reader) -> _OpenRequest:
    args.u32()  # the sequence number of minor version 0
    mode, want = _shares(args)
    owner = _owner(args)
    create = _create_how(ctx, args)
    number = args.u32()
    if number > Claim.DELEG_PREV_FH:
        raise XdrError(f"no claim: {number}")
    claim = Claim(number)
    name, stateid, delegation = b"", None, DelegationType.NONE
    if claim == Claim.PREVIOUS:
        delegation = _delegation_type(args)
    if claim in {Claim.DELEGATE_CUR, Claim.DELEG_CUR_FH}:
        stateid = read_stateid(args)
    if claim in {Claim.NULL, Claim.DELEGATE_CUR, Claim.DELEGATE_PREV}:
        name = files.component(args)
    return _OpenRequest(mode, want, owner, create, claim, name, stateid, delegation)


def _delegation_type(args: Reader) -> DelegationType:
    number = args.u32()
    if number > DelegationType.WRITE:
        raise XdrError(f"no delegation to claim: {number}")
    return DelegationType(number)


# --- OPEN ----------------------------------------------------------------------------------------


@attrs.frozen
class _Target:
    """The file to open: as found, or just created; ``before`` is its directory's change attribute of then."""

    node: Node
    found: Attributes
    created: bool = False
    attributes_set: int = 0
    directory: Node | None = None
    before: int = 0


async def open_(ctx: Compound, args: Reader, out: Writer) -> int:
    """OPEN (§18.16)."""
    request = _open_request(ctx, args)
    stamp = ctx.node().export.files.stamp()
    _check_claim(ctx, request)
    target = await _target(ctx, request)
    _check_kind(target.found)
    if not target.created:
        _check_permission(ctx, request, target)
    state, client, now = ctx.service.state, client_of(ctx), ctx.now
    _check_delegation(ctx, request, target.node)
    if request.claim == Claim.PREVIOUS:
        opened, answer = _reclaim(ctx, request, target.node)
    else:
        truncates = not target.created and _truncates(request)
        state.admit(client, target.node, request.owner, request.mode, now, truncate=truncates)
        if truncates:
            target = await _truncate(ctx, target)
        opened = state.open(client, target.node, request.owner, request.mode, now)
        answer = state.offer(
            client, target.node, request.mode.access, request.want, now, created=target.created
        )
    ctx.current, ctx.stateid = target.node, opened.stateid
    write_stateid(out, opened.stateid)
    after = files.look(target.directory).change if target.directory else 0
    atomic = target.node.export.files.stamp() - stamp <= target.created
    files.change_info(out, atomic=atomic, before=target.before, after=after)
    out.u32(OpenResult.LOCKTYPE_POSIX | OpenResult.MAY_NOTIFY_LOCK)
    out.bitmap(target.attributes_set)
    write_answer(out, answer, recalled=request.claim == Claim.PREVIOUS)
    return NfsStatus.OK


def _check_claim(ctx: Compound, request: _OpenRequest) -> None:
    """Whether this is the time for such a claim (§8.4.2.1)."""
    if request.create is not None and request.claim != Claim.NULL:
        raise NfsError(NfsStatus.INVAL)
    _check_grace(ctx, reclaim=request.claim == Claim.PREVIOUS)
    if request.claim in {Claim.DELEGATE_PREV, Claim.DELEG_PREV_FH}:
        raise NfsError(
            NfsStatus.NOTSUPP
        )  # nothing of an earlier start of a client is kept (§10.2.1 leaves it open)


def _check_grace(ctx: Compound, *, reclaim: bool) -> None:
    client, grace = client_of(ctx), ctx.service.in_grace(ctx.now)
    if not reclaim:
        if grace or not client.reclaim_complete:
            raise NfsError(NfsStatus.GRACE)
    elif client.reclaim_complete or not grace:
        raise NfsError(NfsStatus.NO_GRACE)
    elif not client.may_reclaim:
        raise NfsError(NfsStatus.RECLAIM_BAD)


async def _target(ctx: Compound, request: _OpenRequest) -> _Target:
    node = ctx.node()
    if request.claim not in {Claim.NULL, Claim.DELEGATE_CUR}:
        return _Target(node, files.look(node))
    above = files.look(node)
    if above.kind != Kind.DIRECTORY:
        raise NfsError(NfsStatus.SYMLINK if above.kind == Kind.SYMLINK else NfsStatus.NOTDIR)
    access.require(ctx, above, access.EXECUTE)
    if request.create is None:
        found = node.export.files.lookup(node.id, request.name)
        return _Target(Node(node.export, found.id), found, directory=node, before=above.change)
    return await _create(ctx, node, above, request.name, request.create)


async def _create(ctx: Compound, directory: Node, above: Attributes, name: bytes, how: _Create) -> _Target:
    """The file of a name, made if there is none."""
    for _ in range(CREATE_TRIES):
        if not how.exclusive and (found := _look(directory, name)):
            if how.mode == CreateMode.GUARDED:
                raise NfsError(NfsStatus.EXIST)
            done = _SIZE_BIT if _cuts(how) else 0
            node = Node(directory.export, found.id)
            return _Target(node, found, attributes_set=done, directory=directory, before=above.change)
        try:
            made = await files.create_file(ctx, directory, name, how.settable, how.verifier)
        except ConflictError as error:
            if error.status != Status.EXISTS or how.mode != CreateMode.UNCHECKED:
                raise
            continue
        node = Node(directory.export, made.id)
        return _Target(
            node,
            made,
            created=True,
            attributes_set=how.settable.bitmap,
            directory=directory,
            before=above.change,
        )
    raise NfsError(NfsStatus.DELAY)


def _look(directory: Node, name: bytes) -> Attributes | None:
    try:
        return directory.export.files.lookup(directory.id, name)
    except NotFoundError:
        return None


def _cuts(how: _Create) -> bool:
    """Of an existing file UNCHECKED sets nothing but the size, and that only to zero (§18.16.3)."""
    return how.settable.change.size == 0


def _truncates(request: _OpenRequest) -> bool:
    return (
        request.create is not None and request.create.mode == CreateMode.UNCHECKED and _cuts(request.create)
    )


async def _truncate(ctx: Compound, target: _Target) -> _Target:
    node = target.node
    found = await node.export.files.set_attributes(node.id, AttributeChange(size=0), access.caller(ctx))
    ctx.unsynced.add(node.export.files)
    return attrs.evolve(target, found=found)


def _check_kind(found: Attributes) -> None:
    """Only regular files are opened (§18.16.4)."""
    if found.kind == Kind.DIRECTORY:
        raise NfsError(NfsStatus.ISDIR)
    if found.kind == Kind.SYMLINK:
        raise NfsError(NfsStatus.SYMLINK)
    if found.kind != Kind.FILE:
        raise NfsError(NfsStatus.WRONG_TYPE)


def _check_permission(ctx: Compound, request: _OpenRequest, target: _Target) -> None:
    """POSIX permission for what is asked; who claims what it had before had it then, so ownership suffices.

    A file that may only be executed is opened for reading all the same: that is how a client executes it.
    """
    wanted = request.mode.access
    owner = request.claim in {Claim.PREVIOUS, Claim.DELEGATE_CUR, Claim.DELEG_CUR_FH}
    if wanted & Share.WRITE or _truncates(request):
        access.writable(ctx, target.node)
        access.require(ctx, target.found, access.WRITE, owner=owner)
    if wanted & Share.READ:
        executes = access.granted(access.identity(ctx, target.node.export), target.found) & access.EXECUTE
        if not (executes and wanted == Share.READ):
            access.require(ctx, target.found, access.READ, owner=owner)


def _check_delegation(ctx: Compound, request: _OpenRequest, node: Node) -> None:
    """Who opens under a delegation has it, also when it is being recalled (§10.4.4)."""
    if request.stateid is not None:
        held = _held(ctx, request.stateid, Delegation, node)
        if request.mode.access & Share.WRITE and not held.write:
            raise NfsError(NfsStatus.OPENMODE)


def _reclaim(ctx: Compound, request: _OpenRequest, node: Node) -> tuple[Open, Delegation | WhyNone | None]:
    """An open of before the restart, and the delegation had with it (§8.4.2.1), which is wanted back at once.

    While there was no server, nobody was kept from changing the file, and nobody told the client.
    """
    state, client = ctx.service.state, client_of(ctx)
    write = request.delegation == DelegationType.WRITE
    if request.delegation != DelegationType.NONE and not state.may_reclaim_delegation(
        client, node, write=write
    ):
        raise NfsError(NfsStatus.RECLAIM_CONFLICT)
    try:
        opened = state.open(client, node, request.owner, request.mode, ctx.now)
    except NfsError as error:  # only another claim can be in the way: one of the two is wrong
        raise NfsError(
            NfsStatus.RECLAIM_CONFLICT if error.status == NfsStatus.SHARE_DENIED else error.status
        ) from None
    ctx.service.claimed(ctx.now)
    if request.delegation == DelegationType.NONE:
        return opened, None
    held = state.delegate(client, node, write=write)
    state.want_back(held, ctx.now)
    return opened, held


# --- other operations on opens ---------------------------------------------------------------------


def _held(ctx: Compound, stateid: Stateid, kind: type[H], node: Node) -> H:
    """What a stateid names: of that kind, and of that file."""
    held = ctx.service.state.resolve(ctx, stateid)
    if not isinstance(held, kind) or held.file is not ctx.service.state.file(node):
        raise NfsError(NfsStatus.BAD_STATEID)
    return held


def close(ctx: Compound, args: Reader, out: Writer) -> int:
    """CLOSE (§18.2); the stateid in the answer is of no use, and says so."""
    args.u32()
    held = _held(ctx, read_stateid(args), Open, ctx.node())
    ctx.service.state.close(held)
    ctx.stateid = INVALID
    write_stateid(out, INVALID)
    return NfsStatus.OK


def open_downgrade(ctx: Compound, args: Reader, out: Writer) -> int:
    """OPEN_DOWNGRADE (§18.18)."""
    stateid = read_stateid(args)
    args.u32()
    wanted, _ = _shares(args)
    held = _held(ctx, stateid, Open, ctx.node())
    ctx.stateid = ctx.service.state.downgrade(held, wanted)
    write_stateid(out, ctx.stateid)
    return NfsStatus.OK


# --- locks -----------------------------------------------------------------------------------------


def _lock_type(args: Reader) -> LockType:
    number = args.u32()
    if not LockType.READ <= number <= LockType.WRITE_WAITING:
        raise XdrError(f"no type of lock: {number}")
    return LockType(number)


def _range(kind: LockType, offset: int, length: int) -> Range:
    """The bytes of a lock; a length of all ones reaches to the end, whatever the file grows to (§18.10.3)."""
    end = END if length == _LENGTH_TO_END else offset + length
    if not length or end > END:
        raise NfsError(NfsStatus.INVAL)
    return Range(offset, end, kind in {LockType.WRITE, LockType.WRITE_WAITING})


def _denied(out: Writer, conflict: tuple[LockOwner, Range]) -> int:
    (client, owner), held = conflict
    out.u64(held.start)
    out.u64(_LENGTH_TO_END if held.end == END else held.end - held.start)
    out.u32(LockType.WRITE if held.write else LockType.READ)
    out.u64(client.id)
    out.opaque(owner)
    return NfsStatus.DENIED


def lock(ctx: Compound, args: Reader, out: Writer) -> int:
    """LOCK (§18.10)."""
    state, client, node = ctx.service.state, client_of(ctx), ctx.node()
    kind, reclaim, offset, length = _lock_type(args), args.boolean(), args.u64(), args.u64()
    opened, owner, held = _locker(ctx, args, node)
    wanted = _range(kind, offset, length)
    _check_grace(ctx, reclaim=reclaim)
    if not opened.mode.access & (Share.WRITE if wanted.write else Share.READ):
        raise NfsError(NfsStatus.OPENMODE)
    if conflict := state.lock_conflict(node, (client, owner), wanted, ctx.now):
        if reclaim:
            raise NfsError(NfsStatus.RECLAIM_CONFLICT)
        if kind in {LockType.READ_WAITING, LockType.WRITE_WAITING}:
            state.wait(node, (client, owner), wanted)
        return _denied(out, conflict)
    if reclaim:
        ctx.service.claimed(ctx.now)
    ctx.stateid = state.lock(held or state.lock_owner(opened, owner), wanted)
    write_stateid(out, ctx.stateid)
    return NfsStatus.OK


def _locker(ctx: Compound, args: Reader, node: Node) -> tuple[Open, bytes, Lock | None]:
    """locker4: the open a lock is had through, its owner, and what the owner holds already."""
    if not args.boolean():
        stateid = read_stateid(args)
        args.u32()
        held = _held(ctx, stateid, Lock, node)
        return held.open, held.owner, held
    args.u32()
    stateid = read_stateid(args)
    args.u32()
    return _held(ctx, stateid, Open, node), _owner(args), None


def lockt(ctx: Compound, args: Reader, out: Writer) -> int:
    """LOCKT (§18.11)."""
    node, client = ctx.node(), client_of(ctx)
    wanted = _range(_lock_type(args), args.u64(), args.u64())
    owner = client, _owner(args)
    _check_kind(files.look(node))
    _check_grace(ctx, reclaim=False)
    ctx.service.state.before_read(ctx, node)  # a holder of a write delegation has its locks to itself
    conflict = ctx.service.state.lock_conflict(node, owner, wanted, ctx.now)
    return _denied(out, conflict) if conflict else NfsStatus.OK


def locku(ctx: Compound, args: Reader, out: Writer) -> int:
    """LOCKU (§18.12)."""
    kind = _lock_type(args)
    args.u32()
    stateid = read_stateid(args)
    where = _range(kind, args.u64(), args.u64())
    held = _held(ctx, stateid, Lock, ctx.node())
    ctx.stateid = ctx.service.state.unlock(held, where.start, where.end)
    write_stateid(out, ctx.stateid)
    return NfsStatus.OK


# --- stateids --------------------------------------------------------------------------------------


def test_stateid(ctx: Compound, args: Reader, out: Writer) -> int:
    """TEST_STATEID (§18.48)."""
    stateids = [read_stateid(args) for _ in range(args.count(args.left // (4 + OTHER_BYTES)))]
    out.u32(len(stateids))
    for each in stateids:
        out.u32(ctx.service.state.test(client_of(ctx), each))
    return NfsStatus.OK


def free_stateid(ctx: Compound, args: Reader, out: Writer) -> int:
    """FREE_STATEID (§18.38)."""
    return ctx.service.state.free(ctx, read_stateid(args))


# --- delegations -----------------------------------------------------------------------------------


def delegreturn(ctx: Compound, args: Reader, out: Writer) -> int:
    """DELEGRETURN (§18.6)."""
    held = _held(ctx, read_stateid(args), Delegation, ctx.node())
    ctx.service.state.return_delegation(held, ctx.now)
    return NfsStatus.OK


def want_delegation(ctx: Compound, args: Reader, out: Writer) -> int:
    """WANT_DELEGATION (§18.49)."""
    word, number = args.u32(), args.u32()
    if number not in {Claim.PREVIOUS, Claim.FH, Claim.DELEG_PREV_FH}:
        raise XdrError(f"no claim of a delegation: {number}")
    claimed = _delegation_type(args) if number == Claim.PREVIOUS else DelegationType.NONE
    want = _want(word)
    node, state, client = ctx.node(), ctx.service.state, client_of(ctx)
    found = files.look(node)
    _check_kind(found)
    if number == Claim.DELEG_PREV_FH:
        raise NfsError(NfsStatus.NOTSUPP)
    _check_grace(ctx, reclaim=number == Claim.PREVIOUS)
    if number == Claim.PREVIOUS:
        write = claimed == DelegationType.WRITE
        if claimed == DelegationType.NONE or not state.may_reclaim_delegation(client, node, write=write):
            raise NfsError(NfsStatus.RECLAIM_CONFLICT if claimed else NfsStatus.INVAL)
        write_answer(out, state.delegate(client, node, write=write))
    else:
        access.require(ctx, found, access.READ)
        share = Share.BOTH if want in {Want.WRITE, Want.ANY} else Share.READ
        write_answer(out, state.offer(client, node, share, want, ctx.now))
    return NfsStatus.OK


def _unsupported(ctx: Compound, args: Reader, out: Writer) -> int:
    """An operation of an optional feature that is not there (RFC 8881 §17)."""
    return NfsStatus.NOTSUPP


OPERATIONS: Final[dict[Op, Operation]] = {
    Op.CLOSE: close,
    Op.DELEGRETURN: delegreturn,
    Op.FREE_STATEID: free_stateid,
    Op.LOCK: lock,
    Op.LOCKT: lockt,
    Op.LOCKU: locku,
    Op.OPEN: open_,
    Op.OPEN_DOWNGRADE: open_downgrade,
    Op.TEST_STATEID: test_stateid,
    Op.WANT_DELEGATION: want_delegation,
    # Delegations of directories, those that outlive a client's restart, and layouts.
    **dict.fromkeys(
        (
            *(Op.DELEGPURGE, Op.GET_DIR_DELEGATION, Op.GETDEVICEINFO, Op.GETDEVICELIST),
            *(Op.LAYOUTCOMMIT, Op.LAYOUTGET, Op.LAYOUTRETURN, Op.LAYOUTERROR, Op.LAYOUTSTATS),
        ),
        _unsupported,
    ),
}
