"""Translation: one batch of the home's log, as what one zone is to be told of it.

What a zone sees of a moment is a function of the home's state there (:mod:`space.federation.scope`), so a batch is
translated from the states before and after it: a capsule that is in scope only after it *joins* and is copied as it is
then; one that was only before *leaves* and is withdrawn; for one that *stays*, writes travel as writes, and names,
attributes and policies as what they became.  So whatever commands the batch came from, and however they crossed the
border of what is shipped, the receiver is at its end where the home is.

Nothing here depends on how far the zone has come: translating a batch again gives the same, which is what going on
after a break rests on.  Commands of capsules in different lanes are different parts of the batch (:class:`Part`); each
says what it touches, so that lanes overtake each other only where it makes no difference
(:mod:`space.federation.stream`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Final, final

import attrs
import msgpack
from blake3 import blake3

from space._errors import NotFoundError, RefusedError, SpaceError
from space.events import commands as cmd
from space.events import types as ev
from space.events.ids import ID_BYTES, ROOT
from space.events.registry import NAME_BYTES_MAX
from space.federation.portable import PART_BYTES, Copier, Copy, Piece, Portable, Seal, size
from space.federation.scope import DIRECTORY, Moment, Scope, Slot
from space.federation.selection import Selection, moved
from space.statemachine import zones
from space.statemachine.apply import clone_id, manifest_nodes
from space.statemachine.tables import CAPSULE, MOVED, SENT, CapsuleRow

MAIN_BYTES: Final = 48 << 20
"""Content that goes with the rest of its batch at once; of a batch with more, capsules are copied in parts instead.

More than a batch usually has of its own (32 MiB), less than a shipment takes.
"""

JOINED_MAX: Final = 1 << 14
"""Capsules that join in one entry, each of which is several events there; others are copied beside."""

JOINED_DIRECTORIES_MAX: Final = 1 << 14
"""Directories of these.  More come beside too; what stays and has a name in one gets it when it is placed again."""

STEP_PARTS: Final = 1000
"""Parts of copies in one entry: of small capsules there are many in few bytes."""


@attrs.frozen
class Batch:
    """A batch of the home's log: where it stands, when it was, what happened."""

    position: int
    time_ns: int
    events: Sequence[ev.Event]


Mark = tuple[bytes, int]
"""A capsule and a part of its copy: the last that was sent."""


@attrs.frozen
class Step:
    """Parts of copies that go together, as one entry of the receiver's log.

    Attributes:
        commands: what is in it.
        mark: the last part in it.
        time_ns: the time of the entry, and so of directories in which it makes names: what theirs is at home.
    """

    commands: Sequence[Portable]
    mark: Mark
    time_ns: int


Copies = Callable[[Mark | None], Iterator[Step]]
"""Copies that go beside a batch, from the step after a mark on."""


def _no_copies(after: Mark | None) -> Iterator[Step]:
    return iter(())


@attrs.frozen(eq=False)
class Part:
    """What one batch means in one lane.

    Attributes:
        position, time_ns: of the batch.
        lane: the lane it goes in.
        commands: all that happens at once.
        capsules: what is in them, and in the copies.
        withdrawn: what the zone is told to delete.
        copies: capsules that join with much content, part after part; from the one after a mark on.
        writes, reads: ids, names (directory and name) and lanes it changes, or relies on.
        alone: it comes after everything before it and before everything after it, in all lanes.
        first: all there is in the lane so far, for a zone that has nothing.
    """

    position: int
    time_ns: int
    lane: int
    commands: Sequence[Portable]
    capsules: Sequence[bytes] = ()
    withdrawn: Sequence[bytes] = ()
    copies: Copies = _no_copies
    writes: frozenset[bytes] = frozenset()
    reads: frozenset[bytes] = frozenset()
    alone: bool = False
    first: bool = False

    @property
    def has_copies(self) -> bool:
        return self.copies is not _no_copies


@final
class Translator:
    """Tells one zone about one shard of its home.

    Args:
        home: id of the zone whose log it is; ``home_name`` what it is called there.
        selection: what policies say about the zone that is told.
        seal: seals data keys for it.
        zone: its id: only with that it is told of what was purged unnoticed.

    Attributes:
        certain: whether all names there are those that were told.  Not so once one of the two zones was promoted in
            the other's place, or homes of single capsules went to another zone: each may have kept a name for something
            of its own, so capsules are told by their ids.
        missing: capsules the zone was found not to have, though it should: they are copied when they change next.
        roots: directories of third zones that the zone has too, and what stands for each there.
        followed: third zones whose place this one took, and what the zone has of each as this one had it then.
    """

    def __init__(
        self, home: bytes, home_name: str, selection: Selection, seal: Seal, *, zone: bytes = b""
    ) -> None:
        self.home: Final = home
        self.zone: Final = zone
        self.home_name: Final = home_name
        self.selection: Final = selection
        self.copier: Final = Copier(seal, selection)
        self.certain = True
        self.missing: set[bytes] = set()
        self.roots: dict[bytes, bytes] = {}
        self.followed: dict[bytes, Collection[bytes]] = {}
        self._latest: tuple[Moment, Scope] | None = None  # what is after a batch is before the next one

    def lacks(self, capsule: bytes) -> None:
        """The zone turned out not to have a capsule: see :func:`missing_capsule`."""
        if len(self.missing) < MISSING_MAX:
            self.missing.add(capsule)

    def scope(self, moment: Moment) -> Scope:
        """What the zone may see of a moment."""
        return Scope(moment.state, self.selection, self.home, (), self.roots)

    def scopes(self, before: Moment, after: Moment) -> tuple[Scope, Scope]:
        """What the zone may see before and after a batch; what it turned out to lack counts as not there before."""
        missing = self.missing.copy()
        if self._latest is not None and self._latest[0] is before:
            was = self._latest[1].again(missing)
        else:
            was = Scope(before.state, self.selection, self.home, missing, self.roots)
        now = self.scope(after)
        self._latest = after, now
        return was, now

    def handed_over(self, scope: Scope, capsule: bytes, epoch: int) -> cmd.TakeHome:
        """Gives the zone the home of a capsule: it becomes what policies called the home, and this zone the target."""
        row = scope.row(capsule)
        policy = self.selection.policy(scope.state, row.policy)
        document: bytes = msgpack.packb(moved(policy, self.home_name, self.selection.zone).to_document())
        home = zones.home_row(scope.state, capsule)
        return cmd.TakeHome(capsule, document, row.key, epoch, 0 if home is None else home.moved)

    def translate(self, before: Moment, after: Moment, batch: Batch) -> list[Part]:
        """The parts of a batch, highest lane first; none if it means nothing to the zone."""
        if is_quiet(batch.events):
            return []
        translation = _Translation(self, before, after, batch)
        parts = translation.parts()
        self.missing -= translation.joins
        return parts


MISSING_MAX: Final = 1 << 14
"""Capsules a zone is believed to lack at a time: each is remembered until it changes."""


def missing_capsule(error: SpaceError) -> bytes | None:
    """The capsule a shipment was refused for because the zone has none of that id; None for other refusals.

    Whoever hears that says so to the translator (:meth:`Translator.lacks`) and translates anew from where the zone is.
    """
    found = _NO_CAPSULE.search(str(error)) if isinstance(error, NotFoundError) else None
    return None if found is None else bytes.fromhex(found[1].replace("-", ""))


_NO_CAPSULE: Final = re.compile(r"no capsule ([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")

_BOOKKEEPING: Final = {
    ev.ShipmentSent,
    ev.PayloadReclaimed,
    ev.RepliesForgotten,
    ev.CommandRefused,
    ev.MembershipChanged,
    ev.PolicyRefused,
    ev.RpoBroken,
    ev.RpoKept,
    ev.NfsClientRecorded,
    ev.NfsClientForgotten,
    ev.NfsServerStarted,
    ev.NamespaceAssigned,
    ev.RegistrantsChanged,
    ev.ReservationChanged,
    ev.HomesDeclined,
    ev.KeysRewrapped,
    ev.MasterKeyChanged,
    ev.KeyDestroyed,
}


def is_quiet(events: Iterable[ev.Event]) -> bool:
    """Whether events are only records of this store about itself, which mean nothing to any other zone."""
    return all(type(event) in _BOOKKEEPING for event in events)


_CONTENT: Final = (ev.ExtentWritten, ev.RangeDeallocated, ev.CapsuleResized, ev.RangeCopied)


@attrs.define
class _Emission:
    """What is to be told in one lane."""

    commands: list[Portable] = attrs.field(factory=list)
    capsules: dict[bytes, None] = attrs.field(factory=dict)
    withdrawn: list[bytes] = attrs.field(factory=list)
    copied: list[bytes] = attrs.field(factory=list)
    writes: set[bytes] = attrs.field(factory=set)
    reads: set[bytes] = attrs.field(factory=set)

    def add(self, other: _Emission) -> None:
        self.commands += other.commands
        self.capsules |= other.capsules
        self.withdrawn += other.withdrawn
        self.copied += other.copied
        self.writes |= other.writes
        self.reads |= other.reads

    def meets(self, other: _Emission) -> bool:
        """Whether it makes a difference which of the two comes first."""
        return bool(self.writes & (other.writes | other.reads) or self.reads & other.writes)


class _Translation:
    """One batch while it is translated.

    Commands come in stages (:meth:`_stages`), each over all lanes; where two lanes of the batch touch the same, they
    become one, so that the order of the stages holds for both.
    """

    def __init__(self, translator: Translator, before: Moment, after: Moment, batch: Batch) -> None:
        self._translator = translator
        self._copier = translator.copier
        self._before, self._after = translator.scopes(before, after)
        self._moment = after
        self._batch = batch
        self._touched: dict[bytes, None] = {}
        self._slots: dict[Slot, None] = {}
        self._content: list[Any] = []
        self._xattrs: dict[tuple[bytes, bytes], None] = {}
        self._clones: list[ev.CapsuleCloned] = []
        self._snapshots: list[ev.SnapshotTaken] = []
        self._mentions: dict[bytes, int] = {}
        self._purged: set[bytes] = set()
        self._within: dict[bytes, bytes] = {}  # what is below a deleted directory → its own directory
        self._joins: dict[bytes, int] = {}
        self._leaves: dict[bytes, int] = {}
        self._stays: dict[bytes, int] = {}
        self._beside: set[bytes] = set()  # joins that are copied in parts
        self._had: dict[bytes, list[Slot]] = {}
        self._has: dict[bytes, list[Slot]] = {}
        self._total = 0  # bytes of the entry so far
        self._joined = {True: 0, False: 0}  # directories, and others, that joined in it
        self._emissions: dict[int, _Emission] = {}
        self._stage: list[tuple[int, Portable]] = []
        self._told: set[bytes] = set()  # what something is said about, and so gets the batch's change time
        self._busy: set[bytes] = set()  # directories of the receiver in which names come or go
        self._modified: set[bytes] = set()  # capsules whose content is said to change
        self._given: dict[bytes, None] = {}  # capsules whose home the zone takes
        self._inherited: list[bytes] = []  # capsules that came from a third zone, and whose home is here now
        self._promoted = False
        root = after.state.get(CAPSULE, bytes(ROOT))
        self._certain = translator.certain and not (root and CapsuleRow.decode(root).flags & MOVED)

    # --- what happened ---------------------------------------------------------------------------

    @property
    def joins(self) -> set[bytes]:
        """What the zone gets copies of."""
        return set(self._joins)

    def parts(self) -> list[Part]:
        for event in self._batch.events:
            self._note(event)
        self._note_below()
        self._classify()
        told = (self._joins, self._leaves, self._stays, self._purged, self._snapshots)
        if not any(told):
            return []
        for slot in self._slots:
            was, now = self._before.entry(slot), self._after.entry(slot)
            if was is not None:
                self._had.setdefault(was, []).append(slot)
            if now is not None:
                self._has.setdefault(now, []).append(slot)
        self._stages()
        return [self._part(*group) for group in self._groups()]

    def _note(self, event: ev.Event) -> None:
        """What an event touches."""
        match event:
            case ev.NameLinked() | ev.NameUnlinked() | ev.CapsuleUndeleted():
                self._touch(event.capsule, event.parent)
                self._slot(event.parent, event.name)
            case ev.CapsuleRenamed():
                self._touch(event.capsule, event.parent, event.new_parent, event.replaced)
                self._slot(event.parent, event.name)
                self._slot(event.new_parent, event.new_name)
            case ev.NamesExchanged():
                self._touch(event.capsule, event.other, event.parent, event.other_parent)
                self._slot(event.parent, event.name)
                self._slot(event.other_parent, event.other_name)
            case ev.CapsuleCloned():
                self._note_clone(event)
            case ev.XattrSet() | ev.XattrRemoved():
                self._touch(event.capsule)
                self._xattrs[event.capsule, event.name] = None
            case ev.SnapshotTaken():
                self._snapshots.append(event)
            case ev.RangeCopied():
                self._touch(event.capsule)
                self._mention(event.source)
                self._content.append(event)
            case _ if isinstance(event, _CONTENT):
                self._touch(event.capsule)
                self._content.append(event)
            case ev.CapsulesPurged():
                self._purged.update(_ids(event.purged))
            case ev.HomeGiven():
                self._note_given(event)
            case ev.HomeTaken():
                self._note_taken(event)
            case ev.ZonePromoted() if event.zone != self._translator.zone:
                self._note_promotion(event.zone)
            case ev.CapsuleHomed() if event.zone == self._translator.home:
                self._touch(event.capsule)
            case (
                ev.CapsuleCreated()
                | ev.AttributesChanged()
                | ev.PolicyDefined()
                | ev.PolicyChanged()
                | ev.KeyCreated()
                | ev.CapsuleDeleted()
                | ev.CapsuleWithdrawn()
            ):
                self._touch(event.capsule)
            case _:
                pass  # about no capsule's content, names or attributes

    def _touch(self, *capsules: bytes) -> None:
        for capsule in capsules:
            if capsule and capsule != ROOT:
                self._touched[capsule] = None
                self._mention(capsule)

    def _mention(self, capsule: bytes) -> None:
        self._mentions[capsule] = self._mentions.get(capsule, 0) + 1

    def _slot(self, parent: bytes, name: bytes) -> None:
        self._slots[parent, name] = None

    def _note_clone(self, event: ev.CapsuleCloned) -> None:
        if event.manifest:
            members = [node.capsule for node, _ in manifest_nodes(event.manifest)]
        else:
            members = _ids(event.members)
            self._clones.append(event)
        self._touch(event.parent)
        for member in members:
            self._touch(clone_id(event.capsule, event.source, member))
        self._slot(event.parent, event.name)

    def _note_given(self, event: ev.HomeGiven) -> None:
        """The zone that gets a capsule's home is told of this batch as if that were here still, and then takes it."""
        self._touch(event.capsule)
        row = self._after.state.capsule(event.capsule)
        if event.zone == self._translator.zone and row is not None:
            lane = self._translator.selection.lane(self._after.state, row.policy)
            if lane is not None and self._after.alive(event.capsule):
                self._after.show(event.capsule, lane)
                self._given[event.capsule] = None

    def _note_taken(self, event: ev.HomeTaken) -> None:
        """The zone a capsule's home came from has all of it as of then: what is told is what came after."""
        capsule = event.capsule
        self._touch(capsule)
        lane = self._after.lane(capsule)
        if event.zone != self._translator.zone or lane is None or self._before.state.capsule(capsule) is None:
            return
        self._before.show(capsule, lane)
        self._content = [each for each in self._content if each.capsule != capsule]

    def _note_promotion(self, zone: bytes) -> None:
        """What came from a zone whose place this one takes joins, but for what is there already as it is here."""
        self._promoted = True
        there = self._translator.followed.get(zone, ())
        for capsule in list(zones.replicas(self._before.state, zone)):
            self._touch(capsule)
            if capsule not in there:
                continue
            lane = self._translator.selection.lane(self._after.state, self._before.row(capsule).policy)
            if lane is not None and self._before.alive(capsule):
                self._before.show(capsule, lane)
                self._inherited.append(capsule)

    def _note_below(self) -> None:
        """A directory that is deleted or brought back takes along what is below it."""
        for capsule in list(self._touched):
            row = self._after.state.capsule(capsule) or self._before.state.capsule(capsule)
            if row is None or row.kind != DIRECTORY:
                continue
            was, lives = self._before.alive(capsule), self._after.alive(capsule)
            if was and not lives:
                for slot, child in self._before.below(capsule):
                    self._touched[child] = None
                    self._within[child] = slot[0]
                    if self._after.entry(slot) == child and self._after.count(child) == 1:
                        self._after.lost(child)
                    if self._after.lane(child) is not None:  # it has another name
                        self._slots[slot] = None
            if lives and not was:
                self._touched |= dict.fromkeys(child for _, child in self._after.below(capsule))

    def _classify(self) -> None:
        for capsule in self._touched:
            was, now = self._before.lane(capsule), self._after.lane(capsule)
            if was is None and now is not None:
                self._joins[capsule] = now
            elif was is not None and now is None and not self._after.moved(capsule):
                self._leaves[capsule] = was
            elif was is not None and now is not None:
                self._stays[capsule] = now
        for capsule in self._joins:
            if self._after.row(capsule).kind == DIRECTORY:  # what is in it gets its names there
                for name, child in self._after.children(capsule):
                    if child.capsule not in self._joins and self._after.lane(child.capsule) is not None:
                        self._slots[capsule, name] = None

    # --- telling -----------------------------------------------------------------------------------

    def _tell(
        self,
        lane: int,
        capsule: bytes,
        command: Portable,
        *,
        writes: Iterable[bytes] = (),
        reads: Iterable[bytes] = (),
    ) -> None:
        self._told.add(capsule)
        self._touches(lane, capsule, writes, reads)
        self._stage.append((lane, command))

    def _touches(self, lane: int, capsule: bytes, writes: Iterable[bytes], reads: Iterable[bytes]) -> None:
        emission = self._emission(lane)
        emission.capsules[capsule] = None
        emission.writes.add(capsule)
        emission.writes.update(writes)
        emission.reads.update(reads)
        was = self._before.lane(capsule)
        if was is not None and was != lane:
            emission.reads.add(lane_key(was))

    def _stages(self) -> None:
        """Everything, in the order in which the receiver can do it."""
        for capsule in self._inherited:
            if capsule in self._stays:
                self._emission(self._stays[capsule]).capsules[capsule] = None
        contents = self._contents()
        clones = self._shared_clones()
        self._policies()
        for capsule, command, source in contents:
            self._modified.add(capsule)
            sources = self._sources([source] if source else [])
            self._tell(self._stays[capsule], capsule, command, reads=sources)
        self._changed_xattrs()
        self._lost_files()
        self._names(clones)
        self._lost_directories()
        self._lost_for_good()
        self._times()
        self._named_moments()
        self._homes()

    def _policies(self) -> None:
        for capsule, lane in self._stays.items():
            before, row = self._before.row(capsule), self._after.row(capsule)
            if before.policy != row.policy or before.key != row.key:
                key = self._copier.key(self._after, row) if before.key != row.key else None
                policy = self._copier.policy(self._after, row.policy)
                self._tell(lane, capsule, cmd.SetPolicy(capsule, policy, key))

    # --- content -----------------------------------------------------------------------------------

    def _contents(self) -> list[tuple[bytes, Portable, bytes]]:
        """Writes of what stays, each with its capsule and another it relies on.

        Of a batch with too much content for one entry, the capsules it is in are copied beside, as they are after it.
        """
        told = [
            (event.capsule, command, source)
            for event in self._content
            if event.capsule in self._stays
            for command, source in self._portable(event)
        ]
        self._total = sum(size(command) for _, command, _ in told)
        if self._total <= MAIN_BYTES:
            return told
        for capsule, _, _ in told:
            lane = self._stays.pop(capsule, None)
            if lane is not None:
                self._joins[capsule] = lane
                self._beside.add(capsule)
        self._total = 0
        return []

    def _portable(self, event: Any) -> Iterator[tuple[Portable, bytes]]:
        """A change of content as commands, each with the other capsule it relies on."""
        capsule = event.capsule
        match event:
            case ev.ExtentWritten():
                row = self._after.row(capsule)
                policy = self._copier.encoding(self._after, row)
                yield Piece(capsule, _Written(event, self._batch.position), policy, row.key), b""
            case ev.RangeDeallocated():
                yield cmd.Deallocate(capsule, event.offset, event.length), b""
            case ev.CapsuleResized():
                yield cmd.Resize(capsule, event.size), b""
            case ev.RangeCopied():
                yield from self._copied_range(event)

    def _copied_range(self, event: ev.RangeCopied) -> Iterator[tuple[Portable, bytes]]:
        """A range that was copied: shared at the receiver too if the source is there, else as bytes."""
        capsule, source = event.capsule, event.source
        unchanged = source in self._stays or (
            source not in self._touched and self._after.lane(source) is not None
        )
        if unchanged and self._before.lane(source) is not None:
            yield (
                cmd.CopyRange(capsule, event.offset, source, event.source_offset, event.length),
                source,
            )
            return
        end = min(event.offset + event.length, self._after.row(capsule).size)
        # What is there after the batch: later writes of it come over this, and are the same.
        yield cmd.Deallocate(capsule, event.offset, event.length, extend=self._extends(capsule)), b""
        for piece in self._copier.pieces(
            self._after, self._moment, capsule, event.offset, max(0, end - event.offset)
        ):
            yield piece, b""

    def _extends(self, capsule: bytes) -> bool:
        return not self._after.row(capsule).block_size

    def _changed_xattrs(self) -> None:
        for capsule, name in self._xattrs:
            if capsule not in self._stays:
                continue
            before = self._before.xattr(capsule, name)
            value = self._after.xattr(capsule, name)
            if value is not None and value != before:
                self._tell(self._stays[capsule], capsule, cmd.SetXattr(capsule, name, value))
            elif value is None and before is not None:
                self._tell(self._stays[capsule], capsule, cmd.RemoveXattr(capsule, name))

    # --- clones ------------------------------------------------------------------------------------

    def _shared_clones(self) -> set[bytes]:
        """Clones the receiver makes itself: all of the source is there, and nothing else in the batch is about it."""
        made: set[bytes] = set()
        for event in self._clones:
            members = _ids(event.members)
            copies = [clone_id(event.capsule, event.source, member) for member in members]
            if all(self._can_share(*pair) for pair in zip(members, copies, strict=True)):
                lane = self._joins[event.capsule]
                parent, name = self._after.apart(event.capsule)
                clone = cmd.Clone(event.capsule, event.source, parent, name)
                # What is in a directory is relied on too, and not only that it is there: names may wait in other lanes.
                listed = [each for each in members if self._before.row(each).kind == DIRECTORY]
                touches = [*copies, *listed]
                self._tell(lane, event.capsule, clone, writes=touches, reads=self._sources(members))
                self._emissions[lane].capsules |= dict.fromkeys(copies)
                for copy in copies:
                    del self._joins[copy]
                made.add(event.capsule)
        return made

    def _sources(self, capsules: Iterable[bytes]) -> Iterator[bytes]:
        """What relying on the content of capsules touches: them, and that their lanes have brought them."""
        for capsule in capsules:
            lane = self._before.lane(capsule)
            yield capsule
            if lane is not None:
                yield lane_key(lane)

    def _can_share(self, member: bytes, copy: bytes) -> bool:
        return (
            self._before.lane(member) is not None
            and self._after.lane(member) is not None
            and (self._certain or self._after.row(member).kind != DIRECTORY)
            and copy in self._joins
            and member not in self._mentions
            and self._mentions.get(copy) == 1
        )

    # --- names -------------------------------------------------------------------------------------

    def _names(self, clones: set[bytes]) -> None:
        """Copies of what joins, and names of what stays: directories from the top, then everything else."""
        placed = dict.fromkeys([*self._joins, *clones])
        for capsule in (*self._has, *self._had):
            if self._after.lane(capsule) is not None:
                placed[capsule] = None
        for capsule in sorted(placed, key=self._order):
            if capsule in self._joins:
                self._join(capsule)
            else:
                self._place(capsule, cloned=capsule in clones)
        self._close_joined()

    def _order(self, capsule: bytes) -> tuple[bool, int]:
        """Sorts capsules: directories from the top, then everything else."""
        other = self._after.row(capsule).kind != DIRECTORY
        return other, 0 if other else self._after.depth(capsule)

    def _join(self, capsule: bytes) -> None:
        """Copies a capsule as it is after the batch; one with much content beside the rest."""
        lane, after = self._joins[capsule], self._after
        names = self._has.get(capsule, [])
        if len(names) != after.count(capsule):
            names = after.names(capsule)
        places = after.places(names)
        keys = [parent + name for parent, name in names]
        hide = capsule in self._beside
        copies = self._copier.copy(after, self._moment, capsule, self._batch.position, places, hide=hide)
        first = next(copies)
        self._total += first.size
        directory = after.row(capsule).kind == DIRECTORY
        self._joined[directory] += 1
        few = self._joined[directory] <= (JOINED_DIRECTORIES_MAX if directory else JOINED_MAX)
        small = first.last and self._total <= MAIN_BYTES
        if few and (small or directory):  # what stays may have a name in a directory
            self._beside.discard(capsule)
            self._busy.update(parent for parent, _ in places)
            self._tell(lane, capsule, first, writes=keys, reads=[parent for parent, _ in names])
        else:
            self._total -= first.size
            self._beside.add(capsule)
            self._emission(lane).copied.append(capsule)
            self._touches(lane, capsule, keys, [parent for parent, _ in names])

    def _close_joined(self) -> None:
        """Gives directories back the times that names made in them have changed."""
        for index, (lane, command) in enumerate(tuple(self._stage)):
            if not isinstance(command, Copy) or command.capsule not in self._busy:
                continue
            row = self._after.row(command.capsule)
            if (row.mtime, row.ctime) != (self._batch.time_ns, self._batch.time_ns):
                self._stage[index] = (lane, attrs.evolve(command, last=False))
                closing = attrs.evolve(command, step=1, commands=(), last=True)
                self._stage.append((lane, closing))

    def _place(self, capsule: bytes, *, cloned: bool) -> None:
        """Tells the names of a capsule that stays, if those that were looked at are others now."""
        after = self._after
        lane = after.lane(capsule)
        assert lane is not None
        has, had = self._has.get(capsule, []), self._had.get(capsule, [])
        old, new = self._before.places(had), after.places(has)
        unnamed = cloned or (not self._before.count(capsule) and after.count(capsule) > 0)
        if sorted(old) == sorted(new) and not unnamed:
            return
        keys = [parent + name for parent, name in (*has, *had)]
        parents = [parent for parent, _ in (*has, *had)]
        known = len(has) == after.count(capsule)
        free = all(self._before.entry(slot) in (None, capsule) for slot in has)
        free = free and not any(parent in self._beside for parent, _ in has)
        certain = self._certain and free
        if not known and certain and set(old) <= set(new):  # one name more, of whatever others there are
            for parent, name in sorted(set(new) - set(old)):
                self._name(lane, capsule, cmd.Link(capsule, parent, name), [parent], keys, parents)
            return
        names = new if known else after.places(after.names(capsule))
        places = cmd.PlaceCapsule(capsule, names, old)
        moved = [parent for parent, _ in set(old) ^ set(new)]
        self._name(lane, capsule, places, moved, keys, parents)

    def _name(
        self,
        lane: int,
        capsule: bytes,
        command: Portable,
        places: Iterable[bytes],
        keys: Iterable[bytes],
        parents: Iterable[bytes],
    ) -> None:
        self._busy.update(places)
        self._tell(lane, capsule, command, writes=keys, reads=parents)

    # --- what leaves -------------------------------------------------------------------------------

    def _lost_files(self) -> None:
        """Deletes what is no directory, before anything gets its name."""
        for capsule, lane in self._leaves.items():
            row = self._before.row(capsule)
            if row.kind == DIRECTORY:
                continue
            names = self._had.get(capsule, [])
            self._withdrawn(capsule)
            certain = self._certain
            if certain and row.nlink == 1 and len(names) == 1 and self._gone(capsule):
                (slot,) = names
                (place,) = self._before.places(names) or [self._before.apart(capsule)]
                self._name(lane, capsule, cmd.Unlink(*place), [place[0]], [slot[0] + slot[1]], [slot[0]])
            elif not self._gone(capsule) or not self._goes_along(capsule):
                self._withdraw(lane, capsule)

    def _gone(self, capsule: bytes) -> bool:
        """Whether a capsule that leaves is deleted, and not only shipped no longer."""
        return not self._after.alive(capsule)

    def _goes_along(self, capsule: bytes) -> bool:
        """Whether a capsule that is gone is in a directory that is, at the receiver too."""
        parent = self._within.get(capsule)
        return (
            parent is not None
            and self._certain
            and self._before.count(capsule) == 1
            and parent in self._leaves
            and self._gone(parent)
        )

    def _withdrawn(self, capsule: bytes) -> None:
        """Notes that a capsule leaves: with the directory it goes along with, if it does."""
        top = capsule
        while self._goes_along(top):
            top = self._within[top]
        self._touches(self._leaves[top], capsule, (), ())
        self._emission(self._leaves[top]).withdrawn.append(capsule)

    def _withdraw(self, lane: int, capsule: bytes) -> None:
        slots = self._before.names(capsule)
        places = self._before.places(slots)
        self._name(
            lane,
            capsule,
            cmd.WithdrawCapsule(capsule),
            [parent for parent, _ in places],
            [parent + name for parent, name in slots],
            [parent for parent, _ in slots],
        )

    def _lost_directories(self) -> None:
        """Deletes directories once everything that goes on has left them; with what goes along."""
        directories = [each for each in self._leaves if self._before.row(each).kind == DIRECTORY]
        for capsule in sorted(directories, key=self._before.depth, reverse=True):
            lane = self._leaves[capsule]
            self._withdrawn(capsule)
            if not self._gone(capsule) or not self._certain:
                self._withdraw(lane, capsule)
            elif not self._goes_along(capsule):
                self._remove_tree(lane, capsule)

    def _lost_for_good(self) -> None:
        """Withdraws what the zone was sent and was not told to delete, as it went unnoticed: see Scope.alive."""
        for capsule in sorted(self._purged):
            row = self._before.state.capsule(capsule)
            if row is None or self._before.state.get(SENT, self._translator.zone + capsule) is None:
                continue
            if self._before.moved(capsule):
                continue  # others tell what becomes of it
            lane = self._translator.selection.lane(self._before.state, row.policy)
            self._emission(lane or 0).withdrawn.append(capsule)
            self._tell(lane or 0, capsule, cmd.WithdrawCapsule(capsule))

    def _remove_tree(self, lane: int, capsule: bytes) -> None:
        (slot,) = self._before.names(capsule)
        places = self._before.places([slot])
        now = self._after.entry(slot)
        taken = now is not None and self._after.lane(now) is not None and self._after.places([slot])
        if places and taken:
            # Who has its name now takes it, and leaves the directory without one.
            self._touches(lane, capsule, [slot[0] + slot[1]], [slot[0]])
            return
        ((parent, name),) = places or [self._before.apart(capsule)]
        command = cmd.Unlink(parent, name, directory=None, recursive=True)
        self._name(lane, capsule, command, [parent], [slot[0] + slot[1]], [slot[0]])

    def _emission(self, lane: int) -> _Emission:
        return self._emissions.setdefault(lane, _Emission())

    # --- the rest ----------------------------------------------------------------------------------

    def _times(self) -> None:
        """Attributes as they are now, and times that are not what the commands before make them."""
        time = self._batch.time_ns
        others = (capsule for capsule in self._busy if self._before.lane(capsule) is not None)
        for capsule in dict.fromkeys((*self._stays, *others)):
            lane = self._after.lane(capsule)
            before, row = self._before.state.capsule(capsule), self._after.state.capsule(capsule)
            if lane is None or before is None or row is None or capsule in self._joins:
                continue
            changed: dict[str, int] = {}
            for field in ("mode", "uid", "gid", "atime"):
                if getattr(row, field) != getattr(before, field):
                    changed[field] = getattr(row, field)
            modified = capsule in self._modified or capsule in self._busy
            if row.mtime != (time if modified else before.mtime):
                changed["mtime"] = row.mtime
            silent = row.ctime != before.ctime and capsule not in self._told and capsule not in self._busy
            if changed or silent:
                self._tell(lane, capsule, cmd.SetAttributes(capsule, **(changed or {"mtime": row.mtime})))

    def _named_moments(self) -> None:
        for event in {each.snapshot: each for each in self._snapshots}.values():
            lane = self._after.lane(event.capsule)
            if lane is not None and event.capsule not in self._beside:
                name = snapshot_name(self._translator.home_name, event.snapshot, self._batch.position)
                self._tell(lane, event.capsule, cmd.TakeSnapshot(event.capsule, name))

    def _homes(self) -> None:
        """Gives the homes of capsules away, at the very end.  Of one that is copied in parts it would be too early."""
        translator = self._translator
        zone = zones.zone_row(self._after.state, translator.zone) if self._given else None
        for capsule in self._given:
            lane = self._after.lane(capsule)
            if lane is None or zone is None or capsule in self._beside:
                continue
            self._tell(lane, capsule, translator.handed_over(self._after, capsule, zone.epoch))

    # --- lanes -------------------------------------------------------------------------------------

    def _groups(self) -> list[tuple[set[int], _Emission]]:
        """Lanes with what they touch, highest first; those that touch the same together."""
        groups: list[tuple[set[int], _Emission]] = []
        for lane in sorted(self._emissions, reverse=True):
            lanes, emission = {lane}, self._emissions[lane]
            apart = []
            for group in groups:
                if self._promoted or emission.meets(group[1]):
                    lanes |= group[0]
                    emission.add(group[1])
                else:
                    apart.append(group)
            groups = [*apart, (lanes, emission)]
        return sorted(groups, key=lambda group: max(group[0]), reverse=True)

    def _part(self, lanes: set[int], emission: _Emission) -> Part:
        copied = sorted(emission.copied, key=self._order)
        emission.reads.update(lane_key(lane) for lane in lanes if lane != max(lanes))
        return Part(
            self._batch.position,
            self._batch.time_ns,
            max(lanes),
            [command for lane, command in self._stage if lane in lanes],
            list(emission.capsules),
            emission.withdrawn,
            self._copies(copied) if copied else _no_copies,
            frozenset(emission.writes),
            frozenset(emission.reads),
            alone=self._promoted,
        )

    def _copies(self, capsules: list[bytes]) -> Copies:
        """Parts of copies of capsules, as they are after the batch: nothing of the translation itself is kept."""
        scope, moment, copier = self._after, self._moment, self._copier
        batch = self._batch
        before = self._before
        hidden = {
            capsule: [parent for parent, _ in before.names(capsule)]
            for capsule in capsules
            if before.lane(capsule) is not None
        }

        def parts() -> Iterator[tuple[Copy, int]]:
            for capsule in capsules:
                slots = scope.names(capsule)
                yield from timed(copier, scope, moment, capsule, slots, batch, hide=hidden.get(capsule))

        return lambda after: steps(resumed(parts(), after))


@attrs.frozen
class _Written:
    """A write of this batch as an extent."""

    event: ev.ExtentWritten
    position: int
    skip: int = 0

    @property
    def offset(self) -> int:
        return self.event.offset

    @property
    def length(self) -> int:
        return self.event.length

    @property
    def frames(self) -> bytes:
        return self.event.frames


def timed(
    copier: Copier,
    scope: Scope,
    moment: Moment,
    capsule: bytes,
    slots: list[Slot],
    batch: Batch,
    *,
    hide: Sequence[bytes] | None = None,
) -> Iterator[tuple[Copy, int]]:
    """Parts of a copy, each with a time; names in a directory come and go at its own, so that it keeps it.

    ``slots`` are the capsule's names, ``batch`` when the copy is of, ``hide`` the directories in which an older replica
    has names, if there is one; for those that differ in time, and have names of one capsule, one time has to do.
    """
    lost = [scope.row(parent).mtime for parent in hide or () if scope.lane(parent) is not None]
    times: dict[bytes, int] = {}
    names: dict[bytes, list[Slot]] = {}
    for slot in slots:
        for place in scope.places([slot]):
            inside = scope.lane(slot[0]) is not None
            times[place[0]] = scope.row(slot[0]).mtime if inside else batch.time_ns
            names.setdefault(place[0], []).append(place)
    parents = list(names)
    first = names[parents[0]] if parents else []
    time_ns = times[parents[0]] if parents else batch.time_ns
    part = None
    for part in copier.copy(scope, moment, capsule, batch.position, first, hide=hide is not None):
        at = lost[0] if lost and part.step == 0 else time_ns
        yield attrs.evolve(part, last=part.last and len(parents) < 2), at
    assert part is not None, "a copy has a part"
    told = tuple(first)
    for number, parent in enumerate(parents[1:], 1):
        told += tuple(names[parent])
        last = parent == parents[-1]
        placed = [cmd.PlaceCapsule(capsule, told)]
        yield attrs.evolve(part, step=part.step + number, last=last, commands=placed), times[parent]


def resumed(parts: Iterable[tuple[Copy, int]], after: Mark | None) -> Iterator[tuple[Copy, int]]:
    """Parts of copies from the one after a mark on.

    Raises:
        RefusedError: there is no such part.
    """
    rest = iter(parts)
    if after is not None:
        for part, _ in rest:
            if (part.capsule, part.step) == after:
                break
        else:
            raise RefusedError("a copy that was broken off cannot go on: what it was a copy of is not there")
    return rest


def steps(parts: Iterable[tuple[Copy, int]]) -> Iterator[Step]:
    """Parts of copies, those that fit into one entry and go with the same time together."""
    commands: list[Copy] = []
    total = time = 0
    for part, time_ns in parts:
        length = part.size
        if commands and (time_ns != time or total + length > PART_BYTES or len(commands) >= STEP_PARTS):
            yield Step(commands, (commands[-1].capsule, commands[-1].step), time)
            commands, total = [], 0
        commands.append(part)
        total += length
        time = time_ns
    if commands:
        yield Step(commands, (commands[-1].capsule, commands[-1].step), time)


def lane_key(lane: int) -> bytes:
    """What stands for everything in a lane among what a part touches."""
    return b"lane" + bytes((lane,))


def snapshot_name(home: str, snapshot: str, position: int) -> str:
    """What a snapshot of the home is called elsewhere: no two are called the same, whatever was dropped meanwhile."""
    name = f"{home}:{snapshot}@{position}"
    if len(name.encode()) > NAME_BYTES_MAX:
        name = f"{home}:{blake3(snapshot.encode()).hexdigest(16)}@{position}"
    return name


def _ids(packed: bytes) -> list[bytes]:
    return [packed[at : at + ID_BYTES] for at in range(0, len(packed), ID_BYTES)]
