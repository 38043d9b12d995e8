from __future__ import annotations

import threading

import pytest

from space._errors import UsageError
from space.content.cache import ENTRY_BYTES, CacheKey, FrameCache


def key(number: int) -> CacheKey:
    """A key like those of frames."""
    return (number, 0, bytes(16))


def test_keeps_what_fits_and_drops_the_least_recently_used() -> None:
    """When full, the entry not used for longest goes, and reading counts as use."""
    cache = FrameCache(3 * (100 + ENTRY_BYTES))
    for number in range(3):
        cache.put(key(number), bytes(100))
    assert cache.get(key(0)) == bytes(100)
    cache.put(key(3), bytes(100))
    assert [cache.get(key(number)) is not None for number in range(4)] == [True, False, True, True]


def test_size_never_passes_capacity() -> None:
    """Whatever is put, the bytes accounted for are those held, and at most the capacity."""
    cache = FrameCache(5000)
    for number in range(500):
        cache.put(key(number % 7), bytes(number * 37 % 3000))
        assert cache.size_bytes <= 5000
    cache.clear()
    assert (len(cache), cache.size_bytes) == (0, 0)


def test_replacing_an_entry_counts_it_once() -> None:
    """A second put under one key replaces the first, in content and in size."""
    cache = FrameCache(10_000)
    cache.put(key(1), bytes(1000))
    cache.put(key(1), b"x")
    assert cache.get(key(1)) == b"x"
    assert cache.size_bytes == 1 + ENTRY_BYTES


def test_too_large_an_entry_evicts_nothing() -> None:
    """Content larger than the whole cache is passed by, and what is there stays."""
    cache = FrameCache(1000)
    cache.put(key(1), b"small")
    cache.put(key(2), bytes(1000))
    assert cache.get(key(1)) == b"small"
    assert cache.get(key(2)) is None


def test_same_place_with_another_hash_is_another_entry() -> None:
    """Content from before a log suffix was cut off never answers for what took its place."""
    cache = FrameCache()
    cache.put((5, 0, b"a" * 16), b"before")
    assert cache.get((5, 0, b"b" * 16)) is None


def test_zero_capacity_keeps_nothing() -> None:
    """A cache of no bytes is a cache that never hits."""
    cache = FrameCache(0)
    cache.put(key(1), b"")
    assert cache.get(key(1)) is None


def test_negative_capacity_is_refused() -> None:
    """A capacity below zero is a usage error."""
    with pytest.raises(UsageError):
        FrameCache(-1)


def test_threads_leave_the_accounts_right() -> None:
    """After many threads put and got at once, size is the sum of what is there."""
    cache = FrameCache(20_000)

    def work(seed: int) -> None:
        for step in range(2000):
            cache.put(key((seed * 31 + step) % 97), bytes((seed + step) % 700))
            cache.get(key(step % 97))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = [cache.get(key(number)) for number in range(97)]
    assert cache.size_bytes == sum(len(content) + ENTRY_BYTES for content in held if content is not None)
    assert 0 < cache.size_bytes <= 20_000
