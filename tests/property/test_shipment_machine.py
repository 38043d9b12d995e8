"""Two states and what goes between them: cut anywhere, doubled, reordered, by several streams at once."""

from __future__ import annotations

from typing import Final

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from space._errors import ConflictError, RefusedError, SpaceError
from space.events import commands as cmd
from space.events.commands import Receipt
from space.events.ids import zone_capsules, zone_root
from space.events.types import Kind
from space.statemachine import zones
from space.statemachine.decision import capsule_text
from space.statemachine.tables import CAPSULE, ENTRY, XATTR, CapsuleRow, EntryRow
from tests.state_support import MemoryWriter, fold_state
from tests.zone_support import HOME, ROOT_ID, State, capsule, write, zone_commands

pytestmark = pytest.mark.property

TREE: Final = bytes(zone_root(HOME))
APART: Final = bytes(zone_capsules(HOME))
NUMBERS: Final = range(1, 7)
MINE: Final = capsule(200)

numbers = st.sampled_from(NUMBERS)
names = st.sampled_from([b"a", b"b", b"c"])
parents = st.sampled_from([0, 0, 0, 1, 1, 2, 3, 4])
"""Directories: the root, the two there are from the beginning, and what may or may not be one."""
lanes = st.sampled_from([0, 1])
SETTLING: Final = len(NUMBERS)
"""Rounds of placing after which a tree that came in any order is the home's: one more directory fits each time."""


@attrs.frozen
class Moment:
    """What the home has after a batch: attributes, xattrs and names of each of its capsules."""

    rows: dict[bytes, CapsuleRow]
    xattrs: dict[bytes, dict[bytes, bytes]]
    names: dict[bytes, set[tuple[bytes, bytes]]]


def moment(state: State) -> Moment:
    """What a state has now."""
    rows = {key: CapsuleRow.decode(value) for key, value in state.rows.scan(CAPSULE, b"")}
    xattrs: dict[bytes, dict[bytes, bytes]] = {key: {} for key in rows}
    names: dict[bytes, set[tuple[bytes, bytes]]] = {key: set() for key in rows}
    for key, value in state.rows.scan(XATTR, b""):
        xattrs[key[:16]][key[16:]] = value
    for key, value in state.rows.scan(ENTRY, b""):
        names[EntryRow.decode(value).capsule].add((key[:16], key[16:]))
    return Moment(rows, xattrs, names)


def attributes(row: CapsuleRow) -> tuple[object, ...]:
    """What a replica has to have in common with its home's capsule; names count for times of directories."""
    times = (row.btime,) if row.kind == Kind.DIRECTORY else (row.btime, row.mtime)
    return row.kind, row.mode, row.uid, row.gid, row.size, times


class Shipments(RuleBasedStateMachine):
    """A home that does anything to six capsules and a zone that gets it by two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.home = State(zone_commands())
        self.zone = State(zone_commands())
        self.first = self.home.position
        self.moments: dict[int, Moment] = {self.first: moment(self.home)}
        self.batches: dict[int, list[cmd.Command]] = {}
        self.times: dict[int, int] = {}
        self.sent: list[cmd.ReceiveShipment] = []
        self.lanes = 1
        self.beside = False

    @initialize(lanes=st.integers(1, 2))
    def begin(self, lanes: int) -> None:
        """The zone has something of its own, and has been shipped nothing but where to begin."""
        self.lanes = lanes
        self.zone.done(cmd.CreateCapsule(MINE, parent=ROOT_ID, name=b"mine", size=3))
        for lane in range(self.lanes):
            self.deliver(cmd.ReceiveShipment(HOME, 0, lane, 0, self.first, 1, []))
        for number, kind, parent, name in (
            (1, Kind.DIRECTORY, ROOT_ID, b"a"),
            (2, Kind.DIRECTORY, capsule(1), b"a"),
            (3, Kind.FILE, ROOT_ID, b"b"),
            (4, Kind.FILE, capsule(1), b"b"),
        ):
            self.happen(cmd.CreateCapsule(capsule(number), kind, parent=parent, name=name))

    # --- the home --------------------------------------------------------------------------------

    def happen(self, *commands: cmd.Command) -> None:
        """One batch of the home, and what of it the streams will carry."""
        before = moment(self.home)
        batch = self.home.prepare(*commands)
        if not batch.entries:
            return
        events = [event for _, _, event in batch.linked()]
        now = self.moments[self.home.position] = moment(self.home)
        carried: list[cmd.Command] = []
        for command, outcome in zip(commands, batch.outcomes, strict=True):
            if isinstance(outcome, Receipt):
                carried += self.portable(command)
        changed = {event.capsule for event in events}
        changed |= {key for key in now.names if now.names[key] != before.names.get(key, set())}
        for each in sorted(changed):
            if each in now.rows and each != ROOT_ID:
                carried.append(cmd.PlaceCapsule(each, self.places(now, each)))
        self.batches[self.home.position] = carried
        self.times[self.home.position] = batch.time_ns

    def portable(self, command: cmd.Command) -> list[cmd.Command]:
        """A command of the home as it travels; names travel by placing."""
        if isinstance(command, cmd.CreateCapsule):
            return [attrs.evolve(command, parent=b"", name=b"", policy=b"p")]
        if isinstance(command, cmd.Link | cmd.Unlink | cmd.Rename | cmd.Undelete):
            return []
        return [command]

    def places(self, now: Moment, capsule_id: bytes) -> list[tuple[bytes, bytes]]:
        """The names of a capsule, as they are called in the zone."""
        return [
            (TREE if parent == ROOT_ID else parent, name) for parent, name in sorted(now.names[capsule_id])
        ]

    @rule(number=numbers, directory=st.booleans(), parent=parents, name=names)
    def create(self, number: int, directory: bool, parent: int, name: bytes) -> None:
        """A file or directory somewhere."""
        kind = Kind.DIRECTORY if directory else Kind.FILE
        place = capsule(parent) if parent else ROOT_ID
        self.happen(cmd.CreateCapsule(capsule(number), kind, parent=place, name=name))

    @rule(number=numbers, parent=parents, name=names)
    def link(self, number: int, parent: int, name: bytes) -> None:
        """One more name."""
        self.happen(cmd.Link(capsule(number), capsule(parent) if parent else ROOT_ID, name))

    @rule(
        old=parents,
        name=names,
        new=parents,
        new_name=names,
        exchange=st.booleans(),
    )
    def rename(self, old: int, name: bytes, new: int, new_name: bytes, exchange: bool) -> None:
        """A move, a replacement or an exchange."""
        places = [capsule(each) if each else ROOT_ID for each in (old, new)]
        self.happen(cmd.Rename(places[0], name, places[1], new_name, exchange=exchange))

    @rule(number=numbers, offset=st.integers(0, 9), again=st.booleans())
    def change(self, number: int, offset: int, again: bool) -> None:
        """A write, and in the same batch a new mode and perhaps a cut."""
        commands: list[cmd.Command] = [write(number, offset, b"content")]
        commands.append(cmd.SetAttributes(capsule(number), mode=0o600 + offset))
        self.happen(*commands, *([cmd.Resize(capsule(number), offset)] if again else []))

    @rule(number=numbers, name=names, value=st.binary(max_size=2), remove=st.booleans())
    def xattr(self, number: int, name: bytes, value: bytes, remove: bool) -> None:
        """An attribute set or removed."""
        self.happen(
            cmd.RemoveXattr(capsule(number), name) if remove else cmd.SetXattr(capsule(number), name, value)
        )

    # --- the way -----------------------------------------------------------------------------------

    def deliver(self, shipment: cmd.ReceiveShipment) -> Receipt | SpaceError:
        """Hands a shipment in: taken, known, or refused for a gap, as its stream stands; never anything else."""
        cursor = zones.cursor_row(self.zone.rows, HOME, 0, shipment.lane)
        here = (cursor.position, cursor.step)
        before = dict(self.zone.rows.rows)
        outcome = self.zone.outcome(shipment)
        if (shipment.through_position, shipment.through_step) <= here:
            assert isinstance(outcome, Receipt)
            assert outcome.repeated
        elif (shipment.from_position, shipment.from_step) != here:
            assert isinstance(outcome, ConflictError), outcome
        else:
            assert isinstance(outcome, Receipt), outcome
            assert not outcome.repeated
            self.sent.append(shipment)
            return outcome
        assert self.zone.rows.rows == before
        return outcome

    def next_of(self, lane: int) -> cmd.ReceiveShipment | None:
        """What a stream has to bring next: one batch, those before it with nothing for the stream passed over."""
        cursor = zones.cursor_row(self.zone.rows, HOME, 0, lane)
        for position in range(cursor.position + 1, self.home.position + 1):
            carried = [each for each in self.batches.get(position, []) if self.goes_by(each, lane)]
            if carried or position == self.home.position:
                time_ns = self.times[position]
                return cmd.ReceiveShipment(
                    HOME, 0, lane, cursor.position, position, time_ns, carried, cursor.step, 0
                )
        return None

    def goes_by(self, command: cmd.Command, lane: int) -> bool:
        """Whether a command travels in a stream: those of odd capsules in one, of even ones in the other."""
        number = getattr(command, "capsule", bytes(16))[-1]
        return bool(number % self.lanes == lane)

    @rule(lane=lanes, count=st.integers(1, 4))
    def ship(self, lane: int, count: int) -> None:
        """Some batches arrive, one after the other."""
        lane %= self.lanes
        for _ in range(count):
            shipment = self.next_of(lane)
            if shipment is not None:
                self.deliver(shipment)

    @rule(lane=lanes)
    def leave_out(self, lane: int) -> None:
        """A shipment that begins after what is still missing is refused."""
        shipment = self.next_of(lane % self.lanes)
        if shipment is not None:
            beyond = shipment.through_position
            outcome = self.deliver(attrs.evolve(shipment, from_position=beyond, through_position=beyond + 1))
            assert isinstance(outcome, ConflictError)

    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """Anything that arrived arrives again."""
        if self.sent:
            outcome = self.deliver(data.draw(st.sampled_from(self.sent)))
            assert isinstance(outcome, Receipt)
            assert outcome.repeated

    @rule(number=numbers, lane=lanes, parts=st.integers(1, 3))
    def copy(self, number: int, lane: int, parts: int) -> None:
        """A copy of a capsule as it is now comes beside the streams, in parts."""
        now, each = self.moments[self.home.position], capsule(number)
        row = now.rows.get(each)
        if row is None:
            return
        lane, self.beside = lane % self.lanes, True
        create = cmd.CreateCapsule(
            each, Kind(row.kind), row.mode, row.uid, row.gid, size=row.size, policy=b"p"
        )
        times = (row.atime, row.mtime, row.ctime, row.btime)
        last: list[cmd.Command] = [cmd.SetXattr(each, *item) for item in now.xattrs[each].items()]
        last.append(cmd.PlaceCapsule(each, self.places(now, each)))
        for step in range(parts):
            commands: list[cmd.Command] = [create] if step == 0 else []
            final = step == parts - 1
            part = cmd.Copied(
                each, self.home.position, step, final, [*commands, *(last if final else [])], times
            )
            cursor = zones.cursor_row(self.zone.rows, HOME, 0, lane)
            beside = cmd.ReceiveShipment(
                HOME, 0, lane, cursor.position, cursor.position, 1, [part], cursor.step, cursor.step + 1
            )
            assert isinstance(self.deliver(beside), Receipt)

    # --- the zone ----------------------------------------------------------------------------------

    @rule(number=numbers, name=names, kind=st.integers(0, 5))
    def meddle(self, number: int, name: bytes, kind: int) -> None:
        """Whatever the zone tries on a replica, or beside one, is refused and leaves no trace."""
        each = capsule(number)
        if self.zone.overlay.capsule(each) is None:
            return
        attempt: list[cmd.Command] = [
            cmd.SetXattr(each, name, b"x"),
            cmd.SetAttributes(each, mode=0),
            cmd.Link(MINE, TREE, b"mine"),
            cmd.CreateCapsule(capsule(100), parent=APART, name=name),
            cmd.Rename(ROOT_ID, b"mine", TREE, name),
            cmd.Unlink(APART, capsule_text(each).encode(), None, True),
        ]
        outcome = self.zone.outcome(attempt[kind])
        assert isinstance(outcome, SpaceError)
        assert isinstance(outcome, RefusedError) or kind == 5

    @invariant()
    def folds(self) -> None:
        """The zone's rows are what its log folds to, and its own capsule is as it made it."""
        again = MemoryWriter()
        fold_state(self.zone.batches, again)
        assert again.rows == self.zone.rows.rows
        mine = self.zone.overlay.capsule(MINE)
        if mine is not None:
            assert (mine.size, mine.nlink, mine.parent) == (3, 1, ROOT_ID)

    def teardown(self) -> None:
        """Once everything has arrived the zone has what the home has."""
        for lane in range(self.lanes):
            while (shipment := self.next_of(lane)) is not None:
                self.deliver(shipment)
        if self.beside or self.lanes > 1:
            self.settle()
        home, zone = self.moments[self.home.position], moment(self.zone)
        for each in map(capsule, NUMBERS):
            assert (each in home.rows) == (each in zone.rows)
            if each not in home.rows:
                continue
            assert attributes(home.rows[each]) == attributes(zone.rows[each])
            assert home.xattrs[each] == zone.xattrs[each]
            reached = zones.home_row(self.zone.rows, each)
            assert reached is not None
            assert reached.copy == 0
            assert {name for name in zone.names[each] if name[0] != APART} == set(self.places(home, each))
            assert len(zone.names[each]) == max(len(home.names[each]), 1)

    def settle(self) -> None:
        """What came before its directory, or while something newer had its name, is placed once more."""
        now = self.moments[self.home.position]
        for round_ in range(1, SETTLING + 1):
            position = self.home.position + round_
            for lane in range(self.lanes):
                cursor = zones.cursor_row(self.zone.rows, HOME, 0, lane)
                places = [
                    cmd.PlaceCapsule(each, self.places(now, each)) for each in now.rows if each != ROOT_ID
                ]
                commands = [each for each in places if self.goes_by(each, lane)]
                steps = (cursor.step, 0)
                self.deliver(
                    cmd.ReceiveShipment(HOME, 0, lane, cursor.position, position, 1, commands, *steps)
                )


Shipments.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestShipments = Shipments.TestCase
