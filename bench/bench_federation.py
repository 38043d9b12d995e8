"""``federation``: two zones, each a process, beside the bare path between them, rsync and NATS JetStream.

Shipping: what was put while the other zone was away, from the home's first question until the other zone has all of it
durably.  The path's limit is one TCP connection whose receiver writes a file and ends with an fdatasync.  rsync
copies the same files to a daemon, with an fsync each; NATS makes a mirror of a stream that has the same
content in messages.

Lag: from when a write is durable at home until it is in the other zone, at a steady load; beside it the same
load of bare messages on one TCP connection, with an fdatasync for those that come together, and the aim, two round
trips and one fdatasync, all measured in turn.

Both again over long lines between network namespaces that this makes (:mod:`bench.federation.line`), where packets are
delayed and lost.  And on the loopback what federation adds to a put, and what a failback moves.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

import attrs

from bench.federation.child import Child
from bench.federation.line import Route, line, missing
from bench.federation.peers import NATS, RSYNC, Jetstream, Rsync
from bench.federation.wire import make_keys
from bench.federation.zone import TREE, make_two, share
from bench.measure import ROUNDS, Row, Scale, in_turn
from bench.peers.programs import find, free_ports, wait_for

MIB: Final = 1 << 20
SMALL_BYTES: Final = 1 << 10
PUT_BYTES: Final = 4 << 10
PUT_AIM_US: Final = 100.0
SETTLED_SECONDS: Final = 2.0
"""After which a zone that is away is asked for seldom: the first attempts, one after the other, are no steady state."""

FAILBACK_AIM: Final = 1.01
STEP_BYTES: Final = 64 << 10
PARTS: Final = {"p50": 0.5, "p99": 0.99}


@attrs.frozen
class Load:
    """What is carried over one route; full and quick sizes.

    Attributes:
        large: bytes of one file.
        small: files of :data:`SMALL_BYTES`.
        rate: steady writes a second, of :data:`SMALL_BYTES`.
        seconds: how long those are made, in each round.
        probes: round trips and fdatasyncs that are measured, in each round.
    """

    large: tuple[int, int]
    small: tuple[int, int]
    rate: float
    seconds: tuple[int, int]
    probes: tuple[int, int]


LOOPBACK: Final = Load((128 * MIB, 4 * MIB), (2000, 50), 100.0, (8, 1), (200, 20))
LINES: Final = {
    (0.02, 0.01): Load((4 * MIB, MIB // 4), (500, 20), 20.0, (15, 2), (20, 5)),
    (0.2, 0.01): Load((MIB, MIB // 8), (200, 10), 20.0, (15, 2), (10, 3)),
}
"""By round trip, in seconds, and share of packets lost in each direction.

One TCP connection gets some 1 MB/s over the first and 0.1 over the second (Mathis et al. 1997), so loads are small.
"""


class Pair:
    """Two zones on a route, of which the first ships to the second."""

    def __init__(self, home: Path, route: Route, *, urls: Sequence[str] = ()) -> None:
        self.ports = free_ports(2)
        self._listen = [
            f"{side.address}:{port}"
            for side, port in zip((route.home, route.target), self.ports, strict=True)
        ]
        paths = [home / "zone-home", home / "zone-target"]
        make_two(paths, urls or [f"https://{each}" for each in self._listen])
        self._children: list[Child] = []
        try:
            for path, side in zip(paths, (route.home, route.target), strict=True):
                server = "bench.federation.zone:Zone"
                at = home / f"process-{path.name}"
                self._children.append(Child(at, server, str(path), prefix=side.prefix))
        except BaseException:
            self.close()
            raise
        self.home, self.target = self._children
        self._runs = 0

    def begin(self, *sides: Child) -> None:
        """Has zones ship and listen; both if none is named."""
        for child in sides or self._children:
            child.ask("begin", self._listen[self._children.index(child)])

    def label(self) -> str:
        """A name that was not used before."""
        self._runs += 1
        return f"run{self._runs}"

    def ship(self, directory: Path) -> float:
        """Seconds until the target has what was put while it was away.

        Raises:
            RuntimeError: what it has is something else.
        """
        self.target.ask("end")
        label = self.label()
        position = self.home.ask("put_files", label, str(directory))
        self.begin(self.target)
        arrivals = self.target.ask("arrived", position)
        path = f"{TREE}/{label}/{max(directory.iterdir()).name}"
        if self.home.ask("digest", path) != self.target.ask("digest", f"/zones/home{path}"):
            raise RuntimeError(f"{path} is not the same in both zones")
        return float(arrivals[-1][1] - self.target.ask("met"))

    def lags(self, rate: float, seconds: float) -> list[float]:
        """Seconds from durable at home to durable in the target, of each of many steady writes."""
        done = self.home.ask("steady", self.label(), SMALL_BYTES, rate, seconds)
        positions, moments = zip(*self.target.ask("arrived", done[-1][0]), strict=True)
        found = [moments[bisect.bisect_left(positions, position)] - moment for position, moment in done]
        return [max(0.0, each) for each in found]

    def close(self) -> None:
        """Ends both."""
        for child in self._children:
            child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Wires:
    """The bare path of a route."""

    def __init__(self, home: Path, route: Route, stack: contextlib.ExitStack) -> None:
        make_keys(home / "keys")
        self._address = route.target.address
        self._files = home
        sides = {"home": route.home, "target": route.target}
        self.home, self.target = (
            stack.enter_context(
                contextlib.closing(
                    Child(
                        home / f"wire-{name}",
                        "bench.federation.wire:Wire",
                        side.address,
                        str(home / "keys"),
                        prefix=side.prefix,
                    )
                )
            )
            for name, side in sides.items()
        )

    def send(self, directory: Path, *, file: bool = False, tls: bool = False) -> float:
        """Seconds until the other end has all files of a directory."""
        path = self._files / "sunk"
        port = self.target.ask("sink", str(path) if file else "", tls)
        took = float(self.home.ask("send", self._address, port, str(directory), tls))
        path.unlink(missing_ok=True)
        return took

    def lags(self, rate: float, seconds: float) -> list[float]:
        """Seconds from a message's way out until it is on the disk there."""
        path = self._files / "logged"
        port = self.target.ask("log", str(path), SMALL_BYTES)
        sent = self.home.ask("steady", self._address, port, SMALL_BYTES, rate, seconds)
        path.unlink()
        return [there - here for here, there in zip(sent, self.target.ask("taken"), strict=True)]

    def round_trips(self, count: int) -> list[float]:
        """Seconds each."""
        found: list[float] = self.home.ask("round_trips", self._address, self.target.ask("echo"), count)
        return found

    def fsyncs(self, count: int) -> list[float]:
        """Seconds each."""
        path = self._files / "probe"
        found: list[float] = self.target.ask("fsyncs", str(path), count)
        path.unlink()
        return found


def run(scale: Scale) -> list[Row]:
    """Shipping and lag by route, puts, and a failback."""
    rows: list[Row] = []
    with scale.workspace("federation") as home:
        rows += _route(scale, home / "loopback", Route("loopback"), LOOPBACK)
        why = missing()
        for (rtt_seconds, loss), load in LINES.items():
            label = f"{rtt_seconds * 1000:.0f} ms RTT, {loss:.0%} loss"
            if why:
                rows.append(Row(f"{label}: not run, {why}", "", 0.0))
                continue
            place = home / f"line{rtt_seconds * 1000:.0f}"
            with line(place, label, rtt_seconds=rtt_seconds, loss=loss) as route:
                rows += _route(scale, place, route, load)
        rows += _puts(scale, home / "puts")
        rows += _failback(scale, home / "failback")
    return rows


def _rounds(scale: Scale) -> int:
    return 1 if scale.quick else ROUNDS


def _route(scale: Scale, home: Path, route: Route, load: Load) -> list[Row]:
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        home.mkdir(exist_ok=True, parents=True)
        pair = stack.enter_context(Pair(home, route))
        wires = Wires(home, route, stack)
        pair.begin()
        pair.home.ask("shipped", pair.home.ask("position"))
        peers: dict[str, Callable[[Path], float]] = {}
        if find(RSYNC) is not None:
            peers["rsync"] = stack.enter_context(contextlib.closing(Rsync(home, route))).send
        if find(NATS) is not None:
            peers["NATS mirror"] = stack.enter_context(contextlib.closing(Jetstream(home, route))).send
        contest: dict[str, Callable[[Path], float]] = {
            "ours": pair.ship,
            "TCP": wires.send,
            "TLS 1.3": lambda path: wires.send(path, tls=True),
            "TCP into a file": lambda path: wires.send(path, file=True),
            **peers,
        }
        size, count = scale.pick(*load.large), scale.pick(*load.small)
        large = _files(home / "large", 1, size)
        what = f"{route.label}, {_size(size)} in one file"
        rows += _throughput(what, "MiB/s", size / MIB, large, contest, _rounds(scale))
        scale.note(f"federation: {what} done")
        small = _files(home / "small", count, SMALL_BYTES)
        what = f"{route.label}, {count:,} files of {_size(SMALL_BYTES)}"
        rows += _throughput(what, "files/s", count, small, contest, _rounds(scale))
        scale.note(f"federation: {what} done")
        rows += _lag(scale, route.label, pair, wires, load)
        scale.note(f"federation: {route.label}, lag done")
    return rows


def _files(directory: Path, count: int, size: int) -> Path:
    """A directory with files that do not compress."""
    directory.mkdir()
    for number in range(count):
        (directory / f"{number:06}").write_bytes(os.urandom(size))
    return directory


def _size(size: int) -> str:
    return f"{size / MIB:.3g} MiB" if size >= MIB else f"{size // 1024} KiB"


def _throughput(
    label: str,
    unit: str,
    amount: float,
    directory: Path,
    contest: Mapping[str, Callable[[Path], float]],
    rounds: int,
) -> list[Row]:
    """A row for each of the others; one that is missing says so."""
    seconds = in_turn(
        {name: lambda send=send: send(directory) for name, send in contest.items()},  # type: ignore[misc]
        rounds,
    )
    ours = amount / seconds.pop("ours")
    rows = [Row(label, unit, ours, name, amount / took) for name, took in seconds.items()]
    absent = [name for name in ("rsync", "NATS mirror") if name not in seconds]
    return rows + [Row(label, unit, ours, f"{name} (not installed)") for name in absent]


def _lag(scale: Scale, label: str, pair: Pair, wires: Wires, load: Load) -> list[Row]:
    seconds, probes = scale.pick(*load.seconds), scale.pick(*load.probes)
    found: dict[str, list[float]] = {name: [] for name in ("ours", "bare", "trips", "fsyncs")}
    for _ in range(_rounds(scale)):
        found["trips"] += wires.round_trips(probes)
        found["fsyncs"] += wires.fsyncs(probes)
        found["ours"] += pair.lags(load.rate, seconds)
        found["bare"] += wires.lags(load.rate, seconds)
    trip_ms = 1000 * statistics.median(found["trips"])
    rows = []
    for name, part in PARTS.items():
        ours, bare, fsync = (1000 * share(found[key], part) for key in ("ours", "bare", "fsyncs"))
        case = f"{label}, lag at {load.rate:.0f} writes a second, {name}"
        rows += [
            Row(case, "ms", ours, f"2 × RTT + fsync ({trip_ms:.3g}; {fsync:.3g})", 2 * trip_ms + fsync),
            Row(case, "ms", ours, "messages on TCP, fdatasync", bare),
        ]
    return rows


def _puts(scale: Scale, home: Path) -> list[Row]:
    """What puts and writes take: without federation, with the other zone away, and with it there."""
    count, turns = scale.pick(50, 10), scale.pick(8, 2)
    calls = {"puts": f"durable put of {_size(PUT_BYTES)}", "writes": f"buffered write of {_size(PUT_BYTES)}"}
    took: dict[tuple[str, str], list[float]] = {
        (call, place): [] for call in calls for place in ("off", "away", "there")
    }
    with Pair(home, Route("loopback")) as pair:

        def take(place: str) -> None:
            for call in calls:
                took[call, place] += pair.home.ask(call, pair.label(), count, PUT_BYTES)

        for _ in range(turns):
            take("off")
            pair.begin(pair.home)
            time.sleep(SETTLED_SECONDS)
            take("away")
            pair.begin(pair.target)
            pair.home.ask("shipped", pair.home.ask("position"))
            take("there")
            pair.home.ask("shipped", pair.home.ask("position"))
            pair.home.ask("end")
            pair.target.ask("end")
    scale.note("federation: puts done")
    middle = {name: 1e6 * statistics.median(values) for name, values in took.items()}
    rows = []
    for call, words in calls.items():
        off, away, there = (middle[call, place] for place in ("off", "away", "there"))
        rows += [
            Row(f"{words}, p50, the other zone away", "us", away, "no federation", off),
            Row(f"{words}, p50, the other zone there, on the same cores", "us", there, "no federation", off),
        ]
    added = max(0.0, middle["writes", "away"] - middle["writes", "off"])
    return [
        *rows,
        Row("what federation adds until a write is in the log, p50", "us", added, "aim", PUT_AIM_US),
    ]


def _failback(scale: Scale, home: Path) -> list[Row]:
    """Bytes that both zones send until the old home has what the new one did."""
    from tests.federation_support import Link

    base, suffix = scale.pick(64 * MIB, 2 * MIB), scale.pick(8 * MIB, MIB)
    home.mkdir()
    with Link() as first, Link() as second:
        links = (first, second)
        with Pair(home, Route("loopback"), urls=[each.url for each in links]) as pair:
            for each, port in zip(links, pair.ports, strict=True):
                each.heal(port)
            pair.begin()
            directory = _files(home / "base", 1, base)
            pair.home.ask("shipped", pair.home.ask("put_files", "base", str(directory)))
            pair.home.ask("end")
            path = f"{TREE}/base/000000"
            pair.home.ask("overwrite", path, suffix, STEP_BYTES)
            pair.target.ask("promote", "home")
            before = pair.target.ask("position")
            last = pair.target.ask("overwrite", f"/zones/home{path}", suffix, STEP_BYTES)
            logged = pair.target.ask("log_bytes", before, last)
            carried = [each.carried for each in links]
            pair.begin(pair.home)
            pair.target.ask("shipped", last)
            moved = sum(each.carried for each in links) - sum(carried)
            wait_for("the branch of the old home", lambda: pair.home.ask("branches") == 1)
            if pair.home.ask("digest", path) != pair.target.ask("digest", f"/zones/home{path}"):
                raise RuntimeError("the old home has not what the new one has")
    scale.note("federation: failback done")
    case = f"failback, {_size(suffix)} changed in both zones, of {_size(base)}: bytes sent"
    return [
        Row(case, "bytes", moved, "content of the differing suffix", suffix),
        Row(case, "bytes", moved, "its log, which has names and sums", logged),
        Row(case, "bytes", moved, "aim, that log and 1 %", FAILBACK_AIM * logged),
        Row(case, "bytes", moved, "everything anew", base),
    ]
