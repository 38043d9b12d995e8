"""Capsules as namespaces of an NVMe/TCP subsystem, served until the process is told to end.

What a host remembers is the same after every restart: the subsystem's name comes from the store, a namespace's
identity from its capsule, its number (NSID) from the log.  A past moment cannot log anything, so its namespaces are
in a subsystem of their own, named after them all: the same capsules of the same moment are the same subsystem.

Sizes change by other ways into the store; a look a few times a second finds that out, and hosts are told.  A capsule
that is deleted meanwhile stays as it is until the view ends, as an open file does.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
import signal
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

import attrs

from space._errors import UnavailableError, UsageError
from space._node.beside import PastBeside
from space._node.caller import Document
from space._node.local_block import BlockWriter, LocalBlockDevice, namespace_identity, namespace_number
from space._node.store import Store
from space.events.ids import AtPosition, CapsuleId
from space.projections.nvme.server import Listener, Server
from space.projections.nvme.target import DISCOVERY_PORT, IO_PORT, Namespace, Port, Subsystem, Target

WATCH_SECONDS: Final = 0.25
"""How often sizes are looked at: a resize is no hurry, and a look at an unchanged store costs microseconds."""

LISTEN_DEFAULT: Final = f"127.0.0.1:{IO_PORT}"
PORT_MAX: Final = 0xFFFF
SERIAL_BYTES: Final = 10


_LABEL: Final = "[A-Za-z0-9_-]{1,63}"
_ADDRESS: Final = re.compile(rf"(?:\[([0-9A-Fa-f:.]+)\]|({_LABEL}(?:\.{_LABEL})*)):([0-9]{{1,5}})")


def parse_listen(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` or ``[IPV6]:PORT``; port 0 is whichever is free.

    Raises:
        UsageError: it is neither.
    """
    found = _ADDRESS.fullmatch(text)
    if found is None or int(found[3]) > PORT_MAX:
        raise UsageError(f"not an address to listen at: {text!r}", hint="write HOST:PORT")
    return found[1] or found[2], int(found[3])


@attrs.define(eq=False)
class _Offered:
    """A capsule as a namespace, and the size hosts were told last."""

    source: str
    capsule: CapsuleId
    device: LocalBlockDevice
    namespace: Namespace
    size: int


def serve(
    reading: Store | PastBeside,
    sources: Sequence[str],
    *,
    listen: tuple[str, int],
    read_only: bool,
    ready: Callable[[Document], None],
) -> None:
    """Serves capsules (ids or paths) at an address until SIGTERM or SIGINT; then everything acknowledged is durable.

    ``ready`` is told once hosts can connect: ``address``, ``read_only``, ``nqn``, ``nsid`` of the first one,
    ``namespaces``, and the commands ``discover`` and ``connect``.

    Raises:
        NotFoundError: there is no such capsule.
        UsageError: it cannot be a block device.
        UnavailableError: the address cannot be listened at.
    """
    _run(_serve(reading, sources, listen, read_only, ready))


def _run(main: Coroutine[Any, Any, None]) -> None:
    """Runs the loop: uvloop's where it is installed."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


async def _serve(
    reading: Store | PastBeside,
    sources: Sequence[str],
    listen: tuple[str, int],
    read_only: bool,
    ready: Callable[[Document], None],
) -> None:
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    async with contextlib.AsyncExitStack() as stack:
        writer = None
        if isinstance(reading, Store) and not read_only:
            writer = BlockWriter(reading)
            stack.push_async_callback(writer.close)
        capsules = [(source, reading.resolve(source)) for source in sources]
        subsystem = _subsystem(reading, [capsule for _, capsule in capsules])
        offered = []
        for source, capsule in capsules:
            device = LocalBlockDevice(reading, capsule, writer=writer)
            stack.callback(device.close)
            stack.push_async_callback(device.flush)
            offered.append(_offer(reading, subsystem, source, capsule, device))
        target = Target(serial=subsystem.serial)
        target.add(subsystem)
        server, ports = await _listening(target, listen)
        stack.push_async_callback(server.close)
        ready(_document(subsystem, ports, offered, read_only=writer is None))
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), WATCH_SECONDS)
            for each in offered:
                _look(subsystem, each)


# --- what is offered -------------------------------------------------------------------------------


def _moment(reading: Store | PastBeside) -> AtPosition | None:
    if isinstance(reading, Store):
        return None
    return AtPosition(reading.target.position, reading.target.event)


def _subsystem(reading: Store | PastBeside, capsules: Sequence[CapsuleId]) -> Subsystem:
    """The subsystem of a store, or of these capsules at a past moment of it.

    Raises:
        UsageError: one of them is named twice.
    """
    if len(set(capsules)) < len(capsules):
        raise UsageError("the same capsule twice: a namespace is offered once")
    moment = _moment(reading)
    store = reading.id if isinstance(reading, Store) else reading._store_id
    name = CapsuleId(store).derive(b"nvme subsystem")
    if moment is not None:
        name = name.derive(b"".join(namespace_identity(each, moment).uuid for each in capsules))
    return Subsystem(f"nqn.2014-08.org.nvmexpress:uuid:{name}", name[:SERIAL_BYTES].hex())


def _offer(
    reading: Store | PastBeside,
    subsystem: Subsystem,
    source: str,
    capsule: CapsuleId,
    device: LocalBlockDevice,
) -> _Offered:
    """Makes a capsule a namespace.

    Raises:
        UsageError: it has not one whole block.
    """
    info = device.info()
    if not info.size:
        raise UsageError(
            f"{source} has not one block of {info.block_size} bytes", hint=f"space resize {source} SIZE"
        )
    identity = namespace_identity(capsule, _moment(reading))
    if isinstance(reading, Store):
        nsid = namespace_number(reading, subsystem.nqn, identity.uuid)
    else:
        nsid = len(subsystem.namespaces) + 1
    namespace = Namespace(nsid, device, identity.uuid, identity.nguid, identity.eui64)
    subsystem.add(namespace)
    return _Offered(source, capsule, device, namespace, info.size)


def _look(subsystem: Subsystem, offered: _Offered) -> None:
    """Tells hosts of another size."""
    size = offered.device.info().size
    if size != offered.size:
        offered.size = size
        subsystem.changed(offered.namespace.nsid)


# --- where -----------------------------------------------------------------------------------------


async def _listening(target: Target, listen: tuple[str, int]) -> tuple[Server, list[Port]]:
    """Listens; at the usual port also where hosts look for a discovery service, unless another one is there.

    Raises:
        UnavailableError: the address is in use, or not this machine's.
    """
    host, port = listen
    wanted = Listener(host, port)
    if port == IO_PORT:
        with contextlib.suppress(OSError):
            server = Server(target)
            return server, await server.start([wanted, Listener(host, DISCOVERY_PORT, discovery_only=True)])
    server = Server(target)
    try:
        return server, await server.start([wanted])
    except OSError as error:
        raise UnavailableError(
            f"cannot listen at {_joined(host, port)}: {error.strerror or error}",
            hint="say another --listen HOST:PORT",
        ) from None


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _document(
    subsystem: Subsystem, ports: Sequence[Port], offered: Sequence[_Offered], *, read_only: bool
) -> Document:
    at = f"-t tcp -a {shlex.quote(ports[0].address)}"
    return {
        "address": _joined(ports[0].address, ports[0].service),
        "read_only": read_only,
        "nqn": subsystem.nqn,
        "nsid": offered[0].namespace.nsid,
        "namespaces": [
            {
                "nsid": each.namespace.nsid,
                "source": each.source,
                "id": str(each.capsule),
                "uuid": str(CapsuleId(each.namespace.uuid)),
                "size": each.size,
                "block_size": each.device.info().block_size,
            }
            for each in offered
        ],
        "discover": f"nvme discover {at} -s {ports[-1].service}",
        "connect": f"nvme connect {at} -s {ports[0].service} -n {subsystem.nqn}",
    }
