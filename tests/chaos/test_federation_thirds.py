"""Third zones that follow a new home, simulated: a seeded swarm, and seeds that found something once."""

from __future__ import annotations

import os
from typing import Any, Final

import pytest

from space._errors import SpaceError
from space._node import federation_heir, federation_promote
from space._node.federation_send import ZoneSource
from space.federation.stream import Begin
from space.statemachine.shipments import _Delivery
from tests.chaos.federation_thirds_sim import simulate, simulate_anew
from tests.chaos.swarm import finds_nothing

pytestmark = pytest.mark.requires("py:aiohttp")

RUNS: Final = int(os.environ.get("SPACE_FEDERATION_THIRDS_RUNS", "12"))
FIRST_SEED: Final = int(os.environ.get("SPACE_CHAOS_SEED", "0"))
HAPPENS: Final = ("promoted", "ahead", "in branches", "shipments")


@pytest.mark.timeout(6 * 3600)
def test_a_swarm_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """In every run all three zones are alike in the end, one is the home, and what was ahead is in a branch."""
    finds_nothing(capsys, simulate, RUNS, FIRST_SEED, HAPPENS)


@pytest.mark.timeout(6 * 3600)
def test_a_swarm_in_which_everything_is_copied_anew_finds_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same holds where zones are removed and added again, and copies are cut everywhere."""
    finds_nothing(capsys, simulate_anew, RUNS, FIRST_SEED, [*HAPPENS, "forgotten"])


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
        (500086, 3),
        (500123, 3),
        (600016, 3),
        (600200, 3),
        (1000200, 3),
        (1000222, 3),
        (1000485, 3),
    ],
)
def test_what_was_found_once_stays_fixed(seed: int, promotions: int) -> None:
    """Runs that broke a promise while this was written."""
    simulate(seed, promotions)


@pytest.mark.parametrize("seed", [901020, 901029, 901078, 901089, 1000007])
def test_what_was_found_where_zones_are_removed_stays_fixed(seed: int) -> None:
    """Likewise in runs in which zones are removed and added again."""
    simulate_anew(seed)


def _all_alike(self: Any, here: int, theirs: int) -> bool:
    return True


def _goes_on(self: Any, at: Begin | None, third: Any) -> Begin | None:
    return at


def _keeps_names(self: Any, capsule: bytes) -> None:
    return None


def _only_knows_the_present(state: Any, zone: bytes, capsule: bytes) -> bool:
    return False


def _finds_nothing_left_over(self: Any) -> list[bytes]:
    return []


@pytest.mark.parametrize(
    "where, what, instead, runs",
    [
        (federation_heir._Plan, "_is_same", _all_alike, [(0, 3), (1, 3), (2, 3), (4, 3)]),
        (ZoneSource, "_after_parting", _goes_on, [(200061, 2)]),
        (federation_promote, "_is_anothers", _only_knows_the_present, [(200036, 2)]),
        (_Delivery, "_unname", _keeps_names, [(200390, 2)]),
        (federation_heir._Plan, "_left_over", _finds_nothing_left_over, [(1000485, 3)]),
    ],
)
def test_it_would_be_noticed(
    where: object, what: str, instead: object, runs: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one promise broken, one of the same seeds fails."""
    monkeypatch.setattr(where, what, instead)
    assert any(_fails(*run) for run in runs)


def _fails(seed: int, promotions: int) -> bool:
    try:
        simulate(seed, promotions)
    except (AssertionError, SpaceError):
        return True
    return False
