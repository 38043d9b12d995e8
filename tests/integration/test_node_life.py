"""A node of a cluster where its disk, its peers or its own start fail for a while."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from space._errors import CorruptionError, SpaceError, StorageError, UnavailableError
from space._node import cluster
from space._node.cluster import NODE_FILE, ClusterNode, _fetch_chunk, found
from space.events.commands import Buffer
from space.replication.node import Node
from space.replication.transport import Transport
from space.wal.faulty_disk import FaultyDisk
from space.wal.log import Log
from space.wal.shipping import encode_chunk, read_chunk
from tests.chaos.processes import HANG_SECONDS, eventually, free_ports

pytestmark = [pytest.mark.integration, pytest.mark.requires("py:space_raft_engine")]


def test_where_peers_are_is_noted_when_the_disk_takes_it_again(tmp_path: Path) -> None:
    """What could not be written to the node's file is written later: without it a damaged node asks nobody."""
    config = found(tmp_path, listen=f"127.0.0.1:{free_ports(1)[0]}", tls=False)
    obstacle = tmp_path / (NODE_FILE + ".new")
    with ClusterNode(tmp_path, config) as node:
        obstacle.mkdir()
        with pytest.raises(UnavailableError):  # nobody is there to catch up
            node.call(lambda each: each.change_members("add", 2, "127.0.0.1:9"), seconds=1.0)
        assert node.config.peers == {}
        obstacle.rmdir()
        eventually("it is noted", lambda: json.loads((tmp_path / NODE_FILE).read_text())["peers"])
        assert node.config.peers == {2: "127.0.0.1:9"}


def test_a_node_that_breaks_while_it_starts_has_ended_before_its_log_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log of a node is closed when none of its threads can write to it any more."""
    config = found(tmp_path, listen=f"127.0.0.1:{free_ports(1)[0]}", tls=False)
    start, close = Node.start, ClusterNode._close_stores
    ran: list[bool] = []

    async def broken(self: Node) -> None:
        await start(self)
        self._on_fatal(StorageError("the disk is gone"))

    def closing(self: ClusterNode) -> None:
        ran.append(self._thread.is_alive())
        close(self)

    monkeypatch.setattr(Node, "start", broken)
    monkeypatch.setattr(ClusterNode, "_close_stores", closing)
    with pytest.raises(StorageError, match="the disk is gone"):
        ClusterNode(tmp_path, config)
    assert ran == [False]


def test_who_asks_a_node_that_stops_is_told_so(tmp_path: Path) -> None:
    """A call that the node has begun, and cannot end because it stops, fails as one to a node that is down does."""
    config = found(tmp_path, listen=f"127.0.0.1:{free_ports(1)[0]}", tls=False)
    begun = threading.Event()
    failures: list[BaseException] = []

    async def never(_: Node) -> None:
        begun.set()
        await asyncio.Event().wait()

    def ask(node: ClusterNode) -> None:
        try:
            node.call(never, seconds=HANG_SECONDS)
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            failures.append(error)

    with ClusterNode(tmp_path, config) as node:
        asking = threading.Thread(target=ask, args=(node,))
        asking.start()
        assert begun.wait(HANG_SECONDS)
    asking.join()
    assert [type(each) for each in failures] == [UnavailableError]


class Peers:
    """What peers answer to who heals, in order: bytes of a chunk, or an error."""

    node = 3

    def __init__(self, answers: Sequence[bytes | SpaceError]) -> None:
        self._answers = list(answers)
        self.asked: list[int] = []

    async def request(self, peer: int, method: str, body: Any, *, timeout: float) -> tuple[Any, list[Buffer]]:  # noqa: ASYNC109
        self.asked.append(peer)
        answer = self._answers.pop(0)
        if isinstance(answer, SpaceError):
            raise answer
        return None, [answer]


def test_healing_goes_on_with_another_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader that ends, and a peer that is damaged itself, do not end the healing: the next has the same batches."""
    monkeypatch.setattr(cluster, "HEAL_RETRY_SECONDS", 0.0)
    log = Log.open(FaultyDisk(), "/log", store_id=bytes(16))
    log.append(b"batch", time_ns=1, term=1)
    chunk = b"".join(encode_chunk(read_chunk(log, 1, stop=2)))
    peers = Peers(
        [UnavailableError("it ended"), CorruptionError("it is damaged"), UnavailableError("busy"), chunk]
    )
    got = asyncio.run(_fetch_chunk(cast("Transport", peers), [2, 1, 2, 3], [0, 1, 1]))
    assert got.last_index == 1
    assert peers.asked == [2, 1, 2, 1]


def test_healing_ends_when_no_peer_has_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who heals says what the last peer said when there was no answer for long enough."""
    monkeypatch.setattr(cluster, "HEAL_SECONDS", -1.0)
    peers = Peers([UnavailableError("it ended")])
    with pytest.raises(UnavailableError, match="it ended"):
        asyncio.run(_fetch_chunk(cast("Transport", peers), [1], [0, 1, 1]))
