from __future__ import annotations

import sqlite3
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuse_support import NEEDS_FUSE, Mount, opened

pytestmark = NEEDS_FUSE

SOURCE = Path(sysconfig.get_path("stdlib"))
TREES = ("email", "json", "asyncio", "unittest", "encodings", "xml", "multiprocessing")

WRITER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA journal_mode=" + sys.argv[2])
db.execute("PRAGMA synchronous=FULL")
db.execute("CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, body BLOB)")
number = 0
while True:
    db.execute("BEGIN")
    for _ in range(20):
        number += 1
        db.execute("INSERT INTO t (body) VALUES (?)", (bytes([number % 256]) * 700,))
    db.execute("UPDATE t SET body = ? WHERE id % 7 = ?", (b"u" * 300, number % 7))
    db.execute("COMMIT")
    print(number, flush=True)
"""


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """A writable mount of a new store."""
    with Mount(tmp_path / "data", tmp_path / "mnt") as mounted:
        yield mounted


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Output of a program that has to succeed."""
    done = subprocess.run(
        [str(each) for each in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def pack(directory: Path) -> Path:
    """A tar archive of a real source tree."""
    archive = directory / "tree.tar"
    run("tar", "--exclude=__pycache__", "-cf", archive, "-C", SOURCE, *TREES)
    return archive


@pytest.mark.requires("tar", "diff")
def test_tar_through_the_mount(mount: Mount, tmp_path: Path) -> None:
    """A source tree unpacked by tar on the mount is the tree, also after a rebuild."""
    archive = pack(tmp_path)
    plain = tmp_path / "plain"
    for place in (plain, mount.target / "tree"):
        place.mkdir()
        run("tar", "-xf", archive, "-C", place)
    run("diff", "-r", plain, mount.target / "tree")
    run("tar", "-df", archive, "-C", mount.target / "tree")
    mount.stop()
    run("rm", "-r", mount.data / "state")
    with Mount(mount.data, mount.target) as again:
        run("diff", "-r", plain, again.target / "tree")
        run("tar", "-df", archive, "-C", again.target / "tree")
        run("rm", "-r", again.target / "tree")
        assert list(again.target.iterdir()) == []


@pytest.mark.requires("git", "tar")
def test_git_on_the_mount(mount: Mount, tmp_path: Path) -> None:
    """Git initialises, adds, commits, checks, collects garbage and clones on the mount."""
    tree = mount.target / "tree"
    tree.mkdir()
    run("tar", "-xf", pack(tmp_path), "-C", tree)
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main")
    run(*git, "init", cwd=tree)
    run(*git, "add", "-A", cwd=tree)
    run(*git, "commit", "-qm", "one", cwd=tree)
    run(*git, "mv", "json", "json2", cwd=tree)
    run(*git, "commit", "-qm", "two", cwd=tree)
    run(*git, "fsck", "--strict", cwd=tree)
    run(*git, "gc", "--prune=now", cwd=tree)
    run(*git, "fsck", "--full", cwd=tree)
    run(*git, "checkout", "-q", "HEAD^", cwd=tree)
    assert run(*git, "status", "--porcelain", cwd=tree) == ""
    run(*git, "clone", "-q", tree, tmp_path / "clone")
    assert run(*git, "rev-parse", "main", cwd=tree) == run(
        *git, "rev-parse", "origin/main", cwd=tmp_path / "clone"
    )


def start_writer(database: Path, journal: str, commits: int) -> tuple[subprocess.Popen[str], int]:
    """A SQLite writer that has acknowledged so many commits, and the last row it acknowledged."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(database), journal], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout
    last = 0
    for _ in range(commits):
        last = int(writer.stdout.readline())
    return writer, last


def end(process: subprocess.Popen[str]) -> None:
    """Kills a process at once and closes its pipe."""
    process.kill()
    process.wait()
    assert process.stdout
    process.stdout.close()


def check(database: Path, acknowledged: int) -> None:
    """The database is whole and has every row whose commit was acknowledged."""
    connection = sqlite3.connect(database)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        (rows,) = connection.execute("SELECT count(*) FROM t").fetchone()
    finally:
        connection.close()
    assert rows >= acknowledged
    assert rows % 20 == 0


@pytest.mark.parametrize("journal", ["DELETE", "TRUNCATE", "WAL"])
def test_sqlite_after_its_writer_was_killed(mount: Mount, journal: str) -> None:
    """A SQLite database is whole after kill -9 of who wrote it, and loses no commit."""
    database = mount.target / "db"
    writer, acknowledged = start_writer(database, journal, 8)
    end(writer)
    check(database, acknowledged)


@pytest.mark.parametrize("journal", ["DELETE", "WAL"])
def test_sqlite_after_the_mount_was_killed(tmp_path: Path, journal: str) -> None:
    """A SQLite database is whole after kill -9 of the mount under it, and loses no commit."""
    data, target = tmp_path / "data", tmp_path / "mnt"
    with Mount(data, target) as mount:
        writer, acknowledged = start_writer(target / "db", journal, 8)
        mount.kill()
        end(writer)
        with Mount(data, target) as again:
            assert any("dead mount" in notice for notice in again.ready["notices"])
            check(again.target / "db", acknowledged)


def test_synced_files_survive_kill(tmp_path: Path) -> None:
    """What fsync or close acknowledged is there after kill -9 of the mount."""
    data, target = tmp_path / "data", tmp_path / "mnt"
    with Mount(data, target) as mount:
        for number in range(50):
            (target / f"{number}").write_bytes(bytes([number]) * 10_000)
        mount.kill()
    with opened(data) as store:
        for number in range(50):
            assert store.read(store.resolve(f"/{number}")) == bytes([number]) * 10_000
