"""Arrival: frames of another zone become frames of this store.

Stored bytes stay as they came; what is said about them is checked and, where it has to, said anew:

* A frame has to be one (docs/formats/frames.md), with the checksum it says: what nobody could read is refused at the
  door, and not found years later.
* The hash of content that is not encrypted is keyed by the store it is in.  So such a frame is opened and hashed with
  the key of this store: then it is found again by dedup here, and here it is checked as everything else is.
* A frame whose content this store has already is not stored again.

Hashes of encrypted frames are keyed by their data key, which travels: they are good as they are.

Where the store has an arrival policy, frames are encoded by that instead (:mod:`space.federation.recode`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import attrs
from crc32c import crc32c

from space._errors import CorruptionError, EventDecodeError
from space.content import codecs
from space.content.frames import FLAG_SHARED, Buffer, FrameRef, pack_frames, unpack_frames
from space.content.keys import content_hash
from space.events import commands as cmd
from space.events.commands import StoredFrame

Find = Callable[[bytes], FrameRef | None]
"""The stored frame with a content hash, complete, or None: as :class:`space.content.pipeline.ContentWriter` has it."""

Recode = Callable[[bytes, FrameRef, Buffer], StoredFrame | None]
"""(capsule, frame, stored bytes) → the frame this store wants instead; None: what came."""

_RECORDS: Final = 1


def arrived(
    command: cmd.WriteExtent, hash_key: bytes, find: Find, recode: Recode | None = None
) -> cmd.WriteExtent:
    """A write as it came in a shipment, with frames that are this store's.

    Args:
        command: the write.
        hash_key: 32 bytes; keys the content hashes of frames that are not encrypted here.
        find: finds frames again.
        recode: encodes frames anew.

    Raises:
        CorruptionError: a frame is not what it says.
        SpaceError: what ``recode`` raises.
    """
    known: dict[int, StoredFrame] = {}  # equal frames of one extent have one buffer, and go on having one
    frames = []
    for frame in command.frames:
        key = id(frame.stored)
        if frame.stored is None or key not in known or known[key].record[:20] != frame.record[:20]:
            ref = _checked(frame)
            anew = None
            if recode is not None and frame.stored is not None:
                anew = recode(bytes(command.capsule), ref, frame.stored)
            known[key] = anew or _arrived(frame, ref, hash_key, find)
        frames.append(known[key])
    return cmd.WriteExtent(
        command.capsule, command.offset, command.length, frames, command.change, command.reserved
    )


def _checked(frame: StoredFrame) -> FrameRef:
    """The record of a frame that has the bytes it says."""
    try:
        refs = unpack_frames(frame.record)
    except EventDecodeError as error:
        raise CorruptionError(f"a shipment with a frame that is none: {error}") from None
    if len(refs) != _RECORDS:
        raise CorruptionError("a shipment with a frame of several records")
    ref = refs[0]
    if ref.is_zero and frame.stored is None:
        return ref
    if frame.stored is None or ref.source_position or ref.is_zero:
        raise CorruptionError("a shipment with a frame that is stored elsewhere")
    if len(frame.stored) != ref.stored_length or crc32c(frame.stored) != ref.crc:
        raise CorruptionError("a shipment with a frame whose checksum is another")
    return ref


def _arrived(frame: StoredFrame, ref: FrameRef, hash_key: bytes, find: Find) -> StoredFrame:
    if frame.stored is None or ref.encryption:
        return frame
    content = codecs.decompress(ref.compression, frame.stored, ref.plain_length)
    ref = attrs.evolve(ref, hash=content_hash(hash_key, content))
    found = find(ref.hash) if ref.flags & FLAG_SHARED else None
    if found is not None and _same(found, ref):
        return StoredFrame(pack_frames([found]), None)
    return StoredFrame(pack_frames([ref]), frame.stored)


def _same(found: FrameRef, ref: FrameRef) -> bool:
    """Whether a frame that was found holds the same content, for anybody to share."""
    shared = bool(found.source_position and found.flags & FLAG_SHARED and not found.encryption)
    return shared and (found.hash, found.plain_length) == (ref.hash, ref.plain_length)
