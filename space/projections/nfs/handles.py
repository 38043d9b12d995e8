"""Filehandles: persistent (RFC 8881 §4.2.3), the same after a restart and on every node that serves the export.

::

    0        1         4            12           28            36
    version  reserved  export u64   capsule id   code (8 bytes)

The code is a keyed BLAKE3 of what stands before it.  Without it a client that may use one subtree could name
any capsule of the store, the root directory first of all, whose id everybody knows.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from blake3 import blake3

from space.events.ids import CapsuleId
from space.projections.nfs.compound import NfsError
from space.projections.nfs.exports import Node
from space.projections.nfs.nfs4 import NfsStatus

if TYPE_CHECKING:
    from space.projections.nfs.exports import Exports

VERSION: Final = 1
_HANDLE: Final = struct.Struct(">B3xQ16s")
_CODE_BYTES: Final = 8
HANDLE_BYTES: Final = _HANDLE.size + _CODE_BYTES
KNOWN_MAX: Final = 65_536
"""Handles that are remembered, of each export and of all together: about 20 MiB."""


def encode(node: Node) -> bytes:
    """The handle of a node."""
    export = node.export
    found = export.handles.get(node.id)
    if found is None:
        head = _HANDLE.pack(VERSION, export.number, node.id)
        found = head + _code(export.key, head)
        if len(export.handles) >= KNOWN_MAX:
            export.handles.clear()
        export.handles[node.id] = found
    return found


def decode(exports: Exports, handle: bytes) -> Node:
    """The node of a handle.

    Raises:
        NfsError: BADHANDLE: it is none of ours; STALE: of an export that is not served any more.
    """
    found = exports.nodes.get(handle)
    if found is None:
        found = _decode(exports, handle)
        if len(exports.nodes) >= KNOWN_MAX:
            exports.nodes.clear()
        exports.nodes[handle] = found
    return found


def _decode(exports: Exports, handle: bytes) -> Node:
    head = handle[: _HANDLE.size]
    if len(handle) != HANDLE_BYTES or handle[_HANDLE.size :] != _code(exports.key, head):
        raise NfsError(NfsStatus.BADHANDLE)
    version, number, capsule = _HANDLE.unpack(head)
    if version != VERSION:
        raise NfsError(NfsStatus.BADHANDLE)
    export = exports.export(number)
    if export is None:
        raise NfsError(NfsStatus.STALE)
    return Node(export, CapsuleId(capsule))


def _code(key: bytes, head: bytes) -> bytes:
    return blake3(head, key=key).digest(_CODE_BYTES)
