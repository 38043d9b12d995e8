"""Recoding: frames that arrive are decoded, and encoded as the zone they arrive in wants them.

What a zone wants is its arrival policy (:class:`space.policy.model.ArrivalPolicy`): another compression, encryption
under a data key of its own, sharing or not, and functions of its owner's that content goes through.  It is done before
the shipment is decided, so the log has the result, and whoever replays it needs neither the policy nor the functions.

One frame becomes one frame of the same content: extents and their holes stay what they are.  Content is plain in memory
alone.  What cannot be opened here (keys sealed for the home, or destroyed) stays as it came; what should open and does
not, refuses the shipment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, final

from space._errors import CorruptionError, RefusedError, SpaceError
from space.content import codecs
from space.content.frames import FLAG_SHARED, Buffer, CompressionCode, EncryptionCode, FrameRef, pack_frames
from space.content.keys import FrameKey
from space.content.pipeline import ContentWriter, check_hash, decrypted
from space.events.commands import StoredFrame
from space.policy.model import ArrivalPolicy, Compression, Encryption, Policy

Transform = Callable[[bytes, bytes], bytes]
"""(id of the capsule, content of a frame) → the content to keep, as long; it raises to have the shipment refused."""

_CIPHERS: Final = {
    EncryptionCode.NONE: Encryption.NONE,
    EncryptionCode.AES_256_GCM: Encryption.AES_256_GCM,
    EncryptionCode.AES_256_XTS: Encryption.AES_256_XTS,
}
_FAMILIES: Final = {
    CompressionCode.NONE: Compression.NONE,
    CompressionCode.LZ4: Compression.LZ4,
    CompressionCode.ZSTD: Compression.ZSTD,
    CompressionCode.BROTLI: Compression.BROTLI,
}


@final
class Recoder:
    """Encodes frames anew.

    Args:
        policy: how.
        key: the data key of this zone that ``policy`` encrypts with; None if it does not.
        key_of: the data key of (key id, version) frames came under; None: it cannot be opened here, by intent.
        writer: this store's.
        transforms: what ``policy.transform`` names, in order.
    """

    def __init__(
        self,
        policy: ArrivalPolicy,
        key: FrameKey | None,
        key_of: Callable[[int, int], FrameKey | None],
        writer: ContentWriter,
        transforms: Sequence[tuple[str, Transform]] = (),
    ) -> None:
        self._policy = policy
        self._key = key
        self._key_of = key_of
        self._writer = writer
        self._transforms = transforms
        self._known: dict[tuple[int, bool], Policy] = {}  # by codec and whether it was shared

    def __call__(self, capsule: bytes, ref: FrameRef, stored: Buffer) -> StoredFrame | None:
        """The frame this zone keeps; None: it stays as it came.

        Raises:
            CorruptionError: it does not read.
            RefusedError: its key does not open, or a transform refuses it.
        """
        key = None
        if ref.encryption:
            key = self._key_of(ref.key_id, ref.key_version)
            if key is None:
                return None
        try:
            body = decrypted(ref, stored, key)
            content = codecs.decompress(ref.compression, body, ref.plain_length)
            if key is not None:
                check_hash(ref, stored, content, key, b"")
        except CorruptionError as error:
            raise CorruptionError(f"a shipment with a frame that does not read: {error}") from None
        for name, transform in self._transforms:
            content = _transformed(name, transform, capsule, content)
        kept = (int(ref.compression), body) if self._keeps_body(ref) else None
        policy = self._frame_policy(ref)
        frame = self._writer.encode_frame(content, policy, self._key or key, kept)
        return StoredFrame(pack_frames((frame.ref,)), frame.stored)

    def _keeps_body(self, ref: FrameRef) -> bool:
        """Whether a frame is compressed as the policy wants it; of what level it is, it does not say."""
        policy = self._policy
        same = (
            policy.compression is _FAMILIES[CompressionCode(ref.compression)]
            and policy.compression_level is None
        )
        return not self._transforms and (policy.compression is None or same)

    def _frame_policy(self, ref: FrameRef) -> Policy:
        came = (ref.codec, bool(ref.flags & FLAG_SHARED))
        found = self._known.get(came)
        if found is None:
            family, cipher = (
                _FAMILIES[CompressionCode(ref.compression)],
                _CIPHERS[EncryptionCode(ref.encryption)],
            )
            found = self._known[came] = self._policy.frame_policy(family, cipher, shared=came[1])
        return found


def _transformed(name: str, transform: Transform, capsule: bytes, content: Buffer) -> bytes:
    try:
        made: object = transform(capsule, bytes(content))
    except SpaceError:
        raise
    except Exception as error:  # noqa: BLE001 - it is the owner's, and may raise anything
        raise RefusedError(f"transform {name} failed: {type(error).__name__}: {error}") from None
    if not isinstance(made, bytes) or len(made) != len(content):
        raise RefusedError(f"transform {name} made other than {len(content)} bytes of {len(content)}")
    return made
