"""The limit of the runtime: a target that speaks the same PDUs on the same event loop, and does nothing.

Reads are answered with constant bytes, writes with success, everything else with a result that a host takes for a
ready controller.  It looks at no more of a command than it must to answer, and keeps nothing.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Coroutine
from typing import Any, Final, cast

_HEADER: Final = struct.Struct("<BBBBI")
_COMMAND: Final = struct.Struct("<8xBxH28xI3xB24x")
_DATA: Final = struct.Struct("<BBBBI HHII4x")
_RESPONSE: Final = struct.Struct("<BBBBI QHHHH")
_IC: Final = struct.Struct("<BBBBI HBBI112x")
_READ: Final = 0x02
_TRANSPORT: Final = 0x5A
_BUFFER: Final = 256 << 10
_TRANSFER_MAX: Final = 1 << 20
_JOIN_MAX: Final = 4 << 10

_CONSTANT: Final = bytes(range(256)) * (_TRANSFER_MAX // 256)


class Echo(asyncio.BufferedProtocol):
    """One connection."""

    def __init__(self) -> None:
        self._view = memoryview(bytearray(_BUFFER))
        self._end = self._skip = 0
        self._after = 0
        self._out: list[bytes | memoryview] = []
        self._out_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        view = self._view
        end, at = self._end + nbytes, 0
        while True:
            if self._skip:
                count = min(self._skip, end - at)
                self._skip -= count
                at += count
                if self._skip:
                    break
                self._put(_RESPONSE.pack(5, 0, 24, 0, 24, 0, 0, 0, self._after, 0))
            if end - at < 8:
                break
            kind, _, hlen, _, plen = _HEADER.unpack_from(view, at)
            if end - at < hlen:
                break
            if kind == 4:
                self._command(view, at, plen)
            elif kind == 6:
                self._after = _DATA.unpack_from(view, at)[5]
                self._skip = plen - hlen
            else:
                self._put(_IC.pack(1, 0, 128, 0, 128, 0, 0, 0, _TRANSFER_MAX))
            at += hlen
        view[: end - at] = view[at:end]
        self._end = end - at
        self._flush()

    def _command(self, view: memoryview, at: int, plen: int) -> None:
        opcode, cid, length, kind = _COMMAND.unpack_from(view, at)
        if opcode == _READ:
            self._put(_DATA.pack(7, 4, 24, 24, 24 + length, cid, 0, 0, length))
            self._put(memoryview(_CONSTANT)[:length])
        elif kind == _TRANSPORT and length:
            self._put(_DATA.pack(9, 0, 24, 0, 24, cid, cid + 1, 0, length))
            return
        elif plen > 72:
            self._after, self._skip = cid, plen - 72
            return
        self._put(_RESPONSE.pack(5, 0, 24, 0, 24, 1, 0, 0, cid, 0))

    def _put(self, piece: bytes | memoryview) -> None:
        self._out.append(piece)
        self._out_bytes += len(piece)

    def _flush(self) -> None:
        if not self._out:
            return
        if self._out_bytes < len(self._out) * _JOIN_MAX:
            self._transport.write(b"".join(self._out))
        else:
            self._transport.writelines(self._out)
        self._out, self._out_bytes = [], 0


async def serve() -> None:
    """Serves at a free port of the loopback, which is printed, until the process is ended."""
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def run(main: Coroutine[Any, Any, None]) -> None:
    """On the loop the view runs on."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


if __name__ == "__main__":
    run(serve())
