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

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, Protocol

import attrs
import msgpack
from aiohttp import web

from space._errors import CorruptionError, UsageError
from space.federation.exchange import PREFIX, SILENCE_SECONDS, Peer
from space.federation.parity import HASH_BYTES, LAYOUT_BYTES_MAX, SHARD_BYTES_MAX

ROOM: Final = f"{PREFIX}/room"
SHARDS: Final = f"{PREFIX}/shards"
LAYOUTS: Final = f"{PREFIX}/layouts"

HELD_BYTES_MAX: Final = LAYOUT_BYTES_MAX + (1 << 20)
"""A layout and its keys."""

ASKED_MAX: Final = 1 << 16
"""Shards asked for at once: those of one zone and capsule."""

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


Prove = Callable[[web.Request], Awaitable[Peer]]


class ShelfRoutes:
    """Lets other zones reach a shelf; ``prove`` says who asks."""

    def __init__(self, shelf: Shelf, prove: Prove) -> None:
        self._shelf = shelf
        self._prove = prove

    def add_to(self, application: web.Application) -> None:
        """Answers what the module's text says."""
        router = application.router
        router.add_get(ROOM, self._room)
        router.add_put(SHARDS + "/{capsule}/{shard}", self._put_shard)
        router.add_get(SHARDS + "/{home}/{capsule}/{shard}", self._get_shard)
        router.add_put(LAYOUTS + "/{capsule}", self._put_layout)
        router.add_get(LAYOUTS + "/{home}/{capsule}", self._get_layout)
        router.add_post(SHARDS + "/{capsule}/missing", self._missing)
        router.add_delete(SHARDS + "/{capsule}", self._delete)

    async def _room(self, request: web.Request) -> web.StreamResponse:
        await self._prove(request)
        return web.json_response(attrs.asdict(await asyncio.to_thread(self._shelf.room)))

    async def _put_shard(self, request: web.Request) -> web.StreamResponse:
        peer = await self._prove(request)
        capsule, shard = _id(request, "capsule"), _hash(request)
        body = await _body(request, SHARD_BYTES_MAX)
        await asyncio.to_thread(self._shelf.put_shard, peer.id, capsule, shard, body)
        return web.json_response({})

    async def _get_shard(self, request: web.Request) -> web.StreamResponse:
        peer = await self._prove(request)
        home, capsule, shard = _id(request, "home"), _id(request, "capsule"), _hash(request)
        body = await asyncio.to_thread(self._shelf.get_shard, peer.id, home, capsule, shard)
        return web.Response(body=body)

    async def _missing(self, request: web.Request) -> web.StreamResponse:
        peer = await self._prove(request)
        capsule = _id(request, "capsule")
        packed = await _body(request, ASKED_MAX * HASH_BYTES)
        found = await asyncio.to_thread(self._shelf.missing, peer.id, capsule, cut(packed))
        return _missing_shards(found)

    async def _put_layout(self, request: web.Request) -> web.StreamResponse:
        peer = await self._prove(request)
        capsule = _id(request, "capsule")
        held = decode_held(await _body(request, HELD_BYTES_MAX))
        return _missing_shards(await asyncio.to_thread(self._shelf.put_layout, peer.id, capsule, held))

    async def _get_layout(self, request: web.Request) -> web.StreamResponse:
        peer = await self._prove(request)
        home, capsule = _id(request, "home"), _id(request, "capsule")
        held = await asyncio.to_thread(self._shelf.get_layout, peer.id, home, capsule)
        return web.Response(body=encode_held(held))

    async def _delete(self, request: web.Request) -> web.StreamResponse:
        peer = await self._prove(request)
        await asyncio.to_thread(self._shelf.delete, peer.id, _id(request, "capsule"))
        return web.json_response({})


def cut(packed: bytes) -> list[bytes]:
    """Hashes one after the other, apart.

    Raises:
        UsageError: they are not whole.
    """
    if len(packed) % HASH_BYTES:
        raise UsageError(f"{len(packed)} bytes are not whole hashes of {HASH_BYTES}")
    return [packed[at : at + HASH_BYTES] for at in range(0, len(packed), HASH_BYTES)]


def _missing_shards(shards: Iterable[bytes]) -> web.Response:
    return web.json_response({"missing": [shard.hex() for shard in shards]})


def _id(request: web.Request, name: str) -> bytes:
    try:
        return uuid.UUID(request.match_info[name]).bytes
    except ValueError:
        raise UsageError(f"not an id: {request.match_info[name]!r:.80}") from None


def _hash(request: web.Request) -> bytes:
    text = request.match_info["shard"]
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != HASH_BYTES:
        raise UsageError(f"not a hash: {text!r:.80}")
    return found


async def _body(request: web.Request, limit: int) -> bytes:
    """The body of a request, as a whole.

    Raises:
        UsageError: it is too long, or does not come to its end.
    """
    pieces: list[Any] = []
    size = 0
    while True:
        async with asyncio.timeout(SILENCE_SECONDS):
            piece = await request.content.readany()
        if not piece:
            return b"".join(pieces)
        size += len(piece)
        if size > limit:
            raise UsageError(f"more than {limit} bytes")
        pieces.append(piece)
