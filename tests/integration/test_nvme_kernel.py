"""The Linux kernel's own NVMe/TCP host, nvme-cli and file systems against ``space project --view nvme``.

The host runs in a throw-away guest (tests/guest/guest.sh), because nothing but a kernel can be one.  The guest takes
root, Debian's package mirrors and 1.7 GB once, so these tests only run where SPACE_GUEST=1 asks for them.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

import space
from tests import guest_support
from tests.cli_support import execute, finish, start
from tests.guest_support import facts

pytestmark = pytest.mark.skipif(
    os.environ.get("SPACE_GUEST") != "1", reason="boots a virtual machine: set SPACE_GUEST=1 (docs/nvme.md)"
)

MIB: Final = 1 << 20


@attrs.define
class View:
    """A served store; ``restart`` serves it again at the same address after a kill."""

    data: Path
    arguments: list[str]
    process: subprocess.Popen[str] = attrs.field(init=False)
    ready: dict[str, Any] = attrs.field(init=False)

    def start(self, listen: str) -> None:
        self.process = start(
            self.data, "project", "--view", "nvme", *self.arguments, "--listen", listen, stderr=None
        )
        assert self.process.stdout is not None
        self.ready = json.loads(self.process.stdout.readline())

    @property
    def port(self) -> str:
        return str(self.ready["address"].rpartition(":")[2])

    def kill(self) -> None:
        """As kill -9 does it."""
        self.process.kill()
        finish(self.process)

    def restart(self) -> None:
        self.start(f"127.0.0.1:{self.port}")

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def stop(self) -> None:
        """As an operator does it: the end is clean."""
        self.process.send_signal(signal.SIGTERM)
        assert finish(self.process).status == 0


Serve = Callable[..., View]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A store with two empty block devices: /one of 512 MiB in blocks of 4096 bytes, /two of 32 MiB in 512."""
    path = tmp_path / "data"
    for name, size, block in (("/one", "512MiB", "4096"), ("/two", "32MiB", "512")):
        assert execute(path, "create", "--size", size, "--block-size", block, "--name", name).status == 0
    return path


@pytest.fixture
def serve(data: Path) -> Iterator[Serve]:
    """Starts views of the store, and ends those that still run."""
    views: list[View] = []

    def started(*arguments: str) -> View:
        view = View(data, [*arguments])
        views.append(view)
        view.start("127.0.0.1:0")
        return view

    yield started
    for view in views:
        if view.process.poll() is None:
            view.stop()


def run(view: View, body: str, tmp_path: Path, **answers: Callable[..., object]) -> str:
    """What a job prints in a guest that knows the view."""
    return guest_support.run([view.port, view.ready["nqn"]], "nvme_prelude.sh", body, tmp_path, **answers)


def test_the_kernel_discovers_connects_and_looks(serve: Serve, tmp_path: Path) -> None:
    """Discovery, connections with and without digests and of several queue counts, and all nvme-cli asks, work."""
    view = serve("--path", "/one")
    job = """
    nvme discover "${at[@]}" | has "subnqn: *$NQN$"
    for options in "" -g -G "-g -G" "-i 1" "-i 4 -g -G" -D; do connect $options; device 1; disconnect; done
    connect -i 4; D=$(device 1)
    dmesg | has "nvme0: mapped 4/0/0"
    echo size=$(blockdev --getsize64 $D)
    echo block=$(cat /sys/block/${D##*/}/queue/logical_block_size)
    echo cache=$(cat /sys/block/${D##*/}/queue/write_cache)
    echo uuid=$(cat /sys/block/${D##*/}/uuid)
    nvme list | has "^$D "; nvme list-subsys | has "live"
    nvme id-ctrl $D | has "^subnqn *: $NQN$"
    nvme id-ns $D | has "lbads:12 .*in use"
    nvme ns-descs $D; nvme smart-log $D; nvme error-log $D; nvme fw-log $D
    nvme effects-log $D; nvme ana-log /dev/nvme0 | has "optimized"
    for feature in 1 2 4 5 6 7 0xa 0xb 0xe 0xf; do nvme get-feature /dev/nvme0 -f $feature; done
    nvme set-feature /dev/nvme0 -f 6 -v 0; nvme get-feature /dev/nvme0 -f 6 | has "value:0*x*0*$"
    if nvme get-feature /dev/nvme0 -f 0x7f; then exit 1; fi
    if nvme admin-passthru /dev/nvme0 --opcode=0x84 --namespace-id=1; then exit 1; fi
    disconnect
    """
    found = facts(run(view, job, tmp_path))
    identity = view.ready["namespaces"][0]["uuid"]
    assert (found["size"], found["block"], found["uuid"]) == (str(512 * MIB), "4096", identity)
    assert found["cache"] == "write back"


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_file_system_on_it(serve: Serve, data: Path, tmp_path: Path, kind: str) -> None:
    """mkfs, mount, copying, unmounting and the checker agree; what fstrim gives back the store has back."""
    view = serve("--path", "/one")
    job = f"""
    check() {{ if [ {kind} = xfs ]; then xfs_repair -n $D; else fsck.ext4 -fn $D; fi; }}
    connect; D=$(device 1); mkfs.{kind} -q $D; mkdir /m; mount $D /m; cp -a /etc /m; umount /m; check
    mount $D /m; diff -r --no-dereference /etc /m/etc
    dd if=/dev/urandom of=/m/large bs=1M count=48 conv=fsync; echo full=$(ask allocated)
    rm /m/large; sync; fstrim /m; umount /m; check; echo trimmed=$(ask allocated); disconnect
    connect -g -G; D=$(device 1); mount $D /m; diff -r --no-dereference /etc /m/etc; umount /m; disconnect
    """
    allocated = lambda: execute(data, "stat", "/one", "--json").json["allocated"]  # noqa: E731
    found = facts(run(view, job, tmp_path, allocated=allocated))
    assert int(found["full"]) - int(found["trimmed"]) > 40 * MIB  # the journal grew meanwhile


def test_fio_verifies_across_a_reconnect(serve: Serve, tmp_path: Path) -> None:
    """What random writes left is read back unchanged, at once and through another connection with digests."""
    view = serve("--path", "/one")
    job = """
    connect -i 4; D=$(device 1)
    fio="fio --name=v --filename=$D --direct=1 --rw=randrw --bs=4k --size=8m --iodepth=32 --ioengine=libaio"
    fio="$fio --verify=crc32c --verify_fatal=1"
    $fio; disconnect; connect -i 1 -g -G; [ $(device 1) = $D ]; $fio --verify_only; disconnect
    """
    run(view, job, tmp_path)


def test_single_commands(serve: Serve, tmp_path: Path) -> None:
    """What nvme-cli sends by hand does what it says, and what is wrong or unknown fails with the right status."""
    view = serve("--path", "/two")
    job = """
    connect; D=$(device 1); head -c 4096 /dev/urandom >/tmp/r; eight="-c 7 -z 4096 -d /tmp/r"
    fails() { local wanted=$1; shift; if "$@" >/tmp/said 2>&1; then exit 1; fi; grep -q "$wanted" /tmp/said; }
    nvme write $D -s 8 $eight; nvme compare $D -s 8 $eight; nvme verify $D -s 8 -c 7; nvme flush $D
    fails "Compare Failure" nvme compare $D -s 9 $eight
    nvme copy $D -d 100 -b 7 -s 8; nvme compare $D -s 100 $eight
    nvme write-zeroes $D -s 8 -c 7; nvme dsm $D -d -s 100 -b 8
    for lba in 8 100; do nvme read $D -s $lba -c 7 -z 4096 -d /tmp/o; cmp -n 4096 /tmp/o /dev/zero; done
    fails "LBA Out of Range" nvme read $D -s 99999999 $eight
    fails "Invalid Command Opcode" nvme write-uncor $D -s 8 -c 7
    fails "Invalid Command Opcode" nvme format $D -f
    nvme resv-register $D --nrkey=1 --rrega=0; nvme resv-acquire $D --crkey=1 --rtype=1 --racqa=0
    nvme resv-release $D --crkey=1 --rtype=1 --rrela=0
    disconnect
    """
    run(view, job, tmp_path)


def test_resets_under_load(serve: Serve, tmp_path: Path) -> None:
    """The controller is reset three times while fio writes and verifies: no error, no wrong byte."""
    view = serve("--path", "/two")
    job = """
    connect -i 4; D=$(device 1)
    fio --name=v --filename=$D --direct=1 --rw=randrw --bs=4k --size=8m --iodepth=32 --ioengine=libaio \\
      --verify=crc32c --verify_fatal=1 --loops=8 >/tmp/fio 2>&1 & load=$!
    for i in 1 2 3; do sleep 0.7; kill -0 $load; nvme reset /dev/nvme0; done
    wait $load || { cat /tmp/fio; exit 1; }
    disconnect
    """
    run(view, job, tmp_path)


def test_namespaces_side_by_side(serve: Serve, data: Path, tmp_path: Path) -> None:
    """Two capsules are two devices; what the kernel flushed to each is what ``space get`` reads."""
    view = serve("--id", execute(data, "stat", "/one", "--json").json["id"], "--path", "/two")
    one, two = (each["nsid"] for each in view.ready["namespaces"])
    job = f"""
    connect; for nsid in {one} {two}; do
      (yes "namespace $nsid" || true) | head -c 65536 >/tmp/$nsid
      dd if=/tmp/$nsid of=$(device $nsid) bs=64k seek=3 oflag=direct conv=fsync
    done
    disconnect
    """
    run(view, job, tmp_path)
    for nsid, path in ((one, "/one"), (two, "/two")):
        held = execute(data, "get", path, "--offset", str(3 << 16), "--length", "65536").out
        assert held == (f"namespace {nsid}\n" * 65536)[:65536]


def test_a_resize_is_seen_while_connected(serve: Serve, data: Path, tmp_path: Path) -> None:
    """A capsule resized by another command has its new size on the host, which was told, not asked."""
    view = serve("--path", "/two")
    job = """
    connect; D=$(device 1); [ $(blockdev --getsize64 $D) = $((32 << 20)) ]
    ask resize
    for i in $(seq 100); do [ $(blockdev --getsize64 $D) = $((96 << 20)) ] && break; sleep 0.1; done
    [ $(blockdev --getsize64 $D) = $((96 << 20)) ]
    dd if=/dev/zero of=$D bs=1M seek=95 count=1 oflag=direct
    disconnect
    """
    run(view, job, tmp_path, resize=lambda: execute(data, "resize", "/two", "96MiB").status)


def test_a_past_moment_is_read_only(serve: Serve, data: Path, tmp_path: Path) -> None:
    """A moment is served beside the process that owns the store, to be read and not written."""
    with space.open(data) as store:
        two = store.resolve("/two")
        moment = f"@{store.write(two, 0, b'before' * 512).position}"
        store.write(two, 0, b"after." * 512)
    serve("--path", "/two")
    past = serve("--path", "/two", "--at", moment)
    job = """
    connect; D=$(device 1); [ $(cat /sys/block/${D##*/}/ro) = 1 ]
    echo held=$(dd if=$D bs=512 count=1 iflag=direct 2>/dev/null | head -c 6)
    if dd if=/dev/zero of=$D bs=512 count=1 oflag=direct; then exit 1; fi
    disconnect
    """
    assert facts(run(past, job, tmp_path))["held"] == "before"


def test_both_sides_prove_who_they_are(serve: Serve, tmp_path: Path) -> None:
    """With DH-HMAC-CHAP the kernel gets in with the right secrets, with and without digests, and with no others."""
    host, stranger = (f"nqn.2014-08.org.nvmexpress:uuid:{uuid.UUID(int=each)}" for each in (1, 2))
    right, wrong, controller = (_secret(bytes([each]) * 32) for each in (1, 2, 3))
    (tmp_path / "host").write_text(right)
    (tmp_path / "controller").write_text(controller)
    keys = ("--host-key", f"{host}={tmp_path / 'host'}", "--controller-key", str(tmp_path / "controller"))
    view = serve("--path", "/two", *keys)
    job = f"""
    refused() {{ if connect "$@" 2>/tmp/said; then exit 1; fi; cat /tmp/said; }}
    refused -q {host}; refused -q {host} -S {wrong}; refused -q {stranger} -S {right}
    refused -q {host} -S {right} -C {wrong}
    for options in "" "-C {controller}" "-C {controller} -g -G -i 4"; do
      connect -q {host} -S {right} $options; D=$(device 1)
      dd if=/dev/urandom of=/tmp/r bs=64k count=1 2>/dev/null
      dd if=/tmp/r of=$D bs=64k oflag=direct; cmp -n 65536 /tmp/r $D; disconnect
    done
    """
    run(view, job, tmp_path)


def _secret(key: bytes) -> str:
    checked = key + zlib.crc32(key).to_bytes(4, "little")
    return f"DHHC-1:00:{base64.b64encode(checked).decode()}:"


def test_devices_of_a_tree_come_and_go(serve: Serve, data: Path, tmp_path: Path) -> None:
    """A clone made in a served tree is a disk of the host at once, written apart, and gone with its capsule."""
    assert execute(data, "mkdir", "/pool").status == 0
    assert execute(data, "mv", "/two", "/pool/two").status == 0
    view = serve("--path", "/pool")
    job = """
    connect; D=$(device 1); mkfs.ext4 -q $D; mkdir /m /c; mount $D /m; echo before >/m/file; sync
    ask clone; C=$(device 2); echo after >/m/file; sync
    mount $C /c; [ "$(cat /c/file)" = before ]; echo clone >/c/file; sync
    [ "$(cat /m/file)" = after ]; umount /c; umount /m; fsck.ext4 -fn $D; fsck.ext4 -fn $C
    ask remove; for i in $(seq 100); do [ -b $C ] || break; sleep 0.1; done; [ ! -b $C ]; [ -b $D ]
    ask clone; [ "$(device 3)" != $D ]; disconnect
    """
    clone = lambda: execute(data, "clone", "/pool/two", "/pool/clone").status  # noqa: E731
    remove = lambda: execute(data, "rm", "/pool/clone").status  # noqa: E731
    run(view, job, tmp_path, clone=clone, remove=remove)


def test_a_killed_server_comes_back_under_load(serve: Serve, tmp_path: Path) -> None:
    """After kill -9 under fio and a restart the host goes on without an error; files synced before are whole."""
    view = serve("--path", "/one")

    def again() -> str:
        view.kill()
        view.restart()
        return "served"

    job = """
    connect -c 1; D=$(device 1); mkfs.ext4 -q $D; mkdir /m; mount $D /m
    cp -a /etc /m; sync; (cd /m; find etc -type f -print0 | xargs -0 sha256sum) >/tmp/sums
    fio --name=v --directory=/m --rw=randwrite --bs=4k --size=16m --fsync=4 --time_based --runtime=12 \\
      --verify=crc32c --verify_fatal=1 >/tmp/fio 2>&1 & load=$!
    for i in 1 2; do sleep 3; ask again; done
    wait $load || { cat /tmp/fio; exit 1; }
    dmesg | has "Successfully reconnected"
    echo 3 >/proc/sys/vm/drop_caches; (cd /m; sha256sum -c --quiet /tmp/sums)
    umount /m; fsck.ext4 -fn $D; disconnect
    """
    run(view, job, tmp_path, again=again)


def test_connections_leave_nothing_behind(serve: Serve, tmp_path: Path) -> None:
    """After 24 connections with four queues each, the server has as many descriptors open as after the first."""
    view = serve("--path", "/two")
    job = """
    for i in $(seq 24); do
      connect -i 4; device 1; disconnect; [ $i != 1 ] || { sleep 1; echo first=$(ask descriptors); }
    done
    sleep 1; echo last=$(ask descriptors)
    """
    found = facts(run(view, job, tmp_path, descriptors=view.descriptors))
    assert found["first"] == found["last"]
