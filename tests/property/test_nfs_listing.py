from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from space._node import listing
from space._node.listing import COOKIE_MIN, Windows, cookie_of, window
from space._node.local_vfs import LocalFileSystem
from space._node.store import Store
from space.events.ids import ROOT, CapsuleId
from space.events.types import Kind
from space.projections.vfs import Caller, Listed

CALLER = Caller(0, 0, "test")
NAMES = st.integers(0, 60).map(lambda number: b"name%d" % number)


@given(st.integers(1, 1 << 50), st.binary(min_size=1, max_size=255))
def test_a_cookie_is_a_number_any_client_can_keep(ino: int, name: bytes) -> None:
    """A cookie is none of those with a meaning of their own, and fits a signed 64-bit offset."""
    assert COOKIE_MIN <= cookie_of(ino, name) < 1 << 63


class ListingMachine(RuleBasedStateMachine):
    """Clients list a directory, each in its own pace, while names come, go, move, and the server starts again."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="space-listing-"))
        self.loop = asyncio.new_event_loop()
        self.files: LocalFileSystem
        self.under_way: list[tuple[int, set[tuple[bytes, CapsuleId]], list[Listed]]] = []
        self.entries: dict[bytes, CapsuleId] = {}
        self.patched = pytest.MonkeyPatch()

    @initialize(
        size=st.integers(1, 5),
        together=st.integers(5, 12),
        here=st.sampled_from([0, 1000]),
        bits=st.booleans(),
    )
    def begin(self, size: int, together: int, here: int, bits: bool) -> None:
        """Windows of a few entries, so that a listing needs many; names of one file may share a cookie."""
        self.patched.setattr(listing, "WINDOW_ENTRIES", size)
        self.patched.setattr(listing, "WINDOWS_ENTRIES_MAX", together)
        self.patched.setattr("space._node.local_vfs.LISTED_HERE_MAX", here)
        if bits:
            self.patched.setattr(listing, "_HASH_MASK", 1)
        self.store = Store(self.home / "data", segment_bytes=1 << 20)
        self.files = LocalFileSystem(self.store)

    def teardown(self) -> None:
        try:
            while self.under_way:
                self.turn(0)
        finally:
            self.patched.undo()
            self.store.close()
            self.loop.close()
            shutil.rmtree(self.home)

    # --- the directory ---------------------------------------------------------------------------

    @rule(name=NAMES)
    def create(self, name: bytes) -> None:
        if name not in self.entries:
            made = self.files.create(ROOT, name, Kind.FILE, CALLER, mode=0o644)
            self.entries[name] = self.loop.run_until_complete(made).id

    @rule(old=NAMES, name=NAMES)
    def link(self, old: bytes, name: bytes) -> None:
        if old in self.entries and name not in self.entries:
            self.entries[name] = self.entries[old]
            self.loop.run_until_complete(self.files.link(self.entries[old], ROOT, name, CALLER))

    @rule(name=NAMES)
    def remove(self, name: bytes) -> None:
        if name in self.entries:
            del self.entries[name]
            self.left({name})
            self.loop.run_until_complete(self.files.remove(ROOT, name, CALLER, is_directory=False))

    @rule(old=NAMES, new=NAMES)
    def rename(self, old: bytes, new: bytes) -> None:
        if old in self.entries and self.entries[old] != self.entries.get(new):
            self.entries[new] = self.entries.pop(old)
            self.left({old, new})
            self.loop.run_until_complete(self.files.rename(ROOT, old, ROOT, new, CALLER))

    def left(self, names: set[bytes]) -> None:
        """These were not there all along."""
        for _, there, _ in self.under_way:
            there -= {each for each in there if each[0] in names}

    # --- who lists it ----------------------------------------------------------------------------

    @rule()
    def start_listing(self) -> None:
        if len(self.under_way) < 3:
            self.under_way.append((0, set(self.entries.items()), []))

    @rule(which=st.integers(0, 2), limit=st.integers(1, 4))
    def next_page(self, which: int, limit: int) -> None:
        if which < len(self.under_way):
            self.turn(which, limit)

    @rule()
    def restart(self) -> None:
        self.files = LocalFileSystem(self.store)

    def turn(self, which: int, limit: int = 3) -> bool:
        """Gets a page; at the end of a listing everything that was there all along was in it once."""
        cookie, there, seen = self.under_way[which]
        page = self.loop.run_until_complete(self.files.listing(ROOT, after=cookie, limit=limit))
        cookies = [each.cookie for each in page.listed]
        assert cookies == sorted(cookies)
        assert all(each > cookie for each in cookies)
        assert page.complete or page.listed
        seen += page.listed
        for each in page.listed:
            assert self.entries[each.name] == each.attributes.id
        if not page.complete:
            self.under_way[which] = (cookies[-1], there, seen)
            return False
        names = [(each.name, each.attributes.id) for each in seen]
        assert there <= set(names)
        assert all(names.count(each) == 1 for each in there)
        del self.under_way[which]
        return True


TestListing = ListingMachine.TestCase
TestListing.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_windows_forget_the_oldest() -> None:
    """Windows hold no more entries together than they may, but always the last one made."""
    windows = Windows()
    rows = [(ROOT + b"%06d" % number, ROOT + bytes(8) + b"\1") for number in range(1000)]

    class Rows:
        def scan(self, table: int, prefix: bytes, start: bytes = b"") -> object:
            return iter(rows)

    for number in range(1, 1000):
        directory = CapsuleId(number.to_bytes(16, "big"))
        windows.keep(directory, window(Rows(), directory, 1, 0))  # type: ignore[arg-type]
        assert windows.find(directory, 1, 0) is not None
        assert windows._entries <= listing.WINDOWS_ENTRIES_MAX
    assert windows.find(CapsuleId((1).to_bytes(16, "big")), 1, 0) is None
