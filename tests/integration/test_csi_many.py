"""Many volumes at once, and nothing left of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.csi_client import MIB, device, tree
from tests.csi_support import NEEDS_KERNEL, Machine, machine

pytestmark = NEEDS_KERNEL

VOLUMES = 200
AT_ONCE = 32
DEVICES_EVERY = 10
"""One in so many is a block device: the machine has to make a loop device for each."""


def descriptors(pid: int) -> int:
    """Open files of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def children(pid: int) -> list[int]:
    """Processes a process has started and that are still there."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_many_volumes_at_once_leave_nothing(tmp_path: Path) -> None:
    """Two hundred volumes made, published, written, read, taken away and deleted at once leave no mount, no device, no
    process, no file and no open descriptor behind.
    """
    with machine(tmp_path) as here:
        life(here, 0)()  # whatever is opened once and kept
        before = Path("/proc/self/mountinfo").read_text()
        counts = [descriptors(pid) for pid in (here.driver, here.owner)]
        kin = [children(pid) for pid in (here.driver, here.owner)]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            for done in [threads.submit(life(here, number)) for number in range(1, VOLUMES + 1)]:
                done.result()
        assert Path("/proc/self/mountinfo").read_text() == before
        assert (here.mounts(), here.loops()) == ([], [])
        assert not here.client.ListVolumes().entries
        assert not here.client.ListSnapshots().entries
        assert [each for each in here.pods.rglob("*") if not each.is_dir() or each.name == "mount"] == []
        assert list((here.data / "csi" / "notes").iterdir()) == []
        assert [children(pid) for pid in (here.driver, here.owner)] == kin
        now = [descriptors(pid) for pid in (here.driver, here.owner)]
        # sockets of calls that have just ended may still be closing
        assert all(after <= count + AT_ONCE for after, count in zip(now, counts, strict=True))
        for kind in ("volumes", "snapshots", "names"):
            assert list(here.call("ls", path=f"/csi/{kind}")) == []


def life(here: Machine, number: int) -> Callable[[], None]:
    """All that happens to one volume."""

    def run() -> None:
        block = number % DEVICES_EVERY == 1
        how = device() if block else tree()
        volume = here.create(f"many-{number}", 4 * MIB, how)
        target = here.publish(volume, how)
        file = target if block else target / "file"
        content = f"{number} in {threading.get_ident()}".encode().ljust(4096, b".")
        with file.open("r+b" if block else "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        with file.open("rb") as opened:
            assert opened.read(4096) == content
        snapshot = here.client.CreateSnapshot(
            source_volume_id=volume, name=f"many-{number}"
        ).snapshot.snapshot_id
        here.unpublish(volume)
        here.client.DeleteVolume(volume_id=volume)
        here.client.DeleteSnapshot(snapshot_id=snapshot)

    return run
