"""Opening a log: find its end, and tell a torn tail from corruption.

What is known to be durable comes from three witnesses, and the furthest counts:

* the watermark (:mod:`space.wal.watermark`);
* ``durable_end`` in the headers of later records of the same segment, for when the watermark is old or lost;
* the existence of a next segment with records: a rotation makes the old segment whole first.

Bytes that are no record below that are corruption: opening fails and changes nothing.  Bytes above it
were never acknowledged: the tail is cut back to the last whole record and zeroed, durably, before the
log is used.  Sealed segments are not scanned: their first and last blocks prove that they are present
and linked, so opening costs one small read each and one scan of the last segment; after a clean stop
its sidecar is as good as a scan.

A log can be opened for reading while another process writes it.  The watermark is read before the segments
are listed, and promises before what they promise is looked for, so that what is found is at least what was
acknowledged before; what a change between two reads makes look like damage is looked at again.
"""

from __future__ import annotations

import contextlib
import errno
import posixpath
import re
from array import array
from collections.abc import Iterator
from typing import Final, NamedTuple, NoReturn, final

import attrs

from space._errors import CorruptionError, DiskFullError, NotFoundError, StorageError
from space.wal.disk import Disk, File
from space.wal.segment_format import (
    GENESIS,
    INDEX_HEADER,
    RECORD_ALIGNMENT,
    SEAL_BYTES,
    SEGMENT_HEADER_BYTES,
    RecordKind,
    SegmentHeader,
    index_name,
    record_seed,
    segment_name,
)
from space.wal.segment_reader import (
    BadRecord,
    Damage,
    RecordHeader,
    Scanned,
    find_headers,
    last_nonzero,
    parse_seal,
    parse_segment_header,
    scan,
    sum_payload,
)
from space.wal.segment_writer import encode_segment_header
from space.wal.sidecar import decode_index
from space.wal.watermark import WATERMARK_NAME, Watermark, WatermarkFile, WatermarkFlag

TERM_UNKNOWN: Final = -1  # no segment header has it: the last batch may be in the segment before

SEGMENT_NAME: Final = re.compile(r"\d{20}\.seg")
_READ_ONLY_TRIES: Final = 8  # a rotation between two reads looks like damage; eight in a row are damage
_HINT: Final = "nothing was changed; restore the file from a backup or a replica, then run `space verify`"


@attrs.frozen
class Segment:
    """A segment file in use: its header and its size (of the last one: the space reserved for it)."""

    header: SegmentHeader
    size: int

    @property
    def first_index(self) -> int:
        """Index of the first batch in it."""
        return self.header.first_index

    @property
    def name(self) -> str:
        """File name."""
        return segment_name(self.first_index)

    @property
    def seed(self) -> int:
        """Start value of its records' header CRCs."""
        return record_seed(self.header.store_id, self.first_index)


@attrs.frozen
class Tail:
    """The end of the log, or of a part of it."""

    segment: int  # first index of the segment it is in
    end: int  # offset in that segment
    index: int  # of the last batch
    chain: bytes
    time_ns: int
    records: int  # of every kind, since the log was opened
    term: int = TERM_UNKNOWN  # of the last batch


def start_of(segment: Segment) -> Tail:
    """The end of the log if it ended at the start of this segment."""
    first, header = segment.first_index, segment.header
    term = 0 if first == 1 else TERM_UNKNOWN
    return Tail(
        first, SEGMENT_HEADER_BYTES, first - 1, header.previous_chain, header.previous_time_ns, 0, term
    )


@attrs.frozen
class RecoveryReport:
    """What opening a log found.

    Attributes:
        clean: the log was closed in order.
        watermark: last batch that the watermark knew to be durable, or -1 if it was lost.
        batches: batches in the last segment, kept.
        torn_bytes: bytes cut off the end: writes that were never acknowledged.
        torn_segment: file they were in, or an empty string.
        torn_offset: where the cut was made, or -1.
        cut_finished: an interrupted ``truncate_after`` was carried out.
    """

    clean: bool
    watermark: int
    batches: int
    torn_bytes: int = 0
    torn_segment: str = ""
    torn_offset: int = -1
    cut_finished: bool = False


@attrs.frozen
class Recovered:
    """An opened log: everything the log machine starts from.  Without a watermark it is for reading only."""

    segments: tuple[Segment, ...]
    active: File
    offsets: array[int]
    tail: Tail
    watermark: WatermarkFile | None
    report: RecoveryReport


@contextlib.contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn what the disk raises into the errors users meet."""
    try:
        yield
    except OSError as error:
        raise storage_error(doing, error) from error


def storage_error(doing: str, error: OSError) -> StorageError:
    """The error to raise for what the disk said."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DiskFullError(f"{doing}: no space left on the disk", hint="free some space, then try again")
    return StorageError(f"{doing}: {error.strerror or error}", hint="check the disk and its permissions")


def corrupt(what: str, segment: str, offset: int, position: int) -> NoReturn:
    """Raise the one error that damaged storage raises."""
    raise CorruptionError(
        f"log segment {segment}, offset {offset}, position {position}: {what}",
        segment=segment,
        offset=offset,
        position=position,
        hint=_HINT,
    )


def create_segment(disk: Disk, directory: str, header: SegmentHeader, size: int) -> File:
    """Make a segment file with all its space reserved: whole, durable and under its name, or not at all.

    Raises:
        OSError: it could not be made; a file left behind holds no record.
    """
    path = posixpath.join(directory, segment_name(header.first_index))
    file = disk.open(path, create=True)
    try:
        if file.size():
            file.truncate(0)  # left over from an attempt that failed
        file.allocate(0, size)
        file.pwritev([encode_segment_header(header)], 0)
        file.fdatasync()
        disk.sync_dir(directory)
    except OSError:
        file.close()
        with contextlib.suppress(OSError):
            disk.unlink(path)
        raise
    return file


def remove_segments(disk: Disk, directory: str, first_indexes: list[int]) -> None:
    """Unlink segments and their sidecars, newest first, durably."""
    for first_index in sorted(first_indexes, reverse=True):
        for name in (index_name(first_index), segment_name(first_index)):
            with contextlib.suppress(FileNotFoundError):
                disk.unlink(posixpath.join(directory, name))
    if first_indexes:
        disk.sync_dir(directory)


def read_index(disk: Disk, directory: str, first_index: int, batches: int, chain: bytes) -> array[int] | None:
    """Offsets from a segment's sidecar, or None if there is none for exactly these batches."""
    with (
        contextlib.suppress(OSError),
        contextlib.closing(disk.open(posixpath.join(directory, index_name(first_index)))) as file,
    ):
        raw = file.pread(INDEX_HEADER.size + 8 * batches + 1, 0)
        return decode_index(raw, first_index, batches, chain)
    return None


def cut(file: File, end: int, size: int) -> None:
    """Drop all bytes of a segment from ``end`` on and reserve its space anew: what follows reads as zeros."""
    file.truncate(end)
    with contextlib.suppress(OSError):  # a full disk only makes the next rotation come early
        file.allocate(0, max(size, end))
    file.fdatasync()


def recover(disk: Disk, directory: str, *, store_id: bytes, segment_bytes: int, read_only: bool) -> Recovered:
    """Open or create the log in ``directory``.

    Raises:
        CorruptionError: acknowledged bytes are missing or damaged; nothing was changed.
        NotFoundError: there is no log and ``read_only`` forbids making one.
        StorageError: the disk refused.
    """
    with storage_errors(f"cannot open the log in {directory}"):
        for _ in range(_READ_ONLY_TRIES - 1 if read_only else 0):
            with contextlib.suppress(CorruptionError, FileNotFoundError):
                return _Recovery(disk, directory, store_id, segment_bytes, read_only=True).run()
        return _Recovery(disk, directory, store_id, segment_bytes, read_only=read_only).run()


@final
class _Recovery:
    """One opening of a log; the steps of :meth:`run` in order."""

    def __init__(
        self, disk: Disk, directory: str, store_id: bytes, segment_bytes: int, *, read_only: bool
    ) -> None:
        self._disk = disk
        self._directory = directory
        self._store_id = store_id
        self._segment_bytes = segment_bytes
        self._read_only = read_only
        self._cutting = False
        self._dropped: list[int] = []

    def run(self) -> Recovered:
        watermark = self._open_watermark()  # before the listing: its segment must be in it
        firsts = self._list_segments()
        mark = watermark.found if watermark else None
        if not firsts:
            if watermark is not None:
                corrupt(Damage.MISSING, segment_name(1), -1, 1)
            self._create_first()
            firsts = [1]
        if mark and WatermarkFlag.CUTTING in mark.flags:
            self._cutting = True
            self._dropped = [first for first in firsts if first > mark.segment]
            firsts = [first for first in firsts if first <= mark.segment]
        segments = self._check_segments(firsts, mark) or self._start_again()
        if mark and mark.segment not in {segment.first_index for segment in segments}:
            corrupt(Damage.MISSING, segment_name(mark.segment), -1, mark.segment)
        return self._recover_active(segments, watermark, mark)

    def _path(self, name: str) -> str:
        return posixpath.join(self._directory, name)

    def _open(self, segment: Segment) -> File:
        return self._disk.open(self._path(segment.name))

    def _list_segments(self) -> list[int]:
        if not self._disk.exists(self._directory):
            if self._read_only:
                raise NotFoundError(f"there is no log in {self._directory}")
            self._disk.mkdir(self._directory)
        names = self._disk.listdir(self._directory)
        return sorted(int(name[:20]) for name in names if SEGMENT_NAME.fullmatch(name))

    def _open_watermark(self) -> WatermarkFile | None:
        path = self._path(WATERMARK_NAME)
        return WatermarkFile(self._disk.open(path), self._store_id) if self._disk.exists(path) else None

    def _create_first(self) -> None:
        if self._read_only:
            raise NotFoundError(f"there is no log in {self._directory}")
        # Here and not after mkdir: an earlier attempt may have made the directory and failed to sync it.
        self._disk.sync_dir(posixpath.dirname(self._directory) or ".")
        header = SegmentHeader(self._store_id, 1, 0, GENESIS)
        create_segment(self._disk, self._directory, header, self._segment_bytes).close()

    def _check_segments(self, firsts: list[int], mark: Watermark | None) -> list[Segment]:
        """All segments from the first, each proved present and linked to the next.

        None at all if the first was never finished.
        """
        if firsts[0] != 1:
            corrupt(Damage.MISSING, segment_name(1), -1, 1)
        segments: list[Segment] = []
        seal: RecordHeader | None = None
        for first in firsts:
            with contextlib.closing(self._disk.open(self._path(segment_name(first)))) as file:
                if first in firsts[-2:]:
                    self._settle(file, mark)
                size = file.size()
                header = parse_segment_header(file.pread(SEGMENT_HEADER_BYTES, 0))
                problem = self._header_problem(header, first) or _link_problem(segments, seal, header)
                if first == firsts[-1] and (segments or problem) and is_unborn(file, size, first, mark):
                    self._dropped.append(first)
                    return segments
                if problem is not None:
                    corrupt(*problem)
                assert header is not None  # its absence is a problem
                segments.append(Segment(header, size))
                at = max(size - SEAL_BYTES, SEGMENT_HEADER_BYTES)
                seal = parse_seal(file.pread(SEAL_BYTES, at), at, segments[-1].seed, first)
        if seal is not None and not self._cutting and not self._has_gone_on(seal):
            corrupt(Damage.MISSING, segment_name(seal.batch_index + 1), -1, seal.batch_index + 1)
        return segments

    def _has_gone_on(self, seal: RecordHeader) -> bool:
        """Whether a writer has begun another segment since they were listed."""
        following = self._path(segment_name(seal.batch_index + 1))
        return self._read_only and self._disk.exists(following)

    def _settle(self, file: File, mark: Watermark | None) -> None:
        """After an unclean stop, make what can be seen of a segment the same as what the disk has.

        A killed writer's bytes may be in the cache only; after a failed fdatasync the cache may show
        bytes that the disk never got.  A rotation under way concerns the last two segments.
        """
        if not self._read_only and not _is_clean(mark):
            file.fdatasync()
            file.drop_cache()

    def _header_problem(self, header: SegmentHeader | None, first: int) -> _Problem | None:
        if header is None:
            return Damage.SEGMENT_HEADER, segment_name(first), 0, first
        if header.store_id != self._store_id:
            return "segment belongs to another store", segment_name(first), 0, first
        if header.first_index != first:
            return (
                f"segment is {segment_name(header.first_index)} under another name",
                segment_name(first),
                0,
                first,
            )
        return None

    def _start_again(self) -> list[Segment]:
        """Make the first segment anew, after its making was interrupted."""
        if not self._read_only:
            remove_segments(self._disk, self._directory, self._dropped)
        self._dropped = []
        self._create_first()
        segments = self._check_segments([1], None)
        if not segments:  # the disk does not keep what it is given
            corrupt(Damage.SEGMENT_HEADER, segment_name(1), 0, 1)
        return segments

    def _recover_active(
        self, segments: list[Segment], watermark: WatermarkFile | None, mark: Watermark | None
    ) -> Recovered:
        segment = segments[-1]
        file = self._open(segment)
        clean = _is_clean(mark)
        here = mark if mark and mark.segment == segment.first_index else None
        found = (self._read_sidecar(file, segment, here) if clean and here else None) or ActiveScan(
            file, segment, here, cutting=self._cutting
        ).run()
        tail = found.tail
        if self._read_only and found.is_cut and self._is_durable_by_now(tail):
            corrupt(Damage.PAYLOAD, segment.name, tail.end, tail.index + 1)
        garbage = found.garbage_end - tail.end
        report = RecoveryReport(
            clean=clean,
            watermark=mark.index if mark else -1,
            batches=len(found.offsets),
            torn_bytes=garbage,
            torn_segment=segment.name if garbage else "",
            torn_offset=tail.end if garbage else -1,
            cut_finished=self._cutting,
        )
        if not self._read_only:
            watermark = self._make_good(segment, file, tail, watermark, cut_tail=garbage > 0)
            segments[-1] = attrs.evolve(segment, size=file.size())
        elif watermark:
            watermark.close()
            watermark = None
        return Recovered(tuple(segments), file, found.offsets, tail, watermark, report)

    def _is_durable_by_now(self, tail: Tail) -> bool:
        """Whether another process made what follows the tail durable meanwhile: its payload may be reclaimed."""
        watermark = self._open_watermark()
        if watermark is None:
            return False
        watermark.close()
        mark = watermark.found
        return mark is not None and (mark.segment, mark.end) > (tail.segment, tail.end)

    def _read_sidecar(self, file: File, segment: Segment, mark: Watermark) -> _Found | None:
        """The last segment after a clean stop, without a scan: its offsets were written by ``close``."""
        first, batches = segment.first_index, mark.index + 1 - segment.first_index
        offsets = read_index(self._disk, self._directory, first, batches, mark.chain)
        if not offsets:
            return None
        tail = attrs.evolve(start_of(segment), index=mark.index - 1, end=offsets[-1])
        with contextlib.suppress(BadRecord):
            for record in scan(
                file.pread, tail.end, mark.end, seed=segment.seed, index=tail.index, chain=None
            ):
                tail = _after(tail, record)
        whole = (tail.end, tail.index, tail.chain) == (mark.end, mark.index, mark.chain)
        return _Found(offsets, tail, tail.end) if whole else None

    def _make_good(
        self, segment: Segment, file: File, tail: Tail, watermark: WatermarkFile | None, *, cut_tail: bool
    ) -> WatermarkFile:
        """Carry out on disk what recovery decided, and make all that is kept durable."""
        remove_segments(self._disk, self._directory, self._dropped)
        if cut_tail or self._cutting or segment.size < self._segment_bytes:
            cut(file, tail.end, self._segment_bytes)
        file.fdatasync()
        self._disk.sync_dir(self._directory)
        if watermark is None:
            watermark = WatermarkFile(
                self._disk.open(self._path(WATERMARK_NAME), create=True), self._store_id
            )
            self._disk.sync_dir(self._directory)
        watermark.reserve()
        # Both slots: an older one may still order a cut, promise more than a finished cut has left, or say that
        # nothing lies above it (clean), which the first record written from now on makes untrue.
        for _ in range(2 if self._cutting or _is_clean(watermark.found) else 1):
            watermark.write(tail.index, segment.first_index, tail.end, tail.chain)
            watermark.sync()
        return watermark


def is_unborn(file: File, size: int, first: int, mark: Watermark | None) -> bool:
    """Whether the rotation that made this last segment may not have been finished.

    Only a finished one moves the watermark here, and only after it records follow.  Without either, the
    segment before need not be whole, even if its seal is: it is the last one still, and nothing is lost
    by making this one again.
    """
    if mark is not None and mark.segment == first:
        return False
    return last_nonzero(file.pread, SEGMENT_HEADER_BYTES, size) == SEGMENT_HEADER_BYTES


def _is_clean(mark: Watermark | None) -> bool:
    return mark is not None and WatermarkFlag.CLEAN in mark.flags


_Problem = tuple[str, str, int, int]


def _link_problem(
    before: list[Segment], seal: RecordHeader | None, header: SegmentHeader | None
) -> _Problem | None:
    """What is wrong between a segment and the one before it."""
    if not before or header is None:
        return None
    last = before[-1]
    if seal is None:
        return Damage.SEAL, last.name, max(last.size - SEAL_BYTES, 0), header.first_index - 1
    if seal.batch_index + 1 != header.first_index:
        return Damage.MISSING, segment_name(seal.batch_index + 1), -1, seal.batch_index + 1
    if seal.previous_chain != header.previous_chain:
        return Damage.CHAIN, segment_name(header.first_index), 0, header.first_index
    return None


class _Found(NamedTuple):
    offsets: array[int]
    tail: Tail
    garbage_end: int  # end of what lies after the tail
    is_cut: bool = False  # a record after the tail is whole but for its payload


@final
class ActiveScan:
    """Finds the end of the last segment.

    The first pass walks the records and gathers how far they are known to be durable; what stops it
    below that is corruption.  The second looks at the payloads of the others, which a power loss may
    have torn although headers and metadata are whole.
    """

    def __init__(self, file: File, segment: Segment, mark: Watermark | None, *, cutting: bool) -> None:
        self._file = file
        self._segment = segment
        self._known = mark.end if mark else SEGMENT_HEADER_BYTES
        self._mark = mark
        self._limit = mark.end if mark and cutting else segment.size
        self._tail = start_of(segment)
        self._at_mark = self._tail if self._known == SEGMENT_HEADER_BYTES else None
        self._promised = self._known
        self._offsets: array[int] = array("Q")

    def run(self) -> _Found:
        bad = self._walk()
        garbage_end = last_nonzero(self._file.pread, self._tail.end, self._limit)
        self._find_promises(garbage_end)
        if self._tail.end < self._promised:
            bad = self._walk()  # what another process wrote meanwhile was there before its promise
        tail, at_mark, offsets = self._tail, self._at_mark, self._offsets
        if tail.end < self._promised:
            what = bad.what if bad else Damage.NO_RECORD
            corrupt(what, self._segment.name, tail.end, tail.index + 1)
        if at_mark is None or (self._mark and self._mark.chain != at_mark.chain):
            corrupt(Damage.CHAIN, self._segment.name, self._known, tail.index)
        kept = self._check_payloads(at_mark, tail, self._promised)
        del offsets[kept.index + 1 - self._segment.first_index :]
        return _Found(offsets, kept, max(garbage_end, tail.end), kept.end < tail.end)

    def _walk(self) -> BadRecord | None:
        """Move the tail on over the records that follow; what ended them, if not the segment."""
        try:
            for record in self._scan(self._tail, self._limit):
                if record.info.kind is RecordKind.BATCH:
                    self._offsets.append(record.offset)
                self._tail = _after(self._tail, record)
                self._promised = max(self._promised, record.durable_end)
                if record.end == self._known:
                    self._at_mark = self._tail
        except BadRecord as bad:
            return bad
        return None

    def _scan(self, tail: Tail, end: int) -> Iterator[Scanned]:
        return scan(
            self._file.pread, tail.end, end, seed=self._segment.seed, index=tail.index, chain=tail.chain
        )

    def _find_promises(self, garbage_end: int) -> None:
        """How far records are known to be durable, as headers after the tail say."""
        end = self._tail.end
        for offset, header in find_headers(
            self._file.pread, end + RECORD_ALIGNMENT, garbage_end, self._segment.seed
        ):
            if end < header.durable_end <= offset:
                self._promised = max(self._promised, header.durable_end)

    def _check_payloads(self, start: Tail, end: Tail, promised: int) -> Tail:
        """The last record before the first torn payload; below ``promised`` a payload may be reclaimed."""
        tail = start
        for record in self._scan(start, end.end):
            info = record.info
            if record.end > promised and record.payload_crc != sum_payload(
                self._file.pread, record.payload_offset, info.payload_length
            ):
                break
            tail = _after(tail, record)
        return tail


def _after(tail: Tail, record: Scanned) -> Tail:
    info = record.info
    term = info.term if info.kind is RecordKind.BATCH else tail.term
    return Tail(tail.segment, record.end, info.index, info.chain, info.time_ns, 0, term)
