"""The server on sockets: many requests at once, shared barriers, and peers that do not keep up."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, cast

import attrs
import pytest

from space._errors import DiskFullError, SpaceError
from space.projections.nfs import server as module
from space.projections.nfs.compound import Compound
from space.projections.nfs.exports import Export, Exports
from space.projections.nfs.nfs4 import NfsStatus, Op
from space.projections.nfs.server import Barriers, Clock, Listener, Server, Tasks, make_shell
from space.projections.nfs.service import Recovery, Service
from space.projections.nfs.xdr import Reader, Writer
from tests.nfs_session_support import Tree, create_session, exchange_id, op, sequence

pytestmark = pytest.mark.unit

CALL = struct.pack(">IIIII", 0, 2, 100003, 4, 1) + bytes(16)


def framed(xid: int, *operations: bytes) -> bytes:
    """A COMPOUND as a record."""
    body = struct.pack(">I", xid) + CALL + struct.pack(">III", 0, 1, len(operations)) + b"".join(operations)
    return struct.pack(">I", 1 << 31 | len(body)) + body


@attrs.define
class Client:
    """A connection of the test."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def answer(self) -> tuple[int, bytes]:
        (header,) = struct.unpack(">I", await self.reader.readexactly(4))
        record = await self.reader.readexactly(header & 0x7FFFFFFF)
        return struct.unpack_from(">I", record)[0], record[24:]

    async def call(self, xid: int, *operations: bytes) -> bytes:
        self.writer.write(framed(xid, *operations))
        found, body = await self.answer()
        assert found == xid
        return body

    async def session(self, owner: bytes = b"client") -> bytes:
        """A session, and the client that it takes."""
        body = await self.call(1, exchange_id(owner))
        (client,) = struct.unpack_from(">Q", body, 20)
        body = await self.call(2, create_session(client, 1, fore=(1 << 20, 1 << 20, 0, 64, 64)))
        return body[20:36]


@attrs.define(eq=False)
class Scene:
    """A running server."""

    server: Server
    port: int
    clients: list[Client] = attrs.field(factory=list)

    async def connect(self) -> Client:
        made = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self.clients.append(made)
        return made

    def replace(self, number: Op, operation: Any) -> None:
        self.server.service.operations[number] = operation


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Scene]:
    """A server for a while; it ends with nothing left."""
    tasks = Tasks()
    exports = Exports([Export(1, (), cast("Any", Tree()))], key=bytes(32))
    service = Service(
        exports, make_shell(tasks), Recovery(1), name=b"server", now=asyncio.get_running_loop().time()
    )
    server = Server(service, tasks, Clock(asyncio.get_running_loop().time))
    _, port = await server.start(Listener(port=0))
    scene = Scene(server, port)
    try:
        yield scene
    finally:
        await server.close()
        for each in scene.clients:
            each.writer.transport.abort()
    assert server.connections == 0


async def until(condition: Callable[[], bool]) -> None:
    """Lets the loop run until something holds."""
    while not condition():  # noqa: ASYNC110 - what is waited for is the server's business, which sets no events
        await asyncio.sleep(0)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Runs it on a loop of its own."""
    asyncio.run(scenario)


def test_null_and_nonsense() -> None:
    """NULL is answered, what is no COMPOUND is garbage, and what is no record ends the connection."""

    async def scenario() -> None:
        async with serving() as scene:
            client = await scene.connect()
            null = struct.pack(">IIIIII", 7, 0, 2, 100003, 4, 0) + bytes(16)
            client.writer.write(struct.pack(">I", 1 << 31 | len(null)) + null)
            assert await client.answer() == (7, b"")
            cut = struct.pack(">I", 8) + CALL + bytes(4)
            client.writer.write(struct.pack(">I", 1 << 31 | len(cut)) + cut)
            header = await client.reader.readexactly(28)
            assert struct.unpack(">7I", header)[1:] == (8, 1, 0, 0, 0, 4)
            client.writer.write(b"GET / HTTP/1.1\r\n\r\n")
            assert await client.reader.read() == b""
            assert scene.server.connections == 0

    run(scenario())


def test_requests_run_side_by_side() -> None:
    """One that waits holds nobody up: answers come as they are ready."""

    async def scenario() -> None:
        async with serving() as scene:
            client = await scene.connect()
            session = await client.session()
            go = asyncio.Event()

            async def slow(ctx: Compound, args: Reader, out: Writer) -> int:
                await go.wait()
                return NfsStatus.OK

            scene.replace(Op.ACCESS, slow)
            client.writer.write(framed(10, sequence(session, 1, 0), op(Op.ACCESS)))
            client.writer.write(framed(11, sequence(session, 1, 1)))
            assert (await client.answer())[0] == 11
            go.set()
            assert (await client.answer())[0] == 10

    run(scenario())


def test_a_connection_with_too_much_under_way_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more requests are read than may be under way; the rest is carried out when there is room."""
    monkeypatch.setattr(module, "COMPOUNDS_MAX", 2)

    async def scenario() -> None:
        async with serving() as scene:
            client = await scene.connect()
            session = await client.session()
            go, begun = asyncio.Event(), []

            async def slow(ctx: Compound, args: Reader, out: Writer) -> int:
                begun.append(1)
                await go.wait()
                return NfsStatus.OK

            scene.replace(Op.ACCESS, slow)
            client.writer.write(
                b"".join(framed(10 + slot, sequence(session, 1, slot), op(Op.ACCESS)) for slot in range(6))
            )
            other = await scene.connect()
            assert await other.call(3, exchange_id(b"another"))
            assert len(begun) == 2
            go.set()
            assert {(await client.answer())[0] for _ in range(6)} == set(range(10, 16))
            assert len(begun) == 6

    run(scenario())


def test_a_client_that_does_not_read_is_not_read_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers nobody takes do not pile up, and after a while the connection is given up."""

    async def scenario() -> None:
        async with serving() as scene:
            client = await scene.connect()
            session = await client.session()
            done = []

            def big(ctx: Compound, args: Reader, out: Writer) -> int:
                done.append(1)
                out.opaque(bytes(1 << 19))
                return NfsStatus.OK

            scene.replace(Op.READLINK, big)
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            for slot in range(64):
                client.writer.write(framed(slot, sequence(session, 1, slot), op(Op.READLINK)))
            other = await scene.connect()
            for number in range(5):
                await other.call(number, exchange_id(b"another"))
            assert len(done) < 64
            monkeypatch.setattr(module, "STALL_SECONDS", -1.0)
            (waiting,) = [each for each in scene.server._sessions if each._full]
            waiting.tick(scene.server.loop.time())
            await until(lambda: scene.server.connections == 1)

    run(scenario())


def test_records_that_do_not_end_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, or at once when all together take too much memory; others are not touched."""

    async def scenario() -> None:
        async with serving() as scene:
            good, begun, other = [await scene.connect() for _ in range(3)]
            session = await good.session()
            for each in (begun, other):
                each.writer.write(struct.pack(">I", 1 << 31 | 100_000) + bytes(50_000))
            await until(lambda: sum(each.partial_bytes for each in scene.server._sessions) >= 100_000)
            monkeypatch.setattr(module, "PARTIAL_BYTES_MAX", 60_000)
            scene.server._shed()
            await until(lambda: scene.server.connections < 3)
            assert scene.server.connections == 2
            monkeypatch.setattr(module, "STALL_SECONDS", -1.0)
            for session_left in list(scene.server._sessions):
                session_left.tick(scene.server.loop.time())
            await until(lambda: scene.server.connections < 2)
            assert await good.call(9, sequence(session, 1))

    run(scenario())


def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many takes the place of an idle one; where all are needed it is closed."""
    monkeypatch.setattr(module, "CONNECTIONS_MAX", 1)

    async def scenario() -> None:
        async with serving() as scene:
            first = await scene.connect()
            await first.call(1, exchange_id())
            second = await scene.connect()
            await second.call(1, exchange_id())
            assert await first.reader.read() == b""
            session = await second.session()
            go = asyncio.Event()
            scene.replace(Op.ACCESS, lambda ctx, args, out: go.wait())
            second.writer.write(framed(3, sequence(session, 1), op(Op.ACCESS)))
            await until(lambda: any(each._busy for each in scene.server._sessions))
            third = await scene.connect()
            with contextlib.suppress(ConnectionError):
                assert await third.reader.read() == b""
            go.set()
            assert (await second.answer())[0] == 3

    run(scenario())


def test_what_was_begun_is_carried_out_without_its_connection() -> None:
    """The client may have sent it again on another one: there it finds the answer."""

    async def scenario() -> None:
        async with serving() as scene:
            client = await scene.connect()
            session = await client.session()
            go, done = asyncio.Event(), []

            async def slow(ctx: Compound, args: Reader, out: Writer) -> int:
                await go.wait()
                done.append(1)
                return NfsStatus.OK

            scene.replace(Op.ACCESS, slow)
            request = sequence(session, 1, 0), op(Op.ACCESS)
            client.writer.write(framed(10, *request))
            other = await scene.connect()
            other.writer.write(framed(10, *request))
            await (await scene.connect()).call(1, exchange_id(b"another"))
            client.writer.close()
            go.set()
            xid, body = await other.answer()
            assert xid == 10
            assert struct.unpack_from(">I", body)[0] == NfsStatus.RETRY_UNCACHED_REP
            assert done == [1]

    run(scenario())


def test_time_in_which_nobody_could_be_heard_does_not_count() -> None:
    """A pause between two looks at the clock is a short one at most; otherwise it goes as the loop's does."""
    moments = iter([100.0, 101.0, 103.5, 1003.5, 1004.0])
    clock = Clock(lambda: next(moments))
    assert [clock() for _ in range(4)] == [101.0, 103.5, 106.5, 107.0]


@attrs.define(eq=False)
class Disk:
    """Something slow to make durable, which counts."""

    go: asyncio.Event
    begun: int = 0
    error: SpaceError | None = None

    async def sync(self) -> None:
        self.begun += 1
        await self.go.wait()
        if self.error is not None:
            raise self.error


def test_barriers_are_shared() -> None:
    """While one is under way all who come share the next: two for any number of callers."""

    async def scenario() -> None:
        disk, barriers = Disk(asyncio.Event()), Barriers()
        first = asyncio.ensure_future(barriers.wait([disk]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert disk.begun == 1
        later = [asyncio.ensure_future(barriers.wait([disk])) for _ in range(10)]
        await asyncio.sleep(0)
        assert disk.begun == 1
        later[0].cancel()
        disk.go.set()
        await first
        await asyncio.gather(*later[1:])
        assert disk.begun == 2

    run(scenario())


def test_a_barrier_that_fails_fails_for_all_who_waited() -> None:
    """And the next one is tried anew."""

    async def scenario() -> None:
        disk, barriers = Disk(asyncio.Event(), error=DiskFullError("full")), Barriers()
        disk.go.set()
        results = await asyncio.gather(*(barriers.wait([disk]) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(each, DiskFullError) for each in results)
        disk.error = None
        await barriers.wait([disk])

    run(scenario())
