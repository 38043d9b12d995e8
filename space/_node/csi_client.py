"""The volumes of a store as the driver sees them: each call asked of the process that owns the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import attrs

from space._node.caller import Document
from space.projections.csi.model import Group, Node, Published, Reach, Snapshot, Usage, Volume, Wanted

CALLS_MAX: Final = 24
"""Calls asked at once, a thread each: the owner answers 64, of a controller, a node and whoever else asks."""

Ask = Callable[[str, Document], Any]


class RemoteVolumes:
    """:class:`space.projections.csi.model.Volumes`, asked with ``ask(method, arguments)`` on threads."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._threads = ThreadPoolExecutor(CALLS_MAX, thread_name_prefix="space-csi")

    def close(self) -> None:
        """Waits for the calls under way."""
        self._threads.shutdown()

    async def call(self, method: str, **arguments: Any) -> Any:
        """One call."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._ask, f"csi_{method}", arguments)

    async def about(self) -> Document:
        """The owner's process, and where it shows the volumes."""
        found: Document = await self.call("about")
        return found

    async def create(self, wanted: Wanted) -> Volume:
        return _volume(await self.call("create", wanted=attrs.asdict(wanted)))

    async def delete(self, volume: str) -> None:
        await self.call("delete", volume=volume)

    async def volume(self, volume: str) -> Volume:
        return _volume(await self.call("volume", volume=volume))

    async def volumes(self, after: str, limit: int) -> Sequence[Volume]:
        return [_volume(each) for each in await self.call("volumes", after=after, limit=limit)]

    async def publish(self, volume: str, node: str, published: Published) -> Reach | None:
        found = await self.call("publish", volume=volume, node=node, **attrs.asdict(published))
        return Reach(**found) if found else None

    async def unpublish(self, volume: str, node: str) -> None:
        await self.call("unpublish", volume=volume, node=node)

    async def expand(self, volume: str, capacity: int, limit: int) -> Volume:
        return _volume(await self.call("expand", volume=volume, capacity=capacity, limit=limit))

    async def modify(self, volume: str, mutable: Mapping[str, str]) -> None:
        await self.call("modify", volume=volume, mutable=dict(mutable))

    async def room(self) -> int:
        return int(await self.call("room"))

    async def usage(self, volume: str) -> Usage:
        return Usage(**await self.call("usage", volume=volume))

    async def snapshot(self, volume: str, name: str) -> Snapshot:
        return Snapshot(**await self.call("snapshot", volume=volume, name=name))

    async def delete_snapshot(self, snapshot: str) -> None:
        await self.call("delete_snapshot", snapshot=snapshot)

    async def find_snapshot(self, snapshot: str) -> Snapshot:
        return Snapshot(**await self.call("find_snapshot", snapshot=snapshot))

    async def snapshots(self, after: str, limit: int, volume: str) -> Sequence[Snapshot]:
        found = await self.call("snapshots", after=after, limit=limit, volume=volume)
        return [Snapshot(**each) for each in found]

    async def snapshot_group(self, name: str, volumes: Sequence[str]) -> Group:
        return _group(await self.call("snapshot_group", name=name, volumes=list(volumes)))

    async def group(self, group: str) -> Group:
        return _group(await self.call("group", group=group))

    async def delete_group(self, group: str) -> None:
        await self.call("delete_group", group=group)

    async def allocated(self, snapshot: str, offset: int) -> AsyncIterator[tuple[int, int]]:
        async for each in self._pages("allocated", offset, snapshot=snapshot):
            yield each

    async def changed(self, base: str, target: str, offset: int) -> AsyncIterator[tuple[int, int]]:
        async for each in self._pages("changed", offset, base=base, target=target):
            yield each

    async def _pages(self, method: str, offset: int, **arguments: str) -> AsyncIterator[tuple[int, int]]:
        """Ranges of page after page; those that meet where a page ends are one."""
        at: int | None = offset
        held: tuple[int, int] | None = None
        while at is not None:
            page = await self.call(method, offset=at, **arguments)
            for start, length in page["ranges"]:
                if held is not None and sum(held) == start:
                    held = held[0], held[1] + length
                    continue
                if held is not None:
                    yield held
                held = start, length
            at = page["next"]
        if held is not None:
            yield held

    async def register(self, node: Node) -> None:
        await self.call("register", node=node.id, zone=node.zone, limit=node.limit)


def _volume(document: Document) -> Volume:
    published = {node: Published(**each) for node, each in document["published"].items()}
    return Volume(**{**document, "published": published})


def _group(document: Document) -> Group:
    return Group(**{**document, "snapshots": [Snapshot(**each) for each in document["snapshots"]]})
