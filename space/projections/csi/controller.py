"""The Controller service: volumes and snapshots made, found and removed.  No I/O of its own.

Idempotency is the model's (:mod:`space.projections.csi.model`); here requests are checked and answers put into the
specification's words.  A class's parameters are a policy's keys, ``moment`` (with ``source-volume`` where the claim
itself names no source): a volume as another one was at that moment, and ``transport``: how it is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.wrappers_pb2 import Int64Value

from space._errors import NotFoundError, SpaceError, Status, UsageError
from space.projections.csi import check
from space.projections.csi.model import (
    NETWORK,
    TOPOLOGY_ZONE,
    TRANSPORT,
    Snapshot,
    Volume,
    Volumes,
    Wanted,
)
from space.projections.csi.pb import csi_pb2 as pb

_RPC: Final = pb.ControllerServiceCapability.RPC
CAPABILITIES: Final = (
    _RPC.CREATE_DELETE_VOLUME,
    _RPC.PUBLISH_UNPUBLISH_VOLUME,
    _RPC.LIST_VOLUMES,
    _RPC.GET_CAPACITY,
    _RPC.CREATE_DELETE_SNAPSHOT,
    _RPC.LIST_SNAPSHOTS,
    _RPC.CLONE_VOLUME,
    _RPC.PUBLISH_READONLY,
    _RPC.EXPAND_VOLUME,
    _RPC.LIST_VOLUMES_PUBLISHED_NODES,
    _RPC.VOLUME_CONDITION,
    _RPC.GET_VOLUME,
    _RPC.SINGLE_NODE_MULTI_WRITER,
    _RPC.MODIFY_VOLUME,
    _RPC.GET_SNAPSHOT,
)


class Controller:
    """Volumes in one zone, except for those that are reached over the network: they are in none."""

    def __init__(self, volumes: Volumes, *, zone: str) -> None:
        self._volumes = volumes
        self._zone = zone

    async def controller_get_capabilities(
        self, request: pb.ControllerGetCapabilitiesRequest
    ) -> pb.ControllerGetCapabilitiesResponse:
        """What of the service there is: all of it."""
        found = [pb.ControllerServiceCapability(rpc=_RPC(type=each)) for each in CAPABILITIES]
        return pb.ControllerGetCapabilitiesResponse(capabilities=found)

    # --- volumes ---------------------------------------------------------------------------------

    async def create_volume(self, request: pb.CreateVolumeRequest) -> pb.CreateVolumeResponse:
        """Makes a volume: empty, or as a snapshot or another volume is or was."""
        check.mapping(request.secrets, "secrets")
        name = check.required(request.name, "name")
        wanted = check.capabilities(request.volume_capabilities)
        block = wanted[0].block
        capacity, limit = check.capacity(request.capacity_range, block=block)
        parameters = check.parameters(request.parameters)
        mutable = check.parameters(request.mutable_parameters, field="mutable_parameters")
        transport = check.transport(parameters, block=block)
        for each in wanted:
            check.check_options(transport, each)
        here = transport not in NETWORK
        if here and not self._reaches(request.accessibility_requirements):
            # RESOURCE_EXHAUSTED says: another topology may do
            raise UsageError(f"volumes are reached in zone {self._zone} only", status=Status.NO_SPACE)
        source = await self._source(request.volume_content_source, parameters)
        if not request.capacity_range.required_bytes and source:
            capacity = max(capacity, await self._size_of(source)) if not limit else capacity
        made = await self._volumes.create(
            Wanted(
                name,
                capacity,
                limit,
                block,
                source,
                parameters.get("moment", ""),
                self._zone if here else "",
                parameters=parameters,
                mutable=mutable,
            )
        )
        return pb.CreateVolumeResponse(volume=volume_message(made))

    async def _source(self, source: pb.VolumeContentSource, parameters: dict[str, str]) -> str:
        kind = source.WhichOneof("type")
        past = parameters.get("source-volume")
        if "moment" in parameters and kind != "volume" and past is None:
            raise UsageError("a moment needs a volume it is of: a source, or the parameter source-volume")
        if kind is None:
            return "" if past is None else f"volume/{check.known_id(past, 'volume')}"
        if past is not None:
            raise UsageError("a volume has one source: leave out the parameter source-volume")
        if kind == "snapshot":
            return f"snapshot/{check.known_id(source.snapshot.snapshot_id, 'snapshot')}"
        return f"volume/{check.known_id(source.volume.volume_id, 'volume')}"

    async def _size_of(self, source: str) -> int:
        kind, _, found = source.partition("/")
        if kind == "snapshot":
            return (await self._volumes.find_snapshot(found)).size
        try:
            return (await self._volumes.volume(found)).capacity
        except NotFoundError:
            return 0  # of a volume that was deleted: its moment says

    def _reaches(self, wanted: pb.TopologyRequirement) -> bool:
        if not wanted.requisite:
            return True
        return any(
            each.segments.get(TOPOLOGY_ZONE, self._zone) == self._zone
            and set(each.segments) <= {TOPOLOGY_ZONE}
            for each in wanted.requisite
        )

    async def delete_volume(self, request: pb.DeleteVolumeRequest) -> pb.DeleteVolumeResponse:
        """Removes a volume; its snapshots and clones stay."""
        check.mapping(request.secrets, "secrets")
        if check.is_id(check.required(request.volume_id, "volume_id")):
            await self._volumes.delete(request.volume_id)
        return pb.DeleteVolumeResponse()

    async def controller_publish_volume(
        self, request: pb.ControllerPublishVolumeRequest
    ) -> pb.ControllerPublishVolumeResponse:
        """Lets a node have a volume."""
        check.mapping(request.secrets, "secrets")
        check.required(request.volume_id, "volume_id")
        check.required(request.node_id, "node_id")
        wanted = check.capability(request.volume_capability)
        volume = check.known_id(request.volume_id, "volume")
        node = check.node_id(request.node_id)
        check.fits(await self._volumes.volume(volume), wanted)
        reach = await self._volumes.publish(volume, node, wanted.published(readonly=request.readonly))
        return pb.ControllerPublishVolumeResponse(publish_context=reach.context() if reach else {})

    async def controller_unpublish_volume(
        self, request: pb.ControllerUnpublishVolumeRequest
    ) -> pb.ControllerUnpublishVolumeResponse:
        """Takes a volume from a node; one that is gone has nothing any more, so nobody asks it."""
        check.mapping(request.secrets, "secrets")
        if check.is_id(check.required(request.volume_id, "volume_id")):
            await self._volumes.unpublish(request.volume_id, request.node_id)
        return pb.ControllerUnpublishVolumeResponse()

    async def validate_volume_capabilities(
        self, request: pb.ValidateVolumeCapabilitiesRequest
    ) -> pb.ValidateVolumeCapabilitiesResponse:
        """Whether a volume can be used so."""
        check.mapping(request.secrets, "secrets")
        check.required(request.volume_id, "volume_id")
        wanted = check.capabilities(request.volume_capabilities)
        volume = await self._volumes.volume(check.known_id(request.volume_id, "volume"))
        try:
            for each in wanted:
                check.fits(volume, each)
            check.parameters(request.parameters)
            check.parameters(request.mutable_parameters, field="mutable_parameters")
        except SpaceError as error:
            return pb.ValidateVolumeCapabilitiesResponse(message=str(error))
        return pb.ValidateVolumeCapabilitiesResponse(
            confirmed=pb.ValidateVolumeCapabilitiesResponse.Confirmed(
                volume_context=request.volume_context,
                volume_capabilities=request.volume_capabilities,
                parameters=request.parameters,
                mutable_parameters=request.mutable_parameters,
            )
        )

    async def list_volumes(self, request: pb.ListVolumesRequest) -> pb.ListVolumesResponse:
        """All volumes, a page at a time, in order of their ids."""
        after, limit = check.page(request.starting_token, request.max_entries)
        found = await self._volumes.volumes(after, limit + 1)
        entry, status = pb.ListVolumesResponse.Entry, pb.ListVolumesResponse.VolumeStatus
        return pb.ListVolumesResponse(
            entries=[
                entry(
                    volume=volume_message(each),
                    status=status(published_node_ids=sorted(each.published), volume_condition=_healthy()),
                )
                for each in found[:limit]
            ],
            next_token=found[limit - 1].id if len(found) > limit else "",
        )

    async def controller_get_volume(
        self, request: pb.ControllerGetVolumeRequest
    ) -> pb.ControllerGetVolumeResponse:
        """One volume."""
        volume = await self._volumes.volume(check.known_id(request.volume_id, "volume"))
        status = pb.ControllerGetVolumeResponse.VolumeStatus(
            published_node_ids=sorted(volume.published), volume_condition=_healthy()
        )
        return pb.ControllerGetVolumeResponse(volume=volume_message(volume), status=status)

    async def get_capacity(self, request: pb.GetCapacityRequest) -> pb.GetCapacityResponse:
        """Room on the disk; volumes are thin, so more than that can be promised."""
        block = False
        if request.volume_capabilities:
            block = check.capabilities(request.volume_capabilities)[0].block
        parameters = check.parameters(request.parameters)
        here = parameters.get(TRANSPORT) in NETWORK or self._reaches(
            pb.TopologyRequirement(requisite=[request.accessible_topology])
        )
        return pb.GetCapacityResponse(
            available_capacity=await self._volumes.room() if here else 0,
            maximum_volume_size=Int64Value(value=check.CAPACITY_MAX),
            minimum_volume_size=Int64Value(value=check.BLOCK_BYTES if block else 1),
        )

    async def controller_expand_volume(
        self, request: pb.ControllerExpandVolumeRequest
    ) -> pb.ControllerExpandVolumeResponse:
        """Makes a volume larger, whoever uses it."""
        check.mapping(request.secrets, "secrets")
        check.required(request.volume_id, "volume_id")
        if not request.HasField("capacity_range"):
            raise UsageError("capacity_range is missing")
        if request.HasField("volume_capability"):
            check.capability(request.volume_capability)
        volume = await self._volumes.volume(check.known_id(request.volume_id, "volume"))
        capacity, limit = check.capacity(request.capacity_range, block=volume.block)
        expanded = await self._volumes.expand(volume.id, capacity, limit)
        return pb.ControllerExpandVolumeResponse(
            capacity_bytes=expanded.capacity, node_expansion_required=volume.block
        )

    async def controller_modify_volume(
        self, request: pb.ControllerModifyVolumeRequest
    ) -> pb.ControllerModifyVolumeResponse:
        """Lets a volume follow another policy."""
        check.mapping(request.secrets, "secrets")
        check.required(request.volume_id, "volume_id")
        mutable = check.parameters(request.mutable_parameters, field="mutable_parameters")
        await self._volumes.modify(check.known_id(request.volume_id, "volume"), mutable)
        return pb.ControllerModifyVolumeResponse()

    # --- snapshots -------------------------------------------------------------------------------

    async def create_snapshot(self, request: pb.CreateSnapshotRequest) -> pb.CreateSnapshotResponse:
        """Takes a snapshot; it is ready at once."""
        check.mapping(request.secrets, "secrets")
        check.no_parameters(request.parameters)
        name = check.required(request.name, "name")
        check.required(request.source_volume_id, "source_volume_id")
        volume = check.known_id(request.source_volume_id, "volume")
        return pb.CreateSnapshotResponse(
            snapshot=snapshot_message(await self._volumes.snapshot(volume, name))
        )

    async def delete_snapshot(self, request: pb.DeleteSnapshotRequest) -> pb.DeleteSnapshotResponse:
        """Removes a snapshot; volumes made of it stay."""
        check.mapping(request.secrets, "secrets")
        if check.is_id(check.required(request.snapshot_id, "snapshot_id")):
            await self._volumes.delete_snapshot(request.snapshot_id)
        return pb.DeleteSnapshotResponse()

    async def list_snapshots(self, request: pb.ListSnapshotsRequest) -> pb.ListSnapshotsResponse:
        """All snapshots, those of one volume, or one, a page at a time; what is not there is an empty page."""
        check.mapping(request.secrets, "secrets")
        after, limit = check.page(request.starting_token, request.max_entries)
        found: Sequence[Snapshot] = []
        if request.snapshot_id:
            found = [each for each in await self._one(request.snapshot_id) if each.id > after]
            if request.source_volume_id:
                found = [each for each in found if each.volume == request.source_volume_id]
        elif not request.source_volume_id or check.is_id(request.source_volume_id):
            found = await self._volumes.snapshots(after, limit + 1, request.source_volume_id)
        entry = pb.ListSnapshotsResponse.Entry
        return pb.ListSnapshotsResponse(
            entries=[entry(snapshot=snapshot_message(each)) for each in found[:limit]],
            next_token=found[limit - 1].id if len(found) > limit else "",
        )

    async def _one(self, snapshot: str) -> list[Snapshot]:
        if not check.is_id(snapshot):
            return []
        try:
            return [await self._volumes.find_snapshot(snapshot)]
        except NotFoundError:
            return []

    async def get_snapshot(self, request: pb.GetSnapshotRequest) -> pb.GetSnapshotResponse:
        """One snapshot."""
        check.mapping(request.secrets, "secrets")
        found = await self._volumes.find_snapshot(check.known_id(request.snapshot_id, "snapshot"))
        return pb.GetSnapshotResponse(snapshot=snapshot_message(found))


def _healthy() -> pb.VolumeCondition:
    """What the log has is whole, or reading it says so: what can be wrong with a volume is seen on its node."""
    return pb.VolumeCondition(abnormal=False, message="in the log")


def volume_message(volume: Volume) -> pb.Volume:
    """A volume in the specification's words."""
    source = None
    kind, _, found = volume.source.partition("/")
    if kind == "snapshot":
        source = pb.VolumeContentSource(snapshot=pb.VolumeContentSource.SnapshotSource(snapshot_id=found))
    elif kind == "volume" and "source-volume" not in volume.parameters:
        source = pb.VolumeContentSource(volume=pb.VolumeContentSource.VolumeSource(volume_id=found))
    return pb.Volume(
        volume_id=volume.id,
        capacity_bytes=volume.capacity,
        volume_context=check.volume_context(volume),
        content_source=source,
        accessible_topology=[pb.Topology(segments={TOPOLOGY_ZONE: volume.zone})] if volume.zone else [],
    )


def snapshot_message(snapshot: Snapshot) -> pb.Snapshot:
    """A snapshot in the specification's words."""
    return pb.Snapshot(
        snapshot_id=snapshot.id,
        source_volume_id=snapshot.volume,
        size_bytes=snapshot.size,
        creation_time=timestamp(snapshot.created_ns),
        ready_to_use=True,
        group_snapshot_id=snapshot.group,
    )


def timestamp(time_ns: int) -> Timestamp:
    """Nanoseconds since 1970 as a message."""
    return Timestamp(seconds=time_ns // 1_000_000_000, nanos=time_ns % 1_000_000_000)
