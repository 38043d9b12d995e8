"""The awaitable store."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import space
import space.aio
from space.events.commands import CreateCapsule, Durability
from space.events.types import Kind


def test_everyday_words_round_trip(tmp_path: Path) -> None:
    """put, get, stat, ls, mv, rm, undelete, clone, snapshot and at work and agree with each other."""

    async def main() -> None:
        async with space.aio.open(tmp_path / "data") as store:
            put = await store.put(b"hello", name="/a/hello.txt")
            before = (await store.digest())[0]
            assert await store.get(put.id) == b"hello"
            assert (await store.stat("/a/hello.txt")).size == 5
            await store.snapshot("/a", "first")
            await store.mv("/a/hello.txt", "/a/bye.txt")
            assert [entry.name for entry in await store.ls("/a")] == [b"bye.txt"]
            await store.clone("/a/hello.txt", "/old.txt", at="first")
            await store.rm("/a/bye.txt")
            assert await store.undelete("/a/bye.txt") == put.id
            assert b"".join([piece async for piece in store.stream("/old.txt")]) == b"hello"
            async with await store.at(f"@{before}") as past:
                assert await past.get("/a/hello.txt") == b"hello"
            kinds = [event.kind async for event in store.log(capsule=put.id)]
            assert kinds[0] == "CapsuleCreated"
            assert kinds[-1] == "CapsuleUndeleted"

    asyncio.run(main())


def test_concurrent_commands_share_batches(tmp_path: Path) -> None:
    """Commands submitted in one tick become one batch, and every one of them is durable when it returns."""

    async def main() -> None:
        async with space.aio.open(tmp_path / "data") as store:
            sync = store._store

            async def make(number: int) -> None:
                name = b"file-%d" % number
                command = CreateCapsule(sync.new_id(), Kind.FILE, parent=sync.root, name=name)
                receipt = await store.execute(command, durability=Durability.DURABLE)
                assert sync.wal.durable_index >= receipt.position

            before = sync.position
            await asyncio.gather(*(make(number) for number in range(100)))
            assert len(await store.ls("/")) == 100
            assert sync.position - before == 1

    asyncio.run(main())


def test_rejection_reaches_its_caller_only(tmp_path: Path) -> None:
    """A rejected command raises for its caller; the others of the batch succeed."""

    async def main() -> None:
        async with space.aio.open(tmp_path / "data") as store:
            sync = store._store
            commands = [
                CreateCapsule(sync.new_id(), Kind.FILE, parent=sync.root, name=name)
                for name in (b"a", b"a", b"b")
            ]
            outcomes = await asyncio.gather(
                *(store.execute(command) for command in commands), return_exceptions=True
            )
            assert isinstance(outcomes[1], space.ConflictError)
            assert [entry.name for entry in await store.ls("/")] == [b"a", b"b"]

    asyncio.run(main())


def test_opening_a_store_twice_is_refused(tmp_path: Path) -> None:
    """A directory open here cannot be opened again until it is closed."""

    async def main() -> None:
        store = await space.aio.open(tmp_path / "data")
        with pytest.raises(space.UnavailableError, match="in use"):
            await space.aio.open(tmp_path / "data")
        await store.close()
        again = await space.aio.open(tmp_path / "data")
        await again.close()

    asyncio.run(main())
