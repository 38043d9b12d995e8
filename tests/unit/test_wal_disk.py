from __future__ import annotations

import errno
import io
import random
import threading
from pathlib import Path

import pytest

from space.wal.disk import Disk, RealDisk
from space.wal.faulty_disk import SECTOR_BYTES, FaultyDisk

BLOCK = 4096


@pytest.fixture(params=["real", "faulty"])
def disk(request: pytest.FixtureRequest) -> Disk:
    """Each implementation of the Protocol."""
    return RealDisk() if request.param == "real" else FaultyDisk()


@pytest.fixture
def root(disk: Disk, tmp_path: Path) -> str:
    """An empty directory on that disk."""
    if isinstance(disk, FaultyDisk):
        disk.mkdir("/root")
        return "/root"
    return str(tmp_path)


def test_written_bytes_are_read_back_at_once(disk: Disk, root: str) -> None:
    """Buffers are written one after the other and are visible without a sync."""
    file = disk.open(f"{root}/a", create=True)
    file.pwritev([b"one", bytearray(b"two"), memoryview(b"three"), b""], 5)
    assert file.pread(100, 0) == bytes(5) + b"onetwothree"
    assert file.size() == 16
    file.fdatasync()
    assert disk.open(f"{root}/a").pread(3, 8) == b"two"


def test_thousands_of_buffers_are_written_as_one(disk: Disk, root: str) -> None:
    """The limit of the system call on the number of buffers does not show."""
    pieces = [bytes([number % 251]) * (number % 7) for number in range(5000)]
    file = disk.open(f"{root}/a", create=True)
    file.pwritev(pieces, 0)
    assert file.pread(100_000, 0) == b"".join(pieces)
    buffers = [bytearray(len(piece)) for piece in pieces]
    assert file.preadv(buffers, 0) == sum(map(len, pieces))
    assert [bytes(buffer) for buffer in buffers] == pieces


def test_reads_stop_at_the_end(disk: Disk, root: str) -> None:
    """A read that reaches over the end returns what there is."""
    file = disk.open(f"{root}/a", create=True)
    file.pwritev([b"12345"], 0)
    assert file.pread(10, 3) == b"45"
    assert file.pread(10, 50) == b""
    buffers = [bytearray(2), bytearray(9)]
    assert file.preadv(buffers, 1) == 4
    assert bytes(buffers[0]) == b"23"
    assert bytes(buffers[1][:2]) == b"45"


def test_allocating_extends_with_zeros(disk: Disk, root: str) -> None:
    """Reserved space reads as zeros and counts as taken; content below it stays."""
    file = disk.open(f"{root}/a", create=True)
    file.pwritev([b"x" * 10], 0)
    file.allocate(0, 4 * BLOCK)
    assert file.pread(4 * BLOCK, 0) == b"x" * 10 + bytes(4 * BLOCK - 10)
    assert file.allocated_bytes() >= 4 * BLOCK


def test_a_hole_gives_blocks_back_and_keeps_the_size(disk: Disk, root: str) -> None:
    """A punched range reads as zeros, its neighbours stay, and the disk has more room."""
    file = disk.open(f"{root}/a", create=True)
    file.pwritev([b"x" * (8 * BLOCK)], 0)
    file.fdatasync()
    before = file.allocated_bytes()
    file.punch_hole(2 * BLOCK, 3 * BLOCK)
    assert file.allocated_bytes() == before - 3 * BLOCK
    assert file.size() == 8 * BLOCK
    assert file.pread(8 * BLOCK, 0) == b"x" * (2 * BLOCK) + bytes(3 * BLOCK) + b"x" * (3 * BLOCK)


def test_zeroing_and_truncating(disk: Disk, root: str) -> None:
    """A zeroed range may start and end anywhere; a shorter file that grows again shows zeros."""
    file = disk.open(f"{root}/a", create=True)
    file.pwritev([b"x" * 100], 0)
    file.zero_range(10, 80)
    assert file.pread(200, 0) == b"x" * 10 + bytes(80) + b"x" * 10
    file.truncate(5)
    file.truncate(20)
    assert file.pread(200, 0) == b"xxxxx" + bytes(15)


def test_names(disk: Disk, root: str) -> None:
    """Directories and files appear, are renamed over others, and disappear."""
    disk.mkdir(f"{root}/d")
    for name in ("a", "b"):
        disk.open(f"{root}/d/{name}", create=True).pwritev([name.encode()], 0)
    disk.rename(f"{root}/d/a", f"{root}/d/b")
    disk.sync_dir(f"{root}/d")
    assert disk.listdir(f"{root}/d") == ["b"]
    assert disk.open(f"{root}/d/b").pread(9, 0) == b"a"
    disk.unlink(f"{root}/d/b")
    assert not disk.exists(f"{root}/d/b")
    assert disk.exists(f"{root}/d")
    assert disk.free_bytes(root) > 0


def test_wrong_names_are_os_errors(disk: Disk, root: str) -> None:
    """What is not there, or there already, is told apart by errno."""
    disk.mkdir(f"{root}/d")
    with pytest.raises(FileExistsError):
        disk.mkdir(f"{root}/d")
    with pytest.raises(FileNotFoundError):
        disk.open(f"{root}/none")
    with pytest.raises(FileNotFoundError):
        disk.open(f"{root}/none/a", create=True)
    with pytest.raises(FileNotFoundError):
        disk.unlink(f"{root}/none")
    with pytest.raises(FileNotFoundError):
        disk.listdir(f"{root}/none")


def test_a_closed_file_cannot_be_used(disk: Disk, root: str) -> None:
    """Closing twice is harmless, using a closed file is EBADF."""
    file = disk.open(f"{root}/a", create=True)
    file.close()
    file.close()
    with pytest.raises(OSError) as caught:
        file.pread(1, 0)
    assert caught.value.errno == errno.EBADF


def test_readers_survive_unlink(disk: Disk, root: str) -> None:
    """An open file can be read after its name is gone."""
    file = disk.open(f"{root}/a", create=True)
    file.pwritev([b"kept"], 0)
    disk.unlink(f"{root}/a")
    assert file.pread(9, 0) == b"kept"


def test_only_real_files_have_descriptors(tmp_path: Path) -> None:
    """A descriptor is given out where there is one."""
    assert RealDisk().open(str(tmp_path / "a"), create=True).fileno() >= 0
    with pytest.raises(io.UnsupportedOperation):
        FaultyDisk().open("/a", create=True).fileno()


def test_a_crash_loses_only_what_was_not_synced() -> None:
    """Over many crashes: synced sectors always stay, unsynced ones are old or new, and both happen."""
    outcomes = set()
    for seed in range(200):
        disk = FaultyDisk(random.Random(seed))
        file = disk.open("/a", create=True)
        file.pwritev([b"o" * (4 * SECTOR_BYTES)], 0)
        file.fdatasync()
        disk.sync_dir("/")
        file.pwritev([b"n" * (2 * SECTOR_BYTES)], SECTOR_BYTES)
        disk.crash()
        content = disk.image()["/a"]
        sectors = [content[at : at + SECTOR_BYTES] for at in range(0, len(content), SECTOR_BYTES)]
        assert {len(set(sector)) for sector in sectors} == {1}
        outcomes.add(b"".join(sector[:1] for sector in sectors))
        with pytest.raises(OSError):
            file.pread(1, 0)
    assert outcomes == {b"oooo", b"onoo", b"oono", b"onno"}


def test_a_crash_may_lose_names_that_were_not_synced() -> None:
    """A file whose directory was not synced is there after some crashes and not after others."""
    found = set()
    for seed in range(50):
        disk = FaultyDisk(random.Random(seed))
        disk.open("/a", create=True).fdatasync()
        disk.crash()
        found.add(disk.exists("/a"))
    assert found == {True, False}


def test_a_kill_keeps_what_was_written() -> None:
    """The death of the process closes files and loses nothing."""
    disk = FaultyDisk()
    file = disk.open("/a", create=True)
    file.pwritev([b"x"], 0)
    disk.kill()
    assert disk.image() == {"/a": b"x"}
    with pytest.raises(OSError):
        file.fdatasync()


def test_a_full_disk_takes_what_fits() -> None:
    """ENOSPC comes after the part that fits was written; deleting makes room again."""
    disk = FaultyDisk(capacity=2 * BLOCK)
    file = disk.open("/a", create=True)
    with pytest.raises(OSError) as caught:
        file.pwritev([b"x" * (3 * BLOCK)], 100)
    assert caught.value.errno == errno.ENOSPC
    assert file.size() == 2 * BLOCK
    other = disk.open("/b", create=True)
    with pytest.raises(OSError):
        other.allocate(0, 1)
    disk.unlink("/a")
    other.allocate(0, 2 * BLOCK)


def test_the_chosen_operation_fails_once() -> None:
    """``fail_at`` names one operation by number; the ones around it work."""
    disk = FaultyDisk()
    file = disk.open("/a", create=True)
    disk.fail_at = disk.operations + 2
    file.pwritev([b"1"], 0)
    with pytest.raises(OSError) as caught:
        file.pwritev([b"2"], 1)
    assert caught.value.errno == errno.EIO
    file.pwritev([b"3"], 1)
    assert file.pread(9, 0) == b"13"


def test_after_a_failed_fdatasync_the_cache_may_lie() -> None:
    """What is seen stays, a later fdatasync succeeds, and only dropping the cache shows what was lost."""
    lost = 0
    for seed in range(40):
        disk = FaultyDisk(random.Random(seed))
        file = disk.open("/a", create=True)
        file.pwritev([b"x" * 100], 0)
        disk.fail_at = disk.operations + 1
        with pytest.raises(OSError):
            file.fdatasync()
        file.fdatasync()
        assert file.pread(100, 0) == b"x" * 100
        file.drop_cache()
        lost += file.pread(100, 0) != b"x" * 100
    assert 0 < lost < 40


def test_the_hook_sees_every_operation() -> None:
    """A hook can slow operations down or fail them."""
    disk = FaultyDisk()
    seen: list[tuple[str, str]] = []
    disk.hook = lambda operation, path: seen.append((operation, path))
    disk.open("/a", create=True).size()
    assert seen == [("open", "/a"), ("size", "/a")]


def test_threads_may_share_a_file(disk: Disk, root: str) -> None:
    """Writers of different ranges and readers do not disturb each other."""
    file = disk.open(f"{root}/a", create=True)

    def write(number: int) -> None:
        for round_ in range(20):
            file.pwritev([bytes([number]) * 1000], (number * 20 + round_) * 1000)
            assert file.pread(1000, number * 20_000) == bytes([number]) * 1000

    threads = [threading.Thread(target=write, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.pread(200_000, 20_000) == b"".join(bytes([number]) * 20_000 for number in range(1, 5))
