"""Two stores as zones without a network between them: shipments are handed over one by one, as far as a test wants."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from unittest import mock

import space
from space._errors import UnavailableError
from space._node import transfer
from space._node.caller import Document
from space._node.federation_move import Residence, parse_residences
from space._node.federation_promote import Arrival, parse_arrivals, predict
from space._node.federation_receive import ZoneReceiver
from space._node.federation_send import ZoneSource
from space._node.federation_status import save_notes
from space._node.federation_zones import Zones
from space._node.store import Store
from space.events.ids import CapsuleId
from space.federation.exchange import Peer
from space.federation.translate import missing_capsule
from tests.federation_support import introduce

LACKING_MAX: Final = 100
"""Capsules a target turns out not to have before it is no accident."""


class Pump:
    """Ships from one store to the other; counts what goes."""

    def __init__(self, home: Store, target: Store) -> None:
        self.home, self.target = home, target
        zones = Zones(home)
        (self.zone,) = zones.others()
        (peer,) = Zones(target).others()
        self.peer = Peer(peer.id, peer.name)
        self.receiver = ZoneReceiver(target, Zones(target))
        self.source = ZoneSource(home, zones, self.zone, {})
        self.source._ask_reached = self._ask  # type: ignore[method-assign]
        self.shipped_bytes = 0

    def _ask(self, capsules: Sequence[bytes]) -> list[Arrival]:
        found = self.receiver.reached(self.peer, [each.hex() for each in capsules])
        return parse_arrivals(json.loads(json.dumps(found)), len(capsules))

    def homes(self, given: Mapping[bytes, int], declined: int) -> list[Residence]:
        """What the target answers about homes it was given."""
        asked = [(each.hex(), position) for each, position in given.items()]
        return parse_residences(
            json.loads(json.dumps(self.receiver.homes(self.peer, asked, declined))), len(given)
        )

    def connect(self) -> None:
        """Agrees where to go on."""
        self.source.connected({}, self.receiver.cursors(self.peer))

    def run(self, shipments: int = 1 << 30) -> int:
        """Ships up to so many; returns how many there were.

        Raises:
            SpaceError: one was refused, and not because the target lacks a capsule, which it gets then.
        """
        count = lacking = 0
        while count < shipments and (outgoing := self.source.next()) is not None:
            received = self.receiver.receive(self.peer, [outgoing.body])
            if received.error is not None:
                self.source.refused(received.error)
                lacking += 1
                if missing_capsule(received.error) is None or lacking > LACKING_MAX:
                    raise received.error
                self.connect()
                continue
            self.source.acknowledged(outgoing, received.cursors[0])
            self.shipped_bytes += len(outgoing.body)
            count += 1
        return count

    def pulse(self) -> None:
        """Says what there is."""
        self.receiver.heard(self.peer, json.loads(json.dumps(self.source.pulse())))

    def close(self) -> None:
        self.source.close()


class Pumped:
    """Two zones, ``oslo`` and ``paris``; ``there`` ships to paris and ``back`` to oslo."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self._path = path
        self._open()
        for store, name in ((self.oslo, "oslo"), (self.paris, "paris")):
            Zones(store).init(name, "metro", f"https://{name}:1")
        introduce(self.oslo, self.paris, "https://paris:1")
        introduce(self.paris, self.oslo, "https://oslo:1")
        self.there, self.back = Pump(self.oslo, self.paris), Pump(self.paris, self.oslo)
        stack.callback(self._close)

    def _open(self) -> None:
        self.oslo, self.paris = space.open(self._path / "oslo"), space.open(self._path / "paris")

    def _close(self) -> None:
        for pump in (self.there, self.back):
            pump.close()
        for store in (self.oslo, self.paris):
            store.close()

    def reopen(self) -> None:
        """Both processes end and begin again."""
        self._close()
        self._open()
        self.there, self.back = Pump(self.oslo, self.paris), Pump(self.paris, self.oslo)
        self.there.connect()
        self.back.connect()

    def settle(self) -> None:
        """Lets both connect until they agree, and ship all there is."""
        for pump in (self.there, self.back, self.there, self.back):
            with contextlib.suppress(UnavailableError):
                pump.connect()
        for pump in (self.there, self.back):
            pump.connect()
            pump.run()

    def predicted(self) -> Document:
        """What ``paris`` would lose if it took over now: told by ``oslo`` to whoever listens there."""
        heard = self.there.receiver.heard_of(self.back.zone.id)
        note = {str(CapsuleId(self.back.zone.id)): heard}
        save_notes(self.paris.path, note)
        return predict(self.paris, self.back.zone)

    def restart(self, name: str) -> None:
        """What a zone that ships forgets when its process ends."""
        pump: Any = Pump(*((self.oslo, self.paris) if name == "oslo" else (self.paris, self.oslo)))
        (self.there if name == "oslo" else self.back).close()
        setattr(self, "there" if name == "oslo" else "back", pump)


PUT_AT_ONCE_FROM: Final = 1_000_000
"""Seeds from which on simulations put small files as one position, as the store does; the others, as it does with large
ones: created, written, named.  What seeds found once was found that way."""


def put_by(seed: int) -> contextlib.AbstractContextManager[object]:
    """Has the store put small files as the simulation with that seed does."""
    if seed >= PUT_AT_ONCE_FROM:
        return contextlib.nullcontext()
    return mock.patch.object(transfer, "_put_at_once", return_value=None)


@contextlib.contextmanager
def pumped(path: Path) -> Iterator[Pumped]:
    """Two zones that know each other."""
    with contextlib.ExitStack() as stack:
        yield Pumped(path, stack)
