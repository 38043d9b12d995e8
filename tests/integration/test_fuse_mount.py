from __future__ import annotations

import asyncio
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from space._errors import ConflictError, NotFoundError, SpaceError, Status, UnavailableError, UsageError
from space._node.local_vfs import LocalFileSystem
from space.projections.fuse import mount as mounting
from space.projections.fuse.mount import daemonize, is_dead, mounted_at, prepare_target, serve, unmount
from tests.fuse_support import NEEDS_FUSE, REPOSITORY, Mount, opened

pytestmark = NEEDS_FUSE


def refused(number: int) -> pytest.RaisesExc[OSError]:
    """An OSError with that errno."""
    return pytest.RaisesExc(OSError, check=lambda error: error.errno == number)


def test_a_dead_mount_is_replaced(tmp_path: Path) -> None:
    """A directory whose server was killed says so with ENOTCONN; the next mount clears it and says that."""
    data, target = tmp_path / "data", tmp_path / "mnt"
    with Mount(data, target) as first:
        (target / "f").write_text("x")
        first.kill()
        assert is_dead(str(target))
        with refused(errno.ENOTCONN):
            list(target.iterdir())
        with Mount(data, target) as second:
            assert second.ready["notices"] == [f"replaced a dead mount at {target}"]
            assert (target / "f").read_text() == "x"
    assert mounted_at(str(target)) == []


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    """A live mount, a directory with something in it, and a file are refused with a reason."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "f").touch()
    with pytest.raises(ConflictError, match="not empty"):
        prepare_target(str(tmp_path / "full"))
    with pytest.raises(ConflictError, match="not a directory") as found:
        prepare_target(str(tmp_path / "full" / "f"))
    assert found.value.status is Status.NOT_DIRECTORY
    with pytest.raises(UsageError):
        prepare_target(str(tmp_path / "full" / "f" / "below"))
    with (
        Mount(tmp_path / "data", tmp_path / "mnt"),
        pytest.raises(ConflictError, match="mounted on it already"),
    ):
        prepare_target(str(tmp_path / "mnt"))


def test_missing_directories_are_made(tmp_path: Path) -> None:
    """A missing target is made with those above it, and goes with the mount; one that was there stays."""
    deep, there = tmp_path / "a" / "b" / "c", tmp_path / "there"
    there.mkdir()
    with Mount(tmp_path / "data", deep) as mount:
        assert mount.ready["notices"] == [f"made the directory {deep}"]
    assert not (tmp_path / "a").exists()
    with Mount(tmp_path / "data", there) as mount:
        assert mount.ready["notices"] == []
    assert there.exists()


def test_names_with_blanks_are_found_in_mountinfo(tmp_path: Path) -> None:
    """A mount point with blanks, a backslash and a newline in its name is seen as mounted."""
    target = tmp_path / "a b\\c\nd"
    with Mount(tmp_path / "data", target):
        assert mounted_at(str(target)) == ["fuse.space"]


@pytest.fixture(scope="module", params=[("--read-only",), ("--at", "@2")], ids=["read-only", "past"])
def read_only(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A mount of a file ``f`` that cannot be written to."""
    place = tmp_path_factory.mktemp("read-only")
    with opened(place / "data") as store:
        store.put(b"x", name="/f")
        store.put(b"later", name="/later")
    with Mount(place / "data", place / "mnt", *request.param):
        yield place / "mnt"


@pytest.mark.parametrize(
    "change",
    [
        lambda top: (top / "f").write_text("y"),
        lambda top: (top / "g").touch(),
        lambda top: (top / "f").unlink(),
        lambda top: (top / "d").mkdir(),
        lambda top: (top / "f").rename(top / "g"),
        lambda top: (top / "f").chmod(0o600),
        lambda top: os.truncate(top / "f", 0),
        lambda top: os.setxattr(top / "f", "user.a", b"1"),
        lambda top: os.link(top / "f", top / "g"),
        lambda top: (top / "g").symlink_to("f"),
        lambda top: os.utime(top / "f"),
    ],
    ids=[
        "write",
        "create",
        "unlink",
        "mkdir",
        "rename",
        "chmod",
        "truncate",
        "setxattr",
        "link",
        "symlink",
        "utime",
    ],
)
def test_read_only_mounts_refuse_every_change(read_only: Path, change: Callable[[Path], object]) -> None:
    """A read-only mount and a past moment give EROFS to every change, and still read."""
    with refused(errno.EROFS):
        change(read_only)
    assert (read_only / "f").read_text() == "x"


def test_a_past_moment_is_mounted(tmp_path: Path) -> None:
    """A mount of a past moment shows what was there then, and leaves no tables behind."""
    data, target = tmp_path / "data", tmp_path / "mnt"
    with opened(data) as store:
        store.put(b"old", name="/f")
        moment = f"@{store.position}"
        store.put(b"new", name="/g")
    with Mount(data, target, "--at", moment):
        assert [each.name for each in target.iterdir()] == ["f"]
        assert (target / "f").read_bytes() == b"old"
    assert list((data / "scratch").glob("past-*")) == []


def test_a_subtree_is_mounted_as_a_root(tmp_path: Path) -> None:
    """Only what is below the path shows, its inode is 1, and what is made lands there."""
    data, target = tmp_path / "data", tmp_path / "mnt"
    with opened(data) as store:
        store.mkdir("/a/b", parents=True)
        store.put(b"x", name="/a/b/f")
    with Mount(data, target, "--path", "/a"):
        assert target.stat().st_ino == 1
        assert (target / "b" / "f").read_bytes() == b"x"
        assert (target / "b" / "..").stat().st_ino == 1
        (target / "g").write_text("y")
    with opened(data) as store:
        assert store.read(store.resolve("/a/g")) == b"y"


def test_a_single_capsule_is_a_directory_with_content(tmp_path: Path) -> None:
    """A capsule shows as DIR/content, which can be written; nothing can be put beside it."""
    data, target = tmp_path / "data", tmp_path / "mnt"
    with opened(data) as store:
        store.put(b"hello", name="/f")
    with Mount(data, target, "--path", "/f"):
        assert [each.name for each in target.iterdir()] == ["content"]
        assert (target / "content").read_bytes() == b"hello"
        with (target / "content").open("r+b") as file:
            file.write(b"J")
        for change in (
            (target / "content").unlink,
            (target / "other").touch,
            lambda: (target / "content").rename(target / "other"),
            lambda: target.chmod(0o777),
        ):
            with refused(errno.EPERM):
                change()
    with opened(data) as store:
        assert store.read(store.resolve("/f")) == b"Jello"


def test_requests_that_were_taken_back_before_they_were_read(tmp_path: Path) -> None:
    """A mount that read in vain more often than it has workers, since requests were taken back, answers."""
    with Mount(tmp_path / "data", tmp_path / "mnt", "--nothing-to-read") as mounted:
        for number in range(300):
            (mounted.target / str(number)).touch()
        assert len(list(mounted.target.iterdir())) == 300


def test_what_was_taken_back_while_the_loop_was_busy_is_not_read() -> None:
    """What there was to read when the loop looked, and is no longer there in its next turn, is no request."""

    async def turns() -> None:
        device = mounting._Device()
        reader, writer = os.pipe()
        try:
            waiting = asyncio.create_task(device.wait_readable(reader))
            await asyncio.sleep(0)
            os.write(writer, b"x")
            asyncio.get_running_loop().call_soon(os.read, reader, 1)  # before the waiting task goes on
            for _ in range(10):
                await asyncio.sleep(0)
            assert not waiting.done()
            os.write(writer, b"y")
            await waiting
            assert os.read(reader, 1) == b"y"
            asyncio.get_running_loop().remove_reader(reader)
        finally:
            os.close(reader)
            os.close(writer)

    asyncio.run(turns())


def test_what_the_library_changes_shows_in_the_mount(tmp_path: Path) -> None:
    """Changes made beside the mount, in the same store, show at the next open and the next lookup."""
    program = """
import os, signal, sys, threading
from pathlib import Path
from space._node.local_vfs import LocalFileSystem
from space._node.store import Store
from space.projections.fuse.mount import serve
data, target = sys.argv[1:]
top = Path(target)
store = Store(data)
store.put(b"one", name="/f")
failed = []

def read(path):
    # nothing but open and read: a stat would make the kernel look at the time of change
    descriptor = os.open(path, os.O_RDONLY)
    found = os.read(descriptor, 100)
    os.close(descriptor)
    return found

def look():
    try:
        assert read(top / "f") == b"one"
        store.write(store.resolve("/f"), 0, b"two")
        assert read(top / "f") == b"two"
        store.put(b"n", name="/new")
        assert (top / "new").read_bytes() == b"n"
        (top / "mine").write_bytes(b"m")
        assert store.read(store.resolve("/mine")) == b"m"
    except BaseException as error:
        failed.append(repr(error))
    os.kill(os.getpid(), signal.SIGTERM)

threads = []
def ready(found):
    threads.append(threading.Thread(target=look))
    threads[0].start()

serve(LocalFileSystem(store), target, on_ready=ready)
threads[0].join()
store.close()
sys.exit("; ".join(failed) or 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "data"), str(tmp_path / "mnt")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "lacking, said",
    [
        ("pyfuse3", "pip install 'space-store\\[fuse\\]'"),
        ("device", "modprobe fuse"),
        ("program", "apt install fuse3"),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lacking: str, said: str
) -> None:
    """Without pyfuse3, /dev/fuse or fusermount3 the error says how to get it."""
    if lacking == "pyfuse3":
        monkeypatch.setattr(mounting, "find_spec", lambda name: None)
    elif lacking == "device":
        monkeypatch.setattr(mounting, "DEVICE", str(tmp_path / "none"))
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    with opened(tmp_path / "data") as store, pytest.raises(UnavailableError, match=said):
        serve(LocalFileSystem(store), str(tmp_path / "mnt"))
    assert not (tmp_path / "mnt").exists()


def test_a_refused_unmount_is_reported(tmp_path: Path) -> None:
    """Unmounting what is not mounted is an error that says so."""
    with pytest.raises(SpaceError, match="cannot unmount"):
        unmount(str(tmp_path))


BACKGROUND = """
import json, os, sys
from pathlib import Path
from space._node.local_vfs import LocalFileSystem
from space._node.store import Store
from space.projections.fuse.mount import daemonize, serve
from space._errors import SpaceError
data, target, log = sys.argv[1:]

def run(ready):
    with Store(data, create=False) as store:
        report = {"pid": os.getpid(), "target": target}
        serve(LocalFileSystem(store), target, on_ready=lambda found: ready(report))
    return 0

try:
    print(json.dumps(daemonize(run, log_file=Path(log))))
except SpaceError as error:
    sys.stderr.write(str(error) + "\\n")
    sys.exit(error.kind.exit_status)
"""


def background(data: Path, target: Path, log: Path) -> subprocess.CompletedProcess[str]:
    """Runs a program that mounts in the background and ends."""
    return subprocess.run(
        [sys.executable, "-c", BACKGROUND, str(data), str(target), str(log)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_mount_in_the_background(tmp_path: Path) -> None:
    """The command ends when the mount answers; fusermount3 -u ends the background process."""
    data, target, log = tmp_path / "data", tmp_path / "mnt", tmp_path / "log"
    with opened(data) as store:
        store.put(b"x", name="/f")
    done = background(data, target, log)
    try:
        assert (done.returncode, done.stderr) == (0, "")
        report = json.loads(done.stdout)
        assert (target / "f").read_bytes() == b"x"
        assert Path(f"/proc/{report['pid']}").exists()
        again = background(data, tmp_path / "mnt2", log)
        assert again.returncode == 7
        assert "in use by process" in again.stderr
    finally:
        subprocess.run(["fusermount3", "-u", str(target)], check=True)
    while Path(f"/proc/{report['pid']}").exists():  # it ends by itself; a hang is the timeout's business
        time.sleep(0.01)
    assert log.read_text() == ""
    with opened(data) as store:
        assert store.resolve("/f")


def test_a_background_failure_reaches_the_parent(tmp_path: Path) -> None:
    """What fails before the mount is ready is raised where it was started, with its kind."""

    def missing(ready: Callable[[dict[str, object]], None]) -> int:
        raise NotFoundError("no store at x", hint="make one")

    with pytest.raises(NotFoundError, match=r"no store at x \(make one\)"):
        daemonize(missing)

    def broken(ready: Callable[[dict[str, object]], None]) -> int:
        raise ZeroDivisionError("oops")

    with pytest.raises(SpaceError, match="ZeroDivisionError: oops"):
        daemonize(broken)

    def silent(ready: Callable[[dict[str, object]], None]) -> int:
        os._exit(3)

    with pytest.raises(SpaceError, match="ended before it was ready"):
        daemonize(silent)

    def fine(ready: Callable[[dict[str, object]], None]) -> int:
        ready({"answer": 42})
        return 0

    assert daemonize(fine) == {"answer": 42}
