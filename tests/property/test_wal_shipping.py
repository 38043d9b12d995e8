"""Shipping that is interrupted anywhere, to a log on a disk that loses power."""

from __future__ import annotations

import contextlib
import random

from hypothesis import given
from hypothesis import strategies as st

from space.wal.faulty_disk import FaultyDisk
from space.wal.log import Log
from space.wal.segment_reader import Damage
from space.wal.shipping import (
    CHUNK_BYTES_MAX,
    decode_chunk,
    encode_chunk,
    first_divergence,
    link_at,
    read_chunk,
    receive_chunk,
)

STORE = b"0123456789abcdef"


class PowerLossError(Exception):
    """The machine stops here."""


def open_log(disk: FaultyDisk) -> Log:
    """A log in small segments."""
    return Log.open(disk, "/log", store_id=STORE, segment_bytes=16_384)


def fill(log: Log, count: int, rng: random.Random) -> None:
    """Appends batches, and reclaims some of their payload."""
    for _ in range(count):
        payload = rng.randbytes(rng.choice((0, 1, 700, 4096, 9000, 14_000)))
        log.append(rng.randbytes(rng.randint(0, 200)), [payload], time_ns=log.last_time_ns + 1, term=2)
        if len(payload) > 4096 and rng.random() < 0.5:
            log.punch(log.last_index, rng.choice((0, 4096)), len(payload) - 4096)


def follow(source: Log, target: Log, rng: random.Random) -> None:
    """Brings a target up to the source, syncing now and then."""
    target.truncate_after(
        first_divergence(target, lambda index: link_at(source, index), source.last_index) - 1
    )
    while target.last_index < source.last_index:
        start = rng.randint(max(target.last_index - 3, 1), target.last_index + 1)
        chunk = read_chunk(
            source,
            start,
            stop=source.last_index + 1,
            bytes_max=rng.choice((1, 5000, 50_000, CHUNK_BYTES_MAX)),
            reclaimed=lambda _info, _payload: True,
        )
        receive_chunk(target, decode_chunk(b"".join(encode_chunk(chunk))))
        if rng.random() < 0.5:
            target.sync()
    target.sync()


@given(
    seed=st.integers(0, 2**32),
    common=st.integers(0, 15),
    own=st.integers(0, 10),
    theirs=st.integers(1, 25),
    losses=st.lists(st.integers(1, 300), max_size=4),
)
def test_shipping_goes_on_after_any_power_loss(
    seed: int, common: int, own: int, theirs: int, losses: list[int]
) -> None:
    """A log that had gone its own way, cut back and shipped to with interruptions, becomes the source's."""
    rng = random.Random(seed)
    source_disk, disk = FaultyDisk(rng), FaultyDisk(rng)
    source, target = open_log(source_disk), open_log(disk)
    fill(source, common, rng)
    follow(source, target, rng)
    fill(target, own, rng)
    target.sync()
    fill(source, theirs, rng)
    for operations in losses:
        stop_at = disk.operations + operations

        def hook(_operation: str, _path: str, stop_at: int = stop_at) -> None:
            if disk.operations == stop_at:
                raise PowerLossError

        disk.hook = hook
        with contextlib.suppress(PowerLossError):
            follow(source, target, rng)
        disk.hook = None
        agreed = first_divergence(target, lambda index: link_at(source, index), source.last_index) - 1
        safe = min(target.durable_index, agreed)
        disk.crash()
        target = open_log(disk)
        assert target.last_index >= safe
        assert link_at(target, safe) == link_at(source, safe)
    follow(source, target, rng)
    assert target.last_chain == source.last_chain
    assert list(target.stored(1)) == list(source.stored(1))
    target.close()
    assert {finding.what for finding in open_log(disk).verify()} <= {Damage.PAYLOAD}
