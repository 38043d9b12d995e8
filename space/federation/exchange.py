"""How two zones talk: HTTPS with certificates of both (RFC 9110, TLS 1.3), the home as client of each of its targets.

    GET  /v1/federation/identity    who answers, which versions it speaks, and what it knows of who asks
    GET  /v1/federation/cursors     how far every stream of who asks has come here
    POST /v1/federation/reached     how far some capsules of who asks have come here: after a promotion
    POST /v1/federation/homes       whether some capsules of who asks are here, or at home here; declines what is not
    POST /v1/federation/heir        what who asks took over from a third zone: it is followed from now on
    POST /v1/federation/authority   certificates to trust from now on, signed by the authority known so far
    POST /v1/federation/ship        frames; the answer begins at once and has a line for each of them, in order

A frame is its kind (1 byte), a length (4 bytes, big-endian) and so many bytes.  A shipment
(:mod:`space.federation.shipment`) is answered ``{"cursor": {…}}`` once it is durable; a pulse, JSON of the home's
position, its clock and what of it is still to be shipped, ``{"pulse": {…}}``.  What is refused is answered
``{"error": {…}}``, and nothing after it is looked at.  Nothing here is kept by connections: whoever loses one asks for
the cursors and goes on from there.

Every node of a zone answers all of this.  One that does not lead (``leads`` in its identity) has to hand on what is
shipped to it, so a home prefers the one that does.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final

import attrs

from space._errors import SpaceError, UsageError, error_of

Document = dict[str, Any]

VERSION: Final = 1
PREFIX: Final = "/v1/federation"
IDENTITY: Final = f"{PREFIX}/identity"
CURSORS: Final = f"{PREFIX}/cursors"
REACHED: Final = f"{PREFIX}/reached"
HOMES: Final = f"{PREFIX}/homes"
HEIR: Final = f"{PREFIX}/heir"
AUTHORITY: Final = f"{PREFIX}/authority"
SHIP: Final = f"{PREFIX}/ship"

FRAME: Final = struct.Struct(">BI")
SHIPMENT: Final = 1
PULSE: Final = 2

PULSE_SECONDS: Final = 5.0
"""How often a home that has nothing to ship says that it is there."""

SILENCE_SECONDS: Final = 30.0
"""After so long without a word the other side is taken to be gone: several pulses, and a slow disk's fdatasync."""

PULSE_BYTES_MAX: Final = 1 << 16
"""With a thousand capsules that wait to be shipped, and five hundred changes of them."""

DOCUMENT_BYTES_MAX: Final = 1 << 20
"""Answers that are read as a whole: cursors of a thousand streams are some 100 KiB."""

LINE_BYTES_MAX: Final = 1 << 16

ADDRESSES_MAX: Final = 16
"""Addresses a zone may have: one for each node of a cluster, and some more."""


@attrs.frozen
class Peer:
    """Another zone, as whom a connection has proved itself.

    Attributes:
        id: 16 bytes.
        name: how policies call it.
    """

    id: bytes
    name: str


def addresses(url: str) -> list[str]:
    """The addresses a zone is reached at, in the order they were given: one, or those of the nodes of a cluster."""
    return url.split(",") if url else []


def frame(kind: int, body: bytes) -> tuple[bytes, bytes]:
    """A frame: how it begins, and its body, which may be too large to be copied for that."""
    return FRAME.pack(kind, len(body)), body


def parse_document(text: bytes) -> Document:
    """A JSON object from the other side.

    Raises:
        UsageError: it is none.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"not a JSON object: {text[:60]!r}", hint="is the other zone newer?")
    return found


def error_in(document: Document) -> SpaceError | None:
    """The error an answer tells of, if it is one."""
    found = document.get("error")
    return error_of(found) if isinstance(found, dict) else None


@attrs.define
class Throttle:
    """Lets so many bytes through a second, and a tenth of a second's worth at once.

    Attributes:
        rate: bytes a second; 0 is any number.
    """

    rate: float
    _free_at: float = 0.0

    def delay(self, size: int, *, now: float) -> float:
        """Seconds to wait before ``size`` more bytes may go; they are counted as gone then."""
        if not self.rate:
            return 0.0
        begin = max(self._free_at, now - 0.1)
        self._free_at = begin + size / self.rate
        return max(0.0, begin - now)


@attrs.define
class Backoff:
    """How long to wait before the next attempt: twice as long each time, up to a limit, and never all at once.

    Attributes:
        first: seconds, after the first failure.
        limit: seconds, however many there were.
    """

    first: float
    limit: float
    _failures: int = 0

    def delay(self, chance: float) -> float:
        """Seconds to wait; ``chance`` is a random number from 0 to 1."""
        longest = min(self.limit, self.first * (1 << min(self._failures, 20)))
        self._failures += 1
        return longest * (0.5 + chance / 2)

    def reset(self) -> None:
        """Notes a success."""
        self._failures = 0
