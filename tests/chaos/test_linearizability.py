"""The checker itself: histories whose verdict is known, and small ones against brute force."""

from __future__ import annotations

import itertools
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.linearizability import (
    ABSENT,
    DIRECTORY,
    OK,
    PRESENT,
    REGISTER,
    Model,
    Operation,
    Verdict,
    check,
)


def op(call: tuple[Any, ...], result: Any, start: int, end: int | None, key: str = "x") -> Operation:
    """One operation."""
    return Operation(key, call, result, start, end)


YES = {
    "nothing": [],
    "one after the other": [op(("set", 1), OK, 1, 2), op(("read",), 1, 3, 4)],
    "a read during a write sees the old value": [op(("set", 1), OK, 1, 4), op(("read",), None, 2, 3)],
    "a read during a write sees the new value": [op(("set", 1), OK, 1, 4), op(("read",), 1, 2, 3)],
    "an open write takes effect late": [
        op(("set", 1), None, 1, None),
        op(("read",), None, 2, 3),
        op(("read",), 1, 4, 5),
    ],
    "an open write never takes effect": [op(("set", 1), None, 1, None), op(("read",), None, 2, 3)],
    "one of two creates wins": [op(("create", 1), OK, 1, 4), op(("create", 2), PRESENT, 2, 3)],
    "compare and set in a chain": [
        op(("set", 0), OK, 1, 2),
        op(("cas", 1, 2), True, 3, 8),
        op(("cas", 0, 1), True, 4, 7),
        op(("read",), 2, 9, 10),
    ],
    "keys have nothing to do with each other": [
        op(("set", 1), OK, 1, 2, "x"),
        op(("read",), None, 3, 4, "y"),
    ],
}
NO = {
    "a lost write": [op(("set", 1), OK, 1, 2), op(("read",), None, 3, 4)],
    "a stale read": [op(("set", 1), OK, 1, 2), op(("set", 2), OK, 3, 4), op(("read",), 1, 5, 6)],
    "a value from nowhere": [op(("read",), 7, 1, 2)],
    "new and then old, during one write": [
        op(("set", 1), OK, 1, 8),
        op(("read",), 1, 2, 3),
        op(("read",), None, 4, 5),
    ],
    "an open write that is undone": [
        op(("set", 1), None, 1, None),
        op(("read",), 1, 2, 3),
        op(("read",), None, 4, 5),
    ],
    "two creates that both win": [op(("create", 1), OK, 1, 4), op(("create", 2), OK, 2, 3)],
    "a removal of nothing": [op(("remove",), OK, 1, 2)],
}


@pytest.mark.parametrize("name", YES)
def test_a_linearizable_history_is_found_to_be(name: str) -> None:
    """A history with an order that explains it passes."""
    assert check(YES[name], REGISTER).verdict is Verdict.LINEARIZABLE


@pytest.mark.parametrize("name", NO)
def test_a_violation_is_found_and_named(name: str) -> None:
    """A history that no order explains is told with its key."""
    outcome = check(NO[name], REGISTER)
    assert (outcome.verdict, outcome.key) == (Verdict.VIOLATION, "x")


def test_a_directory_is_one_object() -> None:
    """Names of one directory hang together: a rename moves what is there, and its source is free then."""
    history = [
        op(("create", "a", 1), OK, 1, 2),
        op(("rename", "a", "b", False), OK, 3, 10),
        op(("lookup", "a"), 1, 4, 5),
        op(("lookup", "b"), 1, 6, 7),
        op(("create", "a", 2), OK, 8, 9),
        op(("exchange", "a", "b"), OK, 11, 12),
        op(("lookup", "a"), 1, 13, 14),
        op(("unlink", "b"), OK, 15, 16),
        op(("unlink", "b"), ABSENT, 17, 18),
        op(("rename", "a", "a2", True), OK, 19, 20),
        op(("create", "a2", 3), PRESENT, 21, 22),
    ]
    assert check(history, DIRECTORY).verdict is Verdict.LINEARIZABLE
    both = [*history[:3], op(("lookup", "b"), None, 11, 12)]
    assert check(both, DIRECTORY).verdict is Verdict.VIOLATION


def test_a_bound_that_is_reached_is_unknown_and_not_yes() -> None:
    """A history that would take too long has no verdict and says for which keys; a violation elsewhere counts."""
    many = [op(("set", number), OK, number, 100 + number, "wide") for number in range(1, 13)]
    history = [*many, op(("read",), 99, 200, 201, "wide")]
    outcome = check(history, REGISTER, configurations_max=100)
    assert (outcome.verdict, outcome.unknown) == (Verdict.UNKNOWN, ("wide",))
    wrong = op(("read",), 5, 300, 301, "other")
    assert check([*history, wrong], REGISTER, configurations_max=100).verdict is Verdict.VIOLATION


def test_a_long_history_of_honest_clients_is_quick() -> None:
    """Ten callers on one register for two thousand operations stay far below the bound."""
    rng, state, moment = Random(5), None, 0
    history: list[Operation] = []
    while len(history) < 2000:
        starts = {caller: (moment := moment + 1) for caller in range(rng.randint(1, 10))}
        for start in starts.values():
            call = rng.choice(
                [("read",), ("set", rng.randrange(50)), ("cas", rng.randrange(50), rng.randrange(50))]
            )
            result, state = REGISTER.step(state, call)
            history.append(op(call, result, start, (moment := moment + 1)))
    assert check(history, REGISTER, configurations_max=20_000).verdict is Verdict.LINEARIZABLE


def brute(history: list[Operation], model: Model[Any]) -> bool:
    """Whether any order of any choice of the open operations explains the history: the definition, tried out."""
    open_ones = [each for each in history if each.end is None]
    answered = [each for each in history if each.end is not None]
    for count in range(len(open_ones) + 1):
        for chosen in itertools.combinations(open_ones, count):
            for order in itertools.permutations([*answered, *chosen]):
                if _explains(order, model):
                    return True
    return False


def _explains(order: tuple[Operation, ...], model: Model[Any]) -> bool:
    state = model.initial
    for at, operation in enumerate(order):
        if any(later.end is not None and later.end < operation.start for later in order[at + 1 :]):
            return False
        result, state = model.step(state, operation.call)
        if operation.end is not None and result != operation.result:
            return False
    return True


CALLS = {
    "register": [
        *((("read",), value) for value in (None, 1, 2)),
        *((("set", value), OK) for value in (1, 2)),
        *((("create", 1), result) for result in (OK, PRESENT)),
        *((("remove",), result) for result in (OK, ABSENT)),
        *((("cas", 1, 2), result) for result in (True, False)),
    ],
    "directory": [
        *((("lookup", "a"), value) for value in (None, 1)),
        *((("lookup", "b"), value) for value in (None, 1)),
        *((("create", "a", 1), result) for result in (OK, PRESENT)),
        *((("rename", "a", "b", False), result) for result in (OK, ABSENT, PRESENT)),
        *((("unlink", "b"), result) for result in (OK, ABSENT)),
        *((("exchange", "a", "b"), result) for result in (OK, ABSENT)),
    ],
}


@given(st.data(), st.sampled_from(sorted(CALLS)))
def test_the_checker_agrees_with_brute_force(data: st.DataObject, kind: str) -> None:
    """On every small history the verdict is what trying all orders gives."""
    count = data.draw(st.integers(1, 5))
    moments = data.draw(st.permutations(range(2 * count)))
    history = []
    for number in range(count):
        call, result = data.draw(st.sampled_from(CALLS[kind]))
        start, end = sorted(moments[2 * number : 2 * number + 2])
        history.append(op(call, result, start, None if data.draw(st.integers(0, 3)) == 0 else end))
    model = REGISTER if kind == "register" else DIRECTORY
    expected = Verdict.LINEARIZABLE if brute(history, model) else Verdict.VIOLATION
    assert check(history, model).verdict is expected
