"""A cluster as a zone, in this process: keys on every node, who ships, who takes, and what is refused.

What kills and load do to it is in ``tests/chaos/test_real_federation_cluster.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

import space
from space._errors import NotFoundError, RefusedError, UnavailableError
from space._node.cluster import ClusterNode, NodeConfig, found, invite, join
from space._node.federation import Federation
from space._node.federation_calls import KeptFederation
from space._node.federation_keys import ZONE, ZoneKeys
from space._node.federation_nodes import KEYS
from space._node.federation_shards import shard_zones
from space._node.federation_status import heard_note, samples, status
from space._node.federation_zones import Zones
from space._node.member import Member
from space._node.store import Store
from space.events.commands import Receipt, Request
from space.replication.certificates import Tls, issue_client
from space.replication.node import parse_address
from space.replication.transport import Transport
from tests.chaos.processes import free_ports
from tests.federation_support import shared, until

pytestmark = [pytest.mark.requires("py:space_raft_engine", "py:aiohttp")]

TREE: Final = "/all"


class Nodes:
    """Nodes 1 to ``count`` of a cluster, which federate unless they are told not to."""

    def __init__(self, path: Path, stack: contextlib.ExitStack, count: int = 3, **options: Any) -> None:
        self.path = path
        self.running: dict[int, ClusterNode] = {}
        self.kept: dict[int, KeptFederation] = {}
        self.ports = dict(enumerate(free_ports(count), 1))
        peers = dict(enumerate(free_ports(count), 1))
        stack.callback(self.close)
        config = found(self._home(1), listen=f"127.0.0.1:{peers[1]}", **options)
        self.start(1)
        for node in range(2, count + 1):
            home, listen = path / str(node), f"127.0.0.1:{peers[node]}"
            if config.tls:
                invite(path / "1", node, home / "tls", hosts=["127.0.0.1"])
            join(home, node=node, cluster=config.cluster, listen=listen, shards=config.shards, tls=config.tls)
            self.start(node)
            self.running[1].change_members("add", node, listen)

    def _home(self, node: int) -> Path:
        home = self.path / str(node)
        home.mkdir(parents=True)
        return home

    @property
    def url(self) -> str:
        """All addresses of the zone."""
        return ",".join(f"https://127.0.0.1:{port}" for port in self.ports.values())

    def start(self, node: int) -> None:
        """A node that federates as soon as it can."""
        config = NodeConfig.load(self.path / str(node))
        assert config is not None
        self.running[node] = ClusterNode(self.path / str(node), config)
        self.federate(node)

    def federate(self, node: int) -> None:
        """Lets a node federate."""
        self.kept[node] = KeptFederation(self.running[node].store, f"127.0.0.1:{self.ports[node]}")

    def end_federation(self, node: int) -> None:
        """Lets a node federate no more."""
        kept = self.kept.pop(node)
        kept.retire(10.0)
        kept.close()

    def stop(self, node: int) -> None:
        """Ends a node."""
        kept, running = self.kept.pop(node, None), self.running.pop(node)
        if kept is not None:
            kept.retire(1.0)
        running.stop()
        if kept is not None:
            kept.close()
        running.close()

    def close(self) -> None:
        """Ends all of them."""
        for node in list(self.running):
            self.stop(node)

    def store(self, node: int) -> Member:
        return self.running[node].store

    def zones(self, node: int) -> Zones:
        return Zones(self.store(node))

    def status(self, node: int) -> dict[str, Any]:
        return status(self.store(node))

    def sender(self) -> int:
        """The node that ships, once all that run agree."""

        def agreed() -> int:
            said = {self.status(node)["sender"] for node in self.running}
            return (said.pop() or 0) if len(said) == 1 else 0

        return int(until(agreed, "nodes agree who ships"))

    def all_federate(self) -> None:
        """Waits for every node that was told to."""
        until(lambda: all(self.store(node).federation for node in self.kept), "all nodes federate")


def in_step(store: Store) -> None:
    """Waits until the other zone has all of a store's."""
    wanted = store.position

    def arrived() -> bool:
        (zone,) = status(store)["zones"]
        return bool(zone["connected"] and not zone["lag_events"] and zone["position"] >= wanted)

    until(arrived, f"in step: {status(store)}")


def rtt_ns(store: Store) -> int:
    """How far the only other zone is, as a store knows it."""
    with shard_zones(store) as (_, other):
        return other.rtt_ns or 0


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """What is closed at the end."""
    with contextlib.ExitStack() as found_:
        yield found_


@pytest.fixture
def oslo(tmp_path: Path, stack: contextlib.ExitStack) -> Nodes:
    """A zone of three nodes."""
    nodes = Nodes(tmp_path / "oslo", stack)
    nodes.zones(1).init("oslo", "metro", nodes.url)
    nodes.all_federate()
    return nodes


@pytest.fixture
def paris(tmp_path: Path, stack: contextlib.ExitStack, oslo: Nodes) -> Store:
    """A zone of one store; both know each other, by what different nodes of ``oslo`` say and are told."""
    store = stack.enter_context(space.open(tmp_path / "paris"))
    introduce(oslo.zones(2), oslo.zones(3), oslo.url, store)
    return store


def introduce(says: Zones, is_told: Zones, url: str, store: Store) -> None:
    """Makes a store the zone ``paris``, which federates, and lets it and ``oslo`` know each other."""
    zones = Zones(store)
    zones.init("paris", "geo", "")
    running = Federation(store, "127.0.0.1:0", chance=lambda: 0.0)
    assert running.url is not None
    zones.add("oslo", url, says.keys().authority.pem, None, offline=False)
    is_told.add("paris", running.url, zones.keys().authority.pem, None, offline=False)


def fingerprints(nodes: Nodes) -> set[str]:
    """The authorities nodes have in their directories."""
    return {ZoneKeys.load(nodes.path / str(node)).authority.fingerprints[0] for node in nodes.ports}


def test_every_node_has_the_keys_and_any_can_be_asked(oslo: Nodes, paris: Store) -> None:
    """Keys reach all nodes, for their owner only; both directions work; all nodes say the same of the other zone."""
    assert len(fingerprints(oslo)) == 1
    for node in oslo.ports:
        assert all(each.stat().st_mode & 0o077 == 0 for each in (oslo.path / str(node) / ZONE).rglob("*"))
    assert {oslo.zones(node).keys().bundle()["sealing"] for node in oslo.ports} == {
        oslo.zones(1).keys().bundle()["sealing"]
    }
    oslo.store(3).mkdir(TREE)
    oslo.store(3).set_policy(TREE, shared("paris"))
    oslo.store(2).put(b"from any node", name=f"{TREE}/a")
    paris.mkdir("/mine")
    paris.set_policy("/mine", shared("oslo"))
    paris.put(b"to any node", name="/mine/b")
    in_step(paris)
    for node in oslo.ports:
        in_step(oslo.store(node))
        assert oslo.store(node).get("/zones/paris/mine/b") == b"to any node"
    assert paris.get("/zones/oslo/all/a") == b"from any node"
    until(partial(say_the_same, oslo), "all nodes say the same")
    for node in oslo.ports:
        assert until(partial(rtt_ns, oslo.store(node)), "how far the other zone is")
    (taken,) = status(paris)["zones"]
    assert taken["at"] in oslo.url.split(",")


def say_the_same(oslo: Nodes) -> bool:
    """Whether every node says who ships, and knows that it is connected; one of them that it is itself."""
    said = {node: oslo.status(node) for node in oslo.ports}
    told = {node: {name: value for name, _, value in samples(each)} for node, each in said.items()}
    (sender, *others) = {each["sender"] for each in said.values()}
    return (
        not others
        and all((each["node"], each["running"]) == (node, True) for node, each in said.items())
        and all(each["space_federation_connected"] == 1.0 for each in told.values())
        and [node for node, each in told.items() if each["space_federation_sender"]] == [sender]
    )


def test_another_node_ships_and_takes_on(oslo: Nodes, paris: Store) -> None:
    """The node that ships and is shipped to ends: the others go on from where it was, and what it heard is known."""
    oslo.store(1).mkdir(TREE)
    oslo.store(1).set_policy(TREE, shared("paris"))
    paris.mkdir("/mine")
    paris.set_policy("/mine", shared("oslo"))
    oslo.store(1).put(b"1", name=f"{TREE}/1")
    paris.put(b"1", name="/mine/1")
    in_step(oslo.store(2))
    in_step(paris)
    first = oslo.sender()
    (other, *_) = (node for node in oslo.ports if node != first)
    (zone,) = oslo.zones(other).others()
    until(lambda: heard_note(oslo.store(other), zone).get("heard_position"), "what another node heard")
    oslo.stop(first)
    oslo.store(other).put(b"2", name=f"{TREE}/2")
    paris.put(b"2", name="/mine/2")
    in_step(oslo.store(other))
    in_step(paris)
    assert paris.get("/zones/oslo/all/2") == oslo.store(other).get("/zones/paris/mine/2") == b"2"
    assert oslo.sender() != first
    oslo.start(first)
    oslo.all_federate()
    assert oslo.sender() in oslo.ports
    assert paris.verify().findings == []


def test_who_leads_need_not_federate(oslo: Nodes, paris: Store) -> None:
    """Where the leader does not federate another node ships, and takes what is shipped."""
    first = oslo.sender()
    oslo.end_federation(first)
    rest = sorted(set(oslo.ports) - {first})
    until(lambda: oslo.status(first)["sender"] in rest, "another node ships")
    oslo.store(first).put(b"shipped by another", name="/a", policy=shared("paris"))
    paris.put(b"taken by another", name="/b", policy=shared("oslo"))
    in_step(oslo.store(first))
    in_step(paris)
    assert paris.get("/zones/oslo/a") == b"shipped by another"
    assert oslo.store(first).get("/zones/paris/b") == b"taken by another"
    assert not oslo.status(first)["running"]


def rolled(zones: Zones) -> bool:
    """Whether the zone has another authority; asked again it goes on."""
    try:
        return not zones.roll_over(force=False)["nodes_without"]
    except UnavailableError:
        return False


def test_a_rollover_reaches_nodes_that_are_there_and_those_that_come_back(oslo: Nodes, paris: Store) -> None:
    """A new authority is on every node before the old one ends; a node that is away holds it up, or asks later."""
    before = fingerprints(oslo)
    until(lambda: rolled(oslo.zones(2)), "all nodes answer in time")
    after = fingerprints(oslo)
    assert len(after) == 1
    assert after != before
    away = next(node for node in oslo.ports if node != oslo.sender())
    oslo.stop(away)
    (there, *_) = oslo.running
    with pytest.raises(UnavailableError, match=f"node {away}"):
        oslo.zones(there).roll_over(force=False)
    assert fingerprints(oslo) == after
    assert away in oslo.zones(there).renew()["nodes_without"]
    assert away in oslo.zones(there).roll_over(force=True)["nodes_without"]
    assert len(fingerprints(oslo)) == 2
    oslo.start(away)
    oslo.all_federate()
    until(lambda: len(fingerprints(oslo)) == 1, "every node has the new keys")
    oslo.store(away).put(b"known by its new key", name="/a", policy=shared("paris"))
    in_step(oslo.store(away))
    assert paris.get("/zones/oslo/a") == b"known by its new key"


def test_nodes_without_certificates_keep_their_keys(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    """Where anybody could be a node, none gives its zone's keys away; copied by hand they are taken."""
    nodes = Nodes(tmp_path, stack, 2, tls=False)
    nodes.zones(1).init("oslo", "metro", "")
    with pytest.raises(UnavailableError, match="no other node gives them"):
        nodes.zones(2).keys()
    for each in (tmp_path / "1" / ZONE).glob("*.pem"):
        target = tmp_path / "2" / ZONE / each.name
        target.parent.mkdir(exist_ok=True)
        target.touch(0o600)
        target.write_bytes(each.read_bytes())
    nodes.all_federate()
    assert nodes.zones(2).keys().authority == nodes.zones(1).keys().authority


def test_only_members_are_given_keys(tmp_path: Path, oslo: Nodes) -> None:
    """A program with a certificate of the cluster, which may ask nodes a lot, is not given the keys of the zone."""
    issue_client(oslo.path / "1" / "tls" / "authority", tmp_path / "me", "me", now=datetime.now(UTC))

    async def ask() -> Any:
        transport = Transport(
            node=0,
            cluster=oslo.running[1].config.cluster,
            listen=("127.0.0.1", 0),
            handler=_Silent(),
            tls=Tls.load(tmp_path / "me"),
        )
        await transport.start()
        try:
            transport.set_peer(1, *parse_address(oslo.running[1].config.listen))
            return await transport.request(1, "call", [0, KEYS], timeout=10.0)
        finally:
            await transport.close()

    with pytest.raises(RefusedError, match="no member"):
        asyncio.run(ask())


class _Silent:
    """Who is asked nothing."""

    def on_raft(self, sender: int, group: int, message: bytes, blobs: list[Any]) -> None:
        """Nothing comes."""

    async def on_request(
        self, sender: int, method: str, body: Any, attachments: list[Any]
    ) -> tuple[Any, list[Any]]:
        """Nothing comes."""
        raise UnavailableError("a program")

    def on_unreachable(self, node: int) -> None:
        """Nothing is expected."""


def test_what_a_shipment_holds_can_be_handed_on(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    """More frames than a request has attachments go from a node to the leader, whole and in order."""
    nodes = Nodes(tmp_path, stack, 2)
    leader = nodes.running[1].store.group.replica.driver.leader
    store = nodes.store(3 - leader)
    capsule = store.put(b"", name="/file").id
    count = 5000
    policy = store.policy(capsule)
    requests = [
        Request(each)
        for at in range(count)
        for each in store.encode_extents(capsule, at * 8, b"%08d" % at, policy, 0)
    ]
    outcomes = store.execute_all(requests)
    assert all(isinstance(each, Receipt) for each in outcomes), outcomes[0]
    assert store.get(capsule) == b"".join(b"%08d" % at for at in range(count))


def test_what_is_in_another_shard_is_promised_to_nobody(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    """A policy that ships is refused for a capsule in another shard than the tree's; what has a name is shipped."""
    nodes = Nodes(tmp_path, stack, 1, shards=2)
    node = nodes.running[1]
    (other,) = (store for store in node.stores if store is not node.store)
    capsule = next(each for each in iter(node.store.new_id, None) if node.store_of(each) is other)
    with pytest.raises(RefusedError, match="only what has a name"):
        other.put(b"x", id=capsule, policy=shared("paris"))
    with pytest.raises(NotFoundError):
        other.stat(capsule)
    other.put(b"x", id=capsule)
    with pytest.raises(RefusedError, match="only what has a name"):
        other.set_policy(capsule, shared("paris"))
    assert not other.policy(capsule).federation_targets
    zones = nodes.zones(1)
    zones.init("oslo", "metro", nodes.url)
    nodes.all_federate()
    with space.open(tmp_path / "paris") as paris:
        introduce(zones, zones, nodes.url, paris)
        node.store.put(b"x", name="/x", policy=shared("paris"))
        in_step(node.store)
        assert paris.get("/zones/oslo/x") == b"x"
