"""Volumes that a cluster of real processes owns: calls through any node, paths through all, and nodes that die."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from typing import Any
from uuid import UUID

import pytest

from space._errors import RefusedError, SpaceError
from space.projections.csi.model import host_nqn
from space.projections.csi.pb import csi_pb2 as pb
from tests import nfs_client as nfs
from tests.cluster_support import eventually
from tests.csi_client import MIB, device, tree
from tests.csi_cluster import Cluster, founding
from tests.nvme_initiator import EndedError, FailedError, Host

pytestmark = [pytest.mark.requires("py:space_raft_engine", "py:grpc"), pytest.mark.integration]

BLOCK = 4096
HERE = "here@127.0.0.1"
ONE_WRITER = 1


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of three."""
    with founding(tmp_path_factory.mktemp("csi")) as found:
        yield found


@pytest.fixture
def cluster(founded: Cluster) -> Cluster:
    """The cluster with all its nodes running and serving."""
    if gone := founded.directories.keys() - founded.nodes.keys():
        founded.start(*gone)
    founded.leader()
    founded.serving()
    return founded


def wanted(name: str, transport: str = "nvme") -> dict[str, Any]:
    """A volume of 4 MiB, as it is asked for."""
    block = transport == "nvme"
    return {
        "name": name,
        "capacity": 4 * MIB,
        "limit": 0,
        "block": block,
        "parameters": {"transport": transport},
    }


def test_any_node_answers(cluster: Cluster) -> None:
    """A volume is made once whichever nodes are asked for it, and all of them know it, its snapshots and groups."""
    asked = [cluster.ask(number) for number in [*cluster.directories] * 2]
    with ThreadPoolExecutor(6) as threads:
        made = list(threads.map(lambda each: each.csi_create(wanted=wanted("any")), asked))
    volume = made[0]["id"]
    assert {each["id"] for each in made} == {volume}
    with ThreadPoolExecutor(6) as threads:
        taken = list(threads.map(lambda each: each.csi_snapshot(volume=volume, name="any"), asked))
    assert len({each["id"] for each in taken}) == 1
    other = cluster.ask().csi_create(wanted=wanted("other"))["id"]
    group = asked[0].csi_snapshot_group(name="any", volumes=[volume, other])
    assert len(group["snapshots"]) == 2
    for each in asked:
        assert {volume, other} <= {found["id"] for found in each.csi_volumes(after="", limit=100)}
        assert each.csi_group(group=group["id"]) == group
        assert each.csi_find_snapshot(snapshot=taken[0]["id"]) == taken[0]
    asked[1].csi_delete_group(group=group["id"])
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda each: each.csi_delete(volume=volume), asked))
    asked[2].csi_delete(volume=other)
    asked[0].csi_delete_snapshot(snapshot=taken[0]["id"])
    assert [each.csi_volumes(after="", limit=100) for each in asked] == [[]] * 6
    assert asked[1].csi_snapshots(after="", limit=100, volume="") == []


def test_of_nodes_that_are_asked_at_once_one_publishes(cluster: Cluster) -> None:
    """A volume for one writer is published on one node, though each node of the cluster is asked for another one."""
    asked = [cluster.ask(number) for number in cluster.directories]

    def publish(volume: str, number: int) -> bool:
        arguments = {"volume": volume, "node": f"n{number}@", "readonly": False, "mode": ONE_WRITER}
        try:
            asked[number].csi_publish(**arguments)
        except RefusedError:
            return False
        return True

    for turn in range(4):
        volume = asked[0].csi_create(wanted=wanted(f"one-{turn}"))["id"]
        with ThreadPoolExecutor(3) as threads:
            assert sum(threads.map(publish, [volume] * 3, range(3))) == 1
        assert len(asked[0].csi_volume(volume=volume)["published"]) == 1
        asked[1].csi_unpublish(volume=volume, node="")
        asked[2].csi_delete(volume=volume)


def test_changes_of_one_volume_are_all_kept(cluster: Cluster) -> None:
    """Nodes that are asked at once to publish, to expand and to change one volume undo nothing of each other's."""
    asked = [cluster.ask(number) for number in [*cluster.directories] * 2]
    volume = asked[0].csi_create(wanted=wanted("changed", "nfs"))["id"]

    def publish(number: int) -> None:
        arguments = {"volume": volume, "node": f"n{number}@", "readonly": False, "mode": 5}
        asked[number].csi_publish(**arguments)

    works = [
        *(lambda number=number: publish(number) for number in range(4)),
        lambda: asked[4].csi_expand(volume=volume, capacity=8 * MIB, limit=0),
        lambda: asked[5].csi_modify(volume=volume, mutable={"history": "2d"}),
    ]
    with ThreadPoolExecutor(len(works)) as threads:
        for each in [threads.submit(work) for work in works]:
            each.result()
    found = asked[0].csi_volume(volume=volume)
    assert sorted(found["published"]) == ["n0@", "n1@", "n2@", "n3@"]
    assert (found["capacity"], found["mutable"]) == (8 * MIB, {"history": "2d"})
    asked[0].csi_unpublish(volume=volume, node="")
    asked[0].csi_delete(volume=volume)


def test_calls_go_on_while_nodes_die(cluster: Cluster) -> None:
    """Through the controller, volumes are made, attached, detached and removed while leaders die: no call fails."""
    over, done = threading.Event(), [0] * 4
    failed: list[BaseException] = []

    def work(which: int) -> None:
        try:
            while not over.is_set():
                name = f"busy-{which}-{done[which]}"
                volume = cluster.create(name, "nvme", MIB)
                assert cluster.create(name, "nvme", MIB).volume_id == volume.volume_id
                cluster.attach(volume, f"{which}@")
                taken = cluster.client.CreateSnapshot(source_volume_id=volume.volume_id, name=name).snapshot
                cluster.detach(volume, f"{which}@")
                cluster.client.DeleteVolume(volume_id=volume.volume_id)
                cluster.client.DeleteSnapshot(snapshot_id=taken.snapshot_id)
                done[which] += 1
        except BaseException as error:  # noqa: BLE001 - the test's thread tells of it
            failed.append(error)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(len(done))]
    kept = cluster.create("kept", "nvme", MIB)
    for thread in threads:
        thread.start()

    def all_go_on() -> None:
        before = min(done)
        eventually("all go on", lambda: failed or min(done) > before + 1)

    for _ in range(2):
        all_go_on()
        cluster.kill(number := cluster.leader())
        all_go_on()
        cluster.start(number)
    over.set()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    assert [each.volume.volume_id for each in cluster.client.ListVolumes().entries] == [kept.volume_id]
    assert not cluster.client.ListSnapshots().entries
    cluster.client.DeleteVolume(volume_id=kept.volume_id)


def test_a_device_is_reached_through_every_node(cluster: Cluster) -> None:
    """Each node is a path to a device: what is written by one is read by the others, and none is left when it ends."""
    volume = cluster.create("paths", "nvme", 4 * MIB)
    told = cluster.attach(volume, HERE)
    ports = [int(each.rpartition(":")[2]) for each in told["server"].split(",")]
    assert ports == [cluster.ports[number][0] for number in sorted(cluster.ports)]

    async def look() -> None:
        host = host_nqn(HERE)
        paths = [await Host.connect(port, told["nqn"], host=host) for port in ports]
        numbers = [each.number for each in paths]
        assert len(set(numbers)) == 3
        for each in paths:
            assert UUID(told["uuid"]).bytes in await each.admin.identify(3, nsid=1)
        for turn, (writer, reader) in enumerate(islice(zip(cycle(paths), cycle(paths[1:]), strict=False), 9)):
            data = bytes([turn + 1]) * BLOCK
            await writer.queues[0].write(1, turn, data, BLOCK)
            assert await reader.queues[0].read(1, turn, 1, BLOCK) == data
        with pytest.raises((FailedError, EndedError)):
            await Host.connect(ports[0], told["nqn"], host=host_nqn("other@"))
        await asyncio.to_thread(cluster.detach, volume, HERE)
        for each in paths:
            with pytest.raises((FailedError, EndedError)):
                await each.queues[0].read(1, 0, 1, BLOCK)
            await each.close()
        for port in ports:
            with pytest.raises((FailedError, EndedError)):
                await Host.connect(port, told["nqn"], host=host)

    asyncio.run(look())
    cluster.client.DeleteVolume(volume_id=volume.volume_id)


def test_a_device_is_there_again_through_a_node_that_was_away(cluster: Cluster) -> None:
    """A node that was killed, and has missed a publication, offers it as soon as it can be connected to."""
    away = next(number for number in cluster.nodes if number != cluster.leader())
    cluster.kill(away)
    volume = cluster.create("away", "nvme", MIB)
    told = cluster.attach(volume, HERE)
    assert len(told["server"].split(",")) == 3
    cluster.start(away)

    async def look() -> None:
        async with await Host.connect(cluster.ports[away][0], told["nqn"], host=host_nqn(HERE)) as path:
            await path.queues[0].write(1, 0, b"x" * BLOCK, BLOCK)

    asyncio.run(look())
    cluster.detach(volume, HERE)
    cluster.client.DeleteVolume(volume_id=volume.volume_id)


def fill(client: nfs.Client, path: str, length: int) -> str:
    """How writing a new file of a length ends."""
    file = client.create(path)
    data = bytes(range(256)) * (length // 256)
    written = client.attempt(nfs.putfh(file.handle), nfs.write(file.stateid, 0, data, nfs.FILE_SYNC))
    client.compound(nfs.putfh(file.handle), nfs.close(file.stateid))
    return written.status


def test_a_tree_moves_to_another_node(cluster: Cluster) -> None:
    """After kill -9 of the node that serves, another one exports the same under the same handles, and its capacity."""
    volume = cluster.create("moves", "nfs", MIB)
    told = cluster.attach(volume, HERE)
    assert len(told["server"].split(",")) == 3
    serving = cluster.serving()
    share = told["share"].removeprefix("/")
    client = nfs.Client(("127.0.0.1", cluster.ports[serving][1]), minor=2)
    assert fill(client, f"{share}/half", MIB // 2) == "OK"
    *_, handle = client.compound(*client.walk(f"{share}/half"), nfs.getfh())
    assert fill(client, f"{share}/more", 3 * MIB // 4) == "NOSPC"
    epoch = cluster.epoch(serving)
    cluster.kill(serving)
    client.vanish()
    serving = cluster.serving(after=epoch)
    with nfs.Client(("127.0.0.1", cluster.ports[serving][1]), minor=2) as client:
        assert client.attempt(nfs.putfh(handle)).status == "OK"
        assert client.attempt(*client.walk("")).status == "OK"
        eventually("grace is over", lambda: nfs_create(client, f"{share}/quarter"))
        assert fill(client, f"{share}/full", 3 * MIB // 4) == "NOSPC"
        cluster.detach(volume, HERE)
        assert client.attempt(*client.walk(share)).status == "NOENT"
    cluster.client.DeleteVolume(volume_id=volume.volume_id)


def nfs_create(client: nfs.Client, path: str) -> bool:
    """Whether a file can be made and written by now."""
    try:
        return fill(client, path, MIB // 4) == "OK"
    except nfs.NfsError:
        return False


def test_what_no_node_serves_is_refused(cluster: Cluster) -> None:
    """A volume that only a machine with the store could see is not made, and the message says what is."""
    bare = cluster.client.CreateVolume
    for kind in (tree, device):
        with pytest.raises(Exception, match="no node of the cluster serves") as caught:
            bare(
                name="bare", volume_capabilities=[kind()], capacity_range=pb.CapacityRange(required_bytes=MIB)
            )
        assert caught.value.code().name == "FAILED_PRECONDITION"  # type: ignore[attr-defined]
    with pytest.raises(SpaceError, match="no such operation"):
        cluster.ask().csi_nothing()
