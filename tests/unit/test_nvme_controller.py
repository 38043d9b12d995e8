"""Connect, properties, features, events, Identify and log pages: what a host sees before and beside its I/O."""

from __future__ import annotations

import struct
from typing import Final

import pytest

from space._errors import ConflictError, NotFoundError, UsageError
from space.projections.nvme import admin as admin_commands
from space.projections.nvme import controller as controllers
from space.projections.nvme.controller import CAP, EVENT_REQUESTS_MAX, VERSION, Event
from space.projections.nvme.identify import DISCOVERY_STRUCTURES, STRUCTURES
from space.projections.nvme.status import NvmeStatus as S
from space.projections.nvme.target import (
    NAMESPACES_MAX,
    AnaState,
    Namespace,
    Port,
    Referral,
    Subsystem,
    Target,
    check_nqn,
)
from tests.nvme_support import (
    DISCOVERY,
    ENABLE,
    HOST,
    HOST_ID,
    NQN,
    Host,
    MemoryDevice,
    admin_queue,
    capsule,
    connect_data,
    connect_entry,
    io_queue,
    namespace,
    pair,
    sgl,
    sqe,
    target_with,
)

CC: Final = 0x14
CSTS: Final = 0x1C
ALL: Final = 0xFFFF_FFFF
GET_LOG, IDENTIFY, ABORT, SET, GET, AER, KEEP_ALIVE = 0x02, 0x06, 0x08, 0x09, 0x0A, 0x0C, 0x18


def log_page(
    host: Host, page: int, length: int, *, offset: int = 0, retain: bool = False, nsid: int = ALL
) -> bytes:
    """A part of a log page."""
    words = (page | retain << 15 | (length // 4 - 1) << 16, 0, offset & ALL, offset >> 32)
    return host.data(GET_LOG, nsid=nsid, cdw=words, length=length)


# --- Connect


def test_a_controller_is_made_by_connect() -> None:
    """The answer has the controller's number, which Identify tells too; numbers differ from host to host."""
    target, subsystem = target_with()
    first, second = admin_queue(target), admin_queue(target, host_id=bytes(15) + b"\1")
    numbers = [host.queue.controller.number for host in (first, second) if host.queue.controller]
    assert sorted(subsystem.controllers) == sorted(numbers)
    assert len(set(numbers)) == 2
    data = first.data(IDENTIFY, cdw=(1,), length=4096)
    assert struct.unpack_from("<H", data, 78) == (numbers[0],)


@pytest.mark.parametrize(
    "options, status, result",
    [
        ({"subsystem": "nqn.2024-01.org.example:none"}, S.CONNECT_INVALID, 1 << 16 | 256),
        ({"subsystem": "disk"}, S.CONNECT_INVALID, 1 << 16 | 256),
        ({"host": "nobody"}, S.CONNECT_INVALID, 1 << 16 | 512),
        ({"host": "nqn." + "x" * 220}, S.CONNECT_INVALID, 1 << 16 | 512),
        ({"host_id": bytes(16)}, S.CONNECT_INVALID, 1 << 16),
        ({"controller": 1}, S.CONNECT_INVALID, 1 << 16 | 16),
        ({"sqsize": 0}, S.CONNECT_INVALID, 44),
        ({"sqsize": 0xFFFF}, S.CONNECT_INVALID, 44),
        ({"qid": 1, "controller": 7}, S.CONNECT_INVALID, 1 << 16 | 16),
    ],
)
def test_a_connect_that_asks_for_nonsense_is_told_where(
    options: dict[str, object], status: int, result: int
) -> None:
    """Connect Invalid Parameters has the offset of the parameter, and whether it is in the data."""
    host = Host(target_with()[0])
    answer = host.connect(**options)  # type: ignore[arg-type]
    assert (answer.status, answer.result, answer.retry) == (status, result, False)
    assert host.queue.controller is None
    assert host.connect().status == 0  # the connection is as good as before


def test_connect_needs_its_format_and_its_data() -> None:
    """Another record format, less data, or none are refused."""
    host = Host(target_with()[0])
    (answer,) = host.send(capsule(connect_entry(1, recfmt=1), connect_data()))
    assert answer.status == S.CONNECT_FORMAT
    words = (0, 31)
    short = sqe(0x7F, 2, nsid=1, dptr=sgl(512, in_capsule=True), cdw=words)
    assert host.send(capsule(short, bytes(512)))[0].status == S.SGL_LENGTH_INVALID
    assert host.send(capsule(sqe(0x7F, 3, nsid=1, cdw=words)))[0].status == S.SGL_LENGTH_INVALID


def test_only_hosts_on_the_list_connect() -> None:
    """A host that is not named gets Connect Invalid Host, and sees no such subsystem in the discovery log."""
    target, _ = target_with(hosts=frozenset({HOST}))
    other = "nqn.2024-01.org.example:stranger"
    assert Host(target).connect(host=other).status == S.CONNECT_HOST
    assert Host(target).connect().status == 0
    target.set_ports([Port(1, "192.0.2.1", 4420)])
    for name, entries in ((other, 1), (HOST, 2)):
        host = admin_queue(target, subsystem=DISCOVERY, host=name)
        assert struct.unpack_from("<Q", log_page(host, 0x70, 1024), 8) == (entries,)


def test_a_host_taken_off_the_list_is_disconnected() -> None:
    """Its controllers end with all their queues; others go on."""
    target, subsystem = target_with()
    first = admin_queue(target)
    queue = io_queue(first, target)
    second = admin_queue(target, host="nqn.2024-01.org.example:other")
    target.set_hosts(NQN, frozenset({"nqn.2024-01.org.example:other"}))
    assert first.closed
    assert queue.closed
    assert second.open
    assert len(subsystem.controllers) == 1


def test_io_queues_belong_to_their_controller() -> None:
    """Only the host that made a controller adds queues, once it is enabled, within the number agreed, each once."""
    target, _ = target_with()
    admin = Host(target)
    number = admin.connect().result
    assert Host(target).connect(qid=1, controller=number).status == S.COMMAND_SEQUENCE_ERROR
    admin.set_property(CC, ENABLE)
    assert admin.one(SET, cdw=(7, 1 | 1 << 16)).result == 1 | 1 << 16
    host_id = bytes(15) + b"\5"
    assert Host(target).connect(qid=1, controller=number, host_id=host_id).status == S.CONNECT_INVALID
    assert Host(target).connect(qid=1, controller=number).status == 0
    taken = Host(target).connect(qid=1, controller=number)
    assert (taken.status, taken.result) == (S.CONNECT_INVALID, 42)
    assert Host(target).connect(qid=3, controller=number).result == 42
    assert Host(target).connect(qid=2, controller=number).status == 0
    assert admin.one(SET, cdw=(7, 0)).status == S.COMMAND_SEQUENCE_ERROR


def test_a_queue_is_connected_once_and_first() -> None:
    """Nothing but Connect is taken before it, and it is not taken again."""
    host = Host(target_with()[0])
    assert host.status(IDENTIFY, cdw=(1,), length=4096) == S.COMMAND_SEQUENCE_ERROR
    assert host.get_property(CSTS).status == S.COMMAND_SEQUENCE_ERROR
    assert host.connect().status == 0
    assert host.connect().status == S.COMMAND_SEQUENCE_ERROR


def test_a_subsystem_has_so_many_controllers() -> None:
    """When every number is taken a host is told to try again; a number becomes free with its controller."""
    target, _ = target_with(controller_ids=range(10, 12))
    hosts = [admin_queue(target) for _ in range(2)]
    answer = Host(target).connect()
    assert (answer.status, answer.retry) == (S.CONNECT_BUSY, True)
    hosts[0].queue.lost()
    assert Host(target).connect().result == 10


# --- properties


def test_a_controller_is_enabled_and_disabled_by_its_configuration() -> None:
    """CSTS.RDY follows CC.EN, and admin commands are taken only while it is set."""
    host = Host(target_with()[0])
    host.connect()
    assert host.get_property(0, size=8).result == CAP
    assert host.get_property(8).result == VERSION
    assert host.get_property(CSTS).result == 0
    assert host.status(IDENTIFY, cdw=(1,), length=4096) == S.COMMAND_SEQUENCE_ERROR
    assert host.set_property(CC, ENABLE).status == 0
    assert (host.get_property(CC).result, host.get_property(CSTS).result) == (ENABLE, 1)
    assert host.status(IDENTIFY, cdw=(1,), length=4096) == 0
    host.set_property(CC, ENABLE & ~1)
    assert host.get_property(CSTS).result == 0


@pytest.mark.parametrize(
    "value", [1, 5 << 16 | 4 << 20 | 1, ENABLE | 1 << 7, ENABLE | 7 << 4, ENABLE | 1 << 11]
)
def test_a_configuration_it_does_not_have_is_a_fatal_status(value: int) -> None:
    """Other entry sizes, page sizes, command sets or arbitration set CSTS.CFS, and commands are refused."""
    host = Host(target_with()[0])
    host.connect()
    host.set_property(CC, value)
    assert host.get_property(CSTS).result & 2
    assert host.status(IDENTIFY, cdw=(1,), length=4096) == S.COMMAND_SEQUENCE_ERROR


@pytest.mark.parametrize("offset", [0x0C, 0x10, 0x20, 0x24, 0x28, 0x30, 0x38, 0xE00, 0xFFFF_FFFF])
def test_properties_there_are_not(offset: int) -> None:
    """Reading or writing another property is an invalid field, as is the wrong size of one there is."""
    host = Host(target_with()[0])
    host.connect()
    assert host.get_property(offset).status == S.INVALID_FIELD
    assert host.set_property(offset, 1).status == S.INVALID_FIELD


def test_properties_have_their_size() -> None:
    """CAP has eight bytes, all others four; only CC is written."""
    host = Host(target_with()[0])
    host.connect()
    assert host.get_property(0).status == S.INVALID_FIELD
    assert host.get_property(CC, size=8).status == S.INVALID_FIELD
    assert host.set_property(CC, 1, size=8).status == S.INVALID_FIELD
    assert host.set_property(CSTS, 1).status == S.INVALID_FIELD
    assert host.one(0x7F, nsid=4, cdw=(2, CC)).status == S.INVALID_FIELD


def test_a_reset_takes_queues_features_and_event_requests() -> None:
    """Disabling closes the I/O queues and forgets what was set; the admin queue lives, and CIDs are free again."""
    admin, queue, _, _ = pair()
    admin.one(SET, cdw=(6, 0))
    admin.command(AER, cid=900)
    admin.set_property(CC, 0)
    assert queue.closed
    assert admin.open
    admin.set_property(CC, ENABLE)
    assert admin.one(GET, cdw=(6,)).result == 1
    assert admin.one(KEEP_ALIVE, cid=900).status == 0


def test_shutdown_flushes_every_namespace() -> None:
    """CC.SHN is answered when the caches are flushed, and CSTS says complete; a flush that fails does not stop it."""
    admin, _, device, subsystem = pair()
    other = MemoryDevice()
    other.error = NotFoundError("x")
    subsystem.add(namespace(2, other))
    assert admin.set_property(CC, ENABLE | 1 << 14).status == 0
    assert admin.get_property(CSTS).result & 12 == 8
    assert device.calls == [("flush",)]
    assert other.calls == [("flush",)] * 2


# --- keep alive


def test_a_silent_host_loses_its_controller() -> None:
    """After KATO without any command every queue is closed; commands and Keep Alive count as signs of life."""
    target, subsystem = target_with()
    admin = admin_queue(target, kato=5000)
    queue = io_queue(admin, target)
    controller = subsystem.controllers[min(subsystem.controllers)]
    controller.tick(4.0)  # the commands above were heard
    assert queue.one(0x00, nsid=1).status == 0
    controller.tick(8.9)
    controller.tick(13.8)
    assert admin.open
    controller.tick(13.9)
    assert admin.closed
    assert queue.closed
    assert subsystem.controllers == {}


def test_keep_alive_can_be_changed_and_switched_off() -> None:
    """The time-out is a feature; zero is never for an I/O controller, two minutes for a discovery controller."""
    target, subsystem = target_with()
    admin = admin_queue(target, kato=5000)
    assert admin.one(GET, cdw=(0x0F,)).result == 5000
    assert admin.one(SET, cdw=(0x0F, 0)).status == 0
    controller = next(iter(subsystem.controllers.values()))
    controller.tick(1e9)
    controller.tick(2e9)
    assert admin.open
    discovery = admin_queue(target, subsystem=DISCOVERY)
    (controller,) = target.discovery.controllers.values()
    controller.tick(0.0)
    controller.tick(119.0)
    assert discovery.open
    controller.tick(121.0)
    assert discovery.closed


# --- features


def test_every_feature_is_read_in_every_way() -> None:
    """Current, default and saved values and capabilities of each feature are answered; the rest are invalid fields."""
    admin, _, _, _ = pair()
    known = {1, 2, 4, 5, 6, 7, 0x0A, 0x0B, 0x0E, 0x0F, 0x16, 0x19, 0x81, 0x82, 0x83}
    sizes = {0x0E: 8, 0x16: 512, 0x81: 16}
    for fid in range(256):
        for select in range(8):
            length = sizes.get(fid, 0) if select < 3 else 0
            words = (fid | select << 8, 1 if fid == 0x81 else 0)
            status = admin.status(GET, nsid=1 if fid in {0x82, 0x83} else 0, cdw=words, length=length)
            assert status == (0 if fid in known and select < 4 else S.INVALID_FIELD), (fid, select)


def test_features_a_host_sets_are_kept() -> None:
    """What was set is what is read, and the defaults stay what they were."""
    admin, _, _, _ = pair()
    for fid, value in ((1, 0x0A0B0C03), (5, 50), (6, 0), (0x0A, 1), (0x0B, 0x900), (0x0F, 7000)):
        assert admin.one(SET, cdw=(fid, value)).status == 0
        assert admin.one(GET, cdw=(fid,)).result == value
        assert admin.one(GET, cdw=(fid | 1 << 8,)).result != value
    for select, value in ((0, 350), (1 << 20, 270)):
        assert admin.one(SET, cdw=(4, select | value)).status == 0
        assert admin.one(GET, cdw=(4, select)).result == value
    admin.command(SET, cdw=(0x16,), data=b"\1" + bytes(511))
    assert admin.data(GET, cdw=(0x16,), length=512)[0] == 1
    assert admin.data(GET, cdw=(0x81, 1), length=16) == HOST_ID


@pytest.mark.parametrize(
    "words, nsid, status",
    [
        ((6 | 1 << 31, 0), 0, S.FEATURE_NOT_SAVEABLE),
        ((0x81, 1), 0, S.FEATURE_NOT_CHANGEABLE),
        ((6, 0), 1, S.FEATURE_NOT_PER_NAMESPACE),
        ((2, 1), 0, S.INVALID_FIELD),
        ((4, 1 << 16), 0, S.INVALID_FIELD),
        ((4, 2 << 20), 0, S.INVALID_FIELD),
        ((5, 1 << 16), 0, S.INVALID_FIELD),
        ((7, 0xFFFF), 0, S.INVALID_FIELD),
        ((7, 0), 0, S.COMMAND_SEQUENCE_ERROR),
        ((0x0B, 1 << 31), 0, S.INVALID_FIELD),
        ((0x0E, 0), 0, S.SGL_LENGTH_INVALID),
        ((0x19, 1), 0, S.INVALID_FIELD),
        ((0x82, 1), 1, S.INVALID_FIELD),
        ((0x82, 2), 9, S.INVALID_NAMESPACE),
        ((0x83, 1), 1, S.INVALID_FIELD),
        ((0x84, 1), 1, S.INVALID_FIELD),
        ((0x80, 1), 0, S.INVALID_FIELD),
    ],
)
def test_features_that_cannot_be_set_so(words: tuple[int, ...], nsid: int, status: int) -> None:
    """Each wrong Set Features has the status the specification gives it."""
    admin, _, _, _ = pair()
    assert admin.one(SET, nsid=nsid, cdw=words).status == status


def test_the_timestamp_goes_on() -> None:
    """What a host set is read later by as much as time has passed; before, it counts from the Connect."""
    admin, _, _, _ = pair()
    admin.queue.now = 2.5
    assert struct.unpack("<Q", admin.data(GET, cdw=(0x0E,), length=8)) == (2500,)
    admin.command(SET, cdw=(0x0E,), data=struct.pack("<Q", 1_700_000_000_000))
    admin.queue.now = 4.0
    (value,) = struct.unpack("<Q", admin.data(GET, cdw=(0x0E,), length=8))
    assert value == 1_700_000_001_500 | 1 << 49


# --- events


def test_a_changed_namespace_is_told_once_until_the_list_is_read() -> None:
    """One event for any number of changes; reading the list without retaining lets the next one through."""
    target, subsystem = target_with()
    admin = admin_queue(target)
    admin.one(SET, cdw=(0x0B, 1 << 8))
    assert admin.command(AER, cid=50) == []
    subsystem.changed(1)
    (event,) = admin.answers()
    assert (event.cid, event.result, event.status) == (50, 0x04_00_02, 0)
    subsystem.add(namespace(5))
    assert admin.command(AER, cid=51) == []
    assert log_page(admin, 4, 12, retain=True) == struct.pack("<III", 1, 5, 0)
    subsystem.changed(1)
    assert admin.answers() == []
    assert log_page(admin, 4, 4096) == struct.pack("<II", 1, 5) + bytes(4088)
    assert log_page(admin, 4, 4) == bytes(4)
    subsystem.remove(5)
    assert admin.answers()[0].cid == 51


def test_events_wait_for_a_request_and_for_being_enabled() -> None:
    """Without the configuration bit nothing is told; without a request it is told when one comes."""
    target, subsystem = target_with()
    admin = admin_queue(target)
    subsystem.changed(1)
    admin.one(SET, cdw=(0x0B, 1 << 8 | 1 << 11))
    assert admin.command(AER, cid=50) == []
    subsystem.set_ana(1, AnaState.INACCESSIBLE)
    subsystem.set_ana(1, AnaState.INACCESSIBLE)
    assert [each.result for each in admin.answers()] == [0x0C_03_02]
    subsystem.changed(1)
    assert [each.result for each in admin.command(AER, cid=51)] == [0x04_00_02]


def test_event_requests_are_limited_and_can_be_aborted() -> None:
    """One more than AERL says is refused; Abort gives one back, and says so by result 0."""
    admin, _, _, _ = pair()
    for cid in range(EVENT_REQUESTS_MAX):
        assert admin.command(AER, cid=100 + cid) == []
    assert admin.one(AER).status == S.EVENT_REQUESTS_EXCEEDED
    aborted, done = admin.command(ABORT, cdw=(102 << 16,))
    assert (aborted.cid, aborted.status) == (102, S.ABORT_REQUESTED)
    assert (done.status, done.result) == (0, 0)
    assert admin.one(ABORT, cdw=(102 << 16,)).result == 1
    assert admin.one(ABORT, cdw=(7 << 16 | 9,)).result == 1
    assert admin.command(AER, cid=102) == []


def test_the_ana_log_has_groups_and_their_namespaces() -> None:
    """Each group with state, change count and members; with RGO groups only; longer than it is, it reads as zeros."""
    target, subsystem = target_with(namespace(1), namespace(3), namespace(2, ana_group=4))
    admin = admin_queue(target)
    subsystem.set_ana(4, AnaState.NON_OPTIMIZED)
    head = struct.pack("<QH6x", 1, 2)
    first = struct.pack("<IIQB15x", 1, 2, 0, 1) + struct.pack("<II", 1, 3)
    second = struct.pack("<IIQB15x", 4, 1, 1, 2) + struct.pack("<I", 2)
    assert log_page(admin, 0x0C, 96) == (head + first + second).ljust(96, b"\0")
    assert log_page(admin, 0x0C | 1 << 8, 80)[16:32] == struct.pack("<IIQ", 1, 0, 0)
    assert log_page(admin, 0x0C, 4096, offset=4096) == bytes(4096)


# --- Identify


def test_every_structure_has_4096_bytes() -> None:
    """Each CNS there is gives a page, and every other is an invalid field."""
    admin, _, _, _ = pair()
    for cns in range(256):
        answers = admin.command(IDENTIFY, nsid=1, cdw=(cns,), length=4096)
        if cns in STRUCTURES:
            assert len(answers[0].data) == 4096
        else:
            assert answers[0].status == S.INVALID_FIELD
    assert admin.status(IDENTIFY, nsid=1, cdw=(1,), length=4092) == S.SGL_LENGTH_INVALID


def test_namespaces_are_identified() -> None:
    """Sizes in blocks, the block size, and all identities; the descriptors have the same ones."""
    device = MemoryDevice(100, 4096)
    device.allocated = 3 * 4096 + 1
    target, _ = target_with(namespace(7, device, ana_group=2))
    admin = admin_queue(target)
    data = admin.data(IDENTIFY, nsid=7, cdw=(0,), length=4096)
    assert struct.unpack_from("<QQQ", data) == (100, 100, 4)
    assert (data[25], data[26], data[33], data[99]) == (0, 0, 9, 0)
    assert struct.unpack_from("<I", data, 92) == (2,)
    assert struct.unpack_from("<HBB", data, 128) == (0, 12, 0)
    assert (data[104:120], data[120:128]) == (b"\xb7" * 16, b"\xc7" * 8)
    descriptors = admin.data(IDENTIFY, nsid=7, cdw=(3,), length=4096)
    expected = (
        b"\x01\x08\0\0" + b"\xc7" * 8 + b"\x02\x10\0\0" + b"\xb7" * 16 + b"\x03\x10\0\0" + b"\xa7" * 16
        + b"\x04\x01\0\0\0"
    )  # fmt: skip
    assert descriptors.rstrip(b"\0") == expected.rstrip(b"\0")
    assert admin.data(IDENTIFY, nsid=7, cdw=(0x11,), length=4096) == data


def test_namespaces_that_are_not_there() -> None:
    """A valid number nobody has gives zeros, or no descriptors; an invalid one is an invalid namespace."""
    admin, _, _, _ = pair()
    for cns in (0, 5, 8, 0x11):
        assert admin.data(IDENTIFY, nsid=NAMESPACES_MAX, cdw=(cns,), length=4096) == bytes(4096)
        for nsid in (0, NAMESPACES_MAX + 1, ALL):
            assert admin.status(IDENTIFY, nsid=nsid, cdw=(cns,), length=4096) == S.INVALID_NAMESPACE
    assert admin.status(IDENTIFY, nsid=2, cdw=(3,), length=4096) == S.INVALID_NAMESPACE
    assert admin.status(IDENTIFY, nsid=2, cdw=(0x12,), length=4096) == S.INVALID_NAMESPACE


def test_lists_begin_after_the_number_given() -> None:
    """Active and allocated namespaces in ascending order; the reserved numbers are refused."""
    target, _ = target_with(*(namespace(nsid) for nsid in (9, 2, 5)))
    admin = admin_queue(target)
    for cns in (2, 7, 0x10, 0x1A):
        data = admin.data(IDENTIFY, nsid=2, cdw=(cns,), length=4096)
        assert struct.unpack_from("<III", data) == (5, 9, 0)
        assert admin.status(IDENTIFY, nsid=ALL, cdw=(cns,), length=4096) == S.INVALID_NAMESPACE
    data = admin.data(IDENTIFY, cdw=(0x13,), length=4096)
    assert struct.unpack_from("<HH", data) == (1, 1)
    assert admin.data(IDENTIFY, cdw=(0x1C,), length=4096)[:16] == struct.pack("<QQ", 1, 0)


def test_other_command_sets_are_unknown() -> None:
    """CSI other than NVM is an invalid command set."""
    admin, _, _, _ = pair()
    for cns in (5, 6, 7, 0x1A, 0x1B):
        status = admin.status(IDENTIFY, nsid=1, cdw=(cns, 2 << 24), length=4096)
        assert status == S.INVALID_COMMAND_SET


def test_protection_is_told() -> None:
    """NSATTR says write protected, for a namespace or for a device that is read-only."""
    target, _ = target_with(
        namespace(1, read_only=True), namespace(2, MemoryDevice(read_only=True)), namespace(3)
    )
    admin = admin_queue(target)
    protected = [admin.data(IDENTIFY, nsid=nsid, cdw=(0,), length=4096)[99] for nsid in (1, 2, 3)]
    assert protected == [1, 1, 0]
    assert admin.data(IDENTIFY, nsid=1, cdw=(8,), length=4096)[8] == 1


# --- log pages


def test_failed_commands_are_in_the_error_log() -> None:
    """Newest first, with queue, command, status, namespace and block."""
    admin, queue, _, _ = pair()
    assert queue.status(0x02, nsid=1, cid=77, cdw=(5000, 0, 0), length=512) == S.LBA_OUT_OF_RANGE
    assert admin.status(0xC5, cid=78) == S.INVALID_OPCODE
    data = log_page(admin, 1, 192)
    count, sqid, cid, status = struct.unpack_from("<QHHH", data)
    assert (count, sqid, cid, status >> 1 & 0x7FF) == (2, 0, 78, S.INVALID_OPCODE)
    count, sqid, cid, status, place, lba, nsid = struct.unpack_from("<QHHHHQI", data, 64)
    assert (count, sqid, cid, status >> 1 & 0x7FF) == (1, 1, 77, S.LBA_OUT_OF_RANGE)
    assert (place, lba, nsid) == (40, 5000, 1)
    assert data[128:] == bytes(64)
    assert struct.unpack_from("<Q", log_page(admin, 2, 512), 176) == (2,)


def test_reads_and_writes_are_counted() -> None:
    """SMART data counts commands and thousands of 512 bytes, of one namespace or all."""
    admin, queue, _, subsystem = pair()
    subsystem.add(namespace(2))
    queue.data(0x02, nsid=1, length=512)
    queue.data(0x02, nsid=2, length=512)
    queue.one(0x01, nsid=2, data=bytes(512))
    for nsid, expected in ((1, (1, 0, 1, 0)), (2, (1, 1, 1, 1)), (ALL, (1, 1, 2, 1)), (0, (1, 1, 2, 1))):
        data = log_page(admin, 2, 512, nsid=nsid)
        assert tuple(struct.unpack_from("<Q", data, place)[0] for place in (32, 48, 64, 80)) == expected
    assert admin.status(GET_LOG, nsid=9, cdw=(2 | 127 << 16,), length=512) == S.INVALID_NAMESPACE


def test_effects_name_exactly_the_commands_there_are() -> None:
    """A command is supported in the log if and only if it is not refused as an unknown opcode."""
    admin, queue, _, _ = pair()
    data = log_page(admin, 5, 4096)
    effects = struct.unpack("<512I", data[:2048])
    for opcode in range(256):
        for host, entry in ((admin, effects[opcode]), (queue, effects[256 + opcode])):
            if opcode == 0x7F or (opcode == AER and host is admin):
                assert entry == 1  # one has many types, the other no answer
                continue
            assert (host.status(opcode, nsid=1) != S.INVALID_OPCODE) == bool(entry & 1), hex(opcode)
    changing = [opcode for opcode in range(256) if effects[256 + opcode] & 2]
    assert changing == [1, 8, 9, 0x0D, 0x11, 0x15, 0x19]


@pytest.mark.parametrize("page", range(256))
def test_every_log_page_is_there_or_invalid(page: int) -> None:
    """A page in the list of supported pages is read, and any other is an invalid log page."""
    admin, _, _, _ = pair()
    supported = struct.unpack("<256I", log_page(admin, 0, 1024))
    status = admin.status(GET_LOG, nsid=ALL, cdw=(page | 15 << 16,), length=64)
    assert status == (0 if supported[page] else S.INVALID_LOG_PAGE)


def test_log_pages_are_read_in_pieces() -> None:
    """Offsets are multiples of four within the page; lengths are the descriptor's."""
    admin, _, _, _ = pair()
    whole = log_page(admin, 5, 4096)
    pieces = [log_page(admin, 5, 1000, offset=offset) for offset in range(0, 5000, 1000)]
    assert b"".join(pieces)[:4096] == whole
    for words, length, status in (
        ((5 | 15 << 16, 0, 2), 64, S.INVALID_FIELD),
        ((5 | 15 << 16, 0, 4100), 64, S.INVALID_FIELD),
        ((5 | 15 << 16, 0, 0, 1), 64, S.INVALID_FIELD),
        ((5 | 15 << 16, 0, 0, 0, 1), 64, S.INVALID_FIELD),
        ((5 | 15 << 16, 0, 0, 0, 1 << 23), 64, S.INVALID_FIELD),
        ((5 | 15 << 16,), 60, S.SGL_LENGTH_INVALID),
        ((5 | 15 << 16, 0xFFFF), 64, S.SGL_LENGTH_INVALID),
    ):
        assert admin.status(GET_LOG, cdw=words, length=length) == status


# --- the discovery service


def entries(data: bytes) -> list[tuple[int, int, int, str, str, str]]:
    """Family, subtype, port number, and the strings of each entry."""
    found: list[tuple[int, int, int, str, str, str]] = []
    for place in range(1024, len(data), 1024):
        transport, family, subtype, _, number, controller = struct.unpack_from("<BBBBHH", data, place)
        service = data[place + 32 : place + 64].rstrip()
        nqn = data[place + 256 : place + 512].rstrip(b"\0")
        address = data[place + 512 : place + 768].rstrip()
        assert (transport, controller) == (3, 0xFFFF)
        found.append((family, subtype, number, service.decode(), nqn.decode(), address.decode()))
    return found


def test_the_discovery_log_names_other_nodes_too() -> None:
    """The subsystem at other nodes' I/O ports, their services as referrals; one event a change."""
    target, _ = target_with()
    target.set_ports([Port(1, "192.0.2.1", 4420)])
    host = admin_queue(target, subsystem=DISCOVERY)
    others = [Port(3, "192.0.2.2", 4420), Port(4, "192.0.2.2", 8009, discovery_only=True)]
    generation = target.generation
    for _ in range(2):
        target.set_others(others, [Referral("192.0.2.2", 8009, number=4, same=True)])
        assert target.generation == generation + 1  # the same again is no change
    log = log_page(host, 0x70, 1024 * 5)
    assert entries(log) == [
        (1, 3, 1, "4420", DISCOVERY, "192.0.2.1"),
        (1, 2, 1, "4420", NQN, "192.0.2.1"),
        (1, 2, 3, "4420", NQN, "192.0.2.2"),
        (1, 1, 4, "8009", DISCOVERY, "192.0.2.2"),
    ]
    flags = [struct.unpack_from("<H", log, 1024 * number + 10)[0] for number in range(1, 5)]
    assert [each & 1 for each in flags] == [1, 0, 0, 1]  # DUPRETINFO


def test_the_discovery_log_names_ports_subsystems_and_referrals() -> None:
    """Itself and every subsystem at every port, wildcards as the address the host has reached, then referrals."""
    target, _ = target_with()
    target.set_ports([Port(1, "0.0.0.0", 4420), Port(2, "::1", 8009, discovery_only=True)])
    target.set_referrals([Referral("192.0.2.9", number=5)])
    host = admin_queue(target, subsystem=DISCOVERY)
    head = log_page(host, 0x70, 1024)
    generation, count = struct.unpack_from("<QQ", head)
    assert generation == target.generation
    assert entries(log_page(host, 0x70, 1024 * (1 + count))) == [
        (1, 3, 1, "4420", DISCOVERY, "192.0.2.7"),
        (1, 2, 1, "4420", NQN, "192.0.2.7"),
        (2, 3, 2, "8009", DISCOVERY, "::1"),
        (1, 1, 5, "8009", DISCOVERY, "192.0.2.9"),
    ]


def test_a_discovery_controller_tells_of_changes() -> None:
    """Subsystems and referrals that come and go are one event each time the log was read."""
    target, _ = target_with()
    host = admin_queue(target, subsystem=DISCOVERY)
    assert host.one(SET, cdw=(0x0B, 1 << 31)).status == 0
    assert host.command(AER, cid=60) == []
    target.add(Subsystem("nqn.2024-01.org.example:more", "S2"))
    assert [each.result for each in host.answers()] == [0x70_F0_02]
    assert host.command(AER, cid=61) == []
    log_page(host, 0x70, 1024)
    target.remove("nqn.2024-01.org.example:more")
    assert [each.cid for each in host.answers()] == [61]


def test_a_discovery_controller_does_nothing_else() -> None:
    """Other opcodes, structures, log pages, features and I/O queues are refused."""
    target, _ = target_with()
    host = admin_queue(target, subsystem=DISCOVERY)
    assert host.data(IDENTIFY, cdw=(1,), length=4096)[111] == 2
    for opcode in set(range(256)) - set(admin_commands.DISCOVERY_HANDLERS) - {0x7F}:
        assert host.status(opcode) == S.INVALID_OPCODE
    for cns in set(range(256)) - set(DISCOVERY_STRUCTURES):
        assert host.status(IDENTIFY, cdw=(cns,), length=4096) == S.INVALID_FIELD
    assert host.status(GET_LOG, cdw=(2 | 127 << 16,), length=512) == S.INVALID_LOG_PAGE
    assert host.one(SET, cdw=(6, 0)).status == S.INVALID_FIELD
    assert host.one(SET, cdw=(0x0B, 1 << 8)).status == S.INVALID_FIELD
    number = host.queue.controller.number if host.queue.controller else 0
    assert Host(target).connect(qid=1, controller=number, subsystem=DISCOVERY).status == S.CONNECT_INVALID


# --- what is offered


def test_names_and_numbers_are_checked() -> None:
    """Names that are no NQN, strings too long for Identify, and numbers out of range are refused when made."""
    for name in ("", "disk", "nqn.", "nqn." + "x" * 220, "nqn.a\0b"):
        with pytest.raises(UsageError):
            check_nqn(name)
    for serial, model in (("x" * 21, "m"), ("é", "m"), ("x", "m" * 41), ("x", "\n")):
        with pytest.raises(UsageError):
            Subsystem(NQN, serial, model)
    for nsid in (0, NAMESPACES_MAX + 1):
        with pytest.raises(UsageError):
            namespace(nsid)
    with pytest.raises(UsageError):
        namespace(1, ana_group=0)
    with pytest.raises(UsageError):
        namespace(1, MemoryDevice(8, 1024))
    with pytest.raises(UsageError):
        Namespace(1, MemoryDevice(), uuid=b"short")


def test_what_is_offered_is_offered_once() -> None:
    """A second subsystem or namespace of the same name is a conflict; removing what is not there is an error."""
    target, subsystem = target_with()
    with pytest.raises(ConflictError):
        target.add(Subsystem(NQN, "x"))
    with pytest.raises(ConflictError):
        target.add(Subsystem(DISCOVERY, "x"))
    with pytest.raises(ConflictError):
        subsystem.add(namespace(1))
    with pytest.raises(NotFoundError):
        subsystem.remove(2)
    with pytest.raises(NotFoundError):
        Target().remove(NQN)
    with pytest.raises(NotFoundError):
        Target().set_hosts(NQN, None)


def test_removing_a_subsystem_ends_its_controllers() -> None:
    """Hosts of a subsystem that is gone are disconnected, and cannot come back."""
    admin, queue, _, subsystem = pair()
    target = admin.queue.target
    target.remove(NQN)
    assert admin.closed
    assert queue.closed
    assert subsystem.controllers == {}
    assert Host(target).connect().status == S.CONNECT_INVALID


def test_events_have_a_bit_each() -> None:
    """Every event but reservation notices, which have a mask, is enabled by a bit of its own."""
    assert set(controllers.EVENT_BITS) == set(Event) - {Event.RESERVATION}
    assert len(set(controllers.EVENT_BITS.values())) == len(controllers.EVENT_BITS)
