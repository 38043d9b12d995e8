"""The same load for every system: a fixed number of operations in flight, each followed by the next one at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

import attrs

from space._errors import UnavailableError

FAILURES_MAX: Final = 100
"""More than this many operations that fail in a row end a run: something is wrong with it."""

STALL_SECONDS: Final = 60.0


@attrs.frozen
class Load:
    """What is asked of a system: operations of ``size`` bytes, ``in_flight`` at a time, for ``seconds``."""

    size: int
    in_flight: int
    seconds: float


@attrs.frozen
class Measured:
    """What a system did.

    Attributes:
        operations: acknowledged ones; all of them were begun within the time given.
        seconds: from the first operation to the last acknowledgement.
        p50_ms, p99_ms: of the time from an operation to its acknowledgement.
    """

    operations: int
    seconds: float
    p50_ms: float
    p99_ms: float

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.operations / self.seconds


def measured(latencies: list[float], seconds: float) -> Measured:
    """The figures of a run.

    Raises:
        RuntimeError: nothing was acknowledged.
    """
    if not latencies:
        raise RuntimeError("not one operation was acknowledged")
    ordered = sorted(latencies)
    last = len(ordered) - 1
    return Measured(
        len(ordered), seconds, 1000 * ordered[round(0.5 * last)], 1000 * ordered[round(0.99 * last)]
    )


class ClosedLoop:
    """Drives a client by callbacks, which costs the machine less than a task for each operation."""

    def __init__(self, issue: Callable[[int, Callable[[bool], None]], None], load: Load) -> None:
        """Args:
        issue: begins operation number n and calls back with whether it was acknowledged.
        """
        self._issue = issue
        self._load = load
        self._latencies: list[float] = []
        self._number = 0
        self._open = 0
        self._failed = 0
        self._until = 0.0
        self._idle = asyncio.Event()

    async def run(self) -> Measured:
        """Carries out the load.

        Raises:
            UnavailableError: operations fail, or acknowledgements stay away.
        """
        started = time.perf_counter()
        self._until = started + self._load.seconds
        for _ in range(self._load.in_flight):
            self._next()
        try:
            await asyncio.wait_for(self._idle.wait(), self._load.seconds + STALL_SECONDS)
        except TimeoutError:
            raise UnavailableError(f"{self._open} operations were not answered") from None
        if self._failed >= FAILURES_MAX:
            raise UnavailableError("operations fail")
        return measured(self._latencies, time.perf_counter() - started)

    def _next(self) -> None:
        self._open += 1
        self._number += 1
        began = time.perf_counter()

        def done(acknowledged: bool) -> None:
            now = time.perf_counter()
            self._open -= 1
            if acknowledged:
                self._latencies.append(now - began)
                self._failed = 0
            else:
                self._failed += 1
            if now < self._until and self._failed < FAILURES_MAX:
                self._next()
            elif not self._open:
                self._idle.set()

        self._issue(self._number, done)


PROBE_SECONDS: Final = 0.02
PROBES_MAX: Final = 1500
"""Half a minute of attempts: no system here takes that long to elect a leader."""


async def first_acknowledged(issue: Callable[[int, Callable[[bool], None]], None]) -> float:
    """When, by ``time.monotonic``, the first of many operations was acknowledged, one begun every 20 ms.

    Raises:
        UnavailableError: none was.
    """
    found: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def done(acknowledged: bool) -> None:
        if acknowledged and not found.done():
            found.set_result(time.monotonic())

    for number in range(PROBES_MAX):
        issue(number, done)
        await asyncio.wait([found], timeout=PROBE_SECONDS)
        if found.done():
            return found.result()
    raise UnavailableError("no write was acknowledged after a leader was killed")


def run(work: Any) -> Any:
    """Runs a coroutine on the fastest loop there is: the same for every system."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)
