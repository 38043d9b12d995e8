"""Referrals: how they are written, and what a client is told that comes to one (RFC 8881 §11)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs
import pytest

from space._errors import NotFoundError, UsageError
from space._node.local_vfs import LocalFileSystem
from space._node.nfs_referrals import add_referrals
from space._node.store import Store
from space.events import commands as cmd
from space.events.ids import ROOT, ZONES, CapsuleId, zone_root
from space.events.types import Kind, ZoneKind
from space.projections.nfs.exports import Export, Exports, Node, Squash, export_number
from space.projections.nfs.nfs4 import Attr, NfsStatus, Op
from space.projections.nfs.referrals import Location, parse_referral
from space.projections.nfs.xdr import Reader
from tests.nfs_files_support import KEY, Request, World, attributes_of, bitmap, open_store, string, u32, u64
from tests.zone_support import shipment

pytestmark = pytest.mark.unit

HERE: Final = b"h" * 16
OSLO: Final = b"o" * 16
DIRECTORY: Final = CapsuleId(zone_root(OSLO))
AT_HOME: Final = Location(b"192.0.2.7", (b"tree",))
WHERE: Final = (Attr.FSID, Attr.FS_LOCATIONS, Attr.MOUNTED_ON_FILEID, Attr.FS_LOCATIONS_INFO)


@pytest.mark.parametrize(
    "text,name,server,path",
    [
        ("oslo=192.0.2.7", "oslo", b"192.0.2.7", ()),
        ("oslo=192.0.2.7:2049", "oslo", b"192.0.2.7", ()),
        ("oslo=192.0.2.7:2050:/a/b/", "oslo", b"192.0.2.7.8.2", (b"a", b"b")),
        ("oslo=192.0.2.7:/", "oslo", b"192.0.2.7", ()),
        ("oslo=[2001:db8::7]", "oslo", b"2001:db8::7", ()),
        ("oslo=[2001:db8::7]:20049:/ä", "oslo", b"2001:db8::7.78.81", ("ä".encode(),)),
        ("o-1=nfs.oslo.example", "o-1", b"nfs.oslo.example", ()),
        ("o-1=nfs.oslo.example:2049:/x", "o-1", b"nfs.oslo.example", (b"x",)),
    ],
)
def test_a_referral_is_read(text: str, name: str, server: bytes, path: tuple[bytes, ...]) -> None:
    """A server is said as clients take it: an address with its port behind it unless that is 2049, or a name."""
    assert parse_referral(text) == (name, Location(server, path))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "oslo",
            "oslo=",
            "=192.0.2.7",
            "oslo=:2049",
            "oslo=192.0.2.7:",
            "oslo=192.0.2.7:0",
            "oslo=[::1",
        ),
        *("oslo=192.0.2.7:70000", "oslo=192.0.2.7:x", "oslo=[::1]x", "oslo=name:2050", "oslo=ä", "oslo=a b"),
        *("oslo=192.0.2.7:/a/../b", "oslo=192.0.2.7:/" + "x" * 5000, "oslo=" + "x" * 300),
    ],
)
def test_what_is_no_referral_is_refused(text: str) -> None:
    """Neither half a location nor one that clients cannot be told is taken."""
    with pytest.raises(UsageError):
        parse_referral(text)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store that knows another zone, which has shipped a file."""
    with open_store(tmp_path / "data") as opened:
        opened.mkdir("/mine")
        opened.execute(cmd.DefineZone(HERE, "here", ZoneKind.METRO, "", b"pem", bytes(32)))
        opened.execute(cmd.AddZone(OSLO, "oslo", ZoneKind.GEO, "", b"pem", bytes(32)))
        made = cmd.CreateCapsule(b"f" * 16, Kind.FILE, parent=zone_root(OSLO), name=b"file", policy=b"p")
        opened.execute(shipment(0, 1, made, zone=OSLO))
        yield opened


def served(store: Store, root: CapsuleId = ROOT, place: tuple[bytes, ...] = ()) -> World:
    """A service of one export, whose clients are referred to oslo's own server."""
    files = LocalFileSystem(store, root)
    exports = [Export(export_number(store.id, root), place, files, squash=Squash.NONE)]
    offered = Exports(exports, key=KEY)
    add_referrals(store, exports, offered, [("oslo", AT_HOME)])
    return World(offered)


def pathname(take: Reader) -> tuple[bytes, ...]:
    """A pathname4."""
    return tuple(take.opaque(255) for _ in range(take.count(16)))


@attrs.frozen
class Told:
    """What is told of a file system: each location as servers and path, by both attributes."""

    fsid: tuple[int, int]
    root: tuple[bytes, ...]
    locations: list[tuple[list[bytes], tuple[bytes, ...]]]
    mounted_on: int


def told(values: Reader) -> Told:
    """Takes the values of :data:`WHERE`."""
    fsid = values.u64(), values.u64()
    root = pathname(values)
    locations = [
        ([values.opaque(255) for _ in range(values.count(9))], pathname(values))
        for _ in range(values.count(9))
    ]
    mounted_on = values.u64()
    assert values.u32() == 0
    assert values.u32() > 0, "good for no time at all"
    assert pathname(values) == root
    items = []
    for _ in range(values.count(9)):
        servers = []
        for _ in range(values.count(9)):
            assert (values.i32(), values.opaque(12)) == (-1, bytes(12))
            servers.append(values.opaque(255))
        items.append((servers, pathname(values)))
    assert items == locations
    assert not values.left
    return Told(fsid, root, locations, mounted_on)


def where(request: Request) -> Told:
    """What GETATTR tells of the current file system."""
    found, values = attributes_of(request.ok(Op.GETATTR, bitmap(*WHERE, Attr.SIZE, Attr.TYPE)))
    if found >> Attr.SIZE & 1:
        found, values = attributes_of(request.ok(Op.GETATTR, bitmap(*WHERE)))
    assert found == sum(1 << each for each in WHERE)
    return told(values)


def test_whoever_comes_to_a_referral_is_told_where_to_go(store: Store) -> None:
    """The name can be looked up and the locations be had; everything else has moved."""
    request = served(store).request().walk(b"zones", b"oslo")
    found = where(request)
    assert found.locations == [([b"192.0.2.7"], (b"tree",))]
    assert found.root == (b"zones", b"oslo")
    assert found.mounted_on == LocalFileSystem(store).attributes(DIRECTORY).ino
    assert found.fsid != where(request.root()).fsid
    for op, args in [
        *((Op.GETFH, b""), (Op.GETATTR, bitmap(Attr.TYPE)), (Op.GETATTR, bitmap(Attr.FSID))),
        *((Op.ACCESS, u32(1)), (Op.LOOKUP, string(b"x")), (Op.LOOKUPP, b""), (Op.SAVEFH, b"")),
        (Op.READDIR, u64(0) + bytes(8) + u32(0) + u32(4096) + bitmap()),
    ]:
        assert request.root().walk(b"zones", b"oslo").fails(op, args) == "MOVED"
    request.root().walk(b"zones").ok(Op.SECINFO, string(b"oslo"))


def test_the_way_to_a_referral_begins_at_the_root_of_the_server(store: Store) -> None:
    """Clients compare the root they are told with the way they came (RFC 8881 §11.16)."""
    assert where(served(store, ZONES).request().walk(b"oslo")).root == (b"oslo",)
    request = served(store, ROOT, (b"a", b"b")).request().walk(b"a", b"b", b"zones", b"oslo")
    assert where(request).root == (b"a", b"b", b"zones", b"oslo")


def test_a_file_system_that_is_here_names_no_others(store: Store) -> None:
    """Its root is told, and an empty list."""
    found = where(served(store, ROOT, (b"a",)).request().walk(b"a", b"mine"))
    assert (found.root, found.locations) == ((b"a",), [])


def listed(request: Request, *asked: Attr) -> dict[bytes, tuple[int, Reader]]:
    """The entries of a directory: bitmap and values of the attributes."""
    result = request.ok(Op.READDIR, u64(0) + bytes(8) + u32(0) + u32(4096) + bitmap(*asked))
    result.fixed(8)
    found = {}
    while result.boolean():
        _, name = result.u64(), result.opaque(255)
        found[name] = attributes_of(result)
    return found


def test_a_listing_goes_on_past_a_referral(store: Store) -> None:
    """An entry has the error that it moved, or the locations if these were asked for (RFC 8881 §11.4)."""
    request = served(store).request().walk(b"zones")
    bits, values = listed(request, Attr.RDATTR_ERROR, Attr.TYPE, Attr.FSID)[b"oslo"]
    assert bits == 1 << Attr.RDATTR_ERROR | 1 << Attr.FSID
    assert values.fixed(16) == _fsid(request)
    assert values.u32() == NfsStatus.MOVED
    bits, values = listed(request, *WHERE, Attr.RDATTR_ERROR)[b"oslo"]
    assert bits >> Attr.FS_LOCATIONS & 1
    values.fixed(16)
    assert values.u32() == NfsStatus.OK
    args = u64(0) + bytes(8) + u32(0) + u32(4096) + bitmap(Attr.TYPE)
    assert request.fails(Op.READDIR, args) == "MOVED"


def _fsid(request: Request) -> bytes:
    there = where(request.walk(b"oslo")).fsid
    request.root().walk(b"zones")
    return there[0].to_bytes(8, "big") + there[1].to_bytes(8, "big")


def test_a_referral_ends_when_this_store_takes_the_place_of_the_zone(store: Store) -> None:
    """Then what is in the directory is served here, and clients that come again find it."""
    world = served(store)
    assert world.request().walk(b"zones", b"oslo").fails(Op.GETFH) == "MOVED"
    store.execute(cmd.PromoteZone(OSLO))
    world.request().walk(b"zones", b"oslo").ok(Op.GETFH)
    assert world.request().walk(b"zones", b"oslo").ctx.node() == Node(world.exports.root.export, DIRECTORY)


def test_a_removed_zone_is_referred_to_no_more(store: Store) -> None:
    """Its replicas stay here, and are shown."""
    world = served(store)
    store.execute(cmd.RemoveZone(OSLO))
    world.request().walk(b"zones", b"oslo").ok(Op.GETFH)


def test_only_to_known_zones_in_what_is_served(store: Store) -> None:
    """A zone that was not added, and one whose directory nobody can come to, is a mistake."""
    files = LocalFileSystem(store)
    exports = [Export(1, (), files)]
    with pytest.raises(NotFoundError, match="no zone paris"):
        add_referrals(store, exports, Exports(exports, key=KEY), [("paris", AT_HOME)])
    exports = [Export(1, (), LocalFileSystem(store, store.resolve("/mine")))]
    with pytest.raises(UsageError, match="is in nothing that is served"):
        add_referrals(store, exports, Exports(exports, key=KEY), [("oslo", AT_HOME)])
