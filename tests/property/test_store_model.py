"""A whole store against a dict of bytes, at the present and at every past moment, through every way to reopen it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import space
from space._node.reading import Reading
from space._node.store import Store
from space.events import commands as cmd
from space.events.types import Kind
from space.policy.model import Policy
from tests.store_support import texture

NAMES: Final = ["/a", "/b", "/d/a", "/d/b", "/e"]
POLICIES: Final = [
    Policy.from_document({"compression": "none", "history": "none"}),
    Policy.from_document({"compression": "lz4", "history": "all"}),
    Policy.from_document({"compression": "none", "dedupe": False, "history": "all"}),
]
Tree = dict[str, tuple[bytes, int]]  # path → content, number of its policy


@attrs.define
class World:
    """A store on disk and what it must hold, now and at each position."""

    home: Path
    store: Store
    tree: Tree = attrs.field(factory=dict)
    past: dict[int, tuple[str, Tree]] = attrs.field(factory=dict)
    deleted: dict[str, list[tuple[bytes, int]]] = attrs.field(factory=dict)
    snapshots: dict[str, Tree] = attrs.field(factory=dict)

    def note(self) -> None:
        """Remembers this moment."""
        position, digest = self.store.digest()
        assert self.past.get(position, (digest,))[0] == digest
        self.past[position] = digest, dict(self.tree)

    def reopen(self, how: str) -> None:
        """Ends the process one way or another, perhaps loses what can be rebuilt, and opens again."""
        before = self.store.digest()
        if how == "kill":
            self.store.sync()
            copy = self.home.with_name(f"{self.home.name}+")
            shutil.copytree(self.home, copy)
            self.store.close()
            shutil.rmtree(self.home)
            copy.rename(self.home)
        else:
            self.store.close()
        if how in {"state", "checkpoints"}:
            shutil.rmtree(self.home / how, ignore_errors=True)
        self.store = open_small(self.home)
        assert self.store.digest() == before


def open_small(home: Path) -> Store:
    """In small segments."""
    return space.open(home, segment_bytes=32 << 10)


def check(reading: Reading, tree: Tree, reclaimed: bool) -> None:
    """Names and bytes are the model's; in the past, bytes of files without history may have been reclaimed."""
    found = {}
    for path, stat in reading.walk(reading.root):
        if stat.kind == Kind.FILE:
            name = "/" + path.decode()
            forgetful = name in tree and tree[name][1] == 0
            try:
                found[name] = reading.read(stat.id)
            except space.RefusedError:
                assert reclaimed
                assert forgetful
                found[name] = tree[name][0]
    assert found == {name: content for name, (content, _) in tree.items()}


def do(world: World, verb: str, name: str, other: str, size: int, offset: int) -> None:
    """One step, in the store and in the model; both agree on whether it can be done."""
    store, tree = world.store, world.tree
    if not possible(world, verb, name, other):
        with pytest.raises((space.NotFoundError, space.ConflictError)):
            carry_out(store, verb, name, other, size, offset)
        return
    carry_out(store, verb, name, other, size, offset)
    if verb == "put":
        tree[name] = texture(size, offset), offset % 3
    elif verb == "write":
        content, policy = tree[name]
        content = content.ljust(offset, b"\0")
        data = texture(max(size, 1), offset)
        tree[name] = content[:offset] + data + content[offset + len(data) :], policy
    elif verb in {"resize", "punch"}:
        content, policy = tree[name]
        if verb == "resize":
            tree[name] = content[:size].ljust(size, b"\0"), policy
        else:
            end = min(len(content), offset + max(size, 1))
            gone = max(0, end - offset)
            tree[name] = content[:offset] + bytes(gone) + content[offset + gone :], policy
    elif verb == "rm":
        world.deleted.setdefault(name, []).append(tree.pop(name))
    elif verb == "mv":
        if name != other:
            if other in tree:
                world.deleted.setdefault(other, []).append(tree[other])
            tree[other] = tree.pop(name)
    elif verb == "copy":
        content, policy = tree[other]
        start, length = copied(tree[name][0], size)
        if length > 0:
            data = tree[name][0][start : start + length]
            content = content.ljust(offset, b"\0")
            tree[other] = content[:offset] + data + content[offset + length :], policy
    elif verb == "clone":
        tree[other] = tree[name]
    elif verb == "undelete":
        tree[name] = world.deleted[name].pop()
    elif verb == "snapshot":
        world.snapshots[f"{name[1:].replace('/', '-')}"] = dict(tree)
    elif verb == "restore":
        tree[other] = world.snapshots[name[1:].replace("/", "-")][name]


def copied(content: bytes, size: int) -> tuple[int, int]:
    """Start and length of a range to be copied; there is none in a short content."""
    start = size // 3
    return start, min(5000, len(content) - start)


def possible(world: World, verb: str, name: str, other: str) -> bool:
    """Whether the model allows a step."""
    tree = world.tree
    if verb == "put":
        return name not in tree
    if verb == "undelete":
        return bool(world.deleted.get(name)) and name not in tree
    if verb == "snapshot":
        return name[1:].replace("/", "-") not in world.snapshots
    if verb == "clone":
        return name in tree and other not in tree
    if verb == "copy":
        return name in tree and other in tree
    if verb == "restore":
        return name in world.snapshots.get(name[1:].replace("/", "-"), {}) and other not in tree
    return name in tree


def carry_out(store: Store, verb: str, name: str, other: str, size: int, offset: int) -> Any:
    """One step in the store alone."""
    if verb == "put":
        return store.put(texture(size, offset), name=name, policy=POLICIES[offset % 3])
    if verb == "write":
        return store.write(store.resolve(name), offset, texture(max(size, 1), offset))
    if verb == "resize":
        return store.resize(name, size)
    if verb == "punch":
        return store.execute(cmd.Deallocate(store.resolve(name), offset, max(size, 1)))
    if verb == "copy":
        target, source = store.resolve(other), store.resolve(name)
        start, length = copied(store.read(source), size)
        if length < 1:
            return None
        return store.execute(cmd.CopyRange(target, offset, source, start, length))
    if verb == "mv":
        return store.mv(name, other)
    if verb == "clone":
        return store.clone(name, other)
    if verb == "snapshot":
        return store.snapshot("/", name[1:].replace("/", "-"))
    if verb == "restore":
        return store.clone(name, other, at=snapshot_named(store, name[1:].replace("/", "-")))
    return store.rm(name) if verb == "rm" else store.undelete(name)


def snapshot_named(store: Store, name: str) -> str:
    """The name, if there is such a snapshot."""
    if name not in {each.name for each in store.snapshots()}:
        raise space.NotFoundError(name)
    return name


def upkeep(world: World, verb: str) -> None:
    """What must change nothing that can be read."""
    if verb in {"close", "kill", "state", "checkpoints"}:
        world.reopen(verb)
    elif verb == "checkpoint":
        world.store.checkpoint()
    elif verb == "replay":
        assert world.store.replay(verify=True).equal
    elif verb == "verify":
        assert world.store.verify().findings == []
    else:
        world.store.gc()
        world.deleted = {name: [one for one in kept if one[1]] for name, kept in world.deleted.items()}
        assert len(world.store.deleted()) == sum(map(len, world.deleted.values()))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["put"] * 4
            + ["write"] * 4
            + ["copy"] * 3
            + ["resize", "punch", "rm", "mv", "clone", "undelete", "snapshot", "restore", "gc", "gc"]
            + ["close", "kill", "state", "checkpoint", "checkpoints", "replay", "verify"]
        ),
        st.sampled_from(NAMES),
        st.sampled_from(NAMES),
        st.sampled_from([0, 1, 100, 4096, 5000, 20_000]),
        st.sampled_from([0, 1, 2, 50, 4096, 6000]),
    ),
    min_size=3,
    max_size=40,
)
UPKEEP = {"close", "kill", "state", "checkpoint", "checkpoints", "replay", "verify", "gc"}


@given(steps=STEPS)
def test_a_store_is_a_dict_of_bytes_at_every_moment(steps: list[tuple[str, str, str, int, int]]) -> None:
    """Whatever is done, and however it is reopened: the present is the model, and so is every past moment."""
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "store"
        world = World(home, open_small(home))
        world.store.mkdir("/d")
        for number, name in enumerate(NAMES[:4]):
            do(world, "put", name, name, 9000, number)
        world.note()
        for verb, name, other, size, offset in steps:
            if verb in UPKEEP:
                upkeep(world, verb)
            else:
                do(world, verb, name, other, size, offset)
            world.note()
        check(world.store, world.tree, reclaimed=False)
        world.reopen("close")
        check(world.store, world.tree, reclaimed=False)
        for position, (digest, tree) in world.past.items():
            with world.store.at(f"@{position}") as past:
                assert past.digest() == (position, digest)
                check(past, tree, reclaimed=True)
        for name, tree in world.snapshots.items():
            with world.store.at(name) as past:
                check(past, tree, reclaimed=False)
        assert world.store.verify().findings == []
        assert world.store.replay(verify=True).equal
        world.store.close()
