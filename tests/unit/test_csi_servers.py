"""Volumes served over NFS and NVMe/TCP: who may reach which, and what is there; with clients of the tests' own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from space._errors import RefusedError, Status, UnavailableError, UsageError
from space._node.csi_files import VolumeFiles
from space._node.csi_servers import Listening, Servers, own_addresses, rules_of
from space._node.csi_volumes import VolumeTree
from space._node.store import Store
from space.projections.csi.model import Published, Reach, Volume, Wanted, host_nqn
from space.projections.nfs.exports import parse_rule
from tests import nfs_client as nfs
from tests.nvme_initiator import EndedError, FailedError, Host

pytestmark = [pytest.mark.unit, pytest.mark.requires("py:google.protobuf")]

MIB = 1 << 20
WRITER = Published(readonly=False, mode=5)
EVERYWHERE = Listening(("127.0.0.1", 0), ("127.0.0.1", 0))
HERE = "here@127.0.0.1"


class World:
    """A store whose volumes are served."""

    def __init__(self, store: Store, where: Listening = EVERYWHERE) -> None:
        self.store = store
        self.files = VolumeFiles(store, VolumeTree(store).volumes_home)
        self.servers = Servers(store, self.files, where)
        self.tree = VolumeTree(store, cut=self.files.cut, accounts=self.files, network=self.servers)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """While it is entered."""
        self.files.begun()
        async with self.servers.serving(self.tree.published()):
            yield
        self.files.ended()

    def make(self, name: str, transport: str) -> str:
        """A volume of 4 MiB."""
        block = transport == "nvme"
        return self.tree.create(Wanted(name, 4 * MIB, 0, block, parameters={"transport": transport})).id

    def publish(self, volume: str, node: str = HERE) -> Reach:
        """Lets a node reach it."""
        reach = self.tree.publish(volume, node, WRITER)
        assert reach is not None
        return reach


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store."""
    with Store(tmp_path / "data") as made:
        yield made


def run(world: World, work: Callable[[], Awaitable[None]]) -> None:
    """Does something while the volumes are served."""

    async def main() -> None:
        async with world.serving():
            await work()

    asyncio.run(main())


def at(reach: Reach) -> tuple[str, int]:
    """Where its server is."""
    host, _, port = reach.server.rpartition(":")
    return host, int(port)


def status(client: nfs.Client, path: str) -> str:
    """How a walk to a path ends."""
    return client.attempt(*client.walk(path)).status


def space_of(client: nfs.Client, path: str) -> tuple[int, int, int]:
    """Total, free and available bytes of the file system at a path."""
    names = "space_total", "space_free", "space_avail"
    found = client.compound(*client.walk(path), nfs.getattr_(*names))[-1]
    return found[names[0]], found[names[1]], found[names[2]]


def fill(client: nfs.Client, path: str, length: int) -> str:
    """How writing a new file of a length ends."""
    file = client.create(path)
    data = bytes(range(256)) * (length // 256)
    written = client.attempt(nfs.putfh(file.handle), nfs.write(file.stateid, 0, data, nfs.FILE_SYNC))
    client.compound(nfs.putfh(file.handle), nfs.close(file.stateid))
    return written.status


def test_an_export_has_the_capacity_of_its_volume(store: Store) -> None:
    """The size of the file system is the volume's capacity; a write beyond it is refused; what is removed is free."""
    world = World(store)

    def look() -> None:
        volume = world.make("v", "nfs")
        with nfs.Client(at(world.publish(volume)), minor=2) as client:
            assert space_of(client, volume) == (4 * MIB, 4 * MIB, 4 * MIB)
            for number in range(8):
                assert fill(client, f"{volume}/f{number}", MIB // 2) == "OK"
            assert space_of(client, volume) == (4 * MIB, 0, 0)
            assert fill(client, f"{volume}/more", 4096) == "NOSPC"
            client.compound(*client.walk(volume), nfs.remove(b"f0"))
            assert space_of(client, volume) == (4 * MIB, MIB // 2, MIB // 2)
            world.tree.expand(volume, 6 * MIB, 0)
            assert space_of(client, volume)[0] == 6 * MIB
        assert world.tree.usage(volume)["used"] == 7 * MIB // 2

    run(world, lambda: asyncio.to_thread(look))


def test_volumes_are_exported_as_long_as_they_are_published(store: Store) -> None:
    """A tree is there for clients from its first publication to the end of its last; nothing else ever is."""
    world = World(store)

    def look() -> None:
        volumes = [world.make(name, "nfs") for name in "abc"]
        reach = world.publish(volumes[0])
        assert world.publish(volumes[0]) == reach
        world.publish(volumes[1])
        world.publish(volumes[0], "other@127.0.0.1")
        with nfs.Client(at(reach), minor=2) as client:
            assert [status(client, each) for each in volumes] == ["OK", "OK", "NOENT"]
            assert status(client, f"{volumes[0]}/../csi") in {"NOENT", "BADNAME", "INVAL"}
            world.tree.unpublish(volumes[0], HERE)
            assert status(client, volumes[0]) == "OK"
            world.tree.unpublish(volumes[0], "")
            assert status(client, volumes[0]) == "NOENT"
            world.tree.delete(volumes[0])
            assert [status(client, each) for each in volumes] == ["NOENT", "OK", "NOENT"]

    run(world, lambda: asyncio.to_thread(look))


def test_an_export_is_for_its_nodes(store: Store) -> None:
    """A volume published on another machine cannot be entered from here, nor one taken from here by its handles."""
    world = World(store)

    def look() -> None:
        volume = world.make("v", "nfs")
        reach = world.publish(volume)
        world.publish(volume, "other@192.0.2.7")
        with nfs.Client(at(reach), minor=2) as client:
            *_, handle = client.compound(*client.walk(volume), nfs.getfh())
            world.tree.unpublish(volume, HERE)
            assert status(client, volume) == "ACCESS"
            assert client.attempt(nfs.putfh(handle)).status == "ACCESS"

    run(world, lambda: asyncio.to_thread(look))


def test_it_is_all_there_again_before_anybody_can_connect(store: Store) -> None:
    """Another owner serves what is published under the same handles and names, to the same nodes."""
    port = free_port()
    where = Listening(("127.0.0.1", port), ("127.0.0.1", 0))
    made: list[Any] = []

    def first(world: World) -> None:
        made.append(volume := world.make("v", "nfs"))
        with nfs.Client(at(world.publish(volume)), minor=2) as client:
            *_, handle = client.compound(*client.walk(volume), nfs.getfh())
            made.append(handle)
        made.append(world.publish(world.make("d", "nvme")))

    def second(world: World) -> None:
        volume, handle, _ = made
        with nfs.Client(("127.0.0.1", port), minor=2) as client:
            assert client.attempt(nfs.putfh(handle)).status == "OK"
            assert status(client, volume) == "OK"
        asyncio.run(connected(world.publish(reach_volume(world, "d")), HERE))

    for work in (first, second):
        world = World(store, where)
        run(world, functools.partial(asyncio.to_thread, work, world))


def reach_volume(world: World, name: str) -> str:
    """The id of a volume."""
    return next(each.id for each in world.tree.volumes("", 10) if each.name == name)


async def connected(reach: Reach, node: str) -> Host:
    """A node's connection to a device, ended."""
    host = await Host.connect(at(reach)[1], reach.nqn, host=host_nqn(node))
    await host.close()
    return host


def test_a_device_is_for_its_nodes(store: Store) -> None:
    """A block volume is a subsystem of its own, with one namespace; hosts of other nodes are refused, or thrown out."""
    world = World(store)

    async def look() -> None:
        volumes = [await asyncio.to_thread(world.make, name, "nvme") for name in "ab"]
        one, two = [await asyncio.to_thread(world.publish, each) for each in volumes]
        assert one.nqn != two.nqn
        host = await Host.connect(at(one)[1], one.nqn, host=host_nqn(HERE))
        assert UUID(one.uuid).bytes in await host.admin.identify(3, nsid=1)
        await host.queues[0].write(1, 0, b"x" * 4096, 4096)
        with pytest.raises((FailedError, EndedError)):
            await Host.connect(at(one)[1], one.nqn, host=host_nqn("other@"))
        await asyncio.to_thread(world.publish, volumes[0], "other@")
        await connected(one, "other@")
        await asyncio.to_thread(world.tree.unpublish, volumes[0], HERE)
        with pytest.raises((FailedError, EndedError)):
            await host.queues[0].read(1, 0, 1, 4096)
        await host.close()
        await asyncio.to_thread(world.tree.unpublish, volumes[0], "")
        with pytest.raises((FailedError, EndedError)):
            await connected(one, "other@")
        await connected(two, HERE)

    run(world, look)


def test_hosts_are_told_of_another_size(store: Store) -> None:
    """A device that is expanded has its new size for who is connected, after an event."""
    world = World(store)

    async def look() -> None:
        volume = await asyncio.to_thread(world.make, "v", "nvme")
        reach = await asyncio.to_thread(world.publish, volume)
        host = await Host.connect(at(reach)[1], reach.nqn, host=host_nqn(HERE))
        await host.admin.set_feature(0x0B, 0x100)  # events about namespaces
        event = host.admin.event()
        await asyncio.to_thread(world.tree.expand, volume, 8 * MIB, 0)
        async with asyncio.timeout(60):
            await event
        size = int.from_bytes((await host.admin.identify(0, nsid=1))[:8], "little")
        assert size * 4096 == 8 * MIB
        await host.close()

    run(world, look)


def test_what_is_not_served_is_refused(store: Store) -> None:
    """A volume of a transport that nobody serves is neither made nor published; one that was there says why."""
    made = World(store)
    volume = made.make("v", "nfs")
    made.tree.register("here", "z", 0)
    without = World(store, Listening())
    for work in (lambda: without.make("w", "nvme"), lambda: without.tree.publish(volume, HERE, WRITER)):
        with pytest.raises(RefusedError, match="serves no") as caught:
            work()
        assert caught.value.status is Status.NOT_PERMITTED
    alone = VolumeTree(store)
    with pytest.raises(RefusedError, match="nobody serves"):
        alone.publish(volume, HERE, WRITER)
    fuse = alone.create(Wanted("f", MIB, 0, block=False)).id
    with pytest.raises(RefusedError, match="where the store is"):
        made.tree.publish(fuse, HERE, WRITER)
    assert made.tree.publish(fuse, "here", WRITER) is None
    assert made.tree.volume(volume).published == {}


def test_what_is_to_stay_on_its_node_is_not_served_to_the_network(store: Store) -> None:
    """A volume with sovereignty: local is not published beyond this machine, and none that is becomes local."""
    everywhere = Listening(("0.0.0.0", 0), ("0.0.0.0", 0), advertise="127.0.0.1")
    world = World(store, everywhere)

    async def work() -> None:
        for transport in ("nfs", "nvme"):
            kept = world.make(f"{transport}-kept", transport)
            await asyncio.to_thread(world.tree.modify, kept, {"sovereignty": "local"})
            with pytest.raises(RefusedError, match="keeps it on this node"):
                await asyncio.to_thread(world.publish, kept)
            assert world.tree.volume(kept).published == {}
            shown = world.make(f"{transport}-shown", transport)
            await asyncio.to_thread(world.publish, shown)
            with pytest.raises(RefusedError, match="keeps it on its node"):
                await asyncio.to_thread(world.tree.modify, shown, {"sovereignty": "local"})
            await asyncio.to_thread(world.tree.modify, shown, {"sovereignty": "zone"})

    run(world, work)


def test_a_volume_that_is_lost_does_not_stop_the_others(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """At a start without one of the transports the volumes of it are not served, which is said, and the others are."""
    world = World(store)
    volumes = [world.make(name, kind) for name, kind in (("a", "nfs"), ("b", "nvme"))]

    def publish() -> None:
        for each in volumes:
            world.publish(each)

    run(world, lambda: asyncio.to_thread(publish))
    again = World(store, Listening(nvme=("127.0.0.1", 0)))

    async def look() -> None:
        await connected(await asyncio.to_thread(again.publish, volumes[1]), HERE)

    run(again, look)
    assert f"volume {volumes[0]} is published, and not served" in caplog.text


def test_an_address_in_use_is_said(store: Store) -> None:
    """A port somebody else listens at is an error that names it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "127.0.0.1", taken.getsockname()[1]
        for where in (Listening(nfs=address), Listening(nvme=address)):
            with pytest.raises(UnavailableError, match="cannot listen"):
                run(World(store, where), lambda: asyncio.sleep(0))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_nodes_have_to_be_told_an_address(host: str) -> None:
    """An address that stands for all of a machine's is none to connect to."""
    with pytest.raises(UsageError, match="--advertise"):
        Listening(nfs=(host, 2049))
    found = Listening(nfs=(host, 2049), advertise="store.example")
    assert found.told((host, 2049)) == "store.example:2049"


@pytest.mark.parametrize(
    "nodes, rules, allowed, refused",
    [
        (["a@192.0.2.1"], [], ["192.0.2.1"], ["192.0.2.2"]),
        (["a@192.0.2.1", "b@2001:db8::1"], [], ["192.0.2.1", "2001:db8::1"], ["192.0.2.2"]),
        (["a@192.0.2.1", "b@"], [], ["192.0.2.9"], []),
        (["a@192.0.2.1", "b@"], ["192.0.2.0/24"], ["192.0.2.9"], ["198.51.100.1"]),
        (["a@192.0.2.1", "b"], [], ["192.0.2.1", "203.0.113.1"], ["192.0.2.9"]),
        (["a@198.51.100.1"], ["192.0.2.0/24"], [], ["198.51.100.1", "192.0.2.1"]),
        (["a@192.0.2.1"], ["192.0.2.0/24:ro"], ["192.0.2.1"], ["192.0.2.2"]),
    ],
)
def test_rules_of_an_export(
    nodes: list[str], rules: list[str], allowed: list[str], refused: list[str]
) -> None:
    """The addresses of a volume's nodes, within the server's rules; where one is not known, those rules alone."""
    published = dict.fromkeys(nodes, WRITER)
    found = rules_of(
        Volume("v", "", 0, False, 0, published=published), tuple(map(parse_rule, rules)), ["203.0.113.1"]
    )

    def fits(address: str) -> bool:
        return not found or any(ip_address(address) in each.network for each in found)

    assert all(map(fits, allowed))
    assert not any(map(fits, refused))
    assert any(each.read_only for each in found) == any(each.endswith(":ro") for each in rules)


def test_the_addresses_of_this_machine(tmp_path: Path) -> None:
    """They are the local ones of the kernel's tables; where those are not there, none is known."""
    table = """Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     |-- 192.0.2.0
        /24 link UNICAST
     |-- 192.0.2.5
        /32 host LOCAL
     |-- 192.0.2.255
        /32 link BROADCAST
"""
    (tmp_path / "fib_trie").write_text(table)
    assert own_addresses(tmp_path) == []
    (tmp_path / "if_inet6").write_text("20010db8000000000000000000000001 02 40 00 80 eth0\n")
    assert own_addresses(tmp_path) == ["127.0.0.1", "192.0.2.5", "2001:db8::1"]
    assert "127.0.0.1" in own_addresses()


def test_a_reader_may_only_read() -> None:
    """The address of a node a volume is published on for reading gets no more."""
    volume = Volume(
        "v", "", 0, False, 0, published={"a@192.0.2.1": Published(True, 5), "b@192.0.2.2": WRITER}
    )
    assert [each.read_only for each in rules_of(volume, (), [])] == [True, False]


def free_port() -> int:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])
