"""What is kept of block devices: how much, and until when."""

from __future__ import annotations

from space._node.block_cache import UNIT_BYTES, UNIT_COST_BYTES, BlockCache, Kept

CHUNK = bytes(range(256)) * (4 * UNIT_BYTES // 256)


def kept_in(cache: BlockCache) -> Kept:
    """Of a device seen at version 1."""
    kept = Kept(cache)
    kept.seen(1, 1)
    return kept


def held(kept: Kept, offset: int, length: int) -> bytes | None:
    """A range as bytes."""
    found = kept.get(offset, length)
    return None if found is None else bytes(found)


def test_any_range_of_what_was_kept_as_one_is_found() -> None:
    """Ranges inside are found whatever their alignment, and none that begins before or ends behind."""
    kept = kept_in(BlockCache())
    kept.put(2 * UNIT_BYTES, CHUNK)
    base = 2 * UNIT_BYTES
    for start, length in ((0, len(CHUNK)), (512, 512), (UNIT_BYTES - 1, 2), (len(CHUNK) - 1, 1)):
        assert held(kept, base + start, length) == CHUNK[start : start + length]
    for offset, length in ((0, 512), (base - 1, 2), (base + len(CHUNK) - 1, 2), (base + len(CHUNK), 1)):
        assert held(kept, offset, length) is None


def test_a_written_unit_is_forgotten_and_no_other() -> None:
    """A write of one byte forgets its unit; ranges across it are not found, those beside it are."""
    kept = kept_in(BlockCache())
    kept.put(0, CHUNK)
    kept.written(1, UNIT_BYTES, 1)
    kept.moved(1, 2)
    assert kept.version == 2
    assert held(kept, 0, UNIT_BYTES) == CHUNK[:UNIT_BYTES]
    assert held(kept, UNIT_BYTES, 1) is None
    assert held(kept, 0, UNIT_BYTES + 1) is None
    assert held(kept, 2 * UNIT_BYTES, UNIT_BYTES) == CHUNK[2 * UNIT_BYTES : 3 * UNIT_BYTES]
    kept.put(UNIT_BYTES, bytes(UNIT_BYTES))
    assert held(kept, 0, 2 * UNIT_BYTES) is None, "two contents are not one"


def test_a_change_nobody_told_of_forgets_everything() -> None:
    """Another version with the same last change keeps all; another change keeps nothing, told ranges or not."""
    kept = kept_in(BlockCache())
    kept.put(0, CHUNK)
    kept.seen(5, 1)
    assert held(kept, 0, 1) is not None
    kept.written(4, 0, 1)
    kept.moved(4, 6)
    assert kept.version == 5, "what was told began at another version"
    assert held(kept, 0, 1) is not None
    kept.seen(7, 2)
    assert held(kept, 0, len(CHUNK)) is None


def test_the_oldest_goes_first_over_all_devices() -> None:
    """The sum over devices is bounded, and what was put last is there."""
    cost = len(CHUNK) + 4 * UNIT_COST_BYTES
    cache = BlockCache(3 * cost)
    first, second = kept_in(cache), kept_in(cache)
    for number in range(3):
        first.put(number * len(CHUNK), CHUNK)
    second.put(0, CHUNK)
    assert [held(first, number * len(CHUNK), 1) is not None for number in range(3)] == [False, True, True]
    assert held(second, 0, len(CHUNK)) == CHUNK
    del first
    for number in range(1, 4):
        second.put(number * len(CHUNK), CHUNK)
    assert [held(second, number * len(CHUNK), 1) is not None for number in range(4)] == [False, *[True] * 3]
