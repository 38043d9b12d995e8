"""The one table from neutral statuses to nfsstat4 (RFC 8881 §15.1)."""

from __future__ import annotations

import logging
from typing import Final

from space._errors import SpaceError, Status
from space.projections.nfs.nfs4 import NfsStatus

NFS: Final[dict[Status, NfsStatus]] = {
    Status.NOT_FOUND: NfsStatus.NOENT,
    Status.EXISTS: NfsStatus.EXIST,
    Status.NOT_DIRECTORY: NfsStatus.NOTDIR,
    Status.IS_DIRECTORY: NfsStatus.ISDIR,
    Status.NOT_EMPTY: NfsStatus.NOTEMPTY,
    Status.INVALID: NfsStatus.INVAL,
    Status.BAD_NAME: NfsStatus.BADNAME,
    Status.NAME_TOO_LONG: NfsStatus.NAMETOOLONG,
    Status.TOO_LARGE: NfsStatus.FBIG,
    Status.TOO_MANY_LINKS: NfsStatus.MLINK,
    Status.NO_ATTRIBUTE: NfsStatus.NOXATTR,
    Status.NOT_PERMITTED: NfsStatus.PERM,
    Status.READ_ONLY: NfsStatus.ROFS,
    Status.NO_SPACE: NfsStatus.NOSPC,
    Status.STALE: NfsStatus.STALE,
    Status.UNAVAILABLE: NfsStatus.DELAY,
    Status.CORRUPT: NfsStatus.IO,
    Status.IO: NfsStatus.IO,
}
"""What a file system may answer.  UNAVAILABLE (no leader, no quorum) passes: the client asks again after a while."""

_LOUD: Final = frozenset({Status.CORRUPT, Status.IO, Status.UNAVAILABLE})

log: Final = logging.getLogger("space.nfs")


def status_of(error: SpaceError) -> NfsStatus:
    """What a client is told of an error; what is wrong on this side is logged too."""
    if error.status in _LOUD:
        log.error("%s", error)
    return NFS[error.status]
