"""Bytes of events: golden for every type and version, and nothing but EventDecodeError from anything else."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any, Final

import msgpack
import pytest

from space._errors import EventDecodeError, UsageError
from space.events import types as ev
from space.events.codec import (
    METADATA_BYTES_MAX,
    Entry,
    chain_link,
    decode_batch,
    decode_event,
    encode_batch,
    encode_event,
)
from space.events.registry import BY_CLASS, BY_NUMBER

GOLDEN: Final = Path(__file__).parents[1] / "golden" / "events_v1.txt"
ONE, TWO, THREE, FOUR = (bytes([number]) * 16 for number in (1, 2, 3, 4))
LINK: Final = bytes(range(16))

SAMPLES: Final[dict[str, ev.Event]] = {
    "1.1": ev.StoreInitialised(ONE, TWO, 0o755, 1000, 2**32 - 1),
    "2.2": ev.CapsuleCreated(ONE, 1, 0o644, 1, 2, 3, 2**63 - 1, 4096, 5, 6, b"target"),
    "3.1": ev.NameLinked(ONE, TWO, "é".encode()),
    "4.1": ev.NameUnlinked(ONE, TWO, b"name"),
    "5.1": ev.CapsuleRenamed(ONE, TWO, b"old", THREE, b"new", b""),
    "6.1": ev.NamesExchanged(ONE, TWO, b"one", THREE, FOUR, b"other"),
    "7.1": ev.ExtentWritten(ONE, 4096, 100, bytes(range(48))),
    "8.1": ev.RangeDeallocated(ONE, 0, 2**63 - 1),
    "9.1": ev.CapsuleResized(ONE, 7),
    "10.1": ev.AttributesChanged(ONE, 0o600, None, 0, -1, 2**63 - 1),
    "11.1": ev.XattrSet(ONE, b"user.x", b"value"),
    "12.1": ev.XattrRemoved(ONE, b"user.x"),
    "13.1": ev.PolicyDefined(ONE, 1, b"\x80"),
    "14.1": ev.PolicyChanged(ONE, 0),
    "15.1": ev.KeyCreated(ONE, 1, 2, b"wrapped"),
    "16.1": ev.SnapshotTaken(ONE, "début"),
    "17.1": ev.SnapshotDropped(ONE, "s"),
    "18.1": ev.CapsuleCloned(ONE, TWO, THREE, b"clone", 9, TWO, b""),
    "19.1": ev.CapsuleUndeleted(ONE, TWO, b"back"),
    "20.1": ev.PayloadReclaimed(ONE, bytes(16)),
    "21.1": ev.CapsulesPurged(ONE, TWO),
    "22.1": ev.CapsuleDeleted(ONE),
    "24.1": ev.RepliesForgotten(ONE, TWO),
    "23.1": ev.MembershipChanged(ONE, b"change", b"members"),
    "25.1": ev.RangeCopied(ONE, 4096, 2**28, TWO, 0, LINK),
    "28.1": ev.RegistrantsChanged(ONE, 7, TWO + b"\1" + bytes(7), THREE, THREE + b"\1"),
    "30.1": ev.NfsClientRecorded(ONE, "space:a", b"client", b"verifier"),
    "31.1": ev.NfsClientForgotten(ONE, "space:a", b"client"),
    "32.1": ev.NfsServerStarted(ONE, "space:a", 3),
    "33.1": ev.KeysRewrapped(ONE, 4, ev.REWRAPPED.pack(5, 1, bytes(range(ev.TAGGED_BYTES)))),
    "34.1": ev.MasterKeyChanged(ONE, 2**63 - 1, 0),
    "35.1": ev.KeyDestroyed(ONE, 5),
    "50.1": ev.ZoneDefined(ONE, TWO, "paris", 1, "https://a:1", b"pem", b"sealing"),
    "51.1": ev.ZoneAdded(ONE, TWO, "berlin", 3, "https://b:1", b"pem", b"sealing"),
    "52.1": ev.ZoneChanged(ONE, TWO, 2, "https://b:2", b"pems", b"sealing"),
    "53.1": ev.ZoneRemoved(ONE, TWO),
    "54.1": ev.ShipmentReceived(ONE, TWO, 1, 100, 7, 2**63 - 1, 3, b"note", THREE + FOUR),
    "55.1": ev.CapsuleHomed(ONE, TWO, 7, 6, 5, 1, None, -1, 2**63 - 1),
    "56.1": ev.CapsuleWithdrawn(ONE, TWO, 7),
    "57.1": ev.ShipmentSent(ONE, TWO, 1, 100, 7, 9, 3, THREE + b"\x09" + bytes(7), 4096, FOUR),
    "58.1": ev.PolicyRefused(ONE, "view", "nfs", "sovereignty: local"),
    "59.1": ev.RpoBroken(ONE, TWO, 1, 100, 7, 10**9),
    "60.1": ev.RpoKept(ONE, TWO, 1, 100, 9, 0),
    "61.1": ev.ZonePromoted(ONE, TWO, 1, bytes(16)),
    "62.1": ev.HomeLost(ONE, TWO, 1, 9, bytes(16)),
    "63.1": ev.ActionTaken(ONE, "Federate", "paris", "federation.targets: paris"),
    "64.1": ev.HomeGiven(ONE, TWO),
    "65.1": ev.HomeTaken(ONE, TWO, 2**63 - 1),
    "66.1": ev.HomesDeclined(ONE, TWO, 9),
    "67.1": ev.HeirFollowed(ONE, TWO, THREE, 1, 9),
    "29.1": ev.ReservationChanged(ONE, 3, TWO, b""),
    "27.1": ev.CommandRefused(ONE, TWO, 7, "EXISTS", "it exists"),
    "26.1": ev.NamespaceAssigned(ONE, "nqn.2014-08.org.nvmexpress:uuid:x", TWO, 1),
}
READ_AS: Final = {"2.1": ev.CapsuleCreated(ONE, 1, 0o644, 1, 2, 3, 2**63 - 1, 4096, 5, 0, b"target")}


def golden() -> dict[str, bytes]:
    """Number and version → bytes; the batch has a line of its own."""
    lines = [line.split() for line in GOLDEN.read_text().splitlines() if line and not line.startswith("#")]
    return {words[0]: bytes.fromhex(words[-1]) for words in lines}


def test_every_event_has_golden_bytes() -> None:
    """Each type at its current version has a line in the file, and encodes to exactly that."""
    assert set(SAMPLES) == {f"{schema.number}.{schema.version}" for schema in BY_NUMBER.values()}
    stored = golden()
    assert set(stored) == {*SAMPLES, *READ_AS, "batch"}
    for key, event in SAMPLES.items():
        assert encode_event(event).hex() == stored[key].hex(), key


def test_every_version_ever_written_is_read() -> None:
    """Golden bytes, the oldest too, decode to the event they stand for; older ones are upcast."""
    stored = golden()
    for key, event in {**SAMPLES, **READ_AS}.items():
        assert decode_event(stored[key]) == event, key


def batch_of(row: list[Any]) -> bytes:
    """A batch with one entry that holds one event row."""
    return bytes(msgpack.packb([1, [[b"", 0, 0, "", [row]]]]))


@pytest.mark.parametrize("key", [*SAMPLES, *READ_AS])
def test_every_version_ever_written_is_read_in_a_batch(key: str) -> None:
    """Rows of a batch, the oldest versions too, decode with their link to the event they stand for."""
    number, version, *fields = msgpack.unpackb(golden()[key])
    (entry,) = decode_batch(batch_of([number, version, LINK, *fields]))
    assert entry.events == ((LINK, {**SAMPLES, **READ_AS}[key]),)


@pytest.mark.parametrize(
    "row",
    [
        [22],
        [22, 1],
        [22, 1, LINK],
        [22, 1, LINK[:-1], ONE],
        [22, 1, ONE, LINK, 0],
        [22, 2, LINK, ONE],
        [22, 0, LINK, ONE],
        [22, "1", LINK, ONE],
        [2, 1, LINK, ONE],
        [6, 1, LINK, ONE, TWO, b"", THREE, FOUR, b"other"],
        [99, 1, LINK, ONE],
        ["22", 1, LINK, ONE],
        [[22], 1, LINK, ONE],
        [],
        22,
        None,
    ],
    ids=str,
)
def test_a_malformed_row_in_a_batch_is_one_error(row: Any) -> None:
    """A row without link, of a wrong length, of the future or of no known event raises EventDecodeError."""
    with pytest.raises(EventDecodeError):
        decode_batch(batch_of(row))


def test_a_batch_has_golden_bytes() -> None:
    """The metadata of a batch is laid out as documented, an old event in it upcast."""
    entry = Entry(
        ONE, 7, 1_700_000_000_000_000_000, "uid:0", ((LINK, SAMPLES["3.1"]), (LINK, SAMPLES["22.1"]))
    )
    plain = Entry(b"", 0, 0, "", ((LINK, SAMPLES["2.2"]),))
    assert encode_batch([entry, plain]).hex() == golden()["batch"].hex()
    assert decode_batch(golden()["batch"]) == [entry, plain]


def test_numbers_are_frozen() -> None:
    """A number on disk stands for one event for ever."""
    assert {number: schema.cls.__name__ for number, schema in BY_NUMBER.items()} == {
        1: "StoreInitialised",
        2: "CapsuleCreated",
        3: "NameLinked",
        4: "NameUnlinked",
        5: "CapsuleRenamed",
        6: "NamesExchanged",
        7: "ExtentWritten",
        8: "RangeDeallocated",
        9: "CapsuleResized",
        10: "AttributesChanged",
        11: "XattrSet",
        12: "XattrRemoved",
        13: "PolicyDefined",
        14: "PolicyChanged",
        15: "KeyCreated",
        16: "SnapshotTaken",
        17: "SnapshotDropped",
        18: "CapsuleCloned",
        19: "CapsuleUndeleted",
        20: "PayloadReclaimed",
        21: "CapsulesPurged",
        22: "CapsuleDeleted",
        23: "MembershipChanged",
        24: "RepliesForgotten",
        25: "RangeCopied",
        28: "RegistrantsChanged",
        29: "ReservationChanged",
        30: "NfsClientRecorded",
        31: "NfsClientForgotten",
        32: "NfsServerStarted",
        33: "KeysRewrapped",
        34: "MasterKeyChanged",
        35: "KeyDestroyed",
        50: "ZoneDefined",
        51: "ZoneAdded",
        52: "ZoneChanged",
        53: "ZoneRemoved",
        54: "ShipmentReceived",
        55: "CapsuleHomed",
        56: "CapsuleWithdrawn",
        57: "ShipmentSent",
        58: "PolicyRefused",
        59: "RpoBroken",
        60: "RpoKept",
        61: "ZonePromoted",
        62: "HomeLost",
        63: "ActionTaken",
        64: "HomeGiven",
        65: "HomeTaken",
        66: "HomesDeclined",
        67: "HeirFollowed",
        27: "CommandRefused",
        26: "NamespaceAssigned",
    }


def test_the_chain_covers_link_and_event() -> None:
    """The link changes with the link before it and with any byte of the event."""
    encoded = encode_event(SAMPLES["9.1"])
    link = chain_link(LINK, encoded)
    assert len(link) == 16
    assert len({link, chain_link(bytes(16), encoded), chain_link(LINK, encoded + b"\0")}) == 3


UNFIT: Final[dict[str, ev.Event]] = {
    "short id": ev.CapsuleDeleted(b"short"),
    "text for an id": ev.CapsuleDeleted("0123456789abcdef"),  # type: ignore[arg-type]
    "negative": ev.CapsuleResized(ONE, -1),
    "64 bits": ev.CapsuleResized(ONE, 1 << 63),
    "boolean": ev.PolicyChanged(ONE, True),
    "33 bits": ev.PolicyChanged(ONE, 1 << 32),
    "no name": ev.NameLinked(ONE, TWO, b""),
    "long name": ev.NameLinked(ONE, TWO, bytes(256)),
    "long value": ev.XattrSet(ONE, b"x", bytes(65_537)),
    "surrogate": ev.SnapshotTaken(ONE, "\ud800"),
    "absurd time": ev.AttributesChanged(ONE, None, None, None, 1 << 63, None),
}


@pytest.mark.parametrize("event", UNFIT.values(), ids=UNFIT.keys())
def test_a_value_out_of_range_is_not_encoded(event: ev.Event) -> None:
    """What could not be decoded again is refused when it is encoded."""
    with pytest.raises(UsageError):
        encode_event(event)


GARBAGE: Final[dict[str, bytes]] = {
    "nothing": b"",
    "zero": b"\0",
    "an empty array": b"\x90",
    "an unknown number": b"\x93\xcd\x03\xe8\x01\xc4\x10" + ONE,
    "version 0": b"\x93\x16\x00\xc4\x10" + ONE,
    "a version of the future": b"\x93\x16\x02\xc4\x10" + ONE,
    "a version that is text": b"\x93\x16\xa11\xc4\x10" + ONE,
    "something after it": encode_event(SAMPLES["22.1"]) + b"\0",
    "a map": b"\x81\x01\x02",
    "an extension": b"\xd4\x01\x00",
    "a timestamp": b"\xd6\xff\x00\x00\x00\x00",
    "text that is no UTF-8": b"\x94\x10\x01\xc4\x10" + ONE + b"\xa1\xff",
    "a float for a number": b"\x93\xcb\x40\x36\x00\x00\x00\x00\x00\x00\x01\xc4\x10" + ONE,
    "a reserved byte": b"\xc1",
    "arrays without end": b"\x91" * 100_000,
    "a huge array": b"\xdd\xff\xff\xff\xff",
    "huge bytes": b"\xc6\xff\xff\xff\xff",
    "huge text": b"\xdb\xff\xff\xff\xff",
    "huge arrays in each other": b"\xdd\x00\x01\xff\xff" * 1000,
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
@pytest.mark.parametrize("decode", [decode_event, decode_batch])
def test_garbage_is_one_error(decode: Any, data: bytes) -> None:
    """Anything but an event raises EventDecodeError, whatever lengths and depths it claims, in little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(EventDecodeError):
            decode(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


def test_a_batch_beyond_the_limit_is_refused_both_ways() -> None:
    """Nobody writes, and nobody reads, more than METADATA_BYTES_MAX."""
    big = ev.CapsuleCloned(ONE, TWO, THREE, b"x", 1, b"", bytes(32 << 20))
    with pytest.raises(UsageError):
        encode_batch([Entry(b"", 0, 0, "", ((LINK, big),) * 2)])
    with pytest.raises(EventDecodeError):
        decode_batch(bytes(METADATA_BYTES_MAX + 1))


def test_every_class_is_registered_once() -> None:
    """Class and number lead to each other."""
    assert {schema.number for schema in BY_CLASS.values()} == set(BY_NUMBER)
