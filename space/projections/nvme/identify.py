"""Identify: what a host learns of controllers and namespaces.

Base Specification 2.0, section 5.17; NVM Command Set Specification 1.0, section 4.1.5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from space.projections.nvme.controller import (
    ERROR_ENTRIES_MAX,
    EVENT_BITS,
    EVENT_REQUESTS_MAX,
    QUEUE_ENTRIES_MAX,
    VERSION,
    Controller,
    Event,
)
from space.projections.nvme.pdu import Command
from space.projections.nvme.reply import Reply
from space.projections.nvme.status import CommandError, NvmeStatus
from space.projections.nvme.target import ANA_GROUPS_MAX, NAMESPACES_MAX, Namespace

if TYPE_CHECKING:
    from space.projections.nvme.queue import Queue

IDENTIFY_BYTES: Final = 4096
PAGE_BYTES: Final = 4096
"""MDTS counts in pages of CAP.MPSMIN."""
KEEP_ALIVE_GRANULARITY: Final = 10
"""KAS, in units of 100 ms: time is looked at every second."""
ANA_TRANSITION_SECONDS: Final = 10
COPY_RANGES_MAX: Final = 128
COPY_RANGE_BLOCKS_MAX: Final = 0xFFFF
COPY_BYTES_MAX: Final = 256 << 20
"""One Copy is one event for each range; this bounds what a crash in it repeats, not memory."""
PREFERRED_BYTES: Final = 4096
"""Writes smaller or not aligned to this share a stored extent with their neighbours."""
OPTIMAL_BYTES: Final = 64 << 10
"""A frame."""

ONCS: Final = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8
"""Compare, Dataset Management, Write Zeroes, save and select, reservations, Timestamp, Verify, Copy."""
CTRATT: Final = 1 << 0 | 1 << 6
"""128-bit host ids, traffic based keep alive."""
SGLS: Final = 1 << 0 | 1 << 20 | 1 << 21
"""SGLs of any alignment, offsets in the capsule, transport descriptors."""
LPA: Final = 1 << 0 | 1 << 1 | 1 << 2
"""SMART data by namespace, commands supported and effects, log page offsets."""
ANACAP: Final = 0b101_1111
"""Every state may be reported; the group of a namespace does not change while it is attached."""
RESCAP: Final = 0xFE
"""Every kind of reservation, and IEKEY as defined since 1.3."""
NSFEAT: Final = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4
"""Thin provisioning, atomicity by namespace, ids never used again, preferred granularities."""
DLFEAT: Final = 1 | 1 << 3
"""What is deallocated reads as zeros, and Write Zeroes may deallocate."""

_IO_EVENTS: Final = EVENT_BITS[Event.NAMESPACE_CHANGED] | EVENT_BITS[Event.ANA_CHANGED]


def _text(text: str, size: int) -> bytes:
    return text.encode("ascii").ljust(size)


def controller_data(controller: Controller) -> bytes:
    """The Identify Controller data structure (CNS 01h, figure 275)."""
    data = bytearray(IDENTIFY_BYTES)
    subsystem, limits = controller.subsystem, controller.limits

    def put(offset: int, layout: str, *values: int | bytes) -> None:
        struct.pack_into(layout, data, offset, *values)

    put(4, "20s40s8s", _text(subsystem.serial, 20), _text(subsystem.model, 40), _text(subsystem.firmware, 8))
    put(77, "<B", (limits.transfer_bytes // PAGE_BYTES).bit_length() - 1)  # MDTS
    put(78, "<HI", controller.number, VERSION)
    put(96, "<I", CTRATT)
    put(111, "<B", 2 if controller.is_discovery else 1)  # CNTRLTYPE
    put(258, "<BBBBBB", 0, EVENT_REQUESTS_MAX - 1, 0x03, 0, 0, 0)  # ACL, AERL, FRMW (one slot, read-only)
    put(261, "<B", LPA)
    put(320, "<H", KEEP_ALIVE_GRANULARITY)
    put(512, "<BBH", 0x66, 0x44, QUEUE_ENTRIES_MAX)  # SQES, CQES, MAXCMD
    put(536, "<I", SGLS)
    put(768, "256s", subsystem.nqn.encode())
    if controller.is_discovery:
        put(92, "<I", EVENT_BITS[Event.DISCOVERY_CHANGED])  # OAES
        put(261, "<B", 1 << 2)
        put(1806, "<B", 1)  # DCTYPE: a direct discovery controller
        return bytes(data)
    put(76, "<B", 0b1011)  # CMIC: several ports, several controllers, ANA
    put(92, "<I", _IO_EVENTS)  # OAES
    put(262, "<B", ERROR_ENTRIES_MAX - 1)  # ELPE
    put(342, "<BBII", ANA_TRANSITION_SECONDS, ANACAP, ANA_GROUPS_MAX, ANA_GROUPS_MAX)
    put(516, "<IHH", NAMESPACES_MAX, ONCS, 1)  # NN, ONCS, FUSES: Compare and Write
    put(525, "<B", 0b111)  # VWC: there is one, and Flush takes all namespaces too
    units = limits.transfer_bytes // PAGE_BYTES - 1  # in blocks, of whatever size: the largest is meant
    put(526, "<HH", units, units)  # AWUN, AWUPF
    put(532, "<HH", units, 1)  # ACWU, OCFS: Copy format 0
    put(540, "<I", NAMESPACES_MAX)  # MNAN
    put(
        1792, "<IIHBBH", (64 + limits.capsule_bytes) // 16, 1, 0, 0, 1, 1
    )  # IOCCSZ, IORCSZ, ICDOFF, FCATT, MSDBD, OFCS
    return bytes(data)


def namespace_data(controller: Controller, namespace: Namespace) -> bytes:
    """The Identify Namespace data structure of the NVM command set (CNS 00h)."""
    data = bytearray(IDENTIFY_BYTES)
    info = namespace.info()
    blocks = info.size // info.block_size
    atomic = min(controller.limits.transfer_bytes // info.block_size, 1 << 16) - 1

    def put(offset: int, layout: str, *values: int | bytes) -> None:
        struct.pack_into(layout, data, offset, *values)

    put(0, "<QQQ", blocks, blocks, min(-(-info.allocated // info.block_size), blocks))  # NSZE, NCAP, NUSE
    put(24, "<BBB", NSFEAT, 0, 0)  # NLBAF, FLBAS: one format
    put(30, "<BBBB", 1, RESCAP | namespace.reservations.persistent, 0, DLFEAT)  # NMIC: shared
    put(34, "<HHH", atomic, atomic, atomic)  # NAWUN, NAWUPF, NACWU
    put(48, "<QQ", info.size & 0xFFFF_FFFF_FFFF_FFFF, 0)  # NVMCAP
    preferred = PREFERRED_BYTES // info.block_size - 1
    put(64, "<HHHH", preferred, preferred, preferred, preferred)  # NPWG, NPWA, NPDG, NPDA
    put(72, "<H", OPTIMAL_BYTES // info.block_size - 1)  # NOWS
    copied = min(COPY_BYTES_MAX // info.block_size, 0xFFFF_FFFF)
    put(74, "<HIB", COPY_RANGE_BLOCKS_MAX, copied, COPY_RANGES_MAX - 1)  # MSSRL, MCL, MSRC
    put(92, "<I", namespace.ana_group)
    put(99, "<B", namespace.protected)  # NSATTR
    put(104, "16s8s", namespace.nguid, namespace.eui64)
    put(128, "<HBB", 0, info.block_size.bit_length() - 1, 0)  # LBAF0: no metadata, the size, the best
    return bytes(data)


def _independent_data(controller: Controller, namespace: Namespace) -> bytes:
    """The I/O command set independent part (CNS 08h)."""
    data = bytearray(IDENTIFY_BYTES)
    rescap = RESCAP | namespace.reservations.persistent
    struct.pack_into("<BBBBIB5xB", data, 0, 1 << 3, 1, rescap, 0, namespace.ana_group, namespace.protected, 1)
    return bytes(data)


def _zeros(controller: Controller, namespace: Namespace) -> bytes:
    """The NVM command set's own part (CNS 05h): there is no protection information to tell of."""
    return bytes(IDENTIFY_BYTES)


def _descriptors(namespace: Namespace) -> bytes:
    """Namespace identification descriptors (CNS 03h, figure 278)."""
    parts = [b"\x03\x10\0\0" + namespace.uuid, b"\x04\x01\0\0\0"]  # UUID; command set: NVM
    if any(namespace.nguid):
        parts.insert(0, b"\x02\x10\0\0" + namespace.nguid)
    if any(namespace.eui64):
        parts.insert(0, b"\x01\x08\0\0" + namespace.eui64)
    return b"".join(parts)


def _numbers(numbers: Iterable[int]) -> bytes:
    return b"".join(number.to_bytes(4, "little") for number in sorted(numbers)[:1024])


def _page(data: bytes) -> bytes:
    return data.ljust(IDENTIFY_BYTES, b"\0")


def _list_after(controller: Controller, command: Command) -> bytes:
    """Namespaces with numbers above the one given (CNS 02h, 07h, 10h, 1Ah)."""
    if command.nsid >= 0xFFFF_FFFE:
        raise CommandError(NvmeStatus.INVALID_NAMESPACE, location=4)
    return _page(_numbers(nsid for nsid in controller.subsystem.namespaces if nsid > command.nsid))


def _of_namespace(
    build: Callable[[Controller, Namespace], bytes],
) -> Callable[[Controller, Command], bytes]:
    """Data of a namespace; zeros for a number that is valid, but nobody's."""

    def answer(controller: Controller, command: Command) -> bytes:
        if not 1 <= command.nsid <= NAMESPACES_MAX:
            raise CommandError(NvmeStatus.INVALID_NAMESPACE, location=4)
        namespace = controller.subsystem.namespaces.get(command.nsid)
        return bytes(IDENTIFY_BYTES) if namespace is None else build(controller, namespace)

    return answer


def _descriptor_list(controller: Controller, command: Command) -> bytes:
    namespace = controller.subsystem.namespaces.get(command.nsid)
    if namespace is None:
        raise CommandError(NvmeStatus.INVALID_NAMESPACE, location=4)
    return _page(_descriptors(namespace))


def _controller(controller: Controller, command: Command) -> bytes:
    return controller_data(controller)


def _nvm_controller(controller: Controller, command: Command) -> bytes:
    """Limits of commands without data (CNS 06h): none but the number of ranges to deallocate."""
    return _page(struct.pack("<BBBBIQ", 0, 0, 0, 0, 0, 0))


def _controllers(controller: Controller, command: Command) -> bytes:
    """Controllers with numbers from the one given (CNS 13h), of them those a namespace is attached to (12h): all."""
    if command.cdw10 & 0xFF == 0x12 and command.nsid not in controller.subsystem.namespaces:
        raise CommandError(NvmeStatus.INVALID_NAMESPACE, location=4)
    first = command.cdw10 >> 16
    found = sorted(number for number in controller.subsystem.controllers if number >= first)[:2047]
    return _page(struct.pack(f"<H{len(found)}H", len(found), *found))


def _command_sets(controller: Controller, command: Command) -> bytes:
    """The combinations of command sets (CNS 1Ch): NVM alone."""
    return _page(struct.pack("<Q", 1))


def _of_command_set(
    build: Callable[[Controller, Command], bytes],
) -> Callable[[Controller, Command], bytes]:
    def answer(controller: Controller, command: Command) -> bytes:
        if command.cdw11 >> 24:
            raise CommandError(NvmeStatus.INVALID_COMMAND_SET, location=47)
        return build(controller, command)

    return answer


STRUCTURES: Final[dict[int, Callable[[Controller, Command], bytes]]] = {
    0x00: _of_namespace(namespace_data),
    0x01: _controller,
    0x02: _list_after,
    0x03: _descriptor_list,
    0x05: _of_command_set(_of_namespace(_zeros)),
    0x06: _of_command_set(_nvm_controller),
    0x07: _of_command_set(_list_after),
    0x08: _of_namespace(_independent_data),
    0x10: _list_after,
    0x11: _of_namespace(namespace_data),
    0x12: _controllers,
    0x13: _controllers,
    0x1A: _of_command_set(_list_after),
    0x1B: _of_command_set(_of_namespace(namespace_data)),
    0x1C: _command_sets,
}
"""By CNS (figure 273)."""
DISCOVERY_STRUCTURES: Final = {0x01: _controller}


def identify(queue: Queue, command: Command) -> Reply:
    """The Identify command."""
    assert queue.controller is not None
    table = DISCOVERY_STRUCTURES if queue.controller.is_discovery else STRUCTURES
    build = table.get(command.cdw10 & 0xFF)
    if build is None:
        raise CommandError(NvmeStatus.INVALID_FIELD, location=40)
    if command.sgl_length != IDENTIFY_BYTES:
        raise CommandError(NvmeStatus.SGL_LENGTH_INVALID, location=32)
    return Reply([build(queue.controller, command)], IDENTIFY_BYTES)
