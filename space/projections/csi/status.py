"""From neutral statuses to gRPC codes: the one table, complete."""

from __future__ import annotations

from typing import Final

import grpc

from space._errors import SpaceError, Status

CODES: Final[dict[Status, grpc.StatusCode]] = {
    Status.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Status.EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    Status.NOT_DIRECTORY: grpc.StatusCode.INVALID_ARGUMENT,
    Status.IS_DIRECTORY: grpc.StatusCode.INVALID_ARGUMENT,
    Status.NOT_EMPTY: grpc.StatusCode.FAILED_PRECONDITION,
    Status.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Status.BAD_NAME: grpc.StatusCode.INVALID_ARGUMENT,
    Status.NAME_TOO_LONG: grpc.StatusCode.INVALID_ARGUMENT,
    Status.TOO_LARGE: grpc.StatusCode.OUT_OF_RANGE,
    Status.TOO_MANY_LINKS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Status.NO_ATTRIBUTE: grpc.StatusCode.NOT_FOUND,
    Status.NOT_PERMITTED: grpc.StatusCode.FAILED_PRECONDITION,
    Status.READ_ONLY: grpc.StatusCode.FAILED_PRECONDITION,
    Status.NO_SPACE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Status.STALE: grpc.StatusCode.ABORTED,
    Status.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Status.CORRUPT: grpc.StatusCode.DATA_LOSS,
    Status.IO: grpc.StatusCode.INTERNAL,
}


def code_of(error: BaseException) -> grpc.StatusCode:
    """The code for an error; what nobody foresaw is INTERNAL."""
    return CODES[error.status] if isinstance(error, SpaceError) else grpc.StatusCode.INTERNAL
