"""Zones, what is kept of shipments that were sent, and homes that move."""

from __future__ import annotations

import attrs
import pytest

from space._errors import ConflictError, NotFoundError, RefusedError, UsageError
from space.events import commands as cmd
from space.events import types as ev
from space.events.commands import Receipt
from space.events.ids import BRANCHES, CLUSTER, ID_BYTES, ROOT, ZONES, zone_root
from space.events.types import Kind, ZoneKind
from space.statemachine import zones
from space.statemachine.homes import ZONES_MAX
from space.statemachine.tables import ENTRY, FEDERATED, HOME_LOST
from tests.state_support import MemoryWriter, fold_state
from tests.zone_support import (
    HERE,
    HOME,
    KEY,
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

PARIS = cmd.AddZone(HOME, "paris", ZoneKind.GEO, "https://paris:1", b"pem", KEY)
TREE = bytes(zone_root(HOME))


@pytest.fixture
def state() -> State:
    """A store of zone "here" that knows "paris" and "oslo"."""
    return State(zone_commands())


def folds_again(state: State) -> None:
    """What was decided live is what the log folds to."""
    again = MemoryWriter()
    fold_state(state.batches, again)
    assert again.rows == state.rows.rows


def flags(state: State) -> int:
    """Flags of the root directory."""
    row = state.overlay.capsule(ROOT_ID)
    assert row is not None
    return row.flags


# --- zones -------------------------------------------------------------------------------------------


def test_zones_are_known_by_what_was_said_of_them(state: State) -> None:
    """Own and other zones are there with all that was said of them, and asking for the same again changes nothing."""
    rows = zones.zones(state.rows)
    assert rows[HOME] == zones.ZoneRow(zones.PEER, "paris", 2, "https://paris:1", b"pem", KEY)
    assert zones.own_zone(state.rows) == (HERE, rows[HERE])
    assert (rows[HERE].role, str(rows[HERE])) == (zones.OWN, "zone here, https://here:1")
    assert flags(state) == FEDERATED
    assert state.done(zone_commands()[1]) == []
    change = cmd.ChangeZone(HOME, ZoneKind.METRO, "https://paris:2", b"pem pem", KEY)
    assert len(state.done(change)) == 1
    assert state.done(change) == []
    state.done(attrs.evolve(change, zone=HERE))
    row = zones.zone_row(state.rows, HOME)
    assert row is not None
    assert (row.name, row.kind, row.url, row.authorities) == ("paris", 1, "https://paris:2", b"pem pem")
    folds_again(state)


@pytest.mark.parametrize(
    "command, error",
    [
        (attrs.evolve(PARIS, zone=b"short"), UsageError),
        (attrs.evolve(PARIS, zone=bytes(16)), UsageError),
        (attrs.evolve(PARIS, name=""), UsageError),
        (attrs.evolve(PARIS, name="Paris"), UsageError),
        (attrs.evolve(PARIS, name=".branches"), UsageError),
        (attrs.evolve(PARIS, name="a/b"), UsageError),
        (attrs.evolve(PARIS, name="a" * 64), UsageError),
        (attrs.evolve(PARIS, sealing=b"short"), UsageError),
        (attrs.evolve(PARIS, url="x" * 3000), UsageError),
        (attrs.evolve(PARIS, authorities=bytes(70_000)), UsageError),
        (PARIS, ConflictError),
        (attrs.evolve(PARIS, zone=capsule(1)), ConflictError),
        (attrs.evolve(PARIS, name="rome"), ConflictError),
        (attrs.evolve(PARIS, zone=HERE, name="rome"), ConflictError),
        (attrs.evolve(PARIS, zone=capsule(1), name="here"), ConflictError),
        (cmd.DefineZone(capsule(1), "new", ZoneKind.EDGE, "", b"", KEY), ConflictError),
        (cmd.ChangeZone(capsule(1), ZoneKind.EDGE, "", b"", KEY), NotFoundError),
        (cmd.ChangeZone(HOME, ZoneKind.EDGE, "", b"", b"short"), UsageError),
        (cmd.RemoveZone(capsule(1)), NotFoundError),
        (cmd.RemoveZone(HERE), NotFoundError),
        (cmd.PromoteZone(HERE), NotFoundError),
        (cmd.PromoteZone(capsule(1)), NotFoundError),
        (cmd.RecordShipment(capsule(1), 0, 0, 0, 1, 0, [], 0), NotFoundError),
        (cmd.RecordShipment(HOME, 0, 101, 0, 1, 0, [], 0), UsageError),
        (cmd.RecordShipment(HOME, 0, 0, 0, 1 << 63, 0, [], 0), UsageError),
        (cmd.RecordShipment(HOME, 0, 0, 0, 1, 0, [(b"short", 1)], 0), UsageError),
        (cmd.RecordShipment(HOME, 0, 0, 0, 1, 0, [], 0, [b"short"]), UsageError),
        (cmd.RecordRpo(capsule(1), 0, 0, 1, 0, kept=True), NotFoundError),
        (cmd.RecordRpo(HOME, 0, 0, -1, 0, kept=True), UsageError),
        (cmd.LoseHome(capsule(1), 1, 1, [], [], []), NotFoundError),
        (cmd.LoseHome(HOME, 0, 1, [], [], []), ConflictError),
        (cmd.LoseHome(HOME, 1, -1, [], [], []), UsageError),
        (cmd.LoseHome(HOME, 1, 1, [], [cmd.PurgeCapsules([])], []), UsageError),
        (cmd.LoseHome(HOME, 1, 1, [], [cmd.Resize(capsule(1), 1)], []), NotFoundError),
        (cmd.LoseHome(HOME, 1, 1, [], [], [capsule(1)]), NotFoundError),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_is_refused(state: State, command: cmd.Command, error: type[Exception]) -> None:
    """Ids, names, keys and numbers that cannot be, zones that are known or not, are errors that change nothing."""
    assert isinstance(state.refused(command), error)


def test_a_zone_comes_before_others(state: State) -> None:
    """A store that belongs to no zone knows no other one, and none knows more than there may be."""
    bare = State([cmd.InitialiseStore(bytes(16), 0o755, 0, 0)])
    assert isinstance(bare.refused(PARIS), NotFoundError)
    for number in range(3, ZONES_MAX):
        state.done(attrs.evolve(PARIS, zone=number.to_bytes(16, "big"), name=f"z{number}"))
    assert "at most" in str(state.refused(attrs.evolve(PARIS, zone=capsule(1), name="more")))


def test_a_removed_zone_leaves_its_replicas(state: State) -> None:
    """After its removal nothing is taken from a zone, whose replicas can be removed; added again, it begins anew."""
    state.done(shipment(0, 5, made(1, name=b"f"), made(2, name=b"g"), made(3, Kind.DIRECTORY, name=b"d")))
    state.done(cmd.RemoveZone(HOME))
    assert isinstance(state.refused(shipment(5, 6)), RefusedError)
    assert isinstance(state.refused(cmd.Resize(capsule(1), 1)), RefusedError)
    assert isinstance(state.refused(cmd.CreateCapsule(capsule(8), parent=TREE, name=b"n")), RefusedError)
    state.done(cmd.Unlink(TREE, b"g"))
    assert isinstance(state.refused(attrs.evolve(PARIS, name="lutetia")), ConflictError)
    state.done(PARIS)
    assert zones.cursor_row(state.rows, HOME, 0, 0).position == 0
    again = [
        cmd.Copied(
            capsule(n), 6, 0, True, [made(n), cmd.PlaceCapsule(capsule(n), [(TREE, b"n%d" % n)])], (0,) * 4
        )
        for n in (1, 2)
    ]
    state.done(shipment(0, 6, *again))
    rows = [state.overlay.capsule(capsule(n)) for n in (1, 2)]
    assert [(row.nlink, row.deleted) for row in rows if row] == [(1, 0), (1, 0)]
    state.done(cmd.RemoveZone(HOME))
    state.done(cmd.Unlink(bytes(ZONES), b"paris", directory=None, recursive=True))
    folds_again(state)


# --- the home's own record -----------------------------------------------------------------------------


def test_what_was_sent_is_kept(state: State) -> None:
    """Each capsule a zone was sent is kept with its last position until the zone is told to delete it."""
    state.done(cmd.RecordShipment(HOME, 0, 50, 0, 7, 0, [(capsule(1), 7), (capsule(2), 6)], 100))
    state.done(cmd.RecordShipment(HOME, 0, 50, 7, 9, 0, [(capsule(1), 9)], 100, [capsule(2)]))
    state.done(cmd.RecordShipment(OTHER, 0, 50, 0, 9, 1, [(capsule(2), 9)], 100))
    assert dict(zones.sent_capsules(state.rows, HOME)) == {capsule(1): 9}
    assert dict(zones.sent_capsules(state.rows, OTHER)) == {capsule(2): 9}
    folds_again(state)


def test_refusals_and_broken_promises_are_events(state: State) -> None:
    """What a policy forbade belongs to its capsule, or to the root where that is unknown; promises to the stream."""
    state.done(cmd.CreateCapsule(capsule(1), parent=ROOT_ID, name=b"f"))
    refusal = cmd.RecordRefusal(capsule(1), "view", "nfs", "x" * 5000)
    assert state.done(refusal) == [ev.PolicyRefused(capsule(1), "view", "nfs", "x" * 1024)]
    assert state.done(attrs.evolve(refusal, capsule=capsule(2), reason="r")) == [
        ev.PolicyRefused(ROOT_ID, "view", "nfs", "r")
    ]
    assert state.done(cmd.RecordRpo(HOME, 1, 2, 3, 4, kept=False)) == [
        ev.RpoBroken(ROOT_ID, HOME, 1, 2, 3, 4)
    ]
    assert state.done(cmd.RecordRpo(HOME, 1, 2, 5, 0, kept=True)) == [ev.RpoKept(ROOT_ID, HOME, 1, 2, 5, 0)]
    folds_again(state)


# --- promotion -----------------------------------------------------------------------------------------


def test_a_promotion_is_one_event(state: State) -> None:
    """After it every replica of the zone is this store's, and nothing of the old epoch is taken."""
    state.done(shipment(0, 3, *(made(number, name=b"%d" % number) for number in range(1, 50))))
    state.done(shipment(0, 4, lane=7))
    (event,) = state.done(cmd.PromoteZone(HOME))
    assert event == ev.ZonePromoted(ROOT_ID, HOME, 1, ev.CURSOR.pack(0, 0, 3) + ev.CURSOR.pack(0, 7, 4))
    state.done(cmd.Resize(capsule(1), 9))
    state.done(write(2, 0, b"x"))
    state.done(cmd.CreateCapsule(capsule(90), parent=TREE, name=b"new"))
    state.done(cmd.Rename(TREE, b"3", TREE, b"three"))
    error = state.refused(shipment(3, 4))
    assert isinstance(error, RefusedError)
    assert "epoch 1" in str(error)
    assert isinstance(state.refused(cmd.PromoteZone(HOME)), ConflictError)
    assert isinstance(
        state.refused(cmd.CreateCapsule(capsule(91), parent=bytes(ZONES), name=b"x")), RefusedError
    )
    folds_again(state)


def test_a_promotion_concerns_what_was_there(state: State) -> None:
    """What the zone makes and ships in the new epoch is its replica again; what was taken over stays this store's."""
    state.done(shipment(0, 3, made(1, name=b"a")))
    state.done(cmd.PromoteZone(HOME))
    state.done(shipment(3, 4, made(2), epoch=1))
    assert isinstance(state.refused(cmd.Resize(capsule(2), 1)), RefusedError)
    state.done(cmd.Resize(capsule(1), 1))
    assert isinstance(state.refused(shipment(4, 5, cmd.Resize(capsule(1), 2), epoch=1)), RefusedError)


def old_home() -> State:
    """A store that sent files 1 and 2 to paris, and made 3, which never left, and 4, which was not received."""
    state = State(zone_commands())
    for number in range(1, 5):
        state.done(cmd.CreateCapsule(capsule(number), parent=ROOT_ID, name=b"%d" % number, size=10))
    state.done(cmd.RecordShipment(HOME, 0, 0, 0, 8, 0, [(capsule(n), n + 4) for n in (1, 2, 4)], 1))
    return state


def lost(
    state: State, *commands: cmd.Command, kept: tuple[bytes, ...] = (), epoch: int = 1
) -> list[ev.Event]:
    """Follows paris, which was promoted at its position 30."""
    return state.done(cmd.LoseHome(HOME, epoch, 30, [(0, 0, 6)], commands, kept))


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_sweep_knows_of_what_was_taken_over(epoch: int) -> None:
    """A copy of before the promotion does not name what was taken over by it, and one of after it names all of it."""
    state = old_home()
    lost(state, kept=(capsule(4),))
    state.done(shipment(30, 31, made(5, name=b"theirs"), epoch=1))
    state.done(shipment(31, 40, epoch=1, resume=b"copying"))
    state.done(shipment(40, 40, cmd.SweepReplicas(epoch), steps=(0, 1), epoch=1))
    rows = [state.overlay.capsule(capsule(number)) for number in range(1, 6)]
    swept = [row is not None and row.deleted > 0 for row in rows]
    assert swept == [epoch == 1, epoch == 1, False, False, True]


def test_a_lost_home_is_one_event() -> None:
    """What had been sent to the promoted zone is its replica; what had not, and what is made later, is not."""
    state = old_home()
    events = lost(state, kept=(capsule(4),))
    assert [type(each) for each in events[-2:]] == [ev.HomeLost, ev.CapsuleHomed]
    assert flags(state) == FEDERATED | HOME_LOST
    for number in (1, 2):
        assert "zone paris" in str(state.refused(cmd.Resize(capsule(number), 1)))
    for number in (3, 4):
        state.done(cmd.Resize(capsule(number), 1))
    state.done(cmd.CreateCapsule(capsule(5), parent=ROOT_ID, name=b"5"))
    state.done(cmd.RecordShipment(HOME, 0, 0, 8, 20, 0, [(capsule(5), state.position)], 1))
    state.done(cmd.Resize(capsule(5), 1))
    state.done(cmd.Clone(capsule(6), capsule(1), ROOT_ID, b"copy"))
    state.done(cmd.Resize(capsule(6), 1))
    assert state.outcome(cmd.LoseHome(HOME, 1, 30, [], [], [])) == Receipt(state.position)
    folds_again(state)


def test_what_was_not_shipped_is_a_branch() -> None:
    """What differs is cloned below ``/zones/.branches`` and taken back, in the same entry."""
    state = old_home()
    branch = bytes(BRANCHES)
    lost(
        state,
        cmd.CreateCapsule(capsule(70), Kind.DIRECTORY, parent=branch, name=b"paris-1"),
        cmd.Clone(capsule(71), capsule(1), capsule(70), b"1"),
        cmd.Resize(capsule(1), 5),
        cmd.Unlink(ROOT_ID, b"4"),
    )
    state.done(cmd.Resize(capsule(71), 3))
    assert isinstance(state.refused(cmd.Resize(capsule(1), 3)), RefusedError)
    assert isinstance(state.refused(cmd.CreateCapsule(capsule(72), parent=branch, name=b"x")), RefusedError)
    assert isinstance(state.refused(cmd.Unlink(bytes(ZONES), b".branches", None, True)), RefusedError)
    state.done(cmd.Unlink(branch, b"paris-1", directory=None, recursive=True))
    folds_again(state)


def test_the_old_home_follows_where_its_things_always_were() -> None:
    """What the new home ships changes the old home's own capsules in place, from the position of the promotion on."""
    state = old_home()
    state.done(cmd.CreateCapsule(capsule(8), Kind.DIRECTORY, parent=ROOT_ID, name=b"stays"))
    lost(state)
    assert zones.cursor_row(state.rows, HOME, 0, 0).position == 30
    state.done(
        shipment(
            30, 31, cmd.Resize(capsule(1), 77), cmd.PlaceCapsule(capsule(2), [(ROOT_ID, b"two")]), epoch=1
        )
    )
    row, root = state.overlay.capsule(capsule(1)), state.overlay.capsule(ROOT_ID)
    assert row is not None
    assert root is not None
    assert row.size == 77
    home = zones.home_row(state.rows, capsule(1))
    assert home is not None
    assert (home.zone, home.position) == (HOME, 31)
    state.done(shipment(31, 32, cmd.PlaceCapsule(capsule(2), [(capsule(8), b"2"), (ROOT_ID, b"3")]), epoch=1))
    assert isinstance(state.refused(shipment(32, 33, cmd.Resize(capsule(3), 1), epoch=1)), RefusedError)
    folds_again(state)


def test_a_tree_that_holds_replicas_is_not_removed_with_them() -> None:
    """On an old home a directory of its own cannot be removed with what it follows inside."""
    state = State(zone_commands())
    state.done(cmd.CreateCapsule(capsule(1), Kind.DIRECTORY, parent=ROOT_ID, name=b"d"))
    state.done(cmd.CreateCapsule(capsule(2), parent=capsule(1), name=b"f"))
    state.done(cmd.RecordShipment(HOME, 0, 0, 0, 8, 0, [(capsule(2), 6)], 1))
    lost(state)
    remove = cmd.Unlink(ROOT_ID, b"d", directory=None, recursive=True)
    assert isinstance(state.refused(remove), RefusedError)
    state.done(shipment(30, 31, cmd.WithdrawCapsule(capsule(2)), epoch=1))
    state.done(remove)


def test_homes_go_back() -> None:
    """Promoted in turn, the old home has everything again; and the zone that was home in between has replicas again."""
    old = old_home()
    lost(old)
    old.done(shipment(30, 31, cmd.Resize(capsule(1), 77), epoch=1))
    old.done(cmd.PromoteZone(HOME))
    assert flags(old) == FEDERATED
    for number in (1, 2):
        old.done(cmd.Resize(capsule(number), 5))
    assert isinstance(old.refused(shipment(31, 32, epoch=1)), RefusedError)
    folds_again(old)

    new = State(zone_commands())
    new.done(shipment(0, 3, made(1, name=b"a")))
    new.done(cmd.PromoteZone(HOME))
    new.done(cmd.CreateCapsule(capsule(2), parent=TREE, name=b"b"))
    new.done(cmd.RecordShipment(HOME, 0, 0, 0, 8, 0, [(capsule(2), 7), (capsule(1), 7)], 1))
    lost(new, epoch=2)
    for number in (1, 2):
        assert isinstance(new.refused(cmd.Resize(capsule(number), 5)), RefusedError)
    assert (
        len(new.done(shipment(3, 20, cmd.Resize(capsule(1), 99), cmd.Resize(capsule(2), 99), epoch=2))) == 1
    )
    new.done(shipment(20, 31, cmd.Resize(capsule(1), 6), cmd.Resize(capsule(2), 6), epoch=2))
    assert [row.size for row in (new.overlay.capsule(capsule(n)) for n in (1, 2)) if row] == [6, 6]
    assert isinstance(new.refused(cmd.LoseHome(HOME, 1, 30, [], [], [])), ConflictError)
    folds_again(new)


def test_ids_of_directories_are_for_ever() -> None:
    """The ids of ``/zones`` and what is in it follow from the zone's alone, and from nothing that may change."""
    assert str(ZONES) == "955e5174-1f28-80f7-a6d8-c8aa95be505a"
    assert len({ROOT, CLUSTER, ZONES, BRANCHES, zone_root(HOME), zone_root(OTHER)}) == 6


def test_a_promotion_is_as_far_as_was_looked_at(state: State) -> None:
    """With other cursors than were looked at nothing happens; a second time it is done only if that is asked for."""
    state.done(shipment(0, 3, made(1, name=b"a")))
    for cursors in ([], [(0, 0, 2, 0)], [(0, 0, 3, 1)], [(0, 0, 3, 0), (0, 1, 1, 0)]):
        assert "meanwhile" in str(state.refused(cmd.PromoteZone(HOME, cursors)))
    state.done(cmd.PromoteZone(HOME, [(0, 0, 3, 0)]))
    row = zones.zone_row(state.rows, HOME)
    assert row is not None
    assert (row.epoch, row.promoted) == (1, state.position)
    assert isinstance(state.refused(cmd.PromoteZone(HOME, [(0, 0, 3, 0)])), ConflictError)
    (event,) = state.done(cmd.PromoteZone(HOME, again=True))
    assert isinstance(event, ev.ZonePromoted)
    assert event.epoch == 2
    folds_again(state)


def test_halves_of_copies_are_purged(state: State) -> None:
    """A replica of which a copy is under way goes with the promotion; whole ones and others' halves stay."""
    half = cmd.Copied(capsule(1), 2, 0, False, [made(1)], (0,) * 4)
    hidden = cmd.Copied(capsule(2), 3, 0, False, [made(2), cmd.PlaceCapsule(capsule(2), ())], (0,) * 4)
    state.done(shipment(0, 2, made(2, name=b"b"), made(3, name=b"c"), half))
    state.done(shipment(2, 3, hidden))
    state.done(shipment(0, 2, attrs.evolve(half, capsule=capsule(4), commands=[made(4)]), zone=OTHER))
    for wrong in (capsule(3), capsule(4), capsule(9)):
        assert isinstance(state.refused(cmd.PromoteZone(HOME, incomplete=[wrong])), ConflictError)
    named = cmd.Copied(
        capsule(5), 4, 0, False, [made(5), cmd.PlaceCapsule(capsule(5), [(TREE, b"n")])], (0,) * 4
    )
    state.done(shipment(3, 4, named))
    state.done(cmd.PromoteZone(HOME, incomplete=[capsule(1), capsule(2), capsule(5)]))
    assert [state.overlay.capsule(capsule(n)) is None for n in (1, 2, 3, 4)] == [True, True, False, False]
    assert [key[ID_BYTES:] for key, _ in state.rows.scan(ENTRY, TREE)] == [b".capsules", b"c"]
    folds_again(state)


def test_a_home_is_lost_as_it_was_looked_at() -> None:
    """If what was shared has changed since, nothing happens; what is taken back has the times it had."""
    state = old_home()
    state.done(write(1, 0, b"fork"))
    seen = state.position
    copy: list[cmd.Command] = [
        cmd.CreateCapsule(capsule(70), Kind.DIRECTORY, parent=bytes(BRANCHES), name=b"paris-1"),
        cmd.Clone(capsule(71), capsule(1), capsule(70), b"1"),
        cmd.CopyRange(capsule(1), 0, capsule(2), 0, 10),
    ]
    command = cmd.LoseHome(HOME, 1, 30, [(0, 0, 6)], copy, [], [(capsule(1), (1, 2, 3, 4))], seen)
    assert "meanwhile" in str(state.refused(attrs.evolve(command, seen=seen - 1)))
    wrong = attrs.evolve(command, times=[(capsule(3), (1, 2, 3, 4))])
    assert isinstance(state.refused(wrong), UsageError)
    state.done(command)
    row = state.overlay.capsule(capsule(1))
    assert row is not None
    assert (row.atime, row.mtime, row.ctime, row.btime) == (1, 2, 3, 4)
    home = zones.home_row(state.rows, capsule(1))
    assert home is not None
    assert (home.zone, home.position) == (HOME, 30)
    about = zones.zone_row(state.rows, HOME)
    assert about is not None
    assert (about.lost, about.parted) == (state.position, state.position)
    folds_again(state)
