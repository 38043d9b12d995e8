"""Giving way to a zone that was promoted in this one's place: what was not shipped is set aside, and this zone follows.

For each capsule the two zones share there is a *fork*: the position of this log up to which the other zone has it.
What was done here after it is kept as a branch, ``/zones/.branches/ZONE-EPOCH``: a clone of each capsule whose content
or attributes differ, at the path it had, and what was made since in directories that have moved, itself.  Then each
such capsule is taken back to what it was at its fork: its content from a clone of that moment (no byte is copied),
names, attributes, policy and times.  So the new home has only to ship what it did since, and nothing has to go there.

All of it is one entry of the log (:class:`space.events.commands.LoseHome`), or none of it happens.  The branch stays in
this zone, whatever the policies of what is in it said: it is what the other zone decided to go on without.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs
import msgpack

from space._errors import ConflictError, CorruptionError, RefusedError, Status
from space._node.caller import Document
from space._node.federation_home import Walk
from space._node.federation_promote import ASKED_MAX, WHOLE, Arrival
from space.events import commands as cmd
from space.events.ids import BRANCHES, ID_BYTES, NIL, ROOT, CapsuleId, zone_root
from space.events.types import COPY_BYTES_MAX, Kind
from space.federation.scope import Moment, Scope, Slot
from space.federation.selection import Selection, moved
from space.policy.model import Sovereignty
from space.projections import content_map
from space.statemachine import zones as rows
from space.statemachine.homes import shared
from space.statemachine.tables import CAPSULE, ENTRY, HOME, POLICY, U32, CapsuleRow, Reader

if TYPE_CHECKING:
    from space._node.federation_zones import Zone
    from space._node.store import Store

ATTEMPTS: Final = 5
"""How often somebody may change something between looking and deciding; the last ones hold the store's lock."""

Ask = Callable[[Sequence[bytes]], list[Arrival]]
"""Asks the other zone about capsules."""

_NOT_ASKED: Final = Arrival()
"""Of a capsule nothing has happened to since all of it was there."""

log: Final = logging.getLogger("space.federation")


@attrs.frozen
class Promotion:
    """What the other zone says of its promotion.

    Attributes:
        epoch: which it was.
        position: of its log, from which on it has to be told what was done there: where it was promoted, or before.
        lanes: how far each lane of this zone had come there: everything up to that position.
    """

    epoch: int
    position: int
    lanes: dict[int, int]


@attrs.frozen
class _State:
    """A capsule at one moment, as far as it is to be what it was.

    ``extents`` are offset, length, skip, position and frames of each, as clones carry them.
    """

    row: CapsuleRow
    policy: bytes
    xattrs: dict[bytes, bytes]
    extents: list[list[Any]]
    names: list[Slot]

    @classmethod
    def of(
        cls, scope: Scope, extents: Callable[[bytes], Iterable[Any]], capsule: bytes, names: list[Slot]
    ) -> _State | None:
        row = scope.state.capsule(capsule)
        if row is None:
            return None
        policy = scope.state.get(POLICY, U32.pack(row.policy)) or b""
        parts = [] if row.kind != Kind.FILE else list(extents(capsule))
        packed = [[each.offset, each.length, each.skip, each.position, each.frames] for each in parts]
        return cls(row.copy(), policy, dict(scope.xattrs(capsule)), packed, names)

    def without(self, dead: Callable[[bytes], bool]) -> _State:
        """Without names in directories that are gone."""
        return attrs.evolve(self, names=[slot for slot in self.names if not dead(slot[0])])

    @property
    def attributes(self) -> tuple[int, int, int]:
        return self.row.mode, self.row.uid, self.row.gid

    @property
    def content(self) -> tuple[int, list[list[Any]]]:
        return self.row.size, self.extents

    @property
    def times(self) -> tuple[int, int, int, int]:
        return self.row.atime, self.row.mtime, self.row.ctime, self.row.btime

    def manifest(self, capsule: bytes) -> bytes:
        """The capsule alone as a clone carries it."""
        packed: bytes = msgpack.packb(
            [[capsule, self.row.encode(), [], list(self.xattrs.items()), self.extents]]
        )
        return packed


def names_of(scope: Scope, capsules: Iterable[bytes]) -> dict[bytes, list[Slot]]:
    """The names of many capsules: :meth:`Scope.names` for all of them, which looks through each directory once."""
    found: dict[bytes, list[Slot]] = {capsule: [] for capsule in capsules}
    known = {capsule: scope.state.capsule(capsule) for capsule in found}
    parents = {row.parent for row in known.values() if row is not None and not row.deleted}
    for parent in parents:
        for name, entry in scope.children(parent):
            if entry.capsule in found:
                found[entry.capsule].append((parent, name))
    named = {capsule for capsule, row in known.items() if row is not None and not row.deleted}
    scattered = {capsule for capsule in named if len(found[capsule]) < scope.count(capsule)}
    for key, value in scope.state.scan(ENTRY, b"") if scattered else ():
        capsule, slot = value[:ID_BYTES], (key[:ID_BYTES], key[ID_BYTES:])
        if capsule in scattered and slot not in found[capsule]:
            found[capsule].append(slot)
    return found


Pair = tuple[bytes, _State, _State]
"""A capsule, as it was at its fork and as it is now."""


def _is_elsewhere(pair: Pair) -> bool:
    """Whether a capsule has other names than it had."""
    _, then, now = pair
    return set(then.names) != set(now.names) or bool(then.row.deleted) != bool(now.row.deleted)


def _claims(
    scope: Scope, pairs: Iterable[Pair], forks: dict[bytes, int], theirs: Container[bytes]
) -> dict[Slot, bytes]:
    """What has each name in the other zone, of several that had it at their forks: the one that came there last.

    What has not changed since its fork, and has the name here, got it after all others.
    """
    claims: dict[Slot, bytes] = {}
    for capsule, then, _ in sorted(pairs, key=lambda pair: forks[pair[0]]):
        claims |= dict.fromkeys(then.names, capsule)
    for slot in claims:
        holder = scope.entry(slot)
        if holder is not None and holder in theirs and holder not in forks:
            claims[slot] = holder
    return claims


def follow(store: Store, zone: Zone, promotion: Promotion, ask: Ask) -> Document:
    """Gives up the home of what ``zone`` took over, and sets aside what it does not have.

    Returns:
        ``branch``, its path or None, and ``capsules``, the ids of what is set aside in it.

    Raises:
        ConflictError: things change faster than they can be set aside; or too many differ.
        RefusedError: bytes of the fork were reclaimed, so nothing can be taken back to it.
        UnavailableError: the other zone does not answer.
    """
    fork = _Fork(store, zone, promotion, ask)
    for attempt in range(ATTEMPTS):
        fork.look()
        if attempt < ATTEMPTS // 2:
            found = fork.lose()
        else:
            with store.alone():
                fork.look()
                found = fork.lose()
        if found is not None:
            log.warning(
                "zone %s took this one's place in epoch %d: %d capsules are set aside%s",
                zone.name,
                promotion.epoch,
                len(found["capsules"]),
                f" in {found['branch']}" if found["branch"] else "",
            )
            return found
    raise ConflictError(f"what zone {zone.name} took over changes faster than it can be set aside")


class _Fork:
    """What differs between this log and what another zone has of it."""

    def __init__(self, store: Store, zone: Zone, promotion: Promotion, ask: Ask) -> None:
        self._store = store
        self._zone = zone
        self._promotion = promotion
        self._ask = ask
        self._selection = Selection(zone.name)
        self._reached: dict[bytes, Arrival] = {}
        self._then: dict[bytes, tuple[int, _State | None]] = {}
        with store._read() as txn:
            known = rows.zones(txn)
            own = rows.own_zone(txn)
        row = known.get(zone.id)
        assert row is not None
        assert own is not None
        self._own, self._own_name = own[0], own[1].name
        self._row = row
        # Up to here everything came, by whatever lane; both were alike when this zone last took the other's place.
        self._all_there = max(row.promoted, min(promotion.lanes.values(), default=0))
        # But not of what third zones had taken over meanwhile, and this one took back later: from where it lost that.
        self._untold = {
            number: each.parted
            for number, each in known.items()
            if number != zone.id and each.taken and 0 < each.parted <= self._all_there < each.promoted
        }

    # --- looking ---------------------------------------------------------------------------------

    def look(self) -> None:
        """Asks what has to be asked, and looks up how everything that changed was at its fork."""
        with self._store._read() as txn:
            ids = self._unsure(txn)
        todo = [each for each in ids if each not in self._reached]
        for at in range(0, len(todo), ASKED_MAX):
            some = todo[at : at + ASKED_MAX]
            self._reached.update(zip(some, self._ask(some), strict=True))
        with self._store._read() as txn:
            forks = {
                capsule: fork
                for capsule, fork in self._changed(txn).items()
                if self._then.get(capsule, (None,))[0] != fork
            }
        self._look_back(forks)

    def _unsure(self, txn: Reader) -> list[bytes]:
        """Shared capsules that changed, or were sent, since all was there: how far they came, the other zone knows."""
        scope = self._scope(txn)
        sent = dict(rows.sent_capsules(txn, self._zone.id))
        found = []
        for capsule in shared(txn, self._zone.id, self._row):
            row = scope.state.capsule(capsule)
            there = self._came_all(txn, capsule)
            if row is not None and max(row.change, sent.get(capsule, 0)) > there:
                found.append(capsule)
            scope.forget()
        return found

    def _came_all(self, txn: Reader, capsule: bytes) -> int:
        """The position up to which everything came there that happened to a capsule here."""
        home = rows.home_row(txn, capsule)
        for zone, lost in self._untold.items():
            if 0 < rows.sent_as_of(txn, zone, capsule) < lost if home is None else home.zone == zone:
                return lost - 1
        return self._all_there

    def _fork_of(self, txn: Reader, capsule: bytes) -> int:
        """The position of this log at which the other zone has a capsule; 0 if it has all there can be.

        What came of it came in order, so that is the last position it came to, whatever lane brought it there.  One
        whose home came from that zone was there as it was then, also if it was given back since.  One whose home was
        given to it differs only if it was not taken: it has not changed here since, unless it was taken back with all
        the zone had.
        """
        home = rows.home_row(txn, capsule)
        reached = self._reached.get(capsule, _NOT_ASKED).position
        there = self._came_all(txn, capsule)
        if home is None or not home.moved or home.zone != self._zone.id:
            return max(there, reached)
        if self._scope(txn).moved(capsule):
            known = max(reached, home.since)
            untold = not home.position and reached < home.moved  # what that zone has told of, it took
            return max(there, known) if known and untold else 0
        return max(there, reached if reached < WHOLE else 0, home.moved if home.here else 0)

    def _changed(self, txn: Reader) -> dict[bytes, int]:
        """Shared capsules that the other zone has, and that changed after their fork, with it.

        And directories that were given to it and not taken: what was in one at its own fork may have left it since.
        """
        scope = self._scope(txn)
        found = {}
        for capsule in shared(txn, self._zone.id, self._row):
            row = scope.state.capsule(capsule)
            if row is None or not self._is_there(capsule):
                continue
            fork = self._fork_of(txn, capsule)
            given = row.kind == Kind.DIRECTORY and self._is_given(txn, capsule)
            if fork > 0 and (row.change > fork or given):
                found[capsule] = fork
            scope.forget()
        return found

    def _is_given(self, txn: Reader, capsule: bytes) -> bool:
        """Whether a capsule cannot be changed here because its home was given to the other zone."""
        home = rows.home_row(txn, capsule)
        return home is not None and home.moved > 0 and not home.here and self._scope(txn).moved(capsule)

    def _is_there(self, capsule: bytes) -> bool:
        return self._reached.get(capsule, _NOT_ASKED).there

    def _scope(self, state: Reader) -> Scope:
        return Scope(state, self._selection, self._own)

    def _look_back(self, forks: dict[bytes, int]) -> None:
        """How capsules were at their forks."""
        by_position: dict[int, list[bytes]] = {}
        for capsule, fork in forks.items():
            by_position.setdefault(fork, []).append(capsule)
        if not by_position:
            return
        with Walk(self._store, min(by_position)) as walk:
            for position in sorted(by_position):
                while walk.position < position:
                    walk.step()
                self._note(position, walk.now, by_position[position])

    def _note(self, position: int, moment: Moment, capsules: list[bytes]) -> None:
        scope = self._scope(moment.state)
        for capsule, names in names_of(scope, capsules).items():
            state = _State.of(scope, lambda c: moment.extents(c, 0, content_map.OFFSET_MAX), capsule, names)
            alive = None if state is None else state.without(lambda parent: not scope.alive(parent))
            self._then[capsule] = (position, alive)

    # --- deciding ----------------------------------------------------------------------------------

    def lose(self) -> Document | None:
        """Does it as of now; None if something has changed since :meth:`look`."""
        with self._store.still():
            seen = self._store.last
            with self._store._read() as txn:
                if any(each not in self._reached for each in self._unsure(txn)):
                    return None
                forks = self._changed(txn)
                if any(self._then.get(capsule, (None,))[0] != fork for capsule, fork in forks.items()):
                    return None
                name = f"{self._zone.name}-{self._promotion.epoch}"
                made = Setting(self._store, name, self._scope(txn), txn, self._selection)
                made.tops = (bytes(ROOT), bytes(zone_root(self._zone.id)))
                self._set_aside(made, txn, forks)
        cursors = [(0, lane, position) for lane, position in sorted(self._promotion.lanes.items())]
        kept = [each for each, arrival in self._reached.items() if not arrival.there]
        with self._store._read() as txn:
            sent = {capsule for capsule, _ in rows.sent_capsules(txn, self._zone.id)}
            kept = [each for each in kept if each in sent and txn.get(CAPSULE, each) is not None]
            given = [each for each in forks if self._is_given(txn, each)]
        command = cmd.LoseHome(
            self._zone.id,
            self._promotion.epoch,
            self._promotion.position,
            cursors,
            made.commands,
            kept,
            made.times,
            seen,
            given,
        )
        try:
            self._store.execute(command, actor=f"zone:{self._zone.name}")
        except ConflictError as error:
            if error.status is not Status.STALE:
                raise
            return None
        return {"branch": made.path, "capsules": [str(CapsuleId(each)) for each in made.aside]}

    def _as_there(
        self, scope: Scope, capsule: bytes, then: _State, now: _State, forks: Container[bytes]
    ) -> _State:
        """A capsule at its fork, as the other zone has it.

        One whose home came from that zone had its policy changed then, of which that zone may not have heard; and it
        kept the names it has in directories whose home is there, which nobody here gives or takes: not so in those that
        were given to that zone, and not taken (they are among ``forks``).
        """
        home = rows.home_row(scope.state, capsule)
        if home is None or not home.since or home.zone != self._zone.id:
            return then
        if not (home.here or scope.moved(capsule)):  # taken over since
            return then

        def theirs(parent: bytes) -> bool:
            return parent not in forks and scope.moved(parent)

        kept = [slot for slot in now.names if theirs(slot[0])]
        if kept or any(theirs(parent) for parent, _ in then.names):
            here = () if then.row.kind == Kind.DIRECTORY else then.names
            names = [*kept, *(slot for slot in here if not theirs(slot[0]))]
            then = attrs.evolve(then, names=names or now.names)
        if self._reached.get(capsule, _NOT_ASKED).position >= home.since:
            return then
        policy = self._selection.policy(scope.state, then.row.policy)
        before = moved(policy, self._own_name, self._zone.name)
        return attrs.evolve(then, policy=msgpack.packb(before.to_document()))

    def _times(self, capsule: bytes, then: _State) -> tuple[int, int, int, int]:
        """Times of a capsule in the other zone.

        Those of a directory are of names in it too, which come by whatever lane what they lead to comes by.
        """
        arrival = self._reached.get(capsule)
        if then.row.kind != Kind.DIRECTORY or arrival is None:
            return then.times
        return then.row.atime, arrival.mtime, arrival.ctime, then.row.btime

    def _with_taken_over(self, scope: Scope, theirs: set[bytes]) -> Iterator[bytes]:
        """Directories of the other zone with what this one took over from a third one since all was there.

        It has not changed by that, and the other zone was not told of it.
        """
        known = rows.zones(scope.state)
        taken = {each for each, row in known.items() if row.taken and row.promoted > self._all_there}
        found = [
            key
            for key, value in (scope.state.scan(HOME, b"") if taken - {self._zone.id} else ())
            if rows.HomeRow.decode(value).zone in taken and key not in theirs and not scope.moved(key)
        ]
        for names in names_of(scope, found).values():
            yield from (parent for parent, _ in names if parent in theirs)

    def _set_aside(self, made: Setting, txn: Reader, forks: dict[bytes, int]) -> None:
        theirs = {each for each in shared(txn, self._zone.id, self._row) if self._is_there(each)}
        pairs = []
        for capsule, names in names_of(made.scope, forks).items():
            then, now = self._then[capsule][1], made.state(capsule, names)
            if then is not None and now is not None:
                pairs.append((capsule, self._as_there(made.scope, capsule, then, now, forks), now))
        made.claims = _claims(made.scope, pairs, forks, theirs)
        for capsule, then, now in pairs:
            made.keep(capsule, then, now)
        made.clear([each for each in pairs if each[1].row.kind == Kind.DIRECTORY])
        older = (*self._with_taken_over(made.scope, theirs), *self._copied(made.scope, theirs))
        for directory in dict.fromkeys((*made.tops, *forks, *older)):
            made.take_new(directory, theirs, self._all_there)
        made.place([each for each in pairs if each[1].row.kind != Kind.DIRECTORY])
        for capsule, then, now in pairs:
            made.restore(capsule, then, now)
            made.times.append((capsule, self._times(capsule, then)))
        made.close()

    def _copied(self, scope: Scope, theirs: Iterable[bytes]) -> Iterator[bytes]:
        """Directories that have not changed since they came there, before all that was in them had."""
        for capsule in sorted(theirs):
            row = scope.state.capsule(capsule)
            late = row is not None and row.kind == Kind.DIRECTORY and row.change > self._all_there
            if late and not scope.moved(capsule) and scope.alive(capsule):
                yield capsule
            scope.forget()


class Setting:
    """The commands that set aside what differs, while they are made; ``scope`` is the present."""

    def __init__(self, store: Store, name: str, scope: Scope, txn: Reader, selection: Selection) -> None:
        self.commands: list[cmd.Command] = []
        self.times: list[tuple[bytes, tuple[int, int, int, int]]] = []
        self.aside: dict[bytes, None] = {}
        self._store = store
        self.scope = scope
        self._txn = txn
        self._name = name
        self._selection = selection
        self.tops: tuple[bytes, ...] = (bytes(ROOT),)
        self._branch = b""
        self._parking = b""
        self._mirrors: dict[bytes, bytes] = {}
        self._taken: set[Slot] = set()
        self._moved: set[bytes] = set()
        self._left: set[Slot] = set()
        self._parked: dict[bytes, Slot] = {}
        self._directories: list[Pair] = []
        self._given: set[Slot] = set()
        self.claims: dict[Slot, bytes] = {}
        """What gets a name that several have had."""

    @property
    def path(self) -> str | None:
        """Where the branch is, if there is anything in it."""
        return f"/zones/.branches/{self._name}" if self._is_used else None

    @property
    def _is_used(self) -> bool:
        return bool(self._taken - {(self._branch, b".parking")})

    def kind(self, capsule: bytes) -> int:
        row = self.scope.state.capsule(capsule)
        return 0 if row is None else row.kind

    def state(self, capsule: bytes, names: list[Slot]) -> _State | None:
        """A capsule as it is now."""
        whole = content_map.OFFSET_MAX
        return _State.of(self.scope, lambda c: content_map.extents(self._txn, c, 0, whole), capsule, names)

    # --- the branch --------------------------------------------------------------------------------

    def _top(self) -> bytes:
        if not self._branch:
            self._branch = self._directory(bytes(BRANCHES), self._name.encode())
        return self._branch

    def _directory(self, parent: bytes, name: bytes, mode: int = 0o755) -> bytes:
        made = bytes(self._store.new_id())
        self.commands.append(
            cmd.CreateCapsule(made, Kind.DIRECTORY, mode, parent=parent, name=name, policy=b"")
        )
        return made

    def mirror(self, directory: bytes) -> bytes:
        """The directory of the branch that stands for one of this store."""
        if directory in self.tops:
            return self._top()
        if directory not in self._mirrors:
            row = self.scope.state.capsule(directory)
            names = self.scope.names(directory)
            if row is None or not names or not self.scope.alive(directory):
                return self._top()
            parent = self.mirror(names[0][0])
            self._mirrors[directory] = self._directory(parent, self._free(parent, names[0][1]), row.mode)
        return self._mirrors[directory]

    def _free(self, directory: bytes, name: bytes) -> bytes:
        """A name nothing has yet in a directory of the branch: the one it had, with a number where that is taken."""
        found, number = name, 0
        while (directory, found) in self._taken:
            number += 1
            tail = b"~%d" % number
            found = name[: 255 - len(tail)] + tail
        self._taken.add((directory, found))
        return found

    def in_branch(self, capsule: bytes, slot: Slot | None) -> Slot:
        parent = self._top() if slot is None else self.mirror(slot[0])
        return parent, self._free(parent, str(CapsuleId(capsule)).encode() if slot is None else slot[1])

    def stays(self, capsule: bytes, row: CapsuleRow) -> None:
        """Lets nothing of the branch leave this zone."""
        policy = self.scope.state.get(POLICY, U32.pack(row.policy))
        if policy is None:
            return
        selection = Selection("")
        meant = selection.policy(self.scope.state, row.policy)
        here = attrs.evolve(
            meant,
            sovereignty=Sovereignty.ZONE,
            federation_targets=(),
            federation_priority=0,
            federation_sealed=False,
            federation_candidates=(),
            federation_shards=None,
            rpo_ns=None,
        )
        document = msgpack.packb(here.to_document())
        if document != policy:
            self.commands.append(cmd.SetPolicy(capsule, document))

    def take_new(self, directory: bytes, theirs: set[bytes], since: int) -> None:
        """Moves what came into a directory since a position, and would have been shipped, into the branch.

        Of one that was set aside before, and is the other zone's all the same, everything: it stays in a branch.
        """
        row = self.scope.state.capsule(directory)
        if row is None or row.kind != Kind.DIRECTORY:
            return
        aside = self._is_aside(directory)
        for name, entry in self.scope.children(directory):
            child = entry.capsule
            if child in theirs or not self._would_leave(child, since, aside=aside):
                continue
            slot = self.in_branch(child, (directory, name))
            self.commands.append(cmd.Rename(directory, name, *slot, replace=False))
            self._left.add((directory, name))
            if child not in self._moved:
                self._moved.add(child)
                self._keep_here(child, theirs)

    def _is_aside(self, directory: bytes) -> bool:
        """Whether a directory is in a branch."""
        at = directory
        while (row := self.scope.state.capsule(at)) is not None and row.parent not in (NIL, at):
            at = row.parent
            if at == BRANCHES:
                return True
        return False

    def _would_leave(self, capsule: bytes, since: int, *, aside: bool) -> bool:
        """Whether a capsule that changed since a position is this zone's, and would be shipped or was set ``aside``."""
        row = self.scope.state.capsule(capsule)
        if row is None or self.scope.moved(capsule):
            return False
        if max(row.change, self._taken_over(capsule)) <= since:
            return False
        return aside or self._selection.lane(self.scope.state, row.policy) is not None

    def _taken_over(self, capsule: bytes) -> int:
        """Where this zone became the home of a capsule that came from a third one, whose place it took; else 0."""
        home = rows.home_row(self.scope.state, capsule)
        zone = None if home is None else rows.zone_row(self.scope.state, home.zone)
        return zone.promoted if zone is not None and zone.taken else 0

    def _keep_here(self, capsule: bytes, theirs: set[bytes]) -> None:
        inside = (
            (child for _, child in self.scope.below(capsule)) if self.kind(capsule) == Kind.DIRECTORY else ()
        )
        for each in dict.fromkeys((capsule, *inside)):
            row = self.scope.state.capsule(each)
            if row is None or each in theirs:
                continue
            if row.kind != Kind.DIRECTORY:
                self.aside[each] = None
            self.stays(each, row)

    def keep(self, capsule: bytes, then: _State, now: _State) -> None:
        """Clones a capsule into the branch, if anything but its names and times differs."""
        same = (then.content, then.attributes, then.xattrs, then.policy) == (
            now.content,
            now.attributes,
            now.xattrs,
            now.policy,
        )
        if not same:
            self.clone(capsule, now.row, now.names)

    def clone(self, capsule: bytes, row: CapsuleRow, names: Sequence[Slot]) -> None:
        """Keeps a capsule as it is now, if it is a file that is there."""
        if row.deleted or row.kind == Kind.DIRECTORY:
            return
        copy = bytes(self._store.new_id())
        slot = self.in_branch(capsule, names[0] if names else None)
        self.commands.append(cmd.Clone(copy, capsule, *slot))
        self.stays(copy, row)
        self.aside[capsule] = None

    # --- names -------------------------------------------------------------------------------------

    def _park(self) -> bytes:
        if not self._parking:
            self._parking = self._directory(self._top(), self._free(self._top(), b".parking"))
        return self._parking

    def clear(self, directories: Sequence[Pair]) -> None:
        """Gets directories that are not where they were out of the way, and back those that were deleted."""
        self._directories = [each for each in directories if _is_elsewhere(each)]
        coming_back = {capsule for capsule, _, _ in self._directories}
        for _, _, now in self._directories:
            for parent, _ in now.names:
                self._revive(parent, coming_back)
        for back in (True, False):  # what was deleted first: others may be in it
            for capsule, _, now in self._directories:
                if bool(now.row.deleted) == back:
                    self._leave(capsule, now)

    def place(self, files: Sequence[Pair]) -> None:
        """Gives everything the names back it had; all are out of the way before the first gets its own."""
        seen = [(capsule, then, now.without(self._is_gone)) for capsule, then, now in files]
        moved = [each for each in seen if _is_elsewhere(each)]
        missing = [(capsule, self._leave_file(capsule, then, now)) for capsule, then, now in moved]
        for capsule, then in self._from_the_top([(capsule, then) for capsule, then, _ in self._directories]):
            self._arrive(capsule, then.names)
        for capsule, names in missing:
            self._arrive(capsule, names)
        for slot in self._parked.values():  # it had no name
            self.commands.append(cmd.Unlink(*slot, directory=None, recursive=True))

    def _deleted_with(self, directory: bytes) -> bytes | None:
        """The directory a directory was deleted with, if it was: itself, or one it is in."""
        at, row = directory, self.scope.state.capsule(directory)
        while row is not None and not row.deleted and at != ROOT:
            at = row.parent
            row = self.scope.state.capsule(at)
        return at if row is not None and row.deleted else None

    def _is_gone(self, directory: bytes) -> bool:
        """Whether a directory was deleted and does not come back: nobody sees names in it, which stay."""
        at = self._deleted_with(directory)
        return at is not None and at not in self._parked

    def _stays_gone(self, directory: bytes) -> bool:
        """Whether a directory is gone, itself or with one it is in, and is not taken back: the other zone has none."""
        back = {capsule for capsule, _, _ in self._directories}
        at, row = directory, self.scope.state.capsule(directory)
        while row is not None and not row.deleted and at != ROOT and at not in back:
            at = row.parent
            row = self.scope.state.capsule(at)
        return row is not None and bool(row.deleted) and at not in back

    def _revive(self, directory: bytes, coming_back: set[bytes]) -> None:
        """Brings a deleted directory back, for as long as it takes to get out of it what is not gone."""
        at = self._deleted_with(directory)
        if at is not None and at not in coming_back and at not in self._parked:
            self._parked[at] = (self._park(), str(CapsuleId(at)).encode())
            self.commands.append(cmd.Undelete(at, *self._parked[at]))

    def _leave(self, capsule: bytes, now: _State) -> None:
        place = (self._park(), str(CapsuleId(capsule)).encode())
        if now.row.deleted:
            self.commands.append(cmd.Undelete(capsule, *place))
        else:
            self.commands.append(cmd.Rename(*now.names[0], *place, replace=False))
            self._left.add(now.names[0])
        self._parked[capsule] = place

    def _leave_file(self, capsule: bytes, then: _State, now: _State) -> list[Slot]:
        """Takes names away it did not have; what it has to get."""
        extra = [slot for slot in now.names if slot not in then.names]
        if now.row.deleted or (extra and len(extra) == len(now.names)):
            self._leave(capsule, now)
            extra = extra[1:]
        self.commands += [cmd.Unlink(*slot) for slot in extra]
        self._left.update(extra)
        return [slot for slot in then.names if slot not in now.names]

    def _from_the_top(self, directories: list[tuple[bytes, _State]]) -> list[tuple[bytes, _State]]:
        """Directories, each after the one it goes into."""
        waiting = dict(directories)
        found: list[tuple[bytes, _State]] = []
        while waiting:
            ready = [
                each for each, then in waiting.items() if not then.names or then.names[0][0] not in waiting
            ]
            if not ready:
                raise CorruptionError("directories that were in each other", hint="run: space verify")
            found += [(each, waiting.pop(each)) for each in ready]
        return found

    def _arrive(self, capsule: bytes, names: Sequence[Slot]) -> None:
        for slot in names:
            if slot in self._given or self.claims.get(slot, capsule) != capsule or self._stays_gone(slot[0]):
                continue
            self._given.add(slot)
            self._vacate(slot, capsule)
            if capsule in self._parked:
                self.commands.append(cmd.Rename(*self._parked.pop(capsule), *slot, replace=False))
            else:
                self.commands.append(cmd.Link(capsule, *slot))
        if names and capsule in self._parked:
            place = self.in_branch(capsule, None)
            self.commands.append(cmd.Rename(*self._parked.pop(capsule), *place, replace=False))

    def _vacate(self, slot: Slot, capsule: bytes) -> None:
        """Moves what has a name now, and is this zone's alone, into the branch."""
        holder = self.scope.entry(slot)
        if holder is None or holder == capsule or slot in self._left:
            return
        self._left.add(slot)
        self.commands.append(cmd.Rename(*slot, *self.in_branch(holder, slot), replace=False))
        self.aside[holder] = None

    # --- everything else -----------------------------------------------------------------------------

    def restore(self, capsule: bytes, then: _State, now: _State) -> None:
        """Takes a capsule back, names apart."""
        if then.row.kind == Kind.FILE and then.content != now.content:
            self._restore_content(capsule, then, now)
        if then.policy != now.policy:
            self.commands.append(cmd.SetPolicy(capsule, then.policy))
        for name in now.xattrs.keys() - then.xattrs.keys():
            self.commands.append(cmd.RemoveXattr(capsule, name))
        for name, value in then.xattrs.items():
            if now.xattrs.get(name) != value:
                self.commands.append(cmd.SetXattr(capsule, name, value))
        if then.attributes != now.attributes:
            self.commands.append(cmd.SetAttributes(capsule, *then.attributes))

    def _restore_content(self, capsule: bytes, then: _State, now: _State) -> None:
        if then.row.key != now.row.key:
            raise RefusedError(
                f"capsule {CapsuleId(capsule)} was given another key since the other zone had it last",
                hint="give it back its policy of before, or remove it",
            )
        if now.row.size:
            self.commands.append(cmd.Deallocate(capsule, 0, now.row.size))
        if now.row.size != then.row.size:
            self.commands.append(cmd.Resize(capsule, then.row.size))
        if not then.extents:
            return
        copy, name = bytes(self._store.new_id()), b"content"
        park = self._park()
        position = max(part[3] for part in then.extents)
        self.commands.append(cmd.Clone(copy, capsule, park, name, position, then.manifest(capsule)))
        begin = then.extents[0][0]
        end = min(then.extents[-1][0] + then.extents[-1][1], then.row.size)
        for at in range(begin, end, COPY_BYTES_MAX):
            self.commands.append(cmd.CopyRange(capsule, at, copy, at, min(COPY_BYTES_MAX, end - at)))
        self.commands.append(cmd.Unlink(park, name))

    def close(self) -> None:
        """Leaves nothing in the branch but what is set aside."""
        if self._parking:
            self.commands.append(cmd.Unlink(self._branch, b".parking", directory=True))
        if self._branch and not self._is_used:
            self.commands.append(cmd.Unlink(bytes(BRANCHES), self._name.encode(), directory=True))
