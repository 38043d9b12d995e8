"""gRPC around the services: methods by the names the specification gives them, errors by the one table, and counts.

The messages are generated, the method table is not: the descriptor of ``csi.proto`` says which there are, so no second
generated module has to fit the installed grpcio.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final

import attrs
import grpc
import grpc.aio
from google.protobuf import message_factory

from space._errors import SpaceError, StorageError
from space.projections.csi.pb import csi_pb2 as pb
from space.projections.csi.status import code_of

STREAMING: Final = frozenset({"GetMetadataAllocated", "GetMetadataDelta"})
MESSAGE_BYTES_MAX: Final = 4 << 20  # gRPC's own default, said so that no other default can change it
CALLS_MAX: Final = 512
"""Calls answered at once; more are told RESOURCE_EXHAUSTED.  A sidecar has ten workers, a kubelet some dozens."""

DETAILS_CHARACTERS_MAX: Final = 2000  # they travel in a header
GRACE_SECONDS: Final = 10.0

log: Final = logging.getLogger("space.csi")
Handler = Callable[[Any], Awaitable[Any]]
Streamer = Callable[[Any], AsyncIterator[Any]]


@attrs.define
class Counts:
    """How many calls came to which end, and how long they took in all, by method."""

    calls: Counter[tuple[str, str]] = attrs.field(factory=Counter)
    seconds: Counter[str] = attrs.field(factory=Counter)

    def add(self, method: str, code: grpc.StatusCode, seconds: float) -> None:
        """One more call."""
        self.calls[method, code.name] += 1
        self.seconds[method] += seconds  # type: ignore[assignment]  # a Counter of floats

    def text(self) -> str:
        """As Prometheus reads it (text format 0.0.4)."""
        lines = ["# TYPE csi_operations_total counter"]
        for (method, code), number in sorted(self.calls.items()):
            lines.append(f'csi_operations_total{{method="{method}",code="{code}"}} {number}')
        lines.append("# TYPE csi_operations_seconds_total counter")
        for method, seconds in sorted(self.seconds.items()):
            lines.append(f'csi_operations_seconds_total{{method="{method}"}} {seconds:.6f}')
        return "\n".join(lines) + "\n"


def method_name(name: str) -> str:
    """The method of a service for one of the specification: ``CreateVolume`` is ``create_volume``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def message_class(descriptor: Any) -> Any:
    """The class of a message."""
    getter = getattr(message_factory, "GetMessageClass", None)  # since protobuf 4.22
    return descriptor._concrete_class if getter is None else getter(descriptor)  # noqa: SLF001


def generic_handler(name: str, service: object, counts: Counts) -> grpc.GenericRpcHandler:
    """All methods of the specification's service ``name``, answered by ``service``."""
    found = pb.DESCRIPTOR.services_by_name[name]
    handlers = {}
    for method in found.methods:
        work = getattr(service, method_name(method.name))
        read = message_class(method.input_type).FromString
        write = message_class(method.output_type).SerializeToString
        if method.name in STREAMING:
            handlers[method.name] = grpc.unary_stream_rpc_method_handler(
                _streamed(method.name, work, counts), read, write
            )
        else:
            handlers[method.name] = grpc.unary_unary_rpc_method_handler(
                _answered(method.name, work, counts), read, write
            )
    handler: grpc.GenericRpcHandler = grpc.method_handlers_generic_handler(found.full_name, handlers)
    return handler


def _answered(method: str, work: Handler, counts: Counts) -> Callable[[Any, Any], Awaitable[Any]]:
    async def answer(request: Any, context: Any) -> Any:
        begun, code = time.monotonic(), grpc.StatusCode.CANCELLED
        try:
            answer = await work(request)
            code = grpc.StatusCode.OK
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - each has its code, or is INTERNAL and logged
            code = _told(method, error)
            await context.abort(code, str(error)[:DETAILS_CHARACTERS_MAX])
        else:
            return answer
        finally:
            counts.add(method, code, time.monotonic() - begun)

    return answer


def _streamed(method: str, work: Streamer, counts: Counts) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
        begun, code = time.monotonic(), grpc.StatusCode.CANCELLED
        try:
            async for message in work(request):
                yield message
            code = grpc.StatusCode.OK
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:  # noqa: BLE001 - as above
            code = _told(method, error)
            await context.abort(code, str(error)[:DETAILS_CHARACTERS_MAX])
        finally:
            counts.add(method, code, time.monotonic() - begun)

    return answer


def _told(method: str, error: Exception) -> grpc.StatusCode:
    """The code of an error; the request is not logged, because it may hold secrets."""
    if isinstance(error, SpaceError):
        log.info("%s: %s", method, error)
    else:
        log.error("%s met an unexpected error", method, exc_info=error)
    return code_of(error)


@contextlib.asynccontextmanager
async def serving(
    address: str, services: Sequence[tuple[str, object]], counts: Counts
) -> AsyncIterator[None]:
    """Answers on a Unix socket (``unix:///path``, or a path) while it is entered; calls under way end in time.

    Raises:
        StorageError: the socket cannot be made.
    """
    path = address.removeprefix("unix://").removeprefix("unix:")
    options = [
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ]
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=CALLS_MAX)
    server.add_generic_rpc_handlers(tuple(generic_handler(name, each, counts) for name, each in services))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # of one that was killed: grpc would refuse it
    before = os.umask(0o077)
    try:
        server.add_insecure_port(f"unix:{path}")
        await server.start()
    except (RuntimeError, OSError) as error:
        raise StorageError(f"cannot listen on {path}: {error}") from None
    finally:
        os.umask(before)
    try:
        yield
    finally:
        await server.stop(GRACE_SECONDS)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
