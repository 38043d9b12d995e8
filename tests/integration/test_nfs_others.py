"""Delegations and what others do, in the same store and through another client, while the NFS view serves it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import nfs_client as nfs
from tests.cli_support import execute
from tests.integration.test_nfs_kernel import run
from tests.nfs_client import Client
from tests.nfs_support import View

pytestmark = pytest.mark.integration

WANT_READ = 0x100


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


@pytest.mark.skipif(
    os.environ.get("SPACE_GUEST") != "1", reason="boots a virtual machine: set SPACE_GUEST=1 (docs/nfs.md)"
)
def test_the_kernel_says_what_it_has_not_written_yet(view: View, tmp_path: Path) -> None:
    """Under a write delegation Linux keeps what programs write; another client sees its size, and reads it all."""

    def size() -> object:
        with Client(view.address, minor=2) as other:
            return other.stat("/f", "size")["size"]

    def content() -> str:
        with Client(view.address, minor=2) as other:
            return other.open("/f", share=nfs.READ).read(0, 1000).decode()

    job = """
        mounted 4.2; echo hello >/n/f; exec 5<>/n/f
        printf '%0100d' 7 >&5; echo dirty=$(ask size); echo content=$(ask content)
        printf more >&5; exec 5>&-; echo after=$(ask size)
        echo returned=$(awk '$1 == "DELEGRETURN:" {print $2}' /proc/self/mountstats); umount /n
        """
    found = run(view, job, tmp_path, size=size, content=content)
    assert found == {"dirty": "100", "content": f"{7:0100}", "after": "104", "returned": "1"}
