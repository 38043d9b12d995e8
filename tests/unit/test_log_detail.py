"""Events as users see them: every field as plain data, ids as UUIDs."""

from __future__ import annotations

import json

import pytest

from space._node.maintenance import _concerns, detail_of
from space.events import types as ev
from space.events.ids import CapsuleId
from tests.unit.test_events_codec import FOUR, ONE, SAMPLES, THREE, TWO

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("key", [key for key in SAMPLES if key != "13.1"])
def test_every_event_is_shown(key: str) -> None:
    """Whatever an event holds, its fields come out as JSON can hold them."""
    assert json.loads(json.dumps(detail_of(SAMPLES[key]))) == detail_of(SAMPLES[key])


def test_what_zones_exchange_is_readable() -> None:
    """Zones and capsules are UUIDs, kinds have names, packed lists are taken apart, keys are told by their hash."""
    two, three, four = (str(CapsuleId(each)) for each in (TWO, THREE, FOUR))
    added = detail_of(SAMPLES["51.1"])
    assert (added["zone"], added["kind"], added["name"]) == (two, "edge", "berlin")
    assert added["authorities"].startswith("blake3:")
    assert detail_of(SAMPLES["54.1"])["capsules"] == [three, four]
    assert detail_of(SAMPLES["54.1"])["resume"] == b"note".hex()
    sent = detail_of(SAMPLES["57.1"])
    assert (sent["capsules"], sent["withdrawn"]) == ([{"capsule": three, "position": 9}], [four])
    promoted = ev.ZonePromoted(ONE, TWO, 1, ev.CURSOR.pack(0, 50, 9))
    assert detail_of(promoted)["cursors"] == [{"shard": 0, "lane": 50, "position": 9}]
    assert detail_of(ev.ZonePromoted(ONE, TWO, 1, b"short"))["cursors"] == "5 bytes"


def test_a_capsules_log_has_its_shipments() -> None:
    """The events that concern a capsule include the shipments that brought it or took it, and no others."""
    for key in ("54.1", "57.1"):
        assert _concerns(SAMPLES[key], CapsuleId(THREE))
        assert not _concerns(SAMPLES[key], CapsuleId(b"\x05" * 16))
    assert not _concerns(SAMPLES["57.1"], CapsuleId(b"\x09" + bytes(15)))
