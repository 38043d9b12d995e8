"""The first copy: all a zone may have of a shard, as of one position, for a zone that has nothing yet.

It is the start of each lane's stream, and so goes by the same cursors: a lane is opened at the position of the copy,
all lanes before anything is copied, and then what is in it comes step by step.  The highest lane begins with what an
earlier life of the zone left there and is shipped no longer, and with the directories of all lanes, from the top; so
every other capsule gets its names when it comes.  The lowest comes last, and ends with the homes that were given to the
zone and that it has told nothing of (it may have come to where they were given, or not), and with the word that this
was all: what the zone has of an earlier life, and this copy did not name, goes then and not before.

The order of the steps depends on nothing but the moment: after a break, the same moment gives the same steps, and the
copy goes on behind the last one that came.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

from space.events import commands as cmd
from space.events.ids import ID_BYTES, ROOT
from space.federation.portable import Copy, Portable
from space.federation.scope import DIRECTORY, Moment, Scope, Slot
from space.federation.translate import (
    STEP_PARTS,
    Batch,
    Copies,
    Mark,
    Part,
    Step,
    Translator,
    lane_key,
    resumed,
    steps,
    timed,
)
from space.statemachine import zones
from space.statemachine.tables import CAPSULE, ENTRY, POLICY, U32, CapsuleRow

_WITHDRAWN: Final = 1 << 31
_GIVEN: Final = _WITHDRAWN + 1
_SWEPT: Final = _WITHDRAWN + 2
"""Numbers of steps that withdraw, that give homes, and of the last one, in marks: no copy has so many parts."""


def initial(
    translator: Translator,
    moment: Moment,
    position: int,
    time_ns: int,
    sent: Iterable[bytes] = (),
    *,
    sweep: bool = True,
) -> list[Part]:
    """The first part of every lane, highest first; none if policies allow the zone nothing.

    Args:
        translator: for the zone.
        moment: the home at ``position``; held until everything is copied.
        position: where the copy is of, and the streams begin.
        time_ns: when that was.
        sent: what the zone was sent in an earlier life, and may have still.
        sweep: whether the zone knows :class:`space.events.commands.SweepReplicas`.
    """
    scope = translator.scope(moment)
    selection = translator.selection
    numbers = (U32.unpack(key)[0] for key, _ in moment.state.scan(POLICY, b""))
    lanes = {lane for number in numbers if (lane := selection.lane(moment.state, number)) is not None}
    left = sorted(capsule for capsule in sent if scope.lane(capsule) is None)
    if left and not lanes:
        lanes = {0}
    top, lowest = max(lanes, default=0), min(lanes, default=0)
    return [
        Part(
            position,
            time_ns,
            lane,
            (),
            copies=_copies(
                translator,
                moment,
                (position, time_ns),
                lane,
                left if lane == top else None,
                last=lane == lowest,
                sweep=sweep and lane == lowest,
            ),
            writes=frozenset([lane_key(lane)]),
            reads=frozenset(lane_key(each) for each in lanes if lane == lowest < each),
            alone=lane == top,
            first=True,
        )
        for lane in sorted(lanes, reverse=True)
    ]


def _copies(
    translator: Translator,
    moment: Moment,
    at: tuple[int, int],
    lane: int,
    left: list[bytes] | None,
    *,
    last: bool,
    sweep: bool,
) -> Copies:
    """What comes in one lane; ``left`` is what has to go first, in the highest lane; the ``last`` one gives homes."""
    first = _First(translator, moment, at, lane)

    def made(after: Mark | None) -> Iterator[Step]:
        done = 0 if after is None or after[1] < _GIVEN else after[1]
        given = after[0] if after is not None and done == _GIVEN else None
        if not done:
            yield from copied(after)
        if last and done < _SWEPT:
            yield from first.homes(given, at[1])
        if sweep and done < _SWEPT:
            yield Step([cmd.SweepReplicas(first.epoch)], (translator.home, _SWEPT), at[1])

    def copied(after: Mark | None) -> Iterator[Step]:
        if left is None:
            yield from steps(resumed(first.others(), after))
            return
        if after is None or after[1] == _WITHDRAWN:
            yield from _withdrawals(left, after, at[1])
            after = None
        yield from steps(resumed(first.everything(), after))

    return made


def _withdrawals(left: list[bytes], after: Mark | None, time_ns: int) -> Iterator[Step]:
    rest = [capsule for capsule in left if after is None or capsule > after[0]]
    for start in range(0, len(rest), STEP_PARTS):
        some = rest[start : start + STEP_PARTS]
        commands: list[Portable] = [cmd.WithdrawCapsule(capsule) for capsule in some]
        yield Step(commands, (some[-1], _WITHDRAWN), time_ns)


class _First:
    """The capsules of one lane at one moment, in the order in which they are copied."""

    def __init__(self, translator: Translator, moment: Moment, at: tuple[int, int], lane: int) -> None:
        self._translator = translator
        self._moment = moment
        self._position, self._time_ns = at
        self._lane = lane
        self._scope: Scope | None = None
        self._several: dict[bytes, list[Slot]] | None = None
        self._given = zones.given_to(translator.scope(moment).state, translator.zone)

    @property
    def epoch(self) -> int:
        """How often one of the two zones had been promoted in the other's place."""
        row = zones.zone_row(self._moment.state, self._translator.zone)
        return 0 if row is None else row.epoch

    def everything(self) -> Iterator[tuple[Copy, int]]:
        """The directories of all lanes, and what else is in this one."""
        scope = self._fresh()
        for parent, name, child in self._below_root(scope, directories=True):
            if scope.lane(child) is not None:
                yield from self._copied(scope, child, [(parent, name)])
        yield from self.others()

    def others(self) -> Iterator[tuple[Copy, int]]:
        """What is in this lane and is no directory."""
        scope = self._fresh()
        for parent, name, child in self._below_root(scope, directories=False):
            if self._is_other(scope, child):
                names = self._names(scope, child, (parent, name))
                if names[0] == (parent, name):
                    yield from self._copied(scope, child, names)
        yield from self._cut_off(scope)
        for capsule, data in self._moment.state.scan(CAPSULE, b""):
            row = CapsuleRow.decode(data)
            if not (row.nlink or row.deleted or row.kind == DIRECTORY) and scope.lane(capsule) == self._lane:
                yield from self._copied(scope, capsule, [])

    def _cut_off(self, scope: Scope) -> Iterator[tuple[Copy, int]]:
        """What is alive and has names only in directories that are not (:meth:`space.federation.scope.Scope.alive`)."""
        for key, value in self._moment.state.scan(ENTRY, b""):
            slot, capsule = (key[:ID_BYTES], key[ID_BYTES:]), value[:ID_BYTES]
            if not scope.alive(slot[0]) and scope.hinted(capsule) and self._is_other(scope, capsule):
                slots = scope.names(capsule)
                if slots[0] == slot and not any(scope.alive(parent) for parent, _ in slots):
                    yield from self._copied(scope, capsule, [])
            scope.forget()

    def _is_other(self, scope: Scope, capsule: bytes) -> bool:
        return scope.lane(capsule) == self._lane and scope.row(capsule).kind != DIRECTORY

    def homes(self, after: bytes | None, time_ns: int) -> Iterator[Step]:
        """Homes that were given to the zone, from the one after a capsule on."""
        scope = self._fresh()
        zone = zones.zone_row(scope.state, self._translator.zone)
        given = sorted(capsule for capsule in self._given if scope.lane(capsule) is not None)
        rest = [capsule for capsule in given if after is None or capsule > after]
        for start in range(0, len(rest) if zone is not None else 0, STEP_PARTS):
            assert zone is not None
            some = rest[start : start + STEP_PARTS]
            commands = [self._translator.handed_over(scope, capsule, zone.epoch) for capsule in some]
            yield Step(commands, (some[-1], _GIVEN), time_ns)

    def _fresh(self) -> Scope:
        """A scope that has remembered nothing yet, but shows what is given to the zone."""
        scope = self._translator.scope(self._moment)
        for capsule in self._given:
            lane = self._translator.selection.lane(scope.state, scope.row(capsule).policy)
            if lane is not None and scope.alive(capsule):
                scope.show(capsule, lane)
        return scope

    def _below_root(self, scope: Scope, *, directories: bool) -> Iterator[tuple[bytes, bytes, bytes]]:
        """Directories, or everything else, with a name each, from the top: (directory, name, capsule)."""
        queue = deque([bytes(ROOT)])
        while queue:
            parent = queue.popleft()
            for name, child in scope.children(parent):
                if child.kind == DIRECTORY:
                    queue.append(child.capsule)
                if (child.kind == DIRECTORY) == directories:
                    yield parent, name, child.capsule
            scope.forget()

    def _names(self, scope: Scope, capsule: bytes, slot: Slot) -> list[Slot]:
        if scope.row(capsule).nlink == 1:
            return [slot]
        if self._several is None:
            self._several = self._several_names(scope)
        return self._several[capsule]

    def _several_names(self, scope: Scope) -> dict[bytes, list[Slot]]:
        """Names of all capsules that have several: one look through all names, some 200 bytes for each of these."""
        found: dict[bytes, list[Slot]] = {}
        for key, value in self._moment.state.scan(ENTRY, b""):
            capsule, parent = value[:ID_BYTES], key[:ID_BYTES]
            row = scope.state.capsule(capsule)
            if row is not None and row.nlink > 1 and row.kind != DIRECTORY and scope.alive(parent):
                found.setdefault(capsule, []).append((parent, key[ID_BYTES:]))
            scope.forget()
        return found

    def _copied(self, scope: Scope, capsule: bytes, names: list[Slot]) -> Iterator[tuple[Copy, int]]:
        # What was given to the zone is as it was then: if the zone took it, it did the rest itself.
        at = Batch(self._given.get(capsule, self._position), self._time_ns, ())
        yield from timed(self._translator.copier, scope, self._moment, capsule, names, at)
