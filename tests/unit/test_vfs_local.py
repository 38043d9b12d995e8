from __future__ import annotations

import asyncio
import stat as modes
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from space._errors import DiskFullError, SpaceError, Status, UsageError
from space._node.local_vfs import DIRECT_BYTES, PIECES_MAX, RUN_BYTES_MAX, RUNS_MAX, LocalFileSystem
from space._node.store import Store
from space.events import commands as cmd
from space.events.commands import Buffer, Durability
from space.events.ids import ROOT, CapsuleId
from space.events.types import Kind
from space.projections.vfs import (
    CONTENT_NAME,
    NOW,
    SYNTHETIC_ROOT,
    AttributeChange,
    Attributes,
    Caller,
    FileSystem,
)

USER = Caller(1000, 100, "test")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A new store."""
    with Store(tmp_path / "data", segment_bytes=1 << 20) as opened:
        yield opened


def make(files: FileSystem, name: bytes, *, directory: CapsuleId = ROOT, mode: int = 0o644) -> Attributes:
    """A new file."""
    return asyncio.run(files.create(directory, name, Kind.FILE, USER, mode=mode))


def batches(store: Store, action: Any) -> int:
    """How many batches an operation takes."""
    before = store.position
    asyncio.run(action)
    return store.position - before


def test_small_writes_in_a_row_are_one_batch(store: Store) -> None:
    """Sixteen writes of 4 KiB are held back together, are seen by every look, and go to the log as one."""
    files = LocalFileSystem(store)
    node = make(files, b"f").id
    before = store.position
    for index in range(16):
        asyncio.run(files.write(node, index * 4096, bytes([index]) * 4096, USER))
    assert store.position == before
    assert files.attributes(node).size == 65_536
    assert store.position == before + 1
    assert files.read(node, 4096, 1) == b"\1"
    assert [event.actor for event in store.log(capsule=node)][-1] == "test:uid=1000"


@pytest.mark.parametrize("look", ["attributes", "lookup", "entries", "read"])
def test_every_look_sees_what_is_held_back(store: Store, look: str) -> None:
    """Attributes, lookups, listings and reads include bytes that are not in the log yet."""
    files = LocalFileSystem(store)
    node = make(files, b"f").id
    asyncio.run(files.write(node, 0, b"hello", USER))
    size = {
        "attributes": lambda: files.attributes(node).size,
        "lookup": lambda: files.lookup(ROOT, b"f").size,
        "entries": lambda: files.entries(ROOT, after=b"", limit=1)[0][1].size,
        "read": lambda: len(files.read(node, 0, 100)),
    }[look]()
    assert size == 5


def test_the_log_has_mutations_in_their_order(store: Store) -> None:
    """Bytes held back for one file are in the log before a later change of another."""
    files = LocalFileSystem(store)
    first, second = make(files, b"a").id, make(files, b"b").id
    start = store.position
    asyncio.run(files.write(first, 0, b"x", USER))
    asyncio.run(files.set_attributes(second, AttributeChange(mode=0o600), USER))
    assert [event.capsule for event in store.log(start=start + 1)] == [first, second]


def test_what_is_held_back_is_bounded(store: Store) -> None:
    """However many files are written at once, no more than the limit are held back."""
    files = LocalFileSystem(store)
    nodes = [make(files, b"%d" % number).id for number in range(RUNS_MAX + 10)]
    for node in nodes:
        asyncio.run(files.write(node, 0, b"x" * 1000, USER))
        assert len(files._runs) <= RUNS_MAX
    assert batches(store, files.write(nodes[-1], 1000, b"y" * RUN_BYTES_MAX, USER)) >= 1
    assert nodes[-1] not in files._runs


def test_a_late_failure_is_reported_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """When held-back bytes find the disk full, the next commit says so, once; others' calls do not."""
    files = LocalFileSystem(store)
    node, other = make(files, b"f").id, make(files, b"g").id

    def full(*arguments: object, **options: object) -> None:
        raise DiskFullError("no space")

    asyncio.run(files.write(node, 0, b"x", USER))
    with monkeypatch.context() as broken:
        broken.setattr(store, "write_all", full)
        asyncio.run(files.set_attributes(other, AttributeChange(mode=0o600), USER))
        assert files.attributes(node).size == 0
    with pytest.raises(DiskFullError):
        asyncio.run(files.commit(node))
    asyncio.run(files.commit(node))
    asyncio.run(files.write(node, 0, b"y", USER))
    assert files.read(node, 0, 10) == b"y"


def test_sync_makes_all_of_it_durable(store: Store) -> None:
    """After sync nothing is held back and the log is durable to its end."""
    files = LocalFileSystem(store)
    node = make(files, b"f").id
    asyncio.run(files.write(node, 0, b"x", USER))
    assert store.wal.durable_index < store.wal.last_index
    asyncio.run(files.sync())
    assert files._runs == {}
    assert store.wal.durable_index == store.wal.last_index


def test_wrong_writes_are_refused_at_once(store: Store) -> None:
    """Writing a directory, a symbolic link, or past the largest size fails when it is asked for, not later."""
    files = LocalFileSystem(store)
    node = make(files, b"f").id
    link = asyncio.run(files.create(ROOT, b"l", Kind.SYMLINK, USER, mode=0o777, target=b"f")).id
    block = store.create(parent=ROOT, name=b"b", size=4096, block_size=4096)
    for target, offset, status in (
        (ROOT, 0, Status.IS_DIRECTORY),
        (link, 0, Status.INVALID),
        (node, (1 << 63) - 2, Status.TOO_LARGE),
        (node, -1, Status.TOO_LARGE),
        (block, 4000, Status.NO_SPACE),
    ):
        with pytest.raises(SpaceError) as refused:
            asyncio.run(files.write(target, offset, b"x" * 100, USER))
        assert refused.value.status is status


def test_single_capsule(store: Store) -> None:
    """A file as root is a directory of one name: readable and writable, and nothing else can be made of it."""
    inside = store.put(b"hello", name="/f").id
    files = LocalFileSystem(store, inside)
    top = files.attributes(files.root)
    assert (files.root, top.kind, top.ino, top.nlink) == (SYNTHETIC_ROOT, Kind.DIRECTORY, 1, 2)
    assert [(name, each.id) for name, each in files.entries(files.root, after=b"", limit=9)] == [
        (CONTENT_NAME, inside)
    ]
    assert files.entries(files.root, after=CONTENT_NAME, limit=9) == []
    assert files.lookup(files.root, CONTENT_NAME).size == 5
    asyncio.run(files.write(inside, 5, b"!", USER))
    assert files.lookup(files.root, CONTENT_NAME).size == 6
    assert (files.xattr_names(files.root), files.read(inside, 0, 9)) == ([], b"hello!")
    with pytest.raises(SpaceError) as missing:
        files.lookup(files.root, b"other")
    assert missing.value.status is Status.NOT_FOUND
    for change in (
        files.create(files.root, b"x", Kind.FILE, USER, mode=0o600),
        files.remove(files.root, CONTENT_NAME, USER, is_directory=False),
        files.rename(files.root, CONTENT_NAME, files.root, b"x", USER),
        files.set_attributes(files.root, AttributeChange(mode=0o777), USER),
        files.set_xattr(files.root, b"user.a", b"", USER),
    ):
        with pytest.raises(SpaceError) as refused:
            asyncio.run(change)
        assert refused.value.status is Status.NOT_PERMITTED


def test_only_files_and_directories_can_be_roots(store: Store) -> None:
    """A symbolic link or device cannot be shown by itself, and says so."""
    link = store.create(Kind.SYMLINK, parent=ROOT, name=b"l", target=b"x")
    with pytest.raises(UsageError, match="neither a file nor a directory"):
        LocalFileSystem(store, link)


@pytest.mark.parametrize("past", [False, True], ids=["read-only", "past"])
def test_read_only_views_refuse(store: Store, past: bool) -> None:
    """A read-only view and a past moment refuse every mutation with READ_ONLY."""
    node = store.put(b"x", name="/f").id
    reading = store.at(f"@{store.position}") if past else store
    try:
        files = LocalFileSystem(reading, read_only=not past)
        assert (files.read_only, files.immutable) == (True, past)
        for change in (
            files.write(node, 0, b"y", USER),
            files.create(ROOT, b"x", Kind.FILE, USER, mode=0o600),
            files.link(node, ROOT, b"g", USER),
            files.remove(ROOT, b"f", USER, is_directory=False),
            files.rename(ROOT, b"f", ROOT, b"g", USER),
            files.set_attributes(node, AttributeChange(size=0), USER),
            files.set_xattr(node, b"user.a", b"", USER),
            files.remove_xattr(node, b"user.a", USER),
        ):
            with pytest.raises(SpaceError) as refused:
                asyncio.run(change)
            assert refused.value.status is Status.READ_ONLY
        asyncio.run(files.sync())
        assert files.read(node, 0, 9) == b"x"
        assert files.space().blocks > 0
    finally:
        if past:
            reading.close()


def test_open_nodes_are_pinned(store: Store) -> None:
    """A node is pinned in the store exactly while somebody holds it open."""
    files = LocalFileSystem(store)
    node = make(files, b"f").id
    files.hold(node)
    files.hold(node)
    files.drop(node)
    assert node in store.pinned
    files.drop(node)
    assert node not in store.pinned


def test_owner_and_group_of_what_is_made(store: Store) -> None:
    """A new node belongs to the caller; in a set-group-id directory to its group, and so do directories below."""
    files = LocalFileSystem(store)
    above = asyncio.run(files.create(ROOT, b"d", Kind.DIRECTORY, USER, mode=0o2775)).id
    asyncio.run(files.set_attributes(above, AttributeChange(gid=55), USER))
    file = make(files, b"f", directory=above)
    below = asyncio.run(files.create(above, b"s", Kind.DIRECTORY, USER, mode=0o755))
    assert (file.uid, file.gid, file.mode) == (1000, 55, 0o644)
    assert (below.gid, below.mode) == (55, 0o755 | modes.S_ISGID)


def test_the_caller_decides_on_set_id_bits(store: Store) -> None:
    """A write by root leaves set-id bits, one by a user drops them; a new owner drops them for everybody."""
    files = LocalFileSystem(store)
    root = Caller(0, 0, "test")
    node = make(files, b"f", mode=0o6755).id
    asyncio.run(files.write(node, 0, b"x", root))
    assert files.attributes(node).mode == 0o6755
    asyncio.run(files.write(node, 0, b"x", USER))
    assert files.attributes(node).mode == 0o755
    asyncio.run(files.set_attributes(node, AttributeChange(mode=0o6755), root))
    asyncio.run(files.set_attributes(node, AttributeChange(uid=5), root))
    assert files.attributes(node).mode == 0o755


def test_settled_bytes_are_what_the_store_gets(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that does not go on where the last one ended is a piece of its own; all are one batch, in order."""
    files = LocalFileSystem(store)
    node = make(files, b"f").id
    written: list[list[tuple[int, bytes]]] = []
    write_all = store.write_all

    def spy(capsule: CapsuleId, pieces: Sequence[tuple[int, Buffer]], **options: Any) -> Any:
        written.append([(offset, bytes(data)) for offset, data in pieces])
        return write_all(capsule, pieces, **options)

    monkeypatch.setattr(store, "write_all", spy)
    before = store.position
    for offset, data in ((0, b"aa"), (2, b"bb"), (1, b"cc"), (3, b"dd"), (9, b"e")):
        asyncio.run(files.write(node, offset, data, USER))
    asyncio.run(files.commit(node))
    assert written == [[(0, b"aabb"), (1, b"ccdd"), (9, b"e")]]
    assert store.position == before + 1
    assert files.read(node, 0, 99) == b"accdd\0\0\0\0e"


def test_pieces_held_back_are_bounded(store: Store) -> None:
    """Scattered writes are held back up to a number of pieces, and then go to the log together."""
    files = LocalFileSystem(store)
    node = make(files, b"f").id
    before = store.position
    for number in range(PIECES_MAX):
        assert store.position == before
        asyncio.run(files.write(node, number * 10, b"x", USER))
    assert (store.position, files._runs) == (before + 1, {})


def test_permissions_leave_bytes_held_back(store: Store) -> None:
    """Asking for a node's permissions settles nothing, and its kind, mode and owner are right all the same."""
    files = LocalFileSystem(store)
    made = make(files, b"f")
    asyncio.run(files.write(made.id, 0, b"x", USER))
    found = files.permissions(made.id)
    assert (found.kind, found.mode, found.uid) == (made.kind, made.mode, made.uid)
    assert made.id in files._runs


def test_a_long_write_goes_straight_to_the_log(store: Store) -> None:
    """Bytes enough for a command of their own are not copied to be held back, and come after those that were."""
    files = LocalFileSystem(store)
    node = make(files, b"f").id
    asyncio.run(files.write(node, 0, b"first", USER))
    before = store.position
    asyncio.run(files.write(node, 3, b"y" * DIRECT_BYTES, USER))
    assert (store.position, files._runs) == (before + 2, {})
    assert files.read(node, 0, 5) == b"firyy"


def test_remembered_attributes_end_with_any_change(store: Store) -> None:
    """What is changed behind the back of the file system shows at once."""
    files = LocalFileSystem(store)
    node = make(files, b"f").id
    assert files.attributes(node) is files.attributes(node)
    store.execute(cmd.SetAttributes(node, mode=0o600), durability=Durability.BUFFERED)
    assert files.attributes(node).mode == 0o600


def test_the_time_of_a_change_can_be_now(store: Store) -> None:
    """NOW stands for the time at which a change is carried out, at creation too."""
    files = LocalFileSystem(store)
    change = AttributeChange(atime=5, mtime=NOW)
    before = time.time_ns()
    made = asyncio.run(files.create(ROOT, b"f", Kind.FILE, USER, mode=0o644, change=change))
    found = asyncio.run(files.set_attributes(made.id, AttributeChange(atime=NOW), USER))
    assert (made.atime, made.mtime >= before, found.atime >= made.mtime) == (5, True, True)


def test_room_is_not_promised_where_there_is_none(store: Store) -> None:
    """Allocating more than the disk has free fails, and changes nothing."""
    files = LocalFileSystem(store)
    node = make(files, b"f").id
    with pytest.raises(SpaceError) as refused:
        asyncio.run(files.allocate(node, 0, 1 << 62, USER))
    assert refused.value.status is Status.NO_SPACE
    assert files.attributes(node).size == 0
