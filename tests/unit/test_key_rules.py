"""How changing the master key and destroying data keys are decided and folded."""

from __future__ import annotations

import pytest

from space._errors import Status
from space.events import commands as cmd
from space.events import types as ev
from space.events.ids import ROOT, CapsuleId
from space.statemachine.apply import Context, apply
from space.statemachine.decide import decide
from space.statemachine.decision import Decision, PayloadPlacer, Rejected
from space.statemachine.keys import MASTER, REWRAPPED_MAX
from space.statemachine.tables import KEY, U32, Overlay
from tests.state_support import MemoryWriter

A = CapsuleId(b"a" * 16)
B = CapsuleId(b"b" * 16)


def row(master: int, mark: int = 0) -> bytes:
    """A row that a master key wraps; by none that has a name if that is 0."""
    return bytes([mark]) * 60 + (master.to_bytes(8, "little") if master else b"")


class World:
    """A state that commands are carried out on."""

    def __init__(self) -> None:
        self.state = Overlay(MemoryWriter())
        self.position = 0
        self.do(cmd.InitialiseStore(bytes(16), 0o755, 0, 0))
        for capsule, key in ((A, 1), (B, 2)):
            self.do(cmd.CreateCapsule(capsule, policy=b"", key=cmd.NewKey(key, 1, row(0))))

    def decide(self, command: cmd.Command) -> Decision:
        return decide(self.state, command, PayloadPlacer())

    def do(self, command: cmd.Command) -> list[ev.Event]:
        events = self.decide(command)
        assert not isinstance(events, Rejected), events
        self.position += 1
        for number, event in enumerate(events):
            apply(self.state, Context(self.position, number, self.position), bytes(16), event)
        return list(events)

    def refused(self, command: cmd.Command) -> Status:
        outcome = self.decide(command)
        assert isinstance(outcome, Rejected), outcome
        return outcome.status

    def key(self, number: int) -> bytes | None:
        return self.state.get(KEY, U32.pack(number) + U32.pack(1))


@pytest.fixture
def world() -> World:
    """Two capsules, each with a key that no named master key wraps."""
    return World()


def test_the_master_key_is_changed_with_the_last_row(world: World) -> None:
    """Rows may come in parts; the master key is the new one when none is wrapped otherwise, and not before."""
    assert world.refused(cmd.RewrapKeys(7, [(1, 1, row(7))], True)) is Status.STALE
    (event,) = world.do(cmd.RewrapKeys(7, [(1, 1, row(7, 1))]))
    assert event == ev.KeysRewrapped(bytes(ROOT), 7, ev.REWRAPPED.pack(1, 1, row(7, 1)))
    assert world.state.counter(MASTER) == 0
    rewrapped, changed = world.do(cmd.RewrapKeys(7, [(2, 1, row(7, 2))], True))
    assert isinstance(rewrapped, ev.KeysRewrapped)
    assert changed == ev.MasterKeyChanged(bytes(ROOT), 7, 0)
    assert world.state.counter(MASTER) == 7
    assert (world.key(1), world.key(2)) == (row(7, 1), row(7, 2))
    assert world.refused(cmd.RewrapKeys(8, [], True)) is Status.STALE  # begun before: one change at a time
    assert world.refused(cmd.RewrapKeys(7, [], True, 7)) is Status.INVALID
    world.do(cmd.RewrapKeys(8, [(1, 1, row(8)), (2, 1, row(8))], True, 7))
    assert world.state.counter(MASTER) == 8


def test_keys_of_another_master_key_are_refused(world: World) -> None:
    """Once the master key was changed, a new key wrapped by another one, or by who knows which, is refused."""
    world.do(cmd.RewrapKeys(7, [(1, 1, row(7)), (2, 1, row(7))], True))
    for late in (row(0), row(6)):
        made = cmd.CreateCapsule(CapsuleId(b"c" * 16), policy=b"", key=cmd.NewKey(3, 1, late))
        assert world.refused(made) is Status.STALE
        assert world.refused(cmd.SetPolicy(A, b"", cmd.NewKey(3, 1, late))) is Status.STALE
    world.do(cmd.CreateCapsule(CapsuleId(b"c" * 16), policy=b"", key=cmd.NewKey(3, 1, row(7))))


@pytest.mark.parametrize("other", [b"", b"\2" + bytes(80)])
def test_rows_no_master_key_wraps_are_left_alone(world: World, other: bytes) -> None:
    """A destroyed key, and one sealed for another zone, neither hinder a change nor can be wrapped anew."""
    world.state.put(KEY, U32.pack(2) + U32.pack(1), other)
    assert world.refused(cmd.RewrapKeys(7, [(2, 1, row(7))])) is Status.STALE
    world.do(cmd.RewrapKeys(7, [(1, 1, row(7))], True))
    assert world.key(2) == other


def test_what_is_no_row_of_the_master_key_is_refused(world: World) -> None:
    """Rows name their master key and belong to keys there are; there is an end to how many."""
    assert world.refused(cmd.RewrapKeys(7, [(1, 1, row(6))])) is Status.INVALID
    assert world.refused(cmd.RewrapKeys(7, [(1, 1, row(0))])) is Status.INVALID
    assert world.refused(cmd.RewrapKeys(7, [(3, 1, row(7))])) is Status.STALE
    assert world.refused(cmd.RewrapKeys(0, [])) is Status.INVALID
    assert world.refused(cmd.RewrapKeys(7, [(1, 1, row(7))] * (REWRAPPED_MAX + 1))) is Status.INVALID


def test_a_destroyed_key_is_gone_and_its_number_taken(world: World) -> None:
    """Destroying empties the row, once; the capsule changed; the number is never given again."""
    assert world.do(cmd.DestroyKeys(A, [1, 1])) == [ev.KeyDestroyed(A, 1)]
    assert world.key(1) == b""
    changed = world.state.capsule(A)
    assert changed is not None
    assert (changed.change, changed.key) == (world.position, 1)
    assert world.do(cmd.DestroyKeys(A, [1])) == []
    made = cmd.CreateCapsule(CapsuleId(b"c" * 16), policy=b"", key=cmd.NewKey(1, 1, row(0)))
    assert world.refused(made) is Status.STALE


def test_only_keys_there_are_can_be_destroyed(world: World) -> None:
    """Neither a capsule nor a key that does not exist is destroyed."""
    assert world.refused(cmd.DestroyKeys(CapsuleId(b"c" * 16), [1])) is Status.NOT_FOUND
    for number in (0, 3, -1, 1 << 32):
        assert world.refused(cmd.DestroyKeys(A, [1, number])) is Status.NOT_FOUND
