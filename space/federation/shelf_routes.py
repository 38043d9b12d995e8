"""How other zones reach a shelf: see :mod:`space.federation.shelf` for what is said."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import attrs
from aiohttp import web

from space._errors import UsageError
from space.federation.exchange import SILENCE_SECONDS, Peer
from space.federation.parity import HASH_BYTES, SHARD_BYTES_MAX
from space.federation.shelf import HELD_BYTES_MAX, LAYOUTS, ROOM, SHARDS, Shelf, decode_held, encode_held

ASKED_MAX: Final = 1 << 16
"""Shards asked for at once: those of one zone and capsule."""

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
    pieces: list[bytes] = []
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
