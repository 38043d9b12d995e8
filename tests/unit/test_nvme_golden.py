"""Bytes of a real host, and single PDUs written out by hand from the specification."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from space.projections.nvme import pdu
from space.projections.nvme.connection import Connection, Limits
from space.projections.nvme.pdu import Fes
from space.projections.nvme.target import Port
from tests.nvme_support import Host, MemoryDevice, namespace, target_with

GOLDEN: Final = Path(__file__).parents[1] / "golden" / "nvme_linux.txt"


class Recorded(Host):
    """A host whose every byte, the first PDU among them, comes from a recording."""

    def raw(self, stream: bytes) -> bytes:
        """Bytes in, bytes out."""
        view = memoryview(stream)
        while view:
            buffer = self.connection.get_buffer()
            count = min(len(buffer), len(view))
            buffer[:count] = view[:count]
            view = view[count:]
            self.connection.received(count)
            self.pump()
        return b"".join(map(bytes, self.connection.take_output()))


def recording() -> list[tuple[int, str, bytes]]:
    """Connection, direction and bytes of each line."""
    steps = []
    for line in GOLDEN.read_text().splitlines():
        if line.startswith("#"):
            continue
        number, direction, *tokens = line.split()
        parts = []
        for token in tokens:
            digits, _, count = token.partition("*")
            parts.append(bytes.fromhex(digits) * int(count or 1))
        steps.append((int(number), direction, b"".join(parts)))
    return steps


def test_a_linux_host_gets_the_answers_it_worked_with() -> None:
    """Its recorded bytes, replayed, have the recorded answers: discovery, connect, write, read, discard."""
    device = MemoryDevice()
    target, _ = target_with(namespace(1, device))
    target.set_ports([Port(1, "127.0.0.1", 4420), Port(2, "127.0.0.1", 8009, discovery_only=True)])
    hosts: dict[int, Recorded] = {}
    answers: dict[int, bytes] = {}
    for number, direction, stream in recording():
        if number not in hosts:
            hosts[number] = Recorded(target, greet=False)
            answers[number] = b""
        if direction == ">":
            answers[number] += hosts[number].raw(stream)
        else:
            assert answers[number][: len(stream)] == stream
            answers[number] = answers[number][len(stream) :]
    assert not any(answers.values())
    assert [call[:3] for call in device.calls if call[0] == "write"] == [
        ("write", 0, 4096),
        ("write", 0, 131072),
    ]
    assert [call for call in device.calls if call[0] == "deallocate"] == [("deallocate", [(65536, 65536)])]
    assert ("flush",) in device.calls


def hexadecimal(text: str) -> bytes:
    """Bytes written with blanks."""
    return bytes.fromhex(re.sub(r"\s", "", text))


def test_pdus_of_the_controller() -> None:
    """Each PDU a controller sends, byte for byte."""
    icresp = pdu.encode_icresp(cpda=0, digests=3, maxh2cdata=1 << 20)
    assert icresp == hexadecimal("01 00 80 00 80000000 0000 00 03 00001000") + bytes(112)
    term = pdu.encode_term(Fes.HEADER_DIGEST_ERROR, 0x11223344, b"\x04\x00\x48\x00")
    assert term == hexadecimal("03 00 18 00 1c000000 0300 44332211") + bytes(10) + b"\x04\x00\x48\x00"
    connection = Connection(Limits())
    connection.respond(0x1234, 0x4002, 0x0102030405060708, 9)
    connection.send_data(0x1234, [b"abcd"], 4, success=True)
    connection.send_data(0x1234, [b"ab", b"cd"], 4, success=False)
    out = b"".join(map(bytes, connection.take_output()))
    assert out == hexadecimal(
        "05 00 18 00 18000000 0807060504030201 0900 0000 3412 0480"
        "07 0c 18 18 1c000000 3412 0000 00000000 04000000 00000000 61626364"
        "07 04 18 18 1c000000 3412 0000 00000000 04000000 00000000 61626364"
    )


def test_an_r2t_and_its_digest() -> None:
    """R2T names command, tag, offset and length; its header digest is the CRC32C of the 24 bytes."""
    host = Host(target_with()[0], digests=1)
    host.connect()
    raw = host.connection
    raw.fetch(pdu.Command(1, 0x40, 7, 1, sgl_length=4096, sgl_type=0x5A))
    (out,) = raw.take_output()
    assert bytes(out[:24]) == hexadecimal("09 01 18 00 1c000000 0700 0100 00000000 00100000 00000000")
    assert len(out) == 28
    assert pdu.digest([b"123456789"]) == 0xE306_9283  # the check value of CRC32C
    assert pdu.digest([b"1234", b"56789"]) == 0xE306_9283


def test_a_fatal_error_keeps_at_most_128_bytes_of_the_header() -> None:
    """What travels back is bounded, whatever the header was."""
    assert len(pdu.encode_term(Fes.SEQUENCE_ERROR, 0, bytes(400))) == 24 + 128
