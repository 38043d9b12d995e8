"""What a member of a group looks for in the batches it folds, and how far it folds them when it is opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Literal

import pytest

from space._node.history import LIVE
from space._node.member import _RECLAIM_MARK, Member, MemberMachine
from space.events.codec import NO_LINK, Entry, encode_batch
from space.events.ids import CLUSTER
from space.events.registry import BY_CLASS
from space.events.types import CapsuleDeleted, PayloadReclaimed
from space.replication.driver import Settings
from space.replication.replica import EMPTY_BATCH, Replica, encode_change_batch, encode_change_context
from space.statemachine.store import SEAL
from space.wal.disk import RealDisk
from space.wal.log import Log
from space.wal.raft_state import Configuration, RaftState, RaftStateFile

pytestmark = pytest.mark.unit


def test_a_batch_that_reclaims_payload_is_recognised_without_decoding_it() -> None:
    """The bytes looked for are in every batch with such an event, whatever is before it, and not in one without."""
    deleted = (NO_LINK, CapsuleDeleted(CLUSTER))
    reclaimed = (NO_LINK, PayloadReclaimed(CLUSTER, bytes(16)))
    for before in (0, 1, 20):
        entries = [Entry(b"", 0, 7, "gc", (deleted,))] * before
        assert _RECLAIM_MARK not in encode_batch(entries)
        assert _RECLAIM_MARK in encode_batch([*entries, Entry(b"", 0, 7, "gc", (deleted, reclaimed))])


def test_the_mark_is_of_every_version_of_the_event() -> None:
    """A new version of the event begins with other bytes, which a member has to look for too."""
    assert BY_CLASS[PayloadReclaimed].version == 1


def running(member: Member) -> Replica:
    """The consensus of a member that is alone, after it has done all it can do by itself."""
    replica = Replica(
        log=member.wal,
        state_file=member.state_file,
        machine=MemberMachine(member),
        settings=Settings(),
        random=Random(1),
        incarnation=1,
    )
    for now in range(100):
        replica.tick()
        while jobs := replica.work(now).jobs:
            for job in jobs:
                job.write()
                job.sync()
                replica.written(job)
    return replica


@pytest.mark.requires("py:space_raft_engine")
@pytest.mark.parametrize("voters", [(1,), (1, 2)], ids=["alone", "of two"])
@pytest.mark.parametrize("clean", [True, False], ids=["closed", "killed"])
def test_a_change_of_members_is_not_folded_before_it_is_in_effect(
    tmp_path: Path, voters: tuple[int, ...], clean: bool
) -> None:
    """A process that ended with a change known to be committed, and not yet durable as its configuration, lost nothing.

    The next one brings it into effect, whatever is left of the tables.
    """
    from space_raft_engine import encode_change

    store = bytes(range(16))

    def change(role: Literal["add", "learner"], nodes: Sequence[int], time_ns: int) -> bytes:
        addresses = {node: f"127.0.0.1:{node}" for node in nodes}
        made = encode_change(
            [(role, node) for node in nodes], context=encode_change_context(time_ns, addresses)
        )
        return encode_change_batch(made, time_ns)

    Member(tmp_path, node=1, store=store).close()
    log = Log.open(RealDisk(), str(tmp_path / "wal"), store_id=store)
    log.append(change("add", voters, 1), time_ns=1, term=1)
    log.append(EMPTY_BATCH, time_ns=1, term=1)
    log.sync()
    log.close()
    state = RaftStateFile.open(RealDisk(), str(tmp_path / "wal"), store_id=store)
    state.save(RaftState(1, 1, 1, 2, Configuration(voters), 1), sync=True)
    state.close()
    member = Member(tmp_path, node=1, store=store)
    assert member.applied_now.position == 2
    for number, each in enumerate((change("learner", [7], 2), EMPTY_BATCH), 3):
        assert member.wal.append(each, time_ns=2, term=1) == number
    member.wal.sync()
    member.close()
    if not clean:
        (tmp_path / LIVE / SEAL).unlink()
    state = RaftStateFile.open(RealDisk(), str(tmp_path / "wal"), store_id=store)
    state.save(RaftState(1, 1, 1, 4, Configuration(voters), 1), sync=True)
    state.close()

    member = Member(tmp_path, node=1, store=store)
    try:
        assert member.applied_now.position == 2
        replica = running(member)
        assert replica.driver.configuration == Configuration(voters, (7,))
        assert member.state_file.state is not None
        assert member.state_file.state.configuration_index == 3
        assert member.applied_now.position >= 4
        assert set(member.members()) == {*voters, 7}
    finally:
        member.close()
