"""Directories in an order that a 64-bit number can name a place in.

Tables have entries by name, and no number can stand for a name.  So a listing with cookies goes by *inode number*: it
never changes while an entry is there, it is in the entry's row, and it means the same after a restart and on every
node.  Names of one file in one directory share that; a few bits of a hash of the name tell them apart, and where even
those agree the names share a cookie and are passed on together.

Sorting is done once for a listing, not for every page: a *window* (the entries that follow a cookie) is kept.  It is
made after every listing that uses it has begun: one that begins finds it made for the directory as it is, or has it
made anew, and only one is kept for a directory.  So an entry that was there all along is in it.  Names are looked up
again when they are passed on; those that have gone are left out.
"""

from __future__ import annotations

import bisect
import heapq
import zlib
from array import array
from collections.abc import Iterator
from typing import Final

import attrs

from space.events.ids import ID_BYTES, CapsuleId
from space.statemachine.tables import ENTRY, EntryRow, Reader

WINDOW_ENTRIES: Final = 1 << 16
"""Entries of one window, about 6 MiB: what larger directories have beyond that is looked for again."""

WINDOWS_ENTRIES_MAX: Final = 1 << 19
"""Entries of all windows together."""

COOKIE_MIN: Final = 3  # 0 to 2 mean something else (RFC 8881 §18.23.3)
_HASH_BITS: Final = 23
_COOKIE_MASK: Final = (1 << 63) - 1
_HASH_MASK: Final = (1 << _HASH_BITS) - 1


def cookie_of(ino: int, name: bytes) -> int:
    """The place of an entry in a listing; 2**40 inode numbers come before the first is met again."""
    return max(ino << _HASH_BITS & _COOKIE_MASK | zlib.crc32(name) & _HASH_MASK, COOKIE_MIN)


@attrs.frozen
class Window:
    """The entries of a directory with cookies above ``after``, all or the first of them.

    ``change`` is the directory's change number when it was made.
    """

    change: int
    after: int
    cookies: array[int]
    names: list[bytes]
    complete: bool

    def covers(self, after: int) -> bool:
        """Whether what follows a cookie is in here."""
        return self.after <= after and (self.complete or after < self.cookies[-1])

    def page(self, after: int, limit: int) -> tuple[list[tuple[int, bytes]], bool]:
        """About ``limit`` entries after a cookie, and whether the directory ends with them."""
        first = bisect.bisect_right(self.cookies, after)
        last = min(first + limit, len(self.cookies))
        while first < last < len(self.cookies) and self.cookies[last] == self.cookies[last - 1]:
            last += 1
        found = list(zip(self.cookies[first:last], self.names[first:last], strict=True))
        return found, self.complete and last == len(self.cookies)


def window(txn: Reader, directory: CapsuleId, change: int, after: int, limit: int = 0) -> Window:
    """The window that follows a cookie; it takes a look at every entry, and memory for ``limit`` of them."""
    limit = limit or WINDOW_ENTRIES
    found = heapq.nsmallest(limit + 1, _above(txn, directory, after))
    complete = len(found) <= limit
    if not complete:
        last = found.pop()[0]
        while found and found[-1][0] == last:  # the rest of these would be missed
            found.pop()
    if not found and not complete:
        return window(txn, directory, change, after, limit * 2)
    return Window(
        change, after, array("Q", (cookie for cookie, _ in found)), [name for _, name in found], complete
    )


def _above(txn: Reader, directory: CapsuleId, after: int) -> Iterator[tuple[int, bytes]]:
    for key, value in txn.scan(ENTRY, directory):
        name = key[ID_BYTES:]
        cookie = cookie_of(EntryRow.decode(value).ino, name)
        if cookie > after:
            yield cookie, name


class Windows:
    """The last window of each of the directories that were listed lately."""

    def __init__(self) -> None:
        self._windows: dict[CapsuleId, Window] = {}
        self._entries = 0

    def find(self, directory: CapsuleId, change: int, after: int) -> Window | None:
        """A window in which a listing can go on, or begin, if there is one."""
        found = self._windows.get(directory)
        if found is None or not found.covers(after) or (after == 0 and found.change != change):
            return None
        self._windows[directory] = self._windows.pop(directory)  # the last to be forgotten
        return found

    def keep(self, directory: CapsuleId, made: Window) -> None:
        """Remembers a window, and forgets older ones."""
        self._forget(directory)
        self._windows[directory] = made
        self._entries += len(made.names)
        while self._entries > WINDOWS_ENTRIES_MAX and len(self._windows) > 1:
            self._forget(next(iter(self._windows)))

    def _forget(self, directory: CapsuleId) -> None:
        gone = self._windows.pop(directory, None)
        if gone is not None:
            self._entries -= len(gone.names)
