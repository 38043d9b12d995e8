"""The nine rules of :mod:`space.replication.driver`: each with a control that breaks it and must be caught.

A simulation that finds nothing proves something only if it would have found it.  So each control runs the same seeds
twice: as it is, where all must hold, and with one rule broken, where at least one of the seeds must fail.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, cast
from unittest.mock import patch

import attrs
import pytest

from space.replication import replica as replica_module
from space.replication.driver import KIND_CHANGE, Driver, Persist, Settings, configuration
from space.replication.replica import Job, Replica
from space.statemachine.tables import REPLY, Overlay
from space.wal.raft_state import Configuration
from tests.chaos.sim import Member, Options, Simulation

pytestmark = pytest.mark.requires("py:space_raft_engine")

Broken = Callable[[], contextlib.AbstractContextManager[Any]]

_SETTINGS: Final = Settings(election=4, heartbeat=1, read_retry=3, snapshot_retry=20, retained=8)
ROUGH: Final = Options(
    nodes=3,
    ticks=120,
    clients=3,
    think=0.5,
    delay=0.2,
    drop=0.05,
    duplicate=0.05,
    straggle=0.02,
    disk=0.3,
    faults=(("crash", 4), ("partition", 3), ("pause", 1)),
    fault_every=4.0,
    checkpoint=3,
    settings=_SETTINGS,
)
MEMBERS: Final = attrs.evolve(ROUGH, faults=(("members", 6), ("crash", 2), ("partition", 1)), fault_every=3.0)
GROWING: Final = attrs.evolve(MEMBERS, nodes=1, faults=(("members", 5), ("crash", 4)), fault_every=2.5)
ALONE: Final = Options(
    nodes=1,
    ticks=400,
    clients=1,
    think=30.0,
    delay=0.05,
    disk=2.0,
    faults=(("members", 10), ("crash", 1)),
    fault_every=0.8,
    checkpoint=3,
    settings=attrs.evolve(_SETTINGS, retained=65_536),
)


class OneVoter(Simulation):
    """One voter with a slow disk and a learner with a fast one, and changes that change nothing.

    The voter leads as soon as it stands for election, and may send changes while its term is on its way to the
    disk.  Dying there, it leads the same term again, with other changes: they differ by their time.
    """

    def _disk_delay(self, member: Member) -> float:
        return super()._disk_delay(member) if member.id == 1 else 0.01

    def _some(self, *, running: bool) -> Member | None:
        return self.members[1] if self.members[1].replica is not None else None

    def _draw_changes(self, made: Configuration) -> list[tuple[str, int]]:
        return [("learner", 2)]


def failure(seed: int, options: Options, kind: type[Simulation] = Simulation) -> str:
    """What is wrong with a run; nothing if all holds."""
    try:
        kind(seed, options).run()
    except Exception as error:  # noqa: BLE001 - an engine that panics is as good a catch as a violation
        return f"{type(error).__name__}: {error}"
    return ""


def caught(
    broken: Broken, options: Options, seeds: Sequence[int], kind: type[Simulation] = Simulation
) -> str:
    """What the first failing seed shows with a rule broken; all hold without."""
    with broken():
        found = next(((seed, what) for seed in seeds if (what := failure(seed, options, kind))), None)
    assert found is not None, f"none of {len(seeds)} runs noticed"
    seed, what = found
    assert not failure(seed, options, kind), "it fails without that, too"
    return what


def driver(broken: type[Driver]) -> Broken:
    """Every replica with another driver."""
    return lambda: patch.object(replica_module, "Driver", broken)


def _proposed(self: Driver, change: bytes) -> int:
    """A change without any look at it; where it could not be, the caller is told as ever."""
    from space_raft_engine import Dropped

    try:
        return self._engine.propose_change(change)
    except Dropped:
        raise self.not_leader() from None


# --- broken drivers ---------------------------------------------------------------------------------------


class ChangesAtOnce(Driver):
    """Rule 2 broken: a configuration is in effect before it is durable."""

    def _configure(self) -> None:
        while self._committed and not self.must_reopen:
            entry = self._committed[0]
            if entry[2] != KIND_CHANGE or entry[0] <= self._effective:
                return
            after = self._preview(entry[4])
            if after is None:
                self._effective = entry[0]
                return
            kept = self._state
            self._state = attrs.evolve(kept, configuration=after)
            self._change(entry)
            self._state = kept
            return


class LeadsOnOutside(Driver):
    """Rule 3 broken: a leader removes itself, and goes on."""

    def change(self, change: bytes) -> int:
        after = self._preview(change)
        if after is None or not after.voters:
            raise self.not_leader()
        return _proposed(self, change)

    def _change(self, entry: Any) -> None:
        self._effective = entry[0]
        self._engine.apply_change(entry[0], entry[4])


class SpeaksFirst(Driver):
    """Rule 4 broken: what a new term or vote says leaves before they are durable."""

    @property
    def _fence(self) -> int:
        return 0

    @_fence.setter
    def _fence(self, number: int) -> None:
        pass


class TakesTheImpossible(Driver):
    """Rule 6 broken: no change is looked at before it is proposed, nor before it is applied."""

    def change(self, change: bytes) -> int:
        return _proposed(self, change)

    def _preview(self, change: bytes) -> Configuration | None:
        return configuration(self._engine.preview_change(change))


class StaysJoint(Driver):
    """Rule 7 broken: nobody leaves a joint configuration that the engine forgot."""

    def _leave_joint(self) -> None:
        pass


class AsksOnce(Driver):
    """Rule 8 broken: a ReadIndex that was lost is not asked again."""

    def tick(self) -> None:
        for read in self._reads.values():
            read.asked = self._ticks + 1
        super().tick()


class ForgetsCommit(Driver):
    """Rule 9 broken: a start trusts the commit index that was saved, which may have lost to what is applied."""

    def __init__(self, boot: Any, *arguments: Any, **named: Any) -> None:
        from space_raft_engine import Node

        named["engine"] = lambda **given: Node(**{**given, "commit": min(boot.state.commit, boot.last)})
        super().__init__(boot, *arguments, **named)


class SendsBeforePersist(Driver):
    """Acknowledges entries and votes to others before they are durable."""

    def _queue(self, persist: Persist) -> None:
        self._sends.extend(persist.then)
        persist.then = []
        super()._queue(persist)


@contextlib.contextmanager
def another_configuration() -> Iterator[None]:
    """Rule 5 broken: a snapshot comes with the members of another index than its own: those of the receiver."""
    take = Simulation._take

    def broken(self: Simulation, member: Member, batches: list[Any], offer: Any) -> bool:
        state = member.running.state_file.state
        assert state is not None
        return take(self, member, batches, attrs.evolve(offer, configuration=state.configuration))

    with patch.object(Simulation, "_take", broken):
        yield


@contextlib.contextmanager
def batched_appends() -> Iterator[None]:
    """Rule 1 broken: the engine merges append messages."""
    from space_raft_engine import Node

    start = Driver.__init__

    def broken(self: Driver, *arguments: Any, **named: Any) -> None:
        start(self, *arguments, **{**named, "engine": partial(cast("Any", Node), batch_append=True)})

    with patch.object(Driver, "__init__", broken):
        yield


@contextlib.contextmanager
def early_answers() -> Iterator[None]:
    """Answers are given when they are decided, not when they are committed."""
    settle = Replica._settle

    def broken(self: Replica) -> None:
        for answer in self._answers:
            answer.position = 0
        settle(self)

    with patch.object(Replica, "_settle", broken):
        yield


@contextlib.contextmanager
def no_reply_cache() -> Iterator[None]:
    """A retry finds no trace of what was applied before."""
    get = Overlay.get

    def broken(self: Overlay, table: int, key: bytes) -> bytes | None:
        return None if table == REPLY else get(self, table, key)

    with patch.object(Overlay, "get", broken):
        yield


def stale_reads() -> contextlib.AbstractContextManager[Any]:
    """A read looks at what is here, without asking a quorum."""
    return patch.object(Replica, "read", lambda self, done: self._done.append(lambda: done(None)))


def no_fsync() -> contextlib.AbstractContextManager[Any]:
    """Nothing is synced."""
    return patch.object(Job, "sync", lambda self: None)


# --- the nine rules -----------------------------------------------------------------------------------------

SEEDS: Final = range(40)
"""As many as each control needs, with a margin; one that is caught early does not look at the rest."""


def test_rule_1_appends_are_not_merged_by_the_engine() -> None:
    """With the engine's batch_append, reordered messages break it; without, the same runs hold."""
    options = attrs.evolve(
        ROUGH,
        lazy=0.7,
        straggle=0.3,
        duplicate=0.3,
        think=0.1,
        delay=0.4,
        clients=4,
        settings=attrs.evolve(ROUGH.settings, message_bytes=1, inflight=64),
    )
    assert "after (" in caught(batched_appends, options, SEEDS)  # entries that do not follow what they follow


def test_rule_2_a_configuration_is_durable_before_it_counts() -> None:
    """A configuration that a crash can take back lets two leaders into one term, or leaves members apart."""
    assert "Violation" in caught(driver(ChangesAtOnce), GROWING, SEEDS)


def test_rule_3_a_leader_hands_over_before_it_leaves() -> None:
    """An engine that leads a group it is not in breaks."""
    assert "the engine broke an invariant" in caught(driver(LeadsOnOutside), MEMBERS, SEEDS)


def test_rule_4_a_term_is_durable_before_it_is_spoken_of() -> None:
    """A leader whose term was not durable leads the same term again, with other entries at the same places."""
    assert "log matching" in caught(driver(SpeaksFirst), ALONE, SEEDS, OneVoter)


def test_rule_5_a_snapshot_has_the_members_of_its_own_index() -> None:
    """A replica that gets the log of one index and the members of another is of another group than its peers."""
    assert "Violation" in caught(another_configuration, MEMBERS, SEEDS)


def test_rule_6_impossible_changes_are_not_carried_out() -> None:
    """A change that leaves no voter stops everybody who tries to apply it."""
    assert "removed all voters" in caught(driver(TakesTheImpossible), MEMBERS, SEEDS)


def test_rule_6_an_impossible_change_in_the_log_changes_nothing() -> None:
    """Proposed unchecked by a careless leader and committed, it is skipped by everybody alike."""

    class Careless(Driver):
        change = TakesTheImpossible.change

    with driver(Careless)():
        assert [what for seed in range(10) if (what := failure(seed, MEMBERS))] == []


def test_rule_7_a_joint_configuration_is_left() -> None:
    """Without the leader's look at it, a group stays joint for ever."""
    assert "joint configuration" in caught(driver(StaysJoint), MEMBERS, SEEDS)


def test_rule_8_a_lost_read_is_asked_again() -> None:
    """Without a retry, a read whose message was lost never has an answer."""
    assert "have no answer" in caught(driver(AsksOnce), ROUGH, SEEDS)


def test_rule_9_what_is_applied_is_committed_after_a_restart() -> None:
    """An engine started with less committed than applied refuses to start."""
    assert "not in order" in caught(driver(ForgetsCommit), ROUGH, SEEDS)


# --- further promises ---------------------------------------------------------------------------------------


def test_what_is_said_is_durable_first() -> None:
    """A follower that forgets what it said it has, is found out by the leader's commit index."""
    assert caught(driver(SendsBeforePersist), ROUGH, SEEDS)


@pytest.mark.parametrize(
    "broken, options, what",
    [
        (early_answers, ROUGH, "acknowledged is committed"),
        (no_reply_cache, ROUGH, "applied once"),
        (stale_reads, ROUGH, "linearizable"),
        (no_fsync, ROUGH, "applied is durable"),
    ],
    ids=["answer before commit", "no reply cache", "stale reads", "no fsync"],
)
def test_a_broken_promise_is_seen(broken: Broken, options: Options, what: str) -> None:
    """Each promise of the program to its callers, broken on purpose, is named by the check for it."""
    assert what in caught(broken, options, SEEDS)
