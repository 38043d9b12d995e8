"""Volumes over NFS and NVMe/TCP on nodes that have no store, with the Linux kernel's own clients.

The nodes are throw-away guests (tests/guest/guest.sh), because nothing but a kernel can be such a client: these tests
run where SPACE_GUEST=1 asks for them.  Owner and controller run here.  What is done in the guests is in
tests/guest/csi_node.py.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

from space.projections.csi.pb import csi_pb2 as pb
from tests import guest_support
from tests.csi_client import device, tree
from tests.csi_guest import HOST, PASSED_MIN, SANITY, Answers, forwarding, run
from tests.csi_support import NEEDS_KERNEL, Machine

pytestmark = [
    *NEEDS_KERNEL,
    pytest.mark.skipif(
        os.environ.get("SPACE_GUEST") != "1",
        reason="boots a virtual machine: set SPACE_GUEST=1 (docs/csi.md)",
    ),
]

_MODE: Final = pb.VolumeCapability.AccessMode


def free_port() -> int:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


class Owner(Machine, Answers):
    """Owner and controller, and answers to what nodes ask."""

    meeting: threading.Barrier
    later: dict[str, Any]

    def serve(self) -> None:
        """Starts both."""
        self.options = [
            "--nfs",
            f"127.0.0.1:{free_port()}",
            "--nvme",
            f"127.0.0.1:{free_port()}",
            "--advertise",
            HOST,
        ]
        self.start(*self.options)

    def stop(self) -> None:
        """Ends both, silenced or not."""
        if owner := self.owner:
            os.kill(owner, signal.SIGCONT)
        super().stop()

    def on_create(self, name: str, transport: str, size: str, source: str = "") -> Any:
        more: dict[str, Any] = {}
        if source:
            found = pb.VolumeContentSource.SnapshotSource(snapshot_id=source)
            more["volume_content_source"] = pb.VolumeContentSource(snapshot=found)
        volume = self.client.CreateVolume(
            name=name,
            capacity_range=pb.CapacityRange(required_bytes=int(size)),
            volume_capabilities=[tree() if transport == "nfs" else device()],
            parameters={"transport": transport},
            **more,
        ).volume
        return {"id": volume.volume_id, "context": dict(volume.volume_context)}

    def on_attach(self, volume: str, node: str) -> Any:
        block = self.client.ControllerGetVolume(volume_id=volume).volume.volume_context["type"] == "block"
        how = (device if block else tree)(_MODE.MULTI_NODE_MULTI_WRITER)
        answer = self.client.ControllerPublishVolume(volume_id=volume, node_id=node, volume_capability=how)
        return dict(answer.publish_context)

    def on_detach(self, volume: str, node: str) -> Any:
        self.client.ControllerUnpublishVolume(volume_id=volume, node_id=node)

    def on_snapshot(self, volume: str, name: str) -> Any:
        return self.client.CreateSnapshot(source_volume_id=volume, name=name).snapshot.snapshot_id

    def on_expand(self, volume: str, size: str) -> Any:
        wanted = pb.CapacityRange(required_bytes=int(size))
        self.client.ControllerExpandVolume(volume_id=volume, capacity_range=wanted)

    def on_meet(self) -> Any:
        """Waits for the other node."""
        self.meeting.wait(guest_support.GUEST_SECONDS)

    def on_group(self, name: str, *volumes: str) -> Any:
        answer = self.client.CreateVolumeGroupSnapshot(name=name, source_volume_ids=volumes)
        return {each.source_volume_id: each.snapshot_id for each in answer.group_snapshot.snapshots}

    def on_silence(self) -> Any:
        """The owner takes connections and says nothing."""
        self.later = self.on_create("later", "nfs", str(1 << 20))
        self.later["published"] = self.on_attach(self.later["id"], "worker@127.0.0.1")
        os.kill(self.owner, signal.SIGSTOP)

    def on_create_later(self, transport: str) -> Any:
        return self.later

    def on_speech(self) -> Any:
        os.kill(self.owner, signal.SIGCONT)

    def on_again(self) -> Any:
        """The owner is killed; another one serves."""
        self.kill_owner()


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    """A store that is served."""
    with Owner(tmp_path) as made:
        made.serve()
        yield made


def test_a_tree_over_nfs(owner: Owner, tmp_path: Path) -> None:
    """What was synchronized before a snapshot is in it and nothing later; capacity is enforced, shown, and grows."""
    run(owner, tmp_path / "guest", "tree")


def test_a_device_over_nvme(owner: Owner, tmp_path: Path) -> None:
    """What was synchronized before a snapshot is in it and nothing later; the device grows while it is open."""
    run(owner, tmp_path / "guest", "device")


def test_flags_of_the_nfs_client(owner: Owner, tmp_path: Path) -> None:
    """Whatever mount flag the driver takes for NFS, the kernel takes."""
    run(owner, tmp_path / "guest", "flags")


@pytest.mark.parametrize("transport", ["nfs", "nvme"])
def test_the_driver_killed_at_every_step(owner: Owner, tmp_path: Path, transport: str) -> None:
    """Before whichever step a node's driver is killed: asked again, the volume is there once and whole, then gone."""
    run(owner, tmp_path / "guest", "kill_driver", transport)


@pytest.mark.parametrize("transport", ["nfs", "nvme"])
def test_the_owner_killed_under_a_writer(owner: Owner, tmp_path: Path, transport: str) -> None:
    """A writer waits while the owner is killed and started again, and no write it synchronized is lost."""
    run(owner, tmp_path / "guest", "kill_owner", transport)


def test_two_nodes_share_a_tree(owner: Owner, tmp_path: Path) -> None:
    """Two nodes write one tree: each sees the other's files, and locks keep them apart."""
    meeting = threading.Barrier(2)
    owner.meeting = meeting
    with ThreadPoolExecutor(2) as threads:
        ends = [
            threads.submit(run, owner, tmp_path / mine, "shared", mine, theirs, name=mine)
            for mine, theirs in (("left", "right"), ("right", "left"))
        ]
        for each in ends:
            each.result()


def test_a_group_is_one_cut_through_both_transports(owner: Owner, tmp_path: Path) -> None:
    """A group of snapshots of volumes over NFS and NVMe has every write synchronized before it, and none after."""
    run(owner, tmp_path / "guest", "cut")


def test_an_owner_that_says_nothing(owner: Owner, tmp_path: Path) -> None:
    """Statistics and unpublishing do not wait for an owner that does not answer; staging says that it does not."""
    run(owner, tmp_path / "guest", "silent")


@pytest.mark.skipif(not SANITY, reason="csi-sanity is neither at CSI_SANITY nor on PATH")
@pytest.mark.parametrize("transport", ["nfs", "nvme"])
def test_the_suite_passes(owner: Owner, tmp_path: Path, transport: str) -> None:
    """csi-sanity passes on a node without a store, with the controller elsewhere, and leaves nothing behind."""
    home = tmp_path / "guest"
    (home / "share").mkdir(parents=True)
    shutil.copy(SANITY, home / "share" / "csi-sanity")
    with forwarding(owner.socket) as port:
        said = run(owner, home, "sanity", transport, str(port))
    passed, failed = map(int, re.findall(r"(\d+) (?:Passed|Failed)", said)[-2:])
    assert failed == 0
    assert passed >= PASSED_MIN, said
    assert not owner.client.ListVolumes().entries


def test_a_lost_node_is_shut_out(owner: Owner, tmp_path: Path) -> None:
    """A node that a volume was taken from while it had it mounted or connected can use it no more."""
    run(owner, tmp_path / "guest", "shut_out")
