"""``resolve``: how long it takes to find the nearest replica of a capsule, beside looking it up in a dictionary.

A store in a zone that knows four others, with replicas asked for in random order; each call goes through the library
(:meth:`space._node.store.Store.replicas`): capsule and home are read from the state, zones are ranked by a table.
The dictionary knows the answer already, keyed by the id: what a cache of everything would cost at best.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import space
from bench.measure import Row, Scale, in_turn
from space._node.federation_zones import Zones
from space._node.store import Store
from space.events.commands import Durability
from space.events.ids import CapsuleId
from space.policy.model import Policy, Sovereignty

CAPSULES: Final = 20_000
CALLS: Final = 50_000
AIM_US: Final = 100.0
TARGETS: Final = ("lima", "osaka", "oslo", "paris")


def run(scale: Scale) -> list[Row]:
    """Microseconds of one call, median and 99th percentile."""
    count, calls = scale.pick(CAPSULES, 200), scale.pick(CALLS, 2000)
    policy = Policy(sovereignty=Sovereignty.GLOBAL, federation_targets=TARGETS)
    with scale.workspace("resolve") as home, space.open(home / "here") as store:
        _meet(store, home)
        ids = [store.create(policy=policy, durability=Durability.BUFFERED) for _ in range(count)]
        wanted = random.Random(1).choices(ids, k=calls)
        known = {capsule: store.replicas(capsule)[0] for capsule in ids}
        rows = []
        for share, name in ((0.5, "p50"), (0.99, "p99")):
            found = in_turn(
                {
                    "ours": lambda share=share: _microseconds(store.replicas, wanted, share),  # type: ignore[misc]
                    "dict": lambda share=share: _microseconds(known.__getitem__, wanted, share),  # type: ignore[misc]
                }
            )
            case = f"nearest of 5 zones, {count:,} capsules, {name}"
            rows += [
                Row(case, "us", found["ours"], "aim", AIM_US),
                Row(case, "us", found["ours"], "a dictionary of answers", found["dict"]),
            ]
        return rows


def _meet(store: Store, home: Path) -> None:
    """Puts the store into a zone that knows the others."""
    zones = Zones(store)
    zones.init("berlin", "metro", "")
    for name in TARGETS:
        with space.open(home / name) as other:
            Zones(other).init(name, "geo", "")
            pem = Zones(other).keys().offer()[0]
        zones.add(name, "https://127.0.0.1:1", pem, None, offline=True)


def _microseconds(call: Callable[[CapsuleId], object], wanted: Sequence[CapsuleId], share: float) -> float:
    """How long a call takes, at that share of them."""
    took = []
    for capsule in wanted:
        began = time.perf_counter_ns()
        call(capsule)
        took.append(time.perf_counter_ns() - began)
    return statistics.quantiles(took, n=100)[round(share * 100) - 1] / 1000
