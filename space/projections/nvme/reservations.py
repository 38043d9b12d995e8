"""Reservations of a namespace (Base Specification 2.0, section 8.19), as values: who is registered, and who holds what.

Functions take a state and give the next one, and say which hosts are to be told.  Where a state is kept is a
:class:`Keeper`'s business: in memory it ends with the process, and the namespace says so (no persistence through power
loss); a keeper that makes states durable may say otherwise.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, Protocol

import attrs

from space.projections.nvme.status import CommandError, NvmeStatus

REGISTRANTS_MAX: Final = 1024
"""Hosts registered with one namespace: each costs a row of the report, which must fit one transfer."""


class Kind(enum.IntEnum):
    """Reservation types (figure 460)."""

    WRITE_EXCLUSIVE = 1
    EXCLUSIVE_ACCESS = 2
    WRITE_EXCLUSIVE_REGISTRANTS = 3
    EXCLUSIVE_ACCESS_REGISTRANTS = 4
    WRITE_EXCLUSIVE_ALL = 5
    EXCLUSIVE_ACCESS_ALL = 6


class Notice(enum.IntEnum):
    """What a registrant is told (reservation notification log, figure 229); also the bit that masks it."""

    REGISTRATION_PREEMPTED = 1
    RESERVATION_RELEASED = 2
    RESERVATION_PREEMPTED = 3


_ALL: Final = frozenset({Kind.WRITE_EXCLUSIVE_ALL, Kind.EXCLUSIVE_ACCESS_ALL})
_READERS_ARE_FREE: Final = frozenset(
    {Kind.WRITE_EXCLUSIVE, Kind.WRITE_EXCLUSIVE_REGISTRANTS, Kind.WRITE_EXCLUSIVE_ALL}
)
_HOLDER_ONLY: Final = frozenset({Kind.WRITE_EXCLUSIVE, Kind.EXCLUSIVE_ACCESS})


@attrs.frozen
class State:
    """Registrations (host id to key, in the order they were made), and the reservation if there is one.

    ``holder`` is the host that acquired it; for the "all registrants" kinds every registrant holds it.
    """

    generation: int = 0
    keys: dict[bytes, int] = attrs.field(factory=dict)
    kind: Kind | None = None
    holder: bytes = b""

    def holds(self, host: bytes) -> bool:
        """Whether a host holds the reservation."""
        return self.kind is not None and (host in self.keys if self.kind in _ALL else host == self.holder)

    def allows(self, host: bytes, *, writes: bool) -> bool:
        """Whether a host may read, or write (figure 462)."""
        if self.kind is None or self.holds(host) or (not writes and self.kind in _READERS_ARE_FREE):
            return True
        return self.kind not in _HOLDER_ONLY and host in self.keys


Told = list[tuple[bytes, Notice]]
_CONFLICT: Final = NvmeStatus.RESERVATION_CONFLICT


class Keeper(Protocol):
    """Where the state of one namespace is."""

    persistent: bool
    """Whether it survives the loss of power (PTPL)."""

    @property
    def state(self) -> State:
        """What holds now."""

    async def replace(self, state: State) -> None:
        """What holds from now on; durable on return if ``persistent``."""


class MemoryKeeper:
    """A state that ends with the process."""

    persistent = False

    def __init__(self) -> None:
        self.state = State()

    async def replace(self, state: State) -> None:
        self.state = state


def register(
    state: State, host: bytes, action: int, current: int, new: int, *, ignore: bool
) -> tuple[State, Told]:
    """Reservation Register: registers, unregisters or replaces a key (section 7.6).

    Raises:
        CommandError: the key is not the one registered; or an unknown action.
    """
    held = state.keys.get(host)
    if action == 0:
        if held is not None and held != new:
            raise CommandError(_CONFLICT)
        if len(state.keys) >= REGISTRANTS_MAX and held is None:
            raise CommandError(NvmeStatus.INTERNAL_ERROR)
        return attrs.evolve(state, generation=_next(state), keys=state.keys | {host: new}), []
    if action not in {1, 2}:
        raise CommandError(NvmeStatus.INVALID_FIELD, location=40)
    if action == 2 and ignore and held is None:
        return attrs.evolve(state, generation=_next(state), keys=state.keys | {host: new}), []
    if held is None or (not ignore and held != current):
        raise CommandError(_CONFLICT)
    if action == 2:
        return attrs.evolve(state, generation=_next(state), keys=state.keys | {host: new}), []
    after, told = _without(state, {host})
    return attrs.evolve(after, generation=_next(state)), told


def acquire(
    state: State, host: bytes, action: int, kind: int, current: int, preempted: int
) -> tuple[State, Told]:
    """Reservation Acquire: acquires or preempts (section 7.5); what there is to abort is the caller's business.

    Raises:
        CommandError: the host is not registered with that key, or somebody else holds the reservation.
    """
    if state.keys.get(host) != current:
        raise CommandError(_CONFLICT)
    if kind not in set(Kind):
        raise CommandError(NvmeStatus.INVALID_FIELD, location=41)
    if action == 0:
        if state.kind is None:
            return attrs.evolve(state, kind=Kind(kind), holder=host), []
        if not state.holds(host) or state.kind != kind:
            raise CommandError(_CONFLICT)
        return state, []
    if action not in {1, 2}:
        raise CommandError(NvmeStatus.INVALID_FIELD, location=40)
    return _preempt(state, host, Kind(kind), preempted)


def _preempt(state: State, host: bytes, kind: Kind, preempted: int) -> tuple[State, Told]:
    with_key = {each for each, key in state.keys.items() if key == preempted}
    if state.kind in _ALL and not preempted:
        gone, takes = set(state.keys), True
    elif state.kind is not None and state.kind not in _ALL and state.keys.get(state.holder) == preempted:
        gone, takes = with_key, True
    elif not preempted:
        raise CommandError(NvmeStatus.INVALID_FIELD)
    elif not with_key:
        raise CommandError(_CONFLICT)
    else:
        gone, takes = with_key, False
    gone = gone - {host} if takes else gone
    told: Told = [(each, Notice.REGISTRATION_PREEMPTED) for each in gone if each != host]
    after = attrs.evolve(
        state,
        generation=_next(state),
        keys={each: key for each, key in state.keys.items() if each not in gone},
    )
    if takes:
        if state.kind != kind:
            told += [(each, Notice.RESERVATION_RELEASED) for each in after.keys if each != host]
        return attrs.evolve(after, kind=kind, holder=host), told
    if state.kind in _ALL and not after.keys:
        return attrs.evolve(after, kind=None, holder=b""), told
    return after, told


def release(state: State, host: bytes, action: int, kind: int, current: int) -> tuple[State, Told]:
    """Reservation Release: releases, or clears everything (section 7.7).

    Raises:
        CommandError: the host is not registered with that key, or the reservation is of another kind.
    """
    if state.keys.get(host) != current:
        raise CommandError(_CONFLICT)
    if action == 0:
        if not state.holds(host):
            return state, []
        if state.kind != kind:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=41)
        after = attrs.evolve(state, kind=None, holder=b"")
        return after, _released(state, after, host)
    if action != 1:
        raise CommandError(NvmeStatus.INVALID_FIELD, location=40)
    told: Told = [(each, Notice.RESERVATION_PREEMPTED) for each in state.keys if each != host]
    return State(_next(state)), told


def _without(state: State, hosts: set[bytes]) -> tuple[State, Told]:
    """The state after hosts have unregistered; a reservation nobody holds any more is released."""
    after = attrs.evolve(state, keys={each: key for each, key in state.keys.items() if each not in hosts})
    if state.kind is None or (bool(after.keys) if state.kind in _ALL else state.holder not in hosts):
        return after, []
    after = attrs.evolve(after, kind=None, holder=b"")
    return after, _released(state, after, state.holder)


def _released(before: State, after: State, host: bytes) -> Told:
    """Registrants learn of a release only where being registered meant something."""
    if before.kind is None or before.kind in _HOLDER_ONLY:
        return []
    return [(each, Notice.RESERVATION_RELEASED) for each in after.keys if each != host]


def _next(state: State) -> int:
    return (state.generation + 1) & 0xFFFF_FFFF


_STATUS: Final = struct.Struct("<IBHxxB54x")
_ROW: Final = struct.Struct("<HB5xQ16s32x")
assert (_STATUS.size, _ROW.size) == (64, 64)
NOT_CONNECTED: Final = 0xFFFF


def report(state: State, controllers: dict[bytes, int], *, persists: bool) -> bytes:
    """The data of Reservation Report in its extended form (figures 472 and 474): one row a registrant.

    ``controllers`` says which controller a host is connected through.
    """
    rows = [
        _ROW.pack(controllers.get(host, NOT_CONNECTED), state.holds(host), key, host)
        for host, key in state.keys.items()
    ]
    return _STATUS.pack(state.generation, state.kind or 0, len(rows), persists) + b"".join(rows)
