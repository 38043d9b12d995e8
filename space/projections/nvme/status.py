"""NVMe status values, and the one table from neutral statuses to them.

A value is the status code type and the status code together, as bits 10:0 of the status field (Base Specification 2.0,
section 3.3.3.2.1).  More and Do Not Retry are added where a completion is made.
"""

from __future__ import annotations

import enum
from typing import Final

from space._errors import SpaceError, Status

DNR: Final = 0x4000
"""Do Not Retry: the same command would fail again."""


class NvmeStatus(enum.IntEnum):
    """Values this controller reports: generic 0xx, command specific 1xx, media 2xx, path 3xx."""

    SUCCESS = 0x000
    INVALID_OPCODE = 0x001
    INVALID_FIELD = 0x002
    COMMAND_ID_CONFLICT = 0x003
    INTERNAL_ERROR = 0x006
    ABORT_REQUESTED = 0x007
    FUSED_FAILED = 0x009
    FUSED_MISSING = 0x00A
    INVALID_NAMESPACE = 0x00B
    COMMAND_SEQUENCE_ERROR = 0x00C
    SGL_LENGTH_INVALID = 0x00F
    SGL_TYPE_INVALID = 0x011
    OPERATION_DENIED = 0x015
    SGL_OFFSET_INVALID = 0x016
    HOST_ID_INCONSISTENT = 0x018
    WRITE_PROTECTED = 0x020
    COMMAND_INTERRUPTED = 0x021
    TRANSIENT_TRANSPORT_ERROR = 0x022
    INVALID_COMMAND_SET = 0x02C
    LBA_OUT_OF_RANGE = 0x080
    CAPACITY_EXCEEDED = 0x081
    RESERVATION_CONFLICT = 0x083
    EVENT_REQUESTS_EXCEEDED = 0x105
    INVALID_LOG_PAGE = 0x109
    FEATURE_NOT_SAVEABLE = 0x10D
    FEATURE_NOT_CHANGEABLE = 0x10E
    FEATURE_NOT_PER_NAMESPACE = 0x10F
    CONNECT_FORMAT = 0x180
    CONNECT_BUSY = 0x181
    CONNECT_INVALID = 0x182
    CONNECT_HOST = 0x184
    AUTHENTICATION_REQUIRED = 0x191
    SIZE_LIMIT_EXCEEDED = (
        0x183  # of Copy; the same number as Connect's "restart discovery", which is never sent
    )
    UNRECOVERED_READ = 0x281
    COMPARE_FAILURE = 0x285
    INTERNAL_PATH_ERROR = 0x300
    ANA_PERSISTENT_LOSS = 0x301
    ANA_INACCESSIBLE = 0x302
    ANA_TRANSITION = 0x303


NVME: Final[dict[Status, NvmeStatus]] = {
    Status.NOT_FOUND: NvmeStatus.INVALID_NAMESPACE,
    Status.EXISTS: NvmeStatus.COMMAND_INTERRUPTED,
    Status.NOT_DIRECTORY: NvmeStatus.INVALID_FIELD,
    Status.IS_DIRECTORY: NvmeStatus.INVALID_FIELD,
    Status.NOT_EMPTY: NvmeStatus.INVALID_FIELD,
    Status.INVALID: NvmeStatus.INVALID_FIELD,
    Status.BAD_NAME: NvmeStatus.INVALID_FIELD,
    Status.NAME_TOO_LONG: NvmeStatus.INVALID_FIELD,
    Status.TOO_LARGE: NvmeStatus.LBA_OUT_OF_RANGE,
    Status.TOO_MANY_LINKS: NvmeStatus.INVALID_FIELD,
    Status.NO_ATTRIBUTE: NvmeStatus.INVALID_FIELD,
    Status.NOT_PERMITTED: NvmeStatus.OPERATION_DENIED,
    Status.READ_ONLY: NvmeStatus.WRITE_PROTECTED,
    Status.NO_SPACE: NvmeStatus.CAPACITY_EXCEEDED,
    Status.STALE: NvmeStatus.INVALID_NAMESPACE,
    Status.UNAVAILABLE: NvmeStatus.INTERNAL_PATH_ERROR,
    Status.CORRUPT: NvmeStatus.UNRECOVERED_READ,
    Status.IO: NvmeStatus.INTERNAL_ERROR,
}
"""What a block device may answer.

EXISTS is a change that came between reading and writing: worth a retry.  UNAVAILABLE (no leader, no quorum) is an error
of this path, so that a host with several tries another one instead of failing the file system.
"""

_RETRY: Final = frozenset({Status.EXISTS, Status.UNAVAILABLE})


class CommandError(Exception):
    """A command ends with a status other than success.

    Attributes:
        status: what the host is told, with :data:`DNR` unless a retry may help.
        result: dwords 0 and 1 of the completion.
        location: offset of the field in error in the command, for the error log; 0xFFFF for none.
    """

    def __init__(
        self, status: NvmeStatus, *, retry: bool = False, result: int = 0, location: int = 0xFFFF
    ) -> None:
        super().__init__(status.name)
        self.status = status if retry else status | DNR
        self.result = result
        self.location = location


def status_of(error: SpaceError) -> int:
    """The status field for an error of the device."""
    return NVME[error.status] if error.status in _RETRY else NVME[error.status] | DNR
