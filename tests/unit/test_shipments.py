"""What another zone ships: exactly once, in order, only to its own, and never back."""

from __future__ import annotations

import attrs
import pytest

from space._errors import ConflictError, NotFoundError, RefusedError, SpaceError, UsageError
from space.events import commands as cmd
from space.events import types as ev
from space.events.commands import Receipt
from space.events.ids import ROOT, ZONES, zone_capsules, zone_root
from space.events.types import Kind
from space.statemachine import shipments, zones
from space.statemachine.apply import clone_id
from space.statemachine.decision import capsule_text
from space.statemachine.tables import ENTRY, KEY, REPLICA, U32, XATTR, EntryRow
from tests.state_support import MemoryWriter, fold_state
from tests.zone_support import HOME, OTHER, ROOT_ID, State, capsule, made, shipment, write, zone_commands

pytestmark = pytest.mark.unit

TREE = bytes(zone_root(HOME))
APART = bytes(zone_capsules(HOME))


@pytest.fixture
def state() -> State:
    """A store of zone "here" that knows "paris", which ships, and "oslo"."""
    return State(zone_commands())


def leads_to(state: State, parent: bytes, name: bytes) -> bytes | None:
    """The capsule a name leads to."""
    data = state.rows.get(ENTRY, parent + name)
    return None if data is None else EntryRow.decode(data).capsule


def reached(state: State, number: int) -> int:
    """The position of its home that a replica has come to."""
    home = zones.home_row(state.rows, capsule(number))
    assert home is not None
    return home.position


def folds_again(state: State) -> None:
    """What was decided live is what the log folds to."""
    again = MemoryWriter()
    fold_state(state.batches, again)
    assert again.rows == state.rows.rows


def test_the_first_shipment_makes_the_directories(state: State) -> None:
    """``/zones``, ``/zones/NAME`` and ``/zones/NAME/.capsules`` are there with the first shipment, once."""
    state.done(shipment(0, 1))
    assert leads_to(state, ROOT_ID, b"zones") == ZONES
    assert leads_to(state, bytes(ZONES), b"paris") == TREE
    assert leads_to(state, TREE, b".capsules") == APART
    assert len(state.done(shipment(1, 2))) == 1
    folds_again(state)


def test_a_shipment_is_carried_out_whole_and_in_order(state: State) -> None:
    """Creations, writes, copies, attributes and names of one batch of the home are one entry."""
    commands: list[cmd.Command] = [
        made(1, Kind.DIRECTORY, name=b"d"),
        made(2, name=b"f", parent=capsule(1)),
        write(2, 0, b"x" * 5000),
        write(2, 5000, b"yy"),
        made(3),
        cmd.CopyRange(capsule(3), 0, capsule(2), 0, 5002),
        cmd.Deallocate(capsule(2), 0, 100),
        cmd.SetXattr(capsule(2), b"user.a", b"b"),
        cmd.SetAttributes(capsule(2), mode=0o600, size=6000),
        cmd.Link(capsule(3), TREE, b"g"),
        cmd.Rename(TREE, b"g", capsule(1), b"g"),
        cmd.SetPolicy(capsule(2), b"another"),
    ]
    state.done(cmd.CreateCapsule(capsule(90), parent=ROOT_ID, name=b"mine"))
    mine = cmd.WriteExtent(capsule(90), 0, 5, write(90, 0, b"local").frames)
    batch = state.prepare(mine, shipment(0, 1, *commands))
    assert [type(each) for each in batch.outcomes] == [Receipt, Receipt]
    row = state.overlay.capsule(capsule(2))
    assert row is not None
    assert (row.size, row.mode, row.flags) == (6000, 0o600, REPLICA)
    assert leads_to(state, capsule(1), b"g") == capsule(3)
    area = b"".join(bytes(each) for each in batch.payload)
    written = [event for _, _, event in batch.linked() if isinstance(event, ev.ExtentWritten)]
    places = [int.from_bytes(event.frames[20:24], "little") for event in written]
    assert [area[at : at + event.length] for at, event in zip(places, written, strict=True)] == [
        b"local",
        b"x" * 5000,
        b"yy",
    ]
    folds_again(state)


def test_a_copied_range_has_the_link_its_source_has(state: State) -> None:
    """The head of the source's chain in RangeCopied is that of the log, also where the source changed just before."""
    state.done(cmd.CreateCapsule(capsule(9), parent=ROOT_ID, name=b"mine"))
    commands: list[cmd.Command] = [
        made(1),
        made(2),
        write(1, 0, b"abc"),
        cmd.CopyRange(capsule(2), 0, capsule(1), 0, 3),
    ]
    batch = state.prepare(shipment(0, 1, *commands))
    linked = [(link, event) for link, event in batch.entries[0].events]
    (copied,) = [event for _, event in linked if isinstance(event, ev.RangeCopied)]
    (link,) = [link for link, event in linked if isinstance(event, ev.ExtentWritten)]
    assert copied.source_link == link


def test_one_refused_command_is_the_whole_shipment_refused(state: State) -> None:
    """Where one command of a shipment cannot be, nothing of it happens and the cursor stays."""
    state.done(shipment(0, 1, made(1, name=b"f")))
    refused = state.refused(shipment(1, 2, write(1, 0, b"x"), made(2, name=b"f")))
    assert isinstance(refused, ConflictError)
    assert zones.cursor_row(state.rows, HOME, 0, 0).position == 1
    state.done(shipment(1, 2, write(1, 0, b"x"), made(2, name=b"g")))


def test_a_shipment_counts_once(state: State) -> None:
    """What came before is answered as repeated and changes nothing, whole or in part; what leaves a gap is refused."""
    first, second = shipment(0, 5, made(1, name=b"f")), shipment(5, 9, write(1, 0, b"x"))
    assert state.outcome(first) == Receipt(5)
    assert state.outcome(second) == Receipt(6)
    before = dict(state.rows.rows)
    for again in (first, second, shipment(3, 7), shipment(9, 9)):
        assert state.outcome(again) == Receipt(6, repeated=True)
    assert state.rows.rows == before
    for gap in (shipment(10, 12), shipment(8, 12), shipment(0, 12)):
        error = state.refused(gap)
        assert isinstance(error, ConflictError)
        assert "position 9" in str(error)


def test_streams_have_cursors_of_their_own(state: State) -> None:
    """Shards and lanes of one zone, and zones, move apart from each other; a note comes back as it was left."""
    state.done(shipment(0, 5, lane=1, resume=b"so far", steps=(0, 3)))
    state.done(shipment(0, 2, shard=1))
    state.done(shipment(0, 7, zone=OTHER))
    row = zones.cursor_row(state.rows, HOME, 0, 1)
    assert (row.position, row.step, row.resume) == (5, 3, b"so far")
    assert [(shard, lane, each.position) for shard, lane, each in zones.cursors(state.rows, HOME)] == [
        (0, 1, 5),
        (1, 0, 2),
    ]
    assert zones.cursor_row(state.rows, HOME, 0, 0).position == 0


def test_times_are_the_homes(state: State) -> None:
    """Times of what a shipment makes and changes are when the home did it; the batch keeps when it came."""
    batch = state.prepare(shipment(0, 1, made(1, name=b"f"), write(1, 0, b"x"), time_ns=12345))
    row, directory = state.overlay.capsule(capsule(1)), state.overlay.capsule(TREE)
    assert row is not None
    assert directory is not None
    assert (row.btime, row.ctime, row.mtime, directory.mtime) == (12345,) * 4
    assert batch.time_ns != 12345
    assert batch.entries[0].time_ns == 12345


def test_a_zone_reaches_only_what_is_its_own(state: State) -> None:
    """Neither this store's capsules nor another zone's are changed, named, copied from or deleted by a shipment."""
    state.done(cmd.CreateCapsule(capsule(1), parent=ROOT_ID, name=b"mine", size=9))
    state.done(cmd.CreateCapsule(capsule(5), Kind.DIRECTORY, parent=ROOT_ID, name=b"dir"))
    state.done(shipment(0, 1, made(2, name=b"theirs", parent=bytes(zone_root(OTHER))), zone=OTHER))
    state.done(shipment(0, 1, made(3, name=b"f")))
    for number in (1, 2):
        other = capsule(number)
        for command in (
            write(number, 0, b"x"),
            cmd.Resize(other, 1),
            cmd.SetAttributes(other, mode=0),
            cmd.SetXattr(other, b"a", b""),
            cmd.SetPolicy(other, b"p"),
            cmd.Link(other, TREE, b"l"),
            cmd.PlaceCapsule(other, [(TREE, b"l")]),
            cmd.WithdrawCapsule(other),
            cmd.TakeSnapshot(other, "paris:s"),
            cmd.CopyRange(capsule(3), 0, other, 0, 1),
            cmd.Clone(capsule(7), other, TREE, b"c"),
            cmd.Copied(other, 9, 0, True, [cmd.CreateCapsule(other)], (0,) * 4),
        ):
            assert isinstance(state.refused(shipment(1, 2, command)), RefusedError), command
    for parent in (ROOT_ID, bytes(ZONES), bytes(zone_root(OTHER)), capsule(5)):
        assert isinstance(state.refused(shipment(1, 2, made(8, name=b"new", parent=parent))), RefusedError)
        assert isinstance(state.refused(shipment(1, 2, cmd.Link(capsule(3), parent, b"new"))), RefusedError)
    assert isinstance(state.refused(shipment(1, 2, cmd.Unlink(ROOT_ID, b"mine"))), RefusedError)
    assert isinstance(state.refused(shipment(1, 2, cmd.Rename(ROOT_ID, b"mine", TREE, b"m"))), RefusedError)


@pytest.mark.parametrize(
    "command",
    [
        cmd.InitialiseStore(bytes(16), 0, 0, 0),
        cmd.PurgeCapsules([capsule(1)]),
        cmd.ReclaimPayload([(1, 0, 1)]),
        cmd.RemoveZone(HOME),
        cmd.PromoteZone(HOME),
        cmd.Together([cmd.Resize(capsule(1), 1)]),
        shipment(1, 2),
        attrs.evolve(write(1, 0, b"x"), change=1),
        attrs.evolve(write(1, 0, b"x"), reserved=0),
        cmd.TakeSnapshot(capsule(1), "daily"),
        cmd.DropSnapshot("daily"),
        cmd.Clone(capsule(2), capsule(1), TREE, b"c", 1, b"manifest"),
        cmd.RegisterReservation(capsule(1), bytes(16), 0, 0, 1),
        cmd.Copied(capsule(1), 2, 0, True, [], (0,) * 4),
        cmd.Copied(capsule(1), 2, 0, True, [write(1, 0, b"x")], (0,) * 4),
        cmd.Copied(capsule(1), 2, 0, True, [made(1), write(2, 0, b"x")], (0,) * 4),
        cmd.Copied(capsule(1), 2, 0, True, [made(1), cmd.Unlink(TREE, b"f")], (0,) * 4),
        cmd.Copied(capsule(1), 0, 0, True, [made(1)], (0,) * 4),
    ],
    ids=lambda command: type(command).__name__,
)
def test_what_is_no_shipment_is_refused(state: State, command: cmd.Command) -> None:
    """Upkeep, conditions on this store's positions, names of its snapshots, and what is no copy cannot come."""
    state.done(cmd.CreateCapsule(capsule(9), parent=ROOT_ID, name=b"mine"))
    state.done(cmd.TakeSnapshot(capsule(9), "daily"))
    state.done(shipment(0, 1, made(1, name=b"f")))
    state.refused(shipment(1, 2, command))


@pytest.mark.parametrize(
    "wrong",
    [
        {"zone": bytes(16)},
        {"epoch": 1},
        {"shard": -1},
        {"lane": 1 << 32},
        {"time_ns": -1},
        {"through_position": 1 << 63},
        {"resume": bytes(300)},
    ],
    ids=str,
)
def test_a_shipment_out_of_range_is_an_error(state: State, wrong: dict[str, object]) -> None:
    """Unknown zones, other epochs, and numbers or notes beyond their limits are refused, and nothing else happens."""
    command = attrs.evolve(shipment(0, 1), **wrong)  # type: ignore[arg-type]
    assert isinstance(state.refused(command), SpaceError)


@pytest.mark.parametrize(
    "command",
    [
        made(1),
        cmd.Copied(capsule(1), 1, 0, True, [made(1)], (0,) * 4),
        cmd.WithdrawCapsule(capsule(1)),
        cmd.SweepReplicas(0),
    ],
)
def test_parts_of_shipments_are_no_commands(state: State, command: cmd.Command) -> None:
    """What has a meaning only in a shipment is refused alone, and among several."""
    if not isinstance(command, cmd.CreateCapsule):
        assert isinstance(state.refused(command), UsageError)
        assert isinstance(state.refused(cmd.Together([command])), UsageError)


# --- replicas here -----------------------------------------------------------------------------------


def test_a_replica_is_changed_by_its_home_alone(state: State) -> None:
    """Whatever would change a replica, or names beside it, is refused, naming the home and its address."""
    state.done(shipment(0, 1, made(1, Kind.DIRECTORY, name=b"d"), made(2, name=b"f", parent=capsule(1))))
    state.done(cmd.CreateCapsule(capsule(9), parent=ROOT_ID, name=b"mine", size=9))
    file, directory = capsule(2), capsule(1)
    for command in (
        write(2, 0, b"x"),
        cmd.CopyRange(file, 0, capsule(9), 0, 1),
        cmd.Deallocate(file, 0, 1),
        cmd.Resize(file, 1),
        cmd.SetAttributes(file, mtime=0),
        cmd.SetXattr(file, b"a", b""),
        cmd.RemoveXattr(file, b"a"),
        cmd.SetPolicy(file, b"p"),
        cmd.RegisterReservation(file, bytes(16), 0, 0, 1),
        cmd.DeleteCapsule(file),
        cmd.Link(file, ROOT_ID, b"l"),
        cmd.Link(capsule(9), directory, b"l"),
        cmd.Unlink(directory, b"f"),
        cmd.Unlink(TREE, b"d", directory=None, recursive=True),
        cmd.Rename(directory, b"f", ROOT_ID, b"f"),
        cmd.Rename(ROOT_ID, b"mine", directory, b"f"),
        cmd.Rename(ROOT_ID, b"mine", directory, b"f", exchange=True),
        cmd.CreateCapsule(capsule(8), parent=directory, name=b"n"),
        cmd.Clone(capsule(8), capsule(9), directory, b"n"),
        cmd.Together([cmd.Resize(file, 1)]),
    ):
        error = state.refused(command)
        assert isinstance(error, RefusedError), command
        assert "zone paris, https://paris:1" in str(error), command


def test_what_is_made_of_a_replica_here_is_local(state: State) -> None:
    """A replica can be read from, cloned (also a tree) and snapshotted; the clone is an ordinary capsule."""
    state.done(shipment(0, 1, made(1, Kind.DIRECTORY, name=b"d"), made(2, name=b"f", parent=capsule(1))))
    state.done(cmd.TakeSnapshot(capsule(1), "before"))
    state.done(cmd.Clone(capsule(9), capsule(1), ROOT_ID, b"copy"))
    copy = clone_id(capsule(9), capsule(1), capsule(2))
    state.done(cmd.Resize(copy, 7))
    state.done(cmd.Unlink(capsule(9), b"f"))
    state.done(shipment(1, 2, cmd.Resize(capsule(2), 3)))
    folds_again(state)


def test_nothing_under_zones_is_made_here(state: State) -> None:
    """Names in ``/zones``, the name itself, and its directories are no user's, from the first zone on."""
    assert isinstance(
        state.refused(cmd.CreateCapsule(capsule(1), parent=ROOT_ID, name=b"zones")), RefusedError
    )
    state.done(shipment(0, 1))
    state.done(cmd.CreateCapsule(capsule(1), parent=ROOT_ID, name=b"mine"))
    for parent in (bytes(ZONES), TREE, APART):
        assert isinstance(
            state.refused(cmd.CreateCapsule(capsule(2), parent=parent, name=b"n")), RefusedError
        )
        assert isinstance(state.refused(cmd.Rename(ROOT_ID, b"mine", parent, b"n")), RefusedError)
    for command in (
        cmd.Rename(ROOT_ID, b"zones", ROOT_ID, b"z"),
        cmd.Unlink(ROOT_ID, b"zones", directory=None, recursive=True),
        cmd.Unlink(bytes(ZONES), b"paris", directory=None, recursive=True),
        cmd.Rename(ROOT_ID, b"mine", ROOT_ID, b"zones", exchange=True),
        cmd.SetAttributes(bytes(ZONES), mode=0),
    ):
        assert isinstance(state.refused(command), RefusedError), command


def test_without_zones_the_name_is_free() -> None:
    """A store that knows no zone may have a ``/zones`` of its own, and then belongs to none until that is moved."""
    state = State([cmd.InitialiseStore(bytes(16), 0o755, 0, 0)])
    state.done(cmd.CreateCapsule(capsule(1), Kind.DIRECTORY, parent=ROOT_ID, name=b"zones"))
    define = zone_commands()[1]
    assert isinstance(state.refused(define), ConflictError)
    state.done(cmd.Rename(ROOT_ID, b"zones", ROOT_ID, b"areas"))
    state.done(define)


def test_upkeep_reaches_replicas(state: State) -> None:
    """Upkeep purges a replica its home deleted, and whose it was goes with it."""
    state.done(shipment(0, 1, made(1, name=b"f")))
    state.done(shipment(1, 2, cmd.Unlink(TREE, b"f")))
    assert isinstance(state.refused(cmd.Undelete(capsule(1), ROOT_ID, b"back")), RefusedError)
    state.done(cmd.PurgeCapsules([capsule(1)]))
    assert zones.home_row(state.rows, capsule(1)) is None
    folds_again(state)


# --- never back ----------------------------------------------------------------------------------------


def copied(
    number: int, position: int, step: int = 0, *commands: cmd.Command, last: bool = True
) -> cmd.Copied:
    """A part of a copy."""
    first = [made(number)] if step == 0 else []
    return cmd.Copied(capsule(number), position, step, last, [*first, *commands], (1, 2, 3, 4))


def test_a_capsule_never_goes_back(state: State) -> None:
    """What a slower stream brings of a capsule that came further by another way is passed over; of others it is not."""
    state.done(shipment(0, 3, made(1, name=b"f"), made(2, name=b"g")))
    state.done(shipment(0, 9, copied(1, 9, 0, write(1, 0, b"new")), lane=50))
    events = state.done(
        shipment(
            3,
            7,
            write(1, 0, b"older bytes"),
            cmd.Resize(capsule(1), 100),
            cmd.PlaceCapsule(capsule(1), [(TREE, b"old")]),
            cmd.Unlink(TREE, b"f"),
            cmd.WithdrawCapsule(capsule(1)),
            cmd.Resize(capsule(2), 5),
        )
    )
    assert [type(each) for each in events] == [ev.ShipmentReceived, ev.CapsuleResized]
    assert (reached(state, 1), reached(state, 2)) == (9, 7)
    state.done(shipment(7, 10, cmd.Resize(capsule(1), 1)))
    assert reached(state, 1) == 10


def test_a_copy_takes_back_what_was_there(state: State) -> None:
    """A copy over an older replica leaves its content, attributes, xattrs and policy, and times, as the copy says."""
    state.done(
        shipment(0, 3, made(1, name=b"f"), write(1, 0, b"x" * 100), cmd.SetXattr(capsule(1), b"gone", b""))
    )
    part = copied(1, 5, 0, write(1, 0, b"abc"), cmd.SetXattr(capsule(1), b"new", b""))
    events = state.done(shipment(3, 3, part, steps=(0, 1)))
    assert ev.RangeDeallocated(capsule(1), 0, 100) in events
    row = state.overlay.capsule(capsule(1))
    assert row is not None
    assert (row.size, row.atime, row.mtime, row.ctime, row.btime) == (3, 1, 2, 3, 4)
    assert [key[16:] for key, _ in state.rows.scan(XATTR, capsule(1))] == [b"new"]
    assert leads_to(state, TREE, b"f") == capsule(1)
    folds_again(state)


def test_parts_of_a_copy_come_in_order_and_once(state: State) -> None:
    """Parts count up from 0; one left out is refused; those of a copy that another overtook are passed over."""
    state.done(shipment(0, 5, copied(1, 5, 0, last=False), lane=1, steps=(0, 1)))
    assert zones.home_row(state.rows, capsule(1)) == zones.HomeRow(HOME, 5, 5, 1)
    gap = shipment(5, 5, copied(1, 5, 2), lane=1, steps=(1, 2))
    assert isinstance(state.refused(gap), ConflictError)
    state.done(shipment(5, 5, copied(1, 5, 1, write(1, 0, b"a"), last=False), lane=1, steps=(1, 2)))
    state.done(shipment(0, 8, cmd.Resize(capsule(1), 50)))
    assert zones.home_row(state.rows, capsule(1)) == zones.HomeRow(HOME, 8, 5, 2)
    state.done(shipment(8, 9, copied(1, 9)))
    events = state.done(shipment(5, 5, copied(1, 5, 2, write(1, 0, b"b")), lane=1, steps=(2, 3)))
    assert [type(each) for each in events] == [ev.ShipmentReceived]
    assert zones.home_row(state.rows, capsule(1)) == zones.HomeRow(HOME, 9)


def test_a_copy_that_was_begun_can_be_begun_again(state: State) -> None:
    """Part 0 of the same position starts an unfinished copy anew, and is passed over once it is finished."""
    state.done(shipment(0, 5, copied(1, 5, 0, write(1, 0, b"abc"), last=False)))
    state.done(shipment(0, 5, copied(1, 5, 0, write(1, 0, b"z")), lane=1))
    row = state.overlay.capsule(capsule(1))
    assert row is not None
    assert row.size == 1
    assert len(state.done(shipment(0, 5, copied(1, 5), lane=2))) == 1


def test_a_copy_of_a_withdrawn_capsule_brings_it_back(state: State) -> None:
    """A capsule that may be shipped again is copied over what was withdrawn, and named."""
    state.done(shipment(0, 1, made(1, name=b"f")))
    state.done(shipment(1, 2, cmd.WithdrawCapsule(capsule(1))))
    state.done(shipment(2, 3, copied(1, 3, 0, cmd.PlaceCapsule(capsule(1), [(TREE, b"again")]))))
    row = state.overlay.capsule(capsule(1))
    assert row is not None
    assert (row.deleted, row.nlink) == (0, 1)
    assert leads_to(state, TREE, b"again") == capsule(1)
    folds_again(state)


# --- names -------------------------------------------------------------------------------------------


def anew(state: State) -> None:
    """Paris had a directory 1 with files 2 to 4; it is removed and added, and a copy as of position 9 is opened."""
    files = [made(number, name=b"%d" % number, parent=capsule(1)) for number in (2, 3, 4)]
    state.done(shipment(0, 5, made(1, Kind.DIRECTORY, name=b"d"), *files))
    state.done(cmd.RemoveZone(HOME))
    (added,) = [each for each in zone_commands() if isinstance(each, cmd.AddZone) and each.zone == HOME]
    state.done(added)
    state.done(shipment(0, 9, resume=b"copying"))


def part(number: int, parent: bytes, name: bytes, kind: Kind = Kind.FILE) -> cmd.Copied:
    """A copy as of position 9 that is one part."""
    commands: list[cmd.Command] = [made(number, kind), cmd.PlaceCapsule(capsule(number), [(parent, name)])]
    return cmd.Copied(capsule(number), 9, 0, True, commands, (1, 2, 3, 4))


def test_a_copy_in_steps_takes_no_names_before_its_end(state: State) -> None:
    """What has not come again keeps its name, or hangs apart where that went to something else; at the end it goes."""
    anew(state)
    directory = part(1, TREE, b"d", Kind.DIRECTORY)
    state.done(shipment(9, 9, directory, steps=(0, 1), resume=b"1"))
    assert [leads_to(state, capsule(1), b"%d" % n) for n in (2, 3, 4)] == [capsule(n) for n in (2, 3, 4)]
    state.done(shipment(9, 9, part(2, capsule(1), b"3"), steps=(1, 2), resume=b"2"))
    assert leads_to(state, capsule(1), b"3") == capsule(2)
    assert leads_to(state, APART, capsule_text(capsule(3)).encode()) == capsule(3)
    state.done(shipment(9, 9, part(3, capsule(1), b"2"), steps=(2, 3), resume=b"3"))
    assert leads_to(state, APART, capsule_text(capsule(3)).encode()) is None
    assert leads_to(state, capsule(1), b"4") == capsule(4)
    state.done(shipment(9, 9, cmd.SweepReplicas(0), steps=(3, 4), resume=b"4"))
    gone = state.overlay.capsule(capsule(4))
    assert gone is not None
    assert gone.deleted
    assert reached(state, 4) == 9
    assert [leads_to(state, capsule(1), b"%d" % n) for n in (2, 3, 4)] == [capsule(3), capsule(2), None]
    folds_again(state)


def test_a_sweep_is_no_larger_than_an_entry(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more than can go at once some go, and the stream goes on."""
    anew(state)
    monkeypatch.setattr(shipments, "SWEEP_EVENTS_MAX", 3)
    state.done(shipment(9, 9, cmd.SweepReplicas(0), steps=(0, 1)))
    rows = [state.overlay.capsule(capsule(number)) for number in (1, 2, 3, 4)]
    assert [bool(row is None or row.deleted) for row in rows] == [False, True, True, False]


def test_a_copy_in_one_entry_is_all_there_is_in_a_directory(state: State) -> None:
    """What comes with the directory, in the same entry, is what is in it."""
    anew(state)
    directory = attrs.evolve(part(1, TREE, b"d", Kind.DIRECTORY), position=10)
    again = attrs.evolve(part(3, capsule(1), b"3"), position=10)
    state.done(shipment(9, 10, directory, again))
    assert [leads_to(state, capsule(1), b"%d" % n) for n in (2, 3, 4)] == [None, capsule(3), None]


def test_a_place_is_all_names_there_are(state: State) -> None:
    """After a placing a file has exactly the names said, whatever it had; without one it hangs apart under its id."""
    name = b"00000000-0000-0000-6361-7073756c6501"
    state.done(
        shipment(
            0, 1, made(1, name=b"a"), cmd.Link(capsule(1), TREE, b"b"), made(2, Kind.DIRECTORY, name=b"d")
        )
    )
    state.done(shipment(1, 2, cmd.PlaceCapsule(capsule(1), [(TREE, b"b"), (capsule(2), b"c")])))
    assert [leads_to(state, TREE, each) for each in (b"a", b"b")] == [None, capsule(1)]
    assert leads_to(state, capsule(2), b"c") == capsule(1)
    state.done(shipment(2, 3, cmd.PlaceCapsule(capsule(1), [], [(TREE, b"b"), (capsule(2), b"c")])))
    row = state.overlay.capsule(capsule(1))
    assert row is not None
    assert (row.nlink, leads_to(state, APART, name)) == (1, capsule(1))
    assert len(state.done(shipment(3, 4, cmd.PlaceCapsule(capsule(1), [(capsule(77), b"x")])))) == 1
    state.done(shipment(4, 5, cmd.PlaceCapsule(capsule(1), [(TREE, b"home")])))
    assert leads_to(state, APART, name) is None
    folds_again(state)


def test_a_directory_without_a_place_hangs_apart(state: State) -> None:
    """A directory that comes without a name hangs apart, is placed by a move, and never into itself."""
    state.done(
        shipment(0, 1, made(1, Kind.DIRECTORY), made(2, Kind.DIRECTORY, name=b"in", parent=capsule(1)))
    )
    state.done(shipment(1, 2, cmd.PlaceCapsule(capsule(1), [(TREE, b"d")])))
    assert leads_to(state, TREE, b"d") == capsule(1)
    assert [leads_to(state, capsule(1), b"in")] == [capsule(2)]
    state.done(shipment(2, 3, cmd.PlaceCapsule(capsule(1), [(capsule(2), b"d")])))
    row = state.overlay.capsule(capsule(1))
    assert row is not None
    assert row.parent == APART


def test_a_name_goes_to_who_came_furthest(state: State) -> None:
    """Placing takes a name from a capsule, except from one that has come further than the shipment."""
    state.done(shipment(0, 1, made(1, name=b"n"), made(2, name=b"m")))
    state.done(shipment(1, 2, cmd.PlaceCapsule(capsule(2), [(TREE, b"n")])))
    assert leads_to(state, TREE, b"n") == capsule(2)
    assert reached(state, 1) == 1, "what lost a name has not come further by that"
    place = cmd.PlaceCapsule(capsule(1), [(TREE, b"k")])
    state.done(shipment(0, 9, copied(3, 9, 0, cmd.PlaceCapsule(capsule(3), [(TREE, b"n")])), lane=1))
    assert leads_to(state, TREE, b"n") == capsule(3)
    state.done(shipment(2, 4, cmd.PlaceCapsule(capsule(2), [(TREE, b"n")]), place))
    assert [leads_to(state, TREE, name) for name in (b"n", b"k")] == [capsule(3), capsule(1)]
    folds_again(state)


def test_a_withdrawn_directory_leaves_what_is_in_it(state: State) -> None:
    """What is in a directory that is withdrawn hangs apart; the directory is deleted and stays a replica."""
    state.done(
        shipment(
            0,
            1,
            made(1, Kind.DIRECTORY, name=b"d"),
            made(2, name=b"f", parent=capsule(1)),
            made(3, name=b"g"),
        )
    )
    state.done(shipment(1, 2, cmd.WithdrawCapsule(capsule(1)), cmd.WithdrawCapsule(capsule(42))))
    row, file = state.overlay.capsule(capsule(1)), state.overlay.capsule(capsule(2))
    assert row is not None
    assert file is not None
    assert (bool(row.deleted), row.entries, row.flags, file.parent) == (True, 0, REPLICA, APART)
    assert isinstance(state.refused(cmd.Undelete(capsule(1), ROOT_ID, b"d")), RefusedError)
    folds_again(state)


def test_a_clone_by_the_home_is_a_replica(state: State) -> None:
    """What the home cloned is cloned here, with everything in it, and is the home's."""
    state.done(shipment(0, 1, made(1, Kind.DIRECTORY, name=b"d"), made(2, name=b"f", parent=capsule(1))))
    state.done(shipment(1, 2, cmd.Clone(capsule(3), capsule(1), TREE, b"copy")))
    inner = clone_id(capsule(3), capsule(1), capsule(2))
    for each in (capsule(3), inner):
        assert isinstance(state.refused(cmd.SetXattr(each, b"a", b"")), RefusedError)
    state.done(shipment(2, 3, cmd.Resize(inner, 8)))
    folds_again(state)


def test_snapshots_of_a_zone_have_its_name(state: State) -> None:
    """The home's snapshots come under a name that begins with the zone's, which nobody here makes or drops."""
    state.done(shipment(0, 1, made(1, name=b"f"), cmd.TakeSnapshot(capsule(1), "paris:daily")))
    for command in (cmd.TakeSnapshot(capsule(1), "paris:mine"), cmd.DropSnapshot("paris:daily")):
        assert isinstance(state.refused(command), RefusedError)
    state.done(cmd.TakeSnapshot(capsule(1), "rome:mine"))
    state.done(shipment(1, 2, cmd.DropSnapshot("paris:daily")))
    assert isinstance(state.refused(shipment(2, 3, cmd.DropSnapshot("paris:daily"))), NotFoundError)


# --- keys --------------------------------------------------------------------------------------------


def test_a_key_of_the_zone_is_known_again(state: State) -> None:
    """Two capsules of a zone may have one key, which keeps the bytes it came with; frames have it or none."""
    key = cmd.NewKey(7, 1, b"wrapped here")
    first = attrs.evolve(made(1), key=key)
    second = attrs.evolve(made(2), key=cmd.NewKey(7, 1, b"wrapped again"))
    state.done(shipment(0, 1, first, second, write(2, 0, b"x", key=7), write(1, 0, b"y")))
    assert state.rows.get(KEY, U32.pack(7) + U32.pack(1)) == b"wrapped here"
    assert [row.key for row in (state.overlay.capsule(capsule(n)) for n in (1, 2)) if row] == [7, 7]
    assert isinstance(state.refused(shipment(1, 2, write(1, 0, b"x", key=8))), RefusedError)
    state.done(shipment(1, 2, made(3), cmd.SetPolicy(capsule(3), b"p", key)))
    folds_again(state)


def test_a_key_of_this_store_is_not_named_by_a_zone(state: State) -> None:
    """A key number that is taken here, in any version, is refused: nothing would open what is under it."""
    state.done(cmd.CreateCapsule(capsule(9), parent=ROOT_ID, name=b"mine", key=cmd.NewKey(7, 1, b"ours")))
    for version in (1, 2):
        create = attrs.evolve(made(1), key=cmd.NewKey(7, version, b"theirs"))
        assert isinstance(state.refused(shipment(0, 1, create)), ConflictError)
    assert state.rows.get(KEY, U32.pack(7) + U32.pack(1)) == b"ours"


@pytest.mark.parametrize("key, kept", [(0, False), (7, True)])
def test_deduplication_does_not_find_what_was_shipped(state: State, key: int, kept: bool) -> None:
    """A plain frame of another zone comes as one that is not shared, whatever hash it claims; encrypted ones stay."""
    create = attrs.evolve(made(1), key=cmd.NewKey(7, 1, b"wrapped"))
    (frame,) = write(1, 0, b"abc", key=key).frames
    shared = attrs.evolve(frame, record=frame.record[:13] + b"\2" + frame.record[14:])
    events = state.done(shipment(0, 1, create, cmd.WriteExtent(capsule(1), 0, 3, [shared])))
    (written,) = [event for event in events if isinstance(event, ev.ExtentWritten)]
    assert bool(written.frames[13] & 2) == kept


def test_what_is_no_frame_is_refused(state: State) -> None:
    """A record of another length is an error and nothing else."""
    command = cmd.WriteExtent(capsule(1), 0, 1, [cmd.StoredFrame(b"short", b"x")])
    assert isinstance(state.refused(shipment(0, 1, made(1), command)), UsageError)


# --- positions of the home ---------------------------------------------------------------------------


def test_a_position_of_the_home_leads_to_one_here(state: State) -> None:
    """For every position of the home a mark leads to a place shortly before it was reached."""
    came: dict[int, int] = {}
    at = 0
    for number in range(1, 900):
        if number % 3:
            state.done(cmd.CreateCapsule(number.to_bytes(16, "little"), parent=ROOT_ID, name=b"%d" % number))
        else:
            state.done(shipment(at, at + 2))
            at += 2
            came[at] = state.position
    assert zones.marked_before(state.rows, HOME, 0, 0, 1) == 0
    for position in range(2, at + 1):
        exact = came[position - position % 2]
        marked = zones.marked_before(state.rows, HOME, 0, 0, position)
        assert 0 <= exact - marked < zones.MARK_EVERY
    assert zones.marked_before(state.rows, HOME, 0, 1, at) == 0
    assert len(list(state.rows.scan(19, b""))) < 6


def test_root_is_what_the_fold_says() -> None:
    """The root directory of a store without zones has no flags: deciding there looks at nothing else."""
    state = State([cmd.InitialiseStore(bytes(16), 0o755, 0, 0)])
    row = state.overlay.capsule(bytes(ROOT))
    assert row is not None
    assert row.flags == 0
