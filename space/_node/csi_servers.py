"""Volumes over the network: one NFS server and one NVMe/TCP target, in the loop that serves the mount of all volumes.

A volume is offered from its first publication to the end of its last one, and only to the nodes it is published on:

* A tree is an export of its own (its own fsid and handles) at ``/ID``, below a root that lists nothing.  It is open to
  the addresses of its nodes, as far as all of them are known, within the rules of the whole server.  A node that has
  the store comes from one of this machine's own addresses.
* A block device is a subsystem of its own, with one namespace.  It is open to the hosts that its nodes are by their
  ids (:func:`space.projections.csi.model.host_nqn`); connections of others are ended.

So a node that was lost, and that the volume was taken from, is shut out whenever it comes back.

What clients know a volume by follows from the store and the volume: it is the same whenever the owner starts again.
Then everything is offered before anybody can connect: a client that was told of nothing would give its files up.

The file model is the mount's: capacity is enforced, and a cut is between two requests of everybody's.  NVMe writes need
no settling: what is acknowledged is in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs

from space._errors import RefusedError, SpaceError, Status, UnavailableError, UsageError
from space._node import nfs_view
from space._node.csi_files import VolumeFiles
from space._node.local_block import BlockWriter, LocalBlockDevice, namespace_identity
from space._node.nfs_recovery import StoreRecovery
from space._node.nfs_watch import Watch
from space._node.nvme_view import SERIAL_BYTES, WATCH_SECONDS, joined, subsystem_name
from space._node.store import Store
from space._node.view_policy import enforce_view_policy
from space.events.ids import CapsuleId
from space.projections.csi.model import NFS, NVME, Published, Reach, Volume, host_nqn, node_address
from space.projections.nfs.exports import ChangingExports, Export, Network, Rule, Squash, export_number
from space.projections.nfs.server import Server as NfsServer
from space.projections.nvme.server import Listener
from space.projections.nvme.server import Server as NvmeServer
from space.projections.nvme.target import CONTROLLER_IDS, AnaState, Namespace, Subsystem, Target
from space.projections.vfs import FileSystem

log: Final = logging.getLogger("space.csi")

Address = tuple[str, int]


@attrs.frozen
class Listening:
    """Where to serve: each transport at an address, or not at all; and the host that nodes are told.

    Attributes:
        rules: which clients may use NFS at all, the first that fits; none: everybody.
        lease_seconds: of NFS clients.
        nfs_address: what nodes are told instead of where NFS is served: it leads to whoever serves.
    """

    nfs: Address | None = None
    nvme: Address | None = None
    advertise: str = ""
    rules: tuple[Rule, ...] = ()
    lease_seconds: int = nfs_view.LEASE_SECONDS
    nfs_address: str = ""

    def __attrs_post_init__(self) -> None:
        for option, found in (("--nfs", self.nfs), ("--nvme", self.nvme)):
            if found is not None and not self.advertise and _is_wildcard(found[0]):
                raise UsageError(
                    f"{option} {joined(*found)} says not where nodes reach it", hint="add --advertise HOST"
                )

    def told(self, listened: Address) -> str:
        """An address as nodes are told it."""
        return joined(self.advertise or listened[0], listened[1])


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


@attrs.define(eq=False)
class _Device:
    """A block volume that is offered, and the size hosts were told last."""

    subsystem: Subsystem
    namespace: Namespace
    device: LocalBlockDevice
    size: int


class Devices:
    """Block volumes as NVMe subsystems, each with one namespace and open to the hosts that its nodes are.

    In the loop that serves them.  What hosts know a volume by follows from its data alone, and so is the same through
    every node of a cluster; a node that is one of several has numbers for controllers of its own.
    """

    def __init__(
        self, store: Store, writer: BlockWriter, serial: str, *, controller_ids: range = CONTROLLER_IDS
    ) -> None:
        """None yet."""
        self.target = Target(serial=serial)
        self._store = store
        self._writer = writer
        self._controller_ids = controller_ids
        self._state = AnaState.OPTIMIZED
        self._devices: dict[str, _Device] = {}

    def __iter__(self) -> Iterator[str]:
        """The ids of the volumes that are offered."""
        return iter(list(self._devices))

    def __contains__(self, volume: str) -> bool:
        """Whether it is offered."""
        return volume in self._devices

    def put(self, volume: Volume, data: CapsuleId) -> None:
        """Offers a volume to the nodes it is published on, and to no others."""
        hosts = frozenset(map(host_nqn, volume.published))
        found = self._devices.get(volume.id)
        if found is not None:
            if found.subsystem.hosts != hosts:
                self.target.set_hosts(found.subsystem.nqn, hosts)
            return
        device = LocalBlockDevice(self._store, data, writer=self._writer)
        identity = namespace_identity(data)
        serial = identity.uuid[-SERIAL_BYTES:].hex()
        subsystem = Subsystem(_nqn(data), serial, hosts=hosts, controller_ids=self._controller_ids)
        namespace = Namespace(
            1, device, identity.uuid, identity.nguid, identity.eui64, reservations=device.reservations
        )
        subsystem.add(namespace)
        subsystem.set_ana(namespace.ana_group, self._state)
        self.target.add(subsystem)
        self._devices[volume.id] = _Device(subsystem, namespace, device, device.info().size)

    def take(self, volume: str) -> None:
        """Offers it to nobody; connections to it are ended."""
        found = self._devices.pop(volume, None)
        if found is not None:
            self.target.remove(found.subsystem.nqn)
            found.device.close()

    def set_state(self, state: AnaState) -> None:
        """How all of them are reached through this node."""
        if state is not self._state:
            self._state = state
            for each in self._devices.values():
                each.subsystem.set_ana(each.namespace.ana_group, state)

    def look(self) -> None:
        """Tells hosts of other sizes, and of what happened to reservations."""
        for each in list(self._devices.values()):
            with contextlib.suppress(SpaceError):  # a volume that is deleted meanwhile
                size = each.device.info().size
                if size != each.size:
                    each.size = size
                    each.subsystem.changed(each.namespace.nsid)
                each.subsystem.tell_reservations(each.namespace)

    def close(self) -> None:
        """Lets go of all of them; their connections have ended."""
        for each in self._devices.values():
            each.device.close()
        self._devices.clear()


class Trees:
    """Trees as NFS exports, each at its volume's id and open to its nodes' addresses.  In the loop that serves."""

    def __init__(
        self,
        store: Store,
        files: Callable[[CapsuleId], FileSystem],
        rules: Sequence[Rule],
        *,
        own: bool = True,
    ) -> None:
        """None yet.

        ``files`` shows a tree with its volume's capacity, ``rules`` are those of the whole server, and ``own`` is
        whether a node that has the store is this machine.
        """
        self.exports = ChangingExports(key=nfs_view.handle_key(store), time_ns=time.time_ns())
        self._store = store
        self._files = files
        self._rules = tuple(rules)
        self._own = own
        self._exported: dict[str, Export] = {}
        self._offered: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        """The ids of the volumes that are offered."""
        return iter(list(self._offered))

    def __contains__(self, volume: str) -> bool:
        """Whether it is offered."""
        return volume in self._offered

    def put(self, volume: Volume, data: CapsuleId) -> None:
        """Offers a volume to the nodes it is published on, and to no others."""
        export = self._exported.get(volume.id)
        if export is None:
            # kept as long as there is the volume: what clients have open is of this object
            export = self._exported[volume.id] = Export(
                export_number(self._store.id, data),
                (volume.id.encode(),),
                self._files(data),
                squash=Squash.NONE,
            )
        rules = rules_of(volume, self._rules, own_addresses() if self._own else [])
        if export.rules != rules:
            export.allow(rules)
        self.exports.add(export, time.time_ns())
        self._offered.add(volume.id)

    def take(self, volume: str) -> None:
        """Offers it to nobody."""
        export = self._exported.get(volume)
        if export is not None:
            self.exports.remove(export, time.time_ns())
        self._offered.discard(volume)

    def forget(self, volume: str) -> None:
        """As :meth:`take`, of a volume that is deleted."""
        self.take(volume)
        self._exported.pop(volume, None)


class Servers:
    """What is served of the volumes of one store."""

    def __init__(self, store: Store, files: VolumeFiles, where: Listening) -> None:
        """Nothing yet: see :meth:`open` and :meth:`listen`."""
        self._store = store
        self._files = files
        self._where = where
        self._told: dict[str, str] = {}
        self._nfs: NfsServer | None = None
        self._trees: Trees | None = None
        self._devices: Devices | None = None

    # --- from any thread -------------------------------------------------------------------------

    def check(self, transport: str) -> None:
        """Refuses a transport that is not served here.

        Raises:
            RefusedError: this one.
        """
        if getattr(self._where, transport) is None:
            raise RefusedError(
                f"the owner of the store serves no {transport}",
                hint=f"start it with --{transport} HOST:PORT",
                status=Status.NOT_PERMITTED,
            )

    def allow(self, transport: str, data: CapsuleId) -> None:
        """Refuses what a policy keeps from where the transport can be reached.

        Raises:
            RefusedError: one in ``data`` does; the log says so from now on.
        """
        listen = self._where.nfs if transport == NFS else self._where.nvme
        assert listen is not None
        enforce_view_policy(self._store, [data], transport, listen[0])

    def offer(self, volume: Volume, data: CapsuleId) -> Reach:
        """Lets those nodes reach a volume that it is published on; says how.

        Raises:
            RefusedError: its transport is not served here, or a policy in it forbids that.
            UnavailableError: the loop does not get to it, or is not listening yet.
        """
        self.check(volume.transport)
        self._files.in_loop(lambda: self.put(volume, data))
        told = self._told.get(volume.transport)
        if told is None:
            raise UnavailableError(f"{volume.transport} is not served yet", hint="try again")
        return reach_of(volume, data, told)

    def withdraw(self, volume: str) -> None:
        """Lets nobody reach a volume; one that is not offered is no error."""
        self._files.in_loop(lambda: self._take(volume))

    def forget(self, volume: str) -> None:
        """As :meth:`withdraw`, of a volume that is deleted."""

        def forget() -> None:
            self._take(volume)
            if self._trees is not None:
                self._trees.forget(volume)

        self._files.in_loop(forget)

    def settle(self) -> None:
        """Nothing to wait for: what is told is done at once, here, and there is nobody else."""

    # --- in the loop -----------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def serving(self, published: Iterable[tuple[Volume, CapsuleId]]) -> AsyncIterator[None]:
        """Offers what is published and listens, while it is entered.

        Raises:
            UnavailableError: an address is in use, or not this machine's.
        """
        async with contextlib.AsyncExitStack() as stack:
            if self._where.nfs is not None:
                await self._open_nfs(stack)
            if self._where.nvme is not None:
                self._open_nvme(stack)
            for volume, data in published:
                self._put_or_say(volume, data)
            await self._listen(stack)
            yield

    async def _open_nfs(self, stack: contextlib.AsyncExitStack) -> None:
        store = self._store
        recovery = await asyncio.to_thread(StoreRecovery, store, nfs_view.server_name(store))
        self._trees = Trees(store, self._files.export, self._where.rules)
        self._nfs = nfs_view.server_over(store, self._trees.exports, recovery, nfs_view.Options().config())
        stack.push_async_callback(self._nfs.close)
        watch = Watch(self._nfs.service.state, now=self._nfs.now)
        store.watchers.append(watch)
        stack.callback(store.watchers.remove, watch)

    def _open_nvme(self, stack: contextlib.AsyncExitStack) -> None:
        writer = BlockWriter(self._store)
        stack.push_async_callback(writer.close)
        serial = subsystem_name(self._store.id)[:SERIAL_BYTES].hex()
        self._devices = Devices(self._store, writer, serial)
        stack.callback(self._devices.close)

    async def _listen(self, stack: contextlib.AsyncExitStack) -> None:
        if self._nfs is not None and self._where.nfs is not None:
            self._told[NFS] = self._where.told(await nfs_view.listening(self._nfs, self._where.nfs))
        if self._devices is not None and self._where.nvme is not None:
            server = NvmeServer(self._devices.target)
            stack.push_async_callback(server.close)
            self._told[NVME] = self._where.told(await listening(server, self._where.nvme))
            watching = asyncio.create_task(self._watch(self._devices))
            stack.push_async_callback(ended, watching)

    def _put_or_say(self, volume: Volume, data: CapsuleId) -> None:
        try:
            self.check(volume.transport)
            self.put(volume, data)
        except SpaceError as error:
            log.warning("volume %s is published, and not served: %s", volume.id, error)

    def put(self, volume: Volume, data: CapsuleId) -> None:
        """Offers a volume to the nodes it is published on, and to no others.

        Raises:
            RefusedError: a policy in it forbids that it is seen from the network.
        """
        self.allow(volume.transport, data)
        offered = self._trees if volume.transport == NFS else self._devices
        assert offered is not None
        offered.put(volume, data)

    def _take(self, volume: str) -> None:
        for each in (self._trees, self._devices):
            if each is not None:
                each.take(volume)

    async def _watch(self, devices: Devices) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            devices.look()


def reach_of(volume: Volume, data: CapsuleId, server: str) -> Reach:
    """How a volume is reached at a server."""
    if volume.transport == NFS:
        return Reach(NFS, server, share=f"/{volume.id}")
    return Reach(NVME, server, nqn=_nqn(data), uuid=str(namespace_identity(data).uuid))


def own_addresses(proc: Path = Path("/proc/net")) -> list[str]:
    """The addresses of this machine, as the kernel's tables have them; none if they cannot be read."""
    found = {"127.0.0.1"}
    try:
        found |= set(_LOCAL_V4.findall((proc / "fib_trie").read_text()))
        for line in (proc / "if_inet6").read_text().splitlines():
            found.add(str(ipaddress.ip_address(bytes.fromhex(line.split()[0]))))
    except (OSError, ValueError, IndexError):
        return []
    return sorted(found)


_LOCAL_V4: Final = re.compile(r"\|-- ([0-9.]+)\n +/32 host LOCAL")


def rules_of(volume: Volume, rules: Sequence[Rule], own: Sequence[str]) -> tuple[Rule, ...]:
    """Who may use the export of a volume: its nodes, within the server's rules; without rules: everybody.

    ``own`` are the addresses of a node that has the store.  Where the address of one node is not known, all that the
    server's rules let in are taken for that node.
    """
    found = []
    for node, published in volume.published.items():
        told = node_address(node)
        addresses = own if told is None else [told] if told else []
        if not addresses:
            return tuple(rules)
        found += [rule for each in addresses if (rule := _rule_of(each, published, rules)) is not None]
    return tuple(found) or (_NOBODY,)


def _rule_of(address: str, published: Published, rules: Sequence[Rule]) -> Rule | None:
    """The rule for one address: what the publication allows, within what the server's rules do."""
    network = ipaddress.ip_network(address)
    if not rules:
        return Rule(network, read_only=published.readonly)
    within = next((each for each in rules if _within(network, each)), None)
    return None if within is None else Rule(network, read_only=published.readonly or within.read_only)


def _within(network: Network, rule: Rule) -> bool:
    return network.version == rule.network.version and network.network_address in rule.network


_NOBODY: Final = Rule(ipaddress.ip_network("::/128"))


def _nqn(data: CapsuleId) -> str:
    """The subsystem of a volume: the same for as long as there is the volume, and of no other."""
    return f"nqn.2014-08.org.nvmexpress:uuid:{data.derive(b'csi nvme subsystem')}"


async def listening(server: NvmeServer, listen: Address, *, first_port: int = 1) -> Address:
    """Has an NVMe server listen, and says at which host and port.

    Raises:
        UnavailableError: the address is in use, or not this machine's.
    """
    try:
        (port,) = await server.start([Listener(*listen)], first_port=first_port)
    except OSError as error:
        raise UnavailableError(
            f"cannot listen at {joined(*listen)}: {error.strerror or error}",
            hint="say another --nvme HOST:PORT",
        ) from None
    return listen[0], port.service


async def ended(task: asyncio.Task[None]) -> None:
    """Ends a task, and returns when it has."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
