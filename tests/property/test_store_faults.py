"""Disks that fail while the store runs: the failed command is reported, everything before it stands."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import space
from space._node.store import Store
from space.policy.model import Policy
from space.wal.faulty_disk import FaultyDisk

SEGMENT_BYTES = 64 << 10
RAW = Policy.from_document({"compression": "none", "dedupe": False})


@attrs.define
class Machine:
    """A disk in memory for the log, a directory for the rest."""

    home: Path
    disk: FaultyDisk

    @classmethod
    def new(cls, home: Path, seed: int) -> Machine:
        """With an empty directory on both."""
        disk = FaultyDisk.from_image({str(home / "there before"): b""}, random.Random(seed))
        disk.capacity = 1 << 30
        return cls(home, disk)

    def open(self) -> Store:
        """The store on it."""
        return space.open(self.home, disk=self.disk, segment_bytes=SEGMENT_BYTES)


def content(number: int, size: int) -> bytes:
    """What file ``number`` holds."""
    return random.Random(number).randbytes(size)


SIZES = st.lists(st.sampled_from([0, 10, 700, 5000, 20_000, 70_000]), min_size=1, max_size=12)


def put_all(store: Store, sizes: list[int], kept: dict[str, bytes], doubtful: dict[str, bytes]) -> None:
    """A file of each size; what was acknowledged is kept, what failed is doubtful."""
    for size in sizes:
        number = len(kept) + len(doubtful)
        data = content(number, size)
        try:
            store.put(data, name=f"/{number}", policy=RAW)
            kept[f"/{number}"] = data
        except space.StorageError:
            doubtful[f"/{number}"] = data


def check(store: Store, kept: dict[str, bytes], doubtful: dict[str, bytes]) -> None:
    """All that was acknowledged is there; what failed is there whole or not at all; the log agrees."""
    found = {f"/{entry.name.decode()}": store.get(entry.id) for entry in store.ls("/")}
    assert {name: found.get(name) for name in kept} == kept
    assert {name: data for name, data in found.items() if name not in kept}.items() <= doubtful.items()
    assert store.replay(verify=True).equal
    assert store.verify().findings == []


@given(
    sizes=SIZES,
    at=st.integers(1, 150),
    error=st.sampled_from([errno.EIO, errno.ENOSPC]),
    seed=st.integers(0, 2**32),
)
def test_any_operation_of_the_log_may_fail_once(sizes: list[int], at: int, error: int, seed: int) -> None:
    """One failing operation: one clear error; the store works on, or after it was opened again."""
    with tempfile.TemporaryDirectory() as scratch:
        machine = Machine.new(Path(scratch), seed)
        machine.disk.fail_at, machine.disk.fail_with = machine.disk.operations + at, error
        kept: dict[str, bytes] = {}
        doubtful: dict[str, bytes] = {}
        with contextlib.suppress(space.StorageError), machine.open() as store:
            put_all(store, sizes, kept, doubtful)
        machine.disk.fail_at = None
        machine.disk.kill()
        with machine.open() as store:
            check(store, kept, doubtful)
            store.put(b"on", name="/on")
        kept["/on"] = b"on"
        machine.disk.crash()
        with machine.open() as store:
            check(store, kept, doubtful)


@given(sizes=SIZES, at=st.integers(1, 150), seed=st.integers(0, 2**32))
def test_power_loss_keeps_what_was_acknowledged(sizes: list[int], at: int, seed: int) -> None:
    """The power goes at any operation of the log: acknowledged files are there after it returns."""

    class PowerLossError(BaseException):
        """The machine stops here."""

    with tempfile.TemporaryDirectory() as scratch:
        machine = Machine.new(Path(scratch), seed)
        kept: dict[str, bytes] = {}
        doubtful: dict[str, bytes] = {}
        stop = machine.disk.operations + at

        def hook(_operation: str, _path: str) -> None:
            if machine.disk.operations >= stop:
                raise PowerLossError

        machine.disk.hook = hook
        store = None
        with contextlib.suppress(PowerLossError):
            store = machine.open()
            for number, size in enumerate(sizes):
                doubtful[f"/{number}"] = content(number, size)
                store.put(doubtful[f"/{number}"], name=f"/{number}", policy=RAW)
                kept[f"/{number}"] = doubtful.pop(f"/{number}")
        if store is not None:
            with contextlib.suppress(PowerLossError, space.SpaceError):
                store.close()
        machine.disk.hook = None
        machine.disk.crash()
        with machine.open() as store:
            check(store, kept, doubtful)


@given(sizes=SIZES, capacity=st.integers(1, 60), seed=st.integers(0, 2**32))
def test_a_full_log_disk_works_again_when_space_returns(sizes: list[int], capacity: int, seed: int) -> None:
    """Full at any size: commands fail with DiskFullError, earlier ones stand, later ones work on more space."""
    with tempfile.TemporaryDirectory() as scratch:
        machine = Machine.new(Path(scratch), seed)
        kept: dict[str, bytes] = {}
        doubtful: dict[str, bytes] = {}
        with machine.open() as store:
            machine.disk.capacity = machine.disk.used_bytes + capacity * 4096 + (8 << 20)
            put_all(store, sizes * 3, kept, doubtful)
            for name, data in kept.items():
                assert store.get(name) == data
            machine.disk.capacity = 1 << 30
            store.put(b"on", name="/on")
            kept["/on"] = b"on"
            check(store, kept, doubtful)
        with machine.open() as store:
            check(store, kept, doubtful)


@contextlib.contextmanager
def small_disk(where: Path, mebibytes: int) -> Iterator[Path]:
    """A real file system of this size."""
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "none", str(where)], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


@pytest.mark.requires("mount", "/proc/1/environ")  # the latter only root may read
@pytest.mark.parametrize("room", [1, 4, 9])
def test_a_real_disk_that_fills_up(tmp_path: Path, room: int) -> None:
    """On a full file system commands fail clearly and reads go on; with space again so do writes."""
    kept: dict[str, bytes] = {}
    doubtful: dict[str, bytes] = {}
    with small_disk(tmp_path / "disk", 48) as disk:
        ballast = disk / "ballast"
        with space.open(disk / "store", segment_bytes=1 << 20) as store:
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, free - (room << 20))
            for _ in range(20):
                put_all(store, [300_000] * 3, kept, doubtful)
            assert doubtful
            for name, data in kept.items():
                assert store.get(name) == data
            ballast.unlink()
            store.put(b"on", name="/on")
            kept["/on"] = b"on"
            check(store, kept, doubtful)
        with space.open(disk / "store") as store:
            check(store, kept, doubtful)


@pytest.mark.requires("mount", "/proc/1/environ")
def test_space_is_given_back_on_a_full_disk(tmp_path: Path) -> None:
    """Removing and reclaiming work on a disk too full for anything else, and make room again."""
    forgetful = Policy.from_document({"compression": "none", "dedupe": False, "history": "none"})
    with (
        small_disk(tmp_path / "disk", 64) as disk,
        space.open(disk / "store", segment_bytes=1 << 20) as store,
    ):
        number = 0
        with contextlib.suppress(space.DiskFullError):
            while number < 100:
                number += 1
                store.put(content(number, 1 << 20), name=f"/{number}", policy=forgetful)
        assert number < 100
        for gone in range(1, number - 2):
            store.rm(f"/{gone}")
        assert store.gc().bytes_given_back > 20 << 20
        store.put(b"on", name="/on")
        assert store.get(f"/{number - 1}") == content(number - 1, 1 << 20)
        assert store.verify().findings == []
