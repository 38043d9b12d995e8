"""Many runs of a simulation, one after the other by seed: for tests, and as a program."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    import pytest

RUNS_FOR_EVERYTHING: Final = 60
"""From so many runs on, whatever can happen has happened."""

Run = Callable[[int], Counter[str]]
"""A run of a seed; what happened in it.  It raises what does not hold."""


def swarm(run: Run, runs: int, first: int, out: TextIO) -> tuple[Counter[str], dict[int, str]]:
    """What happened in all runs together, and what went wrong in which; both are said as well.

    A test lets it be said on stderr: what a process of ``pytest -n`` writes to stdout is lost.
    """
    counts: Counter[str] = Counter()
    failures: dict[int, str] = {}
    for seed in range(first, first + runs):
        try:
            counts += run(seed)
        except Exception as error:  # noqa: BLE001 - whatever it is, the seed is what finds it again
            failures[seed] = f"{type(error).__name__}: {error!s:.600}"
            out.write(f"seed {seed}: {failures[seed]}\n")
            out.flush()
    told = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    out.write(f"\n{runs} runs from seed {first}, {len(failures)} failed\n{told}\n")
    return counts, failures


def finds_nothing(
    capsys: pytest.CaptureFixture[str], run: Run, runs: int, first: int, happens: Sequence[str]
) -> None:
    """Asserts that all runs hold and, if there are enough of them, that everything that can happen does."""
    with capsys.disabled():
        counts, failures = swarm(run, runs, first, sys.stderr)
    assert not failures
    if runs >= RUNS_FOR_EVERYTHING:
        assert [name for name in happens if not counts[name]] == []


def main(run: Run, arguments: Sequence[str], *, runs: int) -> int:
    """Runs ``[RUNS [FIRST_SEED]]``; the exit status says whether all held."""
    runs, first = [*map(int, arguments), *(runs, 0)[len(arguments) :]]
    _, failures = swarm(run, runs, first, sys.stdout)
    return bool(failures)
