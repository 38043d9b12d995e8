"""Several stores as zones without a network between them, any of which may take another one's place or be away."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import space
from space._errors import ConflictError, RefusedError, UnavailableError
from space._node.caller import Document
from space._node.federation_promote import promote
from space._node.federation_receive import ZoneReceiver
from space._node.federation_send import ZoneSource
from space._node.federation_zones import Zones
from space._node.store import Store
from space.federation.exchange import Peer
from tests.federation_pump import Pump
from tests.federation_support import introduce

NAMES: Final = ("oslo", "paris", "lima")


class Third(Pump):
    """Ships from one of several stores to another one."""

    def __init__(self, home: Store, target: Store, names: tuple[str, str]) -> None:
        self.home, self.target = home, target
        zones = Zones(home)
        self.zone = zones.find(names[1])
        peer = Zones(target).find(names[0])
        self.peer = Peer(peer.id, peer.name)
        self.receiver = ZoneReceiver(target, Zones(target))
        self.source = ZoneSource(home, zones, self.zone, {})
        self.source._ask_reached = self._ask  # type: ignore[method-assign]
        self.source._tell_heir = self._tell  # type: ignore[method-assign]
        self.shipped_bytes = 0

    def _tell(self, part: Document) -> Document:
        found: Document = json.loads(
            json.dumps(self.receiver.inherits(self.peer, json.loads(json.dumps(part))))
        )
        return found


class Several:
    """Zones that all know each other; ``away`` are those nobody reaches."""

    def __init__(self, path: Path, names: Sequence[str] = NAMES) -> None:
        self.stores = {name: space.open(path / name) for name in names}
        for name, store in self.stores.items():
            Zones(store).init(name, "metro", f"https://{name}:1")
        for one, other in itertools.permutations(names, 2):
            introduce(self.stores[one], self.stores[other], f"https://{other}:1")
        self.pumps = {pair: self._pump(pair) for pair in itertools.permutations(names, 2)}
        self.away: set[str] = set()

    def _pump(self, pair: tuple[str, str]) -> Third:
        return Third(self.stores[pair[0]], self.stores[pair[1]], pair)

    def restart(self, name: str) -> None:
        """The process of a zone that ships ends, and begins again."""
        for pair in self.pumps:
            if pair[0] == name:
                self.pumps[pair].close()
                self.pumps[pair] = self._pump(pair)

    def forget(self, name: str, other: str) -> None:
        """A zone removes another one and adds it again: all of it is to come anew."""
        Zones(self.stores[name]).remove(other, sure=True)
        introduce(self.stores[name], self.stores[other], f"https://{other}:1")
        for each in (name, other):
            self.restart(each)

    def promote(self, name: str, zone: str) -> Document:
        """One zone takes another one's place."""
        return promote(self.stores[name], Zones(self.stores[name]), zone)

    def links(self) -> list[tuple[str, str]]:
        """Who reaches whom."""
        return [pair for pair in self.pumps if not self.away.intersection(pair)]

    def ship(self, pair: tuple[str, str], shipments: int = 1 << 30) -> bool:
        """Ships over one link; whether anything could be, or was."""
        pump = self.pumps[pair]
        try:
            pump.connect()
            return pump.run(shipments) > 0
        except (UnavailableError, RefusedError, ConflictError):
            return False

    def settle(self) -> None:
        """Ships all there is between those that reach each other, until nothing more comes of it.

        Raises:
            SpaceError: something is refused in the end.
        """
        for _ in range(20):
            if not sum(self.ship(pair) for pair in self.links()):
                break
        for pair in self.links():
            self.pumps[pair].connect()
            self.pumps[pair].run()

    def close(self) -> None:
        for pump in self.pumps.values():
            pump.close()
        for store in self.stores.values():
            store.close()


@contextlib.contextmanager
def several(path: Path, names: Sequence[str] = NAMES) -> Iterator[Several]:
    """Zones that know each other."""
    with contextlib.closing(Several(path, names)) as found:
        yield found
