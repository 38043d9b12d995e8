from __future__ import annotations

import pytest

from space._errors import UsageError
from space.policy.units import VALUE_MAX, format_duration, format_size, parse_duration, parse_size

SECOND = 1_000_000_000


@pytest.mark.parametrize(
    "text, size",
    [
        (0, 0),
        (4096, 4096),
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("4KiB", 4096),
        ("4 KiB", 4096),
        (" 4kib ", 4096),
        ("10MiB", 10 * 1024**2),
        ("1GiB", 1024**3),
        ("1.5GiB", 3 * 1024**3 // 2),
        ("0.5KiB", 512),
        ("2TiB", 2 * 1024**4),
        ("7EiB", 7 * 1024**6),
        ("9007199254740993", 2**53 + 1),
        (VALUE_MAX, VALUE_MAX),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    """A size is a number of bytes, plain or with an IEC unit, exact past what a float holds."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is not a size"),
        ("KiB", "is not a size"),
        ("-1", "is not a size"),
        (-1, "between 0"),
        ("1e3", "is not a size"),
        ("1.5", "not a whole number of bytes"),
        ("0.3KiB", "not a whole number of bytes"),
        ("4K", "write 4KiB"),
        ("4KB", "write 4KiB"),
        ("10MB", "write 10MiB"),
        ("10 potatoes", "write 4KiB"),
        ("8EiB", "between 0"),
        ("1" * 65, "is not a size"),
        ("9" * 60, "between 0"),
        ("1.GiB", "is not a size"),
        ("\u0661KiB", "is not a size"),
        ("1KiB 2", "is not a size"),
    ],
)
def test_nonsense_sizes(text: str | int, message: str) -> None:
    """What is no size, or ambiguous, is a usage error that says why."""
    with pytest.raises(UsageError, match=message):
        parse_size(text)


@pytest.mark.parametrize(
    "text, duration_ns",
    [
        ("0s", 0),
        ("1ns", 1),
        ("1us", 1_000),
        ("500ms", SECOND // 2),
        ("30s", 30 * SECOND),
        ("1.5s", 3 * SECOND // 2),
        ("5m", 300 * SECOND),
        ("1h30m", 5400 * SECOND),
        ("36h", 36 * 3600 * SECOND),
        ("30d", 30 * 86_400 * SECOND),
        ("2w", 14 * 86_400 * SECOND),
        ("1w1d1h1m1s1ms1us1ns", 694_861_001_001_001),
        (" 5m ", 300 * SECOND),
    ],
)
def test_durations(text: str, duration_ns: int) -> None:
    """A duration is one or more numbers with units, from weeks to nanoseconds."""
    assert parse_duration(text) == duration_ns


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is not a duration"),
        ("30", "has no unit"),
        ("s", "is not a duration"),
        ("-5m", "is not a duration"),
        ("5 m", "is not a duration"),
        ("5M", "is not a duration"),
        ("5min", "is not a duration"),
        ("1m1h", "is not a duration"),
        ("1h1h", "is not a duration"),
        ("1h!", "is not a duration"),
        ("0.1ns", "not a whole number of nanoseconds"),
        ("300000000000s", "between 0"),
        ("1y", "is not a duration"),
        ("9" * 70 + "s", "is not a duration"),
        ("\u0663s", "is not a duration"),
    ],
)
def test_nonsense_durations(text: str, message: str) -> None:
    """What is no duration is a usage error that shows how to write one."""
    with pytest.raises(UsageError, match=message):
        parse_duration(text)


@pytest.mark.parametrize(
    "size, text",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1 MiB"),
        (10 * 1024**2, "10 MiB"),
        (1024**3 * 3 // 2, "1.5 GiB"),
        (VALUE_MAX, "8 EiB"),
    ],
)
def test_format_size(size: int, text: str) -> None:
    """A size reads as at most four digits and a unit."""
    assert format_size(size) == text


@pytest.mark.parametrize(
    "duration_ns, text",
    [
        (0, "0s"),
        (1, "1ns"),
        (1500, "1.5us"),
        (1_500_000, "1.5ms"),
        (999_999_999, "999.999999ms"),
        (SECOND, "1s"),
        (90 * SECOND, "1m30s"),
        (5400 * SECOND, "1h30m"),
        (30 * 86_400 * SECOND, "30d"),
        (86_400 * SECOND + 1, "1d0.000000001s"),
    ],
)
def test_format_duration(duration_ns: int, text: str) -> None:
    """A duration reads as short as it can be without losing a nanosecond."""
    assert format_duration(duration_ns) == text
