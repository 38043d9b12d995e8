"""One zone in a process of its own: the library, and ``Federation`` as ``space federation serve`` runs it."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import space
from space._node.federation import Federation
from space._node.federation_promote import branches, promote
from space._node.federation_receive import ZoneReceiver
from space._node.federation_status import Backlog
from space._node.federation_zones import Zones
from space._node.store import Store
from space.events.commands import Durability
from space.federation.exchange import Peer
from space.federation.server import Received
from space.policy import model
from space.policy.model import Compression, Policy, Sovereignty

TREE: Final = "/all"
STALL_SECONDS: Final = 300.0
_POLL_SECONDS: Final = 0.002


def shipped_to(zone: str, *, durable: bool) -> Policy:
    """What is shipped as it is, which is what everybody else here does with it."""
    return Policy(
        sovereignty=Sovereignty.GLOBAL,
        federation_targets=(zone,),
        compression=Compression.NONE,
        durability=model.Durability.DURABLE if durable else model.Durability.BUFFERED,
    )


def make_two(paths: Sequence[Path], urls: Sequence[str]) -> None:
    """Two zones, ``home`` and ``target``, that know each other; the tree of the first goes to the other."""
    names = ("home", "target")
    with space.open(paths[0]) as home, space.open(paths[1]) as target:
        stores = (home, target)
        for store, name, url in zip(stores, names, urls, strict=True):
            Zones(store).init(name, "metro", url)
        for number in range(2):
            keys = Zones(stores[1 - number]).keys()
            Zones(stores[number]).add(
                names[1 - number], urls[1 - number], keys.authority.pem, None, offline=True
            )
        home.set_policy(home.mkdir(TREE), shipped_to("target", durable=False))


class Zone:
    """What can be asked of the process.  Moments are of ``time.monotonic``, which all processes share."""

    def __init__(self, path: str) -> None:
        self._store: Store = space.open(path)
        self._federation: Federation | None = None
        self._arrivals: list[tuple[int, float]] = []
        self._came = threading.Condition()
        self._met = 0.0
        self._watch_receiver()

    def _watch_receiver(self) -> None:
        """Notes when the other zone connects, and when shipments are durable here: when they may be answered."""
        identity, receive, settle = ZoneReceiver.identity, ZoneReceiver.receive, ZoneReceiver.settle
        taken: list[int] = []

        def identity_and_note(receiver: ZoneReceiver, peer: Peer) -> dict[str, Any]:
            self._met = time.monotonic()
            return identity(receiver, peer)

        def receive_and_note(receiver: ZoneReceiver, peer: Peer, shipments: Sequence[bytes]) -> Received:
            received = receive(receiver, peer, shipments)
            with self._came:
                taken.extend(int(cursor["position"]) for cursor in received.cursors)
            return received

        def settle_and_note(receiver: ZoneReceiver) -> None:
            with self._came:
                count = len(taken)
            settle(receiver)
            now = time.monotonic()
            with self._came:
                self._arrivals += [(position, now) for position in taken[:count]]
                del taken[:count]
                self._came.notify_all()

        setattr(ZoneReceiver, "identity", identity_and_note)  # noqa: B010 - a method is not assigned to
        setattr(ZoneReceiver, "receive", receive_and_note)  # noqa: B010
        setattr(ZoneReceiver, "settle", settle_and_note)  # noqa: B010

    def begin(self, listen: str) -> None:
        """Ships and listens; a zone that was away is asked as soon as it would ever be."""
        self._federation = Federation(self._store, listen, chance=lambda: 0.0)

    def end(self) -> None:
        """Neither ships nor listens any more."""
        if self._federation is not None:
            self._federation.close()
            self._federation = None

    # --- content ---------------------------------------------------------------------------------

    def put_files(self, label: str, directory: str) -> int:
        """Every file of a directory, one after the other; the position of the last."""
        position = 0
        for path in sorted(Path(directory).iterdir()):
            with path.open("rb") as file:
                position = self._store.put(file, name=f"{TREE}/{label}/{path.name}").position
        self._store.sync()
        return position

    def overwrite(self, path: str, size: int, step: int) -> int:
        """Random bytes over a file, in writes of ``step``; the position after the last."""
        capsule = self._store.resolve(path)
        for at in range(0, size, step):
            data = os.urandom(min(step, size - at))
            self._store.write(capsule, at, data, durability=Durability.BUFFERED)
        self._store.sync()
        return self._store.position

    def steady(self, label: str, size: int, rate: float, seconds: float) -> list[tuple[int, float]]:
        """Durable writes at a steady rate: the position of each, and when it was durable."""
        capsule = self._store.put(b"", name=f"{TREE}/{label}").id
        data, done = os.urandom(size), []
        began = time.monotonic()
        for number in range(round(rate * seconds)):
            time.sleep(max(0.0, began + number / rate - time.monotonic()))
            receipt = self._store.write(capsule, number * size, data, durability=Durability.DURABLE)
            done.append((receipt.position, time.monotonic()))
        return done

    def puts(self, label: str, count: int, size: int) -> list[float]:
        """Seconds that puts of small files take, each on the disk when it returns."""
        policy, took = shipped_to("target", durable=True), []
        data = os.urandom(size)
        for number in range(count):
            began = time.perf_counter()
            self._store.put(data, name=f"{TREE}/{label}-{number}", policy=policy)
            took.append(time.perf_counter() - began)
        return took

    def writes(self, label: str, count: int, size: int) -> list[float]:
        """Seconds that writes take, each in the log when it returns, as one batch."""
        capsule = self._store.put(b"", name=f"{TREE}/{label}").id
        data, took = os.urandom(size), []
        for number in range(count):
            began = time.perf_counter()
            self._store.write(capsule, number * size, data, durability=Durability.BUFFERED)
            took.append(time.perf_counter() - began)
        return took

    # --- how far ---------------------------------------------------------------------------------

    def position(self) -> int:
        """Where the log ends."""
        return self._store.position

    def log_bytes(self, position: int, last: int) -> int:
        """Metadata and payload of the log after a position, up to another."""
        return Backlog(self._store.wal).after(position, last).bytes

    def _link(self) -> dict[str, Any]:
        if self._federation is None:
            return {}
        (document,) = self._federation.link_documents().values() or ({},)
        return document

    def shipped(self, position: int) -> None:
        """Returns when the other zone has everything up to a position; asking costs the shipping something.

        Raises:
            RuntimeError: it does not come there.
        """
        deadline = time.monotonic() + STALL_SECONDS
        while not ((link := self._link()).get("connected") and (link.get("position") or 0) >= position):
            if time.monotonic() > deadline:
                raise RuntimeError(f"not shipped: {link}")
            time.sleep(_POLL_SECONDS)

    def arrived(self, position: int) -> list[tuple[int, float]]:
        """Up to which position what came was durable here, and when, since this was last asked, up to a position.

        Raises:
            RuntimeError: it does not come there.
        """
        with self._came:
            if not self._came.wait_for(
                lambda: self._arrivals and self._arrivals[-1][0] >= position, STALL_SECONDS
            ):
                raise RuntimeError(f"position {position} did not come")
            found, self._arrivals = self._arrivals, []
        return found

    def met(self) -> float:
        """When the other zone last connected here."""
        return self._met

    # --- who is the home -------------------------------------------------------------------------

    def promote(self, zone: str) -> None:
        """Takes the place of the other zone."""
        promote(self._store, Zones(self._store), zone)

    def branches(self) -> int:
        """How many branches of lost homes there are."""
        return len(branches(self._store))

    def digest(self, path: str) -> str:
        """Of the content of a file."""
        from blake3 import blake3

        return blake3(self._store.get(self._store.resolve(path))).hexdigest()

    def close(self) -> None:
        """Ends the zone."""
        self.end()
        self._store.close()


def share(values: Sequence[float], part: float) -> float:
    """The value that so much of all is not above."""
    return statistics.quantiles(values, n=100, method="inclusive")[round(part * 100) - 1]
