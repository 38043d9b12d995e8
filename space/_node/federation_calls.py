"""What can be asked of a store about zones and shipping, as plain data."""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from typing import TYPE_CHECKING, Final

from space._errors import SpaceError, UnavailableError
from space._node.caller import Document

if TYPE_CHECKING:
    from space._node.federation import Federation
    from space._node.federation_zones import Zones
    from space._node.store import Store

AGAIN_SECONDS: Final = 1.0
"""How soon a node tries again to federate."""

log: Final = logging.getLogger("space.federation")


def begin_federation(store: Store, listen: str | None, *, bandwidth: int = 0) -> Federation:
    """Ships to other zones and takes what they ship until the store is closed.

    Raises:
        NotFoundError: the store is in no zone.
        UnavailableError: the address cannot be listened on, or aiohttp is not installed.
    """
    _check_installed()
    from space._node.federation import Federation

    return Federation(store, listen, bandwidth=bandwidth)


def _check_installed() -> None:
    if importlib.util.find_spec("aiohttp") is None:
        raise UnavailableError(
            "federation needs the Python package aiohttp", hint="pip install 'space-store[federation]'"
        )


class KeptFederation:
    """Federation of a node, as soon as that is possible: the zone comes with the log, its keys from other nodes."""

    def __init__(self, store: Store, listen: str) -> None:
        """Begins to try.

        Raises:
            UnavailableError: aiohttp is not installed.
            UsageError: not an address.
        """
        _check_installed()
        from space._node.federation import parse_listen

        parse_listen(listen)
        self._store = store
        self._listen = listen
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="space-federate", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        said = ""
        while not self._over.is_set():
            try:
                running = begin_federation(self._store, self._listen)
            except SpaceError as error:
                if str(error) != said:
                    log.warning("nothing is shipped, and other zones are not answered yet: %s", error)
                    said = str(error)
                self._over.wait(AGAIN_SECONDS)
            else:
                log.info("other zones are answered at %s", running.url)
                self._over.wait()
                running.close()

    def retire(self, seconds: float) -> None:
        """Ends it, and waits so long: it may just wait for a quorum."""
        self._over.set()
        self._thread.join(seconds)

    def close(self) -> None:
        """Waits until it has ended; the node has stopped, so that nothing waits for a quorum."""
        self._thread.join()


class FederationCalls:
    """A part of :class:`space._node.service.Service`."""

    store: Store

    @property
    def _zones(self) -> Zones:
        from space._node.federation_zones import Zones  # certificates take long to load

        return Zones(self.store)

    def zone_init(self, *, name: str, kind: str = "metro", url: str = "") -> Document:
        """Makes the zone of the store."""
        return self._zones.init(name, kind, url)

    def zone_authority(self) -> Document:
        """What other zones are told of this one."""
        keys = self._zones.keys()
        return {"zone": keys.identity.name, "authority": keys.offer()[0].decode("ascii")}

    def zone_add(
        self, *, name: str, url: str, authority: str, kind: str | None = None, offline: bool = False
    ) -> Document:
        """Makes another zone known."""
        return self._zones.add(name, url, authority.encode(errors="replace"), kind, offline=offline)

    def zones(self) -> list[Document]:
        """All zones that are known, this one first."""
        return self._zones.documents()

    def zone_remove(self, *, name: str, sure: bool = False) -> Document:
        """Ends shipping to and from a zone."""
        return self._zones.remove(name, sure=sure)

    def zone_predict(self, *, name: str) -> Document:
        """What would be lost if this zone took the place of another one now."""
        from space._node.federation_promote import predict

        return predict(self.store, self._zones.find(name))

    def zone_promote(self, *, name: str, again: bool = False) -> Document:
        """Takes the place of another zone."""
        from space._node.federation_promote import promote

        return promote(self.store, self._zones, name, again=again)

    def zone_move(self, *, capsule: str, name: str) -> Document:
        """Gives the home of a capsule, or of all in a directory, to another zone."""
        from space._node.federation_move import hand_over

        return hand_over(self.store, self._zones, capsule, name)

    def zone_take_back(self, *, name: str) -> Document:
        """Takes back homes that were given to another zone and that it has not taken."""
        from space._node.federation_move import take_back

        return take_back(self.store, self._zones, name)

    def zone_branches(self) -> list[Document]:
        """What homes that were lost had not shipped."""
        from space._node.federation_promote import branches

        return branches(self.store)

    def zone_arrival(self) -> Document:
        """How content that other zones ship is encoded here."""
        from space._node.federation_arrival import describe

        return describe(self.store)

    def zone_arrival_set(self, *, policy: Document) -> Document:
        """Encodes what other zones ship from now on by a policy of few keys; without any it stays as it comes."""
        from space._node.federation_arrival import parse, set_policy

        return set_policy(self.store, parse(policy))

    def verify_sovereignty(self) -> Document:
        """Whether the log says that every shipment was allowed."""
        from space._node.federation_audit import audit

        return audit(self.store)

    def zone_renew(self) -> Document:
        """Gives this zone another certificate of the same authority."""
        renewed = self._zones.renew()
        self._reload()
        return renewed

    def zone_roll_over(self, *, force: bool = False) -> Document:
        """Gives this zone another authority."""
        rolled = self._zones.roll_over(force=force)
        self._reload()
        return rolled

    def _reload(self) -> None:
        if self.store.federation is not None:
            self.store.federation.reload()

    def federation_begin(self, *, listen: str | None = None, bandwidth: int = 0) -> Document:
        """Lets the process that has the store open ship to other zones, and listen at ``HOST:PORT`` for theirs."""
        running = begin_federation(self.store, listen, bandwidth=bandwidth)
        return {
            "zone": self._zones.keys().identity.name,
            "listen": running.url,
            "pid": os.getpid(),
            "data": str(self.store.path.absolute()),
            "zones": [zone.name for zone in self._zones.others()],
        }

    def federation_end(self) -> Document:
        """Ends what :meth:`federation_begin` began."""
        running = self.store.federation
        if running is not None:
            running.close()
        return {"ended": running is not None}

    def federation_status(self, *, capsules: bool = False) -> Document:
        """How far each zone has come; ``capsules`` lists those that have not all they are to have."""
        from space._node.federation_status import status

        return status(self.store, capsules=capsules)
