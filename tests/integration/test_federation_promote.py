"""A zone that takes another one's place: what is lost, what the old home keeps and how it follows, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from space._errors import RefusedError
from space._node.federation_promote import branches, promote
from space._node.federation_zones import Zones
from space._node.store import Store
from space.events.types import Kind
from tests.federation_support import Two, shared, two_zones, until

pytestmark = pytest.mark.requires("py:aiohttp")


@pytest.fixture
def zones(tmp_path: Path) -> Iterator[Two]:
    """Two zones that know each other."""
    with two_zones(tmp_path) as two:
        yield two


def tree(store: Store, path: str) -> dict[str, Any]:
    """What is below a path: content of files, None for directories; replicas without a place apart."""
    root = store.resolve(path)
    return {
        name.decode(): store.get(stat.id) if stat.kind == Kind.FILE else None
        for name, stat in store.walk(root)
        if name and not name.startswith(b".capsules")
    }


def attributes(store: Store, path: str) -> dict[str, tuple[Any, ...]]:
    """Attributes of all below a path that both zones have to have alike."""
    root = store.resolve(path)
    return {
        name.decode(): (stat.id, stat.mode, stat.uid, stat.gid, stat.size, stat.mtime, stat.ctime, stat.btime)
        for name, stat in store.walk(root)
    }


def shipping(zones: Two) -> None:
    """A tree of ``oslo`` that ``paris`` has, both at work."""
    oslo = zones.oslo
    made = oslo.mkdir("/all")
    oslo.set_policy(made, shared("paris"))
    oslo.put(b"one", name="/all/a")
    oslo.put(b"two" * 50_000, name="/all/deep/b")
    oslo.put(b"three", name="/all/deep/c")
    oslo.put(b"four", name="/all/d")
    zones.serve()
    zones.in_step()


def apart(zones: Two) -> None:
    """Cuts both ways."""
    for link in zones.links.values():
        link.cut()
    until(lambda: not zones.status("oslo")["zones"][0]["connected"])


def together(zones: Two) -> None:
    """Heals both ways."""
    for name, link in zones.links.items():
        running = zones.stores[name].federation
        assert running is not None
        link.heal(running.port)


def settled(zones: Two, loser: str, winner: str) -> None:
    """Waits until the zone that lost has all of the other one."""
    until(lambda: branches(zones.stores[loser]) or zones.status(winner)["zones"][0]["connected"])
    zones.in_step(winner, loser)


def test_a_zone_takes_over_and_the_old_home_follows(zones: Two) -> None:
    """What the old home had not shipped is a branch there; else it is what the new home has, and follows it."""
    shipping(zones)
    oslo, paris = zones.oslo, zones.paris
    apart(zones)
    oslo.write(oslo.resolve("/all/a"), 0, b"ONE here")
    oslo.write(oslo.resolve("/all/deep/b"), 100, b"changed in the middle")
    oslo.put(b"new here", name="/all/deep/new")
    oslo.mv("/all/d", "/all/deep/moved")
    oslo.rm("/all/deep/c")
    was = {path: oslo.get(oslo.resolve(path)) for path in ("/all/a", "/all/deep/b", "/all/deep/new")}

    with pytest.raises(RefusedError):
        paris.write(paris.resolve("/zones/oslo/all/a"), 0, b"x")
    told = promote(paris, Zones(paris), "oslo")
    assert told["epoch"] == 1
    paris.write(paris.resolve("/zones/oslo/all/a"), 0, b"one there")
    paris.put(b"made there", name="/zones/oslo/all/deep/there")
    paris.rm("/zones/oslo/all/d")

    together(zones)
    until(lambda: branches(oslo))
    zones.in_step("paris", "oslo")
    assert (
        tree(oslo, "/all")
        == tree(paris, "/zones/oslo/all")
        == {
            "a": b"one there",
            "deep": None,
            "deep/b": b"two" * 50_000,
            "deep/c": b"three",
            "deep/there": b"made there",
        }
    )
    assert attributes(oslo, "/all") == attributes(paris, "/zones/oslo/all")
    (branch,) = branches(oslo)
    assert branch["path"] == "/zones/.branches/paris-1"
    kept = {path: content for path, content in tree(oslo, branch["path"]).items() if content is not None}
    assert kept == {path.removeprefix("/"): content for path, content in was.items()}
    with pytest.raises(RefusedError, match="paris"):
        oslo.write(oslo.resolve("/all/a"), 0, b"x")
    oslo.verify()
    paris.verify()


def test_and_back_again(zones: Two) -> None:
    """Promoted in turn, the old home is the home again, with what was done in between; the other one follows again."""
    test_a_zone_takes_over_and_the_old_home_follows(zones)
    oslo, paris = zones.oslo, zones.paris
    apart(zones)
    paris.put(b"late there", name="/zones/oslo/all/late")
    paris.write(paris.resolve("/zones/oslo/all/deep/b"), 0, b"LATE")
    assert promote(oslo, Zones(oslo), "paris")["epoch"] == 2
    oslo.write(oslo.resolve("/all/deep/c"), 0, b"THREE again")
    oslo.put(b"again", name="/all/again")
    together(zones)
    until(lambda: branches(paris))
    zones.in_step("oslo", "paris")
    assert tree(oslo, "/all") == tree(paris, "/zones/oslo/all")
    assert attributes(oslo, "/all") == attributes(paris, "/zones/oslo/all")
    assert oslo.get(oslo.resolve("/all/a")) == b"one there"
    (branch,) = branches(paris)
    assert branch["path"] == "/zones/.branches/oslo-2"
    kept = {path: content for path, content in tree(paris, branch["path"]).items() if content is not None}
    assert kept == {"all/late": b"late there", "all/deep/b": b"LATE" + (b"two" * 50_000)[4:]}
    oslo.write(oslo.resolve("/all/a"), 0, b"ours")
    zones.in_step("oslo", "paris")
    assert tree(oslo, "/all") == tree(paris, "/zones/oslo/all")
    oslo.verify()
    paris.verify()
