from __future__ import annotations

from pathlib import Path

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from space.federation.compiler import (
    RULES,
    Action,
    CapacityThreshold,
    Evacuate,
    Federate,
    HeatSpike,
    Migrate,
    NewCapsule,
    NodeDegraded,
    Rebalance,
    Replicate,
    ShardEC,
    Telemetry,
    ViewProjection,
    compile,  # noqa: A004 - its name
)
from space.federation.mesh import Mesh, NodeState, ZoneState
from space.policy.model import Policy, Shards, Sovereignty

DOCS = Path(__file__).parent.parent.parent / "docs" / "federation.md"
CAPSULE = bytes(range(16))
HOME = "berlin"
NAMES = [HOME, "paris", "oslo", "lima", "osaka"]
ZONES = st.sampled_from([*NAMES, "nowhere"])
RATES = st.sampled_from([0.0, 1.0, 1000.0])


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Any policy, as far as it concerns zones: targets may be this zone, and zones nobody knows."""
    sovereignty = draw(st.sampled_from(Sovereignty))
    if sovereignty is not Sovereignty.GLOBAL:
        return Policy(sovereignty=sovereignty)
    zones = tuple(draw(st.permutations([*NAMES, "nowhere"])))
    targets = zones[: draw(st.integers(0, len(zones)))]
    shards = None
    if len(targets) >= 2 and draw(st.booleans()):
        total = max(3, len(targets) + draw(st.integers(0, 1)))
        parity = draw(st.integers(1, total - 2))
        shards = Shards(total - parity, parity)
    candidates = () if shards else zones[len(targets) :][: draw(st.integers(0, 6))]
    return Policy(
        sovereignty=sovereignty,
        federation_targets=targets,
        federation_candidates=candidates,
        federation_shards=shards,
        federation_priority=draw(st.integers(0, 100)) if targets else 0,
    )


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    """Any mesh of those zones and up to three nodes."""
    known = draw(st.lists(st.sampled_from(NAMES), unique=True))
    room = st.none() | st.sampled_from([0, 1 << 20, 1 << 40])
    rtt = st.none() | st.sampled_from([0, 1_000, 1_000_000])
    zones = [ZoneState(name, "geo", draw(st.booleans()), draw(rtt), draw(room)) for name in known]
    nodes = [
        NodeState(number, draw(st.sampled_from(["", "slow disk"])), draw(LED), draw(RATES))
        for number in range(draw(st.integers(0, 3)))
    ]
    holders = frozenset(draw(st.lists(st.sampled_from(NAMES[1:]))))
    shards = draw(st.sampled_from([{}, {CAPSULE: 5}]))
    return Mesh(HOME, tuple(zones), tuple(nodes), {CAPSULE: holders}, shards)


LED = st.sampled_from([(), (0,), (0, 1), (1, 2)])
TELEMETRY: st.SearchStrategy[Telemetry] = st.one_of(
    st.builds(NewCapsule, st.just(CAPSULE), st.integers(0, 1 << 40), st.integers(0, 9)),
    st.builds(HeatSpike, st.just(CAPSULE), ZONES, RATES, RATES, st.integers(0, 2)),
    st.builds(CapacityThreshold, ZONES, st.just(CAPSULE), st.sampled_from([0, 1 << 30]), st.just(1 << 40)),
    st.builds(NodeDegraded, st.integers(0, 4), st.just("silent")),
    st.builds(ViewProjection, st.just(CAPSULE), st.sampled_from(["fuse", "nfs"]), ZONES, st.integers(0, 9)),
)


def reached(action: Action) -> set[str]:
    """Every word in an action that is the name of a zone, found without asking the action what it is."""
    values = attrs.asdict(action, recurse=False)
    del values["reason"]
    named = [value for value in values.values() if isinstance(value, str)]
    return {*named, *(name for value in values.values() if isinstance(value, tuple) for name in value)}


@given(TELEMETRY, policies(), meshes())
@settings(max_examples=1000)
def test_no_action_is_against_sovereignty(telemetry: Telemetry, policy: Policy, mesh: Mesh) -> None:
    """Whatever is noticed: nothing leaves for a zone that is neither target nor, for a new replica, candidate."""
    for action in compile(telemetry, policy, mesh):
        zones = reached(action) - {HOME}
        if policy.sovereignty is not Sovereignty.GLOBAL:
            assert not zones, action
        elif isinstance(action, Replicate):
            assert zones <= {*policy.federation_targets, *policy.federation_candidates}, action
        else:
            assert zones <= set(policy.federation_targets), action


@given(TELEMETRY, policies(), meshes())
@settings(max_examples=200)
def test_the_same_gives_the_same(telemetry: Telemetry, policy: Policy, mesh: Mesh) -> None:
    """Actions depend on nothing but the arguments, and not on the order in which zones and nodes are told."""
    found = compile(telemetry, policy, mesh)
    zones, nodes = mesh.zones[::-1], mesh.nodes[::-1]
    assert compile(telemetry, policy, attrs.evolve(mesh, zones=zones, nodes=nodes)) == found
    assert len(set(found)) == len(found)


@given(TELEMETRY, policies(), meshes())
@settings(max_examples=200)
def test_every_action_says_why(telemetry: Telemetry, policy: Policy, mesh: Mesh) -> None:
    """A reason names a key of the rules and what was noticed, and fits in an event."""
    keys = {(rule.telemetry, rule.action): rule.key for rule in RULES}
    for action in compile(telemetry, policy, mesh):
        assert action.reason.startswith(keys[type(telemetry), type(action)] + ": ")
        assert str(telemetry) in action.reason
        assert type(telemetry).__name__ in action.reason
        assert len(action.reason) < 1024


# --- each rule --------------------------------------------------------------------------------------

TARGETS = Policy(
    sovereignty=Sovereignty.GLOBAL,
    federation_targets=("paris", "oslo"),
    federation_candidates=("lima",),
    federation_priority=7,
)
SHARDED = Policy(
    sovereignty=Sovereignty.GLOBAL,
    federation_targets=("paris", "oslo", "lima"),
    federation_shards=Shards(2, 2),
)
MESH = Mesh(
    HOME,
    (
        ZoneState(HOME, rtt_ns=0, free_bytes=1 << 30),
        ZoneState("paris", rtt_ns=2_000_000, free_bytes=1 << 40),
        ZoneState("oslo", rtt_ns=1_000_000, free_bytes=1 << 41),
        ZoneState("lima", rtt_ns=9_000_000, free_bytes=1 << 42),
    ),
    (NodeState(1, leads=(0, 1), load=900.0), NodeState(2, load=10.0), NodeState(3, "silent", (2,))),
    {CAPSULE: frozenset({"oslo"})},
)
NEW = NewCapsule(CAPSULE, 4096, 9)
FULL = CapacityThreshold(HOME, CAPSULE, 1 << 20, 1 << 30)


def without(name: str) -> Mesh:
    """The mesh, but the zone does not answer."""
    return attrs.evolve(
        MESH, zones=tuple(attrs.evolve(each, reachable=each.name != name) for each in MESH.zones)
    )


CASES: list[tuple[Telemetry, Policy, Mesh, list[tuple[object, ...]]]] = [
    (NEW, TARGETS, MESH, [("Federate", "paris")]),
    (NEW, TARGETS, attrs.evolve(MESH, replicas={}), [("Federate", "oslo"), ("Federate", "paris")]),
    (NEW, Policy(), MESH, []),
    (NEW, SHARDED, MESH, [("ShardEC", (HOME, "oslo", "paris", "lima"))]),
    (NEW, SHARDED, without("paris"), []),
    (NEW, SHARDED, attrs.evolve(MESH, shards={CAPSULE: 8}), [("ShardEC", (HOME, "oslo", "paris", "lima"))]),
    (NEW, SHARDED, attrs.evolve(MESH, shards={CAPSULE: 9}), []),
    (HeatSpike(CAPSULE, "paris", 9, 0), TARGETS, MESH, [("Federate", "paris")]),
    (HeatSpike(CAPSULE, "oslo", 9, 0), TARGETS, MESH, []),
    (HeatSpike(CAPSULE, "oslo", 1, 9), TARGETS, MESH, [("Migrate", "oslo")]),
    (HeatSpike(CAPSULE, "oslo", 1, 9), TARGETS, without("oslo"), []),
    (HeatSpike(CAPSULE, "lima", 9, 0), TARGETS, MESH, [("Replicate", "lima")]),
    (HeatSpike(CAPSULE, "lima", 9, 0), TARGETS, without("lima"), []),
    (HeatSpike(CAPSULE, "osaka", 9, 0), TARGETS, MESH, []),
    (HeatSpike(CAPSULE, HOME, 9, 0, 1), Policy(), MESH, [("Rebalance", 1, 2)]),
    (HeatSpike(CAPSULE, HOME, 9, 0, 2), Policy(), MESH, []),
    (FULL, TARGETS, MESH, [("Migrate", "oslo")]),
    (FULL, TARGETS, without("oslo"), []),
    (FULL, Policy(sovereignty=Sovereignty.LOCAL), MESH, []),
    (attrs.evolve(FULL, zone="oslo"), TARGETS, MESH, [("Replicate", "lima")]),
    (attrs.evolve(FULL, zone="oslo"), TARGETS, without("lima"), []),
    (NodeDegraded(3, "silent"), Policy(), MESH, [("Evacuate", 3)]),
    (NodeDegraded(2, "silent"), Policy(), MESH, []),
    (NodeDegraded(4, "silent"), Policy(), MESH, []),
    (NodeDegraded(3, "silent"), Policy(), attrs.evolve(MESH, nodes=MESH.nodes[2:]), []),
    (ViewProjection(CAPSULE, "nfs", HOME), TARGETS, MESH, [("Federate", "paris")]),
    (ViewProjection(CAPSULE, "nfs", "lima"), TARGETS, MESH, [("Federate", "paris"), ("Replicate", "lima")]),
    (ViewProjection(CAPSULE, "nfs", HOME, 3), SHARDED, MESH, [("ShardEC", (HOME, "oslo", "paris", "lima"))]),
]


@pytest.mark.unit
@pytest.mark.parametrize("telemetry,policy,mesh,wanted", CASES)
def test_a_rule_does_what_its_row_says(
    telemetry: Telemetry, policy: Policy, mesh: Mesh, wanted: list[tuple[object, ...]]
) -> None:
    """Each row of the table, where it applies and where it just does not."""
    assert [short(action) for action in compile(telemetry, policy, mesh)] == wanted


def short(action: Action) -> tuple[object, ...]:
    """An action without its capsule and reason."""
    match action:
        case ShardEC(zones=zones, data=2, parity=2):
            return "ShardEC", zones
        case Rebalance(shard=shard, node=node):
            return "Rebalance", shard, node
        case Evacuate(node=node):
            return "Evacuate", node
        case Federate(zone=zone, lane=7) | Replicate(zone=zone) | Migrate(zone=zone):
            return type(action).__name__, zone
    raise AssertionError(action)


@pytest.mark.unit
def test_every_rule_has_a_case() -> None:
    """No row of the table is without a case above in which it does something."""
    done = {
        (type(telemetry), type(action))
        for telemetry, policy, mesh, _ in CASES
        for action in compile(telemetry, policy, mesh)
    }
    assert done == {(rule.telemetry, rule.action) for rule in RULES}


@pytest.mark.unit
def test_the_page_has_every_rule() -> None:
    """The table in docs/federation.md is the table of the rules, row by row."""
    lines = DOCS.read_text().splitlines()
    rows = [
        f"| `{rule.telemetry.__name__}` | {rule.when} | `{rule.key}` | `{rule.action.__name__}` |"
        for rule in RULES
    ]
    assert [line for line in lines if line in rows] == rows
