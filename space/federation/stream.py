"""Streams: what a zone is sent next, and where it goes on after a break.

For one zone and one shard a reader translates the log, batch after batch (:mod:`space.federation.translate`), and hands
the parts to a :class:`Streams`; each lane sends its parts in order, and the highest lane that can goes first.  Lanes
overtake each other: what is read ahead waits here, up to :data:`WINDOW` commands without their content, and that is how
far.

**When a lane may overtake.**  Two parts may change places where neither changes what the other one touches (ids, names,
directories it relies on): the receiver then cannot tell the difference once both are there.  Otherwise the later one
waits for the earlier one, whatever their lanes.  This is how databases apply transactions in parallel, by their write
sets.

**Where to go on.**  Each lane has a cursor in the receiver's log, which its shipments move: position, step, and a note
of ours, set while copies beside a batch are under way.  Everything else follows from the log: reading goes on from
the least position of any cursor, and what a lane has had is left out.  So a lane has to have a cursor before others
go on: it gets one, without anything else, after everything before and before everything after its first part.

**Order on the wire.**  Shipments have to reach the receiver in the order :meth:`Streams.next` gave them, and nothing
after one that was refused.

No clock, no I/O: the caller says what time it is, and fetches stored bytes when asked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, final

import attrs
import msgpack

from space._errors import UsageError
from space.events import commands as cmd
from space.events.ids import ID_BYTES
from space.federation.portable import COMMAND_BYTES, Content, Copy, Portable, fetched, size
from space.federation.shipment import ENTRIES_MAX, Entry, Shipment
from space.federation.translate import Mark, Part, Step

WINDOW: Final = 100_000
"""Commands that wait to be sent, of all lanes: some 100 MB."""

SHIPMENT_BYTES: Final = 4 << 20
"""Bytes after which a shipment is full.  One that begins below it may be larger: a batch is never divided."""

CAPSULES: Final = 1 << 15
"""Capsules after which a shipment is full: with those of one more batch, what its record in our own log can name."""

PASSED_MAX: Final = 1000
"""Batches that mean nothing to a lane before its cursor is moved over them: what a start may have to read again."""

PASSED_SECONDS: Final = 5.0
"""Or so much time after it was last moved, if they were about anything but our own records."""


@attrs.frozen
class Cursor:
    """How far a lane has come at the receiver: position, steps beyond it, and our note of what is under way."""

    position: int
    step: int = 0
    resume: bytes = b""


@attrs.frozen
class Note:
    """What a cursor says while copies beside a batch are under way.

    Attributes:
        position: of the batch, or of the first copy.
        first: whether it is the first copy.
        mark: the last part that was sent.
    """

    position: int
    first: bool
    mark: Mark | None

    def encode(self) -> bytes:
        capsule, step = self.mark or (b"", 0)
        packed: bytes = msgpack.packb([self.position, self.first, capsule, step])
        return packed

    @classmethod
    def decode(cls, data: bytes) -> Note | None:
        """The note of a cursor; None for an empty one.

        Raises:
            UsageError: it is not one of ours.
        """
        if not data:
            return None
        try:
            position, first, capsule, step = msgpack.unpackb(data)
        except Exception:  # noqa: BLE001 - msgpack raises a dozen classes for what is not msgpack
            raise UsageError("a cursor with a note this program did not leave") from None
        numbers = type(position) is int and type(step) is int and type(first) is bool
        if not numbers or type(capsule) is not bytes or len(capsule) not in (0, ID_BYTES):
            raise UsageError("a cursor with a note this program did not leave")
        return cls(position, first, (capsule, step) if capsule else None)


@attrs.frozen
class Begin:
    """Where reading begins: after ``position``.

    With ``copying``, a first copy as of that position is under way; it is made again, from the same moment, and handed
    to :meth:`Streams.add` before anything that is read.
    """

    position: int
    copying: bool = False


def begin(cursors: Mapping[int, Cursor], origin: int = 0) -> Begin | None:
    """Where to go on for a zone with these cursors; None if it has nothing yet and a first copy has to be made.

    Args:
        cursors: lane → how far it has come.
        origin: where lanes begin that brought nothing yet: beyond 0 the zone has what was before from elsewhere.

    Raises:
        UsageError: a cursor holds what this program did not leave there.
    """
    notes = {lane: Note.decode(cursor.resume) for lane, cursor in cursors.items()}
    firsts = [note.position for note in notes.values() if note is not None and note.first]
    if firsts:
        return Begin(min(firsts), copying=True)
    positions = [cursor.position - (notes[lane] is not None) for lane, cursor in cursors.items()]
    if positions:
        return Begin(min(positions))
    return Begin(origin) if origin else None


@attrs.frozen
class Outgoing:
    """A shipment to be sent.

    Attributes:
        shipment: the shipment.
        capsules: what is in it, each with the position it is sent as of.
        withdrawn: what the zone is told to delete.
    """

    shipment: Shipment
    capsules: Sequence[tuple[bytes, int]]
    withdrawn: Sequence[bytes]


@attrs.define(eq=False)
class _Waiting:
    """A part that is not wholly sent."""

    part: Part
    after: frozenset[_Waiting]
    size: int
    opened: bool = False  # its commands are sent
    sent: bool = False  # its copies too
    mark: Mark | None = None  # where its copies go on
    _steps: Iterator[Step] | None = None
    _next: Step | None = None

    @property
    def free(self) -> bool:
        """Whether everything that has to come before it is sent."""
        return all(each.sent for each in self.after)

    def peek(self) -> Step | None:
        """The next step of its copies, if there is one."""
        if self._steps is None:
            self._steps = self.part.copies(self.mark)
            self._next = next(self._steps, None)
        return self._next

    def take(self) -> Step:
        """The next step; there has to be one."""
        step = self.peek()
        assert step is not None
        assert self._steps is not None
        self.mark = step.mark
        self._next = next(self._steps, None)
        return step

    def rewind(self, cursor: Cursor) -> None:
        """Goes back to where a cursor of its lane says that it is."""
        note = Note.decode(cursor.resume)
        if note is not None and cursor.position == self.part.position:
            self.restore(opened=True, sent=False, mark=note.mark)
        else:
            self.restore(opened=False, sent=False, mark=None)

    def restore(self, opened: bool, sent: bool, mark: Mark | None) -> None:
        """Goes back to an earlier point."""
        self.opened, self.sent, self.mark = opened, sent, mark
        self._steps = self._next = None

    def note(self) -> bytes:
        """What the cursor says when this much is sent."""
        if not self.part.has_copies or (self.opened and self.peek() is None and not self.part.first):
            return b""
        return Note(self.part.position, self.part.first, self.mark).encode()


@attrs.define
class _Lane:
    """A lane: what the receiver has confirmed, what was sent, what waits."""

    cursor: Cursor
    sent: tuple[int, int]
    passed_at: float = float("-inf")
    parts: deque[_Waiting] = attrs.field(factory=deque)
    """Not confirmed, oldest first; those that are sent come first."""
    _rest: deque[_Waiting] = attrs.field(factory=deque)
    """The last of them: none that is not sent is missing."""

    @property
    def next(self) -> _Waiting | None:
        """The oldest that is not sent."""
        rest = self._rest
        while rest and rest[0].sent:
            rest.popleft()
        return rest[0] if rest else None

    def add(self, waiting: _Waiting) -> None:
        self.parts.append(waiting)
        self._rest.append(waiting)

    def rewound(self) -> None:
        """Some may count as not sent again."""
        self._rest = deque(each for each in self.parts if not each.sent)


@final
class Streams:
    """What one zone is sent of one shard.

    Args:
        home, zone: ids of both zones.
        shard: number of the shard.
        cursors: how far each lane has come at the receiver.
        begin: where reading begins.
        origin: see :func:`begin`.
        epoch: how often one of the two was promoted in the other's place.
    """

    def __init__(
        self,
        home: bytes,
        zone: bytes,
        shard: int,
        cursors: Mapping[int, Cursor],
        begin: Begin,
        *,
        origin: int = 0,
        epoch: int = 0,
    ) -> None:
        self._zones = (home, zone)
        self._shard = shard
        self._epoch = epoch
        self._origin = origin
        self._lanes = {
            lane: _Lane(cursor, (cursor.position, cursor.step)) for lane, cursor in cursors.items()
        }
        self._writers: dict[bytes, _Waiting] = {}
        self._readers: dict[bytes, dict[_Waiting, None]] = {}
        self._alone: _Waiting | None = None
        self._flight: deque[tuple[int, Cursor]] = deque()
        self._waiting = 0
        self._loud: set[int] = set()  # lanes that passed over something worth telling
        self.position = begin.position
        """The last batch that was read."""
        self._time_ns = 0

    # --- reading -----------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether enough waits, and nothing more should be read for now."""
        return self._waiting >= WINDOW

    def add(self, parts: Iterable[Part], position: int, time_ns: int, *, quiet: bool = False) -> None:
        """Takes what a batch means; batches come in order, and a first copy before the first of them.

        ``quiet`` batches are only our own records: nobody needs to be told that they were passed.
        """
        self.position, self._time_ns = position, time_ns
        found = list(parts)
        for part in found:
            if part.lane not in self._lanes:
                self._open(part)
        for part in found:
            self._wait(self._lanes[part.lane], part)
        if not quiet:
            self._loud.update(self._lanes)

    def _open(self, part: Part) -> None:
        """Begins a lane: with its first copy, or with a cursor right before the first batch that means something."""
        lane = self._lanes[part.lane] = _Lane(Cursor(self._origin), (self._origin, 0))
        if not part.first and part.position - 1 > self._origin:
            self._wait(lane, Part(part.position - 1, part.time_ns, part.lane, (), alone=True))

    def _wait(self, lane: _Lane, part: Part) -> None:
        cursor = lane.cursor
        under_way = Note.decode(cursor.resume)
        at = under_way.position if under_way is not None else cursor.position + 1
        if part.position < at:
            return  # the receiver has it
        waiting = _Waiting(part, self._before(part), _weight(part))
        waiting.rewind(cursor)
        self._waiting += waiting.size
        lane.add(waiting)
        self._remember(waiting)

    def _before(self, part: Part) -> frozenset[_Waiting]:
        """What has to be sent before a part, lanes' own order apart."""
        if part.alone:
            return frozenset(each for lane in self._lanes.values() for each in lane.parts)
        found = {self._alone} if self._alone is not None else set()
        for key in part.writes:
            if (writer := self._writers.get(key)) is not None:
                found.add(writer)
            found.update(self._readers.get(key, ()))
        for key in part.reads:
            if (writer := self._writers.get(key)) is not None:
                found.add(writer)
        return frozenset(found)

    def _remember(self, waiting: _Waiting) -> None:
        part = waiting.part
        for key in part.writes:
            self._writers[key] = waiting
            self._readers.pop(key, None)
        for key in part.reads:
            self._readers.setdefault(key, {})[waiting] = None
        if part.alone:
            self._alone = waiting

    def _forget(self, waiting: _Waiting) -> None:
        """A part is confirmed: nothing waits for it any more."""
        self._waiting -= waiting.size
        waiting.after = frozenset()  # else each would keep all before it in memory
        for key in waiting.part.writes:
            if self._writers.get(key) is waiting:
                del self._writers[key]
        for key in waiting.part.reads:
            readers = self._readers.get(key, {})
            readers.pop(waiting, None)
            if not readers:
                self._readers.pop(key, None)
        if self._alone is waiting:
            self._alone = None

    # --- sending -----------------------------------------------------------------------------------

    def next(self, content: Content, now: float) -> Outgoing | None:
        """The next shipment, or None while there is nothing to send; ``now`` counts seconds.

        Raises:
            SpaceError: stored bytes cannot be fetched; nothing counts as sent.
        """
        for number in sorted(self._lanes, reverse=True):
            if (
                (waiting := self._lanes[number].next) is not None
                and waiting.part.first
                and not waiting.opened
            ):
                return self._fill(number, content, opening=True)
        for number in sorted(self._lanes, reverse=True):
            if (waiting := self._lanes[number].next) is not None and waiting.free:
                return self._fill(number, content)
        return self._pass(now)

    def _fill(self, number: int, content: Content, *, opening: bool = False) -> Outgoing:
        lane = self._lanes[number]
        filled = _Filling(lane.sent)
        try:
            while (waiting := lane.next) is not None and (opening or waiting.free) and not filled.full:
                if not waiting.opened:
                    filled.open(waiting, content)
                elif waiting.peek() is not None:
                    filled.step(waiting, content)
                else:
                    filled.close(waiting)
                waiting.sent = waiting.opened and not filled.entries[-1].resume
                if opening:
                    break
        except BaseException:
            for each, was in filled.touched.items():
                each.restore(*was)
            lane.rewound()
            raise
        return self._send(number, filled)

    def _send(self, number: int, filled: _Filling) -> Outgoing:
        lane = self._lanes[number]
        last = filled.entries[-1]
        shipment = Shipment(*self._zones, self._shard, number, self._epoch, *lane.sent, tuple(filled.entries))
        lane.sent = (last.through_position, last.through_step)
        self._flight.append((number, Cursor(*lane.sent, last.resume)))
        return Outgoing(shipment, list(filled.capsules), list(filled.withdrawn))

    def _pass(self, now: float) -> Outgoing | None:
        """Moves the cursor of a lane over what means nothing to it."""
        for number, lane in self._lanes.items():
            behind = self.position - lane.sent[0]
            late = now - lane.passed_at >= PASSED_SECONDS and number in self._loud
            if lane.next is None and behind > 0 and (late or behind >= PASSED_MAX):
                lane.passed_at = now
                self._loud.discard(number)
                filled = _Filling(lane.sent)
                filled.entries.append(Entry(self.position, 0, self._time_ns, ()))
                return self._send(number, filled)
        return None

    # --- answers -----------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Shipments that were sent and not confirmed."""
        return len(self._flight)

    def acknowledge(self, lane: int, position: int, step: int) -> None:
        """The oldest shipment under way is durable at the receiver.

        Raises:
            UsageError: the receiver says that it has come to where that shipment does not lead.
        """
        if not self._flight or (lane, position, step) != (
            self._flight[0][0],
            self._flight[0][1].position,
            self._flight[0][1].step,
        ):
            raise UsageError(
                f"the zone stands at position {position}, step {step} of lane {lane}: not as it was sent"
            )
        _, cursor = self._flight.popleft()
        self._confirm(self._lanes[lane], cursor)

    def _confirm(self, lane: _Lane, cursor: Cursor) -> None:
        lane.cursor = cursor
        while lane.parts and lane.parts[0].sent:
            position = lane.parts[0].part.position
            if position > cursor.position or (position == cursor.position and cursor.resume):
                return
            self._forget(lane.parts.popleft())

    def reconnected(self, cursors: Mapping[int, Cursor]) -> bool:
        """Goes on from where the receiver says it is; False if that is where only a new reading leads to."""
        for number, lane in self._lanes.items():
            told = cursors.get(number, Cursor(self._origin))
            flight = [cursor for of, cursor in self._flight if of == number]
            if told not in (lane.cursor, *flight):
                return False
        if not cursors.keys() <= self._lanes.keys():
            return False
        self._flight.clear()
        for number, lane in self._lanes.items():
            cursor = cursors.get(number, Cursor(self._origin))
            self._confirm(lane, cursor)
            lane.sent = (cursor.position, cursor.step)
            for waiting in lane.parts:
                waiting.rewind(cursor)
            lane.rewound()
        return True

    # --- how far -----------------------------------------------------------------------------------

    @property
    def lanes(self) -> list[int]:
        """Lanes there are, highest first."""
        return sorted(self._lanes, reverse=True)

    def confirmed(self, lane: int) -> int:
        """Up to where the receiver has everything of a lane that it is to have, of what was read."""
        found = self._lanes[lane]
        if not found.parts:
            return self.position
        return max(found.cursor.position - bool(found.cursor.resume), self._origin)

    def waiting_bytes(self, lane: int) -> int:
        """About how many bytes wait to be sent or confirmed; first copies, whose size nobody knows, count nothing."""
        return sum(size(command) for each in self._lanes[lane].parts for command in each.part.commands)


@attrs.define
class _Filling:
    """A shipment while it is filled."""

    at: tuple[int, int]
    entries: list[Entry] = attrs.field(factory=list)
    capsules: dict[tuple[bytes, int], None] = attrs.field(factory=dict)
    withdrawn: dict[bytes, None] = attrs.field(factory=dict)
    touched: dict[_Waiting, tuple[bool, bool, Mark | None]] = attrs.field(factory=dict)
    _bytes: int = 0

    @property
    def full(self) -> bool:
        many = len(self.entries) >= ENTRIES_MAX or len(self.capsules) >= CAPSULES
        return many or self._bytes >= SHIPMENT_BYTES

    def open(self, waiting: _Waiting, content: Content) -> None:
        """What happens at once."""
        self._touch(waiting)
        part = waiting.part
        commands = fetched(part.commands, content)
        waiting.opened = True
        self.at = (part.position, 0)
        self._add(part.time_ns, part.commands, commands, waiting.note())
        for capsule in part.capsules:
            self._send(capsule, part.position)
        self.withdrawn |= dict.fromkeys(part.withdrawn)
        for capsule in part.withdrawn:
            self.capsules.pop((capsule, part.position), None)

    def step(self, waiting: _Waiting, content: Content) -> None:
        """A step of what is copied beside."""
        self._touch(waiting)
        upcoming = waiting.peek()
        assert upcoming is not None
        commands = fetched(upcoming.commands, content)
        step = waiting.take()
        self.at = (self.at[0], self.at[1] + 1)
        self._add(step.time_ns, step.commands, commands, waiting.note())
        for each in step.commands:
            if isinstance(each, Copy):
                self._send(each.capsule, each.position)
            elif isinstance(each, cmd.WithdrawCapsule):
                self.withdrawn[each.capsule] = None

    def close(self, waiting: _Waiting) -> None:
        """The end of a first copy: the cursor no longer says that it is under way."""
        self._touch(waiting)
        self.at = (self.at[0], self.at[1] + 1)
        self._add(waiting.part.time_ns, (), [], b"")

    def _send(self, capsule: bytes, position: int) -> None:
        self.capsules[capsule, position] = None
        self.withdrawn.pop(capsule, None)

    def _touch(self, waiting: _Waiting) -> None:
        self.touched.setdefault(waiting, (waiting.opened, waiting.sent, waiting.mark))

    def _add(
        self, time_ns: int, portable: Iterable[Portable], commands: Sequence[cmd.Command], resume: bytes
    ) -> None:
        self._bytes += sum(map(size, portable), COMMAND_BYTES)
        self.entries.append(Entry(*self.at, time_ns, commands, resume))


def _weight(part: Part) -> int:
    """Commands a part keeps in memory, and as much for what it touches."""
    return 1 + len(part.commands) + (len(part.writes) + len(part.reads)) // 8
