"""What policies forbid views."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import space
from space._errors import ErrorKind, RefusedError
from space._node.beside import open_beside
from space._node.local_vfs import LocalFileSystem
from space._node.nvme_view import OneStore, View
from space._node.store import Store
from space._node.view_policy import NOTED_MAX, enforce_view_policy
from space.events.ids import CapsuleId
from space.policy.enforce import Reach, reach_of, view_refusal
from space.policy.model import Policy, Sovereignty
from space.projections.nvme.auth import ANYBODY
from space.projections.vfs import Caller

LOCAL = Policy(sovereignty=Sovereignty.LOCAL)


@pytest.mark.parametrize(
    "host, reach",
    [
        ("127.0.0.1", Reach.MACHINE),
        ("127.9.9.9", Reach.MACHINE),
        ("::1", Reach.MACHINE),
        ("[::1]", Reach.MACHINE),
        ("localhost", Reach.MACHINE),
        ("0.0.0.0", Reach.NETWORK),
        ("::", Reach.NETWORK),
        ("10.0.0.1", Reach.NETWORK),
        ("storage.example", Reach.NETWORK),
    ],
)
def test_where_a_listener_is_reached_from(host: str, reach: Reach) -> None:
    """Only loopback addresses are reached from this machine alone; a name may mean anything."""
    assert reach_of(host) is reach


@pytest.mark.parametrize("sovereignty", list(Sovereignty))
@pytest.mark.parametrize("reach", list(Reach))
def test_what_is_forbidden(sovereignty: Sovereignty, reach: Reach) -> None:
    """Only local content, and only to the network."""
    forbidden = sovereignty is Sovereignty.LOCAL and reach is Reach.NETWORK
    assert bool(view_refusal(Policy(sovereignty=sovereignty), reach)) is forbidden


def kinds(store: Store) -> list[str]:
    """The refusals in the log."""
    return [event.kind for event in store.log() if event.kind == "PolicyRefused"]


def test_a_tree_with_local_content_is_not_shown_to_the_network(tmp_path: Path) -> None:
    """A view of it is refused before it begins, with exit status 5, and the log says why; here it is shown."""
    with space.open(tmp_path) as store:
        store.put(b"all", name="/shared/a")
        kept = store.put(b"here", name="/shared/deep/b", policy=LOCAL)
        root = store.resolve("/shared")
        enforce_view_policy(store, [root], "nfs", "127.0.0.1")
        assert not kinds(store)
        with pytest.raises(RefusedError, match=str(kept.id)) as refused:
            enforce_view_policy(store, [root], "nfs", "0.0.0.0")
        assert refused.value.kind is ErrorKind.REFUSED
        (event,) = [each for each in store.log() if each.kind == "PolicyRefused"]
        assert event.capsule == kept.id
        assert event.detail["target"] == "nfs"


def test_content_that_becomes_local_is_not_read_any_more(tmp_path: Path) -> None:
    """While a file system is shown to the network, a file that gets such a policy is refused with the next use."""
    with space.open(tmp_path) as store:
        made = store.put(b"content", name="/a")
        files = LocalFileSystem(store)
        files.limit("nfs", "10.1.2.3")
        assert files.read(made.id, 0, 10) == b"content"
        store.set_policy(made.id, LOCAL)
        for _ in range(3):
            with pytest.raises(RefusedError, match="sovereignty: local"):
                files.read(made.id, 0, 10)
        with pytest.raises(RefusedError):
            asyncio.run(files.write(made.id, 0, b"x", Caller(0, 0, "test")))
        assert len(kinds(store)) == 1
        assert store.get(made.id) == b"content"


def test_the_log_is_not_filled_with_refusals(tmp_path: Path) -> None:
    """A view notes so many refusals and no more, and goes on to refuse."""
    with space.open(tmp_path) as store:
        parent = store.mkdir("/d")
        store.set_policy(parent, LOCAL)
        view = enforce_view_policy(store, [], "nfs", "10.0.0.1")
        view._noted = {CapsuleId(number.to_bytes(16, "big")) for number in range(NOTED_MAX)}
        with pytest.raises(RefusedError):
            view.check(parent)
        assert not kinds(store)


def test_the_past_is_refused_too(tmp_path: Path) -> None:
    """A past moment is shown by the policy it had then; there is no log to say that it was refused."""
    with space.open(tmp_path) as store:
        store.put(b"x", name="/a", policy=LOCAL)
        last = store.position
    with open_beside(tmp_path, f"@{last}") as past, pytest.raises(RefusedError):
        enforce_view_policy(past, [past.root], "nfs", "10.0.0.1")


def test_devices_are_shown_by_their_policies(tmp_path: Path) -> None:
    """A local device is offered on this machine only; one that becomes local is withdrawn from the network."""

    async def main(store: Store, source: str) -> None:
        view = await View.open(OneStore(store, None), [source], ANYBODY)
        try:
            with pytest.raises(RefusedError, match="nvme"):
                await view.listen(("0.0.0.0", 0))
            await view.listen(("127.0.0.1", 0))
        finally:
            await view.close()

    async def withdrawn(store: Store, source: str) -> None:
        view = await View.open(OneStore(store, None), [source], ANYBODY)
        over = asyncio.Event()
        try:
            await view.listen(("0.0.0.0", 0))
            following = asyncio.create_task(view.follow(over))
            assert view.subsystem.namespaces
            store.set_policy(store.resolve(source), LOCAL)
            while view.subsystem.namespaces:  # noqa: ASYNC110 - the view looks every second
                await asyncio.sleep(0.01)
            over.set()
            await following
        finally:
            await view.close()

    with space.open(tmp_path) as store:
        store.create(parent=store.root, name=b"kept", size=1 << 20, block_size=4096, policy=LOCAL)
        store.create(parent=store.root, name=b"shared", size=1 << 20, block_size=4096)
        asyncio.run(main(store, "/kept"))
        asyncio.run(withdrawn(store, "/shared"))
        assert kinds(store)
