"""The block model over a store in this process, over one replica of a cluster, or over a past moment.

Reading is done in the caller's turn of the loop: a look at the map and a read from the page cache cost less than
asking another thread for it.  Long reads go to a thread, and so does whatever met damage there (a replica then asks
its peers).

Mutations of one turn of the loop, from all devices of a store, are one batch (:class:`BlockWriter`), and everything
that waits for durability meanwhile shares one fdatasync.  A write is one command, so it is whole after any crash;
that is why none is longer than one extent.

Compare-and-write reads, compares, and writes on the condition that the capsule is as it was read: the command
carries the position of the last change, and deciding refuses it when that has moved, whoever moved it and on
whatever node.  So nothing can come in between, and no lock outlives a crash.  While one is under way, this process
holds back other mutations of the capsule, or a busy device would never be found unchanged.

Reservations are rows of the state.  A host is checked against those that are here, and its command carries their
position: deciding refuses it if they have changed since, so a host that was preempted through one node writes through
none, however late its command comes.

What a buffer given to :meth:`LocalBlockDevice.write` holds must not change before the call returns, cancelled or
not: raw frames are written from it.  A cancelled mutation returns when it is settled.

One loop only; a cluster's member answers from its own threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

import attrs
from blake3 import blake3

from space._errors import (
    ConflictError,
    CorruptionError,
    RefusedError,
    SpaceError,
    Status,
    StorageError,
    UnavailableError,
    UsageError,
)
from space._node.block_cache import CHUNK_BYTES, UNIT_BYTES, Kept, cache_of
from space._node.reading import Reading
from space._node.store import STALE_RETRIES, Store
from space.events import commands as cmd
from space.events.commands import Buffer, Command, Durability, Receipt, Request
from space.events.ids import AtPosition, CapsuleId
from space.events.types import COPY_BYTES_MAX, EXTENT_BYTES_MAX, Kind
from space.policy.model import Policy
from space.projections import content_map
from space.projections.block import BlockInfo
from space.statemachine import reservations
from space.statemachine.apply import namespace_key
from space.statemachine.store import ReadTransaction
from space.statemachine.store import Store as Tables
from space.statemachine.tables import NAMESPACE, RESERVATION, U32, U64, CapsuleRow

if TYPE_CHECKING:
    from space._node.member import Member

logger = logging.getLogger("space")

WRITE_BYTES_MAX: Final = EXTENT_BYTES_MAX
"""Longest write, and longest compare-and-write: one command, and so one event, is what a crash leaves whole."""

BLOCK_BYTES: Final = 512
"""Block size of a capsule that was made without one."""

READ_HERE_BYTES_MAX: Final = 256 << 10
"""A longer read takes a thread: fetching and checking it would keep the loop from everybody else for too long."""

TOGETHER_MAX: Final = 1024
"""Requests handed in at once: what a batch may hold is bounded anyway, what a group's leader is sent by this."""

COMPARE_RETRIES: Final = 64
"""How often a compare-and-write begins anew because others write to the capsule, before it gives up."""

GROUP_SECONDS: Final = 20.0
"""How long a group may take, through elections: a host gives a command up after 30 seconds (nvme_core.io_timeout of
Linux), and should be told before: then it does not repeat what is still under way."""

ANSWER_SECONDS: Final = 40.0
"""How long a group's answer is waited for: twice what the group itself takes to give up, so its node has ended."""

_ZEROS: Final = memoryview(bytes(1 << 20))

Outcome = Receipt | SpaceError


# --- mutations -------------------------------------------------------------------------------------


class _Gate:
    """Lets many in together, or one alone; who waits to be alone is not overtaken."""

    def __init__(self) -> None:
        self._inside = 0
        self._alone = asyncio.Lock()
        self._empty = asyncio.Event()

    def enter_now(self) -> bool:
        """As :meth:`enter`, unless that would have to wait."""
        if self._alone.locked():
            return False
        self._inside += 1
        return True

    async def enter(self) -> None:
        """Lets one of many in; each leaves again."""
        if self._alone.locked():
            async with self._alone:
                self._inside += 1
        else:
            self._inside += 1

    def leave(self) -> None:
        """One of many goes."""
        self._inside -= 1
        if not self._inside:
            self._empty.set()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Nobody else is inside."""
        async with self._alone:
            while self._inside:
                self._empty.clear()
                await self._empty.wait()
            yield


@attrs.define(eq=False)
class _Handed:
    """Commands of one caller, and who waits for their outcomes."""

    requests: list[Request]
    settled: asyncio.Future[list[Outcome]]
    left: bool = False
    answered: bool = False

    def cancelled(self) -> bool:
        """Whether nobody wants it any more; it has not left."""
        return self.settled.cancelled()

    def answer(self, outcomes: list[Outcome]) -> None:
        """Tells who waits."""
        self.answered = True
        if not self.settled.done():
            self.settled.set_result(outcomes)


@attrs.define(eq=False)
class _Begun:
    """A command nobody waits for: its outcome is called back."""

    requests: list[Request]
    done: Callable[[Outcome], None]
    left: bool = False

    def cancelled(self) -> bool:
        """Never."""
        return False

    def answer(self, outcomes: list[Outcome]) -> None:
        """Tells."""
        self.done(outcomes[0])


class BlockWriter:
    """The way into a store for all block devices of one loop."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._member = _member(store)
        self._waiting: list[_Handed | _Begun] = []
        self._draining = False
        self._thread = ThreadPoolExecutor(1, "space-block")
        self._sync_thread = ThreadPoolExecutor(1, "space-block-sync")
        self._syncing: asyncio.Future[None] | None = None
        self._gates: weakref.WeakValueDictionary[bytes, _Gate] = weakref.WeakValueDictionary()
        self._kept: dict[bytes, weakref.WeakSet[Kept]] = {}

    def gate(self, capsule: CapsuleId) -> _Gate:
        """The gate that all devices of a capsule share."""
        found = self._gates.get(capsule)
        if found is None:
            found = self._gates[capsule] = _Gate()
        return found

    async def execute(self, requests: list[Request], *, durable: bool) -> list[Outcome]:
        """Has commands carried out in order, together with what else is handed in meanwhile.

        A caller that is cancelled stays until its commands are settled, unless they have not left yet.
        """
        loop = asyncio.get_running_loop()
        handed = _Handed(requests, loop.create_future())
        self._hand_in(handed)
        try:
            outcomes = await handed.settled
        except asyncio.CancelledError:
            if handed.left and not handed.answered:
                handed.settled = loop.create_future()
                await asyncio.wait([handed.settled])
            raise
        if durable:
            position = max((each.position for each in outcomes if isinstance(each, Receipt)), default=0)
            await self.durable(position)
        return outcomes

    def begin(self, request: Request, done: Callable[[Outcome], None]) -> None:
        """As :meth:`execute`, of one command, for callers that have more to do than to wait."""
        self._hand_in(_Begun([request], done))

    def tell(self, capsule: CapsuleId, kept: Kept) -> None:
        """Has what is kept of a capsule told of writes to it, until nobody keeps it any more."""
        self._kept.setdefault(capsule, weakref.WeakSet()).add(kept)

    def _hand_in(self, handed: _Handed | _Begun) -> None:
        self._waiting.append(handed)
        if not self._draining:
            self._draining = True
            asyncio.get_running_loop().call_soon(self._drain)

    async def durable(self, position: int | None = None) -> None:
        """Returns once all batches up to ``position`` (default: everything acknowledged) are durable.

        Raises:
            StorageError: the disk refuses.
        """
        if self._member is not None:
            return  # what a group acknowledges is durable on a quorum
        store = self.store
        wanted = store.last if position is None else position
        while store.wal.durable_index < wanted:
            syncing = self._syncing
            if syncing is None or syncing.done():
                loop = asyncio.get_running_loop()
                syncing = self._syncing = loop.run_in_executor(self._sync_thread, store.sync)
            await asyncio.shield(syncing)

    async def close(self) -> None:
        """Ends the helper threads, once they have nothing to do; the store stays open."""
        await asyncio.to_thread(self._thread.shutdown)
        await asyncio.to_thread(self._sync_thread.shutdown)

    # --- one turn of the loop ---------------------------------------------------------------------

    def _drain(self) -> None:
        taken, self._waiting = self._waiting[:TOGETHER_MAX], self._waiting[TOGETHER_MAX:]
        handed = [each for each in taken if not each.cancelled()]
        for each in handed:
            each.left = True
        requests = [request for each in handed for request in each.requests]
        store = self.store
        if not requests:
            self._next()
        elif self._member is not None:
            self._hand_over(self._member, requests, handed)
        elif store._lock.acquire(blocking=False):
            try:
                before, events = store._tables.version, store._applied.events
                outcomes = _carried_out(store, requests)
                if store._applied.events - events == len(outcomes):
                    self._tell_written(before, requests, outcomes)
            finally:
                store._lock.release()
            self._settle(handed, outcomes)
        else:  # whoever has the lock may keep it for long, as gc does: the loop does not wait for it
            loop = asyncio.get_running_loop()
            carrying = loop.run_in_executor(self._thread, _carried_out, store, requests)
            carrying.add_done_callback(lambda done: self._settle(handed, done.result()))

    def _tell_written(self, before: int, requests: list[Request], outcomes: list[Outcome]) -> None:
        """Tells what is kept of ranges written, where nothing else was: one event each, and none of anybody else."""
        written = [each.command for each in requests if isinstance(each.command, cmd.WriteExtent)]
        if len(written) < len(requests) or not all(isinstance(each, Receipt) for each in outcomes):
            return
        after = self.store._tables.version
        for command in written:
            for kept in self._kept.get(command.capsule, ()):
                kept.written(before, command.offset, command.length)
        for capsule in {command.capsule for command in written}:
            for kept in self._kept.get(capsule, ()):
                kept.moved(before, after)

    def _settle(self, handed: list[_Handed | _Begun], outcomes: list[Outcome]) -> None:
        _resolve(handed, outcomes)
        self._next()

    def _next(self) -> None:
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._drain)
        else:
            self._draining = False

    def _hand_over(self, member: Member, requests: list[Request], handed: list[_Handed | _Begun]) -> None:
        """Gives the commands to the group, which has many such under way at a time."""
        try:
            answer = member.group.start(requests, seconds=GROUP_SECONDS)
        except SpaceError as error:
            self._settle(handed, [error] * len(requests))
            return
        _when_answered(answer, lambda outcomes: _resolve(handed, outcomes), [_lost()] * len(requests))
        self._next()


def _carried_out(store: Store, requests: list[Request]) -> list[Outcome]:
    try:
        return store.execute_all(requests, durability=Durability.BUFFERED)
    except SpaceError as error:
        return [error] * len(requests)
    except Exception as error:
        logger.exception("the store broke under a block device")
        return [StorageError(f"the store met {type(error).__name__}")] * len(requests)


def _resolve(handed: list[_Handed | _Begun], outcomes: list[Outcome]) -> None:
    at = 0
    for each in handed:
        each.answer(outcomes[at : at + len(each.requests)])
        at += len(each.requests)


def _when_answered(answer: Future[Any], then: Callable[[Any], object], otherwise: Any) -> None:
    """Calls ``then`` in this loop with what a future of another brings, or after ANSWER_SECONDS with ``otherwise``."""
    loop = asyncio.get_running_loop()
    timer = loop.call_later(ANSWER_SECONDS, then, otherwise)

    def arrived(result: Any) -> None:
        timer.cancel()
        then(result)

    def done(future: Future[Any]) -> None:
        result = future.exception() or future.result()
        with contextlib.suppress(RuntimeError):  # this loop has ended, and with it whoever waited
            loop.call_soon_threadsafe(arrived, result)

    answer.add_done_callback(done)


def _lost() -> UnavailableError:
    return UnavailableError("the node gave no answer", hint="it may still be carried out")


def _member(reading: Reading) -> Member | None:
    """The reading, if it is a replica; whose module needs a while to import, and nobody alone needs it."""
    if type(reading) is Store or not isinstance(reading, Store):
        return None
    from space._node.member import Member

    return reading if isinstance(reading, Member) else None


# --- the device ------------------------------------------------------------------------------------


@attrs.frozen
class _Seen:
    """A capsule as of one version of the tables, which is worth remembering for all that happens at that one."""

    tables: Tables
    version: int
    row: CapsuleRow
    policy: Policy
    info: BlockInfo
    reserved_row: bytes | None
    reserved: reservations.State


class LoggedReservations:
    """The reservations of a device as the log has them: what the NVMe view calls a keeper.

    Attributes:
        checked: what a command was checked against last.  From there to the device's method nothing else runs, so
            it is what that command was checked against.
    """

    persistent = True

    def __init__(self, device: LocalBlockDevice) -> None:
        self._device = device
        self.checked: reservations.State | None = None

    @property
    def state(self) -> reservations.State:
        """As they are known here."""
        self.checked = self._device._now().reserved
        return self.checked

    async def change(self, command: reservations.Command, *, actor: str) -> None:
        """Has a command decided; it is durable, and folded here, on return.

        Raises:
            SpaceError: it is refused, or could not be logged.
        """
        (outcome,) = await self._device._writable().execute([Request(command, actor)], durable=True)
        if isinstance(outcome, SpaceError):
            raise outcome

    async def confirm(self) -> None:
        """Returns when the rows here have everything acknowledged anywhere before."""
        await self._device._up_to_date()


class LocalBlockDevice:
    """A :class:`space.projections.block.BlockDevice` over a :class:`Reading`, and its reservations."""

    def __init__(self, reading: Reading, capsule: CapsuleId, *, writer: BlockWriter | None = None) -> None:
        """Serves a capsule; only where ``writer`` leads into the same store it can be changed.

        Close it: until then gc leaves the capsule alone even if it is deleted.

        Raises:
            NotFoundError: there is no such capsule.
            UsageError: it is no file; or ``writer`` is one of another store.
        """
        if writer is not None and writer.store is not reading:
            raise UsageError("a past moment, or another store, is not written to", status=Status.READ_ONLY)
        self._reading = reading
        self._capsule = capsule
        self._writer = writer
        self._member = _member(reading)
        self._gate = writer.gate(capsule) if writer else _Gate()
        self._seen: _Seen | None = None
        self._retrying: set[asyncio.Future[None]] = set()
        self._kept = Kept(cache_of(reading)) if self._member is None else None
        if writer is not None and self._kept is not None:
            writer.tell(capsule, self._kept)
        self.reservations = LoggedReservations(self)
        kind = reading.stat(capsule).kind
        if kind != Kind.FILE:
            raise UsageError(f"not a file: {capsule}")
        self._store = reading if isinstance(reading, Store) else None
        if self._store:
            self._store.pinned[capsule] += 1
        self._closed = False

    def close(self) -> None:
        """Lets go of the capsule; closing twice does nothing."""
        store = self._store
        if store and not self._closed:
            store.pinned[self._capsule] -= 1
            if not store.pinned[self._capsule]:
                del store.pinned[self._capsule]
        self._closed = True

    def info(self) -> BlockInfo:
        """What it is now, on a cluster's member as far as that one knows.

        Raises:
            NotFoundError: the capsule is gone.
        """
        return self._now().info

    def _now(self) -> _Seen:
        """The capsule as it is; asking for the version of the tables is cheaper than looking it up."""
        seen, tables = self._seen, self._reading._tables
        behind = self._store is not None and self._store._behind  # the look below brings the tables up
        if seen is not None and not behind and seen.tables is tables and seen.version == tables.version:
            return seen
        with self._look() as txn:
            return self._see(txn)

    def _see(self, txn: ReadTransaction) -> _Seen:
        before, reading = self._seen, self._reading
        row = reading._row(txn, self._capsule)
        if before is not None and before.row.policy == row.policy:  # a number means the same policy for ever
            policy = before.policy
        else:
            policy = reading._policy(txn, row.policy)
        mapped = content_map.map_row(txn, self._capsule)
        block = row.block_size or BLOCK_BYTES
        size = row.size - row.size % block
        allocated = min(mapped.allocated, size) if mapped else 0
        info = BlockInfo(self._capsule, size, block, allocated, self._writer is None, row.change)
        reserved_row = txn.get(RESERVATION, self._capsule)
        if before is not None and before.reserved_row == reserved_row:
            reserved = before.reserved
        else:
            reserved = reservations.State.decode(reserved_row)
        self._seen = _Seen(reading._tables, txn.version, row, policy, info, reserved_row, reserved)
        if self._kept is not None:
            self._kept.seen(txn.version, row.change)
        return self._seen

    def _reserved(self) -> int | None:
        """The position of the reservations that the command that just came was checked against."""
        checked = self.reservations.checked
        return None if checked is None else checked.position

    # --- reading ---------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        reserved = self._reserved()
        await self._up_to_date()
        if length > READ_HERE_BYTES_MAX:
            return await asyncio.to_thread(self._read_whole, offset, length, reserved)
        try:
            with self._look() as txn:
                self._check_reserved(txn, reserved)
                return self._keeping(txn, offset, length)
        except CorruptionError:
            return await asyncio.to_thread(self._read_whole, offset, length, reserved)

    def peek(self, offset: int, length: int) -> Sequence[Buffer] | None:
        """As the protocol says: what was read before, and is as it was."""
        kept, seen = self._kept, self._seen
        if kept is None or seen is None or kept.version != seen.version:
            return None
        found = kept.get(offset, length)
        return None if found is None else (found,)

    def _keeping(self, txn: ReadTransaction, offset: int, length: int) -> Sequence[Buffer]:
        """Reads, and keeps what was read, or the frame it is in."""
        kept, seen = self._kept, self._seen
        if kept is None or seen is None or seen.row.key or txn.version != kept.version:
            return self._pieces(txn, offset, length)
        chunk = offset - offset % CHUNK_BYTES
        if offset + length <= chunk + CHUNK_BYTES:
            whole = content_map.covering(txn, self._capsule, chunk, CHUNK_BYTES)
            if whole is not None and len(whole.frames) == content_map.FRAME_BYTES:
                content = self._read_one(whole)
                kept.put(chunk, content)
                return (memoryview(content)[offset - chunk : offset - chunk + length],)
        pieces = self._pieces(txn, offset, length)
        if offset % UNIT_BYTES == 0 and length % UNIT_BYTES == 0 and length <= CHUNK_BYTES:
            piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            kept.put(offset, piece if isinstance(piece, bytes | memoryview) else bytes(piece))
        return pieces

    def _read_one(self, extent: content_map.Extent) -> bytes | memoryview:
        """The content of an extent in one frame."""
        (content,) = self._reading._content.read_parts(
            extent.frames, extent.position, extent.skip, extent.length
        )
        return content if isinstance(content, bytes | memoryview) else bytes(content)

    async def _up_to_date(self) -> None:
        """Returns when what is here is as new as anything acknowledged anywhere before."""
        if self._member is not None:
            await self._confirm(self._member)

    def _check_reserved(self, txn: ReadTransaction, reserved: int | None) -> None:
        """A replica learns of what was acknowledged elsewhere after a command was checked.

        Raises:
            ConflictError: the reservations are others by now.
        """
        if (
            reserved is not None
            and self._member is not None
            and reservations.position_of(txn.get(RESERVATION, self._capsule)) != reserved
        ):
            raise ConflictError(f"the reservations of {self._capsule} changed meanwhile")

    def _look(self) -> AbstractContextManager[ReadTransaction]:
        """A snapshot of what is here; on a member as it is, confirmed or not."""
        if self._member is None:
            return self._reading._read()
        with self._member.stale():
            return self._member._read()

    async def _confirm(self, member: Member) -> None:
        """Returns when this replica has everything acknowledged anywhere before (ReadIndex)."""
        answer: Future[None] = Future()
        confirmed: asyncio.Future[SpaceError | None] = asyncio.get_running_loop().create_future()

        def arrived(found: SpaceError | None) -> None:
            if not confirmed.done():
                confirmed.set_result(found)

        _when_answered(answer, arrived, _lost())
        member.node.call_soon(member.group.begin_barrier, answer, GROUP_SECONDS)
        if (error := await confirmed) is not None:
            raise error

    def _read_whole(self, offset: int, length: int, reserved: int | None = None) -> list[Buffer]:
        """In another thread: mends what can be mended, and says where damage is."""
        try:
            with self._look() as txn:
                self._check_reserved(txn, reserved)
                return self._pieces(txn, offset, length)
        except CorruptionError:
            data = self._reading.read(self._capsule, offset, length)
            return [data, *_zeros(length - len(data))]

    def _pieces(self, txn: ReadTransaction, offset: int, length: int) -> list[Buffer]:
        read = self._reading._content.read_parts
        whole = content_map.covering(txn, self._capsule, offset, length)
        if whole is not None:
            return read(whole.frames, whole.position, whole.skip, length)
        pieces: list[Buffer] = []
        at, end = offset, offset + length
        for extent in content_map.extents(txn, self._capsule, offset, length):
            if extent.offset > at:
                pieces += _zeros(extent.offset - at)
            pieces += read(extent.frames, extent.position, extent.skip, extent.length)
            at = extent.end
        if at < end:
            pieces += _zeros(end - at)
        return pieces

    # --- writing ---------------------------------------------------------------------------------

    def begin_write(
        self, offset: int, data: Buffer, *, actor: str, done: Callable[[SpaceError | None], None]
    ) -> bool:
        """As the protocol says, and as :meth:`write`."""
        writer = self._writable()
        if not self._gate.enter_now():
            return False
        reserved = self._reserved()

        def settled(outcome: Outcome) -> None:
            if isinstance(outcome, Receipt):
                self._gate.leave()
                done(None)
            else:
                task = asyncio.ensure_future(
                    self._written_after(outcome, offset, data, reserved, actor, done)
                )
                self._retrying.add(task)
                task.add_done_callback(self._retrying.discard)

        try:
            command = self._encoded(writer, self._now(), offset, data, reserved, plainly=False)
            writer.begin(Request(command, actor), settled)
        except BaseException:
            self._gate.leave()
            raise
        return True

    async def _written_after(
        self,
        refusal: SpaceError,
        offset: int,
        data: Buffer,
        reserved: int | None,
        actor: str,
        done: Callable[[SpaceError | None], None],
    ) -> None:
        """The rest of :meth:`begin_write` where the first attempt was refused."""
        error: SpaceError | None = None
        try:
            if refusal.status is Status.STALE:
                retries = range(1, STALE_RETRIES)
                await self._attempt(offset, data, reserved, actor, attempts=retries, durable=False)
            else:
                error = await self._refused(refusal)
        except SpaceError as caught:
            error = caught
        except Exception as caught:
            logger.exception("a write broke")
            error = StorageError(f"the store met {type(caught).__name__}")
        finally:
            self._gate.leave()
        done(error)

    async def write(self, offset: int, data: Buffer, *, durable: bool, actor: str) -> None:
        """As the protocol says; at most :data:`WRITE_BYTES_MAX`.

        Raises:
            UsageError: longer (status TOO_LARGE), or beyond the end (NO_SPACE).
        """
        self._writable()
        reserved = self._reserved()
        await self._gate.enter()
        try:
            await self._attempt(offset, data, reserved, actor, attempts=range(STALE_RETRIES), durable=durable)
        finally:
            self._gate.leave()

    async def _attempt(
        self, offset: int, data: Buffer, reserved: int | None, actor: str, *, attempts: range, durable: bool
    ) -> None:
        writer = self._writable()
        for attempt in attempts:
            command = self._encoded(writer, self._now(), offset, data, reserved, plainly=attempt > 0)
            (outcome,) = await writer.execute([Request(command, actor)], durable=durable)
            if isinstance(outcome, Receipt):
                return
            if outcome.status is not Status.STALE or attempt == attempts[-1]:
                raise await self._refused(outcome)

    async def _refused(self, error: SpaceError) -> SpaceError:
        """What a caller is told.  If reservations have changed, its next attempt is checked against the new ones."""
        if error.status is Status.EXISTS:
            await self._up_to_date()
        return error

    def _check_inside(self, seen: _Seen, offset: int, length: int) -> None:
        """A capsule without blocks would grow; one with blocks is refused later, in the same words."""
        if offset < 0 or offset + length > seen.info.size:
            raise UsageError(
                f"{offset}+{length} is beyond the {seen.info.size} bytes of {self._capsule}",
                status=Status.NO_SPACE,
            )

    def _encoded(
        self,
        writer: BlockWriter,
        seen: _Seen,
        offset: int,
        data: Buffer,
        reserved: int | None,
        *,
        plainly: bool,
        change: int | None = None,
    ) -> cmd.WriteExtent:
        """The one command that writes ``data``; ``plainly``: without referring to bytes stored before."""
        if not 0 < len(data) <= WRITE_BYTES_MAX:
            raise UsageError(
                f"a write of {len(data)} bytes; 1 to {WRITE_BYTES_MAX} are whole after a crash",
                status=Status.TOO_LARGE,
            )
        self._check_inside(seen, offset, len(data))
        policy = attrs.evolve(seen.policy, dedupe=False) if plainly else seen.policy
        (command,) = writer.store.encode_extents(self._capsule, offset, data, policy, seen.row.key)
        assert isinstance(command, cmd.WriteExtent)
        return cmd.WriteExtent(
            command.capsule, command.offset, command.length, command.frames, change, reserved
        )

    async def write_zeroes(
        self, offset: int, length: int, *, deallocate: bool, durable: bool, actor: str
    ) -> None:
        await self._change([self._hole(offset, length)], durable, actor)

    async def deallocate(self, ranges: Sequence[tuple[int, int]], *, actor: str) -> None:
        commands = [self._hole(offset, length) for offset, length in ranges if length]
        await self._change(commands, durable=False, actor=actor)

    def _hole(self, offset: int, length: int) -> cmd.Deallocate:
        return cmd.Deallocate(self._capsule, offset, length, reserved=self._reserved())

    async def copy(
        self, ranges: Sequence[tuple[int, int]], target: int, *, durable: bool, actor: str
    ) -> None:
        """As the protocol says; a copy that ends beyond the device does nothing."""
        self._writable()
        self._check_inside(self._now(), target, sum(length for _, length in ranges))
        commands: list[Command] = []
        reserved = self._reserved()
        for offset, length in ranges:
            commands += _copies(self._capsule, offset, length, target, reserved)
            target += length
        await self._change(commands, durable, actor)

    async def _change(self, commands: Sequence[Command], durable: bool, actor: str) -> None:
        """Carries out commands in order; raises the first error there is."""
        writer = self._writable()
        if not commands:
            return
        await self._gate.enter()
        try:
            requests = [Request(command, actor) for command in commands]
            outcomes = await writer.execute(requests, durable=durable)
        finally:
            self._gate.leave()
        for outcome in outcomes:
            if isinstance(outcome, SpaceError):
                raise await self._refused(outcome)

    async def compare_and_write(
        self, offset: int, expected: Buffer, data: Buffer, *, durable: bool, actor: str
    ) -> int:
        """As the protocol says; at most :data:`WRITE_BYTES_MAX`.

        Raises:
            ConflictError: others write to the capsule so fast that it was never found unchanged (STALE).
        """
        writer = self._writable()
        reserved = self._reserved()
        if len(expected) != len(data):
            raise UsageError(f"{len(expected)} bytes to compare with, {len(data)} to write")
        async with self._gate.alone():
            for attempt in range(COMPARE_RETRIES):
                await self._up_to_date()
                try:
                    with self._look() as txn:
                        self._check_reserved(txn, reserved)
                        seen = self._see(txn)
                        command = self._encoded(
                            writer, seen, offset, data, reserved, plainly=attempt > 0, change=seen.row.change
                        )
                        held = b"".join(self._pieces(txn, offset, len(data)))
                except CorruptionError:
                    await asyncio.to_thread(self._read_whole, offset, len(data))
                    continue
                if (differs := _first_difference(held, expected)) >= 0:
                    return differs
                (outcome,) = await writer.execute([Request(command, actor)], durable=durable)
                if isinstance(outcome, Receipt):
                    return -1
                if outcome.status is not Status.STALE:
                    raise await self._refused(outcome)
        raise ConflictError(f"capsule {self._capsule} changes too fast to be compared", status=Status.STALE)

    async def flush(self) -> None:
        if self._writer is not None:
            await self._writer.durable()

    def _writable(self) -> BlockWriter:
        if self._writer is None:
            raise RefusedError("this device is read-only", status=Status.READ_ONLY)
        return self._writer


def _zeros(length: int) -> list[Buffer]:
    """Zeros as buffers that all share one."""
    whole, rest = divmod(length, len(_ZEROS))
    return [*[_ZEROS] * whole, *([_ZEROS[:rest]] if rest else [])]


def _first_difference(held: bytes, expected: Buffer) -> int:
    """Offset of the first byte that is not the same in both, or -1."""
    view = memoryview(expected).cast("B")
    if held == view:
        return -1
    low, high = 0, len(held)
    while high - low > 1:  # the first difference is in [low, high)
        middle = (low + high) // 2
        if held[low:middle] == view[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _copies(
    capsule: CapsuleId, offset: int, length: int, target: int, reserved: int | None
) -> list[cmd.CopyRange]:
    """Commands for a copy inside a capsule, so ordered that none overwrites what a later one reads."""
    starts = range(0, length, COPY_BYTES_MAX)
    return [
        cmd.CopyRange(capsule, target + at, capsule, offset + at, min(COPY_BYTES_MAX, length - at), reserved)
        for at in (starts if target < offset else reversed(starts))
    ]


# --- identities ------------------------------------------------------------------------------------


@attrs.frozen
class NamespaceIdentity:
    """What hosts know a namespace by: the same on every node, after every restart, for ever.

    Attributes:
        uuid: 16 bytes; the capsule's id, or for a past moment a UUIDv8 made of id and moment.
        nguid: 16 bytes (NVM Command Set 1.0 §4.1.5): a vendor part of 8 bytes, a locally administered
            organization's number of 3 and its extension of 5.
        eui64: 8 bytes, beginning with a locally administered organization's number.
    """

    uuid: CapsuleId
    nguid: bytes
    eui64: bytes


_LOCAL: Final = 0x02
_GROUP: Final = 0x01
"""Bits of an organization's number (IEEE 802-2014 §8.2): assigned locally; stands for a group."""


def namespace_identity(capsule: CapsuleId, at: AtPosition | None = None) -> NamespaceIdentity:
    """Identity of a capsule as a namespace; of what it was at ``at``, which is another one and never changes."""
    uuid = capsule
    if at is not None:
        event = b"" if at.event is None else U32.pack(at.event)
        uuid = capsule.derive(b"@" + U64.pack(at.position) + event)
    nguid = bytearray(blake3(uuid, derive_key_context="space nvme nguid v1").digest(16))
    eui64 = bytearray(blake3(uuid, derive_key_context="space nvme eui64 v1").digest(8))
    nguid[8] = nguid[8] & ~_GROUP | _LOCAL
    eui64[0] = eui64[0] & ~_GROUP | _LOCAL
    return NamespaceIdentity(uuid, bytes(nguid), bytes(eui64))


def namespace_number(store: Store, subsystem: str, namespace: CapsuleId) -> int:
    """The NSID of a namespace (by its uuid) in a subsystem; the first who asks has one assigned, for ever.

    Blocks: not for a loop.

    Raises:
        UsageError: not the name of a subsystem.
        SpaceError: it could not be logged.
    """
    known = known_number(store, subsystem, namespace)
    if known is None:
        store.execute(cmd.AssignNamespace(subsystem, namespace))
        known = known_number(store, subsystem, namespace)
        assert known is not None
    return known


def known_number(reading: Reading, subsystem: str, namespace: CapsuleId) -> int | None:
    """The NSID of a namespace in a subsystem, or None if it was never given one."""
    with reading._read() as txn:
        row = txn.get(NAMESPACE, namespace_key(subsystem, namespace))
    return None if row is None else int(U32.unpack(row)[0])
