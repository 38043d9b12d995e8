"""One NVMe subsystem through every node of a cluster of real processes: paths, failover, reservations."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from space.events.ids import CapsuleId
from tests.cli_support import execute, finish, start
from tests.cluster_support import HANG_SECONDS, dev
from tests.nvme_cluster import BLOCK, Cluster, founding
from tests.nvme_initiator import DISCOVERY_NQN, FailedError, Host, IoQueue, status_of

pytestmark = [pytest.mark.requires("py:space_raft_engine"), pytest.mark.integration]

OTHER_HOST: Final = "nqn.2014-08.org.nvmexpress:uuid:11111111-2222-4333-8444-555555555555"
OTHER_ID: Final = bytes(range(16))
OPTIMIZED, NON_OPTIMIZED, INACCESSIBLE = 1, 2, 3
ANA_INACCESSIBLE, RESERVATION_CONFLICT, INTERRUPTED = 0x302, 0x083, 0x021
RETRIES: Final = 5
"""What Linux has as nvme_max_retries."""
ANA_CHANGED: Final = 0x000C_0302
"""Asynchronous event: a notice (2), of an ANA change (3), to be read in log page 0Ch."""
RESERVATION_NOTICE: Final = 0x0080_0006
EVENTS: Final = 0x0B
"""The feature with the events a host wants."""


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of three that serves a device of 8 MiB in blocks of 4096 bytes."""
    with founding(tmp_path_factory.mktemp("nvme") / "cluster", size="8MiB") as found:
        yield found


@pytest.fixture
def cluster(founded: Cluster) -> Cluster:
    """The cluster with all its nodes running."""
    founded.start(*(founded.directories.keys() - founded.nodes.keys()))
    founded.leader()
    return founded


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """A scenario, which must end."""

    async def bounded() -> None:
        async with asyncio.timeout(2 * HANG_SECONDS):
            await scenario()

    asyncio.run(bounded())


@contextlib.asynccontextmanager
async def paths(cluster: Cluster, **options: Any) -> AsyncIterator[dict[int, Host]]:
    """A host connected through every node."""
    async with contextlib.AsyncExitStack() as stack:
        found = {}
        for number in sorted(cluster.nodes):
            found[number] = await cluster.connect(number, **options)
            await stack.enter_async_context(found[number])
        yield found


async def ana(host: Host) -> tuple[int, int, int, list[int]]:
    """Change count, group, its state and its namespaces, of the only group."""
    log = await host.admin.log(0x0C, 4096)
    changes, groups = struct.unpack_from("<QH", log)
    assert groups == 1
    group, count, _, state = struct.unpack_from("<IIQB", log, 16)
    return changes, group, state, list(struct.unpack_from(f"<{count}I", log, 48))


async def until(what: str, question: Callable[[], Awaitable[object]]) -> None:
    """Returns when the answer to a question is true."""
    deadline = time.monotonic() + HANG_SECONDS
    while not await question():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.05)


async def told(host: Host, event: int) -> None:
    """Returns when the host is told of an event."""
    assert (await asyncio.wait_for(host.admin.event(), HANG_SECONDS)).checked().result == event


async def settled(queue: IoQueue, lba: int, data: bytes) -> int:
    """The status of a write that is repeated, as hosts do, while it is interrupted by a change of reservations."""
    for _ in range(RETRIES):
        status = await status_of(queue.write(1, lba, data, BLOCK))
        if status != INTERRUPTED:
            return status
    return INTERRUPTED


def texture(number: int) -> bytes:
    """A block that no other number has."""
    return struct.pack("<Q", number) * (BLOCK // 8)


def test_every_node_is_a_path_of_one_subsystem(cluster: Cluster) -> None:
    """Names, numbers and bytes are the same through all; controllers and ports are apart; one path is optimized."""

    async def scenario() -> None:
        assert len({cluster.nqn(number) for number in cluster.nodes}) == 1
        leads = cluster.leader()
        async with paths(cluster) as hosts:
            numbers = {number: host.number for number, host in hosts.items()}
            assert numbers == {1: 1, 2: 1025, 3: 2049}
            first = hosts[1].admin
            descriptors = {await host.admin.identify(3, nsid=1) for host in hosts.values()}
            serials = {(await host.admin.identify(1))[4:64] for host in hosts.values()}
            spaces = {(await host.admin.identify(0, nsid=1))[:24] for host in hosts.values()}
            assert len(descriptors) == len(serials) == len(spaces) == 1
            assert (await first.identify(0, nsid=1))[31] & 1  # reservations outlive a loss of power
            states = {}
            for number, host in hosts.items():
                _, group, states[number], namespaces = await ana(host)
                assert (group, namespaces) == (1, [1])
            assert states == {each: OPTIMIZED if each == leads else NON_OPTIMIZED for each in hosts}
            for number, host in hosts.items():
                await host.queues[0].write(1, number, texture(number), BLOCK)
                for other in hosts.values():
                    assert await other.queues[0].read(1, number, 1, BLOCK) == texture(number)

    run(scenario)


def entries(log: bytes) -> set[tuple[int, int, int, str]]:
    """Subtype, port number, port and name of the entries of a discovery log."""
    (count,) = struct.unpack_from("<Q", log, 8)
    found = set()
    for at in range(1024, 1024 * (1 + count), 1024):
        subtype, number = log[at + 2], struct.unpack_from("<H", log, at + 4)[0]
        service, name = log[at + 32 : at + 64], log[at + 256 : at + 512]
        found.add((subtype, number, int(service), name.rstrip(b"\0").decode()))
    return found


def test_each_node_names_all_of_them(cluster: Cluster) -> None:
    """The discovery log has the subsystem at every node's port and the others' services; hosts hear of a change."""

    async def scenario() -> None:
        nqn = cluster.nqn(1)
        subsystems = {(2, 2 * number - 1, port, nqn) for number, port in cluster.ports.items()}
        for number, port in cluster.ports.items():
            others = {
                (1, 2 * each - 1, cluster.ports[each], DISCOVERY_NQN)
                for each in cluster.ports if each != number
            }  # fmt: skip
            itself = {(3, 2 * number - 1, port, DISCOVERY_NQN)}
            async with await Host.connect(port, DISCOVERY_NQN, queues=0) as host:

                async def complete(host: Host = host, wanted: object = subsystems | others | itself) -> bool:
                    return entries(await host.admin.log(0x70, 8192)) == wanted

                await until(f"the log of node {number} is complete", complete)

    run(scenario)


def test_hosts_are_told_when_another_node_leads(cluster: Cluster) -> None:
    """The event comes on both paths, the log counts it, and the states are the other way round."""

    async def scenario() -> None:
        old = cluster.leader()
        new = next(number for number in cluster.nodes if number != old)
        async with paths(cluster) as hosts:
            counts = {}
            for number in (old, new):
                await hosts[number].admin.set_feature(EVENTS, 1 << 11)
                counts[number] = (await ana(hosts[number]))[0]
            events = [asyncio.create_task(told(hosts[each], ANA_CHANGED)) for each in (old, new)]
            await asyncio.to_thread(cluster.lead, new)
            await asyncio.gather(*events)

            async def turned() -> bool:
                found = [(await ana(hosts[each]))[2] for each in (old, new)]
                return found == [NON_OPTIMIZED, OPTIMIZED]

            await until("the states are those of the new leader", turned)
            for number in (old, new):
                assert (await ana(hosts[number]))[0] > counts[number]

    run(scenario)


def test_a_path_without_a_quorum_sends_hosts_elsewhere(cluster: Cluster) -> None:
    """With two of three nodes gone the last one says so, in its log and to commands; nothing fails for good."""

    async def scenario() -> None:
        lasting = next(number for number in cluster.nodes if number != cluster.leader())
        gone = [number for number in cluster.nodes if number != lasting]
        async with await cluster.connect(lasting) as host:
            (queue,) = host.queues
            await queue.write(1, 0, texture(7), BLOCK)
            cluster.kill(*gone)

            async def inaccessible() -> bool:
                return (await ana(host))[2] == INACCESSIBLE

            await until("no leader is known", inaccessible)
            for command in (queue.read(1, 0, 1, BLOCK), queue.write(1, 1, texture(8), BLOCK), queue.flush(1)):
                with pytest.raises(FailedError) as caught:
                    await command
                assert caught.value.status == ANA_INACCESSIBLE
                assert not caught.value.completion.do_not_retry
            await asyncio.to_thread(cluster.start, *gone)

            async def back() -> bool:
                return (await ana(host))[2] != INACCESSIBLE

            await until("there is a leader", back)
            assert await queue.read(1, 0, 1, BLOCK) == texture(7)

    run(scenario)


def test_writes_go_on_through_another_node_when_the_leader_dies(cluster: Cluster) -> None:
    """Commands on a follower's path wait for the next leader, and none of them fails."""

    async def scenario() -> None:
        old = cluster.leader()
        through = next(number for number in cluster.nodes if number != old)
        async with await cluster.connect(through) as host:
            (queue,) = host.queues
            written = 0
            over = asyncio.Event()

            async def write() -> None:
                nonlocal written
                while not over.is_set():
                    await queue.write(1, written % 2048, texture(written), BLOCK)
                    written += 1

            async def more(wanted: int) -> bool:
                return written >= wanted

            writing = asyncio.create_task(write())
            await until("some are written", lambda: more(20))
            await asyncio.to_thread(cluster.kill, old)
            after = written
            await until("it goes on", lambda: more(after + 20))
            over.set()
            await writing
            for number in range(max(0, written - 2048), written):
                assert await queue.read(1, number % 2048, 1, BLOCK) == texture(number)

    run(scenario)


def reported(data: bytes) -> tuple[int, int, int, list[tuple[int, int, bytes]]]:
    """Generation, type, persistence, and holder flag, key and host of each registrant."""
    generation, kind, count, persists = struct.unpack_from("<IBHxxB", data)
    rows = [struct.unpack_from("<HB5xQ16s", data, 64 * (1 + number)) for number in range(count)]
    return generation, kind, persists, [row[1:] for row in rows]


async def report(queue: IoQueue) -> tuple[int, int, int, list[tuple[int, int, bytes]]]:
    """As a node reports it."""
    return reported(await queue.report(1))


def test_reservations_are_one_through_all_nodes_and_outlive_them(cluster: Cluster) -> None:
    """What one node grants another one enforces, at once and after all of them were killed; the preempted is told."""

    async def scenario() -> None:
        async with paths(cluster) as mine, paths(cluster, host=OTHER_HOST, host_id=OTHER_ID) as theirs:
            await mine[1].queues[0].register(1, 0xA)
            await mine[2].queues[0].acquire(1, 1, 0xA)
            for number in cluster.nodes:
                refused = await settled(theirs[number].queues[0], 0, texture(1))
                assert refused == RESERVATION_CONFLICT
                assert await settled(mine[number].queues[0], 0, texture(number)) == 0
            await theirs[3].queues[0].register(1, 0xB)
            event = asyncio.create_task(told(mine[1], RESERVATION_NOTICE))
            await asyncio.sleep(0)
            await theirs[2].queues[0].acquire(1, 3, 0xB, preempt=0xA)
            for number in cluster.nodes:
                refused = await settled(mine[number].queues[0], 0, texture(1))
                assert refused == RESERVATION_CONFLICT
            await event
            notice = struct.unpack_from("<QBB2xI", await mine[1].admin.log(0x80, 64))
            assert notice[1:] == (1, 0, 1)  # registration preempted, none left, namespace
            reports = [await report(host.queues[0]) for host in theirs.values()]
            assert len({repr(each) for each in reports}) == 1
            before = reports[0]
            assert before[1:] == (3, 1, [(1, 0xB, OTHER_ID)])
        await asyncio.to_thread(cluster.kill, *cluster.directories)
        await asyncio.to_thread(cluster.start, *cluster.directories)
        await asyncio.to_thread(cluster.leader)
        async with paths(cluster) as mine, paths(cluster, host=OTHER_HOST, host_id=OTHER_ID) as theirs:
            for number in cluster.nodes:
                assert await report(theirs[number].queues[0]) == before
                refused = await settled(mine[number].queues[0], 0, texture(1))
                assert refused == RESERVATION_CONFLICT
                assert await settled(theirs[number].queues[0], 0, texture(9)) == 0
            await theirs[1].queues[0].release(1, 3, 0xB)

            assert await settled(mine[1].queues[0], 0, texture(1)) == 0

    run(scenario)


def asked(cluster: Cluster, *arguments: str) -> subprocess.Popen[str]:
    """``space project --view nvme`` asked of the first node."""
    node = ("--node", cluster.nodes[1].url)
    return start(Path("/nowhere"), *node, "project", "--view", "nvme", *arguments, stderr=None)


def test_a_running_node_is_asked_to_serve(cluster: Cluster) -> None:
    """The command on a node's directory has the node serve until it ends; there is one view, which stop ends."""
    home, at = cluster.directories[1], f"127.0.0.1:{cluster.ports[1]}"
    other = execute(home, "project", "--view", "nvme", "--path", "/disk", "--listen", "127.0.0.1:0")
    assert (other.status, at in other.err) == (4, True)
    wrong = execute(
        home, "--node", cluster.nodes[1].url, "project", "--view", "nvme", "--path", "/d", "--at", "@1"
    )
    assert wrong.status == 2
    assert execute(home, "project", "stop", at).status == 0
    missing = execute(home, "project", "--view", "nvme", "--path", "/nothing", "--listen", at)
    assert missing.status == 3, missing.err
    process = asked(cluster, "--path", "/disk", "--listen", at)
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert (ready["target"], ready["nqn"], ready["node"]) == (at, cluster.nqn(2), True)

        async def scenario() -> None:
            async with await cluster.connect(1) as host:
                await host.queues[0].write(1, 0, texture(3), BLOCK)
                process.terminate()
                assert await asyncio.to_thread(process.wait, HANG_SECONDS) == 0
                await host.admin.ended()

        run(scenario)
    finally:
        finish(process)
    assert execute(home, "stat", "/disk").status == 0  # the node is still there
    cluster.kill(1)  # the next test finds it as its configuration says


def test_each_shard_has_a_group(tmp_path: Path) -> None:
    """A capsule of two shards is in the group of its own, whose leader has the optimized path; all take writes."""
    with dev(tmp_path / "cluster", "--nodes", "3", "--shards", "2", "--insecure") as (_, nodes):
        url = nodes[0]["url"]
        by_shard: dict[int, str] = {}
        while len(by_shard) < 2:
            made = execute(
                Path("/nowhere"), "--node", url, "create", "--size", "1MiB", "--block-size", str(BLOCK)
            )
            by_shard.setdefault(CapsuleId.parse(made.out.strip()).shard_keys(2), made.out.strip())
        options = [argument for shard in (0, 1) for argument in ("--id", by_shard[shard])]
        views = [
            start(
                Path(each["data"]),
                "project",
                "--view",
                "nvme",
                *options,
                "--listen",
                "127.0.0.1:0",
                stderr=None,
            )
            for each in nodes
        ]
        try:
            found = [json.loads(each.stdout.readline()) for each in views if each.stdout is not None]

            async def scenario() -> None:
                async with contextlib.AsyncExitStack() as stack:
                    hosts = []
                    for each in found:
                        port = int(each["address"].rpartition(":")[2])
                        hosts.append(await stack.enter_async_context(await Host.connect(port, each["nqn"])))

                    async def settled() -> bool:
                        states = [states_of(await host.admin.log(0x0C, 4096)) for host in hosts]
                        return all(
                            sorted(each[group] for each in states)
                            == [(1, [group]), (2, [group]), (2, [group])]
                            for group in (1, 2)
                        )

                    await until("each group has one optimized path", settled)
                    for number, host in enumerate(hosts):
                        for nsid in (1, 2):
                            await host.queues[0].write(nsid, number, texture(number + nsid), BLOCK)
                    for nsid in (1, 2):
                        held = await hosts[0].queues[0].read(nsid, 0, 3, BLOCK)
                        assert held == b"".join(texture(number + nsid) for number in range(3))

            run(scenario)
        finally:
            for each in views:
                each.terminate()
                finish(each)


def states_of(log: bytes) -> dict[int, tuple[int, list[int]]]:
    """State and namespaces of each group of an ANA log."""
    (count,) = struct.unpack_from("<8xH", log)
    found, at = {}, 16
    for _ in range(count):
        group, members, _, state = struct.unpack_from("<IIQB", log, at)
        found[group] = (state, list(struct.unpack_from(f"<{members}I", log, at + 32)))
        at += 32 + 4 * members
    return found
