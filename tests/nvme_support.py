"""What the tests of the NVMe target share: a block device in memory, a host written from the layouts, no sockets.

The host here packs and unpacks bytes itself: sharing the target's codec would hide its mistakes.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

import attrs
from crc32c import crc32c

from space._errors import SpaceError
from space.events.commands import Buffer
from space.events.ids import CapsuleId
from space.projections.block import BlockInfo
from space.projections.nvme.connection import Connection, Limits
from space.projections.nvme.pdu import FatalError
from space.projections.nvme.queue import Pools, Queue
from space.projections.nvme.reply import Reply
from space.projections.nvme.target import Namespace, Subsystem, Target

NQN: Final = "nqn.2024-01.org.example:disk"
HOST: Final = "nqn.2014-08.org.nvmexpress:uuid:11111111-2222-3333-4444-555555555555"
HOST_ID: Final = bytes(range(1, 17))
DEVICE_ID: Final = CapsuleId(bytes(15) + b"\7")
DISCOVERY: Final = "nqn.2014-08.org.nvmexpress.discovery"


class MemoryDevice:
    """A block device in memory that remembers what was asked of it.

    ``gate``: while it is set to an event, every call waits for that event first.  ``error``: the next call raises it.
    """

    def __init__(self, blocks: int = 2048, block_size: int = 512, *, read_only: bool = False) -> None:
        self.data = bytearray(blocks * block_size)
        self.block_size = block_size
        self.read_only = read_only
        self.calls: list[tuple[Any, ...]] = []
        self.error: BaseException | None = None
        self.gate: asyncio.Event | None = None
        self.changes = 1
        self.allocated = 0

    def info(self) -> BlockInfo:
        return BlockInfo(
            DEVICE_ID, len(self.data), self.block_size, self.allocated, self.read_only, self.changes
        )

    async def _enter(self, *call: Any) -> None:
        if self.gate is not None:
            await self.gate.wait()
        self.calls.append(call)
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def peek(self, offset: int, length: int) -> Sequence[Buffer] | None:
        return None

    def begin_write(
        self, offset: int, data: Buffer, *, actor: str, done: Callable[[SpaceError | None], None]
    ) -> bool:
        return False

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        await self._enter("read", offset, length)
        return [bytes(self.data[offset : offset + length])]

    async def write(self, offset: int, data: Buffer, *, durable: bool, actor: str) -> None:
        await self._enter("write", offset, len(data), durable, actor)
        self.data[offset : offset + len(data)] = data

    async def write_zeroes(
        self, offset: int, length: int, *, deallocate: bool, durable: bool, actor: str
    ) -> None:
        await self._enter("write_zeroes", offset, length, deallocate, durable)
        self.data[offset : offset + length] = bytes(length)

    async def deallocate(self, ranges: Sequence[tuple[int, int]], *, actor: str) -> None:
        await self._enter("deallocate", list(ranges))
        for offset, length in ranges:
            self.data[offset : offset + length] = bytes(length)

    async def copy(
        self, ranges: Sequence[tuple[int, int]], target: int, *, durable: bool, actor: str
    ) -> None:
        await self._enter("copy", list(ranges), target, durable)
        data = b"".join(self.data[offset : offset + length] for offset, length in ranges)
        self.data[target : target + len(data)] = data

    async def compare_and_write(
        self, offset: int, expected: Buffer, data: Buffer, *, durable: bool, actor: str
    ) -> int:
        await self._enter("compare_and_write", offset, len(data), durable)
        current = self.data[offset : offset + len(expected)]
        for index, (one, other) in enumerate(zip(current, bytes(expected), strict=True)):
            if one != other:
                return index
        self.data[offset : offset + len(data)] = data
        return -1

    async def flush(self) -> None:
        await self._enter("flush")


def namespace(nsid: int = 1, device: MemoryDevice | None = None, **options: Any) -> Namespace:
    """A namespace whose identities tell its number."""
    return Namespace(
        nsid,
        device or MemoryDevice(),
        uuid=bytes([(0xA0 + nsid) & 0xFF]) * 16,
        nguid=bytes([(0xB0 + nsid) & 0xFF]) * 16,
        eui64=bytes([(0xC0 + nsid) & 0xFF]) * 8,
        **options,
    )


def target_with(*namespaces: Namespace, **options: Any) -> tuple[Target, Subsystem]:
    """A target with one subsystem."""
    target = Target()
    subsystem = Subsystem(NQN, "SN0001", **options)
    for each in namespaces or (namespace(),):
        subsystem.add(each)
    target.add(subsystem)
    return target, subsystem


# --- bytes a host sends


def icreq(*, digests: int = 0, hpda: int = 0, maxr2t: int = 0, pfv: int = 0) -> bytes:
    """The first PDU of a connection."""
    return (
        struct.pack("<BBBBI", 0, 0, 128, 0, 128)
        + struct.pack("<HBBI", pfv, hpda, digests, maxr2t)
        + bytes(112)
    )


def sgl(length: int, *, in_capsule: bool = False, offset: int = 0) -> bytes:
    """The data pointer of a command."""
    return struct.pack("<QI3xB", offset, length, 0x01 if in_capsule else 0x5A)


def sqe(
    opcode: int,
    cid: int,
    *,
    nsid: int = 0,
    dptr: bytes | None = None,
    cdw: Sequence[int] = (),
    flags: int = 0x40,
    mptr: int = 0,
) -> bytes:
    """A submission queue entry; ``cdw`` begins with dword 10."""
    words = [*cdw, *([0] * (6 - len(cdw)))]
    head = struct.pack("<BBHIQQ", opcode, flags, cid, nsid, 0, mptr)
    return head + (sgl(0) if dptr is None else dptr) + struct.pack("<6I", *words)


def capsule(entry: bytes, data: bytes = b"", *, digests: int = 0, pad: int = 0) -> bytes:
    """A command capsule with its data and digests."""
    head = 72 + (4 if digests & 1 else 0)
    pdo = head + pad if data else 0
    tail = 4 if digests & 2 and data else 0
    size = head + (pad + len(data) if data else 0) + tail
    flags = (digests & 1) | (2 if tail else 0)
    out = struct.pack("<BBBBI", 4, flags, 72, pdo, size) + entry
    if digests & 1:
        out += struct.pack("<I", crc32c(out))
    if data:
        out += bytes(pad) + data
    return out + (struct.pack("<I", crc32c(data)) if tail else b"")


def h2c_data(
    cid: int,
    tag: int,
    offset: int,
    data: bytes,
    *,
    last: bool = True,
    digests: int = 0,
    length: int | None = None,
) -> bytes:
    """Data the controller has asked for."""
    pdo = 24 + (4 if digests & 1 else 0)
    tail = 4 if digests & 2 else 0
    flags = (digests & 3) | (4 if last else 0)
    out = struct.pack("<BBBBI", 6, flags, 24, pdo, pdo + len(data) + tail)
    out += struct.pack("<HHII4x", cid, tag, offset, len(data) if length is None else length)
    if digests & 1:
        out += struct.pack("<I", crc32c(out))
    return out + data + (struct.pack("<I", crc32c(data)) if tail else b"")


def connect_data(
    *, subsystem: str = NQN, host: str = HOST, host_id: bytes = HOST_ID, controller: int = 0xFFFF
) -> bytes:
    """The data of a Connect."""
    names = subsystem.encode().ljust(256, b"\0") + host.encode().ljust(256, b"\0")
    return host_id + struct.pack("<H238x", controller) + names + bytes(256)


def connect_entry(
    cid: int = 0, *, qid: int = 0, sqsize: int = 31, cattr: int = 0, kato: int = 0, recfmt: int = 0
) -> bytes:
    """A Connect command whose data is in its capsule."""
    words = (recfmt | qid << 16, sqsize | cattr << 16, kato)
    return sqe(0x7F, cid, nsid=1, dptr=sgl(1024, in_capsule=True), cdw=words)


# --- PDUs a controller sends


@attrs.frozen
class Pdu:
    """A PDU from the controller, taken apart by hand."""

    kind: int
    flags: int
    head: bytes
    data: bytes

    @property
    def cid(self) -> int:
        return int(struct.unpack_from("<H", self.head, 20 if self.kind == 5 else 8)[0])

    @property
    def status(self) -> int:
        """Status code type and code, without More and Do Not Retry."""
        return int(struct.unpack_from("<H", self.head, 22)[0]) >> 1 & 0x7FF

    @property
    def retry(self) -> bool:
        return not struct.unpack_from("<H", self.head, 22)[0] >> 15

    @property
    def result(self) -> int:
        return int(struct.unpack_from("<Q", self.head, 8)[0])

    @property
    def sqhd(self) -> int:
        return int(struct.unpack_from("<H", self.head, 16)[0])

    @property
    def fields(self) -> tuple[int, ...]:
        """Of a data PDU or R2T: command, tag, offset, length."""
        return struct.unpack_from("<HHII", self.head, 8)


def take_apart(stream: bytes) -> list[Pdu]:
    """The PDUs in a stream; digests are checked."""
    found = []
    while stream:
        kind, flags, hlen, pdo, plen = struct.unpack_from("<BBBBI", stream)
        assert plen <= len(stream), "half a PDU"
        pdu, stream = stream[:plen], stream[plen:]
        head = pdu[:hlen]
        if flags & 1:
            assert struct.unpack_from("<I", pdu, hlen)[0] == crc32c(head)
        data = pdu[pdo:] if pdo else b""
        if kind == 3:
            data = pdu[hlen:]
        if flags & 2:
            data, tail = data[:-4], data[-4:]
            assert struct.unpack("<I", tail)[0] == crc32c(data)
        found.append(Pdu(kind, flags, head, data))
    return found


class Host:
    """One connection to a target without a socket: what is sent arrives at once, and answers are there on return."""

    def __init__(
        self,
        target: Target,
        *,
        digests: int = 0,
        hpda: int = 0,
        maxr2t: int = 0,
        limits: Limits | None = None,
        pools: Pools | None = None,
        now: float = 0.0,
        greet: bool = True,
    ) -> None:
        self.digests = digests
        self.connection = Connection(limits or Limits())
        self.queue = Queue(target, self.connection, self, pools or Pools(), now)
        self.local_address = "192.0.2.7"
        self.closed: str | None = None
        self.woken = 0
        self._cid = 0
        if greet:
            answer = self.send(icreq(digests=digests, hpda=hpda, maxr2t=maxr2t))
            assert [each.kind for each in answer] == [1]

    # --- the shell of the queue

    def random(self, count: int) -> bytes:
        return bytes(range(1, count + 1))

    def future(self) -> asyncio.Future[None]:
        return asyncio.get_running_loop().create_future()

    def spawn(self, coroutine: Coroutine[Any, Any, Reply]) -> asyncio.Task[Reply]:
        return asyncio.get_running_loop().create_task(coroutine)

    def wake(self) -> None:
        self.woken += 1

    def close(self, reason: str) -> None:
        self.closed = reason
        self.connection.ended = True

    @property
    def open(self) -> bool:
        """Whether the target has not closed the connection."""
        return self.closed is None

    # --- sending

    def send(self, stream: bytes, *, step: int | None = None) -> list[Pdu]:
        """Bytes to the target, in pieces of ``step``; what it answers."""
        view = memoryview(stream)
        while view:
            buffer = self.connection.get_buffer()
            count = min(len(buffer), len(view), step or len(view))
            buffer[:count] = view[:count]
            view = view[count:]
            self.connection.received(count)
            self.pump()
            if self.connection.ended:
                break
        return self.answers()

    def pump(self) -> None:
        """Hands over commands as a session does."""
        try:
            while not self.queue.blocked and (command := self.connection.next_command()) is not None:
                self.queue.accept(command)
        except FatalError as error:
            self.closed = str(error)

    def answers(self) -> list[Pdu]:
        """What the target has sent since the last time."""
        return take_apart(b"".join(map(bytes, self.connection.take_output())))

    def next_cid(self) -> int:
        self._cid = (self._cid + 1) & 0xFFFF
        return self._cid

    def command(
        self,
        opcode: int,
        *,
        nsid: int = 0,
        cdw: Sequence[int] = (),
        data: bytes | None = None,
        length: int = 0,
        flags: int = 0x40,
        cid: int | None = None,
    ) -> list[Pdu]:
        """A command with its data in the capsule, or room for ``length`` bytes; what comes back."""
        cid = self.next_cid() if cid is None else cid
        dptr = sgl(length) if data is None else sgl(len(data), in_capsule=True)
        entry = sqe(opcode, cid, nsid=nsid, dptr=dptr, cdw=cdw, flags=flags)
        return self.send(capsule(entry, data or b"", digests=self.digests))

    def one(self, opcode: int, **options: Any) -> Pdu:
        """The completion of a command that has no data to give."""
        answers = self.command(opcode, **options)
        assert [each.kind for each in answers] == [5], answers
        return answers[0]

    def data(self, opcode: int, **options: Any) -> bytes:
        """The data of a command that succeeds."""
        first, *rest = self.command(opcode, **options)
        assert first.kind == 7, hex(first.status)
        assert first.flags & 8 or [each.status for each in rest] == [0]
        return first.data

    def status(self, opcode: int, **options: Any) -> int:
        """How a command ends."""
        return self.command(opcode, **options)[-1].status

    # --- life of a queue

    def connect(
        self, *, kato: int = 0, qid: int = 0, sqsize: int = 31, cattr: int = 0, **options: Any
    ) -> Pdu:
        """Connects the queue; the completion."""
        entry = connect_entry(self.next_cid(), qid=qid, sqsize=sqsize, cattr=cattr, kato=kato)
        (answer,) = self.send(capsule(entry, connect_data(**options), digests=self.digests))
        return answer

    def set_property(self, offset: int, value: int, *, size: int = 4) -> Pdu:
        words = (int(size == 8), offset, value & 0xFFFF_FFFF, value >> 32)
        return self.one(0x7F, nsid=0, cdw=words)

    def get_property(self, offset: int, *, size: int = 4) -> Pdu:
        return self.one(0x7F, nsid=4, cdw=(int(size == 8), offset))


ENABLE: Final = 6 << 16 | 4 << 20 | 1


def admin_queue(target: Target, **options: Any) -> Host:
    """A host whose controller is enabled."""
    connecting = {key: options.pop(key) for key in ("kato", "subsystem", "host", "host_id") if key in options}
    host = Host(target, **options)
    assert host.connect(**connecting).status == 0
    assert host.set_property(0x14, ENABLE).status == 0
    return host


def io_queue(
    admin: Host, target: Target, *, qid: int = 1, sqsize: int = 127, cattr: int = 0, **options: Any
) -> Host:
    """An I/O queue of a controller."""
    controller = admin.queue.controller
    assert controller is not None
    host = Host(target, **options)
    answer = host.connect(
        qid=qid, sqsize=sqsize, cattr=cattr, controller=controller.number, host=controller.host_nqn,
        host_id=controller.host_id, subsystem=controller.subsystem.nqn,
    )  # fmt: skip
    assert answer.status == 0, hex(answer.status)
    return host


def pair(**options: Any) -> tuple[Host, Host, MemoryDevice, Subsystem]:
    """Admin and I/O queue of one controller over one namespace of 1 MiB in blocks of 512 bytes."""
    device = MemoryDevice()
    target, subsystem = target_with(namespace(1, device))
    admin = admin_queue(target)
    return admin, io_queue(admin, target, **options), device, subsystem
