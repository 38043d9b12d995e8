"""A client that says what an orchestrator says; it needs little, so that it runs in a guest too."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import grpc

from space.projections.csi.pb import csi_pb2 as pb
from space.projections.csi.server import STREAMING, message_class

CALL_SECONDS: Final = 60.0
MIB: Final = 1 << 20

_MODE: Final = pb.VolumeCapability.AccessMode
_METHODS: Final = {
    method.name: (service, method)
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


def tree(mode: Any = _MODE.SINGLE_NODE_WRITER, **mount: Any) -> pb.VolumeCapability:
    """A tree is wanted."""
    return pb.VolumeCapability(mount=pb.VolumeCapability.MountVolume(**mount), access_mode=_MODE(mode=mode))


def device(mode: Any = _MODE.SINGLE_NODE_WRITER) -> pb.VolumeCapability:
    """A block device is wanted."""
    return pb.VolumeCapability(block=pb.VolumeCapability.BlockVolume(), access_mode=_MODE(mode=mode))


class Client:
    """Calls of the specification by their names."""

    def __init__(self, socket: Path, seconds: float = CALL_SECONDS) -> None:
        """Connects; each call is given up after so many seconds."""
        self._seconds = seconds
        self._channel = grpc.insecure_channel(f"unix:{socket}")

    def __getattr__(self, name: str) -> Any:
        service, method = _METHODS[name]
        kind = self._channel.unary_stream if name in STREAMING else self._channel.unary_unary
        call = kind(
            f"/{service.full_name}/{name}",
            request_serializer=message_class(method.input_type).SerializeToString,
            response_deserializer=message_class(method.output_type).FromString,
        )
        request = getattr(pb, f"{name}Request")

        def ask(**fields: Any) -> Any:
            answer = call(request(**fields), timeout=self._seconds, wait_for_ready=True)
            return list(answer) if name in STREAMING else answer

        return ask

    def close(self) -> None:
        """Hangs up."""
        self._channel.close()
