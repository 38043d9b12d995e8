"""Decoded frames kept in memory, least recently used out first, bounded in bytes.

The key holds the frame's hash besides its place: after a log suffix is cut off, the same place can hold
other content, and an entry from before must not answer for it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final, TypeAlias, final

from space._errors import UsageError

CacheKey: TypeAlias = tuple[int, int, bytes]
"""``(source_position, payload_offset, hash)``."""

ENTRY_BYTES: Final = 256  # what an entry costs besides its content: key, node and object headers
DEFAULT_CAPACITY_BYTES: Final = 64 * 1024 * 1024


@final
class FrameCache:
    """Thread-safe; every operation takes constant time.

    Args:
        capacity_bytes: most bytes of content and bookkeeping held; 0 keeps nothing.

    Raises:
        UsageError: a negative capacity.
    """

    def __init__(self, capacity_bytes: int = DEFAULT_CAPACITY_BYTES) -> None:
        if capacity_bytes < 0:
            raise UsageError(f"a cache holds at least 0 bytes, not {capacity_bytes}")
        self.capacity_bytes: Final = capacity_bytes
        self.size_bytes = 0
        self._entries: OrderedDict[CacheKey, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: CacheKey) -> bytes | None:
        """The content kept for ``key``, or None."""
        with self._lock:
            content = self._entries.get(key)
            if content is not None:
                self._entries.move_to_end(key)
            return content

    def put(self, key: CacheKey, content: bytes) -> None:
        """Keep ``content`` and drop the least recently used until all fits; too large a frame is not kept."""
        cost = len(content) + ENTRY_BYTES
        if cost > self.capacity_bytes:
            return
        with self._lock:
            previous = self._entries.pop(key, None)
            self._entries[key] = content
            self.size_bytes += cost - (0 if previous is None else len(previous) + ENTRY_BYTES)
            while self.size_bytes > self.capacity_bytes:
                _, dropped = self._entries.popitem(last=False)
                self.size_bytes -= len(dropped) + ENTRY_BYTES

    def clear(self) -> None:
        """Drop everything; to be called when a key is destroyed, so that its content leaves memory too."""
        with self._lock:
            self._entries.clear()
            self.size_bytes = 0
