"""The target on real sockets: many connections, slow and broken hosts, an orderly end."""

from __future__ import annotations

import asyncio
import importlib.util
import struct
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import pytest

from space.projections.nvme import server as servers
from space.projections.nvme.connection import Limits
from space.projections.nvme.queue import CONNECTION_BYTES, Pools
from space.projections.nvme.server import Listener, Server
from space.projections.nvme.target import Subsystem
from tests.nvme_support import (
    DISCOVERY,
    ENABLE,
    NQN,
    MemoryDevice,
    Pdu,
    capsule,
    connect_data,
    connect_entry,
    h2c_data,
    icreq,
    namespace,
    sgl,
    sqe,
    take_apart,
    target_with,
)

READ, WRITE, FLUSH = 0x02, 0x01, 0x00
LOOPS: Final[dict[str, Callable[[], asyncio.AbstractEventLoop] | None]] = {"asyncio": None}
if importlib.util.find_spec("uvloop"):
    import uvloop

    LOOPS["uvloop"] = uvloop.new_event_loop
_factory: list[Callable[[], asyncio.AbstractEventLoop] | None] = [None]


@pytest.fixture(params=LOOPS, autouse=True)
def loop(request: pytest.FixtureRequest) -> None:
    """Every test runs on each event loop there is."""
    _factory[0] = LOOPS[request.param]


def run_loop(coroutine: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine on the loop of this test."""
    with asyncio.Runner(loop_factory=_factory[0]) as runner:
        runner.run(coroutine)


class Peer:
    """A host on a socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def dial(cls, port: int) -> Peer:
        peer = cls(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 24))
        peer.writer.write(icreq())
        assert (await peer.pdu()).kind == 1
        return peer

    async def pdu(self) -> Pdu:
        """The next PDU."""
        head = await self.reader.readexactly(8)
        (size,) = struct.unpack_from("<I", head, 4)
        return take_apart(head + await self.reader.readexactly(size - 8))[0]

    async def ask(self, stream: bytes) -> Pdu:
        self.writer.write(stream)
        return await self.pdu()

    async def end(self) -> bytes:
        """What still comes before the target closes."""
        rest = await self.reader.read()
        await self.close()
        return rest

    async def close(self) -> None:
        self.writer.close()
        await asyncio.gather(self.writer.wait_closed(), return_exceptions=True)

    async def connect(self, **options: Any) -> int:
        """Connects as admin queue, and enables the controller; its number."""
        answer = await self.ask(capsule(connect_entry(1), connect_data(**options)))
        assert answer.status == 0
        enabled = await self.ask(capsule(sqe(0x7F, 2, cdw=(0, 0x14, ENABLE))))
        assert enabled.status == 0
        return answer.result

    async def connect_io(self, number: int, qid: int = 1) -> None:
        entry = connect_entry(1, qid=qid, sqsize=1023)
        answer = await self.ask(capsule(entry, connect_data(controller=number)))
        assert answer.status == 0


class Place:
    """A server with one namespace, and peers that are closed when the test is over."""

    def __init__(self, server: Server, port: int, device: MemoryDevice, subsystem: Subsystem) -> None:
        self.server = server
        self.port = port
        self.device = device
        self.subsystem = subsystem
        self.peers: list[Peer] = []

    async def dial(self) -> Peer:
        self.peers.append(await Peer.dial(self.port))
        return self.peers[-1]

    async def queues(self) -> tuple[Peer, Peer]:
        """Admin and I/O queue of one controller."""
        admin = await self.dial()
        number = await admin.connect()
        queue = await self.dial()
        await queue.connect_io(number)
        return admin, queue


Scenario = Callable[[Place], Awaitable[None]]


def run(
    scenario: Scenario, *, blocks: int = 2048, limits: Limits | None = None, pools: Pools | None = None
) -> None:
    """Runs a scenario against a server; afterwards nothing may be left of either."""

    async def main() -> None:
        device = MemoryDevice(blocks)
        target, subsystem = target_with(namespace(1, device))
        server = Server(target, limits=limits, pools=pools)
        (port,) = await server.start([Listener("127.0.0.1", 0)])
        place = Place(server, port.service, device, subsystem)
        try:
            await scenario(place)
        finally:
            for peer in place.peers:
                await peer.close()
            await server.close()
        assert server.connections == 0
        assert server.pools.fetched.used == server.pools.executing.used == 0
        assert subsystem.controllers == {}

    run_loop(main())


async def until(condition: Callable[[], bool]) -> None:
    """Waits for something the server does in its own time."""
    while not condition():  # noqa: ASYNC110 - what is waited for has no event a test could see
        await asyncio.sleep(0.001)


def read_entry(cid: int, *, first: int = 0, count: int = 1) -> bytes:
    """A read of blocks."""
    return capsule(sqe(READ, cid, nsid=1, dptr=sgl(count * 512), cdw=(first, 0, count - 1)))


def test_a_host_writes_and_reads() -> None:
    """Over sockets: data in capsules, data apart, a large read, and a flush."""

    async def scenario(place: Place) -> None:
        _, queue = await place.queues()
        data = bytes(range(256)) * 4096
        entry = sqe(WRITE, 5, nsid=1, dptr=sgl(len(data)), cdw=(0, 0, 2047))
        r2t = await queue.ask(capsule(entry))
        half = len(data) // 2
        queue.writer.write(h2c_data(5, r2t.fields[1], 0, data[:half], last=False))
        assert (await queue.ask(h2c_data(5, r2t.fields[1], half, data[half:]))).status == 0
        answer = await queue.ask(read_entry(6, count=2048))
        assert (answer.kind, answer.data) == (7, data)
        assert (await queue.pdu()).status == 0
        assert (await queue.ask(capsule(sqe(FLUSH, 7, nsid=1)))).status == 0

    run(scenario)


def test_a_fatal_error_is_told_before_the_end() -> None:
    """The host reads C2HTermReq although it has sent more that nobody reads, then the end of the stream."""

    async def scenario(place: Place) -> None:
        _, queue = await place.queues()
        queue.writer.write(b"\x55" * 100_000)
        (term,) = take_apart(await queue.end())
        assert (term.kind, struct.unpack_from("<HI", term.head, 8)) == (3, (1, 0))
        await until(lambda: place.server.connections == 1)

    run(scenario)


def test_a_controller_ends_with_its_admin_connection() -> None:
    """When the host drops its admin queue, its I/O queues are closed; other hosts are not touched."""

    async def scenario(place: Place) -> None:
        first, queue = await place.queues()
        _, other = await place.queues()
        await first.close()
        assert await queue.end() == b""
        assert (await other.ask(capsule(sqe(FLUSH, 7, nsid=1)))).status == 0
        assert len(place.subsystem.controllers) == 1

    run(scenario)


def test_disconnecting_a_queue_is_answered_first() -> None:
    """Disconnect completes, then the connection closes; the controller and its number for the queue are free."""

    async def scenario(place: Place) -> None:
        admin, queue = await place.queues()
        assert (await queue.ask(capsule(sqe(0x7F, 9, nsid=8)))).status == 0
        assert await queue.end() == b""
        (number,) = place.subsystem.controllers
        again = await place.dial()
        await again.connect_io(number)
        assert (await admin.ask(capsule(sqe(0x18, 9)))).status == 0

    run(scenario)


def test_events_reach_hosts_that_wait() -> None:
    """A change made on the server's side is told over the socket at once."""

    async def scenario(place: Place) -> None:
        admin, _ = await place.queues()
        assert (await admin.ask(capsule(sqe(0x09, 3, cdw=(0x0B, 1 << 8))))).status == 0
        admin.writer.write(capsule(sqe(0x0C, 4)))
        assert (await admin.ask(capsule(sqe(0x18, 5)))).cid == 5
        place.device.data.extend(bytes(512))
        place.subsystem.changed(1)
        assert (await admin.pdu()).result == 0x04_00_02

    run(scenario)


def test_a_host_that_does_not_read_is_not_read_from() -> None:
    """Reads of a host that takes no data stop being carried out; memory is bounded, and other hosts are served."""

    async def scenario(place: Place) -> None:
        _, slow = await place.queues()
        _, quick = await place.queues()
        count = 200
        slow.reader._transport.pause_reading()  # type: ignore[attr-defined]
        slow.writer.write(b"".join(read_entry(cid, count=2048) for cid in range(count)))
        before = -1
        while before != len(place.device.calls):
            before = len(place.device.calls)
            for _ in range(20):
                answer = await quick.ask(read_entry(1))
                assert answer.kind == 7
                await quick.pdu()
            place.device.calls = [call for call in place.device.calls if call[2] > 512]
        carried_out = len(place.device.calls)
        assert 0 < carried_out < count
        slow.reader._transport.resume_reading()  # type: ignore[attr-defined]
        for cid in range(count):
            assert (await slow.pdu()).cid == cid
            assert (await slow.pdu()).status == 0

    run(scenario)


def test_a_slow_device_holds_back_its_hosts() -> None:
    """While commands wait for the device only so much is taken in; when it goes on, all of them are answered."""

    async def scenario(place: Place) -> None:
        _, queue = await place.queues()
        place.device.gate = asyncio.Event()
        count = 100
        queue.writer.write(b"".join(read_entry(cid, count=2048) for cid in range(count)))
        await until(lambda: place.server.pools.executing.used >= CONNECTION_BYTES)
        assert place.server.pools.executing.used == CONNECTION_BYTES
        place.device.gate.set()
        seen = set()
        for _ in range(2 * count):
            answer = await queue.pdu()
            if answer.kind == 5:
                assert answer.status == 0
                seen.add(answer.cid)
        assert seen == set(range(count))

    run(scenario)


def test_writes_under_way_are_finished_when_the_server_closes() -> None:
    """A write that was begun is carried out before close returns, though its host cannot be told any more."""

    async def scenario(place: Place) -> None:
        _, queue = await place.queues()
        gate = place.device.gate = asyncio.Event()
        data = b"w" * 512
        queue.writer.write(capsule(sqe(WRITE, 1, nsid=1, dptr=sgl(512, in_capsule=True)), data))
        await until(lambda: bool(place.server._tasks))
        asyncio.get_running_loop().call_later(0.01, gate.set)
        await place.server.close()
        assert place.device.data[:512] == data

    run(scenario)


def test_connections_beyond_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more than there may be is closed at once; when one ends, another is let in."""
    monkeypatch.setattr(servers, "CONNECTIONS_MAX", 3)

    async def scenario(place: Place) -> None:
        peers = [await place.dial() for _ in range(3)]
        refused = Peer(*await asyncio.open_connection("127.0.0.1", place.port))
        refused.writer.write(icreq())
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await refused.pdu()
        await refused.close()
        await peers[0].close()
        await until(lambda: place.server.connections == 2)
        await place.dial()

    run(scenario)


def test_a_thousand_connections() -> None:
    """A thousand hosts, half of which say nothing, cost the others nothing: each is answered."""

    async def scenario(place: Place) -> None:
        silent = [await asyncio.open_connection("127.0.0.1", place.port) for _ in range(500)]
        peers = [await place.dial() for _ in range(490)]
        _, queue = await place.queues()
        for number, peer in enumerate(peers):
            host = f"nqn.2024-01.org.example:{number}"
            assert await peer.connect(host=host, subsystem=DISCOVERY if number % 2 else NQN)
        assert (await queue.ask(capsule(sqe(FLUSH, 7, nsid=1)))).status == 0
        await until(lambda: place.server.connections == 992)
        for _, writer in silent:
            writer.close()
            await writer.wait_closed()

    run(scenario)


def test_controllers_and_connections_are_looked_after_as_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tick ends a controller whose host is silent, and a connection that never introduced itself."""
    monkeypatch.setattr(servers, "TICK_SECONDS", 0.01)

    async def scenario(place: Place) -> None:
        _, queue = await place.queues()
        admin = await place.dial()
        answer = await admin.ask(capsule(connect_entry(1, kato=50), connect_data()))
        assert answer.status == 0
        assert await admin.end() == b""
        assert (await queue.ask(capsule(sqe(FLUSH, 7, nsid=1)))).status == 0

    run(scenario)


def test_where_it_listens_is_what_discovery_says() -> None:
    """Ports are told as they are; an address in use is an error, and nothing listens after it."""

    async def main() -> None:
        target, _ = target_with()
        server = Server(target)
        ports = await server.start([Listener("127.0.0.1", 0), Listener("127.0.0.1", 0, discovery_only=True)])
        assert [(port.number, port.discovery_only) for port in ports] == [(1, False), (2, True)]
        assert target.ports == ports
        second = Server(target_with()[0])
        with pytest.raises(OSError, match="in use"):
            await second.start([Listener("127.0.0.1", 0), Listener("127.0.0.1", ports[0].service)])
        assert second._servers == [] or not any(each.sockets for each in second._servers)
        peer = await Peer.dial(ports[1].service)
        assert await peer.connect(subsystem=DISCOVERY)
        await peer.close()
        await server.close()

    run_loop(main())


SPLIT: Final = (1, 3, 50, 77)


@pytest.mark.parametrize("size", SPLIT)
def test_bytes_in_small_pieces(size: int) -> None:
    """A host whose bytes trickle in is served like any other."""

    async def scenario(place: Place) -> None:
        _, queue = await place.queues()
        stream = capsule(sqe(WRITE, 1, nsid=1, dptr=sgl(512, in_capsule=True)), b"t" * 512)
        for place_in in range(0, len(stream), size):
            queue.writer.write(stream[place_in : place_in + size])
            await asyncio.sleep(0)
        assert (await queue.pdu()).status == 0
        assert place.device.data[:512] == b"t" * 512

    run(scenario)
