"""Healing a damaged log from a peer that has the same history.

:func:`survey` looks at every byte of a log that does not open, or that :meth:`~space.wal.log.Log.verify`
complains about.  :func:`heal` goes from the first batch to the last with a *verified end*: index, link and time
after everything that is known to be right.  Segments that are whole carry it on.  A run of damaged or missing
ones is built anew beside them, from the peer's batches, which must continue the verified end and come out
at the header of the next sound segment: that proves them to be what was there.  Only when that is done for all
of them are the damaged files copied aside and replaced, the end of the log first.  A peer with another history
changes nothing.

A last segment has no next header: it is built from its own good prefix, byte for byte, and what the peer has
after that, up to the position the caller says must be reached.  *That must be at least everything this
log has acknowledged to anyone.*

Crashes: new segments bear names that nobody opens until all of them are whole and durable, each but the last
is sealed, and a seal without a successor is refused.  So a log whose healing was interrupted either is healed,
or is refused by :meth:`~space.wal.log.Log.open` as before; healing it again succeeds.

Damage that nobody can see is not healed: see "What cannot be told apart" in ``docs/formats/wal.md``.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import posixpath
from collections.abc import Callable, Iterator, Sequence
from typing import Final, final

import attrs

from space._errors import CorruptionError, UnavailableError
from space.wal.disk import Disk, File
from space.wal.log import Finding, blocks_inside, punch_blocks
from space.wal.recovery import (
    SEGMENT_NAME,
    ActiveScan,
    Segment,
    is_unborn,
    remove_segments,
    storage_errors,
)
from space.wal.segment_format import (
    BLOCK_BYTES,
    GENESIS,
    SEAL_BYTES,
    SEGMENT_HEADER_BYTES,
    RecordKind,
    SegmentHeader,
    align,
    index_name,
    payload_offset,
    record_seed,
    segment_name,
)
from space.wal.segment_reader import (
    BadRecord,
    Damage,
    Scanned,
    parse_seal,
    parse_segment_header,
    scan,
    sum_payload,
)
from space.wal.segment_writer import (
    encode_record,
    encode_seal,
    encode_segment_header,
    measure,
    record_length,
)
from space.wal.shipping import (
    Chunk,
    DivergenceError,
    GapError,
    Judge,
    ShippedBatch,
    stored_payload,
)
from space.wal.watermark import WATERMARK_NAME, Watermark, WatermarkFile, WatermarkFlag

DAMAGED: Final = "damaged"
"""Folder, in the log's directory, of copies of what was replaced."""
_NEW: Final = ".new"
_COPYING: Final = "copying"
_COPY_BYTES: Final = 2**20

Fetch = Callable[[int, int], Iterator[Chunk]]
"""``(first, last) -> chunks`` of a peer's log, in order, from exactly batch ``first`` up to at most ``last``."""


@attrs.frozen
class SegmentHealth:
    """What is left of a segment.

    Attributes:
        name: file name; of a gap in the numbering, the first that is missing.
        first_index: index of its first batch.
        last_index: index of its last batch, as what follows says; None if nothing does.
        present: whether there is a file.
        header: its header, or None if that is damaged, missing, or contradicts what is before it.
        good: the header a next segment would have after the batches that are whole, from the start of this one;
            None if not even its start is known.
        good_end: offset in the file where those batches end.
        damage: what is wrong; empty for a segment that is whole.
    """

    name: str
    first_index: int
    last_index: int | None
    present: bool
    header: SegmentHeader | None
    good: SegmentHeader | None
    good_end: int
    damage: tuple[Finding, ...]


@attrs.frozen
class RepairReport:
    """What :func:`heal` did.

    Attributes:
        rebuilt: names of the segments that were made anew.
        kept: paths, in the log's directory, of the copies of what they replaced.
        last_index: where the log ends now.
        promised: last batch the watermark knew to be durable, or -1 if it was lost.  If that is more than
            ``last_index``, the caller asked for less than this log had.
    """

    rebuilt: tuple[str, ...]
    kept: tuple[str, ...]
    last_index: int
    promised: int


def survey(
    disk: Disk, directory: str, store_id: bytes, *, reclaimed: Judge | None = None
) -> list[SegmentHealth]:
    """Every segment of a log, oldest first, also those that are missing; nothing is changed.

    Args:
        reclaimed: asked about each payload that is not as it was written; without it, all such are damaged.

    Raises:
        CorruptionError: a segment belongs to another store: this is not the place to heal.
        StorageError: the disk cannot be read at all.
    """
    with storage_errors(f"cannot survey the log in {directory}"):
        return _Survey(disk, directory, store_id, reclaimed).run()


def heal(
    disk: Disk,
    directory: str,
    store_id: bytes,
    fetch: Fetch,
    *,
    last: int,
    segment_bytes: int,
    reclaimed: Judge | None = None,
) -> RepairReport:
    """Replace everything damaged or missing by what a peer has; nobody else may have the log open.

    Args:
        fetch: asked only for what is missing.  Whatever it raises is passed on.
        last: position the log must reach: at least all that it ever acknowledged.
        segment_bytes: space reserved for each new segment.
        reclaimed: as for :func:`survey`.

    Raises:
        CorruptionError: as for :func:`survey`.
        DivergenceError: the peer's batches do not fit to what is whole here.  Nothing was replaced.
        GapError: the peer's batches do not start where they were asked for.
        StorageError: the disk refused; heal it again.
        UnavailableError: the peer does not have all that is needed.
    """
    with storage_errors(f"cannot heal the log in {directory}"):
        return _Healing(disk, directory, store_id, fetch, last, segment_bytes, reclaimed).run()


def _start_of_log(store_id: bytes) -> SegmentHeader:
    return SegmentHeader(store_id, 1, 0, GENESIS)


def _firsts(disk: Disk, directory: str) -> list[int]:
    if not disk.exists(directory):
        return []
    return sorted(int(name[:20]) for name in disk.listdir(directory) if SEGMENT_NAME.fullmatch(name))


def _read_watermark(disk: Disk, directory: str, store_id: bytes) -> Watermark | None:
    path = posixpath.join(directory, WATERMARK_NAME)
    if not disk.exists(path):
        return None
    with contextlib.closing(disk.open(path)) as file:
        return WatermarkFile(file, store_id).found


# -- survey --------------------------------------------------------------------------------------------


@final
class _Survey:
    """One look at a log; :meth:`run` gives what was found."""

    def __init__(self, disk: Disk, directory: str, store_id: bytes, reclaimed: Judge | None) -> None:
        self._disk = disk
        self._directory = directory
        self._store_id = store_id
        self._reclaimed = reclaimed
        self.mark = _read_watermark(disk, directory, store_id)
        self.cutting = self.mark is not None and WatermarkFlag.CUTTING in self.mark.flags
        self.void: list[
            int
        ] = []  # segments an interrupted cut or rotation has left, which are no part of the log
        self._found: list[SegmentHealth] = []

    def run(self) -> list[SegmentHealth]:
        firsts = _firsts(self._disk, self._directory)
        if self.mark is not None and self.cutting:
            self.void = [first for first in firsts if first > self.mark.segment]
            firsts = [first for first in firsts if first <= self.mark.segment]
        if len(firsts) > 1 and self._is_unborn(firsts[-1]):
            self.void.append(firsts.pop())
        at: SegmentHeader | None = _start_of_log(self._store_id)
        for first, following in itertools.zip_longest(firsts, firsts[1:]):
            if at is not None and at.first_index < first:
                self._add_missing(at, first - 1)
                at = None
            at = self._look_at(first, following, at)
        if at is not None and (not firsts or self._goes_on()):
            self._add_missing(at, None)
        return self._found

    def _open(self, first: int) -> contextlib.closing[File]:
        return contextlib.closing(self._disk.open(posixpath.join(self._directory, segment_name(first))))

    def _is_unborn(self, first: int) -> bool:
        with self._open(first) as file:
            return is_unborn(file, file.size(), first, self.mark)

    def _goes_on(self) -> bool:
        """Whether a segment is known to follow the last one there is: a sealed one never is the last."""
        last = self._found[-1]
        return last.last_index is not None and not last.damage

    def _add_missing(self, at: SegmentHeader, last: int | None) -> None:
        name = segment_name(at.first_index)
        damage = Finding(name, -1, at.first_index, Damage.MISSING)
        self._found.append(
            SegmentHealth(name, at.first_index, last, False, None, at, SEGMENT_HEADER_BYTES, (damage,))
        )

    def _look_at(self, first: int, following: int | None, at: SegmentHeader | None) -> SegmentHeader | None:
        """Add what a file holds; returns the verified end after it, or None if it is damaged.

        ``at`` is the verified end before it, or None if what is before it is damaged.
        """
        with self._open(first) as file:
            file.drop_cache()  # what counts is what the disk has
            header = self._header(file, first)
            start = at or header
            if at is not None and at.first_index > first:  # left over from a healing that was interrupted
                self._add(first, None, None, at, 0, Damage.ORDER, 0, first)
                return at
            if start is None or (header is not None and header != start):
                what = Damage.SEGMENT_HEADER if header is None else Damage.CHAIN
                self._add(first, _before(following), None, at, SEGMENT_HEADER_BYTES, what, 0, first)
                return None
            segment = Segment(start, file.size())
            prefix = _Prefix(file, segment, self._end_of_cut(first) or segment.size, self._reclaimed)
            sealed_by = self._sealed_by(file, segment, following)
            bad = prefix.bad
            if sealed_by is None:
                bad = self._problem_of_last(file, segment, prefix)
            elif (prefix.end, prefix.good.first_index - 1) != sealed_by:
                bad = bad or BadRecord(Damage.SEAL, prefix.end, prefix.good.first_index)
            if header is None:
                bad = BadRecord(Damage.SEGMENT_HEADER, 0, first)
            last = sealed_by[1] if sealed_by else None
            if bad is None:
                self._found.append(
                    SegmentHealth(segment.name, first, last, True, header, prefix.good, prefix.end, ())
                )
                return prefix.good
            self._add(
                first,
                _before(following),
                header,
                prefix.good,
                prefix.end,
                bad.what,
                bad.offset,
                bad.index,
            )
            return None

    def _add(
        self,
        first: int,
        last: int | None,
        header: SegmentHeader | None,
        good: SegmentHeader | None,
        good_end: int,
        what: Damage,
        offset: int,
        index: int,
    ) -> None:
        name = segment_name(first)
        damage = Finding(name, offset, index, what)
        self._found.append(SegmentHealth(name, first, last, True, header, good, good_end, (damage,)))

    def _header(self, file: File, first: int) -> SegmentHeader | None:
        header = parse_segment_header(_reader(file)(SEGMENT_HEADER_BYTES, 0))
        if header is not None and header.store_id != self._store_id:
            raise CorruptionError(
                f"log segment {segment_name(first)} belongs to another store",
                segment=segment_name(first),
                offset=0,
                position=first,
                hint="nothing was changed; is this the right directory?",
            )
        return header if header is not None and header.first_index == first else None

    def _end_of_cut(self, first: int) -> int:
        """Where an interrupted cut has ended this segment, 0 if it has not."""
        mark = self.mark
        return mark.end if mark is not None and self.cutting and mark.segment == first else 0

    def _sealed_by(self, file: File, segment: Segment, following: int | None) -> tuple[int, int] | None:
        """Where a seal ends the records, and after which batch; impossible numbers if it is gone.

        None for the last segment, which has none.
        """
        at = max(segment.size - SEAL_BYTES, SEGMENT_HEADER_BYTES)
        seal = parse_seal(_reader(file)(SEAL_BYTES, at), at, segment.seed, segment.first_index)
        moved_on = self.mark is not None and self.mark.segment > segment.first_index
        if following is None and (self._end_of_cut(segment.first_index) or (seal is None and not moved_on)):
            return None
        return (at, seal.batch_index) if seal is not None else (-1, -1)

    def _problem_of_last(self, file: File, segment: Segment, prefix: _Prefix) -> BadRecord | None:
        """What is wrong with the last segment, where that is not just a tail that was never acknowledged."""
        mark = self.mark if self.mark and self.mark.segment == segment.first_index else None
        bad = prefix.bad or BadRecord(Damage.NO_RECORD, prefix.end, prefix.good.first_index)
        try:
            tail = ActiveScan(file, segment, mark, cutting=self.cutting).run().tail
        except CorruptionError:
            return bad
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return bad
        # Further than an opening would go: without a watermark it takes reclaimed payload for torn.
        return bad if prefix.end != tail.end else None


def _before(following: int | None) -> int | None:
    return None if following is None else following - 1


def _reader(file: File) -> Callable[[int, int], bytes]:
    """Reads of a file in which unreadable blocks are damage like any other: they read as nothing."""

    def read_at(length: int, offset: int) -> bytes:
        try:
            return file.pread(length, offset)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return b""

    return read_at


@final
class _Prefix:
    """The records at the start of a segment that are whole, with their payload.

    Attributes:
        end: offset where they end.
        good: the header a segment that starts there would have.
        bad: what ended them.
    """

    def __init__(self, file: File, segment: Segment, end: int, reclaimed: Judge | None) -> None:
        header = segment.header
        self.end = SEGMENT_HEADER_BYTES
        self.good = header
        self.bad: BadRecord | None = None
        self._read_at = _reader(file)
        self._reclaimed = reclaimed
        try:
            for record in scan(
                self._read_at,
                self.end,
                end,
                seed=segment.seed,
                index=header.first_index - 1,
                chain=header.previous_chain,
            ):
                info = record.info
                if not self._is_whole(record):
                    raise BadRecord(Damage.PAYLOAD, record.payload_offset, info.index)  # noqa: TRY301
                self.end = record.end
                self.good = SegmentHeader(header.store_id, info.index + 1, info.time_ns, info.chain)
        except BadRecord as bad:
            self.bad = bad

    def _is_whole(self, record: Scanned) -> bool:
        length = record.info.payload_length
        if sum_payload(self._read_at, record.payload_offset, length) == record.payload_crc:
            return True
        if self._reclaimed is None:
            return False
        payload = self._read_at(length, record.payload_offset)
        return len(payload) == length and self._reclaimed(record.info, payload)


# -- heal ----------------------------------------------------------------------------------------------


@final
class _Healing:
    """One healing of a log; :meth:`run` does it."""

    def __init__(
        self,
        disk: Disk,
        directory: str,
        store_id: bytes,
        fetch: Fetch,
        last: int,
        segment_bytes: int,
        reclaimed: Judge | None,
    ) -> None:
        self._disk = disk
        self._directory = directory
        self._fetch = fetch
        self._last = last
        self._segment_bytes = align(segment_bytes, BLOCK_BYTES)
        self._survey = _Survey(disk, directory, store_id, reclaimed)
        self._rebuilt: list[str] = []
        self._kept: list[str] = []
        self._at = _start_of_log(store_id)

    def run(self) -> RepairReport:
        found = self._survey.run()
        if not self._disk.exists(self._directory):
            self._disk.mkdir(self._directory)
            self._disk.sync_dir(posixpath.dirname(self._directory) or ".")
        self._remove_unfinished()
        try:
            built = list(self._build_all(found))
        except BaseException:
            with contextlib.suppress(OSError):
                self._remove_unfinished()
            raise
        # The end first: what is wrong before it keeps the log from being opened with a part of its end missing.
        for run, builder in reversed(built):
            self._replace(run, builder)
            if builder.is_last:
                self._write_watermark(builder)
        mark = self._survey.mark
        return RepairReport(
            tuple(sorted(self._rebuilt)),
            tuple(sorted(self._kept)),
            self._at.first_index - 1,
            mark.index if mark else -1,
        )

    def _build_all(self, found: list[SegmentHealth]) -> Iterator[tuple[list[SegmentHealth], _Builder]]:
        """Everything that is damaged, made anew beside it, with the proof that it is what was there."""
        while found:
            run = self._take_run(found)
            if run[-1].good is not None and not any(each.damage for each in run):
                self._at = run[-1].good
                continue
            builder = self._build(run, found[0] if found else None)
            self._at = builder.at
            yield run, builder

    def _take_run(self, found: list[SegmentHealth]) -> list[SegmentHealth]:
        """The next segment if it is whole; or damaged ones up to the next whose header tells what they held."""
        run = [found.pop(0)]
        is_short = not found and run[0].good is not None and run[0].good.first_index <= self._last
        if is_short:
            damage = Finding(run[0].name, run[0].good_end, self._last, Damage.NO_RECORD)
            run[0] = attrs.evolve(run[0], damage=run[0].damage or (damage,))
        while run[0].damage and found and found[0].header is None:
            run.append(found.pop(0))
        return run

    def _build(self, run: Sequence[SegmentHealth], following: SegmentHealth | None) -> _Builder:
        """Make what a run of segments held anew."""
        builder = _Builder(self._disk, self._directory, self._segment_bytes, self._at)
        with contextlib.closing(builder):
            if following is not None:
                assert following.header is not None  # that ended the run
                self._build_sealed(builder, following.header)
            else:
                self._build_last(builder, run[0] if len(run) == 1 else None)
        return builder

    def _build_sealed(self, builder: _Builder, following: SegmentHeader) -> None:
        self._fill(builder, following.first_index - 1)
        if builder.at != following:
            raise DivergenceError(following.first_index - 1)
        builder.finish(sealed=True)

    def _build_last(self, builder: _Builder, own: SegmentHealth | None) -> None:
        if own is not None and own.good is not None and own.good_end > SEGMENT_HEADER_BYTES:
            path = posixpath.join(self._directory, own.name)
            with contextlib.closing(self._disk.open(path)) as file:
                builder.copy(file, own.good_end, own.good)
        self._fill(builder, self._last)
        builder.finish(sealed=False)

    def _fill(self, builder: _Builder, last: int) -> None:
        """Add the peer's batches up to ``last``."""
        if builder.at.first_index > last:
            return
        for chunk in self._ask(builder.at.first_index, last):
            if chunk.first_index != builder.at.first_index:
                raise GapError(builder.at.first_index, chunk.first_index)
            if chunk.previous_chain != builder.at.previous_chain:
                raise DivergenceError(max(chunk.first_index - 1, 1))
            for batch in chunk.batches:
                builder.add(batch)
                if batch.index == last:
                    return
        raise UnavailableError(
            f"the peer does not have positions {builder.at.first_index} to {last}",
            hint="ask another one",
        )

    def _ask(self, first: int, last: int) -> Iterator[Chunk]:
        try:
            yield from self._fetch(first, last)
        except OSError as error:  # not our disk's
            raise UnavailableError(f"the peer was lost: {error.strerror or error}") from error

    def _replace(self, run: Sequence[SegmentHealth], builder: _Builder) -> None:
        """Keep copies of the damaged files, then give the new ones their names."""
        present = [each.first_index for each in run if each.present]
        for first in present:
            self._keep(segment_name(first))
        if builder.is_last:
            remove_segments(self._disk, self._directory, self._survey.void)
        for first in sorted({*present, *builder.made}):
            with contextlib.suppress(FileNotFoundError):
                self._disk.unlink(self._path(index_name(first)))
        for first in builder.made:
            name = segment_name(first)
            self._disk.rename(self._path(name + _NEW), self._path(name))
            self._rebuilt.append(name)
        self._disk.sync_dir(self._directory)
        remove_segments(
            self._disk, self._directory, [first for first in present if first not in builder.made]
        )

    def _path(self, *names: str) -> str:
        return posixpath.join(self._directory, *names)

    def _keep(self, name: str) -> None:
        """Copy a damaged file into the folder for them, as far as it can be read."""
        if not self._disk.exists(self._path(DAMAGED)):
            self._disk.mkdir(self._path(DAMAGED))
            self._disk.sync_dir(self._directory)
        taken = set(self._disk.listdir(self._path(DAMAGED)))
        copy = next(free for n in itertools.count(1) if (free := f"{name}.damaged-{n}") not in taken)
        with (
            contextlib.closing(self._disk.open(self._path(name))) as source,
            contextlib.closing(self._disk.open(self._path(DAMAGED, _COPYING), create=True)) as target,
        ):
            size = source.size()
            target.truncate(0)
            target.truncate(size)
            _copy(source, target, 0, size)
            target.fdatasync()
        self._disk.rename(self._path(DAMAGED, _COPYING), self._path(DAMAGED, copy))
        self._disk.sync_dir(self._path(DAMAGED))
        self._kept.append(posixpath.join(DAMAGED, copy))

    def _remove_unfinished(self) -> None:
        for name in self._disk.listdir(self._directory):
            if name.endswith(_NEW) and SEGMENT_NAME.fullmatch(name.removesuffix(_NEW)):
                self._disk.unlink(self._path(name))

    def _write_watermark(self, builder: _Builder) -> None:
        """Both slots, after the segments: an older one may promise what is gone, or order a cut."""
        at = builder.at
        path = self._path(WATERMARK_NAME)
        with contextlib.closing(self._disk.open(path, create=True)) as file:
            watermark = WatermarkFile(file, at.store_id)
            watermark.reserve()
            for _ in range(2):
                watermark.write(at.first_index - 1, builder.segment, builder.end, at.previous_chain)
                watermark.sync()
        self._disk.sync_dir(self._directory)


def _copy(source: File, target: File, start: int, end: int) -> None:
    """Copy bytes to the same place; what is zero or cannot be read is left out."""
    read_at = _reader(source)
    for at in range(start, end, _COPY_BYTES):
        data = read_at(min(_COPY_BYTES, end - at), at)
        if any(data):
            target.pwritev([data], at)


@final
class _Builder:
    """Writes segments under names that nobody opens, from a verified end on.

    Attributes:
        at: the header a next segment would have.
        made: first indexes of the segments that were made.
        segment: first index of the newest.
        end: offset where its records end.
        is_last: whether it was finished as the last segment of the log.
    """

    def __init__(self, disk: Disk, directory: str, segment_bytes: int, at: SegmentHeader) -> None:
        self._disk = disk
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._file: File | None = None
        self._size = 0
        self.at = at
        self.made: list[int] = []
        self.segment = at.first_index
        self.end = SEGMENT_HEADER_BYTES
        self.is_last = False

    def _begin(self, least: int) -> File:
        self.segment, self.end = self.at.first_index, SEGMENT_HEADER_BYTES
        self._size = max(self._segment_bytes, align(least, BLOCK_BYTES))
        file = self._disk.open(
            posixpath.join(self._directory, segment_name(self.segment) + _NEW), create=True
        )
        self._file = file
        file.truncate(0)
        file.allocate(0, self._size)
        file.pwritev([encode_segment_header(self.at)], 0)
        self.made.append(self.segment)
        return file

    def copy(self, source: File, end: int, at: SegmentHeader) -> None:
        """Start with the records of a segment up to an offset, as they are; ``at`` is the verified end there."""
        file = self._begin(end + SEAL_BYTES)
        _copy(source, file, SEGMENT_HEADER_BYTES, end)
        self.at, self.end = at, end

    def add(self, batch: ShippedBatch) -> None:
        """Write a batch that continues the verified end.

        Raises:
            DivergenceError: its link is not what it must be.
        """
        file = self._file_for(len(batch.metadata), batch.payload_length)
        payload, holes = stored_payload(batch)
        record = encode_record(
            offset=self.end,
            seed=record_seed(self.at.store_id, self.segment),
            kind=RecordKind.BATCH,
            index=batch.index,
            term=batch.term,
            time_ns=batch.time_ns,
            previous_chain=self.at.previous_chain,
            durable_end=0,
            metadata=batch.metadata,
            payload=payload,
            payload_length=batch.payload_length,
            payload_crc=batch.payload_crc,
        )
        whole = batch.reclaimed or measure(payload) == (batch.payload_length, batch.payload_crc)
        if record.chain != batch.chain or batch.time_ns < self.at.previous_time_ns or not whole:
            raise DivergenceError(batch.index)
        file.pwritev(record.buffers, self.end)
        place = self.end + payload_offset(self.end, len(batch.metadata), batch.payload_length)
        for start, stop in blocks_inside(place, holes):
            punch_blocks(file, start, stop)
        self.end += record.length
        self.at = SegmentHeader(self.at.store_id, batch.index + 1, batch.time_ns, record.chain)

    def _file_for(self, metadata_length: int, payload_length: int) -> File:
        length = record_length(self.end, metadata_length, payload_length)
        if self._file is not None and self.end + length + SEAL_BYTES <= self._size:
            return self._file
        if self._file is not None:
            self._seal(self._file)
        # The payload's alignment may take one block more in the new place.
        return self._begin(SEGMENT_HEADER_BYTES + length + BLOCK_BYTES + SEAL_BYTES)

    def _seal(self, file: File) -> None:
        raw = encode_seal(
            offset=self.end,
            seed=record_seed(self.at.store_id, self.segment),
            first_index=self.segment,
            last_index=self.at.first_index - 1,
            time_ns=self.at.previous_time_ns,
            chain=self.at.previous_chain,
        )
        file.pwritev([raw], self.end)
        file.truncate(self.end + len(raw))
        file.fdatasync()
        self.close()

    def finish(self, *, sealed: bool) -> None:
        """Make what was written durable, as a segment that another follows or as the last one."""
        self.is_last = not sealed
        if self._file is None and not sealed:
            self._begin(SEGMENT_HEADER_BYTES + SEAL_BYTES)
        if self._file is not None and sealed:
            self._seal(self._file)
        elif self._file is not None:
            self._file.fdatasync()
            self.close()

    def close(self) -> None:
        """Close the file that is being written, if any."""
        file, self._file = self._file, None
        if file is not None:
            file.close()
