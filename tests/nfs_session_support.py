"""A whole service without sockets: COMPOUNDs as bytes in, results as bytes out, time in the hand of the test."""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any, Final, cast

import attrs

from space.events.ids import ROOT as ROOT_CAPSULE
from space.projections.nfs import rpc
from space.projections.nfs.compound import Compound, run
from space.projections.nfs.exports import Export, Exports
from space.projections.nfs.nfs4 import NfsStatus, Op
from space.projections.nfs.rpc import Credentials
from space.projections.nfs.service import Config, Recovery, Service, Shell, Syncable
from space.projections.nfs.sessions import Connection
from space.projections.nfs.xdr import Bytes, Reader, Writer
from tests.nfs_state_support import Files

LEASE: Final = 10
ROOT: Final = Credentials(0, 0, (), "client", rpc.AUTH_SYS)
OWNER: Final = b"client"
CHANNEL: Final = (8192, 8192, 2048, 8, 4)


@attrs.define(eq=False)
class Pipe:
    """The way back, which keeps what is sent."""

    sent: list[bytes] = attrs.field(factory=list)
    closed: str = ""

    def send(self, pieces: list[Bytes]) -> None:
        self.sent.append(b"".join(pieces))

    def close(self, reason: str) -> None:
        self.closed = reason


class Tree(Files):
    """Files with a root."""

    root = ROOT_CAPSULE


class Journal(Recovery):
    """A recovery journal in memory that tells what it was told, and is only clean after ``sync``."""

    def __init__(self, epoch: int = 7, previous: dict[bytes, bytes] | None = None) -> None:
        super().__init__(epoch, previous)
        self.told: list[tuple[str, bytes]] = []
        self.synced = 0
        self.fails: Exception | None = None

    @property
    def dirty(self) -> bool:
        return self.synced < len(self.told)

    def record(self, owner: bytes, verifier: bytes) -> None:
        self.told.append(("record", owner))

    def forget(self, owner: bytes) -> None:
        self.told.append(("forget", owner))

    async def sync(self) -> None:
        if self.fails is not None:
            raise self.fails
        self.synced = len(self.told)


@attrs.define(eq=False)
class World:
    """A service, a clock, and a connection to it."""

    previous: dict[bytes, bytes] = attrs.field(factory=dict)
    config: Config = attrs.field(factory=lambda: Config(lease_seconds=LEASE, grace_seconds=LEASE))
    now: float = 100.0
    barriers: int = 0
    journal: Journal = attrs.field(init=False)
    service: Service = attrs.field(init=False)
    connection: Connection = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        numbers = itertools.count(1)
        self.journal = Journal(previous=self.previous)
        shell = Shell(
            lambda count: next(numbers).to_bytes(count, "big"), asyncio.Event, self._barrier, self._spawn
        )
        exports = Exports([Export(1, (), cast("Any", Tree()))], key=bytes(32))
        self.service = Service(exports, shell, self.journal, name=b"server", now=self.now, config=self.config)
        self.connection = self.connect()

    @property
    def pipe(self) -> Pipe:
        return cast("Pipe", self.connection.sender)

    def connect(self) -> Connection:
        return Connection(Pipe(), "192.0.2.1")

    async def _barrier(self, what: Iterable[Syncable]) -> None:
        self.barriers += 1
        for each in what:
            await each.sync()

    @staticmethod
    def _spawn(work: Coroutine[Any, Any, None]) -> None:
        raise AssertionError("nothing goes on in the background here")

    # --- COMPOUNDs

    def begin(
        self,
        *operations: bytes,
        minor: int = 1,
        tag: bytes = b"",
        credentials: Credentials = ROOT,
        connection: Connection | None = None,
    ) -> Awaitable[Result]:
        out = Writer()
        out.opaque(tag)
        out.u32(minor)
        out.u32(len(operations))
        body = out.bytes() + b"".join(operations)
        ctx = Compound(
            self.service, connection or self.connection, credentials, 0, self.now, request_bytes=len(body)
        )

        async def work() -> Result:
            return Result.of(b"".join(await run(ctx, Reader(body))))

        return work()

    def call(self, *operations: bytes, **options: Any) -> Result:
        """Carries out a COMPOUND that does not have to wait for anything."""

        async def work() -> Result:
            return await self.begin(*operations, **options)

        return asyncio.run(work())

    def introduce(self, owner: bytes = OWNER, verifier: bytes = b"verifier", **options: Any) -> int:
        """EXCHANGE_ID; the client's id."""
        result = self.call(exchange_id(owner, verifier), **options)
        assert result.status == NfsStatus.OK
        return int(struct.unpack_from(">Q", result.body)[0])

    def session(
        self, owner: bytes = OWNER, verifier: bytes = b"verifier", *, flags: int = 0, **options: Any
    ) -> bytes:
        """A client with a session that may hold state; the session's id."""
        session = self.bare_session(owner, verifier, flags=flags, **options)
        assert self.call(sequence(session, 1), op(Op.RECLAIM_COMPLETE, 0)).status == NfsStatus.OK
        return session

    def bare_session(
        self, owner: bytes = OWNER, verifier: bytes = b"verifier", *, flags: int = 0, **options: Any
    ) -> bytes:
        """A client with a session that has not said yet that it has nothing to claim."""
        client = self.introduce(owner, verifier)
        result = self.call(create_session(client, 1, flags=flags, **options))
        assert result.status == NfsStatus.OK
        return result.body[:16]


@attrs.frozen
class Result:
    """COMPOUND4res: ``body`` is what follows the last operation's status."""

    status: int
    tag: bytes
    operations: int
    data: bytes
    at: int

    @classmethod
    def of(cls, data: bytes) -> Result:
        reader = Reader(data)
        status = reader.u32()
        tag = reader.opaque(1024)
        return cls(status, tag, reader.u32(), data, reader.at)

    @property
    def body(self) -> bytes:
        """What follows the status of the only operation."""
        assert self.operations == 1
        return self.data[self.at + 8 :]

    @property
    def results(self) -> bytes:
        """All results."""
        return self.data[self.at :]


def op(number: int, *words: int) -> bytes:
    """An operation whose arguments are numbers."""
    return struct.pack(f">{1 + len(words)}I", number, *words)


def opaque(data: bytes) -> bytes:
    """Opaque data with its length and padding."""
    return struct.pack(">I", len(data)) + data + bytes(-len(data) & 3)


def exchange_id(owner: bytes = OWNER, verifier: bytes = b"verifier", flags: int = 0) -> bytes:
    """EXCHANGE_ID without protection."""
    return op(Op.EXCHANGE_ID) + verifier + opaque(owner) + struct.pack(">III", flags, 0, 0)


def channel(values: tuple[int, int, int, int, int] = CHANNEL) -> bytes:
    """channel_attrs4."""
    return struct.pack(">7I", 0, *values, 0)


def create_session(
    client: int,
    number: int,
    *,
    flags: int = 0,
    fore: tuple[int, int, int, int, int] = CHANNEL,
    back: tuple[int, int, int, int, int] = CHANNEL,
    security: bytes = struct.pack(">II", 1, 0),
) -> bytes:
    """CREATE_SESSION."""
    head = op(Op.CREATE_SESSION) + struct.pack(">QII", client, number, flags)
    return head + channel(fore) + channel(back) + struct.pack(">I", 0x40000001) + security


def sequence(session: bytes, number: int, slot: int = 0, *, cached: bool = False) -> bytes:
    """SEQUENCE."""
    return op(Op.SEQUENCE) + session + struct.pack(">IIII", number, slot, slot, cached)
