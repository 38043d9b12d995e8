"""The policy compiler: what was noticed, what the policy says and how the mesh is → what to do, and why.

Pure, total and deterministic: the same three give the same actions, and nothing that is noticed is an error.
Every rule is a row of :data:`RULES` (docs/federation.md has them as a table), and every action says which key of the
policy and which telemetry it comes from.

No rule can break sovereignty: whatever it asks for, :func:`compile` lets an action through only if every zone in it
may hold the capsule (:func:`permitted`).  Only :class:`Replicate` may name a zone that is no target yet, and only a
candidate: it is what makes it one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import attrs

from space.federation.mesh import Mesh, ZoneState
from space.policy.model import Policy, Sovereignty
from space.policy.units import format_duration, format_size

IMBALANCE: Final = 2.0
"""A leader with so many times the load of the idlest node is worth moving: below, moving costs more than it brings."""

# --- what was noticed ------------------------------------------------------------------------------


@attrs.frozen
class NewCapsule:
    """A capsule of this zone was made or written.

    Attributes:
        capsule: its id.
        size: its bytes.
        change: position of this log at which it last changed.
    """

    capsule: bytes
    size: int
    change: int

    def __str__(self) -> str:
        return f"NewCapsule of {format_size(self.size)}, changed at {self.change}"


@attrs.frozen
class HeatSpike:
    """A capsule is used much more than others.

    Attributes:
        capsule: its id.
        zone: where it is used.
        reads, writes: a second.
        shard: the shard of the cluster it is in.
    """

    capsule: bytes
    zone: str
    reads: float
    writes: float
    shard: int = 0

    def __str__(self) -> str:
        return f"HeatSpike in {self.zone}: {self.reads:.0f} reads/s, {self.writes:.0f} writes/s"


@attrs.frozen
class CapacityThreshold:
    """A zone has little room left, and the capsule is one of those that take most of it.

    Attributes:
        zone: which.
        capsule: its id.
        free_bytes, total_bytes: of the zone's storage.
    """

    zone: str
    capsule: bytes
    free_bytes: int
    total_bytes: int

    def __str__(self) -> str:
        free, total = format_size(self.free_bytes), format_size(self.total_bytes)
        return f"CapacityThreshold in {self.zone}: {free} of {total} free"


@attrs.frozen
class NodeDegraded:
    """A node of this zone does not do what it should.

    Attributes:
        node: its number.
        why: what is wrong.
    """

    node: int
    why: str

    def __str__(self) -> str:
        return f"NodeDegraded {self.node}: {self.why}"


@attrs.frozen
class ViewProjection:
    """A view serves a capsule.

    Attributes:
        capsule: its id.
        view: fuse, nfs, nvme or csi.
        zone: where it is served.
        change: position of this log at which the capsule last changed.
    """

    capsule: bytes
    view: str
    zone: str
    change: int = 0

    def __str__(self) -> str:
        return f"ViewProjection by {self.view} in {self.zone}"


Telemetry = NewCapsule | HeatSpike | CapacityThreshold | NodeDegraded | ViewProjection

# --- what to do ------------------------------------------------------------------------------------


@attrs.frozen
class Federate:
    """Have the stream to a target zone carry a capsule that is not there yet."""

    capsule: bytes
    zone: str
    lane: int
    reason: str


@attrs.frozen
class Replicate:
    """Make a candidate zone a target: one more replica in the mesh."""

    capsule: bytes
    zone: str
    reason: str


@attrs.frozen
class Migrate:
    """Move a capsule's home to a zone that holds a replica of it."""

    capsule: bytes
    zone: str
    reason: str


@attrs.frozen
class ShardEC:
    """Make the shards of a capsule's payload, one for each zone, in this order."""

    capsule: bytes
    zones: tuple[str, ...]
    data: int
    parity: int
    reason: str


@attrs.frozen
class Rebalance:
    """Have another node lead a shard."""

    shard: int
    node: int
    reason: str


@attrs.frozen
class Evacuate:
    """Have others lead what a node leads."""

    node: int
    reason: str


Action = Federate | Replicate | Migrate | ShardEC | Rebalance | Evacuate


def permitted(policy: Policy, home: str) -> frozenset[str]:
    """The zones that may hold a capsule of this policy now."""
    if policy.sovereignty is not Sovereignty.GLOBAL:
        return frozenset((home,))
    return frozenset((home, *policy.federation_targets))


def places(action: Action) -> tuple[str, ...]:
    """The zones that an action brings a capsule, or a part of it, to."""
    match action:
        case ShardEC(zones=zones):
            return zones
        case Federate(zone=zone) | Replicate(zone=zone) | Migrate(zone=zone):
            return (zone,)
        case _:
            return ()


def compile(telemetry: Telemetry, policy: Policy, mesh: Mesh) -> tuple[Action, ...]:  # noqa: A001 - its name
    """What to do about one thing that was noticed.

    Args:
        telemetry: what was noticed.
        policy: in force for the capsule it is about; any, if it is about none.
        mesh: zones, nodes and replicas as they are.
    """
    allowed = permitted(policy, mesh.home)
    grown = allowed
    if policy.sovereignty is Sovereignty.GLOBAL:
        grown = allowed | frozenset(policy.federation_candidates)
    found: dict[Action, None] = {}
    for rule in RULES:
        if type(telemetry) is rule.telemetry:
            for action in rule.make(telemetry, policy, mesh):
                limit = grown if isinstance(action, Replicate) else allowed
                if limit.issuperset(places(action)):
                    found[action] = None
    return tuple(found)


# --- the rules -------------------------------------------------------------------------------------


@attrs.frozen
class Rule:
    """A row of the table: upon ``telemetry``, ``when`` that holds, ``action``, because of the policy's ``key``."""

    telemetry: type[Any]
    when: str
    key: str
    action: type[Any]
    make: Callable[[Any, Policy, Mesh], Iterable[Action]]


def _because(key: str, value: object, telemetry: Telemetry) -> str:
    return f"{key}: {value}; {telemetry}"


def _federate(telemetry: NewCapsule | ViewProjection, policy: Policy, mesh: Mesh) -> Iterator[Action]:
    if policy.federation_shards is not None:
        return
    holders = mesh.holders(telemetry.capsule)
    for zone in mesh.known(policy.federation_targets):
        if zone.name not in holders and zone.name != mesh.home:
            yield _to(zone, telemetry, policy)


def _to(zone: ZoneState, telemetry: NewCapsule | ViewProjection | HeatSpike, policy: Policy) -> Action:
    reason = _because("federation.targets", zone.name, telemetry)
    return Federate(telemetry.capsule, zone.name, policy.federation_priority, reason)


def _shard(telemetry: NewCapsule | ViewProjection, policy: Policy, mesh: Mesh) -> Iterator[Action]:
    shards = policy.federation_shards
    if shards is None or mesh.shards.get(telemetry.capsule, -1) >= telemetry.change:
        return
    names = list(policy.federation_targets)
    if len(names) < shards.total:
        names.insert(0, mesh.home)
    zones = [zone for zone in mesh.known(names) if zone.reachable]
    if len(zones) == shards.total:
        reason = _because("federation.shards", f"data {shards.data}, parity {shards.parity}", telemetry)
        order = tuple(zone.name for zone in zones)
        yield ShardEC(telemetry.capsule, order, shards.data, shards.parity, reason)


def _follow_heat(telemetry: HeatSpike, policy: Policy, mesh: Mesh) -> Iterator[Action]:
    if telemetry.zone == mesh.home or telemetry.zone in mesh.holders(telemetry.capsule):
        return
    for zone in mesh.known((telemetry.zone,)):
        if zone.name in policy.federation_targets and policy.federation_shards is None:
            yield _to(zone, telemetry, policy)


def _grow_to_heat(telemetry: HeatSpike | ViewProjection, policy: Policy, mesh: Mesh) -> Iterator[Action]:
    for zone in mesh.known((telemetry.zone,)):
        if zone.name in policy.federation_candidates and zone.reachable:
            yield _grow(zone, telemetry)


def _grow(zone: ZoneState, telemetry: HeatSpike | ViewProjection | CapacityThreshold) -> Action:
    reason = _because("federation.candidates", zone.name, telemetry)
    return Replicate(telemetry.capsule, zone.name, reason)


def _move_to_writers(telemetry: HeatSpike, policy: Policy, mesh: Mesh) -> Iterator[Action]:
    if telemetry.writes <= telemetry.reads or telemetry.zone not in mesh.holders(telemetry.capsule):
        return
    for zone in mesh.known((telemetry.zone,)):
        if zone.name != mesh.home and zone.reachable:
            reason = _because("federation.targets", zone.name, telemetry)
            yield Migrate(telemetry.capsule, zone.name, reason)


def _spread_load(telemetry: HeatSpike, policy: Policy, mesh: Mesh) -> Iterator[Action]:
    if telemetry.zone != mesh.home:
        return
    leader = next((node for node in mesh.nodes if telemetry.shard in node.leads), None)
    idlest = next(iter(mesh.healthy()), None)
    if leader is None or idlest is None or idlest.node == leader.node or len(leader.leads) < 2:
        return  # the only shard of a node would take its load along
    if leader.load > IMBALANCE * idlest.load:
        why = f"node {leader.node} at {leader.load:.0f}/s, node {idlest.node} at {idlest.load:.0f}/s"
        wanted = (
            "no promise" if policy.latency_target_ns is None else format_duration(policy.latency_target_ns)
        )
        reason = _because("latency_target", f"{wanted}; {why}", telemetry)
        yield Rebalance(telemetry.shard, idlest.node, reason)


def _move_out(telemetry: CapacityThreshold, policy: Policy, mesh: Mesh) -> Iterator[Action]:
    if telemetry.zone != mesh.home:
        return
    holders = mesh.holders(telemetry.capsule)
    able = [
        zone
        for zone in mesh.known(policy.federation_targets)
        if zone.name in holders and zone.reachable and (zone.free_bytes or 0) > telemetry.free_bytes
    ]
    if able:
        roomiest = max(able, key=lambda zone: zone.free_bytes or 0)
        reason = _because("federation.targets", roomiest.name, telemetry)
        yield Migrate(telemetry.capsule, roomiest.name, reason)


def _grow_elsewhere(telemetry: CapacityThreshold, policy: Policy, mesh: Mesh) -> Iterator[Action]:
    if telemetry.zone == mesh.home or telemetry.zone not in policy.federation_targets:
        return
    able = [
        zone
        for zone in mesh.known(policy.federation_candidates)
        if zone.reachable and zone.name != telemetry.zone and (zone.free_bytes or 0) > telemetry.free_bytes
    ]
    if able:
        yield _grow(able[0], telemetry)


def _evacuate(telemetry: NodeDegraded, policy: Policy, mesh: Mesh) -> Iterator[Action]:
    leads = any(node.node == telemetry.node and node.leads for node in mesh.nodes)
    if leads and any(node.node != telemetry.node for node in mesh.healthy()):
        yield Evacuate(telemetry.node, _because("durability", policy.durability.value, telemetry))


RULES: Final[tuple[Rule, ...]] = (
    Rule(NewCapsule, "a target that holds no replica", "federation.targets", Federate, _federate),
    Rule(
        NewCapsule, "shards are older than it, all their zones answer", "federation.shards", ShardEC, _shard
    ),
    Rule(HeatSpike, "in a target that holds no replica", "federation.targets", Federate, _follow_heat),
    Rule(HeatSpike, "in a candidate that answers", "federation.candidates", Replicate, _grow_to_heat),
    Rule(
        HeatSpike,
        "more writes than reads, in a target with a replica, which answers",
        "federation.targets",
        Migrate,
        _move_to_writers,
    ),
    Rule(
        HeatSpike,
        "here, led by a node with twice the load of the idlest, which leads more than that",
        "latency_target",
        Rebalance,
        _spread_load,
    ),
    Rule(
        CapacityThreshold,
        "here, a target with a replica answers and has more room",
        "federation.targets",
        Migrate,
        _move_out,
    ),
    Rule(
        CapacityThreshold,
        "in a target, a candidate answers and has more room",
        "federation.candidates",
        Replicate,
        _grow_elsewhere,
    ),
    Rule(NodeDegraded, "it leads shards, another node is healthy", "durability", Evacuate, _evacuate),
    Rule(ViewProjection, "a target that holds no replica", "federation.targets", Federate, _federate),
    Rule(
        ViewProjection,
        "shards are older than it, all their zones answer",
        "federation.shards",
        ShardEC,
        _shard,
    ),
    Rule(ViewProjection, "in a candidate that answers", "federation.candidates", Replicate, _grow_to_heat),
)
