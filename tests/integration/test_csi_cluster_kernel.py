"""Volumes of a cluster on a node without a store, with the Linux kernel's own clients, while nodes of the cluster die.

The node is a throw-away guest; see test_csi_network.py.  What is done in it is in tests/guest/csi_node.py.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from space.projections.csi.pb import csi_pb2 as pb
from tests.csi_cluster import Cluster, founding
from tests.csi_guest import HOST, PASSED_MIN, SANITY, Answers, forwarding, run

pytestmark = [
    pytest.mark.integration,
    pytest.mark.requires("py:space_raft_engine", "py:grpc"),
    pytest.mark.skipif(
        os.environ.get("SPACE_GUEST") != "1",
        reason="boots a virtual machine: set SPACE_GUEST=1 (docs/csi.md)",
    ),
]


class Owner(Answers):
    """A cluster, and its controller."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._volumes: dict[str, pb.Volume] = {}
        self._transport = ""

    def on_create(self, name: str, transport: str, size: str, source: str = "") -> Any:
        more: dict[str, Any] = {}
        if source:
            found = pb.VolumeContentSource.SnapshotSource(snapshot_id=source)
            more["volume_content_source"] = pb.VolumeContentSource(snapshot=found)
        volume = self._cluster.create(name, transport, int(size), **more)
        self._volumes[volume.volume_id] = volume
        self._transport = transport
        return {"id": volume.volume_id, "context": dict(volume.volume_context)}

    def on_attach(self, volume: str, node: str) -> Any:
        return self._cluster.attach(self._volumes[volume], node)

    def on_detach(self, volume: str, node: str) -> Any:
        self._cluster.detach(self._volumes[volume], node)

    def on_group(self, name: str, *volumes: str) -> Any:
        answer = self._cluster.client.CreateVolumeGroupSnapshot(name=name, source_volume_ids=volumes)
        return {each.source_volume_id: each.snapshot_id for each in answer.group_snapshot.snapshots}

    def on_again(self) -> Any:
        """The node that serves is killed; one that was killed before is there again first."""
        cluster = self._cluster
        if gone := cluster.directories.keys() - cluster.nodes.keys():
            cluster.start(*gone)
        cluster.kill(cluster.serving() if self._transport == "nfs" else cluster.leader())


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes that serve volumes."""
    with founding(tmp_path_factory.mktemp("csi"), advertise=HOST) as found:
        yield found


@pytest.fixture
def cluster(founded: Cluster) -> Iterator[Cluster]:
    """The cluster with all its nodes running, and no volumes before and afterwards."""
    if gone := founded.directories.keys() - founded.nodes.keys():
        founded.start(*gone)
    founded.leader()
    founded.serving()
    yield founded
    for snapshot in founded.client.ListSnapshots().entries:
        founded.client.DeleteSnapshot(snapshot_id=snapshot.snapshot.snapshot_id)
    for volume in founded.client.ListVolumes().entries:
        founded.client.ControllerUnpublishVolume(volume_id=volume.volume.volume_id)
        founded.client.DeleteVolume(volume_id=volume.volume.volume_id)


@pytest.mark.parametrize("transport", ["nfs", "nvme"])
def test_the_node_that_serves_is_killed_under_a_writer(
    cluster: Cluster, tmp_path: Path, transport: str
) -> None:
    """A pod writes on when the node that serves its volume is killed, twice, and no write it synchronized is lost."""
    run(Owner(cluster), tmp_path / "guest", "kill_owner", transport)


def test_a_group_is_one_cut_through_both_transports(cluster: Cluster, tmp_path: Path) -> None:
    """A group of snapshots of volumes over NFS and NVMe has every write synchronized before it, and none after."""
    run(Owner(cluster), tmp_path / "guest", "cut")


def test_a_lost_node_is_shut_out(cluster: Cluster, tmp_path: Path) -> None:
    """A node that a volume was taken from while it had it mounted or connected can use it no more, by no path."""
    run(Owner(cluster), tmp_path / "guest", "shut_out")


def test_the_driver_killed_under_a_writer(cluster: Cluster, tmp_path: Path) -> None:
    """A pod whose tree is reached through the driver writes on with the next driver, at the same address."""
    run(Owner(cluster), tmp_path / "guest", "restart")


@pytest.mark.skipif(not SANITY, reason="csi-sanity is neither at CSI_SANITY nor on PATH")
@pytest.mark.parametrize("transport", ["nfs", "nvme"])
def test_the_suite_passes(cluster: Cluster, tmp_path: Path, transport: str) -> None:
    """csi-sanity passes on a node without a store whose volumes a cluster owns, and leaves nothing behind."""
    home = tmp_path / "guest"
    (home / "share").mkdir(parents=True)
    shutil.copy(SANITY, home / "share" / "csi-sanity")
    assert cluster.client.Probe().ready.value
    with forwarding(cluster.socket) as port:
        said = run(Owner(cluster), home, "sanity", transport, str(port))
    passed, failed = map(int, re.findall(r"(\d+) (?:Passed|Failed)", said)[-2:])
    assert failed == 0
    assert passed >= PASSED_MIN, said
    assert not cluster.client.ListVolumes().entries
