"""Block devices of a store against byte arrays: every operation, clones, past moments, gc, restarts, replays."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

import attrs
from hypothesis import given
from hypothesis import strategies as st

import space
from space._node.block_cache import CHUNK_BYTES
from space._node.local_block import BlockWriter, LocalBlockDevice
from space._node.reading import Reading
from space._node.store import Store
from space.events import commands as cmd
from space.events.ids import CapsuleId
from space.policy.model import Policy
from tests.store_support import texture

BLOCK: Final = 512
BLOCKS: Final = 48
SIZE: Final = BLOCK * BLOCKS
POLICIES: Final = [
    Policy.from_document({"compression": "none", "dedupe": False, "history": "none"}),
    Policy.from_document({"compression": "none", "dedupe": False, "history": "all"}),
    Policy.from_document({"compression": "lz4", "dedupe": True, "history": "all"}),
]
Content = dict[str, tuple[bytes, int]]
"""What each device holds, and the number of its policy."""


@attrs.define
class World:
    """A store, its devices and what they must hold, now and at every position."""

    home: Path
    store: Store
    ids: dict[str, CapsuleId] = attrs.field(factory=dict)
    content: Content = attrs.field(factory=dict)
    past: dict[int, tuple[str, Content]] = attrs.field(factory=dict)
    snapshots: dict[str, Content] = attrs.field(factory=dict)

    def note(self) -> None:
        """Remembers this moment."""
        position, digest = self.store.digest()
        assert self.past.get(position, (digest,))[0] == digest
        self.past[position] = digest, dict(self.content)

    def put(self, name: str, offset: int, data: bytes) -> None:
        """Replaces bytes of the model."""
        held, policy = self.content[name]
        self.content[name] = held[:offset] + data + held[offset + len(data) :], policy


def run(store: Store, capsule: CapsuleId, *steps: Any) -> list[Any]:
    """What operations on a device return, all begun in the same turn of a loop."""

    async def work() -> list[Any]:
        writer = BlockWriter(store)
        opened = LocalBlockDevice(store, capsule, writer=writer)
        try:
            coroutines: list[Coroutine[Any, Any, Any]] = [step(opened) for step in steps]
            return list(await asyncio.gather(*coroutines))
        finally:
            opened.close()
            await writer.close()

    return asyncio.run(work())


def bytes_of(reading: Reading, capsule: CapsuleId) -> bytes:
    """All of a device."""

    async def work() -> bytes:
        opened = LocalBlockDevice(reading, capsule)
        try:
            assert opened.info().size == SIZE
            return b"".join(await opened.read(0, SIZE))
        finally:
            opened.close()

    return asyncio.run(work())


def change(world: World, verb: str, name: str, at: int, length: int, to: int) -> None:
    """One operation, on a device and on the model."""
    store, capsule = world.store, world.ids[name]
    held, _ = world.content[name]
    offset, size, target = at * BLOCK, min(length, BLOCKS - at) * BLOCK, to * BLOCK
    if verb == "write":
        data = texture(size, store.position)
        run(store, capsule, lambda it: it.write(offset, data, durable=at % 2 == 0, actor="host"))
        world.put(name, offset, data)
    elif verb == "writes":
        pieces = [(start, texture(BLOCK, start)) for start in range(offset, offset + size, 2 * BLOCK)]
        run(
            store,
            capsule,
            *(lambda it, o=o, d=d: it.write(o, d, durable=False, actor="host") for o, d in pieces),
        )
        for start, data in pieces:
            world.put(name, start, data)
    elif verb == "deallocate":
        ranges = [(offset, size), (target, min(size, SIZE - target))]
        run(store, capsule, lambda it: it.deallocate(ranges, actor="host"))
        for start, count in ranges:
            world.put(name, start, bytes(count))
    elif verb == "zeroes":
        run(
            store,
            capsule,
            lambda it: it.write_zeroes(offset, size, deallocate=False, durable=False, actor="host"),
        )
        world.put(name, offset, bytes(size))
    elif verb == "copy":
        size = min(size, SIZE - target)
        half = size // 2 // BLOCK * BLOCK
        ranges = [(offset, half), (offset + half, size - half)] if half else [(offset, size)]
        run(store, capsule, lambda it: it.copy(ranges, target, durable=False, actor="host"))
        for start, count in ranges:
            world.put(name, target, world.content[name][0][start : start + count])
            target += count
    else:
        expected = held[offset : offset + size] if to % 2 else texture(size, to)
        data = texture(size, to + 1)
        (differs,) = run(
            store,
            capsule,
            lambda it: it.compare_and_write(offset, expected, data, durable=False, actor="host"),
        )
        pairs = enumerate(zip(held[offset : offset + size], expected, strict=True))
        assert differs == next((number for number, (one, other) in pairs if one != other), -1)
        if differs < 0:
            world.put(name, offset, data)


def give(world: World, verb: str, name: str, other: str, at: int, length: int, to: int) -> None:
    """What one device gets from another: a range, all of it as a clone, or as it was."""
    store = world.store
    if verb == "range" and other in world.ids:
        size = min(length, BLOCKS - at, BLOCKS - to) * BLOCK
        command = cmd.CopyRange(world.ids[other], to * BLOCK, world.ids[name], at * BLOCK, size)
        store.execute(command)
        world.put(other, to * BLOCK, world.content[name][0][at * BLOCK : at * BLOCK + size])
    elif verb == "clone" and other not in world.ids:
        world.ids[other] = store.clone(f"/{name}", f"/{other}")
        world.content[other] = world.content[name]
    elif verb == "snapshot" and name not in world.snapshots:
        store.snapshot("/", name)
        world.snapshots[name] = dict(world.content)
    elif verb == "restore" and name in world.snapshots.get(name, {}) and other not in world.ids:
        world.ids[other] = store.clone(f"/{name}", f"/{other}", at=name)
        world.content[other] = world.snapshots[name][name]


def upkeep(world: World, verb: str) -> None:
    """What must change nothing that can be read."""
    store = world.store
    if verb == "gc":
        store.gc()
    elif verb == "replay":
        assert store.replay(verify=True).equal
    elif verb == "checkpoint":
        store.checkpoint()
    else:
        before = store.digest()
        store.close()
        if verb == "rebuild":
            shutil.rmtree(world.home / "state")
        world.store = space.open(world.home, segment_bytes=32 << 10)
        assert world.store.digest() == before


def check(reading: Reading, ids: dict[str, CapsuleId], content: Content, *, reclaimed: bool) -> None:
    """Every device holds what the model says; of the past, bytes without history may have been reclaimed."""
    for name, (expected, policy) in content.items():
        try:
            assert bytes_of(reading, ids[name]) == expected, name
        except space.RefusedError:
            assert reclaimed
            assert policy == 0


CHANGES: Final = ["write", "write", "writes", "deallocate", "zeroes", "copy", "copy", "compare"]
GIVES: Final = ["range", "range", "clone", "snapshot", "restore"]
UPKEEP: Final = ["gc", "gc", "replay", "checkpoint", "reopen", "rebuild"]
NAMES: Final = ["a", "b", "c", "d", "e"]
blocks = st.integers(0, BLOCKS - 1)
steps = st.lists(
    st.tuples(
        st.sampled_from(CHANGES * 2 + GIVES + UPKEEP),
        st.sampled_from(NAMES),
        st.sampled_from(NAMES),
        blocks,
        st.sampled_from([1, 1, 2, 5, 17, BLOCKS]),
        blocks,
    ),
    min_size=3,
    max_size=40,
)


@given(steps=steps)
def test_devices_are_byte_arrays_at_every_moment(steps: list[tuple[str, str, str, int, int, int]]) -> None:
    """Whatever is written, copied, cloned, given back and rebuilt: bytes now and at every moment are the model's."""
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "store"
        world = World(home, space.open(home, segment_bytes=32 << 10))
        for name, policy in zip(NAMES, POLICIES, strict=False):
            root = world.store.root
            world.ids[name] = world.store.create(
                size=SIZE, block_size=BLOCK, parent=root, name=name.encode(), policy=policy
            )
            world.content[name] = bytes(SIZE), POLICIES.index(policy)
            change(world, "write", name, 3, 20, 0)
        world.note()
        for verb, name, other, at, length, to in steps:
            if verb in UPKEEP:
                upkeep(world, verb)
            elif name in world.ids:
                if verb in CHANGES:
                    change(world, verb, name, at, length, to)
                else:
                    give(world, verb, name, other, at, length, to)
            world.note()
        check(world.store, world.ids, world.content, reclaimed=False)
        world.store.gc()
        check(world.store, world.ids, world.content, reclaimed=False)
        for position, (digest, content) in world.past.items():
            with world.store.at(f"@{position}") as past:
                assert past.digest() == (position, digest)
                check(past, world.ids, content, reclaimed=True)
        for snapshot, content in world.snapshots.items():
            with world.store.at(snapshot) as past:
                check(past, world.ids, content, reclaimed=False)
        assert world.store.verify().findings == []
        assert world.store.replay(verify=True).equal
        world.store.close()


KEPT_BLOCKS: Final = 96
"""Of 4096 bytes: more than one chunk of what is kept of a device, and not whole chunks."""


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["write", "write", "read", "read", "read", "command", "elsewhere", "deallocate"]),
            st.sampled_from([0, 1, 2, 3, 15, 16, 18, 80, KEPT_BLOCKS - 1]),
            st.sampled_from([1, 1, 1, 2, 16, 40]),
        ),
        min_size=10,
        max_size=40,
    ),
    st.sampled_from(POLICIES),
)
def test_what_is_at_hand_is_what_is_there(actions: list[tuple[str, int, int]], policy: Policy) -> None:
    """However a device is changed, what a peek finds is what the model holds, and so is what a read finds."""
    unit = 4096
    with tempfile.TemporaryDirectory() as home, space.open(home) as store:
        size = KEPT_BLOCKS * unit
        capsule = store.create(size=size, block_size=BLOCK, policy=policy)
        model = bytearray(texture(size, 1))
        store.write(capsule, 0, bytes(model))
        asyncio.run(_kept(store, capsule, model, actions, unit))


async def _kept(
    store: Store, capsule: CapsuleId, model: bytearray, actions: list[tuple[str, int, int]], unit: int
) -> None:
    writer = BlockWriter(store)
    device, other = (LocalBlockDevice(store, capsule, writer=writer) for _ in range(2))
    for number, (verb, at, count) in enumerate(actions):
        offset = at * unit
        length = min(count, KEPT_BLOCKS - at) * unit
        data = texture(length, number + 2)
        if verb == "read":
            expected = bytes(model[offset : offset + length])
            for each in (device, other):
                each.info()
                found = each.peek(offset, length)
                assert found is None or b"".join(found) == expected
                assert b"".join(await each.read(offset, length)) == expected
            device.info()
            found = device.peek(offset, min(length, unit))
            assert found is not None or length > CHUNK_BYTES, "what was just read is at hand"
            assert b"".join(found or ()) == expected[: unit if found else 0]
            continue
        if verb == "write":
            done: asyncio.Future[space.SpaceError | None] = asyncio.get_running_loop().create_future()
            assert device.begin_write(offset, data, actor="host", done=done.set_result)
            assert await done is None
        elif verb == "command":
            await other.write(offset, data, durable=False, actor="host")
        elif verb == "elsewhere":
            store.write(capsule, offset, data)
        else:
            data = bytes(length)
            await device.deallocate([(offset, length)], actor="host")
        model[offset : offset + length] = data
    for each in (device, other):
        each.close()
    await writer.close()
