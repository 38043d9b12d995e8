"""DH-HMAC-CHAP, against a host written from the specification."""

from __future__ import annotations

import base64
import hashlib
import hmac
import struct
import zlib
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space._errors import UsageError
from space.projections.nvme.auth import Authentication, Credentials, Failure, Secret, prime
from space.projections.nvme.status import NvmeStatus as S
from tests.nvme_support import HOST, NQN, Host, admin_queue, target_with

KEY: Final = Secret(bytes(range(32)), 1)
OTHER: Final = Secret(bytes(range(100, 148)), 2)
SECURITY: Final = 0xE9 << 24 | 0x0101 << 8
HASH_NAMES: Final = {1: "sha256", 2: "sha384", 3: "sha512"}


class Prover:
    """The host's side; what it knows may be wrong."""

    def __init__(self, key: bytes, *, hash_id: int = 1, group: int = 1, mutual: bytes | None = None) -> None:
        self.key = key
        self.hash_id = hash_id
        self.group = group
        self.mutual = mutual
        self.name = HASH_NAMES[hash_id]

    def negotiate(self, *, protocol: int = 1, concatenation: int = 0) -> bytes:
        ids = bytes([self.hash_id]).ljust(30, b"\0") + bytes([self.group]).ljust(30, b"\0")
        return struct.pack("<BBHHBB", 0, 0, 0, 77, concatenation, 1) + bytes([protocol, 0, 1, 1]) + ids

    def _mac(self, key: bytes, challenge: bytes, sequence: int, role: str, one: str, two: str) -> bytes:
        if self.group:
            challenge = hmac.digest(self.session, challenge, self.name)
        text = (
            challenge
            + struct.pack("<IHB", sequence, 77, 0)
            + role.encode()
            + one.encode()
            + b"\0"
            + two.encode()
        )
        return hmac.digest(key, text, self.name)

    def reply(self, challenge_message: bytes) -> bytes:
        """Answers a challenge."""
        _, kind, _, transaction, size, _, hash_id, group, length, sequence = struct.unpack_from(
            "<BBHHBBBBHI", challenge_message
        )
        assert (kind, transaction, hash_id, group) == (1, 77, self.hash_id, self.group)
        challenge = challenge_message[16 : 16 + size]
        public = b""
        if group:
            modulus = prime(group)
            theirs = int.from_bytes(challenge_message[16 + size : 16 + size + length], "big")
            shared = pow(theirs, 12345678901234567, modulus).to_bytes(length, "big")
            self.session = hashlib.new(self.name, shared).digest()
            public = pow(2, 12345678901234567, modulus).to_bytes(length, "big")
        self.challenge = bytes(reversed(range(size)))
        response = self._mac(self.key, challenge, sequence, "HostHost", HOST, NQN)
        head = struct.pack(
            "<BBHHBBBBHI", 1, 2, 0, 77, size, 0, int(self.mutual is not None), 0, len(public), 4242
        )
        return head + response + self.challenge + public

    def check(self, success: bytes) -> None:
        """What the controller proves in return."""
        _, kind, _, _, size, _, valid = struct.unpack_from("<BBHHBBB", success)
        assert (kind, bool(valid)) == (3, self.mutual is not None)
        if self.mutual is not None:
            expected = self._mac(self.mutual, self.challenge, 4242, "Controller", NQN, HOST)
            assert success[16 : 16 + size] == expected


def bound(secret: Secret, nqn: str) -> bytes:
    """The key of a secret, by the specification's formula."""
    return hmac.digest(secret.key, nqn.encode() + b"NVMe-over-Fabrics", HASH_NAMES[secret.hash])


def connected(credentials: Credentials) -> Host:
    """A queue whose host has to authenticate."""
    host = Host(target_with(credentials={HOST: credentials})[0])
    answer = host.connect()
    assert answer.status == 0
    assert answer.result >> 16 == 2
    return host


def tell(host: Host, message: bytes) -> int:
    """Authentication Send."""
    return host.one(0x7F, nsid=5, cdw=(SECURITY, len(message)), data=message).status


def hear(host: Host, length: int = 4096) -> bytes:
    """Authentication Receive."""
    return host.data(0x7F, nsid=6, cdw=(SECURITY, length), length=length)


@pytest.mark.parametrize("hash_id", [1, 2, 3])
@pytest.mark.parametrize("group", [0, 1, 2])
@pytest.mark.parametrize("mutual", [False, True])
def test_a_host_that_knows_the_secret_is_let_in(hash_id: int, group: int, mutual: bool) -> None:
    """With every hash, with and without a group, one way and both: the queue opens, and not before."""
    host = connected(Credentials(KEY, OTHER))
    prover = Prover(
        bound(KEY, HOST), hash_id=hash_id, group=group, mutual=bound(OTHER, NQN) if mutual else None
    )
    assert host.get_property(0x1C).status == S.AUTHENTICATION_REQUIRED
    assert tell(host, prover.negotiate()) == 0
    assert host.get_property(0x1C).status == S.AUTHENTICATION_REQUIRED
    assert tell(host, prover.reply(hear(host))) == 0
    prover.check(hear(host))
    assert host.get_property(0x1C).status == 0
    if mutual:
        assert tell(host, struct.pack("<BBHH10x", 1, 4, 0, 77)) == 0
    assert host.open


def failure(host: Host) -> int:
    """The reason the host is told, and that the connection closes."""
    kind, reason, explanation = struct.unpack_from("<xB4xBB", hear(host))
    assert (kind, reason) == (0xF1, 1)
    assert not host.open
    return int(explanation)


def test_a_host_that_does_not_know_it_is_not() -> None:
    """A wrong key fails, the host is told so, and the connection ends without anything else being taken."""
    host = connected(Credentials(KEY))
    prover = Prover(bound(OTHER, HOST))
    tell(host, prover.negotiate())
    assert tell(host, prover.reply(hear(host))) == 0
    assert host.get_property(0x1C).status == S.AUTHENTICATION_REQUIRED
    assert failure(host) == Failure.FAILED


def test_a_controller_without_a_secret_does_not_pretend() -> None:
    """A host that wants proof from a controller that has none is refused; so is its own challenge sent back."""
    host = connected(Credentials(KEY))
    prover = Prover(bound(KEY, HOST), mutual=b"x" * 32)
    tell(host, prover.negotiate())
    tell(host, prover.reply(hear(host)))
    assert failure(host) == Failure.FAILED
    host = connected(Credentials(KEY, OTHER))
    tell(host, prover.negotiate())
    challenge = hear(host)
    reply = bytearray(prover.reply(challenge))
    reply[48:80] = challenge[16:48]
    tell(host, bytes(reply))
    assert failure(host) == Failure.FAILED


@pytest.mark.parametrize(
    "message, explanation",
    [
        (Prover(b"").negotiate(protocol=2), Failure.PROTOCOL_NOT_USABLE),
        (Prover(b"").negotiate(concatenation=1), Failure.CONCATENATION_MISMATCH),
        (Prover(b"").negotiate().replace(b"\1\0\1\1\1", b"\1\0\1\1\7"), Failure.HASH_NOT_USABLE),
        (Prover(b"", group=9).negotiate(), Failure.GROUP_NOT_USABLE),
        (Prover(b"").negotiate()[:40], Failure.INCORRECT_PAYLOAD),
        (b"\0", Failure.INCORRECT_PAYLOAD),
        (struct.pack("<BBHH10x", 1, 4, 0, 77), Failure.INCORRECT_MESSAGE),
        (struct.pack("<BBHHBB", 0, 0xF0, 0, 77, 1, 1), Failure.FAILED),
    ],
)
def test_messages_that_cannot_be_used(message: bytes, explanation: int) -> None:
    """Each kind of wrong message has its explanation."""
    host = connected(Credentials(KEY))
    assert tell(host, message) == 0
    assert failure(host) == explanation


@pytest.mark.parametrize("value", [0, 1, prime(1) - 1, prime(1)])
def test_weak_public_values_are_refused(value: int) -> None:
    """A public value that would make the session key known to everybody ends the exchange."""
    host = connected(Credentials(KEY))
    prover = Prover(bound(KEY, HOST))
    tell(host, prover.negotiate())
    reply = prover.reply(hear(host))
    tell(host, reply[:-256] + value.to_bytes(256, "big"))
    assert failure(host) == Failure.INCORRECT_PAYLOAD


def test_the_commands_are_checked() -> None:
    """Another protocol, another length, or a message that is not there yet are refused; without need there are none."""
    host = connected(Credentials(KEY))
    message = Prover(b"").negotiate()
    for words in ((0x0101 << 8, len(message)), (SECURITY, len(message) + 4), (SECURITY, 0)):
        assert host.one(0x7F, nsid=5, cdw=words, data=message).status == S.INVALID_FIELD
    assert host.status(0x7F, nsid=6, cdw=(SECURITY, 64), length=64) == S.COMMAND_SEQUENCE_ERROR
    tell(host, message)
    assert host.status(0x7F, nsid=6, cdw=(SECURITY, 64), length=64) == S.INVALID_FIELD
    open_host = admin_queue(target_with()[0])
    assert open_host.one(0x7F, nsid=5, cdw=(SECURITY, len(message)), data=message).status == S.INVALID_OPCODE


def test_secrets_are_read_in_the_form_tools_write() -> None:
    """DHHC-1 with its checksum; anything else is refused without being repeated."""

    def text(key: bytes, number: str = "01") -> str:
        checked = key + zlib.crc32(key).to_bytes(4, "little")
        return f"DHHC-1:{number}:{base64.b64encode(checked).decode()}:"

    assert Secret.parse(text(KEY.key)) == KEY
    assert Secret.parse(text(KEY.key, "00")).bound(HOST) == KEY.key
    assert "key" not in repr(KEY)
    good = text(KEY.key)
    for wrong in ("", "x", good.replace("DHHC-1", "DHHC-2"), text(KEY.key, "04"), text(b"short"), good[:20]):
        with pytest.raises(UsageError) as error:
            Secret.parse(wrong)
        assert wrong == "" or wrong not in str(error.value) or wrong == "x"


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5])
def test_groups_are_those_of_the_standard(group: int) -> None:
    """Each modulus has its size, begins and ends as RFC 7919 has it, and passes a test of being prime."""
    modulus = prime(group)
    digits = f"{modulus:x}"
    assert modulus.bit_length() == {1: 2048, 2: 3072, 3: 4096, 4: 6144, 5: 8192}[group]
    assert digits.startswith("ffffffffffffffffadf85458a2bb4a9aafdc5620273d3cf1d8b9c583ce2d3695")
    assert digits.endswith("ffffffffffffffff")
    if group <= 2:  # the larger ones take seconds
        assert pow(2, modulus - 1, modulus) == 1


@given(st.lists(st.binary(max_size=200), max_size=4))
def test_any_messages_end_in_failure(messages: list[bytes]) -> None:
    """Nothing but the right response opens a queue, whatever comes."""
    options: dict[str, Any] = {"host_nqn": HOST, "subsystem_nqn": NQN, "random": bytes}
    authentication = Authentication(Credentials(KEY), **options)
    for message in messages:
        authentication.receive(message)
        authentication.take()
    assert not authentication.authenticated
