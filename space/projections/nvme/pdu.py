"""NVMe/TCP PDUs as bytes: layouts, limits, digests (NVM Express TCP Transport Specification 1.0, section 3).

::

    ┌ CH: type flags hlen pdo plen ┬ PSH (to hlen) ┬ HDGST? ┬ PAD? (to pdo) ┬ DATA ┬ DDGST? ┐
    └ 8 bytes                      ┴               ┴ 4      ┴ 0…127         ┴      ┴ 4      ┘  plen bytes in all

Only what a controller does is here: host PDUs are decoded, controller PDUs encoded.  Little-endian throughout.
A PDU that breaks the rules is a :class:`FatalError`: it says which field of the header is wrong, and ends the
connection.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable
from typing import Any, Final

from crc32c import crc32c

from space._errors import SpaceError, Status
from space.events.commands import Buffer

HEADER: Final = struct.Struct("<BBBBI")
"""Common header: type, flags, hlen, pdo, plen."""
IC: Final = struct.Struct("<BBBBI HBBI112x")
"""ICReq (pfv, hpda, dgst, maxr2t) and ICResp (pfv, cpda, dgst, maxh2cdata)."""
CAPSULE: Final = struct.Struct("<8xBBHIIIQQI3xB6I")
"""CapsuleCmd behind its common header: a submission queue entry (Base Specification 2.0, figure 87) with an SGL."""
RESPONSE: Final = struct.Struct("<BBBBI QHHHH")
"""CapsuleResp: a completion queue entry: result (dwords 0 and 1), sqhd, sqid, cid, status with the phase bit."""
DATA: Final = struct.Struct("<BBBBI HHII4x")
"""H2CData and C2HData (cccid, ttag, datao, datal) and R2T (cccid, ttag, r2to, r2tl)."""
TERM: Final = struct.Struct("<BBBBI HI10x")
"""H2CTermReq and C2HTermReq: fes, fei."""
DIGEST: Final = struct.Struct("<I")

IC_BYTES: Final = 128
CAPSULE_BYTES: Final = 72
RESPONSE_BYTES: Final = 24
DATA_BYTES: Final = 24
TERM_BYTES: Final = 24
DIGEST_BYTES: Final = 4

for _layout, _size in (
    (HEADER, 8),
    (IC, IC_BYTES),
    (CAPSULE, CAPSULE_BYTES),
    (RESPONSE, RESPONSE_BYTES),
    (DATA, DATA_BYTES),
    (TERM, TERM_BYTES),
):
    assert _layout.size == _size

TERM_DATA_BYTES_MAX: Final = 128
"""Of the PDU in error, at most its header travels back (section 3.6.2.4)."""
PAD_BYTES_MAX: Final = 128
"""The largest alignment a host may ask for: HPDA is 5 bits of dwords."""


class PduType(enum.IntEnum):
    """PDU types (section 3.6.1)."""

    ICREQ = 0x00
    ICRESP = 0x01
    H2C_TERM = 0x02
    C2H_TERM = 0x03
    CAPSULE_CMD = 0x04
    CAPSULE_RESP = 0x05
    H2C_DATA = 0x06
    C2H_DATA = 0x07
    R2T = 0x09


HDGSTF: Final = 1
"""A header digest follows the header."""
DDGSTF: Final = 2
"""A data digest follows the data."""
LAST_PDU: Final = 4
"""The last data PDU of the range (H2CData) or of the command (C2HData)."""
SUCCESS: Final = 8
"""No CapsuleResp follows: the command succeeded (only where flow control of the submission queue is off)."""


class Fes(enum.IntEnum):
    """Fatal Error Status of a TermReq (section 3.6.2.4)."""

    INVALID_HEADER_FIELD = 1
    SEQUENCE_ERROR = 2
    HEADER_DIGEST_ERROR = 3
    DATA_OUT_OF_RANGE = 4
    DATA_LIMIT_EXCEEDED = 5
    UNSUPPORTED_PARAMETER = 6


class FatalError(SpaceError):
    """The host broke the transport's rules; the connection is terminated.

    Attributes:
        fes: which rule.
        fei: offset of the field in error, or the header digest that came (Fatal Error Information).
        header: the header of the PDU in error, as far as it came.
    """

    default_status = Status.INVALID

    def __init__(self, fes: Fes, fei: int, text: str, header: bytes = b"") -> None:
        super().__init__(text)
        self.fes = fes
        self.fei = fei
        self.header = header


class Command:
    """A submission queue entry, and what the transport knows of its data.

    Attributes:
        sgl_length: bytes the host offers to send or to take.
        data: what the host sent; None while there is none (yet).
        fetched: its data was asked for with R2T.
        handler: what will carry it out, once that is known.
        damaged: its data came with a wrong digest, which is an error of the command only (section 3.3.2).
    """

    __slots__ = (
        "cdw2",
        "cdw3",
        "cdw10",
        "cdw11",
        "cdw12",
        "cdw13",
        "cdw14",
        "cdw15",
        "cid",
        "damaged",
        "data",
        "fetched",
        "flags",
        "handler",
        "mptr",
        "nsid",
        "opcode",
        "sgl_address",
        "sgl_length",
        "sgl_type",
    )

    def __init__(
        self,
        opcode: int,
        flags: int,
        cid: int,
        nsid: int,
        cdw2: int = 0,
        cdw3: int = 0,
        mptr: int = 0,
        sgl_address: int = 0,
        sgl_length: int = 0,
        sgl_type: int = 0,
        cdw10: int = 0,
        cdw11: int = 0,
        cdw12: int = 0,
        cdw13: int = 0,
        cdw14: int = 0,
        cdw15: int = 0,
    ) -> None:
        """Fields in the order of the entry."""
        self.opcode = opcode
        self.flags = flags
        self.cid = cid
        self.nsid = nsid
        self.cdw2 = cdw2
        self.cdw3 = cdw3
        self.mptr = mptr
        self.sgl_address = sgl_address
        self.sgl_length = sgl_length
        self.sgl_type = sgl_type
        self.cdw10 = cdw10
        self.cdw11 = cdw11
        self.cdw12 = cdw12
        self.cdw13 = cdw13
        self.cdw14 = cdw14
        self.cdw15 = cdw15
        self.data: Buffer | None = None
        self.damaged = False
        self.fetched = False
        self.handler: Any = None

    @property
    def sends(self) -> bool:
        """Whether its data, if any, goes to the controller: bit 0 of the opcode, or of a fabrics command's type."""
        return bool((self.nsid if self.opcode == FABRICS else self.opcode) & 1)

    def __repr__(self) -> str:
        return f"<command opcode={self.opcode:#04x} cid={self.cid} nsid={self.nsid:#x}>"


FABRICS: Final = 0x7F
"""Opcode of all fabrics commands; their type is in byte 4."""

SGL_IN_CAPSULE: Final = 0x01
"""Data block descriptor, its address an offset in the capsule."""
SGL_TRANSPORT: Final = 0x5A
"""Transport data block descriptor: the data travels in data PDUs."""


def digest(buffers: Iterable[Buffer]) -> int:
    """CRC32C of buffers one after the other (section 3.3)."""
    value = 0
    for buffer in buffers:
        value = crc32c(buffer, value)
    return value


def encode_icresp(*, cpda: int, digests: int, maxh2cdata: int) -> bytes:
    """The answer to an ICReq; it never has digests of its own."""
    return IC.pack(PduType.ICRESP, 0, IC_BYTES, 0, IC_BYTES, 0, cpda, digests, maxh2cdata)


def encode_term(fes: Fes, fei: int, header: bytes) -> bytes:
    """C2HTermReq: why the connection ends, and the header that was wrong; it never has digests."""
    header = header[:TERM_DATA_BYTES_MAX]
    size = TERM_BYTES + len(header)
    return TERM.pack(PduType.C2H_TERM, 0, TERM_BYTES, 0, size, fes, fei & 0xFFFF_FFFF) + header


def with_digest(header: bytes) -> bytes:
    """A header and its digest."""
    return header + DIGEST.pack(crc32c(header))
