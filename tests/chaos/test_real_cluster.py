"""Three and five real nodes under clients of all of them: killed, stopped, cut off; nothing promised is lost."""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import time
from pathlib import Path

import pytest

from space._errors import UnavailableError
from space.events.ids import CapsuleId
from tests.chaos.damage import DAMAGES, SEGMENTS, lose_state, rot_state, segments
from tests.chaos.processes import LONG, Cluster, Network, eventually, needs_network, report
from tests.chaos.workload import Workload, seed_of

KILLS = 30 if LONG else 8
SECONDS_MIXED = 300.0 if LONG else 35.0
ELECTION_SECONDS = 2.5
"""Longer than any election takes, so that a leader that stood still for so long has a successor."""

pytestmark = [pytest.mark.requires("py:space_raft_engine")]


def kill_and_time(cluster: Cluster, load: Workload) -> tuple[int, float]:
    """Kills the leader; seconds until a command that was given after that is acknowledged."""
    leader = cluster.leader()
    survivor = random.Random(load.acknowledged).choice([node for node in cluster.up if node != leader])
    names = (f"/shared/after-{leader}-{load.acknowledged}-{number}" for number in itertools.count())
    cluster.kill(leader)
    killed = time.monotonic()
    eventually("a command after the kill", lambda: cluster.client(survivor, 60.0).mkdir(path=next(names)))
    return leader, time.monotonic() - killed


def test_killed_leaders_take_nothing_with_them(tmp_path: Path) -> None:
    """The leader is killed (-9) again and again: everything acknowledged stays, once, and another one leads soon."""
    times = []
    with Cluster(tmp_path) as cluster:
        with Workload(cluster, seed=seed_of("killed leaders")) as load:
            load.progress()
            for _ in range(KILLS):
                leader, seconds = kill_and_time(cluster, load)
                times.append(seconds)
                load.progress()
                cluster.start(leader)
                load.progress()
        report(load.check())
        report(
            f"{KILLS} kills of the leader; to the next acknowledged command: "
            f"median {statistics.median(times):.3f} s, min {min(times):.3f} s, max {max(times):.3f} s; "
            f"all: {' '.join(f'{each:.3f}' for each in times)}"
        )
        eventually("one term", lambda: len({cluster.here(node)["term"] for node in cluster.nodes}) == 1)


def test_killed_followers_do_not_stop_anybody(tmp_path: Path) -> None:
    """Followers are killed (-9), one at a time: commands go on without a pause for them, and they catch up."""
    with Cluster(tmp_path) as cluster:
        with Workload(cluster, seed=seed_of("killed followers")) as load:
            for _ in range(KILLS // 2):
                follower = cluster.followers()[0]
                cluster.kill(follower)
                load.progress()
                cluster.start(follower)
                load.progress()
        report(load.check())


def test_a_stopped_leader_that_comes_back_leads_nobody(tmp_path: Path) -> None:
    """SIGSTOP for longer than an election, SIGCONT: what the old leader still believes is promised to nobody."""
    with Cluster(tmp_path) as cluster:
        with Workload(cluster, seed=seed_of("stopped leader")) as load:
            for _ in range(3):
                load.progress()
                leader = cluster.leader()
                cluster.pause(leader)
                try:
                    time.sleep(ELECTION_SECONDS)
                    assert cluster.leader(but=leader)
                    load.progress()
                finally:
                    cluster.resume(leader)
                load.progress()
        report(load.check())


def test_one_of_three_promises_nothing(tmp_path: Path) -> None:
    """Two of three down: no command and no read is answered; they come back, and everything works."""
    with Cluster(tmp_path) as cluster:
        with Workload(cluster, seed=seed_of("two of three down"), patience=60.0) as load:
            load.progress()
            down = cluster.followers()
            (left,) = [node for node in cluster.nodes if node not in down]
            for node in down:
                cluster.kill(node)
            with pytest.raises(UnavailableError):
                cluster.client(left).stat(capsule=str(CapsuleId(load.shared)))
            before = load.acknowledged  # with what was under way when the second one went
            with pytest.raises(UnavailableError):
                cluster.client(left).mkdir(path="/alone")
            assert load.acknowledged == before, "promised by a minority"
            cluster.start(down[0])
            load.progress()
            cluster.start(down[1])
            load.progress()
        report(load.check())


@needs_network
def test_a_leader_cut_off_is_replaced(tmp_path: Path) -> None:
    """A leader alone on its side of a partition promises and shows nothing; the others go on without it."""
    with Cluster(tmp_path, namespaces=True) as cluster:
        assert cluster.network is not None
        with Workload(cluster, seed=seed_of("leader cut off")) as load:
            for _ in range(2):
                load.progress()
                leader = cluster.leader()
                others = [node for node in cluster.nodes if node != leader]
                cluster.network.part([leader], others)
                after = cluster.leader(but=leader)
                assert after != leader
                load.progress()
                with pytest.raises(UnavailableError):
                    cluster.client(leader).stat(capsule=str(CapsuleId(load.shared)))
                cluster.network.heal()
                load.progress()
        report(load.check())


@needs_network
def test_one_way_partitions_are_survived(tmp_path: Path) -> None:
    """Packets that pass in one direction only, to or from the leader: commands go on, before and after it is healed."""
    with Cluster(tmp_path, namespaces=True) as cluster:
        assert cluster.network is not None
        with Workload(cluster, seed=seed_of("one-way")) as load:
            for deaf in (True, False):
                load.progress()
                leader = cluster.leader()
                others = [node for node in cluster.nodes if node != leader]
                if deaf:
                    cluster.network.deafen(leader, others)
                else:
                    for other in others:
                        cluster.network.deafen(other, [leader])
                load.progress()
                cluster.network.heal()
                load.progress()
        report(load.check())


@needs_network
def test_lost_packets_cost_time_and_nothing_else(tmp_path: Path) -> None:
    """Packets lost on every link, so that all messages come late and in bursts: slower, and all the same right."""
    with Cluster(tmp_path, namespaces=True) as cluster:
        assert cluster.network is not None
        with Workload(cluster, seed=seed_of("lost packets")) as load:
            for node in cluster.nodes:
                cluster.network.impair(node, 0.03)
            load.progress(30)
            cluster.kill(leader := cluster.leader())
            load.progress(20)
            cluster.start(leader)
            cluster.network.heal()
            load.progress()
        report(load.check())


class Nemesis:
    """Draws what goes wrong next; at most a minority is down, stopped or cut off at a time."""

    def __init__(self, cluster: Cluster, rng: random.Random) -> None:
        self._cluster = cluster
        self._rng = rng
        self._deck: list[str] = []
        self.done: list[str] = []

    def _next(self) -> str:
        """Every kind of fault once, in any order, before one comes again."""
        if not self._deck:
            self._deck = ["kill", "stop", "pause", "damage", "part", "deafen", "impair"]
            self._rng.shuffle(self._deck)
        return self._deck.pop()

    def step(self) -> None:
        """One fault from its beginning to its end."""
        rng, cluster = self._rng, self._cluster
        count = rng.randint(1, (len(cluster.nodes) - 1) // 2)
        victims = rng.sample(sorted(cluster.nodes), count)
        if rng.random() < 0.5:
            victims[0] = cluster.leader()
            victims = sorted(set(victims))
        seconds = rng.choice((0.1, 0.5, 1.5, 3.0))
        what = self._next()
        self.done.append(f"{what} {victims} {seconds}")
        getattr(self, what)(victims, seconds)

    def kill(self, victims: list[int], seconds: float) -> None:
        """SIGKILL, and a new start."""
        for node in victims:
            self._cluster.kill(node)
        time.sleep(seconds)
        for node in victims:
            self._cluster.start(node)

    def damage(self, victims: list[int], seconds: float) -> None:
        """SIGKILL, damage to what is on disk, and a new start, which heals it from the others."""
        for node in victims:
            self._cluster.kill(node)
            home = self._cluster.nodes[node].home
            done = self._rng.choice(DAMAGES if len(segments(home)) > 2 else (rot_state, lose_state))
            self.done.append(f"node {node}: {done.__name__} {done(home, self._rng)}")
        time.sleep(seconds)
        for node in victims:
            self._cluster.start(node)
            self._mend(node)

    def _mend(self, node: int) -> None:
        """A start does not look at every byte: ``verify`` does, and what it cannot restore the next start heals.

        A node that comes upon the damage before that, as it has to send it to another one, ends by itself.
        """
        process = self._cluster.nodes[node]
        process.ended = True
        try:
            whole = not self._cluster.client(node, 60.0).verify(repair=True)["findings"]
        except UnavailableError:
            whole = False
        process.ended = False
        if not whole:
            self._cluster.kill(node)
            self._cluster.start(node)

    def stop(self, victims: list[int], seconds: float) -> None:
        """A clean end, and a new start."""
        for node in victims:
            self._cluster.stop(node)
        time.sleep(seconds)
        for node in victims:
            self._cluster.start(node)

    def pause(self, victims: list[int], seconds: float) -> None:
        """SIGSTOP and SIGCONT."""
        try:
            for node in victims:
                self._cluster.pause(node)
            time.sleep(seconds)
        finally:
            for node in victims:
                self._cluster.resume(node)

    def _others(self, victims: list[int]) -> list[int]:
        return [node for node in self._cluster.nodes if node not in victims]

    def _network(self) -> Network:
        assert self._cluster.network is not None
        return self._cluster.network

    def part(self, victims: list[int], seconds: float) -> None:
        """A partition."""
        self._network().part(victims, self._others(victims))
        time.sleep(seconds)
        self._network().heal()

    def deafen(self, victims: list[int], seconds: float) -> None:
        """A partition in one direction."""
        for node in victims:
            self._network().deafen(node, self._others(victims))
        time.sleep(seconds)
        self._network().heal()

    def impair(self, victims: list[int], seconds: float) -> None:
        """Lossy links."""
        for node in victims:
            self._network().impair(node, 0.1)
        time.sleep(seconds)
        self._network().heal()


@needs_network
def test_five_nodes_with_everything_going_wrong(tmp_path: Path) -> None:
    """Five nodes, faults of all kinds drawn from a seed, two nodes at a time: nothing promised is lost or doubled."""
    seed = seed_of("five nodes")
    with Cluster(tmp_path, 5, namespaces=True, options=SEGMENTS) as cluster:
        nemesis = Nemesis(cluster, random.Random(seed))
        with Workload(cluster, workers=4, seed=seed) as load:
            until = time.monotonic() + SECONDS_MIXED
            while time.monotonic() < until:
                load.progress(5)
                nemesis.step()
            load.progress()
        report(f"{len(nemesis.done)} faults: {'; '.join(nemesis.done)}")
        report(load.check())
        for node in list(cluster.nodes):
            report(f"node {node}: {cluster.here(node)}")
        with contextlib.suppress(UnavailableError):
            report(str(cluster.any(lambda client: client.probe_status())))
