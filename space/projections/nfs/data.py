"""Operations on the bytes of files (RFC 8881 §18, RFC 7862 §15).

UNSTABLE writes are in the log's hands or on their way there when they are answered, and may be lost with the process:
the write verifier is another one after each start.  It also becomes another one when bytes that had been acknowledged
could not be kept, so that every client that has not committed sends its bytes again (RFC 8881 §18.32.3).

COPY and CLONE share what is stored: no bytes move, whatever the length.  Where they cannot (the two files are of
different file systems or keys), CLONE says so and COPY moves bytes: a few of them, or, for a client that lets it, all
of them while it does something else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import attrs

from space._errors import SpaceError, Status
from space.events.types import Kind
from space.projections.nfs import access, handles
from space.projections.nfs.attributes import IO_BYTES_MAX, SIZE_MAX
from space.projections.nfs.compound import Compound, NfsError, Operation, Stateid
from space.projections.nfs.exports import Node
from space.projections.nfs.files import look, look_permissions, read_stateid
from space.projections.nfs.nfs4 import NfsStatus, Op
from space.projections.nfs.status import status_of
from space.projections.nfs.xdr import Reader, Writer, XdrError
from space.projections.vfs import Attributes, Caller

if TYPE_CHECKING:
    from space.projections.nfs.service import Service
    from space.projections.nfs.sessions import Client

UNSTABLE: Final = 0
FILE_SYNC: Final = 2

SEGMENTS_MAX: Final = 64
"""Most pieces of one READ_PLUS: each costs a look at the map."""

HOLE_BYTES: Final = 4096
"""READ_PLUS tells no smaller hole: Linux takes pieces apart in place, from the last one on, and fails with EIO where a
hole is smaller than the heads of the pieces around it."""

COPY_BYTES: Final = 1 << 20
"""Bytes that are moved at once where they cannot be shared."""

COPY_BYTES_NOW: Final = 8 << 20
"""Most bytes moved before COPY is answered; the client asks for the rest."""

COPIES_MAX: Final = 64
"""Copies under way at a time, of all clients: each holds one piece in memory."""

_READ_OVERHEAD: Final = 32
"""Bytes of a READ's result, or of a segment of READ_PLUS, beside the data."""

_CONTENT_DATA: Final = 0
_CONTENT_HOLE: Final = 1
_OFFLOAD: Final = struct.Struct(">IQ")
_LOST: Final = frozenset({Status.NO_SPACE, Status.IO, Status.CORRUPT, Status.UNAVAILABLE})
_OK: Final = NfsStatus.OK


def _check_file(found: Attributes) -> Attributes:
    """The attributes, if they are a regular file's.

    Raises:
        NfsError: ISDIR, SYMLINK, WRONG_TYPE: they are not.
    """
    if found.kind != Kind.FILE:
        raise NfsError(_NOT_FILES.get(found.kind, NfsStatus.WRONG_TYPE))
    return found


_NOT_FILES: Final = {Kind.DIRECTORY: NfsStatus.ISDIR, Kind.SYMLINK: NfsStatus.SYMLINK}


def _to_read(ctx: Compound, node: Node, stateid: Stateid) -> Attributes:
    """Attributes of a file that may be read with a stateid."""
    found = _check_file(look(node))
    if not ctx.service.state.check_io(ctx, node, stateid, write=False):
        access.require_readable(ctx, node, found)
    return found


def _to_write(ctx: Compound, node: Node, stateid: Stateid) -> None:
    """Makes sure that a file may be written with a stateid; bytes held back are left so, to be joined with the next."""
    found = _check_file(look_permissions(node))
    access.writable(ctx, node)
    if not ctx.service.state.check_io(ctx, node, stateid, write=True):
        access.require(ctx, found, access.WRITE, owner=True)
    ctx.service.state.before_change(ctx, node)


# --- reading ----------------------------------------------------------------------------------------


def _read(ctx: Compound, args: Reader, out: Writer) -> int:
    stateid, offset, count = read_stateid(args), args.u64(), args.u32()
    node = ctx.node()
    size = _to_read(ctx, node, stateid).size
    count = min(count, IO_BYTES_MAX, max(ctx.room(out) - _READ_OVERHEAD, 0))
    data = node.export.files.read(node.id, offset, count) if offset < size else b""
    out.boolean(offset + len(data) >= size)
    out.opaque(data)
    return _OK


def _read_plus(ctx: Compound, args: Reader, out: Writer) -> int:
    stateid, offset, count = read_stateid(args), args.u64(), args.u32()
    node = ctx.node()
    found = _to_read(ctx, node, stateid)
    end = min(offset + min(count, IO_BYTES_MAX), found.size)
    eof_at = out.reserve()
    count_at = out.reserve()
    segments, at = 0, offset
    for start, stop, is_data in _segments(node, found, offset, end):
        room = ctx.room(out) - _READ_OVERHEAD
        if segments >= SEGMENTS_MAX or room <= 0:
            break
        out.u32(_CONTENT_DATA if is_data else _CONTENT_HOLE)
        out.u64(start)
        if is_data:
            data = node.export.files.read(node.id, start, min(stop - start, room))
            out.opaque(data)
            at = start + len(data)
        else:
            out.u64(stop - start)
            at = stop
        segments += 1
    out.fill(count_at, segments)
    out.fill(eof_at, at >= found.size)
    return _OK


def _segments(node: Node, found: Attributes, offset: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """What a range is made of: start, end, and whether it is data."""
    if found.allocated >= found.size:
        if offset < end:
            yield offset, end, True
        return
    at = offset
    for start, stop in _holes(node, offset, end):
        if start > at:
            yield at, start, True
        yield start, stop, False
        at = stop
    if at < end:
        yield at, end, True


def _holes(node: Node, offset: int, end: int) -> Iterator[tuple[int, int]]:
    """The holes of a range that are worth telling, from block to block but for the ends of the range."""
    files, at = node.export.files, offset
    while at < end:
        start = files.seek(node.id, at, data=False)
        if start is None or start >= end:
            return
        at = files.seek(node.id, start, data=True) or end
        first = start if start == offset else -(-start // HOLE_BYTES) * HOLE_BYTES
        last = end if at >= end else at // HOLE_BYTES * HOLE_BYTES
        if last - first >= HOLE_BYTES or first < last == end:
            yield first, last


def _seek(ctx: Compound, args: Reader, out: Writer) -> int:
    stateid, offset, what = read_stateid(args), args.u64(), args.u32()
    node = ctx.node()
    size = _to_read(ctx, node, stateid).size
    if what > _CONTENT_HOLE:
        raise NfsError(NfsStatus.UNION_NOTSUPP)
    if offset >= size:
        raise NfsError(NfsStatus.NXIO)
    found = node.export.files.seek(node.id, offset, data=what == _CONTENT_DATA)
    out.boolean(found is None or found >= size)
    out.u64(size if found is None else found)
    return _OK


def _io_advise(ctx: Compound, args: Reader, out: Writer) -> int:
    stateid = read_stateid(args)
    args.u64()
    args.u64()
    args.bitmap()
    _to_read(ctx, ctx.node(), stateid)
    out.bitmap(0)  # no hint changes anything
    return _OK


# --- writing ----------------------------------------------------------------------------------------


class _Kept:
    """Bytes that were acknowledged and could not be kept change the write verifier."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def __enter__(self) -> None:
        """Whatever is written from here on."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SpaceError) and error.status in _LOST:
            service = self._service
            service.write_verifier = service.write_verifier[:4] + service.shell.random(4)


async def _write(ctx: Compound, args: Reader, out: Writer) -> int:
    stateid, offset, stable = read_stateid(args), args.u64(), args.u32()
    data = args.opaque_view(args.left)
    if stable > FILE_SYNC:
        raise XdrError(f"no way to write: {stable}")
    node = ctx.node()
    _to_write(ctx, node, stateid)
    if offset + len(data) > SIZE_MAX:
        raise NfsError(NfsStatus.FBIG)
    files = node.export.files
    with _Kept(ctx.service):
        if len(data):
            await files.write(node.id, offset, data, access.caller(ctx))
        if stable != UNSTABLE:
            await files.commit(node.id)
            ctx.unsynced.add(files)
    out.u32(len(data))
    out.u32(UNSTABLE if stable == UNSTABLE else FILE_SYNC)
    out.fixed(ctx.service.write_verifier)
    return _OK


async def _commit(ctx: Compound, args: Reader, out: Writer) -> int:
    args.u64()
    args.u32()
    node = ctx.node()
    _check_file(look_permissions(node))
    with _Kept(ctx.service):
        await node.export.files.commit(node.id)
    ctx.unsynced.add(node.export.files)
    out.fixed(ctx.service.write_verifier)
    return _OK


def _range(args: Reader) -> tuple[int, int]:
    """Offset and length of a range that is not empty."""
    offset, length = args.u64(), args.u64()
    if not length:
        raise NfsError(NfsStatus.INVAL)
    if offset + length > SIZE_MAX:
        raise NfsError(NfsStatus.FBIG)
    return offset, length


async def _allocate(ctx: Compound, args: Reader, out: Writer) -> int:
    stateid, (offset, length) = read_stateid(args), _range(args)
    node = ctx.node()
    _to_write(ctx, node, stateid)
    await node.export.files.allocate(node.id, offset, length, access.caller(ctx))
    ctx.unsynced.add(node.export.files)
    return _OK


async def _deallocate(ctx: Compound, args: Reader, out: Writer) -> int:
    stateid, (offset, length) = read_stateid(args), _range(args)
    node = ctx.node()
    _to_write(ctx, node, stateid)
    await node.export.files.deallocate(node.id, offset, length, access.caller(ctx))
    ctx.unsynced.add(node.export.files)
    return _OK


# --- copying ----------------------------------------------------------------------------------------


@attrs.frozen
class _Order:
    """What is to be copied."""

    source: Node
    source_offset: int
    target: Node
    offset: int
    length: int
    caller: Caller

    async def share(self) -> None:
        """Has the target share what the source has stored."""
        await self.target.export.files.copy(
            *(self.source.id, self.source_offset, self.target.id, self.offset, self.length, self.caller)
        )

    async def move(self, done: int) -> int:
        """Moves the next piece, and returns how long it was: nothing where the source has become shorter."""
        length = min(COPY_BYTES, self.length - done)
        data = self.source.export.files.read(self.source.id, self.source_offset + done, length)
        if data:
            await self.target.export.files.write(self.target.id, self.offset + done, data, self.caller)
        return len(data)


def _order(ctx: Compound, args: Reader) -> _Order:
    """The arguments that COPY and CLONE share, checked.

    Raises:
        NfsError: INVAL: beyond the end of the source (RFC 7862 §15.2.3), or the two ranges overlap.
    """
    source_stateid, stateid = read_stateid(args), read_stateid(args)
    source_offset, offset, length = args.u64(), args.u64(), args.u64()
    target, source = ctx.node(), ctx.saved
    if source is None:
        raise NfsError(NfsStatus.NOFILEHANDLE)
    size = _to_read(ctx, source, source_stateid).size
    _to_write(ctx, target, stateid)
    if source_offset > size or source_offset + length > size:
        raise NfsError(NfsStatus.INVAL)
    length = length or size - source_offset
    if offset + length > SIZE_MAX:
        raise NfsError(NfsStatus.FBIG)
    if source == target and abs(source_offset - offset) < length:
        raise NfsError(NfsStatus.INVAL)
    return _Order(source, source_offset, target, offset, length, access.caller(ctx))


async def _clone(ctx: Compound, args: Reader, out: Writer) -> int:
    order = _order(ctx, args)
    if order.source.export is not order.target.export:
        raise NfsError(NfsStatus.XDEV)
    try:
        if order.length:
            await order.share()
    except SpaceError as error:
        if error.status == Status.NOT_PERMITTED:
            raise NfsError(NfsStatus.NOTSUPP) from None
        raise
    ctx.unsynced.add(order.target.export.files)
    return _OK


async def _copy(ctx: Compound, args: Reader, out: Writer) -> int:
    order = _order(ctx, args)
    args.boolean()  # whether in order: always
    synchronous = args.boolean()
    if args.u32():
        return NfsStatus.NOTSUPP  # from another server
    count = await _copied(ctx, order)
    if count is None and not synchronous:
        copy = ctx.service.copies.begin(ctx, order)
        if copy is not None:
            _copy_result(ctx, out, 0, copy)
            return _OK
    if count is None:
        count = 0
        with _Kept(ctx.service):
            while count < min(order.length, COPY_BYTES_NOW) and (moved := await order.move(count)):
                count += moved
            await order.target.export.files.commit(order.target.id)
    ctx.unsynced.add(order.target.export.files)
    _copy_result(ctx, out, count, None)
    return _OK


async def _copied(ctx: Compound, order: _Order) -> int | None:
    """How many bytes could be copied without moving any; None: they have to be moved."""
    if not order.length:
        return 0
    if order.source.export is not order.target.export:
        return None
    try:
        await order.share()
    except SpaceError as error:
        if error.status == Status.NOT_PERMITTED:
            return None
        raise
    return order.length


def _copy_result(ctx: Compound, out: Writer, count: int, copy: Copy | None) -> None:
    """Writes COPY4resok."""
    if copy is None:
        out.u32(0)
    else:
        out.u32(1)
        out.u32(copy.stateid.seqid)
        out.fixed(copy.stateid.other)
    out.u64(count)
    out.u32(UNSTABLE if copy else FILE_SYNC)
    out.fixed(ctx.service.write_verifier)
    out.boolean(value=True)
    out.boolean(copy is None)


@attrs.define(eq=False)
class Copy:
    """A copy that goes on after it was answered; ``status`` is None until it has ended."""

    client: Client
    order: _Order
    stateid: Stateid
    count: int = 0
    status: NfsStatus | None = None
    cancelled: bool = False


class Copies:
    """Asynchronous copies of a server (RFC 7862 §4.8).

    One that has ended is remembered until its client cancels it, or another one needs its place.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._copies: dict[bytes, Copy] = {}
        self._number = 0

    def begin(self, ctx: Compound, order: _Order) -> Copy | None:
        """A copy that has begun; None: too many are under way."""
        assert ctx.client is not None
        if len(self._copies) >= COPIES_MAX:
            ended = next((other for other, each in self._copies.items() if each.status is not None), None)
            if ended is None:
                return None
            del self._copies[ended]
        self._number += 1
        # Numbers of stateids proper never get that far: one is not taken for the other.
        other = _OFFLOAD.pack(self._service.epoch & 0xFFFFFFFF, self._number | 1 << 63)
        copy = self._copies[other] = Copy(ctx.client, order, Stateid(1, other))
        self._service.shell.spawn(self._run(copy))
        return copy

    def find(self, ctx: Compound, stateid: Stateid) -> Copy:
        """The copy of a stateid.

        Raises:
            NfsError: BAD_STATEID: there is none.
        """
        found = self._copies.get(stateid.other)
        if found is None or found.client is not ctx.client:
            raise NfsError(NfsStatus.BAD_STATEID)
        return found

    def cancel(self, copy: Copy) -> None:
        """Ends a copy: what it has copied stays."""
        copy.cancelled = True
        del self._copies[copy.stateid.other]

    async def _run(self, copy: Copy) -> None:
        files, service = copy.order.target.export.files, self._service
        for each in (copy.order.source, copy.order.target):
            each.export.files.hold(each.id)
        try:
            with _Kept(service):
                while self._wanted(copy) and (moved := await copy.order.move(copy.count)):
                    copy.count += moved
                    if copy.count % COPY_BYTES_NOW < moved:
                        await service.barrier([files])  # others get their turn, and dirty memory stays small
                await files.commit(copy.order.target.id)
                await service.barrier([files])
            copy.status = NfsStatus.OK
        except SpaceError as error:
            copy.status = status_of(error)
        finally:
            for each in (copy.order.source, copy.order.target):
                each.export.files.drop(each.id)
        if not copy.cancelled and copy.client.id in service.clients:
            service.callbacks.offload_done(
                copy.client,
                copy.stateid,
                handles.encode(copy.order.target),
                status=copy.status,
                count=copy.count,
                stable=FILE_SYNC,
            )

    def _wanted(self, copy: Copy) -> bool:
        return (
            copy.count < copy.order.length and not copy.cancelled and copy.client.id in self._service.clients
        )


def _offload_status(ctx: Compound, args: Reader, out: Writer) -> int:
    copy = ctx.service.copies.find(ctx, read_stateid(args))
    out.u64(copy.count)
    out.u32(0 if copy.status is None else 1)
    if copy.status is not None:
        out.u32(copy.status)
    return _OK


def _offload_cancel(ctx: Compound, args: Reader, out: Writer) -> int:
    ctx.service.copies.cancel(ctx.service.copies.find(ctx, read_stateid(args)))
    return _OK


def _unsupported(ctx: Compound, args: Reader, out: Writer) -> int:
    """Copies between servers, and patterns: optional, and not there (RFC 7862 §13)."""
    return NfsStatus.NOTSUPP


OPERATIONS: Final[dict[Op, Operation]] = {
    Op.READ: _read,
    Op.READ_PLUS: _read_plus,
    Op.SEEK: _seek,
    Op.IO_ADVISE: _io_advise,
    Op.WRITE: _write,
    Op.COMMIT: _commit,
    Op.ALLOCATE: _allocate,
    Op.DEALLOCATE: _deallocate,
    Op.CLONE: _clone,
    Op.COPY: _copy,
    Op.OFFLOAD_STATUS: _offload_status,
    Op.OFFLOAD_CANCEL: _offload_cancel,
    Op.COPY_NOTIFY: _unsupported,
    Op.WRITE_SAME: _unsupported,
}
