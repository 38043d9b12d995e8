"""The Linux kernel's native multipath over the nodes of a cluster, of which some are killed.

The host runs in a throw-away guest; see test_nvme_kernel.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests import guest_support
from tests.guest_support import facts
from tests.nvme_cluster import Cluster, founding

pytestmark = [
    pytest.mark.integration,
    pytest.mark.requires("py:space_raft_engine"),
    pytest.mark.skipif(
        os.environ.get("SPACE_GUEST") != "1",
        reason="boots a virtual machine: set SPACE_GUEST=1 (docs/nvme.md)",
    ),
]

PATHS: Final = """
# A path through every node, whose ports are the arguments after the second.
shift 2
for port in "$@"; do nvme connect -t tcp -a 10.0.2.2 -s "$port" -n "$NQN" -i 2 -c 1 -l 600 >&2; done
D=$(device 1)

# states: the ANA states of the paths that are live, sorted
states() {
  local each
  for each in /sys/class/nvme/nvme*; do
    [ "$(cat "$each/state")" = live ] || continue
    cat "$each"/nvme*c*n*/ana_state
  done | sort | xargs
}

# wait_for STATES: until the paths are so
wait_for() {
  local i
  for i in $(seq 600); do [ "$(states)" != "$1" ] || return 0; sleep 0.1; done
  echo "paths: $(states), not: $1" >&2; dmesg | tail -n 50 >&2; return 1
}
ALL="non-optimized non-optimized optimized"
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Three nodes that serve a device of 128 MiB."""
    with founding(tmp_path / "cluster", size="128MiB") as found:
        found.start(*found.directories)
        found.leader()
        yield found


def run(cluster: Cluster, body: str, tmp_path: Path) -> str:
    """What a job prints in a guest that can have nodes killed and started again."""
    killed: list[int] = []

    def kill(which: str) -> str:
        number = cluster.leader()
        if which == "follower":
            number = next(each for each in cluster.nodes if each != number)
        cluster.kill(number)
        killed.append(number)
        return str(number)

    def restart() -> str:
        number = killed.pop()
        cluster.start(number)
        return str(number)

    def lead() -> str:
        old = cluster.leader()
        new = next(each for each in cluster.nodes if each != old)
        cluster.lead(new)
        return str(new)

    arguments = [str(cluster.ports[1]), cluster.nqn(1), *map(str, cluster.ports.values())]
    return guest_support.run(
        arguments, "nvme_prelude.sh", PATHS + body, tmp_path, kill=kill, restart=restart, lead=lead
    )


def test_nodes_die_under_a_file_system(cluster: Cluster, tmp_path: Path) -> None:
    """The leader is killed twice, and a follower, under fio with verification: no error, all paths come back."""
    job = """
    echo multipath=$(cat /sys/module/nvme_core/parameters/multipath)
    wait_for "$ALL"; nvme list-subsys >&2; echo paths=$(nvme list-subsys | grep -c live)
    mkfs.ext4 -q "$D"; mkdir /m; mount "$D" /m; cp -a /etc /m; sync
    (
      rounds=0
      while [ ! -e /tmp/enough ]; do
        fio --name=v --directory=/m --rw=randwrite --bs=4k --size=8m --iodepth=16 --ioengine=libaio --direct=1 \\
          --verify=crc32c --verify_fatal=1 --do_verify=1 >/tmp/fio 2>&1 || { cat /tmp/fio >&2; exit 1; }
        rounds=$((rounds + 1)); echo $rounds >/tmp/rounds
      done
    ) & load=$!
    for which in leader follower leader; do
      sleep 2; kill -0 $load; echo "killed: $(ask kill $which)" >&2
      sleep 5; kill -0 $load; before=$(cat /tmp/rounds 2>/dev/null || echo 0)
      for i in $(seq 600); do [ "$(cat /tmp/rounds 2>/dev/null || echo 0)" = "$before" ] || break; sleep 0.1; done
      [ "$(cat /tmp/rounds)" != "$before" ] # it went on with two nodes
      ask restart >&2; wait_for "$ALL"; nvme list-subsys >&2
    done
    touch /tmp/enough; wait $load; echo rounds=$(cat /tmp/rounds)
    ! dmesg | grep -iE "I/O error|EXT4-fs error|critical"
    echo 3 >/proc/sys/vm/drop_caches; diff -r --no-dereference /etc /m/etc
    umount /m; fsck.ext4 -fn "$D" >&2; echo reconnected=$(dmesg | grep -c "Successfully reconnected")
    dmesg | grep nvme >&2; disconnect
    """
    found = facts(run(cluster, job, tmp_path))
    assert (found["multipath"], found["paths"]) == ("Y", "3")
    assert int(found["rounds"]) >= 3
    assert int(found["reconnected"]) >= 3


def test_the_path_follows_the_leader(cluster: Cluster, tmp_path: Path) -> None:
    """When another node leads, the host learns which path is optimized now, and goes on by it."""
    job = """
    optimized() { grep -lx optimized /sys/class/nvme/nvme*/nvme*c*n*/ana_state; }
    wait_for "$ALL"; before=$(optimized); dd if=/dev/urandom of="$D" bs=64k count=64 oflag=direct
    head -c 4194304 "$D" >/tmp/held
    ask lead >&2; for i in $(seq 100); do [ "$(optimized)" = "$before" ] || break; sleep 0.1; done
    wait_for "$ALL"; [ "$(optimized)" != "$before" ]; nvme ana-log /dev/nvme0 >&2
    dd if="$D" bs=64k count=64 iflag=direct | cmp - /tmp/held
    disconnect
    """
    run(cluster, job, tmp_path)


def test_reservations_of_the_kernel(cluster: Cluster, tmp_path: Path) -> None:
    """What the host registers and acquires by one path holds on all of them, and persists through power loss."""
    job = """
    wait_for "$ALL"
    nvme resv-register "$D" --nrkey=5 --rrega=0 --cptpl=3
    nvme resv-acquire "$D" --crkey=5 --rtype=1 --racqa=0
    dd if=/dev/zero of="$D" bs=4k count=16 oflag=direct
    for i in 0 1 2; do nvme resv-report /dev/ng0n1 --eds | tee /tmp/report >&2; grep -q "rtype *: 1" /tmp/report; done
    echo killed=$(ask kill leader); ask restart >&2; wait_for "$ALL"
    nvme resv-report "$D" --eds | tee /tmp/report >&2; grep -q "rtype *: 1" /tmp/report
    grep -qi "rkey *: *0*5$" /tmp/report; grep -q "ptpls *: 1" /tmp/report
    nvme resv-release "$D" --crkey=5 --rtype=1 --rrela=0; nvme resv-register "$D" --crkey=5 --rrega=1
    disconnect
    """
    run(cluster, job, tmp_path)
