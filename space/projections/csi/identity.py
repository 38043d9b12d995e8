"""The Identity service: what this driver is, and whether it is ready."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from google.protobuf.wrappers_pb2 import BoolValue

from space.projections.csi.model import DRIVER_NAME
from space.projections.csi.pb import csi_pb2 as pb

_SERVICE: Final = pb.PluginCapability.Service
_EXPANSION: Final = pb.PluginCapability.VolumeExpansion


class Identity:
    """Answers the same in every mode; ``ready`` says whether the volumes can be reached."""

    def __init__(self, version: str, *, controller: bool, ready: Callable[[], Awaitable[bool]]) -> None:
        self._version = version
        self._controller = controller
        self._ready = ready

    async def get_plugin_info(self, request: pb.GetPluginInfoRequest) -> pb.GetPluginInfoResponse:
        """Name and version."""
        return pb.GetPluginInfoResponse(name=DRIVER_NAME, vendor_version=self._version)

    async def get_plugin_capabilities(
        self, request: pb.GetPluginCapabilitiesRequest
    ) -> pb.GetPluginCapabilitiesResponse:
        """Which services there are."""
        services = [_SERVICE.VOLUME_ACCESSIBILITY_CONSTRAINTS]
        if self._controller:
            services += [
                _SERVICE.CONTROLLER_SERVICE,
                _SERVICE.GROUP_CONTROLLER_SERVICE,
                _SERVICE.SNAPSHOT_METADATA_SERVICE,
            ]
        found = [pb.PluginCapability(service=_SERVICE(type=each)) for each in services]
        online = _EXPANSION(type=_EXPANSION.ONLINE)
        return pb.GetPluginCapabilitiesResponse(
            capabilities=[*found, pb.PluginCapability(volume_expansion=online)]
        )

    async def probe(self, request: pb.ProbeRequest) -> pb.ProbeResponse:
        """Whether it is ready: not yet is no error, so that nobody kills it while it starts."""
        return pb.ProbeResponse(ready=BoolValue(value=await self._ready()))
