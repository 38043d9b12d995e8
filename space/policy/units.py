"""Sizes and durations as people write them: ``4KiB``, ``30d``, ``1h30m``.

Sizes are integers of bytes with binary (IEC 80000-13) units only: ``KB`` and ``4K`` mean 1000 to some and
1024 to others, so they are refused with the unambiguous spelling in the message.  Durations are integers of
nanoseconds.  :func:`format_duration` is exact, so ``parse_duration(format_duration(n)) == n``;
:func:`format_size` rounds for reading.
"""

from __future__ import annotations

import re
from typing import Final

from space._errors import UsageError

VALUE_MAX: Final = 2**63 - 1  # both fit a signed 64-bit field: about 8 EiB, about 292 years
_TEXT_MAX: Final = 64  # longer text is no quantity; bounds the regular expressions and the big-int parse

_SIZE_UNITS: Final = {"": 1, "b": 1} | {
    unit.lower(): 1024**power
    for power, unit in enumerate(("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"), start=1)
}
_SIZE_NAMES: Final = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_SIZE: Final = re.compile(r"([0-9]+)(?:\.([0-9]+))?\s*([A-Za-z]*)", re.ASCII)

_DURATION_UNITS: Final = {
    "w": 7 * 86_400_000_000_000,
    "d": 86_400_000_000_000,
    "h": 3_600_000_000_000,
    "m": 60_000_000_000,
    "s": 1_000_000_000,
    "ms": 1_000_000,
    "us": 1_000,
    "ns": 1,
}
_DURATION_PART: Final = re.compile(r"([0-9]+)(?:\.([0-9]+))?(ms|us|ns|[wdhms])", re.ASCII)


def parse_size(text: str | int) -> int:
    """Bytes meant by ``text``: a plain number, or one with ``B`` or an IEC unit (``4KiB``, ``1.5GiB``).

    Raises:
        UsageError: not a size, an ambiguous unit, not whole bytes, or past 8 EiB.
    """
    if isinstance(text, int):
        return _bounded(int(text), text, "size")
    match = _SIZE.fullmatch(text.strip()) if len(text) <= _TEXT_MAX else None
    if match is None:
        raise UsageError(f"{_quoted(text)} is not a size", hint="write it like 512, 4KiB, 10MiB or 1GiB")
    whole, fraction, unit = match.groups()
    factor = _SIZE_UNITS.get(unit.lower())
    if factor is None:
        raise UsageError(f"{_quoted(text)} has the unknown size unit {unit!r}", hint=_size_hint(whole, unit))
    return _bounded(_scaled(whole, fraction, factor, text, "bytes"), text, "size")


def parse_duration(text: str) -> int:
    """Nanoseconds meant by ``text``: numbers with ``w d h m s ms us ns``, largest unit first (``1h30m``).

    Raises:
        UsageError: not a duration, no unit, units out of order, finer than 1 ns, or past 292 years.
    """
    stripped = text.strip() if len(text) <= _TEXT_MAX else ""
    total, end, previous = 0, 0, VALUE_MAX
    for match in _DURATION_PART.finditer(stripped):
        factor = _DURATION_UNITS[match[3]]
        if match.start() != end or factor >= previous:
            break
        total += _scaled(match[1], match[2], factor, text, "nanoseconds")
        end, previous = match.end(), factor
    if end == 0 or end != len(stripped):
        reason = "has no unit" if stripped.isdecimal() else "is not a duration"
        raise UsageError(f"{_quoted(text)} {reason}", hint="write it like 500ms, 30s, 1h30m or 30d")
    return _bounded(total, text, "duration")


def format_size(size_bytes: int) -> str:
    """``size_bytes`` for a reader, to one decimal: ``0 B``, ``4 KiB``, ``1.5 GiB``."""
    value, unit = float(size_bytes), "B"
    for name in _SIZE_NAMES:
        if abs(value) < 1023.95:  # where one decimal would print as 1024.0
            break
        value, unit = value / 1024, name
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"


def format_duration(duration_ns: int) -> str:
    """``duration_ns``, at least 0, exactly and as short as it goes: ``0s``, ``1.5ms``, ``1h30m``, ``30d``."""
    if duration_ns < 1_000_000_000:
        return _format_below_second(duration_ns)
    parts = []
    for unit in ("d", "h", "m"):
        count, duration_ns = divmod(duration_ns, _DURATION_UNITS[unit])
        parts.append(f"{count}{unit}" if count else "")
    if duration_ns:
        parts.append(_decimal(duration_ns, 9) + "s")
    return "".join(parts)


def _format_below_second(duration_ns: int) -> str:
    if duration_ns == 0:
        return "0s"
    unit, digits = ("ms", 6) if duration_ns >= 1_000_000 else ("us", 3) if duration_ns >= 1_000 else ("ns", 0)
    return _decimal(duration_ns, digits) + unit


def _decimal(value: int, digits: int) -> str:
    if digits == 0:
        return str(value)
    whole, fraction = divmod(value, 10**digits)
    return f"{whole}.{fraction:0{digits}d}".rstrip("0").rstrip(".")


def _scaled(whole: str, fraction: str | None, factor: int, text: str, unit: str) -> int:
    """``whole.fraction`` times ``factor`` in integers: floats lose bytes past 2**53."""
    digits = fraction or ""
    scale: int = 10 ** len(digits)
    value, rest = divmod(int(whole + digits) * factor, scale)
    if rest:
        raise UsageError(f"{_quoted(text)} is not a whole number of {unit}")
    return value


def _bounded(value: int, text: str | int, what: str) -> int:
    if not 0 <= value <= VALUE_MAX:
        raise UsageError(f"{_quoted(str(text))} is not a {what} between 0 and 2^63-1")
    return value


def _size_hint(whole: str, unit: str) -> str:
    prefix = unit[0].upper()
    example = (
        f"{whole}{prefix}iB" if unit.upper() in (prefix, f"{prefix}B") and prefix in "KMGTPE" else "4KiB"
    )
    return f"units are B, KiB, MiB, GiB, TiB, PiB, EiB: write {example}"


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _TEXT_MAX else text[:_TEXT_MAX] + "…")
