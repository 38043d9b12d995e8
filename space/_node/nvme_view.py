"""Capsules as namespaces of an NVMe/TCP subsystem, served until the process is told to end.

What a host remembers is the same after every restart: the subsystem's name comes from the store, a namespace's
identity from its capsule, its number (NSID) from the log.  A past moment cannot log anything, so its namespaces are
in a subsystem of their own, named after them all: the same capsules of the same moment are the same subsystem.

Sizes change by other ways into the store, and so does what is in a tree; a look a few times a second finds that out,
and hosts are told.  A capsule that was named by itself and is deleted meanwhile stays as it is until the view ends, as
an open file does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import shlex
import signal
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

import attrs

from space._errors import SpaceError, UnavailableError, UsageError
from space._node.beside import PastBeside
from space._node.caller import Document
from space._node.local_block import BlockWriter, LocalBlockDevice, namespace_identity, namespace_number
from space._node.nvme_tree import Source
from space._node.store import Store
from space.events.ids import AtPosition, CapsuleId
from space.projections.nvme.auth import ANYBODY, Access
from space.projections.nvme.server import Listener, Server
from space.projections.nvme.target import DISCOVERY_PORT, IO_PORT, Namespace, Port, Subsystem, Target

WATCH_SECONDS: Final = 0.25
"""How often sizes are looked at: a resize is no hurry, and a look at an unchanged store costs microseconds."""

LISTEN_DEFAULT: Final = f"127.0.0.1:{IO_PORT}"
PORT_MAX: Final = 0xFFFF
SERIAL_BYTES: Final = 10

log: Final = logging.getLogger("space.nvme")

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
    access: Access = ANYBODY,
) -> None:
    """Serves capsules (ids or paths) at an address until SIGTERM or SIGINT; then everything acknowledged is durable.

    A directory stands for the block devices in it, those of the present for whichever there are at the time.

    ``ready`` is told once hosts can connect: ``address``, ``read_only``, ``nqn``, ``nsid`` of the first one (None: a
    tree is empty), ``namespaces``, ``hosts``, and the commands ``discover`` and ``connect``.

    Raises:
        NotFoundError: there is no such capsule.
        UsageError: it cannot be a block device.
        UnavailableError: the address cannot be listened at.
    """
    _run(_serve(reading, sources, listen, read_only, ready, access))


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
    texts: Sequence[str],
    listen: tuple[str, int],
    read_only: bool,
    ready: Callable[[Document], None],
    access: Access,
) -> None:
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    async with contextlib.AsyncExitStack() as stack:
        writer = None
        if isinstance(reading, Store) and not read_only:
            writer = BlockWriter(reading)
            stack.push_async_callback(writer.close)
        sources = [Source(reading, text) for text in texts]
        capsules = [(text, capsule) for each in sources for capsule, text in each.capsules().items()]
        subsystem = _subsystem(reading, [capsule for _, capsule in capsules], access)
        offering = _Offering(reading, subsystem, writer)
        stack.push_async_callback(offering.close)
        for source, capsule in capsules:
            await offering.add(source, capsule)
        target = Target(serial=subsystem.serial)
        target.add(subsystem)
        server, ports = await _listening(target, listen)
        stack.push_async_callback(server.close)
        ready(_document(subsystem, ports, offering.offered(), access, read_only=writer is None))
        trees = [each for each in sources if each.is_tree and isinstance(reading, Store)]
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), WATCH_SECONDS)
            offering.look()
            if await asyncio.to_thread(_any_changed, trees):
                await offering.follow(sources)


# --- what is offered -------------------------------------------------------------------------------


def _moment(reading: Store | PastBeside) -> AtPosition | None:
    if isinstance(reading, Store):
        return None
    return AtPosition(reading.target.position, reading.target.event)


def _subsystem(reading: Store | PastBeside, capsules: Sequence[CapsuleId], access: Access) -> Subsystem:
    """The subsystem of a store, or of these capsules at a past moment of it.

    Raises:
        UsageError: one of them is named twice; at a past moment there is none.
    """
    if len(set(capsules)) < len(capsules):
        raise UsageError("the same capsule twice: a namespace is offered once")
    moment = _moment(reading)
    store = reading.id if isinstance(reading, Store) else reading._store_id
    name = CapsuleId(store).derive(b"nvme subsystem")
    if moment is not None:
        if not capsules:
            raise UsageError("there was no block device", hint="space create --block-size makes one")
        name = name.derive(b"".join(namespace_identity(each, moment).uuid for each in capsules))
    return Subsystem(
        f"nqn.2014-08.org.nvmexpress:uuid:{name}",
        name[:SERIAL_BYTES].hex(),
        hosts=access.hosts,
        credentials=dict(access.credentials),
    )


class _Offering:
    """The namespaces of a subsystem: added, followed and ended."""

    def __init__(self, reading: Store | PastBeside, subsystem: Subsystem, writer: BlockWriter | None) -> None:
        self._reading = reading
        self._subsystem = subsystem
        self._writer = writer
        self._offered: dict[CapsuleId, _Offered] = {}
        self._refused: set[CapsuleId] = set()

    def offered(self) -> list[_Offered]:
        """What there is now, the oldest first."""
        return list(self._offered.values())

    async def add(self, source: str, capsule: CapsuleId) -> None:
        """Makes a capsule a namespace.

        Raises:
            UsageError: it has not one whole block, or there are no numbers left.
        """
        device = LocalBlockDevice(self._reading, capsule, writer=self._writer)
        try:
            size = _checked_size(source, device)
            identity = namespace_identity(capsule, _moment(self._reading))
            nsid = await self._number(identity.uuid)
            namespace = Namespace(nsid, device, identity.uuid, identity.nguid, identity.eui64)
            self._subsystem.add(namespace)
        except BaseException:
            device.close()
            raise
        self._offered[capsule] = _Offered(source, capsule, device, namespace, size)

    async def _number(self, uuid: CapsuleId) -> int:
        if not isinstance(self._reading, Store):
            return len(self._subsystem.namespaces) + 1
        return await asyncio.to_thread(namespace_number, self._reading, self._subsystem.nqn, uuid)

    def look(self) -> None:
        """Tells hosts of other sizes."""
        for each in self._offered.values():
            size = each.device.info().size
            if size != each.size:
                each.size = size
                self._subsystem.changed(each.namespace.nsid)

    async def follow(self, sources: Sequence[Source]) -> None:
        """Offers what is new in the sources, and no longer what has left them.

        What cannot be offered is said once; the rest is served all the same.
        """
        try:
            wanted = await asyncio.to_thread(_capsules, sources)
        except SpaceError as error:
            log.warning("what there is to serve stays as it is: %s", error)
            return
        for gone in self._offered.keys() - wanted.keys():
            ended = self._offered.pop(gone)
            self._subsystem.remove(ended.namespace.nsid)
            ended.device.close()
        for capsule, source in wanted.items():
            if capsule in self._offered or capsule in self._refused:
                continue
            try:
                await self.add(source, capsule)
            except SpaceError as error:
                self._refused.add(capsule)
                log.warning("%s is not served: %s", source, error)
        self._refused &= wanted.keys()

    async def close(self) -> None:
        """Makes everything acknowledged durable, and lets go of the capsules."""
        for each in self._offered.values():
            await each.device.flush()
            each.device.close()


def _checked_size(source: str, device: LocalBlockDevice) -> int:
    """The size of a device that has one whole block.

    Raises:
        UsageError: it has not.
    """
    info = device.info()
    if not info.size:
        raise UsageError(
            f"{source} has not one block of {info.block_size} bytes", hint=f"space resize {source} SIZE"
        )
    return info.size


def _any_changed(trees: Sequence[Source]) -> bool:
    return any(each.changed() for each in trees)


def _capsules(sources: Sequence[Source]) -> dict[CapsuleId, str]:
    return {capsule: text for each in sources for capsule, text in each.capsules().items()}


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
    subsystem: Subsystem,
    ports: Sequence[Port],
    offered: Sequence[_Offered],
    access: Access,
    *,
    read_only: bool,
) -> Document:
    at = f"-t tcp -a {shlex.quote(ports[0].address)}"
    return {
        "address": _joined(ports[0].address, ports[0].service),
        "read_only": read_only,
        "nqn": subsystem.nqn,
        "nsid": offered[0].namespace.nsid if offered else None,
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
        "hosts": access.document(),
        "discover": f"nvme discover {at} -s {ports[-1].service}{access.discover_options()}",
        "connect": f"nvme connect {at} -s {ports[0].service} -n {subsystem.nqn}{access.connect_options()}",
    }
