"""The owner of a store with volumes: its calls, and what it gives back."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from space._errors import SpaceError, UsageError
from space._node.caller import Caller
from space._node.calls import carry_out
from space._node.csi_owner import VolumeCalls, VolumeTarget, collecting
from space._node.csi_volumes import VolumeTree
from space._node.store import Store
from space.projections.csi.model import Wanted

pytestmark = [pytest.mark.unit, pytest.mark.requires("py:google.protobuf")]


@pytest.fixture
def store(tmp_path: Path) -> Any:
    """An empty store."""
    with Store(tmp_path / "data") as made:
        yield made


def test_calls_are_checked_and_carried_out_beside_the_stores(store: Store) -> None:
    """A call of the driver's and one of any store's are answered; wrong arguments and unknown calls are refused."""
    target = VolumeTarget(store, VolumeCalls(VolumeTree(store), lambda: 7, "/mount"))

    def ask(method: str, **arguments: Any) -> Any:
        return carry_out(target, {"method": method, "arguments": arguments}, Caller(), None)

    assert ask("csi_room") == 7
    assert ask("csi_about")["mount"] == "/mount"
    assert ask("owner")["position"] == store.position
    wanted = {"name": "v", "capacity": 1 << 20, "limit": 0, "block": False}
    assert ask("csi_volume", volume=ask("csi_create", wanted=wanted)["id"])["name"] == "v"
    for method, arguments in (
        ("csi_create", {"wanted": {**wanted, "colour": "red"}}),
        ("csi_create", {"wanted": "v"}),
        ("csi_volume", {}),
        ("csi__volumes", {}),
        ("csi_nothing", {}),
    ):
        with pytest.raises(UsageError):
            ask(method, **arguments)


def test_what_deleted_volumes_held_is_given_back(store: Store) -> None:
    """Bytes of a deleted volume that keeps no history come back while it collects; a failure is not the end of that."""
    volumes = VolumeTree(store)
    made = volumes.create(Wanted("v", 8 << 20, 0, block=True, parameters={"history": "none"}))
    store.write(store.resolve(f"/csi/volumes/{made.id}/data"), 0, bytes(range(256)) * 4096)
    volumes.delete(made.id)
    collected = threading.Event()
    collect = store.gc
    failed: list[bool] = []

    def once_broken(**options: Any) -> Any:
        if not failed:
            failed.append(True)
            raise SpaceError("not now")
        report = collect(**options)
        collected.set()
        return report

    store.gc = once_broken  # type: ignore[method-assign]
    with collecting(store, 0.01):
        assert collected.wait(60)
    del store.gc
    assert store.gc().frames == 0  # nothing was left to give back


def test_it_never_collects_unasked(store: Store) -> None:
    """With 0 there is no thread at all."""
    before = threading.active_count()
    with collecting(store, 0):
        assert threading.active_count() == before
