"""Where to read a capsule: :mod:`space.federation.resolve`, told by a store what it holds and how far zones are."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from space._node.federation_zones import Zone, Zones
from space.events.ids import CapsuleId
from space.federation.mesh import ZoneState
from space.federation.resolve import ANSWERS_MAX, Replica, Resolver
from space.federation.sealing import is_for_home
from space.policy.model import Policy
from space.statemachine import zones as rows
from space.statemachine.store import ReadTransaction
from space.statemachine.tables import KEY, U32, CapsuleRow, Overlay

if TYPE_CHECKING:
    from space._node.store import Store

TABLE_NS: Final = 1_000_000_000
"""How long a table of zones is good for: round trips are measured every few seconds."""


class Nearest:
    """See the module's text; ``now`` gives nanoseconds of a clock that never goes back."""

    def __init__(self, store: Store, now: Callable[[], int] = time.monotonic_ns) -> None:
        self._store = store
        self._now = now
        self._names: dict[bytes, str] = {}
        self._resolver = Resolver("")
        self._policies: dict[int, Policy] = {}
        self._good_until = 0

    def replicas(self, capsule: CapsuleId) -> tuple[Replica, ...]:
        """Zones a capsule can be read from, nearest first.

        Raises:
            NotFoundError: there is no such capsule here.
        """
        if self._now() >= self._good_until:
            self._take_table()
        store = self._store
        with store._read() as txn:
            row = store._row(txn, capsule)
            policy = self._policy(txn, row.policy)
            home = rows.home_of(Overlay(txn), capsule, row)
            here = home is None or _readable(txn, capsule, row)
        name = self._resolver.zone if home is None else self._names.get(home, "")
        return self._resolver.rank(name, policy, here=here)

    def _policy(self, txn: ReadTransaction, number: int) -> Policy:
        """The policy of that number, which never changes its meaning."""
        found = self._policies.get(number)
        if found is None:
            if len(self._policies) >= ANSWERS_MAX:
                self._policies.clear()
            found = self._policies[number] = self._store._policy(txn, number)
        return found

    def _take_table(self) -> None:
        zones = Zones(self._store)
        own, others = zones.own(), zones.others()
        running = self._store.federation
        links = {} if running is None else running.distances()
        self._names = {zone.id: zone.name for zone in others}
        table = [_state(zone, links.get(zone.id, {})) for zone in others]
        name = "" if own is None else own.name
        if self._resolver.zone != name:
            self._resolver = Resolver(name, table)
        else:
            self._resolver.update(table)
        self._good_until = self._now() + TABLE_NS


def _state(zone: Zone, link: dict[str, object]) -> ZoneState:
    seconds = link.get("rtt_seconds")
    rtt_ns = int(seconds * 1e9) if isinstance(seconds, float) else None
    return ZoneState(zone.name, zone.kind.name.lower(), bool(link.get("connected", True)), rtt_ns)


def _readable(txn: ReadTransaction, capsule: bytes, row: CapsuleRow) -> bool:
    """Whether a replica is all here, and its key opens here."""
    home = rows.home_row(txn, capsule)
    if home is not None and home.copy:
        return False
    if not row.key:
        return True
    wrapped = txn.get(KEY, U32.pack(row.key) + U32.pack(1))
    return wrapped is not None and not is_for_home(wrapped)
