"""The home as shipping reads it, and what of it may leave."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from space._node import federation_home
from space._node.federation_home import Walk
from space.events.codec import decode_batch
from space.events.commands import Durability
from space.federation.shipment import decode_shipment
from space.federation.stream import SHIPMENT_BYTES
from space.policy.model import Compression
from space.policy.model import Durability as Promised
from space.statemachine.tables import CAPSULE, ENTRY, TABLES
from tests.federation_pump import Pumped
from tests.federation_support import shared

pytestmark = pytest.mark.unit


@pytest.fixture
def zones(tmp_path: Path) -> Iterator[Pumped]:
    """Two zones that know each other."""
    with contextlib.ExitStack() as stack:
        yield Pumped(tmp_path, stack)


@pytest.mark.parametrize("ahead", [1, 3, 1000])
def test_a_walk_meets_every_batch_in_order(
    zones: Pumped, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """However many records are read at a time, and though the log goes on meanwhile: its end is the present state."""
    monkeypatch.setattr(federation_home, "AHEAD", ahead)
    store = zones.oslo
    begin = store.position
    for number in range(4):
        store.put(b"content", name=f"/file-{number}")
    with Walk(store, begin) as walk:
        while walk.position < store.last:
            before, after, batch = walk.step()
            record = store.wal.read(batch.position)
            entries = decode_batch(record.metadata)
            assert batch.events == [event for entry in entries for _, event in entry.events]
            assert (before.position, after.position) == (batch.position - 1, batch.position)
            if batch.position == begin + 2:
                store.put(b"more", name="/later")
        assert walk.position == store.last
        with store._read() as txn:
            for table in TABLES:
                assert list(walk.now.state.scan(table, b"")) == list(txn.scan(table, b""))


def test_each_moment_of_a_walk_stays_what_it_is(zones: Pumped) -> None:
    """A moment that is held shows nothing of what came after it."""
    store = zones.oslo
    begin = store.position
    capsule = store.put(b"first", name="/file").id
    with Walk(store, begin) as walk:
        empty = walk.now
        while walk.position < store.last:
            walk.step()
        put = walk.now
        store.mv("/file", "/moved")
        store.write(capsule, 0, b"later", durability=Durability.BUFFERED)
        while walk.position < store.last:
            walk.step()
        assert empty.state.get(CAPSULE, capsule) is None
        names = [[key[16:] for key, _ in moment.state.scan(ENTRY, store.root)] for moment in (put, walk.now)]
        assert [b"file" in each for each in names] == [True, False]
        positions = [[extent.position for extent in m.extents(capsule, 0, 5)] for m in (put, walk.now)]
        assert positions[0] != positions[1]


def test_what_leaves_is_durable(zones: Pumped) -> None:
    """Buffered writes are synced before they leave; our own records of what left are when that is answered."""
    home, pump = zones.oslo, zones.there
    wal = home.wal
    policy = shared("paris", durability=Promised.BUFFERED, compression=Compression.NONE)
    pump.connect()
    pump.run()
    content = os.urandom(SHIPMENT_BYTES * 2 // 3)
    last = [home.put(content[n:], name=f"/file-{n}", policy=policy).position for n in range(3)][-1]
    assert wal.durable_index < last
    sent = []
    while (outgoing := pump.source.next()) is not None:
        sent.append(outgoing)
        assert wal.durable_index >= decode_shipment(outgoing.body).through[0]
        if len(sent) in (1, 2):
            assert wal.durable_index == last
            assert wal.last_index == outgoing.token == last + len(sent)
    assert len(sent) >= 3, "two with files, and one past our own records"
    for outgoing in sent:
        received = pump.receiver.receive(pump.peer, [outgoing.body])
        assert received.error is None
        pump.source.acknowledged(outgoing, received.cursors[0])
        assert wal.durable_index >= outgoing.token
