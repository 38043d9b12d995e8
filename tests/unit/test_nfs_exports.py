from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from space._errors import Status, UsageError
from space._node.local_vfs import LocalFileSystem
from space._node.store import Store
from space.events.ids import CapsuleId
from space.projections.nfs import handles, status
from space.projections.nfs.compound import NfsError
from space.projections.nfs.exports import (
    ChangingExports,
    Export,
    Exports,
    Node,
    Rule,
    Squash,
    export_number,
    parse_rule,
)
from space.projections.nfs.nfs4 import Attr, NfsStatus, Op
from tests.nfs_files_support import (
    KEY,
    ROOT,
    USER,
    World,
    attributes_of,
    bitmap,
    make_directory,
    open_store,
    page,
    served,
    string,
    u32,
    u64,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store with a tree of two subtrees."""
    with open_store(tmp_path / "data") as opened:
        for name in ("one", "two"):
            opened.put(b"in " + name.encode(), name=opened.mkdir(f"/{name}") and f"/{name}/file")
        yield opened


def subtree(store: Store, path: str, place: tuple[bytes, ...]) -> Export:
    """An export of part of a store."""
    root = store.resolve(path)
    return Export(export_number(store.id, root), place, LocalFileSystem(store, root), squash=Squash.NONE)


def two(store: Store) -> World:
    """A server of two exports at /a and /deep/er."""
    return World(
        Exports(
            [subtree(store, "/one", (b"a",)), subtree(store, "/two", (b"deep", b"er"))],
            key=KEY,
            time_ns=5,
        )
    )


def test_every_status_has_a_number() -> None:
    """The table from neutral statuses to nfsstat4 is complete."""
    assert set(status.NFS) == set(Status)


def test_handles_come_back(store: Store) -> None:
    """A handle given out is understood by another server of the same store, after whatever restart."""
    node = Node(served(store).exports.root.export, CapsuleId(bytes(range(16))))
    again = served(store).exports
    found = handles.decode(again, handles.encode(node))
    assert (found.id, found.export.number) == (node.id, node.export.number)
    assert len(handles.encode(node)) == handles.HANDLE_BYTES


def test_no_handle_can_be_made_up(store: Store) -> None:
    """A handle with any byte changed is refused, as is one of another length or of a store with another key."""
    exports = served(store).exports
    good = handles.encode(exports.root)
    for at in range(len(good)):
        with pytest.raises(NfsError) as refused:
            handles.decode(exports, good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert refused.value.status == NfsStatus.BADHANDLE
    other = Exports([Export(exports.root.export.number, (), exports.root.export.files)], key=bytes(32))
    for bytes_, server in ((b"", exports), (good[:-1], exports), (good + b"x", exports), (good, other)):
        with pytest.raises(NfsError):
            handles.decode(server, bytes_)


def test_a_handle_of_an_export_that_is_gone_is_stale(store: Store) -> None:
    """A sound handle of an export that is not served any more is STALE, and so is one of a capsule that is gone."""
    both, one = two(store), World(Exports([subtree(store, "/two", ())], key=KEY))
    handle = both.request().walk(b"a").ok(Op.GETFH).opaque(128)
    assert one.request().fails(Op.PUTFH, string(handle)) == "STALE"
    gone = handles.encode(Node(one.exports.root.export, CapsuleId(b"no such capsule.")))
    request = one.request()
    request.ok(Op.PUTFH, string(gone))
    assert request.fails(Op.GETATTR, bitmap(Attr.TYPE)) == "STALE"


def test_the_way_into_exports_and_back(store: Store) -> None:
    """Names lead from the pseudo file system into exports and LOOKUPP leads back, up to the root and no further."""
    request = two(store).request(USER).walk(b"deep", b"er", b"file").root().walk(b"deep", b"er")
    request.ok(Op.LOOKUPP)
    request.walk(b"er")
    request.ok(Op.LOOKUPP)
    request.ok(Op.LOOKUPP)
    assert request.ctx.current == request.ctx.service.exports.root
    assert request.fails(Op.LOOKUPP) == "NOENT"
    assert request.fails(Op.LOOKUP, string(b"nothing")) == "NOENT"
    assert request.fails(Op.CREATE, make_directory(b"new")) == "ROFS"


def test_a_listing_shows_what_hangs_there(store: Store) -> None:
    """The pseudo file system lists the roots of exports: their fsid and handle, the number of what lies beneath."""
    request = two(store).request()
    asked = bitmap(Attr.FSID, Attr.FILEHANDLE, Attr.MOUNTED_ON_FILEID)
    result = request.ok(Op.READDIR, u64(0) + bytes(8) + u32(4096) + u32(4096) + asked)
    result.fixed(8)
    found = {}
    while result.boolean():
        result.u64()
        name = result.opaque(255)
        _, values = attributes_of(result)
        found[name] = (values.u64(), values.u64(), values.opaque(128), values.u64())
    assert result.boolean()
    inside = request.root().walk(b"a")
    assert found[b"a"][0] == inside.ctx.node().export.number
    assert found[b"a"][2] == inside.ok(Op.GETFH).opaque(128)
    _, values = attributes_of(inside.ok(Op.GETATTR, bitmap(Attr.FILEID, Attr.MOUNTED_ON_FILEID)))
    assert values.u64() != (mounted := values.u64())
    assert found[b"a"][3] == mounted
    assert found[b"deep"][0] == 0


def test_cookies_of_the_pseudo_file_system(store: Store) -> None:
    """A listing of it that is read one entry at a time has every name once."""
    request, cookie, names = two(store).request(), 0, []
    while True:
        found, complete = page(request.ok(Op.READDIR, u64(cookie) + bytes(8) + u32(40) + u32(50) + bitmap()))
        names += [name for _, name in found]
        if complete:
            break
        cookie = found[-1][0]
    assert sorted(names) == [b"a", b"deep"]


@pytest.mark.parametrize(
    "places", [[(b"a",), (b"a",)], [(b"a",), (b"a", b"b")], [(), (b"a",)]], ids=["same", "inside", "root"]
)
def test_exports_do_not_overlap(store: Store, places: list[tuple[bytes, ...]]) -> None:
    """Two exports at one place, or one below another, are refused, and so is one tree twice."""
    exports = [subtree(store, path, place) for path, place in zip(("/one", "/two"), places, strict=True)]
    with pytest.raises(UsageError):
        Exports(exports, key=KEY)
    with pytest.raises(UsageError, match="twice"):
        Exports([subtree(store, "/one", (b"x",)), subtree(store, "/one", (b"y",))], key=KEY)


def test_rules_say_who_may_what(store: Store) -> None:
    """The first rule that fits decides; who fits none has no way in, neither by name nor by handle."""
    rules = tuple(map(parse_rule, ("10.0.0.1", "10.0.0.0/8:ro", "[fd00::]/8:rw")))
    world = World(Exports([attrs.evolve(subtree(store, "/one", ()), rules=rules)], key=KEY))
    handle = string(handles.encode(world.exports.root))
    for host, create in (
        ("10.0.0.1", "OK"),
        ("::ffff:10.0.0.1", "OK"),
        ("10.1.0.1", "ROFS"),
        ("fd00::1%lo", "OK"),
    ):
        request = world.request(ROOT, host=host)
        request.ok(Op.PUTFH, handle)
        assert request.fails(Op.CREATE, make_directory(host.encode())) == create
    for host in ("192.168.0.1", "::1", ""):
        request = world.request(ROOT, host=host)
        assert {request.fails(Op.PUTFH, handle), request.fails(Op.PUTROOTFH)} == {"ACCESS"}


@pytest.mark.parametrize("text", ["", "host", "10.0.0.0/33", "10.0.0.1:no", ":ro"])
def test_wrong_rules_are_refused(text: str) -> None:
    """What is no network says so."""
    with pytest.raises(UsageError, match="not a network"):
        parse_rule(text)


def test_a_rule_without_a_mode_lets_write() -> None:
    """The default is to read and write; bits below the mask do not matter."""
    assert parse_rule("10.1.2.3/8") == Rule(parse_rule("10.0.0.0/8").network, read_only=False)


def test_one_capsule_as_a_tree(store: Store) -> None:
    """A file that is exported is a directory with the one name ``content``."""
    root = store.resolve("/one/file")
    world = World(Exports([Export(3, (), LocalFileSystem(store, root), squash=Squash.NONE)], key=KEY))
    request = world.request()
    found, complete = page(request.ok(Op.READDIR, u64(0) + bytes(8) + u32(999) + u32(999) + bitmap()))
    assert ([name for _, name in found], complete) == ([b"content"], True)
    handle = request.walk(b"content").ok(Op.GETFH).opaque(128)
    assert handles.decode(world.exports, handle).id == root
    assert request.fails(Op.LOOKUPP) == "NOTDIR"


def test_exports_come_and_go(store: Store) -> None:
    """A name leads to an export while that is offered; then its handles are stale, until it is offered again."""
    exports = ChangingExports(key=KEY, time_ns=5)
    world = World(exports)
    one, two = subtree(store, "/one", (b"a",)), subtree(store, "/two", (b"b",))
    for each in (one, two, two):
        exports.add(each, 5)
    handle = world.request().walk(b"a").ok(Op.GETFH).opaque(128)
    for _ in range(2):
        exports.remove(one, 5)
    assert world.request().fails(Op.LOOKUP, string(b"a")) == "NOENT"
    assert world.request().fails(Op.PUTFH, string(handle)) == "STALE"
    world.request().walk(b"b", b"file")
    exports.add(one, 5)
    world.request().walk(b"a", b"file")
    world.request().ok(Op.PUTFH, string(handle))


def test_names_of_exports_that_come_and_go_are_not_told(store: Store) -> None:
    """The root lists nothing, and changes for clients that remember a name which was not there, whatever the clock."""
    exports = ChangingExports(key=KEY, time_ns=5)
    changes = []
    for work in (exports.add, exports.remove):
        work(subtree(store, "/one", (b"a",)), 5)
        request = World(exports).request()
        assert page(request.ok(Op.READDIR, u64(0) + bytes(8) + u32(999) + u32(999) + bitmap())) == ([], True)
        changes.append(attributes_of(request.ok(Op.GETATTR, bitmap(Attr.CHANGE)))[1].u64())
    assert 5 < changes[0] < changes[1]


def test_who_may_use_an_export_changes(store: Store) -> None:
    """A client that is no longer among an export's is refused with its next operation, by handle too."""
    export = subtree(store, "/one", (b"a",))
    exports = ChangingExports(key=KEY, time_ns=5)
    exports.add(export, 5)
    world = World(exports)
    handle = world.request(host="192.0.2.1").walk(b"a").ok(Op.GETFH).opaque(128)
    export.allow((parse_rule("192.0.2.2"),))
    assert world.request(host="192.0.2.1").fails(Op.PUTFH, string(handle)) == "ACCESS"
    world.request(host="192.0.2.2").walk(b"a", b"file")
