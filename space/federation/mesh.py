"""What the policy compiler knows of the zones, the nodes of this one, and who holds what: values only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import attrs

FAR_NS: Final = 1 << 62
"""What counts as the way to a zone nobody has measured: further than any other."""


@attrs.frozen
class ZoneState:
    """A zone, this store's own included.

    Attributes:
        name: how policies call it.
        kind: metro, geo or edge.
        reachable: whether it has answered lately.
        rtt_ns: how long a word there and back takes, in nanoseconds; None: not measured; 0: this one.
        free_bytes: room it says it has; None: it does not say.
    """

    name: str
    kind: str = "metro"
    reachable: bool = True
    rtt_ns: int | None = None
    free_bytes: int | None = None

    @property
    def distance(self) -> tuple[int, str]:
        """Sorts zones: nearest first, by name where that is the same."""
        return FAR_NS if self.rtt_ns is None else self.rtt_ns, self.name


@attrs.frozen
class NodeState:
    """A node of this zone.

    Attributes:
        node: its number.
        degraded: what is wrong with it; empty: nothing.
        leads: the shards it leads.
        load: batches a second of the shards it leads.
    """

    node: int
    degraded: str = ""
    leads: tuple[int, ...] = ()
    load: float = 0.0


@attrs.frozen
class Mesh:
    """Zones and nodes as they are at one moment.

    Attributes:
        home: the name of this store's zone.
        zones: all that are known, this one included.
        nodes: of this zone; none: a store of its own.
        replicas: zones beside this one that hold a capsule, by its id.
        shards: as of which position of this log a capsule's shards are, by its id.
    """

    home: str
    zones: tuple[ZoneState, ...] = ()
    nodes: tuple[NodeState, ...] = ()
    replicas: Mapping[bytes, frozenset[str]] = attrs.field(factory=dict)
    shards: Mapping[bytes, int] = attrs.field(factory=dict)

    def known(self, names: Iterable[str]) -> list[ZoneState]:
        """Those of the names that are known zones, nearest first."""
        wanted = frozenset(names)
        return sorted((zone for zone in self.zones if zone.name in wanted), key=lambda zone: zone.distance)

    def holders(self, capsule: bytes) -> frozenset[str]:
        """Zones beside this one that hold the capsule."""
        return self.replicas.get(capsule, frozenset())

    def healthy(self) -> list[NodeState]:
        """Nodes with nothing wrong, least loaded first."""
        return sorted((node for node in self.nodes if not node.degraded), key=lambda n: (n.load, n.node))
