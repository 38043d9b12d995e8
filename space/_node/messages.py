"""Messages between a process that has a store open and one that asks it: a length and that much msgpack.

The length is 4 bytes, big-endian.  Names in a tree are bytes; in a message they are text with surrogate escapes.
"""

from __future__ import annotations

import struct
from typing import Any, BinaryIO, Final

import msgpack

from space._errors import UnavailableError, UsageError

REQUEST_BYTES_MAX: Final = 1 << 20  # a policy document and a few paths; more is a mistake or an attack
ANSWER_BYTES_MAX: Final = 64 << 20  # a capsule with very many extended attributes

LENGTH: Final = struct.Struct(">I")

Message = dict[str, Any]


class ProtocolError(Exception):
    """The other side does not speak this protocol."""


class CallerGoneError(UnavailableError):
    """Nobody waits for the answer any more."""


def pack(message: Message, limit: int) -> bytes:
    """A message with its length before it.

    Raises:
        UsageError: it cannot be sent, or is longer than ``limit``.
    """
    try:
        body: bytes = msgpack.packb(message, unicode_errors="surrogateescape")
    except (OverflowError, ValueError, TypeError) as error:
        raise UsageError(f"cannot be sent to the owner of the store: {error}") from None
    if len(body) > limit:
        raise UsageError(f"a message of {len(body)} bytes to or from the owner of the store; at most {limit}")
    return LENGTH.pack(len(body)) + body


def _read(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise ProtocolError
    return data


def unpack(stream: BinaryIO, head: bytes, limit: int) -> Message:
    """The message whose length begins with ``head``."""
    (length,) = LENGTH.unpack(head + _read(stream, LENGTH.size - len(head)))
    if length > limit:
        raise ProtocolError
    return decode(_read(stream, length))


def decode(body: bytes) -> Message:
    """A message without its length."""
    try:
        message = msgpack.unpackb(body, unicode_errors="surrogateescape")
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError from error
    if not isinstance(message, dict):
        raise ProtocolError
    return message
