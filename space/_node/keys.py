"""Keys as an operator looks after them: what there is, another master key, and destroying data keys for good.

**Another master key.**  The new key is in the file of every node before the log knows of it; then each data key is
wrapped by it, as events; then the log says that it is the master key, which is decided only while no row is wrapped
by another one; then the old key is erased from every file.  Killed anywhere in between, the next run goes on: what is
behind the current key in the file is the key that was to follow, what is before it is to be erased.

**Destroying** a data key empties its row, as an event.  Its wrapped form is still in the log, in checkpoints and on
every replica, and only the master key opens it: so the master key is changed, the destroyed key is not wrapped again,
and with the old master key the last way to it is erased.
"""

from __future__ import annotations

import contextlib
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs

from space._errors import (
    ConflictError,
    NotFoundError,
    RefusedError,
    SpaceError,
    Status,
    UnavailableError,
)
from space._node.keys_file import FILES
from space.content.frames import FRAME_RECORD_BYTES
from space.content.keys import (
    MASTER_KEYS_MAX,
    SEALED_BYTES,
    generate_master_key,
    master_fingerprint,
    master_name,
    row_master,
)
from space.events import commands as cmd
from space.events import types as ev
from space.events.codec import decode_batch
from space.events.commands import Durability, Request
from space.events.ids import ID_BYTES, ROOT, CapsuleId, format_time
from space.projections.feed import Progress
from space.statemachine import zones
from space.statemachine.apply import clone_id, manifest_nodes
from space.statemachine.keys import REWRAPPED_MAX
from space.statemachine.tables import CAPSULE, HOME, KEY, SENT, U32, ZONE_KEY, CapsuleRow, Reader

if TYPE_CHECKING:
    from space._node.caller import Document
    from space._node.store import Store

SHELF: Final = b".shards"
"""The directory of layouts (:mod:`space._node.federation_shelf`)."""

ATTEMPTS_MAX: Final = 16
"""How often rows are looked through for those that came meanwhile: each time there are fewer, and few at first."""

NAMED_MAX: Final = 8
"""Capsules an error names."""

_STORED_AND_KEY: Final = struct.Struct(f"<4xI8xI{FRAME_RECORD_BYTES - 20}x")
"""Stored length and key id of a frame record (docs/formats/frames.md)."""

OnProgress = Callable[[Progress], None]


class Others(Protocol):
    """The other nodes that have the same store."""

    def take(self, shard: int, key: bytes) -> None:
        """Returns when each of them has a master key in its file.

        Raises:
            SpaceError: one has not.
        """

    def drop(self, *, sole: bool) -> list[str]:
        """Has them erase older master keys, also in shared files if ``sole``; those that did not, in words."""


class Nobody:
    """There are none."""

    def take(self, shard: int, key: bytes) -> None:
        """Nobody needs it."""

    def drop(self, *, sole: bool) -> list[str]:
        return []


# --- what the log says of keys ---------------------------------------------------------------------


@attrs.define
class Made:
    """A data key: for which capsule it was made, when, and when it was destroyed."""

    capsule: bytes
    position: int
    time_ns: int
    destroyed: tuple[int, int, str] | None = None


@attrs.define
class Book:
    """What the log says of keys.

    Attributes:
        keys: every data key.
        of: those each capsule has or had.
        plain: capsules of which something was stored without a key.
        sharded: names (ids in text) of capsules that have or had a layout of shards here, which holds their keys.
        changed: position at which the master key was last changed.
    """

    keys: dict[int, Made] = attrs.field(factory=dict)
    of: defaultdict[bytes, set[int]] = attrs.field(factory=lambda: defaultdict(set))
    plain: set[bytes] = attrs.field(factory=set)
    sharded: set[bytes] = attrs.field(factory=set)
    changed: int = 0
    _shelves: list[set[bytes]] = attrs.field(factory=lambda: [set(), set()])

    def read(self, position: int, time_ns: int, actor: str, event: ev.Event) -> None:
        """Takes note of the next event."""
        match event:
            case ev.ExtentWritten():
                self._written(event)
            case ev.KeyCreated():
                self.keys.setdefault(event.key, Made(event.capsule, position, time_ns))
                self.of[event.capsule].add(event.key)
            case ev.NameLinked():
                self._linked(event)
            case ev.CapsuleCloned():
                self._cloned(event)
            case ev.RangeCopied():
                self._shared(event.capsule, event.source)
            case ev.CapsulesPurged():
                for at in range(0, len(event.purged), ID_BYTES):
                    self.of.pop(event.purged[at : at + ID_BYTES], None)
            case ev.KeyDestroyed():
                if event.key in self.keys:
                    self.keys[event.key].destroyed = (position, time_ns, actor)
            case ev.MasterKeyChanged():
                self.changed = position

    def _written(self, event: ev.ExtentWritten) -> None:
        keys = frame_keys(event.frames)
        if 0 in keys:
            self.plain.add(event.capsule)
            keys.discard(0)
        if keys:
            self.of[event.capsule] |= keys

    def _linked(self, event: ev.NameLinked) -> None:
        """Directories of layouts: ``/.shards/HOME/CAPSULE``."""
        shelf, homes = self._shelves
        if event.parent == ROOT and event.name == SHELF:
            shelf.add(event.capsule)
        elif event.parent in shelf:
            homes.add(event.capsule)
        elif event.parent in homes:
            self.sharded.add(event.name)

    def _cloned(self, event: ev.CapsuleCloned) -> None:
        if event.manifest:
            members = [node.capsule for node, _ in manifest_nodes(event.manifest)]
        else:
            members = [event.members[at : at + ID_BYTES] for at in range(0, len(event.members), ID_BYTES)]
        for member in members:
            self._shared(clone_id(event.capsule, event.source, member), member)

    def _shared(self, capsule: bytes, source: bytes) -> None:
        if source in self.of:
            self.of[capsule] |= self.of[source]
        if source in self.plain:
            self.plain.add(capsule)

    def users(self) -> dict[int, list[bytes]]:
        """Capsules there are by key."""
        found: dict[int, list[bytes]] = {}
        for capsule, keys in self.of.items():
            for key in keys:
                found.setdefault(key, []).append(capsule)
        return found


def frame_keys(frames: bytes) -> set[int]:
    """Data keys of packed frames; 0 where stored bytes are not encrypted."""
    return {key for stored, key in _STORED_AND_KEY.iter_unpack(frames) if stored}


def read_book(store: Store, on_progress: OnProgress | None = None) -> Book:
    """What the whole log says of keys."""
    book, progress = Book(), Progress()
    for record in store.wal.records(max(1, store.wal.first_index), store.last + 1):
        for entry in decode_batch(record.metadata):
            progress.events += len(entry.events)
            for _, event in entry.events:
                book.read(record.index, entry.time_ns, entry.actor, event)
        progress.position = record.index
        if on_progress is not None and record.index % 256 == 0:
            on_progress(progress)
    return book


# --- listing -----------------------------------------------------------------------------------------


def listing(store: Store, on_progress: OnProgress | None = None) -> Document:
    """Master keys and data keys, as plain data."""
    store.load_master_keys()
    book = read_book(store, on_progress)
    users = book.users()
    current = _current(store)
    keys: list[Document] = []
    wrapped: Counter[int] = Counter()
    ciphers: dict[int, str] = {}
    with store._read() as txn:
        names = {number: zone.name for number, zone in zones.zones(txn).items()}
        for number, row in txn.scan(KEY, b""):
            key, version = U32.unpack_from(number)[0], U32.unpack_from(number, U32.size)[0]
            master = store._keyring.wrapped_by(key, version, row) if _is_wrapped(row) else 0
            wrapped[master] += 1
            zone = txn.get(ZONE_KEY, number[: U32.size])
            made = book.keys.get(key)
            keys.append(
                {
                    "key": key,
                    "version": version,
                    "state": _state(store, book, made, row, master),
                    "master": master_name(master) if master else None,
                    "encryption": _encryption(store, txn, made, ciphers),
                    "capsule": str(CapsuleId(made.capsule)) if made else None,
                    "capsules": len(users.get(key, ())),
                    "zone": names.get(zone) if zone else None,
                    "created": _moment((made.position, made.time_ns) if made else None),
                    "destroyed": _moment(made.destroyed if made else None),
                }
            )
        position = txn.applied.position
    keys.sort(key=lambda each: (each["created"] or {"position": 0})["position"])
    return {
        "position": position,
        "file": str(store.master_file.path),
        "shared": store.master_file.shared,
        "masters": [
            {"master": master_name(each), "current": each == current, "keys": wrapped[each]}
            for each in store._keyring.masters
        ],
        "keys": keys,
    }


def _is_wrapped(row: bytes) -> bool:
    return bool(row) and len(row) != SEALED_BYTES


def _state(store: Store, book: Book, made: Made | None, row: bytes, master: int) -> str:
    if not row:
        when = made.destroyed[0] if made and made.destroyed else 0
        return "erased" if 0 < when < book.changed and len(store._keyring.masters) == 1 else "destroyed"
    if not _is_wrapped(row):
        return "sealed"
    return "usable" if master else "locked"


def _encryption(store: Store, txn: Any, made: Made | None, known: dict[int, str]) -> str | None:
    """What the policy of the capsule a key was made for says; ``known`` is by policy."""
    data = txn.get(CAPSULE, made.capsule) if made else None
    if data is None:
        return None
    policy = CapsuleRow.decode(data).policy
    if policy not in known:
        known[policy] = str(store._policy(txn, policy).encryption.value)
    return known[policy]


def _moment(found: tuple[Any, ...] | None) -> Document | None:
    if not found:
        return None
    position, time_ns, *actor = found
    document = {"position": position, "time": format_time(time_ns), "time_ns": time_ns}
    return {**document, "actor": actor[0]} if actor else document


def _current(store: Store) -> int:
    """Fingerprint of the master key that wraps; 0 if there is none."""
    return store.master or next(iter(store._keyring.masters), 0)


# --- another master key --------------------------------------------------------------------------------


def rotate(stores: Sequence[Store], others: Others, *, sole: bool = False) -> Document:
    """Gives the shards of a node, and with them the others', another master key.

    ``sole``: no other store uses the master key file, so that old keys can be erased from one the environment names.

    Raises:
        NotFoundError: there is no master key.
        RefusedError: the file cannot be changed, here or on another node; or a data key does not open.
        UnavailableError: another node does not answer.
    """
    with _changing(stores):
        before = _current(stores[0])
        numbers = [_prepare(store, others, shard) for shard, store in enumerate(stores)]
        rewrapped = sum(
            _rewrap(store, number) for store, number in zip(stores, numbers, strict=True) if number
        )
        kept = _drop(stores, others, sole=sole)
        return {
            "position": stores[0].position,
            "master": master_name(_current(stores[0])),
            "before": master_name(before),
            "rewrapped": rewrapped,
            "file": str(stores[0].master_file.path),
            "erased": not kept,
            "kept": kept,
        }


@contextlib.contextmanager
def _changing(stores: Sequence[Store]) -> Iterator[None]:
    """One change of keys at a time."""
    with contextlib.ExitStack() as held:
        for store in stores:
            if not store.changing_keys.acquire(blocking=False):
                raise UnavailableError("keys are being changed already", hint="wait until that is done")
            held.callback(store.changing_keys.release)
            store.load_master_keys()
        if not any(store._keyring.masters for store in stores):
            raise NotFoundError(
                "there is no master key yet", hint="one is made with the first encrypted content"
            )
        yield


def _prepare(store: Store, others: Others, shard: int) -> int:
    """Puts the master key that is to be into every file; its fingerprint, or 0 for a shard without master key."""
    with FILES:
        keys = store.master_file.load()
        if not keys:
            return 0
        if _place(store, keys) == len(keys) - 1:
            keys = add_key(store, keys, generate_master_key(store._random_bytes))
    store.load_master_keys()
    others.take(shard, keys[-1])
    return master_fingerprint(keys[-1])


def add_key(store: Store, keys: Sequence[bytes], key: bytes) -> tuple[bytes, ...]:
    """Adds a master key to a file that has ``keys``; :data:`FILES` has to be held.

    Raises:
        RefusedError: it is full, or cannot be changed.
    """
    if len(keys) >= MASTER_KEYS_MAX:
        raise RefusedError(
            f"{store.master_file.path} is full: {len(keys)} master keys",
            hint="take out those no store needs any more; space key ls says which this one needs",
            status=Status.NOT_PERMITTED,
        )
    store.master_file.replace((*keys, key))
    return (*keys, key)


def _place(store: Store, keys: Sequence[bytes]) -> int:
    """Where in its file a store's current master key is; what is behind it was to follow it."""
    current = store.master
    found = [at for at, key in enumerate(keys) if master_fingerprint(key) == current] if current else [0]
    if not found:
        raise RefusedError(
            f"master key {master_name(current)} is not in {store.master_file.path}",
            hint="add it, as a line",
            status=Status.NOT_PERMITTED,
        )
    return found[0]


def _rewrap(store: Store, master: int) -> int:
    """Wraps every data key by another master key, and lets that be the master key; how many there were."""
    total, before = 0, store.master
    for _ in range(ATTEMPTS_MAX):
        rows = [_wrapped_anew(store, master, *each) for each in _wrapped_otherwise(store, master)]
        total += len(rows)
        parts = [rows[at : at + REWRAPPED_MAX] for at in range(0, len(rows), REWRAPPED_MAX)] or [[]]
        try:
            for number, part in enumerate(parts, 1):
                store.execute(
                    cmd.RewrapKeys(master, part, number == len(parts), before), durability=Durability.DURABLE
                )
        except ConflictError:  # keys were made or destroyed meanwhile
            if store.master != before:
                raise
            continue
        return total
    raise UnavailableError(
        "data keys are being made faster than they are wrapped anew", hint="try again later"
    )


def _wrapped_otherwise(store: Store, master: int) -> list[tuple[int, int, bytes]]:
    with store._read() as txn:
        return [
            (U32.unpack_from(number)[0], U32.unpack_from(number, U32.size)[0], row)
            for number, row in txn.scan(KEY, b"")
            if _is_wrapped(row) and row_master(row) != master
        ]


def _wrapped_anew(store: Store, master: int, key: int, version: int, row: bytes) -> tuple[int, int, bytes]:
    ring = store._keyring
    try:
        return key, version, ring.wrap(key, version, ring.unwrap(key, version, row), master=master)
    except RefusedError as error:
        raise RefusedError(
            Exception.__str__(error),
            hint="its content cannot be read; space key ls names the capsule: add the master key, or destroy the key",
            status=error.status,
        ) from None


def _drop(stores: Sequence[Store], others: Others, *, sole: bool) -> list[str]:
    """Erases old master keys on every node; where that was not done, in words."""
    if stores[0].master_file.shared and not sole:
        return [f"{stores[0].master_file.path}: other stores may use it (--sole if none does)"]
    kept = []
    try:
        erase_old(stores)
    except RefusedError as error:  # the change itself is done
        kept.append(f"{Exception.__str__(error)}: take out the lines before the last")
    return [*kept, *others.drop(sole=sole)]


def erase_old(stores: Sequence[Store]) -> None:
    """Takes out of their files the master keys that are older than any of these stores needs.

    Raises:
        RefusedError: a file cannot be changed.
    """
    needed: dict[str, list[int]] = {}
    with FILES:
        for store in stores:
            keys = store.master_file.load()
            if keys:
                needed.setdefault(str(store.master_file.path), []).append(_place(store, keys))
        for store in stores:
            keys, at = store.master_file.load(), min(needed.pop(str(store.master_file.path), [0]))
            if at:
                store.master_file.replace(keys[at:])
            store.load_master_keys()


def finish_at_start(store: Store) -> None:
    """Does what a process that was killed while it changed the master key had left to do with the store's own file."""
    if store.master_file.shared:
        return
    with contextlib.suppress(
        SpaceError, OSError
    ):  # reading needs none of it; space key ls shows what is left
        store.master_file.clear()
        if store.master:
            erase_old([store])


# --- destroying ----------------------------------------------------------------------------------------


def destroy(
    store: Store,
    stores: Sequence[Store],
    others: Others,
    capsules: Sequence[CapsuleId],
    *,
    with_clones: bool = False,
    sole: bool = False,
    on_progress: OnProgress | None = None,
) -> Document:
    """Destroys every data key that capsules have or had, and the master key that could open them.

    ``store``, one of ``stores`` (all shards of the node), is the one that has the capsules.

    Raises:
        NotFoundError: a capsule was never encrypted.
        RefusedError: others have bytes under the same key; the master key file may be of other stores.
    """
    if store.master_file.shared and not sole:
        raise RefusedError(
            f"other stores may use {store.master_file.path}, and would lose what its old keys open",
            hint="--sole, if none does",
            status=Status.NOT_PERMITTED,
        )
    with _changing(stores):
        book = read_book(store, on_progress)
        doomed = _doomed(store, book, capsules, with_clones=with_clones)
        numbers = [_prepare(each, others, shard) for shard, each in enumerate(stores)]
        requests = [
            Request(cmd.DestroyKeys(each, sorted(keys)), store.actor) for each, keys in doomed.items()
        ]
        for outcome in store.execute_all(requests, durability=Durability.DURABLE):
            if isinstance(outcome, SpaceError):
                raise outcome
        store.forget_keys()
        for each, number in zip(stores, numbers, strict=True):
            if number:
                _rewrap(each, number)
        store.forget_keys()  # again: a read may have been under way
        kept = [*_drop(stores, others, sole=sole), *_in_layouts(book, doomed)]
        return {
            "position": store.position,
            "capsules": [str(CapsuleId(each)) for each in doomed],
            "keys": sorted(set().union(*doomed.values())),
            "master": master_name(_current(store)),
            "erased": not kept,
            "kept": kept,
            "zones": _zones_with(store, doomed),
            "plain": [str(CapsuleId(each)) for each in doomed if each in book.plain],
        }


def _doomed(
    store: Store, book: Book, capsules: Sequence[CapsuleId], *, with_clones: bool
) -> dict[bytes, set[int]]:
    """Capsules that are to lose their keys, each with its keys."""
    doomed: dict[bytes, set[int]] = {}
    with store._read() as txn:
        for capsule in capsules:
            row = store._row(txn, capsule)
            keys = book.of.get(capsule, set()) | ({row.key} if row.key else set())
            if not keys:
                raise NotFoundError(f"capsule {capsule} has no data key: it was never encrypted")
            doomed[bytes(capsule)] = keys
    users = book.users()
    gone = set().union(*doomed.values())
    sharing = sorted({each for key in gone for each in users.get(key, ()) if each not in doomed})
    if sharing and not with_clones:
        named = ", ".join(str(CapsuleId(each)) for each in sharing[:NAMED_MAX])
        more = f" and {len(sharing) - NAMED_MAX} more" if len(sharing) > NAMED_MAX else ""
        raise RefusedError(
            f"{named}{more} would become unreadable as well: they have bytes under the same key",
            hint="--with-clones, if they are to",
            status=Status.NOT_PERMITTED,
        )
    for each in sharing:
        doomed[each] = book.of[each] & gone
    return doomed


def _in_layouts(book: Book, capsules: dict[bytes, set[int]]) -> list[str]:
    """Layouts of shards hold data keys sealed for this zone, which its own sealing key opens, in words."""
    return [
        f"the layout of the shards of {CapsuleId(each)} has its keys, sealed for this zone: "
        "gone only if it was removed and space gc ran since"
        for each in capsules
        if str(CapsuleId(each)).encode() in book.sharded
    ]


def _zones_with(store: Store, capsules: dict[bytes, set[int]]) -> list[str]:
    """Zones that were given a key of these capsules, as far as is known here."""
    with store._read() as txn:
        known = zones.zones(txn)
        own = {zone.name for zone in known.values() if zone.role == zones.OWN}
        found = {
            zone.name
            for number, zone in known.items()
            if any(_was_given(txn, number, each) for each in capsules)
        }
        for capsule in capsules:
            row = store._row(txn, CapsuleId(capsule))
            found |= set(store._policy(txn, row.policy).federation_targets)
    return sorted(found - own)


def _was_given(txn: Reader, zone: bytes, capsule: bytes) -> bool:
    home = txn.get(HOME, capsule)
    return txn.get(SENT, zone + capsule) is not None or (home is not None and home.startswith(zone))
