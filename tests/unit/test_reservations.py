"""Reservations in the log: rules, events, rows, and writes that were allowed under others."""

from __future__ import annotations

from typing import Any, Final

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from space._errors import CorruptionError, SpaceError, Status
from space.events import commands as cmd
from space.events import types as ev
from space.events.commands import Receipt, Request
from space.events.ids import ROOT, CapsuleId
from space.statemachine import reservations
from space.statemachine.reservations import Kind, Notice, State
from space.statemachine.sequencer import prepare
from space.statemachine.tables import RESERVATION, Overlay
from tests.state_support import MemoryWriter

pytestmark = pytest.mark.unit

DEVICE: Final = bytes([7]) * 16
ONE, TWO, THREE = HOSTS = [bytes([number]) * 16 for number in (1, 2, 3)]


class World:
    """A state with one block device, changed as a log would change it."""

    def __init__(self) -> None:
        self.rows = MemoryWriter()
        self.position = 0
        self.events: list[ev.Event] = []
        root = cmd.InitialiseStore(bytes(16), 0o755, 0, 0)
        device = cmd.CreateCapsule(DEVICE, parent=bytes(ROOT), name=b"d", size=1 << 20, block_size=512)
        assert self.does(root) is None
        assert self.does(device) is None

    def does(self, *commands: cmd.Command) -> Status | None:
        """Carries commands out as one batch; the status of the last one that was refused."""
        self.position += 1
        batch = prepare(self.rows, [Request(each) for each in commands], position=self.position, time_ns=1)
        self.events = [event for entry in batch.entries for _, event in entry.events]
        batch.overlay.flush(self.rows)
        refused = [each.status for each in batch.outcomes if not isinstance(each, Receipt)]
        return refused[-1] if refused else None

    @property
    def state(self) -> State:
        """As it was folded."""
        return State.decode(Overlay(self.rows).get(RESERVATION, DEVICE))


def register(host: bytes, new: int, *, old: int = 0, action: int = 0) -> cmd.RegisterReservation:
    """A registration, or its change."""
    return cmd.RegisterReservation(DEVICE, host, action, old, new)


def acquire(
    host: bytes, kind: int, key: int, *, action: int = 0, preempted: int = 0
) -> cmd.AcquireReservation:
    """A reservation, or the preemption of one."""
    return cmd.AcquireReservation(DEVICE, host, action, kind, key, preempted)


def test_the_rows_are_what_was_agreed() -> None:
    """Registrants, holder, generation and notices are in the row, with the position of the change."""
    world = World()
    assert world.does(register(ONE, 11), register(TWO, 22)) is None
    assert world.does(acquire(ONE, 3, 11)) is None
    assert world.events == [ev.ReservationChanged(DEVICE, 3, ONE, b"")]
    assert world.state == State(2, {ONE: 11, TWO: 22}, Kind.WRITE_EXCLUSIVE_REGISTRANTS, ONE, world.position)
    assert world.does(cmd.ReleaseReservation(DEVICE, ONE, 0, 3, 11)) is None
    assert (world.state.noticed, world.state.noticed_since(0)) == (1, ((TWO, Notice.RESERVATION_RELEASED),))
    assert world.does(acquire(TWO, 1, 22, action=1, preempted=11)) is None
    assert world.state.keys == {TWO: 22}
    assert world.state.noticed_since(1) == ((ONE, Notice.REGISTRATION_PREEMPTED),)
    assert world.state.noticed_since(2) == ()


def test_what_may_not_be_is_refused_and_changes_nothing() -> None:
    """A wrong key is not permitted, a field that cannot be is invalid, and no event comes of either."""
    world = World()
    assert world.does(register(ONE, 11)) is None
    before = world.state
    for command, status in (
        (acquire(ONE, 1, 12), Status.NOT_PERMITTED),
        (acquire(TWO, 1, 0), Status.NOT_PERMITTED),
        (acquire(ONE, 7, 11), Status.INVALID),
        (acquire(ONE, 1, 11, action=3), Status.INVALID),
        (register(ONE, 5, action=3), Status.INVALID),
        (register(ONE[:5], 5), Status.INVALID),
        (register(TWO, 1 << 64), Status.INVALID),
        (attrs.evolve(register(TWO, 5), capsule=bytes(ROOT)), Status.IS_DIRECTORY),
        (attrs.evolve(register(TWO, 5), capsule=bytes(16)), Status.NOT_FOUND),
    ):
        assert world.does(command) == status, command
        assert world.events == []
    assert world.state == before


def test_hosts_beyond_the_limit_are_refused() -> None:
    """The report of all registrants fits one transfer; one more has no place, and one that is there still changes."""
    world = World()
    hosts = [number.to_bytes(16, "big") for number in range(1, reservations.REGISTRANTS_MAX + 2)]
    assert world.does(*(register(host, 1) for host in hosts[:-1])) is None
    assert world.does(register(hosts[-1], 1)) == Status.NO_SPACE
    assert world.does(register(hosts[0], 2, old=1, action=2)) is None
    assert world.does(cmd.ReleaseReservation(DEVICE, hosts[0], 1, 0, 2)) is None
    assert len(world.state.notices) == reservations.REGISTRANTS_MAX - 1
    assert (world.state.keys, world.state.kind) == ({}, None)


WRITES: Final[list[cmd.WriteExtent | cmd.Deallocate | cmd.CopyRange]] = [
    cmd.WriteExtent(DEVICE, 0, 512, []),
    cmd.Deallocate(DEVICE, 0, 512),
    cmd.CopyRange(DEVICE, 0, DEVICE, 512, 512),
]


@pytest.mark.parametrize("command", WRITES, ids=lambda each: type(each).__name__)
def test_what_was_allowed_under_other_reservations_is_refused(command: Any) -> None:
    """A write that was checked before a reservation changed is not carried out after it, though it comes late."""
    world = World()
    unheard = attrs.evolve(command, reserved=0)
    assert world.does(unheard) is None
    assert world.does(register(ONE, 11)) is None
    checked = attrs.evolve(command, reserved=world.position)
    assert world.does(unheard) == Status.EXISTS
    assert world.does(checked) is None
    assert world.does(acquire(ONE, 1, 11), checked) == Status.EXISTS
    assert world.does(checked) == Status.EXISTS
    assert world.does(command) is None  # it has nothing to do with reservations


def test_a_capsule_that_is_gone_has_no_reservations() -> None:
    """Purging a capsule takes its row along."""
    world = World()
    assert world.does(register(ONE, 11)) is None
    assert world.does(cmd.Unlink(bytes(ROOT), b"d")) is None
    assert world.does(cmd.PurgeCapsules([DEVICE])) is None
    assert Overlay(world.rows).get(RESERVATION, DEVICE) is None


commands = st.one_of(
    st.builds(
        cmd.RegisterReservation,
        st.just(DEVICE), st.sampled_from(HOSTS), *[st.integers(0, 3)] * 3, st.booleans(),
    ),
    st.builds(
        cmd.AcquireReservation,
        st.just(DEVICE), st.sampled_from(HOSTS), st.integers(0, 3), st.integers(0, 7), *[st.integers(0, 3)] * 2,
    ),
    st.builds(
        cmd.ReleaseReservation,
        st.just(DEVICE), st.sampled_from(HOSTS), st.integers(0, 2), st.integers(0, 7), st.integers(0, 3),
    ),
)  # fmt: skip


@given(st.lists(commands, max_size=30))
def test_events_make_the_same_state_again(asked: list[reservations.Command]) -> None:
    """Whatever is asked: folding the events gives what the rules gave, and the row reads back as it is."""
    world, model = World(), State()
    for command in asked:
        before = model
        told: reservations.Told = []
        refused: Status | None = None
        try:
            model, told = reservations.decided(model, command)
        except SpaceError as error:
            refused = error.status
        assert world.does(command) == refused
        if world.events:
            model = attrs.evolve(model, position=world.position).tell(told)
        else:
            assert (model, told) == (before, [])
        assert world.state == model
        assert State.decode(model.encode()) == model
        assert list(world.state.keys) == list(model.keys)
        assert model.kind is None or any(model.holds(host) for host in HOSTS)


@given(st.binary(max_size=80))
def test_a_malformed_row_is_named(row: bytes) -> None:
    """A row that is none is damage with a hint, never another error."""
    try:
        State.decode(row)
    except CorruptionError as found:
        hint = found.hint
    else:
        hint = "run: space replay"
    assert hint == "run: space replay"


def test_notices_are_bounded() -> None:
    """Only the last notices are kept; their numbers go on."""
    state = State()
    for _ in range(3):
        state = state.tell([(CapsuleId(ONE), Notice.RESERVATION_RELEASED)] * 500)
    assert (state.noticed, len(state.notices)) == (1500, reservations.NOTICES_MAX)
    assert len(state.noticed_since(0)) == reservations.NOTICES_MAX
    assert len(state.noticed_since(1490)) == 10
