"""Ids and moments."""

from __future__ import annotations

import random

import pytest

from space._errors import UsageError
from space.events.ids import AtPosition, AtTime, CapsuleId, format_time, parse_moment


def test_fresh_ids_are_version_7_and_sort_by_time() -> None:
    """An id is a UUIDv7 (RFC 9562 §5.7), so ids made later sort later, and its text leads back to it."""
    draw = random.Random(1).randbytes
    made = [CapsuleId.new(1_700_000_000_000_000_000 + step * 1_000_000, draw) for step in range(100)]
    assert made == sorted(made)
    for each in made:
        assert str(each)[14] == "7"
        assert str(each)[19] in "89ab"
        assert CapsuleId.parse(str(each)) == each


def test_placement_is_the_same_everywhere_and_uses_every_shard() -> None:
    """The shard of an id depends on the id and the count alone, and ids spread over all shards."""
    assert CapsuleId(bytes(16)).shard_keys(1) == 0
    assert [CapsuleId(bytes(15) + bytes([last])).shard_keys(8) for last in range(8)] == [
        2,
        7,
        2,
        5,
        5,
        4,
        2,
        5,
    ]
    assert {CapsuleId(bytes(14) + number.to_bytes(2, "big")).shard_keys(8) for number in range(500)} == set(
        range(8)
    )
    with pytest.raises(UsageError):
        CapsuleId(bytes(16)).shard_keys(0)


@pytest.mark.parametrize(
    "text, moment",
    [
        ("@7", AtPosition(7)),
        ("@7.3", AtPosition(7, 3)),
        ("-5m", AtTime(10**18 - 300 * 10**9)),
        ("1970-01-01T00:00:01Z", AtTime(10**9)),
        ("1970-01-01T01:00:01+01:00", AtTime(10**9)),
        ("1970-01-01T00:00:01.5", AtTime(1_500_000_000)),
    ],
)
def test_moments_are_read(text: str, moment: AtPosition | AtTime) -> None:
    """Positions, ISO-8601 times and relative times are the moments they say; no zone means UTC."""
    assert parse_moment(text, now_ns=10**18) == moment


@pytest.mark.parametrize("text", ["", "@", "@-1", "5m", "-5x", "yesterday", "@1.", "@99999999999999999999"])
def test_other_text_is_no_moment(text: str) -> None:
    """Anything else is a usage error."""
    with pytest.raises(UsageError, match="not a moment"):
        parse_moment(text, now_ns=0)


def test_a_time_is_shown_whole() -> None:
    """Nanoseconds are kept, and a time the calendar does not reach is still shown."""
    assert format_time(1_500_000_001) == "1970-01-01T00:00:01.500000001Z"
    assert format_time(2**62 * 1000) == f"{2**62 * 1000}ns"
