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
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol, Self, TypeVar

import attrs

from space._errors import SpaceError, UnavailableError, UsageError
from space._node.beside import PastBeside
from space._node.caller import Document
from space._node.local_block import BlockWriter, LocalBlockDevice, namespace_identity, namespace_number
from space._node.loops import run_loop
from space._node.nvme_tree import Source
from space._node.store import Store
from space._node.view_policy import ViewPolicy
from space.events.ids import AtPosition, CapsuleId
from space.projections.nvme.auth import ANYBODY, Access
from space.projections.nvme.reservations import MemoryKeeper
from space.projections.nvme.server import Listener, Server
from space.projections.nvme.target import (
    CONTROLLER_IDS,
    DISCOVERY_PORT,
    IO_PORT,
    Namespace,
    Port,
    Subsystem,
    Target,
)

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
    run_loop(_serve(reading, sources, listen, read_only, ready, access))


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
        view = await View.open(OneStore(reading, writer), texts, access)
        stack.push_async_callback(view.close)
        await view.listen(listen)
        ready(view.document())
        await view.follow(over)


# --- where it is -----------------------------------------------------------------------------------


@attrs.frozen
class Home:
    """Where a capsule is: what it is read from, the way to write to it if there is one, and its ANA group."""

    reading: Store | PastBeside
    writer: BlockWriter | None
    ana_group: int = 1


class Place(Protocol):
    """What a view is of.  All but :attr:`moment` and :attr:`read_only` may block: not for a loop."""

    @property
    def moment(self) -> AtPosition | None:
        """None for the present."""

    @property
    def read_only(self) -> bool:
        """Whether hosts may not write."""

    def name(self) -> CapsuleId:
        """What the subsystem of the present is named by."""

    def controller_ids(self) -> range:
        """Numbers for controllers that no other process gives in a subsystem of this name."""

    def looking(self) -> AbstractContextManager[object]:
        """For as long as a thread looks at what there is."""

    def source(self, text: str) -> Source:
        """What an id or a path stands for."""

    def home(self, capsule: CapsuleId) -> Home:
        """Where a capsule is."""

    def number(self, subsystem: str, namespace: CapsuleId) -> int | None:
        """The NSID that the log has for a namespace, from now on if need be; None: a past moment, which has none."""


@attrs.frozen
class OneStore:
    """A store of this process, or a past moment of one, as a :class:`Place`."""

    reading: Store | PastBeside
    writer: BlockWriter | None

    @property
    def moment(self) -> AtPosition | None:
        if isinstance(self.reading, Store):
            return None
        return AtPosition(self.reading.target.position, self.reading.target.event)

    @property
    def read_only(self) -> bool:
        return self.writer is None

    def name(self) -> CapsuleId:
        store = self.reading.id if isinstance(self.reading, Store) else self.reading._store_id
        return subsystem_name(store)

    def controller_ids(self) -> range:
        return CONTROLLER_IDS

    def looking(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def source(self, text: str) -> Source:
        return Source(self.reading, text)

    def home(self, capsule: CapsuleId) -> Home:
        return Home(self.reading, self.writer)

    def number(self, subsystem: str, namespace: CapsuleId) -> int | None:
        if not isinstance(self.reading, Store):
            return None
        return namespace_number(self.reading, subsystem, namespace)


def subsystem_name(store: bytes) -> CapsuleId:
    """What the subsystem with the present of a store, or of a cluster, is named by."""
    return CapsuleId(store).derive(b"nvme subsystem")


# --- what is offered -------------------------------------------------------------------------------


class View:
    """A subsystem whose namespaces are what some sources stand for."""

    def __init__(self, place: Place, subsystem: Subsystem, sources: Sequence[Source], access: Access) -> None:
        """See :meth:`open`."""
        self.subsystem = subsystem
        self.target = Target(serial=subsystem.serial)
        self.target.add(subsystem)
        self.ports: list[Port] = []
        self._place = place
        self._sources = sources
        self._access = access
        self._server: Server | None = None
        self._offered: dict[CapsuleId, _Offered] = {}
        self._refused: set[CapsuleId] = set()
        self._host: str | None = None
        self._policies: dict[int, ViewPolicy] = {}

    @classmethod
    async def open(cls, place: Place, texts: Sequence[str], access: Access) -> Self:
        """A view of what ``texts`` stand for, not reachable yet.

        Raises:
            UsageError: something is named twice, or cannot be a block device.
            NotFoundError: something is not there.
        """
        subsystem, sources, capsules = await _looking(place, _named, place, texts, access)
        view = cls(place, subsystem, sources, access)
        try:
            for source, capsule in capsules:
                await view._add(source, capsule)
        except BaseException:
            await view.close()
            raise
        return view

    async def listen(self, listen: tuple[str, int], *, first_port: int = 1) -> None:
        """Lets hosts connect.

        Raises:
            RefusedError: a policy forbids to show something from there.
            UnavailableError: the address is in use, or not this machine's.
        """
        self._host, self._policies = listen[0], {}
        await _looking(self._place, self._check_policies, list(self._offered))
        self._server, self.ports = await _listening(self.target, listen, first_port)

    async def follow(self, over: asyncio.Event) -> None:
        """Offers what there is, as it changes, until it is told to end."""
        trees = [each for each in self._sources if each.is_tree and self._place.moment is None]
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), WATCH_SECONDS)
            try:
                self._look()
                for forbidden in await _looking(self._place, self._forbidden, list(self._offered)):
                    log.warning(
                        "%s is not served any more: its policy forbids it", self._offered[forbidden].source
                    )
                    self._withdraw(forbidden)
                    self._refused.add(forbidden)
                if await _looking(self._place, _any_changed, trees):
                    await self._follow_sources()
            except SpaceError as error:
                log.warning("what is served is not looked at: %s", error)

    async def _add(self, source: str, capsule: CapsuleId) -> None:
        """Makes a capsule a namespace.

        Raises:
            UsageError: it has not one whole block, or there are no numbers left.
        """
        home, device = await _looking(self._place, _device, self._place, capsule)
        try:
            size = _checked_size(source, device)
            identity = namespace_identity(capsule, self._place.moment)
            number = await _looking(self._place, self._place.number, self.subsystem.nqn, identity.uuid)
            nsid = len(self.subsystem.namespaces) + 1 if number is None else number
            namespace = Namespace(
                nsid,
                device,
                identity.uuid,
                identity.nguid,
                identity.eui64,
                ana_group=home.ana_group,
                reservations=device.reservations if self._place.moment is None else MemoryKeeper(),
            )
            self.subsystem.add(namespace)
        except BaseException:
            device.close()
            raise
        self._offered[capsule] = _Offered(source, capsule, device, namespace, size)

    def _look(self) -> None:
        """Tells hosts of other sizes, and of what happened to reservations."""
        for each in self._offered.values():
            size = each.device.info().size
            if size != each.size:
                each.size = size
                self.subsystem.changed(each.namespace.nsid)
            self.subsystem.tell_reservations(each.namespace)

    async def _follow_sources(self) -> None:
        """Offers what is new in the sources, and no longer what has left them.

        What cannot be offered is said once; the rest is served all the same.
        """
        wanted = await _looking(self._place, _capsules, self._sources)
        for gone in self._offered.keys() - wanted.keys():
            self._withdraw(gone)
        for capsule, source in wanted.items():
            if capsule in self._offered or capsule in self._refused:
                continue
            try:
                await _looking(self._place, self._check_policies, [capsule])
                await self._add(source, capsule)
            except SpaceError as error:
                self._refused.add(capsule)
                log.warning("%s is not served: %s", source, error)
        self._refused &= wanted.keys()

    def _withdraw(self, capsule: CapsuleId) -> None:
        """Offers a namespace no longer."""
        ended = self._offered.pop(capsule)
        self.subsystem.remove(ended.namespace.nsid)
        ended.device.close()

    def _policy(self, capsule: CapsuleId) -> ViewPolicy:
        reading = self._place.home(capsule).reading
        return self._policies.setdefault(id(reading), ViewPolicy(reading, "nvme", self._host))

    def _check_policies(self, capsules: list[CapsuleId]) -> None:
        for capsule in capsules:
            self._policy(capsule).check(capsule)

    def _forbidden(self, capsules: list[CapsuleId]) -> list[CapsuleId]:
        """Those whose policy has become one that forbids to show them from here."""
        return [each for each in capsules if self._policy(each).refusal(each)]

    async def close(self) -> None:
        """Ends every connection, makes everything acknowledged durable, and lets go of the capsules."""
        if self._server is not None:
            await self._server.close()
        for each in self._offered.values():
            await each.device.flush()
            each.device.close()

    def document(self) -> Document:
        """What is served, and how hosts reach it."""
        at = f"-t tcp -a {shlex.quote(self.ports[0].address)}"
        named, access = self.subsystem.nqn, self._access
        offered = list(self._offered.values())
        return {
            "address": joined(self.ports[0].address, self.ports[0].service),
            "read_only": self._place.read_only,
            "nqn": named,
            "nsid": offered[0].namespace.nsid if offered else None,
            "namespaces": [_namespace_document(each) for each in offered],
            "hosts": access.document(),
            "discover": f"nvme discover {at} -s {self.ports[-1].service}{access.discover_options()}",
            "connect": f"nvme connect {at} -s {self.ports[0].service} -n {named}{access.connect_options()}",
        }


def _namespace_document(each: _Offered) -> Document:
    return {
        "nsid": each.namespace.nsid,
        "source": each.source,
        "id": str(each.capsule),
        "uuid": str(CapsuleId(each.namespace.uuid)),
        "size": each.size,
        "block_size": each.device.info().block_size,
    }


_T = TypeVar("_T")


async def _looking(place: Place, function: Callable[..., _T], *arguments: Any) -> _T:
    """Calls in another thread, which looks at the place."""

    def look() -> _T:
        with place.looking():
            return function(*arguments)

    return await asyncio.to_thread(look)


def _named(
    place: Place, texts: Sequence[str], access: Access
) -> tuple[Subsystem, list[Source], list[tuple[str, CapsuleId]]]:
    """The subsystem of a store, or of these capsules at a past moment of it; and what is in it.

    Raises:
        UsageError: a capsule is named twice; at a past moment there is none.
    """
    sources = [place.source(text) for text in texts]
    capsules = [(text, capsule) for each in sources for capsule, text in each.capsules().items()]
    if len({capsule for _, capsule in capsules}) < len(capsules):
        raise UsageError("the same capsule twice: a namespace is offered once")
    name = place.name()
    if place.moment is not None:
        if not capsules:
            raise UsageError("there was no block device", hint="space create --block-size makes one")
        name = name.derive(b"".join(namespace_identity(each, place.moment).uuid for _, each in capsules))
    subsystem = Subsystem(
        f"nqn.2014-08.org.nvmexpress:uuid:{name}",
        name[:SERIAL_BYTES].hex(),
        hosts=access.hosts,
        controller_ids=place.controller_ids(),
        credentials=dict(access.credentials),
    )
    return subsystem, sources, capsules


def _device(place: Place, capsule: CapsuleId) -> tuple[Home, LocalBlockDevice]:
    home = place.home(capsule)
    return home, LocalBlockDevice(home.reading, capsule, writer=home.writer)


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


async def _listening(target: Target, listen: tuple[str, int], first_port: int) -> tuple[Server, list[Port]]:
    """Listens; at the usual port also where hosts look for a discovery service, unless another one is there.

    Raises:
        UnavailableError: the address is in use, or not this machine's.
    """
    host, port = listen
    wanted = Listener(host, port)
    if port == IO_PORT:
        with contextlib.suppress(OSError):
            server, both = Server(target), [wanted, Listener(host, DISCOVERY_PORT, discovery_only=True)]
            return server, await server.start(both, first_port=first_port)
    server = Server(target)
    try:
        return server, await server.start([wanted], first_port=first_port)
    except OSError as error:
        raise UnavailableError(
            f"cannot listen at {joined(host, port)}: {error.strerror or error}",
            hint="say another --listen HOST:PORT",
        ) from None


def joined(host: str, port: int) -> str:
    """An address as people write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
