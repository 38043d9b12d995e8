"""``open``: time and memory to open a store of many files and see the first of them, whatever its history.

Two stores of the same files, one with four times the events of the other (each event after the first few per
file sets attributes anew), are opened after a clean close, and after kill -9 with a thousand events since the
last checkpoint, when that checkpoint and the log after it count.  The log is synthesised (events are made and
linked as the sequencer makes them, without deciding commands) and folded once by the store's own recovery.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from bench import logs
from bench.measure import ROOT as ROOT_DIRECTORY
from bench.measure import Row, Scale, in_child, in_turn
from space._node import store as node
from space._node.store import Store
from space.events import commands as cmd
from space.events import types as ev
from space.events.codec import NO_LINK, Entry, chain_link, encode_batch, encode_event
from space.events.ids import ROOT
from space.wal.disk import RealDisk
from space.wal.log import Log

FILES: Final = 1_000_000
EVENTS: Final = 10_000_000
AIM_SECONDS: Final = 1.0
AIM_RSS_MIB: Final = 400
_HISTORY: Final = 4
_BATCH_EVENTS: Final = 512
_START_NS: Final = 1_700_000_000_000_000_000
_STORE: Final = bytes(15) + b"\1"
_STEP_NS: Final = 1_000_000
_EVENTS_BEFORE_KILL: Final = 1000


def run(scale: Scale) -> list[Row]:
    """Seconds and memory of an open."""
    files, events = scale.pick(FILES, 2000), scale.pick(EVENTS, 20_000)
    rows = []
    with scale.workspace("open") as home:
        short, long = home / "short", home / "long"
        in_child("bench.bench_open:make", str(short), files, events // _HISTORY)
        made = in_child("bench.bench_open:make", str(long), files, events)
        scale.note(f"open: made {events:,} events in {made.seconds:.0f} s")
        rate = events / made.result
        rows.append(Row(f"recovery of {events:,} events without a checkpoint", "events/s", rate))
        case = f"{files:,} files, {events:,} events"
        rows += _opened(f"{case}, closed", files, short, long, lambda _: None)
        for path in (short, long):
            in_child("bench.bench_open:checkpoint", str(path))
        rows += _opened(f"{case}, killed after a checkpoint", files, short, long, _kill)
    return rows


def _opened(case: str, files: int, short: Path, long: Path, before: Callable[[Path], None]) -> list[Row]:
    memory = {short: 0, long: 0}

    def opened(path: Path) -> float:
        before(path)
        child = in_child("bench.bench_open:first_look", str(path), files - 1)
        memory[path] = max(memory[path], child.rss_bytes)
        seconds: float = child.result
        return seconds

    found = in_turn({"short": lambda: opened(short), "long": lambda: opened(long)})
    return [
        Row(case, "s", found["long"], "aim", AIM_SECONDS),
        Row(case, "s", found["long"], f"1/{_HISTORY} of the history", found["short"]),
        Row(f"{case}: peak memory", "MiB", memory[long] / 2**20, "aim", AIM_RSS_MIB),
    ]


def _kill(path: Path) -> None:
    """Lets a process write to the store and be killed."""
    program = "import sys; from bench.bench_open import die; die(sys.argv[1], int(sys.argv[2]))"
    command = (sys.executable, "-c", program, path, str(_EVENTS_BEFORE_KILL))
    done = subprocess.run(command, cwd=ROOT_DIRECTORY, capture_output=True, text=True, check=False)
    if done.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the process to be killed ended by itself: {done.stderr.strip()[-500:]}")


def first_look(home: str, number: int) -> float:
    """Opens, and looks up one file by its path."""
    started = time.perf_counter()
    store = Store(home, create=False)
    path = b"/d%06d/file-%08d" % (number // logs.DIRECTORY_ENTRIES, number)
    store.stat(store.resolve(path))
    seconds = time.perf_counter() - started
    store.close()
    return seconds


def checkpoint(home: str) -> int:
    """Makes a checkpoint of the state as it is."""
    with Store(home, create=False) as store:
        store.checkpoint()
        return store.position


def die(home: str, events: int) -> None:
    """Changes attributes that many times and is killed, with everything acknowledged and nothing closed."""
    store = Store(home, create=False)
    logs.submit(store, [cmd.SetAttributes(ROOT, mtime=_START_NS + number) for number in range(events)])
    store.sync()
    os.kill(os.getpid(), signal.SIGKILL)


def make(home: str, files: int, events: int) -> float:
    """A store with a synthesised log, folded by the first open; says how long that took."""
    path = Path(home)
    path.mkdir()
    log = Log.open(RealDisk(), str(path / node.WAL), store_id=_STORE)
    entries = _entries(files, events)
    time_ns = _START_NS
    while batch := list(itertools.islice(entries, _BATCH_EVENTS)):
        time_ns = batch[-1].time_ns
        log.append(encode_batch(batch), time_ns=time_ns)
    log.close()
    started = time.perf_counter()
    with Store(home, create=False) as store:
        seconds = time.perf_counter() - started
        if store.applied().events != events:
            raise RuntimeError(f"{store.applied().events} events were folded instead of {events}")
    return seconds


def _entries(files: int, events: int) -> Iterator[Entry]:
    """One entry per command, with true chain links."""
    links: dict[bytes, bytes] = {}
    clock = itertools.count(_START_NS, _STEP_NS)

    def entry(*made: ev.Event) -> Entry:
        linked = []
        for event in made:
            link = links[event.capsule] = chain_link(links.get(event.capsule, NO_LINK), encode_event(event))
            linked.append((link, event))
        return Entry(b"", 0, next(clock), "bench", tuple(linked))

    yield entry(ev.StoreInitialised(bytes(ROOT), _STORE, 0o755, 0, 0))
    count, capsules = 1, []
    for each in logs.creations(files, ROOT, logs.Ids()):
        capsule = bytes(each.capsule)
        yield entry(
            ev.CapsuleCreated(capsule, int(each.kind), each.mode, 0, 0, 0, 0, 0, 0, 0, b""),
            ev.NameLinked(capsule, bytes(each.parent), each.name),
        )
        capsules.append(capsule)
        count += 2
    chance = random.Random(logs.SEED)
    for number in range(events - count):
        capsule = chance.choice(capsules)
        yield entry(ev.AttributesChanged(capsule, None, None, None, None, _START_NS + number))
