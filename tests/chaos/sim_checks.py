"""What must hold after every step of a simulated cluster, whatever went wrong: the oracle.

It sees every node at once, also what crashed ones have on their disks, and remembers for the whole run what
was ever true.  Sources: Ongaro and Ousterhout, "In search of an understandable consensus algorithm" (2014), figure 3
(election safety, log matching, leader completeness, state machine safety), and the promises of this program:
an acknowledged command is in the log exactly once, and equal positions have equal digests.
"""

from __future__ import annotations

import attrs
import msgpack

from space.events.codec import decode_batch
from space.events.types import MembershipChanged
from space.statemachine.apply import REMOVED


class Violation(AssertionError):  # noqa: N818 - what happened, and the field's word for it
    """A property that must always hold does not.

    Attributes:
        what: short name of the property.
    """

    def __init__(self, what: str, detail: str) -> None:
        super().__init__(f"{what}: {detail}")
        self.what = what


@attrs.frozen
class Committed:
    """An entry when it was first applied anywhere."""

    term: int
    chain: bytes
    seen: int  # term of the node that applied it: no smaller than the term in which it was committed


class Oracle:
    """See the module's text.  Every method raises :class:`Violation`."""

    def __init__(self) -> None:
        self.leaders: dict[int, int] = {}
        self.links: dict[tuple[int, int], bytes] = {}
        self.committed: list[Committed] = []
        self.digests: dict[int, int] = {}
        self.requests: dict[tuple[bytes, int], int] = {}
        self.removed: dict[int, int] = {}
        """Nodes that a committed entry removed from the group, with its index."""

    def leads(self, node: int, term: int, last_index: int) -> None:
        """A node is leader: nobody else is in that term, and what was committed before is in its log."""
        if self.leaders.setdefault(term, node) != node:
            raise Violation("one leader a term", f"{self.leaders[term]} and {node} in term {term}")
        count = len(self.committed)
        if count > last_index and self.committed[last_index].seen < term:
            raise Violation(
                "leader completeness",
                f"node {node} leads term {term} with {last_index} entries, and {count} are committed",
            )

    def stored(self, node: int, index: int, term: int, chain: bytes) -> None:
        """A log holds this entry: the same index and term have the same chain everywhere, so the same history."""
        if self.links.setdefault((index, term), chain) != chain:
            raise Violation("log matching", f"node {node} has another entry {index} of term {term}")

    def applied(self, node: int, index: int, term: int, chain: bytes, metadata: bytes, now: int) -> None:
        """A node folds an entry: it is the one that everybody folds at that position."""
        if index <= len(self.committed):
            known = self.committed[index - 1]
            if (known.term, known.chain) != (term, chain):
                raise Violation(
                    "state machine safety",
                    f"node {node} applies entry {index} of term {term}, others had one of term {known.term}",
                )
            return
        if index != len(self.committed) + 1:
            raise Violation("no gap", f"node {node} applies {index} after {len(self.committed)}")
        self.committed.append(Committed(term, chain, now))
        for entry in decode_batch(metadata):
            if entry.client and self.requests.setdefault((entry.client, entry.sequence), index) != index:
                raise Violation(
                    "applied once",
                    f"request {entry.sequence} of {entry.client.hex()} at {index} and at "
                    f"{self.requests[entry.client, entry.sequence]}",
                )
            for _, event in entry.events:
                if isinstance(event, MembershipChanged):
                    self._members(index, event)

    def _members(self, index: int, event: MembershipChanged) -> None:
        for node, role, _ in msgpack.unpackb(event.members):
            if role == REMOVED:
                self.removed[node] = index
            else:
                self.removed.pop(node, None)

    def digest(self, node: int, position: int, digest: int) -> None:
        """The state of a node: the same as any other's at that position."""
        if self.digests.setdefault(position, digest) != digest:
            raise Violation("equal digests", f"node {node} has another state at position {position}")

    def acknowledged(self, client: bytes, sequence: int, position: int) -> None:
        """A caller was told that its command is at ``position``."""
        found = self.requests.get((client, sequence))
        if found != position:
            raise Violation(
                "acknowledged is committed",
                f"request {sequence} of {client.hex()} was told position {position}, and is at {found}",
            )

    def stands(self, node: int, applied: int, commit: int, last_index: int, durable: int) -> None:
        """Where one node stands: nothing is applied that is not committed, and durable here."""
        if not applied <= commit <= last_index:
            raise Violation("applied ≤ commit ≤ log", f"node {node}: {applied}, {commit}, {last_index}")
        if applied > durable:
            raise Violation("applied is durable", f"node {node} applied {applied}, and {durable} are durable")
