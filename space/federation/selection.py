"""Selection: may a capsule go to a zone, and in which lane?

The policy a capsule has at a position decides: ``sovereignty: global``, the zone among its ``federation.targets``,
and no ``federation.shards`` (then targets get shards of a code, see :mod:`space.federation.parity`).  The lane is its
``federation.priority``.  A capsule takes over its directory's policy when it is made, and a clone its source's; so the
policy in its row is the one in force, inherited or not.  Where this zone took another one's place, a policy that names
this one as a target speaks of a home that is a target now: the zone that was the home is one too.  What is not
understood does not go anywhere: a document that is none, one that another program wrote with keys this one does not
know, a number without a document.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, final

import attrs
import msgpack

from space._errors import UsageError
from space.policy.model import DEFAULT_POLICY, Policy, Sovereignty
from space.statemachine import zones
from space.statemachine.tables import POLICY, U32, ZONE, Overlay, Reader

LANES: Final = 101
"""Lanes a zone can have: priorities are 0 to 100."""

_POLICIES_MAX: Final = 4096
"""Policies remembered: stores have a handful; one that has more reads them again."""


@final
class Selection:
    """What policies say about one zone; ``zone`` is the name policies call it.

    Numbers of policies never change their meaning, so one selection serves every moment of one log.
    """

    def __init__(self, zone: str) -> None:
        self.zone: Final = zone
        self._known: dict[int, Policy] = {}
        self._stood_in: tuple[list[tuple[bytes, bytes]], tuple[bytes, str] | None] = ([], None)

    def policy(self, state: Reader | Overlay, number: int) -> Policy:
        """The policy with that row number; one that keeps everything at home where there is none to be understood."""
        if number == 0:
            return DEFAULT_POLICY
        found = self._known.get(number)
        if found is None:
            document = state.get(POLICY, U32.pack(number))
            if document is None:
                return DEFAULT_POLICY
            if len(self._known) >= _POLICIES_MAX:
                self._known.clear()
            found = self._known[number] = _understood(document)
        return found

    def lane(self, state: Reader | Overlay, number: int) -> int | None:
        """The lane in which capsules of that policy go to the zone; None if they must not."""
        policy = self.policy(state, number)
        named = self.zone in policy.federation_targets or not policy.federation_targets
        return self.lane_of(policy, None if named else self.stood_in_for(state))

    def lane_of(self, policy: Policy, stood_in: tuple[bytes, str] | None) -> int | None:
        """:meth:`lane` of a policy, where :meth:`stood_in_for` says that."""
        if policy.sovereignty is not Sovereignty.GLOBAL or policy.federation_shards is not None:
            return None
        named = self.zone in policy.federation_targets
        if not named and (stood_in is None or stood_in[1] not in policy.federation_targets):
            return None
        return policy.federation_priority

    def stood_in_for(self, state: Reader | Overlay) -> tuple[bytes, str] | None:
        """Id of the zone and name of this one, if this one took its place; else None."""
        known, answer = self._stood_in
        if (found := list(state.scan(ZONE, b""))) != known:
            answer = self._stands_in({key: zones.ZoneRow.decode(value) for key, value in found})
            self._stood_in = found, answer
        return answer

    def _stands_in(self, found: Mapping[bytes, zones.ZoneRow]) -> tuple[bytes, str] | None:
        own = next((row.name for row in found.values() if row.role == zones.OWN), None)
        for number, row in found.items():
            if row.name == self.zone and row.role == zones.PEER and own is not None:
                heir = found.get(row.heir)
                if row.taken or (heir is not None and heir.taken):
                    return number, own
        return None

    def sealed(self, state: Reader | Overlay, number: int) -> bool:
        """Whether the zone is to hold content of that policy without being able to read it."""
        return self.policy(state, number).federation_sealed


def moved(policy: Policy, home: str, zone: str) -> Policy:
    """The policy of a capsule whose home goes to another zone: the one that was its home becomes a target instead.

    Everything else stays: who was allowed to hold the capsule is, and nobody else.  One that names it already stays as
    a whole: it names both, or speaks of the time before the home took that zone's place.
    """
    if home in policy.federation_targets:
        return policy
    targets = tuple(home if name == zone else name for name in policy.federation_targets)
    candidates = tuple(name for name in policy.federation_candidates if name not in (home, zone))
    return attrs.evolve(policy, federation_targets=targets, federation_candidates=candidates)


def _understood(document: bytes) -> Policy:
    try:
        found = msgpack.unpackb(document)
        return Policy.from_document(found)
    except UsageError:
        return DEFAULT_POLICY
    except Exception:  # noqa: BLE001 - msgpack raises a dozen classes for what is not msgpack
        return DEFAULT_POLICY
