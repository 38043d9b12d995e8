"""Delegations and what others do in the same store while ``space project --view nfs`` serves it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import space
from tests import nfs_client as nfs
from tests.cli_support import execute
from tests.nfs_client import Client
from tests.nfs_support import View

pytestmark = pytest.mark.integration

WANT_READ = 0x100


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A new store."""
    path = tmp_path / "data"
    space.open(path).close()
    return path


@pytest.fixture
def view(data: Path) -> Iterator[View]:
    """It, served."""
    made = View(data, ["--path", "/", "--squash", "none"])
    made.start()
    yield made
    if made.process.poll() is None:
        made.stop()


def test_another_command_recalls_a_delegation(view: View, data: Path) -> None:
    """Who holds a delegation hears of a change by a command on the same directory, and then sees what it did."""
    with Client(view.address, minor=2) as client:
        client.create("/f").close()
        file = client.open("/f", share=nfs.READ | WANT_READ, delegation=True)
        assert file.opened.delegation.kind == 1
        assert execute(data, "resize", "/f", "9").status == 0
        stateid, _ = client.wait_for("recall")
        assert stateid == file.opened.delegation.stateid
        client.compound(nfs.putfh(file.handle), nfs.delegreturn(stateid))
        client.recalled.clear()
        again = client.open("/f", share=nfs.READ)
        assert again.read(0, 100) == bytes(9)


def test_changes_of_clients_recall_nothing_twice(view: View) -> None:
    """What a client changes under its own delegation is nobody else's change."""
    with Client(view.address, minor=2) as client:
        client.create("/f").close()
        file = client.open("/f", share=nfs.BOTH | 0x200, delegation=True)
        assert file.opened.delegation.kind == 2
        file.write(0, b"x")
        file.do(nfs.setattr_(mode=0o600))
        client.create("/g").close()
        assert client.events == []
