"""External data representation (RFC 4506), as far as NFSv4 needs it: a bounded reader and an append-only writer.

Written by hand because one COMPOUND has dozens of small fields: a generated codec costs tens of microseconds for what
takes one here.  The reader never reads past the request and never makes an object larger than the limit its caller
names; the writer keeps large data in pieces of their own, so that bytes read from a file are not copied again.
"""

from __future__ import annotations

import struct
from typing import Any, Final

Bytes = bytes | bytearray | memoryview

_U32: Final = struct.Struct(">I")
_I32: Final = struct.Struct(">i")
_TWO: Final = struct.Struct(">II")
_U64: Final = struct.Struct(">Q")
_I64: Final = struct.Struct(">q")
_PADDING: Final = (b"", b"\0\0\0", b"\0\0", b"\0")

BITMAP_WORDS_MAX: Final = 8
"""Attribute bitmaps have three words today (attributes 0 to 95); more than eight is nobody's."""

BULK_BYTES: Final = 8192
"""From this size on, opaque data is a piece of its own in a reply."""


class XdrError(Exception):
    """Bytes are not what the protocol says must be there."""


class Reader:
    """Takes values off a request, one after the other.

    Every method raises XdrError where the bytes end too early or break a limit.
    """

    __slots__ = ("_data", "_end", "at")

    def __init__(self, data: Bytes, at: int = 0) -> None:
        self._data = memoryview(data)
        self._end = len(data)
        self.at = at

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return self._end - self.at

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """Several values of fixed lengths at once; opaque ones among them need no padding."""
        try:
            values = layout.unpack_from(self._data, self.at)
        except struct.error:
            raise XdrError("the request ends inside a number") from None
        self.at += layout.size
        return values

    def rest(self) -> memoryview:
        """All that was not read yet."""
        return self._data[self.at :]

    def u32(self) -> int:
        try:
            (value,) = _U32.unpack_from(self._data, self.at)
        except struct.error:
            raise XdrError("the request ends inside a number") from None
        self.at += 4
        return int(value)

    def i32(self) -> int:
        try:
            (value,) = _I32.unpack_from(self._data, self.at)
        except struct.error:
            raise XdrError("the request ends inside a number") from None
        self.at += 4
        return int(value)

    def u64(self) -> int:
        try:
            (value,) = _U64.unpack_from(self._data, self.at)
        except struct.error:
            raise XdrError("the request ends inside a number") from None
        self.at += 8
        return int(value)

    def i64(self) -> int:
        try:
            (value,) = _I64.unpack_from(self._data, self.at)
        except struct.error:
            raise XdrError("the request ends inside a number") from None
        self.at += 8
        return int(value)

    def boolean(self) -> bool:
        """A boolean; any other number than 0 and 1 is an error (RFC 4506 §4.4)."""
        value = self.u32()
        if value > 1:
            raise XdrError(f"a boolean of {value}")
        return value == 1

    def view(self, length: int) -> memoryview:
        """``length`` bytes and their padding; the view lives as long as the request."""
        start = self.at
        end = start + length
        after = end + (-length & 3)
        if length < 0 or after > self._end:
            raise XdrError("the request ends inside opaque data")
        self.at = after
        return self._data[start:end]

    def fixed(self, length: int) -> bytes:
        """Opaque data of a fixed length."""
        return bytes(self.view(length))

    def opaque_view(self, limit: int) -> memoryview:
        """Opaque data of at most ``limit`` bytes, not copied."""
        length = self.u32()
        if length > limit:
            raise XdrError(f"opaque data of {length} bytes where {limit} are the most")
        return self.view(length)

    def opaque(self, limit: int) -> bytes:
        """Opaque data, or a string, of at most ``limit`` bytes."""
        return bytes(self.opaque_view(limit))

    def count(self, limit: int) -> int:
        """Length of an array of at most ``limit`` elements."""
        value = self.u32()
        if value > limit:
            raise XdrError(f"an array of {value} elements where {limit} are the most")
        return value

    def bitmap(self) -> int:
        """A bitmap4 as one number: bit N is attribute (or flag) N."""
        value = 0
        for word in range(self.count(BITMAP_WORDS_MAX)):
            value |= self.u32() << (32 * word)
        return value


class Writer:
    """Appends values to a reply; what came after a mark can be taken back."""

    __slots__ = ("_pieces", "_settled", "_tail")

    def __init__(self) -> None:
        self._pieces: list[Bytes] = []  # complete, in order, before the tail
        self._settled = 0  # bytes in them
        self._tail = bytearray()

    def __len__(self) -> int:
        return self._settled + len(self._tail)

    def u32(self, value: int) -> None:
        self._tail += _U32.pack(value)

    def i32(self, value: int) -> None:
        self._tail += _I32.pack(value)

    def u64(self, value: int) -> None:
        self._tail += _U64.pack(value)

    def i64(self, value: int) -> None:
        self._tail += _I64.pack(value)

    def boolean(self, value: bool) -> None:
        self._tail += b"\0\0\0\1" if value else b"\0\0\0\0"

    def raw(self, data: Bytes) -> None:
        """Bytes that are XDR already."""
        self._tail += data

    def fixed(self, data: Bytes) -> None:
        """Opaque data of a length both sides know."""
        self._tail += data
        self._tail += _PADDING[len(data) & 3]

    def opaque(self, data: Bytes) -> None:
        """Opaque data or a string, with its length; large data is kept as it is and must not change."""
        length = len(data)
        self._tail += _U32.pack(length)
        if length < BULK_BYTES:
            self._tail += data
        else:
            self._pieces += (self._tail, data)
            self._settled += len(self._tail) + length
            self._tail = bytearray()
        self._tail += _PADDING[length & 3]

    def bitmap(self, value: int) -> None:
        """A bitmap4: as many words as its highest bit needs."""
        words = (value.bit_length() + 31) // 32
        self._tail += _U32.pack(words)
        for word in range(words):
            self._tail += _U32.pack(value >> (32 * word) & 0xFFFFFFFF)

    def reserve(self) -> Mark:
        """Room for one number that is known later: see :meth:`fill`."""
        mark = self.mark()
        self._tail += b"\0\0\0\0"
        return mark

    def begin(self, number: int) -> tuple[Mark, Mark]:
        """A number, and room for one that is known later: where that is, and what follows it."""
        tail = self._tail
        tail += _TWO.pack(number, 0)
        pieces, end, settled = len(self._pieces), len(tail), self._settled
        return (pieces, end - 4, settled), (pieces, end, settled)

    def fill(self, mark: Mark, value: int) -> None:
        """Puts a number where room was reserved."""
        pieces, at, _ = mark
        target = self._pieces[pieces] if pieces < len(self._pieces) else self._tail
        assert isinstance(target, bytearray)
        _U32.pack_into(target, at, value)

    def mark(self) -> Mark:
        """A place to come back to: here."""
        return (len(self._pieces), len(self._tail), self._settled)

    def since(self, mark: Mark) -> int:
        """Bytes written after a mark."""
        return len(self) - mark[2] - mark[1]

    def truncate(self, mark: Mark) -> None:
        """Takes back everything after a mark."""
        pieces, at, settled = mark
        if pieces < len(self._pieces):
            tail = self._pieces[pieces]
            assert isinstance(tail, bytearray)
            self._tail = tail
            del self._pieces[pieces:]
            self._settled = settled
        del self._tail[at:]

    def pieces(self) -> list[Bytes]:
        """All that was written, in pieces."""
        return [*self._pieces, self._tail] if self._pieces else [self._tail]

    def bytes(self) -> bytes:
        """All that was written, as one."""
        return b"".join(self.pieces())


Mark = tuple[int, int, int]
