"""Which node of a cluster serves NFS, and how it knows that it still does."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from space._errors import UnavailableError
from space._node import member_vfs
from space._node.nfs_node import (
    LED_ELSEWHERE_SECONDS,
    REPLACED_SECONDS,
    SILENT_SECONDS,
    Claim,
    Standby,
    check_free,
    parse_claim,
    server_now,
)
from space._node.nfs_tenure import LOOK_SECONDS, Tenure, TenureRecovery
from space._node.store import Store
from space.events.commands import Request

pytestmark = pytest.mark.unit


def test_a_vacant_office_is_taken_after_a_while() -> None:
    """The leader at once, others a little later; where somebody is silent all wait; who was replaced stands back."""
    leader, other = Standby(), Standby()
    assert leader.may_begin(100.0, served=False, silent=False, leads=True)
    assert not other.may_begin(100.0, served=False, silent=False, leads=False)
    assert other.may_begin(100.0 + LED_ELSEWHERE_SECONDS, served=False, silent=False, leads=False)
    assert not leader.may_begin(100.0, served=False, silent=True, leads=True)
    assert leader.may_begin(100.0 + SILENT_SECONDS, served=False, silent=True, leads=True)
    assert not leader.may_begin(110.0, served=True, silent=False, leads=True)
    assert not leader.may_begin(111.0, served=False, silent=True, leads=True)
    leader.was_replaced(120.0)
    assert not leader.may_begin(120.0, served=False, silent=False, leads=True)
    assert leader.may_begin(120.0 + REPLACED_SECONDS, served=False, silent=False, leads=True)


@pytest.mark.parametrize(
    "answer", [None, [], [1], [1, 2], ["1", "a"], [True, "a"], [1, "a" * 256], [1, "a", 0], {"1": "a"}, 1]
)
def test_other_answers_are_no_claims(answer: Any) -> None:
    """What another node says is a claim or nothing."""
    assert parse_claim(answer) is None


def test_who_serves_is_who_claims_the_last_epoch() -> None:
    """A claim of an earlier epoch is out of date; one of a later epoch was made since the look at the log."""
    claims = {1: Claim(3, "a"), 2: parse_claim([4, "b"]), 3: None}
    assert server_now(claims, 4) == (2, Claim(4, "b"))
    assert server_now(claims, 3) == (2, Claim(4, "b"))
    assert server_now(claims, 5) is None
    assert server_now({1: Claim(0, "a")}, 0) is None


def test_an_address_that_is_taken_is_found_out_before() -> None:
    """A port in use, and an address of another machine, are refused; a free port is left free."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = ("127.0.0.1", taken.getsockname()[1])
        for wrong in (address, ("192.0.2.1", 2049), ("nowhere.invalid", 1)):
            with pytest.raises(UnavailableError):
                check_free(wrong)
    check_free(address)


class Quorum:
    """A store that stands for a member; ``answer`` says what becomes of a question to the quorum."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.now = 100.0
        self.asked = 0
        self.answer: Callable[[Future[None]], object] = lambda future: future.set_result(None)
        self.node = SimpleNamespace(is_stopping=False)
        self.group = self
        self._read = store._read

    def start_barrier(self, *, seconds: float) -> Future[None]:
        future: Future[None] = Future()
        self.asked += 1
        self.answer(future)
        return future

    def start(self, requests: list[Request], *, seconds: float) -> Future[Any]:
        return self.store.begin(requests)

    def tenure(self, epoch: int) -> Tenure:
        return Tenure(cast("Any", self), "server", epoch, clock=lambda: self.now)


@pytest.fixture
def quorum(tmp_path: Path) -> Iterator[Quorum]:
    """A quorum that answers."""
    with Store(tmp_path) as store:
        yield Quorum(store)


def test_of_two_that_follow_one_epoch_one_begins(quorum: Quorum) -> None:
    """The second one is refused, and the first serves until a start that follows its own."""

    async def scenario() -> None:
        one, two = quorum.tenure(1), quorum.tenure(1)
        assert [await one.begin(), await two.begin(), one.is_over] == [True, False, False]
        await one.confirm()
        assert await quorum.tenure(2).begin()
        with pytest.raises(UnavailableError, match="another node"):
            await one.look()

    asyncio.run(scenario())


def test_what_an_earlier_server_records_is_refused(quorum: Quorum) -> None:
    """It neither adds nor takes away who may claim state of its follower; what it could not record it still owes."""

    async def scenario() -> None:
        one, two = quorum.tenure(1), quorum.tenure(2)
        assert await one.begin()
        first = TenureRecovery(one)
        first.record(b"client", b"verifier")
        await first.sync()
        assert await two.begin()
        assert TenureRecovery(two).previous == {b"client": b"verifier"}
        first.forget(b"client")
        first.record(b"late", b"verifier")
        with pytest.raises(UnavailableError):
            await first.sync()
        assert first.dirty
        assert TenureRecovery(two).previous == {b"client": b"verifier"}

    asyncio.run(scenario())


def test_looks_share_a_question_and_grants_wait_for_one_of_their_own(quorum: Quorum) -> None:
    """A look is good for a while; a confirmation is of a question asked after it was wanted."""

    async def scenario() -> None:
        tenure = quorum.tenure(1)
        await tenure.begin()
        await tenure.look()
        assert quorum.asked == 0
        quorum.now += LOOK_SECONDS * 2
        await asyncio.gather(*(tenure.look() for _ in range(100)))
        assert quorum.asked == 1
        waiting: list[Future[None]] = []
        quorum.answer = waiting.append
        quorum.now += 1.0
        early = asyncio.create_task(tenure.confirm())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        quorum.now += 1.0
        late = asyncio.create_task(tenure.confirm())
        await asyncio.sleep(0)
        quorum.answer = lambda future: future.set_result(None)
        waiting[0].set_result(None)
        await early
        await late
        assert quorum.asked == 3

    asyncio.run(scenario())


def test_without_a_quorum_there_is_no_answer(quorum: Quorum) -> None:
    """A question that fails is an error to all that wait for it, and is asked again by the next one."""

    async def scenario() -> None:
        tenure = quorum.tenure(1)
        await tenure.begin()
        quorum.now += 1.0
        quorum.answer = lambda future: future.set_exception(UnavailableError("no leader"))
        found = await asyncio.gather(*(tenure.look() for _ in range(3)), return_exceptions=True)
        assert [type(each) for each in found] == [UnavailableError] * 3
        assert quorum.asked == 1
        quorum.answer = lambda future: future.set_result(None)
        await tenure.look()
        quorum.now += 1.0
        quorum.answer = lambda future: None
        quorum.node.is_stopping = True
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(member_vfs, "ALIVE_SECONDS", 0.01)
            with pytest.raises(UnavailableError, match="stopping"):
                await tenure.look()

    asyncio.run(scenario())
