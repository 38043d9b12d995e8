"""A node of a cluster where its disk, its peers or its own start fail for a while."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import attrs
import pytest

from space._errors import CorruptionError, SpaceError, StorageError, UnavailableError
from space._node import cluster
from space._node.cluster import NODE_FILE, ClusterNode, NodeConfig, _fetch_chunk, found
from space._node.member import HEAL_FILE
from space.events.commands import Buffer
from space.replication.node import Node
from space.replication.transport import Transport
from space.wal.faulty_disk import FaultyDisk
from space.wal.log import Log
from space.wal.shipping import encode_chunk, read_chunk
from tests.chaos.processes import HANG_SECONDS, eventually, free_ports

pytestmark = [pytest.mark.integration, pytest.mark.requires("py:space_raft_engine")]


def test_where_peers_are_is_noted_when_the_disk_takes_it_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What could not be written to the node's file is written later: without it a damaged node asks nobody."""
    config = found(tmp_path, listen=f"127.0.0.1:{free_ports(1)[0]}", tls=False)
    obstacle = tmp_path / (NODE_FILE + ".new")
    obstacle.mkdir()
    with ClusterNode(tmp_path, config) as node:

        def added() -> bool:
            with contextlib.suppress(UnavailableError):  # nobody is there to catch up
                node.call(lambda each: each.change_members("add", 2, "127.0.0.1:9"), seconds=1.0)
            return 2 in node.store.members()

        eventually("there is another member", added)
        eventually("it could not be noted", lambda: "cannot note where its peers are" in caplog.text)
        obstacle.rmdir()
        eventually("it is noted", lambda: node.config.peers)
    assert json.loads((tmp_path / NODE_FILE).read_text())["peers"] == {"2": "127.0.0.1:9"}


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


def noted(home: Path, peers: dict[int, str]) -> NodeConfig:
    """A node of a cluster whose log was found damaged while it ran, and where its peers are."""
    config = attrs.evolve(found(home, listen=f"127.0.0.1:{free_ports(1)[0]}", tls=False), peers=peers)
    with ClusterNode(home, config) as node:
        node.store.mkdir("/kept")
        node.store.heal_later()
    return config


def test_damage_that_was_noted_does_not_keep_a_cluster_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no peer leads, a node whose log opens starts with its damage: else nodes would wait for each other."""
    monkeypatch.setattr(cluster, "HEAL_SECONDS", 0.5)
    config = noted(tmp_path, {2: "127.0.0.1:9"})
    with ClusterNode(tmp_path, config) as node:
        eventually("it leads", lambda: node.store.resolve("/kept"))
    assert (tmp_path / HEAL_FILE).exists(), "it was not healed"


def test_a_log_that_does_not_open_waits_for_its_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be opened may have lost what it acknowledged: the node does not start before a peer leads."""
    monkeypatch.setattr(cluster, "HEAL_SECONDS", 0.5)
    config = noted(tmp_path, {2: "127.0.0.1:9"})
    for segment in (tmp_path / "wal").glob("*.seg"):
        segment.unlink()
    with pytest.raises(UnavailableError, match="no leader among the peers"):
        ClusterNode(tmp_path, config)


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
