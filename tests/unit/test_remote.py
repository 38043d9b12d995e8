"""Calls to one of several nodes, of which some stop in the middle."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any, Final

import pytest

from space._node.messages import Message
from space.control import BrokenError
from space.remote import Nodes

pytestmark = pytest.mark.unit

CONTENT: Final = bytes(range(256)) * 1024
HANG_SECONDS: Final = 60.0


class Endpoint:
    """A node that has one file; ``stops_after`` so many bytes it stops, and keeps what it was sent open."""

    def __init__(self, stops_after: int | None = None) -> None:
        self._stops_after = stops_after
        self.kept = -1

    def ask(self, request: Message, descriptor: int | None) -> Iterator[Message]:
        """Answers a look at the file, and its bytes."""
        if request["method"] == "stat":
            yield {"result": {"change": [1, 2]}}
            return
        assert descriptor is not None
        self.kept = os.dup(descriptor)
        data = CONTENT[request["arguments"]["offset"] :]
        for at in range(0, len(data[: self._stops_after]), 4096):
            os.write(self.kept, data[at : at + 4096])
        if self._stops_after is not None:
            raise BrokenError("it has said nothing for a minute")
        os.close(self.kept)
        yield {"result": {"size": len(data)}}


def test_bytes_come_from_another_node_when_one_stops() -> None:
    """Where the first one got to, the next goes on; what the first writes when it wakes goes nowhere."""
    stopped, other = Endpoint(stops_after=100 * 1024), Endpoint()
    source, target = os.pipe()
    answers: list[Any] = []
    seen = bytearray()
    nodes: Any = Nodes([stopped, other])

    def get() -> None:
        answers.append(nodes.get(capsule="/a", descriptor=target))
        os.close(target)

    thread = threading.Thread(target=get, daemon=True)
    thread.start()
    reading = threading.Thread(target=_read_all, args=(source, seen), daemon=True)
    reading.start()
    thread.join(HANG_SECONDS)
    assert answers == [{"size": len(CONTENT)}], "it waits for the one that stopped"
    with pytest.raises(BrokenPipeError):
        os.write(stopped.kept, b"late")
    reading.join(HANG_SECONDS)
    assert bytes(seen) == CONTENT
    for each in (stopped.kept, source):
        os.close(each)


def _read_all(source: int, seen: bytearray) -> None:
    while piece := os.read(source, 65536):
        seen += piece
