"""``replay``: events a second when the state and all views are rebuilt, against bare decoding of the same log.

Bare decoding reads every record (checking its CRCs and its link) and turns its bytes into event objects; the
rest of a replay is folding them and writing rows; 0.3 of its rate is the aim.  Four logs: small writes to the
end of many files, small writes anywhere in them, creations with attributes, and a mix (:mod:`bench.logs` says
of what).  One process, one core.
"""

from __future__ import annotations

import time
from typing import Any, Final

from bench import logs
from bench.measure import Row, Scale, in_child, in_turn
from space._node.store import Store
from space.events.codec import decode_batch

EVENTS: Final = 1_000_000
AIM_EVENTS_PER_SECOND: Final = 250_000

_LOGS: Final[dict[str, logs.Generator]] = {
    "small writes": logs.small_writes,
    "random writes": logs.random_writes,
    "creations": logs.creations_with_attributes,
    "mix": logs.mixed,
}


def run(scale: Scale) -> list[Row]:
    """Events a second, by kind of log."""
    rows = []
    for name in _LOGS:
        with scale.workspace("replay") as home:
            found = in_child("bench.bench_replay:measure", str(home), name, scale.pick(EVENTS, 20_000))
        rates = found.result
        case = f"{name}, {rates['events']:,} events"
        rows += [
            Row(case, "events/s", rates["replay"], "decoding", rates["decode"]),
            Row(case, "events/s", rates["replay"], "aim", AIM_EVENTS_PER_SECOND),
            Row(f"{name}, peak memory", "MiB", found.rss_bytes / 2**20),
        ]
        scale.note(f"replay: {name} done")
    return rows


def measure(home: str, name: str, events: int) -> dict[str, Any]:
    """Makes a log, then decodes and replays it in turn; rates in events a second."""
    with Store(home) as store:
        logs.submit(store, _LOGS[name](store, events))
        store.sync()
        total = store.applied().events
        rates = in_turn({"decode": lambda: total / _decode(store), "replay": lambda: total / _replay(store)})
    return {"events": total, **rates}


def _decode(store: Store) -> float:
    started = time.perf_counter()
    for record in store.wal.records(store.wal.first_index):
        decode_batch(record.metadata)
    return time.perf_counter() - started


def _replay(store: Store) -> float:
    started = time.perf_counter()
    store.replay()
    return time.perf_counter() - started
