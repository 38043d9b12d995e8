"""Replicas of a zone that follow another one, which took its place."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from space._errors import ConflictError, NotFoundError, RefusedError, UsageError
from space.events import commands as cmd
from space.events import types as ev
from space.events.ids import BRANCHES, zone_capsules, zone_root
from space.events.types import Kind
from space.statemachine import zones
from tests.state_support import MemoryWriter, fold_state
from tests.zone_support import HERE, HOME, OTHER, ROOT_ID, State, capsule, made, shipment, zone_commands

pytestmark = pytest.mark.unit

TREE, APART = bytes(zone_root(HOME)), bytes(zone_capsules(HOME))

FOLLOW = cmd.FollowHeir(HOME, OTHER, 1, 9, [TREE, APART, capsule(1), capsule(2)], done=True)
"""Files 1 and 2 of paris were alike in oslo, which took its place at position 9 of its log."""


@pytest.fixture
def state() -> State:
    """A store of zone "here" that has a directory 1 of "paris" with file 2 in it, and a file 3; and knows "oslo"."""
    state = State(zone_commands())
    inside = made(2, name=b"b", parent=capsule(1))
    state.done(shipment(0, 3, made(1, Kind.DIRECTORY, name=b"a"), inside, made(3, name=b"c")))
    return state


def follow(state: State, command: cmd.FollowHeir = FOLLOW) -> list[ev.Event]:
    """Follows oslo, as of now."""
    return state.done(attrs.evolve(command, seen=state.position))


def homes(state: State) -> list[tuple[bytes | None, int]]:
    """The home of each file, and how far it has come."""
    found = []
    for number in (1, 2, 3):
        row, home = state.overlay.capsule(capsule(number)), zones.home_row(state.rows, capsule(number))
        assert row is not None
        place = zones.home_of(state.overlay, capsule(number), row)
        found.append((place, 0 if home is None else home.position))
    return found


def folds_again(state: State) -> None:
    """What was decided live is what the log folds to."""
    again = MemoryWriter()
    fold_state(state.batches, again)
    assert again.rows == state.rows.rows


def test_what_is_the_same_follows_at_once(state: State) -> None:
    """Its home is the heir, as of right before that took the place, and so do its changes come; the rest stays."""
    events = follow(state)
    assert events[-1] == ev.HeirFollowed(ROOT_ID, HOME, OTHER, 1, 9)
    assert homes(state) == [(OTHER, 8), (OTHER, 8), (HOME, 3)]
    state.done(shipment(0, 9, cmd.Resize(capsule(2), 7), zone=OTHER))
    row = state.overlay.capsule(capsule(2))
    assert row is not None
    assert row.size == 7
    assert "zone oslo" in str(state.refused(cmd.Resize(capsule(2), 1)))
    assert state.done(attrs.evolve(FOLLOW, same=(), seen=state.position)) == []
    folds_again(state)


def test_the_old_home_is_fenced(state: State) -> None:
    """What it ships as if it had its place is refused; in the heir's epoch what is still its own is taken."""
    follow(state)
    error = state.refused(shipment(3, 4, cmd.Resize(capsule(3), 1)))
    assert isinstance(error, RefusedError)
    assert "zone oslo, https://oslo:1 took the place of zone paris" in str(error)
    state.done(shipment(3, 4, cmd.Resize(capsule(3), 1), epoch=1))
    assert isinstance(state.refused(shipment(4, 5, cmd.Resize(capsule(2), 1), epoch=1)), RefusedError)
    folds_again(state)


def test_what_the_heir_deleted_is_deleted(state: State) -> None:
    """What is gone there is withdrawn; what was in it, and is still there, hangs apart until its own names come."""
    follow(state, attrs.evolve(FOLLOW, same=[TREE, APART, capsule(2)], gone=[capsule(1), capsule(3)]))
    rows = [state.overlay.capsule(capsule(number)) for number in (1, 2, 3)]
    assert [row is not None and row.deleted > 0 for row in rows] == [True, False, True]
    assert rows[1] is not None
    assert rows[1].parent == APART
    folds_again(state)


def test_what_only_came_here_is_kept_in_a_branch(state: State) -> None:
    """A clone is this store's own; it is all that stays of what never came there, and the rest goes on as it is."""
    keep: list[cmd.Command] = [
        cmd.CreateCapsule(capsule(70), Kind.DIRECTORY, parent=bytes(BRANCHES), name=b"paris+oslo-1"),
        cmd.Clone(capsule(71), capsule(2), capsule(70), b"b"),
        cmd.Clone(capsule(72), capsule(3), capsule(70), b"c"),
    ]
    command = attrs.evolve(FOLLOW, same=[TREE, APART, capsule(1)], gone=[capsule(3)], commands=keep)
    follow(state, attrs.evolve(command, times=[(TREE, (1, 2, 3, 4))]))
    assert homes(state)[:2] == [(OTHER, 8), (HOME, 3)]
    for number in (71, 72):
        state.done(cmd.Resize(capsule(number), 5))
    gone, top = state.overlay.capsule(capsule(3)), state.overlay.capsule(TREE)
    assert gone is not None
    assert gone.deleted
    assert top is not None
    assert (top.atime, top.mtime, top.ctime, top.btime) == (1, 2, 3, 4)
    folds_again(state)


def test_what_differs_is_replaced_when_the_heir_ships_it(state: State) -> None:
    """A copy from the heir replaces a replica that came further, under the same id; and a name nobody tells of goes."""
    follow(state, attrs.evolve(FOLLOW, same=[TREE, APART, capsule(1)]))
    place = cmd.PlaceCapsule(capsule(3), [(capsule(1), b"moved")])
    copies = [
        cmd.Copied(capsule(3), 9, 0, True, [made(3), cmd.Resize(capsule(3), 4), place], (1, 2, 3, 4)),
        cmd.Copied(capsule(2), 9, 0, True, [made(2)], (1, 2, 3, 4)),
    ]
    state.done(shipment(0, 9, *copies, zone=OTHER))
    assert homes(state) == [(OTHER, 8), (OTHER, 9), (OTHER, 9)]
    moved, unnamed = (state.overlay.capsule(capsule(number)) for number in (3, 2))
    assert moved is not None
    assert unnamed is not None
    assert (moved.size, moved.parent, unnamed.nlink) == (4, capsule(1), 0)
    folds_again(state)


BACK = cmd.FollowHeir(OTHER, HOME, 2, 20, [TREE, APART, capsule(1)], gone=[capsule(2), capsule(3)], done=True)
"""Paris took its place back at position 20 of its log, and had neither file 2 nor 3 any more."""


def waiting(state: State) -> None:
    """Follows oslo, which has file 3 otherwise, as it was before it changed last."""
    state.done(shipment(3, 4, cmd.Resize(capsule(3), 1)))
    follow(state, attrs.evolve(FOLLOW, waiting=[capsule(3)]))


def test_what_waits_for_the_heir_goes_where_the_home_is_one_again_without_it(state: State) -> None:
    """Its home is the one before until the heir ships it; if that takes its place back, it may be gone there."""
    waiting(state)
    assert homes(state) == [(OTHER, 8), (OTHER, 8), (HOME, 4)]
    error = state.refused(attrs.evolve(BACK, seen=state.position - 2))
    assert isinstance(error, ConflictError)
    assert "changed meanwhile" in str(error)
    follow(state, BACK)
    rows = [state.overlay.capsule(capsule(number)) for number in (1, 2, 3)]
    assert [row is not None and row.deleted > 0 for row in rows] == [False, True, True]
    assert homes(state)[0] == (HOME, 19)
    folds_again(state)


def test_what_the_heir_has_shipped_waits_no_more(state: State) -> None:
    """It follows then; and what never waited, or has come from the home before since, is not the heir's to delete."""
    waiting(state)
    place = cmd.PlaceCapsule(capsule(3), [(TREE, b"c")])
    state.done(shipment(0, 9, cmd.Copied(capsule(3), 9, 0, True, [made(3), place], (1, 2, 3, 4)), zone=OTHER))
    assert homes(state)[2] == (OTHER, 9)
    state.done(shipment(4, 12, made(4, name=b"d"), epoch=1))
    error = state.refused(attrs.evolve(BACK, gone=[capsule(4)], seen=state.position))
    assert isinstance(error, ConflictError)
    follow(state, BACK)
    folds_again(state)


def test_what_waits_is_gone_for_nobody_else(state: State) -> None:
    """Only the zone it waits since takes along what waits; what this store has taken over waits for nobody."""
    waiting(state)
    state.done(cmd.PromoteZone(HOME))
    error = state.refused(attrs.evolve(BACK, gone=[capsule(3)], seen=state.position))
    assert isinstance(error, ConflictError)


def test_half_of_a_copy_stays_half_of_one(state: State) -> None:
    """What was not wholly here when the heir was followed is dropped if this store takes the zone's place."""
    state.done(shipment(3, 9, cmd.Copied(capsule(5), 9, 0, False, [made(5)], (1, 2, 3, 4)), steps=(0, 1)))
    before = zones.home_row(state.rows, capsule(5))
    assert before is not None
    follow(state, attrs.evolve(FOLLOW, waiting=[capsule(5)]))
    assert zones.home_row(state.rows, capsule(5)) == before
    assert before.copy > 0
    folds_again(state)


def test_what_its_home_ships_before_it_is_fenced_waits_for_nobody(state: State) -> None:
    """Until the last part of what an heir says, its replicas go on; what changes then is looked at again."""
    follow(state, attrs.evolve(FOLLOW, same=[], waiting=[capsule(2), capsule(3)], done=False))
    state.done(shipment(3, 4, cmd.Resize(capsule(3), 1)))
    follow(state, attrs.evolve(FOLLOW, same=[TREE, APART, capsule(1)]))
    assert [zones.waits(state.overlay, HOME, capsule(number)) for number in (1, 2, 3)] == [False, True, False]
    folds_again(state)


def test_what_is_in_a_deleted_directory_hangs_apart_of_a_zone_that_never_shipped(state: State) -> None:
    """Where all that is a zone's came by following it, the directory for what has no name is made."""
    follow(state, attrs.evolve(FOLLOW, same=[TREE, APART, capsule(1), capsule(2), capsule(3)]))
    apart = bytes(zone_capsules(OTHER))
    assert state.overlay.capsule(apart) is None
    follow(state, attrs.evolve(BACK, same=[TREE, APART, capsule(2), capsule(3)], gone=[capsule(1)]))
    inside = state.overlay.capsule(capsule(2))
    assert inside is not None
    assert inside.parent == apart
    assert state.overlay.capsule(apart) is not None
    state.done(shipment(3, 20, cmd.PlaceCapsule(capsule(2), [(TREE, b"b")])))
    inside = state.overlay.capsule(capsule(2))
    assert inside is not None
    assert (inside.parent, inside.nlink) == (TREE, 1)
    folds_again(state)


@pytest.mark.parametrize(
    "change, error",
    [
        ({"zone": HERE}, NotFoundError),
        ({"heir": HERE}, NotFoundError),
        ({"zone": bytes(16)}, NotFoundError),
        ({"epoch": 0}, UsageError),
        ({"position": 0}, UsageError),
        ({"seen": 4}, ConflictError),
        ({"same": [ROOT_ID]}, ConflictError),
        ({"gone": [capsule(9)]}, ConflictError),
        ({"waiting": [ROOT_ID]}, ConflictError),
        ({"commands": [cmd.TakeSnapshot(ROOT_ID, "s")]}, UsageError),
        ({"times": [(capsule(3), (1, 2, 3, 4))]}, UsageError),
    ],
)
def test_what_cannot_be_is_refused(state: State, change: dict[str, Any], error: type[Exception]) -> None:
    """Zones, numbers and capsules that cannot be, and what has changed since it was looked at, change nothing."""
    command = attrs.evolve(FOLLOW, seen=state.position)
    assert isinstance(state.refused(attrs.evolve(command, **change)), error)


def test_a_zone_that_took_the_place_itself_follows_nobody(state: State) -> None:
    """After its own promotion a store refuses a heir; and one that it followed before is none any more."""
    follow(state)
    state.done(cmd.PromoteZone(HOME))
    row = zones.zone_row(state.rows, HOME)
    assert row is not None
    assert (row.heir, row.heir_epoch) == (b"", 0)
    assert isinstance(state.refused(attrs.evolve(FOLLOW, seen=state.position)), ConflictError)
    folds_again(state)


def test_more_than_one_command_can_tell(state: State) -> None:
    """Nothing is fenced before the last part; then all of it is followed."""
    follow(state, attrs.evolve(FOLLOW, same=[capsule(1)], done=False))
    state.done(shipment(3, 4, cmd.Resize(capsule(3), 1)))
    follow(state, attrs.evolve(FOLLOW, same=[TREE, APART, capsule(2)]))
    assert homes(state)[:2] == [(OTHER, 8), (OTHER, 8)]
    assert isinstance(state.refused(shipment(4, 5, cmd.Resize(capsule(3), 2))), RefusedError)
    folds_again(state)


def test_streams_of_the_heir_from_after_it_took_the_place_begin_anew(state: State) -> None:
    """What it shipped before it took the place stays counted; a stream that had come beyond that comes anew."""
    state.done(shipment(0, 8, zone=OTHER))
    follow(state)
    assert zones.cursor_row(state.rows, OTHER, 0, 0).position == 8
    state.done(shipment(8, 20, zone=OTHER))
    follow(state, attrs.evolve(FOLLOW, same=(), epoch=2, position=15))
    assert zones.cursor_row(state.rows, OTHER, 0, 0).position == 0
    folds_again(state)
