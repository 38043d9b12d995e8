"""Shards of this store's capsules in other zones: made, kept up to date, and read back.

The order of things makes every moment one that can be read: shards first, in all zones; when all are there the layout,
in all zones; the shards of the layout before go with it, in each zone by itself.  Whoever reads takes the newest layout
that any zone it reaches has: its shards were in all zones before it was in one.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import attrs

from space._errors import (
    CorruptionError,
    NotFoundError,
    RefusedError,
    SpaceError,
    Status,
    UnavailableError,
    UsageError,
)
from space._node.federation_keys import ZoneAuthority, ZoneKeys
from space._node.federation_shelf import OwnZone, StoreShelf
from space._node.federation_zones import Zone, Zones
from space.content.cache import FrameCache
from space.content.frames import Buffer, unpack_frames
from space.content.keys import KEY_BYTES, Keyring, generate_master_key
from space.content.pipeline import ContentReader
from space.events.ids import CapsuleId
from space.federation.compiler import permitted
from space.federation.exchange import addresses, error_in, parse_document
from space.federation.parity import (
    HASH_BYTES,
    PAYLOAD_BYTES_MAX,
    SHARD_BYTES_MAX,
    STRIPES_MAX,
    Layout,
    Stripe,
    decode_layout,
    encode_layout,
    encode_stripe,
    gather,
    is_shard,
    repair,
    stripe_of,
)
from space.federation.sealing import open_key, seal_key
from space.federation.shelf import (
    HELD_BYTES_MAX,
    LAYOUTS,
    ROOM,
    SHARDS,
    Held,
    Room,
    SealedKey,
    ZoneClient,
    decode_held,
    encode_held,
)
from space.federation.stripes import STRIPE_BYTES, Part, pack_payload, stored_bytes, unpack_payload
from space.policy.model import Policy, Shards
from space.projections import content_map
from space.statemachine.store import ReadTransaction

if TYPE_CHECKING:
    from space._node.store import Store

CONNECT_SECONDS: Final = 10.0
ANSWER_SECONDS: Final = 120.0
"""How long a zone may take over one shard, or over looking whether it has some: a slow link, a slow disk."""

ASKED: Final = 64
"""Shards a zone is asked about at once: it reads each of them to see that it is whole."""


class HttpZone:
    """Another zone as a :class:`space.federation.shelf.ZoneClient`; keeps connections for the next who asks."""

    def __init__(self, zone: Zone, keys: ZoneKeys) -> None:
        self._zone = zone
        self._tls = keys.client_context(ZoneAuthority.parse(zone.authorities))
        self._idle: list[http.client.HTTPSConnection] = []
        self._lock = threading.Lock()

    def room(self) -> Room:
        said = self._document("GET", ROOM)
        free, total = said.get("free_bytes"), said.get("total_bytes")
        if type(free) is not int or type(total) is not int or not 0 <= free <= total:
            raise UnavailableError(f"zone {self._zone.name} does not say how much room it has")
        return Room(free, total)

    def put_shard(self, capsule: bytes, shard: bytes, body: bytes) -> None:
        self._document("PUT", f"{SHARDS}/{CapsuleId(capsule)}/{shard.hex()}", body)

    def get_shard(self, home: bytes, capsule: bytes, shard: bytes) -> bytes:
        path = f"{SHARDS}/{uuid.UUID(bytes=home)}/{CapsuleId(capsule)}/{shard.hex()}"
        return self._answer("GET", path, b"", SHARD_BYTES_MAX)

    def missing(self, capsule: bytes, shards: Sequence[bytes]) -> list[bytes]:
        found: list[bytes] = []
        for at in range(0, len(shards), ASKED):
            path = f"{SHARDS}/{CapsuleId(capsule)}/missing"
            found += self._hashes(self._document("POST", path, b"".join(shards[at : at + ASKED])))
        return found

    def put_layout(self, capsule: bytes, held: Held) -> list[bytes]:
        return self._hashes(self._document("PUT", f"{LAYOUTS}/{CapsuleId(capsule)}", encode_held(held)))

    def get_layout(self, home: bytes, capsule: bytes) -> Held:
        path = f"{LAYOUTS}/{uuid.UUID(bytes=home)}/{CapsuleId(capsule)}"
        return decode_held(self._answer("GET", path, b"", HELD_BYTES_MAX))

    def delete(self, capsule: bytes) -> None:
        self._document("DELETE", f"{SHARDS}/{CapsuleId(capsule)}")

    def close(self) -> None:
        """Hangs up."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _hashes(self, document: Mapping[str, Any]) -> list[bytes]:
        try:
            found = [bytes.fromhex(text) for text in document["missing"]]
        except (KeyError, TypeError, ValueError):
            found = [b""]
        if any(len(each) != HASH_BYTES for each in found):
            raise UnavailableError(f"zone {self._zone.name} does not say which shards it has")
        return found

    def _document(self, method: str, path: str, body: bytes = b"") -> Mapping[str, Any]:
        return parse_document(self._answer(method, path, body, 8 << 20))

    def _answer(self, method: str, path: str, body: bytes, limit: int) -> bytes:
        """What it answers; a connection that was left open for too long is made anew.

        Raises:
            UnavailableError: nothing, too much, or not in time.
            SpaceError: the error it answers with.
        """
        with self._lock:
            kept = self._idle.pop() if self._idle else None
        connection = kept or self._connection()
        try:
            status, answer = _ask(connection, method, path, body, limit)
        except (OSError, http.client.HTTPException):
            connection.close()
            if kept is not None:
                self.close()
                return self._answer(method, path, body, limit)
            raise self._silent() from None
        if len(answer) > limit:
            connection.close()
            raise UnavailableError(f"zone {self._zone.name} answers with more than {limit} bytes")
        with self._lock:
            self._idle.append(connection)
        if status != http.HTTPStatus.OK:
            error = error_in(parse_document(answer)) if answer.startswith(b"{") else None
            raise error or UnavailableError(f"zone {self._zone.name} answered {status}")
        return answer

    def _connection(self) -> http.client.HTTPSConnection:
        """A connection to the first of its addresses that takes one."""
        if not self._zone.url:
            raise UnavailableError(f"zone {self._zone.name} has no address", hint="space zone add --url")
        for url in map(urlsplit, addresses(self._zone.url)):
            made = http.client.HTTPSConnection(
                url.hostname or "", url.port, timeout=CONNECT_SECONDS, context=self._tls
            )
            try:
                made.connect()
            except OSError:
                made.close()
            else:
                made.sock.settimeout(ANSWER_SECONDS)
                return made
        raise self._silent()

    def _silent(self) -> UnavailableError:
        return UnavailableError(
            f"zone {self._zone.name} does not answer at {self._zone.url}",
            hint="space federation serve has to run there",
        )


def _ask(
    connection: http.client.HTTPSConnection, method: str, path: str, body: bytes, limit: int
) -> tuple[int, bytes]:
    connection.request(method, path, body, {"Content-Type": "application/octet-stream"})
    response = connection.getresponse()
    return response.status, response.read(limit + 1)


@attrs.frozen
class ShardZone:
    """A zone that has shards, and how it is asked.

    Attributes:
        id: 16 bytes.
        name: for messages.
        sealing: the X25519 public key that keys are sealed for it with.
        client: how it is asked.
        kind: metro, geo or edge.
        rtt_ns: how far it is, to read from the nearest.
    """

    id: bytes
    name: str
    sealing: bytes
    client: ZoneClient
    kind: str = "metro"
    rtt_ns: int | None = None


@attrs.frozen
class Spread:
    """What making shards did.

    Attributes:
        layout: of the shards there are now.
        sent: shards that had to go, and ``sent_bytes`` how much that was.
    """

    layout: Layout
    sent: int
    sent_bytes: int


def spread(
    store: Store, home: Zone, zones: Sequence[ShardZone], capsule: CapsuleId, scheme: Shards
) -> Spread:
    """Makes the shards of a capsule as it is now, and puts into each zone what it has not got.

    Raises:
        RefusedError: its policy does not ask for them.
        UnavailableError: a zone cannot be reached: the shards there were stay valid.
        UsageError: it has more stripes than a layout holds, or there is another number of zones.
        CorruptionError: what is stored is damaged.
    """
    if len(zones) != scheme.total:
        raise UsageError(f"{scheme.total} shards for {len(zones)} zones")
    own = StoreShelf(store, home.id)
    sealed_home = store.policy(capsule).federation_sealed
    keys: set[tuple[int, int]] = set()
    stripes: list[Stripe] = []
    sent = [0, 0]
    store.pinned[capsule] += 1
    try:
        with store._read() as txn, ThreadPoolExecutor(len(zones), "space-shards") as pool:
            row = store._row(txn, capsule)
            position = txn.applied.position
            _check_policy(store._policy(txn, row.policy), scheme, home, zones, capsule)
            for offset, length, parts in _cut(txn, capsule, store._size(txn, capsule)):
                if len(stripes) >= STRIPES_MAX:
                    raise UsageError(f"capsule {capsule} has more than {STRIPES_MAX} stripes")
                payload = _packed(store, parts)
                shards = encode_stripe(payload, scheme)
                stripe = stripe_of(offset, length, payload, shards)
                stripes.append(stripe)
                keys |= _keys_of(parts)
                for count in pool.map(_put_missing(capsule, stripe, shards), zones, range(scheme.total)):
                    sent[0] += count > 0
                    sent[1] += count
    finally:
        store.pinned[capsule] -= 1
        if not store.pinned[capsule]:
            del store.pinned[capsule]
    layout = Layout(
        home.id,
        bytes(capsule),
        position,
        row.size,
        row.mtime,
        _name_of(store, capsule),
        scheme,
        tuple(zone.id for zone in zones),
        tuple(stripes),
    )
    packed = encode_layout(layout)
    for zone in zones:
        for_home = sealed_home and zone.id != home.id
        sealed = tuple(
            SealedKey(*number, _sealed(store, number, home, zone, for_home=for_home))
            for number in sorted(keys)
        )
        if zone.client.put_layout(bytes(capsule), Held(packed, sealed)):
            raise UnavailableError(f"zone {zone.name} has lost shards it was given", hint="try again")
    if all(zone.id != home.id for zone in zones):
        own.put_layout(home.id, bytes(capsule), Held(packed))
    return Spread(layout, sent[0], sent[1])


def _check_policy(
    policy: Policy, scheme: Shards, home: Zone, zones: Sequence[ShardZone], capsule: CapsuleId
) -> None:
    """Whether the shards are what the policy asks for, at the position they are made of.

    Raises:
        RefusedError: they are not.
    """
    allowed = permitted(policy, home.name)
    outside = [zone.name for zone in zones if zone.name not in allowed]
    if outside or policy.federation_shards != scheme:
        what = f"no shards in zone {outside[0]}" if outside else "other shards, or none"
        raise RefusedError(f"the policy of capsule {capsule} allows {what}", status=Status.NOT_PERMITTED)


def _packed(store: Store, parts: Sequence[Part]) -> bytes:
    """The payload of parts.

    Raises:
        RefusedError: gc gave bytes of it back meanwhile.
    """
    try:
        return pack_payload(parts, store.wal.read_payload)
    except CorruptionError as error:
        raise store._located(error) from None


def _put_missing(
    capsule: CapsuleId, stripe: Stripe, shards: Sequence[bytes]
) -> Callable[[ShardZone, int], int]:
    def put(zone: ShardZone, index: int) -> int:
        if not zone.client.missing(bytes(capsule), [stripe.shards[index]]):
            return 0
        zone.client.put_shard(bytes(capsule), stripe.shards[index], shards[index])
        return len(shards[index])

    return put


def _cut(txn: ReadTransaction, capsule: CapsuleId, size: int) -> Iterator[tuple[int, int, list[Part]]]:
    """Ranges with data and their parts, each small enough for a payload."""
    todo = [(at, min(at + STRIPE_BYTES, size)) for at in _data_ranges(txn, capsule, size)]
    todo.reverse()
    while todo:
        start, end = todo.pop()
        parts = _parts(txn, capsule, start, end)
        if not parts:
            continue
        if stored_bytes(parts) <= PAYLOAD_BYTES_MAX:
            yield start, end - start, parts
            continue
        middle = (start + end) // 2  # a single byte is one frame, which fits
        todo += [(middle, end), (start, middle)]


def _data_ranges(txn: ReadTransaction, capsule: CapsuleId, size: int) -> list[int]:
    """Where stripes with data begin; one pass over the extents, so that a hole of an exbibyte costs nothing."""
    begins: list[int] = []
    for extent in content_map.extents(txn, capsule, 0, size):
        first = extent.offset - extent.offset % STRIPE_BYTES
        for begin in range(first, min(extent.end, size), STRIPE_BYTES):
            if not begins or begins[-1] < begin:
                begins.append(begin)
        if len(begins) > STRIPES_MAX:
            raise UsageError(f"capsule {capsule} has more than {STRIPES_MAX} stripes")
    return begins


def _parts(txn: ReadTransaction, capsule: CapsuleId, start: int, end: int) -> list[Part]:
    return [
        Part(extent.offset, extent.length, extent.position, extent.skip, extent.frames)
        for extent in content_map.extents(txn, capsule, start, end - start)
    ]


def _keys_of(parts: Sequence[Part]) -> set[tuple[int, int]]:
    return {
        (frame.key_id, frame.key_version)
        for part in parts
        for frame in unpack_frames(part.frames)
        if frame.key_id
    }


def _name_of(store: Store, capsule: CapsuleId) -> bytes:
    paths = store.paths_of(capsule)
    return paths[0].rpartition(b"/")[2] if paths else b""


def _sealed(store: Store, number: tuple[int, int], home: Zone, zone: ShardZone, *, for_home: bool) -> bytes:
    row = store._wrapped_key(*number)
    if row is None:
        raise NotFoundError(f"key {number[0]} version {number[1]} does not exist")
    return seal_key(
        store._keyring.unwrap(*number, row),
        number,
        home=home.id,
        zone=zone.id,
        public=home.sealing if for_home else zone.sealing,
        for_home=for_home,
        random_bytes=store._random_bytes,
    )


# --- reading back ----------------------------------------------------------------------------------


@attrs.frozen
class Collected:
    """A capsule as its shards have it: ``content`` yields ``layout.size`` bytes in order, in bounded memory."""

    layout: Layout
    content: Iterator[Buffer]


def collect(store: Store, zones: Sequence[ShardZone], capsule: CapsuleId) -> Collected:
    """The newest content of a capsule that its shards give, from the nearest zones that have them.

    ``zones`` are all there are, this one included.

    Raises:
        NotFoundError: no zone that answers has a layout of it.
        UnavailableError: (also while reading) too few of its zones answer with whole shards.
    """
    own = Zones(store).own()
    if own is None:
        raise NotFoundError(f"store {store.path} is in no zone", hint="space zone init NAME")
    shelf = StoreShelf(store, own.id)
    here = [layout for layout in shelf.layouts() if layout.capsule == capsule]
    if not here:
        raise NotFoundError(f"this zone has no shards of capsule {capsule}")
    layout = _newest(zones, max(here, key=lambda each: each.position), own)
    keyring = _keyring(store, shelf, layout, own)
    return Collected(layout, _content(layout, _by_place(zones, layout), keyring))


def _newest(zones: Sequence[ShardZone], known: Layout, own: Zone) -> Layout:
    """The newest of the layouts that a zone has and this one holds the keys for."""
    best = known
    for zone in zones:
        if zone.id == own.id:
            continue
        try:
            found = decode_layout(zone.client.get_layout(known.home, known.capsule).layout)
        except SpaceError:
            continue
        if (found.home, found.capsule) == (known.home, known.capsule) and found.position > best.position:
            best = found
    return best


def _by_place(zones: Sequence[ShardZone], layout: Layout) -> dict[int, ShardZone]:
    """The zones of a layout that are known, by their place in it, nearest first."""
    found = {zone.id: zone for zone in zones}
    places = [(index, found[zone]) for index, zone in enumerate(layout.zones) if zone in found]
    far = 1 << 62
    places.sort(key=lambda place: (far if place[1].rtt_ns is None else place[1].rtt_ns, place[0]))
    return dict(places)


def _content(layout: Layout, places: Mapping[int, ShardZone], keyring: Keyring) -> Iterator[Buffer]:
    at = 0
    with ThreadPoolExecutor(max(1, len(places)), "space-shards") as pool:
        failed: set[int] = set()

        def fetch(wanted: Sequence[tuple[int, bytes]]) -> dict[int, bytes]:
            def one(place: tuple[int, bytes]) -> bytes | None:
                try:
                    return places[place[0]].client.get_shard(layout.home, layout.capsule, place[1])
                except UnavailableError:
                    failed.add(place[0])
                except SpaceError:
                    pass
                return None

            bodies = pool.map(one, wanted)
            return {index: body for (index, _), body in zip(wanted, bodies, strict=True) if body is not None}

        for stripe in layout.stripes:
            order = sorted(places, key=lambda index: index in failed)  # stable: the nearest that answer first
            payload = gather(stripe, layout.scheme, order, fetch)
            yield from _zeros(stripe.offset - at)
            yield from _stripe_content(stripe, payload, keyring)
            at = stripe.offset + stripe.length
    yield from _zeros(layout.size - at)


def _stripe_content(stripe: Stripe, payload: bytes, keyring: Keyring) -> Iterator[Buffer]:
    parts, frames = unpack_payload(payload)
    reader = ContentReader(
        fetch=lambda _, offset, length: frames[offset : offset + length],
        keyring=keyring,
        cache=FrameCache(STRIPE_BYTES),
        hash_key=bytes(KEY_BYTES),
    )
    at = stripe.offset
    for part in parts:
        yield from _zeros(part.offset - at)
        yield from reader.read_parts(part.frames, 0, part.skip, part.length)
        at = part.end
    yield from _zeros(stripe.offset + stripe.length - at)


def _zeros(length: int) -> Iterator[Buffer]:
    piece = bytes(min(length, 1 << 20)) if length > 0 else b""
    while length > 0:
        yield piece[:length]
        length -= len(piece)


def _keyring(store: Store, shelf: StoreShelf, layout: Layout, own: Zone) -> Keyring:
    """What opens the content: the store's own keys at home, elsewhere those that were sealed for this zone."""
    if layout.home == own.id:
        return store._keyring
    held = shelf.get_layout(own.id, layout.home, layout.capsule)
    private = Zones(store).keys().sealing.private_bytes_raw()
    rows: dict[tuple[int, int], bytes] = {}
    ring = Keyring(
        lambda key, version: rows.get((key, version)),
        store_key=bytes(KEY_BYTES),
        master_keys=(generate_master_key(),),
    )
    for key in held.keys:
        number = (key.key, key.version)
        opened = open_key(key.sealed, number, home=layout.home, zone=own.id, private=private)
        rows[number] = ring.wrap(*number, opened)
    return ring


# --- repair ----------------------------------------------------------------------------------------


@attrs.frozen
class Mended:
    """What looking after shards found: how many there are to be, were lost, and are there again."""

    shards: int
    lost: int
    mended: int


def mend(zones: Sequence[ShardZone], layout: Layout) -> Mended:
    """Looks whether each zone has its shards, whole, and makes anew from the others those that are not.

    Only the home may put shards, so it is the home that does this.

    Raises:
        UnavailableError: a stripe has too few whole shards left.
    """
    places = _by_place(zones, layout)
    lost_at: dict[int, set[bytes]] = {}
    for index, zone in places.items():
        try:
            lost_at[index] = set(zone.client.missing(layout.capsule, sorted(layout.wanted(index))))
        except UnavailableError:
            continue
    lost = sum(len(each) for each in lost_at.values())
    mended = 0
    for stripe in layout.stripes:
        wrong = [index for index, shards in lost_at.items() if stripe.shards[index] in shards]
        if not wrong:
            continue
        whole: dict[int, Buffer] = {}
        for index, zone in places.items():
            if index in wrong or len(whole) == layout.scheme.data:
                continue
            try:
                body = zone.client.get_shard(layout.home, layout.capsule, stripe.shards[index])
            except SpaceError:
                continue
            if is_shard(stripe, layout.scheme, index, body):
                whole[index] = body
        made = repair(stripe, layout.scheme, whole)
        for index in wrong:
            if stripe.shards[index] in lost_at[index]:
                places[index].client.put_shard(layout.capsule, stripe.shards[index], made[index])
                lost_at[index].discard(stripe.shards[index])  # equal stripes have equal shards
                mended += 1
    return Mended(len(layout.stripes) * len(layout.zones), lost, mended)


@contextlib.contextmanager
def shard_zones(store: Store) -> Iterator[list[ShardZone]]:
    """All zones there are, this one first, and how far they are as far as that was measured.

    Raises:
        NotFoundError: the store is in no zone, or has no keys.
    """
    zones = Zones(store)
    own = zones.own()
    if own is None:
        raise NotFoundError(f"store {store.path} is in no zone", hint="space zone init NAME")
    keys = zones.keys()
    links = {} if store.federation is None else store.federation.distances()
    found = [ShardZone(own.id, own.name, own.sealing, OwnZone(StoreShelf(store, own.id), own.id), rtt_ns=0)]
    with contextlib.ExitStack() as stack:
        for zone in zones.others():
            seconds = links.get(zone.id, {}).get("rtt_seconds")
            rtt_ns = None if seconds is None else int(seconds * 1e9)
            client = stack.enter_context(contextlib.closing(HttpZone(zone, keys)))
            kind = zone.kind.name.lower()
            found.append(ShardZone(zone.id, zone.name, zone.sealing, client, kind, rtt_ns))
        yield found
