"""Zones, homes and cursors: the rows of federation, how they are folded, and whose a capsule is.

A store belongs to one zone and knows others.  A capsule has its *home* here unless it is a *replica*, which only its
home changes.  What makes a capsule one is never spread over all rows at once:

* HOME has a row for each capsule that came in a shipment.  Its zone counts as the home as long as the capsule was made
  after the zone was last promoted over (``taken``): a promotion is one event, however many replicas there are.
* SENT has a row for each capsule that was shipped to a zone, with the position it was last sent as of.  When that zone
  takes over (``lost``), what had been sent by then has its home there: one event again.
* Where the home of a single capsule was given to another zone, or taken from one, its row in HOME says so, and when
  (``moved``): a promotion counts for it only if it came later.

Flags in capsule rows keep all of this away from stores without zones, and from capsules that are not replicas: deciding
about those looks at no row but the capsule's own and the root's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import attrs
import msgpack

from space._errors import CorruptionError
from space.events import types as ev
from space.events.ids import ID_BYTES, NIL, ROOT, ZONES
from space.statemachine.tables import (
    CAPSULE,
    CURSOR,
    FEDERATED,
    HOME,
    HOME_LOST,
    MARK,
    MOVED,
    ORPHAN,
    REPLICA,
    SENT,
    U32,
    U64,
    ZONE,
    ZONE_KEY,
    CapsuleRow,
    Overlay,
    Reader,
)

if TYPE_CHECKING:
    from space.statemachine.apply import Context

OWN: Final = 0
PEER: Final = 1
REMOVED: Final = 2

MARK_EVERY: Final = 256
"""Positions of this log after which a stream leaves a mark: what looking up a position of a home may have to read."""

_HOME: Final = struct.Struct("<16sQQI")
_MOVED: Final = struct.Struct("<QBQQ")
_CURSOR: Final = struct.Struct("<QIQ")
_STREAM: Final = struct.Struct(">16sII")


@attrs.define
class ZoneRow:
    """A zone.

    ``role`` is OWN, PEER or REMOVED.  ``epoch`` counts promotions of one of the two zones in the other's place.
    Replicas of the zone with inode numbers up to ``taken`` have their home here by now; capsules of this store that
    were sent to the zone up to position ``lost`` (of this log) have it there, as of position ``base`` of that log; so
    have replicas with inode numbers up to ``returned``, which had been taken over before.  ``promoted`` and ``parted``
    are the positions of this log at which this store last took the zone's place, and the zone this store's.  No home
    the zone gave away up to position ``declined`` of its log is taken here any more.  ``heir`` is a third zone that
    took this one's place, in ``heir_epoch`` of those two: what is here as it was there has its home there now, and the
    rest when the heir ships it.
    """

    role: int
    name: str
    kind: int
    url: str
    authorities: bytes
    sealing: bytes
    epoch: int = 0
    taken: int = 0
    lost: int = 0
    base: int = 0
    returned: int = 0
    promoted: int = 0
    parted: int = 0
    declined: int = 0
    heir: bytes = b""
    heir_epoch: int = 0

    def encode(self) -> bytes:
        fields = attrs.astuple(self)
        # What was added later is left out while it says nothing: rows are as they always were.
        if not self.heir:
            fields = fields[: -2 if self.declined else -3]
        packed: bytes = msgpack.packb(fields)
        return packed

    @classmethod
    def decode(cls, data: bytes) -> ZoneRow:
        return cls(*msgpack.unpackb(data))

    def __str__(self) -> str:
        return f"zone {self.name}, {self.url}" if self.url else f"zone {self.name}"


@attrs.frozen
class HomeRow:
    """Whose replica a capsule is, as of which position there, and which part is the next of the copy under way.

    Where none is, ``step`` is not 0 if the zone's heir has it otherwise: it is the epoch in which that one is followed.
    ``moved`` is the position of this log at which the home of this one capsule was given to the zone, or (``here``)
    taken from it; 0 if it was not.  ``came`` is the position of the zone's log at which it was last taken from there,
    and ``since`` the position of this log at which that was.
    """

    zone: bytes
    position: int
    copy: int = 0
    step: int = 0
    moved: int = 0
    here: bool = False
    came: int = 0
    since: int = 0

    def encode(self) -> bytes:
        packed = _HOME.pack(self.zone, self.position, self.copy, self.step)
        return packed + _MOVED.pack(self.moved, self.here, self.came, self.since) if self.moved else packed

    @classmethod
    def decode(cls, data: bytes) -> HomeRow:
        row = cls(*_HOME.unpack_from(data))
        if len(data) == _HOME.size:
            return row
        moved, here, came, since = _MOVED.unpack_from(data, _HOME.size)
        return attrs.evolve(row, moved=moved, here=bool(here), came=came, since=since)


@attrs.frozen
class CursorRow:
    """How far a stream of a zone has come: position, parts of copies beyond it, the home's note.

    ``marked`` is the position of this log at which the stream last left a mark.
    """

    position: int = 0
    step: int = 0
    marked: int = 0
    resume: bytes = b""

    def encode(self) -> bytes:
        return _CURSOR.pack(self.position, self.step, self.marked) + self.resume

    @classmethod
    def decode(cls, data: bytes) -> CursorRow:
        position, step, marked = _CURSOR.unpack_from(data)
        return cls(position, step, marked, data[_CURSOR.size :])


def zones(state: Reader | Overlay) -> dict[bytes, ZoneRow]:
    """Every zone by its id, removed ones included; a few at most."""
    return {key: ZoneRow.decode(value) for key, value in state.scan(ZONE, b"")}


def zone_row(state: Reader | Overlay, zone: bytes) -> ZoneRow | None:
    """The zone with that id."""
    data = state.get(ZONE, zone)
    return None if data is None else ZoneRow.decode(data)


def own_zone(state: Reader | Overlay) -> tuple[bytes, ZoneRow] | None:
    """Id and row of the zone this store belongs to, if it belongs to one."""
    return next(((key, row) for key, row in zones(state).items() if row.role == OWN), None)


def home_row(state: Reader | Overlay, capsule: bytes) -> HomeRow | None:
    """What is kept of a capsule that came in a shipment, whoever is its home by now."""
    data = state.get(HOME, capsule)
    return None if data is None else HomeRow.decode(data)


def home_of(state: Overlay, capsule: bytes, row: CapsuleRow) -> bytes | None:
    """Id of the zone a capsule is a replica of; None if its home is here."""
    if row.flags & REPLICA:
        home = home_row(state, capsule)
        zone = None if home is None else zone_row(state, home.zone)
        if home is None or zone is None:
            raise CorruptionError("a replica without its home", hint="run: space replay")
        if home.here:
            return _lost_to(state, capsule, home)
        taken = zone.taken and zone.promoted > home.moved if home.moved else row.ino <= zone.taken
        return _lost_on(state, capsule, zone.promoted) if taken else home.zone
    return _lost_on(state, capsule)


def _lost_on(state: Overlay, capsule: bytes, since: int = 0) -> bytes | None:
    """The zone that took this store's place for a capsule that was at home here, ``since`` it was taken over."""
    root = state.capsule(ROOT)
    if root is None or not root.flags & HOME_LOST:
        return None
    return _lost_to(state, capsule, None, since)


def _lost_to(state: Overlay, capsule: bytes, taken: HomeRow | None, since: int = 0) -> bytes | None:
    """The zone that took this store's place for a capsule that was at home here (if it was ``taken``: since then).

    What was sent as of the very position at which that was learnt, was sent after it, and is this store's.
    """
    for number, zone in zones(state).items():
        if zone.lost <= (since if taken is None else taken.moved):
            continue
        if (taken is not None and taken.zone == number) or 0 < sent_as_of(state, number, capsule) < zone.lost:
            return number
    return None


def sent_as_of(state: Reader | Overlay, zone: bytes, capsule: bytes) -> int:
    """The position a capsule was last sent to a zone as of; 0 if it was not, or the zone was told to delete it.

    Of one whose home was taken from the zone: where that was, unless it was sent since.
    """
    data = state.get(SENT, zone + capsule)
    return 0 if data is None else int(U64.unpack(data)[0])


def arrival_key(state: Reader) -> int:
    """Number of the data key that content of other zones is encrypted with here; 0 if it stays as it comes."""
    data = state.get(CAPSULE, bytes(ZONES))
    return 0 if data is None else CapsuleRow.decode(data).key


def heirs(state: Reader | Overlay, zone: bytes) -> list[tuple[bytes, ZoneRow]]:
    """The zones whose place a third zone took, as far as this store followed it."""
    return [(number, row) for number, row in zones(state).items() if row.heir == zone]


def known_of(state: Overlay, zone: bytes) -> list[bytes]:
    """Every capsule that came from a zone or went there, whose ever home it is now."""
    sent = {capsule for capsule, _ in sent_capsules(state, zone)}
    came = {capsule for capsule, value in state.scan(HOME, b"") if HomeRow.decode(value).zone == zone}
    return sorted(sent | came)


def replicas(state: Overlay, zone: bytes) -> Iterator[bytes]:
    """Every capsule here that has its home in a zone, by whatever way."""
    for capsule in known_of(state, zone):
        row = state.capsule(capsule)
        if row is not None and home_of(state, capsule, row) == zone:
            yield capsule


def reached(state: Overlay, number: bytes, zone: ZoneRow, capsule: bytes) -> int:
    """The position of its home's log that a replica of ``zone``, of that id, has come to; 0 for what is not here.

    What that zone did before it gave the home away was all here when that was taken, whoever has it now.
    """
    row = state.capsule(capsule)
    if row is None:
        return 0
    home = home_row(state, capsule)
    if home is None or home.zone != number:
        return zone.base
    if home.here:
        return max(zone.base, home.came)
    if home.moved:
        # What that zone did to it comes in its stream, from before it took this one's place as well.
        return max(home.position, home.came)
    return max(home.position, zone.base) if row.ino <= zone.returned else home.position


def waits(state: Overlay, zone: bytes, capsule: bytes) -> bool:
    """Whether a replica of a zone is still as it was when the zone's heir had it otherwise: that one has to ship it."""
    row, home, known = state.capsule(capsule), home_row(state, capsule), zone_row(state, zone)
    if row is None or row.deleted or home is None or known is None or not known.heir:
        return False
    return home.zone == zone and not home.copy and home.step == known.heir_epoch


def begins_at(state: Reader | Overlay, zone: bytes, row: ZoneRow) -> int:
    """The position of this log from which a zone whose place this store took has to be told of it; 0 if it took none.

    That is where it took its place, or before the first home of a single capsule it took from that zone: what was
    done with those until then is this store's own, and may not have been shipped.
    """
    if not row.taken:
        return 0
    root = state.get(CAPSULE, bytes(ROOT))
    if root is None or not CapsuleRow.decode(root).flags & MOVED:
        return row.promoted
    homes = (HomeRow.decode(value) for _, value in state.scan(HOME, b""))
    taken = (home.since - 1 for home in homes if home.zone == zone and home.since > row.parted)
    return min((row.promoted, *taken))


def given_to(state: Overlay, zone: bytes) -> dict[bytes, int]:
    """Capsules whose home was given to a zone that has told of none of them since, and where in this log.

    Not those given before the zone took this store's place: then it is their home whether it took it or not.
    """
    row, root = zone_row(state, zone), state.capsule(ROOT)
    if row is None or root is None or not root.flags & MOVED:
        return {}
    found = {}
    for capsule, value in state.scan(HOME, b""):
        home, there = HomeRow.decode(value), state.capsule(capsule)
        untold = home.zone == zone and home.moved > row.parted and not (home.here or home.position)
        if untold and there is not None and home_of(state, capsule, there) == zone:
            found[capsule] = home.moved
    return found


def sent_capsules(state: Reader | Overlay, zone: bytes) -> Iterator[tuple[bytes, int]]:
    """Capsules a zone was sent and not told to delete since, each with the position it was last sent as of."""
    for key, value in state.scan(SENT, zone):
        yield key[ID_BYTES:], U64.unpack(value)[0]


def cursor_row(state: Reader | Overlay, zone: bytes, shard: int, lane: int) -> CursorRow:
    """How far a stream has come; for one that never brought anything, where it is to begin."""
    data = state.get(CURSOR, _STREAM.pack(zone, shard, lane))
    if data is not None:
        return CursorRow.decode(data)
    row = zone_row(state, zone)
    return CursorRow(0 if row is None else row.base)


def cursors(state: Reader | Overlay, zone: bytes) -> list[tuple[int, int, CursorRow]]:
    """Every stream of a zone that has brought anything: shard, lane, how far it has come."""
    return [(*_STREAM.unpack(key)[1:], CursorRow.decode(value)) for key, value in state.scan(CURSOR, zone)]


def marked_before(state: Reader, zone: bytes, shard: int, lane: int, position: int) -> int:
    """A position of this log at which a stream had not come further than ``position`` of the home's; 0 for none.

    The stream's last shipment up to ``position`` is less than MARK_EVERY positions of this log, and one shipment,
    further on.
    """
    stream = _STREAM.pack(zone, shard, lane)
    found = state.last_at_or_before(MARK, stream + U64.pack(position))
    return int(U64.unpack(found[1])[0]) if found is not None and found[0].startswith(stream) else 0


# --- the fold --------------------------------------------------------------------------------------


def _put(state: Overlay, zone: bytes, row: ZoneRow) -> None:
    state.put(ZONE, zone, row.encode())


def _known(state: Overlay, zone: bytes) -> ZoneRow:
    row = zone_row(state, zone)
    if row is None:
        raise CorruptionError(f"the log names a zone that is not there: {zone.hex()}")
    return row


def defined(state: Overlay, context: Context, link: bytes, event: ev.ZoneDefined | ev.ZoneAdded) -> None:
    """The zone is known; one that was removed keeps what was between the two."""
    root = state.edit(event.capsule)
    root.link = link
    root.flags |= FEDERATED
    before = zone_row(state, event.zone)
    role = OWN if isinstance(event, ev.ZoneDefined) else PEER
    row = ZoneRow(role, event.name, event.kind, event.url, event.authorities, event.sealing)
    if before is not None:
        row.epoch, row.taken = before.epoch, before.taken
        row.lost, row.base, row.returned = before.lost, before.base, before.returned
        row.promoted, row.parted, row.declined = before.promoted, before.parted, before.declined
        row.heir, row.heir_epoch = before.heir, before.heir_epoch
    _put(state, event.zone, row)


def changed(state: Overlay, context: Context, link: bytes, event: ev.ZoneChanged) -> None:
    """A zone has other properties."""
    state.edit(event.capsule).link = link
    row = _known(state, event.zone)
    row.kind, row.url = event.kind, event.url
    row.authorities, row.sealing = event.authorities, event.sealing
    _put(state, event.zone, row)


def removed(state: Overlay, context: Context, link: bytes, event: ev.ZoneRemoved) -> None:
    """Cursors and marks go: if the zone is added again, all it ships comes anew, over what is here."""
    state.edit(event.capsule).link = link
    row = _known(state, event.zone)
    row.role = REMOVED
    _put(state, event.zone, row)
    _forget_streams(state, event.zone)


def _forget_streams(state: Overlay, zone: bytes) -> None:
    for table in (CURSOR, MARK):
        for key, _ in list(state.scan(table, zone)):
            state.delete(table, key)


def received(state: Overlay, context: Context, link: bytes, event: ev.ShipmentReceived) -> None:
    """The cursor moves, and the replicas that were shipped to have come as far."""
    state.edit(event.capsule).link = link
    before = cursor_row(state, event.zone, event.shard, event.lane)
    marked = before.marked
    stream = _STREAM.pack(event.zone, event.shard, event.lane)
    if not marked or context.position - marked >= MARK_EVERY:
        marked = context.position
        state.put(MARK, stream + U64.pack(event.through_position), U64.pack(context.position))
    row = CursorRow(event.through_position, event.step, marked, event.resume)
    state.put(CURSOR, stream, row.encode())
    for at in range(0, len(event.capsules), ID_BYTES):
        capsule = event.capsules[at : at + ID_BYTES]
        home = home_row(state, capsule)
        if home is None:
            raise CorruptionError(f"the log ships to a capsule that is no replica: {capsule.hex()}")
        step = home.step if home.copy else 0  # what comes from its home waits for no heir
        home = attrs.evolve(home, position=event.through_position, step=step)
        state.put(HOME, capsule, home.encode())


def homed(state: Overlay, context: Context, link: bytes, event: ev.CapsuleHomed) -> None:
    """The capsule is a replica, or none any more; or it has its home here again, as after it came from another zone."""
    row = state.edit(event.capsule)
    row.link = link
    if _known(state, event.zone).role == OWN:
        home = home_row(state, event.capsule) if event.position else None
        if home is not None:
            home = attrs.evolve(home, position=event.position, copy=0, step=0, moved=home.since, here=True)
            state.put(HOME, event.capsule, home.encode())
            return
        row.flags &= ~REPLICA
        state.delete(HOME, event.capsule)
        for zone, each in zones(state).items():
            if each.lost:
                state.delete(SENT, zone + event.capsule)
        return
    row.flags |= REPLICA
    _put_home(state, event.capsule, HomeRow(event.zone, event.position, event.copy, event.step))
    times = {name: getattr(event, name) for name in ("atime", "mtime", "ctime", "btime")}
    for name, value in times.items():
        if value is not None:
            setattr(row, name, value)
            row.change = context.position


def withdrawn(state: Overlay, context: Context, link: bytes, event: ev.CapsuleWithdrawn) -> None:
    """The replica is deleted, and stays one."""
    row = state.edit(event.capsule)
    row.link, row.change, row.ctime = link, context.position, context.time_ns
    if not row.deleted:
        row.deleted = context.position
        state.put(ORPHAN, NIL + event.capsule + U64.pack(context.position), event.capsule)
    _put_home(state, event.capsule, HomeRow(event.zone, event.position))


def _put_home(state: Overlay, capsule: bytes, home: HomeRow) -> None:
    """A capsule is a zone's replica; if its home was given to that zone, that stays known."""
    before = home_row(state, capsule)
    if before is not None and before.zone == home.zone and before.moved and not before.here:
        home = attrs.evolve(home, moved=before.moved, came=before.came, since=before.since)
    state.put(HOME, capsule, home.encode())


def given(state: Overlay, context: Context, link: bytes, event: ev.HomeGiven) -> None:
    """The capsule is a replica of the zone from now on."""
    row = state.edit(event.capsule)
    row.link = link
    row.flags |= REPLICA
    before = home_row(state, event.capsule)
    if before is None or before.zone != event.zone:
        before = HomeRow(event.zone, 0)
    home = attrs.evolve(before, position=0, copy=0, step=0, moved=context.position, here=False)
    state.put(HOME, event.capsule, home.encode())
    state.edit(bytes(ROOT)).flags |= MOVED


def taken(state: Overlay, context: Context, link: bytes, event: ev.HomeTaken) -> None:
    """The capsule has its home here, and the zone it came from has all of it as of now."""
    row = state.edit(event.capsule)
    row.link = link
    row.flags |= REPLICA
    at, there = context.position, event.position
    home = HomeRow(event.zone, there, moved=at, here=True, came=there, since=at)
    state.put(HOME, event.capsule, home.encode())
    state.put(SENT, event.zone + event.capsule, U64.pack(context.position))
    state.edit(bytes(ROOT)).flags |= MOVED


def declined(state: Overlay, context: Context, link: bytes, event: ev.HomesDeclined) -> None:
    """What the zone gave away up to a position is not taken any more."""
    state.edit(event.capsule).link = link
    row = _known(state, event.zone)
    row.declined = max(row.declined, event.position)
    _put(state, event.zone, row)


def sent(state: Overlay, context: Context, link: bytes, event: ev.ShipmentSent) -> None:
    """What a zone has, as far as this side knows."""
    state.edit(event.capsule).link = link
    for capsule, position in ev.SHIPPED.iter_unpack(event.capsules):
        state.put(SENT, event.zone + capsule, U64.pack(position))
    for at in range(0, len(event.withdrawn), ID_BYTES):
        state.delete(SENT, event.zone + event.withdrawn[at : at + ID_BYTES])


def promoted(state: Overlay, context: Context, link: bytes, event: ev.ZonePromoted) -> None:
    """All replicas of the zone there are now have their home here."""
    state.edit(event.capsule).link = link
    row = _known(state, event.zone)
    row.epoch, row.taken, row.promoted = event.epoch, state.counter(b"ino"), context.position
    row.lost = row.base = row.returned = 0
    row.heir, row.heir_epoch = b"", 0
    _put(state, event.zone, row)
    _flag_lost(state)


def followed(state: Overlay, context: Context, link: bytes, event: ev.HeirFollowed) -> None:
    """What comes from the zone from now on comes from its heir.

    Cursors of the heir that are beyond where it took the place go: it ships all anew from there, over what is here.
    """
    state.edit(event.capsule).link = link
    row, heir = _known(state, event.zone), _known(state, event.heir)
    row.heir, row.heir_epoch = event.heir, event.epoch
    _put(state, event.zone, row)
    if heir.heir == event.zone:
        heir.heir, heir.heir_epoch = b"", 0
        _put(state, event.heir, heir)
    if any(cursor.position >= event.position for _, _, cursor in cursors(state, event.heir)):
        _forget_streams(state, event.heir)


def lost(state: Overlay, context: Context, link: bytes, event: ev.HomeLost) -> None:
    """All that the zone was sent until now has its home there."""
    state.edit(event.capsule).link = link
    row = _known(state, event.zone)
    row.epoch, row.base = event.epoch, event.position
    row.lost = row.parted = context.position
    row.returned, row.taken = row.taken, 0
    _put(state, event.zone, row)
    _flag_lost(state)


def _flag_lost(state: Overlay) -> None:
    root = state.edit(bytes(ROOT))
    if any(zone.lost for zone in zones(state).values()):
        root.flags |= HOME_LOST
    else:
        root.flags &= ~HOME_LOST


def key_created(state: Overlay, row: CapsuleRow, event: ev.KeyCreated) -> None:
    """Keeps whose key it is: a zone may name its own keys again, and nobody else's."""
    if row.flags & REPLICA:
        home = home_row(state, event.capsule)
        if home is not None:
            state.put(ZONE_KEY, U32.pack(event.key), home.zone)
