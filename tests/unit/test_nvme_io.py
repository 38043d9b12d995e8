"""I/O commands over a block device: what reaches the device, and how each wrong command ends."""

from __future__ import annotations

import asyncio
import struct
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space._errors import (
    ConflictError,
    CorruptionError,
    DiskFullError,
    NotLeaderError,
    RefusedError,
    Status,
    StorageError,
    rejection,
)
from space.projections.nvme import io
from space.projections.nvme.connection import Limits
from space.projections.nvme.queue import CONNECTION_BYTES, SILENCE_SECONDS, Pool, Pools
from space.projections.nvme.status import NVME
from space.projections.nvme.status import NvmeStatus as S
from space.projections.nvme.target import NAMESPACES_MAX, AnaState
from tests.nvme_support import (
    DISCOVERY,
    HOST,
    Host,
    MemoryDevice,
    admin_queue,
    capsule,
    h2c_data,
    io_queue,
    namespace,
    pair,
    sgl,
    sqe,
    target_with,
)

FLUSH, WRITE, READ, COMPARE, ZEROES, DSM, VERIFY, COPY = 0x00, 0x01, 0x02, 0x05, 0x08, 0x09, 0x0C, 0x19
REGISTER, REPORT, ACQUIRE, RELEASE = 0x0D, 0x0E, 0x11, 0x15
FUA: Final = 1 << 30
ALL: Final = 0xFFFF_FFFF
ACTOR: Final = f"nvme:{HOST}"
PATTERN: Final = bytes(range(256)) * 16


def blocks(first: int, count: int, bits: int = 0) -> tuple[int, int, int]:
    """Dwords 10 to 12 of a command on a range."""
    return first & ALL, first >> 32, (count - 1) | bits


# --- what reaches the device


def test_what_is_written_is_read() -> None:
    """Data in a capsule and data that was asked for both arrive at their offset, and come back."""
    _, queue, device, _ = pair()
    assert queue.one(WRITE, nsid=1, cdw=blocks(3, 8), data=PATTERN).status == 0
    assert device.calls == [("write", 3 * 512, 4096, False, ACTOR)]
    assert queue.data(READ, nsid=1, cdw=blocks(4, 1), length=512) == PATTERN[512:1024]
    (r2t,) = queue.command(WRITE, nsid=1, cdw=blocks(0, 256), length=131072)
    assert r2t.kind == 9
    (answer,) = queue.send(h2c_data(r2t.cid, r2t.fields[1], 0, PATTERN * 32))
    assert (answer.cid, answer.status) == (r2t.cid, 0)
    assert bytes(device.data[:131072]) == PATTERN * 32


@pytest.mark.parametrize("digests", range(4))
def test_digests_change_nothing(digests: int) -> None:
    """A write and a read under every combination of digests."""
    target, _ = target_with()
    admin = admin_queue(target, digests=digests)
    queue = io_queue(admin, target, digests=digests)
    assert queue.one(WRITE, nsid=1, cdw=blocks(0, 8), data=PATTERN).status == 0
    assert queue.data(READ, nsid=1, cdw=blocks(0, 8), length=4096) == PATTERN


def test_the_success_flag_replaces_a_response_where_flow_control_is_off() -> None:
    """Without flow control a read is one C2HData; with it a response with the queue head follows."""
    _, queue, _, _ = pair(cattr=1 << 2)
    (data,) = queue.command(READ, nsid=1, cdw=blocks(0, 1), length=512)
    assert (data.kind, data.flags) == (7, 12)
    _, queue, _, _ = pair()
    data, answer = queue.command(READ, nsid=1, cdw=blocks(0, 1), length=512)
    assert (data.kind, data.flags, answer.kind, answer.status) == (7, 4, 5, 0)


def test_the_queue_head_moves_with_every_command() -> None:
    """SQHD counts commands taken, modulo the size of the queue, the Connect among them."""
    _, queue, _, _ = pair(sqsize=3)
    assert [queue.one(FLUSH, nsid=1).sqhd for _ in range(6)] == [2, 3, 0, 1, 2, 3]


def test_durability_is_what_the_host_asks_for() -> None:
    """Writes are buffered, with FUA durable, and all durable when the host switches the cache off; Flush flushes."""
    admin, queue, device, subsystem = pair()
    other = MemoryDevice()
    subsystem.add(namespace(2, other))
    queue.one(WRITE, nsid=1, cdw=blocks(0, 1, FUA), data=bytes(512))
    queue.one(ZEROES, nsid=1, cdw=blocks(0, 1, FUA))
    queue.one(COPY, nsid=1, cdw=(8, 0, FUA), data=struct.pack("<8xQH14x", 0, 0))
    queue.data(READ, nsid=1, cdw=blocks(0, 1, FUA), length=512)
    admin.one(0x09, cdw=(6, 0))
    queue.one(WRITE, nsid=1, cdw=blocks(0, 1), data=bytes(512))
    queue.one(DSM, nsid=1, cdw=(0, 4), data=struct.pack("<IIQ", 0, 1, 0))
    queue.one(FLUSH, nsid=1)
    assert device.calls == [
        ("write", 0, 512, True, ACTOR),
        ("write_zeroes", 0, 512, False, True),
        ("copy", [(0, 512)], 4096, True),
        ("flush",),
        ("read", 0, 512),
        ("write", 0, 512, True, ACTOR),
        ("deallocate", [(0, 512)]),
        ("flush",),
        ("flush",),
    ]
    queue.one(FLUSH, nsid=ALL)
    assert other.calls == [("flush",)]


def test_zeroes_and_deallocation_reach_the_device_in_bytes() -> None:
    """Write Zeroes with and without DEAC; the ranges of Dataset Management at once, empty ones left out."""
    _, queue, device, _ = pair()
    assert queue.one(ZEROES, nsid=1, cdw=blocks(2, 5)).status == 0
    assert queue.one(ZEROES, nsid=1, cdw=blocks(2, 5, 1 << 25)).status == 0
    ranges = struct.pack("<IIQIIQIIQ", 0, 4, 8, 0, 0, 99, 0, 2048 - 16, 16)
    assert queue.one(DSM, nsid=1, cdw=(2, 4), data=ranges.ljust(4096, b"\0")).status == 0
    assert queue.one(DSM, nsid=1, cdw=(2, 3), data=ranges).status == 0  # hints only
    assert device.calls == [
        ("write_zeroes", 1024, 2560, False, False),
        ("write_zeroes", 1024, 2560, True, False),
        ("deallocate", [(4096, 2048), (8192, 1040384)]),
    ]


def test_copy_puts_ranges_one_after_the_other() -> None:
    """Several source ranges go to one target, in order."""
    _, queue, device, _ = pair()
    device.data[:1024] = b"a" * 512 + b"b" * 512
    ranges = struct.pack("<8xQH14x", 1, 0) + struct.pack("<8xQH14x", 0, 1)
    assert queue.one(COPY, nsid=1, cdw=(100, 0, 1), data=ranges).status == 0
    assert device.data[51200 : 51200 + 1536] == b"b" * 512 + b"a" * 512 + b"b" * 512


def test_compare_and_verify_read() -> None:
    """Compare tells equal from different; Verify reads any length in pieces, and sends nothing."""
    _, queue, device, _ = pair()
    device.data[:4096] = PATTERN
    assert queue.one(COMPARE, nsid=1, cdw=blocks(0, 8), data=PATTERN).status == 0
    wrong = PATTERN[:-1] + b"x"
    answer = queue.one(COMPARE, nsid=1, cdw=blocks(0, 8), data=wrong)
    assert (answer.status, answer.retry) == (S.COMPARE_FAILURE, False)
    device.calls.clear()
    limits = Limits(transfer_bytes=1 << 18)
    target, _ = target_with(namespace(1, device))
    queue = io_queue(admin_queue(target), target, limits=limits)
    assert queue.one(VERIFY, nsid=1, cdw=blocks(4, 1100)).status == 0
    assert device.calls == [
        ("read", 2048, 1 << 18),
        ("read", 2048 + (1 << 18), 1 << 18),
        ("read", 526336, 38912),
    ]


def test_blocks_of_4096_bytes() -> None:
    """Addresses and lengths count blocks of the namespace."""
    device = MemoryDevice(16, 4096)
    target, _ = target_with(namespace(1, device))
    queue = io_queue(admin_queue(target), target)
    assert queue.one(WRITE, nsid=1, cdw=blocks(15, 1), data=PATTERN).status == 0
    assert device.calls[0][1:3] == (15 * 4096, 4096)
    assert queue.status(WRITE, nsid=1, cdw=blocks(16, 1), data=PATTERN) == S.LBA_OUT_OF_RANGE


# --- commands that are wrong


RANGED: Final = (WRITE, READ, COMPARE, ZEROES, VERIFY)


@pytest.mark.parametrize("opcode", RANGED)
@pytest.mark.parametrize("first, count", [(2048, 1), (2047, 2), (1 << 40, 1), ((1 << 64) - 1, 1), (1, 2048)])
def test_blocks_out_of_range(opcode: int, first: int, count: int) -> None:
    """Nothing beyond the end reaches the device, whatever the numbers."""
    _, queue, device, _ = pair()
    length = count * 512 if opcode in {WRITE, READ, COMPARE} else 0
    options: dict[str, Any] = {"length": length}
    if opcode in {WRITE, COMPARE}:
        options = {"data": bytes(length)} if length <= 65536 else {"length": length}
    answers = queue.command(opcode, nsid=1, cdw=blocks(first, count), **options)
    if answers[0].kind == 9:
        answers = queue.send(h2c_data(answers[0].cid, answers[0].fields[1], 0, bytes(length)))
    assert [(each.status, each.retry) for each in answers] == [(S.LBA_OUT_OF_RANGE, False)]
    assert device.calls == []


@pytest.mark.parametrize("opcode", sorted(io.HANDLERS))
@pytest.mark.parametrize(
    "nsid, status",
    [(0, S.INVALID_NAMESPACE), (2, S.INVALID_FIELD), (NAMESPACES_MAX + 1, S.INVALID_NAMESPACE), (ALL, None)],
)
def test_namespaces_that_are_not_there(opcode: int, nsid: int, status: int | None) -> None:
    """A number nobody has is an invalid field, an invalid one an invalid namespace; only Flush takes all."""
    _, queue, device, _ = pair()
    expected = status if status is not None else (0 if opcode == FLUSH else S.INVALID_NAMESPACE)
    assert queue.status(opcode, nsid=nsid) == expected
    assert [call for call in device.calls if call != ("flush",)] == []


@pytest.mark.parametrize("opcode", sorted(set(range(256)) - {0x7F}))
def test_every_opcode_ends_with_a_status(opcode: int) -> None:
    """An unknown opcode is refused without asking for data; a known one without its data is not a success."""
    _, queue, device, _ = pair()
    (answer,) = queue.command(opcode, nsid=1, cdw=(0, 0, 0, 0, 0, 0))
    if opcode not in io.HANDLERS:
        assert (answer.status, answer.retry) == (S.INVALID_OPCODE, False)
        assert queue.status(opcode, nsid=1, length=0xFFFF_FFFF) == S.INVALID_OPCODE
    elif opcode in {FLUSH, ZEROES, VERIFY}:
        assert answer.status == 0
    else:
        assert answer.status in {S.SGL_LENGTH_INVALID, S.HOST_ID_INCONSISTENT}
        assert device.calls == []


@pytest.mark.parametrize(
    "length, status",
    [
        (511, S.SGL_LENGTH_INVALID),
        (513, S.SGL_LENGTH_INVALID),
        ((1 << 20) + 1, S.INVALID_FIELD),
        (ALL, S.INVALID_FIELD),
    ],
)
@pytest.mark.parametrize("opcode", [READ, WRITE])
def test_lengths_that_do_not_fit(opcode: int, length: int, status: int) -> None:
    """The descriptor has exactly the length of the blocks; more than MDTS is not even asked for."""
    _, queue, device, _ = pair()
    answers = queue.command(opcode, nsid=1, cdw=blocks(0, 1), length=length)
    if answers[0].kind == 9:
        answers = queue.send(h2c_data(answers[0].cid, answers[0].fields[1], 0, bytes(length)))
    assert [each.status for each in answers] == [status]
    assert device.calls == []


def test_transfers_larger_than_mdts() -> None:
    """A range of more than MDTS is an invalid field for commands with data, and none for those without."""
    device = MemoryDevice(1 << 13)
    target, _ = target_with(namespace(1, device))
    queue = io_queue(admin_queue(target), target, limits=Limits(transfer_bytes=1 << 16))
    assert queue.status(READ, nsid=1, cdw=blocks(0, 129), length=65536) == S.INVALID_FIELD
    assert queue.status(ZEROES, nsid=1, cdw=blocks(0, 4096)) == 0


@pytest.mark.parametrize("kind", [kind for kind in range(256) if kind not in {0x01, 0x5A}])
def test_descriptors_of_other_types(kind: int) -> None:
    """Keyed descriptors, segments, bit buckets and every other type are invalid types; none is a success."""
    _, queue, device, _ = pair()
    for opcode in (READ, WRITE):
        dptr = struct.pack("<QI3xB", 0, 512, kind)
        (answer,) = queue.send(capsule(sqe(opcode, queue.next_cid(), nsid=1, dptr=dptr, cdw=blocks(0, 1))))
        assert answer.status == S.SGL_TYPE_INVALID
    assert device.calls == []


@pytest.mark.parametrize(
    "offset, length, status",
    [
        (0, 1024, S.SGL_LENGTH_INVALID),
        (513, 512, S.SGL_OFFSET_INVALID),
        (1 << 63, 512, S.SGL_OFFSET_INVALID),
        (256, 512, S.SGL_LENGTH_INVALID),
    ],
)  # fmt: skip
def test_descriptors_beyond_the_capsule(offset: int, length: int, status: int) -> None:
    """An offset or length that leaves the data of the capsule is refused."""
    _, queue, device, _ = pair()
    entry = sqe(
        WRITE, 1, nsid=1, dptr=sgl(length, in_capsule=True, offset=offset), cdw=blocks(0, length // 512)
    )
    (answer,) = queue.send(capsule(entry, bytes(512)))
    assert answer.status == status
    assert device.calls == []


def test_an_offset_in_the_capsule() -> None:
    """The descriptor may name a part of the data."""
    _, queue, device, _ = pair()
    entry = sqe(WRITE, 1, nsid=1, dptr=sgl(512, in_capsule=True, offset=512), cdw=blocks(0, 1))
    (answer,) = queue.send(capsule(entry, PATTERN[:1536]))
    assert answer.status == 0
    assert device.data[:512] == PATTERN[512:1024]


@pytest.mark.parametrize(
    "flags, status", [(0x00, S.INVALID_FIELD), (0xC0, S.INVALID_FIELD), (0x40, 0), (0x80, 0)]
)
def test_prps_are_refused(flags: int, status: int) -> None:
    """Data pointers other than SGLs do not exist over fabrics."""
    _, queue, _, _ = pair()
    assert queue.status(READ, nsid=1, cdw=blocks(0, 1), length=512, flags=flags) == status


def test_a_command_id_in_use_is_a_conflict() -> None:
    """While a command is outstanding, a second one with its number is refused, and the first goes on."""
    _, queue, device, _ = pair()
    (r2t,) = queue.command(WRITE, nsid=1, cid=5, cdw=blocks(0, 1), length=512)
    assert queue.one(FLUSH, nsid=1, cid=5).status == S.COMMAND_ID_CONFLICT
    assert queue.send(h2c_data(5, r2t.fields[1], 0, b"z" * 512))[0].status == 0
    assert device.data[:512] == b"z" * 512
    assert queue.one(FLUSH, nsid=1, cid=5).status == 0


def test_damaged_data_is_not_written() -> None:
    """A wrong data digest ends the command with a transient error, worth a retry; the queue goes on."""
    target, _ = target_with(namespace(1, device := MemoryDevice()))
    queue = io_queue(admin_queue(target), target, digests=2)
    entry = sqe(WRITE, 900, nsid=1, dptr=sgl(512, in_capsule=True), cdw=blocks(0, 1))
    broken = bytearray(capsule(entry, bytes(512), digests=2))
    broken[-1] ^= 1
    (answer,) = queue.send(bytes(broken))
    assert (answer.status, answer.retry) == (S.TRANSIENT_TRANSPORT_ERROR, True)
    (r2t,) = queue.command(WRITE, nsid=1, cdw=blocks(0, 1), length=512)
    broken = bytearray(h2c_data(r2t.cid, r2t.fields[1], 0, bytes(512), digests=2))
    broken[-1] ^= 1
    (answer,) = queue.send(bytes(broken))
    assert (answer.status, answer.retry) == (S.TRANSIENT_TRANSPORT_ERROR, True)
    assert device.calls == []


@pytest.mark.parametrize("opcode", [WRITE, ZEROES, DSM, COPY])
def test_protected_namespaces_are_not_written(opcode: int) -> None:
    """Neither a namespace offered read-only nor a read-only device is changed; both are read."""
    data = {
        WRITE: bytes(512),
        ZEROES: None,
        DSM: struct.pack("<IIQ", 0, 1, 0),
        COPY: struct.pack("<8xQH14x", 0, 0),
    }[opcode]
    devices = MemoryDevice(), MemoryDevice(read_only=True)
    target, _ = target_with(namespace(1, devices[0], read_only=True), namespace(2, devices[1]))
    queue = io_queue(admin_queue(target), target)
    for nsid, device in enumerate(devices, 1):
        answer = queue.one(opcode, nsid=nsid, cdw=(0, 4, 0), data=data)
        assert (answer.status, answer.retry) == (S.WRITE_PROTECTED, False)
        assert device.calls == []
        assert queue.data(READ, nsid=nsid, cdw=blocks(0, 1), length=512) == bytes(512)


@pytest.mark.parametrize(
    "ranges, cdw12, status, result",
    [
        ([(2048, 0)], 0, S.LBA_OUT_OF_RANGE, 0),
        ([(0, 0), (0, 2048)], 1, S.LBA_OUT_OF_RANGE, 1),
        ([(0, 0)] * 3 + [(0, 0xFFFF)], 3, S.SIZE_LIMIT_EXCEEDED, 3),
        ([(0, 0)] * 129, 128, S.SIZE_LIMIT_EXCEEDED, 0),
        ([(0, 0)], 1 << 8, S.INVALID_FIELD, 0),
        ([(0, 0)], 1 << 20, S.INVALID_FIELD, 0),
        ([(0, 0)], 1, S.SGL_LENGTH_INVALID, 0),
        ([(0, 1000)] * 2, 1, S.LBA_OUT_OF_RANGE, 0),
    ],
)
def test_copies_that_cannot_be(ranges: list[tuple[int, int]], cdw12: int, status: int, result: int) -> None:
    """Formats, counts, lengths and ranges are checked; the result names the first range that is wrong."""
    _, queue, device, _ = pair()
    data = b"".join(struct.pack("<8xQH14x", first, count) for first, count in ranges)
    answer = queue.one(COPY, nsid=1, cdw=(100, 0, cdw12), data=data)
    assert (answer.status, answer.result) == (status, result)
    assert device.calls == []


def test_deallocation_is_all_or_nothing() -> None:
    """One range beyond the end, and none is deallocated; too little data is refused."""
    _, queue, device, _ = pair()
    ranges = struct.pack("<IIQIIQ", 0, 4, 8, 0, 4, 2045)
    assert queue.status(DSM, nsid=1, cdw=(1, 4), data=ranges) == S.LBA_OUT_OF_RANGE
    assert queue.status(DSM, nsid=1, cdw=(2, 4), data=ranges) == S.SGL_LENGTH_INVALID
    assert device.calls == []


@pytest.mark.parametrize(
    "state, status, retry",
    [
        (AnaState.INACCESSIBLE, S.ANA_INACCESSIBLE, True),
        (AnaState.PERSISTENT_LOSS, S.ANA_PERSISTENT_LOSS, False),
        (AnaState.CHANGE, S.ANA_TRANSITION, True),
        (AnaState.NON_OPTIMIZED, 0, True),
    ],
)
def test_commands_follow_the_ana_state(state: AnaState, status: int, retry: bool) -> None:
    """A namespace not reached this way has a path error, so that the host takes another path; others are served."""
    _, queue, device, subsystem = pair()
    subsystem.add(namespace(2, ana_group=2))
    subsystem.set_ana(1, state)
    answer = queue.one(WRITE, nsid=1, cdw=blocks(0, 1), data=bytes(512))
    assert (answer.status, answer.retry) == (status, retry)
    assert bool(device.calls) == (status == 0)
    assert queue.one(WRITE, nsid=2, cdw=blocks(0, 1), data=bytes(512)).status == 0


def test_a_resized_namespace() -> None:
    """Blocks that came are there at once, and blocks that went are out of range."""
    _, queue, device, _ = pair()
    device.data.extend(bytes(512))
    assert queue.one(WRITE, nsid=1, cdw=blocks(2048, 1), data=bytes(512)).status == 0
    del device.data[1024:]
    assert queue.status(READ, nsid=1, cdw=blocks(2, 1), length=512) == S.LBA_OUT_OF_RANGE


# --- errors of the device


ERRORS: Final[list[tuple[BaseException, int, bool]]] = [
    (DiskFullError("full"), S.CAPACITY_EXCEEDED, False),
    (CorruptionError("bad", segment="s"), S.UNRECOVERED_READ, False),
    (StorageError("EIO"), S.INTERNAL_ERROR, False),
    (NotLeaderError("elections"), S.INTERNAL_PATH_ERROR, True),
    (RefusedError("past"), S.WRITE_PROTECTED, False),
    (ConflictError("changed"), S.COMMAND_INTERRUPTED, True),
    (KeyError("nobody foresaw"), S.INTERNAL_ERROR, False),
]


@pytest.mark.parametrize("error, status, retry", ERRORS)
def test_errors_become_statuses(error: BaseException, status: int, retry: bool) -> None:
    """What the device raises is the status of that command, and says whether a retry may help."""
    _, queue, device, _ = pair()
    device.error = error
    answer = queue.one(WRITE, nsid=1, cdw=blocks(0, 1), data=bytes(512))
    assert (answer.status, answer.retry) == (status, retry)
    assert queue.one(WRITE, nsid=1, cdw=blocks(0, 1), data=bytes(512)).status == 0


def test_every_status_has_a_value() -> None:
    """The table from neutral statuses is complete, and none of them is a success."""
    assert set(NVME) == set(Status)
    assert S.SUCCESS not in NVME.values()
    for status in Status:
        _, queue, device, _ = pair()
        device.error = rejection(status, "x")
        assert queue.one(WRITE, nsid=1, data=bytes(512)).status == NVME[status]


# --- fused Compare and Write


def fused(queue: Host, compare: dict[str, Any], write: dict[str, Any]) -> list[tuple[int, int]]:
    """Both halves; number and status of each completion, in the order they came."""
    base: dict[str, Any] = {"nsid": 1, "cdw": blocks(0, 1)}
    compare = base | {"data": bytes(512), "flags": 0x41, "cid": 801} | compare
    write = base | {"data": b"n" * 512, "flags": 0x42, "cid": 802} | write
    answers = queue.command(COMPARE, **compare) + queue.command(WRITE, **write)
    return [(each.cid, each.status) for each in answers]


def test_a_fused_write_happens_if_the_blocks_hold_what_was_compared() -> None:
    """Both succeed; then the old contents differ, both fail, and nothing is written."""
    _, queue, device, _ = pair()
    assert fused(queue, {}, {}) == [(801, 0), (802, 0)]
    assert device.data[:512] == b"n" * 512
    assert fused(queue, {}, {"data": b"o" * 512}) == [(801, S.COMPARE_FAILURE), (802, S.FUSED_FAILED)]
    assert device.data[:512] == b"n" * 512
    assert fused(queue, {"data": b"n" * 512}, {"cdw": blocks(0, 1, FUA)}) == [(801, 0), (802, 0)]
    assert device.calls[-1] == ("compare_and_write", 0, 512, True)


@pytest.mark.parametrize(
    "write, status",
    [
        ({"cdw": blocks(1, 1)}, S.INVALID_FIELD),
        ({"cdw": blocks(0, 2), "data": bytes(1024)}, S.INVALID_FIELD),
        ({"nsid": 2}, S.INVALID_FIELD),
        ({"flags": 0x02}, S.INVALID_FIELD),
    ],
)
def test_halves_that_do_not_belong_together(write: dict[str, Any], status: int) -> None:
    """Another range, namespace or a second half that is wrong fails both."""
    _, queue, device, _ = pair()
    assert fused(queue, {}, write) == [(801, S.FUSED_FAILED), (802, status)]
    assert device.calls == []


def test_half_a_fused_operation() -> None:
    """A first half followed by anything else, a second half alone, and reserved bits are refused."""
    _, queue, device, _ = pair()
    assert queue.command(COMPARE, nsid=1, cid=801, cdw=blocks(0, 1), data=bytes(512), flags=0x41) == []
    missing, flushed = queue.command(FLUSH, nsid=1, cid=802)
    assert (missing.cid, missing.status) == (801, S.FUSED_MISSING)
    assert (flushed.cid, flushed.status) == (802, 0)
    write: dict[str, Any] = {"nsid": 1, "cdw": blocks(0, 1), "data": bytes(512)}
    assert queue.one(WRITE, flags=0x42, **write).status == S.FUSED_MISSING
    assert queue.one(WRITE, flags=0x43, **write).status == S.INVALID_FIELD
    assert queue.one(WRITE, flags=0x41, **write).status == S.INVALID_FIELD
    assert device.calls == [("flush",)]


def test_fused_halves_whose_data_travels_apart() -> None:
    """The operation begins when the data of both is there, in whatever order it comes."""
    _, queue, device, _ = pair()
    assert queue.command(COMPARE, nsid=1, cid=801, cdw=blocks(0, 1), length=512, flags=0x41) == []
    r2ts = queue.command(WRITE, nsid=1, cid=802, cdw=blocks(0, 1), length=512, flags=0x42)
    tags = {r2t.fields[0]: r2t.fields[1] for r2t in r2ts}
    assert queue.send(h2c_data(802, tags[802], 0, b"w" * 512)) == []
    answers = queue.send(h2c_data(801, tags[801], 0, bytes(512)))
    assert [(each.cid, each.status) for each in answers] == [(801, 0), (802, 0)]
    assert device.data[:512] == b"w" * 512


def test_errors_of_a_fused_operation() -> None:
    """The first half has the reason, the second that it failed with it."""
    _, queue, device, _ = pair()
    device.error = StorageError("EIO")
    assert fused(queue, {}, {}) == [(801, S.INTERNAL_ERROR), (802, S.FUSED_FAILED)]
    far = {"cdw": blocks(5000, 1)}
    assert fused(queue, far, far) == [(801, S.LBA_OUT_OF_RANGE), (802, S.FUSED_FAILED)]


def test_fused_commands_are_for_io_queues() -> None:
    """On the admin queue the bits are an invalid field."""
    admin, _, _, _ = pair()
    assert admin.one(0x18, flags=0x41).status == S.INVALID_FIELD


# --- commands that wait


def waiting(**options: Any) -> tuple[Host, Host, MemoryDevice, asyncio.Event]:
    """Queues over a device that does nothing until the event is set."""
    admin, queue, device, _ = pair(**options)
    device.gate = asyncio.Event()
    return admin, queue, device, device.gate


async def settle() -> None:
    """Lets everything that can run do so."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_commands_finish_in_any_order() -> None:
    """A read that waits does not hold up an Identify, nor another queue; each is answered once."""

    async def scenario() -> None:
        admin, queue, _, gate = waiting()
        assert queue.command(READ, nsid=1, cid=1, cdw=blocks(0, 1), length=512) == []
        assert queue.command(WRITE, nsid=1, cid=2, cdw=blocks(0, 1), data=b"q" * 512) == []
        assert queue.one(READ, nsid=9, cid=3, length=512).status == S.INVALID_FIELD
        assert admin.status(0x06, cdw=(1,), length=4096) == 0
        gate.set()
        await settle()
        assert sorted(each.cid for each in queue.answers() if each.kind == 5) == [1, 2]
        assert queue.woken

    asyncio.run(scenario())


def test_abort_ends_reads_and_leaves_writes() -> None:
    """A read that waits is aborted; a write may still take effect, so it is not, and it completes."""

    async def scenario() -> None:
        admin, queue, device, gate = waiting()
        queue.command(READ, nsid=1, cid=1, cdw=blocks(0, 1), length=512)
        queue.command(WRITE, nsid=1, cid=2, cdw=blocks(0, 1), data=b"q" * 512)
        assert admin.one(0x08, cdw=(1 | 1 << 16,)).result == 0
        assert admin.one(0x08, cdw=(1 | 2 << 16,)).result == 1
        await settle()
        assert [(each.cid, each.status) for each in queue.answers()] == [(1, S.ABORT_REQUESTED)]
        gate.set()
        await settle()
        assert [(each.cid, each.status) for each in queue.answers()] == [(2, 0)]
        assert device.data[:512] == b"q" * 512

    asyncio.run(scenario())


def test_a_host_that_goes_loses_its_reads_but_no_write() -> None:
    """When the connection ends, what changes a namespace is carried out, and nothing is answered."""

    async def scenario() -> None:
        admin, queue, device, gate = waiting()
        queue.command(READ, nsid=1, cid=1, cdw=blocks(0, 1), length=512)
        queue.command(WRITE, nsid=1, cid=2, cdw=blocks(0, 1), data=b"q" * 512)
        queue.command(WRITE, nsid=1, cid=3, cdw=blocks(0, 1), length=512)
        queue.queue.lost()
        controller = admin.queue.controller
        assert controller is not None
        assert controller.mutations == 1
        gate.set()
        await settle()
        assert controller.mutations == 0
        assert [call[0] for call in device.calls] == ["write"]
        assert all(each.kind == 9 for each in queue.answers())
        assert list(controller.queues) == [0]

    asyncio.run(scenario())


def test_a_controller_is_not_disabled_under_a_write() -> None:
    """CSTS.RDY stays set until the last write is done, so that nothing changes after the host has seen it clear."""

    async def scenario() -> None:
        admin, queue, _, gate = waiting()
        queue.command(WRITE, nsid=1, cid=2, cdw=blocks(0, 1), data=b"q" * 512)
        admin.set_property(0x14, 0)
        assert admin.get_property(0x1C).result == 1
        gate.set()
        await settle()
        assert admin.get_property(0x1C).result == 0

    asyncio.run(scenario())


# --- bounds


def test_data_is_fetched_only_as_memory_allows() -> None:
    """A connection is asked for so much at a time; each write that is done lets the next one's data come."""
    _, queue, device, _ = pair()
    device.data.extend(bytes(1 << 20))
    answers = []
    for cid in range(1, 21):
        answers += queue.command(WRITE, nsid=1, cid=cid, cdw=blocks(0, 2048), length=1 << 20)
    tags = [r2t.fields[:2] for r2t in answers]
    assert len(tags) == CONNECTION_BYTES >> 20
    done = 0
    while tags:
        cid, tag = tags.pop(0)
        for answer in queue.send(h2c_data(cid, tag, 0, bytes([cid]) * (1 << 20))):
            if answer.kind == 9:
                tags.append(answer.fields[:2])
            else:
                done += answer.status == 0
    assert done == 20


def test_a_full_server_lets_each_connection_have_one_command() -> None:
    """When the sum of all is used up, each connection still gets one transfer; more follow when there is room."""
    pools = Pools(fetched=Pool(1 << 16))
    target, _ = target_with()
    admin = admin_queue(target)
    first, second = (io_queue(admin, target, qid=qid, pools=pools) for qid in (1, 2))
    (held,) = first.command(WRITE, nsid=1, cid=1, cdw=blocks(0, 256), length=131072)
    (other,) = second.command(WRITE, nsid=1, cid=1, cdw=blocks(0, 8), length=4096)
    assert second.command(WRITE, nsid=1, cid=2, cdw=blocks(0, 8), length=4096) == []
    answers = second.send(h2c_data(1, other.fields[1], 0, PATTERN))
    assert [each.kind for each in answers] == [9, 5]
    assert second.command(WRITE, nsid=1, cid=3, cdw=blocks(0, 8), length=4096) == []
    assert first.send(h2c_data(1, held.fields[1], 0, PATTERN * 32))[0].status == 0
    assert [each.kind for each in second.answers()] == [9]
    assert pools.fetched.used == 8192


def test_a_slow_device_stops_the_reading() -> None:
    """While commands with much data wait for the device the queue is blocked; it goes on when they are done."""

    async def scenario() -> None:
        _, queue, device, gate = waiting(sqsize=1023)
        device.data.extend(bytes(1 << 20))
        stream = b"".join(
            capsule(sqe(READ, cid, nsid=1, dptr=sgl(1 << 20), cdw=blocks(0, 2048))) for cid in range(1, 31)
        )
        queue.send(stream)
        assert queue.queue.blocked
        gate.set()
        seen = 0
        for _ in range(30):
            await settle()
            queue.pump()
            seen += sum(each.kind == 7 for each in queue.answers())
        assert seen == 30
        assert not queue.queue.blocked

    asyncio.run(scenario())


def test_more_commands_than_a_queue_may_have_end_the_connection() -> None:
    """A host that ignores MAXCMD is disconnected; memory stays bounded."""
    _, queue, _, _ = pair(sqsize=1023)
    for cid in range(1, 1025):
        queue.command(WRITE, nsid=1, cid=cid, cdw=blocks(0, 256), length=131072)
    assert queue.open
    queue.command(FLUSH, nsid=1, cid=1025)
    assert queue.closed


@pytest.mark.parametrize("what", ["nothing", "half a PDU", "data", "all"])
def test_a_host_that_stops_in_the_middle_is_not_waited_for(what: str) -> None:
    """No Connect, half a PDU, or data that was asked for and does not come: the connection ends after a time."""
    target, _ = target_with()
    if what == "nothing":
        host = Host(target)
    else:
        host = io_queue(admin_queue(target), target)
        if what == "half a PDU":
            host.send(capsule(sqe(FLUSH, 1, nsid=1))[:40])
        elif what == "data":
            host.command(WRITE, nsid=1, cdw=blocks(0, 1), length=512)
    host.queue.tick(SILENCE_SECONDS - 1)
    assert host.open
    host.queue.tick(SILENCE_SECONDS + 30)
    assert (host.open) == (what == "all")


# --- reservations


def hosts(count: int = 3) -> tuple[list[Host], MemoryDevice]:
    """I/O queues of different hosts over one namespace."""
    device = MemoryDevice()
    target, _ = target_with(namespace(1, device))
    queues = []
    for number in range(1, count + 1):
        admin = admin_queue(
            target, host=f"nqn.2024-01.org.example:host{number}", host_id=bytes(15) + bytes([number])
        )
        queues.append(io_queue(admin, target))
        queues[-1].admin = admin  # type: ignore[attr-defined]
    return queues, device


def register(host: Host, new: int, *, old: int = 0, action: int = 0, ignore: bool = False) -> int:
    """Registers, unregisters or replaces a key."""
    return host.one(REGISTER, nsid=1, cdw=(action | ignore << 3,), data=struct.pack("<QQ", old, new)).status


def acquire(host: Host, kind: int, key: int, *, action: int = 0, preempt: int = 0) -> int:
    """Acquires or preempts."""
    return host.one(ACQUIRE, nsid=1, cdw=(action | kind << 8,), data=struct.pack("<QQ", key, preempt)).status


def release(host: Host, kind: int, key: int, *, action: int = 0) -> int:
    """Releases or clears."""
    return host.one(RELEASE, nsid=1, cdw=(action | kind << 8,), data=struct.pack("<Q", key)).status


def report(host: Host) -> tuple[int, int, list[tuple[int, int, int]]]:
    """Generation, kind, and holder flag, key and host number of each registrant."""
    data = host.data(REPORT, nsid=1, cdw=(1023, 1), length=4096)
    generation, kind, count = struct.unpack_from("<IBH", data)
    rows = []
    for place in range(64, 64 + 64 * count, 64):
        _, holds, key, host_id = struct.unpack_from("<HB5xQ16s", data, place)
        rows.append((holds, key, host_id[-1]))
    return generation, kind, rows


READS, WRITES, NEITHER = {READ, WRITE}, {WRITE}, set[int]()


@pytest.mark.parametrize(
    "kind, registrant_is_kept_from, stranger_is_kept_from",
    [
        (1, WRITES, WRITES),
        (2, READS, READS),
        (3, NEITHER, WRITES),
        (4, NEITHER, READS),
        (5, NEITHER, WRITES),
        (6, NEITHER, READS),
    ],
)
def test_who_may_do_what_under_a_reservation(
    kind: int, registrant_is_kept_from: set[int], stranger_is_kept_from: set[int]
) -> None:
    """The table of the specification: holder, registrant and stranger, reading and writing, for every kind."""
    (holder, registrant, stranger), _ = hosts()
    assert register(holder, 11) == register(registrant, 22) == 0
    assert acquire(holder, kind, 11) == 0
    for host, kept_from in (
        (holder, NEITHER),
        (registrant, registrant_is_kept_from),
        (stranger, stranger_is_kept_from),
    ):
        reads = {opcode: host.status(opcode, nsid=1, cdw=blocks(0, 1), **extra) for opcode, extra in (
            (READ, {"length": 512}), (COMPARE, {"data": bytes(512)}), (VERIFY, {}))}  # fmt: skip
        writes = {opcode: host.status(opcode, nsid=1, cdw=(0, 4, 0), **extra) for opcode, extra in (
            (WRITE, {"data": bytes(512), "flags": 0x40}), (ZEROES, {}), (FLUSH, {}),
            (DSM, {"data": bytes(16)}), (COPY, {"data": bytes(32)}))}  # fmt: skip
        writes[WRITE] = host.status(WRITE, nsid=1, cdw=blocks(0, 1), data=bytes(512))
        assert set(reads.values()) == {S.RESERVATION_CONFLICT if READ in kept_from else 0}
        for opcode in (WRITE, FLUSH):
            assert writes[opcode] == (S.RESERVATION_CONFLICT if WRITE in kept_from else 0)
        for opcode in (ZEROES, DSM, COPY):
            assert (writes[opcode] == S.RESERVATION_CONFLICT) == (WRITE in kept_from)


def test_keys_are_registered_replaced_and_given_back() -> None:
    """A key is the host's to change; another key is a conflict unless the existing one is to be ignored."""
    (one, two, _), _ = hosts()
    assert register(one, 5) == 0
    assert register(one, 5) == 0
    assert register(one, 6) == S.RESERVATION_CONFLICT
    assert register(one, 7, old=6, action=2) == S.RESERVATION_CONFLICT
    assert register(one, 7, old=5, action=2) == 0
    assert register(one, 8, action=2, ignore=True) == 0
    assert register(two, 9, action=2, ignore=True) == 0
    assert register(two, 0, old=1, action=1) == S.RESERVATION_CONFLICT
    assert register(two, 0, old=9, action=1) == 0
    assert register(two, 0, old=9, action=1) == S.RESERVATION_CONFLICT
    assert register(one, 1, action=5) == S.INVALID_FIELD
    assert report(one) == (6, 0, [(0, 8, 1)])


def test_a_reservation_is_taken_and_released_by_its_holder() -> None:
    """Others conflict; the holder may ask again for the same kind, and must name it to release it."""
    (one, two, three), _ = hosts()
    register(one, 1)
    register(two, 2)
    assert acquire(three, 1, 0) == S.RESERVATION_CONFLICT
    assert acquire(one, 7, 1) == S.INVALID_FIELD
    assert acquire(one, 1, 1) == acquire(one, 1, 1) == 0
    assert acquire(one, 2, 1) == acquire(two, 1, 2) == S.RESERVATION_CONFLICT
    assert release(two, 1, 2) == 0  # not the holder: nothing happens
    assert report(one)[1:] == (1, [(1, 1, 1), (0, 2, 2)])
    assert release(one, 2, 1) == S.INVALID_FIELD
    assert release(one, 1, 9) == S.RESERVATION_CONFLICT
    assert release(one, 1, 1) == 0
    assert acquire(two, 3, 2) == 0
    assert register(two, 0, old=2, action=1) == 0
    assert report(one)[1:] == (0, [(0, 1, 1)])


def test_preempting_takes_the_reservation_and_the_registrations() -> None:
    """The holder's key moves the reservation; another key only unregisters; an unknown one is a conflict."""
    (one, two, three), _ = hosts()
    for host, key in ((one, 1), (two, 2), (three, 3)):
        register(host, key)
    acquire(one, 1, 1)
    assert acquire(two, 1, 2, action=1, preempt=9) == S.RESERVATION_CONFLICT
    assert acquire(two, 1, 2, action=1) == S.INVALID_FIELD
    assert acquire(two, 1, 2, action=1, preempt=3) == 0
    assert report(two)[1:] == (1, [(1, 1, 1), (0, 2, 2)])
    assert acquire(two, 4, 2, action=2, preempt=1) == 0
    assert report(two)[1:] == (4, [(1, 2, 2)])
    assert acquire(two, 5, 2, action=1, preempt=2) == 0
    register(one, 1)
    assert acquire(one, 2, 1, action=1) == 0  # of "all registrants", by key 0: everybody else goes
    assert report(one)[1:] == (2, [(1, 1, 1)])
    assert release(one, 0, 1, action=1) == 0
    assert report(one)[1:] == (0, [])


def test_registrants_are_told() -> None:
    """Preempted and released registrants get an event and a notice in the log, unless they mask it."""
    (one, two, three), _ = hosts()
    for host, key in ((one, 1), (two, 2), (three, 3)):
        register(host, key)
        assert host.admin.command(0x0C, cid=500) == []  # type: ignore[attr-defined]
    acquire(one, 3, 1)
    assert three.admin.one(0x09, nsid=1, cdw=(0x82, 1 << 2)).status == 0  # type: ignore[attr-defined]
    assert release(one, 3, 1) == 0
    assert [each.result for each in two.admin.answers()] == [0x80_00_06]  # type: ignore[attr-defined]
    assert three.admin.answers() == one.admin.answers() == []  # type: ignore[attr-defined]
    assert acquire(one, 1, 1, action=1, preempt=2) == 0
    log = two.admin.data(0x02, cdw=(0x80 | 15 << 16,), length=64)  # type: ignore[attr-defined]
    assert struct.unpack_from("<QBB2xI", log) == (1, 2, 1, 1)
    log = two.admin.data(0x02, cdw=(0x80 | 15 << 16,), length=64)  # type: ignore[attr-defined]
    assert struct.unpack_from("<QBB2xI", log) == (2, 1, 0, 1)
    log = two.admin.data(0x02, cdw=(0x80 | 15 << 16,), length=64)  # type: ignore[attr-defined]
    assert log == bytes(64)


def test_preempt_and_abort_waits_for_the_preempted() -> None:
    """It completes when no write of the preempted host is under way; plain preempting does not wait."""

    async def scenario() -> None:
        (one, two, _), device = hosts()
        register(one, 1)
        register(two, 2)
        assert acquire(one, 5, 1) == 0
        gate = device.gate = asyncio.Event()
        two.command(WRITE, nsid=1, cid=900, cdw=blocks(0, 1), data=b"w" * 512)
        keys = struct.pack("<QQ", 1, 2)
        assert one.command(ACQUIRE, nsid=1, cid=901, cdw=(2 | 5 << 8,), data=keys) == []
        assert two.status(WRITE, nsid=1, cdw=blocks(0, 1), data=bytes(512)) == S.RESERVATION_CONFLICT
        await settle()
        assert one.answers() == []
        gate.set()
        await settle()
        assert [(each.cid, each.status) for each in one.answers()] == [(901, 0)]
        assert device.data[:512] == b"w" * 512

    asyncio.run(scenario())


def test_two_hosts_that_preempt_each_other_both_finish() -> None:
    """Neither waits for the other's Acquire, only for writes."""

    async def scenario() -> None:
        (one, two, _), device = hosts()
        register(one, 1)
        register(two, 2)
        gate = device.gate = asyncio.Event()
        for host in (one, two):
            assert host.command(WRITE, nsid=1, cid=900, cdw=blocks(0, 1), data=b"w" * 512) == []
        one.command(ACQUIRE, nsid=1, cid=901, cdw=(2 | 1 << 8,), data=struct.pack("<QQ", 1, 2))
        assert register(two, 2) == 0
        two.command(ACQUIRE, nsid=1, cid=901, cdw=(2 | 1 << 8,), data=struct.pack("<QQ", 2, 1))
        gate.set()
        await settle()
        for host in (one, two):
            assert {(each.cid, each.status) for each in host.answers()} == {(900, 0), (901, 0)}

    asyncio.run(scenario())


def test_a_fused_operation_outlives_its_host() -> None:
    """Memory of both halves is accounted for once, though the connection is lost while the device works."""

    async def scenario() -> None:
        pools = Pools()
        target, _ = target_with(namespace(1, device := MemoryDevice()))
        queue = io_queue(admin_queue(target), target, pools=pools)
        gate = device.gate = asyncio.Event()
        queue.command(COMPARE, nsid=1, cid=801, cdw=blocks(0, 1), length=512, flags=0x41)
        r2ts = queue.command(WRITE, nsid=1, cid=802, cdw=blocks(0, 1), length=512, flags=0x42)
        for r2t in r2ts:
            queue.send(h2c_data(r2t.cid, r2t.fields[1], 0, bytes(512)))
        assert pools.fetched.used == 1024
        queue.queue.lost()
        gate.set()
        await settle()
        assert device.calls == [("compare_and_write", 0, 512, False)]
        assert pools.fetched.used == 0

    asyncio.run(scenario())


def test_reservations_that_cannot_be_asked_for_so() -> None:
    """Persistence, the short report, reserved actions and missing keys are refused."""
    (one, _, _), _ = hosts()
    keys = struct.pack("<QQ", 0, 1)
    assert one.status(REGISTER, nsid=1, cdw=(3 << 30,), data=keys) == S.INVALID_FIELD
    assert one.status(REGISTER, nsid=1, cdw=(1 << 30,), data=keys) == S.INVALID_FIELD
    assert one.status(REGISTER, nsid=1, cdw=(2 << 30,), data=keys) == 0
    assert one.status(REGISTER, nsid=1, data=keys[:8]) == S.SGL_LENGTH_INVALID
    assert one.status(ACQUIRE, nsid=1, cdw=(1 << 8 | 8,), data=keys) == S.INVALID_FIELD
    assert one.status(RELEASE, nsid=1, cdw=(1 << 8 | 8,), data=keys[:8]) == S.INVALID_FIELD
    assert one.status(REPORT, nsid=1, cdw=(15, 0), length=64) == S.HOST_ID_INCONSISTENT
    assert one.status(REPORT, nsid=1, cdw=(16, 1), length=64) == S.SGL_LENGTH_INVALID
    assert acquire(one, 1, 1, action=3) == S.INVALID_FIELD
    assert release(one, 1, 1, action=2) == S.INVALID_FIELD


# --- garbage


@given(st.lists(st.tuples(st.binary(min_size=64, max_size=64), st.booleans()), max_size=8))
def test_any_entry_has_one_completion(entries: list[tuple[bytes, bool]]) -> None:
    """Whatever an entry says, the answer is a completion, R2T, or the wait for an event or a partner."""
    admin, queue, _, _ = pair()
    for host in (admin, queue, admin_queue(target_with()[0], subsystem=DISCOVERY)):
        for raw, transport in entries:
            entry = raw[:39] + b"\x5a" + raw[40:] if transport else raw
            for answer in host.send(capsule(entry)):
                assert answer.kind in {5, 7, 9}
            assert host.open or raw[0] == 0x7F
            if host.connection.ended:
                break


@given(st.data())
def test_commands_nearly_right_never_hurt_the_device(data: st.DataObject) -> None:
    """Valid commands with a few bytes changed keep what the device holds the right size, and are all answered."""
    _, queue, device, _ = pair()
    for _ in range(data.draw(st.integers(1, 6))):
        opcode = data.draw(st.sampled_from(sorted(io.HANDLERS)))
        entry = bytearray(
            sqe(opcode, queue.next_cid(), nsid=1, dptr=sgl(512, in_capsule=True), cdw=blocks(1, 1))
        )
        for place, value in data.draw(
            st.lists(st.tuples(st.integers(4, 38), st.integers(0, 255)), max_size=3)
        ):
            entry[place] = value
        for place, value in data.draw(
            st.lists(st.tuples(st.integers(40, 63), st.integers(0, 255)), max_size=3)
        ):
            entry[place] = value
        answers = queue.send(capsule(bytes(entry), PATTERN[:512]))
        assert [each.kind for each in answers] in ([5], [7, 5])
    assert len(device.data) == 2048 * 512
    for call in device.calls:
        if call[0] in {"read", "write", "write_zeroes", "compare_and_write"}:
            assert 0 <= call[1] <= call[1] + call[2] <= 2048 * 512
