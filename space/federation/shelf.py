"""Where a zone keeps shards of other zones' capsules, and how it is asked for them over HTTP.

    GET    /v1/federation/room                          {"free_bytes": …, "total_bytes": …}
    PUT    /v1/federation/shards/CAPSULE/HASH           a shard of a capsule of who asks
    GET    /v1/federation/shards/HOME/CAPSULE/HASH      a shard, for a zone that is in the capsule's layout
    PUT    /v1/federation/layouts/CAPSULE               a layout; {"missing": [HASH, …]}: what it wants and is not here
    GET    /v1/federation/layouts/HOME/CAPSULE          the layout, for a zone that is in it
    POST   /v1/federation/shards/CAPSULE/missing        BLAKE3s, one after the other; {"missing": […]}: those not here
    DELETE /v1/federation/shards/CAPSULE                all there is of a capsule of who asks

on the server and with the certificates of :mod:`space.federation.exchange`.  A zone puts and deletes under its own name
only: HOME is not said but proved.  A layout makes what was put before valid: the shards it does not name are dropped,
so nobody has to be told which; until it comes, those of the layout before are still there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import attrs
import msgpack

from space._errors import CorruptionError
from space.federation.exchange import PREFIX
from space.federation.parity import LAYOUT_BYTES_MAX

ROOM: Final = f"{PREFIX}/room"
SHARDS: Final = f"{PREFIX}/shards"
LAYOUTS: Final = f"{PREFIX}/layouts"

HELD_BYTES_MAX: Final = LAYOUT_BYTES_MAX + (1 << 20)
"""A layout and its keys."""

_KEYS_MAX: Final = 1024
"""Data keys a capsule can have: versions of one, and room."""


@attrs.frozen
class SealedKey:
    """A data key, (key id, version), sealed for whoever holds the layout (:mod:`space.federation.sealing`)."""

    key: int
    version: int
    sealed: bytes


@attrs.frozen
class Held:
    """What a zone holds of a capsule beside shards: the layout as bytes, and the keys that open its content."""

    layout: bytes
    keys: tuple[SealedKey, ...] = ()


def encode_held(held: Held) -> bytes:
    """MessagePack."""
    packed: bytes = msgpack.packb([held.layout, [attrs.astuple(key) for key in held.keys]])
    return packed


def decode_held(data: bytes) -> Held:
    """What :func:`encode_held` made.

    Raises:
        CorruptionError: it is not that.
    """
    try:
        layout, rows = msgpack.unpackb(data)
        keys = tuple(SealedKey(*row) for row in rows)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise CorruptionError(f"not a layout and its keys: {error!r:.200}") from None
    wrong = any(
        type(key.key) is not int or type(key.version) is not int or type(key.sealed) is not bytes
        for key in keys
    )
    if type(layout) is not bytes or wrong or len(keys) > _KEYS_MAX:
        raise CorruptionError("not a layout and its keys")
    return Held(layout, keys)


@attrs.frozen
class Room:
    """How much a zone's storage holds, and how much of it is free, in bytes."""

    free_bytes: int
    total_bytes: int


class ZoneClient(Protocol):
    """A zone as the home of shards sees it, the own one included.  Calls wait; safe on several threads."""

    def room(self) -> Room:
        """The room there is there."""

    def put_shard(self, capsule: bytes, shard: bytes, body: bytes) -> None:
        """Stores a shard; ``shard`` is its BLAKE3.  One that is there already stays."""

    def get_shard(self, home: bytes, capsule: bytes, shard: bytes) -> bytes:
        """A shard.

        Raises:
            NotFoundError: it is not there.
        """

    def missing(self, capsule: bytes, shards: Sequence[bytes]) -> list[bytes]:
        """Those of the shards that are not there, or not whole."""

    def put_layout(self, capsule: bytes, held: Held) -> list[bytes]:
        """Makes a layout valid; returns the shards it wants there that are not there."""

    def get_layout(self, home: bytes, capsule: bytes) -> Held:
        """The layout.

        Raises:
            NotFoundError: there is none.
        """

    def delete(self, capsule: bytes) -> None:
        """Removes all there is of a capsule."""


class Shelf(Protocol):
    """The same seen from within: every zone has a part of its own.  Called on threads."""

    def room(self) -> Room: ...
    def put_shard(self, home: bytes, capsule: bytes, shard: bytes, body: bytes) -> None: ...
    def get_shard(self, asker: bytes, home: bytes, capsule: bytes, shard: bytes) -> bytes: ...
    def missing(self, home: bytes, capsule: bytes, shards: Sequence[bytes]) -> list[bytes]: ...
    def put_layout(self, home: bytes, capsule: bytes, held: Held) -> list[bytes]: ...
    def get_layout(self, asker: bytes, home: bytes, capsule: bytes) -> Held: ...
    def delete(self, home: bytes, capsule: bytes) -> None: ...
