"""Three zones by seed: a home and two that have its tree, any of which takes the home's place while others are away.

Anything is done at whoever is the home, and at homes that have not learnt that they lost it; shipments stop anywhere,
lanes overtake each other, zones go away and come back, senders forget what they knew.  In runs of
:func:`simulate_anew` zones are removed and added again besides, so that everything comes anew, and in half of these
each capsule of a copy goes in a shipment of its own.  What holds in the end:

* All three have everything alike, under the same ids and names, and one is the home of it.
* What a zone had of a home, and the one that took its place had not, is in a branch of some zone: nothing is lost.
* All logs are sound, and prove what they sent.

A run is a function of its seed.  ``python -m tests.chaos.federation_thirds_sim [RUNS [FIRST_SEED]]`` runs many of both
kinds.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Final
from unittest import mock

from space._errors import ConflictError, NotFoundError, SpaceError
from space._node.federation_audit import audit
from space._node.federation_promote import branches
from space._node.store import Store
from space.events.types import Kind
from space.federation import stream, translate
from space.statemachine import zones as rows
from space.statemachine.tables import Overlay
from tests.chaos.swarm import main
from tests.federation_pump import put_by
from tests.federation_support import shared
from tests.federation_third import NAMES, Several, several
from tests.property.test_federation_follow import act, below, seen

STEPS: Final = 50
"""Things that happen in a run, most of which are several changes."""

PROMOTIONS: Final = 3
"""At most so many in a run."""

TARGETS: Final = ("paris", "lima")


def top(name: str) -> str:
    """Where a zone has the tree."""
    return "/all" if name == "oslo" else "/zones/oslo/all"


class Run:
    """One run; ``counts`` says what happened in it.  With ``anew`` zones are removed and added."""

    def __init__(
        self, zones: Several, seed: int, promotions: int = PROMOTIONS, *, anew: bool = False
    ) -> None:
        self.zones = zones
        self.kinds = ["act"] * 8 + ["ship"] * 8 + ["away", "away", "restart", "settle", "promote"]
        if anew:
            self.kinds += ["forget"]
        self._promotions_max = promotions
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.home = "oslo"
        self.believers = {"oslo"}
        self.promotions = 0
        self.past: dict[bytes, list[bytes]] = {}
        self.kept: list[list[bytes]] = []

    def run(self) -> None:
        """All of it."""
        oslo = self._store("oslo")
        oslo.mkdir("/all")
        oslo.set_policy("/all", shared(*TARGETS))
        self._act()
        self.zones.settle()
        for _ in range(STEPS):
            self.step()
        self.finish()

    def step(self) -> None:
        """Something that happens."""
        getattr(self, f"_{self.random.choice(self.kinds)}")()

    def _store(self, name: str) -> Store:
        return self.zones.stores[name]

    def _act(self) -> None:
        name = self.random.choice(sorted(self.believers))
        for _ in range(self.random.randrange(1, 6)):
            act(self._store(name), top(name), self.random, TARGETS)
            if name == self.home:
                self._remember()

    def _contents(self, name: str) -> dict[bytes, bytes]:
        store = self._store(name)
        return {
            bytes(stat.id): store.get(stat.id)
            for _, stat in below(store, top(name))
            if stat.kind == Kind.FILE
        }

    def _remember(self) -> None:
        """What the home has now is what others may have got of it."""
        for capsule, content in self._contents(self.home).items():
            past = self.past.setdefault(capsule, [])
            if not past or past[-1] != content:
                past.append(content)

    def _ship(self) -> None:
        self.zones.ship(self.random.choice(sorted(self.zones.pumps)), self.random.randrange(1, 5))

    def _restart(self) -> None:
        self.zones.restart(self.random.choice(NAMES))

    def _forget(self) -> None:
        """A zone removes another one, and adds it again."""
        self.zones.forget(*self.random.sample(NAMES, 2))
        self.counts["forgotten"] += 1

    def _away(self) -> None:
        """One zone at most is away."""
        some = [set(), *({name} for name in NAMES)]
        self.zones.away = self.random.choice(some)

    def _settle(self) -> None:
        with contextlib.suppress(SpaceError):
            self.zones.settle()

    def _promote(self) -> None:
        others = [name for name in NAMES if name != self.home]
        name = self.random.choice(others)
        if self.promotions >= self._promotions_max or not self._follows(name):
            return
        third = next(each for each in others if each != name)
        if self._took(third, name):
            return  # all three in a circle: the third one says that it does not follow
        before = self._contents(name), self._contents(third), set(self._contents(self.home))
        follows = self._follows(third)
        with contextlib.suppress(NotFoundError, ConflictError):
            self.zones.promote(name, self.home)
            self.promotions += 1
            self.counts["promoted"] += 1
            if follows and self.random.random() < 0.5:
                self.believers.discard(self.home)
                self._foresee(*before)
            self.home = name
            self.believers.add(name)
            self.past = {}
            self._remember()

    def _took(self, name: str, zone: str) -> bool:
        """Whether a zone once took the place of another one, and does not know of that one's return."""
        with self._store(name)._read() as txn:
            return any(row.name == zone and row.taken for row in rows.zones(txn).values())

    def _follows(self, name: str) -> bool:
        """Whether a zone has the tree from whoever is the home, and wholly."""
        return self._homes(name) == {self.home}

    def _homes(self, name: str) -> set[str]:
        """The zones in which everything a zone has of the tree has its home, as it says itself."""
        store, found = self._store(name), set()
        with store._read() as txn:
            state, known = Overlay(txn), rows.zones(txn)
            for _, stat in below(store, top(name)):
                row = state.capsule(stat.id)
                home = None if row is None else rows.home_of(state, stat.id, row)
                found.add(name if home is None else known[home].name)
        return found

    def _foresee(self, won: dict[bytes, bytes], has: dict[bytes, bytes], lives: set[bytes]) -> None:
        """Notes what a third zone has of the old home that the new one has not; nothing more is done at the old one.

        It may still get what came there after that, or the old home may be first to set it aside.
        """
        for capsule, content in has.items():
            past = self.past.get(capsule, [])
            if capsule not in lives or content not in past:
                continue
            at = past.index(content)
            if capsule not in won or (won[capsule] in past and at > _last(past, won[capsule])):
                self.kept.append(past[at:])

    # --- what holds ------------------------------------------------------------------------------

    def finish(self) -> None:
        """Everything comes, and what holds then is looked at."""
        self.zones.away = set()
        self.zones.settle()
        found = {name: seen(self._store(name), top(name)) for name in NAMES}
        for name in NAMES:
            differing = _differing(found[name], found[self.home])
            assert not differing, f"{name} is not as {self.home}: {differing!s:.500}"
            assert self._homes(name) == {self.home}, f"{name} says the home is {self._homes(name)}"
        self._check_branches()
        for name in NAMES:
            assert not self._store(name).verify().findings
            proved = audit(self._store(name))
            assert not proved["findings"], proved["findings"]
            self.counts["shipments"] += proved["shipments"]

    def _check_branches(self) -> None:
        kept: set[bytes] = set()
        for store in self.zones.stores.values():
            for branch in branches(store):
                for file in branch["files"]:
                    self.counts["in branches"] += 1
                    stat = store.stat(store.resolve(f"{branch['path']}/{file['path']}"))
                    if stat.kind == Kind.FILE:
                        kept.add(store.get(stat.id))
        for contents in self.kept:
            assert not kept.isdisjoint(contents), f"nobody has {contents[0][:20]!r}"
            self.counts["ahead"] += 1


def _differing(here: dict[str, tuple[Any, ...]], there: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """What differs at each path: who has it if not both do."""
    found: dict[str, Any] = dict.fromkeys(here.keys() - there.keys(), "here only")
    found |= dict.fromkeys(there.keys() - here.keys(), "missing")
    for path in here.keys() & there.keys():
        if here[path] != there[path]:
            found[path] = [(a, b) for a, b in zip(here[path], there[path], strict=True) if a != b]
    return found


def _last(past: list[bytes], content: bytes) -> int:
    return len(past) - 1 - past[::-1].index(content)


def simulate(seed: int, promotions: int = PROMOTIONS) -> Counter[str]:
    """A run with so many promotions at most; what happened in it.

    Raises:
        AssertionError: something does not hold.
        SpaceError: something was refused that must not be.
    """
    return _simulated(seed, promotions, anew=False)


def simulate_anew(seed: int, promotions: int = PROMOTIONS) -> Counter[str]:
    """A run in which zones are removed and added again; else as :func:`simulate`."""
    with contextlib.ExitStack() as stack:
        if seed % 2:
            stack.enter_context(mock.patch.object(stream, "SHIPMENT_BYTES", 1))
            stack.enter_context(mock.patch.object(translate, "STEP_PARTS", 1))
        return _simulated(seed, promotions, anew=True)


def _simulated(seed: int, promotions: int, *, anew: bool) -> Counter[str]:
    with put_by(seed), tempfile.TemporaryDirectory(dir="/dev/shm") as at, several(Path(at)) as zones:
        run = Run(zones, seed, promotions, anew=anew)
        run.run()
        return run.counts


if __name__ == "__main__":
    sys.exit(main(lambda seed: simulate(seed) + simulate_anew(seed), sys.argv[1:], runs=100))
