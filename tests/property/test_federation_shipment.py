"""Shipments against whatever a network, or a zone that means no good, can make of them."""

from __future__ import annotations

import struct

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from space._errors import SpaceError
from space.events import commands as cmd
from space.events.commands import StoredFrame
from space.federation.shipment import (
    HASH_BYTES,
    HEADER_BYTES,
    Entry,
    Shipment,
    decode_shipment,
    encode_shipment,
)
from tests.unit.test_federation_shipment import SAMPLE, plain

pytestmark = pytest.mark.property

IDS = st.binary(min_size=16, max_size=16)
NUMBERS = st.integers(0, (1 << 63) - 1)
FRAMES = st.builds(StoredFrame, st.binary(min_size=48, max_size=48), st.none() | st.binary(max_size=64))
CONTENT = st.one_of(
    st.builds(cmd.WriteExtent, IDS, NUMBERS, NUMBERS, st.lists(FRAMES, max_size=3)),
    st.builds(cmd.SetXattr, IDS, st.binary(max_size=8), st.binary(max_size=64)),
    st.builds(cmd.Resize, IDS, NUMBERS),
    st.builds(cmd.PlaceCapsule, IDS, st.lists(st.tuples(IDS, st.binary(max_size=8)), max_size=2)),
)
COMMANDS = st.one_of(
    CONTENT,
    st.builds(cmd.WithdrawCapsule, IDS),
    st.builds(cmd.SweepReplicas, st.integers(0, 2**32 - 1)),
    st.builds(
        cmd.Copied,
        IDS,
        NUMBERS,
        st.integers(0, 2**32 - 1),
        st.booleans(),
        st.lists(CONTENT, max_size=3),
        st.tuples(*[st.integers(-(1 << 63), (1 << 63) - 1)] * 4),
    ),
)


@st.composite
def shipments(draw: st.DrawFn) -> Shipment:
    """Shipments whose cursor goes on."""
    position, step = draw(st.integers(0, 1 << 40)), draw(st.integers(0, 5))
    start = (position, step)
    entries = []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            step += 1
        else:
            position, step = position + draw(st.integers(1, 1 << 20)), 0
        time_ns = draw(st.integers(-(1 << 63), (1 << 63) - 1))
        commands = draw(st.lists(COMMANDS, max_size=3))
        entries.append(Entry(position, step, time_ns, commands, draw(st.binary(max_size=16))))
    lane, shard, epoch = (draw(st.integers(0, 2**32 - 1)) for _ in range(3))
    return Shipment(draw(IDS), draw(IDS), shard, lane, epoch, *start, entries)


@given(shipments())
def test_every_shipment_comes_through(shipment: Shipment) -> None:
    """What was encoded is decoded as the same."""
    assert plain(decode_shipment(encode_shipment(shipment))) == plain(shipment)


@given(shipments(), st.data())
def test_whatever_was_changed_is_refused(shipment: Shipment, data: st.DataObject) -> None:
    """Bits flipped, bytes cut out, doubled or swapped: refused with an error of ours, always."""
    whole = encode_shipment(shipment)
    body = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        start, end = sorted(data.draw(st.tuples(st.integers(0, len(body)), st.integers(0, len(body)))))
        how = data.draw(st.sampled_from(["flip", "cut", "double", "fill"]))
        if how == "flip" and start < len(body):
            body[start] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del body[start:end]
        elif how == "double":
            body[end:end] = body[start:end]
        elif how == "fill":
            body[start:end] = bytes(end - start)
    if bytes(body) != whole:
        with pytest.raises(SpaceError):
            decode_shipment(bytes(body))


@given(st.binary(max_size=300))
def test_garbage_is_refused(garbage: bytes) -> None:
    """Bytes that are no shipment are refused, also with a header that looks like one."""
    with pytest.raises(SpaceError):
        decode_shipment(garbage)
    with pytest.raises(SpaceError):
        decode_shipment(encode_shipment(SAMPLE)[:HEADER_BYTES] + garbage)


@given(st.binary(max_size=200), st.data())
def test_a_liar_with_the_right_hash_is_refused_or_understood(document: bytes, data: st.DataObject) -> None:
    """Whatever a zone says under the right hash comes to a shipment or an error of ours."""
    body = bytearray(encode_shipment(SAMPLE)[:HEADER_BYTES] + document)
    struct.pack_into("<I", body, 92, len(document))
    for _ in range(data.draw(st.integers(0, 3))):
        offset = data.draw(st.integers(8, HEADER_BYTES - 8))
        struct.pack_into("<Q", body, offset, data.draw(st.integers(0, 3) | st.integers(0, 2**64 - 1)))
    try:
        found = decode_shipment(bytes(body) + blake3(bytes(body)).digest())
    except SpaceError:
        return
    assert found.entries
    assert len(bytes(body)) >= HASH_BYTES
