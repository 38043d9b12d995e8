"""The live store: one process, one data directory, one log, one state.

Thread-safe and synchronous: callers on any thread queue their commands, whoever gets the lock decides
everything queued as one batch, and each waits for its own durability, so that many writers share one
fdatasync.  The asyncio face (:mod:`space.aio`) queues the commands of one tick of its loop in the same way.

Order of things for a batch: decide against the open LMDB transaction → append to the log (the point of no
return) → write rows and views in that same transaction → commit → acknowledge → fdatasync for those who
asked.  If the log refuses, the transaction is dropped and nothing happened.  If the disk is too full for the
rows after the log took the batch, the batch stands and the rows follow from the log before anything else is
decided or read.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import json
import logging
import os
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Protocol, TextIO

import attrs
import msgpack
from blake3 import blake3
from crc32c import crc32c

from space._errors import (
    CorruptionError,
    DiskFullError,
    NotFoundError,
    RefusedError,
    SpaceError,
    Status,
    StorageError,
    UnavailableError,
    UsageError,
    rejection,
)
from space._node import history, maintenance, transfer
from space._node.federation_moments import zone_moment
from space._node.heat import Heat
from space._node.keys import finish_at_start
from space._node.keys_file import MASTER_KEY_ENVIRONMENT, MasterFile
from space._node.reading import Deleted, Reading, split_path
from space.content.cache import FrameCache
from space.content.frames import FrameRef, pack_frames, unpack_frames
from space.content.keys import Keyring, generate_master_key
from space.content.pipeline import ContentReader, ContentWriter
from space.events import commands as cmd
from space.events.codec import Entry
from space.events.commands import Buffer, Command, Durability, Receipt, Request
from space.events.ids import AtPosition, CapsuleId, Moment
from space.events.types import EXTENT_BYTES_MAX, Kind
from space.federation.sealing import is_for_home
from space.policy.model import Encryption, Policy
from space.projections import dedup
from space.projections.contract import View, registered_views
from space.projections.feed import Progress
from space.statemachine import homes, replies
from space.statemachine.keys import MASTER
from space.statemachine.sequencer import Prepared, prepare
from space.statemachine.store import Applied, ReadTransaction, WriteTransaction, peek_seal
from space.statemachine.store import Store as LmdbStore
from space.statemachine.tables import KEY, RECLAIMED, U32, U64, Overlay
from space.wal.disk import Disk, RealDisk
from space.wal.log import Log
from space.wal.raft_state import read_raft_state
from space.wal.segment_format import SEGMENT_HEADER_BYTES
from space.wal.segment_reader import parse_segment_header

if TYPE_CHECKING:
    from space._node.federation import Federation
    from space._node.federation_nearest import Nearest
    from space._node.federation_nodes import Nodes
    from space.federation.resolve import Replica

logger = logging.getLogger("space")

FORMAT: Final = 1
FORMAT_FILE: Final = "format.json"
FORMAT_NEW: Final = "format.json.new"
"""Its name until the log holds the first batch: a store with a format file but no log has lost its log."""

LOCK_FILE: Final = "lock"
WAL: Final = "wal"

SEGMENT_BYTES: Final = 64 << 20
CACHE_BYTES: Final = 64 << 20
DEDUPE_BYTES_MIN: Final = 4096
"""Writes smaller than this are not deduplicated: the index row would cost as much as the bytes."""

FREE_BYTES_MIN: Final = 8 << 20
"""Commands that need space are refused below this: the state must still be able to follow the log."""

FREE_BYTES_LAST: Final = 2 << 20
"""Down to here commands that lead to space being given back are still taken."""

RELEASING: Final = (
    cmd.Unlink,
    cmd.DeleteCapsule,
    cmd.DropSnapshot,
    cmd.ReclaimPayload,
    cmd.PurgeCapsules,
)

FREE_ASKED_NS: Final = 100_000_000
"""How long an answer of the disk about its free space is good for: asking takes long on a busy file system."""

ROW_BYTES_MAX: Final = 16
"""Bytes of rows that a byte of events may cause, pages copied on write included: an estimate on the safe side."""

CHECKPOINT_EVENTS: Final = 250_000
"""Events after which a checkpoint is worth its copy: bounds what a crash makes the next start fold."""

STALE_RETRIES: Final = 5


class Clock(Protocol):
    """Where time comes from."""

    def __call__(self) -> int:
        """Nanoseconds since 1970."""


@attrs.define
class _Ticket:
    """Commands of one caller waiting to be decided together."""

    requests: list[Request]
    outcomes: list[Receipt | SpaceError] = attrs.field(factory=list)
    done: bool = False


class Store(Reading):
    """An open data directory.

    Use :func:`space.open`; the class is for type annotations.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        create: bool = True,
        disk: Disk | None = None,
        views: Sequence[View] | None = None,
        clock: Clock = time.time_ns,
        random_bytes: Callable[[int], bytes] = os.urandom,
        segment_bytes: int = SEGMENT_BYTES,
        on_progress: Callable[[Progress], None] | None = None,
        actor: str = "",
    ) -> None:
        """Opens the directory, recovering what a crash left; creates it unless told not to.

        Raises:
            UnavailableError: another process has it open.
            NotFoundError: there is no store and ``create`` is false.
            CorruptionError: the log is damaged.
            StorageError: the disk refuses.
        """
        self.path = Path(path)
        self.actor = actor or f"uid:{os.getuid()}"
        self._clock = clock
        self._random_bytes = random_bytes
        self._lock = threading.RLock()
        self._local = threading.local()
        self._queue: deque[_Ticket] = deque()
        self._closed = False
        self._behind = False
        self.wanted = False
        """Whether a batch waits for the tables: a rebuild going on beside it lets it pass."""
        self._room = 0
        self._room_asked = 0
        self._checkpointing: threading.Thread | None = None
        self._rebuilding = threading.Lock()
        self.changing_keys = threading.Lock()
        """Held by whoever changes the master key or destroys data keys."""
        self.pinned: Counter[bytes] = Counter()
        """Capsules held open by a view: gc leaves them alone even when deleted."""
        self.views = list(registered_views() if views is None else views)
        self._nearest: Nearest | None = None
        self.heat: Heat = Heat(time.monotonic_ns)
        self.watchers: list[Callable[[Sequence[Entry]], None]] = []
        """Told what each batch did once it is in the log, on whatever thread that is; must neither wait nor raise."""
        self.federation: Federation | None = None
        """What ships to other zones and takes what they ship, while this process does."""
        self.nodes: Nodes | None = None
        """The other nodes this store is replicated on, where it is one of a cluster's."""
        self._lock_file = _lock_directory(self.path, create)
        try:
            with clear_errors(self.path):
                self._open(disk or RealDisk(), segment_bytes, on_progress)
        except BaseException:
            self._lock_file.close()
            raise

    def _open(self, disk: Disk, segment_bytes: int, on_progress: Callable[[Progress], None] | None) -> None:
        history.clear_scratch(self.path, owner=True)
        wal = self.path / WAL
        self.id, is_new = _identify(self.path, disk, self._random_bytes)
        self._disk = disk
        _refuse_member(disk, self.path, self.id)
        self.wal = Log.open(disk, str(wal), store_id=self.id, segment_bytes=segment_bytes)
        try:
            tables = history.open_live(self.path, self.wal, self.views, on_progress=on_progress)
        except BaseException:
            self.wal.close(clean=False)
            raise
        try:
            self._begin(tables)
        except BaseException:
            self._close(clean=False)
            raise
        if is_new:
            (self.path / FORMAT_NEW).rename(self.path / FORMAT_FILE)

    def _begin(self, tables: LmdbStore) -> None:
        """What needs the log and the tables; makes the root directory of a new store."""
        self._store_key = store_key(self.id)
        self._open_keyring()
        self._hash_key = self._keyring.hash_key()
        self._cache = FrameCache(CACHE_BYTES)
        self._writer = self._new_writer()
        super().__init__(tables, self._new_reader())
        self._applied = tables.applied
        self._checkpointed = self._newest_checkpoint_events()
        self._initialise()
        finish_at_start(self)
        self._maybe_checkpoint()

    def _initialise(self) -> None:
        """Makes the root directory of a new store."""
        if self.wal.last_index == 0:
            root = cmd.InitialiseStore(self.id, 0o755, os.getuid(), os.getgid())
            self.execute(root, durability=Durability.DURABLE)

    # --- the read side's needs -------------------------------------------------------------------

    def _read(self) -> AbstractContextManager[ReadTransaction]:
        if self._closed:
            raise UnavailableError(f"store {self.path} is closed")
        if self._behind:
            with self._lock:
                self._follow()
        return self._tables.read()

    def _new_reader(self) -> ContentReader:
        return ContentReader(
            fetch=self.wal.read_payload, keyring=self._keyring, cache=self._cache, hash_key=self._hash_key
        )

    def _new_writer(self) -> ContentWriter:
        return ContentWriter(
            keyring=self._keyring,
            hash_key=self._hash_key,
            find=self._find_frame,
            random_bytes=self._random_bytes,
        )

    def _located(self, error: CorruptionError) -> CorruptionError:
        """Raises RefusedError for bytes that are gone because gc gave them back."""
        if not error.segment and error.position >= 1:
            with self._tables.read() as txn:
                refuse_reclaimed(txn, error)
        return located(self.wal, error)

    def _wrapped_key(self, key: int, version: int) -> bytes | None:
        with self._tables.read() as txn:
            return usable_key(txn.get(KEY, U32.pack(key) + U32.pack(version)), key)

    def _find_frame(self, content_hash: bytes) -> FrameRef | None:
        with self._tables.read() as txn:
            record = dedup.find(txn, content_hash)
        return None if record is None else unpack_frames(record)[0]

    # --- commands --------------------------------------------------------------------------------

    def execute(
        self,
        command: Command,
        *,
        durability: Durability = Durability.DURABLE,
        actor: str | None = None,
        client: bytes = b"",
        sequence: int = 0,
    ) -> Receipt:
        """Carries out one command.

        Raises:
            SpaceError: it was rejected, or could not be logged; then nothing changed.
        """
        if not client:
            client, sequence = getattr(self._local, "signature", (b"", 0))
        request = Request(command, self.actor if actor is None else actor, client, sequence)
        (outcome,) = self.execute_all([request], durability=durability)
        if isinstance(outcome, SpaceError):
            raise outcome
        return outcome

    @contextlib.contextmanager
    def signed(self, client: bytes, sequence: int) -> Iterator[None]:
        """In this thread, a command given to :meth:`execute` is carried out once, however often it is handed in.

        For one command: a second, other one within the block would be taken for the first.
        """
        self._local.signature = client, sequence
        try:
            yield
        finally:
            del self._local.signature

    def answered(self, client: bytes, sequence: int) -> int | None:
        """Position at which a client's command was carried out; None if it was not, or long ago."""
        with self._read() as txn:
            reply = replies.find(txn, client, sequence)
        return reply[0] if reply is not None and reply[1] is None else None

    def execute_all(
        self, requests: Sequence[Request], *, durability: Durability = Durability.DURABLE
    ) -> list[Receipt | SpaceError]:
        """Carries out commands in order, in as few batches as they fit in; each has its own outcome.

        Raises:
            StorageError, UnavailableError: the log refused; the commands not yet logged did not happen.
        """
        ticket = _Ticket(list(requests))
        if getattr(self._local, "alone", False):
            self._decide([ticket])
        else:
            self._queue.append(ticket)
            with self._lock:
                if not ticket.done:
                    self._drain()
        if durability is Durability.DURABLE:
            positions = [outcome.position for outcome in ticket.outcomes if isinstance(outcome, Receipt)]
            if positions:
                self.wal.sync(max(positions))
        return ticket.outcomes

    def begin(self, requests: Sequence[Request]) -> Future[list[Receipt | SpaceError]]:
        """As :meth:`execute_all`, buffered, for callers that have more to do meanwhile; here it is done at once."""
        future: Future[list[Receipt | SpaceError]] = Future()
        future.set_result(self.execute_all(requests, durability=Durability.BUFFERED))
        return future

    def wait(self, future: Future[list[Receipt | SpaceError]]) -> list[Receipt | SpaceError]:
        """What came of :meth:`begin`."""
        return future.result()

    def _drain(self) -> None:
        tickets = []
        while self._queue:
            tickets.append(self._queue.popleft())
        if tickets:
            self._decide(tickets)

    def _decide(self, tickets: list[_Ticket]) -> None:
        requests = [request for ticket in tickets for request in ticket.requests]
        outcomes: list[Receipt | SpaceError] = []
        unexpected: BaseException | None = None
        while len(outcomes) < len(requests):
            todo = requests[len(outcomes) :]
            try:
                outcomes += self._batch(todo)
            except SpaceError as error:
                outcomes += [error] * len(todo)
            except BaseException as error:  # noqa: BLE001 - raised below, once nobody is left waiting
                unexpected = error
                hint = "close the store; the next start recovers it from the log"
                outcomes += [StorageError(f"the store met {type(error).__name__}", hint=hint)] * len(todo)
        at = 0
        for ticket in tickets:
            ticket.outcomes = outcomes[at : at + len(ticket.requests)]
            ticket.done = True
            at += len(ticket.requests)
        if unexpected is not None:
            raise unexpected

    def _batch(self, requests: list[Request]) -> list[Receipt | SpaceError]:
        if self._closed:
            raise UnavailableError(f"store {self.path} is closed")
        self._follow()
        if not (requests := self._with_room(requests)):
            return [
                DiskFullError(
                    f"less than {FREE_BYTES_MIN >> 20} MiB free at {self.path}",
                    hint="nothing was changed; free some space: space rm and space gc still work",
                )
            ]
        now = max(self._clock(), self.wal.last_time_ns)
        logged: Prepared | None = None
        try:
            self.wanted = True
            with self._tables.write() as txn:
                self.wanted = False
                batch = prepare(txn, requests, position=self.wal.last_index + 1, time_ns=now)
                if batch.entries:
                    metadata = batch.metadata()
                    self._room -= ROW_BYTES_MAX * len(metadata) + sum(map(len, batch.payload))
                    self.wal.append(metadata, batch.payload, time_ns=now, term=self.wal.last_term)
                    logged = batch
                    self._apply(txn, batch, self.wal.last_chain)
        except BaseException as error:
            if logged is None:
                raise
            self._behind = True  # the log has it, the rows do not: they follow before the next look
            if not isinstance(error, StorageError):
                raise
            return logged.outcomes
        finally:
            self.wanted = False
        self._maybe_checkpoint()
        return batch.outcomes

    def _apply(self, txn: WriteTransaction, batch: Prepared, chain: bytes) -> None:
        change = batch.overlay.flush(txn)
        folders = [view.folder(txn) for view in self.views]
        for context, _, event in batch.linked():
            for folder in folders:
                handler = folder.handlers.get(type(event))
                if handler is not None:
                    handler(context, event)
        for folder in folders:
            folder.flush()
        self.heat.wrote(batch.entries)
        for watcher in self.watchers:
            watcher(batch.entries)
        before = self._applied
        self._applied = Applied(
            batch.position,
            chain,
            (before.digest + change) % (1 << 256),
            batch.time_ns,
            before.events + batch.events,
        )
        txn.set_applied(self._applied)

    @property
    def last(self) -> int:
        """The last position there is, for whoever reads the log."""
        return self.wal.last_index

    def heal_later(self) -> None:
        """Notes damage of the log that only a start with peers can heal; a store without peers has none to ask."""

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While it is held, nobody else's command is decided: what others have handed in waits until it ends."""
        with self._lock:
            nested = getattr(self._local, "alone", False)
            self._local.alone = True
            try:
                yield
            finally:
                self._local.alone = nested

    def stale(self) -> AbstractContextManager[object]:
        """In this thread, reads show what is here; only on a node of a cluster can that be less than what there is."""
        return contextlib.nullcontext()

    def still(self) -> AbstractContextManager[object]:
        """While it is held, the tables stand at :attr:`last` and nobody changes them."""
        return self._lock

    def _follow(self) -> None:
        """Brings rows up to the log after a batch whose rows found no room."""
        if self._behind:
            target = history.Target(self.last)
            self._applied = history.catch_up(self._tables, self.wal, self.views, target)
            self._behind = False

    def _with_room(self, requests: list[Request]) -> list[Request]:
        """How many of the first requests the disk has room for: on a nearly full one those that make room."""
        now = self._clock()
        if self._room <= 0 or abs(now - self._room_asked) >= FREE_ASKED_NS:
            self._room = self._disk.free_bytes(str(self.path)) - FREE_BYTES_MIN
            self._room_asked = now
        if self._room >= 0:
            return requests
        if self._room + FREE_BYTES_MIN < FREE_BYTES_LAST:
            return []
        return list(itertools.takewhile(lambda request: _releases(request.command), requests))

    def sync(self, position: int | None = None) -> None:
        """Makes everything acknowledged so far durable, or what is acknowledged up to a position."""
        self.wal.sync(position)

    # --- content ---------------------------------------------------------------------------------

    def encode_extents(
        self, capsule: CapsuleId, offset: int, data: Buffer, policy: Policy, key: int
    ) -> list[Command]:
        """Write commands for ``data``, encoded by the capsule's policy, at most an extent long each."""
        view = memoryview(data).cast("B")
        if len(view) < DEDUPE_BYTES_MIN and policy.dedupe:
            policy = _without_dedupe(policy)
        commands: list[Command] = []
        for at in range(0, len(view), EXTENT_BYTES_MAX):
            piece = view[at : at + EXTENT_BYTES_MAX]
            encoded = self._writer.encode(piece, policy, (key, 1) if key else None)
            frames = [cmd.StoredFrame(pack_frames((frame.ref,)), frame.stored) for frame in encoded]
            commands.append(cmd.WriteExtent(capsule, offset + at, len(piece), frames))
        return commands

    def check_home(self, capsule: CapsuleId) -> None:
        """Refuses a replica, before anything is made of what was to be written to it.

        Raises:
            RefusedError: another zone is its home.
        """
        with self._read() as txn:
            refused = homes.elsewhere(Overlay(txn), cmd.Resize(capsule, 0))
        if refused is not None:
            raise rejection(refused.status, refused.message)

    def write(
        self,
        capsule: CapsuleId,
        offset: int,
        data: Buffer,
        *,
        durability: Durability | None = None,
        actor: str | None = None,
    ) -> Receipt:
        """Writes bytes at an offset of a file, as durable as asked, or as its policy says.

        Raises:
            SpaceError: it does not exist, is no file, or the disk refuses.
        """
        return self.write_all(capsule, [(offset, data)], durability=durability, actor=actor)

    def write_all(
        self,
        capsule: CapsuleId,
        pieces: Sequence[tuple[int, Buffer]],
        *,
        durability: Durability | None = None,
        actor: str | None = None,
    ) -> Receipt:
        """As :meth:`write`, at several offsets one after the other, in as few batches as they fit in."""
        with self._read() as txn:
            row = self._row(txn, capsule)
            policy = self._policy(txn, row.policy)
        pieces = [each for each in pieces if len(each[1])]
        if not pieces:
            return Receipt(self.position)
        durability = durability or Durability(policy.durability.value)
        for attempt in range(STALE_RETRIES):
            requests = [
                Request(command, self.actor if actor is None else actor)
                for offset, data in pieces
                for command in self.encode_extents(capsule, offset, data, policy, row.key)
            ]
            outcomes = self.execute_all(requests, durability=durability)
            failed = next((outcome for outcome in outcomes if isinstance(outcome, SpaceError)), None)
            if failed is None:
                return outcomes[-1]  # type: ignore[return-value]
            if failed.status is not Status.STALE or attempt == STALE_RETRIES - 1:
                raise failed
            policy = _without_dedupe(policy)
        raise AssertionError("unreachable")

    # --- making capsules -------------------------------------------------------------------------

    def new_id(self) -> CapsuleId:
        """A fresh capsule id."""
        return CapsuleId.new(self._clock(), self._random_bytes)

    def new_key(self, policy: Policy) -> cmd.NewKey | None:
        """A wrapped data key if ``policy`` encrypts."""
        if policy.encryption is Encryption.NONE:
            return None
        key = int.from_bytes(self._random_bytes(4), "little") | 1
        with self._tables.read() as txn:
            while next(txn.scan(KEY, U32.pack(key)), None) is not None:
                key = int.from_bytes(self._random_bytes(4), "little") | 1
        return cmd.NewKey(key, 1, self.wrap_key(key, 1, self._keyring.new_data_key()))

    def wrap_key(self, key: int, version: int, data_key: bytes) -> bytes:
        """The row that holds a data key, wrapped by the master key; makes that if there is none.

        Raises:
            UsageError: not the number of a key, or not a key.
        """
        if not self._keyring.masters and not self.master:
            self._make_master_key()
        return self._keyring.wrap(key, version, data_key)

    @property
    def master(self) -> int:
        """Fingerprint of the master key that wraps data keys; 0 if it was never changed."""
        with self._tables.read() as txn:
            return Overlay(txn).counter(MASTER)

    def load_master_keys(self) -> None:
        """Reads the master key file anew.

        Raises:
            SpaceError: it cannot be used.
        """
        self._keyring.use(self.master_file.load())

    def forget_keys(self) -> None:
        """Drops data keys and what they opened from memory, so that destroyed ones are gone from it."""
        self._keyring.forget_all()
        self._cache.clear()

    def _open_keyring(self) -> None:
        self.master_file = MasterFile.of(self.path)
        self._keyring = Keyring(
            self._wrapped_key,
            store_key=self._store_key,
            master_keys=self.master_file.load(),
            current=lambda: self.master,
        )

    def _make_master_key(self) -> None:
        key, path = generate_master_key(self._random_bytes), self.master_file.path
        self.master_file.create(key)
        # The last-resort handler of logging shows it on stderr unless the program configured something else.
        logger.warning(
            "space: made a master key in %s: keep a copy elsewhere, or move it and set %s; "
            "without it encrypted content is lost",
            path,
            MASTER_KEY_ENVIRONMENT,
        )
        self._keyring.use((key,))

    def create(
        self,
        kind: Kind = Kind.FILE,
        *,
        parent: CapsuleId | None = None,
        name: bytes = b"",
        id: CapsuleId | None = None,  # noqa: A002 - the public word
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int = 0,
        block_size: int = 0,
        rdev: int = 0,
        target: bytes = b"",
        policy: Policy | None = None,
        durability: Durability = Durability.DURABLE,
        actor: str | None = None,
    ) -> CapsuleId:
        """A new capsule, linked at ``parent``/``name`` if given; without a policy it follows its parent's.

        Raises:
            SpaceError: the name is taken or unusable, or the disk refuses.
        """
        command = self.create_command(
            kind,
            parent=parent,
            name=name,
            id=id,
            mode=mode,
            uid=uid,
            gid=gid,
            size=size,
            block_size=block_size,
            rdev=rdev,
            target=target,
            policy=policy,
        )
        self.execute(command, durability=durability, actor=actor)
        return CapsuleId(command.capsule)

    def create_command(
        self,
        kind: Kind,
        *,
        parent: CapsuleId | None = None,
        name: bytes = b"",
        id: CapsuleId | None = None,  # noqa: A002 - the public word
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int = 0,
        block_size: int = 0,
        rdev: int = 0,
        target: bytes = b"",
        policy: Policy | None = None,
    ) -> cmd.CreateCapsule:
        """The command behind :meth:`create`, with id and key drawn."""
        effective = policy
        if effective is None and parent is not None:
            effective = self.policy(parent)
        key = self.new_key(effective) if effective is not None and kind == Kind.FILE else None
        return cmd.CreateCapsule(
            id or self.new_id(),
            kind,
            (0o755 if kind == Kind.DIRECTORY else 0o644) if mode is None else mode,
            os.getuid() if uid is None else uid,
            os.getgid() if gid is None else gid,
            parent or b"",
            name,
            rdev,
            size,
            block_size,
            target,
            None if policy is None else pack_policy(policy),
            key,
        )

    # --- everyday words --------------------------------------------------------------------------

    def put(
        self,
        source: Buffer | BinaryIO,
        *,
        name: str | bytes | None = None,
        id: CapsuleId | None = None,  # noqa: A002 - the public word
        policy: Policy | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> transfer.PutResult:
        """Stores bytes (or what a binary file yields) as a new capsule: see :func:`space._node.transfer.put`."""
        return transfer.put(self, source, name=name, id=id, policy=policy, on_progress=on_progress)

    def mkdir(self, path: str | bytes, *, parents: bool = False) -> CapsuleId:
        """Makes a directory; with ``parents``, the missing ones above it too, and none is an error.

        Raises:
            ConflictError: it exists already.
            NotFoundError: a parent is missing.
        """
        names = split_path(path)
        if parents:
            made = transfer.make_directories(self, names)
            self.sync()
            return made
        parent, name = self._parent_of(path)
        return self.create(Kind.DIRECTORY, parent=parent, name=name)

    def _parent_of(self, path: str | bytes) -> tuple[CapsuleId, bytes]:
        names = split_path(path)
        if isinstance(path, str) and not path.startswith("/"):
            raise UsageError(f"not a path: {path!r}", hint="a path begins with /")
        if not names or names[-1] == b"..":
            raise UsageError(f"not a name: {path!r}", status=Status.BAD_NAME)
        return self.resolve(b"/" + b"/".join(names[:-1])), names[-1]

    def rm(self, capsule: str | bytes | CapsuleId, *, recursive: bool = False) -> Receipt:
        """Removes a path, or a capsule by id with all its names; undelete brings it back until gc.

        Raises:
            NotFoundError: there is none.
            ConflictError: a directory that is not empty, without ``recursive``.
        """
        if (isinstance(capsule, bytes) and not isinstance(capsule, CapsuleId)) or str(capsule).startswith(
            "/"
        ):
            parent, name = self._parent_of(capsule)
            return self.execute(cmd.Unlink(parent, name, directory=None, recursive=recursive))
        found = self.resolve(capsule)
        paths = self.paths_of(found)
        if paths == [b"/"]:
            raise RefusedError("the root directory stays", status=Status.NOT_PERMITTED)
        if not paths:
            return self.execute(cmd.DeleteCapsule(found))
        return [self.rm(path, recursive=recursive) for path in paths][-1]

    def mv(self, source: str | bytes, target: str | bytes) -> Receipt:
        """Renames a path; into ``target`` if that is a directory; replaces a file that is there.

        Raises:
            NotFoundError, ConflictError: as for rename(2).
        """
        parent, name = self._parent_of(source)
        with contextlib.suppress(NotFoundError):
            there = self.resolve(target)
            if self.stat(there).kind == Kind.DIRECTORY:
                return self.execute(cmd.Rename(parent, name, there, name))
        return self.execute(cmd.Rename(parent, name, *self._parent_of(target)))

    def resize(self, capsule: str | bytes | CapsuleId, size: int) -> Receipt:
        """Sets the size of a file or block capsule; new bytes are zeros."""
        return self.execute(cmd.Resize(self.resolve(capsule), size))

    def set_policy(self, capsule: str | bytes | CapsuleId, policy: Policy) -> Receipt:
        """Lets a capsule follow another policy; what is stored already stays as it was encoded."""
        found = self.resolve(capsule)
        stat = self.stat(found)
        key = self.new_key(policy) if stat.kind == Kind.FILE and not stat.key else None
        return self.execute(cmd.SetPolicy(found, pack_policy(policy), key))

    def snapshot(self, capsule: str | bytes | CapsuleId, name: str) -> Receipt:
        """Names the present moment of a capsule or tree.

        Raises:
            ConflictError: the name is taken.
        """
        return self.execute(cmd.TakeSnapshot(self.resolve(capsule), name))

    def drop_snapshot(self, name: str) -> Receipt:
        """Forgets the name of a moment."""
        return self.execute(cmd.DropSnapshot(name))

    def clone(
        self, source: str | bytes | CapsuleId, target: str | bytes, *, at: str | Moment | None = None
    ) -> CapsuleId:
        """A writable copy of a file or tree, as it is or was, sharing every stored byte: one event.

        ``at`` is a moment, or the name of a snapshot.

        Raises:
            NotFoundError, ConflictError: no such source; the target exists.
        """
        parent, name = self._parent_of(target)
        new = self.new_id()
        if at is None:
            self.execute(cmd.Clone(new, self.resolve(source), parent, name))
            return new
        from space._node.past import manifest

        with self.at(at) as past:
            found = past.resolve(source)
            position = past.position
            command = cmd.Clone(new, found, parent, name, position, manifest(past, found))
        self.execute(command)
        return new

    def undelete(self, capsule: str | CapsuleId, to: str | bytes | None = None) -> CapsuleId:
        """Brings back a deleted capsule, by id or by the path it had (the latest one of it), there or at ``to``.

        Raises:
            NotFoundError: nothing of the kind can be brought back.
            ConflictError: the name is taken meanwhile.
        """
        lost = self._find_deleted(capsule)
        if to is not None:
            parent, name = self._parent_of(to)
        elif lost.parent is not None:
            parent, name = lost.parent, lost.name
        else:
            raise UsageError(f"capsule {lost.id} had no name", hint="say where to: --to PATH")
        self.execute(cmd.Undelete(lost.id, parent, name))
        return lost.id

    def _find_deleted(self, capsule: str | CapsuleId) -> Deleted:
        deleted = self.deleted()
        if isinstance(capsule, CapsuleId) or not capsule.startswith("/"):
            wanted = capsule if isinstance(capsule, CapsuleId) else CapsuleId.parse(capsule)
            found = [each for each in deleted if each.id == wanted]
        else:
            parent, name = self._parent_of(capsule)
            found = [each for each in deleted if each.parent == parent and each.name == name]
        if not found:
            raise NotFoundError(
                f"nothing deleted that is {capsule}", hint="space undelete lists what there is"
            )
        return max(found, key=lambda each: each.position)

    def log(self, **options: Any) -> Iterator[maintenance.LogEvent]:
        """Events, oldest first: see :func:`space._node.maintenance.log_events`."""
        return maintenance.log_events(self, **options)

    def replay(self, **options: Any) -> maintenance.ReplayResult:
        """Drops and rebuilds views from the log: see :func:`space._node.maintenance.replay`."""
        return maintenance.replay(self, **options)

    def verify(self, **options: Any) -> maintenance.VerifyReport:
        """Checks everything stored: see :func:`space._node.maintenance.verify`."""
        return maintenance.verify(self, **options)

    def gc(self, **options: Any) -> maintenance.GcReport:
        """Reclaims what no kept moment can reach: see :func:`space._node.maintenance.gc`."""
        return maintenance.gc(self, **options)

    def replicas(self, capsule: str | bytes | CapsuleId) -> tuple[Replica, ...]:
        """Zones a capsule can be read from, nearest first; those that do not answer last.

        Raises:
            NotFoundError: there is no such capsule here.
        """
        if self._nearest is None:
            from space._node.federation_nearest import Nearest

            self._nearest = Nearest(self)
        return self._nearest.replicas(capsule if type(capsule) is CapsuleId else self.resolve(capsule))

    # --- moments and upkeep ----------------------------------------------------------------------

    def at(self, moment: str | Moment) -> Reading:
        """The store as it was: the same read API on tables made for that moment, gone when closed.

        ``moment`` is ``@POSITION``, an ISO-8601 time, relative such as ``-5m``, the name of a snapshot, or
        ``ZONE@POSITION``: what the log of another zone held there, as far as it was shipped.

        Raises:
            NotFoundError: the log does not reach it.
            UsageError: not a moment.
        """
        from space._node.past import Past

        if isinstance(moment, str):
            # What looks like a moment is one: a snapshot named "@5" has to be reached by its position.
            named = [] if moment.startswith(("@", "-")) else self.snapshots()
            for snapshot in named:
                if snapshot.name == moment:
                    return Past(self, AtPosition(snapshot.position, snapshot.event))
            with self._read() as txn:
                shipped = zone_moment(txn, self.wal, self.position, moment)
            if shipped is not None:
                return Past(self, shipped)
        return Past(self, moment)

    def checkpoint(self) -> None:
        """Makes a sealed copy of the tables, so that no start and no past moment has to fold from the beginning."""
        self.wal.sync()
        history.write_checkpoint(self.path, self._tables)
        self._checkpointed = self._newest_checkpoint_events()

    def _newest_checkpoint_events(self) -> int:
        sealed = [peek_seal(path) for path in history.checkpoints(self.path)[:1]]
        return sealed[0].events if sealed and sealed[0] else 0

    def _maybe_checkpoint(self) -> None:
        if self._applied.events - self._checkpointed < CHECKPOINT_EVENTS or self._checkpointing is not None:
            return
        self._checkpointed = self._applied.events

        def work() -> None:
            try:
                with contextlib.suppress(SpaceError, OSError):
                    self.wal.sync()
                    history.write_checkpoint(self.path, self._tables)
            finally:
                self._checkpointing = None

        self._checkpointing = threading.Thread(target=work, name="space-checkpoint")
        self._checkpointing.start()

    def close(self) -> None:
        """Makes everything durable and closes; closing twice does nothing."""
        if self.federation is not None:
            self.federation.close()
        with self._lock:
            if self._closed:
                return
            checkpointing = self._checkpointing
            if checkpointing is not None:
                checkpointing.join()
            try:
                self._close(clean=True)
            finally:
                self._lock_file.close()

    def _close(self, *, clean: bool) -> None:
        self._closed = True
        self._writer.close()
        sealed = False
        try:
            self.wal.close(clean=clean)
            sealed = clean and not self._behind
        finally:
            with contextlib.suppress(SpaceError, OSError):
                self._tables.close(seal=sealed)


def _releases(command: Command) -> bool:
    """Whether a command leads to space being given back: alone, or beside attributes that say so."""
    if isinstance(command, cmd.Together):
        whole = all(
            isinstance(each, (*RELEASING, cmd.SetXattr, cmd.RemoveXattr)) for each in command.commands
        )
        return whole and any(isinstance(each, RELEASING) for each in command.commands)
    return isinstance(command, RELEASING)


def located(wal: Log, error: CorruptionError) -> CorruptionError:
    """Damaged content, known by batch and payload offset, with the segment and the offset in it."""
    if error.segment or error.position < 1:
        return error
    info = next(each for each in wal.segments() if each.first_index <= error.position <= each.last_index)
    offset = -1
    with contextlib.suppress(io.UnsupportedOperation):  # a disk in memory
        offset = wal.payload_location(error.position)[1] + max(error.offset, 0)
    return CorruptionError(
        f"log segment {info.name}, offset {offset}: {error}",
        segment=info.name,
        offset=offset,
        position=error.position,
        hint="`space verify` lists all damage; restore the file from a backup or a replica",
    )


def usable_key(row: bytes | None, key: int) -> bytes | None:
    """A row of the key table.

    Raises:
        RefusedError: it can be opened in the home zone of what it is for, and not here.
    """
    if row is not None and is_for_home(row):
        raise RefusedError(
            f"key {key} is sealed for its home zone: this zone holds the content and cannot read it",
            hint="federation.sealed in the policy, there",
            status=Status.NOT_PERMITTED,
        )
    return row


def refuse_reclaimed(txn: ReadTransaction, damaged: CorruptionError) -> None:
    """Tells payload that gc gave back from payload that is damaged.

    Raises:
        RefusedError: gc has declared the frame that does not read as it was written to be given back.
    """
    position, offset = damaged.position, max(damaged.offset, 0)
    row = txn.last_at_or_before(RECLAIMED, U64.pack(position) + U32.pack(offset))
    if row is None or row[0][:8] != U64.pack(position):
        return
    if offset < U32.unpack(row[0][8:])[0] + U32.unpack(row[1])[0]:
        raise RefusedError(
            f"bytes of position {position} were reclaimed",
            hint="they are past the history their policy keeps",
            status=Status.IO,
        )


def store_key(store: bytes) -> bytes:
    """The key that belongs to the store itself, from its id."""
    return blake3(store, derive_key_context="space store key v1").digest()


_POLICIES: dict[Policy, Policy] = {}


def _without_dedupe(policy: Policy) -> Policy:
    plain = _POLICIES.get(policy)
    if plain is None:
        if len(_POLICIES) > 1000:
            _POLICIES.clear()
        plain = _POLICIES[policy] = attrs.evolve(policy, dedupe=False)
    return plain


def pack_policy(policy: Policy) -> bytes:
    """A policy as the canonical document events carry."""
    packed: bytes = msgpack.packb(policy.to_document())
    return packed


def _lock_directory(path: Path, create: bool) -> TextIO:
    try:
        if create:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        elif not any((path / name).exists() for name in (FORMAT_FILE, FORMAT_NEW, WAL)):
            raise NotFoundError(f"no store at {path}", hint="space put or space import makes one")
        file = open(path / LOCK_FILE, "a+", errors="replace")  # noqa: SIM115 - held until close
    except OSError as error:
        raise StorageError(f"cannot open {path}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        owner = file.read(32).strip() or "unknown"
        file.close()
        raise UnavailableError(
            f"store {path} is in use by process {owner}", hint="stop it, or ask it: --node"
        ) from None
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _identify(path: Path, disk: Disk, random_bytes: Callable[[int], bytes]) -> tuple[bytes, bool]:
    """The store's id, and whether the store is still being made.

    Raises:
        CorruptionError: the log is gone, or neither it nor the format file says whose it is.
    """
    wal = str(path / WAL)
    has_log = disk.exists(wal) and any(name.endswith(".seg") for name in disk.listdir(wal))
    known = read_format(path / FORMAT_FILE)
    if known is None and (fresh := read_format(path / FORMAT_NEW)) is not None:
        return fresh, True
    if has_log:
        store = known or read_store_id(disk, path / WAL)
        if store is None:
            raise lost(FORMAT_FILE, f"{path / FORMAT_FILE} and the log's first blocks are damaged")
        if known is None:
            write_format(path / FORMAT_NEW, store)
            (path / FORMAT_NEW).rename(path / FORMAT_FILE)
        return store, False
    if known is not None or any((path / name).exists() for name in (history.LIVE, history.CHECKPOINTS)):
        raise lost(WAL, f"the log in {wal} is gone")
    store = random_bytes(16)
    write_format(path / FORMAT_NEW, store)
    return store, True


def _refuse_member(disk: Disk, path: Path, store: bytes) -> None:
    """A store that is one replica of several is written by its group alone.

    Raises:
        UnavailableError: this one is.
    """
    state = read_raft_state(disk, str(path / WAL), store_id=store)
    if state is not None and state.configuration.voters != (state.node,):
        raise UnavailableError(
            f"store {path} is node {state.node} of a cluster, and that node is not running",
            hint=f"space serve --data {path} starts it; --at reads a past moment without",
        )


def lost(file: str, message: str) -> CorruptionError:
    """The error for a file of the data directory without which there is no store."""
    hint = "the log is the store: restore it from a backup"
    return CorruptionError(message, segment=file, offset=0, position=1, hint=hint)


def read_format(path: Path) -> bytes | None:
    """The store's id, or None if the file is missing or damaged."""
    try:
        document = json.loads(path.read_bytes())
        version, store, crc = document["format"], document["store"], document["crc32c"]
        if crc != _format_crc(version, store):
            return None
        if version != FORMAT:
            raise UsageError(
                f"{path} has format {version}; this program knows {FORMAT}", hint="upgrade space"
            )
        return uuid.UUID(store).bytes
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # the log knows it too


def _format_crc(version: object, store: object) -> str:
    return f"{crc32c(f'{version} {store}'.encode(errors='replace')):08x}"


def write_format(path: Path, store: bytes) -> None:
    """Writes whose store it is, durably."""
    text = str(uuid.UUID(bytes=store))
    with path.open("w") as file:
        file.write(json.dumps({"format": FORMAT, "store": text, "crc32c": _format_crc(FORMAT, text)}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_store_id(disk: Disk, wal: Path) -> bytes | None:
    """The store's id, from the first segment of the log that has a sound header."""
    names = (
        [name for name in disk.listdir(str(wal)) if name.endswith(".seg")] if disk.exists(str(wal)) else []
    )
    for name in sorted(names):
        with contextlib.closing(disk.open(str(wal / name))) as file:
            header = parse_segment_header(file.pread(SEGMENT_HEADER_BYTES, 0))
            if header is not None:
                return header.store_id
    return None


@contextlib.contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """What the operating system refuses while opening, in our words."""
    try:
        yield
    except OSError as error:
        import errno

        kind = DiskFullError if error.errno == errno.ENOSPC else StorageError
        raise kind(f"cannot open store {path}: {error.strerror or error}") from None
