"""Which replica to read: the nearest zone that may hold a capsule and can be read from.

Without I/O.  How far zones are is a table that others measure (:class:`~space.federation.mesh.ZoneState`: round trips
of the connections there are); whoever reads asks for one capsule at a time, so answers are kept until the table
changes: they depend on the capsule's home and policy, of which there are few.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, final

import attrs

from space.federation.compiler import permitted
from space.federation.mesh import ZoneState
from space.policy.model import Policy

ANSWERS_MAX: Final = 4096
"""Answers remembered: homes times policies; a store has a handful of each."""


@attrs.frozen
class Replica:
    """Where a capsule can be read.

    Attributes:
        zone: the zone's name.
        local: whether that is this one.
        home: whether it is the capsule's home, which has the newest.
        reachable: whether it has answered lately.
        rtt_ns: the way there and back; 0 here; None: not measured.
    """

    zone: str
    local: bool
    home: bool
    reachable: bool
    rtt_ns: int | None


@final
class Resolver:
    """Ranks zones; ``zone`` is the name of the one it stands in, empty if that is none."""

    def __init__(self, zone: str, zones: Iterable[ZoneState] = ()) -> None:
        self.zone: Final = zone
        self._zones: dict[str, ZoneState] = {}
        self._answers: dict[tuple[str, Policy, bool], tuple[Replica, ...]] = {}
        self.update(zones)

    def update(self, zones: Iterable[ZoneState]) -> None:
        """Takes another table of zones; this one need not be in it."""
        self._zones = {each.name: each for each in zones if each.name != self.zone}
        self._zones[self.zone] = ZoneState(self.zone, rtt_ns=0)
        self._answers.clear()

    def rank(self, home: str, policy: Policy, *, here: bool) -> tuple[Replica, ...]:
        """Zones a capsule can be read from, nearest first; those that do not answer last.

        Args:
            home: the name of its home zone.
            policy: in force for it.
            here: whether this zone holds it, whole and readable.
        """
        key = (home, policy, here)
        found = self._answers.get(key)
        if found is None:
            if len(self._answers) >= ANSWERS_MAX:
                self._answers.clear()
            found = self._answers[key] = self._ranked(home, policy, here)
        return found

    def _ranked(self, home: str, policy: Policy, here: bool) -> tuple[Replica, ...]:
        allowed = permitted(policy, home) if policy.federation_shards is None else {home}
        able = [
            zone
            for zone in self._zones.values()
            if (here if zone.name == self.zone else zone.name in allowed)
        ]
        able.sort(key=lambda zone: (not zone.reachable, zone.distance))
        return tuple(
            Replica(zone.name, zone.name == self.zone, zone.name == home, zone.reachable, zone.rtt_ns)
            for zone in able
        )
