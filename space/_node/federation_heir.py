"""Following a zone that took a third one's place: what this zone has of that one comes from its heir from now on.

The heir says what it had of the zone when it took its place: every capsule the follower may have, and the position of
that zone's log each had come to.  The follower compares that with its own replicas (all of it is one entry of its log
for each ten thousand capsules, and a last one, :class:`space.events.commands.FollowHeir`):

* What is *the same* follows at once: its home is the heir, and nothing of it moves.
* What is not stays as it is until the heir has shipped it as it was there (:meth:`Translator.translate` of the
  promotion does), which replaces it.  Where the follower had come further, a clone of it is kept in a branch first.
* What the heir does not have, though the zone's policy lets it, is gone; if it is from after all that came there, a
  clone of it is kept in the branch first.  Where the heir was a home before, and the zone had taken its place, so is
  what waits since then to be shipped by the zone, which is not its home any more.

What the heir may not have stays the zone's, which nobody has replaced for it.  The names of such capsules are told to
nobody: the heir says what it has, and the follower does not ask.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import attrs

from space._errors import ConflictError, NotFoundError, RefusedError, Status, UnavailableError, UsageError
from space._node.caller import Document
from space._node.federation_follow import Setting, names_of
from space._node.federation_home import Walk
from space._node.federation_promote import ASKED_MAX
from space.events import commands as cmd
from space.events.ids import ID_BYTES, ROOT, zone_capsules, zone_root
from space.events.types import Kind
from space.federation.scope import Scope
from space.federation.selection import Selection
from space.statemachine import zones as rows
from space.statemachine.shipments import names_in
from space.statemachine.tables import CapsuleRow, Overlay, Reader

if TYPE_CHECKING:
    from space._node.federation_zones import Zone
    from space._node.store import Store

LISTED_MAX: Final = 1 << 20
"""Capsules a heir may list: 150 MB while it does."""

ATTEMPTS: Final = 5
"""How often more may come while it is compared; the last ones hold the store's lock."""

log: Final = logging.getLogger("space.federation")


@attrs.frozen
class Inheritance:
    """What a zone had of another one when it took its place.

    Attributes:
        zone: whose place it took.
        epoch: which of the two zones' that was.
        position: of its log, where it did.
        reached: the position of that zone's log up to which it had everything; 0 if that is not known any more.
        base: the one as of which it gave that zone its place back, 0 if it never did: that one took back then what it
            had done before, and told nobody.
        capsules: what the follower may have: how far each had come there.
    """

    zone: bytes
    epoch: int
    position: int
    reached: int
    base: int
    capsules: Mapping[bytes, int]

    def documents(self) -> Iterator[Document]:
        """What the follower is told, in parts of an acceptable size."""
        told = [[capsule.hex(), position] for capsule, position in self.capsules.items()]
        for at in range(0, max(1, len(told)), ASKED_MAX):
            yield {
                "zone": self.zone.hex(),
                "epoch": self.epoch,
                "position": self.position,
                "reached": self.reached,
                "base": self.base,
                "at": at,
                "capsules": told[at : at + ASKED_MAX],
                "more": at + ASKED_MAX < len(told),
            }


def inheritance(store: Store, zone: bytes, follower: str) -> Inheritance:
    """What this zone had of another one when it took its place, as far as a third one may have it.

    If the log does not reach back there, what is still here of that: the follower takes little for the same then, and
    is sent everything as it is now.
    """
    with store._read() as txn:
        row = rows.zone_row(txn, zone)
    assert row is not None
    try:
        with Walk(store, row.promoted - 1) as walk:
            was, now, _ = walk.step()
            listed = dict(
                _listed(Overlay(was.state), Scope(was.state, Selection(follower), b""), zone, now.state)
            )
            reached = all_there(Overlay(was.state), zone)
            before = rows.zone_row(was.state, zone)
            base = 0 if before is None else before.base
    except NotFoundError:
        return _still_here(store, zone, row, follower)
    with store._read() as txn:
        since = next((each.lost for each in rows.zones(txn).values() if each.name == follower), 0)
        if (
            since > row.promoted
        ):  # what the follower took over itself, or this zone set aside, is nobody's news
            present = Scope(txn, Selection(follower), b"")
            listed = {each: at for each, at in listed.items() if present.lane(each) is not None}
    return Inheritance(zone, row.epoch, row.promoted, reached, base, listed)


def _still_here(store: Store, zone: bytes, row: rows.ZoneRow, follower: str) -> Inheritance:
    """What is here now of what this zone had, and how far it had come; up to where all had is not known any more."""
    with store._read() as txn:
        state, scope = Overlay(txn), Scope(txn, Selection(follower), b"")
        listed = {
            capsule: rows.reached(state, zone, row, capsule) if scope.row(capsule).change > row.parted else 0
            for capsule in rows.known_of(state, zone)
            if scope.lane(capsule) is not None
        }
        return Inheritance(zone, row.epoch, row.promoted, 0, row.base, listed)


def _listed(state: Overlay, scope: Scope, zone: bytes, now: Reader) -> Iterator[tuple[bytes, int]]:
    """What was here right before, and may go to the follower from ``now`` on; how far each had come."""
    row = rows.zone_row(state, zone)
    for capsule in rows.replicas(state, zone) if row is not None else ():
        found, home = state.capsule(capsule), rows.home_row(state, capsule)
        if found is None or (home is not None and home.copy) or not scope.alive(capsule):
            continue
        assert row is not None
        if scope.selection.lane(now, found.policy) is not None:
            known = _is_known(row, found)
            yield capsule, rows.reached(state, zone, row, capsule) if known else 0


def _is_known(zone: rows.ZoneRow, replica: CapsuleRow) -> bool:
    """Whether it is known how far a replica has come: not if this store had taken it over and gave it back.

    Until something of it comes from there it is as this store left it, which no position of that log says.
    """
    return replica.ino > zone.returned or replica.change > zone.parted


def all_there(state: Overlay, zone: bytes) -> int:
    """The position of a zone's log up to which everything is here, in whatever lane."""
    row = rows.zone_row(state, zone)
    came = [0 if cursor.resume else cursor.position for _, _, cursor in rows.cursors(state, zone)]
    return min(came, default=0 if row is None else row.base)


# --- the follower ------------------------------------------------------------------------------------


class Listening:
    """What heirs are telling, part after part."""

    def __init__(self) -> None:
        self._told: dict[bytes, tuple[tuple[Any, ...], dict[bytes, int]]] = {}

    def take(self, heir: bytes, document: Document) -> Inheritance | None:
        """Takes a part; all of it when it was the last.

        Raises:
            UsageError: it is none, or more than a zone may tell.
            ConflictError: it is not the next one: it begins anew with the first.
        """
        about, capsules = _parsed(document)
        if document.get("at") == 0:
            self._told[heir] = (about, {})
        begun, told = self._told.get(heir, ((), {}))
        if begun != about or document.get("at") != len(told):
            self._told.pop(heir, None)
            raise ConflictError(
                "parts of what a zone took over came out of order", hint="it tells all of it again"
            )
        if len(told) + len(capsules) > LISTED_MAX:
            del self._told[heir]
            raise UsageError(f"a zone that took over more than {LISTED_MAX} capsules cannot be followed")
        told.update(capsules)
        if document.get("more") is True:
            return None
        del self._told[heir]
        return Inheritance(*about, told)


def _parsed(document: Document) -> tuple[tuple[bytes, int, int, int, int], dict[bytes, int]]:
    try:
        numbers = [document[key] for key in ("epoch", "position", "reached", "base")]
        capsules = {bytes.fromhex(capsule): position for capsule, position in document["capsules"]}
        zone = bytes.fromhex(document["zone"])
    except (KeyError, TypeError, ValueError):
        raise UsageError("not what a zone took over", hint="is the other zone newer?") from None
    positions = [*numbers, *capsules.values()]
    sound = all(type(each) is int and 0 <= each < 1 << 63 for each in positions)
    if not sound or {len(each) for each in (zone, *capsules)} != {ID_BYTES} or len(capsules) > ASKED_MAX:
        raise UsageError("not what a zone took over", hint="is the other zone newer?")
    return (zone, *numbers), capsules


def follow_heir(store: Store, heir: Zone, found: Inheritance) -> bool:
    """Follows a zone that took a third one's place; whether there was anything to follow.

    Raises:
        ConflictError: this zone took the same place; or things change faster than they can be compared.
        UnavailableError: what the heir took over was this zone's own, and it has not learnt yet that it lost that.
    """
    for attempt in range(ATTEMPTS):
        try:
            if attempt < ATTEMPTS // 2:
                return _followed(store, heir, found)
            with store.alone():
                return _followed(store, heir, found)
        except ConflictError as error:
            if error.status is not Status.STALE:
                raise
    raise ConflictError(f"what zone {heir.name} took over changes faster than it can be compared")


def _followed(store: Store, heir: Zone, found: Inheritance) -> bool:
    with store.still():
        seen = store.last
        with store._read() as txn:
            row, own = rows.zone_row(txn, found.zone), rows.own_zone(txn)
            if row is None or row.role != rows.PEER or own is None:
                return False
            if row.heir == heir.id and row.heir_epoch >= found.epoch:
                return True
            back = rows.zone_row(txn, heir.id)
            if back is not None and back.heir == found.zone and back.heir_epoch >= found.epoch:
                raise UnavailableError(
                    f"{row} took its place back from zone {heir.name} in epoch {back.heir_epoch}, which that one has "
                    "not learnt yet",
                    hint=f"it does when zone {row.name} connects there",
                )
            if row.taken:
                raise ConflictError(
                    f"zone {heir.name} took the place of {row}, and so did this one",
                    hint="decide which of the two goes on, and in the other: space zone promote, with its name",
                )
            plan = _Plan(store, heir, found, row, own[0], txn)
            plan.make()
    about = (found.zone, heir.id, found.epoch, found.position)
    same, waiting = plan.same, plan.waiting
    while len(same) + len(waiting) > ASKED_MAX:
        some, same = same[:ASKED_MAX], same[ASKED_MAX:]
        others, waiting = waiting[: ASKED_MAX - len(some)], waiting[ASKED_MAX - len(some) :]
        store.execute(cmd.FollowHeir(*about, some, seen=seen, waiting=others), actor=f"zone:{heir.name}")
    made = plan.made
    store.execute(
        cmd.FollowHeir(*about, same, made.commands, plan.times, plan.gone, seen, done=True, waiting=waiting),
        actor=f"zone:{heir.name}",
    )
    log.warning(
        "zone %s took the place of zone %s in epoch %d: %d capsules follow it, %d are set aside%s",
        heir.name,
        row.name,
        found.epoch,
        len(plan.same),
        len(made.aside),
        f" in {made.path}" if made.path else "",
    )
    return True


class _Plan:
    """What becomes of each replica of the zone."""

    def __init__(
        self, store: Store, heir: Zone, found: Inheritance, row: rows.ZoneRow, own: bytes, txn: Reader
    ) -> None:
        self.same: list[bytes] = []
        self.waiting: list[bytes] = []
        self.gone: list[bytes] = []
        self.times: list[tuple[bytes, tuple[int, int, int, int]]] = []
        self._found = found
        self._row = row
        self._heir = heir
        self._state = Overlay(txn)
        known = rows.zone_row(txn, heir.id)
        self._round = known is not None and known.taken > 0
        self._returns = known is not None and known.heir == found.zone
        self._selection = Selection(heir.name)
        self._scope = Scope(txn, self._selection, own)
        self._there = found.reached
        self._base = max(found.base, row.base)
        self._here = all_there(self._state, found.zone)
        self._roots = {
            bytes(each) for zone in rows.zones(txn) for each in (zone_root(zone), zone_capsules(zone))
        }
        name = f"{row.name}+{heir.name}-{found.epoch}"
        self.made = Setting(store, name, self._scope, txn, self._selection)
        self.made.tops = (bytes(ROOT), *sorted(self._roots))

    def make(self) -> None:
        """Looks at all of them.

        Raises:
            UnavailableError: some are this zone's own.
            RefusedError: the heir's own place was taken by this zone.
        """
        self._check_own()
        further: list[bytes] = []
        only_here: list[bytes] = []
        roots: list[bytes] = []
        for capsule in rows.replicas(self._state, self._found.zone):
            home = rows.home_row(self._state, capsule)
            whole = home is None or not home.copy
            here = rows.reached(self._state, self._found.zone, self._row, capsule) if whole else 0
            theirs = self._found.capsules.get(capsule)
            known = _is_known(self._row, self._scope.row(capsule))
            if capsule in self._roots:
                roots.append(capsule)
            elif theirs is not None:
                if known and self._is_same(here, theirs):
                    self.same.append(capsule)
                    continue
                self.waiting.append(capsule)
                if here > theirs or not known:
                    further.append(capsule)
            elif self._is_meant(capsule):
                self.gone.append(capsule)
                if (here > self._there or not known) and self._scope.alive(capsule):
                    only_here.append(capsule)
        if not self._round:
            self.same += roots
        elif self.same or self.gone or further:
            raise RefusedError(
                f"zone {self._heir.name} took the place of {self._row}, which took this one's, and this one had taken "
                f"that of zone {self._heir.name}: who goes round in a circle is not followed",
            )
        if self._returns:
            self.gone += self._left_over()
        self._set_aside(further, only_here)

    def _left_over(self) -> Iterator[bytes]:
        """Replicas of the heir's, from before the zone took its place, that neither shipped nor deleted since.

        They were there when that was followed, and what came further was kept then; now the heir has them no more.
        """
        for capsule in rows.replicas(self._state, self._heir.id):
            told = capsule in self._roots or capsule in self._found.capsules
            if not told and rows.waits(self._state, self._heir.id, capsule):
                yield capsule

    def _check_own(self) -> None:
        for capsule in self._found.capsules:
            row = self._state.capsule(capsule)
            if row is not None and rows.home_of(self._state, capsule, row) is None:
                raise UnavailableError(
                    f"zone {self._heir.name} took over from {self._row} what had its home here, and this zone has not "
                    "learnt yet that it lost that",
                    hint=f"it does when zone {self._row.name} connects here",
                )

    def _is_same(self, here: int, theirs: int) -> bool:
        """Whether a capsule is alike that came as of two positions: equal ones, or nothing came in between."""
        if not here or not theirs or min(here, theirs) < self._base <= max(here, theirs):
            return False
        return here == theirs or theirs < here <= self._there or here < theirs <= self._here

    def _is_meant(self, capsule: bytes) -> bool:
        """Whether the heir may have a capsule that is here, if only in a directory that was deleted.

        A policy that names the zone itself speaks of a time when another one was the home: if that is the heir, it may.
        """
        row = self._state.capsule(capsule)
        assert row is not None
        if row.deleted:
            return False
        before = rows.zone_row(self._state, self._heir.id)
        meant = [self._selection]
        if before is not None and before.heir == self._found.zone:
            meant.append(Selection(self._row.name))
        return any(each.lane(self._state, row.policy) is not None for each in meant)

    # --- what is set aside ---------------------------------------------------------------------------

    def _set_aside(self, further: list[bytes], only_here: list[bytes]) -> None:
        names = names_of(self._scope, [*further, *self.gone])
        for capsule in (*further, *only_here):
            row = self._scope.row(capsule)
            if row.kind != Kind.DIRECTORY:
                self.made.clone(capsule, row, names[capsule])
            elif capsule in only_here:
                self.made.mirror(capsule)
        left = {parent for capsule in self.gone for parent, _ in names[capsule]}
        for directory in sorted(left.intersection(self.same)):
            row = self._scope.row(directory)
            self.times.append((directory, (row.atime, row.mtime, row.ctime, row.btime)))


def roots_for(state: Overlay, peer: bytes) -> list[bytes]:
    """Zones in whose root directory here another zone gives names, though it is neither's own."""
    own = rows.own_zone(state)
    found = []
    for zone in rows.zones(state):
        directory = bytes(ROOT) if own is not None and zone == own[0] else bytes(zone_root(zone))
        row = state.capsule(directory)
        if zone == peer or row is None or row.deleted or not names_in(state, peer, directory, row):
            continue
        if directory != ROOT or any(each.lost for _, each in rows.heirs(state, peer)):
            found.append(zone)
    return found
