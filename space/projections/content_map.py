"""Content map: capsule bytes → frames in the log.  Holds no payload, only where it is.

Each capsule has a *layer*: a sorted set of extents that do not overlap.  Cloning freezes the source's layer
and gives both capsules a fresh one on top of it, so a clone costs a few rows whatever the size; a read
looks into the capsule's own layer and through its gaps into the layers below.  In a layer that has one below,
zeros must be said: a *hole* extent (no frames) hides what lies beneath.

Rows:

* MAP: capsule id → layer u64, end u64 (highest end of an extent in the layer), allocated u64, stored u64
* LAYER: layer u64 → parent u64 (0: none), references u32 (capsules and layers on top), depth u32; no row: no
  parent and one reference, as most layers have; key 0 counts layers
* EXTENT: layer u64, offset u64 → position u64 (batch the frames came with), length u64, skip u32 (bytes of
  the first frame to leave out), packed frame records
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs

from space.events import types as ev
from space.events.ids import ID_BYTES
from space.projections.contract import Handler
from space.statemachine.apply import Context, clone_id, manifest_nodes
from space.statemachine.tables import Reader, Writer

MAP: Final = 32
LAYER: Final = 33
EXTENT: Final = 34

FRAME_BYTES: Final = 48
DEPTH_MAX: Final = 24
"""Deepest stack of layers a read may have to look through; one deeper is flattened when it would be made."""

OFFSET_MAX: Final = 1 << 63
_MAP: Final = struct.Struct("<QQQQ")
_LAYER: Final = struct.Struct("<QII")
_EXTENT: Final = struct.Struct("<QQI")
_KEY: Final = struct.Struct(">QQ")
_U32: Final = struct.Struct("<I")
_COUNT_KEY: Final = bytes(8)
_pack_key: Final = _KEY.pack
_pack_extent: Final = _EXTENT.pack
_unpack_u32: Final = _U32.unpack_from
_PLAIN_LAYER: Final = (0, 1, 0)


@attrs.frozen
class Extent:
    """``length`` bytes at ``offset``: decoded frames (of batch ``position``) less their first ``skip`` bytes.

    No frames: zeros.
    """

    offset: int
    length: int
    position: int
    skip: int
    frames: bytes

    @property
    def end(self) -> int:
        return self.offset + self.length

    def part(self, start: int, end: int) -> Extent:
        """The extent cut down to [start, end), without the frames it no longer needs."""
        if start <= self.offset and end >= self.end:
            return self
        start, end = max(start, self.offset), min(end, self.end)
        if not self.frames:
            return Extent(start, end - start, self.position, 0, b"")
        low = start - self.offset + self.skip
        high = low + end - start
        at = first = plain = begin = 0
        frames = self.frames
        for at in range(0, len(frames), FRAME_BYTES):
            (size,) = _U32.unpack_from(frames, at)
            if plain + size <= low:
                first, begin = at + FRAME_BYTES, plain + size
            plain += size
            if plain >= high:
                break
        return Extent(start, end - start, self.position, low - begin, frames[first : at + FRAME_BYTES])


@attrs.frozen
class MapRow:
    """Where a capsule's content is rooted, and how much space it takes."""

    layer: int
    end: int
    allocated: int
    stored: int


class ContentMapView:
    """The view that turns a range of a capsule into frames of the log."""

    name = "content"
    version = 1
    tables: Final = {MAP: "map", LAYER: "layer", EXTENT: "extent"}

    def folder(self, txn: Writer) -> ContentFolder:
        return ContentFolder(txn)


def map_row(txn: Reader, capsule: bytes) -> MapRow | None:
    """Root of a capsule's content, or None when nothing was ever written."""
    data = txn.get(MAP, capsule)
    return None if data is None else MapRow(*_MAP.unpack(data))


def allocated(row: bytes) -> int:
    """Bytes that are not a hole, of a row of MAP."""
    return int(_MAP.unpack(row)[2])


def extents(txn: Reader, capsule: bytes, offset: int, length: int) -> Iterator[Extent]:
    """What [offset, offset + length) of a capsule is made of, in order; gaps are zeros."""
    data = txn.get(MAP, capsule)
    if data is not None and length > 0:
        yield from visible(txn, _MAP.unpack(data)[0], offset, min(offset + length, OFFSET_MAX))


def covering(txn: Reader, capsule: bytes, offset: int, length: int) -> Extent | None:
    """The one extent that all of [offset, offset + length) of a capsule is in, if there is one.

    What :func:`extents` finds too, for the small reads of block devices in a fraction of the time.
    """
    data = txn.get(MAP, capsule)
    if data is None:
        return None
    layer = _MAP.unpack(data)[0]
    row = txn.last_at_or_before(EXTENT, _pack_key(layer, offset))
    if row is None or not _reaches(row, layer, offset + length - 1):
        return None
    extent = _decode(*row)
    return extent.part(offset, offset + length) if extent.frames else None


def visible(txn: Reader, layer: int, start: int, end: int) -> Iterator[Extent]:
    """Extents with frames in [start, end), looking through gaps into the layers below; holes are left out."""
    at = start
    for extent in _own(txn, layer, start, end):
        if extent.offset > at and (parent := _parent(txn, layer)):
            yield from visible(txn, parent, at, extent.offset)
        if extent.frames:
            yield extent.part(start, end)
        at = extent.end
    if at < end and (parent := _parent(txn, layer)):
        yield from visible(txn, parent, at, end)


def all_extents(txn: Reader) -> Iterator[Extent]:
    """Every extent of every layer: all that the present can reach."""
    for key, value in txn.scan(EXTENT, b""):
        yield _decode(key, value)


def _parent(txn: Reader, layer: int) -> int:
    data = txn.get(LAYER, layer.to_bytes(8, "big"))
    return 0 if data is None else int(_LAYER.unpack(data)[0])


def _decode(key: bytes, value: bytes) -> Extent:
    position, length, skip = _EXTENT.unpack_from(value)
    return Extent(int.from_bytes(key[8:], "big"), length, position, skip, value[_EXTENT.size :])


def _own(txn: Reader, layer: int, start: int, end: int) -> Iterator[Extent]:
    prefix = layer.to_bytes(8, "big")
    before = txn.last_at_or_before(EXTENT, _KEY.pack(layer, start))
    first = start
    if before is not None and before[0].startswith(prefix):
        extent = _decode(*before)
        if extent.end >= end:  # the whole range is in one extent: most small reads end here
            yield extent
            return
        first = extent.offset
    for key, value in txn.scan(EXTENT, prefix, _KEY.pack(layer, first)):
        extent = _decode(key, value)
        if extent.offset >= end:
            return
        if extent.end > start:
            yield extent


class ContentFolder:
    """Folds writes into the map; rows that need no look at their neighbours are held back and written sorted."""

    def __init__(self, txn: Writer) -> None:
        self._txn = txn
        self._maps: dict[bytes, list[int]] = {}
        self._layers = 0  # how many were ever made; 0: not looked up yet
        self._pending: dict[int, dict[bytes, bytes]] = {}  # layer → its rows
        self.handlers: Mapping[type[Any], Handler] = {
            ev.ExtentWritten: self._written,
            ev.RangeDeallocated: self._deallocated,
            ev.RangeCopied: self._copied,
            ev.CapsuleResized: self._resized,
            ev.CapsuleCloned: self._cloned,
            ev.CapsulesPurged: self._purged,
        }

    def flush(self) -> None:
        self._flush_extents()
        if self._layers:
            self._txn.put(LAYER, _COUNT_KEY, self._layers.to_bytes(8, "big"))
        rows = sorted((capsule, _MAP.pack(*row)) for capsule, row in self._maps.items())
        self._txn.put_sorted(MAP, rows)

    def _flush_extents(self) -> None:
        if self._pending:
            rows = [row for layer in sorted(self._pending) for row in sorted(self._pending[layer].items())]
            self._txn.put_sorted(EXTENT, rows)
            self._pending.clear()

    def _flush_layer(self, layer: int) -> None:
        rows = self._pending.pop(layer, None)
        if rows:
            self._txn.put_sorted(EXTENT, sorted(rows.items()))

    # --- rows ------------------------------------------------------------------------------------

    def _find(self, capsule: bytes) -> list[int] | None:
        row = self._maps.get(capsule)
        if row is None:
            data = self._txn.get(MAP, capsule)
            if data is not None:
                row = self._maps[capsule] = list(_MAP.unpack(data))
        return row

    def _map(self, capsule: bytes) -> list[int]:
        row = self._find(capsule)
        if row is None:
            row = self._maps[capsule] = [self._new_layer(0), 0, 0, 0]
        return row

    def _new_layer(self, parent: int) -> int:
        if not self._layers:
            self._layers = int.from_bytes(self._txn.get(LAYER, _COUNT_KEY) or b"", "big")
        self._layers += 1
        if parent:
            grandparent, references, depth = self._layer(parent)
            self._put_layer(parent, grandparent, references + 1, depth)
            self._put_layer(self._layers, parent, 1, depth + 1)
        return self._layers

    def _put_layer(self, layer: int, parent: int, references: int, depth: int) -> None:
        self._txn.put(LAYER, layer.to_bytes(8, "big"), _LAYER.pack(parent, references, depth))

    def _layer(self, layer: int) -> tuple[int, int, int]:
        data = self._txn.get(LAYER, layer.to_bytes(8, "big"))
        return _LAYER.unpack(data) if data else _PLAIN_LAYER

    def _release(self, layer: int) -> None:
        """Drops one reference; a layer nobody stands on goes, with its extents."""
        while layer:
            key = layer.to_bytes(8, "big")
            parent, references, depth = self._layer(layer)
            if references > 1:
                self._put_layer(layer, parent, references - 1, depth)
                return
            for row, _ in list(self._txn.scan(EXTENT, key)):
                self._txn.delete(EXTENT, row)
            self._txn.delete(LAYER, key)
            layer = parent

    # --- events ----------------------------------------------------------------------------------

    def _written(self, context: Context, event: ev.ExtentWritten) -> None:
        capsule, offset, length, frames = event.capsule, event.offset, event.length, event.frames
        row = self._maps.get(capsule)
        if row is None:
            row = self._map(capsule)
        layer = row[0]
        end = offset + length
        key = _pack_key(layer, offset)
        value = _pack_extent(context.position, length, 0) + frames
        if offset < row[1]:
            self._carve(row, offset, end)
            self._txn.put(EXTENT, key, value)
        elif layer in self._pending:
            self._pending[layer][key] = value
        else:
            self._pending[layer] = {key: value}
        if end > row[1]:  # noqa: PLR1730 - max() costs more, and replay comes here for every write
            row[1] = end
        row[2] += length
        row[3] += _unpack_u32(frames, 4)[0] if len(frames) == FRAME_BYTES else _stored(frames)

    def _carve(self, row: list[int], start: int, end: int) -> None:
        """Makes room: extents of the layer in [start, end) go, those that stick out are cut."""
        txn, layer = self._txn, row[0]
        self._flush_layer(layer)
        last = txn.last_at_or_before(EXTENT, _KEY.pack(layer, end - 1))
        if last is None or not _reaches(last, layer, start):
            return
        found = _decode(*last)
        for extent in [found] if found.offset <= start else list(_own(txn, layer, start, end)):
            txn.delete(EXTENT, _KEY.pack(layer, extent.offset))
            if extent.offset < start:
                self._put(layer, extent.part(extent.offset, start))
            if extent.end > end:
                self._put(layer, extent.part(end, extent.end))
            if extent.frames:
                row[2] -= min(extent.end, end) - max(extent.offset, start)

    def _put(self, layer: int, extent: Extent) -> None:
        value = _EXTENT.pack(extent.position, extent.length, extent.skip) + extent.frames
        self._txn.put(EXTENT, _KEY.pack(layer, extent.offset), value)

    def _clear(self, row: list[int], start: int, end: int) -> None:
        if start < row[1]:
            self._carve(row, start, end)
        if _parent(self._txn, row[0]):
            self._put(row[0], Extent(start, end - start, 0, 0, b""))
            row[1] = max(row[1], end)

    def _copied(self, context: Context, event: ev.RangeCopied) -> None:
        """Lays the extents of the source range into the target's own layer: frames are named, not moved."""
        self._flush_extents()
        source = self._find(event.source)
        start, end = event.offset, event.offset + event.length
        first, shift = event.source_offset, event.offset - event.source_offset
        pieces = list(visible(self._txn, source[0], first, first + event.length)) if source else []
        row = self._map(event.capsule) if pieces else self._find(event.capsule)
        if row is None:
            return
        if start < row[1]:
            self._carve(row, start, end)
        hides = _parent(self._txn, row[0]) != 0
        at = start
        for piece in pieces:
            offset = piece.offset + shift
            if hides and offset > at:
                self._put(row[0], Extent(at, offset - at, 0, 0, b""))
            self._put(row[0], Extent(offset, piece.length, piece.position, piece.skip, piece.frames))
            row[2] += piece.length
            row[3] += _stored(piece.frames)
            at = offset + piece.length
        if hides and at < end:
            self._put(row[0], Extent(at, end - at, 0, 0, b""))
            at = end
        row[1] = max(row[1], at)

    def _deallocated(self, context: Context, event: ev.RangeDeallocated) -> None:
        row = self._find(event.capsule)
        if row is not None:
            self._clear(row, event.offset, min(event.offset + event.length, OFFSET_MAX))

    def _resized(self, context: Context, event: ev.CapsuleResized) -> None:
        row = self._find(event.capsule)
        if row is not None:
            self._clear(row, event.size, OFFSET_MAX)
            if row[1] != OFFSET_MAX:
                row[1] = min(row[1], event.size)

    def _cloned(self, context: Context, event: ev.CapsuleCloned) -> None:
        if event.manifest:
            for node, parts in manifest_nodes(event.manifest):
                self._restore(clone_id(event.capsule, event.source, node.capsule), parts)
            return
        for at in range(0, len(event.members), ID_BYTES):
            member = event.members[at : at + ID_BYTES]
            source = self._find(member)
            if source is not None:
                self._share(source, clone_id(event.capsule, event.source, member))

    def _share(self, source: list[int], copy: bytes) -> None:
        self._flush_extents()
        layer = source[0]
        parent, _, depth = self._layer(layer)
        if depth >= DEPTH_MAX:
            self._flatten(source)
            layer, parent = source[0], 0
        if parent and not any(True for _ in self._txn.scan(EXTENT, layer.to_bytes(8, "big"))):
            base = parent  # the source wrote nothing since it was last cloned: stand beside it
        else:
            base = layer
            source[0] = self._new_layer(base)
            self._release(base)  # the capsule's own reference became the new layer's
            source[1] = 0
        self._maps[copy] = [self._new_layer(base), 0, source[2], source[3]]

    def _flatten(self, row: list[int]) -> None:
        """Gives a capsule one layer of its own with all it can see."""
        seen = list(visible(self._txn, row[0], 0, OFFSET_MAX))
        old = row[0]
        row[0] = self._new_layer(0)
        for extent in seen:
            self._put(row[0], extent)
        row[1] = seen[-1].end if seen else 0
        self._release(old)

    def _restore(self, capsule: bytes, parts: list[list[object]]) -> None:
        row = self._map(capsule)
        for offset, length, skip, position, frames in parts:
            extent = Extent(offset, length, position, skip, frames)  # type: ignore[arg-type]
            self._put(row[0], extent)
            row[1] = max(row[1], extent.end)
            row[2] += extent.length
            row[3] += _stored(extent.frames)

    def _purged(self, context: Context, event: ev.CapsulesPurged) -> None:
        self._flush_extents()
        for at in range(0, len(event.purged), ID_BYTES):
            capsule = event.purged[at : at + ID_BYTES]
            row = self._find(capsule)
            if row is not None:
                self._release(row[0])
                del self._maps[capsule]
                self._txn.delete(MAP, capsule)


def _reaches(row: tuple[bytes, bytes], layer: int, start: int) -> bool:
    """Whether a row is an extent of the layer that ends after ``start``."""
    found, offset = _KEY.unpack(row[0])
    return bool(found == layer and offset + _EXTENT.unpack_from(row[1])[1] > start)


def _stored(frames: bytes) -> int:
    return sum(_U32.unpack_from(frames, at + 4)[0] for at in range(0, len(frames), FRAME_BYTES))
