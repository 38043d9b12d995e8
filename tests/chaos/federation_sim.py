"""Two zones told about a third, by seed: random commands, a bad link, crashes, and what must hold all the same.

The home runs random commands over capsules of all sovereignties and priorities.  Each other zone is sent what policies
let it have over a link that cuts, flips bits, loses, doubles and swaps; sender and receivers crash, receivers losing
what they had not synced.  What holds:

* Whenever a receiver whose capsules all go in one lane has a position, it is what the home was there: every capsule in
  scope with its content, attributes, names and policy, and nothing else.
* In the end that holds for every receiver, whatever the lanes.
* Nothing ever on the wire has an id, a name, a value or content that was not in scope at some position.
* Every shipment that was changed is refused; every one that comes again does nothing.
* The home's log proves what it sent (:mod:`space.federation.sovereignty`).

A run is a function of its seed.  ``python -m tests.chaos.federation_sim [RUNS [FIRST_SEED]]`` runs many.
"""

from __future__ import annotations

import contextlib
import random
import re
import sys
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any, Final

import attrs

from space._errors import CorruptionError, RefusedError, SpaceError, Status, UsageError
from space.events import commands as cmd
from space.events.ids import ROOT, zone_capsules, zone_root
from space.events.types import ExtentWritten, Kind, SnapshotTaken
from space.federation import portable, stream, translate
from space.federation.initial import initial
from space.federation.selection import Selection
from space.federation.shipment import decode_shipment, encode_shipment
from space.federation.sovereignty import Audit
from space.federation.stream import Begin, Cursor, Outgoing, Streams, begin
from space.federation.translate import is_quiet, missing_capsule
from space.policy.model import Compression, Encryption, Policy, Sovereignty
from space.statemachine import zones as rows
from space.statemachine.tables import (
    CAPSULE,
    ENTRY,
    POLICY,
    REPLICA,
    U32,
    XATTR,
    CapsuleRow,
    EntryRow,
    Overlay,
)
from tests.chaos.swarm import main
from tests.federation_zone import MemoryZone, Seen, Tables, pack_policy

POSITIONS: Final = 60
"""Rounds of commands in a run."""

Image = dict[bytes, tuple[Any, ...]]


def policies() -> list[Policy]:
    """Policies capsules have: to nobody, to one, to the other, to both, in several lanes, encrypted."""

    def shipped(*targets: str, priority: int = 0, **others: Any) -> Policy:
        return Policy(
            compression=Compression.NONE,
            dedupe=False,
            sovereignty=Sovereignty.GLOBAL,
            federation_targets=targets,
            federation_priority=priority,
            **others,
        )

    return [
        Policy(compression=Compression.NONE, sovereignty=Sovereignty.LOCAL),
        Policy(compression=Compression.NONE, sovereignty=Sovereignty.ZONE, dedupe=False),
        shipped("oslo"),
        shipped("oslo", "rome", priority=5),
        shipped("rome"),
        shipped("oslo", priority=9, encryption=Encryption.AES_256_GCM),
        shipped("rome", priority=9, encryption=Encryption.AES_256_GCM, federation_sealed=True),
    ]


@attrs.define
class Secrets:
    """Bytes that were ever stored, and that may be known to a zone: ids, names, values, and what was written."""

    all: set[bytes] = attrs.field(factory=set)
    allowed: dict[str, set[bytes]] = attrs.field(factory=lambda: {"oslo": set(), "rome": set()})


class Home:
    """The home, and random commands for it."""

    def __init__(self, seed: int, lanes: int) -> None:
        self.zone = MemoryZone("paris", seed)
        self.random = random.Random(f"commands {seed}")
        self.secrets = Secrets()
        every = policies()
        self.policies = every if lanes > 1 else [attrs.evolve(p, federation_priority=0) for p in every]
        self.counts: Counter[str] = Counter()
        self.several: set[bytes] = set()

    def execute(self, commands: list[cmd.Command]) -> None:
        """Carries out commands that may be possible."""
        purges = [each for each in commands if isinstance(each, cmd.PurgeCapsules)]
        self.zone.execute(purges or commands, tick_ns=10**6)  # what is purged must not come back meanwhile
        self.several.update(key for key, row in self._rows() if row.nlink > 1 and row.kind == Kind.FILE)

    def _token(self) -> bytes:
        token = self.random.randbytes(12).hex().encode()
        self.secrets.all.add(token)
        return token

    def _rows(self) -> list[tuple[bytes, CapsuleRow]]:
        found = [(key, CapsuleRow.decode(value)) for key, value in self.zone.tables.scan(CAPSULE, b"")]
        return [(key, row) for key, row in found if key != ROOT and key[:15] != bytes(15)]

    def _pick(self, kind: int | None, *, deleted: bool = False) -> bytes | None:
        found = [
            key
            for key, row in self._rows()
            if (kind is None or row.kind == kind) and bool(row.deleted) == deleted
        ]
        return self.random.choice(found) if found else None

    def _directory(self) -> bytes:
        if self.random.random() < 0.3:
            return bytes(ROOT)
        return self._pick(int(Kind.DIRECTORY)) or bytes(ROOT)

    def _entry(self, directory: bytes | None = None) -> tuple[bytes, bytes] | None:
        found = [
            (key[:16], key[16:])
            for key, value in self.zone.tables.scan(ENTRY, directory or b"")
            if value[:16] != ROOT
        ]
        return self.random.choice(found) if found else None

    def _policy(self) -> tuple[bytes | None, cmd.NewKey | None]:
        if self.random.random() < 0.4:
            return None, None
        policy = self.random.choice(self.policies)
        key = self.zone.new_key() if policy.encryption is not Encryption.NONE else None
        return pack_policy(policy), key

    def _new(self) -> bytes:
        return self.random.randbytes(16)

    def command(self) -> list[cmd.Command]:
        """A random command, or two that belong together."""
        names = [name for name in dir(self) if name.startswith("do_")]
        weights = [WEIGHTS.get(name, 2) for name in names]
        (name,) = self.random.choices(names, weights)
        found: list[cmd.Command] = getattr(self, name)()
        if found:
            self.counts[name[3:]] += 1
        return found

    def do_create(self) -> list[cmd.Command]:
        """A new file, named or not."""
        policy, key = self._policy()
        named = self.random.random() < 0.9
        capsule = self._new()
        self.secrets.all.add(capsule)
        block = 512 if self.random.random() < 0.1 else 0
        parent = self._directory() if named else b""
        if policy is None and parent:
            row = Overlay(self.zone.tables).capsule(parent)
            number = row.policy if row is not None else 0
            if Selection("x").policy(self.zone.tables, number).encryption is not Encryption.NONE:
                key = self.zone.new_key()
        return [
            cmd.CreateCapsule(
                capsule,
                mode=self.random.choice([0o600, 0o644]),
                uid=self.random.randrange(3),
                parent=parent,
                name=self._token() if named else b"",
                policy=policy,
                key=key,
                size=4096 if block else 0,
                block_size=block,
            )
        ]

    def do_mkdir(self) -> list[cmd.Command]:
        """A new directory."""
        policy, _ = self._policy()
        capsule = self._new()
        self.secrets.all.add(capsule)
        return [
            cmd.CreateCapsule(
                capsule, Kind.DIRECTORY, 0o755, parent=self._directory(), name=self._token(), policy=policy
            )
        ]

    def do_symlink(self) -> list[cmd.Command]:
        """A symbolic link."""
        capsule = self._new()
        self.secrets.all.add(capsule)
        return [
            cmd.CreateCapsule(
                capsule,
                Kind.SYMLINK,
                0o777,
                parent=self._directory(),
                name=self._token(),
                target=self._token(),
                policy=self._policy()[0],
            )
        ]

    def do_write(self) -> list[cmd.Command]:
        """Some bytes, at some offset."""
        capsule = self._pick(int(Kind.FILE), deleted=self.random.random() < 0.05)
        row = None if capsule is None else Overlay(self.zone.tables).capsule(capsule)
        if capsule is None or row is None:
            return []
        data = (self._token() + b"-") * self.random.choice([1, 4, 30, 90])
        offset = self.random.choice([0, 0, self.random.randrange(3000), row.size])
        if row.block_size:
            data, offset = data[:512].ljust(512), self.random.randrange(8) * 512
        policy = Selection("x").policy(self.zone.tables, row.policy)
        if policy.encryption is not Encryption.NONE and not row.key:
            return []
        frames = self.zone.encode(data, policy, row.key)
        return [cmd.WriteExtent(capsule, offset, len(data), frames)]

    def do_punch(self) -> list[cmd.Command]:
        """A hole."""
        capsule = self._pick(int(Kind.FILE))
        if capsule is None:
            return []
        extend = self.random.random() < 0.3
        return [cmd.Deallocate(capsule, self.random.randrange(2000), 1 + self.random.randrange(1500), extend)]

    def do_resize(self) -> list[cmd.Command]:
        """Another size."""
        capsule = self._pick(int(Kind.FILE))
        return [] if capsule is None else [cmd.Resize(capsule, self.random.randrange(8) * 512)]

    def do_copy_range(self) -> list[cmd.Command]:
        """Bytes of one file for another."""
        source, capsule = self._pick(int(Kind.FILE)), self._pick(int(Kind.FILE))
        row = None if source is None else Overlay(self.zone.tables).capsule(source)
        if capsule is None or source is None or row is None or row.size < 2:
            return []
        start = self.random.randrange(row.size - 1)
        length = 1 + self.random.randrange(row.size - start)
        return [cmd.CopyRange(capsule, self.random.choice([0, 700]), source, start, length)]

    def do_attributes(self) -> list[cmd.Command]:
        """Mode, owner, times."""
        capsule = self._pick(None)
        if capsule is None:
            return []
        return [
            cmd.SetAttributes(
                capsule,
                mode=self.random.choice([None, 0o600, 0o755]),
                gid=self.random.choice([None, 1, 2]),
                atime=self.random.choice([None, 5]),
                mtime=self.random.choice([None, 7, 10**18]),
            )
        ]

    def do_xattr(self) -> list[cmd.Command]:
        """An extended attribute, set or removed."""
        capsule = self._pick(None)
        if capsule is None:
            return []
        name = self.random.choice([b"user.a", b"user.b"])
        if self.random.random() < 0.3:
            return [cmd.RemoveXattr(capsule, name)]
        return [cmd.SetXattr(capsule, name, self._token())]

    def do_link(self) -> list[cmd.Command]:
        """One more name."""
        capsule = self._pick(int(Kind.FILE))
        return [] if capsule is None else [cmd.Link(capsule, self._directory(), self._token())]

    def do_unlink(self) -> list[cmd.Command]:
        """One name less; a directory goes with what is in it."""
        entry = self._entry()
        return [] if entry is None else [cmd.Unlink(*entry, directory=None, recursive=True)]

    def do_rename(self) -> list[cmd.Command]:
        """Another place, perhaps of something else, perhaps in exchange."""
        entry = self._entry()
        if entry is None:
            return []
        there = self._entry() if self.random.random() < 0.3 else None
        if there is not None:
            return [cmd.Rename(*entry, *there, exchange=self.random.random() < 0.5)]
        return [cmd.Rename(*entry, self._directory(), self._token())]

    def do_reuse(self) -> list[cmd.Command]:
        """A name that somebody else loses in the same batch."""
        entry = self._entry()
        if entry is None:
            return []
        policy, key = self._policy()
        capsule = self._new()
        self.secrets.all.add(capsule)
        directory = self.random.random() < 0.3
        create = cmd.CreateCapsule(
            capsule,
            Kind.DIRECTORY if directory else Kind.FILE,
            parent=entry[0],
            name=entry[1],
            policy=policy,
            key=None if directory else key,
        )
        return [cmd.Unlink(*entry, directory=None, recursive=True), create]

    def do_clone(self) -> list[cmd.Command]:
        """A copy of a file or a tree, as it is or as it was."""
        source = self._pick(None)
        return [] if source is None else [cmd.Clone(self._new(), source, self._directory(), self._token())]

    def do_policy(self) -> list[cmd.Command]:
        """Another policy."""
        capsule = self._pick(None, deleted=self.random.random() < 0.05)
        row = None if capsule is None else Overlay(self.zone.tables).capsule(capsule)
        if capsule is None or row is None:
            return []
        policy = self.random.choice(self.policies)
        key = None
        if policy.encryption is not Encryption.NONE and not row.key and row.kind == Kind.FILE:
            key = self.zone.new_key()
        return [cmd.SetPolicy(capsule, pack_policy(policy), key)]

    def do_delete(self) -> list[cmd.Command]:
        """What has no name goes."""
        capsule = self._pick(int(Kind.FILE))
        return [] if capsule is None else [cmd.DeleteCapsule(capsule)]

    def do_undelete(self) -> list[cmd.Command]:
        """What was deleted comes back."""
        capsule = self._pick(None, deleted=True)
        return [] if capsule is None else [cmd.Undelete(capsule, self._directory(), self._token())]

    def do_purge(self) -> list[cmd.Command]:
        """What was deleted goes for good."""
        capsule = self._pick(int(Kind.FILE), deleted=True)
        return [] if capsule is None else [cmd.PurgeCapsules([capsule])]

    def do_snapshot(self) -> list[cmd.Command]:
        """A name for a moment."""
        capsule = self._pick(None)
        name = self._token().decode()
        return [] if capsule is None else [cmd.TakeSnapshot(capsule, name)]


WEIGHTS: Final = {
    "do_create": 8,
    "do_mkdir": 5,
    "do_write": 16,
    "do_rename": 5,
    "do_policy": 5,
    "do_clone": 3,
    "do_link": 3,
    "do_reuse": 3,
    "do_unlink": 3,
    "do_purge": 1,
}


# --- what a zone should have -----------------------------------------------------------------------


def lane_of(tables: Tables, row: CapsuleRow, target: str) -> int | None:
    """The lane a policy names, read anew: nothing of this is shared with what is tested."""
    import msgpack

    data = tables.get(POLICY, U32.pack(row.policy)) if row.policy else None
    if data is None:
        return None
    policy = Policy.from_document(msgpack.unpackb(data))
    shipped = policy.sovereignty is Sovereignty.GLOBAL and target in policy.federation_targets
    return policy.federation_priority if shipped else None


def reachable(tables: Tables, root: bytes) -> dict[bytes, set[tuple[bytes, bytes]]]:
    """Everything below a directory, each with its names there."""
    found: dict[bytes, set[tuple[bytes, bytes]]] = {}
    queue = deque([root])
    while queue:
        parent = queue.popleft()
        for key, value in tables.scan(ENTRY, parent):
            entry = EntryRow.decode(value)
            found.setdefault(entry.capsule, set()).add((parent, key[16:]))
            if entry.kind == Kind.DIRECTORY:
                queue.append(entry.capsule)
    return found


def described(zone: MemoryZone, moment: Seen, capsule: bytes, row: CapsuleRow, names: Any) -> tuple[Any, ...]:
    """What has to be the same in both zones."""
    document = moment.state.get(POLICY, U32.pack(row.policy)) if row.policy else b""
    xattrs = frozenset((key[16:], value) for key, value in moment.state.scan(XATTR, capsule))
    content: Any = None
    if row.kind == Kind.FILE:
        try:
            content = zone.read(moment, capsule)
        except RefusedError as error:
            content = error.status
    return (
        row.kind,
        row.mode,
        row.uid,
        row.gid,
        row.size,
        row.rdev,
        row.block_size,
        row.target,
        row.atime,
        row.mtime,
        row.btime,
        row.key,
        document,
        xattrs,
        content,
        frozenset(names),
    )


FIELDS: Final = (
    *("kind", "mode", "uid", "gid", "size", "rdev", "block_size", "target", "atime", "mtime", "btime"),
    *("key", "policy", "xattrs", "content", "names"),
)


def home_image(home: MemoryZone, position: int, target: str) -> Image:
    """What a zone should have of a position."""
    moment = home.moments[position]
    tables = moment.state
    found = reachable(tables, bytes(ROOT))
    table = {key: CapsuleRow.decode(value) for key, value in tables.scan(CAPSULE, b"")}
    for capsule, row in table.items():
        directory = row.kind == Kind.DIRECTORY
        last = row.parent == ROOT or row.parent in found  # where it last got a name is still there
        if not row.deleted and not directory and (not row.nlink or last):
            found.setdefault(capsule, set())
    scope = {
        capsule
        for capsule in found
        if lane_of(tables, table[capsule], target) is not None and not table[capsule].flags & REPLICA
    }
    image = {}
    for capsule in scope:
        names = {
            (bytes(zone_root(home.id)) if parent == ROOT else parent, name)
            for parent, name in found[capsule]
            if parent == ROOT or parent in scope
        }
        image[capsule] = described(home, moment, capsule, table[capsule], names)
    return image


def cut_off(home: Home, tables: Tables) -> set[bytes]:
    """Files that had several names once and cannot be reached any more.

    Whether a zone has those is not promised: :meth:`space.federation.scope.Scope.alive`.
    """
    return home.several - reachable(tables, bytes(ROOT)).keys()


def zone_image(zone: MemoryZone, home: MemoryZone) -> Image:
    """What a zone has of another."""
    moment = Seen(zone.tables)
    apart = bytes(zone_capsules(home.id))
    found = reachable(zone.tables, bytes(zone_root(home.id)))
    found.pop(apart, None)
    for key, value in zone.tables.scan(CAPSULE, b""):
        row = CapsuleRow.decode(value)
        if not row.nlink and not row.deleted and row.flags & REPLICA:
            found.setdefault(key, set())
    image = {}
    for capsule, names in found.items():
        found_row = moment.row(capsule)
        assert found_row is not None
        kept = {(parent, name) for parent, name in names if parent != apart}
        image[capsule] = described(zone, moment, capsule, found_row, kept)
    return image


def difference(expected: Image, found: Image, *, lanes: int, lost: set[bytes]) -> str:
    """The first thing that is not the same, in words; empty if all is.

    When names in a directory come in several lanes, it was last changed by the one that came last.
    """
    for capsule in sorted((expected.keys() | found.keys()) - lost):
        one, other = expected.get(capsule), found.get(capsule)
        if one is None or other is None:
            return f"{capsule.hex()} is {'missing' if other is None else 'too much'}: {one or other}"
        for field, here, there in zip(FIELDS, one, other, strict=True):
            if field == "content" and isinstance(there, Status):
                continue  # sealed for its home
            if field == "mtime" and one[0] == Kind.DIRECTORY and lanes > 1:
                continue
            if here != there:
                return f"{field} of {capsule.hex()}: {here!r:.300} at home, {there!r:.300} there"
    return ""


# --- the link --------------------------------------------------------------------------------------


@attrs.define
class Saved:
    """A receiver as it was when it last synced."""

    tables: Tables
    positions: int


class Receiver:
    """Another zone, and everything between the home and it."""

    def __init__(self, home: Home, name: str, seed: int, *, exact: bool) -> None:
        self.home = home
        self.zone = MemoryZone(name, seed, keep_moments=False)
        self.random = random.Random(f"link {name} {seed}")
        self.exact = exact  # one lane: every position is looked at
        self.zone.add_zone(home.zone)
        home.zone.add_zone(self.zone)
        self.translator = home.zone.translator(self.zone)
        self.streams: Streams | None = None
        self.wire: deque[tuple[bytes, Outgoing]] = deque()
        self.answers: deque[tuple[int, int, int]] = deque()
        self.unsynced: list[tuple[int, int, int]] = []
        self.sent_bytes: list[bytes] = []
        self.now = 0.0
        self.counts: Counter[str] = Counter()
        self.saved = self._save()

    def _save(self) -> Saved:
        return Saved(self.zone.tables.copy(), self.zone.position)

    # --- the home's side ---------------------------------------------------------------------------

    def _cursors(self) -> dict[int, Cursor]:
        found = self.zone.cursors(self.home.zone.id)
        return {lane: Cursor(row.position, row.step, row.resume) for lane, row in found.items()}

    def connect(self) -> None:
        """Goes on where the receiver is."""
        cursors = self._cursors()
        self.wire.clear()
        self.answers.clear()
        self.unsynced.clear()
        if self.streams is not None and self.streams.reconnected(cursors):
            self.counts["went on"] += 1
            return
        self.counts["started"] += 1
        home = self.home.zone
        found = begin(cursors)
        fresh = found is None
        found = found or Begin(home.position, copying=True)
        self.streams = Streams(home.id, self.zone.id, 0, cursors, found)
        if found.copying:
            sent = [capsule for capsule, _ in rows.sent_capsules(home.tables, self.zone.id)]
            time_ns = home.log[found.position - 1].time_ns
            parts = initial(self.translator, home.moments[found.position], found.position, time_ns, sent)
            self.streams.add(parts, found.position, time_ns)
            self.counts["first copy" if fresh else "first copy again"] += 1

    def read(self, batches: int) -> None:
        """Translates some more of the log."""
        home = self.home.zone
        if self.streams is None:
            return
        for _ in range(batches):
            position = self.streams.position + 1
            if position > home.position or self.streams.full:
                return
            batch = home.batch(position)
            parts = self.translator.translate(home.moments[position - 1], home.moments[position], batch)
            self.streams.add(parts, position, batch.time_ns, quiet=is_quiet(batch.events))
            self.counts["parts"] += len(parts)
            self.counts["beside"] += sum(part.has_copies for part in parts)

    def send(self) -> bool:
        """Puts a shipment on the wire, recorded in the home's log before."""
        if self.streams is None:
            return False
        self.now += 1.0
        outgoing = self.streams.next(self.home.zone, self.now)
        if outgoing is None:
            return False
        shipment = outgoing.shipment
        body = encode_shipment(shipment)
        self.counts["shipments"] += 1
        if outgoing.capsules or outgoing.withdrawn:
            position, step = shipment.through
            record = cmd.RecordShipment(
                self.zone.id,
                0,
                shipment.lane,
                shipment.from_position,
                position,
                step,
                outgoing.capsules,
                len(body),
                outgoing.withdrawn,
            )
            self.home.zone.must(record)
        self.sent_bytes.append(body)
        self.wire.append((body, outgoing))
        return True

    def confirm(self) -> None:
        """The home hears one answer."""
        if self.answers and self.streams is not None:
            self.streams.acknowledge(*self.answers.popleft())

    # --- the receiver's side -----------------------------------------------------------------------

    def deliver(self) -> None:
        """The next shipment comes."""
        if self.wire:
            body, _ = self.wire.popleft()
            self._receive(body)

    def _receive(self, body: bytes, *, again: bool = False) -> None:
        shipment = decode_shipment(body)
        before = self.zone.position
        for command in shipment.received():
            outcome = self.zone.execute([self.zone.adopted(command, self.home.zone.id)])[0]
            if isinstance(outcome, SpaceError) and (missing := missing_capsule(outcome)) and not again:
                self._missing(missing)
                return
            if isinstance(outcome, SpaceError):
                raise outcome
            if self.exact and not again:
                self._compare_now(command)
        if again:
            assert self.zone.position == before, "what comes again does nothing"
            return
        position, step = shipment.through
        self.unsynced.append((shipment.lane, position, step))

    def _missing(self, capsule: bytes) -> None:
        """A file nobody could see at home was changed: see :meth:`space.federation.scope.Scope.alive`."""
        row = Overlay(self.home.zone.tables).capsule(capsule)
        assert row is not None
        assert row.kind != Kind.DIRECTORY, "directories are always where they are"
        assert capsule not in self.translator.missing, "once missing, it is copied"
        self.translator.lacks(capsule)
        self.streams = None
        self.counts["missing"] += 1
        self.connect()

    def _compare_now(self, command: cmd.ReceiveShipment) -> None:
        if command.resume:
            return
        self.counts["positions looked at"] += 1
        expected = home_image(self.home.zone, command.through_position, self.zone.name)
        lost = cut_off(self.home, self.home.zone.moments[command.through_position].state)
        wrong = difference(expected, zone_image(self.zone, self.home.zone), lanes=1, lost=lost)
        assert not wrong, f"{self.zone.name} at position {command.through_position}: {wrong}"

    def sync(self) -> None:
        """What came is durable, and may be answered."""
        self.saved = self._save()
        self.answers.extend(self.unsynced)
        self.unsynced.clear()

    def crash(self) -> None:
        """What was not synced is lost, and so is the connection."""
        self.counts["receiver crashed"] += 1
        self.zone.tables = self.saved.tables.copy()
        del self.zone.log[self.saved.positions :]
        del self.zone.moments[self.saved.positions + 1 :]
        self.connect()

    # --- trouble -----------------------------------------------------------------------------------

    def trouble(self) -> None:
        """Something goes wrong."""
        what = self.random.choice(["cut", "flip", "truncate", "double", "swap", "lose", "crash", "restart"])
        getattr(self, f"_{what}")()

    def _cut(self) -> None:
        self.counts["cut"] += 1
        self.connect()

    def _crash(self) -> None:
        self.crash()

    def _restart(self) -> None:
        self.counts["sender restarted"] += 1
        self.streams = None
        self.connect()

    def _flip(self) -> None:
        if self.wire:
            body = bytearray(self.wire[0][0])
            bit = self.random.randrange(8 * len(body))
            body[bit // 8] ^= 1 << bit % 8
            self._refused(bytes(body))

    def _truncate(self) -> None:
        if self.wire:
            body = self.wire[0][0]
            self._refused(body[: self.random.randrange(len(body))])

    def _refused(self, body: bytes) -> None:
        before = self._cursors()
        try:
            self._receive(body)
        except (CorruptionError, UsageError):
            self.counts["changed on the way"] += 1
        else:
            raise AssertionError("a shipment that was changed was taken")
        assert self._cursors() == before
        self.connect()

    def _double(self) -> None:
        if self.wire:
            body = self.wire[0][0]
            self.deliver()
            self._receive(body, again=True)
            self.counts["doubled"] += 1

    def _swap(self) -> None:
        self._out_of_order("swapped")

    def _lose(self) -> None:
        self._out_of_order("lost")

    def _out_of_order(self, what: str) -> None:
        """A shipment whose predecessor did not come is refused, if they are of one lane."""
        lanes = [outgoing.shipment.lane for _, outgoing in self.wire]
        if len(lanes) > 1 and lanes[0] == lanes[1]:
            before = self._cursors()
            try:
                self._receive(self.wire[1][0])
            except SpaceError as error:
                assert error.status is Status.STALE, error  # noqa: PT017
                self.counts[what] += 1
            else:
                raise AssertionError("a gap was taken")
            assert self._cursors() == before
            self.connect()

    # --- the end -----------------------------------------------------------------------------------

    def heal(self) -> None:
        """Everything arrives."""
        self.connect()
        for _ in range(100_000):
            self.read(50)
            sent = self.send()
            while self.wire:
                self.deliver()
            self.sync()
            while self.answers:
                self.confirm()
            assert self.streams is not None
            if not sent and self.streams.position == self.home.zone.position:
                return
        raise AssertionError("the stream does not come to an end")


# --- a run -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def limits(chosen: random.Random) -> Iterator[None]:
    """Limits so small that everything is in parts, or as they are."""
    small = chosen.random() < 0.7
    values = {
        (portable, "PART_BYTES"): chosen.choice([1500, 4000]),
        (translate, "PART_BYTES"): chosen.choice([1500, 4000]),
        (translate, "MAIN_BYTES"): chosen.choice([3000, 50_000]),
        (translate, "STEP_PARTS"): chosen.choice([1, 3]),
        (translate, "JOINED_MAX"): chosen.choice([2, 100]),  # directories come with the rest
        (stream, "SHIPMENT_BYTES"): chosen.choice([1, 3000, 100_000]),
        (stream, "WINDOW"): chosen.choice([20, 1000]),
        (stream, "PASSED_MAX"): chosen.choice([3, 1000]),
    }
    before = {key: getattr(*key) for key in values}
    try:
        if small:
            for (module, name), value in values.items():
                setattr(module, name, value)
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def run_seed(seed: int) -> Counter[str]:
    """One run.

    Raises:
        AssertionError: something that must hold did not.
    """
    chosen = random.Random(f"run {seed}")
    with limits(chosen):
        return _run(seed, chosen)


def _run(seed: int, chosen: random.Random) -> Counter[str]:
    lanes = chosen.choice([1, 1, 3])
    home = Home(seed, lanes)
    receivers = [Receiver(home, name, seed, exact=lanes == 1) for name in ("oslo", "rome")]
    connected = chosen.randrange(POSITIONS // 2)
    trouble = chosen.choice([0.0, 0.05, 0.3])
    for round_ in range(POSITIONS):
        commands = [each for _ in range(chosen.choice([1, 1, 2, 5])) for each in home.command()]
        home.execute(commands)
        if round_ < connected:
            continue
        for receiver in receivers:
            if receiver.streams is None:
                receiver.connect()
            for _ in range(chosen.randrange(6)):
                action = chosen.choice(["read", "read", "send", "deliver", "deliver", "sync", "confirm"])
                if action == "read":
                    receiver.read(chosen.choice([1, 10]))
                else:
                    getattr(receiver, action)()
            if chosen.random() < trouble:
                receiver.trouble()
    for receiver in receivers:
        receiver.heal()
        _check(home, receiver)
    audit(home.zone)
    counts = home.counts
    for receiver in receivers:
        counts += receiver.counts
    return counts


def _check(home: Home, receiver: Receiver) -> None:
    """The receiver is what the home is, and nothing went that may not."""
    target = receiver.zone.name
    expected = home_image(home.zone, home.zone.position, target)
    lanes = 1 if receiver.exact else 3
    lost = cut_off(home, home.zone.tables)
    wrong = difference(expected, zone_image(receiver.zone, home.zone), lanes=lanes, lost=lost)
    assert not wrong, f"{target} in the end: {wrong}"
    allowed = _allowed(home, target)
    wire = b"\0".join(receiver.sent_bytes)
    for secret in home.secrets.all - allowed:
        assert secret not in wire, f"{target} was sent {secret!r}"


def _allowed(home: Home, target: str) -> set[bytes]:
    """Everything a zone may know: what was in scope at any position."""
    found: set[bytes] = set()
    for position in range(1, home.zone.position + 1):
        for capsule, (*_, link, _, _, _, _, _, xattrs, content, names) in home_image(
            home.zone, position, target
        ).items():
            found.add(capsule)
            found.update(value for _, value in xattrs)
            found.update(name for _, name in names)
            found.update(part for _, name in names for part in (name,))
            found.add(link)
            if isinstance(content, bytes):
                found.update(_tokens(content))
        found |= _overwritten(home, position, target)
    return found


def _overwritten(home: Home, position: int, target: str) -> set[bytes]:
    """What was written, or was a name for a moment, within a batch after which its capsule is in scope."""
    found: set[bytes] = set()
    image = home_image(home.zone, position, target)
    for event in home.zone.log[position - 1].events:
        if isinstance(event, ExtentWritten) and event.capsule in image:
            found |= _tokens(home.zone.reader.read(event.frames, position, 0, event.length))
        elif isinstance(event, SnapshotTaken) and event.capsule in image:
            found.add(event.snapshot.encode())
    return found


def _tokens(content: bytes) -> set[bytes]:
    """Tokens a content shows any whole of."""
    found: set[bytes] = set()
    for run in re.findall(rb"[0-9a-f]{24,}", content):
        found.update(run[at : at + 24] for at in range(len(run) - 23))
    return found


def audit(zone: MemoryZone) -> None:
    """The log alone says that every shipment was allowed."""
    found = Audit()
    for logged in zone.log:
        found.batch(zone.moments[logged.position - 1].state, logged.position, logged.events)
    assert not found.findings, found.findings[0]


if __name__ == "__main__":
    sys.exit(main(run_seed, sys.argv[1:], runs=1000))
