"""The Linux kernel's own client at an address that moves through a cluster, whose serving node is killed under it.

The client runs in a throw-away guest; see test_nfs_kernel.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import attrs
import pytest

from tests.integration.test_nfs_kernel import GIT, run
from tests.nfs_cluster import Cluster, founding

pytestmark = [
    pytest.mark.integration,
    pytest.mark.requires("py:space_raft_engine"),
    pytest.mark.skipif(
        os.environ.get("SPACE_GUEST") != "1",
        reason="boots a virtual machine: set SPACE_GUEST=1 (docs/nfs.md)",
    ),
]


@attrs.define
class Served:
    """A cluster in the place of the one server that a job knows."""

    cluster: Cluster
    epochs: list[int] = attrs.field(factory=list)
    dead: int = 0

    @property
    def port(self) -> int:
        return self.cluster.floating.address[1]

    def again(self) -> str:
        """Kills the node that serves, and has another one serve."""
        self.kill()
        self.restart()
        return "served"

    def kill(self) -> None:
        """Kills the node that serves."""
        old = self.cluster.serving()
        self.epochs.append(self.cluster.epoch(old))
        self.cluster.kill(old)
        self.dead = old

    def restart(self) -> None:
        """The address leads to the next one, and the dead one is started again."""
        self.cluster.serving(after=self.epochs[-1])
        self.cluster.start(self.dead)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """Three nodes, of which one serves."""
    with founding(tmp_path / "cluster") as cluster:
        cluster.start(*cluster.directories)
        cluster.serving()
        yield Served(cluster)


def test_fio_and_git_while_servers_die(served: Served, tmp_path: Path) -> None:
    """Synced writes verify, and git finds every object, while two nodes that serve are killed one after the other."""
    job = f"""{GIT}
    fio="fio --name=v --directory=/n --rw=randwrite --bs=4k --size=8m --fsync=16 --verify=crc32c --verify_fatal=1"
    busy() {{ set -e; while [ -e /tmp/under ]; do $fio; repository /n/r; done; }}
    mounted 4.2; mkdir /n/held; exec 9>/n/held/lock; flock 9
    between busy
    flock -n /n/held/lock true && exit 1; exec 9>&-
    anew 4.2; for each in one two; do cd /n/r/$each; git fsck --full; done; cd /; umount /n
    """
    run(cast("Any", served), job, tmp_path, seconds=500)
    assert len(set(served.epochs)) == 2
