"""What is told of zones: how much log lies between positions, and what survives the process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import space
from space._node.federation_status import MARK_EVERY, Amount, Backlog, load_notes, samples, save_notes, status
from space._node.federation_zones import Zones
from space._node.pages import metrics
from space._node.store import Store
from space.events.codec import decode_batch


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store."""
    with space.open(tmp_path) as opened:
        yield opened


def test_the_backlog_is_what_the_log_holds(store: Store) -> None:
    """Between any two positions, asked in any order, it counts the events and bytes that are there."""
    capsule = store.create()
    for number in range(3 * MARK_EVERY):
        store.write(capsule, number * 10, b"x" * (number % 7 + 1))
    each = {}
    for record in store.wal.records(1):
        events = sum(len(entry.events) for entry in decode_batch(record.metadata))
        each[record.index] = Amount(events, len(record.metadata) + record.payload_length)
    chance = random.Random(5)
    backlog = Backlog(store.wal)
    for _ in range(60):
        position, last = sorted(chance.choices(range(store.last + 1), k=2))
        wanted = [each[at] for at in range(position + 1, last + 1)]
        found = backlog.after(position, last)
        assert found == Amount(sum(one.events for one in wanted), sum(one.bytes for one in wanted))
    assert backlog.after(store.last, store.last) == Amount(0, 0)


def test_the_backlog_follows_the_log(store: Store) -> None:
    """What is appended after a first question is counted in the next."""
    capsule = store.create()
    backlog = Backlog(store.wal)
    before = backlog.after(1, store.last).events
    for number in range(MARK_EVERY + 10):
        store.write(capsule, number, b"x")
    assert backlog.after(1, store.last).events == before + MARK_EVERY + 10


def test_notes_are_kept_and_may_be_lost(tmp_path: Path) -> None:
    """What was known of zones comes back; damaged or missing notes are none."""
    assert load_notes(tmp_path) == {}
    (tmp_path / "zone").mkdir()
    save_notes(tmp_path, {"a": {"position": 7}})
    assert load_notes(tmp_path) == {"a": {"position": 7}}
    for damaged in (b"", b"[]", b"\xff", b'{"a": 1}'):
        (tmp_path / "zone/links.json").write_bytes(damaged)
        assert load_notes(tmp_path) == {}


def test_a_store_in_no_zone_has_a_status(store: Store) -> None:
    """Without zones there is nothing to tell, and no error."""
    found = status(store)
    assert (found["zone"], found["running"], found["zones"]) == (None, False, [])
    assert metrics(samples(found)) == "\n"


def test_a_zone_that_is_not_shipped_to_lags(tmp_path: Path) -> None:
    """While nothing runs, the lag is what was logged since the zone was last known to be in step."""
    with space.open(tmp_path / "a") as home, space.open(tmp_path / "b") as other:
        Zones(home).init("oslo", "metro", "")
        Zones(other).init("paris", "edge", "")
        Zones(home).add("paris", "https://127.0.0.1:9", Zones(other).keys().authority.pem, None, offline=True)
        (unknown,) = status(home)["zones"]
        assert (unknown["position"], unknown["connected"], unknown["rpo_ok"]) == (None, False, False)
        save_notes(
            home.path, {unknown["id"]: {"position": home.position, "heard_position": 3, "heard_ns": 4}}
        )
        capsule = home.create()
        home.write(capsule, 0, random.Random(1).randbytes(1000))
        (known,) = status(home, capsules=True)["zones"]
        assert known["lag_events"] == 2
        assert known["lag_bytes"] > 1000
        assert known["lag_seconds"] > 0
        assert known["received"]["heard_position"] == 3
        text = metrics(samples(status(home)))
        assert 'space_federation_lag_events{zone="paris"} 2' in text
        assert 'space_federation_connected{zone="paris"} 0.0' in text
