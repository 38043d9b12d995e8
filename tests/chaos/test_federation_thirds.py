"""Third zones that follow a new home, simulated: a seeded swarm, seeds that found something once, and that it notices."""

from __future__ import annotations

import os
import sys
from typing import Any, Final

import pytest

from space._errors import SpaceError
from space._node import federation_heir, federation_promote, federation_send
from space.federation.stream import Begin
from space.statemachine.shipments import _Delivery
from tests.chaos.federation_thirds_sim import simulate
from tests.chaos.swarm import swarm

pytestmark = pytest.mark.requires("py:aiohttp")

RUNS: Final = int(os.environ.get("SPACE_FEDERATION_THIRDS_RUNS", "12"))
FIRST_SEED: Final = int(os.environ.get("SPACE_CHAOS_SEED", "0"))
RUNS_FOR_EVERYTHING: Final = 60
"""From so many runs on, whatever can happen has happened."""

HAPPENS: Final = ("promoted", "ahead", "in branches", "shipments")

CONTROL_SEEDS: Final = (0, 1, 2)


@pytest.mark.timeout(6 * 3600)
def test_a_swarm_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """In every run all three zones are alike in the end, one is the home, and what was ahead is in a branch."""
    with capsys.disabled():
        counts, failures = swarm(simulate, RUNS, FIRST_SEED, sys.stderr)
    assert not failures
    if RUNS >= RUNS_FOR_EVERYTHING:
        assert [name for name in HAPPENS if not counts[name]] == []


@pytest.mark.parametrize(
    "seed, promotions",
    [
        (200036, 2),
        (200061, 2),
        (200390, 2),
        (300010, 2),
        (300168, 3),
        (300215, 3),
        (400004, 3),
    ],
)
def test_what_was_found_once_stays_fixed(seed: int, promotions: int) -> None:
    """Runs that broke a promise while this was written."""
    simulate(seed, promotions)


def _all_alike(self: Any, here: int, theirs: int) -> bool:
    return True


def _sets_nothing_aside(self: Any, further: list[bytes]) -> None:
    return None


def _goes_on(self: Any, at: Begin | None, third: Any) -> Begin | None:
    return at


def _keeps_names(self: Any, capsule: bytes) -> None:
    return None


def _asks_the_present(state: Any, zone: bytes, capsule: bytes) -> bool:
    return False


@pytest.mark.parametrize(
    "broken",
    [
        "what is behind or ahead counts as the same",
        "what is ahead is not kept",
        "what a home did that lost its place is told",
    ],
)
def test_it_would_be_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one promise broken, one of the same seeds fails."""
    match broken:
        case "what is behind or ahead counts as the same":
            monkeypatch.setattr(federation_heir._Plan, "_is_same", _all_alike)
        case "what is ahead is not kept":
            monkeypatch.setattr(federation_heir._Plan, "_set_aside", _sets_nothing_aside)
        case _:
            monkeypatch.setattr(federation_send.ZoneSource, "_after_parting", _goes_on)
    assert any(map(_fails, CONTROL_SEEDS))


def _fails(seed: int) -> bool:
    try:
        simulate(seed)
    except (AssertionError, SpaceError):
        return True
    return False
