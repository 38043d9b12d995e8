"""The master key file: read, replaced, and what is left when that is interrupted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from space._errors import NotFoundError, RefusedError
from space._node.keys_file import MASTER_KEY_ENVIRONMENT, MasterFile

ONE, TWO, THREE = (bytes([number]) * 32 for number in (1, 2, 3))


class Killed(BaseException):
    """The process is gone."""


def made(tmp_path: Path, *keys: bytes) -> MasterFile:
    """A file with these keys."""
    file = MasterFile(tmp_path / "master.key", shared=False)
    file.create(keys[0])
    if keys[1:]:
        file.replace(keys)
    return file


def spelled(tmp_path: Path) -> bytes:
    """Every byte of every file there."""
    return b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_replaced_keys_come_in_order_and_old_ones_are_gone(tmp_path: Path) -> None:
    """A file has the keys it was given, oldest first, mode 0600, and nothing of what it had before."""
    file = made(tmp_path, ONE)
    file.replace((ONE, TWO))
    assert file.load() == (ONE, TWO)
    file.replace((TWO,))
    assert file.load() == (TWO,)
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert ONE.hex().encode() not in spelled(tmp_path)
    assert os.listdir(tmp_path) == ["master.key"]


def test_the_old_file_is_overwritten(tmp_path: Path) -> None:
    """Who still has the old file open finds zeros in it."""
    file = made(tmp_path, ONE)
    with file.path.open("rb") as old:
        file.replace((TWO,))
        assert set(old.read()) == {0}


@pytest.mark.parametrize("call", ["os.link", "pathlib.Path.rename", "os.fsync"])
@pytest.mark.parametrize("after", [False, True])
def test_killed_while_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, after: bool
) -> None:
    """Killed at any step, the file has all old keys or all new ones, and the next look leaves nothing else."""
    file = made(tmp_path, ONE)
    calls: dict[str, Callable[..., Any]] = {
        "os.link": os.link,
        "pathlib.Path.rename": Path.rename,
        "os.fsync": os.fsync,
    }

    def kill(*arguments: Any) -> None:
        if after:
            calls[call](*arguments)
        raise Killed

    monkeypatch.setattr(call, kill)
    with pytest.raises(Killed):
        file.replace((TWO,))
    monkeypatch.undo()
    assert file.load() in ((ONE,), (TWO,))
    file.clear()
    (kept,) = file.load()
    assert sum(each.hex().encode() in (tmp_path / "master.key").read_bytes() for each in (ONE, TWO)) == 1
    assert not (tmp_path / "master.key.old").exists()
    file.replace((kept, THREE))
    assert file.load() == (kept, THREE)
    assert os.listdir(tmp_path) == ["master.key"]


def test_what_a_killed_process_left_is_overwritten(tmp_path: Path) -> None:
    """An old file that was not overwritten yet is, and goes; the file itself under that name is not touched."""
    file = made(tmp_path, TWO)
    old = tmp_path / "master.key.old"
    old.write_bytes(ONE.hex().encode())
    with old.open("rb") as left:
        file.clear()
        assert set(left.read()) == {0}
    assert not old.exists()
    os.link(file.path, old)
    file.clear()
    assert file.load() == (TWO,)
    assert not old.exists()


def test_a_file_that_cannot_be_replaced_is_refused(tmp_path: Path) -> None:
    """Where the directory cannot be written, the error says what to do, and the file is as it was."""
    file = made(tmp_path, ONE)
    (
        tmp_path / "master.key.new"
    ).mkdir()  # as good as a directory without permission, which root does not know
    with pytest.raises(RefusedError, match=r"cannot be changed.*add a line"):
        file.replace((TWO,))
    assert file.load() == (ONE,)


def test_the_environment_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file the environment names is shared and has to be there; else it is the directory's own, which need not."""
    assert MasterFile.of(tmp_path) == MasterFile(tmp_path / "master.key", shared=False)
    assert MasterFile.of(tmp_path).load() == ()
    monkeypatch.setenv(MASTER_KEY_ENVIRONMENT, str(tmp_path / "other"))
    assert MasterFile.of(tmp_path) == MasterFile(tmp_path / "other", shared=True)
    with pytest.raises(NotFoundError, match="does not exist"):
        MasterFile.of(tmp_path).load()
