"""I/O commands of the NVM command set over a block device.

NVM Command Set Specification 1.0, section 3.2; Base Specification 2.0, section 7.

Every command is checked here before the device sees it: namespace, ANA state, reservation, block range, size.  A
write is acknowledged as buffered while the host leaves the volatile write cache on; Flush and FUA make it durable;
with the cache off every write is durable.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from space._errors import SpaceError
from space.events.commands import Buffer
from space.projections.block import BlockInfo
from space.projections.nvme import reservation_commands
from space.projections.nvme.controller import Controller
from space.projections.nvme.identify import (
    COPY_BYTES_MAX,
    COPY_RANGE_BLOCKS_MAX,
    COPY_RANGES_MAX,
)
from space.projections.nvme.pdu import Command
from space.projections.nvme.reply import DONE, Reply
from space.projections.nvme.status import CommandError, NvmeStatus
from space.projections.nvme.target import ALL_NAMESPACES, NAMESPACES_MAX, AnaState, Namespace

if TYPE_CHECKING:
    from space.projections.nvme.queue import Handler, Queue

FLUSH: Final = 0x00
WRITE: Final = 0x01
READ: Final = 0x02
COMPARE: Final = 0x05
WRITE_ZEROES: Final = 0x08
DATASET_MANAGEMENT: Final = 0x09
VERIFY: Final = 0x0C
RESERVATION_REGISTER: Final = 0x0D
RESERVATION_REPORT: Final = 0x0E
RESERVATION_ACQUIRE: Final = 0x11
RESERVATION_RELEASE: Final = 0x15
COPY: Final = 0x19

_FUA: Final = 1 << 30
_DEALLOCATE: Final = 1 << 25
_DIRECTIVE: Final = 0xF << 20
_RANGE: Final = struct.Struct("<4xIQ")
_COPY_RANGE: Final = struct.Struct("<8xQH14x")
assert (_RANGE.size, _COPY_RANGE.size) == (16, 32)

ANA_STATUS: Final = {
    AnaState.INACCESSIBLE: NvmeStatus.ANA_INACCESSIBLE,
    AnaState.PERSISTENT_LOSS: NvmeStatus.ANA_PERSISTENT_LOSS,
    AnaState.CHANGE: NvmeStatus.ANA_TRANSITION,
}
"""What commands end with when their namespace is not reached this way now; the host tries another path."""
_FIRST_UNREACHABLE: Final = int(AnaState.INACCESSIBLE)


# --- checks


def _controller(queue: Queue) -> Controller:
    assert queue.controller is not None
    return queue.controller


def _namespace(queue: Queue, nsid: int) -> Namespace:
    """The namespace, if it is reached through here (section 3.2.1 of the Base Specification)."""
    subsystem = _controller(queue).subsystem
    namespace = subsystem.namespaces.get(nsid)
    if namespace is None:
        valid = 1 <= nsid <= NAMESPACES_MAX  # but nobody's
        raise CommandError(NvmeStatus.INVALID_FIELD if valid else NvmeStatus.INVALID_NAMESPACE, location=4)
    state = subsystem.ana_states[namespace.ana_group]
    if state >= _FIRST_UNREACHABLE:
        raise CommandError(ANA_STATUS[state], retry=state != AnaState.PERSISTENT_LOSS)
    return namespace


def _open(queue: Queue, command: Command, *, writes: bool) -> tuple[Namespace, BlockInfo]:
    """The namespace and its device as it is now, if the host may read or write it."""
    namespace = _namespace(queue, command.nsid)
    state = namespace.reservations.state
    if state.kind is not None and not state.allows(_controller(queue).host_id, writes=writes):
        raise CommandError(NvmeStatus.RESERVATION_CONFLICT)
    info = namespace.device.info()
    if writes and (namespace.read_only or info.read_only):
        raise CommandError(NvmeStatus.WRITE_PROTECTED)
    return namespace, info


def _range(command: Command, info: BlockInfo) -> tuple[int, int]:
    """Offset and length in bytes."""
    first, count = command.cdw10 | command.cdw11 << 32, (command.cdw12 & 0xFFFF) + 1
    if (first + count) * info.block_size > info.size:
        raise CommandError(NvmeStatus.LBA_OUT_OF_RANGE, location=40)
    return first * info.block_size, count * info.block_size


def _with_data(queue: Queue, command: Command, info: BlockInfo) -> tuple[int, int]:
    """Offset and length of a command whose data has the length of its range."""
    offset, length = _range(command, info)
    if length > queue.connection.limits.transfer_bytes:
        raise CommandError(NvmeStatus.INVALID_FIELD, location=48)
    if length != command.sgl_length:
        raise CommandError(NvmeStatus.SGL_LENGTH_INVALID, location=32)
    return offset, length


def _payload(command: Command, size: int) -> bytes | bytearray | memoryview:
    """The data of a command that must have so many bytes."""
    if command.sgl_length != size or command.data is None:
        raise CommandError(NvmeStatus.SGL_LENGTH_INVALID, location=32)
    return command.data


def _ranges(command: Command, size: int) -> memoryview:
    """The range descriptors of a command; hosts send room for more than they name (Linux always does)."""
    if command.sgl_length < size or command.data is None:
        raise CommandError(NvmeStatus.SGL_LENGTH_INVALID, location=32)
    return memoryview(command.data)[:size]


def _durable(queue: Queue, command: Command) -> bool:
    return bool(command.cdw12 & _FUA) or not _controller(queue).features.write_cache


# --- reading


def read(queue: Queue, command: Command) -> Reply | Coroutine[Any, Any, Reply]:
    """Read; with FUA what is returned is durable."""
    namespace, info = _open(queue, command, writes=False)
    offset, length = _with_data(queue, command, info)
    durable = bool(command.cdw12 & _FUA)
    buffers = None if durable else namespace.device.peek(offset, length)
    if buffers is None:
        return _read(namespace, offset, length, durable=durable)
    return _was_read(namespace, buffers, length)


def _was_read(namespace: Namespace, buffers: Sequence[Buffer], length: int) -> Reply:
    counters = namespace.counters
    counters.reads += 1
    counters.bytes_read += length
    return Reply(buffers, length)


async def _read(namespace: Namespace, offset: int, length: int, *, durable: bool) -> Reply:
    if durable:
        await namespace.device.flush()
    return _was_read(namespace, await namespace.device.read(offset, length), length)


def compare(queue: Queue, command: Command) -> Coroutine[Any, Any, Reply]:
    """Compare: success if the blocks hold the data."""
    namespace, info = _open(queue, command, writes=False)
    offset, length = _with_data(queue, command, info)
    return _compare(namespace, offset, memoryview(_payload(command, length)))


async def _compare(namespace: Namespace, offset: int, expected: memoryview) -> Reply:
    place = 0
    for buffer in await namespace.device.read(offset, len(expected)):
        if expected[place : place + len(buffer)] != buffer:
            raise CommandError(NvmeStatus.COMPARE_FAILURE)
        place += len(buffer)
    return DONE


def verify(queue: Queue, command: Command) -> Coroutine[Any, Any, Reply]:
    """Verify: success if the blocks can be read; none of them travel."""
    namespace, info = _open(queue, command, writes=False)
    return _verify(namespace, *_range(command, info), queue.connection.limits.transfer_bytes)


async def _verify(namespace: Namespace, offset: int, length: int, step: int) -> Reply:
    for begin in range(offset, offset + length, step):
        await namespace.device.read(begin, min(step, offset + length - begin))
    return DONE


# --- writing


def flush(queue: Queue, command: Command) -> Coroutine[Any, Any, Reply]:
    """Flush: everything acknowledged before is durable; of one namespace, or of all."""
    if command.nsid == ALL_NAMESPACES:
        return _flush(list(_controller(queue).subsystem.namespaces.values()))
    namespace = _namespace(queue, command.nsid)
    state = namespace.reservations.state
    if not state.allows(_controller(queue).host_id, writes=True):
        raise CommandError(NvmeStatus.RESERVATION_CONFLICT)
    return _flush([namespace])


async def _flush(namespaces: list[Namespace]) -> Reply:
    for namespace in namespaces:
        await namespace.device.flush()
    return DONE


def write(queue: Queue, command: Command) -> Coroutine[Any, Any, Reply] | None:
    """Write: all of it or, after a crash, none."""
    namespace, info = _open(queue, command, writes=True)
    offset, length = _with_data(queue, command, info)
    if command.cdw12 & _DIRECTIVE:
        raise CommandError(NvmeStatus.INVALID_FIELD, location=50)
    work = _Write(queue, command, namespace, offset, _payload(command, length))
    return None if not _durable(queue, command) and work.begin() else work.carried_out()


class _Write:
    """A write that the device carries out by itself, or a coroutine does."""

    __slots__ = ("_command", "_data", "_held", "_namespace", "_offset", "_queue")

    def __init__(
        self,
        queue: Queue,
        command: Command,
        namespace: Namespace,
        offset: int,
        data: bytes | bytearray | memoryview,
    ) -> None:
        self._queue = queue
        self._command = command
        self._namespace = namespace
        self._offset = offset
        self._data = data

    def begin(self) -> bool:
        """Whether it is under way, and will be answered."""
        actor = _controller(self._queue).actor
        if not self._namespace.device.begin_write(self._offset, self._data, actor=actor, done=self._done):
            return False
        self._held = self._queue.begun(self._command)
        return True

    def _done(self, error: SpaceError | None) -> None:
        if error is None:
            self._count()
        self._queue.ended(self._command, self._held, error)

    async def carried_out(self) -> Reply:
        """Waits until it is done."""
        durable, actor = _durable(self._queue, self._command), _controller(self._queue).actor
        await self._namespace.device.write(self._offset, self._data, durable=durable, actor=actor)
        self._count()
        return DONE

    def _count(self) -> None:
        counters = self._namespace.counters
        counters.writes += 1
        counters.bytes_written += len(self._data)


def write_zeroes(queue: Queue, command: Command) -> Coroutine[Any, Any, Reply]:
    """Write Zeroes, which gives the space back if the host says it may be."""
    namespace, info = _open(queue, command, writes=True)
    return _write_zeroes(
        namespace,
        *_range(command, info),
        deallocate=bool(command.cdw12 & _DEALLOCATE),
        durable=_durable(queue, command),
        actor=_controller(queue).actor,
    )


async def _write_zeroes(
    namespace: Namespace, offset: int, length: int, *, deallocate: bool, durable: bool, actor: str
) -> Reply:
    await namespace.device.write_zeroes(offset, length, deallocate=deallocate, durable=durable, actor=actor)
    return DONE


def dataset_management(queue: Queue, command: Command) -> Reply | Coroutine[Any, Any, Reply]:
    """Dataset Management: ranges to deallocate; hints about their use are taken note of by nobody."""
    namespace, info = _open(queue, command, writes=True)
    count = (command.cdw10 & 0xFF) + 1
    data = _ranges(command, count * _RANGE.size)
    ranges = [
        (first * info.block_size, blocks * info.block_size) for blocks, first in _RANGE.iter_unpack(data)
    ]
    if any(offset + length > info.size for offset, length in ranges):
        raise CommandError(NvmeStatus.LBA_OUT_OF_RANGE)
    ranges = [each for each in ranges if each[1]]
    if not command.cdw11 >> 2 & 1 or not ranges:
        return DONE
    return _deallocate(namespace, ranges, durable=_durable_hint(queue), actor=_controller(queue).actor)


def _durable_hint(queue: Queue) -> bool:
    return not _controller(queue).features.write_cache


async def _deallocate(
    namespace: Namespace, ranges: list[tuple[int, int]], *, durable: bool, actor: str
) -> Reply:
    await namespace.device.deallocate(ranges, actor=actor)
    if durable:
        await namespace.device.flush()
    return DONE


def copy(queue: Queue, command: Command) -> Coroutine[Any, Any, Reply]:
    """Copy: ranges, one after the other, to one place; no bytes travel, and stored ones are shared."""
    namespace, info = _open(queue, command, writes=True)
    _open(queue, command, writes=False)
    if command.cdw12 >> 8 & 0xF or command.cdw12 & _DIRECTIVE:
        raise CommandError(NvmeStatus.INVALID_FIELD, location=49)
    count = (command.cdw12 & 0xFF) + 1
    if count > COPY_RANGES_MAX:
        raise CommandError(NvmeStatus.SIZE_LIMIT_EXCEEDED, location=48)
    ranges = list(_copied(_ranges(command, count * _COPY_RANGE.size), info))
    target, length = (command.cdw10 | command.cdw11 << 32) * info.block_size, sum(each[1] for each in ranges)
    if length > COPY_BYTES_MAX:
        raise CommandError(NvmeStatus.SIZE_LIMIT_EXCEEDED)
    if target + length > info.size:
        raise CommandError(NvmeStatus.LBA_OUT_OF_RANGE, location=40)
    return _copy(namespace, ranges, target, durable=_durable(queue, command), actor=_controller(queue).actor)


def _copied(data: bytes | bytearray | memoryview, info: BlockInfo) -> Iterator[tuple[int, int]]:
    """Source ranges in bytes; an error says which range is the first that is wrong."""
    for index, (first, blocks) in enumerate(_COPY_RANGE.iter_unpack(data)):
        if blocks + 1 > COPY_RANGE_BLOCKS_MAX:
            raise CommandError(NvmeStatus.SIZE_LIMIT_EXCEEDED, result=index)
        if (first + blocks + 1) * info.block_size > info.size:
            raise CommandError(NvmeStatus.LBA_OUT_OF_RANGE, result=index)
        yield first * info.block_size, (blocks + 1) * info.block_size


async def _copy(
    namespace: Namespace, ranges: list[tuple[int, int]], target: int, *, durable: bool, actor: str
) -> Reply:
    await namespace.device.copy(ranges, target, durable=durable, actor=actor)
    return DONE


async def compare_and_write(queue: Queue, first: Command, second: Command) -> Reply:
    """The fused operation: writes if the blocks hold the data of Compare, with nothing in between."""
    error: CommandError | None = None
    different = 0
    try:
        _open(queue, first, writes=False)
        namespace, info = _open(queue, second, writes=True)
        offset, length = _with_data(queue, first, info)
        _with_data(queue, second, info)
        different = await namespace.device.compare_and_write(
            offset,
            _payload(first, length),
            _payload(second, length),
            durable=_durable(queue, second),
            actor=_controller(queue).actor,
        )
    except Exception as caught:  # noqa: BLE001 - two commands end with it, see Queue
        error = queue.error_of(caught)
    if error is None and different >= 0:
        error = CommandError(NvmeStatus.COMPARE_FAILURE)
    queue.fused_done(first, error)
    if error is not None:
        raise CommandError(NvmeStatus.FUSED_FAILED)
    return DONE


# --- reservations


def _reservation(
    carry_out: Callable[[Queue, Namespace, Command], Coroutine[Any, Any, Reply]],
) -> Callable[[Queue, Command], Coroutine[Any, Any, Reply]]:
    """A reservation command of a namespace that is reached through here."""

    def handler(queue: Queue, command: Command) -> Coroutine[Any, Any, Reply]:
        return carry_out(queue, _namespace(queue, command.nsid), command)

    return handler


HANDLERS: Final[dict[int, Handler]] = {
    FLUSH: flush,
    WRITE: write,
    READ: read,
    COMPARE: compare,
    WRITE_ZEROES: write_zeroes,
    DATASET_MANAGEMENT: dataset_management,
    VERIFY: verify,
    RESERVATION_REGISTER: _reservation(reservation_commands.register),
    RESERVATION_REPORT: _reservation(reservation_commands.report),
    RESERVATION_ACQUIRE: _reservation(reservation_commands.acquire),
    RESERVATION_RELEASE: _reservation(reservation_commands.release),
    COPY: copy,
}
"""By opcode; Write Uncorrectable is not among them, so it is refused as an opcode there is not."""

WRITING: Final = frozenset({FLUSH, WRITE, WRITE_ZEROES, DATASET_MANAGEMENT, COPY})
"""What a host that disables a controller, or preempts another host, has to see the end of.

Reservation commands are not among them: two hosts that preempt each other would wait for each other.
"""
MUTATIONS: Final = WRITING | {RESERVATION_REGISTER, RESERVATION_ACQUIRE, RESERVATION_RELEASE}
"""Once begun they are carried out to their end, whoever has gone meanwhile."""
