"""Capacity of volumes, kept by the file model over them; and the moment when nobody writes."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from space._errors import NotFoundError, SpaceError, Status
from space._node.csi_files import VolumeFiles
from space._node.csi_volumes import DATA, VolumeTree, tree_usage
from space._node.store import Store
from space.events import commands as cmd
from space.events.commands import Request
from space.events.ids import CapsuleId
from space.events.types import Kind
from space.projections.csi.model import Wanted
from space.projections.vfs import AttributeChange, Caller

pytestmark = [pytest.mark.unit, pytest.mark.requires("py:google.protobuf")]

KIB = 1024
CAPACITY = 256 * KIB
US = Caller(0, 0, "test")


class World:
    """A store with one volume, and the files of it."""

    def __init__(self, home: Path) -> None:
        self.store = Store(home)
        self.volumes = VolumeTree(self.store)
        self.files = VolumeFiles(self.store, self.volumes.volumes_home)
        self.root = self.make("v")

    def make(self, name: str, capacity: int = CAPACITY) -> CapsuleId:
        """A volume's root directory."""
        made = self.volumes.create(Wanted(name, capacity, 0, block=False))
        return self.store.lookup(self.store.lookup(self.volumes.volumes_home, made.id.encode()), DATA)

    def file(self, name: bytes, directory: CapsuleId | None = None) -> CapsuleId:
        """An empty file."""
        made = run(self.files.create(directory or self.root, name, Kind.FILE, US, mode=0o644))
        return CapsuleId(made.id)

    def write(self, node: CapsuleId, offset: int, length: int) -> Status | None:
        """Writes noise; the status if that is refused."""
        data = random.Random(offset).randbytes(length)
        return refused(self.files.write(node, offset, data, US)) or refused(self.files.commit(node))

    @property
    def used(self) -> int:
        """What the log says the volume takes."""
        run(self.files.sync())
        return tree_usage(self.store, self.root)[0]


def run(work: Any) -> Any:
    """The result of a coroutine."""
    return asyncio.run(work)


def refused(work: Any) -> Status | None:
    """Why a coroutine is refused; None if it is not."""
    try:
        run(work)
    except SpaceError as error:
        return error.status
    return None


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A store with a volume of 256 KiB."""
    made = World(tmp_path / "data")
    yield made
    made.store.close()


def test_a_volume_takes_its_capacity_and_no_more(world: World) -> None:
    """Bytes up to the capacity are taken, one more is ENOSPC, and over bytes that are there it is not."""
    node = world.file(b"a")
    assert world.write(node, 0, CAPACITY) is None
    assert world.write(node, CAPACITY, 1) is Status.NO_SPACE
    assert world.write(node, CAPACITY - 10, 11) is Status.NO_SPACE
    assert world.write(node, 5, CAPACITY - 5) is None
    assert world.used == CAPACITY


def test_holes_take_nothing(world: World) -> None:
    """A file much larger than the volume fits, as far as it is holes; what is punched out can be written elsewhere."""
    node, other = world.file(b"a"), world.file(b"b")
    assert world.write(node, 1 << 40, CAPACITY) is None
    assert world.write(other, 0, 1) is Status.NO_SPACE
    run(world.files.deallocate(node, 1 << 40, 100 * KIB, US))
    assert world.write(other, 0, 100 * KIB) is None
    assert world.write(other, 100 * KIB, 1) is Status.NO_SPACE


def test_what_is_removed_gives_its_room_back(world: World) -> None:
    """Room comes back by unlinking, by replacing, by cutting off; of a file still open only when it is closed."""
    for free in ("remove", "replace", "truncate"):
        node = world.file(b"a")
        assert world.write(node, 0, CAPACITY) is None
        other = world.file(b"b")
        assert world.write(other, 0, 1) is Status.NO_SPACE
        if free == "remove":
            world.files.hold(node)
            run(world.files.remove(world.root, b"a", US, is_directory=False))
            assert world.write(other, 0, 1) is Status.NO_SPACE
            world.files.drop(node)
        elif free == "replace":
            run(world.files.rename(world.root, b"b", world.root, b"a", US))
        else:
            run(world.files.set_attributes(node, AttributeChange(size=0), US))
        assert world.write(other, 0, CAPACITY) is None
        for name in (b"a", b"b"):
            gone = refused(world.files.remove(world.root, name, US, is_directory=False))
            assert gone in {None, Status.NOT_FOUND}


def test_a_second_name_takes_nothing_and_keeps_the_room(world: World) -> None:
    """A file with two names is counted once, and takes its room until both are gone."""
    node, other = world.file(b"a"), world.file(b"b")
    assert world.write(node, 0, CAPACITY) is None
    run(world.files.link(node, world.root, b"c", US))
    run(world.files.remove(world.root, b"a", US, is_directory=False))
    assert world.write(other, 0, 1) is Status.NO_SPACE
    run(world.files.remove(world.root, b"c", US, is_directory=False))
    assert world.write(other, 0, CAPACITY) is None


def test_copies_and_allocations_need_room(world: World) -> None:
    """Ranges copied or allocated beyond the capacity are refused."""
    node, other = world.file(b"a"), world.file(b"b")
    assert world.write(node, 0, 200 * KIB) is None
    assert refused(world.files.copy(node, 0, other, 0, 100 * KIB, US)) is Status.NO_SPACE
    assert refused(world.files.allocate(other, 0, 100 * KIB, US)) is Status.NO_SPACE
    run(world.files.copy(node, 0, other, 0, 50 * KIB, US))
    assert world.used == 250 * KIB


def test_an_expanded_volume_has_room_at_once(world: World) -> None:
    """What was refused is taken as soon as the volume is larger, without anything being opened anew."""
    node = world.file(b"a")
    assert world.write(node, 0, CAPACITY) is None
    assert world.write(node, CAPACITY, KIB) is Status.NO_SPACE
    (volume,) = world.volumes.volumes("", 10)
    world.volumes.expand(volume.id, 2 * CAPACITY, 0)
    assert world.write(node, CAPACITY, CAPACITY) is None
    assert world.write(node, 2 * CAPACITY, 1) is Status.NO_SPACE


def test_volumes_have_rooms_of_their_own(world: World) -> None:
    """A full volume takes nothing from another one, and names do not lead from one to the other."""
    other = world.make("w")
    assert world.write(world.file(b"a"), 0, CAPACITY) is None
    assert world.write(world.file(b"a", other), 0, CAPACITY) is None
    assert refused(world.files.rename(world.root, b"a", other, b"b", US)) is Status.NOT_PERMITTED
    node = world.store.lookup(world.root, b"a")
    assert refused(world.files.link(node, other, b"b", US)) is Status.NOT_PERMITTED


def test_what_was_there_before_a_start_counts(world: World, tmp_path: Path) -> None:
    """After a restart the bytes of before are known before the first one is written."""
    assert world.write(world.file(b"a"), 0, 200 * KIB) is None
    world.files = VolumeFiles(world.store, world.volumes.volumes_home)
    node = world.file(b"b")
    assert world.write(node, 0, 57 * KIB) is Status.NO_SPACE
    assert world.write(node, 0, 56 * KIB) is None


@pytest.mark.parametrize("seed", range(8))
def test_the_account_is_what_the_log_says(world: World, seed: int) -> None:
    """After any calls in any order, what is reckoned is what a count of the whole tree gives, never above capacity."""
    chance = random.Random(seed)
    names = [b"a", b"b", b"c"]
    held: list[CapsuleId] = []
    for _ in range(60):
        name, other = chance.choice(names), chance.choice(names)
        refusal = act(world, chance, name, other, held)
        assert refusal in {None, Status.NOT_FOUND, Status.EXISTS, Status.NO_SPACE, Status.INVALID}
        assert world.used <= CAPACITY
    for node in held:
        world.files.drop(node)
    (tree,) = world.files._trees.values()
    world.files._reckon(tree)
    assert tree.used == world.used


def act(
    world: World, chance: random.Random, name: bytes, other: bytes, held: list[CapsuleId]
) -> Status | None:
    """One call, and why it was refused."""
    files, root = world.files, world.root
    what = chance.randrange(9)
    if what == 0:
        return refused(files.create(root, name, Kind.FILE, US, mode=0o644))
    with contextlib.suppress(NotFoundError):
        node = world.store.lookup(root, name)
        offset, length = chance.randrange(200 * KIB), chance.randrange(1, 100 * KIB)
        if what in {1, 2, 3}:
            return refused(files.write(node, offset, chance.randbytes(length), US))
        if what == 4:
            return refused(files.set_attributes(node, AttributeChange(size=offset), US))
        if what == 5:
            return refused(files.deallocate(node, offset, length, US))
        if what == 6:
            files.hold(node)
            held.append(node)
            return refused(files.remove(root, name, US, is_directory=False))
        if what == 7:
            return refused(files.rename(root, name, root, other, US))
        return refused(files.link(node, root, other, US))
    return Status.NOT_FOUND


def test_a_cut_has_all_that_was_acknowledged(world: World) -> None:
    """Clones taken in a cut while another thread's loop writes hold the same number in every file, each time."""
    nodes = [world.file(b"n%d" % n) for n in range(3)]
    begun, over = threading.Event(), threading.Event()

    async def write() -> None:
        world.files.begun()
        number = 0
        while not over.is_set():
            number += 1
            for node in nodes:  # the same number everywhere, without a pause in between
                await world.files.write(node, 0, number.to_bytes(8, "big"), US)
            begun.set()
            await asyncio.sleep(0)

    writer = threading.Thread(target=lambda: asyncio.run(write()))
    writer.start()
    begun.wait()
    seen = set()
    try:
        for number in range(20):
            copies = [world.store.new_id() for _ in nodes]
            clones = [
                cmd.Clone(copy, node, world.root, b"c%d-%d" % (number, n))
                for n, (copy, node) in enumerate(zip(copies, nodes, strict=True))
            ]
            outcomes = world.files.cut(
                lambda clones=clones: world.store.execute_all([Request(cmd.Together(clones))])  # type: ignore[misc]
            )
            assert not isinstance(outcomes[0], SpaceError)
            found = {world.store.read(copy) for copy in copies}
            assert len(found) == 1
            seen |= found
    finally:
        over.set()
        writer.join()
        world.files.ended()
    assert len(seen) > 1


def test_a_cut_without_a_mount_is_done_at_once(world: World) -> None:
    """Before the loop serves, and after it has ended, a cut is carried out by who asks."""
    assert world.files.cut(list) == []


def test_an_export_has_its_volumes_accounts(world: World) -> None:
    """What is written through the mount counts in the export of a volume, and the other way; no other volume's does."""
    export = world.files.export(world.root)
    other = world.files.export(world.make("other"))
    assert world.write(world.file(b"one"), 0, CAPACITY // 2) is None
    two = CapsuleId(run(export.create(world.root, b"two", Kind.FILE, US, mode=0o600)).id)
    assert refused(export.write(two, 0, bytes(CAPACITY // 4), US)) is None
    for found, free in ((export, CAPACITY // 4), (other, CAPACITY)):
        space = found.space()
        assert (space.block_bytes * space.blocks, space.block_bytes * space.blocks_free) == (CAPACITY, free)
    assert world.write(two, CAPACITY // 4, CAPACITY // 2) is Status.NO_SPACE
    assert refused(export.write(two, CAPACITY // 4, bytes(CAPACITY // 2), US)) is Status.NO_SPACE
    assert export.read(two, 0, CAPACITY) == bytes(CAPACITY // 4) == world.files.read(two, 0, CAPACITY)
    assert world.files.space().blocks != CAPACITY


def test_a_cut_has_what_an_export_holds_back(world: World) -> None:
    """A small write acknowledged through an export is in a snapshot taken right after it."""
    export = world.files.export(world.root)
    node = CapsuleId(run(export.create(world.root, b"file", Kind.FILE, US, mode=0o600)).id)
    run(export.write(node, 0, b"acknowledged", US))
    tree = VolumeTree(world.store, cut=world.files.cut, accounts=world.files)
    (volume,) = tree.volumes("", 2)
    snapshot = tree.snapshot(volume.id, "s").id
    assert (
        world.store.read(world.store.resolve(f"/csi/snapshots/{snapshot}/data/file"), 0, 99)
        == b"acknowledged"
    )
