"""Several commands as one are the same commands one after the other, or nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space._errors import SpaceError
from space.events import commands as cmd
from space.events.commands import Request
from space.events.ids import ROOT
from space.events.types import Kind
from space.statemachine.sequencer import prepare
from tests.state_support import MemoryWriter

pytestmark = pytest.mark.property


def capsule(number: int) -> bytes:
    """An id."""
    return number.to_bytes(16, "big")


IDS = st.integers(1, 6).map(capsule)
PLACES = st.sampled_from([bytes(ROOT), capsule(1), capsule(2), capsule(3)])
NAMES = st.sampled_from([b"a", b"b", b"c"])
KINDS = st.sampled_from([Kind.FILE, Kind.DIRECTORY])
POLICIES = st.none() | st.sampled_from([b"one", b"two"])
KEYS = st.none() | st.integers(1, 2).map(lambda key: cmd.NewKey(key, 1, b"wrapped"))

COMMANDS: st.SearchStrategy[cmd.Command] = st.one_of(
    st.builds(
        cmd.CreateCapsule, IDS, KINDS, parent=PLACES, name=NAMES, policy=POLICIES, key=KEYS, size=st.just(8)
    ),
    st.builds(cmd.Clone, IDS, IDS, PLACES, NAMES),
    st.builds(cmd.Link, IDS, PLACES, NAMES),
    st.builds(cmd.Unlink, PLACES, NAMES, directory=st.none(), recursive=st.booleans()),
    st.builds(cmd.Rename, PLACES, NAMES, PLACES, NAMES, replace=st.booleans(), exchange=st.booleans()),
    st.builds(cmd.Resize, IDS, st.integers(0, 64)),
    st.builds(cmd.SetXattr, IDS, NAMES, st.binary(max_size=4), create=st.booleans()),
    st.builds(cmd.RemoveXattr, IDS, NAMES),
    st.builds(cmd.SetPolicy, IDS, st.sampled_from([b"one", b"three"]), KEYS),
    st.builds(cmd.TakeSnapshot, IDS, st.sampled_from(["s", "t"])),
    st.builds(cmd.DropSnapshot, st.sampled_from(["s", "t"])),
    st.builds(cmd.DeleteCapsule, IDS),
    st.builds(cmd.Undelete, IDS, PLACES, NAMES),
    st.builds(cmd.SetAttributes, IDS, mode=st.integers(0, 0o7777)),
)


def founded(before: list[cmd.Command]) -> MemoryWriter:
    """A state with a root and whatever of ``before`` is possible."""
    rows = MemoryWriter()
    first = [cmd.InitialiseStore(bytes(16), 0o755, 0, 0), *before]
    prepare(rows, [Request(each) for each in first], position=1, time_ns=1).overlay.flush(rows)
    return rows


@given(st.lists(COMMANDS, max_size=8), st.lists(COMMANDS, min_size=1, max_size=8))
def test_as_one_is_as_one_after_the_other_or_nothing(
    before: list[cmd.Command], commands: list[cmd.Command]
) -> None:
    """Where each alone is accepted, together they leave the same rows, chains included; where one is not, no trace."""
    apart, joined = founded(before), founded(before)
    untouched = dict(joined.rows)
    one_by_one = prepare(apart, [Request(each) for each in commands], position=2, time_ns=2)
    as_one = prepare(joined, [Request(cmd.Together(commands))], position=2, time_ns=2)
    one_by_one.overlay.flush(apart)
    as_one.overlay.flush(joined)
    if any(isinstance(each, SpaceError) for each in one_by_one.outcomes):
        assert isinstance(as_one.outcomes[0], SpaceError)
        assert joined.rows == untouched
    else:
        assert joined.rows == apart.rows
        assert [event for _, _, event in as_one.linked()] == [event for _, _, event in one_by_one.linked()]
