from __future__ import annotations

from typing import Any

import attrs
import pytest
from crc32c import crc32c

from space._errors import CorruptionError
from space.content.frames import FrameRef, pack_frames, unpack_frames, zero_frame
from space.events import commands as cmd
from space.events.commands import StoredFrame
from space.federation.arrival import arrived
from space.policy.model import Compression, Encryption, Policy
from tests.federation_zone import MemoryZone

pytestmark = pytest.mark.unit

CAPSULE = b"c" * 16
OPTIONS = [
    Policy(compression=Compression.NONE, dedupe=True),
    Policy(compression=Compression.NONE, dedupe=False),
    Policy(compression=Compression.ZSTD, dedupe=True),
    Policy(compression=Compression.LZ4, dedupe=True),
    Policy(compression=Compression.BROTLI, dedupe=True),
]
DATA = b"the same line again and again\n" * 60


def nothing(_: bytes) -> FrameRef | None:
    """There is no such frame."""
    return None


def write(zone: MemoryZone, policy: Policy, key: int = 0, data: bytes = DATA) -> cmd.WriteExtent:
    """A write as a zone ships it."""
    return cmd.WriteExtent(CAPSULE, 0, len(data), zone.encode(data, policy, key))


@pytest.mark.parametrize("policy", OPTIONS)
def test_frames_become_those_of_this_store(policy: Policy) -> None:
    """What arrived has the records this store would have made itself, with the stored bytes that came."""
    there, here = MemoryZone("there", 1), MemoryZone("here", 2)
    came = write(there, policy)
    found = arrived(came, here.keyring.hash_key(), nothing)
    own = write(here, policy)
    assert [frame.record for frame in found.frames] == [frame.record for frame in own.frames]
    assert [frame.stored for frame in found.frames] == [frame.stored for frame in came.frames]
    assert [frame.record for frame in came.frames] != [frame.record for frame in own.frames]


def test_what_is_here_already_is_not_stored_again() -> None:
    """A shared frame whose content this store has is named by where that is; one that is not shared never is."""
    there, here = MemoryZone("there", 1), MemoryZone("here", 2)
    for policy in OPTIONS[:2]:
        (own,) = unpack_frames(here.encode(b"x" * 400, policy, 0)[0].record)
        placed = attrs.evolve(own, source_position=7, payload_offset=4096)
        came = write(there, policy, data=b"x" * 400)
        (frame,) = arrived(came, here.keyring.hash_key(), {placed.hash: placed}.get).frames
        assert (frame.stored is None) == policy.dedupe
        if policy.dedupe:
            assert frame.record == pack_frames([placed])


def test_encrypted_frames_stay_as_they_are() -> None:
    """Their hashes are keyed by a key that travels: nothing is opened."""
    there = MemoryZone("there", 1)
    key = there.new_key()
    there.must(cmd.CreateCapsule(CAPSULE, key=key))
    policy = Policy(encryption=Encryption.AES_256_GCM, dedupe=True)
    came = write(there, policy, key.key)
    assert arrived(came, b"k" * 32, nothing) == came


def test_equal_frames_of_one_extent_stay_one_buffer() -> None:
    """What was sent once is stored once."""
    there = MemoryZone("there", 1)
    came = write(there, OPTIONS[0], data=b"y" * 2048)
    assert len({id(frame.stored) for frame in came.frames}) == 1
    found = arrived(came, b"k" * 32, nothing)
    assert len(found.frames) == 4
    assert len({id(frame.stored) for frame in found.frames}) == 1


def test_zeros_are_zeros() -> None:
    """A hole needs no bytes."""
    frame = StoredFrame(pack_frames([zero_frame(100)]), None)
    came = cmd.WriteExtent(CAPSULE, 0, 100, [frame])
    assert arrived(came, b"k" * 32, nothing) == came


def of(**changes: Any) -> StoredFrame:
    """A raw frame of five bytes with something else in its record."""
    stored = changes.pop("stored", b"bytes")
    ref = FrameRef(5, 5, crc32c(b"bytes"), 0, 0, 0, 0, 0, 0, b"h" * 16)
    return StoredFrame(pack_frames([attrs.evolve(ref, **changes)]), stored)


@pytest.mark.parametrize(
    "frame",
    [
        of(crc=1),
        of(stored=b"bytez"),
        of(stored=b"byte"),
        of(stored=None),
        of(codec=0x0F),
        of(codec=2),
        of(codec=1, plain_length=900),
        of(plain_length=0),
        of(stored_length=6),
        of(flags=0x80),
        of(source_position=3),
        of(key_id=5),
        StoredFrame(b"", b"bytes"),
        StoredFrame(b"r" * 47, b"bytes"),
        StoredFrame(of().record * 2, b"bytes"),
        StoredFrame(pack_frames([zero_frame(5)]), b"bytes"),
    ],
)
def test_what_is_no_frame_is_refused(frame: StoredFrame) -> None:
    """A frame that could never be read is refused when it comes."""
    with pytest.raises(CorruptionError):
        arrived(cmd.WriteExtent(CAPSULE, 0, 5, [frame]), b"k" * 32, nothing)
