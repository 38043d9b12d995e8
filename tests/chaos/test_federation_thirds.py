"""Third zones that follow a new home, simulated: a seeded swarm, and that it notices what is broken."""

from __future__ import annotations

import os
from typing import Final

import pytest

from tests.chaos.federation_thirds_sim import simulate

pytestmark = pytest.mark.requires("py:aiohttp")

RUNS: Final = int(os.environ.get("SPACE_FEDERATION_THIRDS_RUNS", "10"))
FIRST_SEED: Final = int(os.environ.get("SPACE_CHAOS_SEED", "0"))


@pytest.mark.timeout(6 * 3600)
@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + RUNS))
def test_a_swarm_finds_nothing(seed: int) -> None:
    """In every run all three zones are alike in the end, one is the home, and what was ahead is in a branch."""
    simulate(seed)
