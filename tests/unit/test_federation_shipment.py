from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import attrs
import msgpack
import pytest
from blake3 import blake3

from space._errors import CorruptionError, SpaceError, UsageError
from space.events import commands as cmd
from space.events.commands import StoredFrame
from space.federation import shipment as module
from space.federation.shipment import (
    HASH_BYTES,
    HEADER_BYTES,
    Entry,
    Shipment,
    decode_shipment,
    encode_shipment,
)

pytestmark = pytest.mark.unit

GOLDEN: Final = Path(__file__).parents[1] / "golden" / "shipment_v1.hex"
A, B, HOME, ZONE = (bytes([number]) * 16 for number in (1, 2, 7, 8))
STORED: Final = b"stored once, named twice"
SAMPLE: Final = Shipment(
    HOME,
    ZONE,
    1,
    9,
    2,
    40,
    0,
    (
        Entry(
            41,
            0,
            1_700_000_000_000_000_000,
            (
                cmd.WriteExtent(A, 0, 48, [StoredFrame(b"r" * 48, STORED), StoredFrame(b"q" * 48, STORED)]),
                cmd.PlaceCapsule(A, [(B, b"name")], [(B, b"before")]),
            ),
            b"note",
        ),
        Entry(
            41,
            1,
            -5,
            (
                cmd.Copied(
                    B,
                    41,
                    0,
                    True,
                    [cmd.WriteExtent(B, 0, 1, [StoredFrame(b"s" * 48, b"x"), StoredFrame(b"z" * 48, None)])],
                    (1, 2, 3, -4),
                ),
            ),
        ),
        Entry(50, 0, 6, ()),
    ),
)


def plain(shipment: Shipment) -> Any:
    """A shipment with buffers and sequences of whatever kind made comparable."""

    def of(value: Any) -> Any:
        if attrs.has(type(value)):
            return (type(value).__name__, *(of(getattr(value, f.name)) for f in attrs.fields(type(value))))
        if isinstance(value, memoryview | bytearray):
            return bytes(value)
        if isinstance(value, StoredFrame):
            return (value.record, None if value.stored is None else bytes(value.stored))
        if isinstance(value, list | tuple):
            return tuple(of(each) for each in value)
        return value

    return of(shipment)


def sealed(body: bytes) -> bytes:
    """A body with the hash that belongs to it."""
    return body + blake3(body).digest()


def changed(change: Callable[[bytearray], None]) -> bytes:
    """The sample with something else in it, and the right hash."""
    body = bytearray(encode_shipment(SAMPLE)[:-HASH_BYTES])
    change(body)
    return sealed(bytes(body))


def with_document(document: Any) -> bytes:
    """The sample's header around another document, without frames."""
    packed = document if isinstance(document, bytes) else msgpack.packb(document)
    body = bytearray(encode_shipment(attrs.evolve(SAMPLE, entries=(Entry(50, 0, 6, ()),))))
    del body[HEADER_BYTES:]
    struct.pack_into("<I", body, 92, len(packed))
    return sealed(bytes(body) + packed)


def test_it_comes_out_as_it_went_in() -> None:
    """Everything of a shipment comes through, frames included."""
    assert plain(decode_shipment(encode_shipment(SAMPLE))) == plain(SAMPLE)


def test_bytes_of_version_1_stay_what_they_are() -> None:
    """What was written once is written the same, and can be read."""
    stored = bytes.fromhex(GOLDEN.read_text())
    assert encode_shipment(SAMPLE) == stored
    assert plain(decode_shipment(stored)) == plain(SAMPLE)


def test_equal_frames_travel_once() -> None:
    """A buffer named by several frames is in the bytes once."""
    assert encode_shipment(SAMPLE).count(STORED) == 1


def test_the_commands_follow_each_other() -> None:
    """Each entry becomes a command that begins where the one before it ended."""
    found = decode_shipment(encode_shipment(SAMPLE)).received()
    steps = [(c.from_position, c.from_step, c.through_position, c.through_step) for c in found]
    assert steps == [(40, 0, 41, 0), (41, 0, 41, 1), (41, 1, 50, 0)]
    assert {(c.zone, c.shard, c.lane, c.epoch) for c in found} == {(HOME, 1, 9, 2)}
    assert [c.resume for c in found] == [b"note", b"", b""]
    assert [c.time_ns for c in found] == [1_700_000_000_000_000_000, -5, 6]


def test_every_flipped_bit_is_refused() -> None:
    """No bit of a shipment can be another on the way."""
    whole = encode_shipment(SAMPLE)
    for bit in range(8 * len(whole)):
        body = bytearray(whole)
        body[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SpaceError):
            decode_shipment(bytes(body))


def test_every_cut_is_refused() -> None:
    """A shipment that ends anywhere but at its end is refused, and so is one that goes on."""
    whole = encode_shipment(SAMPLE)
    for length in range(len(whole)):
        with pytest.raises(CorruptionError):
            decode_shipment(whole[:length])
    with pytest.raises(CorruptionError):
        decode_shipment(whole + b"\0")


def test_another_version_says_so() -> None:
    """A shipment of a newer program is refused with what to do about it."""
    with pytest.raises(UsageError, match=r"format 2\.0, this program knows 1\.0 \(upgrade"):
        decode_shipment(changed(lambda body: struct.pack_into("<H", body, 8, 2)))


@pytest.mark.parametrize(
    "offset, layout, value",
    [
        (88, "<I", 9),  # frames: more than are named
        (84, "<I", 2),  # attachments
        (80, "<I", 4),  # entries
        (80, "<I", 0),
        (80, "<I", 0xFFFFFFFF),
        (92, "<I", 0xFFFFFFFF),  # document
        (96, "<Q", 1 << 63),  # frames' bytes
        (68, "<Q", 51),  # through
        (76, "<I", 1),
        (56, "<Q", 41),  # from
        (56, "<Q", 1 << 63),
    ],
)
def test_a_header_that_does_not_fit_is_refused(offset: int, layout: str, value: int) -> None:
    """A count, length or position that is not that of what follows is refused, also with the right hash."""
    with pytest.raises(SpaceError):
        decode_shipment(changed(lambda body: struct.pack_into(layout, body, offset, value)))


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 5000,
        None,
        {},
        [],
        [[]],
        [[50, 0, 6, b"", 0, []], [51, 0, 6, b"", 0, []]],
        [[50, 0, 6, b"", 0]],
        [[-1, 0, 6, b"", 0, []]],
        [[50, -1, 6, b"", 0, []]],
        [[50, 0, 6, b"r" * 257, 0, []]],
        [[50, 0, 6, "", 0, []]],
        [[50, 0, 6, b"", 1, [["WriteExtent", [A, 0, 1, [[b"r" * 48, 0]], None]]]]],
        [[50, 0, 6, b"", 0, [["Nonsense", []]]]],
        [[50, 0, 6, b"", 0, [["Resize", [A]]]]],
        [[50, 0, 6, b"", 0, [["Resize", [A, "5"]]]]],
        [[50, 0, 6, b"", 0, {}]],
        [[50, 0, 1 << 63, b"", 0, []]],
    ],
)
def test_a_document_that_is_none_is_refused(document: Any) -> None:
    """What says something no shipment says is an error with a reason, and nothing else."""
    with pytest.raises(UsageError):
        decode_shipment(with_document(document))


def test_the_empty_entry_is_a_document() -> None:
    """The frame the tests above change is good by itself."""
    assert decode_shipment(with_document([[50, 0, 6, b"", 0, []]])).through == (50, 0)


@pytest.mark.parametrize(
    "entries",
    [
        (Entry(40, 0, 0, ()),),
        (Entry(39, 0, 0, ()),),
        (Entry(40, 2, 0, ()),),
        (Entry(41, 1, 0, ()),),
        (Entry(41, 0, 0, ()), Entry(41, 0, 0, ())),
    ],
)
def test_a_cursor_never_goes_back_or_leaps(entries: tuple[Entry, ...]) -> None:
    """Entries that do not each lead to the next step, or to a later position, are refused."""
    with pytest.raises(UsageError, match="do not follow each other"):
        decode_shipment(encode_shipment(attrs.evolve(SAMPLE, entries=entries)))


def test_frames_nobody_names_are_refused() -> None:
    """Attachments no entry claims are refused, so nothing can be hidden in a shipment."""
    whole = encode_shipment(SAMPLE)
    size = struct.unpack_from("<I", whole, 92)[0]
    rows = msgpack.unpackb(whole[HEADER_BYTES : HEADER_BYTES + size])
    rows[1][4] = 0
    rows[1][5] = []
    packed = msgpack.packb(rows)
    body = bytearray(whole[:HEADER_BYTES] + packed + whole[HEADER_BYTES + size : -HASH_BYTES])
    struct.pack_into("<I", body, 92, len(packed))
    with pytest.raises(UsageError, match="no entry has"):
        decode_shipment(sealed(bytes(body)))


def test_what_no_receiver_takes_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shipment over the limits is refused where it is made, and where it comes."""
    whole = encode_shipment(SAMPLE)
    monkeypatch.setattr(module, "SHIPMENT_BYTES_MAX", len(whole) - 1)
    with pytest.raises(UsageError):
        encode_shipment(SAMPLE)
    with pytest.raises(CorruptionError):
        decode_shipment(whole)
