"""What every registered view must hold, and the content map against plain bytes."""

from __future__ import annotations

import struct
from typing import Any, Final

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from space._errors import CorruptionError
from space._node.history import layout_of
from space.events import types as ev
from space.events.codec import NO_LINK, Entry, encode_batch
from space.projections.content_map import DEPTH_MAX, LAYER, ContentMapView, extents
from space.projections.contract import View, registered_views
from space.projections.feed import fold
from space.statemachine.apply import clone_id
from space.statemachine.store import Applied, Store
from tests.property.strategies import events
from tests.state_support import Batch, MemoryWriter, fold_view

VIEWS: Final = registered_views()
FRAME: Final = struct.Struct("<IIIBBHIIQ")
IDS: Final = [bytes([number]) * 16 for number in range(1, 5)]
SIZE: Final = 64


def frame(length: int, fill: int, position: int) -> bytes:
    """A frame record of ``length`` bytes of ``fill``, which is kept where its hash would be."""
    head = FRAME.pack(length, length, 0, 0, 2, 0, 0, fill, position)
    return head.ljust(32, b"\0") + bytes([fill]) * 16


def batches_of(history: list[ev.Event]) -> list[Batch]:
    """Each event in a batch of its own."""
    return [
        Batch(position, encode_batch([Entry(b"", 0, position, "", ((NO_LINK, event),))]))
        for position, event in enumerate(history, 1)
    ]


@st.composite
def histories(draw: st.DrawFn) -> list[ev.Event]:
    """Events on a few small capsules, as decide would let them happen."""
    history: list[ev.Event] = []
    for _ in range(draw(st.sampled_from([0, 1, 5, 10, 20, 30]))):
        verb = draw(st.sampled_from("wwwwdrcccyyypg"))
        capsule = draw(st.sampled_from(IDS))
        offset = draw(st.integers(0, SIZE - 1))
        length = draw(st.integers(1, SIZE - offset))
        if verb == "w":
            history.append(written(capsule, offset, length, draw(st.integers(0, length - 1)), len(history)))
        elif verb == "d":
            history.append(
                ev.RangeDeallocated(capsule, offset, draw(st.sampled_from([length, 2**63 - 1 - offset])))
            )
        elif verb == "r":
            history.append(ev.CapsuleResized(capsule, offset))
        elif verb == "c":
            copy = draw(st.sampled_from([each for each in IDS if each != capsule]))
            history += [ev.CapsulesPurged(IDS[0], copy), cloned(capsule, copy)]
        elif verb == "y":
            there = draw(st.integers(0, SIZE - length))
            history.append(copied(capsule, offset, length, draw(st.sampled_from(IDS)), there))
        elif verb == "p":
            history.append(ev.CapsulesPurged(IDS[0], capsule))
        else:
            history.append(ev.PayloadReclaimed(IDS[0], struct.pack("<QII", draw(st.integers(1, 30)), 0, 60)))
    return history


def written(capsule: bytes, offset: int, length: int, cut: int, number: int) -> ev.ExtentWritten:
    """A write in one or two frames, each filled with a byte of its own; or a hole now and then."""
    if number % 7 == 6:
        return ev.ExtentWritten(capsule, offset, length, b"")
    fill = number * 2 % 250 + 1
    parts = [(cut, fill), (length - cut, fill + 1)]
    return ev.ExtentWritten(
        capsule, offset, length, b"".join(frame(size, byte, 0) for size, byte in parts if size)
    )


def cloned(source: bytes, copy: bytes) -> ev.CapsuleCloned:
    """A copy of one file as it is."""
    return ev.CapsuleCloned(copy, source, IDS[0], b"x", 0, source, b"")


def copied(capsule: bytes, offset: int, length: int, source: bytes, source_offset: int) -> ev.RangeCopied:
    """A range that gets the bytes of another."""
    return ev.RangeCopied(capsule, offset, length, source, source_offset, NO_LINK)


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
@given(history=histories())
def test_a_view_folds_the_same_whole_and_in_pieces(view: View, history: list[ev.Event]) -> None:
    """Folded whole, split at every point, and one by one: the same rows."""
    batches = batches_of(history)
    whole = MemoryWriter()
    fold_view(view, batches, whole)
    single = MemoryWriter()
    for batch in batches:
        fold_view(view, [batch], single)
    assert single.rows == whole.rows
    for cut in range(len(batches)):
        pieces = MemoryWriter()
        fold_view(view, batches[:cut], pieces)
        fold_view(view, batches[cut:], pieces)
        assert pieces.rows == whole.rows
    assert {table for table, _ in whole.rows} <= set(view.tables)


@attrs.frozen
class Record:
    """A batch as the feed wants it."""

    index: int
    time_ns: int
    metadata: bytes
    chain: bytes = bytes(32)


@given(garbage=st.lists(events, max_size=20), with_state=st.booleans())
def test_events_in_any_order_are_folded_or_refused(
    tmp_path_factory: pytest.TempPathFactory, garbage: list[ev.Event], with_state: bool
) -> None:
    """Decodable events that make no sense together end in CorruptionError at worst, and leave nothing behind."""
    store = Store(tmp_path_factory.mktemp("store"), layout_of(VIEWS))
    records = [Record(batch.position, batch.position, batch.metadata) for batch in batches_of(garbage)]
    try:
        applied = fold(store, VIEWS, records, start=Applied(), with_state=with_state)
    except CorruptionError:
        applied = Applied()
    assert store.applied == applied
    store.close(seal=False)


class Bytes:
    """The content map's model: a byte array a capsule, a map from frame bytes to where they show."""

    def __init__(self) -> None:
        self.content: dict[bytes, bytearray] = {}

    def fold(self, event: Any) -> None:
        """What an event does to the bytes."""
        held = self.content.setdefault(event.capsule, bytearray(SIZE))
        if isinstance(event, ev.ExtentWritten):
            data = b"".join(
                bytes([event.frames[at + 32]]) * FRAME.unpack_from(event.frames, at)[0]
                for at in range(0, len(event.frames), 48)
            )
            held[event.offset : event.offset + event.length] = data or bytes(event.length)
        elif isinstance(event, ev.RangeCopied):
            data = bytes(self.content.get(event.source, bytes(SIZE)))
            start = event.source_offset
            held[event.offset : event.offset + event.length] = data[start : start + event.length]
        elif isinstance(event, ev.RangeDeallocated):
            end = min(event.offset + event.length, SIZE)
            held[event.offset : end] = bytes(end - event.offset)
        elif isinstance(event, ev.CapsuleResized):
            held[event.size :] = bytes(SIZE - event.size)
        elif isinstance(event, ev.CapsuleCloned):
            self.content[event.capsule] = bytearray(self.content.get(event.source, bytes(SIZE)))
        elif isinstance(event, ev.CapsulesPurged):
            self.content.pop(event.purged, None)


def read_back(writer: MemoryWriter, capsule: bytes, offset: int, length: int) -> bytes:
    """Bytes of a range by way of its extents, which must be in order and inside it."""
    found = bytearray(length)
    last = offset
    for extent in extents(writer, capsule, offset, length):
        assert last <= extent.offset < extent.end <= offset + length
        last = extent.end
        plain = b"".join(
            bytes([extent.frames[at + 32]]) * FRAME.unpack_from(extent.frames, at)[0]
            for at in range(0, len(extent.frames), 48)
        )
        data = plain[extent.skip : extent.skip + extent.length]
        assert len(data) == extent.length
        assert extent.skip < FRAME.unpack_from(extent.frames)[0]
        found[extent.offset - offset : extent.end - offset] = data
    return bytes(found)


@given(history=histories(), offset=st.integers(0, SIZE - 1), length=st.integers(1, SIZE))
def test_the_content_map_is_a_byte_array(history: list[ev.Event], offset: int, length: int) -> None:
    """Writes, holes, truncations, clones, copies and purges read back as from plain bytes, any range of them."""
    writer, model = MemoryWriter(), Bytes()
    fold_view(ContentMapView(), batches_of(history), writer)
    for event in history:
        model.fold(event)
    end = min(offset + length, SIZE)
    for capsule in IDS:
        expected = bytes(model.content.get(capsule, bytes(SIZE)))
        assert read_back(writer, capsule, 0, SIZE) == expected
        assert read_back(writer, capsule, offset, end - offset) == expected[offset:end]


@given(history=histories())
def test_purging_everything_leaves_nothing(history: list[ev.Event]) -> None:
    """Layers go with the last capsule that stands on them: no row but the counter outlives its capsules."""
    writer = MemoryWriter()
    everything = [*history, *(ev.CapsulesPurged(IDS[0], capsule) for capsule in IDS)]
    fold_view(ContentMapView(), batches_of(everything), writer)
    assert set(writer.rows) <= {(LAYER, bytes(8))}


def test_a_chain_of_clones_stays_shallow() -> None:
    """Cloned and written again and again, both ways: reads look through DEPTH_MAX layers at most, and are right."""
    history: list[ev.Event] = [ev.ExtentWritten(IDS[0], 0, SIZE, frame(SIZE, 1, 0))]
    source = IDS[0]
    for number in range(4 * DEPTH_MAX):
        copy = clone_id(bytes([9]) * 16, b"", number.to_bytes(16, "big"))
        history.append(cloned(source, copy))
        history.append(ev.ExtentWritten(copy, number % SIZE, 1, frame(1, number % 200 + 2, 0)))
        history.append(ev.ExtentWritten(source, (number + 7) % SIZE, 1, frame(1, number % 200 + 3, 0)))
        source = copy if number % 3 else source
    writer, model = MemoryWriter(), Bytes()
    fold_view(ContentMapView(), batches_of(history), writer)
    for event in history:
        model.fold(event)
    for capsule, content in model.content.items():
        assert read_back(writer, capsule, 0, SIZE) == content
    depths = [struct.unpack("<QII", value)[2] for key, value in writer.scan(LAYER, b"") if key != bytes(8)]
    assert DEPTH_MAX // 2 < max(depths) <= DEPTH_MAX
