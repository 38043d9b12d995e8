"""``space``: an event-sourced storage library.

Every mutation of a capsule is an event in a write-ahead log; state and views are folds of that log,
disposable and rebuilt at will, at any past moment too.

>>> import space, tempfile
>>> with tempfile.TemporaryDirectory() as directory, space.open(directory) as store:
...     capsule = store.put(b"hello", name="/hello.txt")
...     store.get(capsule.id)
b'hello'

:mod:`space.aio` is the same, awaitable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from space._errors import (
    ConflictError,
    CorruptionError,
    DiskFullError,
    ErrorKind,
    EventDecodeError,
    NotFoundError,
    PolicyFileError,
    RefusedError,
    SpaceError,
    Status,
    StorageError,
    UnavailableError,
    UsageError,
)

if TYPE_CHECKING:
    from pathlib import Path

    from space._node.store import Store

__all__ = [
    "ConflictError",
    "CorruptionError",
    "DiskFullError",
    "ErrorKind",
    "EventDecodeError",
    "NotFoundError",
    "PolicyFileError",
    "RefusedError",
    "SpaceError",
    "Status",
    "StorageError",
    "UnavailableError",
    "UsageError",
    "open",
]


def open(path: str | Path, **options: Any) -> Store:
    """Opens the store in a directory, creating it unless ``create=False``.

    Options are those of :class:`space._node.store.Store`.

    Raises:
        UnavailableError: another process has it open.
        NotFoundError: there is none and ``create`` is false.
        CorruptionError: its log is damaged.
        StorageError: the disk refuses.
    """
    from space._node.store import Store

    return Store(path, **options)
