"""Rows of the state, the key-value protocols the fold runs on, and the digest over all rows.

The fold sees only :class:`Reader` and :class:`Writer`: LMDB implements them for real
(:mod:`space.statemachine.store`), a sorted map in memory for simulation.  Between the two stands the
:class:`Overlay`: rows changed but not yet written.  The sequencer decides against one (state + what is
in flight), replay folds thousands of events into one before writing them, and flushing it is the one
place where the state digest changes.

Keys are ordered bytes; ids made together sort together (UUIDv7), so fresh rows land side by side.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Final, Protocol

import attrs
from blake3 import blake3

from space._errors import CorruptionError

CAPSULE: Final = 1  # capsule id → CapsuleRow
ENTRY: Final = 2  # parent id + name → EntryRow
XATTR: Final = 3  # capsule id + name → value
ORPHAN: Final = 4  # parent id + name + position (big-endian) → capsule id: what undelete can find
POLICY: Final = 5  # row number (u32) → canonical msgpack document
POLICY_BY_HASH: Final = 6  # BLAKE3 of a document → row number
KEY: Final = 7  # key id (u32) + version (u32) → wrapped key; empty once destroyed
SNAPSHOT: Final = 8  # name → SnapshotRow
REPLY: Final = 9  # client id + sequence ÷ 32 (u64) → replies to those commands (see replies.py)
RECLAIMED: Final = 10  # position (u64) + offset (u32) → length (u32)
COUNTER: Final = 11  # name → u64
MEMBER: Final = 12  # node id (u64) → canonical msgpack [role, address]
NAMESPACE: Final = 13  # BLAKE3 of an NVMe subsystem's name, 16 bytes, + namespace id → number (u32)
RESERVATION: Final = 14  # capsule id → space.statemachine.reservations.State
NFS_CLIENT: Final = (
    15  # BLAKE3 of an NFS server's name, 16 bytes, + BLAKE3 of a client's, 16 bytes → verifier + name
)
ZONE: Final = 16  # zone id → space.statemachine.zones.ZoneRow
HOME: Final = 17  # capsule id → space.statemachine.zones.HomeRow
CURSOR: Final = 18  # zone id + shard (u32) + lane (u32) → space.statemachine.zones.CursorRow
MARK: Final = 19  # zone id + shard (u32) + lane (u32) + position there (u64) → position here (u64)
SENT: Final = 20  # zone id + capsule id → position it was last sent as of (u64)
ZONE_KEY: Final = 21  # key id (u32) → id of the zone it came from

TABLES: Final = {
    CAPSULE: "capsule",
    ENTRY: "entry",
    XATTR: "xattr",
    ORPHAN: "orphan",
    POLICY: "policy",
    POLICY_BY_HASH: "policy_by_hash",
    KEY: "key",
    SNAPSHOT: "snapshot",
    REPLY: "reply",
    RECLAIMED: "reclaimed",
    COUNTER: "counter",
    MEMBER: "member",
    NAMESPACE: "namespace",
    RESERVATION: "reservation",
    NFS_CLIENT: "nfs_client",
    ZONE: "zone",
    HOME: "home",
    CURSOR: "cursor",
    MARK: "mark",
    SENT: "sent",
    ZONE_KEY: "zone_key",
}

REPLICA: Final = 1
"""Flag of a capsule that came in a shipment: HOME has a row for it."""
FEDERATED: Final = 2
"""Flag of the root directory of a store that knows a zone."""
HOME_LOST: Final = 4
"""Flag of the root directory of a store some of whose capsules have their home in a zone they were shipped to."""
MOVED: Final = 8
"""Flag of the root directory of a store that ever gave the home of single capsules to another zone, or took it."""

U32: Final = struct.Struct(">I")
U64: Final = struct.Struct(">Q")
_CAPSULE: Final = struct.Struct("<BBHIIIIIIIQQQ16sqqqqQ16s")
_ENTRY: Final = struct.Struct("<16sQB")
_SNAPSHOT: Final = struct.Struct("<16sQIq")
DIGEST_BYTES: Final = 32
_DIGEST_MODULUS: Final = 1 << (8 * DIGEST_BYTES)


class Reader(Protocol):
    """A consistent snapshot of ordered key-value tables."""

    def get(self, table: int, key: bytes) -> bytes | None:
        """The row, or None."""

    def getter(self, table: int) -> Callable[[bytes], bytes | None]:
        """``get`` of one table, for loops; keys must be of a length the table can hold."""

    def scan(self, table: int, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Rows whose key begins with ``prefix`` and is not below ``start``, in key order."""

    def last_at_or_before(self, table: int, key: bytes) -> tuple[bytes, bytes] | None:
        """The row with the greatest key not above ``key``, or None."""


class Writer(Reader, Protocol):
    """A transaction: what it wrote, it reads."""

    def put(self, table: int, key: bytes, value: bytes) -> None: ...

    def put_sorted(self, table: int, rows: list[tuple[bytes, bytes]]) -> None:
        """Many rows at once, in key order."""

    def delete(self, table: int, key: bytes) -> None: ...


@attrs.define
class CapsuleRow:
    """One capsule: attributes of a file, directory, symlink or device.

    ``entries`` counts names in a directory; ``parent`` is set for directories only; ``change`` is the
    position of the last event that touched it; ``link`` the head of its chain; times are nanoseconds;
    ``deleted`` is the position at which its last name went, or 0; ``flags`` are REPLICA and, of the root
    directory, FEDERATED, HOME_LOST and MOVED.
    """

    kind: int
    flags: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    block_size: int
    policy: int
    key: int
    size: int
    ino: int
    entries: int
    parent: bytes
    atime: int
    mtime: int
    ctime: int
    btime: int
    change: int
    link: bytes
    deleted: int = 0
    target: bytes = b""

    def encode(self) -> bytes:
        head = _CAPSULE.pack(*_packed_fields(self))
        if self.deleted or self.target:
            return head + U64.pack(self.deleted) + self.target
        return head

    @classmethod
    def decode(cls, data: bytes) -> CapsuleRow:
        if len(data) == _CAPSULE.size:
            return cls(*_CAPSULE.unpack(data))
        try:
            fields = _CAPSULE.unpack_from(data)
            (deleted,) = U64.unpack_from(data, _CAPSULE.size)
        except struct.error:
            raise CorruptionError(
                "a capsule row of the state is malformed", hint="run: space replay"
            ) from None
        row = cls(*fields)
        row.deleted = deleted
        row.target = data[_CAPSULE.size + U64.size :]
        return row

    def copy(self) -> CapsuleRow:
        row = CapsuleRow(*_packed_fields(self))
        row.deleted, row.target = self.deleted, self.target
        return row


_packed_fields: Final = attrgetter(*(field.name for field in attrs.fields(CapsuleRow)[:-2]))
"""The fields every row has, in the order they are packed; ``deleted`` and ``target`` follow only where set."""


@attrs.frozen
class EntryRow:
    """What a directory entry leads to; kind and inode number ride along so that listing needs no second look."""

    capsule: bytes
    ino: int
    kind: int

    def encode(self) -> bytes:
        return _ENTRY.pack(self.capsule, self.ino, self.kind)

    @classmethod
    def decode(cls, data: bytes) -> EntryRow:
        return cls(*_ENTRY.unpack(data))


@attrs.frozen
class SnapshotRow:
    """A named moment of a capsule or tree: right after event ``event`` of batch ``position``."""

    capsule: bytes
    position: int
    event: int
    time_ns: int

    def encode(self) -> bytes:
        return _SNAPSHOT.pack(self.capsule, self.position, self.event, self.time_ns)

    @classmethod
    def decode(cls, data: bytes) -> SnapshotRow:
        return cls(*_SNAPSHOT.unpack(data))


_BYTE: Final = [bytes((number,)) for number in range(256)]


def row_hash(table: int, key: bytes, value: bytes) -> int:
    """One row's share of the digest: BLAKE3 as an integer.

    The digest is the sum of all shares modulo 2**256: an additive multiset hash (Clarke et al.,
    "Incremental multiset hash functions", 2003), so a row change costs two hashes whatever the size of
    the state.  It detects divergence; proof against a forger is the log's hash chain.
    """
    return int.from_bytes(blake3(_BYTE[table] + _BYTE[len(key) & 0xFF] + key + value).digest(), "little")


def table_digest(reader: Reader, table: int) -> int:
    """The digest share of a whole table, by scanning it."""
    total = sum(row_hash(table, key, value) for key, value in reader.scan(table, b""))
    return total % _DIGEST_MODULUS


def format_digest(digest: int) -> str:
    """A digest as users see it."""
    return f"blake3-add:{digest % _DIGEST_MODULUS:064x}"


class Overlay:
    """Rows changed on top of a :class:`Reader` (or of another overlay), not yet written."""

    __slots__ = ("_before", "_capsules", "_parent", "_rows", "_seen")

    def __init__(self, parent: Reader | Overlay) -> None:
        self._parent = parent
        self._capsules: dict[bytes, CapsuleRow | None] = {}
        self._seen: dict[bytes, CapsuleRow | None] = {}  # read from below and unchanged
        self._before: dict[bytes, bytes | None] = {}  # capsule rows as they were below
        self._rows: dict[int, dict[bytes, bytes | None]] = {}

    def capsule(self, key: bytes) -> CapsuleRow | None:
        """The row to look at, not to change."""
        try:
            return self._capsules[key]
        except KeyError:
            pass
        parent = self._parent
        if isinstance(parent, Overlay):
            return parent.capsule(key)
        try:
            return self._seen[key]
        except KeyError:
            data = self._before[key] = parent.get(CAPSULE, key)
            row = self._seen[key] = None if data is None else CapsuleRow.decode(data)
            return row

    def edit(self, key: bytes) -> CapsuleRow:
        """The row to change in place.

        Raises:
            CorruptionError: there is none, though the log says so.
        """
        row = self._capsules.get(key)
        if row is None:
            row = self.capsule(key)
            if row is None:
                raise CorruptionError(f"the log changes a capsule that is not there: {key.hex()}")
            if isinstance(self._parent, Overlay):
                row = row.copy()
            else:
                self._seen.pop(key, None)
            self._capsules[key] = row
        return row

    def put_capsule(self, key: bytes, row: CapsuleRow) -> None:
        self._capsules[key] = row

    def delete_capsule(self, key: bytes) -> None:
        self._capsules[key] = None

    def get(self, table: int, key: bytes) -> bytes | None:
        if table == CAPSULE:
            row = self.capsule(key)
            return None if row is None else row.encode()
        try:
            return self._rows[table][key]
        except KeyError:
            return self._parent.get(table, key)

    def put(self, table: int, key: bytes, value: bytes) -> None:
        try:
            self._rows[table][key] = value
        except KeyError:
            self._rows[table] = {key: value}

    def delete(self, table: int, key: bytes) -> None:
        self._rows.setdefault(table, {})[key] = None

    def scan(self, table: int, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Rows of both layers, merged; rows must not be changed while a scan is under way."""
        changed = self._changed(table)
        ours = sorted(key for key in changed if key.startswith(prefix) and key >= start)
        return _merge(ours, changed, self._parent.scan(table, prefix, start))

    def counter(self, name: bytes) -> int:
        data = self.get(COUNTER, name)
        return 0 if data is None else U64.unpack(data)[0]

    def next(self, name: bytes) -> int:
        """Increments a counter and returns its new value."""
        value = self.counter(name) + 1
        self.put(COUNTER, name, U64.pack(value))
        return int(value)

    def flush(self, writer: Writer) -> int:
        """Writes every changed row into ``writer``, empties the overlay, returns the change of the digest."""
        change = 0
        for table in sorted({CAPSULE, *self._rows}):
            changed = self._changed(table)
            if changed:
                change += _write_table(writer, table, changed, self._before if table == CAPSULE else {})
                changed.clear()
        self._capsules.clear()
        self._seen.clear()
        self._before.clear()
        return change

    def rebase(self, parent: Reader | Overlay) -> None:
        """Puts the overlay on ``parent``, which holds what its own parent held before that was flushed."""
        self._parent = parent

    def __len__(self) -> int:
        return len(self._capsules) + sum(map(len, self._rows.values()))

    def _changed(self, table: int) -> dict[bytes, bytes | None]:
        if table == CAPSULE:
            return {key: None if row is None else row.encode() for key, row in self._capsules.items()}
        return self._rows.get(table, {})


def _write_table(
    writer: Writer, table: int, changed: dict[bytes, bytes | None], before: dict[bytes, bytes | None]
) -> int:
    change = 0
    puts = []
    get = writer.getter(table)
    for key in sorted(changed):
        value = changed[key]
        old = before[key] if key in before else get(key)
        if old == value:
            continue
        if old is not None:
            change -= row_hash(table, key, old)
        if value is None:
            writer.delete(table, key)
        else:
            change += row_hash(table, key, value)
            puts.append((key, value))
    writer.put_sorted(table, puts)
    return change


def _merge(
    ours: list[bytes], changed: dict[bytes, bytes | None], theirs: Iterable[tuple[bytes, bytes]]
) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    for key, value in theirs:
        while at < len(ours) and ours[at] < key:
            mine = changed[ours[at]]
            if mine is not None:
                yield ours[at], mine
            at += 1
        if at < len(ours) and ours[at] == key:
            continue
        yield key, value
    for key in ours[at:]:
        mine = changed[key]
        if mine is not None:
            yield key, mine
