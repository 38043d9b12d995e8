"""The whole disk, behind two small Protocols: the only place that opens, writes, syncs or renames.

:class:`RealDisk` is the machine's; :class:`~space.wal.faulty_disk.FaultyDisk` keeps files in memory and
loses, tears and refuses on request.  One contract suite runs against both.

Rules every implementation keeps: a method does all that was asked or raises ``OSError``; a failed write
may have left a part behind; written bytes are visible to readers at once; they survive a power loss
only after ``fdatasync``, and names only after ``sync_dir`` of their directory.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from typing import Final, Protocol, final

Buffer = bytes | bytearray | memoryview

_IOV_MAX: Final = 1024  # Linux refuses longer vectors
_FALLOC_KEEP_SIZE: Final = 0x01
_FALLOC_PUNCH_HOLE: Final = 0x02
_FALLOC_ZERO_RANGE: Final = 0x10
_ZEROS: Final = bytes(2**20)
_UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.ENOSYS)


class File(Protocol):
    """An open file.  Safe to use from many threads, as long as writers do not overlap."""

    def pread(self, length: int, offset: int) -> bytes:
        """Up to ``length`` bytes; fewer only at the end of the file."""

    def preadv(self, buffers: Sequence[bytearray | memoryview], offset: int) -> int:
        """Fill buffers in order; returns the bytes read, fewer only at the end of the file."""

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all buffers one after the other; extends the file if needed."""

    def fdatasync(self) -> None:
        """Make content and size durable.  After a failure, what reached the disk is unknown."""

    def allocate(self, offset: int, length: int) -> None:
        """Reserve space, so that writing there cannot meet a full disk; extends the file with zeros."""

    def punch_hole(self, offset: int, length: int) -> None:
        """Give whole blocks back to the disk; they read as zeros and the size stays.

        Raises ``OSError`` (EOPNOTSUPP) where the file system cannot.
        """

    def zero_range(self, offset: int, length: int) -> None:
        """Make a range read as zeros; space stays reserved where the file system can do that."""

    def truncate(self, size: int) -> None:
        """Set the size."""

    def size(self) -> int:
        """Size in bytes."""

    def allocated_bytes(self) -> int:
        """Bytes the file takes on the disk, holes not counted."""

    def drop_cache(self) -> None:
        """Forget clean cached bytes, so that the next read shows what the disk holds."""

    def fileno(self) -> int:
        """Descriptor for ``sendfile``; raises ``io.UnsupportedOperation`` where there is none."""

    def close(self) -> None:
        """Close; the file must not be used afterwards.  Closing twice is allowed."""


class Disk(Protocol):
    """A namespace of files.  Paths are absolute or relative POSIX paths."""

    def open(self, path: str, *, create: bool = False) -> File:
        """Open for reading and writing, or only reading where writing is not permitted.

        Raises ``FileNotFoundError`` if it does not exist and ``create`` is false.
        """

    def listdir(self, path: str) -> list[str]:
        """Names in a directory, in any order."""

    def mkdir(self, path: str) -> None:
        """Make a directory; its parent must exist.  Raises ``FileExistsError`` if it exists."""

    def rename(self, source: str, target: str) -> None:
        """Rename a file, replacing the target."""

    def unlink(self, path: str) -> None:
        """Remove a file."""

    def exists(self, path: str) -> bool:
        """Whether a file or directory has this name."""

    def sync_dir(self, path: str) -> None:
        """Make the names in a directory durable."""

    def free_bytes(self, path: str) -> int:
        """Bytes an ordinary user may still write on the disk that holds ``path``."""


_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with a mode, which the ``os`` module does not offer."""
    while _libc.fallocate(descriptor, mode, offset, length):
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))


@final
class RealFile:
    """:class:`File` on a file descriptor, which is closed with the last reference at the latest."""

    def __init__(self, descriptor: int) -> None:
        self._fd = descriptor

    def pread(self, length: int, offset: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        if len(data) == length or not data:
            return data
        parts = [data]  # a signal or a limit of the kernel may shorten one read
        done = len(data)
        while done < length and (data := os.pread(self._fd, length - done, offset + done)):
            parts.append(data)
            done += len(data)
        return b"".join(parts)

    def preadv(self, buffers: Sequence[bytearray | memoryview], offset: int) -> int:
        rest = [view for view in map(_bytes_view, buffers) if view]
        done = 0
        while rest and (count := os.preadv(self._fd, rest[:_IOV_MAX], offset + done)):
            done += count
            rest = _skip(rest, count)
        return done

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        rest: Sequence[Buffer] = buffers
        while rest:
            part = rest[:_IOV_MAX]
            count = os.pwritev(self._fd, part, offset)
            offset += count
            rest = _skip([_bytes_view(buffer) for buffer in part], count) + list(rest[_IOV_MAX:])

    def fdatasync(self) -> None:
        os.fdatasync(self._fd)

    def allocate(self, offset: int, length: int) -> None:
        os.posix_fallocate(self._fd, offset, length)

    def punch_hole(self, offset: int, length: int) -> None:
        _fallocate(self._fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset, length)

    def zero_range(self, offset: int, length: int) -> None:
        try:
            _fallocate(self._fd, _FALLOC_ZERO_RANGE | _FALLOC_KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            for at in range(offset, offset + length, len(_ZEROS)):
                self.pwritev([_ZEROS[: offset + length - at]], at)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def allocated_bytes(self) -> int:
        return os.fstat(self._fd).st_blocks * 512  # POSIX counts blocks of 512 whatever the disk

    def drop_cache(self) -> None:
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        descriptor, self._fd = self._fd, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        # A reader in another thread may hold the last reference when the log lets a file go.
        self.close()


def _bytes_view(buffer: Buffer) -> memoryview:
    return memoryview(buffer).cast("B")


def _skip(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of buffers after ``count`` bytes of them are done."""
    for position, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[position + 1 :]]
        count -= len(view)
    return []


@final
class RealDisk:
    """:class:`Disk` of this machine."""

    def open(self, path: str, *, create: bool = False) -> RealFile:
        flags = os.O_CLOEXEC | (os.O_CREAT if create else 0)
        try:
            return RealFile(os.open(path, os.O_RDWR | flags, 0o600))
        except OSError as error:
            if create or error.errno not in {errno.EACCES, errno.EPERM, errno.EROFS}:
                raise
            return RealFile(os.open(path, os.O_RDONLY | flags))

    def listdir(self, path: str) -> list[str]:
        return os.listdir(path)

    def mkdir(self, path: str) -> None:
        os.mkdir(path, 0o700)

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def sync_dir(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def free_bytes(self, path: str) -> int:
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize
