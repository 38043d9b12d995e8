"""A zone in memory: a log whose every position can be looked at, made of the same parts as a store."""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import attrs
import msgpack
from crc32c import crc32c

from space._errors import SpaceError
from space.content.cache import FrameCache
from space.content.frames import FrameRef, pack_frames
from space.content.keys import Keyring, generate_master_key
from space.content.pipeline import ContentReader, ContentWriter
from space.events import commands as cmd
from space.events.commands import Buffer, Receipt, Request, StoredFrame
from space.events.types import Event, ZoneKind
from space.federation.initial import initial
from space.federation.scope import Extent, Moment
from space.federation.sealing import is_for_home, open_key, seal_key
from space.federation.selection import Selection
from space.federation.shipment import Shipment, decode_shipment, encode_shipment
from space.federation.stream import Begin, Cursor, Streams, begin
from space.federation.translate import Batch, Part, Translator, is_quiet
from space.policy.model import Policy
from space.projections import content_map
from space.projections.contract import builtin_views
from space.statemachine import zones as rows
from space.statemachine.sequencer import prepare
from space.statemachine.tables import KEY, RECLAIMED, U32, U64, CapsuleRow, Overlay

FRAME_BYTES: Final = 512
"""Small, so that few bytes make many frames."""


class Tables:
    """:class:`space.statemachine.tables.Writer` in memory, ordered; cheap to copy."""

    def __init__(self, rows: dict[int, dict[bytes, bytes]] | None = None) -> None:
        self._rows: dict[int, dict[bytes, bytes]] = rows or {}
        self._keys: dict[int, list[bytes]] = {}
        self._shared: set[int] = set()

    def copy(self) -> Tables:
        """The same rows, on their own from now on: tables are shared until somebody writes."""
        made = Tables(dict(self._rows))
        made._keys = dict(self._keys)
        made._shared = set(self._rows)
        self._shared = set(self._rows)
        return made

    def _own(self, table: int) -> dict[bytes, bytes]:
        if table in self._shared:
            self._rows[table] = dict(self._rows[table])
            self._shared.discard(table)
        return self._rows.setdefault(table, {})

    def _sorted(self, table: int) -> list[bytes]:
        keys = self._keys.get(table)
        if keys is None:
            keys = self._keys[table] = sorted(self._rows.get(table, {}))
        return keys

    def get(self, table: int, key: bytes) -> bytes | None:
        """The row, or None."""
        return self._rows.get(table, {}).get(key)

    def getter(self, table: int) -> Callable[[bytes], bytes | None]:
        """``get`` of one table."""
        return lambda key: self.get(table, key)

    def scan(self, table: int, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Rows in key order, as they were when the scan began."""
        keys, found = self._sorted(table), self._rows.get(table, {})
        at = bisect.bisect_left(keys, max(prefix, start))
        for key in keys[at:]:
            if not key.startswith(prefix):
                return
            yield key, found[key]

    def last_at_or_before(self, table: int, key: bytes) -> tuple[bytes, bytes] | None:
        """The row with the greatest key not above."""
        keys = self._sorted(table)
        at = bisect.bisect_right(keys, key)
        return (keys[at - 1], self._rows[table][keys[at - 1]]) if at else None

    def put(self, table: int, key: bytes, value: bytes) -> None:
        """Sets a row."""
        found = self._own(table)
        if key not in found:
            self._keys.pop(table, None)
        found[bytes(key)] = bytes(value)

    def put_sorted(self, table: int, rows: list[tuple[bytes, bytes]]) -> None:
        """Sets rows that come in key order."""
        for key, value in rows:
            self.put(table, key, value)

    def delete(self, table: int, key: bytes) -> None:
        """Removes a row."""
        if self._own(table).pop(key, None) is not None:
            self._keys.pop(table, None)


@attrs.frozen
class Seen(Moment):
    """A position of a zone's log, to be looked at for ever."""

    state: Tables

    def extents(self, capsule: bytes, offset: int, length: int) -> Iterator[Extent]:
        """What a range is made of."""
        yield from content_map.extents(self.state, capsule, offset, length)

    def row(self, capsule: bytes) -> CapsuleRow | None:
        """The row of a capsule."""
        return Overlay(self.state).capsule(capsule)


@attrs.define
class Logged:
    """A batch of the log."""

    position: int
    time_ns: int
    events: list[Event]
    payload: bytes


class MemoryZone:
    """A zone: commands in, a log with all its moments; keys and content as in a store.

    With ``keep_moments`` False only the present can be looked at.
    """

    def __init__(self, name: str, seed: int, *, keep_moments: bool = True) -> None:
        self.name = name
        self.random = random.Random(f"{name} {seed}")
        self.id = self.random.randbytes(16)
        self.private = self.random.randbytes(32)
        self.public = _public(self.private)
        self.tables = Tables()
        self.views = builtin_views()
        self.log: list[Logged] = []
        self.moments: list[Seen] = [Seen(Tables())]
        self._keep = keep_moments
        self.time_ns = 1_700_000_000_000_000_000
        store_key = self.random.randbytes(32)
        self.keyring = Keyring(
            self._wrapped,
            store_key=store_key,
            master_keys=(generate_master_key(self.random.randbytes),),
            random_bytes=self.random.randbytes,
        )
        self._cache = FrameCache(1 << 20)
        self.reader = ContentReader(
            fetch=self._fetch, keyring=self.keyring, cache=self._cache, hash_key=self.keyring.hash_key()
        )
        self.writer = ContentWriter(
            keyring=self.keyring,
            hash_key=self.keyring.hash_key(),
            find=lambda _: None,
            random_bytes=self.random.randbytes,
            frame_bytes=FRAME_BYTES,
            threads=1,
        )
        self.must(cmd.InitialiseStore(self.random.randbytes(16), 0o755, 0, 0))
        self.must(cmd.DefineZone(self.id, name, ZoneKind.METRO, f"https://{name}", b"pem", self.public))

    # --- commands ----------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """The last position of the log."""
        return len(self.log)

    def add_zone(self, other: MemoryZone) -> None:
        """Makes another zone known."""
        self.must(
            cmd.AddZone(other.id, other.name, ZoneKind.METRO, f"https://{other.name}", b"pem", other.public)
        )

    def execute(self, commands: Sequence[cmd.Command], *, tick_ns: int = 1_000) -> list[Receipt | SpaceError]:
        """Carries out commands, as many of them in one batch as fit."""
        requests = [Request(each) for each in commands]
        outcomes: list[Receipt | SpaceError] = []
        while len(outcomes) < len(requests):
            self.time_ns += tick_ns
            batch = prepare(
                self.tables,
                requests[len(outcomes) :],
                position=self.position + 1,
                time_ns=self.time_ns,
            )
            outcomes += batch.outcomes
            if not batch.entries:
                continue
            batch.overlay.flush(self.tables)
            linked = batch.linked()
            for view in self.views:
                folder = view.folder(self.tables)
                for context, _, event in linked:
                    handler = folder.handlers.get(type(event))
                    if handler is not None:
                        handler(context, event)
                folder.flush()
            payload = b"".join(map(bytes, batch.payload))
            self.log.append(Logged(batch.position, self.time_ns, [event for _, _, event in linked], payload))
            self.moments.append(Seen(self.tables.copy()) if self._keep else self.moments[0])
        return outcomes

    def must(self, *commands: cmd.Command) -> int:
        """Carries out commands that are possible, in one batch; its position."""
        for outcome in self.execute(commands):
            if isinstance(outcome, SpaceError):
                raise outcome
        return self.position

    # --- content -----------------------------------------------------------------------------------

    def _wrapped(self, key: int, version: int) -> bytes | None:
        return self.tables.get(KEY, U32.pack(key) + U32.pack(version))

    def _fetch(self, position: int, offset: int, length: int) -> bytes:
        return self.log[position - 1].payload[offset : offset + length]

    def stored(self, frame: FrameRef, position: int) -> Buffer | None:
        """Stored bytes of a frame; None if they were reclaimed."""
        for key, value in self.tables.scan(RECLAIMED, U64.pack(position)):
            start = U32.unpack(key[8:])[0]
            if start <= frame.payload_offset < start + U32.unpack(value)[0]:
                return None
        stored = self._fetch(position, frame.payload_offset, frame.stored_length)
        assert crc32c(stored) == frame.crc
        return stored

    def recut(self, extent: Extent, policy: Policy, key: int) -> list[StoredFrame] | None:
        """Frames for exactly what an extent shows."""
        shown = self.reader.read(extent.frames, extent.position, extent.skip, extent.length)
        return self.encode(shown, policy, key)

    def encode(self, data: bytes, policy: Policy, key: int) -> list[StoredFrame]:
        """Frames that hold some bytes."""
        encoded = self.writer.encode(data, policy, (key, 1) if key else None)
        return [StoredFrame(pack_frames((frame.ref,)), frame.stored) for frame in encoded]

    def new_key(self) -> cmd.NewKey:
        """A wrapped data key."""
        key = int.from_bytes(self.random.randbytes(4), "little") | 1
        return cmd.NewKey(key, 1, self.keyring.wrap(key, 1, self.keyring.new_data_key()))

    def read(self, moment: Seen, capsule: bytes) -> bytes:
        """The content of a file at a moment."""
        row = moment.row(capsule)
        assert row is not None
        found = bytearray(row.size)
        for extent in moment.extents(capsule, 0, row.size):
            end = extent.offset + extent.length
            found[extent.offset : end] = self.reader.read(
                extent.frames, extent.position, extent.skip, extent.length
            )
        return bytes(found)

    # --- federation --------------------------------------------------------------------------------

    def translator(self, other: MemoryZone) -> Translator:
        """What tells another zone about this one."""

        def seal(key: int, version: int, wrapped: bytes, for_home: bool) -> bytes:
            return seal_key(
                self.keyring.unwrap(key, version, wrapped),
                (key, version),
                home=self.id,
                zone=other.id,
                public=self.public if for_home else other.public,
                for_home=for_home,
                random_bytes=self.random.randbytes,
            )

        return Translator(self.id, self.name, Selection(other.name), seal, zone=other.id)

    def batch(self, position: int) -> Batch:
        """A batch of the log as translation wants it."""
        logged = self.log[position - 1]
        return Batch(position, logged.time_ns, logged.events)

    def adopted(self, command: Any, home: bytes) -> Any:
        """A command of a shipment with the keys in it wrapped for this zone."""
        if isinstance(command, cmd.ReceiveShipment | cmd.Copied):
            return attrs.evolve(command, commands=[self.adopted(each, home) for each in command.commands])
        key = getattr(command, "key", None)
        if not isinstance(key, cmd.NewKey) or is_for_home(key.wrapped) or not key.wrapped:
            return command
        number = (key.key, key.version)
        opened = open_key(key.wrapped, number, home=home, zone=self.id, private=self.private)
        return attrs.evolve(command, key=attrs.evolve(key, wrapped=self.keyring.wrap(*number, opened)))

    def cursors(self, home: bytes) -> dict[int, rows.CursorRow]:
        """How far each lane of a zone has come here."""
        return {lane: row for _, lane, row in rows.cursors(self.tables, home)}


def _public(private: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def pack_policy(policy: Policy) -> bytes:
    """A policy as the canonical document events carry."""
    packed: bytes = msgpack.packb(policy.to_document())
    return packed


class Route:
    """A faultless way from a home to another zone, which is brought up to date when asked."""

    def __init__(self, home: MemoryZone, zone: MemoryZone) -> None:
        self.home, self.zone = home, zone
        self.translator = home.translator(zone)
        self.now = 0.0
        self.streams: Streams | None = None

    def connect(self) -> Streams:
        """Begins anew from the receiver's cursors."""
        cursors = {
            lane: Cursor(r.position, r.step, r.resume) for lane, r in self.zone.cursors(self.home.id).items()
        }
        at = begin(cursors) or Begin(self.home.position, copying=True)
        streams = self.streams = Streams(self.home.id, self.zone.id, 0, cursors, at)
        if at.copying:
            time_ns = self.home.log[at.position - 1].time_ns
            sent = [capsule for capsule, _ in rows.sent_capsules(self.home.tables, self.zone.id)]
            parts = initial(self.translator, self.home.moments[at.position], at.position, time_ns, sent)
            streams.add(parts, at.position, time_ns)
        return streams

    def read(self) -> list[Part]:
        """Translates all of the log that was not yet."""
        streams = self.streams or self.connect()
        found: list[Part] = []
        while streams.position < self.home.position and not streams.full:
            position = streams.position + 1
            moments, batch = self.home.moments, self.home.batch(position)
            parts = self.translator.translate(moments[position - 1], moments[position], batch)
            streams.add(parts, position, batch.time_ns, quiet=is_quiet(batch.events))
            found += parts
        return found

    def run(self) -> list[Shipment]:
        """Ships all there is; what was shipped, decoded."""
        streams = self.streams or self.connect()
        found: list[Shipment] = []
        while True:
            self.read()
            self.now += 100.0
            outgoing = streams.next(self.home, self.now)
            if outgoing is None:
                return found
            shipment = decode_shipment(encode_shipment(outgoing.shipment))
            for command in shipment.received():
                self.zone.must(self.zone.adopted(command, self.home.id))
            position, step = shipment.through
            streams.acknowledge(shipment.lane, position, step)
            found.append(shipment)

    def commands(self) -> list[cmd.Command]:
        """Ships all there is; the commands of it."""
        return [
            command for shipment in self.run() for entry in shipment.entries for command in entry.commands
        ]
