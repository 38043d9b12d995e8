"""Upkeep while others write: nobody waits for ever, and nothing is found wrong that is right."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import space
from space._errors import NotFoundError
from space._node import history
from space._node.store import Store, _Ticket
from space.events.commands import CreateCapsule, Request
from space.statemachine.store import read_seal


@contextmanager
def writers(store: Store) -> Iterator[None]:
    """Three threads that put files all the time."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def write(number: int) -> None:
        count = 0
        try:
            while not stop.is_set():
                count += 1
                store.put(b"x" * (count % 5000), name=f"/{number}.{count}")
        except BaseException as error:  # noqa: BLE001 - told in the end
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []


def checkpoint_and_look_back(store: Store) -> None:
    """A checkpoint is made, and every moment of late can be looked at."""
    store.checkpoint()
    for position in range(max(1, store.position - 3), store.position):
        with store.at(f"@{position}") as past:
            assert past.position == position


UPKEEP: dict[str, Callable[[Store], object]] = {
    "replay": lambda store: store.replay(verify=True).equal or pytest.fail("unequal"),
    "checkpoint": checkpoint_and_look_back,
    "verify": lambda store: store.verify().findings == [] or pytest.fail("found something"),
    "gc": lambda store: store.gc(),
}


@pytest.mark.parametrize("upkeep", UPKEEP.values(), ids=UPKEEP.keys())
def test_upkeep_goes_along_with_writes(tmp_path: Path, upkeep: Callable[[Store], object]) -> None:
    """Rebuilding, copying, verifying and reclaiming while three threads write: no deadlock, no false finding."""
    with space.open(tmp_path, segment_bytes=32 << 10) as store:
        with writers(store):
            for _ in range(8):
                upkeep(store)
        assert store.verify().findings == []
        for path in history.checkpoints(tmp_path):
            applied = read_seal(path, history.layout_of(store.views))
            assert applied is not None
            assert applied.position == int(path.name)


def test_views_can_be_rebuilt_any_number_of_times(tmp_path: Path) -> None:
    """Each rebuild takes the place of the one before the last: tables do not pile up."""
    with space.open(tmp_path) as store:
        store.put(b"x", name="/x")
        for _ in range(40):
            assert store.replay(verify=True).equal
        assert store.get("/x") == b"x"


def test_rebuilding_from_two_threads_at_once(tmp_path: Path) -> None:
    """Two rebuilds take turns."""
    with space.open(tmp_path) as store:
        store.put(b"x", name="/x")
        results: list[bool] = []
        threads = [
            threading.Thread(target=lambda: results.append(store.replay(verify=True).equal)) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [True] * 4


def test_reading_a_store_that_was_closed_is_an_error_of_ours(tmp_path: Path) -> None:
    """After close every call is refused clearly, also one that had begun."""
    store = space.open(tmp_path)
    put = store.put(b"x" * 3_000_000, name="/x")
    stream = store.stream(put.id)
    next(stream)
    store.close()
    with pytest.raises(space.SpaceError):
        next(stream)
    for call in (
        lambda: store.get("/x"),
        lambda: store.rm("/x"),
        lambda: store.put(b"", name="/y"),
        store.sync,
    ):
        with pytest.raises(space.SpaceError):
            call()
    store.close()


def test_an_unexpected_error_leaves_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure nobody foresaw reaches the caller at work, and the others get a clear error instead of nothing."""
    with space.open(tmp_path / "data") as store:
        waiting = _Ticket([Request(CreateCapsule(store.new_id(), parent=store.root, name=b"a"))])
        store._queue.append(waiting)

        def broken(*_: object, **__: object) -> None:
            raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr("space._node.store.prepare", broken)
            with pytest.raises(ZeroDivisionError):
                store.create(parent=store.root, name=b"b")
        assert waiting.done
        assert isinstance(waiting.outcomes[0], space.StorageError)
        store.create(parent=store.root, name=b"c")
        assert [entry.name for entry in store.ls("/")] == [b"c"]


def test_who_is_alone_is_not_overtaken(tmp_path: Path) -> None:
    """Commands that others handed in while one thread has the store to itself are decided after all of its own."""
    with space.open(tmp_path) as store, ThreadPoolExecutor(1) as pool:
        with store.alone():
            waiting = pool.submit(store.create, parent=store.root, name=b"other")
            while not store._queue:
                time.sleep(0.001)
            mine = store.create(parent=store.root, name=b"mine")
            with pytest.raises(NotFoundError):
                store.resolve("/other")
        assert store.stat(waiting.result(60)).change > store.stat(mine).change
