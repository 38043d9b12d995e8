"""Identifiers, positions and moments: the words every layer shares.

Time and randomness are arguments here as everywhere in the core.
"""

from __future__ import annotations

import functools
import re
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, NewType, Self

import attrs
from blake3 import blake3

from space._errors import UsageError

Position = NewType("Position", int)
"""Index of a batch in a shard's log, from 1; 0 is the moment before the first batch."""

ID_BYTES: Final = 16
NIL: Final = bytes(ID_BYTES)


class CapsuleId(bytes):
    """128-bit id of a capsule; its text form is a UUID (RFC 9562).

    A subclass of ``bytes``, so that it is its own key in tables and its own wire form.
    """

    __slots__ = ()

    def __new__(cls, raw: bytes) -> Self:
        if len(raw) != ID_BYTES:
            raise UsageError(f"a capsule id has {ID_BYTES} bytes, not {len(raw)}")
        return super().__new__(cls, raw)

    @classmethod
    def new(cls, time_ns: int, random_bytes: Callable[[int], bytes]) -> CapsuleId:
        """A fresh UUIDv7 (RFC 9562 §5.7): ids made together sort together, which tables like."""
        stamp = (time_ns // 1_000_000) & ((1 << 48) - 1)
        random = int.from_bytes(random_bytes(10), "big")
        value = stamp << 80 | 7 << 76 | (random >> 64 & 0xFFF) << 64 | 2 << 62 | random & ((1 << 62) - 1)
        return cls(value.to_bytes(16, "big"))

    @classmethod
    def parse(cls, text: str) -> CapsuleId:
        """The id written as a UUID.

        Raises:
            UsageError: it is not one.
        """
        try:
            return cls(uuid.UUID(text).bytes)
        except ValueError:
            raise UsageError(f"not a capsule id: {text!r}", hint="an id is a UUID") from None

    def derive(self, other: bytes) -> CapsuleId:
        """The id that ``other`` gets inside a clone whose root is this id: deterministic (UUIDv8)."""
        raw = int.from_bytes(blake3(self + other, derive_key_context="space clone id v1").digest(16), "big")
        raw = raw & ~(0xF << 76) & ~(3 << 62) | 8 << 76 | 2 << 62
        return CapsuleId(raw.to_bytes(16, "big"))

    def shard_keys(self, count: int) -> int:
        """The shard, of ``count``, this id is placed in; deterministic on every machine.

        Raises:
            UsageError: ``count`` is not positive.
        """
        if count < 1:
            raise UsageError(f"a cluster has at least one shard, not {count}")
        return int.from_bytes(blake3(self, derive_key_context="space shard key v1").digest(8), "big") % count

    def __str__(self) -> str:
        return str(uuid.UUID(bytes=bytes(self)))

    def __repr__(self) -> str:
        return f"CapsuleId({self})"


ROOT: Final = CapsuleId(bytes(15) + b"\1")
"""The root directory of a shard's tree: the same in every store, so that it never has to be looked up."""


CLUSTER: Final = CapsuleId(bytes(15) + b"\2")
"""Stands where an event needs a capsule and is about the group of replicas that keeps the log."""

ZONES: Final = ROOT.derive(b"zones")
"""The directory ``/zones``, in which replicas are: the same in every store that has one."""

BRANCHES: Final = ZONES.derive(b"branches")
"""The directory ``/zones/.branches``, which keeps what a home had not shipped when another zone took its place."""

ZONE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)
"""What a zone may be called: what a policy may name, and a directory."""


ZONES_REMEMBERED: Final = 256
"""Zones whose directories' ids are not computed again: there are a few, and each batch that is shipped asks."""


@functools.lru_cache(ZONES_REMEMBERED)
def zone_root(zone: bytes) -> CapsuleId:
    """The directory ``/zones/NAME`` that stands for the root directory of a zone, from the zone's id."""
    return ZONES.derive(zone)


@functools.lru_cache(ZONES_REMEMBERED)
def zone_capsules(zone: bytes) -> CapsuleId:
    """The directory ``/zones/NAME/.capsules``: replicas hang there whose own directory is not shipped."""
    return zone_root(zone).derive(b"capsules")


@attrs.frozen
class AtPosition:
    """The moment right after a batch was applied (``@123``), or after one event of it (``@123.4``)."""

    position: int
    event: int | None = None

    def __str__(self) -> str:
        return f"@{self.position}" if self.event is None else f"@{self.position}.{self.event}"


@attrs.frozen
class AtTime:
    """The moment after the last batch not later than ``time_ns`` (nanoseconds since 1970, UTC)."""

    time_ns: int

    def __str__(self) -> str:
        return format_time(self.time_ns)


Moment = AtPosition | AtTime

_POSITION = re.compile(r"@(\d{1,19})(?:\.(\d{1,9}))?\Z")
_RELATIVE = re.compile(r"-(\d{1,12})(ms|s|m|h|d|w)\Z")
_UNIT_NS: Final = {
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
    "d": 86_400 * 10**9,
    "w": 7 * 86_400 * 10**9,
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def parse_moment(text: str, *, now_ns: int) -> Moment:
    """A moment: ``@POSITION``, ISO-8601 (UTC when it names no zone), or relative such as ``-5m``.

    Raises:
        UsageError: it is none of these.
    """
    if match := _POSITION.match(text):
        return AtPosition(int(match[1]), int(match[2]) if match[2] else None)
    if match := _RELATIVE.match(text):
        return AtTime(now_ns - int(match[1]) * _UNIT_NS[match[2]])
    try:
        stamp = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"not a moment: {text!r}", hint="write @POSITION, an ISO-8601 time, or -5m (ms, s, m, h, d, w)"
        ) from None
    if stamp.tzinfo is None:
        stamp = stamp.replace(tzinfo=UTC)
    delta = stamp - _EPOCH
    return AtTime((delta.days * 86_400 + delta.seconds) * 10**9 + delta.microseconds * 1000)


def format_time(time_ns: int) -> str:
    """ISO-8601 in UTC with nanoseconds, or the bare number where the calendar ends."""
    try:
        stamp = datetime.fromtimestamp(time_ns // 10**9, tz=UTC)
    except (OverflowError, ValueError, OSError):
        return f"{time_ns}ns"
    return f"{stamp:%Y-%m-%dT%H:%M:%S}.{time_ns % 10**9:09d}Z"
