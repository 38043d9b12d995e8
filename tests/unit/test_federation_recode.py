"""Frames that are encoded anew on arrival: which, with what, and what is refused.  With stores: integration tests."""

from __future__ import annotations

from typing import Any

import pytest

from space._errors import CorruptionError, PolicyFileError, UsageError
from space.content.frames import FLAG_SHARED, FrameRef, pack_frames, unpack_frames
from space.content.keys import FrameKey
from space.events import commands as cmd
from space.federation.arrival import arrived
from space.federation.recode import Recoder
from space.policy.model import (
    ArrivalPolicy,
    Compression,
    Encryption,
    Policy,
    load_arrival_policy,
    parse_arrival_policy,
)
from tests.federation_zone import MemoryZone

pytestmark = pytest.mark.unit

CAPSULE = b"c" * 16
DATA = b"the same line again and again\n" * 60
THEIRS = FrameKey(7, 1, b"t" * 32)
OURS = FrameKey(9, 1, b"o" * 32)


def nothing(_: bytes) -> FrameRef | None:
    """There is no such frame."""
    return None


def keys(number: int, version: int) -> FrameKey | None:
    """The keys that came."""
    return {(7, 1): THEIRS}.get((number, version))


def write(zone: MemoryZone, policy: Policy, key: FrameKey | None = THEIRS) -> cmd.WriteExtent:
    """A write as a zone ships it, one frame for each piece of 512 bytes."""
    pieces = [DATA[at : at + 512] for at in range(0, len(DATA), 512)]
    encoded = [zone.writer.encode_frame(piece, policy, key) for piece in pieces]
    stored = [cmd.StoredFrame(pack_frames((each.ref,)), each.stored) for each in encoded]
    return cmd.WriteExtent(CAPSULE, 0, len(DATA), stored)


def recoded(policy: ArrivalPolicy, came: cmd.WriteExtent, here: MemoryZone) -> list[FrameRef]:
    """The records of what is kept."""
    recoder = Recoder(policy, OURS if policy.encryption else None, keys, here.writer)
    found = arrived(came, here.keyring.hash_key(), nothing, recoder)
    assert (found.capsule, found.offset, found.length) == (came.capsule, came.offset, came.length)
    return [ref for frame in found.frames for ref in unpack_frames(frame.record)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("arrival", [None, False, True])
def test_sharing_is_as_it_came_or_as_the_policy_says(shared: bool, arrival: bool | None) -> None:
    """Without a word on dedupe a frame is shared if it was; under a key of the zone's own only if that is asked for."""
    there, here = MemoryZone("there", 1), MemoryZone("here", 2)
    came = write(there, Policy(encryption=Encryption.AES_256_GCM, dedupe=shared))
    for ours, unsaid in ((None, shared), (Encryption.AES_256_GCM, False)):
        policy = ArrivalPolicy(encryption=ours, compression=Compression.LZ4, dedupe=arrival)
        expected = unsaid if arrival is None else arrival
        found = recoded(policy, came, here)
        assert {bool(ref.flags & FLAG_SHARED) for ref in found} == {expected}
        assert {ref.key_id for ref in found} == {7 if ours is None else 9}


def test_a_body_that_is_as_wanted_is_not_compressed_again() -> None:
    """Without a level, content of the codec that is asked for keeps its compressed bytes; with one it is done anew."""
    there, here = MemoryZone("there", 1), MemoryZone("here", 2)
    came = write(there, Policy(compression=Compression.ZSTD, compression_level=19), None)
    for level, same in ((None, True), (1, False)):
        made: list[Any] = []
        policy = ArrivalPolicy(compression=Compression.ZSTD, compression_level=level)
        encode = here.writer.encode_frame

        class Noting:
            def encode_frame(self, content: Any, policy: Any, key: Any, body: Any) -> Any:
                made.append(body)  # noqa: B023 - called within the loop
                return encode(content, policy, key, body)  # noqa: B023

        noting: Any = Noting()
        arrived(came, here.keyring.hash_key(), nothing, Recoder(policy, None, keys, noting))
        assert [body is not None for body in made] == [same] * len(came.frames)


def test_what_cannot_be_opened_by_intent_stays_as_it_came() -> None:
    """Frames under a key that is sealed or destroyed are those that came, byte for byte."""
    there, here = MemoryZone("there", 1), MemoryZone("here", 2)
    came = write(there, Policy(encryption=Encryption.AES_256_GCM))
    recoder = Recoder(ArrivalPolicy(encryption=Encryption.AES_256_GCM), OURS, lambda *_: None, here.writer)
    assert arrived(came, here.keyring.hash_key(), nothing, recoder) == came


@pytest.mark.parametrize("cipher", [Encryption.AES_256_GCM, Encryption.AES_256_XTS])
def test_a_frame_that_another_key_made_is_refused(cipher: Encryption) -> None:
    """A frame under the number of one key and the bytes of another one is damage, whatever the cipher."""
    there, here = MemoryZone("there", 1), MemoryZone("here", 2)
    came = write(there, Policy(encryption=cipher), FrameKey(7, 1, b"x" * 32))
    with pytest.raises(CorruptionError, match="a frame that does not read"):
        recoded(ArrivalPolicy(compression=Compression.ZSTD), came, here)


# --- the policy --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "compression: zstd:19",
        "compression: auto",
        "encryption: aes-256-gcm",
        "encryption: aes-256-gcm\ndedupe: true",
        "encryption: aes-256-xts\ndedupe: false",
        "dedupe: false",
        "transform: [scan, redact]",
        "compression: none\nencryption: aes-256-xts\ntransform: [scan]",
    ],
)
def test_a_document_has_what_the_file_said(text: str) -> None:
    """From text to value to document and back nothing is added or lost."""
    policy = parse_arrival_policy(text)
    document = policy.to_document()
    assert ArrivalPolicy.from_document(document) == policy
    said = [line.partition(":")[0] for line in text.splitlines()]
    assert sorted(document) == sorted(said)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "\nsovereignty: global",
            "a.yaml:2: sovereignty: means nothing on arrival, where only compression, ",
        ),
        ("history: all", "a.yaml:1: history: means nothing on arrival"),
        ("compresion: lz4", "a.yaml:1: compresion: unknown key; did you mean compression?"),
        ("compression: zstd:99", "a.yaml:1: compression: zstd has levels"),
        ("compression: auto:3", "a.yaml:1: compression: auto takes no level"),
        ("encryption: none", "a.yaml:1: encryption: what comes encrypted stays encrypted"),
        ("encryption: aes-256-xts\ndedupe: true", "a.yaml:2: dedupe: aes-256-xts frames cannot be"),
        ("dedupe: maybe", "a.yaml:1: dedupe: must be true or false"),
        ("transform: [A]", "a.yaml:1: transform.0: 'A' is not a name"),
        ("- x", "a.yaml:1: a policy is a mapping"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text: str, message: str) -> None:
    """Every key that does not count, and every wrong value, is named with the line it is on."""
    with pytest.raises(PolicyFileError) as caught:
        parse_arrival_policy(text, source="a.yaml")
    assert str(caught.value).startswith(message)


def test_a_document_of_another_kind_is_refused() -> None:
    """What a socket brings is checked like a file."""
    for document in ({"rpo": "3s"}, {"encryption": "none"}, {"dedupe": 3}, {1: 2}):
        with pytest.raises(UsageError, match="policy: "):
            ArrivalPolicy.from_document(document)  # type: ignore[arg-type]


def test_a_file_is_read(tmp_path: Any) -> None:
    """A policy in a file is what its text says."""
    (tmp_path / "a.yaml").write_text("compression: brotli:5\n")
    found = load_arrival_policy(tmp_path / "a.yaml")
    assert found == ArrivalPolicy(compression=Compression.BROTLI, compression_level=5)
