"""Calls on their way through a group: each gets an outcome, whatever becomes of the leader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import attrs

from space._errors import NotLeaderError, StorageError, UnavailableError
from space.events import commands as cmd
from space.events.commands import Request
from space.replication.group import CALL_SECONDS, Group
from space.replication.node import Node
from space.replication.replica import Replica


@attrs.define
class FakeNode:
    """A node whose loop is this thread, and whose clock is a number."""

    id: int = 1
    time: float = 0.0
    is_stopping: bool = True

    def now(self) -> float:
        """The clock."""
        return self.time

    def call_soon(self, function: Callable[..., object], *arguments: Any) -> None:
        """At once."""
        function(*arguments)

    def call_later(self, seconds: float, function: Callable[..., object], *arguments: Any) -> None:
        """At once, too."""
        function(*arguments)

    def schedule(self, group: Group) -> None:
        """Nobody works."""

    def failed(self, group: Group, error: Exception) -> None:
        """Noted by the group itself."""


@attrs.define
class FakeDriver:
    """Knows of no leader."""

    leader: int = 0


@attrs.define
class FakeReplica:
    """A replica that takes tickets and never decides them."""

    leading: bool
    driver: FakeDriver = attrs.field(factory=FakeDriver)
    tickets: list[Any] = attrs.field(factory=list)

    def leads(self) -> bool:
        """As it was made."""
        return self.leading

    def submit(self, ticket: Any) -> None:
        """Kept for ever."""
        self.tickets.append(ticket)


def group_of(node: FakeNode, *, leading: bool) -> Group:
    """A group of a replica that decides nothing."""
    return Group(cast("Node", node), 0, cast("Replica", FakeReplica(leading)), random_bytes=bytes)


REQUEST = Request(cmd.DropSnapshot("s"))


def test_a_call_that_finds_no_leader_ends_when_its_time_is_over() -> None:
    """On a node that knows of no leader a caller waits for its time and no longer, and nothing is kept of the call."""
    node = FakeNode()
    group = group_of(node, leading=False)
    first = group.start([REQUEST])
    node.time = 1.0
    second = group.start([REQUEST])
    group.expire()
    assert not first.done()
    node.time = CALL_SECONDS
    group.expire()
    assert isinstance(first.result(0)[0], UnavailableError)
    assert not second.done()
    node.time = CALL_SECONDS + 1.0
    group.expire()
    assert isinstance(second.result(0)[0], UnavailableError)
    assert not group._homeless


def test_a_call_that_is_never_decided_ends_when_its_time_is_over() -> None:
    """A leader that cannot commit keeps nobody waiting for ever; what it says later is too late."""
    node = FakeNode()
    group = group_of(node, leading=True)
    call = group.start([REQUEST, REQUEST])
    node.time = CALL_SECONDS
    group.expire()
    assert [type(each) for each in call.result(0)] == [UnavailableError, UnavailableError]
    (ticket,) = cast("FakeReplica", group.replica).tickets
    ticket.done([NotLeaderError("late"), NotLeaderError("late")])
    assert not group._calls


def test_a_replica_that_fails_tells_everybody() -> None:
    """All that wait, decided or not, hear why their replica ended."""
    for leading in (False, True):
        group = group_of(FakeNode(), leading=leading)
        call = group.start([REQUEST])
        group.fail(StorageError("the disk is gone"))
        (outcome,) = call.result(0)
        assert "the disk is gone" in str(outcome)
