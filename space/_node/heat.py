"""Heat: which capsules of a store are used how much, counted in memory, forgotten when the process ends.

Counts are those of the last full minute.  No more than :data:`CAPSULES_MAX` capsules are counted at once: when another
comes, every count goes down by one (Misra and Gries, 1982), so whatever has more than one use in that many is
still there at the end of the minute, counted low by no more than that share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import attrs

from space.events import types as ev
from space.events.codec import Entry

WINDOW_NS: Final = 60_000_000_000
CAPSULES_MAX: Final = 4096
"""100 KiB of counts; a capsule with one use in 4,096 is not hot."""

SPIKE_PER_SECOND: Final = 200.0
"""Reads and writes a second from which a capsule counts as hot."""

_WRITES: Final = (ev.ExtentWritten, ev.RangeDeallocated, ev.RangeCopied)


@attrs.frozen
class Rate:
    """Uses a second."""

    reads: float
    writes: float


class Heat:
    """See the module's text; ``now`` gives nanoseconds of a clock that never goes back."""

    def __init__(self, now: Callable[[], int]) -> None:
        self._now = now
        self._began = now()
        self._counts: dict[bytes, list[int]] = {}
        self._before: dict[bytes, list[int]] = {}

    def read(self, capsule: bytes) -> None:
        """Counts a read.  Counts of threads that meet may be lost: they are estimates."""
        self._count(capsule, 0)

    def wrote(self, entries: Sequence[Entry]) -> None:
        """Counts the writes of a batch."""
        for entry in entries:
            for _, event in entry.events:
                if isinstance(event, _WRITES):
                    self._count(event.capsule, 1)

    def spikes(self) -> dict[bytes, Rate]:
        """Capsules that were hot in the last full minute."""
        self._turn()
        seconds = WINDOW_NS / 1e9
        found = list(self._before.items())
        return {
            capsule: Rate(reads / seconds, writes / seconds)
            for capsule, (reads, writes) in found
            if (reads + writes) / seconds >= SPIKE_PER_SECOND
        }

    def _count(self, capsule: bytes, what: int) -> None:
        self._turn()
        counts = self._counts
        found = counts.get(capsule)
        if found is not None:
            found[what] += 1
        elif len(counts) < CAPSULES_MAX:
            counts[capsule] = [1 - what, what]
        else:
            self._counts = {
                key: [max(0, reads - (reads > 0)), writes - (reads == 0)]
                for key, (reads, writes) in list(counts.items())
                if reads + writes > 1
            }

    def _turn(self) -> None:
        """Begins another minute when one is over."""
        passed = self._now() - self._began
        if passed >= WINDOW_NS:
            self._before = self._counts if passed < 2 * WINDOW_NS else {}
            self._counts = {}
            self._began += passed - passed % WINDOW_NS
