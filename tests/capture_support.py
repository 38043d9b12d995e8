"""What leaves a network namespace, packet by packet, and what is in it: TCP put together, TLS 1.3 opened, HTTP read.

Two namespaces have one way out each, a TUN device, and this process carries packets from one to the other and keeps
all of them.  So whatever the captured one sends, to whomever and by whatever protocol, is here.

TLS is opened with the secrets that the captured side writes down (tests/keylogging.py): RFC 8446 §5.2 (records), §7.1
and §7.3 (keys), §7.2 (key updates).  What does not decrypt, or is not understood, is an error and not passed over.
"""

from __future__ import annotations

import base64
import contextlib
import os
import select
import struct
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, Self

import attrs
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from bench.federation.line import connected, held, packets, tun

HOME_ADDRESS: Final = "10.79.0.1"
OTHER_ADDRESS: Final = "10.79.0.2"
PACKETS_MAX: Final = 500_000
"""Of a test that ships a few megabytes there are some thousand: more is a loop, and would fill the memory."""


# --- the line ------------------------------------------------------------------------------------------


class Line:
    """Two namespaces, the line between them, and every packet that the first one sends or is sent.

    Args:
        home: where the output of the processes goes that hold them.

    Attributes:
        home, other: commands before a command that run it in one of the two namespaces.
        sent, received: packets of the first namespace, IP header and all, in order.
    """

    def __init__(self, home: Path) -> None:
        self.sent: list[bytes] = []
        self.received: list[bytes] = []
        self._stack = contextlib.ExitStack()
        self._over = threading.Event()
        self._carrier = threading.Thread(target=self._carry, name="line")
        self._devices: list[int] = []
        try:
            self.home, self.other = self._connected(home)
        except BaseException:
            self._stack.close()
            raise
        self._carrier.start()

    def _connected(self, home: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
        prefixes = []
        addresses = (HOME_ADDRESS, OTHER_ADDRESS)
        for end, here, there in (("a", *addresses), ("b", *reversed(addresses))):
            name = f"spx{os.getpid()}{end}"
            self._devices.append(tun(name))
            self._stack.callback(os.close, self._devices[-1])
            inside = connected(name, held(home / f"namespace{end}", self._stack), here, there)
            for family, always in (("-4", True), ("-6", False)):  # the latter where the kernel has it
                way_out = [*inside, "ip", family, "route", "add", "default", "dev", name]
                subprocess.run(way_out, check=always, capture_output=True)
            prefixes.append(inside)
        return prefixes[0], prefixes[1]

    def _carry(self) -> None:
        home, other = self._devices
        ready = [home, other]
        while ready or not self._over.is_set():  # to the last packet of those that have ended
            ready, _, _ = select.select([home, other], [], [], 0.1)
            for device in ready:
                for packet in packets(device):
                    (self.sent if device == home else self.received).append(packet)
                    assert len(self.sent) + len(self.received) < PACKETS_MAX
                    with contextlib.suppress(
                        OSError
                    ):  # not up yet, or full: lost, and kept here all the same
                        os.write(other if device == home else home, packet)

    def close(self) -> None:
        """Ends the namespaces; what is in them should have ended."""
        self._over.set()
        self._carrier.join()
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- TCP -----------------------------------------------------------------------------------------------

Flow = tuple[str, int, str, int]
"""Who sends to whom: address and port, address and port."""


@attrs.define
class _Half:
    """Bytes of one direction of a connection, by their distance from its first."""

    first: int | None = None
    pieces: dict[int, bytes] = attrs.field(factory=dict)

    def add(self, sequence: int, flags: int, payload: bytes) -> None:
        if flags & 2:  # SYN takes the number before the first byte
            self.first = (sequence + 1) & 0xFFFF_FFFF
        if payload:
            assert self.first is not None, "bytes of a connection whose beginning was not seen"
            at = (sequence + (1 if flags & 2 else 0) - self.first) & 0xFFFF_FFFF
            if len(payload) > len(self.pieces.get(at, b"")):
                self.pieces[at] = payload

    def whole(self) -> bytes:
        """All bytes up to the last that was sent: there are no gaps."""
        found = bytearray()
        for at, piece in sorted(self.pieces.items()):
            assert at <= len(found), f"bytes {len(found)} to {at} were never seen"
            assert found[at : at + len(piece)] == piece[: len(found) - at], (
                "bytes were sent again, and are others"
            )
            found += piece[len(found) - at :]
        return bytes(found)


def streams(packets: Iterable[bytes]) -> tuple[dict[Flow, bytes], list[str]]:
    """The bytes of every direction of every TCP connection, and what else there is, a line for each kind."""
    halves: dict[Flow, _Half] = {}
    rest: dict[str, None] = {}
    for packet in packets:
        segment = _segment(packet)
        if isinstance(segment, str):
            rest[segment] = None
            continue
        flow, sequence, flags, payload = segment
        half = halves.get(flow)
        if half is None or (flags & 2 and half.first not in (None, (sequence + 1) & 0xFFFF_FFFF)):
            assert half is None, f"port {flow} was used again"
            half = halves[flow] = _Half()
        half.add(sequence, flags, payload)
    return {flow: half.whole() for flow, half in halves.items()}, list(rest)


def _segment(packet: bytes) -> tuple[Flow, int, int, bytes] | str:
    """A TCP segment, or what a packet is instead."""
    if packet[0] >> 4 == 6:
        following = packet[6]
        at = 40
        if following == 0:  # hop-by-hop options (RFC 8200 §4.3), as multicast listener reports have
            following, at = packet[40], 40 + 8 * (packet[41] + 1)
        target = ":".join(f"{each:x}" for each in struct.unpack("!8H", packet[24:40]))
        kind = f" type {packet[at]}" if following == 58 else ""
        return f"IPv6 protocol {following}{kind} to {target}"
    length, fragment, protocol = struct.unpack_from("!H2xHxB", packet, 2)
    source, target = (".".join(map(str, packet[at : at + 4])) for at in (12, 16))
    header = (packet[0] & 15) * 4
    if protocol != 6 or fragment & 0x3FFF:
        port = f" port {int.from_bytes(packet[header + 2 : header + 4])}" if protocol == 17 else ""
        return f"IPv4 protocol {protocol}{port} to {target}{', a fragment' if fragment & 0x3FFF else ''}"
    here, there, sequence, offset, flags = struct.unpack_from("!HHI4xBB", packet, header)
    return (source, here, target, there), sequence, flags, packet[header + (offset >> 4) * 4 : length]


# --- TLS 1.3 -------------------------------------------------------------------------------------------

_SUITES: Final[Mapping[int, tuple[hashes.HashAlgorithm, int, type[AESGCM | ChaCha20Poly1305]]]] = {
    0x1301: (hashes.SHA256(), 16, AESGCM),
    0x1302: (hashes.SHA384(), 32, AESGCM),
    0x1303: (hashes.SHA256(), 32, ChaCha20Poly1305),
}
_CHANGE_CIPHER_SPEC, _ALERT, _HANDSHAKE, _DATA = 20, 21, 22, 23
_CLIENT_HELLO, _SERVER_HELLO, _FINISHED, _KEY_UPDATE = 1, 2, 20, 24
_RETRY: Final = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
"""The random of a ServerHello that is a HelloRetryRequest (RFC 8446 §4.1.3)."""

Secrets = Mapping[tuple[str, bytes], bytes]
"""(label, random of the client) → secret."""


def secrets(log: str) -> dict[tuple[str, bytes], bytes]:
    """The secrets in a key log (draft-ietf-tls-keylogfile)."""
    lines = [line.split() for line in log.splitlines() if line and not line.startswith("#")]
    return {(label, bytes.fromhex(random)): bytes.fromhex(secret) for label, random, secret in lines}


def expand_label(hash_: hashes.HashAlgorithm, secret: bytes, label: str, length: int) -> bytes:
    """HKDF-Expand-Label without a context (RFC 8446 §7.1)."""
    name = b"tls13 " + label.encode()
    info = struct.pack("!HB", length, len(name)) + name + b"\0"
    return HKDFExpand(hash_, length, info).derive(secret)


class _Keys:
    """Keys of one direction, and the number of its next record."""

    def __init__(self, suite: int, secret: bytes) -> None:
        self._suite, self._secret = suite, secret
        hash_, length, cipher = _SUITES[suite]
        self._cipher = cipher(expand_label(hash_, secret, "key", length))
        self._iv = int.from_bytes(expand_label(hash_, secret, "iv", 12))
        self._number = 0

    def updated(self) -> _Keys:
        """Those after a key update (RFC 8446 §7.2)."""
        hash_ = _SUITES[self._suite][0]
        return _Keys(self._suite, expand_label(hash_, self._secret, "traffic upd", hash_.digest_size))

    def opened(self, header: bytes, body: bytes) -> tuple[int, bytes]:
        """Content type and content of a record."""
        nonce = (self._iv ^ self._number).to_bytes(12)
        self._number += 1
        inner = self._cipher.decrypt(nonce, body, header).rstrip(b"\0")
        return inner[-1], inner[:-1]


def _records(stream: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Type, header and body of each; one that was cut off at the end of the connection is left out."""
    at = 0
    while at + 5 <= len(stream):
        header = stream[at : at + 5]
        kind, version, length = struct.unpack("!BHH", header)
        assert kind in (_CHANGE_CIPHER_SPEC, _ALERT, _HANDSHAKE, _DATA), f"not TLS: {stream[at : at + 40]!r}"
        assert version >> 8 == 3
        if at + 5 + length > len(stream):
            return
        yield kind, header, stream[at + 5 : at + 5 + length]
        at += 5 + length


def _messages(handshake: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(handshake):
        length = int.from_bytes(handshake[at + 1 : at + 4])
        if at + 4 + length > len(handshake):
            return  # goes on in the next record
        yield handshake[at], handshake[at + 4 : at + 4 + length]
        at += 4 + length


@attrs.frozen
class Said:
    """What one side of a connection said.

    Attributes:
        data: application data.
        handshake: everything else that was enciphered: certificates, tickets, alerts.
    """

    data: bytes = b""
    handshake: bytes = b""


def opened(client: bytes, server: bytes, known: Secrets) -> tuple[Said, Said]:
    """What both sides of a TLS 1.3 connection said, deciphered.

    Raises:
        KeyError, AssertionError, InvalidTag: its secrets are not known, or it is not what RFC 8446 describes.
    """
    random, suite = _hellos(client, server)
    if random is None or suite is None:
        return Said(), Said()  # it ended before there was anything to be said
    return _side(client, "CLIENT", random, suite, known), _side(server, "SERVER", random, suite, known)


def _hellos(client: bytes, server: bytes) -> tuple[bytes | None, int | None]:
    """The random of the client, and the cipher suite."""
    random = suite = None
    for kind, _, body in _records(client):
        for message, content in _messages(body) if kind == _HANDSHAKE else ():
            if message == _CLIENT_HELLO:
                random = content[2:34]
    for kind, _, body in _records(server):
        for message, content in _messages(body) if kind == _HANDSHAKE else ():
            if message == _SERVER_HELLO and content[2:34] != _RETRY:
                session = content[34]
                suite = int.from_bytes(content[35 + session : 37 + session])
    return random, suite


def _side(stream: bytes, who: str, random: bytes, suite: int, known: Secrets) -> Said:
    keys = _Keys(suite, known[f"{who}_HANDSHAKE_TRAFFIC_SECRET", random])
    data, handshake, unread, finished = bytearray(), bytearray(), b"", False
    for kind, header, body in _records(stream):
        if kind != _DATA:
            continue  # hellos, and what is there for old middle boxes (RFC 8446 §D.4)
        inner, content = keys.opened(header, body)
        if inner == _DATA:
            assert finished, "data before the handshake was over"
            data += content
            continue
        handshake += content
        unread += content if inner == _HANDSHAKE else b""
        for message, whole in list(_messages(unread)):
            unread = unread[4 + len(whole) :]
            if message == _FINISHED:
                keys, finished = _Keys(suite, known[f"{who}_TRAFFIC_SECRET_0", random]), True
            elif message == _KEY_UPDATE:
                keys = keys.updated()
    return Said(bytes(data), bytes(handshake))


# --- HTTP ----------------------------------------------------------------------------------------------


def bodies(stream: bytes) -> list[tuple[bytes, bytes]]:
    """Head and body of each HTTP/1.1 message; chunks put together; the last may have been cut off."""
    found, at = [], 0
    while at < len(stream):
        end = stream.find(b"\r\n\r\n", at)
        assert end >= 0, f"not HTTP: {stream[at : at + 80]!r}"
        head = stream[at : end + 4]
        assert b"HTTP/1.1" in head.split(b"\r\n")[0], f"not HTTP: {head[:80]!r}"
        lines = (line.partition(b":") for line in head.split(b"\r\n")[1:])
        fields = {name.strip().lower(): value.strip().lower() for name, _, value in lines}
        assert b"content-encoding" not in fields, "what is compressed has to be looked into"
        at = end + 4
        if fields.get(b"transfer-encoding") == b"chunked":
            body, at = _chunks(stream, at)
        else:
            length = int(fields.get(b"content-length", b"0"))
            body, at = stream[at : at + length], at + length
        found.append((head, body))
    return found


def _chunks(stream: bytes, at: int) -> tuple[bytes, int]:
    found = bytearray()
    while True:
        end = stream.find(b"\r\n", at)
        if end < 0:
            return bytes(found), len(stream)
        length = int(stream[at:end], 16)
        found += stream[end + 2 : end + 2 + length]
        at = end + 2 + length + 2
        if not length or at > len(stream):
            return bytes(found), at


# --- looking for things --------------------------------------------------------------------------------


def spellings(secret: bytes) -> set[bytes]:
    """Ways in which some bytes could be written: as they are, in hexadecimal, as a UUID, in base64 at any place."""
    hexadecimal = secret.hex().encode()
    found = {secret, hexadecimal, hexadecimal.upper()}
    if len(secret) == 16:
        text = b"-".join(hexadecimal[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
        found |= {text, text.upper()}
    for shift in range(3):
        coded = base64.b64encode(bytes(shift) + secret)
        found.add(coded[(0, 2, 3)[shift] : -4])  # without what depends on its neighbours
    return found


def seen(secrets_: Mapping[str, Iterable[bytes]], places: Mapping[str, bytes]) -> set[tuple[str, str]]:
    """Which of some named secrets, in any spelling, are in which places."""
    wanted = {
        name: {each for secret in some for each in spellings(secret)} for name, some in secrets_.items()
    }
    return {
        (name, place)
        for place, content in places.items()
        for name, some in wanted.items()
        if any(each in content for each in some)
    }
