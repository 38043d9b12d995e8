"""What all benchmarks share: result rows, the scale of a run, rounds in turn, work in a fresh process.

Ours and its peers run in turn (A B C, A B C, …) in the same minutes on the same disk, and the median round of
each counts.  Only ratios mean anything: the same machine is several times slower when somebody else has its
cores or its disk.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

DATA: Final = ".bench-data"
ROUNDS: Final = 3
ROOT: Final = Path(__file__).resolve().parent.parent
_LINES_OF_ERROR: Final = 5
_COMMAND_SECONDS_MAX: Final = 600  # a peer that hangs must not hold up the rest


@attrs.frozen
class Row:
    """One comparison.

    Attributes:
        case: what was measured.
        unit: of both values; ``/s`` at its end (or ``x``) means that more is better, else less is.
        ours: our value.
        peer: what it is compared with; ``aim`` for a target of ours, empty for a value that stands alone.
        value: the peer's value.
    """

    case: str
    unit: str
    ours: float
    peer: str = ""
    value: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times as good as the peer: above 1, ours is better whatever the unit."""
        if not self.value or not self.ours:
            return None
        return self.ours / self.value if more_is_better(self.unit) else self.value / self.ours

    def to_json(self) -> dict[str, Any]:
        """The row as it stands in the document of ``--json``."""
        return {**attrs.asdict(self), "ratio": self.ratio}


def more_is_better(unit: str) -> bool:
    """Whether a value in this unit is a rate."""
    return unit.endswith(("/s", "x"))


@attrs.frozen
class Scale:
    """How large a run is.

    Attributes:
        quick: smoke sizes, which show that everything works and no more.
        factor: full sizes are multiplied by it.
        directory: where data goes.
        note: tells the user what is going on.
    """

    quick: bool
    factor: float
    directory: Path
    note: Callable[[str], None] = lambda _: None

    def pick(self, full: int, quick: int) -> int:
        """A size for this run."""
        return quick if self.quick else max(1, int(full * self.factor))

    @contextlib.contextmanager
    def workspace(self, name: str) -> Iterator[Path]:
        """An empty directory, removed afterwards."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.directory))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def in_turn(cases: Mapping[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median of each case over rounds in which every case runs once, in order."""
    results: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            results[name].append(run())
    return {name: statistics.median(values) for name, values in results.items()}


@attrs.frozen
class Child:
    """What a function did in a fresh interpreter: result, time, and peak memory of the process."""

    result: Any
    seconds: float
    rss_bytes: int


def in_child(function: str, *arguments: Any) -> Child:
    """Runs ``module:function`` in a process of its own; arguments and result pass as JSON.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "bench.measure", function, json.dumps(arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines()[-_LINES_OF_ERROR:]
        raise RuntimeError(f"{function} failed: " + " / ".join(lines))
    return Child(**json.loads(done.stdout.splitlines()[-1]))


def peak_rss_bytes() -> int:
    """The most memory this program ever held, mapped files it touched included.

    Not ``ru_maxrss``, in which Linux keeps what the parent held before ``exec``.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not say VmHWM")


def timed(function: Callable[[], object]) -> float:
    """Seconds a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def run_command(command: Sequence[str | Path], **environment: str) -> float:
    """Seconds a command takes.

    Raises:
        RuntimeError: it failed.
    """
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=_COMMAND_SECONDS_MAX,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} took more than {_COMMAND_SECONDS_MAX} s") from None
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return time.perf_counter() - started


def _serve(function: str, arguments: str) -> None:
    module, name = function.split(":")
    call = getattr(importlib.import_module(module), name)
    started = time.perf_counter()
    result = call(*json.loads(arguments))
    seconds = time.perf_counter() - started
    print(json.dumps({"result": result, "seconds": seconds, "rss_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2])
