from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
from blake3 import blake3
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from space._errors import CorruptionError, UnavailableError, UsageError
from space.content.frames import FrameRef, pack_frames, unpack_frames, zero_frame
from space.federation.parity import (
    PAYLOAD_BYTES_MAX,
    Layout,
    Stripe,
    decode_layout,
    decode_stripe,
    encode_layout,
    encode_stripe,
    gather,
    is_shard,
    part_bytes,
    repair,
    stripe_of,
)
from space.federation.stripes import Part, pack_payload, stored_bytes, unpack_payload
from space.policy.model import Shards

pytestmark = pytest.mark.requires("py:pyeclib")

GOLDEN = Path(__file__).parent.parent / "golden" / "shards_v1.txt"
PAYLOADS = st.binary(min_size=1, max_size=3000)


@st.composite
def schemes(draw: st.DrawFn, total_max: int = 9) -> Shards:
    """Any numbers of shards, up to so many together."""
    data = draw(st.integers(2, total_max - 1))
    return Shards(data, draw(st.integers(1, total_max - data)))


def made(payload: bytes, scheme: Shards) -> tuple[Stripe, list[bytes]]:
    """A stripe and its shards."""
    shards = encode_stripe(payload, scheme)
    return stripe_of(0, len(payload), payload, shards), shards


def gf_multiply(a: int, b: int) -> int:
    """A product in GF(2⁸) by the polynomial of docs/formats/shards.md, one bit at a time."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a, b = a << 1 ^ (0x11D if a & 0x80 else 0), b >> 1
    return product


def by_the_book(payload: bytes, scheme: Shards) -> list[bytes]:
    """Shards as docs/formats/shards.md defines them, by nothing but arithmetic."""
    part = part_bytes(len(payload), scheme)
    padded = payload + bytes(part * scheme.data - len(payload))
    parts = [padded[at : at + part] for at in range(0, len(padded), part)]
    inverse = {a: next(b for b in range(1, 256) if gf_multiply(a, b) == 1) for a in range(1, 64)}
    shards = list(parts)
    for i in range(scheme.data, scheme.total):
        shard = bytearray(part)
        for j, each in enumerate(parts):
            factor = inverse[i ^ j]
            table = bytes(gf_multiply(factor, value) for value in range(256))
            shard = bytearray(a ^ b for a, b in zip(shard, each.translate(table), strict=True))
        shards.append(bytes(shard))
    return shards


@given(st.binary(min_size=1, max_size=500), schemes())
@settings(max_examples=20)
def test_shards_are_what_the_format_says(payload: bytes, scheme: Shards) -> None:
    """The library computes the code that the format page defines, whatever its version."""
    assert encode_stripe(payload, scheme) == by_the_book(payload, scheme)


@pytest.mark.golden
def test_stored_shards_are_read_for_ever() -> None:
    """Shards and a layout stored by format version 1 give their payload back."""
    lines = [line.split() for line in GOLDEN.read_text().splitlines() if line and not line.startswith("#")]
    stored = {name: bytes.fromhex(value) for name, value in lines}
    layout = decode_layout(stored["layout"])
    assert encode_layout(layout) == stored["layout"]
    (stripe,) = layout.stripes
    payload = bytes(range(200))
    for lost in range(layout.scheme.total):
        shards = {index: stored[f"shard{index}"] for index in range(layout.scheme.total) if index != lost}
        assert decode_stripe(stripe, layout.scheme, shards) == payload


@given(PAYLOADS, schemes(), st.data())
def test_any_shards_missing_or_wrong_up_to_parity_do_not_matter(
    payload: bytes, scheme: Shards, data: st.DataObject
) -> None:
    """With any ``parity`` shards missing or changed the same payload comes out; with one more, an error."""
    stripe, shards = made(payload, scheme)
    order = data.draw(st.permutations(range(scheme.total)))
    bad = order[: scheme.parity]
    left = spoilt(data, shards, bad)
    assert decode_stripe(stripe, scheme, left) == payload
    assert repair(stripe, scheme, left) == {index: shards[index] for index in bad}
    left = spoilt(data, shards, order[: scheme.parity + 1])
    with pytest.raises(UnavailableError, match=f"{scheme.data - 1} of the {scheme.total} shards"):
        decode_stripe(stripe, scheme, left)
    with pytest.raises(UnavailableError):
        repair(stripe, scheme, left)


def spoilt(data: st.DataObject, shards: Sequence[bytes], which: Sequence[int]) -> dict[int, bytes]:
    """The shards but those: each is missing, shorter, longer, another one, or has one wrong bit."""
    left = dict(enumerate(shards))
    for index in which:
        shard = shards[index]
        how = data.draw(st.sampled_from(["missing", "bit", "short", "long"]))
        if how == "missing":
            del left[index]
        elif how == "bit":
            bit = data.draw(st.integers(0, len(shard) * 8 - 1))
            changed = bytearray(shard)
            changed[bit // 8] ^= 1 << bit % 8
            left[index] = bytes(changed)
        else:
            left[index] = shard[:-1] if how == "short" else shard + b"\0"
    return left


@given(PAYLOADS, schemes(), st.data())
def test_as_few_shards_are_asked_for_as_it_takes(payload: bytes, scheme: Shards, data: st.DataObject) -> None:
    """Gathering asks for ``data`` shards of the first zones, and for one more for each that fails; never twice."""
    stripe, shards = made(payload, scheme)
    order = data.draw(st.permutations(range(scheme.total)))
    bad = set(data.draw(st.lists(st.sampled_from(order), max_size=scheme.parity, unique=True)))
    left = spoilt(data, shards, sorted(bad))
    asked: list[int] = []

    def fetch(wanted: Sequence[tuple[int, bytes]]) -> Mapping[int, bytes]:
        assert all(hash_ == stripe.shards[index] for index, hash_ in wanted)
        asked.extend(index for index, _ in wanted)
        return {index: left[index] for index, _ in wanted if index in left}

    assert gather(stripe, scheme, order, fetch) == payload
    needed = next(n for n in range(len(order) + 1) if len(set(order[:n]) - bad) == scheme.data)
    assert asked == list(order[:needed])


def test_what_is_no_payload_is_refused() -> None:
    """Nothing, and more than a stripe may hold, are refused before anything is computed."""
    for size in (0, PAYLOAD_BYTES_MAX + 1):
        with pytest.raises(UsageError, match=f"a payload of {size} bytes"):
            encode_stripe(bytes(size), Shards(2, 1))


def test_a_layout_that_lies_is_found_out() -> None:
    """Shards that are what the layout says, but not of the payload it names, are damage, not content."""
    stripe, shards = made(b"payload", Shards(2, 1))
    lying = attrs.evolve(stripe, payload_hash=blake3(b"other").digest())
    with pytest.raises(CorruptionError, match="do not give what the layout says"):
        decode_stripe(lying, Shards(2, 1), dict(enumerate(shards)))


def test_a_shard_of_another_place_is_none() -> None:
    """A whole shard in the place of another, or in none, is refused."""
    stripe, shards = made(bytes(range(256)), Shards(2, 1))
    assert is_shard(stripe, Shards(2, 1), 0, shards[0])
    assert not is_shard(stripe, Shards(2, 1), 1, shards[0])
    assert not is_shard(stripe, Shards(2, 1), 3, shards[0])
    assert not is_shard(stripe, Shards(2, 1), -1, shards[2])


# --- layouts ----------------------------------------------------------------------------------------

IDS = st.binary(min_size=16, max_size=16)
HASHES = st.binary(min_size=32, max_size=32)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any layout there can be."""
    scheme = draw(schemes(5))
    stripes = []
    at = 0
    for _ in range(draw(st.integers(0, 3))):
        offset, length = at + draw(st.integers(0, 99)), draw(st.integers(1, 1 << 24))
        shards = tuple(draw(st.lists(HASHES, min_size=scheme.total, max_size=scheme.total)))
        stripes.append(Stripe(offset, length, draw(st.integers(1, PAYLOAD_BYTES_MAX)), draw(HASHES), shards))
        at = offset + length
    return Layout(
        draw(IDS),
        draw(IDS),
        draw(st.integers(0, 1 << 40)),
        at + draw(st.integers(0, 99)),
        draw(st.integers(-(1 << 62), 1 << 62)),
        draw(st.binary(max_size=255)),
        scheme,
        tuple(draw(st.lists(IDS, min_size=scheme.total, max_size=scheme.total, unique=True))),
        tuple(stripes),
    )


@given(layouts())
def test_a_layout_survives_its_bytes(layout: Layout) -> None:
    """Every layout is what its bytes say."""
    assert decode_layout(encode_layout(layout)) == layout


@given(layouts(), st.data())
def test_a_changed_layout_is_refused(layout: Layout, data: st.DataObject) -> None:
    """A layout with any bit changed, or cut anywhere, is refused."""
    stored = encode_layout(layout)
    bit = data.draw(st.integers(0, len(stored) * 8 - 1))
    changed = bytearray(stored)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptionError):
        decode_layout(bytes(changed))
    with pytest.raises(CorruptionError):
        decode_layout(stored[: data.draw(st.integers(0, len(stored) - 1))])


@given(
    layouts(),
    st.sampled_from(
        [
            ("size", -1),
            ("position", "1"),
            ("capsule", b"short"),
            ("zones", ()),
            ("name", "text"),
            ("name", bytes(256)),
            ("scheme", Shards(1, 1)),
            ("scheme", Shards(30, 30)),
            ("stripes", (Stripe(0, 0, 1, bytes(32), ()),)),
            ("stripes", (Stripe(0, 1, 0, bytes(32), ()),)),
            ("stripes", (Stripe(0, 1 << 62, 1, bytes(32), ()),)),
            ("stripes", (Stripe(0, 1, 1, bytes(31), ()),)),
        ]
    ),
)
def test_an_impossible_layout_is_refused(layout: Layout, wrong: tuple[str, Any]) -> None:
    """Bytes that were hashed properly and say what cannot be are refused all the same."""
    name, value = wrong
    with pytest.raises(CorruptionError, match="not a layout"):
        decode_layout(encode_layout(attrs.evolve(layout, **{name: value})))


# --- payloads of stripes ----------------------------------------------------------------------------


@st.composite
def stored_parts(draw: st.DrawFn) -> tuple[list[Part], dict[int, bytes]]:
    """Parts that share frames, and the payload areas of the batches these are in."""
    areas = {position: draw(st.binary(min_size=1, max_size=60)) for position in (3, 7)}
    frames = []
    for _ in range(draw(st.integers(1, 6))):
        position = draw(st.sampled_from([3, 7]))
        start = draw(st.integers(0, len(areas[position]) - 1))
        body = areas[position][start : draw(st.integers(start + 1, len(areas[position])))]
        frames.append(
            (position, FrameRef(len(body), len(body), crc32c(body), 0, 0, 0, 0, start, 0, bytes(16)))
        )
    parts = []
    at = 0
    for _ in range(draw(st.integers(0, 6))):
        position, frame = draw(st.sampled_from(frames))
        found, whose = [frame], draw(st.sampled_from([3, 7]))
        if whose != position:
            found = [attrs.evolve(frame, source_position=position)]
        if draw(st.booleans()):
            found.append(zero_frame(draw(st.integers(1, 50))))
        plain = sum(each.plain_length for each in found)
        skip = draw(st.integers(0, plain - 1))
        length = draw(st.integers(1, plain - skip))
        at += draw(st.integers(0, 9))
        parts.append(Part(at, length, whose, skip, pack_frames(found)))
        at += length
    return parts, areas


@given(stored_parts())
def test_frames_travel_as_they_are_stored(stored: tuple[list[Part], dict[int, bytes]]) -> None:
    """A payload has every part with its frames, byte by byte as stored, and each frame once."""
    parts, areas = stored
    payload = pack_payload(parts, lambda position, offset, length: areas[position][offset : offset + length])
    assert len(payload) <= stored_bytes(parts)
    found, frames = unpack_payload(payload)
    assert [(each.offset, each.length, each.skip) for each in found] == [
        (each.offset, each.length, each.skip) for each in parts
    ]
    places = set()
    for there, part in zip(found, parts, strict=True):
        for new, old in zip(unpack_frames(there.frames), unpack_frames(part.frames), strict=True):
            assert new.source_position == 0
            position = old.source_position or part.position
            begin = old.payload_offset
            body = bytes(frames[new.payload_offset : new.payload_offset + new.stored_length])
            assert body == areas[position][begin : begin + old.stored_length]
            if not old.is_zero:
                places.add((position, begin, old.stored_length))
    assert len(frames) == sum(length for _, _, length in places)


def test_a_damaged_frame_does_not_spread() -> None:
    """A frame whose stored bytes are not what was written is an error, not part of a payload."""
    frame = FrameRef(4, 4, crc32c(b"good"), 0, 0, 0, 0, 0, 0, bytes(16))
    with pytest.raises(CorruptionError, match="position 5"):
        pack_payload([Part(0, 4, 5, 0, pack_frames([frame]))], lambda *_: b"evil")


@given(st.binary(max_size=200))
def test_garbage_is_no_payload(garbage: bytes) -> None:
    """Bytes that are no payload are parts that make sense, or damage and no other error."""
    with contextlib.suppress(CorruptionError):
        parts, _ = unpack_payload(garbage)
        assert all(part.length >= 0 for part in parts)
