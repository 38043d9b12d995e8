"""The store, awaitable: the same words as the synchronous one, for programs on asyncio.

Commands submitted within one tick of the loop are decided as one batch, and everything that waits for
durability meanwhile shares one fdatasync, which runs outside the loop.

>>> async def main():
...     async with space.aio.open("./data") as store:
...         capsule = await store.put(b"hello", name="/hello.txt")
...         assert await store.get(capsule.id) == b"hello"
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ParamSpec, Self, TypeVar

from space._errors import SpaceError
from space._node.store import Store
from space.events.commands import Buffer, Command, Durability, Receipt, Request

if TYPE_CHECKING:
    from space._node import maintenance, transfer
    from space._node.reading import Deleted, Entry, Reading, SnapshotInfo, Stat
    from space.events.ids import CapsuleId, Moment
    from space.policy.model import Policy

P = ParamSpec("P")
R = TypeVar("R")
_LOG_EVENTS_AT_ONCE = 1024


class AsyncReading:
    """The read side, at the present or at a past moment."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    async def _run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.to_thread(function, *args, **kwargs)

    async def get(
        self, capsule: str | bytes | CapsuleId, offset: int = 0, length: int | None = None
    ) -> bytes:
        """See :meth:`space._node.reading.Reading.get`."""
        return await self._run(self._reading.get, capsule, offset, length)

    async def stream(self, capsule: str | bytes | CapsuleId) -> AsyncIterator[bytes]:
        """The bytes of a capsule in pieces, all as of one position."""
        pieces = self._reading.stream(await self._run(self._reading.resolve, capsule))
        while piece := await self._run(next, pieces, b""):
            yield piece

    async def resolve(self, capsule: str | bytes | CapsuleId) -> CapsuleId:
        """See :meth:`space._node.reading.Reading.resolve`."""
        return await self._run(self._reading.resolve, capsule)

    async def stat(self, capsule: str | bytes | CapsuleId) -> Stat:
        """Attributes of a capsule named by id or path."""
        return await self._run(self._reading.stat, await self.resolve(capsule))

    async def ls(self, path: str | bytes | CapsuleId = "/") -> list[Entry]:
        """See :meth:`space._node.reading.Reading.ls`."""
        return await self._run(self._reading.ls, path)

    async def digest(self) -> tuple[int, str]:
        """Position and state digest."""
        return await self._run(self._reading.digest)

    async def snapshots(self) -> list[SnapshotInfo]:
        """All snapshots, by name."""
        return await self._run(self._reading.snapshots)

    async def close(self) -> None:
        """Gives back what the reading holds."""
        await self._run(self._reading.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncStore(AsyncReading):
    """An open data directory.  Use :func:`open`."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._store = store
        self._waiting: list[tuple[Request, asyncio.Future[Receipt | SpaceError]]] = []
        self._syncing: asyncio.Future[None] | None = None
        self._sync_thread = ThreadPoolExecutor(1, "space-sync")

    # --- commands --------------------------------------------------------------------------------

    async def submit(self, request: Request, durability: Durability = Durability.DURABLE) -> Receipt:
        """Carries out one command, grouped with whatever else is submitted meanwhile.

        Raises:
            SpaceError: it was rejected, or could not be logged; then nothing changed.
        """
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._begin, loop)
        future: asyncio.Future[Receipt | SpaceError] = loop.create_future()
        self._waiting.append((request, future))
        outcome = await future
        if isinstance(outcome, SpaceError):
            raise outcome
        if durability is Durability.DURABLE:
            await self._durable(outcome.position)
        return outcome

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hands in everything submitted in this turn of the loop, with one step between threads for all of it."""
        waiting, self._waiting = self._waiting, []
        try:
            begun = self._store.begin([request for request, _ in waiting])
        except Exception as error:  # noqa: BLE001 - it is theirs who wait
            for _, future in waiting:
                if not future.done():
                    future.set_exception(error)
            return
        if begun.done():
            _settle(waiting, begun)
        else:
            begun.add_done_callback(lambda _: _call_in(loop, _settle, waiting, begun))

    async def _durable(self, position: int) -> None:
        while self._store.wal.durable_index < position:
            syncing = self._syncing
            if syncing is None or syncing.done():
                loop = asyncio.get_running_loop()
                syncing = self._syncing = loop.run_in_executor(self._sync_thread, self._store.sync)
            await asyncio.shield(syncing)

    async def execute(self, command: Command, *, durability: Durability = Durability.DURABLE) -> Receipt:
        """Carries out one command as this store's actor."""
        return await self.submit(Request(command, self._store.actor), durability)

    async def sync(self) -> None:
        """Makes everything acknowledged so far durable."""
        await self._durable(self._store.last)

    # --- everyday words --------------------------------------------------------------------------

    async def put(
        self,
        source: Buffer | BinaryIO,
        *,
        name: str | bytes | None = None,
        id: CapsuleId | None = None,  # noqa: A002 - the public word
        policy: Policy | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> transfer.PutResult:
        """See :meth:`space._node.store.Store.put`."""
        return await self._run(
            self._store.put, source, name=name, id=id, policy=policy, on_progress=on_progress
        )

    async def write(
        self, capsule: CapsuleId, offset: int, data: Buffer, *, durability: Durability = Durability.DURABLE
    ) -> Receipt:
        """See :meth:`space._node.store.Store.write`."""
        receipt = await self._run(self._store.write, capsule, offset, data, durability=Durability.BUFFERED)
        if durability is Durability.DURABLE:
            await self._durable(receipt.position)
        return receipt

    async def mkdir(self, path: str | bytes, *, parents: bool = False) -> CapsuleId:
        """See :meth:`space._node.store.Store.mkdir`."""
        return await self._run(self._store.mkdir, path, parents=parents)

    async def rm(self, capsule: str | bytes | CapsuleId, *, recursive: bool = False) -> Receipt:
        """See :meth:`space._node.store.Store.rm`."""
        return await self._run(self._store.rm, capsule, recursive=recursive)

    async def mv(self, source: str | bytes, target: str | bytes) -> Receipt:
        """See :meth:`space._node.store.Store.mv`."""
        return await self._run(self._store.mv, source, target)

    async def resize(self, capsule: str | bytes | CapsuleId, size: int) -> Receipt:
        """See :meth:`space._node.store.Store.resize`."""
        return await self._run(self._store.resize, capsule, size)

    async def snapshot(self, capsule: str | bytes | CapsuleId, name: str) -> Receipt:
        """See :meth:`space._node.store.Store.snapshot`."""
        return await self._run(self._store.snapshot, capsule, name)

    async def clone(
        self, source: str | bytes | CapsuleId, target: str | bytes, *, at: str | Moment | None = None
    ) -> CapsuleId:
        """See :meth:`space._node.store.Store.clone`."""
        return await self._run(self._store.clone, source, target, at=at)

    async def undelete(self, capsule: str | CapsuleId, to: str | bytes | None = None) -> CapsuleId:
        """See :meth:`space._node.store.Store.undelete`."""
        return await self._run(self._store.undelete, capsule, to)

    async def deleted(self) -> list[Deleted]:
        """Capsules that can be undeleted."""
        return await self._run(self._store.deleted)

    async def at(self, moment: str | Moment) -> AsyncReading:
        """See :meth:`space._node.store.Store.at`; close what it returns."""
        return AsyncReading(await self._run(self._store.at, moment))

    async def log(self, **options: Any) -> AsyncIterator[maintenance.LogEvent]:
        """See :func:`space._node.maintenance.log_events`."""
        events: Iterator[maintenance.LogEvent] = self._store.log(**options)
        size = 1 if options.get("follow") else _LOG_EVENTS_AT_ONCE
        while page := await self._run(lambda: list(itertools.islice(events, size))):
            for event in page:
                yield event

    async def replay(self, **options: Any) -> maintenance.ReplayResult:
        """See :func:`space._node.maintenance.replay`."""
        return await self._run(self._store.replay, **options)

    async def verify(self, **options: Any) -> maintenance.VerifyReport:
        """See :func:`space._node.maintenance.verify`."""
        return await self._run(self._store.verify, **options)

    async def gc(self, **options: Any) -> maintenance.GcReport:
        """See :func:`space._node.maintenance.gc`."""
        return await self._run(self._store.gc, **options)

    async def close(self) -> None:
        """Makes everything durable and closes."""
        await super().close()
        self._sync_thread.shutdown()


def _settle(
    waiting: list[tuple[Request, asyncio.Future[Receipt | SpaceError]]],
    begun: Future[list[Receipt | SpaceError]],
) -> None:
    for (_, future), outcome in zip(waiting, begun.result(), strict=True):
        if not future.done():  # else its task was cancelled
            future.set_result(outcome)


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
        loop.call_soon_threadsafe(function, *arguments)


class _Opening:
    """What :func:`open` returns: awaitable, or an async context manager."""

    def __init__(self, path: str | Path, options: dict[str, Any]) -> None:
        self._path = path
        self._options = options
        self._store: AsyncStore | None = None

    async def _open(self) -> AsyncStore:
        return AsyncStore(await asyncio.to_thread(Store, self._path, **self._options))

    def __await__(self) -> Any:
        return self._open().__await__()

    async def __aenter__(self) -> AsyncStore:
        self._store = await self._open()
        return self._store

    async def __aexit__(self, *_: object) -> None:
        if self._store is not None:
            await self._store.close()


def open(path: str | Path, **options: Any) -> _Opening:  # noqa: A001 - the public word
    """Opens the store in a directory: ``await`` it, or use it in ``async with``.

    Options and errors are those of :func:`space.open`.
    """
    return _Opening(path, options)
