"""Shipments on their way into the log: who may send them, and what is made of them before they are decided.

Everything a shipment holds is decided like anybody's commands (:class:`space.events.commands.ReceiveShipment`), so a
zone can do no more here than commands on its own replicas can.  What is done before: the bytes are checked, they have
to be from whom the connection is and for this zone, data keys that were sealed for this zone on the way are opened
and wrapped by this store's master key, and frames are checked and made this store's (:mod:`space.federation.arrival`),
encoded as its arrival policy says (:mod:`space._node.federation_arrival`).
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs

from space._errors import ConflictError, RefusedError, SpaceError, UsageError
from space._node.caller import Document
from space._node.federation_arrival import ShipmentKeys, recoder
from space._node.federation_heir import Listening, follow_heir, roots_for
from space._node.federation_keys import ZoneAuthority, ZoneKeys, claimed, proves
from space._node.federation_move import residences
from space._node.federation_promote import ASKED_MAX, arrivals
from space.events import commands as cmd
from space.events.commands import Command, Durability, Request
from space.events.ids import ID_BYTES, zone_root
from space.federation.arrival import Recode, arrived
from space.federation.exchange import VERSION, Peer
from space.federation.sealing import is_for_home, open_key
from space.federation.selection import Selection
from space.federation.server import Received
from space.federation.shipment import Shipment, decode_shipment
from space.statemachine import zones as rows
from space.statemachine.tables import CAPSULE, POLICY, U32, CapsuleRow, Overlay

if TYPE_CHECKING:
    from space._node.federation_zones import Zone, Zones
    from space._node.store import Store
    from space.statemachine.store import ReadTransaction

POSITION_MAX: Final = (1 << 63) - 1


class ZoneReceiver:
    """The zone as others see it: a :class:`space.federation.server.Receiver`; called on any thread."""

    def __init__(self, store: Store, zones: Zones) -> None:
        self._store = store
        self._zones = zones
        self._lock = threading.Lock()
        self._heard: dict[bytes, Document] = {}
        self._listening = Listening()

    def recognise(self, certificate: bytes) -> Peer:
        identity = claimed(certificate)
        zone = None if identity is None else self._known(identity.id)
        if zone is None or not proves(ZoneAuthority.parse(zone.authorities), certificate):
            raise RefusedError(
                "the certificate shown is of no zone that was added here", hint="space zone add, on this side"
            )
        return Peer(zone.id, zone.name)

    def _known(self, number: bytes) -> Zone | None:
        return next((zone for zone in self._zones.others() if zone.id == number), None)

    def _sender(self, peer: Peer) -> Zone:
        zone = self._known(peer.id)
        if zone is None:
            raise RefusedError(f"zone {peer.name} was removed here", hint="space zone add, on this side")
        return zone

    def identity(self, peer: Peer) -> Document:
        keys = self._zones.keys()
        return {
            "zone": keys.identity.name,
            "id": str(uuid.UUID(bytes=keys.identity.id)),
            "kind": keys.identity.kind,
            "versions": [VERSION],
            "leads": self._leads(),
            "position": self._store.position,
            "fingerprints": keys.authority.fingerprints,
            "knows": {"fingerprints": ZoneAuthority.parse(self._sender(peer).authorities).fingerprints},
        }

    def _leads(self) -> bool:
        """Whether commands are decided here, and not handed on to another node."""
        nodes = self._store.nodes
        return nodes is None or nodes.leader == nodes.number

    def cursors(self, peer: Peer) -> Document:
        with self._store._read() as txn:
            row = rows.zone_row(txn, peer.id)
            streams = rows.cursors(txn, peer.id)
            promoted = 0 if row is None else rows.begins_at(txn, peer.id, row)
            own = promoted > 0 and _has_own(txn, peer.name)
            # Something of it came before this store followed it, and it was removed and added since.
            began = txn.get(CAPSULE, bytes(zone_root(peer.id))) is not None
            forgotten = row is not None and row.base > 0 and not streams and began
            third = _third(txn, peer.id)
        return {
            "epoch": 0 if row is None else row.epoch,
            "base": 0 if row is None else row.base,
            "promoted": promoted,
            "own": own,
            "forgotten": forgotten,
            **third,
            "sweeps": True,
            "cursors": [
                {
                    "shard": shard,
                    "lane": lane,
                    "position": cursor.position,
                    "step": cursor.step,
                    "resume": cursor.resume.hex(),
                }
                for shard, lane, cursor in streams
            ],
        }

    def receive(self, peer: Peer, shipments: Sequence[bytes]) -> Received:
        cursors: list[Document] = []
        error = None
        with self._store.stale():  # who may ship is decided anew; and what was decided is here then
            for body in shipments:
                try:
                    cursors.append(self._take(peer, body))
                except SpaceError as failed:
                    error = failed
                    break
        return Received(cursors, error)

    def settle(self) -> None:
        self._store.sync()

    def _take(self, peer: Peer, body: bytes) -> Document:
        shipment = decode_shipment(body)
        self._check(peer, shipment)
        adoption = _Adoption(self._store, self._zones.keys, peer.id)
        requests = [
            Request(adoption.adopted(command), f"zone:{peer.name}") for command in shipment.received()
        ]
        for outcome in self._store.execute_all(requests, durability=Durability.BUFFERED):
            if isinstance(outcome, SpaceError):
                raise outcome
        with self._store._read() as txn:
            cursor = rows.cursor_row(txn, peer.id, shipment.shard, shipment.lane)
        return {
            "shard": shipment.shard,
            "lane": shipment.lane,
            "position": cursor.position,
            "step": cursor.step,
        }

    def _check(self, peer: Peer, shipment: Shipment) -> None:
        """Refuses what is not from the zone that sends it, or not for this one."""
        self._sender(peer)
        own = self._zones.own()
        if shipment.home != peer.id:
            raise RefusedError(f"zone {peer.name} ships what is zone {uuid.UUID(bytes=shipment.home)}'s")
        if own is None or shipment.zone != own.id:
            raise ConflictError(f"a shipment for zone {uuid.UUID(bytes=shipment.zone)} came here")

    def reached(self, peer: Peer, capsules: Sequence[str]) -> Document:
        found = arrivals(self._store, peer.id, _ids(capsules))
        return {"capsules": [attrs.astuple(each) for each in found]}

    def inherits(self, peer: Peer, told: Document) -> Document:
        with self._lock:
            found = self._listening.take(peer.id, told)
        if found is None:
            return {"follows": False, "cursors": None}
        with self._store.stale():
            follows = follow_heir(self._store, self._sender(peer), found)
        return {"follows": follows, "cursors": self.cursors(peer)}

    def homes(self, peer: Peer, capsules: Sequence[tuple[str, int]], declined: int) -> Document:
        ids = _ids([each for each, _ in capsules])
        given = list(zip(ids, (position for _, position in capsules), strict=True))
        if declined:
            self._store.execute(cmd.DeclineHomes(peer.id, declined), actor=f"zone:{peer.name}")
        return {"capsules": [int(each) for each in residences(self._store, peer.id, given)]}

    # --- beside shipments --------------------------------------------------------------------------

    def heard(self, peer: Peer, pulse: Document) -> None:
        position = pulse.get("position")
        if isinstance(position, int) and 0 <= position <= POSITION_MAX:
            heard = {"heard_position": position, "heard_ns": time.time_ns(), "missing": pulse.get("missing")}
            with self._lock:
                self._heard[peer.id] = heard

    def heard_all(self) -> dict[bytes, Document]:
        """:meth:`heard_of` of all zones there is something to say of."""
        with self._lock:
            return dict(self._heard)

    def heard_of(self, zone: bytes) -> Document:
        """Where a zone's log ended when it last said so, and when that was."""
        with self._lock:
            return dict(self._heard.get(zone, {}))

    def take_authority(self, peer: Peer, pem: bytes, signature: bytes) -> Document:
        return self._zones.take_authority(self._sender(peer), pem, signature)


class _Adoption:
    """What is made of the commands of one shipment before they are decided."""

    def __init__(self, store: Store, keys: Callable[[], ZoneKeys], home: bytes) -> None:
        self._store = store
        self._zone_keys = keys
        self._home = home
        self._data_keys = ShipmentKeys(store, home)
        self._recode: Recode = recoder(store, self._data_keys)

    def adopted(self, command: Any) -> Any:
        """A command with keys wrapped for this store, and frames that are this store's.

        Keys that are sealed for their home stay as they are.

        Raises:
            SpaceError: a key does not open, or a frame is none.
        """
        if isinstance(command, cmd.WriteExtent):
            return arrived(command, self._store._hash_key, self._store._find_frame, self._recode)
        if isinstance(command, cmd.ReceiveShipment | cmd.Copied | cmd.Together):
            inside: list[Command] = [self.adopted(each) for each in command.commands]
            return attrs.evolve(command, commands=inside)
        if isinstance(command, cmd.TakeHome) and command.key:
            return attrs.evolve(command, key=self._data_keys.here(command.key))
        key = getattr(command, "key", None)
        if isinstance(key, cmd.NewKey):
            return attrs.evolve(command, key=self._key(key))
        return command

    def _key(self, key: cmd.NewKey) -> cmd.NewKey:
        if not key.wrapped or is_for_home(key.wrapped):
            self._data_keys.came(key.key, key.version, None)
            return key
        keys = self._zone_keys()
        number = (key.key, key.version)
        data_key = open_key(
            key.wrapped,
            number,
            home=self._home,
            zone=keys.identity.id,
            private=keys.sealing.private_bytes_raw(),
        )
        here = self._data_keys.came(*number, data_key)
        return attrs.evolve(key, key=here, wrapped=self._store.wrap_key(here, key.version, data_key))


def _ids(capsules: Sequence[str]) -> list[bytes]:
    """Ids of capsules another zone asks about.

    Raises:
        UsageError: they are none, or too many.
    """
    try:
        found = [bytes.fromhex(each) for each in capsules]
    except ValueError:
        found = [b""]
    if len(found) > ASKED_MAX or any(len(each) != ID_BYTES for each in found):
        raise UsageError(f"not the ids of 1 to {ASKED_MAX} capsules", hint="is the other zone newer?")
    return found


def _third(txn: ReadTransaction, peer: bytes) -> Document:
    """What a zone has to know of third ones: who is its heir here, whose heir it is, and where it gives names."""
    known = rows.zones(txn)
    row = known.get(peer)
    return {
        "zones": [
            number.hex() for number, each in known.items() if each.role == rows.PEER and number != peer
        ],
        "heir": None if row is None or not row.heir else [row.heir.hex(), row.heir_epoch],
        "follows": {number.hex(): each.heir_epoch for number, each in rows.heirs(txn, peer)},
        "roots": [each.hex() for each in roots_for(Overlay(txn), peer)],
    }


def _has_own(txn: ReadTransaction, zone: str) -> bool:
    """Whether anything that was never another zone's is to go to a zone."""
    selection = Selection(zone)
    numbers = (U32.unpack(key)[0] for key, _ in txn.scan(POLICY, b""))
    meant = {each for each in numbers if zone in selection.policy(txn, each).federation_targets}
    meant = {each for each in meant if selection.lane(txn, each) is not None}
    return bool(meant) and any(
        CapsuleRow.decode(value).policy in meant and rows.home_row(txn, capsule) is None
        for capsule, value in txn.scan(CAPSULE, b"")
    )
