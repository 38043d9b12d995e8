"""Erasure code over zones: a payload in ``data + parity`` shards, any ``data`` of which give it back.

Without I/O.  A capsule is cut into stripes, each with a payload of its own (:mod:`space.federation.stripes`); the
payload of a stripe becomes one shard for each zone.  A shard is known by its BLAKE3, so a zone that returns other
bytes is found out before they are computed with, and a stripe that did not change does not travel again.  What
belongs together is in the *layout*, which every zone holds: whoever has it and reaches ``data`` of its zones can
read, also without the home.

The code is Reed-Solomon over GF(2⁸) with the polynomial x⁸+x⁴+x³+x²+1, systematic: shard ``i < data`` is the
``i``-th part of the payload, padded with zeros; shard ``i >= data`` is the sum of all parts ``j``, each times
1/(i xor j): a Cauchy matrix, every square part of which can be inverted (docs/formats/shards.md).  The library
computes that and adds headers of its own, which are no part of a shard: they are made anew where it wants them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs
import msgpack
from blake3 import blake3

from space._errors import CorruptionError, SpaceError, UnavailableError, UsageError
from space.content.frames import Buffer
from space.events.ids import ID_BYTES
from space.policy.model import SHARDS_MAX, Shards

if TYPE_CHECKING:
    from pyeclib.ec_iface import ECDriver

HASH_BYTES: Final = 32
MAGIC: Final = b"SPSHARD1"
PART_ALIGNMENT: Final = 64
"""Parts are a multiple of this: what the widest vector instructions take at once."""

PAYLOAD_BYTES_MAX: Final = 32 << 20
"""The largest payload of a stripe; what one holds in memory at once is this and its shards."""

SHARD_BYTES_MAX: Final = PAYLOAD_BYTES_MAX // 2 + PART_ALIGNMENT
"""The largest shard: of the fewest data shards there can be."""

STRIPES_MAX: Final = 1 << 16
"""Stripes of one capsule: 1 TiB of them, and a layout of at most :data:`LAYOUT_BYTES_MAX`."""

LAYOUT_BYTES_MAX: Final = 80 << 20
"""Room for 65,536 stripes with 33 hashes each."""

NAME_BYTES_MAX: Final = 255

_BACKEND: Final = "isa_l_rs_cauchy"


@attrs.frozen
class Stripe:
    """A range of a capsule and its shards.

    Attributes:
        offset: first byte of the range in the capsule; ranges are in order, and what is between them is zeros.
        length: bytes of the range.
        payload_bytes: length of the payload that stands for them.
        payload_hash: its BLAKE3.
        shards: BLAKE3 of each shard, in the order of the layout's zones.
    """

    offset: int
    length: int
    payload_bytes: int
    payload_hash: bytes
    shards: tuple[bytes, ...]


@attrs.frozen
class Layout:
    """What makes one capsule of shards in several zones.

    Attributes:
        home: id of the zone the capsule has its home in.
        capsule: its id.
        position: as of which position of the home's log it is.
        size: bytes of the capsule.
        mtime: when its content last changed, in nanoseconds since 1970.
        name: its last name, for people; may be empty.
        scheme: how many shards there are.
        zones: ids of the zones; each has the shard of its place here.
        stripes: in order of their ranges.
    """

    home: bytes
    capsule: bytes
    position: int
    size: int
    mtime: int
    name: bytes
    scheme: Shards
    zones: tuple[bytes, ...]
    stripes: tuple[Stripe, ...]

    def wanted(self, index: int) -> set[bytes]:
        """The shards the zone at this place has to have."""
        return {stripe.shards[index] for stripe in self.stripes}


def encode_stripe(payload: Buffer, scheme: Shards) -> list[bytes]:
    """The shards of a payload, in order.

    Raises:
        UsageError: it is empty or longer than :data:`PAYLOAD_BYTES_MAX`.
        UnavailableError: the library that computes them is not installed.
    """
    size = len(payload)
    if not 0 < size <= PAYLOAD_BYTES_MAX:
        raise UsageError(f"a payload of {size} bytes: 1 to {PAYLOAD_BYTES_MAX} can be made into shards")
    part = part_bytes(size, scheme)
    driver = _driver(scheme.data, scheme.parity)
    fragments = driver.encode(bytes(payload) + bytes(part * scheme.data - size))
    return [fragment[-part:] for fragment in fragments]


def part_bytes(payload_bytes: int, scheme: Shards) -> int:
    """Length of each shard of a payload."""
    return -(-payload_bytes // (scheme.data * PART_ALIGNMENT)) * PART_ALIGNMENT


def stripe_of(offset: int, length: int, payload: Buffer, shards: Sequence[bytes]) -> Stripe:
    """The entry of a layout for a payload and its shards."""
    hashes = tuple(blake3(shard).digest() for shard in shards)
    return Stripe(offset, length, len(payload), blake3(payload).digest(), hashes)


def decode_stripe(stripe: Stripe, scheme: Shards, shards: Mapping[int, Buffer]) -> bytes:
    """The payload, from the shards that are what they should be; others are as good as missing.

    Raises:
        UnavailableError: too few are.
        CorruptionError: the layout is wrong: its shards do not give the payload it names.
    """
    good = {index: shards[index] for index in shards if is_shard(stripe, scheme, index, shards[index])}
    if len(good) < scheme.data:
        raise UnavailableError(
            f"{len(good)} of the {scheme.total} shards of a stripe are there and whole, and {scheme.data} are needed",
            hint="try again when more of its zones can be reached",
        )
    chosen = sorted(good)[: scheme.data]
    if chosen == list(range(scheme.data)):
        padded = b"".join(good[index] for index in chosen)
    else:
        part = part_bytes(stripe.payload_bytes, scheme)
        headers = _headers(scheme.data, scheme.parity, part)
        padded = _driver(scheme.data, scheme.parity).decode(
            [headers[index] + bytes(good[index]) for index in chosen]
        )
    payload = padded[: stripe.payload_bytes]
    if blake3(payload).digest() != stripe.payload_hash:
        raise CorruptionError("the shards of a stripe are whole, and do not give what the layout says")
    return payload


def is_shard(stripe: Stripe, scheme: Shards, index: int, shard: Buffer) -> bool:
    """Whether these bytes are the shard of this place."""
    if not 0 <= index < scheme.total or len(shard) != part_bytes(stripe.payload_bytes, scheme):
        return False
    return blake3(shard).digest() == stripe.shards[index]


Fetch = Callable[[Sequence[tuple[int, bytes]]], Mapping[int, Buffer]]
"""Shards by place and hash, all at once; what cannot be had is left out."""


def gather(stripe: Stripe, scheme: Shards, order: Sequence[int], fetch: Fetch) -> bytes:
    """The payload, from as few shards as it takes: the first of ``order``, and others for those that fail.

    Raises:
        UnavailableError, CorruptionError: as :func:`decode_stripe`.
    """
    good: dict[int, Buffer] = {}
    todo = list(order)
    while len(good) < scheme.data and todo:
        asked, todo = todo[: scheme.data - len(good)], todo[scheme.data - len(good) :]
        found = fetch([(index, stripe.shards[index]) for index in asked])
        good |= {
            index: found[index]
            for index in asked
            if index in found and is_shard(stripe, scheme, index, found[index])
        }
    return decode_stripe(stripe, scheme, good)


def repair(stripe: Stripe, scheme: Shards, shards: Mapping[int, Buffer]) -> dict[int, bytes]:
    """The shards that are missing from ``shards`` or not what they should be, made anew from the others.

    Raises:
        UnavailableError, CorruptionError: as :func:`decode_stripe`.
    """
    lost = [
        index
        for index in range(scheme.total)
        if index not in shards or not is_shard(stripe, scheme, index, shards[index])
    ]
    if not lost:
        return {}
    made = encode_stripe(decode_stripe(stripe, scheme, shards), scheme)
    return {index: made[index] for index in lost}


# --- the layout as bytes ---------------------------------------------------------------------------


def encode_layout(layout: Layout) -> bytes:
    """Magic, MessagePack, and the BLAKE3 of both."""
    scheme = layout.scheme
    document = [
        layout.home,
        layout.capsule,
        layout.position,
        layout.size,
        layout.mtime,
        layout.name,
        [scheme.data, scheme.parity],
        list(layout.zones),
        [
            [each.offset, each.length, each.payload_bytes, each.payload_hash, b"".join(each.shards)]
            for each in layout.stripes
        ],
    ]
    body = MAGIC + msgpack.packb(document)
    return bytes(body + blake3(body).digest())


def decode_layout(data: Buffer) -> Layout:
    """The layout these bytes are.

    Raises:
        CorruptionError: they are none.
    """
    raw = bytes(data)
    if len(raw) > LAYOUT_BYTES_MAX or not raw.startswith(MAGIC):
        raise CorruptionError("not a layout of shards")
    body, digest = raw[:-HASH_BYTES], raw[-HASH_BYTES:]
    if blake3(body).digest() != digest:
        raise CorruptionError("a layout of shards with wrong or missing bytes")
    try:
        return _checked(_layout(msgpack.unpackb(body[len(MAGIC) :])))
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, SpaceError) as error:
        raise CorruptionError(f"not a layout of shards: {error!r:.200}") from None


def _layout(document: Any) -> Layout:
    home, capsule, position, size, mtime, name, scheme, zones, stripes = document
    data, parity = scheme
    made = []
    for offset, length, payload_bytes, payload_hash, hashes in stripes:
        cut = tuple(hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES))
        made.append(Stripe(offset, length, payload_bytes, payload_hash, cut))
    scheme = Shards(data, parity)
    return Layout(home, capsule, position, size, mtime, name, scheme, tuple(zones), tuple(made))


def _checked(layout: Layout) -> Layout:
    scheme = layout.scheme
    numbers = (scheme.data, scheme.parity, layout.position, layout.size, layout.mtime)
    ids = (layout.home, layout.capsule, *layout.zones)
    if any(type(each) is not int for each in numbers) or not 0 <= layout.size < 1 << 63:
        raise ValueError("numbers")
    if scheme.data < 2 or scheme.parity < 1 or scheme.total > SHARDS_MAX:
        raise ValueError("numbers of shards")
    if any(type(each) is not bytes or len(each) != ID_BYTES for each in ids):
        raise ValueError("ids")
    if len(set(layout.zones)) != scheme.total or len(layout.zones) != scheme.total:
        raise ValueError("zones")
    if type(layout.name) is not bytes or len(layout.name) > NAME_BYTES_MAX:
        raise ValueError("name")
    if len(layout.stripes) > STRIPES_MAX:
        raise ValueError("number of stripes")
    at = 0
    for each in layout.stripes:
        if any(type(number) is not int for number in (each.offset, each.length, each.payload_bytes)):
            raise ValueError("numbers of a stripe")
        if each.offset < at or each.length < 1 or each.offset + each.length > layout.size:
            raise ValueError("range of a stripe")
        if not 0 < each.payload_bytes <= PAYLOAD_BYTES_MAX:
            raise ValueError("payload of a stripe")
        hashes = (each.payload_hash, *each.shards)
        if len(each.shards) != scheme.total or any(
            type(one) is not bytes or len(one) != HASH_BYTES for one in hashes
        ):
            raise ValueError("hashes of a stripe")
        at = each.offset + each.length
    return layout


# --- the library -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _driver(data: int, parity: int) -> ECDriver:
    try:
        from pyeclib.ec_iface import ECDriver
    except ImportError:
        raise UnavailableError(
            "shards are computed by pyeclib, which is not installed",
            hint="pip install 'space-store[federation]'",
        ) from None
    return ECDriver(k=data, m=parity, ec_type=_BACKEND)


@functools.lru_cache(maxsize=16)
def _headers(data: int, parity: int, part: int) -> tuple[bytes, ...]:
    """What the library puts before shards of this length: it depends on nothing else, so zeros give it too."""
    fragments = _driver(data, parity).encode(bytes(part * data))
    return tuple(fragment[:-part] for fragment in fragments)
