"""One NFS server out of a cluster of real processes: taking over, claiming again, and servers of before."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from space._node.nfs_tenure import LOOK_SECONDS
from tests import nfs_client as nfs
from tests.cli_support import execute, finish, start
from tests.cluster_support import dev, eventually
from tests.nfs_client import Client, File, NfsError, RpcError
from tests.nfs_cluster import Cluster, founding, piece

pytestmark = [pytest.mark.requires("py:space_raft_engine"), pytest.mark.integration]


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of three."""
    with founding(tmp_path_factory.mktemp("nfs") / "cluster") as found:
        yield found


@pytest.fixture
def cluster(founded: Cluster) -> Cluster:
    """The cluster with all its nodes running, of which one serves."""
    founded.start(*(founded.directories.keys() - founded.nodes.keys()))
    founded.leader()
    founded.serving()
    return founded


def status(client: Client, *operations: bytes) -> str:
    """How a COMPOUND ends."""
    return client.attempt(*operations).status


def opening(client: Client, name: bytes, share: int = nfs.READ) -> bytes:
    """An OPEN of a file in the root."""
    return nfs.open_(client.identity.client, b"o", nfs.claim_null(name), share=share | nfs.WANT_NO_DELEGATION)


def answers(client: Client, count: int) -> Iterator[tuple[int, str]]:
    """Slots and ends of so many COMPOUNDs that were sent; fewer if the connection ends before."""
    with contextlib.suppress(RpcError, OSError, EOFError):
        for _ in range(count):
            slot, answer = client.collect()
            yield slot, answer.status


def told(client: Client, count: int) -> list[tuple[int, str]]:
    """Those of them that say more than to come again."""
    return [each for each in answers(client, count) if each[1] != "DELAY"]


def test_one_node_serves_and_the_others_stand_by(cluster: Cluster) -> None:
    """One of three that are told to serve listens, and all of them know in which epoch it does."""
    serving = cluster.serving()
    eventually("one listens", lambda: [each for each in cluster.nodes if cluster.listens(each)] == [serving])
    with Client(cluster.floating.address) as client:
        client.mkdir("seen")
    for number in cluster.nodes:
        assert execute(Path("/nowhere"), "--node", cluster.url(number), "stat", "/seen").status == 0


def test_what_was_held_is_claimed_at_another_node(cluster: Cluster) -> None:
    """After kill -9 of the server nothing acknowledged is lost, handles are good, locks are still their holders'."""
    old = cluster.serving()
    epoch = cluster.epoch(old)
    one, two = Client(cluster.floating.address, owner=b"1"), Client(cluster.floating.address, owner=b"2")
    file = one.create("held", deny=nfs.WRITE)
    for number in range(8):
        file.write(4096 * number, piece(number), stable=number % 3)
    verifier = file.commit()
    file.lock(nfs.WRITE_LOCK, 0, 100)
    before, stateid, handle = one.stat("held", "fileid", "change", "fsid", "size"), file.stateid, file.handle
    cluster.kill(old)
    cluster.serving(after=epoch)
    one.vanish()
    two.vanish()
    one = Client(cluster.floating.address, owner=b"1", verifier=one.verifier, reclaim_complete=False)
    two = Client(cluster.floating.address, owner=b"2", verifier=two.verifier, reclaim_complete=False)
    assert status(two, nfs.putrootfh(), opening(two, b"held")) == "GRACE"
    assert status(one, nfs.putfh(handle), nfs.read(stateid, 0, 1)) == "STALE_STATEID"
    claim = nfs.open_(one.identity.client, b"owner", nfs.claim_previous(), share=nfs.BOTH, deny=nfs.WRITE)
    _, opened = one.compound(nfs.putfh(handle), claim)
    file = File(one, handle, opened)
    file.lock(nfs.WRITE_LOCK, 0, 100, reclaim=True)
    for client in (one, two):
        client.compound(nfs.reclaim_complete())
    assert one.stat("held", "fileid", "change", "fsid", "size") == before
    assert file.read(0, 8 * 4096) == b"".join(piece(number) for number in range(8))
    assert file.commit() != verifier
    with pytest.raises(NfsError, match="SHARE_DENIED"):
        two.open("held", share=nfs.WRITE)
    reader = two.open("held", share=nfs.READ)
    test = nfs.lockt(nfs.READ_LOCK, 0, 1, two.identity.client, b"two")
    assert status(two, nfs.putfh(reader.handle), test) == "DENIED"
    file.close()
    for client in (one, two):
        client.close()


def test_nobody_sees_the_leader_die_while_another_node_serves(cluster: Cluster) -> None:
    """Writes, looks and locks of two clients wait for the next leader, and none of them fails."""
    serving = cluster.serving()
    epoch = cluster.epoch(serving)
    cluster.lead(next(each for each in cluster.nodes if each != serving))
    done = [0, 0]
    failed: list[BaseException] = []
    over = threading.Event()

    def work(which: int) -> None:
        try:
            with Client(cluster.floating.address) as client:
                file = client.create(f"busy{which}")
                while not over.is_set():
                    number = done[which]
                    file.write(4096 * (number % 64), piece(number))
                    assert file.read(4096 * (number % 64), 4096) == piece(number)
                    file.lock(nfs.WRITE_LOCK, number, 1, owner=b"%d" % number)
                    client.mkdir(f"busy{which}-{number}")
                    done[which] += 1
                file.close()
        except BaseException as error:  # noqa: BLE001 - the test's thread tells of it
            failed.append(error)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    eventually("some is done", lambda: failed or min(done) > 10)
    cluster.kill(cluster.leader())
    after = min(done)
    eventually("it goes on", lambda: failed or min(done) > after + 10)
    over.set()
    for thread in threads:
        thread.join()
    assert not failed
    assert cluster.epoch(serving) == epoch
    with Client(cluster.floating.address) as client:
        names = {entry.name for entry in client.listing("")}
        assert names >= {b"busy%d-%d" % (which, n) for which in range(2) for n in range(done[which])}


def test_without_a_quorum_nobody_is_told_anything(cluster: Cluster) -> None:
    """Requests wait, are put off or lose their connection, but do not fail; then all is as it was."""
    serving = cluster.serving()
    epoch = cluster.epoch(serving)
    client = Client(cluster.floating.address)
    file = client.create("patient")
    file.write(0, piece(1))
    others = [each for each in cluster.nodes if each != serving]
    for number in others:
        cluster.kill(number)
    time.sleep(4 * LOOK_SECONDS)  # what was confirmed right before may be told for that long
    client.submit(nfs.putfh(file.handle), nfs.write(file.stateid, 0, piece(2), nfs.FILE_SYNC), slot=1)
    client.submit(nfs.putfh(file.handle), nfs.read(file.stateid, 0, 4096), slot=2)
    client.submit(slot=3)
    slot, renewed = client.collect()
    assert (slot, renewed.status) == (3, "OK")
    assert not told(client, 2)
    eventually("it does not listen", lambda: not cluster.listens(serving))
    client.vanish()
    cluster.start(*others)
    cluster.serving(after=epoch)
    with Client(cluster.floating.address) as again:
        found = again.open("patient")
        assert found.read(0, 4096) in (piece(1), piece(2))  # the write may have been carried out
        found.write(0, piece(3))
        found.close()


def test_a_server_that_stood_still_finds_itself_replaced(cluster: Cluster) -> None:
    """Nothing that reached it meanwhile is carried out, no lock of it is told, and it stands by again."""
    old = cluster.serving()
    epoch = cluster.epoch(old)
    direct = "127.0.0.1", cluster.ports[old]
    client = Client(direct, owner=b"before")
    lost = client.create("fenced")
    lost.write(0, piece(1))
    others = client.open("fenced", owner=b"another")
    cluster.pause(old)
    write = nfs.write(lost.stateid, 0, piece(2), nfs.FILE_SYNC)
    lock = nfs.lock_first(nfs.WRITE_LOCK, 0, 10, others.stateid, client.identity.client, b"l")
    client.submit(nfs.putfh(lost.handle), write, slot=0)
    client.submit(nfs.putfh(lost.handle), lock, slot=1)
    client.submit(nfs.putfh(lost.handle), nfs.read(others.stateid, 0, 4096), slot=2)
    client.submit(nfs.putrootfh(), nfs.create(nfs.DIR, b"never", mode=0o755), slot=3)
    cluster.serving(after=epoch)
    with Client(cluster.floating.address) as now:
        file = now.open("fenced")
        file.write(0, piece(3))
        file.lock(nfs.WRITE_LOCK, 0, 10, owner=b"mine")
        cluster.resume(old)
        assert not told(client, 4)
        eventually("it stands by", lambda: not cluster.listens(old))
        assert file.read(0, 4096) == piece(3)
        assert b"never" not in {entry.name for entry in now.listing("")}
        file.write(0, piece(4))
        assert file.read(0, 4096) == piece(4)
        file.close()
    client.vanish()


def test_a_running_node_is_asked_to_serve(tmp_path: Path) -> None:
    """The command on a node's directory serves until it ends; meanwhile another node refuses, and names the one."""
    with dev(tmp_path / "cluster", "--nodes", "3", "--insecure") as (_, nodes):
        words = ("project", "--view", "nfs", "--path", "/", "--listen", "127.0.0.1:0", "--squash", "none")
        first, second = (Path(each["data"]) for each in nodes[:2])
        past = execute(first, "--node", nodes[0]["url"], *words, "--at", "@1")
        assert past.status == 2
        missing = execute(first, *words[:3], "--path", "/nothing")
        assert missing.status == 3, missing.err
        epochs, handles = [], set()
        for home in (first, second):
            process = start(home, *words, stderr=None)
            try:
                assert process.stdout is not None
                ready = json.loads(process.stdout.readline())
                epochs.append(ready["epoch"])
                other = second if home is first else first
                refused = execute(other, *words)
                assert (refused.status, ready["target"] in refused.err) == (4, True)
                address = "127.0.0.1", int(ready["address"].rpartition(":")[2])
                with Client(address) as client:
                    if home is first:
                        client.create("f").close()
                    handles.add(client.handle("f"))
            finally:
                process.terminate()
                assert finish(process).status == 0
        assert epochs == [1, 2]
        assert len(handles) == 1
