"""The transport of NVMe/TCP: PDUs, digests, R2T, and what ends a connection."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space.projections.nvme.connection import (
    ADMIN_CAPSULE_DATA_BYTES,
    STAGING_BYTES,
    STAGING_BYTES_IO,
    Connection,
    Limits,
)
from space.projections.nvme.pdu import Command, FatalError, Fes
from tests.nvme_support import Pdu, capsule, h2c_data, icreq, sgl, sqe, take_apart

WRITE: Final = 0x01
READ: Final = 0x02


class Wire:
    """A connection and what comes out of it; commands are kept, and their data fetched if it travels apart."""

    def __init__(self, *, limits: Limits | None = None, greet: bool = True, **options: int) -> None:
        self.connection = Connection(limits or Limits())
        self.commands: list[Command] = []
        self.error: FatalError | None = None
        if greet:
            self.send(icreq(**options))
            self.answers()

    def send(self, stream: bytes, *, step: int | None = None) -> None:
        view = memoryview(stream)
        while view and not self.connection.ended:
            buffer = self.connection.get_buffer()
            count = min(len(buffer), len(view), step or len(view))
            buffer[:count] = view[:count]
            view = view[count:]
            self.connection.received(count)
            try:
                while (command := self.connection.next_command()) is not None:
                    self._take(command)
            except FatalError as error:
                self.error = error

    def _take(self, command: Command) -> None:
        self.commands.append(command)
        if command.data is None and command.sends and command.sgl_length:
            command.fetched = True
            self.connection.fetch(command)

    def answers(self) -> list[Pdu]:
        return take_apart(b"".join(map(bytes, self.connection.take_output())))

    def fatal(self) -> tuple[Fes, int, bytes]:
        """Why the connection was terminated, as the host is told."""
        assert self.error is not None
        assert self.connection.ended
        term = self.answers()[-1]
        assert term.kind == 3
        assert len(term.head) == 24
        fes, fei = struct.unpack_from("<HI", term.head, 8)
        assert (fes, fei) == (self.error.fes, self.error.fei)
        return fes, fei, term.data


def entry(opcode: int = READ, cid: int = 7, length: int = 0, *, in_capsule: bool = False) -> bytes:
    """A submission queue entry."""
    return sqe(opcode, cid, nsid=1, dptr=sgl(length, in_capsule=in_capsule))


# --- agreeing on parameters


@pytest.mark.parametrize("asked", range(4))
@pytest.mark.parametrize("offered", range(4))
def test_digests_are_used_when_both_sides_want_them(asked: int, offered: int) -> None:
    """The answer to ICReq has exactly the digests both sides have, no alignment, and the largest H2CData."""
    limits = Limits(header_digest=bool(offered & 1), data_digest=bool(offered & 2), h2c_bytes=8192)
    wire = Wire(limits=limits, greet=False)
    wire.send(icreq(digests=asked))
    (answer,) = wire.answers()
    assert (answer.kind, answer.flags, len(answer.head)) == (1, 0, 128)
    assert struct.unpack_from("<HBBI", answer.head, 8) == (0, 0, asked & offered, 8192)


def test_a_connection_begins_with_icreq() -> None:
    """Any other PDU before it is out of sequence, and a second one is too."""
    wire = Wire(greet=False)
    wire.send(capsule(entry()))
    assert wire.fatal()[0] == Fes.SEQUENCE_ERROR
    wire = Wire()
    wire.send(icreq())
    assert wire.fatal()[0] == Fes.SEQUENCE_ERROR


def test_an_unknown_format_version_is_refused_by_name() -> None:
    """PFV other than 0 is an unsupported parameter at its offset; too large an alignment is an invalid field."""
    wire = Wire(greet=False)
    wire.send(icreq(pfv=1))
    assert wire.fatal()[:2] == (Fes.UNSUPPORTED_PARAMETER, 8)
    wire = Wire(greet=False)
    wire.send(icreq(hpda=32))
    assert wire.fatal()[:2] == (Fes.INVALID_HEADER_FIELD, 10)


@pytest.mark.parametrize("digests", range(4))
@pytest.mark.parametrize("hpda", [0, 1, 15, 31])
def test_data_for_the_host_is_aligned_as_it_asked(digests: int, hpda: int) -> None:
    """C2HData begins at a multiple of HPDA, behind the header and its digest, and carries the data unchanged."""
    wire = Wire(digests=digests, hpda=hpda)
    wire.connection.send_data(5, [b"ab", b"cd" * 255], 512, success=True)
    (stream,) = [b"".join(map(bytes, wire.connection.take_output()))]
    kind, flags, hlen, pdo, plen = struct.unpack_from("<BBBBI", stream)
    assert (kind, hlen, plen) == (7, 24, len(stream))
    assert flags == 12 | digests
    assert pdo % ((hpda + 1) * 4) == 0
    assert pdo >= 24 + (4 if digests & 1 else 0)
    (pdu,) = take_apart(stream)
    assert pdu.fields == (5, 0, 0, 512)
    assert pdu.data == b"ab" + b"cd" * 255


# --- commands


@pytest.mark.parametrize("digests", range(4))
@pytest.mark.parametrize("pad", [0, 8, 52])
@pytest.mark.parametrize("step", [1, 7, 73, None])
def test_data_in_a_capsule(digests: int, pad: int, step: int | None) -> None:
    """A command arrives with its data whatever digests and padding, and however the bytes come in."""
    wire = Wire(digests=digests)
    data = bytes(range(256)) * 16
    stream = capsule(entry(WRITE, 9, len(data), in_capsule=True), data, digests=digests, pad=pad)
    wire.send(stream + capsule(entry(READ, 10, 512), digests=digests), step=step)
    first, second = wire.commands
    assert (first.opcode, first.cid, first.nsid, first.sgl_length) == (WRITE, 9, 1, len(data))
    assert first.data == data
    assert not first.damaged
    assert (second.opcode, second.cid, second.data) == (READ, 10, None)


def test_every_field_of_an_entry_is_where_the_specification_has_it() -> None:
    """All fields of a submission queue entry are read from their offsets."""
    wire = Wire()
    raw = bytes(range(100, 164))
    wire.send(capsule(raw))
    (command,) = wire.commands

    def at(offset: int, size: int) -> int:
        return int.from_bytes(raw[offset : offset + size], "little")

    assert (command.opcode, command.flags, command.cid, command.nsid) == (
        at(0, 1),
        at(1, 1),
        at(2, 2),
        at(4, 4),
    )
    assert (command.cdw2, command.cdw3, command.mptr) == (at(8, 4), at(12, 4), at(16, 8))
    assert (command.sgl_address, command.sgl_length, command.sgl_type) == (at(24, 8), at(32, 4), at(39, 1))
    words = [getattr(command, f"cdw{number}") for number in range(10, 16)]
    assert words == [at(offset, 4) for offset in range(40, 64, 4)]


def test_a_capsule_larger_than_the_staging_buffer_is_received_where_it_belongs() -> None:
    """An I/O queue takes in-capsule data of more than its buffer; the admin queue's limit is 8 KiB."""
    limits = Limits(capsule_bytes=4 * STAGING_BYTES_IO)
    data = bytes(range(256)) * (limits.capsule_bytes // 256)
    large = capsule(entry(WRITE, 1, len(data), in_capsule=True), data)
    wire = Wire(limits=limits)
    wire.connection.use_io_buffers()
    wire.send(large + capsule(entry(READ, 2)))
    assert wire.commands[0].data == data
    assert wire.commands[1].cid == 2
    wire = Wire(limits=limits)
    data = bytes(ADMIN_CAPSULE_DATA_BYTES + 4)
    wire.send(capsule(entry(WRITE, 1, len(data), in_capsule=True), data))
    assert wire.fatal()[:2] == (Fes.DATA_LIMIT_EXCEEDED, 4)


def test_changing_buffers_keeps_what_has_come() -> None:
    """Commands behind the Connect in the same read are not lost when the connection becomes an I/O queue."""
    wire = Wire()
    stream = capsule(entry(READ, 1)) + capsule(entry(READ, 2)) + capsule(entry(READ, 3))[:50]
    buffer = wire.connection.get_buffer()
    buffer[: len(stream)] = stream
    wire.connection.received(len(stream))
    first = wire.connection.next_command()
    wire.connection.use_io_buffers()
    second = wire.connection.next_command()
    assert first is not None
    assert second is not None
    assert (first.cid, second.cid) == (1, 2)
    assert wire.connection.next_command() is None
    wire.send(capsule(entry(READ, 3))[50:])
    assert [command.cid for command in wire.commands] == [3]


def test_a_wrong_data_digest_is_the_commands_error_only() -> None:
    """The command is marked, and the next one arrives unharmed (section 3.3.2)."""
    wire = Wire(digests=2)
    stream = bytearray(capsule(entry(WRITE, 1, 64, in_capsule=True), bytes(64), digests=2))
    stream[-1] ^= 1
    wire.send(bytes(stream) + capsule(entry(READ, 2), digests=2))
    assert [(command.cid, command.damaged) for command in wire.commands] == [(1, True), (2, False)]
    assert wire.error is None


# --- R2T


@pytest.mark.parametrize("digests", range(4))
@pytest.mark.parametrize("step", [11, None])
def test_data_is_asked_for_and_put_together(digests: int, step: int | None) -> None:
    """One R2T asks for all; data may come in several PDUs, in order, and completes the command once."""
    wire = Wire(digests=digests)
    data = bytes(range(256)) * 300
    wire.send(capsule(entry(WRITE, 3, len(data)), digests=digests))
    (r2t,) = wire.answers()
    assert r2t.kind == 9
    cid, tag, offset, length = r2t.fields
    assert (cid, offset, length) == (3, 0, len(data))
    half = len(data) // 2
    wire.send(h2c_data(3, tag, 0, data[:half], last=False, digests=digests), step=step)
    assert len(wire.commands) == 1
    wire.send(h2c_data(3, tag, half, data[half:], digests=digests), step=step)
    assert len(wire.commands) == 2
    assert wire.commands[1] is wire.commands[0]
    assert wire.commands[1].data == data
    assert not wire.connection.waiting


@pytest.mark.parametrize("maxr2t, under_way", [(0, 1), (1, 2), (9, 4)])
def test_several_r2ts_of_one_command(maxr2t: int, under_way: int) -> None:
    """As many R2Ts are outstanding as host and target allow; each that is answered lets the next one out."""
    limits = Limits(r2t_bytes=4096, r2ts=4)
    wire = Wire(limits=limits, maxr2t=maxr2t)
    data = bytes(range(256)) * 16 * 6
    wire.send(capsule(entry(WRITE, 3, len(data))))
    waiting = wire.answers()
    assert len(waiting) == under_way
    while waiting:
        _, tag, offset, length = waiting.pop(0).fields
        wire.send(h2c_data(3, tag, offset, data[offset : offset + length]))
        waiting += wire.answers()
        assert len(waiting) <= under_way
    assert wire.commands[-1].data == data


def test_transfers_of_several_commands_interleave() -> None:
    """Data of different commands arrives in any order; tags tell them apart, and a tag ends with its transfer."""
    wire = Wire()
    wire.send(b"".join(capsule(entry(WRITE, cid, 1024)) for cid in (1, 2, 3)))
    tags = {pdu.fields[0]: pdu.fields[1] for pdu in wire.answers()}
    assert len(set(tags.values())) == 3
    for cid in (2, 3, 1):
        wire.send(h2c_data(cid, tags[cid], 0, bytes([cid]) * 512, last=False))
    for cid in (3, 1, 2):
        wire.send(h2c_data(cid, tags[cid], 512, bytes([cid]) * 512))
    assert [(each.cid, each.data) for each in wire.commands[3:]] == [
        (cid, bytes([cid]) * 1024) for cid in (3, 1, 2)
    ]
    wire.send(h2c_data(1, tags[1], 0, bytes(4)))
    assert wire.fatal()[:2] == (Fes.INVALID_HEADER_FIELD, 10)


def test_a_wrong_digest_of_asked_data_spoils_its_command_only() -> None:
    """Later data of the command is still taken, and the command arrives once, marked."""
    wire = Wire(digests=2)
    wire.send(capsule(entry(WRITE, 1, 1024), digests=2))
    tag = wire.answers()[0].fields[1]
    broken = bytearray(h2c_data(1, tag, 0, bytes(512), last=False, digests=2))
    broken[-1] ^= 1
    wire.send(bytes(broken))
    wire.send(h2c_data(1, tag, 512, bytes(512), digests=2))
    assert [command.damaged for command in wire.commands] == [True, True]
    assert wire.error is None


FLAWS: Final[dict[str, tuple[Callable[[int], bytes], tuple[Fes, int]]]] = {
    "another tag": (lambda tag: h2c_data(1, tag + 1, 0, bytes(1024)), (Fes.INVALID_HEADER_FIELD, 10)),
    "another command": (lambda tag: h2c_data(2, tag, 0, bytes(1024)), (Fes.INVALID_HEADER_FIELD, 8)),
    "beyond the end": (lambda tag: h2c_data(1, tag, 512, bytes(1024)), (Fes.DATA_OUT_OF_RANGE, 12)),
    "out of order": (lambda tag: h2c_data(1, tag, 512, bytes(512)), (Fes.SEQUENCE_ERROR, 12)),
    "not last, but called so": (
        lambda tag: h2c_data(1, tag, 0, bytes(512), last=True),
        (Fes.INVALID_HEADER_FIELD, 1),
    ),
    "last, but not called so": (
        lambda tag: h2c_data(1, tag, 0, bytes(1024), last=False),
        (Fes.INVALID_HEADER_FIELD, 1),
    ),
    "another length": (
        lambda tag: h2c_data(1, tag, 0, bytes(1024), length=512),
        (Fes.INVALID_HEADER_FIELD, 4),
    ),
    "no data": (lambda tag: h2c_data(1, tag, 0, b""), (Fes.INVALID_HEADER_FIELD, 4)),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_data_that_was_not_asked_for_ends_the_connection(flaw: str) -> None:
    """H2CData that does not fit its R2T is answered with C2HTermReq, naming the field, and the header in error."""
    make, expected = FLAWS[flaw]
    wire = Wire()
    wire.send(capsule(entry(WRITE, 1, 1024)))
    tag = wire.answers()[0].fields[1]
    stream = make(tag)
    wire.send(stream)
    fes, fei, header = wire.fatal()
    assert (fes, fei) == expected
    assert header == stream[:24]
    assert wire.commands[0].data is None


def test_an_h2cdata_larger_than_agreed_ends_the_connection() -> None:
    """MAXH2CDATA is a limit, not a wish."""
    wire = Wire(limits=Limits(h2c_bytes=4096))
    wire.send(capsule(entry(WRITE, 1, 8192)))
    tag = wire.answers()[0].fields[1]
    wire.send(h2c_data(1, tag, 0, bytes(8192)))
    assert wire.fatal()[:2] == (Fes.DATA_LIMIT_EXCEEDED, 16)


# --- PDUs that break the rules


def changed(stream: bytes, offset: int, value: int) -> bytes:
    """The bytes with one of them another."""
    return stream[:offset] + bytes([value]) + stream[offset + 1 :]


@pytest.mark.parametrize("kind", [kind for kind in range(256) if kind not in {0, 2, 4, 6}])
def test_types_no_host_sends_end_the_connection(kind: int) -> None:
    """Every PDU type of the controller, and every unknown one, is an invalid type at offset 0."""
    wire = Wire()
    wire.send(changed(capsule(entry()), 0, kind))
    assert wire.fatal()[:2] == (Fes.INVALID_HEADER_FIELD, 0)


@pytest.mark.parametrize("kind", [0, 2, 4, 6])
@pytest.mark.parametrize("length", [0, 8, 23, 25, 73, 255])
def test_a_header_of_another_length_ends_the_connection(kind: int, length: int) -> None:
    """HLEN is fixed for each type."""
    wire = Wire(greet=kind != 0)
    wire.send(bytes([kind, 0, length, 0]) + struct.pack("<I", 300))
    assert wire.fatal()[:2] == (Fes.INVALID_HEADER_FIELD, 2)


@pytest.mark.parametrize("plen", [0, 71, 0xFFFF_FFFF])
def test_an_impossible_length_ends_the_connection(plen: int) -> None:
    """PLEN less than the header, or more than a capsule may have, is refused before anything is allocated."""
    wire = Wire()
    stream = bytearray(capsule(entry(WRITE, 1, 4, in_capsule=True), bytes(4)))
    stream[4:8] = struct.pack("<I", plen)
    wire.send(bytes(stream))
    assert wire.fatal()[1] == 4


@pytest.mark.parametrize("pdo", [0, 4, 71, 74, 204, 255])
def test_an_impossible_data_offset_ends_the_connection(pdo: int) -> None:
    """PDO lies behind the header, is a multiple of four, and no further than the largest alignment."""
    wire = Wire()
    wire.send(changed(capsule(entry(WRITE, 1, 512, in_capsule=True), bytes(512)), 3, pdo))
    assert wire.fatal()[:2] == (Fes.INVALID_HEADER_FIELD, 3)


def test_digests_that_were_not_agreed_end_the_connection() -> None:
    """A digest flag must be set exactly where a digest was agreed on."""
    data = capsule(entry(WRITE, 1, 512, in_capsule=True), bytes(512))
    for digests, stream in (
        (0, changed(capsule(entry()), 1, 1)),
        (0, changed(data, 1, 2)),
        (1, capsule(entry())),
        (2, data),
    ):
        wire = Wire(digests=digests)
        wire.send(stream + bytes(8))
        assert wire.fatal()[:2] == (Fes.INVALID_HEADER_FIELD, 1)


def test_a_wrong_header_digest_ends_the_connection() -> None:
    """The host is told the digest that came, because no field of the header can be believed."""
    wire = Wire(digests=1)
    stream = changed(capsule(entry(), digests=1), 40, 0xEE)
    wire.send(stream)
    fes, fei, header = wire.fatal()
    assert fes == Fes.HEADER_DIGEST_ERROR
    assert fei == struct.unpack_from("<I", stream, 72)[0]
    assert header == stream[:72]


def test_data_in_a_capsule_whose_command_has_it_elsewhere_ends_the_connection() -> None:
    """A capsule has data only under a descriptor that says so."""
    wire = Wire()
    wire.send(capsule(entry(WRITE, 1, 512), bytes(512)))
    assert wire.fatal()[:2] == (Fes.INVALID_HEADER_FIELD, 4)


def test_a_host_may_terminate() -> None:
    """H2CTermReq ends the connection without an answer; nothing behind it is read."""
    wire = Wire()
    term = struct.pack("<BBBBIHI10x", 2, 0, 24, 0, 24 + 72, 1, 0) + bytes(72)
    wire.send(term + capsule(entry()))
    assert wire.connection.ended
    assert wire.answers() == []
    assert wire.commands == []


# --- any split, any garbage


def conversation(digests: int) -> tuple[bytes, list[bytes | None]]:
    """What a host sends that knows its tags beforehand, and the data of the commands in it."""
    rest = bytes(range(256)) * 32
    stream = b"".join(
        (
            icreq(digests=digests),
            capsule(entry(READ, 1, 512), digests=digests),
            capsule(entry(WRITE, 2, 300, in_capsule=True), rest[:300], digests=digests, pad=4),
            capsule(entry(WRITE, 3, len(rest)), digests=digests),
            capsule(entry(WRITE, 4, 4), digests=digests),
            h2c_data(3, 1, 0, rest[:5000], last=False, digests=digests),
            h2c_data(4, 2, 0, b"abcd", digests=digests),
            h2c_data(3, 1, 5000, rest[5000:], digests=digests),
        )
    )
    return stream, [None, rest[:300], rest, b"abcd", b"abcd", rest]


@given(st.integers(0, 3), st.lists(st.integers(1, 9000), max_size=40))
def test_any_split_of_the_bytes_gives_the_same_commands(digests: int, cuts: list[int]) -> None:
    """Where reads begin and end means nothing."""
    stream, expected = conversation(digests)
    wire = Wire(greet=False)
    for cut in cuts:
        wire.send(stream[:cut])
        stream = stream[cut:]
    wire.send(stream)
    assert wire.error is None
    assert [command.data for command in wire.commands] == expected
    assert not any(command.damaged for command in wire.commands)
    assert len(wire.answers()) == 3


@given(st.binary(max_size=600), st.booleans())
def test_garbage_ends_the_connection_or_waits_for_more(garbage: bytes, greeted: bool) -> None:
    """Whatever the bytes, the outcome is commands, a fatal error with a C2HTermReq, or waiting: never another error."""
    wire = Wire(greet=greeted)
    wire.send(garbage)
    if wire.error is not None:
        assert wire.fatal()[0] in set(Fes)
        wire.send(capsule(entry()))
        assert wire.answers() == []
    assert len(wire.connection.get_buffer()) > 0


@given(st.data())
def test_one_wrong_byte_never_gives_wrong_data_under_digests(data: st.DataObject) -> None:
    """With both digests on, a flipped byte of any PDU is found: no command arrives that was not sent so."""
    stream, _ = conversation(3)
    place = data.draw(st.integers(128, len(stream) - 1))
    flipped = changed(stream, place, stream[place] ^ data.draw(st.integers(1, 255)))
    honest, wire = Wire(greet=False), Wire(greet=False)
    honest.send(stream)
    wire.send(flipped)
    sent = {each.cid: each for each in honest.commands}
    for each in wire.commands:
        model = sent[each.cid]
        assert (each.opcode, each.sgl_length) == (model.opcode, model.sgl_length)
        if each.data is not None and not each.damaged:
            assert each.data == model.data


def test_a_stranger_costs_little() -> None:
    """A connection that has not said what it is holds one small buffer."""
    assert len(Connection(Limits()).get_buffer()) == STAGING_BYTES
