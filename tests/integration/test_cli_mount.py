"""Views as the command line makes, lists and ends them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import space
from tests.cli_support import Outcome, execute, finish, keys, start

pytestmark = pytest.mark.requires("/dev/fuse", "fusermount3", "py:pyfuse3")

READY = {
    "view", "name", "source", "at", "read_only", "target", "address", "pid", "started_ns", "ready_ms",
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A store with one file in it that nobody has open."""
    path = tmp_path / "data"
    with space.open(path) as store:
        store.put(b"hello", name="/a/hello.txt")
    return path


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A directory to mount on, with nothing mounted on it in the end."""
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    subprocess.run(["fusermount3", "-u", "-z", "-q", path], check=False)


@pytest.fixture
def mounted(data: Path, target: Path) -> Iterator[dict[str, Any]]:
    """The whole tree, mounted by a process in the background: what it said when it was ready."""
    outcome = execute(data, "project", "mount", "--path", "/", "--target", target, "--background")
    assert outcome.status == 0, outcome.err
    ready: dict[str, Any] = outcome.json
    yield ready
    end(ready["pid"])


def end(pid: int) -> None:
    """Ends a process that is not our child, and waits until it has."""
    try:
        os.kill(pid, signal.SIGTERM)
        while True:
            os.kill(pid, 0)
            time.sleep(0.01)
    except ProcessLookupError:
        pass


def is_mounted(target: Path) -> bool:
    """Whether the kernel has something mounted there."""
    return f" {target} " in Path("/proc/self/mountinfo").read_text()


def test_a_mount_in_the_background(data: Path, target: Path, mounted: dict[str, Any]) -> None:
    """The command returns when the mount answers, with one JSON line; the mount takes writes and is listed."""
    assert keys(mounted) == READY
    assert (mounted["view"], mounted["target"], mounted["address"]) == ("fuse", str(target), str(target))
    assert (target / "a" / "hello.txt").read_text() == "hello"
    (target / "new").write_text("written")
    assert execute(data, "get", "/new").out == "written"
    (listed,) = execute(data, "project", "ls", "--json").json
    assert keys(listed) == READY - {"ready_ms"} | {"process_start", "state"}
    assert (listed["pid"], listed["state"]) == (mounted["pid"], "running")
    assert execute(data, "project", "stop", target).status == 0
    assert not is_mounted(target)
    assert execute(data, "project", "ls", "--json").json == []
    assert execute(data, "get", "/new").out == "written"


def test_commands_and_mount_see_each_other(data: Path, target: Path, mounted: dict[str, Any]) -> None:
    """While the mount owns the store, commands go through it: both sides see what the other did."""
    (target / "b").mkdir()
    assert execute(data, "mv", "/a/hello.txt", "/b").status == 0
    assert execute(data, "ls", "/b", "--json").json[0]["name"] == "hello.txt"
    before = execute(data, "digest").out
    assert execute(data, "replay", "--verify").status == 0
    assert execute(data, "digest").out == before


def test_a_second_mount_is_refused(data: Path, target: Path, mounted: dict[str, Any], tmp_path: Path) -> None:
    """One process serves one mount of a store: the second is refused with 7, naming the first."""
    outcome = execute(data, "project", "mount", "--path", "/", "--target", tmp_path / "second")
    assert outcome.status == 7
    assert f"in use by process {mounted['pid']}, which serves fuse at {target}" in outcome.complaint()
    assert not (tmp_path / "second").exists()


def test_a_mount_in_the_foreground(data: Path, target: Path) -> None:
    """It prints one JSON line when ready, serves, and an interrupt ends it cleanly with nothing left."""
    process = start(data, "project", "--view", "fuse", "--path", "/a", "--target", target)
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    assert (keys(ready), ready["pid"], ready["source"]) == (READY, process.pid, "/a")
    assert (target / "hello.txt").read_text() == "hello"
    process.send_signal(signal.SIGINT)
    assert finish(process).status == 0
    assert not is_mounted(target)
    assert not (data / "control.sock").exists()


def test_one_capsule_at_a_past_moment(data: Path, target: Path) -> None:
    """A single capsule shows as one file, and a past moment refuses writes."""
    id_ = execute(data, "stat", "/a/hello.txt", "--json").json["id"]
    position = execute(data, "digest", "--json").json["position"]
    execute(data, "rm", "/a/hello.txt")
    arguments = ["project", "mount", "--id", id_, "--at", f"@{position}", "--target", target, "--background"]
    ready = execute(data, *arguments).json
    try:
        assert ready["read_only"] is True
        assert [each.name for each in target.iterdir()] == ["content"]
        assert (target / "content").read_text() == "hello"
        with pytest.raises(OSError, match="Read-only file system"):
            (target / "content").write_text("other")
    finally:
        end(ready["pid"])


def test_a_killed_mount_is_seen_ended_and_replaced(data: Path, target: Path, mounted: dict[str, Any]) -> None:
    """After kill -9 the view is dead, can be mounted over, and the dead one can be cleared away."""
    os.kill(mounted["pid"], signal.SIGKILL)
    while Path(f"/proc/{mounted['pid']}/exe").exists():
        time.sleep(0.01)
    (listed,) = execute(data, "project", "ls", "--json").json
    assert listed["state"] == "dead"
    again = execute(data, "project", "mount", "--path", "/", "--target", target, "--background")
    assert "replaced a dead mount" in again.err
    (listed,) = execute(data, "project", "ls", "--json").json
    assert (listed["state"], listed["pid"]) == ("running", again.json["pid"])
    os.kill(again.json["pid"], signal.SIGKILL)
    while Path(f"/proc/{again.json['pid']}/exe").exists():
        time.sleep(0.01)
    assert execute(data, "project", "stop", target).status == 0
    assert not is_mounted(target)
    assert execute(data, "project", "ls", "--json").json == []


@pytest.mark.parametrize("background", [[], ["--background"]])
def test_a_failed_mount_says_why(data: Path, tmp_path: Path, background: list[str]) -> None:
    """Whoever asked for a mount that cannot be made gets its error and status, and the store is free again."""

    def mount(*arguments: str | Path) -> Outcome:
        return execute(data, "project", "mount", *arguments, *background)

    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "something").touch()
    file.touch()
    for outcome, status in (
        (mount("--path", "/", "--target", full), 4),
        (mount("--path", "/", "--target", file), 4),
        (mount("--path", "/nothing", "--target", tmp_path / "mnt"), 3),
        (mount("--path", "/", "--at", "@99999", "--target", tmp_path / "mnt"), 3),
        (mount("--id", "zzz", "--target", tmp_path / "mnt"), 2),
    ):
        assert outcome.status == status, outcome.err
        outcome.complaint()
    assert execute(data, "project", "ls", "--json").json == []
    assert execute(data, "get", "/a/hello.txt").out == "hello"
