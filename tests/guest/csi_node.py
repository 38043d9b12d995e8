"""A node without a store: what an orchestrator does on it, in a guest whose kernel has NFS and NVMe/TCP clients.

``csi_node.py NAME JOB``: the driver of this node is started, and JOB is one of the functions at the end.  What is done
elsewhere (controller, owner, another node) the test does that started the guest: :func:`ask`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc

from space._node import csi_mounts, csi_network
from space.projections.csi import check
from space.projections.csi.model import host_nqn, host_uuid
from space.projections.csi.pb import csi_pb2 as pb
from tests.csi_client import MIB, Client, device, tree

SHARE: Final = Path("/mnt/host")
HOME: Final = Path("/var/lib/space-node")
SOCKET: Final = HOME / "csi.sock"
PODS: Final = Path("/pods")
POLL_SECONDS: Final = 0.02
WAIT_SECONDS: Final = 120.0

_MODE: Final = pb.VolumeCapability.AccessMode
Capability = pb.VolumeCapability


def ask(*words: str) -> Any:
    """What the test says that started the guest."""
    (SHARE / "asking").write_text(" ".join(words))
    (SHARE / "asking").rename(SHARE / "ask")
    while (SHARE / "ask").exists():
        time.sleep(POLL_SECONDS)
    return json.loads((SHARE / "answer").read_text())


def wait_for(what: Callable[[], Any]) -> Any:
    """What ``what`` returns once that is true; hangs are found, nothing is timed."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := what()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(POLL_SECONDS)
    return found


class Node:
    """One machine, and its driver."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.id = f"{name}@127.0.0.1"  # what the owner sees of a guest's network
        self.host = csi_network.Host(host_nqn(self.id), host_uuid(self.id))
        HOME.mkdir(parents=True, exist_ok=True)
        self._driver: subprocess.Popen[bytes] | None = None
        self._client: Client | None = None

    def start(self, *, steps: Path | None = None) -> None:
        """Starts the driver and waits until it answers; with ``steps`` it counts its steps there."""
        program, environment = ["-c", "from space.cli import main; main()"], dict(os.environ)
        if steps is not None:
            environment["CSI_STEPS"] = str(steps)
            program = [str(SHARE / "packages/tests/csi_killed_worker.py")]
        command = [sys.executable, *program, "--data", str(HOME), "csi", "--mode", "node", "--remote"]
        options = ["--node-id", self.name, "--node-address", "127.0.0.1", "--endpoint", str(SOCKET)]
        self._driver = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, env=environment)
        assert self._driver.stdout is not None
        assert self._driver.stdout.readline(), "the driver did not start"
        if self._client is not None:
            self._client.close()
        self._client = Client(SOCKET)

    @property
    def client(self) -> Client:
        """The driver's calls."""
        assert self._client is not None
        return self._client

    def gone(self) -> None:
        """Waits until the driver has ended."""
        assert self._driver is not None
        self._driver.wait(WAIT_SECONDS)
        assert self._driver.stdout is not None
        self._driver.stdout.close()

    def kill(self) -> None:
        """As a container runtime does it that has lost patience."""
        assert self._driver is not None
        self._driver.kill()
        self.gone()

    # --- what an orchestrator does ---------------------------------------------------------------

    def paths(self, volume: str, pod: str = "pod") -> tuple[Path, Path]:
        """Where a volume is staged and published."""
        return PODS / "staging" / volume, PODS / pod / volume / "mount"

    def publish(
        self, volume: dict[str, Any], how: Capability, *, pod: str = "pod", readonly: bool = False
    ) -> Path:
        """Attaches, stages and publishes a volume, as for a pod."""
        name = volume["id"]
        attached = ask("attach", name, self.id)
        staging, target = self.paths(name, pod)
        staging.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        common = {
            "volume_id": name,
            "staging_target_path": str(staging),
            "volume_capability": how,
            "volume_context": volume["context"],
            "publish_context": attached,
        }
        self.client.NodeStageVolume(**common)
        self.client.NodePublishVolume(**common, target_path=str(target), readonly=readonly)
        return target

    def unpublish(self, volume: dict[str, Any], *, pod: str = "pod", last: bool = True) -> None:
        """Takes a volume away from a pod, and with the last one from the machine."""
        name = volume["id"]
        staging, target = self.paths(name, pod)
        self.client.NodeUnpublishVolume(volume_id=name, target_path=str(target))
        if last:
            self.client.NodeUnstageVolume(volume_id=name, staging_target_path=str(staging))
            ask("detach", name, self.id)

    def usage(self, volume: dict[str, Any], target: Path) -> tuple[int, int]:
        """Bytes used, and capacity, as a kubelet hears them."""
        answer = self.client.NodeGetVolumeStats(volume_id=volume["id"], volume_path=str(target))
        assert not answer.volume_condition.abnormal, answer.volume_condition.message
        return int(answer.usage[0].used), int(answer.usage[0].total)

    # --- what is left ----------------------------------------------------------------------------

    def mounts(self) -> list[csi_mounts.Mount]:
        """What is mounted for pods."""
        with open(csi_mounts.MOUNTINFO, encoding="utf-8") as lines:
            return [each for each in csi_mounts.parse_mountinfo(lines) if each.point.startswith(f"{PODS}/")]

    def check_nothing_left(self) -> None:
        """No mount, no device, no note."""
        assert self.mounts() == []
        assert list(Path("/sys/class/nvme").glob("nvme*")) == []
        assert csi_mounts.loops_over("/dev/nvme0n1") == []
        assert list((HOME / "csi" / "notes").glob("*.json")) == []
        assert not any(each.is_file() for each in PODS.rglob("*"))


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """A descriptor; direct, so that nothing is this machine's cache."""
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def code_of(work: Callable[[], object]) -> tuple[str, str]:
    """How a call ended that has to fail: code and words."""
    try:
        work()
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""
    raise AssertionError("it was carried out")


def write(path: Path, data: bytes) -> None:
    """Writes a file; it is durable at the server."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def digest(path: Path, length: int) -> str:
    """Of what is read now, not of what this machine remembers."""
    Path("/proc/sys/vm/drop_caches").write_text("3")
    with path.open("rb") as file:
        return hashlib.sha256(file.read(length)).hexdigest()


# --- jobs ------------------------------------------------------------------------------------------


def job_tree(node: Node) -> None:
    """Snapshots hold what was acknowledged before them; capacity, growth, group, read-only, and nothing left."""
    node.start()
    volume = ask("create", "tree", "nfs", str(16 * MIB))
    how = tree(
        _MODE.MULTI_NODE_MULTI_WRITER, mount_flags=["noatime", "nconnect=2"], volume_mount_group="4711"
    )
    target = node.publish(volume, how)
    check_mounted(node, volume, "noatime")
    assert (target.stat().st_gid, target.stat().st_mode & 0o2070) == (4711, 0o2070)

    old, new = os.urandom(3 * MIB), os.urandom(3 * MIB)
    (target / "dir").mkdir()
    write(target / "dir" / "file", old)
    (target / "link").symlink_to("dir/file")
    snapshot = ask("snapshot", volume["id"], "cut")
    write(target / "dir" / "file", new)
    (target / "later").touch()
    restored = ask("create", "restored", "nfs", str(16 * MIB), snapshot)
    other = node.publish(restored, how)
    assert (other / "link").read_bytes() == old
    assert sorted(each.name for each in other.iterdir()) == ["dir", "link"]
    assert digest(target / "dir" / "file", 3 * MIB) == hashlib.sha256(new).hexdigest()

    # the size of the file system is the volume's capacity
    space = os.statvfs(target)
    assert space.f_blocks * space.f_frsize == 16 * MIB
    assert node.usage(volume, target) == (3 * MIB, 16 * MIB)
    check_full(target / "much")
    ask("expand", volume["id"], str(32 * MIB))
    assert wait_for(lambda: node.usage(volume, target)[1] == 32 * MIB)
    write(target / "much", bytes(20 * MIB).replace(bytes(2), b"xy"))

    reader = node.publish(volume, how, pod="reader", readonly=True)
    assert (reader / "link").read_bytes() == new
    assert errno_of((reader / "no").touch) == errno.EROFS
    code, words = code_of(lambda: node.publish(volume, tree(mount_flags=["bogus"])))
    assert (code, "no such mount flag" in words) == ("INVALID_ARGUMENT", True)

    node.unpublish(volume, pod="reader", last=False)
    node.unpublish(volume)
    node.unpublish(restored)
    node.check_nothing_left()


def check_mounted(node: Node, volume: dict[str, Any], flag: str) -> None:
    """A tree is mounted once, and shown once from there."""
    staging, target = node.paths(volume["id"])
    found = {each.point: each for each in node.mounts()}
    assert sorted(found) == sorted([str(staging), str(target)]), found
    assert {each.kind for each in found.values()} == {"nfs4"}
    assert flag in found[str(target)].options


def check_full(path: Path) -> None:
    """A volume of which 3 of 16 MiB are used takes 12 more and not 14; what was refused costs nothing."""
    write(path, b"x" * (12 * MIB))
    path.unlink()
    assert errno_of(lambda: write(path, b"x" * (14 * MIB))) == errno.ENOSPC
    path.unlink()


def errno_of(work: Callable[[], object]) -> int | None:
    """Why something failed that has to."""
    try:
        work()
    except OSError as error:
        return error.errno
    return None


def job_device(node: Node) -> None:
    """As for trees: a file system on a device, cut, restored, grown under a writer; a read-only path; nothing left."""
    node.start()
    volume = ask("create", "device", "nvme", str(64 * MIB))
    how = device(_MODE.MULTI_NODE_MULTI_WRITER)
    target = node.publish(volume, how)
    subprocess.run(["mkfs.ext4", "-q", "-F", target], check=True)
    before = digest(target, 64 * MIB)
    snapshot = ask("snapshot", volume["id"], "cut")
    with opened(target) as descriptor:
        for offset in range(0, 8 * MIB, MIB):
            os.pwrite(descriptor, os.urandom(MIB), offset)
        os.fsync(descriptor)
    restored = ask("create", "restored", "nvme", str(64 * MIB), snapshot)
    other = node.publish(restored, how)
    assert digest(other, 64 * MIB) == before != digest(target, 64 * MIB)
    subprocess.run(["e2fsck", "-fn", other], check=True, capture_output=True)
    used, capacity = node.usage(volume, target)
    assert capacity == 64 * MIB
    assert 8 * MIB <= used < 64 * MIB
    assert (
        len(list(Path("/sys/class/nvme").glob("nvme*"))) == 2
    )  # a subsystem each: nobody sees others' volumes

    reader = node.publish(volume, how, pod="reader", readonly=True)
    assert digest(reader, 8 * MIB) == digest(target, 8 * MIB)
    assert errno_of(lambda: write_first(reader)) in {errno.EPERM, errno.EROFS, errno.EACCES}
    grow(node, volume, target)
    with opened(reader, os.O_RDONLY) as descriptor:
        assert os.lseek(descriptor, 0, os.SEEK_END) == 96 * MIB
    node.unpublish(volume, pod="reader", last=False)
    node.unpublish(volume)
    node.unpublish(restored)
    node.check_nothing_left()


def write_first(path: Path) -> None:
    """Writes the first block."""
    with opened(path) as descriptor:
        os.pwrite(descriptor, bytes(4096), 0)
        os.fsync(descriptor)


def grow(node: Node, volume: dict[str, Any], target: Path) -> None:
    """A device that is open has its new size, up to the last byte."""
    with opened(target) as descriptor:
        ask("expand", volume["id"], str(96 * MIB))
        node.client.NodeExpandVolume(
            volume_id=volume["id"],
            volume_path=str(target),
            capacity_range=pb.CapacityRange(required_bytes=96 * MIB),
            volume_capability=device(),
        )
        os.pwrite(descriptor, b"end".ljust(4096), 96 * MIB - 4096)
        os.fsync(descriptor)
        assert os.pread(descriptor, 3, 96 * MIB - 4096) == b"end"


def publish_of(node: Node, volume: dict[str, Any], transport: str) -> Path:
    """Publishes a volume for whoever wants to write."""
    kind = tree if transport == "nfs" else device
    return node.publish(volume, kind(_MODE.MULTI_NODE_MULTI_WRITER))


def again(work: Callable[[], object]) -> None:
    """What an orchestrator does: it asks until it is done."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            work()
        except grpc.RpcError:
            assert time.monotonic() < deadline
            time.sleep(POLL_SECONDS)
        else:
            return


def job_kill_driver(node: Node, transport: str) -> None:
    """Killed before each step of publishing and of taking it back, and asked again: there once and whole, then gone."""
    armed = Path("/tmp/steps")
    node.start(steps=armed)
    volume = ask("create", "killed", transport, str(8 * MIB))

    def publish() -> None:
        publish_of(node, volume, transport)

    def unpublish() -> None:
        node.unpublish(volume)

    steps = {}
    for work in (publish, unpublish):
        armed.write_text("0 nobody 0")
        work()
        steps[work] = int(armed.read_text().split()[0])
        armed.unlink()
    assert min(steps.values()) > 4, steps
    for work, number in [(each, n + 1) for each, count in steps.items() for n in range(count)]:
        if work is unpublish:
            publish()
        armed.write_text(f"0 driver {number}")
        assert code_of(work)[0] == "UNAVAILABLE", f"step {number} of {work.__name__} was not taken"
        armed.unlink()
        node.gone()
        node.start(steps=armed)
        again(work)
        if work is publish:
            check_whole(node, volume, transport)
            unpublish()
        node.check_nothing_left()


def check_whole(node: Node, volume: dict[str, Any], transport: str) -> None:
    """A volume is there once, and takes bytes."""
    _, target = node.paths(volume["id"])
    assert [each.point for each in node.mounts()].count(str(target)) == 1
    assert len(node.mounts()) == (2 if transport == "nfs" else 1)
    if transport == "nfs":
        write(target / "file", os.urandom(4096))
        return
    assert len(list(Path("/sys/class/nvme").glob("nvme*"))) == 1
    write_first(target)


def job_kill_owner(node: Node, transport: str) -> None:
    """Under a writer the owner is killed, twice: the writer waits and goes on, and no acknowledged byte is lost."""
    node.start()
    volume = ask("create", "served", transport, str(32 * MIB))
    path = place_of(publish_of(node, volume, transport), transport)
    with writing(path) as written:
        for _ in range(2):
            wait_more(written)
            ask("again")
        wait_more(written)
    node.unpublish(volume)
    node.check_nothing_left()


def job_restart(node: Node) -> None:
    """Under a writer the driver is killed that its mount goes through: it waits, and goes on with another driver."""
    node.start()
    volume = ask("create", "relayed", "nfs", str(32 * MIB))
    path = place_of(publish_of(node, volume, "nfs"), "nfs")
    with writing(path) as written:
        for _ in range(2):
            wait_more(written)
            node.kill()
            node.start()
        wait_more(written)
    node.unpublish(volume)
    node.check_nothing_left()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """While a program writes and synchronizes, and tells in a file how often; then all it told of last is there."""
    if not path.exists():
        path.touch()
    stop, written = Path("/tmp/stop"), Path("/tmp/written")
    program = (
        "import os, pathlib, sys\n"
        "f = os.open(sys.argv[1], os.O_RDWR)\n"
        "n = 0\n"
        "while not os.path.exists('/tmp/stop'):\n"
        "    os.pwrite(f, n.to_bytes(8, 'big') * 512, n % 4096 * 4096); os.fsync(f); n += 1\n"
        "    pathlib.Path('/tmp/new').write_text(str(n)); os.rename('/tmp/new', '/tmp/written')\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)])
    yield written
    stop.touch()
    assert writer.wait(WAIT_SECONDS) == 0
    total = int(written.read_text())
    Path("/proc/sys/vm/drop_caches").write_text("3")
    with opened(path, os.O_RDONLY) as descriptor:
        for number in range(max(0, total - 4096), total):
            assert os.pread(descriptor, 4096, number % 4096 * 4096) == number.to_bytes(8, "big") * 512, number


def wait_more(written: Path) -> None:
    """Waits for five more writes."""
    before = wait_for(lambda: int(written.read_text()) if written.exists() else 0)
    wait_for(lambda: int(written.read_text()) > before + 5)


def job_shared(node: Node, mine: str, theirs: str) -> None:
    """One tree of two nodes: each sees what the other one closed, and locks keep them apart."""
    node.start()
    volume = ask("create", "shared", "nfs", str(16 * MIB))
    target = publish_of(node, volume, "nfs")
    write(target / mine, mine.encode())
    ask("meet")
    assert wait_for(lambda: theirs in os.listdir(target))
    assert (target / theirs).read_bytes() == theirs.encode()
    counter = target / "counter"
    for _ in range(50):
        with opened(counter, os.O_RDWR | os.O_CREAT) as descriptor:
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
            found = int(os.pread(descriptor, 16, 0) or b"0")
            os.pwrite(descriptor, str(found + 1).encode(), 0)
    ask("meet")
    assert int(counter.read_text()) == 100
    node.unpublish(volume)
    node.check_nothing_left()


def job_shut_out(node: Node) -> None:
    """A node a volume was taken from reaches it no more, though it never let go of it; with it back, it does again."""
    node.start()
    files, block = (ask("create", each, each, str(8 * MIB)) for each in ("nfs", "nvme"))
    mounted, connected = publish_of(node, files, "nfs"), publish_of(node, block, "nvme")
    write(mounted / "file", b"kept")
    for volume in (files, block):
        ask("detach", volume["id"], node.id)
    assert errno_of(lambda: write(mounted / "file", b"late")) in {errno.ESTALE, errno.EACCES, errno.EIO}
    wait_for(lambda: not list(Path("/sys/class/nvme").glob("nvme*")))
    assert errno_of(lambda: write_first(connected)) in {errno.EIO, errno.ENXIO, errno.ENODEV}
    for volume in (files, block):
        name = volume["id"]
        for call, path in (
            ("NodeUnpublishVolume", "target_path"),
            ("NodeUnstageVolume", "staging_target_path"),
        ):
            at = node.paths(name)[call == "NodeUnpublishVolume"]
            getattr(node.client, call)(volume_id=name, **{path: str(at)})
    node.check_nothing_left()
    assert (publish_of(node, files, "nfs") / "file").read_bytes() == b"kept"
    write_first(publish_of(node, block, "nvme"))
    for volume in (files, block):
        node.unpublish(volume)
    node.check_nothing_left()


def job_cut(node: Node) -> None:
    """Four volumes are written one after the other, each write acknowledged before the next: a group of snapshots taken
    meanwhile has of each at least what it has of those after it, and of none more than one write more.
    """
    node.start()
    kinds = ("nfs", "nvme", "nfs", "nvme")
    volumes = [ask("create", f"cut-{n}", kind, str(4 * MIB)) for n, kind in enumerate(kinds)]
    targets = [publish_of(node, volume, kind) for volume, kind in zip(volumes, kinds, strict=True)]
    paths = [place_of(target, kind) for target, kind in zip(targets, kinds, strict=True)]
    for path, kind in zip(paths, kinds, strict=True):
        if kind == "nfs":
            write(path, bytes(4096))
    over = threading.Event()
    written = 0

    def has_more(before: int) -> bool:
        return written > before + 2

    def transfer() -> None:
        nonlocal written
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(opened(path)) for path in paths]
            while not over.is_set():
                written += 1
                for file in files:
                    os.pwrite(file, written.to_bytes(8, "big").ljust(4096, b"."), 0)
                    os.fsync(file)

    writer = threading.Thread(target=transfer)
    writer.start()
    groups = []
    for number in range(5):
        before = written
        wait_for(functools.partial(has_more, before))
        groups.append(ask("group", f"group-{number}", *(volume["id"] for volume in volumes)))
    over.set()
    writer.join()
    for number, group in enumerate(groups):
        found = []
        for volume, kind in zip(volumes, kinds, strict=True):
            name = f"of-{number}-{volume['id']}"
            copy = ask("create", name, kind, str(4 * MIB), group[volume["id"]])
            data = place_of(publish_of(node, copy, kind), kind).read_bytes()[:8]
            found.append(int.from_bytes(data, "big"))
            node.unpublish(copy)
        assert found == sorted(found, reverse=True), found
        assert found[0] - found[-1] <= 1, found
    for volume in volumes:
        node.unpublish(volume)
    node.check_nothing_left()


def place_of(target: Path, transport: str) -> Path:
    """Where in a volume something is written."""
    return target / "file" if transport == "nfs" else target


def job_silent(node: Node) -> None:
    """While the owner says nothing, no call hangs that needs nothing of it; what needs it says so; then all goes on."""
    node.start()
    files, block = (ask("create", each, each, str(8 * MIB)) for each in ("nfs", "nvme"))
    targets = [publish_of(node, files, "nfs"), publish_of(node, block, "nvme")]
    write(targets[0] / "file", b"kept")
    writer = start_writer(node.paths(files["id"])[0] / "unsaved")
    time_out = Path("/sys/module/nvme_core/parameters/admin_timeout")
    if time_out.exists():
        time_out.write_text("5")
    ask("silence")
    for volume, target in ((files, targets[0]), (block, targets[1])):
        for _ in range(2):
            answer = node.client.NodeGetVolumeStats(volume_id=volume["id"], volume_path=str(target))
            assert (answer.volume_condition.abnormal, list(answer.usage)) == (True, []), answer
        node.client.NodeUnpublishVolume(volume_id=volume["id"], target_path=str(target))
    other = ask("create_later", "nfs")
    staging, _ = node.paths(other["id"])
    code, words = code_of(
        lambda: node.client.NodeStageVolume(
            volume_id=other["id"],
            staging_target_path=str(staging),
            volume_capability=tree(),
            volume_context=other["context"],
            publish_context=other["published"],
        )
    )
    assert (code, "does not answer" in words) == ("UNAVAILABLE", True), words
    check_unstaging_waits(node, files["id"], writer)
    ask("speech")
    writer.wait(WAIT_SECONDS)
    assert len((node.paths(files["id"])[0] / "unsaved").read_bytes()) == MIB
    assert (publish_of(node, files, "nfs") / "file").read_bytes() == b"kept"
    write_first(publish_of(node, block, "nvme"))
    for volume in (files, block):
        node.unpublish(volume)
    node.client.NodeUnstageVolume(volume_id=other["id"], staging_target_path=str(staging))
    node.check_nothing_left()


def start_writer(path: Path) -> subprocess.Popen[bytes]:
    """A program that has a file open and writes it once there is /tmp/now; then there is /tmp/done."""
    program = (
        "import os, pathlib, sys, time\n"
        "f = open(sys.argv[1], 'wb', buffering=0)\n"
        "pathlib.Path('/tmp/open').touch()\n"
        "while not os.path.exists('/tmp/now'): time.sleep(0.01)\n"
        "f.write(bytes(1 << 20)); pathlib.Path('/tmp/done').touch(); time.sleep(999)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)])
    wait_for(Path("/tmp/open").exists)
    return writer


def check_unstaging_waits(node: Node, volume: str, writer: subprocess.Popen[bytes]) -> None:
    """What was written has to go somewhere: until then the kernel keeps its program, even killed, and so the mount."""
    staging, _ = node.paths(volume)
    Path("/tmp/now").touch()
    wait_for(Path("/tmp/done").exists)
    writer.kill()
    code, words = code_of(
        lambda: node.client.NodeUnstageVolume(volume_id=volume, staging_target_path=str(staging))
    )
    assert (code, "in use" in words) == ("FAILED_PRECONDITION", True), words


def job_flags(node: Node) -> None:
    """Every mount flag that is taken for NFS is one that this kernel takes."""
    node.start()
    volume = ask("create", "flags", "nfs", str(MIB))
    values = {"lookupcache": "none", "vers": "4.1", "nfsvers": "4.2", "nconnect": "2"}
    numbers = {"timeo", "retrans", "rsize", "wsize", "actimeo"}
    numbers |= {"acregmin", "acregmax", "acdirmin", "acdirmax"}
    refused = []
    for name in sorted(check.NFS_FLAGS):
        flag = f"{name}={values.get(name, 60)}" if name in numbers | values.keys() else name
        try:
            node.publish(volume, tree(_MODE.MULTI_NODE_MULTI_WRITER, mount_flags=[flag]))
        except grpc.RpcError as error:
            refused.append((flag, error.details()))
        node.unpublish(volume)
    assert refused == [], refused
    node.check_nothing_left()


def job_sanity(node: Node, transport: str, port: str) -> None:
    """The specification's own suite, through one socket that has both this node and the controller elsewhere."""
    node.start()
    both = HOME / "both.sock"
    elsewhere = grpc.insecure_channel(f"10.0.2.2:{port}")
    here = grpc.insecure_channel(f"unix:{SOCKET}")

    class Forwarding(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: grpc.HandlerCallDetails) -> Any:
            channel = here if "/csi.v1.Node/" in details.method else elsewhere

            def forward(request: bytes, context: grpc.ServicerContext) -> bytes:
                try:
                    return bytes(channel.unary_unary(details.method)(request, timeout=WAIT_SECONDS))
                except grpc.RpcError as error:
                    context.abort(error.code(), error.details() or "")
                    raise

            return grpc.unary_unary_rpc_method_handler(forward)

    server = grpc.server(ThreadPoolExecutor(16), [Forwarding()])
    server.add_insecure_port(f"unix:{both}")
    server.start()
    PODS.mkdir()
    parameters = HOME / "parameters.yaml"
    parameters.write_text(f"transport: {transport}\n")
    done = subprocess.run(
        [
            SHARE / "csi-sanity",
            f"--csi.endpoint=unix://{both}",
            f"--csi.mountdir={PODS}/target",
            f"--csi.stagingdir={PODS}/staging",
            f"--csi.testvolumesize={16 * MIB}",
            f"--csi.testvolumeexpandsize={32 * MIB}",
            f"--csi.testvolumeaccesstype={'mount' if transport == 'nfs' else 'block'}",
            f"--csi.testvolumeparameters={parameters}",
            "--ginkgo.no-color",
        ],
        check=False,
    )
    server.stop(None)
    assert done.returncode == 0
    node.check_nothing_left()


JOBS: Final = {
    name.removeprefix("job_"): found for name, found in vars().copy().items() if name.startswith("job_")
}


def main() -> None:
    """Does a job."""
    name, job, *arguments = sys.argv[1:]
    node = Node(name)
    JOBS[job](node, *arguments)
    sys.stdout.write("ended=well\n")


if __name__ == "__main__":
    main()
