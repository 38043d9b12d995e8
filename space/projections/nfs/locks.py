"""Byte-range locks of one file (RFC 8881 §9 and §18.10), with the meaning POSIX gives them; no I/O.

An owner's locks never overlap and never touch another of the same kind: locking part of a range that is held replaces
that part, unlocking may split what is held.  Ranges are half open; ``END`` is past the last byte there can be.  Locks
advise: reading and writing never looks at them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

import attrs

END: Final = 1 << 64

RANGES_MAX: Final = 16384
"""Most ranges of one owner in one file: each costs some 150 bytes, and every other byte of a file could be locked."""

WAITERS_MAX: Final = 256
"""Most owners of one file that are told when what they waited for is free; others go on asking now and then."""

Owner = TypeVar("Owner", bound=Hashable)
Note = TypeVar("Note")


@attrs.frozen
class Range:
    """Bytes from ``start`` up to but not including ``end``, locked for writing or only for reading."""

    start: int
    end: int
    write: bool

    def conflicts(self, other: Range) -> bool:
        """Whether two owners may not have both."""
        return self.start < other.end and other.start < self.end and (self.write or other.write)


class TooManyRangesError(Exception):
    """An owner has as many locks on a file as one may have."""


class RangeLocks(Generic[Owner]):
    """All locks of one file."""

    def __init__(self) -> None:
        self._held: dict[Owner, list[Range]] = {}
        self._writers: dict[
            Owner, list[Range]
        ] = {}  # those of them that had one for writing: all readers need ask

    def __bool__(self) -> bool:
        return bool(self._held)

    def held(self, owner: Owner) -> tuple[Range, ...]:
        """An owner's locks, in order."""
        return tuple(self._held.get(owner, ()))

    def conflict(self, owner: Owner, wanted: Range) -> tuple[Owner, Range] | None:
        """A lock of somebody else that is in the way of ``wanted``."""
        for other, ranges in (self._held if wanted.write else self._writers).items():
            if other == owner:
                continue
            for index in range(_first_after(ranges, wanted.start), len(ranges)):
                if ranges[index].start >= wanted.end:
                    break
                if ranges[index].conflicts(wanted):
                    return other, ranges[index]
        return None

    def lock(self, owner: Owner, wanted: Range) -> None:
        """Gives an owner a lock; nobody else's may be in the way.

        Raises:
            TooManyRangesError: this would be one range too many; nothing has changed.
        """
        self._replace(owner, wanted.start, wanted.end, [wanted])

    def unlock(self, owner: Owner, start: int, end: int) -> None:
        """Takes an owner's locks off a range.

        Raises:
            TooManyRangesError: splitting one would make one range too many; nothing has changed.
        """
        self._replace(owner, start, end, [])

    def release(self, owner: Owner) -> None:
        """Takes all locks of an owner away."""
        self._held.pop(owner, None)
        self._writers.pop(owner, None)

    def _replace(self, owner: Owner, start: int, end: int, middle: list[Range]) -> None:
        """Puts ``middle`` (nothing, or one range) where an owner's locks between two offsets were."""
        ranges = self._held.get(owner, [])
        first = _first_after(ranges, start)
        last = first
        while last < len(ranges) and ranges[last].start < end:
            last += 1
        before = (
            [attrs.evolve(ranges[first], end=start)] if first < last and ranges[first].start < start else []
        )
        after = (
            [attrs.evolve(ranges[last - 1], start=end)] if first < last and ranges[last - 1].end > end else []
        )
        if first:
            first -= 1
            before.insert(0, ranges[first])
        if last < len(ranges):
            after.append(ranges[last])
            last += 1
        joined = _join([*before, *middle, *after])
        if len(ranges) - (last - first) + len(joined) > RANGES_MAX:
            raise TooManyRangesError
        ranges[first:last] = joined
        if not ranges:
            self.release(owner)
            return
        self._held[owner] = ranges
        if any(each.write for each in middle):
            self._writers[owner] = ranges


def _first_after(ranges: list[Range], offset: int) -> int:
    """Index of the first range that ends after an offset."""
    return bisect_right(ranges, offset, key=lambda each: each.end)


def _join(ranges: list[Range]) -> list[Range]:
    """Neighbours of one kind become one range."""
    joined: list[Range] = []
    for each in ranges:
        if joined and joined[-1].end == each.start and joined[-1].write == each.write:
            joined[-1] = attrs.evolve(joined[-1], end=each.end)
        else:
            joined.append(each)
    return joined


class Waiters(Generic[Owner, Note]):
    """Who was refused a lock and said it would wait; a hint only, for nobody has to come back.

    ``note`` is what the caller needs to reach the owner.
    """

    def __init__(self) -> None:
        self._waiting: dict[Owner, tuple[Range, Note]] = {}

    def add(self, owner: Owner, wanted: Range, note: Note) -> None:
        """Remembers an owner's latest wish; the oldest one gives way where there are too many."""
        self._waiting.pop(owner, None)
        if len(self._waiting) >= WAITERS_MAX:
            del self._waiting[next(iter(self._waiting))]
        self._waiting[owner] = (wanted, note)

    def discard(self, owner: Owner) -> None:
        """Forgets an owner."""
        self._waiting.pop(owner, None)

    def take_free(self, locks: RangeLocks[Owner]) -> list[tuple[Owner, Note]]:
        """Takes out those who could have their lock now, longest waiting first."""
        free = [
            (owner, note)
            for owner, (wanted, note) in self._waiting.items()
            if locks.conflict(owner, wanted) is None
        ]
        for owner, _ in free:
            del self._waiting[owner]
        return free
