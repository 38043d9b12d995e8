"""The arrival policy of a store: how content that other zones ship is encoded here, and the data key for that.

It is the policy of ``/zones``, and the key that directory's data key: both are in the log, so every node of a cluster
has them.  A policy that encrypts gets a fresh key whenever it is set; what is stored under an earlier one stays
readable.  See :mod:`space.federation.recode` for what is done with frames.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final

import msgpack

from space._errors import NotFoundError, RefusedError, Status, UsageError
from space._node.caller import Document
from space.content.keys import FrameKey
from space.events import commands as cmd
from space.events.ids import ZONES
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
    """Data keys of one shipment's frames: those that came in it, and those that came before."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[tuple[int, int], FrameKey | None] = {}

    def came(self, number: int, version: int, data_key: bytes | None) -> None:
        """Notes a key that is not in the state yet; None: it does not open here, by intent."""
        row = self._row(number, version)
        stays = data_key is None or (
            row is not None and _closed(row)
        )  # the row that is here is the one that counts
        self._known[number, version] = None if stays else FrameKey(number, version, data_key or b"")

    def __call__(self, number: int, version: int) -> FrameKey | None:
        """A key; None: what is under it stays as it came.

        Raises:
            RefusedError: there is no such key, or it does not open with this store's master key.
        """
        if (number, version) not in self._known:
            self._known[number, version] = self._found(number, version)
        return self._known[number, version]

    def _found(self, number: int, version: int) -> FrameKey | None:
        row = self._row(number, version)
        if row is None:
            raise RefusedError(
                f"a shipment with a frame under key {number} version {version}, which did not come",
                status=Status.NOT_PERMITTED,
            )
        return None if _closed(row) else self._store._keyring.frame_key(number, version)

    def _row(self, number: int, version: int) -> bytes | None:
        with self._store._read() as txn:
            return txn.get(KEY, U32.pack(number) + U32.pack(version))


def _closed(row: bytes) -> bool:
    """Whether a key was destroyed, or is sealed for its home."""
    return not row or is_for_home(row)


def recoder(store: Store, keys: ShipmentKeys) -> Recoder | None:
    """What encodes the frames of one shipment anew; None where they stay as they come.

    Raises:
        RefusedError: the policy names a transform that is not installed, or its key does not open.
    """
    with store._read() as txn:
        policy, number = _in_force(txn)
    if policy is None:
        return None
    key = store._keyring.frame_key(number, KEY_VERSION) if policy.encryption is not None else None
    transforms = [(name, _transform(name)) for name in policy.transform]
    return Recoder(policy, key, keys, store._writer, transforms)


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
