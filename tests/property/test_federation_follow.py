"""A home that is lost and follows, with anything done on both sides meanwhile."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from space._errors import ConflictError, NotFoundError, RefusedError, UsageError
from space._node.federation_audit import audit
from space._node.federation_promote import branches, promote
from space._node.federation_zones import Zones
from space._node.store import Store
from space.events import commands as cmd
from space.events.types import Kind
from tests.federation_pump import Pumped, pumped
from tests.federation_support import shared

pytestmark = [pytest.mark.property, pytest.mark.requires("py:aiohttp")]

RUNS: Final = 25
"""Three changes of home each; 500 more seeds were run when it was written."""
NAMES: Final = [b"a", b"b", b"c", b"d", b"e"]


def below(store: Store, path: str) -> list[tuple[str, Any]]:
    """What is below a path."""
    return [
        (f"{path}/{name.decode()}" if name else path, stat) for name, stat in store.walk(store.resolve(path))
    ]


def directories(store: Store, path: str) -> list[str]:
    """Directories below a path, and itself."""
    return [name for name, stat in below(store, path) if stat.kind == Kind.DIRECTORY]


def act(
    store: Store,
    top: str,
    chance: random.Random,
    targets: Sequence[str] = ("paris",),
    without: Container[str] = (),
) -> None:
    """Something that happens below a directory, if it can; ``targets`` are those of policies that change."""
    everything = [name for name, _ in below(store, top) if name != top]
    some = chance.choice(everything) if everything else None
    into = f"{chance.choice(directories(store, top))}/{chance.choice(NAMES).decode()}"
    kind = chance.choice(
        [
            "put",
            "put",
            "write",
            "write",
            "mkdir",
            "mv",
            "mv",
            "rm",
            "link",
            "mode",
            "xattr",
            "size",
            "clone",
            "lane",
        ]
    )
    try:
        if kind in without:
            return
        if kind == "put":
            store.put(chance.randbytes(chance.choice([0, 10, 5000, 200_000])), name=into)
        elif kind == "mkdir":
            store.mkdir(into)
        elif some is None:
            return
        elif kind == "mv":
            store.mv(some, into)
        elif kind == "rm":
            store.rm(some, recursive=True)
        elif kind == "mode":
            store.execute(cmd.SetAttributes(store.resolve(some), mode=chance.choice([0o600, 0o755])))
        elif kind == "xattr":
            store.execute(cmd.SetXattr(store.resolve(some), b"user.x", chance.randbytes(3)))
        elif kind == "link":
            parent, name = store._parent_of(into)
            store.execute(cmd.Link(store.resolve(some), parent, name))
        elif kind == "clone":
            store.clone(some, into)
        elif kind == "lane":
            store.set_policy(some, shared(*targets, priority=chance.choice([0, 50])))
        elif kind == "size":
            store.resize(some, chance.choice([0, 7, 70_000]))
        else:
            store.write(
                store.resolve(some),
                chance.choice([0, 3, 4096, 100_000]),
                chance.randbytes(chance.choice([1, 3000])),
            )
    except (ConflictError, NotFoundError, UsageError, RefusedError):
        return  # taken, gone, into itself


def seen(store: Store, path: str) -> dict[str, tuple[Any, ...]]:
    """All that both zones have to have alike."""
    found = {}
    for name, stat in below(store, path):
        content = store.get(stat.id) if stat.kind == Kind.FILE else b""
        xattrs = sorted(store.xattrs(stat.id).items())
        found[name.removeprefix(path)] = (
            stat.id,
            stat.kind,
            stat.mode,
            content,
            xattrs,
            stat.mtime
            if stat.kind == Kind.FILE
            else 0,  # lanes that overtake each other name things in any order
        )
    return found


def some_acts(store: Store, top: str, chance: random.Random, most: int) -> None:
    """Some things that happen."""
    for _ in range(chance.randrange(most)):
        act(store, top, chance)


def taken_over(zones: Pumped, chance: random.Random, winner: str) -> None:
    """Something is done at the home, not all of it comes; the other zone takes over, and something is done there."""
    oslo, paris = (zones.oslo, "/all"), (zones.paris, "/zones/oslo/all")
    lost, won = (oslo, paris) if winner == "paris" else (paris, oslo)
    pump = zones.there if winner == "paris" else zones.back
    some_acts(*lost, chance, 30)
    pump.run(chance.randrange(4))
    some_acts(*lost, chance, 30)
    loser = "oslo" if winner == "paris" else "paris"
    promote(won[0], Zones(won[0]), loser)
    some_acts(*won, chance, 30)
    some_acts(*lost, chance, 10)
    if chance.random() < 0.5:
        zones.restart(loser)
    zones.settle()
    here, there = seen(*lost), seen(*won)
    differing = {
        name: [(a, b) for a, b in zip(here.get(name, ()), there.get(name, ()), strict=False) if a != b]
        for name in here.keys() | there.keys()
        if here.get(name) != there.get(name)
    }
    assert not differing


@pytest.mark.parametrize("seed", range(RUNS))
def test_both_zones_are_alike_again(seed: int) -> None:
    """Whatever was done on both sides, the old home ends up with what the new one has, and its branch has the rest."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory, pumped(Path(directory)) as zones:
        zones.oslo.mkdir("/all")
        zones.oslo.set_policy("/all", shared("paris"))
        some_acts(zones.oslo, "/all", chance, 30)
        zones.settle()
        for winner in ("paris", "oslo", "paris"):
            taken_over(zones, chance, winner)
        for store in (zones.oslo, zones.paris):
            assert not store.verify().findings
            assert not audit(store)["findings"]
            assert all(each["epoch"] in (1, 2, 3) for each in branches(store))
