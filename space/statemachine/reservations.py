"""Reservations of a block device, as values: who is registered with which key, and who holds what.

The rules are those of the NVM Express Base Specification 2.0 (section 8.19, commands of sections 7.5 to 7.7), and
hosts are what that calls host identifiers.  Functions take a state and a command and give the next state; where a
state is kept is somebody else's business: in a log the change becomes the events of :func:`events_of`, and
:func:`fold` makes the same state of them again on every replica.

Refusals are :class:`space.SpaceError`: NOT_PERMITTED is a reservation conflict, INVALID a field that cannot be,
NO_SPACE too many hosts.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable
from typing import Final, Self

import attrs
import msgpack

from space._errors import CorruptionError, RefusedError, SpaceError, Status, UsageError
from space.events import commands as cmd
from space.events import types as ev
from space.events.ids import ID_BYTES

REGISTRANTS_MAX: Final = ev.REGISTRANTS_MAX
NOTICES_MAX: Final = 1024
"""Notices kept for nodes that look later: one command makes at most one for each registrant."""
GENERATION_MODULUS: Final = 1 << 32
KEY_MAX: Final = (1 << 64) - 1

_POSITION: Final = struct.Struct("<Q")
_REGISTRANT: Final = struct.Struct("<16sQ")
_NOTICE: Final = struct.Struct("<16sB")


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


Told = list[tuple[bytes, Notice]]
Command = cmd.RegisterReservation | cmd.AcquireReservation | cmd.ReleaseReservation

_ALL: Final = frozenset({Kind.WRITE_EXCLUSIVE_ALL, Kind.EXCLUSIVE_ACCESS_ALL})
_READERS_ARE_FREE: Final = frozenset(
    {Kind.WRITE_EXCLUSIVE, Kind.WRITE_EXCLUSIVE_REGISTRANTS, Kind.WRITE_EXCLUSIVE_ALL}
)
_HOLDER_ONLY: Final = frozenset({Kind.WRITE_EXCLUSIVE, Kind.EXCLUSIVE_ACCESS})


@attrs.frozen
class State:
    """Registrations (host to key, in the order they were made), and the reservation if there is one.

    Attributes:
        holder: the host that acquired it; for the "all registrants" kinds every registrant holds it.
        position: of the last change; 0: there was none.
        noticed: how many notices there have been; ``notices`` are the last of them.
    """

    generation: int = 0
    keys: dict[bytes, int] = attrs.field(factory=dict)
    kind: Kind | None = None
    holder: bytes = b""
    position: int = 0
    noticed: int = 0
    notices: tuple[tuple[bytes, Notice], ...] = ()

    def holds(self, host: bytes) -> bool:
        """Whether a host holds the reservation."""
        return self.kind is not None and (host in self.keys if self.kind in _ALL else host == self.holder)

    def allows(self, host: bytes, *, writes: bool) -> bool:
        """Whether a host may read, or write (figure 462)."""
        if self.kind is None or self.holds(host) or (not writes and self.kind in _READERS_ARE_FREE):
            return True
        return self.kind not in _HOLDER_ONLY and host in self.keys

    def noticed_since(self, number: int) -> tuple[tuple[bytes, Notice], ...]:
        """The notices after the first ``number``, as far as they are kept."""
        count = min(self.noticed - number, len(self.notices))
        return self.notices[len(self.notices) - count :] if count > 0 else ()

    def tell(self, told: Iterable[tuple[bytes, Notice]]) -> State:
        """With more notices; the oldest are forgotten where there are too many."""
        new = tuple(told)
        if not new:
            return self
        kept = (*self.notices, *new)[-NOTICES_MAX:]
        return attrs.evolve(self, notices=kept, noticed=self.noticed + len(new))

    def encode(self) -> bytes:
        """The row of the state: the position, so that it can be compared without the rest, and the rest."""
        return _POSITION.pack(self.position) + bytes(
            msgpack.packb(
                [
                    self.generation,
                    self.kind or 0,
                    self.holder,
                    self.noticed,
                    _pack(_REGISTRANT, self.keys.items()),
                    _pack(_NOTICE, self.notices),
                ]
            )
        )

    @classmethod
    def decode(cls, row: bytes | None) -> Self:
        """The state of a row; of none, the one before anything happened."""
        if row is None:
            return cls()
        try:
            (position,) = _POSITION.unpack_from(row)
            generation, kind, holder, noticed, keys, notices = msgpack.unpackb(row[_POSITION.size :])
            return cls(
                generation,
                dict(_REGISTRANT.iter_unpack(keys)),
                Kind(kind) if kind else None,
                holder,
                position,
                noticed,
                tuple((host, Notice(each)) for host, each in _NOTICE.iter_unpack(notices)),
            )
        except (ValueError, TypeError, struct.error, msgpack.UnpackException) as error:
            raise CorruptionError(
                f"a reservation row of the state is malformed: {error!r:.100}", hint="run: space replay"
            ) from None


def position_of(row: bytes | None) -> int:
    """The position in a row; 0 without one."""
    return 0 if row is None else int(_POSITION.unpack_from(row)[0])


def _pack(layout: struct.Struct, rows: Iterable[tuple[bytes, int]]) -> bytes:
    return b"".join(layout.pack(*each) for each in rows)


# --- the rules -------------------------------------------------------------------------------------


def _conflict() -> SpaceError:
    return RefusedError("reservation conflict", status=Status.NOT_PERMITTED)


def _invalid(what: str, value: int) -> SpaceError:
    return UsageError(f"not a reservation {what}: {value}")


def decided(state: State, command: Command) -> tuple[State, Told]:
    """The state after a command, and which hosts are to be told what.

    Raises:
        SpaceError: it is refused; see the module's text.
    """
    if isinstance(command, cmd.RegisterReservation):
        return _register(state, command)
    if isinstance(command, cmd.AcquireReservation):
        return _acquire(state, command)
    return _release(state, command)


def _register(state: State, command: cmd.RegisterReservation) -> tuple[State, Told]:
    """Registers, unregisters or replaces a key (section 7.6)."""
    host, held = command.host, state.keys.get(command.host)
    if command.action not in (0, 1, 2):
        raise _invalid("action", command.action)
    if command.action == 0:
        if held is not None and held != command.new_key:
            raise _conflict()
    elif (held is None and not (command.action == 2 and command.ignore)) or (
        held is not None and not command.ignore and held != command.key
    ):
        raise _conflict()
    if command.action == 1:
        after, told = _without(state, {host})
        return attrs.evolve(after, generation=_next(state)), told
    if held is None and len(state.keys) >= REGISTRANTS_MAX:
        raise UsageError(f"{REGISTRANTS_MAX} hosts are registered already", status=Status.NO_SPACE)
    return attrs.evolve(state, generation=_next(state), keys=state.keys | {host: command.new_key}), []


def _acquire(state: State, command: cmd.AcquireReservation) -> tuple[State, Told]:
    """Acquires or preempts (section 7.5); what there is to abort is the caller's business."""
    host = command.host
    if state.keys.get(host) != command.key:
        raise _conflict()
    if command.kind not in set(Kind):
        raise _invalid("type", command.kind)
    kind = Kind(command.kind)
    if command.action == 0:
        if state.kind is None:
            return attrs.evolve(state, kind=kind, holder=host), []
        if not state.holds(host) or state.kind != kind:
            raise _conflict()
        return state, []
    if command.action not in (1, 2):
        raise _invalid("action", command.action)
    return _preempt(state, host, kind, command.preempted)


def _preempt(state: State, host: bytes, kind: Kind, preempted: int) -> tuple[State, Told]:
    with_key = {each for each, key in state.keys.items() if key == preempted}
    if state.kind in _ALL and not preempted:
        gone, takes = set(state.keys), True
    elif state.kind is not None and state.kind not in _ALL and state.keys.get(state.holder) == preempted:
        gone, takes = with_key, True
    elif not preempted:
        raise _invalid("key to preempt", preempted)
    elif not with_key:
        raise _conflict()
    else:
        gone, takes = with_key, False
    gone = gone - {host} if takes else gone
    told: Told = [(each, Notice.REGISTRATION_PREEMPTED) for each in state.keys if each in gone - {host}]
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


def _release(state: State, command: cmd.ReleaseReservation) -> tuple[State, Told]:
    """Releases, or clears everything (section 7.7)."""
    host = command.host
    if state.keys.get(host) != command.key:
        raise _conflict()
    if command.action == 0:
        if not state.holds(host):
            return state, []
        if state.kind != command.kind:
            raise _invalid("type to release", command.kind)
        after = attrs.evolve(state, kind=None, holder=b"")
        return after, _released(state, after, host)
    if command.action != 1:
        raise _invalid("action", command.action)
    told: Told = [(each, Notice.RESERVATION_PREEMPTED) for each in state.keys if each != host]
    return attrs.evolve(state, generation=_next(state), keys={}, kind=None, holder=b""), told


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
    return (state.generation + 1) % GENERATION_MODULUS


# --- as events -------------------------------------------------------------------------------------

Changed = ev.RegistrantsChanged | ev.ReservationChanged


def events_of(capsule: bytes, before: State, after: State, told: Told) -> list[ev.Event]:
    """The facts that lead from one state to another."""
    found: list[ev.Event] = []
    notices = _pack(_NOTICE, told)
    if after.generation != before.generation:
        registered = [each for each in after.keys.items() if before.keys.get(each[0]) != each[1]]
        removed = b"".join(host for host in before.keys if host not in after.keys)
        found.append(
            ev.RegistrantsChanged(capsule, after.generation, _pack(_REGISTRANT, registered), removed, notices)
        )
        notices = b""
    if (after.kind, after.holder) != (before.kind, before.holder):
        found.append(ev.ReservationChanged(capsule, int(after.kind or 0), after.holder, notices))
    return found


def fold(state: State, event: Changed, position: int) -> State:
    """The state after an event.

    Raises:
        CorruptionError: the event is malformed.
    """
    try:
        told = [(host, Notice(each)) for host, each in _NOTICE.iter_unpack(event.told)]
        if isinstance(event, ev.ReservationChanged):
            kind = Kind(event.reservation) if event.reservation else None
            after = attrs.evolve(state, kind=kind, holder=event.holder)
        else:
            removed = {event.removed[at : at + ID_BYTES] for at in range(0, len(event.removed), ID_BYTES)}
            keys = {host: key for host, key in state.keys.items() if host not in removed}
            keys |= dict(_REGISTRANT.iter_unpack(event.registered))
            after = attrs.evolve(state, generation=event.generation, keys=keys)
    except (struct.error, ValueError) as error:
        raise CorruptionError(f"the log has a malformed reservation: {error!r:.100}") from None
    return attrs.evolve(after, position=position).tell(told)
