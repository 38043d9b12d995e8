"""Content of block devices, decoded and at hand: a read that finds all it wants here costs a look into a table.

What is kept of a device is good as of one version of the tables.  When they move on, the capsule's row says whether the
device has changed; if so everything kept of it goes, unless all that happened are writes of which the device's writer
tells the ranges.  Encrypted capsules are not kept: a destroyed key has to take their content with it.

The oldest goes first when it is too much: content is shared with whoever read it, so nothing is copied.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from space._node.reading import Reading

CACHE_BYTES: Final = 256 << 20
"""Of all devices over one store: what a host of a few gigabytes works with in a minute."""
UNIT_BYTES: Final = 4096
"""What is found and forgotten as one."""
CHUNK_BYTES: Final = 64 << 10
"""What is read at once where it is one frame: the frame has to be read and checked whole in any case."""
UNIT_COST_BYTES: Final = 200
"""Of an entry: number, tuple, and their places in the table."""
NEVER: Final = -1


class BlockCache:
    """The bytes that all devices over one store may keep."""

    def __init__(self, capacity_bytes: int = CACHE_BYTES) -> None:
        self._capacity = capacity_bytes
        self._held = 0
        self._order: deque[tuple[weakref.ref[Kept], int, int, bytes | memoryview]] = deque()

    def added(self, kept: Kept, first: int, units: int, content: bytes | memoryview) -> None:
        """Counts content, and lets the oldest go."""
        self._held += len(content) + units * UNIT_COST_BYTES
        self._order.append((weakref.ref(kept), first, units, content))
        while self._held > self._capacity:
            owner, first, units, content = self._order.popleft()
            self._held -= len(content) + units * UNIT_COST_BYTES
            if (found := owner()) is not None:
                found.drop(first, units, content)


_caches: Final[weakref.WeakKeyDictionary[Reading, BlockCache]] = weakref.WeakKeyDictionary()


def cache_of(reading: Reading) -> BlockCache:
    """The cache that all devices over a reading share."""
    found = _caches.get(reading)
    if found is None:
        found = _caches[reading] = BlockCache()
    return found


class Kept:
    """What is kept of one device."""

    __slots__ = ("__weakref__", "_cache", "_change", "_units", "version")

    def __init__(self, cache: BlockCache) -> None:
        self._cache = cache
        self._units: dict[int, tuple[bytes | memoryview, int]] = {}
        self._change = NEVER
        self.version = NEVER

    def get(self, offset: int, length: int) -> memoryview | None:
        """A range of the device, if it was kept as one."""
        found = self._units.get(offset // UNIT_BYTES)
        if found is None:
            return None
        content, base = found
        start = offset - base
        if start < 0 or start + length > len(content) or not self._whole(offset, length, content):
            return None
        return memoryview(content)[start : start + length]

    def _whole(self, offset: int, length: int, content: bytes | memoryview) -> bool:
        """Whether no unit of the range has been forgotten or kept anew since."""
        units = self._units
        for unit in range(offset // UNIT_BYTES + 1, (offset + length - 1) // UNIT_BYTES + 1):
            found = units.get(unit)
            if found is None or found[0] is not content:
                return False
        return True

    def put(self, offset: int, content: bytes | memoryview) -> None:
        """Keeps a range that is whole units, as of :attr:`version`."""
        first, units = offset // UNIT_BYTES, len(content) // UNIT_BYTES
        entry = (content, offset)
        for unit in range(first, first + units):
            self._units[unit] = entry
        self._cache.added(self, first, units, content)

    def drop(self, first: int, units: int, content: bytes | memoryview) -> None:
        """Forgets what has become too old."""
        for unit in range(first, first + units):
            found = self._units.get(unit)
            if found is not None and found[0] is content:
                del self._units[unit]

    def seen(self, version: int, change: int) -> None:
        """The tables are at a version, and the capsule has last changed at a position."""
        if version != self.version and change != self._change:
            self._units.clear()
        self.version, self._change = version, change

    def written(self, before: int, offset: int, length: int) -> None:
        """Between ``before`` and what :meth:`moved` will say, this was written to the device."""
        if before != self.version:
            return
        for unit in range(offset // UNIT_BYTES, (offset + length - 1) // UNIT_BYTES + 1):
            self._units.pop(unit, None)

    def moved(self, before: int, after: int) -> None:
        """Nothing else has changed in the device up to a version."""
        if before == self.version:
            self.version = after
