"""Scope: what one zone may see of the home at one moment.

In scope is a capsule that policy allows there (:mod:`space.federation.selection`), that has its home here, and that is
*alive*: not deleted, and not in a directory that is (for a file: the one it last got a name in).  Its names are those
in directories that are in scope, and in the root, for which ``/zones/NAME`` stands at the receiver (and, at a zone
whose place this one took, its root for what is ``/zones/NAME`` here), and those in directories of the receiver's, for
what has its home from there; one without any hangs in
``/zones/NAME/.capsules``.  Names in other directories, and their ids, get into no command: :meth:`Scope.places` leaves
them out.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Container, Iterator, Mapping
from typing import Final, Protocol, final

from space.events.ids import ID_BYTES, NIL, ROOT, zone_capsules, zone_root
from space.events.types import Kind
from space.federation.selection import Selection
from space.statemachine import zones
from space.statemachine.decision import capsule_text
from space.statemachine.tables import ENTRY, MOVED, XATTR, CapsuleRow, EntryRow, Overlay, Reader

DIRECTORY: Final = int(Kind.DIRECTORY)

REMEMBERED: Final = 100_000
"""Capsules a look through a whole store remembers: some 50 MB."""

Slot = tuple[bytes, bytes]
"""A directory and a name in it."""


class Extent(Protocol):
    """``length`` bytes at ``offset``: what ``frames`` hold (of batch ``position``) less their first ``skip`` bytes."""

    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def skip(self) -> int: ...
    @property
    def frames(self) -> bytes: ...


class Moment(Protocol):
    """The home as of one position: stays what it is for as long as somebody holds it."""

    @property
    def state(self) -> Reader: ...

    def extents(self, capsule: bytes, offset: int, length: int) -> Iterator[Extent]:
        """What a range of a capsule is made of, in order; gaps are zeros."""


@final
class Scope:
    """What a zone may see of one state; ``home`` is the id of the zone whose state it is.

    Looks at most rows once: it is for one moment and thrown away with it.  ``without`` is out of scope; ``roots`` are
    directories of third zones in which names go along, and what stands for each there.
    """

    def __init__(
        self,
        state: Reader,
        selection: Selection,
        home: bytes,
        without: Container[bytes] = (),
        roots: Mapping[bytes, bytes] | None = None,
    ) -> None:
        self.state = Overlay(state)
        self._below = state
        self.selection = selection
        self._without = without
        self._roots = roots or {}
        self._root = bytes(zone_root(home))
        self._capsules = bytes(zone_capsules(home))
        stood_in = selection.stood_in_for(state)
        self._theirs = None if stood_in is None else bytes(zone_root(stood_in[0]))
        self._receiver = self._moved_with()
        self._lanes: dict[bytes, int | None] = {}
        self._alive: dict[bytes, bool] = {}
        self._named: dict[bytes, bool] = {}  # files that are not where they last got a name
        self._shown: dict[bytes, int] = {}

    def again(self, without: Container[bytes] = ()) -> Scope:
        """The scope of the same moment, with something else out of scope; rows are not looked at again."""
        found = copy.copy(self)
        found.exclude(without)
        return found

    def exclude(self, without: Container[bytes]) -> None:
        """Has something else out of scope, and forgets what may be different then."""
        self._without = without
        self._lanes, self._named, self._shown = {}, {}, {}

    def _moved_with(self) -> bytes | None:
        """Id of the zone that sees it, if homes of single capsules moved: else no name in its directories counts."""
        root = self.state.capsule(ROOT)
        if root is None or not root.flags & MOVED:
            return None
        known = zones.zones(self.state).items()
        return next((each for each, row in known if row.name == self.selection.zone), None)

    def forget(self) -> None:
        """Bounds what is remembered, for those who look through a whole store."""
        if len(self._lanes) + len(self._alive) + len(self._named) > REMEMBERED:
            self.state = Overlay(self._below)
            self._lanes.clear()
            self._alive.clear()
            self._named.clear()

    def row(self, capsule: bytes) -> CapsuleRow:
        """The row of a capsule that is in scope."""
        row = self.state.capsule(capsule)
        assert row is not None, "what is in scope is there"
        return row

    def lane(self, capsule: bytes) -> int | None:
        """The lane of a capsule; None if it is not in scope."""
        try:
            return self._lanes[capsule]
        except KeyError:
            lane = self._lanes[capsule] = self._lane(capsule)
            return lane

    def _lane(self, capsule: bytes) -> int | None:
        row = self.state.capsule(capsule)
        if row is None or capsule == ROOT or capsule in self._without:
            return None
        if capsule in self._shown:
            return self._shown[capsule]
        lane = self.selection.lane(self.state, row.policy)
        if lane is None or zones.home_of(self.state, capsule, row) is not None:
            return None
        return lane if self.alive(capsule) else None

    def alive(self, capsule: bytes) -> bool:
        """Whether a capsule is neither deleted itself nor in a directory that is.

        Of a file with several names, one that is not is enough.  Which directories a file is in, only a look through
        all names can say; so where it last got a name counts, and a file that has lost that one since, and has another
        in a deleted directory, is taken to be alive while that directory is.  Nobody can see the difference here; at
        the latest when it is purged the zone is told to delete it, and if the zone turns out not to have it, it is
        copied (:func:`space.federation.translate.missing_capsule`).
        """
        if self.hinted(capsule):
            return True
        if (known := self._named.get(capsule)) is None:
            known = self._named[capsule] = any(
                self.hinted(parent) for parent, _ in self._other_names(capsule)
            )
        return known

    def _other_names(self, capsule: bytes) -> list[Slot]:
        row = self.state.capsule(capsule)
        gone = row is None or row.deleted or row.kind == DIRECTORY
        return [] if gone else self.names(capsule)

    def show(self, capsule: bytes, lane: int) -> None:
        """Has a capsule in scope, in a lane, whoever its home is: while that goes over."""
        self._shown[capsule] = self._lanes[capsule] = lane

    def lost(self, capsule: bytes) -> None:
        """Takes it from whoever found its only name in a directory that is not alive, that a capsule is not."""
        self._named[capsule] = False

    def hinted(self, capsule: bytes) -> bool:
        """Whether the way up from where a capsule last got a name leads to the root; or it never got one."""
        trail = []
        at = capsule
        while (found := self._alive.get(at)) is None:
            trail.append(at)
            row = self.state.capsule(at)
            if row is None or row.deleted:
                found = False
                break
            if at == ROOT or row.parent == NIL:
                found = True
                break
            at = row.parent
        for each in trail:
            self._alive[each] = found
        return found

    def place(self, parent: bytes) -> bytes | None:
        """The directory at the receiver that stands for one of the home; None if names in it do not leave."""
        if parent == ROOT:
            return self._root
        if parent == self._theirs:
            return bytes(ROOT)
        if self.lane(parent) is not None:
            return parent
        if parent in self._roots:
            return self._roots[parent]
        return None if self._receiver is None else self._receivers_own(parent, self._receiver)

    def _receivers_own(self, parent: bytes, receiver: bytes) -> bytes | None:
        """A directory of the receiver's own, in which a capsule has a name whose home came from there."""
        if parent == zone_root(receiver):
            return bytes(ROOT)
        row = self.state.capsule(parent)
        theirs = row is not None and zones.home_of(self.state, parent, row) == receiver
        return parent if theirs else None

    def moved(self, capsule: bytes) -> bool:
        """Whether a capsule has its home elsewhere: it is nobody's business here what other zones have of it."""
        row = self.state.capsule(capsule)
        return row is not None and zones.home_of(self.state, capsule, row) is not None

    def places(self, slots: list[Slot]) -> list[Slot]:
        """Those of some names that a capsule has at the receiver."""
        found = [(self.place(parent), name) for parent, name in slots]
        return [(parent, name) for parent, name in found if parent is not None]

    def apart(self, capsule: bytes) -> Slot:
        """The name a capsule has at the receiver that has no other there."""
        return self._capsules, capsule_text(capsule).encode()

    def entry(self, slot: Slot) -> bytes | None:
        """The capsule a name leads to."""
        data = self.state.get(ENTRY, slot[0] + slot[1])
        return None if data is None else EntryRow.decode(data).capsule

    def children(self, directory: bytes) -> Iterator[tuple[bytes, EntryRow]]:
        """Names in a directory, and what they lead to."""
        for key, value in self.state.scan(ENTRY, directory):
            yield key[ID_BYTES:], EntryRow.decode(value)

    def count(self, capsule: bytes) -> int:
        """How many names a capsule has that is there."""
        row = self.state.capsule(capsule)
        assert row is not None
        return min(row.nlink, 1) if row.kind == DIRECTORY else row.nlink

    def names(self, capsule: bytes) -> list[Slot]:
        """Every name of a capsule: a look through the directory of its last one, and through all for what is left."""
        row = self.state.capsule(capsule)
        if row is None or row.deleted:
            return []
        count = self.count(capsule)
        found: dict[Slot, None] = {}
        for prefix in (row.parent, b""):
            if len(found) >= count:
                break
            for key, value in self.state.scan(ENTRY, prefix):
                if value[:ID_BYTES] == capsule:
                    found[key[:ID_BYTES], key[ID_BYTES:]] = None
                    if len(found) == count:
                        break
        return list(found)

    def depth(self, capsule: bytes) -> int:
        """How many directories are above a capsule."""
        depth = 0
        row = self.state.capsule(capsule)
        while row is not None and row.parent not in (NIL, capsule):
            depth, capsule = depth + 1, row.parent
            row = self.state.capsule(capsule)
        return depth

    def below(self, directory: bytes) -> Iterator[tuple[Slot, bytes]]:
        """Everything in a directory, at any depth, parents first: a name and the capsule it leads to."""
        queue = deque([directory])
        while queue:
            parent = queue.popleft()
            for name, child in self.children(parent):
                yield (parent, name), child.capsule
                if child.kind == DIRECTORY:
                    queue.append(child.capsule)

    def xattrs(self, capsule: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Extended attributes of a capsule."""
        for key, value in self.state.scan(XATTR, capsule):
            yield key[ID_BYTES:], value

    def xattr(self, capsule: bytes, name: bytes) -> bytes | None:
        """One extended attribute; None if it is not set."""
        return self.state.get(XATTR, capsule + name)
