"""Driver and owner killed at every step of staging and publishing, and of taking it back."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from space._node import csi_mounts
from space.projections.csi.pb import csi_pb2 as pb
from tests.csi_client import MIB, device, tree
from tests.csi_support import NEEDS_KERNEL, READY_SECONDS, Machine, alive, machine, wait_for

pytestmark = NEEDS_KERNEL

WORKER = "csi_killed_worker.py"
STEPS_MAX = 100
WAYS = [pytest.param(False, id="tree"), pytest.param(True, id="device")]
_READ_ONLY = pb.VolumeCapability.AccessMode.SINGLE_NODE_READER_ONLY


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Machine]:
    """A machine whose driver is not started yet."""
    with Machine(tmp_path) as made:
        yield made


def again(here: Machine, work: Callable[[], object]) -> None:
    """What an orchestrator does: it asks until it is done."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            work()
        except grpc.RpcError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            return


def check_whole(here: Machine, volume: str, *, block: bool) -> None:
    """A volume published is there once, live, and takes bytes."""
    _, target = here.paths(volume)
    assert [each.point for each in here.mounts()].count(str(target)) == 1
    assert len(here.mounts()) == (1 if block else 2)
    assert len(here.loops()) == int(block)
    file = target if block else target / "file"
    with file.open("r+b" if file.exists() else "wb") as opened:
        opened.write(os.urandom(4096))
        opened.flush()
        os.fsync(opened.fileno())


def check_gone(here: Machine, volume: str) -> None:
    """Nothing of a volume is left on the machine."""
    _, target = here.paths(volume)
    assert (here.mounts(), here.loops(), target.exists()) == ([], [], False)
    assert list((here.data / "csi" / "notes").glob("*.json")) == []


def _replaced(here: Machine, owner: int) -> bool:
    """Whether another owner is there in place of one that was killed."""
    return not alive(owner) and here.owner not in {0, owner}


def steps_of(here: Machine, tmp_path: Path, work: Callable[[], object]) -> int:
    """How many steps something takes, undisturbed."""
    armed = tmp_path / "steps"
    armed.write_text("0 nobody 0")
    work()
    count = int(armed.read_text().split()[0])
    armed.unlink()
    assert 0 < count < STEPS_MAX
    return count


@pytest.mark.parametrize("block", WAYS)
@pytest.mark.parametrize("who", ["driver", "owner"])
def test_killed_at_every_step(here: Machine, tmp_path: Path, who: str, block: bool) -> None:
    """Whoever is killed before whichever step: asked again, the volume is published once and whole, and then gone."""
    how = device() if block else tree()
    environment = {"CSI_STEPS": str(tmp_path / "steps")}
    here.start(worker=WORKER, environment=environment)
    volume = here.create("killed", 4 * MIB, how)

    def publish() -> None:
        here.publish(volume, how)

    def unpublish() -> None:
        here.unpublish(volume)

    up, down = steps_of(here, tmp_path, publish), steps_of(here, tmp_path, unpublish)
    for work, number in [(publish, n + 1) for n in range(up)] + [(unpublish, n + 1) for n in range(down)]:
        if work is unpublish:
            publish()
        owner = here.owner
        (tmp_path / "steps").write_text(f"0 {who} {number}")
        disturbed = False
        try:
            work()
        except grpc.RpcError:
            disturbed = True
        (tmp_path / "steps").unlink()
        if who == "driver":
            assert disturbed, f"step {number} of {work.__name__} was not taken: there were {up} and {down}"
            here.gone()
            here.start(worker=WORKER, environment=environment)
            assert here.owner == owner  # whoever kills the driver disturbs no workload
        else:
            wait_for(functools.partial(_replaced, here, owner))
        wait_for(lambda: here.client.Probe().ready.value)
        again(here, work)
        if work is publish:
            check_whole(here, volume, block=block)
            again(here, unpublish)
        check_gone(here, volume)


@pytest.mark.parametrize("block", WAYS)
def test_a_killed_driver_disturbs_nobody(here: Machine, block: bool) -> None:
    """Files open through a published volume go on being written while the driver is killed and started again."""
    how = device() if block else tree()
    here.start()
    volume = here.create("undisturbed", 4 * MIB, how)
    target = here.publish(volume, how)
    before = here.mounts()
    with (target if block else target / "file").open("r+b" if block else "w+b", buffering=0) as file:
        for number in range(4):
            here.kill_driver()
            os.pwrite(file.fileno(), bytes([number]) * 4096, number * 4096)
            os.fsync(file.fileno())
            here.start()
            assert os.pread(file.fileno(), 1, number * 4096) == bytes([number])
    assert here.mounts() == before


def test_a_killed_owner_is_replaced_under_every_mount(here: Machine) -> None:
    """After the owner of the store is killed, each staged and published path is live again, once, with its bytes and as
    read-only as it was; what was not published is not.
    """
    here.start()
    volumes = [here.create(f"owned-{n}", 4 * MIB) for n in range(3)]
    for volume in volumes[:2]:
        (here.publish(volume) / "file").write_text(volume)
    block = here.create("owned-device", 4 * MIB, device())
    raw = here.publish(block, device())
    descriptor = os.open(raw, os.O_WRONLY)
    os.pwrite(descriptor, b"raw bytes".ljust(4096), 0)
    os.fsync(descriptor)
    os.close(descriptor)
    readonly = here.publish(here.clone("owned-ro", volumes[0], 4 * MIB, tree(_READ_ONLY)), tree(_READ_ONLY))
    before = sorted(
        (each.point, each.root, each.readonly) for each in here.mounts() if each.kind != "devtmpfs"
    )
    for _ in range(2):
        here.kill_owner()
        after = [(each.point, each.root, each.readonly) for each in here.mounts() if each.kind != "devtmpfs"]
        assert sorted(after) == before
        for volume in volumes[:2]:
            assert (here.paths(volume)[1] / "file").read_text() == volume
        with raw.open("rb") as opened:
            assert opened.read(9) == b"raw bytes"
        assert (readonly / "file").read_text() == volumes[0]
        with pytest.raises(OSError, match="Read-only file system"):
            (readonly / "x").touch()
        answer = here.client.NodeGetVolumeStats(
            volume_id=volumes[0], volume_path=str(here.paths(volumes[0])[1])
        )
        assert not answer.volume_condition.abnormal


def test_both_killed_and_only_the_driver_started(here: Machine) -> None:
    """A driver that finds neither owner nor live mounts starts the one and puts the others right."""
    here.start()
    volume = here.create("both", 4 * MIB)
    (here.publish(volume) / "file").write_text("kept")
    owner = here.owner
    here.kill_driver()
    os.kill(owner, signal.SIGKILL)
    wait_for(lambda: not alive(owner))
    here.start()
    assert (here.paths(volume)[1] / "file").read_text() == "kept"
    assert len(here.mounts()) == 2


def test_what_the_machine_forgot_is_not_mounted_again(tmp_path: Path) -> None:
    """Paths that have nothing mounted any more when the driver starts (the machine was started anew) stay so."""
    with machine(tmp_path) as here:
        volume = here.create("forgotten", 4 * MIB)
        staging, target = here.paths(volume)
        here.publish(volume)
        here.kill_driver()
        for path in (target, staging):
            csi_mounts.unmount(str(path))
        here.start()
        assert here.mounts() == []
        here.publish(volume)
        assert len(here.mounts()) == 2
