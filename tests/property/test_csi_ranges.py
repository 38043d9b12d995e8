"""Ranges of block snapshots, against the bytes themselves."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from space._node import csi_ranges
from space._node.store import Store
from space.events import commands as cmd
from space.events.types import Kind

pytestmark = [pytest.mark.property]

BLOCK = 4096
BLOCKS = 96
WRITES = st.lists(
    st.tuples(
        st.sampled_from(["write", "same", "hole", "copy"]),
        st.integers(0, BLOCKS - 1),
        st.integers(1, 24),
        st.integers(0, BLOCKS - 1),
    ),
    max_size=12,
)


def act(
    store: Store, capsule: bytes, model: bytearray, work: list[tuple[str, int, int, int]], seed: int
) -> None:
    """Changes a device and its model alike."""
    for number, (what, block, count, source) in enumerate(work):
        at, length = block * BLOCK, min(count, BLOCKS - block) * BLOCK
        if what == "hole":
            store.execute(cmd.Deallocate(capsule, at, length))
            model[at : at + length] = bytes(length)
        elif what == "copy":
            length = min(length, (BLOCKS - source) * BLOCK)
            store.execute(cmd.CopyRange(capsule, at, capsule, source * BLOCK, length))
            model[at : at + length] = model[source * BLOCK : source * BLOCK + length]
        else:
            byte = 1 + (0 if what == "same" else seed + number) % 200
            store.write(capsule, at, bytes([byte]) * length)  # type: ignore[arg-type]
            model[at : at + length] = bytes([byte]) * length


@settings(max_examples=60)
@given(WRITES, WRITES, st.integers(0, BLOCKS * BLOCK))
def test_ranges_cover_what_there_is_and_what_changed(
    first: list[tuple[str, int, int, int]], second: list[tuple[str, int, int, int]], offset: int
) -> None:
    """Outside of allocated ranges all is zero; outside of changed ones both are the same; ranges are in order and begin
    where they were asked to.
    """
    with tempfile.TemporaryDirectory() as home, Store(Path(home) / "data") as store:
        capsule = store.create(Kind.FILE, size=BLOCKS * BLOCK, block_size=BLOCK)
        model = bytearray(BLOCKS * BLOCK)
        act(store, capsule, model, first, 10)
        before, old = store.clone(capsule, "/before"), bytes(model)
        act(store, capsule, model, second, 100)
        after, new = store.clone(capsule, "/after"), bytes(model)
        held = all_of(lambda at: csi_ranges.allocated(store, after, at), offset)
        changed = all_of(lambda at: csi_ranges.changed(store, before, after, at), offset)
        assert outside(new, held, offset) == bytes(len(outside(new, held, offset)))
        assert outside(new, changed, offset) == outside(old, changed, offset)
        if not second:
            assert changed == []


def all_of(page: object, offset: int) -> list[tuple[int, int]]:
    """All ranges, page after page, checked for order."""
    found: list[tuple[int, int]] = []
    at: int | None = offset
    while at is not None:
        document = page(at)  # type: ignore[operator]
        found += [(start, length) for start, length in document["ranges"]]
        at = document["next"]
    assert all(length > 0 for _, length in found)
    assert all(one + length <= other for (one, length), (other, _) in itertools.pairwise(found))
    assert not found or found[0][0] >= offset
    return found


def outside(data: bytes, ranges: list[tuple[int, int]], offset: int) -> bytes:
    """The bytes from an offset on that are in none of the ranges."""
    kept = bytearray(data[offset:])
    for start, length in reversed(ranges):
        del kept[start - offset : start - offset + length]
    return bytes(kept)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_pages_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """However few ranges or frames a page may have, all pages together are what one would be."""
    with Store(tmp_path / "data") as store:
        capsule = store.create(Kind.FILE, size=1 << 30, block_size=BLOCK)
        before = store.clone(capsule, "/before")
        wanted = [(at << 20, BLOCK) for at in (0, 3, 100, 500, 1023)]
        for at, length in wanted:
            store.write(capsule, at, b"x" * length)
        monkeypatch.setattr(csi_ranges, "RANGES_MAX", limit)
        monkeypatch.setattr(csi_ranges, "FRAMES_MAX", limit)
        assert all_of(lambda at: csi_ranges.allocated(store, capsule, at), 0) == wanted
        assert all_of(lambda at: csi_ranges.changed(store, before, capsule, at), 0) == wanted
