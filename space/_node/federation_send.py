"""What one zone is sent: the log read for it, what leaves recorded, and how far behind it is.

:mod:`space.federation.stream` says what goes next; here is what it needs of the store.  A shipment is made of batches
that are durable here (else a power loss could take back what another zone has), and what is in it is recorded in this
log before it leaves; the zone's answer counts when that record is durable too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs

from space._errors import (
    NotFoundError,
    RefusedError,
    SpaceError,
    UnavailableError,
    UsageError,
)
from space._node.caller import Document
from space._node.federation_follow import Promotion, follow
from space._node.federation_heir import inheritance
from space._node.federation_home import HomeContent, Sealer, Walk
from space._node.federation_keys import ZoneAuthority
from space._node.federation_promote import ASKED_MAX, CAPSULES_TOLD, PARTS_TOLD, Arrival, parse_arrivals
from space._node.federation_zones import ask
from space.events import commands as cmd
from space.events.commands import Durability
from space.events.ids import ID_BYTES, ROOT, CapsuleId, zone_capsules, zone_root
from space.events.types import ZonePromoted
from space.federation.exchange import HEIR, REACHED
from space.federation.initial import initial
from space.federation.portable import size
from space.federation.selection import Selection
from space.federation.shipment import encode_shipment
from space.federation.shipper import Outgoing
from space.federation.stream import Begin, Cursor, Note, Streams, begin
from space.federation.translate import Batch, Part, Translator, is_quiet, missing_capsule
from space.statemachine import zones as rows
from space.statemachine.tables import POLICY, U32

if TYPE_CHECKING:
    from space._node.federation_zones import Zone, Zones
    from space._node.store import Store
    from space.federation import stream

SHARD: Final = 0
"""The shard whose log is shipped: the one with the tree."""

READ_BATCHES: Final = 256
"""Batches that are read before it is looked whether there is something to send."""

CAPSULES_SHOWN: Final = 1000
"""Capsules a status lists: more say nothing more to a person."""

log: Final = logging.getLogger("space.federation")


class ZoneSource:
    """A :class:`space.federation.shipper.Source` for one zone."""

    def __init__(self, store: Store, zones: Zones, zone: Zone, note: Document) -> None:
        """``note`` is what :meth:`note` said when something was last shipped from here."""
        keys = zones.keys()
        self._store = store
        self._zones = zones
        self._zone = zone
        self._home = keys.identity
        self._content = HomeContent(store)
        self._selection = Selection(zone.name)
        seal = Sealer(store, keys, zone)
        self._translator = Translator(self._home.id, self._home.name, self._selection, seal, zone=zone.id)
        self._lock = threading.RLock()
        self._streams: Streams | None = None
        self._walk: Walk | None = None
        self._parts: dict[int, deque[Part]] = {}
        self._broken = {int(lane) for lane in note.get("broken", ())}
        self._begun_ns = time.time_ns()
        self._noted = note
        self._epoch = 0
        self._thirds = _Thirds()
        self._anew = False  # what was translated is not what the zone needs
        self._held = False  # what comes next needs the zone to be told first
        self._records: deque[int] = deque()  # positions of our own records that are not known to be durable
        self._looked: set[int] = set()  # where third zones' places were taken when it last was
        self._sweeps = False  # whether the zone knows what to do at the end of a first copy
        self.remark = ""
        """What people should know about how shipping goes on."""

    # --- where to begin --------------------------------------------------------------------------

    def connected(self, identity: Document, cursors: Document) -> None:
        self._store.sync()  # what is there counts from now on, and so must be recorded here
        epoch, _, found = _understood(cursors)
        self._settle(epoch, _number(cursors.get("promoted")), found, own=cursors.get("own") is True)
        cursors = self._succeed(cursors)
        epoch, origin, found = _understood(cursors)
        third = self._third(cursors)
        ahead = max((cursor.position for cursor in found.values()), default=0)
        if ahead > self._store.last:
            raise RefusedError(
                f"zone {self._zone.name} says it has position {ahead}, and this log ends at {self._store.last}",
                hint="was this store restored from an older copy?",
            )
        with self._lock:
            self._sweeps = cursors.get("sweeps") is True
            anew = self._anew or self._streams is None or (self._epoch, self._thirds) != (epoch, third)
            if anew or self._streams is None or not self._streams.reconnected(found):
                self._begin(found, origin, epoch, third, anew=cursors.get("forgotten") is True)

    def _succeed(self, cursors: Document) -> Document:
        """Has the zone follow this one for what it took over from third ones; its cursors then.

        Raises:
            SpaceError: it cannot.
        """
        with self._store._read() as txn:
            taken = {number: row for number, row in rows.zones(txn).items() if row.taken}
        self._looked = {row.promoted for row in taken.values()}
        for number, row in taken.items():
            known, follows = _thirds_in(cursors)
            if number != self._zone.id and number in known and follows.get(number) != row.epoch:
                answer: Document = {}
                for part in inheritance(self._store, number, self._zone.name).documents():
                    answer = self._tell_heir(part)
                found = answer.get("cursors")
                cursors = found if answer.get("follows") is True and isinstance(found, dict) else cursors
        return cursors

    def _tell_heir(self, part: Document) -> Document:
        authority = ZoneAuthority.parse(self._zone.authorities)
        return ask(self._zone.url, self._zones.keys(), authority, "POST", HEIR, part)

    def _third(self, cursors: Document) -> _Thirds:
        """What third zones have to do with what the zone is shipped.

        Raises:
            RefusedError: a third one took this one's place there, and this one has not learnt it.
        """
        _, follows = _thirds_in(cursors)
        heir = cursors.get("heir")
        with self._store._read() as txn:
            known = rows.zones(txn)
        told = {number: row.promoted for number, row in known.items() if row.taken and number in follows}
        missed = tuple(
            (row.promoted, row.parted)
            for number, row in known.items()
            if number not in (*follows, self._zone.id) and 0 < row.promoted < row.parted
        )
        roots = tuple(sorted(each for each in map(_id_in, _list(cursors.get("roots"))) if each))
        parted = max((known[number].parted for number in told), default=0)
        lost = {number: row.lost for number, row in known.items() if row.lost and number != self._zone.id}
        if heir is None:
            return _Thirds(0, parted, told, roots, missed, min(lost.values(), default=0))
        by, epoch = (_id_in(heir[0]), _number(heir[1])) if len(_list(heir)) == 2 else (b"", 0)
        row = known.get(by)
        if row is None or row.epoch < epoch or not row.parted:
            name = "another zone" if row is None else f"zone {row.name}"
            raise RefusedError(
                f"zone {self._zone.name} follows {name}, which took this one's place in epoch {epoch}; this one has "
                "not learnt that yet",
                hint="it does when that zone connects here" if row is None else "it does when they connect",
            )
        lost.pop(by, None)
        first = min(lost.values(), default=0)
        return _Thirds(epoch, max(row.parted, parted), told, roots, missed, first)

    def _settle(self, epoch: int, promoted: int, cursors: Mapping[int, Cursor], *, own: bool) -> None:
        """Sees that both zones agree who took whose place, and gives way if the other one did.

        With ``own`` the other one has something for this zone that it did not take over: where nothing ever came of
        it, that zone's log is told from its beginning.

        Raises:
            SpaceError: they do not agree, or what was not shipped cannot be set aside.
        """
        name = self._zone.name
        row = self._row()
        if epoch > row.epoch and promoted > 0:
            lanes = {lane: _all_up_to(cursor) for lane, cursor in cursors.items()}
            with self._store._read() as txn:
                came = [_all_up_to(each) for _, _, each in rows.cursors(txn, self._zone.id)]
            # What of its own it had not shipped is told too, in lanes that brought nothing yet.
            begins = max(1, min((promoted, *came))) if came or not own else 1
            self._note_followed()
            with self._lock:
                self._forget()
                follow(self._store, self._zone, Promotion(epoch, begins, lanes), self._ask_reached)
            row = self._row()
        if epoch < row.epoch and row.taken:
            raise UnavailableError(
                f"this zone took the place of zone {name} in epoch {row.epoch}, and that one has not learnt it yet",
                hint="it does when it connects here",
            )
        if epoch != row.epoch:
            raise RefusedError(
                f"zone {name} is in epoch {epoch} and this one in {row.epoch}, and it took nobody's place",
                hint="was one of the two stores restored from an older copy?",
            )
        if promoted > 0 and row.taken:
            raise RefusedError(
                f"this zone and zone {name} both took each other's place in epoch {epoch}",
                hint="decide which of the two goes on, and there: space zone promote --again, with the other's name",
            )

    def _note_followed(self) -> None:
        """Notes what the zone was not sent, and has as it follows this one for a third one: it takes that over too.

        Raises:
            SpaceError: it does not say what it has; or the log does not reach back there.
        """
        with self._store._read() as txn:
            taken = {number: row.promoted for number, row in rows.zones(txn).items() if row.taken}
            sent = {capsule for capsule, _ in rows.sent_capsules(txn, self._zone.id)}
        taken.pop(self._zone.id, None)
        for number, position in taken.items():
            if there := sorted(self._there(number, position) - sent):
                noted = [(capsule, position) for capsule in there]
                record = cmd.RecordShipment(self._zone.id, SHARD, 0, position, position, 0, noted, 0)
                self._store.execute(record, actor="federation")

    def _row(self) -> rows.ZoneRow:
        with self._store._read() as txn:
            row = rows.zone_row(txn, self._zone.id)
        if row is None:
            raise NotFoundError(f"zone {self._zone.name} is not known any more")
        return row

    def _ask_reached(self, capsules: Sequence[bytes]) -> list[Arrival]:
        authority = ZoneAuthority.parse(self._zone.authorities)
        question = {"capsules": [each.hex() for each in capsules]}
        answer = ask(self._zone.url, self._zones.keys(), authority, "POST", REACHED, question)
        return parse_arrivals(answer, len(capsules))

    def _begin(
        self, cursors: Mapping[int, Cursor], origin: int, epoch: int, third: _Thirds, *, anew: bool
    ) -> None:
        """Reads the log from where a zone with these cursors goes on; copies all there is if it forgot them."""
        self._forget()
        self._anew = self._held = False
        self.remark = ""
        self._epoch, self._thirds = epoch, third
        self._translator.certain = not (epoch or third.told or third.epoch)
        self._translator.roots = third.directories(self._zone.id)
        at = None if anew else self._after_parting(begin(cursors, origin), third)
        parted = max(self._row().parted, third.parted)
        since = min((each for each in third.told.values() if each > parted), default=0)
        if since and (at is None or (not cursors and at.position >= since)):
            at = Begin(since - 1, copying=True)
        if at is None:
            at = Begin(self._store.last, copying=True)
        if at.copying and third.lost > parted:
            # What went to a third zone is there as it was right before that.
            at = Begin(min(at.position, third.lost - 1), copying=True)
        if at.position + 1 < self._store.wal.first_index:
            at = self._begin_late(at, third, parted)
        self._translator.followed = {
            number: self._there(number, position)
            for number, position in third.told.items()
            if at.position < position
        }
        self._read_from(at, cursors, origin, epoch + third.epoch)

    def _begin_late(self, at: Begin, third: _Thirds, parted: int) -> Begin:
        """Where to begin if the log does not reach back to where it should be read from.

        Raises:
            RefusedError: what a third zone took over from this one is there no more.
        """
        begins = self._store.wal.first_index
        if third.lost > parted:
            raise RefusedError(
                f"the log begins at {begins}, after position {third.lost} at which a third zone took this one's "
                f"place: zone {self._zone.name} has to follow that one first",
                hint="it does when that zone connects there",
            )
        self.remark = (
            f"the log begins at {begins}, after position {at.position} to which the zone has come: everything is "
            "copied as it is now"
        )
        log.warning("zone %s: %s", self._zone.name, self.remark)
        return Begin(self._store.last, copying=True)

    def _there(self, number: bytes, position: int) -> frozenset[bytes]:
        """What the zone has of a third one as this one had it when it took its place, and nothing after that."""
        ids = list(inheritance(self._store, number, self._zone.name).capsules)
        found: set[bytes] = set()
        for at in range(0, len(ids), ASKED_MAX):
            some = ids[at : at + ASKED_MAX]
            answers = zip(some, self._ask_reached(some), strict=True)
            found.update(
                each for each, arrival in answers if arrival.there and arrival.position == position - 1
            )
        return frozenset(found)

    def _after_parting(self, at: Begin | None, third: _Thirds) -> Begin | None:
        """Where to begin for a zone that took this one's place: what was before is its, or set aside.

        What is still at home here is copied, as of then; if its place was taken in turn, as of right before that.
        Likewise for one that follows a third zone, which took this one's place.
        """
        if at is None:
            return None
        row = self._row()
        missed = [parted for promoted, parted in third.missed if at.position < promoted]
        parted = max(row.parted, third.parted, *missed)
        if at.position >= parted:
            return at
        again = [each for each in (row.promoted, *third.told.values()) if each > parted]
        return Begin(min(again) - 1 if again else self._store.last, copying=True)

    def _read_from(self, at: Begin, cursors: Mapping[int, Cursor], origin: int, epoch: int) -> None:
        walk = self._walk = Walk(self._store, at.position)
        self._streams = Streams(self._home.id, self._zone.id, SHARD, cursors, at, origin=origin, epoch=epoch)
        if at.copying:
            scope = self._translator.scope(walk.now)
            known = (capsule for capsule, _ in rows.sent_capsules(walk.now.state, self._zone.id))
            sent = [capsule for capsule in known if not scope.moved(capsule)]
            time_ns = self._store.wal.time_ns(at.position)
            # What a third zone had taken over then, and this one took over from it since, is told after the copy.
            others = (row for number, row in rows.zones(walk.now.state).items() if number != self._zone.id)
            sweep = self._sweeps and not any(row.lost for row in others)
            parts = initial(self._translator, walk.now, at.position, time_ns, sent, sweep=sweep)
            self._take(parts, at.position, time_ns, quiet=not parts)

    def _forget(self) -> None:
        self._streams = None
        self._parts = {}
        if self._walk is not None:
            self._walk.close()
            self._walk = None

    # --- what is next ----------------------------------------------------------------------------

    def next(self) -> Outgoing | None:
        with self._lock:
            assert self._streams is not None, "connected() comes first"
            while True:
                found = self._streams.next(self._content, time.monotonic())
                if found is not None:
                    return self._recorded(found)
                if self._held:
                    raise UnavailableError(
                        f"this zone took another one's place, and zone {self._zone.name} has to be told",
                        hint="that is done when it connects again, at once",
                    )
                if not self._read() and not self._held:
                    return None

    def _read(self) -> bool:
        """Reads on in the log; whether there was anything to read."""
        streams, walk = self._streams, self._walk
        assert streams is not None
        assert walk is not None
        last = min(self._store.last, walk.position + READ_BATCHES)
        if self._held or streams.full or walk.position >= last:
            return False
        while walk.position < last and not streams.full:
            before, after, batch = walk.step()
            if self._is_news(batch):
                self._held = self._anew = True
                return False
            parts = self._translator.translate(before, after, batch)
            quiet = is_quiet(batch.events)
            self._take(parts, batch.position, batch.time_ns, quiet=quiet)
        return True

    def _is_news(self, batch: Batch) -> bool:
        """Whether this zone took a third one's place there, and the zone was not told when it connected."""
        if batch.position in self._looked or not any(isinstance(each, ZonePromoted) for each in batch.events):
            return False
        with self._store._read() as txn:
            known = rows.zones(txn)
        return any(
            row.taken and row.promoted == batch.position
            for row in known.values()
            if row.name != self._zone.name
        )

    def _take(self, parts: list[Part], position: int, time_ns: int, *, quiet: bool) -> None:
        assert self._streams is not None
        self._streams.add(parts, position, time_ns, quiet=quiet)
        for part in parts:
            self._parts.setdefault(part.lane, deque()).append(part)

    def _recorded(self, found: stream.Outgoing) -> Outgoing:
        shipment = found.shipment
        body = encode_shipment(shipment)
        through, step = shipment.through
        self._make_durable(through)
        position = 0
        if found.capsules or found.withdrawn:
            record = cmd.RecordShipment(
                self._zone.id,
                shipment.shard,
                shipment.lane,
                shipment.from_position,
                through,
                step,
                found.capsules,
                len(body),
                found.withdrawn,
            )
            position = self._store.execute(
                record, durability=Durability.BUFFERED, actor="federation"
            ).position
            self._records.append(position)
        return Outgoing(body, position)

    def _make_durable(self, through: int) -> None:
        """Sees that all is durable up to a position, and after it all but our own records: nobody is told of those."""
        durable = self._store.wal.durable_index
        while self._records and self._records[0] <= durable:
            self._records.popleft()
        if durable < through or self._store.wal.last_index - durable > len(self._records):
            self._store.sync()

    def settle(self, sent: Outgoing) -> None:
        if sent.token:
            self._store.sync(sent.token)

    def acknowledged(self, sent: Outgoing, cursor: Document) -> None:
        self.settle(sent)
        lane, position, step = (cursor.get(key) for key in ("lane", "position", "step"))
        with self._lock:
            assert self._streams is not None
            self._streams.acknowledge(_number(lane), _number(position), _number(step))

    def refused(self, error: SpaceError) -> None:
        missing = missing_capsule(error)
        if missing is None:
            return
        with self._lock:
            log.warning("zone %s lacks capsule %s: it is copied", self._zone.name, CapsuleId(missing))
            self._translator.lacks(missing)
            self._anew = True

    # --- beside shipments --------------------------------------------------------------------------

    def offer(self, identity: Document) -> tuple[bytes, bytes] | None:
        knows = identity.get("knows")
        known = knows.get("fingerprints") if isinstance(knows, dict) else None
        keys = self._zones.keys()
        pem, signature = keys.offer()
        offered = ZoneAuthority.parse(pem).fingerprints
        if not isinstance(known, list) or set(offered) == set(known):
            return None
        return (pem, signature) if keys.authority.fingerprints[0] in known else None

    def pulse(self) -> Document:
        return {"position": self._store.last, "time_ns": time.time_ns(), "missing": self._told_missing()}

    def _told_missing(self) -> Document | None:
        """What was read for the zone and is not there, oldest first."""
        with self._lock:
            if self._streams is None:
                return None
            self._read()
            parts = [part for lane in self._streams.lanes for part in self._missing(lane)]
            told: list[list[Any]] = []
            capsules = 0
            for part in sorted(parts, key=lambda each: each.position):
                capsules += len(part.capsules)
                if len(told) >= PARTS_TOLD or capsules > CAPSULES_TOLD:
                    break
                content = sum(map(size, part.commands))
                ids = [each.hex() for each in part.capsules]
                told.append([part.lane, part.position, len(part.commands), content, ids])
            return {"read": self._streams.position, "parts": told, "more": len(told) < len(parts)}

    def close(self) -> None:
        """Removes what was made for reading."""
        with self._lock:
            self._forget()

    # --- how far -----------------------------------------------------------------------------------

    @property
    def position(self) -> int | None:
        """Up to where the zone has everything it is to have; None if it was not heard of yet."""
        with self._lock:
            if self._streams is None:
                return self._noted.get("position")
            lanes = [self._streams.confirmed(lane) for lane in self._streams.lanes]
            return min(lanes, default=self._streams.position)

    def _missing(self, lane: int) -> deque[Part]:
        """Parts of a lane that are not there, oldest first."""
        assert self._streams is not None
        parts = self._parts.setdefault(lane, deque())
        while parts and parts[0].position <= self._streams.confirmed(lane):
            parts.popleft()
        return parts

    def _oldest_ns(self, lane: int) -> int:
        """Time of the oldest batch that is for a lane and not there; 0 if there is none."""
        parts = self._missing(lane)
        return parts[0].time_ns if parts else 0

    def look_at_promises(self) -> None:
        """Reads on while nothing is shipped, and says in the log which promises (rpo) are broken, or kept again.

        Raises:
            SpaceError: the log cannot be read, or not written.
        """
        with self._lock:
            if self._streams is not None:
                self._read()
            for lane, (promised_ns, lag_ns) in self._lags().items():
                late = lag_ns > promised_ns
                if late != (lane in self._broken):
                    self._say(lane, lag_ns, kept=not late)

    def _lags(self) -> dict[int, tuple[int, int]]:
        """What is promised for each lane, and how old the oldest batch is that is not there."""
        now_ns = time.time_ns()
        found = {}
        for lane, promised_ns in self._promises().items():
            oldest_ns = self._begun_ns if self._streams is None else 0
            if self._streams is not None and lane in self._streams.lanes:
                oldest_ns = self._oldest_ns(lane)
            found[lane] = promised_ns, max(0, now_ns - oldest_ns) if oldest_ns else 0
        return found

    def _promises(self) -> dict[int, int]:
        """The shortest rpo of each lane, in nanoseconds."""
        found: dict[int, int] = {}
        with self._store._read() as txn:
            for key, _ in txn.scan(POLICY, b""):
                number = U32.unpack(key)[0]
                lane = self._selection.lane(txn, number)
                promised_ns = self._selection.policy(txn, number).rpo_ns
                if lane is not None and promised_ns is not None:
                    found[lane] = min(promised_ns, found.get(lane, promised_ns))
        return found

    def _say(self, lane: int, lag_ns: int, *, kept: bool) -> None:
        position = self.position or 0
        record = cmd.RecordRpo(self._zone.id, SHARD, lane, position, lag_ns, kept)
        self._store.execute(record, durability=Durability.BUFFERED, actor="federation")
        (self._broken.discard if kept else self._broken.add)(lane)
        text = "is kept again" if kept else "is broken"
        log.warning("the rpo promised for zone %s, priority %d, %s", self._zone.name, lane, text)

    def note(self) -> Document:
        """What is worth knowing when this process has ended."""
        with self._lock:
            return {"position": self.position, "broken": sorted(self._broken)}

    def document(self) -> Document:
        """How far the zone is."""
        with self._lock:
            streams = self._streams
            lanes = [] if streams is None else streams.lanes
            oldest = {lane: self._oldest_ns(lane) for lane in lanes}
            unread = streams is None or streams.position < self._store.last
            rpo = self._lags()
            return {
                "position": self.position,
                "waiting": unread or any(oldest.values()),
                "oldest_ns": min((each for each in oldest.values() if each), default=0) or self._unread_ns(),
                "rpo_ns": min((promised for promised, _ in rpo.values()), default=None),
                "rpo_ok": all(lag <= promised for promised, lag in rpo.values()),
                "remark": self.remark,
                "streams": [
                    {
                        "shard": SHARD,
                        "lane": lane,
                        "position": streams.confirmed(lane),
                        "waiting_bytes": streams.waiting_bytes(lane),
                        "lag_seconds": round(max(0, time.time_ns() - oldest[lane]) / 1e9, 3)
                        if oldest[lane]
                        else 0,
                        "copying": any(part.has_copies for part in self._missing(lane)),
                    }
                    for lane in lanes
                    if streams is not None
                ],
                "capsules": [
                    {"capsule": str(CapsuleId(capsule)), "lane": lane, "position": position}
                    for lane in lanes
                    for capsule, position in self._missing_capsules(lane)
                ],
            }

    def _missing_capsules(self, lane: int) -> list[tuple[bytes, int]]:
        """Capsules of which the zone lacks something, each with the latest position of that."""
        found: dict[bytes, int] = {}
        for part in self._missing(lane):
            for capsule in part.capsules:
                if len(found) >= CAPSULES_SHOWN:
                    return list(found.items())
                found[capsule] = part.position
        return list(found.items())

    def _unread_ns(self) -> int:
        """Time of the first batch that was not read for the zone yet; 0 if all were."""
        at = self._noted.get("position") if self._streams is None else self._streams.position
        if at is None or at >= self._store.last:
            return 0
        return self._store.wal.time_ns(at + 1)


@attrs.frozen
class _Thirds:
    """What third zones have to do with what a zone is shipped.

    Attributes:
        epoch: the one in which a zone it follows took this one's place; added to the two zones' own.
        parted: where this one learnt that; or that one of those in ``told`` had taken its place before.
        told: zones whose place this one took, and that it follows this one for; where in this log.
        roots: zones in whose directories there this one gives names.
        missed: where this one took a third one's place, and where it learnt that it lost it again, for each that the
            zone does not follow this one for.
        lost: where this one learnt that a third one had taken its place, which the zone does not follow; 0 if nowhere.
    """

    epoch: int = 0
    parted: int = 0
    told: dict[bytes, int] = attrs.field(factory=dict)
    roots: tuple[bytes, ...] = ()
    missed: tuple[tuple[int, int], ...] = ()
    lost: int = 0

    def directories(self, zone: bytes) -> dict[bytes, bytes]:
        """Directories of third zones here, and what stands for them in a zone."""
        found: dict[bytes, bytes] = {}
        for root in self.roots:
            found[bytes(zone_root(root))] = bytes(ROOT if root == zone else zone_root(root))
            if root != zone:
                found[bytes(zone_capsules(root))] = bytes(zone_capsules(root))
        return found


def _thirds_in(cursors: Document) -> tuple[set[bytes], dict[bytes, int]]:
    """The third zones a zone knows, and those it follows this one for, with the epoch of that."""
    follows = cursors.get("follows")
    known = {_id_in(each) for each in _list(cursors.get("zones"))}
    return known, {_id_in(k): _number(v) for k, v in follows.items()} if isinstance(follows, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _id_in(value: Any) -> bytes:
    """The id another zone wrote; empty if it is none."""
    try:
        found = bytes.fromhex(value)
    except (TypeError, ValueError):
        return b""
    return found if len(found) == ID_BYTES else b""


def _number(value: Any) -> int:
    return value if type(value) is int and value >= 0 else -1


def _all_up_to(cursor: Cursor | rows.CursorRow) -> int:
    """The position up to which a lane has brought everything: none while a first copy is under way.

    The note is of whoever ships, which may be newer than this program: one that says nothing here counts as that.
    """
    try:
        note = Note.decode(cursor.resume)
    except UsageError:
        return 0
    return 0 if note is not None and note.first else cursor.position - (note is not None)


def _understood(cursors: Document) -> tuple[int, int, dict[int, Cursor]]:
    """Epoch, origin and the cursor of each lane, of what the other side said.

    Raises:
        UnavailableError: it is nothing of the kind.
    """
    try:
        epoch, origin = int(cursors["epoch"]), int(cursors["base"])
        found = {
            int(each["lane"]): Cursor(int(each["position"]), int(each["step"]), bytes.fromhex(each["resume"]))
            for each in cursors["cursors"]
            if each["shard"] == SHARD
        }
    except (KeyError, TypeError, ValueError):
        raise UnavailableError(
            "the zone's answer about its cursors is malformed", hint="is it newer?"
        ) from None
    return epoch, origin, found
