"""A disk in memory that fails on request: what tests and simulation run the log on.

It keeps two images of every file and directory: what programs see, and what would survive a power
loss.  Faults, all drawn from the random generator passed in, so that one seed replays them:

* :meth:`FaultyDisk.crash`: power loss.  Of what was not synced any part may be lost or kept, down to
  single 512-byte sectors and single names, in any order: POSIX promises no more.
* :meth:`FaultyDisk.kill`: the process dies; written bytes stay, open files do not.
* ``fail_at``: one operation fails with an errno.  A failing write leaves a part behind; after a failing
  fdatasync nothing is dirty any more although only a part was written, as on Linux.
* ``capacity``: writes beyond it fail with ENOSPC, after writing what fits.
* :meth:`FaultyDisk.flip`: a bit rots.
* ``hook``: called before each operation; it may sleep, count, or raise ``OSError``.
"""

from __future__ import annotations

import errno
import io
import itertools
import os
import posixpath
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final, final

from space.wal.disk import Buffer

SECTOR_BYTES: Final = 512
_BLOCK_BYTES: Final = 4096

_Change = tuple[int, bytes | bytearray] | int
"""Bytes at an offset, or a new size: a change to a file that is not durable yet."""


def _error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)


@final
class _Inode:
    """One file: what is seen, what is durable, and the changes between the two, oldest first."""

    def __init__(self, content: bytes = b"") -> None:
        self.seen = bytearray(content)
        self.durable = bytearray(content)
        self.pending: list[_Change] = []
        self.blocks = set(_blocks(0, len(content)))

    def change(self, change: _Change) -> None:
        _apply(self.seen, change)
        self.pending.append(change)

    def settle(self, changes: Iterable[_Change]) -> None:
        """These changes reached the disk, and no other will."""
        for change in changes:
            _apply(self.durable, change)
        self.pending.clear()

    def reload(self) -> None:
        """What is seen is what is durable, plus what is still dirty."""
        self.seen[:] = self.durable
        for change in self.pending:
            _apply(self.seen, change)


def _apply(image: bytearray, change: _Change) -> None:
    if isinstance(change, int):
        del image[change:]
        image.extend(bytes(change - len(image)))
        return
    offset, data = change
    image.extend(bytes(max(offset - len(image), 0)))
    image[offset : offset + len(data)] = data


def _blocks(offset: int, length: int) -> range:
    """Blocks touched by a range."""
    return range(offset // _BLOCK_BYTES, -(-(offset + length) // _BLOCK_BYTES))


def _sectors(change: _Change) -> list[_Change]:
    """The parts of a change that reach the disk independently."""
    if isinstance(change, int):
        return [change]
    offset, data = change
    first = SECTOR_BYTES - offset % SECTOR_BYTES
    cuts = [0, *range(first, len(data), SECTOR_BYTES), len(data)]
    return [(offset + start, data[start:end]) for start, end in itertools.pairwise(cuts)]


def _survivors(changes: list[_Change], rng: random.Random) -> list[_Change]:
    """What of unsynced changes reaches the disk."""
    fate = rng.choice(("none", "all", "prefix", "sectors", "changes"))
    if fate == "none":
        return []
    if fate == "prefix":
        kept = rng.randint(0, len(changes))
        torn = _sectors(changes[kept]) if kept < len(changes) else []
        return changes[:kept] + torn[: rng.randint(0, len(torn))]
    if fate == "sectors":
        return [part for change in changes for part in _sectors(change) if rng.random() < 0.5]
    if fate == "changes":
        return [change for change in changes if rng.random() < 0.5]
    return changes


@final
class _Directory:
    """Names in a directory: as seen, as durable, and the steps between the two."""

    def __init__(self) -> None:
        self.seen: dict[str, _Inode | _Directory] = {}
        self.durable: dict[str, _Inode | _Directory] = {}
        self.pending: list[dict[str, _Inode | _Directory | None]] = []

    def change(self, step: dict[str, _Inode | _Directory | None]) -> None:
        """Names that appear, or with None disappear, together."""
        _rename_all(self.seen, step)
        self.pending.append(step)

    def settle(self, steps: Iterable[dict[str, _Inode | _Directory | None]]) -> None:
        for step in steps:
            _rename_all(self.durable, step)
        self.pending.clear()

    def crash(self, rng: random.Random) -> None:
        kept = rng.randint(0, len(self.pending))
        any_order = rng.random() < 0.5
        self.settle(
            [step for at, step in enumerate(self.pending) if (rng.random() < 0.5 if any_order else at < kept)]
        )
        self.seen = dict(self.durable)
        for entry in self.seen.values():
            if isinstance(entry, _Directory):
                entry.crash(rng)
            else:
                entry.settle(_survivors(entry.pending, rng))
                entry.reload()

    def count_blocks(self) -> int:
        """Blocks of all files below, taken anew: space reserved without sync is as good as not reserved."""
        count = 0
        for entry in self.seen.values():
            if isinstance(entry, _Directory):
                count += entry.count_blocks()
            else:
                entry.blocks = set(_blocks(0, len(entry.seen)))
                count += len(entry.blocks)
        return count


def _rename_all(names: dict[str, _Inode | _Directory], step: dict[str, _Inode | _Directory | None]) -> None:
    for name, entry in step.items():
        if entry is None:
            names.pop(name, None)
        else:
            names[name] = entry


@final
class FaultyFile:
    """:class:`~space.wal.disk.File` of a :class:`FaultyDisk`."""

    def __init__(self, disk: FaultyDisk, inode: _Inode, path: str) -> None:
        self._disk = disk
        self._inode = inode
        self._path = path
        self._life = disk.life
        self._open = True

    def _begin(self, operation: str) -> None:
        self._disk.begin(operation, self._path)
        if not self._open or self._life != self._disk.life:
            raise _error(errno.EBADF, self._path)

    def pread(self, length: int, offset: int) -> bytes:
        self._begin("pread")
        with self._disk.lock:
            return bytes(self._inode.seen[offset : offset + length])

    def preadv(self, buffers: Sequence[bytearray | memoryview], offset: int) -> int:
        self._begin("preadv")
        done = 0
        with self._disk.lock:
            for buffer in buffers:
                view = memoryview(buffer).cast("B")
                data = self._inode.seen[offset + done : offset + done + len(view)]
                view[: len(data)] = data
                done += len(data)
        return done

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        data = b"".join(buffers)
        try:
            self._begin("pwritev")
        except OSError:
            with self._disk.lock:
                if self._life == self._disk.life and self._open:
                    self._inode.change((offset, data[: self._disk.rng.randint(0, len(data))]))
            raise
        with self._disk.lock:
            room = self._reserve(offset, len(data))
            if data:
                self._inode.change((offset, data[:room]))
            if room < len(data):
                raise _error(errno.ENOSPC, self._path)

    def _reserve(self, offset: int, length: int) -> int:
        """Take blocks for a range, as far as there are any; returns how many bytes of it have one."""
        for block in _blocks(offset, length):
            if block not in self._inode.blocks:
                if self._disk.free_bytes("/") < _BLOCK_BYTES:
                    return max(block * _BLOCK_BYTES - offset, 0)
                self._inode.blocks.add(block)
                self._disk.used_bytes += _BLOCK_BYTES
        return length

    def _release(self, blocks: Iterable[int]) -> None:
        given_back = self._inode.blocks.intersection(blocks)
        self._inode.blocks -= given_back
        self._disk.used_bytes -= len(given_back) * _BLOCK_BYTES

    def fdatasync(self) -> None:
        try:
            self._begin("fdatasync")
        except OSError:
            with self._disk.lock:
                self._inode.settle(_survivors(self._inode.pending, self._disk.rng))
            raise
        with self._disk.lock:
            self._inode.settle(self._inode.pending)

    def allocate(self, offset: int, length: int) -> None:
        self._begin("allocate")
        with self._disk.lock:
            if self._reserve(offset, length) < length:
                raise _error(errno.ENOSPC, self._path)
            if offset + length > len(self._inode.seen):
                self._inode.change(offset + length)

    def punch_hole(self, offset: int, length: int) -> None:
        self._begin("punch_hole")
        with self._disk.lock:
            self._zero(offset, length)
            whole = range(-(-offset // _BLOCK_BYTES), (offset + length) // _BLOCK_BYTES)
            self._release(whole)

    def zero_range(self, offset: int, length: int) -> None:
        self._begin("zero_range")
        with self._disk.lock:
            self._zero(offset, length)

    def _zero(self, offset: int, length: int) -> None:
        end = min(offset + length, len(self._inode.seen))
        if offset < end:
            self._inode.change((offset, bytes(end - offset)))

    def truncate(self, size: int) -> None:
        self._begin("truncate")
        with self._disk.lock:
            end = len(self._inode.seen)
            self._inode.change(size)
            self._release(range(-(-size // _BLOCK_BYTES), -(-end // _BLOCK_BYTES)))

    def size(self) -> int:
        self._begin("size")
        return len(self._inode.seen)

    def allocated_bytes(self) -> int:
        self._begin("allocated_bytes")
        return len(self._inode.blocks) * _BLOCK_BYTES

    def drop_cache(self) -> None:
        self._begin("drop_cache")
        with self._disk.lock:
            self._inode.reload()

    def fileno(self) -> int:
        raise io.UnsupportedOperation("a file in memory has no descriptor")

    def close(self) -> None:
        self._open = False


@final
class FaultyDisk:
    """:class:`~space.wal.disk.Disk` in memory.

    Attributes:
        rng: source of every random choice.
        capacity: bytes the disk holds, in blocks of 4 KiB; may be changed at any time.
        fail_at: number of the operation that fails once, counted like ``operations``, or None.
        fail_with: errno it fails with.
        hook: called with the operation's name and path before each one.
        operations: operations begun so far.
    """

    def __init__(self, rng: random.Random | None = None, *, capacity: int = 2**40) -> None:
        self.rng = rng or random.Random(0)
        self.capacity = capacity
        self.fail_at: int | None = None
        self.fail_with = errno.EIO
        self.hook: Callable[[str, str], None] | None = None
        self.operations = 0
        self.used_bytes = 0
        self.life = 0
        self.lock = threading.RLock()
        self._root = _Directory()

    @classmethod
    def from_image(cls, image: dict[str, bytes], rng: random.Random | None = None) -> FaultyDisk:
        """A disk that durably holds these files, and the directories they need."""
        disk = cls(rng)
        for path, content in image.items():
            directory = disk._root
            *parents, name = _split(path)
            for parent in parents:
                entry = directory.seen.setdefault(parent, _Directory())
                directory.durable[parent] = entry
                assert isinstance(entry, _Directory)
                directory = entry
            directory.seen[name] = directory.durable[name] = inode = _Inode(content)
            disk.used_bytes += len(inode.blocks) * _BLOCK_BYTES
        return disk

    def image(self) -> dict[str, bytes]:
        """What every file shows now, by path."""
        found: dict[str, bytes] = {}

        def walk(directory: _Directory, prefix: str) -> None:
            for name, entry in directory.seen.items():
                path = posixpath.join(prefix, name)
                if isinstance(entry, _Directory):
                    walk(entry, path)
                else:
                    found[path] = bytes(entry.seen)

        walk(self._root, "/")
        return found

    def crash(self, rng: random.Random | None = None) -> None:
        """Power loss: open files die, and what was not synced is lost in part or wholly."""
        with self.lock:
            self.life += 1
            self._root.crash(rng or self.rng)
            self.used_bytes = self._root.count_blocks() * _BLOCK_BYTES

    def kill(self) -> None:
        """The process dies: open files die, everything written stays."""
        with self.lock:
            self.life += 1

    def flip(self, path: str, offset: int, bit: int) -> None:
        """Turn one bit of a file over, in what is seen and in what a sync or a crash leaves of it."""
        inode = self._inode(path)
        inode.seen[offset] ^= 1 << bit
        if offset < len(inode.durable):
            inode.durable[offset] ^= 1 << bit
        if inode.pending:
            inode.pending.append((offset, inode.seen[offset : offset + 1]))

    def begin(self, operation: str, path: str) -> None:
        """Count an operation, and fail it if it is its turn."""
        if self.hook is not None:
            self.hook(operation, path)
        with self.lock:
            self.operations += 1
            if self.operations == self.fail_at:
                raise _error(self.fail_with, path)

    def open(self, path: str, *, create: bool = False) -> FaultyFile:
        self.begin("open", path)
        with self.lock:
            directory, name = self._parent(path)
            entry = directory.seen.get(name)
            if entry is None and create:
                entry = _Inode()
                directory.change({name: entry})
            if isinstance(entry, _Inode):
                return FaultyFile(self, entry, path)
            raise _error(errno.ENOENT if entry is None else errno.EISDIR, path)

    def listdir(self, path: str) -> list[str]:
        self.begin("listdir", path)
        return list(self._directory(path).seen)

    def mkdir(self, path: str) -> None:
        self.begin("mkdir", path)
        with self.lock:
            directory, name = self._parent(path)
            if name in directory.seen:
                raise _error(errno.EEXIST, path)
            directory.change({name: _Directory()})

    def rename(self, source: str, target: str) -> None:
        self.begin("rename", source)
        with self.lock:
            directory, old = self._parent(source)
            goal, new = self._parent(target)
            if old not in directory.seen:
                raise _error(errno.ENOENT, source)
            if goal is not directory:
                raise _error(errno.EXDEV, target)
            directory.change({new: directory.seen[old], old: None} if old != new else {})

    def unlink(self, path: str) -> None:
        self.begin("unlink", path)
        with self.lock:
            inode = self._inode(path)
            directory, name = self._parent(path)
            directory.change({name: None})
            self.used_bytes -= len(inode.blocks) * _BLOCK_BYTES

    def exists(self, path: str) -> bool:
        self.begin("exists", path)
        try:
            directory, name = self._parent(path)
        except OSError:
            return False
        return not name or name in directory.seen

    def sync_dir(self, path: str) -> None:
        self.begin("sync_dir", path)
        with self.lock:
            directory = self._directory(path)
            directory.settle(directory.pending)

    def free_bytes(self, path: str) -> int:
        return max(self.capacity - self.used_bytes, 0)

    def _parent(self, path: str) -> tuple[_Directory, str]:
        *parents, name = _split(path) or [""]
        directory = self._root
        for parent in parents:
            entry = directory.seen.get(parent)
            if not isinstance(entry, _Directory):
                raise _error(errno.ENOENT if entry is None else errno.ENOTDIR, path)
            directory = entry
        return directory, name

    def _directory(self, path: str) -> _Directory:
        directory, name = self._parent(path)
        entry = directory.seen.get(name) if name else directory
        if isinstance(entry, _Directory):
            return entry
        raise _error(errno.ENOENT if entry is None else errno.ENOTDIR, path)

    def _inode(self, path: str) -> _Inode:
        directory, name = self._parent(path)
        entry = directory.seen.get(name)
        if isinstance(entry, _Inode):
            return entry
        raise _error(errno.ENOENT if entry is None else errno.EISDIR, path)


def _split(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in {"", "."}]
