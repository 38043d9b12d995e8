"""Homes of single capsules that move to and fro between two zones, by seed, while anything is done on both sides.

Two stores are zones of each other, with one tree that both have.  Files and directories of it go to the other zone and
back; both sides try to change everything all the time, as users would; shipments stop anywhere, senders forget what
they knew, hand-overs are taken back, and now and then one zone takes the other one's place.  In runs of
:func:`simulate_anew` zones are removed and added again besides, so that everything comes anew, and in half of these
each capsule of a copy goes in a shipment of its own, so that copies are cut everywhere.  What holds:

* No capsule ever has its home in both zones, and none was changed where its home is not, unless a zone took the other
  one's place and that one does not know yet.
* Once everything came, each has its home in exactly one of them, and both have all of it alike, under the same names:
  what moved is where it always was.
* Both logs prove what they sent, and are sound.

A run is a function of its seed.  ``python -m tests.chaos.federation_moves_sim [RUNS [FIRST_SEED]]`` runs many of both
kinds.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Final
from unittest import mock

from space._errors import ConflictError, NotFoundError, RefusedError, UnavailableError
from space._node.federation_audit import audit
from space._node.federation_move import Residence, move, take_back
from space._node.federation_promote import promote
from space._node.federation_zones import Zones
from space._node.store import Store
from space.events.types import Kind
from space.federation import stream, translate
from space.statemachine import zones as rows
from space.statemachine.tables import Overlay
from tests.chaos.swarm import main
from tests.federation_pump import Pump, Pumped, pumped, put_by
from tests.federation_support import introduce, shared
from tests.property.test_federation_follow import act, below, seen

STEPS: Final = 60
"""Things that happen in a run, most of which are several changes."""

PROMOTIONS: Final = 2
"""At most so many in a run."""

TOPS: Final = {"oslo": "/all", "paris": "/zones/oslo/all"}


class Run:
    """One run; ``counts`` says what happened in it.  With ``anew`` zones are removed and added."""

    def __init__(self, zones: Pumped, seed: int, *, anew: bool = False) -> None:
        self.zones = zones
        self.kinds = ["act"] * 8 + ["ship"] * 6 + ["move"] * 5 + ["back", "restart", "settle", "promote"]
        if anew:
            self.kinds += ["forget"]
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.promotions = 0
        both = self.random.random() < 0.5
        self.targets = ("oslo", "paris") if both else ("paris",)
        # A clone takes over a policy that may name its new home: then it stays there, as it should.
        self.without = () if both else ("clone", "lane")

    def run(self) -> None:
        """All of it."""
        zones = self.zones
        zones.oslo.mkdir("/all")
        zones.oslo.set_policy("/all", shared(*self.targets))
        for _ in range(20):
            act(zones.oslo, "/all", self.random, self.targets, self.without)
        zones.settle()
        for _ in range(STEPS):
            self.step()
            self.check_homes()
        self.finish()

    def step(self) -> None:
        """Something that happens."""
        kind = self.random.choice(self.kinds)
        getattr(self, f"_{kind}")()

    def _store(self, name: str) -> Store:
        found: Store = getattr(self.zones, name)
        return found

    def _pump(self, name: str) -> Pump:
        """What ships from a zone."""
        return self.zones.there if name == "oslo" else self.zones.back

    def _one(self) -> str:
        return self.random.choice(["oslo", "paris"])

    def _act(self) -> None:
        name = self._one()
        for _ in range(self.random.randrange(1, 6)):
            act(self._store(name), TOPS[name], self.random, self.targets, self.without)

    def _ship(self) -> None:
        pump = self._pump(self._one())
        with contextlib.suppress(UnavailableError):
            if self.random.random() < 0.3:
                pump.connect()
            pump.run(self.random.randrange(1, 5))

    def _restart(self) -> None:
        name = self._one()
        self.zones.restart(name)
        self._pump(name).connect()

    def _forget(self) -> None:
        """A zone removes the other one, and adds it again."""
        name = self._one()
        other = "paris" if name == "oslo" else "oslo"
        store = self._store(name)
        Zones(store).remove(other, sure=True)
        introduce(store, self._store(other), f"https://{other}:1")
        for each in (name, other):
            self.zones.restart(each)
        for pump in (self.zones.there, self.zones.back):
            with contextlib.suppress(UnavailableError):
                pump.connect()
        self.counts["forgotten"] += 1

    def _settle(self) -> None:
        self.zones.settle()
        self.check_alike()

    def _move(self) -> None:
        name = self._one()
        other = "paris" if name == "oslo" else "oslo"
        store = self._store(name)
        some = [path for path, _ in below(store, TOPS[name])]
        path = self.random.choice(some)
        try:
            move(store, Zones(store), path, other, wait_seconds=0, asked=self._pump(name).homes)
        except (RefusedError, NotFoundError, UnavailableError, ConflictError) as error:
            self.counts[f"not moved: {type(error).__name__}"] += 1
        else:
            self.counts["moved"] += 1

    def _back(self) -> None:
        name = self._one()
        other = "paris" if name == "oslo" else "oslo"
        store = self._store(name)
        told = take_back(store, Zones(store), other, asked=self._pump(name).homes)
        self.counts["taken back"] += told["capsules"]

    def _promote(self) -> None:
        """A zone takes the other one's place; both go on for a while, and then hear of each other."""
        if self.promotions >= PROMOTIONS:
            return
        name = self._one()
        other = "paris" if name == "oslo" else "oslo"
        store = self._store(name)
        try:
            promote(store, Zones(store), other)
        except (NotFoundError, ConflictError):  # nothing came from there, or it has its home here already
            return
        self.promotions += 1
        self.counts["promoted"] += 1
        for _ in range(self.random.randrange(6)):
            self._act()
        if self.random.random() < 0.5:
            self.zones.restart(other)
        self.zones.settle()
        self.check_alike()

    # --- what holds ------------------------------------------------------------------------------

    def _homes(self) -> dict[bytes, set[str]]:
        """The zones each capsule has its home in, as they say themselves."""
        found: dict[bytes, set[str]] = {}
        for name in ("oslo", "paris"):
            store = self._store(name)
            with store._read() as txn:
                state = Overlay(txn)
                for _, stat in below(store, TOPS[name]):
                    row = state.capsule(stat.id)
                    homes = found.setdefault(bytes(stat.id), set())
                    if row is not None and rows.home_of(state, stat.id, row) is None:
                        homes.add(name)
        return found

    def check_homes(self) -> None:
        """No capsule has two homes."""
        for capsule, homes in self._homes().items():
            assert len(homes) < 2, f"{capsule.hex()} has its home in {homes}"

    def check_alike(self) -> None:
        """Both zones have everything alike, and one of them is the home of each capsule."""
        here, there = (seen(self._store(name), top) for name, top in TOPS.items())
        differing = {
            name: [(a, b) for a, b in zip(here.get(name, ()), there.get(name, ()), strict=False) if a != b]
            for name in here.keys() | there.keys()
            if here.get(name) != there.get(name)
        }
        assert not differing, differing
        for capsule, homes in self._homes().items():
            assert len(homes) == 1, f"{capsule.hex()} has its home in {homes}"

    def finish(self) -> None:
        """Everything comes, and what nobody took is taken back."""
        self.zones.settle()
        for name, other in (("oslo", "paris"), ("paris", "oslo")):
            store = self._store(name)
            with store._read() as txn:
                (zone,) = Zones(store).others()
                left = rows.given_to(Overlay(txn), zone.id)
            for residence in self._pump(name).homes(left, 0):
                assert residence is Residence.HOME, f"the home of {left} was given to {other} and not taken"
        self.check_alike()
        for name in TOPS:
            store = self._store(name)
            assert not store.verify().findings
            found = audit(store)
            assert not found["findings"], found["findings"]
            self.counts["shipments"] += found["shipments"]
        self._count_files()

    def _count_files(self) -> None:
        for homes in self._homes().values():
            self.counts[f"at home in {min(homes)}"] += 1
        kinds = Counter(stat.kind for _, stat in below(self.zones.oslo, "/all"))
        self.counts["files"] += kinds[Kind.FILE]


def simulate(seed: int) -> Counter[str]:
    """A run; what happened in it.

    Raises:
        AssertionError: something does not hold.
        SpaceError: something was refused that must not be.
    """
    return _simulated(seed, anew=False)


def simulate_anew(seed: int) -> Counter[str]:
    """A run in which zones are removed and added again; else as :func:`simulate`."""
    with contextlib.ExitStack() as stack:
        if seed % 2:
            stack.enter_context(mock.patch.object(stream, "SHIPMENT_BYTES", 1))
            stack.enter_context(mock.patch.object(translate, "STEP_PARTS", 1))
        return _simulated(seed, anew=True)


def _simulated(seed: int, *, anew: bool) -> Counter[str]:
    with put_by(seed), tempfile.TemporaryDirectory(dir="/dev/shm") as at, pumped(Path(at)) as zones:
        run = Run(zones, seed, anew=anew)
        run.run()
        return run.counts


if __name__ == "__main__":
    sys.exit(main(lambda seed: simulate(seed) + simulate_anew(seed), sys.argv[1:], runs=100))
