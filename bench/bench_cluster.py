"""``cluster``: three replicas on this machine's one disk, against three of etcd's and of NATS JetStream's.

Every system keeps so many operations in flight and counts what a quorum has durably; after each run every
replica must have all of it, and the replicas must be the same (by state digest, by key-value hash, by count).
What each acknowledgement means is said in ``bench/peers``.

A client of a peer is a process beside its servers.  Ours is the library in a node's process: in the leader's, and
in a follower's, from where every write goes to the leader and comes back, as a peer's client's does.
Without TLS, as the peers are; one more cluster of ours shows what mutual TLS costs.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol

from bench.measure import ROUNDS, Row, Scale
from bench.peers import etcd, nats
from bench.peers.load import Load, Measured
from bench.peers.ours import Ours
from bench.peers.programs import find

LOADS: Final = {
    "256 B, 64 in flight": (256, 64),
    "256 B, 512 in flight": (256, 512),
    "1 MiB, 16 in flight": (1 << 20, 16),
}
_LOAD_MILLISECONDS: Final = 5_000
_KILLS: Final = 10
_KILLS_OF_NATS: Final = 3  # it takes seconds each time, and no aim depends on it
_OURS_A_TURN: Final = 3  # ours is the median to be trusted most, and soon over
_FAILOVER_SECONDS_AIM: Final = 1.0
_PEERS: Final = ("etcd", "NATS")
_OURS: Final = {
    "leader": "client in the leader's process",
    "tasks": "asyncio tasks in the leader's process",
    "follower": "client in a follower's process",
    "TLS": "client in a follower's process, mutual TLS",
}


class Peer(Protocol):
    """Three running servers of another system."""

    def load(self, load: Load) -> Measured:
        """Carries out a load, and checks that every replica has what was acknowledged."""

    def failover(self) -> float:
        """Seconds from kill -9 of the leader to the next acknowledgement."""

    def close(self) -> None:
        """Ends the servers."""


_MAKERS: Final[Mapping[str, tuple[str, Callable[[Path], Peer]]]] = {
    "etcd": (etcd.PROGRAM, etcd.Etcd),
    "NATS": (nats.PROGRAM, nats.Nats),
}


def run(scale: Scale) -> list[Row]:
    """Throughput, latency and failover, by load and by where our client is."""
    rows: list[Row] = []
    with scale.workspace("cluster") as home, contextlib.ExitStack() as stack:
        plain = stack.enter_context(contextlib.closing(Ours(home)))
        secure = stack.enter_context(contextlib.closing(Ours(home, tls=True)))
        peers: dict[str, Peer] = {}
        for name, (program, make) in _MAKERS.items():
            if find(program) is None:
                scale.note(f"cluster: {program} is not installed")
                continue
            peers[name] = stack.enter_context(contextlib.closing(make(home)))
        contest: dict[str, Callable[[Load], Measured]] = {
            "leader": plain.load,
            "tasks": lambda load: plain.load(load, tasks=True),
            "follower": lambda load: plain.load(load, follower=True),
            "TLS": lambda load: secure.load(load, follower=True),
            **{name: peer.load for name, peer in peers.items()},
        }
        seconds = scale.pick(_LOAD_MILLISECONDS, 500) / 1000
        for label, (size, in_flight) in LOADS.items():
            rows += compare(label, size, in_turn(contest, Load(size, in_flight, seconds)))
            scale.note(f"cluster: {label} done")
        rows += _failover(scale, plain, peers)
    return rows


def in_turn(
    contest: Mapping[str, Callable[[Load], Measured]], load: Load, rounds: int = ROUNDS
) -> dict[str, Measured]:
    """The median of each figure over rounds in which every system runs once, in order."""
    found: dict[str, list[Measured]] = {name: [] for name in contest}
    for _ in range(rounds):
        for name, run_ in contest.items():
            found[name].append(run_(load))
    return {name: _median(runs) for name, runs in found.items()}


def _median(runs: list[Measured]) -> Measured:
    seconds = statistics.median(each.seconds for each in runs)
    return Measured(
        round(statistics.median(each.rate for each in runs) * seconds),
        seconds,
        statistics.median(each.p50_ms for each in runs),
        statistics.median(each.p99_ms for each in runs),
    )


def compare(label: str, size: int, found: Mapping[str, Measured]) -> list[Row]:
    """A row for each figure, each place of our client and each peer; a peer that is missing says so."""
    rows = []
    for place, words in _OURS.items():
        ours = found[place]
        for peer in _PEERS:
            theirs = found.get(peer)
            for what, unit, figure in _figures(size):
                value = None if theirs is None else figure(theirs)
                name = peer if theirs is not None else f"{peer} (not installed)"
                rows.append(Row(f"{label}, {words}: {what}", unit, figure(ours), name, value))
    return rows


def _figures(size: int) -> list[tuple[str, str, Callable[[Measured], float]]]:
    """What is said of a run: how it is called, its unit, how it is found."""
    rate: tuple[str, str, Callable[[Measured], float]] = (
        ("rate", "MiB/s", lambda found: found.rate * size / (1 << 20))
        if size >= 1 << 20
        else ("rate", "events/s", lambda found: found.rate)
    )
    return [rate, ("p50", "ms", lambda found: found.p50_ms), ("p99", "ms", lambda found: found.p99_ms)]


def _failover(scale: Scale, ours: Ours, peers: Mapping[str, Peer]) -> list[Row]:
    kills = scale.pick(_KILLS, 1)
    few = min(kills, _KILLS_OF_NATS)
    times: dict[str, list[float]] = {"ours": [], **{name: [] for name in peers}}
    for turn in range(kills):
        times["ours"] += [ours.failover() for _ in range(1 if scale.quick else _OURS_A_TURN)]
        for name, cluster in peers.items():
            if name != "NATS" or turn < few:
                times[name].append(cluster.failover())
        scale.note(f"cluster: {turn + 1} of {kills} kills")
    label = f"failover, kill -9 to next acknowledgement, {len(times['ours'])} kills"
    rows = []
    for peer in _PEERS:
        name = f"{peer}, {len(times[peer])} kills" if peer in times else f"{peer} (not installed)"
        for what, figure in _SUMMARIES.items():
            value = figure(times[peer]) if peer in times else None
            rows.append(Row(f"{label}: {what}", "s", figure(times["ours"]), name, value))
    rows.append(Row(f"{label}: median", "s", statistics.median(times["ours"]), "aim", _FAILOVER_SECONDS_AIM))
    return rows


_SUMMARIES: Final[Mapping[str, Callable[[list[float]], float]]] = {
    "median": statistics.median,
    "longest": max,
}
