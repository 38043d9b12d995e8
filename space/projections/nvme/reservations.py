"""Reservations of a namespace (Base Specification 2.0, section 8.19): where they are, and how a host sees them.

The rules are :mod:`space.statemachine.reservations`.  Where the state is kept is a :class:`Keeper`'s business: in
memory it ends with the process, and the namespace says so (no persistence through power loss); one that logs every
change may say otherwise, and is the same through every node.
"""

from __future__ import annotations

import struct
from typing import Final, Protocol

import attrs

from space.statemachine.reservations import Command, Kind, Notice, State, decided

__all__ = ["Command", "Keeper", "Kind", "MemoryKeeper", "Notice", "State", "report"]


class Keeper(Protocol):
    """Where the state of one namespace is."""

    persistent: bool
    """Whether it survives the loss of power (PTPL)."""

    @property
    def state(self) -> State:
        """What holds now, as far as is known here: what a command of a host is checked against."""

    async def change(self, command: Command, *, actor: str) -> None:
        """Carries a command out, or refuses it; durable on return if ``persistent``.

        Raises:
            SpaceError: refused (see :mod:`space.statemachine.reservations`), or it could not be kept.
        """

    async def confirm(self) -> None:
        """Returns when :attr:`state` has everything that was acknowledged anywhere before.

        Raises:
            SpaceError: that cannot be known now.
        """


class MemoryKeeper:
    """A state that ends with the process."""

    persistent = False

    def __init__(self) -> None:
        self.state = State()

    async def change(self, command: Command, *, actor: str) -> None:
        after, told = decided(self.state, command)
        self.state = attrs.evolve(after, position=self.state.position + 1).tell(told)

    async def confirm(self) -> None:
        """There is nobody else."""


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
