"""DH-HMAC-CHAP: a host proves that it knows a secret, and may ask the same of the controller.

Base Specification 2.0, section 8.13.

::

    host                              controller
    AUTH_Negotiate ──────────────────▶
                   ◀────────────────── Challenge (C1, S1, g^x)
    Reply (R1, C2, S2, g^y) ─────────▶
                   ◀────────────────── Success1 (R2), or Failure1
    Success2, if R2 was asked for ───▶

No I/O, and chance is an argument.  Each queue authenticates by itself; until it has, nothing else is taken on it.
"""

from __future__ import annotations

import base64
import binascii
import enum
import functools
import hashlib
import hmac
import shlex
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from space._errors import UsageError

SECP: Final = 0xE9
"""The security protocol of Authentication Send and Receive; both specific fields are 1."""
_NEGOTIATE: Final = struct.Struct("<BBHHBB")
_DESCRIPTOR: Final = struct.Struct("<BBBB30s30s")
_CHALLENGE: Final = struct.Struct("<BBHHBBBBHI")
_REPLY: Final = struct.Struct("<BBHHBBBBHI")
_SUCCESS1: Final = struct.Struct("<BBHHBBB7x")
_SUCCESS2: Final = struct.Struct("<BBHH10x")
_FAILURE: Final = struct.Struct("<BBHHBB")
assert (_NEGOTIATE.size, _DESCRIPTOR.size, _FAILURE.size) == (8, 64, 8)
assert {_CHALLENGE.size, _REPLY.size, _SUCCESS1.size, _SUCCESS2.size} == {16}

HASHES: Final = {1: "sha256", 2: "sha384", 3: "sha512"}
_GROUP_BITS: Final = {
    1: (2048, 560316),
    2: (3072, 2625351),
    3: (4096, 5736041),
    4: (6144, 15705020),
    5: (8192, 10965728),
}
"""The size and the constant of each prime of RFC 7919, appendix A."""
_KEY_BYTES: Final = frozenset({32, 48, 64})
MESSAGE_BYTES_MAX: Final = 4096
"""Of what a host sends: a reply in the largest group takes 1.2 KiB."""


class Message(enum.IntEnum):
    """Message identifiers; Negotiate and the failures are common to all protocols."""

    NEGOTIATE = 0x00
    CHALLENGE = 0x01
    REPLY = 0x02
    SUCCESS1 = 0x03
    SUCCESS2 = 0x04
    FAILURE2 = 0xF0
    FAILURE1 = 0xF1


class Failure(enum.IntEnum):
    """Why it failed (reason code explanation)."""

    FAILED = 1
    PROTOCOL_NOT_USABLE = 2
    CONCATENATION_MISMATCH = 3
    HASH_NOT_USABLE = 4
    GROUP_NOT_USABLE = 5
    INCORRECT_PAYLOAD = 6
    INCORRECT_MESSAGE = 7


@functools.cache
def prime(group: int) -> int:
    """The safe prime of a group (RFC 7919): 2^b − 2^(b−64) + (⌊2^(b−130)·e⌋ + X)·2^64 − 1."""
    bits, constant = _GROUP_BITS[group]
    extra = 64  # bits of e beyond those that are kept, for the rounding of the series
    term = total = 1 << (bits - 130 + extra)
    divisor = 1
    while term:
        term //= divisor
        total += term
        divisor += 1
    euler = total >> extra
    return (1 << bits) - (1 << (bits - 64)) + ((euler + constant) << 64) - 1


@attrs.frozen
class Secret:
    """A key, and the hash it is bound to its owner's name with (0: none)."""

    key: bytes = attrs.field(repr=False)
    hash: int = 0

    @classmethod
    def parse(cls, text: str) -> Secret:
        """A secret in the form ``nvme gen-dhchap-key`` writes: ``DHHC-1:01:BASE64:``.

        Raises:
            UsageError: it is not one; the message does not repeat it.
        """
        version, _, rest = text.strip().partition(":")
        digits, _, coded = rest.partition(":")
        try:
            raw = base64.b64decode(coded.removesuffix(":"), validate=True)
            secret = cls(raw[:-4], int(digits, 16))
        except (ValueError, binascii.Error):
            raise UsageError("not a DH-HMAC-CHAP secret", hint="nvme gen-dhchap-key makes one") from None
        good = version == "DHHC-1" and secret.hash in {0, *HASHES} and len(secret.key) in _KEY_BYTES
        if not good or zlib.crc32(secret.key) != int.from_bytes(raw[-4:], "little"):
            raise UsageError("not a DH-HMAC-CHAP secret", hint="nvme gen-dhchap-key makes one")
        return secret

    def bound(self, nqn: str) -> bytes:
        """The key that is used, bound to the name of who has it."""
        if not self.hash:
            return self.key
        return hmac.digest(self.key, nqn.encode() + b"NVMe-over-Fabrics", HASHES[self.hash])


@attrs.frozen
class Credentials:
    """What a host must know, and what proves the controller to it, if it asks."""

    host: Secret
    controller: Secret | None = None


@attrs.frozen
class Access:
    """Who may connect to a subsystem.

    Attributes:
        hosts: the names of hosts that may; None means any.
        credentials: by the name of a host: what it has to prove.
    """

    hosts: frozenset[str] | None = None
    credentials: Mapping[str, Credentials] = attrs.field(factory=dict, repr=False)

    def document(self) -> list[dict[str, Any]] | None:
        """The hosts as JSON, without a secret; None: any."""
        if self.hosts is None:
            return None
        return [{"nqn": each, "authenticates": each in self.credentials} for each in sorted(self.hosts)]

    def discover_options(self) -> str:
        """What ``nvme discover`` needs beside the address: a list of hosts is kept from others."""
        if self.hosts is None:
            return ""
        name = next(iter(self.hosts)) if len(self.hosts) == 1 else "HOST_NQN"
        return f" -q {shlex.quote(name)}"

    def connect_options(self) -> str:
        """What ``nvme connect`` needs beside address and subsystem; secrets are for the user to fill in."""
        options = self.discover_options()
        if self.credentials:
            options += " -S HOST_SECRET"
        if any(each.controller for each in self.credentials.values()):
            options += " [-C CONTROLLER_SECRET]"
        return options


ANYBODY: Final = Access()


class _FailedError(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.name)
        self.failure = failure


class Authentication:
    """The controller's side of one queue.

    Attributes:
        authenticated: the host has proved what it knows; the queue is open.
        failed: it has not; the connection ends once it has been told.
    """

    def __init__(
        self, credentials: Credentials, *, host_nqn: str, subsystem_nqn: str, random: Callable[[int], bytes]
    ) -> None:
        """Waits for the host's first message."""
        self.authenticated = self.failed = False
        self._credentials = credentials
        self._host_nqn = host_nqn
        self._subsystem_nqn = subsystem_nqn
        self._random = random
        self._expected: Message | None = Message.NEGOTIATE
        self._outgoing: bytes | None = None
        self._transaction = self._concatenation = 0
        self._hash = self._group = self._sequence = 0
        self._challenge = b""
        self._exponent = 0

    def take(self) -> bytes | None:
        """The message for the host, once."""
        message, self._outgoing = self._outgoing, None
        return message

    def receive(self, message: bytes) -> None:
        """A message of the host; what is wrong with it is told by Failure1."""
        try:
            self._receive(message)
        except (_FailedError, struct.error, ValueError) as error:
            failure = error.failure if isinstance(error, _FailedError) else Failure.INCORRECT_PAYLOAD
            self.failed, self.authenticated = True, False
            self._expected = None
            self._outgoing = _FAILURE.pack(0, Message.FAILURE1, 0, self._transaction, 1, failure)

    def _receive(self, message: bytes) -> None:
        _, kind, _, transaction = struct.unpack_from("<BBHH", message)
        if kind == Message.FAILURE2:
            raise _FailedError(Failure.FAILED)
        if kind != self._expected or (kind != Message.NEGOTIATE and transaction != self._transaction):
            raise _FailedError(Failure.INCORRECT_MESSAGE)
        if kind == Message.NEGOTIATE:
            self._negotiate(message)
        elif kind == Message.REPLY:
            self._reply(message)
        else:
            self._expected = None

    def _negotiate(self, message: bytes) -> None:
        *_, self._transaction, self._concatenation, count = _NEGOTIATE.unpack_from(message)
        if self._concatenation:
            raise _FailedError(Failure.CONCATENATION_MISMATCH)  # with TLS, which there is not
        for index in range(count):
            protocol, _, hashes, groups, hash_ids, group_ids = _DESCRIPTOR.unpack_from(
                message, _NEGOTIATE.size + index * _DESCRIPTOR.size
            )
            if protocol == 1:
                self._choose(hash_ids[:hashes], group_ids[:groups])
                return
        raise _FailedError(Failure.PROTOCOL_NOT_USABLE)

    def _choose(self, hash_ids: bytes, group_ids: bytes) -> None:
        """The first hash the host names, and the smallest group: computing in a larger one keeps everybody waiting."""
        self._hash = next((each for each in hash_ids if each in HASHES), 0)
        if not self._hash:
            raise _FailedError(Failure.HASH_NOT_USABLE)
        groups = sorted(each for each in group_ids if each in _GROUP_BITS)
        if not groups and 0 not in group_ids:
            raise _FailedError(Failure.GROUP_NOT_USABLE)
        self._group = groups[0] if groups else 0
        size = hashlib.new(HASHES[self._hash]).digest_size
        self._challenge = self._random(size)
        self._sequence = int.from_bytes(self._random(4), "little") or 1
        public = b""
        if self._group:
            modulus = prime(self._group)
            self._exponent = int.from_bytes(self._random(64), "big") | 1 << 511
            public = pow(2, self._exponent, modulus).to_bytes(modulus.bit_length() // 8, "big")
        head = _CHALLENGE.pack(
            1, Message.CHALLENGE, 0, self._transaction, size, 0, self._hash, self._group, len(public), self._sequence
        )  # fmt: skip
        self._outgoing = head + self._challenge + public
        self._expected = Message.REPLY

    def _reply(self, message: bytes) -> None:
        *_, size, _, mutual, _, public_size, sequence = _REPLY.unpack_from(message)
        rest = message[_REPLY.size :]
        if size != len(self._challenge) or len(rest) < 2 * size + public_size:
            raise _FailedError(Failure.INCORRECT_PAYLOAD)
        response, challenge, public = (
            rest[:size],
            rest[size : 2 * size],
            rest[2 * size : 2 * size + public_size],
        )
        session = self._session(public)
        own = self._credentials.host.bound(self._host_nqn)
        expected = self._response(own, session, self._challenge, self._sequence, b"HostHost", from_host=True)
        if not hmac.compare_digest(expected, response):
            raise _FailedError(Failure.FAILED)
        answer = b""
        if mutual:
            secret = self._credentials.controller
            if secret is None or challenge == self._challenge:
                raise _FailedError(Failure.FAILED)
            own = secret.bound(self._subsystem_nqn)
            answer = self._response(own, session, challenge, sequence, b"Controller", from_host=False)
        self._outgoing = _SUCCESS1.pack(1, Message.SUCCESS1, 0, self._transaction, size, 0, bool(mutual))
        self._outgoing += answer or bytes(size)
        self._expected = Message.SUCCESS2 if mutual else None
        self.authenticated = True

    def _session(self, public: bytes) -> bytes:
        """The hash of what only both sides can compute; nothing without a group."""
        if not self._group:
            return b""
        modulus = prime(self._group)
        value = int.from_bytes(public, "big")
        if not 1 < value < modulus - 1:
            raise _FailedError(Failure.INCORRECT_PAYLOAD)
        shared = pow(value, self._exponent, modulus).to_bytes(modulus.bit_length() // 8, "big")
        return hashlib.new(HASHES[self._hash], shared).digest()

    def _response(
        self, key: bytes, session: bytes, challenge: bytes, sequence: int, role: bytes, *, from_host: bool
    ) -> bytes:
        name = HASHES[self._hash]
        augmented = hmac.digest(session, challenge, name) if self._group else challenge
        names = [self._host_nqn.encode(), self._subsystem_nqn.encode()]
        first, second = names if from_host else reversed(names)
        numbers = struct.pack("<IHB", sequence, self._transaction, self._concatenation)
        return hmac.digest(key, augmented + numbers + role + first + b"\0" + second, name)
