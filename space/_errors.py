"""Every error users can meet, in one place.

An error says *what failed, on what, why, and what to do next*; the command line prints exactly
that on one line and exits with the code of its kind.  Two questions are answered once, here, for
each kind, so that nobody downstream has to guess:

* **deterministic**: would the same command on the same state fail again on every replica?  Only
  deterministic errors may be remembered in the reply cache.
* **retryable**: may the caller simply try again later?
"""

from __future__ import annotations

import enum
from typing import Any, Final, final


@final
class ErrorKind(enum.Enum):
    """Kind of an error: its process exit status, and whether it is deterministic or retryable."""

    FAILED = ("failed", 1, False, False)
    USAGE = ("usage", 2, True, False)
    NOT_FOUND = ("not-found", 3, True, False)
    CONFLICT = ("conflict", 4, True, False)
    REFUSED = ("refused", 5, True, False)
    CORRUPT = ("corrupt", 6, False, False)
    UNAVAILABLE = ("unavailable", 7, False, True)

    def __init__(self, label: str, exit_status: int, deterministic: bool, retryable: bool) -> None:
        self.label: Final = label
        self.exit_status: Final = exit_status
        self.deterministic: Final = deterministic
        self.retryable: Final = retryable


@final
class Status(enum.Enum):
    """Why an operation on a capsule or tree failed, in no protocol's words.

    Each view has one complete table from here to its own numbers (errno, nfsstat4, NVMe status, gRPC code).
    """

    NOT_FOUND = enum.auto()
    EXISTS = enum.auto()
    NOT_DIRECTORY = enum.auto()
    IS_DIRECTORY = enum.auto()
    NOT_EMPTY = enum.auto()
    INVALID = enum.auto()
    BAD_NAME = enum.auto()
    NAME_TOO_LONG = enum.auto()
    TOO_LARGE = enum.auto()
    TOO_MANY_LINKS = enum.auto()
    NO_ATTRIBUTE = enum.auto()
    NOT_PERMITTED = enum.auto()
    READ_ONLY = enum.auto()
    NO_SPACE = enum.auto()
    STALE = enum.auto()
    UNAVAILABLE = enum.auto()
    CORRUPT = enum.auto()
    IO = enum.auto()


class SpaceError(Exception):
    """Base of every error raised on purpose by this package.

    Attributes:
        kind: the :class:`ErrorKind`; subclasses fix it.
        status: the neutral :class:`Status` views translate; each class has a default.
        hint: what the user can do next, or an empty string.
    """

    kind: ErrorKind = ErrorKind.FAILED
    default_status: Status = Status.IO

    def __init__(self, message: str, *, hint: str = "", status: Status | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.status = status or self.default_status

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} ({self.hint})" if self.hint else message


class UsageError(SpaceError):
    """The request itself is wrong: a bad flag, name, size, moment or combination."""

    kind = ErrorKind.USAGE
    default_status = Status.INVALID


class PolicyFileError(UsageError):
    """A policy document is wrong; the message names the line."""


class NotFoundError(SpaceError):
    """No such capsule, path, snapshot, key or moment."""

    kind = ErrorKind.NOT_FOUND
    default_status = Status.NOT_FOUND


class ConflictError(SpaceError):
    """It exists already, is not empty, is of the wrong kind, or changed meanwhile."""

    kind = ErrorKind.CONFLICT
    default_status = Status.EXISTS


class RefusedError(SpaceError):
    """A policy or the mode of the view (read-only, a past moment) forbids it."""

    kind = ErrorKind.REFUSED
    default_status = Status.READ_ONLY


class UnavailableError(SpaceError):
    """Not available now: directory in use, no leader, no quorum."""

    kind = ErrorKind.UNAVAILABLE
    default_status = Status.UNAVAILABLE


class NotLeaderError(UnavailableError):
    """Only the leader of a group decides, and this node is not it (any more).

    What was handed in may have been carried out all the same: a retry with the same client id and sequence tells.

    Attributes:
        leader: node that is thought to lead, 0 if nobody is known.
    """

    def __init__(
        self, message: str, *, hint: str = "", status: Status | None = None, leader: int = 0
    ) -> None:
        super().__init__(message, hint=hint or "it is tried again at the leader", status=status)
        self.leader = leader


class StorageError(SpaceError):
    """The disk refused: full, or an input/output error.  Nothing was acknowledged."""

    kind = ErrorKind.FAILED


class DiskFullError(StorageError):
    """No space left for the log; earlier commands stand, and it works again once space returns."""

    default_status = Status.NO_SPACE


class CorruptionError(SpaceError):
    """Stored bytes are not what was written.

    Attributes:
        segment: file name of the damaged segment, or of the damaged file.
        offset: byte offset in it, or -1 when it is not one place.
        position: log position of the first damaged record, or -1 when not known.
    """

    kind = ErrorKind.CORRUPT
    default_status = Status.CORRUPT

    def __init__(
        self, message: str, *, segment: str = "", offset: int = -1, position: int = -1, hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.segment = segment
        self.offset = offset
        self.position = position


class EventDecodeError(CorruptionError):
    """Bytes are not an event of this format: the one error decoding garbage raises."""


_REJECTED: Final = {
    Status.NOT_FOUND: NotFoundError,
    Status.NO_ATTRIBUTE: NotFoundError,
    Status.EXISTS: ConflictError,
    Status.NOT_EMPTY: ConflictError,
    Status.NOT_DIRECTORY: ConflictError,
    Status.IS_DIRECTORY: ConflictError,
    Status.STALE: ConflictError,
    Status.TOO_MANY_LINKS: ConflictError,
    Status.READ_ONLY: RefusedError,
    Status.NOT_PERMITTED: RefusedError,
    Status.UNAVAILABLE: UnavailableError,
}


def rejection(status: Status, message: str) -> SpaceError:
    """The error a caller sees for a command that was decided against."""
    return _REJECTED.get(status, UsageError)(message, status=status)


def error_document(error: SpaceError) -> dict[str, Any]:
    """An error as plain data, for another process."""
    document: dict[str, Any] = {
        "kind": type(error).__name__,
        "message": Exception.__str__(error),
        "hint": error.hint,
        "status": error.status.name,
    }
    if isinstance(error, CorruptionError):
        document |= {"segment": error.segment, "offset": error.offset, "position": error.position}
    if isinstance(error, NotLeaderError):
        document["leader"] = error.leader
    return document


def error_of(document: dict[str, Any]) -> SpaceError:
    """The error a document describes, of its own class if this program knows it."""
    found = globals().get(str(document.get("kind")))
    kind = found if isinstance(found, type) and issubclass(found, SpaceError) else SpaceError
    text, hint = str(document.get("message")), str(document.get("hint", ""))
    if issubclass(kind, CorruptionError):
        place = {key: document[key] for key in ("segment", "offset", "position") if key in document}
        return kind(text, hint=hint, **place)
    status = str(document.get("status"))
    made = kind(text, hint=hint, status=Status[status] if status in Status.__members__ else None)
    if isinstance(made, NotLeaderError) and isinstance(document.get("leader"), int):
        made.leader = document["leader"]
    return made
