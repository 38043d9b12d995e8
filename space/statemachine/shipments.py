"""Deciding what comes from another zone: a shipment may do to that zone's replicas what commands can, and no more.

Everything in a shipment is decided by the rules all commands are decided by, one after the other, each on what those
before it did.  Three things are decided here beyond that:

* **Exactly once, in order.**  The stream's cursor has to be where the shipment begins.
* **Whose.**  What a command changes has its home in the shipping zone, or is made by the command and gets it.  Names go
  into replicas, ``/zones/NAME`` (which stands for the home's root directory) and ``/zones/NAME/.capsules``.
* **Never back.**  A capsule may come by more than one way: another stream when its priority changes, a copy beside the
  stream.  What it has come to is kept with it, and what is older is passed over without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import attrs

from space._errors import Status, UsageError
from space.events import commands as cmd
from space.events import types as ev
from space.events.codec import EVENTS_MAX, NO_LINK, chain_link, encode_event
from space.events.ids import BRANCHES, ID_BYTES, ROOT, ZONES, zone_capsules, zone_root
from space.events.registry import U32_MAX, U63_MAX
from space.statemachine import keys, zones
from space.statemachine.apply import Context, apply, clone_id
from space.statemachine.decision import Decision, PayloadPlacer, Rejected, Rules, capsule_text, inside
from space.statemachine.tables import (
    ENTRY,
    HOME,
    KEY,
    MOVED,
    REPLICA,
    U32,
    XATTR,
    ZONE_KEY,
    CapsuleRow,
    EntryRow,
    Overlay,
)
from space.statemachine.zones import ZoneRow

TRIED: Final = U63_MAX
"""Position at which events are tried: later than all there are, as the one they will have."""

SWEEP_EVENTS_MAX: Final = EVENTS_MAX // 2
"""Events after which no more is swept: they are one entry, and a refused one would come again for ever.

Enough for all an entry or two can have told to delete.  What is left goes with the next first copy.
"""

_DIRECTORY: Final = ev.Kind.DIRECTORY
FRAME_BYTES: Final = 48
_FLAGS_AT: Final = 13  # flags and key id inside a frame record (docs/formats/frames.md)
_KEY_AT: Final = slice(16, 20)
_SHARED: Final = 2

_CONTENT: Final = (cmd.WriteExtent, cmd.Deallocate, cmd.Resize, cmd.SetAttributes, cmd.SetXattr)
"""What a copy of a capsule consists of, after its creation."""
_SUBJECTS: Final = (
    *_CONTENT,
    cmd.RemoveXattr,
    cmd.SetPolicy,
    cmd.CopyRange,
    cmd.Link,
    cmd.DeleteCapsule,
    cmd.Undelete,
)
"""Commands about one capsule that is there, and say which."""

Name = tuple[bytes, bytes]


def touched(state: Overlay, command: Any) -> Iterable[bytes]:
    """Capsules a command would change that are there already, directories that get or lose a name included."""
    match command:
        case cmd.CreateCapsule():
            return [command.parent] if command.parent else []
        case cmd.Clone():
            return [command.parent]
        case cmd.Link() | cmd.Undelete():
            return [command.capsule, command.parent]
        case cmd.Unlink():
            return [command.parent, *_at(state, command.parent, command.name)]
        case cmd.Rename():
            there = _at(state, command.new_parent, command.new_name)
            return [command.parent, command.new_parent, *_at(state, command.parent, command.name), *there]
        case _:
            return [command.capsule]


def _at(state: Overlay, parent: bytes, name: bytes) -> list[bytes]:
    data = state.get(ENTRY, parent + name)
    return [] if data is None else [EntryRow.decode(data).capsule]


def names_in(state: Overlay, zone: bytes, directory: bytes, row: CapsuleRow) -> bool:
    """Whether a zone gives names in a directory that is there, and not deleted."""
    home = zones.home_of(state, directory, row)
    if home == zone:
        return True
    inherited = zones.heirs(state, zone)
    if home is not None:
        # What the zone took the place of; and its own root, also where that is another one's by now.
        own = directory in (zone_root(zone), zone_capsules(zone))
        return own or any(number == home for number, _ in inherited)
    # What was this store's own goes on where it always was, also in directories that never left.
    known = zones.zone_row(state, zone)
    lost = known is not None and (known.lost or any(each.lost for _, each in inherited))
    return bool(lost) and directory != ZONES


def names_of(state: Overlay, capsule: bytes, row: CapsuleRow, likely: Iterable[Name] = ()) -> list[Name]:
    """Every name of a capsule; those that are ``likely``, and those in its last directory, are found quickly."""
    count = min(row.nlink, 1) if row.kind == _DIRECTORY else row.nlink
    found: dict[Name, None] = {}
    for parent, name in likely:
        if len(found) < count and _at(state, parent, name) == [capsule]:
            found[parent, name] = None
    for prefix in (row.parent, b""):
        if len(found) >= count:
            break
        found |= dict.fromkeys(_search(state, capsule, prefix))
    return list(found)


def _search(state: Overlay, capsule: bytes, prefix: bytes) -> Iterator[Name]:
    for key, value in state.scan(ENTRY, prefix):
        if EntryRow.decode(value).capsule == capsule:
            yield key[:ID_BYTES], key[ID_BYTES:]


def receive(state: Overlay, command: cmd.ReceiveShipment, payload: PayloadPlacer, rules: Rules) -> Decision:
    """The events of a shipment: none for one that has come before."""
    zone = zones.zone_row(state, command.zone)
    if zone is None or zone.role != zones.PEER:
        return Rejected(
            Status.NOT_PERMITTED, f"nothing is taken from zone {capsule_text(command.zone)}: add it first"
        )
    if refused := _malformed(command):
        return refused
    if command.epoch != zone.epoch + zone.heir_epoch:
        if zone.heir:
            heir = zones.zone_row(state, zone.heir)
            return Rejected(
                Status.NOT_PERMITTED, f"{heir} took the place of {zone}, which ships as if it had not"
            )
        return Rejected(
            Status.NOT_PERMITTED,
            f"{zone} ships in epoch {command.epoch}, and here it is epoch {zone.epoch}: one of the two zones "
            "was promoted in the other's place",
        )
    cursor = zones.cursor_row(state, command.zone, command.shard, command.lane)
    here = (cursor.position, cursor.step)
    if (command.through_position, command.through_step) <= here:
        return []
    if (command.from_position, command.from_step) != here:
        return Rejected(
            Status.STALE,
            f"the stream of {zone} stands at position {here[0]}, step {here[1]}, and the shipment begins "
            f"at {command.from_position}, step {command.from_step}",
        )
    return _Delivery(state, command, zone, payload, rules).decide()


def _malformed(command: cmd.ReceiveShipment) -> Rejected | None:
    small = (command.shard, command.lane, command.from_step, command.through_step)
    large = (command.from_position, command.through_position, command.time_ns)
    fits = all(0 <= each <= U32_MAX for each in small) and all(0 <= each <= U63_MAX for each in large)
    if fits and len(command.resume) <= ev.RESUME_BYTES_MAX and len(command.commands) <= EVENTS_MAX:
        return None
    return Rejected(
        Status.INVALID, "not a shipment: a number or the count of its commands is out of its range"
    )


class _RefusedError(Exception):
    """One of the commands is refused, and the whole shipment with it."""

    def __init__(self, rejected: Rejected) -> None:
        super().__init__(rejected.message)
        self.rejected = rejected


def _refuse(status: Status, message: str) -> _RefusedError:
    return _RefusedError(Rejected(status, message))


class _Delivery:
    """A shipment while it is decided."""

    def __init__(
        self,
        state: Overlay,
        command: cmd.ReceiveShipment,
        zone: ZoneRow,
        payload: PayloadPlacer,
        rules: Rules,
    ) -> None:
        self._state = state  # as it was before the shipment
        self._tried = Overlay(state)
        self._command = command
        self._zone = bytes(command.zone)
        self._row = zone
        self._payload = payload
        self._rules = rules
        self._context = Context(TRIED, 0, command.time_ns)
        self._links = any(isinstance(each, cmd.CopyRange) for each in command.commands)
        self._events: list[ev.Event] = []
        self._carried: dict[
            bytes, bool
        ] = {}  # capsule → whether commands on it are carried out or passed over
        self._made: set[bytes] = set()

    def decide(self) -> Decision:
        command = self._command
        try:
            self._make_directories()
            for each in command.commands:
                self._carry_out(each)
        except _RefusedError as error:
            return error.rejected
        except UsageError as error:
            return Rejected(error.status, str(error))
        if len(self._events) >= EVENTS_MAX:
            return Rejected(Status.TOO_LARGE, f"a shipment of {len(self._events)} events")
        moved = [each for each, carried in self._carried.items() if carried and each not in self._made]
        received = ev.ShipmentReceived(
            bytes(ROOT),
            self._zone,
            command.shard,
            command.lane,
            command.from_position,
            command.through_position,
            command.through_step,
            bytes(command.resume),
            b"".join(moved),
        )
        return [received, *self._events]

    # --- events ----------------------------------------------------------------------------------

    def _happen(self, *events: ev.Event) -> None:
        """Takes events and applies them, so that the next command is decided on what they do."""
        for event in events:
            link = NO_LINK
            if self._links:  # RangeCopied carries the head of its source's chain
                row = self._tried.capsule(event.capsule)
                link = chain_link(row.link if row else NO_LINK, encode_event(event))
            apply(self._tried, self._context, link, event)
        self._events += events

    def _rule(self, command: Any) -> list[ev.Event]:
        decided = self._rules[type(command)](self._tried, command, self._payload)
        if isinstance(decided, Rejected):
            raise _RefusedError(decided)
        return list(decided)

    def _homed(self, capsule: bytes, position: int) -> ev.CapsuleHomed:
        self._made.add(capsule)
        return ev.CapsuleHomed(capsule, self._zone, position, 0, 0, None, None, None, None)

    def _make_directories(self) -> None:
        """Makes ``/zones``, ``/zones/NAME`` and ``/zones/NAME/.capsules``, the first time."""
        root, capsules = bytes(zone_root(self._zone)), bytes(zone_capsules(self._zone))
        if self._tried.capsule(capsules) is not None:
            return
        if self._tried.capsule(ZONES) is None:
            self._happen(*self._rule(_directory(bytes(ZONES), bytes(ROOT), b"zones")))
        for capsule, parent, name in (
            (root, bytes(ZONES), self._row.name.encode()),
            (capsules, root, b".capsules"),
        ):
            created, linked = self._rule(_directory(capsule, parent, name))
            self._happen(created, self._homed(capsule, 0), linked)

    # --- whose, and as of when -------------------------------------------------------------------

    def _ours(self, capsule: bytes) -> CapsuleRow:
        """The row of a replica of the shipping zone."""
        row = self._tried.capsule(capsule)
        if row is None:
            raise _refuse(Status.NOT_FOUND, f"no capsule {capsule_text(capsule)}")
        if not self._is_home(capsule, row):
            raise _refuse(Status.NOT_PERMITTED, f"{self._row} is not the home of {capsule_text(capsule)}")
        return row

    def _is_home(self, capsule: bytes, row: CapsuleRow) -> bool:
        """Whether the shipping zone is a capsule's home: :func:`zones.home_of`, with the zone at hand."""
        if row.flags & REPLICA:
            home = zones.home_row(self._tried, capsule)
            if home is None or home.moved or home.zone != self._zone:
                return zones.home_of(self._tried, capsule, row) == self._zone
            return home.zone == self._zone and row.ino > self._row.taken
        return zones.home_of(self._tried, capsule, row) == self._zone

    def _names_here(self, parent: bytes) -> bool:
        """Whether names in a directory come from the shipping zone."""
        row = self._tried.capsule(parent)
        if row is None or row.kind != _DIRECTORY or row.deleted:
            return False
        return names_in(self._tried, self._zone, parent, row)

    def _passed_over(self, capsule: bytes) -> bool:
        """Whether a capsule has come as far by another way."""
        carried = self._carried.get(capsule)
        if carried is None:
            if capsule in self._made:
                return False
            self._ours(capsule)
            carried = self._carried[capsule] = not self._further(capsule)
            home = zones.home_row(self._tried, capsule)
            if carried and (home is None or home.here or home.zone != self._zone):
                self._happen(self._homed(capsule, self._command.through_position))
        return not carried

    def _further(self, capsule: bytes) -> bool:
        """Whether a capsule that no command here was about yet has come as far by another way."""
        if capsule in self._made or self._carried.get(capsule):
            return False
        return zones.reached(self._state, self._zone, self._row, capsule) >= self._command.through_position

    # --- commands --------------------------------------------------------------------------------

    def _carry_out(self, command: Any) -> None:
        match command:
            case cmd.Copied():
                self._copied(command)
            case cmd.CreateCapsule():
                if self._tried.capsule(command.capsule) is None or not self._passed_over(command.capsule):
                    self._create(command)
            case cmd.Clone():
                if self._tried.capsule(command.capsule) is None or not self._passed_over(command.capsule):
                    self._clone(command)
            case cmd.PlaceCapsule():
                if not self._passed_over(command.capsule):
                    self._place(command.capsule, command.names, command.gone)
            case cmd.WithdrawCapsule():
                if self._has_replica(command.capsule) and not self._passed_over(command.capsule):
                    self._withdraw(command.capsule)
            case cmd.TakeSnapshot() | cmd.DropSnapshot():
                self._snapshot(command)
            case cmd.TakeHome():
                self._take_home(command)
            case cmd.SweepReplicas():
                self._sweep(taken_over=command.epoch == self._row.epoch)
            case cmd.Unlink() | cmd.Rename():
                leads_to = _at(self._tried, command.parent, command.name)
                if not leads_to or not self._passed_over(leads_to[0]):
                    self._change(command)
            case _ if isinstance(command, _SUBJECTS):
                if not self._passed_over(command.capsule):
                    self._change(command)
            case _:
                raise _refuse(Status.INVALID, f"{type(command).__name__} cannot come in a shipment")

    def _has_replica(self, capsule: bytes) -> bool:
        """Whether a capsule is here that can be withdrawn, or must not; not what followed another zone or stayed."""
        row = self._tried.capsule(capsule)
        if row is None or self._is_home(capsule, row):
            return row is not None
        return not (self._row.heir or zones.heirs(self._tried, self._zone))

    def _change(self, command: Any) -> None:
        """Carries out a command on what is there."""
        directories = _directories(command)
        for capsule in touched(self._tried, command):
            if capsule not in directories:
                self._ours(capsule)
        self._check_names(directories)
        if isinstance(command, cmd.CopyRange):
            self._ours(command.source)
        self._check_unconditional(command)
        if isinstance(command, cmd.WriteExtent):
            command = attrs.evolve(command, frames=[_not_found_again(frame) for frame in command.frames])
        key = command.key if isinstance(command, cmd.SetPolicy) else None
        if key is None:
            self._happen(*self._rule(command))
            if isinstance(command, cmd.Link):
                self._named(command.capsule)
        else:
            self._happen(*self._rule(attrs.evolve(command, key=None)), self._key(command.capsule, key))

    def _check_names(self, directories: Iterable[bytes]) -> None:
        for directory in directories:
            if not self._names_here(directory):
                raise _refuse(
                    Status.NOT_PERMITTED, f"{self._row} gives no names in directory {capsule_text(directory)}"
                )

    def _check_unconditional(self, command: Any) -> None:
        """What depends on this store's own positions, or names frames under a key of this store, is no shipment."""
        if getattr(command, "change", None) is not None or getattr(command, "reserved", None) is not None:
            raise _refuse(Status.INVALID, "a shipment depends on nothing the other zone cannot know")
        if isinstance(command, cmd.WriteExtent):
            if any(len(frame.record) != FRAME_BYTES for frame in command.frames):
                raise _refuse(Status.INVALID, "not a frame")
            row = self._tried.capsule(command.capsule)
            keys = {int.from_bytes(frame.record[_KEY_AT], "little") for frame in command.frames}
            if row is not None and not keys <= {0, row.key, self._arrival_key()}:
                raise _refuse(Status.NOT_PERMITTED, "frames under a key that is not the capsule's")

    def _arrival_key(self) -> int:
        """The key frames were encrypted with anew when they came: no sender knows it, so none made them with it."""
        row = self._tried.capsule(ZONES)
        return 0 if row is None else row.key

    def _key(self, capsule: bytes, key: cmd.NewKey) -> ev.KeyCreated:
        """Gives a capsule a data key: a new one, or one that came from the same zone before."""
        if not (0 < key.key <= U32_MAX and 0 < key.version <= U32_MAX):
            raise _refuse(Status.INVALID, f"not a key: {key.key}, version {key.version}")
        number = U32.pack(key.key)
        known = self._tried.get(KEY, number + U32.pack(key.version))
        taken = next(self._tried.scan(KEY, number), None) is not None
        source = self._tried.get(ZONE_KEY, number)
        left = bool(self._row.lost) or self._has_moved()
        came_back = source is None and known is not None and left  # what left from here, with its key
        inherited = any(number == source for number, _ in zones.heirs(self._tried, self._zone))
        if taken and source != self._zone and not (came_back or inherited):
            raise _refuse(Status.STALE, f"key {key.key} exists already: encrypt with another")
        if known is None and keys.outdated(self._tried, key.wrapped):
            raise _refuse(Status.STALE, "the master key was changed meanwhile: try again")
        return ev.KeyCreated(capsule, key.key, key.version, bytes(key.wrapped) if known is None else known)

    def _has_moved(self) -> bool:
        """Whether homes of single capsules were ever given or taken here."""
        root = self._tried.capsule(ROOT)
        return root is not None and bool(root.flags & MOVED)

    def _create(self, command: cmd.CreateCapsule) -> None:
        self._check_names([command.parent] if command.parent else [])
        if command.kind == _DIRECTORY and not command.parent:
            parent, name = self._apart(command.capsule)
            command = attrs.evolve(command, parent=parent, name=name)
        plain = attrs.evolve(command, key=None, policy=command.policy or b"")
        created, *others = self._rule(plain)
        position = self._command.through_position
        self._happen(created, self._homed(bytes(command.capsule), position))
        if command.key is not None:
            self._happen(self._key(bytes(command.capsule), command.key))
        self._happen(*others)

    def _clone(self, command: cmd.Clone) -> None:
        """A clone of a replica by its home is a replica too, with all that is in it."""
        if command.manifest:
            raise _refuse(Status.INVALID, "a past moment of another zone cannot be cloned by its positions")
        self._ours(command.source)
        if command.parent != zone_capsules(self._zone):  # of that zone whoever took its place
            self._check_names([command.parent])
        (cloned,) = self._rule(command)
        assert isinstance(cloned, ev.CapsuleCloned)
        members = [cloned.members[at : at + ID_BYTES] for at in range(0, len(cloned.members), ID_BYTES)]
        copies = [clone_id(cloned.capsule, cloned.source, member) for member in members]
        for member, copy in zip(members, copies, strict=True):
            self._ours(member)
            if self._tried.capsule(copy) is not None:
                raise _refuse(Status.EXISTS, f"capsule {capsule_text(copy)} exists already")
        self._happen(cloned)
        self._happen(*(self._homed(copy, self._command.through_position) for copy in copies))

    def _snapshot(self, command: cmd.TakeSnapshot | cmd.DropSnapshot) -> None:
        if not command.snapshot.startswith(f"{self._row.name}:"):
            raise _refuse(Status.NOT_PERMITTED, f"a snapshot of {self._row} is called {self._row.name}:…")
        if isinstance(command, cmd.TakeSnapshot):
            self._ours(command.capsule)
        self._happen(*self._rule(command))

    def _take_home(self, command: cmd.TakeHome) -> None:
        """What comes from its home has it here from now on.  Else it stays fenced there, until it is taken back."""
        capsule = bytes(command.capsule)
        row, home = self._tried.capsule(capsule), zones.home_row(self._tried, capsule)
        if row is None or row.deleted or not self._is_home(capsule, row):
            return
        if home is not None and home.position:
            self._passed_over(capsule)  # it has come as far, whoever its home is
        if row.key != command.key or (home is not None and home.copy) or command.epoch != self._row.epoch:
            return
        came = home.came if home is not None and home.zone == self._zone else 0
        if max(self._row.declined, came) < command.given <= self._command.through_position:
            self._happen(ev.HomeTaken(capsule, self._zone, command.given))
            self._happen(*self._rule(cmd.SetPolicy(capsule, command.policy)))

    # --- names -----------------------------------------------------------------------------------

    def _apart(self, capsule: bytes) -> Name:
        """Where a capsule hangs whose own directory is not shipped."""
        return bytes(zone_capsules(self._zone)), capsule_text(capsule).encode()

    def _named(self, capsule: bytes) -> None:
        """A capsule that has a name somewhere does not hang apart any more."""
        apart = self._apart(capsule)
        if _at(self._tried, *apart) == [capsule]:
            self._happen(ev.NameUnlinked(bytes(capsule), *apart))

    def _place(self, capsule: bytes, names: Iterable[Name], gone: Iterable[Name]) -> None:
        row = self._ours(capsule)
        asked = [(bytes(parent), bytes(name)) for parent, name in names]
        has = names_of(self._tried, capsule, row, [*asked, *gone, self._apart(capsule)])
        stays = [name for name in has if self._keeps(capsule, name, gone)]
        if row.kind == _DIRECTORY and stays:
            return
        wanted = dict.fromkeys(stays)
        wanted |= {name: None for name in asked if name in has or self._free(capsule, name)}
        if not wanted:
            wanted[self._apart(capsule)] = None
        new = [name for name in wanted if name not in has]
        old = [name for name in has if name not in wanted]
        if row.kind == _DIRECTORY:
            if len(wanted) > 1:
                raise _refuse(Status.NOT_PERMITTED, "a directory has one name only")
            if new and old and self._names_here(old[0][0]):
                self._happen(*self._rule(cmd.Rename(*old[0], *new[0], replace=False)))
                return
            # Out of a directory that is deleted itself: it cannot be moved, and would have two names meanwhile.
            self._happen(*(ev.NameUnlinked(capsule, *name) for name in old))
            old = []
        for name in new:
            self._link(capsule, name)
        self._happen(*(ev.NameUnlinked(capsule, *name) for name in old))

    def _unname(self, capsule: bytes) -> None:
        """What was another zone's has no name until the last part of a copy gives it some: it may have none there."""
        names = names_of(self._tried, capsule, self._ours(capsule), [self._apart(capsule)])
        self._happen(*(ev.NameUnlinked(capsule, *name) for name in names))

    def _keeps(self, capsule: bytes, name: Name, gone: Iterable[Name]) -> bool:
        """Whether a capsule whose home was given away has a name in a directory whose home was not: nobody tells of it.

        Where the zone took this one's place it gives names there too (:meth:`_names_here`), and says which are gone.
        """
        home, parent = zones.home_row(self._tried, capsule), self._tried.capsule(name[0])
        if home is None or not home.moved or home.here or parent is None or parent.deleted:
            return False
        if name == self._apart(capsule):
            return False
        ours = zones.home_of(self._tried, name[0], parent) is None and name[0] not in (ZONES, BRANCHES)
        return ours and not (self._row.lost and name in gone)

    def _link(self, capsule: bytes, name: Name) -> None:
        row = self._tried.capsule(capsule)
        if row is not None and row.deleted:
            self._happen(*self._rule(cmd.Undelete(capsule, *name)))
        else:
            self._happen(*self._rule(cmd.Link(capsule, *name)))

    def _free(self, capsule: bytes, name: Name) -> bool:
        """Whether a capsule can have a name, which whoever has it loses: another one may have come further."""
        parent, _ = name
        if not self._names_here(parent) or inside(self._tried, parent, capsule):
            return False
        for holder in _at(self._tried, *name):
            row = self._tried.capsule(holder)
            if row is not None and self._inherits(holder, row):
                self._move_apart(holder, name)  # it comes with its own names, or stays that zone's
                continue
            if row is None or not self._is_home(holder, row) or self._further(holder):
                return False
            if self._command.through_step and (row.nlink == 1 or row.kind == _DIRECTORY):
                self._move_apart(holder, name)  # its own comes with another step, or never
            else:
                self._happen(ev.NameUnlinked(holder, *name))
        return True

    def _withdraw(self, capsule: bytes) -> None:
        """Deletes a replica; what is in a directory, and still shipped, hangs apart.

        What is in one that was deleted before, also with one above it, when its home was here, is gone with it.
        """
        row = self._ours(capsule)
        if row.kind == _DIRECTORY and not self._is_gone(capsule):
            inner = [
                (key[ID_BYTES:], EntryRow.decode(v).capsule) for key, v in self._tried.scan(ENTRY, capsule)
            ]
            for name, child in inner:  # also what is this store's own: it must not go with what others delete
                self._move_apart(child, (capsule, name))
        names = names_of(self._tried, capsule, row, [self._apart(capsule)])
        self._happen(*(ev.NameUnlinked(capsule, *name) for name in names))
        self._happen(ev.CapsuleWithdrawn(capsule, self._zone, self._command.through_position))

    def _is_gone(self, directory: bytes) -> bool:
        """Whether a directory was deleted, or is in one that was."""
        row = self._tried.capsule(directory)
        while row is not None and not row.deleted and directory != ROOT:
            directory = row.parent
            row = self._tried.capsule(directory)
        return row is None or bool(row.deleted)

    def _move_apart(self, child: bytes, name: Name) -> None:
        apart = self._apart(child)
        if _at(self._tried, *apart):
            self._happen(ev.NameUnlinked(child, *name))
        else:
            self._happen(ev.CapsuleRenamed(child, *name, *apart, b""))

    # --- copies ----------------------------------------------------------------------------------

    def _copied(self, copied: cmd.Copied) -> None:
        capsule = bytes(copied.capsule)
        if not self._next_part(copied):
            return
        commands = list(copied.commands)
        if copied.step == 0:
            first = commands.pop(0) if commands else None
            if (
                not isinstance(first, cmd.CreateCapsule)
                or first.capsule != capsule
                or first.parent
                or first.name
            ):
                raise _refuse(
                    Status.INVALID, "a copy begins with the creation of its capsule, without a name"
                )
            inherited = self._begin_copy(first)
            if inherited and not any(isinstance(each, cmd.PlaceCapsule) for each in commands):
                self._unname(capsule)
        for each in commands:
            if not isinstance(each, (*_CONTENT, cmd.PlaceCapsule)) or each.capsule != capsule:
                raise _refuse(
                    Status.INVALID, f"{type(each).__name__} is no part of a copy of {capsule_text(capsule)}"
                )
            if isinstance(each, cmd.PlaceCapsule):
                self._place(capsule, each.names, each.gone)
            else:
                self._change(each)
        home = zones.home_row(self._tried, capsule)
        position = copied.position if home is None or not copied.step else max(home.position, copied.position)
        going_on = (0, 0) if copied.last else (copied.position, copied.step + 1)
        self._happen(ev.CapsuleHomed(capsule, self._zone, position, *going_on, *copied.times))

    def _next_part(self, copied: cmd.Copied) -> bool:
        """Whether a part of a copy is the next one; False if a newer state came by another way."""
        if not (0 < copied.position <= U63_MAX and 0 <= copied.step < U32_MAX):
            raise _refuse(
                Status.INVALID, f"not a part of a copy: position {copied.position}, step {copied.step}"
            )
        row, home = self._tried.capsule(copied.capsule), zones.home_row(self._tried, copied.capsule)
        if row is not None:
            if (
                home is not None
                and home.here
                and home.zone == self._zone
                and not self._is_home(copied.capsule, row)
            ):
                return False  # its home was taken from there, which has not heard of it
            if copied.step == 0 and self._is_nobodys(bytes(copied.capsule), row, home):
                return True
            self._ours(copied.capsule)
        if copied.step == 0:
            reached = zones.reached(self._tried, self._zone, self._row, copied.capsule)
            unfinished = home is not None and home.copy != 0
            return row is None or copied.position > reached or (unfinished and copied.position == reached)
        if row is None or home is None or home.copy != copied.position or home.step > copied.step:
            return False
        if home.step < copied.step:
            raise _refuse(
                Status.STALE, f"part {home.step} of the copy of {capsule_text(copied.capsule)} is missing"
            )
        return True

    def _is_nobodys(self, capsule: bytes, row: CapsuleRow, home: zones.HomeRow | None) -> bool:
        """Whether a capsule is one that another zone had here once, and withdrew: its home may have moved since.

        Or one of a zone whose place this one took, that was something else there.
        """
        if home is not None and row.deleted and home.zone != self._zone and not home.moved:
            return True
        return self._inherits(capsule, row)

    def _inherits(self, capsule: bytes, row: CapsuleRow) -> bool:
        """Whether a capsule is still a replica of a zone whose place the shipping one took."""
        home = zones.home_of(self._tried, capsule, row)
        return any(number == home for number, _ in zones.heirs(self._tried, self._zone))

    def _empty(self, directory: bytes) -> None:
        """What an older replica of a directory held loses its name in it; what is still there comes with its own.

        Only where that comes in the same entry, or nobody saw any of it: see :meth:`_sweep` for what comes in steps.
        What has its home here, given or taken back, stays; so does what had it here when the directory was copied:
        it came back by another way since, or was given back and is on its way.
        """
        for name, value in [(key[ID_BYTES:], v) for key, v in self._tried.scan(ENTRY, directory)]:
            child = EntryRow.decode(value).capsule
            row, home = self._tried.capsule(child), zones.home_row(self._tried, child)
            if row is not None and not self._is_home(child, row):
                continue
            if home is not None and home.moved and (self._is_untold(home) or self._further(child)):
                continue
            self._ours(child)
            self._happen(ev.NameUnlinked(child, directory, name))

    def _sweep(self, *, taken_over: bool) -> None:
        """Deletes replicas a first copy did not name: their home has none of them any more, and need not know of them.

        Until then they keep their names, as what has not come again yet does: if the zone's place is taken half way,
        everything is there.
        """
        # A zone that took another one's place has the directories of that one, of which nothing is ever told.
        known = zones.zones(self._state)
        roots = {bytes(each) for number in known for each in (zone_root(number), zone_capsules(number))}
        found = (each for each in self._candidates(taken_over) if each not in roots)
        stale = [each for each in found if self._is_stale(each)]
        for directories in (False, True):
            for capsule in stale:
                row = self._tried.capsule(capsule)
                if row is None or (row.kind == _DIRECTORY) != directories:
                    continue
                if len(self._events) + row.nlink + row.entries > SWEEP_EVENTS_MAX:
                    return
                self._withdraw(capsule)

    def _candidates(self, taken_over: bool) -> Iterator[bytes]:
        """What may have its home in the shipping zone; with what that zone took over from this store, or without."""
        for capsule, value in self._state.scan(HOME, b""):
            home = zones.HomeRow.decode(value)
            if home.zone == self._zone and (taken_over or not self._was_ours(capsule, home)):
                yield capsule
        for capsule, _ in zones.sent_capsules(self._state, self._zone) if taken_over else ():
            known = zones.home_row(self._state, capsule)
            if (
                known is None or known.zone != self._zone
            ):  # or what this store had taken over from a third zone
                yield capsule

    def _was_ours(self, capsule: bytes, home: zones.HomeRow) -> bool:
        """Whether the zone took a capsule over from this store."""
        row, lost = self._state.capsule(capsule), self._row.lost
        if row is None or not lost:
            return False
        sent = zones.sent_as_of(self._state, self._zone, capsule)
        return row.ino <= self._row.returned or 0 < sent <= lost or 0 < home.moved <= lost

    def _is_stale(self, capsule: bytes) -> bool:
        """Whether a capsule has its home in the shipping zone, and had come less far than all that zone has."""
        row, home = self._state.capsule(capsule), zones.home_row(self._state, capsule)
        if row is None or row.deleted:
            return False
        if not self._is_home(capsule, row) or self._further(capsule):
            return False
        return home is None or not self._is_untold(home)

    def _is_untold(self, home: zones.HomeRow) -> bool:
        """Whether the zone has told nothing of a capsule since its home was given to it, and may not have taken it.

        What was given before the zone took this store's place has its home there, whether it was taken or not.
        """
        return home.moved > self._row.parted and not (home.here or home.position)

    def _begin_copy(self, command: cmd.CreateCapsule) -> bool:
        """Makes a capsule, or empties the one that is there; whether that was another zone's."""
        capsule = bytes(command.capsule)
        row = self._tried.capsule(capsule)
        if row is None:
            self._create(command)
            return False
        fixed = (int(command.kind), command.rdev, command.block_size, command.target)
        if fixed != (row.kind, row.rdev, row.block_size, row.target):
            raise _refuse(Status.STALE, f"capsule {capsule_text(capsule)} was something else before")
        nobodys = self._is_nobodys(capsule, row, zones.home_row(self._tried, capsule))
        if nobodys:
            self._happen(self._homed(capsule, 0))
        deleted = bool(row.deleted)
        if deleted:
            self._happen(*self._rule(cmd.Undelete(capsule, *self._apart(capsule))))
        if deleted or not self._command.through_step:
            self._empty(capsule)
        if row.size:
            self._happen(ev.RangeDeallocated(capsule, 0, row.size))
        if row.size != command.size:
            self._happen(*self._rule(cmd.Resize(capsule, command.size)))
        names = [key[ID_BYTES:] for key, _ in self._tried.scan(XATTR, capsule)]
        self._happen(*(ev.XattrRemoved(capsule, name) for name in names))
        self._happen(*self._rule(cmd.SetAttributes(capsule, command.mode, command.uid, command.gid)))
        self._happen(*self._rule(cmd.SetPolicy(capsule, command.policy or b"")))
        if command.key is not None and not (nobodys and command.key.key == row.key):
            self._happen(self._key(capsule, command.key))
        return nobodys


def _not_found_again(frame: cmd.StoredFrame) -> cmd.StoredFrame:
    """A frame that deduplication passes over: its hash is keyed by the other store, and nobody here has checked it.

    Encrypted ones stay as they are: only who has the home's key could find them, and their flag is authenticated.
    """
    flags = frame.record[_FLAGS_AT]
    if not flags & _SHARED or any(frame.record[_KEY_AT]):
        return frame
    record = frame.record[:_FLAGS_AT] + bytes((flags & ~_SHARED,)) + frame.record[_FLAGS_AT + 1 :]
    return cmd.StoredFrame(record, frame.stored)


def _directory(capsule: bytes, parent: bytes, name: bytes) -> cmd.CreateCapsule:
    return cmd.CreateCapsule(capsule, _DIRECTORY, 0o755, parent=parent, name=name, policy=b"")


def _directories(command: Any) -> list[bytes]:
    """Directories in which a command gives or takes names."""
    fields = ("parent", "new_parent")
    return [getattr(command, field) for field in fields if hasattr(command, field)]
