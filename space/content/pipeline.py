"""The way of content into the log and back: split, find again, compress, encrypt; fetch, check, undo.

Nothing here knows where the log is: the writer returns frames to be stored, the reader is given a ``fetch``.

What is shared.  With ``dedupe`` a frame is stored once per *domain*.  The domain is in the key of the content
hash: the tenant's hash key for plain frames, a key derived from the data key (id and version) for encrypted
ones.  So a frame can only be found by those who can decrypt it, and destroying one version of a key never
takes content written under another.  A hit must also carry :data:`~space.content.frames.FLAG_SHARED`:
content written with ``dedupe: false`` is neither looked up nor found.  The hash has 128 bits and is keyed, so
that nobody outside the store can prepare two contents with the same hash; it is trusted without comparing
bytes.

What is not shared and encrypted is hashed together with its nonce: equal frames then have unequal records.

What reading proves.  Every frame fetched passes its CRC32C; GCM its tag; XTS, which has no tag, its content
hash.  Any frame's content hash is checked on demand (``verify=True``).  What fails is a
:class:`~space._errors.CorruptionError` naming the position, never other bytes.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple, Self, final

import attrs
from crc32c import crc32c

from space._errors import CorruptionError, RefusedError, Status, UsageError
from space.content import codecs
from space.content.cache import FrameCache
from space.content.frames import (
    FLAG_SHARED,
    FRAME_BYTES_MAX,
    Buffer,
    EncryptionCode,
    FrameRef,
    damaged,
    frames_overlapping,
    zero_frame,
)
from space.content.keys import FrameKey, Keyring, RandomBytes, content_hash
from space.policy.model import Compression, Encryption, Policy

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

DEFAULT_FRAME_BYTES: Final = 64 * 1024
HOT_LATENCY_NS_MAX: Final = 1_000_000  # a latency target up to 1 ms leaves no time for more than lz4
_PARALLEL_FRAME_BYTES_MIN: Final = 16 * 1024  # below this, handing over costs more than a second core gives
_THREADS_MAX: Final = 4
_ENCRYPTION: Final = {
    Encryption.NONE: EncryptionCode.NONE,
    Encryption.AES_256_GCM: EncryptionCode.AES_256_GCM,
    Encryption.AES_256_XTS: EncryptionCode.AES_256_XTS,
}


@final
@attrs.frozen
class EncodedFrame:
    """A frame on its way into the log.

    Attributes:
        ref: its record; complete when ``stored`` is None, else whoever lays out the payload area fills in the
            offset.
        stored: the bytes to store; None when there are none (zero) or they are stored already (found).
            Raw frames are views of the caller's buffer, which must not change until they are written.
            Equal shared frames of one call have the very same object here: it needs to be stored once only.
    """

    ref: FrameRef
    stored: Buffer | None


class _Recipe(NamedTuple):
    """What one call of ``encode`` does to each of its frames."""

    compression: Compression
    level: int | None
    hot: bool
    encryption: EncryptionCode
    key: FrameKey | None
    hash_key: bytes
    shared: bool
    nonce_bytes: int


@final
class ContentWriter:
    """Turns content into frames; one per store, thread-safe.

    Args:
        keyring: opens the data keys of encrypted capsules.
        hash_key: 32 bytes; keys the content hashes of plain frames (:meth:`Keyring.hash_key`).
        find: the stored frame with this content hash, complete (``source_position`` set), or None.
            Always called on the thread that called :meth:`encode`.
        random_bytes: source of nonces; always called on the thread that called :meth:`encode`.
        frame_bytes: bytes of content in a frame, the last of a run excepted.
        threads: how many cores compression may use; 1: the caller's only.

    Raises:
        UsageError: ``frame_bytes`` or ``threads`` out of range.
    """

    def __init__(
        self,
        *,
        keyring: Keyring,
        hash_key: bytes,
        find: Callable[[bytes], FrameRef | None],
        random_bytes: RandomBytes = os.urandom,
        frame_bytes: int = DEFAULT_FRAME_BYTES,
        threads: int | None = None,
    ) -> None:
        if not 512 <= frame_bytes <= FRAME_BYTES_MAX:
            raise UsageError(f"a frame holds 512 to {FRAME_BYTES_MAX} bytes, not {frame_bytes}")
        self.frame_bytes: Final = frame_bytes
        self._threads = min(_THREADS_MAX, os.cpu_count() or 1) if threads is None else threads
        if self._threads < 1:
            raise UsageError(f"compression runs on at least one thread, not {threads}")
        self._keyring = keyring
        self._hash_key = hash_key
        self._find = find
        self._random_bytes = random_bytes
        self._zeros = bytes(frame_bytes)
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the helper threads, if any were started; idempotent."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool:
            pool.shutdown()

    def encode(self, data: Buffer, policy: Policy, key: tuple[int, int] | None = None) -> list[EncodedFrame]:
        """The frames that hold ``data``, in order; none for no data.

        Args:
            data: content; it must not change until the frames are written.
            policy: compression, encryption and dedupe to follow.
            key: (key id, version) of the data key to encrypt with; ignored when the policy does not encrypt.

        Raises:
            RefusedError: the policy encrypts and there is no key, or it cannot be opened; or the policy
                asks for a transform, which this store cannot run.
            NotFoundError: there is no such key.
        """
        recipe = self._recipe(policy, self._frame_key(policy, key))
        view, size = memoryview(data).cast("B"), self.frame_bytes
        if len(view) > size:
            return self._encode_run(recipe, [view[at : at + size] for at in range(0, len(view), size)])
        return [self._encode_frame(recipe, view)] if view else []

    def encode_frame(
        self, content: Buffer, policy: Policy, key: FrameKey | None, body: tuple[int, Buffer] | None = None
    ) -> EncodedFrame:
        """One frame that holds ``content``, however long a frame it is.

        Args:
            content: 1 byte to 4 MiB.
            policy: as for :meth:`encode`.
            key: what to encrypt with, if the policy encrypts; it need not be in the keyring yet.
            body: the content as it is compressed already: codec and bytes.

        Raises:
            RefusedError: the policy encrypts and there is no key, or it asks for a transform.
        """
        if policy.encryption is not Encryption.NONE and key is None:
            raise _no_key(policy)
        recipe = self._recipe(policy, None if policy.encryption is Encryption.NONE else key)
        return self._encode_frame(recipe, memoryview(content).cast("B"), body)

    def _encode_frame(
        self, recipe: _Recipe, plain: memoryview, body: tuple[int, Buffer] | None = None
    ) -> EncodedFrame:
        if self._is_zero(plain):
            return EncodedFrame(zero_frame(len(plain)), None)
        nonce = self._random_bytes(recipe.nonce_bytes) if recipe.nonce_bytes else b""
        hash_ = _hash(recipe, plain, nonce)
        return self._found(recipe, hash_, len(plain)) or _seal(recipe, plain, nonce, hash_, body)

    def _encode_run(self, recipe: _Recipe, plains: list[memoryview]) -> list[EncodedFrame]:
        """Hash and look up here, where ``find`` may be called; seal what is new on all threads."""
        frames: dict[int, EncodedFrame] = {}
        todo: deque[_Sealing] = deque()
        first: dict[bytes, int] = {}  # content seen in this run is sealed once
        twins: dict[int, int] = {}
        size = recipe.nonce_bytes
        drawn = self._random_bytes(size * len(plains)) if size else b""
        for index, plain in enumerate(plains):
            if self._is_zero(plain):
                frames[index] = EncodedFrame(zero_frame(len(plain)), None)
                continue
            nonce = drawn[index * size : (index + 1) * size]
            hash_ = _hash(recipe, plain, nonce)
            if recipe.shared and first.setdefault(hash_, index) != index:
                twins[index] = first[hash_]
            elif found := self._found(recipe, hash_, len(plain)):
                frames[index] = found
            else:
                todo.append(_Sealing(index, plain, nonce, hash_))
        self._seal_all(recipe, todo, frames)
        return [frames[twins.get(index, index)] for index in range(len(plains))]

    def _recipe(self, policy: Policy, frame_key: FrameKey | None) -> _Recipe:
        if policy.transform:
            raise RefusedError(
                f"policy asks for transform {', '.join(policy.transform)}, and this store runs no transforms",
                status=Status.NOT_PERMITTED,
            )
        encryption = _ENCRYPTION[policy.encryption]
        return _Recipe(
            policy.compression,
            policy.compression_level,
            policy.latency_target_ns is not None and policy.latency_target_ns <= HOT_LATENCY_NS_MAX,
            encryption,
            frame_key,
            frame_key.hash_key if frame_key else self._hash_key,
            policy.dedupe,
            codecs.nonce_bytes(encryption) if encryption else 0,
        )

    def _frame_key(self, policy: Policy, key: tuple[int, int] | None) -> FrameKey | None:
        if policy.transform or policy.encryption is Encryption.NONE:
            return None
        if key is None:
            raise _no_key(policy)
        return self._keyring.frame_key(*key)

    def _is_zero(self, plain: memoryview) -> bool:
        # Three bytes rule out nearly all other content; the copy is what makes the comparison a memcmp.
        length = len(plain)
        if plain[0] or plain[-1] or plain[length >> 1]:
            return False
        return plain.tobytes() == self._zeros[:length]

    def _found(self, recipe: _Recipe, hash_: bytes, plain_length: int) -> EncodedFrame | None:
        ref = self._find(hash_) if recipe.shared else None
        if ref is None or not ref.source_position or not ref.flags & FLAG_SHARED:
            return None
        number = (recipe.key.key_id, recipe.key.version) if recipe.key else (0, 0)
        same = (ref.hash, ref.plain_length, ref.encryption, (ref.key_id, ref.key_version))
        return EncodedFrame(ref, None) if same == (hash_, plain_length, recipe.encryption, number) else None

    def _seal_all(self, recipe: _Recipe, todo: deque[_Sealing], frames: dict[int, EncodedFrame]) -> None:
        def work() -> None:
            while True:
                try:
                    index, plain, nonce, hash_ = todo.popleft()
                except IndexError:
                    return
                frames[index] = _seal(recipe, plain, nonce, hash_)

        helpers = self._start_helpers(recipe, todo, work)
        work()
        for helper in helpers:
            if not helper.cancel():  # one that has not begun has nothing left to do
                helper.result()

    def _start_helpers(
        self, recipe: _Recipe, todo: deque[_Sealing], work: Callable[[], None]
    ) -> list[Future[None]]:
        count = min(self._threads, len(todo)) - 1
        if (
            count < 1
            or recipe.compression is Compression.NONE
            or self.frame_bytes < _PARALLEL_FRAME_BYTES_MIN
        ):
            return []
        with self._lock:
            if self._pool is None:
                from concurrent.futures import ThreadPoolExecutor

                self._pool = ThreadPoolExecutor(self._threads - 1, thread_name_prefix="space-content")
            return [self._pool.submit(work) for _ in range(count)]


class _Sealing(NamedTuple):
    """One frame of a run that is neither zero nor stored already."""

    number: int
    plain: memoryview
    nonce: bytes
    hash: bytes


def _no_key(policy: Policy) -> RefusedError:
    return RefusedError(
        f"policy asks for {policy.encryption.value}, and the capsule has no data key",
        status=Status.NOT_PERMITTED,
    )


def _hash(recipe: _Recipe, plain: memoryview, nonce: bytes) -> bytes:
    return content_hash(recipe.hash_key, plain, b"" if recipe.shared else nonce)


def _seal(
    recipe: _Recipe, plain: memoryview, nonce: bytes, hash_: bytes, body: tuple[int, Buffer] | None = None
) -> EncodedFrame:
    code, packed = body or codecs.compress(plain, recipe.compression, recipe.level, hot=recipe.hot)
    codec = code | recipe.encryption << 4
    flags = FLAG_SHARED if recipe.shared else 0
    key = recipe.key
    if key is None:
        stored, key_version, key_id = packed, 0, 0
    else:
        key_version, key_id = key.version, key.key_id
        if recipe.encryption is EncryptionCode.AES_256_XTS:
            stored, padded = codecs.encrypt_xts(key.xts_key, packed, nonce)
            flags |= padded
        else:
            associated = codecs.context(len(plain), codec, flags, key_version, key_id, hash_)
            cipher = key.convergent(hash_) if recipe.shared else key.gcm
            stored = codecs.encrypt_gcm(cipher, packed, nonce, associated)
    crc = crc32c(stored)
    ref = FrameRef(len(plain), len(stored), crc, codec, flags, key_version, key_id, 0, 0, hash_)
    return EncodedFrame(ref, stored)


@final
class ContentReader:
    """Turns frames back into content; thread-safe if ``fetch`` is.

    Args:
        fetch: ``(position, payload_offset, length)`` → that part of the payload area of that batch.
            What it raises passes through.
        keyring: opens the data keys of encrypted frames.
        cache: keeps decoded frames.
        hash_key: the key the writer was given.
    """

    def __init__(
        self,
        *,
        fetch: Callable[[int, int, int], Buffer],
        keyring: Keyring,
        cache: FrameCache,
        hash_key: bytes,
    ) -> None:
        self._fetch = fetch
        self._keyring = keyring
        self._cache = cache
        self._hash_key = hash_key

    def read_frame(self, ref: FrameRef, event_position: int, *, verify: bool = False) -> Buffer:
        """The content of one frame.

        Args:
            ref: its record.
            event_position: position of the batch whose event holds the record.
            verify: fetch it even if it is cached, and check the content hash whatever the codec.

        Raises:
            CorruptionError: the stored bytes are not what was written.
            NotFoundError: its key does not exist.
            RefusedError: its key was destroyed or cannot be opened.
        """
        if ref.is_zero:
            return bytes(ref.plain_length)
        position = ref.source_position or event_position
        slot = (position, ref.payload_offset, ref.hash)
        if not verify and (cached := self._cache.get(slot)) is not None:
            return cached
        stored = self._fetch(position, ref.payload_offset, ref.stored_length)
        _check_stored(ref, position, stored)
        try:
            content = self._opened(ref, stored, verify=verify)
        except CorruptionError as error:
            raise damaged(ref, position, str(error)) from None
        self._cache.put(slot, content if isinstance(content, bytes) else bytes(content))
        return content

    def read_parts(self, packed: Buffer, event_position: int, offset: int, length: int) -> list[Buffer]:
        """``length`` bytes from ``offset`` of the packed frames on, as pieces in order, hardly copied.

        Raw frames that lie side by side are fetched at once.  They, being read whole, bypass the cache.

        Raises:
            UsageError: a negative offset or length.
            CorruptionError: see :meth:`read_frame`; also if the frames hold fewer bytes than that.
        """
        if offset < 0 or length < 0:
            raise UsageError(f"cannot read {length} bytes at offset {offset}")
        parts: list[Buffer] = []
        run: list[FrameRef] = []
        end = offset
        for start, ref in frames_overlapping(packed, offset, length):
            low, high = max(0, offset - start), min(ref.plain_length, offset + length - start)
            end = start + high
            whole = high - low == ref.plain_length
            raw = whole and ref.codec == 0 and not ref.is_zero
            if run and not (raw and _follows(run[-1], ref)):
                parts.append(self._read_run(run, event_position))
                run = []
            if raw:
                run.append(ref)
            elif ref.is_zero:
                parts.append(bytes(high - low))
            else:
                content = self.read_frame(ref, event_position)
                parts.append(content if whole else memoryview(content)[low:high])
        if run:
            parts.append(self._read_run(run, event_position))
        if end != offset + length:
            raise CorruptionError(
                f"content at position {event_position}: the frames end at {end}, not {offset + length}",
                position=event_position,
            )
        return parts

    def read(self, packed: Buffer, event_position: int, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` of the packed frames on; see :meth:`read_parts`."""
        parts = self.read_parts(packed, event_position, offset, length)
        if len(parts) == 1 and isinstance(parts[0], bytes):
            return parts[0]
        return b"".join(parts)

    def _read_run(self, run: list[FrameRef], event_position: int) -> Buffer:
        first, last = run[0], run[-1]
        position = first.source_position or event_position
        length = last.payload_offset + last.stored_length - first.payload_offset
        stored = self._fetch(position, first.payload_offset, length)
        if len(run) == 1:
            _check_stored(first, position, stored)
            return stored
        view = memoryview(stored)
        for ref in run:
            at = ref.payload_offset - first.payload_offset
            _check_stored(ref, position, view[at : at + ref.stored_length])
        return stored

    def _opened(self, ref: FrameRef, stored: Buffer, *, verify: bool) -> Buffer:
        key = self._keyring.frame_key(ref.key_id, ref.key_version) if ref.encryption else None
        content = codecs.decompress(ref.compression, decrypted(ref, stored, key), ref.plain_length)
        if verify or ref.encryption == EncryptionCode.AES_256_XTS:
            check_hash(ref, stored, content, key, self._hash_key)
        return content


def decrypted(ref: FrameRef, stored: Buffer, key: FrameKey | None) -> Buffer:
    """The body of a frame, compressed as its record says; ``key`` is that of the record, if it is encrypted.

    Raises:
        CorruptionError: its tag or padding is wrong.
    """
    if key is None:
        return stored
    if ref.encryption == EncryptionCode.AES_256_XTS:
        return codecs.decrypt_xts(key.xts_key, stored, ref.flags)
    cipher = key.convergent(ref.hash) if ref.flags & FLAG_SHARED else key.gcm
    associated = codecs.context(ref.plain_length, ref.codec, ref.flags, ref.key_version, ref.key_id, ref.hash)
    return codecs.decrypt_gcm(cipher, stored, associated)


def check_hash(ref: FrameRef, stored: Buffer, content: Buffer, key: FrameKey | None, hash_key: bytes) -> None:
    """Compares content with its hash; ``hash_key`` keys that of frames that are not encrypted.

    Raises:
        CorruptionError: it differs.
    """
    nonce = b""
    if key and not ref.flags & FLAG_SHARED:
        nonce = bytes(stored[: codecs.nonce_bytes(ref.encryption)])
    if content_hash(key.hash_key if key else hash_key, content, nonce) != ref.hash:
        raise CorruptionError("content hash differs: other bytes, or another key")


def _follows(previous: FrameRef, ref: FrameRef) -> bool:
    return (
        ref.source_position == previous.source_position
        and ref.payload_offset == previous.payload_offset + previous.stored_length
    )


def _check_stored(ref: FrameRef, position: int, stored: Buffer) -> None:
    if len(stored) != ref.stored_length:
        raise damaged(ref, position, f"{len(stored)} of {ref.stored_length} stored bytes are there")
    crc = crc32c(stored)
    if crc != ref.crc:
        raise damaged(ref, position, f"checksum is {crc:08x}, not {ref.crc:08x}")
