"""Deciding many commands as one batch."""

from __future__ import annotations

import pytest

from space._errors import ConflictError, Status, UnavailableError
from space.events.codec import encode_batch
from space.events.commands import (
    REPLIES_KEPT_PER_CLIENT,
    CreateCapsule,
    Guard,
    InitialiseStore,
    Receipt,
    Request,
    SetAttributes,
    StartNfsServer,
    Unlink,
)
from space.events.ids import ROOT
from space.events.types import CapsuleCreated, CommandRefused, NameLinked, NameUnlinked
from space.statemachine import replies, sequencer
from space.statemachine.apply import nfs_epoch_counter
from space.statemachine.sequencer import Prepared, prepare
from space.statemachine.tables import REPLY
from tests.state_support import MemoryWriter

CLIENT = b"c" * 16


def capsule(number: int) -> bytes:
    """An id."""
    return number.to_bytes(16, "big")


def create(number: int, name: bytes, sequence: int = 0) -> Request:
    """A file in the root; with a sequence, by a client that may retry."""
    command = CreateCapsule(capsule(number), parent=ROOT, name=name)
    return Request(command, "test", CLIENT if sequence else b"", sequence)


@pytest.fixture
def state() -> MemoryWriter:
    """A state with a root directory."""
    rows = MemoryWriter()
    prepare(rows, [Request(InitialiseStore(bytes(16), 0o755, 0, 0))], position=1, time_ns=1).overlay.flush(
        rows
    )
    return rows


def decided(state: MemoryWriter, requests: list[Request], position: int = 2) -> Prepared:
    """The batch, its rows written."""
    batch = prepare(state, requests, position=position, time_ns=position)
    batch.overlay.flush(state)
    return batch


def test_each_command_sees_those_before_it(state: MemoryWriter) -> None:
    """Within a batch a name taken, freed and taken again is as if the commands had come one after the other."""
    requests = [create(2, b"x"), create(3, b"x"), Request(Unlink(ROOT, b"x")), create(4, b"x")]
    batch = decided(state, requests)
    assert [type(outcome) for outcome in batch.outcomes] == [Receipt, ConflictError, Receipt, Receipt]
    kinds = [type(event) for entry in batch.entries for _, event in entry.events]
    assert kinds == [CapsuleCreated, NameLinked, NameUnlinked, CapsuleCreated, NameLinked]
    assert [context.event for context, _, _ in batch.linked()] == [0, 1, 2, 3, 4]


def test_a_retry_gets_the_first_receipt(state: MemoryWriter) -> None:
    """A client's command repeated, in the same batch or later, is applied once and answered alike."""
    batch = decided(state, [create(2, b"x", 7), create(2, b"x", 7)])
    later = decided(state, [create(2, b"x", 7)], position=3)
    assert batch.outcomes == [Receipt(2), Receipt(2, repeated=True)]
    assert later.outcomes == [Receipt(2, repeated=True)]
    assert not later.entries


def test_replies_are_bounded(state: MemoryWriter) -> None:
    """Only the last replies of a client are kept: no fewer than promised, and at most one row more."""
    last = REPLIES_KEPT_PER_CLIENT + 3 * replies.SLOTS + 5
    for number in range(1, last + 1):
        decided(state, [create(number + 1, b"%d" % number, number)], position=number + 1)
    kept = [number for number in range(last + 1) if replies.find(state, CLIENT, number)]
    assert last - REPLIES_KEPT_PER_CLIENT - replies.SLOTS < kept[0] <= last + 1 - REPLIES_KEPT_PER_CLIENT
    assert kept == list(range(kept[0], last + 1))
    assert sum(table == REPLY for table, _ in state.rows) == REPLIES_KEPT_PER_CLIENT // replies.SLOTS + 1


def test_the_bytes_of_a_batch_are_those_of_its_entries(state: MemoryWriter) -> None:
    """What is put together from events encoded once is what encoding the whole batch gives."""
    requests = [create(number, b"%d" % number, number * 7) for number in range(2, 40)]
    batch = decided(state, [*requests, create(50, b"2", 1), create(51, b"2", 2), Request(Unlink(ROOT, b"3"))])
    assert len(batch.entries) > 15
    assert any(not entry.client for entry in batch.entries)
    assert batch.metadata() == encode_batch(batch.entries)
    assert prepare(state, [], position=3, time_ns=3).metadata() == encode_batch([])


def test_a_rejected_command_leaves_no_trace(state: MemoryWriter) -> None:
    """A batch of refusals has nothing to log and changes no row."""
    before = dict(state.rows)
    batch = decided(state, [Request(Unlink(ROOT, b"missing")), create(2, b"a/b")])
    assert not batch.entries
    assert state.rows == before
    assert [outcome.status for outcome in batch.outcomes if not isinstance(outcome, Receipt)] == [
        Status.NOT_FOUND,
        Status.BAD_NAME,
    ]


def test_what_does_not_fit_waits(state: MemoryWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch takes as many commands as it may hold, in order, and says how many."""
    monkeypatch.setattr(sequencer, "COMMANDS_MAX", 3)
    batch = decided(state, [create(number, b"%d" % number) for number in range(2, 10)])
    assert batch.taken == len(batch.outcomes) == 3


def test_a_refusal_is_remembered_for_whoever_may_try_again(state: MemoryWriter) -> None:
    """A refused command of a client is refused for every later attempt, also when it would be possible by then."""
    decided(state, [create(2, b"x")])
    first = decided(state, [create(3, b"x", 7)], position=3)
    (refused,) = first.outcomes
    assert isinstance(refused, ConflictError)
    assert [type(event) for entry in first.entries for _, event in entry.events] == [CommandRefused]
    decided(state, [Request(Unlink(ROOT, b"x"))], position=4)
    again = decided(state, [create(3, b"x", 7)], position=5)
    (outcome,) = again.outcomes
    assert isinstance(outcome, ConflictError)
    assert Exception.__str__(outcome) == Exception.__str__(refused)
    assert not again.entries
    decided(state, [create(4, b"y", 6), create(5, b"y", 8)], position=6)
    told = {sequence: replies.find(state, CLIENT, sequence) for sequence in range(5, 10)}
    assert {sequence: found[0] for sequence, found in told.items() if found} == {6: 6, 7: 3, 8: 6}
    assert {sequence: found[1] is None for sequence, found in told.items() if found} == {
        6: True,
        7: False,
        8: False,
    }


def test_a_refusal_nobody_can_retry_leaves_no_trace(state: MemoryWriter) -> None:
    """Without a client id there is no later attempt, and nothing to log."""
    decided(state, [create(2, b"x")])
    assert not decided(state, [create(3, b"x")], position=3).entries


def test_a_command_that_changes_nothing_is_remembered_too(state: MemoryWriter) -> None:
    """Its late second attempt would otherwise undo what others did meanwhile."""
    nothing = Request(SetAttributes(bytes(ROOT)), client=CLIENT, sequence=7)
    assert decided(state, [nothing]).outcomes == [Receipt(2)]
    assert decided(state, [nothing], position=3).outcomes == [Receipt(2, repeated=True)]


def test_a_guarded_command_is_refused_after_its_counter_has_moved(state: MemoryWriter) -> None:
    """In one batch or in two, what is decided behind a take-over is refused, and so is every retry of it."""
    counter = nfs_epoch_counter("s")

    def guarded(number: int, epoch: int, sequence: int = 0) -> Request:
        name = b"%d" % number
        command = CreateCapsule(capsule(number), parent=ROOT, name=name)
        return Request(command, "test", CLIENT if sequence else b"", sequence, Guard(counter, epoch))

    start = Request(StartNfsServer("s"), guard=Guard(counter, 0))
    first = decided(state, [guarded(2, 0), start, guarded(3, 0), guarded(4, 1), start])
    kinds = [type(outcome) for outcome in first.outcomes]
    assert kinds == [Receipt, Receipt, UnavailableError, Receipt, UnavailableError]
    late = guarded(5, 0, sequence=1)
    for position in (3, 4):
        (outcome,) = decided(state, [late], position).outcomes
        assert isinstance(outcome, UnavailableError)
        assert outcome.status is Status.UNAVAILABLE
    assert isinstance(decided(state, [guarded(6, 1)], 5).outcomes[0], Receipt)
