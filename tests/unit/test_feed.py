"""The fold loop."""

from __future__ import annotations

import threading
from pathlib import Path

import space
from space._node import history
from space.events.commands import CreateCapsule, Durability, Request
from space.events.types import Kind
from space.projections.feed import Progress, fold
from space.statemachine.store import Applied, Store


def _fill(store: space._node.store.Store, prefix: bytes, batches: int) -> None:
    for batch in range(batches):
        commands = [
            CreateCapsule(
                store.new_id(), Kind.FILE, parent=store.root, name=b"%b-%d-%d" % (prefix, batch, number)
            )
            for number in range(20)
        ]
        store.execute_all([Request(command) for command in commands], durability=Durability.BUFFERED)


def test_a_wanted_table_is_given_back_after_the_record_at_hand(tmp_path: Path) -> None:
    """Somebody waiting makes every record a transaction of its own; the rows come out the same."""
    with space.open(tmp_path / "data") as store:
        _fill(store, b"f", 10)
        layout = history.layout_of(store.views)
        digests = []
        for wanted in (None, lambda: True):
            seen: list[int] = []

            def note(progress: Progress, seen: list[int] = seen) -> None:
                seen.append(progress.position)

            tables = Store(tmp_path / f"tables-{wanted is None}", layout)
            records = store.wal.records(1)
            applied = fold(tables, store.views, records, start=Applied(), wanted=wanted, on_progress=note)
            tables.close(seal=False)
            digests.append(applied.digest)
            assert (len(set(seen)) == 1) == (wanted is None)
        assert digests[0] == digests[1] == store.applied().digest


def test_writers_go_on_during_a_replay(tmp_path: Path) -> None:
    """Commands from another thread are carried out while views are rebuilt, and are in the rebuilt views."""
    with space.open(tmp_path / "data") as store:
        _fill(store, b"before", 200)
        started, written = threading.Event(), []

        def write() -> None:
            started.wait()
            for number in range(50):
                _fill(store, b"during-%d" % number, 1)
                written.append(number)

        thread = threading.Thread(target=write)
        thread.start()
        result = store.replay(verify=True, on_progress=lambda _: started.set())
        started.set()
        thread.join()
        assert result.equal
        assert len(written) == 50
        assert len(store.ls("/")) == 250 * 20
        assert store.replay(verify=True).equal
