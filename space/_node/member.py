"""A store that is one replica of a group: the same words as a single node's, decided by the group's leader.

What differs from :class:`space._node.store.Store`:

* a command goes to the group and comes back when it is committed on a quorum and applied here;
* the present is what is committed and applied, not the end of the log;
* a look at the present is preceded by a ReadIndex, unless this thread asked for less (:meth:`Member.relaxed`);
* the tables are written by the group alone, through the methods of
  :class:`space.replication.replica.Machine` and :class:`space.replication.node.Host`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import msgpack
from crc32c import crc32c

from space._errors import (
    DiskFullError,
    NotFoundError,
    RefusedError,
    SpaceError,
    StorageError,
    UnavailableError,
    UsageError,
)
from space._node import history, maintenance
from space._node.keys_file import MASTER_KEY_ENVIRONMENT, MASTER_KEY_FILE
from space._node.store import (
    FORMAT_FILE,
    FREE_BYTES_MIN,
    WAL,
    Store,
    read_format,
    write_format,
)
from space.content.frames import unpack_frames
from space.events.codec import decode_batch
from space.events.commands import Buffer, Command, Durability, Receipt, Request, Together
from space.events.registry import BY_CLASS, LINK_BYTES
from space.events.types import ExtentWritten, KeyDestroyed, PayloadReclaimed
from space.policy.model import Policy
from space.projections.feed import Progress, fold
from space.replication.group import Group
from space.replication.node import Node, empty_state
from space.replication.replica import in_effect
from space.statemachine.apply import RECLAIMED_RANGE
from space.statemachine.sequencer import Prepared
from space.statemachine.store import DATA, SEAL, Applied, ReadTransaction, read_seal
from space.statemachine.tables import MEMBER, RECLAIMED, TABLES, U32, U64
from space.wal.disk import Disk
from space.wal.log import Log
from space.wal.raft_state import RaftStateFile
from space.wal.segment_format import RecordInfo
from space.wal.shipping import decode_chunk

if TYPE_CHECKING:
    from collections.abc import Callable

HEAL_FILE: Final = "heal"
"""While it is there, the next start looks at every byte of the log and fetches from the peers what is damaged."""

FETCH_SECONDS: Final = 10.0
log: Final = logging.getLogger("space.cluster")
FETCHED: Final = "checkpoint-fetched"
_RECLAIM_MARK: Final = bytes((BY_CLASS[PayloadReclaimed].number, 1, 0xC4, LINK_BYTES))
"""How an event that reclaims payload begins in a batch: its number, its version, a binary link.

Only a batch with these bytes is decoded to look for one; fewer of them are in every second batch by chance.
"""

_DESTROY_MARK: Final = bytes((BY_CLASS[KeyDestroyed].number, 1, 0xC4, LINK_BYTES))
"""How an event that destroys a key begins in a batch: what was opened with any key is forgotten then."""

REBUILD_POSITIONS: Final = 100_000
"""How far a checkpoint must be ahead of the tables to replace them instead of folding what is between."""


class Member(Store):
    """See the module's text.  Made, attached to a group and closed by :mod:`space._node.cluster`."""

    def __init__(self, path: Path, *, node: int, store: bytes, ships: bool = True, **options: Any) -> None:
        """Opens the directory as far as it is committed.

        Args:
            node: id of this node.
            store: id of the log: the same on all replicas.
            ships: whether what it holds can be shipped to other zones: only the shard with the tree is.

        Raises:
            CorruptionError: the log is damaged; it can be healed from the other members.
            SpaceError: as for :class:`space._node.store.Store`.
        """
        self._node_id = node
        self._store_id = store
        self._ships = ships
        self._group: Group | None = None
        self._node: Node | None = None
        self._thread = threading.local()
        super().__init__(path, create=True, **options)

    def _open(self, disk: Disk, segment_bytes: int, on_progress: Callable[[Progress], None] | None) -> None:
        history.clear_scratch(self.path, owner=True)
        known = read_format(self.path / FORMAT_FILE)
        if known is not None and known != self._store_id:
            raise UsageError(
                f"{self.path} holds another store than the one of this cluster",
                hint="a node that is to be added begins with an empty directory",
            )
        if known is None:
            write_format(self.path / FORMAT_FILE, self._store_id)
        self.id = self._store_id
        self._disk = disk
        directory = str(self.path / WAL)
        self.wal = Log.open(disk, directory, store_id=self.id, segment_bytes=segment_bytes)
        try:
            self.state_file = RaftStateFile.open(disk, directory, store_id=self.id)
            self._own_state()
            tables = history.open_live(
                self.path,
                self.wal,
                self.views,
                last=self._committed(),
                until=self._in_effect,
                on_progress=on_progress,
            )
        except BaseException:
            self.wal.close(clean=False)
            raise
        try:
            self._begin(tables)
        except BaseException:
            self._close(clean=False)
            raise

    def _own_state(self) -> None:
        state = self.state_file.state
        if state is None:
            if self.wal.last_index:
                raise UsageError(
                    f"{self.path} holds a store that belongs to no cluster yet", hint="space serve founds one"
                )
            self.state_file.save(empty_state(self._node_id), sync=True)
        elif state.node != self._node_id:
            raise UsageError(
                f"{self.path} belongs to node {state.node}, not to node {self._node_id}",
                hint="each node has a directory of its own",
            )
        elif self.wal.last_term > state.term:
            # Batches came from a peer while the log was healed.  No vote was given in their term: it would be here.
            state = attrs.evolve(state, term=self.wal.last_term, vote=0)
            self.state_file.save(state, sync=True)

    def _committed(self) -> int:
        """Up to where the log is known to be committed."""
        state = self.state_file.state
        assert state is not None
        alone = state.configuration.voters == (self._node_id,) and not state.configuration.voters_outgoing
        return self.wal.last_index if alone else min(state.commit, self.wal.last_index)

    def _in_effect(self, start: int, commit: int) -> int:
        state = self.state_file.state
        assert state is not None
        return in_effect(self.wal, max(start, state.configuration_index), commit)

    def _initialise(self) -> None:
        """The root directory comes with the log."""

    def attach(self, node: Node, group: Group) -> None:
        """Tells the store which group decides for it, before the node starts."""
        self._node, self._group = node, group

    @property
    def group(self) -> Group:
        """The group that decides."""
        if self._group is None:
            raise UnavailableError("this store has not joined its group yet")
        return self._group

    @property
    def node(self) -> Node:
        """The running node."""
        if self._node is None:
            raise UnavailableError("this store has not joined its group yet")
        return self._node

    @property
    def last(self) -> int:
        return self._applied.position

    # --- commands --------------------------------------------------------------------------------

    def execute_all(
        self, requests: Sequence[Request], *, durability: Durability = Durability.DURABLE
    ) -> list[Receipt | SpaceError]:
        """Has the leader carry out commands in order; each has its own outcome, durable on a quorum."""
        if self._closed:
            raise UnavailableError(f"store {self.path} is closed")
        if not requests:
            return []
        self._check_ships(requests)
        exempt = bool(getattr(self._thread, "alone", False))
        return self.group.execute(list(requests), exempt=exempt)

    def begin(self, requests: Sequence[Request]) -> Future[list[Receipt | SpaceError]]:
        if self._closed:
            raise UnavailableError(f"store {self.path} is closed")
        self._check_ships(requests)
        return self.group.start(list(requests))

    def _check_ships(self, requests: Sequence[Request]) -> None:
        """Refuses policies that promise a capsule of this shard to other zones.

        Raises:
            RefusedError: one does.
        """
        for command in _each(requests) if not self._ships else ():
            document = getattr(command, "policy", None)
            if document and Policy.from_document(msgpack.unpackb(document)).federation_targets:
                raise RefusedError(
                    "only what has a name is shipped to other zones, and this capsule is in another shard",
                    hint="put it under a name, or leave federation.targets out of its policy",
                )

    def wait(self, future: Future[list[Receipt | SpaceError]]) -> list[Receipt | SpaceError]:
        return self.node.wait(future)

    def sync(self, position: int | None = None) -> None:
        """Nothing to do: what is acknowledged is durable on a quorum."""

    def _make_master_key(self) -> None:
        """Makes one while this node is alone; a key that the other members lack would leave them unreadable content.

        Raises:
            RefusedError: there are other members.
        """
        state = self.state_file.state
        if state is not None and state.configuration.voters != (self._node_id,):
            raise RefusedError(
                "this cluster has no master key, and one made here would be missing on its other nodes",
                hint=f"give every node the same: {MASTER_KEY_ENVIRONMENT}, or {MASTER_KEY_FILE} in its directory",
            )
        super()._make_master_key()

    def refuse(self, requests: list[Request]) -> SpaceError | None:
        """Why the leader cannot decide these now, or None; asked in the loop."""
        if len(self._with_room(requests)) == len(requests):
            return None
        return DiskFullError(
            f"less than {FREE_BYTES_MIN >> 20} MiB free at {self.path}, on the leader",
            hint="nothing was changed; free some space there: space rm and space gc still work",
        )

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While it is held, the leader decides no commands but this thread's.

        Raises:
            NotLeaderError: this node does not lead.
        """
        replica = self.group.replica
        self._ask(self._freeze)
        self._thread.alone = True
        try:
            deadline = time.monotonic() + ALONE_SECONDS
            while self._ask(lambda: replica.under_way):
                if time.monotonic() > deadline:
                    raise UnavailableError(
                        "batches under way are not being committed", hint="space cluster status"
                    )
                time.sleep(POLL_SECONDS)
            yield
        finally:
            self._thread.alone = False
            self._ask(lambda: setattr(replica, "frozen", False))
            self.node.call_soon(self.group.schedule)

    def _freeze(self) -> None:
        replica = self.group.replica
        if not replica.leads():
            raise replica.driver.not_leader()
        replica.frozen = True

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        replica = self.group.replica
        self._ask(lambda: setattr(replica, "held", True))
        try:
            with self.stale():  # what a quorum knows more of would be waited for, and cannot be applied
                yield
        finally:
            self._ask(lambda: setattr(replica, "held", False))
            self.node.call_soon(self.group.schedule)

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Has the loop answer something."""
        future: Future[Any] = Future()

        def answer() -> None:
            try:
                future.set_result(question())
            except SpaceError as error:
                future.set_exception(error)

        self.node.call_soon(answer)
        return self.node.wait(future)

    def gc(self, **options: Any) -> maintenance.GcReport:
        """Reclaims on the leader; the other members follow when they apply the declaration."""
        with self.relaxed(math.inf):
            return maintenance.gc(self, **options)

    # --- reads -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def relaxed(self, seconds: float) -> Iterator[None]:
        """In this thread, one ReadIndex is good for that long: 0 for a mount that wants every look confirmed.

        With infinity, everything within the block is one look at the store.
        """
        before = getattr(self._thread, "relaxed", None), getattr(self._thread, "until", 0.0)
        self._thread.relaxed = seconds
        try:
            yield
        finally:
            self._thread.relaxed, self._thread.until = before

    @contextlib.contextmanager
    def stale(self) -> Iterator[None]:
        """In this thread, reads show what is applied here, however old."""
        before = getattr(self._thread, "until", 0.0)
        self._thread.until = math.inf
        try:
            yield
        finally:
            self._thread.until = before

    def confirm(self) -> None:
        """Returns when the state here is as new as anything acknowledged before, as far as this thread wants that.

        Raises:
            UnavailableError: there is no leader that a quorum follows.
        """
        now = time.monotonic()
        if getattr(self._thread, "until", 0.0) > now:
            return
        self.group.barrier()
        good_for = getattr(self._thread, "relaxed", None)
        if good_for is not None:
            self._thread.until = now + good_for

    def _read(self) -> AbstractContextManager[ReadTransaction]:
        if self._closed:
            raise UnavailableError(f"store {self.path} is closed")
        self.confirm()
        return self._tables.read()

    # --- the machine of the group ------------------------------------------------------------------

    @property
    def applied_now(self) -> Applied:
        """Where the tables stand."""
        return self._applied

    def reading(self) -> AbstractContextManager[ReadTransaction]:
        """The tables as they stand, to decide against."""
        return self._tables.read()

    def apply_batches(self, items: Sequence[Any]) -> None:
        """Folds consecutive batches; those decided here are written as they were decided."""
        self.wanted = True
        try:
            at = 0
            while at < len(items):
                end = at + 1
                decided = items[at].prepared is not None
                while end < len(items) and (items[end].prepared is not None) == decided:
                    end += 1
                self._apply_decided(items[at:end]) if decided else self._apply_logged(items[at:end])
                at = end
            if any(_DESTROY_MARK in item.metadata for item in items):
                self.forget_keys()
        finally:
            self.wanted = False
        self._maybe_checkpoint()

    def _apply_decided(self, items: Sequence[Any]) -> None:
        before = self._applied
        try:
            with self._tables.write() as txn:
                self.wanted = False
                for item in items:
                    prepared: Prepared = item.prepared
                    self._apply(txn, prepared, item.chain)
        except BaseException:
            self._applied = before
            raise

    def _apply_logged(self, items: Sequence[Any]) -> None:
        self._applied = fold(self._tables, self.views, items, start=self._applied)
        for item in items if self.watchers else ():
            for watcher in self.watchers:
                watcher(decode_batch(item.metadata))
        for item in items:
            if _RECLAIM_MARK in item.metadata:
                self._reclaim(item.metadata)

    def _reclaim(self, metadata: bytes) -> None:
        """Gives back here what the leader declared reclaimed."""
        for entry in decode_batch(metadata):
            for _, event in entry.events:
                if isinstance(event, PayloadReclaimed):
                    for position, offset, length in RECLAIMED_RANGE.iter_unpack(event.ranges):
                        with contextlib.suppress(SpaceError):
                            self.wal.punch(position, offset, length)

    def catch_up(self, log: Log, position: int) -> None:
        """Folds the log up to ``position``, from a checkpoint where that is much nearer."""
        newest = next(
            (int(path.name) for path in history.checkpoints(self.path) if int(path.name) <= position), 0
        )
        target = history.Target(position)
        self.forget_keys()  # some may be destroyed in what is folded
        if newest - self._applied.position >= REBUILD_POSITIONS or (newest and not self._applied.position):
            self._replace_tables(target)
        else:
            with contextlib.suppress(OSError):
                self._applied = history.catch_up(self._tables, log, self.views, target)
                return
            raise StorageError(f"cannot fold the log into {self.path}")

    def _replace_tables(self, target: history.Target) -> None:
        """New tables from a checkpoint in place of these; readers of these see their end."""
        fresh = self.path / history.SCRATCH / "fresh"
        tables = history.build(self.path, self.wal, self.views, fresh, target)
        tables.close(seal=True)
        old = self._tables
        aside = self.path / history.SCRATCH / f"old-{time.time_ns()}"
        (self.path / history.LIVE).rename(aside)
        fresh.rename(self.path / history.LIVE)
        self._tables = history.open_live(self.path, self.wal, self.views, last=target.position)
        self._applied = self._tables.applied
        with contextlib.suppress(SpaceError, OSError):
            old.close(seal=False)
        shutil.rmtree(aside, ignore_errors=True)

    # --- the host of the group -----------------------------------------------------------------------

    def members(self) -> dict[int, tuple[str, str]]:
        """Role and address of each member, as of what is applied here."""
        with self._tables.read() as txn:
            return {
                U64.unpack(key)[0]: (found[0], found[1])
                for key, value in txn.scan(MEMBER, b"")
                for found in [msgpack.unpackb(value)]
            }

    def newest_checkpoint(self) -> tuple[int, list[tuple[str, int]]] | None:
        """Position of the newest checkpoint, and its files with their sizes."""
        for path in history.checkpoints(self.path):
            with contextlib.suppress(OSError):
                return int(path.name), [(name, (path / name).stat().st_size) for name in (DATA, SEAL)]
        return None

    def read_checkpoint(self, position: int, name: str, offset: int, length: int) -> bytes:
        """Bytes of a checkpoint's file."""
        if name not in (DATA, SEAL):
            raise UsageError(f"no such file of a checkpoint: {name!r:.40}")
        try:
            with (self.path / history.CHECKPOINTS / f"{position:020d}" / name).open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except OSError:
            raise NotFoundError(f"checkpoint {position} is gone") from None

    def write_checkpoint(self, position: int, name: str, offset: int, data: bytes) -> None:
        """Stores bytes of a checkpoint that is being fetched."""
        if name not in (DATA, SEAL):
            raise UsageError(f"no such file of a checkpoint: {name!r:.40}")
        directory = self.path / history.SCRATCH / FETCHED
        try:
            if offset == 0 and name == DATA:
                shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True, exist_ok=True)
            with (directory / name).open("r+b" if offset else "wb") as file:
                file.seek(offset)
                file.write(data)
        except OSError as error:
            raise StorageError(f"cannot store a checkpoint in {directory}: {error.strerror}") from None

    def adopt_checkpoint(self, position: int) -> None:
        """Takes the fetched checkpoint as one of its own, if it is whole and fits the log."""
        directory = self.path / history.SCRATCH / FETCHED
        found = read_seal(directory, history.layout_of(self.views))
        if found is not None and found.position == position and history.fits(self.wal, found):
            target = self.path / history.CHECKPOINTS / f"{position:020d}"
            target.parent.mkdir(exist_ok=True)
            if not target.exists():
                directory.rename(target)
        shutil.rmtree(directory, ignore_errors=True)

    def heal_later(self) -> None:
        """The next start of this node heals the log before anything else."""
        with contextlib.suppress(OSError):
            (self.path / HEAL_FILE).touch(exist_ok=False)
            log.warning(
                "the log in %s is damaged: restart this node, and it is healed from its peers", self.path
            )

    def restore(self, position: int) -> bool:
        """Fetches the payload of one batch from a peer that has the same batch, and puts it in its place."""
        if position < 1 or self._node is None:
            return False
        try:
            chain = self.wal.read(position).chain
        except SpaceError:
            self.heal_later()
            return False
        for peer in [each for each in self.members() if each != self._node_id]:
            with contextlib.suppress(SpaceError):
                chunk = decode_chunk(b"".join(self._fetch(peer, position)))
                batch = chunk.batches[0]
                if batch.chain == chain and not batch.reclaimed:
                    self.wal.restore_payload(position, b"".join(piece.data for piece in batch.pieces))
                    log.warning(
                        "payload of position %d in %s was damaged; restored from node %d",
                        position,
                        self.path,
                        peer,
                    )
                    return True
        return False

    def _fetch(self, peer: int, position: int) -> list[Buffer]:
        number = self.group.number

        async def ask() -> list[Buffer]:
            return (
                await self.node.transport.request(
                    peer, "chunk", [number, position, position], timeout=FETCH_SECONDS
                )
            )[1]

        return self.node.run(ask(), seconds=FETCH_SECONDS)

    def is_reclaimed(self, info: RecordInfo, payload: bytes) -> bool:
        """Whether nothing but what was declared reclaimed is missing from the payload of a batch."""
        with self._tables.read() as txn:
            declared = {U32.unpack(key[8:])[0] for key, _ in txn.scan(RECLAIMED, U64.pack(info.index))}
        if not declared:
            return False
        return all(
            crc32c(payload[frame.payload_offset : frame.payload_offset + frame.stored_length]) == frame.crc
            for entry in decode_batch(info.metadata)
            for _, event in entry.events
            if isinstance(event, ExtentWritten)
            for frame in unpack_frames(event.frames)
            if not frame.source_position and frame.stored_length and frame.payload_offset not in declared
        )

    def rebuild(self) -> str:
        """Rebuilds the state from the log, without a checkpoint; names the first difference it found."""
        scratch = self.path / history.SCRATCH / "rebuilt"
        position = self._applied.position
        tables = history.build(
            self.path, self.wal, self.views, scratch, history.Target(position), use_checkpoints=False
        )
        try:
            with self._tables.read() as ours, tables.read() as theirs:
                found = first_difference(ours, theirs)
        finally:
            tables.close(seal=True)
        for checkpoint in history.checkpoints(self.path):  # made of what was wrong
            shutil.rmtree(checkpoint, ignore_errors=True)
        aside = self.path / history.SCRATCH / f"old-{time.time_ns()}"
        old = self._tables
        (self.path / history.LIVE).rename(aside)
        scratch.rename(self.path / history.LIVE)
        self._tables = history.open_live(self.path, self.wal, self.views, last=position)
        self._applied = self._tables.applied
        with contextlib.suppress(SpaceError, OSError):
            old.close(seal=False)
        shutil.rmtree(aside, ignore_errors=True)
        return found

    def _close(self, *, clean: bool) -> None:
        with contextlib.suppress(AttributeError, SpaceError):
            if clean and self.state_file.state is not None:
                commit = max(self.state_file.state.commit, self._applied.position)
                self.state_file.save(attrs.evolve(self.state_file.state, commit=commit), sync=True)
            self.state_file.close()
        super()._close(clean=clean)


ALONE_SECONDS: Final = 10.0
POLL_SECONDS: Final = 0.005


class MemberMachine:
    """A :class:`Member` as its replica sees it."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self.reading = member.reading
        self.apply = member.apply_batches
        self.catch_up = member.catch_up

    @property
    def applied(self) -> Applied:
        """Where it stands."""
        return self._member.applied_now


def _each(requests: Sequence[Request]) -> Iterator[Command]:
    """The commands of requests, and those that are one."""
    for request in requests:
        command = request.command
        yield from command.commands if isinstance(command, Together) else (command,)


def first_difference(ours: ReadTransaction, theirs: ReadTransaction) -> str:
    """Names the first table and the first row in which two states differ."""
    for table, name in TABLES.items():
        for mine, wanted in _paired(ours.scan(table, b""), theirs.scan(table, b"")):
            if mine != wanted:
                key = (mine or wanted or (b"", b""))[0]
                what = "missing" if mine is None else "not in the log" if wanted is None else "different"
                return f"first in table {name}, row {key.hex()}: {what}"
    return "the rows are the same: the digest alone had gone wrong"


Row = tuple[bytes, bytes]


def _paired(ours: Iterator[Row], theirs: Iterator[Row]) -> Iterator[tuple[Row | None, Row | None]]:
    """Rows of both by key."""
    mine, wanted = next(ours, None), next(theirs, None)
    while mine is not None or wanted is not None:
        if wanted is None or (mine is not None and mine[0] < wanted[0]):
            yield mine, None
            mine = next(ours, None)
        elif mine is None or wanted[0] < mine[0]:
            yield None, wanted
            wanted = next(theirs, None)
        else:
            yield mine, wanted
            mine, wanted = next(ours, None), next(theirs, None)
