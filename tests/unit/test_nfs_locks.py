"""Byte-range locks against an array that says of each byte who holds it, and share reservations against brute force."""

from __future__ import annotations

from itertools import combinations
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space.projections.nfs import locks as module
from space.projections.nfs.locks import END, Range, RangeLocks, TooManyRangesError, Waiters
from space.projections.nfs.nfs4 import Share
from space.projections.nfs.opens import Mode, downgraded, union

SIZE: Final = 24
OWNERS: Final = "abc"
Model = dict[str, list[bool | None]]


@st.composite
def ranges(draw: st.DrawFn) -> Range:
    """Bytes of a small file, or from one of them to the end of all files."""
    start = draw(st.integers(0, SIZE - 1))
    end = draw(st.integers(start + 1, SIZE))
    return Range(start, END if end == SIZE else end, draw(st.booleans()))


def runs(held: list[bool | None]) -> tuple[Range, ...]:
    """What an array says, as ranges; its last byte stands for all that follow."""
    found: list[Range] = []
    for offset, write in enumerate(held):
        if write is None:
            continue
        if found and found[-1].end == offset and found[-1].write == write:
            found[-1] = Range(found[-1].start, offset + 1, write)
        else:
            found.append(Range(offset, offset + 1, write))
    return tuple(Range(each.start, END if each.end == SIZE else each.end, each.write) for each in found)


def in_the_way(model: Model, owner: str, wanted: Range) -> bool:
    """Whether somebody else holds a byte that cannot be had as well."""
    return any(
        held is not None and (held or wanted.write)
        for other, array in model.items()
        if other != owner
        for held in array[wanted.start : wanted.end]
    )


@pytest.mark.property
@given(st.lists(st.tuples(st.sampled_from(["lock", "unlock", "release"]), st.sampled_from(OWNERS), ranges())))
def test_locks_are_what_an_array_says(steps: list[tuple[str, str, Range]]) -> None:
    """Whatever is locked and unlocked, ranges are those of the array: no overlaps, no neighbours of one kind."""
    locks: RangeLocks[str] = RangeLocks()
    model: Model = {owner: [None] * SIZE for owner in OWNERS}
    for step, owner, where in steps:
        conflict = locks.conflict(owner, where)
        assert (conflict is not None) == in_the_way(model, owner, where)
        if conflict is not None:
            other, held = conflict
            assert other != owner
            assert held.conflicts(where)
            assert held in locks.held(other)
        value: bool | None = None
        if step == "lock":
            if conflict is not None:
                continue
            locks.lock(owner, where)
            value = where.write
        elif step == "unlock":
            locks.unlock(owner, where.start, where.end)
        else:
            locks.release(owner)
        start, end = (0, END) if step == "release" else (where.start, where.end)
        for offset in range(start, min(end, SIZE)):
            model[owner][offset] = value
        for each in OWNERS:
            assert locks.held(each) == runs(model[each])
        assert bool(locks) == any(runs(array) for array in model.values())


@pytest.mark.unit
def test_ranges_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One range too many is refused, by locking and by splitting, and changes nothing."""
    monkeypatch.setattr(module, "RANGES_MAX", 3)
    locks: RangeLocks[str] = RangeLocks()
    for start in (0, 10, 20):
        locks.lock("a", Range(start, start + 5, write=True))
    before = locks.held("a")
    with pytest.raises(TooManyRangesError):
        locks.lock("a", Range(30, 31, write=True))
    with pytest.raises(TooManyRangesError):
        locks.unlock("a", 11, 12)
    assert locks.held("a") == before
    locks.lock("a", Range(5, 10, write=True))
    assert locks.held("a") == (Range(0, 15, write=True), Range(20, 25, write=True))


@pytest.mark.unit
def test_waiters_are_told_once_and_in_order() -> None:
    """Who waits comes out when nothing is in the way any more, the longest waiting first, and only once."""
    locks: RangeLocks[str] = RangeLocks()
    waiters: Waiters[str, int] = Waiters()
    locks.lock("a", Range(0, 10, write=True))
    waiters.add("b", Range(0, 5, write=True), 1)
    waiters.add("c", Range(5, 20, write=False), 2)
    assert waiters.take_free(locks) == []
    locks.unlock("a", 5, 10)
    assert waiters.take_free(locks) == [("c", 2)]
    locks.release("a")
    assert waiters.take_free(locks) == [("b", 1)]
    assert waiters.take_free(locks) == []


@pytest.mark.unit
def test_waiters_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest of too many waiters is forgotten; an owner that asks again waits once."""
    monkeypatch.setattr(module, "WAITERS_MAX", 2)
    waiters: Waiters[str, int] = Waiters()
    for note, owner in enumerate("abbc"):
        waiters.add(owner, Range(0, 1, write=True), note)
    assert waiters.take_free(RangeLocks()) == [("b", 2), ("c", 3)]


MODES: Final = [Mode(Share(access), Share(deny)) for access in (1, 2, 3) for deny in range(4)]


@pytest.mark.property
@given(st.frozensets(st.sampled_from(MODES), min_size=1, max_size=6), st.sampled_from(MODES))
def test_downgrade_needs_a_union_of_opens(opened: frozenset[Mode], wanted: Mode) -> None:
    """A downgrade is allowed exactly to what some of the opens together asked for (RFC 8881 §18.18.3)."""
    possible = any(
        union(some) == wanted for count in range(1, len(opened) + 1) for some in combinations(opened, count)
    )
    left = downgraded(opened, wanted)
    assert (left is not None) == possible
    if left is not None:
        assert left <= opened
        assert union(left) == wanted


@pytest.mark.unit
@pytest.mark.parametrize(
    "first, second, conflict",
    [
        ((1, 0), (3, 0), False),
        ((1, 2), (2, 0), True),
        ((1, 2), (1, 2), False),
        ((2, 0), (1, 2), True),
        ((2, 1), (2, 1), False),
        ((3, 3), (1, 0), True),
    ],
)
def test_share_reservations(first: tuple[int, int], second: tuple[int, int], conflict: bool) -> None:
    """Two opens conflict when one does what the other denies, whichever came first (RFC 8881 §9.7)."""
    one, two = (Mode(Share(access), Share(deny)) for access, deny in (first, second))
    assert one.conflicts(two) == two.conflicts(one) == conflict
