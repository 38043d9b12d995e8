from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from space._errors import RefusedError, SpaceError, UsageError
from space.content.keys import SEALED_BYTES
from space.federation.sealing import FOR_HOME, is_for_home, open_key, seal_key

pytestmark = pytest.mark.unit

HOME, ZONE = b"h" * 16, b"z" * 16
DATA_KEY = bytes(range(32))
NUMBER = (7, 1)


def pair() -> tuple[bytes, bytes]:
    """A private key and its public one."""
    private = X25519PrivateKey.generate()
    return private.private_bytes_raw(), private.public_key().public_bytes_raw()


PRIVATE, PUBLIC = pair()


def sealed(*, for_home: bool = False) -> bytes:
    """The key, sealed for who has PRIVATE."""
    return seal_key(
        DATA_KEY, NUMBER, home=HOME, zone=ZONE, public=PUBLIC, for_home=for_home, random_bytes=os.urandom
    )


def test_who_it_is_for_opens_it() -> None:
    """The zone a key was sealed for gets it back, and no two seals of it are alike."""
    one, other = sealed(), sealed()
    assert len(one) == SEALED_BYTES
    assert one != other
    assert not is_for_home(one)
    for each in (one, other):
        assert open_key(each, NUMBER, home=HOME, zone=ZONE, private=PRIVATE) == DATA_KEY


@pytest.mark.parametrize(
    "number, home, zone",
    [((8, 1), HOME, ZONE), ((7, 2), HOME, ZONE), (NUMBER, ZONE, ZONE), (NUMBER, HOME, HOME)],
)
def test_it_opens_only_as_what_it_was_sent_as(number: tuple[int, int], home: bytes, zone: bytes) -> None:
    """Under another number, or between other zones, a sealed key stays closed."""
    with pytest.raises(RefusedError, match="does not open"):
        open_key(sealed(), number, home=home, zone=zone, private=PRIVATE)


def test_another_key_opens_nothing() -> None:
    """Who has another private key cannot open it."""
    with pytest.raises(RefusedError):
        open_key(sealed(), NUMBER, home=HOME, zone=ZONE, private=pair()[0])


def test_sealed_for_the_home_the_zone_cannot_open_it() -> None:
    """A key for the home only is told from others, refused by name, and opened by the home."""
    found = sealed(for_home=True)
    assert is_for_home(found)
    with pytest.raises(RefusedError, match="sealed for its home zone"):
        open_key(found, NUMBER, home=HOME, zone=ZONE, private=PRIVATE)
    assert open_key(found, NUMBER, home=HOME, zone=ZONE, private=PRIVATE, whose=FOR_HOME) == DATA_KEY


def test_every_flipped_bit_is_found() -> None:
    """No bit of a sealed key can be another without it staying closed."""
    whole = sealed()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SpaceError):
            open_key(bytes(changed), NUMBER, home=HOME, zone=ZONE, private=PRIVATE)


@pytest.mark.parametrize("length", [0, 1, SEALED_BYTES - 1, SEALED_BYTES + 1])
def test_another_length_is_no_sealed_key(length: int) -> None:
    """What has not the length of a sealed key is none."""
    with pytest.raises(UsageError, match="not a sealed key"):
        open_key(bytes([1]) * length, NUMBER, home=HOME, zone=ZONE, private=PRIVATE)


@pytest.mark.parametrize("public", [b"", bytes(31), bytes(32)])
def test_what_is_no_public_key_is_refused(public: bytes) -> None:
    """A key of another length, and the point that gives every pair the same secret, are refused."""
    with pytest.raises(UsageError, match="public key"):
        seal_key(DATA_KEY, NUMBER, home=HOME, zone=ZONE, public=public, random_bytes=os.urandom)
