"""Share reservations of one file (RFC 8881 §9.7, §18.16, §18.18): who may open it how; no I/O.

An open-owner has at most one open of a file, which holds the union of all it was opened for.  What it may be
downgraded to is the union of some of those, so each way it was opened is remembered: there are only twelve.
"""

from __future__ import annotations

from collections.abc import Iterable

from space.events.fast import fast_frozen


@fast_frozen
class Mode:
    """What an OPEN asks for: to read, to write or both, and what to deny others (bits of :class:`Share`)."""

    access: int
    deny: int

    def conflicts(self, other: Mode) -> bool:
        """Whether two opens of different owners cannot both be."""
        return bool(self.access & other.deny or self.deny & other.access)

    def within(self, other: Mode) -> bool:
        """Whether this asks for nothing that the other does not."""
        return not (self.access & ~other.access or self.deny & ~other.deny)


NOTHING = Mode(0, 0)


def union(modes: Iterable[Mode]) -> Mode:
    """All that is asked for by any."""
    access = deny = 0
    for mode in modes:
        access |= mode.access
        deny |= mode.deny
    return Mode(access, deny)


def downgraded(opened: frozenset[Mode], wanted: Mode) -> frozenset[Mode] | None:
    """The ways a file stays open after a downgrade; None if they do not make up exactly what is wanted."""
    left = frozenset(mode for mode in opened if mode.within(wanted))
    return left if left and union(left) == wanted else None
