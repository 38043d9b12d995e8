"""Homes of single capsules that move, simulated: a seeded swarm, and seeds that found something once."""

from __future__ import annotations

import os
from typing import Any, Final

import pytest

from space._errors import SpaceError
from space._node import federation_follow
from space.events import commands as cmd
from space.federation import translate
from space.statemachine import decide
from space.statemachine.decision import Decision, PayloadPlacer
from space.statemachine.tables import Overlay, Reader
from tests.chaos.federation_moves_sim import simulate, simulate_anew
from tests.chaos.swarm import finds_nothing

pytestmark = pytest.mark.requires("py:aiohttp")

RUNS: Final = int(os.environ.get("SPACE_FEDERATION_MOVES_RUNS", "15"))
FIRST_SEED: Final = int(os.environ.get("SPACE_CHAOS_SEED", "0"))
HAPPENS: Final = (
    "moved",
    "taken back",
    "promoted",
    "at home in oslo",
    "at home in paris",
    "files",
    "shipments",
)

CONTROL_SEEDS: Final = (0, 4, 5)


@pytest.mark.timeout(6 * 3600)
def test_a_swarm_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """In every run each capsule ends with exactly one home, and both zones have it alike."""
    finds_nothing(capsys, simulate, RUNS, FIRST_SEED, HAPPENS)


@pytest.mark.timeout(6 * 3600)
def test_a_swarm_in_which_everything_is_copied_anew_finds_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same holds where zones are removed and added again, and copies are cut everywhere."""
    finds_nothing(capsys, simulate_anew, RUNS, FIRST_SEED, [*HAPPENS, "forgotten"])


@pytest.mark.parametrize("seed", [8, 123, 133, 1017, 1079])
def test_what_was_found_once_stays_fixed(seed: int) -> None:
    """Runs that broke a promise while this was written."""
    simulate(seed)


@pytest.mark.parametrize("seed", [20323, 61089, 62084, 64108])
def test_what_was_found_where_zones_are_removed_stays_fixed(seed: int) -> None:
    """Likewise in runs in which zones are removed and added again."""
    simulate_anew(seed)


def _never_said(self: Any) -> None:
    return None


def _declines_nothing(state: Overlay, command: cmd.DeclineHomes, payload: PayloadPlacer) -> Decision:
    return []


def _leaves_it_fenced(self: Any, txn: Reader, capsule: bytes) -> bool:
    return False


@pytest.mark.parametrize(
    "broken", ["the home is never given", "what is declined is taken", "what was given is fenced"]
)
def test_it_would_be_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one promise broken, one of the same seeds fails."""
    match broken:
        case "the home is never given":
            monkeypatch.setattr(translate._Translation, "_homes", _never_said)
        case "what is declined is taken":
            monkeypatch.setitem(decide._RULES, cmd.DeclineHomes, _declines_nothing)
        case _:
            monkeypatch.setattr(federation_follow._Fork, "_is_given", _leaves_it_fenced)
    assert any(map(_fails, CONTROL_SEEDS))


def _fails(seed: int) -> bool:
    try:
        simulate(seed)
    except (AssertionError, SpaceError):
        return True
    return False
