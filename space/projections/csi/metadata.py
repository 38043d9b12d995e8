"""The SnapshotMetadata service: which ranges of a block snapshot hold something, or changed since another one.

Ranges are merged and sorted, do not overlap, and have whatever lengths (VARIABLE_LENGTH).  What is reported as changed
may have been written again as it was, in other pieces: frames are compared, not bytes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final, TypeVar

from space._errors import Status, UsageError
from space.projections.csi import check
from space.projections.csi.model import Snapshot, Volumes
from space.projections.csi.pb import csi_pb2 as pb

RANGES_MAX: Final = 4096
"""Ranges of one message: 90 KiB of it."""

_Response = TypeVar("_Response", pb.GetMetadataAllocatedResponse, pb.GetMetadataDeltaResponse)


class SnapshotMetadata:
    """What backups ask before they read."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes

    async def get_metadata_allocated(
        self, request: pb.GetMetadataAllocatedRequest
    ) -> AsyncIterator[pb.GetMetadataAllocatedResponse]:
        """Ranges that hold something."""
        check.mapping(request.secrets, "secrets")
        snapshot = await self._block(request.snapshot_id, "snapshot_id")
        self._check_offset(request.starting_offset, snapshot)
        ranges = self._volumes.allocated(snapshot.id, request.starting_offset)
        kind = pb.GetMetadataAllocatedResponse
        async for message in _messages(kind, ranges, snapshot.size, request.max_results):
            yield message

    async def get_metadata_delta(
        self, request: pb.GetMetadataDeltaRequest
    ) -> AsyncIterator[pb.GetMetadataDeltaResponse]:
        """Ranges that changed from one snapshot to another of the same volume."""
        check.mapping(request.secrets, "secrets")
        base = await self._block(request.base_snapshot_id, "base_snapshot_id")
        target = await self._block(request.target_snapshot_id, "target_snapshot_id")
        if base.volume != target.volume:
            raise UsageError("base_snapshot_id and target_snapshot_id are of different volumes")
        self._check_offset(request.starting_offset, target)
        ranges = self._volumes.changed(base.id, target.id, request.starting_offset)
        kind = pb.GetMetadataDeltaResponse
        async for message in _messages(kind, ranges, target.size, request.max_results):
            yield message

    async def _block(self, snapshot: str, field: str) -> Snapshot:
        check.required(snapshot, field)
        found = await self._volumes.find_snapshot(check.known_id(snapshot, "snapshot"))
        if not found.block:
            raise UsageError(f"snapshot {found.id} is of a tree: only block devices have ranges")
        return found

    @staticmethod
    def _check_offset(offset: int, snapshot: Snapshot) -> None:
        if not 0 <= offset <= snapshot.size:
            raise UsageError(
                f"starting_offset {offset} is outside of {snapshot.size} bytes", status=Status.TOO_LARGE
            )


async def _messages(
    kind: type[_Response], ranges: AsyncIterator[tuple[int, int]], size: int, wanted: int
) -> AsyncIterator[_Response]:
    """Ranges in messages; at least one, which says how large the volume is."""
    if wanted < 0:
        raise UsageError(f"max_results is {wanted}")
    limit = min(wanted or RANGES_MAX, RANGES_MAX)
    found: list[pb.BlockMetadata] = []
    sent = False
    async for offset, length in ranges:
        found.append(pb.BlockMetadata(byte_offset=offset, size_bytes=length))
        if len(found) == limit:
            yield _message(kind, size, found)
            found, sent = [], True
    if found or not sent:
        yield _message(kind, size, found)


def _message(kind: type[_Response], size: int, found: list[pb.BlockMetadata]) -> _Response:
    return kind(block_metadata_type=pb.VARIABLE_LENGTH, volume_capacity_bytes=size, block_metadata=found)
