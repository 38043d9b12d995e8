"""What the nodes of a cluster that serve one NVMe subsystem have apart, and what they tell hosts of each other."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space._errors import UnavailableError, UsageError
from space._node.nvme_node import (
    LEADERLESS_SECONDS,
    PORTS_MAX,
    SLOTS,
    Leadership,
    Portals,
    ana_state,
    check_apart,
    controller_ids,
    first_port,
    parse_portals,
)
from space.projections.nvme.target import CONTROLLER_IDS, CONTROLLERS_MAX, AnaState, Port, Referral
from space.wal.raft_state import Configuration

pytestmark = pytest.mark.unit


def test_nodes_have_numbers_apart() -> None:
    """No two nodes of as many as can serve share a controller's or a port's number, and all are allowed ones."""
    nodes = range(1, SLOTS + 1)
    ranges = [set(controller_ids(node)) for node in nodes]
    assert all(len(each) == CONTROLLERS_MAX and each <= set(CONTROLLER_IDS) for each in ranges)
    assert len(set(itertools.chain.from_iterable(ranges))) == SLOTS * CONTROLLERS_MAX
    assert len({first_port(node) + offset for node in nodes for offset in (0, 1)}) == 2 * SLOTS
    check_apart(nodes)
    with pytest.raises(UsageError, match=f"nodes 2 and {SLOTS + 2}"):
        check_apart([1, 2, SLOTS + 2])


@pytest.mark.parametrize(
    "leads, leader, leaderless, usable, state",
    [
        (True, 1, 0.0, True, AnaState.OPTIMIZED),
        (False, 2, 0.0, True, AnaState.NON_OPTIMIZED),
        (False, 0, LEADERLESS_SECONDS / 2, True, AnaState.NON_OPTIMIZED),
        (False, 0, LEADERLESS_SECONDS, True, AnaState.INACCESSIBLE),
        (True, 1, 0.0, False, AnaState.INACCESSIBLE),
    ],
)
def test_the_state_of_a_path(
    leads: bool, leader: int, leaderless: float, usable: bool, state: AnaState
) -> None:
    """A leader's path is optimized; an election is waited out; without a leader, or a replica, there is no path."""
    found = ana_state(leads=leads, leader=leader, leaderless_seconds=leaderless, usable=usable)
    assert found == state


def test_a_leader_is_missed_for_a_while() -> None:
    """The time without a leader begins when the last one was known, for each shard by itself."""
    state = SimpleNamespace(configuration=Configuration(voters=(1, 2)))
    drivers = [SimpleNamespace(leader=number, node=1, state=state) for number in (1, 2)]
    stores = [
        SimpleNamespace(
            group=SimpleNamespace(
                failure=None,
                stopped=False,
                replica=SimpleNamespace(driver=driver, leads=lambda driver=driver: driver.leader == 1),
            )
        )
        for driver in drivers
    ]
    leadership = Leadership(cast("Any", stores))
    assert leadership.states(100.0) == [AnaState.OPTIMIZED, AnaState.NON_OPTIMIZED]
    drivers[0].leader = 0
    assert leadership.states(100.5) == [AnaState.NON_OPTIMIZED] * 2
    assert leadership.states(101.0) == [AnaState.INACCESSIBLE, AnaState.NON_OPTIMIZED]
    drivers[0].leader = 2
    stores[1].group.failure = UnavailableError("ended")
    assert leadership.states(102.0) == [AnaState.NON_OPTIMIZED, AnaState.INACCESSIBLE]
    assert Leadership(cast("Any", stores[:1])).states(5000.0) == [AnaState.NON_OPTIMIZED]
    state.configuration = Configuration(voters=(2,))  # this node was removed
    assert leadership.states(103.0) == [AnaState.INACCESSIBLE] * 2


def test_what_other_nodes_say_is_told() -> None:
    """Ports have numbers of their node, wildcards its host; a silent member stays, one that left or ended goes."""
    portals = Portals()
    hosts = {2: "192.0.2.2", 3: "192.0.2.3"}
    portals.learn(
        hosts, {2: [["0.0.0.0", 4420, False], ["0.0.0.0", 8009, True]], 3: [["192.0.2.9", 4420, False]]}
    )
    ports, referrals = portals.told()
    assert ports == [
        Port(3, "192.0.2.2", 4420), Port(4, "192.0.2.2", 8009, discovery_only=True), Port(5, "192.0.2.9", 4420),
    ]  # fmt: skip
    assert referrals == [
        Referral("192.0.2.2", 8009, number=4, same=True), Referral("192.0.2.9", 4420, number=5, same=True),
    ]  # fmt: skip
    portals.learn(hosts, {3: []})
    assert [each.number for each in portals.told()[0]] == [3, 4]
    portals.learn({3: "192.0.2.3"}, {})
    assert portals.told() == ([], [])


@given(
    st.recursive(st.none() | st.integers() | st.text(max_size=9) | st.booleans(), st.lists, max_leaves=12)
    | st.lists(
        st.tuples(st.text(max_size=300) | st.just("a"), st.integers(-9, 99999), st.booleans()), max_size=20
    )
)
def test_any_answer_is_ports_or_nothing(answer: object) -> None:
    """Whatever a peer says: a bounded number of ports that fit a log entry."""
    found = parse_portals(answer, "192.0.2.1")
    assert len(found) <= PORTS_MAX
    for number, port in enumerate(found, 1):
        assert (port.number, 0 < port.service < 1 << 16, len(port.address.encode("ascii")) < 256) == (
            number, True, True,
        )  # fmt: skip
