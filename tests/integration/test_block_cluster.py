"""Block devices over the members of a cluster: one namespace, served by every node."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from space._errors import UnavailableError
from space._node import local_block
from space._node.cluster import ClusterNode, found, join
from space._node.local_block import BlockWriter, LocalBlockDevice, namespace_number
from space.policy.model import Policy
from space.projections.block import BlockDevice
from tests.store_support import texture

pytestmark = pytest.mark.requires("py:space_raft_engine")

SIZE = 1 << 20
RAW = Policy.from_document({"compression": "none", "dedupe": False})
NQN = "nqn.2014-08.org.example:store"


def free_address() -> str:
    """An address on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[ClusterNode]]:
    """Two nodes of a cluster, the first of which founded it."""
    addresses = [free_address(), free_address()]
    config = found(tmp_path / "1", listen=addresses[0], tls=False)
    joining = join(
        tmp_path / "2",
        node=2,
        cluster=config.cluster,
        listen=addresses[1],
        tls=False,
        peers={1: addresses[0]},
    )
    with ClusterNode(tmp_path / "1", config) as first, ClusterNode(tmp_path / "2", joining) as second:
        first.change_members("add", 2, addresses[1])
        yield [first, second]


async def held(opened: BlockDevice, offset: int, length: int) -> bytes:
    """The bytes of a range."""
    return b"".join(await opened.read(offset, length))


def test_every_node_serves_the_same_bytes(nodes: list[ClusterNode]) -> None:
    """What is acknowledged through one node is read through the other at once, and comparing sees it on both."""
    capsule = nodes[0].store.create(size=SIZE, block_size=4096, policy=RAW)

    async def run() -> None:
        writers = [BlockWriter(node.store) for node in nodes]
        devices = [
            LocalBlockDevice(node.store, capsule, writer=writer)
            for node, writer in zip(nodes, writers, strict=True)
        ]
        for number in range(20):
            one, other = devices[number % 2], devices[1 - number % 2]
            await one.write(number * 4096, texture(4096, number), durable=number % 3 == 0, actor="host")
            assert await held(other, number * 4096, 4096) == texture(4096, number)
        await asyncio.gather(
            *(
                devices[at % 2].write(at * 4096, texture(4096, at + 1), durable=True, actor="host")
                for at in range(64)
            )
        )
        for each in devices:
            assert await held(each, 0, 64 * 4096) == b"".join(texture(4096, at + 1) for at in range(64))
        await devices[1].copy([(0, 8192)], 65 * 4096, durable=False, actor="host")
        assert await held(devices[0], 65 * 4096, 8192) == texture(4096, 1) + texture(4096, 2)
        await devices[1].flush()

        async def count(opened: LocalBlockDevice) -> None:
            for _ in range(3):
                while True:
                    now = await held(opened, SIZE - 4096, 4096)
                    later = (int.from_bytes(now, "little") + 1).to_bytes(4096, "little")
                    if (
                        await opened.compare_and_write(SIZE - 4096, now, later, durable=True, actor="host")
                        < 0
                    ):
                        break

        await asyncio.gather(*(count(devices[each % 2]) for each in range(4)))
        assert int.from_bytes(await held(devices[1], SIZE - 4096, 4096), "little") == 12
        for each, writer in zip(devices, writers, strict=True):
            each.close()
            await writer.close()

    asyncio.run(run())
    assert namespace_number(nodes[1].store, NQN, capsule) == namespace_number(nodes[0].store, NQN, capsule)


def test_a_node_that_has_ended_answers_with_an_error(
    nodes: list[ClusterNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads and writes that nobody will answer any more end as unavailable, not never."""
    capsule = nodes[0].store.create(size=SIZE, block_size=4096, policy=RAW)
    monkeypatch.setattr(local_block, "ANSWER_SECONDS", 0.5)

    async def run() -> None:
        writer = BlockWriter(nodes[1].store)
        opened = LocalBlockDevice(nodes[1].store, capsule, writer=writer)
        await opened.write(0, texture(4096), durable=False, actor="host")
        await asyncio.to_thread(nodes[0].stop)
        await asyncio.to_thread(nodes[0].ended.wait, 60)
        with pytest.raises(UnavailableError):
            await opened.read(0, 4096)
        with pytest.raises(UnavailableError):
            await opened.write(0, texture(4096), durable=False, actor="host")
        opened.close()
        await writer.close()

    asyncio.run(run())
