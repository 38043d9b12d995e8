"""The read side of a store: one API for the present and for any past moment.

A :class:`Reading` is a set of tables at a position plus a way to fetch payload from the log.  The live
store is one; a past moment is another, on tables made for it (:mod:`space._node.history`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, Self

import attrs
import msgpack

from space._errors import ConflictError, CorruptionError, NotFoundError, Status, UsageError
from space._node.heat import Heat
from space.content.pipeline import ContentReader
from space.events.ids import ID_BYTES, ROOT, CapsuleId
from space.events.types import Kind
from space.policy.model import DEFAULT_POLICY, Policy
from space.projections import content_map
from space.statemachine.store import Applied, ReadTransaction, Store
from space.statemachine.tables import (
    CAPSULE,
    ENTRY,
    ORPHAN,
    POLICY,
    SNAPSHOT,
    U32,
    U64,
    XATTR,
    CapsuleRow,
    EntryRow,
    SnapshotRow,
    format_digest,
)

SYMLINKS_MAX: Final = 40
READ_BYTES: Final = 1 << 20
_UUID_CHARACTERS: Final = 36


@attrs.frozen
class Stat:
    """Attributes of a capsule at a moment; sizes in bytes, times in nanoseconds since 1970.

    ``allocated`` is the part of ``size`` that is not a hole, ``stored`` what its frames take in the log,
    ``change`` the position of the last event that touched it.
    """

    id: CapsuleId
    kind: Kind
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    allocated: int
    stored: int
    block_size: int
    ino: int
    entries: int
    parent: CapsuleId
    atime: int
    mtime: int
    ctime: int
    btime: int
    change: int
    deleted: int
    target: bytes
    policy: int
    key: int


@attrs.frozen
class Entry:
    """One name in a directory."""

    name: bytes
    id: CapsuleId
    ino: int
    kind: Kind


@attrs.frozen
class SnapshotInfo:
    """A named moment of a capsule or tree."""

    name: str
    id: CapsuleId
    position: int
    event: int
    time_ns: int


@attrs.frozen
class Deleted:
    """A capsule that lost its last name and can still be undeleted."""

    id: CapsuleId
    parent: CapsuleId | None
    name: bytes
    position: int


def split_path(path: str | bytes) -> list[bytes]:
    """The names a path leads through.

    Raises:
        UsageError: a name in it cannot exist.
    """
    # A lone surrogate comes out as bytes that are no UTF-8, and so no name can be.
    raw = path.encode(errors="surrogatepass") if isinstance(path, str) else path
    names = [name for name in raw.split(b"/") if name and name != b"."]
    if len(raw) > 1 << 16:
        raise UsageError(f"a path of {len(raw)} bytes", status=Status.NAME_TOO_LONG)
    return names


class Reading:
    """Everything that can be read at one moment.  Safe to use from several threads.

    ``path`` is the data directory it comes from.
    """

    path: Path
    heat: Heat | None = None
    """Counts reads, where somebody wants to know."""

    def __init__(self, tables: Store, content: ContentReader, root: CapsuleId = ROOT) -> None:
        self._tables = tables
        self._content = content
        self.root = root

    def _read(self) -> AbstractContextManager[ReadTransaction]:
        """A snapshot of the tables."""
        return self._tables.read()

    # --- where it stands -------------------------------------------------------------------------

    def applied(self) -> Applied:
        """Position, chain, digest and time of the last batch this reading includes."""
        with self._read() as txn:
            return txn.applied

    @property
    def position(self) -> int:
        """The last batch this reading includes."""
        return self.applied().position

    def digest(self) -> tuple[int, str]:
        """Position and state digest: equal positions of one log always have equal digests."""
        applied = self.applied()
        return applied.position, format_digest(applied.digest)

    # --- names -----------------------------------------------------------------------------------

    def resolve(self, capsule: str | bytes | CapsuleId, *, follow: bool = True) -> CapsuleId:
        """The id of ``capsule``: an id, a UUID as text, or a path in the tree.

        Raises:
            NotFoundError: there is nothing of that name or id.
        """
        with self._read() as txn:
            return self._resolve(txn, capsule, follow)

    def _resolve(self, txn: ReadTransaction, capsule: str | bytes | CapsuleId, follow: bool) -> CapsuleId:
        if isinstance(capsule, CapsuleId):
            self._row(txn, capsule)
            return capsule
        if isinstance(capsule, str) and len(capsule) == _UUID_CHARACTERS and "/" not in capsule:
            found = CapsuleId.parse(capsule)
            self._row(txn, found)
            return found
        if isinstance(capsule, str) and not capsule.startswith("/"):
            raise UsageError(f"neither an id nor a path: {capsule!r}", hint="a path begins with /")
        names = split_path(capsule)
        return self._walk(txn, names, follow, capsule)

    def _walk(self, txn: ReadTransaction, names: list[bytes], follow: bool, shown: str | bytes) -> CapsuleId:
        at, todo, links = self.root, names[::-1], 0
        trail = [at]
        while todo:
            name = todo.pop()
            if name == b"..":
                if len(trail) > 1:
                    trail.pop()
                at = trail[-1]
                continue
            entry = self._entry(txn, at, name, shown)
            if entry.kind == Kind.SYMLINK and (todo or follow):
                links += 1
                if links > SYMLINKS_MAX:
                    raise ConflictError(f"too many symbolic links in {shown!r}", status=Status.INVALID)
                target = self._row(txn, CapsuleId(entry.capsule)).target
                if target.startswith(b"/"):
                    at, trail = self.root, [self.root]
                todo += [part for part in target.split(b"/") if part and part != b"."][::-1]
                continue
            at = CapsuleId(entry.capsule)
            trail.append(at)
        return at

    def _entry(self, txn: ReadTransaction, parent: CapsuleId, name: bytes, shown: str | bytes) -> EntryRow:
        data = txn.get(ENTRY, parent + name) if len(name) <= 255 else None
        if data is None:
            if self._row(txn, parent).kind != Kind.DIRECTORY:
                raise ConflictError(
                    f"not a directory on the way to {_show(shown)}", status=Status.NOT_DIRECTORY
                )
            raise NotFoundError(f"no such file or directory: {_show(shown)}")
        return EntryRow.decode(data)

    def _row(self, txn: ReadTransaction, capsule: CapsuleId) -> CapsuleRow:
        data = txn.get(CAPSULE, capsule)
        if data is None:
            raise NotFoundError(f"no capsule {capsule}")
        return CapsuleRow.decode(data)

    def lookup(self, parent: CapsuleId, name: bytes) -> CapsuleId:
        """The capsule a directory entry leads to.

        Raises:
            NotFoundError, ConflictError: no such entry; not a directory.
        """
        with self._read() as txn:
            return CapsuleId(self._entry(txn, parent, name, name).capsule)

    def lookup_stat(self, parent: CapsuleId, name: bytes) -> Stat:
        """Attributes of what a directory entry leads to, in one snapshot."""
        with self._read() as txn:
            return self._stat(txn, CapsuleId(self._entry(txn, parent, name, name).capsule))

    def stat(self, capsule: CapsuleId) -> Stat:
        """Attributes of a capsule.

        Raises:
            NotFoundError: it does not exist at this moment.
        """
        with self._read() as txn:
            return self._stat(txn, capsule)

    def _stat(self, txn: ReadTransaction, capsule: CapsuleId) -> Stat:
        row = self._row(txn, capsule)
        mapped = content_map.map_row(txn, capsule) if row.kind == Kind.FILE else None
        return Stat(
            capsule,
            Kind(row.kind),
            row.mode,
            row.nlink,
            row.uid,
            row.gid,
            row.rdev,
            row.size,
            min(mapped.allocated, row.size) if mapped else 0,
            mapped.stored if mapped else 0,
            row.block_size,
            row.ino,
            row.entries,
            CapsuleId(row.parent),
            row.atime,
            row.mtime,
            row.ctime,
            row.btime,
            row.change,
            row.deleted,
            row.target,
            row.policy,
            row.key,
        )

    def entries(self, directory: CapsuleId, *, after: bytes = b"", limit: int = 0) -> list[Entry]:
        """Names in a directory, in byte order, beginning after ``after``; at most ``limit`` if it is not 0.

        Raises:
            NotFoundError, ConflictError: it does not exist; it is not a directory.
        """
        found = []
        with self._read() as txn:
            if self._row(txn, directory).kind != Kind.DIRECTORY:
                raise ConflictError(f"not a directory: {directory}", status=Status.NOT_DIRECTORY)
            start = directory + after + b"\0" if after else b""
            for key, value in txn.scan(ENTRY, directory, start):
                row = EntryRow.decode(value)
                found.append(Entry(key[ID_BYTES:], CapsuleId(row.capsule), row.ino, Kind(row.kind)))
                if limit and len(found) >= limit:
                    break
        return found

    def entries_stat(
        self, directory: CapsuleId, *, after: bytes = b"", limit: int = 0
    ) -> list[tuple[bytes, Stat]]:
        """Like :meth:`entries`, with the attributes of each in the same snapshot."""
        found = []
        with self._read() as txn:
            if self._row(txn, directory).kind != Kind.DIRECTORY:
                raise ConflictError(f"not a directory: {directory}", status=Status.NOT_DIRECTORY)
            start = directory + after + b"\0" if after else b""
            for key, value in txn.scan(ENTRY, directory, start):
                found.append((key[ID_BYTES:], self._stat(txn, CapsuleId(value[:ID_BYTES]))))
                if limit and len(found) >= limit:
                    break
        return found

    def walk(self, capsule: CapsuleId, path: bytes = b"") -> Iterator[tuple[bytes, Stat]]:
        """A capsule and everything below it, parents first, with paths relative to it."""
        # not recursive: a tree may be deeper than Python's stack
        levels: list[Iterator[tuple[bytes, Stat]]] = [iter([(path, self.stat(capsule))])]
        while levels:
            found = next(levels[-1], None)
            if found is None:
                levels.pop()
                continue
            yield found
            if found[1].kind == Kind.DIRECTORY:
                levels.append(self._children(found[1].id, found[0]))

    def _children(self, directory: CapsuleId, path: bytes) -> Iterator[tuple[bytes, Stat]]:
        after = b""
        while page := self.entries(directory, after=after, limit=1024):
            for entry in page:
                yield path + b"/" + entry.name if path else entry.name, self.stat(entry.id)
            after = page[-1].name

    def paths_of(self, capsule: CapsuleId) -> list[bytes]:
        """Every path that leads to a capsule (a full look through the names; a directory is quick)."""
        with self._read() as txn:
            names = []
            row = self._row(txn, capsule)
            if capsule == self.root:
                return [b"/"]
            if row.nlink == 0:
                return []
            prefix = row.parent if row.kind == Kind.DIRECTORY or row.nlink == 1 else b""
            for scope in dict.fromkeys((prefix, b"")):
                names = [key for key, value in txn.scan(ENTRY, scope) if value[:ID_BYTES] == capsule]
                if names:
                    break
            return [self._path(txn, key[:ID_BYTES]) + key[ID_BYTES:] for key in names]

    def _path(self, txn: ReadTransaction, directory: bytes) -> bytes:
        names: list[bytes] = []
        while directory != self.root:
            parent = self._row(txn, CapsuleId(directory)).parent
            name = next(
                (key for key, value in txn.scan(ENTRY, parent) if value[:ID_BYTES] == directory), None
            )
            if name is None:
                return b"(deleted)/" + b"".join(reversed(names))
            names.append(name[ID_BYTES:] + b"/")
            directory = parent
        return b"/" + b"".join(reversed(names))

    # --- attributes ------------------------------------------------------------------------------

    def readlink(self, capsule: CapsuleId) -> bytes:
        """Target of a symbolic link."""
        with self._read() as txn:
            row = self._row(txn, capsule)
        if row.kind != Kind.SYMLINK:
            raise ConflictError(f"not a symbolic link: {capsule}", status=Status.INVALID)
        return row.target

    def xattrs(self, capsule: CapsuleId) -> dict[bytes, bytes]:
        """Extended attributes of a capsule."""
        with self._read() as txn:
            self._row(txn, capsule)
            return {key[ID_BYTES:]: value for key, value in txn.scan(XATTR, capsule)}

    def xattr(self, capsule: CapsuleId, name: bytes) -> bytes:
        """One extended attribute.

        Raises:
            NotFoundError: it is not set (status NO_ATTRIBUTE).
        """
        with self._read() as txn:
            value = txn.get(XATTR, capsule + name) if 0 < len(name) <= 255 else None
        if value is None:
            raise NotFoundError(f"no attribute {name!r}", status=Status.NO_ATTRIBUTE)
        return value

    def policy(self, capsule: CapsuleId) -> Policy:
        """The policy a capsule follows."""
        with self._read() as txn:
            return self._policy(txn, self._row(txn, capsule).policy)

    def _policy(self, txn: ReadTransaction, number: int) -> Policy:
        if number == 0:
            return DEFAULT_POLICY
        data = txn.get(POLICY, U32.pack(number))
        if data is None:
            raise CorruptionError(f"policy {number} is missing from the state", hint="run: space replay")
        return Policy.from_document(msgpack.unpackb(data))

    def snapshots(self) -> list[SnapshotInfo]:
        """All snapshots, by name."""
        with self._read() as txn:
            found = [(key.decode(), SnapshotRow.decode(value)) for key, value in txn.scan(SNAPSHOT, b"")]
        return [SnapshotInfo(n, CapsuleId(r.capsule), r.position, r.event, r.time_ns) for n, r in found]

    def deleted(self) -> list[Deleted]:
        """Capsules that can be undeleted, oldest name first."""
        found = []
        with self._read() as txn:
            for key, value in txn.scan(ORPHAN, b""):
                parent, name, position = key[:ID_BYTES], key[ID_BYTES:-8], U64.unpack(key[-8:])[0]
                home = CapsuleId(parent) if any(parent) else None
                found.append(Deleted(CapsuleId(value), home, name if home else b"", position))
        return found

    def unnamed(self) -> list[Stat]:
        """Capsules that have no name and are not deleted: what ``put`` without a name made."""
        with self._read() as txn:
            rows = [(key, CapsuleRow.decode(value)) for key, value in txn.scan(CAPSULE, b"")]
            return [self._stat(txn, CapsuleId(key)) for key, row in rows if not row.nlink and not row.deleted]

    # --- content ---------------------------------------------------------------------------------

    def read(self, capsule: CapsuleId, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of a capsule; shorter than asked at its end.

        Raises:
            NotFoundError: it does not exist.
            CorruptionError: stored bytes are damaged.
        """
        with self._read() as txn:
            size = self._size(txn, capsule)
            end = size if length is None else min(size, offset + length)
            return self._assemble(txn, capsule, offset, end)

    def stream(
        self, capsule: CapsuleId, offset: int = 0, length: int | None = None, *, chunk: int = READ_BYTES
    ) -> Iterator[bytes]:
        """Bytes of a capsule in pieces, all as of one position, in bounded memory."""
        with self._read() as txn:
            size = self._size(txn, capsule)
            end = size if length is None else min(size, offset + length)
            for start in range(offset, end, chunk):
                yield self._assemble(txn, capsule, start, min(start + chunk, end))

    def get(self, capsule: str | bytes | CapsuleId, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of a capsule named by id or path (symbolic links are followed), whole unless a range is given.

        Raises:
            NotFoundError, ConflictError: there is none; it is not a file.
            CorruptionError: stored bytes are damaged.
        """
        if offset < 0 or (length is not None and length < 0):
            raise UsageError(f"not a range: offset {offset}, length {length}")
        return self.read(self.resolve(capsule), offset, length)

    def ls(self, path: str | bytes | CapsuleId = "/") -> list[Entry]:
        """Names in a directory, in byte order."""
        return self.entries(self.resolve(path))

    def data_ranges(self, capsule: CapsuleId, offset: int = 0) -> Iterator[tuple[int, int]]:
        """``(start, end)`` of what is not a hole, from ``offset`` on, merged."""
        with self._read() as txn:
            size = self._size(txn, capsule)
            start = end = -1
            for extent in content_map.extents(txn, capsule, offset, max(0, size - offset)):
                if extent.offset != end:
                    if end > start:
                        yield start, min(end, size)
                    start = extent.offset
                end = extent.end
            if end > start:
                yield start, min(end, size)

    def _size(self, txn: ReadTransaction, capsule: CapsuleId) -> int:
        row = self._row(txn, capsule)
        if row.kind != Kind.FILE:
            status = Status.IS_DIRECTORY if row.kind == Kind.DIRECTORY else Status.INVALID
            raise ConflictError(f"not a file: {capsule}", status=status)
        return row.size

    def _assemble(self, txn: ReadTransaction, capsule: CapsuleId, start: int, end: int) -> bytes:
        if end <= start:
            return b""
        if self.heat is not None:
            self.heat.read(capsule)
        whole = content_map.covering(txn, capsule, start, end - start)
        if whole is not None:
            return self._extent(whole)
        pieces: list[bytes] = []
        at = start
        for extent in content_map.extents(txn, capsule, start, end - start):
            if extent.offset > at:
                pieces.append(bytes(extent.offset - at))
            pieces.append(self._extent(extent))
            at = extent.end
        if at < end:
            pieces.append(bytes(end - at))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _extent(self, extent: content_map.Extent) -> bytes:
        """The bytes of an extent; damaged ones are fetched from somewhere else, if they can be."""
        read = self._content.read
        try:
            return read(extent.frames, extent.position, extent.skip, extent.length)
        except CorruptionError as error:
            located = self._located(error)
            if not self.restore(error.position):
                raise located from None
            return read(extent.frames, extent.position, extent.skip, extent.length)

    def restore(self, position: int) -> bool:
        """Whether damaged payload of a batch could be fetched from somewhere else, and is whole again."""
        return False

    def _located(self, error: CorruptionError) -> CorruptionError:
        """Damaged content, known by batch and payload offset, with the segment and the offset in it."""
        return error

    def close(self) -> None:
        """Gives back what the reading holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _show(path: str | bytes) -> str:
    return path if isinstance(path, str) else path.decode(errors="backslashreplace")
