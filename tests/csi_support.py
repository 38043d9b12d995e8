"""A driver with its owner of the store, and what an orchestrator does with it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

import grpc
import pytest

from space._node import csi_mounts
from space._node.views import start_time
from space.control import connect
from space.projections.csi.pb import csi_pb2 as pb
from tests.csi_client import MIB, Client, tree

HERE: Final = Path(__file__).parent
READY_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.02

NEEDS_KERNEL: Final = [
    pytest.mark.requires("/dev/fuse", "/dev/loop-control", "fusermount3", "py:pyfuse3", "py:grpc"),
    pytest.mark.skipif(os.geteuid() != 0, reason="bind mounts need root"),
]


def alive(pid: int) -> bool:
    """Whether a process runs."""
    return start_time(pid) != 0


def wait_for(what: Any, seconds: float = READY_SECONDS) -> Any:
    """What ``what`` returns once that is true; hangs are found, nothing is timed."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(POLL_SECONDS)
    return found


def code_of(work: Any) -> grpc.StatusCode:
    """How a call ended that has to fail."""
    with pytest.raises(grpc.RpcError) as caught:
        work()
    code: grpc.StatusCode = caught.value.code()
    return code


class Machine:
    """A data directory with a driver on it, and the directory an orchestrator keeps its targets in."""

    def __init__(self, home: Path) -> None:
        self.data = home / "data"
        self.socket = home / "csi.sock"
        self.pods = home / "pods"
        self.pods.mkdir(exist_ok=True)
        self._log = home / "driver.log"
        self._driver: subprocess.Popen[bytes] | None = None
        self._client: Client | None = None

    # --- processes -------------------------------------------------------------------------------

    def start(
        self, *options: str, worker: str | None = None, environment: dict[str, str] | None = None
    ) -> Client:
        """Starts the driver (``worker``: a program of the tests that runs it) and waits until it answers."""
        program = (
            [str(HERE / worker)]
            if worker
            else ["-c", "import sys; from space.cli import main; sys.exit(main())"]
        )
        command = [sys.executable, *program, "--data", str(self.data), "csi", "--endpoint", str(self.socket)]
        with self._log.open("ab") as log:
            self._driver = subprocess.Popen(
                [*command, "--node-id", "here", *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(HERE.parent), **(environment or {})},
            )
        assert self._driver.stdout is not None
        line = self._driver.stdout.readline()
        assert line, self._log.read_text()
        if self._client is not None:
            self._client.close()
        self._client = Client(self.socket)
        return self._client

    @property
    def client(self) -> Client:
        """The driver's calls."""
        assert self._client is not None
        return self._client

    @property
    def driver(self) -> int:
        """The driver's process."""
        assert self._driver is not None
        return self._driver.pid

    @property
    def owner(self) -> int:
        """The owner's process; 0 if there is none."""
        for note in (self.data / "views").glob("csi-*.json"):
            with contextlib.suppress(ValueError, OSError):
                found = json.loads(note.read_text())
                if start_time(found["pid"]) == found["process_start"]:
                    return int(found["pid"])
        return 0

    def kill_driver(self) -> None:
        """As a kubelet's container runtime does it when it has lost patience."""
        assert self._driver is not None
        self._driver.kill()
        self.gone()

    def gone(self) -> None:
        """Waits until the driver has ended."""
        assert self._driver is not None
        self._driver.wait(READY_SECONDS)
        assert self._driver.stdout is not None
        self._driver.stdout.close()
        self._driver = None

    def kill_owner(self) -> int:
        """Kills the owner and waits until another one answers for the store."""
        before: int = wait_for(lambda: self.owner)
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: not alive(before))
        wait_for(lambda: self.owner not in (0, before))
        wait_for(lambda: self.client.Probe().ready.value)
        return before

    def stop(self) -> None:
        """Ends both, and leaves nothing mounted below the pods' directory."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._driver is not None:
            self._driver.terminate()
            self.gone()
        for mount in reversed(self.mounts()):
            csi_mounts.unmount(mount.point, detach=True)
        for loop in self.loops():
            csi_mounts.detach_loop(loop)
        if owner := self.owner:
            os.kill(owner, signal.SIGTERM)
            wait_for(lambda: not alive(owner))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- what is there ---------------------------------------------------------------------------

    def mounts(self) -> list[csi_mounts.Mount]:
        """What is mounted in the pods' directory."""
        with open(csi_mounts.MOUNTINFO, encoding="utf-8") as lines:
            return [
                each for each in csi_mounts.parse_mountinfo(lines) if each.point.startswith(f"{self.pods}/")
            ]

    def call(self, method: str, **arguments: Any) -> Any:
        """Asks the owner on its control socket."""
        return getattr(connect(self.data / "control.sock"), method)(**arguments)

    def loops(self) -> list[str]:
        """Loop devices over volumes of this data directory."""
        found = []
        for path in Path("/sys/block").glob("loop*/loop/backing_file"):
            with contextlib.suppress(OSError):
                if path.read_text().startswith(str(self.data)):
                    found.append(f"/dev/{path.parent.parent.name}")
        return found

    # --- what an orchestrator does ---------------------------------------------------------------

    def create(
        self, name: str, size: int = 16 * MIB, how: pb.VolumeCapability | None = None, **more: Any
    ) -> str:
        """Makes a volume and returns its id."""
        made = self.client.CreateVolume(
            name=name,
            capacity_range=pb.CapacityRange(required_bytes=size),
            volume_capabilities=[how or tree()],
            **more,
        )
        return str(made.volume.volume_id)

    def paths(self, volume: str, pod: str = "pod") -> tuple[Path, Path]:
        """Where a volume is staged and published."""
        return self.pods / "staging" / volume, self.pods / pod / volume / "mount"

    def publish(
        self,
        volume: str,
        how: pb.VolumeCapability | None = None,
        *,
        pod: str = "pod",
        readonly: bool = False,
        attach: bool = True,
    ) -> Path:
        """Attaches, stages and publishes a volume, as for a pod."""
        staging, target = self.paths(volume, pod)
        staging.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        wanted = how or tree()
        if attach:
            self.client.ControllerPublishVolume(
                volume_id=volume, node_id="here", volume_capability=wanted, readonly=False
            )
        self.client.NodeStageVolume(
            volume_id=volume, staging_target_path=str(staging), volume_capability=wanted
        )
        self.client.NodePublishVolume(
            volume_id=volume,
            staging_target_path=str(staging),
            target_path=str(target),
            volume_capability=wanted,
            readonly=readonly,
        )
        return target

    def unpublish(self, volume: str, *, pod: str = "pod", last: bool = True) -> None:
        """Takes a volume away from a pod, and with the last one from the machine."""
        staging, target = self.paths(volume, pod)
        self.client.NodeUnpublishVolume(volume_id=volume, target_path=str(target))
        if last:
            self.client.NodeUnstageVolume(volume_id=volume, staging_target_path=str(staging))
            self.client.ControllerUnpublishVolume(volume_id=volume, node_id="here")

    def restore(
        self, name: str, snapshot: str, size: int = 16 * MIB, how: pb.VolumeCapability | None = None
    ) -> str:
        """A volume of a snapshot."""
        source = pb.VolumeContentSource(snapshot=pb.VolumeContentSource.SnapshotSource(snapshot_id=snapshot))
        return self.create(name, size, how, volume_content_source=source)

    def clone(
        self,
        name: str,
        volume: str,
        size: int = 16 * MIB,
        how: pb.VolumeCapability | None = None,
        **more: Any,
    ) -> str:
        """A volume of a volume."""
        source = pb.VolumeContentSource(volume=pb.VolumeContentSource.VolumeSource(volume_id=volume))
        return self.create(name, size, how, volume_content_source=source, **more)


@contextlib.contextmanager
def machine(home: Path, *options: str) -> Iterator[Machine]:
    """A machine with a running driver, and nothing left of it afterwards."""
    with Machine(home) as made:
        made.start(*options)
        yield made
