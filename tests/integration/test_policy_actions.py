"""What the policy compiler asks for is done, and said in the log, by real stores of real zones."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import space
from space._errors import NotFoundError, RefusedError
from space._node import federation_actions as actions
from space._node.federation import Federation
from space._node.federation_actions import ACTOR
from space._node.federation_nearest import Nearest
from space._node.federation_shelf import StoreShelf
from space._node.federation_zones import Zones
from space._node.heat import Rate
from space._node.store import Store
from space.events.ids import CapsuleId
from space.federation import compiler
from space.federation.shelf import Room
from space.policy.model import Policy, Shards, Sovereignty
from tests.cli_support import Outcome, finish, start

pytestmark = pytest.mark.requires("py:pyeclib", "py:aiohttp")

NAMES = ("berlin", "oslo", "paris")
TO_PARIS = Policy(
    sovereignty=Sovereignty.GLOBAL, federation_targets=("paris",), federation_candidates=("oslo",)
)
SHARDED = Policy(
    sovereignty=Sovereignty.GLOBAL, federation_targets=("oslo", "paris"), federation_shards=Shards(2, 1)
)
WAIT_SECONDS = 60.0


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[dict[str, Store]]:
    """Three zones that know each other and ship."""
    with contextlib.ExitStack() as stack:
        found = {name: stack.enter_context(space.open(tmp_path / name)) for name in NAMES}
        running = {}
        for name, store in found.items():
            Zones(store).init(name, "geo", "")
            running[name] = stack.enter_context(Federation(store, "127.0.0.1:0"))
        for name, store in found.items():
            for other, federation in running.items():
                if other != name:
                    pem = Zones(found[other]).keys().offer()[0]
                    Zones(store).add(other, str(federation.url), pem, None, offline=True)
        yield found


def log_of(store: Store) -> list[tuple[str, Any, str]]:
    """What the compiler had done, as the log says it: action, argument, reason."""
    return [
        (event.detail["action"], event.detail["argument"], event.detail["reason"])
        for event in store.log()
        if event.kind == "ActionTaken" and event.actor == ACTOR
    ]


def planned(store: Store, **options: Any) -> list[str]:
    """The names of what would be done."""
    return [type(each.action).__name__ for each in actions.plan(store, **options)]


def test_a_new_capsule_is_federated(stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """A capsule that its target has not got yet is federated, and the log says so; one that it has is no news."""
    home = stores["berlin"]
    home.put(b"stays", name="/local", policy=Policy(sovereignty=Sovereignty.LOCAL))
    home.put(b"goes", name="/goes", policy=TO_PARIS)
    with monkeypatch.context() as before_it_was_sent:
        before_it_was_sent.setattr(actions, "_replicas", lambda *_: {})
        (done,) = actions.apply(home)
    assert (done["action"], done["zone"], done["done"], done["path"]) == ("Federate", "paris", True, "/goes")
    assert log_of(home) == [("Federate", "paris lane 0", done["reason"])]
    assert done["reason"].startswith("federation.targets: paris; NewCapsule of 4 B")
    deadline = time.monotonic() + WAIT_SECONDS
    while planned(home) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert planned(home) == []


def test_nothing_is_said_to_be_done_that_is_not(tmp_path: Path) -> None:
    """Where nothing ships, a Federate fails, says what to start, and is not in the log."""
    with space.open(tmp_path / "alone") as store, space.open(tmp_path / "other") as other:
        Zones(store).init("berlin", "geo", "")
        Zones(other).init("paris", "geo", "")
        Zones(store).add("paris", "https://127.0.0.1:1", Zones(other).keys().offer()[0], None, offline=True)
        store.put(b"x", name="/x", policy=TO_PARIS)
        (failed,) = actions.apply(store)
        assert not failed["done"]
        assert "space federation serve" in failed["error"]
        assert log_of(store) == []


def test_shards_are_made_once_and_again_after_a_write(stores: dict[str, Store]) -> None:
    """ShardEC is planned for a new capsule, done and logged, not planned again until the content changes."""
    home = stores["berlin"]
    capsule = home.put(b"content" * 5_000, name="/film", policy=SHARDED).id
    (done,) = actions.apply(home)
    assert (done["action"], done["done"], done["error"]) == ("ShardEC", True, "")
    assert done["result"]["sent"] == 3
    ((action, argument, reason),) = log_of(home)
    assert action == "ShardEC"
    assert sorted(argument.split()[:3]) == list(NAMES)
    assert "federation.shards: data 2, parity 1" in reason
    assert planned(home) == []
    home.write(capsule, 0, b"CHANGED")
    assert planned(home) == ["ShardEC"]
    assert planned(home, since=home.position) == []


def test_a_full_target_makes_a_candidate_one(
    stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a target runs out of room a candidate becomes a target, in one batch with the reason for it."""
    home = stores["berlin"]
    full = Zones(home).find("paris").id
    monkeypatch.setattr(StoreShelf, "room", lambda self: Room(5 if self._zone == full else 50, 100))
    capsule = home.put(b"x", name="/x", policy=TO_PARIS).id
    done = {each["action"]: each for each in actions.apply(home)}
    assert done["Replicate"]["error"] == ""
    policy = home.policy(capsule)
    assert (policy.federation_targets, policy.federation_candidates) == (("paris", "oslo"), ())
    kinds: dict[int, list[str]] = {}
    for event in home.log():
        kinds.setdefault(event.position, []).append(event.kind)
    assert any({"ActionTaken", "PolicyChanged"} <= set(each) for each in kinds.values())


def test_a_home_moves_to_where_there_is_room(
    stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Migrate is planned where room is short: the zone with a replica becomes the home, and the log says why."""
    home, paris = stores["berlin"], stores["paris"]
    own = Zones(home).own()
    assert own is not None
    monkeypatch.setattr(StoreShelf, "room", lambda self: Room(5 if self._zone == own.id else 50, 100))
    capsule = home.put(b"x", name="/x", policy=TO_PARIS).id
    monkeypatch.setattr(actions, "_replicas", lambda *_: {bytes(capsule): frozenset({"paris"})})
    deadline = time.monotonic() + WAIT_SECONDS
    while not _has(paris, capsule) and time.monotonic() < deadline:
        time.sleep(0.05)
    (done,) = actions.apply(home)
    assert (done["action"], done["done"], done["error"]) == ("Migrate", True, "")
    assert log_of(home) == [("Migrate", "paris", done["reason"])]
    paris.write(capsule, 0, b"y")
    with pytest.raises(RefusedError, match="its home is zone paris"):
        home.write(capsule, 0, b"z")
    assert planned(home) == []


def test_a_home_is_not_moved_where_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Migrate that cannot be carried out changes nothing, and says why."""
    with space.open(tmp_path / "alone") as store, space.open(tmp_path / "other") as other:
        Zones(store).init("berlin", "geo", "")
        Zones(other).init("paris", "geo", "")
        Zones(store).add("paris", "https://127.0.0.1:1", Zones(other).keys().offer()[0], None, offline=True)
        capsule = store.put(b"x", name="/x", policy=TO_PARIS).id
        action = compiler.Migrate(bytes(capsule), "paris", "it has room")
        monkeypatch.setattr(actions, "_planned", lambda *_: [actions.Planned(action, store.policy(capsule))])
        (failed,) = actions.apply(store)
        assert not failed["done"]
        assert "nothing ships" in failed["error"]
        assert log_of(store) == []
        store.write(capsule, 0, b"y")


def _has(store: Store, capsule: CapsuleId) -> bool:
    try:
        return store.get(capsule) == b"x"
    except NotFoundError:
        return False


class Cluster:
    """Nodes as they say they are; who is to lead is noted, and led from then on."""

    def __init__(self, leaders: list[int]) -> None:
        self.leaders = leaders
        self.ends = [0] * len(leaders)
        self.failed: set[int] = set()

    def status(self) -> dict[str, Any]:
        self.ends = [end + 500 for end in self.ends]
        return {
            "shards": [
                {"shard": shard, "leader": leader, "nodes": [self.node(node, shard) for node in (1, 2, 3)]}
                for shard, leader in enumerate(self.leaders)
            ]
        }

    def node(self, node: int, shard: int) -> dict[str, Any]:
        """What one node says of one shard."""
        failure = "disk" if node in self.failed else ""
        return {"id": node, "role": "voter", "position": self.ends[shard], "lag": 0, "failure": failure}

    def lead(self, shard: int, node: int) -> None:
        self.leaders[shard] = node


def test_a_degraded_node_leads_nothing_any_more(tmp_path: Path) -> None:
    """What a node with trouble leads is handed to the healthy ones in turn, and the log says why."""
    cluster = Cluster([1, 2, 1])
    cluster.failed = {1}
    with space.open(tmp_path / "data") as store:
        (done,) = actions.apply(store, cluster)
        assert (done["action"], done["node"], done["result"]) == ("Evacuate", 1, {"shards": [0, 2]})
        assert cluster.leaders == [2, 2, 3]
        assert log_of(store) == [("Evacuate", "node 1", done["reason"])]
        assert "NodeDegraded 1: shard 2: has stopped: disk" in done["reason"]
        assert planned(store, nodes=cluster) == []


def test_a_hot_shard_gets_an_idle_leader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hot capsule's shard is led by an idle node instead of one that leads several, and the log says why."""
    monkeypatch.setattr(actions, "SAMPLE_SECONDS", 0.001)
    cluster = Cluster([1, 1, 2])
    with space.open(tmp_path / "data") as store:
        capsule = store.put(b"x", name="/x").id
        monkeypatch.setattr(store.heat, "spikes", lambda: {bytes(capsule): Rate(100.0, 900.0)})
        before = list(cluster.leaders)
        results = actions.apply(store, cluster)
        shard = capsule.shard_keys(3)
        if before[shard] == 1:
            assert [(each["action"], each["shard"], each["node"]) for each in results] == [
                ("Rebalance", shard, 3)
            ]
            assert cluster.leaders[shard] == 3
            assert log_of(store)[0][:2] == ("Rebalance", f"shard {shard} to node 3")
        else:
            assert results == []


def test_where_to_read(stores: dict[str, Store], tmp_path: Path) -> None:
    """At home a capsule is read at home; its targets follow, and nobody else is named."""
    home = stores["berlin"]
    capsule = home.put(b"x", name="/x", policy=TO_PARIS).id
    found = home.replicas(capsule)
    assert [(each.zone, each.local, each.home) for each in found] == [
        ("berlin", True, True),
        ("paris", False, False),
    ]
    assert [each.zone for each in home.replicas(home.put(b"y", name="/y").id)] == ["berlin"]


def test_a_table_of_zones_is_taken_again(tmp_path: Path) -> None:
    """A zone that was added is named as soon as the table of before is no longer good."""
    now = [0]
    with space.open(tmp_path / "a") as store, space.open(tmp_path / "b") as other:
        Zones(store).init("berlin", "geo", "")
        Zones(other).init("paris", "geo", "")
        nearest = Nearest(store, lambda: now[0])
        capsule = store.put(b"x", name="/x", policy=TO_PARIS).id
        assert [each.zone for each in nearest.replicas(capsule)] == ["berlin"]
        Zones(store).add("paris", "https://127.0.0.1:1", Zones(other).keys().offer()[0], None, offline=True)
        assert [each.zone for each in nearest.replicas(capsule)] == ["berlin"]
        now[0] += 1_000_000_000
        assert [each.zone for each in nearest.replicas(capsule)] == ["berlin", "paris"]


def ran(data: Path, *arguments: str) -> Outcome:
    """A command that succeeds."""
    outcome = finish(start(data, *arguments))
    assert outcome.status == 0, outcome.err
    return outcome


def test_the_command_line(stores: dict[str, Store], tmp_path: Path) -> None:
    """Plan, apply, shards and resolve, as people and scripts use them."""
    home = stores["berlin"]
    home.put(b"content" * 9_000, name="/film", policy=SHARDED)
    path = home.path
    Federation.close(home.federation)  # type: ignore[arg-type]
    home.close()
    plan = ran(path, "--json", "policy", "plan").json
    (action,) = plan["actions"]
    assert (action["action"], action["path"], sorted(action["zones"])) == ("ShardEC", "/film", list(NAMES))
    applied = ran(path, "policy", "apply")
    assert applied.out.startswith("done   ShardEC /film → ")
    assert ran(path, "policy", "plan").out == "nothing to do\n"
    (layout,) = ran(path, "--json", "shards", "ls").json
    assert (layout["name"], layout["home"], layout["data"], layout["parity"]) == ("film", "berlin", 2, 1)
    mended = ran(path, "--json", "shards", "mend", "/film").json
    assert (mended["shards"], mended["lost"]) == (3, 0)
    out = tmp_path / "film"
    ran(path, "shards", "get", "/film", "-o", str(out))
    assert out.read_bytes() == b"content" * 9_000
    assert ran(path, "resolve", "/film").out.split() == ["berlin", "-", "local,", "home"]
