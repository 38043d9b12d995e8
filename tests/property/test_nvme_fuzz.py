"""Any command and any damage over real sockets: a status or the end of the connection, never success for nonsense.

The oracle is a model of what a namespace may be told, written from the specification: a command that succeeds must be
one the model allows, and have exactly its effect; one that fails has none.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import attrs
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from space.projections.nvme.queue import Pool, Pools
from space.projections.nvme.server import Listener, Server
from tests.nvme_initiator import (
    CC,
    CC_ENABLE,
    FCTYPE_DISCONNECT,
    FCTYPE_PROPERTY_GET,
    FCTYPE_PROPERTY_SET,
    PSDT_SGL,
    SGL_OFFSET,
    SGL_TRANSPORT,
    Admin,
    Completion,
    Digest,
    EndedError,
    Host,
    Io,
    IoQueue,
    Pdu,
    Queue,
    ViolationError,
    encode,
    entry,
    sgl,
)
from tests.nvme_support import NQN, MemoryDevice, namespace, target_with

BLOCK: Final = 512
BLOCKS: Final = 256
MDTS: Final = 1 << 20
ALL: Final = 0xFFFF_FFFF
INVALID_OPCODE: Final = 0x001
INTERNAL_ERROR: Final = 0x006

IDENTIFY_CNS: Final = {*range(4), *range(5, 9), *range(0x10, 0x14), 0x1A, 0x1B, 0x1C}
LOG_PAGES: Final = {0, 1, 2, 3, 4, 5, 0x0C, 0x80}
FEATURES: Final = {1, 2, 4, 5, 6, 7, 0x0A, 0x0B, 0x0E, 0x0F, 0x16, 0x19, 0x81, 0x82, 0x83}
DATA_FEATURES: Final = {0x0E: 8, 0x16: 512, 0x81: 16}
"""Those whose value is a data structure, of so many bytes."""
PROPERTIES: Final = {0x00, 0x08, 0x14, 0x1C, 0x68}

U32 = st.one_of(
    st.integers(0, 9),
    st.sampled_from([BLOCKS - 1, BLOCKS, 0xFFFF, 1 << 16, 1 << 25, 1 << 30, 1 << 31, ALL]),
    st.integers(0, ALL),
)
NSID = st.one_of(st.just(1), st.sampled_from([0, 2, 1024, 1025, ALL - 1, ALL]), st.integers(0, ALL))


@attrs.frozen
class Shot:
    """A command as it is sent; ``length`` and ``kind`` are the descriptor's."""

    opcode: int
    nsid: int = 1
    cdw: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    kind: int = SGL_TRANSPORT
    length: int = 0
    address: int = 0
    flags: int = PSDT_SGL
    data: bytes = b""
    reserved: tuple[int, int, int] = (0, 0, 0)

    @property
    def range(self) -> tuple[int, int]:
        """First block, and number of blocks."""
        return self.cdw[0] | self.cdw[1] << 32, (self.cdw[2] & 0xFFFF) + 1

    def answered_by_data(self, queue: Queue) -> bool:
        """Whether success has data: most features are a dword of the completion instead."""
        if self.opcode != Admin.GET_FEATURES or isinstance(queue, IoQueue):
            return True
        return self.cdw[0] & 0xFF in DATA_FEATURES and self.cdw[0] >> 8 & 7 != 3

    def begin(self, queue: Queue) -> asyncio.Future[Completion]:
        """Sends it: with its data in the capsule if the descriptor says so, else for R2Ts that ask for it."""
        direction = (self.nsid if self.opcode == Admin.FABRICS else self.opcode) & 3
        return queue.begin(
            self.opcode,
            nsid=self.nsid,
            cdw=self.cdw,
            data=self.data,
            in_capsule=self.kind == SGL_OFFSET,
            wanted=min(self.length, 2 * MDTS) if direction == 2 and self.answered_by_data(queue) else 0,
            dptr=sgl(self.length, self.kind, address=self.address),
            flags=self.flags,
            cdw2=self.reserved[0],
            cdw3=self.reserved[1],
            mptr=self.reserved[2],
        )


Right = tuple[int, tuple[int, ...], int]
"""Namespace, dwords 10 to 12 and length of the data of a command as it should be, or may be at best."""


def right_io(draw: st.DrawFn, opcode: int) -> Right:
    """Of an I/O command."""
    lba, count = draw(st.integers(0, BLOCKS - 1)), draw(st.integers(1, 9))
    if opcode == Io.DATASET_MANAGEMENT:
        return 1, (count - 1, 4, 0), count * 16
    if opcode == Io.COPY:
        return 1, (lba, 0, count - 1), count * 32
    if opcode in (Io.RESERVATION_REGISTER, Io.RESERVATION_ACQUIRE, Io.RESERVATION_RELEASE):
        action, kind = draw(st.integers(0, 2)), draw(st.integers(0, 7))
        return 1, (action | kind << 8, 0, 0), 8 if opcode == Io.RESERVATION_RELEASE else 16
    if opcode == Io.RESERVATION_REPORT:
        return 1, (count - 1, 1, 0), count * 4
    nsid = FCTYPE_DISCONNECT if opcode == Admin.FABRICS else 1
    sized = opcode in (Io.READ, Io.WRITE, Io.COMPARE)
    return nsid, (0 if opcode == Admin.FABRICS else lba, 0, count - 1), count * BLOCK if sized else 0


def right_admin(draw: st.DrawFn, opcode: int) -> Right:
    """Of an admin command."""
    number = draw(st.one_of(st.integers(0, 0x1F), st.integers(0x7E, 0x84)))
    if opcode == Admin.FABRICS:
        nsid = draw(st.sampled_from([FCTYPE_PROPERTY_GET, FCTYPE_PROPERTY_SET, 1, 5, 8]))
        offset = draw(st.sampled_from([*sorted(PROPERTIES), CC, 0x20, 0x24]))
        return nsid, (0 if offset else 1, offset, CC_ENABLE), 1024 if nsid == 1 else 0
    if opcode == Admin.GET_LOG_PAGE:
        dwords = draw(st.sampled_from([1, 16, 128, 1024]))
        return 1, (number | (dwords - 1) << 16, 0, 0), dwords * 4
    if opcode == Admin.IDENTIFY:
        return draw(st.integers(0, 2)), (number, 0, 0), 4096
    if opcode in (Admin.GET_FEATURES, Admin.SET_FEATURES):
        nsid = draw(st.sampled_from([0, 1, ALL]))
        return nsid, (number, draw(st.integers(0, 1)), 0), DATA_FEATURES.get(number, 0)
    return 0, (number, 0, 0), 0


FIELDS: Final = ("nsid", "cdw10", "cdw11", "cdw12", "kind", "length", "address", "flags", "reserved", "size")


@st.composite
def shots(draw: st.DrawFn, opcodes: st.SearchStrategy[int], right: Callable[[st.DrawFn, int], Right]) -> Shot:
    """Commands right but for a few fields, which hold anything."""
    opcode = draw(opcodes)
    wrong = draw(st.sets(st.sampled_from(FIELDS), max_size=3))
    nsid, words, length = right(draw, opcode)
    nsid = draw(NSID) if "nsid" in wrong else nsid
    cdw = tuple(draw(U32) if f"cdw{10 + at}" in wrong else word for at, word in enumerate(words))
    sends = (nsid if opcode == Admin.FABRICS else opcode) & 3 == 1
    kind = draw(st.sampled_from([SGL_TRANSPORT, SGL_OFFSET])) if sends else SGL_TRANSPORT
    kind = draw(st.integers(0, 255)) if "kind" in wrong else kind
    if "length" in wrong:
        length = draw(st.one_of(st.sampled_from([0, 4, 8, 16, 512, 4096, MDTS, MDTS + 4]), U32))
    size = min(length, 4096) if kind == SGL_OFFSET else length if length <= MDTS else 0
    if "size" in wrong and kind == SGL_OFFSET:
        size = draw(st.integers(0, 8192))
    pattern = draw(st.one_of(st.binary(max_size=48), _RANGE, _SOURCE))
    return Shot(
        opcode,
        nsid,
        (*cdw, 0, 0, 0),
        kind,
        length,
        draw(U32) if "address" in wrong else 0,
        draw(st.integers(0, 255)) if "flags" in wrong else PSDT_SGL,
        (pattern * (size // max(len(pattern), 1) + 1))[:size].ljust(size, b"\0"),
        (draw(U32), draw(U32), draw(U32)) if "reserved" in wrong else (0, 0, 0),
    )


_RANGE: Final = st.builds(struct.pack, st.just("<4xIQ"), st.integers(0, BLOCKS + 1), st.integers(0, BLOCKS))
_SOURCE: Final = st.builds(struct.pack, st.just("<8xQH14x"), st.integers(0, BLOCKS), st.integers(0, 20))
"""What Dataset Management and Copy are told."""


@attrs.define
class Place:
    """A server over a device in memory, and a host."""

    server: Server
    port: int
    device: MemoryDevice
    host: Host


@contextlib.asynccontextmanager
async def place(*, digests: Digest = Digest.NONE, pools: Pools | None = None) -> AsyncIterator[Place]:
    """A new one; afterwards nothing of it may be left."""
    device = MemoryDevice(BLOCKS, BLOCK)
    target, subsystem = target_with(namespace(1, device))
    server = Server(target, pools=pools)
    (port,) = await server.start([Listener("127.0.0.1", 0)])
    try:
        async with await Host.connect(port.service, NQN, digests=digests) as host:
            yield Place(server, port.service, device, host)
    finally:
        await server.close()
    assert server.pools.fetched.used == server.pools.executing.used == 0
    assert subsystem.controllers == {}


def run(scenario: Callable[[Place], Awaitable[None]], *, digests: Digest = Digest.NONE) -> None:
    """Runs a scenario."""

    async def main() -> None:
        async with place(digests=digests) as ready:
            await scenario(ready)

    asyncio.run(main())


async def outcome(future: asyncio.Future[Completion]) -> Completion | None:
    """How a command ended; None if the connection did instead.  A violation of the transport is the test's failure."""
    try:
        completion = await future
    except EndedError:
        return None
    assert completion.status != INTERNAL_ERROR
    return completion


# --- the model


def after(shot: Shot, held: bytes) -> bytes | None:
    """What the namespace holds after a command succeeded; None if it may not succeed."""
    lba, count = shot.range
    inside = lba + count <= BLOCKS
    if shot.opcode == Admin.FABRICS:
        return held if shot.nsid & 0xFF == FCTYPE_DISCONNECT and not shot.cdw[0] & 0xFFFF else None
    if shot.opcode == Io.FLUSH:
        return held if shot.nsid in (1, ALL) else None
    if shot.nsid != 1:
        return None
    data = shot.data[shot.address :] if shot.kind == SGL_OFFSET else shot.data
    exact = inside and shot.length == count * BLOCK
    start, end = lba * BLOCK, (lba + count) * BLOCK
    if shot.opcode == Io.WRITE:
        return held[:start] + data[: shot.length] + held[end:] if exact else None
    if shot.opcode == Io.COMPARE:
        return held if exact and held[start:end] == data[: shot.length] else None
    if shot.opcode == Io.READ:
        return held if exact else None
    if shot.opcode == Io.VERIFY:
        return held if inside else None
    if shot.opcode == Io.WRITE_ZEROES:
        return held[:start] + bytes(count * BLOCK) + held[end:] if inside else None
    if shot.opcode == Io.DATASET_MANAGEMENT:
        return _deallocated(shot, data, held)
    if shot.opcode == Io.COPY:
        return _copied(shot, data, held)
    if shot.opcode in (Io.RESERVATION_REGISTER, Io.RESERVATION_ACQUIRE):
        return held if shot.length == 16 else None
    if shot.opcode == Io.RESERVATION_RELEASE:
        return held if shot.length == 8 else None
    if shot.opcode == Io.RESERVATION_REPORT:
        return held if shot.length == (shot.cdw[0] + 1) * 4 else None
    return None


def _deallocated(shot: Shot, data: bytes, held: bytes) -> bytes | None:
    size = ((shot.cdw[0] & 0xFF) + 1) * 16
    if shot.length < size:
        return None
    changed = bytearray(held)
    for blocks, first in struct.iter_unpack("<4xIQ", data[:size]):
        if first + blocks > BLOCKS:
            return None
        if shot.cdw[1] & 4:
            changed[first * BLOCK : (first + blocks) * BLOCK] = bytes(blocks * BLOCK)
    return bytes(changed)


def _copied(shot: Shot, data: bytes, held: bytes) -> bytes | None:
    size = ((shot.cdw[2] & 0xFF) + 1) * 32
    if shot.length < size or shot.cdw[2] >> 8 & 15:
        return None
    parts = b""
    for first, last in struct.iter_unpack("<8xQH14x", data[:size]):
        if first + last + 1 > BLOCKS:
            return None
        parts += held[first * BLOCK : (first + last + 1) * BLOCK]
    start = (shot.cdw[0] | shot.cdw[1] << 32) * BLOCK
    return held[:start] + parts + held[start + len(parts) :] if start + len(parts) <= len(held) else None


# --- commands

IO_OPCODES = st.one_of(*[st.sampled_from([int(each) for each in Io])] * 4, st.integers(0, 255))
ADMIN_OPCODES = st.one_of(*[st.sampled_from([int(each) for each in Admin])] * 4, st.integers(0, 255))


@given(
    st.lists(shots(IO_OPCODES, right_io), min_size=1, max_size=6), st.sampled_from([Digest.NONE, Digest.BOTH])
)
def test_an_io_command_succeeds_only_as_the_model_allows(volley: list[Shot], digests: Digest) -> None:
    """Any opcode with any fields: success has the model's effect, anything else leaves the namespace as it was."""

    async def scenario(ready: Place) -> None:
        (queue,) = ready.host.queues
        held = bytes(range(256)) * (BLOCKS * BLOCK // 256)
        ready.device.data[:] = held
        for shot in volley:
            future = shot.begin(queue)
            partner = queue.begin(Io.FLUSH, nsid=1)  # for half a fused operation, to be over
            done = await outcome(future)
            if done is None:
                event("the connection ended")
                assert bytes(ready.device.data) == held
                break
            event("success" if not done.status else f"status {done.status:#05x}")
            if shot.opcode not in {*Io, Admin.FABRICS} - {Io.WRITE_UNCORRECTABLE} and not shot.flags & 3:
                assert done.status == INVALID_OPCODE
            if not done.status:
                expected = after(shot, held)
                assert expected is not None
                held = expected
            assert bytes(ready.device.data) == held
            if shot.opcode == Admin.FABRICS and not done.status:
                break
            await outcome(partner)
        await ready.host.admin.keep_alive()

    run(scenario, digests=digests)


@st.composite
def proper(draw: st.DrawFn) -> Shot:
    """Commands right in every respect but, at times, their range."""
    opcode = draw(st.sampled_from([Io.WRITE, Io.READ, Io.WRITE_ZEROES, Io.VERIFY]))
    lba, count = draw(st.integers(0, BLOCKS + 1)), draw(st.integers(1, 16))
    sized = opcode in (Io.WRITE, Io.READ)
    data = draw(st.binary(min_size=1, max_size=9)) * (count * BLOCK) if opcode == Io.WRITE else b""
    kind = draw(st.sampled_from([SGL_TRANSPORT, SGL_OFFSET])) if opcode == Io.WRITE else SGL_TRANSPORT
    bits = draw(st.sampled_from([0, 1 << 30, 1 << 31]))
    return Shot(
        opcode,
        cdw=(lba, 0, (count - 1) | bits, 0, 0, 0),
        kind=kind,
        length=count * BLOCK if sized else 0,
        data=data[: count * BLOCK],
    )


@given(st.lists(proper(), min_size=1, max_size=12))
def test_a_proper_io_command_succeeds_exactly_within_the_namespace(volley: list[Shot]) -> None:
    """What the model allows succeeds, with its effect; the rest is out of range."""

    async def scenario(ready: Place) -> None:
        held = bytes(BLOCKS * BLOCK)
        for shot in volley:
            done = await outcome(shot.begin(ready.host.queues[0]))
            assert done is not None
            expected = after(shot, held)
            assert done.status == (0x080 if expected is None else 0)
            held = held if expected is None else expected
            assert bytes(ready.device.data) == held
            if shot.opcode == Io.READ and not done.status:
                lba, count = shot.range
                assert done.data == held[lba * BLOCK : (lba + count) * BLOCK]

    run(scenario)


def admin_allows(shot: Shot) -> bool:
    """Whether an admin command names something there is."""
    low = shot.cdw[0] & 0xFF
    if shot.opcode == Admin.IDENTIFY:
        return low in IDENTIFY_CNS and shot.length == 4096
    if shot.opcode == Admin.GET_LOG_PAGE:
        dwords = (shot.cdw[0] >> 16 | (shot.cdw[1] & 0xFFFF) << 16) + 1
        return low in LOG_PAGES and shot.length == dwords * 4
    if shot.opcode == Admin.GET_FEATURES:
        return low in FEATURES and shot.cdw[0] >> 8 & 7 <= 3
    if shot.opcode == Admin.SET_FEATURES:
        return low in FEATURES - {0x81} and not shot.cdw[0] >> 31
    if shot.opcode == Admin.FABRICS:
        kind = shot.nsid & 0xFF
        if kind == FCTYPE_PROPERTY_GET:
            return shot.cdw[1] in PROPERTIES and shot.cdw[0] & 7 == (1 if not shot.cdw[1] else 0)
        return kind == FCTYPE_PROPERTY_SET and shot.cdw[1] == CC and not shot.cdw[0] & 7
    return shot.opcode in set(Admin)


@given(st.lists(shots(ADMIN_OPCODES, right_admin), min_size=1, max_size=6))
def test_an_admin_command_succeeds_only_for_what_there_is(volley: list[Shot]) -> None:
    """Any opcode with any fields: unknown opcodes are told so, unknown structures, pages and features never succeed."""

    async def scenario(ready: Place) -> None:
        admin = ready.host.admin
        for shot in volley:
            future = shot.begin(admin)
            alive = await outcome(admin.begin(Admin.KEEP_ALIVE))
            if shot.opcode == Admin.ASYNC_EVENT_REQUEST and not future.done():
                continue
            done = await outcome(future)
            if done is None or alive is None:
                event("the connection ended")
                break
            event("success" if not done.status else f"status {done.status:#05x}")
            if shot.opcode not in set(Admin) and not shot.flags & 3 and not alive.status:
                assert done.status == INVALID_OPCODE
            assert done.status or admin_allows(shot)
            if alive.status:
                break  # disabled by its configuration
        assert not any(ready.device.data)

    run(scenario)


@pytest.mark.parametrize("number", range(256))
def test_what_a_number_names(number: int) -> None:
    """Each number as structure, log page and feature: there, or refused with the status that belongs to it."""

    async def scenario(ready: Place) -> None:
        admin = ready.host.admin
        for opcode, known, words, status in (
            (Admin.IDENTIFY, IDENTIFY_CNS, (number,), 0x002),
            (Admin.GET_LOG_PAGE, LOG_PAGES, (number | 1023 << 16,), 0x109),
            (Admin.GET_FEATURES, FEATURES, (number | 3 << 8,), 0x002),
        ):
            wanted = 0 if opcode == Admin.GET_FEATURES else 4096
            done = await admin.ask(opcode, nsid=1, cdw=words, wanted=wanted)
            assert done.status == (0 if number in known else status)

    run(scenario)


# --- PDUs


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Ways to damage a PDU: a byte changed, the end cut off, bytes put in."""
    kind = draw(st.sampled_from(["change", "cut", "insert"]))
    at, mask = draw(st.integers(0, 2000)), draw(st.integers(1, 255))
    junk = draw(st.binary(min_size=1, max_size=40))

    def spoil(pdu: bytes) -> bytes:
        place = at % len(pdu)
        if kind == "cut":
            return pdu[:place]
        if kind == "insert":
            return pdu[:place] + junk + pdu[place:]
        return pdu[:place] + bytes([pdu[place] ^ mask]) + pdu[place + 1 :]

    return spoil


@given(damages(), st.booleans(), st.sampled_from(list(Digest)), st.integers(1, 4))
def test_damage_on_the_way_is_never_written_under_digests(
    spoil: Callable[[bytes], bytes], in_capsule: bool, digests: Digest, blocks: int
) -> None:
    """A damaged PDU ends in a status or the connection's end; with digests no block holds what was not sent."""
    data = bytes(range(255, -1, -1)) * 2 * blocks

    async def scenario(ready: Place) -> None:
        async with await Host.connect(ready.port, NQN, digests=digests) as host:
            (queue,) = host.queues
            sent = asyncio.Event()

            def late(pdu: bytes) -> bytes:
                sent.set()
                return spoil(pdu)

            queue.spoil_data = late
            future = queue.begin(
                Io.WRITE,
                nsid=1,
                cdw=(0, 0, blocks - 1),
                data=data,
                in_capsule=in_capsule,
                spoil=late if in_capsule else None,
            )
            await sent.wait()
            queue.finish()
            try:
                done = await outcome(future)
            except ViolationError:  # an answer to the command id the damage has made
                assert not digests & Digest.HEADER
                done = None
            event("ended" if done is None else f"status {done.status:#05x}")
        written = bytes(ready.device.data)
        if digests == Digest.BOTH:
            assert written in (bytes(len(written)), data.ljust(len(written), b"\0"))
        assert await ready.host.queues[0].read(1, 0, blocks, BLOCK) == written[: blocks * BLOCK]

    run(scenario)


@given(st.binary(max_size=600), st.booleans())
def test_garbage_ends_one_connection(garbage: bytes, greeted: bool) -> None:
    """Whatever a peer sends, before or after ICReq, its connection ends and the host beside it works on."""

    async def scenario(ready: Place) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", ready.port)
        icreq = encode(Pdu.ICREQ, bytes(120), b"", Digest.NONE)
        with contextlib.suppress(ConnectionError):
            writer.write((icreq if greeted else b"") + garbage)
            writer.write_eof()
            await reader.read()
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)
        await ready.host.queues[0].write(1, 0, b"w" * BLOCK, BLOCK)
        assert not any(ready.device.data[BLOCK:])

    run(scenario)


# --- memory


def test_data_asked_for_is_bounded_over_all_connections() -> None:
    """Hosts that never send what they are asked for are not asked for more than the pool, and one transfer each."""
    room, transfer, hosts = 4 << 20, 1 << 20, 8

    async def main() -> None:
        async with place(pools=Pools(fetched=Pool(room))) as ready, contextlib.AsyncExitStack() as stack:
            ready.device.data = bytearray(2 * transfer)
            queues = []
            for _ in range(hosts):
                host = await stack.enter_async_context(await Host.connect(ready.port, NQN))
                queues.append(host.queues[0])
            for queue in queues:
                queue.answer_r2t = False
                for _ in range(20):
                    future = queue.begin(
                        Io.WRITE,
                        nsid=1,
                        cdw=(0, 0, transfer // BLOCK - 1),
                        data=bytes(transfer),
                        in_capsule=False,
                    )
                    future.add_done_callback(asyncio.Future.exception)
            for queue in queues:
                await queue.read(1, 0, 1, BLOCK)
            asked = [queue.asked for queue in queues]
            assert min(asked) >= transfer
            assert sum(asked) <= room + hosts * transfer
            assert sum(asked) == ready.server.pools.fetched.used

    asyncio.run(main())


def test_announced_lengths_cost_nothing() -> None:
    """A hundred peers that announce PDUs of 4 GiB, and data of 4 GiB, are given no memory for them."""

    async def main() -> None:
        async with place() as ready, contextlib.AsyncExitStack() as stack:
            capsule = encode(Pdu.COMMAND, entry(Io.WRITE, 1, nsid=1, dptr=sgl(ALL)), b"", Digest.NONE)
            tracemalloc.start()
            stack.callback(tracemalloc.stop)
            for number in range(100):
                queue = await stack.enter_async_context(await Queue.dial(ready.port))
                queue.send_raw(capsule[:4] + struct.pack("<I", ALL - number) + capsule[8:])
                queue.send_raw(b"\0" * 1000)
            await ready.host.admin.keep_alive()
            _, peak = tracemalloc.get_traced_memory()
            assert peak < 100 * (256 << 10), (
                "the bound of an idle connection, and as much for the host's side"
            )

    asyncio.run(main())


def test_a_controller_survives_being_configured_at_random() -> None:
    """Every single bit of CC set or cleared leaves a controller that can be enabled again."""

    async def scenario(ready: Place) -> None:
        admin = ready.host.admin
        for bit in range(32):
            await admin.ask(Admin.FABRICS, nsid=FCTYPE_PROPERTY_SET, cdw=(0, CC, CC_ENABLE ^ 1 << bit))
            await admin.set_property(CC, 0)
            await admin.wait_status(1, 0)
            await admin.set_property(CC, CC_ENABLE)
            await admin.wait_status(0b11, 1)
            await admin.identify(1)

    run(scenario)
