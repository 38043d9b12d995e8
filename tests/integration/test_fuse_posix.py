from __future__ import annotations

import ctypes
import errno
import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from space.events.ids import ROOT
from space.projections.fuse.mount import is_dead, mounted_at
from tests.fuse_support import NEEDS_FUSE, Mount, opened

pytestmark = NEEDS_FUSE

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """A writable mount of a new store."""
    with Mount(tmp_path / "data", tmp_path / "mnt") as mounted:
        yield mounted


@pytest.fixture
def top(mount: Mount) -> Path:
    """The root of the mount."""
    return mount.target


def refused(number: int) -> pytest.RaisesExc[OSError]:
    """An OSError with that errno."""
    return pytest.RaisesExc(OSError, check=lambda error: error.errno == number)


def names(directory: Path) -> list[str]:
    """Names in a directory, in order."""
    return sorted(each.name for each in directory.iterdir())


def rename_flags(old: Path, new: Path, flags: int) -> None:
    """renameat2, which the standard library does not have."""
    if _libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def test_bytes_written_are_bytes_read(top: Path) -> None:
    """Content written through the mount reads back equal, before and after the handle is closed."""
    data = os.urandom(3 << 20)
    with (top / "f").open("w+b", buffering=0) as file:
        for at in range(0, len(data), 5000):
            file.write(data[at : at + 5000])
        file.seek(0)
        assert file.readall() == data
    assert (top / "f").read_bytes() == data
    assert (top / "f").stat().st_size == len(data)


def test_attributes_are_kept(top: Path) -> None:
    """Mode, owner and nanosecond times are what was set."""
    path = top / "f"
    path.touch()
    path.chmod(0o4751)
    assert stat.S_IMODE(path.stat().st_mode) == 0o4751
    os.utime(path, ns=(1_234_567_890_123_456_789, 987_654_321))
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (1_234_567_890_123_456_789, 987_654_321)
    os.chown(path, 1234, 4321)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 4321)
    assert stat.S_IMODE(path.stat().st_mode) == 0o751


def test_umask_and_group_inheritance(top: Path) -> None:
    """The umask holds, and a set-group-id directory hands its group down."""
    directory = top / "d"
    directory.mkdir()
    os.chown(directory, 0, 77)
    directory.chmod(0o2775)
    before = os.umask(0o027)
    try:
        (directory / "f").touch(0o666)
        (directory / "sub").mkdir(0o777)
    finally:
        os.umask(before)
    assert ((directory / "f").stat().st_gid, (directory / "f").stat().st_mode & 0o7777) == (77, 0o640)
    assert ((directory / "sub").stat().st_gid, (directory / "sub").stat().st_mode & 0o7777) == (77, 0o2750)


def test_truncate_and_sparse(top: Path) -> None:
    """Truncation cuts and extends with zeros; a hole reads as zeros and takes no space."""
    path = top / "f"
    path.write_bytes(b"x" * 100_000)
    os.truncate(path, 10)
    assert path.read_bytes() == b"x" * 10
    os.truncate(path, 1 << 40)
    assert path.stat().st_size == 1 << 40
    assert path.stat().st_blocks * 512 <= 65_536
    with path.open("rb") as file:
        file.seek((1 << 40) - 4)
        assert file.read() == bytes(4)
        file.seek(0)
        assert file.read(12) == b"x" * 10 + bytes(2)
    with path.open("wb") as file:
        assert os.fstat(file.fileno()).st_size == 0
    with path.open("ab") as file:
        file.write(b"one")
    with path.open("ab") as file:
        file.write(b"two")
    assert path.read_bytes() == b"onetwo"


def test_links(top: Path) -> None:
    """Hard links share bytes and count; symbolic links lead where they say, and have the length they say."""
    (top / "a").write_bytes(b"1")
    os.link(top / "a", top / "b")
    (top / "b").write_bytes(b"22")
    assert (top / "a").read_bytes() == b"22"
    assert (top / "a").stat().st_nlink == 2
    assert (top / "a").stat().st_ino == (top / "b").stat().st_ino
    (top / "a").unlink()
    assert (top / "b").stat().st_nlink == 1
    (top / "s").symlink_to("b")
    assert (top / "s").read_bytes() == b"22"
    assert (top / "s").lstat().st_size == 1
    assert (top / "s").readlink() == Path("b")
    with refused(errno.EPERM):
        os.link(top, top / "c")


def test_rename(top: Path) -> None:
    """A rename replaces, NOREPLACE does not, EXCHANGE swaps, and no directory moves into itself."""
    for name in ("a", "b"):
        (top / name).write_text(name)
    rename_flags(top / "a", top / "c", RENAME_NOREPLACE)
    with refused(errno.EEXIST):
        rename_flags(top / "b", top / "c", RENAME_NOREPLACE)
    rename_flags(top / "b", top / "c", RENAME_EXCHANGE)
    assert ((top / "b").read_text(), (top / "c").read_text()) == ("a", "b")
    (top / "b").rename(top / "c")
    assert names(top) == ["c"]
    (top / "d" / "e").mkdir(parents=True)
    with refused(errno.EINVAL):
        (top / "d").rename(top / "d" / "e" / "f")
    (top / "full").mkdir()
    (top / "full" / "x").touch()
    with refused(errno.ENOTEMPTY):
        (top / "d").rename(top / "full")
    (top / "d").rename(top / "empty")
    assert names(top) == ["c", "empty", "full"]


def test_errors_are_the_kernels(top: Path) -> None:
    """Each wrong call gets the errno POSIX gives it."""
    (top / "f").touch()
    (top / "d").mkdir()
    (top / "d" / "x").touch()
    with refused(errno.ENOENT):
        (top / "none").stat()
    with refused(errno.EEXIST):
        (top / "d").mkdir()
    with refused(errno.ENOTDIR):
        (top / "f" / "x").stat()
    with refused(errno.EISDIR):
        (top / "d").open("wb")
    with refused(errno.ENOTEMPTY):
        (top / "d").rmdir()
    with refused(errno.ENOTDIR):
        (top / "f").rmdir()
    with refused(errno.EISDIR):
        (top / "d").unlink()
    with refused(errno.ENAMETOOLONG):
        (top / ("n" * 256)).touch()
    with refused(errno.EILSEQ):
        Path(os.fsdecode(os.fsencode(top) + b"/\xff\xfe")).mkdir()
    assert not is_dead(str(top))


def test_names_up_to_the_limit(top: Path) -> None:
    """Names of 255 bytes and of any UTF-8 are kept exactly."""
    for name in ("n" * 255, "ü" * 127, "a\nb", " ", "\u202e", "..."):
        (top / name).write_text(name)
        assert (top / name).read_text() == name
    assert len(names(top)) == 6


def test_extended_attributes(top: Path) -> None:
    """user.* attributes are kept with their flags; ACLs are refused as not supported."""
    path = top / "f"
    path.touch()
    os.setxattr(path, "user.a", b"1")
    with refused(errno.EEXIST):
        os.setxattr(path, "user.a", b"2", os.XATTR_CREATE)
    with refused(errno.ENODATA):
        os.setxattr(path, "user.b", b"2", os.XATTR_REPLACE)
    os.setxattr(path, "user.empty", b"")
    assert sorted(os.listxattr(path)) == ["user.a", "user.empty"]
    assert (os.getxattr(path, "user.a"), os.getxattr(path, "user.empty")) == (b"1", b"")
    os.removexattr(path, "user.a")
    with refused(errno.ENODATA):
        os.getxattr(path, "user.a")
    with refused(errno.ENOTSUP):
        os.setxattr(path, "system.posix_acl_access", b"\2\0\0\0")


def test_unlinked_file_lives_while_open(mount: Mount, top: Path) -> None:
    """A file without a name is read, written, cut and asked about through its descriptor."""
    path = top / "f"
    with path.open("w+b", buffering=0) as file:
        file.write(b"hello")
        path.unlink()
        assert not path.exists()
        assert os.fstat(file.fileno()).st_nlink == 0
        file.write(b" world")
        file.truncate(8)
        file.seek(0)
        assert file.read() == b"hello wo"
        os.fsync(file.fileno())
    mount.stop()
    with opened(mount.data) as store:
        assert store.entries(ROOT) == []


def test_replaced_file_lives_while_open(top: Path) -> None:
    """A file that was renamed over keeps its bytes for who has it open."""
    (top / "a").write_text("old")
    with (top / "a").open() as file:
        (top / "b").write_text("new")
        (top / "b").rename(top / "a")
        assert file.read() == "old"
    assert (top / "a").read_text() == "new"


def test_listing_is_stable_while_it_changes(top: Path) -> None:
    """Whoever lists a directory meets every entry that was there all along once, and no other twice."""
    lasting = {f"{number:04d}" for number in range(1000)}
    for name in lasting:
        (top / name).touch()
    seen = []
    with os.scandir(top) as entries:
        for index, entry in enumerate(entries):
            seen.append(entry.name)
            assert entry.is_file(follow_symlinks=False)
            if index % 100 == 0:
                (top / f"{index:04d}-new").touch()
                (top / seen[0]).unlink(missing_ok=True)
    assert len(seen) == len(set(seen))
    assert lasting - {seen[0]} <= set(seen)


def test_a_rewound_listing_is_fresh(top: Path) -> None:
    """The same directory handle, listed again from its start, has what is there then, each once."""
    for number in range(1500):
        (top / f"{number:04d}").touch()
    handle = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert len(os.listdir(handle)) == 1500
        for number in range(500):
            (top / f"{number:04d}").unlink()
        for _ in range(2):
            assert sorted(os.listdir(handle)) == names(top)
    finally:
        os.close(handle)


def test_dot_and_dot_dot_are_listed(top: Path) -> None:
    """A listing has both, with the inodes they lead to, as some old programs want."""
    (top / "d").mkdir()
    listed = subprocess.run(
        ["ls", "-ai", top / "d"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert listed == [str((top / "d").stat().st_ino), ".", str(top.stat().st_ino), ".."]


def test_special_files(top: Path) -> None:
    """Fifos, sockets and devices are what they were made as."""
    os.mkfifo(top / "fifo")
    os.mknod(top / "socket", stat.S_IFSOCK | 0o600)
    os.mknod(top / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    assert stat.S_ISFIFO((top / "fifo").stat().st_mode)
    assert stat.S_ISSOCK((top / "socket").stat().st_mode)
    assert (top / "null").stat().st_rdev == os.makedev(1, 3)


def test_statfs_is_of_the_disk(mount: Mount, top: Path) -> None:
    """Room left is that of the disk the data directory is on."""
    here, below = os.statvfs(top), os.statvfs(mount.data)
    assert (here.f_blocks, here.f_frsize, here.f_namemax) == (below.f_blocks, below.f_frsize, 255)
    assert 0 < here.f_bavail <= here.f_blocks


def test_mapped_memory_is_shared(top: Path) -> None:
    """What is written through a shared mapping is in the file."""
    import mmap

    path = top / "f"
    path.write_bytes(bytes(10_000))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[5000:5005] = b"hello"
        view.flush()
    assert path.read_bytes() == bytes(5000) + b"hello" + bytes(4995)


def test_parallel_writers(top: Path) -> None:
    """Threads that write files of their own and one common file lose nothing."""
    (top / "common").write_bytes(bytes(8 * 64 * 1000))

    def work(number: int) -> None:
        with (
            (top / f"own-{number}").open("wb", buffering=0) as own,
            (top / "common").open("r+b", buffering=0) as common,
        ):
            for index in range(64):
                own.write(bytes([number]) * 1000)
                common.seek((index * 8 + number) * 1000)
                common.write(bytes([number]) * 1000)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        assert (top / f"own-{number}").read_bytes() == bytes([number]) * 64_000
    common = (top / "common").read_bytes()
    assert common == b"".join(bytes([number]) * 1000 for _ in range(64) for number in range(8))


@pytest.mark.requires("/etc/shadow")  # only root reads it, and only root can become somebody else
def test_set_id_bits_go_when_another_user_writes(top: Path) -> None:
    """A write or truncation by somebody unprivileged clears set-id bits, and permissions hold."""
    for name in ("write", "cut"):
        (top / name).write_bytes(b"x")
        os.chown(top / name, 1000, 1000)
        (top / name).chmod(0o6777)
    (top / "private").write_bytes(b"x")
    (top / "private").chmod(0o600)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(top)
            os.setresgid(2000, 2000, 2000)
            os.setresuid(2000, 2000, 2000)
            status = _write_as_another(Path())
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert stat.S_IMODE((top / "write").stat().st_mode) == 0o777
    assert stat.S_IMODE((top / "cut").stat().st_mode) == 0o777


def _write_as_another(top: Path) -> int:
    """Runs as another user; the number of the first thing that went wrong."""
    try:
        with (top / "write").open("r+b") as file:
            file.write(b"y")
        os.truncate(top / "cut", 0)
    except PermissionError:
        return 2
    try:
        (top / "private").read_bytes()
    except PermissionError:
        return 0
    return 3


def test_unmount_leaves_nothing(mount: Mount, top: Path) -> None:
    """After SIGTERM nothing is mounted, the directory made for it is gone, and everything is in the store."""
    (top / "f").write_text("x")
    mount.stop()
    assert mounted_at(str(top)) == []
    assert not top.exists()
    with opened(mount.data) as store:
        assert store.read(store.resolve("/f")) == b"x"


def test_unmounting_from_outside_ends_the_server(mount: Mount, top: Path) -> None:
    """fusermount3 -u ends the process with status 0, and what was written is durable."""
    (top / "f").write_text("x")
    subprocess.run(["fusermount3", "-u", str(top)], check=True)
    assert mount.wait() == 0
    with opened(mount.data) as store:
        assert store.read(store.resolve("/f")) == b"x"
