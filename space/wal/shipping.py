"""Log shipping: batches as they are stored, from one log to another, without knowing what they mean.

Pure of sockets.  The unit is a :class:`Chunk`: consecutive whole batches, with the chain link before the
first.  A chunk cannot be wrong in itself: it is made by :func:`read_chunk`, from a log whose every CRC and
link is checked while it is read, or by :func:`decode_chunk`, which checks all of it again.  So damage
is never shipped, and what :func:`receive_chunk` appends is what the source has, or an error.

The receiver's ``last_index`` is the cursor: asking for what comes after it resumes whatever was
interrupted.  Chunks that come twice or overlap are harmless; gaps and other histories are refused.

Payload that was reclaimed travels and is stored as holes, beside what is left of it.  Its CRC says nothing
any more, and only whoever reclaimed it knows what should be left: see :data:`Judge`.

Bytes of a chunk: ``docs/formats/wal.md``.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, final

import attrs
from crc32c import crc32c

from space._errors import CorruptionError, NotFoundError, RefusedError, SpaceError, UsageError
from space.wal.disk import Buffer
from space.wal.log import Log, StoredBatch
from space.wal.segment_format import (
    BLOCK_BYTES,
    CHAIN_BYTES,
    CRC,
    FORMAT_VERSION,
    GENESIS,
    METADATA_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
    RecordInfo,
)
from space.wal.segment_writer import batch_link

CHUNK_BYTES: Final = 4 * 2**20
"""Default size of a chunk: large enough to fill a network, small enough to hold several in memory."""
CHUNK_BYTES_MAX: Final = 16 * 2**20
"""A receiver takes no more from a chunk of several batches; a larger batch comes alone."""
CHUNK_BATCHES_MAX: Final = 65_536
"""Small batches cost a receiver many times their bytes in memory: this keeps it to some 50 MB."""

_MAGIC: Final = b"SPACECHK"
_CHUNK: Final = struct.Struct("<8sIIQ32s32s")  # magic, version, batches, bytes, link before, link after
_CHUNK_BYTES: Final = _CHUNK.size + CRC.size
_BATCH: Final = struct.Struct("<QQqIIIII")  # ..., metadata length, payload length, CRC, flags, pieces
_PIECE: Final = struct.Struct("<III")  # offset in the payload, length, CRC
_RECLAIMED: Final = 1  # the only flag
_BATCH_BYTES_MAX: Final = METADATA_BYTES_MAX + PAYLOAD_BYTES_MAX
_PIECES_MAX: Final = PAYLOAD_BYTES_MAX // (2 * BLOCK_BYTES) + 1  # between two there is a hole of a block
_ENCODED_BYTES_MAX: Final = _CHUNK_BYTES + _BATCH.size + _BATCH_BYTES_MAX + _PIECES_MAX * _PIECE.size
_INDEX_MAX: Final = 2**63 - 1
_ZERO_BLOCK: Final = bytes(BLOCK_BYTES)
_ZEROS: Final = memoryview(bytes(2**20))

Judge = Callable[[RecordInfo, bytes], bool]
"""``(batch, payload as it is now) -> bool``: whether nothing but what was declared reclaimed is missing from it."""


class ShippingError(SpaceError):
    """What a peer sent is not a chunk of a log, or not one that this log can take."""


class GapError(ShippingError):
    """Batches between the end of the log and the chunk are missing.

    Attributes:
        index: the first of them: where to ask the source to go on.
    """

    def __init__(self, index: int, first: int) -> None:
        super().__init__(f"the log goes on at position {index}, and the chunk starts at {first}")
        self.index = index


class DivergenceError(ShippingError):
    """Log and chunk hold different histories.

    Attributes:
        index: the first position that is seen to differ.  Where that is before the chunk, an earlier one may
            differ already: see :func:`first_divergence`.
    """

    def __init__(self, index: int) -> None:
        super().__init__(f"log and chunk differ at position {index}")
        self.index = index


class Piece(NamedTuple):
    """Bytes of a payload, from an offset in it."""

    offset: int
    data: bytes | memoryview


@final
@attrs.frozen
class ShippedBatch:
    """A batch on its way.

    Attributes:
        payload_crc: CRC32C of the payload as it was written first.
        pieces: what there is of the payload, in order; all of it is one piece, nothing is none.
        reclaimed: whether parts of the payload are holes.
        chain: link after the batch.
    """

    index: int
    term: int
    time_ns: int
    metadata: bytes
    payload_length: int
    payload_crc: int
    pieces: tuple[Piece, ...]
    reclaimed: bool
    chain: bytes

    @property
    def bytes_stored(self) -> int:
        """Bytes it takes where it is stored, headers and padding not counted, holes counted."""
        return len(self.metadata) + self.payload_length


@final
@attrs.frozen
class Chunk:
    """Consecutive whole batches, at least one, and the link before the first."""

    previous_chain: bytes
    batches: tuple[ShippedBatch, ...]

    @property
    def first_index(self) -> int:
        """Index of the first batch."""
        return self.batches[0].index

    @property
    def last_index(self) -> int:
        """Index of the last batch."""
        return self.batches[-1].index

    @property
    def chain(self) -> bytes:
        """Link after the last batch."""
        return self.batches[-1].chain


# -- source --------------------------------------------------------------------------------------------


def read_chunk(
    log: Log, start: int, *, stop: int, bytes_max: int = CHUNK_BYTES, reclaimed: Judge | None = None
) -> Chunk:
    """Batches from ``start`` up to but not including ``stop``, as many as fit, at least one.

    Args:
        bytes_max: bytes of metadata and payload, holes counted; a larger batch comes alone.
        reclaimed: asked about each payload that is not as it was written.  Without it none may have been
            reclaimed.

    Raises:
        ConflictError: the log was cut back meanwhile.
        CorruptionError: it is damaged there, or payload was reclaimed and ``reclaimed`` does not vouch for it.
        NotFoundError: the log has no such batch.
        RefusedError: between these batches are records that are none.
        UsageError: the range is empty, or ``bytes_max`` is out of range.
    """
    if start >= stop or not 0 < bytes_max <= CHUNK_BYTES_MAX:
        raise UsageError(f"no chunk has positions {start} to {stop} in up to {bytes_max} bytes")
    if not log.first_index <= start <= log.last_index:
        raise NotFoundError(
            f"there is no position {start}: the log holds {log.first_index} to {log.last_index}"
        )
    stop = _stop_of_chunk(log.records(start, stop), start, bytes_max)
    batches: list[ShippedBatch] = []
    previous = b""
    for stored in log.stored(start, stop):
        if batches and stored.info.previous_chain != batches[-1].chain:
            raise RefusedError(f"before position {stored.info.index} is a record that cannot be shipped")
        batch = _shipped(stored)
        if batch.reclaimed and not (
            _has_holes(batch) and reclaimed and reclaimed(stored.info, stored.payload)
        ):
            log.read_batch(batch.index)  # raises, with the place of the damage
        previous = previous or stored.info.previous_chain
        batches.append(batch)
    return Chunk(previous, tuple(batches))


def _stop_of_chunk(infos: Iterator[RecordInfo], start: int, bytes_max: int) -> int:
    """Where a chunk has to end, found without reading payload."""
    stop, total = start, 0
    for info in infos:
        total += len(info.metadata) + info.payload_length
        if stop > start and (total > bytes_max or stop - start == CHUNK_BATCHES_MAX):
            break
        stop = info.index + 1
    return stop


def _shipped(stored: StoredBatch) -> ShippedBatch:
    info = stored.info
    return ShippedBatch(
        info.index,
        info.term,
        info.time_ns,
        info.metadata,
        info.payload_length,
        stored.payload_crc,
        tuple(_pieces(memoryview(stored.payload), whole=stored.intact)),
        not stored.intact,
        info.chain,
    )


def _pieces(payload: memoryview, *, whole: bool) -> Iterator[Piece]:
    """All of a payload, or the runs of blocks in it that are not zero."""
    if whole:
        if payload:
            yield Piece(0, payload)
        return
    starts = range(0, len(payload), BLOCK_BYTES)
    for is_data, run in itertools.groupby(starts, lambda at: _holds_data(payload[at : at + BLOCK_BYTES])):
        if is_data:
            blocks = list(run)
            yield Piece(blocks[0], payload[blocks[0] : blocks[-1] + BLOCK_BYTES])


def _has_holes(batch: ShippedBatch) -> bool:
    """Whether reclaiming can have made the payload what it is: it takes whole blocks, and leaves zeros."""
    return _fit(batch.pieces, batch.payload_length, reclaimed=True)


def _holds_data(block: memoryview) -> bool:
    return block != _ZERO_BLOCK[: len(block)]


# -- bytes ---------------------------------------------------------------------------------------------


def encode_chunk(chunk: Chunk) -> list[Buffer]:
    """A chunk's bytes as buffers to be sent one after the other; payload is not copied."""
    buffers: list[Buffer] = []
    for batch in chunk.batches:
        fields = _BATCH.pack(
            batch.index, batch.term, batch.time_ns, len(batch.metadata), batch.payload_length,
            batch.payload_crc, _RECLAIMED * batch.reclaimed, len(batch.pieces),
        )  # fmt: skip
        buffers.append(fields + batch.metadata)
        for offset, data in batch.pieces:
            crc = crc32c(data) if batch.reclaimed else batch.payload_crc
            buffers += (_PIECE.pack(offset, len(data), crc), data)
    total = _CHUNK_BYTES + sum(map(len, buffers))
    header = _CHUNK.pack(_MAGIC, FORMAT_VERSION, len(chunk.batches), total, chunk.previous_chain, chunk.chain)
    return [header + CRC.pack(crc32c(header)), *buffers]


def decode_chunk(data: Buffer) -> Chunk:
    """The chunk that these bytes are; its payload stays in ``data``.

    Raises:
        ShippingError: they are none, or of an unknown version, too large, damaged or inconsistent.
    """
    view = memoryview(data).cast("B").toreadonly()
    if not _CHUNK_BYTES <= len(view) <= _ENCODED_BYTES_MAX:
        raise ShippingError(f"a chunk has {_CHUNK_BYTES} to {_ENCODED_BYTES_MAX} bytes, not {len(view)}")
    magic, version, count, total, previous, chain = _CHUNK.unpack_from(view)
    if magic != _MAGIC or CRC.unpack_from(view, _CHUNK.size)[0] != crc32c(view[: _CHUNK.size]):
        raise ShippingError("these bytes are no chunk, or its header is damaged")
    if version != FORMAT_VERSION:
        raise ShippingError(
            f"the chunk has format version {version}, and this program knows {FORMAT_VERSION}",
            hint="update the older of the two nodes",
        )
    if total != len(view) or not 1 <= count <= CHUNK_BATCHES_MAX:
        raise ShippingError(f"a chunk of {total} bytes and {count} batches came as {len(view)} bytes")
    batches = tuple(_decode_batches(_Cursor(view, _CHUNK_BYTES), count, previous))
    if batches[-1].chain != chain:
        raise ShippingError(f"the hash chain of the chunk is broken, up to position {batches[-1].index}")
    return Chunk(previous, batches)


@final
class _Cursor:
    """Takes bytes from the front of a chunk."""

    def __init__(self, view: memoryview, at: int) -> None:
        self._view = view
        self._at = at

    def take(self, length: int) -> memoryview:
        start, self._at = self._at, self._at + length
        if self._at > len(self._view):
            raise ShippingError(f"the chunk ends in the middle of a batch, at byte {len(self._view)}")
        return self._view[start : self._at]

    @property
    def is_at_end(self) -> bool:
        return self._at == len(self._view)


def _decode_batches(cursor: _Cursor, count: int, chain: bytes) -> Iterator[ShippedBatch]:
    before: ShippedBatch | None = None
    total = 0
    for _ in range(count):
        batch = _decode_batch(cursor, chain)
        total += batch.bytes_stored
        if count > 1 and total > CHUNK_BYTES_MAX:
            raise ShippingError(f"a chunk of several batches has up to {CHUNK_BYTES_MAX} bytes")
        if before is not None and (batch.index != before.index + 1 or batch.time_ns < before.time_ns):
            raise ShippingError(f"position {batch.index} of the chunk is out of order")
        yield batch
        before, chain = batch, batch.chain
    if not cursor.is_at_end:
        raise ShippingError("the chunk goes on after its last batch")


def _decode_batch(cursor: _Cursor, previous: bytes) -> ShippedBatch:
    (index, term, time_ns, metadata_length, payload_length,
     payload_crc, flags, count) = _BATCH.unpack(cursor.take(_BATCH.size))  # fmt: skip
    if (
        not 1 <= index <= _INDEX_MAX
        or time_ns < 0
        or metadata_length > METADATA_BYTES_MAX
        or payload_length > PAYLOAD_BYTES_MAX
        or flags & ~_RECLAIMED
    ):
        raise ShippingError(f"position {index} of the chunk has a number that is out of range")
    metadata = bytes(cursor.take(metadata_length))
    reclaimed = flags == _RECLAIMED
    pieces = tuple(_decode_pieces(cursor, index, count))
    if not _fit(pieces, payload_length, reclaimed=reclaimed):
        raise ShippingError(f"the payload of position {index} of the chunk is not in order")
    found_crc = crc32c(pieces[0].data) if pieces else 0
    if not reclaimed and found_crc != payload_crc:
        raise ShippingError(f"the payload of position {index} of the chunk is damaged")
    chain = batch_link(
        previous, index=index, term=term, time_ns=time_ns, metadata=metadata,
        payload_length=payload_length, payload_crc=payload_crc,
    )  # fmt: skip
    return ShippedBatch(index, term, time_ns, metadata, payload_length, payload_crc, pieces, reclaimed, chain)


def _decode_pieces(cursor: _Cursor, index: int, count: int) -> Iterator[Piece]:
    for _ in range(count):
        offset, length, crc = _PIECE.unpack(cursor.take(_PIECE.size))
        data = cursor.take(length)
        if crc32c(data) != crc:
            raise ShippingError(f"the payload of position {index} of the chunk is damaged")
        yield Piece(offset, data)


def _fit(pieces: Sequence[Piece], length: int, *, reclaimed: bool) -> bool:
    """Whether pieces are a whole payload; or, reclaimed, runs of blocks with holes between them."""
    if not reclaimed:
        return [(offset, len(data)) for offset, data in pieces] == ([(0, length)] if length else [])
    end = -1  # a piece at 0 follows no other
    for offset, data in pieces:
        if offset <= end or offset % BLOCK_BYTES or not data:
            return False
        end = offset + len(data)
        if end > length or (end % BLOCK_BYTES and end != length):
            return False
    return length >= BLOCK_BYTES and sum(len(data) for _, data in pieces) < length


# -- target --------------------------------------------------------------------------------------------


def receive_chunk(log: Log, chunk: Chunk) -> int:
    """Append what the log does not have yet of a chunk; the caller syncs.

    What is appended before an error stands: it is what the source has.

    Returns:
        Index of the log's last batch: the cursor.

    Raises:
        CorruptionError: the log's chain is not what the chunk's is after the same batches.
        DivergenceError: the log holds other batches; nothing was appended.
        GapError: batches before the chunk are missing; nothing was appended.
        ShippingError: its time goes back; nothing was appended.
        StorageError: the disk refused.
    """
    if chunk.first_index > log.last_index + 1:
        raise GapError(log.last_index + 1, chunk.first_index)
    _check_overlap(log, chunk)
    fresh = chunk.batches[log.last_index + 1 - chunk.first_index :]
    if fresh and fresh[0].time_ns < log.last_time_ns:
        raise ShippingError(f"the time of position {fresh[0].index} of the chunk is before the log's last")
    for batch in fresh:
        append_shipped(log, batch)
        if log.last_chain != batch.chain:
            raise CorruptionError(
                f"the log's chain after position {batch.index} is not the source's", position=batch.index
            )
    return log.last_index


def append_shipped(log: Log, batch: ShippedBatch) -> None:
    """Append a batch as it is stored elsewhere.

    Raises:
        StorageError: the disk refused.
    """
    payload, holes = stored_payload(batch)
    log.append(
        batch.metadata, payload, time_ns=batch.time_ns, term=batch.term,
        payload_crc=batch.payload_crc if batch.reclaimed else None, holes=holes,
    )  # fmt: skip


def stored_payload(batch: ShippedBatch) -> tuple[list[Buffer], list[tuple[int, int]]]:
    """A payload's bytes with zeros for what was reclaimed, and offset and length of each hole."""
    buffers: list[Buffer] = []
    holes: list[tuple[int, int]] = []
    end = 0
    for offset, data in (*batch.pieces, Piece(batch.payload_length, b"")):
        if offset > end:
            holes.append((end, offset - end))
            buffers += (_ZEROS[: offset - at] for at in range(end, offset, len(_ZEROS)))
        buffers.append(data)
        end = offset + len(data)
    return buffers, holes


def link_at(log: Log, index: int) -> bytes:
    """The log's chain link after a batch; after none, for index 0.

    Raises:
        CorruptionError: the batch is damaged.
        NotFoundError: there is no such batch.
    """
    if index == log.last_index:
        return log.last_chain
    return log.read(index).chain if index else GENESIS


def _check_overlap(log: Log, chunk: Chunk) -> None:
    """Refuse a chunk that says something else about batches the log has."""
    if link_at(log, chunk.first_index - 1) != chunk.previous_chain:
        raise DivergenceError(max(chunk.first_index - 1, 1))
    known = min(log.last_index, chunk.last_index)

    def theirs(index: int) -> bytes:
        return chunk.batches[index - chunk.first_index].chain

    # Equal links after the last common batch prove all before it equal.
    if known >= chunk.first_index and link_at(log, known) != theirs(known):
        raise DivergenceError(_first_difference(log, theirs, chunk.first_index - 1, known))


def first_divergence(ours: Log, theirs: Callable[[int], bytes | None], last: int) -> int:
    """The first position at which a peer's log differs from ours, found with few questions.

    Equal links prove equal logs up to there, so "the links are equal" holds up to some position and for
    none after it: a binary search.  Cutting ours after one less than the result makes it a prefix of theirs.

    Args:
        theirs: the peer's chain link after a batch, or None if it has no such batch.
        last: the peer's last position.

    Returns:
        That position; one more than the last common position if nothing differs.

    Raises:
        CorruptionError: a batch of ours that was looked at is damaged.
    """
    return _first_difference(ours, theirs, 0, min(ours.last_index, last) + 1)


def _first_difference(ours: Log, theirs: Callable[[int], bytes | None], equal: int, differs: int) -> int:
    while differs - equal > 1:
        middle = (equal + differs) // 2
        if link_at(ours, middle) == theirs(middle):
            equal = middle
        else:
            differs = middle
    return differs


assert _CHUNK.size == 56 + CHAIN_BYTES
assert _BATCH.size == 44
