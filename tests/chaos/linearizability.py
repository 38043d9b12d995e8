"""Is a history of concurrent operations linearizable?  A decision, not an impression.

The algorithm is that of Wing and Gong ("Testing and verifying concurrent objects", 1993) with the memoised
configurations of Lowe ("Testing for linearizability", 2017), as in Porcupine (Athalye, 2017): walk along the
events of the history, try to let each pending operation take effect next, go back where its result does not fit,
and never look twice at the same set of done operations with the same state.  It is exponential in the worst case, so
there is a bound on the configurations looked at, and beyond it the answer is *unknown*, which is told apart from yes.

A history is split by key first: it is linearizable if its part for each key is (locality: Herlihy and Wing,
"Linearizability: a correctness condition for concurrent objects", 1990).

An operation whose caller was never answered may have taken effect at any time after its call, or never.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Final, Generic, TypeVar

import attrs

State = TypeVar("State", bound=Hashable)

CONFIGURATIONS_MAX: Final = 200_000
"""Configurations looked at for one key: a second or so; a history that needs more is cut shorter by its maker."""


class Verdict(enum.Enum):
    """What is known of a history."""

    LINEARIZABLE = "linearizable"
    VIOLATION = "not linearizable"
    UNKNOWN = "unknown"


@attrs.frozen
class Operation:
    """One call as its caller saw it.

    Attributes:
        key: object it was on.
        call: what was asked.
        result: what was answered; meaningless while ``end`` is None.
        start: when it was called; any numbers that grow, different for every event of the history.
        end: when it was answered, None if it never was.
    """

    key: Hashable
    call: Any
    result: Any
    start: int
    end: int | None


@attrs.frozen
class Model(Generic[State]):
    """A sequential object.

    Attributes:
        initial: its state at first.
        step: (state, call) → (result, state after).
    """

    initial: State
    step: Callable[[State, Any], tuple[Any, State]]


@attrs.frozen
class Outcome:
    """What :func:`check` found.

    Attributes:
        verdict: of the whole history; a violation of one key outweighs an unknown of another.
        key: where the violation (or the unknown) is.
        unknown: keys that would have taken too long.
        longest: of a violation, the most operations that could be brought in order, in that order.
    """

    verdict: Verdict
    key: Hashable = None
    unknown: tuple[Hashable, ...] = ()
    longest: tuple[Operation, ...] = ()


def check(
    history: Iterable[Operation], model: Model[Any], *, configurations_max: int = CONFIGURATIONS_MAX
) -> Outcome:
    """Whether each key's part of ``history`` is linearizable with respect to ``model``."""
    by_key: dict[Hashable, list[Operation]] = {}
    for operation in history:
        by_key.setdefault(operation.key, []).append(operation)
    unknown: list[Hashable] = []
    for key, operations in by_key.items():
        verdict, longest = _check_key(operations, model, configurations_max)
        if verdict is Verdict.VIOLATION:
            return Outcome(verdict, key, longest=longest)
        if verdict is Verdict.UNKNOWN:
            unknown.append(key)
    if unknown:
        return Outcome(Verdict.UNKNOWN, unknown[0], tuple(unknown))
    return Outcome(Verdict.LINEARIZABLE)


class _Event:
    """A call or a return in a doubly linked list, so that an operation is lifted out and put back in O(1)."""

    __slots__ = ("following", "number", "operation", "preceding", "returns")

    def __init__(self, operation: Operation | None, number: int, returns: _Event | None) -> None:
        self.operation = operation
        self.number = number
        self.returns = returns  # of a call: its return; None for a return, and for a call never answered
        self.preceding: _Event | None = None
        self.following: _Event | None = None

    def lift(self) -> None:
        """Takes a call and its return out of the list."""
        for event in (self, self.returns):
            if event is not None:
                assert event.preceding is not None
                event.preceding.following = event.following
                if event.following is not None:
                    event.following.preceding = event.preceding

    def unlift(self) -> None:
        """Puts both back where they were; in the opposite order of lifting."""
        for event in (self.returns, self):
            if event is not None:
                assert event.preceding is not None
                event.preceding.following = event
                if event.following is not None:
                    event.following.preceding = event


def _events(operations: Sequence[Operation]) -> _Event:
    """Head of the list of all calls and returns in the order in which they happened."""
    timed: list[tuple[int, _Event]] = []
    for number, operation in enumerate(operations):
        returns = None
        if operation.end is not None:
            assert operation.end > operation.start, "an answer before its question"
            returns = _Event(None, number, None)
            timed.append((operation.end, returns))
        timed.append((operation.start, _Event(operation, number, returns)))
    timed.sort(key=lambda each: each[0])
    head = last = _Event(None, -1, None)
    for _, event in timed:
        last.following, event.preceding = event, last
        last = event
    return head


def _check_key(
    operations: Sequence[Operation], model: Model[Any], configurations_max: int
) -> tuple[Verdict, tuple[Operation, ...]]:
    head = _events(operations)
    answered = sum(operation.end is not None for operation in operations)  # what is left to explain
    state, done = model.initial, 0
    seen: set[tuple[int, Hashable]] = {(done, state)}
    path: list[tuple[_Event, Any]] = []  # calls that took effect, and the state before each
    longest: tuple[Operation, ...] = ()
    event = head.following
    while answered:
        assert event is not None, "an answered operation is in the list until it took effect"
        operation = event.operation
        after = None
        if operation is not None:
            result, reached = model.step(state, operation.call)
            configuration = (done | 1 << event.number, reached)
            if (operation.end is None or result == operation.result) and configuration not in seen:
                after = configuration
        if after is not None:
            if len(seen) >= configurations_max:
                return Verdict.UNKNOWN, ()
            seen.add(after)
            path.append((event, state))
            done, state = after
            event.lift()
            answered -= event.returns is not None
            event = head.following
        elif operation is not None and event.following is not None:
            event = event.following
        else:
            # The return of an operation that could not take effect before it: something before was wrong.
            if len(path) >= len(longest):
                longest = tuple(each.operation for each, _ in path if each.operation is not None)
            if not path:
                return Verdict.VIOLATION, longest
            last, state = path.pop()
            done &= ~(1 << last.number)
            last.unlift()
            answered += last.returns is not None
            event = last.following
    return Verdict.LINEARIZABLE, ()


# --- models -------------------------------------------------------------------------------------------

ABSENT: Final = "absent"
PRESENT: Final = "present"
OK: Final = "ok"


def _register(state: Any, call: tuple[Any, ...]) -> tuple[Any, Any]:
    """``read``, ``set v``, ``create v`` if absent, ``replace v`` if present, ``remove``, ``cas old new``."""
    match call:
        case ("read",):
            return state, state
        case ("set", value):
            return OK, value
        case ("create", value):
            return (OK, value) if state is None else (PRESENT, state)
        case ("replace", value):
            return (OK, value) if state is not None else (ABSENT, state)
        case ("remove",):
            return (OK, None) if state is not None else (ABSENT, state)
        case ("cas", old, new):
            return (True, new) if state == old else (False, state)
    raise ValueError(f"not a call on a register: {call}")


def _directory(state: frozenset[tuple[Any, Any]], call: tuple[Any, ...]) -> tuple[Any, Any]:
    """``lookup name``; ``create name id``; ``unlink name``; ``rename old new replace``; ``exchange a b``."""
    names = dict(state)
    match call:
        case ("lookup", name):
            return names.get(name), state
        case ("create", name, value):
            if name in names:
                return PRESENT, state
            names[name] = value
        case ("unlink", name):
            if name not in names:
                return ABSENT, state
            del names[name]
        case ("rename", old, new, replace):
            if old not in names:
                return ABSENT, state
            if new in names and not replace:
                return PRESENT, state
            if old != new:
                names[new] = names.pop(old)
        case ("exchange", one, other):
            if one not in names or other not in names:
                return ABSENT, state
            names[one], names[other] = names[other], names[one]
        case _:
            raise ValueError(f"not a call on a directory: {call}")
    return OK, frozenset(names.items())


REGISTER: Final[Model[Any]] = Model(None, _register)
DIRECTORY: Final[Model[Any]] = Model(frozenset(), _directory)
