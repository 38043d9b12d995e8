"""Compression and encryption of one frame: pure functions of bytes, keys and nonces.

**Compression** keeps a frame raw unless it saves a sixteenth.  Whether it will is found out cheaply first:
``auto`` compresses four samples of 1 KiB; the slow codecs, which were asked for by name, first try zstd-1 on
the whole frame, which finds what samples miss and costs a fraction of them.

**Decompression** trusts nothing: output is bounded by the plain length of the frame record before it is
made, and any other length is damage.

**Encryption** (stored bytes, little-endian):

===========  =====================================  ==========================================
codec        stored bytes                           checked by
===========  =====================================  ==========================================
AES-256-GCM  nonce (12) | ciphertext | tag (16)     tag; it covers :data:`_CONTEXT` too
XTS-AES-256  tweak (16) | ciphertext                content hash, after decryption
===========  =====================================  ==========================================

The associated data of GCM ties the bytes to their record (length, codec, flags, key, content hash), not to a
capsule or a place: frames are shared between capsules and shipped between logs.  XTS cannot take less than
one block (16 bytes), so a shorter body is padded up to it, PKCS#7 fashion, and flagged.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from space._errors import CorruptionError
from space.content.frames import (
    FLAG_PADDED,
    FRAME_BYTES_MAX,
    Buffer,
    CompressionCode,
    EncryptionCode,
)
from space.content.keys import NONCE_BYTES
from space.policy.model import Compression

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

TWEAK_BYTES: Final = 16
XTS_BLOCK_BYTES: Final = 16
COMPRESS_BYTES_MIN: Final = 64  # below this no codec saves more than its own header costs to look at
_TRIAL_BYTES_MIN: Final = (
    4096  # below this a trial costs as much as it saves, and brotli's dictionary matters
)
_SAMPLED_BYTES_MIN: Final = 16 * 1024
_SAMPLE_BYTES: Final = 1024
_ZSTD_QUICK: Final = 1
_DEFAULT_LEVELS: Final = {Compression.LZ4: 0, Compression.ZSTD: 3, Compression.BROTLI: 4}
_SLOW_FROM: Final = {
    Compression.LZ4: 1,
    Compression.ZSTD: 4,
    Compression.BROTLI: 2,
}  # levels a trial pays for
_CODES: Final = {
    Compression.LZ4: CompressionCode.LZ4,
    Compression.ZSTD: CompressionCode.ZSTD,
    Compression.BROTLI: CompressionCode.BROTLI,
}
_CONTEXT: Final = struct.Struct("<IBBHI16s")
"""Associated data of GCM: plain_length, codec, flags, key_version, key_id, hash."""

_local: Final = threading.local()  # zstd contexts must not be used by two threads at once


def compress(
    data: memoryview, compression: Compression, level: int | None, *, hot: bool
) -> tuple[CompressionCode, Buffer]:
    """``data`` compressed as asked if that pays, else itself, and the code of what was done.

    Args:
        data: the plain bytes of one frame.
        compression: the family; ``auto`` is lz4 when ``hot``, else zstd-1, on what looks compressible.
        level: of the family; None: its default (zstd 3, brotli 4, lz4's fast mode).
        hot: the owner asks for low latency.
    """
    if compression is Compression.NONE or len(data) < COMPRESS_BYTES_MIN:
        return CompressionCode.NONE, data
    if compression is Compression.AUTO:
        if len(data) >= _SAMPLED_BYTES_MIN and not _samples_compress(data):
            return CompressionCode.NONE, data
        compression, level = (Compression.LZ4, 0) if hot else (Compression.ZSTD, _ZSTD_QUICK)
    elif level is None:
        level = _DEFAULT_LEVELS[compression]
    slow = level >= _SLOW_FROM[compression] and len(data) >= _TRIAL_BYTES_MIN
    if slow and not _pays(len(_zstd(data, _ZSTD_QUICK)), len(data)):
        return CompressionCode.NONE, data
    body = _COMPRESSORS[compression](data, level)
    return (_CODES[compression], body) if _pays(len(body), len(data)) else (CompressionCode.NONE, data)


def decompress(code: int, body: Buffer, plain_length: int) -> Buffer:
    """The ``plain_length`` bytes that were compressed into ``body``.

    Raises:
        CorruptionError: it is not that codec's, or does not hold exactly that many bytes.
    """
    plain = body if code == CompressionCode.NONE else _DECOMPRESSORS[code](body, plain_length)
    if len(plain) != plain_length:
        raise CorruptionError(f"decodes to {len(plain)} bytes, not {plain_length}")
    return plain


def context(plain_length: int, codec: int, flags: int, key_version: int, key_id: int, hash_: bytes) -> bytes:
    """What AES-256-GCM authenticates besides the bytes."""
    return _CONTEXT.pack(plain_length, codec, flags, key_version, key_id, hash_)


def encrypt_gcm(cipher: AESGCM, body: Buffer, nonce: bytes, associated: bytes) -> bytes:
    """``nonce | ciphertext | tag``."""
    sealed: bytes = cipher.encrypt(nonce, body, associated)
    return nonce + sealed


def decrypt_gcm(cipher: AESGCM, stored: Buffer, associated: bytes) -> bytes:
    """The body that :func:`encrypt_gcm` sealed.

    Raises:
        CorruptionError: the bytes, the associated data or the key are not those it was sealed with.
    """
    from cryptography.exceptions import InvalidTag

    view = memoryview(stored)
    try:
        return cipher.decrypt(view[:NONCE_BYTES], view[NONCE_BYTES:], associated)
    except (InvalidTag, ValueError):
        raise CorruptionError("authentication failed: other bytes, or another key") from None


def encrypt_xts(key: bytes, body: Buffer, tweak: bytes) -> tuple[bytes, int]:
    """``tweak | ciphertext``, and the flags to record (:data:`FLAG_PADDED` for a body under 16 bytes)."""
    padding = max(0, XTS_BLOCK_BYTES - len(body))
    padded = bytes(body) + bytes([padding]) * padding if padding else body
    cipher = _xts(key, tweak).encryptor()
    return tweak + cipher.update(padded) + cipher.finalize(), FLAG_PADDED if padding else 0


def decrypt_xts(key: bytes, stored: Buffer, flags: int) -> bytes:
    """The body that :func:`encrypt_xts` sealed; a wrong key gives other bytes, not an error.

    Raises:
        CorruptionError: too short, or padded in a way no writer pads.
    """
    view = memoryview(stored)
    if len(view) < TWEAK_BYTES + XTS_BLOCK_BYTES:
        raise CorruptionError("too short for XTS")
    cipher = _xts(key, bytes(view[:TWEAK_BYTES])).decryptor()
    body: bytes = cipher.update(view[TWEAK_BYTES:]) + cipher.finalize()
    if not flags & FLAG_PADDED:
        return body
    if not 1 <= body[-1] < XTS_BLOCK_BYTES or len(body) != XTS_BLOCK_BYTES:
        raise CorruptionError("impossible padding: other bytes, or another key")
    return body[: -body[-1]]


def nonce_bytes(encryption: int) -> int:
    """How many random bytes a frame of this encryption starts with."""
    return {EncryptionCode.AES_256_GCM: NONCE_BYTES, EncryptionCode.AES_256_XTS: TWEAK_BYTES}.get(
        EncryptionCode(encryption), 0
    )


def _pays(compressed_length: int, plain_length: int) -> bool:
    return compressed_length <= plain_length - plain_length // 16


def _samples_compress(data: memoryview) -> bool:
    step = len(data) // 4
    sample = b"".join([data[start : start + _SAMPLE_BYTES] for start in range(0, 4 * step, step)])
    return _pays(len(_zstd(sample, _ZSTD_QUICK)), len(sample))


def _lz4(data: Buffer, level: int) -> bytes:
    import lz4.block

    if level == 0:
        return bytes(lz4.block.compress(data, store_size=False))
    return bytes(lz4.block.compress(data, mode="high_compression", compression=level, store_size=False))


def _unlz4(body: Buffer, plain_length: int) -> bytes:
    import lz4.block

    try:
        return bytes(lz4.block.decompress(body, uncompressed_size=plain_length))
    except (lz4.block.LZ4BlockError, ValueError) as error:
        raise CorruptionError(f"not lz4: {error}") from None


def _zstd(data: Buffer, level: int) -> bytes:
    try:
        contexts = _local.compressors
    except AttributeError:
        contexts = _local.compressors = {}
    if level not in contexts:
        import zstandard

        # The record has the length already: leaving it out of the zstd header saves bytes in every frame.
        contexts[level] = zstandard.ZstdCompressor(level=level, write_content_size=False)
    compressed: bytes = contexts[level].compress(data)
    return compressed


def _unzstd(body: Buffer, plain_length: int) -> bytes:
    import zstandard

    try:
        # zstandard allocates what the header claims, whatever limit it is given.
        if zstandard.frame_content_size(body) not in (-1, plain_length):
            raise CorruptionError("zstd header claims another length")
        try:
            context = _local.decompressor
        except AttributeError:
            context = _local.decompressor = zstandard.ZstdDecompressor(max_window_size=2 * FRAME_BYTES_MAX)
        plain: bytes = context.decompress(body, max_output_size=plain_length, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptionError(f"not zstd: {error}") from None
    return plain


def _brotli(data: Buffer, level: int) -> bytes:
    import brotli

    return bytes(brotli.compress(data, quality=level))


def _unbrotli(body: Buffer, plain_length: int) -> bytes:
    import brotli

    try:
        stream = brotli.Decompressor()
        plain = stream.process(body, output_buffer_limit=plain_length + 1)
    except brotli.error as error:
        raise CorruptionError(f"not brotli: {error}") from None
    if not stream.is_finished():
        raise CorruptionError("brotli stream does not end where it should")
    return bytes(plain)


def _xts(key: bytes, tweak: bytes) -> Any:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return Cipher(algorithms.AES(key), modes.XTS(tweak))


_COMPRESSORS: Final[dict[Compression, Callable[[Buffer, int], bytes]]] = {
    Compression.LZ4: _lz4,
    Compression.ZSTD: _zstd,
    Compression.BROTLI: _brotli,
}
_DECOMPRESSORS: Final[dict[int, Callable[[Buffer, int], bytes]]] = {
    CompressionCode.LZ4: _unlz4,
    CompressionCode.ZSTD: _unzstd,
    CompressionCode.BROTLI: _unbrotli,
}
