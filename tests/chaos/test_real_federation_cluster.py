"""Two zones of three real nodes each: whoever dies, what one of them has for the other arrives once, and all of it.

Nodes are processes with certificates that federate on a port each; each zone knows the other one by the addresses of
all its nodes.  Streams are judged by the receiver's log (nothing missing, nothing twice), what came by comparing both
trees, and what left by the proof of sovereignty of every node's own log.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from space._errors import ConflictError, SpaceError
from tests.chaos.processes import HANG_SECONDS, LONG, Cluster, eventually, free_ports, report
from tests.chaos.workload import Workload, seed_of

pytestmark = [pytest.mark.requires("py:space_raft_engine", "py:aiohttp")]

KILLS: Final = 24 if LONG else 5
SHIPPED: Final = ("shared", "w0", "w1", "secret")
"""Directories that go to the other zone: ``w1`` ahead of the others, and ``secret`` encrypted."""
KEPT: Final = "w2"
DEFAULTS: Final[dict[str, Any]] = {"sovereignty": "global"}
Document = dict[str, Any]


def policy(*targets: str, priority: int = 0, **keys: Any) -> Document:
    """A policy that ships, as a document."""
    return {**DEFAULTS, "federation": {"targets": list(targets), "priority": priority}, **keys}


class Zone:
    """A cluster that is a zone."""

    def __init__(self, name: str, path: Path, stack: contextlib.ExitStack) -> None:
        self.name = name
        self.ports = dict(enumerate(free_ports(3), 1))
        self.cluster = stack.enter_context(
            Cluster(
                path / name, tls=True, options_of=lambda n: ("--federation", f"127.0.0.1:{self.ports[n]}")
            )
        )
        self.url = ",".join(f"https://127.0.0.1:{port}" for port in self.ports.values())
        self.insist(lambda node: node.zone_init(name=name, url=self.url))

    def insist(self, ask: Callable[[Any], Any]) -> Any:
        """What some node answers; asked again where that is safe."""
        found: list[Any] = []

        def asked() -> bool:
            found[:] = [self.cluster.any(ask, seconds=60.0)]
            return True

        eventually(f"zone {self.name} answers", asked)
        return found[0]

    def know(self, other: Zone) -> None:
        """Adds another zone, at a node that has its keys from another one."""
        pem = other.insist(lambda node: node.zone_authority())["authority"]
        last = self.cluster.client(3, 60.0)
        eventually("keys", last.zone_authority)
        eventually(
            f"{self.name} knows {other.name}",
            lambda: last.zone_add(name=other.name, url=other.url, authority=pem, offline=True),
        )

    def status(self, node: int) -> Document:
        """What a node says of the other zone."""
        found: Document = self.cluster.client(node, 30.0).federation_status(capsules=True)
        return found

    def in_step(self) -> None:
        """Waits until the other zone has all it is to have, whichever node is asked."""
        wanted = self.insist(lambda node: node.probe_here())["position"]
        for node in self.cluster.nodes:
            self._in_step(node, wanted)

    def _in_step(self, node: int, wanted: int) -> None:
        def arrived() -> bool:
            (zone,) = self.status(node)["zones"]
            return bool(zone["connected"] and not zone["lag_events"] and (zone["position"] or 0) >= wanted)

        try:
            eventually(f"all of {self.name} has left, says node {node}", arrived)
        except AssertionError:
            report(f"{self.name}: {self.status(node)}")
            raise

    def victim(self, chance: random.Random) -> int:
        """A node to kill: mostly who leads, and so ships and takes."""
        return self.cluster.leader() if chance.random() < 0.7 else chance.choice(self.cluster.up)

    def tree(self, *tops: str, below: str = "") -> dict[str, Document]:
        """What is below some directories, by path: ids, attributes, and the digest of content."""
        self.cluster.settle()
        node = self.cluster.client(self.cluster.up[-1], HANG_SECONDS)
        found = {each.pop("path"): each for each in node.probe_inventory()}
        inside = {path.removeprefix(below): each for path, each in found.items() if path.startswith(below)}
        return {path: each for path, each in inside.items() if path.partition("/")[0] in tops}

    def apart(self, other: Zone) -> list[str]:
        """Replicas of another zone without a name."""
        node = self.cluster.client(self.cluster.up[-1], HANG_SECONDS)
        prefix = f"zones/{other.name}/.capsules/"
        return [each["path"] for each in node.probe_inventory() if each["path"].startswith(prefix)]

    def check_streams(self) -> int:
        """Each stream in the log here begins where it ended before, on every node; how many shipments came."""
        self.cluster.settle()
        counts = []
        for number in self.cluster.nodes:
            stood: dict[tuple[Any, ...], tuple[int, int]] = {}
            came = list(self.cluster.client(number, HANG_SECONDS).probe_shipments())
            for each in came:
                stream, through = tuple(each["stream"]), tuple(each["through"])
                before = stood.get(stream, (each["from"], -1))
                assert each["from"] == before[0], f"node {number}: {each} comes after {before}"
                assert through > before, f"node {number}: {each} comes after {before}, and again"
                stood[stream] = through
            counts.append(len(came))
        assert len(set(counts)) == 1, counts
        return counts[0]

    def check_sovereignty(self) -> int:
        """The log of every node proves that all that left was allowed to; how many shipments left."""
        self.cluster.settle()
        counts = []
        for number in self.cluster.nodes:
            found = self.cluster.client(number, HANG_SECONDS).verify_sovereignty()
            assert found["findings"] == [], f"node {number}: {found['findings']}"
            counts.append(found["shipments"])
        assert len(set(counts)) == 1, counts
        return int(counts[0])

    def kill_all(self) -> None:
        """The whole zone is gone."""
        for node in self.cluster.up:
            self.cluster.kill(node)

    def start_all(self) -> None:
        """And comes back."""
        for node in self.cluster.nodes:
            self.cluster.start(node, wait=False)
        for node in self.cluster.nodes:
            self.cluster.ready(node)


@pytest.fixture
def zones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Zone, Zone]]:
    """``oslo`` and ``paris``, which know each other."""
    key = tmp_path / "master.key"
    key.touch(0o600)
    key.write_text("5a" * 32)
    monkeypatch.setenv("SPACE_MASTER_KEY_FILE", str(key))
    with contextlib.ExitStack() as stack:
        oslo, paris = Zone("oslo", tmp_path, stack), Zone("paris", tmp_path, stack)
        oslo.know(paris)
        paris.know(oslo)
        yield oslo, paris


def begun(oslo: Zone, seed: str) -> Workload:
    """A load on oslo whose workers' directories have a policy each."""
    oslo.insist(lambda node: node.set_policy(capsule="/", policy=policy("paris")))
    load = Workload(oslo.cluster, workers=3, seed=seed, patience=60.0)
    for worker in load.workers:
        worker.begin()
    ahead, secret = policy("paris", priority=50), policy("paris", encryption="aes-256-gcm")
    oslo.insist(lambda node: node.set_policy(capsule="/w1", policy=ahead))
    oslo.cluster.client(1, 60.0).mkdir(path="/secret")
    oslo.insist(lambda node: node.set_policy(capsule="/secret", policy=secret))
    oslo.insist(lambda node: node.set_policy(capsule="/w2", policy={"sovereignty": "zone"}))
    return load


def test_whoever_dies_all_arrives_once(zones: tuple[Zone, Zone], tmp_path: Path) -> None:
    """Nodes of both zones are killed (-9) under load: no gap, nothing twice, the same trees, nothing forbidden."""
    oslo, paris = zones
    seed = seed_of("two zones of three nodes")
    chance = random.Random(seed)
    killed = []
    with begun(oslo, seed) as load:
        load.progress()
        for number in range(KILLS):
            zone = (oslo, paris)[number % 2]
            node = zone.victim(chance)
            killed.append(f"{zone.name} {node}")
            zone.cluster.kill(node)
            load.progress(30)
            put(oslo, f"/secret/{number}", b"%d in secret" % number, tmp_path)
            zone.cluster.start(node)
            load.progress(10)
    report(load.check())
    oslo.in_step()
    came, left = paris.check_streams(), oslo.check_sovereignty()
    paris.check_sovereignty()
    assert came >= left > 0
    ours = oslo.tree(*SHIPPED)
    assert {f"secret/{number}" for number in range(KILLS)} <= ours.keys()
    assert paris.tree(*SHIPPED, below="zones/oslo/") == ours
    assert oslo.tree(KEPT)
    assert paris.tree(KEPT, below="zones/oslo/") == {}
    assert paris.apart(oslo) == []
    for node in paris.cluster.nodes:
        assert paris.cluster.client(node, HANG_SECONDS).verify()["findings"] == []
    report(f"killed {', '.join(killed)}; {left} shipments left, {came} came, {len(ours)} capsules the same")


def put(zone: Zone, path: str, text: bytes, folder: Path) -> None:
    """Stores a file through some node."""
    source = folder / "source"
    source.write_bytes(text)
    with contextlib.suppress(ConflictError), source.open("rb") as file:  # of an attempt that was not answered

        def stored(node: Any) -> Any:
            file.seek(0)
            return node.put(descriptor=file.fileno(), name=path)

        zone.insist(stored)


def content(zone: Zone, path: str, folder: Path) -> bytes | None:
    """What a path leads to, if it is there."""
    with (folder / "target").open("w+b") as file:
        try:
            zone.insist(lambda node: node.get(capsule=path, descriptor=file.fileno(), replace=True))
        except SpaceError:
            return None
        return (folder / "target").read_bytes()


def comes(zone: Zone, path: str, text: bytes, folder: Path) -> None:
    """Waits until a path has that content."""
    eventually(f"{path} in {zone.name}", lambda: content(zone, path, folder) == text)


def test_a_zone_of_nodes_takes_over(zones: tuple[Zone, Zone], tmp_path: Path) -> None:
    """All nodes of a zone die, the other takes its place, the first comes back and follows; and the other way round."""
    oslo, paris = zones
    oslo.insist(lambda node: node.mkdir(path="/dir"))
    oslo.insist(lambda node: node.set_policy(capsule="/dir", policy=policy("paris")))
    put(oslo, "/dir/a", b"one, in oslo", tmp_path)
    oslo.in_step()
    comes(paris, "/zones/oslo/dir/a", b"one, in oslo", tmp_path)
    follower = paris.cluster.client(paris.cluster.followers()[0], 60.0)
    eventually("what oslo said is known", lambda: follower.zone_predict(name="oslo")["heard"])
    oslo.kill_all()

    told = follower.zone_promote(name="oslo")
    assert told["epoch"] == 1
    assert told["heard"] is not None
    put(paris, "/zones/oslo/dir/b", b"two, in paris", tmp_path)
    paris.cluster.kill(paris.cluster.leader())
    oslo.start_all()
    comes(oslo, "/dir/b", b"two, in paris", tmp_path)
    (down,) = set(paris.cluster.nodes) - set(paris.cluster.up)
    paris.cluster.start(down)
    assert oslo.tree("dir") == paris.tree("dir", below="zones/oslo/")

    paris.kill_all()
    told = oslo.cluster.client(oslo.cluster.followers()[0], 60.0).zone_promote(name="paris")
    assert told["epoch"] == 2
    put(oslo, "/dir/c", b"three, in oslo again", tmp_path)
    paris.start_all()
    comes(paris, "/zones/oslo/dir/c", b"three, in oslo again", tmp_path)
    oslo.in_step()
    assert oslo.tree("dir") == paris.tree("dir", below="zones/oslo/")
    for zone in zones:
        zone.check_streams()
        zone.check_sovereignty()
