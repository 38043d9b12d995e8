"""Volumes with real bytes, through a driver, real mounts and real loop devices."""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import grpc
import pytest

from space._node.store import Store
from space.control import ControlServer
from space.projections.csi.pb import csi_pb2 as pb
from tests.cli_support import finish, start
from tests.csi_client import MIB, Client, device, tree
from tests.csi_support import NEEDS_KERNEL, Machine, code_of, machine, wait_for

pytestmark = NEEDS_KERNEL

_MODE = pb.VolumeCapability.AccessMode


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """One driver for all of them."""
    with machine(tmp_path_factory.mktemp("csi")) as made:
        yield made


def pwrite(path: Path, data: bytes, offset: int = 0) -> None:
    """Writes to a file or device, past every cache but the store's."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, data, offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pread(path: Path, length: int, offset: int = 0) -> bytes:
    """Reads a file or device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)


def fill(file: IO[bytes]) -> None:
    """Writes 4 MiB in pieces."""
    for _ in range(64):
        file.write(b"x" * 65_536)


def test_a_snapshot_has_what_was_written_before_it_and_is_restored(here: Machine) -> None:
    """Write, snapshot, overwrite, restore: the restored volume has the old bytes, the first one the new ones."""
    volume = here.create("snap-source")
    target = here.publish(volume)
    (target / "dir").mkdir()
    (target / "dir" / "file").write_bytes(b"old" * 100_000)
    os.symlink("dir/file", target / "link")
    snapshot = here.client.CreateSnapshot(source_volume_id=volume, name="snap-1").snapshot
    assert snapshot.ready_to_use
    (target / "dir" / "file").write_bytes(b"new" * 100_000)
    (target / "later").touch()
    restored = here.publish(here.restore("snap-restored", snapshot.snapshot_id))
    assert (restored / "link").read_bytes() == b"old" * 100_000
    assert sorted(each.name for each in restored.iterdir()) == ["dir", "link"]
    assert (target / "dir" / "file").read_bytes() == b"new" * 100_000


def test_a_snapshot_outlives_its_volume(here: Machine) -> None:
    """With the volume deleted, its snapshot is listed, and a volume made of it has the bytes."""
    volume = here.create("short-lived")
    (here.publish(volume) / "x").write_text("kept")
    snapshot = here.client.CreateSnapshot(source_volume_id=volume, name="outlives").snapshot.snapshot_id
    here.unpublish(volume)
    here.client.DeleteVolume(volume_id=volume)
    assert [
        each.snapshot.snapshot_id for each in here.client.ListSnapshots(source_volume_id=volume).entries
    ] == [snapshot]
    assert (here.publish(here.restore("of-outlives", snapshot)) / "x").read_text() == "kept"


def test_clones_are_independent(here: Machine) -> None:
    """What is changed in a volume or in its clone afterwards is not seen in the other one."""
    volume = here.create("clone-source")
    target = here.publish(volume)
    (target / "shared").write_text("before")
    clone = here.publish(here.clone("clone-copy", volume))
    (target / "shared").write_text("in the first")
    (clone / "own").write_text("in the clone")
    assert (clone / "shared").read_text() == "before"
    assert not (target / "own").exists()


@pytest.mark.requires("mkfs.ext4", "e2fsck")
def test_a_block_volume_is_a_device_with_the_same_bytes_after_restore(here: Machine) -> None:
    """A file system made on a block volume is whole in a volume made of a snapshot of it."""
    volume = here.create("block-source", 32 * MIB, device())
    target = here.publish(volume, device())
    assert stat.S_ISBLK(target.stat().st_mode)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(target)], check=True)
    whole = hashlib.sha256(pread(target, 32 * MIB)).digest()
    snapshot = here.client.CreateSnapshot(source_volume_id=volume, name="block-snap").snapshot.snapshot_id
    pwrite(target, os.urandom(4 * MIB))
    restored = here.publish(here.restore("block-restored", snapshot, 32 * MIB, device()), device())
    assert hashlib.sha256(pread(restored, 32 * MIB)).digest() == whole
    subprocess.run(["e2fsck", "-fn", str(restored)], check=True, capture_output=True)


def test_a_block_volume_published_read_only_cannot_be_written(here: Machine) -> None:
    """Through a path published read-only the device refuses writes, and shows what is written through the other one."""
    volume = here.create("block-ro", 4 * MIB, device(_MODE.SINGLE_NODE_MULTI_WRITER))
    how = device(_MODE.SINGLE_NODE_MULTI_WRITER)
    target = here.publish(volume, how, pod="writer")
    reader = here.publish(volume, how, pod="reader", readonly=True)
    pwrite(target, b"seen" * 1024)
    assert pread(reader, 4) == b"seen"
    with pytest.raises(OSError, match=r"not permitted|Read-only"):
        pwrite(reader, b"never")
    here.unpublish(volume, pod="reader", last=False)
    here.unpublish(volume, pod="writer")
    assert not [
        each
        for each in here.loops()
        if volume in Path(f"/sys/block/{each[5:]}/loop/backing_file").read_text()
    ]


def test_a_tree_published_read_only_cannot_be_written(here: Machine) -> None:
    """A read-only target is EROFS, while another one of the same volume can be written."""
    volume = here.create("tree-ro")
    how = tree(_MODE.SINGLE_NODE_MULTI_WRITER)
    target = here.publish(volume, how, pod="writer")
    reader = here.publish(volume, how, pod="reader", readonly=True)
    (target / "x").write_text("seen")
    assert (reader / "x").read_text() == "seen"
    with pytest.raises(OSError, match="Read-only file system"):
        (reader / "y").touch()


def test_a_volume_grows_while_it_is_written(here: Machine) -> None:
    """A writer that meets the end of a tree goes on in the same file once the volume is expanded."""
    volume = here.create("growing", 2 * MIB)
    target = here.publish(volume)
    with (target / "file").open("wb", buffering=0) as file:
        with pytest.raises(OSError, match="No space left"):
            fill(file)
        written = file.tell()
        assert written <= 2 * MIB
        answer = here.client.ControllerExpandVolume(
            volume_id=volume, capacity_range=pb.CapacityRange(required_bytes=8 * MIB)
        )
        assert (answer.capacity_bytes, answer.node_expansion_required) == (8 * MIB, False)
        for _ in range(64):
            file.write(b"y" * 65_536)
    assert (target / "file").stat().st_size == written + 64 * 65_536
    usage = here.client.NodeGetVolumeStats(volume_id=volume, volume_path=str(target)).usage[0]
    assert (usage.total, usage.used) == (8 * MIB, written + 64 * 65_536)


def test_a_device_grows_while_it_is_written(here: Machine) -> None:
    """A block volume expanded while somebody writes has the new size at its path, and every write is there."""
    volume = here.create("growing-device", 4 * MIB, device())
    target = here.publish(volume, device())
    over = threading.Event()
    written: list[int] = []

    def write() -> None:
        number = 0
        while not over.is_set() or number < 16:
            pwrite(target, number.to_bytes(4096, "big"), number % 1024 * 4096)
            written.append(number)
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    here.client.ControllerExpandVolume(
        volume_id=volume, capacity_range=pb.CapacityRange(required_bytes=8 * MIB)
    )
    here.client.NodeExpandVolume(
        volume_id=volume,
        volume_path=str(target),
        capacity_range=pb.CapacityRange(required_bytes=8 * MIB),
        volume_capability=device(),
    )
    over.set()
    writer.join()
    pwrite(target, b"end" * 100, 8 * MIB - 4096)
    assert pread(target, 3, 8 * MIB - 4096) == b"end"
    last = {number % 1024: number for number in written}
    assert all(
        int.from_bytes(pread(target, 4096, place * 4096), "big") == number for place, number in last.items()
    )


def test_metadata_tells_what_a_backup_has_to_read(here: Machine) -> None:
    """Allocated ranges hold all that was written; a base copied and patched by the changed ranges is the target."""
    volume = here.create("metadata", 32 * MIB, device())
    target = here.publish(volume, device())
    pwrite(target, os.urandom(MIB), 0)
    pwrite(target, os.urandom(MIB), 8 * MIB)
    base = here.client.CreateSnapshot(source_volume_id=volume, name="meta-base").snapshot.snapshot_id
    pwrite(target, os.urandom(65_536), 8 * MIB + 131_072)
    pwrite(target, os.urandom(MIB), 20 * MIB)
    later = here.client.CreateSnapshot(source_volume_id=volume, name="meta-later").snapshot.snapshot_id
    messages = here.client.GetMetadataAllocated(snapshot_id=base)
    assert {each.volume_capacity_bytes for each in messages} == {32 * MIB}
    held = [(each.byte_offset, each.size_bytes) for message in messages for each in message.block_metadata]
    assert held == [(0, MIB), (8 * MIB, MIB)]
    delta = [
        (each.byte_offset, each.size_bytes)
        for message in here.client.GetMetadataDelta(
            base_snapshot_id=base, target_snapshot_id=later, max_results=1
        )
        for each in message.block_metadata
    ]
    assert delta == [(8 * MIB + 131_072, 65_536), (20 * MIB, MIB)]
    before = here.publish(here.restore("meta-1", base, 32 * MIB, device()), device())
    after = here.publish(here.restore("meta-2", later, 32 * MIB, device()), device())
    patched = bytearray(pread(before, 32 * MIB))
    for offset, length in delta:
        patched[offset : offset + length] = pread(after, length, offset)
    assert bytes(patched) == pread(after, 32 * MIB)
    rest = here.client.GetMetadataAllocated(snapshot_id=base, starting_offset=8 * MIB + 4096)
    assert [each.byte_offset for message in rest for each in message.block_metadata] == [8 * MIB + 4096]


def test_a_volume_can_be_made_as_another_one_was(here: Machine) -> None:
    """With the parameter ``moment`` a volume is what its source was then, also after that was deleted."""
    volume = here.create("past-source")
    target = here.publish(volume)
    (target / "x").write_text("then")
    moment = here.client.CreateSnapshot(source_volume_id=volume, name="past-mark").snapshot
    at = f"@{position_of(here, moment.snapshot_id)}"
    (target / "x").write_text("now")
    then = here.publish(here.clone("past-clone", volume, parameters={"moment": at}))
    assert (then / "x").read_text() == "then"
    here.unpublish(volume)
    here.client.DeleteVolume(volume_id=volume)
    parameters = {"moment": at, "source-volume": volume}
    assert (here.publish(here.create("past-deleted", parameters=parameters)) / "x").read_text() == "then"


def position_of(here: Machine, snapshot: str) -> int:
    """The position of the log a snapshot was taken at."""
    return int(here.call("stat", capsule=f"/csi/snapshots/{snapshot}")["change"])


def test_a_class_changes_the_policy_of_all_that_is_there(here: Machine) -> None:
    """After a modification what is in the volume, and what comes, follows the policy it names; others are refused."""
    volume = here.create("modified")
    target = here.publish(volume)
    (target / "old").write_text("x")
    here.client.ControllerModifyVolume(
        volume_id=volume, mutable_parameters={"compression": "zstd", "history": "1d"}
    )
    (target / "new").write_text("x")
    for name in ("", "/old", "/new"):
        found = here.call("stat", capsule=f"/csi/volumes/{volume}/data{name}")["policy"]
        assert (found["compression"], found["history"]) == ("zstd", "1d")
    modify = functools.partial(here.client.ControllerModifyVolume, volume_id=volume)
    assert code_of(lambda: modify(mutable_parameters={"speed": "high"})) == grpc.StatusCode.INVALID_ARGUMENT


def test_a_group_may_write_where_it_is_asked_for(here: Machine) -> None:
    """With a mount group, files there already and files to come belong to it, and it may write them."""
    volume = here.create("grouped")
    target = here.publish(volume)
    (target / "old").write_text("x")
    here.unpublish(volume)
    target = here.publish(volume, tree(volume_mount_group="4711"))
    (target / "new").write_text("x")
    for name in (".", "old", "new"):
        assert (target / name).stat().st_gid == 4711
    assert (target / "old").stat().st_mode & 0o060 == 0o060
    assert target.stat().st_mode & 0o2070 == 0o2070


def test_mount_flags_are_the_mounts(here: Machine) -> None:
    """Flags of a claim are in the mount table; those there are not are refused before anything is mounted."""
    volume = here.create("flags")
    target = here.publish(volume, tree(mount_flags=["noexec", "noatime"]))
    (options,) = [each.options for each in here.mounts() if each.point == str(target)]
    assert {"noexec", "noatime"} <= options
    wrong = lambda: here.publish(volume, tree(mount_flags=["bind,upperdir=/"]), pod="other")  # noqa: E731
    assert code_of(wrong) == grpc.StatusCode.INVALID_ARGUMENT


def test_a_pods_own_volume_comes_and_goes_with_it(here: Machine) -> None:
    """An inline volume is made by publishing and gone after unpublishing, by its own id only."""
    volume = "csi-" + "ab" * 32
    _, target = here.paths(volume)
    target.parent.mkdir(parents=True)
    context = {"csi.storage.k8s.io/ephemeral": "true", "size": "4MiB", "csi.storage.k8s.io/pod.name": "p"}
    for _ in range(2):
        here.client.NodePublishVolume(
            volume_id=volume, target_path=str(target), volume_capability=tree(), volume_context=context
        )
    (target / "x").write_text("scratch")
    assert here.client.ControllerGetVolume(volume_id=volume).volume.capacity_bytes == 4 * MIB
    for _ in range(2):
        here.client.NodeUnpublishVolume(volume_id=volume, target_path=str(target))
    assert not target.exists()
    assert code_of(lambda: here.client.ControllerGetVolume(volume_id=volume)) == grpc.StatusCode.NOT_FOUND


def test_one_workload_alone(here: Machine) -> None:
    """A volume for a single writer is refused at a second path and given there once the first is gone."""
    volume = here.create("alone", how=tree(_MODE.SINGLE_NODE_SINGLE_WRITER))
    how = tree(_MODE.SINGLE_NODE_SINGLE_WRITER)
    here.publish(volume, how, pod="one")
    assert code_of(lambda: here.publish(volume, how, pod="two")) == grpc.StatusCode.FAILED_PRECONDITION
    here.unpublish(volume, pod="one", last=False)
    here.publish(volume, how, pod="two")


def test_what_a_lost_node_had_can_be_used_elsewhere(here: Machine) -> None:
    """A single-node volume published on a node that is gone is free after unpublishing, without that node."""
    volume = here.create("lost")
    here.call("csi_register", node="other", zone="default", limit=0)
    publish = here.client.ControllerPublishVolume
    publish(volume_id=volume, node_id="other", volume_capability=tree())
    refused = lambda: publish(volume_id=volume, node_id="here", volume_capability=tree())  # noqa: E731
    assert code_of(refused) == grpc.StatusCode.FAILED_PRECONDITION
    assert code_of(lambda: here.client.DeleteVolume(volume_id=volume)) == grpc.StatusCode.FAILED_PRECONDITION
    here.client.ControllerUnpublishVolume(volume_id=volume, node_id="other")
    publish(volume_id=volume, node_id="here", volume_capability=tree())
    assert list(here.client.ControllerGetVolume(volume_id=volume).status.published_node_ids) == ["here"]


@pytest.mark.parametrize(
    "path", ["relative/path", "/", "/a/../b", "/./a", "/x\0y", "/" + "a" * 300, "/" + "a/" * 3000]
)
def test_paths_that_lead_elsewhere_are_refused(here: Machine, path: str) -> None:
    """A target that is no plain absolute path is an invalid argument, in every call that has one."""
    volume = here.create("paths")
    calls: Client = here.client
    stage = functools.partial(calls.NodeStageVolume, volume_capability=tree(), staging_target_path=path)
    unstage = functools.partial(calls.NodeUnstageVolume, staging_target_path=path)
    unpublish = functools.partial(calls.NodeUnpublishVolume, target_path=path)
    codes = {code_of(functools.partial(each, volume_id=volume)) for each in (stage, unstage, unpublish)}
    assert codes == {grpc.StatusCode.INVALID_ARGUMENT}


def test_targets_where_the_driver_keeps_its_own_are_refused(here: Machine) -> None:
    """Neither the data directory, nor what is above it, nor a symbolic link can be mounted on or removed."""
    volume = here.create("own")
    link = here.pods / "link"
    link.symlink_to("/etc")
    for path in (here.data / "wal", here.data, here.data.parent, link):
        work = lambda path=path: here.client.NodeStageVolume(  # noqa: E731
            volume_id=volume, staging_target_path=str(path), volume_capability=tree()
        )
        assert code_of(work) == grpc.StatusCode.INVALID_ARGUMENT
    assert link.is_symlink()


@pytest.mark.parametrize("volume", ["../../etc", "..", "a/b", "x" * 128, "csi-../../../etc", "01a1fe63"])
def test_ids_that_are_no_ids_are_nobodys(here: Machine, volume: str) -> None:
    """No id is ever taken for a path: it is not found, and removing it changes nothing."""
    before = [each.volume.volume_id for each in here.client.ListVolumes().entries]
    stage = lambda: here.client.NodeStageVolume(  # noqa: E731
        volume_id=volume, staging_target_path=str(here.pods / "s"), volume_capability=tree()
    )
    assert code_of(stage) == grpc.StatusCode.NOT_FOUND
    here.client.DeleteVolume(volume_id=volume)
    here.client.DeleteSnapshot(snapshot_id=volume)
    assert [each.volume.volume_id for each in here.client.ListVolumes().entries] == before


def test_unpublishing_removes_nothing_that_has_something_in_it(here: Machine) -> None:
    """A directory with files at a target that was never published is left as it is, with an error."""
    volume = here.create("careful")
    _, target = here.paths(volume)
    target.mkdir(parents=True)
    (target / "precious").touch()
    work = lambda: here.client.NodeUnpublishVolume(volume_id=volume, target_path=str(target))  # noqa: E731
    assert code_of(work) == grpc.StatusCode.INTERNAL
    assert (target / "precious").exists()


def test_secrets_are_checked_and_never_shown(here: Machine) -> None:
    """A secret with a key that is none, or too large, is refused by an error that does not show it."""
    for secrets in ({"a b": "hunter2"}, {"token": "hunter2" * 20_000}):
        with pytest.raises(grpc.RpcError) as caught:
            here.create("secret", secrets=secrets)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "hunter2" not in str(caught.value.details())


def test_a_name_is_one_volume_whoever_asks_how_often(here: Machine) -> None:
    """Many callers at once with one name get one volume; another kind of volume under it is refused."""
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(here.create("the same"))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    assert len(set(found)) == 1
    assert code_of(lambda: here.create("the same", 64 * MIB)) == grpc.StatusCode.ALREADY_EXISTS
    assert code_of(lambda: here.create("the same", how=device())) == grpc.StatusCode.ALREADY_EXISTS


def test_an_id_is_never_given_twice(here: Machine) -> None:
    """A name used again after its volume was deleted is another volume, empty, with another id."""
    first = here.create("again")
    (here.publish(first) / "x").touch()
    here.unpublish(first)
    here.client.DeleteVolume(volume_id=first)
    second = here.create("again")
    assert second != first
    assert list(here.publish(second).iterdir()) == []
    here.client.DeleteVolume(volume_id=first)
    assert here.client.ControllerGetVolume(volume_id=second).volume.volume_id == second


def test_what_was_deleted_can_be_brought_back(here: Machine) -> None:
    """A volume removed is in the log: undelete gives it back, with its bytes."""
    volume = here.create("regretted")
    (here.publish(volume) / "x").write_text("precious")
    here.unpublish(volume)
    here.client.DeleteVolume(volume_id=volume)
    here.call("undelete", capsule=f"/csi/volumes/{volume}")
    assert (here.publish(volume) / "x").read_text() == "precious"


def test_metrics_count_calls(tmp_path: Path) -> None:
    """A driver asked for metrics counts each call by method and code."""
    with machine(tmp_path, "--metrics", "127.0.0.1:0") as made:
        made.create("counted")
        port = wait_for(lambda: listening(made.driver))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
        assert 'csi_operations_total{method="CreateVolume",code="OK"} 1' in text


def listening(pid: int) -> int:
    """The TCP port a process listens on; 0 if it has none."""
    inodes = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        if each.exists() or each.is_symlink():
            inodes.add(os.readlink(each))
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
            return int(fields[1].partition(":")[2], 16)
    return 0


def test_an_owner_that_shows_no_volumes_is_named(tmp_path: Path) -> None:
    """Where another process has the store open and shows no volumes, the driver ends and says what to do."""
    with Store(tmp_path / "data") as store, ControlServer(store):
        for options in (["--mode", "all"], ["--mode", "controller"]):
            done = finish(start(tmp_path / "data", "csi", "--endpoint", tmp_path / "csi.sock", *options))
            assert done.status == 7
            assert "space csi --mode store" in done.err
