"""What may be removed from the directory for throw-away tables, and checkpoints that vanish while being copied."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from space._node import history
from space._node.views import start_time
from space.statemachine.store import copy_sealed
from tests.store_support import look, open_store


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A directory with tables of this process, of a dead one, of an earlier one with our id, and of an owner."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    names = [
        history.past_directory(tmp_path).name,
        f"past-{process.pid}-5-abc",
        f"past-{os.getpid()}-{start_time(os.getpid()) - 1}-abc",
        f"past-{os.getppid()}-{start_time(os.getppid())}-abc",
        "past-0-0-abc",
        "replay",
        "checkpoint-abc",
    ]
    for name in names:
        (tmp_path / history.SCRATCH / name).mkdir(parents=True)
        (tmp_path / history.SCRATCH / name / "data.mdb").write_text(name)
    return tmp_path / history.SCRATCH


def living() -> list[str]:
    """How the names begin of what processes that live have in there."""
    return [f"past-{pid}-{start_time(pid)}-" for pid in sorted((os.getpid(), os.getppid()), key=str)]


def kept(scratch: Path) -> list[str]:
    """What is still there, without the random ends."""
    return [name.rpartition("-")[0] + "-" for name in sorted(os.listdir(scratch))]


def test_an_owner_removes_all_but_living_past_moments(scratch: Path) -> None:
    """Tables of dead processes go, also of one that had the id of a living one; so does all an owner left."""
    history.clear_scratch(scratch.parent, owner=True)
    assert kept(scratch) == living()


def test_a_reader_removes_dead_past_moments_only(scratch: Path) -> None:
    """What an owner is at work on is not touched by a process that only reads."""
    history.clear_scratch(scratch.parent, owner=False)
    assert kept(scratch) == ["checkpoint-", *living(), "-"]


def test_no_scratch_directory_is_nothing_to_clear(tmp_path: Path) -> None:
    """A store that never had one is left as it is."""
    history.clear_scratch(tmp_path, owner=True)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One removed while it is copied is done without: an older one, or the log, gives the same tables."""
    real, copied = copy_sealed, []

    def vanishing(source: Path, target: Path) -> None:
        copied.append(source.name)
        (source / "seal").unlink()
        shutil.rmtree(target, ignore_errors=True)
        real(source, target)

    with open_store(tmp_path) as store:
        for number in range(3):
            store.put(b"%d" % number, name=f"/{number}")
            store.checkpoint()
        expected = look(store)
        monkeypatch.setattr(history, "copy_sealed", vanishing)
        with store.at("-0s") as past:
            assert look(past) == expected
    assert len(copied) == 3
