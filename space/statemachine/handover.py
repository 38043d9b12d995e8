"""Deciding about the home of single capsules: it is given to another zone, taken from one, declined, or taken back.

The home gives (:class:`~space.events.commands.GiveHomes`): from that position of its log on nobody can change the
capsule there, and it counts as the other zone's replica.  What is left is shipped as ever, and the last thing the
stream says of the capsule is that the other zone takes it (:class:`~space.events.commands.TakeHome`), in the lane and
at the position at which it was given: what makes shipments come once and in order makes the home go over once, with
all that had happened to it.  Until then it can be changed nowhere, so there are never two homes.

A zone that has not taken a home may decline it, for good; only then can it be taken back.
"""

from __future__ import annotations

from typing import Final

from space._errors import Status
from space.events import commands as cmd
from space.events import types as ev
from space.events.ids import ROOT
from space.events.registry import U63_MAX
from space.statemachine import zones
from space.statemachine.decision import Decision, PayloadPlacer, Rejected, capsule_text
from space.statemachine.tables import ENTRY, SENT, EntryRow, Overlay

GIVEN_MAX: Final = 1 << 14
"""Capsules whose home is given at once: each is two events of one entry there, as for what joins in a batch."""


def _peer(state: Overlay, zone: bytes) -> Rejected | None:
    row = zones.zone_row(state, zone)
    if row is None or row.role != zones.PEER:
        return Rejected(Status.NOT_FOUND, f"no such zone: {capsule_text(zone)}")
    return None


def give(state: Overlay, command: cmd.GiveHomes, payload: PayloadPlacer) -> Decision:
    """Capsules that only this store and that zone have are the zone's."""
    if refused := _peer(state, command.zone):
        return refused
    if not 0 < len(command.capsules) <= GIVEN_MAX:
        return Rejected(Status.TOO_LARGE, f"the home of 1 to {GIVEN_MAX} capsules can be given at a time")
    given = dict.fromkeys(bytes(each) for each in command.capsules)
    for capsule in given:
        if refused := _cannot_give(state, bytes(command.zone), capsule, given):
            return refused
    return [ev.HomeGiven(capsule, bytes(command.zone)) for capsule in given]


def _cannot_give(state: Overlay, zone: bytes, capsule: bytes, given: dict[bytes, None]) -> Rejected | None:
    """Why the home of a capsule cannot be given to a zone."""
    row = state.capsule(capsule)
    if row is None or row.deleted:
        return Rejected(Status.NOT_FOUND, f"no capsule {capsule_text(capsule)}")
    elsewhere = zones.home_of(state, capsule, row)
    if elsewhere is not None:
        home = zones.zone_row(state, elsewhere)
        return Rejected(Status.READ_ONLY, f"capsule {capsule_text(capsule)} is a replica: its home is {home}")
    if not zones.sent_as_of(state, zone, capsule):
        return Rejected(
            Status.NOT_PERMITTED, f"capsule {capsule_text(capsule)} was never shipped to that zone"
        )
    for number, other in zones.zones(state).items():
        if number != zone and other.role == zones.PEER and state.get(SENT, number + capsule) is not None:
            return Rejected(
                Status.NOT_PERMITTED,
                f"capsule {capsule_text(capsule)} is in {other} as well, which would follow the wrong zone",
            )
    came = zones.home_row(state, capsule)
    if came is not None and came.zone != zone:
        return Rejected(
            Status.NOT_PERMITTED,
            f"capsule {capsule_text(capsule)} came from {zones.zone_row(state, came.zone)}",
        )
    for _, value in state.scan(ENTRY, capsule):
        child = EntryRow.decode(value).capsule
        if child not in given:
            return Rejected(
                Status.STALE,
                f"capsule {capsule_text(child)} is in a directory that moves, and stays: look again",
            )
    return None


def decline(state: Overlay, command: cmd.DeclineHomes, payload: PayloadPlacer) -> Decision:
    """What was not taken by now never is."""
    if refused := _peer(state, command.zone):
        return refused
    if not 0 < command.position <= U63_MAX:
        return Rejected(Status.INVALID, f"not a position: {command.position}")
    row = zones.zone_row(state, command.zone)
    if row is not None and row.declined >= command.position:
        return []
    return [ev.HomesDeclined(bytes(ROOT), bytes(command.zone), command.position)]


def keep(state: Overlay, command: cmd.KeepHomes, payload: PayloadPlacer) -> Decision:
    """What was given up to a position, and declined, is at home here again."""
    own = zones.own_zone(state)
    if own is None:
        return Rejected(Status.NOT_FOUND, "this store belongs to no zone")
    if refused := _peer(state, command.zone):
        return refused
    events: list[ev.Event] = []
    for capsule in dict.fromkeys(bytes(each) for each in command.capsules):
        home, row = zones.home_row(state, capsule), state.capsule(capsule)
        if row is None or home is None or zones.home_of(state, capsule, row) != command.zone:
            return Rejected(Status.STALE, f"capsule {capsule_text(capsule)} is not given away: look again")
        if home.here or not 0 < home.moved <= command.position:
            return Rejected(Status.STALE, f"capsule {capsule_text(capsule)} was given away again: look again")
        # One that came from that zone before is again what it was then: how far each of the two knows of the other's.
        events.append(ev.CapsuleHomed(capsule, own[0], home.came, 0, 0, None, None, None, None))
    return events
