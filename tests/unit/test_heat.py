from __future__ import annotations

from pathlib import Path

import space
from space._node.heat import CAPSULES_MAX, SPIKE_PER_SECOND, WINDOW_NS, Heat, Rate

MINUTE = WINDOW_NS // 1_000_000_000
HOT = int(SPIKE_PER_SECOND * MINUTE)


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 5

    def __call__(self) -> int:
        return self.now


def test_a_capsule_is_hot_for_the_minute_after() -> None:
    """What was used often in one minute is hot in the next, and not in the one after."""
    clock = Clock()
    heat = Heat(clock)
    for _ in range(HOT):
        heat.read(b"hot")
    for _ in range(HOT - 1):
        heat.read(b"warm")
    assert heat.spikes() == {}
    clock.now += WINDOW_NS
    assert heat.spikes() == {b"hot": Rate(SPIKE_PER_SECOND, 0.0)}
    clock.now += WINDOW_NS - 1
    heat.read(b"warm")
    assert heat.spikes() == {b"hot": Rate(SPIKE_PER_SECOND, 0.0)}
    clock.now += 1
    assert heat.spikes() == {}


def test_a_pause_is_not_hot() -> None:
    """Counts of a minute that is long over say nothing about now."""
    clock = Clock()
    heat = Heat(clock)
    for _ in range(HOT):
        heat.read(b"hot")
    clock.now += 2 * WINDOW_NS
    assert heat.spikes() == {}


def test_the_many_do_not_hide_the_one() -> None:
    """However many capsules are used once, memory is bounded and one that is used often is still found."""
    clock = Clock()
    heat = Heat(clock)
    for number in range(40_000):
        heat.read(number.to_bytes(4, "big"))
        heat.read(b"hot")
        assert len(heat._counts) <= CAPSULES_MAX
    clock.now += WINDOW_NS
    (rate,) = heat.spikes().values()
    assert 40_000 / MINUTE >= rate.reads >= (40_000 - 80_000 / CAPSULES_MAX) / MINUTE


def test_a_store_counts_its_reads_and_writes(tmp_path: Path) -> None:
    """What is read from and written to a store is counted, by capsule."""
    with space.open(tmp_path / "data") as store:
        clock = Clock()
        store.heat = Heat(clock)
        capsule = store.put(b"x", name="/x").id
        for _ in range(HOT):
            store.read(capsule, 0, 1)
        for number in range(3):
            store.write(capsule, number, b"y")
        clock.now += WINDOW_NS
        assert store.heat.spikes() == {capsule: Rate(SPIKE_PER_SECOND, 4 / MINUTE)}
