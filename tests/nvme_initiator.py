"""An NVMe/TCP host in user space, for tests: written from the specification, and sharing nothing with the target.

NVM Express Base Specification 2.0, NVM Command Set 1.0, TCP Transport 1.0.  It never imports the target's codec, so a
layout misread there is not misread here in the same way.  It is strict where a host may be: a PDU that breaks a rule
of the transport (type, lengths, alignment, digests, data out of order or beyond what was asked for, more R2Ts than
allowed) is a :class:`ViolationError`, and ends the connection and every command on it.

Tests that want to be bad hosts write bytes with :meth:`Queue.send_raw`, change a command on its way with ``spoil``,
or choose descriptors and command ids themselves.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import enum
import hmac
import struct
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import attrs
from crc32c import crc32c

assert crc32c(b"123456789") == 0xE306_9283, "RFC 3720, appendix B.4"

DISCOVERY_NQN: Final = "nqn.2014-08.org.nvmexpress.discovery"
HOST_NQN: Final = "nqn.2014-08.org.nvmexpress:uuid:0f4b6c52-6a0b-4d1f-9b1e-0a4f5d1c9e11"
HOST_ID: Final = bytes.fromhex("0f4b6c526a0b4d1f9b1e0a4f5d1c9e11")
PDU_BYTES_MAX: Final = 4 << 20
"""Longer PDUs are not believed: no test asks for more than 1 MiB at once."""

Spoil = Callable[[bytes], bytes]


class Pdu(enum.IntEnum):
    """PDU types (TCP Transport 1.0, section 3.6.1)."""

    ICREQ = 0x00
    ICRESP = 0x01
    H2C_TERM = 0x02
    C2H_TERM = 0x03
    COMMAND = 0x04
    RESPONSE = 0x05
    H2C_DATA = 0x06
    C2H_DATA = 0x07
    R2T = 0x09


class Digest(enum.IntFlag):
    """Bits of DGST in ICReq, and of the flags of a PDU that has digests."""

    NONE = 0
    HEADER = 1
    DATA = 2
    BOTH = 3


LAST: Final = 1 << 2
SUCCESS: Final = 1 << 3


class Admin(enum.IntEnum):
    """Admin opcodes (Base Specification 2.0, figure 138)."""

    GET_LOG_PAGE = 0x02
    IDENTIFY = 0x06
    ABORT = 0x08
    SET_FEATURES = 0x09
    GET_FEATURES = 0x0A
    ASYNC_EVENT_REQUEST = 0x0C
    KEEP_ALIVE = 0x18
    FABRICS = 0x7F


class Io(enum.IntEnum):
    """Opcodes of the NVM command set (NVM Command Set 1.0, figure 12; Base Specification, figure 390)."""

    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    WRITE_UNCORRECTABLE = 0x04
    COMPARE = 0x05
    WRITE_ZEROES = 0x08
    DATASET_MANAGEMENT = 0x09
    VERIFY = 0x0C
    RESERVATION_REGISTER = 0x0D
    RESERVATION_REPORT = 0x0E
    RESERVATION_ACQUIRE = 0x11
    RESERVATION_RELEASE = 0x15
    COPY = 0x19


FCTYPE_PROPERTY_SET: Final = 0x00
FCTYPE_CONNECT: Final = 0x01
FCTYPE_PROPERTY_GET: Final = 0x04
FCTYPE_AUTHENTICATION_SEND: Final = 0x05
FCTYPE_AUTHENTICATION_RECEIVE: Final = 0x06
FCTYPE_DISCONNECT: Final = 0x08

CAP: Final = 0x00
VS: Final = 0x08
CC: Final = 0x14
CSTS: Final = 0x1C
CC_ENABLE: Final = 1 | 6 << 16 | 4 << 20
"""EN, with submission entries of 2^6 and completion entries of 2^4 bytes."""
CC_SHUTDOWN: Final = CC_ENABLE | 1 << 14
FUA: Final = 1 << 30
FUSED_FIRST: Final = 1
FUSED_SECOND: Final = 2
SGL_OFFSET: Final = 0x01
"""Data block, in the capsule."""
SGL_TRANSPORT: Final = 0x5A
"""Transport data block: the data travels in PDUs of its own."""
PSDT_SGL: Final = 0x40

_COMMON: Final = struct.Struct("<BBBBI")
_ICREQ: Final = struct.Struct("<BBBBIHBBI112x")
_ICRESP: Final = struct.Struct("<HBBI")
_SQE: Final = struct.Struct("<BBHIIIQ16s6I")
_SGL: Final = struct.Struct("<QI3xB")
_CQE: Final = struct.Struct("<QHHHH")
_TRANSFER: Final = struct.Struct("<HHII4x")
_CONNECT: Final = struct.Struct("<16sH238x256s256s256x")
assert (_ICREQ.size, _SQE.size, _SGL.size, _CQE.size, _TRANSFER.size) == (128, 64, 16, 16, 16)
assert _CONNECT.size == 1024


SECURITY: Final = 0xE9 << 24 | 0x0101 << 8
"""Dword 10 of Authentication Send and Receive: DH-HMAC-CHAP and the like, both specific fields 1."""
AUTHENTICATION_REQUIRED: Final = 1 << 17
"""In the result of Connect (ATR)."""
_HASHES: Final = {1: "sha256", 2: "sha384", 3: "sha512"}
_NONCE: Final = bytes(range(64))


def bound_key(secret: str, name: str) -> tuple[bytes, str]:
    """The key of a secret as ``nvme gen-dhchap-key`` writes it, bound to who has it, and the hash to use with it."""
    _, number, text, _ = secret.strip().split(":")
    key, name_of_hash = base64.b64decode(text)[:-4], _HASHES.get(int(number), "sha256")
    if number == "00":
        return key, name_of_hash
    return hmac.digest(key, name.encode() + b"NVMe-over-Fabrics", name_of_hash), name_of_hash


class NotProvedError(Exception):
    """Authentication failed: the target says so, or has not proved what it was asked to."""


class ViolationError(Exception):
    """The target broke a rule of the transport."""


class EndedError(Exception):
    """The connection ended under a command.

    Attributes:
        fes, fei: fatal error status and information of a C2HTermReq; None if there was none.
    """

    def __init__(self, reason: str, fes: int | None = None, fei: int | None = None) -> None:
        super().__init__(reason)
        self.fes = fes
        self.fei = fei


class FailedError(Exception):
    """A command ended with a status other than success; ``status`` is code type and code, as in 0x281."""

    def __init__(self, completion: Completion) -> None:
        super().__init__(f"status {completion.status:#05x}")
        self.completion = completion
        self.status = completion.status


@attrs.frozen
class Completion:
    """How a command ended; ``head`` is None where the SUCCESS flag took the place of a response."""

    cid: int
    status: int = 0
    do_not_retry: bool = False
    result: int = 0
    head: int | None = None
    data: bytes = b""

    def checked(self) -> Completion:
        """Itself.

        Raises:
            FailedError: the command did not succeed.
        """
        if self.status:
            raise FailedError(self)
        return self


@attrs.define
class _Command:
    """A command under way: ``asked`` bytes of ``data`` were asked for, ``arrived`` of ``wanted`` came.

    ``requests`` are the R2Ts not answered yet: tag, offset and length.
    """

    future: asyncio.Future[Completion]
    data: bytes
    wanted: int
    arrived: bytearray = attrs.field(factory=bytearray)
    asked: int = 0
    requests: list[tuple[int, int, int]] = attrs.field(factory=list)
    complete: bool = False


def sgl(length: int, kind: int = SGL_TRANSPORT, *, address: int = 0) -> bytes:
    """A descriptor."""
    return _SGL.pack(address, length, kind)


def entry(
    opcode: int,
    cid: int,
    *,
    nsid: int = 0,
    dptr: bytes = bytes(16),
    cdw: Sequence[int] = (),
    flags: int = PSDT_SGL,
    cdw2: int = 0,
    cdw3: int = 0,
    mptr: int = 0,
) -> bytes:
    """A submission queue entry; ``cdw`` begins with dword 10."""
    return _SQE.pack(opcode, flags, cid, nsid, cdw2, cdw3, mptr, dptr, *cdw, *[0] * (6 - len(cdw)))


def encode(kind: int, header: bytes, data: bytes, digests: Digest, *, flags: int = 0) -> bytes:
    """A PDU: common header, specific header, header digest, data, data digest (section 3.4)."""
    hlen = _COMMON.size + len(header)
    offset = hlen + (4 if digests & Digest.HEADER else 0)
    trailer = struct.pack("<I", crc32c(data)) if data and digests & Digest.DATA else b""
    flags |= (digests & Digest.HEADER) | (Digest.DATA if trailer else 0)
    size = offset + len(data) + len(trailer)
    head = _COMMON.pack(kind, flags, hlen, offset if data else 0, size) + header
    if digests & Digest.HEADER:
        head += struct.pack("<I", crc32c(head))
    return head + data + trailer


def connect_data(
    subsystem: str, *, host: str = HOST_NQN, host_id: bytes = HOST_ID, controller: int = 0xFFFF
) -> bytes:
    """The data of a Connect."""
    return _CONNECT.pack(host_id, controller, subsystem.encode(), host.encode())


class Queue:
    """One connection, and the queue pair on it.

    Attributes:
        digests: those both sides agreed on.
        entries: of the submission queue, from Connect on; one fewer commands are outstanding at most.
        capsule_bytes: data that may travel in a capsule: 8192 on the admin queue, else as Identify tells.
        h2c_bytes: what one H2CData carries at most; lower it to have more of them.
        asked: bytes the target has asked for with R2T; ``answer_r2t`` False leaves them to :meth:`answer`.
        successes: how often the SUCCESS flag took the place of a response.
        spoil_data: changes every H2CData on its way.
        hears: while it is cleared nothing is read.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, maxr2t: int, hpda: int
    ) -> None:
        """A connection that has not said ICReq yet."""
        self._reader = reader
        self._writer = writer
        self._maxr2t = maxr2t
        self._alignment = (hpda + 1) * 4
        self.digests = Digest.NONE
        self.entries = 32
        self.capsule_bytes = 8192
        self.h2c_bytes = 0
        self.asked = 0
        self.answer_r2t = True
        self.successes = 0
        self.flow_control = True
        self.spoil_data: Spoil | None = None
        self.hears = asyncio.Event()
        self.hears.set()
        self._slots = asyncio.Semaphore(31)
        self._commands: dict[int, _Command] = {}
        self._next_cid = 0
        self._reason: Exception | None = None
        self._receiving: asyncio.Task[None] | None = None

    @classmethod
    async def dial(
        cls,
        port: int,
        *,
        digests: Digest = Digest.NONE,
        maxr2t: int = 0,
        hpda: int = 0,
        host: str = "127.0.0.1",
    ) -> Self:
        """A connection whose parameters are agreed (section 3.3)."""
        queue = cls(*await asyncio.open_connection(host, port), maxr2t=maxr2t, hpda=hpda)
        try:
            queue.send_raw(_ICREQ.pack(Pdu.ICREQ, 0, 128, 0, 128, 0, hpda, digests, maxr2t))
            answer = await queue._reader.readexactly(128)
        except (asyncio.IncompleteReadError, OSError) as error:
            await queue.close()
            raise EndedError("no ICResp") from error
        if _COMMON.unpack_from(answer) != (Pdu.ICRESP, 0, 128, 0, 128):
            raise ViolationError(f"not an ICResp: {answer[:8].hex()}")
        pfv, cpda, agreed, queue.h2c_bytes = _ICRESP.unpack_from(answer, 8)
        if pfv or cpda > 31 or agreed & ~digests or any(answer[16:]):
            raise ViolationError(f"ICResp: {answer[:16].hex()}")
        if queue.h2c_bytes < 4096 or queue.h2c_bytes % 4 or cpda:
            raise ViolationError(f"MAXH2CDATA {queue.h2c_bytes}, CPDA {cpda}")
        queue.digests = Digest(agreed)
        queue._receiving = asyncio.create_task(queue._receive())
        return queue

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection, without a word."""
        self._writer.close()
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.wait([self._receiving])
        await asyncio.gather(self._writer.wait_closed(), return_exceptions=True)

    def finish(self) -> None:
        """Says that nothing more will be sent, if the connection is still there."""
        with contextlib.suppress(OSError):
            self._writer.write_eof()

    async def ended(self) -> Exception:
        """Waits for the connection to end; why it did."""
        assert self._receiving is not None
        await asyncio.wait([self._receiving])
        assert self._reason is not None
        return self._reason

    @property
    def outstanding(self) -> int:
        """Commands that have no completion yet."""
        return len(self._commands)

    # --- commands

    def send_raw(self, stream: bytes) -> None:
        """Bytes as they are."""
        self._writer.write(stream)

    def new_cid(self) -> int:
        """An id no command under way has."""
        while True:
            self._next_cid = (self._next_cid + 1) & 0xFFFF
            if self._next_cid not in self._commands:
                return self._next_cid

    def begin(
        self,
        opcode: int,
        *,
        nsid: int = 0,
        cdw: Sequence[int] = (),
        data: bytes = b"",
        wanted: int = 0,
        in_capsule: bool | None = None,
        dptr: bytes | None = None,
        flags: int = PSDT_SGL,
        cid: int | None = None,
        spoil: Spoil | None = None,
        **fields: int,
    ) -> asyncio.Future[Completion]:
        """Sends a command at once, whatever the queue's depth; its completion.

        ``data`` travels in the capsule if it fits (or ``in_capsule`` says so), else as the target asks for it;
        ``wanted`` bytes are expected.  ``dptr`` replaces the descriptor, ``spoil`` changes the PDU on its way.
        """
        cid = self.new_cid() if cid is None else cid
        inside = bool(data) and (len(data) <= self.capsule_bytes if in_capsule is None else in_capsule)
        if dptr is None:
            dptr = sgl(len(data), SGL_OFFSET) if inside else sgl(len(data) or wanted)
        sqe = entry(opcode, cid, nsid=nsid, dptr=dptr, cdw=cdw, flags=flags, **fields)
        pdu = encode(Pdu.COMMAND, sqe, data if inside else b"", self.digests)
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        if self._reason is not None:
            future.set_exception(self._reason)
            return future
        self._commands[cid] = _Command(future, b"" if inside else data, wanted)
        self.send_raw(spoil(pdu) if spoil else pdu)
        return future

    async def ask(self, opcode: int, **options: Any) -> Completion:
        """A command, as soon as the queue has room for it; its completion, whatever it says."""
        async with self._slots:
            future = self.begin(opcode, **options)
            await self._drain()
            return await future

    async def _drain(self) -> None:
        if self._reason is None:
            try:
                await self._writer.drain()
            except OSError:
                return  # the receiver says why

    async def connect(
        self,
        subsystem: str,
        *,
        qid: int = 0,
        entries: int = 32,
        keep_alive_ms: int = 0,
        flow_control: bool = True,
        recfmt: int = 0,
        **data: Any,
    ) -> Completion:
        """Connect: makes the connection a queue; the result has the controller's number."""
        words = (recfmt | qid << 16, (entries - 1) | (0 if flow_control else 1 << 18), keep_alive_ms)
        completion = await self.ask(
            Admin.FABRICS,
            nsid=FCTYPE_CONNECT,
            cdw=words,
            data=connect_data(subsystem, **data),
            in_capsule=True,
        )
        if not completion.status:
            self.entries, self.flow_control = entries, flow_control
            self._slots = asyncio.Semaphore(entries - 1)
        return completion

    async def authenticate(
        self, subsystem: str, host: str, secret: str, controller_secret: str | None = None
    ) -> None:
        """DH-HMAC-CHAP without a group (section 8.13): proves the host, and has the controller prove itself.

        Raises:
            NotProvedError: one of them could not.
        """
        key, name = bound_key(secret, host)
        number = next(each for each, known in _HASHES.items() if known == name)
        ids = bytes([number]).ljust(30, b"\0") + bytes(30)
        await self._tell(struct.pack("<BBHHBB", 0, 0, 0, 1, 0, 1) + bytes([1, 0, 1, 1]) + ids)
        challenge = await self._hear(1)
        (size,) = struct.unpack_from("<6xH", challenge)
        (sequence,) = struct.unpack_from("<12xI", challenge)
        text = challenge[16 : 16 + size] + struct.pack("<IHB", sequence, 1, 0) + b"HostHost"
        proof = hmac.digest(key, text + host.encode() + b"\0" + subsystem.encode(), name)
        nonce, mutual = _NONCE[:size], controller_secret is not None
        head = struct.pack("<BBHHBBBBHI", 1, 2, 0, 1, size, 0, int(mutual), 0, 0, 7)
        await self._tell(head + proof + nonce)
        success = await self._hear(3)
        if controller_secret is None:
            return
        key, _ = bound_key(controller_secret, subsystem)
        text = nonce + struct.pack("<IHB", 7, 1, 0) + b"Controller"
        proof = hmac.digest(key, text + subsystem.encode() + b"\0" + host.encode(), name)
        if success[16 : 16 + size] != proof:
            raise NotProvedError("the controller does not know its secret")
        await self._tell(struct.pack("<BBHH10x", 1, 4, 0, 1))

    async def _tell(self, message: bytes) -> None:
        words = (SECURITY, len(message))
        sent = await self.ask(Admin.FABRICS, nsid=FCTYPE_AUTHENTICATION_SEND, cdw=words, data=message)
        sent.checked()

    async def _hear(self, expected: int) -> bytes:
        """A message of the target."""
        asked = {"nsid": FCTYPE_AUTHENTICATION_RECEIVE, "cdw": (SECURITY, 512), "wanted": 512}
        message = (await self.ask(Admin.FABRICS, **asked)).checked().data
        if message[1] != expected:
            raise NotProvedError(f"message {message[1]:#x} where {expected} was due")
        return message

    # --- PDUs in

    async def _receive(self) -> None:
        try:
            while True:
                await self.hears.wait()
                await self._one()
        except (asyncio.IncompleteReadError, OSError) as error:
            self._stop(EndedError(str(error) or type(error).__name__))
        except (EndedError, ViolationError) as error:
            self._stop(error)
        except asyncio.CancelledError:
            self._stop(EndedError("closed here"))
            raise

    def _stop(self, reason: Exception) -> None:
        self._reason = reason
        self._writer.close()
        commands, self._commands = self._commands, {}
        for command in commands.values():
            if not command.future.done():
                command.future.set_exception(reason)
                command.future.exception()  # not everybody waits for what was never answered

    async def _one(self) -> None:
        common = await self._reader.readexactly(_COMMON.size)
        kind, flags, hlen, pdo, plen = _COMMON.unpack(common)
        if kind not in _FLAGS or hlen != 24 or not hlen <= plen <= PDU_BYTES_MAX:
            raise ViolationError(f"common header {common.hex()}")
        rest = await self._reader.readexactly(plen - _COMMON.size)
        header, rest = rest[:16], rest[16:]
        if kind == Pdu.C2H_TERM:
            fes, fei = struct.unpack_from("<HI", header)
            if not 0 < len(rest) <= 128:
                raise ViolationError(f"a C2HTermReq with {len(rest)} bytes of the PDU in error")
            raise EndedError(f"C2HTermReq: {fes} at {fei}", fes, fei)
        has_data = kind == Pdu.C2H_DATA
        agreed = self.digests if has_data else self.digests & Digest.HEADER
        if flags & ~_FLAGS[Pdu(kind)] or flags & Digest.BOTH != agreed:
            raise ViolationError(f"flags {flags:#04x} of a PDU of type {kind}")
        if self.digests & Digest.HEADER:
            found, rest = rest[:4], rest[4:]
            if found != struct.pack("<I", crc32c(common + header)):
                raise ViolationError("header digest")
        if has_data:
            self._data(flags, header, self._payload(rest, pdo, plen))
        elif rest or pdo:
            raise ViolationError(f"data in a PDU of type {kind}")
        elif kind == Pdu.R2T:
            self._r2t(header)
        else:
            self._response(header)

    def _payload(self, rest: bytes, pdo: int, plen: int) -> bytes:
        """The data of a C2HData: where PDO says, aligned as ICReq asked, its digest checked."""
        begin = pdo - (plen - len(rest))
        if begin < 0 or pdo % self._alignment:
            raise ViolationError(f"data at {pdo}")
        if not self.digests & Digest.DATA:
            return rest[begin:]
        data, found = rest[begin:-4], rest[-4:]
        if found != struct.pack("<I", crc32c(data)):
            raise ViolationError("data digest")
        return data

    def _command(self, cid: int) -> _Command:
        command = self._commands.get(cid)
        if command is None:
            raise ViolationError(f"an answer to command {cid}, which is not under way")
        return command

    def _data(self, flags: int, header: bytes, data: bytes) -> None:
        cid, _, offset, length = _TRANSFER.unpack(header)
        command = self._command(cid)
        if length != len(data) or not length or command.complete:
            raise ViolationError(f"{len(data)} bytes where {length} are announced")
        if offset != len(command.arrived) or offset + length > command.wanted:
            raise ViolationError(f"data {offset}+{length} of {command.wanted}")
        command.arrived += data
        command.complete = bool(flags & LAST)
        if flags & SUCCESS:
            if not flags & LAST or self.flow_control:
                raise ViolationError("SUCCESS without LAST, or with flow control")
            self.successes += 1
            self._finish(cid, Completion(cid, data=bytes(command.arrived)))

    def _r2t(self, header: bytes) -> None:
        cid, tag, offset, length = _TRANSFER.unpack(header)
        command = self._command(cid)
        if not length or offset != command.asked or offset + length > len(command.data):
            raise ViolationError(f"asked for {offset}+{length}, where {command.asked} is next")
        command.asked += length
        command.requests.append((tag, offset, length))
        if len(command.requests) > self._maxr2t + 1:
            raise ViolationError(f"{len(command.requests)} R2Ts of one command under way")
        self.asked += length
        if self.answer_r2t:
            self.answer(cid)

    def answer(self, cid: int) -> None:
        """Sends the data a command was asked for and that was held back."""
        command = self._command(cid)
        requests, command.requests = command.requests, []
        for tag, offset, length in requests:
            for at in range(offset, offset + length, self.h2c_bytes):
                end = min(at + self.h2c_bytes, offset + length)
                fields = _TRANSFER.pack(cid, tag, at, end - at)
                last = LAST if end == offset + length else 0
                pdu = encode(Pdu.H2C_DATA, fields, command.data[at:end], self.digests, flags=last)
                self.send_raw(self.spoil_data(pdu) if self.spoil_data else pdu)

    def _response(self, header: bytes) -> None:
        result, head, sqid, cid, status = _CQE.unpack(header)
        command = self._command(cid)
        if sqid or status & 1:
            raise ViolationError("SQID and the phase tag are reserved in fabrics")
        if head >= self.entries:
            raise ViolationError(f"a queue head of {head}, where there are {self.entries} entries")
        if command.arrived and not command.complete:
            raise ViolationError("no last data before the response")
        code = status >> 1 & 0x7FF
        if not code and len(command.arrived) != command.wanted:
            raise ViolationError(f"success with {len(command.arrived)} of {command.wanted} bytes")
        self._finish(
            cid, Completion(cid, code, bool(status >> 15), result, head, bytes(command.arrived))
        )  # fmt: skip

    def _finish(self, cid: int, completion: Completion) -> None:
        command = self._commands.pop(cid)
        if not command.future.done():
            command.future.set_result(completion)


_FLAGS: Final = {
    Pdu.C2H_TERM: 0,
    Pdu.RESPONSE: Digest.HEADER,
    Pdu.C2H_DATA: Digest.BOTH | LAST | SUCCESS,
    Pdu.R2T: Digest.HEADER,
}
"""What a controller sends after ICResp, and the flags it may have."""


class IoQueue(Queue):
    """An I/O queue: blocks of the namespaces of its controller.  Methods raise FailedError where a command fails."""

    async def io(
        self, opcode: int, nsid: int, lba: int, count: int, *, bits: int = 0, **options: Any
    ) -> bytes:
        """A command with a range of blocks; ``bits`` are those of dword 12 above the count."""
        words = (lba & 0xFFFF_FFFF, lba >> 32, (count - 1) | bits)
        return (await self.ask(opcode, nsid=nsid, cdw=words, **options)).checked().data

    async def read(self, nsid: int, lba: int, count: int, block: int, *, fua: bool = False) -> bytes:
        """Reads blocks."""
        return await self.io(Io.READ, nsid, lba, count, bits=FUA if fua else 0, wanted=count * block)

    async def write(
        self,
        nsid: int,
        lba: int,
        data: bytes,
        block: int,
        *,
        fua: bool = False,
        in_capsule: bool | None = None,
    ) -> None:
        """Writes blocks, in the capsule or by R2T."""
        bits = FUA if fua else 0
        await self.io(Io.WRITE, nsid, lba, len(data) // block, bits=bits, data=data, in_capsule=in_capsule)

    async def compare(self, nsid: int, lba: int, data: bytes, block: int) -> None:
        """Compares blocks with data."""
        await self.io(Io.COMPARE, nsid, lba, len(data) // block, data=data)

    async def write_zeroes(self, nsid: int, lba: int, count: int, *, deallocate: bool = False) -> None:
        """Writes zeros; ``deallocate`` lets the space go."""
        await self.io(Io.WRITE_ZEROES, nsid, lba, count, bits=1 << 25 if deallocate else 0)

    async def verify(self, nsid: int, lba: int, count: int) -> None:
        """Verifies that blocks can be read."""
        await self.io(Io.VERIFY, nsid, lba, count)

    async def flush(self, nsid: int) -> None:
        """Makes everything acknowledged durable."""
        (await self.ask(Io.FLUSH, nsid=nsid)).checked()

    async def deallocate(self, nsid: int, ranges: Sequence[tuple[int, int]]) -> None:
        """Dataset Management with the attribute deallocate; ranges are first block and count."""
        data = b"".join(struct.pack("<IIQ", 0, count, lba) for lba, count in ranges)
        words = (len(ranges) - 1, 1 << 2)
        (await self.ask(Io.DATASET_MANAGEMENT, nsid=nsid, cdw=words, data=data)).checked()

    async def copy(self, nsid: int, ranges: Sequence[tuple[int, int]], target: int) -> None:
        """Copy with format 0: ranges one after the other to ``target``."""
        data = b"".join(struct.pack("<8xQH14x", lba, count - 1) for lba, count in ranges)
        words = (target & 0xFFFF_FFFF, target >> 32, len(ranges) - 1)
        (await self.ask(Io.COPY, nsid=nsid, cdw=words, data=data)).checked()

    async def compare_and_write(
        self, nsid: int, lba: int, expected: bytes, data: bytes, block: int
    ) -> tuple[Completion, Completion]:
        """The fused operation: both halves sent back to back; how each ended."""
        words = (lba & 0xFFFF_FFFF, lba >> 32, len(expected) // block - 1)
        first = self.begin(Io.COMPARE, nsid=nsid, cdw=words, data=expected, flags=PSDT_SGL | FUSED_FIRST)
        second = self.begin(Io.WRITE, nsid=nsid, cdw=words, data=data, flags=PSDT_SGL | FUSED_SECOND)
        return await first, await second

    async def register(self, nsid: int, key: int) -> None:
        """Reservation Register: registers a key."""
        data = struct.pack("<QQ", 0, key)
        (await self.ask(Io.RESERVATION_REGISTER, nsid=nsid, data=data)).checked()

    async def acquire(self, nsid: int, kind: int, key: int, *, preempt: int | None = None) -> None:
        """Reservation Acquire: acquires, or preempts the holder of another key."""
        action = 0 if preempt is None else 1
        data = struct.pack("<QQ", key, preempt or 0)
        (await self.ask(Io.RESERVATION_ACQUIRE, nsid=nsid, cdw=(action | kind << 8,), data=data)).checked()

    async def release(self, nsid: int, kind: int, key: int) -> None:
        """Reservation Release."""
        data = struct.pack("<Q", key)
        (await self.ask(Io.RESERVATION_RELEASE, nsid=nsid, cdw=(kind << 8,), data=data)).checked()

    async def report(self, nsid: int, size: int = 4096) -> bytes:
        """Reservation Report, the extended structure."""
        words = (size // 4 - 1, 1)
        return (await self.ask(Io.RESERVATION_REPORT, nsid=nsid, cdw=words, wanted=size)).checked().data

    async def disconnect(self) -> None:
        """Deletes the queue."""
        (await self.ask(Admin.FABRICS, nsid=FCTYPE_DISCONNECT)).checked()


class AdminQueue(Queue):
    """The admin queue.  Methods raise FailedError where a command fails."""

    async def property(self, offset: int, size: int = 4) -> int:
        """Property Get."""
        words = (int(size == 8), offset)
        return (await self.ask(Admin.FABRICS, nsid=FCTYPE_PROPERTY_GET, cdw=words)).checked().result

    async def set_property(self, offset: int, value: int) -> None:
        """Property Set, of four bytes."""
        (await self.ask(Admin.FABRICS, nsid=FCTYPE_PROPERTY_SET, cdw=(0, offset, value))).checked()

    async def wait_status(self, mask: int, wanted: int) -> None:
        """Polls CSTS, for as long as CAP.TO allows: that is 500 ms each, looked at every 10 ms."""
        looks = (await self.property(CAP, 8) >> 24 & 0xFF) * 50
        for _ in range(looks):
            if await self.property(CSTS) & mask == wanted:
                return
            await asyncio.sleep(0.01)
        raise ViolationError(f"CSTS & {mask:#x} is not {wanted:#x} in the time CAP.TO says")

    async def identify(self, cns: int, *, nsid: int = 0, controller: int = 0, csi: int = 0) -> bytes:
        """Identify."""
        words = (cns | controller << 16, csi << 24)
        return (await self.ask(Admin.IDENTIFY, nsid=nsid, cdw=words, wanted=4096)).checked().data

    async def log(
        self, page: int, size: int, *, offset: int = 0, retain: bool = False, nsid: int = 0
    ) -> bytes:
        """Get Log Page."""
        dwords = size // 4 - 1
        words = (
            page | retain << 15 | (dwords & 0xFFFF) << 16,
            dwords >> 16,
            offset & 0xFFFF_FFFF,
            offset >> 32,
        )
        return (await self.ask(Admin.GET_LOG_PAGE, nsid=nsid, cdw=words, wanted=size)).checked().data

    async def feature(
        self, number: int, *, select: int = 0, nsid: int = 0, wanted: int = 0, value: int = 0
    ) -> Completion:
        """Get Features."""
        words = (number | select << 8, value)
        return (await self.ask(Admin.GET_FEATURES, nsid=nsid, cdw=words, wanted=wanted)).checked()

    async def set_feature(self, number: int, value: int = 0, *, nsid: int = 0, data: bytes = b"") -> int:
        """Set Features; dword 0 of the completion."""
        words = (number, value)
        return (await self.ask(Admin.SET_FEATURES, nsid=nsid, cdw=words, data=data)).checked().result

    async def abort(self, qid: int, cid: int) -> bool:
        """Abort; whether the command was aborted."""
        return not (await self.ask(Admin.ABORT, cdw=(qid | cid << 16,))).checked().result & 1

    async def keep_alive(self) -> None:
        """Keep Alive."""
        (await self.ask(Admin.KEEP_ALIVE)).checked()

    def event(self) -> asyncio.Future[Completion]:
        """Asynchronous Event Request."""
        return self.begin(Admin.ASYNC_EVENT_REQUEST)


@attrs.define
class Host:
    """A controller as a host has it: the admin queue and the I/O queues, made as Linux makes them."""

    port: int
    subsystem: str
    admin: AdminQueue
    number: int
    options: dict[str, Any]
    identity: dict[str, Any]
    secrets: tuple[str, str | None] | None = None
    queues: list[IoQueue] = attrs.field(factory=list)

    @classmethod
    async def connect(
        cls,
        port: int,
        subsystem: str,
        *,
        queues: int = 1,
        entries: int = 128,
        keep_alive_ms: int = 0,
        host: str = HOST_NQN,
        host_id: bytes = HOST_ID,
        flow_control: bool = True,
        secrets: tuple[str, str | None] | None = None,
        **options: Any,
    ) -> Host:
        """Connects, enables the controller, agrees on queues, and connects them.

        ``secrets`` are the host's and, if it has to prove itself, the controller's.
        """
        admin = await AdminQueue.dial(port, **options)
        identity: dict[str, Any] = {"host": host, "host_id": host_id}
        try:
            answer = await admin.connect(subsystem, keep_alive_ms=keep_alive_ms, **identity)
            self = cls(port, subsystem, admin, answer.checked().result & 0xFFFF, options, identity, secrets)
            await self._prove(admin, answer)
            await admin.set_property(CC, CC_ENABLE)
            await admin.wait_status(1, 1)
        except BaseException:
            await admin.close()
            raise
        try:
            if queues:
                await self._connect_queues(queues, entries, flow_control=flow_control)
        except BaseException:
            await self.close()
            raise
        return self

    async def _connect_queues(self, queues: int, entries: int, *, flow_control: bool) -> None:
        capsule_units = struct.unpack_from("<I", await self.admin.identify(1), 1792)[0]
        agreed = await self.admin.set_feature(0x07, (queues - 1) | (queues - 1) << 16)
        if min(agreed & 0xFFFF, agreed >> 16) + 1 < queues:
            raise ViolationError(f"{agreed:#x} queues where {queues} were asked for")
        for qid in range(1, queues + 1):
            queue = await IoQueue.dial(self.port, **self.options)
            self.queues.append(queue)
            queue.capsule_bytes = capsule_units * 16 - 64
            answer = await queue.connect(
                self.subsystem,
                qid=qid,
                entries=entries,
                controller=self.number,
                flow_control=flow_control,
                **self.identity,
            )
            await self._prove(queue, answer.checked())

    async def _prove(self, queue: Queue, connected: Completion) -> None:
        """Authenticates a queue if the target wants that and there are secrets."""
        if connected.result & AUTHENTICATION_REQUIRED and self.secrets is not None:
            await queue.authenticate(self.subsystem, self.identity["host"], *self.secrets)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def shut_down(self) -> None:
        """A normal shutdown, waited for, then the end of every connection."""
        await self.admin.set_property(CC, CC_SHUTDOWN)
        await self.admin.wait_status(0b1100, 0b1000)
        await self.close()

    async def close(self) -> None:
        """The end of every connection, without a word."""
        for queue in [*self.queues, self.admin]:
            await queue.close()


_T = TypeVar("_T")


async def status_of(awaitable: Awaitable[_T]) -> int:
    """The status a command ends with; 0 is success."""
    try:
        await awaitable
    except FailedError as failed:
        return failed.status
    return 0
