"""Homes of single capsules that are given, taken, declined and taken back, without a store."""

from __future__ import annotations

import msgpack
import pytest

from space._errors import ConflictError, NotFoundError, RefusedError, UsageError
from space.events import commands as cmd
from space.events import types as ev
from space.events.ids import zone_capsules, zone_root
from space.events.types import Kind, ZoneKind
from space.federation.selection import moved
from space.policy.model import Policy, Sovereignty
from space.statemachine import tables, zones
from space.statemachine.handover import GIVEN_MAX
from space.statemachine.tables import FEDERATED, MOVED
from tests.state_support import MemoryWriter, fold_state
from tests.zone_support import (
    HERE,
    HOME,
    OTHER,
    ROOT_ID,
    State,
    capsule,
    made,
    shipment,
    write,
    zone_commands,
)

pytestmark = pytest.mark.unit

TREE = bytes(zone_root(HOME))
POLICY = bytes(
    msgpack.packb(Policy(sovereignty=Sovereignty.GLOBAL, federation_targets=("paris",)).to_document())
)
A, B, C = map(capsule, (1, 2, 3))


@pytest.fixture
def old() -> State:
    """A store that sent directory 1, with file 2 in it, and file 3 to paris."""
    state = State(zone_commands())
    state.done(cmd.CreateCapsule(A, Kind.DIRECTORY, parent=ROOT_ID, name=b"a"))
    state.done(cmd.CreateCapsule(B, parent=A, name=b"b", size=10))
    state.done(cmd.CreateCapsule(C, parent=ROOT_ID, name=b"c", size=10))
    sent(state, HOME, A, B, C)
    return state


@pytest.fixture
def new() -> State:
    """A store that has what paris shipped: directory 1, with file 2 in it, and file 3."""
    state = State(zone_commands())
    directory = cmd.CreateCapsule(A, Kind.DIRECTORY, parent=TREE, name=b"a", policy=b"")
    state.done(shipment(0, 3, directory, made(2, parent=A, name=b"b"), made(3, name=b"c")))
    return state


def sent(state: State, zone: bytes, *capsules: bytes) -> None:
    """Says that capsules were shipped as they are."""
    position = state.position
    state.done(cmd.RecordShipment(zone, 0, 0, 0, position, 0, [(each, position) for each in capsules], 1))


def take(which: bytes, given: int, *, key: int = 0, epoch: int = 0) -> cmd.TakeHome:
    """What a stream says of a capsule whose home it gives."""
    return cmd.TakeHome(which, POLICY, key, epoch, given)


def home(state: State, which: bytes) -> bytes | None:
    """The zone a capsule is a replica of."""
    overlay = state.overlay
    row = overlay.capsule(which)
    assert row is not None
    return zones.home_of(overlay, which, row)


def folds_again(state: State) -> None:
    """What was decided live is what the log folds to."""
    again = MemoryWriter()
    fold_state(state.batches, again)
    assert again.rows == state.rows.rows


def test_what_is_given_is_a_replica(old: State) -> None:
    """From then on only the new home changes it, and nothing takes it along that is done around it."""
    events = old.done(cmd.GiveHomes(HOME, [C]))
    assert events == [ev.HomeGiven(C, HOME)]
    assert home(old, C) == HOME
    root = old.overlay.capsule(ROOT_ID)
    assert root is not None
    assert root.flags == FEDERATED | MOVED
    for command in (cmd.Resize(C, 1), cmd.Unlink(ROOT_ID, b"c"), cmd.Rename(ROOT_ID, b"c", ROOT_ID, b"d")):
        assert "its home is zone paris" in str(old.refused(command))
    old.done(cmd.Resize(B, 1))
    old.done(cmd.GiveHomes(HOME, [B]))
    assert "its home is zone paris" in str(old.refused(cmd.Unlink(ROOT_ID, b"a", recursive=True)))
    old.done(shipment(0, 5, cmd.Resize(C, 7)))
    folds_again(old)


def test_what_cannot_be_given(old: State) -> None:
    """Nothing that zone has not, that others have, or that is not here; no directory without its content."""
    old.done(cmd.CreateCapsule(capsule(4), parent=ROOT_ID, name=b"d"))
    assert isinstance(old.refused(cmd.GiveHomes(HOME, [capsule(4)])), RefusedError)
    assert isinstance(old.refused(cmd.GiveHomes(HOME, [capsule(5)])), NotFoundError)
    assert isinstance(old.refused(cmd.GiveHomes(HERE, [C])), NotFoundError)
    assert isinstance(old.refused(cmd.GiveHomes(HOME, [])), UsageError)
    assert isinstance(old.refused(cmd.GiveHomes(HOME, [C] * (GIVEN_MAX + 1))), UsageError)
    assert "look again" in str(old.refused(cmd.GiveHomes(HOME, [A])))
    assert isinstance(old.refused(cmd.GiveHomes(HOME, [ROOT_ID])), RefusedError)
    sent(old, OTHER, C)
    assert "zone oslo" in str(old.refused(cmd.GiveHomes(HOME, [C])))
    old.done(cmd.GiveHomes(HOME, [A, B]))
    assert isinstance(old.refused(cmd.GiveHomes(HOME, [B])), RefusedError)
    old.done(cmd.Unlink(ROOT_ID, b"c"))
    assert isinstance(old.refused(cmd.GiveHomes(HOME, [C])), NotFoundError)
    folds_again(old)


def test_a_home_is_taken_once(new: State) -> None:
    """At the position it was given at, with its policy; what comes of it later is refused, or passed over."""
    events = new.done(shipment(3, 9, cmd.Resize(C, 5), take(C, 9)))
    assert [type(each) for each in events[:2]] == [ev.ShipmentReceived, ev.CapsuleResized]
    assert events[2] == ev.HomeTaken(C, HOME, 9)
    row = new.overlay.capsule(C)
    assert row is not None
    assert (home(new, C), home(new, B)) == (None, HOME)
    assert new.overlay.get(tables.POLICY, tables.U32.pack(row.policy)) == POLICY
    assert zones.sent_as_of(new.overlay, HOME, C) == new.position
    new.done(cmd.Resize(C, 6))
    assert "its home is zone paris" in str(new.refused(cmd.Rename(TREE, b"c", TREE, b"d")))
    assert "is not the home of" in str(new.refused(shipment(9, 10, cmd.Resize(C, 1))))
    copy = cmd.Copied(C, 10, 0, True, [made(3)], (0,) * 4)
    assert [type(each) for each in new.done(shipment(9, 10, copy, take(C, 9)))] == [ev.ShipmentReceived]
    folds_again(new)


@pytest.mark.parametrize(
    "command",
    [take(C, 9, key=4), take(C, 9, epoch=1), take(C, 10), take(capsule(9), 9)],
    ids=["key", "epoch", "later", "unknown"],
)
def test_what_is_not_taken_stops_nothing(new: State, command: cmd.TakeHome) -> None:
    """A home that cannot be taken is passed over: the stream goes on, and it stays where it is fenced."""
    assert [type(each) for each in new.done(shipment(3, 9, command))] == [ev.ShipmentReceived]
    assert home(new, C) == HOME


def test_half_of_a_copy_is_not_taken(new: State) -> None:
    """A capsule of which a copy is under way is not all there."""
    new.done(shipment(3, 9, cmd.Copied(C, 9, 0, False, [made(3)], (0,) * 4)))
    new.done(shipment(9, 10, take(C, 10)))
    assert home(new, C) == HOME


def test_what_is_declined_is_never_taken(new: State) -> None:
    """Up to a position of that zone's log; what it gives later is taken."""
    assert new.done(cmd.DeclineHomes(HOME, 9)) == [ev.HomesDeclined(ROOT_ID, HOME, 9)]
    assert new.done(cmd.DeclineHomes(HOME, 8)) == []
    new.done(shipment(3, 9, take(C, 9)))
    assert home(new, C) == HOME
    new.done(shipment(9, 12, take(C, 12)))
    assert home(new, C) is None
    assert isinstance(new.refused(cmd.DeclineHomes(HERE, 9)), NotFoundError)
    assert isinstance(new.refused(cmd.DeclineHomes(HOME, 0)), UsageError)
    new.done(cmd.RemoveZone(HOME))
    new.done(cmd.AddZone(HOME, "paris", ZoneKind.GEO, "", b"pem", bytes(32)))
    row = zones.zone_row(new.overlay, HOME)
    assert row is not None
    assert row.declined == 9
    folds_again(new)


def test_what_is_taken_back_is_at_home_again(old: State) -> None:
    """Only what was given up to the position that was declined, and has not been since."""
    old.done(cmd.GiveHomes(HOME, [C]))
    position = old.position
    assert isinstance(old.refused(cmd.KeepHomes(HOME, [C], position - 1)), ConflictError)
    assert isinstance(old.refused(cmd.KeepHomes(HOME, [B], position)), ConflictError)
    assert isinstance(old.refused(cmd.KeepHomes(HERE, [C], position)), NotFoundError)
    old.done(cmd.KeepHomes(HOME, [C], position))
    assert home(old, C) is None
    old.done(cmd.Resize(C, 1))
    assert isinstance(old.refused(cmd.KeepHomes(HOME, [C], position)), ConflictError)
    folds_again(old)


def test_a_promotion_counts_if_it_came_later(old: State, new: State) -> None:
    """Whoever takes the other's place has what moved before; what moves afterwards goes where it was given."""
    old.done(shipment(0, 3, made(30, name=b"theirs")))
    old.done(cmd.GiveHomes(HOME, [C]))
    old.done(cmd.PromoteZone(HOME))
    assert home(old, C) is None
    old.done(cmd.GiveHomes(HOME, [C]))
    assert home(old, C) == HOME
    folds_again(old)

    new.done(shipment(3, 9, take(C, 9)))
    new.done(cmd.LoseHome(HOME, 1, 30, [], [], []))
    assert home(new, C) == HOME
    new.done(shipment(30, 31, take(C, 31, epoch=1), lane=5, epoch=1))
    assert home(new, C) is None
    new.done(cmd.PromoteZone(HOME))
    assert home(new, C) is None
    folds_again(new)


def test_a_third_zone_takes_the_place(new: State) -> None:
    """What was taken from one zone and shipped to another is that one's when it is promoted."""
    new.done(shipment(3, 9, take(C, 9)))
    sent(new, OTHER, C)
    new.done(cmd.LoseHome(OTHER, 1, 30, [], [], []))
    assert home(new, C) == OTHER
    assert home(new, B) == HOME


def test_names_where_they_always_were(old: State) -> None:
    """The new home says which names it knows of; those in directories it was not given stay as they are."""
    old.done(cmd.GiveHomes(HOME, [C, A, B]))
    old.done(shipment(0, 5, cmd.PlaceCapsule(C, []), cmd.PlaceCapsule(B, [(A, b"renamed")], [(A, b"b")])))
    assert [key[16:] for key, _ in old.overlay.scan(tables.ENTRY, ROOT_ID)] == [b"a", b"c", b"zones"]
    assert [key[16:] for key, _ in old.overlay.scan(tables.ENTRY, A)] == [b"renamed"]
    old.done(shipment(5, 6, cmd.PlaceCapsule(A, [])))
    old.done(shipment(6, 7, cmd.WithdrawCapsule(C)))
    assert [key[16:] for key, _ in old.overlay.scan(tables.ENTRY, ROOT_ID)] == [b"a", b"zones"]
    assert home(old, C) == HOME
    folds_again(old)


def test_a_directory_that_is_copied_anew_keeps_what_is_at_home_here(new: State) -> None:
    """A file whose home was taken stays in a directory whose home was not."""
    new.done(shipment(3, 9, take(B, 9)))
    directory = cmd.CreateCapsule(A, Kind.DIRECTORY, policy=b"")
    placed = cmd.PlaceCapsule(A, [(TREE, b"a")])
    new.done(shipment(9, 10, cmd.Copied(A, 10, 0, True, [directory, placed], (0,) * 4)))
    assert [key[16:] for key, _ in new.overlay.scan(tables.ENTRY, A)] == [b"b"]
    new.done(shipment(10, 11, cmd.WithdrawCapsule(A)))
    apart = bytes(zone_capsules(HOME))
    assert len([key for key, _ in new.overlay.scan(tables.ENTRY, apart)]) == 1
    folds_again(new)


def test_a_key_may_be_named_by_the_new_home(old: State) -> None:
    """A capsule that is encrypted is copied over by its new home under the key it has."""
    key = cmd.NewKey(7, 1, b"wrapped")
    old.done(cmd.CreateCapsule(capsule(8), parent=ROOT_ID, name=b"e", key=key, policy=POLICY))
    sent(old, HOME, capsule(8))
    old.done(cmd.GiveHomes(HOME, [capsule(8)]))
    old.done(shipment(0, 5, write(8, 0, b"x", key=7)))
    create = cmd.CreateCapsule(capsule(8), policy=POLICY, key=cmd.NewKey(7, 1, b"other"))
    old.done(shipment(5, 6, cmd.Copied(capsule(8), 6, 0, True, [create], (0,) * 4)))
    folds_again(old)


def test_what_another_zone_withdrew_may_come_from_its_new_home(new: State) -> None:
    """A capsule that its home withdrew here is nobody's: whoever is its home by now may ship it again."""
    copy = cmd.Copied(
        C, 5, 0, True, [made(3), cmd.PlaceCapsule(C, [(bytes(zone_root(OTHER)), b"c")])], (0,) * 4
    )
    theirs = shipment(0, 5, copy, zone=OTHER)
    assert "is not the home of" in str(new.refused(theirs))
    new.done(shipment(3, 4, cmd.WithdrawCapsule(C)))
    new.done(theirs)
    assert home(new, C) == OTHER
    assert "is not the home of" in str(new.refused(shipment(4, 5, cmd.Resize(C, 1))))
    new.done(shipment(5, 6, cmd.Resize(C, 1), zone=OTHER))
    folds_again(new)


def test_policies_of_what_moves() -> None:
    """The new home becomes what the old one was, and nobody else may have more or less; there and back is the same."""
    policy = Policy(
        sovereignty=Sovereignty.GLOBAL,
        federation_targets=("paris", "lima"),
        federation_candidates=("oslo", "rome"),
        federation_priority=5,
    )
    there = moved(policy, "oslo", "paris")
    assert there.federation_targets == ("oslo", "lima")
    assert there.federation_candidates == ("rome",)
    assert moved(there, "paris", "oslo").federation_targets == ("paris", "lima")
    assert moved(there, "oslo", "paris") is there
