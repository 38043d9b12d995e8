"""Commands no program should send: each is refused clearly, and the store is as good as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

import space
from space._node.store import Store
from space.events import commands as cmd
from space.events.types import Kind
from space.policy.model import Policy

KEPT_NOT_AT_ALL = attrs.evolve(Policy(), history_ns=0)


def create(store: Store, **fields: object) -> object:
    """A file /a with these fields."""
    command = cmd.CreateCapsule(bytes(store.new_id()), parent=store.root, name=b"a", **fields)  # type: ignore[arg-type]
    return store.execute(command)


def write(store: Store, record: bytes, stored: bytes | None) -> object:
    """100 bytes written to a fresh file as one frame."""
    capsule = store.create(Kind.FILE, parent=store.root, name=b"a")
    return store.execute(cmd.WriteExtent(capsule, 0, 100, [cmd.StoredFrame(record, stored)]))


def undelete_inside_itself(store: Store) -> object:
    """A deleted directory is to come back below its own child."""
    outer, inner = store.mkdir("/outer"), store.mkdir("/outer/inner")
    store.rm("/outer", recursive=True)
    return store.execute(cmd.Undelete(outer, inner, b"loop"))


ASKED: dict[str, Callable[[Store], object]] = {
    "negative owner": lambda store: create(store, uid=-1),
    "owner of 33 bits": lambda store: create(store, gid=1 << 32),
    "device of 40 bits": lambda store: create(store, rdev=1 << 40),
    "boolean owner": lambda store: create(store, uid=True),
    "key of 40 bits": lambda store: create(store, key=cmd.NewKey(1 << 40, 1, b"")),
    "key too long": lambda store: create(store, key=cmd.NewKey(1, 1, bytes(5000))),
    "size of 64 bits": lambda store: create(store, size=1 << 63),
    "client of 3 bytes": lambda store: store.execute(cmd.TakeSnapshot(store.root, "s"), client=b"abc"),
    "negative sequence": lambda store: store.execute(
        cmd.TakeSnapshot(store.root, "s"), client=bytes(16), sequence=-1
    ),
    "huge sequence": lambda store: store.execute(
        cmd.TakeSnapshot(store.root, "s"), client=bytes(16), sequence=1 << 64
    ),
    "surrogate actor": lambda store: store.execute(cmd.TakeSnapshot(store.root, "s"), actor="\ud800"),
    "surrogate snapshot": lambda store: store.snapshot("/", "\ud800"),
    "snapshot of 300 characters": lambda store: store.snapshot("/", "a" * 300),
    "no snapshot name": lambda store: store.drop_snapshot(""),
    "huge snapshot name": lambda store: store.drop_snapshot("a" * 10_000),
    "surrogate path": lambda store: store.get("/\ud800"),
    "surrogate name": lambda store: store.mkdir("/\udc80"),
    "NUL in a name": lambda store: store.mkdir("/a\0b"),
    "name of 10,000 characters": lambda store: store.mkdir("/" + "a" * 10_000),
    "rename of a huge name": lambda store: store.execute(
        cmd.Rename(store.root, b"a" * 3000, store.root, b"b")
    ),
    "parent of 0 bytes": lambda store: store.execute(cmd.Rename(b"", b"a", store.root, b"b")),
    "parent of 1000 bytes": lambda store: store.execute(cmd.Unlink(bytes(1000), b"a")),
    "frames of nothing": lambda store: write(store, bytes(48), b"abc"),
    "frame record cut short": lambda store: write(store, bytes(47), b""),
    "absurd offset": lambda store: store.write(store.create(Kind.FILE), 1 << 63, b"x"),
    "negative offset": lambda store: store.write(store.create(Kind.FILE), -1, b"x"),
    "absurd time": lambda store: store.execute(cmd.SetAttributes(store.root, mtime=1 << 63)),
    "undelete into itself": undelete_inside_itself,
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
def test_a_bad_command_is_refused_and_leaves_no_trace(
    tmp_path: Path, asked: Callable[[Store], object]
) -> None:
    """A value out of range is an error before the log sees it; the store works on, reopens and replays."""
    with space.open(tmp_path) as store:
        with pytest.raises(space.SpaceError):
            asked(store)
        store.put(b"after", name="/after")
    with space.open(tmp_path) as store:
        assert store.get("/after") == b"after"
        assert store.replay(verify=True).equal
        assert store.verify().findings == []


def test_a_bad_command_does_not_fail_its_neighbours(tmp_path: Path) -> None:
    """Of commands decided in one batch only the bad one is refused."""
    with space.open(tmp_path) as store:
        commands = [
            cmd.CreateCapsule(bytes(store.new_id()), parent=store.root, name=b"%d" % uid, uid=uid)
            for uid in (1, -1, 2)
        ]
        outcomes = store.execute_all([cmd.Request(command) for command in commands])
        assert [type(outcome) for outcome in outcomes] == [cmd.Receipt, space.UsageError, cmd.Receipt]
        assert [entry.name for entry in store.ls("/")] == [b"1", b"2"]


def test_a_batch_never_outgrows_its_limit(tmp_path: Path) -> None:
    """Commands that are large together are split over batches instead of refused together."""
    with space.open(tmp_path) as store:
        capsule = store.create(Kind.FILE)
        value = bytes(65_536)
        requests = [cmd.Request(cmd.SetXattr(capsule, b"%d" % number, value)) for number in range(1100)]
        outcomes = store.execute_all(requests)
        assert {type(outcome) for outcome in outcomes} == {cmd.Receipt}
        assert len(store.xattrs(capsule)) == 1100
        assert store.verify().findings == []


def test_verify_follows_the_chain_of_an_id_used_again(tmp_path: Path) -> None:
    """A capsule created with the id of a purged one begins a chain of its own."""
    with space.open(tmp_path) as store:
        again = store.new_id()
        store.put(b"one" * 3000, name="/f", id=again, policy=KEPT_NOT_AT_ALL)
        store.rm("/f")
        assert store.gc().capsules_purged == 1
        store.put(b"two", name="/f", id=again)
        assert store.get("/f") == b"two"
        assert store.verify().findings == []


@pytest.mark.parametrize("past", [False, True])
def test_verify_follows_chains_into_a_clone(tmp_path: Path, past: bool) -> None:
    """Files, directories and links inside a cloned tree go on with the chains the clone gave them."""
    with space.open(tmp_path) as store:
        store.mkdir("/a/d", parents=True)
        store.put(b"1", name="/a/f")
        at = f"@{store.position}" if past else None
        store.clone("/a", "/b", at=at)
        store.write(store.resolve("/b/f"), 0, b"2")
        store.mv("/b/d", "/b/e")
        store.rm("/b/f")
        store.set_policy("/b", KEPT_NOT_AT_ALL)
        assert store.verify().findings == []


def test_purging_a_directory_takes_its_names_from_files_that_stay(tmp_path: Path) -> None:
    """Hard links count names that exist: a file loses those of a purged directory and keeps the rest."""
    with space.open(tmp_path) as store:
        directory = store.mkdir("/d")
        store.set_policy("/d", KEPT_NOT_AT_ALL)
        kept = store.put(b"kept", name="/d/kept").id
        lost = store.put(b"lost", name="/d/lost").id
        store.execute(cmd.Link(kept, store.root, b"outside"))
        store.execute(cmd.Link(lost, directory, b"twin"))
        store.rm("/d", recursive=True)
        store.gc()
        assert store.stat(kept).nlink == 1
        assert store.get("/outside") == b"kept"
        assert store.gc().capsules_purged == 1
        with pytest.raises(space.NotFoundError):
            store.stat(lost)
        assert store.deleted() == []
        assert store.replay(verify=True).equal
