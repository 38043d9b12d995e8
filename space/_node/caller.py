"""Who waits for an operation: light enough for a program that only asks another process."""

from __future__ import annotations

import time
from typing import Any, Final, NamedTuple

Document = dict[str, Any]
"""A JSON-able mapping."""

CHUNK_BYTES: Final = 1 << 20


class Terms(NamedTuple):
    """How a call is to be carried out, beside what it asks for.

    Attributes:
        stale: reads show what is applied on the node that answers, without asking the others.
        client: id of the caller, 16 bytes, if it may repeat the call; empty if it will not.
        sequence: number of the call among that caller's.
    """

    stale: bool = False
    client: bytes = b""
    sequence: int = 0


class Caller:
    """Told how far an operation is, and asked whether it still waits.  This one always waits."""

    def progress(self, done: Document) -> None:
        """Takes note of how far a long operation is."""

    def wait(self, descriptor: int, *, writing: bool) -> int:
        """Returns when ``descriptor`` can be read or written, and how many bytes at once.

        Raises:
            SpaceError: the caller has gone.
        """
        return CHUNK_BYTES

    def ended(self) -> None:
        """The source has ended; returns if that was all of it, and not the end of who was writing it.

        Raises:
            SpaceError: the caller has gone.
        """

    def idle(self, seconds: float) -> None:
        """Waits that long.

        Raises:
            SpaceError: the caller has gone.
        """
        time.sleep(seconds)
