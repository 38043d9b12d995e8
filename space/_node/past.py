"""A past moment as a reading: throw-away tables from the nearest checkpoint and the log."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import msgpack

from space._errors import CorruptionError, Status, UsageError
from space._node import history
from space._node.reading import Reading
from space.events.ids import CapsuleId, Moment, parse_moment
from space.events.registry import MANIFEST_BYTES_MAX
from space.projections import content_map
from space.statemachine.apply import tree_nodes
from space.statemachine.tables import Overlay

if TYPE_CHECKING:
    from space._node.store import Store


def manifest(reading: Reading, root: CapsuleId) -> bytes:
    """A capsule or tree as clone events carry it: every node with its rows and extents (docs/formats/events.md).

    Raises:
        UsageError: it is larger than one event may be.
    """
    nodes = []
    size = 0
    with reading._read() as txn:
        for node in tree_nodes(Overlay(txn), root):
            parts = [
                [extent.offset, extent.length, extent.skip, extent.position, extent.frames]
                for extent in content_map.extents(txn, node.capsule, 0, content_map.OFFSET_MAX)
            ]
            packed = msgpack.packb([node.capsule, node.row.encode(), node.entries, node.xattrs, parts])
            size += len(packed)
            if size > MANIFEST_BYTES_MAX - 16:
                raise UsageError(
                    f"a past tree of more than {MANIFEST_BYTES_MAX >> 20} MiB of metadata",
                    hint="clone its parts one by one, or export it",
                    status=Status.TOO_LARGE,
                )
            nodes.append(packed)
    header: bytes = msgpack.Packer().pack_array_header(len(nodes))
    return header + b"".join(nodes)


class Past(Reading):
    """The store right after a moment; read-only, and independent of what happens meanwhile."""

    def __init__(self, store: Store, moment: str | Moment) -> None:
        """Builds the tables.

        Raises:
            NotFoundError: the log does not reach the moment.
            UsageError: not a moment.
        """
        self._store = store
        found = parse_moment(moment, now_ns=store._clock()) if isinstance(moment, str) else moment
        self.target = history.locate(store.wal, found, store.last)
        self.path = store.path
        self._scratch = history.past_directory(store.path)
        tables = history.build(store.path, store.wal, store.views, self._scratch, self.target)
        super().__init__(tables, store._content)

    def _located(self, error: CorruptionError) -> CorruptionError:
        return self._store._located(error)

    def restore(self, position: int) -> bool:
        return self._store.restore(position)

    def close(self) -> None:
        """Removes the tables; closing twice does nothing."""
        if self._scratch.exists():
            self._tables.close(seal=False)
            shutil.rmtree(self._scratch, ignore_errors=True)
