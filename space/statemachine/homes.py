"""Deciding about zones, and what may not be done here because its home is elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from space._errors import Status
from space.events import commands as cmd
from space.events import types as ev
from space.events.codec import EVENTS_MAX, NO_LINK, chain_link, encode_event
from space.events.ids import BRANCHES, ID_BYTES, NIL, ROOT, ZONE_NAME, ZONES, zone_capsules, zone_root
from space.events.registry import DOCUMENT_BYTES_MAX, U32_MAX, U63_MAX
from space.statemachine import zones
from space.statemachine.apply import Context, apply, tree_nodes
from space.statemachine.decision import Decision, PayloadPlacer, Rejected, Rules, capsule_text
from space.statemachine.shipments import TRIED, names_of, touched
from space.statemachine.tables import (
    CAPSULE,
    ENTRY,
    FEDERATED,
    HOME,
    HOME_LOST,
    MOVED,
    CapsuleRow,
    EntryRow,
    Overlay,
    Reader,
)
from space.statemachine.zones import ZoneRow

ZONES_MAX: Final = 256
"""Zones a store knows: all are looked at to find one by its role."""

LANE_MAX: Final = 100
"""Highest lane: a lane is a priority of a policy."""

BRANCH_COMMANDS_MAX: Final = 1 << 16
"""Commands that set aside what a home had not shipped: they are one entry of one batch, as are their events."""

_TREE: Final = (cmd.CreateCapsule, cmd.Link, cmd.Clone, cmd.Undelete)
_CONTENT: Final = (
    cmd.WriteExtent,
    cmd.CopyRange,
    cmd.Deallocate,
    cmd.Resize,
    cmd.SetAttributes,
    cmd.SetXattr,
    cmd.RemoveXattr,
    cmd.SetPolicy,
)
_RESERVING: Final = (cmd.RegisterReservation, cmd.AcquireReservation, cmd.ReleaseReservation)
_REMOVING: Final = (cmd.Unlink, cmd.DeleteCapsule)
_CHANGING: Final = frozenset({*_TREE, *_CONTENT, *_RESERVING, *_REMOVING, cmd.Rename})
_BRANCHING: Final = frozenset({*_TREE, *_CONTENT, *_REMOVING, cmd.Rename})


def elsewhere(state: Overlay, command: Any) -> Rejected | None:
    """Why a command cannot be carried out here: it would change a replica, or make names where only shipments do."""
    root = state.capsule(ROOT)
    if root is None or not root.flags & FEDERATED:
        return None
    if isinstance(command, cmd.TakeSnapshot | cmd.DropSnapshot):
        return _name_of_another(state, command.snapshot)
    if type(command) not in _CHANGING:
        return None
    for parent, name in _names_made(command):
        if (parent == ROOT and name == b"zones") or parent in (ZONES, BRANCHES):
            return Rejected(Status.NOT_PERMITTED, "in /zones only what other zones ship has names")
    for capsule in touched(state, command):
        if refused := _not_here(state, capsule, command):
            return refused
    if isinstance(command, cmd.Unlink) and command.recursive and root.flags & (HOME_LOST | MOVED):
        return _not_here_inside(state, command)
    return None


def _name_of_another(state: Overlay, snapshot: str) -> Rejected | None:
    """Snapshots that begin with a zone's name and a colon are those that zone ships."""
    name, colon, _ = snapshot.partition(":")
    if colon and any(zone.name == name and zone.role == zones.PEER for zone in zones.zones(state).values()):
        return Rejected(Status.NOT_PERMITTED, f"snapshots called {name}:… are those of zone {name}")
    return None


def _names_made(command: Any) -> list[tuple[bytes, bytes]]:
    if isinstance(command, _TREE):
        return [(command.parent, command.name)]
    if isinstance(command, cmd.Rename):
        back = [(command.parent, command.name)] if command.exchange else []
        return [(command.new_parent, command.new_name), *back]
    return []


def _not_here(state: Overlay, capsule: bytes, command: Any) -> Rejected | None:
    row = state.capsule(capsule)
    if row is None:
        return None
    removing = isinstance(command, _REMOVING)
    if capsule in (ZONES, BRANCHES):
        taken_out = isinstance(command, cmd.Unlink) and command.parent == capsule
        if taken_out and (capsule == BRANCHES or _of_removed(state, command)):
            return None
        return Rejected(Status.READ_ONLY, "/zones belongs to the zones whose replicas are in it")
    home = zones.home_of(state, capsule, row)
    if home is None:
        return None
    zone = zones.zone_row(state, home)
    if zone is None or (removing and zone.role == zones.REMOVED):
        return None
    return Rejected(Status.READ_ONLY, f"capsule {capsule_text(capsule)} is a replica: its home is {zone}")


def _of_removed(state: Overlay, command: cmd.Unlink) -> bool:
    """Whether what is to be unlinked in /zones belongs to a zone that was removed."""
    data = state.get(ENTRY, command.parent + command.name)
    capsule = None if data is None else EntryRow.decode(data).capsule
    home = None if capsule is None else zones.home_row(state, capsule)
    zone = None if home is None else zones.zone_row(state, home.zone)
    return zone is not None and zone.role == zones.REMOVED


def _not_here_inside(state: Overlay, command: cmd.Unlink) -> Rejected | None:
    """What a whole tree would take with it, where replicas stay among what was always here."""
    data = state.get(ENTRY, command.parent + command.name)
    if data is None:
        return None
    for node in tree_nodes(state, EntryRow.decode(data).capsule):
        if refused := _not_here(state, node.capsule, command):
            return refused
    return None


# --- zones -----------------------------------------------------------------------------------------


def _unfit(command: cmd.DefineZone | cmd.AddZone) -> Rejected | None:
    if len(command.zone) != ID_BYTES or command.zone == NIL:
        return Rejected(Status.INVALID, f"not the id of a zone: {capsule_text(command.zone)}")
    if not ZONE_NAME.fullmatch(command.name):
        message = f"not the name of a zone: {command.name[:255]!r} (a-z, 0-9, '.', '_' and '-', at most 63)"
        return Rejected(Status.BAD_NAME, message)
    return _unfit_properties(command)


def _unfit_properties(command: cmd.DefineZone | cmd.AddZone | cmd.ChangeZone) -> Rejected | None:
    if len(command.sealing) != ev.SEALING_KEY_BYTES:
        return Rejected(Status.INVALID, f"not a sealing key of {ev.SEALING_KEY_BYTES} bytes")
    if len(command.url) > ev.URL_CHARACTERS_MAX or len(command.authorities) > DOCUMENT_BYTES_MAX:
        return Rejected(Status.TOO_LARGE, "a zone's address or certificates are too long")
    return None


def _name_of_zones_taken(state: Overlay) -> Rejected | None:
    data = state.get(ENTRY, bytes(ROOT) + b"zones")
    if data is None or EntryRow.decode(data).capsule == ZONES:
        return None
    return Rejected(
        Status.EXISTS, "/zones is where replicas of other zones are: give what is there another name"
    )


def define(state: Overlay, command: cmd.DefineZone, payload: PayloadPlacer) -> Decision:
    """The zone of this store: once, and for ever."""
    if refused := _unfit(command) or _name_of_zones_taken(state):
        return refused
    for number, zone in zones.zones(state).items():
        if zone.role == zones.OWN:
            if (number, zone.name) == (command.zone, command.name):
                return []
            return Rejected(Status.EXISTS, f"this store belongs to {zone}")
        if number == command.zone or zone.name == command.name:
            return Rejected(Status.EXISTS, f"that is {zone}")
    return [ev.ZoneDefined(bytes(ROOT), bytes(command.zone), command.name, *_properties(command))]


def add(state: Overlay, command: cmd.AddZone, payload: PayloadPlacer) -> Decision:
    """Another zone, or one that was removed."""
    if refused := _unfit(command) or _name_of_zones_taken(state):
        return refused
    known = zones.zones(state)
    if not any(zone.role == zones.OWN for zone in known.values()):
        return Rejected(Status.NOT_FOUND, "this store belongs to no zone yet: run space zone init")
    before = known.get(command.zone)
    others = [zone for number, zone in known.items() if number != command.zone and zone.name == command.name]
    if others or (before is not None and (before.role != zones.REMOVED or before.name != command.name)):
        return Rejected(Status.EXISTS, f"that is {others[0] if others else before} already")
    if before is None and len(known) >= ZONES_MAX:
        return Rejected(Status.NO_SPACE, f"a store knows at most {ZONES_MAX} zones")
    return [ev.ZoneAdded(bytes(ROOT), bytes(command.zone), command.name, *_properties(command))]


def _properties(command: cmd.DefineZone | cmd.AddZone | cmd.ChangeZone) -> tuple[int, str, bytes, bytes]:
    return int(command.kind), command.url, bytes(command.authorities), bytes(command.sealing)


def change(state: Overlay, command: cmd.ChangeZone, payload: PayloadPlacer) -> Decision:
    """Another address, other certificates or another sealing key."""
    zone = zones.zone_row(state, command.zone)
    if zone is None or zone.role == zones.REMOVED:
        return _no_zone(command.zone)
    if refused := _unfit_properties(command):
        return refused
    properties = _properties(command)
    if properties == (zone.kind, zone.url, zone.authorities, zone.sealing):
        return []
    return [ev.ZoneChanged(bytes(ROOT), bytes(command.zone), *properties)]


def remove(state: Overlay, command: cmd.RemoveZone, payload: PayloadPlacer) -> Decision:
    """The end of shipping; replicas stay."""
    if _peer(state, command.zone) is None:
        return _no_zone(command.zone)
    return [ev.ZoneRemoved(bytes(ROOT), bytes(command.zone))]


def _peer(state: Overlay, zone: bytes) -> ZoneRow | None:
    row = zones.zone_row(state, zone)
    return row if row is not None and row.role == zones.PEER else None


def _no_zone(zone: bytes) -> Rejected:
    return Rejected(Status.NOT_FOUND, f"no such zone: {capsule_text(zone)}")


# --- the home's own record ---------------------------------------------------------------------------


def _out_of_range(command: cmd.RecordShipment | cmd.RecordRpo, *positions: int) -> bool:
    lane = 0 <= command.shard <= U32_MAX and 0 <= command.lane <= LANE_MAX
    return not lane or not all(0 <= each <= U63_MAX for each in positions)


def record_shipment(state: Overlay, command: cmd.RecordShipment, payload: PayloadPlacer) -> Decision:
    """What goes to a zone."""
    if _peer(state, command.zone) is None:
        return _no_zone(command.zone)
    sent = list(command.capsules)
    positions = (command.from_position, command.through_position, *(position for _, position in sent))
    ids = [*(capsule for capsule, _ in sent), *command.withdrawn]
    if _out_of_range(command, *positions) or any(len(each) != ID_BYTES for each in ids):
        return Rejected(Status.INVALID, "not a shipment: a position, a lane or an id is out of its range")
    return [
        ev.ShipmentSent(
            bytes(ROOT),
            bytes(command.zone),
            command.shard,
            command.lane,
            command.from_position,
            command.through_position,
            command.step,
            b"".join(ev.SHIPPED.pack(capsule, position) for capsule, position in sent),
            command.sent_bytes,
            b"".join(command.withdrawn),
        )
    ]


def record_refusal(state: Overlay, command: cmd.RecordRefusal, payload: PayloadPlacer) -> Decision:
    """What a policy forbade; of a capsule that is not there, in the chain of the root directory."""
    known = state.capsule(command.capsule) is not None
    capsule = bytes(command.capsule) if known else bytes(ROOT)
    reason = command.reason[: ev.REFUSAL_BYTES_MAX]
    return [ev.PolicyRefused(capsule, command.action[:32], command.target[:255], reason)]


def record_action(state: Overlay, command: cmd.RecordAction, payload: PayloadPlacer) -> Decision:
    """What is done because a policy asks for it."""
    if state.capsule(command.capsule) is None:
        return Rejected(Status.NOT_FOUND, f"no capsule {capsule_text(command.capsule)}")
    argument, reason = command.argument[: ev.ARGUMENT_CHARACTERS_MAX], command.reason[: ev.REFUSAL_BYTES_MAX]
    return [ev.ActionTaken(bytes(command.capsule), command.action[:32], argument, reason)]


def record_rpo(state: Overlay, command: cmd.RecordRpo, payload: PayloadPlacer) -> Decision:
    """A promise broken, or kept again."""
    if _peer(state, command.zone) is None:
        return _no_zone(command.zone)
    if _out_of_range(command, command.position, command.lag_ns):
        return Rejected(Status.INVALID, "not a lag: a position, a lane or a time is out of its range")
    kind = ev.RpoKept if command.kept else ev.RpoBroken
    stream = (bytes(command.zone), command.shard, command.lane)
    return [kind(bytes(ROOT), *stream, command.position, command.lag_ns)]


def set_arrival_policy(
    state: Overlay, command: cmd.SetArrivalPolicy, payload: PayloadPlacer, rules: Rules
) -> Decision:
    """How content that other zones ship is encoded: the policy of /zones, and its data key."""
    if zones.own_zone(state) is None:
        return Rejected(Status.NOT_FOUND, "this store belongs to no zone yet: run space zone init")
    tried = Overlay(state)
    events = _made(tried, payload, rules, bytes(ZONES), bytes(ROOT), b"zones")
    decided = rules[cmd.SetPolicy](tried, cmd.SetPolicy(bytes(ZONES), command.policy, command.key), payload)
    return decided if isinstance(decided, Rejected) else [*events, *decided]


# --- promotion ---------------------------------------------------------------------------------------


def promote(state: Overlay, command: cmd.PromoteZone, payload: PayloadPlacer) -> Decision:
    """The store becomes the home of what came from a zone, as far as it has come."""
    zone = _peer(state, command.zone)
    if zone is None:
        return _no_zone(command.zone)
    if zone.taken and not command.again:
        return Rejected(
            Status.EXISTS, f"what came from {zone} has its home here already, since epoch {zone.epoch}"
        )
    if zone.epoch >= U32_MAX:
        return Rejected(Status.NO_SPACE, f"{zone} was promoted over too often")
    cursors = [
        (shard, lane, row.position, row.step) for shard, lane, row in zones.cursors(state, command.zone)
    ]
    if command.cursors is not None and [tuple(each) for each in command.cursors] != cursors:
        return Rejected(Status.STALE, f"more has come from {zone} meanwhile: look again")
    purged = _incomplete(state, command)
    if isinstance(purged, Rejected):
        return purged
    packed = b"".join(ev.CURSOR.pack(*each[:3]) for each in cursors)
    return [*purged, ev.ZonePromoted(bytes(ROOT), bytes(command.zone), zone.epoch + 1, packed)]


def _incomplete(state: Overlay, command: cmd.PromoteZone) -> list[ev.Event] | Rejected:
    """Purges replicas of which a copy is under way."""
    events: list[ev.Event] = []
    for capsule in command.incomplete:
        row, home = state.capsule(capsule), zones.home_row(state, capsule)
        if row is None or home is None or home.zone != command.zone or not home.copy:
            return Rejected(Status.STALE, f"capsule {capsule_text(capsule)} is no half of a copy: look again")
        events += [ev.NameUnlinked(bytes(capsule), *name) for name in names_of(state, capsule, row)]
    if command.incomplete:
        events.append(ev.CapsulesPurged(bytes(ROOT), b"".join(command.incomplete)))
    return events


def lose(state: Overlay, command: cmd.LoseHome, payload: PayloadPlacer, rules: Rules) -> Decision:
    """The store follows a zone that took its place; what it had not shipped is set aside first."""
    zone, own = _peer(state, command.zone), zones.own_zone(state)
    if zone is None or own is None:
        return _no_zone(command.zone)
    if command.epoch == zone.epoch and zone.lost:
        return []
    if not zone.epoch < command.epoch <= U32_MAX:
        return Rejected(
            Status.STALE, f"{zone} was promoted in epoch {command.epoch}; here it is {zone.epoch}"
        )
    if not 0 <= command.position <= U63_MAX or len(command.commands) > BRANCH_COMMANDS_MAX:
        return Rejected(Status.INVALID, "not where a zone was promoted, or too much to set aside")
    if command.seen is not None and (changed := _changed_since(state, command.zone, zone, command.seen)):
        return Rejected(Status.STALE, f"capsule {capsule_text(changed)} changed meanwhile: look again")
    tried = Overlay(state)
    events, happen = _happening(
        tried, links=any(isinstance(each, cmd.CopyRange) for each in command.commands)
    )
    happen(*_directories(tried, payload, rules))
    for capsule in dict.fromkeys(command.given):  # given to that zone, which has not all there was
        row = tried.capsule(capsule)
        if row is None or zones.home_of(tried, capsule, row) != command.zone:
            return Rejected(Status.STALE, f"capsule {capsule_text(capsule)} is not that zone's: look again")
        happen(ev.CapsuleHomed(bytes(capsule), own[0], 0, 0, 0, None, None, None, None))
    for each in command.commands:
        if type(each) not in _BRANCHING:
            return Rejected(Status.INVALID, f"{type(each).__name__} sets nothing aside")
        refused = None if getattr(each, "parent", None) == BRANCHES else elsewhere(tried, each)
        decided = refused or rules[type(each)](tried, each, payload)
        if isinstance(decided, Rejected):
            return decided
        happen(*decided)
    cursors = b"".join(ev.CURSOR.pack(*each) for each in command.cursors)
    happen(ev.HomeLost(bytes(ROOT), bytes(command.zone), command.epoch, command.position, cursors))
    for capsule in command.kept:
        if tried.capsule(capsule) is None:
            return Rejected(Status.NOT_FOUND, f"no capsule {capsule_text(capsule)}")
        happen(ev.CapsuleHomed(bytes(capsule), own[0], 0, 0, 0, None, None, None, None))
    for capsule, times in command.times:
        row = tried.capsule(capsule)
        theirs = row is not None and zones.home_of(tried, capsule, row) == command.zone
        if not theirs and capsule not in command.given:
            return Rejected(Status.INVALID, f"capsule {capsule_text(capsule)} goes to no other home")
        position = max(command.position, _came(state, command.zone, capsule))
        happen(ev.CapsuleHomed(bytes(capsule), bytes(command.zone), position, 0, 0, *times))
    if len(events) > EVENTS_MAX:
        return Rejected(Status.TOO_LARGE, f"{len(events)} events to set aside what was not shipped")
    return events


def _came(state: Overlay, zone: bytes, capsule: bytes) -> int:
    """The position of a zone's log at which the home of a capsule was last taken from there; 0 if it never was."""
    home = zones.home_row(state, capsule)
    return home.came if home is not None and home.zone == zone else 0


def _happening(tried: Overlay, *, links: bool = False) -> tuple[list[ev.Event], Callable[..., None]]:
    """Events that are decided one on what the others do, and what takes one more of them."""
    events: list[ev.Event] = []
    context = Context(TRIED, 0, 0)

    def happen(*some: ev.Event) -> None:
        for event in some:
            link = NO_LINK
            if links:  # RangeCopied carries the head of its source's chain
                row = tried.capsule(event.capsule)
                link = chain_link(row.link if row else NO_LINK, encode_event(event))
            apply(tried, context, link, event)
        events.extend(some)

    return events, happen


def follow_heir(state: Overlay, command: cmd.FollowHeir, payload: PayloadPlacer, rules: Rules) -> Decision:
    """Replicas of a zone follow another one, which took its place; what that one does not have is set aside first."""
    zone, heir, own = _peer(state, command.zone), _peer(state, command.heir), zones.own_zone(state)
    if zone is None or heir is None or own is None:
        return _no_zone(command.heir if zone is not None else command.zone)
    if zone.taken:
        return Rejected(Status.EXISTS, f"this zone took the place of {zone} itself")
    if (zone.heir, zone.heir_epoch) == (command.heir, command.epoch) and not command.same:
        return []
    if not (0 < command.epoch <= U32_MAX and 0 < command.position <= U63_MAX):
        return Rejected(Status.INVALID, "not where a zone was promoted")
    for capsule in (*zones.replicas(state, command.zone), *command.gone):
        row = state.capsule(capsule)
        if row is not None and row.change > command.seen:
            return Rejected(Status.STALE, f"capsule {capsule_text(capsule)} changed meanwhile: look again")
    tried = Overlay(state)
    events, happen = _happening(tried)

    def homed(capsule: bytes, *times: int | None) -> None:
        position = command.position - 1
        happen(ev.CapsuleHomed(bytes(capsule), bytes(command.heir), position, 0, 0, *(times or (None,) * 4)))

    happen(*_directories(tried, payload, rules))
    left_over = frozenset(_left_over(tried, command) if heir.heir == command.zone else ())
    for capsule in (*command.same, *command.waiting, *command.gone):
        row = tried.capsule(capsule)
        theirs = row is not None and zones.home_of(tried, capsule, row) == command.zone
        if not theirs and capsule not in left_over:
            return Rejected(Status.STALE, f"capsule {capsule_text(capsule)} is not that zone's: look again")
    for each in command.commands:
        if type(each) not in _BRANCHING:
            return Rejected(Status.INVALID, f"{type(each).__name__} sets nothing aside")
        decided = rules[type(each)](tried, each, payload)
        if isinstance(decided, Rejected):
            return decided
        happen(*decided)
    withdrawn = _withdrawn(tried, command.gone, bytes(command.zone))
    root, apart = bytes(zone_root(command.zone)), bytes(zone_capsules(command.zone))
    if tried.capsule(apart) is None and any(isinstance(each, ev.CapsuleRenamed) for each in withdrawn):
        places = (root, bytes(ZONES), zone.name.encode()), (apart, root, b".capsules")
        happen(*_directories(tried, payload, rules, places))
        homed(root)
        homed(apart)
    happen(*withdrawn)
    for capsule in command.same:
        homed(capsule)
    happen(*_waiting(tried, command, zone))
    for capsule, times in command.times:
        row = tried.capsule(capsule)
        if row is None or zones.home_of(tried, capsule, row) != command.heir:
            return Rejected(Status.INVALID, f"capsule {capsule_text(capsule)} goes to no other home")
        homed(capsule, *times)
    if command.done:
        happen(
            ev.HeirFollowed(
                bytes(ROOT), bytes(command.zone), bytes(command.heir), command.epoch, command.position
            )
        )
    if len(events) > EVENTS_MAX:
        return Rejected(Status.TOO_LARGE, f"{len(events)} events to follow another zone")
    return events


def _left_over(state: Overlay, command: cmd.FollowHeir) -> Iterator[bytes]:
    """What is gone and still the heir's, from before the zone took that one's place."""
    for capsule in command.gone:
        row = state.capsule(capsule)
        theirs = row is not None and zones.home_of(state, capsule, row) == command.heir
        if theirs and zones.waits(state, command.heir, capsule):
            yield capsule


def _waiting(state: Overlay, command: cmd.FollowHeir, known: ZoneRow) -> Iterator[ev.CapsuleHomed]:
    """Says of replicas that they wait for the heir's.

    Not of what is half of a copy, which nobody sees, or moved by itself, which third zones do not have.
    """
    zone, epoch = bytes(command.zone), command.epoch
    for capsule in command.waiting:
        home = zones.home_row(state, capsule)
        if home is None or not (home.copy or home.moved):
            position = home.position if home is not None and home.zone == zone else known.base
            yield ev.CapsuleHomed(bytes(capsule), zone, position, 0, epoch, None, None, None, None)


def _withdrawn(state: Overlay, gone: Sequence[bytes], zone: bytes) -> list[ev.Event]:
    """Deletes replicas that their home has no more; what is in them, and still there, hangs apart."""
    events: list[ev.Event] = []
    apart, lost = bytes(zone_capsules(zone)), frozenset(gone)
    for key, value in state.scan(ENTRY, b"") if lost else ():
        parent, name, child = key[:ID_BYTES], key[ID_BYTES:], EntryRow.decode(value).capsule
        text = capsule_text(child).encode()
        if child in lost or (parent in lost and state.get(ENTRY, apart + text) is not None):
            events.append(ev.NameUnlinked(child, parent, name))
        elif parent in lost:
            events.append(ev.CapsuleRenamed(child, parent, name, apart, text, b""))
    return [*events, *(ev.CapsuleWithdrawn(bytes(capsule), zone, 0) for capsule in gone)]


def shared(state: Reader | Overlay, zone: bytes, row: ZoneRow) -> Iterator[bytes]:
    """Capsules of this store that a zone has too: those it was sent, and those that were taken over from it.

    Among them those whose home one of the two gave to the other.
    """
    seen = set()
    for capsule, _ in zones.sent_capsules(state, zone):
        seen.add(capsule)
        yield capsule
    root = state.get(CAPSULE, bytes(ROOT))
    if not row.taken and (root is None or not CapsuleRow.decode(root).flags & MOVED):
        return
    for capsule, value in state.scan(HOME, b""):
        home = zones.HomeRow.decode(value)
        if capsule not in seen and home.zone == zone:
            data = state.get(CAPSULE, capsule)
            if data is not None and (home.moved or CapsuleRow.decode(data).ino <= row.taken):
                yield capsule


def _changed_since(state: Overlay, zone: bytes, row: ZoneRow, position: int) -> bytes | None:
    for capsule in (bytes(ROOT), *shared(state, zone, row)):
        found = state.capsule(capsule)
        if found is not None and found.change > position:
            return capsule
    return None


_ALL_ZONES: Final = ((bytes(ZONES), bytes(ROOT), b"zones"), (bytes(BRANCHES), bytes(ZONES), b".branches"))
"""/zones and /zones/.branches, each with the directory it is in, and its name there."""


def _directories(
    state: Overlay,
    payload: PayloadPlacer,
    rules: Rules,
    wanted: Iterable[tuple[bytes, bytes, bytes]] = _ALL_ZONES,
) -> list[ev.Event]:
    """Makes directories, the first time."""
    events: list[ev.Event] = []
    tried = Overlay(state)
    for capsule, parent, name in wanted:
        events += _made(tried, payload, rules, capsule, parent, name)
    return events


def _made(
    tried: Overlay, payload: PayloadPlacer, rules: Rules, capsule: bytes, parent: bytes, name: bytes
) -> list[ev.Event]:
    """Makes a directory that is not there yet."""
    if tried.capsule(capsule) is not None:
        return []
    create = cmd.CreateCapsule(capsule, ev.Kind.DIRECTORY, 0o755, parent=parent, name=name, policy=b"")
    made = rules[cmd.CreateCapsule](tried, create, payload)
    assert not isinstance(made, Rejected)
    for event in made:
        apply(tried, Context(TRIED, 0, 0), bytes(ID_BYTES), event)
    return list(made)
