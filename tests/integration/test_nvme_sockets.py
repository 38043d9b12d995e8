"""The NVMe/TCP view over real sockets and a real store, asked by a host that shares no code with it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import random
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

import space
from space._node.local_block import BlockWriter, LocalBlockDevice, namespace_identity
from space._node.reading import Reading
from space._node.store import Store
from space.events.ids import CapsuleId
from space.policy.model import Policy
from space.projections.nvme.connection import Limits
from space.projections.nvme.server import Listener, Server
from space.projections.nvme.target import Namespace, Subsystem, Target
from space.wal.faulty_disk import FaultyDisk
from tests.nvme_initiator import (
    CAP,
    CC,
    CC_ENABLE,
    CSTS,
    DISCOVERY_NQN,
    VS,
    Admin,
    AdminQueue,
    Completion,
    Digest,
    EndedError,
    Host,
    Io,
    IoQueue,
    Pdu,
    Queue,
    encode,
    entry,
    sgl,
    status_of,
)

NQN: Final = "nqn.2014-08.org.example:sockets"
RAW: Final = Policy.from_document({"compression": "none", "dedupe": False})
SIZE: Final = 2 << 20
SEGMENT_BYTES: Final = 4 << 20
OTHER_HOST: Final = "nqn.2014-08.org.nvmexpress:uuid:11111111-2222-4333-8444-555555555555"
NAMESPACE_CHANGED: Final = 0x0004_0002
"""Asynchronous event: a notice (2), of a changed namespace attribute (0), to be read in log page 04h."""

INVALID_OPCODE, INVALID_FIELD, ABORTED = 0x001, 0x002, 0x007
FUSED_FAILED, WRITE_PROTECTED, OUT_OF_RANGE = 0x009, 0x020, 0x080
RESERVATION_CONFLICT, TRANSPORT_ERROR, COMPARE_FAILURE = 0x083, 0x022, 0x285


@attrs.define
class Place:
    """A server over a store, as a test has it."""

    store: Store
    server: Server
    subsystem: Subsystem
    port: int
    writer: BlockWriter
    devices: list[LocalBlockDevice] = attrs.field(factory=list)

    def offer(
        self, nsid: int, capsule: CapsuleId, reading: Reading | None = None, *, read_only: bool = False
    ) -> None:
        """Offers a capsule as a namespace; from another reading than the store it cannot be written."""
        writer = self.writer if reading is None else None
        device = LocalBlockDevice(reading or self.store, capsule, writer=writer)
        self.devices.append(device)
        names = namespace_identity(capsule)
        self.subsystem.add(
            Namespace(nsid, device, names.uuid, nguid=names.nguid, eui64=names.eui64, read_only=read_only)
        )

    async def connect(self, **options: Any) -> Host:
        """A host with a controller of the subsystem."""
        return await Host.connect(self.port, NQN, **options)


@contextlib.asynccontextmanager
async def serving(store: Store, limits: Limits | None = None) -> AsyncIterator[Place]:
    """A server on a free port of loopback, of which nothing is left afterwards."""
    target = Target()
    subsystem = Subsystem(NQN, "SN0001")
    target.add(subsystem)
    server = Server(target, limits=limits)
    (port,) = await server.start([Listener("127.0.0.1", 0)])
    place = Place(store, server, subsystem, port.service, BlockWriter(store))
    try:
        yield place
    finally:
        await server.close()
        await place.writer.close()
        for device in place.devices:
            device.close()
    assert server.connections == 0
    assert server.pools.fetched.used == server.pools.executing.used == 0
    assert subsystem.controllers == {}


def block_capsule(store: Store, block: int = 512, size: int = SIZE) -> CapsuleId:
    """A capsule of blocks."""
    return store.create(size=size, block_size=block, policy=RAW)


def run(
    path: Path,
    scenario: Callable[[Place], Awaitable[None]],
    *,
    blocks: Sequence[int] = (512,),
    limits: Limits | None = None,
) -> None:
    """Runs a scenario over a new store, with a namespace of each of these block sizes."""

    async def main() -> None:
        with space.open(path, segment_bytes=SEGMENT_BYTES) as store:
            async with serving(store, limits) as place:
                for nsid, block in enumerate(blocks, 1):
                    place.offer(nsid, block_capsule(store, block))
                await scenario(place)

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    """Lets the loop run until something holds; a minute is for ever."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event to tell of it
            await asyncio.sleep(0.01)


# --- discovery, connect, identify


def test_a_host_finds_its_way_from_the_discovery_service(tmp_path: Path) -> None:
    """The discovery log leads to an address and name that can be connected to, for one host as for the next."""

    async def scenario(place: Place) -> None:
        async with await Host.connect(place.port, DISCOVERY_NQN, queues=0) as host:
            identity = await host.admin.identify(1)
            assert identity[111] == 2, "CNTRLTYPE: a discovery controller"
            assert identity[768:1024].rstrip(b"\0").decode() == DISCOVERY_NQN
            head = await host.admin.log(0x70, 1024)
            generation, count, record_format = struct.unpack_from("<QQH", head)
            log = await host.admin.log(0x70, 1024 * (count + 1))
            assert struct.unpack_from("<Q", log) == (generation,)
            assert record_format == 0
            entries = [log[at : at + 1024] for at in range(1024, len(log), 1024)]
            found = {each[256:512].rstrip(b"\0").decode(): each for each in entries}
            assert set(found) == {DISCOVERY_NQN, NQN}
            assert found[NQN][:3] == bytes([3, 1, 2]), "TCP, IPv4, an NVM subsystem"
            assert struct.unpack_from("<H", found[NQN], 6) == (0xFFFF,), "the dynamic controller model"
            service, address = found[NQN][32:64], found[NQN][512:768]
        assert address.split(b"\0")[0].strip() == b"127.0.0.1"
        async with await Host.connect(int(service), NQN) as host:
            assert struct.unpack_from("<I", await host.admin.identify(2)) == (1,)

    run(tmp_path, scenario)


def check_controller(identity: bytes, host: Host) -> None:
    """What Identify Controller must hold in a fabrics I/O controller (Base Specification 2.0, figure 275)."""
    for text in (identity[4:24], identity[24:64], identity[64:72]):
        assert all(0x20 <= each <= 0x7E for each in text), "SN, MN and FR are ASCII, padded with spaces"
    assert struct.unpack_from("<H", identity, 78) == (host.number,), "CNTLID"
    assert identity[111] == 1, "CNTRLTYPE: an I/O controller"
    assert struct.unpack_from("<H", identity, 320)[0] > 0, "KAS: keep alive is mandatory over fabrics"
    assert identity[512] & 15 == identity[512] >> 4 == 6, "SQES"
    assert identity[513] & 15 == identity[513] >> 4 == 4, "CQES"
    assert struct.unpack_from("<H", identity, 514)[0] >= 128, "MAXCMD is mandatory, and as asked"
    nn, mnan = struct.unpack_from("<I", identity, 516)[0], struct.unpack_from("<I", identity, 540)[0]
    assert 0 < mnan <= nn
    assert struct.unpack_from("<I", identity, 536)[0] & 3 in (1, 2), "SGLs are mandatory over fabrics"
    assert struct.unpack_from("<I", identity, 536)[0] & 1 << 20, "offsets in capsules"
    assert identity[768:1024].rstrip(b"\0").decode() == NQN
    ioccsz, iorcsz, icdoff = struct.unpack_from("<IIH", identity, 1792)
    assert (ioccsz >= 4, iorcsz, icdoff) == (True, 1, 0), "TCP has no ICDOFF, and responses of 16 bytes"
    assert identity[1803] >= 1, "MSDBD"
    if identity[76] & 8:  # CMIC: ANA
        assert identity[342] > 0, "ANATT"
        assert 0 < struct.unpack_from("<I", identity, 348)[0] <= struct.unpack_from("<I", identity, 344)[0]


def check_namespace(data: bytes, block: int, size: int) -> None:
    """What Identify Namespace must hold (NVM Command Set 1.0, figure 97)."""
    nsze, ncap, nuse = struct.unpack_from("<QQQ", data)
    assert nsze * block == size
    assert nuse <= ncap <= nsze
    chosen = data[26] & 15
    assert chosen <= data[25], "FLBAS names one of NLBAF formats"
    metadata, lbads, _ = struct.unpack_from("<HBB", data, 128 + 4 * chosen)
    assert (metadata, 1 << lbads) == (0, block)
    assert data[33] & 7 == 1, "DLFEAT: deallocated blocks read as zeros"


def check_descriptors(data: bytes, namespace: bytes) -> None:
    """Identification descriptors: each once, of its length, and as the namespace's own structure has them."""
    found: dict[int, bytes] = {}
    at = 0
    while data[at + 1]:
        kind, length = data[at], data[at + 1]
        assert length == {1: 8, 2: 16, 3: 16, 4: 1}[kind]
        assert kind not in found
        found[kind] = data[at + 4 : at + 4 + length]
        at += 4 + length
    assert not any(data[at:])
    assert found[2] == namespace[104:120]
    assert found[1] == namespace[120:128]
    assert any(found[3])
    assert found[4] == b"\0"


def test_identify_agrees_with_the_specification(tmp_path: Path) -> None:
    """Properties, Identify structures, lists and descriptors are what the specification demands, and agree."""

    async def scenario(place: Place) -> None:
        async with await place.connect() as host:
            cap = await host.admin.property(CAP, 8)
            assert cap & 0xFFFF >= 127, "MQES: a depth of 128 and more"
            assert cap >> 37 & 1, "the NVM command set"
            assert await host.admin.property(CSTS) == 1
            assert await host.admin.property(CC) == CC_ENABLE
            identity = await host.admin.identify(1)
            check_controller(identity, host)
            assert struct.unpack_from("<I", identity, 80) == (await host.admin.property(VS),)
            active = await host.admin.identify(2)
            assert struct.unpack_from("<3I", active) == (1, 2, 0)
            assert await host.admin.identify(0x10) == active
            assert struct.unpack_from("<2I", await host.admin.identify(2, nsid=1)) == (2, 0)
            for nsid, block in ((1, 512), (2, 4096)):
                data = await host.admin.identify(0, nsid=nsid)
                check_namespace(data, block, SIZE)
                check_descriptors(await host.admin.identify(3, nsid=nsid), data)
            numbers = await host.admin.identify(0x13)
            assert struct.unpack_from("<HH", numbers) == (1, host.number)
            smart, firmware = await host.admin.log(2, 512), await host.admin.log(3, 512)
            assert smart[0] == 0, "no critical warning"
            assert firmware[0] & 7 == 1
            assert firmware[8:16] == identity[64:72]
            effects = struct.unpack("<512I", (await host.admin.log(5, 4096))[:2048])
            assert all(effects[opcode] & 1 for opcode in (2, 6, 8, 9, 10, 12, 24))
            assert all(effects[256 + opcode] & 1 for opcode in (0, 1, 2))
            await host.admin.keep_alive()

    run(tmp_path, scenario, blocks=(512, 4096))


def test_features_are_set_and_read_back(tmp_path: Path) -> None:
    """What a host sets it reads back; what it must not set is refused; the cache switched off is told."""

    async def scenario(place: Place) -> None:
        async with await place.connect() as host:
            admin = host.admin
            assert (await admin.feature(6)).result == 1
            await admin.set_feature(6, 0)
            assert (await admin.feature(6)).result == 0
            assert (await admin.feature(6, select=1)).result == 1, "the default stays"
            await admin.set_feature(0x0E, data=struct.pack("<Q", 1_700_000_000_000))
            (stamp,) = struct.unpack("<Q", (await admin.feature(0x0E, wanted=8)).data)
            assert stamp & (1 << 48) - 1 >= 1_700_000_000_000
            assert stamp >> 49 & 7 == 1, "set by a host"
            assert (await admin.feature(0x81, value=1, wanted=16)).data == host.identity["host_id"]
            assert await status_of(admin.set_feature(0x81, 1, data=bytes(16))) != 0
            assert await status_of(admin.set_feature(7, 3)) == 0x00C, (
                "queues are agreed on before they are made"
            )
            assert await status_of(admin.feature(0x77)) == INVALID_FIELD
            await admin.set_feature(0x0F, 60_000)
            assert (await admin.feature(0x0F)).result == 60_000

    run(tmp_path, scenario)


# --- data


class Model:
    """A namespace and what must be in it."""

    def __init__(self, nsid: int, block: int) -> None:
        self.nsid = nsid
        self.block = block
        self.blocks = SIZE // block
        self.data = bytearray(SIZE)

    def part(self, lba: int, count: int) -> bytes:
        """What some blocks must hold."""
        return bytes(self.data[lba * self.block : (lba + count) * self.block])

    def put(self, lba: int, data: bytes) -> None:
        """They hold this now."""
        self.data[lba * self.block : lba * self.block + len(data)] = data


async def work(queue: IoQueue, model: Model, first: int, last: int, rng: random.Random, steps: int) -> None:
    """Random commands on blocks ``first`` to ``last``, of which nobody else makes use meanwhile."""
    nsid, block = model.nsid, model.block
    for _ in range(steps):
        count = min(rng.choice((1, 2, 7, 8, 16, 64)), last - first)
        lba = rng.randrange(first, last - count + 1)
        data = rng.randbytes(count * block)
        step = rng.randrange(9)
        if step < 3:
            inside = len(data) <= queue.capsule_bytes and rng.random() < 0.5
            await queue.write(nsid, lba, data, block, fua=step == 0, in_capsule=inside)
            model.put(lba, data)
        elif step == 3:
            await queue.write_zeroes(nsid, lba, count, deallocate=rng.random() < 0.5)
            model.put(lba, bytes(len(data)))
        elif step == 4:
            await queue.deallocate(nsid, [(lba, count)])
            model.put(lba, bytes(len(data)))
        elif step == 5:
            source = rng.randrange(first, last - count + 1)
            if abs(source - lba) >= count:  # the order of a copy onto itself is nobody's promise
                await queue.copy(nsid, [(source, count)], lba)
                model.put(lba, model.part(source, count))
        elif step == 6:
            await queue.compare(nsid, lba, model.part(lba, count), block)
            assert await status_of(queue.compare(nsid, lba, data, block)) == COMPARE_FAILURE
        elif step == 7:
            held = model.part(lba, count)
            for expected, wanted in ((data, (COMPARE_FAILURE, FUSED_FAILED)), (held, (0, 0))):
                halves = await queue.compare_and_write(nsid, lba, expected, data, block)
                assert tuple(each.status for each in halves) == wanted
            model.put(lba, data)
        assert await queue.read(nsid, lba, count, block, fua=step == 8) == model.part(lba, count)


@pytest.mark.parametrize(
    "digests, queues, block, flow_control, hpda",
    [
        (Digest.NONE, 1, 512, True, 0),
        (Digest.HEADER, 2, 4096, True, 3),
        (Digest.DATA, 4, 512, False, 0),
        (Digest.BOTH, 4, 4096, True, 31),
        (Digest.BOTH, 1, 512, False, 7),
    ],
)
def test_random_work_on_every_path(
    tmp_path: Path, digests: Digest, queues: int, block: int, flow_control: bool, hpda: int
) -> None:
    """Many workers on some queues read exactly what they wrote, whatever way it went, and so does the store."""

    async def scenario(place: Place) -> None:
        model = Model(1, block)
        options = {"digests": digests, "hpda": hpda, "maxr2t": 3}
        async with await place.connect(queues=queues, flow_control=flow_control, **options) as host:
            assert all(queue.digests == digests for queue in host.queues)
            workers = 8
            share = model.blocks // workers
            await asyncio.gather(
                *(
                    work(
                        host.queues[at % queues], model, at * share, at * share + share, random.Random(at), 25
                    )
                    for at in range(workers)
                )
            )
            assert all(bool(queue.successes) != flow_control for queue in host.queues)
            step = (256 << 10) // block
            whole = [await host.queues[0].read(1, at, step, block) for at in range(0, model.blocks, step)]
            assert b"".join(whole) == model.data
            await host.queues[-1].verify(1, 0, model.blocks)
        capsule = place.devices[0].info().id
        assert await asyncio.to_thread(place.store.read, capsule, 0, SIZE) == bytes(model.data)

    run(tmp_path, scenario, blocks=(block,))


def test_a_depth_of_128_on_every_queue(tmp_path: Path) -> None:
    """Queues of 128 entries take 127 commands at once, and answer every one with its own data."""

    async def scenario(place: Place) -> None:
        async with await place.connect(queues=2, entries=128) as host:
            data = [random.Random(lba).randbytes(512) for lba in range(254)]
            done: list[Completion] = []
            for opcode in (Io.WRITE, Io.READ):
                futures = []
                for lba in range(254):
                    queue = host.queues[lba % 2]
                    options = {"data": data[lba]} if opcode == Io.WRITE else {"wanted": 512}
                    futures.append(queue.begin(opcode, nsid=1, cdw=(lba, 0, 0), **options))
                assert [queue.outstanding for queue in host.queues] == [127, 127]
                done = await asyncio.gather(*futures)
                assert {each.status for each in done} == {0}
            assert [each.data for each in done] == data

    run(tmp_path, scenario)


@pytest.mark.parametrize("digests", [Digest.NONE, Digest.BOTH])
def test_the_largest_transfer_in_many_pieces(tmp_path: Path, digests: Digest) -> None:
    """MDTS bytes travel by R2T in H2CData of any size, and a block more is refused."""

    async def scenario(place: Place) -> None:
        async with await place.connect(digests=digests, maxr2t=7) as host:
            (queue,) = host.queues
            mdts = 4096 << (await host.admin.identify(1))[77]
            data = random.Random(1).randbytes(mdts)
            for size in (queue.h2c_bytes, 64 << 10, 4096 + 4):
                queue.h2c_bytes = size
                await queue.write(1, 0, data, 512)
                assert await queue.read(1, 0, mdts // 512, 512) == data
                data = data[1:] + data[:1]
            assert await status_of(queue.write(1, 0, bytes(mdts + 512), 512)) == INVALID_FIELD
            assert await status_of(queue.read(1, 0, mdts // 512 + 1, 512)) == INVALID_FIELD

    run(tmp_path, scenario)


@pytest.mark.parametrize("maxr2t, under_way", [(0, 1), (2, 3), (200, 4)])
def test_several_r2ts_of_a_command(tmp_path: Path, maxr2t: int, under_way: int) -> None:
    """A command has as many R2Ts under way as host and target allow, and its data arrives whole."""

    async def scenario(place: Place) -> None:
        async with await place.connect(maxr2t=maxr2t) as host:
            (queue,) = host.queues
            data = random.Random(maxr2t).randbytes(256 << 10)
            queue.answer_r2t = False
            future = queue.begin(Io.WRITE, nsid=1, cdw=(8, 0, 511), data=data, in_capsule=False, cid=7)
            await queue.read(1, 0, 1, 512)
            assert queue.asked == under_way * (16 << 10)
            queue.answer_r2t = True
            queue.answer(7)
            assert (await future).status == 0
            assert await queue.read(1, 8, 512, 512) == data

    run(tmp_path, scenario, limits=Limits(r2t_bytes=16 << 10))


def test_the_end_of_a_namespace(tmp_path: Path) -> None:
    """Blocks beyond the end, by one or by 2^64, are refused, and a refused write changes nothing."""

    async def scenario(place: Place) -> None:
        async with await place.connect() as host:
            (queue,) = host.queues
            last = SIZE // 512 - 1
            await queue.write(1, last, b"E" * 512, 512)
            for lba, count in ((last, 2), (last + 1, 1), (2**55, 1), (2**64 - 1, 1), (2**64 - 1, 2)):
                assert await status_of(queue.write(1, lba, b"x" * 512 * count, 512)) == OUT_OF_RANGE
                assert await status_of(queue.read(1, lba, count, 512)) == OUT_OF_RANGE
                assert await status_of(queue.write_zeroes(1, lba, count)) == OUT_OF_RANGE
                assert await status_of(queue.verify(1, lba, count)) == OUT_OF_RANGE
                assert await status_of(queue.deallocate(1, [(0, 1), (lba, count)])) == OUT_OF_RANGE
                assert await status_of(queue.copy(1, [(0, count)], lba)) == OUT_OF_RANGE
            assert await queue.read(1, last, 1, 512) == b"E" * 512

    run(tmp_path, scenario)


def test_two_namespaces_are_apart(tmp_path: Path) -> None:
    """The same blocks of two namespaces hold different data, and a third one is nobody's."""

    async def scenario(place: Place) -> None:
        async with await place.connect(queues=2) as host:
            one, two = host.queues
            await asyncio.gather(one.write(1, 8, b"1" * 4096, 512), two.write(2, 1, b"2" * 4096, 4096))
            assert await two.read(1, 8, 8, 512) == b"1" * 4096
            assert await one.read(2, 1, 1, 4096) == b"2" * 4096
            assert await status_of(one.read(3, 0, 1, 512)) != 0
            await one.flush(0xFFFF_FFFF)
            assert place.store.wal.durable_index >= place.store.last

    run(tmp_path, scenario, blocks=(512, 4096))


def test_deallocated_space_comes_back(tmp_path: Path) -> None:
    """Blocks that were written count as used; deallocated ones do not, and read as zeros."""

    async def scenario(place: Place) -> None:
        async with await place.connect() as host:
            (queue,) = host.queues

            async def used() -> int:
                return int(struct.unpack_from("<Q", await host.admin.identify(0, nsid=1), 16)[0])

            assert await used() == 0
            await queue.write(1, 0, random.Random(2).randbytes(1 << 20), 512)
            assert await used() == 2048
            await queue.deallocate(1, [(0, 512), (1024, 512)])
            assert await used() == 1024
            assert await queue.read(1, 0, 512, 512) == bytes(256 << 10)

    run(tmp_path, scenario)


def test_namespaces_that_are_not_written(tmp_path: Path) -> None:
    """A read-only namespace and one of a past moment are read, say they are protected, and refuse every change."""

    async def main() -> None:
        with space.open(tmp_path, segment_bytes=SEGMENT_BYTES) as store:
            capsule = block_capsule(store)
            store.write(capsule, 0, b"before".ljust(512))
            moment = store.position
            store.write(capsule, 0, b"after".ljust(512))
            with store.at(f"@{moment}") as past:
                async with serving(store) as place:
                    place.offer(1, capsule)
                    place.offer(2, capsule, read_only=True)
                    place.offer(3, capsule, past)
                    async with await place.connect() as host:
                        (queue,) = host.queues
                        protected = [(await host.admin.identify(0, nsid=nsid))[99] & 1 for nsid in (1, 2, 3)]
                        assert protected == [0, 1, 1]
                        assert await queue.read(2, 0, 1, 512) == b"after".ljust(512)
                        assert await queue.read(3, 0, 1, 512) == b"before".ljust(512)
                        for nsid in (2, 3):
                            for change in (
                                queue.write(nsid, 0, bytes(512), 512),
                                queue.write_zeroes(nsid, 0, 1),
                                queue.deallocate(nsid, [(0, 1)]),
                                queue.copy(nsid, [(0, 1)], 8),
                            ):
                                assert await status_of(change) == WRITE_PROTECTED
                        await queue.write(1, 0, b"later".ljust(512), 512)
                        assert await queue.read(2, 0, 1, 512) == b"later".ljust(512)
                        assert await queue.read(3, 0, 1, 512) == b"before".ljust(512)

    asyncio.run(main())


def test_a_resize_is_told_and_seen(tmp_path: Path) -> None:
    """A host that waits for events hears of a new size once, finds it in the list, and uses the new blocks."""

    async def scenario(place: Place) -> None:
        capsule = place.devices[0].info().id
        async with await place.connect() as host:
            (queue,) = host.queues
            await host.admin.set_feature(0x0B, 1 << 8)
            event, second = host.admin.event(), host.admin.event()
            await host.admin.keep_alive()
            for size in (2 * SIZE, 3 * SIZE):
                await asyncio.to_thread(place.store.resize, capsule, size)
                place.subsystem.changed(1)
            assert (await event).result == NAMESPACE_CHANGED
            assert not second.done()
            assert struct.unpack("<2I", (await host.admin.log(4, 4096))[:8]) == (1, 0)
            assert struct.unpack_from("<Q", await host.admin.identify(0, nsid=1)) == (3 * SIZE // 512,)
            await queue.write(1, 3 * SIZE // 512 - 1, b"e" * 512, 512)
            await asyncio.to_thread(place.store.resize, capsule, SIZE)
            place.subsystem.changed(1)
            assert (await second).result == NAMESPACE_CHANGED
            assert await status_of(queue.read(1, SIZE // 512, 1, 512)) == OUT_OF_RANGE

    run(tmp_path, scenario)


def test_reservations_keep_the_other_host_out(tmp_path: Path) -> None:
    """Under Write Exclusive another host reads and does not write, until it preempts the holder."""

    async def scenario(place: Place) -> None:
        other_id = bytes(range(1, 17))
        async with (
            await place.connect() as one,
            await place.connect(host=OTHER_HOST, host_id=other_id) as two,
        ):
            (first,), (second,) = one.queues, two.queues
            await first.register(1, 0xA)
            await first.acquire(1, 1, 0xA)
            await first.write(1, 0, b"1" * 512, 512)
            assert await second.read(1, 0, 1, 512) == b"1" * 512
            assert await status_of(second.write(1, 0, b"2" * 512, 512)) == RESERVATION_CONFLICT
            assert await status_of(second.acquire(1, 1, 0xB)) == RESERVATION_CONFLICT
            await second.register(1, 0xB)
            await second.acquire(1, 1, 0xB, preempt=0xA)
            await second.write(1, 0, b"2" * 512, 512)
            assert await status_of(first.write(1, 0, b"3" * 512, 512)) == RESERVATION_CONFLICT
            data = await second.report(1)
            _, kind, registered = struct.unpack_from("<IBH", data)
            assert (kind, registered) == (1, 1)
            assert struct.unpack_from("<HB5xQ16s", data, 64) == (two.number, 1, 0xB, other_id)
            await second.release(1, 1, 0xB)
            await first.write(1, 0, b"3" * 512, 512)

    run(tmp_path, scenario)


def test_what_is_aborted_is_said_to_be(tmp_path: Path) -> None:
    """An event request that is aborted ends as aborted; a command that is not there is not aborted."""

    async def scenario(place: Place) -> None:
        async with await place.connect() as host:
            event = host.admin.event()
            await host.admin.keep_alive()
            cid = host.admin.new_cid() - 2
            assert not await host.admin.abort(1, 0x1234)
            assert await host.admin.abort(0, cid)
            assert (await event).status == ABORTED

    run(tmp_path, scenario)


# --- durability


@pytest.mark.parametrize("seed", range(6))
def test_power_loss_keeps_what_was_flushed(tmp_path: Path, seed: int) -> None:
    """The power goes: what was flushed or written with FUA is there, and any other write is there whole or not."""
    rng = random.Random(seed)
    disk = FaultyDisk.from_image({str(tmp_path / "there before"): b""}, random.Random(seed))
    disk.capacity = 1 << 30
    promised: dict[int, bytes] = {}
    possible: dict[int, set[bytes]] = {}

    class PowerLossError(OSError):
        """The machine stops here."""

    def hook(_operation: str, _path: str) -> None:
        raise PowerLossError

    async def scenario(place: Place) -> None:
        async with await place.connect(queues=2) as host:
            for step in range(60):
                queue = rng.choice(host.queues)
                lba, data = rng.randrange(64) * 8, rng.randbytes(4096)
                durable = rng.random() < 0.2
                await queue.write(1, lba, data, 512, fua=durable, in_capsule=rng.random() < 0.5)
                possible.setdefault(lba, {bytes(4096)}).add(data)
                if durable:
                    promised[lba] = data
                    possible[lba] = {data}
                if step in (20, 40):
                    await queue.flush(1)
                    for at in possible:
                        promised[at] = await queue.read(1, at, 8, 512)
                        possible[at] = {promised[at]}
            disk.hook = hook

    async def main() -> CapsuleId:
        store = space.open(tmp_path, disk=disk, segment_bytes=SEGMENT_BYTES)
        capsule = block_capsule(store)
        async with serving(store) as place:
            place.offer(1, capsule)
            await scenario(place)
        with contextlib.suppress(space.SpaceError, PowerLossError):
            store.close()
        return capsule

    capsule = asyncio.run(main())
    disk.hook = None
    disk.crash()
    with space.open(tmp_path, disk=disk, segment_bytes=SEGMENT_BYTES) as store:
        assert promised
        for lba, choices in possible.items():
            held = store.read(capsule, lba * 512, 4096)
            assert held in choices, f"block {lba}"


def serve(path: str, capsule: str) -> None:
    """What the process that is killed does: serves one capsule, and says at which port."""

    async def main() -> None:
        with space.open(path, segment_bytes=SEGMENT_BYTES) as store:
            async with serving(store) as place:
                place.offer(1, CapsuleId(bytes.fromhex(capsule)))
                sys.stdout.write(f"{place.port}\n")
                sys.stdout.flush()
                await asyncio.Event().wait()

    asyncio.run(main())


@contextlib.contextmanager
def server_process(path: Path, capsule: CapsuleId) -> Any:
    """A server in a process of its own, and its port; it is killed in the end."""
    code = f"from tests.integration.test_nvme_sockets import serve; serve({str(path)!r}, {capsule.hex()!r})"
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_kill_9_keeps_what_was_flushed(tmp_path: Path) -> None:
    """A killed server is found again by its host with every flushed write, three times over."""
    with space.open(tmp_path, segment_bytes=SEGMENT_BYTES) as store:
        capsule = block_capsule(store)
    flushed: dict[int, bytes] = {}
    rng = random.Random(9)

    async def scenario(process: subprocess.Popen[str], port: int) -> None:
        async with await Host.connect(port, NQN, queues=2) as host:
            one, two = host.queues
            for lba, data in flushed.items():
                assert await one.read(1, lba, 8, 512) == data
            written = {lba: rng.randbytes(4096) for lba in rng.sample(range(0, 1024, 8), 40)}
            await asyncio.gather(*(two.write(1, lba, data, 512) for lba, data in written.items()))
            await one.flush(1)
            flushed.update(written)
            late = [two.begin(Io.WRITE, nsid=1, cdw=(2048 + at, 0, 0), data=bytes(512)) for at in range(100)]
            os.kill(process.pid, signal.SIGKILL)
            outcomes = await asyncio.gather(*late, return_exceptions=True)
            assert any(isinstance(each, EndedError) for each in [*outcomes, await one.ended()])

    for _ in range(3):
        with server_process(tmp_path, capsule) as (process, port):
            asyncio.run(scenario(process, port))
    with space.open(tmp_path, segment_bytes=SEGMENT_BYTES) as store:
        assert {lba: store.read(capsule, lba * 512, 4096) for lba in flushed} == flushed


# --- hosts that come, go, and misbehave


def open_files() -> set[str]:
    """The descriptors of this process."""
    return set(os.listdir("/proc/self/fd"))


def test_connecting_24_times_leaks_nothing(tmp_path: Path) -> None:
    """After 24 hosts came and went, in three ways, there are no more descriptors and tasks than before."""

    async def scenario(place: Place) -> None:
        async def visit(number: int) -> None:
            host = await place.connect(queues=4, digests=Digest(number % 4))
            await host.queues[0].write(1, number, bytes([number]) * 512, 512)
            event = host.admin.event()
            if number % 3 == 0:
                await host.shut_down()
            elif number % 3 == 1:
                await host.queues[1].disconnect()
                await host.queues[1].ended()
            await host.close()
            assert isinstance(event.exception(), EndedError)
            await until(lambda: not place.server.connections)

        await visit(0)
        before = open_files(), len(asyncio.all_tasks())
        for number in range(24):
            await visit(number)
        assert (open_files(), len(asyncio.all_tasks())) == before
        assert place.subsystem.controllers == {}

    run(tmp_path, scenario)


def test_slow_and_half_open_peers_harm_nobody(tmp_path: Path) -> None:
    """Peers that stop at every point of the protocol keep nobody else from working."""

    async def scenario(place: Place) -> None:
        async with contextlib.AsyncExitStack() as stack:

            async def queue(**options: Any) -> tuple[Host, IoQueue]:
                host = await stack.enter_async_context(await place.connect(**options))
                return host, host.queues[0]

            silent = await asyncio.open_connection("127.0.0.1", place.port)
            half = await asyncio.open_connection("127.0.0.1", place.port)
            half[1].write(b"\0\0\x80")
            stack.push_async_callback(asyncio.gather, *(_closed(each[1]) for each in (silent, half)))
            await stack.enter_async_context(await Queue.dial(place.port))
            _, withholding = await queue()
            withholding.answer_r2t = False
            data = bytes(128 << 10)
            owed = [
                withholding.begin(Io.WRITE, nsid=1, cdw=(0, 0, 255), data=data, in_capsule=False)
                for _ in range(100)
            ]
            await until(lambda: withholding.asked > 0)
            _, stuck = await queue()
            pdu = encode(4, bytes(64), b"", Digest.NONE)
            stuck.send_raw(pdu[:40])
            _, deaf = await queue()
            deaf.hears.clear()
            for cid in range(100):
                read = entry(Io.READ, cid, nsid=1, dptr=sgl(1 << 20), cdw=(0, 0, 2047))
                deaf.send_raw(encode(Pdu.COMMAND, read, b"", Digest.NONE))
            _, good = await queue()
            model = Model(1, 512)
            await work(good, model, 1024, 2048, random.Random(5), 40)
            await good.flush(1)
            assert not any(each.done() for each in owed)
            assert withholding.asked <= 8 << 20, "what may be under way for one connection"

    run(tmp_path, scenario)


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await asyncio.gather(writer.wait_closed(), return_exceptions=True)


def test_200_garbage_connections_harm_nobody(tmp_path: Path) -> None:
    """Two hundred peers that speak nonsense are gone in the end, and a host at work has not noticed."""

    async def scenario(place: Place) -> None:
        async def nonsense(seed: int) -> None:
            rng = random.Random(seed)
            reader, writer = await asyncio.open_connection("127.0.0.1", place.port)
            good_start = encode(0, bytes(120), b"", Digest.NONE) if seed % 2 else b""
            with contextlib.suppress(ConnectionError):
                writer.write(good_start + rng.randbytes(rng.randrange(8, 20_000)))
                await writer.drain()
                try:
                    writer.write_eof()
                except OSError as error:  # it was hung up on already: shutdown(2)
                    if error.errno != errno.ENOTCONN:
                        raise
                await reader.read()
            await _closed(writer)

        async with await place.connect() as host:
            working = asyncio.create_task(work(host.queues[0], Model(1, 512), 0, 1024, random.Random(6), 60))
            await asyncio.gather(*(nonsense(seed) for seed in range(200)))
            await working
            await until(lambda: place.server.connections == 2)

    run(tmp_path, scenario)


def test_1000_connections(tmp_path: Path) -> None:
    """A thousand peers, half of them silent and half hosts with four queues each, and every host is served."""

    async def scenario(place: Place) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(500):
                _, writer = await asyncio.open_connection("127.0.0.1", place.port)
                stack.push_async_callback(_closed, writer)
            hosts = [await stack.enter_async_context(await place.connect(queues=4)) for _ in range(100)]
            assert place.server.connections == 1000
            content = {number: bytes([number]) * 512 for number in range(100)}
            await asyncio.gather(
                *(hosts[lba].queues[lba % 4].write(1, lba, data, 512) for lba, data in content.items())
            )
            held = await asyncio.gather(
                *(hosts[99 - lba].queues[lba % 4].read(1, lba, 1, 512) for lba in content)
            )
            assert held == list(content.values())
        await until(lambda: not place.server.connections)

    run(tmp_path, scenario)


def flipped(at: int) -> Callable[[bytes], bytes]:
    """Changes one byte of a PDU on its way."""

    def spoil(pdu: bytes) -> bytes:
        changed = bytearray(pdu)
        changed[at] ^= 0x40
        return bytes(changed)

    return spoil


def test_digest_errors(tmp_path: Path) -> None:
    """A wrong data digest fails its command and writes nothing; a wrong header digest ends the connection."""

    async def scenario(place: Place) -> None:
        async with await place.connect(digests=Digest.BOTH) as host:
            (queue,) = host.queues
            await queue.write(1, 0, b"good" * 128, 512)
            for in_capsule, at in itertools.product((True, False), (-1, -100)):
                if in_capsule:
                    options: dict[str, Any] = {"spoil": flipped(at)}
                else:
                    options, queue.spoil_data = {}, flipped(at)
                future = queue.begin(
                    Io.WRITE, nsid=1, cdw=(0, 0, 0), data=b"evil" * 128, in_capsule=in_capsule, **options
                )
                done = await future
                assert (done.status, done.do_not_retry) == (TRANSPORT_ERROR, False)
                queue.spoil_data = None
            assert await queue.read(1, 0, 1, 512) == b"good" * 128
            future = queue.begin(Io.FLUSH, nsid=1, spoil=flipped(30))
            with pytest.raises(EndedError) as caught:
                await future
            assert caught.value.fes == 3, "header digest error"
            await host.admin.keep_alive()

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    "at, mask, fes",
    [
        (8, 1, 1),
        (10, 1, 1),
        (13, 4, 2),
        (13, 12, 4),
        (15, 0xFF, 4),
        (17, 1, 1),
        (1, 4, 1),
        (2, 1, 1),
        (3, 4, 1),
    ],
    ids=["cid", "tag", "out-of-order", "across-the-end", "far-off", "length", "last", "hlen", "pdo"],
)
def test_data_that_nobody_asked_for_ends_the_connection(tmp_path: Path, at: int, mask: int, fes: int) -> None:
    """H2CData with a wrong command, tag, place or length is answered by C2HTermReq, and writes nothing."""

    async def scenario(place: Place) -> None:
        async with await place.connect() as host, await place.connect() as witness:
            (queue,) = host.queues

            def spoil(pdu: bytes) -> bytes:
                changed = bytearray(pdu)
                changed[at] ^= mask
                return bytes(changed)

            queue.spoil_data, queue.h2c_bytes = spoil, 2048
            with pytest.raises(EndedError) as caught:
                await queue.write(1, 0, b"x" * 4096, 512, in_capsule=False)
            assert caught.value.fes == fes
            assert await witness.queues[0].read(1, 0, 8, 512) == bytes(4096)
            await until(lambda: place.server.pools.fetched.used == 0)

    run(tmp_path, scenario)


def test_a_command_id_used_twice(tmp_path: Path) -> None:
    """Of two commands with one id one is refused, and the first still gets its data across."""

    async def scenario(place: Place) -> None:
        async with await place.connect() as host:
            (queue,) = host.queues
            queue.answer_r2t = False
            first = queue.begin(Io.WRITE, nsid=1, cdw=(0, 0, 7), data=b"a" * 4096, in_capsule=False, cid=99)
            await until(lambda: queue.asked == 4096)
            second = queue.begin(Io.READ, nsid=1, cdw=(0, 0, 0), wanted=512, cid=99)
            assert (await second).status == 0x003, "command id conflict"
            assert not first.done()

    run(tmp_path, scenario)


def test_a_controller_is_reset_and_used_again(tmp_path: Path) -> None:
    """Disabling ends the I/O queues; enabled again, the controller takes new ones, with features as at first."""

    async def scenario(place: Place) -> None:
        async with await place.connect() as host:
            (queue,) = host.queues
            await queue.write(1, 0, b"k" * 512, 512)
            await host.admin.set_feature(6, 0)
            await host.admin.set_property(CC, CC_ENABLE & ~1)
            await host.admin.wait_status(1, 0)
            assert isinstance(await queue.ended(), EndedError)
            assert await status_of(host.admin.identify(1)) == 0x00C, "command sequence error while disabled"
            await host.admin.set_property(CC, CC_ENABLE)
            await host.admin.wait_status(1, 1)
            assert (await host.admin.feature(6)).result == 1
            async with await IoQueue.dial(place.port) as again:
                (await again.connect(NQN, qid=1, entries=128, controller=host.number)).checked()
                assert await again.read(1, 0, 1, 512) == b"k" * 512

    run(tmp_path, scenario)


def test_a_host_that_is_not_allowed_is_told_so(tmp_path: Path) -> None:
    """Connect of a host off the list ends with Invalid Host, and discovery does not show it the subsystem."""

    async def scenario(place: Place) -> None:
        place.server.target.set_hosts(NQN, frozenset({OTHER_HOST}))
        async with await AdminQueue.dial(place.port) as admin:
            assert (await admin.connect(NQN)).status == 0x184
            assert (await admin.ask(Admin.IDENTIFY, cdw=(1,), wanted=4096)).status == 0x00C
        async with await place.connect(host=OTHER_HOST) as host:
            await host.admin.keep_alive()
        async with await Host.connect(place.port, DISCOVERY_NQN, queues=0) as host:
            assert struct.unpack_from("<QQ", await host.admin.log(0x70, 1024))[1] == 1

    run(tmp_path, scenario)
