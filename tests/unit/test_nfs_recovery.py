"""What an NFS server remembers over restarts, in a real store."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from space._errors import SpaceError
from space._node.nfs_recovery import StoreRecovery
from space._node.store import Store
from space.events import commands as cmd

pytestmark = pytest.mark.unit


def test_epochs_grow_and_clients_are_remembered(tmp_path: Path) -> None:
    """Each start is the next epoch; those that were recorded and not forgotten since may come back."""
    with Store(tmp_path) as store:
        first = StoreRecovery(store, "a")
        assert (first.epoch, first.previous, first.dirty) == (1, {}, False)
        first.record(b"one", b"verifier")
        first.record(b"two", b"verifier")
        first.record(b"two", b"another!")
        first.forget(b"one")
        first.forget(b"never there")
        assert (first.dirty, asyncio.run(first.sync()), first.dirty) == (True, None, False)
    with Store(tmp_path) as store:
        second = StoreRecovery(store, "a")
        assert (second.epoch, second.previous) == (2, {b"two": b"another!"})


def test_servers_of_one_store_are_apart(tmp_path: Path) -> None:
    """Another server of the store counts for itself, and knows only its own clients."""
    with Store(tmp_path) as store:
        first = StoreRecovery(store, "a")
        first.record(b"one", b"verifier")
        asyncio.run(first.sync())
        other = StoreRecovery(store, "b")
        assert (other.epoch, other.previous) == (1, {})
        assert StoreRecovery(store, "a").previous == {b"one": b"verifier"}


def test_what_could_not_be_logged_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused record stays to be made durable: until then nobody is told that it is."""
    with Store(tmp_path) as store:
        recovery = StoreRecovery(store, "a")
        recovery.record(b"one", b"verifier")
        with monkeypatch.context() as broken:
            broken.setattr(store, "execute_all", lambda requests: [SpaceError("no")] * len(requests))
            with pytest.raises(SpaceError):
                asyncio.run(recovery.sync())
        assert (recovery.dirty, asyncio.run(recovery.sync()), recovery.dirty) == (True, None, False)
        assert StoreRecovery(store, "a").previous == {b"one": b"verifier"}


@pytest.mark.parametrize(
    "command",
    [
        cmd.StartNfsServer(""),
        cmd.StartNfsServer("x" * 256),
        cmd.RecordNfsClient("", b"one", b"verifier"),
        cmd.RecordNfsClient("a", bytes(1025), b"verifier"),
        cmd.RecordNfsClient("a", b"one", b"short"),
        cmd.ForgetNfsClient("", b"one"),
    ],
)
def test_what_is_no_server_or_client_is_refused(tmp_path: Path, command: cmd.Command) -> None:
    """Names that are empty or too long, and verifiers of another length, change nothing."""
    with Store(tmp_path) as store:
        before = store.last
        with pytest.raises(SpaceError):
            store.execute(command)
        assert store.last == before
