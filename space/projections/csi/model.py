"""What a volume, a snapshot and a node are here, and who keeps them: no gRPC, no store, no mount.

A :class:`Volumes` is where volumes live; the services turn requests of the specification into its calls.
Everything in it is kept in the log, so every answer is the same after any restart of anybody.

* A volume's id is made once and never again; its *name* (the orchestrator's) leads to it as long as it is there.
* Making is idempotent by name, removing by id, and each is one command: all of it happened, or nothing.
* A snapshot is a clone: it lives as long as it is wanted, whatever becomes of the volume it was taken of.
* The snapshots of a group are of one position of the log: nothing came between any two of them.

Sizes are bytes, times nanoseconds since 1970.  Every method raises :class:`space.SpaceError` with a neutral status.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final, Protocol

import attrs

DRIVER_NAME: Final = "csi.space-store"
TOPOLOGY_ZONE: Final = f"topology.{DRIVER_NAME}/zone"

EPHEMERAL_ID_PREFIX: Final = "csi-"
"""Of the ids a kubelet draws for inline volumes: those it knows before the volume is made."""


@attrs.frozen
class Published:
    """How a volume is published on a node; ``mode`` is the specification's number of the access mode."""

    readonly: bool
    mode: int


@attrs.frozen
class Volume:
    """A volume.

    Attributes:
        block: it is one block device, else a tree.
        source: ``snapshot/ID`` or ``volume/ID`` of what it began as; empty for nothing.
        moment: of which moment of the source, where it was not the present one.
        parameters: those it was made with, without the orchestrator's own.
        mutable: those that were changed last.
        published: by node.
    """

    id: str
    name: str
    capacity: int
    block: bool
    created_ns: int
    source: str = ""
    moment: str = ""
    zone: str = ""
    ephemeral: bool = False
    parameters: Mapping[str, str] = attrs.field(factory=dict)
    mutable: Mapping[str, str] = attrs.field(factory=dict)
    published: Mapping[str, Published] = attrs.field(factory=dict)


@attrs.frozen
class Snapshot:
    """A snapshot of a volume of ``size`` bytes; ``group`` is the id of the group it was taken in, or empty."""

    id: str
    name: str
    volume: str
    size: int
    block: bool
    created_ns: int
    group: str = ""


@attrs.frozen
class Group:
    """Snapshots taken of several volumes at one position of the log."""

    id: str
    name: str
    created_ns: int
    snapshots: Sequence[Snapshot]


@attrs.frozen
class Node:
    """A node volumes can be published on; at most ``limit`` of them, or any number where it is 0."""

    id: str
    zone: str
    limit: int


@attrs.frozen
class Usage:
    """What a volume takes: ``used`` bytes of ``capacity``, and ``files``."""

    used: int
    capacity: int
    files: int


@attrs.frozen
class Wanted:
    """A volume to be made: see :class:`Volume`; ``limit`` is the largest it may be, or 0."""

    name: str
    capacity: int
    limit: int
    block: bool
    source: str = ""
    moment: str = ""
    zone: str = ""
    id: str = ""
    parameters: Mapping[str, str] = attrs.field(factory=dict)
    mutable: Mapping[str, str] = attrs.field(factory=dict)


class Volumes(Protocol):
    """Where volumes live."""

    async def create(self, wanted: Wanted) -> Volume:
        """Makes a volume, or finds the one of that name.

        Raises:
            ConflictError: the name is that of another kind of volume.
            NotFoundError: the source is not there.
        """

    async def delete(self, volume: str) -> None:
        """Removes a volume; one that is not there is no error.

        Raises:
            RefusedError: it is published.
        """

    async def volume(self, volume: str) -> Volume:
        """A volume."""

    async def volumes(self, after: str, limit: int) -> Sequence[Volume]:
        """Volumes in order of their ids, after one of them."""

    async def publish(self, volume: str, node: str, published: Published) -> None:
        """Notes that a volume is published on a node.

        Raises:
            RefusedError: its access mode does not allow that beside where it is published already.
            ConflictError: it is published there in another way.
            NotFoundError: there is no such volume or node.
        """

    async def unpublish(self, volume: str, node: str) -> None:
        """Notes that it is not any more; without a node, on none."""

    async def expand(self, volume: str, capacity: int, limit: int) -> Volume:
        """Makes a volume at least so large; it never shrinks."""

    async def modify(self, volume: str, mutable: Mapping[str, str]) -> None:
        """Lets a volume follow another policy."""

    async def room(self) -> int:
        """Bytes there is room for."""

    async def usage(self, volume: str) -> Usage:
        """What a volume takes."""

    async def snapshot(self, volume: str, name: str) -> Snapshot:
        """Takes a snapshot, or finds the one of that name."""

    async def delete_snapshot(self, snapshot: str) -> None:
        """Removes a snapshot; one that is not there is no error."""

    async def find_snapshot(self, snapshot: str) -> Snapshot:
        """A snapshot."""

    async def snapshots(self, after: str, limit: int, volume: str) -> Sequence[Snapshot]:
        """Snapshots (of one volume, if one is named) in order of their ids, after one of them."""

    async def snapshot_group(self, name: str, volumes: Sequence[str]) -> Group:
        """Takes snapshots of several volumes at one position, or finds the group of that name."""

    async def group(self, group: str) -> Group:
        """A group."""

    async def delete_group(self, group: str) -> None:
        """Removes a group with its snapshots; one that is not there is no error."""

    def allocated(self, snapshot: str, offset: int) -> AsyncIterator[tuple[int, int]]:
        """Ranges (offset, length) of a block snapshot that hold something, from ``offset`` on."""

    def changed(self, base: str, target: str, offset: int) -> AsyncIterator[tuple[int, int]]:
        """Ranges (offset, length) that may differ between two snapshots of a block volume."""

    async def register(self, node: Node) -> None:
        """Notes a node."""


@attrs.frozen
class Mounting:
    """How a volume is to be seen at a path; ``group`` is who may write besides the owner, or None."""

    readonly: bool = False
    flags: Sequence[str] = ()
    group: int | None = None
    mode: int = 0


class Host(Protocol):
    """The machine volumes are seen on.  Every method may be repeated; each call ends as if it had been the only one."""

    async def stage(self, volume: Volume, path: str, how: Mounting) -> None:
        """Makes a volume ready below a path of the orchestrator's."""

    async def unstage(self, volume: str, path: str) -> None:
        """Takes that back; what is not there is no error."""

    async def publish(self, volume: Volume, staging: str, target: str, how: Mounting) -> None:
        """Shows a volume at a path: a directory, or a device node."""

    async def unpublish(self, volume: str, target: str) -> None:
        """Takes a path away."""

    async def condition(self, volume: str, path: str) -> str:
        """What is wrong with a volume as seen at a path; empty if nothing is.

        Raises:
            NotFoundError: it is not seen there.
        """

    async def expand(self, volume: Volume, path: str) -> None:
        """Lets a volume be seen at its new size."""
