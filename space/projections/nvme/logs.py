"""Get Log Page (Base Specification 2.0, section 5.16), the discovery log among them."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Final

from space.projections.nvme.controller import ERROR_ENTRIES_MAX, Controller, Event
from space.projections.nvme.pdu import FABRICS, Command
from space.projections.nvme.reply import Reply
from space.projections.nvme.status import CommandError, NvmeStatus
from space.projections.nvme.target import (
    ALL_NAMESPACES,
    ANA_GROUPS_MAX,
    DISCOVERY_NQN,
    NAMESPACES_MAX,
    Namespace,
    Port,
    Subsystem,
)

if TYPE_CHECKING:
    from space.projections.nvme.queue import Queue

_ERROR: Final = struct.Struct("<QHHHHQIBB2xQ24x")
_ANA_HEAD: Final = struct.Struct("<QH6x")
_ANA_GROUP: Final = struct.Struct("<IIQB15x")
_ANA_BYTES_MAX: Final = _ANA_HEAD.size + ANA_GROUPS_MAX * _ANA_GROUP.size + NAMESPACES_MAX * 4
"""Hosts read the log in pieces up to what the numbers in Identify Controller say it may have."""
_DISCOVERY_HEAD: Final = struct.Struct("<QQH1006x")
_DISCOVERY_ENTRY: Final = struct.Struct("<BBBBHHHH20x32s192x256s256s256x")
_NOTICE: Final = struct.Struct("<QBB2xI48x")
assert (_ERROR.size, _ANA_HEAD.size, _ANA_GROUP.size, _NOTICE.size) == (64, 16, 32, 64)
assert (_DISCOVERY_HEAD.size, _DISCOVERY_ENTRY.size) == (1024, 1024)

_TRANSPORT_TCP: Final = 3
_NO_FLOW_CONTROL_OK: Final = 1 << 2
_SUBTYPE_REFERRAL: Final = 1
_SUBTYPE_NVM: Final = 2
_SUBTYPE_CURRENT: Final = 3
_SAME_EVERYWHERE: Final = 1
"""EFLAGS: every port of this discovery service tells the same."""
_PERSISTENT_OK: Final = 2
"""EFLAGS: a connection to it may stay."""
ADMIN_ENTRIES: Final = 32
"""ASQSZ: the least a host may rely on."""

_SUPPORTED: Final = 1
_CHANGES_CONTENT: Final = 1 << 1


def _errors(queue: Queue, controller: Controller, command: Command) -> bytes:
    """01h: what failed, newest first."""
    rows = [
        _ERROR.pack(each.count, each.sqid, each.cid, each.status, each.location, each.lba, each.nsid, 0, 0, 0)
        for each in controller.errors
    ]
    return b"".join(rows).ljust(ERROR_ENTRIES_MAX * _ERROR.size, b"\0")


def _smart(queue: Queue, controller: Controller, command: Command) -> bytes:
    """02h: what was read and written, by all hosts; of one namespace, or of all."""
    namespaces = controller.subsystem.namespaces
    if command.nsid in {0, ALL_NAMESPACES}:
        counted: list[Namespace] = list(namespaces.values())
    elif command.nsid in namespaces:
        counted = [namespaces[command.nsid]]
    else:
        raise CommandError(NvmeStatus.INVALID_NAMESPACE, location=4)
    data = bytearray(512)
    struct.pack_into("<BHBB", data, 0, 0, 0, 100, 0)  # no warning, no thermometer, all spare there

    def put(offset: int, value: int) -> None:
        data[offset : offset + 16] = value.to_bytes(16, "little")

    unit = 512_000
    put(32, -(-sum(each.counters.bytes_read for each in counted) // unit))
    put(48, -(-sum(each.counters.bytes_written for each in counted) // unit))
    put(64, sum(each.counters.reads for each in counted))
    put(80, sum(each.counters.writes for each in counted))
    put(128, int(queue.now - controller.started) // 3600)
    put(176, controller.error_count)
    return bytes(data)


def _firmware(queue: Queue, controller: Controller, command: Command) -> bytes:
    """03h: one slot, active."""
    revision = controller.subsystem.firmware.encode("ascii").ljust(8)
    return struct.pack("<B7x8s496x", 1, revision)


def _changed_namespaces(queue: Queue, controller: Controller, command: Command) -> bytes:
    """04h: what changed since it was last read."""
    changed = sorted(controller.changed_namespaces)
    return struct.pack(f"<{len(changed)}I", *changed).ljust(4 * NAMESPACES_MAX, b"\0")


def _effects(queue: Queue, controller: Controller, command: Command) -> bytes:
    """05h: which commands there are, and which of them change content."""
    from space.projections.nvme import admin, io  # they know the handlers, and this module

    def row(handlers: Collection[int], changing: Collection[int] = ()) -> bytes:
        entries = [_SUPPORTED if each in handlers or each == FABRICS else 0 for each in range(256)]
        for each in changing:
            entries[each] |= _CHANGES_CONTENT
        return struct.pack("<256I", *entries)

    return row(admin.HANDLERS) + row(io.HANDLERS, io.MUTATIONS - {io.FLUSH}) + bytes(2048)


def _ana(queue: Queue, controller: Controller, command: Command) -> bytes:
    """0Ch: the state of each ANA group, with its namespaces unless only groups are asked for."""
    subsystem = controller.subsystem
    groups_only = bool(command.cdw10 >> 8 & 1)
    parts = []
    for group in sorted(subsystem.ana_states):
        members = sorted(each.nsid for each in subsystem.namespaces.values() if each.ana_group == group)
        members = [] if groups_only else members
        changes, state = subsystem.ana_changes[group], subsystem.ana_states[group]
        parts.append(_ANA_GROUP.pack(group, len(members), changes, state))
        parts.append(struct.pack(f"<{len(members)}I", *members))
    head = _ANA_HEAD.pack(sum(subsystem.ana_changes.values()), len(subsystem.ana_states))
    return (head + b"".join(parts)).ljust(_ANA_BYTES_MAX, b"\0")


def _reservation_notices(queue: Queue, controller: Controller, command: Command) -> bytes:
    """80h: the oldest notice not read yet."""
    if not controller.notices:
        return _NOTICE.pack(0, 0, 0, 0)
    count, nsid, notice = controller.notices[0]
    return _NOTICE.pack(count, notice, min(len(controller.notices) - 1, 255), nsid)


def _discovery(queue: Queue, controller: Controller, command: Command) -> bytes:
    """70h: this service itself and subsystems the host may use, at each port; these on other nodes; other services."""
    target = queue.target
    subsystems = [each for each in target.subsystems.values() if each.admits(controller.host_nqn)]
    entries = []
    for port in target.ports:
        entries.append(
            _entry(queue, port, _SUBTYPE_CURRENT, DISCOVERY_NQN, _SAME_EVERYWHERE | _PERSISTENT_OK)
        )
        entries += _at_port(queue, port, subsystems)
    for port in target.others:
        entries += _at_port(queue, port, subsystems)
    for each in target.referrals:
        port = Port(each.number, each.address, each.service)
        entries.append(_entry(queue, port, _SUBTYPE_REFERRAL, each.nqn, _SAME_EVERYWHERE if each.same else 0))
    return _DISCOVERY_HEAD.pack(target.generation, len(entries), 0) + b"".join(entries)


def _at_port(queue: Queue, port: Port, subsystems: Sequence[Subsystem]) -> list[bytes]:
    """The subsystems of an I/O port."""
    if port.discovery_only:
        return []
    return [_entry(queue, port, _SUBTYPE_NVM, each.nqn, 0) for each in subsystems]


def _entry(queue: Queue, port: Port, subtype: int, nqn: str, flags: int) -> bytes:
    address = port.address
    try:
        parsed = ipaddress.ip_address(address)
        if parsed.is_unspecified:
            address = queue.shell.local_address
            parsed = ipaddress.ip_address(address)
        family = 2 if parsed.version == 6 else 1
    except ValueError:  # a host name: what it means is the host's to find out
        family = 1
    return _DISCOVERY_ENTRY.pack(
        _TRANSPORT_TCP,
        family,
        subtype,
        _NO_FLOW_CONTROL_OK,
        port.number,
        0xFFFF,  # controllers are made as hosts connect
        ADMIN_ENTRIES,
        flags,
        str(port.service).encode("ascii").ljust(32),
        nqn.encode(),
        address.encode("ascii", "replace").ljust(256),
    )


Page = Callable[["Queue", Controller, Command], bytes]
_IO_PAGES: Final[dict[int, Page]] = {
    0x01: _errors,
    0x02: _smart,
    0x03: _firmware,
    0x04: _changed_namespaces,
    0x05: _effects,
    0x0C: _ana,
    0x80: _reservation_notices,
}
_DISCOVERY_PAGES: Final[dict[int, Page]] = {0x70: _discovery}


def _supported(pages: Collection[int]) -> bytes:
    """00h: which pages there are."""
    return struct.pack("<256I", *(_SUPPORTED if each in pages or not each else 0 for each in range(256)))


EVENTS: Final = {
    0x04: Event.NAMESPACE_CHANGED,
    0x0C: Event.ANA_CHANGED,
    0x70: Event.DISCOVERY_CHANGED,
    0x80: Event.RESERVATION,
}
"""Reading a page allows the event that goes with it again."""


def get_log_page(queue: Queue, command: Command) -> Reply:
    """A part of a log page; what lies behind its end reads as zeros."""
    controller = queue.controller
    assert controller is not None
    pages = _DISCOVERY_PAGES if controller.is_discovery else _IO_PAGES
    page = command.cdw10 & 0xFF
    length = ((command.cdw10 >> 16 | (command.cdw11 & 0xFFFF) << 16) + 1) * 4
    offset = command.cdw12 | command.cdw13 << 32
    if page and page not in pages:
        raise CommandError(NvmeStatus.INVALID_LOG_PAGE, location=40)
    if command.cdw14 & 0x0080_007F or offset % 4:
        raise CommandError(NvmeStatus.INVALID_FIELD, location=56 if command.cdw14 & 0x0080_007F else 48)
    if length != command.sgl_length:
        raise CommandError(NvmeStatus.SGL_LENGTH_INVALID, location=32)
    data = pages[page](queue, controller, command) if page else _supported(pages)
    if offset > len(data):
        raise CommandError(NvmeStatus.INVALID_FIELD, location=48)
    if not command.cdw10 >> 15 & 1:
        _was_read(controller, page)
    return Reply([data[offset : offset + length].ljust(length, b"\0")], length)


def _was_read(controller: Controller, page: int) -> None:
    """What reading a page without "retain asynchronous event" does."""
    if page == 0x04:
        controller.changed_namespaces.clear()
    elif page == 0x80 and controller.notices:
        controller.notices.popleft()
    if page in EVENTS:
        controller.log_was_read(EVENTS[page])
