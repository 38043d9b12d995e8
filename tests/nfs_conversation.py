"""What clients say to a server, as bytes that can be kept, changed and said again: captures, fuzzing, golden replays.

The server is the whole of ``space.projections.nfs`` over files in memory, without sockets, clocks and chance: the same
bytes get the same answers, so what a client was given (session, filehandles, stateids) is good when it is said again.

A conversation is a list of steps, each of one byte (what), two (how long) and its bytes.  ``RECORD`` is a message to
the connection in the low two bits.  With ``IN_ORDER`` its SEQUENCE is put right first (session and sequence number),
so that what comes after a step that was taken out or changed is not all refused for that.

``python -m tests.nfs_conversation FILE PORT`` serves the same files at a socket and writes what its clients say.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import attrs

from space.projections.nfs import rpc
from space.projections.nfs.exports import Export, Exports
from space.projections.nfs.nfs4 import Op
from space.projections.nfs.server import Barriers, Clock, Server, Session, Tasks
from space.projections.nfs.service import REPLIES_BYTES_MAX, Config, Recovery, Service, Shell
from tests.nfs_client import Rpc, Unpacker, take_answer, u32
from tests.nfs_memory import MemoryFiles

RECORD, STREAM, TIME, HANG_UP, ANSWERS = range(0, 20, 4)
"""What a step is: a message, bytes of a connection as they come, seconds that pass, its end, how it answers calls."""

IN_ORDER: Final = 0x80
WHAT: Final = 0x1C
CONNECTIONS: Final = 4
STEPS_MAX: Final = 200
STEP_BYTES_MAX: Final = 0xFFFF
LEASE_SECONDS: Final = 10
EPOCH: Final = 7
TURNS: Final = 40
"""Turns of the loop in which what can go on has gone on: an answer takes a handful."""

_HEAD: Final = struct.Struct(">BH")
_CALL_HEAD: Final = 24
"""Bytes of a call before its credentials."""


@attrs.frozen
class Step:
    """One step; ``what`` with its connection and flags."""

    what: int
    data: bytes

    def encode(self) -> bytes:
        return _HEAD.pack(self.what, len(self.data)) + self.data


def parse(data: bytes) -> list[Step]:
    """The steps in any bytes; what is left over at the end is a shorter step."""
    steps: list[Step] = []
    at = 0
    while at + _HEAD.size <= len(data) and len(steps) < STEPS_MAX:
        what, length = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        steps.append(Step(what, data[at : at + length]))
        at += length
    return steps


class Wire(asyncio.Transport):
    """A connection's way back; keeps what is sent until it is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = bytearray()
        self.closed = False

    def write(self, data: Any) -> None:
        self.sent += data

    def writelines(self, pieces: Any) -> None:
        self.sent += b"".join(pieces)

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("192.0.2.1", 1023), "socket": _SOCKET}.get(name, default)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """It is never full."""

    def pause_reading(self) -> None:
        """Its steps wait in the session."""

    def resume_reading(self) -> None:
        """And go on."""


_SOCKET: Final = SimpleNamespace(setsockopt=lambda *_: None)


class _Answering:
    """How calls of the back channel are answered: 0 well, 1 not at all, 2 with an error, else with nonsense."""

    def __init__(self) -> None:
        self.how = 0

    def callback(self, name: str, take: Unpacker) -> bytes:
        if name == "getattr":
            return u32(0, 1, 1 << 3 | 1 << 4, 16) + struct.pack(">QQ", 1000, 4096)
        return u32(10008 if self.how == 2 else 0)


@attrs.define(eq=False)
class Line:
    """A connection: the server's end, what it sends, and how calls of it are answered."""

    session: Session
    wire: Wire = attrs.field(factory=Wire)
    records: rpc.Records = attrs.field(factory=lambda: rpc.Records(8 << 20))
    answering: _Answering = attrs.field(factory=_Answering)


class Quiet(logging.Handler):
    """Keeps what the server logs as its own faults."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.faults: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.faults.append(self.format(record))


class World:
    """A server on the running loop, the same each time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.tasks = Tasks()
        self.files = MemoryFiles()
        export = Export(1, (), cast("Any", self.files))
        shell = Shell(bytes, asyncio.Event, Barriers().wait, self.tasks.spawn)
        self.service = Service(
            Exports([export], key=bytes(32)),
            shell,
            Recovery(EPOCH),
            name=b"server",
            now=self.now,
            config=Config(lease_seconds=LEASE_SECONDS, grace_seconds=0),
        )
        self.server = Server(self.service, self.tasks, Clock(lambda: self.now))

    def pass_time(self, seconds: float) -> None:
        """Time passes, a second at a time as the server looks at it."""
        while seconds > 0:
            self.now += min(seconds, 1.0)
            seconds -= 1.0
            self.server._tick()
            assert self.server._timer is not None
            self.server._timer.cancel()


class Conversation:
    """Says steps to a server, and judges what it answers.

    Attributes:
        said: a line for each answer: the operations with their statuses.
    """

    def __init__(self, steps: list[Step]) -> None:
        self._steps = steps
        self.said: list[str] = []

    async def run(self) -> None:
        """Says everything; afterwards the clients are gone, and nothing of theirs may be left.

        Raises:
            AssertionError: an answer is none, or something of the server is not as it must be.
        """
        self.world = World()
        self._lines: dict[int, Line] = {}
        with _no_faults():
            for step in self._steps:
                self._do(step)
                await self._settle()
                self._bounded()
            for number in list(self._lines):
                self._hang_up(number)
            await self._end()

    # --- steps

    def _line(self, number: int) -> Line:
        line = self._lines.get(number)
        if line is None:
            line = self._lines[number] = Line(Session(self.world.server))
            line.session.connection_made(line.wire)
        return line

    def _do(self, step: Step) -> None:
        number, what = step.what & 3, step.what & WHAT
        if what == TIME:
            self.world.pass_time(sum(step.data[:8]))
        elif what == HANG_UP:
            self._hang_up(number)
        elif what == ANSWERS:
            self._line(number).answering.how = step.data[0] & 3 if step.data else 0
        elif what == STREAM:
            self._line(number).session.data_received(step.data)
        else:
            data = self._put_right(step.data) if step.what & IN_ORDER else step.data
            self._line(number).session.data_received(u32(1 << 31 | len(data)) + data)

    def _hang_up(self, number: int) -> None:
        line = self._lines.pop(number, None)
        if line is not None:
            line.wire.closed = True
            line.session.connection_lost(None)

    def _put_right(self, record: bytes) -> bytes:
        """A call with the session and the sequence number that its slot has next."""
        at = _sequence_at(record)
        if at is None or not self.world.service.sessions:
            return record
        found = self.world.service.sessions.get(record[at : at + 16])
        session = found or next(reversed(self.world.service.sessions.values()))
        (slot,) = struct.unpack_from(">I", record, at + 20)
        known = session.slots.get(slot)
        number = (0 if known is None else known.sequence) + 1
        if found is not None and record[at + 16 : at + 20] in (
            u32(number - 1 & 0xFFFFFFFF),
            u32(number & 0xFFFFFFFF),
        ):
            return record  # it is right, or a retry
        return record[:at] + session.id + u32(number & 0xFFFFFFFF) + record[at + 20 :]

    async def _settle(self) -> None:
        """Lets everything go on that can, and takes what is sent."""
        for _ in range(TURNS):
            heard = self._hear()
            if not heard and not self.world.tasks._tasks:
                break
            await asyncio.sleep(0)

    # --- answers

    def _hear(self) -> bool:
        heard = False
        for number, line in list(self._lines.items()):
            if line.wire.sent:
                heard = True
                line.records.feed(bytes(line.wire.sent))
                line.wire.sent.clear()
                while (record := line.records.next()) is not None:
                    self._judge(line, bytes(record))
            if line.wire.closed:
                self._hang_up(number)
        return heard

    def _judge(self, line: Line, record: bytes) -> None:
        take = Unpacker(record)
        xid, kind = take.u32(), take.u32()
        if kind == 0:
            self._answer(line, xid, record)
            return
        assert kind == 1, f"a message of kind {kind}"
        if take.u32():
            self.said.append(f"denied {take.u32()} {take.u32()}")
            return
        take.u32()
        take.opaque()
        accepted = take.u32()
        assert accepted < 5, "a system error"
        if accepted or not take.left:
            self.said.append(f"accepted {accepted}")
            return
        answer = take_answer(record[take.at :])
        assert answer.status != "SERVERFAULT", answer
        names = [f"{each.name}={each.status}" for each in answer.results]
        self.said.append(" ".join(names) or answer.status)

    def _answer(self, line: Line, xid: int, record: bytes) -> None:
        """A call of the back channel."""
        how = line.answering.how
        if how == 1:
            return
        answer = Rpc._called(cast("Rpc", line.answering), Unpacker(record))
        if how == 3:
            answer = answer[: len(answer) // 2]
        reply = u32(xid, 1, 0, 0, 0) + answer
        line.session.data_received(u32(1 << 31 | len(reply)) + reply)

    # --- what must always be so

    def _bounded(self) -> None:
        service = self.world.service
        kept = sum(
            sum(map(len, slot.answer or ()))
            for each in service.sessions.values()
            for slot in each.slots.values()
        )
        assert kept <= service._reply_bytes <= REPLIES_BYTES_MAX, (
            f"{kept} of {service._reply_bytes} bytes kept"
        )
        assert sum(len(each.sessions) for each in service.clients.values()) == len(service.sessions)
        for line in self._lines.values():
            assert line.session.partial_bytes <= rpc.RECORD_BYTES_MAX

    async def _end(self) -> None:
        """Clients that end lose everything, and then nobody has anything."""
        world = self.world
        for client in list(world.service.clients.values()):
            world.service.remove(client)
        if world.tasks._tasks:  # what waits for a client that is gone does so for a lease or two
            world.pass_time(3 * LEASE_SECONDS)
        await self._settle()
        assert not world.tasks._tasks, "something still goes on"
        assert not world.service.sessions
        assert not world.service._reply_bytes
        assert not any(world.files.held.values()), "a file is held open by nobody"
        assert not world.server.connections


def _sequence_at(record: bytes) -> int | None:
    """Where the session of a COMPOUND's SEQUENCE is, if it begins with one."""
    try:
        take = Unpacker(record)
        take.fixed(_CALL_HEAD)
        for _ in ("credentials", "verifier"):
            take.u32()
            take.opaque()
        take.opaque()
        take.fixed(8)
        found = take.u32() == Op.SEQUENCE and take.left >= 28
    except struct.error:
        return None
    return take.at if found else None


@contextlib.contextmanager
def _no_faults() -> Iterator[None]:
    """The server must not log a fault of its own."""
    quiet, logger = Quiet(), logging.getLogger("space.nfs")
    logger.addHandler(quiet)
    try:
        yield
    finally:
        logger.removeHandler(quiet)
    assert not quiet.faults, quiet.faults


def converse(data: bytes, loop: asyncio.AbstractEventLoop) -> list[str]:
    """Says a conversation; what was answered, a line each."""
    conversation = Conversation(parse(data))
    loop.run_until_complete(conversation.run())
    return conversation.said


# --- recording


def record(file: Path, port: int) -> None:
    """Serves the files of a conversation until it is told to end, and then writes the first of what was said."""
    steps: list[Step] = []
    lines = itertools.count()

    class Recorded(Session):
        def __init__(self, world: World) -> None:
            super().__init__(world.server)
            self._number = next(lines) % CONNECTIONS

        def _take(self, record: Any) -> None:
            steps.append(Step(RECORD | IN_ORDER | self._number, bytes(record)))
            super()._take(record)

    async def serve() -> None:
        world = World()
        over = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, over.set)
        server = await asyncio.get_running_loop().create_server(lambda: Recorded(world), "127.0.0.1", port)
        sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
        sys.stdout.flush()
        await over.wait()
        server.close()

    asyncio.run(serve())
    said = [each.encode() for each in steps if len(each.data) <= STEP_BYTES_MAX]
    file.write_bytes(b"".join(said[:STEPS_MAX]))


if __name__ == "__main__":
    record(Path(sys.argv[1]), int(sys.argv[2]))
