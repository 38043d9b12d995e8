"""A log in memory and a keyring with fixed bytes: what the tests of content write to and read from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import attrs
from blake3 import blake3

from space.content.cache import FrameCache
from space.content.frames import FLAG_SHARED, Buffer, FrameRef, pack_frames, unpack_frames
from space.content.keys import KEY_BYTES, Keyring
from space.content.pipeline import ContentReader, ContentWriter, EncodedFrame
from space.policy.model import Encryption, Policy

MASTER_KEY: Final = bytes(range(KEY_BYTES))
STORE_KEY: Final = b"store key of the tests, 32 bytes"
KEY: Final = (3, 1)

COMPRESSIONS: Final = ("none", "auto", "lz4", "lz4:9", "zstd", "zstd:1", "zstd:19", "brotli", "brotli:11")
DOMAINS: Final = (  # encryption and dedupe that may go together
    ("none", False),
    ("none", True),
    ("aes-256-gcm", False),
    ("aes-256-gcm", True),
    ("aes-256-xts", False),
)


def policy(compression: str = "none", encryption: str = "none", dedupe: bool = False) -> Policy:  # noqa: FBT002
    """The policy with these three keys."""
    return Policy.from_document({"compression": compression, "encryption": encryption, "dedupe": dedupe})


def counted_bytes() -> Callable[[int], bytes]:
    """A source of bytes that look random and are the same in every run."""
    drawn = 0

    def random_bytes(count: int) -> bytes:
        nonlocal drawn
        drawn += 1
        return blake3(drawn.to_bytes(8, "little")).digest(count)

    return random_bytes


def texture(length: int, seed: int = 0) -> bytes:
    """``length`` bytes that no codec can make smaller."""
    return blake3(seed.to_bytes(8, "little")).digest(length)


def prose(length: int) -> bytes:
    """``length`` bytes that every codec makes smaller, no two lines of them alike."""
    lines = [b"%08d the quick brown fox jumps over dogs\n" % line for line in range(length // 45 + 1)]
    return b"".join(lines)[:length]


@attrs.frozen
class PlacedFrames:
    """Frames with their places: packed records, the bytes to append in order, and how many those are."""

    packed: bytes
    pieces: list[Buffer]
    stored_bytes: int


def place_frames(frames: Sequence[EncodedFrame]) -> PlacedFrames:
    """Lay ``frames`` out one after the other, each object once, as a sequencer does."""
    refs: list[FrameRef] = []
    pieces: list[Buffer] = []
    places: dict[int, int] = {}
    end = 0
    for frame in frames:
        ref = frame.ref
        if frame.stored is not None:
            if id(frame.stored) not in places:
                places[id(frame.stored)] = end
                pieces.append(frame.stored)
                end += ref.stored_length
            ref = attrs.evolve(ref, payload_offset=places[id(frame.stored)])
        refs.append(ref)
    return PlacedFrames(pack_frames(refs), pieces, end)


def found_at(ref: FrameRef, position: int) -> FrameRef:
    """The frame as an index holds it: with the position of the batch that stores it."""
    return attrs.evolve(ref, source_position=position)


class Log:
    """Batches in memory, an index of shared frames, and the writer and reader over both."""

    def __init__(self, *, frame_bytes: int = 65536, threads: int = 1, cache_bytes: int = 0) -> None:
        self.batches: dict[int, bytes] = {}
        self.index: dict[bytes, FrameRef] = {}
        self.looked_up: list[bytes] = []
        self.fetched: list[tuple[int, int, int]] = []
        self.rows: dict[tuple[int, int], bytes] = {}
        self.random_bytes = counted_bytes()
        self.keyring = self.opened_with(MASTER_KEY)
        self.add_key(*KEY)
        self.cache = FrameCache(cache_bytes)
        self.writer = ContentWriter(
            keyring=self.keyring,
            hash_key=self.keyring.hash_key(),
            find=self.find,
            random_bytes=self.random_bytes,
            frame_bytes=frame_bytes,
            threads=threads,
        )
        self.reader = ContentReader(
            fetch=self.fetch, keyring=self.keyring, cache=self.cache, hash_key=self.keyring.hash_key()
        )

    def opened_with(self, master_key: bytes | None) -> Keyring:
        """A keyring over the rows of this log with that master key."""
        return Keyring(
            lambda key_id, version: self.rows.get((key_id, version)),
            store_key=STORE_KEY,
            master_keys=() if master_key is None else (master_key,),
            random_bytes=self.random_bytes,
        )

    def add_key(self, key_id: int, version: int) -> None:
        """A new data key under that number."""
        self.rows[key_id, version] = self.keyring.wrap(key_id, version, self.keyring.new_data_key())

    def find(self, hash_: bytes) -> FrameRef | None:
        """The shared frame with that hash."""
        self.looked_up.append(hash_)
        return self.index.get(hash_)

    def fetch(self, position: int, offset: int, length: int) -> Buffer:
        """Part of a batch."""
        self.fetched.append((position, offset, length))
        batch = self.batches[position]
        return batch if (offset, length) == (0, len(batch)) else batch[offset : offset + length]

    def write(
        self, data: Buffer, policy: Policy, key: tuple[int, int] | None = KEY
    ) -> tuple[int, PlacedFrames]:
        """Append ``data`` as one batch: its position and its frames."""
        asked = None if policy.encryption is Encryption.NONE else key
        placed = place_frames(self.writer.encode(data, policy, asked))
        position = len(self.batches) + 1
        self.batches[position] = b"".join(placed.pieces)
        for ref in unpack_frames(placed.packed):
            if ref.flags & FLAG_SHARED and not ref.source_position:
                self.index.setdefault(ref.hash, found_at(ref, position))
        return position, placed

    def write_one(self, data: Buffer, policy: Policy) -> tuple[int, FrameRef]:
        """Append ``data`` that fits one frame: its position and that frame."""
        position, placed = self.write(data, policy)
        (ref,) = unpack_frames(placed.packed)
        return position, ref

    def read(self, position: int, placed: PlacedFrames, offset: int, length: int) -> bytes:
        """Content of the batch at ``position``."""
        return self.reader.read(placed.packed, position, offset, length)
