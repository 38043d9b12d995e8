"""Referrals to other zones: clients that come to ``/zones/NAME`` are sent to the server of that zone.

Nobody but who starts the view knows where another zone serves NFS, so it is said there; that there is such a server,
and what it serves, is not looked at.  A referral holds as long as the zone is known and is the home of its capsules:
once this store has taken its place, what is in the directory is what is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from space._errors import NotFoundError, UsageError
from space.events.ids import ROOT, ZONES, CapsuleId, zone_root
from space.projections.nfs.exports import Export, Exports, Node, export_number
from space.projections.nfs.referrals import Location, Referral
from space.statemachine import zones as rows

if TYPE_CHECKING:
    from space._node.store import Store

_MOMENT: Final = "elsewhere"
"""In place of a moment: tells the file system that is elsewhere from the directory's own."""


def add_referrals(
    store: Store, exports: Sequence[Export], offered: Exports, referrals: Sequence[tuple[str, Location]]
) -> None:
    """Has clients of ``exports`` sent to other zones' servers: names of zones, and where each serves.

    Raises:
        NotFoundError: there is no such zone.
        UsageError: its directory is in none of the exports.
    """
    with store._read() as txn:
        known = {row.name: zone for zone, row in rows.zones(txn).items() if row.role == rows.PEER}
    for name, location in referrals:
        zone = known.get(name)
        if zone is None:
            raise NotFoundError(f"no zone {name}", hint="space zone ls shows those that were added")
        ways = {ROOT: (b"zones", name.encode()), ZONES: (name.encode(),)}
        found = [each for each in exports if each.files.root in ways]
        if not found:
            raise UsageError(f"/zones/{name} is in nothing that is served", hint="serve / or /zones")
        number = export_number(store.id, zone_root(zone), _MOMENT)
        for export in found:
            place = export.path + ways[export.files.root]
            referral = Referral(location, place, _Home(store, zone))
            offered.refer(Node(export, CapsuleId(zone_root(zone))), number, referral)


class _Home:
    """Whether what came from a zone still has its home there."""

    def __init__(self, store: Store, zone: bytes) -> None:
        self._store = store
        self._zone = zone

    def __call__(self) -> bool:
        with self._store._read() as txn:
            row = rows.zone_row(txn, self._zone)
        return row is not None and row.role == rows.PEER and row.promoted <= row.parted
