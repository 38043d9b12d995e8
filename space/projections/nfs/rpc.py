"""Remote procedure calls over a byte stream (RFC 5531): records, calls, replies and credentials; no I/O.

Both directions use one connection: the client's calls and our replies, our calls of its back channel and its replies.
Bytes that are no record or no message end the connection; a message that is one, but asks for what there is not, gets
the reply RFC 5531 §9 has for it.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

import attrs

from space._errors import UsageError
from space.projections.nfs.nfs4 import PROGRAM, VERSION
from space.projections.nfs.xdr import Bytes, Reader, XdrError

RECORD_BYTES_MAX: Final = (1 << 20) + (64 << 10)
"""A WRITE of 1 MiB with everything around it; nothing larger is offered (ca_maxrequestsize) or taken."""

FRAGMENTS_MAX: Final = 4096
"""Of one record: enough for pieces of 512 bytes, and an end to pieces of none."""

AUTH_BYTES_MAX: Final = 400  # RFC 5531 §8.2
MACHINE_BYTES_MAX: Final = 255
GROUPS_MAX: Final = 16
NOBODY: Final = 65534

_LAST_FRAGMENT: Final = 0x80000000
_CALL, _REPLY = 0, 1
_RPC_VERSION: Final = 2
_U32: Final = struct.Struct(">I")
_TWO: Final = struct.Struct(">II")
_SIX: Final = struct.Struct(">6I")

AUTH_NONE: Final = 0
AUTH_SYS: Final = 1

# accept_stat and auth_stat (RFC 5531 §9)
SUCCESS, PROG_UNAVAIL, PROG_MISMATCH, PROC_UNAVAIL, GARBAGE_ARGS, SYSTEM_ERR = range(6)
AUTH_BADCRED: Final = 1
AUTH_BADVERF: Final = 3


class RecordError(UsageError):
    """The bytes of a peer are no records, or none of a size we take: the connection ends."""


class Records:
    """Bytes in, whole records out.

    It never holds more than one incomplete record and what arrived with it.
    """

    def __init__(self, limit: int = RECORD_BYTES_MAX) -> None:
        """Takes records of at most ``limit`` bytes."""
        self._limit = limit
        self._data: bytes = b""
        self._at = 0
        self._header = b""  # as much of it as has arrived
        self._missing = 0  # bytes of the fragment
        self._last = False  # it is the last one
        self._record: bytearray | None = None  # what has arrived of a record that was not there at once
        self._fragments = 0

    def feed(self, data: bytes) -> None:
        """Bytes arrived; what :meth:`next` has left over stays in front of them."""
        self._data = self._data[self._at :] + data if self._at < len(self._data) else data
        self._at = 0

    @property
    def partial(self) -> bool:
        """Whether a record has begun and not ended."""
        return bool(self._missing or self._record or self._header or self._at < len(self._data))

    @property
    def held(self) -> int:
        """Bytes kept of an incomplete record."""
        return len(self._record or b"")

    def next(self) -> Bytes | None:
        """The next record, or None until more bytes arrive.

        Raises:
            RecordError: it is larger than the limit.
        """
        while self._missing or self._begin():
            start, end = self._at, min(self._at + self._missing, len(self._data))
            self._at = end
            self._missing -= end - start
            if self._record is None:
                if self._last and not self._missing:
                    self._fragments = 0
                    return memoryview(self._data)[start:end]
                self._record = bytearray()
            self._record += memoryview(self._data)[start:end]
            if self._missing:
                return None
            if self._last:
                record, self._record, self._fragments = self._record, None, 0
                return record
        return None

    def _begin(self) -> bool:
        """Takes headers until there is a fragment with something in it."""
        while True:
            taken = self._data[self._at : self._at + 4 - len(self._header)]
            self._at += len(taken)
            self._header += taken
            if len(self._header) < 4:
                return False
            (header,) = _U32.unpack(self._header)
            self._header = b""
            self._last = bool(header & _LAST_FRAGMENT)
            self._missing = header & ~_LAST_FRAGMENT
            self._fragments += 1
            size = self._missing + (len(self._record) if self._record is not None else 0)
            if size > self._limit or self._fragments > FRAGMENTS_MAX:
                raise RecordError(
                    f"a record of {size} bytes in {self._fragments} pieces",
                    hint=f"{self._limit} bytes in {FRAGMENTS_MAX} pieces are the most",
                )
            if self._missing:
                return True
            if self._last:
                raise RecordError("a record that ends in an empty piece")


@attrs.frozen
class Credentials:
    """Who calls, as AUTH_SYS says (RFC 5531 §8.2 and appendix A); AUTH_NONE is nobody."""

    uid: int = NOBODY
    gid: int = NOBODY
    gids: tuple[int, ...] = ()
    machine: str = ""
    flavor: int = AUTH_NONE


@attrs.frozen
class Call:
    """A call to our program; ``arguments`` stands before what its procedure takes."""

    xid: int
    procedure: int
    credentials: Credentials
    arguments: Reader


@attrs.frozen
class Reply:
    """The answer to a call of ours: ``accepted`` is SUCCESS, or why not; ``results`` stands before the results."""

    xid: int
    accepted: bool
    results: Reader


@attrs.frozen
class Refused:
    """A call that is answered without looking at its arguments."""

    reply: bytes


def message(record: Bytes) -> Call | Reply | Refused:
    """What a record says.

    Raises:
        RecordError: it is no message, so nothing can be answered.
    """
    reader = Reader(record)
    try:
        xid, kind = reader.unpack(_TWO)
        if kind == _REPLY:
            return _reply(xid, reader)
    except XdrError as error:
        raise RecordError(f"not a message: {error}") from None
    if kind != _CALL:
        raise RecordError(f"neither a call nor a reply but {kind}")
    try:
        return _call(xid, reader)
    except XdrError:
        return Refused(_accepted(xid, GARBAGE_ARGS))


def _call(xid: int, reader: Reader) -> Call | Refused:
    rpc_version, program, version, procedure, flavor, length = reader.unpack(_SIX)
    if rpc_version != _RPC_VERSION:
        return Refused(_SIX.pack(xid, _REPLY, 1, 0, _RPC_VERSION, _RPC_VERSION))
    if length > AUTH_BYTES_MAX:
        raise XdrError(f"credentials of {length} bytes")
    body = reader.view(length)
    verifier_flavor, length = reader.unpack(_TWO)
    if program != PROGRAM:
        return Refused(_accepted(xid, PROG_UNAVAIL))
    if version != VERSION:
        return Refused(_accepted(xid, PROG_MISMATCH) + struct.pack(">II", VERSION, VERSION))
    if procedure > 1:
        return Refused(_accepted(xid, PROC_UNAVAIL))
    try:
        credentials = _credentials(flavor, body)
    except XdrError:
        return Refused(_denied(xid, AUTH_BADCRED))
    if verifier_flavor != AUTH_NONE or length:
        return Refused(_denied(xid, AUTH_BADVERF))
    return Call(xid, procedure, credentials, reader)


_known: dict[bytes, Credentials] = {}
_KNOWN_MAX: Final = 256  # credentials repeat with every call of a process


def _credentials(flavor: int, body: memoryview) -> Credentials:
    if flavor == AUTH_NONE:
        return _NOBODY
    if flavor != AUTH_SYS:
        raise XdrError(f"credentials of flavor {flavor}")
    key = bytes(body[4:])  # the stamp differs from mount to mount and means nothing
    found = _known.get(key)
    if found is None:
        reader = Reader(key)
        machine = reader.opaque(MACHINE_BYTES_MAX).decode("utf-8", "replace")
        uid, gid = reader.u32(), reader.u32()
        gids = tuple(reader.u32() for _ in range(reader.count(GROUPS_MAX)))
        if reader.left:
            raise XdrError("credentials with something behind them")
        if len(_known) >= _KNOWN_MAX:
            _known.clear()
        found = _known[key] = Credentials(uid, gid, gids, machine, AUTH_SYS)
    return found


_NOBODY: Final = Credentials()


def _reply(xid: int, reader: Reader) -> Reply:
    if reader.u32() != 0:  # MSG_DENIED
        return Reply(xid, accepted=False, results=reader)
    reader.u32()
    reader.opaque_view(AUTH_BYTES_MAX)
    return Reply(xid, accepted=reader.u32() == SUCCESS, results=reader)


def _accepted(xid: int, status: int) -> bytes:
    return _SIX.pack(xid, _REPLY, 0, AUTH_NONE, 0, status)


def _denied(xid: int, why: int) -> bytes:
    return struct.pack(">5I", xid, _REPLY, 1, 1, why)


def success(xid: int) -> bytes:
    """Header of the reply to a call that was carried out; its results follow."""
    return _accepted(xid, SUCCESS)


def garbage(xid: int) -> bytes:
    """Reply to a call whose arguments cannot be read."""
    return _accepted(xid, GARBAGE_ARGS)


def call(xid: int, program: int, version: int, procedure: int, credentials: bytes) -> bytes:
    """Header of a call of ours; ``credentials`` are the body of AUTH_SYS, or empty for AUTH_NONE."""
    head = _SIX.pack(xid, _CALL, _RPC_VERSION, program, version, procedure)
    flavor = AUTH_SYS if credentials else AUTH_NONE
    return head + struct.pack(">II", flavor, len(credentials)) + credentials + bytes(8)


def framed(pieces: list[Bytes]) -> list[Bytes]:
    """A record of one fragment."""
    return [_U32.pack(_LAST_FRAGMENT | sum(map(len, pieces))), *pieces]


def fingerprint(arguments: Bytes) -> int:
    """What tells one request from another in a slot: its length, and a checksum of its beginning."""
    return len(arguments) << 32 | zlib.crc32(arguments[:FINGERPRINT_BYTES])


FINGERPRINT_BYTES: Final = 512
"""Two requests of a client that differ later than here differ in the bytes they write."""
