"""Shipping to other zones and taking what they ship, as long as this process has the store open.

One thread with one loop does both: a server for zones that ship here, and for each added zone a
:class:`space.federation.shipper.Shipper`.  Zones that are added, changed or removed meanwhile are taken up as soon
as the log says so, whoever said it.  Deciding, reading the log and everything else that may wait is done on other
threads.

On a node of a cluster the server is always there, and shippers are while it is this node that ships
(:mod:`space._node.federation_nodes`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, Self

import attrs

from space._errors import SpaceError, UnavailableError, UsageError
from space._node.caller import Document
from space._node.federation_keys import ZoneAuthority, ZoneKeys, trust
from space._node.federation_nodes import DISTANCE, OFFICE, chosen, links_in, merged
from space._node.federation_receive import ZoneReceiver
from space._node.federation_send import ZoneSource
from space._node.federation_shelf import StoreShelf
from space._node.federation_status import Backlog, load_notes, save_notes
from space._node.federation_zones import Zone, Zones
from space.events.types import ZoneAdded, ZoneChanged, ZoneDefined, ZoneRemoved
from space.federation.exchange import Throttle
from space.federation.server import FederationServer
from space.federation.shipment import SHIPMENT_BYTES_MAX
from space.federation.shipper import Shipper, Target

if TYPE_CHECKING:
    from space._node.store import Store
    from space.events.codec import Entry

LINGER_SECONDS: Final = 0.1
"""How long the loop goes on at its end: asyncio closes sockets of TLS handshakes that were given up a little later."""

WATCH_SECONDS: Final = 1.0
"""How often promises (rpo) are looked at, and the other nodes of a cluster asked what they do."""

TURN_SECONDS: Final = 0.1
"""How often a node looks whether it is to ship: shorter than an election, after which another one is."""

STAND_IN_SECONDS: Final = 3.0
"""How long a node that does not lead waits for the one that does to federate: that one may just have been started."""

_ABOUT_ZONES: Final = (ZoneDefined, ZoneAdded, ZoneChanged, ZoneRemoved)

log: Final = logging.getLogger("space.federation")


@attrs.define(eq=False)
class _Link:
    """What ships to one zone."""

    zone: Zone
    source: ZoneSource
    shipper: Shipper
    task: asyncio.Task[None]


class Federation:
    """See the module's text."""

    def __init__(
        self,
        store: Store,
        listen: str | None,
        *,
        bandwidth: int = 0,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """Begins to ship, and to listen at ``HOST:PORT`` if that is given.

        Args:
            store: whose log it is.
            listen: where other zones reach this one; None only ships.
            bandwidth: bytes a second that may leave for each zone; 0 is any number.
            chance: random numbers from 0 to 1.

        Raises:
            NotFoundError: the store is in no zone.
            UnavailableError: the address cannot be listened on, or the process federates already.
            UsageError: not an address.
        """
        if store.federation is not None:
            raise UnavailableError(f"store {store.path} federates already")
        self._address = None if listen is None else parse_listen(listen)
        self._store = store
        self._zones = Zones(store)
        self._keys = self._zones.keys()
        self._bandwidth = bandwidth
        self._chance = chance
        self._links: dict[bytes, _Link] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._receiver = ZoneReceiver(store, self._zones)
        self._notes: dict[str, Document] = load_notes(store.path)
        own = self._zones.own()
        self._authorities = b"" if own is None else own.authorities
        self._stale_keys = False
        self._offices: dict[int, Any] = {}
        self.sender = 0
        """The node of the cluster that ships, as far as is known here; 0: none, or there is no cluster."""
        self.backlog = Backlog(store.wal)
        self._tls = self._keys.server_context()
        self._begun: Future[int] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._changed = asyncio.Event()
        self._stirred = False
        self._thread = threading.Thread(target=self._run, name="space-federation", daemon=True)
        self._thread.start()
        self.port = self._begun.result()
        store.watchers.append(self._watch)
        store.federation = self
        self._soon(self._look)

    @property
    def url(self) -> str | None:
        """Where it listens."""
        if self._address is None:
            return None
        host = self._address[0]
        return f"https://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def ships(self) -> bool:
        """Whether it is this process that ships."""
        nodes = self._store.nodes
        return nodes is None or self.sender == nodes.number

    def reload(self) -> None:
        """Takes the keys as they are now, for connections made from now on."""
        self._stale_keys = True
        self._soon(self._look)

    def close(self) -> None:
        """Hangs up, and returns when nothing of it runs any more."""
        self._store.federation = None
        if self._watch in self._store.watchers:
            self._store.watchers.remove(self._watch)
        if self._stop is not None:
            self._soon(self._stop.set)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the loop ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._main())  # not uvloop's: it does not wait for TLS connections to end
        except BaseException as error:  # whoever waits for the start is told; else it is in the log
            if self._begun.done():
                log.exception("federation has ended")
            else:
                self._begun.set_exception(error)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        shelf = StoreShelf(self._store, self._keys.identity.id)
        server = FederationServer(
            self._receiver, self._tls, shipment_bytes_max=SHIPMENT_BYTES_MAX, shelf=shelf
        )
        port = 0 if self._address is None else await server.start(*self._address)
        self._changed.set()
        work = [self._follow_zones(), self._watch_links()]
        if self._store.nodes is not None:
            work += [self._take_turns(), self._ask_nodes()]
        tasks = [asyncio.create_task(each) for each in work]
        for task in tasks:
            task.add_done_callback(_complain)
        try:
            self._begun.set_result(port)
            await self._stop.wait()
        finally:
            tasks += [link.task for link in self._links.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for zone in list(self._links):
                self._end(zone)
            await asyncio.gather(*self._closing, return_exceptions=True)
            await server.close()
            await asyncio.sleep(LINGER_SECONDS)

    def _soon(self, work: Callable[[], Any]) -> None:
        """Has the loop do something, from any thread."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(work)
        except RuntimeError:  # it is closed
            return

    def _watch(self, entries: Sequence[Entry]) -> None:
        """Told of every batch, under the store's lock."""
        for entry in entries:
            if any(isinstance(event, _ABOUT_ZONES) for _, event in entry.events):
                self._soon(self._look)
        # Waking the loop costs the writer half of what a small write does: not for links that are down.
        if not self._stirred and any(link.shipper.listens for link in list(self._links.values())):
            self._stirred = True
            self._soon(self._stir)

    def _stir(self) -> None:
        self._stirred = False
        for link in self._links.values():
            link.shipper.wake()

    def _take_keys(self, keys: ZoneKeys) -> None:
        keys.reload(self._tls)
        self._keys = keys
        for zone in list(self._links):
            self._end(zone)

    def _look(self) -> None:
        """Has the zones looked at."""
        self._changed.set()

    async def _follow_zones(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self._look_at_zones()
            except SpaceError as error:
                log.warning("this zone goes on as it was: %s", error)
                await asyncio.sleep(WATCH_SECONDS)
                self._look()

    async def _look_at_zones(self) -> None:
        """Does as the log says, and as the keys are.

        Raises:
            SpaceError: they cannot be read; on a node of a cluster, perhaps not now.
        """
        own, others = await asyncio.to_thread(self._known)
        authorities = b"" if own is None else own.authorities
        if self._stale_keys or (self._store.nodes is not None and authorities != self._authorities):
            await self._look_at_keys()
            self._authorities = authorities
        for zone in others:
            trust(self._tls, ZoneAuthority.parse(zone.authorities))
        await self._refresh(others if self.ships else [])

    async def _look_at_keys(self) -> None:
        stale, self._stale_keys = self._stale_keys, False
        try:
            keys = await asyncio.to_thread(self._zones.keys)
        except SpaceError:
            self._stale_keys = True
            raise
        if stale or keys.authority != self._keys.authority:
            self._take_keys(keys)

    def _known(self) -> tuple[Zone | None, list[Zone]]:
        with self._store.still():  # a batch that is being written is in the tables then
            return self._zones.own(), self._zones.others()

    async def _refresh(self, zones: Sequence[Zone]) -> None:
        """Begins to ship to zones that are new, and ends with those that have gone."""
        others = {zone.id: zone for zone in zones}
        for number, link in list(self._links.items()):
            if others.get(number) != link.zone:
                self._end(number)
        for number, zone in others.items():
            if number not in self._links:
                note = self._notes.get(str(uuid.UUID(bytes=zone.id)), {})
                source = await asyncio.to_thread(ZoneSource, self._store, self._zones, zone, note)
                self._begin(zone, source)

    def _begin(self, zone: Zone, source: ZoneSource) -> None:
        tls = self._keys.client_context(ZoneAuthority.parse(zone.authorities))
        target = Target(zone.name, zone.url, tls, source, Throttle(self._bandwidth))
        shipper = Shipper(target, chance=self._chance)
        task = asyncio.create_task(shipper.run(), name=f"ship to {zone.name}")
        task.add_done_callback(_complain)
        self._links[zone.id] = _Link(zone, source, shipper, task)

    def _end(self, zone: bytes) -> None:
        link = self._links.pop(zone)
        link.task.cancel()
        closing = asyncio.create_task(asyncio.to_thread(link.source.close))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    # --- the other nodes of a cluster ----------------------------------------------------------------

    async def _take_turns(self) -> None:
        """Ships while it is this node's turn."""
        nodes = self._store.nodes
        assert nodes is not None
        wanted, since = 0, 0.0
        while True:
            federating = {nodes.number} | {node for node, each in self._offices.items() if each is not None}
            sender = chosen(nodes.leader, federating, self.sender)
            if sender != wanted:
                wanted, since = sender, time.monotonic()
            patience = STAND_IN_SECONDS if nodes.leader != sender == nodes.number else 0.0
            if sender != self.sender and time.monotonic() - since >= patience:
                log.info("node %d ships to other zones now", sender)
                self.sender = sender
                self._look()
            await asyncio.sleep(TURN_SECONDS)

    async def _ask_nodes(self) -> None:
        """Keeps an eye on what the other nodes do and know, for when it is this one's turn."""
        while True:
            await asyncio.to_thread(self._look_at_nodes)
            await asyncio.sleep(WATCH_SECONDS)

    def _look_at_nodes(self) -> None:
        nodes = self._store.nodes
        assert nodes is not None
        said, failed = nodes.ask(OFFICE, seconds=WATCH_SECONDS)
        # A leader that is slow to answer has not ended: if it had, another one would lead.
        slow = {node: each for node, each in self._offices.items() if node in failed and node == nodes.leader}
        self._offices = said | slow

    def office(self) -> Document:
        """What the other nodes of a cluster are told: whether this one ships, and what it knows of other zones."""
        links = self.link_documents() if self.ships else {}
        far = {zone.hex(): {key: link[key] for key in DISTANCE} for zone, link in links.items()}
        return {"ships": self.ships, "notes": self._known_notes(), "links": far}

    async def _watch_links(self) -> None:
        """Looks every second whether promises are kept, and keeps what is known of the zones."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            await asyncio.to_thread(self._look_at_links)

    def _look_at_links(self) -> None:
        notes = self._known_notes()
        for link in list(self._links.values()):
            try:
                link.source.look_at_promises()
            except SpaceError as error:
                log.warning("the promises to zone %s cannot be looked at: %s", link.zone.name, error)
            notes.setdefault(str(uuid.UUID(bytes=link.zone.id)), {}).update(link.source.note())
        if notes != self._notes:
            self._notes = notes
            save_notes(self._store.path, notes)

    def _known_notes(self) -> dict[str, Document]:
        """What is known of the other zones here and on the other nodes, with what they just said."""
        notes = merged(self._notes, self._offices)
        for zone, heard in self._receiver.heard_all().items():
            mine = notes.setdefault(str(uuid.UUID(bytes=zone)), {})
            if heard["heard_ns"] > (mine.get("heard_ns") or 0):
                mine.update(heard)
        return notes

    def heard_of(self, zone: bytes) -> Document:
        """What a zone last said of its log."""
        return self._receiver.heard_of(zone)

    # --- shown -------------------------------------------------------------------------------------

    def distances(self) -> dict[bytes, Document]:
        """Whether each zone is connected and how far it is, by its id: seen from the node that ships."""
        if self.ships:
            return self.link_documents()
        told = self._offices.get(self.sender)
        return {} if told is None else links_in(told)

    def link_documents(self) -> dict[bytes, Document]:
        """How this process' connection to each zone is, by its id."""
        now = time.monotonic()
        found = {}
        for number, link in list(self._links.items()):
            status = link.shipper.status
            found[number] = {
                "connected": status.connected,
                "at": status.at,
                "error": status.error,
                "error_ns": status.error_ns,
                "rtt_seconds": status.rtt_seconds,
                "flight_bytes": status.flight_bytes,
                "sent_bytes": status.sent_bytes,
                "shipments": status.shipments,
                "bytes_per_second": round(status.throughput(now)),
                **link.source.document(),
            }
        return found


def _complain(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s has ended", task.get_name(), exc_info=error)


def parse_listen(text: str) -> tuple[str, int]:
    """Host and port.

    Raises:
        UsageError: not ``HOST:PORT``.
    """
    host, separator, port = text.rpartition(":")
    if not separator or not host or not (port.isascii() and port.isdecimal()) or int(port) > 0xFFFF:
        raise UsageError(f"not an address: {text!r:.80}", hint="write HOST:PORT")
    return host.strip("[]"), int(port)
