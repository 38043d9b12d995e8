"""What a volume, a snapshot and a node are here, and who keeps them: no gRPC, no store, no mount.

A :class:`Volumes` is where volumes live; the services turn requests of the specification into its calls.
Everything in it is kept in the log, so every answer is the same after any restart of anybody.

* A volume's id is made once and never again; its *name* (the orchestrator's) leads to it as long as it is there.
* Making is idempotent by name, removing by id, and each is one command: all of it happened, or nothing.
* A snapshot is a clone: it lives as long as it is wanted, whatever becomes of the volume it was taken of.
* The snapshots of a group are of one position of the log: nothing came between any two of them.

A volume is seen through a *transport*: ``fuse`` and ``loop`` on the machine that has the store, ``nfs`` and ``nvme``
(NVMe/TCP) on any that reaches the store's owner.  What a machine needs to know for that is the volume's :class:`Reach`,
which the orchestrator carries to it: such a machine asks nobody else.

Sizes are bytes, times nanoseconds since 1970.  Every method raises :class:`space.SpaceError` with a neutral status.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final, Protocol
from uuid import UUID

import attrs
from blake3 import blake3

DRIVER_NAME: Final = "csi.space-store"
TOPOLOGY_ZONE: Final = f"topology.{DRIVER_NAME}/zone"

EPHEMERAL_ID_PREFIX: Final = "csi-"
"""Of the ids a kubelet draws for inline volumes: those it knows before the volume is made."""


FUSE: Final = "fuse"
NFS: Final = "nfs"
LOOP: Final = "loop"
NVME: Final = "nvme"
TRANSPORT: Final = "transport"
"""The parameter of a class, and the key of both contexts."""

TRANSPORTS: Final = {False: (FUSE, NFS), True: (LOOP, NVME)}
"""Of trees and of block devices; the first one where nobody says."""

NETWORK: Final = frozenset({NFS, NVME})
"""Those that reach other machines."""

NODE_ADDRESS: Final = "@"
"""In the id of a node without a store; then comes the address it has for the owner, or nothing if that is not known."""


def node_address(node: str) -> str | None:
    """The address in the id of a node without a store, perhaps empty; None for one that has the store."""
    _, separator, address = node.partition(NODE_ADDRESS)
    return address if separator else None


def host_uuid(node: str) -> str:
    """The identity of a node as an NVMe host (Host Identifier, and in its NQN): the same wherever it is asked."""
    digest = blake3(node.encode(), derive_key_context="space csi nvme host v1").digest(16)
    return str(UUID(bytes=digest, version=4))


def host_nqn(node: str) -> str:
    """The NVMe Qualified Name of a node as a host (Base Specification 2.0, section 4.5)."""
    return f"nqn.2014-08.org.nvmexpress:uuid:{host_uuid(node)}"


@attrs.frozen
class Reach:
    """How a volume is reached over the network.

    Attributes:
        transport: ``nfs`` or ``nvme``.
        server: ``HOST:PORT``, or several with commas between them: each leads to the same block device, and one of
            them at a time serves trees.
        share: the path of the export; ``nfs`` only.
        nqn, uuid: the subsystem, and which of its namespaces; ``nvme`` only.
    """

    transport: str
    server: str
    share: str = ""
    nqn: str = ""
    uuid: str = ""

    @property
    def servers(self) -> tuple[str, ...]:
        """Each of them."""
        return tuple(self.server.split(","))

    def context(self) -> dict[str, str]:
        """The same for the orchestrator to carry."""
        return {key: value for key, value in attrs.asdict(self).items() if value}


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

    @property
    def transport(self) -> str:
        """How it is seen."""
        return self.parameters.get(TRANSPORT, TRANSPORTS[self.block][0])


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
    """What a volume takes: ``used`` bytes of ``capacity``, and ``files``, if that is known."""

    used: int
    capacity: int
    files: int | None = None


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

    async def publish(self, volume: str, node: str, published: Published) -> Reach | None:
        """Notes that a volume is published on a node; how that reaches it, if over the network.

        Raises:
            RefusedError: its access mode does not allow that beside where it is published already; the node has no
                store and the volume is seen only where that is; nobody serves its transport.
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
    """How a volume is to be seen at a path; ``group`` is who may write besides the owner, or None, and ``options`` are
    those of the NFS client.
    """

    readonly: bool = False
    flags: Sequence[str] = ()
    group: int | None = None
    mode: int = 0
    options: Sequence[str] = ()


class Host(Protocol):
    """The machine volumes are seen on.  Every method may be repeated; each call ends as if it had been the only one."""

    async def stage(self, volume: Volume, path: str, how: Mounting, reach: Reach | None = None) -> None:
        """Makes a volume ready below a path of the orchestrator's; one of the network's as ``reach`` says.

        Raises:
            RefusedError: the kernel has no client for its transport.
            UnavailableError: its server does not answer.
        """

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

    async def seen(self, volume: str, path: str) -> Volume:
        """What this machine itself knows of a volume seen at a path: its kind, transport, and size there.

        Raises:
            NotFoundError: it is not seen there.
        """

    async def usage(self, volume: str, path: str) -> Usage:
        """What the volume takes, as its server tells this machine.

        Raises:
            UnavailableError: the server does not answer.
        """
