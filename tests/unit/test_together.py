"""Several commands as one: all of them or none, each on what those before it did."""

from __future__ import annotations

import pytest

from space._errors import ConflictError, NotFoundError, SpaceError, UsageError
from space.events import commands as cmd
from space.events.commands import Receipt, Request
from space.events.ids import ROOT
from space.events.types import Kind
from space.statemachine.decide import TOGETHER_MAX
from space.statemachine.sequencer import prepare
from space.statemachine.tables import Overlay
from tests.state_support import MemoryWriter, Rows
from tests.zone_support import frame

pytestmark = pytest.mark.unit


def capsule(number: int) -> bytes:
    """An id."""
    return number.to_bytes(16, "big")


@pytest.fixture
def state() -> MemoryWriter:
    """A state with a root directory and a file in it, capsule 2 at ``/file``."""
    rows = MemoryWriter()
    first = [
        Request(cmd.InitialiseStore(bytes(16), 0o755, 0, 0)),
        Request(cmd.CreateCapsule(capsule(2), parent=ROOT, name=b"file", size=10)),
    ]
    prepare(rows, first, position=1, time_ns=1).overlay.flush(rows)
    return rows


def outcome(state: MemoryWriter, *commands: cmd.Command) -> Receipt | SpaceError:
    """What becomes of commands as one; their rows are written."""
    batch = prepare(state, [Request(cmd.Together(commands))], position=2, time_ns=2)
    batch.overlay.flush(state)
    return batch.outcomes[0]


def test_each_sees_what_those_before_it_did(state: MemoryWriter) -> None:
    """A directory, an attribute of it, a clone in it and the clone's new size are one entry of one batch."""
    volume, copy = capsule(3), capsule(4)
    done = outcome(
        state,
        cmd.CreateCapsule(volume, Kind.DIRECTORY, parent=ROOT, name=b"volume"),
        cmd.SetXattr(volume, b"about", b"it"),
        cmd.Clone(copy, capsule(2), volume, b"data"),
        cmd.Resize(copy, 20),
        cmd.CreateCapsule(capsule(5), Kind.SYMLINK, parent=ROOT, name=b"link", target=b"volume"),
    )
    assert done == Receipt(2)
    rows = Overlay(state)
    assert [(row.size, row.parent) for row in [rows.capsule(copy)] if row] == [(20, volume)]
    assert [row.entries for row in [rows.capsule(ROOT)] if row] == [3]


def test_what_is_deleted_can_be_brought_back_at_once(state: MemoryWriter) -> None:
    """A capsule that lost its last name to one of them is undeleted by the next."""
    assert outcome(state, cmd.Unlink(ROOT, b"file"), cmd.Undelete(capsule(2), ROOT, b"back")) == Receipt(2)
    row = Overlay(state).capsule(capsule(2))
    assert row is not None
    assert (row.nlink, row.deleted) == (1, 0)


def test_one_refused_is_all_refused(state: MemoryWriter) -> None:
    """Where the last of them meets a name that is taken, nothing of what came before it happened."""
    before: Rows = dict(state.rows)
    done = outcome(
        state,
        cmd.CreateCapsule(capsule(3), Kind.DIRECTORY, parent=ROOT, name=b"volume"),
        cmd.Unlink(ROOT, b"file"),
        cmd.CreateCapsule(capsule(4), parent=ROOT, name=b"volume"),
    )
    assert isinstance(done, ConflictError)
    assert state.rows == before


def test_the_same_batch_goes_on_after_a_refusal(state: MemoryWriter) -> None:
    """What another caller asks in the same batch is decided on a state without the refused ones' traces."""
    refused = cmd.Together(
        [cmd.CreateCapsule(capsule(3), parent=ROOT, name=b"x"), cmd.Unlink(ROOT, b"no such name")]
    )
    after = cmd.CreateCapsule(capsule(4), parent=ROOT, name=b"x")
    batch = prepare(state, [Request(refused), Request(after)], position=2, time_ns=2)
    assert [type(each) for each in batch.outcomes] == [NotFoundError, Receipt]


def test_a_file_with_content_and_a_name_is_all_or_nothing(state: MemoryWriter) -> None:
    """Its payload is in the batch if the name is free, and otherwise neither that nor the file is there."""

    def named(number: int, name: bytes) -> cmd.Together:
        file = capsule(number)
        write = cmd.WriteExtent(file, 0, 3, [frame(b"abc")])
        return cmd.Together([cmd.CreateCapsule(file), write, cmd.Link(file, ROOT, name)])

    requests = [Request(named(3, b"file")), Request(named(4, b"new"))]
    batch = prepare(state, requests, position=2, time_ns=2)
    assert [type(each) for each in batch.outcomes] == [ConflictError, Receipt]
    assert batch.payload == [b"abc"]
    assert [batch.overlay.capsule(capsule(number)) is None for number in (3, 4)] == [True, False]


@pytest.mark.parametrize(
    "commands",
    [
        [],
        [cmd.Together([cmd.Unlink(ROOT, b"file")])],
        [cmd.ReclaimPayload([(1, 0, 1)])],
        [cmd.SetXattr(capsule(2), b"x", b"")] * (TOGETHER_MAX + 1),
    ],
)
def test_what_cannot_be_one_of_several_is_refused(state: MemoryWriter, commands: list[cmd.Command]) -> None:
    """Nothing, groups in groups, upkeep, and more than the limit are usage errors."""
    assert isinstance(outcome(state, *commands), UsageError)
