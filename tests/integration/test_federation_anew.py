"""Everything is copied anew to a zone that had it: names stay until what comes instead is there, wherever it is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from space._node.federation_audit import audit
from space._node.federation_move import move
from space._node.federation_promote import promote
from space._node.federation_zones import Zones
from space._node.store import Store
from space.events import commands as cmd
from space.federation import stream, translate
from tests.federation_pump import Pumped, pumped
from tests.federation_support import introduce, shared
from tests.property.test_federation_follow import seen

pytestmark = [pytest.mark.integration, pytest.mark.requires("py:aiohttp")]

HERE: Final = "/all"
THERE: Final = "/zones/oslo/all"

SHIPMENTS: Final = 16
"""More than a copy of what :func:`filled` makes has, one capsule in each."""


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Pumped]:
    """Two zones; ``paris`` has what is in a directory of ``oslo``, in two lanes."""
    with pumped(tmp_path) as zones:
        filled(zones)
        yield zones


def filled(zones: Pumped) -> None:
    """Files and a directory in a directory, and one file that goes before the others."""
    oslo = zones.oslo
    oslo.mkdir(HERE)
    oslo.set_policy(HERE, shared("paris"))
    for name in ("a", "b", "c", "dir/d"):
        oslo.put(name.encode(), name=f"{HERE}/{name}")
    oslo.put(b"first", name=f"{HERE}/first", policy=shared("paris", priority=50))
    zones.settle()


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has each capsule of a copy go in a shipment of its own."""
    monkeypatch.setattr(stream, "SHIPMENT_BYTES", 1)
    monkeypatch.setattr(translate, "STEP_PARTS", 1)


def forgotten(zones: Pumped) -> None:
    """``paris`` removes ``oslo`` and adds it again: all of it is to come anew."""
    Zones(zones.paris).remove("oslo", sure=True)
    introduce(zones.paris, zones.oslo, "https://oslo:1")
    zones.reopen()


def moved_about(oslo: Store) -> None:
    """Names of the home's go to something else, one after the other."""
    oslo.mv(f"{HERE}/dir", f"{HERE}/e")
    oslo.mv(f"{HERE}/a", f"{HERE}/e/a")
    oslo.mv(f"{HERE}/b", f"{HERE}/a")
    oslo.put(b"new", name=f"{HERE}/b")


def alike(zones: Pumped) -> None:
    """Both zones have the same, and prove what they sent."""
    assert seen(zones.oslo, HERE) == seen(zones.paris, THERE)
    for store in (zones.oslo, zones.paris):
        assert audit(store)["findings"] == []
        assert store.verify().findings == []


def names(zones: Pumped) -> dict[str, bytes]:
    """What ``paris`` has under which name."""
    return {path: bytes(found[0]) for path, found in seen(zones.paris, THERE).items()}


@pytest.mark.usefixtures("small_steps")
def test_names_stay_while_everything_is_copied_anew(two: Pumped) -> None:
    """At every step of the copy everything has the name it has at home."""
    before = names(two)
    forgotten(two)
    steps = 0
    while two.there.run(1):
        assert names(two) == before
        steps += 1
    assert 8 < steps < SHIPMENTS
    alike(two)


@pytest.mark.usefixtures("small_steps")
def test_what_changed_meanwhile_is_exact_in_the_end(two: Pumped) -> None:
    """Nothing is without a name half way, also what lost its own to something else; in the end all is as at home."""
    had = set(names(two).values())
    two.oslo.rm(f"{HERE}/c")
    moved_about(two.oslo)
    forgotten(two)
    gone = had - {bytes(found[0]) for found in seen(two.oslo, HERE).values()}
    assert len(gone) == 1
    while two.there.run(1):
        apart = {bytes(stat.id) for _, stat in two.paris.walk(two.paris.resolve("/zones/oslo/.capsules"))}
        assert had - gone <= apart | set(names(two).values())
    assert two.paris.ls("/zones/oslo/.capsules") == []
    alike(two)


def test_what_the_home_does_not_know_any_more_goes_in_the_end(two: Pumped) -> None:
    """A removal that left and never came is made up for by the next copy of everything, also in the zone's own root."""
    oslo = two.oslo
    oslo.put(b"top", name="/top", policy=shared("paris"))
    two.settle()
    oslo.rm("/top")
    oslo.rm(f"{HERE}/dir", recursive=True)
    assert two.there.source.next() is not None  # recorded as sent, and lost
    forgotten(two)
    two.there.run()
    assert [name for name, _ in two.paris.walk(two.paris.resolve("/zones/oslo"))] == [
        b"",
        b".capsules",
        b"all",
        b"all/a",
        b"all/b",
        b"all/c",
        b"all/first",
    ]
    alike(two)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("changed", [False, True], ids=["", "changed"])
@pytest.mark.parametrize("shipments", range(SHIPMENTS))
def test_a_promotion_while_everything_is_copied_anew(two: Pumped, shipments: int, changed: bool) -> None:
    """Wherever the copy is cut, the zone that takes over has everything under a name, and the old home the same."""
    had = names(two)
    if changed:
        moved_about(two.oslo)
    forgotten(two)
    paris = two.paris
    two.there.run(shipments)
    promote(paris, Zones(paris), "oslo", again=not shipments)  # nothing has come of what is copied
    apart = {bytes(stat.id) for _, stat in paris.walk(paris.resolve("/zones/oslo/.capsules"))}
    assert set(had.values()) <= apart | set(names(two).values())
    if not changed:
        assert names(two) == had
    two.settle()
    alike(two)
    for path, found in seen(paris, THERE).items():
        if found[3]:
            paris.write(paris.resolve(f"{THERE}{path}"), 0, b"PARIS")
    two.settle()
    alike(two)


def test_a_home_that_was_given_is_copied_as_it_was_then(two: Pumped) -> None:
    """A zone that took a home, changed it and gave it back loses none of that to a copy that knows of neither."""
    oslo, paris = two.oslo, two.paris
    move(oslo, Zones(oslo), f"{HERE}/a", "paris", wait_seconds=0, asked=two.there.homes)
    two.there.run()
    paris.write(paris.resolve(f"{THERE}/a"), 0, b"PARIS")
    move(paris, Zones(paris), f"{THERE}/a", "oslo", wait_seconds=0, asked=two.back.homes)
    forgotten(two)
    two.there.run()
    assert two.paris.get(f"{THERE}/a") == b"PARIS"
    two.settle()
    assert two.oslo.get(f"{HERE}/a") == b"PARIS"
    two.oslo.write(two.oslo.resolve(f"{HERE}/a"), 0, b"OSLO")
    two.settle()
    alike(two)


def test_what_was_given_and_not_taken_outlives_a_copy_of_everything(two: Pumped) -> None:
    """A home that was given to a zone which copies everything anew, as it has not heard of it, is swept by nobody."""
    oslo, paris = two.oslo, two.paris
    move(oslo, Zones(oslo), f"{HERE}/a", "paris", wait_seconds=0, asked=two.there.homes)
    two.settle()
    move(paris, Zones(paris), f"{THERE}/a", "oslo", wait_seconds=0, asked=two.back.homes)
    forgotten(two)
    two.there.run()
    assert two.paris.get(f"{THERE}/a") == b"a"
    two.settle()
    alike(two)


def test_a_zone_that_forgot_before_it_followed_has_everything_anew(two: Pumped) -> None:
    """It is not told the new home's log from the beginning, over what it has."""
    oslo, paris = two.oslo, two.paris
    move(oslo, Zones(oslo), HERE, "paris", wait_seconds=0, asked=two.there.homes)
    two.settle()
    paris.rm(f"{THERE}/dir", recursive=True)
    two.back.run()
    forgotten(two)
    oslo, paris = two.oslo, two.paris
    promote(oslo, Zones(oslo), "paris")
    oslo.write(oslo.resolve(f"{HERE}/a"), 0, b"OSLO")
    two.settle()
    assert two.paris.get(f"{THERE}/a") == b"OSLO"
    alike(two)


def test_what_was_removed_in_a_directory_that_was_given_back_untaken_is_back(two: Pumped) -> None:
    """Where the old home takes the place of a zone that gave a directory back, nothing that did there counts."""
    oslo, paris = two.oslo, two.paris
    move(oslo, Zones(oslo), HERE, "paris", wait_seconds=0, asked=two.there.homes)
    two.there.run()
    paris.rm(f"{THERE}/a")
    move(paris, Zones(paris), THERE, "oslo", wait_seconds=0, asked=two.back.homes)
    two.back.connect()
    two.back.run(1)
    promote(oslo, Zones(oslo), "paris")
    two.settle()
    assert two.paris.get(f"{THERE}/a") == b"a"
    alike(two)


@pytest.mark.usefixtures("small_steps")
def test_what_left_a_directory_is_back_in_it_also_if_it_was_given_and_not_taken(two: Pumped) -> None:
    """A zone that takes over half way has it in there, and so has the old home, which had given the directory away."""
    two.oslo.mv(f"{HERE}/dir/d", f"{HERE}/d")
    forgotten(two)
    oslo, paris = two.oslo, two.paris
    two.there.run(4)  # both lanes begin, and the directories come
    move(oslo, Zones(oslo), f"{HERE}/dir", "paris", wait_seconds=0, asked=two.there.homes)
    promote(paris, Zones(paris), "oslo")
    assert paris.get(f"{THERE}/dir/d") == b"dir/d"
    two.settle()
    assert oslo.get(f"{HERE}/dir/d") == b"dir/d"
    alike(two)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("shipments", range(2, 8))
def test_a_name_in_a_directory_the_other_zone_was_told_to_delete_is_not_given_back(
    two: Pumped, shipments: int
) -> None:
    """Where that zone takes over before it has heard what a file was called in there since, it keeps its other name."""
    two.oslo.execute(cmd.Link(two.oslo.resolve(f"{HERE}/c"), two.oslo.resolve(f"{HERE}/dir"), b"c"))
    two.settle()
    two.oslo.mv(f"{HERE}/dir/c", f"{HERE}/dir/e")
    two.oslo.rm(f"{HERE}/dir", recursive=True)
    forgotten(two)
    two.there.run(shipments)
    promote(two.paris, Zones(two.paris), "oslo", again=True)
    two.settle()
    assert two.oslo.get(f"{HERE}/c") == b"c"
    alike(two)
