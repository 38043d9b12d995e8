"""Which exports a server of a store has, what they are called, and what the options mean."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from space._errors import UsageError
from space._node import nfs_view
from space._node.beside import open_beside
from space._node.nfs_view import Options, parse_options
from space._node.store import Store
from space.events import commands as cmd
from space.projections.nfs.exports import Squash
from space.projections.vfs import Caller

pytestmark = pytest.mark.unit


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store with two trees that have a file in common."""
    with Store(tmp_path) as made:
        for name in ("/a", "/b"):
            made.mkdir(name)
        shared = made.put(b"shared", name="/a/f")
        made.execute(cmd.Link(shared.id, made.resolve("/b"), b"f"))
        yield made


def options(**changed: object) -> Options:
    """The options of a command line."""
    usual = {"read_only": False, "squash": "root", "clients": [], "lease": None, "grace": None}
    return parse_options(**(usual | changed))  # type: ignore[arg-type]


def test_options_have_bounds() -> None:
    """Leases and grace periods of other lengths, unknown squashes and networks that are none are refused."""
    assert options().config().grace_seconds == nfs_view.LEASE_SECONDS
    assert options(lease=5, grace=0).config().grace_seconds == 0
    assert options(squash="all").squash is Squash.ALL
    assert options(clients=["10.0.0.0/8:ro"]).rules[0].read_only
    assert [name for name, _ in options(refer=["oslo=192.0.2.7"]).referrals] == ["oslo"]
    for wrong in (
        {"lease": 4},
        {"lease": 91},
        {"grace": -1},
        {"grace": 601},
        {"squash": "some"},
        {"clients": ["x"]},
        {"refer": ["oslo"]},
    ):
        with pytest.raises(UsageError):
            options(**wrong)


def test_one_export_is_the_root_and_several_have_their_paths(store: Store) -> None:
    """A single source has no way to it; several are where they are in the tree, or under their ids."""
    (alone,) = nfs_view._exports(store, ["/a"], options(), "127.0.0.1")
    assert alone.path == ()
    root = str(store.resolve("/b"))
    exports = nfs_view._exports(store, ["/a", root], options(read_only=True), "127.0.0.1")
    assert [each.path for each in exports] == [(b"a",), (root.encode(),)]
    assert all(each.read_only for each in exports)
    assert exports[0].number == alone.number


def test_what_two_exports_have_in_common_is_the_same_at_once(store: Store) -> None:
    """Bytes held back in one of them are seen through the other."""
    one, two = [each.files for each in nfs_view._exports(store, ["/a", "/b"], options(), "127.0.0.1")]
    node = one.lookup(one.root, b"f").id
    asyncio.run(one.write(node, 0, b"SHARED", Caller()))
    assert two.read(node, 0, 100) == b"SHARED"
    assert two.lookup(two.root, b"f").size == 6


def test_the_past_is_another_server(store: Store) -> None:
    """An export of a past moment has a number of its own, and its server a name: nobody takes them for the present."""
    (now,) = nfs_view._exports(store, ["/a"], options(), "127.0.0.1")
    with open_beside(store.path, f"@{store.last}") as past:
        (then,) = nfs_view._exports(past, ["/a"], options(), "127.0.0.1")
        assert then.read_only
        assert then.number != now.number
        assert nfs_view.handle_key(past) == nfs_view.handle_key(store)
        assert nfs_view._moment(past) != nfs_view._moment(store)


def test_the_past_refers_to_nobody(store: Store) -> None:
    """What another zone has now is not what was there at a past moment."""
    refer = options(refer=["oslo=192.0.2.7"])
    with open_beside(store.path, f"@{store.last}") as past, pytest.raises(UsageError, match="past moment"):
        nfs_view.serve(past, ["/a"], listen=("127.0.0.1", 0), options=refer, ready=lambda _: None)
