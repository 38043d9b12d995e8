"""What looks into captured traffic: TCP put together, TLS 1.3 opened, chunks joined, and that it sees what is there."""

from __future__ import annotations

import base64
import random
import ssl
import struct
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from space._node.federation_keys import ZoneKeys, trust
from tests import capture_support as capture
from tests.capture_support import bodies, expand_label, opened, seen, spellings, streams

pytestmark = pytest.mark.unit

FLOW = ("10.0.0.1", 4000, "10.0.0.2", 443)


def segment(sequence: int, payload: bytes = b"", *, flags: int = 0x10, flow: capture.Flow = FLOW) -> bytes:
    """A TCP segment in an IPv4 packet; checksums are the kernel's business."""
    source, here, target, there = flow
    tcp = struct.pack("!HHIIBBHHH", here, there, sequence & 0xFFFF_FFFF, 0, 5 << 4, flags, 0, 0, 0) + payload
    addresses = b"".join(bytes(map(int, each.split("."))) for each in (source, target))
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, 6, 0) + addresses + tcp


@pytest.mark.parametrize("first", [0, 7, 0xFFFF_FFF0])
def test_segments_are_put_together(first: int) -> None:
    """Whatever the order, overlaps, repetitions, and where numbers begin anew, the bytes are those that were sent."""
    chance = random.Random(first)
    content = chance.randbytes(5000)
    pieces = []
    at = 0
    while at < len(content):
        size = chance.randrange(1, 400)
        start = max(0, at - chance.randrange(50))
        pieces.append(segment(first + 1 + start, content[start : at + size]))
        at += size
    chance.shuffle(pieces)
    found, rest = streams([segment(first, flags=2), *pieces, *pieces[:7]])
    assert found == {FLOW: content}
    assert rest == []


def test_a_gap_is_not_passed_over() -> None:
    """Bytes nobody saw are an error: something might be in them."""
    with pytest.raises(AssertionError, match="never seen"):
        streams([segment(0, flags=2), segment(1, b"abc"), segment(5, b"d")])
    with pytest.raises(AssertionError, match="beginning"):
        streams([segment(1, b"abc")])
    with pytest.raises(AssertionError, match="are others"):
        streams([segment(0, flags=2), segment(1, b"abc"), segment(2, b"xx")])


def test_everything_else_is_listed() -> None:
    """Packets that are no TCP are named by protocol, port and address."""
    udp = struct.pack("!BBHHHBBH", 0x45, 0, 28, 0, 0, 64, 17, 0) + bytes(4) + bytes([8, 8, 8, 8])
    solicitation = struct.pack("!IHBB", 6 << 28, 8, 58, 255) + bytes(16) + b"\xff\x02" + bytes(13) + b"\x02"
    found, rest = streams([udp + struct.pack("!HHHH", 999, 53, 8, 0), solicitation + b"\x85" + bytes(7)])
    assert found == {}
    assert rest == ["IPv4 protocol 17 port 53 to 8.8.8.8", "IPv6 protocol 58 type 133 to ff02:0:0:0:0:0:0:2"]


def test_a_connection_of_zones_is_opened(tmp_path: Path) -> None:
    """What both sides said over TLS as zones speak it comes out, with certificates; nothing of it is in the clear."""
    now = datetime.now(UTC)
    home = ZoneKeys.create(tmp_path / "home", "home", "metro", bytes(16), now=now)
    other = ZoneKeys.create(tmp_path / "other", "other", "geo", bytes(range(16)), now=now)
    accepting = other.server_context()
    trust(accepting, home.authority)
    asking = home.client_context(other.authority)
    asking.keylog_filename = str(tmp_path / "secrets")
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    wire = {"client": ssl.MemoryBIO(), "server": ssl.MemoryBIO()}
    client = asking.wrap_bio(wire["server"], there)
    server = accepting.wrap_bio(wire["client"], back, server_side=True)
    sent = {"client": b"", "server": b""}
    client_said, server_said = b"GET / HTTP/1.1\r\n\r\n" * 3000, b"\0" * 20_000 + b"answer" + b"\0" * 100

    def carry() -> None:
        for who, source in (("client", there), ("server", back)):
            moved = source.read()
            sent[who] += moved
            wire[who].write(moved)

    def until_done(*sides: ssl.SSLObject) -> None:
        todo = list(sides)
        while todo:
            for side in list(todo):
                try:
                    side.do_handshake()
                    todo.remove(side)
                except ssl.SSLWantReadError:
                    pass
                carry()

    until_done(client, server)
    client.write(client_said)
    server.write(server_said)
    carry()
    known = capture.secrets((tmp_path / "secrets").read_text())
    asked, answered = opened(sent["client"], sent["server"], known)
    assert (asked.data, answered.data) == (client_said, server_said)
    assert b"/zone/home" in asked.handshake
    assert b"/zone/other" in answered.handshake
    assert not any(b"/zone/" in each or b"HTTP" in each for each in sent.values())
    with pytest.raises(KeyError):
        opened(sent["client"], sent["server"], {})


@pytest.mark.parametrize("suite", [0x1301, 0x1302, 0x1303])
def test_every_suite_and_key_updates_are_understood(suite: int) -> None:
    """Records of the suites of RFC 8446 §B.4 that are in use come out, also after the keys changed, padded or not."""
    hash_, length, _ = capture._SUITES[suite]
    known, streams_ = {}, {}
    for who in ("CLIENT", "SERVER"):
        for label in ("HANDSHAKE_TRAFFIC_SECRET", "TRAFFIC_SECRET_0"):
            known[f"{who}_{label}", b"r" * 32] = f"{who}{label}".encode().ljust(hash_.digest_size, b".")
        hello = (
            b"\1" + (34).to_bytes(3) + b"\3\3" + b"r" * 32
            if who == "CLIENT"
            else b"\2" + (37).to_bytes(3) + b"\3\3" + b"s" * 32 + b"\0" + suite.to_bytes(2)
        )
        stream = b"\x16\3\3" + len(hello).to_bytes(2) + hello + b"\x14\3\3\0\1\1"
        finished = b"\x14" + (4).to_bytes(3) + b"mac!"
        update = b"\x18" + (1).to_bytes(3) + b"\0"
        secret = known[f"{who}_HANDSHAKE_TRAFFIC_SECRET", b"r" * 32]
        stream += sealed(suite, secret, 0, 22, b"\x0b\0\0\x06cer") + sealed(
            suite, secret, 1, 22, b"t__" + finished
        )
        secret = known[f"{who}_TRAFFIC_SECRET_0", b"r" * 32]
        stream += sealed(suite, secret, 0, 23, b"one ") + sealed(suite, secret, 1, 22, update)
        secret = expand_label(hash_, secret, "traffic upd", hash_.digest_size)
        stream += sealed(suite, secret, 0, 23, b"two", padding=9) + sealed(suite, secret, 1, 21, b"\1\0")
        streams_[who] = stream
    assert length in (16, 32)
    client, server = opened(streams_["CLIENT"], streams_["SERVER"], known)
    assert client.data == server.data == b"one two"
    assert b"cert__" in client.handshake


def sealed(suite: int, secret: bytes, number: int, kind: int, content: bytes, padding: int = 0) -> bytes:
    """A record (RFC 8446 §5.2)."""
    hash_, length, cipher = capture._SUITES[suite]
    key = expand_label(hash_, secret, "key", length)
    nonce = (int.from_bytes(expand_label(hash_, secret, "iv", 12)) ^ number).to_bytes(12)
    inner = content + bytes([kind]) + bytes(padding)
    header = b"\x17\3\3" + (len(inner) + 16).to_bytes(2)
    made: AESGCM | ChaCha20Poly1305 = cipher(key)
    return header + made.encrypt(nonce, inner, header)


def test_labels_are_those_of_the_specification() -> None:
    """The key and nonce of RFC 8448 §3 (server handshake traffic) come from its secret."""
    secret = bytes.fromhex("b67b7d690cc16c4e75e54213cb2d37b4e9c912bcded9105d42befd59d391ad38")
    assert expand_label(hashes.SHA256(), secret, "key", 16).hex() == "3fce516009c21727d0f2e4e86ee403bc"
    assert expand_label(hashes.SHA256(), secret, "iv", 12).hex() == "5d313eb2671276ee13000b30"


def test_bodies_are_joined() -> None:
    """A secret on the border of two chunks is whole again; a message that was cut off gives what came."""
    chunked = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nsecr\r\n2\r\net\r\n0\r\n\r\n"
    plain = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
    assert [body for _, body in bodies(chunked + plain)] == [b"secret", b"abc"]
    assert [body for _, body in bodies(chunked[:-7])] == [b"secret"]
    assert [body for _, body in bodies(chunked[:-8])] == [b"secre"]
    with pytest.raises(AssertionError, match="not HTTP"):
        bodies(b"anything else")


def test_spellings_are_found() -> None:
    """Whatever way an id is written, it is seen; and one that is not there is not."""
    secret = bytes(range(1, 17))
    for each in spellings(secret):
        assert seen({"id": [secret]}, {"place": b"before" + each + b"after"}) == {("id", "place")}
    for shift in range(3):
        place = base64.b64encode(bytes(shift) + secret + b"tail")
        assert seen({"id": [secret]}, {"place": place}) == {("id", "place")}
    assert seen({"id": [secret]}, {"place": secret[:-1], "other": b""}) == set()
