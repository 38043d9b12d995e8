from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from space._errors import UnavailableError, UsageError
from space.content.frames import FrameRef, pack_frames
from space.events import commands as cmd
from space.federation import stream as module
from space.federation.portable import Copy, Piece
from space.federation.stream import Begin, Cursor, Note, Outgoing, Streams, begin
from space.federation.translate import Copies, Mark, Part, Step, lane_key
from space.policy.model import DEFAULT_POLICY
from space.projections.content_map import Extent

pytestmark = pytest.mark.unit

HOME, ZONE = b"h" * 16, b"z" * 16


class NoContent:
    """There is nothing to fetch."""

    def stored(self, frame: Any, position: int) -> None:
        """Not asked for."""
        raise AssertionError

    def recut(self, extent: Any, policy: Any, key: int) -> None:
        """Not asked for."""
        raise AssertionError


class Failing(NoContent):
    """Nothing can be fetched now."""

    def stored(self, frame: Any, position: int) -> None:
        """Not now."""
        raise UnavailableError("not now")


class Working(NoContent):
    """All frames are alike."""

    def stored(self, frame: Any, position: int) -> Any:
        """The same bytes for every frame."""
        return b"bytes"


def capsule(number: int) -> bytes:
    """An id."""
    return number.to_bytes(16, "big")


def part(
    position: int, lane: int = 0, writes: Sequence[int] = (), reads: Sequence[int] = (), **keys: Any
) -> Part:
    """A part that resizes what it writes."""
    ids = [capsule(each) for each in writes]
    return Part(
        position,
        position * 10,
        lane,
        [cmd.Resize(each, position) for each in ids],
        ids,
        writes=frozenset(ids),
        reads=frozenset(capsule(each) for each in reads),
        **keys,
    )


def copies(*numbers: int) -> Copies:
    """Copies of capsules of two parts each, which can be gone on with."""

    def made(after: Mark | None) -> Iterator[Step]:
        marks = [(capsule(number), step) for number in numbers for step in (0, 1)]
        start = 0 if after is None else marks.index(after) + 1
        for which, step in marks[start:]:
            yield Step([Copy(which, 5, step, step == 1, (), (0, 0, 0, 0))], (which, step), 77)

    return made


def streams(lanes: dict[int, Cursor] | None = None, position: int = 10, **keys: Any) -> Streams:
    """Streams that have been going on."""
    lanes = {0: Cursor(10), 5: Cursor(10), 9: Cursor(10)} if lanes is None else lanes
    return Streams(HOME, ZONE, 0, lanes, Begin(position), **keys)


def told(outgoing: Outgoing | None) -> tuple[int, list[tuple[int, int]]]:
    """Lane of a shipment, and where each of its entries leads."""
    assert outgoing is not None
    shipment = outgoing.shipment
    return shipment.lane, [(each.through_position, each.through_step) for each in shipment.entries]


def add_unless_full(found: Streams, position: int) -> bool:
    """Reads one more batch if there is room for it; whether there was."""
    if found.full:
        return False
    found.add([part(position, 0, [position])], position, 0)
    return True


def everything(found: Streams, now: float = 0.0) -> list[tuple[int, list[tuple[int, int]]]]:
    """All there is to send, each answered at once."""
    sent = []
    while (outgoing := found.next(NoContent(), now)) is not None:
        sent.append(told(outgoing))
        found.acknowledge(outgoing.shipment.lane, *outgoing.shipment.through)
    return sent


def test_the_highest_lane_goes_first() -> None:
    """What has a higher priority overtakes what was there before it."""
    found = streams()
    found.add([part(11, 0, [1])], 11, 0, quiet=True)
    found.add([part(12, 5, [2])], 12, 0, quiet=True)
    found.add([part(13, 9, [3])], 13, 0, quiet=True)
    assert everything(found) == [(9, [(13, 0)]), (5, [(12, 0)]), (0, [(11, 0)])]


def test_what_touches_the_same_keeps_its_order() -> None:
    """A part waits for what it relies on or writes too, in whatever lane, and for nothing else."""
    found = streams()
    found.add([part(11, 0, [1])], 11, 0, quiet=True)
    found.add([part(12, 0, [2], [7])], 12, 0, quiet=True)
    found.add([part(13, 9, [3])], 13, 0, quiet=True)
    found.add([part(14, 9, [4], [1])], 14, 0, quiet=True)
    found.add([part(15, 9, [7])], 15, 0, quiet=True)
    assert everything(found) == [(9, [(13, 0)]), (0, [(11, 0), (12, 0)]), (9, [(14, 0), (15, 0)])]


def test_a_lane_is_something_to_rely_on() -> None:
    """A part that touches what is still in the first copy of another lane waits for that."""
    found = streams({9: Cursor(10), 0: Cursor(10, 0, Note(10, True, None).encode())})
    first = Part(10, 0, 0, (), copies=copies(1), writes=frozenset([lane_key(0)]), first=True)
    found.add([first], 10, 0, quiet=True)
    free, bound = part(11, 9, [2]), part(12, 9, [3])
    bound = Part(12, 0, 9, bound.commands, reads=frozenset([lane_key(0)]))
    found.add([free], 11, 0, quiet=True)
    found.add([bound], 12, 0, quiet=True)
    assert everything(found) == [(9, [(11, 0)]), (0, [(10, 1), (10, 2), (10, 3)]), (9, [(12, 0)])]


def test_small_batches_share_a_shipment_and_each_is_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries fill a shipment up to its limit, in bytes and in number; none is divided."""
    found = streams()
    for position in range(11, 31):
        found.add([part(position, 0, [position])], position, 0)
    monkeypatch.setattr(module, "ENTRIES_MAX", 8)
    assert told(found.next(NoContent(), 0.0))[1] == [(position, 0) for position in range(11, 19)]
    monkeypatch.setattr(module, "SHIPMENT_BYTES", 1)
    assert told(found.next(NoContent(), 0.0))[1] == [(19, 0)]


def test_a_new_lane_is_opened_before_anything_else_goes_on() -> None:
    """Its cursor comes first, right before its first batch: who begins anew from the cursors misses nothing."""
    found = streams({5: Cursor(10)})
    found.add([part(11, 5, [1])], 11, 0, quiet=True)
    found.add([part(12, 5, [2]), part(12, 0, [3])], 12, 0, quiet=True)
    assert (
        everything(found) == [(5, [(11, 0)]), (0, [(11, 0), (12, 0)]), (5, [(12, 0)])]
        or everything(found) == []
    )
    assert begin({5: Cursor(11), 0: Cursor(11)}) == Begin(11)


def test_all_lanes_are_opened_before_anything_is_copied() -> None:
    """The first copy begins with a cursor for each lane, and each says that it is under way."""
    found = Streams(HOME, ZONE, 0, {}, Begin(7, copying=True))
    parts = [
        Part(
            7,
            70,
            lane,
            (),
            copies=copies(lane),
            writes=frozenset([lane_key(lane)]),
            first=True,
            alone=lane == 9,
        )
        for lane in (9, 0)
    ]
    found.add(parts, 7, 70)
    outgoing = [found.next(NoContent(), 0.0) for _ in range(2)]
    assert [told(each) for each in outgoing] == [(9, [(7, 0)]), (0, [(7, 0)])]
    notes = [Note.decode(each.shipment.entries[0].resume) for each in outgoing if each]
    assert notes == [Note(7, True, None)] * 2
    rest = [told(found.next(NoContent(), 0.0)) for _ in range(2)]
    assert rest == [(9, [(7, 1), (7, 2), (7, 3)]), (0, [(7, 1), (7, 2), (7, 3)])]


@pytest.mark.parametrize("reached", [1, 2, 3])
def test_copies_go_on_behind_the_last_part_that_came(reached: int) -> None:
    """From the note in a cursor the copies go on, none twice, none left out, and the batch itself not again."""
    batch = Part(11, 110, 0, [cmd.Resize(capsule(9), 1)], [capsule(9)], copies=copies(1, 2))
    whole = streams()
    whole.add([batch], 11, 0)
    outgoing = whole.next(NoContent(), 0.0)
    assert outgoing is not None
    entries = outgoing.shipment.entries
    assert [entry.time_ns for entry in entries] == [110, 77, 77, 77, 77]
    cursor = Cursor(11, reached, entries[reached].resume)
    assert begin({0: cursor}) == Begin(10)
    again = streams({0: cursor})
    again.add([batch], 11, 0)
    rest = again.next(NoContent(), 0.0)
    assert rest is not None
    assert tuple(rest.shipment.entries) == tuple(entries[reached + 1 :])
    assert {which for which, _ in rest.capsules} <= {capsule(1), capsule(2)}


def test_where_to_begin() -> None:
    """Reading begins at the least cursor, before what is under way there, or with a first copy where there is none."""
    beside = Note(20, False, (capsule(1), 0)).encode()
    first = Note(7, True, None).encode()
    assert begin({}) is None
    assert begin({}, origin=30) == Begin(30)
    assert begin({0: Cursor(20), 5: Cursor(25)}) == Begin(20)
    assert begin({0: Cursor(20, 3, beside), 5: Cursor(25)}) == Begin(19)
    assert begin({0: Cursor(7, 2, first), 5: Cursor(25)}) == Begin(7, copying=True)


@pytest.mark.parametrize("note", [b"\xc1", b"x", b"\x94\x01\x02\x03\x04", b"\x91\x01"])
def test_a_note_of_somebody_else_is_refused(note: bytes) -> None:
    """A cursor that holds what this program did not write is an error with a reason."""
    with pytest.raises(UsageError, match="did not leave"):
        begin({0: Cursor(5, 1, note)})


def test_what_means_nothing_is_passed_now_and_then() -> None:
    """The cursor moves over batches that mean nothing to a lane: after a while, or when there are many."""
    found = streams({0: Cursor(10)})
    for position in range(11, 21):
        found.add([], position, position)
    assert everything(found, now=0.0) == [(0, [(20, 0)])]
    found.add([], 21, 0)
    assert found.next(NoContent(), 1.0) is None
    assert everything(found, now=100.0) == [(0, [(21, 0)])]
    found.add([], 22, 0, quiet=True)
    assert found.next(NoContent(), 1000.0) is None
    for position in range(23, 23 + module.PASSED_MAX):
        found.add([], position, 0, quiet=True)
    assert len(everything(found, now=1000.0)) == 1


def test_nothing_is_read_when_much_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is bounded, and what was confirmed makes room again."""
    monkeypatch.setattr(module, "WINDOW", 10)
    found = streams({0: Cursor(10)})
    read = [position for position in range(11, 31) if add_unless_full(found, position)]
    assert 11 < len(read) + 10 < 20
    everything(found)
    assert add_unless_full(found, 31)
    assert found.confirmed(0) == read[-1]


def test_after_a_break_it_goes_on_where_the_receiver_is() -> None:
    """What was not confirmed comes again from the receiver's cursor on; else it has to be read anew."""
    found = streams({0: Cursor(10)})
    for position in range(11, 15):
        found.add([part(position, 0, [position])], position, 0)
    sent = found.next(NoContent(), 0.0)
    assert told(sent) == (0, [(11, 0), (12, 0), (13, 0), (14, 0)])
    assert not found.reconnected({0: Cursor(12)})
    assert not found.reconnected({0: Cursor(10), 7: Cursor(3)})
    assert found.reconnected({0: Cursor(10)})
    assert told(found.next(NoContent(), 0.0)) == told(sent)
    assert found.reconnected({0: Cursor(14)})
    assert found.next(NoContent(), 0.0) is None


def test_an_answer_about_something_else_is_refused() -> None:
    """A zone that says it has come to where it was not sent is not believed."""
    found = streams({0: Cursor(10)})
    found.add([part(11, 0, [1])], 11, 0)
    with pytest.raises(UsageError, match="not as it was sent"):
        found.acknowledge(0, 11, 0)
    found.next(NoContent(), 0.0)
    for lane, position, step in ((0, 12, 0), (0, 11, 1), (1, 11, 0)):
        with pytest.raises(UsageError, match="not as it was sent"):
            found.acknowledge(lane, position, step)
    found.acknowledge(0, 11, 0)


def test_what_cannot_be_fetched_is_not_sent() -> None:
    """When stored bytes cannot be had now, nothing counts as sent, and the next attempt begins at the same place."""
    frames = pack_frames([FrameRef(5, 5, 0, 0, 0, 0, 0, 0, 0, b"h" * 16)])
    piece = Piece(capsule(1), Extent(0, 5, 3, 0, frames), DEFAULT_POLICY, 0)
    found = streams({0: Cursor(10)})
    found.add([part(11, 0, [2])], 11, 0)
    found.add([Part(12, 0, 0, [piece], [capsule(1)])], 12, 0)
    with pytest.raises(UnavailableError):
        found.next(Failing(), 0.0)
    assert found.in_flight == 0
    assert told(found.next(Working(), 0.0)) == (0, [(11, 0), (12, 0)])


def test_what_went_is_told_with_when_and_what_was_taken_back() -> None:
    """A record of a shipment names each capsule with its position, and what is withdrawn unless it came back since."""
    found = streams({0: Cursor(10)})
    found.add([part(11, 0, [1, 2])], 11, 0)
    gone = Part(12, 0, 0, [cmd.WithdrawCapsule(capsule(1))], [capsule(1)], [capsule(1)])
    found.add([gone], 12, 0)
    found.add([part(13, 0, [2])], 13, 0)
    outgoing = found.next(NoContent(), 0.0)
    assert outgoing is not None
    assert outgoing.capsules == [(capsule(1), 11), (capsule(2), 11), (capsule(2), 13)]
    assert outgoing.withdrawn == [capsule(1)]
    found.add([gone], 14, 0)
    found.add([Part(14, 0, 0, gone.commands, gone.capsules, gone.withdrawn)], 14, 0)
    found.add([part(15, 0, [1])], 15, 0)
    outgoing = found.next(NoContent(), 0.0)
    assert outgoing is not None
    assert outgoing.withdrawn == []
