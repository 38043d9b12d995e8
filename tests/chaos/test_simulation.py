"""Simulated clusters: a seeded swarm for volume, shapes that hypothesis shrinks, and replay to the last bit."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from space.replication.driver import Settings
from tests.chaos.sim import FAULTS, Options, Simulation, report, run_seed, swarm

pytestmark = pytest.mark.requires("py:space_raft_engine")

RUNS: Final = int(os.environ.get("SPACE_CHAOS_RUNS", "5000"))
FIRST_SEED: Final = int(os.environ.get("SPACE_CHAOS_SEED", "0"))
RUNS_FOR_EVERYTHING: Final = 1000
"""From so many runs on, whatever can happen has happened: what never did would be a fault that is not injected."""

HAPPENS: Final = (
    "acknowledged",
    "answered",
    "change",
    "change refused: UsageError",
    "clock jump",
    "crash",
    "damage found",
    "disk error",
    "disk failed",
    "disk full",
    "disk was full",
    "elections",
    "given up",
    "installed",
    "kill",
    "messages lost",
    "offer",
    "one-way partition",
    "partition",
    "pause",
    "reads",
    "reopen",
    "repeated",
    "restart",
    "retired",
    "rot",
    "slow disk",
    "transfer",
    "truncation",
)


@pytest.mark.timeout(6 * 3600)
def test_a_swarm_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Every run of the swarm keeps every promise, converges and is linearizable, and every fault really happens."""
    counts, failures = swarm(FIRST_SEED, RUNS, os.cpu_count() or 1)
    with capsys.disabled():
        # on stderr: what a process of pytest -n writes to stdout is lost
        sys.stderr.write(f"\n{RUNS} runs from seed {FIRST_SEED}, {len(failures)} failed\n")
        sys.stderr.write(report(counts, failures) + "\n")
    assert not failures
    if RUNS >= RUNS_FOR_EVERYTHING:
        assert [name for name in HAPPENS if not counts[name]] == []
        assert counts["unknown histories"] * 1000 <= RUNS


@pytest.mark.parametrize("seed", [273, 3068, 12711, 23208, 50466, 50752])
def test_what_was_found_once_stays_fixed(seed: int) -> None:
    """Runs that broke a promise: what was wrong is in the history of this repository, under its seed."""
    run_seed(seed)


def test_a_run_is_a_function_of_its_seed() -> None:
    """The same seed gives the same run again, event for event, also in a process whose hashes are salted otherwise."""
    seeds = range(7, 15)
    here = [run_seed(seed).fingerprint for seed in seeds]
    assert [run_seed(seed).fingerprint for seed in seeds] == here
    assert len(set(here)) == len(here)
    program = f"from tests.chaos.sim import run_seed\nprint([run_seed(s).fingerprint for s in {seeds}])"
    environment = {**os.environ, "PYTHONHASHSEED": "4711"}
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert found.stdout.strip() == str(here)


_LIMITS: Final = st.builds(
    Settings,
    election=st.just(5),
    heartbeat=st.just(1),
    message_bytes=st.sampled_from([1, 4 << 20]),
    inflight=st.sampled_from([1, 64]),
    read_retry=st.just(4),
    retained=st.sampled_from([4, 65_536]),
)


@given(
    seed=st.integers(0, 2**32),
    nodes=st.integers(1, 5),
    limits=_LIMITS,
    script=st.lists(st.tuples(st.sampled_from([0.1, 1.0, 4.0, 15.0]), st.sampled_from(FAULTS)), max_size=20),
)
def test_no_shape_of_trouble_breaks_it(
    seed: int, nodes: int, limits: Settings, script: list[tuple[float, str]]
) -> None:
    """Whatever goes wrong in whatever order, on an otherwise perfect network; a counterexample is made small."""
    simulation = Simulation(seed, Options(nodes=nodes, ticks=60, checkpoint=5, settings=limits))
    note(f"fingerprint {simulation.run(script).fingerprint:x}")
