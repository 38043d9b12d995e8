"""An NFS service over a store of its own, and single operations of a client that has a session."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any, Final, cast

import attrs

from space._errors import SpaceError
from space._node.local_vfs import LocalFileSystem
from space._node.reading import Reading
from space._node.store import Store
from space.projections.nfs.compound import ANONYMOUS, Compound, NfsError, Stateid
from space.projections.nfs.exports import Export, Exports, Node, Squash, export_number
from space.projections.nfs.nfs4 import Attr, NfsStatus, Op
from space.projections.nfs.rpc import Credentials
from space.projections.nfs.service import Recovery, Service, Shell, Syncable
from space.projections.nfs.sessions import Client, Connection
from space.projections.nfs.status import status_of
from space.projections.nfs.xdr import Bytes, Reader, Writer, XdrError

KEY: Final = bytes(range(32))
ROOT: Final = Credentials(0, 0, (), "host", 1)
USER: Final = Credentials(1000, 100, (101, 102), "host", 1)
OTHER: Final = Credentials(2000, 200, (), "host", 1)


@attrs.define(eq=False)
class Sender:
    """A connection that swallows what is sent."""

    sent: list[list[Bytes]] = attrs.field(factory=list)

    def send(self, pieces: list[Bytes]) -> None:
        self.sent.append(pieces)


@attrs.define(eq=False)
class World:
    """A service; ``spawned`` is what it wants to go on beside requests."""

    exports: Exports
    spawned: list[Coroutine[Any, Any, None]] = attrs.field(factory=list)
    service: Service = attrs.field(init=False)
    client: Client = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        async def barrier(what: Iterable[Syncable]) -> None:
            for each in what:
                await each.sync()

        numbers = iter(range(1, 1 << 30))
        shell = Shell(
            lambda count: next(numbers).to_bytes(count, "big"),
            cast("Any", asyncio.Event),
            barrier,
            self.spawned.append,
        )
        self.service = Service(self.exports, shell, Recovery(1), name=b"test", now=0.0)
        self.client = self.service.introduce(b"owner", bytes(8), (1, 0), 0.0)
        self.service.confirm(self.client, 0.0)
        self.service.reclaimed(self.client)

    def request(self, who: Credentials = ROOT, *, minor: int = 2, host: str = "127.0.0.1") -> Request:
        """A COMPOUND of the client, at the root."""
        connection = Connection(cast("Any", Sender()), host)
        made = Compound(self.service, connection, who, minor, 1.0)
        made.client, made.current = self.client, self.exports.root
        return Request(made)

    def run_spawned(self) -> None:
        """Lets everything that goes on beside requests come to its end."""
        while self.spawned:
            asyncio.run(self.spawned.pop(0))


def served(reading: Reading, *, squash: Squash = Squash.NONE, **options: Any) -> World:
    """A service whose root is the root of a store."""
    store = reading.id if isinstance(reading, Store) else b"past"
    number = export_number(store, reading.root)
    return World(Exports([Export(number, (), LocalFileSystem(reading), squash=squash, **options)], key=KEY))


@attrs.define
class Request:
    """A COMPOUND whose operations are given one by one; each returns its status and what stands behind it."""

    ctx: Compound

    def __call__(self, op: Op, args: bytes = b"") -> tuple[int, Reader]:
        out = Writer()
        return asyncio.run(self._call(op, Reader(args), out)), Reader(out.bytes())

    async def _call(self, op: Op, args: Reader, out: Writer) -> int:
        begin = out.mark()
        try:
            result = self.ctx.service.operations[op](self.ctx, args, out)
            status = result if isinstance(result, int) else await result
        except (NfsError, SpaceError, XdrError) as error:
            out.truncate(begin)
            if op == Op.SETATTR:  # as the loop over operations has it
                out.bitmap(0)
            if isinstance(error, NfsError):
                return error.status
            return status_of(error) if isinstance(error, SpaceError) else NfsStatus.BADXDR
        assert not args.left, f"{op.name} left {args.left} bytes of its arguments"
        return status

    def ok(self, op: Op, args: bytes = b"") -> Reader:
        """An operation that has to succeed."""
        status, result = self(op, args)
        assert status == NfsStatus.OK, NfsStatus(status).name
        return result

    def fails(self, op: Op, args: bytes = b"") -> str:
        """Name of the status an operation ends with."""
        return NfsStatus(self(op, args)[0]).name

    def at(self, node: Node) -> Request:
        """The same request, standing at another node."""
        self.ctx.current, self.ctx.stateid = node, None
        return self

    def walk(self, *names: bytes) -> Request:
        """Looks up names from here."""
        for name in names:
            self.ok(Op.LOOKUP, string(name))
        return self

    def root(self) -> Request:
        """Back to the root."""
        self.ok(Op.PUTROOTFH)
        return self


# --- arguments --------------------------------------------------------------------------------------


def string(data: bytes) -> bytes:
    """Opaque data."""
    return struct.pack(">I", len(data)) + data + bytes(-len(data) & 3)


def bitmap(*attributes: Attr) -> bytes:
    """A bitmap4."""
    out = Writer()
    out.bitmap(sum(1 << each for each in attributes))
    return out.bytes()


def fattr(values: dict[Attr, bytes]) -> bytes:
    """A fattr4 of encoded values."""
    return bitmap(*values) + string(b"".join(value for _, value in sorted(values.items())))


def u32(value: int) -> bytes:
    """An unsigned int."""
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    """An unsigned hyper."""
    return struct.pack(">Q", value)


def stateid(value: Stateid = ANONYMOUS) -> bytes:
    """A stateid4."""
    return u32(value.seqid) + value.other


def make_directory(name: bytes, mode: int = 0o755) -> bytes:
    """Arguments of a CREATE."""
    return u32(2) + string(name) + fattr({Attr.MODE: u32(mode)})


def write(offset: int, data: bytes, stable: int = 0) -> bytes:
    """Arguments of a WRITE."""
    return stateid() + u64(offset) + u32(stable) + string(data)


def read(offset: int, count: int) -> bytes:
    """Arguments of a READ."""
    return stateid() + u64(offset) + u32(count)


# --- results ----------------------------------------------------------------------------------------


def attributes_of(result: Reader) -> tuple[int, Reader]:
    """A fattr4: its bitmap, and a reader of its values."""
    return result.bitmap(), Reader(result.opaque(1 << 20))


def page(result: Reader) -> tuple[list[tuple[int, bytes]], bool]:
    """A READDIR: cookies and names, and whether it is the end."""
    result.fixed(8)
    found = []
    while result.boolean():
        cookie, name = result.u64(), result.opaque(255)
        attributes_of(result)
        found.append((cookie, name))
    return found, result.boolean()


def open_store(path: Path) -> Store:
    """A store in small segments."""
    return Store(path, segment_bytes=1 << 20)
