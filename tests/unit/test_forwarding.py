"""Requests on their way to the leader that have more frames than a message has attachments."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from space.events.command_codec import decode_requests, encode_requests
from space.events.commands import Command, ReceiveShipment, Request, WriteExtent
from space.replication.group import packed, unpacked
from space.replication.wire import encode_request
from tests.zone_support import HOME, made, shipment, write

FRAMES = 5000


def test_a_shipment_is_two_attachments() -> None:
    """However many commands and frames it has, it fits into a message, and is the same shipment at the other end."""
    commands: list[Command] = [made(1, name=b"file"), *(write(1, at, b"%d" % at) for at in range(FRAMES))]
    request = Request(shipment(0, 1, *commands), "zone:oslo", bytes(16), 7)
    document, attachments = encode_requests([request])
    assert len(attachments) == FRAMES
    pieces = packed(document, attachments)
    assert len(pieces) == 2
    encode_request(1, "execute", [0, None, False], pieces)
    (again,) = decode_requests(*unpacked([bytes(each) for each in pieces]))
    assert isinstance(again.command, ReceiveShipment)
    assert (again.actor, again.client, again.sequence) == ("zone:oslo", bytes(16), 7)
    writes = [each for each in again.command.commands if isinstance(each, WriteExtent)]
    frames = [bytes(frame.stored or b"") for each in writes for frame in each.frames]
    assert frames == [b"%d" % at for at in range(FRAMES)]
    assert again.command.zone == HOME


@given(st.lists(st.binary(max_size=20), max_size=20), st.integers(0, 50))
def test_pieces_come_back_as_they_were(frames: list[bytes], document: int) -> None:
    """Also empty ones, and none at all."""
    found, attachments = unpacked(packed([document], frames))
    assert found == [document]
    assert [bytes(each) for each in attachments] == frames


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [b""],
        [b"", b""],
        [b"\xc1", b""],
        [msgpack.packb([1]), b""],
        [msgpack.packb(7), b""],
        [msgpack.packb([[], 7]), b""],
        [msgpack.packb([[], ["x"]]), b"x"],
        [msgpack.packb([[], [2]]), b"x"],
        [msgpack.packb([[], [1, 1]]), b"x"],
        [msgpack.packb([[], [-1]]), b"x"],
        [msgpack.packb([[], [True]]), b"x"],
        [msgpack.packb([[], [1]]), b"xy"],
        [msgpack.packb([[], [1]]), b"x", b"y"],
    ],
)
def test_what_is_no_such_message(pieces: list[bytes]) -> None:
    """Other numbers of attachments, other types, lengths beyond the end: an error the sender is told, no more."""
    with pytest.raises((ValueError, TypeError)):
        unpacked(pieces)
