"""The policy compiler at work: what it is told of this store, its zones and its nodes, and what it has done.

Telemetry is gathered when somebody asks: nothing runs in between.  An action is in the log before it has any effect,
with the actor ``policy-compiler``; what changes rows is one batch with it.
"""

from __future__ import annotations

import contextlib
import heapq
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs

from space._errors import SpaceError, UnavailableError
from space._node import views
from space._node.caller import Document
from space._node.federation_move import hand_over
from space._node.federation_shards import ShardZone, shard_zones, spread
from space._node.federation_shelf import StoreShelf
from space._node.federation_zones import Zone, Zones
from space.events import commands as cmd
from space.events.ids import ROOT, CapsuleId
from space.events.types import Kind
from space.federation import compiler
from space.federation.compiler import (
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
)
from space.federation.mesh import Mesh, NodeState, ZoneState
from space.federation.shelf import Room
from space.policy.model import DEFAULT_POLICY, Policy, Shards, Sovereignty
from space.statemachine import zones as rows
from space.statemachine.store import ReadTransaction
from space.statemachine.tables import CAPSULE, CapsuleRow, Overlay

if TYPE_CHECKING:
    from space._node.store import Store

ACTOR: Final = "policy-compiler"

FREE_SHARE_MIN: Final = 0.1
"""Share of a zone's storage that is to stay free."""

LARGEST: Final = 16
"""Capsules that are looked at where room is short: those that take most of it."""

LAG_MAX: Final = 10_000
"""Positions a node may lag behind before it counts as degraded: seconds of work at full speed."""

SAMPLE_SECONDS: Final = 1.0
"""How long the nodes of a cluster are watched to tell how busy each is; only while something is hot."""

ACTIONS_MAX: Final = 10_000
"""Actions of one plan; the next has what is left."""


class Nodes(Protocol):
    """The nodes of this zone."""

    def status(self) -> Document:
        """Shards and their nodes, as ``space cluster status --json``."""

    def lead(self, shard: int, node: int) -> None:
        """Has a node lead a shard."""


@attrs.frozen
class Planned:
    """An action, and what it was made from."""

    action: Action
    policy: Policy


@attrs.define
class _Found:
    """What a look through the capsules of this store found."""

    new: list[tuple[NewCapsule, Policy]] = attrs.field(factory=list)
    largest: list[tuple[int, bytes, Policy]] = attrs.field(factory=list)

    def see(self, capsule: bytes, row: CapsuleRow, policy: Policy) -> None:
        """Takes note of a capsule that may go to other zones."""
        self.new.append((NewCapsule(capsule, row.size, row.change), policy))
        item = (row.size, capsule, policy)
        if len(self.largest) < LARGEST:
            heapq.heappush(self.largest, item)
        elif item[:2] > self.largest[0][:2]:
            heapq.heapreplace(self.largest, item)


def plan(store: Store, nodes: Nodes | None = None, *, since: int = 0) -> list[Planned]:
    """What the policies ask for now; changes nothing.

    Args:
        store: whose policies.
        nodes: the cluster it is in.
        since: only capsules that changed after this position count as new.
    """
    own = Zones(store).own()
    with contextlib.ExitStack() as stack:
        zones = [] if own is None else stack.enter_context(shard_zones(store))
        return _planned(store, own, zones, nodes, since)


def _planned(
    store: Store, own: Zone | None, zones: Sequence[ShardZone], nodes: Nodes | None, since: int
) -> list[Planned]:
    met = _meet(zones, None if own is None else own.id)
    found = _look(store, since)
    mesh = Mesh(
        "" if own is None else own.name,
        tuple(state for state, _ in met),
        tuple(_nodes(nodes, store)),
        _replicas(store, zones),
        {} if own is None else _shards(store, own),
    )
    actions: dict[tuple[Any, ...], Planned] = {}
    for telemetry, policy in _telemetry(store, mesh, met, found):
        for action in compiler.compile(telemetry, policy, mesh):
            actions.setdefault(_what(action), Planned(action, policy))
        if len(actions) >= ACTIONS_MAX:
            break
    return list(actions.values())


def _what(action: Action) -> tuple[Any, ...]:
    """An action without its reason: two that differ by that alone are one."""
    values = attrs.asdict(action, recurse=False)
    del values["reason"]
    return (type(action), *values.values())


# --- telemetry -------------------------------------------------------------------------------------


def _telemetry(
    store: Store, mesh: Mesh, met: Sequence[tuple[ZoneState, Room | None]], found: _Found
) -> Iterator[tuple[Telemetry, Policy]]:
    for node in mesh.nodes:
        if node.degraded:
            yield NodeDegraded(node.node, node.degraded), DEFAULT_POLICY
    for capsule, rate in store.heat.spikes().items():
        shard = CapsuleId(capsule).shard_keys(_shard_count(mesh))
        policy = _policy_of(store, capsule)
        if policy is not None:
            yield HeatSpike(capsule, mesh.home, rate.reads, rate.writes, shard), policy
    for state, room in met:
        if room is not None and room.free_bytes < FREE_SHARE_MIN * room.total_bytes:
            for _, capsule, policy in sorted(found.largest, key=lambda each: (-each[0], each[1])):
                yield CapacityThreshold(state.name, capsule, room.free_bytes, room.total_bytes), policy
    yield from found.new
    yield from _projections(store, mesh)


def _shard_count(mesh: Mesh) -> int:
    return 1 + max((shard for node in mesh.nodes for shard in node.leads), default=0)


def _policy_of(store: Store, capsule: bytes) -> Policy | None:
    try:
        return store.policy(CapsuleId(capsule))
    except SpaceError:  # deleted meanwhile
        return None


def _projections(store: Store, mesh: Mesh) -> Iterator[tuple[Telemetry, Policy]]:
    for note in views.listed(store.path):
        if note["state"] != "running" or note.get("at"):
            continue
        for source in str(note.get("source", "")).split(", "):
            try:
                capsule = store.resolve(source)
                stat, policy = store.stat(capsule), store.policy(capsule)
            except SpaceError:  # a moment, or nothing any more
                continue
            yield ViewProjection(bytes(capsule), str(note["view"]), mesh.home, stat.change), policy


def _look(store: Store, since: int) -> _Found:
    """Capsules that have their home here and a policy that lets them leave."""
    found = _Found()
    policies: dict[int, Policy] = {}
    with store._read() as txn:
        for key, value in txn.scan(CAPSULE, b""):
            row = CapsuleRow.decode(value)
            if not row.policy or row.deleted or row.kind != Kind.FILE:
                continue
            policy = policies.get(row.policy)
            if policy is None:
                policy = policies[row.policy] = store._policy(txn, row.policy)
            if policy.sovereignty is not Sovereignty.GLOBAL or row.change <= since:
                continue
            if _is_home(txn, key, row):
                found.see(key, row, policy)
    return found


def _is_home(txn: ReadTransaction, capsule: bytes, row: CapsuleRow) -> bool:
    return rows.home_of(Overlay(txn), capsule, row) is None


def _replicas(store: Store, zones: Sequence[ShardZone]) -> Mapping[bytes, frozenset[str]]:
    found: dict[bytes, set[str]] = {}
    with store._read() as txn:
        for zone in zones:
            for capsule, _ in rows.sent_capsules(txn, zone.id):
                found.setdefault(capsule, set()).add(zone.name)
    return {capsule: frozenset(names) for capsule, names in found.items()}


def _shards(store: Store, own: Zone) -> Mapping[bytes, int]:
    layouts = StoreShelf(store, own.id).layouts()
    return {layout.capsule: layout.position for layout in layouts if layout.home == own.id}


def _meet(zones: Sequence[ShardZone], own: bytes | None) -> list[tuple[ZoneState, Room | None]]:
    """Asks every zone how it is, all at once."""

    def ask(zone: ShardZone) -> tuple[ZoneState, Room | None]:
        try:
            zone.client.room()  # connects
            began = time.monotonic_ns()
            room = zone.client.room()
            rtt_ns = 0 if zone.id == own else time.monotonic_ns() - began
        except SpaceError:
            return ZoneState(zone.name, zone.kind, reachable=False), None
        return ZoneState(zone.name, zone.kind, True, rtt_ns, room.free_bytes), room

    if not zones:
        return []
    with ThreadPoolExecutor(len(zones), "space-zones") as pool:
        return list(pool.map(ask, zones))


def _nodes(nodes: Nodes | None, store: Store) -> Iterator[NodeState]:
    """The nodes of the cluster: what they lead, and what is wrong with them."""
    if nodes is None:
        return
    leads: dict[int, list[int]] = {}
    wrong: dict[int, str] = {}
    shards = nodes.status()["shards"]
    rates = _shard_rates(nodes, shards) if store.heat.spikes() else {}
    for shard in shards:
        for node in shard["nodes"]:
            led = leads.setdefault(node["id"], [])
            if shard["leader"] == node["id"]:
                led.append(shard["shard"])
            if trouble := _trouble(node):
                wrong[node["id"]] = f"shard {shard['shard']}: {trouble}"
    for node, led in sorted(leads.items()):
        load = sum(rates.get(shard, 0.0) for shard in led)
        yield NodeState(node, wrong.get(node, ""), tuple(led), load)


def _shard_rates(nodes: Nodes, before: Sequence[Document]) -> dict[int, float]:
    """Batches a second of each shard, from where its log ends now and a little later."""
    time.sleep(SAMPLE_SECONDS)
    ends = {shard["shard"]: _end(shard) for shard in before}
    after = nodes.status()["shards"]
    return {
        shard["shard"]: (_end(shard) - ends[shard["shard"]]) / SAMPLE_SECONDS
        for shard in after
        if shard["shard"] in ends
    }


def _end(shard: Document) -> int:
    return max((node["position"] or 0 for node in shard["nodes"]), default=0)


def _trouble(node: Document) -> str:
    if node["role"] == "unreachable":
        return "does not answer"
    if node.get("failure"):
        return f"has stopped: {node['failure']}"
    if (node["lag"] or 0) > LAG_MAX:
        return f"lags {node['lag']} positions behind"
    return ""


# --- carrying out ----------------------------------------------------------------------------------


def apply(store: Store, nodes: Nodes | None = None, *, since: int = 0) -> list[Document]:
    """Has done what :func:`plan` says; one action that fails does not keep others from being done."""
    own = Zones(store).own()
    results = []
    with contextlib.ExitStack() as stack:
        zones = [] if own is None else stack.enter_context(shard_zones(store))
        for each in _planned(store, own, zones, nodes, since):
            document = describe(store, each.action)
            try:
                document |= {"done": True, "result": _carry_out(store, own, zones, nodes, each), "error": ""}
            except SpaceError as error:
                document |= {"done": False, "result": {}, "error": str(error)}
            results.append(document)
    return results


def describe(store: Store, action: Action) -> Document:
    """An action as plain data: ``space policy plan --json`` has it."""
    document: Document = {"action": type(action).__name__}
    for name, value in attrs.asdict(action, recurse=False).items():
        document[name] = str(CapsuleId(value)) if name == "capsule" else value
    if "capsule" in document:
        with contextlib.suppress(SpaceError):
            paths = store.paths_of(CapsuleId.parse(document["capsule"]))
            document["path"] = paths[0].decode(errors="backslashreplace") if paths else ""
    if "zones" in document:
        document["zones"] = list(document["zones"])
    return document


def _carry_out(
    store: Store, own: Zone | None, zones: Sequence[ShardZone], nodes: Nodes | None, planned: Planned
) -> Document:
    match planned.action:
        case Federate() as action:
            return _federate(store, action)
        case Replicate() as action:
            return _replicate(store, action, planned.policy)
        case ShardEC() as action if own is not None:
            return _shard(store, own, zones, action)
        case Rebalance() as action if nodes is not None:
            _record(store, action, ROOT, f"shard {action.shard} to node {action.node}")
            nodes.lead(action.shard, action.node)
            return {}
        case Evacuate() as action if nodes is not None:
            return _evacuate(store, nodes, action)
        case Migrate() as action:
            noted = [_recorded(action, action.capsule, action.zone)]
            return hand_over(
                store, Zones(store), CapsuleId(action.capsule), action.zone, actor=ACTOR, noted=noted
            )
        case action:
            raise UnavailableError(f"nobody here can carry out {type(action).__name__}")


def _record(store: Store, action: Action, capsule: bytes, argument: str) -> None:
    """Says in the log what is about to be done; durable when it returns."""
    store.execute(_recorded(action, capsule, argument), actor=ACTOR)


def _recorded(action: Action, capsule: bytes, argument: str) -> cmd.RecordAction:
    return cmd.RecordAction(capsule, type(action).__name__, argument, action.reason)


def _federate(store: Store, action: Federate) -> Document:
    """The stream to the zone looks at the log again, which the event alone makes it do."""
    if store.federation is None:
        raise UnavailableError(
            "nothing ships to other zones in this process", hint="start it: space federation serve"
        )
    _record(store, action, action.capsule, f"{action.zone} lane {action.lane}")
    return {}


def _replicate(store: Store, action: Replicate, policy: Policy) -> Document:
    """The candidate becomes a target; the policy and why it changed are one batch.

    Raises:
        ConflictError: the capsule has changed its policy meanwhile.
    """
    from space._node.store import pack_policy

    grown = attrs.evolve(
        policy,
        federation_targets=(*policy.federation_targets, action.zone),
        federation_candidates=tuple(name for name in policy.federation_candidates if name != action.zone),
    )
    if store.policy(CapsuleId(action.capsule)) != policy:
        raise UnavailableError("its policy has changed meanwhile", hint="plan again")
    commands: list[cmd.Command] = [
        _recorded(action, action.capsule, action.zone),
        cmd.SetPolicy(action.capsule, pack_policy(grown), None),
    ]
    store.execute(cmd.Together(commands), actor=ACTOR)
    return {"targets": list(grown.federation_targets)}


def _shard(store: Store, own: Zone, zones: Sequence[ShardZone], action: ShardEC) -> Document:
    known = {zone.name: zone for zone in zones}
    order = [known[name] for name in action.zones]
    places = " ".join(action.zones)
    _record(store, action, action.capsule, f"{places} data {action.data} parity {action.parity}")
    done = spread(store, own, order, CapsuleId(action.capsule), Shards(action.data, action.parity))
    return {
        "position": done.layout.position,
        "stripes": len(done.layout.stripes),
        "sent": done.sent,
        "sent_bytes": done.sent_bytes,
    }


def _evacuate(store: Store, nodes: Nodes, action: Evacuate) -> Document:
    """Everything the node leads gets another leader; it stays a member, which is for people to end."""
    states = list(_nodes(nodes, store))
    led = next((state.leads for state in states if state.node == action.node), ())
    able = [state.node for state in states if not state.degraded and state.node != action.node]
    if not able:
        raise UnavailableError(f"no other node than {action.node} is healthy")
    _record(store, action, ROOT, f"node {action.node}")
    for place, shard in enumerate(led):
        nodes.lead(shard, able[place % len(able)])
    return {"shards": list(led)}
