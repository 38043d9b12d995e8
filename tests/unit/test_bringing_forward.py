"""A replica that is sent a log: what goes wrong there, and what goes wrong here."""

from __future__ import annotations

import asyncio
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from space._errors import CorruptionError, SpaceError, StorageError, UnavailableError
from space.replication.group import Group
from space.replication.node import Node, Parts
from space.replication.replica import Offer
from space.wal.raft_state import Configuration, RaftState

pytestmark = pytest.mark.unit


class Behind:
    """A group of an empty log, its replica, and its host."""

    number = 0
    stopped = False
    writing = 0

    def __init__(self, restart: SpaceError | None = None) -> None:
        self.failure: SpaceError | None = None
        self.restarted = 0
        self.healings = 0
        self._restart = restart
        self.log = SimpleNamespace(last_index=0)
        self.state_file = SimpleNamespace(state=RaftState(2, 1, 0, 0, Configuration(), 0))

    @property
    def replica(self) -> Any:
        return self

    def reopen(self, incarnation: int) -> None:
        """Begins anew, if it can."""
        self.restarted += 1
        if self._restart is not None:
            raise self._restart

    def fail(self, error: SpaceError) -> None:
        """Ends."""
        self.failure = error

    def heal_later(self) -> None:
        """Noted."""
        self.healings += 1


def brought(behind: Behind, error: SpaceError) -> tuple[Node, bool]:
    """The node of that group, after a peer answered with an error; and whether the group was brought forward."""
    node = Node(id=2, cluster=bytes(16), listen=("127.0.0.1", 0), tls=None, random=Random(1))
    node.parts[0] = Parts(cast("Group", behind), cast("Any", behind))

    async def request(*_: Any, **__: Any) -> Any:
        raise error

    vars(node.transport)["request"] = request
    offer = Offer(sender=1, index=9, index_term=1, term=1, configuration=Configuration((1, 2)))
    return node, asyncio.run(node._bring_forward(cast("Group", behind), offer))


@pytest.mark.parametrize("error", [CorruptionError("rot"), StorageError("closed"), UnavailableError("gone")])
def test_what_is_wrong_at_a_peer_is_not_wrong_here(error: SpaceError) -> None:
    """Whatever the peer that ships met, the replica goes on as before and is shipped to again."""
    behind = Behind()
    _, done = brought(behind, error)
    assert not done
    assert (behind.failure, behind.restarted, behind.stopped) == (None, 1, False)


def test_a_replica_that_cannot_begin_anew_ends() -> None:
    """Where what is here was changed, and consensus cannot be begun anew on it, it does not go on with the old one."""
    error = CorruptionError("rot of its own")
    behind = Behind(restart=error)
    _, done = brought(behind, UnavailableError("gone"))
    assert not done
    assert behind.failure is error


def test_a_replica_that_ends_for_damage_heals_at_the_next_start() -> None:
    """Whoever meets damage in the log of this node, the next start looks at all of it."""
    behind = Behind()
    ended: list[SpaceError] = []
    node, _ = brought(behind, UnavailableError("gone"))
    vars(node)["_on_fatal"] = ended.append
    node.failed(cast("Group", behind), StorageError("no room"))
    assert behind.healings == 0
    node.failed(cast("Group", behind), CorruptionError("rot"))
    assert behind.healings == 1
    assert len(ended) == 2
