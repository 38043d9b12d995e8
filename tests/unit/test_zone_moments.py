"""``ZONE@POSITION``: positions of another zone's log, found in this one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import space
from space._errors import NotFoundError, UsageError
from space._node.beside import open_beside
from space._node.federation_moments import zone_moment
from space._node.federation_zones import Zones
from space._node.store import Store
from space.events import commands as cmd
from space.events.commands import Durability, Request
from space.events.ids import AtPosition, zone_root

CAPSULE = bytes(range(16))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store that takes what zone oslo ships."""
    with space.open(tmp_path / "there") as there:
        Zones(there).init("oslo", "metro", "")
        pem = Zones(there).keys().authority.pem
    with space.open(tmp_path / "here") as here:
        Zones(here).init("paris", "metro", "")
        Zones(here).add("oslo", "https://127.0.0.1:9", pem, None, offline=True)
        yield here


def shipment(store: Store, begin: int, end: int, *commands: cmd.Command, lane: int = 0) -> Request:
    """What came of oslo's log between two positions."""
    (zone,) = Zones(store).others()
    return Request(cmd.ReceiveShipment(zone.id, 0, lane, begin, end, end * 1000, commands))


def found(store: Store, text: str) -> AtPosition | None:
    """What a text means there."""
    with store._read() as txn:
        return zone_moment(txn, store.wal, store.position, text)


@pytest.mark.parametrize(
    "text", ["@5", "-5m", "2026-01-01", "snapshot", "Oslo@5", "oslo@", "oslo@5.1", "@oslo@5", "oslo@-5"]
)
def test_other_words_are_other_moments(store: Store, text: str) -> None:
    """What is not ZONE@POSITION is left to those who know."""
    assert found(store, text) is None


def test_positions_are_found_whatever_came_together(store: Store, tmp_path: Path) -> None:
    """Each shipped position is the moment before the next one came: a batch here, or a place in one."""
    (zone,) = Zones(store).others()
    made = cmd.Copied(
        CAPSULE,
        10,
        0,
        True,
        [cmd.CreateCapsule(CAPSULE, size=0), cmd.PlaceCapsule(CAPSULE, [(zone_root(zone.id), b"a")])],
        (1, 1, 1, 1),
    )
    sizes = {11: 1, 12: 2, 13: 3}
    writes = [shipment(store, at - 1, at, cmd.Resize(CAPSULE, size)) for at, size in sizes.items()]
    together = store.execute_all([shipment(store, 0, 10, made), *writes], durability=Durability.BUFFERED)
    assert len({getattr(each, "position", each) for each in together}) == 1
    store.execute(shipment(store, 13, 20, cmd.Resize(CAPSULE, 9)).command)
    store.put(b"unrelated")
    for position, size in {10: 0, **sizes, 15: 3, 19: 3, 20: 9}.items():
        with store.at(f"oslo@{position}") as past:
            assert past.stat(past.resolve("/zones/oslo/a")).size == size
        with contextlib.closing(open_beside(store.path, f"oslo@{position}")) as past:
            assert past.stat(past.resolve("/zones/oslo/a")).size == size
    with store.at("oslo@5") as past, pytest.raises(NotFoundError):
        past.resolve("/zones/oslo/a")
    with pytest.raises(NotFoundError, match="oslo@20"):
        store.at("oslo@21")


def test_nothing_of_a_later_position_shows(store: Store) -> None:
    """Of two streams, the one that is ahead decides: what lags shows as of what had come by then."""
    store.execute(shipment(store, 0, 5).command)
    store.execute(shipment(store, 0, 5, lane=7).command)
    first = store.position
    store.execute(shipment(store, 5, 30, lane=7).command)
    store.execute(shipment(store, 5, 20).command)
    assert found(store, "oslo@5") == AtPosition(first)
    assert found(store, "oslo@25") == AtPosition(first)
    assert found(store, "oslo@30") == AtPosition(store.position)


def test_marks_make_old_positions_cheap(store: Store) -> None:
    """However long the log is, each position is found, through the marks a stream leaves on its way."""
    at = [store.execute(shipment(store, number, number + 1).command).position for number in range(700)]
    for number in (0, 1, 255, 256, 257, 400, 511, 512, 699):
        assert found(store, f"oslo@{number + 1}") == AtPosition(
            at[number] if number < 699 else store.position
        )


def test_zones_that_are_not_known(store: Store) -> None:
    """A zone nobody has heard of is not found; the own zone's positions are those of this log."""
    with pytest.raises(NotFoundError, match="no zone rome"):
        store.at("rome@1")
    assert found(store, "paris@3") == AtPosition(3)
    with pytest.raises(NotFoundError, match="position 0, not 1"):
        store.at("oslo@1")


def test_a_snapshot_has_its_name_first(store: Store) -> None:
    """A snapshot that is called like a position of a zone is the snapshot."""
    capsule = store.put(b"x").id
    store.snapshot(capsule, "oslo@999")
    position = store.position
    store.put(b"y")
    with store.at("oslo@999") as past:
        assert past.position <= position
    with pytest.raises((NotFoundError, UsageError)):
        store.at("oslo@998")
