"""The arrival policy of a store: how content that other zones ship is encoded here, and the data key for that.

It is the policy of ``/zones``, and the key that directory's data key: both are in the log, so every node of a cluster
has them.  A policy that encrypts gets a fresh key whenever it is set; what is stored under an earlier one stays
readable.  See :mod:`space.federation.recode` for what is done with frames.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final

import msgpack
from blake3 import blake3

from space._errors import NotFoundError, RefusedError, Status, UsageError
from space._node.caller import Document
from space.content.frames import Buffer, FrameRef
from space.content.keys import FrameKey
from space.events import commands as cmd
from space.events.commands import StoredFrame
from space.events.ids import ZONES
from space.federation.arrival import Recode
from space.federation.recode import Recoder, Transform
from space.federation.sealing import is_for_home
from space.policy.model import ArrivalPolicy, Policy
from space.statemachine import zones as rows
from space.statemachine.tables import CAPSULE, KEY, POLICY, U32, ZONE_KEY, CapsuleRow, Reader

if TYPE_CHECKING:
    from space._node.store import Store

TRANSFORMS: Final = "space.arrival"
"""Entry point group of functions that a ``transform`` names: :data:`space.federation.recode.Transform`."""

KEY_VERSION: Final = 1


class ShipmentKeys:
    """Data keys of one shipment's frames: those that came in it, and those that came before.

    Zones draw numbers of keys without asking each other.  One that stands for another key here is given another number,
    always the same, and frames under it are encrypted again: their number is part of what is authenticated.
    """

    def __init__(self, store: Store, home: bytes) -> None:
        self._store = store
        self._home = home
        self._known: dict[tuple[int, int], FrameKey | None] = {}
        self._here: dict[int, int] = {}  # numbers at the home → numbers here

    def came(self, number: int, version: int, data_key: bytes | None) -> int:
        """Notes a key that may not be in the state yet, and says its number here; None: it opens only at the home."""
        here = self._here[number] = number if data_key is None else self._free(number, version, data_key)
        row = self._row(here, version)
        stays = data_key is None or (
            row is not None and _closed(row)
        )  # the row that is here is the one that counts
        self._known[number, version] = None if stays else FrameKey(here, version, data_key or b"")
        return here

    def moved(self, number: int) -> bool:
        """Whether a key has another number here than at the zone that ships."""
        return self.here(number) != number

    def here(self, number: int) -> int:
        """The number here of a key of the zone that ships."""
        if number not in self._here:
            with self._store._read() as txn:
                self._here[number] = self._looked_up(txn, number)
        return self._here[number]

    def _looked_up(self, txn: Reader, number: int) -> int:
        if _is_taken(txn, number, self._home):
            other = _other_number(self._home, number)
            return other if txn.get(ZONE_KEY, U32.pack(other)) == self._home else number
        if not _is_known(txn, number) and (own := rows.own_zone(txn)) is not None:
            # Or one of this zone's own that got another number there, and comes back from where its home is now.
            ours = {int(U32.unpack_from(key)[0]) for key, _ in txn.scan(KEY, b"")}
            return next((each for each in ours if _other_number(own[0], each) == number), number)
        return number

    def _free(self, number: int, version: int, data_key: bytes) -> int:
        with self._store._read() as txn:
            if not _is_taken(txn, number, self._home):
                return number
            row = txn.get(KEY, U32.pack(number) + U32.pack(version))
        ring = self._store._keyring
        came_back = row is not None and (
            not ring.wrapped_by(number, version, row) or ring.unwrap(number, version, row) == data_key
        )
        return number if came_back else _other_number(self._home, number)

    def __call__(self, number: int, version: int) -> FrameKey | None:
        """A key; None: what is under it stays as it came.

        Raises:
            RefusedError: there is no such key, or it does not open with this store's master key.
        """
        if (number, version) not in self._known:
            self._known[number, version] = self._found(number, version)
        return self._known[number, version]

    def _found(self, number: int, version: int) -> FrameKey | None:
        here = self.here(number)
        row = self._row(here, version)
        if row is None:
            raise RefusedError(
                f"a shipment with a frame under key {number} version {version}, which did not come",
                status=Status.NOT_PERMITTED,
            )
        return None if _closed(row) else self._store._keyring.frame_key(here, version)

    def _row(self, number: int, version: int) -> bytes | None:
        with self._store._read() as txn:
            return txn.get(KEY, U32.pack(number) + U32.pack(version))


def _is_taken(txn: Reader, number: int, home: bytes) -> bool:
    """Whether a number stands for a key that did not come from this zone."""
    return _is_known(txn, number) and txn.get(ZONE_KEY, U32.pack(number)) != home


def _is_known(txn: Reader, number: int) -> bool:
    return next(txn.scan(KEY, U32.pack(number)), None) is not None


def _other_number(home: bytes, number: int) -> int:
    """The number here of a zone's key whose own is taken: always the same one, so that nothing has to be kept."""
    drawn = blake3(home + U32.pack(number), derive_key_context="space zone key number v1").digest(U32.size)
    return int(U32.unpack(drawn)[0]) | 1


def _closed(row: bytes) -> bool:
    """Whether a key was destroyed, or is sealed for its home."""
    return not row or is_for_home(row)


def recoder(store: Store, keys: ShipmentKeys) -> Recode:
    """What encodes the frames of one shipment anew, as far as they are not to stay as they come.

    Raises:
        RefusedError: the policy names a transform that is not installed, or its key does not open.
    """
    with store._read() as txn:
        policy, number = _in_force(txn)
        own = rows.arrival_key(txn)
    wanted = policy or ArrivalPolicy()
    key = store._keyring.frame_key(number, KEY_VERSION) if wanted.encryption is not None else None
    transforms = [(name, _transform(name)) for name in wanted.transform]
    anew = Recoder(wanted, key, keys, store._writer, transforms)

    def recode(capsule: bytes, ref: FrameRef, stored: Buffer) -> StoredFrame | None:
        """The frame as the policy has it, and under its key's number here."""
        moved = bool(ref.encryption) and keys.moved(ref.key_id)
        if ref.encryption and ref.key_id == own and not moved:  # no other zone has that key
            raise RefusedError(
                f"a shipment with a frame under key {own}, which is this zone's own",
                status=Status.NOT_PERMITTED,
            )
        return anew(capsule, ref, stored) if policy is not None or moved else None

    return recode


def _in_force(txn: Reader) -> tuple[ArrivalPolicy | None, int]:
    """The policy, and the number of its key; the key of one that was taken back is still there."""
    data = txn.get(CAPSULE, bytes(ZONES))
    row = None if data is None else CapsuleRow.decode(data)
    if row is None or not row.policy:
        return None, 0
    document = txn.get(POLICY, U32.pack(row.policy))
    if document is None:
        return None, 0
    return ArrivalPolicy.from_document(msgpack.unpackb(document)), row.key


def _transform(name: str) -> Transform:
    for point in entry_points(group=TRANSFORMS, name=name):
        found: Transform = point.load()
        return found
    raise RefusedError(
        f"the arrival policy asks for transform {name}, which is not installed here",
        hint=f"a package with an entry point {name} in the group {TRANSFORMS} has it",
        status=Status.NOT_PERMITTED,
    )


def set_policy(store: Store, policy: ArrivalPolicy) -> Document:
    """Encodes what arrives from now on by a policy; an empty one lets everything be as it comes.

    Raises:
        NotFoundError: the store is in no zone.
        RefusedError: a transform is not installed, or there is no master key to wrap a data key with.
    """
    for name in policy.transform:
        _transform(name)
    if _own(store) is None:
        raise NotFoundError(f"store {store.path} is in no zone", hint="space zone init NAME")
    document = policy.to_document()
    key = None if policy.encryption is None else store.new_key(Policy(encryption=policy.encryption))
    packed: bytes = msgpack.packb(document) if document else b""
    receipt = store.execute(cmd.SetArrivalPolicy(packed, key))
    return {**describe(store), "position": receipt.position}


def parse(document: object) -> ArrivalPolicy:
    """An arrival policy as it is asked for over a socket.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(document, dict):
        raise UsageError("not an arrival policy")
    return ArrivalPolicy.from_document(document)


def describe(store: Store) -> Document:
    """The policy in force: its document (None: everything stays as it comes), and its key."""
    with store._read() as txn:
        policy, number = _in_force(txn)
    if policy is None:
        return {"policy": None, "key": None}
    return {"policy": policy.to_document(), "key": number if policy.encryption is not None else None}


def sealed_keys(txn: Reader, zone: bytes) -> int | None:
    """How many data keys of a zone cannot be opened here, so that content under them stays as it came.

    None where everything does, as there is no arrival policy: it is a look at every key.
    """
    if _in_force(txn)[0] is None:
        return None
    return sum(_is_sealed(txn, key) for key, home in txn.scan(ZONE_KEY, b"") if home == zone)


def _is_sealed(txn: Reader, key: bytes) -> bool:
    return any(is_for_home(row) for _, row in txn.scan(KEY, key))


def _own(store: Store) -> bytes | None:
    with store._read() as txn:
        found = rows.own_zone(txn)
    return None if found is None else found[0]
