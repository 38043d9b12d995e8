"""One NVMe/TCP connection, the controller's side, without I/O: bytes in, commands out, bytes to send.

Whoever owns it reads into :meth:`Connection.get_buffer`, says :meth:`Connection.received`, and takes commands
from :meth:`Connection.next_command` until there is none.  A command whose data does not travel in its capsule comes
twice: when it arrives, and, after :meth:`Connection.fetch`, when its data is there.  So it is the owner who decides
how much memory data under way may take; commands not fetched cost a few hundred bytes.

What is held here is bounded: one staging buffer, one capsule's data, and what was fetched.  Data of more than one
staging buffer is received where it belongs, without a copy.

::

    new ──ICReq──▶ ready ──────────────────────────▶ ended
     └── anything else ──▶ C2HTermReq ──▶ ended       ▲ C2HTermReq sent, or H2CTermReq received
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs
from crc32c import crc32c

from space.events.commands import Buffer
from space.projections.nvme import pdu
from space.projections.nvme.pdu import (
    CAPSULE_BYTES,
    DATA_BYTES,
    DDGSTF,
    DIGEST,
    DIGEST_BYTES,
    HDGSTF,
    IC_BYTES,
    LAST_PDU,
    PAD_BYTES_MAX,
    RESPONSE_BYTES,
    SGL_IN_CAPSULE,
    SUCCESS,
    TERM_BYTES,
    TERM_DATA_BYTES_MAX,
    Command,
    FatalError,
    Fes,
    PduType,
)

ADMIN_CAPSULE_DATA_BYTES: Final = 8192
"""In-capsule data of admin and fabrics commands is fixed by the transport (section 3.4.1.1)."""
STAGING_BYTES: Final = 16 << 10
"""Of a connection that has not said yet what it is: a stranger costs no more."""
STAGING_BYTES_IO: Final = 64 << 10
"""Of an I/O queue: many commands in one read."""
TRANSFERS_MAX: Final = 0xFFFF
"""Transfer tags are 16 bits."""


@attrs.frozen
class Limits:
    """What a controller takes; sizes in bytes.

    Attributes:
        transfer_bytes: the largest transfer of a command (MDTS): a power of two times 4 KiB.
        capsule_bytes: the largest in-capsule data of an I/O command; it saves the round trip of an R2T.
        h2c_bytes: the largest data of one H2CData (MAXH2CDATA).
        r2t_bytes: asked for with one R2T.
        r2ts: under way for one command, if the host allows that many (MAXR2T).
        header_digest, data_digest: whether a host may have them.
    """

    transfer_bytes: int = 1 << 20
    capsule_bytes: int = 64 << 10
    h2c_bytes: int = 1 << 20
    r2t_bytes: int = 1 << 20
    r2ts: int = 4
    header_digest: bool = True
    data_digest: bool = True


@attrs.define
class _Transfer:
    """Data of a command that comes in H2CData: ``asked`` bytes were asked for, up to ``arrived`` they are here."""

    command: Command
    buffer: bytearray
    asked: int = 0
    arrived: int = 0


@attrs.define
class _Range:
    """One R2T: its data comes in order, up to ``end``."""

    transfer: _Transfer
    next: int
    end: int


@attrs.define
class _Body:
    """Data of a PDU whose header was read: ``target`` is filled first, then a digest may follow."""

    command: Command
    target: memoryview
    filled: int
    digest: bool
    range: _Range | None
    tag: int


class Connection:
    """The transport's state of one connection.

    Attributes:
        ready: parameters are agreed.
        ended: nothing more is to be read; what is in the output may still be sent.
        capsule_bytes: in-capsule data taken now; the owner raises it once the queue is known.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.ready = False
        self.ended = False
        self.capsule_bytes = ADMIN_CAPSULE_DATA_BYTES
        self.out_bytes = 0
        self._out: list[Buffer] = []
        self._staging = bytearray(STAGING_BYTES)
        self._view = memoryview(self._staging)
        self._start = self._end = 0
        self._body: _Body | None = None
        self._ranges: dict[int, _Range] = {}
        self._last_tag = 0
        self._hdgst = self._ddgst = False
        self._c2h_pad = b""
        self._r2ts = 1

    # --- bytes in

    def use_io_buffers(self) -> None:
        """The connection is an I/O queue: larger capsules, and more of them at a time."""
        self.capsule_bytes = self.limits.capsule_bytes
        staged = bytes(self._view[self._start : self._end])
        self._staging = bytearray(STAGING_BYTES_IO)
        self._view = memoryview(self._staging)
        self._view[: len(staged)] = staged
        self._start, self._end = 0, len(staged)

    def get_buffer(self) -> memoryview:
        """Where the next bytes go; never empty if :meth:`next_command` was asked until it said None."""
        if self._start == self._end:
            self._start = self._end = 0
            if self._body is not None and self._body.filled < len(self._body.target):
                return self._body.target[self._body.filled :]
        elif self._start:
            staged = self._staging[self._start : self._end]
            self._view[: len(staged)] = staged
            self._start, self._end = 0, len(staged)
        return self._view[self._end :]

    def received(self, count: int) -> None:
        """So many bytes were put there."""
        if self._start == self._end and self._body is not None and self._body.filled < len(self._body.target):
            self._body.filled += count
        else:
            self._end += count

    @property
    def waiting(self) -> bool:
        """Whether the host owes data it was asked for, or the rest of a PDU."""
        return bool(self._ranges) or self._body is not None or self._start != self._end

    def next_command(self) -> Command | None:
        """A command that arrived, or whose data did; None: more bytes are needed, or none will be read any more.

        Raises:
            FatalError: the host broke the rules; a C2HTermReq is in the output, and the connection has ended.
        """
        if self.ended:
            return None
        try:
            return self._next()
        except FatalError as error:
            self.ended = True
            self._body = None
            self._ranges.clear()
            self._put(pdu.encode_term(error.fes, error.fei, error.header))
            raise

    def _next(self) -> Command | None:
        while not self.ended:
            if self._body is not None:
                if not self._fill(self._body):
                    return None
                command = self._finish(self._body)
            else:
                start = self._start
                have = self._end - start
                if have < 8:
                    return None
                kind, flags, hlen, pdo, plen = pdu.HEADER.unpack_from(self._staging, start)
                if kind != _CAPSULE_CMD or hlen != CAPSULE_BYTES or plen < CAPSULE_BYTES or not self.ready:
                    self._check_kind(kind, hlen, plen)
                need = hlen + DIGEST_BYTES if self._hdgst and kind in _DIGESTED else hlen
                if have < need:
                    return None
                if self._hdgst and kind in _DIGESTED:
                    self._check_header_digest(start, flags, hlen)
                elif flags & HDGSTF:
                    raise self._invalid(1, "a header digest that was not agreed")
                if kind == _CAPSULE_CMD:
                    if plen == need:
                        command = Command(*pdu.CAPSULE.unpack_from(self._staging, start))
                        self._start = start + need
                        return command
                    if have < pdo:
                        return None
                    command = self._capsule(start, flags, need, pdo, plen)
                elif kind == PduType.H2C_DATA:
                    if have < pdo:
                        return None
                    command = self._h2c_data(start, flags, need, pdo, plen)
                elif kind == PduType.ICREQ:
                    self._icreq(start, flags)
                    continue
                else:
                    self.ended = True  # H2CTermReq: the host has gone; there is nothing to answer
                    return None
            if command is not None:
                return command
        return None

    def _invalid(self, fei: int, text: str) -> FatalError:
        return self._fatal(Fes.INVALID_HEADER_FIELD, fei, text)

    def _fatal(self, fes: Fes, fei: int, text: str) -> FatalError:
        length = min(self._staging[self._start + 2], self._end - self._start, TERM_DATA_BYTES_MAX)
        return FatalError(fes, fei, text, bytes(self._view[self._start : self._start + max(length, 8)]))

    def _check_kind(self, kind: int, hlen: int, plen: int) -> None:
        expected = _HLEN.get(kind)
        if expected is None:
            raise self._invalid(0, f"a PDU of type {kind:#04x} from a host")
        if hlen != expected:
            raise self._invalid(2, f"a header of {hlen} bytes in a PDU of type {kind:#04x}")
        if self.ready == (kind == PduType.ICREQ) and kind != PduType.H2C_TERM:
            raise self._fatal(Fes.SEQUENCE_ERROR, 0, f"a PDU of type {kind:#04x} at this point")
        if (
            plen < hlen
            or (kind in _FIXED and plen != hlen)
            or (kind == PduType.H2C_TERM and plen > _TERM_MAX)
        ):
            raise self._invalid(4, f"a length of {plen} bytes in a PDU of type {kind:#04x}")

    def _check_header_digest(self, start: int, flags: int, hlen: int) -> None:
        if not flags & HDGSTF:
            raise self._invalid(1, "no header digest, though agreed")
        (found,) = DIGEST.unpack_from(self._staging, start + hlen)
        if crc32c(self._view[start : start + hlen]) != found:
            raise self._fatal(Fes.HEADER_DIGEST_ERROR, found, "a wrong header digest")

    def _icreq(self, start: int, flags: int) -> None:
        *_, pfv, hpda, digests, maxr2t = pdu.IC.unpack_from(self._staging, start)
        if pfv:
            raise self._fatal(Fes.UNSUPPORTED_PARAMETER, 8, f"PDU format version {pfv}")
        if hpda > 31:
            raise self._invalid(10, f"a data alignment of {hpda}")
        self._start = start + IC_BYTES
        self._hdgst = bool(digests & 1) and self.limits.header_digest
        self._ddgst = bool(digests & 2) and self.limits.data_digest
        self._r2ts = min(maxr2t + 1, self.limits.r2ts)
        head = DATA_BYTES + (DIGEST_BYTES if self._hdgst else 0)
        self._c2h_pad = bytes(-head % ((hpda + 1) * 4))
        agreed = self._hdgst | self._ddgst << 1
        self._put(pdu.encode_icresp(cpda=0, digests=agreed, maxh2cdata=self.limits.h2c_bytes))
        self.ready = True

    def _data_length(self, flags: int, need: int, pdo: int, plen: int) -> tuple[int, bool]:
        """How much data a PDU has, and whether a digest follows it."""
        if pdo < need or pdo % 4 or pdo > need + PAD_BYTES_MAX:
            raise self._invalid(3, f"a data offset of {pdo}")
        has_digest = bool(flags & DDGSTF)
        if has_digest != self._ddgst:
            raise self._invalid(1, "a data digest that was not agreed, or none though agreed")
        length = plen - pdo - (DIGEST_BYTES if has_digest else 0)
        if length <= 0:
            raise self._invalid(4, f"a length of {plen} bytes, with data at {pdo}")
        return length, has_digest

    def _capsule(self, start: int, flags: int, need: int, pdo: int, plen: int) -> Command | None:
        length, has_digest = self._data_length(flags, need, pdo, plen)
        if length > self.capsule_bytes:
            raise self._fatal(Fes.DATA_LIMIT_EXCEEDED, 4, f"{length} bytes of data in a capsule")
        command = Command(*pdu.CAPSULE.unpack_from(self._staging, start))
        if command.sgl_type != SGL_IN_CAPSULE:
            raise self._invalid(4, "data in a capsule whose command has its data elsewhere")
        begin = start + pdo
        if self._end - begin >= length and not has_digest:
            command.data = bytes(self._view[begin : begin + length])
            self._start = begin + length
            return command
        self._start = begin
        self._body = _Body(command, memoryview(bytearray(length)), 0, has_digest, None, 0)
        return None

    def _h2c_data(self, start: int, flags: int, need: int, pdo: int, plen: int) -> Command | None:
        *_, cid, tag, offset, length = pdu.DATA.unpack_from(self._staging, start)
        size, has_digest = self._data_length(flags, need, pdo, plen)
        found = self._ranges.get(tag)
        if found is None:
            raise self._invalid(10, f"data for transfer tag {tag}, which nobody asked for")
        if found.transfer.command.cid != cid:
            raise self._invalid(8, f"data for command {cid} under the transfer tag of another")
        if size != length:
            raise self._invalid(4, f"{size} bytes in a PDU that announces {length}")
        if length > self.limits.h2c_bytes:
            raise self._fatal(Fes.DATA_LIMIT_EXCEEDED, 16, f"{length} bytes in one H2CData")
        if offset + length > found.end:
            raise self._fatal(Fes.DATA_OUT_OF_RANGE, 12, "data beyond what was asked for")
        if offset != found.next:
            raise self._fatal(Fes.SEQUENCE_ERROR, 12, f"data at {offset}, where {found.next} was next")
        if bool(flags & LAST_PDU) != (offset + length == found.end):
            raise self._invalid(1, "the last data is not marked as last, or other data is")
        target = memoryview(found.transfer.buffer)[offset : offset + length]
        self._start = start + pdo
        self._body = _Body(found.transfer.command, target, 0, has_digest, found, tag)
        return None

    def _fill(self, body: _Body) -> bool:
        """Moves staged bytes to where they belong; whether the data and its digest are all there."""
        lacking = len(body.target) - body.filled
        if lacking:
            count = min(lacking, self._end - self._start)
            body.target[body.filled : body.filled + count] = self._view[self._start : self._start + count]
            body.filled += count
            self._start += count
            if count < lacking:
                return False
        return not body.digest or self._end - self._start >= DIGEST_BYTES

    def _finish(self, body: _Body) -> Command | None:
        self._body = None
        if body.digest:
            (found,) = DIGEST.unpack_from(self._staging, self._start)
            self._start += DIGEST_BYTES
            if crc32c(body.target) != found:
                body.command.damaged = True
        if body.range is None:
            body.command.data = body.target
            return body.command
        return self._arrived(body.range, body.tag, len(body.target))

    def _arrived(self, found: _Range, tag: int, count: int) -> Command | None:
        transfer = found.transfer
        found.next += count
        transfer.arrived += count
        if found.next == found.end:
            del self._ranges[tag]
            self._ask(transfer)
        if transfer.arrived < len(transfer.buffer):
            return None
        transfer.command.data = transfer.buffer
        return transfer.command

    # --- bytes out

    def fetch(self, command: Command) -> None:
        """Asks the host for the data of a command; its ``sgl_length`` has been checked by whoever asks."""
        transfer = _Transfer(command, bytearray(command.sgl_length))
        for _ in range(self._r2ts):
            self._ask(transfer)

    def _ask(self, transfer: _Transfer) -> None:
        """The next R2T of a transfer, if anything is left to ask for."""
        length = min(self.limits.r2t_bytes, len(transfer.buffer) - transfer.asked)
        if not length:
            return
        tag = self._free_tag()
        self._ranges[tag] = _Range(transfer, transfer.asked, transfer.asked + length)
        self._header(PduType.R2T, 0, DATA_BYTES, (transfer.command.cid, tag, transfer.asked, length))
        transfer.asked += length

    def _free_tag(self) -> int:
        assert len(self._ranges) < TRANSFERS_MAX
        while True:
            self._last_tag = self._last_tag % TRANSFERS_MAX + 1
            if self._last_tag not in self._ranges:
                return self._last_tag

    def respond(self, cid: int, status: int, result: int, sqhd: int) -> None:
        """CapsuleResp: a command is complete; ``status`` is the status field without the phase bit."""
        if not self._hdgst:
            self._out.append(
                pdu.RESPONSE.pack(5, 0, RESPONSE_BYTES, 0, RESPONSE_BYTES, result, sqhd, 0, cid, status << 1)
            )
            self.out_bytes += RESPONSE_BYTES
            return
        size = RESPONSE_BYTES + DIGEST_BYTES
        self._put(
            pdu.with_digest(
                pdu.RESPONSE.pack(5, HDGSTF, RESPONSE_BYTES, 0, size, result, sqhd, 0, cid, status << 1)
            )
        )

    def send_data(self, cid: int, buffers: Sequence[Buffer], length: int, *, success: bool) -> None:
        """C2HData: all data of a command in one PDU; with ``success`` no response follows."""
        flags = LAST_PDU | SUCCESS if success else LAST_PDU
        trailer = b""
        if self._ddgst:
            flags |= DDGSTF
            trailer = DIGEST.pack(pdu.digest(buffers))
        pdo = DATA_BYTES + len(self._c2h_pad) + (DIGEST_BYTES if self._hdgst else 0)
        size = pdo + length + len(trailer)
        if self._hdgst:
            head = pdu.DATA.pack(7, flags | HDGSTF, DATA_BYTES, pdo, size, cid, 0, 0, length)
            head = pdu.with_digest(head) + self._c2h_pad
        else:
            head = pdu.DATA.pack(7, flags, DATA_BYTES, pdo, size, cid, 0, 0, length) + self._c2h_pad
        self._out.append(head)
        self._out.extend(buffers)
        if trailer:
            self._out.append(trailer)
        self.out_bytes += size

    def _header(self, kind: PduType, flags: int, hlen: int, fields: tuple[int, int, int, int]) -> None:
        """A PDU that is a header of the data family and nothing more."""
        if self._hdgst:
            head = pdu.DATA.pack(kind, flags | HDGSTF, hlen, 0, hlen + DIGEST_BYTES, *fields)
            self._put(pdu.with_digest(head))
        else:
            self._put(pdu.DATA.pack(kind, flags, hlen, 0, hlen, *fields))

    def _put(self, piece: bytes) -> None:
        self._out.append(piece)
        self.out_bytes += len(piece)

    def take_output(self) -> list[Buffer]:
        """What is to be sent, in order; it is forgotten here."""
        out, self._out = self._out, []
        self.out_bytes = 0
        return out


_CAPSULE_CMD: Final = int(PduType.CAPSULE_CMD)  # looking a member up costs as much as reading the header
_HLEN: Final[dict[int, int]] = {
    PduType.ICREQ: IC_BYTES,
    PduType.H2C_TERM: TERM_BYTES,
    PduType.CAPSULE_CMD: CAPSULE_BYTES,
    PduType.H2C_DATA: DATA_BYTES,
}
_FIXED: Final = frozenset({PduType.ICREQ})
_DIGESTED: Final = frozenset({PduType.CAPSULE_CMD, PduType.H2C_DATA})
_TERM_MAX: Final = TERM_BYTES + TERM_DATA_BYTES_MAX
