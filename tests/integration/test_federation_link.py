"""Two zones that talk over a real TLS connection, with something simple in the place of their logs."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import aiohttp
import attrs
import pytest

from space._errors import ConflictError, RefusedError, SpaceError, StorageError
from space._node.federation_keys import ZoneAuthority, ZoneKeys, claimed, proves, trust
from space.federation.exchange import (
    FRAME,
    IDENTITY,
    PULSE,
    SHIP,
    SHIPMENT,
    VERSION,
    Backoff,
    Document,
    Peer,
    Throttle,
    frame,
)
from space.federation.server import FederationServer, Received
from space.federation.shipper import Outgoing, Shipper, Target

pytestmark = pytest.mark.requires("py:aiohttp")

SHIPMENT_BYTES_MAX: Final = 1 << 16
HOME: Final = bytes(16)
TARGET: Final = bytes(range(16))


class Log:
    """A receiver whose log is a list: a shipment is its number, a colon, and bytes; it has to be the next one."""

    def __init__(self, *, home: ZoneAuthority) -> None:
        self.home = home
        self.taken: list[bytes] = []
        self.heard_of: list[Document] = []
        self.refuse: Callable[[bytes], SpaceError | None] = lambda _: None
        self.leads = True
        self.settling: Callable[[], Any] = lambda: None

    def recognise(self, certificate: bytes) -> Peer:
        identity = claimed(certificate)
        if identity is None or not proves(self.home, certificate):
            raise RefusedError("not a zone that was added")
        return Peer(identity.id, identity.name)

    def identity(self, peer: Peer) -> Document:
        return {"zone": "target", "versions": [VERSION], "knows": peer.name, "leads": self.leads}

    def cursors(self, peer: Peer) -> Document:
        return {"cursors": [{"position": len(self.taken)}]}

    def receive(self, peer: Peer, shipments: Sequence[bytes]) -> Received:
        cursors: list[Document] = []
        for body in shipments:
            number = int(body.partition(b":")[0])
            error = self.refuse(body)
            if error is None and number != len(self.taken):
                error = ConflictError(f"not the next one: {number} after {len(self.taken)}")
            if error is not None:
                return Received(cursors, error)
            self.taken.append(body)
            cursors.append({"position": len(self.taken)})
        return Received(cursors)

    def settle(self) -> None:
        self.settling()

    def heard(self, peer: Peer, pulse: Document) -> None:
        self.heard_of.append(pulse)

    def reached(self, peer: Peer, capsules: Sequence[str]) -> Document:
        return {"capsules": [[0, False] for _ in capsules]}

    def homes(self, peer: Peer, capsules: Sequence[tuple[str, int]], declined: int) -> Document:
        return {"capsules": [0 for _ in capsules]}

    def inherits(self, peer: Peer, told: Document) -> Document:
        return {"follows": False}

    def take_authority(self, peer: Peer, pem: bytes, signature: bytes) -> Document:
        if not self.home.signed(pem, signature):
            raise RefusedError("not signed")
        self.home = ZoneAuthority.parse(pem)
        return {}


class Shelf:
    """A source of numbered shipments."""

    def __init__(self, shipments: Sequence[bytes]) -> None:
        self.shipments = list(shipments)
        self.at = 0
        self.acknowledged_at = 0
        self.connections = 0
        self.offered: tuple[bytes, bytes] | None = None
        self.threads: set[int] = set()

    def connected(self, identity: Document, cursors: Document) -> None:
        assert identity["knows"] == "home"
        self.connections += 1
        self.at = self.acknowledged_at = cursors["cursors"][0]["position"]

    def offer(self, identity: Document) -> tuple[bytes, bytes] | None:
        return self.offered

    def next(self) -> Outgoing | None:
        self.threads.add(threading.get_ident())
        if self.at == len(self.shipments):
            return None
        self.at += 1
        return Outgoing(self.shipments[self.at - 1], self.at)

    def settle(self, sent: Outgoing) -> None:
        assert threading.get_ident() not in self.threads

    def acknowledged(self, sent: Outgoing, cursor: Document) -> None:
        self.threads.add(threading.get_ident())
        assert cursor["position"] == sent.token == self.acknowledged_at + 1
        self.acknowledged_at = sent.token

    def refused(self, error: SpaceError) -> None:
        self.threads.add(threading.get_ident())

    def pulse(self) -> Document:
        return {"position": len(self.shipments)}


@attrs.define
class Pair:
    """A home and a target that listens."""

    home: ZoneKeys
    target: ZoneKeys
    log: Log
    port: int
    client: ssl.SSLContext

    def shipper(self, shelf: Shelf, *, port: int | None = None, url: str = "", rate: float = 0) -> Shipper:
        url = url or f"https://127.0.0.1:{self.port if port is None else port}"
        target = Target("target", url, self.client, shelf, Throttle(rate))
        return Shipper(target, chance=random.Random(1).random)


@contextlib.asynccontextmanager
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    """Two zones that know each other."""
    now = datetime.now(UTC)
    home = ZoneKeys.create(tmp_path / "home", "home", "metro", HOME, now=now)
    target = ZoneKeys.create(tmp_path / "target", "target", "geo", TARGET, now=now)
    tls = target.server_context()
    trust(tls, home.authority)
    log = Log(home=home.authority)
    server = FederationServer(log, tls, shipment_bytes_max=SHIPMENT_BYTES_MAX)
    port = await server.start("127.0.0.1", 0)
    try:
        yield Pair(home, target, log, port, home.client_context(target.authority))
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def shipping(shipper: Shipper) -> AsyncIterator[None]:
    """While a shipper runs."""
    task = asyncio.create_task(shipper.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(holds: Callable[[], bool]) -> None:
    """Waits for something that comes."""
    while not holds():  # noqa: ASYNC110 - what is waited for happens in the other zone
        await asyncio.sleep(0.005)


def framed(kind: int, body: bytes) -> bytes:
    """A frame as it is sent."""
    return b"".join(frame(kind, body))


def numbered(count: int, size: int = 100) -> list[bytes]:
    """Shipments as :class:`Log` takes them."""
    chance = random.Random(7)
    return [b"%d:%s" % (number, chance.randbytes(size)) for number in range(count)]


def test_of_several_addresses_the_one_that_leads_is_shipped_to(tmp_path: Path) -> None:
    """Whoever is asked first, and whoever is gone; where nobody leads, or who did is gone, another one that answers."""

    async def main() -> None:
        async with pair(tmp_path) as zones:
            tls = zones.target.server_context()
            trust(tls, zones.home.authority)
            leading = Log(home=zones.home.authority)
            zones.log.leads = False
            server = FederationServer(leading, tls, shipment_bytes_max=SHIPMENT_BYTES_MAX)
            port = await server.start("127.0.0.1", 0)
            urls = [f"https://127.0.0.1:{each}" for each in (unused_port(), zones.port, port)]
            shelf = Shelf(numbered(20))
            shipper = zones.shipper(shelf, url=",".join(urls))
            async with shipping(shipper):
                await until(lambda: shelf.acknowledged_at == 20)
                assert leading.taken == numbered(20)
                assert zones.log.taken == []
                assert shipper.status.at == urls[2]
                await server.close()
                await until(lambda: len(zones.log.taken) == 20)
                assert zones.log.taken == numbered(20)
                await until(lambda: shipper.status.at == urls[1])

    asyncio.run(main())


def test_who_stops_while_it_looks_for_the_one_that_leads_leaves_nothing(tmp_path: Path) -> None:
    """A shipper is cancelled at any point of asking several addresses: every connection is closed."""

    async def main() -> None:
        async with pair(tmp_path) as zones:
            url = ",".join([f"https://127.0.0.1:{zones.port}"] * 3)
            for turns in range(0, 240, 6):
                shipper = zones.shipper(Shelf([]), url=url)
                task = asyncio.create_task(shipper.run())
                for _ in range(turns):
                    await asyncio.sleep(0.0001)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                del task, shipper
                gc.collect()  # a session that is not closed says so, which is an error

    asyncio.run(main())


def test_a_zone_without_an_address_is_not_shipped_to(tmp_path: Path) -> None:
    """It says so, and goes on trying: the address may come."""

    async def main() -> None:
        async with pair(tmp_path) as zones:
            target = Target("target", "", zones.client, Shelf([]), Throttle(0))
            shipper = Shipper(target, chance=lambda: 0.0)
            async with shipping(shipper):
                await until(lambda: "no address" in shipper.status.error)

    asyncio.run(main())


def unused_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_all_comes_once_and_in_order(tmp_path: Path) -> None:
    """Whatever a source has, then and later, is taken once, in order, and acknowledged on one thread."""

    async def main() -> None:
        async with pair(tmp_path) as zones:
            shelf = Shelf(numbered(500))
            shipper = zones.shipper(shelf)
            async with shipping(shipper):
                await until(lambda: shelf.acknowledged_at == 500)
                shelf.shipments += numbered(510)[500:]
                shipper.wake()
                await until(lambda: shelf.acknowledged_at == 510)
                await until(lambda: bool(zones.log.heard_of))
            assert zones.log.taken == numbered(510)
            assert shelf.connections == 1
            assert len(shelf.threads) == 1
            assert shipper.status.shipments == 510
            assert shipper.status.flight_bytes == 0
            assert shipper.status.rtt_seconds is not None

    asyncio.run(main())


def test_a_refused_shipment_stops_nothing_for_good(tmp_path: Path) -> None:
    """A shipment the target refuses is told of, and tried again from where the target is; none is lost or doubled."""

    async def main() -> None:
        async with pair(tmp_path) as zones:
            refusals = iter([RefusedError("its bytes are damaged"), None, ConflictError("a gap")])
            zones.log.refuse = lambda body: next(refusals, None) if body.startswith(b"7:") else None
            shelf = Shelf(numbered(20))
            shipper = zones.shipper(shelf)
            seen: set[str] = set()
            async with shipping(shipper):
                while shelf.acknowledged_at < 20:
                    seen.add(shipper.status.error)
                    await asyncio.sleep(0)
            assert zones.log.taken == numbered(20)
            assert shelf.connections == 2
            assert any("its bytes are damaged" in error for error in seen)

    asyncio.run(main())


async def relay(
    port: int, cut_after: Callable[[], int], flip: Callable[[int], bool]
) -> tuple[asyncio.Server, int]:
    """A proxy that hangs up after so many bytes from the client, and flips bits in those it passes on."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there = await asyncio.open_connection("127.0.0.1", port)
        back = asyncio.create_task(_copy(there_reader, writer))
        left = cut_after()
        with contextlib.suppress(OSError):
            while left > 0 and (piece := await reader.read(min(left, 4096))):
                left -= len(piece)
                if flip(left):
                    piece = piece[:-1] + bytes([piece[-1] ^ 1])
                there.write(piece)
                await there.drain()
        back.cancel()
        for each in (there, writer):
            each.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await reader.read(1 << 16):
            writer.write(piece)
            await writer.drain()


def test_a_connection_may_break_anywhere(tmp_path: Path) -> None:
    """Cut at many places, and with flipped bits, everything comes all the same, once and in order."""

    async def main() -> None:
        async with pair(tmp_path) as zones:
            chance = random.Random(3)
            cuts = iter([*range(0, 6000, 97), *(chance.randrange(30_000) for _ in range(30))])
            damaged = iter([1500, 4500, 9000])
            bad = next(damaged)

            def cut() -> int:
                return next(cuts, 1 << 40)

            def flip(left: int) -> bool:
                nonlocal bad
                if left < 1 << 39 or (1 << 40) - left < bad:
                    return False
                bad = next(damaged, 1 << 41)
                return True

            server, port = await relay(zones.port, cut, flip)
            shelf = Shelf(numbered(200, 500))
            shipper = zones.shipper(shelf, port=port)
            shipper.retry_limit = 0.001
            async with server, shipping(shipper):
                await until(lambda: shelf.acknowledged_at == 200)
            assert zones.log.taken == numbered(200, 500)

    asyncio.run(main())


def test_a_zone_that_is_away_is_found_again(tmp_path: Path) -> None:
    """While nobody answers the reason is told, and no batch need wake the loop; shipping begins when somebody does."""

    async def main() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        async with pair(tmp_path) as zones:
            shelf = Shelf(numbered(3))
            shipper = zones.shipper(shelf, port=port)
            shipper.retry_limit = 0.01
            async with shipping(shipper):
                await until(lambda: "onnect" in shipper.status.error)
                assert not shipper.status.connected
                assert not shipper.listens
                server, _ = await _relay_at(port, zones.port)
                async with server:
                    await until(lambda: shelf.acknowledged_at == 3)
                    await until(lambda: shipper.listens)
                    await until(lambda: shipper.status.connected and not shipper.status.error)

    asyncio.run(main())


async def _relay_at(port: int, there: int) -> tuple[asyncio.Server, int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back = await asyncio.open_connection("127.0.0.1", there)
        try:
            await asyncio.gather(_copy(reader, back), _copy(back_reader, writer))
        finally:
            for each in (back, writer):
                each.transport.abort()

    return await asyncio.start_server(serve, "127.0.0.1", port), port


def test_strangers_learn_and_give_nothing(tmp_path: Path) -> None:
    """A zone that was not added gets no answer, and its shipper says what to do about it."""

    async def main() -> None:
        async with pair(tmp_path) as zones:
            stranger = ZoneKeys.create(tmp_path / "other", "home", "metro", HOME, now=datetime.now(UTC))
            shelf = Shelf(numbered(3))
            url = f"https://127.0.0.1:{zones.port}"
            tls = stranger.client_context(zones.target.authority)
            shipper = Shipper(Target("target", url, tls, shelf, Throttle(0)), chance=lambda: 0.5)
            async with shipping(shipper):
                await until(lambda: bool(shipper.status.error))
            assert "does not know this zone" in shipper.status.error
            assert not zones.log.taken
            assert not zones.log.heard_of

    asyncio.run(main())


def test_an_impostor_is_not_shipped_to(tmp_path: Path) -> None:
    """Who answers with a certificate of another authority is sent nothing."""

    async def main() -> None:
        async with pair(tmp_path) as zones:
            wrong = zones.home.client_context(zones.home.authority)
            shelf = Shelf(numbered(3))
            url = f"https://127.0.0.1:{zones.port}"
            shipper = Shipper(Target("target", url, wrong, shelf, Throttle(0)), chance=lambda: 0.5)
            async with shipping(shipper):
                await until(lambda: bool(shipper.status.error))
            assert "is not that zone" in shipper.status.error
            assert shelf.connections == 0

    asyncio.run(main())


def test_authorities_are_exchanged_before_anything_else(tmp_path: Path) -> None:
    """An authority that is being rolled over to is offered at the next connection, and taken if it is signed."""

    async def main() -> None:
        async with pair(tmp_path) as zones:
            zones.home.begin_rollover(now=datetime.now(UTC))
            shelf = Shelf(numbered(1))
            shelf.offered = zones.home.offer()
            async with shipping(zones.shipper(shelf)):
                await until(lambda: shelf.acknowledged_at == 1)
            assert len(zones.log.home.certificates) == 2

    asyncio.run(main())


async def raw(zones: Pair, body: bytes) -> list[Document]:
    """What a target answers to any bytes."""
    connector = aiohttp.TCPConnector(ssl=zones.client)
    async with (
        aiohttp.ClientSession(connector=connector) as http,
        http.post(f"https://127.0.0.1:{zones.port}{SHIP}", data=body) as response,
    ):
        import json

        return [json.loads(line) for line in (await response.read()).splitlines()]


@pytest.mark.parametrize(
    "body",
    [
        FRAME.pack(9, 3) + b"abc",
        FRAME.pack(SHIPMENT, SHIPMENT_BYTES_MAX + 1),
        FRAME.pack(PULSE, 1 << 20),
        FRAME.pack(SHIPMENT, 100) + b"0:short",
        b"\1",
        framed(PULSE, b"not JSON"),
        framed(PULSE, b"[" * 1000),
        framed(PULSE, b"[]"),
    ],
)
def test_what_is_no_frame_is_refused(tmp_path: Path, body: bytes) -> None:
    """Frames before the bad one are taken and answered, it is an error, and nothing after it is looked at."""

    async def main() -> None:
        async with pair(tmp_path) as zones:
            answers = await raw(zones, framed(SHIPMENT, b"0:first") + body + framed(SHIPMENT, b"1:second"))
            assert answers[0] == {"cursor": {"position": 1}}
            assert answers[1]["error"]["kind"] in ("UsageError", "ConflictError")
            assert len(answers) == 2
            assert zones.log.taken == [b"0:first"]

    asyncio.run(main())


def test_the_next_is_taken_while_what_came_becomes_durable(tmp_path: Path) -> None:
    """Nothing is acknowledged before it is durable, and nothing waits for that to be taken."""

    async def main() -> None:
        async with pair(tmp_path) as zones:
            durable = threading.Event()
            zones.log.settling = lambda: not zones.log.taken or durable.wait(60)
            first, second = numbered(2)
            shelf = Shelf([first])
            shipper = zones.shipper(shelf)
            try:
                async with shipping(shipper):
                    await until(lambda: zones.log.taken == [first])
                    shelf.shipments.append(second)
                    shipper.wake()
                    await until(lambda: zones.log.taken == [first, second])
                    assert shelf.acknowledged_at == 0
                    durable.set()
                    await until(lambda: shelf.acknowledged_at == 2)
            finally:
                durable.set()

    asyncio.run(main())


def test_what_does_not_become_durable_is_not_acknowledged(tmp_path: Path) -> None:
    """The home is told why, and where the other zone stands does not count either until it is."""

    async def main() -> None:
        async with pair(tmp_path) as zones:

            def fail() -> None:
                if zones.log.taken:
                    raise StorageError("the disk is gone")

            zones.log.settling = fail
            shelf = Shelf(numbered(1))
            shipper = zones.shipper(shelf)
            async with shipping(shipper):
                await until(lambda: "the disk is gone" in shipper.status.error)
                assert (shelf.acknowledged_at, shelf.connections, shipper.status.shipments) == (0, 1, 0)

    asyncio.run(main())


def test_a_home_has_one_stream(tmp_path: Path) -> None:
    """A second stream of the same zone takes the place of the first, which may be a connection that was lost."""

    async def main() -> None:
        async with pair(tmp_path) as zones:
            first, second = Shelf(numbered(1)), Shelf(numbered(2))
            one = zones.shipper(first)
            async with shipping(one):
                await until(lambda: first.acknowledged_at == 1)
                two = zones.shipper(second)
                async with shipping(two):
                    await until(lambda: second.acknowledged_at == 2)
                    await until(lambda: bool(one.status.error))
            assert zones.log.taken == numbered(2)

    asyncio.run(main())


def test_the_identity_is_for_zones_that_are_known(tmp_path: Path) -> None:
    """Without a certificate there is no connection."""

    async def main() -> None:
        async with pair(tmp_path) as zones:
            tls = ssl.create_default_context(cadata=zones.target.authority.pem.decode())
            tls.check_hostname = False
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls)) as http:
                with pytest.raises((aiohttp.ClientError, OSError)):
                    await http.get(f"https://127.0.0.1:{zones.port}{IDENTITY}")

    asyncio.run(main())


def test_bandwidth_is_counted() -> None:
    """However pieces are cut, no more bytes go than the rate allows, save a tenth of a second's worth."""
    throttle = Throttle(1000)
    now, sent = 100.0, 0
    for size in (100, 1, 400, 999, 50, 3, 700) * 10:
        now += throttle.delay(size, now=now)
        assert sent <= (now - 100.0) * 1000 + 100.0001
        sent += size
    assert Throttle(0).delay(1 << 40, now=0) == 0


def test_attempts_are_spread() -> None:
    """Waits double up to the limit, are never the same for two, and begin anew after a success."""
    backoff = Backoff(0.1, 10)
    waits: list[Any] = [backoff.delay(1.0) for _ in range(10)]
    assert waits[:4] == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert waits[-1] == 10
    assert backoff.delay(0.0) == 5
    backoff.reset()
    assert backoff.delay(0.0) == pytest.approx(0.05)
    for _ in range(1000):
        assert backoff.delay(1.0) <= 10
