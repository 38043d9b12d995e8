"""``space csi``: what is refused before anything is started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from space import cli
from tests.cli_support import execute

pytestmark = [pytest.mark.unit, pytest.mark.requires("py:grpc", "py:google.protobuf")]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["csi", "--mode", "both"], "no mode 'both'"),
        (["csi", "--mode", "controller", "--node-id", "../x"], "not the name of a node"),
        (["csi", "--mode", "controller", "--node-id", "x" * 193], "not the name of a node"),
        (["--node", "http://127.0.0.1:1", "csi"], "only --mode controller asks it"),
        (["--node", "http://127.0.0.1:1", "csi", "--mode", "controller"], "--endpoint"),
        (
            ["--node", "x", "csi", "--mode", "controller", "--endpoint", "unix:///x"],
            "not the address of a node",
        ),
        (["project", "--view", "csi", "--path", "/"], "--path is not for the view csi"),
        (["csi", "--max-volumes", "-1"], "--max-volumes"),
        (["csi", "--mode", "controller", "--remote"], "--remote is of --mode node"),
        (["csi", "--mode", "controller", "--node-address", "192.0.2.1"], "--node-address is of --remote"),
        (["csi", "--mode", "node", "--remote", "--node-address", "x"], "not an address"),
        (
            ["csi", "--mode", "node", "--remote", "--node-id", "x" * 190, "--node-address", "192.0.2.1"],
            "too long together",
        ),
        (["csi", "--mode", "controller", "--nfs", "2049"], "not an address to listen at"),
        (["csi", "--mode", "controller", "--nvme", "0.0.0.0:4420"], "--advertise"),
        (["csi", "--mode", "controller", "--advertise", "x"], "nothing is served"),
        (["csi", "--mode", "controller", "--nfs", "127.0.0.1:1", "--nfs-client", "x"], "not a network"),
    ],
)
def test_what_cannot_be_meant(tmp_path: Path, arguments: list[str], words: str) -> None:
    """A mode, a name, a node or an option there is not is wrong usage, said on one line, and leaves nothing behind."""
    done = execute(tmp_path / "data", *arguments)
    assert done.status == 2
    assert words in done.complaint()
    assert not (tmp_path / "data").exists()


def test_a_metrics_address_that_is_none(tmp_path: Path) -> None:
    """An address without a port is wrong usage."""
    done = execute(tmp_path / "data", "csi", "--mode", "controller", "--metrics", "localhost:x")
    assert done.status == 2
    assert "--metrics HOST:PORT" in done.err


def test_mounts_need_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever is not root is told so for every mode that mounts."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for mode in ("all", "node", "store"):
        assert cli.run(["--data", str(tmp_path / "data"), "csi", "--mode", mode]) == 5
        assert "needs root" in capsys.readouterr().err
