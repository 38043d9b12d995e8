"""The nodes of a cluster as one zone: who of them ships, and what they tell each other about the other zones.

Every node that federates takes what other zones ship (its commands go to the leader like anybody's).  One of them
ships: who leads the shard with the tree, if it federates, else the first that does.  Nothing depends on that being
one only: a shipment begins where the receiver's cursor stands or is refused, and what leaves is in the log before, so
two that ship for a moment cost time and nothing else.  Cursors are in the other zone's log, and so whoever ships next
goes on where the last one was.

Beside the log nodes ask each other, over their own connections, by the methods below: for the zone's private keys,
which no log may hold, and for what is only known to who ships or was shipped to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

from space._errors import RefusedError, SpaceError, UnavailableError
from space._node.caller import Document

if TYPE_CHECKING:
    from space._node.cluster import ClusterNode
    from space._node.store import Store

KEYS: Final = "zone keys"
"""The private keys of the zone, as far as the node has them."""
SETTLE: Final = "zone settle"
"""To have the keys the log speaks of."""
RENEW: Final = "zone renew"
"""To make a new certificate."""
OFFICE: Final = "zone office"
"""Whether the node federates and ships, and what it knows of the other zones."""
LINKS: Final = "zone links"
"""How its connections to other zones are; nothing if it does not ship."""
METHODS: Final = (KEYS, SETTLE, RENEW, OFFICE, LINKS)

DISTANCE: Final = ("connected", "rtt_seconds")
"""What the nodes that do not ship know of a connection without asking."""

ASK_SECONDS: Final = 5.0
"""How long another node may take: it may have to ask the others itself."""

KEYS_SECONDS: Final = 2.0
"""How long it may take to give its keys: who asks may be asked itself, and answers though a third one is dead."""


class Nodes(Protocol):
    """The nodes a store is replicated on."""

    @property
    def number(self) -> int:
        """The number of this one."""

    @property
    def leader(self) -> int:
        """Who leads, as far as is known here; 0 while nobody does."""

    @property
    def proved(self) -> bool:
        """Whether nodes prove to each other who they are."""

    def ask(
        self, method: str, *, seconds: float = ASK_SECONDS
    ) -> tuple[dict[int, Any], dict[int, SpaceError]]:
        """What the other members answer, and why those do not that fail to; blocks."""


class ClusterNodes:
    """The nodes of a running cluster: :class:`Nodes`."""

    def __init__(self, node: ClusterNode) -> None:
        self._node = node

    @property
    def number(self) -> int:
        return self._node.config.node

    @property
    def leader(self) -> int:
        return self._node.store.group.replica.driver.leader

    @property
    def proved(self) -> bool:
        return self._node.config.tls

    def ask(
        self, method: str, *, seconds: float = ASK_SECONDS
    ) -> tuple[dict[int, Any], dict[int, SpaceError]]:
        others = [node for node in self._node.store.members() if node != self.number]

        async def one(running: Any, node: int) -> Any:
            answer, _ = await running.transport.request(node, "call", [0, method], timeout=seconds)
            return answer

        async def all_(running: Any) -> list[Any]:
            return await asyncio.gather(*(one(running, node) for node in others), return_exceptions=True)

        try:
            found = self._node.call(all_, seconds=2 * seconds)
        except SpaceError as error:
            return {}, dict.fromkeys(others, error)
        said = dict(zip(others, found, strict=True))
        failed = {node: each for node, each in said.items() if isinstance(each, SpaceError)}
        return {node: each for node, each in said.items() if not isinstance(each, BaseException)}, failed


def chosen(leader: int, federating: Collection[int], before: int) -> int:
    """The node that ships, of those that federate; 0 if none does.

    Who leads, if it federates, else the first that does; while nobody leads, who did ``before``.
    """
    if not leader and before in federating:
        return before
    return leader if leader in federating else min(federating, default=0)


def answer(store: Store, method: str) -> Any:
    """What a node answers another member that asks by one of :data:`METHODS`.

    Raises:
        SpaceError: what the other node is told.
    """
    running = store.federation
    match method:
        case "zone keys":
            return _keys(store)
        case "zone settle" | "zone renew":
            return _look_after_keys(store, renew=method == RENEW)
        case "zone office":
            return None if running is None else running.office()
        case "zone links":
            links = None if running is None or not running.ships else running.link_documents()
            return None if links is None else {zone.hex(): link for zone, link in links.items()}
    raise UnavailableError(f"no such question to a node of a zone: {method!r:.40}")


def _keys(store: Store) -> dict[str, bytes]:
    from space._node.federation_keys import ZoneKeys

    assert store.nodes is not None
    if not store.nodes.proved:
        raise RefusedError(
            "nodes without certificates give nobody the keys of their zone",
            hint="copy the directory zone/ of the node that has them",
        )
    return ZoneKeys.load(store.path).bundle()


def _look_after_keys(store: Store, *, renew: bool) -> str:
    """Fetches what is missing, and makes a new certificate if that is wanted; the fingerprint of the authority."""
    from datetime import UTC, datetime

    from space._node.federation_zones import Zones

    keys = Zones(store).keys()
    if renew:
        keys.renew(now=datetime.now(UTC))
    if store.federation is not None:
        store.federation.reload()
    return keys.authority.fingerprints[0]


# --- what is known of other zones -----------------------------------------------------------------


def merged(known: Mapping[str, Document], offices: Mapping[int, Any]) -> dict[str, Document]:
    """What this node knows of the other zones, with what others know better.

    How far a zone is knows who ships; what a zone said of itself, who heard of it last.
    """
    found = {zone: dict(note) for zone, note in known.items()}
    for office in offices.values():
        for zone, note in _notes(office).items():
            mine = found.setdefault(zone, {})
            if office.get("ships") is True:
                mine |= {key: note[key] for key in ("position", "broken") if key in note}
            if _heard_ns(note) > _heard_ns(mine):
                mine |= {key: each for key, each in note.items() if key not in ("position", "broken")}
    return found


def _notes(office: Any) -> Mapping[str, Document]:
    notes = office.get("notes") if isinstance(office, dict) else None
    if not isinstance(notes, dict):
        return {}
    return {zone: note for zone, note in notes.items() if isinstance(zone, str) and isinstance(note, dict)}


def _heard_ns(note: Document) -> int:
    heard = note.get("heard_ns")
    return heard if type(heard) is int else 0


def links_elsewhere(store: Store) -> tuple[int, dict[bytes, Document]]:
    """The other node that ships, and how its connections are; 0 and nothing if none does."""
    if store.nodes is None:
        return 0, {}
    for node, said in store.nodes.ask(LINKS, seconds=1.0)[0].items():
        if isinstance(said, dict):
            return node, _links(said)
    return 0, {}


def links_in(office: Any) -> dict[bytes, Document]:
    """How far zones are, as the node that ships says."""
    return _links(office.get("links") if isinstance(office, dict) else None)


def _links(said: Any) -> dict[bytes, Document]:
    """Connections by zone; none of what is malformed."""
    try:
        return {bytes.fromhex(zone): dict(link) for zone, link in said.items()}
    except (AttributeError, ValueError, TypeError):
        return {}
