"""The Node service: volumes seen on this machine.  What that takes is the :class:`~space.projections.csi.model.Host`'s.

A node that has the store asks its owner about volumes.  One that has not asks nobody: what it needs to know of a volume
is in the contexts that the orchestrator carries from the controller, and later in the host's notes.

Calls for one volume wait for each other; those for different volumes do not.
"""

from __future__ import annotations

import asyncio
from typing import Final

import attrs

from space._errors import RefusedError, Status, UnavailableError, UsageError
from space.policy.units import parse_size
from space.projections.csi import check
from space.projections.csi.model import (
    EPHEMERAL_ID_PREFIX,
    TOPOLOGY_ZONE,
    Host,
    Node,
    Usage,
    Volume,
    Volumes,
    Wanted,
)
from space.projections.csi.pb import csi_pb2 as pb

EPHEMERAL: Final = f"{check.ORCHESTRATOR_PREFIX}ephemeral"
SIZE: Final = "size"

_RPC: Final = pb.NodeServiceCapability.RPC
CAPABILITIES: Final = (
    _RPC.STAGE_UNSTAGE_VOLUME,
    _RPC.GET_VOLUME_STATS,
    _RPC.EXPAND_VOLUME,
    _RPC.VOLUME_CONDITION,
    _RPC.SINGLE_NODE_MULTI_WRITER,
    _RPC.VOLUME_MOUNT_GROUP,
)


class NodeService:
    """Volumes on one node."""

    def __init__(self, volumes: Volumes | None, host: Host, node: Node) -> None:
        """``volumes`` is None where there is no store."""
        self._volumes = volumes
        self._host = host
        self._node = node
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    async def node_get_capabilities(
        self, request: pb.NodeGetCapabilitiesRequest
    ) -> pb.NodeGetCapabilitiesResponse:
        """What of the service there is: all of it."""
        found = [pb.NodeServiceCapability(rpc=_RPC(type=each)) for each in CAPABILITIES]
        return pb.NodeGetCapabilitiesResponse(capabilities=found)

    async def node_get_info(self, request: pb.NodeGetInfoRequest) -> pb.NodeGetInfoResponse:
        """Which node this is; from now on volumes can be published on it."""
        if self._volumes is not None:
            await self._volumes.register(self._node)
        return pb.NodeGetInfoResponse(
            node_id=self._node.id,
            max_volumes_per_node=self._node.limit,
            accessible_topology=pb.Topology(segments={TOPOLOGY_ZONE: self._node.zone}),
        )

    # --- staging ---------------------------------------------------------------------------------

    async def node_stage_volume(self, request: pb.NodeStageVolumeRequest) -> pb.NodeStageVolumeResponse:
        """Makes a volume ready here."""
        check.mapping(request.secrets, "secrets")
        check.required(request.volume_id, "volume_id")
        path = check.path(request.staging_target_path, "staging_target_path")
        wanted = check.capability(request.volume_capability)
        async with self._alone(request.volume_id):
            volume = await self._volume(request)
            check.fits(volume, wanted)
            await self._host.stage(
                volume, path, wanted.mounting(), check.reach(request.publish_context, volume)
            )
        return pb.NodeStageVolumeResponse()

    async def _volume(self, request: pb.NodeStageVolumeRequest | pb.NodePublishVolumeRequest) -> Volume:
        """The volume of a request.

        Raises:
            NotFoundError: there is none.
            RefusedError: it is seen only where the store is, and that is not here.
        """
        volume = check.known_id(request.volume_id, "volume")
        if self._volumes is None:
            return check.told(volume, request.volume_context)
        return await self._volumes.volume(volume)

    async def _seen(self, volume: str, path: str) -> Volume:
        """A volume that is asked about by where it is seen."""
        known = check.known_id(volume, "volume")
        if self._volumes is None:
            return await self._host.seen(known, path)
        return await self._volumes.volume(known)

    async def node_unstage_volume(self, request: pb.NodeUnstageVolumeRequest) -> pb.NodeUnstageVolumeResponse:
        """Takes that back, also of a volume that is gone."""
        check.required(request.volume_id, "volume_id")
        path = check.path(request.staging_target_path, "staging_target_path")
        async with self._alone(request.volume_id):
            await self._host.unstage(request.volume_id, path)
        return pb.NodeUnstageVolumeResponse()

    # --- publishing ------------------------------------------------------------------------------

    async def node_publish_volume(self, request: pb.NodePublishVolumeRequest) -> pb.NodePublishVolumeResponse:
        """Shows a volume to a workload."""
        check.mapping(request.secrets, "secrets")
        check.required(request.volume_id, "volume_id")
        target = check.path(request.target_path, "target_path")
        wanted = check.capability(request.volume_capability)
        how = wanted.mounting(readonly=request.readonly)
        async with self._alone(request.volume_id):
            if request.volume_context.get(EPHEMERAL) == "true":
                volume, staging = await self._inline(request, wanted), ""
            else:
                if not request.staging_target_path:
                    raise RefusedError("staging_target_path is missing: the volume has to be staged first")
                staging = check.path(request.staging_target_path, "staging_target_path")
                volume = await self._volume(request)
            check.fits(volume, wanted)
            await self._host.publish(volume, staging, target, how)
        return pb.NodePublishVolumeResponse()

    async def _inline(self, request: pb.NodePublishVolumeRequest, wanted: check.Capability) -> Volume:
        """The volume a pod has of its own, made now and gone with the pod."""
        if wanted.block:
            raise UsageError("an inline volume is a tree")
        if self._volumes is None:
            raise RefusedError(
                "an inline volume is made where the store is; this node has none",
                hint="use a claim: a generic ephemeral volume does",
                status=Status.NOT_PERMITTED,
            )
        context = check.mapping(request.volume_context, "volume_context")
        own = {k: v for k, v in context.items() if not k.startswith(check.ORCHESTRATOR_PREFIX)}
        size = parse_size(own.pop(SIZE, str(check.DEFAULT_BYTES)))
        found = check.parameters(own, field="volume_context")
        volume = check.ephemeral_id(request.volume_id)
        return await self._volumes.create(
            Wanted(volume, size, 0, block=False, zone=self._node.zone, id=volume, parameters=found)
        )

    async def node_unpublish_volume(
        self, request: pb.NodeUnpublishVolumeRequest
    ) -> pb.NodeUnpublishVolumeResponse:
        """Takes it away again; a pod's own volume goes with it."""
        check.required(request.volume_id, "volume_id")
        target = check.path(request.target_path, "target_path")
        async with self._alone(request.volume_id):
            await self._host.unpublish(request.volume_id, target)
            inline = check.is_id(request.volume_id) and request.volume_id.startswith(EPHEMERAL_ID_PREFIX)
            if inline and self._volumes is not None:
                await self._volumes.delete(request.volume_id)
        return pb.NodeUnpublishVolumeResponse()

    # --- looking and growing ---------------------------------------------------------------------

    async def node_get_volume_stats(
        self, request: pb.NodeGetVolumeStatsRequest
    ) -> pb.NodeGetVolumeStatsResponse:
        """What a volume takes, from the store's own accounts, and whether it can be used where it is published.

        A node without the store asks the volume's server, which has the same accounts; one that does not answer is
        what is wrong with the volume.
        """
        check.required(request.volume_id, "volume_id")
        path = check.seen_path(request.volume_path, "volume_path")
        volume = await self._seen(request.volume_id, path)
        wrong = await self._host.condition(volume.id, path)
        found = []
        try:
            if self._volumes is None:
                usage = await self._host.usage(volume.id, path)
            else:
                usage = await self._volumes.usage(volume.id)
            found = _usage_messages(volume, usage)
        except UnavailableError as error:
            if self._volumes is not None:
                raise
            wrong = wrong or str(error)
        condition = pb.VolumeCondition(abnormal=bool(wrong), message=wrong or "in use")
        return pb.NodeGetVolumeStatsResponse(usage=found, volume_condition=condition)

    async def node_expand_volume(self, request: pb.NodeExpandVolumeRequest) -> pb.NodeExpandVolumeResponse:
        """Lets a device be seen at the size its volume has by now."""
        check.mapping(request.secrets, "secrets")
        check.required(request.volume_id, "volume_id")
        path = check.seen_path(request.volume_path, "volume_path")
        if request.HasField("volume_capability"):
            check.capability(request.volume_capability)
        async with self._alone(request.volume_id):
            volume = await self._seen(request.volume_id, path)
            await self._host.condition(volume.id, path)
            if request.HasField("capacity_range"):
                capacity, limit = check.capacity(request.capacity_range, block=volume.block)
                if self._volumes is None:
                    volume = attrs.evolve(volume, capacity=max(volume.capacity, capacity))
                else:
                    volume = await self._volumes.expand(volume.id, capacity, limit)
            await self._host.expand(volume, path)
        return pb.NodeExpandVolumeResponse(capacity_bytes=volume.capacity)

    # --- one after the other ---------------------------------------------------------------------

    def _alone(self, volume: str) -> _Turn:
        return _Turn(self._locks, volume)


def _usage_messages(volume: Volume, usage: Usage) -> list[pb.VolumeUsage]:
    found = [
        pb.VolumeUsage(
            unit=pb.VolumeUsage.BYTES,
            total=usage.capacity,
            used=usage.used,
            available=max(0, usage.capacity - usage.used),
        )
    ]
    if not volume.block and usage.files is not None:
        found.append(pb.VolumeUsage(unit=pb.VolumeUsage.INODES, used=usage.files))
    return found


class _Turn:
    """The only call for a volume while it lasts; a lock nobody waits for is forgotten."""

    def __init__(self, locks: dict[str, tuple[asyncio.Lock, int]], volume: str) -> None:
        self._locks = locks
        self._volume = volume

    async def __aenter__(self) -> None:
        lock, users = self._locks.get(self._volume, (asyncio.Lock(), 0))
        self._locks[self._volume] = lock, users + 1
        try:
            await lock.acquire()
        except BaseException:
            self._leave()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._locks[self._volume][0].release()
        self._leave()

    def _leave(self) -> None:
        lock, users = self._locks.pop(self._volume)
        if users > 1:
            self._locks[self._volume] = lock, users - 1
