"""What deciding a command comes to, and where the stored frames of a batch go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs

from space._errors import Status
from space.events import commands as cmd
from space.events import types as ev
from space.events.ids import ID_BYTES
from space.statemachine.tables import Overlay


@attrs.frozen
class Rejected:
    """The command is refused; nothing happens."""

    status: Status
    message: str


class PayloadPlacer:
    """Lays stored frames out in a batch's payload area.

    Pieces of a block or more start on a block boundary, so that they can be sent from the page cache
    and punched out without touching a neighbour; smaller ones are packed.
    """

    BLOCK: Final = 4096

    def __init__(self) -> None:
        self.buffers: list[cmd.Buffer] = []
        self.length = 0

    def place(self, piece: cmd.Buffer) -> int:
        """Adds a piece and returns its offset in the payload area."""
        size = len(piece)
        if size >= self.BLOCK and (gap := -self.length % self.BLOCK):
            self.buffers.append(bytes(gap))
            self.length += gap
        offset = self.length
        self.buffers.append(piece)
        self.length += size
        return offset

    def mark(self) -> tuple[int, int]:
        return len(self.buffers), self.length

    def rewind(self, mark: tuple[int, int]) -> None:
        """Forgets what was placed after ``mark``."""
        del self.buffers[mark[0] :]
        self.length = mark[1]


Decision = Sequence[ev.Event] | Rejected
Rule = Callable[[Overlay, Any, PayloadPlacer], Decision]
Rules = Mapping[type[Any], Rule]


def capsule_text(capsule: bytes) -> str:
    """An id as users see it, whatever its length."""
    raw = capsule.hex()
    return f"{raw[:8]}-{raw[8:12]}-{raw[12:16]}-{raw[16:20]}-{raw[20:]}" if len(capsule) == ID_BYTES else raw


def inside(state: Overlay, directory: bytes, ancestor: bytes) -> bool:
    """Whether ``directory`` is ``ancestor`` or lies below it."""
    at = directory
    while at != ancestor:
        row = state.capsule(at)
        if row is None or row.parent == at:
            return False
        at = row.parent
    return True
