"""Past moments read and mounted by other processes than the one that owns the store."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import space
from space._errors import CorruptionError, NotFoundError, RefusedError, UsageError
from space._node import history
from space._node.beside import open_beside
from space.events.ids import format_time
from space.policy.model import Policy
from tests.cli_support import ROOT, execute
from tests.fuse_support import NEEDS_FUSE
from tests.store_support import FORGETFUL, PACKED, PLAIN, SEGMENT_BYTES, look, open_store, texture

SEALED = Policy.from_document({"encryption": "aes-256-gcm"})

FIRST = 5  # the first position of the owner below at which its file has the bytes of that position
OWNER = """
import os, sys
import space
from tests.store_support import PLAIN, open_store, texture

with open_store(sys.argv[1]) as store:
    id = store.put(texture(5000), name="/f", policy=PLAIN).id
    assert store.position < 5
    while True:
        before = store.position
        receipt = store.write(id, 0, texture(5000, before + 1))
        assert receipt.position == before + 1
        if before % 50 == 0:
            store.checkpoint()
        os.pwrite(1, b"%20d" % receipt.position, 0)
"""


def scratch(data: Path) -> list[str]:
    """What lies in the directory for throw-away tables."""
    return sorted(os.listdir(data / history.SCRATCH))


def open_descriptors() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


# --- reading -----------------------------------------------------------------------------------------


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Path]:
    """A store whose owner, another process, writes without a pause and notes how far it is."""
    note = tmp_path / "written"
    with note.open("w") as out:
        command = [sys.executable, "-c", OWNER, str(tmp_path / "data")]
        owner = subprocess.Popen(command, stdout=out, cwd=ROOT)
    while not note.read_text():
        assert owner.poll() is None
    yield tmp_path
    assert owner.poll() is None
    owner.kill()
    owner.wait()


def test_the_past_of_a_store_in_use(busy: Path) -> None:
    """While the owner writes, rotates segments and thins checkpoints, every moment has the bytes of that moment."""
    before = open_descriptors()
    for round_ in range(40):
        written = int((busy / "written").read_text())
        for position in {written, max(written - 40 * round_, written // 2, FIRST)}:
            with open_beside(busy / "data", f"@{position}") as past:
                assert past.position == position
                assert past.get("/f") == texture(5000, position)
    assert scratch(busy / "data") == [
        each for each in scratch(busy / "data") if each.startswith("checkpoint")
    ]
    assert open_descriptors() == before


def test_every_kind_of_moment(tmp_path: Path) -> None:
    """Positions, events, times and names of snapshots mean the same beside the owner as to the owner itself."""
    with open_store(tmp_path) as store:
        store.mkdir("/d")
        store.put(b"one", name="/d/f")
        when = format_time(store.applied().time_ns)
        store.snapshot("/d", "before")
        store.snapshot("/d", "2020-02-02")
        store.put(b"two", name="/d/g", policy=SEALED)
        moments = ["@1", "@3", f"@{store.position}.0", when, "before", "2020-02-02", "-0s"]
        for moment in moments:
            with store.at(moment) as expected, open_beside(tmp_path, moment) as past:
                assert look(past) == look(expected), moment
        with contextlib.ExitStack() as stack, pytest.raises(NotFoundError):
            stack.enter_context(open_beside(tmp_path, "@999"))
        with pytest.raises(UsageError, match="not a moment"):
            open_beside(tmp_path, "never")
        with pytest.raises(UsageError, match="not a moment"):
            open_beside(tmp_path, "-never")
    assert scratch(tmp_path) == []


@pytest.mark.parametrize("kind", ["nothing", "empty log", "file"])
def test_no_store_is_said_so(tmp_path: Path, kind: str) -> None:
    """Where there is no store, that is the error, and nothing is made there."""
    if kind == "empty log":
        (tmp_path / "wal").mkdir()
    elif kind == "file":
        (tmp_path / "wal").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(NotFoundError, match="no store at"):
        open_beside(tmp_path, "@1")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_owner_opens_beside_a_past_moment(tmp_path: Path) -> None:
    """A start of the store removes left-over tables but not those of a living reader, which goes on."""
    with open_store(tmp_path) as store:
        store.put(texture(9000), name="/f")
    (tmp_path / history.SCRATCH / "past-1-1-abc").mkdir(parents=True)
    with open_beside(tmp_path, "-0s") as past:
        (kept,) = scratch(tmp_path)
        with open_store(tmp_path) as store:
            store.put(b"x", name="/g")
            assert scratch(tmp_path) == [kept]
            assert past.get("/f") == texture(9000)
    assert scratch(tmp_path) == []


# --- what gc takes away ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [FORGETFUL, Policy.from_document({"history": "none", "encryption": "aes-256-gcm"})],
    ids=["plain", "encrypted"],
)
@pytest.mark.parametrize("opened", ["before", "after"])
def test_reclaimed_bytes_are_an_error(tmp_path: Path, policy: Policy, opened: str) -> None:
    """What gc took away since the moment is refused as reclaimed, wherever in it one reads; the rest is read."""
    with open_store(tmp_path) as store, contextlib.ExitStack() as stack:
        kept = store.put(texture(40_000, 7), name="/kept", policy=PLAIN).id
        id_ = store.put(texture(200_000), name="/f", policy=policy).id
        moment = f"@{store.position}"
        past = stack.enter_context(open_beside(tmp_path, moment)) if opened == "before" else None
        store.write(id_, 0, texture(200_000, 1))
        assert store.gc().bytes_given_back > 100_000
        past = past or stack.enter_context(open_beside(tmp_path, moment))
        for offset in (0, 1, 70_000, 190_000):
            with pytest.raises(RefusedError, match="reclaimed"):
                past.read(id_, offset, 1)
        with pytest.raises(RefusedError, match="reclaimed"):
            past.read(id_)
        assert past.read(kept) == texture(40_000, 7)


def test_damaged_bytes_are_corruption(tmp_path: Path) -> None:
    """Bytes that are not what was written, and that nobody declared reclaimed, name the segment."""
    with open_store(tmp_path) as store:
        id_ = store.put(texture(20_000), name="/f", policy=PACKED).id
        with open_beside(tmp_path, f"@{store.position}") as past:
            (segment,) = (tmp_path / "wal").glob("*.seg")
            data = segment.read_bytes()
            at = data.index(texture(20_000)[5000:5100])
            with segment.open("r+b") as file:
                file.seek(at)
                file.write(bytes(100))
            with pytest.raises(CorruptionError) as caught:
                past.read(id_)
            assert caught.value.segment == segment.name


# --- mounted -----------------------------------------------------------------------------------------


def stop(data: Path, target: Path) -> None:
    """Ends a mount by its target."""
    assert execute(data, "project", "stop", target).status == 0


@NEEDS_FUSE
def test_past_moments_are_mounted_beside_a_live_mount(tmp_path: Path) -> None:
    """Two past moments beside a mount that is written to show their bytes, also once the owner is killed."""
    data, live = tmp_path / "data", tmp_path / "live"
    moments = {}
    with space.open(data, segment_bytes=SEGMENT_BYTES) as store:
        id_ = store.put(b"", name="/f").id
        for number in (1, 2):
            store.write(id_, 0, texture(300_000, number))
            moments[tmp_path / f"past{number}"] = (f"@{store.position}", texture(300_000, number))
        store.rm("/f")
    mounted = execute(data, "project", "mount", "--path", "/", "--target", live, "--background")
    assert mounted.status == 0, mounted.err
    done = threading.Event()

    def write() -> None:
        number = 0
        while not done.is_set():
            number += 1
            (live / f"{number % 20}").write_bytes(texture(50_000, number))

    writer = threading.Thread(target=write)
    writer.start()
    targets = [live]
    try:
        for target, (moment, _) in moments.items():
            made = execute(
                data, "project", "mount", "--path", "/", "--target", target, "--at", moment, "--background"
            )
            assert made.status == 0, made.err
            targets.append(target)
        for target, (_, content) in moments.items():
            assert os.listdir(target) == ["f"]
            assert (target / "f").read_bytes() == content
        listed = execute(data, "project", "ls", "--json").json
        assert [each["state"] for each in listed] == ["running"] * 3
        assert {each["target"]: each["at"] for each in listed} == {
            str(live): None,
            **{str(target): moment for target, (moment, _) in moments.items()},
        }
    finally:
        done.set()
        writer.join()
        os.kill(mounted.json["pid"], signal.SIGKILL)
        subprocess.run(["fusermount3", "-u", "-z", "-q", live], check=False)
    first, second = moments
    try:
        with open(first / "f", "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert file.read() == moments[first][1]
        assert execute(data, "put", "-", "--name", "/new", stdin=subprocess.DEVNULL).status == 0
        assert (second / "f").read_bytes() == moments[second][1]
    finally:
        for target in targets[1:]:
            stop(data, target)
    assert scratch(data) == []


@NEEDS_FUSE
def test_reclaimed_bytes_on_a_mount(tmp_path: Path) -> None:
    """A program that reads reclaimed bytes of a mounted past moment gets EIO, and never other bytes."""
    data, target = tmp_path / "data", tmp_path / "past"
    with open_store(data) as store:
        id_ = store.put(texture(200_000), name="/f", policy=FORGETFUL).id
        moment = f"@{store.position}"
        made = execute(
            data, "project", "mount", "--path", "/", "--target", target, "--at", moment, "--background"
        )
        assert made.status == 0, made.err
        store.write(id_, 0, texture(200_000, 1))
        store.gc()
    try:
        with pytest.raises(OSError, match="Input/output error"):
            (target / "f").read_bytes()
    finally:
        stop(data, target)
