"""Nodes on loopback: what reaches whom, what is refused, and what is left when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final

import attrs
import pytest

from space._errors import ConflictError, SpaceError, StorageError, UnavailableError, UsageError
from space.replication import certificates, wire
from space.replication.certificates import Tls
from space.replication.connection import Connection
from space.replication.transport import Limits, Transport
from space.replication.wire import CLIENT, Blob, Frame, FrameReader, Goodbye, Hello, Lane, Reason
from space.wal.disk import Buffer

CLUSTER: Final = bytes(range(16))
NOW: Final = datetime.now(UTC)
HOST: Final = "127.0.0.1"
HANG_SECONDS: Final = 120  # a hang detector only

Run = Callable[[Coroutine[Any, Any, None]], None]
Raw = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Recorder:
    """A handler that remembers."""

    def __init__(self) -> None:
        self.raft: list[tuple[int, int, bytes]] = []
        self.payload: list[bytes] = []
        self.unreachable: list[int] = []
        self.asked: list[str] = []
        self.answering = 0
        self.cancelled = 0
        self.go = asyncio.Event()

    def on_raft(self, sender: int, group: int, message: bytes, blobs: list[Blob]) -> None:
        if message == b"poison":
            raise ValueError("not a message of the engine")
        self.raft.append((sender, group, message))
        self.payload.extend(blob.metadata + b"".join(blob.payload) for blob in blobs)

    async def on_request(
        self, sender: int, method: str, body: Any, attachments: list[Buffer]
    ) -> tuple[Any, list[Buffer]]:
        self.asked.append(method)
        if method == "conflict":
            raise ConflictError("it is there", hint="look")
        if method == "bug":
            raise ValueError("a bug")
        if method == "wait":
            self.answering += 1
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            finally:
                self.answering -= 1
        if method == "much":
            return None, [bytes(body)]
        return [sender, method, body], attachments

    def on_unreachable(self, node: int) -> None:
        self.unreachable.append(node)


class Net:
    """The transports of one test, all closed at its end."""

    def __init__(self, directory: Path, *, encrypted: bool) -> None:
        self.directory = directory
        self.encrypted = encrypted
        self.authority = directory / "ca"
        self.nodes: list[Transport] = []
        self.writers: list[asyncio.StreamWriter] = []
        if encrypted:
            certificates.create_authority(self.authority, CLUSTER, now=NOW)

    def tls(self, node: int, now: datetime = NOW) -> Tls | None:
        """Credentials of a node."""
        if not self.encrypted:
            return None
        path = self.directory / f"node{node}"
        if node == CLIENT:
            certificates.issue_client(self.authority, path, "alice", now=now)
        elif not path.exists():
            certificates.issue(self.authority, path, node, [HOST], now=now)
        return Tls.load(path)

    async def node(self, number: int, **options: Any) -> tuple[Transport, Recorder]:
        """A node that listens."""
        recorder = Recorder()
        options = {"cluster": CLUSTER, "listen": (HOST, 0), "tls": None} | options
        options["tls"] = options["tls"] or self.tls(number)
        transport = Transport(node=number, handler=recorder, random=Random(number), **options)
        await transport.start()
        self.nodes.append(transport)
        return transport, recorder

    async def pair(self, **options: Any) -> tuple[Transport, Recorder, Transport, Recorder]:
        """Nodes 1 and 2, connected."""
        one, at_one = await self.node(1, **options)
        two, at_two = await self.node(2, **options)
        one.set_peer(2, *two.address)
        two.set_peer(1, *one.address)
        await until(lambda: one.peers()[2].connected and two.peers()[1].connected)
        return one, at_one, two, at_two

    async def raw(self, transport: Transport, context: ssl.SSLContext | None = None) -> Raw:
        """A connection without manners."""
        reader, writer = await asyncio.open_connection(*transport.address, ssl=context, limit=1 << 26)
        self.writers.append(writer)
        return reader, writer

    async def introduced(self, transport: Transport, node: int, lane: Lane) -> Raw:
        """A connection that was admitted, of which any frame can be sent."""
        tls = self.tls(node)
        reader, writer = await self.raw(transport, tls.client if tls else None)
        writer.writelines(wire.encode_hello(Hello(CLUSTER, node, lane)))
        assert isinstance(await frame_of(reader), Hello)
        return reader, writer

    async def close(self) -> None:
        """Ends everything."""
        for writer in self.writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        for node in self.nodes:
            await node.close()


async def until(condition: Callable[[], object]) -> None:
    """Waits for what is about to happen."""
    async with asyncio.timeout(HANG_SECONDS):
        while not condition():  # noqa: ASYNC110 - what is waited for is of many kinds, and not all of it ours
            await asyncio.sleep(0.002)


async def frame_of(reader: asyncio.StreamReader) -> Frame:
    """The next frame on a raw connection."""
    frames = FrameReader()
    frames.admit()
    async with asyncio.timeout(HANG_SECONDS):
        while (frame := frames.next_frame()) is None:
            data = await reader.readexactly(1)
            frames.get_buffer(-1)[:1] = data
            frames.buffer_updated(1)
    return frame


async def goodbye_of(reader: asyncio.StreamReader) -> Reason:
    """Why a raw connection was ended; pings before that are passed over."""
    while not isinstance(frame := await frame_of(reader), Goodbye):
        assert isinstance(frame, wire.Ping | wire.Pong | wire.Response)
    assert await reader.read() == b""
    return frame.reason


async def ended(reader: asyncio.StreamReader) -> bytes:
    """What a raw connection said before it ended, whichever way."""
    async with asyncio.timeout(HANG_SECONDS):
        try:
            return await reader.read()
        except OSError:
            return b""


LOOPS: Final = ["asyncio", pytest.param("uvloop", marks=pytest.mark.requires("py:uvloop"))]


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine to its end, and sees to it that nothing is left of it."""

    async def alone(work: Coroutine[Any, Any, None]) -> None:
        await work
        assert asyncio.all_tasks() == {asyncio.current_task()}

    def on_loop(work: Coroutine[Any, Any, None]) -> None:
        factory = None
        if request.param == "uvloop":
            import uvloop

            factory = uvloop.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(alone(work))

    return on_loop


@contextlib.asynccontextmanager
async def net_in(directory: Path, *, encrypted: bool = False) -> AsyncIterator[Net]:
    """A net that is closed at the end of the block."""
    net = Net(directory, encrypted=encrypted)
    try:
        yield net
    finally:
        await net.close()


both = pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])


# --- what reaches whom -----------------------------------------------------------------------------


@both
def test_messages_and_requests_go_both_ways(run: Run, tmp_path: Path, encrypted: bool) -> None:
    """Raft messages arrive in order on each lane, requests get their answers, attachments stay whole."""

    async def main() -> None:
        async with net_in(tmp_path, encrypted=encrypted) as net:
            one, at_one, two, at_two = await net.pair()
            for number in range(1000):
                assert one.send_raft(2, number, b"m%d" % number, urgent=True)
            assert two.send_raft(1, 9, b"back", [Blob(1, 2, b"meta", [b"pay", b"load"])], urgent=False)
            large = bytes(range(256)) * 20_000
            answer = await one.request(2, "echo", {"x": [1, b"2"]}, [b"", large], timeout=HANG_SECONDS)
            assert answer[0] == [1, "echo", {"x": [1, b"2"]}]
            assert [bytes(each) for each in answer[1]] == [b"", large]
            await until(lambda: len(at_two.raft) == 1000 and at_one.raft)
            assert at_two.raft == [(1, number, b"m%d" % number) for number in range(1000)]
            assert (at_one.raft, at_one.payload) == ([(2, 9, b"back")], [b"metapayload"])
            await until(lambda: one.peers()[2].rtt_seconds is not None)
            info = one.peers()[2]
            assert (info.connected, info.error, info.address) == (True, "", two.address)
            assert (info.certificate_days is not None) == encrypted
            assert two.callers() == {1: one.address}
            assert at_one.unreachable == at_two.unreachable == []

    run(main())


@both
def test_heartbeats_overtake_a_batch(run: Run, tmp_path: Path, encrypted: bool) -> None:
    """A heartbeat sent after a batch of 32 MiB, to a peer that does not read the batch, arrives before it."""

    async def main() -> None:
        async with net_in(tmp_path, encrypted=encrypted) as net:
            one, _, two, at_two = await net.pair()
            (log,) = [each for each in two._inbound if each.hello.lane is Lane.LOG]
            log.connection.hold()
            payload = memoryview(bytes(range(256)) * (32 << 12))
            assert one.send_raft(2, 1, b"append", [Blob(1, 1, b"", [payload])], urgent=False)
            assert one.send_raft(2, 1, b"heartbeat", urgent=True)
            answer = await one.request(2, "echo", None, timeout=HANG_SECONDS)
            assert answer[0] == [1, "echo", None]
            await until(lambda: at_two.raft)
            assert at_two.raft == [(1, 1, b"heartbeat")]
            assert one.peers()[2].queued_bytes[Lane.LOG] > 0
            log.connection.release()
            await until(lambda: len(at_two.raft) == 2)
            assert at_two.payload == [payload]

    run(main())


def test_a_full_lane_drops_and_says_so(run: Run, tmp_path: Path) -> None:
    """Sending never waits: beyond the bound of a lane it is refused, reported, and possible again later."""

    async def main() -> None:
        async with net_in(tmp_path) as net:
            one, at_one, two, at_two = await net.pair(limits=Limits(log_bytes=1 << 20))
            (log,) = [each for each in two._inbound if each.hello.lane is Lane.LOG]
            log.connection.hold()
            blob = Blob(1, 1, b"", [bytes(1 << 20)])
            sent = 0
            while one.send_raft(2, 1, b"append", [blob], urgent=False):
                assert one.peers()[2].queued_bytes[Lane.LOG] <= (2 << 20) + 100
                sent += 1
                await asyncio.sleep(0)
            assert at_one.unreachable == []  # not while it is sending
            await until(lambda: at_one.unreachable)
            assert (at_one.unreachable, one.stats.dropped) == ([2], 1)
            log.connection.release()
            await until(lambda: len(at_two.raft) == sent)
            assert one.send_raft(2, 1, b"append", [blob], urgent=False)

    run(main())


def test_without_a_connection_nothing_waits(run: Run, tmp_path: Path) -> None:
    """To a peer that is unknown or not there, messages are dropped and requests end with an error of ours."""

    async def main() -> None:
        async with net_in(tmp_path) as net:
            one, at_one = await net.node(1)
            with socket.create_server((HOST, 0)) as gone:
                port = gone.getsockname()[1]
            one.set_peer(3, HOST, port)
            for node in (2, 3):
                assert not one.send_raft(node, 1, b"m", urgent=True)
                with pytest.raises(UnavailableError):
                    await one.request(node, "echo", None, timeout=0.05)
            await until(lambda: {2, 3} <= set(at_one.unreachable))
            await until(lambda: "refused" in one.peers()[3].error)
            assert not one.peers()[3].connected

    run(main())


def test_nobody_talks_to_itself(run: Run, tmp_path: Path) -> None:
    """A node that is sent to itself, or to no node, is the caller's mistake."""

    async def main() -> None:
        async with net_in(tmp_path) as net:
            one, _ = await net.node(1)
            with pytest.raises(UsageError):
                one.send_raft(1, 1, b"m", urgent=True)
            with pytest.raises(UsageError):
                await one.request(1, "echo", None, timeout=1)
            for node, port in ((1, 1), (0, 1), (2, 0), (2, 1 << 16)):
                with pytest.raises(UsageError):
                    one.set_peer(node, HOST, port)

    run(main())


@both
def test_answers_that_are_errors(run: Run, tmp_path: Path, encrypted: bool) -> None:
    """An error of the other side arrives as what it is; a bug there is an error here, and is logged there."""

    async def main() -> None:
        async with net_in(tmp_path, encrypted=encrypted) as net:
            one, _, _, _ = await net.pair()
            with pytest.raises(ConflictError, match="it is there") as caught:
                await one.request(2, "conflict", None, timeout=HANG_SECONDS)
            assert caught.value.hint == "look"
            with pytest.raises(SpaceError, match="a bug"):
                await one.request(2, "bug", None, timeout=HANG_SECONDS)
            with pytest.raises(UsageError):
                await one.request(2, "echo", object(), timeout=HANG_SECONDS)
            assert (await one.request(2, "echo", 1, timeout=HANG_SECONDS))[0] == [1, "echo", 1]

    run(main())


def test_a_request_without_an_answer_ends(run: Run, tmp_path: Path) -> None:
    """After its time a request ends with an error, its late answer harms nobody, and the next one works."""

    async def main() -> None:
        async with net_in(tmp_path) as net:
            one, _, _, at_two = await net.pair()
            with pytest.raises(UnavailableError, match="not known"):
                await one.request(2, "wait", None, timeout=0.05)
            at_two.go.set()
            assert (await one.request(2, "echo", 1, timeout=HANG_SECONDS))[0] == [1, "echo", 1]
            assert one.stats.protocol_errors == 0

    run(main())


def test_a_request_whose_connection_is_lost_ends(run: Run, tmp_path: Path) -> None:
    """When the other node stops, requests it was answering end there and here."""

    async def main() -> None:
        async with net_in(tmp_path) as net:
            one, at_one, two, at_two = await net.pair()
            asking = asyncio.create_task(one.request(2, "wait", None, timeout=HANG_SECONDS))
            await until(lambda: at_two.answering)
            await two.close()
            with pytest.raises(UnavailableError, match="not known"):
                await asking
            assert at_two.cancelled == 1
            await until(lambda: at_one.unreachable)
            assert set(at_one.unreachable) == {2}

    run(main())


@both
def test_a_peer_that_returns_is_found(run: Run, tmp_path: Path, encrypted: bool) -> None:
    """After a peer has stopped and started on the same port, requests and messages reach it again."""

    async def main() -> None:
        async with net_in(tmp_path, encrypted=encrypted) as net:
            one, _, two, _ = await net.pair()
            address = two.address
            await two.close()
            await until(lambda: not one.peers()[2].connected)
            _, at_new = await net.node(2, listen=address)
            assert (await one.request(2, "echo", 1, timeout=HANG_SECONDS))[0] == [1, "echo", 1]
            await until(lambda: one.peers()[2].connected)
            assert one.send_raft(2, 1, b"m", urgent=True)
            await until(lambda: at_new.raft)

    run(main())


def test_who_calls_is_called_back_at_once(run: Run, tmp_path: Path) -> None:
    """A node that waits long before it dials again does not, when the peer shows that it is back."""

    async def main() -> None:
        async with net_in(tmp_path) as net:
            patient = Limits(backoff_first=1e6, backoff_max=1e6)
            one, _ = await net.node(1, limits=patient)
            two, _ = await net.node(2)
            address = two.address
            await two.close()
            one.set_peer(2, *address)
            await until(lambda: "refused" in one.peers()[2].error)
            two, _ = await net.node(2, listen=address)
            two.set_peer(1, *one.address)
            await until(lambda: one.peers()[2].connected)

    run(main())


def test_a_peer_that_moved_is_dialled_there(run: Run, tmp_path: Path) -> None:
    """A new address takes the place of the old one; a forgotten peer is dialled no more."""

    async def main() -> None:
        async with net_in(tmp_path) as net:
            one, _, two, _ = await net.pair()
            moved, _ = await net.node(2)
            one.set_peer(2, *two.address)
            assert one.peers()[2].connected  # nothing new
            one.set_peer(2, *moved.address)
            await until(lambda: one.peers()[2].connected)
            assert one.peers()[2].address == moved.address
            await until(lambda: 1 in moved.callers() and 1 not in two.callers())
            waiting = asyncio.create_task(one.request(2, "wait", None, timeout=HANG_SECONDS))
            await asyncio.sleep(0)
            one.forget_peer(2)
            with pytest.raises(UnavailableError):
                await waiting
            await until(lambda: not moved.callers())
            assert one.peers() == {}
            assert not one.send_raft(2, 1, b"m", urgent=True)

    run(main())


def test_a_silent_peer_is_taken_for_dead(run: Run, tmp_path: Path) -> None:
    """A peer that introduces itself and then answers no ping loses all its connections, and is dialled again."""

    async def main() -> None:
        dialled: list[Lane] = []

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            hello = await frame_of(reader)
            assert isinstance(hello, Hello)
            dialled.append(hello.lane)
            writer.writelines(wire.encode_hello(Hello(CLUSTER, 2, hello.lane)))
            await ended(reader)
            writer.close()

        server = await asyncio.start_server(silent, HOST, 0)
        async with net_in(tmp_path) as net:
            one, at_one = await net.node(1, limits=Limits(ping_seconds=0.01, stalled_pings=1 << 30))
            one.set_peer(2, *server.sockets[0].getsockname())
            await until(lambda: len(dialled) >= 6)
            assert set(dialled[:3]) == set(dialled[3:6]) == set(Lane)
            assert set(at_one.unreachable) == {2}
        server.close()
        await server.wait_closed()
        await until(lambda: len(asyncio.all_tasks()) == 1)

    run(main())


def test_who_takes_no_answers_is_dropped(run: Run, tmp_path: Path) -> None:
    """A peer that asks for much and reads nothing of it is dropped, and what was asked for with it."""

    async def main() -> None:
        async with net_in(tmp_path) as net:
            one, at_one = await net.node(1, limits=Limits(ping_seconds=0.01, stalled_pings=5))
            _, writer = await net.introduced(one, 2, Lane.BULK)
            for number in range(1, 9):
                writer.writelines(wire.encode_request(number, "much", 64 << 20))
            await until(lambda: at_one.asked and not one._inbound)

    run(main())


# --- who is refused --------------------------------------------------------------------------------


def sealed_hello(**changes: Any) -> bytes:
    """An introduction with these fields."""
    hello = attrs.evolve(Hello(CLUSTER, 2, Lane.URGENT), **changes)
    return b"".join(wire.encode_hello(hello))


STRANGERS: Final = {
    "garbage": (b"GET / HTTP/1.1\r\n\r\n" + bytes(20), Reason.PROTOCOL),
    "another cluster": (sealed_hello(cluster=bytes(16)), Reason.CLUSTER),
    "the future": (sealed_hello(versions=(2, 3)), Reason.VERSION),
    "itself": (sealed_hello(node=1), Reason.NODE),
    "a client on a lane of nodes": (sealed_hello(node=CLIENT), Reason.NODE),
    "no introduction": (b"".join(wire.encode_raft(1, b"m")), Reason.PROTOCOL),
    "oversize introduction": (
        b"".join(wire._frame(wire.Kind.HELLO, bytes(5000)))[: wire.HEADER_BYTES],
        Reason.PROTOCOL,
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_are_refused_and_told_why(
    run: Run, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Who does not belong here gets a goodbye with the reason, and one line in the log however often it comes."""
    data, reason = STRANGERS[name]

    async def main() -> None:
        async with net_in(tmp_path) as net:
            one, at_one = await net.node(1)
            for _ in range(5):
                reader, writer = await net.raw(one)
                writer.write(data)
                assert await goodbye_of(reader) is reason
            await until(lambda: one.stats.refused == 5)
            assert (at_one.raft, one.stats.accepted) == ([], 0)

    with caplog.at_level(logging.WARNING, "space.replication"):
        run(main())
    assert len(caplog.records) == 1


@both
def test_the_wrong_node_answers(run: Run, tmp_path: Path, encrypted: bool) -> None:
    """Where another node answers than the one that was called, nothing is sent, and the reason can be seen."""

    async def main() -> None:
        async with net_in(tmp_path, encrypted=encrypted) as net:
            one, _ = await net.node(1)
            two, at_two = await net.node(2)
            one.set_peer(3, *two.address)
            await until(lambda: "node 2 answers" in one.peers()[3].error)
            assert not one.send_raft(3, 1, b"m", urgent=True)
            assert not one.peers()[3].connected
            assert at_two.raft == []

    run(main())


def test_a_node_of_another_cluster_is_not_joined(run: Run, tmp_path: Path) -> None:
    """Two nodes of different clusters do not connect, and both know why."""

    async def main() -> None:
        async with net_in(tmp_path) as net:
            one, _ = await net.node(1)
            two, _ = await net.node(2, cluster=bytes(16))
            one.set_peer(2, *two.address)
            await until(lambda: "another cluster" in one.peers()[2].error)
            assert two.stats.accepted == one.stats.dialled == 0

    run(main())


@pytest.mark.parametrize(
    "which", ["other authority", "other node", "expired", "none", "client as node", "plain"]
)
def test_wrong_certificates_are_refused(run: Run, tmp_path: Path, which: str) -> None:
    """Without the right certificate nobody is admitted, and a peer that has it is served meanwhile."""

    async def main() -> None:
        async with net_in(tmp_path / "net", encrypted=True) as net:
            one, at_one, two, _ = await net.pair()
            accepted = one.stats.accepted
            hello = Hello(CLUSTER, 3, Lane.URGENT)
            context: ssl.SSLContext | None = None
            if which == "other authority":
                certificates.create_authority(tmp_path / "ca", CLUSTER, now=NOW)
                certificates.issue(tmp_path / "ca", tmp_path / "3", 3, [], now=NOW)
                (tmp_path / "3" / "ca.pem").write_bytes((net.authority / "ca.pem").read_bytes())
            elif which == "other node":
                certificates.issue(net.authority, tmp_path / "3", 4, [], now=NOW)
            elif which == "expired":
                certificates.issue(net.authority, tmp_path / "3", 3, [], now=NOW - timedelta(days=1000))
            elif which == "client as node":
                certificates.issue_client(net.authority, tmp_path / "3", "alice", now=NOW)
            if which == "none":
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.check_hostname = False
                context.load_verify_locations(net.authority / "ca.pem")
            elif which != "plain":
                context = Tls.load(tmp_path / "3").client
            reader, writer = await net.raw(one, context)
            writer.writelines(wire.encode_hello(hello))
            writer.writelines(wire.encode_raft(1, b"forged"))
            said = await ended(reader)
            if which in {"other node", "client as node"}:
                frames = FrameReader()
                frames.get_buffer(-1)[: len(said)] = said
                frames.buffer_updated(len(said))
                answer = frames.next_frame()
                assert isinstance(answer, Goodbye)
                assert answer.reason is Reason.CERTIFICATE
            await until(lambda: one.stats.refused == 1)
            assert (one.stats.accepted, at_one.raft) == (accepted, [])
            assert (await two.request(1, "echo", 1, timeout=HANG_SECONDS))[0] == [2, "echo", 1]

    run(main())


def test_credentials_are_ones_own(run: Run, tmp_path: Path) -> None:
    """A node does not start with the certificate of another one."""

    async def main() -> None:
        async with net_in(tmp_path, encrypted=True) as net:
            with pytest.raises(UsageError, match="node/2"):
                await net.node(1, tls=net.tls(2))

    run(main())


def test_certificates_are_replaced_without_a_pause(run: Run, tmp_path: Path) -> None:
    """After a reload open connections stay, and new ones show the new certificate; one near its end is logged."""

    async def main() -> None:
        async with net_in(tmp_path, encrypted=True) as net:
            old = NOW - timedelta(days=certificates.CERTIFICATE_DAYS - 10)
            one, _ = await net.node(1)
            two, _ = await net.node(2, tls=net.tls(2, old))
            one.set_peer(2, *two.address)
            await until(lambda: one.peers()[2].connected)
            assert one.peers()[2].certificate_days in {9, 10}
            certificates.issue(net.authority, tmp_path / "node2", 2, [], now=NOW)
            assert two.tls is not None
            two.tls.reload()
            dialled = one.stats.dialled
            await one.request(2, "echo", 1, timeout=HANG_SECONDS)
            assert one.stats.dialled == dialled
            one._peers[2].abort("to connect anew")
            await until(lambda: one.stats.dialled == dialled + 3)
            assert one.peers()[2].certificate_days in {729, 730}

    run(main())


BROKEN: Final[dict[str, tuple[Lane, list[list[Buffer]]]]] = {
    "replayed request": (Lane.BULK, [wire.encode_request(7, "echo", 1), wire.encode_request(7, "echo", 1)]),
    "request of before": (Lane.BULK, [wire.encode_request(7, "echo", 1), wire.encode_request(6, "echo", 1)]),
    "request 0": (Lane.BULK, [wire.encode_request(0, "echo", 1)]),
    "raft among requests": (Lane.BULK, [wire.encode_raft(1, b"m")]),
    "request among raft": (Lane.LOG, [wire.encode_request(1, "echo", 1)]),
    "an answer to nothing": (Lane.BULK, [wire.encode_response(1, None)]),
    "pings without end": (Lane.URGENT, [wire.encode_ping(1), wire.encode_ping(2)]),
    "a pong": (Lane.URGENT, [wire.encode_pong(1)]),
    "a second hello": (Lane.URGENT, [wire.encode_hello(Hello(CLUSTER, 2, Lane.URGENT))]),
    "garbage": (Lane.LOG, [[bytes(100)]]),
    "poison": (Lane.LOG, [wire.encode_raft(1, b"poison")]),
}


@both
@pytest.mark.parametrize("name", BROKEN)
def test_who_breaks_the_protocol_is_cut_off(run: Run, tmp_path: Path, name: str, encrypted: bool) -> None:
    """After a frame that may not be there the connection ends with the reason, and others stay."""
    lane, frames = BROKEN[name]

    async def main() -> None:
        async with net_in(tmp_path, encrypted=encrypted) as net:
            one, at_one, three = await net_of_one_and_three(net)
            reader, writer = await net.introduced(one, 2, lane)
            for frame in frames:
                writer.writelines(frame)
            assert await goodbye_of(reader) is Reason.PROTOCOL
            assert one.stats.protocol_errors == 1
            assert len(at_one.asked) <= 1
            assert at_one.raft == []
            assert (await three.request(1, "echo", 1, timeout=HANG_SECONDS))[0] == [3, "echo", 1]

    run(main())


async def net_of_one_and_three(net: Net) -> tuple[Transport, Recorder, Transport]:
    """Node 1, and node 3 that is connected to it."""
    one, at_one = await net.node(1)
    three, _ = await net.node(3)
    three.set_peer(1, *one.address)
    await until(lambda: three.peers()[1].connected)
    return one, at_one, three


ANSWERS: Final[dict[str, list[Buffer]]] = {
    "an answer to nothing": wire.encode_response(99, None),
    "a pong to nothing": wire.encode_pong(99),
    "a question": wire.encode_request(1, "echo", 1),
    "raft": wire.encode_raft(1, b"m"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_who_answers_what_was_not_asked_is_cut_off(run: Run, tmp_path: Path, name: str) -> None:
    """A peer that was dialled may answer; a frame that answers nothing ends the connection."""

    async def main() -> None:
        reasons: list[Reason] = []

        async def wrong(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            hello = await frame_of(reader)
            assert isinstance(hello, Hello)
            writer.writelines(wire.encode_hello(Hello(CLUSTER, 2, hello.lane)))
            writer.writelines(ANSWERS[name])
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                reasons.append(await goodbye_of(reader))
            writer.close()

        server = await asyncio.start_server(wrong, HOST, 0)
        async with net_in(tmp_path) as net:
            one, at_one = await net.node(1)
            one.set_peer(2, *server.sockets[0].getsockname())
            await until(lambda: Reason.PROTOCOL in reasons)
            assert (at_one.raft, at_one.asked) == ([], [])
        server.close()
        await server.wait_closed()
        await until(lambda: len(asyncio.all_tasks()) == 1)

    run(main())


@both
def test_silence_is_not_waited_for(run: Run, tmp_path: Path, encrypted: bool) -> None:
    """A connection without an introduction, or without a handshake, is ended after its time."""

    async def main() -> None:
        async with net_in(tmp_path, encrypted=encrypted) as net:
            one, _ = await net.node(1, limits=Limits(hello_seconds=0.05))
            reader, _ = await net.raw(one)
            if encrypted:
                assert await ended(reader) == b""
            else:
                assert await goodbye_of(reader) is Reason.SILENT
            await until(lambda: one.stats.refused == 1 and not one._strangers)

    run(main())


@both
def test_a_flood_of_strangers_leaves_peers_alone(run: Run, tmp_path: Path, encrypted: bool) -> None:
    """With 200 strangers that are silent or send garbage, a peer is served, and another one gets in."""

    async def main() -> None:
        async with net_in(tmp_path, encrypted=encrypted) as net:
            limits = Limits(strangers_max=16)
            one, _, two, _ = await net.pair(limits=limits)
            for number in range(200):
                with contextlib.suppress(OSError):
                    _, writer = await net.raw(one)
                    if number % 2:
                        writer.write(Random(number).randbytes(100))
                assert len(one._strangers) <= 16
                if number % 20 == 0:
                    assert (await two.request(1, "echo", number, timeout=HANG_SECONDS))[0][2] == number
            three, _ = await net.node(3)
            three.set_peer(1, *one.address)
            await until(lambda: three.peers()[1].connected)
            assert two.peers()[1].connected
            assert one.stats.refused > 0

    run(main())


def test_connections_are_bounded(run: Run, tmp_path: Path) -> None:
    """Beyond the bound, who introduces itself is told that there is no room, and the others stay."""

    async def main() -> None:
        async with net_in(tmp_path) as net:
            one, _ = await net.node(1, limits=Limits(connections_max=3))
            kept = [await net.introduced(one, CLIENT, Lane.BULK) for _ in range(3)]
            reader, writer = await net.raw(one)
            writer.writelines(wire.encode_hello(Hello(CLUSTER, CLIENT, Lane.BULK)))
            assert await goodbye_of(reader) is Reason.BUSY
            for reader, writer in kept:
                writer.writelines(wire.encode_request(1, "echo", 1))
                assert isinstance(await frame_of(reader), wire.Response)

    run(main())


def test_a_lane_opened_anew_takes_the_place_of_the_old(run: Run, tmp_path: Path) -> None:
    """The same node on the same lane twice: the older connection ends, nothing of it is delivered any more."""

    async def main() -> None:
        async with net_in(tmp_path) as net:
            one, at_one = await net.node(1, limits=Limits(connections_max=1))
            old, _ = await net.introduced(one, 2, Lane.LOG)
            _, writer = await net.introduced(one, 2, Lane.LOG)
            assert await goodbye_of(old) is Reason.REPLACED
            writer.writelines(wire.encode_raft(1, b"new"))
            await until(lambda: at_one.raft)
            assert at_one.raft == [(2, 1, b"new")]

    run(main())


@both
def test_clients_ask_and_nothing_else(run: Run, tmp_path: Path, encrypted: bool) -> None:
    """An operator's program without a node asks with a certificate of its own, and takes no part in Raft."""

    async def main() -> None:
        async with net_in(tmp_path, encrypted=encrypted) as net:
            one, _ = await net.node(1)
            client, _ = await net.node(CLIENT, listen=None)
            client.set_peer(1, *one.address)
            assert (await client.request(1, "echo", 5, timeout=HANG_SECONDS))[0] == [CLIENT, "echo", 5]
            assert client.peers()[1].connected
            assert not client.send_raft(1, 1, b"m", urgent=False)
            assert one.callers() == {}
            assert client.address == ("", 0)

    run(main())


# --- bounds and ends -------------------------------------------------------------------------------


def test_requests_beyond_the_bound_wait_at_the_asker(run: Run, tmp_path: Path) -> None:
    """A node that is asked more than it takes at once reads no further; nothing is lost of it."""

    async def main() -> None:
        async with net_in(tmp_path) as net:
            one, at_one = await net.node(1, limits=Limits(requests_max=4))
            reader, writer = await net.introduced(one, 2, Lane.BULK)
            for number in range(1, 101):
                writer.writelines(wire.encode_request(number, "wait", number))
            await until(lambda: at_one.answering == 4)
            for _ in range(20):
                await asyncio.sleep(0.001)
                assert (at_one.answering, len(at_one.asked)) == (4, 4)
            at_one.go.set()
            answers = [await frame_of(reader) for _ in range(100)]
            assert [frame.id for frame in answers if isinstance(frame, wire.Response)] == list(range(1, 101))

    run(main())


def test_requests_with_many_bytes_wait_too(run: Run, tmp_path: Path) -> None:
    """What is being answered is bounded by its bytes as well as by its number."""

    async def main() -> None:
        async with net_in(tmp_path) as net:
            one, at_one = await net.node(1, limits=Limits(request_bytes=1 << 20))
            _, writer = await net.introduced(one, 2, Lane.BULK)
            for number in range(1, 9):
                writer.writelines(wire.encode_request(number, "wait", None, [bytes(512 << 10)]))
            await until(lambda: at_one.answering == 2)
            await asyncio.sleep(0.02)
            assert len(at_one.asked) == 2
            at_one.go.set()
            await until(lambda: len(at_one.asked) == 8)

    run(main())


def test_askers_wait_for_room(run: Run, tmp_path: Path) -> None:
    """Requests to a peer that does not read them wait here by number and by bytes, and are answered in the end."""

    async def main() -> None:
        async with net_in(tmp_path) as net:
            one, _, two, _ = await net.pair(
                limits=Limits(
                    requests_max=8,
                    bulk_bytes=1 << 20,
                    ping_seconds=0.01,
                    dead_pings=10_000,
                    stalled_pings=10_000,
                )
            )
            (bulk,) = [each for each in two._inbound if each.hello.lane is Lane.BULK]
            bulk.connection.hold()
            payload = bytes(16 << 20)  # eight of them are more than the kernel takes
            asking = [
                asyncio.create_task(one.request(2, "echo", number, [payload], timeout=HANG_SECONDS))
                for number in range(12)
            ]
            await until(lambda: one.peers()[2].queued_bytes[Lane.BULK] > 1 << 20)
            await asyncio.sleep(0.02)
            assert one.peers()[2].queued_bytes[Lane.BULK] <= (16 << 20) + (2 << 20)
            assert len(one._peers[2].links[Lane.BULK]._pending) <= 8
            bulk.connection.release()
            answers = await asyncio.gather(*asking)
            assert [answer[0][2] for answer in answers] == list(range(12))

    run(main())


@both
def test_closing_leaves_nothing(run: Run, tmp_path: Path, encrypted: bool) -> None:
    """After closing there is no task and no socket, requests have ended, and the port is free."""

    async def main() -> None:
        async with net_in(tmp_path, encrypted=encrypted) as net:
            one, _, two, at_two = await net.pair()
            reader, _ = await net.raw(one)
            asking = [
                asyncio.create_task(one.request(2, "wait", None, timeout=HANG_SECONDS)) for _ in range(300)
            ]  # more than there is room for
            await until(lambda: at_two.answering == 256)
            address = one.address
            await one.close()
            for each in asking:
                with pytest.raises(UnavailableError):
                    await each
            await ended(reader)
            assert (one._connections, one._tasks, one._inbound) == (set(), set(), set())
            assert not one._strangers
            await until(lambda: at_two.cancelled == 256)
            await one.close()
            await net.node(1, listen=address)
            await until(lambda: two.peers()[1].connected)

    run(main())


def test_closing_while_dialling(run: Run, tmp_path: Path) -> None:
    """A node that has just begun to dial, or was never answered, closes as well."""

    async def main() -> None:
        with socket.create_server((HOST, 0)) as deaf:
            async with net_in(tmp_path, encrypted=True) as net:
                for turns in range(8):
                    one, _ = await net.node(1)
                    one.set_peer(2, *deaf.getsockname())
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    await one.close()
                one, _ = await net.node(1)
                two, _ = await net.node(2)
                for turns in range(40):
                    dialler, _ = await net.node(3)
                    dialler.set_peer(2, *two.address)
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    await dialler.close()

    run(main())


def test_an_address_that_is_taken(run: Run, tmp_path: Path) -> None:
    """A port somebody else listens on is an error of ours that names it."""

    async def main() -> None:
        async with net_in(tmp_path) as net:
            one, _ = await net.node(1)
            with pytest.raises(UsageError):
                await net.node(2, listen=(HOST, 1 << 17))
            for address in (one.address, ("no.such.host.invalid", 1)):
                with pytest.raises(StorageError, match=address[0]):
                    await net.node(2, listen=address)

    run(main())


def test_peers_can_be_named_before_the_start(run: Run, tmp_path: Path) -> None:
    """Peers that are known before a node starts are dialled when it does."""

    async def main() -> None:
        async with net_in(tmp_path) as net:
            two, _ = await net.node(2)
            one = Transport(node=1, cluster=CLUSTER, listen=(HOST, 0), handler=Recorder(), tls=None)
            net.nodes.append(one)
            one.set_peer(2, *two.address)
            await one.start()
            await until(lambda: one.peers()[2].connected)

    run(main())


def test_a_handshake_that_cannot_begin_takes_no_file_along(run: Run, tmp_path: Path) -> None:
    """Where the other side resets a connection before the first byte, its descriptor is closed once, and no other."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with net_in(tmp_path, encrypted=True) as net:
            one, _ = await net.node(1)
            tls = net.tls(1)
            assert tls is not None
            with socket.create_server((HOST, 0)) as deaf:
                for _ in range(20):
                    sock = socket.create_connection(deaf.getsockname())
                    sock.setblocking(False)
                    accepted, _ = deaf.accept()
                    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    accepted.close()
                    connection = one.connection()
                    making = loop.create_connection(
                        partial(_same, connection), sock=sock, ssl=tls.client, server_hostname=HOST
                    )
                    with pytest.raises(OSError):
                        await one.make(making, sock, connection)
                    number = os.open(tmp_path, os.O_RDONLY)
                    await asyncio.sleep(0)
                    del sock, making
                    gc.collect()
                    os.close(number)

    run(main())


def _same(connection: Connection) -> Connection:
    return connection
