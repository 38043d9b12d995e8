"""The file that holds the master keys of a store: how it is found, read, and replaced without ever being half written.

A line for each master key, oldest first (or 32 raw bytes, for one).  While the master key is changed, the old one and
the new one are both there; which one wraps by now the log says.

A file that is replaced is overwritten before it is let go of.  Until that is done it has a second name, so that a
process killed in between leaves nothing behind that the next one does not find.  What a file system or a device keeps
of overwritten blocks by itself (copies on write, journals of data, wear levelling) is beyond a program's reach.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import attrs

from space._errors import RefusedError, Status
from space.content.keys import load_master_keys

MASTER_KEY_FILE: Final = "master.key"
MASTER_KEY_ENVIRONMENT: Final = "SPACE_MASTER_KEY_FILE"

FILES: Final = threading.RLock()
"""Held from reading a file to replacing it: shards may share one, and other nodes have it changed."""

_NEW: Final = ".new"
_OLD: Final = ".old"


@attrs.frozen
class MasterFile:
    """Where a store's master keys are.

    Attributes:
        path: the file.
        shared: whether other stores may use it: one that the environment names.
    """

    path: Path
    shared: bool

    @classmethod
    def of(cls, directory: Path) -> MasterFile:
        """The file the environment names, else the one in the data directory."""
        configured = os.environ.get(MASTER_KEY_ENVIRONMENT)
        if configured:
            return cls(Path(configured), True)
        return cls(directory / MASTER_KEY_FILE, False)

    def load(self) -> tuple[bytes, ...]:
        """The master keys, oldest first; none where the store never needed one.

        Raises:
            SpaceError: the file cannot be used; or it does not exist, though the environment names it.
        """
        if not self.shared and not self.path.exists():
            return ()
        return load_master_keys(self.path)

    def create(self, key: bytes) -> None:
        """Makes the file, with its first key.

        Raises:
            FileExistsError: it is there.
        """
        _write(self.path, (key,))

    def replace(self, keys: Sequence[bytes]) -> None:
        """Lets the file have these keys, oldest first; whatever else was in it is overwritten, and durably gone.

        Raises:
            RefusedError: the file cannot be replaced; it is as it was.
        """
        new, old = self.path.with_name(self.path.name + _NEW), self.path.with_name(self.path.name + _OLD)
        try:
            self.clear()
            new.unlink(missing_ok=True)
            _write(new, keys)
            os.link(self.path, old)
            new.rename(self.path)
            _sync(self.path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            raise RefusedError(
                f"master key file {self.path} cannot be changed: {error.strerror or error}",
                hint="add a line of 64 random hexadecimal digits to it, on every node, and run space key rotate again",
                status=Status.NOT_PERMITTED,
            ) from None
        self.clear()

    def clear(self) -> None:
        """Overwrites and removes what a replacement left behind."""
        old = self.path.with_name(self.path.name + _OLD)
        with contextlib.suppress(FileNotFoundError):
            if not os.path.samefile(old, self.path):  # else it was not replaced yet
                with old.open("r+b") as file:
                    file.write(bytes(os.fstat(file.fileno()).st_size))
                    file.flush()
                    os.fsync(file.fileno())
            old.unlink()
            _sync(old.parent)


def _write(path: Path, keys: Sequence[bytes]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(b"".join(key.hex().encode() + b"\n" for key in keys))
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
