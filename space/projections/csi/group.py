"""The GroupController service: snapshots of several volumes at one position of the log."""

from __future__ import annotations

from typing import Final

from space._errors import NotFoundError, UsageError
from space.projections.csi import check
from space.projections.csi.controller import snapshot_message, timestamp
from space.projections.csi.model import Group, Volumes
from space.projections.csi.pb import csi_pb2 as pb

VOLUMES_MAX: Final = 256
"""Volumes of one group: four commands each, all in one batch."""

_RPC: Final = pb.GroupControllerServiceCapability.RPC


class GroupController:
    """Groups of snapshots."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes

    async def group_controller_get_capabilities(
        self, request: pb.GroupControllerGetCapabilitiesRequest
    ) -> pb.GroupControllerGetCapabilitiesResponse:
        """What of the service there is: all of it."""
        rpc = _RPC(type=_RPC.CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT)
        return pb.GroupControllerGetCapabilitiesResponse(
            capabilities=[pb.GroupControllerServiceCapability(rpc=rpc)]
        )

    async def create_volume_group_snapshot(
        self, request: pb.CreateVolumeGroupSnapshotRequest
    ) -> pb.CreateVolumeGroupSnapshotResponse:
        """Takes a snapshot of each volume, all at one position."""
        check.mapping(request.secrets, "secrets")
        check.no_parameters(request.parameters)
        name = check.required(request.name, "name")
        wanted = list(dict.fromkeys(request.source_volume_ids))
        if not 0 < len(wanted) <= VOLUMES_MAX:
            raise UsageError(f"source_volume_ids has {len(wanted)} volumes, not 1 to {VOLUMES_MAX}")
        volumes = [check.known_id(each, "volume") for each in wanted]
        made = await self._volumes.snapshot_group(name, volumes)
        return pb.CreateVolumeGroupSnapshotResponse(group_snapshot=group_message(made))

    async def delete_volume_group_snapshot(
        self, request: pb.DeleteVolumeGroupSnapshotRequest
    ) -> pb.DeleteVolumeGroupSnapshotResponse:
        """Removes a group with its snapshots."""
        check.mapping(request.secrets, "secrets")
        if check.is_id(check.required(request.group_snapshot_id, "group_snapshot_id")):
            try:
                group = await self._volumes.group(request.group_snapshot_id)
            except NotFoundError:
                return pb.DeleteVolumeGroupSnapshotResponse()
            _check_members(group, list(request.snapshot_ids))
            await self._volumes.delete_group(group.id)
        return pb.DeleteVolumeGroupSnapshotResponse()

    async def get_volume_group_snapshot(
        self, request: pb.GetVolumeGroupSnapshotRequest
    ) -> pb.GetVolumeGroupSnapshotResponse:
        """One group."""
        check.mapping(request.secrets, "secrets")
        group = await self._volumes.group(check.known_id(request.group_snapshot_id, "group_snapshot"))
        _check_members(group, list(request.snapshot_ids))
        return pb.GetVolumeGroupSnapshotResponse(group_snapshot=group_message(group))


def _check_members(group: Group, snapshots: list[str]) -> None:
    """Refuses a list that has what does not belong to the group; without a list nothing is said about it."""
    if strangers := sorted(set(snapshots) - {each.id for each in group.snapshots}):
        raise UsageError(f"snapshot {strangers[0]!r:.100} is not of group {group.id}")


def group_message(group: Group) -> pb.VolumeGroupSnapshot:
    """A group in the specification's words."""
    return pb.VolumeGroupSnapshot(
        group_snapshot_id=group.id,
        snapshots=[snapshot_message(each) for each in group.snapshots],
        creation_time=timestamp(group.created_ns),
        ready_to_use=True,
    )
