from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from space._errors import DiskFullError
from space._node.store import Store
from space.policy.model import Policy
from space.projections.nfs import data, files
from space.projections.nfs.attributes import Settable
from space.projections.nfs.compound import Stateid
from space.projections.nfs.exports import Node
from space.projections.nfs.nfs4 import Attr, Op
from space.projections.nfs.xdr import Reader
from space.projections.vfs import AttributeChange
from tests.nfs_files_support import (
    OTHER,
    ROOT,
    USER,
    Request,
    World,
    attributes_of,
    bitmap,
    make_directory,
    open_store,
    read,
    served,
    stateid,
    string,
    u32,
    u64,
    write,
)

BLOCK = 4096


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A new store."""
    with open_store(tmp_path / "data") as opened:
        yield opened


@pytest.fixture
def world(store: Store) -> World:
    """It, served without squash."""
    return served(store)


def make(request: Request, name: bytes, **settings: Any) -> Request:
    """The same request at a new file."""
    settable = Settable(change=AttributeChange(**settings))
    made = asyncio.run(files.create_file(request.ctx, request.root().ctx.node(), name, settable))
    return request.at(Node(request.ctx.node().export, made.id))


def content(request: Request) -> tuple[bytes, bool]:
    """What READ gives of all of it, and whether that is the end."""
    result = request.ok(Op.READ, read(0, 1 << 20))
    eof = result.boolean()
    return result.opaque(1 << 20), eof


def change(request: Request) -> int:
    """The change attribute."""
    return attributes_of(request.ok(Op.GETATTR, bitmap(Attr.CHANGE)))[1].u64()


def written(result: Reader) -> tuple[int, int, bytes]:
    """A WRITE4resok."""
    return result.u32(), result.u32(), result.fixed(8)


def segments(result: Reader) -> tuple[bool, list[tuple[int, bytes | int]]]:
    """A read_plus_res4: offsets with bytes, or with the length of a hole."""
    eof = result.boolean()
    found: list[tuple[int, bytes | int]] = []
    for _ in range(result.u32()):
        hole, offset = result.u32(), result.u64()
        found.append((offset, result.u64() if hole else result.opaque(1 << 20)))
    return eof, found


def test_what_is_written_is_read(world: World) -> None:
    """WRITE and READ agree, count what they did, and know where the end is."""
    request = make(world.request(), b"f")
    assert written(request.ok(Op.WRITE, write(5, b"hello")))[:2] == (5, data.UNSTABLE)
    assert content(request) == (b"\0" * 5 + b"hello", True)
    for offset, count, expected in (
        (5, 4, (b"hell", False)),
        (5, 5, (b"hello", True)),
        (10, 9, (b"", True)),
        (99, 9, (b"", True)),
        (0, 0, (b"", False)),
        (1 << 63, 9, (b"", True)),
    ):
        result = request.ok(Op.READ, read(offset, count))
        assert (result.boolean(), result.opaque(99)) == (expected[1], expected[0])
    assert request.fails(Op.WRITE, write((1 << 63) - 3, b"hello")) == "FBIG"
    assert request.fails(Op.WRITE, write((1 << 64) - 1, b"hello")) == "FBIG"
    assert request.fails(Op.WRITE, write(0, b"", 3)) == "BADXDR"
    assert written(request.ok(Op.WRITE, write(0, b"")))[0] == 0


def test_an_answer_says_how_stable_it_is(store: Store, world: World) -> None:
    """An unstable write waits for nothing; one that is to be stable waits for the disk, and COMMIT does."""
    request = make(world.request(), b"f")
    files_ = world.exports.root.export.files
    request.ctx.unsynced.clear()
    _, stable, verifier = written(request.ok(Op.WRITE, write(0, b"x")))
    assert (stable, request.ctx.unsynced, verifier) == (data.UNSTABLE, set(), world.service.write_verifier)
    assert request.ok(Op.COMMIT, u64(0) + u32(0)).fixed(8) == verifier
    assert request.ctx.unsynced == {files_}
    for wanted in (1, 2):
        request.ctx.unsynced.clear()
        assert written(request.ok(Op.WRITE, write(0, b"y", wanted)))[1:] == (data.FILE_SYNC, verifier)
        assert request.ctx.unsynced == {files_}
        asyncio.run(world.service.barrier(request.ctx.unsynced))
        assert store.wal.durable_index == store.last
    assert served(store).service.write_verifier != bytes(8)


def test_bytes_that_could_not_be_kept_change_the_verifier(
    store: Store, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When acknowledged bytes find the disk full, who asks is told, and everybody else sees another verifier."""
    request = make(world.request(), b"f")
    before = written(request.ok(Op.WRITE, write(0, b"lost")))[2]

    def full(*arguments: object, **options: object) -> None:
        raise DiskFullError("no space")

    with monkeypatch.context() as broken:
        broken.setattr(store, "write_all", full)
        assert content(request)[0] == b""
    assert request.fails(Op.COMMIT, u64(0) + u32(0)) == "NOSPC"
    after = request.ok(Op.COMMIT, u64(0) + u32(0)).fixed(8)
    assert after != before
    assert after[:4] == before[:4]


def test_only_files_hold_bytes(world: World) -> None:
    """Operations on bytes tell directories, links and the rest apart."""
    request = world.request()
    request.ok(Op.CREATE, u32(5) + string(b"target") + string(b"link") + bitmap() + string(b""))
    link = request.ctx.node()
    request.root().ok(Op.CREATE, u32(7) + string(b"pipe") + bitmap() + string(b""))
    pipe = request.ctx.node()
    request.root().ok(Op.CREATE, make_directory(b"directory"))
    for node, status in ((request.ctx.node(), "ISDIR"), (link, "SYMLINK"), (pipe, "WRONG_TYPE")):
        request.at(node)
        for op, args in (
            (Op.READ, read(0, 1)),
            (Op.READ_PLUS, read(0, 1)),
            (Op.WRITE, write(0, b"x")),
            (Op.COMMIT, u64(0) + u32(0)),
            (Op.SEEK, stateid() + u64(0) + u32(0)),
            (Op.ALLOCATE, stateid() + u64(0) + u64(1)),
            (Op.DEALLOCATE, stateid() + u64(0) + u64(1)),
            (Op.IO_ADVISE, stateid() + u64(0) + u64(0) + bitmap()),
        ):
            assert request.fails(op, args) == status, op.name


def test_permission_to_bytes(world: World) -> None:
    """Without an open file the mode decides, except that owners may always and who may execute may read."""
    node = make(world.request(), b"f", mode=0o410, uid=1000, gid=200).ctx.node()
    owner, other, root = (world.request(who).at(node) for who in (USER, OTHER, ROOT))
    assert owner.fails(Op.WRITE, write(0, b"x")) == "OK"
    assert other.fails(Op.WRITE, write(0, b"x")) == "ACCESS"
    assert other.fails(Op.READ, read(0, 1)) == "OK"
    assert root.fails(Op.WRITE, write(0, b"x")) == "OK"
    stranger = world.request(USER).at(make(world.request(), b"g", mode=0o600).ctx.node())
    assert stranger.fails(Op.READ, read(0, 1)) == "ACCESS"
    assert stranger.fails(Op.COPY, copy_arguments(1)) == "NOFILEHANDLE"


def test_a_reply_has_no_more_than_there_is_room_for(world: World) -> None:
    """READ and READ_PLUS give what fits the reply a session negotiated, and say that it is not the end."""
    request = make(world.request(), b"f")
    request.ok(Op.WRITE, write(0, bytes(range(256)) * 40))
    request.ctx.reply_bytes_max = 1000
    result = request.ok(Op.READ, read(0, 1 << 20))
    assert result.left < 1000
    assert result.boolean() is False
    eof, found = segments(request.ok(Op.READ_PLUS, read(0, 1 << 20)))
    assert not eof
    assert 800 < sum(len(each) for _, each in found if isinstance(each, bytes)) < 1000


def sparse(request: Request, extents: list[tuple[int, int]], size: int) -> bytes:
    """Makes a file of data at these offsets (and lengths) and holes between; returns its bytes."""
    expected = bytearray(size)
    for offset, length in extents:
        piece = bytes([offset // BLOCK % 255 + 1]) * length
        expected[offset : offset + length] = piece
        request.ok(Op.WRITE, write(offset, piece))
    request.ok(Op.SETATTR, stateid() + bitmap(Attr.SIZE) + string(u64(size)))
    return bytes(expected)


EXTENTS = [(2 * BLOCK, BLOCK), (3 * BLOCK, 10), (8 * BLOCK, 3 * BLOCK)]
SIZE = 16 * BLOCK


def test_read_plus_leaves_holes_out(world: World) -> None:
    """READ_PLUS tells data and holes of any range, in order and without a gap: together, what READ gives."""
    request = make(world.request(), b"f")
    expected = sparse(request, EXTENTS, SIZE)
    chance = random.Random(1)
    ranges = [(0, SIZE), (0, 1 << 20), (SIZE, 1), (SIZE + 1, 1)]
    ranges += [(chance.randrange(SIZE), chance.randrange(1, SIZE)) for _ in range(200)]
    for offset, count in ranges:
        eof, found = segments(request.ok(Op.READ_PLUS, read(offset, count)))
        assert eof == (offset + count >= SIZE)
        got, at = b"", offset
        for start, piece in found:
            assert start == at
            got += bytes(piece) if isinstance(piece, int) else piece
            at = offset + len(got)
        assert got == expected[offset : offset + count]
    _, whole = segments(request.ok(Op.READ_PLUS, read(0, SIZE)))
    assert [isinstance(each, int) for _, each in whole] == [True, False, True, False, True]


def test_a_file_of_many_pieces_is_read_in_parts(world: World) -> None:
    """READ_PLUS of more pieces than one reply may have ends early and goes on."""
    request = make(world.request(), b"f")
    expected = sparse(request, [(2 * number * BLOCK, 10) for number in range(data.SEGMENTS_MAX)], SIZE * 16)
    got = b""
    while True:
        eof, found = segments(request.ok(Op.READ_PLUS, read(len(got), 1 << 20)))
        assert 0 < len(found) <= data.SEGMENTS_MAX
        got += b"".join(bytes(each) if isinstance(each, int) else each for _, each in found)
        if eof:
            break
    assert got == expected


def test_seek_finds_data_and_holes(world: World) -> None:
    """From every offset SEEK finds where the next data, or the next hole, begins; the end is a hole."""
    request = make(world.request(), b"f")
    expected = sparse(request, EXTENTS, SIZE)
    for offset in sorted(
        {
            0,
            1,
            SIZE - 1,
            *(at + by for start, length in EXTENTS for at in (start, start + length) for by in (-1, 0, 1)),
        }
    ):
        is_data = [bool(byte) for byte in expected]
        for what in (0, 1):
            result = request.ok(Op.SEEK, stateid() + u64(offset) + u32(what))
            wanted = next((at for at in range(offset, SIZE) if is_data[at] == (what == 0)), SIZE)
            assert (result.boolean(), result.u64()) == (wanted == SIZE, wanted)
    for offset, what, status in ((SIZE, 0, "NXIO"), (SIZE + 1, 1, "NXIO"), (0, 2, "UNION_NOTSUPP")):
        assert request.fails(Op.SEEK, stateid() + u64(offset) + u32(what)) == status


def test_allocation_and_holes(world: World) -> None:
    """ALLOCATE lets the file grow and changes no byte; DEALLOCATE makes a hole and leaves the size."""
    request = make(world.request(), b"f")
    request.ok(Op.WRITE, write(0, b"x" * 3 * BLOCK))
    request.ok(Op.ALLOCATE, stateid() + u64(0) + u64(BLOCK))
    assert content(request)[0] == b"x" * 3 * BLOCK
    request.ok(Op.ALLOCATE, stateid() + u64(2 * BLOCK) + u64(2 * BLOCK))
    assert content(request)[0] == b"x" * 3 * BLOCK + bytes(BLOCK)
    before = change(request)
    request.ok(Op.DEALLOCATE, stateid() + u64(BLOCK) + u64(9 * BLOCK))
    assert content(request)[0] == b"x" * BLOCK + bytes(3 * BLOCK)
    assert change(request) > before
    for op in (Op.ALLOCATE, Op.DEALLOCATE):
        assert request.fails(op, stateid() + u64(0) + u64(0)) == "INVAL"
        assert request.fails(op, stateid() + u64(1 << 62) + u64(1 << 62)) == "FBIG"
    assert request.fails(Op.ALLOCATE, stateid() + u64(0) + u64(1 << 62)) == "NOSPC"


# --- copies -----------------------------------------------------------------------------------------


def clone_arguments(offset: int = 0, target: int = 0, count: int = 0) -> bytes:
    """Arguments of a CLONE."""
    return stateid() + stateid() + u64(offset) + u64(target) + u64(count)


def copy_arguments(count: int = 0, *, offset: int = 0, target: int = 0, synchronous: bool = True) -> bytes:
    """Arguments of a COPY within the server."""
    return clone_arguments(offset, target, count) + u32(1) + u32(synchronous) + u32(0)


def copied(result: Reader) -> tuple[Stateid | None, int, int, bool]:
    """A COPY4resok: the stateid of one that goes on, how many bytes, how stable, and whether it is done."""
    goes_on = Stateid(result.u32(), result.fixed(12)) if result.u32() else None
    count, stable = result.u64(), result.u32()
    result.fixed(8)
    assert result.boolean()
    return goes_on, count, stable, result.boolean()


def pair(world: World, source: bytes, *, secret: bool = False) -> Request:
    """A request whose saved node has these bytes and whose current one is empty."""
    request = make(world.request(), b"source")
    request.ok(Op.WRITE, write(0, source))
    request.ok(Op.SAVEFH)
    return make(request, b"target")


def test_a_clone_shares_what_is_stored(store: Store, world: World) -> None:
    """CLONE makes one event of a file of whatever length: the same bytes, and nothing stored anew."""
    source = random.Random(1).randbytes(300_000)
    request = pair(world, source)
    request.ok(Op.CLONE, clone_arguments())
    assert content(request)[0] == source
    assert [each.kind for each in store.log()][-1] == "RangeCopied"
    request.ok(Op.CLONE, clone_arguments(1000, 400_000, 5000))
    assert content(request)[0] == source + bytes(100_000) + source[1000:6000]


@pytest.mark.parametrize(
    "op, more", [(Op.CLONE, b""), (Op.COPY, u32(1) + u32(1) + u32(0))], ids=["clone", "copy"]
)
def test_copies_and_clones_stay_inside(world: World, op: Op, more: bytes) -> None:
    """What reaches beyond the end of the source, or overlaps itself, is refused."""
    request = pair(world, b"0123456789")
    for offset, count in ((0, 11), (11, 0), (5, 6), (1 << 63, 1)):
        assert request.fails(op, clone_arguments(offset, 0, count) + more) == "INVAL"
    assert request.fails(op, clone_arguments(0, (1 << 63) - 5, 10) + more) == "FBIG"
    assert request.fails(op, clone_arguments(10, 0, 0) + more) == "OK"
    itself = world.request().walk(b"source")
    itself.ok(Op.SAVEFH)
    assert itself.fails(op, clone_arguments(0, 5, 6) + more) == "INVAL"
    assert itself.fails(op, clone_arguments(0, 10, 10) + more) == "OK"


def test_copies_between_servers_are_not_offered(world: World) -> None:
    """A COPY that names a source server is refused."""
    request = pair(world, b"x")
    assert request.fails(Op.COPY, clone_arguments() + u32(1) + u32(1) + u32(1)) == "NOTSUPP"


def test_a_copy_moves_nothing_where_it_can_share(store: Store, world: World) -> None:
    """COPY is done at once and stable; a count of nothing means all of it."""
    request = pair(world, b"x" * 100_000)
    assert copied(request.ok(Op.COPY, copy_arguments(synchronous=False))) == (
        None,
        100_000,
        data.FILE_SYNC,
        True,
    )
    assert content(request)[0] == b"x" * 100_000
    assert copied(request.ok(Op.COPY, copy_arguments(10, offset=5, target=100_000)))[1] == 10
    assert [each.kind for each in store.log()][-1] == "RangeCopied"


SECRET = Policy.from_document({"encryption": "aes-256-gcm"})


def test_files_of_two_keys_are_copied_byte_by_byte(
    store: Store, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing can be shared CLONE says so; COPY moves a part at once, or all of it after the answer."""
    monkeypatch.setattr(data, "COPY_BYTES", 1000)
    monkeypatch.setattr(data, "COPY_BYTES_NOW", 5000)
    source = random.Random(1).randbytes(12_345)
    request = pair(world, source)
    store.set_policy(request.ctx.node().id, SECRET)
    assert request.fails(Op.CLONE, clone_arguments()) == "NOTSUPP"
    assert copied(request.ok(Op.COPY, copy_arguments())) == (None, 5000, data.FILE_SYNC, True)
    assert content(request)[0] == source[:5000]
    goes_on, count, stable, done = copied(request.ok(Op.COPY, copy_arguments(synchronous=False)))
    assert goes_on is not None
    assert (count, stable, done) == (0, data.UNSTABLE, False)
    result = request.ok(Op.OFFLOAD_STATUS, stateid(goes_on))
    assert (result.u64(), result.u32()) == (0, 0)
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(world.service.callbacks, "offload_done", lambda *_, **how: told.append(how))
    world.run_spawned()
    assert content(request)[0] == source
    assert told == [{"status": 0, "count": len(source), "stable": data.FILE_SYNC}]
    result = request.ok(Op.OFFLOAD_STATUS, stateid(goes_on))
    assert (result.u64(), result.u32(), result.u32()) == (len(source), 1, 0)
    request.ok(Op.OFFLOAD_CANCEL, stateid(goes_on))
    for op in (Op.OFFLOAD_STATUS, Op.OFFLOAD_CANCEL):
        assert request.fails(op, stateid(goes_on)) == "BAD_STATEID"


def test_a_copy_is_cancelled(store: Store, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that was cancelled, or whose client has gone, stops, and nobody is told of its end."""
    monkeypatch.setattr(data, "COPY_BYTES", 10)
    told: list[object] = []
    monkeypatch.setattr(world.service.callbacks, "offload_done", lambda *_, **how: told.append(how))
    request = pair(world, b"x" * 100)
    store.set_policy(request.ctx.node().id, SECRET)
    goes_on = copied(request.ok(Op.COPY, copy_arguments(synchronous=False)))[0]
    assert goes_on is not None
    request.ok(Op.OFFLOAD_CANCEL, stateid(goes_on))
    world.run_spawned()
    request.ok(Op.COPY, copy_arguments(synchronous=False))
    world.service.remove(world.client)
    world.run_spawned()
    assert (content(request)[0], told) == (b"", [])
    assert not store.pinned


def test_copies_under_way_are_bounded(store: Store, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """When as many go on as may, the next one is done before it is answered."""
    monkeypatch.setattr(data, "COPIES_MAX", 2)
    request = pair(world, b"x" * 100)
    store.set_policy(request.ctx.node().id, SECRET)
    found = [copied(request.ok(Op.COPY, copy_arguments(synchronous=False))) for _ in range(3)]
    assert [each[0] is None for each in found] == [False, False, True]
    assert found[2][1] == 100
    world.run_spawned()
    assert copied(request.ok(Op.COPY, copy_arguments(synchronous=False)))[0] is not None
    world.run_spawned()


def test_what_is_optional_and_not_there(world: World) -> None:
    """COPY_NOTIFY and WRITE_SAME are not supported, and say so; IO_ADVISE promises nothing."""
    request = make(world.request(), b"f")
    for op in (Op.COPY_NOTIFY, Op.WRITE_SAME):
        assert request.fails(op) == "NOTSUPP"
    assert request.ok(Op.IO_ADVISE, stateid() + u64(0) + u64(0) + bitmap(Attr.TYPE)).bitmap() == 0
