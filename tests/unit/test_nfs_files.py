from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from space._errors import ConflictError
from space._node.local_vfs import LocalFileSystem
from space._node.store import Store
from space.events import commands as cmd
from space.events.ids import ROOT as TOP
from space.projections.nfs import acl, attributes, files
from space.projections.nfs.attributes import READABLE, SET_ONLY, SUPPORTED, Settable
from space.projections.nfs.exports import Node, Squash
from space.projections.nfs.nfs4 import Attr, NfsStatus, Op
from space.projections.nfs.xdr import Reader
from space.projections.vfs import AttributeChange, Attributes, Caller
from tests.nfs_files_support import (
    OTHER,
    ROOT,
    USER,
    Request,
    World,
    attributes_of,
    bitmap,
    fattr,
    make_directory,
    open_store,
    page,
    served,
    stateid,
    string,
    u32,
    u64,
)

CALLER = Caller(0, 0, "test")
LISTING = bytes(8) + u32(0)  # verifier and dircount


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A new store."""
    with open_store(tmp_path / "data") as opened:
        yield opened


@pytest.fixture
def world(store: Store) -> World:
    """It, served without squash."""
    return served(store)


def make(request: Request, name: bytes, **settings: Any) -> Attributes:
    """A new file in the current directory."""
    made = files.create_file(
        request.ctx, request.ctx.node(), name, Settable(change=AttributeChange(**settings))
    )
    return asyncio.run(made)


def change_info(result: Reader) -> tuple[bool, int, int]:
    """A change_info4."""
    return result.boolean(), result.u64(), result.u64()


def changes(request: Request) -> int:
    """The change attribute of where the request stands."""
    return attributes_of(request.ok(Op.GETATTR, bitmap(Attr.CHANGE)))[1].u64()


# --- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, status",
    [
        (b"", "INVAL"),
        (b"\xff", "INVAL"),
        (b".", "BADNAME"),
        (b"..", "BADNAME"),
        (b"a/b", "BADCHAR"),
        (b"a\0", "BADCHAR"),
        (b"n" * 256, "NAMETOOLONG"),
        (b"n" * 5000, "BADXDR"),
    ],
)
def test_names_there_cannot_be(world: World, name: bytes, status: str) -> None:
    """Every operation that takes a name refuses one that cannot be, each for its reason."""
    root = world.request()
    root.ok(Op.SAVEFH)
    good, attrs_ = string(b"x"), fattr({})
    for op, args in (
        (Op.LOOKUP, string(name)),
        (Op.REMOVE, string(name)),
        (Op.CREATE, u32(2) + string(name) + attrs_),
        (Op.RENAME, string(name) + good),
        (Op.RENAME, good + string(name)),
        (Op.LINK, string(name)),
        (Op.SECINFO, string(name)),
    ):
        assert root.fails(op, args) == status, op.name


def test_names_are_made_moved_linked_and_removed(world: World) -> None:
    """CREATE, LINK, RENAME and REMOVE do what they say, tell each directory's change, and wait for the disk."""
    request = world.request(ROOT)
    before = changes(request)
    result = request.ok(Op.CREATE, make_directory(b"d", 0o750))
    atomic, was, now = change_info(result)
    assert (atomic, was) == (True, before)
    assert result.bitmap() == 1 << Attr.MODE
    assert world.exports.root.export.files in request.ctx.unsynced
    directory = request.ctx.node()
    assert changes(request.root()) == now > before
    file = Node(world.exports.root.export, make(request, b"f").id)
    request.at(file).ok(Op.SAVEFH)
    assert change_info(request.at(directory).ok(Op.LINK, string(b"g")))[0]
    request.root().ok(Op.SAVEFH)
    source_at, target_at = changes(request), changes(request.at(directory))
    result = request.ok(Op.RENAME, string(b"f") + string(b"g"))
    assert change_info(result)[:2] == (True, source_at)  # two names of one file: nothing happens
    assert change_info(result)[1:] == (target_at, target_at)
    request.ok(Op.RENAME, string(b"f") + string(b"h"))
    assert request.fails(Op.LOOKUP, string(b"f")) == "NOENT"
    assert request.root().fails(Op.REMOVE, string(b"d")) == "NOTEMPTY"
    for name in (b"g", b"h"):
        request.at(directory).ok(Op.REMOVE, string(name))
    request.root().ok(Op.REMOVE, string(b"d"))
    assert request.fails(Op.REMOVE, string(b"d")) == "NOENT"


def test_changes_of_others_are_told(store: Store, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody else changes the store at the same time, a directory's change is not told as atomic."""
    request = world.request()
    files_ = world.exports.root.export.files
    for name in ("create", "remove", "link", "rename"):
        method = getattr(files_, name)

        async def after_another(*args: Any, _method: Any = method, _name: str = name, **options: Any) -> Any:
            store.execute(cmd.SetAttributes(TOP, mode=0o755))
            return await _method(*args, **options)

        monkeypatch.setattr(files_, name, after_another)
    assert change_info(request.ok(Op.CREATE, make_directory(b"d")))[0] is False
    request.root().ok(Op.SAVEFH)
    assert change_info(request.ok(Op.RENAME, string(b"d") + string(b"e")))[0] is False
    assert change_info(request.ok(Op.REMOVE, string(b"e")))[0] is False
    request.root().ok(Op.CREATE, u32(7) + string(b"pipe") + fattr({}))
    request.ok(Op.SAVEFH)
    assert change_info(request.root().ok(Op.LINK, string(b"other")))[0] is False


def test_special_files(world: World) -> None:
    """Symbolic links, devices, pipes and sockets are made and seen as what they are; files are not made by CREATE."""
    request = world.request()
    kinds = {
        5: (b"link", u32(5) + string(b"/to/there")),
        3: (b"block", u32(3) + u32(8) + u32(300)),
        4: (b"character", u32(4) + u32(1) + u32(3)),
        6: (b"socket", u32(6)),
        7: (b"pipe", u32(7)),
    }
    for number, (name, kind) in kinds.items():
        request.root().ok(Op.CREATE, kind + string(name) + fattr({Attr.MODE: u32(0o640)}))
        _, values = attributes_of(request.ok(Op.GETATTR, bitmap(Attr.TYPE, Attr.MODE, Attr.RAWDEV)))
        mode = 0o777 if number == 5 else 0o640
        device = {3: (8, 300), 4: (1, 3)}.get(number, (0, 0))
        assert (values.u32(), values.u32(), (values.u32(), values.u32())) == (number, mode, device)
        assert request.fails(Op.READLINK) == ("OK" if number == 5 else "WRONG_TYPE")
        assert request.fails(Op.LOOKUP, string(b"x")) == ("SYMLINK" if number == 5 else "NOTDIR")
    assert request.root().walk(b"link").ok(Op.READLINK).opaque(99) == b"/to/there"
    for kind, status in ((u32(1), "BADTYPE"), (u32(9), "BADTYPE"), (u32(5) + string(b""), "INVAL")):
        assert request.root().fails(Op.CREATE, kind + string(b"x") + fattr({})) == status
    assert (
        request.root().fails(Op.CREATE, u32(3) + u32(1 << 20) + u32(0) + string(b"x") + fattr({})) == "INVAL"
    )


def test_renames_that_cannot_be(world: World) -> None:
    """Moving onto something of another kind, onto a full directory or into itself is refused."""
    request = world.request()
    make(request, b"file")
    request.ok(Op.CREATE, make_directory(b"empty"))
    request.root().ok(Op.CREATE, make_directory(b"full"))
    full = request.ctx.node()
    make(request, b"inside")
    request.root().ok(Op.SAVEFH)
    for old, new, status in (
        (b"file", b"empty", "EXIST"),
        (b"empty", b"file", "EXIST"),
        (b"empty", b"full", "NOTEMPTY"),
        (b"nothing", b"x", "NOENT"),
    ):
        assert request.fails(Op.RENAME, string(old) + string(new)) == status
    assert request.at(full).fails(Op.RENAME, string(b"full") + string(b"x")) == "INVAL"
    request.ctx.saved = None
    assert request.fails(Op.RENAME, string(b"a") + string(b"b")) == "NOFILEHANDLE"
    assert request.fails(Op.RESTOREFH) == "NOFILEHANDLE"


def test_filehandles_are_saved_and_used_up(world: World) -> None:
    """SAVEFH and RESTOREFH carry the stateid along; SECINFO answers and leaves no filehandle."""
    request = world.request()
    request.ctx.stateid = marker = files.read_stateid(Reader(stateid()))
    request.ok(Op.SAVEFH)
    make(request, b"f")
    kept = [request.walk(b"f").ctx.stateid]
    request.ok(Op.RESTOREFH)
    assert [*kept, request.ctx.stateid, request.ctx.current] == [None, marker, world.exports.root]
    result = request.ok(Op.SECINFO, string(b"f"))
    assert [result.u32() for _ in range(3)] == [2, 1, 0]
    for op in (Op.GETFH, Op.SAVEFH, Op.GETATTR, Op.READLINK, Op.LOOKUPP):
        assert request.fails(op, bitmap()) == "NOFILEHANDLE"
    assert request.root().fails(Op.SECINFO_NO_NAME, u32(1)) == "NOENT"
    assert request.root().fails(Op.SECINFO_NO_NAME, u32(0)) == "OK"
    assert request.root().fails(Op.SECINFO_NO_NAME, u32(2)) == "BADXDR"
    assert request.root().fails(Op.OPENATTR, u32(1)) == "NOTSUPP"


def test_an_exclusive_create_is_done_once(world: World) -> None:
    """The same verifier finds the file it made, another one (or another client's) finds that the name is taken."""
    request = world.request()
    root = request.ctx.node()

    def create(verifier: bytes, name: bytes = b"f") -> Attributes:
        return asyncio.run(files.create_file(request.ctx, root, name, Settable(), verifier))

    made = create(b"verifier")
    asyncio.run(root.export.files.set_attributes(made.id, AttributeChange(mode=0o600, mtime=5), CALLER))
    assert create(b"verifier").id == made.id
    with pytest.raises(ConflictError):
        create(b"other...")
    with pytest.raises(ConflictError):
        make(request, b"f")
    assert create(b"verifier", b"g").id != made.id
    second = world.service.introduce(b"second", bytes(8), (1, 0), 0.0)
    request.ctx.client = second
    with pytest.raises(ConflictError):
        create(b"verifier")


def test_a_file_is_made_with_all_its_attributes_at_once(store: Store, world: World) -> None:
    """Owner, times and size given at creation come in the batch that makes the file."""
    request = world.request()
    before = store.position
    made = make(request, b"f", mode=0o4711, uid=7, gid=8, size=100, atime=1, mtime=2)
    assert store.position == before + 1
    assert (made.mode, made.uid, made.gid, made.size, made.atime, made.mtime) == (0o4711, 7, 8, 100, 1, 2)


# --- permissions ------------------------------------------------------------------------------------


def test_squash_decides_who_somebody_is(store: Store) -> None:
    """Squash turns the superuser, or everybody, into nobody: as owner of what is made, and in the log."""
    for squash, who, owner in (
        (Squash.NONE, ROOT, 0),
        (Squash.ROOT, ROOT, 65_534),
        (Squash.ROOT, USER, 1000),
        (Squash.ALL, USER, 65_534),
    ):
        store.execute(cmd.SetAttributes(TOP, mode=0o777))
        request = served(store, squash=squash).request(who)
        name = b"%s-%d" % (squash.value.encode(), who.uid)
        assert make(request, name).uid == owner
        assert [event.actor for event in store.log()][-1] == f"nfs:host:uid={owner}"


def test_directories_are_changed_by_those_who_may(world: World) -> None:
    """Without write or search permission names are neither made nor removed nor looked up."""
    make(world.request(), b"f")
    world.request().ok(Op.CREATE, make_directory(b"shut", 0o700))
    request = world.request(USER)
    request.ok(Op.SAVEFH)
    for op, args in (
        (Op.CREATE, make_directory(b"x")),
        (Op.REMOVE, string(b"f")),
        (Op.RENAME, string(b"f") + string(b"g")),
    ):
        assert request.fails(op, args) == "ACCESS"
    request.walk(b"shut")
    for op, args in (
        (Op.LOOKUP, string(b"x")),
        (Op.LOOKUPP, b""),
        (Op.READDIR, u64(0) + LISTING + u32(999) + bitmap()),
    ):
        assert request.fails(op, args) == "ACCESS"


def test_sticky_directories(world: World) -> None:
    """In a sticky directory a name is taken away or replaced only by who owns file or directory."""
    request = world.request()
    request.ok(Op.CREATE, make_directory(b"tmp", 0o1777))
    tmp = request.ctx.node()
    make(world.request(USER).at(tmp), b"mine")
    make(world.request(OTHER).at(tmp), b"theirs")
    other = world.request(OTHER).at(tmp)
    other.ok(Op.SAVEFH)
    assert other.fails(Op.REMOVE, string(b"mine")) == "PERM"
    assert other.fails(Op.RENAME, string(b"theirs") + string(b"mine")) == "PERM"
    assert other.fails(Op.RENAME, string(b"theirs") + string(b"new")) == "OK"
    assert world.request(USER).at(tmp).fails(Op.REMOVE, string(b"mine")) == "OK"


@pytest.mark.parametrize("who, bits", [(USER, 0o700), (OTHER, 0o070), (ROOT, 0o777)])
def test_access_says_what_the_mode_lets(world: World, who: Any, bits: int) -> None:
    """ACCESS tells of each right asked for whether the caller has it; on what cannot be changed, none to change."""
    file = make(world.request(), b"f", mode=bits & 0o650, uid=1000, gid=200)
    request = world.request(who).at(Node(world.exports.root.export, file.id))
    result = request.ok(Op.ACCESS, u32(0x1FF))
    supported, allowed = result.u32(), result.u32()
    assert supported == 0x1ED
    read, write, execute = 0x141, 0x8C, 0x20
    expected = {
        USER.uid: read | write,
        OTHER.uid: read | execute,
        ROOT.uid: read | write | execute,
    }[who.uid]
    assert allowed == expected
    old = world.request(who, minor=1).at(request.ctx.node()).ok(Op.ACCESS, u32(0x1FF))
    assert (old.u32(), old.u32()) == (supported & 0x3F, expected & 0x3F)


def set_attributes(request: Request, values: dict[Attr, bytes]) -> str:
    """Name of the status of a SETATTR, which says what it set."""
    status, result = request(Op.SETATTR, stateid() + fattr(values))
    assert status or result.bitmap() == sum(1 << each for each in values)
    return NfsStatus(status).name


NUMBER = {uid: string(b"%d" % uid) for uid in (0, 100, 102, 1000, 2000)}
SERVER_TIME = u32(0)


def client_time(seconds: int, nanoseconds: int = 0) -> bytes:
    """A settime4."""
    return u32(1) + struct.pack(">qI", seconds, nanoseconds)


def test_who_may_set_what(world: World) -> None:
    """Modes, owners and times are set as POSIX has it: by owners, within their groups, or by the superuser."""
    file = Node(world.exports.root.export, make(world.request(), b"f", uid=1000, gid=100, mode=0o664).id)
    owner, other, root = (world.request(who).at(file) for who in (USER, OTHER, ROOT))
    for request, values, status in (
        (owner, {Attr.MODE: u32(0o640)}, "OK"),
        (other, {Attr.MODE: u32(0o666)}, "PERM"),
        (owner, {Attr.OWNER: NUMBER[2000]}, "PERM"),
        (owner, {Attr.OWNER: NUMBER[1000]}, "OK"),
        (owner, {Attr.OWNER_GROUP: NUMBER[102]}, "OK"),
        (owner, {Attr.OWNER_GROUP: NUMBER[2000]}, "PERM"),
        (owner, {Attr.TIME_MODIFY_SET: client_time(5)}, "OK"),
        (other, {Attr.TIME_MODIFY_SET: client_time(5)}, "PERM"),
        (other, {Attr.TIME_MODIFY_SET: SERVER_TIME}, "ACCESS"),
        (other, {Attr.SIZE: u64(0)}, "ACCESS"),
        (owner, {Attr.MODE: u32(0o444)}, "OK"),
        (owner, {Attr.SIZE: u64(9)}, "OK"),  # as it may that had opened it before
        (root, {Attr.OWNER: NUMBER[0], Attr.OWNER_GROUP: NUMBER[0]}, "OK"),
        (root, {Attr.MODE: u32(0o666)}, "OK"),
        (other, {Attr.TIME_MODIFY_SET: SERVER_TIME}, "OK"),
        (other, {Attr.TIME_MODIFY_SET: SERVER_TIME, Attr.TIME_ACCESS_SET: client_time(1)}, "PERM"),
    ):
        assert set_attributes(request, values) == status, values


def test_set_group_id_needs_the_group(world: World) -> None:
    """Who is not of a file's group cannot set its set-group-id bit: it is left out, as POSIX has it."""
    file = Node(world.exports.root.export, make(world.request(), b"f", uid=1000, gid=200).id)
    request = world.request(USER).at(file)
    assert set_attributes(request, {Attr.MODE: u32(0o2755)}) == "OK"
    assert attributes_of(request.ok(Op.GETATTR, bitmap(Attr.MODE)))[1].u32() == 0o755


# --- attributes -------------------------------------------------------------------------------------


MOVING = {Attr.FILES_AVAIL, Attr.FILES_FREE, Attr.SPACE_AVAIL, Attr.SPACE_FREE}
"""Others on the machine change these between two looks."""


@pytest.mark.parametrize("minor", [1, 2])
def test_every_attribute_can_be_had(world: World, minor: int) -> None:
    """What supported_attrs names and can be read is answered, all of it and each by itself, and VERIFY agrees."""
    request = world.request(minor=minor)
    make(request, b"f")
    request.walk(b"f")
    supported = attributes_of(request.ok(Op.GETATTR, bitmap(Attr.SUPPORTED_ATTRS)))[1].bitmap()
    assert supported == SUPPORTED[minor]
    everything = [each for each in Attr if (supported & READABLE) >> each & 1 and each not in MOVING]
    told, values = attributes_of(request.ok(Op.GETATTR, bitmap(*everything)))
    assert told == sum(1 << each for each in everything)
    alone = b""
    for each in everything:
        found, value = attributes_of(request.ok(Op.GETATTR, bitmap(each)))
        assert found == 1 << each
        alone += (one := value.fixed(value.left))
        if each != Attr.RDATTR_ERROR:
            assert request.fails(Op.VERIFY, fattr({each: one})) == "OK"
            assert request.fails(Op.NVERIFY, fattr({each: one})) == "SAME"
            assert request.fails(Op.VERIFY, fattr({each: one + u32(1)})) == "NOT_SAME"
    assert alone == values.fixed(values.left)
    assert bool(supported >> Attr.XATTR_SUPPORT & 1) == (minor == 2)


def test_attributes_there_are_not(world: World) -> None:
    """Reading what is only set, setting what is only read, and attributes there are not, have an error each."""
    request = world.request()
    unsupported = next(each for each in Attr if not (READABLE | SET_ONLY) >> each & 1)
    for op, args, status in (
        (Op.GETATTR, bitmap(Attr.TIME_MODIFY_SET), "INVAL"),
        (Op.VERIFY, fattr({Attr.TIME_MODIFY_SET: u32(0)}), "INVAL"),
        (Op.VERIFY, fattr({Attr.RDATTR_ERROR: u32(0)}), "INVAL"),
        (Op.VERIFY, fattr({unsupported: u32(0)}), "ATTRNOTSUPP"),
        (Op.NVERIFY, fattr({unsupported: u32(0)}), "ATTRNOTSUPP"),
    ):
        assert request.fails(op, args) == status
    assert attributes_of(request.ok(Op.GETATTR, bitmap(unsupported, Attr.TYPE)))[0] == 1 << Attr.TYPE
    for values, status in (
        ({unsupported: u32(0)}, "ATTRNOTSUPP"),
        ({Attr.FILEID: u64(0)}, "INVAL"),
        ({Attr.MODE_UMASK: u32(0) + u32(0)}, "INVAL"),
        ({Attr.MODE: u32(0o10000)}, "INVAL"),
        ({Attr.MODE: u32(0) + u32(0)}, "BADXDR"),
        ({Attr.MODE: b""}, "BADXDR"),
        ({Attr.OWNER: string(b"somebody@example.com")}, "BADOWNER"),
        ({Attr.OWNER: string(b"99999999999")}, "BADOWNER"),
        ({Attr.OWNER: string(b"\xff")}, "INVAL"),
        ({Attr.SIZE: u64(0)}, "ISDIR"),
        ({Attr.SIZE: u64(1 << 63)}, "FBIG"),
        ({Attr.TIME_MODIFY_SET: u32(2)}, "BADXDR"),
        ({Attr.TIME_MODIFY_SET: client_time(0, 10**9)}, "INVAL"),
        ({Attr.TIME_MODIFY_SET: client_time(1 << 62)}, "INVAL"),
        ({Attr.MODE: u32(0), Attr.MODE_SET_MASKED: u32(0) + u32(0)}, "INVAL"),
        ({Attr.ACL: acl.encode([acl.Ace(0, 0, 1, b"1000")])}, "ATTRNOTSUPP"),
    ):
        assert set_attributes(request, values) == status, values


def test_settings_are_seen(world: World) -> None:
    """What was set is what is told, for every way to set a mode and a time."""
    request = world.request()
    make(request, b"f")
    request.walk(b"f")

    def told(*wanted: Attr) -> bytes:
        return attributes_of(request.ok(Op.GETATTR, bitmap(*wanted)))[1].fixed(len(wanted) * 12)

    modify = {Attr.TIME_MODIFY_SET: client_time(-5, 7), Attr.TIME_ACCESS_SET: client_time(1 << 32)}
    assert set_attributes(request, modify) == "OK"
    assert told(Attr.TIME_ACCESS, Attr.TIME_MODIFY) == struct.pack(">qIqI", 1 << 32, 0, -5, 7)
    for values, mode in (
        ({Attr.MODE: u32(0o7640)}, 0o7640),
        ({Attr.MODE_SET_MASKED: u32(0o004) + u32(0o007)}, 0o7644),
        ({Attr.ACL: acl.encode(acl.of_mode(0o512, directory=False))}, 0o7512),
        ({Attr.MODE: u32(0o600), Attr.ACL: acl.encode(acl.of_mode(0o777, directory=False))}, 0o600),
    ):
        assert set_attributes(request, values) == "OK"
        _, found = attributes_of(request.ok(Op.GETATTR, bitmap(Attr.MODE)))
        assert found.u32() == mode
    before = struct.unpack(">qI", told(Attr.TIME_MODIFY))
    assert set_attributes(request, {Attr.TIME_MODIFY_SET: SERVER_TIME}) == "OK"
    assert struct.unpack(">qI", told(Attr.TIME_MODIFY)) > before


def test_a_umask_comes_with_the_mode(world: World) -> None:
    """At creation the mode is what the umask leaves of it."""
    request = world.request()
    request.ok(Op.CREATE, u32(2) + string(b"d") + fattr({Attr.MODE_UMASK: u32(0o777) + u32(0o027)}))
    assert attributes_of(request.ok(Op.GETATTR, bitmap(Attr.MODE)))[1].u32() == 0o750


@pytest.mark.parametrize("numbers", [(0, 0), (8, 1), (0xFFF, 0xFFFFF), (259, 65_536)])
def test_device_numbers(numbers: tuple[int, int]) -> None:
    """Major and minor numbers go into 32 bits as Linux packs them, and come back."""
    assert attributes.device_numbers(attributes.device(*numbers)) == numbers


# --- listing ----------------------------------------------------------------------------------------


def listed(request: Request, limit: int = 400, *wanted: Attr) -> list[bytes]:
    """All names of a directory, page by page."""
    cookie, names = 0, []
    while True:
        found, complete = page(request.ok(Op.READDIR, u64(cookie) + LISTING + u32(limit) + bitmap(*wanted)))
        names += [name for _, name in found]
        if complete:
            return names
        cookie = found[-1][0]


def test_listings_are_complete_and_within_their_limit(world: World) -> None:
    """However small the pages, every name comes once, and no page is longer than was asked for."""
    request = world.request()
    names = {b"n" * (number % 40 + 1) + b"%d" % number for number in range(200)}
    for name in names:
        make(request, name)
    for limit in (100, 399, 4096, 1 << 20):
        found = listed(request, limit)
        assert len(found) == len(names)
        assert set(found) == names
        _, result = request(Op.READDIR, u64(0) + LISTING + u32(limit) + bitmap())
        assert result.left <= limit
    assert set(listed(request, 2000, *(each for each in Attr if READABLE >> each & 1))) == names
    for limit in (0, 15, 40):
        assert request.fails(Op.READDIR, u64(0) + LISTING + u32(limit) + bitmap()) == "TOOSMALL"
    for cookie, verifier, status in ((1, 0, "BAD_COOKIE"), (2, 0, "BAD_COOKIE"), (1 << 63, 0, "BAD_COOKIE")):
        args = u64(cookie) + u64(verifier) + u32(0) + u32(999) + bitmap()
        assert request.fails(Op.READDIR, args) == status
    assert request.fails(Op.READDIR, u64(9) + u64(1) + u32(0) + u32(999) + bitmap()) == "NOT_SAME"
    assert request.fails(Op.READDIR, u64(0) + LISTING + u32(999) + bitmap(Attr.MODE_UMASK)) == "INVAL"


def test_an_empty_directory_ends_at_once(world: World) -> None:
    """A directory without names is a page that is the end."""
    assert listed(world.request(), 40) == []


def test_a_listing_fits_the_reply(world: World) -> None:
    """Whatever the client asks for, a page leaves no less room than the session has."""
    request = world.request()
    for number in range(50):
        make(request, b"%d" % number)
    request.ctx.reply_bytes_max = 600
    _, result = request(Op.READDIR, u64(0) + LISTING + u32(1 << 20) + bitmap())
    assert 300 < result.left <= 600


# --- extended attributes ----------------------------------------------------------------------------


def test_extended_attributes(store: Store, world: World) -> None:
    """They are set, created, replaced, listed and removed, as ``user.`` attributes of the tree and no others."""
    request = world.request()
    node = make(request, b"f").id
    request.walk(b"f")
    name, value = string(b"colour"), string(b"red")
    assert request.fails(Op.GETXATTR, name) == "NOXATTR"
    assert request.fails(Op.SETXATTR, u32(2) + name + value) == "NOXATTR"
    before = changes(request)
    assert change_info(request.ok(Op.SETXATTR, u32(1) + name + value)) == (True, before, changes(request))
    assert request.fails(Op.SETXATTR, u32(1) + name + value) == "EXIST"
    request.ok(Op.SETXATTR, u32(0) + name + string(b"blue"))
    assert request.ok(Op.GETXATTR, name).opaque(99) == b"blue"
    assert store.xattrs(node) == {b"user.colour": b"blue"}
    asyncio.run(LocalFileSystem(store).set_xattr(node, b"trusted.hidden", b"", CALLER))
    result = request.ok(Op.LISTXATTRS, u64(0) + u32(99))
    result.u64()
    assert (result.u32(), result.opaque(99), result.boolean()) == (1, b"colour", True)
    request.ok(Op.REMOVEXATTR, name)
    assert request.fails(Op.REMOVEXATTR, name) == "NOXATTR"
    for args, status in (
        (u32(0) + string(b"") + value, "INVAL"),
        (u32(0) + string(b"n" * 251) + value, "NAMETOOLONG"),
        (u32(0) + name + string(b"v" * 65_537), "XATTR2BIG"),
        (u32(3) + name + value, "INVAL"),
    ):
        assert request.fails(Op.SETXATTR, args) == status
    assert world.request(OTHER).at(request.ctx.node()).fails(Op.SETXATTR, u32(0) + name + value) == "ACCESS"


def test_lists_of_extended_attributes_go_on(world: World) -> None:
    """In pages of whatever size every name comes once, also when others come and go in between."""
    request = world.request()
    make(request, b"f")
    request.walk(b"f")
    names = {b"name%d" % number for number in range(20)}
    for name in names:
        request.ok(Op.SETXATTR, u32(0) + string(name) + string(b""))
    found: list[bytes] = []
    cookie, complete = 0, False
    while not complete:
        result = request.ok(Op.LISTXATTRS, u64(cookie) + u32(60))
        cookie = result.u64()
        found += [result.opaque(255) for _ in range(result.u32())]
        complete = result.boolean()
        request(Op.SETXATTR, u32(0) + string(b"other%d" % len(found)) + string(b""))
    assert sorted(each for each in found if each in names) == sorted(names)
    assert len(found) == len(set(found))
    assert request.fails(Op.LISTXATTRS, u64(0) + u32(17)) == "TOOSMALL"


def test_reading_is_all_a_read_only_export_offers(store: Store) -> None:
    """A read-only export refuses everything that changes something, to the superuser too."""
    make(served(store).request(), b"f")
    request = served(store, read_only=True).request()
    request.ok(Op.SAVEFH)
    for op, args in (
        (Op.CREATE, make_directory(b"x")),
        (Op.REMOVE, string(b"f")),
        (Op.RENAME, string(b"f") + string(b"g")),
        (Op.SETXATTR, u32(0) + string(b"n") + string(b"")),
    ):
        assert request.fails(op, args) == "ROFS"
    assert set_attributes(request, {Attr.MODE: u32(0)}) == "ROFS"
    result = request.ok(Op.ACCESS, u32(0x3F))
    assert (result.u32(), result.u32()) == (0x1F, 0x03)
