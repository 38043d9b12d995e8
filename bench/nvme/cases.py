"""What is asked of every NVMe target, and the capsules it is asked of."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import attrs

from space._node.store import Store
from space.events.types import Kind

BLOCK: Final = 4096


@attrs.frozen
class Case:
    """A load: an operation of :mod:`bench.nvme.client`, bytes of a command, commands outstanding."""

    name: str
    operation: str
    size: int
    depth: int


CASES: Final = (
    Case("128 KiB sequential write, depth 16", "write", 128 << 10, 16),
    Case("128 KiB sequential read, depth 16", "read", 128 << 10, 16),
    Case("4 KiB random read, depth 1", "randread", 4096, 1),
    Case("4 KiB random read, depth 32", "randread", 4096, 32),
    Case("4 KiB random write, depth 1", "randwrite", 4096, 1),
    Case("4 KiB random write, depth 32", "randwrite", 4096, 32),
)
"""In this order each round reads what was written in one go; what was written at random is read in as many pieces."""


def make(home: str, size: int, block: int) -> int:
    """A store with one block device, ``/device``, that holds nothing yet."""
    with Store(Path(home)) as store:
        store.create(Kind.FILE, parent=store.root, name=b"device", size=size, block_size=block)
    return size
