"""Sovereignty, proved from the log alone: was each capsule allowed where it was sent, as it was when it was sent?

The home's log says what went where (:class:`space.events.types.ShipmentSent`; for shards of a code the
:class:`~space.events.types.ActionTaken` that makes them), before the receiver's answer counts.  An
:class:`Audit` reads the log once, in order, beside the state it folds to, and remembers of each capsule from when on it
had which policy, for as long as a shipment may refer to it.  It is offline: no key, no content, no other zone.

It remembers some 200 bytes for each change of a policy, and for each capsule that could be shipped and was purged; and
which zones' places this one had taken when.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, final

import attrs

from space.events import types as ev
from space.events.ids import ID_BYTES
from space.federation.selection import Selection
from space.policy.model import DEFAULT_POLICY
from space.statemachine import zones
from space.statemachine.decision import capsule_text
from space.statemachine.tables import Overlay, Reader

FINDINGS_MAX: Final = 1000
"""Findings that are kept: one is reason enough."""

_PLACES: Final = (ev.ZonePromoted, ev.HomeLost, ev.HeirFollowed)
"""After these a policy that names this zone may speak of another one, or not any more."""


@attrs.frozen
class Finding:
    """A capsule that was sent where it may not have been.

    Attributes:
        position: where the log says that it was sent.
        capsule: its id.
        zone: name of the zone.
        sent_as_of: the position as of which it was sent.
        reason: why that was not allowed.
    """

    position: int
    capsule: bytes
    zone: str
    sent_as_of: int
    reason: str

    def __str__(self) -> str:
        return (
            f"position {self.position}: capsule {capsule_text(self.capsule)} was sent to zone {self.zone} "
            f"as of position {self.sent_as_of}: {self.reason}"
        )


@final
class Audit:
    """Reads a log from its beginning, batch after batch.

    Attributes:
        findings: what was sent and not allowed.
        shipments, capsules: how many shipments and capsules in them were looked at.
        missed: findings beyond the first :data:`FINDINGS_MAX`.
    """

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.shipments = 0
        self.capsules = 0
        self.missed = 0
        self._selections: dict[str, Selection] = {}
        self._any = Selection("")
        self._before: dict[
            bytes, list[tuple[int, int]]
        ] = {}  # capsule → (position up to which, policy), in order
        self._stood_in: dict[
            str, list[tuple[int, tuple[bytes, str] | None]]
        ] = {}  # zone → the same of its place

    def batch(self, before: Reader, position: int, events: Iterable[ev.Event]) -> None:
        """Looks at a batch; ``before`` is the state right before it."""
        state = Overlay(before)
        for event in events:
            if isinstance(event, ev.PolicyChanged):
                self._remember(state, event.capsule, position)
            elif isinstance(event, ev.CapsulesPurged):
                for at in range(0, len(event.purged), ID_BYTES):
                    self._purged(state, event.purged[at : at + ID_BYTES], position)
            elif isinstance(event, _PLACES):
                self._remember_places(state, position)
            elif isinstance(event, ev.ShipmentSent):
                self._sent(state, position, event)
            elif isinstance(event, ev.ActionTaken) and event.action == "ShardEC":
                self._sharded(state, position, event)

    def _remember(self, state: Overlay, capsule: bytes, position: int) -> None:
        """Up to the position before this one, a capsule had the policy it has now."""
        row = state.capsule(capsule)
        if row is not None:
            spans = self._before.setdefault(capsule, [])
            if not spans or spans[-1][0] < position - 1:
                spans.append((position - 1, row.policy))

    def _remember_places(self, state: Overlay, position: int) -> None:
        """Up to the position before this one, this zone stood in for the zones for which it does now."""
        for zone in zones.zones(state).values():
            stood_in = self._selection(zone.name).stood_in_for(state)
            spans = self._stood_in.setdefault(zone.name, [])
            if not spans or spans[-1][0] < position - 1:
                spans.append((position - 1, stood_in))

    def _selection(self, zone: str) -> Selection:
        return self._selections.setdefault(zone, Selection(zone))

    def _purged(self, state: Overlay, capsule: bytes, position: int) -> None:
        """A capsule goes for good.  One that no zone was ever to have need not be remembered: it is not there."""
        row = state.capsule(capsule)
        if row is None:
            return
        shipped = self._any.policy(state, row.policy).federation_targets
        if shipped or capsule in self._before:
            self._remember(state, capsule, position)

    def _sent(self, state: Overlay, position: int, event: ev.ShipmentSent) -> None:
        self.shipments += 1
        zone = zones.zone_row(state, event.zone)
        name = "" if zone is None else zone.name
        selection = self._selection(name)
        for capsule, sent_as_of in ev.SHIPPED.iter_unpack(event.capsules):
            self.capsules += 1
            reason = self._reason(state, selection, capsule, sent_as_of, position)
            self._found(position, capsule, name, sent_as_of, reason)

    def _found(self, position: int, capsule: bytes, zone: str, sent_as_of: int, reason: str) -> None:
        if reason and len(self.findings) < FINDINGS_MAX:
            self.findings.append(Finding(position, capsule, zone, sent_as_of, reason))
        elif reason:
            self.missed += 1

    def _sharded(self, state: Overlay, position: int, event: ev.ActionTaken) -> None:
        """Shards go to the zones the action names, as the capsule is right after it."""
        own = zones.own_zone(state)
        row = state.capsule(event.capsule)
        for name in event.argument.partition(" data ")[0].split():
            if own is not None and name == own[1].name:
                continue
            self.capsules += 1
            selection = self._selection(name)
            policy = DEFAULT_POLICY if row is None else selection.policy(state, row.policy)
            reason = ""
            if policy.federation_shards is None:
                reason = f"its policy said sovereignty {policy.sovereignty.value}, and no shards"
            elif name not in policy.federation_targets:
                reason = f"its policy said shards to {', '.join(policy.federation_targets)}"
            self._found(position, event.capsule, name, position, reason)

    def _reason(
        self, state: Overlay, selection: Selection, capsule: bytes, sent_as_of: int, position: int
    ) -> str:
        """Why a capsule must not have been sent; empty if it may."""
        if not 0 < sent_as_of < position:
            return "that is not before it was sent"
        policy = self._policy(state, capsule, sent_as_of)
        if policy is None:
            return "there was no such capsule"
        allowed = selection.policy(state, policy)
        named = selection.zone in allowed.federation_targets
        stood_in = None if named else self._place(state, selection, sent_as_of)
        if selection.lane_of(allowed, stood_in) is None:
            targets = ", ".join(allowed.federation_targets) or "no zone"
            return f"its policy said sovereignty {allowed.sovereignty.value}, to {targets}"
        return ""

    def _place(self, state: Overlay, selection: Selection, position: int) -> tuple[bytes, str] | None:
        """What :meth:`Selection.stood_in_for` said after a batch."""
        for until, stood_in in self._stood_in.get(selection.zone, ()):
            if position <= until:
                return stood_in
        return selection.stood_in_for(state)

    def _policy(self, state: Overlay, capsule: bytes, position: int) -> int | None:
        """Row number of the policy a capsule had after a batch."""
        for until, policy in self._before.get(capsule, ()):
            if position <= until:
                return policy
        row = state.capsule(capsule)
        return None if row is None else row.policy
