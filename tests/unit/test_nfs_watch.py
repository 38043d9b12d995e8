"""Changes of others in the store of an NFS server, and the delegations that are wanted back because of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from space._node.nfs_watch import Watch
from space._node.store import Store
from space.events import commands as cmd
from space.events.commands import Durability
from space.events.ids import ROOT, CapsuleId
from space.events.types import Kind
from space.projections.nfs.exports import Node
from space.projections.nfs.nfs4 import Share, Want
from space.projections.nfs.opens import Mode
from tests.nfs_state_support import World

pytestmark = pytest.mark.unit


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A new store."""
    with Store(tmp_path / "data", segment_bytes=1 << 20) as opened:
        yield opened


def make(store: Store, name: bytes) -> CapsuleId:
    """A new file."""
    command = store.create_command(Kind.FILE, parent=ROOT, name=name)
    store.execute(command, durability=Durability.BUFFERED)
    return CapsuleId(command.capsule)


def delegate(world: World, capsule: CapsuleId) -> None:
    """Gives a new client a delegation of a file."""
    client, node = world.service.client(), Node(world.export, capsule)
    world.state.open(client, node, b"o", Mode(Share.READ, Share.NONE), 0)
    assert world.state.offer(client, node, Share.READ, Want.READ, 0)


async def recalled(
    store: Store, world: World, change: cmd.Command, actor: str, *, thread: bool = False
) -> int:
    """How many recalls a change of the store brings about."""
    watch = Watch(world.state)
    store.watchers.append(watch)

    def act() -> None:
        store.execute(change, durability=Durability.BUFFERED, actor=actor)

    if thread:
        worker = threading.Thread(target=act)
        worker.start()
        await asyncio.to_thread(worker.join)
    else:
        act()
    await asyncio.sleep(0)
    store.watchers.remove(watch)
    return len(world.service.callbacks.recalls)


@pytest.mark.parametrize("thread", [False, True])
def test_a_change_of_another_view_recalls(store: Store, thread: bool) -> None:
    """Who holds a delegation is asked for it when a mount changes the file, whatever thread that is on."""
    world, file = World(), make(store, b"f")
    delegate(world, file)
    change = cmd.SetAttributes(file, mode=0o600)
    assert asyncio.run(recalled(store, world, change, "fuse:uid=0", thread=thread)) == 1


def test_own_changes_recall_nothing(store: Store) -> None:
    """What clients of the server change has been asked for before it was done."""
    world, file = World(), make(store, b"f")
    delegate(world, file)
    change = cmd.SetAttributes(file, mode=0o600)
    assert asyncio.run(recalled(store, world, change, "nfs:host:uid=0")) == 0


def test_changes_of_other_files_recall_nothing(store: Store) -> None:
    """Only the file that changes, or whose name does, matters."""
    world, file, other = World(), make(store, b"f"), make(store, b"g")
    delegate(world, file)
    change = cmd.SetAttributes(other, mode=0o600)
    assert asyncio.run(recalled(store, world, change, "fuse:uid=0")) == 0


def test_a_name_replaced_or_removed_recalls(store: Store) -> None:
    """A rename touches the file that moves and the one it replaces; removing a name its file."""
    world, first, second = World(), make(store, b"f"), make(store, b"g")
    delegate(world, first)
    delegate(world, second)
    change = cmd.Rename(ROOT, b"f", ROOT, b"g", True, False)
    assert asyncio.run(recalled(store, world, change, "fuse:uid=0")) == 2
    third = make(store, b"h")
    delegate(world, third)
    assert asyncio.run(recalled(store, world, cmd.Unlink(ROOT, b"h", False), "fuse:uid=0")) == 3
