"""Real nodes whose disks are full, lost or damaged: they heal from their peers, and nothing promised is lost."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from pathlib import Path

import pytest
from blake3 import blake3

from space._errors import UnavailableError
from space._node.member import HEAL_FILE
from space.events.ids import CapsuleId
from space.replication.replica import DIGEST_EVERY
from tests.chaos.damage import DAMAGES, SEGMENTS, delete_sealed, fill, flip, rot_last, rot_sealed, segments
from tests.chaos.processes import HANG_SECONDS, Cluster, eventually, report, small_disk
from tests.chaos.workload import Workload, seed_of

pytestmark = [pytest.mark.requires("py:space_raft_engine")]
needs_mount = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")


# --- a full disk -------------------------------------------------------------------------------------


@needs_mount
@pytest.mark.requires("mount", "umount")
def test_a_follower_with_a_full_disk_catches_up_when_there_is_room(tmp_path: Path) -> None:
    """A follower without room stands still, the others go on; with room again it has everything."""
    with (
        small_disk(tmp_path / "small", "192m") as small,
        Cluster(tmp_path, homes={3: small / "3"}) as cluster,
    ):
        cluster.any(lambda client: client.probe_members(what="lead", node=1))
        with Workload(cluster, workers=2, seed=seed_of("full follower")) as load:
            load.progress()
            balloon = fill(small)
            reached = cluster.furthest(but=3)
            with load.tolerating(3):
                load.progress(60)
                position = cluster.position_of(3)
                assert position is None or position < reached + 60, "it wrote on a full disk"
                balloon.unlink()
                revive(cluster, 3)
            load.progress()
        report(load.check())


@needs_mount
@pytest.mark.requires("mount", "umount")
def test_a_leader_with_a_full_disk_lets_another_one_lead(tmp_path: Path) -> None:
    """A leader without room is followed by one that has some, without a command being lost or refused for good."""
    with (
        small_disk(tmp_path / "small", "192m") as small,
        Cluster(tmp_path, homes={2: small / "2"}) as cluster,
    ):
        cluster.change("lead", 2)
        with Workload(cluster, workers=2, seed=seed_of("full leader")) as load:
            load.progress()
            assert cluster.leader() == 2
            balloon = fill(small)
            with load.tolerating(2):
                load.progress(60)
                assert cluster.leader() != 2
                balloon.unlink()
                revive(cluster, 2)
            load.progress()
        report(load.check())


def revive(cluster: Cluster, node: int) -> None:
    """Waits until a node has caught up, or ended: without room for its state a replica cannot go on; then starts it."""
    goal = cluster.furthest(but=node)
    process = cluster.nodes[node]
    eventually("caught up, or ended", lambda: not process.runs or (cluster.position_of(node) or 0) >= goal)
    if not process.runs:
        report(f"node {node} had ended: {process.told.read_text().splitlines()[-1]}")
        cluster.reap(node)
        cluster.start(node)


# --- a damaged log ------------------------------------------------------------------------------------


@pytest.mark.parametrize("clean", [False, True], ids=["killed", "stopped"])
def test_a_damaged_replica_heals_from_its_peers(tmp_path: Path, clean: bool) -> None:
    """Segments lost or damaged and tables damaged while a node was down: it starts, heals, and is like the others."""
    seed = seed_of("damaged replica")
    rng = random.Random(seed)
    with Cluster(tmp_path, options=SEGMENTS) as cluster:
        with Workload(cluster, seed=seed) as load:
            eventually("several segments", lambda: len(segments(cluster.nodes[3].home)) > 5)
            for damage in DAMAGES:
                # the first one's log began before it was told to make small segments; one lost as a whole is one again
                node = rng.choice([each for each in (2, 3) if len(segments(cluster.nodes[each].home)) > 2])
                cluster.stop(node) if clean else cluster.kill(node)
                load.progress(10)
                what = damage(cluster.nodes[node].home, rng)
                report(f"node {node}: {damage.__name__} {what}")
                cluster.start(node)
                load.progress(10)
                cluster.settle_one(node)
                found = cluster.client(node, 60.0).verify(repair=True)
                if found["repaired"]:
                    report(f"node {node}: {found['repaired']} batches restored by verify")
                    assert damage in {rot_sealed, rot_last}, (
                        "only payload is not looked at when a node starts"
                    )
                if found["findings"]:
                    report(f"node {node}: healed by another start: {found['findings'][0]}")
                    cluster.stop(node)
                    cluster.start(node)
                findings = cluster.client(node, 60.0).verify()["findings"]
                assert findings == [], f"{damage.__name__} {what}: {findings}"
        report(load.check())


# --- a replica anew ---------------------------------------------------------------------------------------


def test_a_wiped_replica_is_replaced_by_a_new_one(tmp_path: Path) -> None:
    """A node that lost everything is removed, and joins under a new id with an empty directory."""
    with Cluster(tmp_path, options=SEGMENTS) as cluster:
        with Workload(cluster, seed=seed_of("wiped")) as load:
            load.progress(40)
            cluster.kill(3)
            load.progress()
            cluster.change("remove", 3)
            cluster.forget(3)
            cluster.add(4)
            load.progress()
        report(load.check())
        assert sorted(cluster.nodes) == [1, 2, 4]


def test_a_follower_far_behind_is_sent_the_log(tmp_path: Path) -> None:
    """A follower that missed more than the leader keeps in memory gets segments and a checkpoint, and goes on."""
    with Cluster(tmp_path, options=(*SEGMENTS, "--retained", "64", "--checkpoint-gain", "32")) as cluster:
        with Workload(cluster, seed=seed_of("far behind")) as load:
            load.progress()
            cluster.kill(3)
            load.progress(250)
            leader = cluster.leader()
            cluster.client(leader, 60.0).probe_checkpoint()
            cluster.start(3)
            load.progress()
            cluster.settle_one(3)
        report(load.check())
        log = cluster.nodes[3].log.read_text()
        assert log.count("fetching the log up to") >= 2, "once when it joined, once now"
        made = (cluster.nodes[leader].home / "checkpoints").iterdir()
        got = (cluster.nodes[3].home / "checkpoints").iterdir()
        assert {each.name for each in made} == {each.name for each in got}


def test_a_damaged_leader_takes_no_follower_with_it(tmp_path: Path) -> None:
    """A follower far behind meets a damaged leader: it stays, gets what it lacks from another one; the leader heals."""
    seed = seed_of("damaged leader")
    with Cluster(tmp_path, options=(*SEGMENTS, "--retained", "64")) as cluster:
        with Workload(cluster, seed=seed) as load:
            load.progress()
            behind = cluster.followers()[0]
            cluster.kill(behind)
            first = {node: len(segments(cluster.nodes[node].home)) for node in cluster.up}
            load.progress(150)
            leader = cluster.leader()
            home = cluster.nodes[leader].home
            eventually("segments it lacks", lambda: len(segments(home)) > first[leader] + 3)
            flip(segments(home)[first[leader] + 1], random.Random(seed), count=20)
            cluster.start(behind)
            cluster.settle_one(behind)
            load.progress()
            report(f"the damage was met: {(home / HEAL_FILE).exists()}")  # not where another one led already
            cluster.client(leader, 60.0).verify(repair=True)
            cluster.stop(leader)
            cluster.start(leader)
            load.progress()
        report(load.check())


def test_a_wrong_row_is_found_by_digest_named_and_rebuilt(tmp_path: Path) -> None:
    """A row changed behind everybody's back: once it is used, digests differ; its replica names it and is rebuilt."""
    with Cluster(tmp_path) as cluster:
        node = cluster.followers()[0]
        with Workload(cluster, seed=seed_of("wrong row")) as load:
            load.progress()
            victim = load.workers[0]
            capsule = CapsuleId(victim.home_id)
            cluster.client(node).probe_rot(capsule=str(capsule))
            start = cluster.furthest()
            load.expect_disagreement = True
            while (cluster.position_of(node) or 0) <= start + DIGEST_EVERY:
                load.progress(1)
            (named,) = eventually("the difference is named", lambda: cluster.here(node)["differences"])
            report(named)
            assert f"row {capsule.hex()}" in named
            assert "table capsule" in named
            load.progress()
        report(load.check())


def test_a_refused_start_leaves_the_directory_as_it_was(tmp_path: Path) -> None:
    """A damaged node whose peers are all down does not start, says why, and starts when they are back."""
    rng = random.Random(seed_of("alone and damaged"))
    with Cluster(tmp_path, options=SEGMENTS) as cluster:
        with Workload(cluster) as load:
            eventually("several segments", lambda: len(segments(cluster.nodes[3].home)) > 3)
        for node in (1, 2, 3):
            cluster.kill(node)
        delete_sealed(cluster.nodes[3].home, rng)
        cluster.start(3, wait=False)
        with pytest.raises(UnavailableError):
            cluster.client(3)
        cluster.start(1)
        cluster.start(2)
        cluster.ready(3)
        report(load.check())


# --- a mount --------------------------------------------------------------------------------------------------


@pytest.mark.requires("/dev/fuse", "fusermount3", "py:pyfuse3", "dd")
def test_a_mount_on_a_follower_outlives_the_leader(tmp_path: Path) -> None:
    """A large file is written through a follower's mount while the leader is killed: fsync returns, all is there."""
    target = tmp_path / "mount"
    target.mkdir()
    pieces = [random.Random(number).randbytes(1 << 20) for number in range(48)]
    digest = blake3(b"".join(pieces)).hexdigest()
    with Cluster(tmp_path) as cluster, contextlib.ExitStack() as stack:
        node = cluster.followers()[0]
        stack.callback(subprocess.run, ["umount", "-l", str(target)], capture_output=True, check=False)
        cluster.client(node, 60.0).mount(source="/", target=str(target))
        with Workload(cluster, workers=2, seed=seed_of("mount")) as load:
            load.progress()
            (leader,) = [each for each in cluster.up if cluster.here(each)["role"] == "leader"]
            assert leader != node
            command = ["dd", f"of={target}/large", "bs=1M", "iflag=fullblock", "conv=fsync", "status=none"]
            with subprocess.Popen(command, stdin=subprocess.PIPE) as writer:
                stack.callback(writer.kill)
                assert writer.stdin is not None
                for number, piece in enumerate(pieces):
                    if number == 16:
                        cluster.kill(leader)
                    writer.stdin.write(piece)
                writer.stdin.close()
                assert writer.wait(HANG_SECONDS) == 0
            cluster.start(leader)
            load.progress()
            seen = subprocess.run(["cat", f"{target}/large"], capture_output=True, check=True).stdout
            assert blake3(seen).hexdigest() == digest
        report(load.check())
        for each in cluster.nodes:
            found = {entry["path"]: entry for entry in cluster.client(each, 60.0).probe_inventory()}
            assert found["large"]["digest"] == digest, f"node {each}"
        cluster.client(node, 60.0).unmount(target=str(target))
