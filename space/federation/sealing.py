"""Sealing: a data key on its way to another zone, readable there and nowhere between.

A sealed key is made for the X25519 public key of a zone (RFC 7748): with a fresh key pair of its own, the shared secret
through HKDF-SHA256 (RFC 5869), and AES-256-GCM (NIST SP 800-38D) over the data key.  Its associated data names the data
key and both zones, so that a sealed key opens only as what it was sent as.  The nonce is zeros: no two sealed keys have
a secret in common.

One byte in front says for whom it is: :data:`FOR_ZONE`, the zone it is sent to, which opens it and wraps it with its
own master key; :data:`FOR_HOME`, the zone it comes from (``federation.sealed``): the receiver keeps it as it is and
cannot read what is stored under it, but can give it back.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from space._errors import RefusedError, Status, UsageError
from space.content.keys import KEY_BYTES, SEALED_BYTES

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FOR_ZONE: Final = 1
FOR_HOME: Final = 2

PUBLIC_BYTES: Final = 32
_CONTEXT: Final = struct.Struct("<16s16sIH")
_NONCE: Final = bytes(12)


def seal_key(
    data_key: bytes,
    number: tuple[int, int],
    *,
    home: bytes,
    zone: bytes,
    public: bytes,
    for_home: bool = False,
    random_bytes: Callable[[int], bytes],
) -> bytes:
    """``data_key``, which is ``number`` (key id, version) at ``home``, sealed on its way to ``zone``.

    Args:
        data_key: 32 bytes.
        number: key id and version.
        home, zone: ids of both zones.
        public: the X25519 public key of the zone that may open it.
        for_home: whether that is the home.
        random_bytes: source of the key pair.

    Raises:
        UsageError: not a public key.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    own = X25519PrivateKey.from_private_bytes(random_bytes(PUBLIC_BYTES))
    ephemeral = own.public_key().public_bytes_raw()
    associated = bytes((FOR_HOME if for_home else FOR_ZONE,)) + _CONTEXT.pack(home, zone, *number)
    cipher = _cipher(_exchange(own, public), ephemeral + public)
    return associated[:1] + ephemeral + cipher.encrypt(_NONCE, data_key, associated)


def open_key(
    sealed: bytes, number: tuple[int, int], *, home: bytes, zone: bytes, private: bytes, whose: int = FOR_ZONE
) -> bytes:
    """The data key in ``sealed``; ``private`` is the X25519 private key of who may open it.

    Raises:
        UsageError: not a sealed key.
        RefusedError: it is sealed for somebody else, or was changed.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    name = f"key {number[0]} version {number[1]}"
    if len(sealed) != SEALED_BYTES or sealed[0] not in (FOR_ZONE, FOR_HOME):
        raise UsageError(f"{name}: not a sealed key", hint="is that zone newer?")
    if sealed[0] != whose:
        raise RefusedError(f"{name} is sealed for its home zone", status=Status.NOT_PERMITTED)
    own = X25519PrivateKey.from_private_bytes(private)
    ephemeral, body = sealed[1 : 1 + PUBLIC_BYTES], sealed[1 + PUBLIC_BYTES :]
    cipher = _cipher(_exchange(own, ephemeral), ephemeral + own.public_key().public_bytes_raw())
    try:
        return cipher.decrypt(_NONCE, body, sealed[:1] + _CONTEXT.pack(home, zone, *number))
    except InvalidTag:
        raise RefusedError(
            f"{name} does not open: it was sealed for another key of this zone, or changed on the way",
            status=Status.NOT_PERMITTED,
        ) from None


def is_for_home(wrapped: bytes) -> bool:
    """Whether a row of the key table holds a key that only its home can open."""
    return len(wrapped) == SEALED_BYTES and wrapped[0] == FOR_HOME


def _exchange(own: X25519PrivateKey, public: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    try:
        return own.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # another length, or a point of small order (RFC 7748 §6.1)
        raise UsageError("not an X25519 public key") from None


def _cipher(secret: bytes, salt: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return AESGCM(HKDF(SHA256(), KEY_BYTES, salt, b"space federation key v1").derive(secret))
