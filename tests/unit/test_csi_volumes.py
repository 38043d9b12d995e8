"""Volumes, snapshots and groups in the tree of a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from space._errors import ConflictError, NotFoundError, RefusedError, SpaceError, Status, UsageError
from space._node.csi_volumes import VolumeTree
from space._node.store import Store
from space.projections.csi import check
from space.projections.csi.model import Published, Wanted
from space.projections.csi.pb import csi_pb2 as pb

pytestmark = [pytest.mark.unit, pytest.mark.requires("py:google.protobuf")]

MIB = 1 << 20
_MODE = pb.VolumeCapability.AccessMode
WRITER, READERS, MANY = (
    Published(readonly=False, mode=_MODE.SINGLE_NODE_WRITER),
    Published(readonly=True, mode=_MODE.MULTI_NODE_READER_ONLY),
    Published(readonly=False, mode=_MODE.MULTI_NODE_MULTI_WRITER),
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store."""
    with Store(tmp_path / "data") as made:
        yield made


@pytest.fixture
def volumes(store: Store) -> VolumeTree:
    """No volumes yet."""
    return VolumeTree(store)


def wanted(name: str = "v", **more: object) -> Wanted:
    """A small tree."""
    return Wanted(**{"name": name, "capacity": MIB, "limit": 0, "block": False, **more})  # type: ignore[arg-type]


def why(work: object, *arguments: object, **more: object) -> Status:
    """The status of a refusal."""
    with pytest.raises(SpaceError) as caught:
        work(*arguments, **more)  # type: ignore[operator]
    return caught.value.status


def test_everything_known_comes_back_after_a_restart(tmp_path: Path) -> None:
    """A volume is the same, published nodes included, in a store opened anew and in one rebuilt from the log."""
    with Store(tmp_path / "data") as store:
        tree = VolumeTree(store)
        made = tree.create(wanted("x" * 500, parameters={"compression": "zstd"}, zone="z"))
        tree.register("n" * 192, "z", 3)
        tree.publish(made.id, "n" * 192, WRITER)
        before = tree.volume(made.id)
    assert before.published == {"n" * 192: WRITER}
    with Store(tmp_path / "data") as store:
        assert VolumeTree(store).volume(made.id) == before
        store.replay(verify=True)
        assert VolumeTree(store).volume(made.id) == before


def test_making_is_one_batch(store: Store, volumes: VolumeTree) -> None:
    """A volume, with its name and all that is known about it, is one position of the log; so is a restored one."""
    at = store.last
    made = volumes.create(wanted("a"))
    assert store.last == at + 1
    snapshot = volumes.snapshot(made.id, "s")
    assert store.last == at + 2
    volumes.create(wanted("b", source=f"snapshot/{snapshot.id}"))
    assert store.last == at + 3
    volumes.snapshot_group("g", [made.id])
    assert store.last == at + 4
    volumes.delete(made.id)
    assert store.last == at + 5


def test_a_name_that_leads_nowhere_is_taken_away(store: Store, volumes: VolumeTree) -> None:
    """If a name outlived its volume, the next volume of that name is made all the same."""
    made = volumes.create(wanted())
    store.rm(f"/csi/volumes/{made.id}", recursive=True)
    again = volumes.create(wanted())
    assert again.id != made.id
    assert [each.id for each in volumes.volumes("", 10)] == [again.id]


@pytest.mark.parametrize(
    "other",
    [
        {"block": True},
        {"capacity": 2 * MIB},
        {"parameters": {"compression": "none"}},
        {"source": "volume/00000000-0000-0000-0000-000000000000"},
    ],
)
def test_a_name_is_one_kind_of_volume(volumes: VolumeTree, other: dict[str, object]) -> None:
    """Wanted again as it is, the same volume is found; wanted otherwise, it is a conflict."""
    made = volumes.create(wanted())
    assert volumes.create(wanted()) == made
    assert why(volumes.create, wanted("v", **other)) is Status.EXISTS


def test_sources_are_checked(volumes: VolumeTree) -> None:
    """A source must be there, of the same kind, and fit; nothing is made otherwise."""
    small = volumes.create(wanted("small"))
    device = volumes.create(wanted("device", block=True))
    missing = "00000000-0000-0000-0000-000000000000"
    assert why(volumes.create, wanted("x", source=f"volume/{missing}")) is Status.NOT_FOUND
    assert why(volumes.create, wanted("x", source=f"volume/{device.id}")) is Status.INVALID
    assert why(volumes.create, wanted("x", source=f"volume/{small.id}", capacity=1)) is Status.TOO_LARGE
    assert why(volumes.create, wanted("x", source=f"volume/{small.id}", moment="@1")) is Status.NOT_FOUND
    encrypted = {"encryption": "aes-256-gcm"}
    assert (
        why(volumes.create, wanted("x", source=f"volume/{small.id}", parameters=encrypted)) is Status.INVALID
    )
    assert len(volumes.volumes("", 10)) == 2


def test_a_restored_device_may_be_larger(store: Store, volumes: VolumeTree) -> None:
    """A block volume made larger than its source has the size asked for, and the source's bytes."""
    device = volumes.create(wanted("device", block=True))
    store.write(store.resolve(f"/csi/volumes/{device.id}/data"), 0, b"x" * 4096)
    larger = volumes.create(wanted("larger", block=True, source=f"volume/{device.id}", capacity=4 * MIB))
    data = store.resolve(f"/csi/volumes/{larger.id}/data")
    assert store.stat(data).size == 4 * MIB
    assert store.read(data, 0, 4096) == b"x" * 4096


def test_an_encrypted_volume_is_encrypted(store: Store, volumes: VolumeTree) -> None:
    """A volume whose parameters ask for it has a key of its own if it is a device, and its files have."""
    device = volumes.create(wanted("device", block=True, parameters={"encryption": "aes-256-gcm"}))
    assert store.stat(store.resolve(f"/csi/volumes/{device.id}/data")).key
    tree = volumes.create(wanted("tree", parameters={"encryption": "aes-256-gcm"}))
    made = store.create(parent=store.resolve(f"/csi/volumes/{tree.id}/data"), name=b"f")
    assert store.stat(made).key


def test_listing_goes_on_where_it_ended(volumes: VolumeTree) -> None:
    """Pages of any size hold every volume once, in order, also when the last one of a page is deleted in between."""
    made = [volumes.create(wanted(f"v{n}")).id for n in range(7)]
    found: list[str] = []
    while page := volumes.volumes(found[-1] if found else "", 3):
        found += [each.id for each in page]
        if len(found) == 3:
            volumes.delete(found[-1])
    assert found == sorted(made)


def test_snapshots_of_one_volume_are_found_among_many(volumes: VolumeTree) -> None:
    """A listing of one volume's snapshots is not cut short by pages full of others'."""
    one, other = volumes.create(wanted("one")), volumes.create(wanted("other"))
    for number in range(5):
        volumes.snapshot(other.id, f"o{number}")
    mine = sorted(volumes.snapshot(one.id, f"m{number}").id for number in range(3))
    assert [each.id for each in volumes.snapshots("", 2, one.id)] == mine[:2]
    assert [each.id for each in volumes.snapshots(mine[1], 2, one.id)] == mine[2:]
    assert why(volumes.snapshot, other.id, "m0") is Status.EXISTS


@pytest.mark.parametrize(
    "first, second, allowed",
    [(WRITER, WRITER, False), (READERS, READERS, True), (MANY, MANY, True), (READERS, WRITER, False)],
)
def test_where_a_volume_may_be_published(
    volumes: VolumeTree, first: Published, second: Published, allowed: bool
) -> None:
    """What the access mode allows on a second node is noted, what it does not is refused; the same again is nothing."""
    made = volumes.create(wanted())
    for node in ("a", "b"):
        volumes.register(node, "z", 0)
    for _ in range(2):
        volumes.publish(made.id, "a", first)
    if allowed:
        volumes.publish(made.id, "b", second)
    else:
        with pytest.raises(RefusedError):
            volumes.publish(made.id, "b", second)
    with pytest.raises(ConflictError):
        volumes.publish(made.id, "a", Published(not first.readonly, first.mode))
    with pytest.raises(RefusedError):
        volumes.delete(made.id)
    for _ in range(2):
        volumes.unpublish(made.id, "")
    assert volumes.volume(made.id).published == {}
    volumes.delete(made.id)


def test_one_writer_beside_readers(volumes: VolumeTree) -> None:
    """With a single writer on many nodes, a second one that writes is refused and one that reads is not."""
    made = volumes.create(wanted())
    mode = _MODE.MULTI_NODE_SINGLE_WRITER
    for node in ("a", "b", "c"):
        volumes.register(node, "z", 0)
    volumes.publish(made.id, "a", Published(readonly=False, mode=mode))
    with pytest.raises(RefusedError):
        volumes.publish(made.id, "b", Published(readonly=False, mode=mode))
    volumes.publish(made.id, "c", Published(readonly=True, mode=mode))


def test_a_node_has_no_more_than_it_may(volumes: VolumeTree) -> None:
    """At its limit a node takes no further volume, until one is taken away, also one that was deleted since."""
    volumes.register("n", "z", 2)
    made = [volumes.create(wanted(f"v{n}")).id for n in range(3)]
    for each in made[:2]:
        volumes.publish(each, "n", WRITER)
    assert why(volumes.publish, made[2], "n", WRITER) is Status.NO_SPACE
    volumes.unpublish(made[0], "n")
    volumes.publish(made[2], "n", WRITER)
    assert why(volumes.publish, made[0], "nobody", WRITER) is Status.NOT_FOUND


def test_expansion_never_shrinks(volumes: VolumeTree) -> None:
    """A smaller size changes nothing, a limit below what there is is refused, a larger size is there at once."""
    made = volumes.create(wanted())
    assert volumes.expand(made.id, 1, 0).capacity == MIB
    assert why(volumes.expand, made.id, 1, 2) is Status.TOO_LARGE
    assert volumes.expand(made.id, 3 * MIB, 0).capacity == 3 * MIB
    assert volumes.volume(made.id).capacity == 3 * MIB


@pytest.mark.parametrize("bad", ["", "..", "../x", "a/b", "x" * 300, "\0"])
def test_ids_lead_nowhere_else(store: Store, volumes: VolumeTree, bad: str) -> None:
    """Whatever is handed in as an id, nothing outside of the volumes is found, changed or removed."""
    before = store.last
    for work in (volumes.volume, volumes.find_snapshot, volumes.group):
        with pytest.raises((NotFoundError, UsageError)):
            work(bad)
    volumes.delete(bad)
    volumes.delete_snapshot(bad)
    volumes.delete_group(bad)
    volumes.unpublish(bad, "n")
    assert store.last == before


def test_a_policy_changes_everywhere(store: Store, volumes: VolumeTree) -> None:
    """A modification reaches files, directories, and what is made later; keys not named stay as they were."""
    made = volumes.create(wanted(parameters={"history": "1d"}))
    data = f"/csi/volumes/{made.id}/data"
    store.mkdir(f"{data}/d/e", parents=True)
    store.put(b"x", name=f"{data}/d/e/f")
    volumes.modify(made.id, {"compression": "lz4"})
    store.put(b"x", name=f"{data}/d/e/g")
    for path in ("", "/d", "/d/e", "/d/e/f", "/d/e/g"):
        document = store.policy(store.resolve(data + path)).to_document()
        assert (document["compression"], document["history"]) == ("lz4", "1d")
    assert volumes.volume(made.id).mutable == {"compression": "lz4"}
    assert why(volumes.modify, made.id, {"compression": "none:3"}) is Status.INVALID


def test_block_devices_are_whole_blocks(store: Store, volumes: VolumeTree) -> None:
    """A device has the block size that capacity is rounded to, so that a loop device over it has no rest."""
    made = volumes.create(wanted(block=True))
    assert store.stat(store.resolve(f"/csi/volumes/{made.id}/data")).block_size == check.BLOCK_BYTES
    assert volumes.usage(made.id) == {"used": 0, "capacity": MIB, "files": 0}


# --- several that are asked at once ----------------------------------------------------------------


CLIENT = b"c" * 16


class Between(VolumeTree):
    """Volumes that somebody else changes once, after they were looked at and before they are changed."""

    def __init__(self, store: Store, other: Callable[[], object]) -> None:
        super().__init__(store)
        self._other: Callable[[], object] | None = other

    def _changed(self, known: Any, commands: Any) -> None:
        other, self._other = self._other, None
        if other is not None:
            other()
        super()._changed(known, commands)


def test_who_is_overtaken_looks_again(store: Store, volumes: VolumeTree) -> None:
    """What changes between a look at a volume and a change to it is seen, and decides: nothing is undone or lost."""
    for node in ("one", "two"):
        volumes.register(node, "z", 0)
    made = volumes.create(wanted())
    late = Between(store, lambda: volumes.publish(made.id, "one", WRITER))
    assert why(late.publish, made.id, "two", WRITER) is Status.NOT_PERMITTED
    assert list(volumes.volume(made.id).published) == ["one"]
    late = Between(store, lambda: volumes.modify(made.id, {"history": "2d"}))
    late.expand(made.id, 2 * MIB, 0)
    found = volumes.volume(made.id)
    assert (found.capacity, found.mutable) == (2 * MIB, {"history": "2d"})
    other = volumes.create(wanted("other"))

    def twice() -> None:
        volumes.expand(other.id, 3 * MIB, 0)
        volumes.publish(other.id, "two", WRITER)

    Between(store, twice).modify(other.id, {"history": "2d"})
    found = volumes.volume(other.id)
    assert (found.capacity, found.mutable, list(found.published)) == (3 * MIB, {"history": "2d"}, ["two"])
    volumes.unpublish(other.id, "")
    volumes.delete(other.id)
    volumes.unpublish(made.id, "")
    late = Between(store, lambda: volumes.publish(made.id, "two", WRITER))
    assert why(late.delete, made.id) is Status.NOT_PERMITTED
    late = Between(store, lambda: volumes.unpublish(made.id, "two"))
    late.unpublish(made.id, "")
    late = Between(store, lambda: volumes.delete(made.id))
    late.delete(made.id)
    assert volumes.volumes("", 10) == []


def test_an_attempt_that_comes_late_changes_nothing(store: Store, volumes: VolumeTree) -> None:
    """A second attempt at a call is not carried out, whatever has happened since; the next call is."""
    other = VolumeTree(store)
    volumes.register("one", "z", 0)
    with volumes.signed(CLIENT, 1):
        made = volumes.create(wanted())
    with volumes.signed(CLIENT, 2):
        volumes.publish(made.id, "one", WRITER)
    with volumes.signed(CLIENT, 3):
        volumes.unpublish(made.id, "one")
    with other.signed(CLIENT, 2):
        other.publish(made.id, "one", WRITER)
    assert volumes.volume(made.id).published == {}
    with volumes.signed(CLIENT, 4):
        volumes.delete(made.id)
    with other.signed(CLIENT, 1):
        assert why(other.create, wanted()) is Status.STALE
    assert volumes.volumes("", 10) == []
    with volumes.signed(CLIENT, 5):
        again = volumes.create(wanted())
    assert [each.id for each in volumes.volumes("", 10)] == [again.id]
    assert why(lambda: volumes.signed(CLIENT, 1 << 60).__enter__()) is Status.INVALID


def test_a_volume_and_its_name_go_together(store: Store, volumes: VolumeTree) -> None:
    """A volume is removed with its name by one command; of a name that leads nowhere, from before, nothing is left."""
    made = volumes.create(wanted())
    before = store.position
    volumes.delete(made.id)
    assert store.position == before + 1
    assert store.entries(store.resolve("/csi/names"), after=b"", limit=10) == []
    made = volumes.create(wanted())
    store.rm(f"/csi/volumes/{made.id}", recursive=True)
    again = volumes.create(wanted())
    assert again.id != made.id
    assert volumes.create(wanted()).id == again.id


def test_where_members_serve_is_known(store: Store, volumes: VolumeTree) -> None:
    """The address at which a member serves last is found, of each transport; nodes beside it are as they were."""
    volumes.register("n", "z", 0)
    volumes.serve_at(2, "nvme", "0.0.0.0:4420", "two:4420")
    volumes.serve_at(2, "nfs", "0.0.0.0:2049", "two:2049")
    volumes.serve_at(10, "nvme", "10.0.0.1:4420", "ten:4420")
    position = store.position
    volumes.serve_at(2, "nvme", "0.0.0.0:4420", "two:4420")
    assert store.position == position
    volumes.serve_at(10, "nvme", "10.0.0.2:4420", "ten:4420")
    assert VolumeTree(store).served_at("nvme") == {
        2: ("0.0.0.0:4420", "two:4420"),
        10: ("10.0.0.2:4420", "ten:4420"),
    }
    assert volumes.served_at("nfs") == {2: ("0.0.0.0:2049", "two:2049")}


def test_over_the_network_alone(store: Store) -> None:
    """Where nobody sees the store, a volume of a transport that needs that is not made, and the message says why."""
    network = VolumeTree(store, shown=False)
    with pytest.raises(RefusedError, match="no node of the cluster serves volumes through fuse") as caught:
        network.create(wanted())
    assert "transport: nfs" in caught.value.hint
