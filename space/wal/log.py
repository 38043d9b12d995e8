"""The write-ahead log: append, group commit, read, cut, reclaim, verify.

Threads: one caller at a time appends (or cuts, or closes); any number of threads sync and read at the
same time.  What they share is published by assigning one immutable :class:`~space.wal.recovery.Tail`.
One thread at a time is *leader*: only it syncs, writes the watermark, or changes the list of segments;
everyone who waits for a sync meanwhile shares the leader's, or is next.

Failures: an append that the disk refuses leaves the log as it was, and works again once the disk does.
A failed fdatasync is final: nobody knows what reached the disk (the kernel reports it once and then
forgets), so the log refuses every further write until it is opened again and recovers what is there.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import itertools
import posixpath
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, Self, TypeVar, final

import attrs
from crc32c import crc32c

from space._errors import ConflictError, NotFoundError, RefusedError, StorageError, UsageError
from space.wal.disk import Buffer, Disk, File
from space.wal.recovery import (
    TERM_UNKNOWN,
    Recovered,
    RecoveryReport,
    Segment,
    Tail,
    corrupt,
    create_segment,
    cut,
    read_index,
    recover,
    remove_segments,
    start_of,
    storage_error,
    storage_errors,
)
from space.wal.segment_format import (
    BLOCK_BYTES,
    METADATA_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
    RECORD_ALIGNMENT,
    RECORD_HEADER_BYTES,
    SEAL_BYTES,
    SEGMENT_BYTES_MAX,
    SEGMENT_BYTES_MIN,
    SEGMENT_HEADER_BYTES,
    STORE_ID_BYTES,
    RecordInfo,
    RecordKind,
    SegmentHeader,
    align,
    index_name,
    payload_offset,
)
from space.wal.segment_reader import (
    BadRecord,
    Damage,
    RecordHeader,
    Scanned,
    find_headers,
    parse_record_header,
    parse_seal,
    parse_segment_header,
    scan,
    sum_payload,
)
from space.wal.segment_writer import encode_record, encode_seal, gather, measure, record_length
from space.wal.sidecar import encode_index
from space.wal.watermark import WatermarkFile, WatermarkFlag

SEGMENT_BYTES: Final = 64 * 2**20

_OFFSET_MAPS_MAX: Final = 8  # sealed segments whose record offsets are kept: at most a few MB each
_FILES_MAX: Final = 128  # open sealed segments
_TIME_MAX: Final = 2**63 - 1
_TERM_MAX: Final = 2**64 - 1
_PLACES_MAX: Final = 4096  # payload places remembered for random reads
_ZERO_AHEAD: Final = bytes(512 * 2**10)  # see docs/adr/0002-wal-record.md
_SMALL_SYNC_BYTES: Final = 128 * 2**10

_T = TypeVar("_T")


@attrs.frozen
class SegmentInfo:
    """A segment as reported by :meth:`Log.segments`.

    Attributes:
        name: file name.
        first_index: index of its first batch.
        last_index: index of its last batch; ``first_index - 1`` if it holds none.
        size: bytes of records and headers (not the space reserved after them).
        sealed: whether it is full and will not change.
    """

    name: str
    first_index: int
    last_index: int
    size: int
    sealed: bool


@attrs.frozen
class Finding:
    """Damage met by :meth:`Log.verify`.

    Attributes:
        segment: file name.
        offset: byte offset of the damaged thing in it, or -1 for the whole file.
        index: batch that is damaged or was expected there.
        what: see :class:`~space.wal.segment_reader.Damage`.  ``PAYLOAD`` is no damage where the payload
            was reclaimed with :meth:`Log.punch`; the caller knows.
    """

    segment: str
    offset: int
    index: int
    what: Damage


class StoredBatch(NamedTuple):
    """A batch as it is stored, payload included.

    Attributes:
        payload: its bytes as read now.
        payload_crc: CRC32C of the payload as it was written first.
        intact: whether ``payload`` still has that CRC.  If not, blocks of it were reclaimed, or it is damaged: the
            log cannot tell which; whoever reclaims can.
    """

    info: RecordInfo
    payload: bytes
    payload_crc: int
    intact: bool


class _Place(NamedTuple):
    """Where a payload is."""

    segment: Segment
    offset: int
    length: int
    crc: int


class _Active(NamedTuple):
    """The last segment: the one written to."""

    segment: Segment
    file: File
    offsets: array[int]


class _Span(NamedTuple):
    """The records of one segment: where they end and which link must come out there."""

    segment: Segment
    end: int
    last_index: int
    chain: bytes


@final
class Log:
    """A log in a directory of segment files.  Made by :meth:`open`.

    Attributes:
        recovery: what opening found and did.
    """

    def __init__(
        self, disk: Disk, directory: str, store_id: bytes, segment_bytes: int, found: Recovered
    ) -> None:
        self._disk = disk
        self._directory = directory
        self._store_id = store_id
        self._segment_bytes = segment_bytes
        self.recovery: Final[RecoveryReport] = found.report

        # Published in this order by a rotation, read in the opposite order: a reader that has the new
        # tail has the new segments.
        self._segments = found.segments
        self._active = _Active(found.segments[-1], found.active, found.offsets)
        self._tail = found.tail
        self._durable = found.tail
        self._watermark = found.watermark

        self._garbage_end = 0  # leftovers of a failed append reach to here
        self._stray: int | None = None  # segment made by a failed rotation, to be removed
        self._zeroed_end = 0
        self._syncs_are_small = False
        self._failure = ""
        self._closed = False
        self._cuts = 0
        self._protected = found.tail.index  # up to here the watermark is durable
        self._holed = 0  # last batch that was appended without all of its payload

        self._turn = threading.Condition()
        self._leading = False
        self._cache = threading.Lock()
        self._files: dict[int, File] = {}
        self._lent: dict[int, File] = {}
        self._maps: dict[int, array[int]] = {}
        self._places: dict[int, _Place] = {}

    @classmethod
    def open(
        cls,
        disk: Disk,
        directory: str,
        *,
        store_id: bytes,
        segment_bytes: int = SEGMENT_BYTES,
        read_only: bool = False,
    ) -> Self:
        """Open the log in ``directory``, making it (and the directory) if there is none.

        Recovers from whatever stopped the last writer; see :mod:`space.wal.recovery`.

        Args:
            store_id: 16 bytes; segments of another store are refused.
            segment_bytes: space reserved for each new segment.
            read_only: change nothing on the disk; appending is refused.

        Raises:
            CorruptionError: acknowledged records are missing or damaged; nothing was changed.
            NotFoundError: ``read_only``, and there is no log.
            StorageError: the disk refused.
            UsageError: an argument is out of range.
        """
        if len(store_id) != STORE_ID_BYTES:
            raise UsageError(f"a store id has {STORE_ID_BYTES} bytes, not {len(store_id)}")
        if not SEGMENT_BYTES_MIN <= segment_bytes <= SEGMENT_BYTES_MAX:
            raise UsageError(
                f"a segment has {SEGMENT_BYTES_MIN} to {SEGMENT_BYTES_MAX} bytes, not {segment_bytes}"
            )
        found = recover(
            disk,
            directory,
            store_id=store_id,
            segment_bytes=align(segment_bytes, BLOCK_BYTES),
            read_only=read_only,
        )
        return cls(disk, directory, store_id, align(segment_bytes, BLOCK_BYTES), found)

    # -- where the log stands ------------------------------------------------------------------------

    @property
    def first_index(self) -> int:
        """Index of the first batch the log holds or will hold."""
        return self._segments[0].first_index

    @property
    def last_index(self) -> int:
        """Index of the last batch, 0 if there is none."""
        return self._tail.index

    @property
    def last_chain(self) -> bytes:
        """32-byte link after the last record."""
        return self._tail.chain

    @property
    def last_time_ns(self) -> int:
        """Time of the last record, 0 if there is none."""
        return self._tail.time_ns

    @property
    def last_term(self) -> int:
        """Raft term of the last batch, 0 if there is none.

        Raises:
            CorruptionError: that batch is damaged.
        """
        tail = self._tail
        return self.term(tail.index) if tail.term == TERM_UNKNOWN else tail.term

    @property
    def durable_index(self) -> int:
        """Last batch known to survive a power loss."""
        return self._durable.index

    def segments(self) -> list[SegmentInfo]:
        """All segments, oldest first."""
        segments, tail = self._segments, self._tail
        infos = [
            SegmentInfo(
                segment.name, segment.first_index, following.first_index - 1, segment.size, sealed=True
            )
            for segment, following in itertools.pairwise(segments)
        ]
        last = segments[-1]
        return [*infos, SegmentInfo(last.name, last.first_index, tail.index, tail.end, sealed=False)]

    def bytes_on_disk(self) -> int:
        """Bytes the segments take on the disk: reserved space counts, reclaimed space does not."""
        with storage_errors("cannot measure the log"):
            return sum(self._file(segment).allocated_bytes() for segment in self._segments)

    # -- writing -------------------------------------------------------------------------------------

    def append(
        self,
        metadata: bytes,
        payload: Sequence[Buffer] = (),
        *,
        time_ns: int,
        term: int = 0,
        kind: RecordKind = RecordKind.BATCH,
        payload_crc: int | None = None,
        holes: Sequence[tuple[int, int]] = (),
    ) -> int:
        """Add a record at the end: visible to readers at once, durable after :meth:`sync`.

        One caller at a time.  When it fails the log is as before, and may be appended to again.

        Args:
            metadata: at most 64 MiB.
            payload: buffers of bytes, stored one after the other; at most 256 MiB.
            time_ns: at least the time of the last record.
            term: Raft term.
            kind: records other than batches take no index.
            payload_crc: CRC32C of the payload as it was written first, if ``payload`` is what reclaiming left of it.
            holes: offset and length of the reclaimed parts of such a payload, zeros in ``payload``; given
                back to the disk where it can do that.

        Returns:
            The index of the batch; for other kinds, of the last batch before it.

        Raises:
            DiskFullError: no space.
            StorageError: the disk refused, or an earlier sync failed.
            UsageError: too large, or not a kind that callers write.
            ValueError: ``time_ns`` goes backwards.
        """
        self._check_writable()
        if time_ns < self._tail.time_ns:
            raise ValueError(f"record time {time_ns} is before the last record's, {self._tail.time_ns}")
        if kind is RecordKind.SEAL:
            raise UsageError("seals are written by the log itself")
        if time_ns > _TIME_MAX or not 0 <= term <= _TERM_MAX:
            raise UsageError(f"time {time_ns} or term {term} is out of range")
        payload = gather(payload)
        payload_length, found_crc = measure(payload)
        if len(metadata) > METADATA_BYTES_MAX or payload_length > PAYLOAD_BYTES_MAX:
            raise UsageError(
                f"a record holds up to {METADATA_BYTES_MAX} bytes of metadata, {PAYLOAD_BYTES_MAX} of payload"
            )
        length = record_length(self._tail.end, len(metadata), payload_length)
        if self._tail.end + length + SEAL_BYTES > self._active.segment.size:
            self._rotate(length)
        tail, active = self._tail, self._active
        is_batch = kind is RecordKind.BATCH
        record = encode_record(
            offset=tail.end,
            seed=active.segment.seed,
            kind=kind,
            index=tail.index + is_batch,
            term=term,
            time_ns=time_ns,
            previous_chain=tail.chain,
            durable_end=self._durable.end if self._durable.segment == tail.segment else 0,
            metadata=metadata,
            payload=payload,
            payload_length=payload_length,
            payload_crc=found_crc if payload_crc is None else payload_crc,
        )
        place = tail.end + payload_offset(tail.end, len(metadata), payload_length)
        self._write(record.buffers, tail.end, tail.end + record.length, blocks_inside(place, holes))
        if payload_crc not in {None, found_crc}:
            self._holed = tail.index + is_batch
        if is_batch:
            active.offsets.append(tail.end)
        self._tail = Tail(
            tail.segment,
            tail.end + record.length,
            tail.index + is_batch,
            record.chain,
            time_ns,
            tail.records + 1,
            term if is_batch else tail.term,
        )
        return self._tail.index

    def sync(self, index: int | None = None) -> None:
        """Return once all records up to batch ``index`` (default: all appended so far) are durable.

        Any number of threads: those that wait at the same time share one fdatasync.

        Raises:
            StorageError: the sync failed, now or earlier: open the log again.
            UsageError: there is no such batch yet.
        """
        self._check_writable()
        target = self._tail
        if index is not None and index > target.index:
            raise UsageError(f"cannot sync up to position {index}: the log ends at {target.index}")
        if index is None:
            self._lead_until(lambda: self._durable.records >= target.records)
        else:
            self._lead_until(lambda: self._durable.index >= index)

    def _lead_until(self, is_done: Callable[[], bool]) -> None:
        """Wait for a leader to do it, or be the leader."""
        with self._turn:
            while self._leading and not is_done():
                self._turn.wait()
            self._check_writable()
            if is_done():
                return
            self._leading = True
        try:
            self._make_durable()
        finally:
            self._stop_leading()

    @contextlib.contextmanager
    def _lead(self) -> Iterator[None]:
        """Be the leader: nobody else syncs, writes the watermark or changes the list of segments."""
        with self._turn:
            while self._leading:
                self._turn.wait()
            self._check_writable()
            self._leading = True
        try:
            yield
        finally:
            self._stop_leading()

    def _stop_leading(self) -> None:
        with self._turn:
            self._leading = False
            self._turn.notify_all()

    def _make_durable(self) -> None:
        """As the leader, sync what has been appended so far."""
        tail = self._tail
        with self._failing_for_good("cannot sync the log"):
            self._active.file.fdatasync()
        self._syncs_are_small = tail.end - self._durable.end <= _SMALL_SYNC_BYTES
        # Above a durable watermark, recovery would take a payload with holes for a torn one.
        self._publish_durable(tail, sync=int(self._protected < min(self._holed, tail.index)))

    def _publish_durable(
        self, tail: Tail, flags: WatermarkFlag = WatermarkFlag.NONE, *, sync: int = 0
    ) -> None:
        """Write the watermark, ``sync`` times durably, then let waiters see it."""
        with self._failing_for_good("cannot write the watermark"):
            for _ in range(max(sync, 1)):
                self._marks.write(tail.index, tail.segment, tail.end, tail.chain, flags)
                if sync:
                    self._marks.sync()
        self._durable = tail
        if sync:
            self._protected = tail.index

    @property
    def _marks(self) -> WatermarkFile:
        assert self._watermark is not None  # only a read-only log has none
        return self._watermark

    @contextlib.contextmanager
    def _failing_for_good(self, doing: str) -> Iterator[None]:
        """Nobody knows what the disk holds after these fail, so the log takes no more."""
        try:
            yield
        except OSError as error:
            self._failure = f"{doing}: {error.strerror or error}"
            raise storage_error(doing, error) from error

    def _check_writable(self) -> None:
        if self._failure:
            raise StorageError(
                f"the log in {self._directory} has failed ({self._failure})",
                hint="reopen the store to recover",
            )
        if self._closed or self._watermark is None:
            state = "closed" if self._closed else "open for reading only"
            raise RefusedError(f"the log in {self._directory} is {state}")

    def _write(self, buffers: list[Buffer], offset: int, end: int, holes: Sequence[tuple[int, int]]) -> None:
        active = self._active
        if self._syncs_are_small and self._zeroed_end < end:
            # The first write to reserved space makes the next sync commit a journal; writing zeros ahead
            # pays that once for many small records.
            ahead = memoryview(_ZERO_AHEAD)[: max(active.segment.size - end, 0)]
            buffers.append(ahead)
            self._zeroed_end = end + len(ahead)
        try:
            if self._garbage_end:
                self._clear_garbage()
            active.file.pwritev(buffers, offset)
            for start, stop in holes:
                punch_blocks(active.file, start, stop)
        except OSError as error:
            self._garbage_end = max(self._garbage_end, end)
            with contextlib.suppress(OSError):
                self._clear_garbage()
            raise storage_error("cannot append to the log", error) from error

    def _clear_garbage(self) -> None:
        """Zero what a failed write left after the tail, so that no crash can bring it back."""
        length = self._garbage_end - self._tail.end
        if length > 0:
            self._active.file.zero_range(self._tail.end, length)
        self._garbage_end = 0

    # -- segments ------------------------------------------------------------------------------------

    def _rotate(self, record_bytes: int) -> None:
        """Start a new segment with room for a record, and seal the old one."""
        with self._lead():
            tail, old = self._tail, self._active
            # The payload's alignment may take one block more in the new place.
            need = SEGMENT_HEADER_BYTES + record_bytes + BLOCK_BYTES + SEAL_BYTES
            least = align(need, BLOCK_BYTES)
            size = max(self._segment_bytes, least)
            if tail.index < old.segment.first_index:
                self._enlarge(tail.end + size)
                return
            header = SegmentHeader(self._store_id, tail.index + 1, tail.time_ns, tail.chain)
            with storage_errors("cannot start a new log segment"):
                self._remove_stray()
                if least <= self._disk.free_bytes(self._directory) < size:
                    size = least  # the last room of a full disk is for what makes room
                self._stray = header.first_index
                file = create_segment(self._disk, self._directory, header, size)
                sealed = self._seal(old, tail)
            self._stray = None
            self._write_index(sealed, old.offsets, tail.chain)
            self._remember(self._files, old.segment.first_index, old.file, _FILES_MAX)
            self._remember(self._maps, old.segment.first_index, old.offsets, _OFFSET_MAPS_MAX)
            fresh = Segment(header, size)
            self._segments = (*self._segments[:-1], sealed, fresh)
            self._active = _Active(fresh, file, array("Q"))
            self._tail = attrs.evolve(start_of(fresh), records=tail.records, term=tail.term)
            self._zeroed_end = 0
            self._publish_durable(self._tail, sync=1)

    def _enlarge(self, size: int) -> None:
        """Reserve more for a segment without batches: a second one would have the same name."""
        with storage_errors("cannot enlarge a log segment"):
            self._active.file.allocate(0, size)
        segment = attrs.evolve(self._active.segment, size=size)
        self._segments = (*self._segments[:-1], segment)
        self._active = self._active._replace(segment=segment)

    def _remove_stray(self) -> None:
        if self._stray is not None:
            remove_segments(self._disk, self._directory, [self._stray])
            self._stray = None

    def _seal(self, active: _Active, tail: Tail) -> Segment:
        """End the active segment with a seal, durably."""
        raw = encode_seal(
            offset=tail.end,
            seed=active.segment.seed,
            first_index=active.segment.first_index,
            last_index=tail.index,
            time_ns=tail.time_ns,
            chain=tail.chain,
        )
        size = tail.end + len(raw)
        self._garbage_end = max(self._garbage_end, size)  # until it is done
        active.file.pwritev([raw], tail.end)
        active.file.truncate(size)
        with self._failing_for_good("cannot sync the log"):
            active.file.fdatasync()
        self._garbage_end = 0
        return attrs.evolve(active.segment, size=size)

    def _path(self, name: str) -> str:
        return posixpath.join(self._directory, name)

    def _remember(self, cache: dict[int, _T], key: int, value: _T, limit: int) -> None:
        with self._cache:
            cache[key] = value
            while len(cache) > limit:
                del cache[next(iter(cache))]

    def _file(self, segment: Segment) -> File:
        """The open file of a segment; closed when forgotten and no reader uses it any more."""
        active = self._active
        if segment.first_index == active.segment.first_index:
            return active.file
        file = self._files.get(segment.first_index)
        if file is None:
            file = self._disk.open(self._path(segment.name))
            self._remember(self._files, segment.first_index, file, _FILES_MAX)
        return file

    def _offsets_of(self, span: _Span) -> array[int]:
        """File offset of every batch in a segment."""
        first_index = span.segment.first_index
        active = self._active
        if first_index == active.segment.first_index:
            return active.offsets
        offsets = self._maps.get(first_index)
        if offsets is None:
            offsets = self._read_index(span) or self._rebuild_index(span)
            self._remember(self._maps, first_index, offsets, _OFFSET_MAPS_MAX)
        return offsets

    def _read_index(self, span: _Span) -> array[int] | None:
        first_index = span.segment.first_index
        return read_index(
            self._disk, self._directory, first_index, span.last_index + 1 - first_index, span.chain
        )

    def _rebuild_index(self, span: _Span) -> array[int]:
        offsets = array(
            "Q", (record.offset for record in self._scan(span) if record.info.kind is RecordKind.BATCH)
        )
        if self._watermark is not None:
            self._write_index(span.segment, offsets, span.chain)
        return offsets

    def _write_index(self, segment: Segment, offsets: array[int], chain: bytes) -> None:
        raw = encode_index(segment.first_index, offsets, chain)
        with (
            contextlib.suppress(OSError),
            self._closing(index_name(segment.first_index), create=True) as file,
        ):
            file.truncate(0)
            file.pwritev([raw], 0)

    def _closing(self, name: str, *, create: bool = False) -> contextlib.closing[File]:
        return contextlib.closing(self._disk.open(self._path(name), create=create))

    # -- reading -------------------------------------------------------------------------------------

    def read(self, index: int) -> RecordInfo:
        """One batch without its payload; its CRCs and both its links are checked.

        Raises:
            CorruptionError: it is damaged.
            NotFoundError: there is no such batch.
        """
        return self._read(index)[1].info

    def _read(self, index: int) -> tuple[Segment, Scanned]:
        span, offset = self._locate(index)
        with self._reading(span.segment):
            file = self._file(span.segment)
            record = next(
                scan(file.pread, offset, span.end, seed=span.segment.seed, index=index - 1, chain=None)
            )
            following = span.chain
            if record.end < span.end:
                header = parse_record_header(
                    file.pread(RECORD_HEADER_BYTES, record.end), record.end, span.segment.seed
                )
                following = header.previous_chain if header else record.info.chain  # damage of another record
            if record.info.chain != following:
                raise BadRecord(Damage.CHAIN, offset, index)
        return span.segment, record

    def read_batch(self, index: int) -> tuple[RecordInfo, bytes]:
        """One batch with its payload; every CRC and both links are checked.

        Raises:
            CorruptionError: it is damaged, or some of its payload was reclaimed.
            NotFoundError: there is no such batch.
        """
        return self._whole(*self._read(index))

    def batches(self, start: int, stop: int | None = None) -> Iterator[tuple[RecordInfo, bytes]]:
        """As :meth:`records`, with payload and its CRC checked; raises as :meth:`read_batch` does, while iterating."""
        return itertools.starmap(self._whole, self._walk(start, stop))

    def stored(self, start: int, stop: int | None = None) -> Iterator[StoredBatch]:
        """As :meth:`records`, with payload as it is now: reclaimed or damaged ones are marked, not refused."""
        return itertools.starmap(self._as_stored, self._walk(start, stop))

    def _whole(self, segment: Segment, record: Scanned) -> tuple[RecordInfo, bytes]:
        batch = self._as_stored(segment, record)
        if not batch.intact:
            corrupt(Damage.PAYLOAD, segment.name, record.payload_offset, record.info.index)
        return batch.info, batch.payload

    def _as_stored(self, segment: Segment, record: Scanned) -> StoredBatch:
        info = record.info
        with self._reading(segment):
            payload = self._file(segment).pread(info.payload_length, record.payload_offset)
            if len(payload) != info.payload_length:
                raise BadRecord(Damage.PAYLOAD, record.payload_offset, info.index)
        return StoredBatch(info, payload, record.payload_crc, crc32c(payload) == record.payload_crc)

    def records(
        self, start: int, stop: int | None = None, *, every_kind: bool = False
    ) -> Iterator[RecordInfo]:
        """Batches from index ``start`` up to but not including ``stop`` (default: the end as of now).

        Every CRC and link is checked; payload areas are not read.

        Args:
            every_kind: also what lies between these batches.

        Raises:
            ConflictError: while iterating, :meth:`truncate_after` removed what was to come.
            CorruptionError: while iterating, at the damaged record; those before it have been yielded.
            NotFoundError: ``start`` is before the first batch.
        """
        return (record.info for _, record in self._walk(start, stop, every_kind=every_kind))

    def _walk(
        self, start: int, stop: int | None, *, every_kind: bool = False
    ) -> Iterator[tuple[Segment, Scanned]]:
        if start < self.first_index:
            raise NotFoundError(f"there is no position {start}: the log starts at {self.first_index}")
        spans = self._spans()
        last = spans[-1].last_index if stop is None else min(stop - 1, spans[-1].last_index)
        return self._iterate(spans, start, last, every_kind=every_kind)

    def _iterate(
        self, spans: list[_Span], start: int, last: int, *, every_kind: bool
    ) -> Iterator[tuple[Segment, Scanned]]:
        batch = RecordKind.BATCH
        for span in spans:
            if span.last_index < start and span.segment.first_index < start:
                continue
            for record in self._scan(span, start):
                info = record.info
                if info.index > last:
                    return
                if info.kind is batch or every_kind:
                    yield span.segment, record

    def _scan(self, span: _Span, start: int = 0) -> Iterator[Scanned]:
        """All records of a span, or those from batch ``start``, checked up to the span's last link."""
        segment = span.segment
        offset, index, chain = SEGMENT_HEADER_BYTES, segment.first_index - 1, segment.header.previous_chain
        with self._reading(segment):
            known: bytes | None = chain
            if start > segment.first_index:
                offset, index, known = self._offset(span, start), start - 1, None
            file = self._file(segment)
            record = None
            for record in scan(file.pread, offset, span.end, seed=segment.seed, index=index, chain=known):
                yield record
            if record is not None:
                offset, index, chain = record.end, record.info.index, record.info.chain
            if (offset, index, chain) != (span.end, span.last_index, span.chain):
                raise BadRecord(Damage.CHAIN, offset, index + 1)

    @contextlib.contextmanager
    def _reading(self, segment: Segment) -> Iterator[None]:
        """Turn what a reader met into the errors users meet."""
        cuts = self._cuts
        try:
            yield
        except (BadRecord, FileNotFoundError, IndexError) as error:
            if cuts != self._cuts:
                raise ConflictError("the log was cut back while it was being read") from error
            if isinstance(error, BadRecord):
                corrupt(error.what, segment.name, error.offset, error.index)
            corrupt(Damage.MISSING, segment.name, -1, segment.first_index)
        except OSError as error:
            raise storage_error(f"cannot read log segment {segment.name}", error) from error

    def _spans(self) -> list[_Span]:
        """Every segment with the end of its records, as of now."""
        tail, segments = self._tail, self._segments
        spans: list[_Span] = []
        for position, segment in enumerate(segments):
            if segment.first_index == tail.segment:
                return [*spans, _Span(segment, tail.end, tail.index, tail.chain)]
            spans.append(_sealed_span(segment, segments[position + 1]))
        raise ConflictError("the log was cut back while it was being read")

    def _span(self, index: int) -> _Span:
        """The segment that holds a batch."""
        tail, segments = self._tail, self._segments
        if not segments[0].first_index <= index <= tail.index:
            raise NotFoundError(
                f"there is no position {index}: the log holds {segments[0].first_index} to {tail.index}"
            )
        if index >= tail.segment:
            active = self._active
            if active.segment.first_index == tail.segment:
                return _Span(active.segment, tail.end, tail.index, tail.chain)
        at = bisect.bisect_right(segments, index, key=_first_index) - 1
        return _sealed_span(segments[at], segments[at + 1])

    def _offset(self, span: _Span, index: int) -> int:
        return self._offsets_of(span)[index - span.segment.first_index]

    def _locate(self, index: int) -> tuple[_Span, int]:
        span = self._span(index)
        with self._reading(span.segment):
            return span, self._offset(span, index)

    def time_ns(self, index: int) -> int:
        """Time of a batch, from its header alone."""
        return self._header(index)[1].time_ns

    def term(self, index: int) -> int:
        """Raft term of a batch, from its header alone."""
        return self._header(index)[1].term

    def _header(self, index: int) -> tuple[_Span, RecordHeader, int]:
        span, offset = self._locate(index)
        with self._reading(span.segment):
            raw = self._file(span.segment).pread(RECORD_HEADER_BYTES, offset)
            header = parse_record_header(raw, offset, span.segment.seed)
            if header is None or header.batch_index != index:
                raise BadRecord(Damage.HEADER, offset, index)
        return span, header, offset

    def index_at_time(self, time_ns: int) -> int:
        """Last batch whose time is at most ``time_ns``; 0 if there is none."""
        spans = self._spans()
        at = bisect.bisect_right(spans, time_ns, key=lambda span: span.segment.header.previous_time_ns)
        if at == 0:
            return 0
        span = spans[at - 1]
        first = span.segment.first_index
        return first - 1 + bisect.bisect_right(range(first, span.last_index + 1), time_ns, key=self.time_ns)

    # -- payload -------------------------------------------------------------------------------------

    def read_payload(self, index: int, offset: int, length: int) -> bytes:
        """Bytes of a payload area; not checked, because its pieces carry their own hashes.

        Raises:
            CorruptionError: the file ends inside them.
            NotFoundError: there is no such batch.
            UsageError: the range is not inside the payload.
        """
        segment, place = self._place(index)
        _check_range(place, index, offset, length)
        with self._reading(segment):
            data = self._file(segment).pread(length, place.offset + offset)
            if len(data) != length:
                raise BadRecord(Damage.PAYLOAD, place.offset + offset, index)
        return data

    def payload_location(self, index: int) -> tuple[int, int, int]:
        """Descriptor, file offset and length of a payload, for ``sendfile``.

        The descriptor belongs to the log.  Use it at once: it stays open until the log is closed or
        payloads in more than a hundred other segments have been located.

        Raises:
            io.UnsupportedOperation: the disk has no descriptors.
            NotFoundError: there is no such batch.
        """
        segment, place = self._place(index)
        with self._reading(segment):
            file = self._file(segment)
            # Held apart from the files that scans open and forget: a number that is reused reads another file.
            self._remember(self._lent, segment.first_index, file, _FILES_MAX)
            return file.fileno(), place.offset, place.length

    def check_payload(self, index: int) -> bool:
        """Whether a payload's bytes have the CRC they were written with; reclaimed ones have not."""
        segment, place = self._place(index)
        with self._reading(segment):
            return sum_payload(self._file(segment).pread, place.offset, place.length) == place.crc

    def restore_payload(self, index: int, payload: Buffer) -> None:
        """Write a batch's payload once more where it is stored, durably: for one whose bytes have rotted.

        Raises:
            NotFoundError: there is no such batch.
            StorageError: the disk refused.
            UsageError: it is not what was written there.
        """
        self._check_writable()
        segment, place = self._place(index)
        if len(payload) != place.length or crc32c(payload) != place.crc:
            raise UsageError(f"this is not the payload of position {index}")
        try:
            file = self._file(segment)
            file.pwritev([payload], place.offset)
            file.fdatasync()
        except OSError as error:
            raise storage_error(f"cannot restore the payload of position {index}", error) from error

    def _place(self, index: int) -> tuple[Segment, _Place]:
        place = self._places.get(index)
        if place is None or index > self._tail.index:
            span, header, offset = self._header(index)
            place = _Place(
                span.segment, offset + header.payload_offset, header.payload_length, header.payload_crc
            )
            self._remember(self._places, index, place, _PLACES_MAX)
        return place.segment, place

    def punch(self, index: int, offset: int, length: int) -> int:
        """Give the whole 4 KiB blocks inside a payload range back to the disk; addresses stay.

        Returns:
            Bytes in those blocks; 0 where the file system cannot punch holes.

        Raises:
            NotFoundError: there is no such batch.
            UsageError: the range is not inside the payload.
        """
        self._check_writable()
        segment, place = self._place(index)
        _check_range(place, index, offset, length)
        blocks = blocks_inside(place.offset, [(offset, length)])
        if not blocks:
            return 0
        self._protect(index)
        with storage_errors("cannot reclaim payload"):
            return punch_blocks(self._file(segment), *blocks[0])

    def _protect(self, index: int) -> None:
        """Make the watermark above a batch durable: recovery takes a bad payload above it for a torn one."""
        if index <= self._protected:
            return
        self.sync(index)
        with self._lead():
            self._publish_durable(self._durable, sync=1)

    # -- cutting, closing ----------------------------------------------------------------------------

    def truncate_after(self, index: int) -> None:
        """Drop all records after batch ``index``, durably: after a crash all are there or none.

        Same caller as :meth:`append`.  Readers under way get :class:`ConflictError`.

        Raises:
            NotFoundError: the log does not reach that far.
            StorageError: the disk refused; open the log again.
        """
        self._check_writable()
        keep = self._end_after(index)
        if keep.end == self._tail.end and keep.segment == self._tail.segment:
            return
        self.sync()  # records that are kept must not depend on a later sync that never comes
        with self._lead():
            keep = attrs.evolve(keep, records=self._tail.records)
            self._publish_durable(keep, WatermarkFlag.CUTTING, sync=2)
            self._tail = keep
            self._holed = min(self._holed, keep.index)
            gone = [segment.first_index for segment in self._segments if segment.first_index > keep.segment]
            self._cuts += 1
            with self._failing_for_good("cannot cut the log"):
                self._cut(keep, gone)
            self._publish_durable(keep, sync=2)

    def _end_after(self, index: int) -> Tail:
        """What the tail is once everything after a batch is gone."""
        if index == 0:
            return start_of(self._segments[0])
        segment, record = self._read(index)
        info = record.info
        return Tail(segment.first_index, record.end, index, info.chain, info.time_ns, 0, info.term)

    def _cut(self, keep: Tail, gone: list[int]) -> None:
        kept = tuple(segment for segment in self._segments if segment.first_index <= keep.segment)
        file = self._file(kept[-1])
        offsets = array("Q")
        if keep.index >= keep.segment:
            offsets = self._offsets_of(self._span(keep.index))[: keep.index + 1 - keep.segment]
        remove_segments(self._disk, self._directory, gone)
        with contextlib.suppress(FileNotFoundError):
            self._disk.unlink(self._path(index_name(keep.segment)))
        cut(file, keep.end, self._segment_bytes)
        last = attrs.evolve(kept[-1], size=file.size())
        self._active = _Active(last, file, offsets)
        self._segments = (*kept[:-1], last)
        self._garbage_end = self._zeroed_end = 0
        with self._cache:
            for first_index in (*gone, keep.segment):
                self._files.pop(first_index, None)
                self._maps.pop(first_index, None)
            self._places.clear()

    def close(self, *, clean: bool = True) -> None:
        """Make everything durable and close; the log must not be used afterwards.  Idempotent.

        Args:
            clean: false leaves the files as a killed process would.

        Raises:
            StorageError: the last sync failed; the files are closed all the same.
        """
        if self._closed:
            return
        try:
            if clean and not self._failure and self._watermark is not None:
                self.sync()
                with self._lead():
                    self._write_index(self._active.segment, self._active.offsets, self._tail.chain)
                    self._publish_durable(self._durable, WatermarkFlag.CLEAN, sync=1)
        finally:
            self._closed = True
            for file in (self._active.file, *self._files.values(), *self._lent.values()):
                file.close()
            if self._watermark is not None:
                self._watermark.close()

    # -- verifying -----------------------------------------------------------------------------------

    def verify(self, *, on_progress: Callable[[int, int], None] | None = None) -> Iterator[Finding]:
        """Check every segment, header, link and payload, and go on after each damage found.

        Args:
            on_progress: called with bytes checked and bytes in all.

        Raises:
            StorageError: while iterating, when the disk cannot be read.
        """
        spans = self._spans()
        total = sum(span.end for span in spans)
        done = 0
        for span in spans:
            with self._reading(span.segment):
                for step in self._verify_segment(span, sealed=span is not spans[-1]):
                    if isinstance(step, Finding):
                        yield step
                    elif on_progress is not None:
                        on_progress(done + step, total)
            done += span.end

    def _verify_segment(self, span: _Span, *, sealed: bool) -> Iterator[Finding | int]:
        """Findings, and offsets reached between them."""
        segment = span.segment
        try:
            file = self._file(segment)
        except FileNotFoundError:
            yield Finding(segment.name, -1, segment.first_index, Damage.MISSING)
            return
        if parse_segment_header(file.pread(SEGMENT_HEADER_BYTES, 0)) != segment.header:
            yield Finding(segment.name, 0, segment.first_index, Damage.SEGMENT_HEADER)
        offset, index = SEGMENT_HEADER_BYTES, segment.first_index - 1
        chain: bytes | None = segment.header.previous_chain
        while offset < span.end:
            try:
                for record in scan(file.pread, offset, span.end, seed=segment.seed, index=index, chain=chain):
                    offset, index, chain = record.end, record.info.index, record.info.chain
                    if record.payload_crc != sum_payload(
                        file.pread, record.payload_offset, record.info.payload_length
                    ):
                        yield Finding(segment.name, record.payload_offset, index, Damage.PAYLOAD)
                    yield offset
                break
            except BadRecord as bad:
                yield Finding(segment.name, bad.offset, bad.index, bad.what)
                offset, index = _resume(file, bad, span)
                chain = None
        if chain is not None and (offset, index, chain) != (span.end, span.last_index, span.chain):
            yield Finding(segment.name, offset, index + 1, Damage.CHAIN)
        if sealed:
            raw = file.pread(SEAL_BYTES, span.end)
            if parse_seal(raw, span.end, segment.seed, segment.first_index) is None:
                yield Finding(segment.name, span.end, span.last_index, Damage.SEAL)


def _resume(file: File, bad: BadRecord, span: _Span) -> tuple[int, int]:
    """Where records go on after damage, and the index of the last batch before that."""
    start = bad.offset if bad.what is Damage.CHAIN else bad.offset + RECORD_ALIGNMENT
    for offset, header in find_headers(file.pread, start, span.end, span.segment.seed):
        if header.batch_index >= bad.index - 1:
            return offset, header.batch_index - (header.kind == RecordKind.BATCH)
    return span.end, span.last_index


def blocks_inside(place: int, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Start and end in the file of the whole blocks inside ranges of a payload that starts at ``place``."""
    blocks = [
        (align(place + offset, BLOCK_BYTES), (place + offset + length) & -BLOCK_BYTES)
        for offset, length in ranges
    ]
    return [(start, end) for start, end in blocks if start < end]


def punch_blocks(file: File, start: int, end: int) -> int:
    """Give blocks back to the disk; returns how many bytes, 0 where the file system cannot."""
    try:
        file.punch_hole(start, end - start)
    except OSError as error:
        if error.errno in {errno.EOPNOTSUPP, errno.ENOSYS}:
            return 0
        raise
    return end - start


def _first_index(segment: Segment) -> int:
    return segment.first_index


def _sealed_span(segment: Segment, following: Segment) -> _Span:
    header = following.header
    return _Span(segment, segment.size - SEAL_BYTES, following.first_index - 1, header.previous_chain)


def _check_range(place: _Place, index: int, offset: int, length: int) -> None:
    if offset < 0 or length < 0 or offset + length > place.length:
        raise UsageError(
            f"bytes {offset} to {offset + length} are not inside the payload of position {index}, "
            f"which has {place.length}"
        )
