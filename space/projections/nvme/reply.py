"""What a command that succeeded is answered with."""

from __future__ import annotations

from collections.abc import Sequence

from space.events.commands import Buffer


class Reply:
    """Data for the host, ``length`` bytes of it in all, and dwords 0 and 1 of the completion."""

    __slots__ = ("data", "length", "result")

    def __init__(self, data: Sequence[Buffer] = (), length: int = 0, result: int = 0) -> None:
        self.data = data
        self.length = length
        self.result = result


DONE = Reply()
"""Success, and nothing more."""
