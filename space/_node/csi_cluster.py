"""Volumes that a cluster owns: every node answers the driver's calls, and every node that is told to serves them.

What is known of volumes, and where they are published, is in the log (:mod:`space._node.csi_volumes`).  A node that
serves follows it: it offers what is published as soon as it has applied that, and no longer what is not.

* Block devices are served by all of these nodes at once, as paths of one NVMe subsystem for each volume
  (:mod:`space._node.nvme_node`).
* Trees are served by one of them at a time, with an epoch of its own (:mod:`space._node.nfs_tenure`): the next one
  takes over with the same handles, and clients claim what they held.

Where nodes serve is in the log too, so whoever is asked can tell it.  Who publishes a volume, or ends that, has an
answer only when all nodes that can be asked have followed: paths are there, or are closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from space._errors import ConflictError, RefusedError, SpaceError, Status, UnavailableError
from space._node import views
from space._node.caller import Document, Terms
from space._node.csi_files import VolumeFiles
from space._node.csi_owner import PREFIX, VolumeCalls
from space._node.csi_servers import Devices, Listening, Trees, ended, listening, reach_of
from space._node.csi_volumes import ON_NODE, VolumeTree
from space._node.local_block import BlockWriter
from space._node.member_vfs import MemberFileSystem
from space._node.nfs_node import (
    CONFIRM_SECONDS,
    Claim,
    NfsOptions,
    NfsViews,
    check_free,
    parse_claim,
    until_over,
)
from space._node.nfs_recovery import epoch_of
from space._node.nfs_tenure import Tenure, TenureRecovery
from space._node.nfs_view import Options, server_name
from space._node.nfs_view import listening as nfs_listening
from space._node.nfs_watch import Watch
from space._node.node_views import NodeViews, Running, ask_others
from space._node.nvme_node import LEADER_LOOK_SECONDS, Leadership, check_apart, controller_ids, first_port
from space._node.nvme_view import SERIAL_BYTES, WATCH_SECONDS, joined, parse_listen, subsystem_name
from space._node.view_policy import enforce_view_policy
from space.events import types as ev
from space.events.codec import Entry
from space.events.commands import Guard
from space.events.ids import CapsuleId
from space.projections.csi.model import NFS, NVME, Reach, Volume
from space.projections.nfs.exports import Squash
from space.projections.nfs.server import Clock, Server, Tasks, make_shell
from space.projections.nfs.service import Service
from space.projections.nvme.server import Server as NvmeServer

if TYPE_CHECKING:
    from space._node.cluster import ClusterNode
    from space._node.member import Member

METHOD: Final = "csi"
"""How far a node has followed is what other nodes ask by this (see :attr:`space.replication.node.Node.on_call`)."""

TREES_METHOD: Final = "csi trees"
"""Whether it serves trees, and in which epoch, by this."""

SETTLE_SECONDS: Final = 0.25
"""How long after a change it is looked again and again: a change is told of before it can be read."""

RESCAN_SECONDS: Final = 5.0
"""How often what is published is looked at though nothing was told: a replica that is brought forward is told less."""

FOLLOWED_SECONDS: Final = 5.0
"""How long nodes that answer may take to follow: they need milliseconds, but for one that is busy or behind."""

FOLLOWED_POLL_SECONDS: Final = 0.02

ABOUT: Final = f"{PREFIX}about"

MAKE_TRIES: Final = 8
"""How often the directories of all volumes are made again because another node makes them now."""

SERVER_MARK: Final = ":csi"
"""The NFS server of volumes is another one than that of the tree, with epochs and clients of its own."""

log: Final = logging.getLogger("space.csi")

_CALLS: Final = {
    PREFIX + name: method
    for name, method in vars(VolumeCalls).items()
    if inspect.isfunction(method) and name[0] != "_"
}


# --- what a node offers ----------------------------------------------------------------------------


class Follower:
    """Has a node offer what is published, as the log goes on; in the loop that serves.

    Attributes:
        followed: everything up to this position of the log has been.
    """

    def __init__(
        self, member: Member, volumes: VolumeTree, offered: Devices | Trees, transport: str, host: str
    ) -> None:
        """Offers nothing yet; ``host`` is what it is to be served at."""
        self.followed = 0
        self._member = member
        self._volumes = volumes
        self._offered = offered
        self._transport = transport
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()
        self._until = 0.0
        self._scanned = -math.inf
        self._refused: set[str] = set()

    def __call__(self, entries: Sequence[Entry]) -> None:
        """A watcher of the store (:attr:`space._node.store.Store.watchers`)."""
        if any(_publishes(event) for entry in entries for _, event in entry.events):
            self.wake()

    def wake(self) -> None:
        """Has it look soon; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._until = self._loop.time() + SETTLE_SECONDS
        self._woken.set()

    async def pause(self, seconds: float) -> None:
        """Returns after that time, or when it is woken."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._woken.wait(), seconds)
        self._woken.clear()

    async def step(self) -> None:
        """Follows, if there may be anything new."""
        now = self._loop.time()
        if now < self._until or now - self._scanned > RESCAN_SECONDS:
            try:
                await self.follow()
            except SpaceError as error:
                log.warning("what is published is not looked at: %s", error)

    async def follow(self) -> None:
        """Offers what is published, and nothing else.

        Raises:
            SpaceError: it cannot be looked at.
        """
        self._scanned = self._loop.time()
        position, wanted = await asyncio.to_thread(self._look)
        for gone in [each for each in self._offered if each not in wanted]:
            self._offered.take(gone)
        for volume, data in wanted.values():
            try:
                self._offered.put(volume, data)
            except SpaceError as error:
                log.warning("volume %s is published, and not served: %s", volume.id, error)
        self.followed = position

    def _look(self) -> tuple[int, dict[str, tuple[Volume, CapsuleId]]]:
        """What is published here and now, and up to which position that has everything."""
        with self._member.stale():
            with self._member.reading() as txn:
                position = txn.applied.position
            published = [each for each in self._volumes.published() if each[0].transport == self._transport]
        self._refused &= {volume.id for volume, _ in published}
        return position, {
            volume.id: (volume, data) for volume, data in published if self._is_allowed(volume, data)
        }

    def _is_allowed(self, volume: Volume, data: CapsuleId) -> bool:
        """Whether policies let a volume be seen from here; it is looked through once."""
        if volume.id in self._offered:
            return True
        try:
            enforce_view_policy(self._member, [data], self._transport, self._host)
        except RefusedError as error:
            if volume.id not in self._refused:
                log.warning("volume %s is published, and not served: %s", volume.id, error)
            self._refused.add(volume.id)
            return False
        return True


def _publishes(event: ev.Event) -> bool:
    return isinstance(event, ev.XattrSet | ev.XattrRemoved) and event.name.startswith(ON_NODE)


class CsiViews:
    """What both transports have in common: whom they follow, and that others know where they serve."""

    def __init__(self, node: ClusterNode, volumes: Callable[[], VolumeTree]) -> None:
        self._node = node
        self._volumes = volumes
        self.follower: Follower | None = None

    def enter(self, stack: contextlib.AsyncExitStack, follower: Follower) -> None:
        """Has changes told to a follower until the stack ends."""
        watchers = self._node.store.watchers
        watchers.append(follower)
        stack.callback(watchers.remove, follower)
        self.follower = follower
        stack.callback(setattr, self, "follower", None)

    def followed(self) -> int | None:
        """How far this node has followed; None: it serves none."""
        follower = self.follower
        if follower is None:
            return None
        if follower.followed < self._node.store.applied_now.position:
            follower.wake()
        return follower.followed

    def note(self, transport: str, where: Listening, listen: tuple[str, int]) -> None:
        """Tells the others, by the log, where this node serves, unless they know; blocks.

        Raises:
            UnavailableError: nobody leads.
        """
        told = where.nfs_address if transport == NFS and where.nfs_address else where.told(listen)
        with self._node.store.stale():
            self._volumes().serve_at(self._node.config.node, transport, joined(*listen), told)


# --- block devices ---------------------------------------------------------------------------------


class DeviceViews(NodeViews[Listening]):
    """Block volumes through this node, one path of several to each."""

    protocol = "NVMe"
    log = log

    def __init__(self, home: Path, node: ClusterNode, volumes: Callable[[], VolumeTree]) -> None:
        """Nothing is served yet."""
        super().__init__()
        self.shared = CsiViews(node, volumes)
        self._home = home
        self._node = node
        self._volumes = volumes

    async def _serve(self, running: Running[Listening]) -> None:
        over, store, where = running.told_to_end(), self._node.store, running.options
        if over.is_set():
            return
        assert where.nvme is not None
        number = self._node.config.node
        check_apart([number, *store.members()])
        volumes = await asyncio.to_thread(_settled, store, self._volumes)
        with store.stale():  # looks of this thread; devices confirm what is read by themselves
            async with contextlib.AsyncExitStack() as stack:
                writer = BlockWriter(store)
                stack.push_async_callback(writer.close)
                serial = subsystem_name(self._node.config.cluster)[:SERIAL_BYTES].hex()
                devices = Devices(store, writer, serial, controller_ids=controller_ids(number))
                stack.callback(devices.close)
                leadership = Leadership([store])
                devices.set_state(*leadership.states(time.monotonic()))
                follower = Follower(store, volumes, devices, NVME, where.nvme[0])
                self.shared.enter(stack, follower)
                # before anybody can connect: a host that is refused here would give this path up
                await follower.follow()
                server = NvmeServer(devices.target)
                stack.push_async_callback(server.close)
                found = await listening(server, where.nvme, first_port=first_port(number))
                await asyncio.to_thread(self.shared.note, NVME, where, found)
                running.view = _view(NVME, joined(*found))
                stack.enter_context(views.registered(self._home, running.view))
                if not running.ready.done():
                    running.ready.set_result(running.view)
                log.info("volumes are served over NVMe/TCP at %s", running.view["target"])
                await _kept(over, follower, devices, leadership)


async def _kept(over: asyncio.Event, follower: Follower, devices: Devices, leadership: Leadership) -> None:
    """Follows who leads, what is published, and what it has become, until it is told to end."""
    looked = 0.0
    while not over.is_set():
        now = time.monotonic()
        devices.set_state(*leadership.states(now))
        await follower.step()
        if now - looked >= WATCH_SECONDS:
            looked = now
            devices.look()
        await follower.pause(LEADER_LOOK_SECONDS)


def _settled(store: Member, volumes: Callable[[], VolumeTree]) -> VolumeTree:
    """The volumes, once what is here is as new as anywhere; blocks.

    Raises:
        UnavailableError: nobody leads.
    """
    store.group.barrier(seconds=CONFIRM_SECONDS)
    return volumes()


def _view(transport: str, target: str) -> Document:
    return {
        "view": "csi",
        "name": f"csi-{transport}-{os.getpid()}",
        "source": "/csi/volumes",
        "at": None,
        "target": target,
        "address": target,
        "pid": os.getpid(),
        "started_ns": time.time_ns(),
        "node": True,
    }


# --- trees -----------------------------------------------------------------------------------------


class MemberVolumeFiles(VolumeFiles, MemberFileSystem):
    """The tree of one volume, or all volumes, on the node that serves them: capacity, and the guard of its epoch."""

    def __init__(
        self,
        member: Member,
        home: CapsuleId,
        guard: Guard,
        tree: CapsuleId | None = None,
        beside: VolumeFiles | None = None,
    ) -> None:
        """As :class:`VolumeFiles`; what is changed is changed under ``guard``."""
        MemberFileSystem.__init__(self, member, home if tree is None else tree, guard, read_only=False)
        self._account(member, home, beside)

    def export(self, tree: CapsuleId) -> MemberVolumeFiles:
        """The tree of one volume, as a file system of its own."""
        return MemberVolumeFiles(self._member, self._home, self._guard, tree, self)


class TreeViews(NfsViews):
    """Trees through the node whose turn it is; the others stand by."""

    protocol = "NFS"
    log = log

    def __init__(self, home: Path, node: ClusterNode, volumes: Callable[[], VolumeTree]) -> None:
        """Nothing is served yet."""
        super().__init__(home, node, lambda _: node.store)
        self.shared = CsiViews(node, volumes)
        self._volumes = volumes
        self._where = Listening()

    def keep_serving_at(self, where: Listening) -> None:
        """Serves as soon as it is this node's turn."""
        assert where.nfs is not None
        self._where = where
        offer = Options(squash=Squash.NONE, rules=where.rules, lease_seconds=where.lease_seconds)
        self.keep_serving(NfsOptions(("/csi/volumes",), where.nfs, offer))

    async def _serve(self, running: Running[NfsOptions]) -> None:
        # also before it serves: clients are told of all nodes that may
        await asyncio.to_thread(self.shared.note, NFS, self._where, running.options.listen)
        await super()._serve(running)

    def _name(self) -> str:
        return server_name(self._node.store) + SERVER_MARK

    def _look(self) -> tuple[int, dict[int, Claim | None]]:
        store = self._node.store
        store.group.barrier(seconds=CONFIRM_SECONDS)
        with store.stale():
            epoch = epoch_of(store, self._name())
        _, answers = ask_others(self._node, TREES_METHOD)
        return epoch, {node: parse_claim(each) for node, each in answers.items()}

    async def _office(self, running: Running[NfsOptions], over: asyncio.Event, epoch: int) -> None:
        options, store = running.options, self._node.store
        volumes = await asyncio.to_thread(_settled, store, self._volumes)
        tenure = Tenure(store, self._name(), epoch)
        await asyncio.to_thread(check_free, options.listen)
        if not await tenure.begin():
            return
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._resign)
            self._claim = Claim(epoch, "")
            files = MemberVolumeFiles(store, volumes.volumes_home, tenure.guard)
            trees = Trees(store, files.export, options.offer.rules, own=False)
            follower = Follower(store, volumes, trees, NFS, options.listen[0])
            self.shared.enter(stack, follower)
            await follower.follow()
            server = self._server(trees, tenure, options)
            stack.push_async_callback(server.close)
            watch = Watch(server.service.state, now=server.now)
            store.watchers.append(watch)
            stack.callback(store.watchers.remove, watch)
            host, port = await nfs_listening(server, options.listen)
            running.view = {**_view(NFS, joined(host, port)), "epoch": epoch}
            self._claim = Claim(epoch, str(running.view["target"]))
            stack.enter_context(views.registered(self._home, running.view))
            if not running.ready.done():
                running.ready.set_result(running.view)
            log.info("volumes are served over NFS at %s in epoch %d", running.view["target"], epoch)
            stack.push_async_callback(ended, asyncio.create_task(_followed(follower)))
            await until_over(tenure, over, options.offer.lease_seconds)
            running.view = {}

    def _server(self, trees: Trees, tenure: Tenure, options: NfsOptions) -> Server:
        tasks, clock = Tasks(), Clock(asyncio.get_running_loop().time)
        config = attrs.evolve(options.offer.config(), delegations=False)
        service = Service(
            trees.exports,
            make_shell(tasks),
            TenureRecovery(tenure),
            name=self._name().encode(),
            now=clock(),
            config=config,
        )
        return Server(service, tasks, clock)


async def _followed(follower: Follower) -> None:
    while True:
        await follower.step()
        await follower.pause(LEADER_LOOK_SECONDS)


# --- calls -----------------------------------------------------------------------------------------


class CsiNode:
    """What a node does for the driver: it answers calls, and serves if it is told to."""

    def __init__(self, home: Path, node: ClusterNode) -> None:
        """Serves nothing yet."""
        self._node = node
        self._tree: VolumeTree | None = None
        self.devices = DeviceViews(home, node, self._volumes)
        self.trees = TreeViews(home, node, self._volumes)

    @staticmethod
    def find(method: str) -> Callable[..., Any] | None:
        """The call of that name."""
        return _CALLS.get(method)

    def keep_serving(self, where: Listening) -> None:
        """Serves, from as soon as that can be."""
        if where.nvme is not None:
            self.devices.keep_serving(where)
        if where.nfs is not None:
            self.trees.keep_serving_at(where)

    def call(self, method: str, arguments: Document, terms: Terms) -> Any:
        """Carries a call out, once however often it is made with the same terms."""
        store = self._node.store
        if method == ABOUT:  # asked twice a second: whether there is a quorum is found out by other calls
            return {"pid": os.getpid(), "incarnation": self._node.config.cluster.hex(), "mount": ""}
        with store.relaxed(math.inf):
            store.confirm()
            volumes = self._volumes()
            calls = VolumeCalls(volumes, self._room, "")
            signed = (
                volumes.signed(_caller(terms.client), terms.sequence)
                if terms.client
                else contextlib.nullcontext()
            )
            with signed:
                return _CALLS[method](calls, **arguments)

    def _volumes(self) -> VolumeTree:
        """All volumes; their directories are made by whichever node needs them first."""
        if self._tree is None:
            store = self._node.store
            network = ClusterNetwork(self._node, self, self._volumes)
            for _ in range(MAKE_TRIES):
                with contextlib.suppress(ConflictError):
                    self._tree = VolumeTree(
                        store, network=network, look_again=store.group.barrier, shown=False
                    )
                    return self._tree
                store.group.barrier()
            raise UnavailableError("other nodes make the directories of volumes", hint="try again")
        return self._tree

    def _room(self) -> int:
        found = os.statvfs(self._node.home)
        return found.f_bavail * found.f_frsize

    # --- for other nodes ---------------------------------------------------------------------------

    def answer(self, method: str) -> Any:
        """What another node is told that asks by ``method``."""
        return self.trees.claim() if method == TREES_METHOD else self.followed()

    def followed(self) -> list[int | None]:
        """How far this node has followed, of block devices and of trees, each None where it serves none."""
        return [self.devices.shared.followed(), self.trees.shared.followed()]

    def retire(self, seconds: float) -> None:
        """Takes no more, and lets what is under way end so long."""
        self.devices.retire(seconds)
        self.trees.retire(seconds)

    def close(self) -> None:
        """Waits until nothing is served any more."""
        self.devices.close()
        self.trees.close()

    def end(self, target: str) -> Document | None:
        """Ends what is served at an address; None: nothing is."""
        return self.devices.end(target) or self.trees.end(target)


class ClusterNetwork:
    """Who serves volumes over the network: the nodes of a cluster that are told to."""

    def __init__(self, node: ClusterNode, csi: CsiNode, volumes: Callable[[], VolumeTree]) -> None:
        self._node = node
        self._csi = csi
        self._volumes = volumes

    def _served(self, transport: str) -> dict[int, tuple[str, str]]:
        """By member, where it listens and what nodes are told."""
        members = {self._node.config.node, *self._node.store.members()}
        found = self._volumes().served_at(transport)
        return {member: found[member] for member in sorted(found.keys() & members)}

    def check(self, transport: str) -> None:
        """Refuses a transport that no node serves.

        Raises:
            RefusedError: this one.
        """
        if not self._served(transport):
            raise RefusedError(
                f"no node of the cluster serves {transport}",
                hint=f"in the file of space serve --config: a view csi with {transport}: HOST:PORT",
                status=Status.NOT_PERMITTED,
            )

    def allow(self, transport: str, data: CapsuleId) -> None:
        """Refuses what a policy keeps from where one of the nodes can be reached.

        Raises:
            RefusedError: one in ``data`` does; the log says so from now on.
        """
        for host in {parse_listen(listen)[0] for listen, _ in self._served(transport).values()}:
            enforce_view_policy(self._node.store, [data], transport, host)

    def offer(self, volume: Volume, data: CapsuleId) -> Reach:
        """How a volume is reached; the nodes that serve find in the log that they are to offer it."""
        told = [told for _, told in self._served(volume.transport).values()]
        return reach_of(volume, data, ",".join(dict.fromkeys(told)))

    def withdraw(self, volume: str) -> None:
        """Nothing to do: they find that in the log, too."""

    def forget(self, volume: str) -> None:
        """Nothing to do: what is not published is not offered, and nothing is kept of it for long."""

    def settle(self) -> None:
        """Returns once every node that can be asked has followed up to here.

        Raises:
            UnavailableError: a node answers, and does not get to it.
        """
        position = self._node.store.applied_now.position
        deadline = time.monotonic() + FOLLOWED_SECONDS
        while late := list(self._behind(position)):
            if time.monotonic() > deadline:
                raise UnavailableError(f"node {late[0]} has not followed yet", hint="try again")
            time.sleep(FOLLOWED_POLL_SECONDS)

    def _behind(self, position: int) -> Iterator[int]:
        if _is_behind(self._csi.followed(), position):
            yield self._node.config.node
            return
        if len(self._node.store.members()) > 1:
            _, answers = ask_others(self._node, METHOD)
            yield from (node for node, each in answers.items() if _is_behind(each, position))


def _is_behind(followed: Any, position: int) -> bool:
    """Whether a node serves something as it was before a position; what is malformed says nothing."""
    if type(followed) is not list:
        return False
    return any(type(each) is int and each < position for each in followed)


def _caller(client: bytes) -> bytes:
    """Who a caller is where its calls about volumes are numbered, of which one may take several numbers."""
    return CapsuleId(client).derive(b"csi calls")
