"""CSI: from CreateVolume to the first byte, many volumes at once, and snapshots and clones of small and huge volumes.

The peer is csi-driver-host-path, if its program is at ``CSI_HOSTPATH`` or ``hostpathplugin`` on PATH: directories of
the machine's own file system, bind-mounted, kept in a file.  It copies where this store shares, so sizes are compared
with ourselves: a snapshot of 100 GiB (sparse, with as many bytes written as the one of 1 MiB) against that one.

Needs root, because volumes are mounted.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from bench.measure import Row, Scale

MIB: Final = 1 << 20
GIB: Final = 1 << 30
WRITTEN: Final = 64 << 10
READY_SECONDS: Final = 60.0
PEER: Final = "csi-driver-host-path"


class Driver:
    """A driver, asked over its socket."""

    def __init__(self, home: Path, command: list[str], socket: Path, ready: Callable[[], bool]) -> None:
        from tests.csi_client import Client

        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        with (home / "driver.log").open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + READY_SECONDS
        while not (socket.exists() and ready()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((home / "driver.log").read_text(errors="replace")[-1000:])
            time.sleep(0.05)
        self.client = Client(socket)
        self.node: str = self.client.NodeGetInfo().node_id

    def create(self, name: str, size: int = MIB, *, block: bool = False, **more: Any) -> str:
        """A volume."""
        from space.projections.csi.pb import csi_pb2 as pb

        made = self.client.CreateVolume(
            name=name,
            capacity_range=pb.CapacityRange(required_bytes=size),
            volume_capabilities=[_capability(block=block)],
            **more,
        )
        return str(made.volume.volume_id)

    def first_byte(self, name: str) -> float:
        """Seconds from asking for a volume to a byte written through where it is published."""
        staging, target = self.home / "staging" / name, self.home / "pods" / name / "mount"
        staging.mkdir(parents=True)
        target.parent.mkdir(parents=True)
        begun = time.perf_counter()
        volume = self.create(name)
        self.publish(volume, staging, target)
        with (target / "file").open("wb", buffering=0) as file:
            file.write(b"x")
        seconds = time.perf_counter() - begun
        self.remove(volume, staging, target)
        return seconds

    def publish(self, volume: str, staging: Path, target: Path, *, block: bool = False) -> None:
        """Shows a volume."""
        how = _capability(block=block)
        self.client.NodeStageVolume(volume_id=volume, staging_target_path=str(staging), volume_capability=how)
        self.client.NodePublishVolume(
            volume_id=volume, staging_target_path=str(staging), target_path=str(target), volume_capability=how
        )

    def remove(self, volume: str, staging: Path, target: Path) -> None:
        """Takes a volume away."""
        self.client.NodeUnpublishVolume(volume_id=volume, target_path=str(target))
        self.client.NodeUnstageVolume(volume_id=volume, staging_target_path=str(staging))
        self.client.DeleteVolume(volume_id=volume)

    def end(self) -> None:
        """Ends the driver."""
        self.client.close()
        self._process.terminate()
        self._process.wait(READY_SECONDS)


def _capability(*, block: bool) -> Any:
    from tests.csi_client import device, tree

    return device() if block else tree()


@contextlib.contextmanager
def _ours(home: Path) -> Iterator[Driver]:
    data, socket = home / "data", home / "csi.sock"
    program = "import sys; from space.cli import main; sys.exit(main())"
    command = [
        sys.executable,
        "-c",
        program,
        "--data",
        str(data),
        "csi",
        "--endpoint",
        str(socket),
        "--node-id",
        "here",
    ]

    def owner() -> int:
        for note in (data / "views").glob("csi-*.json"):
            return int(json.loads(note.read_text())["pid"])
        return 0

    driver = Driver(home, command, socket, lambda: owner() != 0)
    try:
        yield driver
    finally:
        driver.end()
        pid = owner()
        os.kill(pid, signal.SIGTERM)
        while owner():
            time.sleep(0.05)


@contextlib.contextmanager
def _host_path(home: Path) -> Iterator[Driver]:
    socket = home / "csi.sock"
    (home / "state").mkdir(parents=True)
    command = [
        _program(),
        "--drivername=hostpath.csi.k8s.io",
        f"--endpoint=unix://{socket}",
        f"--statedir={home / 'state'}",
        "--nodeid=here",
    ]
    driver = Driver(home, command, socket, lambda: True)
    try:
        yield driver
    finally:
        driver.end()


def _program() -> str:
    return os.environ.get("CSI_HOSTPATH") or shutil.which("hostpathplugin") or ""


def run(scale: Scale) -> list[Row]:
    """Ours and, where it is there, the peer, in turn."""
    if os.geteuid() != 0:
        raise RuntimeError("volumes are mounted, which needs root")
    count, many = scale.pick(100, 5), scale.pick(100, 8)
    rounds = scale.pick(3, 1)
    with contextlib.ExitStack() as stack:
        drivers = {"ours": stack.enter_context(_ours(stack.enter_context(scale.workspace("csi"))))}
        if _program():
            home = stack.enter_context(scale.workspace("csi-host-path"))
            drivers["peer"] = stack.enter_context(_host_path(home))
        else:
            scale.note(f"{PEER} is neither at CSI_HOSTPATH nor on PATH: ours alone")
        alone: dict[str, list[float]] = {name: [] for name in drivers}
        at_once: dict[str, list[float]] = {name: [] for name in drivers}
        for turn in range(rounds):
            for name, driver in drivers.items():
                alone[name] += [driver.first_byte(f"alone-{turn}-{n}") for n in range(count // rounds or 1)]
                at_once[name].append(_many(driver, f"many-{turn}", many))
        rows = []
        for title, pick in (("p50", 0.50), ("p99", 0.99)):
            found = {name: 1000 * _quantile(seconds, pick) for name, seconds in alone.items()}
            rows.append(_row(f"CreateVolume to first byte, {title}", "ms", found))
        found = {name: many / statistics.median(seconds) for name, seconds in at_once.items()}
        rows.append(_row(f"{many} volumes at once, to first byte and gone", "volumes/s", found))
        return [*rows, *_sizes(drivers["ours"], scale.pick(40, 4))]


def _row(case: str, unit: str, found: dict[str, float]) -> Row:
    peer = found.get("peer")
    return Row(case, unit, found["ours"], PEER if peer else "", peer)


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _many(driver: Driver, name: str, count: int) -> float:
    """Seconds for so many volumes, all asked for at once."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(32) as threads:
        list(threads.map(lambda n: driver.first_byte(f"{name}-{n}"), range(count)))
    return time.perf_counter() - begun


def _sizes(driver: Driver, count: int) -> list[Row]:
    """Snapshots and clones of a small and of a huge block volume with as many bytes in them, in turn."""
    from space.projections.csi.pb import csi_pb2 as pb

    volumes = {size: driver.create(f"sized-{size}", size, block=True) for size in (MIB, 100 * GIB)}
    for size, volume in volumes.items():
        staging, target = driver.home / f"s-{size}", driver.home / f"t-{size}"
        staging.mkdir()
        driver.publish(volume, staging, target, block=True)
        descriptor = os.open(target, os.O_WRONLY | os.O_DSYNC)
        os.pwrite(descriptor, os.urandom(WRITTEN), 0)
        os.pwrite(descriptor, os.urandom(WRITTEN), size - WRITTEN)
        os.close(descriptor)
        driver.client.NodeUnpublishVolume(volume_id=volume, target_path=str(target))
        driver.client.NodeUnstageVolume(volume_id=volume, staging_target_path=str(staging))
    snapshots: dict[int, list[float]] = {size: [] for size in volumes}
    clones: dict[int, list[float]] = {size: [] for size in volumes}
    for number in range(count):
        for size, volume in volumes.items():
            begun = time.perf_counter()
            driver.client.CreateSnapshot(source_volume_id=volume, name=f"s-{size}-{number}")
            snapshots[size].append(time.perf_counter() - begun)
            source = pb.VolumeContentSource(volume=pb.VolumeContentSource.VolumeSource(volume_id=volume))
            begun = time.perf_counter()
            driver.create(f"c-{size}-{number}", size, block=True, volume_content_source=source)
            clones[size].append(time.perf_counter() - begun)
    rows = []
    for what, found in (("snapshot", snapshots), ("clone", clones)):
        small, huge = (1000 * statistics.median(found[size]) for size in (MIB, 100 * GIB))
        rows.append(Row(f"{what} of 100 GiB, sparse", "ms", huge, f"{what} of 1 MiB", small))
    return rows
