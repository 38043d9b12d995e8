"""Connections of the kernel's NFS client, which lead to whichever of several servers answers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from space._errors import UnavailableError
from space._node import csi_relay
from space._node.csi_network import NULL_CALL, NULL_REPLY
from space._node.csi_relay import HOST, Relays

pytestmark = [pytest.mark.unit, pytest.mark.requires("py:google.protobuf")]

HANG_SECONDS = 60.0


class Server:
    """Says that it is an NFS server, and then its name before whatever it is sent."""

    def __init__(self, name: bytes, port: int = 0) -> None:
        self._name = name
        self._port = port
        self.speaks = asyncio.Event()
        self.speaks.set()
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> str:
        """Where it is."""
        self._listening = await asyncio.start_server(self._serve, HOST, self._port)
        self._port = self._listening.sockets[0].getsockname()[1]
        return f"{HOST}:{self._port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            if await reader.readexactly(len(NULL_CALL)) != NULL_CALL:
                return
            await self.speaks.wait()
            writer.write(NULL_REPLY)
            while data := await reader.read(1 << 16):
                writer.write(self._name + data)
                await writer.drain()
        writer.close()

    def stop(self) -> None:
        """Its port is closed, and so are its connections."""
        self._listening.close()
        for each in self._writers:
            each.transport.abort()


@contextlib.asynccontextmanager
async def relays() -> AsyncIterator[Relays]:
    """None yet, and none afterwards."""
    found = Relays()
    yield found
    await found.close()


def run(work: Callable[[], Awaitable[None]]) -> None:
    """Runs a test; one that hangs is found."""

    async def main() -> None:
        async with asyncio.timeout(HANG_SECONDS):
            await work()

    asyncio.run(main())


async def said(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """What is answered to a word."""
    writer.write(b"word")
    return await reader.readexactly(5)


def test_connections_lead_to_the_server_that_serves() -> None:
    """A connection leads to the one that listens; when that ends the connection does, and the next one leads on."""

    async def work() -> None:
        one, two = Server(b"1"), Server(b"2")
        places = [await one.start(), await two.start()]
        two.stop()
        async with relays() as made:
            port = await made.port(places)
            reader, writer = await asyncio.open_connection(HOST, port)
            assert await said(reader, writer) == b"1word"
            one.stop()
            two = Server(b"2", int(places[1].split(":")[1]))
            await two.start()
            assert await reader.read() == b""
            writer.close()
            reader, writer = await asyncio.open_connection(HOST, port)
            assert await said(reader, writer) == b"2word"
            writer.close()
            two.stop()

    run(work)


def test_a_connection_waits_for_a_server() -> None:
    """While nobody serves a connection is held, and is carried on as soon as somebody does."""

    async def work() -> None:
        with socket.create_server((HOST, 0)) as found:
            port = found.getsockname()[1]
        async with relays() as made:
            reader, writer = await asyncio.open_connection(
                HOST, await made.port([f"{HOST}:{port}", f"{HOST}:{port}"])
            )
            writer.write(b"word")
            server = Server(b"s", port)
            await server.start()
            assert await reader.readexactly(5) == b"sword"
            writer.close()
            server.stop()

    run(work)


def test_a_server_that_says_nothing_is_left_for_one_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes connections and is mute is left when another one answers, and not before."""
    monkeypatch.setattr(csi_relay, "WATCH_SECONDS", 0.02)
    monkeypatch.setattr(csi_relay, "ANSWER_SECONDS", 0.2)

    async def work() -> None:
        one, two = Server(b"1"), Server(b"2")
        places = [await one.start(), await two.start()]
        two.speaks.clear()
        async with relays() as made:
            reader, writer = await asyncio.open_connection(HOST, await made.port(places))
            assert await said(reader, writer) == b"1word"
            one.speaks.clear()
            await asyncio.sleep(0.5)
            assert await said(reader, writer) == b"1word"
            two.speaks.set()
            assert await reader.read() == b""
            writer.close()
            reader, writer = await asyncio.open_connection(HOST, await made.port(places))
            assert await said(reader, writer) == b"2word"
            writer.close()
            one.speaks.set()
            for each in (one, two):
                each.stop()

    run(work)


def test_all_bytes_pass() -> None:
    """What is sent through in both directions at once comes whole and in order, more than any buffer holds."""

    async def work() -> None:
        server = Server(b"")
        place = await server.start()
        async with relays() as made:
            reader, writer = await asyncio.open_connection(HOST, await made.port([place, place]))
            data = b"".join(number.to_bytes(4, "big") for number in range(1 << 20))

            async def send() -> None:
                writer.write(data)
                await writer.drain()

            sending = asyncio.create_task(send())
            assert await reader.readexactly(len(data)) == data
            await sending
            writer.close()
            server.stop()

    run(work)


def test_an_address_is_the_same_again() -> None:
    """The same servers have one port; after a restart it is the one that was noted, unless somebody else has it."""

    async def work() -> None:
        servers = ["192.0.2.1:2049", "192.0.2.2:2049"]
        async with relays() as made:
            port = await made.port(servers)
            assert await made.port(servers) == port
            assert await made.port(servers[::-1]) != port
        async with relays() as made:
            assert await made.port(servers, port) == port
            async with relays() as other:
                with pytest.raises(UnavailableError, match="cannot listen"):
                    await other.port(servers, port)

    run(work)
