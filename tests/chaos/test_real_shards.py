"""Several shards on three real nodes, each with its own log and leader: nodes are killed under clients of all."""

from __future__ import annotations

import contextlib
import random
import threading
from pathlib import Path
from typing import Any, Final

import pytest
from blake3 import blake3

from space._errors import SpaceError
from space._node.caller import Caller
from space.control import SocketEndpoint
from space.remote import Nodes
from tests.chaos.processes import LONG, Cluster, eventually, report
from tests.chaos.workload import seed_of

SHARDS: Final = 4
WORKERS: Final = 3
KILLS: Final = 20 if LONG else 5
BYTES_MAX: Final = 100_000

pytestmark = [pytest.mark.requires("py:space_raft_engine")]


class Putter(threading.Thread):
    """Stores capsules through any node, most of them without a name: those are where their ids say."""

    def __init__(self, cluster: Cluster, number: int, over: threading.Event, scratch: Path) -> None:
        super().__init__(name=f"putter-{number}", daemon=True)
        sockets = [process.home / "control.sock" for process in cluster.nodes.values()]
        self._nodes = Nodes(
            [SocketEndpoint(path) for path in sockets[number:] + sockets[:number]], caller=Caller()
        )
        self._random = random.Random(f"{seed_of('shards')} {number}")
        self._number = number
        self._over = over
        self._file = scratch / f"source-{number}"
        self.stored: dict[str, str] = {}
        self.removed: set[str] = set()
        self.gave_up = 0
        self.failed: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._over.is_set():
                with contextlib.suppress(_GaveUpError):
                    self._step()
        except BaseException as error:  # noqa: BLE001 - the test's own thread says it
            self.failed = error

    def _step(self) -> None:
        if self.stored and self._random.random() < 0.15:
            capsule = self._random.choice(list(self.stored))
            del self.stored[capsule]
            self._asked("rm", capsule=capsule)
            self.removed.add(capsule)
            return
        data = self._random.randbytes(self._random.randrange(1, BYTES_MAX))
        self._file.write_bytes(data)
        named = self._random.random() < 0.3
        name = f"/{self._number}-{len(self.stored)}-{self._random.getrandbits(40):x}" if named else None
        with self._file.open("rb") as source:
            answer = self._asked("put", descriptor=source.fileno(), name=name)
        self.stored[answer["id"]] = blake3(data).hexdigest()

    def _asked(self, method: str, **arguments: Any) -> Any:
        try:
            return getattr(self._nodes, method)(**arguments)
        except SpaceError as error:
            if not error.kind.retryable:
                raise
            self.gave_up += 1
            raise _GaveUpError from None


class _GaveUpError(Exception):
    """Nobody answered for as long as a client tries: what became of the call is not known."""


def settle(cluster: Cluster) -> list[dict[str, Any]]:
    """The shards, once every node stands where the others do in each of them; their digests are equal there."""

    def asked() -> list[dict[str, Any]] | None:
        cluster.check_alive()
        shards: list[dict[str, Any]] = cluster.any(lambda client: client.probe_status())["shards"]
        for shard in shards:
            places = {node["position"] for node in shard["nodes"]}
            if (
                not shard["leader"]
                or len(shard["nodes"]) != len(cluster.nodes)
                or len(places) != 1
                or None in places
            ):
                return None
        return shards

    shards = eventually("all shards at one position", asked)
    assert shards is not None
    for shard in shards:
        assert len({node["digest"] for node in shard["nodes"]}) == 1, shard
    return shards


def test_killed_nodes_take_nothing_of_any_shard_with_them(tmp_path: Path) -> None:
    """Nodes, each leading some shards, are killed (-9) in turn: what was acknowledged is on all of them after."""
    chance = random.Random(seed_of("killed nodes of shards"))
    with Cluster(tmp_path / "cluster", shards=SHARDS) as cluster:
        over = threading.Event()
        putters = [Putter(cluster, number, over, tmp_path) for number in range(WORKERS)]
        for putter in putters:
            putter.start()

        def progress() -> None:
            before = [len(putter.stored) + len(putter.removed) for putter in putters]
            eventually(
                "every client gets on",
                lambda: all(
                    len(putter.stored) + len(putter.removed) > count + 2 or putter.failed
                    for putter, count in zip(putters, before, strict=True)
                ),
            )

        try:
            progress()
            for _ in range(KILLS):
                victim = chance.choice(cluster.up)
                cluster.kill(victim)
                progress()
                cluster.start(victim)
                progress()
        finally:
            over.set()
            for putter in putters:
                putter.join()
        for putter in putters:
            if putter.failed is not None:
                raise putter.failed
        shards = settle(cluster)
        stored = {capsule: digest for putter in putters for capsule, digest in putter.stored.items()}
        removed = {capsule for putter in putters for capsule in putter.removed}
        for node in cluster.nodes:
            check(cluster, node, stored, removed, tmp_path / f"read-{node}")
        assert len({shard["nodes"][0]["position"] for shard in shards}) > 1
        assert all(shard["nodes"][0]["position"] > 10 for shard in shards), "a shard that nobody used"
        report(
            f"{KILLS} kills with {SHARDS} shards: {len(stored)} capsules stored, {len(removed)} removed, "
            f"{sum(putter.gave_up for putter in putters)} calls given up; positions "
            f"{[shard['nodes'][0]['position'] for shard in shards]}"
        )


def check(cluster: Cluster, node: int, stored: dict[str, str], removed: set[str], target: Path) -> None:
    """What was acknowledged is what this node says, capsule by capsule."""
    client = cluster.client(node, 60.0)
    for capsule, digest in stored.items():
        with target.open("w+b") as sink:
            client.get(capsule=capsule, descriptor=sink.fileno())
            sink.seek(0)
            assert blake3(sink.read()).hexdigest() == digest, f"{capsule} on node {node}"
    unnamed = {each["id"] for each in client.unnamed()}
    assert not removed & unnamed, f"removed capsules on node {node}"
